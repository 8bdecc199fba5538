import { randomBytes, randomUUID } from 'node:crypto';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import { existsSync, truncateSync } from 'node:fs';
import { mkdir, mkdtemp, readFile, readdir, rm, writeFile } from 'node:fs/promises';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join, relative } from 'node:path';
import { Readable } from 'node:stream';
import { openDispatcher, openFileBlobs, openSqliteStore, type Dispatcher } from '@millrace/dispatch';
import { openDomainStorage, type DataItem, type DomainStorage } from '@millrace/dispatch/client';
import {
  MillraceError,
  TaskAbort,
  parseLease,
  systemClock,
  type Logger,
  type MultipartUpload,
} from '@millrace/runner';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { SessionStorage, StorageRequest } from '../session.ts';
import { openStoragePorts, type RetrySettings, type StorageLimits } from './ports.ts';

const PART = 64 * 1024;
const TASK = 'aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee';

const silent: Logger = { debug() {}, info() {}, warn() {}, error() {}, child: () => silent };

interface Opening {
  readonly serverUrl: string | (() => string);
  readonly domainId?: string | (() => string);
  readonly token?: () => string;
  readonly refreshToken?: () => Promise<void>;
  readonly prefix?: string | null;
  readonly limits?: Partial<StorageLimits>;
  readonly retry?: Partial<RetrySettings>;
  readonly signal?: AbortSignal;
  readonly random?: () => number;
  readonly trace?: StorageRequest['trace'];
}

/** Ports of a task whose folder is `dir/task`. */
function openPorts(dir: string, opening: Opening): SessionStorage {
  const value = (of: string | (() => string)): string => (typeof of === 'string' ? of : of());
  const path = join(dir, 'task');
  const domainId = opening.domainId ?? '9c0c1111-2222-4333-8444-555566667777';
  return openStoragePorts({
    lease: parseLease({
      domain_id: value(domainId),
      domain_server_url: value(opening.serverUrl),
      task: { id: TASK, capability: '/test/v1', outputs_prefix: opening.prefix ?? null },
    }),
    leaseId: null,
    domain: () => ({ id: value(domainId), serverUrl: value(opening.serverUrl) }),
    token: opening.token ?? (() => 'token'),
    refreshToken: opening.refreshToken ?? (() => Promise.reject(new Error('no refresh expected'))),
    folder: {
      path,
      create: async () => {
        await mkdir(path, { recursive: true });
        return path;
      },
      remove: () => rm(path, { recursive: true, force: true }),
    },
    signal: opening.signal ?? new AbortController().signal,
    log: silent,
    clientId: 'test-client',
    clock: systemClock,
    random: opening.random ?? (() => 0),
    ...(opening.trace !== undefined && { trace: opening.trace }),
    retry: { baseMs: 1, capMs: 5, ...opening.retry },
    ...(opening.limits === undefined ? {} : { limits: opening.limits }),
  });
}

describe('storage ports over a real dispatcher', () => {
  let dir: string;
  let place: string;
  let dispatcher: Dispatcher;
  let storage: DomainStorage & AsyncDisposable;
  let token: string;
  /** Each test has a domain of its own. */
  let domain: string;
  let opened: SessionStorage[];
  let closeAll: () => Promise<void>;

  beforeAll(async () => {
    place = await mkdtemp(join(tmpdir(), 'millrace-ports-'));
    const store = await openSqliteStore({ path: join(place, 'store.db') });
    const blobs = await openFileBlobs({ dir: join(place, 'blobs') });
    const limits = { partBytes: PART, uploadRequestBytes: 9_000_000 };
    dispatcher = await openDispatcher({ store, blobs, port: 0, limits });
    token = await dispatcher.issueClientToken();
    storage = openDomainStorage({ baseUrl: dispatcher.url, token: () => token, clientId: 'c' });
    closeAll = async () => {
      await storage[Symbol.asyncDispose]();
      await dispatcher.close();
      await blobs[Symbol.asyncDispose]();
      await store[Symbol.asyncDispose]();
      await rm(place, { recursive: true, force: true });
    };
  });
  afterAll(() => closeAll());
  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), 'millrace-ports-'));
    domain = randomUUID();
    opened = [];
  });
  afterEach(async () => {
    await Promise.all(opened.map((one) => one.close()));
    await rm(dir, { recursive: true, force: true });
    expect(await stagedUploads()).toEqual([]);
  });

  function open(opening: Partial<Opening> = {}): SessionStorage {
    const ports = openPorts(dir, {
      serverUrl: dispatcher.url,
      domainId: domain,
      token: () => token,
      ...opening,
    });
    opened.push(ports);
    return ports;
  }

  /** None, once the server has got over requests that were broken off. */
  async function stagedUploads(): Promise<string[]> {
    const deadline = performance.now() + 10_000;
    for (;;) {
      const staged = await readdir(join(place, 'blobs', 'uploads'));
      if (staged.length === 0 || performance.now() > deadline) return staged;
      await new Promise((resolve) => void setTimeout(resolve, 10));
    }
  }

  const put = async (name: string, bytes: Uint8Array): Promise<DataItem> =>
    (await storage.put(domain, { name, dataType: 'test_data' }, bytes))!;

  const stored = async (id: string | null): Promise<Buffer> =>
    readAll((await storage.openRaw(domain, id!)).body);

  test('bytes are counted in both directions, whichever way they go, and calls are spans', async () => {
    const spans: string[] = [];
    const ports = open({
      trace: (name) => ({
        traceparent: null,
        end: ({ error = 'fine' } = {}) => void spans.push(`${name}: ${error}`),
      }),
    });
    const { input, output } = ports;
    const transferred = (): unknown => ports.transferred?.();
    expect(transferred()).toEqual({ bytesIn: 0, bytesOut: 0 });
    const item = await put('a', Buffer.alloc(1_000));
    await input.getBytesByCid(item.id);
    await input.materializeCidToTemp(item.id);
    expect((await readAll(await input.openRead(item.id))).length).toBe(1_000);
    expect(transferred()).toEqual({ bytesIn: 3_000, bytesOut: 0 });
    const file = join(dir, 'file');
    await writeFile(file, Buffer.alloc(PART + 1));
    await output.putBytes('bytes', Buffer.alloc(10));
    await output.putFile('file', file);
    await output.putStream('stream', Readable.from([Buffer.alloc(5 * PART)]));
    const upload = await output.openMultipart('parts');
    await upload.writeChunk(Buffer.alloc(100));
    await upload.finish();
    expect(transferred()).toEqual({ bytesIn: 3_000, bytesOut: 10 + PART + 1 + 5 * PART + 100 });
    await expect(input.getBytesByCid(randomUUID())).rejects.toThrow('not found');
    await ports.close();
    // A read ends when its stream has closed, which may be after the next call began.
    expect(spans.toSorted()).toEqual([
      'storage getBytesByCid: fine',
      expect.stringMatching(/^storage getBytesByCid: not found \(404\)/),
      'storage materializeCidWithMeta: fine',
      'storage openMultipart: fine',
      'storage openRead: fine',
      'storage putBytes: fine',
      'storage putFile: fine',
      'storage putStream: fine',
    ]);
  });

  test('an input comes as bytes, as a file with its metadata, and as a stream, by id or by URL', async () => {
    const { input } = open();
    const bytes = randomBytes(200_000);
    const item = await put('scan_2024-01-02_03-04-05', bytes);
    for (const cid of [
      item.id,
      ` ${item.id} `,
      `/api/v1/domains/${domain}/data/${item.id}`,
      `${dispatcher.url}/api/v1/domains/${domain}/data?name=${item.name}`,
    ]) {
      expect(Buffer.from(await input.getBytesByCid(cid)).equals(bytes)).toBe(true);
      expect((await readAll(await input.openRead(cid))).equals(bytes)).toBe(true);
    }
    const file = await input.materializeCidWithMeta(item.id);
    expect(file).toEqual({
      cid: item.id,
      path: join(file.root_dir, 'datasets/2024-01-02_03-04-05/scan_2024-01-02_03-04-05.test_data'),
      data_id: item.id,
      name: item.name,
      data_type: 'test_data',
      domain_id: domain,
      root_dir: expect.stringMatching(/^.*\/task\/domain-input-\d+$/),
      related_files: [],
      extracted_paths: [],
    });
    expect((await readFile(file.path)).equals(bytes)).toBe(true);
    const again = await input.materializeCidToTemp(item.id);
    expect(again).not.toBe(file.path);
    expect((await readFile(again)).equals(bytes)).toBe(true);
  });

  test('a CID of several ids is one download: the first is primary, and equal names do not overwrite each other', async () => {
    const { input } = open();
    const items = [
      await put('a b', Buffer.from('1')),
      await put('a_b', Buffer.from('22')),
      await put('other', Buffer.alloc(0)),
    ];
    const cid = `/api/v1/domains/${domain}/data?ids=${items.map((item) => item.id).join(',')}`;
    const file = await input.materializeCidWithMeta(cid);
    expect([file.path, ...file.related_files].map((path) => relative(file.root_dir, path))).toEqual([
      'datasets/a_b/a_b.test_data',
      'datasets/a_b/a_b-2.test_data',
      'datasets/other/other.test_data',
    ]);
    expect(await readFile(file.path, 'utf8')).toBe('1');
    expect(await readFile(file.related_files[0]!, 'utf8')).toBe('22');
    expect(Buffer.from(await input.getBytesByCid(cid)).toString()).toBe('1');
    expect((await readAll(await input.openRead(cid))).toString()).toBe('1');
  });

  test('what is not there is not_found, and leaves no folder', async () => {
    const { input } = open();
    for (const method of ['getBytesByCid', 'materializeCidToTemp', 'openRead'] as const) {
      expect(await failure(input[method](randomUUID()))).toMatchObject({
        code: 'not_found',
        message: expect.stringMatching(/^not found \(404\)/) as string,
      });
    }
    expect(await failure(input.getBytesByCid('https://elsewhere.example/x'))).toMatchObject({
      code: 'permission_denied',
    });
    expect(await readdir(join(dir, 'task'))).toEqual([]);
  });

  test('bytes in memory are bounded, streams are not', async () => {
    const { input } = open({ limits: { maxBytesInMemory: 1000 } });
    const fits = await put('fits', randomBytes(1000));
    const large = await put('large', randomBytes(1001));
    expect(await input.getBytesByCid(fits.id)).toHaveLength(1000);
    expect(await failure(input.getBytesByCid(large.id))).toMatchObject({
      code: 'resource_exhausted',
      message: expect.stringMatching(/1001 bytes, at most 1000 .*maxBytesInMemory/) as string,
    });
    expect(await readAll(await input.openRead(large.id))).toHaveLength(1001);
  });

  test('artifacts of every kind and size arrive under their names and are recorded once', async () => {
    const ports = open({ prefix: '/out/' });
    const { output } = ports;
    for (const size of [0, 1, PART - 1, PART, PART + 1, 300_000, 1_000_000]) {
      const bytes = randomBytes(size);
      const path = join(dir, `file-${size}`);
      await writeFile(path, bytes);
      await output.putBytes(`bytes-${size}.json`, bytes);
      await output.putFile(`file-${size}.zip`, path);
      await output.putStream(`stream-${size}`, cutUp(bytes, 10_007));
      const upload = await output.openMultipart(`multi-${size}.csv`);
      for await (const chunk of cutUp(bytes, 100_003)) await upload.writeChunk(chunk);
      await upload.finish();
      const records = ports.artifacts().slice(-4);
      expect(records.map(({ logical_path, name, data_type }) => ({ logical_path, name, data_type }))).toEqual(
        [
          {
            logical_path: `out/bytes-${size}.json`,
            name: `out_bytes-${size}_json_${TASK}`,
            data_type: 'json',
          },
          {
            logical_path: `out/file-${size}.zip`,
            name: `out_file-${size}_zip_${TASK}`,
            data_type: 'zip_data',
          },
          { logical_path: `out/stream-${size}`, name: `out_stream-${size}_${TASK}`, data_type: 'binary' },
          { logical_path: `out/multi-${size}.csv`, name: `out_multi-${size}_csv_${TASK}`, data_type: 'csv' },
        ],
      );
      for (const { id, name, data_type } of records) {
        expect(await storage.get(domain, id!)).toMatchObject({ name, data_type, size });
        expect((await stored(id)).equals(bytes)).toBe(true);
      }
    }
    expect(await stagedUploads()).toEqual([]);
  });

  test('uploading twice to a path replaces the item, in this attempt and in the next', async () => {
    const first = open();
    await first.output.putBytes('a.bin', Buffer.from('1'));
    const [before] = first.artifacts();
    await first.output.putBytes('a.bin', Buffer.from('2'));
    expect(first.artifacts()).toEqual([before]);
    const second = open();
    await second.output.putStream('a.bin', cutUp(randomBytes(300_000), 1000));
    expect(second.artifacts()).toEqual([before]);
    expect(await stored(before!.id)).toHaveLength(300_000);
    await Promise.all(['x', 'y', 'z'].map((text) => second.output.putBytes('a.bin', Buffer.from(text))));
    expect((await stored(before!.id)).toString()).toBe('z');
  });

  test('a path that could not be saved is refused by every way to upload, and nothing arrives', async () => {
    const { output, ...ports } = open();
    const bytes = Buffer.from('x');
    const file = join(dir, 'x');
    await writeFile(file, bytes);
    for (const path of ['', '/', '../x', 'a/./b', 'a\0b', 'x'.repeat(1025)]) {
      const attempts = [
        () => output.putBytes(path, bytes),
        () => output.putFile(path, file),
        () => output.putStream(path, ReadableStream.from([bytes])),
        () => output.openMultipart(path),
        () => output.putDomainArtifact({ rel_path: path, name: 'n', data_type: 't', content: { bytes } }),
      ];
      for (const attempt of attempts) {
        await expect(attempt()).rejects.toMatchObject({
          code: 'invalid_argument',
          message: expect.stringContaining(`artifact path ${JSON.stringify(path)} must`),
        });
      }
    }
    expect(ports.artifacts()).toEqual([]);
    expect(await storage.find(domain, {})).toEqual([]);
  });

  test('the prefix alone is a path', async () => {
    const ports = open({ prefix: 'out' });
    await ports.output.putBytes('', Buffer.from('x'));
    expect(ports.artifacts()).toMatchObject([{ logical_path: 'out', data_type: 'binary' }]);
  });

  test('paths that sanitise to one name are two items', async () => {
    const ports = open();
    await ports.output.putBytes('a/b', Buffer.from('1'));
    await ports.output.putBytes('a_b', Buffer.from('2'));
    await ports.output.putBytes('a/b', Buffer.from('3'));
    const [one, two] = ports.artifacts();
    expect(one!.id).not.toBe(two!.id);
    expect([(await stored(one!.id)).toString(), (await stored(two!.id)).toString()]).toEqual(['3', '2']);
  });

  test('a domain artifact keeps the caller’s name and type, and replaces what it is told to', async () => {
    const ports = open({ prefix: 'out' });
    const file = join(dir, 'f');
    await writeFile(file, 'from a file');
    const content = { bytes: Buffer.from('one') };
    const id = await ports.output.putDomainArtifact({
      rel_path: 'x',
      name: 'My name.v1',
      data_type: 'my_type',
      content,
    });
    expect(await storage.get(domain, id!)).toMatchObject({
      name: 'My name.v1',
      data_type: 'my_type',
      size: 3,
    });
    expect(ports.artifacts()).toEqual([
      { logical_path: 'out/x', name: 'My name.v1', data_type: 'my_type', id },
    ]);
    const other = await put('elsewhere', Buffer.from('old'));
    for (const replacement of [
      { bytes: Buffer.from('new') },
      { file },
      { stream: cutUp(randomBytes(300_000), 1000) },
    ]) {
      const replaced = await ports.output.putDomainArtifact({
        rel_path: 'x',
        name: 'elsewhere',
        data_type: 'test_data',
        existing_id: other.id,
        content: replacement,
      });
      expect(replaced).toBe(other.id);
    }
    // Another name at the same path is another item, and the record is of the last one.
    expect(ports.artifacts()).toEqual([
      { logical_path: 'out/x', name: 'elsewhere', data_type: 'test_data', id: other.id },
    ]);
    expect((await stored(id)).toString()).toBe('one');
    for (const [name, data_type] of [
      ['', 't'],
      ['n', 't'.repeat(129)],
      ['a/b', 't'],
    ] as const) {
      expect(
        await failure(ports.output.putDomainArtifact({ rel_path: 'x', name, data_type, content })),
      ).toMatchObject({
        code: 'invalid_argument',
      });
    }
    const taken = await failure(
      ports.output.putDomainArtifact({ rel_path: 'y', name: 'elsewhere', data_type: 'other', content }),
    );
    expect(taken).toMatchObject({
      code: 'already_exists',
      message: expect.stringContaining(other.id) as string,
    });
  });

  test('bytes beyond what one request may have go in parts', async () => {
    const ports = open();
    const bytes = randomBytes(9_100_000);
    await ports.output.putBytes('large', bytes);
    expect((await stored(ports.artifacts()[0]!.id)).equals(bytes)).toBe(true);
  });

  test('a file that is missing, a folder, or gets shorter while it is read, is the runner’s mistake', async () => {
    const ports = open();
    expect(await failure(ports.output.putFile('a', join(dir, 'missing')))).toMatchObject({
      code: 'invalid_argument',
      message: expect.stringContaining('missing') as string,
    });
    expect(await failure(ports.output.putFile('a', dir))).toMatchObject({ code: 'invalid_argument' });
    const shrinking = join(dir, 'shrinking');
    await writeFile(shrinking, randomBytes(10 * PART));
    // The token is asked for when the file has been looked at and nothing has been sent.
    const late = open({
      token: () => {
        truncateSync(shrinking, 10);
        return token;
      },
    });
    expect(await failure(late.output.putFile('b', shrinking))).toMatchObject({
      code: 'invalid_argument',
      message: expect.stringMatching(/part \d: 65536 bytes were announced, the stream gave (10|0)/) as string,
    });
    expect(ports.artifacts()).toEqual([]);
    expect(await stagedUploads()).toEqual([]);
  });

  test('a stream that fails is aborted, and its error is the runner’s', async () => {
    const ports = open();
    async function* failing(): AsyncGenerator<Uint8Array> {
      yield randomBytes(400_000);
      throw new Error('the camera is gone');
    }
    expect(await failure(ports.output.putStream('a', failing()))).toMatchObject({
      message: 'the camera is gone',
    });
    expect(ports.artifacts()).toEqual([]);
    expect(await stagedUploads()).toEqual([]);
  });

  test('a multipart upload is ended once: by finish, by abort, or by the end of the task', async () => {
    const ports = open();
    const begin = async (name: string): Promise<MultipartUpload> => {
      const upload = await ports.output.openMultipart(name);
      await upload.writeChunk(randomBytes(400_000));
      return upload;
    };
    const finished = await begin('finished');
    await finished.finish();
    expect(await failure(finished.writeChunk(Buffer.from('x')))).toMatchObject({
      code: 'failed_precondition',
    });
    expect(await failure(finished.finish())).toMatchObject({ code: 'failed_precondition' });
    await finished.abort();
    const aborted = await begin('aborted');
    await aborted.abort();
    await aborted.abort();
    expect(await failure(aborted.finish())).toMatchObject({ code: 'failed_precondition' });
    expect(await stagedUploads()).toEqual([]);
    const left = await begin('left');
    await ports.close();
    await ports.close();
    expect(await failure(left.writeChunk(Buffer.from('x')))).toMatchObject({ code: 'failed_precondition' });
    expect(await stagedUploads()).toEqual([]);
    expect(ports.artifacts().map((artifact) => artifact.logical_path)).toEqual(['finished']);
  });

  test('a chunk may be reused as soon as it was taken', async () => {
    const ports = open();
    const upload = await ports.output.openMultipart('reused');
    const chunk = Buffer.alloc(50_000);
    for (let index = 0; index < 20; index += 1) {
      chunk.fill(index);
      await upload.writeChunk(chunk);
    }
    chunk.fill(255);
    await upload.finish();
    const bytes = await stored(ports.artifacts()[0]!.id);
    expect(bytes).toHaveLength(1_000_000);
    for (let index = 0; index < 20; index += 1) expect(bytes[index * 50_000 + 49_999]).toBe(index);
  });

  test('after the end of the task nothing can be called, and streams are ended', async () => {
    const ports = open();
    const item = await put('in', randomBytes(8_000_000));
    const stream = await ports.input.openRead(item.id);
    const reading = failure(readAll(stream, () => ports.close()));
    expect(await reading).toMatchObject({ code: 'failed_precondition' });
    for (const call of [
      () => ports.input.getBytesByCid(item.id),
      () => ports.input.openRead(item.id),
      () => ports.input.materializeCidToTemp(item.id),
      () => ports.output.putBytes('a', Buffer.alloc(1)),
      () => ports.output.openMultipart('a'),
    ]) {
      expect(await failure(call())).toMatchObject({ code: 'failed_precondition' });
    }
  });

  test('streams that are left early or never read do not keep the ports from closing', async () => {
    const ports = open();
    const item = await put('in', randomBytes(8_000_000));
    for await (const chunk of await ports.input.openRead(item.id)) {
      expect((chunk as Buffer).length).toBeGreaterThan(0);
      break;
    }
    (await ports.input.openRead(item.id)).destroy();
    await ports.input.openRead(item.id);
    await ports.close();
  });

  test('an abort of the task ends transfers under way with its reason', async () => {
    const controller = new AbortController();
    const ports = open({ signal: controller.signal });
    const item = await put('in', randomBytes(8_000_000));
    const stream = await ports.input.openRead(item.id);
    async function* stuck(): AsyncGenerator<Uint8Array> {
      yield randomBytes(400_000);
      await new Promise(() => {});
    }
    const calls = [
      failure(readAll(stream, () => controller.abort(new TaskAbort('canceled')))),
      failure(ports.output.putStream('a', stuck())),
    ];
    for (const error of await Promise.all(calls)) expect(error).toMatchObject({ reason: 'canceled' });
    expect(await failure(ports.input.getBytesByCid(item.id))).toMatchObject({ reason: 'canceled' });
    await ports.close();
    expect(await stagedUploads()).toEqual([]);
  });

  test('a caller’s own signal ends its read only', async () => {
    const ports = open();
    const item = await put('in', randomBytes(8_000_000));
    const controller = new AbortController();
    const stream = await ports.input.openRead(item.id, { signal: controller.signal });
    expect(await failure(readAll(stream, () => controller.abort(new Error('enough'))))).toMatchObject({
      message: 'enough',
    });
    expect(await failure(ports.input.getBytesByCid(item.id, { signal: controller.signal }))).toMatchObject({
      message: 'enough',
    });
    expect(await ports.input.getBytesByCid(item.id)).toHaveLength(8_000_000);
  });

  test('a domain that moves is followed', async () => {
    const item = await put('in', Buffer.from('x'));
    const moved: { serverUrl: string; domainId: string } = {
      serverUrl: 'http://127.0.0.1:1',
      domainId: randomUUID(),
    };
    const ports = open({
      serverUrl: () => moved.serverUrl,
      domainId: () => moved.domainId,
      retry: { retryForMs: 0 },
    });
    expect(await failure(ports.input.getBytesByCid(item.id))).toMatchObject({ code: 'unavailable' });
    moved.serverUrl = dispatcher.url;
    moved.domainId = domain;
    expect(Buffer.from(await ports.input.getBytesByCid(item.id)).toString()).toBe('x');
  });
});

interface Call {
  readonly method: string;
  readonly url: string;
  readonly authorization: string | undefined;
  readonly clientId: string | undefined;
  readonly body: Buffer;
}

describe('storage ports over servers of other kinds', () => {
  let dir: string;
  let server: Server;
  let serverUrl: string;
  let calls: Call[];
  let respond: (response: ServerResponse, call: Call) => void;
  let ports: SessionStorage[];

  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), 'millrace-ports-'));
    calls = [];
    ports = [];
    server = createServer((request: IncomingMessage, response) => {
      const chunks: Buffer[] = [];
      request.on('data', (chunk: Buffer) => chunks.push(chunk));
      request.on('end', () => {
        const call: Call = {
          method: request.method ?? '',
          url: (request.url ?? '').replace(
            '/api/v1/domains/9c0c1111-2222-4333-8444-555566667777/data',
            'DATA',
          ),
          authorization: request.headers.authorization,
          clientId: request.headers['posemesh-client-id'] as string | undefined,
          body: Buffer.concat(chunks),
        };
        calls.push(call);
        respond(response, call);
      });
    });
    await new Promise<void>((resolve) => void server.listen(0, '127.0.0.1', resolve));
    serverUrl = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  });
  afterEach(async () => {
    await Promise.all(ports.map((one) => one.close()));
    server.closeAllConnections();
    await new Promise<void>((resolve) => void server.close(() => resolve()));
    await rm(dir, { recursive: true, force: true });
  });

  function open(opening: Partial<Opening> = {}): SessionStorage {
    const opened = openPorts(dir, { serverUrl, ...opening });
    ports.push(opened);
    return opened;
  }

  const item = (name: string, data_type: string, id = 'id-1'): string =>
    JSON.stringify({
      data: [{ id, domain_id: 'd', name, data_type, size: 1, created_at: '', updated_at: '' }],
    });

  const headOf = (size: number, name = 'n'): string =>
    `--b\r\nContent-Disposition: form-data; name="${name}"; data-type="t"; id="i"; domain-id="d"; size="${size}"\r\n\r\n`;

  /** Sends the parts, or as much of the body as `cutAt` allows, then breaks the connection. */
  function send(response: ServerResponse, parts: readonly Uint8Array[], cutAt = Infinity): void {
    const body = Buffer.concat([
      ...parts.flatMap((bytes) => [Buffer.from(headOf(bytes.length)), bytes, Buffer.from('\r\n')]),
      Buffer.from('--b--\r\n'),
    ]);
    response.writeHead(200, {
      'content-type': 'multipart/form-data; boundary=b',
      'content-length': body.length,
    });
    if (cutAt >= body.length) response.end(body);
    else response.write(body.subarray(0, cutAt), () => response.destroy());
  }

  test('a download that breaks is begun again, and a stream goes on where it was', async () => {
    const bytes = randomBytes(400_000);
    for (const method of ['getBytesByCid', 'openRead', 'materializeCidToTemp'] as const) {
      const cuts = [200_000, 50, 300_000, 350_000];
      respond = (response) => send(response, [bytes], cuts.shift());
      const { input } = open();
      const result = await input[method]('i');
      const got =
        typeof result === 'string'
          ? await readFile(result)
          : result instanceof Uint8Array
            ? Buffer.from(result)
            : await readAll(result);
      expect(got.equals(bytes)).toBe(true);
      expect(cuts).toEqual([]);
    }
  });

  test('a stream whose input was replaced between two downloads fails instead of mixing them', async () => {
    const answers = [randomBytes(400_000), randomBytes(400_000)];
    let first = true;
    respond = (response) => {
      send(response, [answers[first ? 0 : 1]!], first ? 200_000 : Infinity);
      first = false;
    };
    const stream = await open().input.openRead('i');
    expect(await failure(readAll(stream))).toMatchObject({
      code: 'data_loss',
      message: expect.stringContaining('replaced by other bytes') as string,
    });
  });

  test('503 and 429 are waited for, other refusals are final', async () => {
    const statuses = [503, 429, 500];
    respond = (response) => {
      const status = statuses.shift();
      if (status === undefined) send(response, [Buffer.from('x')]);
      else response.writeHead(status).end('wait');
    };
    expect(Buffer.from(await open().input.getBytesByCid('i')).toString()).toBe('x');
    expect(calls).toHaveLength(4);
    for (const status of [400, 403, 404, 409]) {
      calls = [];
      respond = (response) => void response.writeHead(status).end('no');
      expect(await failure(open().input.getBytesByCid('i'))).toMatchObject({ details: { status } });
      expect(calls).toHaveLength(1);
    }
  });

  test('failures end after the time they are given', async () => {
    respond = (response) => void response.writeHead(503).end('down');
    const started = performance.now();
    expect(await failure(open({ retry: { retryForMs: 100 } }).input.getBytesByCid('i'))).toMatchObject({
      code: 'unavailable',
      message: 'server error (503): down',
    });
    expect(performance.now() - started).toBeLessThan(5_000);
    expect(calls.length).toBeGreaterThan(3);
  });

  test('a refused token is renewed once; one that was rotated meanwhile is just used', async () => {
    let token = 'old';
    let refreshed = 0;
    respond = (response, call) => {
      if (call.authorization === 'Bearer good') send(response, [Buffer.from('x')]);
      else response.writeHead(401).end();
    };
    const refreshing = open({
      token: () => token,
      refreshToken: async () => {
        refreshed += 1;
        token = 'good';
      },
    });
    expect(await refreshing.input.getBytesByCid('i')).toHaveLength(1);
    expect([refreshed, calls.length]).toEqual([1, 2]);

    token = 'old';
    respond = (response, call) => {
      if (call.authorization === 'Bearer good') send(response, [Buffer.from('x')]);
      else {
        token = 'good';
        response.writeHead(401).end();
      }
    };
    expect(await open({ token: () => token }).input.getBytesByCid('i')).toHaveLength(1);

    calls = [];
    respond = (response) => void response.writeHead(401).end();
    const refused = open({ refreshToken: () => Promise.resolve() });
    expect(await failure(refused.input.getBytesByCid('i'))).toMatchObject({
      code: 'unauthenticated',
      message: 'unauthorized (401)',
    });
    expect(calls).toHaveLength(2);

    const lost = open({
      refreshToken: () => Promise.reject(new MillraceError('aborted', 'the lease is gone')),
    });
    expect(await failure(lost.input.getBytesByCid('i'))).toMatchObject({ code: 'aborted' });
  });

  test('a server that never answers is left when the task ends', async () => {
    const asked = new Promise<void>((resolve) => {
      respond = () => resolve();
    });
    const controller = new AbortController();
    const reading = failure(open({ signal: controller.signal }).input.getBytesByCid('i'));
    await asked;
    controller.abort(new TaskAbort('shutdown'));
    expect(await reading).toMatchObject({ reason: 'shutdown' });
  });

  test('two parts of one name and type become two files', async () => {
    respond = (response) => send(response, [Buffer.from('1'), Buffer.from('2'), Buffer.from('3')]);
    const file = await open().input.materializeCidWithMeta('i');
    expect([file.path, ...file.related_files].map((path) => relative(file.root_dir, path))).toEqual([
      'datasets/n/n.t',
      'datasets/n/n-2.t',
      'datasets/n/n-3.t',
    ]);
    expect(await readFile(file.related_files[1]!, 'utf8')).toBe('3');
  });

  test('a malformed or cut download leaves no files behind', async () => {
    respond = (response) => {
      response.writeHead(200, { 'content-type': 'multipart/form-data; boundary=b' });
      response.end(`${headOf(3)}abc\r\n${headOf(100)}abc`);
    };
    const opened = open({ retry: { retryForMs: 0 } });
    expect(await failure(opened.input.materializeCidToTemp('i'))).toMatchObject({ code: 'data_loss' });
    expect(existsSync(join(dir, 'task', 'domain-input-1'))).toBe(false);
  });

  test('a server without chunked uploads and without info gets single uploads, empty files included', async () => {
    const uploads: Call[] = [];
    respond = (response, call) => {
      if (call.method === 'GET' && call.url.startsWith('DATA')) response.writeHead(404).end();
      else if (call.method === 'POST' && call.url === 'DATA') {
        uploads.push(call);
        response.end(item('n', 't', `id-${uploads.length}`));
      } else response.writeHead(404).end('route not found');
    };
    const opened = open();
    const bytes = randomBytes(500_000);
    await writeFile(join(dir, 'file'), bytes);
    await writeFile(join(dir, 'empty'), '');
    await opened.output.putFile('file', join(dir, 'file'));
    await opened.output.putFile('empty', join(dir, 'empty'));
    await opened.output.putStream('stream', cutUp(bytes, 9_999));
    await opened.output.putBytes('bytes', bytes);
    const multi = await opened.output.openMultipart('multi');
    for await (const chunk of cutUp(bytes, 70_000)) await multi.writeChunk(chunk);
    await multi.finish();
    expect(opened.artifacts().map(({ logical_path, id }) => [logical_path, id])).toEqual([
      ['file', 'id-1'],
      ['empty', 'id-2'],
      ['stream', 'id-3'],
      ['bytes', 'id-4'],
      ['multi', 'id-5'],
    ]);
    expect(uploads.map((call) => call.body.includes(bytes))).toEqual([true, false, true, true, true]);
    expect(calls.every((call) => call.clientId === 'test-client')).toBe(true);
  });

  test('what is too large for one request of such a server is refused with the limit', async () => {
    respond = (response, call) => {
      if (call.url === '/api/v1/info') {
        response.end('{"upload":{"request_max_bytes":300000,"multipart":{"enabled":false}}}');
      } else if (call.method === 'GET') response.end('{"data":[]}');
      else if (call.url === 'DATA') response.end(item('n', 't'));
      else response.writeHead(501).end();
    };
    const { output } = open();
    // Beyond the reference's lengths: both boundaries are longer.
    const boundaries = 2 * (30 - 'boundary'.length);
    const created = 300_000 - 125 - boundaries - `large1_${TASK}`.length - 'binary'.length;
    const updated = 300_000 - 109 - boundaries - 'the-id'.length;
    const content = { file: join(dir, 'large') };
    let uploads = 0;
    const another = (): string => `large${(uploads += 1)}`;
    const ways: readonly (readonly [limit: number, upload: (bytes: Uint8Array) => Promise<unknown>])[] = [
      [created, () => output.putFile(another(), content.file)],
      [created, (bytes) => output.putStream(another(), cutUp(bytes, 5_000))],
      [
        updated,
        () =>
          output.putDomainArtifact({
            rel_path: 'r',
            name: 'n',
            data_type: 't',
            existing_id: 'the-id',
            content,
          }),
      ],
    ];
    for (const [limit, upload] of ways) {
      for (const size of [limit, limit + 1]) {
        await writeFile(content.file, Buffer.alloc(size));
        const uploaded = upload(Buffer.alloc(size));
        if (size === limit) await uploaded;
        else {
          expect(await failure(uploaded)).toMatchObject({
            code: 'resource_exhausted',
            message: expect.stringContaining(`${size} bytes`) as string,
            details: { value: limit },
          });
        }
      }
    }
  });

  test('a chunked upload sends what the reference sends, and the lookup is by name', async () => {
    respond = (response, call) => {
      if (call.method === 'GET') response.end(item('other_name', 'zip_data'));
      else if (call.url === 'DATA/multipart?uploads') response.end('{"upload_id":"u1","part_size":200000}');
      else if (call.method === 'PUT') response.end(`{"etag":"e${call.body.length}"}`);
      else response.end('{"id":"done"}');
    };
    const opened = open({ prefix: 'p' });
    await writeFile(join(dir, 'f'), Buffer.alloc(450_000, 1));
    await opened.output.putFile('f.zip', join(dir, 'f'));
    const name = `p_f_zip_${TASK}`;
    expect(opened.artifacts()).toEqual([
      { logical_path: 'p/f.zip', name, data_type: 'zip_data', id: 'done' },
    ]);
    const puts = calls.filter((call) => call.method === 'PUT');
    expect(puts.map((call) => [call.url, call.body.length])).toEqual(
      expect.arrayContaining([
        ['DATA/multipart?uploadId=u1&partNumber=1', 200_000],
        ['DATA/multipart?uploadId=u1&partNumber=2', 200_000],
        ['DATA/multipart?uploadId=u1&partNumber=3', 50_000],
      ]),
    );
    expect(puts).toHaveLength(3);
    const others = calls
      .filter((call) => call.method !== 'PUT')
      .map((call) => [call.method, call.url, call.body.toString()]);
    expect(others).toEqual([
      ['GET', `DATA?name=${name}`, ''],
      [
        'POST',
        'DATA/multipart?uploads',
        `{"name":"${name}","data_type":"zip_data","size":450000,"content_type":"application/octet-stream","existing_id":null}`,
      ],
      [
        'POST',
        'DATA/multipart?uploadId=u1',
        '{"parts":[{"part_number":1,"etag":"e200000"},{"part_number":2,"etag":"e200000"},{"part_number":3,"etag":"e50000"}]}',
      ],
    ]);
  });

  test.each([
    ['at the same time where the server says that it takes them so', { 'millrace-parallel-parts': '1' }, 2],
    ['one after the other elsewhere', {}, 1],
  ])('parts are sent %s', async (_where, announced, least) => {
    let [underWay, most] = [0, 0];
    respond = (response, call) => {
      if (call.method === 'GET') response.end('{"data":[]}');
      else if (call.url === 'DATA/multipart?uploads') {
        response.writeHead(200, announced).end('{"upload_id":"u1","part_size":300000}');
      } else if (call.method !== 'PUT') response.end('{"id":"done"}');
      else {
        underWay += 1;
        most = Math.max(most, underWay);
        setTimeout(() => {
          underWay -= 1;
          response.end('{"etag":"e"}');
        }, 50);
      }
    };
    const opened = open();
    const bytes = Buffer.alloc(1_500_000);
    await writeFile(join(dir, 'f'), bytes);
    for (const upload of [
      () => opened.output.putFile('file', join(dir, 'f')),
      () => opened.output.putStream('stream', cutUp(bytes, 70_000)),
    ]) {
      most = 0;
      await upload();
      if (least === 1) expect(most).toBe(1);
      else expect(most).toBeGreaterThanOrEqual(least);
    }
    if (least > 1) return;
    const numbers = calls.flatMap(({ url }) => /partNumber=(\d+)$/.exec(url)?.[1] ?? []);
    expect(numbers).toEqual(['1', '2', '3', '4', '5', '1', '2', '3', '4', '5']);
  });

  test('a part that fails is sent again alone; one that is refused aborts the upload', async () => {
    const failing = new Map([['2', 2]]);
    respond = (response, call) => {
      const part = /partNumber=(\d+)/.exec(call.url)?.[1] ?? '';
      const left = failing.get(part) ?? 0;
      if (call.method === 'GET') response.end('{"data":[]}');
      else if (call.url === 'DATA/multipart?uploads') response.end('{"upload_id":"u1","part_size":100000}');
      else if (left > 0) {
        failing.set(part, left - 1);
        if (left === 2) response.destroy();
        else response.writeHead(500).end();
      } else if (call.method === 'PUT') response.end('{"etag":"e"}');
      else response.end('{"id":"done"}');
    };
    const { output } = open();
    await output.putStream('a', cutUp(Buffer.alloc(450_000), 10_000));
    const sent = calls.flatMap((call) => /partNumber=(\d+)/.exec(call.url)?.[1] ?? []);
    expect(sent.toSorted()).toEqual(['1', '2', '2', '2', '3', '4', '5']);

    calls = [];
    const before = respond;
    respond = (response, call) =>
      call.url.includes('partNumber=3') ? void response.writeHead(400).end('bad') : before(response, call);
    expect(await failure(output.putStream('b', cutUp(Buffer.alloc(450_000), 10_000)))).toMatchObject({
      message: 'bad request (400): bad',
    });
    expect(calls.filter((call) => call.method === 'DELETE').map((call) => call.url)).toEqual([
      'DATA/multipart?uploadId=u1',
    ]);
    expect(calls.some((call) => call.url === 'DATA/multipart?uploadId=u1' && call.method === 'POST')).toBe(
      false,
    );
  });

  test('a completion whose answer was lost is found out by looking at the item', async () => {
    let completions = 0;
    respond = (response, call) => {
      if (call.method === 'GET' && call.url === 'DATA/promised') {
        response.end(
          JSON.stringify({
            id: 'promised',
            domain_id: 'd',
            name: `a_${TASK}`,
            data_type: 'binary',
            size: 300_000,
            created_at: '',
            updated_at: '',
          }),
        );
      } else if (call.method === 'GET') response.end('{"data":[]}');
      else if (call.url === 'DATA/multipart?uploads')
        response.end('{"upload_id":"u1","part_size":400000,"data_id":"promised"}');
      else if (call.method === 'PUT') response.end('{"etag":"e"}');
      else {
        completions += 1;
        if (completions === 1) response.destroy();
        else response.writeHead(404).end();
      }
    };
    const opened = open();
    await opened.output.putStream('a', cutUp(Buffer.alloc(300_000), 50_000));
    expect(opened.artifacts()[0]?.id).toBe('promised');
    expect(completions).toBe(2);
  });

  test('a single upload that failed half way replaces what it may have created', async () => {
    let posts = 0;
    respond = (response, call) => {
      if (call.url === '/api/v1/info') response.writeHead(404).end();
      else if (call.method === 'GET')
        response.end(posts === 0 ? '{"data":[]}' : item(`a_${TASK}`, 'binary', 'created'));
      else if (call.method === 'POST') {
        posts += 1;
        response.destroy();
      } else response.end(item(`a_${TASK}`, 'binary', 'created'));
    };
    const opened = open();
    await opened.output.putBytes('a', Buffer.from('x'));
    expect(opened.artifacts()[0]?.id).toBe('created');
    expect(calls.map((call) => call.method)).toEqual(['GET', 'GET', 'POST', 'GET', 'PUT']);
    expect(calls.at(-1)?.body.toString()).toContain('id="created"');
  });

  test('an item created by somebody else since the lookup is replaced', async () => {
    let posts = 0;
    respond = (response, call) => {
      if (call.url === '/api/v1/info') response.writeHead(404).end();
      else if (call.method === 'GET')
        response.end(posts === 0 ? '{"data":[]}' : item(`a_${TASK}`, 'binary', 'theirs'));
      else if (call.method === 'POST') {
        posts += 1;
        response.writeHead(409).end('taken');
      } else response.end('{"data":[]}');
    };
    const opened = open();
    await opened.output.putBytes('a', Buffer.from('x'));
    expect(opened.artifacts()).toEqual([
      { logical_path: 'a', name: `a_${TASK}`, data_type: 'binary', id: 'theirs' },
    ]);
  });

  test('a small artifact is one request to a server that refuses names that are taken, and a larger one is looked up', async () => {
    const taken = new Set(['taken_' + TASK]);
    respond = (response, call) => {
      if (call.url === '/api/v1/info') {
        const upload = { request_max_bytes: 9_000_000, unique_names: true, multipart: { enabled: true } };
        response.end(JSON.stringify({ upload }));
      } else if (call.method === 'GET') {
        const name = new URLSearchParams(call.url.split('?')[1]).get('name') ?? '';
        response.end(taken.has(name) ? item(name, 'binary', 'theirs') : '{"data":[]}');
      } else if (call.method === 'POST' && call.body.includes(`name="taken_${TASK}"`)) {
        response.writeHead(409).end('taken');
      } else response.end(item('x', 'binary', call.method === 'PUT' ? 'theirs' : 'mine'));
    };
    const opened = open();
    const methods = async (name: string, bytes: number): Promise<string[]> => {
      const before = calls.length;
      await opened.output.putBytes(name, Buffer.alloc(bytes));
      return calls.slice(before).map((call) => call.method);
    };
    // What it refuses is not known yet: looked up, asked for, sent.
    expect(await methods('first', 1)).toEqual(['GET', 'GET', 'POST']);
    expect(await methods('small', 64 * 1024)).toEqual(['POST']);
    expect(await methods('large', 64 * 1024 + 1)).toEqual(['GET', 'POST']);
    expect(await methods('taken', 1)).toEqual(['POST', 'GET', 'PUT']);
    expect(opened.artifacts().map(({ id }) => id)).toEqual(['mine', 'mine', 'mine', 'theirs']);
  });

  test('a part size that does not fit into memory is refused for streams, not for files', async () => {
    respond = (response, call) => {
      if (call.method === 'GET') response.end('{"data":[]}');
      else if (call.url === 'DATA/multipart?uploads') response.end('{"upload_id":"u1","part_size":1001}');
      else if (call.method === 'PUT') response.end('{"etag":"e"}');
      else response.end('{"id":"done"}');
    };
    const { output } = open({ limits: { maxPartBytes: 1000 } });
    expect(await failure(output.putStream('a', cutUp(Buffer.alloc(300_000), 50_000)))).toMatchObject({
      code: 'resource_exhausted',
      message: expect.stringMatching(/parts of 1001 bytes, at most 1000 .*maxPartBytes/) as string,
    });
    expect(calls.filter((call) => call.method === 'DELETE')).toHaveLength(1);
    await writeFile(join(dir, 'f'), Buffer.alloc(5_000));
    await output.putFile('b', join(dir, 'f'));
  });
});

async function* cutUp(bytes: Uint8Array, size: number): AsyncGenerator<Uint8Array> {
  for (let at = 0; at < bytes.length; at += size) yield bytes.subarray(at, at + size);
}

/** Everything; `onFirst` is called when the first chunk is there. */
async function readAll(stream: Readable, onFirst: () => unknown = () => {}): Promise<Buffer> {
  const chunks: Buffer[] = [];
  for await (const chunk of stream) {
    if (chunks.length === 0) void onFirst();
    chunks.push(chunk as Buffer);
  }
  return Buffer.concat(chunks);
}

async function failure(promise: Promise<unknown>): Promise<unknown> {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  throw new Error('it was expected to fail and did not');
}
