/** What the dispatcher does although nobody asks: take back expired leases, and remove bytes that nothing names. */
import type { Clock, Logger } from '@millrace/runner';
import { collectGarbage } from './blobs/collect.ts';
import type { BlobStore } from './blobs.ts';
import { Rounds } from './rounds.ts';
import type { Store, SweepAnswer } from './store.ts';

export const SWEEP_INTERVAL_MS = 500;

/** A round that comes so late is no busy moment: this process stood still, and heard no heartbeat meanwhile. */
const STOOD_STILL_MS = 2_000;
/** For as long nodes are heard first then. They try again every few seconds at the latest. */
const LISTEN_FIRST_MS = 5_000;

/** The first round comes soon, or a dispatcher that is started anew every day would never have one. */
const FIRST_COLLECTION_MS = 60_000;
const COLLECTION_INTERVAL_MS = 60 * 60_000;

export interface SweeperOptions {
  readonly store: Pick<Store, 'sweep'>;
  readonly clock: Clock;
  readonly log: Logger;
  readonly onSwept?: (answer: SweepAnswer) => void;
  /** Asked at the start: does somebody hold leases that nobody could renew so far? Default: no. */
  readonly hasLeases?: () => Promise<boolean>;
}

/**
 * Calls `store.sweep()` when it says the next thing is due, and at least every {@link SWEEP_INTERVAL_MS}: leases given
 * since the last sweep may expire sooner than it knew. So an expired lease is taken back within a second. The first sweep comes
 * with the start.
 *
 * A process that stood still (SIGSTOP, a suspended machine), or was not there, is the reason itself why leases were not renewed;
 * so it hears nodes for {@link LISTEN_FIRST_MS} before it takes anything back.
 */
export class Sweeper extends Rounds {
  constructor({ store, clock, log, onSwept, hasLeases }: SweeperOptions) {
    let started = false;
    /** When the next round was to come, monotonic. */
    let dueAt = Infinity;
    super({
      clock,
      log,
      firstMs: 0,
      pauseMs: SWEEP_INTERVAL_MS,
      trouble: 'sweep failed',
      async round() {
        if (!started) {
          started = true;
          if ((await hasLeases?.()) === true) {
            log.info('nodes are heard before leases are taken back', { for_ms: LISTEN_FIRST_MS });
            return LISTEN_FIRST_MS;
          }
        }
        const lateMs = clock.monotonic() - dueAt;
        if (lateMs >= STOOD_STILL_MS) {
          log.warn('the dispatcher stood still; nodes are heard before leases are taken back', {
            late_ms: Math.round(lateMs),
          });
          dueAt = Infinity;
          return LISTEN_FIRST_MS;
        }
        // A failed round is followed by the next one all the same, at a time that is not known here.
        dueAt = Infinity;
        const answer = await store.sweep();
        onSwept?.(answer);
        if (answer.rescued > 0) log.info('leases taken back', { count: answer.rescued });
        const next = answer.nextAtMs ?? Infinity;
        const pauseMs = Math.max(1, Math.min(SWEEP_INTERVAL_MS, next - clock.now()));
        dueAt = clock.monotonic() + pauseMs;
        return pauseMs;
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
