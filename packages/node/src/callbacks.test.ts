import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import { connect, type AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import { defineRunner } from '@millrace/runner';
import { openCallbacks, type CallbackOptions, type Callbacks } from './callbacks.ts';
import { parseNodeEnv } from './config.ts';
import { createNode } from './node.ts';
import { CAPABILITY, ReferenceServer } from './reference-server.test.support.ts';
import { memoryLog } from './simulation/scripted-dms.ts';

let closers: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const close of closers) await close();
  closers = [];
});

async function listener(options: Partial<CallbackOptions> = {}) {
  let registered = 0;
  const log = memoryLog();
  const callbacks = await openCallbacks({
    port: 0,
    onRegistered: () => (registered += 1) > 0,
    clock: { now: () => 1_777_860_121_000 },
    log,
    ...options,
  });
  closers.unshift(() => callbacks.close());
  return { callbacks, log, registered: () => registered };
}

function register(
  { url }: Callbacks,
  body: unknown,
  headers: Record<string, string> = {},
): Promise<Response> {
  return fetch(`${url}/internal/v1/registrations`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...headers },
    body: typeof body === 'string' ? body : JSON.stringify(body),
  });
}

const GOOD = {
  id: '3f6c1d0e-7a55-4c5e-9f0b-2d8a64b1c7e9',
  secret: 's3cr3t-value',
  organization_id: 'org',
  lighthouses_in_domains: [{ any: 'thing' }],
  domains: {},
};

describe('a registration brought by the service', () => {
  test('is taken with {"ok":true}, and its secret is in no log line', async () => {
    const { callbacks, log, registered } = await listener();
    const answer = await register(callbacks, GOOD);
    expect([answer.status, await answer.text()]).toEqual([200, '{"ok":true}']);
    expect(registered()).toBe(1);
    expect(JSON.stringify(log.lines)).not.toContain('s3cr3t');
  });

  test('a secret of 4096 bytes is taken, one more is 403', async () => {
    const { callbacks, registered } = await listener();
    expect((await register(callbacks, { ...GOOD, secret: 'é'.repeat(2048) })).status).toBe(200);
    const answer = await register(callbacks, { ...GOOD, secret: `${'é'.repeat(2048)}x` });
    expect([answer.status, await answer.text()]).toEqual([403, 'secret too large']);
    expect(registered()).toBe(1);
  });

  test.each([
    ['a blank id', { ...GOOD, id: ' ' }, 422, 'missing id'],
    ['a blank secret', { ...GOOD, secret: '\t' }, 422, 'missing secret'],
    ['a blank id and no good secret', { ...GOOD, id: '', secret: '' }, 422, 'missing id'],
    ['no id', { secret: 's3cr3t-value' }, 422, 'id must be a string, got nothing'],
    ['no secret', { id: 'x' }, 422, 'secret must be a string'],
    ['a secret that is none', { ...GOOD, secret: ['s3cr3t-value'] }, 422, 'secret must be a string'],
    [
      'an organization that is none',
      { ...GOOD, organization_id: 7 },
      422,
      'organization_id must be a string, got 7',
    ],
    ['an array', [GOOD], 422, 'body must be a JSON object, got an array'],
    ['no JSON', '{"secret":"s3cr3t-value"', 422, /^body must be valid JSON/],
  ] as const)('%s is refused, and the secret is not quoted', async (_name, body, status, words) => {
    const { callbacks, registered } = await listener();
    const answer = await register(callbacks, body);
    const text = await answer.text();
    expect(answer.status).toBe(status);
    expect(text).toMatch(words);
    expect(text).not.toContain('s3cr3t');
    expect(registered()).toBe(0);
  });

  test('a body of 64 KiB is read, one byte more is 413', async () => {
    const { callbacks } = await listener();
    const body = (bytes: number): string => JSON.stringify(GOOD).padEnd(bytes, ' ');
    expect((await register(callbacks, body(64 * 1024))).status).toBe(200);
    expect((await register(callbacks, body(64 * 1024 + 1))).status).toBe(413);
  });

  test('a node that is stopping answers 409', async () => {
    const { callbacks } = await listener({ onRegistered: () => false });
    expect((await register(callbacks, GOOD)).status).toBe(409);
  });
});

test('health is 200 and empty, and a DDS that asks is noted', async () => {
  const { callbacks } = await listener();
  const health = async (agent: string): Promise<string> => {
    const answer = await fetch(`${callbacks.url}/health`, { headers: { 'user-agent': agent } });
    expect(answer.status).toBe(200);
    return await answer.text();
  };
  expect(await health('curl/8')).toBe('');
  expect(callbacks.lastHealthcheckMs).toBeNull();
  expect(await health('DDS v1.2.3')).toBe('');
  expect(callbacks.lastHealthcheckMs).toBe(1_777_860_121_000);
});

test('other paths are 404, other methods 405', async () => {
  const { callbacks } = await listener();
  expect((await fetch(`${callbacks.url}/`)).status).toBe(404);
  const wrong = await fetch(`${callbacks.url}/internal/v1/registrations`);
  expect([wrong.status, wrong.headers.get('allow')]).toEqual([405, 'POST']);
  expect((await fetch(`${callbacks.url}/health`, { method: 'POST' })).status).toBe(405);
});

test('closing ends connections that are open', async () => {
  const { callbacks } = await listener();
  const socket = connect(Number(new URL(callbacks.url).port), '127.0.0.1');
  socket.on('error', () => undefined);
  const closed = new Promise((resolve) => socket.once('close', resolve));
  await new Promise((resolve) => socket.once('connect', resolve));
  socket.write('POST /internal/v1/registrations HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n');
  await callbacks.close();
  await closed;
  await callbacks.close();
});

test('an address that is taken is told, with what to do', async () => {
  const taken = createServer();
  await new Promise<void>((resolve) => taken.listen(0, '127.0.0.1', resolve));
  closers.unshift(() => new Promise((resolve) => taken.close(resolve)));
  const { port } = taken.address() as AddressInfo;
  await expect(listener({ port })).rejects.toMatchObject({
    code: 'failed_precondition',
    message: expect.stringContaining('choose another address'),
  });
});

describe('a node that takes callbacks', () => {
  test('works without registering itself once it is told, and registers when the service forgets it', async () => {
    const server = await ReferenceServer.open();
    const folder = await mkdtemp(join(tmpdir(), 'millrace-callbacks-'));
    const log = memoryLog();
    // Every registration of its own is refused.
    server.fault = ({ path }) => (path.endsWith('register-wallet') ? { status: 403, body: 'no' } : null);
    server.registered = true;
    const taskId = server.offer();
    const node = createNode({
      config: parseNodeEnv(server.env()),
      runners: [defineRunner({ capability: CAPABILITY, run: () => Promise.resolve() })],
      workDir: folder,
      log,
      callbacks: { port: 0 },
    });
    const ended = node.run();
    ended.catch(() => undefined);
    closers.unshift(
      async () => await node[Symbol.asyncDispose](),
      async () => await server[Symbol.asyncDispose](),
      () => rm(folder, { recursive: true, force: true }),
    );
    await server.seen(({ path }) => path.endsWith('register-wallet'));
    expect(node.state).toBe('registering');
    const url = log.lines.find(({ message }) => message === 'callbacks are taken')!.fields['url'] as string;
    expect((await register({ url } as Callbacks, GOOD)).status).toBe(200);
    expect((await server.ending(taskId)).kind).toBe('complete');
    expect(server.of('dds', 'POST', 'register-wallet')).toHaveLength(1);
  });
});
