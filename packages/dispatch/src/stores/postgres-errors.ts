/**
 * What PostgreSQL and the way to it can answer, in our terms: what is tried again, what the operator has to mend, and in which
 * words. Nothing here repeats a connection string, which may hold a password.
 */
import { MillraceError } from '@millrace/runner';
import type { ErrorCode } from '@millrace/runner';
import pg from 'pg';

/**
 * - `again` the server rolled the transaction back for the sake of others; at once it may succeed
 * - `reconnect` this connection is over or was refused for now; another one may work
 */
export type Retry = 'again' | 'reconnect';

/** Every SQLSTATE after which a transaction is run again. Anything else is final. */
const RETRYABLE: Readonly<Record<string, Retry>> = {
  '40001': 'again', // serialization_failure
  '40P01': 'again', // deadlock_detected
  '55P03': 'again', // lock_not_available: lock_timeout, or a row that was not to be waited for
  '08000': 'reconnect', // connection_exception
  '08001': 'reconnect', // sqlclient_unable_to_establish_sqlconnection
  '08003': 'reconnect', // connection_does_not_exist
  '08004': 'reconnect', // sqlserver_rejected_establishment_of_sqlconnection
  '08006': 'reconnect', // connection_failure
  '25006': 'reconnect', // read_only_sql_transaction: a primary that became a standby
  '25P03': 'reconnect', // idle_in_transaction_session_timeout
  '53300': 'reconnect', // too_many_connections
  '57P01': 'reconnect', // admin_shutdown, pg_terminate_backend
  '57P02': 'reconnect', // crash_shutdown
  '57P03': 'reconnect', // cannot_connect_now: starting, stopping or recovering
  '57P05': 'reconnect', // idle_session_timeout
};

/** The server refused a statement. The connection is as good as before, unless {@link retryOf} says otherwise. */
export class SqlError extends Error {
  readonly sqlstate: string;
  readonly constraint: string | undefined;

  constructor(error: pg.DatabaseError) {
    super(error.message, { cause: error });
    this.name = 'SqlError';
    this.sqlstate = error.code ?? '';
    this.constraint = error.constraint;
  }
}

/** The connection broke, or there was none to be had. What was under way did or did not happen. */
export class ConnectionLost extends Error {
  constructor(cause: unknown) {
    super(cause instanceof Error ? cause.message : String(cause), { cause });
    this.name = 'ConnectionLost';
  }
}

/** The driver's error as one of the two above. */
export function fromDriver(error: unknown): SqlError | ConnectionLost {
  return error instanceof pg.DatabaseError ? new SqlError(error) : new ConnectionLost(error);
}

/** Null: trying again cannot help. */
export function retryOf(error: unknown): Retry | null {
  if (error instanceof ConnectionLost) return 'reconnect';
  return error instanceof SqlError ? (RETRYABLE[error.sqlstate] ?? null) : null;
}

/** True when the server refused because a row with that unique value is there. */
export function isDuplicate(error: unknown, constraint?: string): boolean {
  return (
    error instanceof SqlError &&
    error.sqlstate === '23505' &&
    (constraint === undefined || error.constraint === constraint)
  );
}

/** Refusals with a code of their own; the first member is the SQLSTATE or the class of it. */
const REFUSALS: readonly (readonly [string, ErrorCode, (place: string, message: string) => string])[] = [
  [
    '28P01',
    'unauthenticated',
    (place) =>
      `${place} refused the user or the password; give the right ones in the URL, PGPASSWORD or ~/.pgpass`,
  ],
  ['28', 'unauthenticated', (place, message) => `${place} refused the login: ${message}`],
  [
    '3D000',
    'failed_precondition',
    (place) => `${place} does not exist; create it first (CREATE DATABASE … ENCODING 'UTF8')`,
  ],
  [
    '42501',
    'permission_denied',
    (place, message) =>
      `${place}: the user lacks a right (${message}); docs/postgres.md lists what it needs in the schema millrace`,
  ],
  [
    '53100',
    'resource_exhausted',
    (place) => `the disk of ${place} is full; nothing was changed. Free space and try again`,
  ],
  ['53', 'unavailable', (place, message) => `${place} lacks resources: ${message}`],
  [
    '57014',
    'unavailable',
    (place, message) => `${place} took longer than a statement may: ${message}; nothing was changed`,
  ],
  ['22021', 'invalid_argument', (_, message) => `the text cannot be stored: ${message}`],
  [
    '25006',
    'failed_precondition',
    (place) => `${place} is read-only, so it is a standby or set so; give the address of the primary`,
  ],
];

/** The error to answer with. `place` names host, port, database and user. */
export function refusalOf(error: unknown, place: string): MillraceError {
  if (MillraceError.is(error)) return error;
  if (error instanceof ConnectionLost) {
    return new MillraceError('unavailable', `${place} cannot be reached: ${error.message}`, { cause: error });
  }
  if (!(error instanceof SqlError)) return MillraceError.from(error);
  const found = REFUSALS.find(([state]) => error.sqlstate.startsWith(state));
  if (found) {
    const [, code, text] = found;
    return new MillraceError(code, text(place, error.message), {
      cause: error,
      ...(code === 'resource_exhausted' && { retryable: true }),
    });
  }
  if (retryOf(error) !== null) {
    return new MillraceError('unavailable', `${place}: ${error.message}`, { cause: error });
  }
  return new MillraceError('internal', `${place}: ${error.message} (SQLSTATE ${error.sqlstate})`, {
    cause: error,
  });
}
