/** Nodes, their identity, nonces and settings in PostgreSQL. */
import { MillraceError } from '@millrace/runner';
import type { JsonObject } from '@millrace/runner';
import type { NodeRecord } from '../records.ts';
import type { NewNode, NodeRegistration, Nonce } from '../store.ts';
import { sql } from './postgres-database.ts';
import type { Database } from './postgres-database.ts';
import {
  MAX_NONCES,
  SEEN_EVERY_MS,
  judgeRegistration,
  nodeRecord,
  nonceKnown,
  sameSecret,
  tooManyNonces,
  walletTaken,
} from './node-rules.ts';
import { Usage } from './fitting.ts';
import { isDuplicate } from './postgres-errors.ts';
import type { Queues } from './postgres-queues.ts';
import { NODE_COLUMNS, nodeOf, storable } from './postgres-rows.ts';
import type { StoredNode } from './postgres-rows.ts';

/** With the demands of what it holds as pairs of a lane and a number of tasks. */
type HeldNode = StoredNode & { readonly held: readonly Held[] };
type Held = readonly [laneId: number, count: number];

const heldBy = (node: string): string => `coalesce((
  SELECT json_agg(json_build_array(h.lane_id, h.count)) FROM (
    SELECT o.lane_id, count(*) AS count FROM open_tasks o WHERE o.node_id = ${node} GROUP BY o.lane_id) AS h), '[]') AS held`;
const HELD = heldBy('n.id');
const INSERT_NODE = sql(`
  INSERT INTO nodes AS n (id, name, mode, organization_id, secret_hash, created_at) VALUES ($1, $2, $3, $4, $5, millis($6))
  RETURNING ${NODE_COLUMNS}`);
const LOCK_NODE = sql(`SELECT ${NODE_COLUMNS} FROM nodes n WHERE n.id = $1 FOR NO KEY UPDATE`);
const HELD_BY = sql(`SELECT ${heldBy('$1')}`);
const OWNER = sql('SELECT id FROM nodes WHERE wallet = $1');
const REGISTER = sql(`
  UPDATE nodes AS n SET wallet = $2, capabilities = $3, labels = $4, version = $5, max_concurrency = $6, registered_at = $7,
    resources = $8
  WHERE n.id = $1 RETURNING ${NODE_COLUMNS}`);
const BY_ID = sql(`SELECT ${NODE_COLUMNS}, ${HELD} FROM nodes n WHERE n.id = $1`);
const BY_WALLET = sql(`SELECT ${NODE_COLUMNS}, ${HELD} FROM nodes n WHERE n.wallet = $1`);
const ALL = sql(`SELECT ${NODE_COLUMNS}, ${HELD} FROM nodes n ORDER BY n.created_at, n.id`);
const WANTS_TOUCH = sql(`
  SELECT 1 FROM nodes WHERE id = $1 AND (last_seen_at IS NULL OR last_seen_at <= millis($2) - ${SEEN_EVERY_MS})`);
const TOUCH = sql('UPDATE nodes SET last_seen_at = millis($2) WHERE id = $1');

const PUT_NONCE = sql(`
  INSERT INTO nonces (nonce, body, expires_at)
  SELECT $1, $2, $3 WHERE (SELECT count(*) FROM nonces) < ${MAX_NONCES} ON CONFLICT (nonce) DO NOTHING`);
const HAS_NONCE = sql('SELECT 1 FROM nonces WHERE nonce = $1');
const TAKE_NONCE = sql('DELETE FROM nonces WHERE nonce = $1 RETURNING body, expires_at > millis($2) AS live');
const EXPIRE_NONCES = sql('DELETE FROM nonces WHERE expires_at <= millis($1)');

const SETTING = sql('SELECT value FROM settings WHERE name = $1');
const MAKE_SETTING = sql('INSERT INTO settings (name, value) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING');

export class Nodes {
  readonly #database: Database;
  readonly #queues: Queues;
  readonly #newId: () => string;

  constructor(database: Database, queues: Queues, newId: () => string) {
    this.#database = database;
    this.#queues = queues;
    this.#newId = newId;
  }

  async create({ name, mode, organizationId, secretHash }: NewNode): Promise<NodeRecord> {
    const id = this.#newId();
    const [row] = await this.#database.transaction('call', (transaction) =>
      transaction.change<StoredNode>(INSERT_NODE, [
        id,
        storable(name),
        mode,
        organizationId,
        secretHash,
        transaction.given,
      ]),
    );
    if (!row) throw new MillraceError('internal', `node ${id} was not made`);
    return nodeRecord(nodeOf(row), 0);
  }

  async hasSecret(nodeId: string, secretHash: string): Promise<boolean> {
    const [row] = await this.#database.rows<StoredNode>(BY_ID, [nodeId]);
    return row !== undefined && sameSecret(row.secretHash, secretHash);
  }

  /** @throws MillraceError `unauthenticated`, `already_exists`, `invalid_argument` */
  async register(registration: NodeRegistration): Promise<NodeRecord> {
    const { nodeId, capabilities, labels, version, resources = null } = registration;
    const asked = registration.wallet.toLowerCase();
    return await this.#database.transaction('call', async (transaction) => {
      const [[row], [lease], [owner]] = await Promise.all([
        transaction.rows<StoredNode>(LOCK_NODE, [nodeId]),
        // After the lock: a lease for this node needs it too.
        transaction.rows<{ held: readonly Held[] }>(HELD_BY, [nodeId]),
        transaction.rows<{ id: string }>(OWNER, [asked]),
      ]);
      const held = lease?.held ?? [];
      const { node, wallet, maxConcurrency } = judgeRegistration(registration, {
        node: row,
        ownerId: owner?.id,
        activeLeases: countOf(held),
        now: transaction.now,
      });
      try {
        const [registered] = await transaction.change<StoredNode>(REGISTER, [
          nodeId,
          wallet,
          JSON.stringify(capabilities),
          JSON.stringify(labels),
          storable(version),
          maxConcurrency,
          transaction.now,
          resources === null ? null : JSON.stringify(resources),
        ]);
        return await this.#recordOf({ ...(registered ?? node), held });
      } catch (error) {
        // Registered by another dispatcher since it was looked up.
        throw isDuplicate(error, 'nodes_wallet') ? walletTaken(wallet) : error;
      }
    });
  }

  async get(id: string): Promise<NodeRecord | null> {
    const [row] = await this.#database.rows<HeldNode>(BY_ID, [id]);
    return row ? await this.#recordOf(row) : null;
  }

  async byWallet(wallet: string): Promise<NodeRecord | null> {
    const [row] = await this.#database.rows<HeldNode>(BY_WALLET, [wallet.toLowerCase()]);
    return row ? await this.#recordOf(row) : null;
  }

  async list(): Promise<NodeRecord[]> {
    const rows = await this.#database.rows<HeldNode>(ALL, []);
    return await Promise.all(rows.map((row) => this.#recordOf(row)));
  }

  async #recordOf({ held, ...row }: HeldNode): Promise<NodeRecord> {
    const node = nodeOf(row);
    const usage = new Usage(node.resources ?? {});
    if (node.resources != null) {
      await this.#queues.loadLanes(held.map(([laneId]) => laneId));
      for (const [laneId, count] of held) usage.add(this.#queues.lane(laneId).queue.resources, count);
    }
    return nodeRecord(node, countOf(held), usage.taken());
  }

  async touch(id: string): Promise<void> {
    const wanted = await this.#database.rows(WANTS_TOUCH, [id, this.#database.given]);
    if (wanted.length === 0) return;
    await this.#database.transaction('call', (transaction) =>
      transaction.count(TOUCH, [id, transaction.given]),
    );
  }

  /** @throws MillraceError `resource_exhausted`, `already_exists` */
  async putNonce(nonce: Nonce): Promise<void> {
    const values = [nonce.nonce, JSON.stringify(nonce), nonce.expiresAtMs] as const;
    for (const last of [false, true]) {
      const made = await this.#database.transaction('call', (transaction) =>
        transaction.count(PUT_NONCE, values),
      );
      if (made > 0) return;
      if ((await this.#database.rows(HAS_NONCE, [nonce.nonce])).length > 0) {
        throw nonceKnown(nonce.nonce);
      }
      if (!last) await this.expireNonces();
    }
    throw tooManyNonces();
  }

  async takeNonce(nonce: string): Promise<Nonce | null> {
    const [row] = await this.#database.transaction('call', (transaction) =>
      transaction.change<{ body: string; live: boolean }>(TAKE_NONCE, [nonce, transaction.given]),
    );
    return row?.live ? (JSON.parse(row.body) as Nonce) : null;
  }

  async expireNonces(): Promise<void> {
    await this.#database.transaction('call', (transaction) =>
      transaction.count(EXPIRE_NONCES, [transaction.given]),
    );
  }

  async setting(name: string, create: () => JsonObject): Promise<JsonObject> {
    const read = async (): Promise<JsonObject | null> => {
      const [row] = await this.#database.rows<{ value: string }>(SETTING, [name]);
      return row ? (JSON.parse(row.value) as JsonObject) : null;
    };
    const known = await read();
    if (known) return known;
    const value = JSON.stringify(create());
    await this.#database.transaction('call', (transaction) => transaction.count(MAKE_SETTING, [name, value]));
    const kept = await read();
    if (!kept) throw new MillraceError('internal', `setting ${name} was not kept`);
    return kept;
  }
}

function countOf(held: readonly Held[]): number {
  return held.reduce((sum, [, count]) => sum + count, 0);
}
