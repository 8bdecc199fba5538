/** The verbs of requestors: submitting, cancelling and deleting jobs, and reading what became of them. */
import { createHash } from 'node:crypto';
import { MillraceError } from '@millrace/runner';
import type { Json } from '@millrace/runner';
import { isFinal } from '../lifecycle.ts';
import type {
  JobDetail,
  JobEvent,
  JobRecord,
  JobSpec,
  ReceiptRecord,
  TaskRecord,
  TasksSummary,
} from '../records.ts';
import type { Resources } from '../resources.ts';
import type { DeadTasksQuery, ListJobsQuery, NewJob } from '../store.ts';
import type { Database, Statement } from './sqlite-database.ts';
import { receiptOf } from './sqlite-receipts.ts';
import type { Attempt } from './sqlite-receipts.ts';
import type { Ending } from './sqlite-ending.ts';
import { summaryOf } from './sqlite-ledger.ts';
import type { Ledger } from './sqlite-ledger.ts';
import { timeOf } from './sqlite-model.ts';
import type { Job, Spec, Stage } from './sqlite-model.ts';
import type { Queue } from './sqlite-queues.ts';
import type { Reports } from './sqlite-reports.ts';
import { isoTimeOrNull } from './time.ts';

/** One batch of a pruning: jobs looked at; removed tasks after which it ends. */
const PRUNE_SPAN = 500;
const PRUNE_TASKS = 2000;

interface Listed {
  readonly job: JobRecord;
  readonly tasks_summary: TasksSummary;
}

export class Jobs {
  readonly #ledger: Ledger;
  readonly #ending: Ending;
  readonly #reports: Reports;
  readonly #submission: Statement;
  readonly #insertSubmission: Statement;
  readonly #insertRedrive: Statement;
  readonly #redrives: Statement;

  constructor(database: Database, ledger: Ledger, ending: Ending, reports: Reports) {
    this.#ledger = ledger;
    this.#ending = ending;
    this.#reports = reports;
    this.#submission = database.prepare(
      'SELECT spec_hash, job_seq FROM submissions WHERE submitter = ? AND key = ?',
    );
    this.#insertSubmission = database.prepare(
      'INSERT INTO submissions (submitter, key, spec_hash, job_seq) VALUES (?, ?, ?, ?)',
    );
    this.#insertRedrive = database.prepare('INSERT INTO redrives (source_id, job_seq) VALUES (?, ?)');
    this.#redrives = database.prepare('SELECT job_seq FROM redrives WHERE source_id = ? ORDER BY job_seq');
  }

  /** @throws MillraceError `invalid_argument`, `already_exists` for its idempotency key */
  submit(newJob: NewJob): { readonly jobId: string; readonly created: boolean } {
    const { spec, idempotencyKey, submitter } = newJob;
    if (idempotencyKey === null) return { jobId: this.#create(newJob).id, created: true };
    if (!/^[\x21-\x7e]{1,128}$/.test(idempotencyKey)) {
      throw new MillraceError(
        'invalid_argument',
        `the idempotency key must be 1 to 128 visible ASCII characters, got ${JSON.stringify(idempotencyKey.slice(0, 130))}`,
      );
    }
    const specHash = createHash('sha256').update(JSON.stringify(spec)).digest('hex');
    const known = this.#submission.get(submitter, idempotencyKey);
    if (known) {
      const { id } = this.#ledger.job(known[1] as number);
      if (known[0] === specHash) return { jobId: id, created: false };
      throw new MillraceError(
        'already_exists',
        `idempotency key ${JSON.stringify(idempotencyKey)} was used for job ${id} with another spec; use a new key for a new job`,
        { details: { job_id: id } },
      );
    }
    const job = this.#create(newJob);
    this.#insertSubmission.run(submitter, idempotencyKey, specHash, job.seq);
    return { jobId: job.id, created: true };
  }

  #create({ spec, organizationId, traceparent = null }: NewJob): Job {
    const ledger = this.#ledger;
    const job = ledger.addJob(
      {
        domainId: spec.domain_id,
        organizationId,
        priority: spec.priority,
        deadlineAt: timeOf(spec.deadline_at),
        taskCount: spec.tasks.length,
        traceparent,
      },
      {
        label: spec.label,
        meta: spec.meta,
        edges: spec.edges,
        capabilities: [...new Set(spec.tasks.map((task) => task.capability))],
        ...(traceparent !== null && { traceparent }),
        ...(spec.cache === true && { cache: true }),
        ...(spec.not_before !== undefined && { not_before: spec.not_before }),
        ...(spec.redrive_of !== undefined && { redrive_of: spec.redrive_of }),
      },
    );
    if (spec.redrive_of !== undefined) this.#insertRedrive.run(spec.redrive_of, job.seq);
    ledger.emit(job, 'job.submitted', null, `{"tasks":${spec.tasks.length}}`);
    const stages = this.#addStages(job, spec);
    const specs = this.#specs(job, spec, stages, organizationId);
    ledger.specs.add(job.seq, job.firstTask, specs);
    if (spec.cache === true) ledger.memos.addJob(job);
    const ready: number[] = [];
    const opening = [...stages.values()];
    for (const [index, task] of specs.entries()) {
      const { stage, queueId, deadlineAt, notBefore } = task;
      const seq = job.firstTask + index;
      const blocked = stage > 0 && (opening[stage - 1]?.depsRemaining ?? 0) > 0;
      if (!blocked && notBefore !== null && notBefore > ledger.now) {
        ledger.addDelayed(job, seq, task);
        continue;
      }
      if (deadlineAt !== null) ledger.addWake(deadlineAt, seq);
      if (blocked) {
        ledger.queues.count(queueId, 'blocked', 1);
        continue;
      }
      ledger.enqueue(job, task, seq, true);
      ledger.emit(job, 'task.runnable', seq);
      if (spec.cache === true) ready.push(seq);
    }
    this.#ending.recall(job, ready);
    return job;
  }

  #specs(job: Job, spec: JobSpec, stages: ReadonlyMap<string, Stage>, organizationId: string | null): Spec[] {
    let previous: {
      readonly filters: object;
      readonly resources: Resources | undefined;
      readonly queue: Queue;
    } | null = null;
    return spec.tasks.map((task): Spec => {
      // Neighbours mostly make the same demands, and finding a queue means rendering its filters.
      if (
        previous?.queue.capability !== task.capability ||
        previous.queue.mode !== task.mode ||
        previous.resources !== task.resources ||
        !sameFilters(previous.filters, task.capability_filters)
      ) {
        previous = {
          filters: task.capability_filters,
          resources: task.resources,
          queue: this.#ledger.queues.of(task, organizationId),
        };
      }
      return {
        stage: stages.get(task.stage)?.no ?? 0,
        queueId: previous.queue.id,
        priority: task.priority,
        maxAttempts: task.max_attempts,
        deadlineAt: earlier(job.deadlineAt, timeOf(task.deadline_at)),
        notBefore: later(timeOf(spec.not_before ?? null), timeOf(task.not_before ?? null)),
        concurrency: task.concurrency ?? null,
        label: task.label,
        stageName: task.stage,
        inputs: task.inputs_cids,
        outputsPrefix: task.outputs_prefix,
        meta: task.meta,
      };
    });
  }

  /** The stages that edges name, by name. */
  #addStages(job: Job, spec: JobSpec): Map<string, Stage> {
    const stages = new Map<string, Stage>();
    if (spec.edges.length === 0) return stages;
    const sizes = new Map<string, { first: number; last: number; count: number }>();
    for (const [index, { stage }] of spec.tasks.entries()) {
      const seq = job.firstTask + index;
      const size = sizes.get(stage);
      if (size) {
        size.last = seq;
        size.count += 1;
      } else sizes.set(stage, { first: seq, last: seq, count: 1 });
    }
    const stageOf = (name: string): Stage => {
      let stage = stages.get(name);
      if (!stage) {
        const size = sizes.get(name) ?? { first: job.firstTask, last: job.firstTask - 1, count: 0 };
        stage = {
          no: stages.size + 1,
          firstTask: size.first,
          lastTask: size.last,
          remaining: size.count,
          depsRemaining: 0,
          openedAt: null,
        };
        stages.set(name, stage);
      }
      return stage;
    };
    const edges = spec.edges.map(({ from, to }) => [stageOf(from), stageOf(to)] as const);
    for (const [from, to] of edges) {
      to.depsRemaining += 1;
      this.#ledger.addEdge(job, from, to);
    }
    for (const [name, stage] of stages) this.#ledger.addStage(job, name, stage);
    return stages;
  }

  cancel(id: string): JobRecord | null {
    const ledger = this.#ledger;
    const job = ledger.jobById(id);
    if (!job) return null;
    // A job that is failing keeps that ending: the first reason wins.
    if (!isFinal(job.status) && job.cancelRequestedAt === null && job.counts.failed === 0) {
      job.cancelRequestedAt = ledger.now;
      ledger.emit(job, 'job.cancel_requested', null);
      this.#ending.endRest(job, 'canceled by the requestor');
    }
    ledger.flushRows();
    return ledger.jobRecord(job, ledger.jobText(job));
  }

  /** @throws MillraceError `failed_precondition` while a task of it is leased */
  delete(id: string): boolean {
    const job = this.#ledger.jobById(id);
    if (!job) return false;
    const held = job.counts.leased + job.counts.running;
    if (held > 0) {
      throw new MillraceError(
        'failed_precondition',
        `job ${id} has ${held} leased task${held === 1 ? '' : 's'}; cancel it and delete it once it has ended`,
      );
    }
    this.#ledger.deleteJob(job);
    return true;
  }

  get(id: string): JobDetail | null {
    const ledger = this.#ledger;
    const job = ledger.jobById(id);
    if (!job) return null;
    const attempts = ledger.receipts.ofJob(job);
    const outputs = new Map<number, readonly string[]>();
    for (const attempt of attempts) {
      if (attempt.outcome === 'completed') outputs.set(job.firstTask + attempt.index, attempt.outputs);
    }
    const reports = this.#reports.ofJob(job);
    const redrivenAs = this.#redrivesOf(job.id).map((redrive) => redrive.id);
    return {
      job: ledger.jobRecord(job, ledger.jobText(job)),
      tasks_summary: summaryOf(job),
      tasks: ledger.tasksOf(job).map((task) => {
        const deps = ledger.depsRemaining(job, task);
        const record = ledger.taskRecord(task, job, deps, outputs.get(task.seq) ?? []);
        return withReport(record, reports.get(task.seq));
      }),
      receipts: receiptsOf(job, attempts),
      ...(redrivenAs.length > 0 && { redriven_as: redrivenAs }),
    };
  }

  /** @see Store.submission */
  submission(id: string): JobSpec | null {
    const ledger = this.#ledger;
    const job = ledger.jobById(id);
    if (!job) return null;
    const { label, meta, edges, cache, not_before, redrive_of } = ledger.jobText(job);
    return {
      label,
      domain_id: job.domainId,
      priority: job.priority,
      meta,
      tasks: ledger.specs
        .between(job.firstTask, job.firstTask + job.taskCount - 1)
        .map((spec) => ledger.submission(spec)),
      edges,
      deadline_at: isoTimeOrNull(job.deadlineAt),
      ...(cache === true && { cache: true }),
      ...(not_before !== undefined && { not_before }),
      ...(redrive_of !== undefined && { redrive_of }),
    };
  }

  /**
   * Removes jobs that ended before `endedBefore`, from the one after number `after` on. `ids` are those removed; `next` is
   * the last one looked at, null when there are no more of that age.
   */
  prune(
    after: number,
    endedBefore: number,
  ): { readonly ids: readonly string[]; readonly next: number | null } {
    const ledger = this.#ledger;
    const ids: string[] = [];
    let tasks = 0;
    const looked = ledger.jobsAfter(after, PRUNE_SPAN);
    for (const { seq, status, createdAt, updatedAt } of looked) {
      if (createdAt >= endedBefore) return { ids, next: null };
      if (!isFinal(status) || updatedAt >= endedBefore) continue;
      const job = ledger.job(seq);
      if (this.#isDoneAgain(job.id)) continue;
      ledger.deleteJob(job);
      ids.push(job.id);
      tasks += job.taskCount;
      if (tasks >= PRUNE_TASKS) return { ids, next: seq };
    }
    return { ids, next: looked.length === PRUNE_SPAN ? (looked.at(-1)?.seq ?? null) : null };
  }

  #redrivesOf(id: string): Job[] {
    return this.#redrives.all(id).map(([seq]) => this.#ledger.job(seq as number));
  }

  /** Whether what the job made is, or may be, an input of a job that has not ended. */
  #isDoneAgain(id: string): boolean {
    return this.#redrivesOf(id).some((job) => !isFinal(job.status) || this.#isDoneAgain(job.id));
  }

  /**
   * One stretch of the tasks that failed: those with numbers below `before` (null: all), at most `span` jobs looked at.
   * `next` is where the following stretch begins, null at the end.
   */
  deadTasks(
    { domainId, jobId, capability }: DeadTasksQuery,
    before: number | null,
    span: number,
    limit: number,
  ): { readonly items: readonly TaskRecord[]; readonly next: number | null } {
    const ledger = this.#ledger;
    const items: TaskRecord[] = [];
    let jobs: readonly Job[];
    let bottom = 1;
    if (jobId !== null) {
      const job = ledger.jobById(jobId);
      jobs = job && (domainId === null || job.domainId === domainId) ? [job] : [];
    } else {
      const top = ledger.jobBefore(before ?? ledger.nextTask) + 1;
      bottom = Math.max(1, top - span);
      jobs = ledger.jobsFailed(top, bottom, domainId);
    }
    for (const job of jobs) {
      const failed = ledger
        .tasksOf(job)
        .filter(({ seq, state }) => state === 'failed' && (before === null || seq < before));
      const reports = failed.length > 0 ? this.#reports.ofJob(job) : null;
      for (const task of failed.toReversed()) {
        if (capability !== null && ledger.queues.get(task.spec.queueId).capability !== capability) continue;
        const record = ledger.taskRecord(task, job, ledger.depsRemaining(job, task), []);
        items.push(withReport(record, reports?.get(task.seq)));
        if (items.length === limit) return { items, next: task.seq };
      }
    }
    return { items, next: bottom > 1 ? ledger.firstTaskFrom(bottom) : null };
  }

  getTask(id: string): TaskRecord | null {
    const ledger = this.#ledger;
    const task = ledger.taskById(id);
    if (!task) return null;
    const job = ledger.job(task.jobSeq);
    let outputs: readonly string[] = [];
    if (task.state === 'completed') {
      const [newest] = ledger.receipts.ofTask(job, task);
      outputs = newest?.outputs ?? [];
    }
    const record = ledger.taskRecord(task, job, ledger.depsRemaining(job, task), outputs);
    return withReport(record, this.#reports.of(task.seq));
  }

  /**
   * One stretch of the listing: the jobs from `before` (exclusive; null: the newest) down, at most `span` of them looked
   * at. `next` is where the following stretch begins, null at the end.
   */
  list(
    query: ListJobsQuery,
    before: number | null,
    span: number,
    limit: number,
  ): { readonly items: readonly Listed[]; readonly next: number | null } {
    const top = before ?? this.#ledger.nextJob;
    const bottom = Math.max(1, top - span);
    const items: Listed[] = [];
    for (const { job, text } of this.#ledger.jobsBetween(top, bottom, query.domainId, query.status)) {
      if (!hasCapabilities(text.capabilities, query)) continue;
      items.push({ job: this.#ledger.jobRecord(job, text), tasks_summary: summaryOf(job) });
      if (items.length === limit) return { items, next: job.seq > 1 ? job.seq : null };
    }
    return { items, next: bottom > 1 ? bottom : null };
  }

  /** Events with `seq > after`, in order. Null: unknown job. */
  events(jobId: string, after: number, limit: number): JobEvent[] | null {
    const job = this.#ledger.jobById(jobId);
    return job ? this.#ledger.events.read(job, after, limit) : null;
  }
}

/** By time, at one time in the order of the tasks. */
function receiptsOf(job: Job, attempts: readonly Attempt[]): ReceiptRecord[] {
  return attempts
    .toSorted((a, b) => a.endedAt - b.endedAt || a.index - b.index)
    .map((attempt) => receiptOf(job, attempt));
}

/** The record with what heartbeats brought in its `meta`, where that can hold members. */
function withReport(
  record: TaskRecord,
  report: { readonly progress: string; readonly events: string } | undefined,
): TaskRecord {
  const { meta } = record;
  if (report === undefined) return record;
  if (meta !== null && (typeof meta !== 'object' || Array.isArray(meta))) return record;
  return {
    ...record,
    meta: {
      ...meta,
      progress: JSON.parse(report.progress) as Json,
      events: JSON.parse(report.events) as Json[],
    },
  };
}

function sameFilters(a: object, b: object): boolean {
  return a === b || (Object.keys(a).length === 0 && Object.keys(b).length === 0);
}

function hasCapabilities(capabilities: readonly string[], query: ListJobsQuery): boolean {
  if (query.capabilities.length === 0) return true;
  return query.matchAllCapabilities
    ? query.capabilities.every((capability) => capabilities.includes(capability))
    : query.capabilities.some((capability) => capabilities.includes(capability));
}

function earlier(a: number | null, b: number | null): number | null {
  return a === null || b === null ? (a ?? b) : Math.min(a, b);
}

function later(a: number | null, b: number | null): number | null {
  return a === null || b === null ? (a ?? b) : Math.max(a, b);
}
