/**
 * What the dispatcher keeps, in the wire's own names (posemesh DMS job API). The store returns these, the server
 * sends them, the client parses them; there is no second set of names to convert to. Times are RFC 3339 in UTC
 * with milliseconds. Members marked "ours" are additions a reference peer ignores.
 */
import type { Json, JsonObject } from '@millrace/runner';
import type { Resources } from './resources.ts';

export const TASK_STATUSES = ['queued', 'leased', 'running', 'completed', 'failed', 'canceled'] as const;
export type TaskStatus = (typeof TASK_STATUSES)[number];

export const JOB_STATUSES = ['pending', 'running', 'completed', 'failed', 'canceled'] as const;
export type JobStatus = (typeof JOB_STATUSES)[number];

export type NodeMode = 'public' | 'dedicated';

/** A job as submitted, parsed and with defaults filled in. */
export interface JobSpec {
  readonly label: string;
  readonly domain_id: string;
  readonly priority: number;
  readonly meta: JsonObject;
  readonly tasks: readonly TaskSubmission[];
  /** Between stage names. Acyclic; every name is a stage of some task. */
  readonly edges: readonly { readonly from: string; readonly to: string }[];
  /** Ours: RFC 3339; tasks not finished by then fail with reason `deadline`. */
  readonly deadline_at: string | null;
  /** Ours: a task may be completed from the result of an equal one; see `memo.ts` for which. Absent: false. */
  readonly cache?: boolean;
  /** Ours: RFC 3339; no task is given out before. Absent: at once. */
  readonly not_before?: string;
  /** Ours: the job whose undone tasks these are. Not for submitters: {@link redriveSpec} sets it. */
  readonly redrive_of?: string;
}

/**
 * What a node's labels must be, by name. A string: that value. An object (ours): one or more of `{"In": […]}`,
 * `{"NotIn": […]}`, `{"Exists": true}`, `{"DoesNotExist": true}`, of which all must hold.
 */
export type CapabilityFilters = Readonly<Record<string, string | JsonObject>>;

/**
 * A task is given out only while fewer than `limit` tasks with the same key, of any job of its domain, are leased or running.
 * Ours. The key has 1 to 256 characters; tasks of one key may name different limits.
 */
export interface ConcurrencyLimit {
  readonly key: string;
  readonly limit: number;
}

export interface TaskSubmission {
  readonly label: string;
  /** Tasks of one name form a stage. Absent in the spec: the task's label. */
  readonly stage: string;
  readonly capability: string;
  readonly capability_filters: CapabilityFilters;
  readonly priority: number;
  /**
   * Data ids, URLs, or `stage:<stage>[/<glob>]`, which becomes the data ids of that earlier stage's outputs. With `stage?:`
   * there may be none.
   */
  readonly inputs_cids: readonly string[];
  readonly outputs_prefix: string | null;
  readonly mode: NodeMode;
  readonly meta: Json;
  readonly max_attempts: number;
  /** Ours: RFC 3339, or null. */
  readonly deadline_at: string | null;
  /** Ours: RFC 3339; not given out before, nor before the job's. Absent: at once. */
  readonly not_before?: string;
  /** Ours. Absent: any number at once. In a job as submitted, the job may name one for those of its tasks that have none. */
  readonly concurrency?: ConcurrencyLimit;
  /** Ours: what it takes of a node that says what it has. Absent: one `cpu`. */
  readonly resources?: Resources;
}

export interface JobRecord {
  readonly id: string;
  readonly label: string;
  readonly domain_id: string;
  readonly status: JobStatus;
  readonly priority: number;
  readonly created_at: string;
  readonly updated_at: string;
  readonly organization_id: string | null;
  readonly meta: JsonObject;
  readonly credit_lock_id: null;
  readonly credit_lock_amount: null;
  readonly credit_locked_at: null;
  readonly credit_released_at: null;
  /** Ours. Set while the tasks of a cancelled job are being ended; the status follows when they are gone. */
  readonly cancel_requested_at: string | null;
  /** Ours. */
  readonly deadline_at: string | null;
  /** Ours. */
  readonly edges: readonly { readonly from: string; readonly to: string }[];
  /** Ours: as submitted. Absent: false. */
  readonly cache?: boolean;
  /** Ours: as submitted. */
  readonly not_before?: string;
  /** Ours: the job whose undone tasks these are. */
  readonly redrive_of?: string;
}

export type TasksSummary = Readonly<Record<TaskStatus, number>>;

export interface TaskRecord {
  readonly id: string;
  readonly job_id: string;
  readonly label: string;
  readonly stage: string;
  readonly capability: string;
  readonly capability_filters: CapabilityFilters;
  readonly status: TaskStatus;
  /** Preceding stages not yet completed. */
  readonly deps_remaining: number;
  readonly priority: number;
  /** With `stage:` references resolved once the task is runnable. */
  readonly inputs_cids: readonly string[];
  readonly outputs_prefix: string | null;
  readonly organization_id: string | null;
  /** Attempts that count. */
  readonly attempts: number;
  readonly max_attempts: number;
  readonly lease_expires_at: string | null;
  /** Node id of the current lease. */
  readonly reserved_by: string | null;
  /** The submitted meta; `progress` (newest) and `events` (the last few) are added when it is an object. */
  readonly meta: Json;
  readonly cancel_requested_at: string | null;
  readonly last_heartbeat_at: string | null;
  readonly created_at: string;
  readonly updated_at: string;
  readonly mode: NodeMode;
  readonly billing_units: null;
  readonly estimated_credit_cost: null;
  readonly debited_amount: null;
  readonly debited_at: null;
  /** Ours: why the task failed or was cancelled, or why its last attempt ended. */
  readonly reason: string | null;
  /** Ours: not runnable before this, as submitted or while a retry backs off. Null once it is runnable. */
  readonly not_before: string | null;
  /** Ours: data ids reported by the accepted completion. */
  readonly output_cids: readonly string[];
  /** Ours: node faults (setup, drain, crash) that did not consume an attempt. */
  readonly node_faults: number;
  /** Ours. */
  readonly deadline_at: string | null;
  /** Ours: as submitted. */
  readonly concurrency?: ConcurrencyLimit;
  /** Ours: as submitted. */
  readonly resources?: Resources;
}

/** One accepted ending of one attempt. */
export interface ReceiptRecord {
  /** The lease id. */
  readonly id: string;
  readonly job_id: string;
  readonly task_id: string;
  readonly node_id: string;
  readonly outputs: readonly string[];
  /** The `meta` of complete or the `details` of fail. */
  readonly meta: Json;
  readonly created_at: string;
  /** Ours: how the attempt ended. */
  readonly outcome: AttemptOutcome;
  /** Ours. */
  readonly reason: string | null;
  /** Ours: when the lease was given. */
  readonly leased_at: string;
}

export type AttemptOutcome = 'completed' | 'failed' | 'released' | 'expired' | 'canceled';

export interface JobDetail {
  readonly job: JobRecord;
  readonly tasks_summary: TasksSummary;
  readonly tasks: readonly TaskRecord[];
  readonly receipts: readonly ReceiptRecord[];
  /** Ours: the jobs that do again what this one left undone, the first first. Absent: none. */
  readonly redriven_as?: readonly string[];
}

/**
 * One line of a job's durable event stream. `seq` counts from 1 per job without gaps.
 *
 * kinds: `job.submitted`, `job.running`, `job.cancel_requested`, `job.completed|failed|canceled`; `task.runnable`,
 * `task.leased` {node_id, attempt, lease_id}, `task.running`, `task.progress` {progress}, `task.log` {event},
 * `task.retry` {reason, not_before, attempt}, `task.released` {reason}, `task.expired` {node_id}, `task.resumed` {node_id,
 * attempt, lease_id} after that, if its node came back before another took it,
 * `task.completed` {outputs, memo?: {task_id, job_id} of the task whose result it is}, `task.failed` {reason}, `task.canceled` {reason}.
 */
export interface JobEvent {
  readonly seq: number;
  readonly at: string;
  readonly kind: string;
  readonly task_id: string | null;
  readonly data: JsonObject;
}

/** How a tick of a schedule ended: `skipped` because the job before is not over, `missed` because nobody was there in time. */
export type ScheduleOutcome = 'submitted' | 'skipped' | 'missed' | 'failed';

/** A job that is submitted at set times. Ours. */
export interface ScheduleRecord {
  /** Unique in the domain. */
  readonly name: string;
  /** The job's. */
  readonly domain_id: string;
  /** Five fields. */
  readonly cron: string;
  /** Of the IANA database. */
  readonly time_zone: string;
  /** What becomes of ticks that nobody was there for: none of them is made up for, or the last one is. */
  readonly catch_up: 'skip' | 'one';
  /** Whether a tick submits its job while the job before has not ended. */
  readonly overlap: 'allow' | 'skip';
  readonly job: JobSpec;
  readonly created_at: string;
  /** null: there are no more ticks. */
  readonly next_at: string | null;
  readonly last_tick_at: string | null;
  readonly last_outcome: ScheduleOutcome | null;
  /** The newest job it submitted. */
  readonly last_job_id: string | null;
}

export interface NodeRecord {
  readonly id: string;
  readonly name: string;
  readonly mode: NodeMode;
  readonly organization_id: string;
  /** Lower case `0x…`; null until the node has registered. */
  readonly wallet: string | null;
  readonly capabilities: readonly string[];
  readonly labels: Readonly<Record<string, string>>;
  readonly version: string | null;
  readonly max_concurrency: number;
  readonly created_at: string;
  readonly registered_at: string | null;
  readonly last_seen_at: string | null;
  /** Leases it holds now. */
  readonly active_leases: number;
  /** Ours: what it has to give, as registered. Absent: it does not say. */
  readonly resources?: Resources;
  /** Ours: how much of that the tasks take that it holds. Present when `resources` is; empty: nothing. */
  readonly resources_in_use?: Resources;
}

/** A domain in the rounds by which domains take turns. Ours. */
export interface DomainStanding {
  readonly domain_id: string;
  /** Tasks it is given in a round: a whole number from 1 to {@link MAX_WEIGHT}. */
  readonly weight: number;
  /** Tasks that a node may take, and that nodes hold. */
  readonly ready: number;
  readonly held: number;
}

/** The largest weight of a domain. Without one of its own a domain has 1. */
export const MAX_WEIGHT = 1000;

export interface BusyNode {
  readonly node_id: string;
  readonly task_id: string;
  readonly task_status: TaskStatus;
  readonly task_mode: NodeMode;
  readonly job_id: string;
  readonly job_status: JobStatus;
}

/** Content-addressed code that tasks may name: a compute. Ours. */
export interface ComputeRecord {
  /** `compute://sha256/<digest>`. */
  readonly ref: string;
  readonly alg: 'sha256';
  /** 64 lower-case hex digits. */
  readonly digest: string;
  /** What runs it. Not part of what is hashed. */
  readonly engine: string;
  readonly bytes: number;
  readonly created_at: string;
}

/** A named item of a domain. Names are unique per domain; the bytes are stored once per digest. */
export interface DataRecord {
  readonly id: string;
  readonly domain_id: string;
  readonly name: string;
  readonly data_type: string;
  readonly size: number;
  readonly created_at: string;
  readonly updated_at: string;
  /** Ours: `sha256:<hex>` of the bytes. */
  readonly digest: string;
}
