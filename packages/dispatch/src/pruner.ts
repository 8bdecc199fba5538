/** Removes jobs that ended longer ago than they are kept, a batch at a time, with time for others in between. */
import { sleep } from '@millrace/runner';
import type { Clock, Logger, Timer } from '@millrace/runner';
import type { Retention } from './dispatcher.ts';
import type { PruneAnswer, Store } from './store.ts';

/** The first round comes soon, or a dispatcher that is started anew every day would never have one. */
export const FIRST_PRUNING_MS = 5_000;
export const PRUNING_INTERVAL_MS = 10 * 60_000;

/** A batch takes a few milliseconds of the store's time; this leaves nearly all of it to others. */
const BETWEEN_BATCHES_MS = 100;

export interface PrunerOptions {
  readonly store: Pick<Store, 'pruneJobs'>;
  readonly clock: Clock;
  readonly log: Logger;
  readonly retention: Retention;
  /** Hears of every batch that removed something. */
  readonly onPruned?: (answer: PruneAnswer) => void;
}

/** Dispatchers that share a store may all prune: what one removed, the others do not find. */
export class Pruner implements AsyncDisposable {
  readonly #options: PrunerOptions;
  readonly #stop = new AbortController();
  #timer: Timer | null = null;
  #running: Promise<void> = Promise.resolve();

  constructor(options: PrunerOptions) {
    this.#options = options;
  }

  start(): void {
    this.#arm(FIRST_PRUNING_MS);
  }

  /** Stops between two batches and waits for that. */
  async close(): Promise<void> {
    this.#stop.abort(new Error('closing'));
    this.#timer?.cancel();
    await this.#running;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  #arm(delayMs: number): void {
    this.#timer = this.#options.clock.setTimer(
      () => {
        this.#running = this.#prune();
      },
      delayMs,
      { unref: true },
    );
  }

  async #prune(): Promise<void> {
    const { store, clock, log, retention, onPruned } = this.#options;
    const { keepJobsMs: endedForMs, artifacts = false } = retention;
    const { signal } = this.#stop;
    let [jobs, items] = [0, 0];
    try {
      for (let cursor: string | null = null; ;) {
        const answer: PruneAnswer = await store.pruneJobs({ endedForMs, artifacts, cursor });
        jobs += answer.jobs;
        items += answer.items;
        if (answer.jobs > 0) onPruned?.(answer);
        cursor = answer.nextCursor;
        if (cursor === null) break;
        await sleep(clock, BETWEEN_BATCHES_MS, signal);
      }
    } catch (error) {
      if (!signal.aborted) log.error('removing old jobs failed; it is tried again', { error: String(error) });
    }
    if (jobs > 0) log.info('old jobs removed', { jobs, artifacts: items });
    if (!signal.aborted) this.#arm(PRUNING_INTERVAL_MS);
  }
}
