/**
 * The seeds that are run each time, in shares: a file each, so that the test runner spreads them over its processes.
 *
 * `MILLRACE_SIM_SEEDS` is how many there are in all, 2,000 by default. They are the numbers from 1 on.
 */
import { describe, expect, test } from 'vitest';
import { simulate } from './world.ts';

const SEEDS = Number(process.env['MILLRACE_SIM_SEEDS'] ?? 2_000);
const SHARES = 4;

/** What a share must have seen: a simulation in which little happens proves little. */
const LIVELY = [
  'crash',
  'stop',
  'partition',
  'clock',
  'cancel',
  'enter',
  'complete',
  'fail',
  'release',
  'overlap',
  'overlap out of contact',
  'resumed',
  'log',
  'log to the end',
  'abort canceled',
  'abort lease_lost',
  'abort shutdown',
  'task completed',
  'task failed',
  'task canceled',
  'job completed',
  'job failed',
  'job canceled',
];
/** From this many seeds on. */
const LIVELY_SEEDS = 200;

/** Adds the test of one share, 0 to 3, unless a single seed is to be repeated. */
export function simulateShare(share: number): void {
  const seeds = Array.from({ length: SEEDS }, (_, index) => index + 1).filter(
    (seed) => seed % SHARES === share,
  );
  describe.skipIf(process.env['MILLRACE_SIM_SEED'] !== undefined)(
    'the whole system in simulated time',
    () => {
      test(
        `keeps its promises under faults, over ${seeds.length} seeds of ${SEEDS}`,
        async () => {
          const seen = new Map<string, number>();
          for (const seed of seeds) {
            const result = await simulate(seed);
            for (const [what, count] of result.seen) seen.set(what, (seen.get(what) ?? 0) + count);
          }
          if (seeds.length < LIVELY_SEEDS) return;
          for (const what of LIVELY) {
            expect(seen.get(what) ?? 0, `"${what}" in ${seeds.length} seeds`).toBeGreaterThanOrEqual(10);
          }
        },
        60_000 + seeds.length * 2_000,
      );
    },
  );
}
