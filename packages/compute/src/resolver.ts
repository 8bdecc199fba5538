/**
 * From a ref to its artifact. Whatever bytes come from (a folder, a cache, a peer), they are hashed before anything else
 * looks at them; only bytes that have their digest leave a resolver of this file, and the manager checks those of
 * any other resolver again.
 *
 * A folder holds an artifact as the reference's file store does: the bytes at `computes/<alg>/<digest>`, and beside them
 * `<digest>.manifest.json` with the name of the engine. The manifest is not covered by the digest; at worst it names an
 * engine that refuses the bytes. What the bytes were built from may lie there too: `<digest>.source.json`, `<digest>.map.json`.
 */
import { randomUUID } from 'node:crypto';
import { mkdir, open, readdir, rename, rm, stat, unlink, utimes, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { MillraceError } from '@millrace/runner';
import { DEFAULT_ENGINE, moduleTooBig, refOf, verifyArtifact } from './artifact.ts';
import type { Artifact } from './artifact.ts';
import { ErrNotFound, computeReason } from './errors.ts';
import { DEFAULT_LIMITS } from './limits.ts';
import { checkRef, formatRef, storeRef } from './ref.ts';
import type { Ref } from './ref.ts';

export interface ResolveOptions {
  readonly signal?: AbortSignal;
}

/** Finds artifacts. May be asked for any number of refs at once. */
export interface Resolver {
  /** @throws {@link ErrNotFound} when there is none; `data_loss` (`bad-digest`) when what is there is something else. */
  resolve(ref: Ref, options?: ResolveOptions): Promise<Artifact>;
  /**
   * Lets go of what is kept of another's artifact, so that it is asked for again. Whoever runs artifacts calls this when
   * the engine would not take one: the engine's name is not covered by the digest, and may have been set right since.
   */
  forget?(ref: Ref): Promise<void>;
}

/** Artifacts of a program that has the bytes at hand. */
export interface MemoryResolver extends Resolver {
  /** Adds an artifact and returns its ref. Default engine: the `wasm` engine. */
  add(wasm: Uint8Array, engine?: string): Ref;
}

/** An empty one. */
export function memoryResolver(): MemoryResolver {
  const artifacts = new Map<string, Artifact>();
  return {
    add(wasm, engine = DEFAULT_ENGINE) {
      const ref = refOf(wasm);
      artifacts.set(formatRef(ref), verifyArtifact(ref, { ...ref, engine, wasm }, Number.MAX_SAFE_INTEGER));
      return ref;
    },
    resolve(ref) {
      const artifact = artifacts.get(formatRef(ref));
      return artifact === undefined
        ? Promise.reject(new ErrNotFound(formatRef(ref)))
        : Promise.resolve(artifact);
    },
  };
}

/**
 * Asks one after the other; the first that has the artifact answers. A failure other than {@link ErrNotFound} ends the search:
 * behind a broken store there may be another, but which of them answers must not depend on chance.
 */
export function compositeResolver(...resolvers: readonly Resolver[]): Resolver {
  return {
    async resolve(ref, options) {
      for (const resolver of resolvers) {
        try {
          return await resolver.resolve(ref, options);
        } catch (error) {
          if (!ErrNotFound.is(error)) throw error;
        }
      }
      throw new ErrNotFound(formatRef(ref));
    },
    async forget(ref) {
      for (const resolver of resolvers) await resolver.forget?.(ref);
    },
  };
}

export interface FolderOptions {
  /** Holds `computes/`. Need not exist to be read. */
  readonly dir: string;
  /** Larger files are refused before they are read. Default {@link DEFAULT_LIMITS}.maxModuleBytes, 32 MiB. */
  readonly maxModuleBytes?: number;
}

/**
 * Artifacts of a local folder. A missing or unreadable manifest, or one without an engine, means `wazero`, the `wasm` engine.
 */
export function folderResolver(options: FolderOptions): Resolver {
  return {
    async resolve(ref) {
      checkRef(ref);
      const path = join(options.dir, storeRef(ref));
      const maxBytes = options.maxModuleBytes ?? DEFAULT_LIMITS.maxModuleBytes;
      const wasm = await readWhole(path, maxBytes, (bytes) => moduleTooBig(ref, bytes, maxBytes));
      if (wasm === null) throw new ErrNotFound(formatRef(ref));
      return verifyArtifact(ref, { ...ref, engine: await engineOf(`${path}.manifest.json`), wasm }, maxBytes);
    },
  };
}

/** What an artifact was built from, as {@link buildCompute} gives it; `null` for what is not known. */
export interface ArtifactOrigin {
  readonly sourceBundle: Uint8Array | null;
  readonly sourceMap: string | null;
}

/**
 * Writes an artifact into a folder and returns its ref. Writing the same bytes again changes nothing but the engine's name and
 * the origin, where one is given. Each file appears whole or not at all, and the artifact last, so a reader never sees bytes
 * without their engine.
 */
export async function writeArtifact(
  dir: string,
  wasm: Uint8Array,
  engine: string,
  origin: ArtifactOrigin = { sourceBundle: null, sourceMap: null },
): Promise<Ref> {
  const ref = refOf(wasm);
  const path = join(dir, storeRef(ref));
  await mkdir(dirname(path), { recursive: true });
  const { sourceBundle, sourceMap } = origin;
  if (sourceBundle !== null) await replaceFile(`${path}${SOURCE_ENDING}`, sourceBundle);
  if (sourceMap !== null) await replaceFile(`${path}${MAP_ENDING}`, Buffer.from(sourceMap));
  const manifest = `${JSON.stringify({ engine, alg: ref.alg, digest: ref.digest })}\n`;
  await replaceFile(`${path}.manifest.json`, Buffer.from(manifest));
  await replaceFile(path, wasm);
  return ref;
}

/** The origin kept beside an artifact by {@link writeArtifact}. Not verified: nothing of it is ever run. */
export async function readOrigin(dir: string, ref: Ref): Promise<ArtifactOrigin> {
  checkRef(ref);
  const path = join(dir, storeRef(ref));
  const read = (ending: string): Promise<Uint8Array | null> =>
    readWhole(`${path}${ending}`, MAX_ORIGIN_BYTES, () => new ErrNotFound());
  const [sourceBundle, sourceMap] = await Promise.all([read(SOURCE_ENDING), read(MAP_ENDING)]);
  return { sourceBundle, sourceMap: sourceMap === null ? null : Buffer.from(sourceMap).toString('utf8') };
}

export interface CachedResolverOptions extends FolderOptions {
  /** Bytes of artifacts kept; the longest unused go first. Default 1 GiB. */
  readonly maxCacheBytes?: number;
}

/**
 * Keeps what another resolver finds in a folder. What is in the folder is hashed each time it is read; a file that is not
 * what its name says is removed and fetched again. Callers that ask for the same ref at once share one fetch; it is given up
 * only when all of them have.
 */
export function cachedResolver(source: Resolver, options: CachedResolverOptions): Resolver {
  return new CachedResolver(source, options);
}

class CachedResolver implements Resolver {
  readonly #source: Resolver;
  readonly #folder: Resolver;
  readonly #dir: string;
  readonly #maxCacheBytes: number;
  readonly #fetches = new Map<string, Fetch>();

  constructor(source: Resolver, options: CachedResolverOptions) {
    this.#source = source;
    this.#folder = folderResolver(options);
    this.#dir = options.dir;
    this.#maxCacheBytes = options.maxCacheBytes ?? 1024 ** 3;
  }

  async resolve(ref: Ref, { signal }: ResolveOptions = {}): Promise<Artifact> {
    checkRef(ref);
    signal?.throwIfAborted();
    const key = formatRef(ref);
    let fetch = this.#fetches.get(key);
    if (fetch === undefined) {
      const controller = new AbortController();
      const started: Fetch = { controller, callers: 0, artifact: this.#find(ref, controller.signal) };
      const forget = (): void => {
        if (this.#fetches.get(key) === started) this.#fetches.delete(key);
      };
      started.artifact.then(forget, forget);
      this.#fetches.set(key, started);
      fetch = started;
    }
    return this.#join(key, fetch, signal);
  }

  async forget(ref: Ref): Promise<void> {
    checkRef(ref);
    await removeArtifact(join(this.#dir, storeRef(ref)));
  }

  #join(key: string, fetch: Fetch, signal: AbortSignal | undefined): Promise<Artifact> {
    fetch.callers += 1;
    return new Promise((resolve, reject) => {
      const onAbort = (): void => {
        fetch.callers -= 1;
        if (fetch.callers === 0) {
          // Whoever asks from now on starts a fetch of their own.
          if (this.#fetches.get(key) === fetch) this.#fetches.delete(key);
          fetch.controller.abort(signal?.reason);
        }
        reject(signal?.reason);
      };
      signal?.addEventListener('abort', onAbort, { once: true });
      const unlisten = (): void => signal?.removeEventListener('abort', onAbort);
      fetch.artifact.then(
        (artifact) => {
          unlisten();
          resolve(artifact);
        },
        (error: unknown) => {
          unlisten();
          reject(error);
        },
      );
    });
  }

  async #find(ref: Ref, signal: AbortSignal): Promise<Artifact> {
    const path = join(this.#dir, storeRef(ref));
    try {
      const kept = await this.#folder.resolve(ref);
      const now = new Date();
      // Only for the order in which things are thrown out; a folder that cannot be written to still serves.
      await utimes(path, now, now).catch(() => undefined);
      return kept;
    } catch (error) {
      const spoiled = computeReason(error) === 'bad-digest' || computeReason(error) === 'module';
      if (!spoiled && !ErrNotFound.is(error)) throw error;
      if (spoiled) await rm(path, { force: true });
    }
    const fetched = await this.#source.resolve(ref, { signal });
    const artifact = verifyArtifact(ref, fetched, Number.MAX_SAFE_INTEGER);
    await writeArtifact(this.#dir, artifact.wasm, artifact.engine);
    await this.#prune(dirname(path));
    return artifact;
  }

  async #prune(folder: string): Promise<void> {
    const names = (await readdir(folder)).filter((name) => /^[0-9a-f]{64}$/.test(name));
    const files: { readonly path: string; readonly size: number; readonly usedAt: number }[] = [];
    for (const name of names) {
      const path = join(folder, name);
      // Another process may share the folder and be quicker.
      const found = await stat(path).catch(() => null);
      if (found !== null) files.push({ path, size: found.size, usedAt: found.mtimeMs });
    }
    files.sort((a, b) => a.usedAt - b.usedAt);
    let total = files.reduce((sum, file) => sum + file.size, 0);
    for (const file of files) {
      if (total <= this.#maxCacheBytes) return;
      await removeArtifact(file.path);
      total -= file.size;
    }
  }
}

async function removeArtifact(path: string): Promise<void> {
  await rm(path, { force: true });
  await rm(`${path}.manifest.json`, { force: true });
}

interface Fetch {
  readonly controller: AbortController;
  readonly artifact: Promise<Artifact>;
  callers: number;
}

const MAX_MANIFEST_BYTES = 64 * 1024;
const MAX_ORIGIN_BYTES = 256 * 1024 * 1024;
const SOURCE_ENDING = '.source.json';
const MAP_ENDING = '.map.json';

async function engineOf(path: string): Promise<string> {
  try {
    const bytes = await readWhole(path, MAX_MANIFEST_BYTES, () => new ErrNotFound());
    const manifest: unknown = JSON.parse(new TextDecoder().decode(bytes ?? new Uint8Array(0)));
    const engine = (manifest as { readonly engine?: unknown } | null)?.engine;
    return typeof engine === 'string' && engine !== '' ? engine : DEFAULT_ENGINE;
  } catch {
    // As the reference: the digest has vouched for the bytes, and without a manifest they are a WASI command.
    return DEFAULT_ENGINE;
  }
}

/** A regular file of at most `maxBytes`, or `null` when there is none. */
async function readWhole(
  path: string,
  maxBytes: number,
  tooBig: (bytes: number) => Error,
): Promise<Uint8Array | null> {
  let file;
  try {
    file = await open(path, 'r');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') return null;
    throw new MillraceError('unavailable', `compute: cannot read ${path}`, { cause: error });
  }
  try {
    const found = await file.stat();
    if (!found.isFile()) throw new MillraceError('failed_precondition', `compute: ${path} is not a file`);
    if (found.size > maxBytes) throw tooBig(found.size);
    // No more than was announced, even when the file is growing.
    const bytes = new Uint8Array(found.size);
    let length = 0;
    while (length < bytes.length) {
      const { bytesRead } = await file.read(bytes, length, bytes.length - length, length);
      if (bytesRead === 0) break;
      length += bytesRead;
    }
    return bytes.subarray(0, length);
  } finally {
    await file.close();
  }
}

async function replaceFile(path: string, bytes: Uint8Array): Promise<void> {
  const temporary = `${path}.${randomUUID()}.tmp`;
  try {
    await writeFile(temporary, bytes, { flush: true });
    await rename(temporary, path);
  } catch (error) {
    await unlink(temporary).catch(() => undefined);
    throw error;
  }
}
