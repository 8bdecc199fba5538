import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Harness, TIME, UUID } from '../harness.test.support.ts';
import { generatePrivateKeyHex, signMessage, siweMessage, walletAddress } from '../siwe.ts';

let server: Harness;
beforeAll(async () => {
  server = await Harness.open();
});
afterAll(async () => {
  await server[Symbol.asyncDispose]();
});

const WALLET = '0x1a642f0e3c3af545e7acbd38b07251b3990914f1';

async function register(body: Record<string, unknown> = {}, privateKey = generatePrivateKeyHex()) {
  const json = {
    ...(await server.signed(privateKey)),
    registration_credentials: (await server.addNode()).credentials,
    capabilities: ['/examples/hello/v1'],
    version: '0.3.2',
    ...body,
  };
  return await server.call('POST', '/internal/v1/nodes/register-wallet', { token: null, json });
}

function verify(json: unknown) {
  return server.call('POST', '/internal/v1/auth/siwe/verify', { token: null, json });
}

describe('nonce', () => {
  test('the answer has the six members of the wire', async () => {
    const answer = await server.call('POST', '/internal/v1/auth/siwe/request', {
      token: null,
      json: { wallet: WALLET },
    });
    expect(answer.status).toBe(200);
    expect(answer.body).toEqual({
      nonce: expect.stringMatching(/^[0-9a-z]{8,}$/),
      domain: new URL(server.dispatcher.url).host,
      uri: server.dispatcher.url,
      version: '1',
      chainId: 8453,
      issuedAt: expect.stringMatching(TIME),
    });
  });

  test('every call gives another one', async () => {
    const nonces = await Promise.all(Array.from({ length: 20 }, () => server.nonce(WALLET)));
    expect(new Set(nonces.map(({ nonce }) => nonce)).size).toBe(20);
  });

  test.each([['0x12'], ['1a642f0e3c3af545e7acbd38b07251b3990914f1'], [7], [null]])(
    'a wallet %j is refused in plain text',
    async (wallet) => {
      const answer = await server.call('POST', '/internal/v1/auth/siwe/request', {
        token: null,
        json: { wallet },
      });
      expect(answer.status).toBe(400);
      expect(answer.header('content-type')).toBe('text/plain; charset=utf-8');
      expect(answer.text).toContain('wallet');
    },
  );
});

describe('registration', () => {
  test('success is 200 with an empty body, and the node is known with what it told', async () => {
    const { id, credentials } = await server.addNode('dedicated');
    const privateKey = generatePrivateKeyHex();
    const answer = await register(
      {
        registration_credentials: credentials,
        capabilities: ['/b/v1', '/a/v1'],
        max_concurrency: 4,
        labels: { gpu: 'yes' },
      },
      privateKey,
    );
    expect(answer.status).toBe(200);
    expect(answer.text).toBe('');
    const { body } = await server.call('GET', '/v1/nodes');
    expect(body.nodes.find((node: { id: string }) => node.id === id)).toEqual({
      id,
      name: 'a node',
      mode: 'dedicated',
      organization_id: expect.stringMatching(UUID),
      wallet: walletAddress(privateKey),
      capabilities: expect.arrayContaining(['/a/v1', '/b/v1']),
      labels: { gpu: 'yes' },
      version: '0.3.2',
      max_concurrency: 4,
      created_at: expect.stringMatching(TIME),
      registered_at: expect.stringMatching(TIME),
      last_seen_at: null,
      active_leases: 0,
    });
  });

  test.each([['0.3.2'], ['v1.2.3'], ['1.2.3-rc.1+build.7']])('version %s is taken', async (version) => {
    expect((await register({ version })).status).toBe(200);
  });

  test.each([['dev'], ['1.2'], ['01.2.3'], ['1.2.3-'], ['']])('version %j is refused', async (version) => {
    const answer = await register({ version });
    expect(answer.status).toBe(400);
    expect(answer.text).toContain('version');
  });

  test('256 capabilities of 256 bytes are taken, and the node can log in and ask for work with them', async () => {
    const capabilities = Array.from({ length: 256 }, (_, index) => `/c/${index}/`.padEnd(256, 'x'));
    const node = await server.joinNode({ capabilities });
    const answer = await server.call('GET', '/v1/tasks', { token: node.token });
    expect(answer.status).toBe(204);
  });

  test.each([
    ['257 capabilities', { capabilities: Array.from({ length: 257 }, (_, index) => `/c/${index}`) }],
    ['no capabilities', { capabilities: [] }],
    ['a capability of 257 bytes', { capabilities: ['/'.padEnd(257, 'x')] }],
    ['a capability of 256 characters and more bytes', { capabilities: ['/'.padEnd(256, 'é')] }],
    ['a capability with a blank', { capabilities: ['/a b'] }],
    ['max_concurrency 0', { max_concurrency: 0 }],
    ['max_concurrency as text', { max_concurrency: '4' }],
    ['labels that are no map of strings', { labels: { gpu: 1 } }],
    ['65 labels', { labels: Object.fromEntries(Array.from({ length: 65 }, (_, i) => [`l${i}`, 'x'])) }],
    ['credentials that are no Base64', { registration_credentials: '***' }],
    ['credentials without padding', { registration_credentials: 'YTpiYg' }],
    ['credentials without a colon', { registration_credentials: base64('nothing') }],
    [
      'credentials with two colons',
      { registration_credentials: base64('3f6c1d0e-7a55-4c5e-9f0b-2d8a64b1c7e9:a:b') },
    ],
    ['credentials whose id is no UUID', { registration_credentials: base64('node:secret') }],
    ['a signature that is none', { signature: '0x12' }],
    ['a message that is none', { message: 'hello' }],
  ])('%s are refused with 400', async (_name, body) => {
    expect((await register(body)).status).toBe(400);
  });

  test.each([
    [65_536, 65_536],
    [65_537, 65_536],
    [Number.MAX_SAFE_INTEGER, 65_536],
  ])('max_concurrency %d is taken and counts as %d', async (given, counted) => {
    const { id, credentials } = await server.addNode();
    const answer = await register({ registration_credentials: credentials, max_concurrency: given });
    expect(answer.status).toBe(200);
    expect((await server.store.getNode(id))?.max_concurrency).toBe(counted);
  });

  test('64 labels are taken', async () => {
    const labels = Object.fromEntries(Array.from({ length: 64 }, (_, i) => [`l${i}`, 'x']));
    expect((await register({ labels })).status).toBe(200);
  });

  test('a wrong secret and an unknown node are 401, and the text does not repeat the secret', async () => {
    const { id } = await server.addNode();
    for (const credentials of [
      base64(`${id}:wrong-secret`),
      base64('3f6c1d0e-7a55-4c5e-9f0b-2d8a64b1c7e9:wrong-secret'),
    ]) {
      const answer = await register({ registration_credentials: credentials });
      expect(answer.status).toBe(401);
      expect(answer.text).not.toContain('wrong-secret');
    }
  });

  test('the secret is judged before the signature is recovered', async () => {
    const { id } = await server.addNode();
    const answer = await register({
      registration_credentials: base64(`${id}:wrong-secret`),
      signature: `0x${'ff'.repeat(65)}`,
    });
    expect(answer.status).toBe(401);
    expect(answer.text).toContain('registration secret');
  });

  test('another wallet for a node that is online is 409, and the node goes on', async () => {
    const node = await server.joinNode();
    expect((await server.call('GET', '/v1/tasks', { token: node.token })).status).toBe(204);
    await expect.poll(async () => (await server.store.getNode(node.id))?.last_seen_at).not.toBeNull();
    const answer = await register({ registration_credentials: node.credentials }, generatePrivateKeyHex());
    expect(answer.status).toBe(409);
    expect(answer.text).toContain('online with another wallet');
    expect((await server.call('GET', '/v1/tasks', { token: node.token })).status).toBe(204);
    const same = await register({ registration_credentials: node.credentials }, node.privateKey);
    expect(same.status).toBe(200);
  });

  test('a wallet that belongs to another node is 409', async () => {
    const privateKey = generatePrivateKeyHex();
    expect((await register({}, privateKey)).status).toBe(200);
    expect((await register({}, privateKey)).status).toBe(409);
  });

  test('registering again with the same identity is 200, and what the node told last counts', async () => {
    const privateKey = generatePrivateKeyHex();
    const { id, credentials } = await server.addNode();
    await register({ registration_credentials: credentials }, privateKey);
    const again = await register(
      { registration_credentials: credentials, capabilities: ['/new/v2'] },
      privateKey,
    );
    expect(again.status).toBe(200);
    expect((await server.store.getNode(id))?.capabilities).toEqual(['/new/v2']);
  });

  test('a signature of another key is 401', async () => {
    const { message } = await server.signed(generatePrivateKeyHex());
    const answer = await register({ message, signature: signMessage(message, generatePrivateKeyHex()) });
    expect(answer.status).toBe(401);
    expect(answer.text).toBe('invalid signature');
  });
});

describe('login', () => {
  test('the answer has exactly the four members of the wire, and the token the claims of a node token', async () => {
    const node = await server.joinNode({ maxConcurrency: 3 });
    const answer = await verify({ address: node.wallet, ...(await server.signed(node.privateKey)) });
    expect(answer.status).toBe(200);
    expect(answer.body).toEqual({
      node_id: node.id,
      wallet: node.wallet,
      access_token: expect.any(String),
      access_expires_at: expect.stringMatching(TIME),
    });
    const claims = claimsOf(answer.body.access_token);
    expect(claims).toEqual({
      iss: 'dds',
      sub: node.id,
      node_id: node.id,
      aud: ['dms'],
      token_use: 'node',
      wallet: node.wallet,
      organization_id: expect.stringMatching(UUID),
      node_mode: 'public',
      capabilities: ['/examples/hello/v1'],
      max_concurrency: 3,
      iat: expect.any(Number),
      exp: expect.any(Number),
    });
    expect(claims.exp - claims.iat).toBe(3600);
    expect(Date.parse(answer.body.access_expires_at)).toBe(claims.exp * 1000);
  });

  test('the address may be left out, be null, or be in any letter case', async () => {
    const { privateKey, wallet } = await server.joinNode();
    expect((await verify(await server.signed(privateKey))).status).toBe(200);
    expect((await verify({ address: null, ...(await server.signed(privateKey)) })).status).toBe(200);
    const upper = `0x${wallet.slice(2).toUpperCase()}`;
    expect((await verify({ address: upper, ...(await server.signed(privateKey)) })).status).toBe(200);
  });

  test('a wallet that is not registered is 403 "node not found"', async () => {
    const answer = await verify(await server.signed(generatePrivateKeyHex()));
    expect(answer.status).toBe(403);
    expect(answer.text).toBe('node not found');
    expect(answer.header('content-type')).toBe('text/plain; charset=utf-8');
  });

  test('an address that is not the message\'s is 403 "wallet does not match node"', async () => {
    const { privateKey } = await server.joinNode();
    const answer = await verify({ address: WALLET, ...(await server.signed(privateKey)) });
    expect(answer.status).toBe(403);
    expect(answer.text).toBe('wallet does not match node');
  });

  test('a nonce works once', async () => {
    const { privateKey } = await server.joinNode();
    const signed = await server.signed(privateKey);
    expect((await verify(signed)).status).toBe(200);
    const again = await verify(signed);
    expect(again.status).toBe(401);
    expect(again.text).toBe('invalid nonce');
  });

  test('of a thousand logins racing with one nonce exactly one succeeds', async () => {
    await using own = await Harness.open({ limits: { loginBurst: 5_000 } });
    const node = await own.joinNode();
    const json = await own.signed(node.privateKey);
    const answers = await Promise.all(
      Array.from({ length: 1_000 }, () =>
        own.call('POST', '/internal/v1/auth/siwe/verify', { token: null, json }),
      ),
    );
    expect(answers.filter(({ status }) => status === 200)).toHaveLength(1);
    expect(answers.filter(({ status, text }) => status === 401 && text === 'invalid nonce')).toHaveLength(
      999,
    );
  });

  test('a nonce issued for another wallet is refused, and is used up', async () => {
    const node = await server.joinNode();
    const stolen = await server.nonce(WALLET);
    const message = siweMessage(stolen, node.wallet);
    const answer = await verify({ message, signature: signMessage(message, node.privateKey) });
    expect(answer.status).toBe(401);
    expect(answer.text).toBe('invalid nonce');
    expect(await server.store.takeNonce(stolen.nonce)).toBeNull();
  });

  test('the time in the message may be written in another way', async () => {
    const node = await server.joinNode();
    const challenge = await server.nonce(node.wallet);
    const issuedAt = challenge.issuedAt.replace('Z', '+00:00');
    const message = siweMessage({ ...challenge, issuedAt }, node.wallet);
    const answer = await verify({ message, signature: signMessage(message, node.privateKey) });
    expect(answer.status).toBe(200);
  });

  test.each([
    ['domain', 'evil.example'],
    ['uri', 'http://evil.example'],
    ['chainId', 1],
    ['version', '2'],
    ['nonce', 'abcdefgh12345678'],
  ])('a message whose %s is not what was issued is refused', async (member, value) => {
    const node = await server.joinNode();
    const message = siweMessage({ ...(await server.nonce(node.wallet)), [member]: value }, node.wallet);
    const answer = await verify({ message, signature: signMessage(message, node.privateKey) });
    expect(answer.status).toBe(401);
    expect(answer.text).toBe('invalid nonce');
  });
});

test('an address that has begun as many logins as it may ends those, and pays for what it made up', async () => {
  await using small = await Harness.open({ limits: { loginBurst: 5 } });
  // Two of the five: a registration and a login.
  const node = await small.joinNode();
  const signed = [await small.signed(node.privateKey), await small.signed(node.privateKey)];
  const verify = (json: unknown) =>
    small.call('POST', '/internal/v1/auth/siwe/verify', { token: null, json });
  expect((await verify(signed[0])).status).toBe(200);
  // A nonce that was never issued costs what one that was does, and with it the last is spent; this one is still answered.
  const { message, signature } = signed[0]!;
  const forged = { message: message.replace(/Nonce: \w+/, 'Nonce: abcdefgh12345678'), signature };
  for (let index = 0; index < 2; index += 1) expect((await verify(forged)).status).toBe(401);
  const refused = await verify(signed[1]);
  expect(refused.status).toBe(429);
  expect(refused.text).toContain('loginBurst');
});

test('one address may begin loginBurst times at once, and is told to wait at one more', async () => {
  await using small = await Harness.open({ limits: { loginBurst: 5 } });
  const ask = () =>
    small.call('POST', '/internal/v1/auth/siwe/request', { token: null, json: { wallet: WALLET } });
  for (let index = 0; index < 5; index += 1) expect((await ask()).status).toBe(200);
  // Refilled at one every two seconds: slow enough to meet, unless this machine stands still.
  const refused = await ask();
  expect(refused.status).toBe(429);
  expect(refused.header('retry-after')).toBe('2');
  expect(refused.text).toContain('loginBurst');
  // The next in line is told to come after it.
  expect((await ask()).header('retry-after')).toBe('4');
});

function base64(text: string): string {
  return Buffer.from(text).toString('base64');
}

function claimsOf(token: string) {
  return JSON.parse(Buffer.from(token.split('.')[1]!, 'base64url').toString());
}
