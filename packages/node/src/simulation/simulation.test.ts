import { describe, expect, test } from 'vitest';
import { SimulationFailure, simulate } from './world.ts';

/** Runs this seed alone and prints what happened. Many seeds: `seeds.ts`. */
const ONE = process.env['MILLRACE_SIM_SEED'];

describe.skipIf(ONE !== undefined)('the simulation', () => {
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
    const { trace } = await simulate(Number(ONE)).catch((error: unknown) => {
      if (error instanceof SimulationFailure) process.stdout.write(`${error.trace.join('\n')}\n`);
      throw error;
    });
    process.stdout.write(`${trace.join('\n')}\n`);
    expect(trace.length).toBeGreaterThan(0);
  },
  120_000,
);
