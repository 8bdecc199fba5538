/** Domains that take turns, keys and resources, over a real socket. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { connect } from '../client/http-requestor.ts';
import { Harness, until } from '../harness.test.support.ts';

let server: Harness;
beforeAll(async () => {
  server = await Harness.open();
});
afterAll(async () => {
  await server[Symbol.asyncDispose]();
});

const A = 'aaaaaaaa-0000-4000-8000-000000000000';
const B = 'bbbbbbbb-0000-4000-8000-000000000000';
const client = () => connect({ url: server.dispatcher.url, token: server.clientToken });

describe('domains', () => {
  test('weights are given and told, and 1 is no weight', async () => {
    await using requestor = client();
    await requestor.setWeight(A.toUpperCase(), 3);
    const id = await requestor.submit({ domain_id: B, tasks: [{ capability: '/nobody/v1' }] });
    expect(await requestor.domains()).toEqual([
      { domain_id: A, weight: 3, ready: 0, held: 0 },
      { domain_id: B, weight: 1, ready: 1, held: 0 },
    ]);
    await requestor.setWeight(A, 1);
    await requestor.cancel(id);
    expect(await requestor.domains()).toEqual([]);
  });

  test('a wrong weight or id is refused with its name and value', async () => {
    const put = async (id: string, json: unknown) =>
      await server.call('PUT', `/api/v1/domains/${id}`, { token: server.clientToken, json });
    for (const weight of [0, 1001, 1.5, '3', null]) {
      const { status, text } = await put(A, { weight });
      expect([status, text]).toEqual([400, expect.stringContaining('weight')]);
    }
    expect((await put(A, {})).status).toBe(400);
    const unknown = await put('nonsense', { weight: 2 });
    expect([unknown.status, unknown.text]).toEqual([400, expect.stringContaining('the domain id')]);
  });

  test('a token for one domain sees that one and gives no weights; without a token there is nothing', async () => {
    await using operator = client();
    await operator.setWeight(A, 2);
    await operator.setWeight(B, 2);
    const token = await server.dispatcher.issueClientToken({ subject: 'one', domainId: B });
    await using requestor = connect({ url: server.dispatcher.url, token });
    expect((await requestor.domains()).map(({ domain_id }) => domain_id)).toEqual([B]);
    await expect(requestor.setWeight(B, 9)).rejects.toMatchObject({ code: 'permission_denied' });
    for (const method of ['GET', 'PUT'] as const) {
      const path = method === 'GET' ? '/api/v1/domains' : `/api/v1/domains/${A}`;
      const answer = await server.call(method, path, {
        token: null,
        json: method === 'PUT' ? { weight: 2 } : undefined,
      });
      expect(answer.status).toBe(401);
    }
    for (const domain of [A, B]) await operator.setWeight(domain, 1);
  });
});

describe('resources of nodes', () => {
  test('what a node registers is told of it, and what is wrong with it to whoever registers', async () => {
    await using requestor = client();
    const { id } = await server.joinNode({ resources: { cpu: 2, memory: '1GiB' } });
    const nodes = await requestor.nodes();
    expect(nodes.find((node) => node.id === id)).toMatchObject({
      resources: { cpu: 2, memory: 2 ** 30 },
      resources_in_use: {},
    });
    await expect(server.joinNode({ resources: { cpu: -1 } })).rejects.toThrow(
      /registration answered 400 .*resources\.cpu must be a multiple of 0\.001, above 0 and at most 2\^53, got -1/,
    );
    await expect(server.joinNode({ resources: 'cpu=1' })).rejects.toThrow(
      /resources must be an object of 1 to 16 names/,
    );
  });

  test('a request that waits for room is answered when a task of that node ends', async () => {
    await using requestor = client();
    const capability = '/cramped/v1';
    const options = { capabilities: [capability], maxConcurrency: 10, resources: { cpu: 1 } };
    const [node, other] = [await server.joinNode(options), await server.joinNode(options)];
    const lease = (token: string, wait: number) =>
      server.call('GET', '/v1/tasks', { token, headers: { prefer: `wait=${wait}` } });
    const id = await requestor.submit({ tasks: [1, 2, 3].map(() => ({ capability })) });
    const held = [await lease(node.token, 0), await lease(other.token, 0)].map(
      ({ body }) => body.task.id as string,
    );
    const gone = new AbortController();
    const first = server
      .call('GET', '/v1/tasks', { token: node.token, headers: { prefer: 'wait=30' }, signal: gone.signal })
      .catch(() => null);
    const second = lease(other.token, 30);
    // The second to wait is the one that gets room: it is not for the first of the line to be asked in its place.
    await until(async () => /^millrace_lease_waiters 2$/m.test((await server.call('GET', '/metrics')).text));
    const explained = await requestor.explainJob(id);
    expect(explained.groups.map(({ reason }) => reason.code)).toContain('no_room');
    const before = Date.now();
    await server.call('POST', `/v1/tasks/${held[1]}/complete`, {
      token: other.token,
      json: { output_cids: [] },
    });
    const { body } = await second;
    expect(body.task.job_id).toBe(id);
    expect(Date.now() - before).toBeLessThan(4000);
    gone.abort();
    await first;
    await requestor.cancel(id);
    await server.call('POST', `/v1/tasks/${held[0]}/fail`, {
      token: node.token,
      json: { reason: 'canceled', details: {} },
    });
  });

  test('a request that waits for a key is answered when the task that has it ends', async () => {
    await using requestor = client();
    const capability = '/keyed/v1';
    const node = await server.joinNode({ capabilities: [capability], maxConcurrency: 4 });
    const id = await requestor.submit({
      concurrency: { key: 'k', limit: 1 },
      tasks: [{ capability }, { capability }],
    });
    const lease = (wait: number) =>
      server.call('GET', '/v1/tasks', { token: node.token, headers: { prefer: `wait=${wait}` } });
    const { body: first } = await lease(0);
    const waiting = lease(30);
    const [waits] = (await requestor.job(id)).tasks.filter(({ status }) => status === 'queued');
    expect((await requestor.explainTask(waits!.id)).reasons[0]).toMatchObject({
      code: 'key_busy',
      key: 'k',
      limit: 1,
      running: 1,
    });
    expect((await requestor.explainJob(id)).groups.map(({ reason }) => reason.code)).toContain('key_busy');
    const { queues } = await requestor.queues();
    expect(queues.find((queue) => queue.capability === capability)).toMatchObject({ ready: 1, limited: 1 });
    const before = Date.now();
    await server.call('POST', `/v1/tasks/${first.task.id}/complete`, {
      token: node.token,
      json: { output_cids: [] },
    });
    expect((await waiting).body.task.id).toBe(waits!.id);
    expect(Date.now() - before).toBeLessThan(4000);
  });
});
