/**
 * Who is asking, and may they: bearer tokens of requests, turned into typed claims by `tokens.ts`, checked against
 * what the route is about. 401 for no or a bad token, 403 for a good one that is of the wrong kind or for another domain. A
 * read-only token that writes is 401 to the job API and 403 to domain storage, as the reference has it.
 *
 * A node token is good while its node is registered with the wallet that logged in: who registers a node anew with
 * another key locks the former one out. Other processes on the same store learn of it within {@link WALLET_TTL_MS}.
 */
import { MillraceError, type Clock } from '@millrace/runner';
import type { FastifyRequest } from 'fastify';
import { LruMap } from './lru.ts';
import type { LeaseRef, Store } from './store.ts';
import type { Claims, ClientClaims, NodeClaims, Tokens } from './tokens.ts';

export type Access = 'read' | 'write';

/** On whose behalf a domain is read or written. */
export interface DomainAccess {
  /** The lease the token was made for; null for a requestor. Writes carry it into the store, which fences them. */
  readonly lease: LeaseRef | null;
  /** The task's `outputs_prefix`, for bookkeeping; null for a requestor or when the task has none. */
  readonly prefix: string | null;
}

export interface Auth {
  /** A node token. @throws MillraceError `unauthenticated`, `permission_denied` for a token of another kind. */
  node(request: FastifyRequest): Promise<NodeClaims>;
  /**
   * A client token that may do this. With `domainId`, also in that domain.
   *
   * @throws MillraceError `unauthenticated`, `permission_denied`
   */
  client(request: FastifyRequest, access: Access, domainId?: string): Promise<ClientClaims>;
  /**
   * A client token that may do this, or a node token: for what every node needs and belongs to no domain.
   *
   * @throws MillraceError `unauthenticated`, `permission_denied`
   */
  clientOrNode(request: FastifyRequest, access: Access): Promise<ClientClaims | NodeClaims>;
  /**
   * A client token or the domain token of a lease, for this domain.
   *
   * @throws MillraceError `unauthenticated`, `permission_denied`
   */
  domain(request: FastifyRequest, domainId: string, access: Access): Promise<DomainAccess>;
  /** A node was registered here with this wallet; tokens of another one end now. */
  registered(nodeId: string, wallet: string): void;
}

/** How long a registration made by another process may go unnoticed. */
export const WALLET_TTL_MS = 5_000;

const CACHED_WALLETS = 10_000;

/** @throws MillraceError `permission_denied` when the token is for another domain. */
export function requireDomain(claims: ClientClaims, domainId: string): void {
  if (claims.domainId !== null && claims.domainId !== domainId) {
    throw new MillraceError(
      'permission_denied',
      `this token is for domain ${claims.domainId}, not for domain ${domainId}`,
    );
  }
}

export class BearerAuth implements Auth {
  readonly #tokens: Tokens;
  readonly #wallets: CurrentWallets;

  constructor(tokens: Tokens, store: Pick<Store, 'getNode'>, clock: Clock) {
    this.#tokens = tokens;
    this.#wallets = new CurrentWallets(store, clock);
  }

  async node(request: FastifyRequest): Promise<NodeClaims> {
    const claims = await this.#claims(request);
    if (claims.kind !== 'node') throw wrongKind(claims, 'a node token (from POST .../auth/siwe/verify)');
    return await this.#current(claims);
  }

  async clientOrNode(request: FastifyRequest, access: Access): Promise<ClientClaims | NodeClaims> {
    const claims = await this.#claims(request);
    if (claims.kind === 'node') return await this.#current(claims);
    if (claims.kind !== 'client') throw wrongKind(claims, 'a client token or a node token');
    requireScope(claims, access, 'unauthenticated');
    return claims;
  }

  /** @throws MillraceError `unauthenticated` for claims of a registration that is over. */
  async #current(claims: NodeClaims): Promise<NodeClaims> {
    if ((await this.#wallets.of(claims.nodeId)) !== claims.wallet) {
      throw new MillraceError(
        'unauthenticated',
        `node ${claims.nodeId} is not registered any more with the wallet this token was given to; log in again`,
      );
    }
    return claims;
  }

  registered(nodeId: string, wallet: string): void {
    this.#wallets.set(nodeId, wallet);
  }

  async client(request: FastifyRequest, access: Access, domainId?: string): Promise<ClientClaims> {
    const claims = await this.#claims(request);
    if (claims.kind !== 'client') throw wrongKind(claims, 'a client token');
    requireScope(claims, access, 'unauthenticated');
    if (domainId !== undefined) requireDomain(claims, domainId);
    return claims;
  }

  async domain(request: FastifyRequest, domainId: string, access: Access): Promise<DomainAccess> {
    const claims = await this.#claims(request);
    if (claims.kind === 'client') {
      requireScope(claims, access, 'permission_denied');
      requireDomain(claims, domainId);
      return { lease: null, prefix: null };
    }
    if (claims.kind !== 'lease') throw wrongKind(claims, 'a domain token (from a lease) or a client token');
    if (claims.domainId !== domainId) {
      throw new MillraceError(
        'permission_denied',
        `this token is for domain ${claims.domainId}, not for domain ${domainId}`,
      );
    }
    return {
      lease: { taskId: claims.taskId, nodeId: claims.nodeId, leaseId: claims.leaseId },
      prefix: claims.prefix,
    };
  }

  #claims(request: FastifyRequest): Promise<Claims> {
    const { authorization } = request.headers;
    const match = authorization === undefined ? null : /^bearer +(\S+)$/i.exec(authorization);
    if (match === null) {
      throw new MillraceError(
        'unauthenticated',
        'this needs an "Authorization: Bearer <token>" header; requestors set MILLRACE_TOKEN',
      );
    }
    return this.#tokens.verify(match[1]!);
  }
}

/** The wallets nodes are registered with, remembered for a while. */
class CurrentWallets {
  readonly #store: Pick<Store, 'getNode'>;
  readonly #clock: Clock;
  readonly #known = new LruMap<string, { readonly wallet: string | null; readonly untilMs: number }>(
    CACHED_WALLETS,
  );

  constructor(store: Pick<Store, 'getNode'>, clock: Clock) {
    this.#store = store;
    this.#clock = clock;
  }

  /** Null: the node is unknown or never registered. */
  async of(nodeId: string): Promise<string | null> {
    const known = this.#known.get(nodeId);
    if (known !== undefined && this.#clock.monotonic() < known.untilMs) return known.wallet;
    const wallet = (await this.#store.getNode(nodeId))?.wallet ?? null;
    // A registration that came meanwhile is newer than what was read.
    const since = this.#known.get(nodeId);
    if (since !== undefined && since !== known) return since.wallet;
    this.set(nodeId, wallet);
    return wallet;
  }

  set(nodeId: string, wallet: string | null): void {
    this.#known.set(nodeId, { wallet, untilMs: this.#clock.monotonic() + WALLET_TTL_MS });
  }
}

function requireScope(
  claims: ClientClaims,
  access: Access,
  code: 'unauthenticated' | 'permission_denied',
): void {
  if (access === 'write' && !claims.canWrite) {
    throw new MillraceError(code, 'this token is read-only; use one with the scope domain:rw');
  }
}

function wrongKind(claims: Claims, wanted: string): MillraceError {
  return new MillraceError('permission_denied', `this needs ${wanted}, got a ${claims.kind} token`);
}
