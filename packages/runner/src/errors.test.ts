import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ERROR_CODES, MillraceError, TaskAbort, describeError, truncateUtf8 } from './errors.ts';
import type { ErrorCode } from './errors.ts';

describe('MillraceError', () => {
  test('carries code, message, cause and details', () => {
    const cause = new Error('disk full');
    const error = new MillraceError('resource_exhausted', 'limit', { cause, details: { limit: 'bytes' } });
    expect(error).toBeInstanceOf(Error);
    expect(error).toMatchObject({
      name: 'MillraceError',
      code: 'resource_exhausted',
      message: 'limit',
      cause,
      details: { limit: 'bytes' },
    });
    expect('cause' in new MillraceError('internal', 'x')).toBe(false);
  });

  test('is retryable for unavailable alone, unless said otherwise', () => {
    for (const code of Object.keys(ERROR_CODES) as ErrorCode[]) {
      expect(new MillraceError(code, 'x').retryable).toBe(code === 'unavailable');
    }
    expect(new MillraceError('data_loss', 'x', { retryable: true }).retryable).toBe(true);
    expect(new MillraceError('unavailable', 'x', { retryable: false }).retryable).toBe(false);
  });

  test('is recognised across installed copies, and nothing else is', () => {
    // What an error of another copy of the package looks like from here: same brand, other class.
    const foreign = Object.defineProperty(new Error('x'), Symbol.for('millrace.error'), { value: true });
    expect(MillraceError.is(foreign)).toBe(true);
    for (const value of [
      new Error('x'),
      null,
      undefined,
      'x',
      { code: 'internal' },
      new TaskAbort('limit'),
    ]) {
      expect(MillraceError.is(value)).toBe(false);
    }
  });

  test('from keeps ours and wraps everything else', () => {
    const ours = new MillraceError('not_found', 'x');
    expect(MillraceError.from(ours)).toBe(ours);
    const cause = new TypeError('no such thing');
    expect(MillraceError.from(cause)).toMatchObject({ code: 'internal', message: 'no such thing', cause });
    expect(MillraceError.from('text', 'data_loss')).toMatchObject({ code: 'data_loss', message: 'text' });
    expect(MillraceError.from(undefined)).toMatchObject({ message: 'unknown error' });
  });
});

describe('TaskAbort', () => {
  test('carries its reason and is recognised across installed copies', () => {
    const abort = new TaskAbort('deadline');
    expect(abort).toMatchObject({ name: 'TaskAbort', reason: 'deadline', message: 'task stopped: deadline' });
    expect(new TaskAbort('limit', 'maxOutputBytes 10 reached').message).toBe('maxOutputBytes 10 reached');
    const foreign = Object.defineProperty(new Error('x'), Symbol.for('millrace.task-abort'), { value: true });
    for (const value of [abort, foreign]) expect(TaskAbort.is(value)).toBe(true);
    for (const value of [new Error('x'), null, 'deadline', new MillraceError('canceled', 'x')]) {
      expect(TaskAbort.is(value)).toBe(false);
    }
  });
});

describe('describeError', () => {
  test('joins the messages of the causes, without what was said already', () => {
    const root = new Error('connect ECONNREFUSED');
    const middle = new Error('cannot reach the server: connect ECONNREFUSED', { cause: root });
    expect(describeError(new Error('upload failed', { cause: middle }))).toBe(
      'upload failed: cannot reach the server: connect ECONNREFUSED',
    );
  });

  test('tells what an AggregateError holds', () => {
    const error = new AggregateError([new Error('first'), new Error('second')], 'cleanup failed');
    expect(describeError(error)).toBe('cleanup failed: first: second');
  });

  test('has a sentence for whatever was thrown', () => {
    const cycle: Record<string, unknown> = {};
    cycle['self'] = cycle;
    const hostile = {
      toJSON(): never {
        throw new Error('no');
      },
    };
    for (const [thrown, text] of [
      [undefined, 'unknown error'],
      [null, 'unknown error'],
      ['', 'unknown error'],
      [new Error(''), 'Error'],
      [42, '42'],
      [10n, '10'],
      [Symbol('s'), 'Symbol(s)'],
      [{ code: 7 }, '{"code":7}'],
      [Object.create(null), '{}'],
      [function named() {}, 'function named'],
      [cycle, 'a thrown object that cannot be shown'],
      [hostile, 'a thrown object that cannot be shown'],
    ] as const) {
      expect(describeError(thrown)).toBe(text);
    }
  });

  test('ends for causes that go in a circle', () => {
    const a = new Error('a');
    a.cause = new Error('b', { cause: a });
    expect(describeError(a)).toBe('a: b');
  });

  test('is cut at 4096 bytes by default', () => {
    expect(describeError(new Error('x'.repeat(4096)))).toHaveLength(4096);
    expect(Buffer.byteLength(describeError(new Error('x'.repeat(4097))))).toBe(4096);
    expect(describeError(new Error('abcdef'), 5)).toBe('ab…');
  });
});

describe('truncateUtf8', () => {
  test('keeps text at the limit and cuts text past it', () => {
    expect(truncateUtf8('abcdef', 6)).toBe('abcdef');
    expect(truncateUtf8('abcdefg', 6)).toBe('abc…');
    expect(truncateUtf8('ääää', 8)).toBe('ääää');
    expect(truncateUtf8('ääää', 7)).toBe('ää…');
    expect(truncateUtf8('\uFEFFabc', 5)).toBe('…');
    expect(truncateUtf8('\uFEFFabcd', 6)).toBe('\uFEFF…');
    expect(truncateUtf8('abc', 2)).toBe('ab');
    expect(truncateUtf8('abc', 0)).toBe('');
  });

  test('never exceeds the limit and never breaks a character', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'grapheme' }), fc.nat(40), (text, maxBytes) => {
        const cut = truncateUtf8(text, maxBytes);
        expect(Buffer.byteLength(cut)).toBeLessThanOrEqual(maxBytes);
        if (Buffer.byteLength(text) <= maxBytes) expect(cut).toBe(text);
        else expect(text.startsWith(cut.replace(/…$/, ''))).toBe(true);
      }),
    );
  });
});
