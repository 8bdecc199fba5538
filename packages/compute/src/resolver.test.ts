import { mkdir, mkdtemp, readFile, readdir, rm, utimes, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { Artifact } from './artifact.ts';
import { refOf, verifyArtifact } from './artifact.ts';
import { ErrNotFound, computeReason } from './errors.ts';
import { formatRef, storeRef } from './ref.ts';
import type { Ref } from './ref.ts';
import {
  cachedResolver,
  compositeResolver,
  folderResolver,
  memoryResolver,
  readOrigin,
  writeArtifact,
} from './resolver.ts';
import type { ResolveOptions, Resolver } from './resolver.ts';

let dir: string;

beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), 'millrace-resolver-'));
});

afterEach(async () => {
  await rm(dir, { recursive: true, force: true });
});

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text);
const absent: Ref = { alg: 'sha256', digest: '0'.repeat(64) };
const pathOf = (ref: Ref): string => join(dir, storeRef(ref));

describe('every resolver', () => {
  test.each([
    ['memory', (): Resolver => memoryResolver()],
    ['folder', (): Resolver => folderResolver({ dir })],
    ['cached', (): Resolver => cachedResolver(memoryResolver(), { dir })],
    ['composite', (): Resolver => compositeResolver(memoryResolver(), folderResolver({ dir }))],
    ['empty composite', (): Resolver => compositeResolver()],
  ])('%s: what there is none of is ErrNotFound', async (_name, make) => {
    const error: unknown = await make()
      .resolve(absent)
      .catch((thrown: unknown) => thrown);
    expect(ErrNotFound.is(error)).toBe(true);
    expect((error as Error).message).toBe(`compute: artifact not found: ${formatRef(absent)}`);
  });

  test('ErrNotFound is nothing else that was not found', () => {
    expect(ErrNotFound.is(new Error('compute: artifact not found'))).toBe(false);
    expect(ErrNotFound.is(new ErrNotFound())).toBe(true);
  });
});

describe('verifying', () => {
  test('keeps a copy, so what was verified cannot be changed afterwards', () => {
    const wasm = bytes('code');
    const artifact = verifyArtifact(refOf(wasm), { ...refOf(wasm), engine: 'wasm', wasm }, 100);
    wasm[0] = 0;
    expect(Buffer.from(artifact.wasm).toString()).toBe('code');
    expect(verifyArtifact(artifact, artifact, 100)).toBe(artifact);
  });

  test('holds an artifact verified under one digest to any other', () => {
    const wasm = bytes('code');
    const artifact = verifyArtifact(refOf(wasm), { ...refOf(wasm), engine: 'wasm', wasm }, 100);
    expect(() => verifyArtifact(absent, artifact, 100)).toThrow(
      expect.objectContaining({
        code: 'data_loss',
        details: expect.objectContaining({ reason: 'bad-digest' }) as object,
      }),
    );
  });

  test('is not begun for bytes over the limit', () => {
    const wasm = bytes('12345');
    const artifact = { ...refOf(wasm), engine: 'wasm', wasm };
    expect(verifyArtifact(artifact, artifact, 5).digest).toBe(artifact.digest);
    expect(() => verifyArtifact(artifact, artifact, 4)).toThrow(/has 5 bytes, over maxModuleBytes 4/);
  });
});

describe('a folder', () => {
  test('gives back what was written, with its engine, under the layout of the reference', async () => {
    const ref = await writeArtifact(dir, bytes('code'), 'quickjs');
    expect(await readFile(join(dir, 'computes', 'sha256', ref.digest), 'utf8')).toBe('code');
    expect(JSON.parse(await readFile(`${pathOf(ref)}.manifest.json`, 'utf8'))).toEqual({
      engine: 'quickjs',
      ...ref,
    });
    const artifact = await folderResolver({ dir }).resolve(ref);
    expect(artifact).toMatchObject({ ...ref, engine: 'quickjs' });
    expect(Buffer.from(artifact.wasm).toString()).toBe('code');
    expect(await readdir(dirname(pathOf(ref)))).toHaveLength(2);
  });

  test.each([['{}'], ['{"engine":""}'], ['{"engine":7}'], ['not json'], ['null'], ['']])(
    'means wazero with the manifest %j',
    async (manifest) => {
      const ref = await writeArtifact(dir, bytes('code'), 'x');
      await writeFile(`${pathOf(ref)}.manifest.json`, manifest);
      expect((await folderResolver({ dir }).resolve(ref)).engine).toBe('wazero');
    },
  );

  test('means wazero without a manifest', async () => {
    const ref = await writeArtifact(dir, bytes('code'), 'x');
    await rm(`${pathOf(ref)}.manifest.json`);
    expect((await folderResolver({ dir }).resolve(ref)).engine).toBe('wazero');
  });

  test('never gives bytes that are not those of the ref', async () => {
    const ref = await writeArtifact(dir, bytes('code'), 'x');
    await writeFile(pathOf(ref), 'evil');
    const error: unknown = await folderResolver({ dir })
      .resolve(ref)
      .catch((thrown: unknown) => thrown);
    expect(computeReason(error)).toBe('bad-digest');
    expect((error as Error).message).toContain(formatRef(ref));
  });

  test('refuses what is larger than the limit before reading it, and what is no file', async () => {
    const ref = await writeArtifact(dir, bytes('12345'), 'x');
    expect((await folderResolver({ dir, maxModuleBytes: 5 }).resolve(ref)).digest).toBe(ref.digest);
    await expect(folderResolver({ dir, maxModuleBytes: 4 }).resolve(ref)).rejects.toThrow(
      /over maxModuleBytes 4/,
    );
    await rm(pathOf(ref));
    await mkdir(pathOf(ref));
    await expect(folderResolver({ dir }).resolve(ref)).rejects.toMatchObject({ code: 'failed_precondition' });
  });

  test.each(['../../etc/passwd', `${'0'.repeat(63)}/`, '0'.repeat(64).replace(/^0/, 'A')])(
    'never looks for the digest %j',
    async (digest) => {
      await expect(folderResolver({ dir }).resolve({ alg: 'sha256', digest })).rejects.toMatchObject({
        details: { reason: 'bad-ref' },
      });
    },
  );
});

describe('several resolvers', () => {
  test('are asked in order, until one has it or fails', async () => {
    const [first, second] = [memoryResolver(), memoryResolver()];
    const both = second.add(bytes('both'), 'second');
    first.add(bytes('both'), 'first');
    const only = second.add(bytes('only'), 'second');
    const resolver = compositeResolver(first, second);
    expect((await resolver.resolve(both)).engine).toBe('first');
    expect((await resolver.resolve(only)).engine).toBe('second');
    const broken: Resolver = { resolve: () => Promise.reject(new Error('broken')) };
    await expect(compositeResolver(broken, second).resolve(only)).rejects.toThrow('broken');
  });
});

describe('a cache', () => {
  function counting(resolver: Resolver): Resolver & { asked: number } {
    return {
      asked: 0,
      resolve(ref: Ref, options?: ResolveOptions): Promise<Artifact> {
        this.asked += 1;
        return resolver.resolve(ref, options);
      },
    };
  }

  test('fetches once, for callers at once and later, also after a restart', async () => {
    const memory = memoryResolver();
    const ref = memory.add(bytes('code'), 'quickjs');
    const source = counting(memory);
    const cache = cachedResolver(source, { dir });
    const found = await Promise.all([1, 2, 3].map(() => cache.resolve(ref)));
    expect(found.map((artifact) => artifact.engine)).toEqual(['quickjs', 'quickjs', 'quickjs']);
    await cachedResolver(source, { dir }).resolve(ref);
    expect(source.asked).toBe(1);
  });

  test('notices a poisoned or cut file, and fetches it again', async () => {
    const memory = memoryResolver();
    const ref = memory.add(bytes('code'));
    const source = counting(memory);
    const cache = cachedResolver(source, { dir });
    for (const spoiled of ['evil', 'cod', '']) {
      await cache.resolve(ref);
      await writeFile(pathOf(ref), spoiled);
      expect(Buffer.from((await cache.resolve(ref)).wasm).toString()).toBe('code');
      expect(await readFile(pathOf(ref), 'utf8')).toBe('code');
    }
    expect(source.asked).toBe(4);
  });

  test('does not keep what its source lied about', async () => {
    const liar: Resolver = {
      resolve: (ref) => Promise.resolve({ ...ref, engine: 'wasm', wasm: bytes('evil') }),
    };
    await expect(cachedResolver(liar, { dir }).resolve(absent)).rejects.toMatchObject({ code: 'data_loss' });
    expect(await readdir(dir)).toEqual([]);
  });

  test('asks again after a failure', async () => {
    const memory = memoryResolver();
    const cache = cachedResolver(memory, { dir });
    const ref = refOf(bytes('late'));
    await expect(cache.resolve(ref)).rejects.toThrow(/not found/);
    memory.add(bytes('late'));
    expect((await cache.resolve(ref)).digest).toBe(ref.digest);
  });

  test('throws out what was not used for longest, and keeps exactly what fits', async () => {
    const memory = memoryResolver();
    const cache = cachedResolver(memory, { dir, maxCacheBytes: 8 });
    const refs = ['aaaa', 'bbbb', 'cccc'].map((text) => memory.add(bytes(text)));
    await cache.resolve(refs[0]!);
    await cache.resolve(refs[1]!);
    // The second long ago, then the first used again.
    await utimes(pathOf(refs[1]!), 1, 1);
    await cache.resolve(refs[2]!);
    const kept = (await readdir(dirname(pathOf(absent)))).filter((name) => !name.includes('.'));
    expect(kept.sort()).toEqual([refs[0]!.digest, refs[2]!.digest].sort());
  });

  test('one caller that gives up does not end the fetch of the other; the last one does', async () => {
    const ref = refOf(bytes('slow'));
    let fetched: ((artifact: Artifact) => void) | null = null;
    let stopped: unknown = null;
    const slow: Resolver = {
      resolve: (_ref, options) =>
        new Promise((resolve, reject) => {
          fetched = resolve;
          options?.signal?.addEventListener('abort', () => {
            stopped = options.signal?.reason;
            reject(stopped);
          });
        }),
    };
    const cache = cachedResolver(slow, { dir });
    const [impatient, other] = [new AbortController(), new AbortController()];
    const first = cache.resolve(ref, { signal: impatient.signal });
    const second = cache.resolve(ref, { signal: other.signal });
    impatient.abort(new Error('no time'));
    await expect(first).rejects.toThrow('no time');
    expect(stopped).toBeNull();
    await expect.poll(() => fetched).not.toBeNull();
    fetched!({ ...ref, engine: 'wasm', wasm: bytes('slow') });
    expect((await second).digest).toBe(ref.digest);
    await rm(pathOf(ref));
    fetched = null;
    const third = cache.resolve(ref, { signal: other.signal });
    await expect.poll(() => fetched).not.toBeNull();
    other.abort(new Error('me neither'));
    await expect(third).rejects.toThrow('me neither');
    expect(stopped).toMatchObject({ message: 'me neither' });
  });
});

describe('the origin of an artifact', () => {
  test('is kept beside it, and stays when the artifact is written again without', async () => {
    const origin = { sourceBundle: bytes('{"v":1}'), sourceMap: '{"version":3}' };
    const ref = await writeArtifact(dir, bytes('code'), 'quickjs', origin);
    await writeArtifact(dir, bytes('code'), 'quickjs');
    const { sourceBundle, sourceMap } = await readOrigin(dir, ref);
    expect([Buffer.from(sourceBundle!).toString(), sourceMap]).toEqual(['{"v":1}', '{"version":3}']);
    expect((await folderResolver({ dir }).resolve(ref)).engine).toBe('quickjs');
    const other = await writeArtifact(dir, bytes('other'), 'wasm');
    expect(await readOrigin(dir, other)).toEqual({ sourceBundle: null, sourceMap: null });
  });
});
