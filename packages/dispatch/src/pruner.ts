/** Removes jobs that ended longer ago than they are kept, a batch at a time, with time for others in between. */
import { sleep } from '@millrace/runner';
import type { Clock, Logger } from '@millrace/runner';
import type { Retention } from './dispatcher.ts';
import { Rounds } from './rounds.ts';
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

/** Dispatchers that share a store may all prune: what one removed, the others do not find. Closing stops it between two batches. */
export class Pruner extends Rounds {
  constructor({ store, clock, log, retention, onPruned }: PrunerOptions) {
    const { keepJobsMs: endedForMs, artifacts = false } = retention;
    super({
      clock,
      log,
      firstMs: FIRST_PRUNING_MS,
      pauseMs: PRUNING_INTERVAL_MS,
      trouble: 'removing old jobs failed',
      async round(signal) {
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
        } finally {
          if (jobs > 0) log.info('old jobs removed', { jobs, artifacts: items });
        }
      },
    });
  }
}
