/** The requestor's side: submit jobs, watch them, fetch artifacts, make node credentials. */
import type { ByteStream, JsonObject } from '@millrace/runner';
import type {
  BusyNode,
  JobDetail,
  JobEvent,
  JobRecord,
  JobStatus,
  NodeMode,
  NodeRecord,
  TasksSummary,
} from '../records.ts';
import type { CallOptions } from './dms.ts';
import type { DomainStorage } from './domain.ts';
import type { UploadOptions } from './upload.ts';

/** A job file: the posemesh job spec with everything optional that has a default. */
export interface JobSubmission {
  readonly label?: string;
  /** Default: the token's domain, else the dispatcher's default domain. */
  readonly domain_id?: string;
  readonly priority?: number;
  readonly meta?: JsonObject;
  readonly deadline_at?: string;
  readonly tasks: readonly TaskDraft[];
  readonly edges?: readonly { readonly from: string; readonly to: string }[];
}

export interface TaskDraft {
  readonly label?: string;
  readonly stage?: string;
  readonly capability: string;
  readonly capability_filters?: Readonly<Record<string, string>>;
  readonly priority?: number;
  readonly inputs_cids?: readonly string[];
  readonly outputs_prefix?: string;
  readonly mode?: NodeMode;
  readonly meta?: unknown;
  readonly max_attempts?: number;
  readonly deadline_at?: string;
}

export interface JobsPage {
  readonly items: readonly { readonly job: JobRecord; readonly tasks_summary: TasksSummary }[];
  readonly next_cursor: string | null;
}

export interface Requestor {
  submit(job: JobSubmission, options?: CallOptions & { readonly idempotencyKey?: string }): Promise<string>;
  jobs(
    query?: {
      readonly domainId?: string;
      readonly status?: JobStatus;
      readonly capabilities?: readonly string[];
      readonly limit?: number;
      readonly cursor?: string;
    },
    options?: CallOptions,
  ): Promise<JobsPage>;
  job(id: string, options?: CallOptions): Promise<JobDetail>;
  cancel(
    id: string,
    options?: CallOptions,
  ): Promise<{ readonly id: string; readonly status: JobStatus; readonly updated_at: string }>;
  delete(id: string, options?: CallOptions): Promise<void>;
  /**
   * Every event of a job after `after` (default 0), past ones first, then live ones, ending with the job's terminal
   * event. Reconnects by sequence number when the connection breaks, so there is no gap and no repeat. With
   * `follow: false` it ends after the events there are now.
   */
  events(
    id: string,
    options?: CallOptions & { readonly after?: number; readonly follow?: boolean },
  ): AsyncIterable<JobEvent>;
  nodes(options?: CallOptions): Promise<readonly NodeRecord[]>;
  busyNodes(options?: CallOptions): Promise<readonly BusyNode[]>;
  /** Makes credentials for a node. `registrationCredentials` is the value for `REG_SECRET`. */
  addNode(
    node: { readonly name: string; readonly mode: NodeMode },
    options?: CallOptions,
  ): Promise<{
    readonly id: string;
    readonly registrationSecret: string;
    readonly registrationCredentials: string;
  }>;
  /** Throws `unavailable` when the dispatcher does not answer. */
  health(options?: CallOptions): Promise<{ readonly version: string; readonly domainId: string }>;
  /**
   * Sends bytes, or a stream of any length, as a new data item of `domainId` (default: the dispatcher's own domain) and resolves with its
   * id, for `inputs_cids`. What may succeed is tried again; memory holds one part at most.
   *
   * @throws MillraceError `failed_precondition` when the bytes are not those of `sha256`; `already_exists` for a taken name
   */
  upload(
    bytes: ByteStream | Uint8Array,
    options: UploadOptions & { readonly domainId?: string },
  ): Promise<string>;
  /** Storage as this requestor, for inputs and artifacts. */
  readonly storage: DomainStorage;
  close(): Promise<void>;
}

export interface RequestorOptions {
  /** Origin of the dispatcher, e.g. `http://127.0.0.1:7070`. */
  readonly url: string;
  /** Client token. */
  readonly token: string;
  /** Per request, milliseconds. Default 30,000. */
  readonly timeoutMs?: number;
}
