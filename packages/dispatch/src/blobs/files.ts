/**
 * Blobs as files of one folder. Invariants:
 *
 * - `sha256/ab/<64 hex>` appears by rename, after its bytes were synced, and a put resolves after the folder was
 *   synced too. So a name is there with the right bytes or not at all, whenever the power fails. Earlier versions had one
 *   level more, `sha256/ab/cd/<64 hex>`: what is there is read, and moves when it is put again.
 * - Everything under way is in `tmp/<pid>-<random>`; what a crashed process left there is removed at the next open.
 * - `uploads/<upload id>/whole` has the parts of a chunked upload where they belong, as durable as blobs. It becomes the blob by a
 *   second name, once all of it was read and found right; whoever finds two names writes to it no more.
 * - `uploads/<upload id>/<part number>` is a part that was sent again, or whose place was not told. It is preferred.
 * - `owner` holds the id of the database that names the blobs.
 * - What it makes is open to its owner only.
 * - Putting bytes again replaces the file by an equal one. That costs a write, and buys that a damaged file is healed
 *   by it and that "when was this put last" needs no second place to be kept.
 */
import { createHash } from 'node:crypto';
import { constants } from 'node:fs';
import {
  link,
  mkdir,
  open,
  opendir,
  readFile,
  readdir,
  rename,
  rm,
  stat,
  unlink,
  utimes,
  type FileHandle,
} from 'node:fs/promises';
import { join } from 'node:path';
import type { Readable } from 'node:stream';
import { MillraceError, systemClock, type ByteStream, type Clock, type Random } from '@millrace/runner';
import type { BlobInfo, BlobStore, PutOptions, PutPartOptions, StagedPart, StoredBlob } from '../blobs.ts';
import { checkBytes, readableFrom, untilAborted, verified, type Pull } from '../pull-stream.ts';
import { digestHex } from './digest.ts';

export interface FileBlobsOptions {
  /** Created when missing, with its parents. One process at a time writes to it. */
  readonly dir: string;
  /** Stamps puts. Default: the machine's. */
  readonly clock?: Clock;
  /** Names temporary files. Default: Math.random. */
  readonly random?: Random;
}

/** Chunks are gathered up to this size before they are written, so a blob below it costs a single write. While they are, others are gathered. */
const WRITE_BYTES = 256 * 1024;

/** Size of one read. Measured on a cached file, hashed: 64 KiB 250-500 MiB/s, 256 KiB 720-800, 1 MiB 520-840. */
const READ_BYTES = 256 * 1024;

/** What users upload is for the dispatcher alone, also where the folder itself is open to others. */
const FOLDER_MODE = 0o700;
const FILE_MODE = 0o600;

/** A temporary file this old is nobody's, whatever process has the number in its name now. */
const ABANDONED_MS = 24 * 60 * 60 * 1000;

/**
 * Opens (or makes) a folder of blobs.
 *
 * @throws MillraceError `unavailable` when the folder cannot be made or written.
 */
export async function openFileBlobs(options: FileBlobsOptions): Promise<BlobStore> {
  const blobs = new FileBlobs(options);
  await blobs.prepare();
  return blobs;
}

class FileBlobs implements BlobStore {
  readonly #dir: string;
  readonly #clock: Clock;
  readonly #random: Random;
  /** By upload: the parts that were begun in their place. */
  readonly #placed = new Map<string, PlacedParts>();
  /** Folders known to exist and to be on disk under their parents. */
  readonly #folders = new Set<string>();
  /** Per digest: the tail of the queue of commits and deletes, which must not interleave. */
  readonly #queues = new Map<string, Promise<unknown>>();
  readonly #readers = new Set<Readable>();
  readonly #operations = new Set<Promise<unknown>>();
  #closed = false;

  constructor(options: FileBlobsOptions) {
    this.#dir = options.dir;
    this.#clock = options.clock ?? systemClock;
    this.#random = options.random ?? Math.random;
  }

  async prepare(): Promise<void> {
    try {
      for (const name of ['sha256', 'tmp', 'uploads'])
        await mkdir(join(this.#dir, name), { recursive: true, mode: FOLDER_MODE });
      await syncFolder(this.#dir);
      const now = Date.now();
      const startedAt = now - process.uptime() * 1000;
      for (const name of await readdir(join(this.#dir, 'tmp'))) {
        const path = join(this.#dir, 'tmp', name);
        const info = await stat(path).catch(() => null);
        if (info === null) continue;
        const pid = Number(/^(\d+)-/.exec(name)?.[1] ?? 0);
        const abandoned =
          info.mtimeMs < now - ABANDONED_MS ||
          (pid === process.pid ? info.mtimeMs < startedAt : !isAlive(pid));
        if (abandoned) await rm(path, { recursive: true, force: true });
      }
    } catch (error) {
      throw storageError(error, 'opening the blob folder', this.#dir);
    }
  }

  async claim(owner: string): Promise<string> {
    const path = join(this.#dir, 'owner');
    return this.#run('claim', async () => {
      try {
        const known = await readFile(path, 'utf8').catch(nullIfMissing);
        if (known !== null) return known;
        // A link appears whole, and fails where there is one already.
        const temp = this.#tempPath();
        const handle = await open(temp, 'wx', FILE_MODE);
        try {
          await handle.writeFile(owner);
          await handle.sync();
        } finally {
          await handle.close();
        }
        await link(temp, path).catch((error: NodeJS.ErrnoException) => {
          if (error.code !== 'EEXIST') throw error;
        });
        await unlink(temp);
        await syncFolder(this.#dir);
        return await readFile(path, 'utf8');
      } catch (error) {
        throw storageError(error, 'marking whose blobs these are', path);
      }
    });
  }

  async put(bytes: ByteStream, options: PutOptions): Promise<BlobInfo> {
    return this.#run('put', async () => {
      const temp = this.#tempPath();
      const staged = await this.#stage(temp, bytes, options, 'put');
      return this.#commit(temp, staged);
    });
  }

  async stat(digest: string): Promise<BlobInfo | null> {
    const hex = digestHex(digest);
    return this.#run('stat', async () => {
      const found = await this.#look(hex);
      return found === null ? null : { digest, size: found.size };
    });
  }

  async open(
    digest: string,
    range: { readonly start?: number; readonly end?: number } = {},
  ): Promise<Readable> {
    const hex = digestHex(digest);
    return this.#run('open', async () => {
      const path = this.#pathOf(hex);
      let handle: FileHandle;
      try {
        handle = await open(path, 'r').catch((error: unknown) => {
          if (isMissing(error)) return open(this.#oldPathOf(hex), 'r');
          throw error;
        });
      } catch (error) {
        if (isMissing(error)) throw new MillraceError('not_found', `blob ${digest} is not stored`);
        throw storageError(error, `opening blob ${digest}`, path);
      }
      try {
        const { size } = await handle.stat();
        const start = range.start ?? 0;
        const end = range.end ?? size - 1;
        if (start < 0 || end >= size || (start > end && (size > 0 || start > 0))) {
          throw new MillraceError(
            'invalid_argument',
            `range ${start}-${end} is not within blob ${digest} of ${size} bytes`,
          );
        }
        const what = `blob ${digest}`;
        const pull = fileChunks(handle, start, end, what, path);
        const whole = start === 0 && end === size - 1;
        const reader = readableFrom({
          pull: whole ? verified(pull, { digest }, what) : pull,
          close: () => handle.close(),
        });
        this.#readers.add(reader);
        reader.once('close', () => this.#readers.delete(reader));
        return reader;
      } catch (error) {
        await handle.close();
        throw error;
      }
    });
  }

  async putPart(
    uploadId: string,
    partNumber: number,
    bytes: ByteStream,
    options: PutPartOptions,
  ): Promise<BlobInfo> {
    const folder = this.#uploadFolder(uploadId);
    const path = join(folder, partFile(partNumber));
    const what = `part ${partNumber} of upload ${uploadId}`;
    return this.#run('putPart', async () => {
      const place = options.at === undefined ? null : await this.#place(uploadId, partNumber);
      if (place !== null) {
        let stored = false;
        try {
          const part = await this.#write(place.handle, options.at!, bytes, options, what, place.path);
          await place.handle.datasync().catch((error: unknown) => {
            throw storageError(error, `storing ${what}`, place.path);
          });
          stored = true;
          return part;
        } finally {
          await place.leave(stored);
        }
      }
      const temp = this.#tempPath();
      const staged = await this.#stage(temp, bytes, options, what);
      try {
        await this.#makeUploadFolder(folder);
        await rename(temp, path);
        await syncFolder(folder);
      } catch (error) {
        await unlink(temp).catch(() => {}); // The error being reported is the one that matters.
        throw storageError(error, `storing ${what}`, path);
      }
      return staged;
    });
  }

  async joinParts(uploadId: string, parts: readonly StagedPart[]): Promise<BlobInfo> {
    const folder = this.#uploadFolder(uploadId);
    parts.forEach((part, index) => {
      if (part.partNumber !== index + 1) {
        throw new MillraceError(
          'invalid_argument',
          `upload ${uploadId}: part ${index + 1} expected, got part ${part.partNumber}`,
        );
      }
    });
    return this.#run('joinParts', async () => {
      const temp = this.#tempPath();
      const named = await this.#nameWhole(uploadId, parts, temp);
      if (named) {
        try {
          const hash = createHash('sha256');
          let size = 0;
          for await (const chunk of partChunks(folder, parts, uploadId)) {
            hash.update(chunk);
            size += chunk.length;
          }
          return await this.#commit(temp, { digest: `sha256:${hash.digest('hex')}`, size });
        } finally {
          // Also when all went well: a rename to another name of the same file does nothing.
          await unlink(temp).catch(() => {});
        }
      }
      const all = partChunks(folder, parts, uploadId);
      const staged = await this.#stage(temp, all, { maxBytes: Infinity }, `upload ${uploadId}`);
      return this.#commit(temp, staged);
    });
  }

  async dropParts(uploadId: string): Promise<void> {
    const folder = this.#uploadFolder(uploadId);
    await this.#run('dropParts', async () => {
      try {
        await rm(folder, { recursive: true, force: true });
        this.#folders.delete(folder);
        this.#placed.delete(uploadId);
      } catch (error) {
        throw storageError(error, `dropping the parts of upload ${uploadId}`, folder);
      }
    });
  }

  async *listUploads(): AsyncGenerator<{ readonly uploadId: string; readonly putAtMs: number }> {
    const folder = join(this.#dir, 'uploads');
    for (const uploadId of await readdir(folder)) {
      this.#checkOpen('listUploads');
      const path = join(folder, uploadId);
      const made = await stat(path).catch(nullIfMissing);
      const parts = await readdir(path).catch(nullIfMissing);
      if (made === null || parts === null) continue;
      let putAtMs = made.mtimeMs;
      for (const part of parts) {
        const info = await stat(join(path, part)).catch(nullIfMissing);
        putAtMs = Math.max(putAtMs, info?.mtimeMs ?? -Infinity);
      }
      yield { uploadId, putAtMs };
    }
  }

  async *list(): AsyncGenerator<StoredBlob> {
    const root = join(this.#dir, 'sha256');
    for (const high of await foldersIn(root)) {
      yield* this.#listFolder(join(root, high), () => Promise.resolve(true));
      for (const low of await foldersIn(join(root, high))) {
        // Not again what was put again since.
        yield* this.#listFolder(
          join(root, high, low),
          async (hex) => (await stat(this.#pathOf(hex)).catch(nullIfMissing)) === null,
        );
      }
    }
  }

  async *#listFolder(folder: string, wanted: (hex: string) => Promise<boolean>): AsyncGenerator<StoredBlob> {
    const entries = await opendir(folder).catch(nullIfMissing);
    if (entries === null) return;
    for await (const entry of entries) {
      this.#checkOpen('list');
      if (!entry.isFile() || !/^[0-9a-f]{64}$/.test(entry.name)) continue;
      const info = await stat(join(folder, entry.name)).catch(nullIfMissing);
      if (info === null || !(await wanted(entry.name))) continue;
      yield { digest: `sha256:${entry.name}`, size: info.size, putAtMs: info.mtimeMs };
    }
  }

  async delete(digest: string, options: { readonly ifPutBeforeMs?: number } = {}): Promise<boolean> {
    const hex = digestHex(digest);
    return this.#run('delete', () =>
      this.#inTurn(hex, async () => {
        const { ifPutBeforeMs } = options;
        const found = await this.#look(hex);
        if (found === null || (ifPutBeforeMs !== undefined && found.putAtMs >= ifPutBeforeMs)) return false;
        try {
          // The older one first: a crash in between leaves what was looked at.
          for (const path of [this.#oldPathOf(hex), this.#pathOf(hex)])
            await unlink(path).catch(nullIfMissing);
          return true;
        } catch (error) {
          throw storageError(error, `deleting blob ${digest}`, found.path);
        }
      }),
    );
  }

  /** Lets operations under way finish and ends open reads. */
  async close(): Promise<void> {
    this.#closed = true;
    const readers = [...this.#readers].map(
      (reader) => new Promise<void>((resolve) => void reader.once('close', resolve)),
    );
    for (const reader of this.#readers) reader.destroy();
    await Promise.allSettled([...this.#operations, ...readers]);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  #checkOpen(verb: string): void {
    if (this.#closed) {
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

  /** Runs after everything earlier about this digest. */
  async #inTurn<T>(hex: string, operation: () => Promise<T>): Promise<T> {
    const before = this.#queues.get(hex) ?? Promise.resolve();
    const mine = before.then(operation, operation);
    this.#queues.set(hex, mine);
    try {
      return await mine;
    } finally {
      if (this.#queues.get(hex) === mine) this.#queues.delete(hex);
    }
  }

  /** Where a blob is; null: nowhere. */
  async #look(
    hex: string,
  ): Promise<{ readonly path: string; readonly size: number; readonly putAtMs: number } | null> {
    for (const path of [this.#pathOf(hex), this.#oldPathOf(hex)]) {
      try {
        const { size, mtimeMs } = await stat(path);
        return { path, size, putAtMs: mtimeMs };
      } catch (error) {
        if (!isMissing(error)) throw storageError(error, `looking at blob sha256:${hex}`, path);
      }
    }
    return null;
  }

  /** Writes and syncs `bytes` to a new file, hashing on the way. On any error the file is gone again. */
  async #stage(temp: string, bytes: ByteStream, options: PutOptions, what: string): Promise<BlobInfo> {
    let handle: FileHandle;
    try {
      handle = await open(temp, 'wx', FILE_MODE);
    } catch (error) {
      throw storageError(error, `storing ${what}`, temp);
    }
    let failed = true;
    try {
      const info = await this.#write(handle, 0, bytes, options, what, temp);
      await this.#seal(handle).catch((error: unknown) => {
        throw storageError(error, `storing ${what}`, temp);
      });
      failed = false;
      return info;
    } finally {
      await handle.close();
      if (failed) await unlink(temp).catch(() => {}); // Swept at the next open at the latest.
    }
  }

  /** Writes `bytes` from position `at` on, hashing on the way, and not one beyond those allowed. They are not synced. */
  async #write(
    handle: FileHandle,
    at: number,
    bytes: ByteStream,
    options: PutOptions,
    what: string,
    path: string,
  ): Promise<BlobInfo> {
    const hash = createHash('sha256');
    let size = 0;
    let position = at;
    let pending: Uint8Array[] = [];
    let pendingBytes = 0;
    let writing: Promise<void> = Promise.resolve();
    const flush = async (): Promise<void> => {
      await writing;
      const data = pending;
      const from = position;
      position += pendingBytes;
      pending = [];
      pendingBytes = 0;
      writing = writeAll(handle, data, from).catch((error: unknown) => {
        throw storageError(error, `storing ${what}`, path);
      });
      // Heard at the next `await writing`, which comes in any case.
      writing.catch(() => {});
    };
    try {
      for await (const chunk of untilAborted(bytes, options.signal)) {
        size += chunk.length;
        if (size > options.maxBytes) {
          throw new MillraceError(
            'resource_exhausted',
            `${what}: more than the ${options.maxBytes} bytes allowed`,
            { details: { limit: 'maxBytes', value: options.maxBytes } },
          );
        }
        hash.update(chunk);
        pending.push(chunk);
        pendingBytes += chunk.length;
        if (pendingBytes >= WRITE_BYTES) await flush();
      }
      const info: BlobInfo = { digest: `sha256:${hash.digest('hex')}`, size };
      checkBytes(info, options.expect ?? {}, what);
      if (pendingBytes > 0) await flush();
      await writing;
      return info;
    } finally {
      // Nobody writes to the file once this has settled.
      await writing.catch(() => {});
    }
  }

  /** The file for a part that comes for the first time, to be written where it belongs; null: it must be a file of its own. */
  async #place(
    uploadId: string,
    partNumber: number,
  ): Promise<{
    readonly handle: FileHandle;
    readonly path: string;
    leave(stored: boolean): Promise<void>;
  } | null> {
    const folder = this.#uploadFolder(uploadId);
    const path = join(folder, WHOLE);
    let handle: FileHandle | null = null;
    try {
      await this.#makeUploadFolder(folder);
      let placed = this.#placed.get(uploadId);
      if (placed === undefined) {
        const names = await readdir(folder);
        // Others may have come to this while it was read.
        placed = this.#placed.get(uploadId) ?? {
          begun: new Set(names.map(Number)),
          writers: 0,
          closed: false,
        };
        this.#placed.set(uploadId, placed);
      }
      if (placed.closed || placed.begun.has(partNumber)) return null;
      placed.begun.add(partNumber);
      placed.writers += 1;
      const leave = async (stored: boolean): Promise<void> => {
        await handle?.close();
        placed.writers -= 1;
        // Nobody was told that it is there, so it may come to the same place again.
        if (!stored) placed.begun.delete(partNumber);
      };
      try {
        handle = await open(path, constants.O_RDWR | constants.O_CREAT, FILE_MODE);
        if ((await handle.stat()).nlink === 1) {
          await (placed.named ??= syncFolder(folder));
          return { handle, path, leave };
        }
      } catch (error) {
        await leave(false);
        throw error;
      }
      await leave(true);
      return null;
    } catch (error) {
      throw storageError(error, `storing part ${partNumber} of upload ${uploadId}`, path);
    }
  }

  /**
   * Gives the file in which all parts are where they belong the name `temp`, and lets nobody write to it from then on. False: there
   * is no such file, and the parts have to be copied.
   */
  async #nameWhole(uploadId: string, parts: readonly StagedPart[], temp: string): Promise<boolean> {
    const folder = this.#uploadFolder(uploadId);
    const path = join(folder, WHOLE);
    const placed = this.#placed.get(uploadId);
    if (placed !== undefined) {
      if (placed.writers > 0) return false;
      placed.closed = true;
    }
    try {
      const names = await readdir(folder).catch(nullIfMissing);
      if (names === null || names.some((name) => name !== WHOLE) || !names.includes(WHOLE)) return false;
      const total = parts.reduce((sum, part) => sum + part.size, 0);
      if ((await stat(path)).size !== total) return false;
      await link(path, temp);
      // The stamp of a put is when it was committed, and must be as durable as the rest.
      const seconds = this.#clock.now() / 1000;
      await utimes(temp, seconds, seconds);
      const handle = await open(temp, 'r');
      try {
        await handle.sync();
      } finally {
        await handle.close();
      }
      return true;
    } catch (error) {
      // Also where there are no second names for a file.
      await unlink(temp).catch(() => {});
      if (FULL.has(String((error as NodeJS.ErrnoException).code)))
        throw storageError(error, 'joining parts', path);
      return false;
    }
  }

  /** Synced even if it exists: the process that made it may have died before it did so. */
  async #makeUploadFolder(folder: string): Promise<void> {
    if (this.#folders.has(folder)) return;
    await mkdir(folder, { recursive: true, mode: FOLDER_MODE });
    await syncFolder(join(this.#dir, 'uploads'));
    this.#folders.add(folder);
  }

  async #seal(handle: FileHandle): Promise<void> {
    // The file system's own stamp is the machine's clock; only another clock has to be written down.
    if (this.#clock !== systemClock) {
      const seconds = this.#clock.now() / 1000;
      await handle.utimes(seconds, seconds);
    }
    await handle.sync();
  }

  async #commit(temp: string, info: BlobInfo): Promise<BlobInfo> {
    const hex = digestHex(info.digest);
    const path = this.#pathOf(hex);
    try {
      await this.#makeFolder(hex);
      await this.#inTurn(hex, async () => {
        await rename(temp, path);
        await unlink(this.#oldPathOf(hex)).catch(nullIfMissing);
        await syncFolder(this.#folderOf(hex));
      });
      return info;
    } catch (error) {
      await unlink(temp).catch(() => {}); // The error being reported is the one that matters.
      throw storageError(error, `storing blob ${info.digest}`, path);
    }
  }

  /** `sha256/ab`. Synced even if it exists: the process that made it may have died before it did so. */
  async #makeFolder(hex: string): Promise<void> {
    const folder = this.#folderOf(hex);
    if (this.#folders.has(folder)) return;
    await mkdir(folder, { recursive: true, mode: FOLDER_MODE });
    await syncFolder(join(this.#dir, 'sha256'));
    this.#folders.add(folder);
  }

  #folderOf(hex: string): string {
    return join(this.#dir, 'sha256', hex.slice(0, 2));
  }

  #pathOf(hex: string): string {
    return join(this.#folderOf(hex), hex);
  }

  #oldPathOf(hex: string): string {
    return join(this.#folderOf(hex), hex.slice(2, 4), hex);
  }

  #uploadFolder(uploadId: string): string {
    // It becomes a path, so it must not be able to leave the folder.
    if (!/^[0-9a-zA-Z][0-9a-zA-Z_-]{0,127}$/.test(uploadId)) {
      throw new MillraceError(
        'invalid_argument',
        `upload id must be 1 to 128 letters, digits, - and _, got ${JSON.stringify(uploadId.slice(0, 80))}`,
      );
    }
    return join(this.#dir, 'uploads', uploadId);
  }

  #tempPath(): string {
    const digits = (): string =>
      Math.floor(this.#random() * 2 ** 32)
        .toString(16)
        .padStart(8, '0');
    return join(this.#dir, 'tmp', `${process.pid}-${digits()}${digits()}`);
  }
}

/** Parts of one upload, as far as this process knows. */
interface PlacedParts {
  /** Those begun in their place, and those that are files of their own. */
  readonly begun: Set<number>;
  writers: number;
  /** The file's name is on the disk. */
  named?: Promise<void>;
  /** It is being joined, or was. */
  closed: boolean;
}

const WHOLE = 'whole';

function partFile(partNumber: number): string {
  if (!Number.isSafeInteger(partNumber) || partNumber < 1) {
    throw new MillraceError('invalid_argument', `part number must be an integer >= 1, got ${partNumber}`);
  }
  return String(partNumber);
}

/** Bytes `start` to `end` (inclusive) of an open file. A file that ends early is `data_loss`. */
function fileChunks(handle: FileHandle, start: number, end: number, what: string, path: string): Pull {
  let position = start;
  return async () => {
    const want = Math.min(READ_BYTES, end + 1 - position);
    if (want <= 0) return null;
    let read: { readonly bytesRead: number; readonly buffer: Buffer };
    try {
      read = await handle.read(Buffer.allocUnsafeSlow(want), 0, want, position);
    } catch (error) {
      throw storageError(error, `reading ${what}`, path);
    }
    if (read.bytesRead === 0) {
      throw new MillraceError(
        'data_loss',
        `${what}: the stored file ends at ${position}, ${end + 1} bytes expected`,
      );
    }
    position += read.bytesRead;
    return read.buffer.subarray(0, read.bytesRead);
  };
}

async function* partChunks(
  folder: string,
  parts: readonly StagedPart[],
  uploadId: string,
): AsyncGenerator<Uint8Array> {
  let at = 0;
  for (const part of parts) {
    const what = `part ${part.partNumber} of upload ${uploadId}`;
    const own = join(folder, partFile(part.partNumber));
    const whole = join(folder, WHOLE);
    let handle: FileHandle;
    let path = own;
    try {
      handle = await open(own, 'r').catch((error: unknown) => {
        if (!isMissing(error)) throw error;
        path = whole;
        return open(whole, 'r');
      });
    } catch (error) {
      if (isMissing(error)) throw new MillraceError('not_found', `${what} is not stored`);
      throw storageError(error, `opening ${what}`, path);
    }
    try {
      const start = path === whole ? at : 0;
      const end = path === whole ? at + part.size - 1 : (await handle.stat()).size - 1;
      const pull = verified(fileChunks(handle, start, end, what, path), { digest: part.digest }, what);
      for (let chunk = await pull(); chunk !== null; chunk = await pull()) yield chunk;
    } finally {
      await handle.close();
    }
    at += part.size;
  }
}

async function writeAll(handle: FileHandle, data: readonly Uint8Array[], at: number): Promise<void> {
  const total = data.reduce((sum, chunk) => sum + chunk.length, 0);
  let { bytesWritten } = await handle.writev(data, at);
  if (bytesWritten === total) return;
  // A disk that is nearly full takes less than it was given, and says why when it is given the rest.
  const rest = Buffer.concat(data, total);
  while (bytesWritten < total) {
    bytesWritten += (await handle.write(rest, bytesWritten, total - bytesWritten, at + bytesWritten))
      .bytesWritten;
  }
}

async function foldersIn(path: string): Promise<string[]> {
  const entries = (await readdir(path, { withFileTypes: true }).catch(nullIfMissing)) ?? [];
  return entries
    .filter((entry) => entry.isDirectory() && /^[0-9a-f]{2}$/.test(entry.name))
    .map((entry) => entry.name);
}

async function syncFolder(path: string): Promise<void> {
  const handle = await open(path, constants.O_RDONLY | constants.O_DIRECTORY);
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

function isAlive(pid: number): boolean {
  if (pid === 0) return false;
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}

function isMissing(error: unknown): boolean {
  return (error as NodeJS.ErrnoException).code === 'ENOENT';
}

function nullIfMissing(error: unknown): null {
  if (isMissing(error)) return null;
  throw storageError(error, 'listing the blobs');
}

const FULL = new Set(['ENOSPC', 'EDQUOT', 'EFBIG']);

/** What the operating system says, in our codes. Paths go into the details, which stay with the operator. */
function storageError(error: unknown, what: string, path?: string): unknown {
  const errno = (error as NodeJS.ErrnoException | null)?.code;
  if (MillraceError.is(error) || typeof errno !== 'string' || !/^E[A-Z0-9]+$/.test(errno)) return error;
  const details = { errno, ...(path === undefined ? {} : { path }) };
  if (FULL.has(errno)) {
    return new MillraceError('resource_exhausted', `${what}: no space left for it (${errno})`, {
      cause: error,
      details,
    });
  }
  return new MillraceError('unavailable', `${what}: the file system refused (${errno})`, {
    cause: error,
    details,
  });
}
