/**
 * Submits the jobs of schedules when they are due: one for each tick, however many dispatchers share the store and whenever one
 * of them dies.
 *
 * A due tick is claimed for a while, its job submitted under an idempotency key made of the schedule's revision and the tick's time,
 * and the schedule moved on to its next tick, if it still stands at this one. Who dies in between leaves a claim that ends; who
 * comes next submits the same job again, which is the same job. Who was only slow finds that the schedule has moved on.
 */
import { MillraceError } from '@millrace/runner';
import type { Clock, Logger } from '@millrace/runner';
import { parseCron } from './cron.ts';
import { isFinal } from './lifecycle.ts';
import type { JobSpec, ScheduleOutcome, ScheduleRecord } from './records.ts';
import { Rounds } from './rounds.ts';
import type { DueSchedule, Store } from './store.ts';

/** Schedules that others made are found as soon as this. */
export const SCHEDULE_POLL_MS = 1_000;

/** How long a claim keeps others from a tick. */
const CLAIM_MS = 30_000;

/** A tick that comes this late was not missed: dispatchers restart and databases fail over. */
export const TICK_GRACE_MS = 60_000;

export interface SchedulerOptions {
  readonly store: Pick<Store, 'claimSchedules' | 'endTick' | 'submit' | 'getJob'>;
  readonly clock: Clock;
  readonly log: Logger;
  /** Hears how each tick ended. */
  readonly onTick?: (outcome: ScheduleOutcome) => void;
}

/** Submits what is due with the start, and goes on. Closing waits for the tick under way. */
export class Scheduler extends Rounds {
  constructor(options: SchedulerOptions) {
    const { store, clock, log } = options;
    super({
      clock,
      log,
      firstMs: 0,
      pauseMs: SCHEDULE_POLL_MS,
      trouble: 'looking for due schedules failed',
      async round(signal) {
        const { due, nextAtMs } = await store.claimSchedules(CLAIM_MS);
        for (const each of due) {
          if (signal.aborted) break;
          await settleTick(options, each);
        }
        // More may be due than were claimed; what was moved on may be due again soon.
        if (due.length > 0) return 1;
        return Math.max(1, Math.min(SCHEDULE_POLL_MS, (nextAtMs ?? Infinity) - clock.now()));
      },
    });
  }
}

async function settleTick(options: SchedulerOptions, due: DueSchedule): Promise<void> {
  const { store, log, onTick } = options;
  const { schedule, revision, tickMs, nowMs } = due;
  const fields = { schedule: schedule.name, domain_id: schedule.domain_id };
  try {
    const plan = planTick(schedule, tickMs, nowMs);
    const { outcome, jobId } =
      plan.run === null
        ? ({ outcome: 'missed', jobId: null } as const)
        : await submitTick(options, due, plan.run);
    const ended = await store.endTick({
      revision,
      tickMs,
      lastTickMs: plan.last,
      nextAtMs: plan.next,
      outcome,
      jobId,
    });
    // Another dispatcher was faster, or it was replaced meanwhile.
    if (!ended) return;
    onTick?.(outcome);
    const tick = new Date(plan.last).toISOString();
    log.info('schedule ticked', { ...fields, tick, outcome, ...(jobId !== null && { job_id: jobId }) });
  } catch (error) {
    log.error('a tick of a schedule failed; it is tried again', { ...fields, error: String(error) });
  }
}

/** @throws what may pass: then the claim ends and the tick is tried again */
async function submitTick(
  { store, log }: SchedulerOptions,
  { schedule, revision, organizationId }: DueSchedule,
  tickMs: number,
): Promise<{ readonly outcome: ScheduleOutcome; readonly jobId: string | null }> {
  if (schedule.overlap === 'skip' && schedule.last_job_id !== null) {
    const last = await store.getJob(schedule.last_job_id);
    if (last !== null && !isFinal(last.job.status)) return { outcome: 'skipped', jobId: null };
  }
  const tick = new Date(tickMs).toISOString();
  const [outcome] = await store.submit([
    {
      spec: jobAt(schedule, tick),
      organizationId,
      idempotencyKey: tick,
      submitter: `schedule ${revision}`,
    },
  ]);
  if (outcome === undefined)
    throw new MillraceError('internal', 'the store answered a submission with nothing');
  if (outcome.ok) return { outcome: 'submitted', jobId: outcome.value.jobId };
  if (outcome.error.retryable) throw outcome.error;
  log.error('the job of a schedule is refused', {
    schedule: schedule.name,
    domain_id: schedule.domain_id,
    error: outcome.error.message,
  });
  return { outcome: 'failed', jobId: null };
}

/** The job of one tick: as it was given, and told of the tick in its `meta`. */
export function jobAt({ name, job }: Pick<ScheduleRecord, 'name' | 'job'>, tick: string): JobSpec {
  return { ...job, meta: { schedule: { name, tick }, ...job.meta } };
}

/**
 * What to do about a schedule that stands at `tickMs`, which is due. `run`: the tick to submit a job for, null when it was
 * missed. Of several that are due only the last can count. `next`: null when there are no more ticks.
 */
export function planTick(
  { cron, time_zone, catch_up }: Pick<ScheduleRecord, 'cron' | 'time_zone' | 'catch_up'>,
  tickMs: number,
  nowMs: number,
): { readonly run: number | null; readonly last: number; readonly next: number | null } {
  const times = parseCron(cron, time_zone);
  const last = Math.max(tickMs, times.upTo(nowMs) ?? tickMs);
  const missed = catch_up === 'skip' && nowMs - last > TICK_GRACE_MS;
  return { run: missed ? null : last, last, next: times.after(last) };
}
