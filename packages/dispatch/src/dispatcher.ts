/**
 * The dispatcher as a thing with a lifetime: a store, a blob store, keys, the sweeper, and one HTTP server for DDS,
 * DMS and domain storage. This file is the face the command line uses; the parts are wired in `server.ts`.
 */
import type { Clock, Logger, Random, Tracer } from '@millrace/runner';
import type { BlobStore } from './blobs.ts';
import type { Store } from './store.ts';

export interface DispatcherOptions {
  readonly store: Store;
  readonly blobs: BlobStore;
  /** Default 127.0.0.1. */
  readonly host?: string;
  /** Default 7070; 0 picks a free one. */
  readonly port?: number;
  /** How others reach it, when that differs from host and port (a proxy, a name). No trailing slash. */
  readonly publicUrl?: string;
  readonly limits?: Partial<DispatcherLimits>;
  /** Which jobs are removed by themselves. Default: none ever. */
  readonly retention?: Retention;
  readonly log?: Logger;
  readonly clock?: Clock;
  readonly random?: Random;
  /** Where spans go. Default: nowhere; a `traceparent` that comes with a job reaches its leases all the same. */
  readonly tracer?: Tracer;
  /**
   * Further figures for `/metrics`, in Prometheus's text format and under names of their own: those of a node in the same
   * process. Default none.
   */
  readonly moreMetrics?: () => Promise<string>;
}

/** How long jobs are kept that have ended. */
export interface Retention {
  /** Counted from their end. With them go their events, logs and receipts, and results that could be given again. */
  readonly keepJobsMs: number;
  /** Data items made by the tasks of a removed job go with it; else only who deletes them does. Default false. */
  readonly artifacts?: boolean;
}

/** Every bound of the server. Each has a test at it and one past it. */
export interface DispatcherLimits {
  /** JSON bodies. Default 2 MiB. */
  readonly jsonBodyBytes: number;
  /** The body of a job submission. Default 16 MiB. */
  readonly jobBodyBytes: number;
  /** Nesting of JSON bodies. Default 32. */
  readonly jsonDepth: number;
  /** One data item. Default 64 GiB. */
  readonly dataBytes: number;
  /** A single (not chunked) upload request. Default 100 MiB. */
  readonly uploadRequestBytes: number;
  /** Part size offered to chunked uploads. Default 8 MiB. */
  readonly partBytes: number;
  /** One compute. Default 32 MiB, as in the reference. */
  readonly computeBytes: number;
  /** Tasks per job. Default 10,000. */
  readonly tasksPerJob: number;
  /** Items per batch request. Default 256. */
  readonly batchItems: number;
  /** Longest `Prefer: wait`. Default 60 s. */
  readonly longPollSecs: number;
  /** Progress value and each event, bytes of JSON. Default 64 KiB. */
  readonly progressBytes: number;
  /** The log of one attempt, bytes; what comes beyond is counted by the node and not kept. 0: none is taken. Default 16 MiB. */
  readonly taskLogBytes: number;
  /** Events per heartbeat. Default 1024. */
  readonly eventsPerHeartbeat: number;
  /** Time a client may take to send headers, and the longest silence in a body. Default 30 s. */
  readonly slowClientMs: number;
  /** Registrations and logins that one address may begin at once; a tenth of it per second afterwards. Default 1000. */
  readonly loginBurst: number;
}

export interface Dispatcher extends AsyncDisposable {
  /** The origin it listens on, e.g. `http://127.0.0.1:7070`. */
  readonly url: string;
  /** The domain that jobs without `domain_id` get. */
  readonly defaultDomainId: string;
  /**
   * A client token (ES256 JWT): may submit, read and cancel jobs and read and write artifacts in every domain, and
   * add nodes; with `domainId` only in that domain, and add no nodes. `readOnly`: may change nothing. `subject` names
   * the holder and scopes idempotency keys (default `client`). Default lifetime 30 days.
   */
  issueClientToken(options?: {
    readonly domainId?: string;
    readonly ttlSecs?: number;
    readonly readOnly?: boolean;
    readonly subject?: string;
  }): Promise<string>;
  /** Ends long polls and streams, waits for requests under way, then closes. Store and blobs stay open: they were handed in. */
  close(): Promise<void>;
}
