import { spawn } from 'node:child_process';
import { createHash, randomBytes, randomUUID } from 'node:crypto';
import { mkdtemp, readdir, rm, truncate, writeFile } from 'node:fs/promises';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { systemClock, type Clock } from '@millrace/runner';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { collectGarbage } from '../blobs/collect.ts';
import { openFileBlobs } from '../blobs/files.ts';
import type { BlobStore } from '../blobs.ts';
import { HttpOrigin, type HttpRequest } from '../client/http.ts';
import type { Dispatcher } from '../dispatcher.ts';
import { TIME, UUID, until } from '../harness.test.support.ts';
import { readDownload, downloadBoundary, uploadEnvelope } from '../multipart.ts';
import { openDispatcher } from '../server.ts';
import type { Store } from '../store.ts';
import { openSqliteStore } from '../stores/sqlite.ts';
import { openTokens, type Tokens } from '../tokens.ts';

const PART = 64 * 1024;
const REQUEST = 256 * 1024;
const ITEM_MAX = 1024 * 1024;

interface Item {
  readonly id: string;
  readonly name: string;
  readonly size: number;
  readonly digest: string;
}

interface Answer {
  readonly status: number;
  readonly headers: Readonly<Record<string, string | string[] | undefined>>;
  readonly bytes: Buffer;
  readonly text: string;
  readonly json: any; // eslint-disable-line typescript/no-explicit-any -- tests look into it with toEqual
}

describe('domain storage over HTTP', () => {
  let dir: string;
  let store: Store;
  let blobs: BlobStore;
  let dispatcher: Dispatcher;
  let tokens: Tokens;
  let http: HttpOrigin;
  let token: string;
  let domain: string;
  let data: string;

  beforeAll(async () => {
    dir = await mkdtemp(join(tmpdir(), 'millrace-domain-'));
    store = await openSqliteStore({ path: join(dir, 'store.db') });
    blobs = await openFileBlobs({ dir: join(dir, 'blobs') });
    dispatcher = await openDispatcher({
      store,
      blobs,
      port: 0,
      limits: { partBytes: PART, uploadRequestBytes: REQUEST, dataBytes: ITEM_MAX, slowClientMs: 500 },
    });
    tokens = await openTokens(store, systemClock);
    http = new HttpOrigin({ baseUrl: dispatcher.url, timeoutMs: 20_000 });
    token = await dispatcher.issueClientToken();
    domain = dispatcher.defaultDomainId;
    data = `/api/v1/domains/${domain}/data`;
  });
  afterAll(async () => {
    await http.close();
    await dispatcher.close();
    await blobs[Symbol.asyncDispose]();
    await store[Symbol.asyncDispose]();
    await rm(dir, { recursive: true, force: true });
  });

  async function call(
    method: HttpRequest['method'],
    path: string,
    options: {
      token?: string | null;
      headers?: Record<string, string>;
      body?: Uint8Array | Readable;
      json?: unknown;
    } = {},
  ): Promise<Answer> {
    const bearer = options.token === undefined ? token : options.token;
    const response = await http.request({
      method,
      path,
      headers: { ...(bearer === null ? {} : { authorization: `Bearer ${bearer}` }), ...options.headers },
      ...(options.body === undefined ? {} : { body: options.body }),
      ...(options.json === undefined ? {} : { json: options.json }),
    });
    const bytes = await readAll(response.body);
    const isJson = (response.header('content-type') ?? '').startsWith('application/json');
    const text = bytes.toString('utf8');
    return {
      status: response.status,
      headers: response.headers,
      bytes,
      text,
      json: isJson ? JSON.parse(text) : null,
    };
  }

  type Target = { name: string; dataType: string } | { existingId: string };

  function upload(
    target: Target,
    bytes: Uint8Array,
    options: { token?: string; boundary?: string } = {},
  ): Promise<Answer> {
    const boundary = options.boundary ?? 'boundary';
    const { head, tail } = uploadEnvelope(target, boundary);
    return call('existingId' in target ? 'PUT' : 'POST', data, {
      ...(options.token === undefined ? {} : { token: options.token }),
      headers: { 'content-type': `multipart/form-data; boundary=${boundary}` },
      body: Buffer.concat([head, bytes, tail]),
    });
  }

  async function create(bytes: Uint8Array, name = `item-${randomUUID()}`): Promise<Item> {
    const answer = await upload({ name, dataType: 'test_data' }, bytes);
    expect(answer.status).toBe(200);
    return answer.json.data[0];
  }

  async function startUpload(
    body: object,
    options: { token?: string; query?: string } = {},
  ): Promise<Answer> {
    return call('POST', `${data}/multipart?${options.query ?? 'uploads'}`, {
      ...(options.token === undefined ? {} : { token: options.token }),
      json: {
        name: `up-${randomUUID()}`,
        data_type: 'test_data',
        size: null,
        content_type: 'application/octet-stream',
        existing_id: null,
        ...body,
      },
    });
  }

  const part = (
    uploadId: string,
    n: number | string,
    bytes: Uint8Array,
    options: { token?: string } = {},
  ): Promise<Answer> =>
    call('PUT', `${data}/multipart?uploadId=${uploadId}&partNumber=${n}`, {
      ...options,
      headers: { 'content-type': 'application/octet-stream' },
      body: bytes,
    });

  const finish = (
    uploadId: string,
    etags: readonly string[],
    options: { token?: string } = {},
  ): Promise<Answer> =>
    call('POST', `${data}/multipart?uploadId=${uploadId}`, {
      ...options,
      json: { parts: etags.map((etag, index) => ({ part_number: index + 1, etag })) },
    });

  /** A job with one leased task. */
  async function leased(prefix: string | null): Promise<{ token: string; release: () => Promise<void> }> {
    const capability = `/test/${randomUUID()}`;
    const submitted = await call('POST', '/v1/jobs', {
      json: {
        domain_id: domain,
        tasks: [{ label: 't', meta: {}, capability, ...(prefix === null ? {} : { outputs_prefix: prefix }) }],
      },
    });
    if (submitted.status !== 200) throw new Error(submitted.text);
    const node = await store.createNode({
      name: 'n',
      mode: 'public',
      organizationId: await organization(),
      secretHash: 'a'.repeat(64),
    });
    await store.registerNode({
      nodeId: node.id,
      secretHash: 'a'.repeat(64),
      wallet: `0x${randomBytes(20).toString('hex')}`,
      capabilities: [capability],
      labels: {},
      version: '1.0.0',
      maxConcurrency: 1,
    });
    const [answer] = await store.lease([{ nodeId: node.id, max: 1, capabilities: null, start: true }]);
    if (!answer?.ok || answer.value.leases.length !== 1)
      throw new Error(`no lease: ${JSON.stringify(answer)}`);
    const [lease] = answer.value.leases;
    const issued = tokens.issueLease(
      { domainId: domain, nodeId: node.id, taskId: lease!.task.id, leaseId: lease!.leaseId, prefix },
      dispatcher.url,
      600,
    );
    return {
      token: issued.token,
      release: async () => {
        const [released] = await store.release([
          { taskId: lease!.task.id, nodeId: node.id, leaseId: lease!.leaseId, reason: 'shutdown' },
        ]);
        expect(released?.ok).toBe(true);
      },
    };
  }

  async function organization(): Promise<string> {
    return (await store.setting('organization', () => ({ id: randomUUID() })))['id'] as string;
  }

  test('info tells the limits', async () => {
    expect((await call('GET', '/api/v1/info', { token: null })).json).toEqual({
      upload: {
        request_max_bytes: REQUEST,
        domain_data_max_bytes: ITEM_MAX,
        unique_names: true,
        multipart: { enabled: true, part_size_bytes: PART },
      },
    });
  });

  test('an uploaded item is listed, read as multipart, as raw bytes, and deleted', async () => {
    const bytes = randomBytes(100_000);
    const item = await create(bytes);
    expect(item).toEqual({
      id: expect.stringMatching(UUID),
      domain_id: domain,
      name: expect.stringMatching(/^item-/),
      data_type: 'test_data',
      size: bytes.length,
      created_at: expect.stringMatching(TIME),
      updated_at: expect.stringMatching(TIME),
      digest: digestOf(bytes),
    });
    const query = `?name=${item.name}&data_type=test_data`;
    expect((await call('GET', data + query, { headers: { accept: 'application/json' } })).json).toEqual({
      data: [item],
    });
    expect((await call('GET', `${data}/${item.id}`)).json).toEqual(item);

    const download = await call('GET', `${data}?ids=${item.id}`, {
      headers: { accept: 'multipart/form-data' },
    });
    expect(download.headers['content-type']).toMatch(/^multipart\/form-data; boundary=[0-9a-f]{60}$/);
    expect(Number(download.headers['content-length'])).toBe(download.bytes.length);
    expect(await parts(download)).toEqual([{ id: item.id, name: item.name, size: '100000', bytes }]);

    const raw = await call('GET', `${data}/${item.id}?raw=true`);
    expect(raw.bytes.equals(bytes)).toBe(true);
    expect(raw.headers).toMatchObject({
      etag: `"${digestOf(bytes)}"`,
      'content-length': '100000',
      'content-type': 'application/octet-stream',
      'accept-ranges': 'bytes',
    });
    expect((await call('DELETE', `${data}/${item.id}`)).status).toBe(204);
    expect((await call('GET', `${data}/${item.id}`)).status).toBe(404);
    expect((await call('DELETE', `${data}/${item.id}`)).status).toBe(404);
  });

  test('parts of a download come in the order asked for, however the ids are given', async () => {
    const items = [
      await create(Buffer.from('a')),
      await create(Buffer.alloc(0)),
      await create(Buffer.from('ccc')),
    ];
    const ids = [items[2]!.id, items[0]!.id, items[1]!.id];
    const accept = { headers: { accept: 'multipart/form-data' } };
    for (const query of [`?ids=${ids.join(',')}`, `?ids=${ids[0]}&ids=${ids[1]},${ids[2]}`]) {
      expect((await parts(await call('GET', data + query, accept))).map((p) => p.id)).toEqual(ids);
    }
    // The reference node's form when it combines ids with a filter.
    const odd = await call('GET', `${data}&ids=${ids.join(',')}?name=${items[0]!.name}`, accept);
    expect((await parts(odd)).map((p) => p.id)).toEqual([items[0]!.id]);
  });

  test('an id that is not there is 404, also beside one that is; a malformed one is 400', async () => {
    const accept = { headers: { accept: 'multipart/form-data' } };
    const item = await create(Buffer.from('x'));
    const unknown = randomUUID();
    const both = await call('GET', `${data}?ids=${item.id},${unknown}`, accept);
    expect([both.status, both.text]).toEqual([404, `no data item ${unknown} in domain ${domain}`]);
    expect((await call('GET', `${data}?name=nobody-has-this`, accept)).status).toBe(404);
    expect((await call('GET', `${data}?ids=not-a-uuid`, accept)).status).toBe(400);
    expect((await call('GET', `${data}?name=nobody-has-this`)).json).toEqual({ data: [] });
    const many = Array.from({ length: 1001 }, () => unknown).join(',');
    expect((await call('GET', `${data}?ids=${many}`, accept)).text).toMatch(/at most 1000 ids/);
  });

  test('ranges, conditions and what cannot be satisfied', async () => {
    const bytes = randomBytes(300_000);
    const item = await create(bytes.subarray(0, 200_000));
    const raw = (headers: Record<string, string>): Promise<Answer> =>
      call('GET', `${data}/${item.id}?raw=true`, { headers });
    for (const [range, start, end] of [
      ['bytes=0-0', 0, 0],
      ['bytes=10-', 10, 199_999],
      ['bytes=-5', 199_995, 199_999],
      ['bytes=199999-', 199_999, 199_999],
      ['bytes=5-999999', 5, 199_999],
      ['bytes=-999999', 0, 199_999],
    ] as const) {
      const answer = await raw({ range });
      expect([answer.status, answer.headers['content-range']]).toEqual([206, `bytes ${start}-${end}/200000`]);
      expect(answer.bytes.equals(bytes.subarray(start, end + 1))).toBe(true);
    }
    for (const range of ['bytes=200000-', 'bytes=-0']) {
      const answer = await raw({ range });
      expect([answer.status, answer.headers['content-range']]).toEqual([416, 'bytes */200000']);
    }
    for (const range of ['bytes=3-1', 'bytes=0-1,5-6', 'items=0-1', 'bytes=-', 'bytes=x-']) {
      expect((await raw({ range })).status).toBe(200);
    }
    const etag = `"${item.digest}"`;
    expect((await raw({ range: 'bytes=0-1', 'if-range': '"other"' })).status).toBe(200);
    expect((await raw({ range: 'bytes=0-1', 'if-range': etag })).status).toBe(206);
    for (const value of [etag, `"x", W/${etag}`, '*']) {
      const answer = await raw({ 'if-none-match': value });
      expect([answer.status, answer.bytes.length, answer.headers['etag']]).toEqual([304, 0, etag]);
    }
    expect((await raw({ 'if-none-match': '"other"' })).status).toBe(200);
  });

  test('a replaced item keeps its id, name and type, and gets the new bytes', async () => {
    const item = await create(Buffer.from('old'));
    const answer = await upload({ existingId: item.id }, Buffer.from('newer'));
    expect(answer.json.data).toEqual([
      { ...item, size: 5, digest: digestOf('newer'), updated_at: expect.stringMatching(TIME) },
    ]);
    expect((await call('GET', `${data}/${item.id}?raw=true`)).text).toBe('newer');
  });

  test('a taken name is 409 and an unknown id 404, and nothing changes', async () => {
    const item = await create(Buffer.from('first'));
    const taken = await upload({ name: item.name, dataType: 'other_type' }, Buffer.from('second'));
    expect([taken.status, taken.text]).toEqual([409, expect.stringContaining(item.name)]);
    expect((await upload({ existingId: randomUUID() }, Buffer.from('x'))).status).toBe(404);
    expect((await call('GET', `${data}/${item.id}`)).json).toEqual(item);
  });

  test('a payload may contain the fixed boundary, and other boundaries may bring several items', async () => {
    const nasty = Buffer.from('a\r\n--boundary--\r\n--boundary\r\n');
    const item = await create(nasty);
    expect((await call('GET', `${data}/${item.id}?raw=true`)).bytes.equals(nasty)).toBe(true);
    const names = [`multi-${randomUUID()}`, `multi-${randomUUID()}`];
    const body = `${names.map((name) => `--my-own-boundary\r\nContent-Disposition: form-data; name="${name}"; data-type="t"\r\n\r\n${name}\r\n`).join('')}--my-own-boundary--\r\n`;
    const answer = await call('POST', data, {
      headers: { 'content-type': 'multipart/form-data; boundary=my-own-boundary' },
      body: Buffer.from(body),
    });
    expect(answer.json.data.map((one: { name: string }) => one.name)).toEqual(names);
  });

  test('of several items in one request all are stored or none', async () => {
    const kept = await create(Buffer.from('as it was'));
    const part = (params: string, bytes: string): string =>
      `--bb\r\nContent-Disposition: form-data; ${params}\r\n\r\n${bytes}\r\n`;
    const send = (method: 'POST' | 'PUT', ...parts: string[]): Promise<Answer> =>
      call(method, data, {
        headers: { 'content-type': 'multipart/form-data; boundary=bb' },
        body: Buffer.from(`${parts.join('')}--bb--\r\n`),
      });
    const changed = part(`id="${kept.id}"`, 'changed');
    expect((await send('PUT', changed, part(`id="${randomUUID()}"`, 'x'))).status).toBe(404);
    expect((await call('GET', `${data}/${kept.id}`)).json).toEqual(kept);
    const name = `beside-${randomUUID()}`;
    const beside = part(`name="${name}"; data-type="t"`, 'x');
    for (const second of [part(`name="${kept.name}"; data-type="t"`, 'y'), beside]) {
      expect((await send('POST', beside, second)).status).toBe(409);
      expect((await call('GET', `${data}?name=${name}`)).json).toEqual({ data: [] });
    }
    expect((await send('PUT', changed)).json.data).toMatchObject([{ id: kept.id, size: 7 }]);
  });

  test('an upload without a length is taken all the same', async () => {
    const name = `chunked-${randomUUID()}`;
    const { head, tail } = uploadEnvelope({ name, dataType: 't' }, 'boundary');
    const answer = await call('POST', data, {
      headers: { 'content-type': 'multipart/form-data; boundary=boundary' },
      body: Readable.from([head, Buffer.alloc(100_000, 1), tail], { objectMode: false }),
    });
    expect(answer.json.data[0]).toMatchObject({ name, size: 100_000 });
  });

  test('names and types are 1 to 128 bytes without the forbidden characters; the answer says rule and value', async () => {
    const longest = `${'n'.repeat(91)}-${randomUUID()}`;
    expect(longest).toHaveLength(128);
    expect((await upload({ name: longest, dataType: 'd'.repeat(128) }, Buffer.from('x'))).status).toBe(200);
    expect(
      (await upload({ name: `ümlaut.and space_-,:'\`${randomUUID()}`, dataType: 't' }, Buffer.from('x')))
        .status,
    ).toBe(200);
    for (const [target, message] of [
      [{ name: `${longest}n`, dataType: 't' }, /name must be 1 to 128 bytes, got 129/],
      [{ name: '', dataType: 't' }, /name must be 1 to 128 bytes, got 0/],
      [{ name: 'a', dataType: 'd'.repeat(129) }, /data-type must be 1 to 128 bytes/],
      [{ name: 'a/b', dataType: 't' }, /name must not contain .* got "a\/b"/],
      [{ name: 'a\u0007b', dataType: 't' }, /control characters/],
    ] as const) {
      const answer = await upload(target, Buffer.from('x'));
      expect([answer.status, answer.text]).toEqual([400, expect.stringMatching(message)]);
      expect(answer.headers['content-type']).toBe('text/plain; charset=utf-8');
      const chunked = await startUpload({ name: target.name, data_type: target.dataType });
      expect(chunked.status).toBe(400);
    }
    for (const char of ';!?<>[]{}()/\\$#@*^&|~%=+') {
      expect((await startUpload({ name: `a${char}b` })).status).toBe(400);
    }
  });

  test.each([
    ['no multipart', 'application/octet-stream', 'x', /boundary/],
    [
      'another boundary in the body',
      'multipart/form-data; boundary=boundary',
      '--other\r\n',
      /begin with the boundary/,
    ],
    [
      'no disposition',
      'multipart/form-data; boundary=boundary',
      '--boundary\r\nX: y\r\n\r\nx\r\n--boundary--\r\n',
      /Content-Disposition/,
    ],
    [
      'no name',
      'multipart/form-data; boundary=boundary',
      '--boundary\r\nContent-Disposition: form-data; data-type="t"\r\n\r\nx\r\n--boundary--\r\n',
      /needs name=/,
    ],
    [
      'no end',
      'multipart/form-data; boundary=boundary',
      '--boundary\r\nContent-Disposition: form-data; name="bad"; data-type="t"\r\n\r\nx\r\n',
      /closing boundary/,
    ],
    [
      'a bad second part',
      'multipart/form-data; boundary=bb',
      '--bb\r\nContent-Disposition: form-data; name="bad"; data-type="t"\r\n\r\nx\r\n--bb\r\nContent-Disposition: form-data; name="b/d"; data-type="t"\r\n\r\nx\r\n--bb--\r\n',
      /name must not/,
    ],
  ])('a body with %s is 400 and creates nothing', async (_what, contentType, body, message) => {
    const answer = await call('POST', data, {
      headers: { 'content-type': contentType },
      body: Buffer.from(body),
    });
    expect([answer.status, answer.text]).toEqual([400, expect.stringMatching(message)]);
    expect((await call('GET', `${data}?name=bad`)).json).toEqual({ data: [] });
  });

  test('a request as large as allowed is taken, one byte more is 413, with and without a length', async () => {
    const name = `big-${randomUUID()}`;
    const room = REQUEST - (125 + name.length + 1);
    expect((await upload({ name, dataType: 't' }, randomBytes(room))).status).toBe(200);
    const over = await upload({ name: name.replace('big', 'bag'), dataType: 't' }, randomBytes(room + 1));
    expect([over.status, over.text]).toEqual([
      413,
      expect.stringContaining(`${REQUEST} bytes (uploadRequestBytes)`),
    ]);
    const { head, tail } = uploadEnvelope({ name: name.replace('big', 'bog'), dataType: 't' }, 'boundary');
    const streamed = await call('POST', data, {
      headers: { 'content-type': 'multipart/form-data; boundary=boundary' },
      body: Readable.from([head, randomBytes(room + 1), tail], { objectMode: false }),
    });
    expect(streamed.status).toBe(413);
    expect((await call('GET', `${data}?name=${name.replace('big', 'bog')}`)).json).toEqual({ data: [] });
  });

  test('after a refused upload the rest of it is read away and the connection serves on', async () => {
    const { hostname, port } = new URL(dispatcher.url);
    const socket = connect(Number(port), hostname);
    const { head, tail } = uploadEnvelope({ name: 'a/b', dataType: 't' }, 'boundary');
    const body = Buffer.concat([head, Buffer.alloc(200_000), tail]);
    socket.write(
      `POST ${data} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${token}\r\nContent-Length: ${body.length}\r\n` +
        'Content-Type: multipart/form-data; boundary=boundary\r\n\r\n',
    );
    socket.write(body);
    socket.write('GET /api/v1/info HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n');
    expect((await readAll(socket)).toString().match(/HTTP\/1\.1 \d+/g)).toEqual([
      'HTTP/1.1 400',
      'HTTP/1.1 200',
    ]);
  });

  test('a client that breaks off in the middle of an upload creates nothing', async () => {
    const name = `cut-${randomUUID()}`;
    const { head } = uploadEnvelope({ name, dataType: 't' }, 'boundary');
    const { hostname, port } = new URL(dispatcher.url);
    const socket = connect(Number(port), hostname);
    socket.write(
      `POST ${data} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${token}\r\nContent-Length: 100000\r\n` +
        `Content-Type: multipart/form-data; boundary=boundary\r\n\r\n${head.toString()}some bytes`,
    );
    const closed = new Promise<void>((resolve) => void socket.once('close', () => resolve()));
    socket.resume().end();
    await closed;
    expect((await call('GET', `${data}?name=${name}`)).json).toEqual({ data: [] });
    expect(await readdir(join(dir, 'blobs', 'tmp'))).toEqual([]);
  });

  test('a chunked upload takes parts in any order and again, and answers the whole item', async () => {
    const bytes = randomBytes(2 * PART + 17);
    for (const query of ['uploads', 'uploads=']) {
      const name = `up-${randomUUID()}`;
      const started = await startUpload({ name, size: bytes.length }, { query });
      expect(started.json).toEqual({
        upload_id: expect.stringMatching(UUID),
        part_size: PART,
        data_id: expect.stringMatching(UUID),
        expires_at: expect.stringMatching(TIME),
      });
      const { upload_id: id, data_id: dataId } = started.json;
      const etags: string[] = [];
      for (const n of [3, 1, 2, 1]) {
        const answer = await part(id, n, bytes.subarray((n - 1) * PART, n * PART));
        expect(answer.status).toBe(200);
        etags[n - 1] = answer.json.etag;
      }
      const done = await finish(id, etags);
      expect(done.json).toMatchObject({
        id: dataId,
        name,
        data_type: 'test_data',
        size: bytes.length,
        digest: digestOf(bytes),
      });
      // Whoever lost the answer may ask again.
      expect((await finish(id, etags)).json).toEqual(done.json);
      expect((await part(id, 1, bytes.subarray(0, PART))).status).toBe(404);
      expect((await call('GET', `${data}/${dataId}?raw=true`)).bytes.equals(bytes)).toBe(true);
      expect(await readdir(join(dir, 'blobs', 'uploads'))).not.toContain(id);
    }
  });

  test('a chunked upload replaces the item of existing_id, or the one of the same name', async () => {
    const item = await create(Buffer.from('old'));
    for (const body of [{ name: item.name, existing_id: item.id }, { name: item.name }]) {
      const { upload_id: id } = (await startUpload(body)).json;
      const bytes = randomBytes(10);
      const { etag } = (await part(id, 1, bytes)).json;
      expect((await finish(id, [etag])).json).toMatchObject({ id: item.id, digest: digestOf(bytes) });
    }
    expect((await startUpload({ existing_id: randomUUID() })).status).toBe(404);
  });

  test('an empty item may be uploaded in no part or in an empty one', async () => {
    for (const size of [0, null]) {
      const none = (await startUpload({ size })).json;
      expect((await finish(none.upload_id, [])).json).toMatchObject({ size: 0 });
      const one = (await startUpload({ size })).json;
      const { etag } = (await part(one.upload_id, 1, Buffer.alloc(0))).json;
      expect((await finish(one.upload_id, [etag])).json).toMatchObject({ size: 0 });
    }
  });

  test('parts that are missing, out of order, too short, too long or others than named are refused', async () => {
    const { upload_id: id } = (await startUpload({})).json;
    const first = (await part(id, 1, randomBytes(PART))).json.etag;
    const second = (await part(id, 2, randomBytes(PART - 1))).json.etag;
    const third = (await part(id, 3, randomBytes(1))).json.etag;
    expect((await part(id, 4, randomBytes(PART + 1))).status).toBe(413);
    for (const [etags, message] of [
      [[first, second, third], /part 2 must be 65536 bytes like all but the last, got 65535/],
      [[second], /part 1 has the etag/],
    ] as const) {
      const answer = await finish(id, etags);
      expect([answer.status, answer.text]).toEqual([400, expect.stringMatching(message)]);
    }
    const gap = await call('POST', `${data}/multipart?uploadId=${id}`, {
      json: { parts: [{ part_number: 2, etag: second }] },
    });
    expect(gap.text).toMatch(/without gaps/);
    for (const n of [0, -1, 'x', 17, '']) expect((await part(id, n, Buffer.from('x'))).status).toBe(400);
    expect((await finish(id, [first, second])).status).toBe(200);
    const another = (await startUpload({})).json.upload_id;
    expect((await part(another, 1, randomBytes(PART))).status).toBe(200);
    expect(
      (await finish(another, [(await part(another, 1, randomBytes(PART))).json.etag, first])).text,
    ).toMatch(/part 2 was not uploaded/);
  });

  test('an announced size is kept to, and is bounded', async () => {
    expect((await startUpload({ size: ITEM_MAX })).status).toBe(200);
    expect((await startUpload({ size: ITEM_MAX + 1 })).status).toBe(413);
    const { upload_id: id } = (await startUpload({ size: PART + 5 })).json;
    expect((await part(id, 1, randomBytes(PART - 1))).text).toMatch(/65536 bytes expected, got 65535/);
    const first = (await part(id, 1, randomBytes(PART))).json.etag;
    expect((await part(id, 2, randomBytes(6))).status).toBe(413);
    expect((await part(id, 3, randomBytes(1))).status).toBe(400);
    expect((await finish(id, [first])).text).toMatch(/add up to 65536 bytes, 65541 were announced/);
    const second = (await part(id, 2, randomBytes(5))).json.etag;
    expect((await finish(id, [first, second])).status).toBe(200);
  });

  test('an aborted upload is gone with its parts', async () => {
    const { upload_id: id } = (await startUpload({})).json;
    await part(id, 1, randomBytes(10));
    expect((await call('DELETE', `${data}/multipart?uploadId=${id}`)).status).toBe(204);
    expect(await readdir(join(dir, 'blobs', 'uploads'))).not.toContain(id);
    expect((await call('DELETE', `${data}/multipart?uploadId=${id}`)).status).toBe(404);
    expect((await finish(id, [])).status).toBe(404);
  });

  test('a part that arrives while its upload is aborted leaves nothing', async () => {
    const { upload_id: id } = (await startUpload({})).json;
    const dropParts = blobs.dropParts.bind(blobs);
    let late: Answer | null = null;
    blobs.dropParts = async (uploadId) => {
      blobs.dropParts = dropParts;
      await dropParts(uploadId);
      late = await part(id, 1, randomBytes(10));
    };
    expect((await call('DELETE', `${data}/multipart?uploadId=${id}`)).status).toBe(204);
    expect(late).toMatchObject({ status: 404 });
    expect(await readdir(join(dir, 'blobs', 'uploads'))).not.toContain(id);
  });

  test.each([
    ['{', /not valid JSON/],
    ['[]', /body/],
    ['{"name":"a"}', /body\.data_type/],
    ['{"name":"a","data_type":"t","size":-1}', /body\.size/],
    ['{"name":"a","data_type":"t","size":1.5}', /body\.size/],
    ['{"name":"a","data_type":"t","existing_id":"x"}', /existing_id must be a UUID/],
  ])('a start with the body %s is 400', async (body, message) => {
    const answer = await call('POST', `${data}/multipart?uploads`, { body: Buffer.from(body) });
    expect([answer.status, answer.text]).toEqual([400, expect.stringMatching(message)]);
  });

  test('no token is 401; a token for another domain, or of a node, 403; a read-only one may not write', async () => {
    const paths = [
      ['GET', data],
      ['GET', `${data}/${randomUUID()}`],
      ['POST', data],
      ['POST', `${data}/multipart?uploads`],
      ['DELETE', `${data}/${randomUUID()}`],
    ] as const;
    const other = await dispatcher.issueClientToken({ domainId: randomUUID() });
    const reader = await dispatcher.issueClientToken({ readOnly: true });
    const node = tokens.issueNode(
      {
        nodeId: randomUUID(),
        wallet: '0x1a642f0e3c3af545e7acbd38b07251b3990914f1',
        organizationId: randomUUID(),
        mode: 'public',
        capabilities: ['/a'],
        maxConcurrency: 1,
      },
      60,
    ).token;
    for (const [method, path] of paths) {
      expect((await call(method, path, { token: null })).status).toBe(401);
      expect((await call(method, path, { token: 'nonsense' })).status).toBe(401);
      expect((await call(method, path, { token: other })).status).toBe(403);
      expect((await call(method, path, { token: node })).status).toBe(403);
    }
    expect((await call('GET', data, { token: reader })).status).toBe(200);
    expect((await upload({ name: 'r', dataType: 't' }, Buffer.from('x'), { token: reader })).status).toBe(
      403,
    );
    expect((await startUpload({}, { token: reader })).status).toBe(403);
  });

  test('a lease writes while it is current, and not after it was given back', async () => {
    const lease = await leased(null);
    const before = await upload({ name: `l-${randomUUID()}`, dataType: 't' }, Buffer.from('x'), {
      token: lease.token,
    });
    expect(before.status).toBe(200);
    const { upload_id: id } = (await startUpload({}, { token: lease.token })).json;
    const { etag } = (await part(id, 1, Buffer.from('abc'), { token: lease.token })).json;
    const other = await leased(null);
    expect((await finish(id, [etag], { token: other.token })).status).toBe(404);
    await lease.release();
    const name = `l-${randomUUID()}`;
    const after = await upload({ name, dataType: 't' }, Buffer.from('x'), { token: lease.token });
    expect([403, 409]).toContain(after.status);
    expect([403, 409]).toContain((await finish(id, [etag], { token: lease.token })).status);
    expect((await call('GET', `${data}?name=${name}`)).json).toEqual({ data: [] });
    expect((await call('DELETE', `${data}/${before.json.data[0].id}`, { token: other.token })).status).toBe(
      403,
    );
  });

  test('a task with an outputs prefix replaces only what its own job made, one without may replace anything', async () => {
    const foreign = await create(Buffer.from('foreign'));
    const confined = await leased('out');
    const own = await upload({ name: `own-${randomUUID()}`, dataType: 't' }, Buffer.from('1'), {
      token: confined.token,
    });
    const { id } = own.json.data[0];
    expect((await upload({ existingId: id }, Buffer.from('2'), { token: confined.token })).status).toBe(200);
    expect(
      (await upload({ existingId: foreign.id }, Buffer.from('3'), { token: confined.token })).status,
    ).toBe(403);
    const chunked = (await startUpload({ name: foreign.name }, { token: confined.token })).json;
    const { etag } = (await part(chunked.upload_id, 1, Buffer.from('4'), { token: confined.token })).json;
    expect((await finish(chunked.upload_id, [etag], { token: confined.token })).status).toBe(403);
    expect((await call('GET', `${data}/${foreign.id}?raw=true`)).text).toBe('foreign');
    const free = await leased(null);
    expect((await upload({ existingId: foreign.id }, Buffer.from('5'), { token: free.token })).status).toBe(
      200,
    );
  });

  test('damaged and lost bytes are said to be so, not sent', async () => {
    const bytes = randomBytes(200_000);
    const item = await create(bytes);
    const hex = item.digest.slice('sha256:'.length);
    const path = join(dir, 'blobs', 'sha256', hex.slice(0, 2), hex);
    const accept = { headers: { accept: 'multipart/form-data' } };
    const flipped = Buffer.from(bytes);
    flipped[199_999]! ^= 1;
    await writeFile(path, flipped);
    const whole = await call('GET', `${data}/${item.id}?raw=true`);
    expect([whole.status, whole.headers['etag']]).toEqual([500, undefined]);
    expect(whole.text).toContain(`blob ${item.digest}`);
    // From then on nothing of it is sent, whoever asks for what, until it is whole again.
    const asked = [`?ids=${item.id}`, `/${item.id}?raw=true`];
    for (const at of asked) {
      const again = await call(
        'GET',
        `${data}${at}`,
        at.startsWith('?') ? accept : { headers: { range: 'bytes=0-9' } },
      );
      expect([again.status, again.headers['millrace-error']]).toEqual([500, 'data_loss']);
      expect(again.text).toContain(item.digest);
    }
    await writeFile(path, bytes);
    expect((await call('GET', `${data}/${item.id}?raw=true`)).status).toBe(200);
    // The first to find out can only be cut off, when the answer has begun.
    await writeFile(path, flipped);
    await expect(call('GET', `${data}?ids=${item.id}`, accept)).rejects.toThrow();
    for (const damage of [() => truncate(path, 10), () => rm(path)]) {
      await damage();
      const raw = await call('GET', `${data}/${item.id}?raw=true`);
      expect([raw.status, raw.text]).toEqual([500, expect.stringContaining('missing or damaged')]);
      expect((await call('GET', `${data}?ids=${item.id}`, accept)).status).toBe(500);
    }
  });

  test('garbage is what nothing names, and only once it is old', async () => {
    const replaced = await create(randomBytes(100_000));
    const kept = await create(randomBytes(100_000));
    await upload({ existingId: replaced.id }, randomBytes(100_000));
    expect(await collectGarbage(store, blobs)).toMatchObject({ blobs: 0 });
    expect(await blobs.stat(replaced.digest)).not.toBeNull();
    const later = { ...systemClock, now: () => systemClock.now() + 2 * 60 * 60 * 1000 };
    const collected = await collectGarbage(store, blobs, { clock: later });
    expect(collected.blobs).toBeGreaterThanOrEqual(1);
    expect(collected.bytes).toBeGreaterThanOrEqual(replaced.size);
    expect(await blobs.stat(replaced.digest)).toBeNull();
    expect((await call('GET', `${data}/${kept.id}?raw=true`)).status).toBe(200);
    // Parts whose upload the store does not know, as a crash may leave them.
    const putAtMs = systemClock.now();
    const orphan = randomUUID();
    await blobs.putPart(orphan, 1, Readable.from([Buffer.from('x')], { objectMode: false }), { maxBytes: 1 });
    const staged = async (): Promise<boolean> => {
      for await (const upload of blobs.listUploads()) if (upload.uploadId === orphan) return true;
      return false;
    };
    for (const [hours, there] of [
      [24.9, true],
      [25.1, false],
    ] as const) {
      await collectGarbage(store, blobs, {
        clock: { ...systemClock, now: () => putAtMs + hours * 60 * 60 * 1000 },
      });
      expect(await staged()).toBe(there);
    }
    await expect(collectGarbage(store, blobs, { graceMs: 60 * 60 * 1000 - 1 })).rejects.toMatchObject({
      code: 'invalid_argument',
    });
  });
});

test('with another database over them, not one of the blobs is removed', async () => {
  const dir = await mkdtemp(join(tmpdir(), 'millrace-owner-'));
  const later = { ...systemClock, now: () => systemClock.now() + 2 * 60 * 60 * 1000 };
  try {
    await using blobs = await openFileBlobs({ dir: join(dir, 'blobs') });
    {
      await using own = await openSqliteStore({ path: join(dir, 'own.db') });
      await collectGarbage(own, blobs);
    }
    const { digest } = await blobs.put(Readable.from([Buffer.from('named')], { objectMode: false }), {
      maxBytes: 5,
    });
    {
      await using fresh = await openSqliteStore({ path: join(dir, 'fresh.db') });
      await expect(collectGarbage(fresh, blobs, { clock: later })).rejects.toMatchObject({
        code: 'failed_precondition',
        message: expect.stringContaining('belong to the database') as string,
      });
    }
    expect(await blobs.stat(digest)).not.toBeNull();
    await using own = await openSqliteStore({ path: join(dir, 'own.db') });
    expect(await collectGarbage(own, blobs, { clock: later })).toMatchObject({ blobs: 1 });
  } finally {
    await rm(dir, { recursive: true, force: true });
  }
});

describe('uploads that cannot end well', () => {
  let dir: string;
  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), 'millrace-domain-'));
  });
  afterEach(async () => {
    await rm(dir, { recursive: true, force: true });
  });

  /** An upload of which 400,000 bytes are sent and no more; resolves once some of them are on the disk. */
  async function halfSent(clock: Clock): Promise<{
    readonly dispatcher: Dispatcher;
    readonly answer: Promise<string>;
    close(): Promise<void>;
  }> {
    const store = await openSqliteStore({ path: join(dir, 'store.db') });
    const blobs = await openFileBlobs({ dir: join(dir, 'blobs') });
    const dispatcher = await openDispatcher({ store, blobs, port: 0, clock });
    const { hostname, port } = new URL(dispatcher.url);
    const socket = connect(Number(port), hostname);
    const answer = new Promise<string>((resolve) => {
      let text = '';
      socket.on('data', (chunk: Buffer) => (text += chunk.toString()));
      socket.once('close', () => resolve(text));
    });
    const { head } = uploadEnvelope({ name: 'half', dataType: 't' }, 'boundary');
    socket.write(
      `POST /api/v1/domains/${dispatcher.defaultDomainId}/data HTTP/1.1\r\nHost: x\r\nConnection: close\r\n` +
        `Authorization: Bearer ${await dispatcher.issueClientToken()}\r\nContent-Length: 1000000\r\n` +
        'Content-Type: multipart/form-data; boundary=boundary\r\n\r\n',
    );
    socket.write(head);
    socket.write(Buffer.alloc(400_000));
    await until(async () => (await readdir(join(dir, 'blobs', 'tmp'))).length > 0);
    return {
      dispatcher,
      answer,
      close: async () => {
        socket.destroy();
        await dispatcher.close();
        await blobs[Symbol.asyncDispose]();
        await store[Symbol.asyncDispose]();
      },
    };
  }

  test('one that is under way when the server closes is answered 503 and leaves nothing', async () => {
    const upload = await halfSent(systemClock);
    await upload.dispatcher.close();
    expect(await upload.answer).toMatch(/^HTTP\/1\.1 503 [^]*the server is closing; send this again$/);
    expect(await readdir(join(dir, 'blobs', 'tmp'))).toEqual([]);
    await upload.close();
  });

  test('one that takes half an hour is answered 408 and leaves nothing', async () => {
    const HALF_AN_HOUR = 30 * 60 * 1000;
    let expire: () => void = () => {};
    const clock: Clock = {
      ...systemClock,
      setTimer: (fn, delayMs, options) => {
        if (delayMs === HALF_AN_HOUR) expire = fn;
        return systemClock.setTimer(fn, delayMs, options);
      },
    };
    const upload = await halfSent(clock);
    expire();
    expect(await upload.answer).toMatch(/^HTTP\/1\.1 408 [^]*took longer than 1800000 ms/);
    expect(await readdir(join(dir, 'blobs', 'tmp'))).toEqual([]);
    await upload.close();
  });

  test('one for which there is no space is answered 507 and leaves nothing', async () => {
    // A limit on the size of files, in a process of its own: the one way to run out of space without being root.
    const child = spawn(
      'sh',
      [
        '-c',
        'trap "" XFSZ; ulimit -f 8192; exec "$0" --input-type=module -e "$1"',
        process.execPath,
        UPLOAD_TOO_MUCH,
      ],
      { env: { ...process.env, BASE: new URL('..', import.meta.url).href, DIR: dir } },
    );
    let out = '';
    let err = '';
    child.stdout.on('data', (chunk: Buffer) => (out += chunk.toString()));
    child.stderr.on('data', (chunk: Buffer) => (err += chunk.toString()));
    await new Promise<void>((resolve) => void child.once('close', () => resolve()));
    if (out === '') throw new Error(err);
    expect(JSON.parse(out)).toEqual({
      status: 507,
      text: 'storing put: no space left for it (EFBIG)',
      temp: [],
    });
  });
});

const UPLOAD_TOO_MUCH = `
  const load = (path) => import(process.env.BASE + path);
  const { openDispatcher } = await load('server.js');
  const { openFileBlobs } = await load('blobs/files.js');
  const { openSqliteStore } = await load('stores/sqlite.js');
  const { readdir } = await import('node:fs/promises');
  const dir = process.env.DIR;
  const store = await openSqliteStore({ path: dir + '/store.db' });
  const blobs = await openFileBlobs({ dir: dir + '/blobs' });
  const dispatcher = await openDispatcher({ store, blobs, port: 0 });
  const head = '--b\\r\\nContent-Disposition: form-data; name="n"; data-type="t"\\r\\n\\r\\n';
  const response = await fetch(dispatcher.url + '/api/v1/domains/' + dispatcher.defaultDomainId + '/data', {
    method: 'POST',
    headers: {
      authorization: 'Bearer ' + (await dispatcher.issueClientToken()),
      'content-type': 'multipart/form-data; boundary=b',
    },
    body: Buffer.concat([Buffer.from(head), Buffer.alloc(20e6), Buffer.from('\\r\\n--b--\\r\\n')]),
  });
  const text = await response.text();
  console.log(JSON.stringify({ status: response.status, text, temp: await readdir(dir + '/blobs/tmp') }));
  await dispatcher.close();
  process.exit();
`;

async function readAll(stream: Readable): Promise<Buffer> {
  const chunks: Buffer[] = [];
  for await (const chunk of stream) chunks.push(chunk as Buffer);
  return Buffer.concat(chunks);
}

async function parts(
  answer: Answer,
): Promise<{ id: string | undefined; name: string | undefined; size: string | undefined; bytes: Buffer }[]> {
  const result = [];
  const body = Readable.from([answer.bytes], { objectMode: false });
  for await (const one of readDownload(body, downloadBoundary(answer.headers['content-type'] as string))) {
    const chunks: Uint8Array[] = [];
    for (let chunk = await one.pull(); chunk !== null; chunk = await one.pull()) chunks.push(chunk);
    const { id, name, size } = Object.fromEntries(one.params);
    result.push({ id, name, size, bytes: Buffer.concat(chunks) });
  }
  return result;
}

function digestOf(bytes: Uint8Array | string): string {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
}
