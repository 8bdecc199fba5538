/**
 * What a runner is handed for the duration of one attempt. Nothing here is to be kept after `run` settles: the
 * node then closes the ports, and calls on them fail with `failed_precondition`.
 */
import type { Readable } from 'node:stream';
import type { Json, JsonObject } from './json.ts';
import type { LeaseEnvelope } from './lease.ts';

/** Bytes as they flow: a Node stream, or anything that yields chunks. */
export type ByteStream = AsyncIterable<Uint8Array>;

/** An input on the local disk. `null` where the source did not say. */
export interface MaterializedInput {
  /** As the caller gave it. */
  readonly cid: string;
  /** The primary file. */
  readonly path: string;
  readonly data_id: string | null;
  readonly name: string | null;
  readonly data_type: string | null;
  readonly domain_id: string | null;
  /** The folder everything of this download is in; removed when the task ends. */
  readonly root_dir: string;
  /** Further files of the same download. */
  readonly related_files: readonly string[];
  /** Always empty: nothing is unzipped. */
  readonly extracted_paths: readonly string[];
}

export interface InputReadOptions {
  readonly signal?: AbortSignal;
}

/**
 * Fetches inputs by CID. A CID is a data id of the lease's domain, or a URL of the lease's domain server; foreign
 * hosts and domains are refused. Errors: `not_found`, `invalid_argument`, `permission_denied`, `data_loss` when
 * size or framing do not match, `unavailable` after retries. Every method may be called concurrently.
 */
export interface InputSource {
  /** The first part, whole, in memory. Use {@link openRead} for anything large. */
  getBytesByCid(cid: string, options?: InputReadOptions): Promise<Uint8Array>;
  /** Path of the first part on the local disk, inside the task's own folder. */
  materializeCidToTemp(cid: string, options?: InputReadOptions): Promise<string>;
  /** One download to disk: the first part is primary, further ones are `related_files`. */
  materializeCidWithMeta(cid: string, options?: InputReadOptions): Promise<MaterializedInput>;
  /** The first part as a stream, with backpressure; memory does not grow with its size. */
  openRead(cid: string, options?: InputReadOptions): Promise<Readable>;
}

/** An upload in chunks. Exactly one of `finish` and `abort` ends it. */
export interface MultipartUpload {
  /** Appends. Resolves when the chunk was accepted, which is the caller's backpressure. Not concurrent. */
  writeChunk(chunk: Uint8Array): Promise<void>;
  /** Commits; only now does the artifact exist. */
  finish(): Promise<void>;
  /** Discards everything written. */
  abort(): Promise<void>;
}

export interface DomainArtifactRequest {
  /** Bookkeeping key; gets the task's outputs prefix. */
  readonly rel_path: string;
  /** Used verbatim. 1 to 128 bytes. */
  readonly name: string;
  /** Used verbatim. 1 to 128 bytes. */
  readonly data_type: string;
  /** Replace this record instead of creating one. */
  readonly existing_id?: string | null;
  readonly content:
    { readonly bytes: Uint8Array } | { readonly file: string } | { readonly stream: ByteStream };
}

/**
 * Uploads artifacts. `relPath` is relative to the task's `outputs_prefix`. Uploading twice to one path replaces it
 * and reports it once. Every method may be called concurrently for different paths.
 */
export interface ArtifactSink {
  putBytes(relPath: string, bytes: Uint8Array): Promise<void>;
  putFile(relPath: string, filePath: string): Promise<void>;
  /** Uploads while reading; memory does not grow with the size. Length need not be known. */
  putStream(relPath: string, stream: ByteStream): Promise<void>;
  openMultipart(relPath: string): Promise<MultipartUpload>;
  /** Uploads under a name and type of the caller's. Resolves with the data id, or null if the server gave none. */
  putDomainArtifact(request: DomainArtifactRequest): Promise<string | null>;
}

/** What a runner tells the dispatcher, and hears from it. */
export interface ControlPlane {
  /** True once `ctx.signal` is aborted, whatever the reason. */
  isCancelled(): Promise<boolean>;
  /** Replaces the current progress value; the newest is sent with the next heartbeat. Always resolves. */
  progress(value: Json): Promise<void>;
  /**
   * Appends one event, sent in order with the next heartbeat. Events beyond the node's bounds (1024 pending,
   * 64 KiB each by default) are dropped, counted, and the count is reported as an event.
   */
  logEvent(value: Json): Promise<void>;
  /**
   * What the attempt used, told by runners that measure the work of others: `cpu_ms`, `cpu_user_ms`, `cpu_system_ms`,
   * `peak_memory_bytes`, `bytes_in`, `bytes_out`, `fuel_used`, `exit_code`, `signal`, `sandbox`, `container`, each absent or
   * null where it is not known. It is reported with the ending; the last one counts. Absent where nobody asks.
   */
  usage?(value: JsonObject): Promise<void>;
}

export interface AccessTokenProvider {
  /** The current domain token. Follows rotation. */
  get(): string;
}

export type LogLevel = 'debug' | 'info' | 'warn' | 'error';

/** A structured logger. Constant message, variable fields. */
export interface Logger {
  debug(message: string, fields?: JsonObject): void;
  info(message: string, fields?: JsonObject): void;
  warn(message: string, fields?: JsonObject): void;
  error(message: string, fields?: JsonObject): void;
  /** A logger that adds these fields to every line. */
  child(fields: JsonObject): Logger;
}

export interface TaskContext {
  /** As it stood after the first heartbeat's answer was merged in. A snapshot. */
  readonly lease: LeaseEnvelope;
  readonly input: InputSource;
  readonly output: ArtifactSink;
  readonly ctrl: ControlPlane;
  readonly accessToken: AccessTokenProvider;
  /** Aborts with a {@link TaskAbort}. Settle soon after: the node waits for a grace period, then ends the code. */
  readonly signal: AbortSignal;
  /** Lines go to the task's log in the dispatcher (as events) and, at debug level, to the node's own log. */
  readonly log: Logger;
}
