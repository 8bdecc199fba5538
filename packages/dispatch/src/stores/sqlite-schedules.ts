/** Schedules in SQLite. Synchronous; the caller brings the transaction. */
import { MillraceError } from '@millrace/runner';
import type { Clock } from '@millrace/runner';
import type { ScheduleRecord } from '../records.ts';
import type { DueSchedule, EndedTick, NewSchedule } from '../store.ts';
import { CLAIMED_SCHEDULES, MAX_SCHEDULES, bodyOf, dueSchedule, scheduleRecord } from './schedule-rows.ts';
import type { ScheduleRow } from './schedule-rows.ts';
import type { Database, Row, Statement } from './sqlite-database.ts';

const COLUMNS =
  'domain_id, name, revision, body, created_at, next_at, last_tick_at, last_outcome, last_job_id';

export class Schedules {
  readonly #clock: Clock;
  readonly #newId: () => string;
  readonly #all: Statement;
  readonly #one: Statement;
  readonly #count: Statement;
  readonly #insert: Statement;
  readonly #delete: Statement;
  readonly #due: Statement;
  readonly #claim: Statement;
  readonly #next: Statement;
  readonly #end: Statement;

  constructor(database: Database, clock: Clock, newId: () => string) {
    this.#clock = clock;
    this.#newId = newId;
    const sql = (text: string): Statement => database.prepare(text);
    this.#all = sql(
      `SELECT ${COLUMNS} FROM schedules WHERE ?1 IS NULL OR domain_id = ?1 ORDER BY domain_id, name`,
    );
    this.#one = sql(`SELECT ${COLUMNS} FROM schedules WHERE domain_id = ? AND name = ?`);
    this.#count = sql('SELECT count(*) FROM schedules');
    this.#insert = sql(
      'INSERT INTO schedules (domain_id, name, revision, body, created_at, next_at) VALUES (?, ?, ?, ?, ?, ?)',
    );
    this.#delete = sql('DELETE FROM schedules WHERE domain_id = ? AND name = ?');
    this.#due = sql(`
      SELECT ${COLUMNS} FROM schedules WHERE next_at <= ?1 AND (claimed_until IS NULL OR claimed_until <= ?1)
      ORDER BY next_at LIMIT ?2`);
    this.#claim = sql('UPDATE schedules SET claimed_until = ? WHERE revision = ?');
    this.#next = sql(
      'SELECT min(max(next_at, coalesce(claimed_until, 0))) FROM schedules WHERE next_at IS NOT NULL',
    );
    this.#end = sql(`
      UPDATE schedules SET next_at = ?, claimed_until = NULL, last_tick_at = ?, last_outcome = ?,
        last_job_id = coalesce(?, last_job_id)
      WHERE revision = ? AND next_at = ?`);
  }

  /** @throws MillraceError as {@link Store.putSchedule} */
  put(schedule: NewSchedule): ScheduleRecord {
    const { name, replace, nextAtMs } = schedule;
    const domainId = schedule.job.domain_id;
    const old = this.#one.get(domainId, name);
    if (old && !replace) {
      throw new MillraceError(
        'already_exists',
        `domain ${domainId} has a schedule named ${JSON.stringify(name)}; replace it or choose another name`,
      );
    }
    if (!old && Number(this.#count.get()?.[0]) >= MAX_SCHEDULES) {
      throw new MillraceError(
        'resource_exhausted',
        `there are ${MAX_SCHEDULES} schedules, which is the limit`,
      );
    }
    if (old) this.#delete.run(domainId, name);
    const row: Row = [domainId, name, this.#newId(), bodyOf(schedule), this.#clock.now(), nextAtMs];
    this.#insert.run(...row);
    return scheduleRecord(rowOf([...row, null, null, null]));
  }

  list(domainId: string | null): ScheduleRecord[] {
    return this.#all.all(domainId).map((row) => scheduleRecord(rowOf(row)));
  }

  get(domainId: string, name: string): ScheduleRecord | null {
    const row = this.#one.get(domainId, name);
    return row ? scheduleRecord(rowOf(row)) : null;
  }

  delete(domainId: string, name: string): boolean {
    return this.#delete.count(domainId, name) > 0;
  }

  isDue(): boolean {
    return this.#due.get(this.#clock.now(), 1) !== undefined;
  }

  claim(claimMs: number): DueSchedule[] {
    const now = this.#clock.now();
    return this.#due.all(now, CLAIMED_SCHEDULES).map((values) => {
      const row = rowOf(values);
      this.#claim.run(now + claimMs, row.revision);
      return dueSchedule(row, now);
    });
  }

  /** When the next tick is due, or a claim ends that nobody made good; null: never. */
  nextAt(): number | null {
    return (this.#next.get()?.[0] ?? null) as number | null;
  }

  end({ revision, tickMs, lastTickMs, nextAtMs, outcome, jobId }: EndedTick): boolean {
    return this.#end.count(nextAtMs, lastTickMs, outcome, jobId, revision, tickMs) > 0;
  }
}

function rowOf(row: Row): ScheduleRow {
  const [domainId, name, revision, body, createdAt, nextAt, lastTickAt, lastOutcome, lastJobId] = row;
  return {
    domainId: domainId as string,
    name: name as string,
    revision: revision as string,
    body: body as string,
    createdAt: createdAt as number,
    nextAt: nextAt as number | null,
    lastTickAt: lastTickAt as number | null,
    lastOutcome: lastOutcome as string | null,
    lastJobId: lastJobId as string | null,
  };
}
