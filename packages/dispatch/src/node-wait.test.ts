import { describe, expect, test } from 'vitest';
import { LAST_WORDS_BYTES, nodeWait } from './node-wait.ts';

const AT = Date.parse('2025-06-01T12:00:00.000Z');
const line = (value: object): string => `${JSON.stringify({ at: '2025-06-01T12:00:00.000Z', ...value })}\n`;
const event = (fields: object): string =>
  line({ event: { kind: 'supervision', seq: 1, at: AT, run_id: 'r-s-1', ...fields } });
const SUBMITTED = event({ event: 'submitted', slot: 'camera', admission: 'queue' });
const PAUSE = event({
  event: 'backoff_scheduled',
  try: 2,
  delay_ms: 30_000,
  source: 'failure',
  reason: 'exit code 3',
});
const waitOf = (log: string) => nodeWait(Buffer.from(log));

describe('what a task waits for on its node', () => {
  test('is its slot, from being submitted to it until it has it', () => {
    expect(waitOf(SUBMITTED)).toEqual({ kind: 'slot', slot: 'camera', since: AT });
    expect(waitOf(SUBMITTED + event({ event: 'admitted', slot: 'camera' }))).toBeNull();
  });

  test('is its next try, after a failure and after a success', () => {
    expect(waitOf(PAUSE)).toEqual({ kind: 'try', tries: 2, until: AT + 30_000, failure: 'exit code 3' });
    const again = event({ event: 'backoff_scheduled', try: 1, delay_ms: 5, source: 'success' });
    expect(waitOf(again)).toEqual({ kind: 'try', tries: 1, until: AT + 5, failure: null });
    expect(waitOf(PAUSE + event({ event: 'starting', try: 3 }))).toBeNull();
  });

  test('is nothing once it says something', () => {
    expect(waitOf(PAUSE + line({ stream: 'stdout', text: 'working' }))).toBeNull();
  });

  test.each([
    ['nothing', ''],
    ['half a line', PAUSE.slice(0, -20)],
    ['no object', '7\n'],
    ["an event of the task's own", line({ event: { kind: 'backoff_scheduled', delay_ms: 1 } })],
    ['one that lacks what matters', event({ event: 'backoff_scheduled', try: 2 })],
  ])('is not to be learnt from %s', (_what, log) => {
    expect(waitOf(log)).toBeNull();
  });

  test('is found in as much of a log as is read, however long the reason', () => {
    const long = event({
      event: 'backoff_scheduled',
      try: 2,
      delay_ms: 1,
      source: 'failure',
      reason: '\u0001'.repeat(500),
    });
    expect(long.length).toBeLessThan(LAST_WORDS_BYTES);
    const end = Buffer.from(line({ text: 'x'.repeat(9000) }) + long).subarray(-LAST_WORDS_BYTES);
    expect(nodeWait(end)).toMatchObject({ kind: 'try', tries: 2 });
  });
});
