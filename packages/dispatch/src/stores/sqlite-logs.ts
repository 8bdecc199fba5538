/** The logs of attempts in SQLite: a row for each append. Synchronous; the caller brings the transaction. */
import { MillraceError } from '@millrace/runner';
import type { LogAppend, LogEntry, LogPage, LogQuery, Outcome, TaskStanding } from '../store.ts';
import type { Database, Statement } from './sqlite-database.ts';

/** Chunks read at once; most are a few hundred bytes. */
const CHUNKS_PER_READ = 512;

export interface LogTasks {
  /** Which attempt the lease is. Throws when the lease may not write. */
  readonly leased: (item: LogAppend) => { readonly jobId: string; readonly attempt: number };
  /** It does write. */
  readonly keep: (item: LogAppend) => void;
  /** `lapsed`: more may still come from the node whose lease expired. */
  readonly standing: (taskId: string) => (TaskStanding & { readonly lapsed: boolean }) | null;
}

export class Logs {
  readonly #database: Database;
  readonly #tasks: LogTasks;
  readonly #select: Statement;
  readonly #insert: Statement;
  readonly #end: Statement;
  readonly #insertChunk: Statement;
  readonly #chunkBefore: Statement;
  readonly #chunks: Statement;
  readonly #ofJob: Statement;
  readonly #deleteChunks: Statement;
  readonly #delete: Statement;
  #grown = new Set<string>();

  constructor(database: Database, tasks: LogTasks) {
    this.#database = database;
    this.#tasks = tasks;
    const sql = (text: string): Statement => database.prepare(text);
    this.#select = sql('SELECT id FROM task_logs WHERE task_id = ? AND attempt = ?');
    this.#insert = sql('INSERT INTO task_logs (job_id, task_id, attempt) VALUES (?, ?, ?) RETURNING id');
    // The length of a blob is in its header: its bytes are not read for it.
    this.#end = sql(
      'SELECT start + length(bytes) FROM task_log_chunks WHERE log_id = ? ORDER BY start DESC LIMIT 1',
    );
    this.#insertChunk = sql('INSERT INTO task_log_chunks (log_id, start, bytes) VALUES (?, ?, ?)');
    this.#chunkBefore = sql(
      'SELECT start FROM task_log_chunks WHERE log_id = ? AND start <= ? ORDER BY start DESC LIMIT 1',
    );
    this.#chunks = sql(
      'SELECT start, bytes FROM task_log_chunks WHERE log_id = ? AND start >= ? ORDER BY start LIMIT ?',
    );
    this.#ofJob = sql(`
      SELECT task_id, attempt, id FROM task_logs WHERE job_id = ? ORDER BY task_id, attempt`);
    this.#deleteChunks = sql(
      'DELETE FROM task_log_chunks WHERE log_id IN (SELECT id FROM task_logs WHERE job_id = ?)',
    );
    this.#delete = sql('DELETE FROM task_logs WHERE job_id = ?');
  }

  append(items: readonly LogAppend[], maxBytes: number): Outcome<{ readonly nextOffset: number }>[] {
    return items.map((item) => {
      const mark = this.#database.writes;
      try {
        return { ok: true, value: { nextOffset: this.#append(item, maxBytes) } };
      } catch (error) {
        if (!MillraceError.is(error) || this.#database.writes !== mark) throw error;
        return { ok: false, error };
      }
    });
  }

  #append(item: LogAppend, maxBytes: number): number {
    const { taskId, offset, bytes } = item;
    const { jobId, attempt } = this.#tasks.leased(item);
    const found = this.#select.get(taskId, attempt)?.[0] as number | undefined;
    const end = found === undefined ? 0 : this.#endOf(found);
    if (offset > end) {
      throw new MillraceError(
        'failed_precondition',
        `the log of attempt ${attempt} of task ${taskId} has ${end} bytes; what comes before offset ${offset} is missing`,
        { details: { next_offset: end } },
      );
    }
    const fresh = bytes.subarray(end - offset);
    if (fresh.byteLength === 0) {
      this.#tasks.keep(item);
      return end;
    }
    const nextOffset = end + fresh.byteLength;
    if (nextOffset > maxBytes) {
      throw new MillraceError(
        'resource_exhausted',
        `the log of attempt ${attempt} of task ${taskId} would have ${nextOffset} bytes; the limit taskLogBytes is ${maxBytes}`,
        { details: { limit: 'taskLogBytes', value: maxBytes } },
      );
    }
    this.#tasks.keep(item);
    const id = found ?? (this.#insert.get(jobId, taskId, attempt)?.[0] as number);
    this.#insertChunk.run(id, end, fresh);
    this.#grown.add(taskId);
    return nextOffset;
  }

  /** @throws MillraceError as {@link Store.readLogs} */
  read({ taskId, attempt: wanted, offset, limit }: LogQuery): LogPage | null {
    const standing = this.#tasks.standing(taskId);
    if (!standing) return null;
    const { jobId, attempts, leasedAt, lapsed, final } = standing;
    const attempt = wanted ?? Math.max(1, attempts);
    if (wanted !== null && wanted > attempts + (final ? 0 : 1)) {
      throw new MillraceError(
        'not_found',
        `task ${taskId} has no attempt ${attempt}; it had ${attempts === 0 ? 'none' : attempts}`,
      );
    }
    const id = this.#select.get(taskId, attempt)?.[0] as number | undefined;
    const size = id === undefined ? 0 : this.#endOf(id);
    const from = offset < 0 ? Math.max(0, size + offset) : offset;
    if (from > size) {
      throw new MillraceError(
        'invalid_argument',
        `offset ${offset} is past the end of the log of attempt ${attempt} of task ${taskId}, which has ${size} bytes`,
      );
    }
    return {
      jobId,
      attempt,
      attempts,
      offset: from,
      bytes: id === undefined ? new Uint8Array() : this.#bytes(id, from, Math.min(size, from + limit)),
      size,
      ended: final || attempt < attempts || (attempt === attempts && leasedAt === null && !lapsed),
      final,
    };
  }

  list(jobId: string): LogEntry[] {
    return this.#ofJob.all(jobId).map(([taskId, attempt, id]) => ({
      taskId: taskId as string,
      attempt: attempt as number,
      size: this.#endOf(id as number),
    }));
  }

  /** With the job. */
  delete(jobId: string): void {
    this.#deleteChunks.run(jobId);
    this.#delete.run(jobId);
  }

  /** Tasks whose logs have grown since this was asked last. */
  takeGrown(): readonly string[] {
    if (this.#grown.size === 0) return [];
    const grown = [...this.#grown];
    this.#grown = new Set();
    return grown;
  }

  #endOf(id: number): number {
    return (this.#end.get(id)?.[0] ?? 0) as number;
  }

  #bytes(id: number, from: number, to: number): Uint8Array {
    const parts: Uint8Array[] = [];
    let at = (this.#chunkBefore.get(id, from)?.[0] ?? 0) as number;
    // Chunks may be large or small: begins with few, so that little asked for does not read much.
    for (let count = 4; at < to; count = Math.min(CHUNKS_PER_READ, count * 2)) {
      const rows = this.#chunks.all(id, at, count);
      if (rows.length === 0) break;
      for (const [start, bytes] of rows as (readonly [number, Uint8Array])[]) {
        at = start + bytes.byteLength;
        const part = bytes.subarray(Math.max(0, from - start), Math.max(0, to - start));
        if (part.byteLength > 0) parts.push(part);
        if (at >= to) break;
      }
    }
    return Buffer.concat(parts);
  }
}
