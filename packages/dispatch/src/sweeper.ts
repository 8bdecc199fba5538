/** What the dispatcher does although nobody asks: take back expired leases, and remove bytes that nothing names. */
import type { Clock, Logger } from '@millrace/runner';
import { collectGarbage } from './blobs/collect.ts';
import type { BlobStore } from './blobs.ts';
import { Rounds } from './rounds.ts';
import type { Store, SweepAnswer } from './store.ts';

export const SWEEP_INTERVAL_MS = 500;

/** The first round comes soon, or a dispatcher that is started anew every day would never have one. */
const FIRST_COLLECTION_MS = 60_000;
const COLLECTION_INTERVAL_MS = 60 * 60_000;

export interface SweeperOptions {
  readonly store: Pick<Store, 'sweep'>;
  readonly clock: Clock;
  readonly log: Logger;
  readonly onSwept?: (answer: SweepAnswer) => void;
}

/**
 * Calls `store.sweep()` when it says the next thing is due, and at least every {@link SWEEP_INTERVAL_MS}: leases given
 * since the last sweep may expire sooner than it knew. So an expired lease is taken back within a second. The first sweep comes
 * with the start, so that what expired while nobody was there is taken back before the first request.
 */
export class Sweeper extends Rounds {
  constructor({ store, clock, log, onSwept }: SweeperOptions) {
    super({
      clock,
      log,
      firstMs: 0,
      pauseMs: SWEEP_INTERVAL_MS,
      trouble: 'sweep failed',
      async round() {
        const answer = await store.sweep();
        onSwept?.(answer);
        if (answer.rescued > 0) log.info('leases taken back', { count: answer.rescued });
        const next = answer.nextAtMs ?? Infinity;
        return Math.max(1, Math.min(SWEEP_INTERVAL_MS, next - clock.now()));
      },
    });
  }
}

export interface CollectorOptions {
  readonly store: Store;
  readonly blobs: BlobStore;
  readonly clock: Clock;
  readonly log: Logger;
}

/** Removes unnamed bytes once an hour ({@link collectGarbage}). Closing stops it between two batches. */
export class Collector extends Rounds {
  constructor({ store, blobs, clock, log }: CollectorOptions) {
    super({
      clock,
      log,
      firstMs: FIRST_COLLECTION_MS,
      pauseMs: COLLECTION_INTERVAL_MS,
      trouble: 'removing unnamed bytes failed',
      async round(signal) {
        const collected = await collectGarbage(store, blobs, { clock, signal });
        if (collected.blobs > 0 || collected.uploads > 0) log.info('unnamed bytes removed', { ...collected });
      },
    });
  }
}
