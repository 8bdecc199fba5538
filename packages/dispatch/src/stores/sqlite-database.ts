/**
 * One SQLite file as the store needs it: opened for this process alone, durable, migrated, with statements prepared
 * once and errors in our codes. The only file that knows the driver.
 */
import { closeSync, openSync, statSync } from 'node:fs';
import { DatabaseSync } from '@photostructure/sqlite';
import { MillraceError } from '@millrace/runner';
import { readMigrations } from './migrations.ts';

/** What a column can hold here. */
export type Value = string | number | null | Uint8Array;
/** One row, columns in the order of the statement. */
export type Row = readonly Value[];

/** A prepared statement. Rows come as arrays: with the driver's objects, reading costs about twice as much. */
export interface Statement {
  /** Executes a change. */
  readonly run: (...values: Value[]) => void;
  /** Executes a change and returns how many rows changed. The driver makes an object for it, which costs 1.5 µs. */
  readonly count: (...values: Value[]) => number;
  readonly get: (...values: Value[]) => Row | undefined;
  readonly all: (...values: Value[]) => Row[];
}

/** The driver's own result codes (sqlite3.h), as far as they mean something to us. */
const SQLITE = {
  perm: 3,
  busy: 5,
  locked: 6,
  nomem: 7,
  readonly: 8,
  ioerr: 10,
  corrupt: 11,
  full: 13,
  cantopen: 14,
  notadb: 26,
};

/** "MLRC": marks a file as ours, so that a path given by mistake is refused instead of filled with tables. */
const APPLICATION_ID = 0x4d4c5243;

/**
 * Makes a new file for its owner alone: it holds the key that signs every token. SQLite gives the files beside it the
 * same mode. One that exists keeps what its operator gave it.
 */
function createPrivately(path: string): void {
  if (path === ':memory:') return;
  try {
    closeSync(openSync(path, 'a', 0o600));
  } catch {
    // Opening it is next, and says what is wrong.
  }
}

export class Database {
  readonly #path: string;
  readonly #handle: InstanceType<typeof DatabaseSync>;
  #writes = 0;

  /**
   * @throws MillraceError `failed_precondition` when another process has it open, when it is not a Millrace database, is
   * damaged, or when a newer Millrace wrote it; `unavailable` when it cannot be opened.
   */
  constructor(path: string, nowMs: number, maxBytes?: number) {
    this.#path = path;
    createPrivately(path);
    try {
      // No waiting for a lock: the driver would block the event loop, and whoever holds it keeps it.
      this.#handle = new DatabaseSync(path, { timeout: 0 });
    } catch (error) {
      throw this.#openError(error);
    }
    try {
      // Exclusive before the first read: SQLite then keeps its lock until close, and a second process is refused at its
      // first read. The empty write transaction takes the lock now instead of at the first use.
      this.#handle.exec('PRAGMA locking_mode = EXCLUSIVE');
      this.#checkOurs();
      this.#checkWhole();
      this.#handle.exec(`
        PRAGMA journal_mode = WAL;
        PRAGMA synchronous = FULL;
        PRAGMA foreign_keys = OFF;
        PRAGMA cache_size = -65536;
        PRAGMA temp_store = MEMORY;
        PRAGMA wal_autocheckpoint = 4000;
        PRAGMA journal_size_limit = 67108864;
        BEGIN IMMEDIATE; COMMIT;
      `);
      this.#migrate(nowMs);
      if (maxBytes !== undefined) {
        const [pageSize] = this.prepare('PRAGMA page_size').get() ?? [4096];
        this.exec(`PRAGMA max_page_count = ${Math.max(1, Math.floor(maxBytes / Number(pageSize)))}`);
      }
    } catch (error) {
      const refusal = this.#openError(error);
      try {
        this.close();
      } catch {
        // The file could not even be opened properly; the first error says why.
      }
      throw refusal;
    }
  }

  /** Grows with every change asked for, at the time it is asked for. */
  get writes(): number {
    return this.#writes;
  }

  /** Counts a change that will be written later. */
  noteWrite(): void {
    this.#writes += 1;
  }

  /** Prepares a statement for the life of the database. Not for BEGIN, COMMIT and ROLLBACK: use {@link exec}. */
  prepare(sql: string): Statement {
    const statement = this.#handle.prepare(sql);
    statement.setReturnArrays(true);
    return {
      run: (...values) => {
        this.#writes += 1;
        statement.get(...values);
      },
      count: (...values) => {
        this.#writes += 1;
        return statement.run(...values).changes;
      },
      get: (...values) => statement.get(...values) as Row | undefined,
      all: (...values) => statement.all(...values) as Row[],
    };
  }

  /** Executes a change that was counted before, by {@link noteWrite}. */
  prepareCounted(sql: string): (...values: Value[]) => void {
    const statement = this.#handle.prepare(sql);
    return (...values) => void statement.get(...values);
  }

  exec(sql: string): void {
    this.#handle.exec(sql);
  }

  /** Ends an open transaction, if SQLite has not done so itself. */
  rollback(): void {
    if (this.#handle.isTransaction) this.#handle.exec('ROLLBACK');
  }

  /** Closes the file and gives up its lock, so that it can be opened again at once, by this process too. */
  close(): void {
    try {
      // The driver leaves prepared statements to the garbage collector, and SQLite keeps a connection, with its lock, until
      // the last of them is gone. Leaving WAL mode lets the exclusive lock go before.
      this.#handle.exec(
        'PRAGMA journal_mode = DELETE; PRAGMA locking_mode = NORMAL; SELECT count(*) FROM sqlite_schema',
      );
    } finally {
      this.#handle.close();
    }
  }

  /** The error to answer with when the disk or the file failed, or the file is damaged; null for anything else. */
  storageError(error: unknown): MillraceError | null {
    switch (primaryCode(error)) {
      case SQLITE.full:
        return new MillraceError(
          'resource_exhausted',
          `the disk or the size limit of database ${this.#path} is full; nothing was changed. Free space and try again`,
          { cause: error, retryable: true },
        );
      case SQLITE.busy:
      case SQLITE.locked:
      case SQLITE.nomem:
      case SQLITE.readonly:
      case SQLITE.ioerr:
      case SQLITE.cantopen:
        return new MillraceError(
          'unavailable',
          `database ${this.#path} cannot be written: ${messageOf(error)}; nothing was changed`,
          { cause: error },
        );
      case SQLITE.corrupt:
        return new MillraceError(
          'data_loss',
          `database ${this.#path} is damaged: ${messageOf(error)}. Stop the dispatcher, keep a copy, and restore a backup`,
          { cause: error },
        );
      default:
        return null;
    }
  }

  #openError(error: unknown): MillraceError {
    if (MillraceError.is(error)) return error;
    switch (primaryCode(error)) {
      case SQLITE.busy:
      case SQLITE.locked:
        return new MillraceError(
          'failed_precondition',
          `database ${this.#path} is in use by another process; only one dispatcher may have it open`,
          { cause: error },
        );
      case SQLITE.corrupt:
        return this.#damaged(messageOf(error), error);
      case SQLITE.notadb:
        return new MillraceError('failed_precondition', `${this.#path} is not a Millrace database`, {
          cause: error,
        });
      default:
        return (
          this.storageError(error) ??
          new MillraceError('unavailable', `database ${this.#path} cannot be opened: ${messageOf(error)}`, {
            cause: error,
          })
        );
    }
  }

  #checkOurs(): void {
    const [id] = this.prepare('PRAGMA application_id').get() ?? [0];
    if (id === APPLICATION_ID) return;
    const [tables] = this.prepare('SELECT count(*) FROM sqlite_schema').get() ?? [0];
    if (id !== 0 || tables !== 0) {
      throw new MillraceError('failed_precondition', `${this.#path} is not a Millrace database`);
    }
    this.exec(`PRAGMA application_id = ${APPLICATION_ID}`);
  }

  /**
   * Looks at every page once. SQLite itself finds a damaged one when it comes to it, which may be months later, with work
   * built on what it did not see. Measured: 1.1 ms of CPU per MB, beside reading the file.
   */
  #checkWhole(): void {
    if (this.#path === ':memory:') return;
    const [found] = this.prepare('PRAGMA quick_check(1)').get() ?? [];
    // The last line names the place.
    if (found !== 'ok') throw this.#damaged(String(found).split('\n').at(-1));
    const [pages, pageSize] =
      this.prepare('SELECT page_count, page_size FROM pragma_page_count, pragma_page_size').get() ?? [];
    const bytes = Number(pages) * Number(pageSize);
    // SQLite reads what is missing at the end as zeros. A log may hold pages that the file has no room for yet.
    const size = sizeOf(this.#path);
    if (size < bytes && sizeOf(`${this.#path}-wal`) === 0) {
      throw this.#damaged(`it ends at ${size} bytes, ${bytes} are expected`);
    }
  }

  #damaged(what: string | undefined, cause?: unknown): MillraceError {
    return new MillraceError(
      'failed_precondition',
      `database ${this.#path} is damaged: ${what}. Keep a copy of it and of ${this.#path}-wal, and restore a backup`,
      { cause },
    );
  }

  /** Applies what is missing, each file in a transaction with its line in the table of migrations. */
  #migrate(nowMs: number): void {
    this.exec(
      'CREATE TABLE IF NOT EXISTS migrations (id INTEGER PRIMARY KEY, name TEXT NOT NULL, checksum TEXT NOT NULL, applied_at INTEGER NOT NULL) STRICT',
    );
    const known = readMigrations('sqlite');
    for (const [id, name, checksum] of this.prepare(
      'SELECT id, name, checksum FROM migrations ORDER BY id',
    ).all()) {
      const ours = known.find((migration) => migration.id === id);
      if (!ours) {
        throw new MillraceError(
          'failed_precondition',
          `database ${this.#path} was written by a newer Millrace (it has migration ${String(name)}); use that version or another file`,
        );
      }
      if (ours.checksum !== checksum) {
        throw new MillraceError(
          'failed_precondition',
          `database ${this.#path} has a different migration ${String(name)} than this Millrace; it was written by a development version`,
        );
      }
    }
    const [applied] = this.prepare('SELECT coalesce(max(id), 0) FROM migrations').get() ?? [0];
    const record = this.prepare(
      'INSERT INTO migrations (id, name, checksum, applied_at) VALUES (?, ?, ?, ?)',
    );
    for (const { id, name, checksum, sql } of known) {
      if (id <= Number(applied)) continue;
      this.exec('BEGIN IMMEDIATE');
      try {
        this.exec(sql);
        record.run(id, name, checksum, nowMs);
        this.exec('COMMIT');
      } catch (error) {
        this.rollback();
        throw error;
      }
    }
  }
}

/** Extended result codes carry the primary one in their low byte. 0: not an error of SQLite's. */
function primaryCode(error: unknown): number {
  const code = (error as { errcode?: unknown } | null)?.errcode;
  return typeof code === 'number' ? code & 0xff : 0;
}

/** 0 for a file that is not there. */
function sizeOf(path: string): number {
  return statSync(path, { throwIfNoEntry: false })?.size ?? 0;
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Rows per statement of a {@link BulkInsert}; more gains nothing measurable. */
const BULK_ROWS = 32;

/**
 * Inserts collected and written 32 to a statement: the driver's cost per call and per statement is larger than SQLite's
 * per row (measured here: 3.4 against 1.4 µs for two columns, 8.1 against 5.1 for eleven).
 */
export class BulkInsert {
  readonly #database: Database;
  readonly #one: (...values: Value[]) => void;
  readonly #many: (...values: Value[]) => void;
  readonly #columns: number;
  #values: Value[] = [];

  constructor(database: Database, table: string, columns: readonly string[]) {
    const row = `(${columns.map(() => '?').join(', ')})`;
    const sql = (rows: number): string =>
      `INSERT INTO ${table} (${columns.join(', ')}) VALUES ${Array.from({ length: rows }, () => row).join(', ')}`;
    this.#database = database;
    this.#columns = columns.length;
    this.#one = database.prepareCounted(sql(1));
    this.#many = database.prepareCounted(sql(BULK_ROWS));
  }

  /** Takes one row, in the order of the columns. It is in the table after {@link flush}. */
  add(...row: Value[]): void {
    this.#database.noteWrite();
    this.#values.push(...row);
  }

  /** Like {@link add} for a change that was counted before. */
  addCounted(...row: Value[]): void {
    this.#values.push(...row);
  }

  flush(): void {
    const values = this.#values;
    if (values.length === 0) return;
    this.#values = [];
    const block = this.#columns * BULK_ROWS;
    let at = 0;
    for (; at + block <= values.length; at += block) this.#many(...values.slice(at, at + block));
    for (; at < values.length; at += this.#columns) this.#one(...values.slice(at, at + this.#columns));
  }

  /** Forgets the rows taken since the last flush. */
  clear(): void {
    this.#values = [];
  }
}
