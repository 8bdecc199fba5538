/**
 * The life of a task and of its job: every rule about states, attempts and endings, as prose, as a table and as pure
 * functions. Stores apply these rules inside their transactions and decide nothing of their own.
 *
 * ## Tasks
 *
 * The wire knows six states. `queued` has three flavours that only the store sees:
 *
 * | state       | wire        | means                                                                     | left by |
 * | ----------- | ----------- | ------------------------------------------------------------------------- | ------- |
 * | `blocked`   | `queued`    | a preceding stage is not complete                                         | the last preceding stage completes: `ready`, or `delayed` before its time |
 * | `delayed`   | `queued`    | a retry backs off, or it was submitted to wait, until `not_before`        | sweep after `not_before`: `ready` |
 * | `ready`     | `queued`    | a node may take it                                                        | lease: `leased` (`running` when it is started at once) |
 * | `leased`    | `leased`    | a node holds the lease and has not sent a heartbeat yet                   | first heartbeat: `running`; an ending |
 * | `running`   | `running`   | the node works on it                                                      | an ending |
 * | `completed` | `completed` | one completion was accepted                                               | never |
 * | `failed`    | `failed`    | no attempt is left, or retrying is pointless, or the deadline passed      | never |
 * | `canceled`  | `canceled`  | the requestor cancelled the job, or another task of the job failed        | never |
 *
 * In a job with `cache: true` a task that becomes `ready` and was done before is `completed` in the same transaction, from the
 * earlier result and without an attempt (`memo.ts`).
 *
 * A terminal state is final: no verb changes it, whoever asks and however late.
 *
 * ## How an attempt ends
 *
 * An attempt begins with a lease and has exactly one ending. `attempts` is raised by the lease, and given back where
 * the ending does not count.
 *
 * | ending         | who says so                        | counts                                   | then |
 * | -------------- | ---------------------------------- | ---------------------------------------- | ---- |
 * | `completed`    | complete                           | yes                                      | `completed` |
 * | `failed`       | fail                               | yes                                      | `delayed`, or `failed` when not retryable or none is left |
 * | `setup_failed` | fail or release: the node's fault  | after {@link FREE_NODE_FAULTS} of them   | `delayed`; `failed` when it counted and none is left |
 * | `expired`      | sweep: the node went silent        | likewise (one tally with `setup_failed`) | `ready` at once; when it counted as `failed`. Undone when the node comes back before another took the task |
 * | `shutdown`     | release: the node drains           | no; after {@link FREE_DRAINS} as a fault | `ready` at once |
 *
 * So a node that cannot set tasks up, or dies under them, does not eat the attempts of work that is fine, and a task
 * that kills every node it meets still ends.
 *
 * ## Fencing
 *
 * A write under a lease is accepted while that lease is its task's newest. Repeating the ending that was accepted for a
 * lease is harmless and answers as the first time, whatever happened to the task since.
 *
 * An expired lease that nobody replaced is the newest, so a node that lost contact and comes back in time goes on as if
 * nothing had happened:
 *
 * | the lease                                                  | heartbeat, complete, fail, log append, artifact write |
 * | ---------------------------------------------------------- | ----------------------------------------------------- |
 * | has expired and was not swept yet                          | accepted: it never ended |
 * | was swept, its task is `ready`, or `delayed` by that       | accepted: the lease is *resumed* first |
 * | was swept, and somebody leased the task since              | `aborted` |
 * | was swept, and its task is final or past its deadline      | `aborted` |
 * | ended in any other way                                     | `aborted`, unless it repeats that ending |
 *
 * Resuming takes the expiry back ({@link resume}): its receipt goes, the attempt is counted again and the fault is not, the
 * task is `running` under the same lease id with a fresh expiry, and `task.resumed` says so. It ignores
 * `max_concurrency`, since the work is going on already; a resumed lease counts as held like any other. A release does not
 * resume: who gives back what was taken away has nothing more to do.
 *
 * ## Cancelling
 *
 * A leased task cannot be taken from a node that is working on it, only asked for: `cancel_requested_at` is set, the
 * next heartbeat's answer says so, and the task ends when the work is gone: released, expired, or reported as complete
 * or failed. Such a report is refused as `aborted`, because a cancelled lease is not entitled to an ending of its own, and
 * it proves that the work is over. Heartbeats of a cancelled lease keep it alive only for a bounded time, so a node
 * that ignores the request cannot hold the job open. The first reason wins: requestor, failed job, or deadline. Ended by
 * its deadline a task is `failed` with reason `deadline`, otherwise `canceled`.
 *
 * ## Jobs
 *
 * | job         | means |
 * | ----------- | ----- |
 * | `pending`   | no task was ever leased |
 * | `running`   | some task was |
 * | `completed` | every task completed |
 * | `failed`    | a task failed for good. The job fails fast: queued tasks are canceled (their reason names the failed one), leased ones are asked to end, and the status follows once nothing is leased |
 * | `canceled`  | it was cancelled and no task is queued or leased any more |
 */
import type { Random } from '@millrace/runner';
import type { JobStatus, TaskStatus, TasksSummary } from './records.ts';

export const TASK_STATES = [
  'blocked',
  'delayed',
  'ready',
  'leased',
  'running',
  'completed',
  'failed',
  'canceled',
] as const;
export type TaskState = (typeof TASK_STATES)[number];

/** The state as the wire names it. */
export function taskStatus(state: TaskState): TaskStatus {
  return state === 'blocked' || state === 'delayed' || state === 'ready' ? 'queued' : state;
}

/** True for states that are never left. */
export function isFinal(state: TaskState | JobStatus): boolean {
  return state === 'completed' || state === 'failed' || state === 'canceled';
}

/** True while some node holds a lease on the task. */
export function isHeld(state: TaskState): state is 'leased' | 'running' {
  return state === 'leased' || state === 'running';
}

export interface Backoff {
  /** Upper bound of the first delay, milliseconds. Default 1000. */
  readonly baseMs: number;
  /** Upper bound of every delay, milliseconds. Default 60,000. */
  readonly capMs: number;
}

export const DEFAULT_BACKOFF: Backoff = { baseMs: 1000, capMs: 60_000 };

/**
 * The delay before the try after the `step`-th one (counted from 1): uniform between 0 and `min(cap, base * 2^(step-1))`,
 * so that tasks which failed together do not come back together ("full jitter", AWS Architecture Blog, 2015).
 */
export function backoffMs(step: number, random: Random, backoff: Backoff = DEFAULT_BACKOFF): number {
  return Math.round(random() * Math.min(backoff.capMs, backoff.baseMs * 2 ** Math.max(0, step - 1)));
}

/** Node faults of one task that do not consume an attempt; the next ones do. */
export const FREE_NODE_FAULTS = 3;

/** Drains of one task that are nobody's fault. Beyond them something restarts too often, and they are node faults. */
export const FREE_DRAINS = 100;

/** How an attempt ended, other than by completion or by a cancel. */
export type Ending = 'failed' | 'setup_failed' | 'expired' | 'shutdown';

export interface Tally {
  /** The attempt that ends now is included. */
  readonly attempts: number;
  readonly maxAttempts: number;
  /** Node faults so far that did not count. */
  readonly nodeFaults: number;
  /** Drains so far that did not count. */
  readonly drains: number;
}

export interface Verdict {
  readonly attempts: number;
  readonly nodeFaults: number;
  readonly drains: number;
  /** `delayed`: back off with `step`. */
  readonly next: 'ready' | 'delayed' | 'failed';
  /** For {@link backoffMs}. */
  readonly step: number;
}

/** What an ending does to its task. `retryable` matters for `failed` only. */
export function judge(ending: Ending, tally: Tally, retryable: boolean): Verdict {
  const { attempts, nodeFaults, drains } = tally;
  if (ending === 'shutdown' && drains < FREE_DRAINS) {
    return { attempts: attempts - 1, nodeFaults, drains: drains + 1, next: 'ready', step: 0 };
  }
  if (ending !== 'failed' && nodeFaults < FREE_NODE_FAULTS) {
    return {
      attempts: attempts - 1,
      nodeFaults: nodeFaults + 1,
      drains,
      // A node that went silent or drained is out of the way; one that cannot set the task up would take it again.
      next: ending === 'setup_failed' ? 'delayed' : 'ready',
      step: nodeFaults + 1,
    };
  }
  const again = attempts < tally.maxAttempts && (ending !== 'failed' || retryable);
  return { attempts, nodeFaults, drains, next: again ? 'delayed' : 'failed', step: attempts };
}

/**
 * What an expiry that nobody acted on leaves of the tally once its lease is resumed: one node fault less, one attempt more.
 * That undoes an expiry which did not count. One that did goes on as an attempt of its own for the fault it gets back, so that
 * attempts and faults together, which number the logs and bound how often a task is begun, stay what they were.
 */
export function resume({ attempts, nodeFaults }: Pick<Tally, 'attempts' | 'nodeFaults'>): {
  readonly attempts: number;
  readonly nodeFaults: number;
} {
  return { attempts: attempts + 1, nodeFaults: nodeFaults - 1 };
}

/** Whether a task whose newest lease expired is still there for the node that held it. */
export function isResumable(
  task: { readonly state: TaskState; readonly deadlineAt: number | null },
  now: number,
): boolean {
  if (task.state !== 'ready' && task.state !== 'delayed') return false;
  return task.deadlineAt === null || task.deadlineAt > now;
}

/**
 * The job's status for these counts of its tasks. `started`: some task was leased once. While tasks are still queued or
 * leased it is `pending` or `running`, whatever has failed.
 */
export function jobStatus(tasks: TasksSummary, started: boolean): JobStatus {
  if (tasks.queued + tasks.leased + tasks.running > 0) return started ? 'running' : 'pending';
  if (tasks.failed > 0) return 'failed';
  return tasks.canceled > 0 ? 'canceled' : 'completed';
}

/** The times of a task that decide when the sweeper must look at it again. Epoch ms. */
export interface Waits {
  readonly state: TaskState;
  readonly leaseExpiresAt: number | null;
  readonly notBefore: number | null;
  readonly deadlineAt: number | null;
  readonly cancelRequestedAt: number | null;
}

/** When the sweeper must look at the task, epoch ms; null: never by itself. */
export function wakeAt(task: Waits): number | null {
  if (isFinal(task.state)) return null;
  // A task that was asked to end has had its reason; its deadline adds nothing.
  const deadline = task.cancelRequestedAt === null ? task.deadlineAt : null;
  const own = isHeld(task.state) ? task.leaseExpiresAt : task.state === 'delayed' ? task.notBefore : null;
  if (own === null || deadline === null) return own ?? deadline;
  return Math.min(own, deadline);
}

/**
 * When a lease expires whose node was last heard of in the future: the store's clock was set back since, and what the lease had left
 * counts from now on. Otherwise the tasks of a node that died would wait until the clock is where it was. Null: nothing to mend.
 */
export function expiryAfterSetback(
  held: {
    readonly leasedAt: number | null;
    readonly lastHeartbeatAt: number | null;
    readonly leaseExpiresAt: number | null;
  },
  now: number,
): number | null {
  const heardAt = held.lastHeartbeatAt ?? held.leasedAt;
  if (heardAt === null || held.leaseExpiresAt === null || heardAt <= now) return null;
  return now + Math.max(0, held.leaseExpiresAt - heardAt);
}
