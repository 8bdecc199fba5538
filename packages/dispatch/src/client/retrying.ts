/** How a requestor meets an error that may pass: the same call again, with growing pauses. */
import { MillraceError, sleep, systemClock } from '@millrace/runner';

const MAX_TRIES = 5;
const FIRST_PAUSE_MS = 200;
/** A server that asks for more patience than this gets it in pieces. */
const LONGEST_PAUSE_MS = 30_000;

/**
 * Calls `work` up to five times while it fails with a retryable error; every other error is thrown at once. Between calls it
 * waits as long as the server asked for, else 200 ms, doubled each time. `attempt` counts from 0: from the second call on, an
 * earlier one may have done its work and lost its answer.
 */
export async function retrying<T>(
  signal: AbortSignal | undefined,
  work: (attempt: number) => Promise<T>,
): Promise<T> {
  for (let attempt = 0; ; attempt += 1) {
    try {
      return await work(attempt);
    } catch (error) {
      if (!MillraceError.is(error) || !error.retryable || attempt + 1 >= MAX_TRIES) throw error;
      const asked = error.details['retry_after_ms'];
      const pauseMs =
        typeof asked === 'number' ? Math.min(asked, LONGEST_PAUSE_MS) : FIRST_PAUSE_MS * 2 ** attempt;
      await sleep(systemClock, pauseMs, signal);
    }
  }
}
