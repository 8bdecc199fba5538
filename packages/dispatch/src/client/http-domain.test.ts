import { createHash, randomBytes } from 'node:crypto';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { Readable } from 'node:stream';
import type { MillraceError } from '@millrace/runner';
import { SimulatedClock } from '@millrace/runner/testing';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { Harness } from '../harness.test.support.ts';
import type { DomainStorage } from './domain.ts';
import { openDomainStorage } from './http-domain.ts';

describe('domain storage client against our own dispatcher', () => {
  let harness: Harness;
  let storage: DomainStorage & AsyncDisposable;
  let domain: string;
  beforeEach(async () => {
    harness = await Harness.open({ limits: { partBytes: 64 * 1024 } });
    domain = harness.dispatcher.defaultDomainId;
    storage = openDomainStorage({
      baseUrl: `${harness.dispatcher.url}/`,
      token: () => harness.clientToken,
      clientId: 'test-client',
    });
  });
  afterEach(async () => {
    await storage[Symbol.asyncDispose]();
    await harness[Symbol.asyncDispose]();
  });

  test('what is put is found, got, downloaded, read raw and by range, replaced and deleted', async () => {
    const bytes = randomBytes(200_000);
    const item = await storage.put(domain, { name: 'first', dataType: 'test_data' }, bytes);
    expect(item).toMatchObject({
      domain_id: domain,
      name: 'first',
      data_type: 'test_data',
      size: bytes.length,
    });
    const id = item!.id;
    expect(await storage.find(domain, { name: 'first' })).toEqual([item]);
    expect(await storage.find(domain, { name: 'first', dataType: 'other' })).toEqual([]);
    expect(await storage.get(domain, id)).toEqual(item);
    const [part] = await downloaded(storage, domain, [id]);
    expect(part).toEqual({
      id,
      name: 'first',
      data_type: 'test_data',
      domain_id: domain,
      size: bytes.length,
      digest: digestOf(bytes),
      bytes,
    });
    const raw = await storage.openRaw(domain, id);
    expect([raw.size, raw.digest]).toEqual([bytes.length, digestOf(bytes)]);
    expect((await readAll(raw.body)).equals(bytes)).toBe(true);
    const range = await storage.openRaw(domain, id, { start: 10, end: 19 });
    expect((await readAll(range.body)).equals(bytes.subarray(10, 20))).toBe(true);
    const rest = await storage.openRaw(domain, id, { start: 199_990 });
    expect((await readAll(rest.body)).equals(bytes.subarray(199_990))).toBe(true);
    const replaced = await storage.put(domain, { existingId: id }, Buffer.from('--boundary--\r\n'));
    expect(replaced).toMatchObject({ id, name: 'first', size: 14 });
    expect(await storage.delete(domain, id)).toBe(true);
    expect(await storage.delete(domain, id)).toBe(false);
    expect(await storage.get(domain, id)).toBeNull();
  });

  test('a chunked upload of streams and buffers arrives whole', async () => {
    const bytes = randomBytes(64 * 1024 + 10);
    const session = await storage.startUpload({
      domainId: domain,
      name: 'up',
      dataType: 't',
      size: bytes.length,
      existingId: null,
    });
    expect(session).toMatchObject({ partSize: 64 * 1024, parallelParts: true });
    async function* slowly(chunk: Buffer): AsyncGenerator<Uint8Array> {
      for (let at = 0; at < chunk.length; at += 1000) yield chunk.subarray(at, at + 1000);
    }
    const etags = [
      await storage.putPart(domain, session.uploadId, 1, slowly(bytes.subarray(0, 64 * 1024)), 64 * 1024),
      await storage.putPart(domain, session.uploadId, 2, bytes.subarray(64 * 1024), 10),
    ];
    const id = await storage.finishUpload(
      domain,
      session.uploadId,
      etags.map((etag, index) => ({ part_number: index + 1, etag })),
    );
    expect(id).toBe(session.dataId);
    expect((await downloaded(storage, domain, [id]))[0]?.bytes.equals(bytes)).toBe(true);
    await storage.abortUpload(domain, session.uploadId);
  });

  test('a part whose stream is longer or shorter than announced is the caller’s mistake', async () => {
    const session = await storage.startUpload({
      domainId: domain,
      name: 'up',
      dataType: 't',
      size: null,
      existingId: null,
    });
    async function* ten(): AsyncGenerator<Uint8Array> {
      yield Buffer.alloc(10);
    }
    for (const size of [9, 11]) {
      expect(await failure(storage.putPart(domain, session.uploadId, 1, ten(), size))).toMatchObject({
        code: 'invalid_argument',
        message: `part 1: ${size} bytes were announced, the stream gave 10`,
      });
    }
    async function* failing(): AsyncGenerator<Uint8Array> {
      yield Buffer.alloc(10);
      throw new Error('the disk is gone');
    }
    expect(await failure(storage.putPart(domain, session.uploadId, 1, failing(), 20))).toMatchObject({
      message: 'the disk is gone',
    });
  });

  test('several items download in the order asked for; ones not read are skipped, leaving early is fine', async () => {
    const ids: string[] = [];
    for (let index = 0; index < 3; index += 1) {
      ids.push((await storage.put(domain, { name: `n${index}`, dataType: 't' }, randomBytes(150_000)))!.id);
    }
    const order = [ids[2]!, ids[0]!, ids[1]!];
    expect((await downloaded(storage, domain, order)).map((part) => part.id)).toEqual(order);
    const seen: string[] = [];
    for await (const part of storage.download({ domainId: domain, ids: order })) {
      seen.push(part.id);
      if (seen.length === 1) for await (const chunk of part.body) if ((chunk as Buffer).length > 0) break;
    }
    expect(seen).toEqual(order);
    for await (const part of storage.download({ domainId: domain, ids: order })) {
      expect(part.id).toBe(order[0]);
      break;
    }
  });

  test('info is asked once a minute', async () => {
    const clock = new SimulatedClock();
    await using aged = openDomainStorage({
      baseUrl: harness.dispatcher.url,
      token: () => '',
      clientId: 'c',
      clock,
    });
    const first = await aged.info();
    expect(first).toEqual({
      requestMaxBytes: 104857600,
      domainDataMaxBytes: 64 * 1024 ** 3,
      multipartEnabled: true,
      uniqueNames: true,
      direct: null,
    });
    await clock.advance(59_999);
    expect(await aged.info()).toBe(first);
    await clock.advance(1);
    const second = await aged.info();
    expect(second).toEqual(first);
    expect(second).not.toBe(first);
  });
});

interface Seen {
  readonly method: string;
  readonly url: string;
  readonly headers: IncomingMessage['headers'];
  readonly body: string;
}

describe('domain storage client against servers that misbehave', () => {
  let server: Server;
  let storage: DomainStorage & AsyncDisposable;
  let seen: Seen[];
  let answer: (response: ServerResponse, request: IncomingMessage) => void;
  beforeEach(async () => {
    seen = [];
    server = createServer((request, response) => {
      const chunks: Buffer[] = [];
      request.on('data', (chunk: Buffer) => chunks.push(chunk));
      request.on('end', () => {
        const { method = '', url = '', headers } = request;
        seen.push({ method, url, headers, body: Buffer.concat(chunks).toString('latin1') });
        answer(response, request);
      });
    });
    await new Promise<void>((resolve) => void server.listen(0, '127.0.0.1', resolve));
    const { port } = server.address() as AddressInfo;
    let count = 0;
    storage = openDomainStorage({
      baseUrl: `http://127.0.0.1:${port}/prefix/`,
      token: () => `token-${(count += 1)}`,
      clientId: 'the client',
      timeoutMs: 1000,
    });
  });
  afterEach(async () => {
    await storage[Symbol.asyncDispose]();
    server.closeAllConnections();
    await new Promise<void>((resolve) => void server.close(() => resolve()));
  });

  const multipart = { 'content-type': 'multipart/form-data; boundary=b' };
  const partHead = (size: number): string =>
    `--b\r\nContent-Disposition: form-data; name="n"; data-type="t"; id="i"; domain-id="d"; size="${size}"\r\n\r\n`;

  test('a server that sends us elsewhere than it announced is not followed', async () => {
    const origin = 'http://127.0.0.1:9';
    answer = (response, request) => {
      const headers = { 'millrace-direct-origin': origin };
      if (request.headers['millrace-direct'] !== '1') response.writeHead(404, headers).end();
      else response.writeHead(307, { ...headers, location: 'http://127.0.0.1:10/blob?signature=hush' }).end();
    };
    expect(await storage.get('d', 'i')).toBeNull();
    const error = await failure(storage.openRaw('d', 'i'));
    expect(error).toMatchObject({ code: 'permission_denied', retryable: false });
    expect(String(error)).toContain(
      'sends to http://127.0.0.1:10 for the bytes, announced was http://127.0.0.1:9',
    );
    expect(String(error)).not.toContain('hush');
    expect(seen.length).toBe(2);
  });

  test('every request carries the client id and the token of the moment, below the path prefix', async () => {
    answer = (response) => void response.writeHead(500).end();
    const calls = [
      (): Promise<unknown> => storage.find('d', { name: 'a b&c' }),
      (): Promise<unknown> => storage.get('d', 'i'),
      (): Promise<unknown> => storage.put('d', { name: 'n', dataType: 't' }, Buffer.from('x')),
      (): Promise<unknown> => storage.put('d', { existingId: 'i' }, Buffer.from('x')),
      (): Promise<unknown> =>
        storage.startUpload({ domainId: 'd', name: 'n', dataType: 't', size: 5, existingId: null }),
      (): Promise<unknown> => storage.putPart('d', 'u', 1, Buffer.from('x'), 1),
      (): Promise<unknown> => storage.finishUpload('d', 'u', []),
      (): Promise<unknown> => storage.openRaw('d', 'i'),
      (): Promise<unknown> => storage.delete('d', 'i'),
      (): Promise<unknown> => downloaded(storage, 'd', ['i', 'j']),
    ];
    for (const call of calls) {
      expect(await failure(call())).toMatchObject({
        code: 'unavailable',
        retryable: true,
        message: 'server error (500)',
      });
    }
    await storage.abortUpload('d', 'u');
    expect(
      seen.map(({ method, url }) => `${method} ${url.replace('/prefix/api/v1/domains/d/data', '')}`),
    ).toEqual([
      'GET ?name=a+b%26c',
      'GET /i',
      'POST ',
      'PUT ',
      'POST /multipart?uploads',
      'PUT /multipart?uploadId=u&partNumber=1',
      'POST /multipart?uploadId=u',
      'GET /i?raw=true',
      'DELETE /i',
      'GET ?ids=i,j',
      'DELETE /multipart?uploadId=u',
    ]);
    expect(seen.map(({ headers }) => headers['posemesh-client-id'])).toEqual(seen.map(() => 'the client'));
    expect(seen.map(({ headers }) => headers.authorization)).toEqual(
      seen.map((_, index) => `Bearer token-${index + 1}`),
    );
    expect(seen[4]?.body).toBe(
      '{"name":"n","data_type":"t","size":5,"content_type":"application/octet-stream","existing_id":null}',
    );
    expect(seen[9]?.headers.accept).toBe('multipart/form-data');
  });

  test('a single upload has the reference’s layout, with a boundary of its own that is not in the payload', async () => {
    answer = (response) => void response.end('{"data":[]}');
    for (const size of [3, 100_000]) {
      const payload = Buffer.alloc(size, 'x').toString();
      expect(await storage.put('d', { name: 'na', dataType: 'ty' }, Buffer.from(payload))).toBeNull();
      const { headers, body } = seen.at(-1)!;
      const boundary = /^multipart\/form-data; boundary=([0-9a-f]{30})$/.exec(headers['content-type']!)?.[1];
      expect(body).toBe(
        `--${boundary}\r\nContent-Type: application/octet-stream\r\nContent-Disposition: form-data; name="na"; data-type="ty"\r\n\r\n${payload}\r\n--${boundary}--\r\n`,
      );
      expect(Number(headers['content-length'])).toBe(body.length);
    }
    for (const name of ['a"b', 'a;b', 'a\r\nb', '']) {
      expect(await failure(storage.put('d', { name, dataType: 't' }, Buffer.alloc(0)))).toMatchObject({
        code: 'invalid_argument',
      });
    }
  });

  test.each([
    [400, 'invalid_argument', false, 'bad request (400): because'],
    [401, 'unauthenticated', false, 'unauthorized (401): because'],
    [403, 'permission_denied', false, 'other storage error: unexpected status: 403: because'],
    [404, 'not_found', false, 'not found (404): because'],
    [409, 'aborted', false, 'conflict (409): because'],
    [429, 'resource_exhausted', true, 'other storage error: unexpected status: 429: because'],
    [503, 'unavailable', true, 'server error (503): because'],
    [302, 'internal', false, 'other storage error: unexpected status: 302: because'],
  ])('status %i is %s', async (status, code, retryable, message) => {
    answer = (response) => void response.writeHead(status, { 'retry-after': '7' }).end('because');
    const error = await failure(downloaded(storage, 'd', ['i']));
    expect(error).toMatchObject({ code, retryable, message, details: { status, retry_after_ms: 7000 } });
  });

  test('a pause may be asked for by a date', async () => {
    const at = new Date(Date.now() + 60_000).toUTCString();
    answer = (response) => void response.writeHead(503, { 'retry-after': at }).end();
    const { details } = (await failure(downloaded(storage, 'd', ['i']))) as MillraceError;
    expect(details['retry_after_ms']).toBeGreaterThan(30_000);
    expect(details['retry_after_ms']).toBeLessThanOrEqual(60_000);
  });

  test('a start of a chunked upload that the server does not know is unimplemented', async () => {
    for (const status of [404, 405, 501]) {
      answer = (response) => void response.writeHead(status).end();
      const start = storage.startUpload({
        domainId: 'd',
        name: 'n',
        dataType: 't',
        size: 5,
        existingId: null,
      });
      expect(await failure(start)).toMatchObject({ code: 'unimplemented', details: { status } });
    }
    answer = (response) => void response.end('{"upload_id":"u","part_size":5}');
    expect(
      await storage.startUpload({ domainId: 'd', name: 'n', dataType: 't', size: 5, existingId: null }),
    ).toEqual({ uploadId: 'u', partSize: 5, dataId: null, parallelParts: false });
    for (const body of ['{"upload_id":"u","part_size":0}', '{"upload_id":"u"}', '[]', 'nonsense']) {
      answer = (response) => void response.end(body);
      const start = storage.startUpload({
        domainId: 'd',
        name: 'n',
        dataType: 't',
        size: 5,
        existingId: null,
      });
      expect(await failure(start)).toMatchObject({ code: 'data_loss', retryable: true });
    }
  });

  test('lists and answers that are not of the agreed form are data_loss, a missing list is empty', async () => {
    for (const body of ['{}', '{"data":[{"id":"i"}]}', '<html>', '{"data":[{"id":1}]}']) {
      answer = (response) => void response.end(body);
      expect(await failure(storage.find('d', {}))).toMatchObject({ code: 'data_loss' });
      expect(await failure(storage.put('d', { name: 'n', dataType: 't' }, Buffer.alloc(0)))).toMatchObject({
        code: 'data_loss',
      });
    }
    answer = (response) => void response.writeHead(404).end();
    expect(await storage.find('d', {})).toEqual([]);
    expect(await storage.info()).toBeNull();
  });

  test('a known member given twice is data_loss wherever it stands, an unknown one is ignored', async () => {
    const item =
      '"id":"i","domain_id":"d","name":"n","data_type":"t","size":1,"created_at":"c","updated_at":"u","x":1,"x":2';
    const found = { id: 'i', domain_id: 'd', name: 'n', data_type: 't', size: 1 };
    answer = (response) => void response.end(`{"data":[{${item}}],"y":1,"y":2}`);
    expect(await storage.find('d', {})).toMatchObject([found]);
    for (const body of [`{"data":[{${item},"size":2}]}`, `{"data":[{${item}}],"data":[]}`]) {
      answer = (response) => void response.end(body);
      expect(await failure(storage.find('d', {}))).toMatchObject({
        code: 'data_loss',
        message: expect.stringContaining('must be given once, got it twice'),
      });
    }
  });

  test('a download in another content type, without parts, or cut off, is an error', async () => {
    answer = (response) => void response.writeHead(200, { 'content-type': 'application/json' }).end('{}');
    expect(await failure(downloaded(storage, 'd', ['i']))).toMatchObject({
      code: 'data_loss',
      message: 'other storage error: Invalid content-type header',
    });
    answer = (response) => void response.writeHead(200, multipart).end('--b--\r\n');
    expect(await failure(downloaded(storage, 'd', ['i']))).toMatchObject({ code: 'not_found' });
    answer = (response) => void response.writeHead(200, multipart).end(`${partHead(10)}12345`);
    expect(await failure(downloaded(storage, 'd', ['i']))).toMatchObject({
      code: 'data_loss',
      retryable: true,
    });
    answer = (response) => void response.writeHead(200, multipart).end(`${partHead(5)}12345\r\n`);
    expect(await failure(downloaded(storage, 'd', ['i']))).toMatchObject({ code: 'data_loss' });
    answer = (response) => {
      response.writeHead(200, { ...multipart, 'content-length': '100000' });
      response.write(`${partHead(10)}123`, () => response.destroy());
    };
    expect(await failure(downloaded(storage, 'd', ['i']))).toMatchObject({
      code: 'unavailable',
      retryable: true,
    });
  });

  test('a body that stalls and a head that never comes end after the timeout', async () => {
    answer = (response) => {
      response.writeHead(200, multipart);
      response.write(`${partHead(10)}123`);
    };
    expect(await failure(downloaded(storage, 'd', ['i']))).toMatchObject({
      code: 'unavailable',
      message: expect.stringMatching(/network error: .*stalled/) as string,
    });
    answer = () => {};
    expect(await failure(storage.get('d', 'i'))).toMatchObject({
      code: 'unavailable',
      message: expect.stringMatching(/network error: .*no answer in time/) as string,
    });
  });

  test('an abort ends a download in the middle of a body with its reason', async () => {
    answer = (response) => {
      response.writeHead(200, multipart);
      response.write(`${partHead(100_000)}123`);
    };
    const controller = new AbortController();
    const reading = (async () => {
      for await (const part of storage.download(
        { domainId: 'd', ids: ['i'] },
        { signal: controller.signal },
      )) {
        for await (const chunk of part.body)
          controller.abort(new Error(`enough after ${(chunk as Buffer).length}`));
      }
    })();
    expect(await failure(reading)).toMatchObject({ message: 'enough after 3' });
  });

  test('raw bytes that do not match the digest of their ETag fail before their last chunk', async () => {
    const bytes = randomBytes(200_000);
    const etag = `"${digestOf(Buffer.concat([bytes, Buffer.from('x')]))}"`;
    answer = (response) => void response.writeHead(200, { etag }).end(bytes);
    const { body, digest } = await storage.openRaw('d', 'i');
    expect(digest).not.toBeNull();
    let received = 0;
    const reading = (async () => {
      for await (const chunk of body) received += (chunk as Buffer).length;
    })();
    expect(await failure(reading)).toMatchObject({ code: 'data_loss' });
    expect(received).toBeLessThan(bytes.length);
    // Another server's ETag says nothing about the bytes.
    answer = (response) => void response.writeHead(200, { etag: '"abc"' }).end(bytes);
    const other = await storage.openRaw('d', 'i');
    expect(other.digest).toBeNull();
    expect((await readAll(other.body)).equals(bytes)).toBe(true);
  });

  test('a part whose bytes do not match the digest it names is data_loss, one that names none is taken', async () => {
    const part = (digest: string): string =>
      `--b\r\nContent-Disposition: form-data; id="i"; size="5"; digest="${digest}"\r\n\r\n12345\r\n--b--\r\n`;
    for (const [digest, fine] of [
      [digestOf(Buffer.from('12345')), true],
      ['md5:something', true],
      [digestOf(Buffer.from('12346')), false],
    ] as const) {
      answer = (response) => void response.writeHead(200, multipart).end(part(digest));
      const reading = downloaded(storage, 'd', ['i']);
      if (fine) expect((await reading)[0]?.bytes.toString()).toBe('12345');
      else expect(await failure(reading)).toMatchObject({ code: 'data_loss' });
    }
  });

  test('a server that ignores ranges is found out', async () => {
    answer = (response) => void response.end('whole');
    expect(await failure(storage.openRaw('d', 'i', { start: 1 }))).toMatchObject({ code: 'unimplemented' });
  });

  test('a refusal before the whole upload was read is understood', async () => {
    server.removeAllListeners('request');
    server.on('request', (_request: IncomingMessage, response: ServerResponse) => {
      response.writeHead(413).end('too large');
    });
    const error = await failure(storage.put('d', { name: 'n', dataType: 't' }, Buffer.alloc(200_000)));
    expect(error).toMatchObject({ code: 'resource_exhausted', details: { status: 413 } });
  });

  test('a client id that no header can carry is refused at once', () => {
    expect(() => openDomainStorage({ baseUrl: 'http://x', token: () => '', clientId: 'ä\n' })).toThrow(
      /client id/,
    );
    expect(() => openDomainStorage({ baseUrl: 'ftp://x', token: () => '', clientId: 'c' })).toThrow(
      /base URL/,
    );
  });
});

async function downloaded(
  storage: DomainStorage,
  domainId: string,
  ids: readonly string[],
): Promise<
  { id: string; bytes: Buffer; name: string; data_type: string; domain_id: string; size: number }[]
> {
  const result = [];
  for await (const { body, ...meta } of storage.download({ domainId, ids })) {
    result.push({ ...meta, bytes: await readAll(body) });
  }
  return result;
}

async function readAll(stream: Readable): Promise<Buffer> {
  const chunks: Buffer[] = [];
  for await (const chunk of stream) chunks.push(chunk as Buffer);
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

function digestOf(bytes: Uint8Array): string {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
}
