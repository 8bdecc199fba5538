/** The rows of jobs and tasks in PostgreSQL as the store works with them, and as records of the wire. */
import type { Json, JsonObject } from '@millrace/runner';
import { taskStatus } from '../lifecycle.ts';
import type { TaskState } from '../lifecycle.ts';
import type {
  AttemptOutcome,
  ConcurrencyLimit,
  JobRecord,
  JobStatus,
  ReceiptRecord,
  TaskRecord,
  TaskStatus,
  TaskSubmission,
} from '../records.ts';
import { taskId, taskIdsOf } from './ids.ts';
import type { Demand } from './matching.ts';
import type { KeptNode } from './node-rules.ts';
import type { Resources } from '../resources.ts';
import { isoTime, isoTimeOrNull } from './time.ts';

export interface Queue extends Demand {
  readonly id: number;
}

/** Tasks of one queue and domain: what is ordered by priority and age. */
export interface Lane {
  readonly id: number;
  readonly queue: Queue;
  readonly domainId: string;
}

/** Where a task is among all. */
export interface Place {
  readonly jobSeq: number;
  /** Its position in the job, from 0. */
  readonly no: number;
}

/** Where a task stands that has not ended. */
export interface Task extends Place {
  readonly laneId: number;
  readonly priority: number;
  /** 0: a stage without edges. */
  readonly stage: number;
  readonly maxAttempts: number;
  readonly deadlineAt: number | null;
  /** Of its concurrency limit; null: it has none. */
  readonly keyId: number | null;
  readonly keyLimit: number | null;
  /** Ready, and hidden from those who look for work (`postgres-limits.ts`). */
  parked: boolean;
  /** The node that holds it, or held it last, says what it has to give. */
  counted: boolean;
  /** Only where it was asked for: {@link lineOf}. */
  spec?: string | null;
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
}

/** Of `open_tasks o`. */
export const OPEN_COLUMNS = `o.job_seq AS "jobSeq", o.no, o.lane_id AS "laneId", - o.rank AS priority, o.stage,
  o.max_attempts AS "maxAttempts", o.deadline_at AS "deadlineAt", o.key_id AS "keyId", o.key_limit AS "keyLimit",
  o.parked, o.counted, o.state, o.attempts, o.node_faults AS "nodeFaults", o.drains,
  o.lease_id AS "leaseId", o.node_id AS "nodeId", o.leased_at AS "leasedAt", o.lease_expires_at AS "leaseExpiresAt",
  o.last_heartbeat_at AS "lastHeartbeatAt", o.not_before AS "notBefore",
  o.cancel_requested_at AS "cancelRequestedAt", o.updated_at AS "updatedAt", o.reason`;

/** Tasks in a row of `task_blocks`, and at most in one of `ended_runs`: a power of two. */
export const BLOCK = 64;
const BLOCK_BITS = 6;

/** The text of {@link lineOf}, of a task with these columns. */
export function specAt(jobSeq: string, no: string): string {
  return `coalesce(
    (SELECT nullif(split_part(b.body, E'\\n', 1 + (${no} & ${BLOCK - 1})), '') FROM task_blocks b
     WHERE b.job_seq = ${jobSeq} AND b.block = ${no} >> ${BLOCK_BITS}),
    (SELECT x.spec FROM task_specs x WHERE x.job_seq = ${jobSeq} AND x.no = ${no}))`;
}

/** The condition for `ended_runs e` to be the run with the task of these columns. */
export function endedAt(jobSeq: string, no: string): string {
  return `e.job_seq = ${jobSeq} AND e.first_no BETWEEN ${no} & ~ ${BLOCK - 1} AND ${no} AND e.last_no >= ${no}`;
}

/** The text of {@link endingOf}, of a task in the run `e`. */
export function endingAt(no: string): string {
  return `split_part(e.body, E'\\n', 1 + ${no} - e.first_no)`;
}

export function blockOf(no: number): number {
  return no >> BLOCK_BITS;
}

/** The lines of a job's tasks by position, from its blocks and what is not in them. */
export function linesOf(
  blocks: readonly { readonly block: number; readonly body: string }[],
  specs: readonly { readonly no: number; readonly spec: string }[],
): Map<number, Line> {
  const found = new Map<number, Line>();
  for (const { block, body } of blocks) {
    for (const [index, text] of body.split('\n').entries()) {
      if (text !== '') found.set(block * BLOCK + index, parseLine(text));
    }
  }
  for (const { no, spec } of specs) found.set(no, parseLine(spec));
  return found;
}

export interface Job {
  readonly seq: number;
  readonly id: string;
  readonly domainId: string;
  readonly organizationId: string | null;
  readonly priority: number;
  readonly createdAt: number;
  readonly deadlineAt: number | null;
  readonly taskCount: number;
  /** Tasks may be completed from the results of equal ones. */
  readonly cache: boolean;
  /** Its tasks' ids are kept, not made from its own. */
  readonly ownTaskIds: boolean;
  readonly traceparent: string | null;
  status: JobStatus;
  updatedAt: number;
  cancelRequestedAt: number | null;
  lastEvent: number;
  queued: number;
  leased: number;
  running: number;
  completed: number;
  failed: number;
  canceled: number;
}

export const JOB_COLUMNS = `
  j.seq, j.id, j.domain_id AS "domainId", j.organization_id AS "organizationId", j.priority, j.created_at AS "createdAt",
  j.deadline_at AS "deadlineAt", j.task_count AS "taskCount", j.cache,
  j.own_task_ids AS "ownTaskIds", j.traceparent, j.status, j.updated_at AS "updatedAt",
  j.cancel_requested_at AS "cancelRequestedAt", j.last_event AS "lastEvent", j.queued, j.leased, j.running,
  j.completed, j.failed, j.canceled`;

export function countsOf({
  queued,
  leased,
  running,
  completed,
  failed,
  canceled,
}: Job): Record<TaskStatus, number> {
  return { queued, leased, running, completed, failed, canceled };
}

/** The part of a job that is only shown. Stored as JSON. */
export interface JobText {
  readonly label: string;
  readonly meta: JsonObject;
  readonly edges: JobRecord['edges'];
  readonly traceparent?: string;
  readonly not_before?: string;
  readonly redrive_of?: string;
}

export function jobRecord(job: Job, text: JobText): JobRecord {
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
    ...(job.cache && { cache: true }),
    ...(text.not_before !== undefined && { not_before: text.not_before }),
    ...(text.redrive_of !== undefined && { redrive_of: text.redrive_of }),
  };
}

/** What a task was submitted with. */
export interface Spec {
  readonly label: string;
  readonly concurrency?: ConcurrencyLimit;
  readonly stage: string;
  readonly inputs_cids: readonly string[];
  readonly outputs_prefix: string | null;
  readonly meta: Json;
  readonly not_before?: string;
}

/** All that is kept of a task's submission. */
export interface Line extends Spec {
  /** Null: it is made from the job's. */
  readonly id: string | null;
  readonly stageNo: number;
  readonly queueId: number;
  readonly priority: number;
  readonly maxAttempts: number;
  readonly deadlineAt: number | null;
}

export function lineText(line: Line): string {
  const { id, stageNo, queueId, priority, maxAttempts, deadlineAt, not_before, concurrency } = line;
  const { label, stage, inputs_cids, outputs_prefix, meta } = line;
  const head = [id, stageNo, queueId, priority, maxAttempts, deadlineAt];
  const text = [...head, label, stage, inputs_cids, outputs_prefix, meta];
  if (concurrency) return JSON.stringify([...text, not_before ?? null, concurrency.key, concurrency.limit]);
  return JSON.stringify(not_before === undefined ? text : [...text, not_before]);
}

/** Parsed texts, so that a task's is parsed once wherever it is asked for. */
const lines = new WeakMap<object, Line>();

/** What was submitted, of a task (or anything) whose `spec` was read. */
export function lineOf(task: { readonly spec?: string | null }): Line {
  const known = lines.get(task);
  if (known) return known;
  const line = parseLine(task.spec ?? '');
  lines.set(task, line);
  return line;
}

/** Gives the task another text. */
export function setLine(task: { spec?: string | null }, line: Line): void {
  task.spec = lineText(line);
  lines.set(task, line);
}

/** The task's text is known to say this. */
export function keepLine(task: object, line: Line): void {
  lines.set(task, line);
}

export function parseLine(text: string): Line {
  type Stored = [
    id: string | null,
    stageNo: number,
    queueId: number,
    priority: number,
    maxAttempts: number,
    deadlineAt: number | null,
    label: string,
    stage: string,
    inputs: string[],
    prefix: string | null,
    meta: Json,
    notBefore?: string | null,
    key?: string,
    limit?: number,
  ];
  const stored = JSON.parse(text) as Stored;
  const [id, stageNo, queueId, priority, maxAttempts, deadlineAt, label, stage, inputs, prefix, meta] =
    stored;
  const line = {
    id,
    stageNo,
    queueId,
    priority,
    maxAttempts,
    deadlineAt,
    label,
    stage,
    inputs_cids: inputs,
    outputs_prefix: prefix,
    meta,
  };
  const [notBefore = null, key, limit = 0] = stored.slice(11) as [(string | null)?, string?, number?];
  if (notBefore === null && key === undefined) return line;
  return {
    ...line,
    ...(notBefore !== null && { not_before: notBefore }),
    ...(key !== undefined && { concurrency: { key, limit } }),
  };
}

/** The id of the task at this place of the job. `line`: what it was submitted with, if the job has {@link Job.ownTaskIds}. */
export function taskIdOf(job: Pick<Job, 'id' | 'ownTaskIds'>, no: number, line: () => Line): string {
  return (job.ownTaskIds ? line().id : null) ?? taskId(taskIdsOf(job.id), no);
}

/** A task as it was submitted. */
export function taskSubmission(line: Line, queue: Queue): TaskSubmission {
  return {
    label: line.label,
    stage: line.stage,
    capability: queue.capability,
    capability_filters: queue.filters,
    priority: line.priority,
    inputs_cids: line.inputs_cids,
    outputs_prefix: line.outputs_prefix,
    mode: queue.mode,
    meta: line.meta,
    max_attempts: line.maxAttempts,
    deadline_at: isoTimeOrNull(line.deadlineAt),
    ...(line.not_before !== undefined && { not_before: line.not_before }),
    ...(line.concurrency && { concurrency: line.concurrency }),
    ...(queue.resources && { resources: queue.resources }),
  };
}

/** Where a task stands, whatever has become of it. */
export type Standing = Omit<
  Task,
  | 'laneId'
  | 'priority'
  | 'stage'
  | 'maxAttempts'
  | 'deadlineAt'
  | 'keyId'
  | 'keyLimit'
  | 'parked'
  | 'counted'
  | keyof Place
>;

export function taskRecord(
  id: string,
  line: Line,
  task: Standing,
  job: Pick<Job, 'id' | 'organizationId' | 'createdAt'>,
  queue: Queue,
  depsRemaining: number,
  outputs: readonly string[],
): TaskRecord {
  return {
    id,
    job_id: job.id,
    label: line.label,
    stage: line.stage,
    capability: queue.capability,
    capability_filters: queue.filters,
    status: taskStatus(task.state),
    deps_remaining: depsRemaining,
    priority: line.priority,
    inputs_cids: line.inputs_cids,
    outputs_prefix: line.outputs_prefix,
    organization_id: job.organizationId,
    attempts: task.attempts,
    max_attempts: line.maxAttempts,
    lease_expires_at: isoTimeOrNull(task.leaseExpiresAt),
    reserved_by: task.nodeId,
    meta: line.meta,
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
    deadline_at: isoTimeOrNull(line.deadlineAt),
    ...(line.concurrency && { concurrency: line.concurrency }),
    ...(queue.resources && { resources: queue.resources }),
  };
}

/** The record with what heartbeats brought in its `meta`, where that can hold members. */
export function withReport(record: TaskRecord, progress: string | null, events: string | null): TaskRecord {
  const { meta } = record;
  if (progress === null || events === null) return record;
  if (meta !== null && (typeof meta !== 'object' || Array.isArray(meta))) return record;
  return {
    ...record,
    meta: { ...meta, progress: JSON.parse(progress) as Json, events: JSON.parse(events) as Json[] },
  };
}

/** An attempt that ended. */
export interface Attempt extends Place {
  readonly attempt: number;
  readonly leaseId: string;
  readonly nodeId: string;
  readonly outcome: AttemptOutcome;
  /** JSON. */
  readonly outputs: string;
  /** JSON. */
  readonly meta: string;
  readonly reason: string | null;
  readonly leasedAt: number;
  readonly createdAt: number;
}

/** A row of `ended_runs`. */
export interface Run {
  readonly jobSeq: number;
  readonly firstNo: number;
  readonly lastNo: number;
  readonly state: TaskState;
  readonly updatedAt: number;
  readonly body: string;
}

export const RUN_COLUMNS = `e.job_seq AS "jobSeq", e.first_no AS "firstNo", e.last_no AS "lastNo", e.state,
  e.updated_at AS "updatedAt", e.body`;

/** The line of a run for a task that ended; `attempt`: the one that completed it. */
export function endingText(task: Standing, attempt: Attempt | undefined): string {
  const { attempts, nodeFaults, drains, lastHeartbeatAt, cancelRequestedAt, reason } = task;
  const head = `[${attempts},${nodeFaults},${drains},${lastHeartbeatAt},${cancelRequestedAt},`;
  const why = reason === null ? 'null' : JSON.stringify(reason);
  if (!attempt) return `${head}${why}]`;
  const { attempt: number, leaseId, nodeId, leasedAt, outputs, meta } = attempt;
  return `${head}${why},${number},"${leaseId}",${JSON.stringify(nodeId)},${leasedAt},${outputs},${meta}]`;
}

/** How a task ended. */
export interface Ending extends Standing {
  readonly completion: {
    readonly attempt: number;
    readonly leaseId: string;
    readonly nodeId: string;
    readonly leasedAt: number;
    readonly outputs: readonly string[];
    readonly meta: Json;
  } | null;
}

export function endingOf(text: string, state: TaskState, updatedAt: number): Ending {
  type Stored = [
    attempts: number,
    nodeFaults: number,
    drains: number,
    lastHeartbeatAt: number | null,
    cancelRequestedAt: number | null,
    reason: string | null,
    attempt?: number,
    leaseId?: string,
    nodeId?: string,
    leasedAt?: number,
    outputs?: string[],
    meta?: Json,
  ];
  const [attempts, nodeFaults, drains, lastHeartbeatAt, cancelRequestedAt, reason, ...completion] =
    JSON.parse(text) as Stored;
  const [attempt, leaseId = '', nodeId = '', leasedAt = 0, outputs = [], meta = null] = completion;
  return {
    state,
    attempts,
    nodeFaults,
    drains,
    leaseId: null,
    nodeId: null,
    leasedAt: null,
    leaseExpiresAt: null,
    lastHeartbeatAt,
    notBefore: null,
    cancelRequestedAt,
    updatedAt,
    reason,
    completion: attempt === undefined ? null : { attempt, leaseId, nodeId, leasedAt, outputs, meta },
  };
}

/** The tasks of a run, in their order. */
export function endingsOf(run: Run): (Ending & Place)[] {
  return run.body.split('\n').map((text, index) => ({
    ...endingOf(text, run.state, run.updatedAt),
    jobSeq: run.jobSeq,
    no: run.firstNo + index,
  }));
}

/** Where a task stands that was never leased, since its job was submitted. */
export function freshAt(sinceMs: number): Standing {
  return {
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
    updatedAt: sinceMs,
    reason: null,
  };
}

export const ATTEMPT_COLUMNS = `a.job_seq AS "jobSeq", a.no, a.attempt, a.lease_id AS "leaseId", a.node_id AS "nodeId",
  a.outcome, a.outputs, a.meta, a.reason, a.leased_at AS "leasedAt", a.created_at AS "createdAt"`;

/** `outputs` and `meta` parsed. */
export function receiptRecord(
  attempt: Omit<Attempt, 'outputs' | 'meta' | 'attempt' | keyof Place>,
  outputs: readonly string[],
  meta: Json,
  jobId: string,
  id: string,
): ReceiptRecord {
  return {
    id: attempt.leaseId,
    job_id: jobId,
    task_id: id,
    node_id: attempt.nodeId,
    outputs,
    meta,
    created_at: isoTime(attempt.createdAt),
    outcome: attempt.outcome,
    reason: attempt.reason,
    leased_at: isoTime(attempt.leasedAt),
  };
}

/** A node as leasing needs it. */
export interface NodeRow extends KeptNode {
  readonly secretHash: string;
}

export const NODE_COLUMNS = `n.resources, n.id, n.name, n.mode, n.organization_id AS "organizationId", n.secret_hash AS "secretHash",
  n.wallet, n.capabilities, n.labels, n.version, n.max_concurrency AS "maxConcurrency", n.created_at AS "createdAt",
  n.registered_at AS "registeredAt", n.last_seen_at AS "lastSeenAt"`;

/** A row of {@link NODE_COLUMNS}: capabilities, labels and resources are JSON. */
export type StoredNode = Omit<NodeRow, 'capabilities' | 'labels' | 'resources'> & {
  readonly resources: string | null;
  readonly capabilities: string;
  readonly labels: string;
};

export function nodeOf(row: StoredNode): NodeRow {
  return {
    ...row,
    capabilities: JSON.parse(row.capabilities) as string[],
    labels: JSON.parse(row.labels) as Record<string, string>,
    resources: row.resources === null ? null : (JSON.parse(row.resources) as Resources),
  };
}

/** The values of one column each, for `unnest`. */
export function columns<R, C>(rows: readonly R[], ...read: readonly ((row: R) => C)[]): C[][] {
  return read.map((value) => rows.map(value));
}

/** PostgreSQL's text cannot hold U+0000, and from outside anything may come. */
export function storable(text: string): string {
  return text.includes('\0') ? text.replaceAll('\0', '\ufffd') : text;
}
