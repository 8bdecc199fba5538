import { describe, expect, test } from 'vitest';
import { MillraceError, TaskAbort } from '@millrace/runner';
import { isTimeout } from './usage.ts';

const late = (limit: string): MillraceError =>
  new MillraceError('deadline_exceeded', 'late', { details: { limit, value: 1 } });

describe('an ending counts as a timeout', () => {
  test.each([
    ['the deadline of a try or an attempt', new TaskAbort('deadline', 'late')],
    ["a program's or a module's time", late('wallMs')],
    ["a compute's time", late('maxWallMs')],
    ["a runtime's time", late('runMs')],
  ])('by %s', (_what, error) => {
    expect(isTimeout(error)).toBe(true);
  });

  test.each([
    ['a cancellation', new TaskAbort('canceled', 'no')],
    ['a limit of another sort', new TaskAbort('limit', 'memory')],
    ['loading that takes too long', late('loadMs')],
    ['a call that took too long', new MillraceError('deadline_exceeded', 'no answer')],
    ['too much CPU time', new MillraceError('resource_exhausted', 'busy', { details: { limit: 'cpuMs' } })],
    ['any other error', new Error('no')],
    ['success', null],
  ])('not by %s', (_what, error) => {
    expect(isTimeout(error)).toBe(false);
  });
});
