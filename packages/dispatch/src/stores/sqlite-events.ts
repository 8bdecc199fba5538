/**
 * The event stream of a job: many events to a row, and one line for what happened alike to tasks that follow each other, so
 * that moving a thousand tasks writes about as much as moving one. Synchronous; the caller brings the transaction.
 */
import type { JobEvent } from '../records.ts';
import type { JsonObject } from '@millrace/runner';
import { leaseId, taskId } from './ids.ts';
import { EVENT_CODES, EVENT_KINDS } from './event-kinds.ts';
import type { EventKind } from './event-kinds.ts';
import { BulkInsert } from './sqlite-database.ts';
import type { Database, Statement } from './sqlite-database.ts';
import type { Job, Task } from './sqlite-model.ts';
import { isoTime } from './time.ts';

/** Lines per row, so that reading a page parses little more than the page. */
const LINES_PER_ROW = 256;

const LEASED = EVENT_CODES['task.leased'];

/** What may grow by the next event. */
interface Line {
  readonly ms: number;
  readonly code: number;
  readonly task: number;
  /** JSON, or empty. Of a lease without the number. */
  readonly data: string;
  /** Of a lease; else 0. */
  readonly lease: number;
  count: number;
}

/** A job's events that are not written yet. */
export class PendingEvents {
  readonly #full: { readonly count: number; readonly body: string }[] = [];
  /** Of the row that is being filled. */
  #lines: string[] = [];
  #count = 0;
  #last: Line | null = null;
  #at = 0;

  add(ms: number, code: number, task: number, data: string, lease: number): void {
    const last = this.#last;
    if (last === null) this.#at = ms;
    else if (
      last.code === code &&
      task === last.task + last.count &&
      last.ms === ms &&
      last.data === data &&
      (code !== LEASED || lease === last.lease + last.count)
    ) {
      last.count += 1;
      return;
    } else this.#push(last);
    this.#last = { ms, code, task, data, lease, count: 1 };
  }

  /** Hands over what there is, in rows; `lastSeq` is the number of the newest event. */
  take(lastSeq: number, write: (lastSeq: number, count: number, at: number, body: string) => void): void {
    if (this.#last === null) return;
    this.#push(this.#last);
    this.#last = null;
    if (this.#lines.length > 0) this.#closeRow();
    let seq = lastSeq;
    for (const { count } of this.#full) seq -= count;
    for (const { count, body } of this.#full) {
      seq += count;
      write(seq, count, this.#at, body);
    }
    this.#full.length = 0;
  }

  #push({ ms, code, task, data, lease, count }: Line): void {
    const full = code === LEASED ? `[${data},${lease}]` : data;
    const tail = count > 1 ? `,${full === '' ? '0' : full},${count}]` : full === '' ? ']' : `,${full}]`;
    this.#lines.push(`[${ms - this.#at},${code},${task}${tail}`);
    this.#count += count;
    if (this.#lines.length === LINES_PER_ROW) this.#closeRow();
  }

  #closeRow(): void {
    this.#full.push({ count: this.#count, body: `[${this.#lines.join(',')}]` });
    this.#lines = [];
    this.#count = 0;
  }
}

type StoredLine = readonly [ms: number, code: number, task: number, data?: unknown, count?: number];

export class Events {
  readonly #database: Database;
  readonly #rows: BulkInsert;
  readonly #next: Statement;
  readonly #delete: Statement;

  constructor(database: Database) {
    this.#database = database;
    this.#rows = new BulkInsert(database, 'events', ['job_seq', 'last_seq', 'count', 'at', 'body']);
    this.#next = database.prepare(
      'SELECT last_seq, count, at, body FROM events WHERE job_seq = ? AND last_seq > ? ORDER BY last_seq LIMIT 1',
    );
    this.#delete = database.prepare('DELETE FROM events WHERE job_seq = ?');
  }

  /** Appends an event of the job, or of its task with this number. `data` is JSON; empty is `{}`. */
  add(now: number, job: Job, kind: EventKind, taskSeq: number | null, data: string): void {
    this.#database.noteWrite();
    job.events.add(now, EVENT_CODES[kind], taskSeq === null ? -1 : taskSeq - job.firstTask, data, 0);
    job.lastEvent += 1;
  }

  /** Appends `task.leased`. */
  addLeased(now: number, job: Job, task: Task): void {
    this.#database.noteWrite();
    const data = `"${task.nodeId}",${task.attempts}`;
    job.events.add(now, LEASED, task.seq - job.firstTask, data, task.leaseNo ?? 0);
    job.lastEvent += 1;
  }

  /** Takes the job's pending events over into rows. */
  collect(job: Job): void {
    job.events.take(job.lastEvent, (lastSeq, count, at, body) =>
      this.#rows.addCounted(job.seq, lastSeq, count, at, body),
    );
  }

  /** Writes what was collected. */
  flush(): void {
    this.#rows.flush();
  }

  clear(): void {
    this.#rows.clear();
  }

  /** Events with `seq > after`, at most `limit`. */
  read(job: Job, after: number, limit: number): JobEvent[] {
    const found: JobEvent[] = [];
    let from = after;
    while (found.length < limit) {
      const row = this.#next.get(job.seq, from);
      if (!row) break;
      const [lastSeq, count, at, body] = row as [number, number, number, string];
      let seq = lastSeq - count + 1;
      for (const line of JSON.parse(body) as StoredLine[]) {
        const [, , , , alike = 1] = line;
        const end = Math.min(alike, limit - found.length + Math.max(0, after + 1 - seq));
        for (let index = Math.max(0, after + 1 - seq); index < end; index += 1) {
          found.push(eventOf(job, seq + index, at, line, index));
        }
        seq += alike;
        if (found.length >= limit) break;
      }
      from = lastSeq;
    }
    return found;
  }

  delete(job: Job): void {
    this.#delete.run(job.seq);
  }
}

/** The event of the `index`-th task of a line. */
function eventOf(job: Job, seq: number, rowAt: number, line: StoredLine, index: number): JobEvent {
  const [ms, code, task, data] = line;
  const at = rowAt + ms;
  return {
    seq,
    at: isoTime(at),
    kind: EVENT_KINDS[code] ?? 'unknown',
    task_id: task < 0 ? null : taskId(job.taskIds, task + index),
    data: code === LEASED ? leasedData(at, data, index) : ((data || {}) as JsonObject),
  };
}

function leasedData(at: number, data: unknown, index: number): JsonObject {
  const [nodeId, attempt, no] = data as [string, number, number];
  return { node_id: nodeId, attempt, lease_id: leaseId(at, no + index) };
}
