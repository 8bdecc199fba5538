/** What can be asked about jobs and tasks in PostgreSQL. Each answer is as of one moment. */
import { MillraceError } from '@millrace/runner';
import { isFinal, taskStatus } from '../lifecycle.ts';
import type { TaskState } from '../lifecycle.ts';
import { JOB_STATUSES, TASK_STATUSES } from '../records.ts';
import type {
  BusyNode,
  JobDetail,
  JobEvent,
  JobRecord,
  JobSpec,
  JobStatus,
  NodeMode,
  TaskRecord,
  TasksSummary,
} from '../records.ts';
import type { DeadTasksQuery, ListJobsQuery, QueueStanding, StoreStats, TaskStanding } from '../store.ts';
import { eventsOf } from './job-events.ts';
import type { EventRow } from './job-events.ts';
import { match } from './matching.ts';
import { TOTAL_COLUMNS, sql } from './postgres-database.ts';
import type { Database } from './postgres-database.ts';
import { READY_QUEUES } from './postgres-leases.ts';
import type { Queues } from './postgres-queues.ts';
import {
  ANY_COLUMNS,
  ANY_TASKS,
  ATTEMPT_COLUMNS,
  BASE_COLUMNS,
  JOB_COLUMNS,
  NODE_COLUMNS,
  countsOf,
  jobRecord,
  nodeOf,
  receiptRecord,
  taskRecord,
  taskSubmission,
  withReport,
} from './postgres-rows.ts';
import type { Attempt, Job, JobText, StoredNode, Task } from './postgres-rows.ts';
import { isoTime, isoTimeOrNull } from './time.ts';

const OF_JOB = '(SELECT seq FROM jobs WHERE id = $1)';

const JOB = sql(
  `SELECT ${JOB_COLUMNS}, s.spec FROM jobs j JOIN job_specs s ON s.job_seq = j.seq WHERE j.id = $1`,
);
const STAGE_DEPS = sql(`SELECT stage, deps_remaining AS deps FROM stages WHERE job_seq = ${OF_JOB}`);
const TASKS_OF_JOB = sql(`
  SELECT ${ANY_COLUMNS}, t.spec, r.progress, r.events FROM ${ANY_TASKS}
  LEFT JOIN task_reports r ON r.job_seq = t.job_seq AND r.no = t.no
  WHERE t.job_seq = ${OF_JOB} ORDER BY t.no`);
const ATTEMPTS_OF_JOB = sql(`
  SELECT ${ATTEMPT_COLUMNS} FROM attempts a WHERE a.job_seq = ${OF_JOB} ORDER BY a.job_seq, a.no, a.attempt`);

const TASK = sql(`
  SELECT ${ANY_COLUMNS}, t.spec, r.progress, r.events, s.deps_remaining AS deps, j.id AS "jobId",
    j.domain_id AS "domainId", j.organization_id AS "organizationId", j.created_at AS "createdAt", a.outputs
  FROM ${ANY_TASKS} JOIN jobs j ON j.seq = t.job_seq
  LEFT JOIN task_reports r ON r.job_seq = t.job_seq AND r.no = t.no
  LEFT JOIN stages s ON s.job_seq = t.job_seq AND s.stage = t.stage
  LEFT JOIN attempts a ON a.job_seq = t.job_seq AND a.no = t.no AND a.outcome = 'completed'
  WHERE t.id = $1`);

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
  SELECT j.seq AS "jobSeq", e.last_seq AS "lastSeq", e.count, e.at, e.body
  FROM jobs j LEFT JOIN LATERAL (
    SELECT * FROM events WHERE job_seq = j.seq AND last_seq > $2 ORDER BY last_seq LIMIT $3) e ON true
  WHERE j.id = $1 ORDER BY e.last_seq`);
const TASK_IDS = sql('SELECT no, id FROM tasks WHERE job_seq = $1 AND no = ANY($2::integer[])');

const CURRENT_LEASES = sql(`
  SELECT lease_id AS "leaseId" FROM open_tasks WHERE node_id = $1 AND cancel_requested_at IS NULL`);
const BUSY = sql(`
  SELECT o.node_id AS "nodeId", t.id, o.state, o.queue_id AS "queueId", j.id AS "jobId", j.status
  FROM open_tasks o JOIN tasks t ON t.job_seq = o.job_seq AND t.no = o.no JOIN jobs j ON j.seq = o.job_seq
  WHERE o.node_id IS NOT NULL ORDER BY o.job_seq, o.no`);
const ALL_NODES = sql(`SELECT ${NODE_COLUMNS} FROM nodes n WHERE n.registered_at IS NOT NULL`);
const AHEAD = sql(`
  SELECT coalesce(sum(c.higher), 0)::bigint AS higher, coalesce(sum(c.older), 0)::bigint AS older
  FROM unnest($1::integer[]) AS q (id) CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE o.rank < $2) AS higher,
      count(*) FILTER (WHERE o.rank = $2 AND (o.job_seq, o.no) < ($3, $4)) AS older
    FROM open_tasks o WHERE o.queue_id = q.id AND o.state = 'ready' AND o.rank <= $2) AS c`);

const TOTALS = sql(`
  SELECT ${TOTAL_COLUMNS.map((column) => `coalesce(sum(${column}), 0)::bigint AS ${column}`).join(', ')} FROM writers`);
/** The front of each queue and priority is what has waited longest there. */
const OLDEST_READY = sql(`
  WITH RECURSIVE fronts (queue_id, rank, updated_at) AS (
    (SELECT queue_id, rank, updated_at FROM open_tasks WHERE state = 'ready' ORDER BY queue_id, rank, job_seq, no LIMIT 1)
    UNION ALL
    SELECT n.* FROM fronts f CROSS JOIN LATERAL (
      SELECT o.queue_id, o.rank, o.updated_at FROM open_tasks o
      WHERE o.state = 'ready' AND (o.queue_id, o.rank) > (f.queue_id, f.rank)
      ORDER BY o.queue_id, o.rank, o.job_seq, o.no LIMIT 1) AS n)
  SELECT min(updated_at) AS since, millis($1) AS now FROM fronts`);

const QUEUES = sql(`
  SELECT queue_id AS "queueId", count(*) FILTER (WHERE state = 'ready') AS ready,
    count(*) FILTER (WHERE state = 'blocked') AS blocked, count(*) FILTER (WHERE state = 'delayed') AS delayed,
    count(*) FILTER (WHERE state IN ('leased', 'running')) AS held,
    (SELECT millis($1)) - min(updated_at) FILTER (WHERE state = 'ready') AS age
  FROM open_tasks GROUP BY queue_id ORDER BY queue_id`);
const REDRIVES_OF_JOB = sql(
  'SELECT j.id FROM redrives r JOIN jobs j ON j.seq = r.job_seq WHERE r.source_id = $1 ORDER BY j.seq',
);
const TASKS_AS_SUBMITTED = sql(
  `SELECT ${BASE_COLUMNS}, t.spec FROM tasks t WHERE t.job_seq = ${OF_JOB} ORDER BY t.no`,
);
const DEAD = `
  SELECT ${ANY_COLUMNS}, t.spec, r.progress, r.events, s.deps_remaining AS deps, j.id AS "jobId",
    j.organization_id AS "organizationId", j.created_at AS "createdAt"
  FROM ended_tasks e JOIN tasks t ON t.job_seq = e.job_seq AND t.no = e.no
  LEFT JOIN open_tasks o ON o.job_seq = t.job_seq AND o.no = t.no
  JOIN jobs j ON j.seq = t.job_seq JOIN queues q ON q.id = t.queue_id
  LEFT JOIN task_reports r ON r.job_seq = t.job_seq AND r.no = t.no
  LEFT JOIN stages s ON s.job_seq = t.job_seq AND s.stage = t.stage
  WHERE e.state = 'failed' AND (e.job_seq, e.no) < ($1::bigint, $2::integer)
    AND ($3::text IS NULL OR j.domain_id = $3) AND ($4::text IS NULL OR q.capability = $4)`;
const DEAD_ORDER = 'ORDER BY e.job_seq DESC, e.no DESC LIMIT $5';
const DEAD_TASKS = sql(`${DEAD} ${DEAD_ORDER}`);
const DEAD_TASKS_OF_JOB = sql(`${DEAD} AND e.job_seq = (SELECT seq FROM jobs WHERE id = $6) ${DEAD_ORDER}`);

interface TaskRow extends Task {
  readonly progress: string | null;
  readonly events: string | null;
  readonly deps?: number | null;
}

/** Rows of events read at once: each holds one event or many. */
const EVENT_ROWS = 256;

export class Reads {
  readonly #database: Database;
  readonly #queues: Queues;

  constructor(database: Database, queues: Queues) {
    this.#database = database;
    this.#queues = queues;
  }

  async job(id: string): Promise<JobDetail | null> {
    const [[job], stages, tasks, attempts, redrives] = await this.#database.snapshot((ask) =>
      Promise.all([
        ask<Job & { readonly spec: string }>(JOB, [id]),
        ask<{ stage: number; deps: number }>(STAGE_DEPS, [id]),
        ask<TaskRow>(TASKS_OF_JOB, [id]),
        ask<Attempt>(ATTEMPTS_OF_JOB, [id]),
        ask<{ id: string }>(REDRIVES_OF_JOB, [id]),
      ]),
    );
    if (!job) return null;
    await this.#queues.load(tasks.map(({ queueId }) => queueId));
    const deps = new Map(stages.map(({ stage, deps: left }) => [stage, left]));
    const ids = new Map(tasks.map((task) => [task.no, task.id]));
    const outputs = new Map<number, readonly string[]>();
    const receipts = attempts.map((attempt) => {
      const receipt = receiptRecord(attempt, job.id, ids.get(attempt.no) ?? '');
      if (receipt.outcome === 'completed') outputs.set(attempt.no, receipt.outputs);
      return receipt;
    });
    return {
      job: jobRecord(job, JSON.parse(job.spec) as JobText),
      tasks_summary: countsOf(job),
      tasks: tasks.map((task) => {
        const queue = this.#queues.get(task.queueId);
        const record = taskRecord(task, job, queue, deps.get(task.stage) ?? 0, outputs.get(task.no) ?? []);
        return withReport(record, task.progress, task.events);
      }),
      receipts: receipts.toSorted((a, b) =>
        a.created_at < b.created_at ? -1 : a.created_at > b.created_at ? 1 : 0,
      ),
      ...(redrives.length > 0 && { redriven_as: redrives.map((redrive) => redrive.id) }),
    };
  }

  async submission(id: string): Promise<JobSpec | null> {
    const [[job], tasks] = await this.#database.snapshot((ask) =>
      Promise.all([ask<Job & { readonly spec: string }>(JOB, [id]), ask<Task>(TASKS_AS_SUBMITTED, [id])]),
    );
    if (!job) return null;
    await this.#queues.load(tasks.map(({ queueId }) => queueId));
    const { label, meta, edges, not_before, redrive_of } = JSON.parse(job.spec) as JobText;
    return {
      label,
      domain_id: job.domainId,
      priority: job.priority,
      meta,
      tasks: tasks.map((task) => taskSubmission(task, this.#queues.get(task.queueId))),
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
    type Row = TaskRow & {
      readonly jobId: string;
      readonly organizationId: string | null;
      readonly createdAt: number;
    };
    // One more than asked for tells whether there is a next page.
    const rows = await this.#database.rows<Row>(jobId === null ? DEAD_TASKS : DEAD_TASKS_OF_JOB, [
      before?.[0] ?? Number.MAX_SAFE_INTEGER,
      before?.[1] ?? 0,
      domainId,
      capability,
      limit + 1,
      ...(jobId === null ? [] : [jobId]),
    ]);
    await this.#queues.load(rows.map(({ queueId }) => queueId));
    const page = rows.slice(0, limit);
    const last = page.at(-1);
    return {
      items: page.map((row) => {
        const job = { id: row.jobId, organizationId: row.organizationId, createdAt: row.createdAt };
        const record = taskRecord(row, job, this.#queues.get(row.queueId), row.deps ?? 0, []);
        return withReport(record, row.progress, row.events);
      }),
      next: rows.length > limit && last ? [last.jobSeq, last.no] : null,
    };
  }

  async task(id: string): Promise<TaskRecord | null> {
    const row = await this.#taskRow(id);
    if (!row) return null;
    await this.#queues.load([row.queueId]);
    const outputs = row.outputs === null ? [] : (JSON.parse(row.outputs) as string[]);
    const record = taskRecord(
      row,
      { id: row.jobId, organizationId: row.organizationId, createdAt: row.createdAt },
      this.#queues.get(row.queueId),
      row.deps ?? 0,
      outputs,
    );
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
    let jobSeq: number | null = null;
    let from = after;
    for (let more = true; more && found.length < limit;) {
      type Row = { readonly jobSeq: number } & EventRow & { readonly lastSeq: number | null };
      const rows = await this.#database.rows<Row>(EVENTS, [jobId, from, Math.min(EVENT_ROWS, limit)]);
      const [first] = rows;
      if (!first) return jobSeq === null ? null : [];
      jobSeq = first.jobSeq;
      for (const row of rows) {
        // A job without newer events is one row of nothing.
        if (row.lastSeq === null) continue;
        from = row.lastSeq;
        found.push(...eventsOf(row).filter(({ seq }) => seq > after));
      }
      more = rows.length === Math.min(EVENT_ROWS, limit) && first.lastSeq !== null;
    }
    const page = found.slice(0, limit);
    const nos = [...new Set(page.flatMap(({ task }) => (task === null ? [] : [task])))];
    const ids = new Map<number, string>();
    if (nos.length > 0) {
      for (const { no, id } of await this.#database.rows<{ no: number; id: string }>(TASK_IDS, [
        jobSeq,
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
      id: string;
      state: TaskState;
      queueId: number;
      jobId: string;
      status: JobStatus;
    };
    const rows = await this.#database.rows<Row>(BUSY, []);
    await this.#queues.load(rows.map(({ queueId }) => queueId));
    return rows.flatMap(({ nodeId, id, state, queueId, jobId, status }) => {
      const taskMode = this.#queues.get(queueId).mode;
      if (mode !== 'all' && taskMode !== mode) return [];
      return [
        {
          node_id: nodeId,
          task_id: id,
          task_status: taskStatus(state),
          task_mode: taskMode,
          job_id: jobId,
          job_status: status,
        },
      ];
    });
  }

  async standing(taskId: string): Promise<TaskStanding | null> {
    const row = await this.#taskRow(taskId);
    if (!row) return null;
    return {
      jobId: row.jobId,
      domainId: row.domainId,
      attempts: row.attempts + row.nodeFaults + row.drains,
      leasedAt: isoTimeOrNull(row.leasedAt),
      final: isFinal(row.state),
      ahead: row.state === 'ready' ? await this.#ahead(row) : null,
    };
  }

  /** Ready tasks before this one, in its own queue and in those that nodes of this queue take from as well. */
  async #ahead(task: Task): Promise<{ higherPriority: number; older: number }> {
    const [ready, nodes] = await Promise.all([
      this.#database.rows<{ queueId: number }>(READY_QUEUES, []),
      this.#database.rows<StoredNode>(ALL_NODES, []),
    ]);
    const ids = ready.map(({ queueId }) => queueId);
    await this.#queues.load([...ids, task.queueId]);
    const own = this.#queues.get(task.queueId);
    const able = nodes.map(nodeOf).filter((node) => match(own, node) !== 'never');
    const queueIds = new Set([task.queueId]);
    for (const id of ids) {
      const queue = this.#queues.get(id);
      if (able.some((node) => match(queue, node) !== 'never')) queueIds.add(id);
    }
    const [row] = await this.#database.rows<{ higher: number; older: number }>(AHEAD, [
      [...queueIds],
      -task.priority,
      task.jobSeq,
      task.no,
    ]);
    return { higherPriority: row?.higher ?? 0, older: row?.older ?? 0 };
  }

  async queues(): Promise<QueueStanding[]> {
    type Row = Record<'queueId' | 'ready' | 'blocked' | 'delayed' | 'held', number> & {
      readonly age: number | null;
    };
    const rows = await this.#database.rows<Row>(QUEUES, [this.#database.given]);
    await this.#queues.load(rows.map(({ queueId }) => queueId));
    return rows.map(({ queueId, ready, blocked, delayed, held, age }) => {
      const { capability, filters, mode, organizationId } = this.#queues.get(queueId);
      const oldestReadyAgeMs = age === null ? null : Math.max(0, age);
      return { capability, filters, mode, organizationId, ready, blocked, delayed, held, oldestReadyAgeMs };
    });
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

  async #taskRow(id: string) {
    const [row] = await this.#database.rows<
      Task & {
        readonly progress: string | null;
        readonly events: string | null;
        readonly deps: number | null;
        readonly jobId: string;
        readonly domainId: string;
        readonly organizationId: string | null;
        readonly createdAt: number;
        readonly outputs: string | null;
      }
    >(TASK, [id]);
    return row;
  }
}
