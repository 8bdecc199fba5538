/** What the two ports of a task share: its domain, its token, its folder, its limits, and what is under way. */
import {
  MillraceError,
  describeError,
  type Clock,
  type Logger,
  type Random,
  type Span,
  type TraceAttributes,
} from '@millrace/runner';
import type { DomainStorage } from '@millrace/dispatch/client';
import type { RetrySettings } from './attempts.ts';
import type { DomainAddress } from './cid.ts';

/** Bounds of a task's storage. */
export interface StorageLimits {
  /** Largest input of `getBytesByCid`. Default 512 MiB. */
  readonly maxBytesInMemory: number;
  /** Largest part of a chunked upload that is gathered in memory, whatever the server asks for. Default 64 MiB. */
  readonly maxPartBytes: number;
  /**
   * Largest file or stream sent in one request, from memory, to a server that has no chunked uploads and tells no limit of
   * its own. Default 100 MiB.
   */
  readonly maxSingleUploadBytes: number;
}

export const DEFAULT_LIMITS: StorageLimits = {
  maxBytesInMemory: 512 * 1024 * 1024,
  maxPartBytes: 64 * 1024 * 1024,
  maxSingleUploadBytes: 100 * 1024 * 1024,
};

const MAX_SPAN_ERROR_BYTES = 500;

export interface WorldOptions {
  readonly domain: () => DomainAddress;
  readonly token: () => string;
  readonly refreshToken: () => Promise<void>;
  readonly openStorage: (address: DomainAddress) => DomainStorage;
  readonly folder: () => Promise<string>;
  readonly signal: AbortSignal;
  readonly clock: Clock;
  readonly random: Random;
  readonly log: Logger;
  readonly limits: StorageLimits;
  readonly retry: RetrySettings;
  /** Begins a span around one call of a port. Absent: nothing is traced. */
  readonly trace?: (name: string, attributes: TraceAttributes) => Span;
}

/** A place among what is under way. */
export interface Stay {
  /** Aborts with the task, with the caller's signal, or when the ports are closed. */
  readonly signal: AbortSignal;
  /** Aborts {@link signal}: nobody wants the rest. */
  abandon(): void;
  /** Idempotent. `error`: why the call failed, if it did. */
  leave(error?: unknown): void;
}

export class PortsWorld {
  readonly clock: Clock;
  readonly random: Random;
  readonly log: Logger;
  readonly limits: StorageLimits;
  readonly retry: RetrySettings;
  readonly domain: () => DomainAddress;
  readonly token: () => string;
  readonly refreshToken: () => Promise<void>;
  readonly folder: () => Promise<string>;
  readonly #openStorage: (address: DomainAddress) => DomainStorage;
  readonly #storages = new Map<string, DomainStorage>();
  readonly #taskSignal: AbortSignal;
  readonly #stays = new Set<AbortController>();
  readonly #trace: WorldOptions['trace'];
  #bytesIn = 0;
  #bytesOut = 0;
  #whenEmpty: () => void = () => {};
  #closing: Promise<void> | null = null;

  constructor(options: WorldOptions) {
    this.clock = options.clock;
    this.random = options.random;
    this.log = options.log;
    this.limits = options.limits;
    this.retry = options.retry;
    this.domain = options.domain;
    this.token = options.token;
    this.refreshToken = options.refreshToken;
    this.folder = options.folder;
    this.#openStorage = options.openStorage;
    this.#taskSignal = options.signal;
    this.#trace = options.trace;
  }

  /** Bytes of inputs handed to the task so far. */
  get bytesIn(): number {
    return this.#bytesIn;
  }

  /** Bytes of artifacts that the server took so far. */
  get bytesOut(): number {
    return this.#bytesOut;
  }

  readIn(bytes: number): void {
    this.#bytesIn += bytes;
  }

  wrote(bytes: number): void {
    this.#bytesOut += bytes;
  }

  /** The client of the server the domain is on now. */
  storage(): DomainStorage {
    const address = this.domain();
    let storage = this.#storages.get(address.serverUrl);
    if (storage === undefined) {
      storage = this.#openStorage(address);
      this.#storages.set(address.serverUrl, storage);
    }
    return storage;
  }

  /** @throws MillraceError `failed_precondition` once closed; the reason of a signal that has aborted. */
  enter(method: string, signal?: AbortSignal): Stay {
    if (this.#closing !== null) {
      throw new MillraceError('failed_precondition', `${method}: the task has ended, its storage is closed`);
    }
    this.#taskSignal.throwIfAborted();
    signal?.throwIfAborted();
    const controller = new AbortController();
    const onTask = (): void => controller.abort(this.#taskSignal.reason);
    const onCaller = (): void => controller.abort(signal?.reason);
    this.#taskSignal.addEventListener('abort', onTask, { once: true });
    signal?.addEventListener('abort', onCaller, { once: true });
    this.#stays.add(controller);
    const span = this.#trace?.(`storage ${method}`, { 'millrace.storage.method': method });
    // A stream is let go of like that when it was read to its end, too.
    let abandoned = false;
    return {
      signal: controller.signal,
      abandon: () => {
        abandoned = true;
        controller.abort(new MillraceError('canceled', `${method}: its result was abandoned`));
      },
      leave: (error) => {
        this.#taskSignal.removeEventListener('abort', onTask);
        signal?.removeEventListener('abort', onCaller);
        this.#stays.delete(controller);
        const aborted = controller.signal.aborted && !abandoned;
        const why = error ?? (aborted ? controller.signal.reason : undefined);
        span?.end(why === undefined ? {} : { error: describeError(why, MAX_SPAN_ERROR_BYTES) });
        if (this.#stays.size === 0) this.#whenEmpty();
      },
    };
  }

  async run<T>(
    method: string,
    signal: AbortSignal | undefined,
    call: (signal: AbortSignal) => Promise<T>,
  ): Promise<T> {
    const stay = this.enter(method, signal);
    let failure: unknown;
    try {
      return await call(stay.signal);
    } catch (error) {
      failure = error;
      throw error;
    } finally {
      stay.leave(failure);
    }
  }

  /** Ends what is under way and waits until it has ended. */
  close(): Promise<void> {
    this.#closing ??= new Promise((resolve) => {
      this.#whenEmpty = resolve;
      if (this.#stays.size === 0) return resolve();
      const reason = new MillraceError('failed_precondition', 'the task has ended, its storage is closed');
      for (const stay of this.#stays) stay.abort(reason);
    });
    return this.#closing;
  }
}
