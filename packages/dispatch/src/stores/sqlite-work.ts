/**
 * Jobs, tasks and leases in SQLite: the rules of `lifecycle.ts` as rows. Synchronous; the caller brings the transaction
 * and calls {@link Work.flush} before its commit and {@link Work.load} after a rollback.
 *
 * The parts: `sqlite-ledger.ts` knows where every job and task stands and keeps memory and rows together, with the help of
 * `sqlite-specs.ts` (what tasks were submitted with), `sqlite-queues.ts` (what may be leased), `sqlite-events.ts` and
 * `sqlite-receipts.ts` (what happened). The verbs change it: `sqlite-jobs.ts`, `sqlite-leasing.ts`, `sqlite-ending.ts`.
 *
 * How it is kept fast, with this process as the only writer:
 * - Held tasks, queues and how many tasks are ready in each are mirrored in memory, so a completion reads nothing and a
 *   lease request for which there is no work touches no table.
 * - A task has no row of its own before its first lease, and no index: its id is made from its job's, it waits in a range
 *   with its neighbours, and leases are watched in memory.
 * - Jobs, stages, events and endings touched by a transaction are written once at its end, however many tasks it moved, and
 *   what happens alike to neighbours is one row or one line.
 */
import { MillraceError } from '@millrace/runner';
import type {
  BusyNode,
  DomainStanding,
  JobDetail,
  JobEvent,
  JobRecord,
  JobSpec,
  NodeMode,
  TaskRecord,
} from '../records.ts';
import type {
  CompleteItem,
  DeadTasksQuery,
  FailItem,
  HeartbeatAnswer,
  HeartbeatItem,
  LeaseAnswer,
  LeaseRef,
  LeaseRequest,
  ListJobsQuery,
  NewJob,
  Outcome,
  QueueStanding,
  ReleaseItem,
  StoreChange,
  StoreStats,
} from '../store.ts';
import type { Resources } from '../resources.ts';
import type { Database } from './sqlite-database.ts';
import { Ending } from './sqlite-ending.ts';
import { Jobs } from './sqlite-jobs.ts';
import { Leasing } from './sqlite-leasing.ts';
import { Ledger } from './sqlite-ledger.ts';
import type { WorkOptions } from './sqlite-model.ts';
import type { Node } from './sqlite-nodes.ts';
import { Reports } from './sqlite-reports.ts';

export { SWEEP_TASKS } from './sqlite-ending.ts';
export type { WorkOptions } from './sqlite-model.ts';

type Ended = Outcome<{ readonly leaseId: string }>;

export class Work {
  readonly #database: Database;
  readonly #ledger: Ledger;
  readonly #jobs: Jobs;
  readonly #leasing: Leasing;
  readonly #ending: Ending;

  constructor(database: Database, options: WorkOptions) {
    this.#database = database;
    this.#ledger = new Ledger(database, options);
    this.#ending = new Ending(this.#ledger);
    const reports = new Reports(database, this.#ledger);
    this.#jobs = new Jobs(database, this.#ledger, this.#ending, reports);
    this.#leasing = new Leasing(this.#ledger, this.#ending, reports);
  }

  /** Reads the committed state. Before the first use and after every rollback. */
  load(): void {
    this.#ledger.load();
    this.#ending.clear();
  }

  /** Writes what the transaction has left to write. */
  flush(): void {
    this.#ledger.flush();
  }

  /** What the committed transaction changed. */
  takeChanges(): StoreChange[] {
    const { runnable, jobIds, leaseIds } = this.#ledger.takeNotes();
    const changes: StoreChange[] = jobIds.map((jobId) => ({ kind: 'job', jobId }));
    if (leaseIds.length > 0) changes.push({ kind: 'cancel', leaseIds });
    if (runnable) changes.push({ kind: 'runnable' });
    return changes;
  }

  /** Whether the transaction under way has made tasks runnable. */
  get madeRunnable(): boolean {
    return this.#ledger.madeRunnable;
  }

  activeLeases(nodeId: string): number {
    return this.#ledger.heldBy(nodeId)?.size ?? 0;
  }

  /** What the node's tasks take of what it has. */
  inUse(node: Node): Resources {
    return this.#ledger.room(node)?.usage.taken() ?? {};
  }

  submit(jobs: readonly NewJob[]): Outcome<{ readonly jobId: string; readonly created: boolean }>[] {
    return this.#each(jobs, (job) => this.#jobs.submit(job));
  }

  cancelJob(id: string): JobRecord | null {
    this.#ledger.begin();
    return this.#jobs.cancel(id);
  }

  /** @throws MillraceError `failed_precondition` while a task of it is leased */
  deleteJob(id: string): boolean {
    this.#ledger.begin();
    return this.#jobs.delete(id);
  }

  /** @see Jobs.prune */
  pruneJobs(after: number, endedForMs: number): ReturnType<Jobs['prune']> {
    this.#ledger.begin();
    return this.#jobs.prune(after, this.#ledger.now - endedForMs);
  }

  submission(id: string): JobSpec | null {
    return this.#jobs.submission(id);
  }

  /** @see Jobs.deadTasks */
  deadTasks(
    query: DeadTasksQuery,
    before: number | null,
    span: number,
    limit: number,
  ): ReturnType<Jobs['deadTasks']> {
    return this.#jobs.deadTasks(query, before, span, limit);
  }

  getJob(id: string): JobDetail | null {
    return this.#jobs.get(id);
  }

  knowsJob(id: string): boolean {
    return this.#ledger.jobById(id) !== null;
  }

  getTask(id: string): TaskRecord | null {
    return this.#jobs.getTask(id);
  }

  /** @see Jobs.list */
  listJobs(
    query: ListJobsQuery,
    before: number | null,
    span: number,
    limit: number,
  ): ReturnType<Jobs['list']> {
    return this.#jobs.list(query, before, span, limit);
  }

  events(jobId: string, after: number, limit: number): JobEvent[] | null {
    return this.#jobs.events(jobId, after, limit);
  }

  lease(requests: readonly LeaseRequest[]): Outcome<LeaseAnswer>[] {
    return this.#each(requests, (request) => this.#leasing.lease(request));
  }

  heartbeat(items: readonly HeartbeatItem[]): Outcome<HeartbeatAnswer>[] {
    return this.#each(items, (item) => this.#leasing.heartbeat(item));
  }

  complete(items: readonly CompleteItem[]): Ended[] {
    return this.#each(items, (item) => this.#ending.complete(item));
  }

  fail(items: readonly FailItem[]): Ended[] {
    return this.#each(items, (item) => this.#ending.fail(item));
  }

  release(items: readonly ReleaseItem[]): Ended[] {
    return this.#each(items, (item) => this.#ending.release(item));
  }

  canceledLeases(nodeId: string, leaseIds: readonly string[]): string[] {
    return this.#leasing.canceled(nodeId, leaseIds);
  }

  /** @see Leasing.check */
  checkLease(ref: LeaseRef, domainId: string): string {
    this.#ledger.begin();
    return this.#leasing.check(ref, domainId);
  }

  /** @see Leasing.keep */
  keepLease(ref: LeaseRef): void {
    this.#ledger.begin();
    this.#leasing.keep(ref);
  }

  /** @see Leasing.attemptOf */
  leased(ref: LeaseRef): { readonly jobId: string; readonly attempt: number } {
    this.#ledger.begin();
    return this.#leasing.attemptOf(ref);
  }

  /** @see Leasing.standing */
  standing(taskId: string, countAhead: boolean): ReturnType<Leasing['standing']> {
    this.#ledger.begin();
    return this.#leasing.standing(taskId, countAhead);
  }

  /** One transaction's worth of the sweep; `more`: there may be more due. */
  sweep(): { readonly rescued: number; readonly more: boolean } {
    this.#ledger.begin();
    return this.#ending.sweep();
  }

  nextWake(): number | null {
    return this.#ledger.nextWake();
  }

  busyNodes(mode: NodeMode | 'all'): BusyNode[] {
    return this.#leasing.busyNodes(mode);
  }

  queues(): QueueStanding[] {
    this.#ledger.begin();
    const { queues, lanes, now } = this.#ledger;
    const standings: QueueStanding[] = [];
    for (const queue of queues.all()) {
      const { capability, filters, mode, organizationId, resources } = queue;
      const { ready, limited, blocked, delayed, held } = queue;
      if (ready + blocked + delayed + held === 0) continue;
      const since = lanes.oldestOf(queue);
      standings.push({
        capability,
        filters,
        mode,
        organizationId,
        ...(resources !== null && { resources }),
        ready,
        limited,
        blocked,
        delayed,
        held,
        oldestReadyAgeMs: since === null ? null : Math.max(0, now - since),
      });
    }
    return standings;
  }

  /** @throws MillraceError `invalid_argument` */
  setWeight(domainId: string, weight: number): void {
    this.#ledger.domains.setWeight(domainId, weight);
  }

  domains(): DomainStanding[] {
    return this.#ledger.domainStandings();
  }

  stats(): StoreStats {
    this.#ledger.begin();
    const { totals, queues, lanes, now } = this.#ledger;
    let oldest: number | null = null;
    for (const queue of queues.all()) {
      const since = queue.ready === 0 ? null : lanes.oldestOf(queue);
      if (since !== null) oldest = Math.min(oldest ?? since, since);
    }
    return {
      tasks: { ...totals.tasks },
      jobs: { ...totals.jobs },
      oldestRunnableAgeMs: oldest === null ? null : Math.max(0, now - oldest),
    };
  }

  /** Each item of a batch on its own: its errors are its answer. An error that `work` returns was meant to have effects. */
  #each<I, T>(items: readonly I[], work: (item: I) => T | MillraceError): Outcome<T>[] {
    this.#ledger.begin();
    return items.map((item) => {
      const mark = this.#database.writes;
      try {
        const value = work(item);
        return MillraceError.is(value) ? { ok: false, error: value } : { ok: true, value };
      } catch (error) {
        // Thrown half way, it must not pass as a plain refusal: the transaction has to go.
        if (!MillraceError.is(error)) throw error;
        if (this.#database.writes !== mark) {
          throw new MillraceError('internal', `refused after writing: ${error.message}`, { cause: error });
        }
        return { ok: false, error };
      }
    });
  }
}
