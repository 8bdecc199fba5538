/**
 * A stream of any length as a new data item: one request when it is short, else in parts, each sent again until it is there. Many short ones:
 * several in one request.
 */
import { createHash, type Hash } from 'node:crypto';
import { MillraceError, type ByteStream } from '@millrace/runner';
import type { CallOptions } from './dms.ts';
import type { DomainStorage, NewItem, UploadSession } from './domain.ts';
import { retrying } from './retrying.ts';

/** Uploads up to this size go in one request. */
const SINGLE_UPLOAD_BYTES = 8 * 1024 * 1024;

/** Parts under way at once, where the server takes several: while one is stored the next one is on its way. */
const PARTS_AT_ONCE = 3;

/** Above this size one part at a time is held. */
const LARGE_PART_BYTES = 16 * 1024 * 1024;

/** Items of one request, and their bytes in all. */
const BATCH_ITEMS = 256;
const BATCH_BYTES = 1024 * 1024;

/** Requests of {@link uploadItems} under way at once. */
const BATCHES_AT_ONCE = 2;

export interface UploadOptions extends CallOptions {
  /** Unique in its domain, by the rules of {@link checkDataName}. */
  readonly name: string;
  /** Default `binary`. */
  readonly dataType?: string;
  /** Hex. The bytes must be these, else nothing is kept. */
  readonly sha256?: string;
  /** Of `bytes` that are a function, with the `sha256`: they may then go past the dispatcher in one piece. */
  readonly size?: number;
  /** Called as bytes were accepted, with the total so far. */
  readonly onBytes?: (total: number) => void;
}

/** Sends `bytes` to `domainId` and resolves with the new item's id. See `Requestor.upload`. */
export async function uploadStream(
  storage: DomainStorage,
  domainId: string,
  source: ByteStream | Uint8Array | (() => ByteStream),
  options: UploadOptions,
): Promise<string> {
  let bytes: ByteStream | Uint8Array;
  if (typeof source === 'function') {
    const id = await uploadWhole(storage, domainId, source, options);
    if (id !== null) return id;
    bytes = source();
  } else bytes = source;
  const { name, dataType = 'binary', signal, onBytes } = options;
  const call = signal === undefined ? {} : { signal };
  const hash = options.sha256 === undefined ? null : createHash('sha256');
  const checkContent = (): void => {
    const digest = hash?.digest('hex');
    if (digest === options.sha256) return;
    throw otherBytes(name, options.sha256, digest);
  };
  const first = blocks(bytes instanceof Uint8Array ? [bytes] : bytes, SINGLE_UPLOAD_BYTES, hash);
  const head = (await first.next()).value ?? new Uint8Array();
  const second = await first.next();
  if (second.done !== true) {
    return await uploadParts(storage, domainId, rejoin(head, second.value, first), options, checkContent);
  }
  checkContent();
  const item = await retrying(signal, async (attempt) => {
    // The answer to an earlier try may have been lost on its way; the name is unique, so it tells.
    const there = attempt === 0 ? null : (await storage.find(domainId, { name }, call))[0];
    return there ?? (await storage.put(domainId, { name, dataType }, head, call));
  });
  if (item === null) {
    throw new MillraceError('data_loss', `the dispatcher gave no id for the upload of ${name}`);
  }
  onBytes?.(head.length);
  return item.id;
}

/** As one part that may go past the dispatcher. Null where it takes none, or not of this size. */
async function uploadWhole(
  storage: DomainStorage,
  domainId: string,
  read: () => ByteStream,
  { name, dataType = 'binary', sha256, size, signal, onBytes }: UploadOptions,
): Promise<string | null> {
  if (sha256 === undefined || size === undefined) return null;
  const call = signal === undefined ? {} : { signal };
  const { direct = null } = (await retrying(signal, () => storage.info(call))) ?? {};
  if (direct === null || size < direct.fromBytes || size > direct.wholeBytes) return null;
  const upload = await retrying(signal, () =>
    storage.startUpload({ domainId, name, dataType, size, existingId: null, sha256 }, call),
  );
  let done = false;
  try {
    if (upload.partSize < size) return null;
    let most = 0;
    async function* counted(): AsyncGenerator<Uint8Array> {
      let total = 0;
      for await (const chunk of read()) {
        yield chunk;
        total += chunk.length;
        // What is sent again is not counted again.
        if (total <= most) continue;
        most = total;
        onBytes?.(total);
      }
    }
    const etag = await retrying(signal, () =>
      storage.putPart(domainId, upload.uploadId, 1, counted, size, { ...call, sha256 }),
    );
    // It may have gone through the dispatcher, which does not know what was stated.
    if (etag !== `sha256:${sha256}`) throw otherBytes(name, sha256, etag.slice('sha256:'.length));
    const parts = [{ part_number: 1, etag }];
    const id = await retrying(signal, () => storage.finishUpload(domainId, upload.uploadId, parts, call));
    done = true;
    return id;
  } finally {
    if (!done) await storage.abortUpload(domainId, upload.uploadId);
  }
}

async function uploadParts(
  storage: DomainStorage,
  domainId: string,
  bytes: ByteStream,
  { name, dataType = 'binary', signal, onBytes }: UploadOptions,
  checkContent: () => void,
): Promise<string> {
  const call = signal === undefined ? {} : { signal };
  const upload = await retrying(signal, () =>
    storage.startUpload({ domainId, name, dataType, size: null, existingId: null }, call),
  );
  const parts = new PartSender(storage, domainId, upload, call, onBytes);
  try {
    for await (const block of blocks(bytes, upload.partSize)) await parts.send(block);
    const sent = await parts.all();
    checkContent();
    return await retrying(signal, () => storage.finishUpload(domainId, upload.uploadId, sent, call));
  } catch (error) {
    await parts.stop();
    await storage.abortUpload(domainId, upload.uploadId);
    throw error;
  }
}

function otherBytes(name: string, wanted: string | undefined, got: string | undefined): MillraceError {
  return new MillraceError(
    'failed_precondition',
    `${name} must have the SHA-256 ${wanted}, got bytes with ${got}; nothing was kept`,
  );
}

/** The parts of one upload, some of them under way. */
class PartSender {
  readonly #storage: DomainStorage;
  readonly #domainId: string;
  readonly #upload: UploadSession;
  readonly #signal: AbortSignal;
  readonly #stop = new AbortController();
  readonly #onBytes: ((total: number) => void) | undefined;
  readonly #sent: { part_number: number; etag: string }[] = [];
  readonly #underWay = new Set<Promise<void>>();
  #failure: { readonly error: unknown } | null = null;
  #count = 0;
  #total = 0;

  constructor(
    storage: DomainStorage,
    domainId: string,
    upload: UploadSession,
    { signal }: CallOptions,
    onBytes: ((total: number) => void) | undefined,
  ) {
    this.#storage = storage;
    this.#domainId = domainId;
    this.#upload = upload;
    this.#signal = signal === undefined ? this.#stop.signal : AbortSignal.any([signal, this.#stop.signal]);
    this.#onBytes = onBytes;
  }

  /** Resolves when there is room for another one. Rejects when one failed for good. */
  async send(block: Uint8Array): Promise<void> {
    this.#count += 1;
    const sending = this.#part(this.#count, block)
      .catch((error: unknown) => void (this.#failure ??= { error }))
      .finally(() => void this.#underWay.delete(sending));
    this.#underWay.add(sending);
    const { parallelParts, partSize } = this.#upload;
    const most = parallelParts && partSize <= LARGE_PART_BYTES ? PARTS_AT_ONCE : 1;
    if (this.#underWay.size >= most) await Promise.race(this.#underWay);
    this.#check();
  }

  /** When every part is there. */
  async all(): Promise<readonly { readonly part_number: number; readonly etag: string }[]> {
    await Promise.all(this.#underWay);
    this.#check();
    return this.#sent.toSorted((a, b) => a.part_number - b.part_number);
  }

  /** Ends what is under way and waits for that. */
  async stop(): Promise<void> {
    this.#stop.abort(new MillraceError('canceled', 'another part of the upload failed'));
    await Promise.all(this.#underWay);
  }

  #check(): void {
    if (this.#failure !== null) throw this.#failure.error;
  }

  async #part(part_number: number, block: Uint8Array): Promise<void> {
    const signal = this.#signal;
    const { uploadId } = this.#upload;
    const etag = await retrying(signal, () =>
      this.#storage.putPart(this.#domainId, uploadId, part_number, block, block.length, { signal }),
    );
    this.#sent.push({ part_number, etag });
    this.#total += block.length;
    this.#onBytes?.(this.#total);
  }
}

/** Creates items and resolves with their ids, in order. See `Requestor.uploadItems`. */
export async function uploadItems(
  storage: DomainStorage,
  domainId: string,
  items: readonly NewItem[],
  options: CallOptions,
): Promise<string[]> {
  const ids: string[] = [];
  const batches = batchesOf(items).entries();
  let failed = false;
  const worker = async (): Promise<void> => {
    for (const [, { from, batch }] of batches) {
      if (failed) return;
      try {
        const made = await createBatch(storage, domainId, batch, options);
        made.forEach((id, index) => (ids[from + index] = id));
      } catch (error) {
        failed = true;
        throw error;
      }
    }
  };
  const workers = Array.from({ length: BATCHES_AT_ONCE }, worker);
  await Promise.allSettled(workers);
  await Promise.all(workers);
  return ids;
}

/** In order. One that is larger than a batch may be is one of its own. */
function batchesOf(
  items: readonly NewItem[],
): { readonly from: number; readonly batch: readonly NewItem[] }[] {
  const batches: { from: number; batch: NewItem[] }[] = [];
  let bytes = 0;
  items.forEach((item, index) => {
    const last = batches.at(-1);
    bytes += item.bytes.length;
    if (last !== undefined && last.batch.length < BATCH_ITEMS && bytes <= BATCH_BYTES) {
      last.batch.push(item);
    } else {
      batches.push({ from: index, batch: [item] });
      bytes = item.bytes.length;
    }
  });
  return batches;
}

async function createBatch(
  storage: DomainStorage,
  domainId: string,
  batch: readonly NewItem[],
  options: CallOptions,
): Promise<readonly string[]> {
  const [first] = batch;
  if (first !== undefined && batch.length === 1) {
    return [await uploadStream(storage, domainId, first.bytes, { ...options, ...first })];
  }
  return await retrying(options.signal, async (attempt) => {
    // The answer to an earlier try may have been lost on its way. Then all of them are there, or none.
    if (attempt > 0) {
      const there: string[] = [];
      for (const { name } of batch) {
        const [item] = await storage.find(domainId, { name }, options);
        if (item === undefined) break;
        there.push(item.id);
      }
      if (there.length === batch.length) return there;
    }
    const made = await storage.putNew(domainId, batch, options);
    if (made.length === batch.length) return made.map((item) => item.id);
    throw new MillraceError(
      'data_loss',
      `the dispatcher gave ${made.length} ids for ${batch.length} uploads`,
    );
  });
}

/** The stream in blocks of exactly `size` bytes, the last one shorter; `hash` sees all of it. */
async function* blocks(
  bytes: ByteStream | Iterable<Uint8Array>,
  size: number,
  hash: Hash | null = null,
): AsyncGenerator<Uint8Array> {
  let held: Uint8Array[] = [];
  let length = 0;
  for await (const chunk of bytes) {
    hash?.update(chunk);
    let rest = chunk;
    while (length + rest.length >= size) {
      const taken = rest.subarray(0, size - length);
      yield held.length === 0 ? taken : Buffer.concat([...held, taken]);
      held = [];
      length = 0;
      rest = rest.subarray(taken.length);
    }
    if (rest.length > 0) {
      held.push(rest);
      length += rest.length;
    }
  }
  if (length > 0) yield held.length === 1 ? held[0]! : Buffer.concat(held);
}

async function* rejoin(
  first: Uint8Array,
  second: Uint8Array,
  rest: AsyncGenerator<Uint8Array>,
): AsyncGenerator<Uint8Array> {
  yield first;
  yield second;
  yield* rest;
}
