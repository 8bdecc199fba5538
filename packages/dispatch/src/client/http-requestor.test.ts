import { createServer, type RequestListener } from 'node:http';
import type { AddressInfo } from 'node:net';
import { Readable } from 'node:stream';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Harness, TIME, UUID, until } from '../harness.test.support.ts';
import type { JobEvent } from '../records.ts';
import { connect } from './http-requestor.ts';
import type { Requestor } from './requestor.ts';

let server: Harness;
let requestor: Requestor;
beforeAll(async () => {
  server = await Harness.open();
  requestor = connect({ url: `${server.dispatcher.url}/`, token: server.clientToken });
});
afterAll(async () => {
  await requestor.close();
  await server[Symbol.asyncDispose]();
});

const NOBODY = '2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10';
const JOB = { tasks: [{ label: 't', capability: '/nobody/v1', meta: {} }] };

describe('jobs', () => {
  test('submit, read, list, cancel, delete', async () => {
    const id = await requestor.submit({ ...JOB, label: 'one', meta: { a: 1 } });
    expect(id).toMatch(UUID);
    const { job, tasks } = await requestor.job(id);
    expect(job).toMatchObject({ id, label: 'one', meta: { a: 1 }, status: 'pending' });
    expect(tasks).toHaveLength(1);
    const page = await requestor.jobs({ limit: 1, status: 'pending', capabilities: ['/nobody/v1'] });
    expect(page.items[0]!.job.id).toBe(id);
    expect(await requestor.cancel(id)).toEqual({
      id,
      status: 'canceled',
      updated_at: expect.stringMatching(TIME),
    });
    await requestor.delete(id);
    await expect(requestor.job(id)).rejects.toMatchObject({ code: 'not_found', details: { status: 404 } });
  });

  test('pages lead on from one to the next', async () => {
    for (let index = 0; index < 3; index += 1) await requestor.submit(JOB);
    const seen = new Set<string>();
    let cursor: string | null = null;
    do {
      const page = await requestor.jobs({ limit: 2, ...(cursor === null ? {} : { cursor }) });
      for (const { job } of page.items) seen.add(job.id);
      cursor = page.next_cursor;
    } while (cursor !== null);
    expect(seen.size).toBeGreaterThanOrEqual(3);
  });

  test('an idempotency key makes a repeat harmless', async () => {
    const first = await requestor.submit(JOB, { idempotencyKey: 'k' });
    expect(await requestor.submit(JOB, { idempotencyKey: 'k' })).toBe(first);
    await expect(requestor.submit({ ...JOB, label: 'x' }, { idempotencyKey: 'k' })).rejects.toMatchObject({
      code: 'already_exists',
    });
  });

  test("errors carry the dispatcher's own sentence", async () => {
    await expect(requestor.job(NOBODY)).rejects.toMatchObject({ message: `there is no job ${NOBODY}` });
    await expect(requestor.submit({ tasks: [] })).rejects.toMatchObject({ code: 'invalid_argument' });
    await using stranger = connect({ url: server.dispatcher.url, token: 'nonsense' });
    await expect(stranger.jobs()).rejects.toMatchObject({ code: 'unauthenticated' });
    await using nobody = connect({ url: 'http://127.0.0.1:9', token: 't' });
    await expect(nobody.health()).rejects.toMatchObject({ code: 'unavailable' });
    expect(() => connect({ url: 'ftp://x', token: 't' })).toThrow(/http:\/\//);
  });
});

describe('nodes', () => {
  test('credentials made here register a node, which is then listed and busy', async () => {
    const added = await requestor.addNode({ name: 'n', mode: 'public' });
    expect(Buffer.from(added.registrationCredentials, 'base64').toString()).toBe(
      `${added.id}:${added.registrationSecret}`,
    );
    const listed = (await requestor.nodes()).find((node) => node.id === added.id);
    expect(listed).toMatchObject({ name: 'n', mode: 'public', wallet: null });
    const node = await server.joinNode({ capabilities: ['/busy/v1'] });
    const jobId = await server.submit({ capability: '/busy/v1' });
    await server.call('GET', '/v1/tasks', { token: node.token });
    expect(await requestor.busyNodes()).toContainEqual(
      expect.objectContaining({ node_id: node.id, job_id: jobId }),
    );
  });

  test('health tells version and domain', async () => {
    expect(await requestor.health()).toEqual({
      version: expect.stringMatching(/^\d+\.\d+\.\d+/),
      domainId: server.dispatcher.defaultDomainId,
    });
  });
});

test("storage is the same dispatcher's, under the same token", async () => {
  const { defaultDomainId } = server.dispatcher;
  const bytes = new TextEncoder().encode('hello');
  const item = await requestor.storage.put(defaultDomainId, { name: 'greeting', dataType: 'text' }, bytes);
  const { body, size } = await requestor.storage.openRaw(defaultDomainId, item!.id);
  expect(size).toBe(5);
  expect(Buffer.concat((await body.toArray()) as Buffer[]).toString()).toBe('hello');
});

describe('events', () => {
  test('go from the past into the present and end with the job', async () => {
    const node = await server.joinNode({ capabilities: ['/watched/v1'] });
    const id = await server.submit({ capability: '/watched/v1' });
    const events: JobEvent[] = [];
    const watching = (async () => {
      for await (const event of requestor.events(id)) events.push(event);
    })();
    await until(() => events.length >= 1);
    const leased = await server.call('GET', '/v1/tasks', { token: node.token });
    await server.call('POST', `/v1/tasks/${leased.body.task.id}/complete`, {
      token: node.token,
      json: { output_cids: [], meta: null },
    });
    await watching;
    expect(events.map(({ seq }) => seq)).toEqual(events.map((_, index) => index + 1));
    expect(events.at(-1)!.kind).toBe('job.completed');
    const rest: JobEvent[] = [];
    for await (const event of requestor.events(id, { after: 2 })) rest.push(event);
    expect(rest).toEqual(events.slice(2));
    // Nothing comes after the end, and so nothing is waited for.
    for await (const event of requestor.events(id, { after: events.length })) throw new Error(event.kind);
  });

  test('breaking out and aborting both end the connection', async () => {
    const id = await server.submit();
    for await (const event of requestor.events(id)) {
      expect(event.seq).toBe(1);
      break;
    }
    const controller = new AbortController();
    const waiting = (async () => {
      for await (const event of requestor.events(id, { signal: controller.signal })) {
        if (event.seq >= 1) setImmediate(() => controller.abort(new Error('enough')));
      }
    })();
    await expect(waiting).rejects.toThrow('enough');
  });

  test('an unknown job is not_found, and nobody there is unavailable at once', async () => {
    await expect(drain(requestor.events(NOBODY))).rejects.toMatchObject({ code: 'not_found' });
    await using nobody = connect({ url: 'http://127.0.0.1:9', token: 't' });
    await expect(drain(nobody.events(NOBODY))).rejects.toMatchObject({ code: 'unavailable' });
  });

  test('a broken connection is resumed where it stood, without gap and repeat', async () => {
    const event = (seq: number, kind = 'task.progress') =>
      `id: ${seq}\ndata: ${JSON.stringify({ seq, at: '2026-01-01T00:00:00.000Z', kind, task_id: null, data: {} })}\n\n`;
    const asked: string[] = [];
    const answers: RequestListener[] = [
      // Cut in the middle of an event.
      (_request, response) => {
        response.writeHead(200, { 'content-type': 'text/event-stream' });
        response.write(`: connected\n\n${event(1)}${event(2)}id: 3\ndata: {"se`, () =>
          setTimeout(() => response.destroy(), 20),
        );
      },
      (_request, response) => void response.writeHead(503).end(),
      // Ended in good order, as a server that restarts does. The first event is one too many.
      (_request, response) => void response.writeHead(200).end(event(2) + event(3) + ': closing\n\n'),
      (request) => void request.socket.destroy(),
      (_request, response) => void response.writeHead(200).end(event(4) + event(5, 'job.completed')),
    ];
    const http = createServer((request, response) => {
      asked.push(request.url ?? '');
      answers.shift()!(request, response);
    });
    await new Promise<void>((resolve) => http.listen(0, '127.0.0.1', resolve));
    try {
      await using client = connect({
        url: `http://127.0.0.1:${(http.address() as AddressInfo).port}`,
        token: 't',
      });
      const seen = await drain(client.events(NOBODY));
      expect(seen.map(({ seq }) => seq)).toEqual([1, 2, 3, 4, 5]);
      expect(asked.map((url) => new URL(url, 'http://x').searchParams.get('after'))).toEqual([
        '0',
        '2',
        '2',
        '3',
        '3',
      ]);
    } finally {
      http.closeAllConnections();
      await new Promise((resolve) => http.close(resolve));
    }
  });

  test('events cut anywhere by the network are put together again', async () => {
    const text = [1, 2]
      .map((seq) => {
        const kind = seq === 2 ? 'job.failed' : 'task.log';
        return `id: ${seq}\ndata: ${JSON.stringify({ seq, at: 't', kind, task_id: null, data: { text: 'über €' } })}\n\n`;
      })
      .join('');
    const http = createServer((_request, response) => {
      // Byte by byte, so also in the middle of a character.
      Readable.from([...Buffer.from(text)].map((byte) => Buffer.of(byte))).pipe(response);
    });
    await new Promise<void>((resolve) => http.listen(0, '127.0.0.1', resolve));
    try {
      await using client = connect({
        url: `http://127.0.0.1:${(http.address() as AddressInfo).port}`,
        token: 't',
      });
      const seen = await drain(client.events(NOBODY));
      expect(seen.map(({ data }) => data)).toEqual([{ text: 'über €' }, { text: 'über €' }]);
    } finally {
      http.closeAllConnections();
      await new Promise((resolve) => http.close(resolve));
    }
  });
});

async function drain(events: AsyncIterable<JobEvent>): Promise<JobEvent[]> {
  const seen: JobEvent[] = [];
  for await (const event of events) seen.push(event);
  return seen;
}
