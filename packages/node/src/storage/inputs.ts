/**
 * The input port: downloads from the lease's domain server. A download that breaks is begun again: where bytes were
 * handed out already, the new one must be of the same content and is skipped up to there.
 */
import { createHash, type Hash } from 'node:crypto';
import { createWriteStream } from 'node:fs';
import { mkdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import type { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import {
  MillraceError,
  type InputReadOptions,
  type InputSource,
  type MaterializedInput,
} from '@millrace/runner';
import { readableFrom, type DownloadPart, type DownloadQuery } from '@millrace/dispatch/client';
import { Attempts, withAttempts } from './attempts.ts';
import { parseCid } from './cid.ts';
import { materializedPath } from './names.ts';
import type { PortsWorld } from './world.ts';

/** What is known of a part besides its bytes. */
type PartMeta = Omit<DownloadPart, 'body'>;

export class Inputs implements InputSource {
  readonly #world: PortsWorld;
  #downloads = 0;

  constructor(world: PortsWorld) {
    this.#world = world;
  }

  async getBytesByCid(cid: string, options: InputReadOptions = {}): Promise<Uint8Array> {
    return this.#world.run('getBytesByCid', options.signal, async (signal) => {
      const { maxBytesInMemory } = this.#world.limits;
      const query = parseCid(cid, this.#world.domain());
      return withAttempts(this.#world, signal, async () => {
        await using first = await this.#first(query, signal);
        const { size } = first.meta;
        if (size > maxBytesInMemory) {
          throw new MillraceError(
            'resource_exhausted',
            `input ${cid} has ${size} bytes, at most ${maxBytesInMemory} are read into memory (maxBytesInMemory); use openRead or materializeCidToTemp`,
            { details: { limit: 'maxBytesInMemory', value: maxBytesInMemory } },
          );
        }
        const bytes = new Uint8Array(size);
        let at = 0;
        for await (const chunk of first.body) {
          bytes.set(chunk as Buffer, at);
          at += (chunk as Buffer).length;
        }
        this.#world.readIn(size);
        return bytes;
      });
    });
  }

  async materializeCidToTemp(cid: string, options: InputReadOptions = {}): Promise<string> {
    return (await this.materializeCidWithMeta(cid, options)).path;
  }

  async materializeCidWithMeta(cid: string, options: InputReadOptions = {}): Promise<MaterializedInput> {
    return this.#world.run('materializeCidWithMeta', options.signal, async (signal) => {
      const query = parseCid(cid, this.#world.domain());
      const folder = await this.#world.folder();
      this.#downloads += 1;
      const root = join(folder, `domain-input-${this.#downloads}`);
      const files = await withAttempts(this.#world, signal, async () => {
        try {
          return await this.#download(query, root, signal);
        } catch (error) {
          await rm(root, { recursive: true, force: true });
          throw error;
        }
      });
      const [primary, ...related] = files;
      const { meta, path } = primary!;
      return {
        cid,
        path,
        // The wire has the empty string for what is missing.
        data_id: meta.id || null,
        name: meta.name || null,
        data_type: meta.data_type || null,
        domain_id: meta.domain_id || null,
        root_dir: root,
        related_files: related.map((file) => file.path),
        extracted_paths: [],
      };
    });
  }

  async openRead(cid: string, options: InputReadOptions = {}): Promise<Readable> {
    // The stream outlives this call, and so does its place among what is under way.
    const stay = this.#world.enter('openRead', options.signal);
    try {
      const query = parseCid(cid, this.#world.domain());
      const { signal } = stay;
      const open = (): Promise<FirstPart> => this.#first(query, signal);
      const first = await withAttempts(this.#world, signal, open);
      const read = new ResumedRead(first, open, new Attempts(this.#world, signal), `input ${cid}`);
      const stream = readableFrom({
        pull: async () => {
          const chunk = await read.pull();
          if (chunk !== null) this.#world.readIn(chunk.length);
          return chunk;
        },
        abandon: () => stay.abandon(),
        close: async () => {
          signal.removeEventListener('abort', onAbort);
          try {
            await read.close();
          } finally {
            stay.leave();
          }
        },
      });
      const onAbort = (): void => void stream.destroy(signal.reason as Error);
      signal.addEventListener('abort', onAbort, { once: true });
      // Whoever reads it hears of an error there; before that it must not end the process.
      stream.on('error', () => {});
      return stream;
    } catch (error) {
      stay.leave();
      throw error;
    }
  }

  /** All parts to files below `root`. */
  async #download(
    query: DownloadQuery,
    root: string,
    signal: AbortSignal,
  ): Promise<readonly { readonly meta: PartMeta; readonly path: string }[]> {
    const files: { readonly meta: PartMeta; readonly path: string }[] = [];
    const taken = new Set<string>();
    for await (const { body, ...meta } of this.#world.storage().download(query, { signal })) {
      const [folder, scan, file] = materializedPath(meta.name, meta.data_type) as [string, string, string];
      const path = join(root, folder, scan, freeName(file, `${scan}/`, taken));
      await mkdir(join(root, folder, scan), { recursive: true });
      await pipeline(body, createWriteStream(path, { flags: 'wx' }), { signal });
      this.#world.readIn(meta.size);
      files.push({ meta, path });
    }
    return files;
  }

  async #first(query: DownloadQuery, signal: AbortSignal): Promise<FirstPart> {
    const parts = this.#world.storage().download(query, { signal })[Symbol.asyncIterator]();
    const next = await parts.next();
    if (next.done === true) throw new MillraceError('not_found', 'not found (404)');
    const { body, ...meta } = next.value;
    return {
      meta,
      body,
      [Symbol.asyncDispose]: async () => {
        // Also leaves the parts after it unread.
        await parts.return?.();
      },
    };
  }
}

interface FirstPart extends AsyncDisposable {
  readonly meta: PartMeta;
  readonly body: Readable;
}

/** The bytes of a part, over as many downloads as it takes. */
class ResumedRead {
  readonly #reopen: () => Promise<FirstPart>;
  readonly #attempts: Attempts;
  readonly #what: string;
  readonly #meta: PartMeta;
  /** Of what was handed out; only where the server tells no digest, which says more. */
  readonly #hash: Hash | null;
  #part: FirstPart | null;
  #chunks: AsyncIterator<Uint8Array>;
  #handedOut = 0;

  constructor(part: FirstPart, reopen: () => Promise<FirstPart>, attempts: Attempts, what: string) {
    this.#reopen = reopen;
    this.#attempts = attempts;
    this.#what = what;
    this.#meta = part.meta;
    this.#hash = part.meta.digest === null ? createHash('sha256') : null;
    this.#part = part;
    this.#chunks = chunksOf(part);
  }

  async pull(): Promise<Uint8Array | null> {
    for (;;) {
      try {
        if (this.#part === null) await this.#resume();
        const next = await this.#chunks.next();
        if (next.done === true) return null;
        this.#attempts.succeeded();
        this.#handedOut += next.value.length;
        this.#hash?.update(next.value);
        return next.value;
      } catch (error) {
        await this.close();
        await this.#attempts.failed(error);
      }
    }
  }

  async close(): Promise<void> {
    const part = this.#part;
    this.#part = null;
    await part?.[Symbol.asyncDispose]();
  }

  /** Downloads again up to where the last one broke. */
  async #resume(): Promise<void> {
    const part = await this.#reopen();
    this.#part = part;
    this.#chunks = chunksOf(part);
    const changed = new MillraceError(
      'data_loss',
      `${this.#what} was replaced by other bytes while it was read; read it again from the start`,
    );
    if (part.meta.digest !== this.#meta.digest || part.meta.size !== this.#meta.size) throw changed;
    const hash = this.#hash === null ? null : createHash('sha256');
    let left = this.#handedOut;
    while (left > 0) {
      const next = await this.#chunks.next();
      if (next.done === true) throw changed;
      const skipped = next.value.subarray(0, left);
      hash?.update(skipped);
      left -= skipped.length;
      if (skipped.length < next.value.length)
        this.#chunks = follow(next.value.subarray(skipped.length), this.#chunks);
    }
    if (hash !== null && this.#hash !== null && !hash.digest().equals(this.#hash.copy().digest()))
      throw changed;
  }
}

function chunksOf(part: FirstPart): AsyncIterator<Uint8Array> {
  return (part.body as AsyncIterable<Uint8Array>)[Symbol.asyncIterator]();
}

/** `first`, then the rest. */
function follow(first: Uint8Array, rest: AsyncIterator<Uint8Array>): AsyncIterator<Uint8Array> {
  let pending: Uint8Array | null = first;
  return {
    next: async () => {
      const value = pending;
      pending = null;
      return value === null ? rest.next() : { done: false, value };
    },
  };
}

/** Two parts of one name and type are two files: `a.bin`, `a-2.bin`. */
function freeName(file: string, folder: string, taken: Set<string>): string {
  const dot = file.lastIndexOf('.');
  let name = file;
  for (let count = 2; taken.has(folder + name); count += 1) {
    name = `${file.slice(0, dot)}-${count}${file.slice(dot)}`;
  }
  taken.add(folder + name);
  return name;
}
