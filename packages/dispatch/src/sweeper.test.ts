import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Clock, Logger } from '@millrace/runner';
import { SimulatedClock } from '@millrace/runner/testing';
import { expect, test } from 'vitest';
import { openFileBlobs } from './blobs/files.ts';
import { until } from './harness.test.support.ts';
import type { Store, SweepAnswer } from './store.ts';
import { openSqliteStore } from './stores/sqlite.ts';
import { Collector, SWEEP_INTERVAL_MS, Sweeper } from './sweeper.ts';

function silent(errors: string[] = []): Logger {
  const log: Logger = {
    debug() {},
    info() {},
    warn() {},
    error: (message) => void errors.push(message),
    child: () => log,
  };
  return log;
}

/** The one verb the sweeper uses, with the times at which it was called. */
function sweeping(clock: SimulatedClock, answers: () => SweepAnswer) {
  const at: number[] = [];
  const store = {
    sweep: async () => {
      at.push(clock.monotonic());
      return answers();
    },
  } as Partial<Store> as Store;
  return { store, at };
}

test('sweeps at once, then at least every interval', async () => {
  const clock = new SimulatedClock();
  const { store, at } = sweeping(clock, () => ({ rescued: 0, nextAtMs: null }));
  const sweeper = new Sweeper({ store, clock, log: silent() });
  await sweeper.start();
  await clock.advance(3 * SWEEP_INTERVAL_MS);
  expect(at).toEqual([0, 1, 2, 3].map((n) => n * SWEEP_INTERVAL_MS));
  await sweeper.close();
});

test.each([
  [true, [5_000, 5_500]],
  [false, [0, 500, 1_000, 1_500, 2_000, 2_500, 3_000, 3_500, 4_000, 4_500, 5_000, 5_500]],
])('hears nodes for five seconds first when leases are held at the start: %s', async (held, expected) => {
  const clock = new SimulatedClock();
  const { store, at } = sweeping(clock, () => ({ rescued: 0, nextAtMs: null }));
  const sweeper = new Sweeper({ store, clock, log: silent(), hasLeases: () => Promise.resolve(held) });
  await sweeper.start();
  await clock.advance(5_500);
  expect(at).toEqual(expected);
  await sweeper.close();
});

test('sweeps when the store says something is due, and not later than the interval', async () => {
  const clock = new SimulatedClock();
  const due = [clock.now() + 120, clock.now() + 60_000];
  const { store, at } = sweeping(clock, () => ({ rescued: 0, nextAtMs: due.shift() ?? null }));
  const sweeper = new Sweeper({ store, clock, log: silent() });
  await sweeper.start();
  await clock.advance(120 + SWEEP_INTERVAL_MS);
  expect(at).toEqual([0, 120, 120 + SWEEP_INTERVAL_MS]);
  await sweeper.close();
});

test.each([
  [1_999, 'a busy moment', 0],
  [2_000, 'a process that stood still', 5_000],
])('a round that comes %i ms late (%s) sweeps %3$i ms later', async (lateMs, _, listensMs) => {
  const base = new SimulatedClock();
  let late = 0;
  const clock: Clock = {
    now: () => base.now(),
    monotonic: () => base.monotonic(),
    setTimer: (run, delayMs) => base.setTimer(run, delayMs + late),
  };
  const { store, at } = sweeping(base, () => ({ rescued: 0, nextAtMs: null }));
  const sweeper = new Sweeper({ store, clock, log: silent() });
  late = lateMs;
  await sweeper.start();
  late = 0;
  const lateAt = SWEEP_INTERVAL_MS + lateMs;
  await base.advance(lateAt + listensMs + SWEEP_INTERVAL_MS);
  expect(at).toEqual([0, lateAt + listensMs, lateAt + listensMs + SWEEP_INTERVAL_MS]);
  await sweeper.close();
});

test('goes on after a failure, and tells of it', async () => {
  const clock = new SimulatedClock();
  const errors: string[] = [];
  let calls = 0;
  const { store, at } = sweeping(clock, () => {
    calls += 1;
    if (calls === 1) throw new Error('disk full');
    return { rescued: 2, nextAtMs: null };
  });
  const swept: number[] = [];
  const sweeper = new Sweeper({
    store,
    clock,
    log: silent(errors),
    onSwept: ({ rescued }) => swept.push(rescued),
  });
  await sweeper.start();
  await clock.advance(SWEEP_INTERVAL_MS);
  expect(at).toHaveLength(2);
  expect(errors).toEqual(['sweep failed; it is tried again']);
  expect(swept).toEqual([2]);
  await sweeper.close();
});

test('closing waits for the sweep under way, and none comes after it', async () => {
  const clock = new SimulatedClock();
  let finish = (): void => {};
  let calls = 0;
  const store = {
    sweep: () => {
      calls += 1;
      return calls === 1
        ? Promise.resolve({ rescued: 0, nextAtMs: null })
        : new Promise<SweepAnswer>((resolve) => (finish = () => resolve({ rescued: 0, nextAtMs: null })));
    },
  } as Partial<Store> as Store;
  const sweeper = new Sweeper({ store, clock, log: silent() });
  await sweeper.start();
  await clock.advance(SWEEP_INTERVAL_MS);
  let closed = false;
  const closing = sweeper.close().then(() => (closed = true));
  await clock.advance(10);
  expect(closed).toBe(false);
  finish();
  await closing;
  await clock.advance(10 * SWEEP_INTERVAL_MS);
  expect(calls).toBe(2);
});

test('bytes that nothing names are removed in the second hour, and not before', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'millrace-collector-'));
  const clock = new SimulatedClock();
  const store = await openSqliteStore({ path: ':memory:', clock });
  const blobs = await openFileBlobs({ dir: folder, clock });
  const collector = new Collector({ store, blobs, clock, log: silent() });
  try {
    const { digest } = await blobs.put(
      (async function* () {
        yield Buffer.from('nobody names me');
      })(),
      { maxBytes: 100 },
    );
    await collector.start();
    await clock.advance(60_000);
    // The next round is armed when this one, which does real I/O, is over.
    await until(() => clock.pending === 1);
    expect(await blobs.stat(digest)).not.toBeNull();
    await clock.advance(60 * 60_000);
    await until(async () => (await blobs.stat(digest)) === null);
  } finally {
    await collector.close();
    await blobs[Symbol.asyncDispose]();
    await store[Symbol.asyncDispose]();
    await rm(folder, { recursive: true, force: true });
  }
});
