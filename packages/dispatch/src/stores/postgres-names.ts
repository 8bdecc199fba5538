/**
 * Which task an id means. A task's id is made from its job's (`ids.ts`), so knowing a few jobs is knowing all of their tasks;
 * jobs from before that have their tasks' ids in a table. What was read stays true: ids never change, and nobody is given
 * the number of a job that was deleted.
 */
import { prefixOf, taskId, taskIdsOf, taskIndex } from './ids.ts';
import type { TaskIds } from './ids.ts';
import { sql } from './postgres-database.ts';
import type { Database } from './postgres-database.ts';
import type { Place } from './postgres-rows.ts';

/** Jobs that are kept in memory. */
const KEPT_JOBS = 16_384;

const JOBS = sql(`
  SELECT j.seq, j.id, j.task_count AS "taskCount" FROM unnest($1::text[]) AS u (prefix)
  CROSS JOIN LATERAL (SELECT * FROM jobs WHERE id >= u.prefix || '00000000' AND id <= u.prefix || 'ffffffff') AS j
  WHERE NOT j.own_task_ids`);
const KEPT_IDS = sql('SELECT id, job_seq AS "jobSeq", no FROM task_ids WHERE id = ANY($1::text[])');
const ANY_KEPT = sql('SELECT 1 FROM task_ids LIMIT 1');

interface KnownJob {
  readonly seq: number;
  readonly ids: TaskIds;
  readonly taskCount: number;
}

export class Names {
  readonly #database: Database;
  /** By what the ids of their tasks begin with, the first known first. */
  readonly #jobs = new Map<string, KnownJob>();
  /** Whether any job has ids that are kept. None gets them any more. */
  #anyKept: boolean | null = null;

  constructor(database: Database) {
    this.#database = database;
  }

  /** A job whose tasks' ids are made from its own. */
  learn(seq: number, jobId: string, taskCount: number): void {
    const ids = taskIdsOf(jobId);
    this.#jobs.set(ids.prefix, { seq, ids, taskCount });
    if (this.#jobs.size <= KEPT_JOBS) return;
    const [oldest] = this.#jobs.keys();
    if (oldest !== undefined) this.#jobs.delete(oldest);
  }

  /** Those of these ids that mean tasks. */
  async find(taskIds: Iterable<string>): Promise<ReadonlyMap<string, Place>> {
    const places = new Map<string, Place>();
    const unknown = new Set<string>();
    for (const id of taskIds) {
      const place = this.#placeOf(id);
      if (place) places.set(id, place);
      else if (!id.includes('\0')) unknown.add(id);
    }
    if (unknown.size === 0) return places;
    const prefixes = [...new Set([...unknown].map(prefixOf))];
    const jobs = this.#database.rows<{ seq: number; id: string; taskCount: number }>(JOBS, [prefixes]);
    for (const { seq, id, taskCount } of await jobs) this.learn(seq, id, taskCount);
    for (const id of unknown) {
      const place = this.#placeOf(id);
      if (!place) continue;
      places.set(id, place);
      unknown.delete(id);
    }
    this.#anyKept ??= (await this.#database.rows(ANY_KEPT, [])).length > 0;
    if (unknown.size > 0 && this.#anyKept) {
      const kept = await this.#database.rows<Place & { readonly id: string }>(KEPT_IDS, [[...unknown]]);
      for (const { id, jobSeq, no } of kept) places.set(id, { jobSeq, no });
    }
    return places;
  }

  #placeOf(id: string): Place | undefined {
    const job = this.#jobs.get(prefixOf(id));
    if (!job) return undefined;
    const no = taskIndex(job.ids, id);
    // Only as it is written: another spelling of the number is another id.
    return no < job.taskCount && taskId(job.ids, no) === id ? { jobSeq: job.seq, no } : undefined;
  }
}
