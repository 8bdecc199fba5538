/**
 * Results that are given again (`memo.ts` has the rules), within one transaction: what was completed under which key, and the
 * copies of its data items.
 *
 * A memo names the data items of its result and their digests, and holds as long as those are as they were. They are locked
 * while they are copied, so the bytes are named by the copies before anything could collect them.
 */
import type { Json } from '@millrace/runner';
import { memoCode, memoKey, memoReport, memoTarget, reportedArtifacts } from '../memo.ts';
import type { ReportedArtifact } from '../memo.ts';
import { sql } from './postgres-database.ts';
import type { Transaction } from './postgres-database.ts';
import type { Queues } from './postgres-queues.ts';
import { columns, endedAt, endingAt, endingOf, lineOf, specAt, taskIdOf } from './postgres-rows.ts';
import type { Job, Task } from './postgres-rows.ts';

interface Item {
  readonly id: string;
  readonly domainId: string;
  readonly name: string;
  readonly dataType: string;
  readonly digest: string;
  readonly size: number;
  readonly updatedAt: number;
}

type MemoOutput = readonly [id: string, digest: string];

/** An earlier completion of equal work. */
interface Memo {
  readonly key: string;
  readonly kept: readonly MemoOutput[];
  readonly taskId: string;
  readonly jobId: string;
  readonly prefix: string | null;
  readonly nodeId: string;
  readonly outputs: readonly string[];
  readonly meta: Json;
}

type StoredMemo = Pick<Job, 'id' | 'ownTaskIds'> &
  Readonly<Record<'key' | 'kept' | 'spec' | 'ending', string>> & { readonly no: number };

function memoOf(row: StoredMemo): Memo {
  const line = lineOf(row);
  const { completion } = endingOf(row.ending, 'completed', 0);
  return {
    key: row.key,
    kept: JSON.parse(row.kept) as MemoOutput[],
    taskId: taskIdOf(row, row.no, () => line),
    jobId: row.id,
    prefix: line.outputs_prefix,
    nodeId: completion?.nodeId ?? '',
    outputs: completion?.outputs ?? [],
    meta: completion?.meta ?? null,
  };
}

/** How a task ends that was done before. `outputs` and `meta` are JSON. */
export interface Recalled {
  readonly task: Task;
  /** Who did it. */
  readonly nodeId: string;
  readonly outputs: string;
  readonly meta: string;
  readonly from: { readonly taskId: string; readonly jobId: string };
}

const ITEM_COLUMNS = `d.id, d.domain_id AS "domainId", d.name, d.data_type AS "dataType", d.digest, d.size,
  d.updated_at AS "updatedAt"`;
const ITEMS = sql(`SELECT ${ITEM_COLUMNS} FROM data d WHERE d.id = ANY($1::text[]) ORDER BY d.id FOR SHARE`);
const MEMOS = sql(`
  SELECT m.key, m.no, m.outputs AS kept, j.id, j.own_task_ids AS "ownTaskIds", ${specAt('m.job_seq', 'm.no')} AS spec,
    ${endingAt('m.no')} AS ending
  FROM memos m JOIN jobs j ON j.seq = m.job_seq JOIN ended_runs e ON ${endedAt('m.job_seq', 'm.no')}
  WHERE m.key = ANY($1::text[]) AND e.state = 'completed'`);
// Sorted, so that two dispatchers that keep the same results wait for each other in one order.
const KEEP = sql(`
  INSERT INTO memos (key, job_seq, no, outputs)
  SELECT * FROM unnest($1::text[], $2::bigint[], $3::integer[], $4::text[]) AS u (key) ORDER BY u.key
  ON CONFLICT (key) DO UPDATE SET job_seq = excluded.job_seq, no = excluded.no, outputs = excluded.outputs`);
const FORGET = sql('DELETE FROM memos WHERE key = ANY($1::text[])');
const COPY = sql(`
  INSERT INTO data (id, domain_id, name, data_type, digest, size, created_at, updated_at, job_id)
  SELECT u.id, u.domain_id, u.name, u.data_type, u.digest, u.size, $8::bigint, $8, u.job_id
  FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::text[])
    AS u (id, domain_id, name, data_type, digest, size, job_id)
  ORDER BY u.domain_id, u.name ON CONFLICT DO NOTHING RETURNING id`);
const DROP_COPIES = sql('DELETE FROM data WHERE id = ANY($1::text[])');

export interface MemoSettings {
  readonly newId: () => string;
  readonly queues: Queues;
}

interface Wanted {
  readonly task: Task;
  readonly id: string;
  readonly job: Job;
}

interface Copy {
  readonly id: string;
  readonly name: string;
  readonly jobId: string;
  readonly item: Item;
}

export class Memos {
  readonly #transaction: Transaction;
  readonly #settings: MemoSettings;
  readonly #items = new Map<string, Item>();
  readonly #looked = new Set<string>();
  readonly #fresh = new Map<string, { readonly task: Task; readonly outputs: string }>();

  constructor(transaction: Transaction, settings: MemoSettings) {
    this.#transaction = transaction;
    this.#settings = settings;
  }

  /** Locks these data items as they are and reads them. */
  async loadItems(ids: readonly string[]): Promise<void> {
    const unknown = [...new Set(ids)].filter((id) => !this.#looked.has(id) && !id.includes('\0'));
    if (unknown.length === 0) return;
    for (const id of unknown) this.#looked.add(id);
    for (const item of await this.#transaction.rows<Item>(ITEMS, [unknown])) this.#items.set(item.id, item);
  }

  /**
   * Keeps a completion, if it is of the kind that can be given again: the task takes part, nobody changed its inputs since it
   * was leased, and all it made are items under names of its own. Spec and items were loaded.
   */
  record(job: Job, task: Task, id: string, outputs: readonly string[], meta: Json): void {
    const key = this.#keyOf(job, task, task.leasedAt ?? 0);
    if (key === null) return;
    const artifacts = reportedArtifacts(meta);
    const made = new Map<string, ReportedArtifact>();
    for (const artifact of artifacts ?? []) if (artifact.id !== null) made.set(artifact.id, artifact);
    if (artifacts === null || made.size !== artifacts.length || made.size !== outputs.length) return;
    const kept: MemoOutput[] = [];
    for (const output of outputs) {
      const item = this.#itemOf(job, output);
      const artifact = made.get(output);
      if (!item || !artifact || item.name !== artifact.name || !item.name.endsWith(`_${id}`)) return;
      kept.push([output, item.digest]);
    }
    this.#fresh.set(key, { task, outputs: JSON.stringify(kept) });
  }

  /** Sends what was recorded. */
  flush(): void {
    const fresh = [...this.#fresh];
    if (fresh.length === 0) return;
    this.#fresh.clear();
    this.#transaction.send(
      KEEP,
      columns<(typeof fresh)[number], string | number>(
        fresh,
        ([key]) => key,
        ([, { task }]) => task.jobSeq,
        ([, { task }]) => task.no,
        ([, { outputs }]) => outputs,
      ),
    );
  }

  /** The results of equal tasks for those that were done before, their items copied. The rest has to be done. */
  async recall(tasks: readonly Wanted[]): Promise<Recalled[]> {
    const taking = tasks.filter(({ task }) => memoCode(lineOf(task).meta) !== null);
    if (taking.length === 0) return [];
    await Promise.all([
      this.loadItems(taking.flatMap(({ task }) => lineOf(task).inputs_cids)),
      this.#settings.queues.load(taking.map(({ task }) => lineOf(task).queueId)),
    ]);
    this.flush();
    const asked = taking.flatMap((wanted) => {
      const key = this.#keyOf(wanted.job, wanted.task, Infinity);
      return key === null ? [] : [{ ...wanted, key }];
    });
    const keys = [...new Set(asked.map(({ key }) => key))];
    const memos = new Map(
      (await this.#transaction.rows<StoredMemo>(MEMOS, [keys])).map((row) => [row.key, memoOf(row)]),
    );
    await this.loadItems([...memos.values()].flatMap(({ kept }) => kept.map(([id]) => id)));
    const plans = asked.flatMap(({ key, ...wanted }) => {
      const memo = memos.get(key);
      return memo ? [{ wanted, key, memo, copies: this.#planCopies(wanted, memo) }] : [];
    });
    const copies = plans.flatMap((plan) => plan.copies?.copies ?? []);
    const made = await this.#copy(copies);
    const stale = new Set<string>();
    const spare: string[] = [];
    const recalled: Recalled[] = [];
    for (const { wanted, key, memo, copies: planned } of plans) {
      if (planned?.copies.every(({ id }) => made.has(id))) {
        recalled.push(recalledOf(wanted, key, memo, planned));
        continue;
      }
      // What it named is gone or has changed: so it will be for everyone.
      stale.add(key);
      for (const { id } of planned?.copies ?? []) if (made.has(id)) spare.push(id);
    }
    if (stale.size > 0) this.#transaction.send(FORGET, [[...stale].toSorted()]);
    if (spare.length > 0) this.#transaction.send(DROP_COPIES, [spare]);
    return recalled;
  }

  #planCopies({ task, id: taskId, job }: Wanted, memo: Memo): Planned | null {
    const artifacts = reportedArtifacts(memo.meta);
    if (artifacts === null) return null;
    const items = new Map<string, Item>();
    for (const [id, digest] of memo.kept) {
      const item = this.#itemOf(job, id);
      if (item?.digest !== digest) return null;
      items.set(id, item);
    }
    const planned: { copies: Copy[]; reported: ReportedArtifact[]; ids: Map<string, string> } = {
      copies: [],
      reported: [],
      ids: new Map(),
    };
    for (const artifact of artifacts) {
      const item = items.get(artifact.id ?? '');
      if (!item) return null;
      const { logicalPath, name } = memoTarget(
        artifact,
        { taskId: memo.taskId, prefix: memo.prefix },
        { taskId, prefix: lineOf(task).outputs_prefix },
      );
      const id = this.#settings.newId();
      planned.copies.push({ id, name, jobId: job.id, item });
      planned.reported.push({ logical_path: logicalPath, name, data_type: item.dataType, id });
      planned.ids.set(item.id, id);
    }
    return planned;
  }

  /** The ids of those whose names were free. */
  async #copy(copies: readonly Copy[]): Promise<ReadonlySet<string>> {
    if (copies.length === 0) return new Set();
    const values = columns<Copy, string | number>(
      copies,
      ({ id }) => id,
      ({ item }) => item.domainId,
      ({ name }) => name,
      ({ item }) => item.dataType,
      ({ item }) => item.digest,
      ({ item }) => item.size,
      ({ jobId }) => jobId,
    );
    const made = await this.#transaction.change<{ id: string }>(COPY, [...values, this.#transaction.now]);
    // What they are is known: a task of the next wave may have them as inputs.
    const ids = new Set(made.map(({ id }) => id));
    for (const { id, name, item } of copies) {
      if (!ids.has(id)) continue;
      this.#looked.add(id);
      this.#items.set(id, { ...item, id, name, updatedAt: this.#transaction.now });
    }
    return ids;
  }

  #itemOf(job: Job, id: string): Item | null {
    const item = this.#items.get(id);
    return item?.domainId === job.domainId ? item : null;
  }

  /** Null when the task does not take part, or an input is none of the domain's items, or was changed after `sinceMs`. */
  #keyOf(job: Job, task: Task, sinceMs: number): string | null {
    const spec = lineOf(task);
    const code = memoCode(spec.meta);
    if (code === null) return null;
    const inputs: string[] = [];
    for (const id of spec.inputs_cids) {
      const item = this.#itemOf(job, id);
      if (!item || item.updatedAt > sinceMs) return null;
      inputs.push(item.digest);
    }
    const { capability, mode, filters } = this.#settings.queues.get(spec.queueId);
    return memoKey(code, { domainId: job.domainId, capability, mode, filters, meta: spec.meta, inputs });
  }
}

/** What a task gets of an earlier one's artifacts. `ids`: the earlier one's to its own. */
interface Planned {
  readonly copies: readonly Copy[];
  readonly reported: readonly ReportedArtifact[];
  readonly ids: ReadonlyMap<string, string>;
}

function recalledOf(
  { task, id, job }: Wanted,
  key: string,
  memo: Memo,
  { reported, ids }: Planned,
): Recalled {
  const from = { taskId: memo.taskId, jobId: memo.jobId };
  const outputs = memo.outputs.map((output) => ids.get(output) ?? output);
  const meta = memoReport(memo.meta, { id, jobId: job.id }, { ...from, key }, reported);
  return { task, nodeId: memo.nodeId, outputs: JSON.stringify(outputs), meta: JSON.stringify(meta), from };
}
