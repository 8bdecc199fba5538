import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { systemClock, type Clock } from '@millrace/runner';
import { openHttpDms } from '../client/http-dms.ts';
import { connect } from '../client/http-requestor.ts';
import type { LogAnswer } from '../client/dms.ts';
import { Harness, until, type TestNode } from '../harness.test.support.ts';

const UNKNOWN = '00000000-0000-7000-8000-000000000000';

let harness: Harness;
beforeEach(async () => {
  harness = await Harness.open();
});
afterEach(() => harness[Symbol.asyncDispose]());

interface Leased {
  readonly task: { readonly id: string; readonly job_id: string };
  readonly leaseId: string;
}

async function take(node: TestNode, from = harness): Promise<Leased> {
  const answer = await from.call('GET', '/v1/tasks', {
    token: node.token,
    headers: { 'millrace-start': '1' },
  });
  expect(answer.status).toBe(200);
  return { task: answer.body.task, leaseId: answer.header('millrace-lease-id')! };
}

const append = (node: TestNode, { task, leaseId }: Leased, offset: number, lines: string) =>
  harness.call('POST', '/v1/tasks/logs', {
    token: node.token,
    json: { items: [{ task_id: task.id, lease_id: leaseId, offset, lines }] },
  });

const logs = (
  taskId: string,
  query = '',
  options: { token?: string | null; wait?: number; signal?: AbortSignal } = {},
) =>
  harness.call('GET', `/v1/tasks/${taskId}/logs${query}`, {
    ...(options.token !== undefined && { token: options.token }),
    ...(options.signal !== undefined && { signal: options.signal }),
    headers: options.wait === undefined ? {} : { prefer: `wait=${options.wait}` },
  });

const end = (
  node: TestNode,
  { task, leaseId }: Leased,
  verb = 'complete',
  json: unknown = { output_cids: [], meta: {} },
) =>
  harness.call('POST', `/v1/tasks/${task.id}/${verb}`, {
    token: node.token,
    json,
    headers: { 'millrace-lease-id': leaseId },
  });

describe('POST /v1/tasks/logs', () => {
  test('appends under the lease; again is harmless, a gap is told, a stranger is refused', async () => {
    await harness.submit();
    const node = await harness.joinNode();
    const stranger = await harness.joinNode();
    const lease = await take(node);
    expect((await append(node, lease, 0, 'one\ntwo\n')).body).toEqual({
      results: [{ task_id: lease.task.id, status: 200, body: { next_offset: 8 } }],
    });
    expect((await append(node, lease, 0, 'one\ntwo\n')).body.results[0].body).toEqual({ next_offset: 8 });
    expect((await append(node, lease, 99, 'x\n')).body.results[0]).toEqual({
      task_id: lease.task.id,
      status: 409,
      error: {
        code: 'failed_precondition',
        message: `the log of attempt 1 of task ${lease.task.id} has 8 bytes; what comes before offset 99 is missing`,
        next_offset: 8,
      },
    });
    expect((await append(stranger, lease, 8, 'mine\n')).body.results[0]).toMatchObject({
      status: 409,
      error: { code: 'aborted' },
    });
    expect((await logs(lease.task.id)).text).toBe('one\ntwo\n');
    await end(node, lease);
    expect((await append(node, lease, 8, 'late\n')).body.results[0].status).toBe(409);
  });

  test('what is no whole line, an offset below 0 and a batch past its bound are refused as a whole', async () => {
    await harness.submit();
    const node = await harness.joinNode();
    const lease = await take(node);
    for (const item of [
      { offset: 0, lines: 'half' },
      { offset: 0, lines: '' },
      { offset: -1, lines: 'x\n' },
    ]) {
      const answer = await append(node, lease, item.offset, item.lines);
      expect([answer.status, answer.body.error.code]).toEqual([400, 'invalid_argument']);
    }
    const item = { task_id: lease.task.id, lease_id: lease.leaseId, offset: 0, lines: 'x\n' };
    const many = (count: number) =>
      harness.call('POST', '/v1/tasks/logs', {
        token: node.token,
        json: { items: Array.from({ length: count }, () => item) },
      });
    expect((await many(256)).status).toBe(200);
    expect((await many(257)).status).toBe(400);
    expect((await harness.call('POST', '/v1/tasks/logs', { json: { items: [item] } })).status).toBe(403);
  });

  test('a log at its limit is kept, one byte more is refused', async () => {
    await using small = await Harness.open({ limits: { taskLogBytes: 10 } });
    await small.submit();
    const node = await small.joinNode();
    const { task, leaseId } = await take(node, small);
    const send = (offset: number, lines: string) =>
      small.call('POST', '/v1/tasks/logs', {
        token: node.token,
        json: { items: [{ task_id: task.id, lease_id: leaseId, offset, lines }] },
      });
    expect((await send(0, '123456789\n')).body.results[0].status).toBe(200);
    expect((await send(10, '\n')).body.results[0]).toMatchObject({
      status: 413,
      error: { message: expect.stringContaining('would have 11 bytes; the limit taskLogBytes is 10') },
    });
    expect((await small.call('GET', '/v1/features', { token: null })).body.task_logs).toBe(10);
  });

  test("the node's client and the server agree, errors of single pieces included", async () => {
    await harness.submit();
    const node = await harness.joinNode();
    const { task, leaseId } = await take(node);
    const tokens = { get: () => Promise.resolve(node.token), invalidate: () => undefined };
    await using dms = openHttpDms({ baseUrl: `${harness.dispatcher.url}/v1`, tokens });
    expect((await dms.features()).taskLogBytes).toBe(16 * 1024 * 1024);
    const lease = { taskId: task.id, leaseId };
    const answers = await dms.appendLogs([
      { lease, offset: 0, lines: 'ä\n' },
      { lease, offset: 7, lines: 'gap\n' },
      { lease: { ...lease, leaseId: UNKNOWN }, offset: 3, lines: 'x\n' },
      { lease: { ...lease, taskId: UNKNOWN }, offset: 3, lines: 'x\n' },
    ]);
    const seen = (answer: LogAnswer) => ('error' in answer ? answer.error.code : answer.nextOffset);
    expect(answers.map(seen)).toEqual([3, 3, 'aborted', 'not_found']);
  });
});

describe('GET /v1/tasks/{id}/logs', () => {
  test('gives whole lines from any offset, with where to go on', async () => {
    const jobId = await harness.submit();
    const node = await harness.joinNode();
    const lease = await take(node);
    const { id } = lease.task;
    await append(node, lease, 0, 'eins\nzwölf\n');
    const whole = await logs(id);
    expect([whole.status, whole.text]).toEqual([200, 'eins\nzwölf\n']);
    expect(whole.header('content-type')).toBe('application/x-ndjson');
    const heads = (answer: typeof whole) =>
      Object.fromEntries(
        ['attempt', 'attempts', 'offset', 'next-offset', 'size', 'ended'].map((name) => [
          name,
          answer.header(`millrace-log-${name}`),
        ]),
      );
    expect(heads(whole)).toEqual({
      attempt: '1',
      attempts: '1',
      offset: '0',
      'next-offset': '12',
      size: '12',
      ended: 'false',
    });
    expect([whole.header('millrace-job-id'), whole.header('millrace-task-ended')]).toEqual([jobId, 'false']);
    // Cut to whole lines, unless not even one fits.
    expect((await logs(id, '?limit=9')).text).toBe('eins\n');
    expect((await logs(id, '?limit=3')).text).toBe('ein');
    expect((await logs(id, '?offset=5')).text).toBe('zwölf\n');
    expect((await logs(id, '?offset=2')).text).toBe('ns\nzwölf\n');
    // From the end: whole lines from the first on.
    const tails = [];
    for (const offset of [-1, -6, -7, -8, -11, -12, -99])
      tails.push((await logs(id, `?offset=${offset}`)).text);
    expect(tails).toEqual(['', '', 'zwölf\n', 'zwölf\n', 'eins\nzwölf\n', 'eins\nzwölf\n', 'eins\nzwölf\n']);
    expect(heads(await logs(id, '?offset=-7'))).toMatchObject({ offset: '5', 'next-offset': '12' });
    const past = await logs(id, '?offset=13');
    expect([past.status, past.body.error.message]).toEqual([
      400,
      `offset 13 is past the end of the log of attempt 1 of task ${id}, which has 12 bytes`,
    ]);
  });

  test('a wait ends with the next lines, with the end of the attempt, or when the time is up', async () => {
    await harness.submit({ max_attempts: 3 });
    const node = await harness.joinNode();
    const lease = await take(node);
    const { id } = lease.task;
    const first = logs(id, '?offset=0', { wait: 30 });
    await sleep(50);
    await append(node, lease, 0, 'now\n');
    expect((await first).text).toBe('now\n');
    // What was there already is not waited for.
    expect((await logs(id, '?offset=0', { wait: 30 })).text).toBe('now\n');
    expect((await logs(id, '?offset=4', { wait: 0 })).text).toBe('');
    const second = logs(id, '?attempt=1&offset=4', { wait: 30 });
    const next = logs(id, '?attempt=2', { wait: 30 });
    await sleep(50);
    await end(node, lease, 'release', { reason: 'shutdown' });
    const answer = await second;
    expect([answer.text, answer.header('millrace-log-ended'), answer.header('millrace-task-ended')]).toEqual([
      '',
      'true',
      'false',
    ]);
    const again = await take(node);
    await append(node, again, 0, 'second\n');
    expect((await next).text).toBe('second\n');
    await end(node, again);
    const last = await logs(id, '?attempt=2&offset=7', { wait: 30 });
    expect([last.header('millrace-log-ended'), last.header('millrace-task-ended')]).toEqual(['true', 'true']);
  });

  test('who waits for the newest attempt is not handed over to the next one', async () => {
    await harness.submit();
    const node = await harness.joinNode();
    const lease = await take(node);
    const waiting = logs(lease.task.id, '', { wait: 30 });
    await sleep(50);
    await end(node, lease, 'release', { reason: 'shutdown' });
    const again = await take(node);
    await append(node, again, 0, 'not yours\n');
    const answer = await waiting;
    expect([answer.text, answer.header('millrace-log-attempt'), answer.header('millrace-log-ended')]).toEqual(
      ['', '1', 'true'],
    );
  });

  test('nothing is lost between reading and waiting, whoever is faster', async () => {
    await harness.submit();
    const node = await harness.joinNode();
    const lease = await take(node);
    await using requestor = connect({ url: harness.dispatcher.url, token: harness.clientToken });
    const writing = (async () => {
      let offset = 0;
      for (let i = 0; i < 100; i += 1) {
        const lines = `${i} ${'ü'.repeat(i % 5)}\n`;
        await append(node, lease, offset, lines);
        offset += Buffer.byteLength(lines);
      }
      await end(node, lease);
    })();
    const parts: Uint8Array[] = [];
    for (let offset = 0; ;) {
      const page = await requestor.taskLog(lease.task.id, { attempt: 1, offset, waitSecs: 30, limit: 200 });
      expect(page.offset).toBe(offset);
      parts.push(page.bytes);
      offset = page.nextOffset;
      if (page.ended && offset === page.size) break;
    }
    await writing;
    const text = Buffer.concat(parts).toString('utf8');
    expect(text.trimEnd().split('\n')).toHaveLength(100);
    expect(text).toBe((await logs(lease.task.id)).text);
    expect(await requestor.jobLogs(lease.task.job_id)).toEqual([
      { task_id: lease.task.id, attempt: 1, size: Buffer.byteLength(text) },
    ]);
  });

  test('closing the server ends the waits', async () => {
    await harness.submit();
    const lease = await take(await harness.joinNode());
    const waiting = logs(lease.task.id, '', { wait: 60 });
    await sleep(100);
    await harness.dispatcher.close();
    expect((await waiting).status).toBe(200);
  });

  test('who may not read the job may not read its logs, and what is not there is told', async () => {
    const jobId = await harness.submit();
    const node = await harness.joinNode();
    const { task } = await take(node);
    const elsewhere = await harness.dispatcher.issueClientToken({ domainId: UNKNOWN });
    const inside = await harness.dispatcher.issueClientToken({
      domainId: harness.dispatcher.defaultDomainId,
      readOnly: true,
    });
    for (const path of [
      `tasks/${task.id}/logs`,
      `tasks/${task.id}/explain`,
      `jobs/${jobId}/logs`,
      `jobs/${jobId}/explain`,
    ]) {
      const status = async (token: string | null) =>
        (await harness.call('GET', `/v1/${path}`, { token })).status;
      expect([
        path,
        await status(null),
        await status(node.token),
        await status(elsewhere),
        await status(inside),
      ]).toEqual([path, 401, 403, 403, 200]);
      const unknown = await harness.call('GET', `/v1/${path.replace(/[0-9a-f-]{36}/, UNKNOWN)}`);
      expect(unknown.status).toBe(404);
    }
    expect((await logs(task.id, '?attempt=3')).status).toBe(404);
    for (const query of [
      '?attempt=0',
      '?limit=0',
      '?limit=1048577',
      '?offset=x',
      '?offset=99999999999999999',
    ]) {
      expect([query, (await logs(task.id, query)).status]).toEqual([query, 400]);
    }
  });

  test('logs of a deleted job are gone', async () => {
    const jobId = await harness.submit();
    const node = await harness.joinNode();
    const lease = await take(node);
    await append(node, lease, 0, 'x\n');
    await end(node, lease);
    expect((await harness.call('DELETE', `/v1/jobs/${jobId}`)).status).toBe(204);
    expect((await logs(lease.task.id)).status).toBe(404);
  });
});

describe('explain', () => {
  const explainTask = async (id: string) => (await harness.call('GET', `/v1/tasks/${id}/explain`)).body;
  const reasonsOf = async (id: string) => {
    const { reasons } = await explainTask(id);
    return reasons.map(({ code }: { code: string }) => code);
  };
  const tasksOf = async (jobId: string) => {
    const { tasks } = (await harness.call('GET', `/v1/jobs/${jobId}`)).body;
    return Object.fromEntries(
      tasks.map((task: { label: string; id: string }) => [task.label, task.id]),
    ) as Record<string, string>;
  };
  const submit = async (tasks: object[], job: object = {}) => {
    const answer = await harness.call('POST', '/v1/jobs', {
      json: {
        ...job,
        tasks: tasks.map((task) => ({ capability: '/examples/hello/v1', ...task })),
      },
    });
    return answer.body.job_id as string;
  };

  test('from a system without nodes to a finished job', async () => {
    const jobId = await submit([{ label: 'one' }, { label: 'two' }, { label: 'last' }], {
      edges: [
        { from: 'one', to: 'last' },
        { from: 'two', to: 'last' },
      ],
    });
    const { one, two, last } = await tasksOf(jobId);
    expect(await reasonsOf(one!)).toEqual(['no_node_registered']);
    expect(await reasonsOf(last!)).toEqual(['waiting_for_stages', 'no_node_registered']);

    await harness.joinNode({ capabilities: ['/examples/hallo/v1'] });
    expect(await explainTask(one!)).toMatchObject({
      task_id: one,
      job_id: jobId,
      status: 'queued',
      reasons: [{ code: 'no_node_with_capability', nearest: ['/examples/hallo/v1'] }],
      attempts: [],
    });

    const node = await harness.joinNode({ maxConcurrency: 1 });
    // It has never asked for work.
    expect(await reasonsOf(one!)).toEqual(['nodes_away']);
    const lease = await take(node);
    expect(lease.task.id).toBe(one);
    await harness.call('POST', `/v1/tasks/${one}/heartbeat`, {
      token: node.token,
      json: { progress: { pct: 40 }, events: [] },
      headers: { 'millrace-lease-id': lease.leaseId },
    });
    const running = await explainTask(one!);
    expect(running.reasons).toMatchObject([
      { code: 'running', node_id: node.id, name: 'a node', progress: { pct: 40 } },
    ]);
    for (const name of ['since', 'lease_expires_at', 'last_heartbeat_at']) {
      expect(Date.parse(running.reasons[0][name])).toBeGreaterThan(0);
    }
    expect(await explainTask(two!)).toMatchObject({
      reasons: [{ code: 'slots_busy', nodes: [{ node_id: node.id, slots: 1, in_use: 1 }] }],
    });
    expect(await explainTask(last!)).toMatchObject({
      reasons: [
        {
          code: 'waiting_for_stages',
          stages: [
            { stage: 'one', tasks_left: 1, tasks: 1 },
            { stage: 'two', tasks_left: 1, tasks: 1 },
          ],
        },
      ],
    });
    expect((await harness.call('GET', `/v1/jobs/${jobId}/explain`)).body).toMatchObject({
      job_id: jobId,
      message: '0 of 3 tasks are completed, 3 have not ended',
      groups: [
        { reason: { code: 'running' }, count: 1 },
        { reason: { code: 'slots_busy' }, count: 1 },
        { reason: { code: 'waiting_for_stages' }, count: 1, tasks: [{ task_id: last }] },
      ],
    });

    const urgent = await submit([{ label: 'urgent', priority: 9 }]);
    expect((await explainTask(two!)).reasons).toMatchObject([
      { code: 'slots_busy' },
      { code: 'behind_others', higher_priority: 1, older: 0 },
    ]);
    await harness.call('POST', `/v1/jobs/${urgent}/cancel`);
    expect(await reasonsOf((await tasksOf(urgent))['urgent']!)).toEqual(['canceled']);

    await end(node, lease);
    expect(await explainTask(one!)).toMatchObject({
      reasons: [{ code: 'completed' }],
      attempts: [{ attempt: 1, outcome: 'completed', name: 'a node' }],
    });
    // A touch of the node is written beside the answer it got.
    await until(async () => (await reasonsOf(two!))[0] === 'waiting_for_node');

    const second = await take(node);
    await harness.call('POST', `/v1/jobs/${jobId}/cancel`);
    expect(await reasonsOf(two!)).toEqual(['canceling', 'running']);
    await end(node, second, 'release', { reason: 'canceled' });
    expect(await reasonsOf(two!)).toEqual(['canceled']);
    expect((await harness.call('GET', `/v1/jobs/${jobId}/explain`)).body).toMatchObject({
      status: 'canceled',
      groups: [],
    });
  });

  test('a label, an entitlement, a retry, a failure, and a lease nobody has begun', async () => {
    const jobId = await submit([
      { label: 'labelled', capability_filters: { gpu: 'a100' } },
      { label: 'dedicated', mode: 'dedicated' },
      { label: 'plain', max_attempts: 2 },
    ]);
    const { labelled, dedicated, plain } = await tasksOf(jobId);
    const node = await harness.joinNode({ labels: { gpu: 't4' }, maxConcurrency: 5 });
    expect(await explainTask(labelled!)).toMatchObject({
      reasons: [{ code: 'label_differs', nodes: [{ label: 'gpu', wanted: 'a100', found: 't4' }] }],
    });
    expect(await reasonsOf(dedicated!)).toEqual(['node_not_entitled']);
    const taken = await harness.call('GET', '/v1/tasks', { token: node.token });
    expect(await reasonsOf(plain!)).toEqual(['leased']);
    await end(node, { task: taken.body.task, leaseId: taken.header('millrace-lease-id')! }, 'fail', {
      reason: 'runner failed: no',
      details: {},
    });
    expect(await explainTask(plain!)).toMatchObject({
      reasons: [{ code: 'backing_off', attempts: 1, max_attempts: 2, last_reason: 'runner failed: no' }],
      attempts: [{ attempt: 1, outcome: 'failed', reason: 'runner failed: no' }],
    });
    let again: Leased | null = null;
    await until(async () => {
      const answer = await harness.call('GET', '/v1/tasks', { token: node.token });
      if (answer.status === 204) return false;
      again = { task: answer.body.task, leaseId: answer.header('millrace-lease-id')! };
      return true;
    });
    await end(node, again!, 'fail', { reason: 'runner failed: still no', details: {} });
    expect(await explainTask(plain!)).toMatchObject({
      status: 'failed',
      reasons: [{ code: 'failed', reason: 'runner failed: still no', attempts: 2 }],
      attempts: [{ attempt: 1 }, { attempt: 2, reason: 'runner failed: still no' }],
    });
    expect((await harness.call('GET', `/v1/jobs/${jobId}/explain`)).body.groups).toMatchObject([
      { reason: { code: 'failed' }, count: 1 },
    ]);
  });

  test('a node that has not asked for long is away', async () => {
    let ahead = 0;
    const clock: Clock = { ...systemClock, now: () => systemClock.now() + ahead };
    await using later = await Harness.open({ clock });
    const jobId = await later.submit();
    const node = await later.joinNode();
    await take(node, later).then(({ task, leaseId }) =>
      later.call('POST', `/v1/tasks/${task.id}/release`, {
        token: node.token,
        json: { reason: 'shutdown' },
        headers: { 'millrace-lease-id': leaseId },
      }),
    );
    const { body } = await later.call('GET', `/v1/jobs/${jobId}`);
    const codes = async () =>
      (await later.call('GET', `/v1/tasks/${body.tasks[0].id}/explain`)).body.reasons.map(
        ({ code }: { code: string }) => code,
      );
    await until(async () => (await codes())[0] === 'waiting_for_node');
    ahead = 130_000;
    expect(await codes()).toEqual(['nodes_away']);
  });
});
