/** Parts of uploads that go from the client to the bucket, against a real gateway and over a real dispatcher. */
import { createHash, randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { systemClock, type ByteStream } from '@millrace/runner';
import { SimulatedClock } from '@millrace/runner/testing';
import { request } from 'undici';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { BlobStore, DirectPut } from '../blobs.ts';
import type { DomainStorage, UploadSession } from '../client/domain.ts';
import { uploadStream } from '../client/upload.ts';
import { BadNetwork, BucketDispatcher, OWNER, S3Server, withoutS3 } from '../s3.test.support.ts';
import type { Dispatcher } from '../dispatcher.ts';
import type { Store } from '../store.ts';
import { collectGarbage } from './collect.ts';
import { S3Bucket } from './s3-bucket.ts';
import { checksUploads } from './s3-check.ts';
import { parseS3Url } from './s3-url.ts';

const MIB = 1024 * 1024;
const DOMAIN = '6f9619ff-8b86-4d01-b42d-00cf4fc964ff';

const hexOf = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');

async function put({ url, headers }: DirectPut, body: Uint8Array): Promise<number> {
  const answer = await request(url, { method: 'PUT', headers, body });
  await answer.body.dump();
  return answer.statusCode;
}

async function all<T>(items: AsyncIterable<T>): Promise<T[]> {
  const found: T[] = [];
  for await (const item of items) found.push(item);
  return found;
}

async function* chunked(bytes: Uint8Array): AsyncGenerator<Uint8Array> {
  for (let at = 0; at < bytes.length; at += 256 * 1024) yield bytes.subarray(at, at + 256 * 1024);
}

describe.skipIf(withoutS3())('parts past the dispatcher', { timeout: 120_000 }, () => {
  let server: S3Server;
  let bucket: string;
  let prefixes = 0;
  beforeAll(async () => {
    server = await S3Server.start();
    bucket = await server.createBucket();
  }, 120_000);
  afterAll(() => server[Symbol.asyncDispose]());

  interface Place extends AsyncDisposable {
    readonly blobs: BlobStore;
    readonly store: Store;
    readonly dispatcher: Dispatcher;
    readonly storage: DomainStorage;
    readonly token: string;
    readonly clock: SimulatedClock;
    /** The heads of the requests with which clients put something into the bucket. */
    readonly client: string[];
    /** Bytes that the dispatcher has put itself. */
    readonly own: () => number;
    readonly network: BadNetwork;
    keys(under: string): Promise<string[]>;
    read(id: string): Promise<Buffer>;
  }

  /** A dispatcher whose bucket is behind `network`, on which the requests of clients can be told by their signatures. */
  async function dispatching(more = '&direct=1'): Promise<Place> {
    const network = await BadNetwork.start(server.port);
    const prefix = `p${(prefixes += 1)}`;
    const url = `s3://${bucket}/${prefix}?endpoint=${network.endpoint}${more}`;
    const opened = await BucketDispatcher.open(url);
    const { blobs, store, dispatcher, token, clock, storage } = opened;
    const inside = await S3Bucket.connect(parseS3Url(server.url(bucket, prefix)), OWNER, systemClock);
    const client: string[] = [];
    let own = 0;
    const place: Place = {
      blobs,
      store,
      dispatcher,
      storage,
      token,
      clock,
      client,
      own: () => own,
      network,
      keys: async (under) => (await all(inside.list(under, 'looking'))).map(({ key }) => key),
      async read(id) {
        const { body } = await storage.openRaw(DOMAIN, id);
        return Buffer.concat(await all(body as AsyncIterable<Buffer>));
      },
      async [Symbol.asyncDispose]() {
        inside.close();
        await opened[Symbol.asyncDispose]();
        await network[Symbol.asyncDispose]();
      },
    };
    network.onRequest = (bytes) => {
      const head = bytes.toString('latin1', 0, 4096);
      // Clients' signatures are in the URL, the dispatcher's in a header.
      if (/^PUT [^ ]*X-Amz-Signature=/.test(head)) client.push(head);
      else if (head.startsWith('PUT ')) own += Number(/content-length: (\d+)/i.exec(head)?.[1] ?? 0);
      return true;
    };
    return place;
  }

  const start = (place: Place, size: number | null, more: { readonly sha256?: string } = {}) =>
    place.storage.startUpload({
      domainId: DOMAIN,
      name: `item-${randomBytes(6).toString('hex')}`,
      dataType: 'test',
      size,
      existingId: null,
      ...more,
    });

  /** What the dispatcher answers to who asks where to put parts. */
  async function ask(
    place: Place,
    { uploadId }: UploadSession,
    parts: readonly { readonly part_number: number; readonly sha256: string; readonly size: number }[],
  ): Promise<{ readonly status: number; readonly puts: readonly DirectPut[]; readonly text: string }> {
    const answer = await request(
      `${place.dispatcher.url}/api/v1/domains/${DOMAIN}/data/multipart/direct?uploadId=${uploadId}`,
      {
        method: 'POST',
        headers: { authorization: `Bearer ${place.token}`, 'content-type': 'application/json' },
        body: JSON.stringify({ parts }),
      },
    );
    const text = await answer.body.text();
    const puts = answer.statusCode === 200 ? (JSON.parse(text) as { parts: DirectPut[] }).parts : [];
    return { status: answer.statusCode, puts, text };
  }

  test('a stream goes to the bucket part by part, without the token, and is joined there', async () => {
    await using place = await dispatching();
    const bytes = randomBytes(20 * MIB);
    const id = await uploadStream(place.storage, DOMAIN, chunked(bytes), { name: 'stream' });
    expect(place.client).toHaveLength(3);
    expect(place.client.join()).not.toMatch(/authorization|bearer|posemesh/i);
    expect(place.own()).toBeLessThan(MIB);
    expect((await place.read(id)).equals(bytes)).toBe(true);
    expect(await place.keys('uploads/')).toEqual([]);
    expect(await place.keys('tmp/')).toEqual([]);
  });

  test('what is known beforehand goes in one piece that nobody reads again', async () => {
    await using place = await dispatching();
    const bytes = randomBytes(20 * MIB);
    const hex = hexOf(bytes);
    const told: number[] = [];
    let read = 0;
    place.network.onAnswer = (chunk) => {
      read += chunk.length;
      return true;
    };
    const id = await uploadStream(place.storage, DOMAIN, (): ByteStream => chunked(bytes), {
      name: 'whole',
      sha256: hex,
      size: bytes.length,
      onBytes: (total) => told.push(total),
    });
    expect(place.client).toHaveLength(1);
    expect(place.own()).toBeLessThan(MIB);
    expect(read).toBeLessThan(MIB);
    expect(told.at(-1)).toBe(bytes.length);
    expect((await place.read(id)).equals(bytes)).toBe(true);
    expect(await place.keys('sha256/')).toEqual([`sha256/${hex.slice(0, 2)}/${hex}`]);
    expect(await place.keys('uploads/')).toEqual([]);
  });

  test('small items and small parts go through the dispatcher', async () => {
    await using place = await dispatching();
    const item = await place.storage.put(DOMAIN, { name: 'small', dataType: 'test' }, randomBytes(100));
    expect(item).not.toBeNull();
    const upload = await start(place, MIB - 1);
    const part = randomBytes(MIB - 1);
    const etag = await place.storage.putPart(DOMAIN, upload.uploadId, 1, part, part.length);
    await place.storage.finishUpload(DOMAIN, upload.uploadId, [{ part_number: 1, etag }]);
    expect(place.client).toEqual([]);
    const larger = randomBytes(MIB);
    const next = await start(place, MIB);
    await place.storage.putPart(DOMAIN, next.uploadId, 1, larger, MIB);
    expect(place.client).toHaveLength(1);
  });

  test('bytes other than the stated ones are refused by the bucket, and so is another length', async () => {
    await using place = await dispatching();
    const bytes = randomBytes(2 * MIB);
    const upload = await start(place, bytes.length);
    const { puts } = await ask(place, upload, [{ part_number: 1, sha256: hexOf(bytes), size: bytes.length }]);
    const [direct] = puts;
    const others = Buffer.from(bytes);
    others[1_000_000]! ^= 1;
    expect(await put(direct!, others)).toBe(400);
    expect(await put(direct!, bytes.subarray(1))).toBe(403);
    expect(await put(direct!, Buffer.concat([bytes, bytes]))).toBe(403);
    const lying = { ...direct!, headers: { 'x-amz-content-sha256': 'UNSIGNED-PAYLOAD' } };
    expect(await put(lying, others)).toBe(403);
    expect(await put({ ...direct!, headers: {} }, others)).toBe(403);
    expect(await place.keys('uploads/')).toEqual([]);
    const parts = [{ part_number: 1, etag: `sha256:${hexOf(bytes)}` }];
    await expect(place.storage.finishUpload(DOMAIN, upload.uploadId, parts)).rejects.toMatchObject({
      code: 'invalid_argument',
      message: expect.stringContaining('part 1 was not uploaded'),
    });
    expect(await put(direct!, bytes)).toBe(200);
    const id = await place.storage.finishUpload(DOMAIN, upload.uploadId, parts);
    expect((await place.read(id)).equals(bytes)).toBe(true);
  });

  test('a request for one key is no request for another, and none for reading or deleting', async () => {
    await using place = await dispatching();
    const bytes = randomBytes(MIB);
    const upload = await start(place, bytes.length);
    const { puts } = await ask(place, upload, [{ part_number: 1, sha256: hexOf(bytes), size: MIB }]);
    const direct = puts[0]!;
    const hex = hexOf(bytes);
    const elsewhere = direct.url.replace(/uploads\/[^?]*/, `sha256/${hex.slice(0, 2)}/${hex}`);
    expect(elsewhere).not.toBe(direct.url);
    expect(await put({ ...direct, url: elsewhere }, bytes)).toBe(403);
    expect(await put(direct, bytes)).toBe(200);
    for (const method of ['GET', 'DELETE'] as const) {
      const answer = await request(direct.url, { method, headers: direct.headers });
      await answer.body.dump();
      expect(answer.statusCode).toBe(403);
    }
    expect(await place.keys('uploads/')).toHaveLength(1);
  });

  test('a request is good for a while only', async () => {
    await using place = await dispatching();
    const bytes = randomBytes(MIB);
    const part = { partNumber: 1, digest: `sha256:${hexOf(bytes)}`, size: bytes.length };
    const direct = await place.blobs.directParts!.put('expired', part, 1);
    await expect.poll(() => put(direct, bytes), { timeout: 20_000, interval: 500 }).toBe(403);
    await place.blobs.dropParts('expired');
    expect(await put(direct, bytes)).toBe(403);
    expect(await place.keys('uploads/')).toEqual([]);
  });

  test('a replay changes nothing: not before the upload is finished, and afterwards only what is swept', async () => {
    await using place = await dispatching();
    const bytes = randomBytes(MIB);
    const upload = await start(place, bytes.length);
    const { puts } = await ask(place, upload, [{ part_number: 1, sha256: hexOf(bytes), size: MIB }]);
    for (let times = 0; times < 3; times += 1) expect(await put(puts[0]!, bytes)).toBe(200);
    const parts = [{ part_number: 1, etag: `sha256:${hexOf(bytes)}` }];
    const id = await place.storage.finishUpload(DOMAIN, upload.uploadId, parts);
    expect(await place.keys('uploads/')).toEqual([]);
    expect(await put(puts[0]!, bytes)).toBe(200);
    expect(await place.keys('uploads/')).toHaveLength(1);
    expect(await place.storage.finishUpload(DOMAIN, upload.uploadId, parts)).toBe(id);
    expect((await place.read(id)).equals(bytes)).toBe(true);
    // Two days on.
    const clock = { ...systemClock, now: () => Date.now() + 2 * 86_400_000 };
    await collectGarbage(place.store, place.blobs, { clock });
    expect(await place.keys('uploads/')).toEqual([]);
    expect((await place.read(id)).equals(bytes)).toBe(true);
  });

  test('an upload that is given up goes with what it put, at once when it is aborted', async () => {
    await using place = await dispatching();
    const bytes = randomBytes(MIB);
    for (const how of ['aborted', 'forgotten']) {
      const upload = await start(place, 3 * MIB);
      const { puts } = await ask(place, upload, [{ part_number: 1, sha256: hexOf(bytes), size: 3 * MIB }]);
      expect(puts).toHaveLength(1);
      const first = { part_number: 1, sha256: hexOf(Buffer.concat([bytes, bytes, bytes])), size: 3 * MIB };
      const [direct] = (await ask(place, upload, [first])).puts;
      expect(await put(direct!, Buffer.concat([bytes, bytes, bytes]))).toBe(200);
      expect(await place.keys('uploads/')).toHaveLength(1);
      if (how === 'aborted') await place.storage.abortUpload(DOMAIN, upload.uploadId);
      else {
        const clock = { ...systemClock, now: () => Date.now() + 2 * 86_400_000 };
        await collectGarbage(place.store, place.blobs, { clock });
      }
      expect(await place.keys('uploads/'), how).toEqual([]);
    }
  });

  test('a client that dies in the middle leaves an upload that another can finish, or nobody', async () => {
    await using place = await dispatching();
    const bytes = randomBytes(18 * MIB);
    const upload = await start(place, bytes.length);
    const partOf = (number: number): Buffer =>
      bytes.subarray((number - 1) * upload.partSize, number * upload.partSize);
    const parts = [1, 2, 3].map((part_number) => ({
      part_number,
      sha256: hexOf(partOf(part_number)),
      size: partOf(part_number).length,
    }));
    const { puts } = await ask(place, upload, parts);
    expect(await put(puts[0]!, partOf(1))).toBe(200);
    // The connection breaks while the second part is on its way.
    let seen = 0;
    const before = place.network.onRequest;
    place.network.onRequest = (chunk) => {
      seen += chunk.length;
      return seen < 2 * MIB;
    };
    await expect(put(puts[1]!, partOf(2))).rejects.toThrow();
    place.network.onRequest = before;
    expect(await place.keys('uploads/')).toHaveLength(1);
    const chosen = parts.map(({ part_number, sha256 }) => ({ part_number, etag: `sha256:${sha256}` }));
    await expect(place.storage.finishUpload(DOMAIN, upload.uploadId, chosen)).rejects.toMatchObject({
      message: expect.stringContaining('part 2 was not uploaded'),
    });
    // One part past the dispatcher, one through it.
    expect(await put(puts[1]!, partOf(2))).toBe(200);
    await place.storage.putPart(DOMAIN, upload.uploadId, 3, chunked(partOf(3)), partOf(3).length);
    const id = await place.storage.finishUpload(DOMAIN, upload.uploadId, chosen);
    expect((await place.read(id)).equals(bytes)).toBe(true);
  });

  test('a client that cannot reach the bucket sends through the dispatcher, and asks again after a minute', async () => {
    await using place = await dispatching();
    let refused = 0;
    const before = place.network.onRequest;
    place.network.onRequest = (chunk) => {
      if (!/^PUT [^ ]*X-Amz-Signature=/.test(chunk.toString('latin1'))) return true;
      refused += 1;
      return false;
    };
    const bytes = randomBytes(20 * MIB);
    const id = await uploadStream(place.storage, DOMAIN, chunked(bytes), { name: 'first' });
    expect((await place.read(id)).equals(bytes)).toBe(true);
    // Those that were under way together.
    expect(refused).toBeLessThanOrEqual(3);
    const tries = refused;
    const whole = { sha256: hexOf(bytes), size: bytes.length };
    const again = await uploadStream(place.storage, DOMAIN, () => chunked(bytes), { name: 'two', ...whole });
    expect((await place.read(again)).equals(bytes)).toBe(true);
    expect(refused).toBe(tries);
    place.network.onRequest = before;
    await place.clock.advance(60_000);
    await uploadStream(place.storage, DOMAIN, () => chunked(bytes), { name: 'three', ...whole });
    expect(place.client).toHaveLength(1);
  });

  test('what a file has become since it was hashed is not what was stated, and nothing is kept', async () => {
    await using place = await dispatching();
    const bytes = randomBytes(9 * MIB);
    const upload = uploadStream(place.storage, DOMAIN, () => chunked(bytes), {
      name: 'changed',
      sha256: '0'.repeat(64),
      size: bytes.length,
    });
    await expect(upload).rejects.toMatchObject({ code: 'failed_precondition' });
    expect(await place.storage.find(DOMAIN, { name: 'changed' })).toEqual([]);
    expect(await place.keys('uploads/')).toEqual([]);
    expect(await place.keys('sha256/')).toEqual([]);
  });

  test('parts that are none of the upload are refused before anything is signed', async () => {
    await using place = await dispatching();
    const sha256 = 'a'.repeat(64);
    const known = await start(place, 10 * MIB);
    const unknown = await start(place, null);
    const part = (part_number: number, size: number) => ({ part_number, sha256, size });
    const say = async (upload: UploadSession, ...parts: { part_number: number; size: number }[]) => {
      const { status, text } = await ask(
        place,
        upload,
        parts.map((one) => ({ ...one, sha256 })),
      );
      return `${status} ${text}`;
    };
    expect(await say(known, part(1, 8 * MIB), part(2, 2 * MIB))).toMatch(/^200 /);
    expect(await say(known, part(1, 8 * MIB - 1))).toMatch(/^400 parts: part 1 must have 8388608 bytes/);
    expect(await say(known, part(2, 8 * MIB))).toMatch(/^400 parts: part 2 must have 2097152 bytes/);
    expect(await say(known, part(3, 1))).toMatch(/^400 parts: the upload has no part 3/);
    expect(await say(unknown, part(9, 8 * MIB))).toMatch(/^200 /);
    expect(await say(unknown, part(1, 8 * MIB + 1))).toMatch(/^400 parts: part 1 must have at most 8388608/);
    expect(await say(known, ...Array.from({ length: 101 }, () => part(1, 8 * MIB)))).toMatch(/^400 /);
    expect(await say(known)).toMatch(/^400 /);
    const { status } = await ask(place, known, [{ part_number: 1, sha256: 'A'.repeat(64), size: 1 }]);
    expect(status).toBe(400);
    expect((await ask(place, { ...known, uploadId: DOMAIN }, [part(1, 1)])).status).toBe(404);
  });

  test('a collector that looks while an upload is finished leaves what it made', async () => {
    await using place = await dispatching();
    const begun: { bytes: Buffer; upload: UploadSession; etag: string; putAtMs: number }[] = [];
    for (let round = 0; round < 10; round += 1) {
      const bytes = randomBytes(MIB);
      const etag = `sha256:${hexOf(bytes)}`;
      // Somebody put these bytes long ago, and nothing names them any more.
      await place.blobs.put(chunked(bytes), { maxBytes: MIB });
      const [old] = (await all(place.blobs.list())).filter((blob) => blob.digest === etag);
      const upload = await start(place, MIB, { sha256: hexOf(bytes) });
      expect(await place.storage.putPart(DOMAIN, upload.uploadId, 1, bytes, MIB)).toBe(etag);
      begun.push({ bytes, upload, etag, putAtMs: old!.putAtMs });
    }
    // The stamps are whole seconds, so it takes another second for a put to show.
    await new Promise((resolve) => setTimeout(resolve, 1_100));
    for (const { bytes, upload, etag, putAtMs } of begun) {
      const [id] = await Promise.all([
        place.storage.finishUpload(DOMAIN, upload.uploadId, [{ part_number: 1, etag }]),
        place.blobs.delete(etag, { ifPutBeforeMs: putAtMs + 1 }),
      ]);
      expect((await place.read(id)).equals(bytes)).toBe(true);
    }
  });

  test('nobody is sent anywhere unless the URL of the blobs allows it', async () => {
    await using place = await dispatching('');
    expect((await place.storage.info())?.direct).toBeNull();
    const bytes = randomBytes(9 * MIB);
    const id = await uploadStream(place.storage, DOMAIN, chunked(bytes), { name: 'plain' });
    expect((await place.read(id)).equals(bytes)).toBe(true);
    expect(place.client).toEqual([]);
    const upload = await start(place, MIB, { sha256: 'a'.repeat(64) });
    expect(upload.partSize).toBe(8 * MIB);
    const { status } = await ask(place, upload, [{ part_number: 1, sha256: 'a'.repeat(64), size: MIB }]);
    expect(status).toBe(501);
  });

  test.each([
    ['takes whatever comes', 200],
    ['takes nothing that was signed beforehand', 403],
  ])('a bucket that %s is not sent anything past the dispatcher', async (_, status) => {
    const careless = createServer((asked, answer) => {
      asked.resume().once('end', () => answer.writeHead(status).end());
    });
    careless.listen(0, '127.0.0.1');
    await once(careless, 'listening');
    const { port } = careless.address() as AddressInfo;
    const url = `s3://bucket/p?endpoint=http://127.0.0.1:${port}`;
    const inside = await S3Bucket.connect(parseS3Url(url), OWNER, systemClock);
    expect(await checksUploads(inside, 'tmp/probe')).toBe(false);
    inside.close();
    careless.closeAllConnections();
    careless.close();
  });

  test('what the probe at the start has put is gone', async () => {
    await using place = await dispatching();
    expect(place.blobs.directParts).toBeDefined();
    expect(place.client).toEqual([]);
    expect(await place.keys('')).toEqual([]);
  });
});
