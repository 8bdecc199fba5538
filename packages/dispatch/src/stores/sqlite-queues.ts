/**
 * Sets of demands on a node: a queue is all tasks with the same ones, and a node is matched against queues. Which of their tasks
 * are ready, and in which order, is for `sqlite-lanes.ts`. Synchronous; the caller brings the transaction.
 */
import { MillraceError } from '@millrace/runner';
import type { TaskState } from '../lifecycle.ts';
import type { CapabilityFilters, NodeMode } from '../records.ts';
import type { Resources } from '../resources.ts';
import { match } from './matching.ts';
import type { Demand } from './matching.ts';
import type { Database, Statement } from './sqlite-database.ts';
import type { Shelf } from './sqlite-lanes.ts';
import type { Node } from './sqlite-nodes.ts';

export interface Queue extends Demand {
  readonly id: number;
  /** What each task takes of a node; null: it names nothing. */
  readonly resources: Resources | null;
  /** Tasks that are ready, and those of them whose key is full. Kept by the lanes, like the two that follow. */
  ready: number;
  limited: number;
  /** By domain. */
  readonly shelves: Map<string, Shelf>;
  /** Those with tasks that may be leased. */
  readonly active: Set<Shelf>;
  /** Tasks that wait for a stage; for their time; that a node holds. */
  blocked: number;
  delayed: number;
  held: number;
}

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
  readonly resources?: Resources | null;
}

export class Queues {
  readonly #database: Database;
  readonly #all: Queue[] = [];
  readonly #byDemand = new Map<string, Queue>();
  readonly #matches = new Map<string, Matches>();
  /** Whose counts in the table are not those in memory. */
  readonly #changed = new Set<Queue>();
  readonly #saveCounts: (...values: readonly number[]) => void;
  readonly #select: Statement;
  readonly #insert: Statement;

  constructor(database: Database) {
    this.#database = database;
    this.#select = database.prepare(
      'SELECT id, capability, filters, mode, organization_id, resources, blocked, delayed FROM queues ORDER BY id',
    );
    this.#saveCounts = database.prepareCounted('UPDATE queues SET blocked = ?, delayed = ? WHERE id = ?');
    this.#insert = database.prepare(
      'INSERT INTO queues (id, capability, filters, mode, organization_id, resources) VALUES (?, ?, ?, ?, ?, ?)',
    );
  }

  /** Reads the committed state. Nothing is ready or held yet. */
  load(): void {
    this.#byDemand.clear();
    this.#matches.clear();
    this.#all.length = 0;
    this.#changed.clear();
    for (const [
      id,
      capability,
      filters,
      mode,
      organization,
      resources,
      blocked,
      delayed,
    ] of this.#select.all()) {
      this.#add(
        id as number,
        {
          capability: capability as string,
          filters: JSON.parse(filters as string) as CapabilityFilters,
          mode: mode as NodeMode,
          organizationId: organization === '' ? null : (organization as string),
          resources: resources === '' ? null : (JSON.parse(resources as string) as Resources),
        },
        blocked as number,
        delayed as number,
      );
    }
  }

  /** Writes what was counted. */
  flush(): void {
    for (const { id, blocked, delayed } of this.#changed) this.#saveCounts(blocked, delayed, id);
    this.#changed.clear();
  }

  /** Counts tasks that came to be in a state, or with a number below 0 left it. Those that are ready count themselves. */
  count(id: number, state: TaskState, by: number): void {
    const queue = this.get(id);
    switch (state) {
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
      case 'ready':
      case 'completed':
      case 'failed':
      case 'canceled':
        return;
      default:
        state satisfies never;
    }
  }

  all(): Iterable<Queue> {
    return this.#all;
  }

  get(id: number): Queue {
    const queue = this.#all[id - 1];
    if (!queue) throw new MillraceError('internal', `queue ${id} does not exist`);
    return queue;
  }

  /** The queue of tasks with these demands, made when it is the first. */
  of(
    { capability, capability_filters, mode, resources = null }: Demanding,
    organizationId: string | null,
  ): Queue {
    const filters = Object.fromEntries(
      Object.entries(capability_filters).toSorted(([a], [b]) => (a < b ? -1 : 1)),
    );
    const demand = { capability, filters, mode, organizationId, resources };
    const known = this.#byDemand.get(keyOf(demand));
    if (known) return known;
    const id = this.#all.length + 1;
    this.#insert.run(
      id,
      capability,
      JSON.stringify(filters),
      mode,
      organizationId ?? '',
      resources === null ? '' : JSON.stringify(resources),
    );
    return this.#add(id, demand, 0, 0);
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

  /** The queue, and those that nodes of this queue take from as well. */
  sharing(queue: Queue): Set<Queue> {
    const queues = new Set([queue]);
    for (const { preferred, other } of this.#matches.values()) {
      const both = [...preferred, ...other];
      if (both.includes(queue)) for (const shared of both) queues.add(shared);
    }
    return queues;
  }

  /** Ids are given out in order from 1 and never reused, so the position tells the id. */
  #add(
    id: number,
    demand: Demand & { readonly resources: Resources | null },
    blocked: number,
    delayed: number,
  ): Queue {
    const queue: Queue = {
      ...demand,
      id,
      ready: 0,
      limited: 0,
      shelves: new Map(),
      active: new Set(),
      blocked,
      delayed,
      held: 0,
    };
    this.#all.push(queue);
    this.#byDemand.set(keyOf(queue), queue);
    return queue;
  }
}

function keyOf({ capability, filters, mode, organizationId, resources }: Demand): string {
  return JSON.stringify([capability, filters, mode, organizationId, resources]);
}
