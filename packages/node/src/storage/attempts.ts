/**
 * When a call to the domain server failed, is it worth another try, and when? Transient failures are tried again with
 * growing pauses until `retryForMs` have passed without any success; a refused token is renewed once.
 */
import { MillraceError, sleep, type Clock, type Random } from '@millrace/runner';
import { backoffMs } from '../retry.ts';
import { waitFor } from '../wait-for.ts';

export interface RetrySettings {
  /** From the first failure in a row on. Default 60,000 ms: a server that restarts is back by then. */
  readonly retryForMs: number;
  /** Pause after the first failure; doubles. Default 100 ms. */
  readonly baseMs: number;
  /** Longest pause. Default 5,000 ms. */
  readonly capMs: number;
}

export const DEFAULT_RETRY: RetrySettings = { retryForMs: 60_000, baseMs: 100, capMs: 5_000 };

export interface AttemptsWorld {
  readonly clock: Clock;
  readonly random: Random;
  readonly retry: RetrySettings;
  readonly token: () => string;
  readonly refreshToken: () => Promise<void>;
}

/** The attempts at one thing. */
export class Attempts {
  readonly #world: AttemptsWorld;
  readonly #signal: AbortSignal;
  #failures = 0;
  #failingSince = 0;
  #renewed = false;
  #token: string;

  constructor(world: AttemptsWorld, signal: AbortSignal) {
    this.#world = world;
    this.#signal = signal;
    this.#token = world.token();
  }

  /** Failures since the last success. */
  get failures(): number {
    return this.#failures;
  }

  /** Something went well: what fails now is a new failure. */
  succeeded(): void {
    this.#failures = 0;
    this.#renewed = false;
  }

  /**
   * Resolves when it is time to try again.
   *
   * @throws the error itself when trying again cannot help or has been tried for long enough; the signal's reason when
   * it aborts.
   */
  async failed(error: unknown): Promise<void> {
    this.#signal.throwIfAborted();
    if (!MillraceError.is(error)) throw error;
    const { clock, random, retry, token, refreshToken } = this.#world;
    if (error.code === 'unauthenticated' && !this.#renewed) {
      this.#renewed = true;
      this.#failures += 1;
      // The token may have been rotated while the request was under way; then there is a new one already.
      if (token() === this.#token) await waitFor(refreshToken(), this.#signal);
      this.#token = token();
      return;
    }
    if (!error.retryable) throw error;
    const now = clock.monotonic();
    if (this.#failures === 0) this.#failingSince = now;
    this.#failures += 1;
    const pauseMs = backoffMs(this.#failures, retry, random, error);
    if (now + pauseMs - this.#failingSince > retry.retryForMs) throw error;
    await sleep(clock, pauseMs, this.#signal);
    this.#token = token();
  }
}

/** Runs `call` until it succeeds or {@link Attempts.failed} throws. */
export async function withAttempts<T>(
  world: AttemptsWorld,
  signal: AbortSignal,
  call: (attempts: Attempts) => Promise<T>,
): Promise<T> {
  const attempts = new Attempts(world, signal);
  for (;;) {
    signal.throwIfAborted();
    try {
      return await call(attempts);
    } catch (error) {
      await attempts.failed(error);
    }
  }
}
