/**
 * One subscription to the store, handed on to whoever waits for just one job or lease. Listeners hear of a change
 * after it is committed and then read the store: a signal says "look again", never what is there.
 */
import type { Clock } from '@millrace/runner';
import type { Store } from './store.ts';

export class Signals implements Disposable {
  readonly #runnable = new Set<() => void>();
  readonly #jobs = new Map<string, Set<() => void>>();
  readonly #leases = new Map<string, Set<() => void>>();
  readonly #logs = new Map<string, Set<() => void>>();
  readonly #subscription: Disposable;

  constructor(store: Store) {
    this.#subscription = store.subscribe((change) => {
      switch (change.kind) {
        case 'runnable':
          for (const listener of this.#runnable) listener();
          return;
        case 'job':
          for (const listener of this.#jobs.get(change.jobId) ?? []) listener();
          return;
        case 'cancel':
          for (const id of change.leaseIds) for (const listener of this.#leases.get(id) ?? []) listener();
          return;
        case 'logs':
          for (const id of change.taskIds) for (const listener of this.#logs.get(id) ?? []) listener();
          return;
        case 'anything':
          for (const listener of this.#runnable) listener();
          for (const waiters of [this.#jobs, this.#leases, this.#logs]) {
            for (const listeners of waiters.values()) for (const listener of listeners) listener();
          }
          return;
        default:
          change satisfies never;
      }
    });
  }

  /** A task became runnable. */
  onRunnable(listener: () => void): Disposable {
    this.#runnable.add(listener);
    return { [Symbol.dispose]: () => void this.#runnable.delete(listener) };
  }

  /** The job has new events. */
  onJob(jobId: string, listener: () => void): Disposable {
    return listen(this.#jobs, [jobId], listener);
  }

  /** The work of one of these leases should end. */
  onCancel(leaseIds: readonly string[], listener: () => void): Disposable {
    return listen(this.#leases, leaseIds, listener);
  }

  /** The log of an attempt of this task has grown. */
  onLogs(taskId: string, listener: () => void): Disposable {
    return listen(this.#logs, [taskId], listener);
  }

  [Symbol.dispose](): void {
    this.#subscription[Symbol.dispose]();
  }
}

function listen(
  listeners: Map<string, Set<() => void>>,
  keys: readonly string[],
  listener: () => void,
): Disposable {
  for (const key of keys) {
    const set = listeners.get(key);
    if (set === undefined) listeners.set(key, new Set([listener]));
    else set.add(listener);
  }
  return {
    [Symbol.dispose]: () => {
      for (const key of keys) {
        const set = listeners.get(key);
        if (set === undefined) continue;
        set.delete(listener);
        if (set.size === 0) listeners.delete(key);
      }
    },
  };
}

/** For one who reads the store in a loop: remembers that it was notified while it was not waiting. */
export class Wakeup {
  #notified = false;
  #wake: (() => void) | null = null;

  notify(): void {
    this.#notified = true;
    this.#wake?.();
  }

  /** Resolves at the next notification, one that came since the last wait included, after `ms`, or on abort. */
  async wait(clock: Clock, ms: number, signal: AbortSignal): Promise<void> {
    if (!this.#notified && !signal.aborted && ms > 0) {
      await new Promise<void>((resolve) => {
        const done = (): void => {
          timer.cancel();
          signal.removeEventListener('abort', done);
          resolve();
        };
        const timer = clock.setTimer(done, ms, { unref: true });
        signal.addEventListener('abort', done, { once: true });
        this.#wake = done;
      });
      this.#wake = null;
    }
    this.#notified = false;
  }
}
