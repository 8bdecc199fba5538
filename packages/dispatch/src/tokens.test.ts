import { SimulatedClock } from '@millrace/runner/testing';
import { SignJWT, generateKeyPair, importJWK, jwtVerify } from 'jose';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { Store } from './store.ts';
import { openSqliteStore } from './stores/sqlite.ts';
import { openTokens, type Tokens } from './tokens.ts';

const NODE = {
  nodeId: '3f6c1d0e-7a55-4c5e-9f0b-2d8a64b1c7e9',
  wallet: '0x1a642f0e3c3af545e7acbd38b07251b3990914f1',
  organizationId: '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21',
  mode: 'dedicated',
  capabilities: ['/a/v1'],
  maxConcurrency: 2,
} as const;
const LEASE = {
  domainId: '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21',
  nodeId: NODE.nodeId,
  taskId: '5b1f3c52-5f0e-4b3e-9b5e-6a1d6c0a7e11',
  leaseId: 'c3a1d0c8-8f0e-4d0c-a1c9-3f5f0e2b9d44',
  prefix: null,
} as const;

let clock: SimulatedClock;
let store: Store;
let tokens: Tokens;
/** The same keys without the memory of what was issued: what another start of the dispatcher has. */
let restarted: Tokens;

beforeEach(async () => {
  clock = new SimulatedClock();
  store = await openSqliteStore({ path: ':memory:' });
  tokens = await openTokens(store, clock);
  restarted = await openTokens(store, clock);
});
afterEach(async () => {
  await store[Symbol.asyncDispose]();
});

describe('tokens', () => {
  test.each([
    ['node', NODE, () => tokens.issueNode(NODE, 60)],
    ['lease', LEASE, () => tokens.issueLease(LEASE, 'http://127.0.0.1:7070', 60)],
    [
      'client',
      { domainId: null, subject: 'me', canWrite: true },
      () => tokens.issueClient({ domainId: null, subject: 'me', canWrite: true }, 60),
    ],
    [
      'client',
      { domainId: LEASE.domainId, subject: 'me', canWrite: false },
      () => tokens.issueClient({ domainId: LEASE.domainId, subject: 'me', canWrite: false }, 60),
    ],
  ] as const)(
    'a %s token says what it was made with, here and after a restart',
    async (kind, claims, issue) => {
      const { token } = issue();
      expect(await tokens.verify(token)).toEqual({ kind, ...claims });
      expect(await restarted.verify(token)).toEqual({ kind, ...claims });
      // Once more, from memory.
      expect(await restarted.verify(token)).toEqual({ kind, ...claims });
    },
  );

  test('a token works until it expires and not at that moment, remembered or not', async () => {
    const { token, expiresAtMs } = tokens.issueNode(NODE, 60);
    await restarted.verify(token);
    await clock.advance(expiresAtMs - clock.now() - 1);
    await expect(tokens.verify(token)).resolves.toBeDefined();
    await expect(restarted.verify(token)).resolves.toBeDefined();
    await clock.advance(1);
    const third = await openTokens(store, clock);
    for (const one of [tokens, restarted, third]) {
      await expect(one.verify(token)).rejects.toMatchObject({
        code: 'unauthenticated',
        message: expect.stringContaining('expired'),
      });
    }
  });

  test('the signature is what any ES256 library accepts', async () => {
    const { token } = tokens.issueLease(LEASE, 'http://127.0.0.1:7070', 60);
    const key = await importJWK(tokens.publicKey.jwk, 'ES256');
    const { payload } = await jwtVerify(token, key, {
      issuer: 'dds',
      audience: 'http://127.0.0.1:7070',
      currentDate: new Date(clock.now()),
    });
    expect(payload['lease_id']).toBe(LEASE.leaseId);
  });

  test('what was signed by another key, changed, or not signed at all is refused', async () => {
    const { token } = tokens.issueNode(NODE, 60);
    const [head, payload, signature] = token.split('.') as [string, string, string];
    const forged = Buffer.from(
      JSON.stringify({ ...JSON.parse(Buffer.from(payload, 'base64url').toString()), node_id: 'x' }),
    ).toString('base64url');
    const none = Buffer.from('{"alg":"none"}').toString('base64url');
    const { privateKey } = await generateKeyPair('ES256');
    const foreign = await new SignJWT({ token_use: 'client', scopes: ['domain:rw'] })
      .setProtectedHeader({ alg: 'ES256' })
      .setIssuer('dds')
      .setIssuedAt(clock.now() / 1000)
      .setExpirationTime(Math.floor(clock.now() / 1000) + 60)
      .sign(privateKey);
    for (const bad of [
      `${head}.${forged}.${signature}`,
      `${none}.${payload}.`,
      `${head}.${payload}`,
      foreign,
      'x',
      '',
      'x'.repeat(200_000),
    ]) {
      await expect(restarted.verify(bad)).rejects.toMatchObject({ code: 'unauthenticated' });
    }
  });

  test('the private key is in no token, key or error', async () => {
    const { d } = (await store.setting('signing_key', () => ({}))) as { d: string };
    expect(d).toMatch(/^[\w-]{40,}$/);
    const seen = [JSON.stringify(tokens.publicKey), tokens.issueNode(NODE, 60).token];
    seen.push((await restarted.verify('x').catch((error: Error) => String(error.stack))) as string);
    for (const text of seen) expect(text).not.toContain(d);
  });
});
