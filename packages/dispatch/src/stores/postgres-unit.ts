/**
 * One transaction's view of jobs and tasks: the rules of `lifecycle.ts` applied to rows that were read and locked, and what
 * they changed, written by a handful of statements at the end however many tasks it was.
 *
 * **Locks.** Three rules keep any number of dispatchers from waiting for each other in a circle:
 * 1. A task that is ready or held is changed only by who has locked its row; any task only by who also has locked its job,
 *    except that a heartbeat extends a lease without the job.
 * 2. Order: nodes, then ranges of tasks that were never leased, then tasks by (job, no), then jobs by number, then keys of limits
 *    by number. Leasing skips ranges and tasks that others have locked.
 * 3. Who holds a job waits for no range and no task: further ones of it are taken without waiting, and when one is busy the
 *    transaction starts over, this time taking all open ones of that job before the job ({@link Unit.isWide}).
 */
import { MillraceError, truncateUtf8 } from '@millrace/runner';
import type { Json, Random } from '@millrace/runner';
import { JOB_LIMITS, isStageReference, parseStageReference } from '../job-spec.ts';
import {
  backoffMs,
  expiryAfterSetback,
  isFinal,
  isHeld,
  jobStatus,
  judge,
  resume,
  taskStatus,
  wakeAt,
} from '../lifecycle.ts';
import type { Backoff, Ending, TaskState } from '../lifecycle.ts';
import type { AttemptOutcome, JobStatus } from '../records.ts';
import type { LeaseRef, StoreChange } from '../store.ts';
import { taskId, taskIdsOf } from './ids.ts';
import type { TaskIds } from './ids.ts';
import { EventBuffer } from './job-events.ts';
import type { EventKind } from './job-events.ts';
import { sql } from './postgres-database.ts';
import type { Database, Transaction } from './postgres-database.ts';
import { SqlError } from './postgres-errors.ts';
import { Memos } from './postgres-memos.ts';
import type { Queues } from './postgres-queues.ts';
import {
  BLOCK,
  JOB_COLUMNS,
  OPEN_COLUMNS,
  RUN_COLUMNS,
  blockOf,
  columns,
  countsOf,
  endingText,
  endingsOf,
  keepLine,
  lineOf,
  linesOf,
  parseLine,
  setLine,
  specAt,
  storable,
  taskIdOf,
} from './postgres-rows.ts';
import type { Attempt, Job, Line, Place, Run, Task } from './postgres-rows.ts';
import { StageOutputs } from './stage-inputs.ts';
import { KeyChanges } from './postgres-limits.ts';
import type { Names } from './postgres-names.ts';
import { isoTime } from './time.ts';

export interface WorkSettings {
  readonly random: Random;
  readonly newId: () => string;
  readonly leaseTtlMs: number;
  readonly cancelGraceMs: number;
  readonly backoff: Backoff;
  readonly queues: Queues;
  readonly names: Names;
}

/** A row of `fresh`, locked. */
export interface Range {
  readonly laneId: number;
  readonly rank: number;
  readonly jobSeq: number;
  readonly firstNo: number;
  readonly lastNo: number;
  readonly since: number;
}

interface Stage {
  readonly jobSeq: number;
  readonly stage: number;
  readonly firstTask: number;
  readonly lastTask: number;
  /** Tasks not completed. */
  remaining: number;
  /** Preceding stages not completed. */
  depsRemaining: number;
}

type StageTasks = Pick<Stage, 'stage' | 'firstTask' | 'lastTask'>;

interface Report {
  /** JSON. */
  progress: string;
  /** JSON, the newest last. */
  readonly events: string[];
}

/** Events kept for a task's `meta.events`, and the bytes of JSON they may have together. */
const REPORTED_EVENTS = 20;
const REPORTED_EVENT_BYTES = 64 * 1024;

/** Ids that the `stage:` inputs of one stage may come to in all. */
const MAX_RESOLVED_PER_STAGE = 1_000_000;

/** The reference bounds a reason likewise. */
const MAX_REASON_BYTES = 4096;

const SPEC = specAt('o.job_seq', 'o.no');
const LOCK_TASKS = sql(`
  SELECT ${OPEN_COLUMNS} FROM unnest($1::bigint[], $2::integer[]) AS u (job_seq, no)
  JOIN open_tasks o ON o.job_seq = u.job_seq AND o.no = u.no ORDER BY o.job_seq, o.no FOR UPDATE OF o`);
const LOCK_TASKS_AT_ONCE = sql(`
  SELECT ${OPEN_COLUMNS} FROM unnest($1::bigint[], $2::integer[]) AS u (job_seq, no)
  JOIN open_tasks o ON o.job_seq = u.job_seq AND o.no = u.no ORDER BY o.job_seq, o.no FOR UPDATE OF o NOWAIT`);
const CLOSE_HELD = sql(`
  DELETE FROM open_tasks o USING unnest($1::bigint[], $2::integer[], $3::text[], $4::text[]) AS u (job_seq, no, node_id, lease_id)
  WHERE o.job_seq = u.job_seq AND o.no = u.no AND o.node_id = u.node_id AND (u.lease_id IS NULL OR o.lease_id = u.lease_id)
    AND o.cancel_requested_at IS NULL
  RETURNING ${OPEN_COLUMNS}`);
const LOCK_TASKS_WITH_SPEC = sql(`
  SELECT ${OPEN_COLUMNS}, ${SPEC} AS spec FROM unnest($1::bigint[], $2::integer[]) AS u (job_seq, no)
  JOIN open_tasks o ON o.job_seq = u.job_seq AND o.no = u.no ORDER BY o.job_seq, o.no FOR UPDATE OF o`);
const LOCK_TASKS_WIDE = sql(`
  SELECT ${OPEN_COLUMNS}, ${SPEC} AS spec FROM open_tasks o
  WHERE (o.job_seq, o.no) IN (SELECT * FROM unnest($1::bigint[], $2::integer[])) OR o.job_seq = ANY($3::bigint[])
  ORDER BY o.job_seq, o.no FOR UPDATE OF o`);
/** Of `fresh f`. */
export const RANGE_COLUMNS = `f.lane_id AS "laneId", f.rank, f.job_seq AS "jobSeq", f.first_no AS "firstNo",
  f.last_no AS "lastNo", f.since`;
const RANGES_OF_JOB = sql(`
  SELECT ${RANGE_COLUMNS} FROM fresh f WHERE f.job_seq = $1 ORDER BY f.lane_id, f.rank, f.last_no FOR UPDATE NOWAIT`);
const RANGES_OF_JOBS = sql(`
  SELECT ${RANGE_COLUMNS} FROM fresh f WHERE f.job_seq = ANY($1::bigint[])
  ORDER BY f.lane_id, f.rank, f.job_seq, f.last_no FOR UPDATE`);
const CLOSE_RANGES = sql('DELETE FROM fresh WHERE job_seq = $1');
const SPECS = sql(`
  SELECT u.job_seq AS "jobSeq", u.no, ${specAt('u.job_seq', 'u.no')} AS spec
  FROM unnest($1::bigint[], $2::integer[]) AS u (job_seq, no)`);
const LOCK_JOBS = sql(`
  SELECT ${JOB_COLUMNS} FROM jobs j WHERE j.seq = ANY($1::bigint[]) ORDER BY j.seq FOR NO KEY UPDATE`);
const READ_JOBS = sql(`SELECT ${JOB_COLUMNS} FROM jobs j WHERE j.seq = ANY($1::bigint[])`);
const TASKS_OF_JOB = sql(`
  SELECT ${OPEN_COLUMNS} FROM open_tasks o WHERE o.job_seq = $1 ORDER BY o.no FOR UPDATE OF o NOWAIT`);

const STAGES = sql(`
  SELECT s.job_seq AS "jobSeq", s.stage, s.first_task AS "firstTask", s.last_task AS "lastTask", s.remaining,
    s.deps_remaining AS "depsRemaining"
  FROM unnest($1::bigint[], $2::integer[]) AS u (job_seq, stage)
  JOIN stages s ON s.job_seq = u.job_seq AND s.stage = u.stage`);
const NEXT_STAGES = sql(`
  SELECT s.job_seq AS "jobSeq", s.stage, s.first_task AS "firstTask", s.last_task AS "lastTask", s.remaining,
    s.deps_remaining AS "depsRemaining"
  FROM stage_edges e JOIN stages s ON s.job_seq = e.job_seq AND s.stage = e.to_stage
  WHERE e.job_seq = $1 AND e.from_stage = $2 ORDER BY s.stage`);
const STAGE_NAMES = sql(
  'SELECT name, stage, first_task AS "firstTask", last_task AS "lastTask" FROM stages WHERE job_seq = $1',
);
const READY_OF_JOBS = sql(`
  SELECT ${OPEN_COLUMNS}, ${SPEC} AS spec FROM open_tasks o WHERE o.job_seq = ANY($1::bigint[]) AND o.state = 'ready'
  ORDER BY o.job_seq, o.no`);
const BLOCKED_OF_STAGE = sql(`
  SELECT ${OPEN_COLUMNS}, ${SPEC} AS spec FROM open_tasks o
  WHERE o.job_seq = $1 AND o.no BETWEEN $2 AND $3 AND o.stage = $4 AND o.state = 'blocked'
  ORDER BY o.no FOR UPDATE OF o NOWAIT`);
const BLOCKS = sql('SELECT block, body FROM task_blocks WHERE job_seq = $1 AND block BETWEEN $2 AND $3');
const LONG_SPECS = sql('SELECT no, spec FROM task_specs WHERE job_seq = $1 AND no BETWEEN $2 AND $3');
const COMPLETED_RUNS = sql(`
  SELECT ${RUN_COLUMNS} FROM ended_runs e
  WHERE e.job_seq = $1 AND e.first_no BETWEEN $2::integer & ~ ${BLOCK - 1} AND $3 AND e.state = 'completed' ORDER BY e.first_no`);
const REPORTS = sql(`
  SELECT r.job_seq AS "jobSeq", r.no, r.progress, r.events FROM unnest($1::bigint[], $2::integer[]) AS u (job_seq, no)
  JOIN task_reports r ON r.job_seq = u.job_seq AND r.no = u.no`);

const SAVE_TASKS = sql(`
  UPDATE open_tasks o SET state = u.state, wake_at = u.wake_at, attempts = u.attempts, node_faults = u.node_faults,
    drains = u.drains, parked = u.parked, counted = u.counted, lease_id = u.lease_id, node_id = u.node_id, leased_at = u.leased_at,
    lease_expires_at = u.lease_expires_at, last_heartbeat_at = u.last_heartbeat_at, not_before = u.not_before,
    cancel_requested_at = u.cancel_requested_at, updated_at = $15, reason = u.reason
  FROM unnest($1::bigint[], $2::integer[], $3::text[], $4::bigint[], $5::integer[], $6::integer[], $7::integer[],
    $8::text[], $9::text[], $10::bigint[], $11::bigint[], $12::bigint[], $13::bigint[], $14::bigint[], $16::text[],
    $17::boolean[], $18::boolean[])
    AS u (job_seq, no, state, wake_at, attempts, node_faults, drains, lease_id, node_id, leased_at, lease_expires_at,
      last_heartbeat_at, not_before, cancel_requested_at, reason, parked, counted)
  WHERE o.job_seq = u.job_seq AND o.no = u.no`);
const OPEN_TASKS = sql(`
  INSERT INTO open_tasks (job_seq, no, lane_id, rank, stage, max_attempts, deadline_at, state, wake_at, attempts, node_faults,
    drains, lease_id, node_id, leased_at, lease_expires_at, updated_at, counted)
  SELECT u.job_seq, u.no, u.lane_id, u.rank, u.stage, u.max_attempts, NULL, u.state, u.wake_at, u.attempts, 0,
    0, u.lease_id, u.node_id, u.leased_at, u.lease_expires_at, $13::bigint, u.counted
  FROM unnest($1::bigint[], $2::integer[], $3::integer[], $4::bigint[], $5::integer[], $6::integer[], $7::text[], $8::bigint[],
    $9::integer[], $10::text[], $11::text[], $12::bigint[], $14::bigint[], $15::boolean[])
    AS u (job_seq, no, lane_id, rank, stage, max_attempts, state, wake_at, attempts, lease_id, node_id, leased_at,
      lease_expires_at, counted)`);
const CLOSE_TASKS = sql(`
  DELETE FROM open_tasks o USING unnest($1::bigint[], $2::integer[]) AS u (job_seq, no)
  WHERE o.job_seq = u.job_seq AND o.no = u.no`);
const END_TASKS = sql(`
  INSERT INTO ended_runs (job_seq, first_no, last_no, state, updated_at, body)
  SELECT u.job_seq, u.first_no, u.last_no, u.state, $6::bigint, u.body
  FROM unnest($1::bigint[], $2::integer[], $3::integer[], $4::text[], $5::text[])
    AS u (job_seq, first_no, last_no, state, body)`);
const SAVE_SPECS = sql(`
  UPDATE task_specs t SET spec = u.spec FROM unnest($1::bigint[], $2::integer[], $3::text[]) AS u (job_seq, no, spec)
  WHERE t.job_seq = u.job_seq AND t.no = u.no`);
const SAVE_REPORTS = sql(`
  INSERT INTO task_reports (job_seq, no, progress, events)
  SELECT * FROM unnest($1::bigint[], $2::integer[], $3::text[], $4::text[])
  ON CONFLICT (job_seq, no) DO UPDATE SET progress = excluded.progress, events = excluded.events`);
const INSERT_ATTEMPTS = sql(`
  INSERT INTO attempts (job_seq, no, attempt, lease_id, node_id, outcome, outputs, meta, reason, leased_at, created_at)
  SELECT * FROM unnest($1::bigint[], $2::integer[], $3::integer[], $4::text[], $5::text[], $6::text[], $7::text[],
    $8::text[], $9::text[], $10::bigint[], $11::bigint[])`);
const DELETE_ATTEMPT = sql('DELETE FROM attempts WHERE job_seq = $1 AND no = $2 AND attempt = $3');
export const INSERT_EVENTS = sql(`
  INSERT INTO events (job_seq, last_seq, count, at, body)
  SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::integer[], $4::bigint[], $5::text[])`);
const SAVE_JOBS = sql(`
  UPDATE jobs j SET status = u.status, updated_at = u.updated_at, cancel_requested_at = u.cancel_requested_at,
    last_event = u.last_event, queued = u.queued, leased = u.leased, running = u.running, completed = u.completed,
    failed = u.failed, canceled = u.canceled
  FROM unnest($1::bigint[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::integer[], $7::integer[],
    $8::integer[], $9::integer[], $10::integer[], $11::integer[])
    AS u (seq, status, updated_at, cancel_requested_at, last_event, queued, leased, running, completed, failed, canceled)
  WHERE j.seq = u.seq`);
const SAVE_STAGES = sql(`
  UPDATE stages s SET remaining = u.remaining, deps_remaining = u.deps_remaining
  FROM unnest($1::bigint[], $2::integer[], $3::integer[], $4::integer[]) AS u (job_seq, stage, remaining, deps_remaining)
  WHERE s.job_seq = u.job_seq AND s.stage = u.stage`);

const keyOf = (jobSeq: number, no: number): string => `${jobSeq}:${no}`;

/** A job whose row this transaction has locked, with the events it adds. */
interface HeldJob {
  readonly job: Job;
  readonly events: EventBuffer;
  /** The open tasks, once they were all asked for. */
  tasks: readonly Task[] | null;
}

/** What a committed transaction did that others want to hear of. */
export class Changes {
  runnable = false;
  readonly jobIds = new Set<string>();
  readonly leaseIds: string[] = [];
  readonly logTaskIds = new Set<string>();

  list(): StoreChange[] {
    const changes: StoreChange[] = [...this.jobIds].map((jobId) => ({ kind: 'job', jobId }));
    if (this.leaseIds.length > 0) changes.push({ kind: 'cancel', leaseIds: this.leaseIds });
    if (this.logTaskIds.size > 0) changes.push({ kind: 'logs', taskIds: [...this.logTaskIds] });
    if (this.runnable) changes.push({ kind: 'runnable' });
    return changes;
  }
}

export class Unit {
  readonly changes = new Changes();
  readonly #transaction: Transaction;
  readonly #settings: WorkSettings;
  readonly #wide: Set<number>;
  readonly #tasks = new Map<string, Task>();
  /** The keys of tasks that were asked for by id; their ids by key. */
  readonly #keys = new Map<string, string>();
  readonly #ids = new Map<string, string>();
  /** Tasks that have no row yet, and those that have none any more. */
  readonly #fresh = new Set<Task>();
  readonly #closed = new Set<Task>();
  readonly #jobs = new Map<number, Job>();
  readonly #held = new Map<number, HeldJob>();
  readonly #stages = new Map<string, Stage>();
  readonly #reports = new Map<string, Report>();
  readonly #dirtyTasks = new Set<Task>();
  readonly #dirtySpecs = new Set<Task>();
  readonly #dirtyJobs = new Set<HeldJob>();
  readonly #dirtyStages = new Set<Stage>();
  readonly #dirtyReports = new Set<string>();
  /** Of {@link #attempts}, what completed its task and is not written yet. */
  readonly #completions = new Map<Task, Attempt>();
  readonly #ended = new Set<Task>();
  readonly #memos: Memos;
  readonly #keyChanges = new KeyChanges();
  /** Tasks that just became ready, in jobs that may be completed from earlier results; not looked at yet. */
  #opened: Task[] = [];
  /** Ended here, the newest last; those before {@link #flushed} are written. */
  readonly #attempts: Attempt[] = [];
  #flushed = 0;
  #leaseIds: TaskIds | null = null;
  #leases = 0;

  /** `wide` outlives the transaction: jobs all of whose open tasks are to be locked before the job. */
  constructor(transaction: Transaction, settings: WorkSettings, wide: Set<number>) {
    this.#transaction = transaction;
    this.#settings = settings;
    this.#wide = wide;
    this.#memos = new Memos(transaction, settings);
  }

  get now(): number {
    return this.#transaction.now;
  }

  /** Some job's tasks are to be locked before the job: {@link lockTasks} does, whatever else it is asked for. */
  get isWide(): boolean {
    return this.#wide.size > 0;
  }

  get transaction(): Transaction {
    return this.#transaction;
  }

  // ---- Reading and locking ------------------------------------------------------------------------------------

  /** Locks open tasks by id, waiting for them. Before any job. Ended ones, and those never leased, are left out. */
  async lockTasks(places: ReadonlyMap<string, Place>, withSpec: boolean): Promise<void> {
    this.#name(places);
    const values = columns<Place, number>(
      [...places.values()],
      ({ jobSeq }) => jobSeq,
      ({ no }) => no,
    );
    if (this.#wide.size > 0) {
      const wide = [...this.#wide];
      const [, rows] = await Promise.all([
        this.#transaction.rows(RANGES_OF_JOBS, [wide]),
        this.#transaction.rows<Task>(LOCK_TASKS_WIDE, [...values, wide]),
      ]);
      this.adopt(rows);
    } else if (places.size > 0) {
      this.adopt(await this.#transaction.rows<Task>(withSpec ? LOCK_TASKS_WITH_SPEC : LOCK_TASKS, values));
    }
  }

  /**
   * Removes the rows of tasks that complete under these leases, one each, which saves locking them first; the caller completes
   * them. False: of some the lease is not current, or was asked to end ({@link lockRest}).
   */
  async closeTasks(places: ReadonlyMap<string, Place>, refs: readonly LeaseRef[]): Promise<boolean> {
    this.#name(places);
    const found = refs
      .flatMap((ref) => {
        const place = places.get(ref.taskId);
        return place ? [{ ...place, nodeId: ref.nodeId, leaseId: ref.leaseId }] : [];
      })
      .toSorted((a, b) => a.jobSeq - b.jobSeq || a.no - b.no);
    const values = columns<(typeof found)[number], number | string | null>(
      found,
      ({ jobSeq }) => jobSeq,
      ({ no }) => no,
      ({ nodeId }) => nodeId,
      ({ leaseId }) => leaseId,
    );
    const rows = await this.#transaction.change<Task>(CLOSE_HELD, values);
    for (const task of this.adopt(rows)) this.#closed.add(task);
    return rows.length === found.length;
  }

  /** Locks those of these open tasks that are not known yet. Throws, to begin anew, when one is busy. */
  async lockRest(places: ReadonlyMap<string, Place>): Promise<void> {
    const rest = [...places.values()].filter(({ jobSeq, no }) => !this.#tasks.has(keyOf(jobSeq, no)));
    const values = columns<Place, number>(
      rest,
      ({ jobSeq }) => jobSeq,
      ({ no }) => no,
    );
    this.adopt(await this.#transaction.rows<Task>(LOCK_TASKS_AT_ONCE, values));
  }

  #name(places: ReadonlyMap<string, Place>): void {
    for (const [id, { jobSeq, no }] of places) {
      const key = keyOf(jobSeq, no);
      this.#keys.set(id, key);
      this.#ids.set(key, id);
    }
  }

  /** Takes rows of tasks that the caller has locked. What is known already stays as this transaction has changed it. */
  adopt(rows: readonly Task[]): Task[] {
    return rows.map((row) => {
      const key = keyOf(row.jobSeq, row.no);
      const known = this.#tasks.get(key);
      if (known) {
        known.spec ??= row.spec;
        return known;
      }
      this.#tasks.set(key, row);
      return row;
    });
  }

  /** The first tasks of a range that the caller has locked and takes them from; `lines`: what they were submitted with. */
  adoptRange({ laneId, rank, jobSeq, firstNo, since }: Range, lines: readonly string[]): Task[] {
    return lines.map((spec, index) => {
      const line = parseLine(spec);
      const place = { laneId, rank, jobSeq, no: firstNo + index, since };
      const task = this.#addFresh(place, line.stageNo, line.maxAttempts, spec);
      keepLine(task, line);
      return task;
    });
  }

  #addFresh(
    { laneId, rank, jobSeq, no, since }: Place & Pick<Range, 'laneId' | 'rank' | 'since'>,
    stage: number,
    maxAttempts: number,
    spec: string | null,
  ): Task {
    // Spelled out: an object of this many members that is spread together is a slow one.
    const task: Task = {
      jobSeq,
      no,
      laneId,
      priority: rank === 0 ? 0 : -rank,
      stage,
      maxAttempts,
      deadlineAt: null,
      keyId: null,
      keyLimit: null,
      parked: false,
      counted: false,
      state: 'ready',
      attempts: 0,
      nodeFaults: 0,
      drains: 0,
      leaseId: null,
      nodeId: null,
      leasedAt: null,
      leaseExpiresAt: null,
      lastHeartbeatAt: null,
      notBefore: null,
      cancelRequestedAt: null,
      updatedAt: since,
      reason: null,
      spec,
    };
    this.#tasks.set(keyOf(jobSeq, no), task);
    this.#fresh.add(task);
    return task;
  }

  /** What the tasks at these places were submitted with, in any order. */
  async specsOf(places: readonly Place[]): Promise<(Place & { readonly spec: string })[]> {
    if (places.length === 0) return [];
    const values = columns<Place, number>(
      places,
      ({ jobSeq }) => jobSeq,
      ({ no }) => no,
    );
    return await this.#transaction.rows<Place & { readonly spec: string }>(SPECS, values);
  }

  /** Reads what these tasks were submitted with, where it is not known yet. */
  async loadSpecs(tasks: readonly Task[]): Promise<void> {
    for (const { jobSeq, no, spec } of await this.specsOf(tasks.filter((task) => !task.spec))) {
      const task = this.#tasks.get(keyOf(jobSeq, no));
      if (task) task.spec = spec;
    }
  }

  /** The queues of the tasks read so far whose submission is known. */
  queueIds(): number[] {
    return [...this.#tasks.values()].flatMap((task) => (task.spec ? [lineOf(task).queueId] : []));
  }

  /** Its job is known, and its submission if the job's tasks have ids of their own. */
  idOf(task: Task): string {
    const key = keyOf(task.jobSeq, task.no);
    const known = this.#ids.get(key);
    if (known !== undefined) return known;
    const id = taskIdOf(this.job(task.jobSeq), task.no, () => lineOf(task));
    this.#ids.set(key, id);
    return id;
  }

  /** Waits for the jobs of these numbers and locks them. Once per transaction. */
  async lockJobs(seqs: Iterable<number>): Promise<void> {
    const wanted = [...new Set(seqs)];
    if (wanted.length === 0) return;
    for (const job of await this.#transaction.rows<Job>(LOCK_JOBS, [wanted])) {
      this.#jobs.set(job.seq, job);
      this.#held.set(job.seq, { job, events: new EventBuffer(), tasks: null });
    }
  }

  /** For what of a job never changes. */
  async readJobs(seqs: Iterable<number>): Promise<void> {
    const wanted = [...new Set(seqs)].filter((seq) => !this.#jobs.has(seq));
    if (wanted.length === 0) return;
    for (const job of await this.#transaction.rows<Job>(READ_JOBS, [wanted])) this.#jobs.set(job.seq, job);
  }

  /** Reads the stages of tasks whose jobs are locked, or are being locked by the statement sent before. */
  async loadStages(tasks: readonly Task[]): Promise<void> {
    const staged = new Map(
      tasks
        .filter(({ jobSeq, stage }) => stage !== 0 && !this.#stages.has(keyOf(jobSeq, stage)))
        .map((task) => [keyOf(task.jobSeq, task.stage), task]),
    );
    if (staged.size === 0) return;
    const values = columns<Task, number>(
      [...staged.values()],
      ({ jobSeq }) => jobSeq,
      ({ stage }) => stage,
    );
    this.#keepStages(await this.#transaction.rows<Stage>(STAGES, values));
  }

  async loadReports(tasks: readonly Task[]): Promise<void> {
    if (tasks.length === 0) return;
    const values = columns<Task, number>(
      tasks,
      ({ jobSeq }) => jobSeq,
      ({ no }) => no,
    );
    type Row = { jobSeq: number; no: number; progress: string; events: string };
    for (const { jobSeq, no, progress, events } of await this.#transaction.rows<Row>(REPORTS, values)) {
      const lines = (JSON.parse(events) as Json[]).map((event) => JSON.stringify(event));
      this.#reports.set(keyOf(jobSeq, no), { progress, events: lines });
    }
  }

  /** The task, if this lease is its current one. */
  current({ taskId, nodeId, leaseId }: LeaseRef): Task | undefined {
    const task = this.#named(taskId);
    if (!task || task.nodeId !== nodeId || !isHeld(task.state)) return undefined;
    return leaseId === null || task.leaseId === leaseId ? task : undefined;
  }

  /** An open task that was asked for by id, whoever has it. */
  asked(taskId: string): Task | undefined {
    return this.#named(taskId);
  }

  /** The attempts of a task that ended in this transaction, the newest first. */
  endedHere(taskId: string): Attempt[] {
    const task = this.#named(taskId);
    if (!task) return [];
    return this.#attempts.filter(({ jobSeq, no }) => jobSeq === task.jobSeq && no === task.no).toReversed();
  }

  /** Where the task stands now, if this transaction knows it. */
  stateOf(taskId: string): TaskState | undefined {
    return this.#named(taskId)?.state;
  }

  #named(taskId: string): Task | undefined {
    const key = this.#keys.get(taskId);
    return key === undefined ? undefined : this.#tasks.get(key);
  }

  knowsJob(seq: number): boolean {
    return this.#jobs.has(seq);
  }

  job(seq: number): Job {
    const job = this.#jobs.get(seq);
    if (!job) throw new MillraceError('internal', `job number ${seq} does not exist`);
    return job;
  }

  // ---- Leases -------------------------------------------------------------------------------------------------

  /** `counted`: the node says what it has to give. */
  grant(task: Task, nodeId: string, start: boolean, counted: boolean): void {
    const { now } = this;
    const job = this.job(task.jobSeq);
    const leaseId = this.#newLeaseId();
    task.attempts += 1;
    task.leaseId = leaseId;
    task.nodeId = nodeId;
    task.leasedAt = now;
    task.leaseExpiresAt = now + this.#settings.leaseTtlMs;
    task.lastHeartbeatAt = null;
    task.notBefore = null;
    this.#move(task, start ? 'running' : 'leased');
    task.counted = counted;
    if (job.status === 'pending') this.#setStatus(job, 'running');
    const { events } = this.#happened(job.seq);
    events.addLeased(job.updatedAt, task.no, nodeId, task.attempts, leaseId);
    if (start) this.emit(job.seq, 'task.running', task.no);
    this.#save(task);
  }

  /** Ids that count on from one that is nobody else's, so that they need little room where they stand together. */
  #newLeaseId(): string {
    this.#leaseIds ??= taskIdsOf(this.#settings.newId());
    this.#leases += 1;
    return taskId(this.#leaseIds, this.#leases);
  }

  /** Gives a queued task back to the node whose lease on it, the newest, expired: as if it had not. Its job is locked. */
  resume(task: Task, expiry: Pick<Attempt, 'attempt' | 'leaseId' | 'nodeId' | 'leasedAt'>): void {
    const { attempt, leaseId, nodeId, leasedAt } = expiry;
    this.#transaction.send(DELETE_ATTEMPT, [task.jobSeq, task.no, attempt]);
    Object.assign(task, resume(task), { leaseId, nodeId, leasedAt });
    task.leaseExpiresAt = this.now + this.#settings.leaseTtlMs;
    task.notBefore = null;
    task.reason = null;
    this.#move(task, 'running');
    this.#save(task);
    const data = { node_id: nodeId, attempt: task.attempts, lease_id: leaseId };
    this.emit(task.jobSeq, 'task.resumed', task.no, JSON.stringify(data));
  }

  heartbeat(task: Task): void {
    const { now } = this;
    const { leaseTtlMs, cancelGraceMs } = this.#settings;
    if (task.state === 'leased') {
      this.#move(task, 'running');
      this.emit(task.jobSeq, 'task.running', task.no);
    }
    if (task.cancelRequestedAt === null && task.deadlineAt !== null && task.deadlineAt <= now) {
      this.#requestCancel(task, 'deadline');
    }
    const left = expiryAfterSetback(task, now) ?? task.leaseExpiresAt ?? 0;
    // Alive while it winds down, but not for ever.
    const limit = task.cancelRequestedAt === null ? Infinity : task.cancelRequestedAt + cancelGraceMs;
    task.lastHeartbeatAt = now;
    task.leaseExpiresAt = Math.max(left, Math.min(now + leaseTtlMs, limit));
    this.#save(task);
  }

  /** Appends what a heartbeat brought to the event stream and keeps the newest for the task's `meta`. */
  report(task: Task, progress: Json, events: readonly Json[], logged: boolean): void {
    if (progress === null && events.length === 0) return;
    const key = keyOf(task.jobSeq, task.no);
    const report = this.#reports.get(key) ?? { progress: 'null', events: [] };
    const text = progress === null ? report.progress : JSON.stringify(progress);
    const changed = text !== report.progress;
    if (!changed && events.length === 0) return;
    this.#reports.set(key, report);
    this.#dirtyReports.add(key);
    if (changed) this.emit(task.jobSeq, 'task.progress', task.no, `{"progress":${text}}`);
    report.progress = text;
    for (const event of events) {
      const line = JSON.stringify(event);
      this.emit(task.jobSeq, 'task.log', task.no, `{"event":${line}${logged ? ',"logged":true' : ''}}`);
      report.events.push(line);
    }
    let bytes = report.events.reduce((sum, line) => sum + line.length, 0);
    while (
      report.events.length > REPORTED_EVENTS ||
      (report.events.length > 1 && bytes > REPORTED_EVENT_BYTES)
    ) {
      bytes -= report.events.shift()?.length ?? 0;
    }
  }

  /** Reads what decides whether completions of these tasks are kept to be given again. Their jobs are locked. */
  async loadMemoWork(
    completions: readonly { readonly task: Task; readonly outputs: readonly string[] }[],
  ): Promise<void> {
    const caching = completions.filter(({ task }) => this.job(task.jobSeq).cache);
    if (caching.length === 0) return;
    await this.loadSpecs(caching.map(({ task }) => task));
    await this.#memos.loadItems(
      caching.flatMap(({ task, outputs }) => [...outputs, ...lineOf(task).inputs_cids]),
    );
  }

  async complete(task: Task, outputs: readonly string[], meta: Json): Promise<void> {
    const job = this.job(task.jobSeq);
    if (job.cache) this.#memos.record(job, task, this.idOf(task), outputs, meta);
    const text = JSON.stringify(outputs);
    this.#endLease(task, 'completed', null, text, JSON.stringify(meta));
    task.reason = null;
    this.#move(task, 'completed');
    this.#save(task);
    this.emit(task.jobSeq, 'task.completed', task.no, `{"outputs":${text}}`);
    if (task.stage !== 0) await this.#countStage(task.jobSeq, task.stage);
    this.#settle(job);
    await this.#recallOpened();
  }

  /** Completes the ready tasks of these new, locked jobs that were done before, and what becomes ready by that. */
  async recallJobs(seqs: readonly number[]): Promise<void> {
    this.#opened = this.adopt(await this.#transaction.rows<Task>(READY_OF_JOBS, [seqs]));
    await this.#recallOpened();
  }

  async #recallOpened(): Promise<void> {
    // Wave by wave, and no recursion: a chain of stages may be as long as the job has tasks.
    while (this.#opened.length > 0) {
      const wave = this.#opened.filter(
        ({ state, deadlineAt }) => state === 'ready' && (deadlineAt === null || deadlineAt > this.now),
      );
      this.#opened = [];
      // What this transaction completed is among what is asked for.
      this.#flushEnded();
      const recalled = await this.#memos.recall(
        wave.map((task) => ({ task, id: this.idOf(task), job: this.job(task.jobSeq) })),
      );
      await this.loadStages(recalled.map(({ task }) => task));
      for (const { task, nodeId, outputs, meta, from } of recalled) {
        // An earlier one of this wave may have ended the job.
        if (task.state !== 'ready') continue;
        this.#addAttempt(task, {
          jobSeq: task.jobSeq,
          no: task.no,
          attempt: task.attempts + task.nodeFaults + task.drains,
          leaseId: this.#newLeaseId(),
          nodeId,
          outcome: 'completed',
          outputs,
          meta,
          reason: null,
          leasedAt: this.now,
          createdAt: this.now,
        });
        task.reason = null;
        this.#move(task, 'completed');
        this.#save(task);
        const memo = JSON.stringify({ task_id: from.taskId, job_id: from.jobId });
        this.emit(task.jobSeq, 'task.completed', task.no, `{"outputs":${outputs},"memo":${memo}}`);
        if (task.stage !== 0) await this.#countStage(task.jobSeq, task.stage);
        this.#settle(this.job(task.jobSeq));
      }
    }
  }

  async fail(task: Task, ending: Ending, reason: string, details: Json, retryable: boolean): Promise<void> {
    const short = storable(truncateUtf8(reason, MAX_REASON_BYTES));
    this.#endLease(task, 'failed', short, '[]', JSON.stringify(details));
    await this.#retryOrFail(task, ending, short, retryable);
  }

  async release(task: Task, reason: string, ending: Ending, details: Json): Promise<void> {
    this.#endLease(task, 'released', reason, '[]', JSON.stringify(details));
    this.emit(task.jobSeq, 'task.released', task.no, JSON.stringify({ reason }));
    await this.#retryOrFail(task, ending, `released: ${reason}`, true);
  }

  async expire(task: Task): Promise<void> {
    const nodeId = task.nodeId ?? '';
    const requested = task.cancelRequestedAt !== null;
    const reason = requested ? task.reason : `lease expired: node ${nodeId} sent no heartbeat`;
    this.#endLease(task, 'expired', reason, '[]', 'null');
    this.emit(task.jobSeq, 'task.expired', task.no, JSON.stringify({ node_id: nodeId }));
    if (requested) await this.#endAsAsked(task);
    else await this.#retryOrFail(task, 'expired', reason ?? '', true);
  }

  /** Ends a task whose lease was cancelled, now that the work is gone. */
  async endCanceled(task: Task, details: Json): Promise<void> {
    this.#endLease(task, 'canceled', task.reason ?? 'canceled', '[]', JSON.stringify(details));
    await this.#endAsAsked(task);
  }

  /** The sweep's look at a task that is due. */
  async wake(task: Task): Promise<{ readonly rescued: boolean; readonly failed: boolean }> {
    const { now } = this;
    const nothing = { rescued: false, failed: false };
    // Earlier in this sweep the task may have been ended along with its job.
    if ((wakeAt(task) ?? Infinity) > now) return nothing;
    const late = task.cancelRequestedAt === null && task.deadlineAt !== null && task.deadlineAt <= now;
    if (isHeld(task.state)) {
      if (late) this.#requestCancel(task, 'deadline');
      if ((task.leaseExpiresAt ?? 0) > now) return nothing;
      await this.expire(task);
      return { rescued: true, failed: false };
    }
    if (late) {
      this.#failTask(task, 'deadline');
      return { rescued: false, failed: true };
    }
    task.notBefore = null;
    this.#move(task, 'ready');
    this.#save(task);
    this.emit(task.jobSeq, 'task.runnable', task.no);
    if (this.job(task.jobSeq).cache && task.attempts + task.nodeFaults + task.drains === 0) {
      this.#opened.push(task);
      await this.loadSpecs([task]);
      await this.#recallOpened();
    }
    return nothing;
  }

  // ---- Jobs ---------------------------------------------------------------------------------------------------

  /** Its job is locked. False: it is over, or ending for another reason, which then stays. */
  async cancelJob(seq: number): Promise<boolean> {
    const job = this.job(seq);
    if (isFinal(job.status) || job.cancelRequestedAt !== null || job.failed > 0) return false;
    job.cancelRequestedAt = this.now;
    this.emit(seq, 'job.cancel_requested', null);
    await this.endRest(seq, 'canceled by the requestor');
    return true;
  }

  /** Ends what is queued and asks what is leased to end. */
  async endRest(seq: number, reason: string): Promise<void> {
    const job = this.job(seq);
    const short = storable(truncateUtf8(reason, MAX_REASON_BYTES));
    const tasks = job.queued + job.leased + job.running > 0 ? await this.openTasks(seq) : [];
    for (const task of tasks) {
      if (isFinal(task.state) || isHeld(task.state)) continue;
      if (task.deadlineAt !== null && task.deadlineAt <= this.now) this.#failTask(task, 'deadline');
      else this.#cancelTask(task, short);
    }
    for (const task of tasks) {
      if (isHeld(task.state) && task.cancelRequestedAt === null) this.#requestCancel(task, short);
    }
    this.#settle(job);
  }

  /** All open tasks of a locked job, locked; some may have been ended here. Those never leased get rows of their own. */
  async openTasks(seq: number): Promise<readonly Task[]> {
    const held = this.#heldJob(seq);
    if (held.tasks) return held.tasks;
    // What was taken from a range in this transaction is not in it any more.
    const [ranges, rows] = await this.#unlessBusy(
      seq,
      Promise.all([
        this.#transaction.rows<Range>(RANGES_OF_JOB, [seq]),
        this.#transaction.rows<Task>(TASKS_OF_JOB, [seq]),
      ]),
    );
    const fresh: Task[] = [];
    for (const range of ranges) {
      for (let no = range.firstNo; no <= range.lastNo; no += 1) {
        // Stage and attempts are of no account any more: who asks for all tasks of a job ends them.
        fresh.push(this.#addFresh({ ...range, no }, 0, 1, null));
      }
    }
    if (ranges.length > 0) this.#transaction.send(CLOSE_RANGES, [seq]);
    held.tasks = [...this.adopt(rows), ...fresh].toSorted((a, b) => a.no - b.no);
    return held.tasks;
  }

  /** For people: the label, which they chose, and the id, which is unique. */
  async nameOf(task: Task): Promise<string> {
    await this.loadSpecs([task]);
    return `${storable(lineOf(task).label)} (${this.idOf(task)})`;
  }

  /** Appends an event of the locked job, or of its task with this number. `data` is JSON; empty is `{}`. */
  emit(seq: number, kind: EventKind, no: number | null, data = ''): void {
    const { job, events } = this.#happened(seq);
    events.add(job.updatedAt, kind, no, data);
    if (kind === 'task.runnable') this.changes.runnable = true;
  }

  /** Counts an event of the locked job, at its `updatedAt`. */
  #happened(seq: number): HeldJob {
    const held = this.#heldJob(seq);
    const { job } = held;
    // Another dispatcher's transaction may have begun later and committed before: times in a stream never go back.
    job.updatedAt = Math.max(job.updatedAt, this.now);
    job.lastEvent += 1;
    this.#dirtyJobs.add(held);
    this.changes.jobIds.add(job.id);
    return held;
  }

  // ---- Writing ------------------------------------------------------------------------------------------------

  /** Sends everything that was changed. Nothing may be changed afterwards. */
  async flush(): Promise<void> {
    this.#flushAttempts();
    this.#flushEnded();
    this.#memos.flush();
    this.#flushOpen();
    this.#flushSpecs();
    this.#flushReports();
    if (this.#dirtyStages.size > 0) {
      this.#transaction.send(
        SAVE_STAGES,
        columns<Stage, number>(
          [...this.#dirtyStages],
          ({ jobSeq }) => jobSeq,
          ({ stage }) => stage,
          ({ remaining }) => remaining,
          ({ depsRemaining }) => depsRemaining,
        ),
      );
    }
    this.#flushJobs();
    if (await this.#keyChanges.flush(this.#transaction)) this.changes.runnable = true;
  }

  #flushOpen(): void {
    const transaction = this.#transaction;
    const open = [...this.#dirtyTasks].filter(({ state }) => !isFinal(state));
    const number = (read: (task: Task) => number | null) => read;
    const fresh = open.filter((task) => this.#fresh.has(task));
    if (fresh.length > 0) {
      transaction.send(OPEN_TASKS, [
        ...columns<Task, number | string | null>(
          fresh,
          ({ jobSeq }) => jobSeq,
          ({ no }) => no,
          ({ laneId }) => laneId,
          ({ priority }) => -priority,
          ({ stage }) => stage,
          ({ maxAttempts }) => maxAttempts,
          ({ state }) => state,
          number(wakeAt),
          ({ attempts }) => attempts,
          ({ leaseId }) => leaseId,
          ({ nodeId }) => nodeId,
          ({ leasedAt }) => leasedAt,
        ),
        this.now,
        fresh.map(({ leaseExpiresAt }) => leaseExpiresAt),
        fresh.map(({ counted }) => String(counted)),
      ]);
    }
    const known = open.filter((task) => !this.#fresh.has(task));
    if (known.length === 0) return;
    transaction.send(SAVE_TASKS, [
      ...columns<Task, number | string | null>(
        known,
        ({ jobSeq }) => jobSeq,
        ({ no }) => no,
        ({ state }) => state,
        number(wakeAt),
        ({ attempts }) => attempts,
        ({ nodeFaults }) => nodeFaults,
        ({ drains }) => drains,
        ({ leaseId }) => leaseId,
        ({ nodeId }) => nodeId,
        ({ leasedAt }) => leasedAt,
        ({ leaseExpiresAt }) => leaseExpiresAt,
        ({ lastHeartbeatAt }) => lastHeartbeatAt,
        ({ notBefore }) => notBefore,
        ({ cancelRequestedAt }) => cancelRequestedAt,
      ),
      this.now,
      known.map(({ reason }) => reason),
      known.map(({ parked }) => String(parked)),
      known.map(({ counted }) => String(counted)),
    ]);
  }

  /** Sends what has ended since the last time: an ended task does not change any more. */
  #flushEnded(): void {
    if (this.#ended.size === 0) return;
    const ended = [...this.#ended].toSorted((a, b) => a.jobSeq - b.jobSeq || a.no - b.no);
    this.#ended.clear();
    const rows = ended.filter((task) => !this.#fresh.has(task) && !this.#closed.has(task));
    if (rows.length > 0) {
      this.#transaction.send(
        CLOSE_TASKS,
        columns<Task, number>(
          rows,
          ({ jobSeq }) => jobSeq,
          ({ no }) => no,
        ),
      );
    }
    const runs: { jobSeq: number; firstNo: number; lastNo: number; state: TaskState; lines: string[] }[] = [];
    for (const task of ended) {
      this.#dirtyTasks.delete(task);
      const { jobSeq, no, state } = task;
      const line = endingText(task, this.#completions.get(task));
      this.#completions.delete(task);
      const last = runs.at(-1);
      const goesOn =
        last?.jobSeq === jobSeq && last.lastNo === no - 1 && no % BLOCK !== 0 && last.state === state;
      if (last && goesOn && state !== 'failed') {
        last.lastNo = no;
        last.lines.push(line);
      } else runs.push({ jobSeq, firstNo: no, lastNo: no, state, lines: [line] });
    }
    this.#transaction.send(END_TASKS, [
      ...columns<(typeof runs)[number], number | string>(
        runs,
        ({ jobSeq }) => jobSeq,
        ({ firstNo }) => firstNo,
        ({ lastNo }) => lastNo,
        ({ state }) => state,
        ({ lines }) => lines.join('\n'),
      ),
      this.now,
    ]);
  }

  #flushJobs(): void {
    if (this.#dirtyJobs.size === 0) return;
    const held = [...this.#dirtyJobs];
    const events = held.flatMap(({ job, events: buffer }) =>
      buffer.take(job.lastEvent).map((row) => ({ ...row, jobSeq: job.seq })),
    );
    this.#transaction.send(
      INSERT_EVENTS,
      columns<(typeof events)[number], number | string>(
        events,
        ({ jobSeq }) => jobSeq,
        ({ lastSeq }) => lastSeq,
        ({ count }) => count,
        ({ at }) => at,
        ({ body }) => body,
      ),
    );
    this.#transaction.send(
      SAVE_JOBS,
      columns<Job, number | string | null>(
        held.map(({ job }) => job),
        ({ seq }) => seq,
        ({ status }) => status,
        ({ updatedAt }) => updatedAt,
        ({ cancelRequestedAt }) => cancelRequestedAt,
        ({ lastEvent }) => lastEvent,
        ({ queued }) => queued,
        ({ leased }) => leased,
        ({ running }) => running,
        ({ completed }) => completed,
        ({ failed }) => failed,
        ({ canceled }) => canceled,
      ),
    );
  }

  /** What completed its task goes with the task's end. */
  #flushAttempts(): void {
    const fresh = this.#attempts.slice(this.#flushed).filter(({ outcome }) => outcome !== 'completed');
    this.#flushed = this.#attempts.length;
    if (fresh.length === 0) return;
    this.#transaction.send(
      INSERT_ATTEMPTS,
      columns<Attempt, number | string | null>(
        fresh,
        ({ jobSeq }) => jobSeq,
        ({ no }) => no,
        ({ attempt }) => attempt,
        ({ leaseId }) => leaseId,
        ({ nodeId }) => nodeId,
        ({ outcome }) => outcome,
        ({ outputs }) => outputs,
        ({ meta }) => meta,
        ({ reason }) => reason,
        ({ leasedAt }) => leasedAt,
        ({ createdAt }) => createdAt,
      ),
    );
  }

  #flushSpecs(): void {
    if (this.#dirtySpecs.size === 0) return;
    this.#transaction.send(
      SAVE_SPECS,
      columns<Task, number | string>(
        [...this.#dirtySpecs],
        ({ jobSeq }) => jobSeq,
        ({ no }) => no,
        ({ spec }) => spec ?? '',
      ),
    );
  }

  #addAttempt(task: Task, attempt: Attempt): void {
    this.#attempts.push(attempt);
    if (attempt.outcome === 'completed') this.#completions.set(task, attempt);
  }

  #flushReports(): void {
    if (this.#dirtyReports.size === 0) return;
    const rows = [...this.#dirtyReports].map((key) => {
      const [jobSeq = 0, no = 0] = key.split(':').map(Number);
      const { progress, events } = this.#reports.get(key) ?? { progress: 'null', events: [] };
      return { jobSeq, no, progress, events: `[${events.join(',')}]` };
    });
    this.#transaction.send(
      SAVE_REPORTS,
      columns<(typeof rows)[number], number | string>(
        rows,
        ({ jobSeq }) => jobSeq,
        ({ no }) => no,
        ({ progress }) => progress,
        ({ events }) => events,
      ),
    );
  }

  // ---- Endings ------------------------------------------------------------------------------------------------

  /** Ends the lease and writes its receipt. The caller moves the task on. */
  #endLease(task: Task, outcome: AttemptOutcome, reason: string | null, outputs: string, meta: string): void {
    this.#addAttempt(task, {
      jobSeq: task.jobSeq,
      no: task.no,
      attempt: task.attempts + task.nodeFaults + task.drains,
      leaseId: task.leaseId ?? '',
      nodeId: task.nodeId ?? '',
      outcome,
      outputs,
      meta,
      reason,
      leasedAt: task.leasedAt ?? this.now,
      createdAt: this.now,
    });
    task.leaseId = null;
    task.nodeId = null;
    task.leasedAt = null;
    task.leaseExpiresAt = null;
  }

  async #retryOrFail(task: Task, ending: Ending, reason: string, retryable: boolean): Promise<void> {
    const verdict = judge(ending, task, retryable);
    const attempt = task.attempts;
    task.attempts = verdict.attempts;
    task.nodeFaults = verdict.nodeFaults;
    task.drains = verdict.drains;
    if (verdict.next === 'failed') {
      this.#failTask(task, reason);
      await this.endRest(task.jobSeq, `task ${await this.nameOf(task)} failed: ${reason}`);
      return;
    }
    task.reason = reason;
    if (verdict.next === 'delayed') {
      const { random, backoff } = this.#settings;
      const notBefore = this.now + backoffMs(verdict.step, random, backoff);
      task.notBefore = notBefore;
      this.#move(task, 'delayed');
      const data = { reason, not_before: isoTime(notBefore), attempt };
      this.emit(task.jobSeq, 'task.retry', task.no, JSON.stringify(data));
    } else {
      this.#move(task, 'ready');
      this.emit(task.jobSeq, 'task.runnable', task.no);
    }
    this.#save(task);
  }

  async #endAsAsked(task: Task): Promise<void> {
    if (task.reason === 'deadline') {
      this.#failTask(task, 'deadline');
      await this.endRest(task.jobSeq, `task ${await this.nameOf(task)} failed: deadline`);
    } else {
      this.#cancelTask(task, task.reason ?? 'canceled');
      this.#settle(this.job(task.jobSeq));
    }
  }

  #failTask(task: Task, reason: string): void {
    task.reason = reason;
    task.notBefore = null;
    this.#move(task, 'failed');
    this.#save(task);
    this.emit(task.jobSeq, 'task.failed', task.no, JSON.stringify({ reason }));
  }

  #cancelTask(task: Task, reason: string): void {
    task.reason = reason;
    task.notBefore = null;
    task.cancelRequestedAt ??= this.now;
    this.#move(task, 'canceled');
    this.#save(task);
    this.emit(task.jobSeq, 'task.canceled', task.no, JSON.stringify({ reason }));
  }

  #requestCancel(task: Task, reason: string): void {
    task.cancelRequestedAt = this.now;
    task.reason = reason;
    this.#save(task);
    if (task.leaseId !== null) this.changes.leaseIds.push(task.leaseId);
  }

  /** Gives the job its last status when nothing of it is left to do. */
  #settle(job: Job): void {
    if (isFinal(job.status)) return;
    const status = jobStatus(countsOf(job), job.status !== 'pending');
    if (status !== 'pending' && status !== job.status) this.#setStatus(job, status);
  }

  #setStatus(job: Job, status: Exclude<JobStatus, 'pending'>): void {
    this.#transaction.totals.jobs[job.status] -= 1;
    this.#transaction.totals.jobs[status] += 1;
    job.status = status;
    this.emit(job.seq, `job.${status}`, null);
  }

  // ---- Stages -------------------------------------------------------------------------------------------------

  /** One task of the stage completed. The stages after it may become runnable. */
  async #countStage(jobSeq: number, no: number): Promise<void> {
    const stage = this.#stages.get(keyOf(jobSeq, no));
    if (!stage) throw new MillraceError('internal', `job number ${jobSeq} has no stage number ${no}`);
    stage.remaining -= 1;
    this.#dirtyStages.add(stage);
    if (stage.remaining > 0) return;
    for (const after of this.#keepStages(await this.#transaction.rows<Stage>(NEXT_STAGES, [jobSeq, no]))) {
      after.depsRemaining -= 1;
      this.#dirtyStages.add(after);
      if (after.depsRemaining === 0) await this.#openStage(after);
    }
  }

  #keepStages(rows: readonly Stage[]): Stage[] {
    return rows.map((row) => {
      const key = keyOf(row.jobSeq, row.stage);
      const known = this.#stages.get(key);
      if (!known) this.#stages.set(key, row);
      return known ?? row;
    });
  }

  /** Makes a stage's tasks ready, with their `stage:` inputs resolved. */
  async #openStage({ jobSeq, stage, firstTask, lastTask }: Stage): Promise<void> {
    const rows = this.#transaction.rows<Task>(BLOCKED_OF_STAGE, [jobSeq, firstTask, lastTask, stage]);
    const blocked = this.adopt(await this.#unlessBusy(jobSeq, rows)).filter(
      ({ state }) => state === 'blocked',
    );
    const resolver = new StageResolver(this.#transaction, jobSeq);
    let failure: string | null = null;
    for (const task of blocked) {
      const line: Line = lineOf(task);
      if (line.inputs_cids.some(isStageReference)) {
        // The completions that opened the stage are among those that are asked for.
        this.#flushEnded();
        const answer = await resolver.resolve(line.inputs_cids);
        if (typeof answer === 'string') {
          this.#failTask(task, storable(answer));
          failure ??= `task ${await this.nameOf(task)} failed: ${answer}`;
          continue;
        }
        setLine(task, { ...line, inputs_cids: answer });
        this.#dirtySpecs.add(task);
      }
      if (task.notBefore !== null && task.notBefore > this.now) {
        this.#move(task, 'delayed');
        this.#save(task);
        continue;
      }
      task.notBefore = null;
      this.#move(task, 'ready');
      this.#save(task);
      this.emit(jobSeq, 'task.runnable', task.no);
      if (this.job(jobSeq).cache) this.#opened.push(task);
    }
    if (failure !== null) await this.endRest(jobSeq, failure);
  }

  // ---- Small parts --------------------------------------------------------------------------------------------

  /** Rule 3: has the transaction begin anew, with all tasks of the job first, when one of them is busy. */
  async #unlessBusy<T>(jobSeq: number, asked: Promise<T>): Promise<T> {
    try {
      return await asked;
    } catch (error) {
      if (error instanceof SqlError && error.sqlstate === '55P03') this.#wide.add(jobSeq);
      throw error;
    }
  }

  #heldJob(seq: number): HeldJob {
    const held = this.#held.get(seq);
    if (!held) throw new MillraceError('internal', `job number ${seq} was changed without being locked`);
    return held;
  }

  /** Changes the state and every count that follows from it. */
  #move(task: Task, state: TaskState): void {
    const { job } = this.#heldJob(task.jobSeq);
    this.#countKey(task, state);
    // Somebody may wait for the room it took.
    if (task.counted && isHeld(task.state) && !isHeld(state)) this.changes.runnable = true;
    const from = taskStatus(task.state);
    const to = taskStatus(state);
    job[from] -= 1;
    job[to] += 1;
    this.#transaction.totals.tasks[from] -= 1;
    this.#transaction.totals.tasks[to] += 1;
    task.state = state;
  }

  #countKey(task: Task, state: TaskState): void {
    const { keyId } = task;
    if (keyId === null) return;
    const held = Number(isHeld(state)) - Number(isHeld(task.state));
    this.#keyChanges.add(keyId, isFinal(state) ? -1 : 0, held);
    task.parked = state === 'ready';
  }

  /** Its job is being deleted, and with it this task, which nobody holds. */
  forget({ keyId }: Task): void {
    if (keyId !== null) this.#keyChanges.add(keyId, -1, 0);
  }

  #save(task: Task): void {
    task.updatedAt = this.now;
    this.#dirtyTasks.add(task);
    if (isFinal(task.state)) this.#ended.add(task);
  }
}

/** Replaces `stage:` references of one job's tasks. What it read is kept for the next task. */
class StageResolver {
  readonly #transaction: Transaction;
  readonly #jobSeq: number;
  readonly #outputs = new Map<string, StageOutputs>();
  #stages: ReadonlyMap<string, StageTasks> | null = null;
  #resolved = 0;

  constructor(transaction: Transaction, jobSeq: number) {
    this.#transaction = transaction;
    this.#jobSeq = jobSeq;
  }

  /** The inputs with every reference replaced, or why that is not possible. */
  async resolve(inputs: readonly string[]): Promise<string[] | string> {
    const stages = (this.#stages ??= new Map(
      (await this.#transaction.rows<StageTasks & { readonly name: string }>(STAGE_NAMES, [this.#jobSeq])).map(
        (row) => [row.name, row],
      ),
    ));
    const ids: string[] = [];
    for (const input of inputs) {
      const reference = parseStageReference(input, (name) => stages.has(storable(name)));
      if (!reference) {
        ids.push(input);
        continue;
      }
      const found = (await this.#outputsOf(reference.stage)).select(reference.glob);
      if (found.length === 0 && !reference.optional)
        return `input ${input} matches no output of stage ${reference.stage}`;
      if (ids.length + found.length > JOB_LIMITS.inputsPerTask) {
        return `input ${input} brings the inputs to ${ids.length + found.length}; a task may have ${JOB_LIMITS.inputsPerTask}`;
      }
      if (this.#resolved + ids.length + found.length > MAX_RESOLVED_PER_STAGE) {
        return `input ${input} brings the inputs of the stage beyond ${MAX_RESOLVED_PER_STAGE} in all`;
      }
      for (const id of found) ids.push(id);
    }
    this.#resolved += ids.length;
    return ids;
  }

  async #outputsOf(name: string): Promise<StageOutputs> {
    const known = this.#outputs.get(name);
    if (known) return known;
    const stage = this.#stages?.get(storable(name));
    const outputs = new StageOutputs(stage ? await this.#completionsOf(stage) : []);
    this.#outputs.set(name, outputs);
    return outputs;
  }

  async #completionsOf(stage: StageTasks) {
    const { firstTask, lastTask } = stage;
    const between = [this.#jobSeq, firstTask, lastTask];
    const [runs, blocks, specs] = await Promise.all([
      this.#transaction.rows<Run>(COMPLETED_RUNS, between),
      this.#transaction.rows<{ block: number; body: string }>(BLOCKS, [
        this.#jobSeq,
        blockOf(firstTask),
        blockOf(lastTask),
      ]),
      this.#transaction.rows<{ no: number; spec: string }>(LONG_SPECS, between),
    ]);
    const lines = linesOf(blocks, specs);
    return runs.flatMap(endingsOf).flatMap(({ no, completion }) => {
      const line = lines.get(no);
      if (!completion || line?.stageNo !== stage.stage) return [];
      const { outputs, meta } = completion;
      return [{ outputsPrefix: line.outputs_prefix, outputs, meta }];
    });
  }
}

/** Runs `work` as one transaction on jobs and tasks; resolves once it is committed. */
export async function inUnit<T>(
  database: Database,
  settings: WorkSettings,
  work: (unit: Unit) => Promise<T>,
): Promise<{ readonly value: T; readonly changes: readonly StoreChange[] }> {
  const wide = new Set<number>();
  return await database.transaction('lane', async (transaction) => {
    const unit = new Unit(transaction, settings, wide);
    const value = await work(unit);
    await unit.flush();
    return { value, changes: unit.changes.list() };
  });
}
