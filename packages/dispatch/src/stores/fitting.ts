/**
 * What fits on a node beside what it holds. A node that says what it has is filled by amounts; one that says nothing takes any
 * number of tasks, but none that asks for anything besides `cpu` and `memory`, which every machine has some of.
 *
 * Amounts are compared as whole thousandths in big integers: 2^53 bytes come to more thousandths than a number can count, and
 * 0.1 cores ten times are one core.
 */
import type { Resources } from '../resources.ts';

/**
 * A task that a node is large enough for, and that does not fit beside what the node holds, is overtaken by those of its
 * priority and below for so long since it became ready. Then the node takes none of these until it fits, so that small tasks
 * cannot keep a large one waiting for ever.
 */
export const OVERTAKING_MS = 30_000;

/** What a node that says nothing about itself may be asked for. */
const EVERYWHERE: ReadonlySet<string> = new Set(['cpu', 'memory']);

/** Of one name, how much is asked for and how much there is. */
export interface Shortage {
  readonly name: string;
  readonly needed: number;
  readonly free: number;
}

/**
 * What keeps a task from a node of this capacity, whatever else runs there; null: nothing. `capacity` null: the node does not
 * say. `demand` null or absent: the task names nothing.
 */
export function shortage(
  demand: Resources | null | undefined,
  capacity: Resources | null | undefined,
): Shortage | null {
  if (capacity == null) {
    for (const name in demand) if (!EVERYWHERE.has(name)) return { name, needed: demand[name] ?? 0, free: 0 };
    return null;
  }
  return firstShort(demand, capacity, NOTHING);
}

/** What is taken of a node that says what it has. */
export class Usage {
  readonly capacity: Resources;
  readonly #taken = new Map<string, bigint>();

  constructor(capacity: Resources) {
    this.capacity = capacity;
  }

  /** A task began, or several that ask for the same. */
  add(demand: Resources | null | undefined, count = 1): void {
    for (const [name, amount] of amountsOf(demand, this.capacity)) {
      this.#taken.set(name, (this.#taken.get(name) ?? 0n) + amount * BigInt(count));
    }
  }

  /** What is known to be taken, as {@link taken} tells it. */
  addTaken(amounts: Resources): void {
    for (const [name, amount] of thousandths(amounts)) {
      this.#taken.set(name, (this.#taken.get(name) ?? 0n) + amount);
    }
  }

  /** A task that was added ended. */
  remove(demand: Resources | null | undefined): void {
    for (const [name, amount] of amountsOf(demand, this.capacity)) {
      this.#taken.set(name, (this.#taken.get(name) ?? 0n) - amount);
    }
  }

  /** What keeps a task from the node beside what it holds; null: it fits. */
  shortage(demand: Resources | null | undefined): Shortage | null {
    return firstShort(demand, this.capacity, this.#taken);
  }

  /** By name, as far as it is anything. */
  taken(): Resources {
    const taken = [...this.#taken].filter(([, amount]) => amount > 0n);
    return Object.fromEntries(taken.map(([name, amount]) => [name, Number(amount) / 1000]));
  }
}

/** How many such tasks fit into what is left of a capacity; Infinity: they take nothing of it. */
export function fitting(
  demand: Resources | null | undefined,
  capacity: Resources,
  inUse: Resources | undefined,
): number {
  const [has, taken] = [thousandths(capacity), inUse === undefined ? NOTHING : thousandths(inUse)];
  let least = Infinity;
  for (const [name, amount] of amountsOf(demand, capacity)) {
    const free = (has.get(name) ?? 0n) - (taken.get(name) ?? 0n);
    least = Math.min(least, free <= 0n ? 0 : Number(free / amount));
  }
  return least;
}

type Amounts = ReadonlyMap<string, bigint>;

const NOTHING: Amounts = new Map();
const ONE_CPU: Amounts = new Map([['cpu', 1000n]]);

/** Thousandths by name. The objects are those of queues and nodes, which stay. */
const known = new WeakMap<Resources, Amounts>();

function thousandths(resources: Resources): Amounts {
  let amounts = known.get(resources);
  if (!amounts) {
    amounts = new Map(
      Object.entries(resources).map(([name, amount]) => [name, BigInt(amount.toFixed(3).replace('.', ''))]),
    );
    known.set(resources, amounts);
  }
  return amounts;
}

/** What a task takes of the node. One that does not name `cpu` takes one core where cores are counted. */
function amountsOf(demand: Resources | null | undefined, capacity: Resources): Amounts {
  const counted = Object.hasOwn(capacity, 'cpu');
  if (demand == null) return counted ? ONE_CPU : NOTHING;
  const amounts = thousandths(demand);
  return counted && !amounts.has('cpu') ? new Map([...amounts, ...ONE_CPU]) : amounts;
}

function firstShort(
  demand: Resources | null | undefined,
  capacity: Resources,
  taken: Amounts,
): Shortage | null {
  const has = thousandths(capacity);
  for (const [name, amount] of amountsOf(demand, capacity)) {
    const free = (has.get(name) ?? 0n) - (taken.get(name) ?? 0n);
    if (amount > free) return { name, needed: Number(amount) / 1000, free: Math.max(0, Number(free) / 1000) };
  }
  return null;
}
