/**
 * The distinct sets of demands that tasks make, by number, and the lanes of each: what a domain has of them. These rows are
 * never changed or removed, so what was read once may be kept, whatever other dispatchers do.
 */
import { createHash } from 'node:crypto';
import { MillraceError } from '@millrace/runner';
import type { CapabilityFilters, NodeMode } from '../records.ts';
import type { Resources } from '../resources.ts';
import { sql } from './postgres-database.ts';
import type { Database } from './postgres-database.ts';
import type { Demand } from './matching.ts';
import { columns } from './postgres-rows.ts';
import type { Lane, Queue } from './postgres-rows.ts';

interface StoredQueue {
  readonly id: number;
  readonly key: string;
  readonly capability: string;
  readonly filters: string;
  readonly mode: NodeMode;
  readonly organizationId: string | null;
  readonly resources: string | null;
}

const COLUMNS = 'id, key, capability, filters, mode, organization_id AS "organizationId", resources';
const BY_ID = sql(`SELECT ${COLUMNS} FROM queues WHERE id = ANY($1::integer[])`);
const BY_KEY = sql(`SELECT ${COLUMNS} FROM queues WHERE key = ANY($1::text[])`);
// Numbered in the order of asking, made in the order of the keys, so that two dispatchers that make the same wait in one order.
const INSERT = sql(`
  INSERT INTO queues (id, key, capability, filters, mode, organization_id, resources) OVERRIDING SYSTEM VALUE
  SELECT n.id, n.key, n.capability, n.filters, n.mode, n.organization_id, n.resources FROM (
    SELECT nextval('queues_id_seq')::integer AS id, u.* FROM (
      SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[]) WITH ORDINALITY
        AS u (key, capability, filters, mode, organization_id, resources, at) ORDER BY at) AS u) AS n
  ORDER BY n.key ON CONFLICT (key) DO NOTHING`);
const LANES_BY_ID = sql(
  'SELECT id, queue_id AS "queueId", domain_id AS "domainId" FROM lanes WHERE id = ANY($1::integer[])',
);
const LANES_BY_NAME = sql(`
  SELECT l.id, l.queue_id AS "queueId", l.domain_id AS "domainId" FROM unnest($1::integer[], $2::text[]) AS u (queue_id, domain_id)
  JOIN lanes l ON l.queue_id = u.queue_id AND l.domain_id = u.domain_id`);
const INSERT_LANES = sql(`
  INSERT INTO lanes (queue_id, domain_id)
  SELECT * FROM unnest($1::integer[], $2::text[]) AS u (queue_id, domain_id) ORDER BY u.queue_id, u.domain_id
  ON CONFLICT (queue_id, domain_id) DO NOTHING`);

interface StoredLane {
  readonly id: number;
  readonly queueId: number;
  readonly domainId: string;
}

type LaneName = Pick<StoredLane, 'queueId' | 'domainId'>;

export class Queues {
  readonly #database: Database;
  readonly #byId = new Map<number, Queue>();
  readonly #ids = new Map<string, number>();
  readonly #lanes = new Map<number, Lane>();
  readonly #laneIds = new Map<string, number>();

  constructor(database: Database) {
    this.#database = database;
  }

  /** One whose id was found by {@link idsFor} or given to {@link load}. */
  get(id: number): Queue {
    const queue = this.#byId.get(id);
    if (!queue) throw new MillraceError('internal', `queue ${id} does not exist`);
    return queue;
  }

  /** Reads those not known yet. */
  async load(ids: Iterable<number>): Promise<void> {
    const unknown = [...new Set(ids)].filter((id) => !this.#byId.has(id));
    if (unknown.length > 0) this.#keep(await this.#database.rows<StoredQueue>(BY_ID, [unknown]));
  }

  /** The queue of each demand, made where there is none. */
  async idsFor(demands: readonly Demand[]): Promise<number[]> {
    // Most tasks of a job demand the same, and a digest is dear.
    const texts = new Map<string, string>();
    const keys = demands.map((demand) => {
      const text = JSON.stringify(demand);
      const key = texts.get(text) ?? keyOf(demand);
      texts.set(text, key);
      return key;
    });
    const unknown = new Map<string, Demand>();
    for (const [index, key] of keys.entries()) {
      const demand = demands[index];
      if (demand && !this.#ids.has(key)) unknown.set(key, demand);
    }
    if (unknown.size > 0) {
      this.#keep(await this.#database.rows<StoredQueue>(BY_KEY, [[...unknown.keys()]]));
      const fresh = [...unknown].filter(([key]) => !this.#ids.has(key));
      if (fresh.length > 0) {
        // By itself: whoever needs the same queue at the same time should not wait for a whole submission.
        await this.#database.transaction('call', (transaction) =>
          transaction.count(
            INSERT,
            columns<(typeof fresh)[number], string | null>(
              fresh,
              ([key]) => key,
              ([, { capability }]) => capability,
              ([, { filters }]) => JSON.stringify(filters),
              ([, { mode }]) => mode,
              ([, { organizationId }]) => organizationId,
              ([, { resources }]) => (resources ? JSON.stringify(resources) : null),
            ),
          ),
        );
        this.#keep(await this.#database.rows<StoredQueue>(BY_KEY, [fresh.map(([key]) => key)]));
      }
    }
    return keys.map((key) => {
      const id = this.#ids.get(key);
      if (id === undefined) throw new MillraceError('internal', `queue ${key} was not made`);
      return id;
    });
  }

  /** One whose id was found by {@link lanesFor} or given to {@link loadLanes}. */
  lane(id: number): Lane {
    const lane = this.#lanes.get(id);
    if (!lane) throw new MillraceError('internal', `lane ${id} does not exist`);
    return lane;
  }

  /** Reads those not known yet. */
  async loadLanes(ids: Iterable<number>): Promise<void> {
    const unknown = [...new Set(ids)].filter((id) => !this.#lanes.has(id));
    if (unknown.length > 0)
      await this.#keepLanes(await this.#database.rows<StoredLane>(LANES_BY_ID, [unknown]));
  }

  /** The lane of each queue and domain, made where there is none. */
  async lanesFor(names: readonly LaneName[]): Promise<number[]> {
    const unknown = new Map<string, LaneName>();
    for (const name of names) {
      const key = laneKey(name);
      if (!this.#laneIds.has(key)) unknown.set(key, name);
    }
    if (unknown.size > 0) {
      const asked = (): LaneName[] =>
        [...unknown].flatMap(([key, name]) => (this.#laneIds.has(key) ? [] : [name]));
      const values = (wanted: readonly LaneName[]) =>
        columns<LaneName, number | string>(
          wanted,
          ({ queueId }) => queueId,
          ({ domainId }) => domainId,
        );
      await this.#keepLanes(await this.#database.rows<StoredLane>(LANES_BY_NAME, values(asked())));
      const fresh = asked();
      if (fresh.length > 0) {
        await this.#database.transaction('call', (transaction) =>
          transaction.count(INSERT_LANES, values(fresh)),
        );
        await this.#keepLanes(await this.#database.rows<StoredLane>(LANES_BY_NAME, values(fresh)));
      }
    }
    return names.map((name) => {
      const id = this.#laneIds.get(laneKey(name));
      if (id === undefined) throw new MillraceError('internal', `lane ${laneKey(name)} was not made`);
      return id;
    });
  }

  async #keepLanes(rows: readonly StoredLane[]): Promise<void> {
    await this.load(rows.map(({ queueId }) => queueId));
    for (const { id, queueId, domainId } of rows) {
      this.#lanes.set(id, { id, queue: this.get(queueId), domainId });
      this.#laneIds.set(laneKey({ queueId, domainId }), id);
    }
  }

  #keep(rows: readonly StoredQueue[]): void {
    for (const { id, key, capability, filters, mode, organizationId, resources } of rows) {
      const demand = {
        capability,
        filters: JSON.parse(filters) as CapabilityFilters,
        mode,
        organizationId,
        resources: resources === null ? null : (JSON.parse(resources) as Resources),
      };
      this.#byId.set(id, { ...demand, id });
      this.#ids.set(key, id);
    }
  }
}

function laneKey({ queueId, domainId }: LaneName): string {
  return `${queueId} ${domainId}`;
}

function keyOf({ capability, filters, mode, organizationId, resources }: Demand): string {
  const sorted = Object.entries(filters).toSorted(([a], [b]) => (a < b ? -1 : 1));
  return createHash('sha256')
    .update(JSON.stringify([capability, sorted, mode, organizationId, ...(resources ? [resources] : [])]))
    .digest('hex');
}
