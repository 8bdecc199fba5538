/** Schedules in PostgreSQL. */
import { MillraceError } from '@millrace/runner';
import type { ScheduleRecord } from '../records.ts';
import type { ClaimedSchedules, EndedTick, NewSchedule } from '../store.ts';
import { sql } from './postgres-database.ts';
import type { Database } from './postgres-database.ts';
import { CLAIMED_SCHEDULES, MAX_SCHEDULES, bodyOf, dueSchedule, scheduleRecord } from './schedule-rows.ts';
import type { ScheduleRow } from './schedule-rows.ts';

const COLUMNS = `s.domain_id AS "domainId", s.name, s.revision, s.body, s.created_at AS "createdAt", s.next_at AS "nextAt",
  s.last_tick_at AS "lastTickAt", s.last_outcome AS "lastOutcome", s.last_job_id AS "lastJobId"`;

/** Any number that nobody else uses for a lock in a transaction. */
const COUNT_LOCK = 0x73636864;

const ALL = sql(`
  SELECT ${COLUMNS} FROM schedules s WHERE $1::text IS NULL OR s.domain_id = $1 ORDER BY s.domain_id, s.name`);
const ONE = sql(`SELECT ${COLUMNS} FROM schedules s WHERE s.domain_id = $1 AND s.name = $2`);
// So that two dispatchers do not both make the last one there may be.
const LOCK_COUNT = sql('SELECT pg_advisory_xact_lock($1::bigint)');
const COUNT = sql('SELECT count(*) AS count FROM schedules');
const DELETE = sql('DELETE FROM schedules WHERE domain_id = $1 AND name = $2');
const INSERT = sql(`
  INSERT INTO schedules AS s (domain_id, name, revision, body, created_at, next_at)
  VALUES ($1, $2, $3, $4, millis($6), $5) RETURNING ${COLUMNS}`);
const NEXT = sql(`
  SELECT min(greatest(next_at, coalesce(claimed_until, 0))) AS "nextAt", (SELECT millis($1)) AS now
  FROM schedules WHERE next_at IS NOT NULL`);
const CLAIM = sql(`
  WITH time AS MATERIALIZED (SELECT millis($1) AS now), due AS (
    SELECT d.revision FROM schedules d, time
    WHERE d.next_at <= time.now AND (d.claimed_until IS NULL OR d.claimed_until <= time.now)
    ORDER BY d.next_at LIMIT $3 FOR UPDATE OF d SKIP LOCKED)
  UPDATE schedules s SET claimed_until = time.now + $2::bigint FROM due, time WHERE s.revision = due.revision
  RETURNING ${COLUMNS}, time.now`);
const END = sql(`
  UPDATE schedules SET next_at = $1, claimed_until = NULL, last_tick_at = $2, last_outcome = $3,
    last_job_id = coalesce($4, last_job_id)
  WHERE revision = $5 AND next_at = $6`);

export class Schedules {
  readonly #database: Database;
  readonly #newId: () => string;

  constructor(database: Database, newId: () => string) {
    this.#database = database;
    this.#newId = newId;
  }

  async put(schedule: NewSchedule): Promise<ScheduleRecord> {
    const { name, replace, nextAtMs } = schedule;
    const domainId = schedule.job.domain_id;
    return await this.#database.transaction('call', async (transaction) => {
      await transaction.rows(LOCK_COUNT, [COUNT_LOCK]);
      const [[old], [total]] = await Promise.all([
        transaction.rows<ScheduleRow>(ONE, [domainId, name]),
        transaction.rows<{ count: number }>(COUNT, []),
      ]);
      if (old && !replace) {
        throw new MillraceError(
          'already_exists',
          `domain ${domainId} has a schedule named ${JSON.stringify(name)}; replace it or choose another name`,
        );
      }
      if (!old && (total?.count ?? 0) >= MAX_SCHEDULES) {
        throw new MillraceError(
          'resource_exhausted',
          `there are ${MAX_SCHEDULES} schedules, which is the limit`,
        );
      }
      if (old) transaction.send(DELETE, [domainId, name]);
      const [row] = await transaction.change<ScheduleRow>(INSERT, [
        domainId,
        name,
        this.#newId(),
        bodyOf(schedule),
        nextAtMs,
        transaction.given,
      ]);
      if (!row) throw new MillraceError('internal', 'a new schedule was not kept');
      return scheduleRecord(row);
    });
  }

  async list(domainId: string | null): Promise<ScheduleRecord[]> {
    return (await this.#database.rows<ScheduleRow>(ALL, [domainId])).map(scheduleRecord);
  }

  async get(domainId: string, name: string): Promise<ScheduleRecord | null> {
    const [row] = await this.#database.rows<ScheduleRow>(ONE, [domainId, name]);
    return row ? scheduleRecord(row) : null;
  }

  async delete(domainId: string, name: string): Promise<boolean> {
    return (
      (await this.#database.transaction('call', (transaction) =>
        transaction.count(DELETE, [domainId, name]),
      )) > 0
    );
  }

  async claim(claimMs: number): Promise<ClaimedSchedules> {
    const next = await this.#next();
    // Without locks first: most who look find nothing due.
    if (next.nextAt === null || next.nextAt > next.now) return { due: [], nextAtMs: next.nextAt };
    const rows = await this.#database.transaction('call', (transaction) =>
      transaction.change<ScheduleRow & { readonly now: number }>(CLAIM, [
        transaction.given,
        claimMs,
        CLAIMED_SCHEDULES,
      ]),
    );
    const due = rows.map((row) => dueSchedule(row, row.now)).toSorted((a, b) => a.tickMs - b.tickMs);
    return { due, nextAtMs: (await this.#next()).nextAt };
  }

  async end({ revision, tickMs, lastTickMs, nextAtMs, outcome, jobId }: EndedTick): Promise<boolean> {
    return (
      (await this.#database.transaction('call', (transaction) =>
        transaction.count(END, [nextAtMs, lastTickMs, outcome, jobId, revision, tickMs]),
      )) > 0
    );
  }

  async #next(): Promise<{ readonly nextAt: number | null; readonly now: number }> {
    const [row] = await this.#database.rows<{ nextAt: number | null; now: number }>(NEXT, [
      this.#database.given,
    ]);
    return row ?? { nextAt: null, now: 0 };
  }
}
