/** What a node sends to servers that are the reference's and no more, request by request, as it stands on the wire. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { createServer, request as httpRequest } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { defineRunner, type Runner, type TaskContext } from '@millrace/runner';
import { parseNodeEnv } from './config.ts';
import { createNode, type ComputeNode, type NodeOptions } from './node.ts';
import {
  CAPABILITY,
  DOMAIN,
  JOB,
  REG_SECRET,
  ReferenceServer,
  VECTOR,
  type Received,
  type ReferenceOptions,
} from './reference-server.test.support.ts';
import { memoryLog, never } from './simulation/scripted-dms.ts';

let server: ReferenceServer;
let folder: string;
let closers: (() => Promise<unknown>)[];

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'millrace-wire-'));
  closers = [() => rm(folder, { recursive: true, force: true })];
});

afterEach(async () => {
  for (const close of closers) await close();
});

async function open(options: ReferenceOptions = {}): Promise<void> {
  server = await ReferenceServer.open(options);
  closers.unshift(() => server[Symbol.asyncDispose]());
}

/** A node that is configured by nothing but its environment. */
function start(
  run: Runner['run'],
  env: Record<string, string> = {},
  options: Partial<NodeOptions> = {},
): ComputeNode {
  const node = createNode({
    config: parseNodeEnv(server.env(env)),
    runners: [defineRunner({ capability: CAPABILITY, run })],
    workDir: join(folder, 'work'),
    log: memoryLog(),
    drainMs: 0,
    ...options,
  });
  const ended = node.run();
  ended.catch(() => undefined);
  closers.unshift(async () => {
    await node[Symbol.asyncDispose]();
    await ended;
  });
  return node;
}

/** Requests to DMS that bring no work, which is any number of them. */
const idle = ({ path }: Received): boolean => path === '/v1/tasks';

interface Wire {
  readonly request: string;
  readonly headers: Readonly<Record<string, string>>;
  readonly body: unknown;
}

/** As it stands on the wire, but for host, connection and length, and the boundary that is random. */
function wire({ service, method, path, query, headers, body }: Received): Wire {
  const { host: _host, connection: _connection, 'content-length': length, ...rest } = headers;
  if (body.length > 0) expect(length).toBe(String(body.length));
  const boundary = /boundary=(.*)$/.exec(rest['content-type'] ?? '')?.[1];
  const text = body.toString('latin1');
  return {
    request: `${service} ${method} ${path}${query === '' ? '' : `?${query}`}`,
    headers:
      boundary === undefined
        ? rest
        : { ...rest, 'content-type': rest['content-type']!.replace(boundary, '<boundary>') },
    body:
      rest['content-type'] === 'application/json'
        ? JSON.parse(text)
        : boundary === undefined
          ? text
          : text.replaceAll(boundary, '<boundary>'),
  };
}

const NODE = { accept: '*/*', authorization: 'Bearer node-token-1' };
const NODE_JSON = { ...NODE, 'content-type': 'application/json' };
const STORAGE = { authorization: 'Bearer domain-token-1', 'posemesh-client-id': 'test-client' };
const DATA = `/api/v1/domains/${DOMAIN}/data`;

/** Everything about one task: from its first heartbeat to its ending, or to what comes instead. */
function task(until: (request: Received) => boolean = () => false): Wire[] {
  const from = server.received.findIndex(({ path }) => path.endsWith('/heartbeat'));
  const rest = server.received.slice(from);
  const end = rest.findIndex((each) => /\/(complete|fail)$/.test(each.path) || until(each));
  return rest
    .slice(0, end + 1)
    .filter((each) => !idle(each))
    .map(wire);
}

const job = (taskId: string) => ({
  task_id: taskId,
  job_id: JOB,
  domain_id: DOMAIN,
  capability: CAPABILITY,
});

const firstHeartbeat = (taskId: string): Wire => ({
  request: `dms POST /v1/tasks/${taskId}/heartbeat`,
  headers: NODE_JSON,
  body: { progress: {}, events: [] },
});

describe('the wire of a node', () => {
  test('registers, logs in and asks for work: the published message and signature, and nothing of ours but one question', async () => {
    await open();
    start(() => Promise.resolve());
    await server.seen(idle);
    const signed = (nonce: string) =>
      `${VECTOR.domain} wants you to sign in with your Ethereum account:\n${VECTOR.wallet}\n\n` +
      `URI: ${VECTOR.uri}\nVersion: 1\nChain ID: 8453\nNonce: ${nonce}\nIssued At: ${VECTOR.issuedAt}`;
    const headers = { accept: '*/*', 'content-type': 'application/json' };
    const nonceRequest = {
      request: 'dds POST /internal/v1/auth/siwe/request',
      headers,
      body: { wallet: VECTOR.wallet },
    };
    expect(server.received.slice(0, 6).map(wire)).toEqual([
      nonceRequest,
      {
        request: 'dds POST /internal/v1/nodes/register-wallet',
        headers,
        body: {
          message: signed(VECTOR.nonce),
          signature: VECTOR.signature,
          registration_credentials: REG_SECRET,
          capabilities: [CAPABILITY],
          version: '0.3.2',
        },
      },
      nonceRequest,
      {
        request: 'dds POST /internal/v1/auth/siwe/verify',
        headers,
        body: {
          address: VECTOR.wallet,
          message: signed(`${VECTOR.nonce}-2`),
          signature: expect.stringMatching(/^0x[0-9a-f]{128}(1b|1c)$/),
        },
      },
      // The one question beyond the reference, once; a server that does not know it is asked nothing else of ours.
      { request: 'dms GET /v1/features', headers: NODE, body: '' },
      { request: 'dms GET /v1/tasks', headers: NODE, body: '' },
    ]);
    await server.next(idle);
    expect(server.of('dms', 'GET', '/features')).toHaveLength(1);
    expect(server.of('dds')).toHaveLength(4);
    expect(server.violations).toEqual([]);
  });

  test('echo: the first heartbeat, the download, the lookup, the probe, the upload, the completion', async () => {
    await open();
    const input = server.store('input', 'text', 'ping');
    const taskId = server.offer({ inputs_cids: [input] });
    start(async (ctx) => {
      const bytes = await ctx.input.getBytesByCid(ctx.lease.task.inputs_cids[0]!);
      await ctx.output.putBytes('result.json', bytes);
    });
    await server.ending(taskId);
    const name = `hello-demo_result_json_${taskId}`;
    const output = '0d6c1c6e-3f0c-4c63-8c37-000000000002';
    expect(task()).toEqual([
      firstHeartbeat(taskId),
      {
        request: `domain GET ${DATA}?ids=${input}`,
        headers: { ...STORAGE, accept: 'multipart/form-data' },
        body: '',
      },
      {
        request: `domain GET ${DATA}?name=${name}`,
        headers: { ...STORAGE, accept: 'application/json' },
        body: '',
      },
      {
        request: 'domain GET /api/v1/info',
        headers: { accept: '*/*', 'posemesh-client-id': 'test-client' },
        body: '',
      },
      {
        request: `domain POST ${DATA}`,
        headers: { ...STORAGE, accept: '*/*', 'content-type': 'multipart/form-data; boundary=<boundary>' },
        body:
          '--<boundary>\r\nContent-Type: application/octet-stream\r\n' +
          `Content-Disposition: form-data; name="${name}"; data-type="json"\r\n\r\nping\r\n--<boundary>--\r\n`,
      },
      {
        request: `dms POST /v1/tasks/${taskId}/complete`,
        headers: NODE_JSON,
        body: {
          output_cids: [output],
          meta: {
            job: job(taskId),
            artifacts: [{ logical_path: 'hello-demo/result.json', name, data_type: 'json', id: output }],
          },
        },
      },
    ]);
    expect(server.items.get(output)?.bytes.toString()).toBe('ping');
    expect(server.violations).toEqual([]);
  });

  test('progress and events: an object with both members, the last words before the ending', async () => {
    await open();
    const taskId = server.offer();
    start(async (ctx) => {
      await ctx.ctrl.progress({ pct: 40, stage: 'upload' });
      await ctx.ctrl.logEvent({ level: 'info', message: 'inputs ready' });
    });
    await server.ending(taskId);
    const spoken = task().slice(1, -1);
    expect(spoken.length).toBeGreaterThanOrEqual(1);
    for (const each of spoken) {
      expect(each).toMatchObject({ request: `dms POST /v1/tasks/${taskId}/heartbeat`, headers: NODE_JSON });
    }
    const bodies = spoken.map(({ body }) => body as { progress: unknown; events: unknown[] });
    expect(bodies.at(-1)?.progress).toEqual({ pct: 40, stage: 'upload' });
    expect(bodies.flatMap(({ events }) => events)).toEqual([{ level: 'info', message: 'inputs ready' }]);
    expect(server.violations).toEqual([]);
  });

  test('fail: the reason with its causes, and what was uploaded all the same', async () => {
    await open();
    const taskId = server.offer({ outputs_prefix: null, job_id: null });
    start(async (ctx) => {
      await ctx.output.putBytes('notes', new TextEncoder().encode('n'));
      throw new Error('python exited with status 1', { cause: new Error('out of memory') });
    });
    await server.ending(taskId);
    expect(task().at(-1)).toEqual({
      request: `dms POST /v1/tasks/${taskId}/fail`,
      headers: NODE_JSON,
      body: {
        reason: 'runner failed: python exited with status 1: out of memory',
        details: {
          // The first heartbeat's answer named the job.
          job: job(taskId),
          artifacts: [
            {
              logical_path: 'notes',
              name: `notes_${taskId}`,
              data_type: 'binary',
              id: '0d6c1c6e-3f0c-4c63-8c37-000000000001',
            },
          ],
        },
      },
    });
    expect(server.violations).toEqual([]);
  });

  test('file upload: the lookup, init, parts, completion, without a probe', async () => {
    await open({ partBytes: 4 });
    const taskId = server.offer();
    const path = join(folder, 'scan.zip');
    await writeFile(path, '0123456789');
    start((ctx) => ctx.output.putFile('refined/scan.zip', path));
    await server.ending(taskId);
    const name = `hello-demo_refined_scan_zip_${taskId}`;
    const multipart = `domain %s ${DATA}/multipart`;
    const upload = '7e11c0de-0000-4000-8000-000000000001';
    const headers = { ...STORAGE, accept: '*/*' };
    expect(task()).toEqual([
      firstHeartbeat(taskId),
      {
        request: `domain GET ${DATA}?name=${name}`,
        headers: { ...STORAGE, accept: 'application/json' },
        body: '',
      },
      {
        request: `${multipart.replace('%s', 'POST')}?uploads`,
        headers: { ...headers, 'content-type': 'application/json' },
        body: {
          name,
          data_type: 'zip_data',
          size: 10,
          content_type: 'application/octet-stream',
          existing_id: null,
        },
      },
      ...['0123', '4567', '89'].map((body, index) => ({
        request: `${multipart.replace('%s', 'PUT')}?uploadId=${upload}&partNumber=${index + 1}`,
        headers: { ...headers, 'content-type': 'application/octet-stream' },
        body,
      })),
      {
        request: `${multipart.replace('%s', 'POST')}?uploadId=${upload}`,
        headers: { ...headers, 'content-type': 'application/json' },
        body: {
          parts: [1, 2, 3].map((part_number) => ({ part_number, etag: `etag-${part_number}` })),
        },
      },
      expect.objectContaining({ request: `dms POST /v1/tasks/${taskId}/complete` }),
    ]);
    expect([...server.items.values()].map(({ bytes }) => bytes.toString())).toEqual(['0123456789']);
    expect(server.violations).toEqual([]);
  });

  test('file upload to a server without chunked uploads: one request', async () => {
    await open({ chunked: false, info: false });
    const taskId = server.offer();
    const path = join(folder, 'a.csv');
    await writeFile(path, '1,2');
    start((ctx) => ctx.output.putFile('a.csv', path));
    await server.ending(taskId);
    expect(task().map(({ request }) => request)).toEqual([
      `dms POST /v1/tasks/${taskId}/heartbeat`,
      `domain GET ${DATA}?name=hello-demo_a_csv_${taskId}`,
      `domain POST ${DATA}/multipart?uploads`,
      'domain GET /api/v1/info',
      `domain POST ${DATA}`,
      `dms POST /v1/tasks/${taskId}/complete`,
    ]);
    expect([...server.items.values()].map(({ dataType }) => dataType)).toEqual(['csv']);
    expect(server.violations).toEqual([]);
  });

  test('artifact update: a known id is replaced at once, a known name after the lookup', async () => {
    await open();
    const [known, named] = [server.store('by-id', 'json', 'old'), server.store('by-name', 'json', 'old')];
    const taskId = server.offer();
    start(async (ctx) => {
      const content = { bytes: new TextEncoder().encode('new') };
      await ctx.output.putDomainArtifact({
        rel_path: 'one.json',
        name: 'by-id',
        data_type: 'json',
        existing_id: known,
        content,
      });
      await ctx.output.putDomainArtifact({
        rel_path: 'two.json',
        name: 'by-name',
        data_type: 'json',
        content,
      });
    });
    await server.ending(taskId);
    const put = (id: string): Wire => ({
      request: `domain PUT ${DATA}`,
      headers: { ...STORAGE, accept: '*/*', 'content-type': 'multipart/form-data; boundary=<boundary>' },
      body:
        '--<boundary>\r\nContent-Type: application/octet-stream\r\n' +
        `Content-Disposition: form-data; id="${id}"\r\n\r\nnew\r\n--<boundary>--\r\n`,
    });
    expect(task()).toEqual([
      firstHeartbeat(taskId),
      expect.objectContaining({ request: 'domain GET /api/v1/info' }),
      put(known),
      {
        request: `domain GET ${DATA}?name=by-name`,
        headers: { ...STORAGE, accept: 'application/json' },
        body: '',
      },
      put(named),
      {
        request: `dms POST /v1/tasks/${taskId}/complete`,
        headers: NODE_JSON,
        body: {
          output_cids: [known, named],
          meta: {
            job: job(taskId),
            artifacts: [
              { logical_path: 'hello-demo/one.json', name: 'by-id', data_type: 'json', id: known },
              { logical_path: 'hello-demo/two.json', name: 'by-name', data_type: 'json', id: named },
            ],
          },
        },
      },
    ]);
    expect([...server.items.values()].map(({ bytes }) => bytes.toString())).toEqual(['new', 'new']);
    expect(server.violations).toEqual([]);
  });

  test('cancel: the heartbeat that brings it is the last word about the task', async () => {
    await open({ leaseMs: 1_500 });
    let cancel = false;
    const taskId = server.offer();
    server.fault = ({ path }) =>
      cancel && path.endsWith('/heartbeat')
        ? { status: 200, body: '{"cancel":true,"status":"cancelled"}' }
        : null;
    let reason: unknown = null;
    start(async (ctx) => {
      await ctx.ctrl.progress({ pct: 1 });
      cancel = true;
      await never(ctx.signal).catch(() => undefined);
      reason = ctx.signal.reason;
      expect(await ctx.ctrl.isCancelled()).toBe(true);
    });
    await expect.poll(() => reason).toMatchObject({ reason: 'canceled' });
    // The node is free again and asks for work; it says nothing more about this task.
    await server.next(idle);
    await server.next(idle);
    const about = server.received.filter(({ path }) => path.includes(taskId));
    expect(about.every(({ path }) => path.endsWith('/heartbeat'))).toBe(true);
    expect(server.received.filter(({ service }) => service === 'domain')).toEqual([]);
    expect(server.violations).toEqual([]);
  });

  test.each([404, 409])(
    'lease lost by a heartbeat answered %i: nothing more is sent for the task',
    async (status) => {
      await open({ leaseMs: 1_500 });
      const taskId = server.offer();
      let beats = 0;
      server.fault = ({ path }) =>
        path.endsWith('/heartbeat') && (beats += 1) > 1 ? { status, body: 'not the owner' } : null;
      let signal: AbortSignal | null = null;
      start(async (ctx) => {
        signal = ctx.signal;
        await never(ctx.signal);
      });
      await expect.poll(() => signal?.reason).toMatchObject({ reason: 'lease_lost' });
      await server.next(idle);
      await server.next(idle);
      expect(server.received.filter(({ path }) => path.includes(taskId)).map(({ path }) => path)).toEqual([
        `/v1/tasks/${taskId}/heartbeat`,
        `/v1/tasks/${taskId}/heartbeat`,
      ]);
      expect(server.violations).toEqual([]);
    },
  );

  test.each([
    [
      'start_session',
      { capability: '/other/v1' },
      {},
      /^failed to initialise session: task capability \/other\/v1 not in configured set \[\/examples\/hello\/v1\]$/,
    ],
    ['build_ports', {}, { domain_server_url: null }, /^lease missing domain_server_url$/],
    ['build_ports', {}, { domain_id: null }, /^lease missing domain_id$/],
  ] as const)('setup that fails at %s is the node’s own fault', async (stage, members, lease, error) => {
    await open();
    const taskId = server.offer(members, lease, lease);
    start(() => Promise.resolve());
    expect(await server.ending(taskId)).toEqual({
      kind: 'fail',
      body: { reason: 'node_setup_failed', details: { stage, error: expect.stringMatching(error) } },
    });
    expect(server.of('dms', 'POST', '/heartbeat')).toHaveLength(stage === 'start_session' ? 0 : 1);
    expect(server.violations).toEqual([]);
  });

  test('a first heartbeat that is refused is told with its status and body', async () => {
    await open();
    const taskId = server.offer();
    server.fault = ({ path }) => (path.endsWith('/heartbeat') ? { status: 409, body: 'taken' } : null);
    start(() => Promise.resolve());
    expect(await server.ending(taskId)).toMatchObject({
      body: {
        details: {
          stage: 'initial_heartbeat',
          error: `POST /tasks/${taskId}/heartbeat status 409 Conflict; body: taken`,
        },
      },
    });
    expect(server.violations).toEqual([]);
  });

  test('inputs by URL: only path and query count, ids are one list, and the layout on disk is the reference’s', async () => {
    await open();
    const first = server.store('dmt_manifest_2024-01-02_03-04-05', 'dmt_manifest_json', '{}');
    const second = server.store('scan_2024-01-02_03-04-05', 'refined_scan_zip', 'zip');
    const base = server.url('domain');
    const taskId = server.offer({
      inputs_cids: [`${base}${DATA}/${first}`, `${DATA}?ids=${first},${second}`],
    });
    const paths: string[] = [];
    start(async (ctx: TaskContext) => {
      for (const cid of ctx.lease.task.inputs_cids) {
        const input = await ctx.input.materializeCidWithMeta(cid);
        for (const path of [input.path, ...input.related_files])
          paths.push(path.slice(input.root_dir.length + 1));
        expect(input).toMatchObject({ cid, data_id: first, domain_id: DOMAIN, extracted_paths: [] });
      }
    });
    expect((await server.ending(taskId)).kind).toBe('complete');
    expect(server.of('domain', 'GET').map(({ query }) => query)).toEqual([
      `ids=${first}`,
      `ids=${first},${second}`,
    ]);
    const scan = 'datasets/2024-01-02_03-04-05';
    const manifest = `${scan}/dmt_manifest_2024-01-02_03-04-05.dmt_manifest_json`;
    expect(paths).toEqual([manifest, manifest, `${scan}/scan_2024-01-02_03-04-05.refined_scan_zip`]);
    expect(server.violations).toEqual([]);
  });

  test('without CLIENT_ID one id is kept for the life of the node, and sent with every storage request', async () => {
    await open();
    const taskIds = [server.offer(), server.offer()];
    start((ctx) => ctx.output.putBytes('a.txt', new Uint8Array(1)), { CLIENT_ID: ' ' });
    for (const taskId of taskIds) await server.ending(taskId);
    const ids = new Set(server.of('domain').map(({ headers }) => headers['posemesh-client-id']));
    expect([...ids]).toEqual([expect.stringMatching(/^posemesh-compute-node\/[0-9a-f-]{36}$/)]);
  });

  test('an older service that names the expiry expires_at is logged in to', async () => {
    await open({ olderExpiryName: true });
    const taskId = server.offer();
    start(() => Promise.resolve());
    expect((await server.ending(taskId)).kind).toBe('complete');
  });

  test('a lease whose expiry a newer service names in the task alone is renewed on its timer', async () => {
    await open();
    const lease_expires_at = new Date(Date.now() + 1_200).toISOString();
    const silent = { lease_expires_at: null };
    const taskId = server.offer({ lease_expires_at }, silent, silent);
    const beats = (): Received[] => server.of('dms', 'POST', '/heartbeat');
    start(async () => await expect.poll(() => beats().length).toBeGreaterThan(1));
    expect((await server.ending(taskId)).kind).toBe('complete');
  });

  test('registration is repeated where that is asked for, and not otherwise', async () => {
    await open();
    start(() => Promise.resolve(), {}, { repeatRegistrationMs: 1_000 });
    await expect.poll(() => server.registrations.length, { timeout: 10_000 }).toBe(3);
    const [first, ...others] = server.registrations;
    for (const other of others) {
      expect({ ...other, message: '', signature: '' }).toEqual({ ...first, message: '', signature: '' });
    }
    // Nobody logs in again for it.
    expect(server.of('dds', 'POST', '/verify')).toHaveLength(1);
  });

  test('with HTTP_PROXY all three services are reached through it', async () => {
    await open();
    const seen: string[] = [];
    const proxy = createServer((request, response) => {
      const target = new URL(request.url ?? '');
      seen.push(target.origin);
      const onward = httpRequest(
        target,
        { method: request.method ?? 'GET', headers: request.headers },
        (answer) => {
          response.writeHead(answer.statusCode ?? 502, answer.headers);
          answer.pipe(response);
        },
      );
      onward.on('error', () => response.destroy());
      request.pipe(onward);
    });
    await new Promise<void>((resolve) => proxy.listen(0, '127.0.0.1', resolve));
    closers.push(async () => {
      proxy.closeAllConnections();
      await new Promise((resolve) => proxy.close(resolve));
    });
    const { port } = proxy.address() as AddressInfo;
    const taskId = server.offer();
    start((ctx) => ctx.output.putBytes('a.json', new Uint8Array(1)), { http_proxy: `127.0.0.1:${port}` });
    expect((await server.ending(taskId)).kind).toBe('complete');
    expect(new Set(seen)).toEqual(new Set([server.url('dds'), server.url('dms'), server.url('domain')]));
    expect(server.violations).toEqual([]);
  });

  test('slashes at the end of the base URLs do not matter', async () => {
    await open();
    const taskId = server.offer();
    start(() => Promise.resolve(), {
      DDS_BASE_URL: `${server.url('dds')}/`,
      DMS_BASE_URL: `${server.url('dms')}/v1/`,
    });
    expect((await server.ending(taskId)).kind).toBe('complete');
    expect(server.received.filter(({ path }) => path.includes('//'))).toEqual([]);
  });
});
