/** What the parts of the work store (`sqlite-work.ts`) hand to each other: jobs and tasks as they are in memory. */
import type { Clock, Json, JsonObject, Random } from '@millrace/runner';
import { isHeld, wakeAt } from '../lifecycle.ts';
import type { Backoff, TaskState } from '../lifecycle.ts';
import { JOB_STATUSES } from '../records.ts';
import type { ConcurrencyLimit, JobRecord, JobStatus, TaskStatus } from '../records.ts';
import type { TaskIds } from './ids.ts';
import type { PendingReceipts } from './sqlite-receipts.ts';
import type { PendingEvents } from './sqlite-events.ts';
import type { MemoItems } from './sqlite-memos.ts';
import type { Node } from './sqlite-nodes.ts';

export interface WorkOptions {
  readonly clock: Clock;
  readonly random: Random;
  readonly newId: () => string;
  readonly leaseTtlMs: number;
  readonly cancelGraceMs: number;
  readonly backoff: Backoff;
  /** For results that are given again. */
  readonly items: MemoItems;
  /** Undefined: no such node. */
  readonly node: (id: string) => Node | undefined;
}

/** The reference bounds a reason likewise. */
export const MAX_REASON_BYTES = 4096;

/** What a task was submitted with. */
export interface Spec {
  /** 0: a stage without edges. */
  readonly stage: number;
  readonly queueId: number;
  readonly priority: number;
  readonly maxAttempts: number;
  readonly deadlineAt: number | null;
  /** Not to be given out before. */
  readonly notBefore: number | null;
  readonly concurrency: ConcurrencyLimit | null;
  readonly label: string;
  readonly stageName: string;
  readonly inputs: readonly string[];
  readonly outputsPrefix: string | null;
  readonly meta: Json;
}

export interface Task {
  readonly seq: number;
  readonly id: string;
  readonly jobSeq: number;
  readonly spec: Spec;
  /** Of the spec. */
  readonly maxAttempts: number;
  readonly deadlineAt: number | null;
  state: TaskState;
  attempts: number;
  nodeFaults: number;
  drains: number;
  /** Made from the two that follow. */
  leaseId: string | null;
  leaseNo: number | null;
  leasedAt: number | null;
  nodeId: string | null;
  leaseExpiresAt: number | null;
  lastHeartbeatAt: number | null;
  notBefore: number | null;
  cancelRequestedAt: number | null;
  updatedAt: number;
  reason: string | null;
  /** The row with its newest ending; 0: none. */
  ending: number;
  /** As in the table of wakes. */
  wakeAt: number | null;
  /** What heartbeats brought, as stored; read when needed. */
  report: Report | null;
}

export interface Report {
  /** JSON. */
  progress: string;
  /** JSON, the newest last. */
  readonly events: string[];
}

export interface Job {
  readonly seq: number;
  readonly id: string;
  readonly taskIds: TaskIds;
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
  /** Undefined: not read yet. */
  traceparent: string | null | undefined;
  /** Not in the table yet. */
  isNew: boolean;
  /** Touched by the transaction under way. The three that follow are empty when it is not. */
  dirty: boolean;
  readonly events: PendingEvents;
  readonly receipts: PendingReceipts;
  readonly stages: Map<number, Stage>;
}

/** The part of a job that is only shown. Stored as JSON. */
export interface JobText {
  readonly label: string;
  readonly meta: JsonObject;
  readonly edges: JobRecord['edges'];
  readonly capabilities: readonly string[];
  readonly traceparent?: string;
  readonly cache?: boolean;
  readonly not_before?: string;
  readonly redrive_of?: string;
}

export interface Stage {
  readonly no: number;
  readonly firstTask: number;
  readonly lastTask: number;
  /** Tasks not completed. */
  remaining: number;
  /** Preceding stages not completed. */
  depsRemaining: number;
  openedAt: number | null;
}

/** When the sweeper must look at the task, as long as nobody holds it: then its lease says when. */
export function queuedWakeAt(task: Task): number | null {
  return isHeld(task.state) ? null : wakeAt(task);
}

export function timeOf(text: string | null): number | null {
  return text === null ? null : Date.parse(text);
}

export function emptyTasks(): Record<TaskStatus, number> {
  return { queued: 0, leased: 0, running: 0, completed: 0, failed: 0, canceled: 0 };
}

export function emptyJobs(): Record<JobStatus, number> {
  return Object.fromEntries(JOB_STATUSES.map((status) => [status, 0])) as Record<JobStatus, number>;
}
