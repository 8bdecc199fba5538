import { request as httpRequest, type IncomingMessage } from 'node:http';
import type { Json } from '@millrace/runner';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Harness, TIME, UUID, until, type TestNode } from '../harness.test.support.ts';

let server: Harness;
beforeAll(async () => {
  server = await Harness.open({ limits: { tasksPerJob: 20, jobBodyBytes: 8192, jsonBodyBytes: 4096 } });
});
afterAll(async () => {
  await server[Symbol.asyncDispose]();
});

const OTHER_DOMAIN = '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21';
const NOBODY = '2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10';

function task(more: Record<string, Json> = {}): Record<string, Json> {
  return { label: 'hello', capability: '/nobody/v1', meta: {}, ...more };
}

function submit(json: unknown, options: { headers?: Record<string, string>; token?: string } = {}) {
  return server.call('POST', '/v1/jobs', { json, ...options });
}

/** Leases the node's next task and completes it. */
async function work(node: TestNode): Promise<void> {
  const leased = await server.call('GET', '/v1/tasks', { token: node.token, headers: { prefer: 'wait=10' } });
  await server.call('POST', `/v1/tasks/${leased.body.task.id}/complete`, {
    token: node.token,
    json: { output_cids: [], meta: null },
  });
}

describe('submission', () => {
  test('a job and its tasks have every member of the wire', async () => {
    const { status, body } = await submit({
      label: 'demo',
      priority: 2,
      meta: { who: 'me' },
      tasks: [
        task({ label: 'a', stage: 'first', inputs_cids: [NOBODY], outputs_prefix: 'out', mode: 'dedicated' }),
        task({ label: 'b', stage: 'second', priority: -1, capability_filters: { gpu: 'yes' } }),
      ],
      edges: [{ from: 'first', to: 'second' }],
    });
    expect(status).toBe(200);
    expect(body).toEqual({ job_id: expect.stringMatching(UUID) });
    const answer = await server.call('GET', `/v1/jobs/${body.job_id}`);
    expect(answer.status).toBe(200);
    const taskShape = {
      id: expect.stringMatching(UUID),
      job_id: body.job_id,
      capability: '/nobody/v1',
      status: 'queued',
      organization_id: expect.stringMatching(UUID),
      attempts: 0,
      max_attempts: 3,
      lease_expires_at: null,
      reserved_by: null,
      meta: {},
      cancel_requested_at: null,
      last_heartbeat_at: null,
      created_at: expect.stringMatching(TIME),
      updated_at: expect.stringMatching(TIME),
      billing_units: null,
      estimated_credit_cost: null,
      debited_amount: null,
      debited_at: null,
      reason: null,
      not_before: null,
      output_cids: [],
      node_faults: 0,
      deadline_at: null,
    };
    expect(answer.body).toEqual({
      job: {
        id: body.job_id,
        label: 'demo',
        domain_id: server.dispatcher.defaultDomainId,
        status: 'pending',
        priority: 2,
        created_at: expect.stringMatching(TIME),
        updated_at: expect.stringMatching(TIME),
        organization_id: expect.stringMatching(UUID),
        meta: { who: 'me' },
        credit_lock_id: null,
        credit_lock_amount: null,
        credit_locked_at: null,
        credit_released_at: null,
        cancel_requested_at: null,
        deadline_at: null,
        edges: [{ from: 'first', to: 'second' }],
      },
      tasks_summary: { queued: 2, leased: 0, running: 0, completed: 0, failed: 0, canceled: 0 },
      tasks: [
        {
          ...taskShape,
          label: 'a',
          stage: 'first',
          capability_filters: {},
          deps_remaining: 0,
          priority: 2,
          inputs_cids: [NOBODY],
          outputs_prefix: 'out',
          mode: 'dedicated',
        },
        {
          ...taskShape,
          label: 'b',
          stage: 'second',
          capability_filters: { gpu: 'yes' },
          deps_remaining: 1,
          priority: -1,
          inputs_cids: [],
          outputs_prefix: null,
          mode: 'public',
        },
      ],
      receipts: [],
    });
  });

  test('a spec that breaks a rule is 400 and names what is wrong', async () => {
    const answer = await submit({ tasks: [] });
    expect(answer.status).toBe(400);
    expect(answer.body.error).toEqual({
      code: 'invalid_argument',
      message: expect.stringContaining('tasks'),
    });
    expect((await submit(undefined)).status).toBe(400);
    expect((await submit([])).status).toBe(400);
  });

  test('as many tasks as allowed are taken, one more is 400', async () => {
    const tasks = (count: number) => Array.from({ length: count }, () => task());
    expect((await submit({ tasks: tasks(20) })).status).toBe(200);
    expect((await submit({ tasks: tasks(21) })).status).toBe(400);
  });

  test('a body at jobBodyBytes is taken, one byte more is 413', async () => {
    const sized = (bytes: number) => {
      const text = JSON.stringify({ tasks: [task()], meta: { pad: '' } });
      return text.replace('"pad":""', `"pad":"${'x'.repeat(bytes - text.length)}"`);
    };
    expect((await server.call('POST', '/v1/jobs', { raw: sized(8192) })).status).toBe(200);
    const over = await server.call('POST', '/v1/jobs', { raw: sized(8193) });
    expect(over.status).toBe(413);
    expect(over.body.error).toEqual({
      code: 'resource_exhausted',
      message: 'the body must be at most 8192 bytes',
    });
  });

  test('an estimate has every member of the wire, costs nothing and submits nothing', async () => {
    await using own = await Harness.open();
    const json = {
      tasks: [task({ label: 'a', stage: 'one' }), task({ label: 'b', stage: 'two', mode: 'dedicated' })],
      edges: [{ from: 'one', to: 'two' }],
    };
    const estimated = { capability: '/nobody/v1', billing_units: '0', estimated_credit_cost: '0' };
    const answer = await own.call('POST', '/v1/jobs/estimate', { json });
    expect([answer.status, answer.body]).toEqual([
      200,
      {
        total: '0',
        tasks: [
          { label: 'a', stage: 'one', mode: 'public', ...estimated },
          { label: 'b', stage: 'two', mode: 'dedicated', ...estimated },
        ],
      },
    ]);
    expect((await own.call('GET', '/v1/jobs')).body.items).toEqual([]);
    expect((await own.call('POST', '/v1/jobs/estimate', { json: { tasks: [] } })).status).toBe(400);
    const token = await own.dispatcher.issueClientToken({ readOnly: true });
    expect((await own.call('POST', '/v1/jobs/estimate', { json, token })).status).toBe(401);
  });
});

describe('Idempotency-Key', () => {
  test('the same key and spec give the same job, another spec is 409, another subject is on its own', async () => {
    const headers = { 'idempotency-key': 'key-1' };
    const first = await submit({ tasks: [task()] }, { headers });
    const again = await submit({ tasks: [task()] }, { headers });
    expect(again.status).toBe(200);
    expect(again.body).toEqual(first.body);
    const other = await submit({ tasks: [task({ label: 'other' })] }, { headers });
    expect(other.status).toBe(409);
    expect(other.body.error.code).toBe('already_exists');
    const token = await server.dispatcher.issueClientToken({ subject: 'someone else' });
    const theirs = await submit({ tasks: [task({ label: 'other' })] }, { headers, token });
    expect(theirs.status).toBe(200);
    expect(theirs.body.job_id).not.toBe(first.body.job_id);
  });

  test('racing submissions with one key make one job', async () => {
    const headers = { 'idempotency-key': 'race' };
    const answers = await Promise.all(
      Array.from({ length: 20 }, () => submit({ tasks: [task()] }, { headers })),
    );
    expect(new Set(answers.map(({ body }) => body.job_id)).size).toBe(1);
  });

  test('128 visible characters are taken; 129, none and a blank are 400', async () => {
    const send = (key: string) => submit({ tasks: [task()] }, { headers: { 'idempotency-key': key } });
    expect((await send('~'.repeat(128))).status).toBe(200);
    expect((await send('~'.repeat(129))).status).toBe(400);
    expect((await send('')).status).toBe(400);
    expect((await send('a b')).status).toBe(400);
  });
});

describe('reading and ending', () => {
  test('the list pages from new to old and filters', async () => {
    await using own = await Harness.open();
    const ids: string[] = [];
    for (const capability of ['/a/v1', '/b/v1', '/a/v1']) ids.push(await own.submit({ capability }));
    const first = await own.call('GET', '/v1/jobs?limit=2');
    expect(first.body.items.map((item: { job: { id: string } }) => item.job.id)).toEqual([ids[2], ids[1]]);
    expect(first.body.items[0]).toEqual({
      job: expect.objectContaining({ id: ids[2], status: 'pending' }),
      tasks_summary: { queued: 1, leased: 0, running: 0, completed: 0, failed: 0, canceled: 0 },
    });
    const rest = await own.call(
      'GET',
      `/v1/jobs?limit=2&cursor=${encodeURIComponent(first.body.next_cursor)}`,
    );
    expect(rest.body.items.map((item: { job: { id: string } }) => item.job.id)).toEqual([ids[0]]);
    expect(rest.body.next_cursor).toBeNull();
    const only = await own.call(
      'GET',
      '/v1/jobs?capabilities=/b/v1&status=pending&match_all_capabilities=true',
    );
    expect(only.body.items).toHaveLength(1);
    expect((await own.call('GET', '/v1/jobs?status=completed')).body.items).toEqual([]);
  });

  test('a cursor leads through all jobs once, whatever is submitted meanwhile, and the filters go with it', async () => {
    await using own = await Harness.open();
    const ids: string[] = [];
    for (let i = 0; i < 7; i += 1)
      ids.unshift(await own.submit({ capability: i % 2 === 0 ? '/a/v1' : '/b/v1' }));
    const pages = async (query: string): Promise<string[]> => {
      const seen: string[] = [];
      let cursor: string | null = null;
      do {
        const more: string = cursor === null ? '' : `&cursor=${encodeURIComponent(cursor)}`;
        const { status, body } = await own.call('GET', `/v1/jobs?${query}${more}`);
        expect(status).toBe(200);
        expect(body.items.length).toBeLessThanOrEqual(2);
        seen.push(...body.items.map((item: { job: { id: string } }) => item.job.id));
        cursor = body.next_cursor;
        await own.submit({ capability: '/c/v1' });
      } while (cursor !== null);
      return seen;
    };
    const isOurs = (id: string): boolean => ids.includes(id);
    expect((await pages('limit=2')).filter(isOurs)).toEqual(ids);
    expect(await pages('limit=2&capabilities=%2Fa%2Fv1')).toEqual(ids.filter((_, index) => index % 2 === 0));
    expect((await pages('limit=2&capabilities=%2Fa%2Fv1&capabilities=%2Fb%2Fv1')).filter(isOurs)).toEqual(
      ids,
    );
    expect(
      await pages('limit=2&capabilities=%2Fa%2Fv1&capabilities=%2Fb%2Fv1&match_all_capabilities=true'),
    ).toEqual([]);
    const domain = own.dispatcher.defaultDomainId;
    expect((await pages(`limit=2&domain_id=${domain}`)).filter(isOurs)).toEqual(ids);
    expect(await pages(`limit=2&domain_id=${OTHER_DOMAIN}`)).toEqual([]);
  });

  test.each([
    ['cursor=x'],
    ['cursor='],
    ['limit=0'],
    ['limit=101'],
    ['limit=x'],
    ['status=done'],
    ['domain_id=x'],
    ['match_all_capabilities=1'],
  ])('a list with %s is 400', async (query) => {
    expect((await server.call('GET', `/v1/jobs?${query}`)).status).toBe(400);
  });

  test('a list with limit=100 is taken', async () => {
    expect((await server.call('GET', '/v1/jobs?limit=100')).status).toBe(200);
  });

  test('cancel ends a queued job, and again changes nothing', async () => {
    const id = await server.submit();
    const answer = await server.call('POST', `/v1/jobs/${id}/cancel`);
    expect(answer.status).toBe(200);
    expect(answer.body).toEqual({ id, status: 'canceled', updated_at: expect.stringMatching(TIME) });
    expect((await server.call('POST', `/v1/jobs/${id}/cancel`)).body).toEqual(answer.body);
  });

  test('an empty JSON body is as good as none', async () => {
    const id = await server.submit();
    const answer = await server.call('POST', `/v1/jobs/${id}/cancel`, { raw: '' });
    expect(answer.status).toBe(200);
  });

  test('delete removes a job that is not leased, and is 409 while it is', async () => {
    const node = await server.joinNode({ capabilities: ['/delete/v1'] });
    const id = await server.submit({ capability: '/delete/v1' });
    await server.call('GET', '/v1/tasks', { token: node.token });
    const refused = await server.call('DELETE', `/v1/jobs/${id}`);
    expect(refused.status).toBe(409);
    expect(refused.body.error.code).toBe('failed_precondition');
    const free = await server.submit();
    expect((await server.call('DELETE', `/v1/jobs/${free}`)).status).toBe(204);
    expect((await server.call('GET', `/v1/jobs/${free}`)).status).toBe(404);
    expect((await server.call('DELETE', `/v1/jobs/${free}`)).status).toBe(404);
  });

  test.each([
    ['GET', ''],
    ['POST', '/cancel'],
    ['DELETE', ''],
    ['GET', '/events'],
  ] as const)('%s of an unknown job%s is 404, of no id 400', async (method, suffix) => {
    expect((await server.call(method, `/v1/jobs/${NOBODY}${suffix}`)).status).toBe(404);
    expect((await server.call(method, `/v1/jobs/nonsense${suffix}`)).status).toBe(400);
  });

  test('busy nodes are listed with what they do, from the lease to its end, by mode', async () => {
    await using own = await Harness.open();
    const busy = async (query = ''): Promise<unknown[]> => {
      const answer = await own.call('GET', `/v1/nodes/busy${query}`);
      expect(answer.status).toBe(200);
      return answer.body.nodes;
    };
    const node = await own.joinNode({ capabilities: ['/busy/v1'] });
    expect(await busy()).toEqual([]);
    const jobId = await own.submit({ capability: '/busy/v1' });
    const leased = await own.call('GET', '/v1/tasks', { token: node.token });
    const { id } = leased.body.task;
    const entry = {
      node_id: node.id,
      task_id: id,
      task_status: 'leased',
      task_mode: 'public',
      job_id: jobId,
      job_status: 'running',
    };
    for (const query of ['', '?mode=all', '?mode=public']) expect(await busy(query)).toEqual([entry]);
    expect(await busy('?mode=dedicated')).toEqual([]);
    await own.call('POST', `/v1/tasks/${id}/heartbeat`, {
      token: node.token,
      json: { progress: {}, events: [] },
    });
    expect(await busy()).toEqual([{ ...entry, task_status: 'running' }]);
    await own.call('POST', `/v1/tasks/${id}/complete`, {
      token: node.token,
      json: { output_cids: [], meta: null },
    });
    expect(await busy()).toEqual([]);
  });

  test('busy nodes: an unknown mode is 400, no token 401, a token of a node 403', async () => {
    expect((await server.call('GET', '/v1/nodes/busy?mode=idle')).status).toBe(400);
    expect((await server.call('GET', '/v1/nodes/busy', { token: null })).status).toBe(401);
    const { token } = await server.joinNode();
    expect((await server.call('GET', '/v1/nodes/busy', { token })).status).toBe(403);
  });
});

describe('tokens', () => {
  test('a token for one domain sees and makes jobs there and nowhere else', async () => {
    const token = await server.dispatcher.issueClientToken({ domainId: OTHER_DOMAIN });
    const here = await submit({ tasks: [task()] }, { token });
    const job = await server.call('GET', `/v1/jobs/${here.body.job_id}`, { token });
    expect(job.body.job.domain_id).toBe(OTHER_DOMAIN);
    const there = await server.submit();
    for (const [method, path] of [
      ['GET', `/v1/jobs/${there}`],
      ['POST', `/v1/jobs/${there}/cancel`],
      ['DELETE', `/v1/jobs/${there}`],
      ['GET', `/v1/jobs/${there}/events`],
      ['GET', `/v1/jobs?domain_id=${server.dispatcher.defaultDomainId}`],
    ] as const) {
      const answer = await server.call(method, path, { token });
      expect([path, answer.status]).toEqual([path, 403]);
    }
    const wrong = await submit({ domain_id: server.dispatcher.defaultDomainId, tasks: [task()] }, { token });
    expect(wrong.status).toBe(403);
    const { body } = await server.call('GET', '/v1/jobs', { token });
    expect(body.items.map((item: { job: { id: string } }) => item.job.id)).toEqual([here.body.job_id]);
    expect((await server.call('GET', `/v1/jobs/${there}`)).body.job.status).toBe('pending');
  });

  test('a token for one domain may not add nodes', async () => {
    const token = await server.dispatcher.issueClientToken({ domainId: OTHER_DOMAIN });
    const answer = await server.call('POST', '/api/v1/nodes', { token, json: { name: 'x', mode: 'public' } });
    expect(answer.status).toBe(403);
  });

  test('a read-only token reads, and is 401 for everything that changes', async () => {
    const token = await server.dispatcher.issueClientToken({ readOnly: true });
    const id = await server.submit();
    expect((await server.call('GET', `/v1/jobs/${id}`, { token })).status).toBe(200);
    for (const [method, path, json] of [
      ['POST', '/v1/jobs', { tasks: [task()] }],
      ['POST', `/v1/jobs/${id}/cancel`, undefined],
      ['DELETE', `/v1/jobs/${id}`, undefined],
      ['POST', '/api/v1/nodes', { name: 'x', mode: 'public' }],
    ] as const) {
      const answer = await server.call(method, path, { token, json });
      expect([path, answer.status]).toEqual([path, 401]);
    }
    expect((await server.call('GET', `/v1/jobs/${id}`)).body.job.status).toBe('pending');
  });

  test("a node token and the domain token of a lease are not the requestor's", async () => {
    const node = await server.joinNode({ capabilities: ['/kinds/v1'] });
    await server.submit({ capability: '/kinds/v1' });
    const leased = await server.call('GET', '/v1/tasks', { token: node.token });
    for (const token of [node.token, leased.body.access_token]) {
      expect((await submit({ tasks: [task()] }, { token })).status).toBe(403);
      expect((await server.call('GET', '/v1/nodes', { token })).status).toBe(403);
    }
  });

  test('an expired token is 401', async () => {
    const token = await server.dispatcher.issueClientToken({ ttlSecs: 1 });
    expect((await server.call('GET', '/v1/jobs', { token })).status).toBe(200);
    await until(async () => (await server.call('GET', '/v1/jobs', { token })).status === 401);
    const answer = await server.call('GET', '/v1/jobs', { token });
    expect(answer.body.error.message).toContain('expired');
    expect(answer.header('www-authenticate')).toBe('Bearer');
  });
});

describe('adding nodes', () => {
  test('the answer has the id, the secret and the credentials for REG_SECRET', async () => {
    const answer = await server.call('POST', '/api/v1/nodes', { json: { name: 'n1', mode: 'dedicated' } });
    expect(answer.status).toBe(201);
    expect(answer.body).toEqual({
      id: expect.stringMatching(UUID),
      name: 'n1',
      mode: 'dedicated',
      organization_id: expect.stringMatching(UUID),
      registration_secret: expect.stringMatching(/^[\w-]{43}$/),
      registration_credentials: expect.any(String),
    });
    expect(Buffer.from(answer.body.registration_credentials, 'base64').toString()).toBe(
      `${answer.body.id}:${answer.body.registration_secret}`,
    );
  });

  test('a name of 128 characters is taken, 129, none and an unknown mode are 400', async () => {
    const add = (json: unknown) => server.call('POST', '/api/v1/nodes', { json });
    expect((await add({ name: 'n'.repeat(128) })).status).toBe(201);
    expect((await add({ name: 'n'.repeat(129) })).status).toBe(400);
    expect((await add({})).status).toBe(400);
    expect((await add({ name: 'n', mode: 'secret' })).status).toBe(400);
  });
});

describe('events', () => {
  test('a page has the events after a number, and says where it ends', async () => {
    const node = await server.joinNode({ capabilities: ['/events/v1'] });
    const id = await server.submit({ capability: '/events/v1' });
    await work(node);
    const { body } = await server.call('GET', `/v1/jobs/${id}/events`);
    expect(body.items.map((event: { seq: number }) => event.seq)).toEqual(
      body.items.map((_: unknown, index: number) => index + 1),
    );
    expect(body.items[0]).toEqual({
      seq: 1,
      at: expect.stringMatching(TIME),
      kind: 'job.submitted',
      task_id: null,
      data: expect.any(Object),
    });
    expect(body.items.at(-1).kind).toBe('job.completed');
    const page = await server.call('GET', `/v1/jobs/${id}/events?after=2&limit=1`);
    expect(page.body).toEqual({ items: [body.items[2]], next_after: 3 });
    const last = body.items.length;
    const end = await server.call('GET', `/v1/jobs/${id}/events?after=${last}`);
    expect(end.body).toEqual({ items: [], next_after: last });
    expect((await server.call('GET', `/v1/jobs/${id}/events?after=${last + 1}`)).status).toBe(400);
    expect((await server.call('GET', `/v1/jobs/${id}/events?after=-1`)).status).toBe(400);
    expect((await server.call('GET', `/v1/jobs/${id}/events?limit=1001`)).status).toBe(400);
    expect((await server.call('GET', `/v1/jobs/${id}/events?limit=1000`)).status).toBe(200);
  });

  test('the stream goes from the past into the present and ends with the job', async () => {
    const node = await server.joinNode({ capabilities: ['/stream/v1'] });
    const id = await server.submit({ capability: '/stream/v1' });
    const stream = await openStream(id);
    expect(stream.response.headers['content-type']).toBe('text/event-stream; charset=utf-8');
    await until(() => stream.events.length >= 1);
    await work(node);
    await stream.ended;
    const { body } = await server.call('GET', `/v1/jobs/${id}/events`);
    expect(stream.events).toEqual(body.items);
    expect(stream.ids).toEqual(body.items.map((event: { seq: number }) => String(event.seq)));
  });

  test('Last-Event-ID resumes without gap and repeat, and after the end it is 204', async () => {
    const node = await server.joinNode({ capabilities: ['/resume/v1'] });
    const id = await server.submit({ capability: '/resume/v1' });
    await work(node);
    const { body } = await server.call('GET', `/v1/jobs/${id}/events`);
    const resumed = await openStream(id, { 'last-event-id': '2' });
    await resumed.ended;
    expect(resumed.events).toEqual(body.items.slice(2));
    const done = await server.call('GET', `/v1/jobs/${id}/events`, {
      headers: { accept: 'text/event-stream', 'last-event-id': String(body.items.length) },
    });
    expect(done.status).toBe(204);
  });

  test('streams opened at any moment while events are written miss none', async () => {
    const node = await server.joinNode({ capabilities: ['/busy-stream/v1'] });
    const id = await server.submit({ capability: '/busy-stream/v1' });
    const leased = await server.call('GET', '/v1/tasks', { token: node.token });
    const path = `/v1/tasks/${leased.body.task.id}`;
    const streams: Awaited<ReturnType<typeof openStream>>[] = [];
    for (let index = 0; index < 30; index += 1) {
      const beat = server.call('POST', `${path}/heartbeat`, {
        token: node.token,
        json: { progress: { index }, events: [{ index }, { index, second: true }] },
      });
      if (index % 5 === 0) streams.push(await openStream(id));
      if (index % 7 === 0) streams.push(await openStream(id, { 'last-event-id': '3' }));
      await beat;
    }
    await server.call('POST', `${path}/complete`, {
      token: node.token,
      json: { output_cids: [], meta: null },
    });
    await Promise.all(streams.map(({ ended }) => ended));
    const { body } = await server.call('GET', `/v1/jobs/${id}/events`);
    for (const stream of streams) {
      const from = stream.events[0].seq - 1;
      expect([0, 3]).toContain(from);
      expect(stream.events).toEqual(body.items.slice(from));
    }
  });

  test('a stream whose client left holds nothing', async () => {
    const id = await server.submit();
    const stream = await openStream(id);
    stream.response.destroy();
    await stream.ended;
    // The job goes on without it, and another stream reads on.
    await server.call('POST', `/v1/jobs/${id}/cancel`);
    const other = await openStream(id);
    await other.ended;
    expect(other.events.at(-1).kind).toBe('job.canceled');
  });

  test('a deleted job ends its streams', async () => {
    const id = await server.submit();
    const stream = await openStream(id);
    await until(() => stream.events.length >= 1);
    expect((await server.call('DELETE', `/v1/jobs/${id}`)).status).toBe(204);
    await stream.ended;
  });
});

/** A raw event stream, as a browser would read it. */
async function openStream(jobId: string, headers: Record<string, string> = {}) {
  const response = await new Promise<IncomingMessage>((resolve, reject) => {
    httpRequest(`${server.dispatcher.url}/v1/jobs/${jobId}/events`, {
      headers: { accept: 'text/event-stream', authorization: `Bearer ${server.clientToken}`, ...headers },
      agent: false,
    })
      .on('response', resolve)
      .on('error', reject)
      .end();
  });
  expect(response.statusCode).toBe(200);
  const events: any[] = []; // eslint-disable-line typescript/no-explicit-any -- compared as JSON
  const ids: string[] = [];
  let text = '';
  response.setEncoding('utf8').on('data', (chunk: string) => {
    text += chunk;
    for (let end = text.indexOf('\n\n'); end >= 0; end = text.indexOf('\n\n')) {
      const lines = text.slice(0, end).split('\n');
      text = text.slice(end + 2);
      for (const line of lines) {
        if (line.startsWith('id: ')) ids.push(line.slice(4));
        else if (line.startsWith('data: ')) events.push(JSON.parse(line.slice(6)));
        else expect(line).toMatch(/^:/);
      }
    }
  });
  const ended = new Promise<void>((resolve) => {
    response.on('close', resolve).on('error', () => resolve());
  });
  return { response, events, ids, ended };
}
