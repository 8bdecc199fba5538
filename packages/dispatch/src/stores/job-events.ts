/**
 * The kinds of events of a job, for every store; and how PostgreSQL keeps the stream: rows of many events, each event a short
 * JSON array. (SQLite's rows also fold what happened alike to neighbours, `sqlite-events.ts`.)
 */
import type { JsonObject } from '@millrace/runner';
import { EVENT_CODES, EVENT_KINDS } from './event-kinds.ts';
import type { EventKind } from './event-kinds.ts';

export type { EventKind } from './event-kinds.ts';

/** Events per row, so that reading a page parses little more than the page. */
const EVENTS_PER_ROW = 256;

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

/** Events of one job that are not in the table yet. */
export class EventBuffer {
  #lines: string[] = [];
  #at = 0;

  get isEmpty(): boolean {
    return this.#lines.length === 0;
  }

  /** `data` is JSON; empty is `{}`. */
  add(atMs: number, kind: EventKind, task: number | null, data: string): void {
    if (this.isEmpty) this.#at = atMs;
    const head = `[${atMs - this.#at},${EVENT_CODES[kind]},${task ?? -1}`;
    this.#lines.push(data === '' ? `${head}]` : `${head},${data}]`);
  }

  /** Empties the buffer. `lastSeq` is the number of the newest event. */
  take(lastSeq: number): EventRow[] {
    const lines = this.#lines;
    this.#lines = [];
    const rows: EventRow[] = [];
    for (let at = 0; at < lines.length; at += EVENTS_PER_ROW) {
      const part = lines.slice(at, at + EVENTS_PER_ROW);
      rows.push({
        lastSeq: lastSeq - lines.length + at + part.length,
        count: part.length,
        at: this.#at,
        body: `[${part.join(',')}]`,
      });
    }
    return rows;
  }
}

export function eventsOf({ lastSeq, count, at, body }: EventRow): StoredEvent[] {
  const lines = JSON.parse(body) as [number, number, number, JsonObject?][];
  return lines.map(([ms, code, task, data], index) => ({
    seq: lastSeq - count + 1 + index,
    atMs: at + ms,
    kind: EVENT_KINDS[code] ?? 'unknown',
    task: task < 0 ? null : task,
    data: data ?? {},
  }));
}
