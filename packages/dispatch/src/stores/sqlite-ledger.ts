/**
 * Where every job and task stands, in memory and in rows, and the one place that changes it. What may be changed and when is
 * for the verbs (`sqlite-jobs.ts`, `sqlite-leasing.ts`, `sqlite-ending.ts`); here it stays consistent. Synchronous; the caller
 * brings the transaction.
 *
 * Invariants: a task is held exactly while its state is leased or running, and in a lane exactly while it is ready; a queue's
 * counts are the numbers of its tasks in each state, a key's and a node's what the held tasks come to; job counts and `totals`
 * equal what counting tasks would give. {@link Ledger.load} restores all of it from the tables.
 */
import { MillraceError } from '@millrace/runner';
import { isHeld, resume, taskStatus, wakeAt } from '../lifecycle.ts';
import type { TaskState } from '../lifecycle.ts';
import { TASK_STATUSES } from '../records.ts';
import type {
  AttemptOutcome,
  DomainStanding,
  JobRecord,
  JobStatus,
  TaskRecord,
  TaskStatus,
  TaskSubmission,
  TasksSummary,
} from '../records.ts';
import { LEASE_NUMBERS, leaseId, prefixOf, taskId, taskIdsOf, taskIndex } from './ids.ts';
import type { EventKind } from './event-kinds.ts';
import { BulkInsert } from './sqlite-database.ts';
import type { Database, Row, Statement } from './sqlite-database.ts';
import { Receipts, PendingReceipts } from './sqlite-receipts.ts';
import type { Attempt } from './sqlite-receipts.ts';
import { Events, PendingEvents } from './sqlite-events.ts';
import { emptyJobs, emptyTasks, queuedWakeAt } from './sqlite-model.ts';
import type { Job, JobText, Spec, Stage, Task, WorkOptions } from './sqlite-model.ts';
import { Usage } from './fitting.ts';
import { Domains } from './sqlite-domains.ts';
import { Lanes } from './sqlite-lanes.ts';
import { Memos } from './sqlite-memos.ts';
import { Queues } from './sqlite-queues.ts';
import type { Node } from './sqlite-nodes.ts';
import { Specs } from './sqlite-specs.ts';
import { isoTime, isoTimeOrNull } from './time.ts';

/** Jobs kept in memory between transactions. */
const KEPT_JOBS = 16_384;

const TASK_COLUMNS = `
  seq, state, attempts, node_faults, drains, node_id, lease_no, leased_at, lease_expires_at, last_heartbeat_at, not_before,
  cancel_requested_at, updated_at, reason, ending`;

const JOB_COLUMNS = `
  seq, id, domain_id, organization_id, priority, created_at, deadline_at, first_task, task_count, status, updated_at,
  cancel_requested_at, last_event, queued, leased, running, completed, failed, canceled`;

/** Columns of {@link JOB_COLUMNS}. */
const JOB_WIDTH = 19;

/** Neighbours of one job that completed at one time: rows still to be written. */
interface CompletedRun {
  readonly jobSeq: number;
  readonly ending: number;
  readonly at: number;
  readonly firstTask: number;
  lastTask: number;
}

/** What a node has taken of what it has. */
export interface Room {
  readonly usage: Usage;
  /** It was not given something for lack of room, and shall be as soon as there is more. */
  wanted: boolean;
}

export class Ledger {
  readonly options: WorkOptions;
  readonly queues: Queues;
  readonly lanes: Lanes;
  readonly specs: Specs;
  readonly events: Events;
  readonly receipts: Receipts;
  readonly memos: Memos;
  readonly domains: Domains;
  readonly totals: { readonly tasks: Record<TaskStatus, number>; readonly jobs: Record<JobStatus, number> } =
    {
      tasks: emptyTasks(),
      jobs: emptyJobs(),
    };

  readonly #database: Database;
  readonly #sql: ReturnType<typeof prepare>;
  readonly #newJobs: BulkInsert;
  readonly #newJobTexts: BulkInsert;
  readonly #newWakes: BulkInsert;

  #now = 0;
  #nextJob = 1;
  #nextTask = 1;
  #nextLease = 0;
  /** By task id. */
  readonly #held = new Map<string, Task>();
  /** The same by the node that holds them. */
  readonly #heldBy = new Map<string, Set<Task>>();
  /** Of nodes that say what they have and asked for work, or were asked about, by their ids. */
  readonly #rooms = new Map<string, Room>();
  #completed: CompletedRun[] = [];
  /** By number, the first read first; those of the current transaction are all here. */
  readonly #jobs = new Map<number, Job>();
  /** By the part of the id that its tasks' ids share. */
  readonly #jobSeqs = new Map<string, number>();
  readonly #dirtyJobs: Job[] = [];

  #runnable = false;
  #canceledLeases: string[] = [];
  #changedJobs: string[] = [];

  constructor(database: Database, options: WorkOptions) {
    this.options = options;
    this.#database = database;
    this.#sql = prepare(database);
    this.queues = new Queues(database);
    this.lanes = new Lanes(database);
    this.specs = new Specs(database);
    this.events = new Events(database);
    this.receipts = new Receipts(database);
    this.memos = new Memos(database, options.items);
    this.domains = new Domains(database);
    this.#newJobs = new BulkInsert(database, 'jobs', JOB_COLUMNS.split(/[\s,]+/).slice(1));
    this.#newJobTexts = new BulkInsert(database, 'job_specs', ['job_seq', 'spec']);
    this.#newWakes = new BulkInsert(database, 'wakes', ['at', 'task_seq']);
  }

  /** The store's time during the current operation. */
  get now(): number {
    return this.#now;
  }

  /** Begins an operation. */
  begin(): void {
    this.#now = this.options.clock.now();
  }

  /** Reads the committed state. Before the first use and after every rollback. */
  load(): void {
    const sql = this.#sql;
    for (const bulk of [this.#newJobs, this.#newJobTexts, this.#newWakes]) bulk.clear();
    this.events.clear();
    this.receipts.clear();
    this.specs.clear();
    this.queues.load();
    this.lanes.load((id) => this.queues.get(id));
    this.memos.load();
    this.domains.load();
    this.#held.clear();
    this.#heldBy.clear();
    this.#rooms.clear();
    this.#completed = [];
    this.#jobs.clear();
    this.#jobSeqs.clear();
    this.#dirtyJobs.length = 0;
    this.takeNotes();
    const [lastJob, afterLastTask] = sql.lastJob.get() ?? [0, 1];
    this.#nextJob = Number(lastJob) + 1;
    this.#nextTask = Number(afterLastTask);
    // With the time in it a lease's id is new whatever number this begins with, unless the clock was set back.
    this.#nextLease = Math.floor(this.options.random() * (LEASE_NUMBERS / 2));
    for (const row of sql.heldTasks.all()) {
      const task = this.#taskOf(row);
      this.#hold(task);
      this.#occupy(task, this.job(task.jobSeq));
      this.queues.count(task.spec.queueId, task.state, 1);
    }
    const { tasks, jobs } = this.totals;
    const sums = sql.taskTotals.get() ?? [];
    TASK_STATUSES.forEach((status, index) => (tasks[status] = Number(sums[index] ?? 0)));
    Object.assign(jobs, emptyJobs());
    for (const [status, count] of sql.jobTotals.all()) jobs[status as JobStatus] = count as number;
  }

  /** Writes what the transaction has left to write. */
  flush(): void {
    for (const job of this.#dirtyJobs) {
      job.dirty = false;
      this.#collectJob(job);
      this.#changedJobs.push(job.id);
    }
    this.#dirtyJobs.length = 0;
    this.#writeRows();
    this.lanes.tidy();
    for (const [seq, job] of this.#jobs) {
      if (this.#jobs.size <= KEPT_JOBS) break;
      this.#jobs.delete(seq);
      this.#jobSeqs.delete(job.taskIds.prefix);
    }
  }

  /** Makes what was only noted so far visible to statements. */
  flushRows(): void {
    for (const job of this.#dirtyJobs) this.receipts.collect(job);
    this.#writeRows();
  }

  /** What the committed transaction changed; from then on nothing. */
  takeNotes(): {
    readonly runnable: boolean;
    readonly jobIds: readonly string[];
    readonly leaseIds: readonly string[];
  } {
    const notes = { runnable: this.#runnable, jobIds: this.#changedJobs, leaseIds: this.#canceledLeases };
    this.#runnable = false;
    this.#changedJobs = [];
    this.#canceledLeases = [];
    return notes;
  }

  /** Whether the transaction under way has made tasks runnable. */
  get madeRunnable(): boolean {
    return this.#runnable;
  }

  // ---- Jobs ---------------------------------------------------------------------------------------------------

  /** The number of the next job. */
  get nextJob(): number {
    return this.#nextJob;
  }

  /** The number of the next task. */
  get nextTask(): number {
    return this.#nextTask;
  }

  /** Takes up a new job, whose tasks are all queued. Its numbers are given here. */
  addJob(
    fields: Pick<Job, 'domainId' | 'organizationId' | 'priority' | 'deadlineAt' | 'taskCount'> & {
      readonly traceparent: string | null;
    },
    text: JobText,
  ): Job {
    const { domainId, organizationId, priority, deadlineAt, taskCount, traceparent } = fields;
    const id = this.options.newId();
    const job: Job = {
      seq: this.#nextJob++,
      id,
      taskIds: taskIdsOf(id),
      domainId,
      organizationId,
      priority,
      createdAt: this.#now,
      deadlineAt,
      firstTask: this.#nextTask,
      taskCount,
      status: 'pending',
      updatedAt: this.#now,
      cancelRequestedAt: null,
      lastEvent: 0,
      counts: { ...emptyTasks(), queued: taskCount },
      traceparent,
      isNew: true,
      dirty: false,
      events: new PendingEvents(),
      receipts: new PendingReceipts(),
      stages: new Map(),
    };
    this.#nextTask += taskCount;
    this.#cacheJob(job);
    this.totals.jobs.pending += 1;
    this.totals.tasks.queued += taskCount;
    this.#newJobTexts.add(job.seq, JSON.stringify(text));
    return job;
  }

  job(seq: number): Job {
    const known = this.#jobs.get(seq);
    if (known) return known;
    const row = this.#sql.jobBySeq.get(seq);
    if (!row) throw new MillraceError('internal', `job number ${seq} does not exist`);
    return this.#cacheJob(jobOf(row));
  }

  jobById(id: string): Job | null {
    const seq = this.#jobSeqs.get(prefixOf(id)) ?? this.#sql.jobSeq.get(id)?.[0];
    if (seq === undefined) return null;
    const job = this.job(seq as number);
    return job.id === id ? job : null;
  }

  jobText(job: Job): JobText {
    return JSON.parse(String(this.#sql.jobText.get(job.seq)?.[0])) as JobText;
  }

  traceparent(job: Job): string | null {
    if (job.traceparent === undefined) job.traceparent = this.jobText(job).traceparent ?? null;
    return job.traceparent;
  }

  /** Jobs with numbers from `bottom` to below `top`, the newest first. */
  *jobsBetween(
    top: number,
    bottom: number,
    domainId: string | null,
    status: JobStatus | null,
  ): Generator<{ readonly job: Job; readonly text: JobText }> {
    for (const row of this.#sql.jobsBetween.all(top, bottom, domainId, status)) {
      yield { job: jobOf(row), text: JSON.parse(String(row[JOB_WIDTH])) as JobText };
    }
  }

  /** Jobs with numbers above `after`, the oldest first, as far as it takes to tell whether they are to be kept. */
  jobsAfter(
    after: number,
    limit: number,
  ): {
    readonly seq: number;
    readonly status: JobStatus;
    readonly createdAt: number;
    readonly updatedAt: number;
  }[] {
    return this.#sql.jobsAfter.all(after, limit).map(([seq, status, createdAt, updatedAt]) => ({
      seq: seq as number,
      status: status as JobStatus,
      createdAt: createdAt as number,
      updatedAt: updatedAt as number,
    }));
  }

  /** Jobs with numbers from `bottom` to below `top` in which a task failed, the newest first. */
  jobsFailed(top: number, bottom: number, domainId: string | null): Job[] {
    return this.#sql.jobsFailed.all(top, bottom, domainId).map(jobOf);
  }

  /** The number of the job that has the task before this one; 0: none has. */
  jobBefore(taskSeq: number): number {
    return Number(this.#sql.jobBefore.get(taskSeq)?.[0] ?? 0);
  }

  /** The first task of the first job from this number on; null: there is none. */
  firstTaskFrom(jobSeq: number): number | null {
    return (this.#sql.firstTaskFrom.get(jobSeq)?.[0] ?? null) as number | null;
  }

  setStatus(job: Job, status: Exclude<JobStatus, 'pending'>): void {
    this.totals.jobs[job.status] -= 1;
    this.totals.jobs[status] += 1;
    job.status = status;
    this.emit(job, `job.${status}`, null);
  }

  /** Removes the job and all of its tasks, none of which is held. */
  deleteJob(job: Job): void {
    this.flushRows();
    const sql = this.#sql;
    const [first, last] = [job.firstTask, job.firstTask + job.taskCount - 1];
    if (job.counts.queued > 0) {
      const tasks = this.tasksOf(job);
      for (const { seq, wakeAt: at } of tasks) if (at !== null) sql.deleteWake.run(at, seq);
      this.leaveQueues(job, tasks);
      for (const { state, spec } of tasks) this.queues.count(spec.queueId, state, -1);
    }
    for (const status of TASK_STATUSES) this.totals.tasks[status] -= job.counts[status];
    this.totals.jobs[job.status] -= 1;
    this.memos.forget(job);
    this.specs.delete(first, last);
    this.events.delete(job);
    this.receipts.delete(job);
    for (const statement of sql.deleteTasks) statement.run(first, last);
    for (const statement of sql.deleteJob) statement.run(job.seq);
    this.#jobs.delete(job.seq);
    this.#jobSeqs.delete(job.taskIds.prefix);
    const dirty = this.#dirtyJobs.indexOf(job);
    if (dirty !== -1) this.#dirtyJobs.splice(dirty, 1);
    this.#changedJobs.push(job.id);
  }

  /** Appends an event of the job, or of its task with this number. `data` is JSON; empty is `{}`. */
  emit(job: Job, kind: EventKind, taskSeq: number | null, data = ''): void {
    this.events.add(this.#now, job, kind, taskSeq, data);
    this.#touch(job);
  }

  // ---- Stages -------------------------------------------------------------------------------------------------

  addStage(job: Job, name: string, stage: Stage): void {
    const { no, firstTask, lastTask, remaining, depsRemaining } = stage;
    this.#sql.insertStage.run(job.seq, no, name, firstTask, lastTask, remaining, depsRemaining);
  }

  addEdge(job: Job, from: Stage, to: Stage): void {
    this.#sql.insertEdge.run(job.seq, from.no, to.no);
  }

  /** To be changed: it is written at the end of the transaction. */
  stage(job: Job, no: number): Stage {
    const known = job.stages.get(no);
    if (known) return known;
    const row = this.#sql.stage.get(job.seq, no);
    if (!row) throw new MillraceError('internal', `job ${job.id} has no stage number ${no}`);
    const stage = stageOf(row);
    job.stages.set(no, stage);
    return stage;
  }

  stageNamed(job: Job, name: string): Stage | null {
    const row = this.#sql.stageByName.get(job.seq, name);
    return row ? stageOf(row) : null;
  }

  stagesAfter(job: Job, no: number): number[] {
    return this.#sql.nextStages.all(job.seq, no).map(([next]) => next as number);
  }

  /** Preceding stages of a task that are not complete. */
  depsRemaining(job: Job, { spec }: Task): number {
    return spec.stage === 0 ? 0 : this.#peekStage(job, spec.stage).depsRemaining;
  }

  // ---- Tasks --------------------------------------------------------------------------------------------------

  held(id: string): Task | undefined {
    return this.#held.get(id);
  }

  allHeld(): Iterable<Task> {
    return this.#held.values();
  }

  heldBy(nodeId: string): ReadonlySet<Task> | undefined {
    return this.#heldBy.get(nodeId);
  }

  /** What the node has taken; null: it does not say what it has, and any number fits. */
  room({ id, resources }: Node): Room | null {
    if (resources === null) return null;
    let room = this.#rooms.get(id);
    if (room?.usage.capacity !== resources) {
      room = { usage: new Usage(resources), wanted: false };
      for (const { spec } of this.#heldBy.get(id) ?? []) {
        room.usage.add(this.queues.get(spec.queueId).resources);
      }
      this.#rooms.set(id, room);
    }
    return room;
  }

  taskById(id: string): Task | null {
    const held = this.#held.get(id);
    if (held) return held;
    const prefix = prefixOf(id);
    const seq =
      this.#jobSeqs.get(prefix) ?? this.#sql.jobLike.get(`${prefix}00000000`, `${prefix}ffffffff`)?.[0];
    if (seq === undefined) return null;
    const job = this.job(seq as number);
    const index = taskIndex(job.taskIds, id);
    if (index >= job.taskCount || taskId(job.taskIds, index) !== id) return null;
    return this.taskBySeq(job.firstTask + index);
  }

  taskBySeq(seq: number): Task {
    const row = this.#sql.task.get(seq);
    if (row) return this.#taskOf(row);
    const { jobSeq } = this.specs.get(seq);
    return this.#waitingTask(this.job(jobSeq), seq, this.specs.getResolved(seq));
  }

  /** A task that waits as it was submitted and may be leased. */
  freshTask(seq: number): Task {
    const { jobSeq } = this.specs.get(seq);
    return newTask(this.job(jobSeq), seq, this.specs.getResolved(seq), 'ready', this.#now);
  }

  /** The tasks of a job from one number to another, in their order; those held are the ones in memory. */
  tasksOf(job: Job, first = job.firstTask, last = job.firstTask + job.taskCount - 1): Task[] {
    const specs = this.specs.between(first, last);
    const rows = this.#sql.tasks.all(first, last);
    let at = 0;
    return specs.map((spec, index) => {
      const seq = first + index;
      const row = rows[at];
      if (row?.[0] !== seq) return this.#waitingTask(job, seq, spec);
      at += 1;
      const task = taskOf(job, spec, row);
      return isHeld(task.state) ? (this.#held.get(task.id) ?? task) : task;
    });
  }

  /** A new task that waits for its time. Unlike others it gets a row at once, and is noted for the sweeper. */
  addDelayed(job: Job, seq: number, spec: Spec): void {
    const task = newTask(job, seq, spec, 'delayed', this.#now);
    task.notBefore = spec.notBefore;
    task.wakeAt = null;
    this.queues.count(spec.queueId, 'delayed', 1);
    this.save(task);
  }

  /** Notes new tasks for the sweeper. */
  addWake(at: number, seq: number): void {
    this.#newWakes.add(at, seq);
  }

  /** Queued tasks the sweeper must look at by `now`, with when; at most `limit`, the earliest first. */
  dueWakes(now: number, limit: number): { readonly at: number; readonly seq: number }[] {
    return this.#sql.due.all(now, limit).map(([at, seq]) => ({ at: at as number, seq: seq as number }));
  }

  /** When the sweeper must look next, if at all. */
  nextWake(): number | null {
    let next = (this.#sql.nextWake.get()?.[0] ?? null) as number | null;
    for (const task of this.#held.values()) {
      const at = wakeAt(task);
      if (at !== null && (next === null || at < next)) next = at;
    }
    return next;
  }

  /** Changes the state and every count that follows from it. */
  move(task: Task, job: Job, state: TaskState): void {
    const from = taskStatus(task.state);
    const to = taskStatus(state);
    job.counts[from] -= 1;
    job.counts[to] += 1;
    this.totals.tasks[from] -= 1;
    this.totals.tasks[to] += 1;
    const { queueId } = task.spec;
    this.queues.count(queueId, task.state, -1);
    this.queues.count(queueId, state, 1);
    task.state = state;
  }

  /** Puts a task that became ready where nodes find it. `fresh`: it has no row of its own yet. */
  enqueue(job: Job, { queueId, concurrency, priority }: Spec, seq: number, fresh: boolean): void {
    const queue = this.queues.get(queueId);
    if (this.lanes.add(queue, job.domainId, concurrency, priority, seq, this.#now, fresh)) {
      this.#runnable = true;
    }
  }

  /** Takes those of a job's tasks from one number to another that wait like this one out of their lane. */
  dequeue(job: Job, { queueId, concurrency, priority }: Spec, firstTask: number, lastTask: number): void {
    this.lanes.remove(this.queues.get(queueId), job.domainId, concurrency, priority, firstTask, lastTask);
  }

  /** Tasks that come before one that is ready. */
  ahead(
    job: Job,
    { queueId, priority }: Spec,
    seq: number,
  ): { readonly higherPriority: number; readonly older: number } {
    const queues = this.queues.sharing(this.queues.get(queueId));
    return this.lanes.ahead(queues, job.domainId, priority, seq);
  }

  domainStandings(): DomainStanding[] {
    const standings = new Map<string, { ready: number; held: number }>();
    const of = (domainId: string): { ready: number; held: number } => {
      let standing = standings.get(domainId);
      if (!standing) {
        standing = { ready: 0, held: 0 };
        standings.set(domainId, standing);
      }
      return standing;
    };
    for (const domainId of this.domains.weighted()) of(domainId);
    for (const { shelves } of this.queues.all()) {
      for (const { domainId, ready } of shelves.values()) if (ready > 0) of(domainId).ready += ready;
    }
    for (const { jobSeq } of this.#held.values()) of(this.job(jobSeq).domainId).held += 1;
    return [...standings]
      .toSorted(([a], [b]) => (a < b ? -1 : 1))
      .map(([domain_id, { ready, held }]) => ({
        domain_id,
        weight: this.domains.weight(domain_id),
        ready,
        held,
      }));
  }

  /** Writes a task's row. */
  save(task: Task): void {
    task.updatedAt = this.#now;
    this.#sql.saveTask.run(
      task.seq,
      task.state,
      task.attempts,
      task.nodeFaults,
      task.drains,
      task.nodeId,
      task.leaseNo,
      task.leasedAt,
      task.leaseExpiresAt,
      task.lastHeartbeatAt,
      task.notBefore,
      task.cancelRequestedAt,
      task.updatedAt,
      task.reason,
      task.ending,
    );
    this.#saveWake(task);
  }

  /** Like {@link save} for what a heartbeat changes. */
  saveHeartbeat(task: Task): void {
    task.updatedAt = this.#now;
    this.#sql.saveHeartbeat.run(task.state, task.leaseExpiresAt, task.updatedAt, task.seq);
  }

  /** Takes those of a job's tasks that are ready out of their lanes. They are still to be moved on. */
  leaveQueues(job: Job, tasks: readonly Task[]): void {
    const left = new Set<string>();
    const last = job.firstTask + job.taskCount - 1;
    for (const { state, spec } of tasks) {
      const { concurrency } = spec;
      const key = `${spec.queueId} ${spec.priority} ${concurrency === null ? '' : `${concurrency.limit} ${concurrency.key}`}`;
      if (state !== 'ready' || left.has(key)) continue;
      left.add(key);
      this.dequeue(job, spec, job.firstTask, last);
    }
  }

  // ---- Leases -------------------------------------------------------------------------------------------------

  /**
   * Gives tasks to a node that were picked for it (`sqlite-picking.ts`). `fresh`: those without a row, in the order of which
   * their leases are numbered; written together that takes a tenth of the time.
   */
  grant(fresh: readonly Task[], others: readonly Task[], nodeId: string, state: 'leased' | 'running'): void {
    const firstLease = this.#nextLease;
    for (const tasks of [fresh, others]) for (const task of tasks) this.#grantOne(task, nodeId, state);
    if (fresh.length === 1) for (const task of fresh) this.save(task);
    else if (fresh.length > 1) {
      const expiresAt = this.#now + this.options.leaseTtlMs;
      const seqs = `[${fresh.map(({ seq }) => seq).join(',')}]`;
      this.#sql.saveGranted.run(state, nodeId, firstLease, this.#now, expiresAt, seqs);
      for (const task of fresh) this.#saveWake(task);
    }
    for (const task of others) this.save(task);
  }

  #grantOne(task: Task, nodeId: string, state: 'leased' | 'running'): void {
    const now = this.#now;
    const job = this.job(task.jobSeq);
    const no = this.#nextLease++;
    task.attempts += 1;
    task.leaseNo = no;
    task.leasedAt = now;
    task.leaseId = leaseId(now, no);
    task.nodeId = nodeId;
    task.leaseExpiresAt = now + this.options.leaseTtlMs;
    task.lastHeartbeatAt = null;
    task.notBefore = null;
    task.updatedAt = now;
    this.move(task, job, state);
    this.#hold(task);
    if (job.status === 'pending') this.setStatus(job, 'running');
    this.events.addLeased(now, job, task);
    this.#touch(job);
  }

  /** Ends the lease and writes its receipt. The caller moves the task on. */
  endLease(
    task: Task,
    job: Job,
    outcome: AttemptOutcome,
    reason: string | null,
    outputs: string,
    meta: string,
  ): string {
    const id = task.leaseId ?? '';
    this.receipts.add(this.#now, job, task, outcome, outputs, meta, reason);
    this.#touch(job);
    this.#held.delete(task.id);
    const nodeId = task.nodeId ?? '';
    this.#vacate(task, job, nodeId);
    const others = this.#heldBy.get(nodeId);
    others?.delete(task);
    if (others?.size === 0) {
      this.#heldBy.delete(nodeId);
      this.#rooms.delete(nodeId);
    }
    task.leaseId = null;
    task.leaseNo = null;
    task.leasedAt = null;
    task.nodeId = null;
    task.leaseExpiresAt = null;
    return id;
  }

  /** Gives a queued task back to the node whose lease on it, the newest, expired: as if it had not. */
  resume(task: Task, job: Job, { leaseId: id, leaseNo, leasedAt, nodeId }: Attempt): void {
    const { seq, spec } = task;
    if (task.state === 'ready') this.dequeue(job, spec, seq, seq);
    this.receipts.remove(job, task);
    Object.assign(task, resume(task), { leaseId: id, leaseNo, leasedAt, nodeId });
    task.leaseExpiresAt = this.#now + this.options.leaseTtlMs;
    task.notBefore = null;
    task.reason = null;
    this.move(task, job, 'running');
    this.#hold(task);
    this.#occupy(task, job);
    this.save(task);
    const data = { node_id: nodeId, attempt: task.attempts, lease_id: id };
    this.emit(job, 'task.resumed', seq, JSON.stringify(data));
  }

  /**
   * Writes a receipt for a task that has left its queue and was completed without having been leased. `nodeId` is who did
   * equal work before; the receipt's lease was never anybody's. The caller moves the task on.
   */
  receipt(task: Task, job: Job, nodeId: string, outputs: string, meta: string): void {
    task.leaseNo = this.#nextLease++;
    task.leasedAt = this.#now;
    task.nodeId = nodeId;
    this.receipts.add(this.#now, job, task, 'completed', outputs, meta, null);
    this.#touch(job);
    task.leaseNo = null;
    task.leasedAt = null;
    task.nodeId = null;
  }

  /** Like {@link save} for a task that completed, but together with its neighbours. */
  saveCompleted(task: Task): void {
    const { seq, jobSeq, ending } = task;
    this.#database.noteWrite();
    const last = this.#completed.at(-1);
    if (
      last?.lastTask === seq - 1 &&
      last.jobSeq === jobSeq &&
      last.ending === ending &&
      last.at === this.#now
    ) {
      last.lastTask = seq;
    } else this.#completed.push({ jobSeq, ending, at: this.#now, firstTask: seq, lastTask: seq });
  }

  /** Notes for those who work under the lease that they should end. */
  noteCanceled(task: Task): void {
    this.#canceledLeases.push(task.leaseId ?? '');
  }

  // ---- Records ------------------------------------------------------------------------------------------------

  jobRecord(job: Job, text: JobText): JobRecord {
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
      ...(text.cache === true && { cache: true }),
      ...(text.not_before !== undefined && { not_before: text.not_before }),
      ...(text.redrive_of !== undefined && { redrive_of: text.redrive_of }),
    };
  }

  /** A task as it was submitted. */
  submission(spec: Spec): TaskSubmission {
    const queue = this.queues.get(spec.queueId);
    return {
      label: spec.label,
      stage: spec.stageName,
      capability: queue.capability,
      capability_filters: queue.filters,
      priority: spec.priority,
      inputs_cids: spec.inputs,
      outputs_prefix: spec.outputsPrefix,
      mode: queue.mode,
      meta: spec.meta,
      max_attempts: spec.maxAttempts,
      deadline_at: isoTimeOrNull(spec.deadlineAt),
      ...(spec.notBefore !== null && { not_before: isoTime(spec.notBefore) }),
      ...(spec.concurrency !== null && { concurrency: spec.concurrency }),
      ...(queue.resources !== null && { resources: queue.resources }),
    };
  }

  taskRecord(task: Task, job: Job, depsRemaining: number, outputs: readonly string[]): TaskRecord {
    const { spec } = task;
    const queue = this.queues.get(spec.queueId);
    return {
      id: task.id,
      job_id: job.id,
      label: spec.label,
      stage: spec.stageName,
      capability: queue.capability,
      capability_filters: queue.filters,
      status: taskStatus(task.state),
      deps_remaining: depsRemaining,
      priority: spec.priority,
      inputs_cids: spec.inputs,
      outputs_prefix: spec.outputsPrefix,
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
      ...(spec.concurrency !== null && { concurrency: spec.concurrency }),
      ...(queue.resources !== null && { resources: queue.resources }),
    };
  }

  /** For people: the label, which they chose, and the id, which is unique. */
  nameOf({ spec, id }: Task): string {
    return `${spec.label} (${id})`;
  }

  // ---- Small parts --------------------------------------------------------------------------------------------

  #touch(job: Job): void {
    job.updatedAt = this.#now;
    if (job.dirty) return;
    job.dirty = true;
    this.#dirtyJobs.push(job);
  }

  #cacheJob(job: Job): Job {
    this.#jobs.set(job.seq, job);
    this.#jobSeqs.set(job.taskIds.prefix, job.seq);
    return job;
  }

  #hold(task: Task): void {
    const nodeId = task.nodeId ?? '';
    this.#held.set(task.id, task);
    const others = this.#heldBy.get(nodeId);
    if (others) others.add(task);
    else this.#heldBy.set(nodeId, new Set([task]));
  }

  /** Counts a task that came to be held in another way than by being picked. */
  #occupy(task: Task, job: Job): void {
    const { concurrency, queueId } = task.spec;
    if (concurrency !== null) this.lanes.hold(job.domainId, concurrency, 1);
    if (this.#rooms.size === 0) return;
    this.#rooms.get(task.nodeId ?? '')?.usage.add(this.queues.get(queueId).resources);
  }

  /** Counts a task that is no longer held. Who waited for that is to be asked again. */
  #vacate(task: Task, job: Job, nodeId: string): void {
    const { concurrency, queueId } = task.spec;
    if (concurrency !== null && this.lanes.hold(job.domainId, concurrency, -1)) this.#runnable = true;
    if (this.#rooms.size === 0) return;
    const room = this.#rooms.get(nodeId);
    if (!room) return;
    room.usage.remove(this.queues.get(queueId).resources);
    if (room.wanted) this.#runnable = true;
    room.wanted = false;
  }

  #collectJob(job: Job): void {
    const { counts } = job;
    this.events.collect(job);
    this.receipts.collect(job);
    for (const stage of job.stages.values()) {
      this.#sql.saveStage.run(stage.remaining, stage.depsRemaining, stage.openedAt, job.seq, stage.no);
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
    this.#sql.saveJob.run(
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

  #writeRows(): void {
    this.#newJobs.flush();
    this.#newJobTexts.flush();
    this.specs.flush();
    this.queues.flush();
    this.lanes.flush();
    this.#newWakes.flush();
    this.events.flush();
    this.receipts.flush();
    for (const { at, ending, firstTask, lastTask } of this.#completed) {
      this.#sql.saveCompleted(at, ending, firstTask, lastTask);
    }
    this.#completed = [];
  }

  #saveWake(task: Task): void {
    const at = queuedWakeAt(task);
    if (at === task.wakeAt) return;
    if (task.wakeAt !== null) this.#sql.deleteWake.run(task.wakeAt, task.seq);
    if (at !== null) this.#sql.insertWake.run(at, task.seq);
    task.wakeAt = at;
  }

  /** Without noting it as changed. */
  #peekStage(job: Job, no: number): Stage {
    const known = job.stages.get(no);
    if (known) return known;
    const row = this.#sql.stage.get(job.seq, no);
    if (!row) throw new MillraceError('internal', `job ${job.id} has no stage number ${no}`);
    return stageOf(row);
  }

  /** A task without a row. */
  #waitingTask(job: Job, seq: number, spec: Spec): Task {
    if (spec.stage === 0) return newTask(job, seq, spec, 'ready', job.createdAt);
    const { depsRemaining, openedAt } = this.#peekStage(job, spec.stage);
    const state = depsRemaining > 0 ? 'blocked' : 'ready';
    return newTask(job, seq, spec, state, openedAt ?? job.createdAt);
  }

  #taskOf(row: Row): Task {
    const seq = row[0] as number;
    const { jobSeq } = this.specs.get(seq);
    return taskOf(this.job(jobSeq), this.specs.getResolved(seq), row);
  }
}

function newTask(job: Job, seq: number, spec: Spec, state: TaskState, updatedAt: number): Task {
  return {
    seq,
    id: taskId(job.taskIds, seq - job.firstTask),
    jobSeq: job.seq,
    spec,
    maxAttempts: spec.maxAttempts,
    deadlineAt: spec.deadlineAt,
    state,
    attempts: 0,
    nodeFaults: 0,
    drains: 0,
    leaseId: null,
    leaseNo: null,
    leasedAt: null,
    nodeId: null,
    leaseExpiresAt: null,
    lastHeartbeatAt: null,
    notBefore: state === 'blocked' ? spec.notBefore : null,
    cancelRequestedAt: null,
    updatedAt,
    reason: null,
    ending: 0,
    wakeAt: spec.deadlineAt,
    report: null,
  };
}

function taskOf(job: Job, spec: Spec, row: Row): Task {
  const task = newTask(job, row[0] as number, spec, row[1] as TaskState, row[12] as number);
  task.attempts = row[2] as number;
  task.nodeFaults = row[3] as number;
  task.drains = row[4] as number;
  task.nodeId = row[5] as string | null;
  task.leaseNo = row[6] as number | null;
  task.leasedAt = row[7] as number | null;
  if (task.leaseNo !== null && task.leasedAt !== null) task.leaseId = leaseId(task.leasedAt, task.leaseNo);
  task.leaseExpiresAt = row[8] as number | null;
  task.lastHeartbeatAt = row[9] as number | null;
  task.notBefore = row[10] as number | null;
  task.cancelRequestedAt = row[11] as number | null;
  task.reason = row[13] as string | null;
  task.ending = row[14] as number;
  task.wakeAt = queuedWakeAt(task);
  return task;
}

function stageOf([no, firstTask, lastTask, remaining, depsRemaining, openedAt]: Row): Stage {
  return {
    no: no as number,
    firstTask: firstTask as number,
    lastTask: lastTask as number,
    remaining: remaining as number,
    depsRemaining: depsRemaining as number,
    openedAt: openedAt as number | null,
  };
}

function jobOf(row: Row): Job {
  const id = row[1] as string;
  return {
    seq: row[0] as number,
    id,
    taskIds: taskIdsOf(id),
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
    traceparent: undefined,
    isNew: false,
    dirty: false,
    events: new PendingEvents(),
    receipts: new PendingReceipts(),
    stages: new Map(),
  };
}

export function summaryOf({ counts }: Job): TasksSummary {
  return { ...counts };
}

function prepare(database: Database) {
  const sql = (text: string): Statement => database.prepare(text);
  const stage = 'SELECT stage, first_task, last_task, remaining, deps_remaining, opened_at FROM stages';
  return {
    lastJob: sql('SELECT seq, first_task + task_count FROM jobs ORDER BY seq DESC LIMIT 1'),
    heldTasks: sql(`
      SELECT ${TASK_COLUMNS} FROM tasks WHERE seq IN (
        SELECT tasks.seq FROM jobs JOIN tasks ON tasks.seq BETWEEN first_task AND first_task + task_count - 1
        WHERE leased + running > 0 AND state IN ('leased', 'running')
      ) ORDER BY seq`),
    taskTotals: sql(
      'SELECT total(queued), total(leased), total(running), total(completed), total(failed), total(canceled) FROM jobs',
    ),
    jobTotals: sql('SELECT status, count(*) FROM jobs GROUP BY status'),

    jobBySeq: sql(`SELECT ${JOB_COLUMNS} FROM jobs WHERE seq = ?`),
    jobSeq: sql('SELECT seq FROM jobs WHERE id = ?'),
    jobLike: sql('SELECT seq FROM jobs WHERE id BETWEEN ? AND ? LIMIT 1'),
    jobText: sql('SELECT spec FROM job_specs WHERE job_seq = ?'),
    jobsBetween: sql(`
      SELECT ${JOB_COLUMNS}, spec FROM jobs JOIN job_specs ON job_seq = seq
      WHERE seq < ?1 AND seq >= ?2 AND (?3 IS NULL OR domain_id = ?3) AND (?4 IS NULL OR status = ?4)
      ORDER BY seq DESC`),
    jobsAfter: sql('SELECT seq, status, created_at, updated_at FROM jobs WHERE seq > ? ORDER BY seq LIMIT ?'),
    jobBefore: sql('SELECT job_seq FROM task_specs WHERE first_task < ? ORDER BY first_task DESC LIMIT 1'),
    firstTaskFrom: sql('SELECT first_task FROM jobs WHERE seq >= ? ORDER BY seq LIMIT 1'),
    jobsFailed: sql(`
      SELECT ${JOB_COLUMNS} FROM jobs WHERE seq < ?1 AND seq >= ?2 AND failed > 0 AND (?3 IS NULL OR domain_id = ?3)
      ORDER BY seq DESC`),
    saveJob: sql(`
      UPDATE jobs SET status = ?, updated_at = ?, cancel_requested_at = ?, last_event = ?, queued = ?, leased = ?,
        running = ?, completed = ?, failed = ?, canceled = ?
      WHERE seq = ?`),
    deleteTasks: [
      sql('DELETE FROM tasks WHERE seq BETWEEN ? AND ?'),
      sql('DELETE FROM task_reports WHERE task_seq BETWEEN ? AND ?'),
    ],
    deleteJob: [
      sql('DELETE FROM stages WHERE job_seq = ?'),
      sql('DELETE FROM stage_edges WHERE job_seq = ?'),
      sql('DELETE FROM submissions WHERE job_seq = ?'),
      sql('DELETE FROM redrives WHERE job_seq = ?'),
      sql('DELETE FROM job_specs WHERE job_seq = ?'),
      sql('DELETE FROM jobs WHERE seq = ?'),
    ],

    insertStage: sql(`
      INSERT INTO stages (job_seq, stage, name, first_task, last_task, remaining, deps_remaining)
      VALUES (?, ?, ?, ?, ?, ?, ?)`),
    insertEdge: sql('INSERT INTO stage_edges (job_seq, from_stage, to_stage) VALUES (?, ?, ?)'),
    stage: sql(`${stage} WHERE job_seq = ? AND stage = ?`),
    stageByName: sql(`${stage} WHERE job_seq = ? AND name = ?`),
    nextStages: sql(
      'SELECT to_stage FROM stage_edges WHERE job_seq = ? AND from_stage = ? ORDER BY to_stage',
    ),
    saveStage: sql(
      'UPDATE stages SET remaining = ?, deps_remaining = ?, opened_at = ? WHERE job_seq = ? AND stage = ?',
    ),

    task: sql(`SELECT ${TASK_COLUMNS} FROM tasks WHERE seq = ?`),
    tasks: sql(`SELECT ${TASK_COLUMNS} FROM tasks WHERE seq BETWEEN ? AND ? ORDER BY seq`),
    saveTask: sql(`
      REPLACE INTO tasks (${TASK_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`),
    saveHeartbeat: sql(`
      UPDATE tasks SET state = ?1, lease_expires_at = ?2, last_heartbeat_at = ?3, updated_at = ?3 WHERE seq = ?4`),
    // key counts the values from 0.
    saveGranted: sql(`
      INSERT INTO tasks (seq, state, attempts, node_faults, drains, node_id, lease_no, leased_at, lease_expires_at,
        updated_at, ending)
      SELECT value, ?1, 1, 0, 0, ?2, ?3 + key, ?4, ?5, ?4, 0 FROM json_each(?6)`),
    saveCompleted: database.prepareCounted(`
      UPDATE tasks SET state = 'completed', node_id = NULL, lease_no = NULL, leased_at = NULL, lease_expires_at = NULL,
        updated_at = ?1, reason = NULL, ending = ?2
      WHERE seq BETWEEN ?3 AND ?4`),

    insertWake: sql('INSERT INTO wakes (at, task_seq) VALUES (?, ?)'),
    deleteWake: sql('DELETE FROM wakes WHERE at = ? AND task_seq = ?'),
    due: sql('SELECT at, task_seq FROM wakes WHERE at <= ? ORDER BY at, task_seq LIMIT ?'),
    nextWake: sql('SELECT min(at) FROM wakes'),
  };
}
