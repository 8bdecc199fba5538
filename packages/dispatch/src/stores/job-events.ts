/**
 * The kinds of events of a job, for every store; and how PostgreSQL keeps the stream: rows of many events, a line for
 * what happened alike to tasks that follow each other.
 */
import type { JsonObject } from '@millrace/runner';
import { EVENT_CODES, EVENT_KINDS } from './event-kinds.ts';
import { taskId, taskIdsOf } from './ids.ts';
import type { EventKind } from './event-kinds.ts';

export type { EventKind } from './event-kinds.ts';

/** A row is closed at these, so that reading a page parses little more than the page. */
const LINES_PER_ROW = 256;
const EVENTS_PER_ROW = 1024;

const LEASED = EVENT_CODES['task.leased'];

/** A row, but for the job it belongs to. */
export interface EventRow {
  readonly lastSeq: number;
  readonly count: number;
  /** Epoch ms; the times in the body count from it. */
  readonly at: number;
  readonly body: string;
}

export interface StoredEvent {
  readonly seq: number;
  readonly atMs: number;
  readonly kind: string;
  /** The task's position in its job; null: the job itself. */
  readonly task: number | null;
  readonly data: JsonObject;
}

/** The newest line, while what happens next may be the same to the next task. */
interface OpenLine {
  readonly ms: number;
  readonly code: number;
  readonly task: number;
  /** JSON, or empty. Of a lease without its id. */
  readonly data: string;
  /** Of the first lease; else empty. */
  readonly leaseId: string;
  count: number;
}

/** Events of one job that are not in the table yet. */
export class EventBuffer {
  readonly #full: { readonly count: number; readonly body: string }[] = [];
  /** Of the row that is being filled. */
  #lines: string[] = [];
  #count = 0;
  #last: OpenLine | null = null;
  #at = 0;

  /** `data` is JSON; empty is `{}`. */
  add(atMs: number, kind: EventKind, task: number | null, data: string): void {
    this.#add(atMs, EVENT_CODES[kind], task ?? -1, data, '');
  }

  /** `task.leased`. */
  addLeased(atMs: number, task: number, nodeId: string, attempt: number, leaseId: string): void {
    this.#add(atMs, LEASED, task, `${JSON.stringify(nodeId)},${attempt}`, leaseId);
  }

  #add(atMs: number, code: number, task: number, data: string, leaseId: string): void {
    const last = this.#last;
    if (last === null) this.#at = atMs;
    const ms = atMs - this.#at;
    if (last !== null) {
      const goesOn =
        last.code === code && last.task + last.count === task && last.ms === ms && last.data === data;
      if (goesOn && leaseId === (leaseId && leaseAfter(last.leaseId, last.count))) {
        last.count += 1;
        return;
      }
      this.#push(last);
    }
    this.#last = { ms, code, task, data, leaseId, count: 1 };
  }

  /** Empties the buffer. `lastSeq` is the number of the newest event. */
  take(lastSeq: number): EventRow[] {
    if (this.#last === null) return [];
    this.#push(this.#last);
    this.#last = null;
    if (this.#lines.length > 0) this.#closeRow();
    let seq = lastSeq;
    for (const { count } of this.#full) seq -= count;
    return this.#full.splice(0).map(({ count, body }) => {
      seq += count;
      return { lastSeq: seq, count, at: this.#at, body };
    });
  }

  #push({ ms, code, task, data, leaseId, count }: OpenLine): void {
    const full = leaseId === '' ? data : `[${data},"${leaseId}"]`;
    const tail = count > 1 ? `,${full === '' ? '0' : full},${count}]` : full === '' ? ']' : `,${full}]`;
    this.#lines.push(`[${ms},${code},${task}${tail}`);
    this.#count += count;
    if (this.#lines.length === LINES_PER_ROW || this.#count >= EVENTS_PER_ROW) this.#closeRow();
  }

  #closeRow(): void {
    this.#full.push({ count: this.#count, body: `[${this.#lines.join(',')}]` });
    this.#lines = [];
    this.#count = 0;
  }
}

/** The id of the lease that was given so many after this one, of those given together. */
function leaseAfter(leaseId: string, count: number): string {
  return count === 0 ? leaseId : taskId(taskIdsOf(leaseId), count - 1);
}

export function eventsOf({ lastSeq, count, at, body }: EventRow): StoredEvent[] {
  type Line = [ms: number, code: number, task: number, data?: unknown, count?: number];
  let seq = lastSeq - count;
  return (JSON.parse(body) as Line[]).flatMap(([ms, code, task, data, alike = 1]) =>
    Array.from({ length: alike }, (_, index) => {
      seq += 1;
      return {
        seq,
        atMs: at + ms,
        kind: EVENT_KINDS[code] ?? 'unknown',
        task: task < 0 ? null : task + index,
        data: dataOf(data, index),
      };
    }),
  );
}

function dataOf(data: unknown, index: number): JsonObject {
  // Anything else of a lease was written when each event had a line of its own.
  if (!Array.isArray(data)) return (data || {}) as JsonObject;
  const [nodeId, attempt, leaseId] = data as [string, number, string];
  return { node_id: nodeId, attempt, lease_id: leaseAfter(leaseId, index) };
}
