/** Artifacts that a node puts past the dispatcher: a real dispatcher, and a place of its own that checks what it is sent. */
import { createHash, randomBytes, randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { createServer, type Server } from 'node:http';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  openDispatcher,
  openFileBlobs,
  openSqliteStore,
  type BlobStore,
  type Dispatcher,
} from '@millrace/dispatch';
import { openDomainStorage, type DomainStorage } from '@millrace/dispatch/client';
import { parseLease, systemClock, type Logger } from '@millrace/runner';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { SessionStorage } from '../session.ts';
import { openStoragePorts } from './ports.ts';

const MIB = 1024 * 1024;
const silent: Logger = { debug() {}, info() {}, warn() {}, error() {}, child: () => silent };

describe('artifacts past the dispatcher', () => {
  const domain = randomUUID();
  let dir: string;
  let place: Server;
  let dispatcher: Dispatcher;
  let storage: DomainStorage & AsyncDisposable;
  let ports: SessionStorage;
  /** Sizes of what came to the place, in order. */
  let came: number[];
  /** Parts that the dispatcher itself has stored. */
  let through: number;
  let closeAll: () => Promise<void>;

  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), 'millrace-direct-'));
    came = [];
    through = 0;
    const files = await openFileBlobs({ dir: join(dir, 'blobs') });
    const sizes = new Map<string, number>();
    const keyOf = (uploadId: string, partNumber: number, digest: string): string =>
      `${uploadId}/${partNumber}/${digest.slice('sha256:'.length)}`;
    place = createServer((request, answer) => {
      const chunks: Buffer[] = [];
      request.on('data', (chunk: Buffer) => chunks.push(chunk));
      request.on('end', () => {
        const bytes = Buffer.concat(chunks);
        const key = new URL(request.url ?? '', 'http://place').pathname.slice(1);
        const [uploadId = '', number = '', hex] = key.split('/');
        const wrong =
          request.headers.authorization !== undefined ||
          request.headers['x-secret'] !== 'given' ||
          createHash('sha256').update(bytes).digest('hex') !== hex;
        if (wrong) {
          answer.writeHead(400).end();
          return;
        }
        came.push(bytes.length);
        void files.putPart(uploadId, Number(number), chunked(bytes), { maxBytes: bytes.length }).then(() => {
          sizes.set(key, bytes.length);
          answer.end();
        });
      });
    });
    place.listen(0, '127.0.0.1');
    await once(place, 'listening');
    const origin = `http://127.0.0.1:${(place.address() as AddressInfo).port}`;
    const more: Partial<BlobStore> = {
      // Nothing can be read there.
      direct: { origin, url: () => Promise.resolve(`${origin}/nothing`) },
      directParts: {
        origin,
        put: (uploadId, { partNumber, digest }) =>
          Promise.resolve({
            url: `${origin}/${keyOf(uploadId, partNumber, digest)}?signature=x`,
            headers: { 'x-secret': 'given' },
          }),
        size: (uploadId, partNumber, digest) =>
          Promise.resolve(sizes.get(keyOf(uploadId, partNumber, digest)) ?? null),
      },
      putPart: (...args) => {
        through += 1;
        return files.putPart(...args);
      },
    };
    const blobs = new Proxy(files, {
      get: (target, name) => {
        const member: unknown = Reflect.get(more, name) ?? Reflect.get(target, name);
        return typeof member === 'function' ? member.bind(target) : member;
      },
    });
    const store = await openSqliteStore({ path: ':memory:' });
    dispatcher = await openDispatcher({ store, blobs, port: 0 });
    const token = await dispatcher.issueClientToken();
    storage = openDomainStorage({ baseUrl: dispatcher.url, token: () => token, clientId: 'c' });
    ports = openStoragePorts({
      lease: parseLease({
        domain_id: domain,
        domain_server_url: dispatcher.url,
        task: { id: randomUUID(), capability: '/test/v1', outputs_prefix: null },
      }),
      leaseId: null,
      domain: () => ({ id: domain, serverUrl: dispatcher.url }),
      token: () => token,
      refreshToken: () => Promise.reject(new Error('no refresh expected')),
      folder: { path: dir, create: () => Promise.resolve(dir), remove: () => Promise.resolve() },
      signal: new AbortController().signal,
      log: silent,
      clientId: 'test-client',
      clock: systemClock,
      random: () => 0,
      retry: { baseMs: 1, capMs: 5 },
    });
    closeAll = async () => {
      await ports.close();
      await storage[Symbol.asyncDispose]();
      await dispatcher.close();
      await store[Symbol.asyncDispose]();
      await files[Symbol.asyncDispose]();
      place.closeAllConnections();
      place.close();
      await rm(dir, { recursive: true, force: true });
    };
  });
  afterEach(() => closeAll());

  const stored = async (): Promise<Buffer> => {
    const [artifact] = ports.artifacts();
    const { body } = await storage.openRaw(domain, artifact!.id!);
    const chunks: Buffer[] = [];
    for await (const chunk of body as AsyncIterable<Buffer>) chunks.push(chunk);
    return Buffer.concat(chunks);
  };

  async function* chunked(bytes: Buffer): AsyncGenerator<Buffer> {
    for (let at = 0; at < bytes.length; at += 100_000) yield bytes.subarray(at, at + 100_000);
  }

  test('a file goes in one piece', async () => {
    const bytes = randomBytes(20 * MIB);
    await writeFile(join(dir, 'large'), bytes);
    await ports.output.putFile('large.bin', join(dir, 'large'));
    expect(came).toEqual([20 * MIB]);
    expect(through).toBe(0);
    expect((await stored()).equals(bytes)).toBe(true);
  });

  test.each([
    ['bytes', (bytes: Buffer) => ports.output.putBytes('large.bin', bytes)],
    ['streams', (bytes: Buffer) => ports.output.putStream('large.bin', chunked(bytes))],
  ])('%s go in parts', async (_, put) => {
    const bytes = randomBytes(20 * MIB);
    await put(bytes);
    expect(came.toSorted((a, b) => b - a)).toEqual([8 * MIB, 8 * MIB, 4 * MIB]);
    expect(through).toBe(0);
    expect((await stored()).equals(bytes)).toBe(true);
  });

  test.each([8 * MIB - 1, 8 * MIB])('%i bytes: from 8 MiB on it is worth it', async (size) => {
    const bytes = randomBytes(size);
    await ports.output.putBytes('some.bin', bytes);
    expect(came).toEqual(size < 8 * MIB ? [] : [size]);
    expect((await stored()).equals(bytes)).toBe(true);
  });

  test('where the place cannot be reached everything goes through the dispatcher', async () => {
    place.close();
    const bytes = randomBytes(9 * MIB);
    await writeFile(join(dir, 'large'), bytes);
    await ports.output.putFile('large.bin', join(dir, 'large'));
    expect([came, through]).toEqual([[], 1]);
    expect((await stored()).equals(bytes)).toBe(true);
    await ports.output.putStream('large.bin', chunked(bytes));
    expect([came, through]).toEqual([[], 3]);
    expect((await stored()).equals(bytes)).toBe(true);
  });
});
