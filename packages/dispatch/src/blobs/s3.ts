/**
 * Blobs as objects of an S3-compatible bucket, for any number of dispatchers at once. Invariants:
 *
 * - `sha256/ab/<64 hex>` appears whole or not at all: by one PUT when the bytes fit into a part, else by a copy inside the bucket
 *   of what was staged in `tmp/<random>`, since the name is known only when all bytes have passed. At most three parts of an
 *   upload are in memory.
 * - `uploads/<upload id>/<part number>-<64 hex>` are parts of chunked uploads. They too are named by content, so what was read and
 *   hashed for a join is what the bucket then copies.
 * - Putting bytes again writes the object again. That heals a damaged one, and stamps it anew; a conditional create would do
 *   neither, and equal names mean equal bytes, so there is nothing it could protect.
 * - `owner/<id>` is an empty object: the database that names the blobs.
 * - The stamp is the bucket's, turned into our time by what its answers say of its clock. That is exact to a few seconds, where the
 *   collector leaves alone what was put within the last hour.
 * - S3 cannot delete "unless it was put again", so a collector announces what it is about to delete in `gc/`: see {@link S3Blobs.delete}.
 * - What a crashed process leaves is in `tmp/`, `gc/` and S3's own multipart uploads, and {@link S3Blobs.sweep} removes it.
 */
import { createHash, randomBytes } from 'node:crypto';
import type { Readable } from 'node:stream';
import {
  MillraceError,
  sleep,
  systemClock,
  type ByteStream,
  type Clock,
  type Logger,
  type Random,
} from '@millrace/runner';
import type { BlobInfo, BlobStore, DirectParts, DirectReads, PutOptions, StoredBlob } from '../blobs.ts';
import { checkBytes, readableFrom, untilAborted, verified, type Pull } from '../pull-stream.ts';
import { digestHex } from './digest.ts';
import {
  MAX_COPY_BYTES,
  MAX_PARTS,
  MIN_PART_BYTES,
  S3Bucket,
  type ListedObject,
  type ObjectUpload,
  type OpenObject,
  type S3Credentials,
} from './s3-bucket.ts';
import { checkBucket, checksUploads } from './s3-check.ts';
import { parseS3Url } from './s3-url.ts';

export interface S3BlobsOptions {
  /** `s3://bucket/prefix?endpoint=…&region=…&path_style=1&direct=1`; see {@link parseS3Url}. */
  readonly url: string;
  /** Default: the standard AWS chain (environment, profile, container, instance). */
  readonly credentials?: S3Credentials;
  /** What one request carries, bytes, 5 MiB to 5 GiB; smaller blobs go in one request. Default 8 MiB, more for huge blobs. */
  readonly partBytes?: number;
  /** Larger objects are copied in pieces of this size, 5 MiB to 5 GiB, several at once. Default 256 MiB. */
  readonly copyBytes?: number;
  /** The clock that stamps are told in. Default: the machine's. */
  readonly clock?: Clock;
  /** Spreads retries of reads. Default: Math.random. */
  readonly random?: Random;
  /** Told of reads that had to be taken up again. Default: nobody. */
  readonly log?: Logger;
}

const PART_BYTES = 8 * 1024 * 1024;
/** Parts grow with what is to come, up to this: with 10,000 of them, 156 GiB. */
const MOST_PART_BYTES = 16 * 1024 * 1024;
const COPY_BYTES = 256 * 1024 * 1024;

/** Parts of one upload on the way at the same time, besides the one being gathered. */
const PARTS_IN_FLIGHT = 2;
/** Requests at the same time that carry no bytes. */
const COPIES_IN_FLIGHT = 8;

/** A read whose connection broke is taken up where it was so often without a byte of progress. */
const READ_TRIES = 4;
const READ_PAUSE_MS = 200;

/** A delete the collector announced is refused by the bucket after this. */
const DELETE_VALID_SECS = 20;
/** After this nobody has to fear it any more: the clocks of the bucket's servers may differ a little. */
const DELETE_OVER_MS = (DELETE_VALID_SECS + 10) * 1000;
/** Announcements are kept longer than any put takes from its write to its look at them. */
const ANNOUNCED_MS = 15 * 60 * 1000;
/** A put that took longer than this between the two looks for its object too. */
const SURE_MS = 5 * 60 * 1000;
const ANNOUNCED_POLL_MS = 250;

/**
 * Opens a place for blobs in a bucket. A small object is written, read and deleted first, so wrong credentials, missing rights and
 * the like show here and not with the first job.
 *
 * @throws MillraceError `invalid_argument` for a bad URL or option; `failed_precondition` when the bucket does not exist, is in
 * another region, or does not give back what was written; `unauthenticated` for wrong or no credentials; `permission_denied` for
 * a missing right; `unavailable` when the endpoint cannot be reached.
 */
export async function openS3Blobs(options: S3BlobsOptions): Promise<BlobStore> {
  const place = parseS3Url(options.url);
  for (const [name, value] of [
    ['partBytes', options.partBytes],
    ['copyBytes', options.copyBytes],
  ] as const) {
    if (value === undefined) continue;
    if (Number.isSafeInteger(value) && value >= MIN_PART_BYTES && value <= MAX_COPY_BYTES) continue;
    throw new MillraceError(
      'invalid_argument',
      `${name} must be an integer from ${MIN_PART_BYTES} to ${MAX_COPY_BYTES}, got ${value}`,
    );
  }
  const bucket = await S3Bucket.connect(place, options.credentials, options.clock ?? systemClock);
  try {
    await checkBucket(bucket, `tmp/${randomName()}`);
    // What the bucket's name makes of the endpoint, the SDK knows.
    const origin = place.direct ? new URL(await bucket.readUrl('tmp/', 1)).origin : null;
    const takesParts = origin !== null && (await checksUploads(bucket, `tmp/${randomName()}`));
    if (origin !== null && !takesParts) {
      options.log?.warn('uploads go through the dispatcher: the bucket does not check what it is sent', {
        blobs: bucket.where,
      });
    }
    return new S3Blobs(bucket, options, origin, takesParts);
  } catch (error) {
    bucket.close();
    throw error;
  }
}

class S3Blobs implements BlobStore {
  readonly #bucket: S3Bucket;
  readonly #clock: Clock;
  readonly #random: Random;
  readonly #log: Logger | undefined;
  readonly #partBytes: number | undefined;
  readonly #copyBytes: number;
  readonly direct?: DirectReads;
  readonly directParts?: DirectParts;
  readonly #readers = new Set<Readable>();
  readonly #operations = new Set<Promise<unknown>>();
  readonly #closing = new AbortController();

  constructor(bucket: S3Bucket, options: S3BlobsOptions, directOrigin: string | null, takesParts: boolean) {
    this.#bucket = bucket;
    this.#clock = options.clock ?? systemClock;
    this.#random = options.random ?? Math.random;
    this.#log = options.log;
    this.#partBytes = options.partBytes;
    this.#copyBytes = options.copyBytes ?? COPY_BYTES;
    if (directOrigin !== null) {
      this.direct = {
        origin: directOrigin,
        url: (digest, validSecs) => {
          const key = blobKey(digestHex(digest));
          return this.#run('direct.url', () => this.#bucket.readUrl(key, validSecs));
        },
      };
      if (takesParts) this.directParts = this.#partsPastUs(directOrigin);
    }
  }

  #partsPastUs(origin: string): DirectParts {
    const keyOf = (uploadId: string, partNumber: number, digest: string): string =>
      partPrefix(uploadId, partNumber) + digestHex(digest);
    return {
      origin,
      put: async (uploadId, { partNumber, digest, size }, validSecs) => {
        const key = keyOf(uploadId, partNumber, digest);
        return this.#run('directParts.put', () =>
          this.#bucket.putRequest(key, { sha256: digestHex(digest), size }, validSecs),
        );
      },
      size: async (uploadId, partNumber, digest) => {
        const key = keyOf(uploadId, partNumber, digest);
        const what = `looking at part ${partNumber} of upload ${uploadId}`;
        return this.#run('directParts.size', async () => (await this.#bucket.head(key, what))?.size ?? null);
      },
    };
  }

  async claim(owner: string): Promise<string> {
    const what = 'marking whose blobs these are';
    const mark = async (): Promise<string | null> => {
      for await (const { key } of this.#bucket.list('owner/', what)) return key.slice('owner/'.length);
      return null;
    };
    return this.#run('claim', async () => {
      const known = await mark();
      if (known !== null) return known;
      // Of two that come at once both marks stay, and both see the first of them.
      await this.#bucket.put(`owner/${owner}`, new Uint8Array(), what);
      return (await mark()) ?? owner;
    });
  }

  async put(bytes: ByteStream, options: PutOptions): Promise<BlobInfo> {
    return this.#run('put', () =>
      this.#store(bytes, options, 'put', ({ digest }, write) => this.#commit(digest, write)),
    );
  }

  async stat(digest: string): Promise<BlobInfo | null> {
    const key = blobKey(digestHex(digest));
    return this.#run('stat', async () => {
      const found = await this.#bucket.head(key, `looking at blob ${digest}`);
      return found === null ? null : { digest, size: found.size };
    });
  }

  async open(
    digest: string,
    range: { readonly start?: number; readonly end?: number } = {},
  ): Promise<Readable> {
    const key = blobKey(digestHex(digest));
    const what = `blob ${digest}`;
    return this.#run('open', async () => {
      const start = range.start ?? 0;
      const outside = (): MillraceError =>
        new MillraceError(
          'invalid_argument',
          `range ${start}-${range.end ?? ''} is not within blob ${digest}`,
        );
      if (start < 0 || (range.end !== undefined && range.end < start)) throw outside();
      const given = new AbortController();
      const wanted = start === 0 && range.end === undefined ? null : { start, end: range.end };
      const first = await this.#bucket.get(key, wanted, `opening ${what}`, given.signal);
      if (first === null) throw new MillraceError('not_found', `${what} is not stored`);
      if (first === 'out of range') throw outside();
      if (range.end !== undefined && first.end !== range.end) {
        first.body.once('error', () => {});
        first.body.destroy();
        throw outside();
      }
      const source = this.#resumed(key, first, what, given);
      const whole = first.start === 0 && first.end === first.size - 1;
      const reader = readableFrom({
        ...source,
        pull: whole ? verified(source.pull, { digest }, what) : source.pull,
      });
      this.#readers.add(reader);
      reader.once('close', () => this.#readers.delete(reader));
      return reader;
    });
  }

  async putPart(
    uploadId: string,
    partNumber: number,
    bytes: ByteStream,
    options: PutOptions,
  ): Promise<BlobInfo> {
    const prefix = partPrefix(uploadId, partNumber);
    const what = `part ${partNumber} of upload ${uploadId}`;
    return this.#run('putPart', () =>
      this.#store(bytes, options, what, async ({ digest }, write) => {
        const key = prefix + digestHex(digest);
        await write(key);
        for await (const other of this.#bucket.list(prefix, `storing ${what}`)) {
          if (other.key !== key) await this.#bucket.remove(other.key, `replacing ${what}`);
        }
      }),
    );
  }

  async joinParts(
    uploadId: string,
    parts: readonly { readonly partNumber: number; readonly digest: string }[],
  ): Promise<BlobInfo> {
    const folder = uploadFolder(uploadId);
    parts.forEach((part, index) => {
      if (part.partNumber !== index + 1) {
        throw new MillraceError(
          'invalid_argument',
          `upload ${uploadId}: part ${index + 1} expected, got part ${part.partNumber}`,
        );
      }
    });
    return this.#run('joinParts', async () => {
      const what = `upload ${uploadId}`;
      const staged = new Map<number, ListedObject>();
      if (parts.length > 0) {
        for await (const object of this.#bucket.list(folder, `joining ${what}`)) {
          const number = Number(object.key.slice(folder.length, folder.length + PART_DIGITS));
          // Only of parts replaced this moment there can be two.
          if (staged.has(number) && !object.key.endsWith(hexOfPart(parts, number))) continue;
          staged.set(number, object);
        }
      }
      const sources = parts.map((part): ListedObject => {
        const object = staged.get(part.partNumber);
        const named = `part ${part.partNumber} of ${what}`;
        if (object === undefined) throw new MillraceError('not_found', `${named} is not stored`);
        checkBytes(
          { digest: `sha256:${object.key.slice(-64)}`, size: object.size },
          { digest: part.digest },
          named,
        );
        return object;
      });
      const [only] = sources;
      // Named by its content like a blob, and by whoever checked that: there is nothing left to find out.
      if (only !== undefined && sources.length === 1) {
        const info = { digest: `sha256:${only.key.slice(-64)}`, size: only.size };
        await this.#commit(info.digest, (key) => this.#copy(only.key, key, only.size, what));
        return info;
      }
      const size = sources.reduce((sum, source) => sum + source.size, 0);
      // S3 makes one object of others if each but the last is large enough. The bytes then only pass by to be hashed.
      const copyable =
        size > this.#partBytesFor(size) &&
        sources.length <= MAX_PARTS &&
        sources.every(
          (source, index) =>
            (index === sources.length - 1 ? source.size > 0 : source.size >= MIN_PART_BYTES) &&
            source.size <= MAX_COPY_BYTES,
        );
      const all = this.#chunksOf(sources, what);
      if (!copyable) {
        return this.#store(all, { maxBytes: Infinity, expect: { size } }, what, ({ digest }, write) =>
          this.#commit(digest, write),
        );
      }
      const hash = createHash('sha256');
      for await (const chunk of all) hash.update(chunk);
      const info = { digest: `sha256:${hash.digest('hex')}`, size };
      await this.#commit(info.digest, (key) =>
        this.#copied(
          key,
          sources.map(({ key: from }) => ({ from })),
          what,
        ),
      );
      return info;
    });
  }

  async dropParts(uploadId: string): Promise<void> {
    const folder = uploadFolder(uploadId);
    const what = `dropping the parts of upload ${uploadId}`;
    await this.#run('dropParts', () =>
      inParallel(this.#bucket.list(folder, what), COPIES_IN_FLIGHT, ({ key }) =>
        this.#bucket.remove(key, what),
      ),
    );
  }

  async *listUploads(): AsyncGenerator<{ readonly uploadId: string; readonly putAtMs: number }> {
    let current: { readonly uploadId: string; readonly putAtMs: number } | null = null;
    for await (const { key, modifiedMs } of this.#listed('listUploads', 'uploads/')) {
      const uploadId = key.split('/')[1]!;
      const putAtMs = this.#stamp(modifiedMs);
      // Sorted by key, so an upload's parts follow each other.
      if (current !== null && current.uploadId !== uploadId) yield current;
      const newest: number = current?.uploadId === uploadId ? current.putAtMs : -Infinity;
      current = { uploadId, putAtMs: Math.max(newest, putAtMs) };
    }
    if (current !== null) yield current;
  }

  async *list(): AsyncGenerator<StoredBlob> {
    for await (const { key, size, modifiedMs } of this.#listed('list', 'sha256/')) {
      const hex = /^sha256\/[0-9a-f]{2}\/([0-9a-f]{64})$/.exec(key)?.[1];
      if (hex !== undefined) yield { digest: `sha256:${hex}`, size, putAtMs: this.#stamp(modifiedMs) };
    }
  }

  /**
   * With `ifPutBeforeMs` in four steps, because S3 has no delete that spares what was put again:
   *
   * 1. announce the delete: an object of its own below `gc/<hex>/`;
   * 2. look at the stamp, and stop if the blob was put again;
   * 3. delete by a request that the bucket refuses {@link DELETE_VALID_SECS} after the announcement, and that is sent once;
   * 4. announce that it is done.
   *
   * A put looks for announcements after its write. One that was written before step 2 was seen there. One written after it finds
   * the announcement, waits until the delete is done or can no longer happen, and writes again if its object is gone.
   * Announcements stay for a while, so a put that looks late still finds them.
   */
  async delete(digest: string, options: { readonly ifPutBeforeMs?: number } = {}): Promise<boolean> {
    const hex = digestHex(digest);
    const key = blobKey(hex);
    const what = `deleting blob ${digest}`;
    const { ifPutBeforeMs } = options;
    return this.#run('delete', async () => {
      const found = await this.#bucket.head(key, what);
      if (found === null) return false;
      if (ifPutBeforeMs === undefined) {
        await this.#bucket.remove(key, what);
        return true;
      }
      if (this.#stamp(found.modifiedMs) >= ifPutBeforeMs) return false;
      const name = `${announcements(hex)}${randomName()}`;
      const announcedMs = await this.#bucket.put(name + ANNOUNCED, NOTHING, what);
      const now = await this.#bucket.head(key, what);
      const spared = now === null || this.#stamp(now.modifiedMs) >= ifPutBeforeMs;
      if (!spared) await this.#bucket.removeWithin(key, announcedMs, DELETE_VALID_SECS, what);
      await this.#bucket.put(name + DONE, NOTHING, what);
      return !spared;
    });
  }

  async sweep(beforeMs: number, signal?: AbortSignal): Promise<number> {
    return this.#run('sweep', async () => {
      let removed = await this.#bucket.abortUploads(beforeMs, signal);
      const what = 'removing what unfinished puts left';
      for (const [prefix, cutoff] of [
        ['tmp/', beforeMs],
        ['gc/', this.#clock.now() - ANNOUNCED_MS],
      ] as const) {
        await inParallel(
          this.#bucket.list(prefix, what, signal),
          COPIES_IN_FLIGHT,
          async ({ key, modifiedMs }) => {
            signal?.throwIfAborted();
            if (this.#stamp(modifiedMs) >= cutoff) return;
            await this.#bucket.remove(key, what);
            if (prefix === 'tmp/') removed += 1;
          },
        );
      }
      return removed;
    });
  }

  /** Lets operations under way finish and ends open reads. */
  async close(): Promise<void> {
    if (!this.#closing.signal.aborted) {
      this.#closing.abort(new MillraceError('failed_precondition', 'the blob store is closed'));
    }
    const readers = [...this.#readers].map(
      (reader) => new Promise<void>((resolve) => void reader.once('close', resolve)),
    );
    for (const reader of this.#readers) reader.destroy();
    await Promise.allSettled([...this.#operations, ...readers]);
    this.#bucket.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  #checkOpen(verb: string): void {
    if (this.#closing.signal.aborted) {
      throw new MillraceError('failed_precondition', `${verb}: the blob store is closed`);
    }
  }

  async #run<T>(verb: string, operation: () => Promise<T>): Promise<T> {
    this.#checkOpen(verb);
    const running = operation();
    this.#operations.add(running);
    try {
      return await running;
    } finally {
      this.#operations.delete(running);
    }
  }

  async *#listed(verb: string, prefix: string): AsyncGenerator<ListedObject> {
    this.#checkOpen(verb);
    for await (const object of this.#bucket.list(prefix, `${verb}: listing`)) {
      this.#checkOpen(verb);
      yield object;
    }
  }

  /** By our clock, and rather too late than too early: what is stamped may have happened at the end of that second. */
  #stamp(modifiedMs: number): number {
    return this.#bucket.ours(modifiedMs) + 999;
  }

  #partBytesFor(expected: number): number {
    if (this.#partBytes !== undefined) return this.#partBytes;
    const enough = Math.ceil(expected / MAX_PARTS);
    return Math.min(Math.max(enough, PART_BYTES), MOST_PART_BYTES);
  }

  /**
   * Takes the bytes in, hashing on the way, then lets `commit` write them under the key it chooses, as often as it needs to. What
   * was staged is gone afterwards, whatever happened.
   */
  async #store(
    bytes: ByteStream,
    options: PutOptions,
    what: string,
    commit: (info: BlobInfo, write: (key: string) => Promise<void>) => Promise<void>,
  ): Promise<BlobInfo> {
    const { signal, maxBytes } = options;
    const partBytes = this.#partBytesFor(options.expect?.size ?? maxBytes);
    const hash = createHash('sha256');
    const gathered = new Gathered();
    let size = 0;
    let staged: StagedObject | null = null;
    try {
      for await (const chunk of untilAborted(bytes, signal)) {
        size += chunk.length;
        if (size > maxBytes) {
          throw new MillraceError('resource_exhausted', `${what}: more than the ${maxBytes} bytes allowed`, {
            details: { limit: 'maxBytes', value: maxBytes },
          });
        }
        hash.update(chunk);
        gathered.add(chunk);
        // Not at exactly one part: that may be all, and then it goes in one request.
        while (gathered.size > partBytes) {
          staged ??= await StagedObject.begin(this.#bucket, `storing ${what}`, signal);
          await staged.add(gathered.take(partBytes));
        }
      }
      const info: BlobInfo = { digest: `sha256:${hash.digest('hex')}`, size };
      checkBytes(info, options.expect ?? {}, what);
      const rest = gathered.take(gathered.size);
      if (staged === null) {
        await commit(info, async (key) => {
          await this.#bucket.put(key, rest, `storing ${what}`, signal);
        });
      } else {
        await staged.add(rest);
        await staged.complete();
        const { key: from } = staged;
        await commit(info, (key) => this.#copy(from, key, size, `storing ${what}`));
      }
      return info;
    } finally {
      await staged?.remove();
    }
  }

  /** Writes the blob until it is certain that no delete announced before can hit it. See {@link delete}. */
  async #commit(digest: string, write: (key: string) => Promise<void>): Promise<void> {
    const hex = digestHex(digest);
    const key = blobKey(hex);
    for (;;) {
      const startedMs = this.#clock.monotonic();
      await write(key);
      const feared = await this.#deletesOver(hex);
      if (!feared && this.#clock.monotonic() - startedMs < SURE_MS) return;
      if ((await this.#bucket.head(key, `storing blob ${digest}`)) !== null) return;
    }
  }

  /** Waits until no announced delete of the blob can still happen. False when none was announced. */
  async #deletesOver(hex: string): Promise<boolean> {
    for (;;) {
      const { objects, answeredMs } = await this.#bucket.listFirst(
        announcements(hex),
        `storing blob sha256:${hex}`,
      );
      const done = new Set(objects.filter(({ key }) => key.endsWith(DONE)).map(nameOfAnnouncement));
      const open = objects.filter(
        (object) =>
          object.key.endsWith(ANNOUNCED) &&
          !done.has(nameOfAnnouncement(object)) &&
          answeredMs - object.modifiedMs < DELETE_OVER_MS,
      );
      if (open.length === 0) return objects.length > 0;
      await sleep(this.#clock, ANNOUNCED_POLL_MS);
    }
  }

  async #copy(from: string, to: string, size: number, what: string): Promise<void> {
    if (size <= this.#copyBytes) {
      await this.#bucket.copy(from, to, what);
      return;
    }
    const pieces: {
      readonly from: string;
      readonly range: { readonly start: number; readonly end: number };
    }[] = [];
    const step = Math.max(this.#copyBytes, Math.ceil(size / MAX_PARTS));
    for (let start = 0; start < size; start += step) {
      pieces.push({ from, range: { start, end: Math.min(start + step, size) - 1 } });
    }
    await this.#copied(to, pieces, what);
  }

  /** Makes one object of pieces of others, inside the bucket. */
  async #copied(
    to: string,
    pieces: readonly {
      readonly from: string;
      readonly range?: { readonly start: number; readonly end: number };
    }[],
    what: string,
  ): Promise<void> {
    const upload = await this.#bucket.upload(to, what);
    try {
      const etags: string[] = [];
      await inParallel(pieces.entries(), COPIES_IN_FLIGHT, async ([index, { from, range }]) => {
        etags[index] = await upload.copy(index + 1, from, range);
      });
      await upload.complete(etags);
    } catch (error) {
      await upload.abort();
      throw error;
    }
  }

  /** The bytes of staged parts, one after the other, each verified against its name. */
  async *#chunksOf(sources: readonly ListedObject[], what: string): AsyncGenerator<Uint8Array> {
    for (const [index, { key }] of sources.entries()) {
      const named = `part ${index + 1} of ${what}`;
      const given = new AbortController();
      const first = await this.#bucket.get(key, null, `opening ${named}`, given.signal);
      if (first === null || first === 'out of range') {
        throw new MillraceError('not_found', `${named} is not stored`);
      }
      const source = this.#resumed(key, first, named, given);
      const pull = verified(source.pull, { digest: `sha256:${key.slice(-64)}` }, named);
      try {
        for (let chunk = await pull(); chunk !== null; chunk = await pull()) yield chunk;
      } finally {
        await source.close();
      }
    }
  }

  /** The bytes of an open object; when the connection breaks, they are asked for again from where they ended. */
  #resumed(
    key: string,
    first: OpenObject,
    what: string,
    given: AbortController,
  ): { readonly pull: Pull; close(): Promise<void>; abandon(): void } {
    const { end } = first;
    let position = first.start;
    let body = first.body;
    let chunks = body[Symbol.asyncIterator]() as AsyncIterator<Buffer>;
    let failures = 0;
    const discard = (): void => {
      body.once('error', () => {}); // Of a stream nobody reads any more.
      body.destroy();
    };
    const next = async (): Promise<Uint8Array | null> => {
      const result = await chunks.next();
      if (result.done !== true) return result.value;
      if (position > end) return null;
      throw new Error(`the connection ended at byte ${position} of ${end + 1}`);
    };
    const reopen = async (): Promise<void> => {
      discard();
      const pauseMs = READ_PAUSE_MS * 2 ** failures * (0.5 + this.#random());
      await sleep(this.#clock, pauseMs, given.signal);
      const again = await this.#bucket.get(key, { start: position, end }, `reading ${what}`, given.signal);
      if (again === null || again === 'out of range') {
        throw new MillraceError('unavailable', `${what} was removed while it was read`);
      }
      body = again.body;
      chunks = body[Symbol.asyncIterator]() as AsyncIterator<Buffer>;
    };
    const pull: Pull = async () => {
      for (;;) {
        try {
          const chunk = await next();
          if (chunk === null) return null;
          failures = 0;
          position += chunk.length;
          return chunk;
        } catch (error) {
          given.signal.throwIfAborted();
          failures += 1;
          const said = error instanceof Error ? error.message : String(error);
          if (failures >= READ_TRIES) {
            throw new MillraceError(
              'unavailable',
              `${what}: the connection to ${this.#bucket.where} broke ${failures} times at byte ${position}: ${said}`,
            );
          }
          this.#log?.debug('a read of a blob is taken up again', { blob: what, position, error: said });
          await reopen();
        }
      }
    };
    return {
      pull,
      close: async () => discard(),
      abandon: () => {
        given.abort(new MillraceError('canceled', `${what}: the read was given up`));
        discard();
      },
    };
  }
}

/** Bytes on their way into an object below `tmp/`. */
class StagedObject {
  readonly key: string;
  readonly #bucket: S3Bucket;
  readonly #upload: ObjectUpload;
  readonly #what: string;
  readonly #inFlight = new Set<Promise<void>>();
  readonly #etags: string[] = [];
  #parts = 0;
  #failure: { readonly error: unknown } | null = null;
  #complete = false;

  private constructor(bucket: S3Bucket, key: string, upload: ObjectUpload, what: string) {
    this.#bucket = bucket;
    this.key = key;
    this.#upload = upload;
    this.#what = what;
  }

  static async begin(bucket: S3Bucket, what: string, signal: AbortSignal | undefined): Promise<StagedObject> {
    const key = `tmp/${randomName()}`;
    return new StagedObject(bucket, key, await bucket.upload(key, what, signal), what);
  }

  /** Resolves when there is room for the next part. */
  async add(bytes: Uint8Array): Promise<void> {
    const index = this.#parts;
    this.#parts += 1;
    if (this.#parts > MAX_PARTS) {
      throw new MillraceError(
        'resource_exhausted',
        `${this.#what}: more than the ${MAX_PARTS} parts of ${bytes.length} bytes that S3 takes; send it in larger parts (chunked upload)`,
        { details: { limit: 'parts', value: MAX_PARTS } },
      );
    }
    const sending = this.#upload.put(index + 1, bytes).then(
      (etag) => void (this.#etags[index] = etag),
      (error: unknown) => void (this.#failure ??= { error }),
    );
    this.#inFlight.add(sending);
    void sending.finally(() => this.#inFlight.delete(sending));
    while (this.#inFlight.size >= PARTS_IN_FLIGHT && this.#failure === null) {
      await Promise.race(this.#inFlight);
    }
    this.#throwFailure();
  }

  async complete(): Promise<void> {
    await Promise.all(this.#inFlight);
    this.#throwFailure();
    await this.#upload.complete(this.#etags);
    this.#complete = true;
  }

  /** Best effort, after the last request is over: what remains is swept a day later. */
  async remove(): Promise<void> {
    await Promise.all(this.#inFlight);
    // The answer to the completion may have been lost, so the object is looked after in any case.
    if (!this.#complete) await this.#upload.abort();
    await this.#bucket.remove(this.key, this.#what).catch(() => {});
  }

  #throwFailure(): void {
    if (this.#failure !== null) throw this.#failure.error;
  }
}

/** Chunks waiting to become a part. */
class Gathered {
  #chunks: Uint8Array[] = [];
  size = 0;

  add(chunk: Uint8Array): void {
    this.#chunks.push(chunk);
    this.size += chunk.length;
  }

  /** The first `length` bytes. */
  take(length: number): Uint8Array {
    const all = this.#chunks.length === 1 ? this.#chunks[0]! : Buffer.concat(this.#chunks, this.size);
    this.#chunks = all.length > length ? [all.subarray(length)] : [];
    this.size -= length;
    return all.length > length ? all.subarray(0, length) : all;
  }
}

const NOTHING = new Uint8Array(0);
const ANNOUNCED = '.announced';
const DONE = '.done';
const PART_DIGITS = 10;

function blobKey(hex: string): string {
  return `sha256/${hex.slice(0, 2)}/${hex}`;
}

function announcements(hex: string): string {
  return `gc/${hex}/`;
}

function nameOfAnnouncement({ key }: ListedObject): string {
  return key.slice(0, key.lastIndexOf('.'));
}

function uploadFolder(uploadId: string): string {
  // It becomes a key, so it must not be able to leave its part of the bucket.
  if (!/^[0-9a-zA-Z][0-9a-zA-Z_-]{0,127}$/.test(uploadId)) {
    throw new MillraceError(
      'invalid_argument',
      `upload id must be 1 to 128 letters, digits, - and _, got ${JSON.stringify(uploadId.slice(0, 80))}`,
    );
  }
  return `uploads/${uploadId}/`;
}

function partPrefix(uploadId: string, partNumber: number): string {
  if (!Number.isSafeInteger(partNumber) || partNumber < 1 || partNumber >= 10 ** PART_DIGITS) {
    throw new MillraceError('invalid_argument', `part number must be an integer >= 1, got ${partNumber}`);
  }
  return `${uploadFolder(uploadId)}${String(partNumber).padStart(PART_DIGITS, '0')}-`;
}

function hexOfPart(parts: readonly { readonly digest: string }[], partNumber: number): string {
  return parts[partNumber - 1]?.digest.slice('sha256:'.length) ?? '';
}

/** 128 random bits: dispatchers that share a bucket must not meet. */
function randomName(): string {
  return randomBytes(16).toString('hex');
}

/** Up to `limit` at the same time. The first error ends it, after what is under way. */
async function inParallel<T>(
  items: AsyncIterable<T> | Iterable<T>,
  limit: number,
  work: (item: T) => Promise<void>,
): Promise<void> {
  const underWay = new Set<Promise<void>>();
  let failure: { readonly error: unknown } | null = null as { readonly error: unknown } | null;
  try {
    for await (const item of items) {
      const one = work(item).catch((error: unknown) => void (failure ??= { error }));
      underWay.add(one);
      void one.finally(() => underWay.delete(one));
      if (underWay.size >= limit) await Promise.race(underWay);
      if (failure !== null) break;
    }
  } finally {
    await Promise.all(underWay);
  }
  if (failure !== null) throw failure.error;
}
