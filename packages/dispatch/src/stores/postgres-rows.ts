/** The rows of jobs and tasks in PostgreSQL as the store works with them, and as records of the wire. */
import type { Json, JsonObject } from '@millrace/runner';
import { taskStatus } from '../lifecycle.ts';
import type { TaskState } from '../lifecycle.ts';
import type {
  AttemptOutcome,
  JobRecord,
  JobStatus,
  ReceiptRecord,
  TaskRecord,
  TaskStatus,
  TaskSubmission,
} from '../records.ts';
import type { Demand } from './matching.ts';
import type { KeptNode } from './node-rules.ts';
import { isoTime, isoTimeOrNull } from './time.ts';

export interface Queue extends Demand {
  readonly id: number;
}

/** What was submitted and never changes, but for {@link spec}. */
interface TaskBase {
  readonly jobSeq: number;
  readonly no: number;
  readonly id: string;
  /** 0: a stage without edges. */
  readonly stage: number;
  readonly queueId: number;
  readonly priority: number;
  readonly maxAttempts: number;
  readonly deadlineAt: number | null;
  readonly label: string;
  /** Only where it was asked for. */
  spec?: string | null;
}

export interface Task extends TaskBase {
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

/** Of `tasks t`. */
export const BASE_COLUMNS = `
  t.job_seq AS "jobSeq", t.no, t.id, t.stage, t.queue_id AS "queueId", t.priority, t.max_attempts AS "maxAttempts",
  t.deadline_at AS "deadlineAt", t.label`;

/** Of `open_tasks o JOIN tasks t`. */
export const OPEN_COLUMNS = `${BASE_COLUMNS}, o.state, o.attempts, o.node_faults AS "nodeFaults", o.drains,
  o.lease_id AS "leaseId", o.node_id AS "nodeId", o.leased_at AS "leasedAt", o.lease_expires_at AS "leaseExpiresAt",
  o.last_heartbeat_at AS "lastHeartbeatAt", o.not_before AS "notBefore",
  o.cancel_requested_at AS "cancelRequestedAt", o.updated_at AS "updatedAt", o.reason`;

export const OPEN_TASKS = 'open_tasks o JOIN tasks t ON t.job_seq = o.job_seq AND t.no = o.no';

/** Of {@link ANY_TASKS}. */
export const ANY_COLUMNS = `${BASE_COLUMNS}, coalesce(o.state, e.state) AS state,
  coalesce(o.attempts, e.attempts) AS attempts, coalesce(o.node_faults, e.node_faults) AS "nodeFaults",
  coalesce(o.drains, e.drains) AS drains, o.lease_id AS "leaseId", o.node_id AS "nodeId", o.leased_at AS "leasedAt",
  o.lease_expires_at AS "leaseExpiresAt", coalesce(o.last_heartbeat_at, e.last_heartbeat_at) AS "lastHeartbeatAt",
  o.not_before AS "notBefore", coalesce(o.cancel_requested_at, e.cancel_requested_at) AS "cancelRequestedAt",
  coalesce(o.updated_at, e.updated_at) AS "updatedAt", coalesce(o.reason, e.reason) AS reason`;

/** Tasks whatever has become of them: a task is in exactly one of the two tables. */
export const ANY_TASKS = `tasks t LEFT JOIN open_tasks o ON o.job_seq = t.job_seq AND o.no = t.no
  LEFT JOIN ended_tasks e ON e.job_seq = t.job_seq AND e.no = t.no`;

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
  j.deadline_at AS "deadlineAt", j.task_count AS "taskCount", j.cache, j.status, j.updated_at AS "updatedAt",
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
  readonly stage: string;
  readonly inputs_cids: readonly string[];
  readonly outputs_prefix: string | null;
  readonly meta: Json;
  readonly not_before?: string;
}

export function specText({ label, stage, inputs_cids, outputs_prefix, meta, not_before }: Spec): string {
  const text = [label, stage, inputs_cids, outputs_prefix, meta];
  return JSON.stringify(not_before === undefined ? text : [...text, not_before]);
}

export function specOf(text: string | null | undefined): Spec {
  const [label, stage, inputs_cids, outputs_prefix, meta, not_before] = JSON.parse(text ?? '') as [
    string,
    string,
    string[],
    string | null,
    Json,
    string?,
  ];
  return {
    label,
    stage,
    inputs_cids,
    outputs_prefix,
    meta,
    ...(not_before !== undefined && { not_before }),
  };
}

/** A task, whose {@link Task.spec} was read, as it was submitted. */
export function taskSubmission(task: TaskBase, queue: Queue): TaskSubmission {
  const spec = specOf(task.spec);
  return {
    label: spec.label,
    stage: spec.stage,
    capability: queue.capability,
    capability_filters: queue.filters,
    priority: task.priority,
    inputs_cids: spec.inputs_cids,
    outputs_prefix: spec.outputs_prefix,
    mode: queue.mode,
    meta: spec.meta,
    max_attempts: task.maxAttempts,
    deadline_at: isoTimeOrNull(task.deadlineAt),
    ...(spec.not_before !== undefined && { not_before: spec.not_before }),
  };
}

/** The record of a task whose {@link Task.spec} was read. */
export function taskRecord(
  task: Task,
  job: Pick<Job, 'id' | 'organizationId' | 'createdAt'>,
  queue: Queue,
  depsRemaining: number,
  outputs: readonly string[],
): TaskRecord {
  const spec = specOf(task.spec);
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
export interface Attempt {
  readonly jobSeq: number;
  readonly no: number;
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

export const ATTEMPT_COLUMNS = `a.job_seq AS "jobSeq", a.no, a.attempt, a.lease_id AS "leaseId", a.node_id AS "nodeId",
  a.outcome, a.outputs, a.meta, a.reason, a.leased_at AS "leasedAt", a.created_at AS "createdAt"`;

export function receiptRecord(attempt: Attempt, jobId: string, taskId: string): ReceiptRecord {
  return {
    id: attempt.leaseId,
    job_id: jobId,
    task_id: taskId,
    node_id: attempt.nodeId,
    outputs: JSON.parse(attempt.outputs) as string[],
    meta: JSON.parse(attempt.meta) as Json,
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

export const NODE_COLUMNS = `n.id, n.name, n.mode, n.organization_id AS "organizationId", n.secret_hash AS "secretHash",
  n.wallet, n.capabilities, n.labels, n.version, n.max_concurrency AS "maxConcurrency", n.created_at AS "createdAt",
  n.registered_at AS "registeredAt", n.last_seen_at AS "lastSeenAt"`;

/** A row of {@link NODE_COLUMNS}: capabilities and labels are JSON. */
export type StoredNode = Omit<NodeRow, 'capabilities' | 'labels'> & {
  readonly capabilities: string;
  readonly labels: string;
};

export function nodeOf(row: StoredNode): NodeRow {
  return {
    ...row,
    capabilities: JSON.parse(row.capabilities) as string[],
    labels: JSON.parse(row.labels) as Record<string, string>,
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
