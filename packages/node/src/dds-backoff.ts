/** How long to wait before DDS is asked again. */
import { MillraceError, type Random } from '@millrace/runner';

const LONGEST_MS = 60_000;
const LONGEST_RETRY_AFTER_MS = 600_000;

/**
 * After the n-th failure in a row (n >= 1) that may pass by itself: `min(2^n, 60)` seconds times a uniform factor from
 * 0.8 to 1.2, so about 2, 4, 8, 16, 32, 60, 60 ... (the reference node's registration figures).
 */
export function transientBackoffMs(failuresInARow: number, random: Random): number {
  return Math.min(2 ** failuresInARow * 1000, LONGEST_MS) * (0.8 + 0.4 * random());
}

/**
 * The pause after the n-th failure in a row. Who says that there are too many at the moment, and when to come, gives out turns: that
 * one is taken, and a little later, since the others take theirs. Otherwise it is a growing one, and what was asked for at least.
 */
export function pauseAfter(failuresInARow: number, error: unknown, random: Random): number {
  const asked = retryAfterOf(error);
  if (asked > 0 && MillraceError.is(error) && error.code === 'resource_exhausted') {
    return asked * (1 + 0.2 * random());
  }
  return Math.max(transientBackoffMs(failuresInARow, random), asked);
}

/** What the service asked for in `Retry-After`, at most ten minutes; 0 when it did not. */
export function retryAfterOf(error: unknown): number {
  const asked = MillraceError.is(error) ? error.details['retry_after_ms'] : undefined;
  return typeof asked === 'number' ? Math.min(asked, LONGEST_RETRY_AFTER_MS) : 0;
}
