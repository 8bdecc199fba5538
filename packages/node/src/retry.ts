/**
 * How the node waits for others: a time limit on every call, growing pauses between attempts, and the one question
 * every answer under a lease is asked: is the lease gone?
 */
import { MillraceError, type Clock, type Random } from '@millrace/runner';

/**
 * Pause after the n-th consecutive failure (n >= 1): `baseMs` doubled each time up to `capMs`, of which a random half
 * is taken off, and never less than what the server asked for with `Retry-After`.
 */
export function backoffMs(
  failures: number,
  range: { readonly baseMs: number; readonly capMs: number },
  random: Random,
  error?: unknown,
): number {
  const ceiling = Math.min(range.capMs, range.baseMs * 2 ** Math.min(failures - 1, 30));
  const asked = MillraceError.is(error) ? error.details['retry_after_ms'] : undefined;
  return Math.max(ceiling * (0.5 + random() / 2), typeof asked === 'number' ? asked : 0);
}

/**
 * Runs `call` with a signal that aborts with `parent`, or after `timeoutMs` with an `unavailable` error, which is what
 * a peer that does not answer in time is.
 */
export async function callWithin<T>(
  clock: Clock,
  timeoutMs: number,
  what: string,
  call: (signal: AbortSignal) => Promise<T>,
  parent?: AbortSignal,
): Promise<T> {
  parent?.throwIfAborted();
  // One signal for both reasons: they are dear to make, and this is done for every request.
  const controller = new AbortController();
  const follow = (): void => controller.abort(parent?.reason);
  const timer = clock.setTimer(
    () =>
      controller.abort(
        new MillraceError('unavailable', `${what}: no answer within ${Math.round(timeoutMs)} ms`),
      ),
    timeoutMs,
  );
  parent?.addEventListener('abort', follow, { once: true });
  try {
    return await call(controller.signal);
  } finally {
    timer.cancel();
    parent?.removeEventListener('abort', follow);
  }
}

/** Once the lease is over, a peer that does not answer for so long is asked anew. */
const LATE_ATTEMPT_MS = 10_000;

/**
 * The time one attempt gets when `leftMs` of the lease are left and it is given up in `giveUpMs`: a third, so that a hanging
 * peer costs no more than that and others can follow; a second at least while there is one; always less than what is left.
 * `giveUpMs`: default at the end of the lease.
 */
export function attemptTimeoutMs(leftMs: number, requestTimeoutMs: number, giveUpMs = leftMs): number {
  if (giveUpMs <= 0) return Math.min(requestTimeoutMs, 1_000);
  const share = leftMs > 0 ? leftMs / 3 : Math.min(giveUpMs / 3, LATE_ATTEMPT_MS);
  return Math.min(requestTimeoutMs, Math.max(share, Math.min(1_000, giveUpMs * 0.9)));
}

/** 404, 410 and 409: the server does not know this lease any more, or somebody else has the task. */
export function isLeaseGone(error: unknown): boolean {
  return MillraceError.is(error) && (error.code === 'not_found' || error.code === 'aborted');
}

/** The server understood the request and will never take this body (400, 413, 422). */
export function isBodyRefused(error: unknown): boolean {
  if (!MillraceError.is(error)) return false;
  // An answer that was too long to read has a status too, and that is a success.
  const { status } = error.details;
  if (typeof status === 'number' && status < 400) return false;
  return error.code === 'invalid_argument' || (error.code === 'resource_exhausted' && !error.retryable);
}
