/** Weights of domains, and whose turn it is among them. Synchronous; the caller brings the transaction. */
import type { Database, Statement } from './sqlite-database.ts';
import { Turns, checkWeight } from './turns.ts';

export class Domains {
  readonly turns = new Turns();
  /** Those other than 1. */
  readonly #weights = new Map<string, number>();
  readonly #select: Statement;
  readonly #replace: Statement;
  readonly #delete: Statement;

  constructor(database: Database) {
    this.#select = database.prepare('SELECT domain_id, weight FROM domains');
    this.#replace = database.prepare('REPLACE INTO domains (domain_id, weight) VALUES (?, ?)');
    this.#delete = database.prepare('DELETE FROM domains WHERE domain_id = ?');
  }

  /** Reads the committed state. Before the first use and after every rollback; turns go on as they were. */
  load(): void {
    this.#weights.clear();
    for (const [id, weight] of this.#select.all()) this.#weights.set(id as string, weight as number);
  }

  weight(domainId: string): number {
    return this.#weights.get(domainId) ?? 1;
  }

  /** Domains with another weight than 1. */
  weighted(): Iterable<string> {
    return this.#weights.keys();
  }

  /** @throws MillraceError `invalid_argument` */
  setWeight(domainId: string, weight: number): void {
    checkWeight(weight);
    if (weight === 1) {
      this.#delete.run(domainId);
      this.#weights.delete(domainId);
    } else {
      this.#replace.run(domainId, weight);
      this.#weights.set(domainId, weight);
    }
  }
}
