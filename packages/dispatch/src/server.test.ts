import { mkdtemp, rm } from 'node:fs/promises';
import { createServer, connect, type AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Tracer } from '@millrace/runner';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { openFileBlobs } from './blobs/files.ts';
import { Harness, until } from './harness.test.support.ts';
import { connect as connectRequestor } from './client/http-requestor.ts';
import { openDispatcher } from './server.ts';
import { openSqliteStore } from './stores/sqlite.ts';
import { VERSION } from './version.ts';

let server: Harness;
beforeAll(async () => {
  server = await Harness.open({ limits: { jsonBodyBytes: 4096, jobBodyBytes: 4096, slowClientMs: 400 } });
});
afterAll(async () => {
  await server[Symbol.asyncDispose]();
});

/** Bytes onto a socket, and what came back until the other side closed it. */
function exchange(send: (write: (text: string) => void) => void): Promise<string> {
  const { hostname, port } = new URL(server.dispatcher.url);
  return new Promise((resolve) => {
    let received = '';
    const socket = connect(Number(port), hostname, () => send((text) => void socket.write(text)));
    socket.setEncoding('utf8').on('data', (chunk: string) => (received += chunk));
    socket.on('close', () => resolve(received));
    socket.on('error', () => {});
  });
}

describe('bad input', () => {
  const nested = (depth: number) => `${'['.repeat(depth)}${']'.repeat(depth)}`;

  test('a body nested to the limit is looked at, one level more is 413 and names the limit', async () => {
    const at = await server.call('POST', '/v1/jobs', { raw: nested(32) });
    expect(at.status).toBe(400);
    const over = await server.call('POST', '/v1/jobs', { raw: nested(33) });
    expect(over.status).toBe(413);
    expect(over.body.error.message).toContain('jsonDepth');
    const objects = await server.call('POST', '/v1/jobs', {
      raw: `${'{"a":'.repeat(33)}1${'}'.repeat(33)}`,
    });
    expect(objects.status).toBe(413);
  });

  test('a body nested as deep as it can be long does no harm', async () => {
    expect((await server.call('POST', '/v1/jobs', { raw: nested(2048) })).status).toBe(413);
  });

  test('a body at jsonBodyBytes is read, one byte more is 413', async () => {
    const sized = (bytes: number) => `"${'x'.repeat(bytes - 2)}"`;
    expect((await server.call('POST', '/v1/jobs', { raw: sized(4096) })).status).toBe(400);
    expect((await server.call('POST', '/v1/jobs', { raw: sized(4097) })).status).toBe(413);
  });

  test.each([
    ['no JSON', '{"tasks": ['],
    ['a prototype', '{"tasks": [], "__proto__": {"admin": true}}'],
    ['an escaped prototype', '{"meta": {"\\u005f_proto__": {"admin": true}}}'],
  ])('a body with %s is 400', async (_name, raw) => {
    const answer = await server.call('POST', '/v1/jobs', { raw });
    expect(answer.status).toBe(400);
    expect(({} as Record<string, unknown>)['admin']).toBeUndefined();
  });

  test.each([
    ['a byte that begins nothing', [0xff]],
    ['half a character', [0xc3]],
    ['an overlong slash', [0xc0, 0xaf]],
    ['a surrogate', [0xed, 0xa0, 0x80]],
  ])('a body with %s is 400, as it is not UTF-8', async (_name, bytes) => {
    const body = Buffer.concat([Buffer.from('{"label":"'), Buffer.from(bytes), Buffer.from('"}')]);
    const response = await fetch(new URL('/v1/jobs', server.dispatcher.url), {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body,
    });
    expect(response.status).toBe(400);
    expect(await response.text()).toContain(`the body is not valid UTF-8 (${body.length} bytes)`);
  });

  test('another content type is 415 and says which is right', async () => {
    const answer = await server.call('POST', '/v1/jobs', {
      raw: 'a=b',
      headers: { 'content-type': 'application/x-www-form-urlencoded' },
    });
    expect(answer.status).toBe(415);
    expect(answer.body.error.message).toContain('application/json');
  });

  test('numbers as text are not taken for numbers', async () => {
    const node = await server.joinNode();
    const answer = await server.call('POST', '/v1/tasks/lease', { token: node.token, json: { max: '1' } });
    expect(answer.status).toBe(400);
  });

  test('a path that cannot be decoded is 400 in the form of every other error', async () => {
    const answer = await server.call('GET', '/v1/jobs/%ff');
    expect(answer.status).toBe(400);
    expect(answer.body).toEqual({
      error: { code: 'invalid_argument', message: expect.stringContaining('%ff') },
    });
  });

  test('an unknown path is 404, a known one with another method 405 with the methods it has', async () => {
    const unknown = await server.call('GET', '/v1/nothing');
    expect(unknown.status).toBe(404);
    expect(unknown.body.error).toEqual({ code: 'not_found', message: 'there is no route GET /v1/nothing' });
    const wrong = await server.call('PUT', '/v1/jobs/2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10');
    expect(wrong.status).toBe(405);
    expect(wrong.header('allow')).toBe('DELETE, GET');
  });

  test('a domain server says the same in plain text', async () => {
    const unknown = await server.call('GET', '/api/v1/domains/x/lighthouses');
    expect([unknown.status, unknown.text]).toEqual([404, 'route not found']);
    expect(unknown.header('content-type')).toBe('text/plain; charset=utf-8');
    const wrong = await server.call('DELETE', '/api/v1/info');
    expect([wrong.status, wrong.header('allow'), wrong.header('content-type')]).toEqual([
      405,
      'GET',
      'text/plain; charset=utf-8',
    ]);
  });

  test('bytes that are no request are 400', async () => {
    const answer = await exchange((write) => write('hello there\r\n\r\n'));
    expect(answer).toMatch(/^HTTP\/1\.1 400 /);
    expect(answer).toContain('"invalid_argument"');
  });

  test('headers past what a token may need are 431', async () => {
    const answer = await exchange((write) =>
      write(`GET / HTTP/1.1\r\nHost: x\r\nX-Long: ${'x'.repeat(200_000)}\r\n\r\n`),
    );
    expect(answer).toMatch(/^HTTP\/1\.1 431 /);
  });
});

describe('slow clients', () => {
  test('headers that do not come end the connection', async () => {
    const answer = await exchange((write) => write('GET / HTTP/1.1\r\nHost: x\r\nX-Slow: '));
    expect(answer).toMatch(/^HTTP\/1\.1 408 /);
  });

  test('a body that falls silent is 408 and names the limit', async () => {
    const answer = await exchange((write) => write(postHead('application/json', 100) + '{"a"'));
    expect(answer).toMatch(/^HTTP\/1\.1 408 /);
    expect(answer).toContain('slowClientMs');
  });

  test('a JSON body that drips is cut off although it is never silent', async () => {
    let dripping: NodeJS.Timeout | undefined;
    const answer = await exchange((write) => {
      write(postHead('application/json', 4000));
      dripping = setInterval(() => write('x'), 50);
    });
    clearInterval(dripping);
    expect(answer).toMatch(/^HTTP\/1\.1 408 /);
  });

  test('an upload that falls silent is 408', async () => {
    const head = `POST /api/v1/domains/${server.dispatcher.defaultDomainId}/data HTTP/1.1\r\nHost: x\r\n`;
    const answer = await exchange((write) =>
      write(
        `${head}Authorization: Bearer ${server.clientToken}\r\nContent-Length: 5000\r\n` +
          'Content-Type: multipart/form-data; boundary=boundary\r\n\r\n--boundary\r\n',
      ),
    );
    expect(answer).toMatch(/^HTTP\/1\.1 408 /);
  });

  test('a long poll outlives the limit: silence after the request is no fault', async () => {
    const node = await server.joinNode({ capabilities: ['/patient/v1'] });
    const startedAt = performance.now();
    const answer = await server.call('POST', '/v1/tasks/lease', {
      token: node.token,
      json: { max: 1, wait: 2 },
    });
    expect(answer.status).toBe(200);
    expect(performance.now() - startedAt).toBeGreaterThan(1_500);
  });

  function postHead(type: string, length: number): string {
    return (
      `POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${server.clientToken}\r\n` +
      `Content-Type: ${type}\r\nContent-Length: ${length}\r\n\r\n`
    );
  }
});

describe('service', () => {
  test('health tells the version and the domain', async () => {
    const answer = await server.call('GET', '/health', { token: null });
    expect(answer.body).toEqual({
      status: 'ok',
      version: VERSION,
      domain_id: server.dispatcher.defaultDomainId,
    });
  });

  test('metrics tell tasks, jobs, leases, endings, requests and the process', async () => {
    await using own = await Harness.open();
    const node = await own.joinNode();
    await own.submit();
    const leased = await own.call('GET', '/v1/tasks', { token: node.token });
    await own.call('POST', `/v1/tasks/${leased.body.task.id}/complete`, {
      token: node.token,
      json: { output_cids: [], meta: null },
    });
    await own.submit();
    const metrics = await own.call('GET', '/metrics', { token: null });
    const { text } = metrics;
    expect(metrics.header('content-type')).toContain('text/plain');
    for (const line of [
      'millrace_tasks{status="completed"} 1',
      'millrace_tasks{status="queued"} 1',
      'millrace_jobs{status="completed"} 1',
      'millrace_leases_granted_total 1',
      'millrace_attempts_ended_total{outcome="completed"} 1',
      'millrace_attempts_ended_total{outcome="expired"} 0',
      'millrace_http_requests_total{method="POST",route="/v1/tasks/:id/complete",status="200"} 1',
      // The one that asks.
      'millrace_http_requests_in_flight 1',
      'millrace_heartbeats_total 0',
      'millrace_data_bytes_total{direction="in"} 0',
      `millrace_build_info{version="${VERSION}",component="dispatcher"} 1`,
    ]) {
      expect(text.split('\n')).toContain(line);
    }
    expect(text).toMatch(/millrace_oldest_runnable_age_seconds \d/);
    expect(text).toMatch(/millrace_process_resident_memory_bytes [1-9]/);
    expect(text).toMatch(/millrace_process_cpu_seconds_total \d/);
    expect(text).not.toContain(leased.body.task.id);
  });

  test('metrics count heartbeats and the bytes of items, and show what else the process has', async () => {
    await using own = await Harness.open({ moreMetrics: () => Promise.resolve('mine 1\n') });
    const node = await own.joinNode();
    await own.submit();
    const leased = await own.call('GET', '/v1/tasks', { token: node.token });
    const { id } = leased.body.task;
    await own.call('POST', `/v1/tasks/${id}/heartbeat`, { token: node.token, json: {} });
    await own.call('POST', '/v1/tasks/heartbeat', {
      token: node.token,
      json: { items: [{ task_id: id }, { task_id: '2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10' }] },
    });
    const storage = connectRequestor({ url: own.dispatcher.url, token: own.clientToken });
    const item = await storage.storage.put(
      own.dispatcher.defaultDomainId,
      { name: 'a', dataType: 'b' },
      new Uint8Array(5_000),
    );
    const { body } = await storage.storage.openRaw(own.dispatcher.defaultDomainId, item!.id);
    for await (const _ of body);
    await storage.close();
    const { text } = await own.call('GET', '/metrics', { token: null });
    // The refused one of the batch is not counted.
    expect(text).toContain('\nmillrace_heartbeats_total 2\n');
    expect(text).toMatch(/\nmillrace_data_bytes_total\{direction="in"\} 5[0-9]{3}\n/);
    expect(text).toContain('\nmillrace_data_bytes_total{direction="out"} 5000\n');
    expect(text).toMatch(/\nmine 1\n$/);
  });

  test('a job is part of the trace it is submitted in, and a span of its own where there is a tracer', async () => {
    const parent = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01';
    const child = '00-0af7651916cd43dd8448eb211c80319c-00000000000000aa-01';
    const spans: unknown[] = [];
    const tracer: Tracer = {
      startSpan(name, { parent: above, attributes }) {
        return {
          traceparent: child,
          end: (ending) => void spans.push({ name, above, ...attributes, ending }),
        };
      },
    };
    const task = { capability: '/test/v1' };
    for (const [options, header, leased] of [
      [{}, parent, parent],
      [{}, 'nonsense', undefined],
      [{}, undefined, undefined],
      [{ tracer }, parent, child],
    ] as const) {
      await using own = await Harness.open(options);
      const node = await own.joinNode({ capabilities: ['/test/v1'] });
      const submitted = await own.call('POST', '/v1/jobs', {
        json: { label: 'traced', tasks: [task] },
        headers: header === undefined ? {} : { traceparent: header },
      });
      expect(submitted.status).toBe(200);
      expect((await own.call('GET', '/v1/tasks', { token: node.token })).body.traceparent).toBe(leased);
      if (!('tracer' in options)) continue;
      await own.call('POST', '/v1/jobs', {
        json: { label: 'again', tasks: [task, task] },
      });
      await own.call('POST', '/v1/jobs', {
        json: { label: 'traced', tasks: [task] },
        headers: { 'idempotency-key': 'k' },
      });
      const refused = await own.call('POST', '/v1/jobs', {
        json: { label: 'other', tasks: [task] },
        headers: { 'idempotency-key': 'k' },
      });
      expect(refused.status).toBe(409);
      expect(spans).toHaveLength(4);
      expect(spans[0]).toEqual({
        name: 'submit job',
        above: parent,
        'millrace.job.label': 'traced',
        'millrace.job.tasks': 1,
        ending: { attributes: { 'millrace.job.id': submitted.body.job_id } },
      });
      expect(spans[1]).toMatchObject({ above: null, 'millrace.job.tasks': 2 });
      expect(spans[3]).toMatchObject({ ending: { error: expect.stringContaining('idempotency key') } });
    }
  });

  test('the public key checks the tokens, as JSON and as PEM', async () => {
    const { body } = await server.call('GET', '/service/public-key', { token: null });
    expect(body).toEqual({
      kty: 'EC',
      crv: 'P-256',
      x: expect.any(String),
      y: expect.any(String),
      alg: 'ES256',
      use: 'sig',
      kid: expect.any(String),
    });
    const pem = await server.call('GET', '/service/public-key.pem', { token: null });
    expect(pem.text).toMatch(/^-----BEGIN PUBLIC KEY-----\n/);
    const { importJWK, importSPKI, jwtVerify } = await import('jose');
    for (const key of [await importJWK(body, 'ES256'), await importSPKI(pem.text, 'ES256')]) {
      const { payload, protectedHeader } = await jwtVerify(server.clientToken, key, { issuer: 'dds' });
      expect(payload['scopes']).toEqual(['domain:rw']);
      expect(protectedHeader.kid).toBe(body.kid);
    }
  });

  test('the front page says what this is and where things are', async () => {
    const { text, status } = await server.call('GET', '/', { token: null });
    expect(status).toBe(200);
    expect(text).toContain('Millrace dispatcher');
    expect(text).toContain(`DMS_BASE_URL=${server.dispatcher.url}/v1`);
  });
});

describe('lifetime', () => {
  test('a dispatcher started again on the same data knows its domain, its tokens and its nodes', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'millrace-restart-'));
    const open = async () => {
      const store = await openSqliteStore({ path: join(folder, 'store.db') });
      const blobs = await openFileBlobs({ dir: join(folder, 'blobs') });
      const dispatcher = await openDispatcher({ store, blobs, port: 0 });
      return {
        dispatcher,
        close: async () => {
          await dispatcher.close();
          await blobs[Symbol.asyncDispose]();
          await store[Symbol.asyncDispose]();
        },
      };
    };
    try {
      const first = await open();
      const { defaultDomainId } = first.dispatcher;
      const token = await first.dispatcher.issueClientToken();
      await first.close();
      const second = await open();
      expect(second.dispatcher.defaultDomainId).toBe(defaultDomainId);
      const answer = await fetch(`${second.dispatcher.url}/v1/jobs`, {
        headers: { authorization: `Bearer ${token}` },
      });
      expect(answer.status).toBe(200);
      await answer.text();
      await second.close();
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  });

  test('a token of another dispatcher is 401', async () => {
    await using other = await Harness.open();
    const answer = await server.call('GET', '/v1/jobs', { token: other.clientToken });
    expect(answer.status).toBe(401);
    expect(answer.body.error.message).not.toContain(other.clientToken);
  });

  test('closing ends long polls with 204, watches and streams in good order, and is idempotent', async () => {
    const own = await Harness.open();
    const node = await own.joinNode({ maxConcurrency: 2 });
    const jobId = await own.submit();
    const leased = await own.call('GET', '/v1/tasks', { token: node.token });
    const polling = own.call('GET', '/v1/tasks', { token: node.token, headers: { prefer: 'wait=50' } });
    const watching = own.call('POST', '/v1/tasks/watch', {
      token: node.token,
      json: { lease_ids: [leased.header('millrace-lease-id')] },
      headers: { prefer: 'wait=50' },
    });
    const streaming = own.call('GET', `/v1/jobs/${jobId}/events`, {
      headers: { accept: 'text/event-stream' },
    });
    await until(async () => (await own.call('GET', '/metrics')).text.includes('millrace_lease_waiters 1\n'));
    await Promise.all([own.dispatcher.close(), own.dispatcher.close()]);
    expect((await polling).status).toBe(204);
    expect((await watching).body).toEqual({ lease_ids: [] });
    expect((await streaming).text).toMatch(/: closing\n\n$/);
    await own[Symbol.asyncDispose]();
  });

  test('an address that is taken is an error that says what to do', async () => {
    const taken = createServer();
    await new Promise<void>((resolve) => taken.listen(0, '127.0.0.1', resolve));
    const { port } = taken.address() as AddressInfo;
    const folder = await mkdtemp(join(tmpdir(), 'millrace-taken-'));
    const store = await openSqliteStore({ path: join(folder, 'store.db') });
    const blobs = await openFileBlobs({ dir: join(folder, 'blobs') });
    try {
      await expect(openDispatcher({ store, blobs, port })).rejects.toMatchObject({
        code: 'failed_precondition',
        message: expect.stringContaining(`127.0.0.1:${port}`),
      });
    } finally {
      await store[Symbol.asyncDispose]();
      await blobs[Symbol.asyncDispose]();
      await new Promise((resolve) => taken.close(resolve));
      await rm(folder, { recursive: true, force: true });
    }
  });

  test('a public URL is what leases and messages name; one that is none is refused', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'millrace-public-'));
    const store = await openSqliteStore({ path: join(folder, 'store.db') });
    const blobs = await openFileBlobs({ dir: join(folder, 'blobs') });
    try {
      await expect(openDispatcher({ store, blobs, port: 0, publicUrl: 'ftp://x' })).rejects.toMatchObject({
        code: 'invalid_argument',
      });
      await using dispatcher = await openDispatcher({
        store,
        blobs,
        port: 0,
        publicUrl: 'https://compute.example:8443/',
      });
      const answer = await fetch(`${dispatcher.url}/internal/v1/auth/siwe/request`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify({ wallet: '0x1a642f0e3c3af545e7acbd38b07251b3990914f1' }),
      });
      expect(await answer.json()).toMatchObject({
        domain: 'compute.example:8443',
        uri: 'https://compute.example:8443',
      });
    } finally {
      await store[Symbol.asyncDispose]();
      await blobs[Symbol.asyncDispose]();
      await rm(folder, { recursive: true, force: true });
    }
  });
});
