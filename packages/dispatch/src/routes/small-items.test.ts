/** Items whose bytes the store keeps with their names, over HTTP, and what becomes of them. */
import { createHash, randomBytes } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Readable } from 'node:stream';
import { DatabaseSync } from '@photostructure/sqlite';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { openFileBlobs } from '../blobs/files.ts';
import type { BlobStore } from '../blobs.ts';
import type { NewItem } from '../client/domain.ts';
import { HttpOrigin } from '../client/http.ts';
import { connect } from '../client/http-requestor.ts';
import type { Requestor } from '../client/requestor.ts';
import type { Dispatcher } from '../dispatcher.ts';
import { openDispatcher } from '../server.ts';
import type { Store } from '../store.ts';
import { openSqliteStore } from '../stores/sqlite.ts';

/** The largest that is small. */
const SMALL = 64 * 1024;
/** What is held of the small items of one request. */
const HELD = 2 * 1024 * 1024;

let dir: string;
let store: Store;
let blobs: BlobStore;
let dispatcher: Dispatcher;
let client: Requestor;
let domain: string;

beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), 'millrace-small-'));
  await open();
});
afterEach(async () => {
  await close();
  await rm(dir, { recursive: true });
});

async function open(maxBytes?: number): Promise<void> {
  store = await openSqliteStore({
    path: join(dir, 'store.db'),
    ...(maxBytes !== undefined && { maxBytes }),
  });
  blobs = await openFileBlobs({ dir: join(dir, 'blobs') });
  dispatcher = await openDispatcher({ store, blobs, port: 0 });
  client = connect({ url: dispatcher.url, token: await dispatcher.issueClientToken() });
  domain = dispatcher.defaultDomainId;
}

async function close(): Promise<void> {
  await client.close();
  await dispatcher.close();
  await blobs[Symbol.asyncDispose]();
  await store[Symbol.asyncDispose]();
}

/** Rows that hold bytes. */
async function kept(): Promise<number> {
  return await inDatabase((database) => {
    const row = database.prepare('SELECT count(*) AS count FROM small_bytes').get() as { count: number };
    return row.count;
  });
}

/** Closes everything, looks into the database, and opens everything again. */
async function inDatabase<T>(work: (database: InstanceType<typeof DatabaseSync>) => T): Promise<T> {
  await close();
  const database = new DatabaseSync(join(dir, 'store.db'));
  try {
    return work(database);
  } finally {
    database.close();
    await open();
  }
}

async function files(): Promise<number> {
  let count = 0;
  for await (const blob of blobs.list()) count += blob.size > 0 ? 1 : 0;
  return count;
}

async function read(id: string, range?: { start: number; end: number }): Promise<Buffer> {
  const { body } = await client.storage.openRaw(domain, id, range);
  return await readAll(body);
}

async function readAll(body: Readable): Promise<Buffer> {
  const chunks: Buffer[] = [];
  for await (const chunk of body) chunks.push(chunk as Buffer);
  return Buffer.concat(chunks);
}

function itemsOf(count: number, size: number): NewItem[] {
  return Array.from({ length: count }, (_, index) => ({
    name: `item-${index}`,
    dataType: 'test',
    bytes: randomBytes(size),
  }));
}

test('up to 64 KiB they are no file, one byte more and they are; both come back whole and in part', async () => {
  for (const [size, isFile] of [
    [0, false],
    [1, false],
    [SMALL, false],
    [SMALL + 1, true],
  ] as const) {
    const before = await files();
    const bytes = randomBytes(size);
    const id = await client.upload(bytes, { name: `of-${size}` });
    expect([size, (await files()) > before]).toEqual([size, isFile]);
    expect((await read(id)).equals(bytes)).toBe(true);
    if (size > 1) {
      expect((await read(id, { start: 1, end: size - 2 })).equals(bytes.subarray(1, -1))).toBe(true);
    }
    for await (const part of client.storage.download({ domainId: domain, ids: [id] })) {
      expect((await readAll(part.body)).equals(bytes)).toBe(true);
    }
  }
  const { size, digest } = await client.storage.openRaw(
    domain,
    (await client.storage.find(domain, { name: 'of-1' }))[0]!.id,
  );
  expect([size, digest]).toEqual([1, expect.stringMatching(/^sha256:/)]);
});

test('they outlive the process, and are gone with the last item that names them', async () => {
  const bytes = Buffer.from('the same twice');
  const one = await client.upload(bytes, { name: 'one' });
  const two = await client.upload(bytes, { name: 'two' });
  expect(await kept()).toBe(1);
  expect((await read(one)).equals(bytes)).toBe(true);
  await client.storage.put(domain, { existingId: one }, Buffer.from('another'));
  expect(await kept()).toBe(2);
  expect((await read(two)).equals(bytes)).toBe(true);
  await client.storage.delete(domain, two);
  expect(await kept()).toBe(1);
  expect((await read(one)).toString()).toBe('another');
  // Replaced by what is not small.
  await client.storage.put(domain, { existingId: one }, randomBytes(SMALL + 1));
  expect(await kept()).toBe(0);
  // And by its own bytes.
  await client.storage.put(domain, { existingId: one }, bytes);
  await client.storage.put(domain, { existingId: one }, bytes);
  expect(await kept()).toBe(1);
  expect((await read(one)).equals(bytes)).toBe(true);
});

test('what a task made goes with it when its job is removed with its artifacts', async () => {
  const bytes = Buffer.from('of a task');
  const secretHash = 'a'.repeat(64);
  const { id } = await store.createNode({ name: 'n', mode: 'public', organizationId: 'o', secretHash });
  await store.registerNode({
    nodeId: id,
    secretHash,
    wallet: `0x${'1'.repeat(40)}`,
    capabilities: ['/t/v1'],
    labels: {},
    version: '1.0.0',
    maxConcurrency: 1,
  });
  const jobId = await client.submit({ tasks: [{ capability: '/t/v1' }] });
  const [outcome] = await store.lease([{ nodeId: id, max: 1, capabilities: null, start: true }]);
  if (outcome?.ok !== true) throw new Error('no lease');
  const [granted] = outcome.value.leases;
  const lease = { taskId: granted!.task.id, nodeId: id, leaseId: granted!.leaseId };
  const [item] = await store.putData([
    {
      domainId: domain,
      id: null,
      name: 'made',
      dataType: 't',
      digest: `sha256:${createHash('sha256').update(bytes).digest('hex')}`,
      size: bytes.length,
      bytes,
      lease,
      replaceByName: false,
    },
  ]);
  await store.complete([{ ...lease, outputCids: [item!.id], meta: {} }]);
  expect((await client.job(jobId)).job.status).toBe('completed');
  expect(await kept()).toBe(1);
  expect(await store.pruneJobs({ endedForMs: 0, artifacts: true, cursor: null })).toMatchObject({ items: 1 });
  expect(await kept()).toBe(0);
});

test('a flipped bit is told, never served, and healed by the same bytes', async () => {
  const bytes = randomBytes(1000);
  const id = await client.upload(bytes, { name: 'flipped' });
  await inDatabase((database) => {
    const damaged = Buffer.from(bytes);
    damaged[500]! ^= 1;
    database.prepare('UPDATE small_bytes SET bytes = ?').run(damaged);
  });
  const refused = { code: 'data_loss', message: expect.stringContaining('missing or damaged') as string };
  await expect(read(id)).rejects.toMatchObject(refused);
  await expect(read(id, { start: 0, end: 0 })).rejects.toMatchObject(refused);
  const parts = client.storage.download({ domainId: domain, ids: [id] })[Symbol.asyncIterator]();
  await expect(parts.next()).rejects.toMatchObject(refused);
  await client.upload(bytes, { name: 'again' });
  expect((await read(id)).equals(bytes)).toBe(true);
});

test('many go up in a few requests and come down in one, in order', async () => {
  const items = itemsOf(600, 4096);
  const ids = await client.uploadItems(items);
  expect(new Set(ids).size).toBe(600);
  expect(await files()).toBe(0);
  const received: Buffer[] = [];
  for await (const part of client.storage.download({ domainId: domain, ids })) {
    received.push(await readAll(part.body));
  }
  // More than what is held of an answer at once, too.
  expect(600 * 4096).toBeGreaterThan(HELD);
  expect(received.every((bytes, index) => bytes.equals(items[index]!.bytes))).toBe(true);
  expect(received).toHaveLength(600);
});

test('when the answer to a request of many is lost, they are there once', async () => {
  await using origin = new HttpOrigin({ baseUrl: dispatcher.url });
  let posts = 0;
  const proxy = createServer((request, response) => {
    void (async () => {
      const answer = await origin.request({
        method: request.method as 'GET',
        path: request.url!,
        headers: Object.fromEntries(
          ['authorization', 'content-type', 'accept'].flatMap((name) => {
            const value = request.headers[name];
            return typeof value === 'string' ? [[name, value]] : [];
          }),
        ),
        ...(request.method === 'POST' && { body: await readAll(request) }),
      });
      const bytes = await answer.bytes();
      if (request.method === 'POST' && ++posts === 1) response.destroy();
      else response.writeHead(answer.status).end(bytes);
    })();
  });
  await new Promise<void>((resolve) => void proxy.listen(0, '127.0.0.1', resolve));
  const { port } = proxy.address() as AddressInfo;
  const token = await dispatcher.issueClientToken();
  await using through = connect({ url: `http://127.0.0.1:${port}`, token });
  try {
    const items = itemsOf(3, 10);
    const ids = await through.uploadItems(items);
    expect(posts).toBe(1);
    for (const [index, id] of ids.entries()) {
      expect((await read(id)).equals(items[index]!.bytes)).toBe(true);
    }
  } finally {
    proxy.closeAllConnections();
    await new Promise((resolve) => proxy.close(resolve));
  }
});

test('large and small ones mix', async () => {
  const items = [3, 100_000, 1_500_000, 9_000_000, 0, 5].map((size, index) => ({
    name: `mixed-${index}`,
    dataType: 'test',
    bytes: randomBytes(size),
  }));
  const ids = await client.uploadItems(items);
  for (const [index, id] of ids.entries()) {
    expect((await read(id)).equals(items[index]!.bytes)).toBe(true);
  }
  expect(await client.uploadItems([])).toEqual([]);
});

test('of a request for which there is no more room, the rest is written to files', async () => {
  const items = itemsOf(HELD / SMALL + 1, SMALL);
  await client.storage.putNew(domain, items);
  expect(await files()).toBe(1);
});

test('of a request with one name that is taken, nothing is kept', async () => {
  await client.upload(Buffer.from('x'), { name: 'item-2' });
  await expect(client.storage.putNew(domain, itemsOf(4, 10))).rejects.toMatchObject({
    details: { status: 409 },
  });
  expect(await client.storage.find(domain, { dataType: 'test' })).toEqual([]);
  expect(await kept()).toBe(1);
});

test('a full database refuses them with a reason, and takes them again when there is room', async () => {
  await close();
  await open(400 * 1024);
  const items = itemsOf(20, SMALL - 1);
  let stored = 0;
  const error = await (async () => {
    for (const { name, bytes } of items) {
      await client.storage.put(domain, { name, dataType: 'test' }, bytes);
      stored += 1;
    }
    return null;
  })().catch((thrown: unknown) => thrown);
  expect(error).toMatchObject({
    code: 'resource_exhausted',
    message: expect.stringContaining('is full') as string,
  });
  expect(await client.storage.find(domain, { dataType: 'test' })).toHaveLength(stored);
  await close();
  await open();
  await client.storage.put(domain, { name: 'more', dataType: 'test' }, items[0]!.bytes);
  expect(await kept()).toBe(stored + (stored === 0 ? 1 : 0));
});
