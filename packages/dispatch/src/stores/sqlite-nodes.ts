/**
 * Nodes, their identity, nonces and settings in SQLite. Synchronous; the caller brings the transaction.
 *
 * Nodes are few and asked for by every lease, so all of them are kept in memory; {@link Nodes.load} reads them again after a
 * rollback.
 */
import type { Clock, JsonObject } from '@millrace/runner';
import type { NodeMode, NodeRecord } from '../records.ts';
import type { Resources } from '../resources.ts';
import type { NewNode, NodeRegistration, Nonce } from '../store.ts';
import type { Database, Row, Statement } from './sqlite-database.ts';
import type { Offer } from './matching.ts';
import {
  MAX_NONCES,
  SEEN_EVERY_MS,
  judgeRegistration,
  nodeRecord,
  nonceKnown,
  sameSecret,
  tooManyNonces,
} from './node-rules.ts';

/** A node as leasing needs it. Replaced as a whole when it registers again, so identity tells a change. */
export interface Node extends Offer {
  readonly id: string;
  readonly name: string;
  readonly secretHash: string;
  readonly wallet: string | null;
  readonly version: string | null;
  readonly maxConcurrency: number;
  /** Null: it does not say. */
  readonly resources: Resources | null;
  readonly createdAt: number;
  readonly registeredAt: number | null;
  /** The only member that changes in place. */
  lastSeenAt: number | null;
}

export class Nodes {
  readonly #clock: Clock;
  readonly #newId: () => string;
  readonly #activeLeases: (nodeId: string) => number;
  readonly #inUse: (node: Node) => Resources;
  readonly #nodes = new Map<string, Node>();
  readonly #wallets = new Map<string, string>();
  #nonces = 0;
  readonly #selectNodes: Statement;
  readonly #insertNode: Statement;
  readonly #register: Statement;
  readonly #seen: Statement;
  readonly #countNonces: Statement;
  readonly #insertNonce: Statement;
  readonly #selectNonce: Statement;
  readonly #deleteNonce: Statement;
  readonly #expireNonces: Statement;
  readonly #selectSetting: Statement;
  readonly #insertSetting: Statement;

  constructor(
    database: Database,
    clock: Clock,
    newId: () => string,
    activeLeases: (nodeId: string) => number,
    inUse: (node: Node) => Resources,
  ) {
    this.#clock = clock;
    this.#newId = newId;
    this.#activeLeases = activeLeases;
    this.#inUse = inUse;
    const sql = (text: string): Statement => database.prepare(text);
    this.#selectNodes = sql(`
      SELECT id, name, mode, organization_id, secret_hash, wallet, capabilities, labels, version, max_concurrency,
             resources, created_at, registered_at, last_seen_at
      FROM nodes ORDER BY created_at, id`);
    this.#insertNode = sql(
      'INSERT INTO nodes (id, name, mode, organization_id, secret_hash, created_at) VALUES (?, ?, ?, ?, ?, ?)',
    );
    this.#register = sql(
      'UPDATE nodes SET wallet = ?, capabilities = ?, labels = ?, version = ?, max_concurrency = ?, resources = ?, registered_at = ? WHERE id = ?',
    );
    this.#seen = sql('UPDATE nodes SET last_seen_at = ? WHERE id = ?');
    this.#countNonces = sql('SELECT count(*) FROM nonces');
    this.#insertNonce = sql('INSERT INTO nonces (nonce, body, expires_at) VALUES (?, ?, ?)');
    this.#selectNonce = sql('SELECT body FROM nonces WHERE nonce = ?');
    this.#deleteNonce = sql('DELETE FROM nonces WHERE nonce = ?');
    this.#expireNonces = sql('DELETE FROM nonces WHERE expires_at <= ?');
    this.#selectSetting = sql('SELECT value FROM settings WHERE name = ?');
    this.#insertSetting = sql('INSERT INTO settings (name, value) VALUES (?, ?)');
  }

  /** Reads the committed state. Before the first use and after every rollback. */
  load(): void {
    this.#nodes.clear();
    this.#wallets.clear();
    for (const row of this.#selectNodes.all()) this.#keep(nodeOf(row));
    this.#nonces = Number(this.#countNonces.get()?.[0] ?? 0);
  }

  get(id: string): Node | undefined {
    return this.#nodes.get(id);
  }

  record(id: string): NodeRecord | null {
    const node = this.#nodes.get(id);
    return node ? this.#record(node) : null;
  }

  byWallet(wallet: string): NodeRecord | null {
    const id = this.#wallets.get(wallet.toLowerCase());
    return id === undefined ? null : this.record(id);
  }

  list(): NodeRecord[] {
    return [...this.#nodes.values()].map((node) => this.#record(node));
  }

  create(node: NewNode): NodeRecord {
    const id = this.#newId();
    const now = this.#clock.now();
    this.#insertNode.run(id, node.name, node.mode, node.organizationId, node.secretHash, now);
    const created: Node = {
      id,
      name: node.name,
      mode: node.mode,
      organizationId: node.organizationId,
      secretHash: node.secretHash,
      wallet: null,
      capabilities: [],
      labels: {},
      version: null,
      maxConcurrency: 1,
      resources: null,
      createdAt: now,
      registeredAt: null,
      lastSeenAt: null,
    };
    this.#keep(created);
    return this.#record(created);
  }

  hasSecret(nodeId: string, secretHash: string): boolean {
    const node = this.#nodes.get(nodeId);
    return node !== undefined && sameSecret(node.secretHash, secretHash);
  }

  /** @throws MillraceError `unauthenticated`, `already_exists`, `invalid_argument` */
  register(registration: NodeRegistration): NodeRecord {
    const { nodeId, capabilities, labels, version, resources = null } = registration;
    const now = this.#clock.now();
    const { node, wallet, maxConcurrency } = judgeRegistration(registration, {
      node: this.#nodes.get(nodeId),
      ownerId: this.#wallets.get(registration.wallet.toLowerCase()),
      activeLeases: this.#activeLeases(nodeId),
      now,
    });
    this.#register.run(
      wallet,
      JSON.stringify(capabilities),
      JSON.stringify(labels),
      version,
      maxConcurrency,
      resources === null ? null : JSON.stringify(resources),
      now,
      nodeId,
    );
    if (node.wallet !== null) this.#wallets.delete(node.wallet);
    const registered: Node = {
      ...node,
      wallet,
      capabilities: [...capabilities],
      labels: { ...labels },
      version,
      maxConcurrency,
      resources: resources === null ? null : { ...resources },
      registeredAt: now,
    };
    this.#keep(registered);
    return this.#record(registered);
  }

  /** False: nothing needs to be written now. */
  wantsTouch(id: string): boolean {
    const node = this.#nodes.get(id);
    return node !== undefined && this.#clock.now() - (node.lastSeenAt ?? -Infinity) >= SEEN_EVERY_MS;
  }

  touch(id: string): void {
    const node = this.#nodes.get(id);
    if (!node || !this.wantsTouch(id)) return;
    const now = this.#clock.now();
    this.#seen.run(now, id);
    node.lastSeenAt = now;
  }

  /** @throws MillraceError `resource_exhausted`, `already_exists` */
  putNonce(nonce: Nonce): void {
    if (this.#nonces >= MAX_NONCES) this.expireNonces();
    if (this.#nonces >= MAX_NONCES) throw tooManyNonces();
    if (this.#selectNonce.get(nonce.nonce)) throw nonceKnown(nonce.nonce);
    this.#insertNonce.run(nonce.nonce, JSON.stringify(nonce), nonce.expiresAtMs);
    this.#nonces += 1;
  }

  takeNonce(nonce: string): Nonce | null {
    const row = this.#selectNonce.get(nonce);
    if (!row) return null;
    this.#deleteNonce.run(nonce);
    this.#nonces -= 1;
    const found = JSON.parse(String(row[0])) as Nonce;
    return found.expiresAtMs > this.#clock.now() ? found : null;
  }

  expireNonces(): void {
    if (this.#nonces > 0) this.#nonces -= this.#expireNonces.count(this.#clock.now());
  }

  setting(name: string, create: () => JsonObject): JsonObject {
    const row = this.#selectSetting.get(name);
    if (row) return JSON.parse(String(row[0])) as JsonObject;
    const value = create();
    this.#insertSetting.run(name, JSON.stringify(value));
    return value;
  }

  #keep(node: Node): void {
    this.#nodes.set(node.id, node);
    if (node.wallet !== null) this.#wallets.set(node.wallet, node.id);
  }

  #record(node: Node): NodeRecord {
    const inUse = node.resources === null ? {} : this.#inUse(node);
    return nodeRecord(node, this.#activeLeases(node.id), inUse);
  }
}

function nodeOf(row: Row): Node {
  const [
    id,
    name,
    mode,
    organization,
    secret,
    wallet,
    capabilities,
    labels,
    version,
    max,
    resources,
    created,
    registered,
    seen,
  ] = row;
  return {
    id: id as string,
    name: name as string,
    mode: mode as NodeMode,
    organizationId: organization as string,
    secretHash: secret as string,
    wallet: wallet as string | null,
    capabilities: JSON.parse(capabilities as string) as string[],
    labels: JSON.parse(labels as string) as Record<string, string>,
    version: version as string | null,
    maxConcurrency: max as number,
    resources: resources === null ? null : (JSON.parse(resources as string) as Resources),
    createdAt: created as number,
    registeredAt: registered as number | null,
    lastSeenAt: seen as number | null,
  };
}
