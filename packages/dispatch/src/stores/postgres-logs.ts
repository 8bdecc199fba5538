/** The logs of attempts in PostgreSQL: a row for each append, and one for each log that says where it ends. */
import { MillraceError } from '@millrace/runner';
import { isFinal, isHeld } from '../lifecycle.ts';
import type { TaskState } from '../lifecycle.ts';
import type { AttemptOutcome } from '../records.ts';
import type { LogAppend, LogEntry, LogPage, LogQuery, Outcome, StoreChange } from '../store.ts';
import { taskId as taskIdOf, taskIdsOf } from './ids.ts';
import { sql } from './postgres-database.ts';
import type { Database } from './postgres-database.ts';
import { historyOf, refusalOfLease } from './postgres-leases.ts';
import type { Names } from './postgres-names.ts';
import { columns, endedAt, endingAt, endingOf } from './postgres-rows.ts';
import type { Place } from './postgres-rows.ts';

interface HeldTask extends Place {
  readonly state: TaskState;
  readonly leaseId: string | null;
  readonly nodeId: string | null;
  readonly attempt: number;
}

// Shared: appending to a log keeps nobody from it but those who would end the lease.
const HOLD_TASKS = sql(`
  SELECT o.job_seq AS "jobSeq", o.no, o.state, o.lease_id AS "leaseId", o.node_id AS "nodeId",
    o.attempts + o.node_faults + o.drains AS attempt
  FROM unnest($1::bigint[], $2::integer[]) AS u (job_seq, no)
  JOIN open_tasks o ON o.job_seq = u.job_seq AND o.no = u.no ORDER BY o.job_seq, o.no FOR SHARE OF o`);
const MAKE_LOGS = sql(`
  INSERT INTO task_logs (job_seq, no, attempt, size)
  SELECT u.*, 0 FROM unnest($1::bigint[], $2::integer[], $3::integer[]) AS u (job_seq, no, attempt)
  ORDER BY u.job_seq, u.no, u.attempt ON CONFLICT (job_seq, no, attempt) DO NOTHING`);
const LOCK_LOGS = sql(`
  SELECT l.job_seq AS "jobSeq", l.no, l.size
  FROM unnest($1::bigint[], $2::integer[], $3::integer[]) AS u (job_seq, no, attempt)
  JOIN task_logs l ON l.job_seq = u.job_seq AND l.no = u.no AND l.attempt = u.attempt
  ORDER BY l.job_seq, l.no FOR UPDATE OF l`);
const SAVE_SIZES = sql(`
  UPDATE task_logs l SET size = u.size
  FROM unnest($1::bigint[], $2::integer[], $3::integer[], $4::bigint[]) AS u (job_seq, no, attempt, size)
  WHERE l.job_seq = u.job_seq AND l.no = u.no AND l.attempt = u.attempt`);
const INSERT_CHUNKS = sql(`
  INSERT INTO task_log_chunks (job_seq, no, attempt, start, bytes)
  SELECT * FROM unnest($1::bigint[], $2::integer[], $3::integer[], $4::bigint[], $5::bytea[])`);

const STANDING = sql(`
  SELECT j.id AS "jobId", coalesce(o.state, e.state, 'ready') AS state, o.leased_at AS "leasedAt",
    o.attempts + o.node_faults + o.drains AS attempts, ${endingAt('$2::integer')} AS ending,
    (SELECT a.outcome FROM attempts a WHERE a.job_seq = j.seq AND a.no = $2 ORDER BY a.attempt DESC LIMIT 1) AS outcome
  FROM jobs j LEFT JOIN open_tasks o ON o.job_seq = j.seq AND o.no = $2
  LEFT JOIN ended_runs e ON ${endedAt('j.seq', '$2::integer')} WHERE j.seq = $1`);
const SIZE = sql('SELECT size FROM task_logs WHERE job_seq = $1 AND no = $2 AND attempt = $3');
// The chunk that holds the first byte begins at or before it.
const CHUNKS = sql(`
  SELECT start, bytes FROM task_log_chunks WHERE job_seq = $1 AND no = $2 AND attempt = $3 AND start < $5
    AND start >= coalesce((SELECT max(start) FROM task_log_chunks
      WHERE job_seq = $1 AND no = $2 AND attempt = $3 AND start <= $4), 0)
  ORDER BY start LIMIT $6`);
const OF_JOB = sql(`
  SELECT l.no, i.id AS "keptId", l.attempt, l.size FROM task_logs l
  LEFT JOIN task_ids i ON i.job_seq = l.job_seq AND i.no = l.no WHERE l.job_seq = $1 ORDER BY l.no, l.attempt`);
const JOB_NUMBER = sql('SELECT seq FROM jobs WHERE id = $1');

/** Chunks read at once; most are a few hundred bytes. */
const CHUNKS_PER_READ = 512;

export interface AppendCall {
  readonly items: readonly LogAppend[];
  readonly maxBytes: number;
}

export async function appendLogs(
  database: Database,
  names: Names,
  calls: readonly AppendCall[],
): Promise<{
  readonly outcomes: Outcome<{ readonly nextOffset: number }>[][];
  readonly changes: readonly StoreChange[];
}> {
  const ids = [...new Set(calls.flatMap(({ items }) => items.map(({ taskId }) => taskId)))];
  const places = await names.find(ids);
  return await database.transaction('lane', async (transaction) => {
    const found = columns<Place, number>(
      [...places.values()],
      ({ jobSeq }) => jobSeq,
      ({ no }) => no,
    );
    const rows = new Map(
      (await transaction.rows<HeldTask>(HOLD_TASKS, found)).map((task) => [
        `${task.jobSeq}:${task.no}`,
        task,
      ]),
    );
    const held = new Map([...places].map(([id, { jobSeq, no }]) => [id, rows.get(`${jobSeq}:${no}`)]));
    const taskOf = ({ taskId, nodeId, leaseId }: LogAppend): HeldTask | undefined => {
      const task = held.get(taskId);
      if (!task || !isHeld(task.state) || task.nodeId !== nodeId) return undefined;
      return leaseId === null || task.leaseId === leaseId ? task : undefined;
    };
    const items = calls.flatMap((call) => call.items);
    const writable = [...new Set(items.flatMap((item) => taskOf(item) ?? []))];
    const strangers = new Set(items.filter((item) => !taskOf(item)).map(({ taskId }) => taskId));
    const history = await historyOf(transaction, places, strangers);
    const keys = columns<HeldTask, number>(
      writable,
      ({ jobSeq }) => jobSeq,
      ({ no }) => no,
      ({ attempt }) => attempt,
    );
    const sizes = new Map<HeldTask, number>();
    if (writable.length > 0) {
      // Made now although a refusal may follow: an empty log is told by nobody.
      transaction.send(MAKE_LOGS, keys);
      const rows = await transaction.rows<{ jobSeq: number; no: number; size: number }>(LOCK_LOGS, keys);
      for (const { jobSeq, no, size } of rows) {
        const task = writable.find((candidate) => candidate.jobSeq === jobSeq && candidate.no === no);
        if (task) sizes.set(task, size);
      }
    }
    const chunks: { readonly task: HeldTask; readonly start: number; readonly bytes: Uint8Array }[] = [];
    const outcomes = calls.map((call) =>
      call.items.map((item): Outcome<{ nextOffset: number }> => {
        const task = taskOf(item);
        if (!task) return { ok: false, error: refusalOfLease(item, history.get(item.taskId)?.state) };
        const end = sizes.get(task) ?? 0;
        const refusal = refusalOfAppend(item, task.attempt, end, call.maxBytes);
        if (refusal) return { ok: false, error: refusal };
        const bytes = item.bytes.subarray(end - item.offset);
        if (bytes.byteLength > 0) {
          chunks.push({ task, start: end, bytes });
          sizes.set(task, end + bytes.byteLength);
        }
        return { ok: true, value: { nextOffset: end + bytes.byteLength } };
      }),
    );
    const grown = [...new Set(chunks.map(({ task }) => task))];
    if (grown.length > 0) {
      transaction.send(
        INSERT_CHUNKS,
        columns<(typeof chunks)[number], number | Uint8Array>(
          chunks,
          ({ task }) => task.jobSeq,
          ({ task }) => task.no,
          ({ task }) => task.attempt,
          ({ start }) => start,
          ({ bytes }) => bytes,
        ),
      );
      transaction.send(
        SAVE_SIZES,
        columns<HeldTask, number>(
          grown,
          ({ jobSeq }) => jobSeq,
          ({ no }) => no,
          ({ attempt }) => attempt,
          (task) => sizes.get(task) ?? 0,
        ),
      );
    }
    const taskIds = [...held].flatMap(([id, task]) => (task && grown.includes(task) ? [id] : []));
    const changes: StoreChange[] = taskIds.length === 0 ? [] : [{ kind: 'logs', taskIds }];
    return { outcomes, changes };
  });
}

function refusalOfAppend(
  { taskId, offset, bytes }: LogAppend,
  attempt: number,
  end: number,
  maxBytes: number,
): MillraceError | null {
  if (offset > end) {
    return new MillraceError(
      'failed_precondition',
      `the log of attempt ${attempt} of task ${taskId} has ${end} bytes; what comes before offset ${offset} is missing`,
      { details: { next_offset: end } },
    );
  }
  const size = Math.max(end, offset + bytes.byteLength);
  if (size > end && size > maxBytes) {
    return new MillraceError(
      'resource_exhausted',
      `the log of attempt ${attempt} of task ${taskId} would have ${size} bytes; the limit taskLogBytes is ${maxBytes}`,
      { details: { limit: 'taskLogBytes', value: maxBytes } },
    );
  }
  return null;
}

/** @throws MillraceError as {@link Store.readLogs} */
export async function readLogs(
  database: Database,
  names: Names,
  { taskId, attempt: wanted, offset, limit }: LogQuery,
): Promise<LogPage | null> {
  const place = (await names.find([taskId])).get(taskId);
  if (!place) return null;
  const { jobSeq, no } = place;
  type Row = {
    jobId: string;
    state: TaskState;
    leasedAt: number | null;
    attempts: number | null;
    ending: string | null;
    outcome: AttemptOutcome | null;
  };
  const [task] = await database.rows<Row>(STANDING, [jobSeq, no]);
  if (!task) return null;
  const { jobId } = task;
  const ended = task.ending === null ? null : endingOf(task.ending, task.state, 0);
  const attempts = ended ? ended.attempts + ended.nodeFaults + ended.drains : (task.attempts ?? 0);
  const final = isFinal(task.state);
  // More may still come from the node whose lease expired.
  const lapsed = !final && task.leasedAt === null && task.outcome === 'expired';
  const attempt = wanted ?? Math.max(1, attempts);
  if (wanted !== null && wanted > attempts + (final ? 0 : 1)) {
    throw new MillraceError(
      'not_found',
      `task ${taskId} has no attempt ${attempt}; it had ${attempts === 0 ? 'none' : attempts}`,
    );
  }
  const [log] = await database.rows<{ size: number }>(SIZE, [jobSeq, no, attempt]);
  const size = log?.size ?? 0;
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
    bytes: await bytesOf(database, [jobSeq, no, attempt], from, Math.min(size, from + limit)),
    size,
    ended: final || attempt < attempts || (attempt === attempts && task.leasedAt === null && !lapsed),
    final,
  };
}

async function bytesOf(
  database: Database,
  log: readonly [number, number, number],
  from: number,
  to: number,
): Promise<Uint8Array> {
  const parts: Uint8Array[] = [];
  for (let at = from; at < to;) {
    const rows = await database.rows<{ start: number; bytes: Buffer }>(CHUNKS, [
      ...log,
      at,
      to,
      CHUNKS_PER_READ,
    ]);
    if (rows.length === 0) break;
    for (const { start, bytes } of rows) {
      const part = bytes.subarray(Math.max(0, at - start), to - start);
      parts.push(part);
      at = Math.max(at, start + bytes.byteLength);
    }
  }
  return Buffer.concat(parts);
}

/** Null: unknown job. */
export async function listLogs(database: Database, jobId: string): Promise<LogEntry[] | null> {
  const [job] = await database.rows<{ seq: number }>(JOB_NUMBER, [jobId]);
  if (!job) return null;
  type Row = Omit<LogEntry, 'taskId'> & { readonly no: number; readonly keptId: string | null };
  const logs = await database.rows<Row>(OF_JOB, [job.seq]);
  const ids = taskIdsOf(jobId);
  return logs
    .filter(({ size }) => size > 0)
    .map(({ no, keptId, attempt, size }) => ({ taskId: keptId ?? taskIdOf(ids, no), attempt, size }));
}
