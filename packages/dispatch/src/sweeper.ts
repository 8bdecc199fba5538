/** What the dispatcher does although nobody asks: take back expired leases, and remove bytes that nothing names. */
import type { Clock, Logger, Timer } from '@millrace/runner';
import { collectGarbage } from './blobs/collect.ts';
import type { BlobStore } from './blobs.ts';
import type { Store, SweepAnswer } from './store.ts';

export const SWEEP_INTERVAL_MS = 500;

/** The first round comes soon, or a dispatcher that is started anew every day would never have one. */
const FIRST_COLLECTION_MS = 60_000;
const COLLECTION_INTERVAL_MS = 60 * 60_000;

export interface SweeperOptions {
  readonly store: Store;
  readonly clock: Clock;
  readonly log: Logger;
  readonly onSwept?: (answer: SweepAnswer) => void;
}

/**
 * Calls `store.sweep()` when it says the next thing is due, and at least every {@link SWEEP_INTERVAL_MS}: leases given
 * since the last sweep may expire sooner than it knew. So an expired lease is taken back within a second.
 */
export class Sweeper implements AsyncDisposable {
  readonly #options: SweeperOptions;
  #timer: Timer | null = null;
  #running: Promise<void> = Promise.resolve();
  #closed = false;

  constructor(options: SweeperOptions) {
    this.#options = options;
  }

  /** Sweeps now, so that what expired while nobody was there is taken back before the first request, and goes on. */
  async start(): Promise<void> {
    this.#running = this.#sweep();
    await this.#running;
  }

  /** Waits for the sweep under way. */
  async close(): Promise<void> {
    this.#closed = true;
    this.#timer?.cancel();
    await this.#running;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  async #sweep(): Promise<void> {
    const { store, clock, log, onSwept } = this.#options;
    let delayMs = SWEEP_INTERVAL_MS;
    try {
      const answer = await store.sweep();
      onSwept?.(answer);
      if (answer.nextAtMs !== null) {
        delayMs = Math.max(1, Math.min(SWEEP_INTERVAL_MS, answer.nextAtMs - clock.now()));
      }
      if (answer.rescued > 0) log.info('leases taken back', { count: answer.rescued });
    } catch (error) {
      log.error('sweep failed; it is tried again', { error: String(error) });
    }
    if (this.#closed) return;
    this.#timer = clock.setTimer(
      () => {
        this.#running = this.#sweep();
      },
      delayMs,
      { unref: true },
    );
  }
}

export interface CollectorOptions {
  readonly store: Store;
  readonly blobs: BlobStore;
  readonly clock: Clock;
  readonly log: Logger;
}

/** Removes unnamed bytes once an hour ({@link collectGarbage}). */
export class Collector implements AsyncDisposable {
  readonly #options: CollectorOptions;
  readonly #stop = new AbortController();
  #timer: Timer | null = null;
  #running: Promise<void> = Promise.resolve();

  constructor(options: CollectorOptions) {
    this.#options = options;
  }

  start(): void {
    this.#arm(FIRST_COLLECTION_MS);
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
        this.#running = this.#collect();
      },
      delayMs,
      { unref: true },
    );
  }

  async #collect(): Promise<void> {
    const { store, blobs, clock, log } = this.#options;
    const { signal } = this.#stop;
    try {
      const collected = await collectGarbage(store, blobs, { clock, signal });
      if (collected.blobs > 0 || collected.uploads > 0) log.info('unnamed bytes removed', { ...collected });
    } catch (error) {
      if (signal.aborted) return;
      log.error('removing unnamed bytes failed; it is tried again', { error: String(error) });
    }
    if (!signal.aborted) this.#arm(COLLECTION_INTERVAL_MS);
  }
}
