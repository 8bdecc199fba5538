/** Nodes and nonces: what every store holds to, and the record it answers with. */
import { timingSafeEqual } from 'node:crypto';
import { MillraceError } from '@millrace/runner';
import type { NodeMode, NodeRecord } from '../records.ts';
import type { Resources } from '../resources.ts';
import { NODE_ONLINE_MS } from '../store.ts';
import type { NodeRegistration } from '../store.ts';
import { isoTime, isoTimeOrNull } from './time.ts';

/** Live nonces at once. Each is a login under way, so this bounds what strangers can make the database keep. */
export const MAX_NONCES = 100_000;

/** A node that keeps asking is noted as seen no more often than this. */
export const SEEN_EVERY_MS = 5000;

/** A node as stores keep it; times are epoch milliseconds. */
export interface KeptNode {
  readonly id: string;
  readonly name: string;
  readonly mode: NodeMode;
  readonly organizationId: string;
  readonly wallet: string | null;
  readonly capabilities: readonly string[];
  readonly labels: Readonly<Record<string, string>>;
  readonly version: string | null;
  readonly maxConcurrency: number;
  /** Null or absent: it does not say. */
  readonly resources?: Resources | null;
  readonly createdAt: number;
  readonly registeredAt: number | null;
  readonly lastSeenAt: number | null;
}

/** `inUse`: what its tasks take, of a node that says what it has. */
export function nodeRecord(node: KeptNode, activeLeases: number, inUse: Resources = {}): NodeRecord {
  return {
    id: node.id,
    name: node.name,
    mode: node.mode,
    organization_id: node.organizationId,
    wallet: node.wallet,
    capabilities: node.capabilities,
    labels: node.labels,
    version: node.version,
    max_concurrency: node.maxConcurrency,
    created_at: isoTime(node.createdAt),
    registered_at: isoTimeOrNull(node.registeredAt),
    last_seen_at: isoTimeOrNull(node.lastSeenAt),
    active_leases: activeLeases,
    ...(node.resources != null && { resources: node.resources, resources_in_use: inUse }),
  };
}

/** Compares without telling by its time how much is equal. */
export function sameSecret(a: string, b: string): boolean {
  const [left, right] = [Buffer.from(a), Buffer.from(b)];
  return left.length === right.length && timingSafeEqual(left, right);
}

/** What a registration is judged by: undefined is a node or an owner that there is not. */
export interface RegistrationFacts<N> {
  readonly node: N | undefined;
  /** The node that has the wallet. */
  readonly ownerId: string | undefined;
  readonly activeLeases: number;
  readonly now: number;
}

/**
 * The node that registers, and what is written of the registration.
 *
 * @throws MillraceError `unauthenticated`, `already_exists`, `invalid_argument`; see `Store.registerNode`
 */
export function judgeRegistration<
  N extends Pick<KeptNode, 'wallet' | 'lastSeenAt'> & { readonly secretHash: string },
>(
  registration: NodeRegistration,
  { node, ownerId, activeLeases, now }: RegistrationFacts<N>,
): { readonly node: N; readonly wallet: string; readonly maxConcurrency: number } {
  const { nodeId } = registration;
  // One answer for both, so that ids cannot be probed.
  if (!node || !sameSecret(node.secretHash, registration.secretHash)) {
    throw new MillraceError('unauthenticated', `node id ${nodeId} and its registration secret do not match`);
  }
  const wallet = registration.wallet.toLowerCase();
  if (ownerId !== undefined && ownerId !== nodeId) throw walletTaken(wallet);
  const online = activeLeases > 0 || now - (node.lastSeenAt ?? -Infinity) < NODE_ONLINE_MS;
  if (node.wallet !== null && node.wallet !== wallet && online) {
    throw new MillraceError(
      'already_exists',
      `node ${nodeId} is online with another wallet; stop that node first, or make credentials for this one`,
    );
  }
  const maxConcurrency = registration.maxConcurrency ?? 1;
  if (!Number.isSafeInteger(maxConcurrency) || maxConcurrency < 1) {
    throw new MillraceError(
      'invalid_argument',
      `max_concurrency must be an integer of at least 1, got ${maxConcurrency}`,
    );
  }
  return { node, wallet, maxConcurrency };
}

export function walletTaken(wallet: string): MillraceError {
  return new MillraceError('already_exists', `wallet ${wallet} belongs to another node; use a key per node`);
}

export function tooManyNonces(): MillraceError {
  return new MillraceError(
    'resource_exhausted',
    `at most ${MAX_NONCES} logins may be under way at once; try again in a minute`,
    { retryable: true, details: { limit: 'nonces', value: MAX_NONCES } },
  );
}

export function nonceKnown(nonce: string): MillraceError {
  return new MillraceError('already_exists', `nonce ${nonce} was given out before`);
}
