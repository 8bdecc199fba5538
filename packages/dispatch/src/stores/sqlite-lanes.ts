/**
 * The ready tasks in their order, in lanes. A lane has those of one queue, domain, concurrency key and limit, so at any time
 * all of its tasks may be leased or none of them: a key that is full closes its lanes and is nowhere in the way, however many
 * tasks wait for it. Synchronous; the caller brings the transaction.
 *
 * Tasks are kept as ranges: a job of a thousand like tasks is one row, which a lease of two hundred shortens. How many there are
 * in each lane is mirrored in memory, and where each of the lanes with a key begins, so that the first of ten thousand lanes is
 * found without asking the table about each. How many tasks of a key are held is kept while there are any, or ready ones.
 */
import type { ConcurrencyLimit } from '../records.ts';
import { IndexedHeap } from './indexed-heap.ts';
import { BulkInsert } from './sqlite-database.ts';
import type { Database, Row, Statement } from './sqlite-database.ts';
import type { Queue } from './sqlite-queues.ts';

/** The ready tasks of one queue and domain. */
export interface Shelf {
  readonly queue: Queue;
  readonly domainId: string;
  /** All of them. */
  ready: number;
  /** Those in lanes that are open. */
  open: number;
  /** Of tasks without a key. */
  plain: Lane | null;
  /** Open lanes with a key and ready tasks, by where they begin at the earliest. */
  readonly keyed: IndexedHeap<Lane>;
  /** All with a key, by key and limit. */
  readonly lanes: Map<string, Lane>;
}

export interface Lane {
  readonly id: number;
  readonly shelf: Shelf;
  /** Null: its tasks are not limited. */
  readonly key: Key | null;
  readonly limit: number;
  ready: number;
  /** Since when the task waits that has waited longest; null: the table knows. */
  oldest: number | null;
  /** No task of it comes before this. What it was taken from begins later than it says, until somebody looks. */
  priority: number;
  firstTask: number;
  heapAt: number;
}

/** Tasks of one key in a domain. */
export interface Key {
  readonly domainId: string;
  readonly text: string;
  held: number;
  readonly lanes: Set<Lane>;
}

/** Ready tasks that follow each other, of one job or of several. */
export interface Range {
  readonly lane: Lane;
  readonly priority: number;
  readonly firstTask: number;
  lastTask: number;
  readonly since: number;
  /** None of them has a row of its own yet. */
  readonly fresh: boolean;
}

/** Up to as many ranges that are not written yet are looked through for ready tasks. */
const MOST_PENDING = 16;

/** Lanes that have no tasks stay for those to come; when there are more, all of them go. */
const MOST_IDLE = 1024;

export class Lanes {
  readonly #database: Database;
  readonly #rows: BulkInsert;
  #nextId = 1;
  readonly #byId = new Map<number, Lane>();
  readonly #idle = new Set<Lane>();
  readonly #keys = new Map<string, Key>();
  /** The one used last of those without a key. */
  #lastPlain: Lane | null = null;
  /** Ranges that are not in the table yet. The next task may prolong the last one. */
  #pending: Range[] = [];
  readonly #select: Statement;
  readonly #counts: Statement;
  readonly #insert: Statement;
  readonly #delete: (ids: string) => void;
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
      'lane_id',
      'priority',
      'first_task',
      'last_task',
      'since',
      'fresh',
    ]);
    this.#select = sql('SELECT id, queue_id, domain_id, key, key_limit FROM lanes ORDER BY id');
    this.#counts = sql(
      'SELECT lane_id, sum(last_task - first_task + 1), max(priority), min(first_task) FROM ready GROUP BY lane_id',
    );
    this.#insert = sql('INSERT INTO lanes (id, queue_id, domain_id, key, key_limit) VALUES (?, ?, ?, ?, ?)');
    this.#delete = database.prepareCounted('DELETE FROM lanes WHERE id IN (SELECT value FROM json_each(?))');
    const columns = 'SELECT priority, first_task, last_task, since, fresh FROM ready';
    this.#front = sql(`${columns} WHERE lane_id = ? ORDER BY priority DESC, first_task LIMIT ? OFFSET ?`);
    this.#around = sql(
      `${columns} WHERE lane_id = ? AND priority = ? AND first_task <= ? ORDER BY first_task DESC LIMIT 1`,
    );
    this.#after = sql(`${columns} WHERE lane_id = ? AND priority = ? AND first_task > ? AND first_task <= ?`);
    this.#shorten = sql(
      'UPDATE ready SET first_task = ? WHERE lane_id = ? AND priority = ? AND first_task = ?',
    );
    this.#remove = sql('DELETE FROM ready WHERE lane_id = ? AND priority = ? AND first_task = ?');
    this.#nextPriority = sql(`
      SELECT priority, since FROM ready
      WHERE lane_id = ?1 AND priority < coalesce(?2, 9223372036854775807)
      ORDER BY priority DESC, first_task LIMIT 1`);
    this.#ahead = sql(`
      SELECT total(iif(priority > ?2, last_task - first_task + 1, 0)),
        total(iif(priority = ?2 AND first_task < ?3, min(last_task, ?3 - 1) - first_task + 1, 0))
      FROM ready WHERE lane_id = ?1 AND priority >= ?2`);
  }

  /** Reads the committed state. `queueOf` has no ready tasks yet. Who is held is told by {@link hold}. */
  load(queueOf: (id: number) => Queue): void {
    this.#rows.clear();
    this.#pending = [];
    this.#byId.clear();
    this.#idle.clear();
    this.#keys.clear();
    this.#lastPlain = null;
    this.#nextId = 1;
    for (const [id, queueId, domainId, key, limit] of this.#select.all()) {
      const concurrency = key === null ? null : { key: key as string, limit: limit as number };
      this.#make(id as number, queueOf(queueId as number), domainId as string, concurrency);
      this.#nextId = (id as number) + 1;
    }
    for (const [id, ready, priority, firstTask] of this.#counts.all()) {
      const lane = this.#byId.get(id as number);
      if (!lane) continue;
      lane.priority = priority as number;
      lane.firstTask = firstTask as number;
      this.#grow(lane, ready as number);
    }
  }

  /** Writes what was added. */
  flush(): void {
    if (this.#pending.length === 0) return;
    for (const { lane, priority, firstTask, lastTask, since, fresh } of this.#pending) {
      this.#rows.addCounted(lane.id, priority, firstTask, lastTask, since, fresh ? 1 : 0);
    }
    this.#pending = [];
    this.#rows.flush();
  }

  /** Forgets lanes that are empty, when there are many. At the end of a transaction. */
  tidy(): void {
    if (this.#idle.size <= MOST_IDLE) return;
    this.#delete(`[${Array.from(this.#idle, ({ id }) => id).join(',')}]`);
    for (const lane of this.#idle) {
      const { shelf, key } = lane;
      this.#byId.delete(lane.id);
      if (key === null) shelf.plain = null;
      else {
        shelf.lanes.delete(laneName(key.text, lane.limit));
        key.lanes.delete(lane);
        this.#forgetKey(key);
      }
      if (shelf.plain === null && shelf.lanes.size === 0) shelf.queue.shelves.delete(shelf.domainId);
    }
    this.#idle.clear();
    this.#lastPlain = null;
  }

  /**
   * Adds a task that became ready; `fresh`: it has no row of its own yet. False: as many tasks of its key are held as its
   * limit allows.
   */
  add(
    queue: Queue,
    domainId: string,
    concurrency: ConcurrencyLimit | null,
    priority: number,
    seq: number,
    since: number,
    fresh: boolean,
  ): boolean {
    this.#database.noteWrite();
    const lane = this.#find(queue, domainId, concurrency) ?? this.#create(queue, domainId, concurrency);
    const last = this.#pending.at(-1);
    if (
      last?.lastTask === seq - 1 &&
      last.lane === lane &&
      last.priority === priority &&
      last.since === since &&
      last.fresh === fresh
    ) {
      last.lastTask = seq;
    } else this.#pending.push({ lane, priority, firstTask: seq, lastTask: seq, since, fresh });
    if (lane.ready === 0) {
      lane.oldest = since;
      lane.priority = priority;
      lane.firstTask = seq;
    } else {
      if (lane.oldest !== null && since < lane.oldest) lane.oldest = since;
      if (priority > lane.priority || (priority === lane.priority && seq < lane.firstTask)) {
        this.begins(lane, priority, seq);
      }
    }
    this.#grow(lane, 1);
    return isOpen(lane);
  }

  /** `limit` ranges of a lane in their order, after the first `offset`. */
  front(lane: Lane, limit: number, offset: number): Readonly<Range>[] {
    // A task that is leased by the transaction that made it ready is never written as ready.
    const pending = this.#allPending(lane);
    if (pending) return pending.slice(offset, offset + limit);
    this.flush();
    return this.#front.all(lane.id, limit, offset).map((row) => rangeOf(lane, row));
  }

  /** Notes that no task of the lane comes before this one. */
  begins(lane: Lane, priority: number, seq: number): void {
    lane.priority = priority;
    lane.firstTask = seq;
    if (lane.heapAt !== -1) lane.shelf.keyed.moved(lane);
  }

  /** Removes tasks of a range as {@link front} gave it; `seqs` in their order, at least one. */
  take(range: Readonly<Range>, seqs: readonly number[]): void {
    const { lane, priority, firstTask, lastTask } = range;
    const last = seqs.at(-1) ?? firstTask;
    const inFront = seqs.length === last - firstTask + 1;
    this.#shrink(lane, seqs.length);
    const pending = this.#pending.indexOf(range);
    if (pending !== -1) this.#pending.splice(pending, 1);
    else if (inFront && last < lastTask) {
      this.#shorten.run(last + 1, lane.id, priority, firstTask);
      return;
    } else this.#remove.run(lane.id, priority, firstTask);
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
  remove(
    queue: Queue,
    domainId: string,
    concurrency: ConcurrencyLimit | null,
    priority: number,
    firstTask: number,
    lastTask: number,
  ): void {
    const lane = this.#find(queue, domainId, concurrency);
    if (!lane) return;
    this.flush();
    const rows = this.#after.all(lane.id, priority, firstTask, lastTask);
    const around = this.#around.get(lane.id, priority, firstTask);
    for (const row of around ? [around, ...rows] : rows) {
      const range = rangeOf(lane, row);
      if (range.lastTask < firstTask) continue;
      const from = Math.max(firstTask, range.firstTask);
      this.#shrink(lane, Math.min(lastTask, range.lastTask) - from + 1);
      this.#remove.run(lane.id, priority, range.firstTask);
      this.#put(range, range.firstTask, firstTask - 1);
      this.#put(range, lastTask + 1, range.lastTask);
    }
  }

  /** Counts tasks that came to be held, or with `by` below 0 are no more. True: ready tasks of the key may be leased now. */
  hold(domainId: string, { key: text }: ConcurrencyLimit, by: 1 | -1): boolean {
    return this.holdKey(this.#key(domainId, text), by);
  }

  /** Like {@link hold}. */
  holdKey(key: Key, by: 1 | -1): boolean {
    this.#database.noteWrite();
    key.held += by;
    let opened = false;
    for (const lane of key.lanes) {
      if (by === 1 && lane.limit === key.held) this.#close(lane);
      else if (by === -1 && lane.limit === key.held + 1) {
        this.#open(lane);
        opened ||= lane.ready > 0;
      }
    }
    this.#forgetKey(key);
    return opened;
  }

  heldOfKey(domainId: string, { key }: ConcurrencyLimit): number {
    return this.#keys.get(keyName(domainId, key))?.held ?? 0;
  }

  /** Since when the ready task waits that has waited longest; null: none is ready. */
  oldestOf(queue: Queue): number | null {
    let oldest: number | null = null;
    for (const lane of lanesOf(queue)) {
      if (lane.ready === 0) continue;
      const since = (lane.oldest ??= this.#oldestIn(lane));
      oldest = oldest === null ? since : Math.min(oldest, since);
    }
    return oldest;
  }

  /** Tasks of the domain in these queues that may be leased and come before this one. */
  ahead(
    queues: Iterable<Queue>,
    domainId: string,
    priority: number,
    seq: number,
  ): { readonly higherPriority: number; readonly older: number } {
    let [higherPriority, older] = [0, 0];
    for (const queue of queues) {
      const shelf = queue.shelves.get(domainId);
      if (!shelf) continue;
      for (const lane of lanesOfShelf(shelf)) {
        if (lane.ready === 0 || !isOpen(lane)) continue;
        const [higher, before] = this.#ahead.get(lane.id, priority, seq) as [number, number];
        higherPriority += higher;
        older += before;
      }
    }
    return { higherPriority, older };
  }

  #oldestIn(lane: Lane): number {
    let oldest = Infinity;
    // One look per priority in use: the front of each is what has waited longest there.
    let below: number | null = null;
    for (;;) {
      const row: Row | undefined = this.#nextPriority.get(lane.id, below);
      if (!row) return oldest;
      const [priority, since] = row as [number, number];
      oldest = Math.min(oldest, since);
      below = priority;
    }
  }

  #find(queue: Queue, domainId: string, concurrency: ConcurrencyLimit | null): Lane | undefined {
    // Neighbours are mostly of one lane.
    const last = this.#lastPlain;
    if (concurrency === null && last?.shelf.queue === queue && last.shelf.domainId === domainId) return last;
    const shelf = queue.shelves.get(domainId);
    if (concurrency !== null) return shelf?.lanes.get(laneName(concurrency.key, concurrency.limit));
    if (shelf?.plain) this.#lastPlain = shelf.plain;
    return shelf?.plain ?? undefined;
  }

  #create(queue: Queue, domainId: string, concurrency: ConcurrencyLimit | null): Lane {
    const id = this.#nextId++;
    this.#insert.run(id, queue.id, domainId, concurrency?.key ?? null, concurrency?.limit ?? null);
    return this.#make(id, queue, domainId, concurrency);
  }

  #make(id: number, queue: Queue, domainId: string, concurrency: ConcurrencyLimit | null): Lane {
    let shelf = queue.shelves.get(domainId);
    if (!shelf) {
      shelf = {
        queue,
        domainId,
        ready: 0,
        open: 0,
        plain: null,
        keyed: new IndexedHeap(beginsBefore),
        lanes: new Map(),
      };
      queue.shelves.set(domainId, shelf);
    }
    const key = concurrency === null ? null : this.#key(domainId, concurrency.key);
    const limit = concurrency?.limit ?? 0;
    const lane: Lane = {
      id,
      shelf,
      key,
      limit,
      ready: 0,
      oldest: null,
      priority: 0,
      firstTask: 0,
      heapAt: -1,
    };
    if (concurrency === null || key === null) shelf.plain = lane;
    else {
      shelf.lanes.set(laneName(concurrency.key, limit), lane);
      key.lanes.add(lane);
    }
    this.#byId.set(id, lane);
    this.#idle.add(lane);
    return lane;
  }

  #key(domainId: string, text: string): Key {
    const name = keyName(domainId, text);
    let key = this.#keys.get(name);
    if (!key) {
      key = { domainId, text, held: 0, lanes: new Set() };
      this.#keys.set(name, key);
    }
    return key;
  }

  #forgetKey(key: Key): void {
    if (key.held === 0 && key.lanes.size === 0) this.#keys.delete(keyName(key.domainId, key.text));
  }

  #grow(lane: Lane, by: number): void {
    const { shelf } = lane;
    const { queue } = shelf;
    const wasIdle = lane.ready === 0;
    lane.ready += by;
    shelf.ready += by;
    queue.ready += by;
    if (wasIdle) this.#idle.delete(lane);
    if (!isOpen(lane)) {
      queue.limited += by;
      return;
    }
    if (shelf.open === 0) queue.active.add(shelf);
    shelf.open += by;
    if (wasIdle && lane.key !== null) shelf.keyed.add(lane);
  }

  #shrink(lane: Lane, by: number): void {
    const { shelf } = lane;
    const { queue } = shelf;
    lane.ready -= by;
    lane.oldest = null;
    shelf.ready -= by;
    queue.ready -= by;
    if (isOpen(lane)) {
      shelf.open -= by;
      if (shelf.open === 0) queue.active.delete(shelf);
    } else queue.limited -= by;
    if (lane.ready > 0) return;
    if (lane.heapAt !== -1) shelf.keyed.remove(lane);
    this.#idle.add(lane);
  }

  #open(lane: Lane): void {
    const { shelf, ready } = lane;
    if (ready === 0) return;
    if (shelf.open === 0) shelf.queue.active.add(shelf);
    shelf.open += ready;
    shelf.queue.limited -= ready;
    shelf.keyed.add(lane);
  }

  #close(lane: Lane): void {
    const { shelf, ready } = lane;
    if (ready === 0) return;
    shelf.open -= ready;
    shelf.queue.limited += ready;
    if (shelf.open === 0) shelf.queue.active.delete(shelf);
    if (lane.heapAt !== -1) shelf.keyed.remove(lane);
  }

  /** The lane's tasks in their order, if all of them are in few ranges that are not written yet; else null. */
  #allPending(lane: Lane): Range[] | null {
    if (this.#pending.length > MOST_PENDING) return null;
    const pending = this.#pending.filter((range) => range.lane === lane);
    const tasks = pending.reduce((sum, { firstTask, lastTask }) => sum + lastTask - firstTask + 1, 0);
    if (tasks !== lane.ready) return null;
    return pending.toSorted((a, b) => b.priority - a.priority || a.firstTask - b.firstTask);
  }

  /** What is left of a range, if anything is. */
  #put(range: Readonly<Range>, firstTask: number, lastTask: number): void {
    if (firstTask <= lastTask) this.#pending.push({ ...range, firstTask, lastTask });
  }
}

export function isOpen({ key, limit }: Lane): boolean {
  return key === null || key.held < limit;
}

function* lanesOf(queue: Queue): Generator<Lane> {
  for (const shelf of queue.shelves.values()) yield* lanesOfShelf(shelf);
}

function* lanesOfShelf({ plain, lanes }: Shelf): Generator<Lane> {
  if (plain) yield plain;
  yield* lanes.values();
}

function beginsBefore(a: Lane, b: Lane): boolean {
  return a.priority > b.priority || (a.priority === b.priority && a.firstTask < b.firstTask);
}

function keyName(domainId: string, key: string): string {
  return `${domainId} ${key}`;
}

function laneName(key: string, limit: number): string {
  return `${limit} ${key}`;
}

function rangeOf(lane: Lane, [priority, firstTask, lastTask, since, fresh]: Row): Range {
  return {
    lane,
    priority: priority as number,
    firstTask: firstTask as number,
    lastTask: lastTask as number,
    since: since as number,
    fresh: fresh === 1,
  };
}
