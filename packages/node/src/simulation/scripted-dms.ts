/**
 * A dispatcher that answers as a test says: the second implementation of the port the engine works against. Used by
 * the tests of sessions and heartbeats, in simulated time.
 */
import {
  MillraceError,
  sleep,
  type Clock,
  type ErrorCode,
  type JsonObject,
  type LeaseEnvelope,
  type LogLevel,
  type Logger,
} from '@millrace/runner';
import { parseLease } from '@millrace/runner/decode';
import {
  NO_FEATURES,
  type CallOptions,
  type Completion,
  type Dms,
  type ExchangeResult,
  type Features,
  type HeartbeatReply,
  type LeaseHandle,
  type LeaseQuery,
  type LeaseResult,
  type LogAnswer,
  type LogPiece,
} from '@millrace/dispatch/client';

type HeartbeatBody = Parameters<Dms['heartbeat']>[1];
type CompleteBody = Parameters<Dms['complete']>[1];
type FailBody = Parameters<Dms['fail']>[1];
type ReleaseReason = Parameters<Dms['release']>[1];
type NextLeases = Omit<LeaseQuery, 'waitSecs'> | null;

export interface Script {
  readonly features?: Partial<Features>;
  /** Every answer comes this much later than its request. */
  readonly latencyMs?: number;
  readonly lease?: (max: number, waitSecs: number, signal: AbortSignal) => LeaseResult | Promise<LeaseResult>;
  readonly heartbeat?: (
    body: HeartbeatBody,
    signal: AbortSignal,
    lease: LeaseHandle,
  ) => HeartbeatReply | Promise<HeartbeatReply>;
  readonly complete?: (body: CompleteBody, lease: LeaseHandle) => void | Promise<void>;
  /** Default: all are accepted, and no leases come. */
  readonly exchange?: (
    completions: readonly Completion[],
    next: NextLeases,
    signal: AbortSignal,
  ) => ExchangeResult | Promise<ExchangeResult>;
  readonly fail?: (body: FailBody, lease: LeaseHandle) => void | Promise<void>;
  readonly release?: (reason: ReleaseReason, lease: LeaseHandle) => void | Promise<void>;
  /** Default: everything is taken. */
  readonly appendLogs?: (
    pieces: readonly LogPiece[],
    signal: AbortSignal,
  ) => readonly LogAnswer[] | Promise<readonly LogAnswer[]>;
  readonly watch?: (leaseIds: readonly string[], signal: AbortSignal) => Promise<readonly string[]>;
}

/** What was called: everything except `features`, in order. */
export type Call =
  | ({ readonly name: 'lease' } & LeaseQuery)
  | { readonly name: 'heartbeat'; readonly lease: LeaseHandle; readonly body: HeartbeatBody }
  | { readonly name: 'complete'; readonly lease: LeaseHandle; readonly body: CompleteBody }
  | { readonly name: 'exchange'; readonly completions: readonly Completion[]; readonly next: NextLeases }
  | { readonly name: 'fail'; readonly lease: LeaseHandle; readonly body: FailBody }
  | {
      readonly name: 'release';
      readonly lease: LeaseHandle;
      readonly reason: ReleaseReason;
      readonly details?: JsonObject;
    }
  | { readonly name: 'appendLogs'; readonly pieces: readonly LogPiece[] }
  | { readonly name: 'watch'; readonly leaseIds: readonly string[] };

export class ScriptedDms implements Dms {
  readonly calls: Call[] = [];
  /** Calls not answered yet. */
  underWay = 0;
  readonly #clock: Clock;
  readonly #script: Script;

  constructor(clock: Clock, script: Script = {}) {
    this.#clock = clock;
    this.#script = script;
  }

  /** The calls of one name. */
  of<N extends Call['name']>(name: N): Extract<Call, { name: N }>[] {
    return this.calls.filter((call): call is Extract<Call, { name: N }> => call.name === name);
  }

  features(options: CallOptions = {}): Promise<Features> {
    return this.#answer(options, () => ({ ...NO_FEATURES, ...this.#script.features }));
  }

  lease(request: LeaseQuery, options: CallOptions = {}): Promise<LeaseResult> {
    this.calls.push({ name: 'lease', ...request });
    return this.#answer(options, (signal) =>
      this.#script.lease === undefined
        ? { kind: 'none' }
        : this.#script.lease(request.max, request.waitSecs, signal),
    );
  }

  heartbeat(lease: LeaseHandle, body: HeartbeatBody, options: CallOptions = {}): Promise<HeartbeatReply> {
    this.calls.push({ name: 'heartbeat', lease, body });
    return this.#answer(options, (signal) => this.#script.heartbeat?.(body, signal, lease) ?? reply());
  }

  complete(lease: LeaseHandle, body: CompleteBody, options: CallOptions = {}): Promise<void> {
    this.calls.push({ name: 'complete', lease, body });
    return this.#answer(options, () => this.#script.complete?.(body, lease));
  }

  exchange(
    completions: readonly Completion[],
    next: NextLeases,
    options: CallOptions = {},
  ): Promise<ExchangeResult> {
    this.calls.push({ name: 'exchange', completions, next });
    return this.#answer(
      options,
      (signal) =>
        this.#script.exchange?.(completions, next, signal) ?? {
          refusals: completions.map(() => null),
          leases: [],
        },
    );
  }

  fail(lease: LeaseHandle, body: FailBody, options: CallOptions = {}): Promise<void> {
    this.calls.push({ name: 'fail', lease, body });
    return this.#answer(options, () => this.#script.fail?.(body, lease));
  }

  release(
    lease: LeaseHandle,
    reason: ReleaseReason,
    options: Parameters<Dms['release']>[2] = {},
  ): Promise<void> {
    const { details } = options;
    this.calls.push({ name: 'release', lease, reason, ...(details !== undefined && { details }) });
    return this.#answer(options, () => this.#script.release?.(reason, lease));
  }

  appendLogs(pieces: readonly LogPiece[], options: CallOptions = {}): Promise<readonly LogAnswer[]> {
    this.calls.push({ name: 'appendLogs', pieces });
    return this.#answer(
      options,
      (signal) =>
        this.#script.appendLogs?.(pieces, signal) ??
        pieces.map(({ offset, lines }) => ({ nextOffset: offset + Buffer.byteLength(lines) })),
    );
  }

  watch(
    leaseIds: readonly string[],
    _waitSecs: number,
    options: CallOptions = {},
  ): Promise<readonly string[]> {
    this.calls.push({ name: 'watch', leaseIds });
    return this.#answer(options, (signal) => this.#script.watch?.(leaseIds, signal) ?? never(signal));
  }

  async #answer<T>(options: CallOptions, answer: (signal: AbortSignal) => T | Promise<T>): Promise<T> {
    const signal = options.signal ?? new AbortController().signal;
    this.underWay += 1;
    try {
      signal.throwIfAborted();
      const value = await answer(signal);
      if (this.#script.latencyMs) await sleep(this.#clock, this.#script.latencyMs, signal);
      return value;
    } finally {
      this.underWay -= 1;
    }
  }
}

/** Settles only when the caller gives up. */
export function never(signal: AbortSignal): Promise<never> {
  return new Promise((_, reject) => {
    if (signal.aborted) reject(signal.reason);
    else signal.addEventListener('abort', () => reject(signal.reason), { once: true });
  });
}

/** The smallest valid answer, `{}`, with what is given. */
export function reply(told: Partial<HeartbeatReply> = {}): HeartbeatReply {
  return {
    access_token: null,
    access_token_expires_at: null,
    lease_expires_at: null,
    cancel: null,
    status: null,
    domain_id: null,
    domain_server_url: null,
    task: null,
    task_id: null,
    job_id: null,
    attempts: null,
    max_attempts: null,
    deps_remaining: null,
    ...told,
  };
}

const CODES: Readonly<Record<number, ErrorCode>> = {
  400: 'invalid_argument',
  401: 'unauthenticated',
  403: 'permission_denied',
  404: 'not_found',
  409: 'aborted',
  410: 'not_found',
  413: 'resource_exhausted',
  422: 'invalid_argument',
  429: 'resource_exhausted',
  500: 'unavailable',
  503: 'unavailable',
};

/** What the port throws for an HTTP status. */
export function wireError(status: number, details: JsonObject = {}): MillraceError {
  const code = CODES[status] ?? 'internal';
  return new MillraceError(code, `status ${status}`, {
    retryable: status >= 500 || status === 429,
    details: { status, ...details },
  });
}

/** A lease as the parser gives it, from wire JSON with a few members left out. */
export function envelope(members: JsonObject = {}, task: JsonObject = {}): LeaseEnvelope {
  return parseLease({
    access_token: 'token-1',
    domain_id: '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21',
    domain_server_url: 'http://127.0.0.1:8083',
    status: 'leased',
    ...members,
    task: {
      id: '5b1f3c52-5f0e-4b3e-9b5e-6a1d6c0a7e11',
      job_id: 'c3a1d0c8-8f0e-4d0c-a1c9-3f5f0e2b9d44',
      capability: '/examples/hello/v1',
      ...task,
    },
  });
}

export interface LogLine {
  readonly level: LogLevel;
  readonly message: string;
  readonly fields: JsonObject;
}

/** A logger that keeps its lines. */
export function memoryLog(
  lines: LogLine[] = [],
  bound: JsonObject = {},
): Logger & { readonly lines: LogLine[] } {
  const line =
    (level: LogLevel) =>
    (message: string, fields: JsonObject = {}): void =>
      void lines.push({ level, message, fields: { ...bound, ...fields } });
  return {
    lines,
    debug: line('debug'),
    info: line('info'),
    warn: line('warn'),
    error: line('error'),
    child: (fields) => memoryLog(lines, { ...bound, ...fields }),
  };
}
