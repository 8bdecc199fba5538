/** A stream of any length as a new data item: one request when it is short, else in parts, each sent again until it is there. */
import { createHash, type Hash } from 'node:crypto';
import { MillraceError, type ByteStream } from '@millrace/runner';
import type { CallOptions } from './dms.ts';
import type { DomainStorage } from './domain.ts';
import { retrying } from './retrying.ts';

/** Uploads up to this size go in one request. */
const SINGLE_UPLOAD_BYTES = 8 * 1024 * 1024;

export interface UploadOptions extends CallOptions {
  /** Unique in its domain, by the rules of {@link checkDataName}. */
  readonly name: string;
  /** Default `binary`. */
  readonly dataType?: string;
  /** Hex. The bytes must be these, else nothing is kept. */
  readonly sha256?: string;
  /** Called as bytes were accepted, with the total so far. */
  readonly onBytes?: (total: number) => void;
}

/** Sends `bytes` to `domainId` and resolves with the new item's id. See `Requestor.upload`. */
export async function uploadStream(
  storage: DomainStorage,
  domainId: string,
  bytes: ByteStream | Uint8Array,
  options: UploadOptions,
): Promise<string> {
  const { name, dataType = 'binary', signal, onBytes } = options;
  const call = signal === undefined ? {} : { signal };
  const hash = createHash('sha256');
  const checkContent = (): void => {
    const digest = hash.digest('hex');
    if (options.sha256 === undefined || digest === options.sha256) return;
    throw new MillraceError(
      'failed_precondition',
      `${name} must have the SHA-256 ${options.sha256}, got bytes with ${digest}; nothing was kept`,
    );
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
  try {
    const parts: { part_number: number; etag: string }[] = [];
    let total = 0;
    for await (const block of blocks(bytes, upload.partSize)) {
      const number = parts.length + 1;
      const etag = await retrying(signal, () =>
        storage.putPart(domainId, upload.uploadId, number, block, block.length, call),
      );
      parts.push({ part_number: number, etag });
      total += block.length;
      onBytes?.(total);
    }
    checkContent();
    return await retrying(signal, () => storage.finishUpload(domainId, upload.uploadId, parts, call));
  } catch (error) {
    await storage.abortUpload(domainId, upload.uploadId);
    throw error;
  }
}

/** The stream in blocks of exactly `size` bytes, the last one shorter; `hash` sees all of it. */
async function* blocks(
  bytes: ByteStream | Iterable<Uint8Array>,
  size: number,
  hash?: Hash,
): AsyncGenerator<Uint8Array> {
  let held: Uint8Array[] = [];
  let length = 0;
  for await (const chunk of bytes) {
    hash?.update(chunk);
    let rest = chunk;
    while (length + rest.length >= size) {
      const taken = rest.subarray(0, size - length);
      yield Buffer.concat([...held, taken]);
      held = [];
      length = 0;
      rest = rest.subarray(taken.length);
    }
    if (rest.length > 0) {
      held.push(rest);
      length += rest.length;
    }
  }
  if (length > 0) yield Buffer.concat(held);
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
