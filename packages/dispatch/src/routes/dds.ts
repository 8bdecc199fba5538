/**
 * Identity for nodes (posemesh DDS, sections 3.2 to 3.6 and 3.12): a nonce, registration of a wallet under the
 * operator's credentials, and login, which gives the node token. Errors are plain text here, as the reference's
 * peers expect.
 *
 * Recovering a signer costs 1.5 ms of CPU, so everything cheap is checked before, and one address may begin only so many
 * registrations and logins (`limits.loginBurst`). A nonce is gone with the first request that names it, whatever becomes of it.
 */
import { createHash, randomBytes } from 'node:crypto';
import { MAX_CAPABILITY_BYTES, MillraceError, checkCapability, type Clock } from '@millrace/runner';
import { uuid } from '@millrace/runner/decode';
import type { FastifyInstance, FastifyRequest } from 'fastify';
import { textErrorHandler } from '../errors-http.ts';
import { LruMap } from '../lru.ts';
import { parseResources, type Resources } from '../resources.ts';
import { parseSiweMessage, recoverAddress, type SiweMessage } from '../siwe.ts';
import type { Nonce } from '../store.ts';
import type { ServerContext } from './context.ts';

/** What the real service names: Base. */
const CHAIN_ID = 8453;
const NONCE_LIFETIME_MS = 5 * 60_000;
const NODE_TOKEN_SECS = 3600;

const MAX_CAPABILITIES = 256;
const MAX_LABELS = 64;
const MAX_LABEL_BYTES = 256;
/** A node may name more, and is counted as this. */
const MAX_CONCURRENCY = 65_536;

/** SemVer 2.0, a leading `v` allowed. */
const SEMVER =
  /^v?(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-(0|[1-9]\d*|\d*[a-z-][0-9a-z-]*)(\.(0|[1-9]\d*|\d*[a-z-][0-9a-z-]*))*)?(\+[0-9a-z-]+(\.[0-9a-z-]+)*)?$/i;

interface RegisterBody {
  readonly message: string;
  readonly signature: string;
  readonly registration_credentials: string;
  readonly capabilities: readonly string[];
  readonly version: string;
  readonly max_concurrency?: number | null;
  readonly labels?: Readonly<Record<string, string>> | null;
  readonly resources?: unknown;
}
interface VerifyBody {
  readonly address?: string | null;
  readonly message: string;
  readonly signature: string;
}

const SIGNED = {
  message: { type: 'string', minLength: 1, maxLength: 8192 },
  signature: { type: 'string', pattern: '^0x[0-9a-fA-F]{130}$' },
} as const;

const SCHEMAS = {
  nonce: {
    type: 'object',
    required: ['wallet'],
    properties: { wallet: { type: 'string', pattern: '^0[xX][0-9a-fA-F]{40}$' } },
  },
  register: {
    type: 'object',
    required: ['message', 'signature', 'registration_credentials', 'capabilities', 'version'],
    properties: {
      ...SIGNED,
      registration_credentials: { type: 'string', minLength: 1, maxLength: 1024 },
      capabilities: {
        type: 'array',
        minItems: 1,
        maxItems: MAX_CAPABILITIES,
        items: { type: 'string', minLength: 1, maxLength: MAX_CAPABILITY_BYTES },
      },
      version: { type: 'string', minLength: 1, maxLength: 128 },
      max_concurrency: {
        anyOf: [{ type: 'integer', minimum: 1 }, { type: 'null' }],
      },
      labels: {
        anyOf: [
          {
            type: 'object',
            maxProperties: MAX_LABELS,
            propertyNames: { type: 'string', minLength: 1, maxLength: MAX_LABEL_BYTES },
            additionalProperties: { type: 'string', maxLength: MAX_LABEL_BYTES },
          },
          { type: 'null' },
        ],
      },
    },
  },
  verify: {
    type: 'object',
    required: ['message', 'signature'],
    properties: { ...SIGNED, address: { type: ['string', 'null'] } },
  },
};

/** @throws MillraceError `invalid_argument` */
function resourcesOf(value: unknown): Resources | null {
  try {
    return parseResources(value);
  } catch (error) {
    const { message, details } = MillraceError.from(error);
    const { name } = details;
    const [path, given] =
      typeof name === 'string'
        ? [`resources.${name}`, (value as Readonly<Record<string, unknown>>)[name]]
        : ['resources', value];
    const shown = JSON.stringify(given) ?? 'nothing';
    throw new MillraceError('invalid_argument', `${path} ${message}, got ${shown.slice(0, 120)}`);
  }
}

export function registerDdsRoutes(app: FastifyInstance, context: ServerContext): void {
  const { store, clock, limits, log, auth } = context;
  const errorHandler = textErrorHandler(log);
  const bucket = new AddressBucket(clock, limits.loginBurst);
  // Who got a nonce has paid for the request that uses it up, and is not sent away half way.
  const begins = (request: FastifyRequest): Promise<void> => {
    bucket.take(request.ip);
    return Promise.resolve();
  };
  const goesOn = (request: FastifyRequest): Promise<void> => {
    bucket.check(request.ip);
    return Promise.resolve();
  };

  app.post<{ Body: { wallet: string } }>(
    '/internal/v1/auth/siwe/request',
    { schema: { body: SCHEMAS.nonce }, errorHandler, onRequest: begins },
    async (request) => {
      const uri = context.publicUrl();
      const now = clock.now();
      const nonce: Nonce = {
        nonce: randomBytes(16).toString('hex'),
        wallet: request.body.wallet.toLowerCase(),
        domain: new URL(uri).host,
        uri,
        chainId: CHAIN_ID,
        issuedAt: new Date(now).toISOString(),
        expiresAtMs: now + NONCE_LIFETIME_MS,
      };
      await store.putNonce(nonce);
      return {
        nonce: nonce.nonce,
        domain: nonce.domain,
        uri: nonce.uri,
        version: '1',
        chainId: nonce.chainId,
        issuedAt: nonce.issuedAt,
      };
    },
  );

  app.post<{ Body: RegisterBody }>(
    '/internal/v1/nodes/register-wallet',
    { schema: { body: SCHEMAS.register }, errorHandler, onRequest: goesOn },
    async (request, reply) => {
      const { body } = request;
      for (const capability of body.capabilities) checkCapability(capability);
      if (!SEMVER.test(body.version)) {
        throw new MillraceError(
          'invalid_argument',
          `version must be SemVer (major.minor.patch), got ${JSON.stringify(body.version)}`,
        );
      }
      const resources = resourcesOf(body.resources);
      const { nodeId, secret } = parseCredentials(body.registration_credentials);
      const message = parseSiweMessage(body.message);
      await consumeNonce(request, message);
      const secretHash = hashSecret(secret);
      if (!(await store.nodeHasSecret(nodeId, secretHash))) throw wrongCredentials(nodeId);
      verifySignature(message, body);
      await store.registerNode({
        nodeId,
        secretHash,
        wallet: message.address,
        capabilities: [...new Set(body.capabilities)],
        labels: body.labels ?? {},
        version: body.version,
        maxConcurrency: Math.min(body.max_concurrency ?? 1, MAX_CONCURRENCY),
        resources,
      });
      auth.registered(nodeId, message.address);
      log.info('node registered', {
        node_id: nodeId,
        wallet: message.address,
        version: body.version,
        capabilities: [...body.capabilities],
      });
      return reply.code(200).send();
    },
  );

  app.post<{ Body: VerifyBody }>(
    '/internal/v1/auth/siwe/verify',
    { schema: { body: SCHEMAS.verify }, errorHandler, onRequest: goesOn },
    async (request) => {
      const { body } = request;
      const message = parseSiweMessage(body.message);
      await consumeNonce(request, message);
      if (body.address != null && body.address.toLowerCase() !== message.address) {
        throw new MillraceError('permission_denied', 'wallet does not match node');
      }
      const node = await store.findNodeByWallet(message.address);
      if (node === null) throw new MillraceError('permission_denied', 'node not found');
      verifySignature(message, body);
      const { token, expiresAtMs } = context.tokens.issueNode(
        {
          nodeId: node.id,
          wallet: message.address,
          organizationId: node.organization_id,
          mode: node.mode,
          capabilities: node.capabilities,
          maxConcurrency: node.max_concurrency,
        },
        NODE_TOKEN_SECS,
      );
      return {
        node_id: node.id,
        wallet: message.address,
        access_token: token,
        access_expires_at: new Date(expiresAtMs).toISOString(),
      };
    },
  );

  /**
   * The nonce was issued here, for this wallet, and says what the message says. `Issued At` is not compared: clients may write
   * the time in their own way, and how old a nonce is is known here.
   */
  async function consumeNonce(request: FastifyRequest, message: SiweMessage): Promise<void> {
    const issued = await store.takeNonce(message.nonce);
    const now = clock.now();
    if (
      issued === null ||
      issued.expiresAtMs <= now ||
      issued.wallet !== message.address ||
      issued.domain !== message.domain ||
      issued.uri !== message.uri ||
      issued.chainId !== message.chainId ||
      message.version !== '1' ||
      (message.expirationTime !== null && Date.parse(message.expirationTime) <= now) ||
      (message.notBefore !== null && Date.parse(message.notBefore) > now)
    ) {
      bucket.charge(request.ip);
      throw new MillraceError('unauthenticated', 'invalid nonce');
    }
  }
}

function verifySignature(
  message: SiweMessage,
  signed: { readonly message: string; readonly signature: string },
): void {
  let signer: string;
  try {
    signer = recoverAddress(signed.message, signed.signature);
  } catch (cause) {
    throw new MillraceError('unauthenticated', 'invalid signature', { cause });
  }
  if (signer !== message.address) throw new MillraceError('unauthenticated', 'invalid signature');
}

/** Standard padded Base64 of `<node uuid>:<secret>`. The text is not repeated in errors: it holds the secret. */
function parseCredentials(credentials: string): { readonly nodeId: string; readonly secret: string } {
  const refuse = (): never => {
    throw new MillraceError(
      'invalid_argument',
      'registration_credentials must be the padded Base64 of <node id>:<secret>, as `millrace nodes add` prints it',
    );
  };
  const text = Buffer.from(credentials, 'base64').toString('utf8');
  // Buffer reads past what is not Base64; what it read must be all there was.
  if (Buffer.from(text, 'utf8').toString('base64') !== credentials) return refuse();
  const [id, secret, ...rest] = text.split(':');
  if (id === undefined || secret === undefined || secret === '' || rest.length > 0) return refuse();
  try {
    return { nodeId: uuid(id, 'node id'), secret };
  } catch {
    return refuse();
  }
}

/** As the store says it of a wrong secret. */
function wrongCredentials(nodeId: string): MillraceError {
  return new MillraceError('unauthenticated', `node id ${nodeId} and its registration secret do not match`);
}

/** How a registration secret is stored: it is 32 random bytes, so one SHA-256 is enough. */
export function hashSecret(secret: string): string {
  return createHash('sha256').update(secret).digest('hex');
}

interface Bucket {
  /** Below 0 after what was not paid for. */
  tokens: number;
  /** How many were told when to come and did not have the time for it yet. */
  queue: number;
  /** Monotonic. */
  at: number;
}

/** The longest that a client is told to wait. */
const LONGEST_WAIT_MS = 60_000;

/**
 * Registrations and logins begun per remote address: a burst, refilled at a tenth of it per second. Those that are refused are told to come back one
 * after the other, as fast as that lets them in: a thousand nodes behind one address that start at once must not all
 * come again at once.
 */
class AddressBucket {
  readonly #clock: Clock;
  readonly #burst: number;
  readonly #perMs: number;
  readonly #buckets = new LruMap<string, Bucket>(10_000);

  constructor(clock: Clock, burst: number) {
    this.#clock = clock;
    this.#burst = burst;
    this.#perMs = burst / 10 / 1000;
  }

  /** One begins. @throws MillraceError `resource_exhausted` (retryable) */
  take(address: string): void {
    const bucket = this.#filled(address);
    if (bucket.tokens < 1) this.#refuse(bucket);
    bucket.tokens -= 1;
  }

  /** What was paid for goes on, unless too much came that was not. @throws MillraceError `resource_exhausted` (retryable) */
  check(address: string): void {
    const bucket = this.#filled(address);
    if (bucket.tokens < 0) this.#refuse(bucket);
  }

  /** For what was not paid for. */
  charge(address: string): void {
    this.#filled(address).tokens -= 1;
  }

  #filled(address: string): Bucket {
    const now = this.#clock.monotonic();
    const bucket = this.#buckets.get(address) ?? { tokens: this.#burst, queue: 0, at: now };
    const refilled = (now - bucket.at) * this.#perMs;
    bucket.tokens = Math.min(this.#burst, bucket.tokens + refilled);
    bucket.queue = Math.max(0, bucket.queue - refilled);
    bucket.at = now;
    this.#buckets.set(address, bucket);
    return bucket;
  }

  #refuse(bucket: Bucket): never {
    bucket.queue += 1;
    const waitMs = Math.min(LONGEST_WAIT_MS, Math.ceil(bucket.queue / this.#perMs));
    throw new MillraceError(
      'resource_exhausted',
      `too many registrations and logins from one address (limit loginBurst, ${this.#burst}); try again soon`,
      {
        retryable: true,
        details: { limit: 'loginBurst', value: this.#burst, retry_after_ms: waitMs },
      },
    );
  }
}
