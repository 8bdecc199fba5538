import { expect, test } from 'vitest';
import { parseCron } from './cron.ts';

const at = (text: string): number => Date.parse(text);
const iso = (ms: number | null): string | null => (ms === null ? null : new Date(ms).toISOString());

function ticks(expression: string, zone: string, from: string, count: number): (string | null)[] {
  const times = parseCron(expression, zone);
  const found: (string | null)[] = [];
  for (let ms: number | null = at(from); found.length < count && ms !== null;) {
    ms = times.after(ms);
    found.push(iso(ms));
  }
  return found;
}

test.each([
  ['*/20 * * * *', 'UTC', '2026-01-01T00:00:00Z', ['2026-01-01T00:20:00.000Z', '2026-01-01T00:40:00.000Z']],
  [
    '0 9 * * MON-FRI',
    'America/New_York',
    '2026-01-02T20:00:00Z',
    ['2026-01-05T14:00:00.000Z', '2026-01-06T14:00:00.000Z'],
  ],
  // Either of the days is enough.
  ['0 0 13 * FRI', 'UTC', '2026-02-07T00:00:00Z', ['2026-02-13T00:00:00.000Z', '2026-02-20T00:00:00.000Z']],
  ['0 0 L 2 *', 'UTC', '2026-01-01T00:00:00Z', ['2026-02-28T00:00:00.000Z', '2027-02-28T00:00:00.000Z']],
  ['0 0 29 2 *', 'UTC', '2026-01-01T00:00:00Z', ['2028-02-29T00:00:00.000Z', '2032-02-29T00:00:00.000Z']],
  // 02:30 is left out that night, and comes twice in the other.
  [
    '30 2 * * *',
    'Europe/Berlin',
    '2026-03-28T12:00:00Z',
    ['2026-03-29T01:00:00.000Z', '2026-03-30T00:30:00.000Z'],
  ],
  [
    '30 2 * * *',
    'Europe/Berlin',
    '2026-10-24T12:00:00Z',
    ['2026-10-25T00:30:00.000Z', '2026-10-26T01:30:00.000Z'],
  ],
] as const)('%s in %s', (expression, zone, from, expected) => {
  expect(ticks(expression, zone, from, expected.length)).toEqual(expected);
});

test('the last tick up to a time includes that time', () => {
  const times = parseCron('*/5 * * * *', 'UTC');
  const tick = at('2026-01-01T00:05:00Z');
  expect(times.upTo(tick)).toBe(tick);
  expect(times.upTo(tick + 299_999)).toBe(tick);
  expect(times.upTo(tick - 1)).toBe(tick - 300_000);
  expect(times.after(tick)).toBe(tick + 300_000);
  expect(times.after(tick - 1)).toBe(tick);
});

test.each([
  ['* * * *', 'must have five fields'],
  ['* * * * * *', 'must have five fields'],
  ['@daily', 'must have five fields'],
  ['2026-01-01T00:00:00', 'must have five fields'],
  ['', 'must have five fields'],
  [`${'1,'.repeat(200)}1 * * * *`, 'must have five fields'],
  ['61 * * * *', 'has a field that cannot be read'],
  ['x * * * *', 'has a field that cannot be read'],
  ['0 0 31 2 *', 'never comes true'],
])('%j is refused: it %s', (expression, rule) => {
  expect(() => parseCron(expression, 'UTC')).toThrow(`cron ${rule}`);
});

test.each(['Nowhere/Land', '', '+01:00', 'UTC; DROP'])('the time zone %j is refused', (zone) => {
  expect(() => parseCron('* * * * *', zone)).toThrow(/^time_zone must be a name of the IANA database/);
});
