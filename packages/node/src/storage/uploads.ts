/**
 * One item to a domain server, from memory, from a file, or from a stream of unknown length. Which way it goes is decided
 * as the reference does: bytes in one request unless the server says they are too many; files and streams in parts, and in
 * one request where the server knows no parts.
 *
 * Better than the reference: parts are sent again when they fail, and several at a time where the server says that it
 * takes them so; nothing is held in memory but the parts of a stream that are under way; an empty file, which the service
 * refuses to take in parts, goes in one request.
 */
import { createHash } from 'node:crypto';
import { open, type FileHandle } from 'node:fs/promises';
import { MillraceError, timeoutSignal } from '@millrace/runner';
import {
  singleUploadBytes,
  type DomainStorage,
  type UploadSession,
  type UploadTarget,
} from '@millrace/dispatch/client';
import { withAttempts } from './attempts.ts';
import type { PortsWorld } from './world.ts';

/** What an item is called, and which one it replaces. */
export interface Item {
  readonly name: string;
  readonly dataType: string;
  /** The caller's; null: whatever has the name. */
  readonly existingId: string | null;
}

/** A stream up to this size is sent as bytes: one request instead of three. */
const SMALL_STREAM_BYTES = 256 * 1024;

/** From this size on it is worth asking whether a file may go past the server. */
const LARGE_FILE_BYTES = 8 * 1024 * 1024;

/** Above this size bytes that were sent in vain cost more than to ask first whether their name is taken. */
const UNNAMED_BYTES = 64 * 1024;

/** Parts of a file under way at once, where the server takes several. They are read from disk as they are sent. */
const FILE_PARTS_AT_ONCE = 3;

/** Parts of a stream under way at once, where the server takes several: each is held in memory, as is the next one. */
const STREAM_PARTS_AT_ONCE = 2;

/** Above this size one part at a time is held. */
const LARGE_PART_BYTES = 16 * 1024 * 1024;

/** How long an upload that failed tries to be forgotten by the server. */
const ABORT_MS = 5_000;

/** Bytes in memory. Resolves with the item's id, null if the server tells none. */
export async function uploadBytes(
  world: PortsWorld,
  item: Item,
  bytes: Uint8Array,
  signal: AbortSignal,
): Promise<string | null> {
  // A name that is taken is then found out by the upload, which is one request where it is not.
  const named = world.storage().knownInfo?.uniqueNames === true && bytes.length <= UNNAMED_BYTES;
  // First, as the reference: an update's request is of another length.
  const existingId = named ? item.existingId : await existingIdOf(world, item, signal);
  const info = await knownInfo(world, signal);
  const tooLarge =
    info !== null &&
    info.requestMaxBytes > 0 &&
    singleUploadBytes(targetOf(item, existingId), bytes.length) > info.requestMaxBytes;
  // Past the server is better than through it.
  const pastIt = info !== null && info.direct !== null && bytes.length >= info.direct.fromBytes;
  if (!(tooLarge || pastIt) || !info.multipartEnabled) {
    return uploadSingle(world, item, existingId, bytes, signal);
  }
  const upload = await PartUpload.start(world, item, existingId, bytes.length, signal);
  return upload.complete(bytes.length, (start, end) => bytes.subarray(start, end));
}

/** @throws MillraceError `invalid_argument` for what is no readable file, or changes while it is read. */
export async function uploadFile(
  world: PortsWorld,
  item: Item,
  path: string,
  signal: AbortSignal,
): Promise<string | null> {
  await using file = await openFile(path);
  const { size } = file;
  const existingId = await existingIdOf(world, item, signal);
  if (size === 0) return await uploadSingle(world, item, existingId, new Uint8Array(0), signal);
  let upload: PartUpload;
  let sha256: string | null = null;
  try {
    sha256 = await wholeDigest(world, file, signal);
    upload = await PartUpload.start(world, item, existingId, size, signal, sha256);
  } catch (error) {
    if (!isUnknownToServer(error)) throw error;
    const limit = await singleLimit(world, targetOf(item, existingId), signal);
    if (size > limit) throw noWayToSend(item, size, limit, error);
    return await uploadSingle(world, item, existingId, await file.read(), signal);
  }
  // A stream per attempt and part over one handle: all parts are of one file, also when its name is given to another.
  // `await`, or the file would be closed before the upload is through.
  return await upload.complete(size, (start, end) => file.chunks(start, end));
}

/** What a file is, where that lets it go past the server in one piece. Null: it does not. */
async function wholeDigest(world: PortsWorld, file: OpenFile, signal: AbortSignal): Promise<string | null> {
  if (file.size < LARGE_FILE_BYTES) return null;
  const direct = (await knownInfo(world, signal))?.direct ?? null;
  if (direct === null || file.size < direct.fromBytes || file.size > direct.wholeBytes) return null;
  const hash = createHash('sha256');
  for await (const chunk of file.chunks(0, file.size)) {
    signal.throwIfAborted();
    hash.update(chunk);
  }
  return hash.digest('hex');
}

/** An item written bit by bit. Not concurrent. After an error every call rejects with it; `abort` is needed in any case but after `finish`. */
export class StreamUpload {
  readonly #world: PortsWorld;
  readonly #item: Item;
  readonly #signal: AbortSignal;
  /** Not sent yet. Grows to the part size, or to what one request may have. */
  #pending: Buffer = Buffer.allocUnsafeSlow(SMALL_STREAM_BYTES);
  #used = 0;
  /** `single`: the server has no parts, and everything is kept for one request. */
  #mode: 'small' | 'parts' | 'single' = 'small';
  #singleLimit = 0;
  /** Looked up when the stream turned out not to be small. */
  #existingId: string | null = null;
  #upload: PartUpload | null = null;
  #parts = 0;
  readonly #spare: Buffer[] = [];
  readonly #underWay = new Set<Promise<void>>();
  #failure: { readonly error: unknown } | null = null;

  constructor(world: PortsWorld, item: Item, signal: AbortSignal) {
    this.#world = world;
    this.#item = item;
    this.#signal = signal;
  }

  /** Takes a copy. Resolves when there is room for more. */
  async write(chunk: Uint8Array): Promise<void> {
    this.#check();
    try {
      for (let rest = chunk; rest.length > 0;) {
        if (this.#used === this.#pending.length) await this.#makeRoom();
        const count = Math.min(rest.length, this.#pending.length - this.#used);
        this.#pending.set(rest.subarray(0, count), this.#used);
        this.#used += count;
        rest = rest.subarray(count);
      }
    } catch (error) {
      throw this.#failed(error);
    }
  }

  /** Resolves with the item's id, null if the server tells none. */
  async finish(): Promise<string | null> {
    this.#check();
    try {
      const rest = this.#pending.subarray(0, this.#used);
      if (this.#mode === 'small') return await uploadBytes(this.#world, this.#item, rest, this.#signal);
      if (this.#mode === 'single') {
        return await uploadSingle(this.#world, this.#item, this.#existingId, rest, this.#signal);
      }
      if (this.#used > 0) await this.#sendPart();
      await Promise.all(this.#underWay);
      this.#check();
      return await this.#upload!.finish();
    } catch (error) {
      throw this.#failed(error);
    }
  }

  /** Ends what is under way and lets the server forget it. Never rejects. */
  async abort(reason: unknown): Promise<void> {
    this.#failure ??= { error: reason };
    await this.#upload?.abort();
    await Promise.allSettled(this.#underWay);
  }

  #check(): void {
    this.#signal.throwIfAborted();
    if (this.#failure !== null) throw this.#failure.error;
  }

  #failed(error: unknown): unknown {
    this.#failure ??= { error };
    return this.#failure.error;
  }

  async #makeRoom(): Promise<void> {
    if (this.#mode === 'small') await this.#leaveSmall();
    if (this.#used < this.#pending.length) return;
    if (this.#mode === 'single') this.#growSingle();
    else await this.#sendPart();
  }

  /** It is not small: now is the time to see what the server can do. */
  async #leaveSmall(): Promise<void> {
    this.#existingId = await existingIdOf(this.#world, this.#item, this.#signal);
    try {
      this.#upload = await PartUpload.start(this.#world, this.#item, this.#existingId, null, this.#signal);
    } catch (error) {
      if (!isUnknownToServer(error)) throw error;
      const target = targetOf(this.#item, this.#existingId);
      this.#singleLimit = await singleLimit(this.#world, target, this.#signal);
      this.#mode = 'single';
      return;
    }
    this.#mode = 'parts';
    const { partSize } = this.#upload;
    const { maxPartBytes } = this.#world.limits;
    if (partSize > maxPartBytes) {
      throw new MillraceError(
        'resource_exhausted',
        `artifact ${this.#item.name}: the server wants parts of ${partSize} bytes, at most ${maxPartBytes} are held in memory (maxPartBytes); write it to a file and use putFile`,
        { details: { limit: 'maxPartBytes', value: maxPartBytes } },
      );
    }
    const begun = this.#pending.subarray(0, this.#used);
    this.#pending = Buffer.allocUnsafeSlow(partSize);
    this.#used = 0;
    for (let rest = begun; rest.length > 0;) {
      if (this.#used === partSize) await this.#sendPart();
      const count = Math.min(rest.length, partSize - this.#used);
      this.#pending.set(rest.subarray(0, count), this.#used);
      this.#used += count;
      rest = rest.subarray(count);
    }
  }

  #growSingle(): void {
    if (this.#used >= this.#singleLimit) {
      throw noWayToSend(this.#item, this.#used + 1, this.#singleLimit, undefined);
    }
    const larger = Buffer.allocUnsafeSlow(Math.min(this.#singleLimit, this.#pending.length * 2));
    larger.set(this.#pending);
    this.#pending = larger;
  }

  async #sendPart(): Promise<void> {
    const upload = this.#upload!;
    const buffer = this.#pending;
    const bytes = buffer.subarray(0, this.#used);
    this.#parts += 1;
    const sending = upload
      .part(this.#parts, () => bytes, bytes.length)
      .then(
        () => void this.#spare.push(buffer),
        (error: unknown) => void this.#failed(error),
      )
      .finally(() => void this.#underWay.delete(sending));
    this.#underWay.add(sending);
    const most = upload.parallel && upload.partSize <= LARGE_PART_BYTES ? STREAM_PARTS_AT_ONCE : 1;
    if (this.#underWay.size >= most) await Promise.race(this.#underWay);
    this.#check();
    // Buffers go round: new ones of this size for each part would pile up until the garbage collector comes.
    this.#pending = this.#spare.pop() ?? Buffer.allocUnsafeSlow(upload.partSize);
    this.#used = 0;
  }
}

/** A chunked upload that was begun. */
class PartUpload {
  readonly #world: PortsWorld;
  readonly #storage: DomainStorage;
  readonly #domainId: string;
  readonly #session: UploadSession;
  readonly #item: Item;
  readonly #replaces: boolean;
  readonly #signal: AbortSignal;
  readonly #stop = new AbortController();
  readonly #etags = new Map<number, string>();
  /** Of all of it, as one part, if that is known. */
  readonly #whole: string | null;
  #size = 0;

  private constructor(
    world: PortsWorld,
    storage: DomainStorage,
    domainId: string,
    session: UploadSession,
    item: Item,
    replaces: boolean,
    whole: string | null,
    signal: AbortSignal,
  ) {
    this.#whole = whole;
    this.#world = world;
    this.#storage = storage;
    this.#domainId = domainId;
    this.#session = session;
    this.#item = item;
    this.#replaces = replaces;
    this.#signal = AbortSignal.any([signal, this.#stop.signal]);
  }

  /** @throws MillraceError `unimplemented` where the server has no chunked uploads. */
  static async start(
    world: PortsWorld,
    item: Item,
    existingId: string | null,
    size: number | null,
    signal: AbortSignal,
    sha256: string | null = null,
  ): Promise<PartUpload> {
    const storage = world.storage();
    const { id: domainId } = world.domain();
    const request = {
      domainId,
      name: item.name,
      dataType: item.dataType,
      size,
      existingId,
      ...(sha256 !== null && { sha256 }),
    };
    const session = await withAttempts(world, signal, () => storage.startUpload(request, { signal }));
    // What the server takes in several parts after all is known as none of them.
    const whole = size !== null && session.partSize >= size ? sha256 : null;
    return new PartUpload(world, storage, domainId, session, item, existingId !== null, whole, signal);
  }

  get partSize(): number {
    return this.#session.partSize;
  }

  /** Several parts may be under way, in any order; else one after the other. */
  get parallel(): boolean {
    return this.#session.parallelParts;
  }

  /** Sends everything, then finishes. On any error the upload is aborted. */
  async complete(
    size: number,
    read: (start: number, end: number) => Uint8Array | AsyncIterable<Uint8Array>,
  ): Promise<string> {
    const senders: Promise<void>[] = [];
    try {
      const count = Math.ceil(size / this.partSize);
      let next = 0;
      const sender = async (): Promise<void> => {
        while (next < count) {
          const index = next;
          next += 1;
          const start = index * this.partSize;
          const end = Math.min(size, start + this.partSize);
          await this.part(index + 1, () => read(start, end), end - start);
        }
      };
      const atOnce = this.parallel ? FILE_PARTS_AT_ONCE : 1;
      while (senders.length < Math.min(atOnce, count)) senders.push(sender());
      await Promise.all(senders);
      return await this.finish();
    } catch (error) {
      await this.abort();
      await Promise.allSettled(senders);
      throw error;
    }
  }

  /** `read` is called for every attempt. */
  async part(
    partNumber: number,
    read: () => Uint8Array | AsyncIterable<Uint8Array>,
    size: number,
  ): Promise<void> {
    const signal = this.#signal;
    const etag = await withAttempts(this.#world, signal, () =>
      this.#storage.putPart(this.#domainId, this.#session.uploadId, partNumber, read, size, {
        signal,
        ...(this.#whole !== null && { sha256: this.#whole }),
      }),
    );
    this.#etags.set(partNumber, etag);
    this.#size += size;
    this.#world.wrote(size);
  }

  async finish(): Promise<string> {
    const parts = [...this.#etags]
      .toSorted(([a], [b]) => a - b)
      .map(([part_number, etag]) => ({ part_number, etag }));
    const { uploadId, dataId } = this.#session;
    const signal = this.#signal;
    return withAttempts(this.#world, signal, async (attempts) => {
      try {
        return await this.#storage.finishUpload(this.#domainId, uploadId, parts, { signal });
      } catch (error) {
        // The answer to an attempt before this one may have been lost, and the upload with it be over.
        const mayBeDone = attempts.failures > 0 && MillraceError.is(error) && error.code === 'not_found';
        // An item that was there before is there in either case, and proves nothing.
        if (!mayBeDone || dataId === null || this.#replaces || !(await this.#isStored(dataId))) throw error;
        return dataId;
      }
    });
  }

  /** Ends what is under way and lets the server forget it. Never rejects. */
  async abort(): Promise<void> {
    this.#stop.abort(new MillraceError('canceled', `upload of artifact ${this.#item.name} was aborted`));
    // Not the task's signal, which may be why this is called.
    using limit = timeoutSignal(this.#world.clock, ABORT_MS, () => new Error('abort of an upload timed out'));
    await this.#storage.abortUpload(this.#domainId, this.#session.uploadId, { signal: limit.signal });
  }

  async #isStored(dataId: string): Promise<boolean> {
    const item = await this.#storage.get(this.#domainId, dataId, { signal: this.#signal });
    return item !== null && item.name === this.#item.name && item.size === this.#size;
  }
}

/** In one request. `known`: the item to replace; null: none is known to have the name, and one is created. */
async function uploadSingle(
  world: PortsWorld,
  item: Item,
  known: string | null,
  bytes: Uint8Array,
  signal: AbortSignal,
): Promise<string | null> {
  let existingId = known;
  let conflicts = 0;
  const id = await withAttempts(world, signal, async (attempts) => {
    // An attempt that failed may have created it all the same.
    if (attempts.failures > 0) existingId ??= await existingIdOf(world, item, signal);
    try {
      const target = targetOf(item, existingId);
      const stored = await world.storage().put(world.domain().id, target, bytes, { signal });
      return stored?.id ?? existingId;
    } catch (error) {
      // It was not looked up, or somebody else created it since.
      const conflict = existingId === null && MillraceError.is(error) && error.details['status'] === 409;
      if (!conflict || conflicts > 0) throw error;
      conflicts += 1;
      existingId = await existingIdOf(world, item, signal);
      if (existingId === null) throw error;
      const replaced = await world.storage().put(world.domain().id, { existingId }, bytes, { signal });
      return replaced?.id ?? existingId;
    }
  });
  world.wrote(bytes.length);
  return id;
}

function targetOf({ name, dataType }: Item, existingId: string | null): UploadTarget {
  return existingId === null ? { name, dataType } : { existingId };
}

/**
 * The item to replace: the caller's, or the one of this name. Names are unique whatever the type, so one of another type
 * is in the way.
 */
async function existingIdOf(world: PortsWorld, item: Item, signal: AbortSignal): Promise<string | null> {
  if (item.existingId !== null) return item.existingId;
  const found = await withAttempts(world, signal, () =>
    world.storage().find(world.domain().id, { name: item.name }, { signal }),
  );
  // Filters may be fuzzy on the server.
  const named = found.filter((one) => one.name === item.name);
  const same = named.find((one) => one.data_type === item.dataType);
  if (same !== undefined) return same.id;
  const [other] = named;
  if (other === undefined) return null;
  throw new MillraceError(
    'already_exists',
    `artifact ${JSON.stringify(item.name)} of type ${item.dataType}: the domain has an item of this name and of type ${other.data_type} (${other.id}); choose another name, or replace it with existing_id`,
  );
}

/** What the server says about uploads; null when it does not, for whatever reason. */
async function knownInfo(
  world: PortsWorld,
  signal: AbortSignal,
): Promise<Awaited<ReturnType<DomainStorage['info']>>> {
  try {
    return await world.storage().info({ signal });
  } catch {
    signal.throwIfAborted();
    return null; // Unknown selects the single upload, whose own error then says what is wrong.
  }
}

/** Bytes of content one request may have. */
async function singleLimit(world: PortsWorld, target: UploadTarget, signal: AbortSignal): Promise<number> {
  const info = await knownInfo(world, signal);
  const overhead = singleUploadBytes(target, 0);
  const told = info !== null && info.requestMaxBytes > 0 ? info.requestMaxBytes - overhead : Infinity;
  return Math.max(0, Math.min(told, world.limits.maxSingleUploadBytes));
}

function isUnknownToServer(error: unknown): boolean {
  return MillraceError.is(error) && error.code === 'unimplemented';
}

function noWayToSend(item: Item, size: number, limit: number, cause: unknown): MillraceError {
  return new MillraceError(
    'resource_exhausted',
    `artifact ${item.name}: the domain server has no chunked uploads, and ${size} bytes or more are too many for one request (limit ${limit})`,
    { cause, details: { limit: 'maxSingleUploadBytes', value: limit } },
  );
}

interface OpenFile extends AsyncDisposable {
  readonly size: number;
  /** Bytes `start` up to but not including `end`. */
  chunks(start: number, end: number): AsyncIterable<Uint8Array>;
  read(): Promise<Uint8Array>;
}

const READ_BYTES = 128 * 1024;

async function openFile(path: string): Promise<OpenFile> {
  let handle: FileHandle;
  let size: number;
  try {
    handle = await open(path, 'r');
  } catch (cause) {
    throw new MillraceError(
      'invalid_argument',
      `artifact file ${path} cannot be read: ${(cause as Error).message}`,
      {
        cause,
      },
    );
  }
  try {
    const info = await handle.stat();
    if (!info.isFile()) throw new MillraceError('invalid_argument', `artifact file ${path} is not a file`);
    size = info.size;
  } catch (error) {
    await handle.close();
    throw error;
  }
  return {
    size,
    async *chunks(start, end) {
      for (let at = start; at < end;) {
        const want = Math.min(READ_BYTES, end - at);
        const { bytesRead, buffer } = await handle.read(Buffer.allocUnsafeSlow(want), 0, want, at);
        // The part is then shorter than announced, which the upload refuses.
        if (bytesRead === 0) return;
        at += bytesRead;
        yield buffer.subarray(0, bytesRead);
      }
    },
    read: () => handle.readFile(),
    [Symbol.asyncDispose]: () => handle.close(),
  };
}
