/** The verbs of nodes that want work and do it: lease, heartbeat, and the check behind every write under a lease. */
import { MillraceError } from '@millrace/runner';
import { isFinal, taskStatus } from '../lifecycle.ts';
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
import type { Queue, Range } from './sqlite-queues.ts';
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
    const leases: GrantedLease[] = [];
    for (const matching of ledger.queues.matching(node)) {
      if (leases.length === want) break;
      const queues = matching.filter(
        (queue) => queue.ready > 0 && (capabilities === null || capabilities.includes(queue.capability)),
      );
      if (queues.length === 0) continue;
      leases.push(...this.#grant(this.#pick(queues, want - leases.length), nodeId, start));
    }
    return { leases, busy: false };
  }

  /** Takes up to `want` ready tasks out of these queues, by priority, then age. */
  #pick(queues: readonly Queue[], want: number): Pick[] {
    // A merge of sorted queues that reads each in small steps: however many queues there are, little more is read than
    // is given out.
    const step = Math.max(1, Math.ceil(want / queues.length));
    const fronts = queues.map((queue) => new Front(this.#ledger, queue, step));
    const picked: Pick[] = [];
    while (picked.length < want) {
      let best: Front | null = null;
      for (const front of fronts) {
        if (front.head === null) continue;
        if (best?.head == null || comesBefore(front.head, best.head)) best = front;
      }
      if (best?.head == null) break;
      picked.push(best.head);
      best.next();
    }
    for (const front of fronts) front.take();
    return picked;
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
    task.lastHeartbeatAt = now;
    // Alive while it winds down, but not for ever.
    const limit = task.cancelRequestedAt === null ? Infinity : task.cancelRequestedAt + cancelGraceMs;
    const expiresAt = Math.max(task.leaseExpiresAt ?? 0, Math.min(now + leaseTtlMs, limit));
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
    const task = this.#ending.current(ref);
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
    const task = this.#ending.current(ref);
    return { jobId: this.#ledger.job(task.jobSeq).id, attempt: attemptsOf(task) };
  }

  /** Null: unknown task. */
  standing(taskId: string, countAhead: boolean): TaskStanding | null {
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
      final: isFinal(state),
      ahead: countAhead && state === 'ready' ? ledger.queues.ahead(spec.queueId, spec.priority, seq) : null,
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

/** A task that may be leased. */
interface Pick {
  readonly seq: number;
  readonly range: Readonly<Range>;
}

function comesBefore(a: Pick, b: Pick): boolean {
  const byPriority = a.range.priority - b.range.priority;
  return byPriority > 0 || (byPriority === 0 && a.seq < b.seq);
}

/** The ready tasks of one queue in their order, read a few ranges at a time. */
class Front {
  readonly #ledger: Ledger;
  readonly #queue: Queue;
  readonly #step: number;
  #ranges: readonly Readonly<Range>[] = [];
  #read = 0;
  #at = 0;
  /** What was picked so far, by range. */
  readonly #picked: { readonly range: Readonly<Range>; readonly seqs: number[] }[] = [];
  /** The first that was not picked; null: there is none. */
  head: Pick | null = null;

  constructor(ledger: Ledger, queue: Queue, step: number) {
    this.#ledger = ledger;
    this.#queue = queue;
    this.#step = step;
    this.#advance(null);
  }

  /** Picks the head. */
  next(): void {
    if (this.head === null) return;
    const { seq, range } = this.head;
    const last = this.#picked.at(-1);
    if (last?.range === range) last.seqs.push(seq);
    else this.#picked.push({ range, seqs: [seq] });
    this.#advance(this.head);
  }

  /** Takes what was picked out of the queue. */
  take(): void {
    for (const { range, seqs } of this.#picked) this.#ledger.queues.take(range, seqs);
  }

  #advance(from: Pick | null): void {
    let range = from?.range ?? this.#nextRange();
    let seq = from === null ? range?.firstTask : from.seq + 1;
    while (range) {
      for (; seq !== undefined && seq <= range.lastTask; seq += 1) {
        // A task past its deadline is not given out any more; the sweep will end it.
        const { deadlineAt } = this.#ledger.specs.get(seq).spec;
        if (deadlineAt !== null && deadlineAt <= this.#ledger.now) continue;
        this.head = { seq, range };
        return;
      }
      range = this.#nextRange();
      seq = range?.firstTask;
    }
    this.head = null;
  }

  #nextRange(): Readonly<Range> | undefined {
    if (this.#at === this.#ranges.length && this.#ranges.length === (this.#read === 0 ? 0 : this.#step)) {
      this.#ranges = this.#ledger.queues.front(this.#queue, this.#step, this.#read);
      this.#read += this.#step;
      this.#at = 0;
    }
    return this.#ranges[this.#at++];
  }
}
