/**
 * The main loop: asks for work whenever a slot is free, runs one session per lease, hears of cancels, and stops in
 * steps. It runs no task code of its own and waits for nothing that cannot be cancelled.
 *
 * Three things go on at the same time:
 * - *leasing*: one request at a time, for as many leases as there are free slots. Where the server can, the request
 *   waits there for work; elsewhere the node pauses between requests. Errors make the pauses grow. Where the server
 *   can, completions bring the next leases along (`exchange.ts`), so that it only comes to this when there was no work.
 * - *sessions*, up to `maxConcurrency`. What one of them does cannot end another or the engine.
 * - *watching* (our dispatcher): one waiting request naming the running leases, so that a cancel is known within
 *   moments instead of at the next heartbeat. What it says is only a hint to ask: the heartbeat's answer decides.
 *
 * Stopping goes down a ladder, a step per `stop()` or when the step's time is over: *drain* (lease nothing, let tasks
 * finish), *abort* (signal with reason `shutdown`), *kill* (close the runners, which ends their code), *abandon* (stop
 * waiting: those leases lapse). Whatever settles before the last step is released, so its attempt does not count.
 */
import { setMaxListeners } from 'node:events';
import { MillraceError, TaskAbort, describeError, sleep, type Timer } from '@millrace/runner';
import {
  NO_FEATURES,
  type Features,
  type LeaseHandle,
  type LeaseQuery,
  type ReceivedLease,
} from '@millrace/dispatch/client';
import { Exchange } from './exchange.ts';
import { supervisionMetrics } from './metrics.ts';
import { backoffMs, callWithin } from './retry.ts';
import { Session, type SessionEnding, type SessionWorld } from './session.ts';
import { LogShipper } from './task-log.ts';

export interface EngineOptions extends Omit<SessionWorld, 'features' | 'abandoned' | 'logs' | 'reports'> {
  /** Leases held at once. */
  readonly maxConcurrency: number;
  /** Pause between requests for work when there was none: uniform between the two, in either order. */
  readonly pollBackoffMinMs: number;
  readonly pollBackoffMaxMs: number;
  readonly stopping: StopTimes;
}

/** How long each step of stopping may take before the next one begins. */
export interface StopTimes {
  readonly drainMs: number;
  readonly abortMs: number;
  readonly killMs: number;
}

export type EngineState = 'idle' | 'running' | 'draining' | 'aborting' | 'stopped';

/** The longest a request waits at the server, seconds; the server may allow less. */
const LONG_POLL_SECS = 30;
/** A new lease is watched at the latest this long after its grant; shorter tasks are never watched. */
const WATCH_DELAY_MS = 200;
const ERROR_PAUSE_CAP_MS = 60_000;
/** The longest pause after an answer without work from a server that waits for work itself. */
const LONG_POLL_PAUSE_MS = 2_000;

export class Engine {
  readonly #options: EngineOptions;
  readonly #sessions = new Set<Session>();
  /** The newest session of each task, by the id it was leased with. */
  readonly #byTask = new Map<string, Session>();
  /** Those whose completion was accepted and that still clean up: they hold no slot any more. */
  readonly #completed = new Set<Session>();
  readonly #exchange: Exchange;
  /** Aborts when no more work is to be leased. */
  readonly #draining = new AbortController();
  /** Aborts when nothing is waited for any more. */
  readonly #abandoned = new AbortController();
  /** Aborts when the last session has ended. */
  readonly #over = new AbortController();
  /** Sessions a watch has named: they were told to ask, and find out the rest themselves. */
  readonly #told = new WeakSet<Session>();
  /** Called when a session began or ended. */
  readonly #listeners = new Set<() => void>();
  #features: Features = NO_FEATURES;
  #logs: LogShipper | null = null;
  #state: EngineState = 'idle';
  #step: 'none' | 'drain' | 'abort' | 'kill' | 'abandon' = 'none';
  #stepTimer: Timer | null = null;
  /** A lease that led nowhere: the next request waits as if there had been no work. */
  #fruitless = false;

  constructor(options: EngineOptions) {
    this.#options = options;
    // Every session listens to it.
    setMaxListeners(0, this.#abandoned.signal);
    this.#exchange = new Exchange({
      dms: options.dms,
      clock: options.clock,
      features: () => this.#features,
      next: (places) => (this.#draining.signal.aborted ? null : this.#query(places)),
      exchanged: (completed, leases) => this.#exchanged(completed, leases),
    });
  }

  get state(): EngineState {
    return this.#state;
  }

  /** Sessions that have not ended. */
  get active(): number {
    return this.#sessions.size;
  }

  /** What the dispatcher can do; nothing until it has been reached. */
  get features(): Features {
    return this.#features;
  }

  /** Leases and runs tasks until stopped; resolves when every session has ended and the runners are closed. Once. */
  async run(): Promise<void> {
    const { clock, log, router, stopping, metrics, maxConcurrency } = this.#options;
    metrics.recordSlots?.(maxConcurrency);
    supervisionMetrics(metrics).observePhases(() => {
      // What has ended is the dispatcher's to remember.
      const pending = Math.min(router.slots.waiting, this.#occupied);
      return { pending, running: this.#occupied - pending };
    });
    if (this.#state === 'idle') this.#state = 'running';
    const watching = this.#watch();
    await this.#lease();
    while (this.#sessions.size > 0) await this.#change();
    this.#over.abort();
    await watching;
    await this.#logs?.close();
    this.#stepTimer?.cancel();
    // Closing is bounded like the steps before it.
    const limit = clock.setTimer(() => this.#abandoned.abort(), stopping.killMs);
    await Promise.race([router.close(log), aborted(this.#abandoned.signal)]);
    limit.cancel();
    this.#state = 'stopped';
  }

  /** One step down the ladder. Before {@link run}, it will end at once. */
  stop(): void {
    const { log, router, stopping } = this.#options;
    if (this.#state === 'stopped') return;
    this.#stepTimer?.cancel();
    switch (this.#step) {
      case 'none':
        this.#step = 'drain';
        this.#state = 'draining';
        log.info('stopping: no more leases, tasks may finish', {
          active: this.active,
          drain_ms: stopping.drainMs,
        });
        this.#draining.abort(new MillraceError('canceled', 'the node is stopping'));
        // What waits for a slot or for its next try is another node's from now on.
        router.slots.close();
        this.#stopLater(stopping.drainMs);
        break;
      case 'drain':
        this.#step = 'abort';
        this.#state = 'aborting';
        log.info('stopping: aborting tasks', { active: this.active });
        for (const session of this.#sessions)
          session.abort(new TaskAbort('shutdown', 'the node is stopping'));
        this.#stopLater(stopping.abortMs);
        break;
      case 'abort':
        this.#step = 'kill';
        log.warn('stopping: closing runners', { active: this.active });
        void router.close(log);
        this.#stopLater(stopping.killMs);
        break;
      case 'kill':
        this.#step = 'abandon';
        log.error('stopping: giving up on tasks that do not end', {
          task_ids: [...this.#sessions].map((session) => session.taskId),
        });
        this.#abandoned.abort();
        break;
      case 'abandon':
        break;
    }
  }

  #stopLater(delayMs: number): void {
    if (this.#sessions.size > 0) this.#stepTimer = this.#options.clock.setTimer(() => this.stop(), delayMs);
  }

  async #lease(): Promise<void> {
    const { dms, clock, random, log, maxConcurrency } = this.#options;
    const signal = this.#draining.signal;
    let failures = 0;
    let known = false;
    while (!signal.aborted) {
      try {
        if (!known) {
          this.#features = await this.#call('features', 0, (callSignal) =>
            dms.features({ signal: callSignal }),
          );
          known = true;
          log.info('dispatcher reached', { ...this.#features });
        }
        if (this.#fruitless) {
          this.#fruitless = false;
          await sleep(clock, this.#pauseMs(), signal);
        }
        const free = maxConcurrency - this.#occupied;
        if (free <= 0) {
          await this.#change(signal);
          continue;
        }
        const waitSecs = Math.min(LONG_POLL_SECS, this.#features.longPollSecs);
        const askedAt = clock.monotonic();
        const request = { ...this.#query(free), waitSecs };
        const result = await this.#call('lease', waitSecs * 1000, (callSignal) =>
          dms.lease(request, { signal: callSignal }),
        );
        failures = 0;
        const waited = waitSecs > 0 && clock.monotonic() - askedAt >= (waitSecs * 1000) / 2;
        if (result.kind === 'leases') this.#open(result.leases);
        else if (result.kind === 'busy') {
          // A session that ends may be what the server waits for.
          await this.#change(signal, this.#pauseMs());
        } else if (!waited) await sleep(clock, this.#pauseMs(), signal);
      } catch (error) {
        if (signal.aborted) return;
        failures += 1;
        const pauseMs = backoffMs(failures, this.#errorRange(), random, error);
        log.warn('asking for work failed', {
          error: describeError(error),
          failures,
          pause_ms: Math.round(pauseMs),
        });
        await sleep(clock, pauseMs, signal).catch(() => undefined);
      }
    }
  }

  /** What is leased in so many slots. */
  #query(slots: number): Omit<LeaseQuery, 'waitSecs'> {
    const { batchItems, startOnLease } = this.#features;
    return {
      max: Math.min(slots, Math.max(1, batchItems)),
      start: startOnLease,
      capabilities: this.#options.router.capabilities,
    };
  }

  #exchanged(completed: readonly LeaseHandle[], leases: readonly ReceivedLease[]): void {
    const ids = new Set(completed.map(({ leaseId }) => leaseId));
    // One that gave up on its report is not among them any more.
    for (const session of this.#sessions) if (ids.has(session.leaseId)) this.#completed.add(session);
    this.#open(leases);
  }

  /** Slots that are not free. */
  get #occupied(): number {
    return this.#sessions.size - this.#completed.size;
  }

  /** A call with a time limit; `waitMs` is how long the server may take on purpose. */
  async #call<T>(what: string, waitMs: number, call: (signal: AbortSignal) => Promise<T>): Promise<T> {
    const { clock, heartbeat } = this.#options;
    return await callWithin(clock, waitMs + heartbeat.requestTimeoutMs, what, call, this.#draining.signal);
  }

  #open(leases: readonly ReceivedLease[]): void {
    // Granted while the stop request was on its way: they are given back unopened.
    const stopping = this.#draining.signal.aborted;
    const world = {
      ...this.#options,
      reports: this.#exchange,
      features: this.#features,
      logs: this.#logShipper(),
      abandoned: this.#abandoned.signal,
    };
    for (const lease of leases) {
      const { id } = lease.envelope.task;
      // Its lease is over, although nobody could tell it: it works on for nothing.
      this.#byTask
        .get(id)
        ?.abort(new TaskAbort('lease_lost', 'lease lost: the task was leased anew, to this node'));
      const session = new Session(lease, world);
      this.#sessions.add(session);
      this.#byTask.set(id, session);
      if (stopping) session.abort(new TaskAbort('shutdown', 'the node is stopping'));
      void this.#follow(session, lease);
    }
    this.#notify();
  }

  /** Null: the dispatcher keeps no logs. */
  #logShipper(): LogShipper | null {
    const { taskLogBytes = 0, leaseIds, batchItems } = this.#features;
    if (taskLogBytes === 0 || !leaseIds) return null;
    const { dms, clock, random, log, heartbeat } = this.#options;
    return (this.#logs ??= new LogShipper({
      dms,
      maxBytes: taskLogBytes,
      batchItems,
      requestTimeoutMs: heartbeat.requestTimeoutMs,
      clock,
      random,
      log,
    }));
  }

  async #follow(session: Session, lease: ReceivedLease): Promise<void> {
    let ending: SessionEnding['kind'] = 'abandoned';
    try {
      ({ kind: ending } = await session.run());
    } catch (error) {
      // Only if cleaning up failed; the slot is free all the same.
      this.#options.log.error('session could not be cleaned up', {
        task_id: lease.envelope.task.id,
        error: describeError(error),
      });
    }
    if (ending === 'skipped' || ending === 'setup_failed') this.#fruitless = true;
    this.#sessions.delete(session);
    const { id } = lease.envelope.task;
    if (this.#byTask.get(id) === session) this.#byTask.delete(id);
    this.#completed.delete(session);
    this.#notify();
  }

  #pauseMs(): number {
    const { random, pollBackoffMinMs: a, pollBackoffMaxMs: b } = this.#options;
    const lo = Math.min(a, b);
    const hi = Math.max(a, b);
    // A server that waits itself is asked again soon: what it told was about this moment.
    const top = this.#features.longPollSecs > 0 ? Math.min(hi, Math.max(lo, LONG_POLL_PAUSE_MS)) : hi;
    return lo + (top - lo) * random();
  }

  #errorRange(): { baseMs: number; capMs: number } {
    const { pollBackoffMinMs: a, pollBackoffMaxMs: b } = this.#options;
    const baseMs = Math.max(100, Math.min(a, b));
    return { baseMs, capMs: Math.max(baseMs, Math.min(ERROR_PAUSE_CAP_MS, Math.max(a, b))) };
  }

  /** Holds one request open that names the running leases, until the last session has ended. */
  async #watch(): Promise<void> {
    const { dms, clock, random, log, heartbeat } = this.#options;
    const over = this.#over.signal;
    let failures = 0;
    while (!over.aborted) {
      const open = this.#watchable();
      const watched = open.filter((session) => this.#watchIn(session) <= 0);
      if (watched.length === 0 || !this.#features.leaseIds) {
        await this.#change(over, Math.min(...open.map((session) => this.#watchIn(session))));
        continue;
      }
      const startedAt = clock.monotonic();
      const outdated = new AbortController();
      const settled = new AbortController();
      const replace = (): void => outdated.abort();
      void this.#unwatched(new Set(watched), settled.signal).then(replace);
      over.addEventListener('abort', replace, { once: true });
      try {
        const waitSecs = Math.min(LONG_POLL_SECS, Math.max(1, this.#features.longPollSecs));
        const leaseIds = watched.flatMap(({ leaseId }) => (leaseId === null ? [] : [leaseId]));
        const ended = await callWithin(
          clock,
          waitSecs * 1000 + heartbeat.requestTimeoutMs,
          'watch',
          (signal) => dms.watch(leaseIds, waitSecs, { signal }),
          outdated.signal,
        );
        failures = 0;
        for (const session of watched) {
          if (session.leaseId === null || !ended.includes(session.leaseId) || !this.#sessions.has(session))
            continue;
          this.#told.add(session);
          // A lease that had only expired is kept by asking.
          void session.check().then((goesOn) => goesOn && this.#told.delete(session));
        }
      } catch (error) {
        if (MillraceError.is(error) && error.code === 'unimplemented') return;
        if (!outdated.signal.aborted) {
          failures += 1;
          log.debug('watching leases failed', { error: describeError(error), failures });
        }
      } finally {
        settled.abort();
        over.removeEventListener('abort', replace);
      }
      const pauseMs = failures > 0 ? backoffMs(failures, this.#errorRange(), random) : WATCH_DELAY_MS;
      const leftMs = startedAt + pauseMs - clock.monotonic();
      if (leftMs > 0) await sleep(clock, leftMs, over).catch(() => undefined);
    }
  }

  #watchable(): Session[] {
    return [...this.#sessions].filter((session) => session.leaseId !== null && !this.#told.has(session));
  }

  /** Milliseconds until a session is worth watching. */
  #watchIn(session: Session): number {
    return session.grantedAt + WATCH_DELAY_MS - this.#options.clock.monotonic();
  }

  /** Resolves when a session that is not in `watched` is worth it, or `signal` aborts. */
  async #unwatched(watched: ReadonlySet<Session>, signal: AbortSignal): Promise<void> {
    // Not sooner than the delay after the request began: a burst of tasks must not be a burst of requests.
    await sleep(this.#options.clock, WATCH_DELAY_MS, signal).catch(() => undefined);
    while (!signal.aborted) {
      const others = this.#watchable().filter((session) => !watched.has(session));
      const inMs = Math.min(...others.map((session) => this.#watchIn(session)));
      if (inMs <= 0) return;
      await this.#change(signal, inMs);
    }
  }

  /** Resolves when a session begins or ends, after `timeoutMs`, or when `signal` aborts. */
  #change(signal?: AbortSignal, timeoutMs = Infinity): Promise<void> {
    return new Promise((resolve) => {
      if (signal?.aborted) return resolve();
      const timer = timeoutMs === Infinity ? null : this.#options.clock.setTimer(done, timeoutMs);
      const listeners = this.#listeners;
      function done(): void {
        timer?.cancel();
        listeners.delete(done);
        signal?.removeEventListener('abort', done);
        resolve();
      }
      listeners.add(done);
      signal?.addEventListener('abort', done, { once: true });
    });
  }

  #notify(): void {
    for (const listener of this.#listeners) listener();
  }
}

function aborted(signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal.aborted) resolve();
    else signal.addEventListener('abort', () => resolve(), { once: true });
  });
}
