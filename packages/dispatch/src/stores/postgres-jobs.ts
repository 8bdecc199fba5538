/** Submitting, cancelling and deleting jobs in PostgreSQL. */
import { createHash } from 'node:crypto';
import { MillraceError } from '@millrace/runner';
import { isStageReference } from '../job-spec.ts';
import { isFinal } from '../lifecycle.ts';
import type { JobRecord, JobSpec, TaskSubmission } from '../records.ts';
import type { NewJob, Outcome, PruneQuery, StoreChange } from '../store.ts';
import { EventBuffer } from './job-events.ts';
import { arrayText, sql } from './postgres-database.ts';
import type { Database, Transaction } from './postgres-database.ts';
import { countIn, show } from './postgres-limits.ts';
import type { NewKeyed } from './postgres-limits.ts';
import { BLOCK, blockOf, columns, jobRecord, lineText, storable } from './postgres-rows.ts';
import type { Job, JobText } from './postgres-rows.ts';
import { INSERT_EVENTS, Unit, inUnit } from './postgres-unit.ts';
import type { WorkSettings } from './postgres-unit.ts';
import { isoTime } from './time.ts';

type Submitted = { readonly jobId: string; readonly created: boolean };

const JOB_NUMBERS = sql("SELECT nextval('job_numbers') AS seq FROM generate_series(1, $1::integer)");
const KNOWN_SUBMISSIONS = sql(`
  SELECT s.submitter, s.key, s.spec_hash AS "specHash", j.id FROM unnest($1::text[], $2::text[]) AS u (submitter, key)
  JOIN submissions s ON s.submitter = u.submitter AND s.key = u.key JOIN jobs j ON j.seq = s.job_seq`);
// Sorted, so that two dispatchers that wait for each other's keys wait in one order.
const CLAIM_SUBMISSIONS = sql(`
  INSERT INTO submissions (submitter, key, spec_hash, job_seq)
  SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[]) AS u (submitter, key) ORDER BY u.submitter, u.key
  ON CONFLICT (submitter, key) DO NOTHING RETURNING job_seq AS "jobSeq"`);
const INSERT_JOBS = sql(`
  INSERT INTO jobs (seq, id, domain_id, organization_id, priority, created_at, deadline_at, task_count, cache, status, updated_at,
    last_event, queued, leased, running, completed, failed, canceled, traceparent)
  SELECT u.seq, u.id, u.domain_id, u.organization_id, u.priority, $9::bigint, u.deadline_at, u.task_count, u.cache, 'pending', $9,
    u.last_event, u.task_count, 0, 0, 0, 0, 0, u.traceparent
  FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[], $7::integer[], $8::bigint[],
    $10::boolean[], $11::text[])
    AS u (seq, id, domain_id, organization_id, priority, deadline_at, task_count, last_event, cache, traceparent)`);
const INSERT_JOB_SPECS = sql(`
  INSERT INTO job_specs (job_seq, capabilities, spec)
  SELECT u.job_seq, u.capabilities::text[], u.spec FROM unnest($1::bigint[], $2::text[], $3::text[])
    AS u (job_seq, capabilities, spec)`);
const INSERT_BLOCKS = sql(`
  INSERT INTO task_blocks (job_seq, block, body) SELECT * FROM unnest($1::bigint[], $2::integer[], $3::text[])`);
const INSERT_SPECS = sql(`
  INSERT INTO task_specs (job_seq, no, spec) SELECT * FROM unnest($1::bigint[], $2::integer[], $3::text[])`);
const INSERT_RANGES = sql(`
  INSERT INTO fresh (lane_id, rank, job_seq, first_no, last_no, since)
  SELECT u.*, $6::bigint FROM unnest($1::integer[], $2::bigint[], $3::bigint[], $4::integer[], $5::integer[]) AS u`);
const OPEN_NEW_TASKS = sql(`
  INSERT INTO open_tasks (job_seq, no, lane_id, rank, deadline_at, state, wake_at, attempts, node_faults, drains, updated_at,
    not_before, stage, max_attempts, key_id, key_limit, parked)
  SELECT u.job_seq, u.no, u.lane_id, u.rank, u.deadline_at, u.state,
    CASE WHEN u.state = 'delayed' THEN least(u.not_before, u.deadline_at) ELSE u.deadline_at END, 0, 0, 0, $10::bigint,
    CASE WHEN u.state <> 'ready' THEN u.not_before END, u.stage, u.max_attempts, u.key_id,
    u.key_limit, u.state = 'ready' AND u.key_id IS NOT NULL
  FROM unnest($1::bigint[], $2::integer[], $3::integer[], $4::bigint[], $5::bigint[], $6::text[], $7::bigint[], $8::integer[],
    $9::integer[], $11::bigint[], $12::integer[])
    AS u (job_seq, no, lane_id, rank, deadline_at, state, not_before, stage, max_attempts, key_id, key_limit)`);
const INSERT_STAGES = sql(`
  INSERT INTO stages (job_seq, stage, name, first_task, last_task, remaining, deps_remaining)
  SELECT * FROM unnest($1::bigint[], $2::integer[], $3::text[], $4::integer[], $5::integer[], $6::integer[], $7::integer[])`);
const INSERT_EDGES = sql(`
  INSERT INTO stage_edges (job_seq, from_stage, to_stage) SELECT * FROM unnest($1::bigint[], $2::integer[], $3::integer[])`);

const INSERT_REDRIVE = sql('INSERT INTO redrives (source_id, job_seq) VALUES ($1, $2)');

const JOB_NUMBER = sql('SELECT seq FROM jobs WHERE id = $1');
const JOB_TEXT = sql('SELECT spec FROM job_specs WHERE job_seq = $1');
const DELETE_PARTS = [
  'task_log_chunks',
  'task_logs',
  'task_reports',
  'memos',
  'attempts',
  'events',
  'open_tasks',
  'fresh',
  'ended_runs',
  'task_blocks',
  'task_specs',
  'task_ids',
  'stage_edges',
  'stages',
  'submissions',
  'job_specs',
  'redrives',
].map((table) => sql(`DELETE FROM ${table} WHERE job_seq = $1`));
const DELETE_JOB = sql('DELETE FROM jobs WHERE seq = $1');

/** Rows in one statement: the arrays of a job of many tasks are large texts. */
const TASKS_PER_STATEMENT = 2000;
const BLOCKS_PER_STATEMENT = 64;

/** Specs of more characters are kept by themselves, so that taking one task of a block is not reading all of a long one. */
const MAX_LINE = 512;

/** A job to be written, with what was decided before its transaction. */
interface Draft {
  readonly index: number;
  readonly job: NewJob;
  readonly id: string;
  readonly queueIds: readonly number[];
  readonly laneIds: readonly number[];
  readonly specHash: string;
}

export interface Answers<T> {
  readonly outcomes: Outcome<T>[];
  readonly changes: readonly StoreChange[];
}

export async function submitJobs(
  database: Database,
  settings: WorkSettings,
  jobs: readonly NewJob[],
): Promise<Answers<Submitted>> {
  const outcomes: (Outcome<Submitted> | undefined)[] = jobs.map(({ idempotencyKey: key }) =>
    key === null || /^[\x21-\x7e]{1,128}$/.test(key) ? undefined : { ok: false, error: badKey(key) },
  );
  const drafts = await draftJobs(settings, jobs, (index) => outcomes[index] === undefined);
  if (drafts.length === 0) return { outcomes: outcomes as Outcome<Submitted>[], changes: [] };
  const { changes, answers, made } = await database.transaction('lane', async (transaction) => {
    const answers = new Map<number, Outcome<Submitted>>();
    const keyed = drafts.filter(({ job }) => job.idempotencyKey !== null);
    const [numbers, known] = await Promise.all([
      transaction.rows<{ seq: number }>(JOB_NUMBERS, [drafts.length]),
      keyed.length === 0
        ? []
        : transaction.rows<{ submitter: string; key: string; specHash: string; id: string }>(
            KNOWN_SUBMISSIONS,
            keysOf(keyed),
          ),
    ]);
    const taken = new Map(
      known.map(({ submitter, key, specHash, id }) => [JSON.stringify([submitter, key]), { specHash, id }]),
    );
    const fresh: (Draft & { readonly seq: number })[] = [];
    drafts.forEach((draft, at) => {
      const { idempotencyKey: key, submitter } = draft.job;
      const name = JSON.stringify([storable(submitter), key]);
      const earlier = key === null ? undefined : taken.get(name);
      if (earlier) answers.set(draft.index, repeatedAnswer(draft, earlier));
      else {
        if (key !== null) taken.set(name, draft);
        fresh.push({ ...draft, seq: numbers[at]?.seq ?? 0 });
        answers.set(draft.index, { ok: true, value: { jobId: draft.id, created: true } });
      }
    });
    const claims = fresh.filter(({ job }) => job.idempotencyKey !== null);
    if (claims.length > 0) {
      const claimed = await transaction.change(CLAIM_SUBMISSIONS, [
        ...keysOf(claims),
        claims.map(({ specHash }) => specHash),
        claims.map(({ seq }) => seq),
      ]);
      // Another dispatcher committed one of the keys since they were looked up: look again.
      if (claimed.length < claims.length) return { changes: null, answers, made: [] };
    }
    if (fresh.length > 0) await writeJobs(transaction, fresh);
    const caching = fresh.filter(({ job }) => job.spec.cache === true).map(({ seq }) => seq);
    if (caching.length > 0) {
      // Their rows are this transaction's own: nobody else can have them locked.
      const unit = new Unit(transaction, settings, new Set());
      await unit.lockJobs(caching);
      await unit.recallJobs(caching);
      await unit.flush();
    }
    return { changes: changesOf(fresh), answers, made: fresh };
  });
  if (changes === null) return await submitJobs(database, settings, jobs);
  for (const { seq, id, job } of made) settings.names.learn(seq, id, job.spec.tasks.length);
  return {
    outcomes: outcomes.map(
      (outcome, index) =>
        outcome ??
        answers.get(index) ?? {
          ok: false,
          error: new MillraceError('internal', 'a submission got no answer'),
        },
    ),
    changes,
  };
}

async function draftJobs(
  settings: WorkSettings,
  jobs: readonly NewJob[],
  wanted: (index: number) => boolean,
): Promise<Draft[]> {
  const chosen = jobs.flatMap((job, index) => (wanted(index) ? [{ job, index }] : []));
  const demands = chosen.flatMap(({ job: { spec, organizationId } }) =>
    spec.tasks.map((task) => ({
      capability: task.capability,
      filters: task.capability_filters,
      mode: task.mode,
      organizationId,
      resources: task.resources ?? null,
    })),
  );
  const queueIds = await settings.queues.idsFor(demands);
  const domains = chosen.flatMap(({ job: { spec } }) => spec.tasks.map(() => spec.domain_id));
  const laneIds = await settings.queues.lanesFor(
    queueIds.map((queueId, index) => ({ queueId, domainId: domains[index] ?? '' })),
  );
  let at = 0;
  return chosen.map(({ job, index }) => {
    const { tasks } = job.spec;
    at += tasks.length;
    return {
      index,
      job,
      id: settings.newId(),
      queueIds: queueIds.slice(at - tasks.length, at),
      laneIds: laneIds.slice(at - tasks.length, at),
      specHash:
        job.idempotencyKey === null
          ? ''
          : createHash('sha256').update(JSON.stringify(job.spec)).digest('hex'),
    };
  });
}

function keysOf(drafts: readonly Draft[]): string[][] {
  return columns<Draft, string>(
    drafts,
    ({ job }) => storable(job.submitter),
    ({ job }) => job.idempotencyKey ?? '',
  );
}

function badKey(key: string): MillraceError {
  return new MillraceError(
    'invalid_argument',
    `the idempotency key must be 1 to 128 visible ASCII characters, got ${JSON.stringify(key.slice(0, 130))}`,
  );
}

function repeatedAnswer(
  { job, specHash }: Draft,
  earlier: { readonly specHash: string; readonly id: string },
): Outcome<Submitted> {
  if (earlier.specHash === specHash) return { ok: true, value: { jobId: earlier.id, created: false } };
  return {
    ok: false,
    error: new MillraceError(
      'already_exists',
      `idempotency key ${JSON.stringify(job.idempotencyKey)} was used for job ${earlier.id} with another spec; use a new key for a new job`,
      { details: { job_id: earlier.id } },
    ),
  };
}

function changesOf(fresh: readonly Draft[]): StoreChange[] {
  const changes: StoreChange[] = fresh.map(({ id }) => ({ kind: 'job', jobId: id }));
  // A graph without cycles has a first stage: something of every job is runnable.
  if (fresh.length > 0) changes.push({ kind: 'runnable' });
  return changes;
}

/** Sends the rows of new jobs. */
async function writeJobs(
  transaction: Transaction,
  drafts: readonly (Draft & { readonly seq: number })[],
): Promise<void> {
  const { now } = transaction;
  const jobs: (string | number | null)[][] = [];
  const texts: (string | number)[][] = [];
  const tasks = new NewTasks(now);
  const stages: (string | number)[][] = [];
  const edges: number[][] = [];
  const events: (string | number)[][] = [];
  for (const draft of drafts) {
    const { job, id, seq } = draft;
    const { spec, organizationId, traceparent = null } = job;
    const graph = stagesOf(spec);
    const runnable = tasks.add(draft, graph);
    const lastEvent = 1 + runnable.length;
    const buffer = new EventBuffer();
    buffer.add(now, 'job.submitted', null, `{"tasks":${spec.tasks.length}}`);
    for (const no of runnable) buffer.add(now, 'task.runnable', no, '');
    for (const row of buffer.take(lastEvent)) events.push([seq, row.lastSeq, row.count, row.at, row.body]);
    for (const [name, { no, first, last, count, deps }] of graph) {
      stages.push([seq, no, storable(name), first, last, count, deps]);
    }
    for (const { from, to } of spec.edges)
      edges.push([seq, graph.get(from)?.no ?? 0, graph.get(to)?.no ?? 0]);
    jobs.push([
      seq,
      id,
      spec.domain_id,
      organizationId,
      spec.priority,
      timeOf(spec.deadline_at),
      spec.tasks.length,
      lastEvent,
    ]);
    transaction.totals.jobs.pending += 1;
    transaction.totals.tasks.queued += spec.tasks.length;
    const text: JobText = {
      label: spec.label,
      meta: spec.meta,
      edges: spec.edges,
      ...(traceparent !== null && { traceparent }),
      ...(spec.not_before !== undefined && { not_before: spec.not_before }),
      ...(spec.redrive_of !== undefined && { redrive_of: spec.redrive_of }),
    };
    if (spec.redrive_of !== undefined) transaction.send(INSERT_REDRIVE, [spec.redrive_of, seq]);
    const capabilities = [...new Set(spec.tasks.map(({ capability }) => capability))];
    texts.push([seq, arrayText(capabilities), JSON.stringify(text)]);
  }
  transaction.send(INSERT_JOBS, [
    ...transposed(jobs, 8),
    now,
    drafts.map(({ job }) => String(job.spec.cache === true)),
    drafts.map(({ job: { traceparent } }) => traceparent ?? null),
  ]);
  transaction.send(INSERT_JOB_SPECS, transposed(texts, 3));
  await tasks.send(transaction);
  transaction.send(INSERT_EVENTS, transposed(events, 5));
  if (stages.length > 0) transaction.send(INSERT_STAGES, transposed(stages, 7));
  if (edges.length > 0) transaction.send(INSERT_EDGES, transposed(edges, 3));
}

/** The rows of new tasks: blocks of what was submitted, ranges of what is ready, and a row of its own for what has to wait. */
class NewTasks {
  readonly #now: number;
  readonly #blocks: (string | number)[][] = [];
  readonly #specs: (string | number)[][] = [];
  readonly #ranges: [lane: number, rank: number, jobSeq: number, first: number, last: number][] = [];
  readonly #open: (string | number | null)[][] = [];
  /** Those of {@link #open} with a limit. */
  readonly #keyed: (NewKeyed & { readonly row: number })[] = [];

  constructor(now: number) {
    this.#now = now;
  }

  /** Those that a node may take at once, by position. */
  add(
    { job: { spec }, seq, queueIds, laneIds }: Draft & { readonly seq: number },
    graph: ReadonlyMap<string, NewStage>,
  ): number[] {
    const jobDeadline = timeOf(spec.deadline_at);
    const jobNotBefore = timeOf(spec.not_before ?? null);
    const runnable: number[] = [];
    let lines: string[] = [];
    spec.tasks.forEach((task, no) => {
      const stage = graph.get(task.stage);
      const notBefore = later(jobNotBefore, timeOf(task.not_before ?? null));
      const deadlineAt = earlier(jobDeadline, timeOf(task.deadline_at));
      const state =
        (stage?.deps ?? 0) > 0
          ? 'blocked'
          : notBefore !== null && notBefore > this.#now
            ? 'delayed'
            : 'ready';
      if (state === 'ready') runnable.push(no);
      const text = lineText({
        id: null,
        stageNo: stage?.no ?? 0,
        queueId: queueIds[no] ?? 0,
        priority: task.priority,
        maxAttempts: task.max_attempts,
        deadlineAt,
        label: task.label,
        stage: task.stage,
        inputs_cids: task.inputs_cids,
        outputs_prefix: task.outputs_prefix,
        meta: task.meta,
        ...(notBefore !== null && { not_before: isoTime(notBefore) }),
        ...(task.concurrency && { concurrency: task.concurrency }),
      });
      if (text.length <= MAX_LINE && !task.inputs_cids.some(isStageReference)) lines.push(text);
      else {
        lines.push('');
        this.#specs.push([seq, no, text]);
      }
      if (lines.length === BLOCK || no === spec.tasks.length - 1) {
        this.#blocks.push([seq, blockOf(no), lines.join('\n')]);
        lines = [];
      }
      const lane = laneIds[no] ?? 0;
      const rank = -task.priority;
      if (state !== 'ready' || deadlineAt !== null || spec.cache === true || task.concurrency) {
        if (task.concurrency) {
          const { key, limit } = task.concurrency;
          const row = this.#open.length;
          this.#keyed.push({ domainId: spec.domain_id, key, limit, laneId: lane, row });
        }
        const own = [seq, no, lane, rank, deadlineAt, state, notBefore];
        this.#open.push([...own, stage?.no ?? 0, task.max_attempts]);
        return;
      }
      const last = this.#ranges.at(-1);
      const goesOn = last?.[0] === lane && last[1] === rank && last[2] === seq && last[4] === no - 1;
      if (last && goesOn && no % BLOCK !== 0) last[4] = no;
      else this.#ranges.push([lane, rank, seq, no, no]);
    });
    return runnable;
  }

  async send(transaction: Transaction): Promise<void> {
    const { ids, keys } = await countIn(transaction, this.#keyed);
    const keyed = new Map(
      this.#keyed.map(({ row, limit }, index) => [row, [ids[index] ?? 0, limit] as const]),
    );
    const open = this.#open.map((task, row) => [...task, ...(keyed.get(row) ?? [null, null])]);
    const parts = (rows: readonly (string | number | null)[][], count: number) =>
      Array.from({ length: Math.ceil(rows.length / count) }, (_, at) =>
        rows.slice(at * count, (at + 1) * count),
      );
    for (const part of parts(this.#blocks, BLOCKS_PER_STATEMENT)) {
      transaction.send(INSERT_BLOCKS, transposed(part, 3));
    }
    for (const part of parts(this.#specs, TASKS_PER_STATEMENT)) {
      transaction.send(INSERT_SPECS, transposed(part, 3));
    }
    for (const part of parts(this.#ranges, TASKS_PER_STATEMENT)) {
      transaction.send(INSERT_RANGES, [...transposed(part, 5), this.#now]);
    }
    for (const part of parts(open, TASKS_PER_STATEMENT)) {
      const values = transposed(part, 11);
      transaction.send(OPEN_NEW_TASKS, [...values.slice(0, 9), this.#now, ...values.slice(9)]);
    }
    await show(transaction, keys);
  }
}

interface NewStage {
  readonly no: number;
  first: number;
  last: number;
  count: number;
  /** Preceding stages. */
  deps: number;
}

/** The stages that edges name, by name. */
function stagesOf({ tasks, edges }: JobSpec): Map<string, NewStage> {
  const stages = new Map<string, NewStage>();
  if (edges.length === 0) return stages;
  for (const { from, to } of edges) {
    for (const name of [from, to]) {
      if (!stages.has(name)) {
        stages.set(name, { no: stages.size + 1, first: tasks.length, last: -1, count: 0, deps: 0 });
      }
    }
    const after = stages.get(to);
    if (after) after.deps += 1;
  }
  tasks.forEach((task: TaskSubmission, no) => {
    const stage = stages.get(task.stage);
    if (!stage) return;
    stage.first = Math.min(stage.first, no);
    stage.last = no;
    stage.count += 1;
  });
  return stages;
}

function transposed<V>(rows: readonly (readonly V[])[], width: number): V[][] {
  return Array.from({ length: width }, (_, column) => rows.map((row) => row[column] as V));
}

function timeOf(text: string | null): number | null {
  return text === null ? null : Date.parse(text);
}

function earlier(a: number | null, b: number | null): number | null {
  return a === null || b === null ? (a ?? b) : Math.min(a, b);
}

function later(a: number | null, b: number | null): number | null {
  return a === null || b === null ? (a ?? b) : Math.max(a, b);
}

/** Null: unknown job. */
export async function cancelJob(
  database: Database,
  settings: WorkSettings,
  id: string,
): Promise<{ readonly value: JobRecord | null; readonly changes: readonly StoreChange[] }> {
  return await onJob(database, settings, id, async (unit, job) => {
    const text = unit.transaction.rows<{ spec: string }>(JOB_TEXT, [job.seq]);
    await unit.cancelJob(job.seq);
    const [row] = await text;
    return jobRecord(job, JSON.parse(row?.spec ?? '{}') as JobText);
  });
}

/** Null: unknown job. @throws MillraceError `failed_precondition` while a task of it is leased */
export async function deleteJob(
  database: Database,
  settings: WorkSettings,
  id: string,
): Promise<{ readonly value: true | null; readonly changes: readonly StoreChange[] }> {
  return await onJob(database, settings, id, async (unit, job) => {
    // Whoever is about to lease one of them has locked it.
    const tasks = await unit.openTasks(job.seq);
    const held = job.leased + job.running;
    if (held > 0) {
      throw new MillraceError(
        'failed_precondition',
        `job ${id} has ${held} leased task${held === 1 ? '' : 's'}; cancel it and delete it once it has ended`,
      );
    }
    for (const task of tasks) if (!isFinal(task.state)) unit.forget(task);
    removeJob(unit, job);
    return true as const;
  });
}

/** Sends what removes a locked job, no task of which is held. */
function removeJob({ transaction, changes }: Unit, job: Job): void {
  for (const statement of DELETE_PARTS) transaction.send(statement, [job.seq]);
  transaction.send(DELETE_JOB, [job.seq]);
  for (const status of ['queued', 'completed', 'failed', 'canceled'] as const) {
    transaction.totals.tasks[status] -= job[status];
  }
  transaction.totals.jobs[job.status] -= 1;
  changes.jobIds.add(job.id);
}

/** One batch of a pruning: jobs looked at; removed tasks after which it ends. */
const PRUNE_SPAN = 500;
const PRUNE_TASKS = 2000;

const JOBS_AFTER = sql(`
  SELECT seq, status, created_at AS "createdAt", updated_at AS "updatedAt", task_count AS "taskCount", millis($3) AS now
  FROM jobs WHERE seq > $1 ORDER BY seq LIMIT $2`);
/** Of these jobs, those that an unfinished job does again, directly or over others. */
const DONE_AGAIN = sql(`
  WITH RECURSIVE again (source, id, seq, status) AS (
    SELECT s.seq, j.id, j.seq, j.status FROM jobs s JOIN redrives r ON r.source_id = s.id JOIN jobs j ON j.seq = r.job_seq
    WHERE s.seq = ANY($1::bigint[])
    UNION
    SELECT a.source, j.id, j.seq, j.status FROM again a JOIN redrives r ON r.source_id = a.id JOIN jobs j ON j.seq = r.job_seq)
  SELECT DISTINCT source FROM again WHERE status IN ('pending', 'running')`);
const DELETE_ITEMS = sql('DELETE FROM data WHERE job_id = ANY($1::text[]) RETURNING id');

/** @see Store.pruneJobs */
export async function pruneJobs(
  database: Database,
  settings: WorkSettings,
  { endedForMs, artifacts }: PruneQuery,
  after: number,
): Promise<{
  readonly value: { readonly jobs: number; readonly items: number; readonly next: number | null };
  readonly changes: readonly StoreChange[];
}> {
  type Row = Pick<Job, 'seq' | 'status' | 'createdAt' | 'updatedAt' | 'taskCount'> & { readonly now: number };
  const rows = await database.rows<Row>(JOBS_AFTER, [after, PRUNE_SPAN, database.given]);
  const old: Row[] = [];
  let next = rows.length === PRUNE_SPAN ? (rows.at(-1)?.seq ?? null) : null;
  let tasks = 0;
  for (const row of rows) {
    const endedBefore = row.now - endedForMs;
    if (row.createdAt >= endedBefore) {
      next = null;
      break;
    }
    if (!isFinal(row.status) || row.updatedAt >= endedBefore) continue;
    old.push(row);
    tasks += row.taskCount;
    if (tasks < PRUNE_TASKS) continue;
    next = row.seq;
    break;
  }
  if (old.length === 0) return { value: { jobs: 0, items: 0, next }, changes: [] };
  const seqs = old.map(({ seq }) => seq);
  // A job that has ended stays so: only that it is still there has to be found out under its lock.
  const { value, changes } = await inUnit(database, settings, async (unit) => {
    await unit.lockJobs(seqs);
    const doneAgain = await unit.transaction.rows<{ source: number }>(DONE_AGAIN, [seqs]);
    const kept = new Set(doneAgain.map(({ source }) => source));
    const jobs = seqs.flatMap((seq) => (unit.knowsJob(seq) && !kept.has(seq) ? [unit.job(seq)] : []));
    for (const job of jobs) removeJob(unit, job);
    const items =
      artifacts && jobs.length > 0
        ? await unit.transaction.change(DELETE_ITEMS, [jobs.map(({ id }) => id)])
        : [];
    return { jobs: jobs.length, items: items.length };
  });
  return { value: { ...value, next }, changes };
}

async function onJob<T>(
  database: Database,
  settings: WorkSettings,
  id: string,
  work: (unit: Unit, job: Job) => Promise<T>,
): Promise<{ readonly value: T | null; readonly changes: readonly StoreChange[] }> {
  const [found] = await database.rows<{ seq: number }>(JOB_NUMBER, [id]);
  if (!found) return { value: null, changes: [] };
  return await inUnit<T | null>(database, settings, async (unit) => {
    if (unit.isWide) await unit.lockTasks(new Map(), false);
    await unit.lockJobs([found.seq]);
    // Deleted since it was looked up.
    if (!unit.knowsJob(found.seq)) return null;
    return await work(unit, unit.job(found.seq));
  });
}
