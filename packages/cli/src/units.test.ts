import { MillraceError } from '@millrace/runner';
import { describe, expect, test } from 'vitest';
import {
  formatBytes,
  formatClock,
  formatDuration,
  formatTime,
  parseDuration,
  parseInteger,
} from './units.ts';

test.each([
  [0, '0 ms'],
  [999, '999 ms'],
  [1000, '1.0 s'],
  [9949, '9.9 s'],
  [12_345, '12 s'],
  [59_960, '1 min 00 s'],
  [185_000, '3 min 05 s'],
  [7_620_000, '2 h 07 min'],
  [273_600_000, '3 d 4 h'],
])('a duration of %d ms reads %s', (ms, text) => {
  expect(formatDuration(ms)).toBe(text);
});

test.each([
  [0, '00:00'],
  [59_999, '00:59'],
  [750_000, '12:30'],
  [3_723_000, '1:02:03'],
])('an elapsed time of %d ms reads %s', (ms, text) => {
  expect(formatClock(ms)).toBe(text);
});

test.each([
  [0, '0 B'],
  [1023, '1023 B'],
  [1024, '1.0 KiB'],
  [1536, '1.5 KiB'],
  [1024 * 1024 - 1, '1.0 MiB'],
  [12 * 1024 * 1024, '12.0 MiB'],
  [200 * 1024 ** 3, '200 GiB'],
])('%d bytes read %s', (bytes, text) => {
  expect(formatBytes(bytes)).toBe(text);
});

describe('a time', () => {
  // Local time on purpose: that is what people read.
  const now = new Date(2026, 2, 2, 15, 30, 0).getTime();
  const at = (ms: number): string => formatTime(new Date(ms).toISOString(), now);

  test('of the last hour is told as an age', () => {
    expect(at(now - 12_000)).toBe('12 s ago');
    expect(at(now - 59_999)).toBe('59 s ago');
    expect(at(now - 60_000)).toBe('1 min ago');
  });

  test('of today is a time of day', () => {
    expect(at(new Date(2026, 2, 2, 9, 5).getTime())).toBe('09:05');
  });

  test('of another day has its date', () => {
    expect(at(new Date(2026, 1, 28, 14, 3).getTime())).toBe('2026-02-28 14:03');
  });

  test('that is none is shown as it is', () => {
    expect(formatTime('soon', now)).toBe('soon');
  });
});

test.each([
  ['90', 90_000],
  ['90s', 90_000],
  ['1.5m', 90_000],
  ['2h', 7_200_000],
  ['250ms', 250],
])('the duration %s is %d ms', (text, ms) => {
  expect(parseDuration(text, '--timeout')).toBe(ms);
});

test.each(['', '0', '-1', '5 d', 'soon'])('%j is no duration', (text) => {
  expect(() => parseDuration(text, '--timeout')).toThrow(MillraceError);
  expect(() => parseDuration(text, '--timeout')).toThrow(/--timeout must be a duration/);
});

test('an integer is accepted at its bounds and refused past them', () => {
  expect(parseInteger('1', '--n', 1, 10)).toBe(1);
  expect(parseInteger('10', '--n', 1, 10)).toBe(10);
  for (const text of ['0', '11', '1.5', '0x2', 'ten', '']) {
    expect(() => parseInteger(text, '--n', 1, 10)).toThrow(/--n must be an integer from 1 to 10, got/);
  }
});
