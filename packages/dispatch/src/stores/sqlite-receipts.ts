/**
 * How attempts ended: the receipts of the wire and what makes repeated endings harmless. Many to a row; those of one task form
 * a chain from its newest, which its row in `tasks` names. Synchronous; the caller brings the transaction.
 */
import { MillraceError } from '@millrace/runner';
import type { Json } from '@millrace/runner';
import type { AttemptOutcome, ReceiptRecord } from '../records.ts';
import { leaseId, taskId } from './ids.ts';
import { BulkInsert } from './sqlite-database.ts';
import type { Database, Row, Statement } from './sqlite-database.ts';
import type { Job, Task } from './sqlite-model.ts';
import { isoTime } from './time.ts';

/** A row is closed when it has this many characters, so that reading one ending parses little more. */
const ROW_CHARS = 64 * 1024;

/** Outcomes are stored by their position here: append only. */
const OUTCOMES = ['completed', 'failed', 'released', 'expired', 'canceled'] as const;
const CODES = Object.fromEntries(OUTCOMES.map((outcome, code) => [outcome, code])) as Record<
  AttemptOutcome,
  number
>;

export interface Attempt {
  /** Of the task in its job, from 0. */
  readonly index: number;
  readonly outcome: AttemptOutcome;
  readonly leaseId: string;
  readonly leaseNo: number;
  readonly nodeId: string;
  readonly leasedAt: number;
  readonly endedAt: number;
  readonly outputs: readonly string[];
  readonly meta: Json;
  readonly reason: string | null;
  /** The row with the task's ending before this one; 0: none. */
  readonly before: number;
}

/** A job's endings that are not written yet. */
export class PendingReceipts {
  lines: string[] = [];
  chars = 0;
  /** The number of the row they will be; its time. */
  no = 0;
  at = 0;
  /** Of the last line. */
  nodeId: string | null = null;
}

/** Places in a line. */
const BEFORE = 1;
const NODE = 6;

type StoredLine = readonly [
  task: number,
  before: number,
  ms: number,
  outcome: number,
  lease: number,
  leasedAt: number,
  node: string | 0,
  outputs: string[],
  meta: Json,
  reason?: string,
];

export class Receipts {
  readonly #database: Database;
  readonly #rows: BulkInsert;
  readonly #ofJob: Statement;
  readonly #one: Statement;
  readonly #rewrite: Statement;
  readonly #deleteOne: Statement;
  readonly #delete: Statement;

  constructor(database: Database) {
    this.#database = database;
    this.#rows = new BulkInsert(database, 'endings', ['job_seq', 'no', 'at', 'body']);
    this.#ofJob = database.prepare('SELECT at, body FROM endings WHERE job_seq = ? ORDER BY no');
    this.#one = database.prepare('SELECT at, body FROM endings WHERE job_seq = ? AND no = ?');
    this.#rewrite = database.prepare('UPDATE endings SET body = ? WHERE job_seq = ? AND no = ?');
    this.#deleteOne = database.prepare('DELETE FROM endings WHERE job_seq = ? AND no = ?');
    this.#delete = database.prepare('DELETE FROM endings WHERE job_seq = ?');
  }

  /**
   * Notes how the lease that the task still has ended. `outputs` and `meta` are JSON. The caller appends an event of the
   * job for it: by its events the rows are numbered.
   */
  add(
    now: number,
    job: Job,
    task: Task,
    outcome: AttemptOutcome,
    outputs: string,
    meta: string,
    reason: string | null,
  ): void {
    this.#database.noteWrite();
    const pending = job.receipts;
    if (pending.lines.length === 0) {
      pending.no = job.lastEvent;
      pending.at = now;
    }
    const { nodeId } = task;
    const node = nodeId === pending.nodeId ? '0' : `"${nodeId}"`;
    const tail = reason === null ? ']' : `,${JSON.stringify(reason)}]`;
    const line = `[${task.seq - job.firstTask},${task.ending},${now - pending.at},${CODES[outcome]},${task.leaseNo},${task.leasedAt},${node},${outputs},${meta}${tail}`;
    pending.nodeId = nodeId;
    pending.lines.push(line);
    pending.chars += line.length;
    task.ending = pending.no;
    if (pending.chars >= ROW_CHARS) this.collect(job);
  }

  /** Takes the job's pending endings over into a row. */
  collect(job: Job): void {
    const pending = job.receipts;
    if (pending.lines.length === 0) return;
    this.#rows.addCounted(job.seq, pending.no, pending.at, `[${pending.lines.join(',')}]`);
    pending.lines = [];
    pending.chars = 0;
    pending.nodeId = null;
  }

  /** Writes what was collected. */
  flush(): void {
    this.#rows.flush();
  }

  clear(): void {
    this.#rows.clear();
  }

  /** All of the job, in the order they ended. */
  ofJob(job: Job): Attempt[] {
    return this.#ofJob.all(job.seq).flatMap(attemptsOf);
  }

  /** All that are in these rows of the job. */
  ofRows(job: Job, nos: Iterable<number>): Attempt[] {
    return [...nos].flatMap((no) => this.#row(job, no));
  }

  /** Of one task, the newest first. */
  *ofTask(job: Job, task: Task): Generator<Attempt> {
    const index = task.seq - job.firstTask;
    for (let no = task.ending; no !== 0;) {
      const own = this.#row(job, no).filter((attempt) => attempt.index === index);
      yield* own.toReversed();
      no = own[0]?.before ?? 0;
    }
  }

  /** Takes back the newest ending of a task, which is in its row. */
  remove(job: Job, task: Task): void {
    const no = task.ending;
    const lines = linesOf(this.#one.get(job.seq, no));
    const at = lines.findLastIndex(([index]) => index === task.seq - job.firstTask);
    const [line] = lines.splice(at, 1);
    if (at === -1 || !line) throw new MillraceError('internal', `row ${no} has no ending of task ${task.id}`);
    const next = lines[at];
    // It may be the one that names the node for those after it.
    if (next && line[NODE] !== 0 && next[NODE] === 0)
      lines[at] = next.with(NODE, line[NODE]) as unknown as StoredLine;
    if (lines.length === 0) this.#deleteOne.run(job.seq, no);
    else this.#rewrite.run(JSON.stringify(lines), job.seq, no);
    task.ending = line[BEFORE];
  }

  delete(job: Job): void {
    this.#delete.run(job.seq);
  }

  #row(job: Job, no: number): Attempt[] {
    const row = this.#one.get(job.seq, no);
    return row ? attemptsOf(row) : [];
  }
}

function linesOf(row: Row | undefined): StoredLine[] {
  return row ? (JSON.parse(String(row[1])) as StoredLine[]) : [];
}

function attemptsOf(row: Row): Attempt[] {
  const [at] = row;
  let nodeId = '';
  return linesOf(row).map(
    ([index, before, ms, outcome, lease, leasedAt, node, outputs, meta, reason = null]) => {
      if (node !== 0) nodeId = node;
      return {
        index,
        outcome: OUTCOMES[outcome] ?? 'failed',
        leaseId: leaseId(leasedAt, lease),
        leaseNo: lease,
        nodeId,
        leasedAt,
        endedAt: (at as number) + ms,
        outputs,
        meta,
        reason,
        before,
      };
    },
  );
}

export function receiptOf(job: Job, attempt: Attempt): ReceiptRecord {
  return {
    id: attempt.leaseId,
    job_id: job.id,
    task_id: taskId(job.taskIds, attempt.index),
    node_id: attempt.nodeId,
    outputs: attempt.outputs,
    meta: attempt.meta,
    created_at: isoTime(attempt.endedAt),
    outcome: attempt.outcome,
    reason: attempt.reason,
    leased_at: isoTime(attempt.leasedAt),
  };
}
