/**
 * The seam between the dispatcher and where bytes live. Content-addressed by SHA-256; equal bytes are stored once.
 * Implementations: `blobs/files.ts` and `blobs/s3.ts`. `blobs/suite.ts` proves any of them.
 */
import type { Readable } from 'node:stream';
import type { ByteStream } from '@millrace/runner';

export interface BlobInfo {
  /** `sha256:<64 hex>`. */
  readonly digest: string;
  readonly size: number;
}

export interface StoredBlob extends BlobInfo {
  /** When the newest put of these bytes was committed, epoch milliseconds. */
  readonly putAtMs: number;
}

export interface PutOptions {
  /** More bytes than this end the put with `resource_exhausted`, nothing kept. */
  readonly maxBytes: number;
  /** The bytes must be these, else `data_loss`, nothing kept. */
  readonly expect?: { readonly digest?: string; readonly size?: number };
  readonly signal?: AbortSignal;
}

export interface PutPartOptions extends PutOptions {
  /** Where the part will begin in the whole, if that is known: a store may put it there at once, which makes joining cheap. */
  readonly at?: number;
}

/** A part as it was answered when it was put. */
export interface StagedPart {
  readonly partNumber: number;
  readonly digest: string;
  readonly size: number;
}

export interface BlobStore extends AsyncDisposable {
  /**
   * Whose blobs these are: the first id this was called with is kept beside them, and is the answer ever after. Only the
   * database that names bytes knows which are garbage, so another one must not judge them. `owner`: letters, digits and `-`.
   */
  claim(owner: string): Promise<string>;
  /** Hashes while storing; resolves when the bytes are durable under their digest. */
  put(bytes: ByteStream, options: PutOptions): Promise<BlobInfo>;
  /** Null when absent. */
  stat(digest: string): Promise<BlobInfo | null>;
  /**
   * The bytes from `start` to `end` (inclusive, both optional). A whole read is verified: the stream ends with a
   * `data_loss` error instead of its last chunk when the stored bytes do not match. `not_found` when absent,
   * `invalid_argument` for a range that is not within the blob.
   */
  open(digest: string, range?: { readonly start?: number; readonly end?: number }): Promise<Readable>;
  /** Staging for a chunked upload: parts may arrive in any order and again. Returns the part's digest. */
  putPart(
    uploadId: string,
    partNumber: number,
    bytes: ByteStream,
    options: PutPartOptions,
  ): Promise<BlobInfo>;
  /**
   * Joins parts 1..n in order into one blob; none give the empty blob. The staging stays until {@link dropParts}, so
   * whoever crashes before the result is named can join again. `data_loss` when a part is not the one of that digest.
   */
  joinParts(uploadId: string, parts: readonly StagedPart[]): Promise<BlobInfo>;
  /** Drops the staging. Harmless when there is none. */
  dropParts(uploadId: string): Promise<void>;
  /** Every upload that has staging, with the time of its newest part, epoch milliseconds. */
  listUploads(): AsyncIterable<{ readonly uploadId: string; readonly putAtMs: number }>;
  /** Every digest stored, in any order. */
  list(): AsyncIterable<StoredBlob>;
  /**
   * False when there was nothing to delete, or when the blob was put (again) at `ifPutBeforeMs` or later: a put
   * that is about to be named is never undone by a collector that looked earlier.
   */
  delete(digest: string, options?: { readonly ifPutBeforeMs?: number }): Promise<boolean>;
  /**
   * Removes what puts begun before `beforeMs` left unfinished and outside of any name; resolves with how many such things there
   * were. Absent where opening the store does that.
   */
  sweep?(beforeMs: number, signal?: AbortSignal): Promise<number>;
  /** Absent where bytes cannot be read but through this store, or may not. */
  readonly direct?: DirectReads;
  /** Absent where bytes cannot be written but through this store, or may not, or where whoever has them could write others. */
  readonly directParts?: DirectParts;
}

/** A part of a chunked upload, by what is in it. */
export interface StatedPart extends BlobInfo {
  readonly partNumber: number;
}

/** Writing parts of chunked uploads to where the bytes are, past the dispatcher. */
export interface DirectParts {
  /** Every URL begins with this: scheme, host and port. */
  readonly origin: string;
  /**
   * A request by which whoever has it may put that part, for `validSecs` (1 to 604,800) and as often as they like, so it is a
   * secret. The bytes have to be the stated ones: others are refused by the place itself. Like {@link BlobStore.putPart} it replaces the
   * part of before, and like there the part is dropped with its upload.
   */
  put(uploadId: string, part: StatedPart, validSecs: number): Promise<DirectPut>;
  /** The size of that part, if it is there; else null. */
  size(uploadId: string, partNumber: number, digest: string): Promise<number | null>;
}

export interface DirectPut {
  readonly url: string;
  /** To be sent as they are, besides what says how long the body is. */
  readonly headers: Readonly<Record<string, string>>;
}

/** Reading from where the bytes are, past the dispatcher. */
export interface DirectReads {
  /** Every URL begins with this: scheme, host and port. */
  readonly origin: string;
  /**
   * A URL by which whoever has it may begin to read the bytes for `validSecs` (1 to 604,800), so it is a secret. It takes `Range`.
   * The blob need not be there.
   */
  url(digest: string, validSecs: number): Promise<string>;
}
