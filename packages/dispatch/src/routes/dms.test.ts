import { connect } from 'node:net';
import { parseLease, type Json } from '@millrace/runner';
import { SimulatedClock } from '@millrace/runner/testing';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Harness, TIME, UUID, until, type CallOptions, type TestNode } from '../harness.test.support.ts';

const HELLO = '/examples/hello/v1';

let server: Harness;
beforeAll(async () => {
  server = await Harness.open({
    limits: { batchItems: 8, progressBytes: 1024, eventsPerHeartbeat: 4, longPollSecs: 30 },
  });
});
afterAll(async () => {
  await server[Symbol.asyncDispose]();
});

let counter = 0;
/** A capability of its own keeps a test's tasks from the nodes of other tests. */
function capabilityOfItsOwn(): string {
  counter += 1;
  return `/test/${counter}/v1`;
}

/** A node, a job of one task for it, and calls as that node. */
async function scene(options: { maxConcurrency?: number; task?: Record<string, Json> } = {}) {
  const capability = capabilityOfItsOwn();
  const node = await server.joinNode({
    capabilities: [capability],
    maxConcurrency: options.maxConcurrency ?? 4,
  });
  const submit = (task: Record<string, Json> = {}) => server.submit({ capability, ...options.task, ...task });
  const jobId = await submit();
  return { capability, node, jobId, submit, as: callsAs(node) };
}

function callsAs(node: TestNode) {
  const call = (method: 'GET' | 'POST', path: string, options: CallOptions = {}) =>
    server.call(method, path, { token: node.token, ...options });
  return {
    call,
    lease: (headers: Record<string, string> = {}) => call('GET', '/v1/tasks', { headers }),
    post: (taskId: string, verb: string, json: unknown, headers: Record<string, string> = {}) =>
      call('POST', `/v1/tasks/${taskId}/${verb}`, { json, headers }),
    heartbeat: (taskId: string, headers: Record<string, string> = {}) =>
      call('POST', `/v1/tasks/${taskId}/heartbeat`, { json: { progress: {}, events: [] }, headers }),
  };
}

describe('lease', () => {
  test('200 carries every member of the wire', async () => {
    const { capability, node, jobId, as } = await scene({
      task: {
        capability_filters: { gpu: 'yes' },
        inputs_cids: ['2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10'],
        outputs_prefix: 'hello-demo/',
        meta: { message: 'hi' },
        priority: -3,
      },
    });
    // The filter asks for a label, so the node tells it.
    const labelled = await server.joinNode({ capabilities: [capability], labels: { gpu: 'yes' } });
    expect((await as.lease()).status).toBe(204);
    const answer = await callsAs(labelled).lease();
    expect(answer.status).toBe(200);
    expect(answer.header('millrace-lease-id')).toMatch(UUID);
    expect(answer.body).toEqual({
      access_token: expect.any(String),
      access_token_expires_at: expect.stringMatching(TIME),
      lease_expires_at: expect.stringMatching(TIME),
      cancel: false,
      status: 'leased',
      domain_id: server.dispatcher.defaultDomainId,
      domain_server_url: server.dispatcher.url,
      task: {
        id: expect.stringMatching(UUID),
        job_id: jobId,
        capability,
        capability_filters: { gpu: 'yes' },
        inputs_cids: ['2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10'],
        outputs_prefix: 'hello-demo/',
        label: 'hello',
        stage: 'hello',
        meta: { message: 'hi' },
        priority: -3,
        attempts: 1,
        max_attempts: 3,
        deps_remaining: 0,
        status: 'leased',
        mode: 'public',
        organization_filter: expect.stringMatching(UUID),
        billing_units: null,
        estimated_credit_cost: null,
        debited_amount: null,
        debited_at: null,
        lease_expires_at: answer.body.lease_expires_at,
      },
    });
    expect(parseLease(answer.body)).toEqual(answer.body);
    expect(node.id).not.toBe(labelled.id);
  });

  test('the domain token has the claims newer nodes look for, and outlives the lease', async () => {
    const { as, node } = await scene({ task: { outputs_prefix: 'out' } });
    const answer = await as.lease();
    const claims = JSON.parse(Buffer.from(answer.body.access_token.split('.')[1], 'base64url').toString());
    expect(claims).toEqual({
      iss: 'dds',
      sub: node.id,
      aud: [server.dispatcher.url],
      token_use: 'lease',
      domain_id: server.dispatcher.defaultDomainId,
      scopes: ['domain-data:rw'],
      node_id: node.id,
      task_id: answer.body.task.id,
      lease_id: answer.header('millrace-lease-id'),
      prefix: 'out',
      iat: expect.any(Number),
      exp: expect.any(Number),
    });
    expect(claims.exp - claims.iat).toBe(180);
    expect(Date.parse(answer.body.access_token_expires_at)).toBe(claims.exp * 1000);
    expect(claims.exp * 1000).toBeGreaterThan(Date.parse(answer.body.lease_expires_at));
  });

  test('204 without a body when there is no work', async () => {
    const node = await server.joinNode({ capabilities: [capabilityOfItsOwn()] });
    const answer = await callsAs(node).lease();
    expect(answer.status).toBe(204);
    expect(answer.text).toBe('');
  });

  test('409 when the node holds as many leases as it may', async () => {
    const { as, submit } = await scene({ maxConcurrency: 1 });
    await submit();
    expect((await as.lease()).status).toBe(200);
    const busy = await as.lease();
    expect(busy.status).toBe(409);
    expect(busy.body.error.code).toBe('failed_precondition');
  });

  test('the capability filter chooses among what the node registered', async () => {
    const [one, two] = [capabilityOfItsOwn(), capabilityOfItsOwn()];
    const node = await server.joinNode({ capabilities: [one, two], maxConcurrency: 4 });
    await server.submit({ capability: one });
    const other = await callsAs(node).call('GET', `/v1/tasks?capability=${encodeURIComponent(two)}`);
    expect(other.status).toBe(204);
    const both = await callsAs(node).call(
      'GET',
      `/v1/tasks?capability=${encodeURIComponent(two)}&capability=${encodeURIComponent(one)}`,
    );
    expect(both.body.task.capability).toBe(one);
  });

  test('millrace-start: 1 gives a task that is running', async () => {
    const { as } = await scene();
    const answer = await as.lease({ 'millrace-start': '1' });
    expect(answer.body.status).toBe('running');
    expect(answer.body.task.status).toBe('running');
  });

  test('the node is seen to have asked', async () => {
    const { as, node } = await scene();
    await as.lease();
    await until(async () => (await server.store.getNode(node.id))?.last_seen_at !== null);
  });

  test('doubled and trailing slashes lead to the same place', async () => {
    const { as } = await scene();
    expect((await as.call('GET', '//v1//tasks/')).status).toBe(200);
  });

  test('HEAD takes no lease', async () => {
    const { as, node } = await scene();
    const head = await server.call('HEAD', '/v1/tasks', { token: node.token });
    expect(head.status).toBe(405);
    expect((await as.lease()).status).toBe(200);
  });

  test('no token, a client token and the domain token of a lease are refused', async () => {
    const { as } = await scene();
    const leased = await as.lease();
    for (const [token, status] of [
      [null, 401],
      ['nonsense', 401],
      [server.clientToken, 403],
      [leased.body.access_token, 403],
    ] as const) {
      const answer = await server.call('GET', '/v1/tasks', { token });
      expect(answer.status).toBe(status);
      expect(answer.body.error.message).not.toContain('nonsense');
    }
  });
});

describe('long poll', () => {
  test('answers as soon as work is submitted', async () => {
    const capability = capabilityOfItsOwn();
    const as = callsAs(await server.joinNode({ capabilities: [capability] }));
    const waiting = as.lease({ prefer: 'wait=20' });
    await until(waitersOf(1));
    const startedAt = performance.now();
    await server.submit({ capability });
    const answer = await waiting;
    expect(answer.status).toBe(200);
    expect(answer.header('preference-applied')).toBe('wait=20');
    expect(performance.now() - startedAt).toBeLessThan(5_000);
  });

  test('answers 204 when the time is up, and cuts the wait to what the server offers', async () => {
    const as = callsAs(await server.joinNode({ capabilities: [capabilityOfItsOwn()] }));
    const answer = await as.lease({ prefer: 'respond-async, wait=1' });
    expect(answer.status).toBe(204);
    expect(answer.header('preference-applied')).toBe('wait=1');
    const controller = new AbortController();
    const long = as.call('POST', '/v1/tasks/watch', {
      json: { lease_ids: ['2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10'] },
      headers: { prefer: 'wait=100000' },
    });
    // That lease is nobody's, so the watch tells at once; the header tells the bound.
    expect((await long).header('preference-applied')).toBe('wait=30');
    controller.abort();
  });

  test("a task that becomes runnable by a completion wakes the next stage's node", async () => {
    const [first, second] = [capabilityOfItsOwn(), capabilityOfItsOwn()];
    const one = callsAs(await server.joinNode({ capabilities: [first] }));
    const two = callsAs(await server.joinNode({ capabilities: [second] }));
    const { body } = await server.call('POST', '/v1/jobs', {
      json: {
        tasks: [
          { stage: 'a', capability: first },
          { stage: 'b', capability: second },
        ],
        edges: [{ from: 'a', to: 'b' }],
      },
    });
    const waiting = two.lease({ prefer: 'wait=20' });
    const leased = await one.lease();
    await one.post(leased.body.task.id, 'complete', { output_cids: [], meta: null });
    const answer = await waiting;
    expect(answer.status).toBe(200);
    expect(answer.body.task).toMatchObject({ job_id: body.job_id, stage: 'b' });
  });

  test('of many waiting nodes each task goes to exactly one, and all tasks are taken', async () => {
    const capability = capabilityOfItsOwn();
    const nodes = await Promise.all(
      Array.from({ length: 12 }, () => server.joinNode({ capabilities: [capability] })),
    );
    const waiting = nodes.map((node) => callsAs(node).lease({ prefer: 'wait=20' }));
    await until(waitersOf(12));
    const { body } = await server.call('POST', '/v1/jobs', {
      json: { tasks: Array.from({ length: 12 }, () => ({ label: 'same', capability })) },
    });
    const answers = await Promise.all(waiting);
    expect(answers.map(({ status }) => status)).toEqual(Array.from({ length: 12 }, () => 200));
    expect(new Set(answers.map((answer) => answer.body.task.id)).size).toBe(12);
    expect(answers.every((answer) => answer.body.task.job_id === body.job_id)).toBe(true);
  });

  test('a client that goes away while waiting takes no task', async () => {
    const capability = capabilityOfItsOwn();
    const as = callsAs(await server.joinNode({ capabilities: [capability] }));
    const controller = new AbortController();
    const gone = as.call('GET', '/v1/tasks', { headers: { prefer: 'wait=20' }, signal: controller.signal });
    await until(waitersOf(1));
    controller.abort(new Error('gone'));
    await expect(gone).rejects.toThrow('gone');
    await until(waitersOf(0));
    await server.submit({ capability });
    const answer = await as.lease();
    expect(answer.status).toBe(200);
    expect(answer.body.task.attempts).toBe(1);
  });

  test('leases granted to a client that did not live to read them are given back', async () => {
    const capability = capabilityOfItsOwn();
    const node = await server.joinNode({ capabilities: [capability], maxConcurrency: 64 });
    const ids = await Promise.all(Array.from({ length: 40 }, () => server.submit({ capability })));
    const { hostname, port } = new URL(server.dispatcher.url);
    // Forty requests, each cut off right after it was sent: some before the store is asked, some after.
    await Promise.all(
      ids.map(
        () =>
          new Promise<void>((resolve) => {
            const socket = connect(Number(port), hostname, () => {
              socket.write(
                `GET /v1/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${node.token}\r\n\r\n`,
                () => setImmediate(() => socket.resetAndDestroy()),
              );
            });
            socket.on('close', () => resolve());
            socket.on('error', () => resolve());
          }),
      ),
    );
    const leased = async () => {
      const details = await Promise.all(ids.map((id) => server.store.getJob(id)));
      return details.filter((detail) => detail!.tasks[0]!.status === 'leased').length;
    };
    // Well before the leases expire by themselves.
    await until(async () => (await leased()) === 0, 5_000);
  });
});

describe('heartbeat', () => {
  test('the answer has every member of the wire, and the task is running', async () => {
    const { as, jobId } = await scene();
    const leased = await as.lease();
    const { id } = leased.body.task;
    const answer = await as.heartbeat(id);
    expect(answer.status).toBe(200);
    expect(answer.body).toEqual({
      access_token: leased.body.access_token,
      access_token_expires_at: leased.body.access_token_expires_at,
      lease_expires_at: expect.stringMatching(TIME),
      cancel: false,
      status: 'running',
      domain_id: server.dispatcher.defaultDomainId,
      domain_server_url: server.dispatcher.url,
      task_id: id,
      job_id: jobId,
      attempts: 1,
      max_attempts: 3,
      deps_remaining: 0,
    });
  });

  test('the domain token stays the same while two thirds of its life are left, then it is a fresh one', async () => {
    const clock = new SimulatedClock();
    await using own = await Harness.open({ clock, leaseTtlMs: 600_000 });
    const node = await own.joinNode();
    await own.submit();
    const leased = await own.call('GET', '/v1/tasks', { token: node.token });
    const path = `/v1/tasks/${leased.body.task.id}/heartbeat`;
    const beat = async () =>
      (await own.call('POST', path, { token: node.token, json: { progress: {}, events: [] } })).body;
    // Twice the lease, as that is longer than three minutes.
    expect(leased.body.access_token_expires_at).toBe(new Date(clock.now() + 1_200_000).toISOString());
    await clock.advance(400_000);
    expect((await beat()).access_token).toBe(leased.body.access_token);
    await clock.advance(1_000);
    const rotated = await beat();
    expect(rotated.access_token).not.toBe(leased.body.access_token);
    expect(rotated.access_token_expires_at).toBe(new Date(clock.now() + 1_200_000).toISOString());
    expect((await beat()).access_token).toBe(rotated.access_token);
  });

  test('progress and events are kept', async () => {
    const { as, jobId } = await scene();
    const { id } = (await as.lease()).body.task;
    await as.post(id, 'heartbeat', {
      progress: { pct: 40, stage: 'upload' },
      events: [{ level: 'info', message: 'inputs ready' }],
    });
    const { body } = await server.call('GET', `/v1/jobs/${jobId}`);
    expect(body.tasks[0].meta).toMatchObject({ progress: { pct: 40, stage: 'upload' } });
    const events = await server.call('GET', `/v1/jobs/${jobId}/events`);
    expect(events.body.items.map((event: { kind: string }) => event.kind)).toContain('task.log');
  });

  test('the lease id may be sent, and a wrong one is 409', async () => {
    const { as } = await scene();
    const leased = await as.lease();
    const { id } = leased.body.task;
    const right = { 'millrace-lease-id': leased.header('millrace-lease-id')! };
    expect((await as.heartbeat(id, right)).status).toBe(200);
    const wrong = { 'millrace-lease-id': '2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10' };
    expect((await as.heartbeat(id, wrong)).status).toBe(409);
    expect((await as.heartbeat(id, { 'millrace-lease-id': 'x' })).status).toBe(400);
  });

  test('a progress value at its limit is taken, one byte more is 413 and names the limit', async () => {
    const { as } = await scene();
    const { id } = (await as.lease()).body.task;
    const send = (progress: string, events: Json[] = []) => as.post(id, 'heartbeat', { progress, events });
    expect((await send('x'.repeat(1024 - 2))).status).toBe(200);
    const over = await send('x'.repeat(1024 - 1));
    expect(over.status).toBe(413);
    expect(over.body.error.message).toContain('progressBytes');
    expect((await send('', ['x'.repeat(1024 - 2)])).status).toBe(200);
    expect((await send('', ['x'.repeat(1024 - 1)])).status).toBe(413);
  });

  test('as many events as allowed are taken, one more is 413 and names the limit', async () => {
    const { as } = await scene();
    const { id } = (await as.lease()).body.task;
    const send = (count: number) =>
      as.post(id, 'heartbeat', { progress: {}, events: Array.from({ length: count }, () => 'event') });
    expect((await send(4)).status).toBe(200);
    const over = await send(5);
    expect(over.status).toBe(413);
    expect(over.body.error.message).toContain('eventsPerHeartbeat');
  });

  test('cancel is told in the answer', async () => {
    const { as, jobId } = await scene();
    const { id } = (await as.lease()).body.task;
    await as.heartbeat(id);
    await server.call('POST', `/v1/jobs/${jobId}/cancel`);
    expect((await as.heartbeat(id)).body.cancel).toBe(true);
  });
});

describe('endings', () => {
  test('complete is accepted, repeats are harmless, and the job has the receipt', async () => {
    const { as, jobId, node, capability } = await scene();
    const leased = await as.lease();
    const { id } = leased.body.task;
    const body = {
      output_cids: ['0d6c1c6e-3f0c-4c63-8c37-6c1b0a5f2a90'],
      meta: { job: { task_id: id, job_id: jobId, domain_id: null, capability }, artifacts: [] },
    };
    for (let round = 0; round < 2; round += 1) {
      const answer = await as.post(id, 'complete', body);
      expect(answer.status).toBe(200);
      expect(answer.body).toEqual({ task_id: id, lease_id: leased.header('millrace-lease-id') });
    }
    const job = await server.call('GET', `/v1/jobs/${jobId}`);
    expect(job.body.job.status).toBe('completed');
    expect(job.body.receipts).toEqual([
      expect.objectContaining({
        id: leased.header('millrace-lease-id'),
        job_id: jobId,
        task_id: id,
        node_id: node.id,
        outputs: body.output_cids,
        meta: body.meta,
        outcome: 'completed',
        created_at: expect.stringMatching(TIME),
      }),
    ]);
  });

  test('fail makes the task wait for another try', async () => {
    const { as, jobId } = await scene();
    const { id } = (await as.lease()).body.task;
    const answer = await as.post(id, 'fail', { reason: 'runner failed: no', details: { a: 1 } });
    expect(answer.status).toBe(200);
    const { tasks, receipts } = (await server.call('GET', `/v1/jobs/${jobId}`)).body;
    expect(tasks[0]).toMatchObject({ status: 'queued', attempts: 1, reason: 'runner failed: no' });
    expect(receipts[0]).toMatchObject({ outcome: 'failed', meta: { a: 1 } });
  });

  test('fail with details.retryable false ends the task', async () => {
    const { as, jobId } = await scene();
    const { id } = (await as.lease()).body.task;
    await as.post(id, 'fail', { reason: 'bad input', details: { retryable: false } });
    const { job, tasks } = (await server.call('GET', `/v1/jobs/${jobId}`)).body;
    expect(tasks[0].status).toBe('failed');
    expect(job.status).toBe('failed');
  });

  test('fail with node_setup_failed does not count as an attempt', async () => {
    const { as, jobId } = await scene();
    const { id } = (await as.lease()).body.task;
    await as.post(id, 'fail', {
      reason: 'node_setup_failed',
      details: { stage: 'build_ports', error: 'lease missing domain_id' },
    });
    const { tasks } = (await server.call('GET', `/v1/jobs/${jobId}`)).body;
    expect(tasks[0]).toMatchObject({ status: 'queued', attempts: 0, node_faults: 1 });
  });

  test('a reason longer than 4096 bytes is cut and not refused', async () => {
    const { as, jobId } = await scene();
    const { id } = (await as.lease()).body.task;
    expect((await as.post(id, 'fail', { reason: 'é'.repeat(4000) })).status).toBe(200);
    const { tasks } = (await server.call('GET', `/v1/jobs/${jobId}`)).body;
    expect(Buffer.byteLength(tasks[0].reason)).toBeLessThanOrEqual(4096);
    expect(tasks[0].reason).toMatch(/^é+…$/);
  });

  test('release gives the task back without counting the attempt', async () => {
    const { as, jobId } = await scene();
    const { id } = (await as.lease()).body.task;
    expect((await as.post(id, 'release', { reason: 'shutdown' })).status).toBe(200);
    const { tasks } = (await server.call('GET', `/v1/jobs/${jobId}`)).body;
    expect(tasks[0]).toMatchObject({ status: 'queued', attempts: 0 });
  });

  test('a fail without a reason and a release for another reason are 400, and change nothing', async () => {
    const { as, jobId } = await scene();
    const { id } = (await as.lease()).body.task;
    expect((await as.post(id, 'fail', { details: {} })).status).toBe(400);
    expect((await as.post(id, 'release', { reason: 'lunch' })).status).toBe(400);
    expect((await as.post(id, 'complete', { output_cids: 'x' })).status).toBe(400);
    const { tasks } = (await server.call('GET', `/v1/jobs/${jobId}`)).body;
    expect(tasks[0].status).toBe('leased');
  });
});

describe('status matrix', () => {
  const bodies: Record<string, unknown> = {
    heartbeat: { progress: {}, events: [] },
    complete: { output_cids: [], meta: null },
    fail: { reason: 'no', details: null },
    release: { reason: 'shutdown' },
  };
  for (const [verb, json] of Object.entries(bodies)) {
    test(`${verb}: 404 for an unknown task, 400 for no id, 401 without a token`, async () => {
      const { as, node } = await scene();
      expect((await as.post('2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10', verb, json)).status).toBe(404);
      expect((await as.post('not-an-id', verb, json)).status).toBe(400);
      const path = `/v1/tasks/2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10/${verb}`;
      expect((await server.call('POST', path, { token: null, json })).status).toBe(401);
      expect(node.id).toMatch(UUID);
    });

    test(`${verb}: 409 for another node's task, which is not disturbed`, async () => {
      const { as, capability } = await scene();
      const { id } = (await as.lease()).body.task;
      const other = callsAs(await server.joinNode({ capabilities: [capability] }));
      const answer = await other.post(id, verb, json);
      expect(answer.status).toBe(409);
      expect(answer.body.error.code).toBe('aborted');
      expect((await as.heartbeat(id)).status).toBe(200);
    });

    test(`${verb}: 409 under a lease that was given back`, async () => {
      const { as } = await scene();
      const leased = await as.lease();
      const headers = { 'millrace-lease-id': leased.header('millrace-lease-id')! };
      const { id } = leased.body.task;
      await as.post(id, 'release', { reason: 'shutdown' }, headers);
      const again = await as.lease();
      expect(again.body.task.id).toBe(id);
      // Repeating the ending that was accepted is harmless; every other verb of the old lease is too late.
      const answer = await as.post(id, verb, json, headers);
      expect(answer.status).toBe(verb === 'release' ? 200 : 409);
      expect((await as.heartbeat(id)).status).toBe(200);
    });
  }

  test('an expired lease is taken back within a second and its writes are 409', async () => {
    await using short = await Harness.open({ leaseTtlMs: 1_000 });
    const node = await short.joinNode();
    await short.submit();
    const leased = await short.call('GET', '/v1/tasks', { token: node.token });
    const expiresAt = Date.parse(leased.body.lease_expires_at);
    // Another node waits for the work, and is woken by the rescue.
    const other = await short.joinNode();
    const rescued = await short.call('GET', '/v1/tasks', {
      token: other.token,
      headers: { prefer: 'wait=20' },
    });
    expect(rescued.status).toBe(200);
    expect(rescued.body.task.id).toBe(leased.body.task.id);
    expect(Date.now() - expiresAt).toBeLessThan(3_000);
    const late = await short.call('POST', `/v1/tasks/${leased.body.task.id}/complete`, {
      token: node.token,
      json: { output_cids: [], meta: null },
      headers: { 'millrace-lease-id': leased.header('millrace-lease-id')! },
    });
    expect(late.status).toBe(409);
  });
});

describe('batches', () => {
  test('features announce what there is', async () => {
    const answer = await server.call('GET', '/v1/features', { token: null });
    expect(answer.body).toEqual({
      long_poll_secs: 30,
      batch_items: 8,
      lease_ids: true,
      start_on_lease: true,
      lease_on_complete: true,
      ending_usage: true,
      task_logs: 16 * 1024 * 1024,
      registration_interval_secs: null,
    });
  });

  test('several leases at once, each an envelope with its id and its own token', async () => {
    const { as, submit } = await scene({ maxConcurrency: 8 });
    await submit();
    await submit();
    const answer = await as.call('POST', '/v1/tasks/lease', { json: { max: 8 } });
    expect(answer.status).toBe(200);
    expect(answer.body.leases).toHaveLength(3);
    for (const lease of answer.body.leases) {
      expect(lease.lease_id).toMatch(UUID);
      expect(parseLease(lease).task.id).toMatch(UUID);
    }
    expect(new Set(answer.body.leases.map((l: { access_token: string }) => l.access_token)).size).toBe(3);
    const none = await as.call('POST', '/v1/tasks/lease', { json: { max: 5 } });
    expect(none.status).toBe(200);
    expect(none.body).toEqual({ leases: [] });
  });

  test('tokens: false makes none, start: true starts, wait waits', async () => {
    const { capability } = await scene();
    const lone = capabilityOfItsOwn();
    const as = callsAs(await server.joinNode({ capabilities: [lone], maxConcurrency: 4 }));
    const waiting = as.call('POST', '/v1/tasks/lease', {
      json: { max: 2, wait: 20, start: true, tokens: false },
    });
    await until(waitersOf(1));
    await server.submit({ capability: lone });
    const { leases } = (await waiting).body;
    expect(leases).toHaveLength(1);
    expect(leases[0]).toMatchObject({ access_token: null, access_token_expires_at: null, status: 'running' });
    expect(capability).not.toBe(lone);
  });

  test('heartbeats, completions, failures and releases answer each item on its own', async () => {
    const { as, submit } = await scene({ maxConcurrency: 8 });
    for (let index = 0; index < 3; index += 1) await submit();
    const { leases } = (await as.call('POST', '/v1/tasks/lease', { json: { max: 4 } })).body;
    const unknown = '2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10';
    const refs = leases.map((lease: { lease_id: string; task: { id: string } }) => ({
      task_id: lease.task.id,
      lease_id: lease.lease_id,
    }));

    const beats = await as.call('POST', '/v1/tasks/heartbeat', {
      json: {
        items: [
          { ...refs[0], progress: { pct: 1 }, events: [] },
          { task_id: unknown },
          { task_id: refs[1].task_id },
        ],
      },
    });
    expect(beats.status).toBe(200);
    expect(beats.body.results.map((r: { status: number }) => r.status)).toEqual([200, 404, 200]);
    expect(beats.body.results[0].body).toMatchObject({ task_id: refs[0].task_id, status: 'running' });
    expect(beats.body.results[1]).toEqual({
      task_id: unknown,
      status: 404,
      error: { code: 'not_found', message: expect.any(String) },
    });

    const completed = await as.call('POST', '/v1/tasks/complete', {
      json: { items: [{ ...refs[0], output_cids: [], meta: null }, { task_id: unknown }] },
    });
    expect(completed.body.results.map((r: { status: number }) => r.status)).toEqual([200, 404]);
    expect(completed.body.results[0].body).toEqual(refs[0]);

    const failed = await as.call('POST', '/v1/tasks/fail', {
      json: {
        items: [
          { ...refs[1], reason: 'no' },
          { task_id: unknown, reason: 'no' },
        ],
      },
    });
    expect(failed.body.results.map((r: { status: number }) => r.status)).toEqual([200, 404]);

    const released = await as.call('POST', '/v1/tasks/release', {
      json: {
        items: [
          { ...refs[2], reason: 'shutdown' },
          { ...refs[0], reason: 'shutdown' },
        ],
      },
    });
    // The second was completed above: it is final.
    expect(released.body.results.map((r: { status: number }) => r.status)).toEqual([200, 409]);
  });

  test('completions bring leases in their places along, and none where nothing was completed', async () => {
    const { as, submit } = await scene({ maxConcurrency: 1 });
    for (let index = 0; index < 2; index += 1) await submit();
    const complete = (ref: object, lease?: object) =>
      as.call('POST', '/v1/tasks/complete', {
        json: { items: [ref], ...(lease !== undefined && { lease }) },
      });
    const refOf = ({ lease_id, task }: { lease_id: string; task: { id: string } }) => ({
      task_id: task.id,
      lease_id,
    });
    const first = refOf((await as.call('POST', '/v1/tasks/lease', { json: { max: 1 } })).body.leases[0]);

    // The only place is taken while the first is not completed.
    const unknown = { task_id: '2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10' };
    const early = await complete(unknown, { max: 1 });
    expect(early.status).toBe(200);
    expect(early.body).toMatchObject({ results: [{ status: 404 }], leases: [] });

    const next = await complete(first, { max: 8, start: true });
    expect(next.body.results).toMatchObject([{ status: 200, body: first }]);
    expect(next.body.leases).toHaveLength(1);
    expect(parseLease(next.body.leases[0])).toMatchObject({
      status: 'running',
      access_token: expect.any(String),
    });
    const second = refOf(next.body.leases[0]);
    expect(second.task_id).not.toBe(first.task_id);

    const third = (await complete(second, { max: 1, tokens: false, capabilities: ['/no/such/v1'] })).body;
    expect(third).toMatchObject({ results: [{ status: 200 }], leases: [] });
    const again = (await complete(second, { max: 1, tokens: false })).body;
    expect(again).toMatchObject({
      results: [{ status: 200 }],
      leases: [{ access_token: null, status: 'leased' }],
    });
    expect((await complete(refOf(again.leases[0]))).body).not.toHaveProperty('leases');
  });

  test('a request for leases that is not understood completes nothing', async () => {
    const { as } = await scene();
    const { id } = (await as.lease()).body.task;
    for (const lease of [{}, { max: 0 }, { max: 9 }, { max: 1, start: 'yes' }, 1]) {
      const json = { items: [{ task_id: id }], lease };
      expect((await as.call('POST', '/v1/tasks/complete', { json })).status).toBe(400);
    }
    expect((await as.heartbeat(id)).status).toBe(200);
  });

  test('as many items as announced are taken, one more is 400', async () => {
    const { as } = await scene();
    const item = { task_id: '2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10' };
    const send = (count: number) =>
      as.call('POST', '/v1/tasks/heartbeat', { json: { items: Array.from({ length: count }, () => item) } });
    expect((await send(8)).status).toBe(200);
    expect((await send(9)).status).toBe(400);
    expect((await send(0)).status).toBe(400);
    expect((await as.call('POST', '/v1/tasks/lease', { json: { max: 9 } })).status).toBe(400);
    expect((await as.call('POST', '/v1/tasks/lease', { json: { max: '2' } })).status).toBe(400);
  });
});

describe('watch', () => {
  test('tells within moments which lease was cancelled', async () => {
    const { as, submit, jobId } = await scene();
    await submit();
    const { leases } = (await as.call('POST', '/v1/tasks/lease', { json: { max: 2 } })).body;
    const lease_ids = leases.map((lease: { lease_id: string }) => lease.lease_id);
    const canceled = leases.find((lease: { task: { job_id: string } }) => lease.task.job_id === jobId);
    const watching = as.call('POST', '/v1/tasks/watch', {
      json: { lease_ids },
      headers: { prefer: 'wait=20' },
    });
    await server.call('POST', `/v1/jobs/${jobId}/cancel`);
    const answer = await watching;
    expect(answer.status).toBe(200);
    expect(answer.body).toEqual({ lease_ids: [canceled.lease_id] });
  });

  test('is empty when the time is up, and without a wait answers at once', async () => {
    const { as } = await scene();
    const leased = await as.lease();
    const json = { lease_ids: [leased.header('millrace-lease-id')] };
    expect((await as.call('POST', '/v1/tasks/watch', { json })).body).toEqual({ lease_ids: [] });
    const waited = await as.call('POST', '/v1/tasks/watch', { json, headers: { prefer: 'wait=1' } });
    expect(waited.body).toEqual({ lease_ids: [] });
  });
});

test('a job of the reference example runs from lease to completion with nothing but the reference wire', async () => {
  const node = await server.joinNode({ capabilities: [HELLO] });
  const as = callsAs(node);
  const jobId = await server.submit();
  const leased = await as.lease();
  const { id } = leased.body.task;
  expect((await as.heartbeat(id)).body.status).toBe('running');
  expect((await as.heartbeat(id)).status).toBe(200);
  await as.post(id, 'complete', { output_cids: [], meta: { job: {}, artifacts: [] } });
  expect((await server.call('GET', `/v1/jobs/${jobId}`)).body.job.status).toBe('completed');
});

/** How many long polls wait, as the metrics tell. */
function waitersOf(count: number): () => Promise<boolean> {
  return async () => {
    const { text } = await server.call('GET', '/metrics', { token: null });
    return text.includes(`\nmillrace_lease_waiters ${count}\n`);
  };
}
