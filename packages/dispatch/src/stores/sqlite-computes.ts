/** Computes in SQLite: which digests are code, and the engine of each. Synchronous; the caller brings the transaction. */
import { MillraceError } from '@millrace/runner';
import type { Clock } from '@millrace/runner';
import { digestHex } from '../blobs/digest.ts';
import type { ComputeRecord } from '../records.ts';
import type { ComputeWrite, ListComputesQuery, PutComputeAnswer } from '../store.ts';
import type { Database, Row, Statement } from './sqlite-database.ts';
import { isoTime } from './time.ts';

const COLUMNS = 'seq, digest, engine, size, created_at';

export class Computes {
  readonly #clock: Clock;
  readonly #selectOne: Statement;
  readonly #selectPage: Statement;
  readonly #insert: Statement;
  readonly #delete: Statement;

  constructor(database: Database, clock: Clock) {
    this.#clock = clock;
    const sql = (text: string): Statement => database.prepare(text);
    this.#selectOne = sql(`SELECT ${COLUMNS} FROM computes WHERE digest = ?`);
    this.#selectPage = sql(`SELECT ${COLUMNS} FROM computes WHERE seq < ? ORDER BY seq DESC LIMIT ?`);
    this.#insert = sql('INSERT INTO computes (digest, engine, size, created_at) VALUES (?, ?, ?, ?)');
    this.#delete = sql('DELETE FROM computes WHERE digest = ?');
  }

  /** @throws MillraceError as {@link Store.putCompute} */
  put({ digest, engine, size }: ComputeWrite): PutComputeAnswer {
    const kept = this.get(digest);
    if (kept === null) {
      const now = this.#clock.now();
      this.#insert.run(digest, engine, size, now);
      return { compute: recordOf([0, digest, engine, size, now]), created: true };
    }
    if (kept.engine === engine) return { compute: kept, created: false };
    throw new MillraceError(
      'already_exists',
      `compute ${kept.ref} is there for the engine ${kept.engine}, not for ${engine}; delete it first if it was stored wrongly`,
    );
  }

  get(digest: string): ComputeRecord | null {
    const row = this.#selectOne.get(digest);
    return row ? recordOf(row) : null;
  }

  list({ limit }: ListComputesQuery, before: number | null): { items: ComputeRecord[]; next: number | null } {
    // One more than asked for tells whether there is a next page.
    const rows = this.#selectPage.all(before ?? Number.MAX_SAFE_INTEGER, limit + 1);
    const page = rows.slice(0, limit);
    return {
      items: page.map(recordOf),
      next: rows.length > limit ? (page.at(-1)?.[0] as number) : null,
    };
  }

  delete(digest: string): boolean {
    return this.#delete.count(digest) > 0;
  }

  missing(digests: readonly string[]): string[] {
    return digests.filter((digest) => !this.#selectOne.get(digest));
  }
}

function recordOf([, digest, engine, size, createdAt]: Row): ComputeRecord {
  const hex = digestHex(digest as string);
  return {
    ref: `compute://sha256/${hex}`,
    alg: 'sha256',
    digest: hex,
    engine: engine as string,
    bytes: size as number,
    created_at: isoTime(createdAt as number),
  };
}
