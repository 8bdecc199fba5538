/**
 * Which tasks may be leased and by whom: queues of tasks with the same demands, and in each the ready tasks by priority and
 * age. Synchronous; the caller brings the transaction.
 *
 * Ready tasks are kept as ranges: a job of a thousand like tasks is one row, which a lease of two hundred shortens. How many
 * tasks are ready in each queue is mirrored in memory, so that a request for which there is no work touches no table.
 */
import { MillraceError } from '@millrace/runner';
import type { TaskState } from '../lifecycle.ts';
import type { CapabilityFilters, NodeMode } from '../records.ts';
import { match } from './matching.ts';
import type { Demand } from './matching.ts';
import { BulkInsert } from './sqlite-database.ts';
import type { Database, Row, Statement } from './sqlite-database.ts';
import type { Node } from './sqlite-nodes.ts';

export interface Queue extends Demand {
  readonly id: number;
  /** Tasks that are ready. */
  ready: number;
  /** Tasks that wait for a stage; for their time; that a node holds. */
  blocked: number;
  delayed: number;
  held: number;
}

/** Ready tasks that follow each other, of one job or of several. */
export interface Range {
  readonly queueId: number;
  readonly priority: number;
  readonly firstTask: number;
  lastTask: number;
  readonly since: number;
  /** None of them has a row of its own yet. */
  readonly fresh: boolean;
}

/** Up to as many ranges that are not written yet are looked through for ready tasks. */
const MOST_PENDING = 16;

/** The queues a node may take from, found so far. */
interface Matches {
  readonly node: Node;
  /** Queues looked at. */
  seen: number;
  readonly preferred: Queue[];
  readonly other: Queue[];
}

/** The part of a task that says which queue it belongs to. */
interface Demanding {
  readonly capability: string;
  readonly capability_filters: CapabilityFilters;
  readonly mode: NodeMode;
}

export class Queues {
  readonly #database: Database;
  readonly #all: Queue[] = [];
  readonly #byDemand = new Map<string, Queue>();
  readonly #matches = new Map<string, Matches>();
  readonly #rows: BulkInsert;
  /** Ranges that are not in the table yet. The next task may prolong the last one. */
  #pending: Range[] = [];
  /** Whose counts in the table are not those in memory. */
  readonly #changed = new Set<Queue>();
  readonly #saveCounts: (...values: readonly number[]) => void;
  readonly #select: Statement;
  readonly #counts: Statement;
  readonly #insert: Statement;
  readonly #front: Statement;
  readonly #around: Statement;
  readonly #after: Statement;
  readonly #shorten: Statement;
  readonly #remove: Statement;
  readonly #nextPriority: Statement;
  readonly #ahead: Statement;

  constructor(database: Database) {
    this.#database = database;
    const sql = (text: string): Statement => database.prepare(text);
    this.#rows = new BulkInsert(database, 'ready', [
      'queue_id',
      'priority',
      'first_task',
      'last_task',
      'since',
      'fresh',
    ]);
    this.#select = sql(
      'SELECT id, capability, filters, mode, organization_id, blocked, delayed FROM queues ORDER BY id',
    );
    this.#saveCounts = database.prepareCounted('UPDATE queues SET blocked = ?, delayed = ? WHERE id = ?');
    this.#counts = sql('SELECT queue_id, sum(last_task - first_task + 1) FROM ready GROUP BY queue_id');
    this.#insert = sql(
      'INSERT INTO queues (id, capability, filters, mode, organization_id) VALUES (?, ?, ?, ?, ?)',
    );
    const columns = 'SELECT queue_id, priority, first_task, last_task, since, fresh FROM ready';
    this.#front = sql(`${columns} WHERE queue_id = ? ORDER BY priority DESC, first_task LIMIT ? OFFSET ?`);
    this.#around = sql(
      `${columns} WHERE queue_id = ? AND priority = ? AND first_task <= ? ORDER BY first_task DESC LIMIT 1`,
    );
    this.#after = sql(
      `${columns} WHERE queue_id = ? AND priority = ? AND first_task > ? AND first_task <= ?`,
    );
    this.#shorten = sql(
      'UPDATE ready SET first_task = ? WHERE queue_id = ? AND priority = ? AND first_task = ?',
    );
    this.#remove = sql('DELETE FROM ready WHERE queue_id = ? AND priority = ? AND first_task = ?');
    this.#nextPriority = sql(`
      SELECT priority, since FROM ready
      WHERE queue_id = ?1 AND priority < coalesce(?2, 9223372036854775807)
      ORDER BY priority DESC, first_task LIMIT 1`);
    this.#ahead = sql(`
      SELECT total(iif(priority > ?2, last_task - first_task + 1, 0)),
        total(iif(priority = ?2 AND first_task < ?3, min(last_task, ?3 - 1) - first_task + 1, 0))
      FROM ready WHERE queue_id = ?1 AND priority >= ?2`);
  }

  load(): void {
    this.#rows.clear();
    this.#pending = [];
    this.#byDemand.clear();
    this.#matches.clear();
    this.#all.length = 0;
    this.#changed.clear();
    for (const [id, capability, filters, mode, organization, blocked, delayed] of this.#select.all()) {
      this.#add({
        id: id as number,
        capability: capability as string,
        filters: JSON.parse(filters as string) as CapabilityFilters,
        mode: mode as NodeMode,
        organizationId: organization === '' ? null : (organization as string),
        ready: 0,
        blocked: blocked as number,
        delayed: delayed as number,
        held: 0,
      });
    }
    for (const [id, ready] of this.#counts.all()) this.get(id as number).ready = ready as number;
  }

  /** Writes what was added. */
  flush(): void {
    for (const { queueId, priority, firstTask, lastTask, since, fresh } of this.#pending) {
      this.#rows.addCounted(queueId, priority, firstTask, lastTask, since, fresh ? 1 : 0);
    }
    this.#pending = [];
    this.#rows.flush();
    for (const { id, blocked, delayed } of this.#changed) this.#saveCounts(blocked, delayed, id);
    this.#changed.clear();
  }

  /** Counts tasks that came to be in a state, or with a number below 0 left it. */
  count(id: number, state: TaskState, by: number): void {
    const queue = this.get(id);
    switch (state) {
      case 'ready':
        queue.ready += by;
        return;
      case 'leased':
      case 'running':
        queue.held += by;
        return;
      case 'blocked':
      case 'delayed':
        queue[state] += by;
        this.#changed.add(queue);
        this.#database.noteWrite();
        return;
      case 'completed':
      case 'failed':
      case 'canceled':
        return;
      default:
        state satisfies never;
    }
  }

  /** Those with tasks that have not ended. */
  inUse(): readonly { readonly queue: Readonly<Queue>; readonly readySince: number | null }[] {
    return this.#all
      .filter(({ ready, blocked, delayed, held }) => ready + blocked + delayed + held > 0)
      .map((queue) => ({ queue, readySince: this.#oldestOf(queue) }));
  }

  get(id: number): Queue {
    const queue = this.#all[id - 1];
    if (!queue) throw new MillraceError('internal', `queue ${id} does not exist`);
    return queue;
  }

  /** The queue of tasks with these demands, made when it is the first. */
  of({ capability, capability_filters, mode }: Demanding, organizationId: string | null): Queue {
    const filters = Object.fromEntries(
      Object.entries(capability_filters).toSorted(([a], [b]) => (a < b ? -1 : 1)),
    );
    const demand: Demand = { capability, filters, mode, organizationId };
    const known = this.#byDemand.get(keyOf(demand));
    if (known) return known;
    const id = this.#all.length + 1;
    this.#insert.run(id, capability, JSON.stringify(filters), mode, organizationId ?? '');
    return this.#add({ ...demand, id, ready: 0, blocked: 0, delayed: 0, held: 0 });
  }

  /** What the node may take from, and is to be asked in this order: each first to last. */
  matching(node: Node): readonly [readonly Queue[], readonly Queue[]] {
    let matches = this.#matches.get(node.id);
    if (matches?.node !== node) {
      matches = { node, seen: 0, preferred: [], other: [] };
      this.#matches.set(node.id, matches);
    }
    for (; matches.seen < this.#all.length; matches.seen += 1) {
      const queue = this.get(matches.seen + 1);
      const answer = match(queue, node);
      if (answer !== 'never') matches[answer].push(queue);
    }
    return [matches.preferred, matches.other];
  }

  /** Adds a task that became ready; `fresh`: it has no row of its own yet. */
  add(queueId: number, priority: number, seq: number, since: number, fresh: boolean): void {
    this.#database.noteWrite();
    const last = this.#pending.at(-1);
    if (
      last?.lastTask === seq - 1 &&
      last.queueId === queueId &&
      last.priority === priority &&
      last.since === since &&
      last.fresh === fresh
    ) {
      last.lastTask = seq;
    } else this.#pending.push({ queueId, priority, firstTask: seq, lastTask: seq, since, fresh });
  }

  /** `limit` ranges of a queue in their order, after the first `offset`. */
  front(queue: Queue, limit: number, offset: number): Readonly<Range>[] {
    // A task that is leased by the transaction that made it ready is never written as ready.
    const pending = this.#allPending(queue);
    if (pending) return pending.slice(offset, offset + limit);
    this.flush();
    return this.#front.all(queue.id, limit, offset).map(rangeOf);
  }

  /** Removes tasks of a range as {@link front} gave it; `seqs` in their order, at least one. */
  take(range: Readonly<Range>, seqs: readonly number[]): void {
    const { queueId, priority, firstTask, lastTask } = range;
    const last = seqs.at(-1) ?? firstTask;
    const inFront = seqs.length === last - firstTask + 1;
    const pending = this.#pending.indexOf(range);
    if (pending !== -1) this.#pending.splice(pending, 1);
    else if (inFront && last < lastTask) {
      this.#shorten.run(last + 1, queueId, priority, firstTask);
      return;
    } else this.#remove.run(queueId, priority, firstTask);
    if (inFront) this.#put(range, last + 1, lastTask);
    else {
      let from = firstTask;
      for (const seq of [...seqs, lastTask + 1]) {
        this.#put(range, from, seq - 1);
        from = seq + 1;
      }
    }
  }

  /** Removes all tasks from one to another, if they are there. */
  remove(queueId: number, priority: number, firstTask: number, lastTask: number): void {
    this.flush();
    const rows = this.#after.all(queueId, priority, firstTask, lastTask);
    const around = this.#around.get(queueId, priority, firstTask);
    for (const range of (around ? [around, ...rows] : rows).map(rangeOf)) {
      if (range.lastTask < firstTask) continue;
      this.#remove.run(queueId, priority, range.firstTask);
      this.#put(range, range.firstTask, firstTask - 1);
      this.#put(range, lastTask + 1, range.lastTask);
    }
  }

  /** Since when the ready task waits that has waited longest; null: none is ready. */
  oldest(): number | null {
    let oldest: number | null = null;
    for (const queue of this.#all) {
      const since = this.#oldestOf(queue);
      if (since !== null) oldest = Math.min(oldest ?? since, since);
    }
    return oldest;
  }

  #oldestOf(queue: Queue): number | null {
    if (queue.ready === 0) return null;
    let oldest: number | null = null;
    // One look per priority in use: the front of each is what has waited longest there.
    let below: number | null = null;
    for (;;) {
      const row: Row | undefined = this.#nextPriority.get(queue.id, below);
      if (!row) return oldest;
      const [priority, since] = row as [number, number];
      oldest = Math.min(oldest ?? since, since);
      below = priority;
    }
  }

  /** Ready tasks before this one, in its own queue and in those that nodes of this queue take from as well. */
  ahead(
    queueId: number,
    priority: number,
    seq: number,
  ): { readonly higherPriority: number; readonly older: number } {
    const queues = new Set([queueId]);
    for (const { preferred, other } of this.#matches.values()) {
      const both = [...preferred, ...other];
      if (both.some(({ id }) => id === queueId)) for (const { id } of both) queues.add(id);
    }
    let [higherPriority, older] = [0, 0];
    for (const id of queues) {
      if (this.get(id).ready === 0) continue;
      const [higher, before] = this.#ahead.get(id, priority, seq) as [number, number];
      higherPriority += higher;
      older += before;
    }
    return { higherPriority, older };
  }

  /** The queue's ready tasks in their order, if all of them are in few ranges that are not written yet; else null. */
  #allPending(queue: Queue): Range[] | null {
    if (this.#pending.length > MOST_PENDING) return null;
    const pending = this.#pending.filter(({ queueId }) => queueId === queue.id);
    const tasks = pending.reduce((sum, { firstTask, lastTask }) => sum + lastTask - firstTask + 1, 0);
    if (tasks !== queue.ready) return null;
    return pending.toSorted((a, b) => b.priority - a.priority || a.firstTask - b.firstTask);
  }

  /** What is left of a range, if anything is. */
  #put(range: Readonly<Range>, firstTask: number, lastTask: number): void {
    if (firstTask <= lastTask) this.#pending.push({ ...range, firstTask, lastTask });
  }

  /** Ids are given out in order from 1 and never reused, so the position tells the id. */
  #add(queue: Queue): Queue {
    this.#all.push(queue);
    this.#byDemand.set(keyOf(queue), queue);
    return queue;
  }
}

function keyOf({ capability, filters, mode, organizationId }: Demand): string {
  return JSON.stringify([capability, filters, mode, organizationId]);
}

function rangeOf([queueId, priority, firstTask, lastTask, since, fresh]: Row): Range {
  return {
    queueId: queueId as number,
    priority: priority as number,
    firstTask: firstTask as number,
    lastTask: lastTask as number,
    since: since as number,
    fresh: fresh === 1,
  };
}
