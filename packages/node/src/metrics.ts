/** What the node counts, recorded where the fact happens. Label values come from closed sets: registered capabilities. */

/**
 * How an attempt ended, seen from the runner: `canceled` whenever somebody else's decision ended it (the requestor,
 * the node stopping, a lease lost), `timeout` for its time limit.
 */
export type TaskOutcome = 'success' | 'failure' | 'canceled' | 'timeout';

/** Where measurements go. Called from the engine's thread; must not throw and must return at once. */
export interface MetricsBackend {
  /** A runner was entered. Each start is followed by exactly one completion. */
  recordTaskStarted(capability: string): void;
  /** `durationMs`: from the runner being entered to its settling. */
  recordTaskCompleted(capability: string, outcome: TaskOutcome, durationMs: number): void;
}

const NOOP: MetricsBackend = {
  recordTaskStarted: () => undefined,
  recordTaskCompleted: () => undefined,
};

/** Measures nothing. */
export function noopMetrics(): MetricsBackend {
  return NOOP;
}

/** A backend that can be scraped. */
export interface PrometheusMetrics extends MetricsBackend {
  /** The content type of {@link exposition}. */
  readonly contentType: string;
  /** The current values in Prometheus's text format. */
  exposition(): Promise<string>;
}

const BUCKETS_SECONDS = [
  0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600,
];

/**
 * Counts into a registry of its own, together with the process's figures (memory, CPU, event loop lag):
 * `millrace_tasks_started_total`, `millrace_tasks_completed_total{outcome}`, `millrace_task_duration_seconds{outcome}`,
 * `millrace_tasks_active`, each by `capability`. The library is loaded here, so a node without metrics does not pay
 * for it.
 */
export async function prometheusMetrics(): Promise<PrometheusMetrics> {
  const { Counter, Gauge, Histogram, Registry, collectDefaultMetrics } = await import('prom-client');
  const registry = new Registry();
  collectDefaultMetrics({ register: registry });
  const registers = [registry];
  const started = new Counter({
    name: 'millrace_tasks_started_total',
    help: 'Attempts whose runner was entered.',
    labelNames: ['capability'],
    registers,
  });
  const completed = new Counter({
    name: 'millrace_tasks_completed_total',
    help: 'Attempts whose runner has settled, by outcome.',
    labelNames: ['capability', 'outcome'],
    registers,
  });
  const duration = new Histogram({
    name: 'millrace_task_duration_seconds',
    help: 'From the runner being entered to its settling.',
    labelNames: ['capability', 'outcome'],
    buckets: BUCKETS_SECONDS,
    registers,
  });
  const active = new Gauge({
    name: 'millrace_tasks_active',
    help: 'Attempts whose runner has been entered and has not settled.',
    labelNames: ['capability'],
    registers,
  });
  return {
    contentType: registry.contentType,
    exposition: () => registry.metrics(),
    recordTaskStarted(capability) {
      started.inc({ capability });
      active.inc({ capability });
    },
    recordTaskCompleted(capability, outcome, durationMs) {
      completed.inc({ capability, outcome });
      duration.observe({ capability, outcome }, durationMs / 1000);
      active.dec({ capability });
    },
  };
}
