/**
 * Group commit: operations asked for in one turn of the event loop run in one transaction and share its sync, which is
 * what makes "acknowledged means durable" affordable. A promise settles after the commit that carries its effects, in
 * the order of asking.
 *
 * An operation is synchronous. One that throws before it wrote anything is refused alone and the transaction goes on. One
 * that throws after writing (a bug, a constraint) poisons the transaction: it is rolled back and every operation of the
 * turn is run again in a transaction of its own, so only the culprit fails. When the storage itself fails (disk full, I/O
 * error) the whole turn is refused, since running it again one by one would only fail many times more slowly.
 */
import { MillraceError } from '@millrace/runner';

/** The transaction behind the group. All methods are synchronous. */
export interface Transaction {
  begin(): void;
  /** Called when the operations have run: adds what nobody asked for in this turn but may share the commit. */
  extend(): void;
  /** After this the effects are on the disk. Throws: nothing is. */
  commit(): void;
  /** Undoes everything since `begin`, in the database and in memory. */
  rollback(): void;
  /** Grows with every write since the program started. */
  readonly writes: number;
  /** The error to answer with when the storage itself failed; null for any other error. */
  storageError(error: unknown): MillraceError | null;
  /** Called after each commit that wrote something. */
  committed(): void;
}

/** Calls `run` later, once: `setImmediate` in production, a microtask in simulations. */
export type Schedule = (run: () => void) => void;

interface Operation {
  /** What it roughly costs, in tasks. */
  readonly weight: number;
  work(): unknown;
  resolve(value: unknown): void;
  reject(error: unknown): void;
}

/** One transaction takes operations until their weights reach this, so that a burst does not hold the event loop. */
export const MAX_GROUP_WEIGHT = 2048;

export class GroupCommit {
  readonly #transaction: Transaction;
  readonly #schedule: Schedule;
  #waiting: Operation[] = [];
  #scheduled = false;
  #closed = false;
  #idle: (() => void)[] = [];

  constructor(transaction: Transaction, schedule: Schedule = setImmediate) {
    this.#transaction = transaction;
    this.#schedule = schedule;
  }

  /** Resolves with what `work` returned once it is committed. `weight`: the tasks it touches, about. */
  run<T>(weight: number, work: () => T): Promise<T> {
    if (this.#closed) return Promise.reject(closedError());
    return new Promise<T>((resolve, reject) => {
      this.#waiting.push({ weight, work, resolve: (value) => resolve(value as T), reject });
      this.#arm();
    });
  }

  /** Takes no more operations and resolves when those taken have settled. */
  async close(): Promise<void> {
    this.#closed = true;
    if (this.#waiting.length > 0) await new Promise<void>((resolve) => this.#idle.push(resolve));
  }

  #arm(): void {
    if (this.#scheduled) return;
    this.#scheduled = true;
    this.#schedule(() => {
      this.#scheduled = false;
      this.#turn();
      if (this.#waiting.length > 0) this.#arm();
      else for (const resolve of this.#idle.splice(0)) resolve();
    });
  }

  #turn(): void {
    let weight = 0;
    let count = 0;
    while (count < this.#waiting.length && weight < MAX_GROUP_WEIGHT) {
      weight += this.#waiting[count]?.weight ?? 0;
      count += 1;
    }
    const group = this.#waiting.splice(0, count);
    if (!this.#attempt(group, true)) for (const operation of group) this.#attempt([operation], false);
  }

  /**
   * Runs a group in one transaction, extended the first time, and settles all of it; false: it was rolled back, nothing was
   * settled, and each operation is to be run alone.
   */
  #attempt(group: readonly Operation[], first: boolean): boolean {
    const transaction = this.#transaction;
    const settle: (() => void)[] = [];
    const before = transaction.writes;
    let extending = false;
    try {
      transaction.begin();
      for (const operation of group) {
        const mark = transaction.writes;
        try {
          const value = operation.work();
          settle.push(() => operation.resolve(value));
        } catch (error) {
          if (transaction.writes !== mark || transaction.storageError(error) !== null) throw error;
          settle.push(() => operation.reject(error));
        }
      }
      if (first) {
        extending = true;
        transaction.extend();
        extending = false;
      }
      transaction.commit();
    } catch (error) {
      transaction.rollback();
      const storage = transaction.storageError(error);
      if (storage === null && (group.length > 1 || extending)) return false;
      const refusal = storage ?? MillraceError.from(error);
      for (const operation of group) operation.reject(refusal);
      return true;
    }
    for (const run of settle) run();
    if (transaction.writes !== before) transaction.committed();
    return true;
  }
}

/** What every verb of a closed store answers. */
export function closedError(): MillraceError {
  return new MillraceError('failed_precondition', 'the store is closed');
}
