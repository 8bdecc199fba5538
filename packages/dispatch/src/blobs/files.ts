/**
 * Blobs as files of one folder. Invariants:
 *
 * - `sha256/ab/cd/<64 hex>` appears by rename, after its bytes were synced, and a put resolves after the folder was
 *   synced too. So a name is there with the right bytes or not at all, whenever the power fails.
 * - Everything under way is in `tmp/<pid>-<random>`; what a crashed process left there is removed at the next open.
 * - `uploads/<upload id>/<part number>` are parts of chunked uploads, as durable as blobs.
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
  type FileHandle,
} from 'node:fs/promises';
import { join } from 'node:path';
import type { Readable } from 'node:stream';
import { MillraceError, systemClock, type ByteStream, type Clock, type Random } from '@millrace/runner';
import type { BlobInfo, BlobStore, PutOptions, StoredBlob } from '../blobs.ts';
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

/** Chunks are gathered up to this size before they are written, so a blob below it costs a single write. */
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
    const path = this.#pathOf(digestHex(digest));
    return this.#run('stat', async () => {
      try {
        return { digest, size: (await stat(path)).size };
      } catch (error) {
        if (isMissing(error)) return null;
        throw storageError(error, `looking at blob ${digest}`, path);
      }
    });
  }

  async open(
    digest: string,
    range: { readonly start?: number; readonly end?: number } = {},
  ): Promise<Readable> {
    const path = this.#pathOf(digestHex(digest));
    return this.#run('open', async () => {
      let handle: FileHandle;
      try {
        handle = await open(path, 'r');
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
    options: PutOptions,
  ): Promise<BlobInfo> {
    const folder = this.#uploadFolder(uploadId);
    const path = join(folder, partFile(partNumber));
    return this.#run('putPart', async () => {
      const temp = this.#tempPath();
      const staged = await this.#stage(temp, bytes, options, `part ${partNumber} of upload ${uploadId}`);
      try {
        await mkdir(folder, { recursive: true, mode: FOLDER_MODE });
        await rename(temp, path);
        await syncFolder(folder);
        await syncFolder(join(this.#dir, 'uploads'));
      } catch (error) {
        await unlink(temp).catch(() => {}); // The error being reported is the one that matters.
        throw storageError(error, `storing part ${partNumber} of upload ${uploadId}`, path);
      }
      return staged;
    });
  }

  async joinParts(
    uploadId: string,
    parts: readonly { readonly partNumber: number; readonly digest: string }[],
  ): Promise<BlobInfo> {
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
      for (const low of await foldersIn(join(root, high))) {
        const folder = join(root, high, low);
        const entries = await opendir(folder).catch(nullIfMissing);
        if (entries === null) continue;
        for await (const entry of entries) {
          this.#checkOpen('list');
          if (!entry.isFile() || !/^[0-9a-f]{64}$/.test(entry.name)) continue;
          const info = await stat(join(folder, entry.name)).catch(nullIfMissing);
          if (info !== null) {
            yield { digest: `sha256:${entry.name}`, size: info.size, putAtMs: info.mtimeMs };
          }
        }
      }
    }
  }

  async delete(digest: string, options: { readonly ifPutBeforeMs?: number } = {}): Promise<boolean> {
    const hex = digestHex(digest);
    const path = this.#pathOf(hex);
    return this.#run('delete', () =>
      this.#inTurn(hex, async () => {
        try {
          const { ifPutBeforeMs } = options;
          if (ifPutBeforeMs !== undefined && (await stat(path)).mtimeMs >= ifPutBeforeMs) return false;
          await unlink(path);
          return true;
        } catch (error) {
          if (isMissing(error)) return false;
          throw storageError(error, `deleting blob ${digest}`, path);
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

  /** Writes and syncs `bytes` to a new file, hashing on the way. On any error the file is gone again. */
  async #stage(temp: string, bytes: ByteStream, options: PutOptions, what: string): Promise<BlobInfo> {
    const hash = createHash('sha256');
    let size = 0;
    let pending: Uint8Array[] = [];
    let pendingBytes = 0;
    let handle: FileHandle | null = null;
    const flush = async (): Promise<void> => {
      const data = pending.length === 1 ? pending[0]! : Buffer.concat(pending, pendingBytes);
      pending = [];
      pendingBytes = 0;
      // Only here: an error of the source, which may carry an errno of its own, is passed on as it is.
      try {
        handle ??= await open(temp, 'wx', FILE_MODE);
        await handle.writeFile(data);
      } catch (error) {
        throw storageError(error, `storing ${what}`, temp);
      }
    };
    let failed = true;
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
      await flush();
      await this.#seal(handle!).catch((error: unknown) => {
        throw storageError(error, `storing ${what}`, temp);
      });
      failed = false;
      return info;
    } finally {
      const file = handle as FileHandle | null;
      await file?.close();
      if (failed && file !== null) await unlink(temp).catch(() => {}); // Swept at the next open at the latest.
    }
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
      await this.#makeFolders(hex);
      await this.#inTurn(hex, async () => {
        await rename(temp, path);
        await syncFolder(this.#folderOf(hex));
      });
      return info;
    } catch (error) {
      await unlink(temp).catch(() => {}); // The error being reported is the one that matters.
      throw storageError(error, `storing blob ${info.digest}`, path);
    }
  }

  /** `sha256/ab/cd`. Synced even if it exists: the process that made it may have died before it did so. */
  async #makeFolders(hex: string): Promise<void> {
    const leaf = this.#folderOf(hex);
    if (this.#folders.has(leaf)) return;
    const root = join(this.#dir, 'sha256');
    const middle = join(root, hex.slice(0, 2));
    await mkdir(leaf, { recursive: true, mode: FOLDER_MODE });
    if (!this.#folders.has(middle)) await syncFolder(root);
    await syncFolder(middle);
    this.#folders.add(middle).add(leaf);
  }

  #folderOf(hex: string): string {
    return join(this.#dir, 'sha256', hex.slice(0, 2), hex.slice(2, 4));
  }

  #pathOf(hex: string): string {
    return join(this.#folderOf(hex), hex);
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
  parts: readonly { readonly partNumber: number; readonly digest: string }[],
  uploadId: string,
): AsyncGenerator<Uint8Array> {
  for (const part of parts) {
    const what = `part ${part.partNumber} of upload ${uploadId}`;
    const path = join(folder, partFile(part.partNumber));
    let handle: FileHandle;
    try {
      handle = await open(path, 'r');
    } catch (error) {
      if (isMissing(error)) throw new MillraceError('not_found', `${what} is not stored`);
      throw storageError(error, `opening ${what}`, path);
    }
    try {
      const { size } = await handle.stat();
      const pull = verified(fileChunks(handle, 0, size - 1, what, path), { digest: part.digest }, what);
      for (let chunk = await pull(); chunk !== null; chunk = await pull()) yield chunk;
    } finally {
      await handle.close();
    }
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
