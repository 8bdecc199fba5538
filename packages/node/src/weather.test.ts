/**
 * A whole node against servers that misbehave, over real sockets. What exactly the reference does in each case, and what
 * this node does better, is the table of quirks in RATIONALE.md.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Writable } from 'node:stream';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { defineRunner, systemClock, type Clock, type Json, type Runner } from '@millrace/runner';
import { parseNodeEnv } from './config.ts';
import { createLogger } from './log.ts';
import { createNode, type ComputeNode, type NodeOptions } from './node.ts';
import {
  CAPABILITY,
  REG_SECRET,
  ReferenceServer,
  VECTOR,
  type Fault,
  type Received,
  type ReferenceOptions,
} from './reference-server.test.support.ts';
import { memoryLog, never } from './simulation/scripted-dms.ts';

let server: ReferenceServer;
let folder: string;
let closers: (() => Promise<unknown>)[];

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'millrace-weather-'));
  closers = [() => rm(folder, { recursive: true, force: true })];
});

afterEach(async () => {
  for (const close of closers) await close();
});

async function open(options: ReferenceOptions = {}): Promise<void> {
  server = await ReferenceServer.open({ leaseMs: 900, ...options });
  closers.unshift(() => server[Symbol.asyncDispose]());
}

interface Started {
  readonly node: ComputeNode;
  readonly ended: Promise<void>;
  readonly log: ReturnType<typeof memoryLog>;
}

const done: Runner['run'] = () => Promise.resolve();

function start(
  run: Runner['run'] = done,
  env: Record<string, string> = {},
  options: Partial<NodeOptions> = {},
): Started {
  const log = memoryLog();
  const node = createNode({
    // What lasts is to be over with the lease, not two minutes later.
    config: parseNodeEnv(server.env({ CONTACT_GRACE_SECONDS: '0', ...env })),
    runners: [defineRunner({ capability: CAPABILITY, run })],
    workDir: join(folder, 'work'),
    log,
    drainMs: 0,
    ...options,
  });
  const ended = node.run();
  ended.catch(() => undefined);
  closers.unshift(async () => await node[Symbol.asyncDispose]());
  return { node, ended, log };
}

/** A machine whose time goes `factor` times as fast: for what takes minutes. */
function fastClock(factor: number): Clock {
  const startedAt = Date.now();
  return {
    now: () => startedAt + (Date.now() - startedAt) * factor,
    monotonic: () => performance.now() * factor,
    setTimer: (fn, delayMs, options) => systemClock.setTimer(fn, delayMs / factor, options),
  };
}

const isPoll = ({ path }: Received): boolean => path === '/v1/tasks';
const isBeat = ({ path }: Received): boolean => path.endsWith('/heartbeat');
const about = (taskId: string): Received[] =>
  server.received.filter(({ path }) => path.includes(taskId) && !isBeat({ path } as Received));
const beats = (taskId: string): Received[] =>
  server.received.filter((each) => each.path.includes(taskId) && isBeat(each));
/** The node is free again and asks. */
const free = (): Promise<Received> => server.next(isPoll);

/** Answers the first `count` requests that match with the fault. */
function faulty(matches: (request: Received) => boolean, fault: Fault, count = Infinity): void {
  let left = count;
  server.fault = (request) => {
    if (left <= 0 || !matches(request)) return null;
    left -= 1;
    return fault;
  };
}

const GONE = [404, 409, 410];
const REFUSED = [400, 413, 422];
const TROUBLE = [403, 429, 500, 503];

describe('the statuses of the task service', () => {
  test('whatever a request for work is answered, the node pauses and asks again', async () => {
    await open();
    const statuses = [...GONE, ...REFUSED, ...TROUBLE, 302, 204];
    const asked = [...statuses];
    server.fault = (request) => {
      const status = isPoll(request) ? asked.shift() : undefined;
      return status === undefined ? null : { status, body: 'x' };
    };
    const taskId = server.offer();
    start();
    expect((await server.ending(taskId)).kind).toBe('complete');
    const times = server.received.filter(isPoll).map(({ at }) => at);
    expect(times.length).toBeGreaterThan(statuses.length);
    for (let i = 1; i < statuses.length; i += 1) expect(times[i]! - times[i - 1]!).toBeGreaterThan(5);
  });

  test('a pause that is asked for with 429 is kept', async () => {
    await open();
    faulty(isPoll, { status: 429, headers: { 'retry-after': '1' } }, 1);
    const taskId = server.offer();
    start();
    await server.ending(taskId);
    const [first, second] = server.received.filter(isPoll).map(({ at }) => at);
    expect(second! - first!).toBeGreaterThanOrEqual(990);
  });

  test.each(GONE)(
    'first heartbeat: %i is the end of the attempt, told as a failed setup at once',
    async (status) => {
      await open();
      const taskId = server.offer();
      faulty(isBeat, { status, body: 'why' });
      start();
      expect(await server.ending(taskId)).toMatchObject({
        kind: 'fail',
        body: { reason: 'node_setup_failed', details: { stage: 'initial_heartbeat' } },
      });
      expect(beats(taskId)).toHaveLength(1);
    },
  );

  test.each([...REFUSED, ...TROUBLE])(
    'first heartbeat: %i that lasts is told as a failed setup when the lease is over',
    async (status) => {
      await open({ leaseMs: 500 });
      const taskId = server.offer();
      faulty(isBeat, { status, body: 'why' });
      start();
      expect(await server.ending(taskId)).toMatchObject({
        body: { reason: 'node_setup_failed', details: { stage: 'initial_heartbeat' } },
      });
      expect(beats(taskId).length).toBeGreaterThan(1);
    },
  );

  test.each<[string, Fault]>([
    ['429', { status: 429 }],
    ['500', { status: 500 }],
    ['503', { status: 503 }],
    ['a closed connection', 'reset'],
    ['silence', 'silence'],
    ['an answer that is cut', { cut: '{"status":"running"}' }],
    ['an empty answer', { status: 200 }],
    ['204', { status: 204 }],
    ['HTML', { status: 200, body: '<html>' }],
    ['an answer of more than 2 MiB', { status: 200, body: `{"x":"${'x'.repeat(2 * 1024 * 1024)}"}` }],
    ['a member given twice', { status: 200, body: '{"cancel":false,"cancel":true}' }],
    ['a time in numbers', { status: 200, body: '{"lease_expires_at":1777860121}' }],
  ])('heartbeats, first and later: %s once costs nothing', async (_name, fault) => {
    await open({ leaseMs: fault === 'silence' ? 2_500 : 900 });
    const taskId = server.offer();
    let count = 0;
    server.fault = (request) => (isBeat(request) && (count += 1) % 2 === 1 ? fault : null);
    start(async (ctx) => {
      await ctx.ctrl.progress({ pct: 1 });
      await expect.poll(() => count, { timeout: 10_000 }).toBeGreaterThan(3);
    });
    expect((await server.ending(taskId)).kind).toBe('complete');
  });

  test.each(GONE)(
    'a later heartbeat: %i loses the lease at once, and nothing is reported',
    async (status) => {
      await open();
      const taskId = server.offer();
      let count = 0;
      server.fault = (request) => (isBeat(request) && (count += 1) > 1 ? { status } : null);
      let reason: unknown = null;
      start((ctx) => never(ctx.signal).finally(() => (reason = ctx.signal.reason)));
      await expect.poll(() => reason).toMatchObject({ reason: 'lease_lost' });
      await free();
      expect(beats(taskId)).toHaveLength(2);
      expect(about(taskId)).toEqual([]);
    },
  );

  test.each(TROUBLE)('later heartbeats: %i that lasts loses the lease when it is over', async (status) => {
    await open({ leaseMs: 600 });
    const taskId = server.offer();
    let count = 0;
    server.fault = (request) => (isBeat(request) && (count += 1) > 1 ? { status } : null);
    let reason: unknown = null;
    start((ctx) => never(ctx.signal).finally(() => (reason = ctx.signal.reason)));
    await expect.poll(() => reason).toMatchObject({ reason: 'lease_lost' });
    await free();
    expect(beats(taskId).length).toBeGreaterThan(2);
    expect(about(taskId)).toEqual([]);
  });

  test.each(REFUSED)('a heartbeat whose body is refused with %i goes on without it', async (status) => {
    await open();
    const taskId = server.offer();
    const hasEvents = ({ body }: Received): boolean => body.includes('"too much"');
    server.fault = (request) => (isBeat(request) && hasEvents(request) ? { status } : null);
    start(async (ctx) => ctx.ctrl.logEvent('too much'));
    expect((await server.ending(taskId)).kind).toBe('complete');
    const last = JSON.parse(beats(taskId).at(-1)!.body.toString()) as { events: Json[] };
    expect(last.events).toEqual([expect.objectContaining({ dropped: 1 })]);
  });

  describe.each(['complete', 'fail'] as const)('%s', (kind) => {
    const isReport = ({ path }: Received): boolean => /\/(complete|fail)$/.test(path);
    const run: Runner['run'] = () =>
      kind === 'complete' ? Promise.resolve() : Promise.reject(new Error('no'));

    test.each<[string, Fault]>([
      ['429', { status: 429 }],
      ['500', { status: 500 }],
      ['503', { status: 503 }],
      ['a closed connection', 'reset'],
      ['silence', 'silence'],
    ])('%s once: it is sent again and arrives', async (_name, fault) => {
      await open();
      const taskId = server.offer();
      faulty(isReport, fault, 1);
      start(run);
      await expect.poll(() => about(taskId).length, { timeout: 10_000 }).toBe(2);
      await free();
      expect(about(taskId).map(({ path }) => path.split('/').at(-1))).toEqual([kind, kind]);
      expect(about(taskId)[0]!.body.equals(about(taskId)[1]!.body)).toBe(true);
    });

    test.each(GONE)('%i: it was the last word', async (status) => {
      await open();
      const taskId = server.offer();
      faulty(isReport, { status });
      start(run);
      await server.ending(taskId);
      await free();
      expect(about(taskId)).toHaveLength(1);
    });

    test.each(TROUBLE)('%i that lasts: it is given up, and the node goes on', async (status) => {
      await open({ leaseMs: 500 });
      const taskId = server.offer();
      // Nothing extends the lease any more.
      let reporting = false;
      server.fault = (request) => {
        reporting ||= isReport(request);
        return reporting && !isPoll(request) ? { status } : null;
      };
      const { log } = start(run);
      await server.ending(taskId);
      await expect
        .poll(() => log.lines.find(({ message }) => message === 'task ended')?.fields, { timeout: 10_000 })
        .toMatchObject({ delivery: 'unsent' });
      await free();
      expect(about(taskId).length).toBeGreaterThan(1);
    });
  });

  test.each([400, 413, 422])(
    'a completion refused with %i becomes a failure that says so',
    async (status) => {
      await open();
      const taskId = server.offer();
      faulty(({ path }) => path.endsWith('/complete'), { status, body: 'no such field' });
      start();
      const { body } = await server.seen(({ path }) => path.endsWith('/fail'));
      expect(JSON.parse(body.toString())).toMatchObject({
        reason: expect.stringContaining('completion refused by the dispatcher'),
        details: { job: { task_id: taskId }, artifacts: [] },
      });
    },
  );

  test.each(REFUSED)('a failure refused with %i was the last word', async (status) => {
    await open();
    const taskId = server.offer();
    faulty(({ path }) => path.endsWith('/fail'), { status });
    start(() => Promise.reject(new Error('no')));
    expect((await server.ending(taskId)).kind).toBe('fail');
    await free();
    expect(about(taskId)).toHaveLength(1);
  });

  test.each(['lease', 'heartbeat', 'complete', 'fail'])(
    '401 to %s: one fresh login, and the same request again',
    async (place) => {
      await open();
      const taskId = server.offer();
      const matches = ({ path }: Received): boolean =>
        path.endsWith(place === 'lease' ? '/v1/tasks' : `/${place}`);
      faulty(matches, { status: 401 }, 1);
      start(place === 'fail' ? () => Promise.reject(new Error('no')) : done);
      await server.ending(taskId);
      await server.seen((each) => matches(each) && each.headers['authorization'] === 'Bearer node-token-2');
      const [first, second] = server.received.filter(matches);
      expect([first?.headers['authorization'], second?.headers['authorization']]).toEqual([
        'Bearer node-token-1',
        'Bearer node-token-2',
      ]);
      expect(second?.body.equals(first!.body)).toBe(true);
      expect(server.of('dds', 'POST', '/verify')).toHaveLength(2);
    },
  );
});

describe('leases that are none', () => {
  const TASK = '"task":{"id":"5b1f3c52-5f0e-4b3e-9b5e-6a1d6c0a7e11","capability":"/examples/hello/v1"';
  const NONE: readonly (readonly [string, Fault])[] = [
    ['empty', { status: 200 }],
    ['cut', { cut: `{${TASK}}}` }],
    ['too large', { status: 200, body: `{"x":"${'x'.repeat(2 * 1024 * 1024)}",${TASK}}}` }],
    ['not JSON', { status: 200, body: 'lease' }],
    ['an array', { status: 200, body: '[]' }],
    ['without a task', { status: 200, body: '{}' }],
    ['with a task that is null', { status: 200, body: '{"task":null}' }],
    ['without a capability', { status: 200, body: '{"task":{"id":"5b1f3c52-5f0e-4b3e-9b5e-6a1d6c0a7e11"}}' }],
    ['with a task id that is no UUID', { status: 200, body: '{"task":{"id":"7","capability":"/c"}}' }],
    ['with an empty domain id', { status: 200, body: `{"domain_id":"",${TASK}}}` }],
    ['with an expiry in numbers', { status: 200, body: `{"lease_expires_at":1777860121,${TASK}}}` }],
    ['with an empty URL', { status: 200, body: `{"domain_server_url":"",${TASK}}}` }],
    ['with a URL that is relative', { status: 200, body: `{"domain_server_url":"/x",${TASK}}}` }],
    ['with cancel null', { status: 200, body: `{"cancel":null,${TASK}}}` }],
    ['with inputs null', { status: 200, body: `{${TASK},"inputs_cids":null}}` }],
    ['with attempts -1', { status: 200, body: `{${TASK},"attempts":-1}}` }],
    ['with attempts 1.0', { status: 200, body: `{${TASK},"attempts":1.0}}` }],
    ['with attempts in quotes', { status: 200, body: `{${TASK},"attempts":"1"}}` }],
    ['with billing units as a number', { status: 200, body: `{${TASK},"billing_units":1}}` }],
    ['with a member given twice', { status: 200, body: `{"status":"a","status":"b",${TASK}}}` }],
  ];

  test('each makes the node back off, and it takes the next good one', async () => {
    await open();
    const faults = NONE.map(([, fault]) => fault);
    server.fault = (request) => (isPoll(request) ? faults.shift() : null);
    const taskId = server.offer();
    const { log } = start();
    expect((await server.ending(taskId)).kind).toBe('complete');
    const failures = log.lines.filter(({ message }) => message === 'asking for work failed');
    expect(failures).toHaveLength(NONE.length);
    expect(server.received.filter(({ path }) => path.includes('6a1d6c0a7e11'))).toEqual([]);
  });

  test('a body with tokens that cannot be read is not repeated in the log', async () => {
    await open();
    faulty(isPoll, { status: 200, body: '{"access_token":"opaque-secret","cancel":null}' }, 1);
    const taskId = server.offer();
    const { log } = start();
    await server.ending(taskId);
    expect(JSON.stringify(log.lines)).not.toContain('opaque-secret');
  });

  test('for a capability nobody here has: told so, and no busy loop', async () => {
    await open();
    for (let i = 0; i < 3; i += 1) server.offer({ capability: '/other/v1' });
    const taskId = server.offer();
    start(done, { POLL_BACKOFF_MS_MIN: '100', POLL_BACKOFF_MS_MAX: '100' });
    expect((await server.ending(taskId)).kind).toBe('complete');
    const times = server.received.filter(isPoll).map(({ at }) => at);
    for (let i = 1; i <= 3; i += 1) expect(times[i]! - times[i - 1]!).toBeGreaterThanOrEqual(95);
    expect(server.of('dms', 'POST', '/fail')).toHaveLength(3);
  });

  test.each([
    ['leases', { cancel: true }, {}],
    ['first heartbeats', {}, { cancel: true }],
  ])(
    'cancelled for ever by its %s: no runner is entered, nothing is reported, and no busy loop',
    async (_where, lease, reply) => {
      await open();
      for (let i = 0; i < 100; i += 1) server.offer({}, lease, reply);
      let entered = 0;
      start(() => Promise.resolve(void (entered += 1)), {
        POLL_BACKOFF_MS_MIN: '100',
        POLL_BACKOFF_MS_MAX: '100',
      });
      await expect.poll(() => server.received.filter(isPoll).length, { timeout: 10_000 }).toBe(6);
      const times = server.received.filter(isPoll).map(({ at }) => at);
      for (let i = 1; i < 6; i += 1) expect(times[i]! - times[i - 1]!).toBeGreaterThanOrEqual(95);
      expect(entered).toBe(0);
      expect(server.received.filter(({ path }) => /\/(complete|fail)$/.test(path))).toEqual([]);
    },
  );

  test('an expiry that is past from the start is neither a lost lease nor a flood of heartbeats', async () => {
    await open({ leaseMs: -2_000 });
    const taskId = server.offer();
    start(() => new Promise((resolve) => setTimeout(resolve, 1_200)));
    expect((await server.ending(taskId)).kind).toBe('complete');
    expect(beats(taskId).length).toBeLessThanOrEqual(5);
  });
});

describe('identity', () => {
  const isDds = (name: string) => (request: Received) => request.path.endsWith(name);

  const STATUSES: readonly Fault[] = [400, 401, 403, 404, 408, 409, 422, 429, 500, 503].map((status) => ({
    status,
    body: 'no',
  }));
  const BODIES: readonly Fault[] = [
    'reset',
    { status: 200 },
    { status: 200, body: '<html>' },
    { status: 200, body: '[]' },
    { cut: '{"nonce":"abcdefgh"}' },
    { status: 200, body: ' '.repeat(64 * 1024 + 1) },
  ];

  test.each<[string, readonly Fault[]]>([
    [
      'request',
      [
        ...STATUSES,
        ...BODIES,
        { status: 200, body: '{"nonce":""}' },
        {
          status: 200,
          body: '{"nonce":"abcdefgh","domain":"d","uri":"u","version":"1","chainId":"8453","issuedAt":"t"}',
        },
      ],
    ],
    ['register-wallet', [...STATUSES, 'reset']],
    [
      'verify',
      [
        ...STATUSES,
        ...BODIES,
        { status: 200, body: '{"access_token":"t"}' },
        { status: 200, body: '{"access_token":"","access_expires_at":"2099-01-01T00:00:00Z"}' },
        { status: 200, body: '{"access_token":"t","access_expires_at":"2020-01-01T00:00:00Z"}' },
        { status: 200, body: '{"access_token":"t","access_expires_at":4070908800}' },
      ],
    ],
  ])('%s: whatever it is answered, the node joins in the end', async (place, faults) => {
    await open({ leaseMs: 3_600_000 });
    const left = [...faults];
    server.fault = (request) => (isDds(place)(request) ? left.shift() : null);
    const taskId = server.offer();
    start(done, { REGISTER_INTERVAL_SECS: '10', TOKEN_REAUTH_MAX_RETRIES: '50' }, { clock: fastClock(500) });
    expect((await server.ending(taskId)).kind).toBe('complete');
    expect(left).toEqual([]);
  });

  test('a service that is down for a minute when the node starts is waited for', async () => {
    await open({ leaseMs: 3_600_000 });
    await server.stop('dds');
    const taskId = server.offer();
    const clock = fastClock(100);
    const startedAt = clock.monotonic();
    const { node } = start(done, {}, { clock });
    await expect.poll(() => clock.monotonic() - startedAt).toBeGreaterThan(60_000);
    expect(node.state).toBe('registering');
    await server.start('dds');
    expect((await server.ending(taskId)).kind).toBe('complete');
  });

  test.each(['request', 'register-wallet', 'verify'])(
    'a service that accepts and never answers %s: the call is given up, the next one works',
    async (place) => {
      await open({ leaseMs: 3_600_000 });
      faulty(isDds(place), 'silence', 1);
      const taskId = server.offer();
      start(done, { REQUEST_TIMEOUT_SECS: '1' }, { clock: fastClock(20) });
      expect((await server.ending(taskId)).kind).toBe('complete');
    },
  );

  test('a stop ends the wait for a service that never answers', async () => {
    await open();
    faulty(isDds('request'), 'silence');
    const { node, ended } = start();
    await server.seen(isDds('request'));
    node.stop();
    await ended;
    expect(node.state).toBe('stopped');
  });

  test('a first login that is refused ends the node with an error', async () => {
    await open();
    faulty(isDds('verify'), { status: 401, body: 'invalid signature' });
    const { node, ended } = start(done, { TOKEN_REAUTH_MAX_RETRIES: '2' });
    await expect(ended).rejects.toMatchObject({
      code: 'unauthenticated',
      message: expect.stringContaining('DDS SIWE login failed after 3 attempts'),
    });
    expect(node.state).toBe('stopped');
    expect(server.of('dds', 'POST', '/verify')).toHaveLength(3);
  });

  test.each([403, 404])(
    'verify answered %i: the node registers again, and then logs in',
    async (status) => {
      await open({ nodeTokenMs: 1_500 });
      start(done, { TOKEN_REAUTH_MAX_RETRIES: '20', TOKEN_REAUTH_JITTER_MS: '300' });
      await server.seen(isPoll);
      server.registered = false;
      server.fault = (request) =>
        isDds('verify')(request) && !server.registered ? { status, body: 'node not found' } : null;
      await expect.poll(() => server.registrations.length, { timeout: 15_000 }).toBe(2);
      const login = await server.next(isDds('verify'));
      expect(JSON.parse(login.body.toString())).toHaveProperty('signature');
      await server.next(isPoll);
    },
    30_000,
  );

  test('a nonce answered 403 or 404 does not make it register again', async () => {
    await open({ nodeTokenMs: 1_200 });
    start(done, { TOKEN_REAUTH_MAX_RETRIES: '3' });
    await server.seen(isPoll);
    const before = server.registrations.length;
    const statuses = [403, 404];
    server.fault = (request) => {
      const status = isDds('request')(request) ? statuses.shift() : undefined;
      return status === undefined ? null : { status };
    };
    await expect.poll(() => statuses.length, { timeout: 15_000 }).toBe(0);
    await expect
      .poll(() => server.of('dds', 'POST', '/verify').length, { timeout: 15_000 })
      .toBeGreaterThan(1);
    expect(server.registrations.length).toBe(before);
  }, 40_000);

  test('the token is refreshed while a task runs, and used until then', async () => {
    await open({ nodeTokenMs: 2_000 });
    const taskId = server.offer();
    start(() => new Promise((resolve) => setTimeout(resolve, 2_500)), { TOKEN_REAUTH_JITTER_MS: '0' });
    expect((await server.ending(taskId)).kind).toBe('complete');
    const used = new Set(beats(taskId).map(({ headers }) => headers['authorization']));
    expect(used.size).toBeGreaterThan(1);
  }, 20_000);
});

test('no secret is in the log, at any level, whatever goes wrong', async () => {
  await open({ leaseMs: 3_600_000 });
  let text = '';
  const destination = new Writable({
    write(chunk: Buffer, _encoding, written) {
      text += chunk.toString();
      written();
    },
  });
  const secrets = [REG_SECRET, VECTOR.privateKey];
  const left = new Map<string, number>();
  server.fault = (request) => {
    const count = (left.get(request.path) ?? 0) + 1;
    left.set(request.path, count);
    // Each path first quotes what it was sent, then answers what nobody can read, then works. A registration's answer is not read:
    // it would be taken for one that worked, and whether the next comes before the last login is a matter of luck.
    if (count === 1) {
      return { status: 500, body: `${JSON.stringify(request.headers)} ${request.body.toString('latin1')}` };
    }
    if (count > 2 || request.path.endsWith('/register-wallet')) return null;
    return { status: 200, body: '{"access_token":7,"access_token":"x"' };
  };
  const taskId = server.offer();
  start(
    async (ctx) => {
      await ctx.output.putBytes('a.json', new Uint8Array(1));
      ctx.log.info('mine', { token: ctx.accessToken.get() });
    },
    {},
    { clock: fastClock(100), log: createLogger({ format: 'json', level: 'debug', destination, secrets }) },
  );
  await server.ending(taskId);
  await free();
  expect(text.length).toBeGreaterThan(1_000);
  const signatures = server.received.flatMap(
    ({ body }) => /0x[0-9a-f]{130}/.exec(body.toString())?.[0] ?? [],
  );
  expect(signatures.length).toBeGreaterThan(1);
  for (const secret of [...secrets, ...signatures, 'node-token-1', 'domain-token-1']) {
    expect(text).not.toContain(secret);
  }
}, 30_000);

describe('clocks', () => {
  test.each([
    ['ahead', 3_600_000],
    ['behind', -3_600_000],
  ])(
    'a machine an hour %s keeps its leases, without a flood of heartbeats',
    async (_name, offMs) => {
      await open({ leaseMs: 4_000 });
      const taskId = server.offer();
      const clock: Clock = { ...systemClock, now: () => Date.now() + offMs };
      start(() => new Promise((resolve) => setTimeout(resolve, 2_600)), {}, { clock });
      expect((await server.ending(taskId)).kind).toBe('complete');
      const count = beats(taskId).length;
      expect(count).toBeGreaterThanOrEqual(3);
      expect(count).toBeLessThanOrEqual(16);
    },
    20_000,
  );
});

describe('storage', () => {
  test('a domain token that expires in the middle of an upload: an early heartbeat, and the part again', async () => {
    await open({ partBytes: 64 * 1024, leaseMs: 60_000 });
    const taskId = server.offer();
    server.fault = ({ query }) => {
      // From the second part on only the next token is good.
      if (query.endsWith('partNumber=2')) server.domainToken = 'domain-token-2';
      return null;
    };
    start(async (ctx) => {
      const upload = await ctx.output.openMultipart('big.bin');
      for (let i = 0; i < 5; i += 1) await upload.writeChunk(new Uint8Array(64 * 1024).fill(i));
      await upload.finish();
    });
    expect((await server.ending(taskId)).kind).toBe('complete');
    const [item] = server.items.values();
    expect(item?.bytes.length).toBe(5 * 64 * 1024);
    const second = server.of('domain', 'PUT').filter(({ query }) => query.endsWith('partNumber=2'));
    expect(second.map(({ headers }) => headers['authorization'])).toEqual([
      'Bearer domain-token-1',
      'Bearer domain-token-2',
    ]);
    expect(server.violations).toEqual([]);
  });

  test('a token that stays refused is final, in the words of the reference', async () => {
    await open();
    const taskId = server.offer();
    faulty(({ service, path }) => service === 'domain' && !path.endsWith('info'), {
      status: 401,
      body: 'no',
    });
    start((ctx) => ctx.output.putBytes('a.json', new Uint8Array(1)));
    expect(await server.ending(taskId)).toMatchObject({
      kind: 'fail',
      body: { reason: expect.stringContaining('runner failed: unauthorized (401)') },
    });
  });

  test.each([
    [400, 'bad request (400)'],
    [403, 'other storage error: unexpected status: 403'],
    [404, 'not found (404)'],
    [409, 'conflict (409)'],
    [418, 'other storage error: unexpected status: 418'],
  ])('a download answered %i fails the task with the words of the reference', async (status, words) => {
    await open();
    const taskId = server.offer({ inputs_cids: ['x'] });
    faulty(({ service }) => service === 'domain', { status, body: 'because' });
    start(async (ctx) => void (await ctx.input.getBytesByCid('x')));
    expect(await server.ending(taskId)).toMatchObject({
      body: { reason: `runner failed: ${words}: because` },
    });
  });

  test.each<[string, Fault, string]>([
    ['500', { status: 500, body: 'because' }, 'server error (500): because'],
    ['503', { status: 503, body: 'because' }, 'server error (503): because'],
    ['closed connections', 'reset', 'network error: '],
  ])(
    'a download that only gets %s is given up after a minute, in the same words',
    async (_name, fault, words) => {
      await open({ leaseMs: 3_600_000 });
      const taskId = server.offer({ inputs_cids: ['x'] });
      faulty(({ service }) => service === 'domain', fault);
      start(async (ctx) => void (await ctx.input.getBytesByCid('x')), {}, { clock: fastClock(200) });
      const { body } = await server.ending(taskId);
      expect((body as { reason: string }).reason.startsWith(`runner failed: ${words}`)).toBe(true);
      expect(server.of('domain').length).toBeGreaterThan(5);
    },
  );

  test.each<[string, Fault]>([
    ['503', { status: 503 }],
    ['429', { status: 429 }],
    ['a closed connection', 'reset'],
    ['a single upload answered by what is no metadata', { status: 200, body: '{"data":[{"id":7}]}' }],
    ['HTML', { status: 200, body: '<html>' }],
  ])('an upload answered once with %s is done again, and makes one item', async (_name, fault) => {
    await open();
    const taskId = server.offer();
    faulty(({ service, method }) => service === 'domain' && method === 'POST', fault, 1);
    start((ctx) => ctx.output.putBytes('a.json', new Uint8Array(3)));
    expect((await server.ending(taskId)).kind).toBe('complete');
    expect(server.items.size).toBe(1);
  });

  test('a storage that accepts and never answers holds up neither heartbeats nor a cancel', async () => {
    await open();
    const id = server.store('input', 'text', 'x');
    const taskId = server.offer({ inputs_cids: [id] });
    let cancel = false;
    server.fault = (request) => {
      if (request.service === 'domain') return 'silence';
      return cancel && isBeat(request) ? { status: 200, body: '{"cancel":true}' } : null;
    };
    start(async (ctx) => void (await ctx.input.getBytesByCid(id)));
    await expect.poll(() => beats(taskId).length, { timeout: 10_000 }).toBeGreaterThan(2);
    cancel = true;
    await server.next(isBeat);
    await free();
    expect(about(taskId)).toEqual([]);
  });

  test.each([
    [
      'another host',
      'http://elsewhere.test/api/v1/domains/9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21/data/x',
      /domain server/,
    ],
    ['another domain', '/api/v1/domains/00000000-0000-4000-8000-000000000000/data/x', /domain/],
    ['a whole domain', '/api/v1/domains/9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21/data', /whole domain/],
    ['nothing', ' ', /empty/],
  ])('an input of %s is refused without a request', async (_name, cid, words) => {
    await open();
    const taskId = server.offer({ inputs_cids: [cid] });
    start(async (ctx) => void (await ctx.input.materializeCidToTemp(cid)));
    expect(await server.ending(taskId)).toMatchObject({ body: { reason: expect.stringMatching(words) } });
    expect(server.of('domain')).toEqual([]);
  });
});
