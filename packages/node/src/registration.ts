/**
 * Registration with DDS: the loop that makes this wallet's node known to the service and keeps it so.
 *
 * States: `disconnected` at first and whenever the service has forgotten the node; `registering` from the first attempt
 * until one succeeds; `registered` then. What ends an attempt decides when the next one is:
 * - success, or the word of the service ({@link Registration.told}): none, until {@link Registration.lost} or the repetition
 *   the service asks for.
 * - transient (408, 429, 5xx, transport, an answer that cannot be decoded): about 2, 4, 8 ... 60 s, or what `Retry-After`
 *   says if that is longer; after `maxRetry` in a row one cooldown and the count starts anew.
 * - conflict (409, another node with this identity is online) and slow (every other status, no capabilities): a cooldown.
 *
 * A repetition that fails leaves the state `registered`: the service said nothing about the registration it has.
 */
import { MillraceError, describeError, type Clock, type Logger, type Random } from '@millrace/runner';
import {
  siweMessage,
  signMessage,
  type Dds,
  type RegisterWalletRequest,
  type Resources,
} from '@millrace/dispatch/client';
import { pauseAfter } from './dds-backoff.ts';
import { registrationVersion } from './version.ts';
import { waitFor } from './wait-for.ts';

export interface RegistrationOptions {
  readonly dds: Dds;
  /** Secret. */
  readonly privateKeyHex: string;
  /** `walletAddress` of the key. */
  readonly wallet: string;
  /** Secret. Sent verbatim. */
  readonly credentials: string;
  /** Sent sorted, each once. Without one no request is made. */
  readonly capabilities: readonly string[];
  /** Sent when there are any. */
  readonly labels: Readonly<Record<string, string>>;
  /** As configured; sent as `registrationVersion` makes it. */
  readonly version: string;
  /** Sent when above 1. */
  readonly maxConcurrency: number;
  /** Sent when the node says what it has. Default: it does not. */
  readonly resources?: Resources | null;
  /** Cooldown. At least 1,000 ms are taken. */
  readonly intervalMs: number;
  /** Transient failures in a row before a cooldown; -1 for never. */
  readonly maxRetry: number;
  /** Asked every few seconds while registered: how often to register again, or null for not at all. */
  readonly repeatEveryMs: () => number | null;
  readonly clock: Clock;
  readonly random: Random;
  readonly log: Logger;
}

export type RegistrationState = 'disconnected' | 'registering' | 'registered';

export interface Registration extends AsyncDisposable {
  readonly state: RegistrationState;
  /**
   * Resolves once the node is registered, at once when it is.
   *
   * @throws the signal's reason when it aborts; MillraceError `canceled` after `close`
   */
  waitRegistered(signal?: AbortSignal): Promise<void>;
  /** The service does not know this node any more. Registers again, at most once a second; else no effect. */
  lost(): void;
  /**
   * The service says that it knows this node: as good as a registration of its own, and until it is {@link lost} no other
   * is tried. False once closed.
   */
  told(): boolean;
  /** Ends an attempt under way and all waits. Resolves when the loop has ended. */
  close(): Promise<void>;
}

/** Attempts that {@link Registration.lost} causes are at least this far apart. */
const MIN_PAUSE_MS = 1_000;

/** How often a registered node looks whether the service wants the registration repeated. */
const REPEAT_CHECK_MS = 5_000;

/** Failures of one class are warned about at most this often. */
const WARNING_PAUSE_MS = 180_000;

/** Starts registering at once. */
export function openRegistration(options: RegistrationOptions): Registration {
  return new RegistrationLoop(options);
}

interface Waiter {
  readonly resolve: () => void;
  readonly reject: (reason: unknown) => void;
}

type FailureClass = 'transient' | 'conflict' | 'slow';

class RegistrationLoop implements Registration {
  readonly #options: RegistrationOptions;
  readonly #clock: Clock;
  readonly #request: Omit<RegisterWalletRequest, 'message' | 'signature'>;
  readonly #closing = new AbortController();
  readonly #ended: Promise<void>;
  #state: RegistrationState = 'disconnected';
  /** Calls waiting in `waitRegistered`. */
  readonly #waiting = new Set<Waiter>();
  /** Ends the pause the loop is in. */
  #wake: () => void = () => undefined;
  /** Monotonic. */
  #lastAttemptAt = -Infinity;
  #transientInARow = 0;
  /** {@link Registration.told}, and not lost since. */
  #told = false;
  readonly #warnedAt = new Map<FailureClass, number>();

  constructor(options: RegistrationOptions) {
    const { credentials, capabilities, labels, version, maxConcurrency, resources = null, log } = options;
    this.#options = options;
    this.#clock = options.clock;
    this.#request = {
      registration_credentials: credentials,
      capabilities: [...new Set(capabilities)].toSorted(),
      version: registrationVersion(version, (message, fields) => log.warn(message, fields)),
      // Absent means 1, and a body of the reference's five members is what an old service knows.
      ...(maxConcurrency === 1 ? {} : { max_concurrency: maxConcurrency }),
      ...(Object.keys(labels).length === 0 ? {} : { labels }),
      ...(resources === null ? {} : { resources }),
    };
    this.#ended = this.#run();
  }

  get state(): RegistrationState {
    return this.#state;
  }

  async waitRegistered(signal?: AbortSignal): Promise<void> {
    signal?.throwIfAborted();
    this.#closing.signal.throwIfAborted();
    if (this.#state === 'registered') return;
    let waiter!: Waiter;
    const registered = new Promise<void>((resolve, reject) => {
      waiter = { resolve, reject };
    });
    this.#waiting.add(waiter);
    try {
      await waitFor(registered, signal);
    } finally {
      this.#waiting.delete(waiter);
    }
  }

  lost(): void {
    if (this.#state !== 'registered' || this.#closing.signal.aborted) return;
    this.#options.log.warn('the service does not know this node any more; registering again');
    this.#state = 'disconnected';
    this.#told = false;
    this.#wake();
  }

  told(): boolean {
    if (this.#closing.signal.aborted) return false;
    if (this.#state === 'registered') return true;
    this.#told = true;
    this.#settle();
    this.#wake();
    return true;
  }

  async close(): Promise<void> {
    if (!this.#closing.signal.aborted) {
      const reason = new MillraceError('canceled', 'the node registration is closed');
      this.#closing.abort(reason);
      for (const { reject } of this.#waiting) reject(reason);
      this.#wake();
    }
    await this.#ended;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  async #run(): Promise<void> {
    const { signal } = this.#closing;
    while (!signal.aborted) {
      this.#lastAttemptAt = this.#clock.monotonic();
      const pause = await this.#attempt(signal);
      if (signal.aborted) return;
      if (pause !== null) await this.#rest(pause);
      if (pause === null || this.#told) await this.#park(signal);
      // `lost` may have ended either early.
      const early = this.#lastAttemptAt + MIN_PAUSE_MS - this.#clock.monotonic();
      if (early > 0 && !signal.aborted) await this.#rest(early);
    }
  }

  /** One attempt. Null when it succeeded, else how long to wait for the next. Never rejects. */
  async #attempt(signal: AbortSignal): Promise<number | null> {
    const { log, wallet } = this.#options;
    const repeating = this.#state === 'registered';
    if (!repeating) this.#state = 'registering';
    try {
      await this.#register(signal);
    } catch (error) {
      return signal.aborted ? null : this.#pauseAfter(error);
    }
    this.#settle();
    if (repeating) log.debug('registration repeated');
    else {
      const { capabilities, version } = this.#request;
      log.info('registered', { wallet, capabilities: [...capabilities], version });
    }
    return null;
  }

  #settle(): void {
    this.#state = 'registered';
    this.#transientInARow = 0;
    this.#warnedAt.clear();
    for (const { resolve } of this.#waiting) resolve();
  }

  async #register(signal: AbortSignal): Promise<void> {
    const { dds, privateKeyHex, wallet } = this.#options;
    if (this.#request.capabilities.length === 0) {
      throw new MillraceError('invalid_argument', 'capabilities must not be empty: the node has no runner');
    }
    const message = siweMessage(await dds.requestNonce(wallet, { signal }), wallet);
    const signature = signMessage(message, privateKeyHex);
    await dds.registerWallet({ message, signature, ...this.#request }, { signal });
  }

  #pauseAfter(error: unknown): number {
    const { intervalMs, maxRetry, random } = this.#options;
    const kind = classOf(error);
    let pause = Math.max(MIN_PAUSE_MS, intervalMs);
    if (kind === 'transient') {
      this.#transientInARow += 1;
      if (maxRetry >= 0 && this.#transientInARow >= maxRetry) this.#transientInARow = 0;
      else pause = pauseAfter(this.#transientInARow, error, random);
    } else {
      this.#transientInARow = 0;
    }
    this.#report(kind, error, pause);
    return pause;
  }

  #report(kind: FailureClass, error: unknown, pause: number): void {
    const { log, wallet } = this.#options;
    const now = this.#clock.monotonic();
    const warn = now - (this.#warnedAt.get(kind) ?? -Infinity) >= WARNING_PAUSE_MS;
    if (warn) this.#warnedAt.set(kind, now);
    log[warn ? 'warn' : 'debug'](FAILURES[kind], {
      wallet,
      next_in_ms: Math.round(pause),
      error: describeError(error),
    });
  }

  /** Until the registration is lost, has to be repeated, or the loop is closed. */
  async #park(signal: AbortSignal): Promise<void> {
    while (this.#state === 'registered' && !signal.aborted) {
      const every = this.#options.repeatEveryMs();
      const left = every === null ? REPEAT_CHECK_MS : this.#lastAttemptAt + every - this.#clock.monotonic();
      if (left <= 0) return;
      await this.#rest(left);
    }
  }

  /** Waits `ms`, or until `#wake` is called. */
  #rest(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const timer = this.#clock.setTimer(resolve, ms);
      this.#wake = () => {
        timer.cancel();
        resolve();
      };
    });
  }
}

const FAILURES: { readonly [K in FailureClass]: string } = {
  transient: 'registration failed; trying again',
  conflict: 'registration refused: another node with this identity is online; is this key used twice?',
  slow: 'registration refused; check REG_SECRET, the key and the runners',
};

function classOf(error: unknown): FailureClass {
  if (!MillraceError.is(error)) return 'slow';
  const status = error.details['status'];
  if (typeof status !== 'number' || (status >= 200 && status <= 299)) {
    // Without an answer: the transport's error; otherwise one of this side, which no repetition mends.
    return error.retryable || typeof status === 'number' ? 'transient' : 'slow';
  }
  if (status === 409) return 'conflict';
  return status === 408 || status === 429 || status >= 500 ? 'transient' : 'slow';
}
