/** What is said and done under a lease, and when it is over, in PostgreSQL. */
import { MillraceError } from '@millrace/runner';
import { isResumable, taskStatus } from '../lifecycle.ts';
import type { TaskState } from '../lifecycle.ts';
import type { AttemptOutcome } from '../records.ts';
import type {
  CompleteItem,
  FailItem,
  HeartbeatAnswer,
  HeartbeatItem,
  LeaseRef,
  Outcome,
  ReleaseItem,
} from '../store.ts';
import { sql } from './postgres-database.ts';
import type { Database, Transaction } from './postgres-database.ts';
import type { Answers } from './postgres-jobs.ts';
import { OPEN_COLUMNS, columns, endedAt, endingAt, endingOf, lineOf, taskRecord } from './postgres-rows.ts';
import type { Place, Task } from './postgres-rows.ts';
import { inUnit } from './postgres-unit.ts';
import type { Unit, WorkSettings } from './postgres-unit.ts';
import { isoTime } from './time.ts';

/** Tasks one sweep transaction looks at. */
const SWEEP_TASKS = 1024;

const STANDINGS = sql(`
  SELECT u.job_seq AS "jobSeq", u.no, coalesce(o.state, e.state, 'ready') AS state, ${endingAt('u.no')} AS ending
  FROM unnest($1::bigint[], $2::integer[]) AS u (job_seq, no) JOIN jobs j ON j.seq = u.job_seq
  LEFT JOIN open_tasks o ON o.job_seq = u.job_seq AND o.no = u.no
  LEFT JOIN ended_runs e ON ${endedAt('u.job_seq', 'u.no')}`);
const PAST_LEASES = sql(`
  SELECT a.job_seq AS "jobSeq", a.no, a.attempt, a.lease_id AS "leaseId", a.node_id AS "nodeId", a.outcome,
    a.leased_at AS "leasedAt"
  FROM unnest($1::bigint[], $2::integer[]) AS u (job_seq, no)
  JOIN attempts a ON a.job_seq = u.job_seq AND a.no = u.no ORDER BY a.attempt DESC`);

const NEXT_WAKE = sql(`
  SELECT min(wake_at) AS "wakeAt", millis($1) AS now FROM open_tasks WHERE wake_at IS NOT NULL`);
const DUE = sql(`
  SELECT ${OPEN_COLUMNS} FROM open_tasks o WHERE o.wake_at <= (SELECT millis($1))
  ORDER BY o.wake_at, o.job_seq, o.no LIMIT $2 FOR UPDATE OF o SKIP LOCKED`);

/** As `expiryAfterSetback` of lifecycle.ts has it, for all leases. One that somebody has locked is being renewed. */
const MEND_LEASES = sql(`
  WITH held AS (
    SELECT o.job_seq, o.no, (SELECT millis($1)) AS now, coalesce(o.last_heartbeat_at, o.leased_at) AS heard_at
    FROM open_tasks o
    WHERE o.node_id IS NOT NULL AND coalesce(o.last_heartbeat_at, o.leased_at) > (SELECT millis($1))
    FOR UPDATE OF o SKIP LOCKED)
  UPDATE open_tasks o SET last_heartbeat_at = h.now, lease_expires_at = h.now + greatest(0, o.lease_expires_at - h.heard_at),
    wake_at = least(h.now + greatest(0, o.lease_expires_at - h.heard_at),
      CASE WHEN o.cancel_requested_at IS NULL THEN o.deadline_at END)
  FROM held h WHERE o.job_seq = h.job_seq AND o.no = h.no`);

// ---- Under a lease --------------------------------------------------------------------------------------------

/** What can be said about a lease. Calls of all these kinds share transactions, in the order of asking. */
export type Report =
  | { readonly verb: 'heartbeat'; readonly items: readonly HeartbeatItem[] }
  | { readonly verb: 'complete'; readonly items: readonly CompleteItem[] }
  | { readonly verb: 'fail'; readonly items: readonly FailItem[] }
  | { readonly verb: 'release'; readonly items: readonly ReleaseItem[] };

type ReportAnswer = HeartbeatAnswer | { readonly leaseId: string };

/** One list of outcomes for each report. */
export async function takeReports(
  database: Database,
  settings: WorkSettings,
  reports: readonly Report[],
): Promise<{ readonly outcomes: Outcome<ReportAnswer>[][]; readonly changes: Answers<unknown>['changes'] }> {
  const refs = reports.flatMap(({ items }): readonly LeaseRef[] => items);
  const ids = [...new Set(refs.map(({ taskId }) => taskId))];
  const beats = reports.some(({ verb }) => verb === 'heartbeat');
  const places = await settings.names.find(ids);
  let onlyComplete = ids.length === refs.length && reports.every(({ verb }) => verb === 'complete');
  const { value: outcomes, changes } = await inUnit(database, settings, async (unit) => {
    if (!onlyComplete || unit.isWide) await unit.lockTasks(places, beats);
    else if (!(await unit.closeTasks(places, refs))) {
      // Should one of them be busy, the next try locks them in order.
      onlyComplete = false;
      await unit.lockRest(places);
    }
    // A heartbeat that only extends the lease needs nothing of the job but what never changes.
    const locked = new Set<number>();
    const read = new Set<number>();
    const staged: Task[] = [];
    const completions: { readonly task: Task; readonly outputs: readonly string[] }[] = [];
    const reported: Task[] = [];
    // Before the jobs are locked, since the jobs of leases that are resumed are among them.
    const strangers = new Set(refs.flatMap((ref) => (unit.current(ref) ? [] : [ref.taskId])));
    const history = await historyOf(unit.transaction, places, strangers);
    for (const report of reports) {
      for (const item of report.items) {
        const task = unit.current(item) ?? lapsedUnder(unit, history, report.verb, item)?.task;
        if (!task) continue;
        if (report.verb === 'heartbeat') {
          const beat = item as HeartbeatItem;
          const says = beat.progress !== null || beat.events.length > 0;
          if (says) reported.push(task);
          (says || task.state !== 'running' ? locked : read).add(task.jobSeq);
        } else {
          locked.add(task.jobSeq);
          if (report.verb === 'complete') {
            staged.push(task);
            completions.push({ task, outputs: (item as CompleteItem).outputCids });
          }
        }
      }
    }
    await Promise.all([
      unit.lockJobs(locked),
      unit.loadStages(staged),
      unit.loadReports(reported),
      unit.readJobs([...read].filter((seq) => !locked.has(seq))),
      settings.queues.load(unit.queueIds()),
    ]);
    await unit.loadMemoWork(completions);
    const all: Outcome<ReportAnswer>[][] = [];
    for (const report of reports) {
      const answers: Outcome<ReportAnswer>[] = [];
      for (const item of report.items) {
        answers.push(await answerReport(unit, settings, history, report.verb, item));
      }
      all.push(answers);
    }
    return all;
  });
  return { outcomes, changes };
}

async function answerReport(
  unit: Unit,
  settings: WorkSettings,
  history: History,
  verb: Report['verb'],
  item: LeaseRef,
): Promise<Outcome<ReportAnswer>> {
  const lapsed = unit.current(item) ? undefined : lapsedUnder(unit, history, verb, item);
  if (lapsed) unit.resume(lapsed.task, lapsed.expiry);
  const task = unit.current(item);
  if (!task) return repeatedAnswer(unit, history, item, ACCEPTED[verb]);
  const leaseId = task.leaseId ?? '';
  const done: Outcome<ReportAnswer> = { ok: true, value: { leaseId } };
  if (verb === 'heartbeat') {
    const { progress, events, logged = false } = item as HeartbeatItem;
    unit.heartbeat(task);
    unit.report(task, progress, events, logged);
    const job = unit.job(task.jobSeq);
    const line = lineOf(task);
    return {
      ok: true,
      value: {
        leaseId,
        expiresAt: isoTime(task.leaseExpiresAt ?? 0),
        cancel: task.cancelRequestedAt !== null,
        domainId: job.domainId,
        task: taskRecord(item.taskId, line, task, job, settings.queues.get(line.queueId), 0, []),
      },
    };
  }
  if (task.cancelRequestedAt !== null) {
    const reason = task.reason ?? 'canceled';
    await unit.endCanceled(task, verb === 'release' ? ((item as ReleaseItem).details ?? null) : null);
    if (verb === 'release') return done;
    // A cancelled lease reported an ending: refused, and the proof that its work is over.
    const error = new MillraceError(
      'aborted',
      `task ${item.taskId} was asked to end (${reason}); its result is not accepted`,
    );
    return { ok: false, error };
  }
  if (verb === 'complete') {
    const { outputCids, meta } = item as CompleteItem;
    await unit.complete(task, outputCids, meta);
  } else if (verb === 'fail') {
    const { reason, details, retryable, nodeFault } = item as FailItem;
    await unit.fail(task, nodeFault ? 'setup_failed' : 'failed', reason, details, retryable);
  } else {
    const { reason, details = null } = item as ReleaseItem;
    // `canceled` without our asking is a node that stopped on its own account: given back like by a drain.
    await unit.release(task, reason, reason === 'setup_failed' ? 'setup_failed' : 'shutdown', details);
  }
  return done;
}

/** The endings that a repeated report of this kind may have had. */
const ACCEPTED: Readonly<Record<Report['verb'], readonly AttemptOutcome[]>> = {
  heartbeat: [],
  complete: ['completed'],
  fail: ['failed'],
  release: ['released', 'canceled'],
};

interface PastLease {
  readonly attempt: number;
  readonly leaseId: string;
  readonly nodeId: string;
  readonly leasedAt: number;
  readonly outcome: AttemptOutcome;
}

/** Tasks by id: where they stand, and their ended attempts, the newest first. */
export type History = ReadonlyMap<
  string,
  { readonly state: TaskState; readonly leases: readonly PastLease[] }
>;

/** What there is to say to those whose lease is not current. */
export async function historyOf(
  transaction: Transaction,
  places: ReadonlyMap<string, Place>,
  taskIds: ReadonlySet<string>,
): Promise<History> {
  const history = new Map<string, { state: TaskState; leases: PastLease[] }>();
  const known = [...taskIds].flatMap((id) => {
    const place = places.get(id);
    return place ? [{ id, ...place }] : [];
  });
  if (known.length === 0) return history;
  const keyOf = ({ jobSeq, no }: Place): string => `${jobSeq}:${no}`;
  const ids = new Map(known.map((task) => [keyOf(task), task.id]));
  const values = columns<Place, number>(
    known,
    ({ jobSeq }) => jobSeq,
    ({ no }) => no,
  );
  const [standings, past] = await Promise.all([
    transaction.rows<Place & { readonly state: TaskState; readonly ending: string | null }>(
      STANDINGS,
      values,
    ),
    transaction.rows<Place & PastLease>(PAST_LEASES, values),
  ]);
  for (const row of standings) {
    const leases: PastLease[] = [];
    const { completion } = row.ending === null ? { completion: null } : endingOf(row.ending, row.state, 0);
    // Nothing comes after a completion: it is the newest.
    if (completion) leases.push({ ...completion, outcome: 'completed' });
    history.set(ids.get(keyOf(row)) ?? '', { state: row.state, leases });
  }
  for (const { attempt, leaseId, nodeId, leasedAt, outcome, ...place } of past) {
    const lease = { attempt, leaseId, nodeId, leasedAt, outcome };
    history.get(ids.get(keyOf(place)) ?? '')?.leases.push(lease);
  }
  return history;
}

/** The task that nobody took since this lease of it expired, if what is said under the lease resumes it. */
function lapsedUnder(
  unit: Unit,
  history: History,
  verb: Report['verb'],
  { taskId, nodeId, leaseId }: LeaseRef,
): { readonly task: Task; readonly expiry: PastLease } | undefined {
  const task = unit.asked(taskId);
  // What ended in this transaction is newer than any expiry.
  if (verb === 'release' || !task || !isResumable(task, unit.now) || unit.endedHere(taskId).length > 0) {
    return undefined;
  }
  const newest = history.get(taskId)?.leases[0];
  if (newest?.outcome !== 'expired' || newest.nodeId !== nodeId) return undefined;
  return leaseId === null || leaseId === newest.leaseId ? { task, expiry: newest } : undefined;
}

/**
 * Holds the tasks of those of these leases that expired while nobody took the task since, for writes that do not themselves change
 * tasks: they come after it, and again if it has changed anything. The value is how many.
 *
 * @throws MillraceError `permission_denied` when such a task belongs to another domain than the one that is given
 */
export async function resumeLeases(
  database: Database,
  settings: WorkSettings,
  leases: readonly { readonly ref: LeaseRef; readonly domainId: string | null }[],
): Promise<{ readonly value: number; readonly changes: Answers<unknown>['changes'] }> {
  const places = await settings.names.find(leases.map(({ ref }) => ref.taskId));
  return await inUnit(database, settings, async (unit) => {
    await unit.lockTasks(places, false);
    const history = await historyOf(unit.transaction, places, new Set(places.keys()));
    const lapsed = (ref: LeaseRef) =>
      unit.current(ref) ? undefined : lapsedUnder(unit, history, 'heartbeat', ref);
    await unit.lockJobs(leases.flatMap(({ ref }) => lapsed(ref)?.task.jobSeq ?? []));
    let resumed = 0;
    for (const { ref, domainId } of leases) {
      const found = lapsed(ref);
      if (!found) continue;
      const job = unit.job(found.task.jobSeq);
      if (domainId !== null && domainId !== job.domainId) {
        throw new MillraceError(
          'permission_denied',
          `task ${ref.taskId} belongs to domain ${job.domainId} and may not write into domain ${domainId}`,
        );
      }
      unit.resume(found.task, found.expiry);
      resumed += 1;
    }
    return resumed;
  });
}

/** The answer to an ending for a lease that is over: the same as the first time, or a refusal. */
function repeatedAnswer(
  unit: Unit,
  history: History,
  ref: LeaseRef,
  accepted: readonly AttemptOutcome[],
): Outcome<ReportAnswer> {
  const leases = [...unit.endedHere(ref.taskId), ...(history.get(ref.taskId)?.leases ?? [])];
  // Without a lease id the node's newest attempt is meant.
  const meant = leases.find(
    ({ leaseId, nodeId }) => nodeId === ref.nodeId && (ref.leaseId === null || leaseId === ref.leaseId),
  );
  if (meant && accepted.includes(meant.outcome)) return { ok: true, value: { leaseId: meant.leaseId } };
  return {
    ok: false,
    error: refusalOfLease(ref, unit.stateOf(ref.taskId) ?? history.get(ref.taskId)?.state),
  };
}

/** Why a write under a lease that is not current is refused. No state: there is no such task. */
export function refusalOfLease(
  { taskId, nodeId, leaseId }: LeaseRef,
  state: TaskState | undefined,
): MillraceError {
  if (state === undefined) return new MillraceError('not_found', `task ${taskId} does not exist`);
  const lease = leaseId === null ? `node ${nodeId} holds no lease` : `lease ${leaseId} is not the newest`;
  return new MillraceError('aborted', `${lease} of task ${taskId}, which is ${taskStatus(state)}`);
}

// ---- Time -----------------------------------------------------------------------------------------------------

/** How soon to look again for what is due and somebody else has locked. */
const BUSY_LOOK_MS = 50;

/** One transaction's worth of the sweep. */
export async function sweepTasks(
  database: Database,
  settings: WorkSettings,
): Promise<{
  readonly value: { rescued: number; more: boolean };
  readonly changes: Answers<unknown>['changes'];
}> {
  const next = await lookAhead(database);
  if (next.wakeAt === null || next.wakeAt > next.now) {
    return { value: { rescued: 0, more: false }, changes: [] };
  }
  return await inUnit(database, settings, async (unit) => {
    if (unit.isWide) await unit.lockTasks(new Map(), false);
    const due = unit.adopt(await unit.transaction.rows<Task>(DUE, [unit.transaction.given, SWEEP_TASKS]));
    await unit.lockJobs(due.map(({ jobSeq }) => jobSeq));
    let rescued = 0;
    const failed = new Map<number, string>();
    for (const task of due) {
      const woken = await unit.wake(task);
      if (woken.rescued) rescued += 1;
      if (woken.failed) failed.set(task.jobSeq, `task ${await unit.nameOf(task)} failed: deadline`);
    }
    for (const [jobSeq, reason] of failed) await unit.endRest(jobSeq, reason);
    return { rescued, more: due.length === SWEEP_TASKS };
  });
}

/** When the sweeper should look again, epoch ms, null when nothing waits; and the store's time. */
export async function nextWake(
  database: Database,
): Promise<{ readonly nextAtMs: number | null; readonly now: number }> {
  const { wakeAt, now } = await lookAhead(database);
  return { nextAtMs: wakeAt === null || wakeAt > now ? wakeAt : now + BUSY_LOOK_MS, now };
}

async function lookAhead(
  database: Database,
): Promise<{ readonly wakeAt: number | null; readonly now: number }> {
  const [next] = await database.rows<{ wakeAt: number | null; now: number }>(NEXT_WAKE, [database.given]);
  return next ?? { wakeAt: null, now: 0 };
}

/** What leases had left counts from now on, where the database's clock was set back since their nodes were heard. */
export async function mendLeases(database: Database): Promise<void> {
  await database.transaction('call', (transaction) => transaction.count(MEND_LEASES, [transaction.given]));
}
