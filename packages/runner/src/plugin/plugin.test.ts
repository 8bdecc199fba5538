import { describe, expect, test } from 'vitest';
import { MillraceError } from '../errors.ts';
import { checkTaskId } from '../model/index.ts';
import { RunnerError, makeRunId, nameOfCapability } from './index.ts';

describe('run ids', () => {
  test('are runner, slot and a decimal number that all runners and slots share', () => {
    const first = makeRunId('subprocess', 'demo-slot');
    expect(first).toEqual({
      name: `subprocess-demo-slot-${first.seq}`,
      runner: 'subprocess',
      slot: 'demo-slot',
      seq: first.seq,
    });
    expect(first.seq).toBeGreaterThanOrEqual(1);
    expect(makeRunId('container', 'x').name).toBe(`container-x-${first.seq + 1}`);
    let last = first;
    while (last.seq < 16) last = makeRunId('r', 's');
    expect(last.name).toBe(`r-s-${last.seq}`);
  });

  test('of the longest parts are within the length of a task id', () => {
    const { name } = makeRunId('r'.repeat(128), 's'.repeat(64));
    checkTaskId(name.replace(/\d+$/, String(Number.MAX_SAFE_INTEGER)));
  });
});

describe('errors of the runner layer', () => {
  const cause = new MillraceError('permission_denied', 'no', { details: { a: 1 } });

  test.each([
    [
      RunnerError.noRunner('wasm'),
      'NoRunner',
      'failed_precondition',
      'no suitable runner for task kind: wasm',
    ],
    [
      RunnerError.unsupportedKind('R', 'container'),
      'UnsupportedKind',
      'unimplemented',
      "unsupported task kind for runner 'R': container",
    ],
    [RunnerError.invalidSpec('x'), 'InvalidSpec', 'invalid_argument', 'invalid specification: x'],
    [RunnerError.invalidSpec(cause), 'InvalidSpec', 'permission_denied', 'invalid specification: no'],
    [RunnerError.internal('x'), 'Internal', 'internal', 'internal error: x'],
    [RunnerError.missingField('F'), 'MissingField', 'invalid_argument', 'missing field: F'],
    [RunnerError.io(new Error('disk')), 'Io', 'unavailable', 'io error: disk'],
    [
      RunnerError.duplicateRunner('R'),
      'DuplicateRunner',
      'already_exists',
      'duplicate runner name: R; give one of the two another name',
    ],
  ] as const)('%s', (error, variant, code, message) => {
    expect(MillraceError.is(error)).toBe(true);
    expect(error).toMatchObject({ variant, code, message });
  });

  test('keep what led to them', () => {
    expect(RunnerError.invalidSpec(cause)).toMatchObject({ cause, details: { a: 1 } });
    expect(RunnerError.io(cause)).toMatchObject({ cause, retryable: true });
  });

  test('leave a bug what it is', () => {
    const bug = new TypeError('x is undefined');
    const check = (): never => {
      throw bug;
    };
    expect(() => RunnerError.specified(check)).toThrow(bug);
    expect(RunnerError.specified(() => 7)).toBe(7);
  });
});

test.each([
  ['/exec/subprocess/v1', 'exec-subprocess-v1'],
  ['a b/ö', 'a-b'],
  ['///', 'runner'],
  ['x'.repeat(99), 'x'.repeat(64)],
])('the capability %j gives the name %j', (capability, name) => {
  expect(nameOfCapability(capability)).toBe(name);
});
