/**
 * The node token: one login at a time, refreshed in the background, shared by everything that talks to DMS.
 *
 * States and how they are left:
 * - no token: the next `get` starts a login and waits for it.
 * - fresh (up to and including the refresh point): `get` answers without traffic; at the point the background logs in.
 * - stale (refresh point to expiry): `get` still answers at once and makes sure a login is under way, so a slow or dead
 *   DDS holds up nothing while the token is good.
 * - expired or invalidated: as no token.
 *
 * A login is up to `tokenReauthMaxRetries` + 1 attempts of nonce and verify, a random pause of at most
 * `tokenReauthJitterMs` between them; the last is the one after which the service asks for a longer pause. After one that failed the next begins no sooner than a growing pause (about 2, 4, 8
 * ... 60 s, or what the service asks for); who needs a token meanwhile waits for that next one.
 *
 * All deadlines are monotonic, so a wall clock that is set while the token lives changes nothing. A wall clock that is
 * wrong shows in the service's `Date`, which is then minded (`clock-error.ts`).
 */
import { MillraceError, describeError, sleep, type Clock, type Logger, type Random } from '@millrace/runner';
import {
  siweMessage,
  signMessage,
  type CallOptions,
  type Dds,
  type TokenSource,
} from '@millrace/dispatch/client';
import { clockErrorMs, remainingMs } from './clock-error.ts';
import type { NodeConfig } from './config.ts';
import { pauseAfter, retryAfterOf } from './dds-backoff.ts';
import { waitFor } from './wait-for.ts';

export interface LoginOptions {
  readonly dds: Dds;
  /** Secret. */
  readonly privateKeyHex: string;
  /** `walletAddress` of the key. */
  readonly wallet: string;
  readonly config: Pick<NodeConfig, 'tokenSafetyRatio' | 'tokenReauthMaxRetries' | 'tokenReauthJitterMs'>;
  readonly clock: Clock;
  readonly random: Random;
  readonly log: Logger;
  /** The service does not know this wallet's node: verify answered 403 or 404. Called for each such answer. */
  readonly onRegistrationLost: () => void;
}

export interface Login extends TokenSource, AsyncDisposable {
  /**
   * A token that is valid by all this side knows.
   *
   * @throws MillraceError of the last attempt when a login this call waited for failed, `canceled` after `close`; the
   * signal's reason when it aborts, which ends this wait and not the login
   */
  get(options?: CallOptions): Promise<string>;
  /** Drops the token, ends a login under way and the waiting calls. Resolves when the login has ended. */
  close(): Promise<void>;
}

/** The background does not log in more often than this, however short-lived the tokens are. */
const MIN_REFRESH_PAUSE_MS = 1_000;

/** Opens the token source. Nothing is sent before the first `get`. */
export function openLogin(options: LoginOptions): Login {
  return new DdsLogin(options);
}

interface HeldToken {
  readonly value: string;
  /** Monotonic. */
  readonly refreshAt: number;
  /** Monotonic. */
  readonly expiresAt: number;
}

class DdsLogin implements Login {
  readonly #options: LoginOptions;
  readonly #clock: Clock;
  readonly #closing = new AbortController();
  #token: HeldToken | null = null;
  /** The login under way, its pause before included. Never left rejected without a handler. */
  #flight: Promise<string> | null = null;
  #refreshTimer: { cancel(): void } | null = null;
  /** Monotonic; no login begins before it. */
  #notBefore = -Infinity;
  #failedInARow = 0;

  constructor(options: LoginOptions) {
    this.#options = options;
    this.#clock = options.clock;
  }

  async get({ signal }: CallOptions = {}): Promise<string> {
    signal?.throwIfAborted();
    this.#closing.signal.throwIfAborted();
    const token = this.#token;
    const now = this.#clock.monotonic();
    if (token !== null && now <= token.refreshAt) return token.value;
    const flight = this.#login();
    if (token !== null && now < token.expiresAt) return token.value;
    return await waitFor(flight, signal);
  }

  invalidate(token: string): void {
    // Several calls may be refused with one token; only the first finds it still current.
    if (this.#token?.value === token) this.#token = null;
  }

  async close(): Promise<void> {
    if (!this.#closing.signal.aborted) {
      this.#closing.abort(new MillraceError('canceled', 'the node login is closed'));
      this.#refreshTimer?.cancel();
      this.#token = null;
    }
    await this.#flight?.catch(() => undefined);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  /** The login under way, or a new one. */
  #login(): Promise<string> {
    if (this.#flight !== null) return this.#flight;
    const flight = this.#run().finally(() => {
      this.#flight = null;
    });
    // Callers see the failure through their own wait; without one it was logged.
    flight.catch(() => undefined);
    this.#flight = flight;
    return flight;
  }

  async #run(): Promise<string> {
    const { config, log, random } = this.#options;
    const signal = this.#closing.signal;
    const pause = this.#notBefore - this.#clock.monotonic();
    if (pause > 0) await sleep(this.#clock, pause, signal);

    const attempts = config.tokenReauthMaxRetries + 1;
    for (let attempt = 1; ; attempt += 1) {
      try {
        const token = await this.#attempt(signal);
        // A Dds that does not listen to the signal may answer after `close`.
        signal.throwIfAborted();
        this.#token = token;
        this.#failedInARow = 0;
        this.#notBefore = -Infinity;
        this.#refreshAt(Math.max(token.refreshAt, this.#clock.monotonic() + MIN_REFRESH_PAUSE_MS));
        log.debug('logged in to DDS', {
          valid_ms: Math.round(token.expiresAt - this.#clock.monotonic()),
          refresh_in_ms: Math.round(token.refreshAt - this.#clock.monotonic()),
        });
        return token.value;
      } catch (error) {
        if (signal.aborted) throw signal.reason;
        // Who is asked to come later and comes at once is one of those there are too many of.
        const isAskedToWait = retryAfterOf(error) > config.tokenReauthJitterMs;
        if (attempt >= attempts || isAskedToWait) throw this.#failed(error, attempt);
        log.debug('DDS login attempt failed', { attempt, attempts, error: describeError(error) });
        await sleep(this.#clock, random() * config.tokenReauthJitterMs, signal);
      }
    }
  }

  async #attempt(signal: AbortSignal): Promise<HeldToken> {
    const { dds, privateKeyHex, wallet, config, random, log, onRegistrationLost } = this.#options;
    const message = siweMessage(await dds.requestNonce(wallet, { signal }), wallet);
    const signature = signMessage(message, privateKeyHex);
    const answer = await dds
      .verify({ address: wallet, message, signature }, { signal })
      .catch((error: unknown) => {
        const status = MillraceError.is(error) ? error.details['status'] : undefined;
        if (status === 403 || status === 404) onRegistrationLost();
        throw error;
      });

    const now = this.#clock.monotonic();
    const behindMs = clockErrorMs(this.#clock, answer.serverTimeMs);
    const ttl = remainingMs(this.#clock, answer.expiresAtMs, answer.serverTimeMs);
    if (behindMs !== 0) {
      log.warn('the clock of this machine differs from that of the service, which is minded; set it', {
        behind_ms: Math.round(behindMs),
      });
    }
    if (!(ttl > 0)) {
      throw new MillraceError(
        'data_loss',
        `DDS login answer must expire in the future, got an expiry ${Math.round(-ttl)} ms ago`,
        { retryable: true, details: { call: 'verify' } },
      );
    }
    const { tokenSafetyRatio: ratio, tokenReauthJitterMs: jitter } = config;
    const wanted = ttl * ratio + (2 * random() - 1) * jitter;
    return {
      value: answer.accessToken,
      refreshAt: now + Math.min(ttl, Math.max(Math.min(1, ttl), wanted)),
      expiresAt: now + ttl,
    };
  }

  /** All attempts of a login failed: sets the pause before the next one and returns the error for the callers. */
  #failed(cause: unknown, attempts: number): MillraceError {
    const { log, random } = this.#options;
    const error = MillraceError.from(cause);
    this.#failedInARow += 1;
    const now = this.#clock.monotonic();
    const pause = pauseAfter(this.#failedInARow, error, random);
    this.#notBefore = now + pause;
    // Before the first login there is nothing to keep alive: whoever asks next begins it.
    if (this.#refreshTimer !== null) this.#refreshAt(this.#notBefore);
    log.warn('DDS login failed', {
      attempts,
      next_in_ms: Math.round(pause),
      token_valid_ms: Math.max(0, Math.round((this.#token?.expiresAt ?? now) - now)),
      error: describeError(error),
    });
    return new MillraceError(
      error.code,
      `DDS SIWE login failed after ${attempts} attempts: ${error.message}`,
      {
        cause: error.cause,
        retryable: error.retryable,
        details: error.details,
      },
    );
  }

  #refreshAt(at: number): void {
    this.#refreshTimer?.cancel();
    this.#refreshTimer = this.#clock.setTimer(
      () => void this.#login(),
      Math.max(0, at - this.#clock.monotonic()),
      // Keeping a token fresh is no reason for a process to live on.
      { unref: true },
    );
  }
}
