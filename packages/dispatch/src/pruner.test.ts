import type { Logger } from '@millrace/runner';
import { SimulatedClock } from '@millrace/runner/testing';
import { expect, test } from 'vitest';
import { FIRST_PRUNING_MS, PRUNING_INTERVAL_MS, Pruner } from './pruner.ts';
import type { PruneAnswer, PruneQuery } from './store.ts';

function recording(lines: string[]): Logger {
  const log: Logger = {
    debug() {},
    info: (message) => void lines.push(message),
    warn() {},
    error: (message) => void lines.push(message),
    child: () => log,
  };
  return log;
}

/** The one verb it uses, with the times and queries it was called with. */
function pruning(clock: SimulatedClock, answers: (() => PruneAnswer)[]) {
  const calls: (PruneQuery & { readonly at: number })[] = [];
  const store = {
    pruneJobs: async (query: PruneQuery): Promise<PruneAnswer> => {
      calls.push({ ...query, at: clock.monotonic() });
      return answers.shift()?.() ?? { jobs: 0, items: 0, nextCursor: null };
    },
  };
  return { store, calls };
}

test('goes through all batches with pauses, counts what went, and comes back later', async () => {
  const clock = new SimulatedClock();
  const { store, calls } = pruning(clock, [
    () => ({ jobs: 500, items: 3, nextCursor: '7' }),
    () => ({ jobs: 0, items: 0, nextCursor: '9' }),
    () => ({ jobs: 2, items: 0, nextCursor: null }),
  ]);
  const lines: string[] = [];
  const counted: PruneAnswer[] = [];
  await using pruner = new Pruner({
    store,
    clock,
    log: recording(lines),
    retention: { keepJobsMs: 1000, artifacts: true },
    onPruned: (answer) => void counted.push(answer),
  });
  await pruner.start();
  await clock.advance(FIRST_PRUNING_MS - 1);
  expect(calls).toEqual([]);
  await clock.advance(1000);
  expect(calls.map(({ cursor, endedForMs, artifacts }) => [cursor, endedForMs, artifacts])).toEqual([
    [null, 1000, true],
    ['7', 1000, true],
    ['9', 1000, true],
  ]);
  expect(calls[1]!.at).toBeGreaterThan(calls[0]!.at);
  expect(counted.map(({ jobs }) => jobs)).toEqual([500, 2]);
  expect(lines).toEqual(['old jobs removed']);
  await clock.advance(PRUNING_INTERVAL_MS);
  expect(calls).toHaveLength(4);
  expect(calls[3]!.cursor).toBeNull();
});

test('a failure is told, and it goes on with the next round', async () => {
  const clock = new SimulatedClock();
  const { store, calls } = pruning(clock, [
    () => {
      throw new Error('disk full');
    },
  ]);
  const lines: string[] = [];
  await using pruner = new Pruner({ store, clock, log: recording(lines), retention: { keepJobsMs: 1 } });
  await pruner.start();
  await clock.advance(FIRST_PRUNING_MS + PRUNING_INTERVAL_MS);
  expect(lines).toEqual(['removing old jobs failed; it is tried again']);
  expect(calls.map(({ artifacts }) => artifacts)).toEqual([false, false]);
});

test('closing in the pause between two batches ends it', async () => {
  const clock = new SimulatedClock();
  const { store, calls } = pruning(clock, [() => ({ jobs: 1, items: 0, nextCursor: '7' })]);
  const lines: string[] = [];
  const pruner = new Pruner({ store, clock, log: recording(lines), retention: { keepJobsMs: 1 } });
  await pruner.start();
  await clock.advance(FIRST_PRUNING_MS);
  await pruner.close();
  await clock.advance(10 * PRUNING_INTERVAL_MS);
  expect(calls).toHaveLength(1);
  expect(lines).toEqual(['old jobs removed']);
});
