/**
 * Jobs, tasks and leases in SQLite: the rules of `lifecycle.ts` as rows. Synchronous; the caller brings the transaction
 * and calls {@link Work.flush} before its commit and {@link Work.load} after a rollback.
 *
 * How it is kept fast, with this process as the only writer:
 * - Held tasks, queues and how many tasks are ready in each are mirrored in memory, so a completion reads nothing and a
 *   lease request for which there is no work touches no table.
 * - Jobs, stages and events touched by a transaction are written once at its end, however many of their tasks it moved.
 * - Rows that are only added are written many to a statement.
 *
 * Invariants: a task is in `#held` exactly while its state is leased or running; `Queue.ready` is the number of its
 * tasks in state ready; job counts and `#totals` equal what counting rows would give. {@link Work.load} restores all of
 * it from the tables.
 */
import { createHash } from 'node:crypto';
import { MillraceError, truncateUtf8 } from '@millrace/runner';
import type { Clock, Json, JsonObject, Random } from '@millrace/runner';
import { JOB_LIMITS, parseStageReference } from '../job-spec.ts';
import { backoffMs, isFinal, isHeld, jobStatus, judge, taskStatus, wakeAt } from '../lifecycle.ts';
import type { Backoff, Ending, TaskState } from '../lifecycle.ts';
import { JOB_STATUSES, TASK_STATUSES } from '../records.ts';
import type {
  AttemptOutcome,
  BusyNode,
  JobDetail,
  JobEvent,
  JobRecord,
  JobSpec,
  JobStatus,
  NodeMode,
  ReceiptRecord,
  TaskRecord,
  TaskStatus,
  TasksSummary,
} from '../records.ts';
import type {
  CompleteItem,
  FailItem,
  GrantedLease,
  HeartbeatAnswer,
  HeartbeatItem,
  LeaseAnswer,
  LeaseRef,
  LeaseRequest,
  ListJobsQuery,
  NewJob,
  Outcome,
  ReleaseItem,
  StoreChange,
  StoreStats,
} from '../store.ts';
import { match } from './matching.ts';
import type { Demand } from './matching.ts';
import { BulkInsert } from './sqlite-database.ts';
import type { Database, Row, Statement } from './sqlite-database.ts';
import type { Node } from './sqlite-nodes.ts';
import { StageOutputs } from './stage-inputs.ts';
import type { StageOutput } from './stage-inputs.ts';
import { isoTime, isoTimeOrNull } from './time.ts';

/** What a task was submitted with. */
interface Spec {
  readonly label: string;
  readonly stage: string;
  readonly inputs_cids: readonly string[];
  readonly outputs_prefix: string | null;
  readonly meta: Json;
}

interface Task {
  readonly seq: number;
  readonly id: string;
  readonly jobSeq: number;
  /** 0: a stage without edges. */
  readonly stage: number;
  readonly queueId: number;
  readonly priority: number;
  readonly maxAttempts: number;
  readonly deadlineAt: number | null;
  state: TaskState;
  attempts: number;
  nodeFaults: number;
  drains: number;
  leaseId: string | null;
  nodeId: string | null;
  leasedAt: number | null;
  leaseExpiresAt: number | null;
  lastHeartbeatAt: number | null;
  notBefore: number | null;
  cancelRequestedAt: number | null;
  updatedAt: number;
  reason: string | null;
  /** Read when needed. */
  spec: Spec | null;
  /** What heartbeats brought, as stored; read when needed. */
  report: Report | null;
}

interface Report {
  /** JSON. */
  progress: string;
  /** JSON, the newest last. */
  readonly events: string[];
}

interface Job {
  readonly seq: number;
  readonly id: string;
  readonly domainId: string;
  readonly organizationId: string | null;
  readonly priority: number;
  readonly createdAt: number;
  readonly deadlineAt: number | null;
  readonly firstTask: number;
  readonly taskCount: number;
  status: JobStatus;
  updatedAt: number;
  cancelRequestedAt: number | null;
  lastEvent: number;
  readonly counts: Record<TaskStatus, number>;
  /** Not in the table yet. */
  isNew: boolean;
  /** Not written yet, each as in the table; their times count from `eventsAt`. */
  readonly events: string[];
  eventsAt: number;
  /** Stages this transaction touched. */
  readonly stages: Map<number, Stage>;
  dirty: boolean;
}

interface Stage {
  readonly no: number;
  readonly firstTask: number;
  readonly lastTask: number;
  /** Tasks not completed. */
  remaining: number;
  /** Preceding stages not completed. */
  depsRemaining: number;
}

interface Queue extends Demand {
  readonly id: number;
  ready: number;
}

/** The queues a node may take from, found so far. */
interface Matches {
  readonly node: Node;
  /** Queues looked at. */
  seen: number;
  readonly preferred: Queue[];
  readonly other: Queue[];
}

export interface WorkOptions {
  readonly clock: Clock;
  readonly random: Random;
  readonly newId: () => string;
  readonly leaseTtlMs: number;
  readonly cancelGraceMs: number;
  readonly backoff: Backoff;
  /** Undefined: no such node. */
  readonly node: (id: string) => Node | undefined;
}

/** Jobs kept in memory between transactions. */
const CACHED_JOBS = 16_384;

/** Events per row of the event table, so that reading a page parses little more than the page. */
const EVENTS_PER_ROW = 256;

/** Events kept for a task's `meta.events`, and the bytes of JSON they may have together. */
const REPORTED_EVENTS = 20;
const REPORTED_EVENT_BYTES = 64 * 1024;

/** Ids that the `stage:` inputs of one stage may come to in all. */
const MAX_RESOLVED_PER_STAGE = 1_000_000;

/** Tasks one sweep transaction looks at. */
export const SWEEP_TASKS = 1024;

/** The reference bounds a reason likewise. */
const MAX_REASON_BYTES = 4096;

/** Events are stored by their position here: append only. */
const EVENT_KINDS = [
  'job.submitted',
  'job.running',
  'job.cancel_requested',
  'job.completed',
  'job.failed',
  'job.canceled',
  'task.runnable',
  'task.leased',
  'task.running',
  'task.progress',
  'task.log',
  'task.retry',
  'task.released',
  'task.expired',
  'task.completed',
  'task.failed',
  'task.canceled',
] as const;
type EventKind = (typeof EVENT_KINDS)[number];
const EVENT_CODES = Object.fromEntries(EVENT_KINDS.map((kind, code) => [kind, code])) as Record<
  EventKind,
  number
>;

const TASK_COLUMNS = `
  tasks.seq, tasks.id, tasks.job_seq, tasks.stage, queue_id, priority, max_attempts, deadline_at, state, attempts,
  node_faults, drains, lease_id, node_id, leased_at, lease_expires_at, last_heartbeat_at, not_before,
  cancel_requested_at, updated_at, reason`;

const JOB_COLUMNS = `
  jobs.seq, id, domain_id, organization_id, priority, created_at, deadline_at, first_task, task_count, status,
  updated_at, cancel_requested_at, last_event, queued, leased, running, completed, failed, canceled`;

export class Work {
  readonly #database: Database;
  readonly #options: WorkOptions;
  readonly #statements: ReturnType<typeof prepare>;
  readonly #newTasks: BulkInsert;
  readonly #newSpecs: BulkInsert;
  readonly #newAttempts: BulkInsert;
  readonly #newEvents: BulkInsert;
  readonly #newJobs: BulkInsert;
  readonly #newJobSpecs: BulkInsert;
  readonly #bulks: readonly BulkInsert[];

  /** The store's time during the current operation. */
  #now = 0;
  #nextJob = 1;
  #nextTask = 1;
  /** Held tasks by task id. */
  readonly #held = new Map<string, Task>();
  /** The same by the node that holds them. */
  readonly #heldBy = new Map<string, Set<Task>>();
  /** Completed tasks whose rows are still to be written, by one statement for all that completed at one time. */
  #completed: number[] = [];
  #completedAt = 0;
  readonly #queues: Queue[] = [];
  readonly #queueIds = new Map<string, Queue>();
  readonly #matches = new Map<string, Matches>();
  readonly #totals = { tasks: emptyTasks(), jobs: emptyJobs() };
  /** Jobs by number, the first read first; those of the current transaction are all here. */
  readonly #jobs = new Map<number, Job>();
  readonly #jobSeqs = new Map<string, number>();
  readonly #dirtyJobs: Job[] = [];

  #runnable = false;
  #canceledLeases: string[] = [];
  #changedJobs: string[] = [];

  constructor(database: Database, options: WorkOptions) {
    this.#database = database;
    this.#options = options;
    this.#statements = prepare(database);
    const bulk = (table: string, columns: string): BulkInsert =>
      new BulkInsert(database, table, columns.split(' '));
    this.#newTasks = bulk(
      'tasks',
      'seq id job_seq stage queue_id priority max_attempts deadline_at state wake_at attempts node_faults drains updated_at',
    );
    this.#newSpecs = bulk('task_specs', 'task_seq spec');
    this.#newAttempts = bulk(
      'attempts',
      'task_seq no lease_id node_id outcome outputs meta reason leased_at created_at',
    );
    this.#newEvents = bulk('events', 'job_seq last_seq count at body');
    this.#newJobs = bulk(
      'jobs',
      'seq id domain_id organization_id priority created_at deadline_at first_task task_count status updated_at cancel_requested_at last_event queued leased running completed failed canceled',
    );
    this.#newJobSpecs = bulk('job_specs', 'job_seq spec');
    this.#bulks = [
      this.#newJobs,
      this.#newJobSpecs,
      this.#newTasks,
      this.#newSpecs,
      this.#newAttempts,
      this.#newEvents,
    ];
  }

  /** Reads the committed state. Before the first use and after every rollback. */
  load(): void {
    const sql = this.#statements;
    for (const bulk of this.#bulks) bulk.clear();
    for (const map of [this.#held, this.#heldBy, this.#queueIds, this.#matches]) map.clear();
    this.#completed = [];
    this.#jobs.clear();
    this.#jobSeqs.clear();
    this.#dirtyJobs.length = 0;
    this.#takeNotes();
    this.#nextJob = Number(sql.lastJob.get()?.[0]) + 1;
    this.#nextTask = Number(sql.lastTask.get()?.[0]) + 1;
    this.#queues.length = 0;
    for (const [id, capability, filters, mode, organization] of sql.queues.all()) {
      this.#addQueue({
        id: id as number,
        capability: capability as string,
        filters: JSON.parse(filters as string) as Record<string, string>,
        mode: mode as NodeMode,
        organizationId: organization === '' ? null : (organization as string),
        ready: 0,
      });
    }
    for (const [id, ready] of sql.readyCounts.all()) this.#queue(id as number).ready = ready as number;
    for (const row of sql.heldTasks.all()) this.#hold(taskOf(row));
    const { tasks, jobs } = this.#totals;
    const sums = sql.taskTotals.get() ?? [];
    TASK_STATUSES.forEach((status, index) => (tasks[status] = Number(sums[index] ?? 0)));
    Object.assign(jobs, emptyJobs());
    for (const [status, count] of sql.jobTotals.all()) jobs[status as JobStatus] = count as number;
  }

  /** Writes what the transaction has left to write. */
  flush(): void {
    for (const job of this.#dirtyJobs) {
      job.dirty = false;
      this.#flushJob(job);
      this.#changedJobs.push(job.id);
    }
    this.#dirtyJobs.length = 0;
    this.#flushRows();
    for (const [seq, job] of this.#jobs) {
      if (this.#jobs.size <= CACHED_JOBS) break;
      this.#jobs.delete(seq);
      this.#jobSeqs.delete(job.id);
    }
  }

  /** What the committed transaction changed. */
  takeChanges(): StoreChange[] {
    const { runnable, jobIds, leaseIds } = this.#takeNotes();
    const changes: StoreChange[] = jobIds.map((jobId) => ({ kind: 'job', jobId }));
    if (leaseIds.length > 0) changes.push({ kind: 'cancel', leaseIds });
    if (runnable) changes.push({ kind: 'runnable' });
    return changes;
  }

  /** Whether the transaction under way has made tasks runnable. */
  get madeRunnable(): boolean {
    return this.#runnable;
  }

  activeLeases(nodeId: string): number {
    return this.#heldBy.get(nodeId)?.size ?? 0;
  }

  // ---- Jobs ---------------------------------------------------------------------------------------------------

  submit(jobs: readonly NewJob[]): Outcome<{ readonly jobId: string; readonly created: boolean }>[] {
    this.#begin();
    return jobs.map((job) => this.#each(() => this.#submitOne(job)));
  }

  #submitOne({ spec, organizationId, idempotencyKey, submitter }: NewJob): {
    jobId: string;
    created: boolean;
  } {
    const sql = this.#statements;
    let specHash = '';
    if (idempotencyKey !== null) {
      if (!/^[\x21-\x7e]{1,128}$/.test(idempotencyKey)) {
        throw new MillraceError(
          'invalid_argument',
          `the idempotency key must be 1 to 128 visible ASCII characters, got ${JSON.stringify(idempotencyKey.slice(0, 130))}`,
        );
      }
      specHash = createHash('sha256').update(JSON.stringify(spec)).digest('hex');
      const known = sql.submission.get(submitter, idempotencyKey);
      if (known) {
        const { id } = this.#job(known[1] as number);
        if (known[0] === specHash) return { jobId: id, created: false };
        throw new MillraceError(
          'already_exists',
          `idempotency key ${JSON.stringify(idempotencyKey)} was used for job ${id} with another spec; use a new key for a new job`,
        );
      }
    }

    const now = this.#now;
    const seq = this.#nextJob++;
    const firstTask = this.#nextTask;
    this.#nextTask += spec.tasks.length;
    const job: Job = {
      seq,
      id: this.#options.newId(),
      domainId: spec.domain_id,
      organizationId,
      priority: spec.priority,
      createdAt: now,
      deadlineAt: timeOf(spec.deadline_at),
      firstTask,
      taskCount: spec.tasks.length,
      status: 'pending',
      updatedAt: now,
      cancelRequestedAt: null,
      lastEvent: 0,
      counts: { ...emptyTasks(), queued: spec.tasks.length },
      isNew: true,
      events: [],
      eventsAt: 0,
      stages: new Map(),
      dirty: false,
    };
    const stages = this.#insertStages(job, spec);
    this.#cache(job);
    this.#totals.jobs.pending += 1;
    this.#totals.tasks.queued += spec.tasks.length;
    this.#emit(job, 'job.submitted', null, `{"tasks":${spec.tasks.length}}`);
    let previous: { readonly filters: object; readonly queue: Queue } | null = null;
    spec.tasks.forEach((task, index) => {
      const stage = stages.get(task.stage);
      const state: TaskState = (stage?.depsRemaining ?? 0) > 0 ? 'blocked' : 'ready';
      // Neighbours mostly make the same demands, and finding a queue means rendering its filters.
      if (
        previous?.queue.capability !== task.capability ||
        previous.queue.mode !== task.mode ||
        !sameFilters(previous.filters, task.capability_filters)
      ) {
        previous = { filters: task.capability_filters, queue: this.#queueFor(task, organizationId) };
      }
      const queue = previous.queue;
      const id = this.#options.newId();
      const deadlineAt = earlier(job.deadlineAt, timeOf(task.deadline_at));
      this.#newTasks.add(
        firstTask + index,
        id,
        seq,
        stage?.no ?? 0,
        queue.id,
        task.priority,
        task.max_attempts,
        deadlineAt,
        state,
        deadlineAt,
        0,
        0,
        0,
        now,
      );
      this.#newSpecs.add(firstTask + index, specText(task));
      if (state === 'ready') {
        queue.ready += 1;
        this.#runnable = true;
        this.#emit(job, 'task.runnable', firstTask + index);
      }
    });
    this.#newJobSpecs.add(
      seq,
      JSON.stringify({
        label: spec.label,
        meta: spec.meta,
        edges: spec.edges,
        capabilities: [...new Set(spec.tasks.map((task) => task.capability))],
      } satisfies JobText),
    );
    if (idempotencyKey !== null) sql.insertSubmission.run(submitter, idempotencyKey, specHash, seq);
    return { jobId: job.id, created: true };
  }

  /** The stages that edges name, by name. */
  #insertStages(job: Job, spec: JobSpec): Map<string, Stage> {
    const stages = new Map<string, Stage>();
    if (spec.edges.length === 0) return stages;
    const sizes = new Map<string, { first: number; last: number; count: number }>();
    spec.tasks.forEach(({ stage }, index) => {
      const seq = job.firstTask + index;
      const size = sizes.get(stage);
      if (size) {
        size.last = seq;
        size.count += 1;
      } else sizes.set(stage, { first: seq, last: seq, count: 1 });
    });
    const stageOf = (name: string): Stage => {
      let stage = stages.get(name);
      if (!stage) {
        const size = sizes.get(name) ?? { first: job.firstTask, last: job.firstTask - 1, count: 0 };
        stage = {
          no: stages.size + 1,
          firstTask: size.first,
          lastTask: size.last,
          remaining: size.count,
          depsRemaining: 0,
        };
        stages.set(name, stage);
      }
      return stage;
    };
    const edges = spec.edges.map(({ from, to }) => [stageOf(from), stageOf(to)] as const);
    for (const [from, to] of edges) {
      to.depsRemaining += 1;
      this.#statements.insertEdge.run(job.seq, from.no, to.no);
    }
    for (const [name, stage] of stages) {
      this.#statements.insertStage.run(
        job.seq,
        stage.no,
        name,
        stage.firstTask,
        stage.lastTask,
        stage.remaining,
        stage.depsRemaining,
      );
    }
    return stages;
  }

  cancelJob(id: string): JobRecord | null {
    this.#begin();
    this.#flushRows();
    const job = this.#jobById(id);
    if (!job) return null;
    // A job that is failing keeps that ending: the first reason wins.
    if (!isFinal(job.status) && job.cancelRequestedAt === null && job.counts.failed === 0) {
      job.cancelRequestedAt = this.#now;
      this.#emit(job, 'job.cancel_requested', null);
      this.#endRest(job, 'canceled by the requestor');
    }
    return this.#jobRecord(job, this.#jobText(job.seq));
  }

  deleteJob(id: string): boolean {
    this.#begin();
    this.#flushRows();
    const job = this.#jobById(id);
    if (!job) return false;
    const held = job.counts.leased + job.counts.running;
    if (held > 0) {
      throw new MillraceError(
        'failed_precondition',
        `job ${id} has ${held} leased task${held === 1 ? '' : 's'}; cancel it and delete it once it has ended`,
      );
    }
    const sql = this.#statements;
    const [first, last] = [job.firstTask, job.firstTask + job.taskCount - 1];
    for (const [queueId, ready] of sql.readyOfJob.all(first, last)) {
      this.#queue(queueId as number).ready -= ready as number;
    }
    for (const status of TASK_STATUSES) this.#totals.tasks[status] -= job.counts[status];
    this.#totals.jobs[job.status] -= 1;
    for (const statement of sql.deleteTasks) statement.run(first, last);
    for (const statement of sql.deleteJob) statement.run(job.seq);
    this.#jobs.delete(job.seq);
    this.#jobSeqs.delete(job.id);
    const dirty = this.#dirtyJobs.indexOf(job);
    if (dirty !== -1) this.#dirtyJobs.splice(dirty, 1);
    this.#changedJobs.push(id);
    return true;
  }

  getJob(id: string): JobDetail | null {
    const job = this.#jobById(id);
    if (!job) return null;
    const sql = this.#statements;
    const [first, last] = [job.firstTask, job.firstTask + job.taskCount - 1];
    const deps = new Map(
      sql.stageDeps.all(job.seq).map(([stage, left]) => [stage as number, left as number]),
    );
    const outputs = new Map<number, readonly string[]>();
    const ids = new Map<number, string>();
    const rows = sql.tasksOfJob.all(first, last);
    for (const row of rows) ids.set(row[0] as number, row[1] as string);
    const receipts = sql.attemptsOfTasks.all(first, last).map((row) => {
      const [seq] = row;
      const receipt = receiptOf(row, job.id, ids.get(seq as number) ?? '');
      if (receipt.outcome === 'completed') outputs.set(seq as number, receipt.outputs);
      return receipt;
    });
    return {
      job: this.#jobRecord(job, this.#jobText(job.seq)),
      tasks_summary: { ...job.counts },
      tasks: rows.map((row) => {
        const task = taskOf(row);
        task.spec = specOf(row[21]);
        const record = this.#taskRecord(task, job, deps.get(task.stage) ?? 0, outputs.get(task.seq) ?? []);
        return withReport(record, row[22] as string | null, row[23] as string | null);
      }),
      receipts: receipts.toSorted((a, b) =>
        a.created_at < b.created_at ? -1 : a.created_at > b.created_at ? 1 : 0,
      ),
    };
  }

  getTask(id: string): TaskRecord | null {
    const task = this.#taskById(id);
    if (!task) return null;
    const sql = this.#statements;
    const job = this.#job(task.jobSeq);
    const completed = sql.completion.get(task.seq);
    const deps = task.stage === 0 ? 0 : Number(sql.stage.get(job.seq, task.stage)?.[3] ?? 0);
    const outputs = completed ? (JSON.parse(String(completed[0])) as string[]) : [];
    const [progress, events] = sql.report.get(task.seq) ?? [null, null];
    return withReport(
      this.#taskRecord(task, job, deps, outputs),
      progress as string | null,
      events as string | null,
    );
  }

  /**
   * One stretch of the listing: the jobs from `before` (exclusive; null: the newest) down, at most `span` of them looked
   * at. `next` is where the following stretch begins, null at the end.
   */
  listJobs(
    query: ListJobsQuery,
    before: number | null,
    span: number,
    limit: number,
  ): { items: { job: JobRecord; tasks_summary: TasksSummary; seq: number }[]; next: number | null } {
    const top = before ?? this.#nextJob;
    const bottom = Math.max(1, top - span);
    const items: { job: JobRecord; tasks_summary: TasksSummary; seq: number }[] = [];
    for (const row of this.#statements.listJobs.all(top, bottom, query.domainId, query.status)) {
      const text = JSON.parse(String(row[19])) as JobText;
      if (!hasCapabilities(text.capabilities, query)) continue;
      const job = jobOf(row);
      items.push({ job: this.#jobRecord(job, text), tasks_summary: job.counts, seq: job.seq });
      if (items.length === limit) return { items, next: job.seq > 1 ? job.seq : null };
    }
    return { items, next: bottom > 1 ? bottom : null };
  }

  events(jobId: string, after: number, limit: number): JobEvent[] | null {
    const job = this.#jobById(jobId);
    if (!job) return null;
    const found: JobEvent[] = [];
    const ids = new Map<number, string>();
    let from = after;
    while (found.length < limit) {
      const row = this.#statements.eventRow.get(job.seq, from);
      if (!row) break;
      const [lastSeq, count, at, body] = row as [number, number, number, string];
      const firstSeq = lastSeq - count + 1;
      const lines = JSON.parse(body) as [number, number, number, JsonObject?][];
      lines.forEach(([ms, code, task, data], index) => {
        const seq = firstSeq + index;
        if (seq <= after || found.length >= limit) return;
        found.push({
          seq,
          at: isoTime(at + ms),
          kind: EVENT_KINDS[code] ?? 'unknown',
          task_id: task < 0 ? null : this.#taskId(job.firstTask + task, ids),
          data: data ?? {},
        });
      });
      from = lastSeq;
    }
    return found;
  }

  // ---- Leases -------------------------------------------------------------------------------------------------

  lease(requests: readonly LeaseRequest[]): Outcome<LeaseAnswer>[] {
    this.#begin();
    return requests.map((request) => this.#each(() => this.#leaseOne(request)));
  }

  #leaseOne({ nodeId, max, capabilities, start }: LeaseRequest): LeaseAnswer {
    const node = this.#options.node(nodeId);
    if (!node) throw new MillraceError('not_found', `node ${nodeId} does not exist`);
    if (!Number.isSafeInteger(max) || max < 1) {
      throw new MillraceError('invalid_argument', `a node must ask for at least 1 task, got ${max}`);
    }
    const free = node.maxConcurrency - this.activeLeases(nodeId);
    if (free <= 0) return { leases: [], busy: true };
    const want = Math.min(max, free);
    const leases: GrantedLease[] = [];
    const { preferred, other } = this.#matchesOf(node);
    for (const tier of [preferred, other]) {
      if (leases.length === want) break;
      const queues = tier.filter(
        (queue) => queue.ready > 0 && (capabilities === null || capabilities.includes(queue.capability)),
      );
      if (queues.length === 0) continue;
      this.#flushRows();
      const tasks = this.#pick(queues, want - leases.length);
      for (const task of tasks) leases.push(this.#grant(task, nodeId, start));
      this.#saveGranted(tasks, nodeId);
    }
    return { leases, busy: false };
  }

  /** Up to `want` ready tasks of these queues, by priority, then age. */
  #pick(queues: readonly Queue[], want: number): Task[] {
    const read = (queue: Queue, limit: number, offset: number): Task[] =>
      this.#statements.ready.all(queue.id, this.#now, limit, offset).map((row) => readyTaskOf(row, queue.id));
    const [only] = queues;
    if (only && queues.length === 1) return read(only, want, 0);
    // A merge of sorted queues that reads each in small steps: however many queues there are, little more is read than
    // is given out.
    const step = Math.max(1, Math.ceil(want / queues.length));
    const heads = queues.map((queue) => ({ queue, tasks: read(queue, step, 0), at: 0, read: step }));
    const picked: Task[] = [];
    while (picked.length < want) {
      let best: (typeof heads)[number] | null = null;
      let bestTask: Task | null = null;
      for (const head of heads) {
        if (head.at === head.tasks.length && head.tasks.length === step) {
          head.tasks = read(head.queue, step, head.read);
          head.read += step;
          head.at = 0;
        }
        const task = head.tasks[head.at];
        if (!task) continue;
        if (
          !bestTask ||
          task.priority > bestTask.priority ||
          (task.priority === bestTask.priority && task.seq < bestTask.seq)
        ) {
          best = head;
          bestTask = task;
        }
      }
      if (!best || !bestTask) break;
      best.at += 1;
      picked.push(bestTask);
    }
    return picked;
  }

  #grant(task: Task, nodeId: string, start: boolean): GrantedLease {
    const now = this.#now;
    const job = this.#job(task.jobSeq);
    const leaseId = this.#options.newId();
    const expiresAt = now + this.#options.leaseTtlMs;
    task.attempts += 1;
    task.leaseId = leaseId;
    task.nodeId = nodeId;
    task.leasedAt = now;
    task.leaseExpiresAt = expiresAt;
    task.lastHeartbeatAt = null;
    task.notBefore = null;
    task.updatedAt = now;
    this.#move(task, job, start ? 'running' : 'leased');
    this.#hold(task);
    if (job.status === 'pending') this.#setStatus(job, 'running');
    this.#emit(
      job,
      'task.leased',
      task.seq,
      `{"node_id":"${nodeId}","attempt":${task.attempts},"lease_id":"${leaseId}"}`,
    );
    if (start) this.#emit(job, 'task.running', task.seq);
    return {
      leaseId,
      expiresAt: isoTime(expiresAt),
      domainId: job.domainId,
      task: this.#taskRecord(task, job, 0, []),
    };
  }

  /** Like {@link #save} for tasks leased together: half the time. */
  #saveGranted(tasks: readonly Task[], nodeId: string): void {
    const [first] = tasks;
    if (!first) return;
    const leases = `{${tasks.map(({ seq, leaseId }) => `"${seq}":"${leaseId}"`).join(',')}}`;
    this.#statements.saveGranted.run(first.state, first.leaseExpiresAt, nodeId, this.#now, leases);
  }

  heartbeat(items: readonly HeartbeatItem[]): Outcome<HeartbeatAnswer>[] {
    this.#begin();
    return items.map((item) => this.#each(() => this.#heartbeatOne(item)));
  }

  #heartbeatOne(item: HeartbeatItem): HeartbeatAnswer {
    const now = this.#now;
    const { leaseTtlMs, cancelGraceMs } = this.#options;
    const task = this.#current(item) ?? this.#refuse(item);
    const job = this.#job(task.jobSeq);
    if (task.state === 'leased') {
      this.#move(task, job, 'running');
      this.#emit(job, 'task.running', task.seq);
    }
    if (task.cancelRequestedAt === null && task.deadlineAt !== null && task.deadlineAt <= now) {
      this.#requestCancel(task, 'deadline');
    }
    task.lastHeartbeatAt = now;
    // Alive while it winds down, but not for ever.
    const limit = task.cancelRequestedAt === null ? Infinity : task.cancelRequestedAt + cancelGraceMs;
    const expiresAt = Math.max(task.leaseExpiresAt ?? 0, Math.min(now + leaseTtlMs, limit));
    task.leaseExpiresAt = expiresAt;
    this.#save(task);
    this.#takeReport(task, job, item);
    return {
      leaseId: task.leaseId ?? '',
      expiresAt: isoTime(expiresAt),
      cancel: task.cancelRequestedAt !== null,
      domainId: job.domainId,
      task: this.#taskRecord(task, job, 0, []),
    };
  }

  /** Appends what a heartbeat brought to the event stream and keeps the newest for the task's `meta`. */
  #takeReport(task: Task, job: Job, { progress, events }: HeartbeatItem): void {
    if (progress === null && events.length === 0) return;
    const report = (task.report ??= this.#readReport(task.seq));
    const text = progress === null ? report.progress : JSON.stringify(progress);
    const changed = text !== report.progress;
    if (!changed && events.length === 0) return;
    if (changed) this.#emit(job, 'task.progress', task.seq, `{"progress":${text}}`);
    report.progress = text;
    for (const event of events) {
      const line = JSON.stringify(event);
      this.#emit(job, 'task.log', task.seq, `{"event":${line}}`);
      report.events.push(line);
    }
    let bytes = report.events.reduce((sum, line) => sum + line.length, 0);
    while (
      report.events.length > REPORTED_EVENTS ||
      (report.events.length > 1 && bytes > REPORTED_EVENT_BYTES)
    ) {
      bytes -= report.events.shift()?.length ?? 0;
    }
    this.#statements.saveReport.run(task.seq, text, `[${report.events.join(',')}]`);
  }

  #readReport(taskSeq: number): Report {
    const row = this.#statements.report.get(taskSeq);
    if (!row) return { progress: 'null', events: [] };
    const events = JSON.parse(String(row[1])) as Json[];
    return { progress: String(row[0]), events: events.map((event) => JSON.stringify(event)) };
  }

  complete(items: readonly CompleteItem[]): Outcome<{ readonly leaseId: string }>[] {
    this.#begin();
    return items.map((item) => this.#each(() => this.#completeOne(item)));
  }

  #completeOne(item: CompleteItem): { leaseId: string } | MillraceError {
    const task = this.#current(item);
    if (!task) return this.#repeated(item, ['completed']);
    const job = this.#job(task.jobSeq);
    if (task.cancelRequestedAt !== null) return this.#endRefused(task, job);
    const outputs = item.outputCids.length === 0 ? '[]' : JSON.stringify(item.outputCids);
    const meta = item.meta === null ? 'null' : JSON.stringify(item.meta);
    const leaseId = this.#endLease(task, 'completed', null, outputs, meta);
    this.#move(task, job, 'completed');
    task.reason = null;
    this.#saveCompleted(task);
    this.#emit(job, 'task.completed', task.seq, `{"outputs":${outputs}}`);
    if (task.stage !== 0) this.#countStage(job, task.stage);
    this.#settle(job);
    return { leaseId };
  }

  fail(items: readonly FailItem[]): Outcome<{ readonly leaseId: string }>[] {
    this.#begin();
    return items.map((item) => this.#each(() => this.#failOne(item)));
  }

  #failOne(item: FailItem): { leaseId: string } | MillraceError {
    const task = this.#current(item);
    if (!task) return this.#repeated(item, ['failed']);
    const job = this.#job(task.jobSeq);
    if (task.cancelRequestedAt !== null) return this.#endRefused(task, job);
    const reason = truncateUtf8(item.reason, MAX_REASON_BYTES);
    const details = item.details === null ? 'null' : JSON.stringify(item.details);
    const leaseId = this.#endLease(task, 'failed', reason, '[]', details);
    this.#retryOrFail(task, job, item.nodeFault ? 'setup_failed' : 'failed', reason, item.retryable);
    return { leaseId };
  }

  release(items: readonly ReleaseItem[]): Outcome<{ readonly leaseId: string }>[] {
    this.#begin();
    return items.map((item) => this.#each(() => this.#releaseOne(item)));
  }

  #releaseOne(item: ReleaseItem): { leaseId: string } {
    const task = this.#current(item);
    if (!task) return this.#repeated(item, ['released', 'canceled']);
    const job = this.#job(task.jobSeq);
    if (task.cancelRequestedAt !== null) {
      const leaseId = this.#endLease(task, 'canceled', task.reason, '[]', 'null');
      this.#endCanceled(task, job);
      return { leaseId };
    }
    const leaseId = this.#endLease(task, 'released', item.reason, '[]', 'null');
    this.#emit(job, 'task.released', task.seq, `{"reason":"${item.reason}"}`);
    // `canceled` without our asking is a node that stopped on its own account: given back like by a drain.
    const ending = item.reason === 'setup_failed' ? 'setup_failed' : 'shutdown';
    this.#retryOrFail(task, job, ending, `released: ${item.reason}`, true);
    return { leaseId };
  }

  canceledLeases(nodeId: string, leaseIds: readonly string[]): string[] {
    const wanted = new Set<string>();
    for (const task of this.#heldBy.get(nodeId) ?? []) {
      if (task.cancelRequestedAt === null) wanted.add(task.leaseId ?? '');
    }
    return leaseIds.filter((leaseId) => !wanted.has(leaseId));
  }

  /**
   * The id of the job whose task the lease is for.
   *
   * @throws MillraceError `aborted` when the lease is not its task's newest, `not_found` unknown task, `permission_denied`
   * when the task's job belongs to another domain
   */
  checkLease(ref: LeaseRef, domainId: string): string {
    const task = this.#current(ref) ?? this.#refuse(ref);
    const job = this.#job(task.jobSeq);
    if (job.domainId !== domainId) {
      throw new MillraceError(
        'permission_denied',
        `task ${task.id} belongs to domain ${job.domainId} and may not write into domain ${domainId}`,
      );
    }
    return job.id;
  }

  /** One transaction's worth of the sweep; `more`: there may be more due. */
  sweep(): { rescued: number; more: boolean } {
    this.#begin();
    this.#flushRows();
    const now = this.#now;
    const due = this.#statements.due.all(now, SWEEP_TASKS);
    const failed = new Map<Job, string>();
    let rescued = 0;
    for (const [seq, id] of due) {
      const task = this.#held.get(id as string) ?? this.#taskBySeq(seq as number);
      // Earlier in this sweep the task may have been ended along with its job.
      if ((wakeAt(task) ?? Infinity) > now) continue;
      const job = this.#job(task.jobSeq);
      const late = task.cancelRequestedAt === null && task.deadlineAt !== null && task.deadlineAt <= now;
      if (isHeld(task.state)) {
        if (late) this.#requestCancel(task, 'deadline');
        if ((task.leaseExpiresAt ?? 0) <= now) {
          rescued += 1;
          this.#expire(task, job);
        }
      } else if (late) {
        this.#failTask(task, job, 'deadline');
        failed.set(job, `task ${this.#nameOf(task)} failed: deadline`);
      } else {
        task.notBefore = null;
        this.#move(task, job, 'ready');
        this.#save(task);
        this.#emit(job, 'task.runnable', task.seq);
      }
    }
    for (const [job, reason] of failed) this.#endRest(job, reason);
    return { rescued, more: due.length === SWEEP_TASKS };
  }

  nextWake(): number | null {
    return (this.#statements.nextWake.get()?.[0] ?? null) as number | null;
  }

  busyNodes(mode: NodeMode | 'all'): BusyNode[] {
    const busy: BusyNode[] = [];
    for (const task of this.#held.values()) {
      const taskMode = this.#queue(task.queueId).mode;
      if (mode !== 'all' && taskMode !== mode) continue;
      const job = this.#job(task.jobSeq);
      busy.push({
        node_id: task.nodeId ?? '',
        task_id: task.id,
        task_status: taskStatus(task.state),
        task_mode: taskMode,
        job_id: job.id,
        job_status: job.status,
      });
    }
    return busy;
  }

  stats(): StoreStats {
    this.#begin();
    let oldest: number | null = null;
    for (const queue of this.#queues) {
      if (queue.ready === 0) continue;
      // One look per priority in use: the front of each is what has waited longest there.
      let below: number | null = null;
      for (;;) {
        const row: Row | undefined = this.#statements.frontOfQueue.get(queue.id, below);
        if (!row) break;
        const [priority, since] = row as [number, number];
        oldest = Math.min(oldest ?? since, since);
        below = priority;
      }
    }
    return {
      tasks: { ...this.#totals.tasks },
      jobs: { ...this.#totals.jobs },
      oldestRunnableAgeMs: oldest === null ? null : Math.max(0, this.#now - oldest),
    };
  }

  // ---- Endings ------------------------------------------------------------------------------------------------

  #expire(task: Task, job: Job): void {
    const nodeId = task.nodeId ?? '';
    const requested = task.cancelRequestedAt !== null;
    const reason = requested ? task.reason : `lease expired: node ${nodeId} sent no heartbeat`;
    this.#endLease(task, 'expired', reason, '[]', 'null');
    this.#emit(job, 'task.expired', task.seq, `{"node_id":"${nodeId}"}`);
    if (requested) this.#endCanceled(task, job);
    else this.#retryOrFail(task, job, 'expired', reason ?? '', true);
  }

  /** Ends the lease and writes its receipt. The caller moves the task on. */
  #endLease(
    task: Task,
    outcome: AttemptOutcome,
    reason: string | null,
    outputs: string,
    meta: string,
  ): string {
    const leaseId = task.leaseId ?? '';
    this.#newAttempts.add(
      task.seq,
      task.attempts + task.nodeFaults + task.drains,
      leaseId,
      task.nodeId,
      outcome,
      outputs,
      meta,
      reason,
      task.leasedAt,
      this.#now,
    );
    this.#held.delete(task.id);
    const nodeId = task.nodeId ?? '';
    const others = this.#heldBy.get(nodeId);
    others?.delete(task);
    if (others?.size === 0) this.#heldBy.delete(nodeId);
    task.leaseId = null;
    task.nodeId = null;
    task.leasedAt = null;
    task.leaseExpiresAt = null;
    return leaseId;
  }

  #retryOrFail(task: Task, job: Job, ending: Ending, reason: string, retryable: boolean): void {
    const verdict = judge(ending, task, retryable);
    const attempt = task.attempts;
    task.attempts = verdict.attempts;
    task.nodeFaults = verdict.nodeFaults;
    task.drains = verdict.drains;
    if (verdict.next === 'failed') {
      this.#failTask(task, job, reason);
      this.#endRest(job, `task ${this.#nameOf(task)} failed: ${reason}`);
      return;
    }
    task.reason = reason;
    if (verdict.next === 'delayed') {
      const { random, backoff } = this.#options;
      const notBefore = this.#now + backoffMs(verdict.step, random, backoff);
      task.notBefore = notBefore;
      this.#move(task, job, 'delayed');
      const data = { reason, not_before: isoTime(notBefore), attempt };
      this.#emit(job, 'task.retry', task.seq, JSON.stringify(data));
    } else {
      this.#move(task, job, 'ready');
      this.#emit(job, 'task.runnable', task.seq);
    }
    this.#save(task);
  }

  /** Ends a task whose lease was cancelled, now that the work is gone. */
  #endCanceled(task: Task, job: Job): void {
    if (task.reason === 'deadline') {
      this.#failTask(task, job, 'deadline');
      this.#endRest(job, `task ${this.#nameOf(task)} failed: deadline`);
    } else {
      this.#cancelTask(task, job, task.reason ?? 'canceled');
      this.#settle(job);
    }
  }

  /** A cancelled lease reported an ending: refused, and the proof that its work is over. */
  #endRefused(task: Task, job: Job): MillraceError {
    const reason = task.reason ?? 'canceled';
    this.#endLease(task, 'canceled', reason, '[]', 'null');
    this.#endCanceled(task, job);
    return new MillraceError(
      'aborted',
      `task ${task.id} was asked to end (${reason}); its result is not accepted`,
    );
  }

  #failTask(task: Task, job: Job, reason: string): void {
    task.reason = reason;
    task.notBefore = null;
    this.#move(task, job, 'failed');
    this.#save(task);
    this.#emit(job, 'task.failed', task.seq, JSON.stringify({ reason }));
  }

  #cancelTask(task: Task, job: Job, reason: string): void {
    task.reason = reason;
    task.notBefore = null;
    task.cancelRequestedAt ??= this.#now;
    this.#move(task, job, 'canceled');
    this.#save(task);
    this.#emit(job, 'task.canceled', task.seq, JSON.stringify({ reason }));
  }

  #requestCancel(task: Task, reason: string): void {
    task.cancelRequestedAt = this.#now;
    task.reason = reason;
    this.#save(task);
    this.#canceledLeases.push(task.leaseId ?? '');
  }

  /** Ends what is queued and asks what is leased to end. */
  #endRest(job: Job, reason: string): void {
    this.#flushRows();
    const short = truncateUtf8(reason, MAX_REASON_BYTES);
    const [first, last] = [job.firstTask, job.firstTask + job.taskCount - 1];
    if (job.counts.queued > 0) {
      for (const row of this.#statements.queuedOfJob.all(first, last)) {
        const task = taskOf(row);
        if (task.deadlineAt !== null && task.deadlineAt <= this.#now) this.#failTask(task, job, 'deadline');
        else this.#cancelTask(task, job, short);
      }
    }
    if (job.counts.leased + job.counts.running > 0) {
      for (const [id] of this.#statements.heldOfJob.all(first, last)) {
        const task = this.#held.get(id as string);
        if (task && task.cancelRequestedAt === null) this.#requestCancel(task, short);
      }
    }
    this.#settle(job);
  }

  /** Gives the job its last status when nothing of it is left to do. */
  #settle(job: Job): void {
    if (isFinal(job.status)) return;
    const status = jobStatus(job.counts, job.status !== 'pending');
    if (status !== 'pending' && status !== job.status) this.#setStatus(job, status);
  }

  #setStatus(job: Job, status: Exclude<JobStatus, 'pending'>): void {
    this.#totals.jobs[job.status] -= 1;
    this.#totals.jobs[status] += 1;
    job.status = status;
    this.#emit(job, `job.${status}`, null);
  }

  // ---- Stages -------------------------------------------------------------------------------------------------

  /** One task of the stage completed. The stages after it may become runnable. */
  #countStage(job: Job, no: number): void {
    const stage = this.#stage(job, no);
    stage.remaining -= 1;
    if (stage.remaining > 0) return;
    for (const [next] of this.#statements.nextStages.all(job.seq, no)) {
      const after = this.#stage(job, next as number);
      after.depsRemaining -= 1;
      if (after.depsRemaining === 0) this.#openStage(job, after);
    }
  }

  /** Makes a stage's tasks ready, with their `stage:` inputs resolved. */
  #openStage(job: Job, stage: Stage): void {
    this.#flushRows();
    const sql = this.#statements;
    const outputs = new Map<string, StageOutputs>();
    const isStage = (name: string): boolean => sql.stageByName.get(job.seq, name) !== undefined;
    let resolved = 0;
    let failure: string | null = null;
    for (const row of sql.blockedOfStage.all(stage.firstTask, stage.lastTask, stage.no)) {
      const task = taskOf(row);
      const spec = specOf(row[21]);
      task.spec = spec;
      if (spec.inputs_cids.some((input) => input.startsWith('stage:'))) {
        const answer = this.#resolve(
          job,
          spec.inputs_cids,
          isStage,
          outputs,
          MAX_RESOLVED_PER_STAGE - resolved,
        );
        if (typeof answer === 'string') {
          this.#failTask(task, job, answer);
          failure ??= `task ${this.#nameOf(task)} failed: ${answer}`;
          continue;
        }
        resolved += answer.length;
        task.spec = { ...spec, inputs_cids: answer };
        sql.saveSpec.run(specText(task.spec), task.seq);
      }
      this.#move(task, job, 'ready');
      this.#save(task);
      this.#emit(job, 'task.runnable', task.seq);
    }
    if (failure !== null) this.#endRest(job, failure);
  }

  /** The inputs with every `stage:` reference replaced, or why that is not possible. */
  #resolve(
    job: Job,
    inputs: readonly string[],
    isStage: (name: string) => boolean,
    outputs: Map<string, StageOutputs>,
    room: number,
  ): string[] | string {
    const ids: string[] = [];
    for (const input of inputs) {
      const reference = parseStageReference(input, isStage);
      if (!reference) {
        ids.push(input);
        continue;
      }
      let source = outputs.get(reference.stage);
      if (!source) {
        source = new StageOutputs(this.#stageOutputs(job, reference.stage));
        outputs.set(reference.stage, source);
      }
      const found = source.select(reference.glob);
      if (found.length === 0) return `input ${input} matches no output of stage ${reference.stage}`;
      if (ids.length + found.length > JOB_LIMITS.inputsPerTask) {
        return `input ${input} brings the inputs to ${ids.length + found.length}; a task may have ${JOB_LIMITS.inputsPerTask}`;
      }
      if (ids.length + found.length > room) {
        return `input ${input} brings the inputs of the stage beyond ${MAX_RESOLVED_PER_STAGE} in all`;
      }
      for (const id of found) ids.push(id);
    }
    return ids;
  }

  #stageOutputs(job: Job, name: string): StageOutput[] {
    const row = this.#statements.stageByName.get(job.seq, name);
    if (!row) return [];
    const [no, first, last] = row as [number, number, number];
    return this.#statements.stageOutputs.all(first, last, no).map(([spec, outputs, meta]) => ({
      outputsPrefix: specOf(spec).outputs_prefix,
      outputs: JSON.parse(String(outputs)) as string[],
      meta: JSON.parse(String(meta)) as Json,
    }));
  }

  // ---- Fencing ------------------------------------------------------------------------------------------------

  /** The task, if this lease is its current one. */
  #current({ taskId, nodeId, leaseId }: LeaseRef): Task | undefined {
    const task = this.#held.get(taskId);
    return task?.nodeId === nodeId && (leaseId === null || task.leaseId === leaseId) ? task : undefined;
  }

  /** The answer to an ending for a lease that is over: the same as the first time, or a refusal. */
  #repeated(ref: LeaseRef, accepted: readonly AttemptOutcome[]): { leaseId: string } {
    this.#flushRows();
    const seq = this.#statements.taskSeq.get(ref.taskId)?.[0];
    for (const [leaseId, nodeId, outcome] of seq === undefined ? [] : this.#statements.attemptsOf.all(seq)) {
      if (nodeId !== ref.nodeId || (ref.leaseId !== null && leaseId !== ref.leaseId)) continue;
      if (accepted.includes(outcome as AttemptOutcome)) return { leaseId: leaseId as string };
      break; // Without a lease id the node's newest attempt is meant.
    }
    return this.#refuse(ref);
  }

  #refuse({ taskId, nodeId, leaseId }: LeaseRef): never {
    this.#flushRows();
    const task = this.#held.get(taskId) ?? this.#taskById(taskId);
    if (!task) throw new MillraceError('not_found', `task ${taskId} does not exist`);
    const lease = leaseId === null ? `node ${nodeId} holds no lease` : `lease ${leaseId} is not the newest`;
    throw new MillraceError('aborted', `${lease} of task ${taskId}, which is ${taskStatus(task.state)}`);
  }

  // ---- Small parts --------------------------------------------------------------------------------------------

  #begin(): void {
    this.#now = this.#options.clock.now();
  }

  /** One item of a batch: its own errors are its answer. An error it returns was meant to have effects. */
  #each<T>(work: () => T | MillraceError): Outcome<T> {
    const mark = this.#database.writes;
    try {
      const value = work();
      return MillraceError.is(value) ? { ok: false, error: value } : { ok: true, value };
    } catch (error) {
      // Thrown half way, it must not pass as a plain refusal: the transaction has to go.
      if (!MillraceError.is(error)) throw error;
      if (this.#database.writes !== mark) {
        throw new MillraceError('internal', `refused after writing: ${error.message}`, { cause: error });
      }
      return { ok: false, error };
    }
  }

  /** Makes rows that were only added visible to statements. */
  #flushRows(): void {
    for (const bulk of this.#bulks) bulk.flush();
    this.#flushCompleted();
  }

  #flushJob(job: Job): void {
    const { counts, events } = job;
    for (let at = 0; at < events.length; at += EVENTS_PER_ROW) {
      const lines = events.slice(at, at + EVENTS_PER_ROW);
      const lastSeq = job.lastEvent - events.length + at + lines.length;
      this.#newEvents.add(job.seq, lastSeq, lines.length, job.eventsAt, `[${lines.join(',')}]`);
    }
    events.length = 0;
    for (const stage of job.stages.values()) {
      this.#statements.saveStage.run(stage.remaining, stage.depsRemaining, job.seq, stage.no);
    }
    job.stages.clear();
    if (job.isNew) {
      job.isNew = false;
      this.#newJobs.add(
        job.seq,
        job.id,
        job.domainId,
        job.organizationId,
        job.priority,
        job.createdAt,
        job.deadlineAt,
        job.firstTask,
        job.taskCount,
        job.status,
        job.updatedAt,
        job.cancelRequestedAt,
        job.lastEvent,
        counts.queued,
        counts.leased,
        counts.running,
        counts.completed,
        counts.failed,
        counts.canceled,
      );
      return;
    }
    this.#statements.saveJob.run(
      job.status,
      job.updatedAt,
      job.cancelRequestedAt,
      job.lastEvent,
      counts.queued,
      counts.leased,
      counts.running,
      counts.completed,
      counts.failed,
      counts.canceled,
      job.seq,
    );
  }

  #takeNotes(): { runnable: boolean; jobIds: string[]; leaseIds: string[] } {
    const notes = { runnable: this.#runnable, jobIds: this.#changedJobs, leaseIds: this.#canceledLeases };
    this.#runnable = false;
    this.#changedJobs = [];
    this.#canceledLeases = [];
    return notes;
  }

  /** Appends an event of the job, or of its task with this number. `data` is JSON; empty is `{}`. */
  #emit(job: Job, kind: EventKind, taskSeq: number | null, data = ''): void {
    if (job.events.length === 0) job.eventsAt = this.#now;
    const task = taskSeq === null ? -1 : taskSeq - job.firstTask;
    const head = `[${this.#now - job.eventsAt},${EVENT_CODES[kind]},${task}`;
    job.events.push(data === '' ? `${head}]` : `${head},${data}]`);
    job.lastEvent += 1;
    job.updatedAt = this.#now;
    if (!job.dirty) {
      job.dirty = true;
      this.#dirtyJobs.push(job);
    }
  }

  /** Changes the state and every count that follows from it. */
  #move(task: Task, job: Job, state: TaskState): void {
    const from = taskStatus(task.state);
    const to = taskStatus(state);
    job.counts[from] -= 1;
    job.counts[to] += 1;
    this.#totals.tasks[from] -= 1;
    this.#totals.tasks[to] += 1;
    if (task.state === 'ready') this.#queue(task.queueId).ready -= 1;
    if (state === 'ready') {
      this.#queue(task.queueId).ready += 1;
      this.#runnable = true;
    }
    task.state = state;
  }

  #save(task: Task): void {
    task.updatedAt = this.#now;
    this.#statements.saveTask.run(
      task.state,
      wakeAt(task),
      task.attempts,
      task.nodeFaults,
      task.drains,
      task.leaseId,
      task.nodeId,
      task.leasedAt,
      task.leaseExpiresAt,
      task.lastHeartbeatAt,
      task.notBefore,
      task.cancelRequestedAt,
      task.updatedAt,
      task.reason,
      task.seq,
    );
  }

  /** Like {@link #save} for a task that completed, but together with others: a third of the time. */
  #saveCompleted(task: Task): void {
    if (this.#completedAt !== this.#now) this.#flushCompleted();
    this.#completedAt = this.#now;
    this.#database.noteWrite();
    this.#completed.push(task.seq);
  }

  #flushCompleted(): void {
    if (this.#completed.length === 0) return;
    this.#statements.saveCompleted(this.#completedAt, `[${this.#completed.join(',')}]`);
    this.#completed = [];
  }

  #hold(task: Task): void {
    const nodeId = task.nodeId ?? '';
    this.#held.set(task.id, task);
    const others = this.#heldBy.get(nodeId);
    if (others) others.add(task);
    else this.#heldBy.set(nodeId, new Set([task]));
  }

  #queue(id: number): Queue {
    const queue = this.#queues[id - 1];
    if (!queue) throw new MillraceError('internal', `queue ${id} does not exist`);
    return queue;
  }

  /** Ids are given out in order from 1 and never reused, so the position tells the id. */
  #addQueue(queue: Queue): Queue {
    this.#queues.push(queue);
    this.#queueIds.set(queueKey(queue), queue);
    return queue;
  }

  #queueFor(
    task: {
      readonly capability: string;
      readonly capability_filters: Readonly<Record<string, string>>;
      readonly mode: NodeMode;
    },
    organizationId: string | null,
  ): Queue {
    const filters = Object.fromEntries(
      Object.entries(task.capability_filters).toSorted(([a], [b]) => (a < b ? -1 : 1)),
    );
    const demand: Demand = { capability: task.capability, filters, mode: task.mode, organizationId };
    const known = this.#queueIds.get(queueKey(demand));
    if (known) return known;
    const id = this.#queues.length + 1;
    this.#statements.insertQueue.run(
      id,
      demand.capability,
      JSON.stringify(filters),
      demand.mode,
      organizationId ?? '',
    );
    return this.#addQueue({ ...demand, id, ready: 0 });
  }

  #matchesOf(node: Node): Matches {
    let matches = this.#matches.get(node.id);
    if (matches?.node !== node) {
      matches = { node, seen: 0, preferred: [], other: [] };
      this.#matches.set(node.id, matches);
    }
    for (; matches.seen < this.#queues.length; matches.seen += 1) {
      const queue = this.#queue(matches.seen + 1);
      const answer = match(queue, node);
      if (answer !== 'never') matches[answer].push(queue);
    }
    return matches;
  }

  #cache(job: Job): void {
    this.#jobs.set(job.seq, job);
    this.#jobSeqs.set(job.id, job.seq);
  }

  #job(seq: number): Job {
    const known = this.#jobs.get(seq);
    if (known) return known;
    const row = this.#statements.jobBySeq.get(seq);
    if (!row) throw new MillraceError('internal', `job number ${seq} does not exist`);
    const job = jobOf(row);
    this.#cache(job);
    return job;
  }

  #jobById(id: string): Job | null {
    const known = this.#jobSeqs.get(id);
    if (known !== undefined) return this.#job(known);
    const seq = this.#statements.jobSeq.get(id)?.[0];
    return seq === undefined ? null : this.#job(seq as number);
  }

  #stage(job: Job, no: number): Stage {
    const known = job.stages.get(no);
    if (known) return known;
    const row = this.#statements.stage.get(job.seq, no);
    if (!row) throw new MillraceError('internal', `job ${job.id} has no stage number ${no}`);
    const [firstTask, lastTask, remaining, depsRemaining] = row as [number, number, number, number];
    const stage: Stage = { no, firstTask, lastTask, remaining, depsRemaining };
    job.stages.set(no, stage);
    return stage;
  }

  #taskById(id: string): Task | null {
    const row = this.#statements.taskById.get(id);
    return row ? taskOf(row) : null;
  }

  #taskBySeq(seq: number): Task {
    const row = this.#statements.taskBySeq.get(seq);
    if (!row) throw new MillraceError('internal', `task number ${seq} does not exist`);
    return taskOf(row);
  }

  #taskId(seq: number, known: Map<number, string>): string {
    let id = known.get(seq);
    if (id === undefined) {
      id = String(this.#statements.taskId.get(seq)?.[0]);
      known.set(seq, id);
    }
    return id;
  }

  #spec(task: Task): Spec {
    return (task.spec ??= specOf(this.#statements.spec.get(task.seq)?.[0]));
  }

  /** For people: the label, which they chose, and the id, which is unique. */
  #nameOf(task: Task): string {
    return `${this.#spec(task).label} (${task.id})`;
  }

  #jobText(seq: number): JobText {
    return JSON.parse(String(this.#statements.jobText.get(seq)?.[0])) as JobText;
  }

  #jobRecord(job: Job, text: JobText): JobRecord {
    return {
      id: job.id,
      label: text.label,
      domain_id: job.domainId,
      status: job.status,
      priority: job.priority,
      created_at: isoTime(job.createdAt),
      updated_at: isoTime(job.updatedAt),
      organization_id: job.organizationId,
      meta: text.meta,
      credit_lock_id: null,
      credit_lock_amount: null,
      credit_locked_at: null,
      credit_released_at: null,
      cancel_requested_at: isoTimeOrNull(job.cancelRequestedAt),
      deadline_at: isoTimeOrNull(job.deadlineAt),
      edges: text.edges,
    };
  }

  #taskRecord(task: Task, job: Job, depsRemaining: number, outputs: readonly string[]): TaskRecord {
    const spec = this.#spec(task);
    const queue = this.#queue(task.queueId);
    return {
      id: task.id,
      job_id: job.id,
      label: spec.label,
      stage: spec.stage,
      capability: queue.capability,
      capability_filters: queue.filters,
      status: taskStatus(task.state),
      deps_remaining: depsRemaining,
      priority: task.priority,
      inputs_cids: spec.inputs_cids,
      outputs_prefix: spec.outputs_prefix,
      organization_id: job.organizationId,
      attempts: task.attempts,
      max_attempts: task.maxAttempts,
      lease_expires_at: isoTimeOrNull(task.leaseExpiresAt),
      reserved_by: task.nodeId,
      meta: spec.meta,
      cancel_requested_at: isoTimeOrNull(task.cancelRequestedAt),
      last_heartbeat_at: isoTimeOrNull(task.lastHeartbeatAt),
      created_at: isoTime(job.createdAt),
      updated_at: isoTime(task.updatedAt),
      mode: queue.mode,
      billing_units: null,
      estimated_credit_cost: null,
      debited_amount: null,
      debited_at: null,
      reason: task.reason,
      not_before: isoTimeOrNull(task.notBefore),
      output_cids: outputs,
      node_faults: task.nodeFaults + task.drains,
      deadline_at: isoTimeOrNull(task.deadlineAt),
    };
  }
}

/** The part of a job that is only shown. Stored as JSON. */
interface JobText {
  readonly label: string;
  readonly meta: JsonObject;
  readonly edges: JobRecord['edges'];
  readonly capabilities: readonly string[];
}

function prepare(database: Database) {
  const sql = (text: string): Statement => database.prepare(text);
  return {
    lastJob: sql('SELECT coalesce(max(seq), 0) FROM jobs'),
    lastTask: sql('SELECT coalesce(max(seq), 0) FROM tasks'),
    queues: sql('SELECT id, capability, filters, mode, organization_id FROM queues ORDER BY id'),
    readyCounts: sql("SELECT queue_id, count(*) FROM tasks WHERE state = 'ready' GROUP BY queue_id"),
    heldTasks: sql(
      `SELECT ${TASK_COLUMNS} FROM tasks WHERE wake_at IS NOT NULL AND state IN ('leased', 'running') ORDER BY seq`,
    ),
    taskTotals: sql(
      'SELECT total(queued), total(leased), total(running), total(completed), total(failed), total(canceled) FROM jobs',
    ),
    jobTotals: sql('SELECT status, count(*) FROM jobs GROUP BY status'),

    submission: sql('SELECT spec_hash, job_seq FROM submissions WHERE submitter = ? AND key = ?'),
    insertSubmission: sql('INSERT INTO submissions (submitter, key, spec_hash, job_seq) VALUES (?, ?, ?, ?)'),
    insertQueue: sql(
      'INSERT INTO queues (id, capability, filters, mode, organization_id) VALUES (?, ?, ?, ?, ?)',
    ),
    insertStage: sql(
      'INSERT INTO stages (job_seq, stage, name, first_task, last_task, remaining, deps_remaining) VALUES (?, ?, ?, ?, ?, ?, ?)',
    ),
    insertEdge: sql('INSERT INTO stage_edges (job_seq, from_stage, to_stage) VALUES (?, ?, ?)'),

    jobBySeq: sql(`SELECT ${JOB_COLUMNS} FROM jobs WHERE seq = ?`),
    jobSeq: sql('SELECT seq FROM jobs WHERE id = ?'),
    jobText: sql('SELECT spec FROM job_specs WHERE job_seq = ?'),
    listJobs: sql(`
      SELECT ${JOB_COLUMNS}, spec FROM jobs JOIN job_specs ON job_seq = jobs.seq
      WHERE jobs.seq < ?1 AND jobs.seq >= ?2 AND (?3 IS NULL OR domain_id = ?3) AND (?4 IS NULL OR status = ?4)
      ORDER BY jobs.seq DESC`),
    saveJob: sql(`
      UPDATE jobs SET status = ?, updated_at = ?, cancel_requested_at = ?, last_event = ?, queued = ?, leased = ?,
        running = ?, completed = ?, failed = ?, canceled = ?
      WHERE seq = ?`),
    deleteTasks: [
      sql('DELETE FROM task_specs WHERE task_seq BETWEEN ? AND ?'),
      sql('DELETE FROM task_reports WHERE task_seq BETWEEN ? AND ?'),
      sql('DELETE FROM attempts WHERE task_seq BETWEEN ? AND ?'),
      sql('DELETE FROM tasks WHERE seq BETWEEN ? AND ?'),
    ],
    deleteJob: [
      sql('DELETE FROM stages WHERE job_seq = ?'),
      sql('DELETE FROM stage_edges WHERE job_seq = ?'),
      sql('DELETE FROM events WHERE job_seq = ?'),
      sql('DELETE FROM submissions WHERE job_seq = ?'),
      sql('DELETE FROM job_specs WHERE job_seq = ?'),
      sql('DELETE FROM jobs WHERE seq = ?'),
    ],

    stage: sql(
      'SELECT first_task, last_task, remaining, deps_remaining FROM stages WHERE job_seq = ? AND stage = ?',
    ),
    stageByName: sql('SELECT stage, first_task, last_task FROM stages WHERE job_seq = ? AND name = ?'),
    stageDeps: sql('SELECT stage, deps_remaining FROM stages WHERE job_seq = ?'),
    nextStages: sql(
      'SELECT to_stage FROM stage_edges WHERE job_seq = ? AND from_stage = ? ORDER BY to_stage',
    ),
    saveStage: sql('UPDATE stages SET remaining = ?, deps_remaining = ? WHERE job_seq = ? AND stage = ?'),
    blockedOfStage: sql(`
      SELECT ${TASK_COLUMNS}, spec FROM tasks JOIN task_specs ON task_seq = seq
      WHERE seq BETWEEN ? AND ? AND stage = ? AND state = 'blocked' ORDER BY seq`),
    stageOutputs: sql(`
      SELECT spec, outputs, meta FROM tasks JOIN task_specs ON task_specs.task_seq = seq
      JOIN attempts ON attempts.task_seq = seq AND outcome = 'completed'
      WHERE seq BETWEEN ? AND ? AND stage = ? ORDER BY seq`),

    taskById: sql(`SELECT ${TASK_COLUMNS} FROM tasks WHERE id = ?`),
    taskBySeq: sql(`SELECT ${TASK_COLUMNS} FROM tasks WHERE seq = ?`),
    taskSeq: sql('SELECT seq FROM tasks WHERE id = ?'),
    taskId: sql('SELECT id FROM tasks WHERE seq = ?'),
    tasksOfJob: sql(`
      SELECT ${TASK_COLUMNS}, spec, progress, events FROM tasks JOIN task_specs ON task_specs.task_seq = seq
      LEFT JOIN task_reports ON task_reports.task_seq = seq
      WHERE seq BETWEEN ? AND ? ORDER BY seq`),
    queuedOfJob: sql(`
      SELECT ${TASK_COLUMNS} FROM tasks
      WHERE seq BETWEEN ? AND ? AND state IN ('blocked', 'delayed', 'ready') ORDER BY seq`),
    heldOfJob: sql(
      "SELECT id FROM tasks WHERE seq BETWEEN ? AND ? AND state IN ('leased', 'running') ORDER BY seq",
    ),
    readyOfJob: sql(
      "SELECT queue_id, count(*) FROM tasks WHERE seq BETWEEN ? AND ? AND state = 'ready' GROUP BY queue_id",
    ),
    ready: sql(`
      SELECT seq, id, job_seq, stage, priority, max_attempts, deadline_at, attempts, node_faults, drains, reason, spec
      FROM tasks CROSS JOIN task_specs ON task_seq = seq
      WHERE queue_id = ? AND state = 'ready' AND (deadline_at IS NULL OR deadline_at > ?)
      ORDER BY priority DESC, seq LIMIT ? OFFSET ?`),
    frontOfQueue: sql(`
      SELECT priority, updated_at FROM tasks
      WHERE queue_id = ?1 AND state = 'ready' AND priority < coalesce(?2, 9223372036854775807)
      ORDER BY priority DESC, seq LIMIT 1`),
    due: sql('SELECT seq, id FROM tasks WHERE wake_at <= ? ORDER BY wake_at, seq LIMIT ?'),
    nextWake: sql('SELECT min(wake_at) FROM tasks WHERE wake_at IS NOT NULL'),
    saveTask: sql(`
      UPDATE tasks SET state = ?, wake_at = ?, attempts = ?, node_faults = ?, drains = ?, lease_id = ?, node_id = ?,
        leased_at = ?, lease_expires_at = ?, last_heartbeat_at = ?, not_before = ?, cancel_requested_at = ?,
        updated_at = ?, reason = ?
      WHERE seq = ?`),
    // ?2 is the expiry; a deadline may come before it, as in wakeAt.
    saveGranted: sql(`
      UPDATE tasks SET state = ?1, wake_at = min(?2, coalesce(deadline_at, ?2)), attempts = attempts + 1,
        lease_id = leases.value, node_id = ?3, leased_at = ?4, lease_expires_at = ?2, last_heartbeat_at = NULL,
        not_before = NULL, updated_at = ?4
      FROM json_each(?5) AS leases WHERE seq = CAST(leases.key AS INTEGER)`),
    saveCompleted: database.prepareCounted(`
      UPDATE tasks SET state = 'completed', wake_at = NULL, lease_id = NULL, node_id = NULL, leased_at = NULL,
        lease_expires_at = NULL, updated_at = ?1, reason = NULL
      WHERE seq IN (SELECT value FROM json_each(?2))`),
    spec: sql('SELECT spec FROM task_specs WHERE task_seq = ?'),
    saveSpec: sql('UPDATE task_specs SET spec = ? WHERE task_seq = ?'),
    report: sql('SELECT progress, events FROM task_reports WHERE task_seq = ?'),
    saveReport: sql(`
      INSERT INTO task_reports (task_seq, progress, events) VALUES (?, ?, ?)
      ON CONFLICT DO UPDATE SET progress = excluded.progress, events = excluded.events`),

    attemptsOf: sql('SELECT lease_id, node_id, outcome FROM attempts WHERE task_seq = ? ORDER BY no DESC'),
    completion: sql("SELECT outputs FROM attempts WHERE task_seq = ? AND outcome = 'completed'"),
    attemptsOfTasks: sql(`
      SELECT task_seq, lease_id, node_id, outcome, outputs, meta, reason, leased_at, created_at FROM attempts
      WHERE task_seq BETWEEN ? AND ? ORDER BY task_seq, no`),
    eventRow: sql(
      'SELECT last_seq, count, at, body FROM events WHERE job_seq = ? AND last_seq > ? ORDER BY last_seq LIMIT 1',
    ),
  };
}

function taskOf(row: Row): Task {
  return {
    seq: row[0] as number,
    id: row[1] as string,
    jobSeq: row[2] as number,
    stage: row[3] as number,
    queueId: row[4] as number,
    priority: row[5] as number,
    maxAttempts: row[6] as number,
    deadlineAt: row[7] as number | null,
    state: row[8] as TaskState,
    attempts: row[9] as number,
    nodeFaults: row[10] as number,
    drains: row[11] as number,
    leaseId: row[12] as string | null,
    nodeId: row[13] as string | null,
    leasedAt: row[14] as number | null,
    leaseExpiresAt: row[15] as number | null,
    lastHeartbeatAt: row[16] as number | null,
    notBefore: row[17] as number | null,
    cancelRequestedAt: row[18] as number | null,
    updatedAt: row[19] as number,
    reason: row[20] as string | null,
    spec: null,
    report: null,
  };
}

/** A row of the statement `ready`, which leaves out what a ready task cannot have. */
function readyTaskOf(row: Row, queueId: number): Task {
  return {
    seq: row[0] as number,
    id: row[1] as string,
    jobSeq: row[2] as number,
    stage: row[3] as number,
    queueId,
    priority: row[4] as number,
    maxAttempts: row[5] as number,
    deadlineAt: row[6] as number | null,
    state: 'ready',
    attempts: row[7] as number,
    nodeFaults: row[8] as number,
    drains: row[9] as number,
    leaseId: null,
    nodeId: null,
    leasedAt: null,
    leaseExpiresAt: null,
    lastHeartbeatAt: null,
    notBefore: null,
    cancelRequestedAt: null,
    updatedAt: 0,
    reason: row[10] as string | null,
    spec: specOf(row[11]),
    report: null,
  };
}

function jobOf(row: Row): Job {
  return {
    seq: row[0] as number,
    id: row[1] as string,
    domainId: row[2] as string,
    organizationId: row[3] as string | null,
    priority: row[4] as number,
    createdAt: row[5] as number,
    deadlineAt: row[6] as number | null,
    firstTask: row[7] as number,
    taskCount: row[8] as number,
    status: row[9] as JobStatus,
    updatedAt: row[10] as number,
    cancelRequestedAt: row[11] as number | null,
    lastEvent: row[12] as number,
    counts: {
      queued: row[13] as number,
      leased: row[14] as number,
      running: row[15] as number,
      completed: row[16] as number,
      failed: row[17] as number,
      canceled: row[18] as number,
    },
    isNew: false,
    events: [],
    eventsAt: 0,
    stages: new Map(),
    dirty: false,
  };
}

function receiptOf(row: Row, jobId: string, taskId: string): ReceiptRecord {
  const [, leaseId, nodeId, outcome, outputs, meta, reason, leasedAt, createdAt] = row;
  return {
    id: leaseId as string,
    job_id: jobId,
    task_id: taskId,
    node_id: nodeId as string,
    outputs: JSON.parse(outputs as string) as string[],
    meta: JSON.parse(meta as string) as Json,
    created_at: isoTime(createdAt as number),
    outcome: outcome as AttemptOutcome,
    reason: reason as string | null,
    leased_at: isoTime(leasedAt as number),
  };
}

/** The record with what heartbeats brought in its `meta`, where that can hold members. */
function withReport(record: TaskRecord, progress: string | null, events: string | null): TaskRecord {
  const { meta } = record;
  if (progress === null || events === null) return record;
  if (meta !== null && (typeof meta !== 'object' || Array.isArray(meta))) return record;
  return {
    ...record,
    meta: { ...meta, progress: JSON.parse(progress) as Json, events: JSON.parse(events) as Json[] },
  };
}

function specText({ label, stage, inputs_cids, outputs_prefix, meta }: Spec): string {
  return JSON.stringify([label, stage, inputs_cids, outputs_prefix, meta]);
}

function specOf(text: unknown): Spec {
  const [label, stage, inputs_cids, outputs_prefix, meta] = JSON.parse(String(text)) as [
    string,
    string,
    string[],
    string | null,
    Json,
  ];
  return { label, stage, inputs_cids, outputs_prefix, meta };
}

function queueKey({ capability, filters, mode, organizationId }: Demand): string {
  return JSON.stringify([capability, filters, mode, organizationId]);
}

function sameFilters(a: object, b: object): boolean {
  return a === b || (Object.keys(a).length === 0 && Object.keys(b).length === 0);
}

function hasCapabilities(capabilities: readonly string[], query: ListJobsQuery): boolean {
  if (query.capabilities.length === 0) return true;
  return query.matchAllCapabilities
    ? query.capabilities.every((capability) => capabilities.includes(capability))
    : query.capabilities.some((capability) => capabilities.includes(capability));
}

function timeOf(text: string | null): number | null {
  return text === null ? null : Date.parse(text);
}

function earlier(a: number | null, b: number | null): number | null {
  return a === null || b === null ? (a ?? b) : Math.min(a, b);
}

function emptyTasks(): Record<TaskStatus, number> {
  return { queued: 0, leased: 0, running: 0, completed: 0, failed: 0, canceled: 0 };
}

function emptyJobs(): Record<JobStatus, number> {
  return Object.fromEntries(JOB_STATUSES.map((status) => [status, 0])) as Record<JobStatus, number>;
}
