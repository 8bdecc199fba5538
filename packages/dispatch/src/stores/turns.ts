/**
 * Whose turn it is among domains that wait: weighted round robin by stride. Each domain has a pass, which grows by 1 / weight
 * with every task it is given; the least pass is next. Virtual time is the pass at which the newest task was given, and nobody
 * is behind it: a domain that had nothing to do comes back at that time, so it neither saved up turns nor lost any.
 *
 * Kept in memory only. A store that is opened again, or another dispatcher, begins with all at the same pass, which is as fair.
 */
import { MillraceError } from '@millrace/runner';
import { MAX_WEIGHT } from '../records.ts';

/** @throws MillraceError `invalid_argument` for a weight that no domain can have */
export function checkWeight(weight: number): void {
  if (Number.isSafeInteger(weight) && weight >= 1 && weight <= MAX_WEIGHT) return;
  throw new MillraceError(
    'invalid_argument',
    `the weight of a domain must be an integer from 1 to ${MAX_WEIGHT}, got ${weight}`,
  );
}

interface Turn {
  weight: number;
  /** The pass is this and `served / weight`: no sum of fractions, which would drift. */
  base: number;
  served: number;
}

/** Domains kept before those that are not ahead of virtual time are looked for. */
const LEAST_KEPT = 256;

export class Turns {
  readonly #turns = new Map<string, Turn>();
  #now = 0;
  #forgetAt = LEAST_KEPT;

  /** Domains remembered. */
  get size(): number {
    return this.#turns.size;
  }

  /** How far the domain is: who has the least is next. */
  pass(domain: string): number {
    const turn = this.#turns.get(domain);
    return turn === undefined ? this.#now : Math.max(this.#now, passOf(turn));
  }

  /** Of these, the one whose turn it is; at a tie the least id. Null: there are none. */
  next(domains: Iterable<string>): string | null {
    let best: string | null = null;
    let least = Infinity;
    for (const domain of domains) {
      const pass = this.pass(domain);
      if (pass < least || (pass === least && best !== null && domain < best)) {
        best = domain;
        least = pass;
      }
    }
    return best;
  }

  /** Notes that the domain was given so many tasks. `weight`: a whole number of at least 1. */
  charge(domain: string, weight: number, count = 1): void {
    let turn = this.#turns.get(domain);
    if (turn === undefined) {
      if (this.#turns.size >= this.#forgetAt) this.#forget();
      turn = { weight, base: this.#now, served: 0 };
      this.#turns.set(domain, turn);
    } else {
      const pass = passOf(turn);
      if (pass < this.#now || turn.weight !== weight) {
        turn.base = Math.max(this.#now, pass);
        turn.served = 0;
        turn.weight = weight;
      }
    }
    this.#now = Math.max(this.#now, turn.base + (turn.served + count - 1) / weight);
    const served = turn.served + count;
    turn.base += Math.floor(served / weight);
    turn.served = served % weight;
  }

  /** Whoever is not ahead of virtual time is where one that was never heard of is. */
  #forget(): void {
    for (const [domain, turn] of this.#turns) if (passOf(turn) <= this.#now) this.#turns.delete(domain);
    this.#forgetAt = Math.max(LEAST_KEPT, 2 * this.#turns.size);
  }
}

function passOf({ weight, base, served }: Turn): number {
  return base + served / weight;
}
