/**
 * The distinct sets of demands that tasks make, by number. Rows of queues are never changed or removed, so what was read
 * once may be kept, whatever other dispatchers do.
 */
import { createHash } from 'node:crypto';
import { MillraceError } from '@millrace/runner';
import type { CapabilityFilters, NodeMode } from '../records.ts';
import { sql } from './postgres-database.ts';
import type { Database } from './postgres-database.ts';
import type { Demand } from './matching.ts';
import { columns } from './postgres-rows.ts';
import type { Queue } from './postgres-rows.ts';

interface StoredQueue {
  readonly id: number;
  readonly key: string;
  readonly capability: string;
  readonly filters: string;
  readonly mode: NodeMode;
  readonly organizationId: string | null;
}

const COLUMNS = 'id, key, capability, filters, mode, organization_id AS "organizationId"';
const BY_ID = sql(`SELECT ${COLUMNS} FROM queues WHERE id = ANY($1::integer[])`);
const BY_KEY = sql(`SELECT ${COLUMNS} FROM queues WHERE key = ANY($1::text[])`);
const INSERT = sql(`
  INSERT INTO queues (key, capability, filters, mode, organization_id)
  SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[]) AS u (key) ORDER BY u.key
  ON CONFLICT (key) DO NOTHING`);

export class Queues {
  readonly #database: Database;
  readonly #byId = new Map<number, Queue>();
  readonly #ids = new Map<string, number>();

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
    const keys = demands.map(keyOf);
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

  #keep(rows: readonly StoredQueue[]): void {
    for (const { id, key, capability, filters, mode, organizationId } of rows) {
      const demand = { capability, filters: JSON.parse(filters) as CapabilityFilters, mode, organizationId };
      this.#byId.set(id, { ...demand, id });
      this.#ids.set(key, id);
    }
  }
}

function keyOf({ capability, filters, mode, organizationId }: Demand): string {
  const sorted = Object.entries(filters).toSorted(([a], [b]) => (a < b ? -1 : 1));
  return createHash('sha256')
    .update(JSON.stringify([capability, sorted, mode, organizationId]))
    .digest('hex');
}
