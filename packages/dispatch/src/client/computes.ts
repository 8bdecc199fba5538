/**
 * The client side of the dispatcher's computes: code by digest. One request each, no retries. Bodies are streams.
 *
 * Errors as in `dms.ts`; what is absent is `null`, and a server that has no computes has none of them.
 */
import type { Readable } from 'node:stream';
import type { ByteStream } from '@millrace/runner';
import type { ComputeRecord } from '../records.ts';
import type { CallOptions, TokenSource } from './dms.ts';
import type { ProxySettings } from './proxy.ts';

/** Names a compute: `sha256` and 64 lower-case hex digits. */
export interface ComputeName {
  readonly alg: string;
  readonly digest: string;
}

/** What a server tells of a compute without sending it. */
export interface ComputeStat {
  readonly engine: string;
  readonly bytes: number;
}

export interface ComputesPage {
  readonly items: readonly ComputeRecord[];
  readonly next_cursor: string | null;
}

export interface Computes {
  /** Null when it is not there. */
  stat(name: ComputeName, options?: CallOptions): Promise<ComputeStat | null>;
  /**
   * Its bytes; null when it is not there. Whoever reads them hashes them: nothing here does. `body` must be consumed or
   * destroyed.
   */
  open(name: ComputeName, options?: CallOptions): Promise<(ComputeStat & { readonly body: Readable }) | null>;
  /**
   * Stores one. Storing it again changes nothing.
   *
   * @throws MillraceError `invalid_argument` when the bytes are not those of the name; `already_exists` when it is there
   * for another engine; `resource_exhausted` when it is larger than the server takes.
   */
  put(
    name: ComputeName,
    engine: string,
    bytes: Uint8Array | ByteStream,
    options?: CallOptions,
  ): Promise<ComputeRecord>;
  /** The newest first. `limit` 1 to 1000, default 50. */
  list(
    query?: { readonly limit?: number; readonly cursor?: string },
    options?: CallOptions,
  ): Promise<ComputesPage>;
  /** False when it is not there. */
  delete(name: ComputeName, options?: CallOptions): Promise<boolean>;
}

export interface ComputesOptions {
  /** What `/computes` is appended to: `DMS_BASE_URL` of a node, `<origin>/v1` of a requestor. */
  readonly baseUrl: string;
  /** A client token, or for reading a node's. */
  readonly tokens: TokenSource;
  /** Time to the response head and longest silence in a body, each. Default 60,000 ms. */
  readonly timeoutMs?: number;
  /** Default none. */
  readonly proxy?: ProxySettings;
}
