/**
 * Giving tasks to nodes, in PostgreSQL.
 *
 * Ready tasks stand in lanes: those of one domain with the same demands, by priority and age. A request takes from the lanes
 * whose demands its node meets. Which lane is next is for the domains' turns (`turns.ts`), within a domain for priority and
 * age, and among those for what fits beside what the node holds (`fitting.ts`). That is played through twice by the same
 * {@link Table}: first over what the lanes begin with, without locks, which says how many tasks of each to lock; then over what
 * was locked. Others may take tasks in between; then the order is only nearly that, and still no task is locked without need.
 */
import { MillraceError } from '@millrace/runner';
import type { GrantedLease, LeaseAnswer, LeaseRequest, Outcome, StoreChange } from '../store.ts';
import { OVERTAKING_MS, Usage } from './fitting.ts';
import { match } from './matching.ts';
import { sql } from './postgres-database.ts';
import type { Database, Statement, Value } from './postgres-database.ts';
import type { Answers } from './postgres-jobs.ts';
import { lockKeys, park } from './postgres-limits.ts';
import {
  BLOCK,
  NODE_COLUMNS,
  OPEN_COLUMNS,
  columns,
  lineOf,
  nodeOf,
  specAt,
  taskRecord,
} from './postgres-rows.ts';
import type { Lane, NodeRow, Place, StoredNode, Task } from './postgres-rows.ts';
import { RANGE_COLUMNS, inUnit } from './postgres-unit.ts';
import type { Range, Unit, WorkSettings } from './postgres-unit.ts';
import { isoTime } from './time.ts';
import { Turns } from './turns.ts';

const READ_NODES = sql(`SELECT ${NODE_COLUMNS} FROM nodes n WHERE n.id = ANY($1::text[])`);
const LOCK_NODES = sql(`
  SELECT ${NODE_COLUMNS} FROM nodes n WHERE n.id = ANY($1::text[]) ORDER BY n.id FOR NO KEY UPDATE`);
const HELD_BY_NODES = sql(`
  SELECT node_id AS "nodeId", lane_id AS "laneId", count(*) AS held FROM open_tasks WHERE node_id = ANY($1::text[])
  GROUP BY node_id, lane_id`);
/** From one lane's first task to the next lane's: as many steps as there are lanes with tasks that a node may take. */
export const READY_LANES = sql(`
  WITH RECURSIVE waiting (lane_id) AS (
    (SELECT lane_id FROM open_tasks WHERE state = 'ready' AND NOT parked ORDER BY lane_id LIMIT 1)
    UNION ALL
    SELECT (SELECT o.lane_id FROM open_tasks o WHERE o.state = 'ready' AND NOT o.parked AND o.lane_id > waiting.lane_id
      ORDER BY o.lane_id LIMIT 1)
    FROM waiting WHERE waiting.lane_id IS NOT NULL),
  untouched (lane_id) AS (
    (SELECT lane_id FROM fresh ORDER BY lane_id LIMIT 1)
    UNION ALL
    SELECT (SELECT f.lane_id FROM fresh f WHERE f.lane_id > untouched.lane_id ORDER BY f.lane_id LIMIT 1)
    FROM untouched WHERE untouched.lane_id IS NOT NULL)
  SELECT lane_id AS "laneId" FROM waiting WHERE lane_id IS NOT NULL
  UNION SELECT lane_id FROM untouched WHERE lane_id IS NOT NULL ORDER BY 1`);
const WEIGHTS = sql('SELECT domain_id AS "domainId", weight FROM domains');
const FRONTS = sql(`
  SELECT l.id AS "laneId", f.rank, f.job_seq AS "jobSeq", f.no, f.count, f.range, f.since FROM unnest($1::integer[]) AS l (id)
  CROSS JOIN LATERAL (
    (SELECT o.rank, o.job_seq, o.no, 1 AS count, false AS range, o.updated_at AS since FROM open_tasks o
     WHERE o.lane_id = l.id AND o.state = 'ready' AND NOT o.parked AND (o.deadline_at IS NULL OR o.deadline_at > $3)
     ORDER BY o.rank, o.job_seq, o.no LIMIT $2)
    UNION ALL
    (SELECT r.rank, r.job_seq, r.no, r.count, true, r.since FROM (
       SELECT f.rank, f.job_seq, f.first_no AS no, f.since, f.last_no - f.first_no + 1 AS count, sum(f.last_no - f.first_no + 1)
         OVER (ORDER BY f.rank, f.job_seq, f.last_no ROWS UNBOUNDED PRECEDING) AS total
       FROM fresh f WHERE f.lane_id = l.id ORDER BY f.rank, f.job_seq, f.last_no LIMIT $2) AS r
     WHERE r.total - r.count < $2)) AS f`);
const TAKE_TASKS = sql(`
  SELECT t.* FROM unnest($1::integer[], $2::integer[]) AS l (id, count) CROSS JOIN LATERAL (
    SELECT ${OPEN_COLUMNS}, ${specAt('o.job_seq', 'o.no')} AS spec FROM open_tasks o
    WHERE o.lane_id = l.id AND o.state = 'ready' AND NOT o.parked
      AND (o.deadline_at IS NULL OR o.deadline_at > (SELECT millis($3)))
    ORDER BY o.rank, o.job_seq, o.no LIMIT l.count FOR UPDATE OF o SKIP LOCKED) AS t`);
const TAKE_RANGES = sql(`
  SELECT r.* FROM unnest($1::integer[], $2::integer[]) AS l (id, count) CROSS JOIN LATERAL (
    SELECT ${RANGE_COLUMNS},
      (SELECT b.body FROM task_blocks b WHERE b.job_seq = f.job_seq AND b.block = f.last_no / ${BLOCK}) AS body
    FROM fresh f WHERE f.lane_id = l.id ORDER BY f.rank, f.job_seq, f.last_no LIMIT l.count FOR UPDATE OF f SKIP LOCKED) AS r`);
const SHRINK_RANGES = sql(`
  UPDATE fresh f SET first_no = u.first_no
  FROM unnest($1::integer[], $2::bigint[], $3::bigint[], $4::integer[], $5::integer[]) AS u (lane_id, rank, job_seq, last_no, first_no)
  WHERE f.lane_id = u.lane_id AND f.rank = u.rank AND f.job_seq = u.job_seq AND f.last_no = u.last_no`);
const REMOVE_RANGES = sql(`
  DELETE FROM fresh f USING unnest($1::integer[], $2::bigint[], $3::bigint[], $4::integer[]) AS u (lane_id, rank, job_seq, last_no)
  WHERE f.lane_id = u.lane_id AND f.rank = u.rank AND f.job_seq = u.job_seq AND f.last_no = u.last_no`);
const AWAIT_RANGE = sql(`
  SELECT 1 FROM fresh WHERE lane_id = $1 AND rank = $2 AND job_seq = $3 ORDER BY last_no LIMIT 1 FOR UPDATE`);
const AWAIT_TASK = sql('SELECT 1 FROM open_tasks WHERE job_seq = $1 AND no = $2 FOR UPDATE');
const NOW = sql('SELECT millis($1) AS now');

/** How often to ask again when others have locked all there is. */
const MAX_TRIES = 20;

/** Lanes are looked into so far at first, where there are many: each would have to be able to give all that is wanted. */
const MIN_LOOK = 16;

/** What a request may get at most, or why nothing. */
type Room =
  | { readonly kind: 'room'; readonly node: NodeRow; readonly want: number; readonly usage: Usage | null }
  | { readonly kind: 'busy' }
  | { readonly kind: 'refused'; readonly error: MillraceError };

interface Held {
  readonly nodeId: string;
  readonly laneId: number;
  readonly held: number;
}

/** What a request is to be served from, in that order, as far as its node may have it. */
type Tiers = readonly (readonly Lane[])[];

/** What there is to have, as of some moment. */
interface Look {
  readonly nodes: readonly NodeRow[];
  readonly held: readonly Held[];
  readonly ready: readonly Lane[];
  readonly weights: ReadonlyMap<string, number>;
  readonly now: number;
}

type Ask = <R>(statement: Statement, values: readonly Value[]) => Promise<R[]>;

export class Leasing {
  readonly #database: Database;
  readonly #settings: WorkSettings;
  readonly #turns = new Turns();
  /** The last call gave all that was asked for: there is probably more, and no need to look without locks first. */
  #plenty = false;

  constructor(database: Database, settings: WorkSettings) {
    this.#database = database;
    this.#settings = settings;
  }

  /** @see Store.lease */
  async lease(requests: readonly LeaseRequest[]): Promise<Answers<LeaseAnswer>> {
    const changes: StoreChange[] = [];
    for (let tries = 1; ; tries += 1) {
      const { answers, missed } = await this.#try(requests);
      changes.push(...answers.changes);
      if (missed === null || tries === MAX_TRIES) return { outcomes: answers.outcomes, changes };
      // Another dispatcher is taking from what is first: wait until it has, holding nothing.
      await this.#database.transaction('call', (transaction) =>
        missed.range
          ? transaction.rows(AWAIT_RANGE, [missed.laneId, missed.rank, missed.jobSeq])
          : transaction.rows(AWAIT_TASK, [missed.jobSeq, missed.no]),
      );
    }
  }

  /** `missed`: something that should have been given out and was locked by others, or was not to be had after all. */
  async #try(
    requests: readonly LeaseRequest[],
  ): Promise<{ readonly answers: Answers<LeaseAnswer>; readonly missed: Front | null }> {
    const nodeIds = [...new Set(requests.map(({ nodeId }) => nodeId))];
    let plan: Plan | null = null;
    if (!this.#plenty) {
      // Without locks first: who asks when there is nothing to have, and most who poll do, costs one look and no commit.
      const look = await this.#database.several((ask) => this.#look(ask, READ_NODES, nodeIds));
      plan = await this.#plan((statement, values) => this.#database.rows(statement, values), requests, look);
      if (plan.first === null) {
        return { answers: { outcomes: plan.rooms.map(answerOf), changes: [] }, missed: null };
      }
    }
    const { value, changes } = await inUnit(this.#database, this.#settings, async (unit) => {
      const ask: Ask = (statement, values) => unit.transaction.rows(statement, values);
      const known = plan;
      const shelves = new Shelves(unit);
      // What the nodes may have is decided by what is true now that they are locked.
      const [look] = await Promise.all([
        this.#look(ask, LOCK_NODES, nodeIds, known),
        known && shelves.fetch(known.counts),
      ]);
      const now = known
        ? { ...known, rooms: this.#rooms(requests, look) }
        : await this.#plan(ask, requests, look);
      if (!known) await shelves.fetch(now.counts);
      return await this.#grant(unit, requests, now, look, shelves);
    });
    const { outcomes, given, missed } = value;
    this.#plenty = given > 0 && given >= wantedOf(requests);
    return { answers: { outcomes, changes }, missed: missed ? value.first : null };
  }

  /** `known`: what was looked at before need not be again. */
  async #look(
    ask: Ask,
    nodes: Statement,
    nodeIds: readonly string[],
    known: Plan | null = null,
  ): Promise<Look> {
    const { queues } = this.#settings;
    const [rows, held, ready, weights, time] = await Promise.all([
      ask<StoredNode>(nodes, [nodeIds]),
      ask<Held>(HELD_BY_NODES, [nodeIds]),
      known ? [] : ask<{ laneId: number }>(READY_LANES, []),
      known ? [] : ask<{ domainId: string; weight: number }>(WEIGHTS, []),
      known ? [] : ask<{ now: number }>(NOW, [this.#database.given]),
    ]);
    await queues.loadLanes([...ready, ...held].map(({ laneId }) => laneId));
    return {
      nodes: rows.map(nodeOf),
      held,
      ready: ready.map(({ laneId }) => queues.lane(laneId)),
      weights: known?.weights ?? new Map(weights.map(({ domainId, weight }) => [domainId, weight])),
      now: known?.now ?? time[0]?.now ?? 0,
    };
  }

  /** Plays the requests through over what the lanes begin with. */
  async #plan(ask: Ask, requests: readonly LeaseRequest[], look: Look): Promise<Plan> {
    const { weights, now } = look;
    const rooms = this.#rooms(requests, look);
    const all = tiersOf(requests, rooms, look.ready);
    let want = 0;
    for (const room of rooms) if (room.kind === 'room') want += room.want;
    // Whoever is further back would be next only if those in front had nothing that fits.
    const near = this.#nearest(all, want);
    const some = Math.max(MIN_LOOK, Math.ceil((4 * want) / Math.max(1, near.lanes.size)));
    const looks = [{ ...near, depth: near.lanes.size === 1 ? want : Math.min(want, some) }];
    if (looks[0]?.depth !== want) looks.push({ ...near, depth: want });
    if (near.cut) looks.push({ ...this.#nearest(all, Infinity), depth: want });
    let plan: Plan = { rooms, tiers: all, counts: new Map(), first: null, weights, now };
    for (const { tiers, lanes, cut, depth } of looks) {
      if (lanes.size === 0) break;
      const fronts = await ask<Front>(FRONTS, [[...lanes], depth, now]);
      // What is played through counts on usages of its own.
      const rehearsed = { ...plan, tiers, rooms: this.#rooms(requests, look) };
      const { counts, first, emptied, short } = this.#play(requests, rehearsed, fronts, depth);
      plan = { ...plan, tiers, counts, first };
      // Whether the rest of a lane comes before what others have is not known: look further.
      if (!emptied && !(cut && short)) break;
    }
    return plan;
  }

  /** Of each tier the lanes of so many domains whose turns come first. `cut`: there are others. */
  #nearest(all: ReadonlyMap<number, Tiers>, domains: number) {
    const lanes = new Set<number>();
    const known = new Map<Tiers, Tiers>();
    let cut = false;
    const nearest = (tier: readonly Lane[]): readonly Lane[] => {
      const passes = new Map(tier.map(({ domainId }) => [domainId, this.#turns.pass(domainId)]));
      if (passes.size <= domains) return tier;
      cut = true;
      const order = [...passes].toSorted(([a, x], [b, y]) => x - y || (a < b ? -1 : 1));
      const near = new Set(order.slice(0, domains).map(([domainId]) => domainId));
      return tier.filter(({ domainId }) => near.has(domainId));
    };
    const tiers = new Map<number, Tiers>();
    for (const [index, own] of all) {
      const kept = known.get(own) ?? own.map(nearest);
      known.set(own, kept);
      tiers.set(index, kept);
      for (const lane of kept.flat()) lanes.add(lane.id);
    }
    return { tiers, lanes, cut };
  }

  #play(
    requests: readonly LeaseRequest[],
    { rooms, tiers, weights, now }: Plan,
    fronts: readonly Front[],
    depth: number,
  ) {
    const byLane = new Map<number, Front[]>();
    for (const front of fronts) {
      const own = byLane.get(front.laneId);
      if (own) own.push(front);
      else byLane.set(front.laneId, [front]);
    }
    const frontOf = new Map<Item, Front>();
    const items = new Map<number, Item[]>();
    const full = new Set<number>();
    for (const [laneId, own] of byLane) {
      const expanded: Item[] = [];
      for (const front of own.toSorted(byRankAndAge)) {
        for (let index = 0; index < front.count && expanded.length < depth; index += 1) {
          const item = {
            laneId,
            rank: front.rank,
            jobSeq: front.jobSeq,
            no: front.no + index,
            since: front.since,
          };
          frontOf.set(item, front);
          expanded.push(item);
        }
      }
      items.set(laneId, expanded);
      if (expanded.length >= depth) full.add(laneId);
    }
    const table = new Table(items, new Rehearsal(this.#turns), weights, now);
    const counts = new Map<number, Count>();
    const ranges = new Set<Front>();
    let first: Front | null = null;
    let short = false;
    for (const [index] of requests.entries()) {
      const room = rooms[index];
      if (room?.kind !== 'room') continue;
      const picked = table.serve(tiers.get(index) ?? [], room.want, room.usage);
      short ||= picked.length < room.want;
      for (const item of picked) {
        const front = frontOf.get(item);
        if (!front) continue;
        first ??= front;
        const count = counts.get(front.laneId) ?? { tasks: 0, ranges: 0, inRanges: 0 };
        counts.set(front.laneId, count);
        if (!front.range) count.tasks += 1;
        else {
          if (!ranges.has(front)) count.ranges += 1;
          ranges.add(front);
          count.inRanges += 1;
        }
      }
    }
    const emptied = [...full].some((laneId) => table.isEmpty(laneId));
    return { counts, first, emptied, short };
  }

  /** Gives out what was locked. */
  async #grant(unit: Unit, requests: readonly LeaseRequest[], plan: Plan, look: Look, shelves: Shelves) {
    const { transaction } = unit;
    const { queues, names } = this.#settings;
    const locked = [...shelves.tasks.values()].flat();
    await unit.lockJobs(locked.map(({ jobSeq }) => jobSeq));
    const held = await lockKeys(transaction, locked);
    const full: Task[] = [];
    const items = new Map<number, TaskItem[]>();
    for (const [laneId, tasks] of shelves.tasks) {
      items.set(
        laneId,
        tasks.map((task) => ({
          laneId,
          rank: -task.priority,
          jobSeq: task.jobSeq,
          no: task.no,
          since: task.updatedAt,
          task,
        })),
      );
    }
    const table = new Table(items, this.#turns, plan.weights, look.now || transaction.now, ({ task }) => {
      if (task.keyId === null) return true;
      const count = held.get(task.keyId) ?? 0;
      if (count < (task.keyLimit ?? 0)) return true;
      full.push(task);
      return false;
    });
    const given: Task[] = [];
    const grants = requests.map((_, index) => {
      const room = plan.rooms[index];
      if (room?.kind !== 'room') return null;
      const picked = table.serve(plan.tiers.get(index) ?? [], room.want, room.usage, ({ task }) => {
        if (task.keyId !== null) held.set(task.keyId, (held.get(task.keyId) ?? 0) + 1);
      });
      const tasks = picked.map(({ task }) => task);
      given.push(...tasks);
      return tasks;
    });
    park(transaction, full);
    // What was locked and not given out stays ready; whoever passed over it meanwhile should look again.
    if (shelves.close(given)) unit.changes.runnable = true;
    for (const seq of new Set(given.map(({ jobSeq }) => jobSeq))) {
      const job = unit.job(seq);
      if (!job.ownTaskIds) names.learn(seq, job.id, job.taskCount);
    }
    const outcomes = requests.map(({ nodeId, start }, index): Outcome<LeaseAnswer> => {
      const room = plan.rooms[index] ?? NO_ROOM;
      const tasks = grants[index];
      if (room.kind !== 'room' || !tasks) return answerOf(room);
      const leases = tasks.map((task): GrantedLease => {
        unit.grant(task, nodeId, start, room.usage !== null);
        const job = unit.job(task.jobSeq);
        const line = lineOf(task);
        return {
          leaseId: task.leaseId ?? '',
          expiresAt: isoTime(task.leaseExpiresAt ?? 0),
          domainId: job.domainId,
          task: taskRecord(unit.idOf(task), line, task, job, queues.get(line.queueId), 0, []),
          traceparent: job.traceparent,
        };
      });
      return { ok: true, value: { leases, busy: false } };
    });
    const open = plan.rooms.some(({ kind }) => kind === 'room');
    const missed =
      given.length === 0 && open && plan.first !== null && (locked.length === 0 || full.length > 0);
    return { outcomes, given: given.length, missed, first: plan.first };
  }

  /** Earlier requests of a node come first. */
  #rooms(requests: readonly LeaseRequest[], { nodes, held }: Look): Room[] {
    const byId = new Map(nodes.map((node) => [node.id, node]));
    const used = new Map<string, number>();
    const usages = new Map<string, Usage>();
    for (const { id, resources } of nodes) if (resources != null) usages.set(id, new Usage(resources));
    for (const { nodeId, laneId, held: count } of held) {
      used.set(nodeId, (used.get(nodeId) ?? 0) + count);
      usages.get(nodeId)?.add(this.#settings.queues.lane(laneId).queue.resources, count);
    }
    return requests.map(({ nodeId, max }): Room => {
      const node = byId.get(nodeId);
      if (!node)
        return { kind: 'refused', error: new MillraceError('not_found', `node ${nodeId} does not exist`) };
      if (!Number.isSafeInteger(max) || max < 1) {
        const error = new MillraceError(
          'invalid_argument',
          `a node must ask for at least 1 task, got ${max}`,
        );
        return { kind: 'refused', error };
      }
      const free = node.maxConcurrency - (used.get(nodeId) ?? 0);
      if (free <= 0) return { kind: 'busy' };
      const want = Math.min(max, free);
      used.set(nodeId, (used.get(nodeId) ?? 0) + want);
      return { kind: 'room', node, want, usage: usages.get(nodeId) ?? null };
    });
  }
}

/** What to lock, and for whom. */
interface Plan {
  readonly rooms: readonly Room[];
  /** By the request's index; those who may have nothing are left out. */
  readonly tiers: ReadonlyMap<number, Tiers>;
  readonly counts: ReadonlyMap<number, Count>;
  /** What the first of them should get. */
  readonly first: Front | null;
  readonly weights: ReadonlyMap<string, number>;
  readonly now: number;
}

const NO_ROOM: Room = { kind: 'busy' };

function answerOf(room: Room): Outcome<LeaseAnswer> {
  if (room.kind === 'refused') return { ok: false, error: room.error };
  return { ok: true, value: { leases: [], busy: room.kind === 'busy' } };
}

function wantedOf(requests: readonly LeaseRequest[]): number {
  return requests.reduce((sum, { max }) => sum + Math.max(1, max), 0);
}

/** Requests that the same lanes can serve share one list. */
function tiersOf(
  requests: readonly LeaseRequest[],
  rooms: readonly Room[],
  ready: readonly Lane[],
): Map<number, Tiers> {
  const known = new Map<string, Tiers>();
  const tiers = new Map<number, Tiers>();
  requests.forEach(({ capabilities }, index) => {
    const room = rooms[index];
    if (room?.kind !== 'room') return;
    const preferred: Lane[] = [];
    const other: Lane[] = [];
    // Lanes of many domains share few queues.
    const matched = new Map<number, ReturnType<typeof match>>();
    for (const lane of ready) {
      const { queue } = lane;
      let tier = matched.get(queue.id);
      if (tier === undefined) {
        const wanted = capabilities === null || capabilities.includes(queue.capability);
        tier = wanted ? match(queue, room.node) : 'never';
        matched.set(queue.id, tier);
      }
      if (tier !== 'never') (tier === 'preferred' ? preferred : other).push(lane);
    }
    if (preferred.length + other.length === 0) return;
    const key = [preferred, other].map((lanes) => lanes.map(({ id }) => id).join(',')).join(';');
    const own = known.get(key) ?? [preferred, other];
    known.set(key, own);
    tiers.set(index, own);
  });
  return tiers;
}

/** A ready task, as far as it matters for the order. */
interface Item extends Place {
  readonly laneId: number;
  readonly rank: number;
  /** When it became ready. */
  readonly since: number;
}

interface TaskItem extends Item {
  readonly task: Task;
}

/** A ready task, or the first of a range of them. */
interface Front extends Item {
  readonly count: number;
  readonly range: boolean;
}

function byRankAndAge(a: Item, b: Item): number {
  return a.rank - b.rank || a.jobSeq - b.jobSeq || a.no - b.no;
}

interface Passes {
  next(domains: Iterable<string>): string | null;
  charge(domain: string, weight: number): void;
}

/** Turns that are only played through. */
class Rehearsal implements Passes {
  readonly #turns: Turns;
  readonly #passes = new Map<string, number>();

  constructor(turns: Turns) {
    this.#turns = turns;
  }

  next(domains: Iterable<string>): string | null {
    let best: string | null = null;
    let least = Infinity;
    for (const domain of domains) {
      const pass = this.#passOf(domain);
      if (pass < least || (pass === least && best !== null && domain < best)) {
        best = domain;
        least = pass;
      }
    }
    return best;
  }

  charge(domain: string, weight: number): void {
    this.#passes.set(domain, this.#passOf(domain) + 1 / weight);
  }

  #passOf(domain: string): number {
    return this.#passes.get(domain) ?? this.#turns.pass(domain);
  }
}

/** What there is, from which requests are served one after the other. */
class Table<T extends Item> {
  readonly #items: ReadonlyMap<number, readonly T[]>;
  readonly #at = new Map<number, number>();
  readonly #passes: Passes;
  readonly #weights: ReadonlyMap<string, number>;
  readonly #now: number;
  readonly #mayGo: (item: T) => boolean;

  /** `items` of each lane in order. `mayGo` false: it can be given to nobody, and is passed over. */
  constructor(
    items: ReadonlyMap<number, readonly T[]>,
    passes: Passes,
    weights: ReadonlyMap<string, number>,
    now: number,
    mayGo: (item: T) => boolean = () => true,
  ) {
    this.#items = items;
    this.#passes = passes;
    this.#weights = weights;
    this.#now = now;
    this.#mayGo = mayGo;
  }

  isEmpty(laneId: number): boolean {
    return this.#head(laneId) === undefined;
  }

  /** At most so many of what there is for a node with this usage, which is counted. */
  serve(tiers: Tiers, want: number, usage: Usage | null, onPick: (item: T) => void = () => {}): T[] {
    const picked: T[] = [];
    for (const tier of tiers) {
      const domains = new Map<string, Lane[]>();
      for (const lane of tier) {
        if (this.isEmpty(lane.id)) continue;
        const own = domains.get(lane.domainId);
        if (own) own.push(lane);
        else domains.set(lane.domainId, [lane]);
      }
      while (picked.length < want) {
        const domain = this.#passes.next(domains.keys());
        if (domain === null) break;
        const lanes = domains.get(domain) ?? [];
        const item = this.#first(lanes, usage);
        if (item === 'stop') return picked;
        if (item === null) {
          domains.delete(domain);
          continue;
        }
        this.#at.set(item.laneId, (this.#at.get(item.laneId) ?? 0) + 1);
        usage?.add(lanes.find(({ id }) => id === item.laneId)?.queue.resources);
        this.#passes.charge(domain, this.#weights.get(domain) ?? 1);
        onPick(item);
        picked.push(item);
      }
    }
    return picked;
  }

  /**
   * The first of these lanes by priority and age that fits. Lanes of which nothing does are taken off the list: what does not fit now will
   * not after more was taken. `stop`: one that does not fit has been overtaken for long enough.
   */
  #first(lanes: Lane[], usage: Usage | null): T | 'stop' | null {
    while (lanes.length > 0) {
      let best: T | undefined;
      let bestAt = 0;
      for (let at = 0; at < lanes.length; at += 1) {
        const head = this.#head(lanes[at]?.id ?? 0);
        if (head && (!best || byRankAndAge(head, best) < 0)) {
          best = head;
          bestAt = at;
        }
      }
      if (!best) return null;
      if (!usage || usage.shortage(lanes[bestAt]?.queue.resources) === null) return best;
      if (this.#now - best.since >= OVERTAKING_MS) return 'stop';
      lanes.splice(bestAt, 1);
    }
    return null;
  }

  #head(laneId: number): T | undefined {
    const items = this.#items.get(laneId) ?? [];
    let at = this.#at.get(laneId) ?? 0;
    for (; ; at += 1) {
      const item = items[at];
      if (item === undefined || this.#mayGo(item)) {
        this.#at.set(laneId, at);
        return item;
      }
    }
  }
}

/** What to lock of a lane: tasks that have rows of their own, ranges, and how many tasks of these. */
interface Count {
  tasks: number;
  ranges: number;
  inRanges: number;
}

/** A range that this transaction has locked. Its tasks are taken from the front. */
interface LockedRange {
  readonly range: Range;
  /** Its tasks, and how many of them were given out. */
  readonly count: number;
  given: number;
}

/** Ready tasks that this transaction has locked, by lane. */
class Shelves {
  readonly #unit: Unit;
  readonly #tasks = new Map<number, Task[]>();
  readonly #rangeOf = new Map<Task, LockedRange>();
  /** Those with rows of their own. */
  #own = 0;

  constructor(unit: Unit) {
    this.#unit = unit;
  }

  /** What was locked, by lane and in order. */
  get tasks(): ReadonlyMap<number, readonly Task[]> {
    return this.#tasks;
  }

  /** Locks so many of each lane, if there are so many that nobody else has locked. Once. */
  async fetch(counts: ReadonlyMap<number, Count>): Promise<void> {
    const own = [...counts].filter(([, { tasks }]) => tasks > 0);
    const ranges = [...counts].filter(([, { ranges: count }]) => count > 0);
    await Promise.all([
      ...(own.length > 0 ? [this.#fetchTasks(own)] : []),
      ...(ranges.length > 0 ? [this.#fetchRanges(ranges)] : []),
    ]);
    for (const tasks of this.#tasks.values()) tasks.sort(byPriorityAndAge);
  }

  async #fetchTasks(counts: readonly (readonly [number, Count])[]): Promise<void> {
    const { transaction } = this.#unit;
    const values = [counts.map(([laneId]) => laneId), counts.map(([, { tasks }]) => tasks)];
    const rows = await transaction.rows<Task>(TAKE_TASKS, [...values, transaction.given]);
    this.#own += rows.length;
    this.#shelve(this.#unit.adopt(rows));
  }

  async #fetchRanges(counts: readonly (readonly [number, Count])[]): Promise<void> {
    const values = [counts.map(([laneId]) => laneId), counts.map(([, { ranges }]) => ranges)];
    type Row = Range & { readonly body: string };
    const rows = await this.#unit.transaction.rows<Row>(TAKE_RANGES, values);
    const left = new Map(counts.map(([laneId, { inRanges }]) => [laneId, inRanges]));
    const taken = rows.map(({ body, ...range }) => {
      const wanted = left.get(range.laneId) ?? 0;
      const count = Math.min(wanted, range.lastNo - range.firstNo + 1);
      left.set(range.laneId, wanted - count);
      const from = range.firstNo % BLOCK;
      return { range, lines: body.split('\n', from + count).slice(from) };
    });
    // What is long is not in the blocks.
    const long = taken.flatMap(({ range: { jobSeq, firstNo }, lines }) =>
      lines.flatMap((line, index) => (line === '' ? [{ jobSeq, no: firstNo + index }] : [])),
    );
    const specs = new Map(
      (await this.#unit.specsOf(long)).map(({ jobSeq, no, spec }) => [`${jobSeq}:${no}`, spec]),
    );
    for (const { range, lines } of taken) {
      const { jobSeq, firstNo } = range;
      const full = lines.map((line, index) => line || (specs.get(`${jobSeq}:${firstNo + index}`) ?? ''));
      const locked = { range, count: range.lastNo - firstNo + 1, given: 0 };
      const tasks = this.#unit.adoptRange(range, full);
      for (const task of tasks) this.#rangeOf.set(task, locked);
      this.#shelve(tasks);
    }
  }

  #shelve(tasks: readonly Task[]): void {
    for (const task of tasks) {
      const shelf = this.#tasks.get(task.laneId);
      if (shelf) shelf.push(task);
      else this.#tasks.set(task.laneId, [task]);
    }
  }

  /** Takes what was given out off the ranges, all from their beginnings; true: tasks with rows of their own are left. */
  close(given: readonly Task[]): boolean {
    let own = 0;
    const changed = new Set<LockedRange>();
    for (const task of given) {
      const locked = this.#rangeOf.get(task);
      if (!locked) own += 1;
      else {
        locked.given += 1;
        changed.add(locked);
      }
    }
    this.#writeRanges([...changed]);
    return this.#own > own;
  }

  #writeRanges(changed: readonly LockedRange[]): void {
    const { transaction } = this.#unit;
    const keys = (ranges: readonly LockedRange[]) =>
      columns<LockedRange, number>(
        ranges,
        ({ range }) => range.laneId,
        ({ range }) => range.rank,
        ({ range }) => range.jobSeq,
        ({ range }) => range.lastNo,
      );
    const empty = changed.filter(({ count, given }) => given === count);
    if (empty.length > 0) transaction.send(REMOVE_RANGES, keys(empty));
    const rest = changed.filter(({ count, given }) => given < count);
    if (rest.length === 0) return;
    transaction.send(SHRINK_RANGES, [...keys(rest), rest.map(({ range, given }) => range.firstNo + given)]);
  }
}

function byPriorityAndAge(a: Task, b: Task): number {
  return b.priority - a.priority || a.jobSeq - b.jobSeq || a.no - b.no;
}
