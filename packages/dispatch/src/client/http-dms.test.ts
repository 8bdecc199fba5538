import { createServer, type IncomingMessage, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { MillraceError } from '@millrace/runner';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { Harness, TIME, UUID, until, type TestNode } from '../harness.test.support.ts';
import { NO_FEATURES, type EndingReport, type LeaseHandle, type TokenSource } from './dms.ts';
import { openHttpDms, type HttpDms } from './http-dms.ts';

function tokenSource(token: string): TokenSource {
  return { get: () => Promise.resolve(token), invalidate() {} };
}

function report(taskId: string, capability: string): EndingReport {
  return { job: { task_id: taskId, job_id: null, domain_id: null, capability }, artifacts: [] };
}

describe('against our dispatcher', () => {
  let server: Harness;
  beforeAll(async () => {
    server = await Harness.open();
  });
  afterAll(async () => {
    await server[Symbol.asyncDispose]();
  });

  let counter = 0;
  async function scene(maxConcurrency = 4) {
    counter += 1;
    const capability = `/client/${counter}/v1`;
    const node: TestNode = await server.joinNode({ capabilities: [capability], maxConcurrency });
    const dms: HttpDms = openHttpDms({
      // The slash is one too many, as operators write it.
      baseUrl: `${server.dispatcher.url}/v1/`,
      tokens: tokenSource(node.token),
    });
    return { capability, node, dms, submit: () => server.submit({ capability }) };
  }

  test('the features are what the server announces', async () => {
    await using dms = (await scene()).dms;
    expect(await dms.features()).toEqual({
      longPollSecs: 60,
      batchItems: 256,
      leaseIds: true,
      startOnLease: true,
      leaseOnComplete: true,
      endingUsage: true,
      taskLogBytes: 16 * 1024 * 1024,
      registrationIntervalSecs: null,
    });
  });

  test('one lease, heartbeat, completion', async () => {
    const { dms, submit, capability } = await scene();
    await using _ = dms;
    const jobId = await submit();
    const result = await dms.lease({ max: 1, waitSecs: 0, start: false });
    if (result.kind !== 'leases') throw new Error(`got ${result.kind}`);
    expect(result.leases).toHaveLength(1);
    const [{ leaseId, envelope }] = result.leases as [(typeof result.leases)[0]];
    expect(leaseId).toMatch(UUID);
    expect(envelope.task).toMatchObject({ job_id: jobId, capability });
    const lease = { leaseId, taskId: envelope.task.id };
    const beat = await dms.heartbeat(lease, { progress: { pct: 1 }, events: [] });
    expect(beat).toEqual({
      access_token: envelope.access_token,
      access_token_expires_at: envelope.access_token_expires_at,
      lease_expires_at: expect.stringMatching(TIME),
      cancel: false,
      status: 'running',
      domain_id: envelope.domain_id,
      domain_server_url: server.dispatcher.url,
      task: null,
      task_id: envelope.task.id,
      job_id: jobId,
      attempts: 1,
      max_attempts: 3,
      deps_remaining: 0,
      serverTimeMs: expect.any(Number),
    });
    expect(Math.abs(beat.serverTimeMs! - Date.now())).toBeLessThan(60_000);
    await dms.complete(lease, { output_cids: [], meta: report(envelope.task.id, capability) });
    expect((await server.store.getJob(jobId))?.job.status).toBe('completed');
  });

  test('the trace of a job comes with its leases, and the details of a release arrive', async () => {
    const { dms, capability } = await scene(3);
    await using _ = dms;
    const traceparent = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01';
    const { body } = await server.call('POST', '/v1/jobs', {
      json: { label: 'traced', tasks: [1, 2, 3].map(() => ({ capability })) },
      headers: { traceparent },
    });
    const results = [
      await dms.lease({ max: 1, waitSecs: 0, start: true }),
      await dms.lease({ max: 2, waitSecs: 0, start: true }),
    ];
    const leases = results.flatMap((result) => (result.kind === 'leases' ? result.leases : []));
    expect(leases.map(({ envelope }) => envelope.traceparent)).toEqual([
      traceparent,
      traceparent,
      traceparent,
    ]);
    const details = { usage: { wall_ms: 1 } };
    for (const { envelope, leaseId } of leases) {
      await dms.release({ taskId: envelope.task.id, leaseId }, 'shutdown', { details });
    }
    const receipts = (await server.store.getJob(body.job_id))?.receipts ?? [];
    expect(receipts.map(({ meta }) => meta)).toEqual([details, details, details]);
    await server.store.cancelJob(body.job_id);
  });

  test('several leases at once, started at once; then none, and busy', async () => {
    const { dms, submit } = await scene(3);
    await using _ = dms;
    for (let index = 0; index < 4; index += 1) await submit();
    const result = await dms.lease({ max: 2, waitSecs: 0, start: true });
    if (result.kind !== 'leases') throw new Error(`got ${result.kind}`);
    expect(result.leases.map(({ envelope }) => envelope.status)).toEqual(['running', 'running']);
    expect((await dms.lease({ max: 1, waitSecs: 0, start: true })).kind).toBe('leases');
    expect(await dms.lease({ max: 1, waitSecs: 0, start: true })).toEqual({ kind: 'busy' });
    expect(await dms.lease({ max: 2, waitSecs: 0, start: true })).toEqual({ kind: 'busy' });
    const idle = (await scene()).dms;
    await using __ = idle;
    expect(await idle.lease({ max: 1, waitSecs: 0, start: true })).toEqual({ kind: 'none' });
    expect(await idle.lease({ max: 2, waitSecs: 0, start: true })).toEqual({ kind: 'none' });
  });

  test.each([1, 2])('a wait for up to %i leases ends when work comes', async (max) => {
    const { dms, submit } = await scene();
    await using _ = dms;
    const waiting = dms.lease({ max, waitSecs: 20, start: false });
    await until(async () => {
      const { text } = await server.call('GET', '/metrics');
      return text.includes('millrace_lease_waiters 1\n');
    });
    await submit();
    expect((await waiting).kind).toBe('leases');
  });

  test('fail and release are reported, a lost lease is aborted', async () => {
    const { dms, submit, capability } = await scene();
    await using _ = dms;
    const failed = await submit();
    await leaseOne(dms, async (lease) =>
      dms.fail(lease, { reason: 'no', details: report(lease.taskId, capability) }),
    );
    expect((await server.store.getJob(failed))?.tasks[0]).toMatchObject({ reason: 'no', attempts: 1 });
    const released = await submit();
    await leaseOne(dms, async (lease) => {
      await dms.release(lease, 'shutdown');
      await expect(dms.heartbeat(lease, { progress: null, events: [] })).rejects.toMatchObject({
        code: 'aborted',
        retryable: false,
        details: { status: 409 },
      });
    });
    expect((await server.store.getJob(released))?.tasks[0]).toMatchObject({ status: 'queued', attempts: 0 });
  });

  test('an exchange completes, brings leases in the places, and tells each refusal as a call of its own would', async () => {
    const { dms, submit, capability } = await scene(2);
    await using _ = dms;
    const jobIds = [await submit(), await submit(), await submit()];
    const result = await dms.lease({ max: 2, waitSecs: 0, start: true });
    if (result.kind !== 'leases') throw new Error(`got ${result.kind}`);
    const [kept, done] = result.leases.map(({ leaseId, envelope }) => ({
      leaseId,
      taskId: envelope.task.id,
    }));
    const completion = (lease: LeaseHandle) => ({
      lease,
      output_cids: [],
      meta: report(lease.taskId, capability),
    });
    const stranger = { taskId: kept!.taskId, leaseId: done!.leaseId };
    const answer = await dms.exchange([completion(stranger), completion(done!)], {
      max: 500,
      start: true,
      capabilities: [capability],
    });
    expect(answer.refusals[0]).toMatchObject({ code: 'aborted', retryable: false, details: { status: 409 } });
    expect(answer.refusals[1]).toBeNull();
    expect(answer.leases.map(({ envelope }) => envelope.status)).toEqual(['running']);
    const [{ leaseId, envelope, serverTimeMs }] = answer.leases as [(typeof answer.leases)[0]];
    expect(serverTimeMs).toEqual(expect.any(Number));

    const last = await dms.exchange(
      [completion(kept!), completion({ leaseId, taskId: envelope.task.id })],
      null,
    );
    expect(last).toEqual({ refusals: [null, null], leases: [] });
    for (const jobId of jobIds) {
      expect((await server.store.getJob(jobId))?.job.status).toBe('completed');
    }
  });

  test('watch tells the cancelled lease, or nothing when the time is up', async () => {
    const { dms, submit } = await scene();
    await using _ = dms;
    const jobId = await submit();
    await leaseOne(dms, async ({ leaseId }) => {
      expect(await dms.watch([leaseId!], 0)).toEqual([]);
      const watching = dms.watch([leaseId!], 20);
      await server.call('POST', `/v1/jobs/${jobId}/cancel`);
      expect(await watching).toEqual([leaseId]);
    });
  });

  test.each([1, 2])('of up to %i leases only those of the capabilities asked for are given', async (max) => {
    const { dms, submit, capability } = await scene();
    await using _ = dms;
    await submit();
    const ask = (capabilities: string[]) => dms.lease({ max, waitSecs: 0, start: false, capabilities });
    expect(await ask(['/other/v1'])).toEqual({ kind: 'none' });
    expect((await ask(['/other/v1', capability])).kind).toBe('leases');
  });

  test('a filter too long for a URL is left out', async () => {
    const { dms, submit } = await scene();
    await using _ = dms;
    await submit();
    const capabilities = ['/other/v1', `/${'x'.repeat(4096)}`];
    expect((await dms.lease({ max: 1, waitSecs: 0, start: false, capabilities })).kind).toBe('leases');
  });

  test('an abort ends a wait with its reason', async () => {
    const { dms } = await scene();
    await using _ = dms;
    await dms.features();
    const controller = new AbortController();
    const waiting = dms.lease({ max: 1, waitSecs: 30, start: false }, { signal: controller.signal });
    controller.abort(new Error('stop'));
    await expect(waiting).rejects.toThrow('stop');
  });
});

type Handler = (
  request: IncomingMessage,
  body: string,
) => { status: number; text?: string; headers?: Record<string, string> };

describe('against the reference service', () => {
  let http: Server | null = null;
  afterEach(async () => {
    http?.closeAllConnections();
    await new Promise((resolve) => (http === null ? resolve(null) : http.close(resolve)));
    http = null;
  });

  /** A server that answers as `handler` says and knows nothing of our additions. */
  async function reference(handler: Handler, features = { status: 404, text: 'route not found' }) {
    const seen: { method: string; url: string; headers: IncomingMessage['headers']; body: string }[] = [];
    http = createServer((request, response) => {
      let body = '';
      request.setEncoding('utf8').on('data', (chunk: string) => (body += chunk));
      request.on('end', () => {
        const { method = '', url = '', headers } = request;
        if (url === '/v1/features') {
          response.writeHead(features.status, { 'content-type': 'text/plain' }).end(features.text);
          return;
        }
        seen.push({ method, url, headers, body });
        const answer = handler(request, body);
        response.writeHead(answer.status, answer.headers).end(answer.text);
      });
    });
    await new Promise<void>((resolve) => http!.listen(0, '127.0.0.1', resolve));
    const { port } = http.address() as AddressInfo;
    const invalidated: string[] = [];
    let generation = 0;
    const dms = openHttpDms({
      baseUrl: `http://127.0.0.1:${port}/v1`,
      tokens: {
        get: () => Promise.resolve(`token-${generation}`),
        invalidate: (token) => {
          invalidated.push(token);
          generation += 1;
        },
      },
      timeoutMs: 2_000,
    });
    return { dms, seen, invalidated };
  }

  const TASK = '5b1f3c52-5f0e-4b3e-9b5e-6a1d6c0a7e11';
  const SMALLEST = JSON.stringify({
    domain_id: '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21',
    domain_server_url: 'http://127.0.0.1:8083',
    task: { id: TASK, capability: '/examples/hello/v1' },
  });
  const handle = { taskId: TASK, leaseId: null };

  test('a lease is asked for with the bearer and nothing else of ours, however many are wanted', async () => {
    const { dms, seen } = await reference(() => ({ status: 200, text: SMALLEST }));
    await using _ = dms;
    expect(await dms.features()).toEqual(NO_FEATURES);
    const result = await dms.lease({ max: 5, waitSecs: 30, start: true, capabilities: ['/a/v1'] });
    expect(result).toEqual({
      kind: 'leases',
      leases: [
        {
          leaseId: null,
          serverTimeMs: expect.any(Number),
          envelope: expect.objectContaining({
            access_token: null,
            cancel: false,
            task: expect.objectContaining({ id: TASK, inputs_cids: [], meta: null }),
          }),
        },
      ],
    });
    expect(seen).toHaveLength(1);
    expect(seen[0]).toMatchObject({ method: 'GET', url: '/v1/tasks', body: '' });
    expect(seen[0]!.headers).toMatchObject({ authorization: 'Bearer token-0', accept: '*/*' });
    for (const ours of ['prefer', 'millrace-start', 'content-type', 'user-agent']) {
      expect(seen[0]!.headers).not.toHaveProperty(ours);
    }
  });

  test("the bodies of heartbeat, complete and fail are the reference's", async () => {
    const { dms, seen } = await reference(() => ({ status: 200, text: '{}' }));
    await using _ = dms;
    const { serverTimeMs: _told, ...beat } = await dms.heartbeat(handle, { progress: {}, events: [] });
    expect(Object.values(beat).every((value) => value === null)).toBe(true);
    await dms.complete(handle, { output_cids: ['a'], meta: report(TASK, '/c/v1') });
    await dms.fail(handle, { reason: 'no', details: { stage: 'build_ports' } });
    expect(seen.map(({ method, url, body }) => ({ method, url, body: JSON.parse(body) }))).toEqual([
      { method: 'POST', url: `/v1/tasks/${TASK}/heartbeat`, body: { progress: {}, events: [] } },
      {
        method: 'POST',
        url: `/v1/tasks/${TASK}/complete`,
        body: { output_cids: ['a'], meta: report(TASK, '/c/v1') },
      },
      {
        method: 'POST',
        url: `/v1/tasks/${TASK}/fail`,
        body: { reason: 'no', details: { stage: 'build_ports' } },
      },
    ]);
    for (const { headers } of seen) {
      expect(headers).not.toHaveProperty('millrace-lease-id');
      expect(headers['content-type']).toBe('application/json');
    }
  });

  test('a member it does not know may come twice', async () => {
    const { dms } = await reference(() => ({ status: 200, text: '{"x":1,"x":2,"meta":{"attempts":1.0}}' }));
    await using _ = dms;
    expect((await dms.heartbeat(handle, { progress: {}, events: [] })).attempts).toBeNull();
  });

  test.each([
    ['400', 400, ''],
    ['401, twice', 401, ''],
    ['403', 403, 'forbidden'],
    ['405', 405, ''],
    ['500', 500, 'no such thing'],
    ['302', 302, ''],
    ['204', 204, ''],
    ['a page of HTML', 200, '<html>'],
    ['JSON that is no object', 200, 'null'],
  ])(
    'a server that answers features with %s has none, and work is asked for',
    async (_name, status, text) => {
      const { dms, seen } = await reference(() => ({ status: 204 }), { status, text });
      await using _ = dms;
      expect(await dms.features()).toEqual(NO_FEATURES);
      expect(await dms.lease({ max: 1, waitSecs: 0, start: false })).toEqual({ kind: 'none' });
      expect(seen.map(({ url }) => url)).toEqual(['/v1/tasks']);
    },
  );

  test.each([429, 502, 503, 504])('a server that answers features with %i is asked again', async (status) => {
    const { dms } = await reference(() => ({ status: 204 }), { status, text: '' });
    await using _ = dms;
    await expect(dms.features()).rejects.toMatchObject({ retryable: true, details: { status } });
  });

  test('complete and fail succeed with any 2xx, also an empty one', async () => {
    const { dms } = await reference(() => ({ status: 204 }));
    await using _ = dms;
    await dms.complete(handle, { output_cids: [], meta: report(TASK, '/c/v1') });
    await dms.fail(handle, { reason: 'no', details: null });
  });

  test('release, watch and exchange are unimplemented, and nothing is sent', async () => {
    const { dms, seen } = await reference(() => ({ status: 200 }));
    await using _ = dms;
    await expect(dms.release(handle, 'shutdown')).rejects.toMatchObject({ code: 'unimplemented' });
    await expect(dms.watch([TASK], 1)).rejects.toMatchObject({ code: 'unimplemented' });
    const completion = { lease: handle, output_cids: [], meta: report(TASK, '/c/v1') };
    await expect(dms.exchange([completion], null)).rejects.toMatchObject({ code: 'unimplemented' });
    expect(seen).toEqual([]);
  });

  test('a 401 is answered once by a fresh token; the second answer counts', async () => {
    let status = 401;
    const { dms, seen, invalidated } = await reference(() => ({ status, text: SMALLEST }));
    await using _ = dms;
    await expect(dms.lease({ max: 1, waitSecs: 0, start: false })).rejects.toMatchObject({
      code: 'unauthenticated',
      details: { status: 401 },
    });
    expect(invalidated).toEqual(['token-0']);
    expect(seen.map(({ headers }) => headers.authorization)).toEqual(['Bearer token-0', 'Bearer token-1']);
    status = 200;
    expect((await dms.lease({ max: 1, waitSecs: 0, start: false })).kind).toBe('leases');
    expect(invalidated).toHaveLength(1);
  });

  test.each([
    [204, 'none'],
    [409, 'busy'],
  ] as const)('a lease answered by %i is %s', async (status, kind) => {
    const { dms } = await reference(() => ({ status }));
    await using _ = dms;
    expect(await dms.lease({ max: 1, waitSecs: 0, start: false })).toEqual({ kind });
  });

  test.each([
    [400, 'invalid_argument', false],
    [403, 'permission_denied', false],
    [404, 'not_found', false],
    [410, 'not_found', false],
    [422, 'invalid_argument', false],
    [429, 'resource_exhausted', true],
    [500, 'unavailable', true],
    [503, 'unavailable', true],
    [302, 'internal', false],
  ] as const)('a status of %i is %s', async (status, code, retryable) => {
    const { dms } = await reference(() => ({ status, text: 'why', headers: { 'retry-after': '3' } }));
    await using _ = dms;
    for (const call of [
      () => dms.lease({ max: 1, waitSecs: 0, start: false }),
      () => dms.heartbeat(handle, { progress: null, events: [] }),
      () => dms.complete(handle, { output_cids: [], meta: report(TASK, '/c/v1') }),
      () => dms.fail(handle, { reason: 'no', details: null }),
    ]) {
      const error = await call().then(
        () => null,
        (thrown: unknown) => thrown,
      );
      expect(MillraceError.is(error)).toBe(true);
      expect(error).toMatchObject({ code, retryable, details: { status, retry_after_ms: 3000 } });
    }
  });

  test('409 to a heartbeat, a completion or a failure is aborted', async () => {
    const { dms } = await reference(() => ({ status: 409, text: 'not yours' }));
    await using _ = dms;
    await expect(dms.heartbeat(handle, { progress: null, events: [] })).rejects.toMatchObject({
      code: 'aborted',
    });
    await expect(dms.fail(handle, { reason: 'no', details: null })).rejects.toMatchObject({
      code: 'aborted',
      message: `POST /tasks/${TASK}/fail status 409 Conflict; body: not yours`,
    });
  });

  test.each([
    ['an empty body', ''],
    ['no JSON', 'ok'],
    ['no object', '[]'],
    ['a number for a time', '{"lease_expires_at":1}'],
    ['a negative counter', '{"attempts":-1}'],
    ['a URL that is none', '{"domain_server_url":""}'],
    ['a member twice', '{"cancel":false,"cancel":true}'],
    ['a member of its task twice', `{"task":{"id":"${TASK}","id":"${TASK}","capability":"/c"}}`],
    ['a counter with a fraction of zero', '{"attempts":1.0}'],
    ['a token that is no string', '{"access_token":7}'],
  ])('a heartbeat answered by %s is data_loss, worth another try', async (_name, text) => {
    const { dms } = await reference(() => ({ status: 200, text }));
    await using _ = dms;
    await expect(dms.heartbeat(handle, { progress: null, events: [] })).rejects.toMatchObject({
      code: 'data_loss',
      retryable: true,
      details: { status: 200 },
    });
  });

  test.each([
    ['nothing', ''],
    ['no task', '{}'],
    ['cancel null', `{"cancel":null,"task":{"id":"${TASK}","capability":"/c"}}`],
    ['a member twice', `{"cancel":true,"cancel":false,"task":{"id":"${TASK}","capability":"/c"}}`],
  ])('a lease answered by %s is data_loss', async (_name, text) => {
    const { dms } = await reference(() => ({ status: 200, text }));
    await using _ = dms;
    await expect(dms.lease({ max: 1, waitSecs: 0, start: false })).rejects.toMatchObject({
      code: 'data_loss',
    });
  });

  test('an answer at 2 MiB is read, one byte more is refused', async () => {
    const body = (bytes: number) => SMALLEST + ' '.repeat(bytes - SMALLEST.length);
    let size = 2 * 1024 * 1024;
    const { dms } = await reference(() => ({ status: 200, text: body(size) }));
    await using _ = dms;
    expect((await dms.lease({ max: 1, waitSecs: 0, start: false })).kind).toBe('leases');
    size += 1;
    await expect(dms.lease({ max: 1, waitSecs: 0, start: false })).rejects.toMatchObject({
      code: 'resource_exhausted',
    });
  });

  test('a server that is not there, or does not answer, is unavailable', async () => {
    const { dms } = await reference(() => ({ status: 200 }));
    await dms.features();
    await dms.close();
    await using gone = openHttpDms({
      baseUrl: 'http://127.0.0.1:9',
      tokens: tokenSource('t'),
      timeoutMs: 500,
    });
    await expect(gone.lease({ max: 1, waitSecs: 0, start: false })).rejects.toMatchObject({
      code: 'unavailable',
      retryable: true,
    });
    http!.removeAllListeners('request');
    const { port } = http!.address() as AddressInfo;
    await using mute = openHttpDms({
      baseUrl: `http://127.0.0.1:${port}`,
      tokens: tokenSource('t'),
      timeoutMs: 200,
    });
    await expect(mute.features()).rejects.toMatchObject({ code: 'unavailable' });
  });

  test('a token no header can carry is sent as INVALID', async () => {
    const { seen } = await reference(() => ({ status: 204 }));
    const { port } = http!.address() as AddressInfo;
    await using dms = openHttpDms({ baseUrl: `http://127.0.0.1:${port}/v1`, tokens: tokenSource('a\nb') });
    await dms.lease({ max: 1, waitSecs: 0, start: false });
    expect(seen[0]!.headers.authorization).toBe('Bearer INVALID');
  });

  test('a failing token source is told as such', async () => {
    await using dms = openHttpDms({
      baseUrl: 'http://127.0.0.1:9',
      tokens: {
        get: () => Promise.reject(new MillraceError('unauthenticated', 'login refused')),
        invalidate() {},
      },
    });
    await expect(dms.features()).rejects.toMatchObject({
      code: 'unauthenticated',
      message: 'token provider: login refused',
    });
  });
});

async function leaseOne(
  dms: HttpDms,
  use: (lease: { taskId: string; leaseId: string | null }) => Promise<unknown>,
): Promise<void> {
  const result = await dms.lease({ max: 1, waitSecs: 10, start: false });
  if (result.kind !== 'leases') throw new Error(`got ${result.kind}`);
  for (const { leaseId, envelope } of result.leases) await use({ leaseId, taskId: envelope.task.id });
}
