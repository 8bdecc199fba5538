import { describe, expect, test } from 'vitest';
import { simulate } from './world.ts';

/** More seeds by `MILLRACE_SIM_SEEDS=5000`; one alone, with what happened, by `MILLRACE_SIM_SEED=17`. */
const SEEDS = Number(process.env['MILLRACE_SIM_SEEDS'] ?? 200);
const ONE = process.env['MILLRACE_SIM_SEED'];

describe.skipIf(ONE !== undefined)('the whole system in simulated time', () => {
  test(
    `keeps its promises under faults, over ${SEEDS} seeds`,
    async () => {
      const seen = new Map<string, number>();
      for (let seed = 1; seed <= SEEDS; seed += 1) {
        const result = await simulate(seed);
        for (const [what, count] of result.seen) seen.set(what, (seen.get(what) ?? 0) + count);
      }
      // A simulation in which little happens proves little.
      for (const what of [
        'crash',
        'stop',
        'partition',
        'cancel',
        'enter',
        'complete',
        'fail',
        'release',
        'overlap',
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
      ]) {
        expect(seen.get(what) ?? 0, `"${what}" in ${SEEDS} seeds`).toBeGreaterThanOrEqual(
          SEEDS >= 200 ? 10 : 0,
        );
      }
    },
    60_000 + SEEDS * 2_000,
  );

  test('is the same run every time it is run from one seed', async () => {
    for (const seed of [3, 1_000_003]) {
      const [first, second] = [await simulate(seed), await simulate(seed)];
      expect(second.trace).toEqual(first.trace);
      expect(second.traceHash).toBe(first.traceHash);
    }
    expect((await simulate(4)).traceHash).not.toBe((await simulate(5)).traceHash);
  }, 60_000);
});

test.runIf(ONE !== undefined)(
  `seed ${ONE}`,
  async () => {
    const result = await simulate(Number(ONE));
    process.stdout.write(`${result.trace.join('\n')}\n`);
    expect(result.attempts).toBeGreaterThan(0);
  },
  120_000,
);
