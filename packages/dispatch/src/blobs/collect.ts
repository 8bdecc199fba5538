/**
 * Removes bytes that nothing names: of items that were replaced or deleted, and of uploads that were never completed.
 *
 * Why it never removes what is in use: a put of equal bytes stamps the blob anew, so whatever is about to be named was
 * put within `graceMs`; it asks the store after looking at the stamp, and the blob store deletes only what was not put
 * again since. An item's old bytes may go while somebody is about to read them; readers look the item up again.
 */
import { randomUUID } from 'node:crypto';
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
  /** Chunked uploads, and puts that a crash ended. */
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
 * @throws MillraceError `invalid_argument` for a grace below one hour; `failed_precondition` when the blobs belong to another
 * database, to which every blob there is would look unnamed.
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
  await checkOwner(store, blobs);
  const { signal } = options;
  const now = (options.clock ?? systemClock).now();
  const cutoff = now - graceMs;
  const uploads =
    (await dropExpiredUploads(store, blobs, signal)) +
    (await dropForgottenParts(blobs, now - UPLOAD_TTL_MS - graceMs, signal)) +
    ((await blobs.sweep?.(now - UPLOAD_TTL_MS, signal)) ?? 0);
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

async function checkOwner(store: Store, blobs: BlobStore): Promise<void> {
  const setting = await store.setting('blob_owner', () => ({ id: randomUUID() }));
  const mine = setting['id'] as string;
  const owner = await blobs.claim(mine);
  if (owner === mine) return;
  throw new MillraceError(
    'failed_precondition',
    `the blobs belong to the database with blob_owner ${owner}, this one has ${mine}, so nothing is removed; use the two that ` +
      'belong together, or remove the mark "owner" beside the blobs when the other database is gone for good',
  );
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
