/** The reference node and newer ones, unchanged, against our dispatcher. */
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { LeaseEnvelope } from '@millrace/runner';
import { Harness, until } from './harness.test.support.ts';
import { ReferenceNode, http, jsonOf, metadataOf } from './reference-node.test.support.ts';
import { generatePrivateKeyHex } from './siwe.ts';

const HELLO = '/examples/hello/v1';
let server: Harness;

beforeEach(async () => {
  server = await Harness.open({ leaseTtlMs: 4_000, limits: { partBytes: 64 * 1024 } });
});
afterEach(async () => {
  await server[Symbol.asyncDispose]();
});

async function unregistered(capabilities: readonly string[] = [HELLO]): Promise<ReferenceNode> {
  const { credentials } = await server.addNode();
  return new ReferenceNode({
    dds: server.dispatcher.url,
    dms: `${server.dispatcher.url}/v1`,
    credentials,
    privateKey: generatePrivateKeyHex(),
    capabilities,
  });
}

async function joined(capabilities?: readonly string[]): Promise<ReferenceNode> {
  const node = await unregistered(capabilities);
  expect((await node.register()).status).toBe(200);
  await node.login();
  return node;
}

function leaseOf(answer: LeaseEnvelope | number): LeaseEnvelope {
  if (typeof answer === 'number') throw new Error(`no lease but ${answer}`);
  return answer;
}

async function jobOf(jobId: string) {
  return (await server.call('GET', `/v1/jobs/${jobId}`)).body;
}

/** Stores an item as a requestor does. Returns its id. */
async function stored(name: string, dataType: string, text: string): Promise<string> {
  const path = `/api/v1/domains/${server.dispatcher.defaultDomainId}/data`;
  const answer = await http('POST', `${server.dispatcher.url}${path}`, {
    headers: {
      authorization: `Bearer ${server.clientToken}`,
      'content-type': 'multipart/form-data; boundary=boundary',
    },
    body:
      `--boundary\r\nContent-Type: application/octet-stream\r\nContent-Disposition: form-data; ` +
      `name="${name}"; data-type="${dataType}"\r\n\r\n${text}\r\n--boundary--\r\n`,
  });
  return metadataOf(answer)[0]!['id'] as string;
}

describe('the reference node', () => {
  test('does one task from registration to the next poll', async () => {
    const node = await unregistered();
    const registration = await node.register();
    expect([registration.status, registration.body.length]).toEqual([200, 0]);
    await node.login();
    expect(await node.poll()).toBe(204);

    const [first, second] = [
      await stored('scan_a', 'zip', 'A;"--boundary'),
      await stored('scan_b', 'zip', ''),
    ];
    const url = `${server.dispatcher.url}/api/v1/domains/${server.dispatcher.defaultDomainId}/data/${first}`;
    const jobId = await server.submit({ inputs_cids: [url, second], outputs_prefix: 'hello-demo/' });
    const lease = leaseOf(await node.poll());
    const { id } = lease.task;
    expect(lease.task).toMatchObject({
      job_id: jobId,
      inputs_cids: [url, second],
      attempts: 1,
      max_attempts: 3,
    });
    // It holds the one lease it may.
    expect(await node.poll()).toBe(409);

    // One before the work, one by the loop at once.
    expect((await node.heartbeat(id)).body).toMatchObject({ status: 'running', cancel: false, task_id: id });
    expect((await node.heartbeat(id)).status).toBe(200);

    const parts = await node.download(lease, `?ids=${first},${second}`);
    expect(parts?.map(({ id: dataId, bytes }) => [dataId, bytes.toString()])).toEqual([
      [first, 'A;"--boundary'],
      [second, ''],
    ]);
    // As the reference node writes it when there is a filter beside the ids.
    expect(await node.download(lease, `&ids=${first}?name=scan_a`)).toHaveLength(1);
    expect(await node.download(lease, `?ids=${generateUuid()}`)).toBeNull();

    const name = `hello-demo_result_json_${id}`;
    expect(await node.lookup(lease, name, 'json')).toBeNull();
    expect((await node.info(lease)).requestMaxBytes).toBeGreaterThan(0);
    const created = await node.upload(lease, { name, dataType: 'json' }, '{"a":1}');
    expect(created.status).toBe(200);
    const dataId = metadataOf(created)[0]!['id'] as string;
    expect(await node.lookup(lease, name, 'json')).toBe(dataId);
    expect((await node.upload(lease, { name, dataType: 'json' }, 'x')).status).toBe(409);
    expect((await node.upload(lease, { id: generateUuid() }, 'x')).status).toBe(404);
    const updated = await node.upload(lease, { id: dataId }, '\r\n--boundary--\r\n');
    expect(metadataOf(updated)[0]).toMatchObject({ id: dataId, name, size: 16 });

    const bytes = Buffer.alloc(150_000, 'z');
    const fileName = `hello-demo_scan_zip_${id}`;
    const fileId = await node.uploadChunked(lease, fileName, 'zip_data', bytes);
    expect(await node.uploadChunked(lease, fileName, 'zip_data', bytes, { existingId: fileId })).toBe(fileId);
    expect((await node.download(lease, `?ids=${fileId}`))?.[0]?.bytes.equals(bytes)).toBe(true);

    expect((await node.heartbeat(id, { pct: 40 }, [{ level: 'info', message: 'm' }])).status).toBe(200);
    // The final flush.
    expect((await node.heartbeat(id, { pct: 100 })).status).toBe(200);
    node.artifacts.push(
      { logical_path: 'hello-demo/result.json', name, data_type: 'json', id: dataId },
      { logical_path: 'hello-demo/scan.zip', name: fileName, data_type: 'zip_data', id: fileId },
    );
    expect((await node.complete(lease)).status).toBe(200);
    expect(await node.poll()).toBe(204);

    const detail = await jobOf(jobId);
    expect(detail.job.status).toBe('completed');
    expect(detail.tasks[0]).toMatchObject({
      status: 'completed',
      meta: { progress: { pct: 100 }, events: [{ level: 'info', message: 'm' }] },
    });
    expect(detail.receipts[0]).toMatchObject({
      outputs: [dataId, fileId],
      meta: { job: { task_id: id, job_id: jobId, capability: HELLO }, artifacts: node.artifacts },
    });
  });

  test('reports failures of the runner and of its own setup', async () => {
    const node = await joined();
    const jobId = await server.submit({ max_attempts: 1 });
    const lease = leaseOf(await node.poll());
    await node.heartbeat(lease.task.id);
    // Its own fault: the task goes to the next who asks.
    expect((await node.setupFailed(lease.task.id, 'build_ports', 'lease missing domain_id')).status).toBe(
      200,
    );
    let answer: LeaseEnvelope | number = 204;
    await until(async () => typeof (answer = await node.poll()) !== 'number', 15_000);
    const again = leaseOf(answer);
    await node.heartbeat(again.task.id);
    expect((await node.fail(again, 'runner failed: python exited with status 1')).status).toBe(200);
    expect((await jobOf(jobId)).tasks[0]).toMatchObject({
      status: 'failed',
      reason: 'runner failed: python exited with status 1',
      attempts: 1,
    });
  }, 30_000);

  test('hears of a cancel in its next heartbeat, says nothing more, and the job ends when its lease does', async () => {
    const node = await joined();
    const jobId = await server.submit();
    const lease = leaseOf(await node.poll());
    await node.heartbeat(lease.task.id);
    await server.call('POST', `/v1/jobs/${jobId}/cancel`);
    expect((await node.heartbeat(lease.task.id)).body).toMatchObject({ cancel: true });
    expect((await jobOf(jobId)).job.status).toBe('running');
    await until(async () => (await jobOf(jobId)).job.status === 'canceled', 15_000);
    expect(await node.poll()).toBe(204);
  }, 30_000);

  test('a completion that comes after the cancel is 409: the node was no longer entitled to it', async () => {
    const node = await joined();
    const jobId = await server.submit();
    const lease = leaseOf(await node.poll());
    await node.heartbeat(lease.task.id);
    await server.call('POST', `/v1/jobs/${jobId}/cancel`);
    expect((await node.complete(lease)).status).toBe(409);
    await until(async () => (await jobOf(jobId)).job.status === 'canceled', 15_000);
  }, 30_000);

  test('a node that lost its lease is told 409 by everything, and 404 for a task there is not', async () => {
    const [slow, fast] = [await joined(), await joined()];
    const jobId = await server.submit();
    const lost = leaseOf(await slow.poll());
    await slow.heartbeat(lost.task.id);
    let won: LeaseEnvelope | number = 204;
    await until(async () => typeof (won = await fast.poll()) !== 'number', 20_000);
    const { id } = lost.task;
    expect((await slow.heartbeat(id)).status).toBe(409);
    expect((await slow.complete(lost)).status).toBe(409);
    expect((await slow.fail(lost, 'late')).status).toBe(409);
    expect((await slow.heartbeat(generateUuid())).status).toBe(404);
    expect((await fast.heartbeat(id)).status).toBe(200);
    expect((await fast.complete(leaseOf(won))).status).toBe(200);
    // A node whose answer was lost says it again.
    expect((await fast.complete(leaseOf(won))).status).toBe(200);
    expect((await jobOf(jobId)).job.status).toBe('completed');
  }, 40_000);

  test('an upload under a lease that is lost is refused', async () => {
    const [slow, fast] = [await joined(), await joined()];
    await server.submit();
    const lost = leaseOf(await slow.poll());
    await until(async () => typeof (await fast.poll()) !== 'number', 20_000);
    const refused = await slow.upload(lost, { name: 'late', dataType: 'json' }, '{}');
    expect([403, 409]).toContain(refused.status);
    expect(refused.headers['content-type']).toContain('text/plain');
  }, 40_000);

  test('a base with a slash too many works, and an unknown node is told so in words', async () => {
    const { credentials } = await server.addNode();
    const node = new ReferenceNode({
      dds: server.dispatcher.url,
      dms: `${server.dispatcher.url}/v1/`,
      credentials,
      privateKey: generatePrivateKeyHex(),
      capabilities: [HELLO],
    });
    await expect(node.login()).rejects.toThrow('verify status 403 node not found');
    expect((await node.register()).status).toBe(200);
    await node.login();
    expect(await node.poll()).toBe(204);
  });

  test('another client that signs with v 0 or 1 and sends no address is let in', async () => {
    const node = await unregistered();
    await node.register();
    await node.login(true);
    expect(await node.poll()).toBe(204);
  });
});

describe('a newer node', () => {
  test('does one task: filter, checked token, raw bytes, announced ids, repeated registration', async () => {
    const node = await joined(['/a/v1', '/b/v1']);
    expect((await node.register({ max_concurrency: 1 })).body.length).toBe(0);
    const input = await stored('input', 'text', 'ping');
    const [a] = [await server.submit({ capability: '/a/v1' }), await server.submit({ capability: '/b/v1' })];
    const lease = leaseOf(await node.poll(`?capability=${encodeURIComponent('/b/v1')}`));
    node.checkNewerLease(lease, '/b/v1');
    const { id } = lease.task;
    const beat = await node.heartbeat(id);
    expect(beat.body).toMatchObject({ task_id: id, domain_id: lease.domain_id, status: 'running' });
    expect(beat.body['domain_server_url']).toBe(lease.domain_server_url);

    // Registering again, as it does every two minutes, disturbs nothing.
    expect((await node.register()).status).toBe(200);
    expect((await node.heartbeat(id)).status).toBe(200);

    const raw = await node.storage(lease, 'GET', `/data/${input}?raw=true`);
    expect([raw.status, raw.body.toString()]).toEqual([200, 'ping']);
    const { dataMaxBytes } = await node.info(lease);
    expect(dataMaxBytes).toBeGreaterThan(150_000);
    const outputId = await node.uploadChunked(lease, 'out', 'bin_data', Buffer.alloc(150_000, 7), {
      newer: true,
    });
    const listed = await node.storage(lease, 'GET', '/data?name=out', {
      headers: { accept: 'application/json' },
    });
    expect(metadataOf(listed).map((item) => item['id'])).toEqual([outputId]);
    const artifact = { logical_path: 'out', name: 'out', data_type: 'bin_data', id: outputId };
    const done = await node.complete(lease, [{ ...artifact, metadata: { width: 3 } }]);
    // JSON within bounds; anything else is an error to it.
    expect(done.status).toBe(200);
    expect(done.headers['content-type']).toContain('application/json');
    expect(jsonOf(done)).toBeTypeOf('object');
    const { job, receipts } = await jobOf(lease.task.job_id!);
    expect(job.status).toBe('completed');
    expect(receipts[0].meta.artifacts[0].metadata).toEqual({ width: 3 });

    node.checkNewerLease(leaseOf(await node.poll()), '/a/v1');
    expect((await jobOf(a)).job.status).toBe('running');
  });

  test('is given no lease for a capability that has no work', async () => {
    const node = await joined(['/a/v1', '/b/v1']);
    await server.submit({ capability: '/a/v1' });
    expect(await node.poll('?capability=%2Fb%2Fv1')).toBe(204);
  });
});

function generateUuid(): string {
  return crypto.randomUUID();
}
