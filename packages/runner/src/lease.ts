/**
 * The lease as it travels: the body of a successful `GET /tasks`. JSON names equal field names.
 *
 * Source: posemesh compute-node runner API 0.1.2. Absent and `null` mean the same for optional members; a parsed
 * value always has every member, absent ones as `null` (see `decode.ts` for what is rejected).
 */
import type { Json } from './json.ts';

export interface TaskSpec {
  /** UUID, hyphenated lower case. */
  readonly id: string;
  readonly job_id: string | null;
  /** The kind of work; matched byte for byte against a runner's capability. */
  readonly capability: string;
  /** What the node's labels must satisfy. `null` when absent. */
  readonly capability_filters: Json;
  /** Data ids or URLs of the domain server (not IPFS CIDs). */
  readonly inputs_cids: readonly string[];
  /** Prepended to artifact paths. */
  readonly outputs_prefix: string | null;
  readonly label: string | null;
  readonly stage: string | null;
  /** The runner's parameters. `null` when absent. */
  readonly meta: Json;
  readonly priority: number | null;
  /** Attempts begun, this one included. */
  readonly attempts: number | null;
  readonly max_attempts: number | null;
  readonly deps_remaining: number | null;
  readonly status: string | null;
  readonly mode: string | null;
  readonly organization_filter: string | null;
  /** Decimal text. */
  readonly billing_units: string | null;
  readonly estimated_credit_cost: string | null;
  readonly debited_amount: string | null;
  /** RFC 3339. */
  readonly debited_at: string | null;
  /** RFC 3339. The node reads only the envelope's. */
  readonly lease_expires_at: string | null;
}

export interface LeaseEnvelope {
  /** First domain token. Rotated by heartbeats: read `ctx.accessToken.get()`, not this. */
  readonly access_token: string | null;
  readonly access_token_expires_at: string | null;
  /** RFC 3339. Drives the heartbeat timer; `null` means no timer. */
  readonly lease_expires_at: string | null;
  /** True: the task was cancelled before it started. */
  readonly cancel: boolean;
  readonly status: string | null;
  readonly domain_id: string | null;
  readonly domain_server_url: string | null;
  /**
   * Ours: the trace this attempt belongs to, as W3C `traceparent`. What a runner is handed names the span around its own
   * work, so that whatever it calls can be a child of that. Absent: it is not traced.
   */
  readonly traceparent?: string;
  readonly task: TaskSpec;
}
