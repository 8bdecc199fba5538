import { getEventListeners } from 'node:events';
import { describe, expect, test } from 'vitest';
import { sleep, systemClock, timeoutSignal } from './clock.ts';
import { SimulatedClock } from './testing/index.ts';

describe('systemClock', () => {
  test('fires once after the delay, and monotonic never goes back', async () => {
    const started = systemClock.monotonic();
    let fired = 0;
    await new Promise<void>((resolve) => {
      systemClock.setTimer(() => {
        fired += 1;
        resolve();
      }, 20);
    });
    // Timers count in whole milliseconds of the event loop's own clock, which may be one behind.
    expect(systemClock.monotonic() - started).toBeGreaterThanOrEqual(19);
    expect(fired).toBe(1);
    expect(Math.abs(systemClock.now() - Date.now())).toBeLessThan(1_000);
  });

  test('a cancelled timer does not fire, and cancelling again is harmless', async () => {
    let fired = false;
    const timer = systemClock.setTimer(() => (fired = true), 1);
    timer.cancel();
    timer.cancel();
    await sleep(systemClock, 20);
    expect(fired).toBe(false);
    timer.cancel();
  });

  test('a delay past what Node can hold does not fire at once, and can be cancelled', async () => {
    let fired = 0;
    const timers = [2 ** 31, 2 ** 40, Infinity].map((ms) => systemClock.setTimer(() => (fired += 1), ms));
    await sleep(systemClock, 20);
    expect(fired).toBe(0);
    for (const timer of timers) timer.cancel();
  });
});

describe('sleep', () => {
  test('resolves after the delay and leaves no listener behind', async () => {
    const clock = new SimulatedClock();
    const { signal } = new AbortController();
    let done = false;
    void sleep(clock, 10, signal).then(() => (done = true));
    await clock.advance(9);
    expect(done).toBe(false);
    await clock.advance(1);
    expect(done).toBe(true);
    expect(getEventListeners(signal, 'abort')).toEqual([]);
  });

  test('rejects with the reason when aborted, and its timer is gone', async () => {
    const clock = new SimulatedClock();
    const controller = new AbortController();
    const sleeping = sleep(clock, 10, controller.signal);
    const reason = new Error('enough');
    controller.abort(reason);
    await expect(sleeping).rejects.toBe(reason);
    expect(clock.pending).toBe(0);
    await expect(sleep(clock, 10, controller.signal)).rejects.toBe(reason);
    expect(clock.pending).toBe(0);
  });
});

describe('timeoutSignal', () => {
  test('aborts with its reason, made when the time is up', async () => {
    const clock = new SimulatedClock({ startAt: 0 });
    const { signal } = timeoutSignal(clock, 50, () => `late at ${clock.now()}`);
    await clock.advance(49);
    expect(signal.aborted).toBe(false);
    await clock.advance(1);
    expect(signal.reason).toBe('late at 50');
  });

  test('disposing it stops the timer', async () => {
    const clock = new SimulatedClock();
    let signal: AbortSignal;
    {
      using timeout = timeoutSignal(clock, 50, () => 'late');
      signal = timeout.signal;
    }
    expect(clock.pending).toBe(0);
    await clock.advance(100);
    expect(signal.aborted).toBe(false);
  });
});
