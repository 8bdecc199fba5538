import { describe, expect, test } from 'vitest';
import { SimulatedClock, seededRandom } from '@millrace/runner/testing';
import type { LogPiece } from '@millrace/dispatch/client';
import { ScriptedDms, memoryLog, never, wireError, type Script } from './simulation/scripted-dms.ts';
import {
  LOG_INTERVAL_MS,
  LogShipper,
  MAX_PENDING_LOG_BYTES,
  MAX_PENDING_LOG_BYTES_IN_ALL,
  type TaskLog,
} from './task-log.ts';

const MAX_BYTES = 16 * 1024 * 1024;

interface Line {
  readonly at: string;
  readonly level?: string;
  readonly stream?: string;
  readonly text?: string;
  readonly fields?: Record<string, unknown>;
  readonly event?: unknown;
}

/** What a dispatcher keeps, by lease, as the store does. */
class Kept {
  readonly #logs = new Map<string, Buffer>();

  append({ lease, offset, lines }: LogPiece): { nextOffset: number } {
    const key = lease.leaseId ?? '';
    const have = this.#logs.get(key) ?? Buffer.alloc(0);
    if (offset <= have.length) {
      this.#logs.set(key, Buffer.concat([have, Buffer.from(lines).subarray(have.length - offset)]));
    }
    return { nextOffset: this.#logs.get(key)?.length ?? 0 };
  }

  text(lease: string): string {
    return (this.#logs.get(lease) ?? Buffer.alloc(0)).toString('utf8');
  }

  lines(lease: string): Line[] {
    const lines = this.text(lease).split('\n');
    expect(lines.pop()).toBe('');
    return lines.map((line) => JSON.parse(line) as Line);
  }

  texts(lease: string): (string | undefined)[] {
    return this.lines(lease).map(({ text }) => text);
  }
}

function bench(
  options: {
    readonly script?: (kept: Kept) => NonNullable<Script['appendLogs']>;
    readonly maxBytes?: number;
    readonly batchItems?: number;
    readonly latencyMs?: number;
  } = {},
) {
  const clock = new SimulatedClock();
  const kept = new Kept();
  const dms = new ScriptedDms(clock, {
    latencyMs: options.latencyMs ?? 0,
    appendLogs: options.script?.(kept) ?? ((pieces) => pieces.map((piece) => kept.append(piece))),
  });
  const log = memoryLog();
  const shipper = new LogShipper({
    dms,
    maxBytes: options.maxBytes ?? MAX_BYTES,
    batchItems: options.batchItems ?? 256,
    requestTimeoutMs: 10_000,
    clock,
    random: seededRandom(1),
    log,
  });
  const open = (lease = 'lease'): TaskLog => shipper.open(() => ({ taskId: 'task', leaseId: lease }), log);
  return { clock, kept, dms, log, shipper, open, sent: () => dms.of('appendLogs') };
}

const say = (log: TaskLog, text: string): void => log.line('info', text, {});

describe('lines', () => {
  test('are NDJSON: what a program printed by its stream, other lines by their level, events as they are', async () => {
    const { clock, kept, open } = bench();
    const log = open();
    log.line('info', 'grüße\u0007 "all"', { stream: 'stdout' });
    log.line('warn', 'hm', { stream: 'stderr', more: 1 });
    log.line('error', 'no', { code: 7, text: 'not this', at: 'nor this' });
    log.line('info', 'a stream of another kind', { stream: 'video' });
    log.event({ kind: 'frame', n: 1 });
    log.event('text');
    await clock.advance(LOG_INTERVAL_MS);
    const at = new Date(clock.now() - LOG_INTERVAL_MS).toISOString();
    expect(kept.lines('lease')).toEqual([
      { at, stream: 'stdout', text: 'grüße\u0007 "all"' },
      { at, stream: 'stderr', text: 'hm', fields: { more: 1 } },
      { at, level: 'error', text: 'no', fields: { code: 7, text: 'not this', at: 'nor this' } },
      { at, level: 'info', text: 'a stream of another kind', fields: { stream: 'video' } },
      { at, event: { kind: 'frame', n: 1 } },
      { at, event: 'text' },
    ]);
  });

  test('have the time at which they were said', async () => {
    const { clock, kept, open } = bench();
    const log = open();
    const expected: string[] = [];
    for (const ms of [0, 1, 998, 1, 50, 61_000]) {
      await clock.advance(ms);
      expected.push(new Date(clock.now()).toISOString());
      say(log, 'x');
    }
    await clock.advance(LOG_INTERVAL_MS);
    expect(kept.lines('lease').map(({ at }) => at)).toEqual(expected);
  });

  test('longer than 64 KiB are cut; fields that are longer, or no JSON, are left out and said to be', async () => {
    const { clock, kept, open } = bench();
    const log = open();
    say(log, 'a'.repeat(65_536));
    say(log, 'b'.repeat(65_537));
    log.line('info', 'big', { big: 'x'.repeat(65_536) });
    log.line('info', 'odd', { odd: 1n as never });
    log.event({ big: 'x'.repeat(65_536) });
    log.event(1n as never);
    await clock.advance(LOG_INTERVAL_MS * 4);
    const [a, b, ...rest] = kept.lines('lease');
    expect(a?.text).toBe('a'.repeat(65_536));
    expect(b?.text).toBe(`${'b'.repeat(65_533)}…`);
    expect(rest.map(({ text, fields, event }) => event ?? [text, fields])).toEqual([
      ['big', { lost: 'more than 65536 bytes' }],
      ['odd', { lost: 'not JSON' }],
      { lost: 'more than 65536 bytes' },
      { lost: 'not JSON' },
    ]);
  });
});

describe('shipping', () => {
  test('sends nothing while nothing is said, and lines that come together in one request', async () => {
    const { clock, kept, open, sent } = bench();
    const quiet = open('quiet');
    await clock.advance(60_000);
    expect(await quiet.flush(1_000)).toBe(0);
    expect(sent()).toEqual([]);
    expect(clock.pending).toBe(0);
    const log = open();
    say(log, 'one');
    await clock.advance(LOG_INTERVAL_MS - 1);
    say(log, 'two');
    expect(sent()).toEqual([]);
    await clock.advance(1);
    expect(sent()).toHaveLength(1);
    expect(kept.texts('lease')).toEqual(['one', 'two']);
    await clock.advance(60_000);
    expect(sent()).toHaveLength(1);
  });

  test('the end of an attempt waits for nothing but the answer', async () => {
    const { clock, kept, open } = bench({ latencyMs: 20 });
    const log = open();
    say(log, 'last words');
    const before = clock.monotonic();
    const flushed = log.flush(5_000);
    await clock.advance(20);
    expect(await flushed).toBe(0);
    expect(clock.monotonic() - before).toBe(20);
    expect(kept.texts('lease')).toEqual(['last words']);
    log.end();
    say(log, 'too late');
    await clock.advance(1_000);
    expect(kept.texts('lease')).toEqual(['last words']);
  });

  test('64 KiB are sent at once', async () => {
    const { clock, open, sent } = bench();
    const log = open();
    for (let i = 0; i < 64; i += 1) say(log, 'x'.repeat(1024));
    await clock.advance(0);
    expect(sent()).toHaveLength(1);
  });

  test('all attempts share one request at a time, at most as many as a batch takes, each getting its turn', async () => {
    const { clock, kept, open, sent, dms } = bench({ latencyMs: 100, batchItems: 4 });
    const logs = Array.from({ length: 10 }, (_, index) => open(`lease-${index}`));
    for (let round = 0; round < 3; round += 1) {
      for (const log of logs) say(log, `round ${round}`);
      await clock.advance(100);
      expect(dms.underWay).toBeLessThanOrEqual(1);
    }
    await clock.advance(2_000);
    for (let index = 0; index < 10; index += 1) {
      expect(kept.texts(`lease-${index}`)).toEqual(['round 0', 'round 1', 'round 2']);
    }
    expect(Math.max(...sent().map(({ pieces }) => pieces.length))).toBe(4);
  });

  test('a lost answer leads to nothing twice and nothing left out', async () => {
    let fail = 0;
    const { clock, kept, open } = bench({
      script: (store) => (pieces) => {
        const answers = pieces.map((piece) => store.append(piece));
        fail += 1;
        if (fail % 2 === 1) throw wireError(503);
        return answers;
      },
    });
    const log = open();
    const said: string[] = [];
    for (let i = 0; i < 200; i += 1) {
      said.push(`${i} ${'ü'.repeat(i % 9)}`);
      say(log, said.at(-1)!);
      await clock.advance(40);
    }
    await clock.advance(10_000);
    expect(kept.texts('lease')).toEqual(said);
  });

  test('a dispatcher that has forgotten some of it gets the rest where it stands', async () => {
    let forget = false;
    const {
      clock,
      kept,
      open,
      log: lines,
    } = bench({
      script: (store) => (pieces) =>
        pieces.map((piece) => (forget ? { nextOffset: 0 } : store.append(piece))),
    });
    const log = open('a');
    say(log, 'one');
    await clock.advance(LOG_INTERVAL_MS);
    forget = true;
    say(log, 'two');
    await clock.advance(LOG_INTERVAL_MS);
    forget = false;
    await clock.advance(LOG_INTERVAL_MS);
    expect(kept.texts('a')).toEqual(['one']);
    expect(lines.lines.map(({ message }) => message)).toContain(
      'the dispatcher has less of the log than it said',
    );
  });

  test('a lease that is gone ends its log and no other', async () => {
    const { clock, kept, open, sent } = bench({
      script: (store) => (pieces) =>
        pieces.map((piece) =>
          piece.lease.leaseId === 'gone' ? { error: wireError(409) } : store.append(piece),
        ),
    });
    const gone = open('gone');
    const stays = open('stays');
    say(gone, 'x');
    say(stays, 'y');
    await clock.advance(LOG_INTERVAL_MS);
    const count = sent().length;
    for (let i = 0; i < 100; i += 1) say(gone, 'more');
    await clock.advance(5_000);
    expect(sent()).toHaveLength(count);
    say(stays, 'z');
    await clock.advance(LOG_INTERVAL_MS);
    expect(kept.texts('stays')).toEqual(['y', 'z']);
  });

  test('a piece the dispatcher will never take is dropped and said to be missing', async () => {
    let refuse = true;
    const { clock, kept, open } = bench({
      script: (store) => (pieces) =>
        pieces.map((piece) => (refuse ? { error: wireError(413) } : store.append(piece))),
    });
    const log = open();
    say(log, 'never');
    say(log, 'arrives');
    await clock.advance(LOG_INTERVAL_MS);
    refuse = false;
    say(log, 'this does');
    await clock.advance(2 * LOG_INTERVAL_MS);
    expect(kept.lines('lease').map(({ text, fields }) => fields?.['dropped_lines'] ?? text)).toEqual([
      2,
      'this does',
    ]);
  });

  test('a piece that cannot be taken now is tried again, and not in a hurry', async () => {
    let able = false;
    const { clock, kept, open, sent } = bench({
      script: (store) => (pieces) =>
        pieces.map((piece) => (able ? store.append(piece) : { error: wireError(503) })),
    });
    const log = open();
    say(log, 'x');
    const flushed = log.flush(60_000);
    await clock.advance(10 * LOG_INTERVAL_MS);
    expect(sent().length).toBeLessThanOrEqual(11);
    expect(sent().length).toBeGreaterThan(5);
    able = true;
    await clock.advance(LOG_INTERVAL_MS);
    expect(await flushed).toBe(0);
    expect(kept.texts('lease')).toEqual(['x']);
  });

  test('a body that is too large for something on the way is made smaller', async () => {
    const { clock, kept, open, sent } = bench({
      script: (store) => (pieces) => {
        const bytes = pieces.reduce((sum, { lines }) => sum + Buffer.byteLength(lines), 0);
        if (bytes > 150_000) throw wireError(413);
        return pieces.map((piece) => store.append(piece));
      },
    });
    const log = open();
    for (let i = 0; i < 600; i += 1) say(log, 'x'.repeat(1000));
    const flushed = log.flush(60_000);
    await clock.advance(1_000);
    expect(await flushed).toBe(0);
    expect(kept.texts('lease')).toHaveLength(600);
    expect(sent().length).toBeGreaterThan(4);
  });

  test('a dispatcher without the endpoint any more is not asked again for that attempt', async () => {
    const { clock, open, sent } = bench({
      script: () => () => {
        throw wireError(404);
      },
    });
    const log = open();
    say(log, 'x');
    await clock.advance(LOG_INTERVAL_MS);
    say(log, 'y');
    await clock.advance(60_000);
    expect(sent()).toHaveLength(1);
    expect(await log.flush(1_000)).toBeGreaterThan(0);
  });

  test('flushing gives up after its time and says what is missing; closing ends the request under way', async () => {
    const { clock, open, shipper, dms } = bench({ script: () => (_, signal) => never(signal) });
    const log = open();
    say(log, 'x');
    const flushed = log.flush(3_000);
    await clock.advance(3_000);
    expect(await flushed).toBeGreaterThan(0);
    expect(dms.underWay).toBe(1);
    log.end();
    await shipper.close();
    expect(dms.underWay).toBe(0);
    expect(clock.pending).toBe(0);
    await shipper.close();
  });
});

describe('bounds', () => {
  test('what a slow dispatcher does not take in time is dropped, counted, and said to be missing at that place', async () => {
    let slow = true;
    const { clock, kept, open, shipper } = bench({
      script: (store) => (pieces, signal) =>
        slow ? never(signal) : pieces.map((piece) => store.append(piece)),
    });
    const log = open();
    const text = 'x'.repeat(1024);
    for (let i = 0; i < 10_000; i += 1) say(log, `${i} ${text}`);
    expect(shipper.pendingBytes).toBeLessThanOrEqual(MAX_PENDING_LOG_BYTES);
    slow = false;
    // The request under way has to time out first.
    await clock.advance(30_000);
    say(log, 'again');
    await clock.advance(LOG_INTERVAL_MS);
    const lines = kept.lines('lease');
    const note = lines.findIndex(({ fields }) => fields?.['from'] === 'millrace');
    expect(note).toBeGreaterThan(900);
    expect(lines[note]?.fields).toMatchObject({ dropped_lines: 10_000 - note });
    expect(lines[note]?.text).toMatch(/could not be sent in time$/);
    expect(lines.slice(0, note).every((line, index) => line.text?.startsWith(`${index} `))).toBe(true);
    expect(lines.slice(note + 1).map((line) => line.text)).toEqual(['again']);
    expect(shipper.pendingBytes).toBe(0);
  });

  test('all attempts together keep no more than their bound, and give it back at their end', () => {
    const { open, shipper } = bench({ script: () => (_, signal) => never(signal) });
    const logs = Array.from({ length: 40 }, (_, index) => open(`lease-${index}`));
    const text = 'x'.repeat(10_000);
    for (const log of logs) for (let i = 0; i < 200; i += 1) say(log, text);
    expect(shipper.pendingBytes).toBeLessThanOrEqual(MAX_PENDING_LOG_BYTES_IN_ALL);
    expect(shipper.pendingBytes).toBeGreaterThan(MAX_PENDING_LOG_BYTES_IN_ALL - 20_000);
    for (const log of logs) log.end();
    expect(shipper.pendingBytes).toBe(0);
  });

  test('at what the dispatcher keeps the log says that it is full, and at the end how much is missing', async () => {
    const maxBytes = 10_000;
    const { clock, kept, open } = bench({ maxBytes });
    const log = open();
    for (let i = 0; i < 1_000; i += 1) {
      say(log, `${i}`.padEnd(50));
      if (i % 50 === 0) await clock.advance(LOG_INTERVAL_MS);
    }
    const before = kept.lines('lease');
    expect(before.at(-1)?.text).toBe(
      'the log is full: the limit taskLogBytes is 10000 bytes; what follows is counted and not kept',
    );
    await log.flush(1_000);
    const lines = kept.lines('lease');
    expect(Buffer.byteLength(kept.text('lease'))).toBeLessThanOrEqual(maxBytes);
    expect(lines.slice(0, -1)).toEqual(before);
    expect(lines.at(-1)).toMatchObject({
      text: expect.stringMatching(/lines of \d+ bytes in all are missing here: the log is full$/),
      fields: {
        dropped_lines: 1_000 - (before.length - 1),
        dropped_bytes: 50 * (1_000 - (before.length - 1)),
      },
    });
  });

  test('a flood of 1 GB costs neither memory nor much time', async () => {
    const { clock, kept, open } = bench({ maxBytes: 1024 * 1024 });
    const log = open();
    const text = 'x'.repeat(64 * 1024);
    const memory = process.memoryUsage().rss;
    for (let i = 0; i < 16 * 1024; i += 1) {
      say(log, text);
      if (i % 1024 === 0) await clock.advance(1);
    }
    await log.flush(1_000);
    expect(kept.lines('lease').at(-1)?.fields).toMatchObject({ from: 'millrace' });
    expect(process.memoryUsage().rss - memory).toBeLessThan(200 * 1024 * 1024);
  });
});
