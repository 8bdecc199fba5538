import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { MillraceError } from '@millrace/runner';
import { SimulatedClock } from '@millrace/runner/testing';
import { attemptTimeoutMs, backoffMs, callWithin, isBodyRefused, isLeaseGone } from './retry.ts';
import { never, wireError } from './simulation/scripted-dms.ts';

describe('backoffMs', () => {
  const range = { baseMs: 200, capMs: 5_000 };

  test('doubles up to the cap, with a random half taken off', () => {
    expect([1, 2, 3, 5, 6, 60].map((n) => backoffMs(n, range, () => 0.999999))).toEqual(
      [200, 400, 800, 3_200, 5_000, 5_000].map((ms) => expect.closeTo(ms, 0)),
    );
    expect(backoffMs(3, range, () => 0)).toBe(400);
  });

  test('is never less than the server asked for', () => {
    expect(backoffMs(1, range, () => 0, wireError(429, { retry_after_ms: 9_000 }))).toBe(9_000);
    expect(backoffMs(1, range, () => 0, wireError(429, { retry_after_ms: 1 }))).toBe(100);
    expect(backoffMs(1, range, () => 0, new Error('no idea'))).toBe(100);
  });
});

describe('attemptTimeoutMs', () => {
  test('is positive, within the request timeout, and less than what is left of the lease', () => {
    fc.assert(
      fc.property(
        fc.double({ min: 0.001, max: 1e7, noNaN: true }),
        fc.integer({ min: 1_000, max: 600_000 }),
        (leftMs, requestTimeoutMs) => {
          const timeout = attemptTimeoutMs(leftMs, requestTimeoutMs);
          expect(timeout).toBeGreaterThan(0);
          expect(timeout).toBeLessThanOrEqual(requestTimeoutMs);
          expect(timeout).toBeLessThan(leftMs);
        },
      ),
    );
  });

  test('leaves room for more than one attempt, and allows a last one when nothing is left', () => {
    expect(attemptTimeoutMs(15_000, 60_000)).toBe(5_000);
    expect(attemptTimeoutMs(2_000, 60_000)).toBe(1_000);
    expect(attemptTimeoutMs(500, 60_000)).toBe(450);
    expect(attemptTimeoutMs(0, 60_000)).toBe(1_000);
    expect(attemptTimeoutMs(-5_000, 60_000)).toBe(1_000);
  });
});

describe('callWithin', () => {
  test('gives the value, and leaves neither timer nor listener behind', async () => {
    const clock = new SimulatedClock();
    expect(await callWithin(clock, 100, 'x', () => Promise.resolve(7))).toBe(7);
    await expect(callWithin(clock, 100, 'x', () => Promise.reject(new Error('no')))).rejects.toThrow('no');
    expect(clock.pending).toBe(0);
  });

  test('aborts the call at its time limit with a retryable error that names the call, and not before', async () => {
    const clock = new SimulatedClock();
    let error: unknown = null;
    const call = callWithin(clock, 100, 'heartbeat', never).catch((reason: unknown) => (error = reason));
    await clock.advance(99);
    expect(error).toBeNull();
    await clock.advance(1);
    await call;
    expect(error).toMatchObject({
      code: 'unavailable',
      retryable: true,
      message: 'heartbeat: no answer within 100 ms',
    });
  });

  test('aborts with the parent, before and during the call', async () => {
    const clock = new SimulatedClock();
    const parent = new AbortController();
    const call = callWithin(clock, 100, 'x', never, parent.signal);
    parent.abort(new Error('stop'));
    await expect(call).rejects.toThrow('stop');
    let called = false;
    const late = callWithin(
      clock,
      100,
      'x',
      () => {
        called = true;
        return Promise.resolve();
      },
      parent.signal,
    );
    await expect(late).rejects.toThrow('stop');
    expect(called).toBe(false);
    expect(clock.pending).toBe(0);
  });
});

test('only 404, 409 and 410 say that the lease is gone', () => {
  const statuses = [400, 401, 403, 404, 409, 410, 413, 422, 429, 500, 503];
  expect(statuses.filter((status) => isLeaseGone(wireError(status)))).toEqual([404, 409, 410]);
  expect(statuses.filter((status) => isBodyRefused(wireError(status)))).toEqual([400, 413, 422]);
  expect(isLeaseGone(new Error('x'))).toBe(false);
  expect(isBodyRefused(new MillraceError('data_loss', 'x'))).toBe(false);
});
