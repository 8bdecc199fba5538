/** Redriving, dead tasks, queues and times to wait for, over a real socket. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { connect } from '../client/http-requestor.ts';
import { parseJobSpec } from '../job-spec.ts';
import { Harness, UUID, until, type TestNode } from '../harness.test.support.ts';

let server: Harness;
let node: TestNode;
beforeAll(async () => {
  server = await Harness.open();
  node = await server.joinNode();
});
afterAll(async () => {
  await server[Symbol.asyncDispose]();
});

const client = () => connect({ url: server.dispatcher.url, token: server.clientToken });

/** Leases the node's next task. */
async function lease(): Promise<{ id: string; label: string }> {
  const { body } = await server.call('GET', '/v1/tasks', {
    token: node.token,
    headers: { prefer: 'wait=10' },
  });
  return body.task;
}

async function failJob(task: Record<string, string> = {}): Promise<string> {
  const id = await server.submit({ ...task });
  const leased = await lease();
  const answer = await server.call('POST', `/v1/tasks/${leased.id}/fail`, {
    token: node.token,
    json: { reason: 'it broke', details: { retryable: false } },
  });
  expect(answer.status).toBe(200);
  // Nodes that say nothing about retrying are tried again; cancelling ends what is left.
  if ((await server.call('GET', `/v1/jobs/${id}`)).body.job.status !== 'failed') {
    await server.call('POST', `/v1/jobs/${id}/cancel`);
  }
  return id;
}

describe('redrive', () => {
  test('a job is redriven once, whoever asks how often, and again with a key', async () => {
    await using requestor = client();
    const id = await failJob();
    const first = await requestor.redrive(id);
    expect(first).toEqual({ job_id: expect.stringMatching(UUID), redrive_of: id, tasks: 1, created: true });
    expect(await requestor.redrive(id)).toEqual({ ...first, created: false });
    const other = await server.dispatcher.issueClientToken({ subject: 'somebody else' });
    const again = await server.call('POST', `/v1/jobs/${id}/redrive`, { token: other });
    expect(again.body).toEqual({ ...first, created: false });
    const keyed = await requestor.redrive(id, { idempotencyKey: 'second' });
    expect(keyed.created).toBe(true);
    expect(keyed.job_id).not.toBe(first.job_id);
    expect((await requestor.redrive(id, { idempotencyKey: 'second' })).job_id).toBe(keyed.job_id);
    expect((await requestor.job(id)).redriven_as).toEqual([first.job_id, keyed.job_id]);
    expect((await requestor.explainJob(keyed.job_id)).redrive_of).toBe(id);
    for (const each of [first, keyed]) await requestor.cancel(each.job_id);
  });

  test('a deadline that passed since the first time does not make it another job', async () => {
    const deadline_at = new Date(Date.now() + 1500).toISOString();
    const id = await failJob({ deadline_at });
    const first = await server.call('POST', `/v1/jobs/${id}/redrive`);
    expect(first.status).toBe(200);
    await until(() => Date.now() > Date.parse(deadline_at) + 10);
    const second = await server.call('POST', `/v1/jobs/${id}/redrive`);
    expect(second.body).toEqual({ ...first.body, created: false });
  });

  test('one that goes on, completed or does not exist is refused', async () => {
    const id = await server.submit();
    expect((await server.call('POST', `/v1/jobs/${id}/redrive`)).body.error).toMatchObject({
      code: 'failed_precondition',
      message: expect.stringMatching(
        /is pending; only a job that has ended can be redriven, cancel it first$/,
      ),
    });
    const leased = await lease();
    await server.call('POST', `/v1/tasks/${leased.id}/complete`, {
      token: node.token,
      json: { output_cids: [], meta: null },
    });
    expect((await server.call('POST', `/v1/jobs/${id}/redrive`)).body.error.message).toMatch(
      /is completed; there is nothing to redrive$/,
    );
    const unknown = await server.call('POST', '/v1/jobs/2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10/redrive');
    expect(unknown.status).toBe(404);
    const badKey = { headers: { 'idempotency-key': 'a b' } };
    expect((await server.call('POST', `/v1/jobs/${id}/redrive`, badKey)).status).toBe(400);
  });

  test('it takes the right to write, in the domain of the job', async () => {
    const id = await failJob();
    const reader = await server.dispatcher.issueClientToken({ readOnly: true });
    const elsewhere = await server.dispatcher.issueClientToken({
      domainId: '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21',
    });
    for (const token of [reader, elsewhere, node.token]) {
      const { status } = await server.call('POST', `/v1/jobs/${id}/redrive`, { token });
      expect([401, 403, 404]).toContain(status);
    }
    expect((await server.call('GET', '/v1/dead-tasks', { token: null })).status).toBe(401);
    const listed = await server.call('GET', '/v1/dead-tasks', { token: elsewhere });
    expect(listed.body.items).toEqual([]);
  });
});

test('dead tasks are listed page by page, and the lease path is another one', async () => {
  await using requestor = client();
  const deadline_at = new Date(Date.now() + 1000).toISOString();
  const id = await requestor.submit({
    tasks: [1, 2, 3].map((each) => ({ label: `t${each}`, capability: '/dead/v1', deadline_at })),
  });
  await until(async () => (await requestor.job(id)).job.status === 'failed');
  const labels: string[] = [];
  let cursor: string | undefined;
  do {
    const page = await requestor.deadTasks({
      capability: '/dead/v1',
      jobId: id,
      limit: 2,
      ...(cursor !== undefined && { cursor }),
    });
    labels.push(...page.items.map(({ label }) => label));
    cursor = page.next_cursor ?? undefined;
  } while (cursor !== undefined);
  expect(labels).toEqual(['t3', 't2', 't1']);
  for (const query of ['limit=0', 'limit=101', 'job_id=x', 'cursor=x', 'domain_id=x']) {
    expect((await server.call('GET', `/v1/dead-tasks?${query}`)).status, query).toBe(400);
  }
});

test('work that waits for its time says so, and comes to a waiting node at it', async () => {
  await using requestor = client();
  const not_before = new Date(Date.now() + 700).toISOString();
  const id = await requestor.submit({
    not_before,
    tasks: [{ label: 'l', capability: '/examples/hello/v1' }],
  });
  const [task] = (await requestor.job(id)).tasks;
  expect(task).toMatchObject({ status: 'queued', not_before });
  const told = await requestor.explainTask(task!.id);
  expect(told.reasons[0]).toMatchObject({ code: 'waiting_until', not_before });
  expect((await lease()).id).toBe(task!.id);
  expect(Date.now()).toBeGreaterThanOrEqual(Date.parse(not_before));
  await server.call('POST', `/v1/tasks/${task!.id}/complete`, {
    token: node.token,
    json: { output_cids: [], meta: null },
  });
  const refused = await server.call('POST', '/v1/jobs', {
    json: {
      tasks: [
        { capability: '/x/v1', deadline_at: '2999-01-01T00:00:00Z', not_before: '2999-01-01T00:00:00Z' },
      ],
    },
  });
  expect(refused.status).toBe(400);
});

test('queues and metrics tell how much waits and who could do it', async () => {
  await using requestor = client();
  const id = await requestor.submit({
    tasks: [
      { label: 'a', capability: '/wanted/v1', capability_filters: { gpu: 'yes' } },
      { label: 'b', capability: '/wanted/v1' },
      { label: 'c', capability: '/examples/hello/v1', not_before: '2999-01-01T00:00:00Z' },
    ],
    edges: [{ from: 'a', to: 'b' }],
  });
  const report = await requestor.queues();
  expect(report.queues.filter(({ capability }) => capability === '/wanted/v1')).toEqual([
    expect.objectContaining({ capability_filters: { gpu: 'yes' }, ready: 1, nodes: 0, free_slots: 0 }),
    expect.objectContaining({ capability_filters: {}, ready: 0, blocked: 1, oldest_age_ms: null }),
  ]);
  expect(report.capabilities).toContainEqual(
    expect.objectContaining({ capability: '/examples/hello/v1', delayed: 1, nodes: 1, free_slots: 1 }),
  );
  const { text } = await server.call('GET', '/metrics', { token: null });
  expect(text).toContain('millrace_queue_tasks{capability="/examples/hello/v1",state="delayed"} 1');
  expect(text).toContain('millrace_queue_free_slots{capability="/examples/hello/v1"} 1');
  expect(text).toContain('millrace_queue_tasks{capability="other",state="blocked"} 1');
  expect(text).not.toContain('/wanted/v1');
  expect((await server.call('GET', '/v1/queues', { token: null })).status).toBe(401);
  await requestor.delete(id);
  expect((await requestor.queues()).queues).toEqual([]);
});

test('old jobs go by themselves, and are counted', async () => {
  await using other = await Harness.open({ retention: { keepJobsMs: 1 } });
  const id = await other.submit();
  await other.call('POST', `/v1/jobs/${id}/cancel`);
  await until(async () => (await other.call('GET', `/v1/jobs/${id}`)).status === 404, 20_000);
  await until(async () =>
    (await other.call('GET', '/metrics')).text.includes('millrace_jobs_pruned_total 1'),
  );
});

describe('schedules', () => {
  const job = { label: 'night', tasks: [{ label: 'n', capability: '/night/v1' }] };
  const post = (body: Record<string, unknown>, token?: string) =>
    server.call('POST', '/v1/schedules', { json: body, ...(token !== undefined && { token }) });

  test('one is kept, listed without its job, read with it, and removed', async () => {
    await using requestor = client();
    const kept = await requestor.addSchedule({
      name: 'nightly',
      cron: '30  2 * * *',
      time_zone: 'Europe/Berlin',
      catch_up: 'one',
      overlap: 'skip',
      job,
    });
    expect(kept).toMatchObject({
      name: 'nightly',
      domain_id: server.dispatcher.defaultDomainId,
      cron: '30 2 * * *',
      time_zone: 'Europe/Berlin',
      catch_up: 'one',
      overlap: 'skip',
      job: { label: 'night', tasks: [{ capability: '/night/v1', max_attempts: 3 }] },
      last_tick_at: null,
    });
    expect(Date.parse(kept.next_at ?? '')).toBeGreaterThan(Date.now());
    const { job: _, ...rest } = kept;
    expect(await requestor.schedules()).toEqual([{ ...rest, label: 'night', tasks: 1 }]);
    expect(await requestor.schedule('nightly')).toEqual(kept);
    expect((await post({ name: 'nightly', cron: '* * * * *', job })).status).toBe(409);
    const replaced = await requestor.addSchedule({ name: 'nightly', cron: '0 0 1 1 *', replace: true, job });
    expect(replaced).toMatchObject({ time_zone: 'UTC', catch_up: 'skip', overlap: 'allow' });
    await requestor.removeSchedule('nightly');
    expect(await requestor.schedules()).toEqual([]);
    await expect(requestor.removeSchedule('nightly')).rejects.toMatchObject({ code: 'not_found' });
    await expect(requestor.schedule('nightly')).rejects.toMatchObject({ code: 'not_found' });
  });

  test.each([
    ['no name', { cron: '* * * * *', job }],
    ['a name with a slash', { name: 'a/b', cron: '* * * * *', job }],
    ['six fields', { name: 'a', cron: '* * * * * *', job }],
    ['an unknown zone', { name: 'a', cron: '* * * * *', time_zone: 'Mars/Base', job }],
    ['an unknown policy', { name: 'a', cron: '* * * * *', catch_up: 'all', job }],
    ['a job without tasks', { name: 'a', cron: '* * * * *', job: { tasks: [] } }],
    ['a deadline', { name: 'a', cron: '* * * * *', job: { ...job, deadline_at: '2999-01-01T00:00:00Z' } }],
    [
      'a time of a task',
      {
        name: 'a',
        cron: '* * * * *',
        job: { tasks: [{ capability: '/x/v1', not_before: '2999-01-01T00:00:00Z' }] },
      },
    ],
    [
      'a compute that is not stored',
      {
        name: 'a',
        cron: '* * * * *',
        job: { tasks: [{ capability: '/compute/v1', meta: { ref: `compute://sha256/${'0'.repeat(64)}` } }] },
      },
    ],
  ])('%s is refused', async (_, body) => {
    const answer = await post(body);
    expect(answer.status).toBe(400);
    expect(answer.body.error.code).toBe('invalid_argument');
  });

  test('a token of one domain sees and makes only what is there', async () => {
    const domainId = '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21';
    const token = await server.dispatcher.issueClientToken({ domainId });
    const reader = await server.dispatcher.issueClientToken({ domainId, readOnly: true });
    const mine = await post({ name: 'mine', cron: '0 0 1 1 *', job }, token);
    expect(mine.body.domain_id).toBe(domainId);
    await post({ name: 'other', cron: '0 0 1 1 *', job });
    const listed = await server.call('GET', '/v1/schedules', { token: reader });
    expect(listed.body.items.map(({ name }: { name: string }) => name)).toEqual(['mine']);
    const own = server.dispatcher.defaultDomainId;
    for (const [method, path] of [
      ['DELETE', '/v1/schedules/mine'],
      ['POST', '/v1/schedules'],
    ] as const) {
      const json = method === 'POST' ? { name: 'x', cron: '* * * * *', job } : undefined;
      expect((await server.call(method, path, { token: reader, json })).status).toBe(401);
    }
    const foreign = await server.call('DELETE', `/v1/schedules/other?domain_id=${own}`, { token });
    expect(foreign.status).toBe(403);
    expect((await server.call('DELETE', '/v1/schedules/other', { token })).status).toBe(404);
    expect((await server.call('DELETE', '/v1/schedules/mine', { token })).status).toBe(204);
    expect((await server.call('DELETE', '/v1/schedules/other')).status).toBe(204);
  });

  test('what is due when a dispatcher comes is submitted, and counted', async () => {
    const past = Date.now() - 1000;
    const [date] = [new Date(past)];
    await server.store.putSchedule({
      name: 'due',
      // The minute it was a second ago, once a year.
      cron: `${date.getUTCMinutes()} ${date.getUTCHours()} ${date.getUTCDate()} ${date.getUTCMonth() + 1} *`,
      timeZone: 'UTC',
      catchUp: 'skip',
      overlap: 'allow',
      job: parseJobSpec(job, { defaultDomainId: server.dispatcher.defaultDomainId, maxTasks: 1, now: past }),
      organizationId: null,
      nextAtMs: past - (past % 60_000),
      replace: false,
    });
    await using requestor = client();
    await until(async () => (await requestor.schedule('due')).last_job_id !== null);
    const schedule = await requestor.schedule('due');
    expect(schedule.last_outcome).toBe('submitted');
    const { job: submitted } = await requestor.job(schedule.last_job_id ?? '');
    expect(submitted).toMatchObject({
      label: 'night',
      meta: { schedule: { name: 'due', tick: schedule.last_tick_at } },
    });
    const { text } = await server.call('GET', '/metrics', { token: null });
    expect(text).toContain('millrace_schedule_ticks_total{outcome="submitted"} 1');
  });
});
