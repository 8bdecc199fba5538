/**
 * PostgreSQL as the store needs it: pools, named statements, transactions that are run again when the server or the network asks
 * for it, and errors in our codes. The only file that knows the driver's clients.
 *
 * **A commit whose answer was lost.** Every transaction that writes leaves its serial in the row of its writer (`writers`; a
 * writer serves one transaction at a time). When the connection breaks while COMMIT is under way, the next connection raises
 * that serial by one unless it is there already: whichever came first is in the row, and the other one is refused by the
 * table's check. So it is known whether the change was made, even when the server crashed or the old session still works
 * on what it was sent, and a transaction is never run twice.
 */
import { randomUUID } from 'node:crypto';
import type { Socket } from 'node:net';
import { MillraceError, sleep, systemClock } from '@millrace/runner';
import type { Clock, Logger } from '@millrace/runner';
import pg from 'pg';
import type { JobStatus, TaskStatus } from '../records.ts';
import { JOB_STATUSES, TASK_STATUSES } from '../records.ts';
import { fromDriver, refusalOf, retryOf } from './postgres-errors.ts';
import type { ConnectionLost, SqlError } from './postgres-errors.ts';

/** What a statement can be given. Arrays become arrays of the statement's type. */
export type Value =
  string | number | boolean | null | Uint8Array | readonly (string | number | null | Uint8Array)[];

/** A statement, prepared once for each connection. */
export interface Statement {
  readonly name: string;
  readonly text: string;
}

/** An array as the server reads it. */
export function arrayText(values: readonly (string | number | null)[]): string {
  let text = '{';
  for (const [index, value] of values.entries()) {
    if (index > 0) text += ',';
    if (value === null) text += 'NULL';
    else if (typeof value === 'number') text += value;
    else text += SPECIAL.test(value) ? `"${value.replace(SPECIALS, '\\$&')}"` : `"${value}"`;
  }
  return `${text}}`;
}

const SPECIAL = /["\\]/;
const SPECIALS = /["\\]/g;

/** As the driver sends it. It can do this itself, at several times the price for arrays. */
function encoded(values: readonly Value[]): unknown[] {
  return values.map((value) => (Array.isArray(value) && isPlain(value) ? arrayText(value) : value));
}

function isPlain(values: readonly unknown[]): values is (string | number | null)[] {
  return !(values[0] instanceof Uint8Array);
}

let statements = 0;

/** Names a statement for the life of the process. */
export function sql(text: string): Statement {
  statements += 1;
  return { name: `millrace_${statements}`, text };
}

export interface Address {
  readonly config: pg.ClientConfig;
  /** For people and error texts: never with a password. */
  readonly place: string;
  /** Settings of every session, beside our own. */
  readonly session: readonly string[];
}

export interface DatabaseOptions {
  readonly address: Address;
  readonly connections: number;
  readonly patienceMs: number;
  /** Takes the place of the database's clock. */
  readonly clock: Clock | null;
  readonly log: Logger | undefined;
}

/** Which of the connections a transaction uses: the lanes have their own, so that nothing keeps work waiting. */
export type Use = 'lane' | 'call';

/** Connections that are spoken for: one for each lane, and the one that listens. */
export const LANES = 4;
export const MIN_CONNECTIONS = LANES + 2;

/** PostgreSQL's number of its type bigint. */
const INT8 = 20;

const CONNECT_TIMEOUT_MS = 10_000;
/** Of the server's: nothing here takes this long on a database that works. */
const STATEMENT_TIMEOUT_MS = 30_000;
const LOCK_TIMEOUT_MS = 5_000;
const IDLE_TRANSACTION_TIMEOUT_MS = 60_000;
/** Ours, for a server or network that answers nothing at all. */
const SILENCE_MS = STATEMENT_TIMEOUT_MS + 15_000;
const GOODBYE_MS = 3_000;
const IDLE_CLIENT_MS = 10 * 60_000;

const MAX_AGAIN_DELAY_MS = 200;
const MAX_RECONNECT_DELAY_MS = 1_000;

/**
 * Sequential scans and joins over whole tables are never right for what is asked here, but they look right to the planner
 * while statistics say that a table is empty, and a prepared statement would keep such a plan. Compiling pays for
 * statements far longer than ours.
 */
const SESSION = [
  'search_path=millrace',
  'enable_seqscan=off',
  'enable_hashjoin=off',
  'enable_mergejoin=off',
  'jit=off',
];

export function clientConfig(address: Address): pg.ClientConfig {
  const { config } = address;
  return {
    ...config,
    application_name: config.application_name ?? 'millrace',
    options: [...SESSION, ...address.session].map((setting) => `-c ${setting}`).join(' '),
    connectionTimeoutMillis: CONNECT_TIMEOUT_MS,
    statement_timeout: STATEMENT_TIMEOUT_MS,
    lock_timeout: LOCK_TIMEOUT_MS,
    idle_in_transaction_session_timeout: IDLE_TRANSACTION_TIMEOUT_MS,
    keepAlive: true,
    pipeline: true,
    types: {
      // Counts, times and sizes all stay below 2^53.
      getTypeParser: (oid: number, format?: 'text' | 'binary') =>
        oid === INT8 ? Number : pg.types.getTypeParser(oid, format),
    },
  };
}

/**
 * @throws MillraceError `invalid_argument` when it is not a PostgreSQL URL. The message does not repeat it.
 */
export function parseAddress(url: string): Address {
  const parsed = parsedUrl(url);
  if (!/^postgres(?:ql)?:$/.test(parsed.protocol)) {
    throw new MillraceError(
      'invalid_argument',
      `the store must be postgres://…, got a URL with ${JSON.stringify(parsed.protocol)}`,
    );
  }
  if (parsed.searchParams.has('options')) {
    throw new MillraceError(
      'invalid_argument',
      'the URL of the store has the parameter options, which the dispatcher sets itself; set what you need for the user: ALTER ROLE … SET …',
    );
  }
  let parameters: pg.Client;
  try {
    parameters = new pg.Client({ connectionString: url });
  } catch (error) {
    const message = error instanceof Error ? error.message : 'it cannot be read';
    throw new MillraceError(
      'invalid_argument',
      `the URL of the store is wrong: ${message.replaceAll(url, '…')}`,
    );
  }
  const { host, port, database = '', user = '' } = parameters;
  // Left out, libpq and the driver take the user's name; a database named by accident is better not filled with tables.
  if (parsed.pathname.length <= 1 && !process.env['PGDATABASE']) {
    throw new MillraceError(
      'invalid_argument',
      'the URL of the store names no database: postgres://HOST/DATABASE',
    );
  }
  const at = host.startsWith('/') ? host : `${host}:${port}`;
  return {
    config: { connectionString: url },
    place: `PostgreSQL database ${JSON.stringify(database)} at ${at} (user ${user})`,
    session: [],
  };
}

function parsedUrl(url: string): URL {
  // Without a host, which then is a parameter: a URL for everybody but the platform.
  for (const text of [url, url.replace('@/', '@socket/').replace(/^(postgres(?:ql)?:\/\/)\//, '$1socket/')]) {
    if (URL.canParse(text)) return new URL(text);
  }
  // No cause: the platform's error carries the text, and that may hold a password.
  throw new MillraceError(
    'invalid_argument',
    'the store must be postgres://USER:PASSWORD@HOST:PORT/DATABASE; what was given is no URL (is a special character of the password not percent-encoded?)',
  );
}

/** Waits for connections to be closed properly, but not for a server that does not answer any more. */
export async function goodbye(closing: Promise<unknown>): Promise<void> {
  const closed = new AbortController();
  const patience = sleep(systemClock, GOODBYE_MS, closed.signal).catch(() => {});
  await Promise.race([closing.catch(() => {}), patience]);
  closed.abort();
}

/** The driver's types keep it to themselves. */
function streamOf(client: pg.ClientBase): Socket {
  return (client as unknown as { readonly connection: { readonly stream: Socket } }).connection.stream;
}

const gathering = new WeakSet<Socket>();

/** Sends what is asked for in this turn of the event loop in one go: a write is a call of the system and wakes the server. */
function gather(client: pg.ClientBase): void {
  const stream = streamOf(client);
  if (gathering.has(stream)) return;
  gathering.add(stream);
  stream.cork();
  process.nextTick(() => {
    gathering.delete(stream);
    stream.uncork();
  });
}

/** What a transaction did to the counts that `stats` tells. */
export class Totals {
  readonly tasks = Object.fromEntries(TASK_STATUSES.map((status) => [status, 0])) as Record<
    TaskStatus,
    number
  >;
  readonly jobs = Object.fromEntries(JOB_STATUSES.map((status) => [status, 0])) as Record<JobStatus, number>;

  /** In the order of {@link TOTAL_COLUMNS}. */
  get values(): number[] {
    return [
      ...TASK_STATUSES.map((status) => this.tasks[status]),
      ...JOB_STATUSES.map((status) => this.jobs[status]),
    ];
  }
}

export const TOTAL_COLUMNS = [...TASK_STATUSES, ...JOB_STATUSES.map((status) => `jobs_${status}`)];

const MARK = sql(`
  INSERT INTO writers AS w (id, serial, at, ${TOTAL_COLUMNS.join(', ')})
  VALUES ($1, $2, millis($3), ${TOTAL_COLUMNS.map((_, index) => `$${index + 4}`).join(', ')})
  ON CONFLICT (id) DO UPDATE SET
    serial = CASE WHEN w.serial < excluded.serial THEN excluded.serial ELSE -1 END, at = excluded.at,
    ${TOTAL_COLUMNS.map((column) => `${column} = w.${column} + excluded.${column}`).join(', ')}`);

const VERIFY = sql(`
  INSERT INTO writers AS w (id, serial, at) VALUES ($1, $2::bigint + 1, millis($3))
  ON CONFLICT (id) DO UPDATE SET serial = CASE WHEN w.serial < $2 THEN $2 + 1 ELSE w.serial END
  RETURNING serial`);

interface Writer {
  readonly id: string;
  /** Of its last transaction; the next is two higher, so that there is room to refuse it. */
  serial: number;
}

/** The transaction under way. Statements are sent without waiting for each other's answers. */
export class Transaction {
  /** What is added to the counts at its commit. */
  readonly totals = new Totals();
  readonly #client: pg.PoolClient;
  readonly #clock: Clock | null;
  readonly #began: Promise<void>;
  readonly #sent: Promise<unknown>[] = [];
  #failure: SqlError | ConnectionLost | null = null;
  #now: number;
  #wrote = false;

  constructor(client: pg.PoolClient, clock: Clock | null) {
    this.#client = client;
    this.#clock = clock;
    this.#now = clock?.now() ?? 0;
    this.#began = this.#query(
      'BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SELECT millis(NULL) AS now',
    ).then((result) => {
      // Two statements in one text: the driver's types do not know that this gives two results.
      const [, answer] = result as unknown as readonly [pg.QueryResult, pg.QueryResult<{ now: number }>];
      if (clock === null) this.#now = answer.rows[0]?.now ?? 0;
    });
    this.#began.catch(() => {});
  }

  /** The time by which this transaction judges, epoch ms. Known once something was answered. */
  get now(): number {
    return this.#now;
  }

  /** For `millis(…)` in statements: null, or the clock that takes the place of the database's. */
  get given(): number | null {
    return this.#clock?.now() ?? null;
  }

  get wrote(): boolean {
    return this.#wrote;
  }

  async rows<R>(statement: Statement, values: readonly Value[]): Promise<R[]> {
    const result = await this.#query({ ...statement, values: encoded(values) });
    await this.#began;
    return result.rows as R[];
  }

  /** A change, and how many rows it changed. */
  async count(statement: Statement, values: readonly Value[]): Promise<number> {
    this.#wrote = true;
    return (await this.#query({ ...statement, values: encoded(values) })).rowCount ?? 0;
  }

  /** A change that answers with rows. */
  change<R>(statement: Statement, values: readonly Value[]): Promise<R[]> {
    this.#wrote = true;
    return this.rows<R>(statement, values);
  }

  /** A change whose answer nobody needs. If it fails, the commit does. */
  send(statement: Statement, values: readonly Value[]): void {
    this.#wrote = true;
    const sent = this.#query({ ...statement, values: encoded(values) });
    sent.catch(() => {});
    this.#sent.push(sent);
  }

  /** Sends the last changes and COMMIT in one go. Null: nothing was written, there is nothing to prove. */
  async commit(writer: Writer | null): Promise<void> {
    if (writer !== null) {
      this.send(MARK, [writer.id, writer.serial, this.given, ...this.totals.values]);
    }
    const committed = this.#query('COMMIT');
    committed.catch(() => {});
    await Promise.all(this.#sent);
    const { command } = await committed;
    // A statement that failed and whose error somebody swallowed: the server says ROLLBACK.
    if (command !== 'COMMIT')
      throw this.#failure ?? new MillraceError('internal', `COMMIT was answered ${command}`);
  }

  async #query(query: string | pg.QueryConfig): Promise<pg.QueryResult> {
    try {
      gather(this.#client);
      return await this.#client.query(query);
    } catch (error) {
      // Statements after the first that failed only say that the transaction is over.
      this.#failure ??= fromDriver(error);
      throw this.#failure;
    }
  }
}

export class Database {
  readonly place: string;
  readonly #options: DatabaseOptions;
  readonly #pools: Readonly<Record<Use, pg.Pool>>;
  readonly #writers: Writer[] = [];

  constructor(options: DatabaseOptions) {
    this.#options = options;
    this.place = options.address.place;
    const pool = (max: number): pg.Pool => {
      const made = new pg.Pool({
        ...clientConfig(options.address),
        max,
        idleTimeoutMillis: IDLE_CLIENT_MS,
      });
      // Without listeners an idle connection that loses its server would end the process. Who uses a client hears of it
      // from the query.
      made.on('error', (error) => options.log?.warn('database connection lost', { error: error.message }));
      const busy = new WeakSet<pg.ClientBase>();
      made.on('acquire', (client) => void busy.add(client));
      made.on('release', (_, client) => void busy.delete(client));
      made.on('connect', (client) => {
        client.on('error', () => {});
        // The driver has a limit for each statement, at the price of a timer for each.
        const stream = streamOf(client);
        stream.setTimeout(SILENCE_MS, () => {
          if (busy.has(client)) stream.destroy(new Error(`the server said nothing for ${SILENCE_MS} ms`));
        });
      });
      return made;
    };
    this.#pools = { lane: pool(LANES), call: pool(options.connections - LANES - 1) };
  }

  /** For `millrace.millis(…)` outside of transactions. */
  get given(): number | null {
    return this.#options.clock?.now() ?? null;
  }

  /** Reads the committed state. */
  async rows<R>(statement: Statement, values: readonly Value[]): Promise<R[]> {
    return await this.#persist(async () => {
      const client = await this.#connect('call');
      return await this.#use(client, async () => (await this.#query(client, statement, values)).rows as R[]);
    });
  }

  /** Reads several things, each as of its own moment; the questions are sent together. */
  async several<T>(
    read: (ask: <R>(statement: Statement, values: readonly Value[]) => Promise<R[]>) => Promise<T>,
  ): Promise<T> {
    return await this.#persist(async () => {
      const client = await this.#connect('call');
      return await this.#use(client, () =>
        read(async <R>(statement: Statement, values: readonly Value[]) => {
          return (await this.#query(client, statement, values)).rows as R[];
        }),
      );
    });
  }

  /** Reads several things as of one moment; the questions are sent together. */
  async snapshot<T>(
    read: (ask: <R>(statement: Statement, values: readonly Value[]) => Promise<R[]>) => Promise<T>,
  ): Promise<T> {
    return await this.#persist(async () => {
      const client = await this.#connect('call');
      return await this.#use(client, async () => {
        const begun = this.#text(client, 'BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY');
        begun.catch(() => {});
        try {
          const answer = await read(async <R>(statement: Statement, values: readonly Value[]) => {
            const asked = this.#query(client, statement, values);
            return (await asked).rows as R[];
          });
          await begun;
          return answer;
        } finally {
          await this.#text(client, 'COMMIT');
        }
      });
    });
  }

  /**
   * Runs `work` in a transaction and resolves with what it returned once that is committed. Runs it again from the start when
   * the server or the network asks for it; what it keeps outside must survive that.
   */
  async transaction<T>(use: Use, work: (transaction: Transaction) => Promise<T>): Promise<T> {
    return await this.#persist(() => this.#once(use, work));
  }

  async close(): Promise<void> {
    await goodbye(Promise.all([this.#pools.lane.end(), this.#pools.call.end()]));
  }

  async #once<T>(use: Use, work: (transaction: Transaction) => Promise<T>): Promise<T> {
    const client = await this.#connect(use);
    const transaction = new Transaction(client, this.#options.clock);
    let result: T;
    try {
      result = await work(transaction);
    } catch (error) {
      await this.#abandon(client, error);
      throw error;
    }
    const writer = transaction.wrote ? (this.#writers.pop() ?? { id: randomUUID(), serial: -1 }) : null;
    if (writer) writer.serial += 2;
    try {
      await transaction.commit(writer);
    } catch (error) {
      const answered = await this.#abandon(client, error);
      if (!writer) throw error;
      // Should this fail, the writer is given up with the transaction, which may still be committed.
      const committed = !answered && (await this.#wasCommitted(writer));
      this.#writers.push(writer);
      if (!committed) throw error;
      return result;
    }
    client.release();
    if (writer) this.#writers.push(writer);
    return result;
  }

  /** Gives the client back after a failure; false: its connection is over, and with it the server's last word. */
  async #abandon(client: pg.PoolClient, error: unknown): Promise<boolean> {
    if (retryOf(error) !== 'reconnect') {
      try {
        await this.#text(client, 'ROLLBACK');
        client.release();
        return true;
      } catch {
        // Nor can it be used for anything else.
      }
    }
    client.release(true);
    return false;
  }

  async #wasCommitted({ id, serial }: Writer): Promise<boolean> {
    try {
      const [row] = await this.rows<{ serial: number }>(VERIFY, [id, serial, this.given]);
      return row?.serial === serial;
    } catch (error) {
      throw new MillraceError(
        'unavailable',
        `${this.place} was lost while it committed and did not come back; whether the change was made is not known`,
        { cause: error },
      );
    }
  }

  async #use<T>(client: pg.PoolClient, work: () => Promise<T>): Promise<T> {
    try {
      const answer = await work();
      client.release();
      return answer;
    } catch (error) {
      client.release(retryOf(error) === 'reconnect');
      throw error;
    }
  }

  async #connect(use: Use): Promise<pg.PoolClient> {
    try {
      return await this.#pools[use].connect();
    } catch (error) {
      throw fromDriver(error);
    }
  }

  async #query(
    client: pg.PoolClient,
    statement: Statement,
    values: readonly Value[],
  ): Promise<pg.QueryResult> {
    try {
      gather(client);
      return await client.query({ ...statement, values: encoded(values) });
    } catch (error) {
      throw fromDriver(error);
    }
  }

  async #text(client: pg.PoolClient, text: string): Promise<pg.QueryResult> {
    try {
      gather(client);
      return await client.query(text);
    } catch (error) {
      throw fromDriver(error);
    }
  }

  async #persist<T>(attempt: () => Promise<T>): Promise<T> {
    const deadline = systemClock.monotonic() + this.#options.patienceMs;
    for (let tries = 1; ; tries += 1) {
      try {
        return await attempt();
      } catch (error) {
        const retry = retryOf(error);
        if (retry === null || systemClock.monotonic() >= deadline) throw refusalOf(error, this.place);
        const capMs = retry === 'again' ? MAX_AGAIN_DELAY_MS : MAX_RECONNECT_DELAY_MS;
        await sleep(systemClock, Math.random() * Math.min(capMs, 10 * 2 ** Math.min(tries, 10)));
      }
    }
  }
}
