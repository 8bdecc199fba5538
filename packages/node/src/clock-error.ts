/** Whether this machine's clock can be trusted with the times that services name. */
import type { Clock } from '@millrace/runner';

/** A difference beyond this is a wrong clock and not the network. */
const TOLERANCE_MS = 5_000;

/**
 * What to add to the wall clock to judge a service's timestamps: the difference to the service's clock if that is more than
 * the network explains, else 0. `serverTimeMs` as the service told with the answer at hand; null: it did not.
 */
export function clockErrorMs(clock: Pick<Clock, 'now'>, serverTimeMs: number | null | undefined): number {
  const difference = (serverTimeMs ?? clock.now()) - clock.now();
  return Math.abs(difference) > TOLERANCE_MS ? difference : 0;
}
