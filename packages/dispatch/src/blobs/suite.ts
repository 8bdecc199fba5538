/** What any blob store must do. Run it over an implementation: `blobSuite('files', make)`. */
import { createHash, randomBytes } from 'node:crypto';
import type { Readable } from 'node:stream';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { BlobStore, StagedPart } from '../blobs.ts';

export interface BlobHarness extends AsyncDisposable {
  /** A new, empty store. */
  readonly blobs: BlobStore;
  /** Closes the store and opens another over the same place. */
  reopen(): Promise<BlobStore>;
}

const ANY = { maxBytes: 2 ** 40 };

/** `make` is called before each test, its harness disposed after it. */
export function blobSuite(name: string, make: () => Promise<BlobHarness>): void {
  describe(`blob store: ${name}`, () => {
    let harness: BlobHarness;
    let blobs: BlobStore;
    beforeEach(async () => {
      harness = await make();
      blobs = harness.blobs;
    });
    afterEach(async () => {
      await harness[Symbol.asyncDispose]();
    });

    for (const size of [0, 1, 65_536, 262_143, 262_144, 262_145, 3_000_000]) {
      test(`${size} bytes come back as they were put, under their SHA-256`, async () => {
        const bytes = randomBytes(size);
        const info = await blobs.put(chunked(bytes, 10_007), ANY);
        expect(info).toEqual({ digest: sha256(bytes), size });
        expect(await blobs.stat(info.digest)).toEqual(info);
        expect((await readAll(await blobs.open(info.digest))).equals(bytes)).toBe(true);
        const again = await harness.reopen();
        expect((await readAll(await again.open(info.digest))).equals(bytes)).toBe(true);
      });
    }

    test('equal bytes put at the same time are stored once', async () => {
      const bytes = randomBytes(300_000);
      const infos = await Promise.all(Array.from({ length: 8 }, () => blobs.put(chunked(bytes, 4096), ANY)));
      expect(new Set(infos.map((info) => info.digest))).toEqual(new Set([sha256(bytes)]));
      expect(await digests(blobs)).toEqual([sha256(bytes)]);
    });

    test('a range gives exactly its bytes, both ends included', async () => {
      const bytes = randomBytes(500_000);
      const { digest } = await blobs.put(chunked(bytes), ANY);
      for (const [start, end] of [
        [0, 0],
        [1, 300_000],
        [499_999, 499_999],
        [0, 499_999],
      ] as const) {
        const part = await readAll(await blobs.open(digest, { start, end }));
        expect(part.equals(bytes.subarray(start, end + 1))).toBe(true);
      }
      expect((await readAll(await blobs.open(digest, { start: 499_990 }))).length).toBe(10);
      expect((await readAll(await blobs.open(digest, { end: 9 }))).length).toBe(10);
    });

    test('a range outside the blob is refused', async () => {
      const { digest } = await blobs.put(chunked(randomBytes(10)), ANY);
      for (const range of [{ start: 10 }, { end: 10 }, { start: 5, end: 4 }, { start: -1 }]) {
        expect(await failure(blobs.open(digest, range))).toMatchObject({ code: 'invalid_argument' });
      }
    });

    test('the first owner is the owner, whoever asks and however often it is opened', async () => {
      expect(await blobs.claim('one-1')).toBe('one-1');
      expect(await blobs.claim('another-2')).toBe('one-1');
      // The mark is no blob.
      expect(await digests(blobs)).toEqual([]);
      expect(await (await harness.reopen()).claim('third-3')).toBe('one-1');
    });

    test('of owners that come at once all are told the same', async () => {
      const told = await Promise.all(['a-1', 'b-2', 'c-3', 'd-4'].map((owner) => blobs.claim(owner)));
      expect(['a-1', 'b-2', 'c-3', 'd-4']).toContain(await blobs.claim('e-5'));
      expect(told).toContain(await blobs.claim('e-5'));
    });

    test('an unknown digest is null to stat and not_found to open', async () => {
      const digest = sha256(Buffer.from('never put'));
      expect(await blobs.stat(digest)).toBeNull();
      expect(await failure(blobs.open(digest))).toMatchObject({ code: 'not_found' });
      expect(await blobs.delete(digest)).toBe(false);
    });

    test('a name that is no digest is refused', async () => {
      for (const digest of ['', 'sha256:', 'sha256:../../etc/passwd', `sha256:${'A'.repeat(64)}`, 'md5:00']) {
        expect(await failure(blobs.stat(digest))).toMatchObject({ code: 'invalid_argument' });
        expect(await failure(blobs.open(digest))).toMatchObject({ code: 'invalid_argument' });
      }
    });

    test('as many bytes as allowed are kept, one more and nothing is', async () => {
      const bytes = randomBytes(400_000);
      const maxBytes = bytes.length;
      expect((await blobs.put(chunked(bytes), { maxBytes })).size).toBe(maxBytes);
      const more = Buffer.concat([bytes, Buffer.from('x')]);
      expect(await failure(blobs.put(chunked(more), { maxBytes }))).toMatchObject({
        code: 'resource_exhausted',
        message: expect.stringContaining(`${maxBytes} bytes`) as string,
      });
      expect(await digests(blobs)).toEqual([sha256(bytes)]);
    });

    test('bytes that are not the expected ones are not kept', async () => {
      const bytes = randomBytes(1000);
      const wrong = [{ digest: sha256(Buffer.from('other')) }, { size: 999 }, { size: 1001 }];
      for (const expected of wrong) {
        expect(await failure(blobs.put(chunked(bytes), { ...ANY, expect: expected }))).toMatchObject({
          code: 'data_loss',
        });
      }
      expect(await digests(blobs)).toEqual([]);
      const right = { digest: sha256(bytes), size: 1000 };
      expect(await blobs.put(chunked(bytes), { ...ANY, expect: right })).toEqual(right);
    });

    test('a source that fails leaves nothing, and its error is passed on', async () => {
      const cause = Object.assign(new Error('peer gone'), { code: 'ECONNRESET' });
      async function* failing(): AsyncGenerator<Uint8Array> {
        yield randomBytes(400_000);
        throw cause;
      }
      expect(await failure(blobs.put(failing(), ANY))).toBe(cause);
      expect(await digests(blobs)).toEqual([]);
    });

    test('an abort ends a put whose source never yields, with its reason', async () => {
      const controller = new AbortController();
      async function* stuck(): AsyncGenerator<Uint8Array> {
        yield randomBytes(400_000);
        controller.abort(new Error('enough'));
        await new Promise(() => {});
      }
      expect(await failure(blobs.put(stuck(), { ...ANY, signal: controller.signal }))).toMatchObject({
        message: 'enough',
      });
      expect(await digests(blobs)).toEqual([]);
    });

    test('a read that began before a delete gets all bytes, one that begins after it none', async () => {
      const bytes = randomBytes(2_000_000);
      const { digest } = await blobs.put(chunked(bytes), ANY);
      const reading = await blobs.open(digest);
      expect(await blobs.delete(digest)).toBe(true);
      expect(await blobs.delete(digest)).toBe(false);
      expect((await readAll(reading)).equals(bytes)).toBe(true);
      expect(await failure(blobs.open(digest))).toMatchObject({ code: 'not_found' });
    });

    test('a delete of what was put before a moment spares what was put again since', async () => {
      const { digest } = await blobs.put(chunked(Buffer.from('again')), ANY);
      const [first] = await all(blobs.list());
      const putAtMs = first!.putAtMs;
      expect(await blobs.delete(digest, { ifPutBeforeMs: putAtMs })).toBe(false);
      expect(await blobs.stat(digest)).not.toBeNull();
      expect(await blobs.delete(digest, { ifPutBeforeMs: putAtMs + 1 })).toBe(true);
    });

    // Where a part belongs may be told with it, or not.
    for (const told of [true, false]) {
      const at = (offset: number): { readonly at?: number } => (told ? { at: offset } : {});
      describe(`parts, their places ${told ? 'told' : 'not told'}`, () => {
        test('they arrive in any order and again, and join in theirs', async () => {
          const parts = [randomBytes(300_000), randomBytes(300_000), randomBytes(5)];
          const infos: StagedPart[] = [];
          const put = async (partNumber: number): Promise<void> => {
            const bytes = chunked(parts[partNumber - 1]!);
            const info = await blobs.putPart('upload-1', partNumber, bytes, {
              ...ANY,
              ...at((partNumber - 1) * 300_000),
            });
            infos[partNumber - 1] = { partNumber, ...info };
          };
          await Promise.all([3, 1, 2].map(put));
          const whole = Buffer.concat(parts);
          const joined = { digest: sha256(whole), size: whole.length };
          const again = await harness.reopen();
          expect(await again.joinParts('upload-1', infos)).toEqual(joined);
          expect(await again.joinParts('upload-1', infos)).toEqual(joined);
          blobs = again;
          await put(2);
          expect(await again.joinParts('upload-1', infos)).toEqual(joined);
          await again.dropParts('upload-1');
          await again.dropParts('upload-1');
          expect(await failure(again.joinParts('upload-1', infos))).toMatchObject({ code: 'not_found' });
          expect((await readAll(await again.open(joined.digest))).equals(whole)).toBe(true);
          expect(await digests(again)).toEqual([joined.digest]);
        });

        test('a part that comes after its upload was joined changes no blob', async () => {
          const bytes = randomBytes(100_000);
          const part = await blobs.putPart('upload-6', 1, chunked(bytes), { ...ANY, ...at(0) });
          const joined = await blobs.joinParts('upload-6', [{ partNumber: 1, ...part }]);
          await blobs.putPart('upload-6', 1, chunked(Buffer.from('other')), { ...ANY, ...at(0) });
          const again = await harness.reopen();
          await again.putPart('upload-6', 2, chunked(Buffer.from('more')), { ...ANY, ...at(100_000) });
          expect((await readAll(await again.open(joined.digest))).equals(bytes)).toBe(true);
        });

        test('a part that is sent again with other bytes is the one that counts', async () => {
          await blobs.putPart('upload-7', 1, chunked(Buffer.from('one')), { ...ANY, ...at(0) });
          const two = await blobs.putPart('upload-7', 2, chunked(Buffer.from('two')), { ...ANY, ...at(3) });
          const uno = await blobs.putPart('upload-7', 1, chunked(Buffer.from('uno')), { ...ANY, ...at(0) });
          const parts = [uno, two].map((info, index) => ({ partNumber: index + 1, ...info }));
          expect(await blobs.joinParts('upload-7', parts)).toEqual({ digest: sha256('unotwo'), size: 6 });
        });

        test('a part that fails half way may come again', async () => {
          async function* broken(): AsyncGenerator<Uint8Array> {
            yield randomBytes(300_000);
            throw new Error('peer gone');
          }
          const bytes = randomBytes(300_010);
          const options = { ...ANY, ...at(0) };
          expect(await failure(blobs.putPart('upload-8', 1, broken(), options))).toMatchObject({
            message: 'peer gone',
          });
          const part = await blobs.putPart('upload-8', 1, chunked(bytes), options);
          expect(await blobs.joinParts('upload-8', [{ partNumber: 1, ...part }])).toEqual({
            digest: sha256(bytes),
            size: bytes.length,
          });
        });

        test('parts that were replaced by others, or have a gap, do not join', async () => {
          const first = await blobs.putPart('upload-3', 1, chunked(Buffer.from('one')), { ...ANY, ...at(0) });
          await blobs.putPart('upload-3', 1, chunked(Buffer.from('uno')), { ...ANY, ...at(0) });
          expect(await failure(blobs.joinParts('upload-3', [{ partNumber: 1, ...first }]))).toMatchObject({
            code: 'data_loss',
          });
          expect(await failure(blobs.joinParts('upload-3', [{ partNumber: 2, ...first }]))).toMatchObject({
            code: 'invalid_argument',
          });
          expect(await digests(blobs)).toEqual([]);
        });

        test('a part beyond its bound is refused and the part of before stays', async () => {
          const options = { maxBytes: 5, ...at(0) };
          const part = await blobs.putPart('upload-4', 1, chunked(Buffer.from('12345')), options);
          expect(
            await failure(blobs.putPart('upload-4', 1, chunked(Buffer.from('123456')), options)),
          ).toMatchObject({ code: 'resource_exhausted' });
          expect(await blobs.joinParts('upload-4', [{ partNumber: 1, ...part }])).toEqual(part);
        });
      });
    }

    test('no parts join to the empty blob', async () => {
      expect(await blobs.joinParts('upload-2', [])).toEqual({ digest: sha256(Buffer.alloc(0)), size: 0 });
    });

    test('an upload id that could leave its folder is refused', async () => {
      for (const id of ['', '..', 'a/b', '.hidden', `a${'b'.repeat(128)}`]) {
        expect(await failure(blobs.putPart(id, 1, chunked(Buffer.from('x')), ANY))).toMatchObject({
          code: 'invalid_argument',
        });
        expect(await failure(blobs.dropParts(id))).toMatchObject({ code: 'invalid_argument' });
      }
    });

    test('a reader that stops early frees what it holds', async () => {
      const { digest } = await blobs.put(chunked(randomBytes(2_000_000)), ANY);
      for (let index = 0; index < 50; index += 1) {
        for await (const chunk of await blobs.open(digest)) {
          expect((chunk as Buffer).length).toBeGreaterThan(0);
          break;
        }
        (await blobs.open(digest)).destroy();
      }
      await blobs[Symbol.asyncDispose]();
    });

    test('closing ends reads and refuses further calls', async () => {
      const { digest } = await blobs.put(chunked(randomBytes(2_000_000)), ANY);
      const reading = await blobs.open(digest);
      const gone = new Promise<void>((resolve) => void reading.once('close', resolve));
      await blobs[Symbol.asyncDispose]();
      await gone;
      expect(await failure(blobs.stat(digest))).toMatchObject({ code: 'failed_precondition' });
      expect(await failure(blobs.put(chunked(Buffer.from('x')), ANY))).toMatchObject({
        code: 'failed_precondition',
      });
      await blobs[Symbol.asyncDispose]();
    });
  });
}

/** What a promise rejects with. */
async function failure(promise: Promise<unknown>): Promise<unknown> {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  throw new Error('it was expected to fail and did not');
}

async function* chunked(bytes: Uint8Array, size = 65_536): AsyncGenerator<Uint8Array> {
  for (let at = 0; at < bytes.length; at += size) yield bytes.subarray(at, at + size);
}

async function readAll(stream: Readable): Promise<Buffer> {
  const chunks: Buffer[] = [];
  for await (const chunk of stream) chunks.push(chunk as Buffer);
  return Buffer.concat(chunks);
}

async function all<T>(items: AsyncIterable<T>): Promise<T[]> {
  const result: T[] = [];
  for await (const item of items) result.push(item);
  return result;
}

async function digests(blobs: BlobStore): Promise<string[]> {
  return (await all(blobs.list())).map((blob) => blob.digest).toSorted();
}

function sha256(bytes: Uint8Array | string): string {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
}
