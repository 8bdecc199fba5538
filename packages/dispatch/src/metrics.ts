/**
 * The dispatcher's metrics, on a registry of its own so that several dispatchers in one process do not mix. The
 * library stays behind this face: prom-client has been handed over, and its successor needs a newer Node.
 */
import { monitorEventLoopDelay, type IntervalHistogram } from 'node:perf_hooks';
import type { Clock } from '@millrace/runner';
import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import { boundedCapabilities, queueReport, type CapabilityEntry } from './queue-report.ts';
import { JOB_STATUSES, TASK_STATUSES, type AttemptOutcome, type ScheduleOutcome } from './records.ts';
import type { Store } from './store.ts';
import { VERSION } from './version.ts';

export interface Metrics extends Disposable {
  leasesGranted(count: number): void;
  /** Attempts that ended, as acknowledged to the node or found by the sweeper. */
  ended(outcome: AttemptOutcome, count?: number): void;
  /** Heartbeats accepted. */
  heartbeats(count: number): void;
  /** Bytes of data items, `in` from clients or `out` to them. */
  dataBytes(direction: 'in' | 'out', count: number): void;
  /** Jobs removed because they ended long ago, and the data items that went with them. */
  pruned(jobs: number, items: number): void;
  /** A tick of a schedule ended. */
  ticked(outcome: ScheduleOutcome): void;
  /** Each is followed by one {@link requestEnded}. */
  requestStarted(): void;
  requestEnded(): void;
  /** `route` is the pattern, never the path: labels come from a closed set. */
  request(method: string, route: string, status: number, seconds: number): void;
  /** Where to read how many long polls wait. */
  observeWaiting(read: () => number): void;
  /** The text format of Prometheus, with its content type. Reads the store's figures. */
  render(): Promise<{ readonly contentType: string; readonly text: string }>;
}

/** @param more text that is added to {@link Metrics.render} */
export function openMetrics(store: Store, clock: Clock, more?: () => Promise<string>): Metrics {
  return new PromMetrics(store, clock, more);
}

/** On PostgreSQL counting what waits is a look at every task that has not ended: a second for a million. */
const QUEUES_EASE = 20;
const CHEAP_MS = 50;

class PromMetrics implements Metrics {
  readonly #store: Store;
  readonly #clock: Clock;
  readonly #more: (() => Promise<string>) | undefined;
  readonly #registry = new Registry();
  readonly #tasks: Gauge;
  readonly #jobs: Gauge;
  readonly #oldest: Gauge;
  readonly #queued: Gauge;
  readonly #queueAge: Gauge;
  readonly #queueNodes: Gauge;
  readonly #queueSlots: Gauge;
  readonly #queueFreeSlots: Gauge;
  readonly #leases: Counter;
  /** Counted here and handed over when read: the library looks labels up for every count, and completions come by the batch. */
  readonly #endings: Record<AttemptOutcome, number> = {
    completed: 0,
    failed: 0,
    released: 0,
    expired: 0,
    canceled: 0,
  };
  readonly #heartbeats: Counter;
  readonly #dataBytes: Counter;
  readonly #prunedJobs: Counter;
  readonly #prunedItems: Counter;
  readonly #ticks: Counter;
  readonly #requests: Counter;
  readonly #durations: Histogram;
  readonly #loopDelay: IntervalHistogram;
  #waiting: () => number = () => 0;
  #inFlight = 0;
  /** Monotonic. */
  #queuesFreshUntil = 0;

  constructor(store: Store, clock: Clock, more: (() => Promise<string>) | undefined) {
    this.#store = store;
    this.#clock = clock;
    this.#more = more;
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
    const byCapability = (name: string, help: string, more: readonly string[] = []): Gauge =>
      new Gauge({ name, help, labelNames: ['capability', ...more], registers });
    this.#queued = byCapability(
      'millrace_queue_tasks',
      'Tasks that have not ended, by capability and whether they are ready, blocked by a stage, delayed or running.',
      ['state'],
    );
    this.#queueAge = byCapability(
      'millrace_queue_oldest_age_seconds',
      'How long the oldest task that is ready has waited; 0 when none waits.',
    );
    this.#queueNodes = byCapability(
      'millrace_queue_nodes',
      'Nodes that offer the capability and are not away.',
    );
    this.#queueSlots = byCapability('millrace_queue_slots', 'Slots of the nodes that offer the capability.');
    this.#queueFreeSlots = byCapability('millrace_queue_free_slots', 'Those of them that are free.');
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
    this.#heartbeats = new Counter({
      name: 'millrace_heartbeats_total',
      help: 'Heartbeats accepted.',
      registers,
    });
    this.#dataBytes = new Counter({
      name: 'millrace_data_bytes_total',
      help: 'Bytes of inputs and artifacts, in from clients and out to them.',
      labelNames: ['direction'],
      registers,
    });
    this.#prunedJobs = new Counter({
      name: 'millrace_jobs_pruned_total',
      help: 'Jobs removed because they ended longer ago than jobs are kept.',
      registers,
    });
    this.#prunedItems = new Counter({
      name: 'millrace_artifacts_pruned_total',
      help: 'Data items removed along with the jobs that made them.',
      registers,
    });
    this.#ticks = new Counter({
      name: 'millrace_schedule_ticks_total',
      help: 'Ticks of schedules: a job submitted, skipped since the one before is not over, missed, or refused.',
      labelNames: ['outcome'],
      registers,
    });
    for (const outcome of ['submitted', 'skipped', 'missed', 'failed'] satisfies ScheduleOutcome[]) {
      this.#ticks.inc({ outcome }, 0);
    }
    for (const direction of ['in', 'out']) this.#dataBytes.inc({ direction }, 0);
    new Gauge({
      name: 'millrace_build_info',
      help: 'Always 1; which version runs.',
      labelNames: ['version', 'component'],
      registers,
    }).set({ version: VERSION, component: 'dispatcher' }, 1);
    this.#read(
      'millrace_http_requests_in_flight',
      'Requests under way, long polls and streams included.',
      () => this.#inFlight,
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

  heartbeats(count: number): void {
    this.#heartbeats.inc(count);
  }

  dataBytes(direction: 'in' | 'out', count: number): void {
    if (count > 0) this.#dataBytes.inc({ direction }, count);
  }

  pruned(jobs: number, items: number): void {
    this.#prunedJobs.inc(jobs);
    this.#prunedItems.inc(items);
  }

  ticked(outcome: ScheduleOutcome): void {
    this.#ticks.inc({ outcome });
  }

  requestStarted(): void {
    this.#inFlight += 1;
  }

  requestEnded(): void {
    this.#inFlight -= 1;
  }

  request(method: string, route: string, status: number, seconds: number): void {
    this.#requests.inc({ method, route, status });
    this.#durations.observe({ route }, seconds);
  }

  observeWaiting(read: () => number): void {
    this.#waiting = read;
  }

  async render(): Promise<{ readonly contentType: string; readonly text: string }> {
    const [stats] = await Promise.all([this.#store.stats(), this.#readQueues()]);
    for (const status of TASK_STATUSES) this.#tasks.set({ status }, stats.tasks[status]);
    for (const status of JOB_STATUSES) this.#jobs.set({ status }, stats.jobs[status]);
    this.#oldest.set((stats.oldestRunnableAgeMs ?? 0) / 1000);
    const own = await this.#registry.metrics();
    const text = this.#more === undefined ? own : `${own}\n${await this.#more()}`;
    return { contentType: this.#registry.contentType, text };
  }

  /** Looks again when it was read so long ago that this takes a small part of the time, however much it costs. */
  async #readQueues(): Promise<void> {
    const began = this.#clock.monotonic();
    if (began < this.#queuesFreshUntil) return;
    const [queues, nodes] = await Promise.all([this.#store.queues(), this.#store.listNodes()]);
    this.#setQueues(boundedCapabilities(queueReport(queues, nodes, this.#clock.now()), nodes));
    const now = this.#clock.monotonic();
    const took = now - began;
    this.#queuesFreshUntil = took < CHEAP_MS ? 0 : now + QUEUES_EASE * took;
  }

  #setQueues(entries: readonly CapabilityEntry[]): void {
    for (const gauge of [
      this.#queued,
      this.#queueAge,
      this.#queueNodes,
      this.#queueSlots,
      this.#queueFreeSlots,
    ]) {
      gauge.reset();
    }
    for (const { capability, oldest_age_ms, nodes, slots, free_slots, ...work } of entries) {
      for (const state of ['ready', 'blocked', 'delayed', 'running'] as const) {
        this.#queued.set({ capability, state }, work[state]);
      }
      this.#queueAge.set({ capability }, (oldest_age_ms ?? 0) / 1000);
      this.#queueNodes.set({ capability }, nodes);
      this.#queueSlots.set({ capability }, slots);
      this.#queueFreeSlots.set({ capability }, free_slots);
    }
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
