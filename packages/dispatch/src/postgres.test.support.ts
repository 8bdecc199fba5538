/**
 * A real PostgreSQL server for tests: started from the machine's packages in a folder of its own, on a free port of the
 * loopback, and gone afterwards. Once for a test file, with a fresh database for each test.
 */
import { spawn, spawnSync } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import {
  chmodSync,
  chownSync,
  existsSync,
  mkdtempSync,
  readFileSync,
  readdirSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';
import { createInterface } from 'node:readline';
import pg from 'pg';
import { openPostgresStore } from './stores/postgres.ts';

const USER = 'millrace';
const PASSWORD = 'p@ss/word';

/** The folder of `initdb` and `postgres`, or why there is none. */
export type ServerPrograms = { readonly bin: string } | { readonly missing: string };

export function findPostgres(): ServerPrograms {
  const packaged = '/usr/lib/postgresql';
  const versions = existsSync(packaged)
    ? readdirSync(packaged)
        .toSorted((a, b) => Number(b) - Number(a))
        .map((version) => join(packaged, version, 'bin'))
    : [];
  const folders = [...(process.env['PATH'] ?? '').split(delimiter), ...versions];
  const bin = folders.find(
    (folder) => folder !== '' && existsSync(join(folder, 'initdb')) && existsSync(join(folder, 'postgres')),
  );
  if (bin !== undefined) return { bin };
  return {
    missing: `initdb and postgres are neither on PATH nor below ${packaged}; install a PostgreSQL server`,
  };
}

/**
 * True when tests must be skipped for want of a server, and then says why. On CI it is a failure instead: there, everything
 * has to run.
 */
export function withoutPostgres(): boolean {
  const found = findPostgres();
  if ('bin' in found) return false;
  if (process.env['CI']) throw new Error(found.missing);
  process.stderr.write(`tests over PostgreSQL are skipped: ${found.missing}\n`);
  return true;
}

/** The server refuses to run as root; then it runs as its own user, or as nobody. */
function serverIdentity(): { uid: number; gid: number } | null {
  if (process.getuid?.() !== 0) return null;
  const entry = (name: string) =>
    readFileSync('/etc/passwd', 'utf8')
      .split('\n')
      .find((line) => line.startsWith(`${name}:`));
  const [, , uid, gid] = (entry('postgres') ?? entry('nobody') ?? '').split(':');
  if (!uid || !gid)
    throw new Error('PostgreSQL does not run as root, and there is neither a user postgres nor nobody');
  return { uid: Number(uid), gid: Number(gid) };
}

async function freePort(): Promise<number> {
  const probe = createServer().listen(0, '127.0.0.1');
  await once(probe, 'listening');
  const address = probe.address();
  probe.close();
  await once(probe, 'close');
  if (address === null || typeof address === 'string') throw new Error('the probe listens on no port');
  return address.port;
}

export interface PostgresServerOptions {
  /** Default false: a test that does not cut the power needs no synced disk. */
  readonly fsync?: boolean;
}

export class PostgresServer implements AsyncDisposable {
  readonly port: number;
  readonly #bin: string;
  readonly #folder: string;
  readonly #identity: { uid: number; gid: number } | null;
  readonly #fsync: boolean;
  #process: ChildProcess | null = null;
  #databases = 0;
  #template: Promise<string> | null = null;

  private constructor(bin: string, folder: string, port: number, fsync: boolean) {
    this.#bin = bin;
    this.#folder = folder;
    this.port = port;
    this.#fsync = fsync;
    this.#identity = serverIdentity();
  }

  /** Makes a cluster and starts it. Well below a second with `fsync` off. */
  static async start(options: PostgresServerOptions = {}): Promise<PostgresServer> {
    const found = findPostgres();
    if ('missing' in found) throw new Error(found.missing);
    const folder = mkdtempSync(join(tmpdir(), 'millrace-pg-'));
    const server = new PostgresServer(found.bin, folder, await freePort(), options.fsync ?? false);
    try {
      server.#initialise();
      await server.start();
    } catch (error) {
      await server[Symbol.asyncDispose]();
      throw error;
    }
    return server;
  }

  /** With the password; `database` as {@link createDatabase} named it. */
  url(database: string): string {
    return `postgres://${USER}:${encodeURIComponent(PASSWORD)}@127.0.0.1:${this.port}/${database}`;
  }

  /** The password, to look for where it must not be. */
  get password(): string {
    return PASSWORD;
  }

  /** Where its socket is. */
  get socketFolder(): string {
    return this.#folder;
  }

  /** A fresh database; with our tables unless `empty`. Returns its name. */
  async createDatabase(options: { readonly empty?: boolean } = {}): Promise<string> {
    const template = options.empty ? 'template1' : await (this.#template ??= this.#makeTemplate());
    this.#databases += 1;
    const name = `test_${this.#databases}`;
    await this.query('postgres', `CREATE DATABASE ${name} TEMPLATE ${template}`);
    return name;
  }

  /** Empties our tables: a fresh database for a fraction of the time. */
  async emptyDatabase(name: string): Promise<void> {
    await this.query(
      name,
      `DO $$ DECLARE name text; BEGIN
         FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'millrace' AND tablename <> 'migrations' LOOP
           EXECUTE format('DELETE FROM millrace.%I', name);
         END LOOP;
       END $$`,
    );
  }

  async dropDatabase(name: string): Promise<void> {
    await this.query('postgres', `DROP DATABASE IF EXISTS ${name} WITH (FORCE)`);
  }

  async query<R extends pg.QueryResultRow>(
    database: string,
    text: string,
    values: unknown[] = [],
  ): Promise<R[]> {
    const client = new pg.Client({ connectionString: this.url(database) });
    client.on('error', () => {});
    await client.connect();
    try {
      return (await client.query<R>(text, values)).rows;
    } finally {
      await client.end().catch(() => {});
    }
  }

  /** Ends every other connection to the database from the server's side; how many it were. */
  async cutConnections(database: string): Promise<number> {
    const rows = await this.query(
      'postgres',
      'SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()',
      [database],
    );
    return rows.length;
  }

  /** Starts the stopped or killed server again, on the same data. */
  async start(): Promise<void> {
    // After SIGKILL the last children may hold the shared memory for a moment.
    for (let tries = 1; ; tries += 1) {
      try {
        await this.#launch();
        return;
      } catch (error) {
        if (tries === 50) throw error;
        await new Promise((resolve) => void setTimeout(resolve, 50));
      }
    }
  }

  /** SIGKILL for the server and all of its processes: no checkpoint, nothing flushed that was not synced. */
  async kill(): Promise<void> {
    const server = this.#process;
    if (server?.pid === undefined) return;
    const exited = once(server, 'exit');
    const pids = [server.pid, ...childrenOf(server.pid)];
    for (const pid of pids) signal(pid, 'SIGKILL');
    await exited;
    this.#process = null;
  }

  /** A fast, orderly shutdown. */
  async stop(): Promise<void> {
    const server = this.#process;
    if (server?.pid === undefined) return;
    const exited = once(server, 'exit');
    signal(server.pid, 'SIGINT');
    await exited;
    this.#process = null;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
    rmSync(this.#folder, { recursive: true, force: true });
  }

  async #makeTemplate(): Promise<string> {
    const name = 'template_millrace';
    await this.query('postgres', `CREATE DATABASE ${name}`);
    const store = await openPostgresStore({ url: this.url(name) });
    await store[Symbol.asyncDispose]();
    return name;
  }

  #initialise(): void {
    const passwords = join(this.#folder, 'password');
    writeFileSync(passwords, PASSWORD);
    if (this.#identity) {
      const { uid, gid } = this.#identity;
      chmodSync(this.#folder, 0o700);
      for (const path of [this.#folder, passwords]) chownSync(path, uid, gid);
    }
    const args = [
      '-D',
      join(this.#folder, 'data'),
      '-U',
      USER,
      '--pwfile',
      passwords,
      '--auth=scram-sha-256',
    ];
    const made = spawnSync(
      join(this.#bin, 'initdb'),
      [...args, '--encoding=UTF8', '--locale=C', '--no-sync'],
      {
        cwd: this.#folder,
        ...this.#identity,
        encoding: 'utf8',
      },
    );
    if (made.status !== 0) throw new Error(`initdb failed: ${made.error?.message ?? made.stderr}`);
  }

  async #launch(): Promise<void> {
    const settings = {
      listen_addresses: '127.0.0.1',
      port: this.port,
      unix_socket_directories: this.#folder,
      fsync: this.#fsync ? 'on' : 'off',
      full_page_writes: this.#fsync ? 'on' : 'off',
      max_connections: 120,
      shared_buffers: '64MB',
      max_wal_size: '256MB',
    };
    const child = spawn(
      join(this.#bin, 'postgres'),
      [
        '-D',
        join(this.#folder, 'data'),
        ...Object.entries(settings).flatMap(([name, value]) => ['-c', `${name}=${value}`]),
      ],
      { cwd: this.#folder, ...this.#identity, stdio: ['ignore', 'ignore', 'pipe'] },
    );
    const said: string[] = [];
    const ready = new Promise<void>((resolve, reject) => {
      createInterface({ input: child.stderr }).on('line', (line) => {
        if (said.length < 100) said.push(line);
        if (line.includes('ready to accept connections')) resolve();
      });
      child.once('error', reject);
      child.once('exit', (code) => reject(new Error(`postgres ended with ${code}: ${said.join('\n')}`)));
    });
    await ready;
    this.#process = child;
  }
}

/**
 * Counts everything again and compares it with what the store keeps as counts: of each job its tasks by state and its events,
 * and the sums over all. What differs, a line each.
 */
export async function miscounts(server: PostgresServer, database: string): Promise<string[]> {
  const rows = await server.query<{ line: string }>(
    database,
    `WITH counted AS (
       SELECT j.seq, count(*) FILTER (WHERE state IN ('blocked', 'delayed', 'ready')) AS queued,
         count(*) FILTER (WHERE state = 'leased') AS leased, count(*) FILTER (WHERE state = 'running') AS running,
         count(*) FILTER (WHERE state = 'completed') AS completed, count(*) FILTER (WHERE state = 'failed') AS failed,
         count(*) FILTER (WHERE state = 'canceled') AS canceled, count(*) AS tasks
       FROM millrace.jobs j LEFT JOIN (
         SELECT job_seq, state FROM millrace.open_tasks
         UNION ALL SELECT job_seq, 'ready' FROM millrace.fresh, generate_series(first_no, last_no)
         UNION ALL SELECT job_seq, state FROM millrace.ended_runs, generate_series(first_no, last_no)) t
         ON t.job_seq = j.seq
       GROUP BY j.seq)
     SELECT 'tasks of job ' || j.id AS line FROM millrace.jobs j JOIN counted c USING (seq)
     WHERE (j.queued, j.leased, j.running, j.completed, j.failed, j.canceled, j.task_count)
       <> (c.queued, c.leased, c.running, c.completed, c.failed, c.canceled, c.tasks)
     UNION ALL
     SELECT 'events of job ' || j.id FROM millrace.jobs j
     WHERE j.last_event <> (SELECT coalesce(sum(count), 0) FROM millrace.events e WHERE e.job_seq = j.seq)
     UNION ALL
     SELECT 'sum of ' || kept.name || ' tasks: ' || kept.sum || ' for ' || counted.sum FROM (
       SELECT u.* FROM (SELECT sum(queued) q, sum(leased) l, sum(running) r, sum(completed) c, sum(failed) f, sum(canceled) x
         FROM millrace.writers) w
       CROSS JOIN LATERAL (VALUES ('queued', q), ('leased', l), ('running', r), ('completed', c), ('failed', f),
         ('canceled', x)) AS u (name, sum)) kept
     JOIN (
       SELECT u.* FROM (SELECT sum(queued) q, sum(leased) l, sum(running) r, sum(completed) c, sum(failed) f, sum(canceled) x
         FROM millrace.jobs) j
       CROSS JOIN LATERAL (VALUES ('queued', q), ('leased', l), ('running', r), ('completed', c), ('failed', f),
         ('canceled', x)) AS u (name, sum)) counted USING (name)
     WHERE coalesce(kept.sum, 0) <> coalesce(counted.sum, 0)
     UNION ALL
     SELECT 'sum of pending jobs' WHERE (SELECT coalesce(sum(jobs_pending), 0) FROM millrace.writers)
       <> (SELECT count(*) FROM millrace.jobs WHERE status = 'pending')
     UNION ALL
     SELECT 'sum of completed jobs' WHERE (SELECT coalesce(sum(jobs_completed), 0) FROM millrace.writers)
       <> (SELECT count(*) FROM millrace.jobs WHERE status = 'completed')`,
  );
  return rows.map(({ line }) => line);
}

function signal(pid: number, name: NodeJS.Signals): void {
  try {
    process.kill(pid, name);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

function childrenOf(parent: number): number[] {
  return readdirSync('/proc')
    .map(Number)
    .filter((pid) => {
      if (!Number.isSafeInteger(pid)) return false;
      try {
        // pid (command) state ppid …; the command may hold anything, so count from its end.
        const text = readFileSync(`/proc/${pid}/stat`, 'utf8');
        return Number(text.slice(text.lastIndexOf(')') + 2).split(' ')[1]) === parent;
      } catch {
        return false;
      }
    });
}
