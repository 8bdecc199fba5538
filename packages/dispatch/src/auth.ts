/**
 * Who is asking, and may they: bearer tokens of requests, turned into typed claims by `tokens.ts`, checked against
 * what the route is about. 401 for no or a bad token (and, as the reference has it, for a read-only token that
 * writes), 403 for a good one that is of the wrong kind or for another domain.
 */
import { MillraceError } from '@millrace/runner';
import type { FastifyRequest } from 'fastify';
import type { LeaseRef } from './store.ts';
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
   * A client token or the domain token of a lease, for this domain.
   *
   * @throws MillraceError `unauthenticated`, `permission_denied`
   */
  domain(request: FastifyRequest, domainId: string, access: Access): Promise<DomainAccess>;
}

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

  constructor(tokens: Tokens) {
    this.#tokens = tokens;
  }

  async node(request: FastifyRequest): Promise<NodeClaims> {
    const claims = await this.#claims(request);
    if (claims.kind !== 'node') throw wrongKind(claims, 'a node token (from POST .../auth/siwe/verify)');
    return claims;
  }

  async client(request: FastifyRequest, access: Access, domainId?: string): Promise<ClientClaims> {
    const claims = await this.#claims(request);
    if (claims.kind !== 'client') throw wrongKind(claims, 'a client token');
    requireScope(claims, access);
    if (domainId !== undefined) requireDomain(claims, domainId);
    return claims;
  }

  async domain(request: FastifyRequest, domainId: string, access: Access): Promise<DomainAccess> {
    const claims = await this.#claims(request);
    if (claims.kind === 'client') {
      requireScope(claims, access);
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

function requireScope(claims: ClientClaims, access: Access): void {
  if (access === 'write' && !claims.canWrite) {
    // 401 and not 403: so the reference answers read-only tokens.
    throw new MillraceError('unauthenticated', 'this token is read-only; use one with the scope domain:rw');
  }
}

function wrongKind(claims: Claims, wanted: string): MillraceError {
  return new MillraceError('permission_denied', `this needs ${wanted}, got a ${claims.kind} token`);
}
