/**
 * The dispatcher's JWTs: ES256, issuer `dds`, one key pair kept in the store, so a restart invalidates nothing.
 *
 * Three kinds, told apart by `token_use`: `node` (the reference's node token, for DMS), `lease` (the reference's
 * domain token, for storage, bound to one lease), `client` (a requestor's).
 *
 * Signing is `node:crypto` and not jose: measured 71 µs against 200 µs of latency (73 against 211 µs of CPU) for the
 * claims of a lease, because WebCrypto hops through a thread pool, and a lease answer waits for it. Checking, where
 * the pitfalls are, is jose (260 µs), once per token: the claims are then kept by the token's text until it expires,
 * and those of tokens signed here are known from the start.
 */
import {
  createPrivateKey,
  createPublicKey,
  generateKeyPairSync,
  randomUUID,
  sign,
  type KeyObject,
} from 'node:crypto';
import { MillraceError, type Clock, type JsonObject } from '@millrace/runner';
import { calculateJwkThumbprint, errors, jwtVerify, type JWK, type JWTPayload } from 'jose';
import { LruMap } from './lru.ts';
import type { NodeMode } from './records.ts';
import type { Store } from './store.ts';

const ISSUER = 'dds';
const NODE_AUDIENCE = 'dms';

/** Tokens whose claims are remembered. One entry is about 1 KiB. */
const CACHED_TOKENS = 20_000;

/** Longer texts are refused unread; ours stay below 1.5 KiB unless a node has hundreds of capabilities. */
const MAX_TOKEN_LENGTH = 96 * 1024;

export interface NodeClaims {
  readonly kind: 'node';
  readonly nodeId: string;
  /** The node's when the token was made: another one means that the node was registered anew by somebody else. */
  readonly wallet: string;
  readonly organizationId: string;
  readonly mode: NodeMode;
  readonly capabilities: readonly string[];
  readonly maxConcurrency: number;
}

export interface LeaseClaims {
  readonly kind: 'lease';
  readonly domainId: string;
  readonly nodeId: string;
  readonly taskId: string;
  readonly leaseId: string;
  /** The task's `outputs_prefix`. */
  readonly prefix: string | null;
}

export interface ClientClaims {
  readonly kind: 'client';
  /** Null: every domain. */
  readonly domainId: string | null;
  /** Who submits; scopes idempotency keys. */
  readonly subject: string;
  readonly canWrite: boolean;
}

export type Claims = NodeClaims | LeaseClaims | ClientClaims;

export interface IssuedToken {
  readonly token: string;
  readonly issuedAtMs: number;
  readonly expiresAtMs: number;
}

export interface Tokens {
  issueNode(claims: Omit<NodeClaims, 'kind'>, ttlSecs: number): IssuedToken;
  /** `audience` is the lease's `domain_server_url`. */
  issueLease(claims: Omit<LeaseClaims, 'kind'>, audience: string, ttlSecs: number): IssuedToken;
  issueClient(claims: Omit<ClientClaims, 'kind'>, ttlSecs: number): IssuedToken;
  /** @throws MillraceError `unauthenticated` for a text that is no valid, current token of this dispatcher. */
  verify(token: string): Promise<Claims>;
  /** What others need to check our tokens. */
  readonly publicKey: { readonly jwk: JWK; readonly pem: string };
}

/** Reads the key pair from the store, or makes and keeps one. */
export async function openTokens(store: Store, clock: Clock): Promise<Tokens> {
  const stored = await store.setting('signing_key', () => {
    const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
    return privateKey.export({ format: 'jwk' }) as JsonObject;
  });
  const privateKey = createPrivateKey({ key: stored, format: 'jwk' });
  const publicKey = createPublicKey(privateKey);
  const jwk = publicKey.export({ format: 'jwk' }) as JWK;
  const kid = await calculateJwkThumbprint(jwk);
  return new Es256Tokens(
    privateKey,
    publicKey,
    {
      jwk: { ...jwk, alg: 'ES256', use: 'sig', kid },
      pem: publicKey.export({ format: 'pem', type: 'spki' }) as string,
    },
    clock,
  );
}

class Es256Tokens implements Tokens {
  readonly publicKey: Tokens['publicKey'];
  readonly #privateKey: KeyObject;
  readonly #publicKeyObject: KeyObject;
  readonly #clock: Clock;
  readonly #header: string;
  readonly #known = new LruMap<string, { readonly claims: Claims; readonly expiresAtMs: number }>(
    CACHED_TOKENS,
  );

  constructor(privateKey: KeyObject, publicKey: KeyObject, published: Tokens['publicKey'], clock: Clock) {
    this.#privateKey = privateKey;
    this.#publicKeyObject = publicKey;
    this.publicKey = published;
    this.#clock = clock;
    this.#header = encode({ alg: 'ES256', typ: 'JWT', kid: published.jwk.kid });
  }

  issueNode(claims: Omit<NodeClaims, 'kind'>, ttlSecs: number): IssuedToken {
    return this.#issue(
      {
        sub: claims.nodeId,
        aud: [NODE_AUDIENCE],
        token_use: 'node',
        node_id: claims.nodeId,
        wallet: claims.wallet,
        organization_id: claims.organizationId,
        node_mode: claims.mode,
        capabilities: claims.capabilities,
        max_concurrency: claims.maxConcurrency,
      },
      ttlSecs,
    );
  }

  issueLease(claims: Omit<LeaseClaims, 'kind'>, audience: string, ttlSecs: number): IssuedToken {
    return this.#issue(
      {
        sub: claims.nodeId,
        aud: [audience],
        token_use: 'lease',
        domain_id: claims.domainId,
        scopes: ['domain-data:rw'],
        node_id: claims.nodeId,
        task_id: claims.taskId,
        lease_id: claims.leaseId,
        prefix: claims.prefix,
      },
      ttlSecs,
    );
  }

  issueClient(claims: Omit<ClientClaims, 'kind'>, ttlSecs: number): IssuedToken {
    return this.#issue(
      {
        sub: claims.subject,
        // Tokens of one subject and second would otherwise be one text.
        jti: randomUUID(),
        aud: [NODE_AUDIENCE],
        token_use: 'client',
        scopes: [claims.canWrite ? 'domain:rw' : 'domain:r'],
        ...(claims.domainId === null ? {} : { domain_id: claims.domainId }),
      },
      ttlSecs,
    );
  }

  async verify(token: string): Promise<Claims> {
    const known = this.#known.get(token);
    if (known !== undefined) {
      if (known.expiresAtMs > this.#clock.now()) return known.claims;
      this.#known.delete(token);
      throw expired();
    }
    if (token.length > MAX_TOKEN_LENGTH) throw refused(`it is longer than ${MAX_TOKEN_LENGTH} characters`);
    let payload: JWTPayload;
    try {
      const verified = await jwtVerify(token, this.#publicKeyObject, {
        algorithms: ['ES256'],
        issuer: ISSUER,
        requiredClaims: ['exp', 'token_use'],
        currentDate: new Date(this.#clock.now()),
      });
      payload = verified.payload;
    } catch (error) {
      if (error instanceof errors.JWTExpired) throw expired();
      if (error instanceof errors.JWSSignatureVerificationFailed) {
        throw refused('it was signed by another dispatcher (or its data folder was replaced)');
      }
      throw refused('it is not a token of this dispatcher', error);
    }
    const claims = claimsOf(payload);
    this.#known.set(token, { claims, expiresAtMs: payload.exp! * 1000 });
    return claims;
  }

  #issue(payload: JWTPayload, ttlSecs: number): IssuedToken {
    const issuedAtSecs = Math.floor(this.#clock.now() / 1000);
    const full = { iss: ISSUER, ...payload, iat: issuedAtSecs, exp: issuedAtSecs + ttlSecs };
    const signed = `${this.#header}.${encode(full)}`;
    const signature = sign('sha256', Buffer.from(signed), {
      key: this.#privateKey,
      dsaEncoding: 'ieee-p1363',
    });
    const token = `${signed}.${signature.toString('base64url')}`;
    const expiresAtMs = full.exp * 1000;
    this.#known.set(token, { claims: claimsOf(full), expiresAtMs });
    return { token, issuedAtMs: issuedAtSecs * 1000, expiresAtMs };
  }
}

function encode(value: object): string {
  return Buffer.from(JSON.stringify(value)).toString('base64url');
}

/** The payload was made by {@link Es256Tokens}: its signature says so, and so its shape is trusted. */
function claimsOf(payload: JWTPayload): Claims {
  switch (payload['token_use']) {
    case 'node':
      return {
        kind: 'node',
        nodeId: payload['node_id'] as string,
        wallet: payload['wallet'] as string,
        organizationId: payload['organization_id'] as string,
        mode: payload['node_mode'] as NodeMode,
        capabilities: payload['capabilities'] as string[],
        maxConcurrency: payload['max_concurrency'] as number,
      };
    case 'lease':
      return {
        kind: 'lease',
        domainId: payload['domain_id'] as string,
        nodeId: payload['node_id'] as string,
        taskId: payload['task_id'] as string,
        leaseId: payload['lease_id'] as string,
        prefix: payload['prefix'] as string | null,
      };
    case 'client':
      return {
        kind: 'client',
        domainId: (payload['domain_id'] as string | undefined) ?? null,
        subject: payload.sub as string,
        canWrite: (payload['scopes'] as string[]).includes('domain:rw'),
      };
    default:
      throw refused('its kind is unknown to this version');
  }
}

function expired(): MillraceError {
  return refused('it has expired');
}

function refused(why: string, cause?: unknown): MillraceError {
  return new MillraceError('unauthenticated', `the bearer token is not accepted: ${why}`, { cause });
}
