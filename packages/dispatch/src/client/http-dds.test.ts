import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import { createServer as createTcpServer, type AddressInfo, type Socket } from 'node:net';
import { MillraceError, describeError } from '@millrace/runner';
import { afterEach, describe, expect, test } from 'vitest';
import { Harness } from '../harness.test.support.ts';
import { generatePrivateKeyHex, signMessage, siweMessage, walletAddress } from '../siwe.ts';
import type { Dds } from './dds.ts';
import { openHttpDds } from './http-dds.ts';

const NONCE = {
  nonce: 'Zk3vQ9dL2mXa',
  domain: '127.0.0.1:8080',
  uri: 'http://127.0.0.1:8080',
  version: '1',
  chainId: 8453,
  issuedAt: '2026-05-04T03:02:01Z',
};
const CREDENTIALS = 'M2Y2YzFkMGUtN2E1NS00YzVlLTlmMGItMmQ4YTY0YjFjN2U5OnMzY3IzdC12YWx1ZQ==';
const SIGNATURE = `0x${'ab'.repeat(65)}`;
const REGISTRATION = {
  message: 'm',
  signature: SIGNATURE,
  registration_credentials: CREDENTIALS,
  capabilities: ['/examples/hello/v1'],
  version: '0.3.2',
};
const VERIFY = { address: '0x1a', message: 'm', signature: SIGNATURE };
const TOKEN = { access_token: 'eyJ.a.b', access_expires_at: '2026-05-04T04:02:01Z' };

const CALLS = {
  nonce: (dds: Dds, signal?: AbortSignal) => dds.requestNonce('0x1a', signal && { signal }),
  register: (dds: Dds, signal?: AbortSignal) => dds.registerWallet(REGISTRATION, signal && { signal }),
  verify: (dds: Dds, signal?: AbortSignal) => dds.verify(VERIFY, signal && { signal }),
} as const;
type Call = keyof typeof CALLS;
const EVERY_CALL = Object.keys(CALLS) as Call[];

const cleanups: (() => Promise<void>)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).toReversed()) await cleanup();
});

interface Seen {
  readonly line: string;
  readonly headers: IncomingMessage['headers'];
  readonly body: string;
}

/** A service that answers every request the same way, and the client for it. */
async function service(
  answer: (response: ServerResponse, seen: Seen) => void,
  options: { readonly timeoutMs?: number; readonly path?: string } = {},
): Promise<{ readonly dds: Dds & AsyncDisposable; readonly seen: Seen[] }> {
  const seen: Seen[] = [];
  const server = createServer((request, response) => {
    let body = '';
    request.setEncoding('utf8');
    request.on('data', (chunk: string) => (body += chunk));
    request.on('end', () => {
      const one = { line: `${request.method} ${request.url}`, headers: request.headers, body };
      seen.push(one);
      answer(response, one);
    });
  });
  return { dds: await client(server, options), seen };
}

/** A service that handles the bare socket. */
async function rawService(
  handle: (socket: Socket) => void,
  options: { readonly timeoutMs?: number } = {},
): Promise<Dds & AsyncDisposable> {
  return await client(createTcpServer(handle), options);
}

async function client(
  server: Server | ReturnType<typeof createTcpServer>,
  options: { readonly timeoutMs?: number; readonly path?: string },
): Promise<Dds & AsyncDisposable> {
  const sockets = new Set<Socket>();
  server.on('connection', (socket: Socket) => {
    sockets.add(socket);
    socket.on('error', () => undefined);
    socket.on('close', () => sockets.delete(socket));
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  const dds = openHttpDds({
    baseUrl: `http://127.0.0.1:${port}${options.path ?? ''}`,
    timeoutMs: options.timeoutMs ?? 20_000,
  });
  cleanups.push(async () => {
    await dds[Symbol.asyncDispose]();
    for (const socket of sockets) socket.destroy();
    await new Promise((resolve) => server.close(resolve));
  });
  return dds;
}

function sendJson(response: ServerResponse, value: unknown, status = 200): void {
  response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(value));
}

async function failure(promise: Promise<unknown>): Promise<MillraceError> {
  const error = await promise.then(
    (value) => new Error(`succeeded with ${JSON.stringify(value)}`),
    (reason: unknown) => reason,
  );
  if (!MillraceError.is(error)) throw error;
  return error;
}

describe('what is sent', () => {
  test('the three calls go to their paths as JSON, without authorisation', async () => {
    const { dds, seen } = await service((response, { line }) =>
      sendJson(response, line.endsWith('request') ? NONCE : TOKEN),
    );
    expect(await dds.requestNonce('0x1a')).toEqual(NONCE);
    await dds.registerWallet(REGISTRATION);
    await dds.verify(VERIFY);
    expect(seen.map(({ line }) => line)).toEqual([
      'POST /internal/v1/auth/siwe/request',
      'POST /internal/v1/nodes/register-wallet',
      'POST /internal/v1/auth/siwe/verify',
    ]);
    expect(seen.map(({ body }) => JSON.parse(body) as unknown)).toEqual([
      { wallet: '0x1a' },
      REGISTRATION,
      VERIFY,
    ]);
    for (const { headers, body } of seen) {
      expect(headers['content-type']).toBe('application/json');
      expect(headers['content-length']).toBe(String(Buffer.byteLength(body)));
      expect(headers.authorization).toBeUndefined();
    }
  });

  test('a base URL with a path and trailing slashes keeps its path', async () => {
    const { dds, seen } = await service((response) => sendJson(response, NONCE), { path: '/net/dds//' });
    await dds.requestNonce('0x1a');
    expect(seen[0]?.line).toBe('POST /net/dds/internal/v1/auth/siwe/request');
  });

  test('a base URL that is not http is refused when the client is opened', () => {
    expect(() => openHttpDds({ baseUrl: 'ftp://host' })).toThrow(/base URL must be http/);
  });
});

describe('answers that are accepted', () => {
  test('further members are dropped', async () => {
    const { dds } = await service((response) => sendJson(response, { ...NONCE, statement: 'x' }));
    expect(await dds.requestNonce('0x1a')).toEqual(NONCE);
  });

  test.each([
    ['empty', (response: ServerResponse) => void response.writeHead(200).end()],
    ['201 and no JSON', (response: ServerResponse) => void response.writeHead(201).end('<ok>')],
    ['204', (response: ServerResponse) => void response.writeHead(204).end()],
    [
      'cut',
      (response: ServerResponse) => {
        response.writeHead(200, { 'content-length': '100' }).write('half', () => response.destroy());
      },
    ],
    ['larger than any bound', (response: ServerResponse) => void response.end('x'.repeat(300_000))],
  ])('a registration whose 2xx answer is %s succeeded', async (_title, answer) => {
    const { dds } = await service(answer);
    await expect(dds.registerWallet(REGISTRATION)).resolves.toBeUndefined();
  });

  test.each([
    ['access_expires_at', { access_expires_at: '2026-05-04T06:02:01+02:00' }],
    ['expires_at', { expires_at: '2026-05-04T04:02:01Z' }],
    [
      'the former when both are there',
      { access_expires_at: '2026-05-04T04:02:01.000Z', expires_at: '2030-01-01T00:00:00Z' },
    ],
    ['the latter when the former is null', { access_expires_at: null, expires_at: '2026-05-04T04:02:01Z' }],
  ])('the expiry of a login is read from %s', async (_title, expiry) => {
    const { dds } = await service((response) => {
      response.setHeader('date', 'Mon, 04 May 2026 03:02:01 GMT');
      sendJson(response, { access_token: 'opaque', ...expiry });
    });
    expect(await dds.verify(VERIFY)).toEqual({
      accessToken: 'opaque',
      expiresAtMs: Date.UTC(2026, 4, 4, 4, 2, 1),
      serverTimeMs: Date.UTC(2026, 4, 4, 3, 2, 1),
    });
  });

  test('a service that does not tell its time has none', async () => {
    const { dds } = await service((response) => {
      response.sendDate = false;
      sendJson(response, TOKEN);
    });
    expect((await dds.verify(VERIFY)).serverTimeMs).toBeNull();
  });
});

describe('answers that are refused', () => {
  const { nonce: _nonce, ...noNonce } = NONCE;
  const { issuedAt: _issuedAt, ...noTime } = NONCE;
  test.each([
    ['nonce', 'no nonce', noNonce, /nonce must be a string/],
    ['nonce', 'an empty nonce', { ...NONCE, nonce: '' }, /nonce must not be empty/],
    ['nonce', 'no time', noTime, /issuedAt must be a string/],
    ['nonce', 'a chain id in quotes', { ...NONCE, chainId: '8453' }, /chainId must be an integer/],
    ['nonce', 'a fractional chain id', { ...NONCE, chainId: 1.5 }, /chainId must be an integer/],
    ['nonce', 'a null domain', { ...NONCE, domain: null }, /domain must be a string/],
    [
      'nonce',
      'a line break in the URI',
      { ...NONCE, uri: 'http://x\nNonce: y' },
      /uri must be a single line/,
    ],
    ['nonce', 'an array', [NONCE], /must be a JSON object/],
    [
      'verify',
      'no token',
      { expires_at: TOKEN.access_expires_at },
      /access_token must be a non-empty string/,
    ],
    ['verify', 'an empty token', { ...TOKEN, access_token: '' }, /access_token must be a non-empty string/],
    ['verify', 'a token no header can carry', { ...TOKEN, access_token: 'a\nb' }, /access_token must be/],
    ['verify', 'no expiry', { access_token: 'x' }, /must have access_expires_at or expires_at/],
    [
      'verify',
      'an expiry in seconds',
      { ...TOKEN, access_expires_at: 1777860121 },
      /access_expires_at must be an RFC/,
    ],
    [
      'verify',
      'an expiry without offset',
      { ...TOKEN, access_expires_at: '2026-05-04T04:02:01' },
      /must be an RFC/,
    ],
    ['verify', 'the bare token', 'eyJsecret.a.b', /must be a JSON object/],
    ['verify', 'the token in an array', ['eyJsecret.a.b'], /must be a JSON object/],
  ] as const)('%s: %s', async (call, _title, answer, message) => {
    const { dds } = await service((response) => sendJson(response, answer));
    const error = await failure(CALLS[call](dds));
    expect(error.message).toMatch(message);
    expect(error.code).toBe('data_loss');
    expect(error.retryable).toBe(true);
    expect(error.details).toEqual({ call, status: 200 });
    expect(describeError(error)).not.toMatch(/eyJsecret|a\nb/);
  });

  test.each(['nonce', 'verify'] as const)(
    '%s: a body that is not JSON, and it is not quoted',
    async (call) => {
      const { dds } = await service((response) => void response.end('access_token=eyJsecret'));
      const error = await failure(CALLS[call](dds));
      expect(error.code).toBe('data_loss');
      expect(error.details['call']).toBe(call);
      expect(describeError(error)).not.toContain('eyJsecret');
    },
  );

  test.each([
    ['nonce', 'a member twice', '"nonce":"n","nonce":"m"', /nonce must be given once/],
    [
      'nonce',
      'a chain id with a fraction of zero',
      '"nonce":"n","chainId":8453.0',
      /chainId must be an integer/,
    ],
    [
      'verify',
      'a token twice',
      '"access_token":"eyJa","access_token":"eyJb"',
      /access_token must be given once/,
    ],
  ] as const)('%s: %s', async (call, _title, text, message) => {
    const { dds } = await service((response) => void response.end(`{${text}}`));
    const error = await failure(CALLS[call](dds));
    expect(error.message).toMatch(message);
    expect(error.message).not.toContain('eyJ');
    expect(error).toMatchObject({ code: 'data_loss', retryable: true });
  });

  test.each(['nonce', 'verify'] as const)('%s: an empty body', async (call) => {
    const { dds } = await service((response) => void response.end());
    expect((await failure(CALLS[call](dds))).code).toBe('data_loss');
  });

  test('an answer of 64 KiB is read and one byte more is refused', async () => {
    const body = (bytes: number): string => JSON.stringify(NONCE).padEnd(bytes, ' ');
    let size = 64 * 1024;
    const { dds } = await service((response) => void response.end(body(size)));
    expect(await dds.requestNonce('0x1a')).toEqual(NONCE);
    size += 1;
    const error = await failure(dds.requestNonce('0x1a'));
    expect(error.code).toBe('resource_exhausted');
    expect(error.message).toContain('65536');
  });
});

describe('statuses', () => {
  test.each([
    [400, 'invalid_argument', false],
    [401, 'unauthenticated', false],
    [403, 'permission_denied', false],
    [404, 'not_found', false],
    [408, 'unavailable', true],
    [409, 'aborted', false],
    [422, 'invalid_argument', false],
    [429, 'resource_exhausted', true],
    [500, 'unavailable', true],
    [503, 'unavailable', true],
    [302, 'internal', false],
  ] as const)('%i is %s for every call, with status, call and body', async (status, code, retryable) => {
    const { dds } = await service((response) => {
      response.writeHead(status, status === 302 ? { location: '/elsewhere' } : {}).end('node not found');
    });
    for (const call of EVERY_CALL) {
      const error = await failure(CALLS[call](dds));
      expect(error).toMatchObject({ code, retryable, details: { call, status, body: 'node not found' } });
      expect(error.message).toMatch(new RegExp(`status ${status} [A-Z][A-Za-z ]+; body: node not found`));
    }
  });

  test('Retry-After is passed on in milliseconds', async () => {
    const { dds } = await service((response) => void response.writeHead(429, { 'retry-after': '7' }).end());
    expect((await failure(dds.requestNonce('0x1a'))).details['retry_after_ms']).toBe(7_000);
  });

  test('an error body whose 512th byte is inside a character is cut before that character', async () => {
    const { dds } = await service((response) => void response.writeHead(500).end(`${'x'.repeat(511)}€uro`));
    const error = await failure(dds.registerWallet(REGISTRATION));
    expect(error.details['body']).toBe(`${'x'.repeat(511)}… (truncated)`);
  });

  test('an error body of 512 bytes is quoted whole', async () => {
    const body = `${'x'.repeat(509)}€`;
    const { dds } = await service((response) => void response.writeHead(500).end(body));
    expect((await failure(dds.requestNonce('0x1a'))).details['body']).toBe(body);
  });

  test('an error that is cut still tells its status', async () => {
    const { dds } = await service((response) => {
      response.writeHead(403, { 'content-length': '100' }).write('half', () => response.destroy());
    });
    expect((await failure(dds.verify(VERIFY))).details).toMatchObject({ call: 'verify', status: 403 });
  });

  test('a service that quotes the request in its error does not bring secrets into ours', async () => {
    const { dds } = await service(
      (response, { body }) => void response.writeHead(422).end(`cannot read ${body}`),
    );
    for (const call of ['register', 'verify'] as const) {
      const error = await failure(CALLS[call](dds));
      expect(error.message).toContain('cannot read');
      const told = `${describeError(error)} ${JSON.stringify(error.details)}`;
      expect(told).not.toContain(CREDENTIALS.slice(0, 12));
      expect(told).not.toContain(SIGNATURE.slice(0, 12));
    }
  });
});

describe('bad weather', () => {
  test.each(EVERY_CALL)(
    '%s: a service that accepts and never answers is given up at the limit',
    async (call) => {
      const dds = await rawService(() => undefined, { timeoutMs: 150 });
      expect(await failure(CALLS[call](dds))).toMatchObject({
        code: 'unavailable',
        retryable: true,
        details: { call },
      });
    },
  );

  test('a service that drips its answer is given up at the limit although it never falls silent', async () => {
    const dds = await rawService(
      (socket) => {
        socket.write('HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n');
        const drip = setInterval(() => socket.write(' '), 10);
        socket.on('close', () => clearInterval(drip));
      },
      { timeoutMs: 300 },
    );
    const error = await failure(dds.requestNonce('0x1a'));
    expect(error.code).toBe('unavailable');
    expect(error.message).toMatch(/longer than 300 ms/);
  });

  test.each(['nonce', 'verify'] as const)('%s: a body that is cut is a network error', async (call) => {
    const dds = await rawService((socket) => {
      socket.once('data', () => socket.end('HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"nonce":'));
    });
    expect(await failure(CALLS[call](dds))).toMatchObject({ code: 'unavailable', details: { call } });
  });

  test.each(EVERY_CALL)('%s: a connection closed without an answer is a network error', async (call) => {
    const dds = await rawService((socket) => void socket.once('data', () => socket.destroy()));
    expect(await failure(CALLS[call](dds))).toMatchObject({ code: 'unavailable', details: { call } });
  });

  test('an answer that is not HTTP is a network error', async () => {
    const dds = await rawService((socket) => void socket.once('data', () => socket.end('SSH-2.0-x\r\n')));
    expect(await failure(dds.requestNonce('0x1a'))).toMatchObject({ code: 'unavailable', retryable: true });
  });

  test('a port nobody listens on is a network error', async () => {
    const server = createTcpServer();
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const { port } = server.address() as AddressInfo;
    await new Promise((resolve) => server.close(resolve));
    await using dds = openHttpDds({ baseUrl: `http://127.0.0.1:${port}` });
    const error = await failure(dds.requestNonce('0x1a'));
    expect(error).toMatchObject({ code: 'unavailable', details: { call: 'nonce' } });
    expect(error.message).toMatch(/ECONNREFUSED/);
  });

  test('a call ends with the reason of its signal, before it starts and in the middle', async () => {
    const controller = new AbortController();
    const reason = new MillraceError('canceled', 'enough');
    const dds = await rawService((socket) => void socket.once('data', () => controller.abort(reason)));
    await expect(dds.requestNonce('0x1a', { signal: controller.signal })).rejects.toBe(reason);
    await expect(dds.verify(VERIFY, { signal: controller.signal })).rejects.toBe(reason);
  });

  test('disposing ends a call under way', async () => {
    let reached!: () => void;
    const asked = new Promise<void>((resolve) => (reached = resolve));
    const dds = await rawService((socket) => void socket.once('data', () => reached()));
    const call = failure(dds.requestNonce('0x1a'));
    await asked;
    await dds[Symbol.asyncDispose]();
    expect((await call).code).toBe('unavailable');
  });
});

describe('against our own service', () => {
  test('a node registers and logs in; strangers, wrong credentials and used nonces are told apart', async () => {
    await using harness = await Harness.open();
    await using dds = openHttpDds({ baseUrl: harness.dispatcher.url });
    const { credentials } = await harness.addNode();
    const key = generatePrivateKeyHex();
    const address = walletAddress(key);
    const signed = async (): Promise<{ message: string; signature: string }> => {
      const message = siweMessage(await dds.requestNonce(address), address);
      return { message, signature: signMessage(message, key) };
    };
    const registration = { capabilities: ['/examples/hello/v1'], version: '1.2.3' };

    const stranger = await failure(dds.verify({ address, ...(await signed()) }));
    expect(stranger.details).toMatchObject({ call: 'verify', status: 403 });

    const wrong = Buffer.from(`${Buffer.from(credentials, 'base64').toString().split(':')[0]}:wrong`);
    const refused = await failure(
      dds.registerWallet({
        ...registration,
        ...(await signed()),
        registration_credentials: wrong.toString('base64'),
      }),
    );
    expect(refused.retryable).toBe(false);
    expect(refused.details['call']).toBe('register');

    await dds.registerWallet({ ...registration, ...(await signed()), registration_credentials: credentials });
    const login = await signed();
    const token = await dds.verify({ address, ...login });
    expect(token.expiresAtMs).toBeGreaterThan(Date.now() + 60_000);
    expect(Math.abs(token.serverTimeMs! - Date.now())).toBeLessThan(30_000);

    const replayed = await failure(dds.verify({ address, ...login }));
    expect(replayed.details).toMatchObject({ call: 'verify', status: 401 });
    expect(replayed.message).toContain('invalid nonce');
  });
});
