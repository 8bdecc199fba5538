/**
 * Group commit for a store whose commit takes a while: what is asked for while one group is with the database forms the next.
 * A group holds calls of one kind, in the order of asking; the kind of the oldest call goes first.
 *
 * When a group fails as a whole for a reason of its content, each call is run again alone, so only the culprit fails. When
 * the storage failed, all of the group is refused, since running them one by one would only fail many times more slowly.
 */
import { MillraceError } from '@millrace/runner';
import type { Outcome } from '../store.ts';
import { closedError } from './group-commit.ts';

/** A group takes calls until their weights reach this, so that nobody waits long for the end of a burst. */
const MAX_GROUP_WEIGHT = 2048;

/** Work to be grouped with other work of its kind. */
export interface Call {
  readonly kind: string;
  /** What it roughly costs, in tasks. */
  readonly weight: number;
}

/** Runs a group of calls of one kind; one outcome for each. Rejects when the group failed as a whole. */
export type RunGroup<C extends Call> = (calls: readonly C[]) => Promise<readonly Outcome<unknown>[]>;

interface Waiting<C> {
  readonly call: C;
  readonly settle: (outcome: Outcome<unknown>) => void;
}

export class Lane<C extends Call> {
  readonly #run: RunGroup<C>;
  #waiting: Waiting<C>[] = [];
  #driving: Promise<void> | null = null;
  #closed = false;

  constructor(run: RunGroup<C>) {
    this.#run = run;
  }

  /** Resolves with the call's outcome once its group is committed. */
  ask<T>(call: C): Promise<T> {
    if (this.#closed) return Promise.reject(closedError());
    return new Promise<T>((resolve, reject) => {
      const settle = (outcome: Outcome<unknown>): void =>
        outcome.ok ? resolve(outcome.value as T) : reject(outcome.error);
      this.#waiting.push({ call, settle });
      this.#driving ??= this.#drive();
    });
  }

  /** Takes no more calls and resolves when those taken have settled. */
  async close(): Promise<void> {
    this.#closed = true;
    await this.#driving;
  }

  async #drive(): Promise<void> {
    // What else is asked for in this turn of the event loop shares the first group.
    await new Promise<void>((resolve) => void setImmediate(resolve));
    while (this.#waiting.length > 0) await this.#turn(this.#take());
    this.#driving = null;
  }

  #take(): Waiting<C>[] {
    const kind = this.#waiting[0]?.call.kind;
    const group: Waiting<C>[] = [];
    const rest: Waiting<C>[] = [];
    let weight = 0;
    for (const entry of this.#waiting) {
      if (entry.call.kind !== kind || weight >= MAX_GROUP_WEIGHT) rest.push(entry);
      else {
        group.push(entry);
        weight += entry.call.weight;
      }
    }
    this.#waiting = rest;
    return group;
  }

  async #turn(group: readonly Waiting<C>[]): Promise<void> {
    let outcomes: readonly Outcome<unknown>[];
    try {
      outcomes = await this.#run(group.map(({ call }) => call));
    } catch (error) {
      const refusal = MillraceError.from(error);
      if (group.length > 1 && !isStorageFailure(refusal)) {
        for (const entry of group) await this.#turn([entry]);
        return;
      }
      outcomes = group.map(() => ({ ok: false, error: refusal }));
    }
    for (const [index, { settle }] of group.entries()) {
      settle(
        outcomes[index] ?? {
          ok: false,
          error: new MillraceError('internal', 'a call of a group got no answer'),
        },
      );
    }
  }
}

function isStorageFailure({ code }: MillraceError): boolean {
  return code === 'unavailable' || code === 'resource_exhausted' || code === 'permission_denied';
}
