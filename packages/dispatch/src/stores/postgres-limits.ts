/**
 * Concurrency limits by key, in PostgreSQL. The row of a key counts the tasks that are held with it, and whoever gives one out
 * or ends one has locked that row; so a limit is kept by any number of dispatchers.
 *
 * Of the tasks that wait at one gate (a lane, a key, a limit) only so many are shown to those who look for work as the limit has
 * room for; the others are parked. More are shown when a held one ends. Those that are shown when the key fills up
 * are parked again by whoever meets them ({@link PARK}).
 */
import { sql } from './postgres-database.ts';
import type { Transaction } from './postgres-database.ts';
import { columns, storable } from './postgres-rows.ts';
import type { Place, Task } from './postgres-rows.ts';

// Sorted, as everywhere: who locks several keys locks them in one order.
const COUNT_IN = sql(`
  INSERT INTO limit_keys AS k (domain_id, name, tasks, held)
  SELECT u.domain_id, u.name, u.tasks, 0 FROM unnest($1::text[], $2::text[], $3::integer[]) AS u (domain_id, name, tasks)
  ORDER BY u.domain_id, u.name
  ON CONFLICT (domain_id, name) DO UPDATE SET tasks = k.tasks + excluded.tasks
  RETURNING id, domain_id AS "domainId", name, held, tasks`);
const ADD_GATES = sql(`
  INSERT INTO limit_gates (key_id, lane_id, key_limit)
  SELECT * FROM unnest($1::bigint[], $2::integer[], $3::integer[]) AS u (key_id, lane_id, key_limit)
  ORDER BY u.key_id, u.lane_id, u.key_limit ON CONFLICT DO NOTHING`);
const LOCK_KEYS = sql(`
  SELECT k.id, k.held, k.tasks FROM limit_keys k WHERE k.id = ANY($1::bigint[]) ORDER BY k.id FOR NO KEY UPDATE`);
const COUNT_KEYS = sql(`
  UPDATE limit_keys k SET tasks = k.tasks + u.tasks, held = k.held + u.held
  FROM unnest($1::bigint[], $2::integer[], $3::integer[]) AS u (id, tasks, held) WHERE k.id = u.id
  RETURNING k.id, k.held, k.tasks`);
const DROP_KEYS = sql('DELETE FROM limit_keys WHERE id = ANY($1::bigint[]) AND tasks = 0');
const DROP_GATES = sql('DELETE FROM limit_gates WHERE key_id = ANY($1::bigint[])');
const PARK = sql(`
  UPDATE open_tasks o SET parked = true FROM unnest($1::bigint[], $2::integer[]) AS u (job_seq, no)
  WHERE o.job_seq = u.job_seq AND o.no = u.no`);
/** How far into a gate is looked. When its first ones are given out the next are shown. */
const MAX_SHOWN = 256;

// Who holds a key waits for no task. A task with a deadline takes no other's place: it may pass any time.
const HIDDEN = sql(`
  SELECT p.job_seq AS "jobSeq", p.no FROM unnest($1::bigint[], $2::integer[]) AS k (id, held)
  JOIN limit_gates g ON g.key_id = k.id AND g.key_limit > k.held
  CROSS JOIN LATERAL (
    SELECT r.job_seq, r.no, r.parked, r.deadline_at IS NULL AS sure,
      count(*) FILTER (WHERE r.deadline_at IS NULL) OVER (ORDER BY r.rank, r.job_seq, r.no ROWS UNBOUNDED PRECEDING) AS number
    FROM open_tasks r
    WHERE r.key_id = g.key_id AND r.lane_id = g.lane_id AND r.key_limit = g.key_limit AND r.state = 'ready'
    ORDER BY r.rank, r.job_seq, r.no LIMIT ${MAX_SHOWN}) AS w
  CROSS JOIN LATERAL (
    SELECT o.job_seq, o.no FROM open_tasks o
    WHERE o.job_seq = w.job_seq AND o.no = w.no AND o.parked AND o.state = 'ready' FOR UPDATE SKIP LOCKED) AS p
  WHERE w.parked AND w.number - w.sure::integer < g.key_limit - k.held`);
const SHOW = sql(`
  UPDATE open_tasks o SET parked = false FROM unnest($1::bigint[], $2::integer[]) AS u (job_seq, no)
  WHERE o.job_seq = u.job_seq AND o.no = u.no`);
const STUCK = sql(`
  SELECT DISTINCT k.id FROM limit_keys k JOIN limit_gates g ON g.key_id = k.id AND g.key_limit > k.held
  CROSS JOIN LATERAL (
    SELECT r.parked FROM open_tasks r
    WHERE r.key_id = g.key_id AND r.lane_id = g.lane_id AND r.key_limit = g.key_limit AND r.state = 'ready'
    ORDER BY r.rank, r.job_seq, r.no LIMIT 1) AS f
  WHERE k.tasks > k.held AND f.parked ORDER BY k.id LIMIT 1000`);

/** A key, locked, as it stands. */
export interface KeyCount {
  readonly id: number;
  readonly held: number;
  /** Held and waiting. */
  readonly tasks: number;
}

export interface NewKeyed {
  readonly domainId: string;
  readonly key: string;
  readonly limit: number;
  readonly laneId: number;
}

/** Counts new tasks in, and gives the numbers of their keys, in their order. Their rows follow in this transaction. */
export async function countIn(
  transaction: Transaction,
  tasks: readonly NewKeyed[],
): Promise<{ readonly ids: readonly number[]; readonly keys: readonly KeyCount[] }> {
  if (tasks.length === 0) return { ids: [], keys: [] };
  const nameOf = (domainId: string, name: string): string => JSON.stringify([domainId, name]);
  const wanted = new Map<string, { domainId: string; name: string; tasks: number }>();
  for (const { domainId, key } of tasks) {
    const name = storable(key);
    const known = wanted.get(nameOf(domainId, name));
    if (known) known.tasks += 1;
    else wanted.set(nameOf(domainId, name), { domainId, name, tasks: 1 });
  }
  const rows = [...wanted.values()];
  type Row = KeyCount & { readonly domainId: string; readonly name: string };
  const keys = await transaction.change<Row>(
    COUNT_IN,
    columns<(typeof rows)[number], string | number>(
      rows,
      ({ domainId }) => domainId,
      ({ name }) => name,
      ({ tasks: count }) => count,
    ),
  );
  const idOf = new Map(keys.map(({ id, domainId, name }) => [nameOf(domainId, name), id]));
  const ids = tasks.map(({ domainId, key }) => idOf.get(nameOf(domainId, storable(key))) ?? 0);
  const gates = new Map(
    tasks.map(({ laneId, limit }, index) => {
      const gate = [ids[index] ?? 0, laneId, limit] as const;
      return [gate.join(), gate];
    }),
  );
  transaction.send(
    ADD_GATES,
    columns<readonly [number, number, number], number>(
      [...gates.values()],
      ([key]) => key,
      ([, lane]) => lane,
      ([, , limit]) => limit,
    ),
  );
  return { ids, keys };
}

/** Locks the keys of these tasks. After jobs. */
export async function lockKeys(
  transaction: Transaction,
  tasks: readonly Task[],
): Promise<Map<number, number>> {
  const ids = [...new Set(tasks.flatMap(({ keyId }) => keyId ?? []))];
  if (ids.length === 0) return new Map();
  const rows = await transaction.rows<KeyCount>(LOCK_KEYS, [ids]);
  return new Map(rows.map(({ id, held }) => [id, held]));
}

/** Hides tasks whose key is full, as the transaction knows that has locked both. */
export function park(transaction: Transaction, tasks: readonly Place[]): void {
  if (tasks.length > 0) transaction.send(PARK, placesOf(tasks));
}

function placesOf(tasks: readonly Place[]): number[][] {
  return columns<Place, number>(
    tasks,
    ({ jobSeq }) => jobSeq,
    ({ no }) => no,
  );
}

/** Shows as many of the parked tasks of these locked keys as there is room for; true: some. Their rows are written. */
export async function show(transaction: Transaction, keys: readonly KeyCount[]): Promise<boolean> {
  if (keys.length === 0) return false;
  const hidden = await transaction.rows<Place>(
    HIDDEN,
    columns<KeyCount, number>(
      keys,
      ({ id }) => id,
      ({ held }) => held,
    ),
  );
  if (hidden.length > 0) transaction.send(SHOW, placesOf(hidden));
  return hidden.length > 0;
}

/** What a transaction did to the tasks of keys. */
export class KeyChanges {
  readonly #deltas = new Map<number, { tasks: number; held: number }>();

  add(keyId: number, tasks: number, held: number): void {
    const delta = this.#deltas.get(keyId);
    if (delta) {
      delta.tasks += tasks;
      delta.held += held;
    } else this.#deltas.set(keyId, { tasks, held });
  }

  /** Writes them, after the tasks; true: tasks of these keys wait that a node may take now. */
  async flush(transaction: Transaction): Promise<boolean> {
    if (this.#deltas.size === 0) return false;
    const deltas = [...this.#deltas].toSorted(([a], [b]) => a - b);
    const keys = await transaction.change<KeyCount>(
      COUNT_KEYS,
      columns<(typeof deltas)[number], number>(
        deltas,
        ([id]) => id,
        ([, { tasks }]) => tasks,
        ([, { held }]) => held,
      ),
    );
    const gone = keys.filter(({ tasks }) => tasks === 0).map(({ id }) => id);
    if (gone.length > 0) {
      transaction.send(DROP_KEYS, [gone]);
      transaction.send(DROP_GATES, [gone]);
    }
    const looked = keys.filter(({ held, tasks }) => tasks > held);
    const shown = await show(transaction, looked);
    // Those shown before may have been met while the key was full.
    return shown || looked.some(({ id }) => (this.#deltas.get(id)?.held ?? 0) < 0);
  }
}

/** Shows what should have been shown and was locked by somebody at that moment; true: something. */
export async function showStuck(transaction: Transaction): Promise<boolean> {
  const stuck = await transaction.rows<{ id: number }>(STUCK, []);
  if (stuck.length === 0) return false;
  const keys = await transaction.rows<KeyCount>(LOCK_KEYS, [stuck.map(({ id }) => id)]);
  return await show(transaction, keys);
}
