/** Giving tasks to nodes, and what is said and done under a lease, in PostgreSQL. */
import { MillraceError } from '@millrace/runner';
import { taskStatus } from '../lifecycle.ts';
import type { TaskState } from '../lifecycle.ts';
import type { AttemptOutcome } from '../records.ts';
import type {
  CompleteItem,
  FailItem,
  GrantedLease,
  HeartbeatAnswer,
  HeartbeatItem,
  LeaseAnswer,
  LeaseRef,
  LeaseRequest,
  Outcome,
  ReleaseItem,
} from '../store.ts';
import { match } from './matching.ts';
import { sql } from './postgres-database.ts';
import type { Database, Transaction } from './postgres-database.ts';
import type { Answers } from './postgres-jobs.ts';
import { NODE_COLUMNS, OPEN_COLUMNS, OPEN_TASKS, nodeOf, taskRecord } from './postgres-rows.ts';
import type { JobText, NodeRow, StoredNode, Task } from './postgres-rows.ts';
import { inUnit } from './postgres-unit.ts';
import type { Unit, WorkSettings } from './postgres-unit.ts';
import { isoTime } from './time.ts';

/** Tasks one sweep transaction looks at. */
const SWEEP_TASKS = 1024;

const READ_NODES = sql(`SELECT ${NODE_COLUMNS} FROM nodes n WHERE n.id = ANY($1::text[])`);
const LOCK_NODES = sql(`
  SELECT ${NODE_COLUMNS} FROM nodes n WHERE n.id = ANY($1::text[]) ORDER BY n.id FOR NO KEY UPDATE`);
const HELD_BY_NODES = sql(`
  SELECT node_id AS "nodeId", count(*) AS held FROM open_tasks WHERE node_id = ANY($1::text[]) GROUP BY node_id`);
/** From one queue's first task to the next queue's: as many steps as there are queues with ready tasks. */
export const READY_QUEUES = sql(`
  WITH RECURSIVE ready (queue_id) AS (
    (SELECT queue_id FROM open_tasks WHERE state = 'ready' ORDER BY queue_id LIMIT 1)
    UNION ALL
    SELECT (SELECT o.queue_id FROM open_tasks o WHERE o.state = 'ready' AND o.queue_id > ready.queue_id
      ORDER BY o.queue_id LIMIT 1)
    FROM ready WHERE ready.queue_id IS NOT NULL)
  SELECT queue_id AS "queueId" FROM ready WHERE queue_id IS NOT NULL`);
const FRONTS = sql(`
  SELECT q.id AS "queueId", f.rank, f.job_seq AS "jobSeq", f.no FROM unnest($1::integer[]) AS q (id)
  CROSS JOIN LATERAL (
    SELECT o.rank, o.job_seq, o.no FROM open_tasks o
    WHERE o.queue_id = q.id AND o.state = 'ready' AND (o.deadline_at IS NULL OR o.deadline_at > $3)
    ORDER BY o.rank, o.job_seq, o.no LIMIT $2) AS f`);
const TAKE = sql(`
  SELECT ${OPEN_COLUMNS}, t.spec FROM ${OPEN_TASKS}
  WHERE o.queue_id = $1 AND o.state = 'ready' AND (o.deadline_at IS NULL OR o.deadline_at > (SELECT millis($3)))
  ORDER BY o.rank, o.job_seq, o.no LIMIT $2 FOR UPDATE OF o SKIP LOCKED`);
const JOB_TRACES = sql('SELECT job_seq AS "jobSeq", spec FROM job_specs WHERE job_seq = ANY($1::bigint[])');
const NOW = sql('SELECT millis($1) AS now');

const ATTEMPTS_OF = sql(`
  SELECT t.id, coalesce(o.state, e.state) AS state, a.lease_id AS "leaseId", a.node_id AS "nodeId", a.outcome
  FROM tasks t LEFT JOIN open_tasks o ON o.job_seq = t.job_seq AND o.no = t.no
  LEFT JOIN ended_tasks e ON e.job_seq = t.job_seq AND e.no = t.no
  LEFT JOIN attempts a ON a.job_seq = t.job_seq AND a.no = t.no
  WHERE t.id = ANY($1::text[]) ORDER BY a.attempt DESC`);

const NEXT_WAKE = sql(`
  SELECT min(wake_at) AS "wakeAt", millis($1) AS now FROM open_tasks WHERE wake_at IS NOT NULL`);
const DUE = sql(`
  SELECT ${OPEN_COLUMNS} FROM ${OPEN_TASKS} WHERE o.wake_at <= (SELECT millis($1))
  ORDER BY o.wake_at, o.job_seq, o.no LIMIT $2 FOR UPDATE OF o SKIP LOCKED`);

// ---- Leasing --------------------------------------------------------------------------------------------------

type Tier = 'preferred' | 'other';

/** Requests that the same tasks can answer, served together. */
interface Party extends Readonly<Record<Tier, readonly number[]>> {
  readonly requests: { readonly index: number; readonly want: number }[];
}

export async function leaseTasks(
  database: Database,
  settings: WorkSettings,
  requests: readonly LeaseRequest[],
): Promise<Answers<LeaseAnswer>> {
  const nodeIds = [...new Set(requests.map(({ nodeId }) => nodeId))];
  // Without locks first: who asks when there is nothing to have, and most who poll do, costs one look and no commit.
  const looked = await database.snapshot(async (ask) => {
    const [nodes, held, ready, [time]] = await Promise.all([
      ask<StoredNode>(READ_NODES, [nodeIds]),
      ask<{ nodeId: string; held: number }>(HELD_BY_NODES, [nodeIds]),
      ask<{ queueId: number }>(READY_QUEUES, []),
      ask<{ now: number }>(NOW, [database.given]),
    ]);
    return { nodes, held, ready: ready.map(({ queueId }) => queueId), now: time?.now ?? 0 };
  });
  await settings.queues.load(looked.ready);
  const first = rooms(requests, looked.nodes.map(nodeOf), looked.held);
  const parties = partiesOf(requests, first, looked.ready, settings);
  if (parties.length === 0) return { outcomes: first.map(answerOf), changes: [] };
  const fronts = await frontsOf(database, parties, looked.now);

  const { value: outcomes, changes } = await inUnit(database, settings, async (unit) => {
    const { transaction } = unit;
    const shelves = new Shelves(unit);
    const wanted = new Map(parties.map((party) => [party, wantOf(party)]));
    const [nodes, held] = await Promise.all([
      transaction.rows<StoredNode>(LOCK_NODES, [nodeIds]),
      transaction.rows<{ nodeId: string; held: number }>(HELD_BY_NODES, [nodeIds]),
      shelves.fetch(countsPerQueue(wanted, 'preferred', fronts)),
    ]);
    // What the nodes may have is decided by what is true now that they are locked.
    const free = rooms(requests, nodes.map(nodeOf), held);
    const grants = new Map<number, Task[]>();
    const serve = (tier: Tier): void => {
      for (const party of parties) {
        for (const { index } of party.requests) {
          const room = free[index];
          if (room?.kind !== 'room') continue;
          const own = grants.get(index) ?? [];
          own.push(...shelves.take(party[tier], room.want - own.length));
          grants.set(index, own);
        }
      }
    };
    serve('preferred');
    for (const party of parties) {
      const left = party.requests.map(({ index, want }) => want - (grants.get(index)?.length ?? 0));
      wanted.set(
        party,
        left.reduce((sum, count) => sum + count, 0),
      );
    }
    await shelves.fetch(countsPerQueue(wanted, 'other', fronts));
    serve('other');
    // What was taken and not given out stays ready; whoever passed over it meanwhile should look again.
    if (shelves.left > 0) unit.changes.runnable = true;

    const jobSeqs = [...new Set([...grants.values()].flat().map(({ jobSeq }) => jobSeq))];
    const [, traces] = await Promise.all([
      unit.lockJobs(jobSeqs),
      jobSeqs.length === 0 ? [] : transaction.rows<{ jobSeq: number; spec: string }>(JOB_TRACES, [jobSeqs]),
    ]);
    const traceparents = new Map(
      traces.map(({ jobSeq, spec }) => [jobSeq, (JSON.parse(spec) as JobText).traceparent ?? null]),
    );
    return requests.map(({ nodeId, start }, index): Outcome<LeaseAnswer> => {
      const tasks = grants.get(index);
      if (!tasks) return answerOf(free[index] ?? NO_ROOM);
      const leases = tasks.map((task): GrantedLease => {
        unit.grant(task, nodeId, start);
        const job = unit.job(task.jobSeq);
        return {
          leaseId: task.leaseId ?? '',
          expiresAt: isoTime(task.leaseExpiresAt ?? 0),
          domainId: job.domainId,
          task: taskRecord(task, job, settings.queues.get(task.queueId), 0, []),
          traceparent: traceparents.get(task.jobSeq) ?? null,
        };
      });
      return { ok: true, value: { leases, busy: false } };
    });
  });
  return { outcomes, changes };
}

/** Ready tasks that this transaction has locked and not given out yet, by queue. */
class Shelves {
  readonly #unit: Unit;
  readonly #tasks = new Map<number, Task[]>();
  readonly #seen = new Map<number, Set<number | string>>();

  constructor(unit: Unit) {
    this.#unit = unit;
  }

  get left(): number {
    let sum = 0;
    for (const tasks of this.#tasks.values()) sum += tasks.length;
    return sum;
  }

  /** Locks so many more of each queue, if there are so many that nobody else has locked. */
  async fetch(counts: ReadonlyMap<number, number>): Promise<void> {
    const { transaction } = this.#unit;
    await Promise.all(
      [...counts].map(async ([queueId, count]) => {
        const seen = this.#seen.get(queueId) ?? new Set();
        this.#seen.set(queueId, seen);
        // One's own locks are not passed over: what was fetched before comes again.
        const rows = await transaction.rows<Task>(TAKE, [queueId, seen.size + count, transaction.given]);
        const fresh = this.#unit.adopt(rows).filter(({ id }) => !seen.has(id));
        for (const { id } of fresh) seen.add(id);
        this.#tasks.set(queueId, [...(this.#tasks.get(queueId) ?? []), ...fresh]);
      }),
    );
  }

  /** The first of these queues by priority and age. */
  take(queueIds: readonly number[], count: number): Task[] {
    const shelves = queueIds.flatMap((id) => this.#tasks.get(id) ?? []);
    if (count <= 0 || shelves.length === 0) return [];
    const taken = queueIds.length === 1 ? shelves : shelves.toSorted(byPriorityAndAge);
    const given = taken.slice(0, count);
    for (const task of given) {
      const shelf = this.#tasks.get(task.queueId) ?? [];
      shelf.splice(shelf.indexOf(task), 1);
    }
    return given;
  }
}

function byPriorityAndAge(a: Task, b: Task): number {
  return b.priority - a.priority || a.jobSeq - b.jobSeq || a.no - b.no;
}

/** What a request may get at most, or why nothing. */
type Room =
  | { readonly kind: 'room'; readonly node: NodeRow; readonly want: number }
  | { readonly kind: 'busy' }
  | { readonly kind: 'refused'; readonly error: MillraceError };

const NO_ROOM: Room = { kind: 'busy' };

/** Earlier requests of a node come first. */
function rooms(
  requests: readonly LeaseRequest[],
  nodes: readonly NodeRow[],
  held: readonly { readonly nodeId: string; readonly held: number }[],
): Room[] {
  const byId = new Map(nodes.map((node) => [node.id, node]));
  const used = new Map(held.map(({ nodeId, held: count }) => [nodeId, count]));
  return requests.map(({ nodeId, max }): Room => {
    const node = byId.get(nodeId);
    if (!node)
      return { kind: 'refused', error: new MillraceError('not_found', `node ${nodeId} does not exist`) };
    if (!Number.isSafeInteger(max) || max < 1) {
      const error = new MillraceError('invalid_argument', `a node must ask for at least 1 task, got ${max}`);
      return { kind: 'refused', error };
    }
    const free = node.maxConcurrency - (used.get(nodeId) ?? 0);
    if (free <= 0) return { kind: 'busy' };
    const want = Math.min(max, free);
    used.set(nodeId, (used.get(nodeId) ?? 0) + want);
    return { kind: 'room', node, want };
  });
}

function answerOf(room: Room): Outcome<LeaseAnswer> {
  if (room.kind === 'refused') return { ok: false, error: room.error };
  return { ok: true, value: { leases: [], busy: room.kind === 'busy' } };
}

/** Those who can be given something, by the queues they may take from. */
function partiesOf(
  requests: readonly LeaseRequest[],
  free: readonly Room[],
  ready: readonly number[],
  settings: WorkSettings,
): Party[] {
  const parties = new Map<string, Party>();
  requests.forEach(({ capabilities }, index) => {
    const room = free[index];
    if (room?.kind !== 'room') return;
    const tiers: Record<'preferred' | 'other', number[]> = { preferred: [], other: [] };
    for (const id of ready) {
      const queue = settings.queues.get(id);
      if (capabilities !== null && !capabilities.includes(queue.capability)) continue;
      const tier = match(queue, room.node);
      if (tier !== 'never') tiers[tier].push(id);
    }
    if (tiers.preferred.length + tiers.other.length === 0) return;
    const key = JSON.stringify(tiers);
    const party = parties.get(key) ?? { requests: [], ...tiers };
    party.requests.push({ index, want: room.want });
    parties.set(key, party);
  });
  return [...parties.values()];
}

/** A ready task, as far as it matters for the order; its queue. */
interface Front {
  readonly queueId: number;
  readonly rank: number;
  readonly jobSeq: number;
  readonly no: number;
}

/** In order, the first ready tasks of those queues that have to be compared with each other. */
async function frontsOf(
  database: Database,
  parties: readonly Party[],
  now: number,
): Promise<readonly Front[]> {
  const compared = new Set<number>();
  let want = 0;
  for (const party of parties) {
    want += wantOf(party);
    for (const tier of [party.preferred, party.other]) {
      if (tier.length > 1) for (const id of tier) compared.add(id);
    }
  }
  if (compared.size === 0) return [];
  const fronts = await database.rows<Front>(FRONTS, [[...compared], want, now]);
  return fronts.toSorted((a, b) => a.rank - b.rank || a.jobSeq - b.jobSeq || a.no - b.no);
}

/**
 * How many tasks to take from each queue, so that all together are the first by priority and age. Others may take from
 * them meanwhile: then the order is only nearly that, and still no task is locked without need.
 */
function countsPerQueue(
  wanted: ReadonlyMap<Party, number>,
  tier: Tier,
  fronts: readonly Front[],
): Map<number, number> {
  const counts = new Map<number, number>();
  const count = (queueId: number, by: number): void =>
    void counts.set(queueId, (counts.get(queueId) ?? 0) + by);
  const used = new Set<Front>();
  for (const [party, want] of wanted) {
    const queues = new Set(party[tier]);
    if (want <= 0 || queues.size === 0) continue;
    const [only] = queues;
    if (queues.size === 1 && only !== undefined) {
      count(only, want);
      continue;
    }
    let left = want;
    for (const front of fronts) {
      if (left === 0) break;
      if (!queues.has(front.queueId) || used.has(front)) continue;
      used.add(front);
      count(front.queueId, 1);
      left -= 1;
    }
  }
  return counts;
}

function wantOf({ requests }: Party): number {
  return requests.reduce((sum, { want }) => sum + want, 0);
}

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
  const { value: outcomes, changes } = await inUnit(database, settings, async (unit) => {
    await unit.lockTasks(ids, beats);
    // A heartbeat that only extends the lease needs nothing of the job but what never changes.
    const locked = new Set<number>();
    const read = new Set<number>();
    const staged: Task[] = [];
    const completions: { readonly task: Task; readonly outputs: readonly string[] }[] = [];
    const reported: Task[] = [];
    const strangers = new Set<string>();
    for (const report of reports) {
      for (const item of report.items) {
        const task = unit.current(item);
        if (!task) strangers.add(item.taskId);
        else if (report.verb === 'heartbeat') {
          const beat = item as HeartbeatItem;
          const says = beat.progress !== null || beat.events.length > 0;
          if (says) reported.push(task);
          (says || task.state === 'leased' ? locked : read).add(task.jobSeq);
        } else {
          locked.add(task.jobSeq);
          if (report.verb === 'complete') {
            staged.push(task);
            completions.push({ task, outputs: (item as CompleteItem).outputCids });
          }
        }
      }
    }
    const [, , , history] = await Promise.all([
      unit.lockJobs(locked),
      unit.loadStages(staged),
      unit.loadReports(reported),
      historyOf(unit.transaction, strangers),
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
  const task = unit.current(item);
  if (!task) return repeatedAnswer(unit, history, item, ACCEPTED[verb]);
  const leaseId = task.leaseId ?? '';
  const done: Outcome<ReportAnswer> = { ok: true, value: { leaseId } };
  if (verb === 'heartbeat') {
    const { progress, events, logged = false } = item as HeartbeatItem;
    unit.heartbeat(task);
    unit.report(task, progress, events, logged);
    const job = unit.job(task.jobSeq);
    return {
      ok: true,
      value: {
        leaseId,
        expiresAt: isoTime(task.leaseExpiresAt ?? 0),
        cancel: task.cancelRequestedAt !== null,
        domainId: job.domainId,
        task: taskRecord(task, job, settings.queues.get(task.queueId), 0, []),
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
      `task ${task.id} was asked to end (${reason}); its result is not accepted`,
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
  readonly leaseId: string;
  readonly nodeId: string;
  readonly outcome: AttemptOutcome;
}

/** Tasks by id: where they stand, and their ended attempts, the newest first. */
export type History = ReadonlyMap<
  string,
  { readonly state: TaskState; readonly leases: readonly PastLease[] }
>;

/** What there is to say to those whose lease is not current. */
export async function historyOf(transaction: Transaction, taskIds: ReadonlySet<string>): Promise<History> {
  const history = new Map<string, { state: TaskState; leases: PastLease[] }>();
  if (taskIds.size === 0) return history;
  type Row = {
    id: string;
    state: TaskState;
    leaseId: string | null;
    nodeId: string;
    outcome: AttemptOutcome;
  };
  for (const row of await transaction.rows<Row>(ATTEMPTS_OF, [[...taskIds]])) {
    const known = history.get(row.id) ?? { state: row.state, leases: [] };
    if (row.leaseId !== null)
      known.leases.push({ leaseId: row.leaseId, nodeId: row.nodeId, outcome: row.outcome });
    history.set(row.id, known);
  }
  return history;
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
  const [next] = await database.rows<{ wakeAt: number | null; now: number }>(NEXT_WAKE, [database.given]);
  if (!next || next.wakeAt === null || next.wakeAt > next.now) {
    return { value: { rescued: 0, more: false }, changes: [] };
  }
  return await inUnit(database, settings, async (unit) => {
    if (unit.isWide) await unit.lockTasks([], false);
    const due = unit.adopt(await unit.transaction.rows<Task>(DUE, [unit.transaction.given, SWEEP_TASKS]));
    await unit.lockJobs(due.map(({ jobSeq }) => jobSeq));
    let rescued = 0;
    const failed = new Map<number, string>();
    for (const task of due) {
      const woken = await unit.wake(task);
      if (woken.rescued) rescued += 1;
      if (woken.failed) failed.set(task.jobSeq, `task ${unit.nameOf(task)} failed: deadline`);
    }
    for (const [jobSeq, reason] of failed) await unit.endRest(jobSeq, reason);
    return { rescued, more: due.length === SWEEP_TASKS };
  });
}

/** When the sweeper should look again, epoch ms; null: nothing waits. */
export async function nextWake(database: Database): Promise<number | null> {
  const [next] = await database.rows<{ wakeAt: number | null; now: number }>(NEXT_WAKE, [database.given]);
  if (!next || next.wakeAt === null) return null;
  return next.wakeAt > next.now ? next.wakeAt : next.now + BUSY_LOOK_MS;
}
