/**
 * Removes bytes that nothing names: of items that were replaced or deleted, and of uploads that were never completed.
 *
 * Why it never removes what is in use: a put of equal bytes stamps the blob anew, so whatever is about to be named was
 * put within `graceMs`; it asks the store after looking at the stamp, and the blob store deletes only what was not put
 * again since. An item's old bytes may go while somebody is about to read them; readers look the item up again.
 */
import { MillraceError, systemClock, type Clock } from '@millrace/runner';
import type { BlobStore, StoredBlob } from '../blobs.ts';
import type { Store } from '../store.ts';

export interface CollectOptions {
  /** Bytes put within this time are left alone, milliseconds. Default one hour. */
  readonly graceMs?: number;
  /** The clock the blob store stamps with. Default: the machine's. */
  readonly clock?: Clock;
  /** Stops between two batches. */
  readonly signal?: AbortSignal;
}

export interface Collected {
  readonly uploads: number;
  readonly blobs: number;
  readonly bytes: number;
}

/** A chunked upload not completed after this is dropped. */
export const UPLOAD_TTL_MS = 24 * 60 * 60 * 1000;

/** Blobs asked about in one question to the store, and uploads dropped in one go. */
const BATCH = 500;

/** An upload in one request may take half of this, so less would collect what is being uploaded. */
const MIN_GRACE_MS = 60 * 60 * 1000;

/**
 * One round over all blobs. Safe to run beside everything else, also beside another round.
 *
 * @throws MillraceError `invalid_argument` for a grace below one hour.
 */
export async function collectGarbage(
  store: Store,
  blobs: BlobStore,
  options: CollectOptions = {},
): Promise<Collected> {
  const graceMs = options.graceMs ?? MIN_GRACE_MS;
  if (!(graceMs >= MIN_GRACE_MS)) {
    throw new MillraceError('invalid_argument', `graceMs must be at least ${MIN_GRACE_MS}, got ${graceMs}`);
  }
  const { signal } = options;
  const now = (options.clock ?? systemClock).now();
  const cutoff = now - graceMs;
  const uploads =
    (await dropExpiredUploads(store, blobs, signal)) +
    (await dropForgottenParts(blobs, now - UPLOAD_TTL_MS - graceMs, signal));
  const result = { uploads, blobs: 0, bytes: 0 };
  let batch: StoredBlob[] = [];
  const flush = async (): Promise<void> => {
    signal?.throwIfAborted();
    const unnamed = new Set(await store.unreferencedDigests(batch.map((blob) => blob.digest)));
    for (const blob of batch) {
      if (!unnamed.has(blob.digest)) continue;
      if (await blobs.delete(blob.digest, { ifPutBeforeMs: cutoff })) {
        result.blobs += 1;
        result.bytes += blob.size;
      }
    }
    batch = [];
  };
  for await (const blob of blobs.list()) {
    if (blob.putAtMs >= cutoff) continue;
    batch.push(blob);
    if (batch.length >= BATCH) await flush();
  }
  if (batch.length > 0) await flush();
  return result;
}

/** Parts that came after their upload was aborted, and a crash kept from being dropped at once. */
async function dropForgottenParts(
  blobs: BlobStore,
  cutoff: number,
  signal: AbortSignal | undefined,
): Promise<number> {
  let dropped = 0;
  for await (const { uploadId, putAtMs } of blobs.listUploads()) {
    signal?.throwIfAborted();
    // The newest part is older than any upload lives, so whatever it belonged to is over.
    if (putAtMs >= cutoff) continue;
    await blobs.dropParts(uploadId);
    dropped += 1;
  }
  return dropped;
}

async function dropExpiredUploads(
  store: Store,
  blobs: BlobStore,
  signal: AbortSignal | undefined,
): Promise<number> {
  let dropped = 0;
  for (;;) {
    signal?.throwIfAborted();
    const expired = await store.expiredUploads(BATCH);
    for (const upload of expired) {
      // The parts first: a crash in between leaves a record that leads here again, not parts nobody knows of.
      await blobs.dropParts(upload.id);
      await store.deleteUpload(upload.id);
      dropped += 1;
    }
    if (expired.length < BATCH) return dropped;
  }
}
