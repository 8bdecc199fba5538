/**
 * One task within one lease: its lane, its tries, and the pauses between them.
 *
 *     admitted? ── no ──▶ refused
 *       │ yes
 *       ▼
 *     try, numbered from 1, one after the other
 *       success           always: again, after the interval or at once; else done
 *       fatal, ended      done
 *       failure, timeout  never, or retries used up: done; else again, after a backoff
 *
 * The first cause that ends a try is its cause, and the next one begins only when the last has settled. A success
 * begins a new streak of failures; tries are never counted anew. Whatever waits (for the lane, for a backoff) ends at once when the
 * task is ended, and with `shutdown` when the node stops: another node may go on sooner than this one.
 */
import { setMaxListeners } from 'node:events';
import {
  MillraceError,
  TaskAbort,
  describeError,
  type Clock,
  type JsonObject,
  type Logger,
  type Random,
} from '@millrace/runner';
import type { TaskPhase } from '@millrace/runner/model';
import type { SupervisionMetrics, TaskOutcome } from '../metrics.ts';
import { isTimeout } from '../usage.ts';
import { isFinal } from '../report.ts';
import type { Verdict } from '../usage.ts';
import { backoffDelayMs } from './backoff.ts';
import { supervisionEvent, type SupervisionEvent, type SupervisionEventName } from './events.ts';
import type { Supervision } from './policy.ts';
import { isRefusal, type LaneHold, type Refusal, type Slots } from './slots.ts';

export interface SuperviseOptions {
  readonly supervision: Supervision;
  readonly runId: string;
  readonly taskId: string;
  /** Ends everything. Its reason is a {@link TaskAbort}, and its verdict is decided by who aborts it. */
  readonly signal: AbortSignal;
  readonly slots: Slots;
  /** Begins a try. */
  readonly begin: (signal: AbortSignal, number: number) => Try;
  readonly metrics: SupervisionMetrics;
  readonly clock: Clock;
  readonly random: Random;
  readonly log: Logger;
  /** Where events go besides the log; only for tasks that asked for something. May throw. */
  readonly emit: (event: SupervisionEvent) => void;
  /**
   * Called once with the verdict, as soon as it stands: in the very moment in which the last try's runner settles. What comes
   * later, though it be before the promise resolves, came too late.
   */
  readonly decided: (verdict: Verdict) => void;
}

/** A try under way. */
export interface Try {
  /** How the runner settles. */
  readonly settled: Promise<void>;
  /** Called once it has. */
  end(outcome: TaskOutcome, error: unknown): void;
}

type TryEnding =
  | { readonly kind: 'succeeded' }
  | { readonly kind: 'failed'; readonly error: unknown }
  | { readonly kind: 'timed_out'; readonly abort: TaskAbort }
  /** By the task's own signal, or for another task's sake. */
  | { readonly kind: 'canceled'; readonly error: unknown };

interface Pause {
  /** Null: none was asked for. */
  readonly delayMs: number | null;
  readonly source: 'success' | 'failure';
  /** Why the last try failed. */
  readonly reason: string | null;
}

/** Of reasons in events; the ending has the whole one. */
const MAX_REASON_BYTES = 500;

/** Runs a task to its verdict. The first try begins before this returns, unless the task waits for its lane. Never rejects. */
export function supervise(options: SuperviseOptions): Promise<Verdict> {
  return new SupervisedTask(options).run();
}

class SupervisedTask {
  readonly #options: SuperviseOptions;
  /** What ends tries and pauses: the task's signal, unless another task may end it too. */
  readonly #halt: AbortSignal;
  readonly #halter: AbortController | null;
  /** Whether it asked for anything: else nothing is told. */
  readonly #told: boolean;
  /** With what another task ended this one. */
  #replaced: TaskAbort | null = null;
  #tries = 0;
  /** Of the current streak. */
  #failures = 0;
  #decided = false;
  #listenerFailed = false;

  constructor(options: SuperviseOptions) {
    const { lane, restart, timeoutMs } = options.supervision;
    this.#options = options;
    this.#halter = lane === null ? null : new AbortController();
    this.#halt = this.#halter?.signal ?? options.signal;
    this.#told = lane !== null || restart.type !== 'never' || timeoutMs !== null;
    if (this.#halter !== null) setMaxListeners(0, this.#halt);
  }

  async run(): Promise<Verdict> {
    const { signal, supervision } = this.#options;
    if (supervision.lane === null) return await this.#tryOn();
    const onAbort = (): void => this.#halter?.abort(signal.reason);
    if (signal.aborted) onAbort();
    else signal.addEventListener('abort', onAbort, { once: true });
    const hold = await this.#admit(supervision.lane);
    try {
      return isRefusal(hold) ? this.#finish(this.#refused(hold)) : await this.#tryOn();
    } finally {
      signal.removeEventListener('abort', onAbort);
      if (!isRefusal(hold)) hold.release();
    }
  }

  async #admit(lane: string): Promise<LaneHold | Refusal> {
    const { slots, supervision, taskId, signal, metrics } = this.#options;
    metrics.submitted();
    this.#tell('submitted', { slot: lane, admission: supervision.admission });
    const outcome = await slots.acquire({
      lane,
      admission: supervision.admission,
      queueLimit: supervision.queueLimit,
      taskId,
      signal,
      stop: (by) => {
        this.#replaced = new TaskAbort('canceled', `task ${by} replaces this one in slot ${lane}`);
        this.#halter?.abort(this.#replaced);
      },
    });
    if (!isRefusal(outcome)) this.#tell('admitted', { slot: lane });
    return outcome;
  }

  /** Nothing was run. */
  #refused({ reason, by, message }: Refusal): Verdict {
    const { metrics, signal } = this.#options;
    metrics.rejected(reason);
    this.#tell('rejected', { reason, ...(by !== null && { by }) });
    if (reason === 'removed') return { kind: 'aborted', abort: abortOf(signal) };
    if (reason === 'shutting_down') return { kind: 'aborted', abort: new TaskAbort('shutdown', message) };
    if (reason === 'superseded') return { kind: 'failed', error: replaced(message) };
    return {
      kind: 'failed',
      error:
        reason === 'slot_busy'
          ? new MillraceError('unavailable', message, { details: { reason } })
          : new MillraceError('resource_exhausted', message, { details: { reason, limit: 'queueLimit' } }),
    };
  }

  /** Tries until there is nothing more to try. */
  async #tryOn(): Promise<Verdict> {
    const { supervision, slots, clock, metrics } = this.#options;
    for (;;) {
      if (this.#halt.aborted) return this.#finish(this.#halted());
      const startedAt = clock.monotonic();
      const step = await this.#try();
      if ('verdict' in step) return step.verdict;
      // What is still to be done is another node's from here on.
      if (slots.closing.aborted) return this.#finish(shutdown());
      const { delayMs, source, reason } = step;
      // Without a pause that was asked for, tries are that far apart that they make no busy loop.
      const pauseMs = delayMs ?? supervision.floorMs - (clock.monotonic() - startedAt);
      if (delayMs !== null) {
        metrics.backoffScheduled(source, delayMs);
        this.#tell('backoff_scheduled', {
          try: this.#tries,
          delay_ms: Math.round(delayMs),
          source,
          ...(reason !== null && { reason }),
        });
      }
      if (pauseMs > 0 && !(await this.#pause(pauseMs))) {
        return this.#finish(this.#halt.aborted ? this.#halted() : shutdown());
      }
    }
  }

  /** What comes after a try; null: nothing. */
  #next(ending: TryEnding): Pause | null {
    const { supervision, random } = this.#options;
    const { restart, backoff, maxRetries, floorMs } = supervision;
    if (ending.kind === 'canceled') return null;
    if (ending.kind === 'succeeded') {
      this.#failures = 0;
      if (restart.type !== 'always') return null;
      const { intervalMs = 0 } = restart;
      return {
        delayMs: intervalMs === 0 ? null : Math.max(intervalMs, floorMs),
        source: 'success',
        reason: null,
      };
    }
    if (restart.type === 'never' || (ending.kind === 'failed' && isFatal(ending.error))) return null;
    if (maxRetries !== null && this.#failures >= maxRetries) return null;
    const delayMs = backoffDelayMs(backoff, this.#failures, random, floorMs);
    this.#failures += 1;
    return { delayMs, source: 'failure', reason: describeError(causeOf(ending), MAX_REASON_BYTES) };
  }

  async #try(): Promise<{ readonly verdict: Verdict } | Pause> {
    const { begin, metrics, clock } = this.#options;
    this.#tries += 1;
    metrics.attemptStarting(this.#tries);
    this.#tell('starting', { try: this.#tries });
    using limit = this.#timeLimit();
    const startedAt = clock.monotonic();
    const running = begin(limit.signal, this.#tries);
    const settle = (ending: TryEnding): { readonly verdict: Verdict } | Pause => {
      const durationMs = clock.monotonic() - startedAt;
      const again = this.#next(ending);
      const verdict = again === null ? this.#last(ending) : null;
      // First of all: nothing that comes from here on changes it.
      if (verdict !== null) this.#decide(verdict);
      metrics.attemptEnded();
      if (ending.kind === 'timed_out') metrics.attemptTimedOut();
      running.end(outcomeOf(ending), ending.kind === 'succeeded' ? null : causeOf(ending));
      this.#tell(ending.kind, {
        try: this.#tries,
        duration_ms: Math.round(durationMs),
        ...(ending.kind === 'failed' && {
          reason: describeError(ending.error, MAX_REASON_BYTES),
          ...exitCodeOf(ending.error),
        }),
        ...(ending.kind === 'timed_out' && { timeout_ms: this.#options.supervision.timeoutMs }),
      });
      return again ?? { verdict: this.#finish(verdict!) };
    };
    return await running.settled.then(
      () => settle(this.#cause(limit.signal) ?? { kind: 'succeeded' }),
      (error: unknown) => settle(this.#cause(limit.signal) ?? { kind: 'failed', error }),
    );
  }

  /** The signal of one try, which its time limit aborts too. */
  #timeLimit(): { readonly signal: AbortSignal } & Disposable {
    const halt = this.#halt;
    const { timeoutMs } = this.#options.supervision;
    if (timeoutMs === null) return { signal: halt, [Symbol.dispose]: () => undefined };
    const controller = new AbortController();
    setMaxListeners(0, controller.signal);
    const onHalt = (): void => controller.abort(halt.reason);
    const timer = this.#options.clock.setTimer(
      () =>
        controller.abort(
          new TaskAbort(
            'deadline',
            `try ${this.#tries} reached its timeout of ${timeoutMs} ms (supervision.timeout)`,
          ),
        ),
      timeoutMs,
    );
    halt.addEventListener('abort', onHalt, { once: true });
    return {
      signal: controller.signal,
      [Symbol.dispose]: () => {
        timer.cancel();
        halt.removeEventListener('abort', onHalt);
      },
    };
  }

  /** Why a try was to end; null: it ended by itself. */
  #cause(signal: AbortSignal): TryEnding | null {
    if (!signal.aborted) return null;
    if (this.#halt.aborted && signal.reason === this.#halt.reason) {
      return { kind: 'canceled', error: signal.reason };
    }
    return { kind: 'timed_out', abort: abortOf(signal) };
  }

  /** False: it was cut short, by the end of the task or of the node. */
  #pause(ms: number): Promise<boolean> {
    const { clock, slots } = this.#options;
    // Not AbortSignal.any: the node's signal would remember each of them, and a service pauses a million times.
    const signals = [this.#halt, slots.closing];
    return new Promise((resolve) => {
      const end = (whole: boolean): void => {
        timer.cancel();
        for (const signal of signals) signal.removeEventListener('abort', cut);
        resolve(whole);
      };
      const cut = (): void => end(false);
      const timer = clock.setTimer(() => end(true), ms);
      for (const signal of signals) signal.addEventListener('abort', cut, { once: true });
    });
  }

  /** The verdict of the last try, saying how many there were. */
  #last(ending: TryEnding): Verdict {
    if (ending.kind === 'succeeded') return { kind: 'completed' };
    if (ending.kind === 'canceled') return this.#halted();
    const error = causeOf(ending);
    // Errors of other classes are left as they are: others recognise them.
    if (this.#tries === 1 || !(MillraceError.is(error) || TaskAbort.is(error))) {
      return { kind: 'failed', error };
    }
    const { maxRetries } = this.#options.supervision;
    const why = maxRetries !== null && this.#failures >= maxRetries ? ` (maxRetries ${maxRetries})` : '';
    const message = `after ${this.#tries} tries${why}: ${error.message}`;
    if (TaskAbort.is(error)) return { kind: 'failed', error: new TaskAbort(error.reason, message) };
    const { code, cause, details, retryable } = error;
    return { kind: 'failed', error: new MillraceError(code, message, { cause, details, retryable }) };
  }

  #halted(): Verdict {
    const abort = abortOf(this.#halt);
    // Ended for another task's sake, unless the task itself was ended first.
    return this.#replaced && abort === this.#replaced
      ? { kind: 'failed', error: replaced(abort.message) }
      : { kind: 'aborted', abort };
  }

  #decide(verdict: Verdict): void {
    if (this.#decided) return;
    this.#decided = true;
    this.#options.decided(verdict);
  }

  /** The last word, counted and told. */
  #finish(verdict: Verdict): Verdict {
    this.#decide(verdict);
    const phase = phaseOf(verdict);
    if (phase !== 'canceled' && this.#tries > 0) {
      const reason = phase === 'succeeded' ? 'completed' : phase === 'failed' ? 'fatal' : 'exhausted';
      this.#options.metrics.terminal(reason, this.#tries);
    }
    this.#tell('finished', { phase, tries: this.#tries });
    return verdict;
  }

  #tell(event: SupervisionEventName, fields: JsonObject): void {
    if (!this.#told) return;
    const { emit, runId, clock, log, metrics } = this.#options;
    const told = supervisionEvent(event, runId, clock.now(), fields);
    log.debug('supervision', { event, run_id: runId, ...fields });
    try {
      emit(told);
    } catch (error) {
      metrics.subscriberPanicked();
      if (!this.#listenerFailed)
        log.warn('a listener of supervision failed', { error: describeError(error) });
      this.#listenerFailed = true;
    }
  }
}

/** Whether trying again here would end the same way. */
export function isFatal(error: unknown): boolean {
  if (isFinal(error)) return true;
  if (TaskAbort.is(error)) return error.reason === 'shutdown' || error.reason === 'canceled';
  if (!MillraceError.is(error) || error.retryable) return false;
  return (
    error.code === 'permission_denied' ||
    error.code === 'failed_precondition' ||
    error.details['ending'] === 'spawn_failed'
  );
}

function phaseOf(verdict: Verdict): TaskPhase {
  if (verdict.kind === 'completed') return 'succeeded';
  if (verdict.kind === 'aborted') return verdict.abort.reason === 'deadline' ? 'timeout' : 'canceled';
  const { error } = verdict;
  if (TaskAbort.is(error) && error.reason === 'deadline') return 'timeout';
  if (MillraceError.is(error) && error.code === 'canceled') return 'canceled';
  return isFatal(error) ? 'failed' : 'exhausted';
}

function outcomeOf(ending: TryEnding): TaskOutcome {
  if (ending.kind === 'succeeded') return 'success';
  if (ending.kind === 'timed_out' || isTimeout(ending.error)) return 'timeout';
  if (ending.kind === 'failed') return 'failure';
  return TaskAbort.is(ending.error) && ending.error.reason === 'limit' ? 'failure' : 'canceled';
}

function causeOf(ending: Exclude<TryEnding, { kind: 'succeeded' }>): unknown {
  return ending.kind === 'timed_out' ? ending.abort : ending.error;
}

function exitCodeOf(error: unknown): JsonObject {
  const code = MillraceError.is(error) ? error.details['exit_code'] : null;
  return typeof code === 'number' ? { exit_code: code } : {};
}

/** Another attempt would only replace the one that replaced it. */
function replaced(message: string): MillraceError {
  return new MillraceError('canceled', message, { details: { final: true, reason: 'replaced' } });
}

function shutdown(): Verdict {
  return { kind: 'aborted', abort: new TaskAbort('shutdown', 'the node is stopping') };
}

function abortOf(signal: AbortSignal): TaskAbort {
  return TaskAbort.is(signal.reason)
    ? signal.reason
    : new TaskAbort('canceled', describeError(signal.reason));
}
