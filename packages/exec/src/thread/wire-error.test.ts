import { MillraceError, TaskAbort } from '@millrace/runner';
import { describe, expect, test } from 'vitest';
import { decodeError, encodeError } from './wire-error.ts';

const through = (thrown: unknown, trustAborts = false): Error =>
  decodeError(structuredClone(encodeError(thrown)), { trustAborts });

describe('an error on its way to another thread', () => {
  test('a MillraceError keeps code, message, details, retryable, stack and causes', () => {
    const cause = Object.assign(new TypeError('inner'), { code: 'EINNER' });
    const error = new MillraceError('data_loss', 'outer', { cause, retryable: true, details: { value: 7 } });
    const arrived = through(error);
    expect(MillraceError.is(arrived)).toBe(true);
    expect(arrived).toMatchObject({
      code: 'data_loss',
      message: 'outer',
      retryable: true,
      details: { value: 7 },
      stack: error.stack,
      cause: { name: 'TypeError', message: 'inner', code: 'EINNER' },
    });
  });

  test('a code outside of the closed set becomes internal', () => {
    const wire = { ...encodeError(new MillraceError('aborted', 'x')), code: 'toString' };
    expect(decodeError(wire)).toMatchObject({ code: 'internal' });
  });

  test('a TaskAbort is one again only where aborts are trusted', () => {
    const abort = new TaskAbort('lease_lost', 'gone');
    expect(through(abort, true)).toMatchObject({ reason: 'lease_lost', message: 'gone' });
    expect(TaskAbort.is(through(abort, true))).toBe(true);
    expect(TaskAbort.is(through(abort))).toBe(false);
    expect(through(abort)).toMatchObject({ name: 'TaskAbort', message: 'gone' });
  });

  test.each([
    ['undefined', undefined, 'thrown value is not an Error: undefined'],
    ['null', null, 'thrown value is not an Error: null'],
    ['text', 'just text', 'just text'],
    ['a number', 42, 'thrown value is not an Error: 42'],
    ['a symbol', Symbol('s'), 'thrown value is not an Error: Symbol(s)'],
    ['an object', { a: 1 }, 'thrown value is not an Error: { a: 1 }'],
    ['an object like an error', { message: 'alike' }, 'alike'],
  ])('%s thrown is told as it is', (_name, thrown, message) => {
    expect(through(thrown).message).toBe(message);
  });

  test('an error that throws when it is looked at is still an error', () => {
    const hostile = new Proxy(
      {},
      {
        get: () => {
          throw new Error('get');
        },
        getPrototypeOf: () => {
          throw new Error('proto');
        },
        has: () => {
          throw new Error('has');
        },
      },
    );
    expect(through(hostile)).toBeInstanceOf(Error);
    const message = {
      get: (): string => {
        throw new Error('no');
      },
    };
    const error = Object.defineProperty(new Error('x'), 'message', message);
    expect(through(error).message).toBe('an Error without a readable message');
    const details = { toJSON: () => 1n };
    expect(through(new MillraceError('aborted', 'x', { details }))).toMatchObject({ details: {} });
  });

  test('several errors thrown as one tell the first as the cause', () => {
    expect(through(new AggregateError([new Error('first'), new Error('second')], 'both'))).toMatchObject({
      message: 'both',
      cause: { message: 'first' },
    });
  });

  test('endless causes and endless texts are cut', () => {
    const loop = new Error('loop');
    loop.cause = loop;
    let depth = 0;
    for (let at: unknown = through(loop); at instanceof Error; at = at.cause) depth += 1;
    expect(depth).toBe(9);
    expect(through(new Error('x'.repeat(16_384))).message).toHaveLength(16_384);
    expect(through(new Error('x'.repeat(16_385))).message).toHaveLength(16_385);
    expect(through(new Error('x'.repeat(1_000_000))).message).toHaveLength(16_385);
  });
});
