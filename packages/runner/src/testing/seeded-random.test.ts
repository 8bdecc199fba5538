import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { seededRandom } from './seeded-random.ts';

/** sfc32 as PractRand has it, in exact arithmetic: another way to the same numbers. */
function* reference(seed: bigint): Generator<bigint> {
  const word = (value: bigint): bigint => BigInt.asUintN(32, value);
  let [a, b, c, counter] = [word(seed), word(seed >> 32n), 0n, 1n];
  for (let round = 0; ; round += 1) {
    const result = word(a + b + counter);
    counter = word(counter + 1n);
    a = b ^ (b >> 9n);
    b = word(c + (c << 3n));
    c = word((word(c << 21n) | (c >> 11n)) + result);
    if (round >= 12) yield result;
  }
}

describe('seededRandom', () => {
  test('is sfc32 for every seed', () => {
    fc.assert(
      fc.property(fc.maxSafeInteger(), (seed) => {
        const random = seededRandom(seed);
        const expected = reference(BigInt(seed));
        for (let i = 0; i < 8; i += 1) expect(random() * 2 ** 32).toBe(Number(expected.next().value));
      }),
    );
  });

  test('keeps its numbers from version to version', () => {
    const random = seededRandom(1);
    expect(Array.from({ length: 4 }, () => random() * 2 ** 32)).toEqual([
      441792574, 614447336, 1644328534, 3387734806,
    ]);
  });

  test('is uniform in [0, 1), and neighbouring seeds differ', () => {
    const random = seededRandom(42);
    const buckets = Array.from({ length: 10 }, () => 0);
    for (let i = 0; i < 100_000; i += 1) {
      const value = random();
      if (!(value >= 0 && value < 1)) expect.fail(`${value} is not in [0, 1)`);
      buckets[Math.floor(value * 10)]! += 1;
    }
    for (const count of buckets) expect(Math.abs(count - 10_000)).toBeLessThan(500);
    expect(seededRandom(1)()).not.toBe(seededRandom(2)());
    expect(seededRandom(1)()).not.toBe(seededRandom(1 + 2 ** 32)());
  });

  test('refuses a seed that is no safe integer', () => {
    for (const seed of [0.5, NaN, Infinity, 2 ** 53]) expect(() => seededRandom(seed)).toThrow(RangeError);
    seededRandom(Number.MAX_SAFE_INTEGER);
    seededRandom(Number.MIN_SAFE_INTEGER);
  });
});
