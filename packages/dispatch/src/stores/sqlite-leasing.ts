/** The verbs of nodes that want work and do it: lease, heartbeat, and the check behind every write under a lease. */
import { MillraceError } from '@millrace/runner';
import { expiryAfterSetback, isFinal, taskStatus } from '../lifecycle.ts';
import type { BusyNode, NodeMode } from '../records.ts';
import type {
  GrantedLease,
  HeartbeatAnswer,
  HeartbeatItem,
  LeaseAnswer,
  LeaseRef,
  LeaseRequest,
  TaskStanding,
} from '../store.ts';
import type { Ending } from './sqlite-ending.ts';
import type { Ledger } from './sqlite-ledger.ts';
import type { Task } from './sqlite-model.ts';
import { pickTasks } from './sqlite-picking.ts';
import type { Pick } from './sqlite-picking.ts';
import type { Reports } from './sqlite-reports.ts';
import { isoTime, isoTimeOrNull } from './time.ts';

export class Leasing {
  readonly #ledger: Ledger;
  readonly #ending: Ending;
  readonly #reports: Reports;

  constructor(ledger: Ledger, ending: Ending, reports: Reports) {
    this.#ledger = ledger;
    this.#ending = ending;
    this.#reports = reports;
  }

  /** @throws MillraceError `not_found` unknown node, `invalid_argument` */
  lease({ nodeId, max, capabilities, start }: LeaseRequest): LeaseAnswer {
    const ledger = this.#ledger;
    const node = ledger.options.node(nodeId);
    if (!node) throw new MillraceError('not_found', `node ${nodeId} does not exist`);
    if (!Number.isSafeInteger(max) || max < 1) {
      throw new MillraceError('invalid_argument', `a node must ask for at least 1 task, got ${max}`);
    }
    const free = node.maxConcurrency - (ledger.heldBy(nodeId)?.size ?? 0);
    if (free <= 0) return { leases: [], busy: true };
    const want = Math.min(max, free);
    const room = ledger.room(node);
    const leases: GrantedLease[] = [];
    for (const matching of ledger.queues.matching(node)) {
      if (leases.length === want) break;
      const queues = matching.filter(
        (queue) =>
          queue.active.size > 0 && (capabilities === null || capabilities.includes(queue.capability)),
      );
      if (queues.length === 0) continue;
      const { picks, noRoom, heldBack } = pickTasks(
        ledger,
        queues,
        want - leases.length,
        room?.usage ?? null,
      );
      if (picks.length > 0) leases.push(...this.#grant(picks, nodeId, start));
      if (room !== null && noRoom) room.wanted = true;
      if (heldBack) break;
    }
    return { leases, busy: false };
  }

  #grant(picked: readonly Pick[], nodeId: string, start: boolean): GrantedLease[] {
    const ledger = this.#ledger;
    const tasks = picked.map(({ seq, range }) =>
      range.fresh ? ledger.freshTask(seq) : ledger.taskBySeq(seq),
    );
    const isFresh = (_: Task, index: number): boolean => picked[index]?.range.fresh ?? false;
    const fresh = tasks.filter(isFresh);
    const others = fresh.length === tasks.length ? [] : tasks.filter((task) => !fresh.includes(task));
    ledger.grant(fresh, others, nodeId, start ? 'running' : 'leased');
    return tasks.map((task): GrantedLease => {
      const job = ledger.job(task.jobSeq);
      // After all leases, and not each after its own: what happened alike to neighbours is one line.
      if (start) ledger.emit(job, 'task.running', task.seq);
      return {
        leaseId: task.leaseId ?? '',
        expiresAt: isoTime(task.leaseExpiresAt ?? 0),
        domainId: job.domainId,
        task: ledger.taskRecord(task, job, 0, []),
        traceparent: ledger.traceparent(job),
      };
    });
  }

  /** @throws MillraceError `aborted`, `not_found` as for every write under a lease */
  heartbeat(item: HeartbeatItem): HeartbeatAnswer {
    const ledger = this.#ledger;
    const { now } = ledger;
    const { leaseTtlMs, cancelGraceMs } = ledger.options;
    const task = this.#ending.current(item);
    const job = ledger.job(task.jobSeq);
    if (task.state === 'leased') {
      ledger.move(task, job, 'running');
      ledger.emit(job, 'task.running', task.seq);
    }
    if (task.cancelRequestedAt === null && task.deadlineAt !== null && task.deadlineAt <= now) {
      this.#ending.requestCancel(task, 'deadline');
    }
    const left = expiryAfterSetback(task, now) ?? task.leaseExpiresAt ?? 0;
    // Alive while it winds down, but not for ever.
    const limit = task.cancelRequestedAt === null ? Infinity : task.cancelRequestedAt + cancelGraceMs;
    const expiresAt = Math.max(left, Math.min(now + leaseTtlMs, limit));
    task.lastHeartbeatAt = now;
    task.leaseExpiresAt = expiresAt;
    ledger.saveHeartbeat(task);
    this.#reports.take(task, job, item);
    return {
      leaseId: task.leaseId ?? '',
      expiresAt: isoTime(expiresAt),
      cancel: task.cancelRequestedAt !== null,
      domainId: job.domainId,
      task: ledger.taskRecord(task, job, 0, []),
    };
  }

  /** Of these leases, those whose work should end. */
  canceled(nodeId: string, leaseIds: readonly string[]): string[] {
    const wanted = new Set<string>();
    for (const task of this.#ledger.heldBy(nodeId) ?? []) {
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
  check(ref: LeaseRef, domainId: string): string {
    const task = this.#ending.newest(ref);
    const job = this.#ledger.job(task.jobSeq);
    if (job.domainId !== domainId) {
      throw new MillraceError(
        'permission_denied',
        `task ${task.id} belongs to domain ${job.domainId} and may not write into domain ${domainId}`,
      );
    }
    return job.id;
  }

  /**
   * Which attempt of which job the lease is.
   *
   * @throws MillraceError as {@link check}, whatever the domain
   */
  attemptOf(ref: LeaseRef): { readonly jobId: string; readonly attempt: number } {
    const task = this.#ending.newest(ref);
    return { jobId: this.#ledger.job(task.jobSeq).id, attempt: attemptsOf(task) };
  }

  /** Holds the task of a lease that may write, as the other two found, if it is not held. */
  keep(ref: LeaseRef): void {
    this.#ending.current(ref);
  }

  /** Null: unknown task. `lapsed`: its newest lease expired, and its node may still go on with it. */
  standing(taskId: string, countAhead: boolean): (TaskStanding & { readonly lapsed: boolean }) | null {
    const ledger = this.#ledger;
    const task = ledger.taskById(taskId);
    if (!task) return null;
    const job = ledger.job(task.jobSeq);
    const { seq, spec, state } = task;
    return {
      jobId: job.id,
      domainId: job.domainId,
      attempts: attemptsOf(task),
      leasedAt: isoTimeOrNull(task.leasedAt),
      lapsed: this.#ending.isLapsed(task),
      final: isFinal(state),
      ahead: countAhead && state === 'ready' ? ledger.ahead(job, spec, seq) : null,
      ...(spec.concurrency !== null && {
        heldOfKey: ledger.lanes.heldOfKey(job.domainId, spec.concurrency),
      }),
    };
  }

  busyNodes(mode: NodeMode | 'all'): BusyNode[] {
    const busy: BusyNode[] = [];
    for (const task of this.#ledger.allHeld()) {
      const taskMode = this.#ledger.queues.get(task.spec.queueId).mode;
      if (mode !== 'all' && taskMode !== mode) continue;
      const job = this.#ledger.job(task.jobSeq);
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
}

/** Leases the task had, whether or not they counted. */
function attemptsOf({ attempts, nodeFaults, drains }: Task): number {
  return attempts + nodeFaults + drains;
}
