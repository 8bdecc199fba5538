/**
 * The dispatcher's metrics, on a registry of its own so that several dispatchers in one process do not mix. The
 * library stays behind this face: prom-client has been handed over, and its successor needs a newer Node.
 */
import { monitorEventLoopDelay, type IntervalHistogram } from 'node:perf_hooks';
import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import { JOB_STATUSES, TASK_STATUSES, type AttemptOutcome } from './records.ts';
import type { Store } from './store.ts';

export interface Metrics extends Disposable {
  leasesGranted(count: number): void;
  /** Attempts that ended, as acknowledged to the node or found by the sweeper. */
  ended(outcome: AttemptOutcome, count?: number): void;
  /** `route` is the pattern, never the path: labels come from a closed set. */
  request(method: string, route: string, status: number, seconds: number): void;
  /** Where to read how many long polls wait. */
  observeWaiting(read: () => number): void;
  /** The text format of Prometheus, with its content type. Reads the store's figures. */
  render(): Promise<{ readonly contentType: string; readonly text: string }>;
}

export function openMetrics(store: Store): Metrics {
  return new PromMetrics(store);
}

class PromMetrics implements Metrics {
  readonly #store: Store;
  readonly #registry = new Registry();
  readonly #tasks: Gauge;
  readonly #jobs: Gauge;
  readonly #oldest: Gauge;
  readonly #leases: Counter;
  /** Counted here and handed over when read: the library looks labels up for every count, and completions come by the batch. */
  readonly #endings: Record<AttemptOutcome, number> = {
    completed: 0,
    failed: 0,
    released: 0,
    expired: 0,
    canceled: 0,
  };
  readonly #requests: Counter;
  readonly #durations: Histogram;
  readonly #loopDelay: IntervalHistogram;
  #waiting: () => number = () => 0;

  constructor(store: Store) {
    this.#store = store;
    const registers = [this.#registry];
    this.#tasks = new Gauge({
      name: 'millrace_tasks',
      help: 'Tasks by status.',
      labelNames: ['status'],
      registers,
    });
    this.#jobs = new Gauge({
      name: 'millrace_jobs',
      help: 'Jobs by status.',
      labelNames: ['status'],
      registers,
    });
    this.#oldest = new Gauge({
      name: 'millrace_oldest_runnable_age_seconds',
      help: 'How long the oldest runnable task has waited; 0 when none waits.',
      registers,
    });
    this.#leases = new Counter({
      name: 'millrace_leases_granted_total',
      help: 'Leases given to nodes.',
      registers,
    });
    const endings = this.#endings;
    this.#registry.registerMetric(
      new Counter({
        name: 'millrace_attempts_ended_total',
        help: 'Attempts ended, by outcome.',
        labelNames: ['outcome'],
        registers: [],
        collect() {
          this.reset();
          // All of them, also at 0: the first report of an outcome must not be its first appearance, rate() would miss it.
          for (const [outcome, count] of Object.entries(endings)) this.inc({ outcome }, count);
        },
      }),
    );
    this.#requests = new Counter({
      name: 'millrace_http_requests_total',
      help: 'Requests answered, by method, route and status.',
      labelNames: ['method', 'route', 'status'],
      registers,
    });
    this.#durations = new Histogram({
      name: 'millrace_http_request_duration_seconds',
      help: 'Time to answer, long polls and streams included, by route.',
      labelNames: ['route'],
      buckets: [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60],
      registers,
    });
    this.#read('millrace_lease_waiters', 'Long polls waiting for work.', () => this.#waiting());
    // By hand and not collectDefaultMetrics, whose observers nothing ever stops.
    this.#loopDelay = monitorEventLoopDelay({ resolution: 20 });
    this.#loopDelay.enable();
    this.#processMetrics();
  }

  leasesGranted(count: number): void {
    this.#leases.inc(count);
  }

  ended(outcome: AttemptOutcome, count = 1): void {
    this.#endings[outcome] += count;
  }

  request(method: string, route: string, status: number, seconds: number): void {
    this.#requests.inc({ method, route, status });
    this.#durations.observe({ route }, seconds);
  }

  observeWaiting(read: () => number): void {
    this.#waiting = read;
  }

  async render(): Promise<{ readonly contentType: string; readonly text: string }> {
    const stats = await this.#store.stats();
    for (const status of TASK_STATUSES) this.#tasks.set({ status }, stats.tasks[status]);
    for (const status of JOB_STATUSES) this.#jobs.set({ status }, stats.jobs[status]);
    this.#oldest.set((stats.oldestRunnableAgeMs ?? 0) / 1000);
    return { contentType: this.#registry.contentType, text: await this.#registry.metrics() };
  }

  [Symbol.dispose](): void {
    this.#loopDelay.disable();
  }

  #processMetrics(): void {
    this.#read('millrace_process_resident_memory_bytes', 'Resident memory.', () => process.memoryUsage.rss());
    this.#read(
      'millrace_process_heap_used_bytes',
      'JavaScript heap in use.',
      () => process.memoryUsage().heapUsed,
    );
    this.#read('millrace_process_uptime_seconds', 'Since the process started.', () => process.uptime());
    this.#read('millrace_event_loop_delay_p99_seconds', 'Since the last scrape.', () => {
      const p99 = this.#loopDelay.percentile(99) / 1e9;
      this.#loopDelay.reset();
      return p99;
    });
    let counted = 0;
    this.#registry.registerMetric(
      new Counter({
        name: 'millrace_process_cpu_seconds_total',
        help: 'User and system CPU time.',
        registers: [],
        collect() {
          const { user, system } = process.cpuUsage();
          const seconds = (user + system) / 1e6;
          this.inc(seconds - counted);
          counted = seconds;
        },
      }),
    );
  }

  /** A gauge that is read when the metrics are. */
  #read(name: string, help: string, value: () => number): void {
    this.#registry.registerMetric(
      new Gauge({
        name,
        help,
        registers: [],
        collect() {
          this.set(value());
        },
      }),
    );
  }
}
