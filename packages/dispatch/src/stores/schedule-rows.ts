/** Schedules as rows, the same in every store. */
import type { ScheduleOutcome, ScheduleRecord } from '../records.ts';
import type { DueSchedule, NewSchedule } from '../store.ts';
import { isoTime, isoTimeOrNull } from './time.ts';

/** Schedules of one store: the scheduler looks at all that are due, and a list has no pages. */
export const MAX_SCHEDULES = 1000;

/** Due ticks claimed at once. */
export const CLAIMED_SCHEDULES = 100;

/** What does not change, kept as JSON. */
type Body = Pick<NewSchedule, 'cron' | 'timeZone' | 'catchUp' | 'overlap' | 'organizationId' | 'job'>;

export interface ScheduleRow {
  readonly domainId: string;
  readonly name: string;
  readonly revision: string;
  readonly body: string;
  readonly createdAt: number;
  readonly nextAt: number | null;
  readonly lastTickAt: number | null;
  readonly lastOutcome: string | null;
  readonly lastJobId: string | null;
}

export function bodyOf({ cron, timeZone, catchUp, overlap, organizationId, job }: NewSchedule): string {
  const body: Body = { cron, timeZone, catchUp, overlap, organizationId, job };
  return JSON.stringify(body);
}

export function scheduleRecord(row: ScheduleRow): ScheduleRecord {
  const { cron, timeZone, catchUp, overlap, job } = JSON.parse(row.body) as Body;
  return {
    name: row.name,
    domain_id: row.domainId,
    cron,
    time_zone: timeZone,
    catch_up: catchUp,
    overlap,
    job,
    created_at: isoTime(row.createdAt),
    next_at: isoTimeOrNull(row.nextAt),
    last_tick_at: isoTimeOrNull(row.lastTickAt),
    last_outcome: row.lastOutcome as ScheduleOutcome | null,
    last_job_id: row.lastJobId,
  };
}

export function dueSchedule(row: ScheduleRow, nowMs: number): DueSchedule {
  const { organizationId } = JSON.parse(row.body) as Body;
  return {
    schedule: scheduleRecord(row),
    revision: row.revision,
    organizationId,
    tickMs: row.nextAt ?? nowMs,
    nowMs,
  };
}
