/** How long something lasts that a service timed by its own clock, when one of the two clocks may be wrong. */
import type { Clock } from '@millrace/runner';

/** A difference beyond this is a wrong clock and not the network. */
const TOLERANCE_MS = 5_000;

/**
 * How far this machine's clock is behind the service's, if that is more than the network explains; else 0. `serverTimeMs` as
 * the service told with the answer at hand; null: it did not.
 */
export function clockErrorMs(clock: Pick<Clock, 'now'>, serverTimeMs: number | null | undefined): number {
  const behindMs = (serverTimeMs ?? clock.now()) - clock.now();
  return Math.abs(behindMs) > TOLERANCE_MS ? behindMs : 0;
}

/**
 * Milliseconds until `expiresAtMs`; not above 0: it is past. Where the clocks disagree, the shorter of the two readings that is
 * still to come: whichever clock is wrong, also that of a gateway between here and the service, this one is never too long,
 * and renewing early costs nothing.
 */
export function remainingMs(
  clock: Pick<Clock, 'now'>,
  expiresAtMs: number,
  serverTimeMs: number | null | undefined,
): number {
  const here = expiresAtMs - clock.now();
  const there = here - clockErrorMs(clock, serverTimeMs);
  if (here <= 0) return there;
  return there <= 0 ? here : Math.min(here, there);
}
