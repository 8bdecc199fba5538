import { EventEmitter, once } from 'node:events';
import { PassThrough } from 'node:stream';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { sleep, timeoutSignal } from '../clock.ts';
import { SimulatedClock } from './simulated-clock.ts';

describe('SimulatedClock', () => {
  test('timers fire in order of time, then of creation, whatever was cancelled', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.record({ delay: fc.integer({ min: -5, max: 40 }), cancelled: fc.boolean() }), {
          maxLength: 60,
        }),
        async (plan) => {
          const clock = new SimulatedClock({ drain: () => Promise.resolve() });
          const fired: { index: number; at: number }[] = [];
          const timers = plan.map(({ delay }, index) =>
            clock.setTimer(() => fired.push({ index, at: clock.monotonic() }), delay),
          );
          for (const [index, { cancelled }] of plan.entries()) if (cancelled) timers[index]!.cancel();
          await clock.advance(40);
          const expected = plan
            .map(({ delay, cancelled }, index) => ({ index, at: Math.max(0, delay), cancelled }))
            .filter(({ cancelled }) => !cancelled)
            .toSorted((a, b) => a.at - b.at || a.index - b.index)
            .map(({ index, at }) => ({ index, at }));
          expect(fired).toEqual(expected);
          expect(clock.pending).toBe(0);
          expect(clock.nextAt).toBeNull();
        },
      ),
    );
  });

  test('advance fires the timer at its end and not the one past it, and time lands on the end', async () => {
    const clock = new SimulatedClock({ startAt: 1_000 });
    const fired: string[] = [];
    clock.setTimer(() => fired.push('at'), 10);
    clock.setTimer(() => fired.push('past'), 10.001);
    await clock.advance(10);
    expect(fired).toEqual(['at']);
    expect(clock.monotonic()).toBe(10);
    expect(clock.now()).toBe(1_010);
    expect(clock.nextAt).toBe(10.001);
    expect(clock.pending).toBe(1);
  });

  test('what a timer sets off has run before the next timer fires', async () => {
    const clock = new SimulatedClock();
    const order: string[] = [];
    const emitter = new EventEmitter();
    void (async () => {
      await once(emitter, 'go');
      for (let step = 0; step < 200; step += 1) await Promise.resolve();
      const pass = new PassThrough();
      pass.end('x');
      for await (const chunk of pass) order.push(`stream ${String(chunk)}`);
      order.push('chain done');
    })();
    clock.setTimer(() => emitter.emit('go'), 5);
    clock.setTimer(() => order.push('second timer'), 5);
    await clock.advance(5);
    expect(order).toEqual(['stream x', 'chain done', 'second timer']);
  });

  test('a timer set on the way fires within the same advance', async () => {
    const clock = new SimulatedClock();
    const at: number[] = [];
    const again = (): void => {
      at.push(clock.monotonic());
      clock.setTimer(again, 3);
    };
    clock.setTimer(again, 3);
    await clock.advance(10);
    expect(at).toEqual([3, 6, 9]);
  });

  test('runUntil stops at the timer that makes the condition true', async () => {
    const clock = new SimulatedClock();
    let ready = false;
    clock.setTimer(() => (ready = true), 70);
    clock.setTimer(() => undefined, 71);
    await clock.runUntil(() => ready);
    expect(clock.monotonic()).toBe(70);
    await clock.runUntil(() => ready);
    expect(clock.monotonic()).toBe(70);
  });

  test('runUntil says at once that nothing is left which could make the condition true', async () => {
    const clock = new SimulatedClock();
    clock.setTimer(() => undefined, 20);
    await expect(clock.runUntil(() => false)).rejects.toThrow(/false at 20 ms and no timer is pending/);
  });

  test('runUntil fires a timer at its time limit and none past it', async () => {
    const clock = new SimulatedClock();
    let seen = 0;
    const tick = (): void => {
      seen += 1;
      clock.setTimer(tick, 10);
    };
    clock.setTimer(tick, 10);
    await expect(clock.runUntil(() => seen === 6, { timeoutMs: 50 })).rejects.toThrow(
      /still false after 50 ms/,
    );
    expect(seen).toBe(5);
  });

  test('moving time while it is being moved is an error, and the first mover goes on', async () => {
    const clock = new SimulatedClock();
    let inner: Promise<void> | undefined;
    clock.setTimer(() => {
      inner = clock.advance(1);
      inner.catch(() => undefined);
    }, 1);
    await clock.advance(5);
    await expect(inner).rejects.toThrow(/being moved already/);
    expect(clock.monotonic()).toBe(5);
  });

  test('what a timer throws comes out of advance, and time can be moved again', async () => {
    const clock = new SimulatedClock();
    clock.setTimer(() => {
      throw new Error('in the timer');
    }, 4);
    await expect(clock.advance(10)).rejects.toThrow('in the timer');
    expect(clock.monotonic()).toBe(4);
    await clock.advance(6);
    expect(clock.monotonic()).toBe(10);
  });

  test('a timer that re-arms itself without a delay is found', async () => {
    const clock = new SimulatedClock({ drain: () => Promise.resolve() });
    const spin = (): void => void clock.setTimer(spin, 0);
    spin();
    await expect(clock.advance(1)).rejects.toThrow(/more than 100000 timers fired at 0 ms/);
  });

  test('a delay that is not a number, and a duration that is not finite or negative, are refused', async () => {
    const clock = new SimulatedClock();
    expect(() => clock.setTimer(() => undefined, NaN)).toThrow(RangeError);
    for (const ms of [NaN, -1, Infinity]) await expect(clock.advance(ms)).rejects.toThrow(RangeError);
    await clock.advance(0);
  });

  test('a jump of the wall clock moves now() alone', async () => {
    const clock = new SimulatedClock({ startAt: 0 });
    const fired: number[] = [];
    clock.setTimer(() => fired.push(clock.monotonic()), 10);
    clock.jumpWallClock(-3_600_000);
    await clock.advance(10);
    expect(fired).toEqual([10]);
    expect(clock.now()).toBe(-3_599_990);
  });

  test('sleep and timeoutSignal run on it', async () => {
    const clock = new SimulatedClock();
    let woke = false;
    const sleeping = sleep(clock, 60_000).then(() => (woke = true));
    const timeout = timeoutSignal(clock, 59_999, () => 'too late');
    await clock.advance(59_999);
    expect(timeout.signal.reason).toBe('too late');
    expect(woke).toBe(false);
    await clock.advance(1);
    await sleeping;
  });
});
