/**
 * One lease, from grant to its exactly one ending.
 *
 * A session is in one of these states and moves only along the arrows:
 *
 * - **granted**: the lease is ours, nothing has happened. Without a runner for it, or when it is cancelled already,
 *   it goes to *reporting*. If the server counts the task as running from the lease on, it goes to *running*;
 *   else to *starting*.
 * - **starting**: the first heartbeat is on its way. Its answer may change the task, cancel it, or say that the lease
 *   is gone. → *running*, *reporting*
 * - **running**: the runner was entered. → *stopping* when something ends the work, *settled* when the runner is done
 * - **stopping**: the signal has aborted and the runner has not settled yet; the lease is kept alive meanwhile.
 *   → *settled* however the runner settles; *ended* when the node gives up on it at the end of its shutdown
 * - **settled**: the verdict stands, the ports are closed, the last progress and events are sent. → *reporting*
 * - **reporting**: one complete, fail or release is being delivered, or there is nothing to report. → *ended*
 * - **ended**: heartbeats have stopped, the work folder is gone.
 *
 * The verdict is the first of: the runner resolving, the runner rejecting, an abort. Later ones change nothing: a
 * completion that came before a cancel is a completion, and a runner that still succeeds after its abort was aborted.
 *
 *     completed            complete
 *     failed               fail, `runner failed: …`
 *     deadline, limit      fail, naming the limit
 *     canceled             release `canceled`, after the work is really gone; nothing where the server has no release
 *     shutdown             release `shutdown`; nothing where the server has no release: the lease lapses
 *     lease_lost           nothing: another attempt owns the task
 */
import { setMaxListeners } from 'node:events';
import {
  MillraceError,
  NO_TRACES,
  TaskAbort,
  describeError,
  timeoutSignal,
  type ArtifactSink,
  type Clock,
  type ControlPlane,
  type InputSource,
  type Json,
  type JsonObject,
  type LeaseEnvelope,
  type LogLevel,
  type Logger,
  type Random,
  type RunnerType,
  type Span,
  type TaskContext,
  type TaskSpec,
  type Timer,
  type TraceAttributes,
  type Tracer,
} from '@millrace/runner';
import type { ArtifactReport, Dms, Features, HeartbeatReply, ReceivedLease } from '@millrace/dispatch/client';
import type { BuiltTask } from '@millrace/runner/plugin';
import { Heartbeats, type HeartbeatSettings } from './heartbeat.ts';
import { supervisionMetrics, type MetricsBackend, type TaskOutcome } from './metrics.ts';
import {
  completeReport,
  deliver,
  noRunnerReport,
  runnerFailedReport,
  setupFailedReport,
  withUsage,
  type Delivery,
  type Report,
  type SetupStage,
} from './report.ts';
import type { Roster, Route } from './routing/roster.ts';
import { supervise, type Try } from './supervision/supervise.ts';
import type { LogShipper, TaskLog } from './task-log.ts';
import { UsageRecord, isTimeout, runnerErrorKind, type Verdict } from './usage.ts';
import type { TaskFolder, Workspace } from './workspace.ts';

export type SessionState =
  'granted' | 'starting' | 'running' | 'stopping' | 'settled' | 'reporting' | 'ended';

const TRANSITIONS: Readonly<Record<SessionState, readonly SessionState[]>> = {
  granted: ['starting', 'running', 'reporting', 'ended'],
  starting: ['running', 'reporting', 'ended'],
  running: ['stopping', 'settled', 'ended'],
  stopping: ['settled', 'ended'],
  settled: ['reporting', 'ended'],
  reporting: ['ended'],
  ended: [],
};

/** What a task's inputs and artifacts go through. */
export interface SessionStorage {
  readonly input: InputSource;
  readonly output: ArtifactSink;
  /** What was uploaded, one record per logical path. */
  artifacts(): readonly ArtifactReport[];
  /** Bytes of inputs read and of artifacts written so far. Absent: not counted. */
  transferred?(): { readonly bytesIn: number; readonly bytesOut: number };
  /** Ends transfers under way; later calls fail with `failed_precondition`. */
  close(): Promise<void>;
}

/** What the storage of a session is opened with. */
export interface StorageRequest {
  /** As it stands when the storage is opened: `domain_id` and `domain_server_url` are not null. */
  readonly lease: LeaseEnvelope;
  readonly leaseId: string | null;
  /** Where the task's domain is now; heartbeats may move it. */
  readonly domain: () => { readonly id: string; readonly serverUrl: string };
  /** The current domain token. */
  readonly token: () => string;
  /** Gets a newer domain token from the dispatcher by an early heartbeat. Rejects when the lease is gone. */
  readonly refreshToken: () => Promise<void>;
  readonly folder: TaskFolder;
  /** Begins a span around one call of a port. Absent: nothing is traced. */
  readonly trace?: (name: string, attributes: TraceAttributes) => Span;
  /** The task's: transfers under way end when it aborts. */
  readonly signal: AbortSignal;
  readonly log: Logger;
}

export type OpenStorage = (request: StorageRequest) => SessionStorage;

/** What sessions share. */
export interface SessionWorld {
  readonly dms: Dms;
  /** Takes the reports about ended tasks. Default: `dms`. */
  readonly reports?: Pick<Dms, 'complete' | 'fail' | 'release'>;
  readonly features: Features;
  readonly router: Roster;
  readonly openStorage: OpenStorage;
  readonly workspace: Pick<Workspace, 'taskFolder'>;
  readonly metrics: MetricsBackend;
  /** Default: nothing is traced. */
  readonly tracer?: Tracer;
  readonly heartbeat: HeartbeatSettings;
  /** Where lines of the tasks' logs go. Absent: the dispatcher keeps no logs, they go with the heartbeats' events. */
  readonly logs?: LogShipper | null;
  /** Wall time of one attempt; then it is stopped with reason `deadline` and fails. */
  readonly taskWallMs: number;
  readonly clock: Clock;
  readonly random: Random;
  readonly log: Logger;
  /**
   * When it aborts, nothing is waited for any more: neither for runners to settle nor for reports to arrive. Sessions
   * have been aborted before.
   */
  readonly abandoned: AbortSignal;
}

export interface SessionEnding {
  /** `skipped`: cancelled before any work. `abandoned`: the runner never settled, or the session itself broke. */
  readonly kind:
    | 'completed'
    | 'failed'
    | 'setup_failed'
    | 'skipped'
    | 'canceled'
    | 'released'
    | 'lease_lost'
    | 'abandoned';
  /** What became of the report; null: there was none to send. */
  readonly delivery: Delivery | null;
}

/** Of what is left of the lease, the last words get at most this long; the report matters more. */
const FLUSH_LIMIT_MS = 5_000;
const STUCK_LOG_EVERY_MS = 60_000;

export class Session {
  readonly leaseId: string | null;
  /** Monotonic. */
  readonly grantedAt: number;
  readonly #world: SessionWorld;
  readonly #log: Logger;
  readonly #heartbeats: Heartbeats;
  /** Null: log lines are events. */
  readonly #taskLog: TaskLog | null;
  readonly #folder: TaskFolder;
  readonly #controller = new AbortController();
  #state: SessionState = 'granted';
  #envelope: LeaseEnvelope;
  #token: string;
  #merged = false;
  #verdict: Verdict | null = null;
  #leaseLost = false;
  #timers: Timer[] = [];
  /** The runner is in it. */
  #try: Try | null = null;
  /** Of all tries that have ended. */
  #runMs = 0;
  readonly #usage = new UsageRecord();
  readonly #span: Span;
  /** What was used, once the runner has settled. */
  #used: JsonObject | null = null;

  constructor(received: ReceivedLease, world: SessionWorld) {
    const { envelope, leaseId, serverTimeMs = null } = received;
    const { task } = envelope;
    this.leaseId = leaseId;
    this.grantedAt = world.clock.monotonic();
    this.#world = world;
    this.#envelope = envelope;
    this.#token = envelope.access_token ?? '';
    this.#log = world.log.child({
      task_id: task.id,
      capability: task.capability,
      ...(task.job_id === null ? {} : { job_id: task.job_id }),
      ...(leaseId === null ? {} : { lease_id: leaseId }),
      ...(task.attempts === null ? {} : { attempt: task.attempts }),
    });
    this.#span = (world.tracer ?? NO_TRACES).startSpan('task attempt', {
      parent: envelope.traceparent ?? null,
      kind: 'consumer',
      attributes: {
        'millrace.task.id': task.id,
        'millrace.capability': task.capability,
        ...(task.job_id !== null && { 'millrace.job.id': task.job_id }),
        ...(task.attempts !== null && { 'millrace.attempt': task.attempts }),
      },
    });
    // A listener per transfer and whatever the runner adds: any number of them is no leak.
    setMaxListeners(0, this.#controller.signal);
    this.#folder = world.workspace.taskFolder(task.id);
    this.#taskLog =
      leaseId === null ? null : (world.logs?.open(() => this.#heartbeats.lease, this.#log) ?? null);
    this.#heartbeats = new Heartbeats({
      dms: world.dms,
      lease: { taskId: task.id, leaseId },
      // Newer services may name it in the task alone.
      leaseExpiresAt: envelope.lease_expires_at ?? task.lease_expires_at,
      serverTimeMs,
      settings: world.heartbeat,
      leaseIds: world.features.leaseIds,
      logged: this.#taskLog !== null,
      clock: world.clock,
      random: world.random,
      log: this.#log,
      onReply: (reply) => this.#merge(reply),
      onAbort: (abort) => {
        if (abort.reason === 'lease_lost') this.#leaseLost = true;
        this.abort(abort);
      },
    });
  }

  get state(): SessionState {
    return this.#state;
  }

  get taskId(): string {
    return this.#envelope.task.id;
  }

  /**
   * Runs the task. When the task is one the server started with the lease, the runner is entered before this returns.
   * Called once; never rejects.
   */
  async run(): Promise<SessionEnding> {
    let ending: SessionEnding;
    try {
      ending = await this.#live();
    } catch (error) {
      // A bug of ours or of a port; the engine and the other sessions go on, and this lease lapses.
      this.#log.error('session broke, the lease will lapse', {
        error: describeError(error),
        ...(error instanceof Error && error.stack !== undefined ? { stack: error.stack } : {}),
      });
      this.abort(new TaskAbort('lease_lost', 'the session broke'));
      ending = { kind: 'abandoned', delivery: null };
    }
    for (const timer of this.#timers) timer.cancel();
    this.#taskLog?.end();
    await this.#heartbeats.close();
    await this.#folder.remove();
    this.#enter('ended');
    const { kind } = ending;
    this.#span.end({
      attributes: { 'millrace.ending': kind },
      ...(kind !== 'completed' && kind !== 'canceled' && kind !== 'skipped' && { error: kind }),
    });
    return ending;
  }

  /** Ends the work. The first reason wins; without effect once the runner has settled. */
  abort(abort: TaskAbort): void {
    if (this.#verdict !== null) return;
    this.#verdict = { kind: 'aborted', abort };
    this.#log.info('stopping the task', { reason: abort.reason, message: abort.message });
    // A heartbeat before the work has nothing left to start.
    if (this.#state === 'starting') void this.#heartbeats.close();
    if (this.#state === 'running') {
      this.#enter('stopping');
      this.#watchStopping();
    }
    this.#controller.abort(abort);
  }

  /** Asks the dispatcher at once how the lease stands; what it answers takes effect by itself. True: the work goes on. */
  async check(): Promise<boolean> {
    // Failing is dealt with by the heartbeats.
    await this.#heartbeats.beat().catch(() => undefined);
    return this.#verdict === null;
  }

  async #live(): Promise<SessionEnding> {
    const { router, features } = this.#world;
    const { task } = this.#envelope;
    let route = router.pick(task);
    if (route === null) {
      return await this.#setupFailed(
        'start_session',
        `failed to initialise session: task capability ${task.capability} not in configured set ` +
          `[${router.capabilities.join(', ')}]`,
      );
    }
    if (this.#envelope.cancel || this.#verdict !== null) return await this.#skip();

    if (!(features.startOnLease && this.#envelope.status === 'running')) {
      this.#enter('starting');
      try {
        await this.#heartbeats.first();
      } catch (error) {
        if (this.#verdict === null) return await this.#setupFailed('initial_heartbeat', error);
      }
      if (this.#verdict !== null) return await this.#skip();
      route = router.pick(this.#envelope.task);
      if (route === null) return await this.#end('failed', noRunnerReport(this.#envelope));
    }

    let storage: SessionStorage;
    try {
      storage = this.#openStorage();
    } catch (error) {
      return await this.#setupFailed('build_ports', error);
    }
    return await this.#work(route, storage);
  }

  async #work(route: Route, storage: SessionStorage): Promise<SessionEnding> {
    const { clock, metrics, taskWallMs, abandoned } = this.#world;
    this.#enter('running');
    this.#timers.push(
      clock.setTimer(
        () =>
          this.abort(new TaskAbort('deadline', `wall time limit of ${taskWallMs} ms (taskWallMs) reached`)),
        taskWallMs,
      ),
    );
    this.#heartbeats.start();
    const settled = this.#perform(route, storage);
    const gaveUp = await abortedFirst(settled, abandoned);

    const verdict = this.#verdict;
    if (verdict === null) throw new MillraceError('internal', 'the runner settled without a verdict');
    // One that never settled is given up on.
    this.#try?.end(outcomeOf(verdict), errorOf(verdict));
    const wallMs = this.#runMs;
    await storage.close();
    const transferred = storage.transferred?.() ?? null;
    if (transferred !== null) metrics.recordTaskBytes?.(transferred.bytesIn, transferred.bytesOut);
    this.#used = this.#usage.report({ wallMs, transferred, verdict, taskWallMs });
    if (gaveUp) {
      this.#log.error('the runner never settled; its lease will lapse', { state: this.#state });
      return { kind: 'abandoned', delivery: null };
    }
    this.#enter('settled');
    for (const timer of this.#timers.splice(0)) timer.cancel();
    return await this.#judge(verdict, storage.artifacts());
  }

  /** Prepares the task and runs it as often as it takes; then there is a verdict. Never rejects. */
  async #perform(route: Route, storage: SessionStorage): Promise<void> {
    const { clock, random, router, taskWallMs, metrics } = this.#world;
    const { task: leased } = this.#envelope;
    let prepared;
    try {
      prepared = router.prepare(route, leased, taskWallMs);
    } catch (error) {
      this.#verdict ??= { kind: 'failed', error };
      return;
    }
    const { task, supervision } = prepared;
    await supervise({
      supervision,
      runId: task.name,
      taskId: leased.id,
      signal: this.#controller.signal,
      slots: router.slots,
      begin: (signal, number) => {
        if (number === 1) this.#log.debug('task started', { run_id: task.name });
        return this.#begin(task, route.type, storage, signal);
      },
      metrics: supervisionMetrics(metrics),
      clock,
      random,
      log: this.#log,
      emit: (event) => this.#event(event),
      decided: (verdict) => void (this.#verdict ??= verdict),
    });
  }

  /** Enters the runner, once. */
  #begin(task: BuiltTask, type: RunnerType, storage: SessionStorage, signal: AbortSignal): Try {
    const { clock, metrics } = this.#world;
    metrics.recordTaskStarted(type);
    const startedAt = clock.monotonic();
    const span = (this.#world.tracer ?? NO_TRACES).startSpan('run', {
      parent: this.#span.traceparent,
      attributes: { 'millrace.runner': type },
    });
    const context = this.#context(storage, type, span.traceparent, signal);
    const settled = (async () => task.run(context.value))();
    settled.catch((error: unknown) => {
      if (signal.aborted) {
        this.#log.debug('the runner rejected after its abort', { error: describeError(error) });
      }
    });
    const current: Try = {
      settled,
      end: (outcome, error) => {
        // It was given up on before.
        if (this.#try !== current) return;
        this.#try = null;
        const wallMs = clock.monotonic() - startedAt;
        this.#runMs += wallMs;
        metrics.recordTaskCompleted(type, outcome, wallMs);
        const trouble = runnerErrorKind({ kind: 'failed', error });
        if (trouble !== null) metrics.recordRunnerError(type, trouble);
        span.end(outcome === 'success' ? {} : { error: describeError(error, 500) });
        context.close();
      },
    };
    this.#try = current;
    return current;
  }

  async #judge(verdict: Verdict, artifacts: readonly ArtifactReport[]): Promise<SessionEnding> {
    const lease = this.#envelope;
    if (verdict.kind === 'completed') return await this.#end('completed', completeReport(lease, artifacts));
    if (verdict.kind === 'failed') {
      return await this.#end('failed', runnerFailedReport(lease, artifacts, verdict.error), verdict.error);
    }
    const { abort } = verdict;
    if (abort.reason === 'lease_lost') return await this.#end('lease_lost', null);
    if (abort.reason === 'canceled') {
      return await this.#end('canceled', { kind: 'release', reason: 'canceled' });
    }
    if (abort.reason === 'shutdown') {
      return await this.#end('released', { kind: 'release', reason: 'shutdown' });
    }
    return await this.#end('failed', runnerFailedReport(lease, artifacts, abort), abort);
  }

  /** Cancelled or stopped before any work. */
  async #skip(): Promise<SessionEnding> {
    const abort = this.#verdict?.kind === 'aborted' ? this.#verdict.abort : null;
    if (abort?.reason === 'lease_lost') return await this.#end('lease_lost', null);
    return abort?.reason === 'shutdown'
      ? await this.#end('released', { kind: 'release', reason: 'shutdown' })
      : await this.#end('skipped', { kind: 'release', reason: 'canceled' });
  }

  async #setupFailed(stage: SetupStage, error: unknown): Promise<SessionEnding> {
    return await this.#end('setup_failed', setupFailedReport(stage, error), error);
  }

  /** Sends the last words, then the report, and writes the one line about it. */
  async #end(kind: SessionEnding['kind'], plain: Report | null, error?: unknown): Promise<SessionEnding> {
    const { clock, random, dms, reports = dms, features, heartbeat, abandoned } = this.#world;
    const used = features.endingUsage === true ? this.#used : null;
    const report = plain === null || used === null ? plain : withUsage(plain, used);
    const canRelease = features.leaseIds;
    let delivery: Delivery | null = null;
    if (this.#state === 'settled' && report !== null) await this.#waitForContact();
    if (this.#state === 'settled' && (report?.kind !== 'release' || canRelease)) {
      const leftMs = this.#heartbeats.deadline(clock.monotonic()) - clock.monotonic();
      const limitMs = Math.min(FLUSH_LIMIT_MS, leftMs / 3);
      const [undelivered, missing = 0] = await Promise.all([
        this.#heartbeats.flush(limitMs),
        // Without a report the lease is lost, and with it the log.
        report === null ? 0 : this.#taskLog?.flush(limitMs),
      ]);
      if (undelivered > 0) this.#log.warn('events were not delivered', { events: undelivered });
      if (missing > 0) this.#log.warn('the end of the log was not delivered', { bytes: missing });
    }
    this.#enter('reporting');
    // What a heartbeat learned meanwhile: the task has another owner, and nothing of ours is to reach it.
    const lost = this.#leaseLost;
    if (report !== null && !lost && (report.kind !== 'release' || canRelease)) {
      const startedAt = clock.monotonic();
      delivery = await deliver(report, {
        dms: reports,
        lease: this.#heartbeats.lease,
        deadline: () => this.#heartbeats.deadline(startedAt),
        // A lease that is over has nothing to give back.
        graceMs: report.kind === 'release' ? 0 : (heartbeat.contactGraceMs ?? 0),
        requestTimeoutMs: heartbeat.requestTimeoutMs,
        clock,
        random,
        log: this.#log,
        signal: abandoned,
      });
    }
    const ending: SessionEnding = { kind: lost ? 'lease_lost' : kind, delivery };
    this.#logEnding(ending, report, error);
    return ending;
  }

  /**
   * When the dispatcher is out of reach and the lease over, until one of the two has changed, but not so long that the report
   * gets no try of its own: what the task still had to say is then heard before its ending, after which nothing is.
   */
  async #waitForContact(): Promise<void> {
    const { clock, abandoned } = this.#world;
    const now = clock.monotonic();
    const lastChance = this.#heartbeats.lastChance(now);
    if (this.#heartbeats.deadline(now) > now || lastChance <= now) return;
    using limit = timeoutSignal(clock, (lastChance - now) / 2, () => undefined);
    const over = AbortSignal.any([limit.signal, abandoned]);
    await abortedFirst(
      this.#heartbeats.beat().catch(() => undefined),
      over,
    );
  }

  #logEnding(ending: SessionEnding, report: Report | null, error: unknown): void {
    const fields: JsonObject = {
      ending: ending.kind,
      delivery: ending.delivery,
      duration_ms: Math.round(this.#world.clock.monotonic() - this.grantedAt),
    };
    if (error !== undefined) fields['error'] = describeError(error);
    if (report?.kind === 'release' && ending.delivery === null && ending.kind !== 'lease_lost') {
      fields['note'] = 'the dispatcher offers no release, so the lease is left to lapse';
    }
    const fine = ending.kind === 'completed' || ending.kind === 'canceled' || ending.kind === 'released';
    if (fine && (ending.delivery === 'accepted' || ending.delivery === null))
      this.#log.info('task ended', fields);
    else this.#log.warn('task ended', fields);
  }

  #openStorage(): SessionStorage {
    const { domain_id, domain_server_url } = this.#envelope;
    if (domain_server_url === null) {
      throw new MillraceError('failed_precondition', 'lease missing domain_server_url');
    }
    if (domain_id === null) throw new MillraceError('failed_precondition', 'lease missing domain_id');
    if (this.#token === '') this.#log.warn('the lease has no access token; storage is asked without one');
    return this.#world.openStorage({
      lease: this.#envelope,
      leaseId: this.leaseId,
      domain: () => ({
        id: this.#envelope.domain_id ?? domain_id,
        serverUrl: this.#envelope.domain_server_url ?? domain_server_url,
      }),
      token: () => this.#token,
      refreshToken: () => this.#heartbeats.beat(),
      folder: this.#folder,
      ...(this.#world.tracer !== undefined && { trace: this.#trace }),
      signal: this.#controller.signal,
      log: this.#log,
    });
  }

  /** Adds to the task's events, and to its log where that is kept. */
  #event(value: Json): void {
    this.#heartbeats.event(value);
    this.#taskLog?.event(value);
  }

  readonly #trace: NonNullable<StorageRequest['trace']> = (name, attributes) =>
    (this.#world.tracer ?? NO_TRACES).startSpan(name, {
      parent: this.#span.traceparent,
      kind: 'client',
      attributes,
    });

  #context(
    storage: SessionStorage,
    type: RunnerType,
    traceparent: string | null,
    signal: AbortSignal,
  ): { readonly value: TaskContext; close(): void } {
    let open = true;
    const heartbeats = this.#heartbeats;
    const taskLog = this.#taskLog;
    // Where the ending cannot carry it, what an operator's sandbox did is worth an event; a thread's CPU time is not.
    const tellsUsage =
      this.#world.features.endingUsage !== true && (type === 'subprocess' || type === 'container');
    const say = (what: string, how: () => void): Promise<void> => {
      if (open) {
        how();
        return Promise.resolve();
      }
      const refused = Promise.reject<void>(
        new MillraceError(
          'failed_precondition',
          `${what}: the task has ended, its context cannot be used any more`,
        ),
      );
      // Mostly called without waiting; that must not end the process.
      refused.catch(() => undefined);
      return refused;
    };
    const ctrl: ControlPlane = {
      isCancelled: () => Promise.resolve(signal.aborted),
      progress: (value: Json) => say('progress', () => heartbeats.progress(value)),
      logEvent: (value: Json) => say('logEvent', () => this.#event(value)),
      usage: (value: JsonObject) =>
        say('usage', () => {
          this.#usage.take(value);
          if (tellsUsage) this.#event({ kind: 'usage', ...value });
        }),
    };
    const log = taskLogger(this.#log, (level, message, fields) => {
      if (!open) return;
      if (taskLog !== null) taskLog.line(level, message, fields);
      // The line's own come first, and no field of the same name replaces them.
      else heartbeats.event(Object.assign({ level, message }, fields, { level, message }));
    });
    const value: TaskContext = Object.freeze({
      lease: traceparent === null ? this.#envelope : { ...this.#envelope, traceparent },
      input: storage.input,
      output: storage.output,
      ctrl: Object.freeze(ctrl),
      accessToken: Object.freeze({ get: () => this.#token }),
      signal,
      log,
    });
    return { value, close: () => void (open = false) };
  }

  /** What a heartbeat's answer says about the lease. Only the first one may change the task. */
  #merge(reply: HeartbeatReply): void {
    const before = this.#envelope;
    this.#token = reply.access_token ?? this.#token;
    const lease = {
      ...before,
      access_token: this.#token,
      access_token_expires_at: reply.access_token_expires_at ?? before.access_token_expires_at,
      lease_expires_at: reply.lease_expires_at ?? before.lease_expires_at,
      cancel: reply.cancel ?? before.cancel,
      status: reply.status ?? before.status,
      domain_id: reply.domain_id ?? before.domain_id,
      domain_server_url: reply.domain_server_url ?? before.domain_server_url,
    };
    const first = !this.#merged && this.#state === 'starting';
    this.#merged = true;
    this.#envelope = first ? { ...lease, task: mergeTask(before.task, reply) } : lease;
  }

  #watchStopping(): void {
    const since = this.#world.clock.monotonic();
    const arm = (): void => {
      this.#timers.push(
        this.#world.clock.setTimer(() => {
          this.#log.error('the runner does not stop; its slot stays taken', {
            stopping_ms: Math.round(this.#world.clock.monotonic() - since),
          });
          arm();
        }, STUCK_LOG_EVERY_MS),
      );
    };
    arm();
  }

  #enter(next: SessionState): void {
    if (!TRANSITIONS[this.#state].includes(next)) {
      throw new MillraceError('internal', `session: no way from ${this.#state} to ${next}`);
    }
    this.#state = next;
  }
}

function mergeTask(task: TaskSpec, reply: HeartbeatReply): TaskSpec {
  if (reply.task !== null) return reply.task;
  return {
    ...task,
    id: reply.task_id ?? task.id,
    job_id: reply.job_id ?? task.job_id,
    attempts: reply.attempts ?? task.attempts,
    max_attempts: reply.max_attempts ?? task.max_attempts,
    deps_remaining: reply.deps_remaining ?? task.deps_remaining,
  };
}

function errorOf(verdict: Verdict): unknown {
  if (verdict.kind === 'completed') return null;
  return verdict.kind === 'failed' ? verdict.error : verdict.abort;
}

function outcomeOf(verdict: Verdict): TaskOutcome {
  if (verdict.kind === 'completed') return 'success';
  if (isTimeout(errorOf(verdict))) return 'timeout';
  if (verdict.kind === 'failed') return 'failure';
  return verdict.abort.reason === 'limit' ? 'failure' : 'canceled';
}

/** Lines of the task's log, and debug lines of the node's own. */
function taskLogger(
  nodeLog: Logger,
  emit: (level: LogLevel, message: string, fields: JsonObject) => void,
  bound: JsonObject = {},
): Logger {
  const line =
    (level: LogLevel) =>
    (message: string, fields?: JsonObject): void => {
      const all = fields === undefined ? bound : { ...bound, ...fields };
      emit(level, message, all);
      nodeLog.debug(message, { ...all, task_log_level: level });
    };
  return Object.freeze({
    debug: line('debug'),
    info: line('info'),
    warn: line('warn'),
    error: line('error'),
    child: (fields: JsonObject) => taskLogger(nodeLog, emit, { ...bound, ...fields }),
  });
}

/** Resolves when `promise` does, with false; or when `signal` aborts, with true. */
function abortedFirst(promise: Promise<void>, signal: AbortSignal): Promise<boolean> {
  return new Promise((resolve, reject) => {
    const onAbort = (): void => resolve(true);
    if (signal.aborted) onAbort();
    signal.addEventListener('abort', onAbort, { once: true });
    promise.then(() => {
      signal.removeEventListener('abort', onAbort);
      resolve(false);
    }, reject);
  });
}
