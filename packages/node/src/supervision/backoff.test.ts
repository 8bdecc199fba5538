import { describe, expect, test } from 'vitest';
import { seededRandom } from '@millrace/runner/testing';
import type { BackoffPolicy, JitterPolicy } from '@millrace/runner/model';
import { backoffBaseMs, backoffDelayMs } from './backoff.ts';

const policy = (jitter: JitterPolicy, change: Partial<BackoffPolicy> = {}): BackoffPolicy => ({
  jitter,
  firstMs: 100,
  maxMs: 10_000,
  factor: 2,
  ...change,
});
/** As large as chance gets. */
const MOST = 1 - 2 ** -53;

describe('a backoff', () => {
  test('without jitter grows by its factor up to the longest pause', () => {
    const delays = Array.from({ length: 9 }, (_, retry) =>
      backoffDelayMs(policy('none'), retry, Math.random),
    );
    expect(delays).toEqual([100, 200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000]);
  });

  test('beyond all numbers is the longest pause', () => {
    expect(backoffBaseMs(policy('none'), 1e9)).toBe(10_000);
    expect(backoffBaseMs(policy('none', { factor: Number.MAX_VALUE }), 2)).toBe(10_000);
    expect(backoffBaseMs(policy('none', { factor: 1 }), 1e9)).toBe(100);
  });

  test.each([
    // jitter, retry, least, most
    ['full', 0, 1, 100],
    ['full', 3, 1, 800],
    ['full', 8, 1, 10_000],
    ['equal', 0, 50, 100],
    ['equal', 3, 400, 800],
    ['equal', 8, 5_000, 10_000],
    ['decorrelated', 0, 100, 300],
    ['decorrelated', 3, 100, 2_400],
    ['decorrelated', 8, 100, 10_000],
  ] as const)('with %s jitter after failure %i is between %i and %i ms', (jitter, retry, least, most) => {
    expect(backoffDelayMs(policy(jitter), retry, () => 0)).toBeCloseTo(least, 6);
    expect(backoffDelayMs(policy(jitter), retry, () => MOST)).toBeCloseTo(most, 6);
    const random = seededRandom(1);
    for (let i = 0; i < 1_000; i += 1) {
      const delay = backoffDelayMs(policy(jitter), retry, random);
      expect(delay).toBeGreaterThanOrEqual(least);
      expect(delay).toBeLessThanOrEqual(most);
    }
  });

  test('whose range is empty is its first pause', () => {
    expect(backoffDelayMs(policy('decorrelated', { maxMs: 100 }), 5, () => 0.5)).toBe(100);
  });

  test('is never shorter than the floor, as far as the longest pause allows, and never nothing', () => {
    expect(backoffDelayMs(policy('full'), 0, () => 0, 40)).toBe(40);
    expect(backoffDelayMs(policy('full'), 0, () => 0.5, 40)).toBe(50);
    expect(backoffDelayMs(policy('none', { maxMs: 150 }), 0, () => 0, 1_000)).toBe(150);
    expect(backoffDelayMs(policy('full'), 0, () => 0)).toBe(1);
  });
});
