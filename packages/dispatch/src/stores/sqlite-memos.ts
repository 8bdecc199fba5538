/**
 * Results that are given again (`memo.ts` has the rules): which unfinished jobs ask for that, and what was completed under
 * which key. Synchronous; the caller brings the transaction.
 *
 * A memo names the data items of its result and their digests, and holds as long as those are as they were: then the bytes
 * are there, and named by the copies before anything could collect them.
 */
import type { Json } from '@millrace/runner';
import { memoCode, memoKey, memoReport, memoTarget, reportedArtifacts } from '../memo.ts';
import type { ReportedArtifact } from '../memo.ts';
import type { DataRecord } from '../records.ts';
import type { Database, Statement } from './sqlite-database.ts';
import type { Attempt } from './sqlite-receipts.ts';
import type { Ledger } from './sqlite-ledger.ts';
import type { Job, Task } from './sqlite-model.ts';

/** The data items of the store, as far as memos need them. */
export interface MemoItems {
  get(domainId: string, id: string): DataRecord | null;
  /** Adds items over bytes that other items name already, made under this job. False: a name is taken; nothing was added. */
  copy(
    jobId: string,
    items: readonly Pick<DataRecord, 'id' | 'domain_id' | 'name' | 'data_type' | 'digest' | 'size'>[],
  ): boolean;
}

/** How a task ends that was done before. `outputs` and `meta` are JSON. */
export interface Recalled {
  /** Who did it. */
  readonly nodeId: string;
  readonly outputs: string;
  readonly meta: string;
  readonly from: { readonly taskId: string; readonly jobId: string };
}

type MemoOutput = readonly [id: string, digest: string];

export class Memos {
  readonly #items: MemoItems;
  readonly #jobs = new Set<number>();
  readonly #selectJobs: Statement;
  readonly #insertJob: Statement;
  readonly #deleteJob: Statement;
  readonly #select: Statement;
  readonly #upsert: Statement;
  readonly #delete: Statement;
  readonly #deleteOfTasks: Statement;

  constructor(database: Database, items: MemoItems) {
    this.#items = items;
    const sql = (text: string): Statement => database.prepare(text);
    this.#selectJobs = sql('SELECT job_seq FROM memo_jobs');
    this.#insertJob = sql('INSERT INTO memo_jobs (job_seq) VALUES (?)');
    this.#deleteJob = sql('DELETE FROM memo_jobs WHERE job_seq = ?');
    this.#select = sql('SELECT task_seq, outputs FROM memos WHERE key = ?');
    this.#upsert = sql(`
      INSERT INTO memos (key, task_seq, outputs) VALUES (?, ?, ?)
      ON CONFLICT DO UPDATE SET task_seq = excluded.task_seq, outputs = excluded.outputs`);
    this.#delete = sql('DELETE FROM memos WHERE key = ?');
    this.#deleteOfTasks = sql('DELETE FROM memos WHERE task_seq BETWEEN ? AND ?');
  }

  load(): void {
    this.#jobs.clear();
    for (const [seq] of this.#selectJobs.all()) this.#jobs.add(seq as number);
  }

  /** A new job that asks for it. */
  addJob(job: Job): void {
    this.#insertJob.run(job.seq);
    this.#jobs.add(job.seq);
  }

  /** Whether the job asks for it and has not ended. */
  has(job: Job): boolean {
    return this.#jobs.has(job.seq);
  }

  /** The job has ended. */
  ended(job: Job): void {
    if (!this.#jobs.delete(job.seq)) return;
    this.#deleteJob.run(job.seq);
  }

  /** The job goes, and what would lead to it. */
  forget(job: Job): void {
    this.ended(job);
    this.#deleteOfTasks.run(job.firstTask, job.firstTask + job.taskCount - 1);
  }

  /**
   * Keeps a completion, if it is of the kind that can be given again: the task takes part, nobody changed its inputs since it
   * was leased, and all it made are items under names of its own.
   */
  record(ledger: Ledger, job: Job, task: Task, outputs: readonly string[], meta: Json): void {
    const key = this.#keyOf(ledger, job, task, task.leasedAt ?? 0);
    if (key === null) return;
    const artifacts = reportedArtifacts(meta);
    const made = new Map<string, ReportedArtifact>();
    for (const artifact of artifacts ?? []) if (artifact.id !== null) made.set(artifact.id, artifact);
    if (artifacts === null || made.size !== artifacts.length || made.size !== outputs.length) return;
    const kept: MemoOutput[] = [];
    for (const id of outputs) {
      const item = this.#items.get(job.domainId, id);
      const artifact = made.get(id);
      if (item === null || artifact === undefined || item.name !== artifact.name) return;
      if (!item.name.endsWith(`_${task.id}`)) return;
      kept.push([id, item.digest]);
    }
    this.#upsert.run(key, task.seq, JSON.stringify(kept));
  }

  /** The result of an equal task for this one, its items copied; null: it has to be done. */
  recall(ledger: Ledger, job: Job, task: Task): Recalled | null {
    const key = this.#keyOf(ledger, job, task, Infinity);
    const row = key === null ? undefined : this.#select.get(key);
    if (key === null || row === undefined) return null;
    const recalled = this.#recall(ledger, job, task, key, row[0] as number, row[1] as string);
    // What it named is gone or has changed: so it will be for everyone.
    if (recalled === null) this.#delete.run(key);
    return recalled;
  }

  #recall(ledger: Ledger, job: Job, task: Task, key: string, seq: number, outputs: string): Recalled | null {
    const before = ledger.taskBySeq(seq);
    const from = ledger.job(before.jobSeq);
    const completion = completionOf(ledger, from, before);
    const artifacts = completion === null ? null : reportedArtifacts(completion.meta);
    if (completion === null || artifacts === null) return null;
    const items = new Map<string, DataRecord>();
    for (const [id, digest] of JSON.parse(outputs) as MemoOutput[]) {
      const item = this.#items.get(job.domainId, id);
      if (item?.digest !== digest) return null;
      items.set(id, item);
    }
    const copies: DataRecord[] = [];
    const reported: ReportedArtifact[] = [];
    for (const artifact of artifacts) {
      const item = items.get(artifact.id ?? '');
      if (item === undefined) return null;
      const { logicalPath, name } = memoTarget(
        artifact,
        { taskId: before.id, prefix: before.spec.outputsPrefix },
        { taskId: task.id, prefix: task.spec.outputsPrefix },
      );
      const id = ledger.options.newId();
      copies.push({ ...item, id, name });
      reported.push({ logical_path: logicalPath, name, data_type: item.data_type, id });
    }
    if (!this.#items.copy(job.id, copies)) return null;
    const ids = new Map(artifacts.map((artifact, index) => [artifact.id, copies[index]?.id]));
    const link = { taskId: before.id, jobId: from.id };
    return {
      nodeId: completion.nodeId,
      outputs: JSON.stringify(completion.outputs.map((id) => ids.get(id) ?? id)),
      meta: JSON.stringify(
        memoReport(completion.meta, { id: task.id, jobId: job.id }, { ...link, key }, reported),
      ),
      from: link,
    };
  }

  /** Null when the task does not take part, or an input is none of the domain's items, or was changed after `sinceMs`. */
  #keyOf(ledger: Ledger, job: Job, { spec }: Task, sinceMs: number): string | null {
    const code = memoCode(spec.meta);
    if (code === null) return null;
    const inputs: string[] = [];
    for (const id of spec.inputs) {
      const item = this.#items.get(job.domainId, id);
      if (item === null || Date.parse(item.updated_at) > sinceMs) return null;
      inputs.push(item.digest);
    }
    const { capability, mode, filters } = ledger.queues.get(spec.queueId);
    return memoKey(code, { domainId: job.domainId, capability, mode, filters, meta: spec.meta, inputs });
  }
}

function completionOf(ledger: Ledger, job: Job, task: Task): Attempt | null {
  for (const attempt of ledger.receipts.ofTask(job, task)) {
    if (attempt.outcome === 'completed') return attempt;
  }
  return null;
}
