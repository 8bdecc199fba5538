import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { MillraceError, type Json, type TaskAbort } from '@millrace/runner';
import { SimulatedClock, seededRandom } from '@millrace/runner/testing';
import type { HeartbeatReply } from '@millrace/dispatch/client';
import {
  Heartbeats,
  MAX_EVENTS_BODY_BYTES,
  MAX_EVENT_BYTES,
  MAX_PENDING_EVENTS,
  heartbeatDelayMs,
} from './heartbeat.ts';
import { ScriptedDms, memoryLog, reply, wireError } from './simulation/scripted-dms.ts';

const RATIOS = { minRatio: 0.25, maxRatio: 0.35 };
const SETTINGS = { ...RATIOS, coalesceMs: 250, requestTimeoutMs: 60_000 };

describe('heartbeatDelayMs', () => {
  test('is between the two ratios of what is left, whichever is given first', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 10_000_000 }),
        fc.double({ min: 0, max: 1, noNaN: true }),
        fc.double({ min: 0, max: 1, noNaN: true }),
        fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true }),
        (ttl, a, b, chance) => {
          const delay = heartbeatDelayMs(ttl, { minRatio: a, maxRatio: b }, () => chance)!;
          if (delay === 100 || delay === ttl) return;
          expect(delay).toBeGreaterThanOrEqual(ttl * Math.min(a, b) - 1e-6);
          expect(delay).toBeLessThanOrEqual(ttl * Math.max(a, b) + 1e-6);
        },
      ),
    );
  });

  test('a lease of 60 s is renewed after 15 to 21 s, one of 200 ms after 50 to 70 ms', () => {
    expect(heartbeatDelayMs(60_000, RATIOS, () => 0)).toBe(15_000);
    expect(heartbeatDelayMs(60_000, RATIOS, () => 0.999999)).toBeCloseTo(21_000, 0);
    expect(heartbeatDelayMs(200, RATIOS, () => 0)).toBe(50);
  });

  test('ratios out of range are taken as 0 and 1, and a delay of nothing is 100 ms but never more than is left', () => {
    const delay = (ttl: number, minRatio: number, maxRatio: number): number | null =>
      heartbeatDelayMs(ttl, { minRatio, maxRatio }, () => 0.5);
    expect(delay(1_000, -3, -1)).toBe(100);
    expect(delay(40, 0, 0)).toBe(40);
    expect(delay(1_000, 5, 7)).toBe(1_000);
  });

  test('an expired lease is due now, one without an expiry never', () => {
    expect(heartbeatDelayMs(0, RATIOS, () => 0.5)).toBe(0);
    expect(heartbeatDelayMs(1, RATIOS, () => 0)).toBe(0.25);
    expect(heartbeatDelayMs(-5_000, RATIOS, () => 0.5)).toBe(0);
    expect(heartbeatDelayMs(null, RATIOS, () => 0.5)).toBeNull();
  });
});

interface Bench {
  readonly clock: SimulatedClock;
  readonly dms: ScriptedDms;
  readonly hearts: Heartbeats;
  readonly aborts: TaskAbort[];
  readonly sent: { at: number; progress: Json; events: readonly Json[] }[];
}

/** Heartbeats over a server that extends the lease by `ttlMs` each time, or does what `answer` says. */
function bench(
  options: {
    ttlMs?: number | null;
    leaseIds?: boolean;
    latencyMs?: number;
    contactGraceMs?: number;
    /** How far the server's clock is ahead, if it tells. */
    aheadMs?: number;
    answer?: (count: number, signal: AbortSignal) => Partial<HeartbeatReply> | Promise<never>;
  } = {},
): Bench {
  const { ttlMs = 20_000, leaseIds = false, latencyMs = 0, contactGraceMs = 0, aheadMs, answer } = options;
  const clock = new SimulatedClock();
  const serverTimeMs = (): number | null => (aheadMs === undefined ? null : clock.now() + aheadMs);
  const expiry = (): string | null =>
    ttlMs === null ? null : new Date(clock.now() + (aheadMs ?? 0) + ttlMs).toISOString();
  const sent: Bench['sent'] = [];
  const aborts: TaskAbort[] = [];
  const dms = new ScriptedDms(clock, {
    latencyMs,
    async heartbeat(body, signal) {
      sent.push({ at: clock.monotonic(), ...body });
      const told = (await answer?.(sent.length, signal)) ?? {};
      return reply({ lease_expires_at: expiry(), serverTimeMs: serverTimeMs(), ...told });
    },
  });
  const hearts = new Heartbeats({
    dms,
    lease: { taskId: 'task', leaseId: leaseIds ? 'lease' : null },
    leaseExpiresAt: expiry(),
    serverTimeMs: serverTimeMs(),
    settings: { ...SETTINGS, contactGraceMs },
    leaseIds,
    clock,
    random: seededRandom(1),
    log: memoryLog(),
    onReply: () => undefined,
    onAbort: (abort) => aborts.push(abort),
  });
  return { clock, dms, hearts, aborts, sent };
}

const down = (): Promise<never> => Promise.reject(wireError(503));

describe('Heartbeats', () => {
  test('renew the lease on its timer for as long as they run', async () => {
    const { clock, hearts, sent } = bench();
    hearts.start();
    await clock.advance(60_000);
    expect(sent.length).toBeGreaterThanOrEqual(60_000 / 7_000 - 1);
    expect(sent.length).toBeLessThanOrEqual(60_000 / 5_000);
    for (const [i, { at }] of sent.entries()) {
      const gap = at - (sent[i - 1]?.at ?? 0);
      expect(gap).toBeGreaterThanOrEqual(5_000);
      expect(gap).toBeLessThanOrEqual(7_000);
    }
    await hearts.close();
    const count = sent.length;
    await clock.advance(60_000);
    expect(sent.length).toBe(count);
    expect(clock.pending).toBe(0);
  });

  test('the first one carries an empty object and no events', async () => {
    const { hearts, sent } = bench();
    await hearts.first();
    expect(sent).toEqual([{ at: 0, progress: {}, events: [] }]);
  });

  test('progress is sent at once when idle, then at most once per 250 ms, the newest value', async () => {
    const { clock, hearts, sent } = bench();
    hearts.start();
    await clock.advance(1_000);
    for (let i = 0; i <= 1_000; i += 1) {
      hearts.progress({ i });
      await clock.advance(1);
    }
    expect(sent.map(({ at }) => at)).toEqual([1_000, 1_250, 1_500, 1_750, 2_000]);
    expect(sent.map(({ progress }) => progress)).toEqual([0, 249, 499, 749, 999].map((i) => ({ i })));
    await hearts.close();
  });

  test('a flood of progress does not put off the timer', async () => {
    const { clock, hearts, sent } = bench({ ttlMs: 300 });
    hearts.start();
    for (let i = 0; i < 2_000; i += 1) {
      hearts.progress(i);
      await clock.advance(1);
    }
    for (const [i, { at }] of sent.entries())
      if (i > 0) expect(at - sent[i - 1]!.at).toBeLessThanOrEqual(106);
    await hearts.close();
  });

  test('events arrive once and in order, those logged during a heartbeat with the next', async () => {
    const { clock, hearts, sent } = bench({ latencyMs: 400 });
    hearts.start();
    const said: Json[] = [];
    for (let i = 0; i < 40; i += 1) {
      hearts.event({ i });
      said.push({ i });
      await clock.advance(97);
    }
    let undelivered = -1;
    const flushed = hearts.flush(5_000).then((count) => (undelivered = count));
    await clock.advance(2_000);
    await flushed;
    expect(undelivered).toBe(0);
    expect(sent.flatMap(({ events }) => events)).toEqual(said);
    await hearts.close();
  });

  test('an event is kept as it was when it was logged', async () => {
    const { clock, hearts, sent } = bench();
    hearts.start();
    const event = { n: 1 };
    hearts.event(event);
    event.n = 2;
    await clock.advance(1);
    expect(sent[0]?.events).toEqual([{ n: 1 }]);
    await hearts.close();
  });

  test('an event of a failed heartbeat is sent again, before newer ones', async () => {
    const { clock, hearts, sent, aborts } = bench({ answer: (n) => (n <= 2 ? down() : {}) });
    hearts.start();
    hearts.event('a');
    await clock.advance(100);
    hearts.event('b');
    await clock.advance(5_000);
    expect(sent.slice(0, 3).map(({ events }) => events)).toEqual([['a'], ['a', 'b'], ['a', 'b']]);
    expect(sent.slice(3).flatMap(({ events }) => events)).toEqual([]);
    expect(aborts).toEqual([]);
    await hearts.close();
  });

  test('events past the bound are dropped, counted and told', async () => {
    const { clock, hearts, sent } = bench();
    hearts.start();
    for (let i = 0; i < MAX_PENDING_EVENTS; i += 1) hearts.event(i);
    await clock.advance(0);
    expect(sent[0]?.events).toHaveLength(MAX_PENDING_EVENTS);
    for (let i = 0; i < MAX_PENDING_EVENTS + 1; i += 1) hearts.event(i);
    await clock.advance(1_000);
    expect(sent[1]?.events).toHaveLength(MAX_PENDING_EVENTS + 1);
    expect(sent[1]?.events.at(-1)).toMatchObject({ level: 'warn', dropped: 1 });
    hearts.event('after');
    await clock.advance(1_000);
    expect(sent[2]?.events).toEqual(['after']);
    await hearts.close();
  });

  test('an event at the size limit passes, one past it is dropped and told, like one JSON cannot carry', async () => {
    const { clock, hearts, sent } = bench();
    hearts.start();
    hearts.event('x'.repeat(MAX_EVENT_BYTES - 2));
    await clock.advance(1_000);
    expect(sent[0]?.events).toEqual(['x'.repeat(MAX_EVENT_BYTES - 2)]);
    hearts.event('x'.repeat(MAX_EVENT_BYTES - 1));
    hearts.event({ circular: 1n } as unknown as Json);
    hearts.event('fine');
    await clock.advance(1_000);
    expect(sent[1]?.events).toEqual(['fine', expect.objectContaining({ dropped: 2 })]);
    await hearts.close();
  });

  test('progress past the size limit is not sent, and the lease lives on', async () => {
    const { clock, hearts, sent, aborts } = bench();
    hearts.start();
    hearts.progress('x'.repeat(MAX_EVENT_BYTES - 2));
    await clock.advance(1_000);
    expect(sent[0]?.progress).toHaveLength(MAX_EVENT_BYTES - 2);
    hearts.progress('x'.repeat(MAX_EVENT_BYTES - 1));
    await clock.advance(60_000);
    expect(sent[1]?.progress).toEqual({});
    expect(sent.flatMap(({ events }) => events)).toEqual([expect.objectContaining({ dropped: 1 })]);
    expect(aborts).toEqual([]);
    await hearts.close();
  });

  test('more events than a body takes are spread over several', async () => {
    const { clock, hearts, sent } = bench();
    hearts.start();
    const said = Array.from({ length: 60 }, (_, i) => String(i).padStart(MAX_EVENT_BYTES - 2, 'x'));
    for (const event of said) hearts.event(event);
    const flushed = hearts.flush(5_000);
    await clock.advance(1_000);
    expect(await flushed).toBe(0);
    expect(sent.length).toBeGreaterThan(3);
    for (const { events } of sent) {
      expect(events.reduce<number>((sum, e) => sum + JSON.stringify(e).length, 0)).toBeLessThanOrEqual(
        MAX_EVENTS_BODY_BYTES,
      );
    }
    expect(sent.flatMap(({ events }) => events)).toEqual(said);
    await hearts.close();
  });

  test('trouble is retried until the deadline and no longer', async () => {
    const { clock, hearts, sent, aborts } = bench({ answer: down });
    hearts.start();
    await clock.advance(19_999);
    expect(sent.length).toBeGreaterThan(3);
    expect(aborts).toEqual([]);
    await clock.advance(1);
    expect(aborts.map(({ reason }) => reason)).toEqual(['lease_lost']);
    const count = sent.length;
    await clock.advance(60_000);
    expect(sent.length).toBe(count);
  });

  test.each([false, true])(
    'trouble is retried past the deadline for as long as that is wanted, and no longer (lease ids: %s)',
    async (leaseIds) => {
      const { clock, hearts, sent, aborts } = bench({ answer: down, contactGraceMs: 60_000, leaseIds });
      hearts.start();
      await clock.advance(79_999);
      expect(aborts).toEqual([]);
      const late = sent.map(({ at }) => at).filter((at) => at > 20_000);
      const pauses = late.map((at, i) => at - (late[i - 1] ?? 20_000));
      expect(Math.max(...pauses)).toBeLessThanOrEqual(5_000);
      await clock.advance(1);
      expect(aborts.map(({ reason }) => reason)).toEqual(['lease_lost']);
      const count = sent.length;
      await clock.advance(60_000);
      expect(sent.length).toBe(count);
    },
  );

  test('a server that comes back long after the deadline finds the work under way, and keeps the lease', async () => {
    let from = 0;
    const { clock, hearts, sent, aborts } = bench({
      contactGraceMs: 60_000,
      answer: () => (clock.monotonic() < from ? down() : {}),
    });
    hearts.start();
    await clock.advance(21_000);
    for (let outage = 0; outage < 3; outage += 1) {
      from = clock.monotonic() + 50_000;
      hearts.event({ outage });
      await clock.advance(100_000);
      expect(aborts).toEqual([]);
      expect(sent.at(-1)?.at).toBeGreaterThan(from);
    }
    await hearts.close();
  });

  test.each([404, 409, 410])(
    'an answer %i loses the lease at once also after its deadline',
    async (status) => {
      const { clock, hearts, aborts } = bench({
        contactGraceMs: 60_000,
        answer: () => Promise.reject(wireError(clock.monotonic() < 40_000 ? 503 : status)),
      });
      hearts.start();
      await clock.advance(40_000);
      expect(aborts).toEqual([]);
      await clock.advance(5_000);
      expect(aborts.map(({ reason }) => reason)).toEqual(['lease_lost']);
    },
  );

  test('the heartbeat before any work is given up at the deadline, however long work would go on', async () => {
    const { clock, hearts } = bench({ contactGraceMs: 60_000, answer: down });
    let error: unknown = null;
    hearts.first().catch((reason: unknown) => (error = reason));
    await clock.advance(19_999);
    expect(error).toBeNull();
    await clock.advance(1);
    expect(error).toMatchObject({ code: 'unavailable' });
  });

  test('past the deadline a call that is never answered is cut off after 10 s', async () => {
    const hang = (_: number, signal: AbortSignal): Promise<never> =>
      new Promise((_resolve, reject) => {
        signal.addEventListener('abort', () => reject(signal.reason), { once: true });
      });
    const { clock, hearts, sent, aborts } = bench({ contactGraceMs: 600_000, answer: hang });
    hearts.start();
    await clock.advance(120_000);
    const late = sent.map(({ at }) => at).filter((at) => at > 30_000);
    expect(late.length).toBeGreaterThan(5);
    expect(Math.max(...late.map((at, i) => at - (late[i - 1] ?? at)))).toBeLessThanOrEqual(15_000);
    expect(aborts).toEqual([]);
    await hearts.close();
  });

  test('a server that comes back within the lease costs nothing', async () => {
    const { clock, hearts, aborts } = bench({ answer: (n) => (n % 4 === 0 ? {} : down()) });
    hearts.start();
    await clock.advance(600_000);
    expect(aborts).toEqual([]);
    await hearts.close();
  });

  test('a call that is never answered is cut off before what is left of the lease', async () => {
    const hang = (_: number, signal: AbortSignal): Promise<never> =>
      new Promise((_resolve, reject) => {
        signal.addEventListener('abort', () => reject(signal.reason), { once: true });
      });
    const { clock, hearts, sent, aborts } = bench({ answer: (n, s) => (n === 2 ? {} : hang(n, s)) });
    hearts.start();
    await clock.advance(19_000);
    expect(sent.length).toBe(3);
    expect(aborts).toEqual([]);
    await hearts.close();
  });

  test.each([404, 409, 410])('an answer %i loses the lease at once', async (status) => {
    const { clock, hearts, sent, aborts } = bench({ answer: () => Promise.reject(wireError(status)) });
    hearts.start();
    await clock.advance(7_000);
    expect(sent.length).toBe(1);
    expect(aborts.map(({ reason }) => reason)).toEqual(['lease_lost']);
    await expect(hearts.beat()).rejects.toMatchObject({ reason: 'lease_lost' });
  });

  test('a jump of the wall clock neither ends nor stretches a lease', async () => {
    for (const jump of [-86_400_000, 86_400_000]) {
      const { clock, hearts, aborts } = bench({ answer: down });
      hearts.start();
      clock.jumpWallClock(jump);
      await clock.advance(19_999);
      expect(aborts).toEqual([]);
      await clock.advance(1);
      expect(aborts.length).toBe(1);
    }
  });

  test.each([3_600_000, -3_600_000])(
    'a clock that differs by %i ms from the one the server tells changes nothing',
    async (aheadMs) => {
      const { clock, hearts, sent, aborts } = bench({ aheadMs });
      hearts.start();
      await clock.advance(100_000);
      // 20 s each, renewed after 5 to 7.
      expect(sent.length).toBeGreaterThanOrEqual(14);
      expect(sent.length).toBeLessThanOrEqual(20);
      expect(aborts).toEqual([]);
      await hearts.close();
    },
  );

  test.each([3_600_000, -3_600_000])(
    'a gateway whose clock is wrong by %i ms changes nothing either',
    async (gatewayMs) => {
      const { clock, hearts, sent, aborts } = bench({
        answer: () => ({ serverTimeMs: clock.now() + gatewayMs }),
      });
      hearts.start();
      await clock.advance(100_000);
      expect(sent.length).toBeGreaterThanOrEqual(14);
      expect(sent.length).toBeLessThanOrEqual(20);
      expect(aborts).toEqual([]);
      await hearts.close();
    },
  );

  test('a difference of five seconds is taken for the network', async () => {
    for (const [aheadMs, endsAt] of [
      [5_000, 25_000],
      [5_001, 20_000],
    ] as const) {
      const { clock, hearts, aborts } = bench({ aheadMs, answer: down });
      hearts.start();
      await clock.advance(endsAt - 1);
      expect(aborts).toEqual([]);
      await clock.advance(1);
      expect(aborts.length).toBe(1);
    }
  });

  test('an answer that is too long is retried, and what was said is not dropped for it', async () => {
    const tooLong = (n: number): Partial<HeartbeatReply> | Promise<never> =>
      n === 1
        ? Promise.reject(new MillraceError('resource_exhausted', 'too long', { details: { status: 200 } }))
        : {};
    const { clock, hearts, sent } = bench({ answer: tooLong });
    hearts.start();
    hearts.event('one');
    await clock.advance(2_000);
    expect(sent.map(({ events }) => events)).toEqual([['one'], ['one']]);
    await hearts.close();
  });

  test('an expiry that is always past is renewed in steps of 500 ms', async () => {
    const { clock, hearts, sent, aborts } = bench({ ttlMs: -10_000 });
    hearts.start();
    await clock.advance(5_000);
    expect(sent.length).toBe(11);
    expect(aborts).toEqual([]);
    await hearts.close();
  });

  test('without an expiry only progress and events are sent', async () => {
    const { clock, hearts, sent } = bench({ ttlMs: null });
    hearts.start();
    await clock.advance(3_600_000);
    expect(sent).toEqual([]);
    hearts.progress(1);
    await clock.advance(1);
    expect(sent.length).toBe(1);
    await hearts.close();
  });

  test('a body the server refuses is dropped and told, and the lease goes on', async () => {
    const refused = (n: number): Partial<HeartbeatReply> | Promise<never> =>
      n === 1 ? Promise.reject(wireError(413)) : {};
    const { clock, hearts, sent, aborts } = bench({ answer: refused });
    hearts.start();
    hearts.progress({ big: true });
    hearts.event('bad');
    await clock.advance(1_000);
    expect(sent.map(({ progress, events }) => [progress, events.length])).toEqual([
      [{ big: true }, 1],
      [{}, 1],
    ]);
    expect(sent[1]?.events[0]).toMatchObject({ dropped: 2 });
    await clock.advance(60_000);
    expect(aborts).toEqual([]);
    await hearts.close();
  });

  test.each([
    [{ cancel: true }],
    [{ status: 'canceled' }],
    [{ status: 'cancelled' }],
    [{ status: 'failed' }],
    [{ status: 'completed' }],
  ])('an answer %j cancels the task, and a reference server hears no more', async (answer) => {
    const { clock, hearts, sent, aborts } = bench({ answer: () => answer });
    hearts.start();
    await clock.advance(60_000);
    expect(sent.length).toBe(1);
    expect(aborts.map(({ reason }) => reason)).toEqual(['canceled']);
  });

  test('a server that knows lease ids keeps a cancelled lease until it is released', async () => {
    const { clock, hearts, sent, aborts } = bench({ leaseIds: true, answer: () => ({ cancel: true }) });
    hearts.start();
    await clock.advance(60_000);
    expect(sent.length).toBeGreaterThan(5);
    expect(aborts.map(({ reason }) => reason)).toEqual(['canceled']);
    await hearts.close();
  });

  test('a server that knows lease ids is told progress once, others every time', async () => {
    for (const leaseIds of [true, false]) {
      const { clock, hearts, sent } = bench({ leaseIds });
      hearts.start();
      hearts.progress(7);
      await clock.advance(20_000);
      expect(sent.slice(0, 3).map(({ progress }) => progress)).toEqual(
        leaseIds ? [7, null, null] : [7, 7, 7],
      );
      await hearts.close();
    }
  });

  test('beat sends at once and waits for one begun after it', async () => {
    const { clock, hearts, sent } = bench({ latencyMs: 300 });
    hearts.start();
    await clock.advance(100);
    hearts.progress(1);
    await clock.advance(100);
    let done = false;
    const beat = hearts.beat().then(() => (done = true));
    await clock.advance(400);
    expect(done).toBe(false);
    await clock.advance(100);
    await beat;
    expect(sent.map(({ at }) => at)).toEqual([100, 400]);
    await hearts.close();
    await expect(hearts.beat()).rejects.toBeInstanceOf(MillraceError);
  });

  test('flush takes no time when there is nothing to say, and one heartbeat under way when that carries it all', async () => {
    const { clock, hearts, sent } = bench({ latencyMs: 300 });
    hearts.start();
    expect(await hearts.flush(5_000)).toBe(0);
    hearts.event('a');
    await clock.advance(1);
    const flushed = hearts.flush(5_000);
    await clock.advance(300);
    expect(await flushed).toBe(0);
    expect(sent.length).toBe(1);
    await hearts.close();
  });

  test('flush gives up after its limit and says how much did not arrive', async () => {
    const { clock, hearts } = bench({ answer: down });
    hearts.start();
    hearts.event('a');
    hearts.event('b');
    const flushed = hearts.flush(2_000);
    await clock.advance(2_000);
    expect(await flushed).toBe(2);
    await hearts.close();
  });

  test('close in the middle of a heartbeat ends it', async () => {
    const { clock, dms, hearts } = bench({ latencyMs: 10_000 });
    hearts.start();
    hearts.progress(1);
    await clock.advance(100);
    expect(dms.underWay).toBe(1);
    await hearts.close();
    await hearts.close();
    expect(dms.underWay).toBe(0);
    expect(clock.pending).toBe(0);
  });
});
