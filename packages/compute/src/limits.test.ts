import { describe, expect, test } from 'vitest';
import {
  DEFAULT_LIMITS,
  nanoseconds,
  resolveLimits,
  withLogWriter,
  withMetricsSink,
  withNow,
} from './limits.ts';
import type { Limits } from './limits.ts';

describe('resolveLimits', () => {
  test('gives the defaults for nothing, and for undefined', () => {
    expect(resolveLimits({})).toEqual(DEFAULT_LIMITS);
    expect(resolveLimits({ maxWallMs: undefined })).toEqual(DEFAULT_LIMITS);
  });

  test('lets a call override what its manager set, and keeps the rest', () => {
    const base = resolveLimits({ maxWallMs: 7, maxMemoryMb: 3 });
    expect(resolveLimits({ maxWallMs: 9 }, base)).toMatchObject({ maxWallMs: 9, maxMemoryMb: 3 });
  });

  test('leaves out what is no limit', () => {
    expect(resolveLimits({ signal: null } as object)).not.toHaveProperty('signal');
  });

  test.each([
    ['maxMemoryMb', 1, 4096],
    ['maxWallMs', 1, 2_592_000_000],
    ['maxPrepareMs', 1, 3_600_000],
    ['maxOutputBytes', 0, 1_073_741_824],
    ['maxModuleBytes', 8, 1_073_741_824],
    ['maxTableEntries', 0, 10_000_000],
  ] as const)('takes %s from %d to %d and nothing beside', (name, least, most) => {
    for (const value of [least, most]) expect(resolveLimits({ [name]: value })[name]).toBe(value);
    for (const value of [least - 1, most + 1, least + 0.5, Number.NaN, '7', null]) {
      expect(() => resolveLimits({ [name]: value })).toThrow(
        expect.objectContaining({
          code: 'invalid_argument',
          message: `compute: limit ${name} must be a whole number from ${least} to ${most}, got ${String(value)}`,
        }),
      );
    }
  });

  test.each([
    [{ clock: 'real' }, /clock must be frozen or host, got real/],
    [{ random: 'best' }, /random must be seeded or host, got best/],
    [{ seed: 7 }, /seed must be a bigint, got number/],
    [{ stderr: 'log' }, /stderr must be a function, got string/],
    [{ metricsSink: {} }, /metricsSink must be a function, got object/],
    [{ now: new Date(Number.NaN) }, /now must be a moment in time/],
    [{ now: -1 }, /now must be from 1970 to 2554, got -1/],
    [{ now: 2n ** 64n }, /now must be from 1970 to 2554/],
  ])('refuses %o', (limits, message) => {
    expect(() => resolveLimits(limits as Partial<Limits>)).toThrow(message);
  });
});

test('a moment is nanoseconds, exactly', () => {
  expect(nanoseconds(new Date('2026-05-25T12:00:00.123Z'))).toBe(1779710400123000000n);
  expect(nanoseconds(1779710400123)).toBe(1779710400123000000n);
  expect(nanoseconds(1779710400123.25)).toBe(1779710400123250000n);
  expect(nanoseconds(2n ** 64n - 1n)).toBe(2n ** 64n - 1n);
});

test('each combinator sets its own and keeps what was there', () => {
  const stderr = (): void => undefined;
  const metricsSink = (): void => undefined;
  const given = { maxWallMs: 5 };
  expect(withMetricsSink(withLogWriter(withNow(given, 7), stderr), metricsSink)).toEqual({
    maxWallMs: 5,
    now: 7,
    stderr,
    metricsSink,
  });
  expect(given).toEqual({ maxWallMs: 5 });
});
