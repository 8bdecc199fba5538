/**
 * How tasks and jobs end: the verbs complete, fail and release, the sweep, fencing, and what the end of one task means for the
 * rest of its job.
 */
import { MillraceError, truncateUtf8 } from '@millrace/runner';
import {
  backoffMs,
  expiryAfterSetback,
  isFinal,
  isHeld,
  isResumable,
  jobStatus,
  judge,
  taskStatus,
  wakeAt,
} from '../lifecycle.ts';
import type { Ending as How } from '../lifecycle.ts';
import type { AttemptOutcome } from '../records.ts';
import type { CompleteItem, FailItem, LeaseRef, ReleaseItem } from '../store.ts';
import type { Ledger } from './sqlite-ledger.ts';
import { MAX_REASON_BYTES } from './sqlite-model.ts';
import type { Job, Task } from './sqlite-model.ts';
import type { Attempt } from './sqlite-receipts.ts';
import { Stages } from './sqlite-stages.ts';
import { isoTime } from './time.ts';

/** Tasks one sweep transaction looks at. */
export const SWEEP_TASKS = 1024;

export class Ending {
  readonly #ledger: Ledger;
  readonly #stages: Stages;
  /** Tasks that just became ready, in jobs that may be completed from earlier results; not looked at yet. */
  #opened: { readonly job: Job; readonly seq: number }[] = [];

  constructor(ledger: Ledger) {
    this.#ledger = ledger;
    this.#stages = new Stages(
      ledger,
      {
        fail: (task, job, reason) => this.#fail(task, job, reason),
        endRest: (job, reason) => this.endRest(job, reason),
      },
      (job, seqs) => {
        if (ledger.memos.has(job)) for (const seq of seqs) this.#opened.push({ job, seq });
      },
    );
  }

  /** Forgets what a transaction left behind that was rolled back. */
  clear(): void {
    this.#opened = [];
  }

  // An error that a verb returns was meant to have effects; one it throws had none.

  complete(item: CompleteItem): { readonly leaseId: string } | MillraceError {
    const task = this.#find(item) ?? this.#resumed(item);
    if (!task) return this.#repeated(item, ['completed']);
    const ledger = this.#ledger;
    const job = ledger.job(task.jobSeq);
    if (task.cancelRequestedAt !== null) return this.#endRefused(task, job);
    const outputs = item.outputCids.length === 0 ? '[]' : JSON.stringify(item.outputCids);
    const meta = item.meta === null ? 'null' : JSON.stringify(item.meta);
    if (ledger.memos.has(job)) ledger.memos.record(ledger, job, task, item.outputCids, item.meta);
    const leaseId = ledger.endLease(task, job, 'completed', null, outputs, meta);
    ledger.move(task, job, 'completed');
    ledger.saveCompleted(task);
    ledger.emit(job, 'task.completed', task.seq, `{"outputs":${outputs}}`);
    if (task.spec.stage !== 0) this.#stages.count(job, task.spec.stage);
    this.#settle(job);
    this.recall(job, []);
    return { leaseId };
  }

  /**
   * Completes those of a job's tasks that just became ready and were done before, and those that become ready by that,
   * before anybody is given one of them. Next to nothing for a job without `cache`.
   */
  recall(job: Job, seqs: readonly number[]): void {
    for (const seq of seqs) this.#opened.push({ job, seq });
    this.#recallOpened();
  }

  #recallOpened(): void {
    if (this.#opened.length === 0) return;
    const ledger = this.#ledger;
    ledger.flushRows();
    // A list that grows while it is gone through, and no recursion: a chain of stages may be as long as the job has tasks.
    for (const opened of this.#opened) this.#recallOne(opened.job, opened.seq);
    this.#opened = [];
  }

  #recallOne(job: Job, seq: number): void {
    const ledger = this.#ledger;
    const task = ledger.taskBySeq(seq);
    if (task.state !== 'ready' || (task.deadlineAt !== null && task.deadlineAt <= ledger.now)) return;
    const recalled = ledger.memos.recall(ledger, job, task);
    if (recalled === null) return;
    const { nodeId, outputs, meta, from } = recalled;
    const { spec } = task;
    ledger.dequeue(job, spec, seq, seq);
    ledger.receipt(task, job, nodeId, outputs, meta);
    ledger.move(task, job, 'completed');
    ledger.save(task);
    const memo = JSON.stringify({ task_id: from.taskId, job_id: from.jobId });
    ledger.emit(job, 'task.completed', seq, `{"outputs":${outputs},"memo":${memo}}`);
    if (spec.stage !== 0) this.#stages.count(job, spec.stage);
    this.#settle(job);
  }

  fail(item: FailItem): { readonly leaseId: string } | MillraceError {
    const task = this.#find(item) ?? this.#resumed(item);
    if (!task) return this.#repeated(item, ['failed']);
    const job = this.#ledger.job(task.jobSeq);
    if (task.cancelRequestedAt !== null) return this.#endRefused(task, job);
    const reason = truncateUtf8(item.reason, MAX_REASON_BYTES);
    const details = item.details === null ? 'null' : JSON.stringify(item.details);
    const leaseId = this.#ledger.endLease(task, job, 'failed', reason, '[]', details);
    this.#retryOrFail(task, job, item.nodeFault ? 'setup_failed' : 'failed', reason, item.retryable);
    return { leaseId };
  }

  release(item: ReleaseItem): { readonly leaseId: string } {
    const task = this.#find(item);
    if (!task) return this.#repeated(item, ['released', 'canceled']);
    const ledger = this.#ledger;
    const job = ledger.job(task.jobSeq);
    const details = JSON.stringify(item.details ?? null);
    if (task.cancelRequestedAt !== null) {
      const leaseId = ledger.endLease(task, job, 'canceled', task.reason, '[]', details);
      this.#endCanceled(task, job);
      return { leaseId };
    }
    const leaseId = ledger.endLease(task, job, 'released', item.reason, '[]', details);
    ledger.emit(job, 'task.released', task.seq, `{"reason":"${item.reason}"}`);
    // `canceled` without our asking is a node that stopped on its own account: given back like by a drain.
    const ending = item.reason === 'setup_failed' ? 'setup_failed' : 'shutdown';
    this.#retryOrFail(task, job, ending, `released: ${item.reason}`, true);
    return { leaseId };
  }

  /** One transaction's worth of the sweep; `more`: there may be more due. */
  sweep(): { readonly rescued: number; readonly more: boolean } {
    const ledger = this.#ledger;
    const { now } = ledger;
    ledger.flushRows();
    const due = this.#due();
    const failed = new Map<Job, string>();
    let rescued = 0;
    for (const task of due) {
      // Earlier in this sweep the task may have been ended along with its job.
      if ((wakeAt(task) ?? Infinity) > now) continue;
      const job = ledger.job(task.jobSeq);
      const late = task.cancelRequestedAt === null && task.deadlineAt !== null && task.deadlineAt <= now;
      if (isHeld(task.state)) {
        if (late) this.requestCancel(task, 'deadline');
        if ((task.leaseExpiresAt ?? 0) <= now) {
          rescued += 1;
          this.#expire(task, job);
        }
      } else if (late) {
        const { seq, spec } = task;
        if (task.state === 'ready') ledger.dequeue(job, spec, seq, seq);
        this.#fail(task, job, 'deadline');
        failed.set(job, `task ${ledger.nameOf(task)} failed: deadline`);
      } else {
        task.notBefore = null;
        this.#makeReady(task, job);
        ledger.save(task);
        const isNew = task.attempts + task.nodeFaults + task.drains === 0;
        if (isNew && ledger.memos.has(job)) this.#opened.push({ job, seq: task.seq });
      }
    }
    for (const [job, reason] of failed) this.endRest(job, reason);
    this.#recallOpened();
    return { rescued, more: due.length === SWEEP_TASKS };
  }

  /** What the sweep must look at now, the earliest first. */
  #due(): Task[] {
    const ledger = this.#ledger;
    const due: { readonly at: number; readonly seq: number; readonly task?: Task }[] = ledger.dueWakes(
      ledger.now,
      SWEEP_TASKS,
    );
    for (const task of ledger.allHeld()) {
      const expiresAt = expiryAfterSetback(task, ledger.now);
      if (expiresAt !== null) {
        // As if the node were heard now: a lease is mended once.
        task.lastHeartbeatAt = ledger.now;
        task.leaseExpiresAt = expiresAt;
        ledger.saveHeartbeat(task);
      }
      const at = wakeAt(task);
      if (at !== null && at <= ledger.now) due.push({ at, seq: task.seq, task });
    }
    return due
      .toSorted((a, b) => a.at - b.at || a.seq - b.seq)
      .slice(0, SWEEP_TASKS)
      .map(({ seq, task }) => task ?? ledger.taskBySeq(seq));
  }

  /** Ends what is queued and asks what is leased to end. */
  endRest(job: Job, reason: string): void {
    const ledger = this.#ledger;
    const short = truncateUtf8(reason, MAX_REASON_BYTES);
    const { queued, leased, running } = job.counts;
    if (queued + leased + running > 0) {
      ledger.flushRows();
      const tasks = ledger.tasksOf(job);
      ledger.leaveQueues(job, tasks);
      for (const task of tasks) {
        if (isHeld(task.state)) {
          if (task.cancelRequestedAt === null) this.requestCancel(task, short);
        } else if (isFinal(task.state)) continue;
        else if (task.deadlineAt !== null && task.deadlineAt <= ledger.now) {
          this.#fail(task, job, 'deadline');
        } else this.#cancel(task, job, short);
      }
    }
    this.#settle(job);
  }

  requestCancel(task: Task, reason: string): void {
    task.cancelRequestedAt = this.#ledger.now;
    task.reason = reason;
    this.#ledger.save(task);
    this.#ledger.noteCanceled(task);
  }

  // ---- Fencing ------------------------------------------------------------------------------------------------

  /**
   * The task whose newest lease this is, held from now on if it waits for another node after the lease expired.
   *
   * @throws MillraceError `aborted`, `not_found` unknown task
   */
  current(ref: LeaseRef): Task {
    return this.#find(ref) ?? this.#resumed(ref) ?? this.#refuse(ref);
  }

  /** The same, with the task left as it is: for what may still be refused. */
  newest(ref: LeaseRef): Task {
    return this.#find(ref) ?? this.#expired(ref)?.task ?? this.#refuse(ref);
  }

  /** Whether the newest lease of the task expired, and its node may still go on with it. */
  isLapsed(task: Task): boolean {
    return this.#expiry(task) !== undefined;
  }

  #find({ taskId, nodeId, leaseId }: LeaseRef): Task | undefined {
    const task = this.#ledger.held(taskId);
    return task?.nodeId === nodeId && (leaseId === null || task.leaseId === leaseId) ? task : undefined;
  }

  #resumed(ref: LeaseRef): Task | undefined {
    const found = this.#expired(ref);
    if (!found) return undefined;
    const { task, expiry } = found;
    this.#ledger.resume(task, this.#ledger.job(task.jobSeq), expiry);
    return task;
  }

  /** The task that nobody took since this lease of it expired. */
  #expired(ref: LeaseRef): { readonly task: Task; readonly expiry: Attempt } | undefined {
    this.#ledger.flushRows();
    const task = this.#ledger.taskById(ref.taskId);
    const expiry = task ? this.#expiry(task) : undefined;
    if (!task || expiry?.nodeId !== ref.nodeId) return undefined;
    return ref.leaseId === null || ref.leaseId === expiry.leaseId ? { task, expiry } : undefined;
  }

  #expiry(task: Task): Attempt | undefined {
    if (task.ending === 0 || !isResumable(task, this.#ledger.now)) return undefined;
    const [newest] = this.#ledger.receipts.ofTask(this.#ledger.job(task.jobSeq), task);
    return newest?.outcome === 'expired' ? newest : undefined;
  }

  /** The answer to an ending for a lease that is over: the same as the first time, or a refusal. */
  #repeated(ref: LeaseRef, accepted: readonly AttemptOutcome[]): { readonly leaseId: string } {
    this.#ledger.flushRows();
    const task = this.#ledger.taskById(ref.taskId);
    if (task) {
      for (const attempt of this.#ledger.receipts.ofTask(this.#ledger.job(task.jobSeq), task)) {
        if (attempt.nodeId !== ref.nodeId) continue;
        if (ref.leaseId !== null && attempt.leaseId !== ref.leaseId) continue;
        if (accepted.includes(attempt.outcome)) return { leaseId: attempt.leaseId };
        break; // Without a lease id the node's newest attempt is meant.
      }
    }
    return this.#refuse(ref);
  }

  #refuse({ taskId, nodeId, leaseId }: LeaseRef): never {
    this.#ledger.flushRows();
    const task = this.#ledger.taskById(taskId);
    if (!task) throw new MillraceError('not_found', `task ${taskId} does not exist`);
    const lease = leaseId === null ? `node ${nodeId} holds no lease` : `lease ${leaseId} is not the newest`;
    throw new MillraceError('aborted', `${lease} of task ${taskId}, which is ${taskStatus(task.state)}`);
  }

  // ---- Endings ------------------------------------------------------------------------------------------------

  #expire(task: Task, job: Job): void {
    const nodeId = task.nodeId ?? '';
    const requested = task.cancelRequestedAt !== null;
    const reason = requested ? task.reason : `lease expired: node ${nodeId} sent no heartbeat`;
    this.#ledger.endLease(task, job, 'expired', reason, '[]', 'null');
    this.#ledger.emit(job, 'task.expired', task.seq, `{"node_id":"${nodeId}"}`);
    if (requested) this.#endCanceled(task, job);
    else this.#retryOrFail(task, job, 'expired', reason ?? '', true);
  }

  #retryOrFail(task: Task, job: Job, how: How, reason: string, retryable: boolean): void {
    const ledger = this.#ledger;
    const verdict = judge(how, task, retryable);
    const attempt = task.attempts;
    task.attempts = verdict.attempts;
    task.nodeFaults = verdict.nodeFaults;
    task.drains = verdict.drains;
    if (verdict.next === 'failed') {
      this.#fail(task, job, reason);
      this.endRest(job, `task ${ledger.nameOf(task)} failed: ${reason}`);
      return;
    }
    task.reason = reason;
    if (verdict.next === 'delayed') {
      const { random, backoff } = ledger.options;
      const notBefore = ledger.now + backoffMs(verdict.step, random, backoff);
      task.notBefore = notBefore;
      ledger.move(task, job, 'delayed');
      const data = { reason, not_before: isoTime(notBefore), attempt };
      ledger.emit(job, 'task.retry', task.seq, JSON.stringify(data));
    } else this.#makeReady(task, job);
    ledger.save(task);
  }

  #makeReady(task: Task, job: Job): void {
    const { seq, spec } = task;
    this.#ledger.move(task, job, 'ready');
    this.#ledger.enqueue(job, spec, seq, false);
    this.#ledger.emit(job, 'task.runnable', seq);
  }

  /** Ends a task whose lease was cancelled, now that the work is gone. */
  #endCanceled(task: Task, job: Job): void {
    if (task.reason === 'deadline') {
      this.#fail(task, job, 'deadline');
      this.endRest(job, `task ${this.#ledger.nameOf(task)} failed: deadline`);
    } else {
      this.#cancel(task, job, task.reason ?? 'canceled');
      this.#settle(job);
    }
  }

  /** A cancelled lease reported an ending: refused, and the proof that its work is over. */
  #endRefused(task: Task, job: Job): MillraceError {
    const reason = task.reason ?? 'canceled';
    this.#ledger.endLease(task, job, 'canceled', reason, '[]', 'null');
    this.#endCanceled(task, job);
    return new MillraceError(
      'aborted',
      `task ${task.id} was asked to end (${reason}); its result is not accepted`,
    );
  }

  #fail(task: Task, job: Job, reason: string): void {
    task.reason = reason;
    task.notBefore = null;
    this.#ledger.move(task, job, 'failed');
    this.#ledger.save(task);
    this.#ledger.emit(job, 'task.failed', task.seq, JSON.stringify({ reason }));
  }

  #cancel(task: Task, job: Job, reason: string): void {
    task.reason = reason;
    task.notBefore = null;
    task.cancelRequestedAt ??= this.#ledger.now;
    this.#ledger.move(task, job, 'canceled');
    this.#ledger.save(task);
    this.#ledger.emit(job, 'task.canceled', task.seq, JSON.stringify({ reason }));
  }

  /** Gives the job its last status when nothing of it is left to do. */
  #settle(job: Job): void {
    if (isFinal(job.status)) return;
    const status = jobStatus(job.counts, job.status !== 'pending');
    if (status === 'pending' || status === job.status) return;
    this.#ledger.setStatus(job, status);
    if (isFinal(status)) this.#ledger.memos.ended(job);
  }
}
