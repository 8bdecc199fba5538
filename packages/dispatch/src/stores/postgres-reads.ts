/** What can be asked about jobs and tasks in PostgreSQL. Each answer is as of one moment. */
import { MillraceError } from '@millrace/runner';
import type { Json } from '@millrace/runner';
import { isFinal, taskStatus } from '../lifecycle.ts';
import type { TaskState } from '../lifecycle.ts';
import { JOB_STATUSES, TASK_STATUSES } from '../records.ts';
import type {
  BusyNode,
  DomainStanding,
  JobDetail,
  JobEvent,
  JobRecord,
  JobSpec,
  JobStatus,
  NodeMode,
  ReceiptRecord,
  TaskRecord,
  TasksSummary,
} from '../records.ts';
import type { DeadTasksQuery, ListJobsQuery, QueueStanding, StoreStats, TaskStanding } from '../store.ts';
import { taskId, taskIdsOf } from './ids.ts';
import { eventsOf } from './job-events.ts';
import type { EventRow } from './job-events.ts';
import { match } from './matching.ts';
import { TOTAL_COLUMNS, sql } from './postgres-database.ts';
import type { Database } from './postgres-database.ts';
import { READY_LANES } from './postgres-leasing.ts';
import type { Names } from './postgres-names.ts';
import type { Queues } from './postgres-queues.ts';
import {
  ATTEMPT_COLUMNS,
  JOB_COLUMNS,
  NODE_COLUMNS,
  OPEN_COLUMNS,
  RUN_COLUMNS,
  countsOf,
  endedAt,
  endingAt,
  endingOf,
  endingsOf,
  freshAt,
  jobRecord,
  lineOf,
  linesOf,
  nodeOf,
  receiptRecord,
  specAt,
  storable,
  taskIdOf,
  taskRecord,
  taskSubmission,
  withReport,
} from './postgres-rows.ts';
import type {
  Attempt,
  Ending,
  Job,
  JobText,
  Line,
  Run,
  Standing,
  StoredNode,
  Task,
} from './postgres-rows.ts';
import { isoTime, isoTimeOrNull } from './time.ts';
import { checkWeight } from './turns.ts';

const OF_JOB = '(SELECT seq FROM jobs WHERE id = $1)';

const JOB = sql(
  `SELECT ${JOB_COLUMNS}, s.spec FROM jobs j JOIN job_specs s ON s.job_seq = j.seq WHERE j.id = $1`,
);
const STAGE_DEPS = sql(`SELECT stage, deps_remaining AS deps FROM stages WHERE job_seq = ${OF_JOB}`);
const BLOCKS_OF_JOB = sql(`SELECT block, body FROM task_blocks WHERE job_seq = ${OF_JOB}`);
const SPECS_OF_JOB = sql(`SELECT no, spec FROM task_specs WHERE job_seq = ${OF_JOB}`);
const OPEN_OF_JOB = sql(`SELECT ${OPEN_COLUMNS} FROM open_tasks o WHERE o.job_seq = ${OF_JOB}`);
const RUNS_OF_JOB = sql(`SELECT ${RUN_COLUMNS} FROM ended_runs e WHERE e.job_seq = ${OF_JOB}`);
const REPORTS_OF_JOB = sql(`SELECT no, progress, events FROM task_reports WHERE job_seq = ${OF_JOB}`);
const ATTEMPTS_OF_JOB = sql(`
  SELECT ${ATTEMPT_COLUMNS} FROM attempts a WHERE a.job_seq = ${OF_JOB} ORDER BY a.job_seq, a.no, a.attempt`);

/** A task of any state, of `jobs j`: its position is `no`. */
const taskColumns = (no: string): string => `
  ${no} AS no, ${specAt('j.seq', no)} AS spec, j.seq AS "jobSeq", j.id AS "jobId", j.own_task_ids AS "ownTaskIds",
  j.domain_id AS "domainId", j.organization_id AS "organizationId", j.created_at AS "createdAt", r.progress, r.events,
  (SELECT s.deps_remaining FROM stages s WHERE s.job_seq = j.seq AND s.stage = o.stage) AS deps,
  (SELECT k.held FROM limit_keys k WHERE k.id = o.key_id) AS "heldOfKey", o.lane_id AS "laneId", o.state, o.attempts, o.node_faults AS "nodeFaults", o.drains, o.lease_id AS "leaseId",
  o.node_id AS "nodeId", o.leased_at AS "leasedAt", o.lease_expires_at AS "leaseExpiresAt",
  o.last_heartbeat_at AS "lastHeartbeatAt", o.not_before AS "notBefore", o.cancel_requested_at AS "cancelRequestedAt",
  o.updated_at AS "updatedAt", o.reason, e.state AS "endState", e.updated_at AS "endedAt", ${endingAt(no)} AS ending`;
const taskJoins = (no: string): string => `
  LEFT JOIN open_tasks o ON o.job_seq = j.seq AND o.no = ${no}
  LEFT JOIN task_reports r ON r.job_seq = j.seq AND r.no = ${no}`;
const TASK = sql(`
  SELECT ${taskColumns('$2::integer')} FROM jobs j ${taskJoins('$2::integer')}
  LEFT JOIN ended_runs e ON ${endedAt('j.seq', '$2::integer')} WHERE j.seq = $1`);

interface TaskRow extends Omit<Standing, 'state'> {
  readonly no: number;
  readonly spec: string;
  readonly jobSeq: number;
  readonly jobId: string;
  readonly ownTaskIds: boolean;
  readonly domainId: string;
  readonly organizationId: string | null;
  readonly createdAt: number;
  readonly progress: string | null;
  readonly events: string | null;
  /** Of an open task in a stage that edges name. */
  readonly deps: number | null;
  readonly laneId: number | null;
  /** Of an open task with a concurrency limit. */
  readonly heldOfKey: number | null;
  /** Null: it has ended, or was never leased. */
  readonly state: TaskState | null;
  readonly endState: TaskState | null;
  readonly endedAt: number | null;
  readonly ending: string | null;
}

function standingOf(row: TaskRow): Standing | Ending {
  const { state, endState, endedAt: at, ending, createdAt } = row;
  if (state !== null) return { ...row, state };
  return endState !== null && ending !== null ? endingOf(ending, endState, at ?? 0) : freshAt(createdAt);
}

function outputsOf(standing: Standing | Ending): readonly string[] {
  return 'completion' in standing ? (standing.completion?.outputs ?? []) : [];
}

const LIST = sql(`
  SELECT ${JOB_COLUMNS}, s.spec FROM jobs j JOIN job_specs s ON s.job_seq = j.seq
  WHERE j.seq < $1 AND ($2::text IS NULL OR j.domain_id = $2) AND ($3::text IS NULL OR j.status = $3)
    AND (cardinality($4::text[]) = 0 OR CASE WHEN $5 THEN s.capabilities @> $4 ELSE s.capabilities && $4 END)
  ORDER BY j.seq DESC LIMIT $6`);
const LIST_IN_DOMAIN = sql(`
  SELECT ${JOB_COLUMNS}, s.spec FROM jobs j JOIN job_specs s ON s.job_seq = j.seq
  WHERE j.seq < $1 AND j.domain_id = $2 AND ($3::text IS NULL OR j.status = $3)
    AND (cardinality($4::text[]) = 0 OR CASE WHEN $5 THEN s.capabilities @> $4 ELSE s.capabilities && $4 END)
  ORDER BY j.domain_id DESC, j.seq DESC LIMIT $6`);

const EVENTS = sql(`
  SELECT j.seq AS "jobSeq", j.own_task_ids AS "ownTaskIds", e.last_seq AS "lastSeq", e.count, e.at, e.body
  FROM jobs j LEFT JOIN LATERAL (
    SELECT * FROM events WHERE job_seq = j.seq AND last_seq > $2 ORDER BY last_seq LIMIT $3) e ON true
  WHERE j.id = $1 ORDER BY e.last_seq`);
const TASK_IDS = sql('SELECT no, id FROM task_ids WHERE job_seq = $1 AND no = ANY($2::integer[])');

const CURRENT_LEASES = sql(`
  SELECT lease_id AS "leaseId" FROM open_tasks WHERE node_id = $1 AND cancel_requested_at IS NULL`);
const BUSY = sql(`
  SELECT o.node_id AS "nodeId", o.no, i.id AS "keptId", o.state, o.lane_id AS "laneId", j.id AS "jobId", j.status
  FROM open_tasks o JOIN jobs j ON j.seq = o.job_seq LEFT JOIN task_ids i ON i.job_seq = o.job_seq AND i.no = o.no
  WHERE o.node_id IS NOT NULL ORDER BY o.job_seq, o.no`);
const ALL_NODES = sql(`SELECT ${NODE_COLUMNS} FROM nodes n WHERE n.registered_at IS NOT NULL`);
const AHEAD = sql(`
  SELECT coalesce(sum(c.higher), 0)::bigint AS higher, coalesce(sum(c.older), 0)::bigint AS older
  FROM unnest($1::integer[]) AS l (id) CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE o.rank < $2) AS higher,
      count(*) FILTER (WHERE o.rank = $2 AND (o.job_seq, o.no) < ($3, $4)) AS older
    FROM open_tasks o WHERE o.lane_id = l.id AND o.state = 'ready' AND NOT o.parked AND o.rank <= $2
    UNION ALL
    SELECT sum(f.last_no - f.first_no + 1) FILTER (WHERE f.rank < $2),
      sum(least(f.last_no, CASE WHEN f.job_seq = $3 THEN $4::integer - 1 ELSE f.last_no END) - f.first_no + 1)
        FILTER (WHERE f.rank = $2 AND (f.job_seq, f.first_no) < ($3, $4))
    FROM fresh f WHERE f.lane_id = l.id AND f.rank <= $2) AS c`);

const TOTALS = sql(`
  SELECT ${TOTAL_COLUMNS.map((column) => `coalesce(sum(${column}), 0)::bigint AS ${column}`).join(', ')} FROM writers`);
/** The front of each lane and priority is what has waited longest there. */
const OLDEST_READY = sql(`
  WITH RECURSIVE fronts (lane_id, rank, updated_at) AS (
    (SELECT lane_id, rank, updated_at FROM open_tasks WHERE state = 'ready' AND NOT parked ORDER BY lane_id, rank, job_seq, no LIMIT 1)
    UNION ALL
    SELECT n.* FROM fronts f CROSS JOIN LATERAL (
      SELECT o.lane_id, o.rank, o.updated_at FROM open_tasks o
      WHERE o.state = 'ready' AND NOT o.parked AND (o.lane_id, o.rank) > (f.lane_id, f.rank)
      ORDER BY o.lane_id, o.rank, o.job_seq, o.no LIMIT 1) AS n),
  ranges (lane_id, rank, since) AS (
    (SELECT lane_id, rank, since FROM fresh ORDER BY lane_id, rank, job_seq, last_no LIMIT 1)
    UNION ALL
    SELECT n.* FROM ranges r CROSS JOIN LATERAL (
      SELECT f.lane_id, f.rank, f.since FROM fresh f WHERE (f.lane_id, f.rank) > (r.lane_id, r.rank)
      ORDER BY f.lane_id, f.rank, f.job_seq, f.last_no LIMIT 1) AS n)
  SELECT least((SELECT min(updated_at) FROM fronts), (SELECT min(since) FROM ranges)) AS since, millis($1) AS now`);

const QUEUES = sql(`
  SELECT l.queue_id AS "queueId", sum(c.ready)::bigint AS ready, sum(c.limited)::bigint AS limited, sum(c.blocked)::bigint AS blocked,
    sum(c.delayed)::bigint AS delayed, sum(c.held)::bigint AS held, (SELECT millis($1)) - min(c.since) AS age
  FROM (
    SELECT lane_id, count(*) FILTER (WHERE state = 'ready') AS ready, count(*) FILTER (WHERE state = 'blocked') AS blocked,
      count(*) FILTER (WHERE state = 'ready' AND key_limit <= (SELECT k.held FROM limit_keys k WHERE k.id = key_id)) AS limited,
      count(*) FILTER (WHERE state = 'delayed') AS delayed, count(*) FILTER (WHERE state IN ('leased', 'running')) AS held,
      min(updated_at) FILTER (WHERE state = 'ready') AS since
    FROM open_tasks GROUP BY lane_id
    UNION ALL
    SELECT lane_id, sum(last_no - first_no + 1), 0, 0, 0, 0, min(since) FROM fresh GROUP BY lane_id) AS c
  JOIN lanes l ON l.id = c.lane_id GROUP BY l.queue_id ORDER BY l.queue_id`);
const HELD_OF_KEY = sql('SELECT held FROM limit_keys WHERE domain_id = $1 AND name = $2');
const SET_WEIGHT = sql(`
  INSERT INTO domains (domain_id, weight) VALUES ($1, $2) ON CONFLICT (domain_id) DO UPDATE SET weight = excluded.weight`);
const RESET_WEIGHT = sql('DELETE FROM domains WHERE domain_id = $1');
const DOMAINS = sql(`
  SELECT c.domain_id, coalesce((SELECT d.weight FROM domains d WHERE d.domain_id = c.domain_id), 1) AS weight,
    sum(c.ready)::bigint AS ready, sum(c.held)::bigint AS held
  FROM (
    SELECT l.domain_id, o.ready, o.held FROM (
      SELECT lane_id, count(*) FILTER (WHERE state = 'ready') AS ready, count(*) FILTER (WHERE node_id IS NOT NULL) AS held
      FROM open_tasks WHERE state IN ('ready', 'leased', 'running') GROUP BY lane_id
      UNION ALL SELECT lane_id, sum(last_no - first_no + 1), 0 FROM fresh GROUP BY lane_id) AS o
    JOIN lanes l ON l.id = o.lane_id
    UNION ALL SELECT domain_id, 0, 0 FROM domains) AS c
  GROUP BY c.domain_id ORDER BY c.domain_id`);
const REDRIVES_OF_JOB = sql(
  'SELECT j.id FROM redrives r JOIN jobs j ON j.seq = r.job_seq WHERE r.source_id = $1 ORDER BY j.seq',
);
/** Where the queue is in a line. As JSON it cannot be asked: PostgreSQL refuses U+0000 in it. */
const QUEUE_OF_LINE = String.raw`^\[(?:null|"(?:[^"\\]|\\.)*"),\d+,(\d+)`;
// Each of these is a run of its own.
const DEAD = `
  SELECT ${taskColumns('e.first_no')}
  FROM ended_runs e JOIN jobs j ON j.seq = e.job_seq ${taskJoins('e.first_no')}
  WHERE e.state = 'failed' AND (e.job_seq, e.first_no) < ($1::bigint, $2::integer)
    AND ($3::text IS NULL OR j.domain_id = $3) AND ($4::text IS NULL OR $4 = (
      SELECT q.capability FROM queues q WHERE q.id = substring(
      ${specAt('e.job_seq', 'e.first_no')} FROM '${QUEUE_OF_LINE}')::integer))`;
const DEAD_ORDER = 'ORDER BY e.job_seq DESC, e.first_no DESC LIMIT $5';
const DEAD_TASKS = sql(`${DEAD} ${DEAD_ORDER}`);
const DEAD_TASKS_OF_JOB = sql(`${DEAD} AND e.job_seq = (SELECT seq FROM jobs WHERE id = $6) ${DEAD_ORDER}`);

/** Rows of events read at once: each holds one event or many. */
const EVENT_ROWS = 256;

export class Reads {
  readonly #database: Database;
  readonly #queues: Queues;
  readonly #names: Names;

  constructor(database: Database, queues: Queues, names: Names) {
    this.#database = database;
    this.#queues = queues;
    this.#names = names;
  }

  async job(id: string): Promise<JobDetail | null> {
    const [[job], stages, blocks, specs, open, runs, attempts, reports, redrives] =
      await this.#database.snapshot((ask) =>
        Promise.all([
          ask<Job & { readonly spec: string }>(JOB, [id]),
          ask<{ stage: number; deps: number }>(STAGE_DEPS, [id]),
          ask<{ block: number; body: string }>(BLOCKS_OF_JOB, [id]),
          ask<{ no: number; spec: string }>(SPECS_OF_JOB, [id]),
          ask<Task>(OPEN_OF_JOB, [id]),
          ask<Run>(RUNS_OF_JOB, [id]),
          ask<Attempt>(ATTEMPTS_OF_JOB, [id]),
          ask<{ no: number; progress: string; events: string }>(REPORTS_OF_JOB, [id]),
          ask<{ id: string }>(REDRIVES_OF_JOB, [id]),
        ]),
      );
    if (!job) return null;
    const lines = await this.#tasksOf(job, blocks, specs);
    const deps = new Map(stages.map(({ stage, deps: left }) => [stage, left]));
    const standings = new Map<number, Standing | Ending>(open.map((task) => [task.no, task]));
    const receipts: ReceiptRecord[] = [];
    const ids = lines.map((line, no) => taskIdOf(job, no, () => line));
    const attemptsOf = new Map<number, Attempt[]>();
    for (const attempt of attempts) {
      const known = attemptsOf.get(attempt.no);
      if (known) known.push(attempt);
      else attemptsOf.set(attempt.no, [attempt]);
    }
    for (const ending of runs.flatMap(endingsOf)) standings.set(ending.no, ending);
    for (const [no, taskIdOfNo] of ids.entries()) {
      for (const attempt of attemptsOf.get(no) ?? []) {
        const [outputs, meta] = [JSON.parse(attempt.outputs) as string[], JSON.parse(attempt.meta) as Json];
        receipts.push(receiptRecord(attempt, outputs, meta, job.id, taskIdOfNo));
      }
      const standing = standings.get(no);
      if (!standing || !('completion' in standing) || !standing.completion) continue;
      const { outputs, meta, ...completion } = standing.completion;
      const attempt = { ...completion, outcome: 'completed', reason: null } as const;
      receipts.push(
        receiptRecord({ ...attempt, createdAt: standing.updatedAt }, outputs, meta, job.id, taskIdOfNo),
      );
    }
    const reportOf = new Map(reports.map((report) => [report.no, report]));
    return {
      job: jobRecord(job, JSON.parse(job.spec) as JobText),
      tasks_summary: countsOf(job),
      tasks: lines.map((line, no) => {
        const standing = standings.get(no) ?? freshAt(job.createdAt);
        const queue = this.#queues.get(line.queueId);
        const left = deps.get(line.stageNo) ?? 0;
        const record = taskRecord(ids[no] ?? '', line, standing, job, queue, left, outputsOf(standing));
        const report = reportOf.get(no);
        return withReport(record, report?.progress ?? null, report?.events ?? null);
      }),
      receipts: receipts.toSorted((a, b) =>
        a.created_at < b.created_at ? -1 : a.created_at > b.created_at ? 1 : 0,
      ),
      ...(redrives.length > 0 && { redriven_as: redrives.map((redrive) => redrive.id) }),
    };
  }

  /** What all tasks of the job were submitted with, in their order; their queues are known. */
  async #tasksOf(
    job: Job,
    blocks: readonly { readonly block: number; readonly body: string }[],
    specs: readonly { readonly no: number; readonly spec: string }[],
  ): Promise<Line[]> {
    const found = linesOf(blocks, specs);
    const lines = Array.from({ length: job.taskCount }, (_, no) => {
      const line = found.get(no);
      if (!line) throw new MillraceError('internal', `task number ${no} of job ${job.id} has no spec`);
      return line;
    });
    await this.#queues.load(lines.map(({ queueId }) => queueId));
    return lines;
  }

  async submission(id: string): Promise<JobSpec | null> {
    const [[job], blocks, specs] = await this.#database.snapshot((ask) =>
      Promise.all([
        ask<Job & { readonly spec: string }>(JOB, [id]),
        ask<{ block: number; body: string }>(BLOCKS_OF_JOB, [id]),
        ask<{ no: number; spec: string }>(SPECS_OF_JOB, [id]),
      ]),
    );
    if (!job) return null;
    const lines = await this.#tasksOf(job, blocks, specs);
    const { label, meta, edges, not_before, redrive_of } = JSON.parse(job.spec) as JobText;
    return {
      label,
      domain_id: job.domainId,
      priority: job.priority,
      meta,
      tasks: lines.map((line) => taskSubmission(line, this.#queues.get(line.queueId))),
      edges,
      deadline_at: isoTimeOrNull(job.deadlineAt),
      ...(job.cache && { cache: true }),
      ...(not_before !== undefined && { not_before }),
      ...(redrive_of !== undefined && { redrive_of }),
    };
  }

  /** @see Store.deadTasks */
  async deadTasks(
    { domainId, jobId, capability, limit }: DeadTasksQuery,
    before: readonly [jobSeq: number, no: number] | null,
  ): Promise<{ items: TaskRecord[]; next: readonly [number, number] | null }> {
    // One more than asked for tells whether there is a next page.
    const rows = await this.#database.rows<TaskRow>(jobId === null ? DEAD_TASKS : DEAD_TASKS_OF_JOB, [
      before?.[0] ?? Number.MAX_SAFE_INTEGER,
      before?.[1] ?? 0,
      domainId,
      capability,
      limit + 1,
      ...(jobId === null ? [] : [jobId]),
    ]);
    const page = rows.slice(0, limit);
    const last = page.at(-1);
    await this.#queues.load(page.map((row) => lineOf(row).queueId));
    return {
      items: page.map((row) => this.#recordOf(row)),
      next: rows.length > limit && last ? [last.jobSeq, last.no] : null,
    };
  }

  async task(id: string): Promise<TaskRecord | null> {
    const row = await this.#taskRow(id);
    return row && this.#recordOf(row);
  }

  /** Its queue is known. */
  #recordOf(row: TaskRow): TaskRecord {
    const line = lineOf(row);
    const standing = standingOf(row);
    const job = { id: row.jobId, organizationId: row.organizationId, createdAt: row.createdAt };
    const id = taskIdOf({ id: row.jobId, ownTaskIds: row.ownTaskIds }, row.no, () => line);
    const queue = this.#queues.get(line.queueId);
    const record = taskRecord(id, line, standing, job, queue, row.deps ?? 0, outputsOf(standing));
    return withReport(record, row.progress, row.events);
  }

  async list(
    query: ListJobsQuery,
    before: number | null,
  ): Promise<{ items: { job: JobRecord; tasks_summary: TasksSummary }[]; next: number | null }> {
    const { domainId, status, capabilities, matchAllCapabilities, limit } = query;
    // One more than asked for tells whether there is a next page.
    const rows = await this.#database.rows<Job & { readonly spec: string }>(
      domainId === null ? LIST : LIST_IN_DOMAIN,
      [before ?? Number.MAX_SAFE_INTEGER, domainId, status, capabilities, matchAllCapabilities, limit + 1],
    );
    const page = rows.slice(0, limit);
    return {
      items: page.map((job) => ({
        job: jobRecord(job, JSON.parse(job.spec) as JobText),
        tasks_summary: countsOf(job),
      })),
      next: rows.length > limit ? (page.at(-1)?.seq ?? null) : null,
    };
  }

  async events(jobId: string, after: number, limit: number): Promise<JobEvent[] | null> {
    const found: ReturnType<typeof eventsOf> = [];
    let job: { readonly jobSeq: number; readonly ownTaskIds: boolean } | null = null;
    let from = after;
    for (let more = true; more && found.length < limit;) {
      type Row = { readonly jobSeq: number; readonly ownTaskIds: boolean } & EventRow & {
          readonly lastSeq: number | null;
        };
      const rows = await this.#database.rows<Row>(EVENTS, [jobId, from, Math.min(EVENT_ROWS, limit)]);
      const [first] = rows;
      if (!first) return job === null ? null : [];
      job = first;
      for (const row of rows) {
        // A job without newer events is one row of nothing.
        if (row.lastSeq === null) continue;
        from = row.lastSeq;
        for (const event of eventsOf(row)) if (event.seq > after) found.push(event);
      }
      more = rows.length === Math.min(EVENT_ROWS, limit) && first.lastSeq !== null;
    }
    const page = found.slice(0, limit);
    const nos = [...new Set(page.flatMap(({ task }) => (task === null ? [] : [task])))];
    const ids = new Map<number, string>();
    const made = taskIdsOf(jobId);
    if (!job?.ownTaskIds) for (const no of nos) ids.set(no, taskId(made, no));
    else if (nos.length > 0) {
      for (const { no, id } of await this.#database.rows<{ no: number; id: string }>(TASK_IDS, [
        job.jobSeq,
        nos,
      ])) {
        ids.set(no, id);
      }
    }
    return page.map(({ seq, atMs, kind, task, data }) => ({
      seq,
      at: isoTime(atMs),
      kind,
      task_id: task === null ? null : (ids.get(task) ?? null),
      data,
    }));
  }

  async canceledLeases(nodeId: string, leaseIds: readonly string[]): Promise<string[]> {
    const rows = await this.#database.rows<{ leaseId: string }>(CURRENT_LEASES, [nodeId]);
    const wanted = new Set(rows.map(({ leaseId }) => leaseId));
    return leaseIds.filter((leaseId) => !wanted.has(leaseId));
  }

  async busyNodes(mode: NodeMode | 'all'): Promise<BusyNode[]> {
    type Row = {
      nodeId: string;
      no: number;
      keptId: string | null;
      state: TaskState;
      laneId: number;
      jobId: string;
      status: JobStatus;
    };
    const rows = await this.#database.rows<Row>(BUSY, []);
    await this.#queues.loadLanes(rows.map(({ laneId }) => laneId));
    return rows.flatMap(({ nodeId, no, keptId, state, laneId, jobId, status }) => {
      const taskMode = this.#queues.lane(laneId).queue.mode;
      if (mode !== 'all' && taskMode !== mode) return [];
      return [
        {
          node_id: nodeId,
          task_id: keptId ?? taskId(taskIdsOf(jobId), no),
          task_status: taskStatus(state),
          task_mode: taskMode,
          job_id: jobId,
          job_status: status,
        },
      ];
    });
  }

  async standing(id: string): Promise<TaskStanding | null> {
    const row = await this.#taskRow(id);
    if (!row) return null;
    const { state, attempts, nodeFaults, drains, leasedAt } = standingOf(row);
    return {
      jobId: row.jobId,
      domainId: row.domainId,
      attempts: attempts + nodeFaults + drains,
      leasedAt: isoTimeOrNull(leasedAt),
      final: isFinal(state),
      ahead: state === 'ready' ? await this.#ahead(row) : null,
      ...(lineOf(row).concurrency && { heldOfKey: row.heldOfKey ?? (await this.#heldOfKey(row)) }),
    };
  }

  /** Of a task that has ended. */
  async #heldOfKey(row: TaskRow): Promise<number> {
    const key = lineOf(row).concurrency?.key ?? '';
    const [found] = await this.#database.rows<{ held: number }>(HELD_OF_KEY, [row.domainId, storable(key)]);
    return found?.held ?? 0;
  }

  /** Ready tasks before this one, in its own lane and in those of its domain that nodes of its queue take from as well. */
  async #ahead(row: TaskRow): Promise<{ higherPriority: number; older: number }> {
    const [ready, nodes] = await Promise.all([
      this.#database.rows<{ laneId: number }>(READY_LANES, []),
      this.#database.rows<StoredNode>(ALL_NODES, []),
    ]);
    await this.#queues.loadLanes(ready.map(({ laneId }) => laneId));
    const line = lineOf(row);
    const own = this.#queues.get(line.queueId);
    const able = nodes.map(nodeOf).filter((node) => match(own, node) !== 'never');
    const lanes = ready
      .map(({ laneId }) => this.#queues.lane(laneId))
      .filter(({ queue, domainId }) => {
        if (domainId !== row.domainId) return false;
        return queue.id === own.id || able.some((node) => match(queue, node) !== 'never');
      });
    const [count] = await this.#database.rows<{ higher: number; older: number }>(AHEAD, [
      lanes.map(({ id }) => id),
      -line.priority,
      row.jobSeq,
      row.no,
    ]);
    return { higherPriority: count?.higher ?? 0, older: count?.older ?? 0 };
  }

  async queues(): Promise<QueueStanding[]> {
    type Row = Record<'queueId' | 'ready' | 'limited' | 'blocked' | 'delayed' | 'held', number> & {
      readonly age: number | null;
    };
    const rows = await this.#database.rows<Row>(QUEUES, [this.#database.given]);
    await this.#queues.load(rows.map(({ queueId }) => queueId));
    return rows.map(({ queueId, ready, limited, blocked, delayed, held, age }) => {
      const { capability, filters, mode, organizationId, resources } = this.#queues.get(queueId);
      const oldestReadyAgeMs = age === null ? null : Math.max(0, age);
      return {
        capability,
        filters,
        mode,
        organizationId,
        ...(resources && { resources }),
        ready,
        limited,
        blocked,
        delayed,
        held,
        oldestReadyAgeMs,
      };
    });
  }

  async setWeight(domainId: string, weight: number): Promise<void> {
    checkWeight(weight);
    await this.#database.transaction('call', (transaction) =>
      weight === 1
        ? transaction.count(RESET_WEIGHT, [domainId])
        : transaction.count(SET_WEIGHT, [domainId, weight]),
    );
  }

  async domains(): Promise<DomainStanding[]> {
    return await this.#database.rows<DomainStanding>(DOMAINS, []);
  }

  async stats(): Promise<StoreStats> {
    const [[totals], [oldest]] = await this.#database.snapshot((ask) =>
      Promise.all([
        ask<Record<string, number>>(TOTALS, []),
        ask<{ since: number | null; now: number }>(OLDEST_READY, [this.#database.given]),
      ]),
    );
    if (!totals || !oldest) throw new MillraceError('internal', 'the database gave no counts');
    const count = (column: string): number => totals[column] ?? 0;
    return {
      tasks: Object.fromEntries(TASK_STATUSES.map((status) => [status, count(status)])) as TasksSummary,
      jobs: Object.fromEntries(JOB_STATUSES.map((status) => [status, count(`jobs_${status}`)])) as Record<
        JobStatus,
        number
      >,
      oldestRunnableAgeMs: oldest.since === null ? null : Math.max(0, oldest.now - oldest.since),
    };
  }

  /** Its queue is known afterwards. */
  async #taskRow(id: string): Promise<TaskRow | null> {
    const place = (await this.#names.find([id])).get(id);
    if (!place) return null;
    const [row] = await this.#database.rows<TaskRow>(TASK, [place.jobSeq, place.no]);
    if (!row) return null;
    await this.#queues.load([lineOf(row).queueId]);
    return row;
  }
}
