/** Tokens that are forged, expired, foreign, changed, of the wrong kind or revoked, over real sockets and in every place. */
import { createPrivateKey, generateKeyPairSync } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { JsonObject } from '@millrace/runner';
import { SimulatedClock } from '@millrace/runner/testing';
import { SignJWT } from 'jose';
import { BearerAuth, WALLET_TTL_MS } from './auth.ts';
import { Harness, type TestNode } from './harness.test.support.ts';
import { generatePrivateKeyHex, walletAddress } from './siwe.ts';
import type { NodeRecord } from './records.ts';
import type { Claims, Tokens } from './tokens.ts';

const HELLO = '/examples/hello/v1';
let server: Harness;
let node: TestNode;
let domainToken: string;
let taskId: string;

beforeAll(async () => {
  server = await Harness.open();
  node = await server.joinNode({ maxConcurrency: 2 });
  await server.submit();
  const lease = await server.call('GET', '/v1/tasks', { token: node.token });
  taskId = lease.body.task.id;
  domainToken = lease.body.access_token;
});
afterAll(async () => {
  await server[Symbol.asyncDispose]();
});

type Place = readonly [method: 'GET' | 'POST', path: () => string, json?: JsonObject];

const NODE_PLACES: readonly Place[] = [
  ['GET', () => '/v1/tasks'],
  ['POST', () => `/v1/tasks/${taskId}/heartbeat`, { progress: {}, events: [] }],
  ['POST', () => `/v1/tasks/${taskId}/complete`, { output_cids: [], meta: null }],
  ['POST', () => `/v1/tasks/${taskId}/fail`, { reason: 'no' }],
  ['POST', () => '/v1/tasks/lease', { max: 1 }],
];
const data = (): string => `/api/v1/domains/${server.dispatcher.defaultDomainId}/data`;
const DOMAIN_PLACES: readonly Place[] = [
  ['GET', data],
  ['POST', () => `${data()}/multipart?uploads`, { name: 'n', data_type: 't', size: 1 }],
];

async function statuses(places: readonly Place[], token: string | null): Promise<number[]> {
  const answers = [];
  for (const [method, path, json] of places) {
    answers.push(await server.call(method, path(), { token, ...(json === undefined ? {} : { json }) }));
  }
  return answers.map(({ status }) => status);
}

function payloadOf(token: string): JsonObject {
  return JSON.parse(Buffer.from(token.split('.')[1]!, 'base64url').toString()) as JsonObject;
}

async function signed(payload: JsonObject, key: Parameters<SignJWT['sign']>[0]): Promise<string> {
  return await new SignJWT(payload).setProtectedHeader({ alg: 'ES256', typ: 'JWT' }).sign(key);
}

/** The dispatcher's own key, for tokens it would never issue. */
async function ownKey() {
  const jwk = await server.store.setting('signing_key', () => ({}));
  return createPrivateKey({ key: jwk, format: 'jwk' });
}

const now = (): number => Math.floor(Date.now() / 1000);

describe.each([
  ['the task service', NODE_PLACES, () => node.token],
  ['the domain server', DOMAIN_PLACES, () => domainToken],
] as const)('%s', (_name, places, good) => {
  test.each<[string, () => Promise<string> | string]>([
    [
      'forged with another key',
      () => {
        const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
        return signed(payloadOf(good()), privateKey);
      },
    ],
    ['expired a second ago', async () => signed({ ...payloadOf(good()), exp: now() - 1 }, await ownKey())],
    [
      'without an expiry',
      async () => {
        const { exp: _exp, ...rest } = payloadOf(good());
        return signed(rest, await ownKey());
      },
    ],
    ['of another issuer', async () => signed({ ...payloadOf(good()), iss: 'elsewhere' }, await ownKey())],
    ['of an unknown kind', async () => signed({ ...payloadOf(good()), token_use: 'admin' }, await ownKey())],
    [
      'of a foreign dispatcher',
      async () => {
        await using other = await Harness.open();
        const stranger = await other.joinNode();
        if (good() === node.token) return stranger.token;
        await other.submit();
        return (await other.call('GET', '/v1/tasks', { token: stranger.token })).body.access_token as string;
      },
    ],
    [
      'with changed claims',
      () => {
        const [head, , signature] = good().split('.');
        const claims = { ...payloadOf(good()), exp: now() + 1_000_000 };
        return [head, Buffer.from(JSON.stringify(claims)).toString('base64url'), signature].join('.');
      },
    ],
    [
      'that says it needs no signature',
      () => {
        const head = Buffer.from('{"alg":"none"}').toString('base64url');
        return `${head}.${good().split('.')[1]}.`;
      },
    ],
    ['cut short', () => good().slice(0, -10)],
    ['that is no JWT', () => 'opaque'],
    ['of 100 KiB', () => 'x'.repeat(100 * 1024)],
  ])('401 for a token %s', async (_title, make) => {
    const token = await make();
    expect(await statuses(places, token)).toEqual(places.map(() => 401));
  });

  test('401 without a token, and no error repeats one', async () => {
    expect(await statuses(places, null)).toEqual(places.map(() => 401));
    const answer = await server.call(places[0]![0], places[0]![1](), { token: 'sesame-token' });
    expect(answer.text).not.toContain('sesame-token');
  });
});

test('a good token of the wrong kind is 403', async () => {
  expect(await statuses(NODE_PLACES, domainToken)).toEqual(NODE_PLACES.map(() => 403));
  expect(await statuses(NODE_PLACES, server.clientToken)).toEqual(NODE_PLACES.map(() => 403));
  expect(await statuses(DOMAIN_PLACES, node.token)).toEqual(DOMAIN_PLACES.map(() => 403));
});

describe('a registration that was replaced', () => {
  async function register(credentials: string, privateKey: string) {
    return server.call('POST', '/internal/v1/nodes/register-wallet', {
      token: null,
      json: {
        ...(await server.signed(privateKey)),
        registration_credentials: credentials,
        capabilities: [HELLO],
        version: '1.0.0',
      },
    });
  }

  test('by another key ends the former token at once, everywhere, and its login; the new one works', async () => {
    const former = await server.joinNode();
    // Known, but it never asked for work: one that is online keeps its key.
    expect(await statuses([NODE_PLACES[1]!], former.token)).not.toEqual([401]);
    const privateKey = generatePrivateKeyHex();
    expect((await register(former.credentials, privateKey)).status).toBe(200);
    expect(await statuses(NODE_PLACES, former.token)).toEqual(NODE_PLACES.map(() => 401));
    const login = await server.call('POST', '/internal/v1/auth/siwe/verify', {
      token: null,
      json: await server.signed(former.privateKey),
    });
    // The reference node registers again after this.
    expect([login.status, login.text]).toEqual([403, 'node not found']);
    const token = await server.login(privateKey);
    expect((await server.call('GET', '/v1/tasks', { token })).status).toBe(204);
  });

  test('by the same key changes nothing for its token', async () => {
    const same = await server.joinNode();
    expect((await register(same.credentials, same.privateKey)).status).toBe(200);
    expect((await server.call('GET', '/v1/tasks', { token: same.token })).status).toBe(204);
  });
});

test('a token of a node that is not there any more is 401', async () => {
  const gone = {
    ...payloadOf(node.token),
    node_id: '2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10',
    sub: '2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10',
  };
  expect(await statuses(NODE_PLACES, await signed(gone, await ownKey()))).toEqual(NODE_PLACES.map(() => 401));
});

describe('registrations of another process', () => {
  const request = { headers: { authorization: 'Bearer t' } } as Parameters<BearerAuth['node']>[0];
  const wallets = [walletAddress(generatePrivateKeyHex()), walletAddress(generatePrivateKeyHex())] as const;
  const claims: Claims = {
    kind: 'node',
    nodeId: 'n',
    wallet: wallets[0],
    organizationId: 'o',
    mode: 'public',
    capabilities: [],
    maxConcurrency: 1,
  };

  test('are noticed after five seconds and not before', async () => {
    const clock = new SimulatedClock();
    let wallet: string = wallets[0];
    let asked = 0;
    const auth = new BearerAuth(
      { verify: () => Promise.resolve(claims) } as unknown as Tokens,
      { getNode: () => Promise.resolve(((asked += 1), { wallet } as NodeRecord)) },
      clock,
    );
    expect(await auth.node(request)).toBe(claims);
    wallet = wallets[1];
    await clock.advance(WALLET_TTL_MS - 1);
    expect(await auth.node(request)).toBe(claims);
    expect(asked).toBe(1);
    await clock.advance(1);
    await expect(auth.node(request)).rejects.toMatchObject({ code: 'unauthenticated' });
  });

  test('a registration here that comes while the store is read is not forgotten for it', async () => {
    let answer: (node: NodeRecord) => void = () => undefined;
    const auth = new BearerAuth(
      { verify: () => Promise.resolve(claims) } as unknown as Tokens,
      { getNode: () => new Promise((resolve) => (answer = resolve)) },
      new SimulatedClock(),
    );
    const asked = auth.node(request);
    await Promise.resolve();
    await Promise.resolve();
    auth.registered('n', wallets[1]);
    answer({ wallet: wallets[0] } as NodeRecord);
    await expect(asked).rejects.toMatchObject({ code: 'unauthenticated' });
    await expect(auth.node(request)).rejects.toMatchObject({ code: 'unauthenticated' });
  });
});
