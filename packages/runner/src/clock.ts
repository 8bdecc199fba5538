/**
 * Time and chance as parameters, so that a whole system can be run in simulated time from one seed.
 *
 * Wall time (`now`) is for values that leave the process; deadlines inside a process use `monotonic`.
 */

export interface Timer {
  /** Stops the timer. Harmless when it has fired or was cancelled before. */
  cancel(): void;
}

export interface Clock {
  /** Milliseconds since the Unix epoch. May jump. */
  now(): number;
  /** Milliseconds since an arbitrary start. Never goes back. */
  monotonic(): number;
  /** Calls `fn` once after `delayMs` (>= 0). A pending timer keeps the process alive unless `unref` is set. */
  setTimer(fn: () => void, delayMs: number, options?: { readonly unref?: boolean }): Timer;
}

/** Uniform random number in [0, 1). */
export type Random = () => number;

/** The machine's clock. Delays beyond 2^31-1 ms, which Node would fire at once, are waited for in steps. */
export const systemClock: Clock = {
  now: () => Date.now(),
  monotonic: () => performance.now(),
  setTimer(fn, delayMs, options = {}) {
    const MAX_DELAY_MS = 2 ** 31 - 1;
    let handle: NodeJS.Timeout;
    const arm = (leftMs: number): void => {
      handle = setTimeout(
        () => (leftMs > MAX_DELAY_MS ? arm(leftMs - MAX_DELAY_MS) : fn()),
        Math.min(leftMs, MAX_DELAY_MS),
      );
      if (options.unref) handle.unref();
    };
    arm(Math.max(0, delayMs));
    return { cancel: () => clearTimeout(handle) };
  },
};

/** Resolves after `delayMs`; rejects with `signal.reason` as soon as the signal aborts. */
export function sleep(clock: Clock, delayMs: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) {
      reject(signal.reason);
      return;
    }
    const onAbort = (): void => {
      timer.cancel();
      reject(signal?.reason);
    };
    const timer = clock.setTimer(() => {
      signal?.removeEventListener('abort', onAbort);
      resolve();
    }, delayMs);
    signal?.addEventListener('abort', onAbort, { once: true });
  });
}

/**
 * A signal that aborts `delayMs` from now with the value `reason()` returns. Dispose it to stop the timer.
 */
export function timeoutSignal(
  clock: Clock,
  delayMs: number,
  reason: () => unknown,
): { readonly signal: AbortSignal } & Disposable {
  const controller = new AbortController();
  const timer = clock.setTimer(() => controller.abort(reason()), delayMs);
  return { signal: controller.signal, [Symbol.dispose]: () => timer.cancel() };
}
