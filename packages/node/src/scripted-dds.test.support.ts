/**
 * A DDS in simulated time, for tests: it checks what a real one checks (nonces used once, signatures, addresses), and
 * does before each call whatever the test says.
 */
import { Writable } from 'node:stream';
import { MillraceError, sleep, type Clock, type JsonObject, type Logger } from '@millrace/runner';
import {
  parseSiweMessage,
  recoverAddress,
  type CallOptions,
  type Dds,
  type NodeToken,
  type RegisterWalletRequest,
  type SiweChallenge,
} from '@millrace/dispatch/client';
import { createLogger } from './log.ts';

export const KEY = '4c0883a69102937d6231471b5dbb6204fe5129617082798ce3f4fdf2548b6f90';
export const WALLET = '0xfdbb6caf01414300c16ea14859fec7736d95355f';

export type DdsCall = 'nonce' | 'register' | 'verify';

export class ScriptedDds implements Dds {
  readonly #clock: Clock;
  readonly #nonces = new Set<string>();
  #issued = 0;
  /** Every call made, with its time on the monotonic clock. */
  readonly calls: { readonly call: DdsCall; readonly at: number }[] = [];
  readonly registrations: RegisterWalletRequest[] = [];
  /** Calls that have begun and not ended. */
  underWay = 0;
  maxUnderWay = 0;
  tokens = 0;
  /** Done before each call; what it throws is the call's error. */
  before: (call: DdsCall, signal: AbortSignal | undefined) => void | Promise<void> = () => undefined;
  /** Lifetime of the tokens handed out. */
  ttlMs = 3_600_000;
  /** How far this service's clock is ahead of the wall clock of the node. */
  aheadMs = 0;
  tellsTime = true;

  constructor(clock: Clock) {
    this.#clock = clock;
  }

  /** Times of the calls of one kind. */
  at(call: DdsCall): number[] {
    return this.calls.filter((each) => each.call === call).map(({ at }) => at);
  }

  requestNonce(wallet: string, options?: CallOptions): Promise<SiweChallenge> {
    return this.#call('nonce', options, () => {
      if (wallet !== WALLET) throw statusError('nonce', 422);
      const nonce = `nonce-${(this.#issued += 1)}`;
      this.#nonces.add(nonce);
      const issuedAt = new Date(this.#now()).toISOString();
      return { nonce, domain: 'dds.test', uri: 'https://dds.test', version: '1', chainId: 8453, issuedAt };
    });
  }

  registerWallet(request: RegisterWalletRequest, options?: CallOptions): Promise<void> {
    return this.#call('register', options, () => {
      this.#check('register', request.message, request.signature);
      this.registrations.push(request);
    });
  }

  verify(
    request: { readonly address: string; readonly message: string; readonly signature: string },
    options?: CallOptions,
  ): Promise<NodeToken> {
    return this.#call('verify', options, () => {
      this.#check('verify', request.message, request.signature);
      return {
        accessToken: `token-${(this.tokens += 1)}`,
        expiresAtMs: this.#now() + this.ttlMs,
        serverTimeMs: this.tellsTime ? this.#now() : null,
      };
    });
  }

  #now(): number {
    return this.#clock.now() + this.aheadMs;
  }

  #check(call: DdsCall, message: string, signature: string): void {
    const { nonce, address } = parseSiweMessage(message);
    if (!this.#nonces.delete(nonce)) throw statusError(call, 401);
    if (address !== WALLET || recoverAddress(message, signature) !== WALLET) throw statusError(call, 401);
  }

  async #call<T>(call: DdsCall, options: CallOptions | undefined, answer: () => T): Promise<T> {
    this.calls.push({ call, at: this.#clock.monotonic() });
    this.underWay += 1;
    this.maxUnderWay = Math.max(this.maxUnderWay, this.underWay);
    try {
      await this.before(call, options?.signal);
      options?.signal?.throwIfAborted();
      return answer();
    } finally {
      this.underWay -= 1;
    }
  }
}

/** The error the HTTP client makes of a status. */
export function statusError(call: DdsCall, status: number, details: object = {}): MillraceError {
  return new MillraceError(status >= 500 ? 'unavailable' : 'invalid_argument', `${call} status ${status}`, {
    retryable: status >= 500,
    details: { call, status, ...details },
  });
}

export function transportError(): MillraceError {
  return new MillraceError('unavailable', 'network error: connection refused');
}

/** Waits for ever, or until the signal aborts. */
export function hang(clock: Clock, signal: AbortSignal | undefined): Promise<void> {
  return sleep(clock, Number.MAX_SAFE_INTEGER, signal);
}

/** A logger into memory. */
export function memoryLog(): { readonly log: Logger; readonly lines: JsonObject[] } {
  const lines: JsonObject[] = [];
  const destination = new Writable({
    write(chunk: Buffer, _encoding, done) {
      lines.push(JSON.parse(chunk.toString('utf8')) as JsonObject);
      done();
    },
  });
  return { log: createLogger({ format: 'json', level: 'debug', destination }), lines };
}
