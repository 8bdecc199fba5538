/**
 * The client side of domain storage: one request each, no retries. Retry, token rotation and naming rules are the
 * caller's (`@millrace/node` storage, the command line). Nothing is buffered whole: bodies are streams.
 *
 * Errors as in `dms.ts`, with the reference's texts (`not found (404)`, `server error (503)`, `network error: …`) as
 * messages.
 */
import type { Readable } from 'node:stream';
import type { ByteStream, Clock } from '@millrace/runner';
import type { CallOptions } from './dms.ts';

export interface DataItem {
  readonly id: string;
  readonly domain_id: string;
  readonly name: string;
  readonly data_type: string;
  readonly size: number;
  readonly created_at: string;
  readonly updated_at: string;
}

/** One part of a multipart download. `body` must be consumed (or destroyed) before the next part is asked for. */
export interface DownloadPart {
  readonly id: string;
  readonly name: string;
  readonly data_type: string;
  readonly domain_id: string;
  readonly size: number;
  /**
   * `sha256:<hex>`; null where the server does not tell (ours does). Where it does, `body` ends with `data_loss` instead
   * of its last chunk when the bytes are others.
   */
  readonly digest: string | null;
  readonly body: Readable;
}

export interface StorageInfo {
  readonly requestMaxBytes: number;
  readonly domainDataMaxBytes: number | null;
  readonly multipartEnabled: boolean;
  /** Creating an item of a name that is taken is refused (409), whatever its type: so most names need not be looked up before. */
  readonly uniqueNames: boolean;
  /**
   * Parts of items may go past the server, which is worth it from `fromBytes` on. What is known as a whole (`StartUpload.sha256`) is one
   * part, up to `wholeBytes`. Null: they may not.
   */
  readonly direct: { readonly fromBytes: number; readonly wholeBytes: number } | null;
}

export interface DownloadQuery {
  readonly domainId: string;
  readonly ids: readonly string[];
  readonly name?: string;
  readonly dataType?: string;
}

/** Where an item goes: a new one under name and type, or the bytes of an existing one. */
export type UploadTarget =
  { readonly name: string; readonly dataType: string } | { readonly existingId: string };

/** An item to be created. */
export interface NewItem {
  readonly name: string;
  readonly dataType: string;
  readonly bytes: Uint8Array;
}

export interface StartUpload {
  readonly domainId: string;
  readonly name: string;
  readonly dataType: string;
  /** null when not known beforehand. */
  readonly size: number | null;
  readonly existingId: string | null;
  /** 64 hex digits: what all of it is, where that is known. With the size it lets a server take it as one part. Default unknown. */
  readonly sha256?: string;
}

export interface UploadSession {
  readonly uploadId: string;
  readonly partSize: number;
  /** null from a server of the older kind. */
  readonly dataId: string | null;
  /** The server takes several parts at the same time and in any order. Others may count on one after the other. */
  readonly parallelParts: boolean;
}

export interface DomainStorage {
  /** Null when the server has no such endpoint (404). Cached for 60 s. */
  info(options?: CallOptions): Promise<StorageInfo | null>;
  /** What {@link info} answered in the last 60 s, from which a call of it now would answer; null: nothing is known. */
  readonly knownInfo: StorageInfo | null;
  /**
   * The parts of `GET .../data` in order, verified against their sizes and the final boundary: a body that ends early
   * is `data_loss`, an answer without parts `not_found`.
   */
  download(query: DownloadQuery, options?: CallOptions): AsyncIterable<DownloadPart>;
  /**
   * The bytes of one item by `?raw=true`, with its size and digest if told. Where the digest is told and the item is small (64 KiB), they
   * have come and been checked when this resolves.
   */
  openRaw(
    domainId: string,
    id: string,
    range?: { readonly start: number; readonly end?: number },
    options?: CallOptions,
  ): Promise<{ readonly body: Readable; readonly size: number | null; readonly digest: string | null }>;
  /** Items by name and type filters. Empty when there are none (also for 404). */
  find(
    domainId: string,
    filter: { readonly name?: string; readonly dataType?: string },
    options?: CallOptions,
  ): Promise<DataItem[]>;
  get(domainId: string, id: string, options?: CallOptions): Promise<DataItem | null>;
  /** The single upload: POST creates, PUT replaces. The item, or null when the server's list is empty. */
  put(
    domainId: string,
    target: UploadTarget,
    bytes: Uint8Array,
    options?: CallOptions,
  ): Promise<DataItem | null>;
  /**
   * Creates several items in one request, all or none. The items in their order. For our dispatcher: a reference server takes one part
   * for each request.
   */
  putNew(domainId: string, items: readonly NewItem[], options?: CallOptions): Promise<DataItem[]>;
  /** @throws `unimplemented` for 404, 405 and 501: the server has no chunked upload. */
  startUpload(request: StartUpload, options?: CallOptions): Promise<UploadSession>;
  /**
   * Returns the etag. `size` bytes are taken from `body`. Bytes that can be read more than once, which are those in memory and what a
   * function gives, go past the server where it offers that and they are worth it; through it if that does not work. `sha256`: of
   * this part, in hex, if it is known.
   */
  putPart(
    domainId: string,
    uploadId: string,
    partNumber: number,
    body: Uint8Array | ByteStream | (() => Uint8Array | ByteStream),
    size: number,
    options?: CallOptions & { readonly sha256?: string },
  ): Promise<string>;
  /** Returns the data id. */
  finishUpload(
    domainId: string,
    uploadId: string,
    parts: readonly { readonly part_number: number; readonly etag: string }[],
    options?: CallOptions,
  ): Promise<string>;
  /** Best effort; resolves whatever the answer. */
  abortUpload(domainId: string, uploadId: string, options?: CallOptions): Promise<void>;
  delete(domainId: string, id: string, options?: CallOptions): Promise<boolean>;
}

export interface DomainStorageOptions {
  /** The lease's `domain_server_url`; trailing slashes are removed. */
  readonly baseUrl: string;
  /** Read anew for every request, so rotation takes effect. */
  readonly token: () => string;
  /** Sent as `posemesh-client-id` with every request. */
  readonly clientId: string;
  /** Per request: time to the response head, and longest silence while a body flows. Milliseconds. Default 60,000. */
  readonly timeoutMs?: number;
  /** Ages the answer of `info`. Default: the machine's. */
  readonly clock?: Clock;
}
