/**
 * Keeping one lease alive: heartbeats on the lease's timer and when a runner has something to say, carrying progress
 * and events out and bringing a later expiry, fresh tokens and cancellation in.
 *
 * - One heartbeat is on its way at a time, so events arrive in order.
 * - A change of progress or an event is sent at once when nothing was sent lately, then at most once per
 *   `coalesceMs`; the timer's heartbeat is never later for it. Progress in between is replaced, events add up.
 * - An event leaves the list when a heartbeat carrying it was answered with success, so one is sent successfully at
 *   most once. An answer lost on the way makes the server see it twice; the wire has no way to tell.
 * - Trouble on the way (transport, 5xx, 429, 401, undecodable answers) is retried with growing pauses until the
 *   lease's deadline, and for `contactGraceMs` after it: the lease is ours until somebody else takes the task, and who
 *   cannot be reached cannot say so. 404, 409 and 410 mean the lease is gone, whenever they come. A body the server will never take is dropped, counted
 *   and told, and the lease goes on without it: what a runner says cannot cost it the lease.
 * - The expiry is a wall-clock time of the server's; it is turned into a span when it arrives, with the server's
 *   clock in mind if that differs from ours, and from there on the monotonic clock counts: neither a wrong clock of this
 *   machine nor a jump of it ends or stretches a lease.
 */
import {
  MillraceError,
  TaskAbort,
  describeError,
  sleep,
  timeoutSignal,
  type Clock,
  type Json,
  type JsonObject,
  type Logger,
  type Random,
} from '@millrace/runner';
import { timestampMs } from '@millrace/runner/decode';
import type { Dms, HeartbeatReply, LeaseHandle } from '@millrace/dispatch/client';
import { remainingMs } from './clock-error.ts';
import { attemptTimeoutMs, backoffMs, callWithin, isBodyRefused, isLeaseGone } from './retry.ts';

export interface HeartbeatSettings {
  /** `HEARTBEAT_MIN_RATIO`, `HEARTBEAT_MAX_RATIO`: the part of the remaining lease after which it is renewed. */
  readonly minRatio: number;
  readonly maxRatio: number;
  /** Shortest time between heartbeats that only carry progress or events. Default 250 ms. */
  readonly coalesceMs: number;
  /** Longest time for one call, whatever is left of the lease. */
  readonly requestTimeoutMs: number;
  /**
   * How long work goes on after its lease is over while the dispatcher cannot be reached. Somebody else may have the task by then;
   * the dispatcher accepts one ending. Default 0: not at all.
   */
  readonly contactGraceMs?: number;
}

export const DEFAULT_COALESCE_MS = 250;

/** Events kept for sending; more are dropped and counted. */
export const MAX_PENDING_EVENTS = 1024;
/** JSON bytes of one event, and of the progress value. */
export const MAX_EVENT_BYTES = 64 * 1024;
/** JSON bytes of the events in one heartbeat. The dispatcher takes bodies of 2 MiB. */
export const MAX_EVENTS_BODY_BYTES = 1024 * 1024;

/**
 * How long a lease is taken to live after the last answer when the server named no expiry, or one already past,
 * which happens when its clock and ours differ.
 */
const ASSUMED_LEASE_MS = 60_000;
/** Between heartbeats that are due because the expiry is already past. */
const MIN_SPACING_MS = 500;
const RETRY = { baseMs: 200, capMs: 5_000 };
const ENDED_STATUSES: readonly string[] = ['cancelled', 'canceled', 'failed', 'completed'];

/**
 * Milliseconds until a lease is to be renewed: a random part, between the two ratios, of what is left of it. Null: it
 * names no expiry and is renewed only along with progress. 0: it has expired already. The ratios may be swapped or
 * out of range.
 */
export function heartbeatDelayMs(
  leftMs: number | null,
  ratios: { readonly minRatio: number; readonly maxRatio: number },
  random: Random,
): number | null {
  if (leftMs === null) return null;
  const ttl = Math.trunc(leftMs);
  if (ttl <= 0) return 0;
  const lo = Math.max(0, Math.min(ratios.minRatio, ratios.maxRatio));
  const hi = Math.max(lo, ratios.minRatio, ratios.maxRatio);
  const ratio = Math.min(1, Math.max(0, lo + (hi - lo) * random()));
  const delay = ttl * ratio;
  return Math.min(ttl, delay === 0 ? 100 : delay);
}

export interface HeartbeatOptions {
  readonly dms: Dms;
  readonly lease: LeaseHandle;
  /** From the lease. */
  readonly leaseExpiresAt: string | null;
  /** The server's clock when it gave the lease. Null: not told. */
  readonly serverTimeMs?: number | null;
  readonly settings: HeartbeatSettings;
  /**
   * True for a server that knows leases by id: it is not told progress it has already, and a cancelled lease is
   * kept alive until the work is really gone. Others are told everything each time, and nothing after a cancel.
   */
  readonly leaseIds: boolean;
  /** Events are in the attempt's log as well, and marked so. Default false. */
  readonly logged?: boolean;
  readonly clock: Clock;
  readonly random: Random;
  readonly log: Logger;
  /** Called with every answer, before anything else is made of it. */
  readonly onReply: (reply: HeartbeatReply) => void;
  /** Called at most once per reason: `canceled`, `lease_lost`. */
  readonly onAbort: (abort: TaskAbort) => void;
}

interface PendingEvent {
  readonly value: Json;
  readonly bytes: number;
}

interface Waiter {
  readonly after: number;
  readonly settle: (error: Error | null) => void;
}

interface Body {
  readonly progress: Json;
  readonly progressVersion: number;
  readonly events: readonly Json[];
  /** How many of the pending events are in it. */
  readonly taken: number;
  /** How many drops it tells of. */
  readonly droppedTold: number;
}

export class Heartbeats {
  readonly #options: HeartbeatOptions;
  #lease: LeaseHandle;
  #closed = false;
  /** Ends what is under way when closing. Made when the first heartbeat is sent: short tasks send none. */
  #closing: AbortController | null = null;
  #running: Promise<void> | null = null;
  /** Why no more heartbeats are sent, once that is so. */
  #ended: TaskAbort | null = null;
  #canceled = false;
  #wake: (() => void) | null = null;

  #leaseExpiresAt: string | null;
  /** Monotonic; null: no timer. */
  #dueAt: number | null = null;
  /** Monotonic; null: the server named no usable expiry. */
  #deadline: number | null = null;
  #lastSentAt = -Infinity;
  /** Somebody waits for the next heartbeat. */
  #urgent = false;
  #waiters: Waiter[] = [];
  /** Heartbeats begun; a waiter wants one begun after it asked. */
  #sends = 0;
  #sending = false;

  #progress: Json = {};
  /** Counts changes. */
  #progressVersion = 0;
  /** The newest one that arrived. */
  #deliveredVersion = 0;
  readonly #events: PendingEvent[] = [];
  #dropped = 0;

  constructor(options: HeartbeatOptions) {
    this.#options = options;
    this.#lease = options.lease;
    this.#leaseExpiresAt = options.leaseExpiresAt;
    this.#rearm(options.serverTimeMs);
  }

  /** Names the lease as the last answer did. */
  get lease(): LeaseHandle {
    return this.#lease;
  }

  /**
   * When the lease is over unless renewed, in the clock's monotonic time. `since`: what an assumed lifetime counts from
   * when the server named none.
   */
  deadline(since: number): number {
    return this.#deadline ?? since + ASSUMED_LEASE_MS;
  }

  /** When work under the lease is given up unless it is renewed: `contactGraceMs` after the {@link deadline}. */
  lastChance(since: number): number {
    return this.deadline(since) + (this.#options.settings.contactGraceMs ?? 0);
  }

  /**
   * The heartbeat before any work, `{"progress":{},"events":[]}`. Retried until the deadline and no longer: there is nothing
   * to lose yet. Resolves with its answer.
   *
   * @throws the error that ended it: the last answer before the deadline, or the one that says the lease is gone
   */
  async first(): Promise<HeartbeatReply> {
    return await this.#send(0);
  }

  /** Starts the timer. Once; {@link close} stops it. */
  start(): void {
    this.#running ??= this.#loop();
  }

  /** Replaces the progress value. */
  progress(value: Json): void {
    this.#say(() => {
      this.#progress = value;
      this.#progressVersion += 1;
    });
  }

  /** Appends an event, or drops it at a bound. */
  event(value: Json): void {
    this.#say(() => {
      // First, so that a flood costs nothing but a count.
      if (this.#events.length >= MAX_PENDING_EVENTS) {
        this.#dropped += 1;
        return;
      }
      const text = jsonText(value);
      const bytes = text === null ? Infinity : Buffer.byteLength(text);
      if (text === null || bytes > MAX_EVENT_BYTES) this.#dropped += 1;
      // As it is now: the caller may go on changing the object.
      else this.#events.push({ value: JSON.parse(text) as Json, bytes });
    });
  }

  /**
   * Sends a heartbeat now, even if there is nothing to say. Resolves when one begun after this call was answered
   * with success.
   *
   * @throws TaskAbort when no more are sent, MillraceError `failed_precondition` once closed
   */
  async beat(): Promise<void> {
    await this.#sent(this.#sends);
  }

  /**
   * Sends what was said so far. Resolves when it has arrived: at once if it has already; or after `limitMs`, or when the
   * lease is gone, and then says how many events did not arrive.
   */
  async flush(limitMs: number): Promise<number> {
    const open = (): boolean => this.#dirty && this.#ended === null && !this.#closed;
    if (open()) {
      using limit = timeoutSignal(this.#options.clock, limitMs, () => undefined);
      const late = new Promise<void>((resolve) => {
        limit.signal.addEventListener('abort', () => resolve(), { once: true });
      });
      while (open() && !limit.signal.aborted) {
        // A heartbeat on its way may carry it all.
        const sent = this.#sent(this.#sending ? this.#sends - 1 : this.#sends);
        // Why it was not sent is dealt with where it happens.
        await Promise.race([sent.catch(() => undefined), late]);
      }
    }
    return this.#events.length + this.#dropped;
  }

  /** Sends nothing more, drops a heartbeat under way, and waits until that is so. Idempotent. */
  async close(): Promise<void> {
    this.#closed = true;
    this.#closing?.abort(CLOSED);
    this.#wake?.();
    await this.#running;
    this.#settleWaiters(CLOSED);
  }

  /** Resolves when a heartbeat with a number above `after` was answered with success. */
  async #sent(after: number): Promise<void> {
    if (this.#ended !== null) throw this.#ended;
    if (this.#closed) throw CLOSED;
    if (after >= this.#sends) {
      this.#urgent = true;
      this.#wake?.();
    }
    await new Promise<void>((resolve, reject) => {
      this.#waiters.push({ after, settle: (error) => (error === null ? resolve() : reject(error)) });
    });
  }

  /** Wakes the loop only when there was nothing to send before: the rest of a flood changes nothing for it. */
  #say(change: () => void): void {
    const before = this.#dirty;
    change();
    if (!before) this.#wake?.();
  }

  get #dirty(): boolean {
    return this.#progressVersion !== this.#deliveredVersion || this.#events.length > 0 || this.#dropped > 0;
  }

  async #loop(): Promise<void> {
    while (this.#ended === null && !this.#closed) {
      const waitMs = this.#dueInMs();
      if (waitMs > 0) {
        await this.#idle(waitMs);
        continue;
      }
      this.#urgent = false;
      try {
        await this.#send(this.#options.settings.contactGraceMs ?? 0);
      } catch (error) {
        if (this.#closed) break;
        this.#end(new TaskAbort('lease_lost', `lease lost: ${describeError(error)}`));
      }
    }
  }

  #dueInMs(): number {
    if (this.#urgent) return 0;
    const now = this.#options.clock.monotonic();
    const due = this.#dueAt === null ? Infinity : this.#dueAt - now;
    if (!this.#dirty) return due;
    return Math.min(due, this.#lastSentAt + this.#options.settings.coalesceMs - now);
  }

  /** Until `waitMs` have passed or something happened. */
  async #idle(waitMs: number): Promise<void> {
    await new Promise<void>((resolve) => {
      const timer = waitMs === Infinity ? null : this.#options.clock.setTimer(resolve, waitMs);
      this.#wake = () => {
        timer?.cancel();
        resolve();
      };
    });
    this.#wake = null;
  }

  /** One heartbeat, tried until it is answered with success, the lease is gone, or its deadline has passed by `graceMs`. */
  async #send(graceMs: number): Promise<HeartbeatReply> {
    this.#sends += 1;
    this.#sending = true;
    let reply: HeartbeatReply;
    try {
      reply = await this.#attempts(this.deadline(this.#options.clock.monotonic()), graceMs);
    } finally {
      this.#sending = false;
    }
    this.#settleWaiters(null, this.#sends);
    return reply;
  }

  async #attempts(deadline: number, graceMs: number): Promise<HeartbeatReply> {
    const { dms, clock, random, log, settings, logged = false } = this.#options;
    if (this.#closed) throw CLOSED;
    const closed = (this.#closing ??= new AbortController()).signal;
    let outOfContact = false;
    for (let failures = 1; ; failures += 1) {
      const body = this.#body();
      this.#lastSentAt = clock.monotonic();
      const untilDeadline = deadline - this.#lastSentAt;
      const timeoutMs = attemptTimeoutMs(untilDeadline, settings.requestTimeoutMs, untilDeadline + graceMs);
      const { progress, events } = body;
      const mark = logged && events.length > 0 ? { logged } : {};
      try {
        const reply = await callWithin(
          clock,
          timeoutMs,
          'heartbeat',
          (signal) => dms.heartbeat(this.#lease, { progress, events, ...mark }, { signal }),
          closed,
        );
        if (outOfContact)
          log.info('the dispatcher is reached again and the lease is still ours', { failures });
        this.#delivered(body);
        this.#apply(reply);
        return reply;
      } catch (error) {
        if (closed.aborted || isLeaseGone(error)) throw error;
        if (isBodyRefused(error) && (events.length > 0 || body.progressVersion !== this.#deliveredVersion)) {
          this.#refused(body, error);
          continue;
        }
        const pauseMs = backoffMs(failures, RETRY, random, error);
        const leaseLeftMs = deadline - clock.monotonic();
        const leftMs = leaseLeftMs + graceMs;
        log.warn('heartbeat failed', {
          error: describeError(error),
          failures,
          lease_left_ms: Math.round(leaseLeftMs),
        });
        if (leaseLeftMs <= 0 && leftMs > 0 && !outOfContact) {
          outOfContact = true;
          log.warn('the lease is over and the dispatcher cannot be reached; the task goes on', {
            gives_up_in_ms: Math.round(leftMs),
          });
        }
        if (leftMs > 0) await sleep(clock, Math.min(pauseMs, leftMs), closed);
        // No attempt begins after the last chance; the first one may, since only the server's clock is certain.
        if (pauseMs >= leftMs) throw error;
      }
    }
  }

  #body(): Body {
    const events: Json[] = [];
    let bytes = 0;
    for (const event of this.#events) {
      bytes += event.bytes;
      if (events.length > 0 && bytes > MAX_EVENTS_BODY_BYTES) break;
      events.push(event.value);
    }
    const taken = events.length;
    // Drops happen when the list is full, so they come after everything in it.
    const droppedTold = taken === this.#events.length ? this.#dropped : 0;
    if (droppedTold > 0) events.push(droppedEvent(droppedTold));
    return {
      progress: this.#progressToSend(),
      events,
      taken,
      droppedTold,
      progressVersion: this.#progressVersion,
    };
  }

  #progressToSend(): Json {
    if (this.#options.leaseIds && this.#progressVersion === this.#deliveredVersion) return null;
    const text = jsonText(this.#progress);
    if (text === null || Buffer.byteLength(text) > MAX_EVENT_BYTES) {
      this.#progress = {};
      this.#dropped += 1;
    }
    return this.#progress;
  }

  #delivered(body: Body): void {
    this.#events.splice(0, body.taken);
    this.#dropped -= body.droppedTold;
    this.#deliveredVersion = body.progressVersion;
  }

  /** Drops what was in the body and counts it; if only that count was left in it, the count. */
  #refused(body: Body, error: unknown): void {
    const { taken, droppedTold, events } = body;
    this.#options.log.warn('the dispatcher refused progress and events', {
      error: describeError(error),
      events: events.length,
    });
    const progressDropped = body.progressVersion !== this.#deliveredVersion;
    if (progressDropped && this.#progressVersion === body.progressVersion) this.#progress = {};
    this.#delivered(body);
    if (taken > 0 || progressDropped) this.#dropped += droppedTold + taken + (progressDropped ? 1 : 0);
  }

  #apply(reply: HeartbeatReply): void {
    const taskId = reply.task?.id ?? reply.task_id;
    if (taskId !== null && taskId !== this.#lease.taskId) this.#lease = { ...this.#lease, taskId };
    this.#leaseExpiresAt = reply.lease_expires_at ?? reply.task?.lease_expires_at ?? this.#leaseExpiresAt;
    this.#rearm(reply.serverTimeMs);
    this.#options.onReply(reply);
    if (this.#canceled) return;
    if (reply.cancel === true || (reply.status !== null && ENDED_STATUSES.includes(reply.status))) {
      this.#canceled = true;
      const abort = new TaskAbort('canceled', 'task canceled by the dispatcher');
      if (this.#options.leaseIds) this.#options.onAbort(abort);
      else this.#end(abort);
    }
  }

  #rearm(serverTimeMs: number | null = null): void {
    const { clock, random, settings } = this.#options;
    const now = clock.monotonic();
    const leftMs =
      this.#leaseExpiresAt === null
        ? null
        : remainingMs(clock, timestampMs(this.#leaseExpiresAt), serverTimeMs);
    const delay = heartbeatDelayMs(leftMs, settings, random);
    if (leftMs === null || delay === null) {
      this.#dueAt = null;
      this.#deadline = null;
    } else if (delay === 0) {
      this.#dueAt = Math.max(now, this.#lastSentAt + MIN_SPACING_MS);
      this.#deadline = null;
    } else {
      this.#dueAt = now + delay;
      this.#deadline = now + leftMs;
    }
  }

  #end(abort: TaskAbort): void {
    this.#ended = abort;
    this.#settleWaiters(abort);
    this.#options.onAbort(abort);
  }

  /** Settles those whom the heartbeat of this number satisfies; without a number, all. */
  #settleWaiters(error: Error | null, number = Infinity): void {
    const settled = this.#waiters.filter((waiter) => waiter.after < number);
    this.#waiters = this.#waiters.filter((waiter) => waiter.after >= number);
    for (const waiter of settled) waiter.settle(error);
  }
}

function droppedEvent(count: number): JsonObject {
  return {
    level: 'warn',
    message: 'events dropped by the node',
    dropped: count,
    rule: `at most ${MAX_PENDING_EVENTS} pending, ${MAX_EVENT_BYTES} bytes of JSON each`,
  };
}

/** One for all, since making an error costs more than ending a short task otherwise does. */
const CLOSED = new MillraceError('failed_precondition', 'heartbeats have ended: the task is over');

/** Null for what JSON cannot carry; a runner in JavaScript may hand anything. */
function jsonText(value: unknown): string | null {
  try {
    return JSON.stringify(value) ?? null;
  } catch {
    return null;
  }
}
