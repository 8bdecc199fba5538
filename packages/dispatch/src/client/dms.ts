/**
 * The node's side of the task API (DMS). {@link Dms} is the port the engine works against; `HttpDms` (in
 * `http-dms.ts`) is the real one, and simulations implement it over a store directly.
 *
 * Errors are MillraceErrors whose `details.status` is the HTTP status (absent for transport errors):
 * 401 `unauthenticated` (after one retry with a fresh token), 403 `permission_denied`, 404 and 410 `not_found`,
 * 409 `aborted`, 400 and 422 `invalid_argument`, 429 `resource_exhausted` (retryable), 408 and 5xx and everything of the
 * transport `unavailable` (retryable), undecodable answers `data_loss` (retryable). `details.retry_after_ms` is set
 * from `Retry-After`.
 */
import type { Json, JsonObject, LeaseEnvelope, MillraceError, TaskSpec } from '@millrace/runner';

/** What `GET {base}/features` of our dispatcher tells; a server without it has none of these. */
export interface Features {
  /** The longest `Prefer: wait=N` honoured, seconds; 0 for none. */
  readonly longPollSecs: number;
  /** Items a batch endpoint takes; 0 for no batch endpoints. */
  readonly batchItems: number;
  /** `release` and `watch` exist and leases carry ids. */
  readonly leaseIds: boolean;
  /** `lease({start: true})` makes the task `running` at once, so no first heartbeat is needed before the work. */
  readonly startOnLease: boolean;
  /** {@link Dms.exchange} works: completions and the request for the next leases go in one call. */
  readonly leaseOnComplete?: boolean;
  /** Endings may carry what the attempt used: `usage` in complete's `meta` and fail's `details`, and in a release. */
  readonly endingUsage?: boolean;
  /** Bytes the log of one attempt may have; 0 or absent: the server keeps none, lines go with the events. */
  readonly taskLogBytes?: number;
  /** Registration should be repeated this often; null: it need not be. */
  readonly registrationIntervalSecs: number | null;
}

export const NO_FEATURES: Features = {
  longPollSecs: 0,
  batchItems: 0,
  leaseIds: false,
  startOnLease: false,
  leaseOnComplete: false,
  endingUsage: false,
  taskLogBytes: 0,
  registrationIntervalSecs: null,
};

/** A lease as received, with our id for it when the server gave one. */
export interface ReceivedLease extends ServerTime {
  readonly leaseId: string | null;
  readonly envelope: LeaseEnvelope;
}

export interface ServerTime {
  /**
   * The service's clock when it answered, epoch milliseconds, to the second and never early, so that a wrong local clock
   * shows. Null or absent: not told.
   */
  readonly serverTimeMs?: number | null;
}

/** What is asked for when asking for work. */
export interface LeaseQuery {
  /** Leases at most. */
  readonly max: number;
  /** How long to wait for one where the server can, seconds. */
  readonly waitSecs: number;
  /** See {@link Features.startOnLease}. */
  readonly start: boolean;
  /** Only tasks of these, where the server has lease ids; others know the node's from its registration. */
  readonly capabilities?: readonly string[];
}

/** Names the lease in later calls. */
export interface LeaseHandle {
  readonly taskId: string;
  readonly leaseId: string | null;
}

export type LeaseResult =
  | { readonly kind: 'leases'; readonly leases: readonly ReceivedLease[] }
  /** 204 */
  | { readonly kind: 'none' }
  /** 409: the service thinks this node holds all the leases it may. */
  | { readonly kind: 'busy' };

/** The answer to a heartbeat. Every member may be absent, which is null here; `{}` is a valid answer. */
export interface HeartbeatReply extends ServerTime {
  readonly access_token: string | null;
  readonly access_token_expires_at: string | null;
  readonly lease_expires_at: string | null;
  readonly cancel: boolean | null;
  readonly status: string | null;
  readonly domain_id: string | null;
  readonly domain_server_url: string | null;
  readonly task: TaskSpec | null;
  readonly task_id: string | null;
  readonly job_id: string | null;
  readonly attempts: number | null;
  readonly max_attempts: number | null;
  readonly deps_remaining: number | null;
}

export interface ArtifactReport {
  readonly logical_path: string;
  readonly name: string;
  readonly data_type: string;
  readonly id: string | null;
}

/** `meta` of complete and `details` of fail: the job and what was uploaded. Further members are ours. */
export interface EndingReport {
  readonly job: {
    readonly task_id: string;
    readonly job_id: string | null;
    readonly domain_id: string | null;
    readonly capability: string;
  };
  readonly artifacts: readonly ArtifactReport[];
  readonly [extra: string]: unknown;
}

/** What goes to the log of a lease's attempt. */
export interface LogPiece {
  readonly lease: LeaseHandle;
  /** Where in the log, in bytes of UTF-8, `lines` begin. */
  readonly offset: number;
  /** Whole lines, each ended by a line feed. */
  readonly lines: string;
}

/** `nextOffset`: what the log has now, and so where the next piece begins; less than was sent when something before it is missing. */
export type LogAnswer = { readonly nextOffset: number } | { readonly error: MillraceError };

/** One of several completions in a call. */
export interface Completion {
  readonly lease: LeaseHandle;
  readonly output_cids: readonly string[];
  readonly meta: EndingReport;
}

export interface ExchangeResult {
  /** For each completion, in order: null when it was accepted, else the error of a call for it alone. */
  readonly refusals: readonly (MillraceError | null)[];
  /** None: nothing was there, or nothing was asked for. */
  readonly leases: readonly ReceivedLease[];
}

export interface CallOptions {
  readonly signal?: AbortSignal;
}

export interface Dms {
  /** Asked once and kept; {@link NO_FEATURES} when the server lacks the endpoint. Other errors throw. */
  features(options?: CallOptions): Promise<Features>;
  lease(request: LeaseQuery, options?: CallOptions): Promise<LeaseResult>;
  heartbeat(
    lease: LeaseHandle,
    body: {
      readonly progress: Json;
      readonly events: readonly Json[];
      /** Ours: the events are in the attempt's log as well. */
      readonly logged?: boolean;
    },
    options?: CallOptions,
  ): Promise<HeartbeatReply>;
  complete(
    lease: LeaseHandle,
    body: { readonly output_cids: readonly string[]; readonly meta: EndingReport },
    options?: CallOptions,
  ): Promise<void>;
  fail(
    lease: LeaseHandle,
    body: { readonly reason: string; readonly details: Json | EndingReport },
    options?: CallOptions,
  ): Promise<void>;
  /**
   * Ours, where {@link Features.leaseOnComplete}: completes, and asks for leases in the places of what was completed without
   * waiting for any. 1 to {@link Features.batchItems} completions. `next` null: none are asked for. An error that is thrown
   * says nothing about any of the completions; each may be sent again.
   */
  exchange?(
    completions: readonly Completion[],
    next: Omit<LeaseQuery, 'waitSecs'> | null,
    options?: CallOptions,
  ): Promise<ExchangeResult>;
  /**
   * Ours: gives the lease back. `unimplemented` where the server lacks it. `details` are kept with the attempt where it was
   * cancelled; see {@link Features.endingUsage}.
   */
  release(
    lease: LeaseHandle,
    reason: 'shutdown' | 'canceled' | 'setup_failed',
    options?: CallOptions & { readonly details?: JsonObject },
  ): Promise<void>;
  /**
   * Ours, where {@link Features.taskLogBytes} is not 0: appends to logs. An answer for each piece, in order, whose errors have
   * the codes of a call for it alone. Sending a piece again is harmless.
   */
  appendLogs(pieces: readonly LogPiece[], options?: CallOptions): Promise<readonly LogAnswer[]>;
  /**
   * Ours: waits up to `waitSecs` until the work of one of these leases should end and returns those; empty when the
   * time is up. `unimplemented` where the server lacks it.
   */
  watch(leaseIds: readonly string[], waitSecs: number, options?: CallOptions): Promise<readonly string[]>;
}

/** Where the bearer for DMS calls comes from (the node's login). */
export interface TokenSource {
  get(options?: CallOptions): Promise<string>;
  /** The server refused this token: the next `get` must not return it again. */
  invalidate(token: string): void;
}
