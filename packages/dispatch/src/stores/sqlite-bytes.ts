/**
 * The bytes of small data items, in the same transactions as the items that name them: so they need no sync of their own,
 * are never there without a name, and nobody has to collect them. Synchronous; the caller brings the transaction.
 */
import type { Database, Statement } from './sqlite-database.ts';

/**
 * Larger items are files. They would be written twice here, to the log and to the database, while the event loop waits; up to
 * about this size that is cheaper than what the file system does for a new file.
 */
export const SMALL_BYTES = 64 * 1024;

export class SmallItems {
  readonly #upsert: Statement;
  readonly #select: Statement;
  readonly #drop: Statement;

  constructor(database: Database) {
    // Also where there is such a row: what was damaged on the disk is healed by whoever brings the bytes again.
    this.#upsert = database.prepare(`
      INSERT INTO small_bytes (sha256, bytes) VALUES (?, ?) ON CONFLICT DO UPDATE SET bytes = excluded.bytes`);
    this.#select = database.prepare('SELECT bytes FROM small_bytes WHERE sha256 = ?');
    this.#drop = database.prepare(`
      DELETE FROM small_bytes WHERE sha256 = ?1 AND NOT EXISTS (SELECT 1 FROM data WHERE digest = ?2)`);
  }

  put(digest: string, bytes: Uint8Array): void {
    this.#upsert.run(keyOf(digest), bytes);
  }

  /** As they are stored, unverified; null when they are not here. */
  get(digest: string): Uint8Array | null {
    const row = this.#select.get(keyOf(digest));
    return row === undefined ? null : (row[0] as Uint8Array);
  }

  /** Removes the bytes, unless an item still names them. */
  drop(digest: string): void {
    this.#drop.run(keyOf(digest), digest);
  }
}

function keyOf(digest: string): Buffer {
  return Buffer.from(digest.slice('sha256:'.length), 'hex');
}
