/**
 * What the node counts, recorded where the fact happens. Label values come from closed sets, never from tasks: what a
 * stranger can submit must not make time series.
 */
import type { RunnerType } from '@millrace/runner';
import { TASK_PHASES, type TaskPhase } from '@millrace/runner/model';
import { ENGINE_VERSION } from './version.ts';

/**
 * How an attempt ended, seen from the runner: `canceled` whenever somebody else's decision ended it (the requestor,
 * the node stopping, a lease lost), `timeout` for its time limit.
 */
export type TaskOutcome = 'success' | 'failure' | 'canceled' | 'timeout';

/**
 * Trouble of the runner itself, beside the failure of the task that met it:
 *
 * - `cgroup_prepare_failed` the control group of a task could not be made
 * - `backend_config_failed` its sandbox or container could not be set up
 * - `spawn_failed` its program could not be started
 * - `module_load_failed` its module or compute could not be loaded
 */
export const RUNNER_ERROR_KINDS = [
  'cgroup_prepare_failed',
  'backend_config_failed',
  'spawn_failed',
  'module_load_failed',
] as const;

/** The phases of a supervised task, in the order they are shown. */
export { TASK_PHASES, type TaskPhase };

export type RunnerErrorKind = (typeof RUNNER_ERROR_KINDS)[number];

/** Where measurements go. Called from the engine's thread; must not throw and must return at once. */
export interface MetricsBackend {
  /** A runner was entered. Each start is followed by exactly one completion, whatever happens to the attempt. */
  recordTaskStarted(runnerType: RunnerType): void;
  /** `durationMs`: from the runner being entered to its settling, or to the node giving up on it. */
  recordTaskCompleted(runnerType: RunnerType, outcome: TaskOutcome, durationMs: number): void;
  /** Beside the completion of the attempt, not instead of it. */
  recordRunnerError(runnerType: RunnerType, errorKind: RunnerErrorKind): void;
  /** Where the supervision of attempts counts. Absent: nowhere. */
  readonly supervision?: SupervisionMetrics;
  /** How many tasks the node may run at once. Called when the engine starts. Absent: not of interest. */
  recordSlots?(slots: number): void;
  /** Bytes a task's storage ports moved, told once at its end. Absent: not of interest. */
  recordTaskBytes?(bytesIn: number, bytesOut: number): void;
}

/** Why a slot did not take a submission; the reference's words. */
export const REJECTION_REASONS = [
  'slot_full',
  'slot_busy',
  'superseded',
  'removed',
  'shutting_down',
  'add_failed',
  'remove_failed',
  'queue_failed',
  'recovery_failed',
  'bus_lagged',
  'controller_exited',
  'other',
  'unknown',
] as const;

export type RejectionReason = (typeof REJECTION_REASONS)[number];

/** What a supervisor counts: its tasks live through several attempts. As {@link MetricsBackend}: never throws, returns at once. */
export interface SupervisionMetrics {
  /** An attempt begins, counted from 1. */
  attemptStarting(attempt: number): void;
  /** The attempt that began last has ended, however it did. */
  attemptEnded(): void;
  /** The next attempt waits; `source`: what the last one came to. */
  backoffScheduled(source: 'failure' | 'success' | 'unknown', delayMs: number): void;
  /** An attempt ran into its time limit. */
  attemptTimedOut(): void;
  /** No further attempt comes. `attempts`: how many there were. */
  terminal(reason: 'completed' | 'exhausted' | 'fatal', attempts: number): void;
  /** A listener was too slow, and an event was dropped for it. */
  subscriberOverflow(): void;
  /** A listener threw. */
  subscriberPanicked(): void;
  /** Something was submitted to a slot. */
  submitted(): void;
  /** A slot did not take it. */
  rejected(reason: RejectionReason): void;
  /** Where to read, at each scrape, how many tasks are in each phase. The last caller counts. */
  observePhases(read: () => Readonly<Partial<Record<TaskPhase, number>>>): void;
}

const NOOP_SUPERVISION: SupervisionMetrics = {
  attemptStarting: () => undefined,
  attemptEnded: () => undefined,
  backoffScheduled: () => undefined,
  attemptTimedOut: () => undefined,
  terminal: () => undefined,
  subscriberOverflow: () => undefined,
  subscriberPanicked: () => undefined,
  submitted: () => undefined,
  rejected: () => undefined,
  observePhases: () => undefined,
};

const NOOP: MetricsBackend = {
  recordTaskStarted: () => undefined,
  recordTaskCompleted: () => undefined,
  recordRunnerError: () => undefined,
};

/** Measures nothing. */
export function noopMetrics(): MetricsBackend {
  return NOOP;
}

/** The hooks of `metrics` for supervision, or ones that count nothing. */
export function supervisionMetrics(metrics: MetricsBackend): SupervisionMetrics {
  return metrics.supervision ?? NOOP_SUPERVISION;
}

/** A backend that can be scraped. */
export interface PrometheusMetrics extends MetricsBackend {
  readonly supervision: SupervisionMetrics;
  /** The content type of {@link exposition}. */
  readonly contentType: string;
  /** The current values in Prometheus's text format. */
  exposition(): Promise<string>;
}

export interface PrometheusOptions {
  /** Upper bounds of the durations' buckets, seconds, rising. Default {@link DURATION_BUCKETS_SECONDS}. */
  readonly bucketsSeconds?: readonly number[];
  /**
   * Also what is about the process: its memory, CPU, event loop, and `millrace_build_info`. Default true; false where they
   * stand on one page with a dispatcher's, which has its own.
   */
  readonly processMetrics?: boolean;
}

export const DURATION_BUCKETS_SECONDS: readonly number[] = [
  0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600,
];

const ATTEMPT_BUCKETS = [1, 2, 3, 5, 10, 20, 50];

/**
 * Counts into a registry of its own; `docs/metrics.md` lists the names. The library is loaded here, so a node without
 * metrics does not pay for it.
 *
 * @throws RangeError when the buckets do not rise
 */
export async function prometheusMetrics(options: PrometheusOptions = {}): Promise<PrometheusMetrics> {
  const { bucketsSeconds = DURATION_BUCKETS_SECONDS, processMetrics = true } = options;
  if (!bucketsSeconds.every((bound, at) => bound > (bucketsSeconds[at - 1] ?? 0))) {
    throw new RangeError(
      `bucketsSeconds must be positive and rise, got ${JSON.stringify(bucketsSeconds)}; give e.g. [0.1, 1, 10]`,
    );
  }
  const { Counter, Gauge, Histogram, Registry, collectDefaultMetrics } = await import('prom-client');
  const registry = new Registry();
  if (processMetrics) collectDefaultMetrics({ register: registry });
  const registers = [registry];
  const buckets = [...bucketsSeconds];
  const counter = <L extends string>(name: string, help: string, labelNames: readonly L[] = []) =>
    new Counter({ name, help, labelNames, registers });
  const gauge = <L extends string>(name: string, help: string, labelNames: readonly L[] = []) =>
    new Gauge({ name, help, labelNames, registers });
  const seconds = <L extends string>(name: string, help: string, labelNames: readonly L[] = []) =>
    new Histogram({ name, help, labelNames, buckets, registers });

  if (processMetrics) {
    gauge('millrace_build_info', 'Always 1; which version runs.', ['version', 'component']).set(
      { version: ENGINE_VERSION, component: 'node' },
      1,
    );
  }
  const started = counter('millrace_runner_tasks_started_total', 'Attempts whose runner was entered.', [
    'runner',
  ]);
  const completed = counter('millrace_runner_tasks_completed_total', 'Attempts that ended, by outcome.', [
    'runner',
    'outcome',
  ]);
  const duration = seconds(
    'millrace_runner_task_duration_seconds',
    'From the runner being entered to its end.',
    ['runner', 'outcome'],
  );
  const errors = counter(
    'millrace_runner_errors_total',
    'Trouble of the runner itself, beside the failure of the task that met it.',
    ['runner', 'error'],
  );
  const running = gauge(
    'millrace_runner_tasks_in_flight',
    'Attempts whose runner was entered and has not ended.',
    ['runner'],
  );
  const slots = gauge('millrace_node_slots', 'Tasks the node runs at once.');
  const bytes = counter('millrace_node_bytes_total', 'Bytes of inputs read and artifacts written.', [
    'direction',
  ]);
  // From the start: the first task's bytes must not be the series' first appearance, rate() would miss them.
  for (const direction of ['in', 'out']) bytes.inc({ direction }, 0);

  const inFlight = gauge('millrace_sv_tasks_in_flight', 'Supervised attempts that run.');
  const restarts = counter('millrace_sv_task_restarts_total', 'Supervised attempts after the first.');
  const backoffs = counter('millrace_sv_task_backoff_count_total', 'Pauses before a further attempt.', [
    'source',
  ]);
  const backoffSeconds = seconds('millrace_sv_task_backoff_duration_seconds', 'How long they are.');
  const terminals = counter('millrace_sv_task_terminal_total', 'Tasks that get no further attempt.', [
    'reason',
  ]);
  const attempts = new Histogram({
    name: 'millrace_sv_attempts_to_finalize',
    help: 'How many attempts they had.',
    labelNames: ['outcome'],
    buckets: ATTEMPT_BUCKETS,
    registers,
  });
  const timeouts = counter('millrace_sv_task_timeouts_total', 'Attempts that ran into their time limit.');
  const overflows = counter(
    'millrace_sv_subscriber_overflow_total',
    'Events dropped for listeners that were too slow.',
  );
  const panics = counter('millrace_sv_subscriber_panicked_total', 'Listeners that threw.');
  let phases: () => Readonly<Partial<Record<TaskPhase, number>>> = () => ({});
  registry.registerMetric(
    new Gauge({
      name: 'millrace_sv_tasks_by_phase',
      help: 'Supervised tasks by phase.',
      labelNames: ['phase'],
      registers: [],
      collect() {
        const counts = phases();
        for (const phase of TASK_PHASES) this.set({ phase }, counts[phase] ?? 0);
      },
    }),
  );
  const submissions = counter('millrace_ctrl_submissions_total', 'Submissions to slots.');
  const rejections = counter('millrace_ctrl_rejections_total', 'Submissions that slots did not take.', [
    'reason',
  ]);
  // Label values of small closed sets likewise.
  for (const source of ['failure', 'success', 'unknown']) backoffs.inc({ source }, 0);
  for (const reason of ['completed', 'exhausted', 'fatal']) terminals.inc({ reason }, 0);
  for (const reason of REJECTION_REASONS) rejections.inc({ reason }, 0);
  let supervised = 0;

  return {
    contentType: registry.contentType,
    exposition: () => registry.metrics(),
    recordTaskStarted(runner) {
      started.inc({ runner });
      running.inc({ runner });
    },
    recordTaskCompleted(runner, outcome, durationMs) {
      completed.inc({ runner, outcome });
      duration.observe({ runner, outcome }, durationMs / 1000);
      running.dec({ runner });
    },
    recordRunnerError: (runner, error) => errors.inc({ runner, error }),
    recordSlots: (count) => slots.set(count),
    recordTaskBytes(bytesIn, bytesOut) {
      bytes.inc({ direction: 'in' }, bytesIn);
      bytes.inc({ direction: 'out' }, bytesOut);
    },
    supervision: {
      attemptStarting(attempt) {
        supervised += 1;
        inFlight.set(supervised);
        if (attempt > 1) restarts.inc();
      },
      attemptEnded() {
        supervised = Math.max(0, supervised - 1);
        inFlight.set(supervised);
      },
      backoffScheduled(source, delayMs) {
        backoffs.inc({ source });
        backoffSeconds.observe(delayMs / 1000);
      },
      attemptTimedOut: () => timeouts.inc(),
      terminal(reason, count) {
        terminals.inc({ reason });
        attempts.observe({ outcome: reason }, count);
      },
      subscriberOverflow: () => overflows.inc(),
      subscriberPanicked: () => panics.inc(),
      submitted: () => submissions.inc(),
      rejected: (reason) => rejections.inc({ reason }),
      observePhases: (read) => void (phases = read),
    },
  };
}
