/**
 * Is this database one we can use, and does it have our tables? Everything missing is made in one transaction under one lock,
 * so any number of dispatchers may start at once and a start that fails leaves nothing behind.
 */
import { MillraceError } from '@millrace/runner';
import type { Logger } from '@millrace/runner';
import pg from 'pg';
import { readMigrations } from './migrations.ts';
import type { Migration } from './migrations.ts';
import { clientConfig } from './postgres-database.ts';
import type { Address } from './postgres-database.ts';
import { fromDriver, refusalOf } from './postgres-errors.ts';

/** PostgreSQL's oldest version with everything used here. */
const MIN_SERVER = { number: 130_000, text: '13' };

/** Any number that nobody else uses: "millrace" begins with these bytes. */
const MIGRATION_LOCK = 0x6d696c6c;

/** Another dispatcher may be migrating a large database. */
const MIGRATION_TIMEOUT_MS = 30 * 60_000;

interface Facts {
  readonly version: number;
  readonly version_text: string;
  readonly encoding: string;
  readonly standby: boolean;
  readonly commits: string;
  readonly fsync: string;
}

/**
 * The address with what its sessions need.
 *
 * @throws MillraceError `unavailable`, `unauthenticated`, `permission_denied` as the server answered; `failed_precondition`
 * when the server is too old, a standby or not UTF-8, or a newer Millrace made the tables.
 */
export async function prepareDatabase(address: Address, log: Logger | undefined): Promise<Address> {
  const client = new pg.Client({
    ...clientConfig(address),
    pipeline: false,
    statement_timeout: MIGRATION_TIMEOUT_MS,
    lock_timeout: MIGRATION_TIMEOUT_MS,
    query_timeout: MIGRATION_TIMEOUT_MS,
  });
  client.on('error', () => {});
  try {
    await client.connect();
    const session = await checkServer(client, address.place, log);
    await migrate(client, address.place, log);
    await checkRights(client, address.place);
    return { ...address, session };
  } catch (error) {
    throw MillraceError.is(error) ? error : refusalOf(fromDriver(error), address.place);
  } finally {
    await client.end().catch(() => {});
  }
}

async function checkServer(
  client: pg.Client,
  place: string,
  log: Logger | undefined,
): Promise<readonly string[]> {
  const { rows } = await client.query<Facts>(`
    SELECT current_setting('server_version_num')::integer AS version, current_setting('server_version') AS version_text,
      (SELECT pg_encoding_to_char(encoding) FROM pg_database WHERE datname = current_database()) AS encoding,
      pg_is_in_recovery() AS standby, current_setting('synchronous_commit') AS commits, current_setting('fsync') AS fsync`);
  const [facts] = rows;
  if (!facts) throw new MillraceError('internal', `${place} does not tell its version`);
  const refuse = (text: string): never => {
    throw new MillraceError('failed_precondition', `${place} ${text}`);
  };
  if (facts.version < MIN_SERVER.number) {
    refuse(`runs PostgreSQL ${facts.version_text}; Millrace needs ${MIN_SERVER.text} or newer`);
  }
  if (facts.encoding !== 'UTF8') {
    refuse(
      `has the encoding ${facts.encoding}; Millrace needs UTF8 (CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0)`,
    );
  }
  if (facts.standby) refuse('is a standby and cannot be written to; give the address of the primary');
  // What is acknowledged must be on the disk. This is the server's alone; the other the session sets for itself.
  if (facts.fsync === 'off') {
    log?.warn('the database runs with fsync off: acknowledged work is lost when its machine goes down', {
      place,
    });
  }
  return facts.commits === 'off' ? ['synchronous_commit=on'] : [];
}

async function migrate(client: pg.Client, place: string, log: Logger | undefined): Promise<void> {
  const known = readMigrations('postgres');
  // Without the lock first: a user who may only read and write needs no more rights while nothing is missing.
  if ((await missing(client, known, place)).length === 0) return;
  await client.query('BEGIN');
  try {
    await client.query('SELECT pg_advisory_xact_lock($1)', [MIGRATION_LOCK]);
    const { rows } = await client.query("SELECT 1 FROM pg_namespace WHERE nspname = 'millrace'");
    // Not IF NOT EXISTS, which asks for the right to create even when there is nothing to create.
    if (rows.length === 0) await client.query('CREATE SCHEMA millrace');
    if (!(await hasMigrations(client))) {
      await client.query(
        'CREATE TABLE millrace.migrations (id integer PRIMARY KEY, name text NOT NULL, checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())',
      );
    }
    for (const { id, name, checksum, sql } of await missing(client, known, place)) {
      await client.query(sql);
      await client.query('INSERT INTO millrace.migrations (id, name, checksum) VALUES ($1, $2, $3)', [
        id,
        name,
        checksum,
      ]);
      log?.info('migrated', { migration: name, place });
    }
    await client.query('COMMIT');
  } catch (error) {
    await client.query('ROLLBACK').catch(() => {});
    throw error;
  }
}

/** Here instead of in the middle of the work. */
async function checkRights(client: pg.Client, place: string): Promise<void> {
  const { rows } = await client.query<{ lacking: string }>(`
    SELECT r.name || ' on ' || t.tablename AS lacking FROM pg_tables t
    CROSS JOIN (VALUES ('SELECT'), ('INSERT'), ('UPDATE'), ('DELETE')) AS r (name)
    WHERE t.schemaname = 'millrace' AND t.tablename <> 'migrations'
      AND NOT has_table_privilege(format('millrace.%I', t.tablename), r.name)
    UNION ALL
    SELECT 'USAGE on sequence ' || s.sequencename FROM pg_sequences s
    WHERE s.schemaname = 'millrace' AND NOT has_sequence_privilege(format('millrace.%I', s.sequencename), 'USAGE')
    LIMIT 3`);
  if (rows.length === 0) return;
  const lacking = rows.map((row) => row.lacking).join(', ');
  throw new MillraceError(
    'permission_denied',
    `${place}: the user lacks rights in the schema millrace (${lacking}); docs/postgres.md tells how to grant them`,
  );
}

async function hasMigrations(client: pg.Client): Promise<boolean> {
  const { rows } = await client.query(
    "SELECT 1 FROM pg_tables WHERE schemaname = 'millrace' AND tablename = 'migrations'",
  );
  return rows.length > 0;
}

async function missing(
  client: pg.Client,
  known: readonly Migration[],
  place: string,
): Promise<readonly Migration[]> {
  if (!(await hasMigrations(client))) return known;
  const { rows } = await client.query<{ id: number; name: string; checksum: string }>(
    'SELECT id, name, checksum FROM millrace.migrations ORDER BY id',
  );
  for (const { id, name, checksum } of rows) {
    const ours = known.find((migration) => migration.id === id);
    if (!ours) {
      throw new MillraceError(
        'failed_precondition',
        `${place} was written by a newer Millrace (it has migration ${name}); use that version or another database`,
      );
    }
    if (ours.checksum !== checksum) {
      throw new MillraceError(
        'failed_precondition',
        `${place} has a different migration ${name} than this Millrace; it was written by a development version`,
      );
    }
  }
  const applied = new Set(rows.map(({ id }) => id));
  return known.filter(({ id }) => !applied.has(id));
}
