/**
 * The servers the peers need, started from the machine's packages on free ports of the loopback, in temporary folders, and gone
 * afterwards. A program that is missing is a reason to print, not an error.
 */
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { createInterface } from 'node:readline';
import type * as Support from '../../../packages/dispatch/src/postgres.test.support.ts';

/** Starts the server as the tests do. Not part of the package, so reached by its place. */
const SUPPORT = new URL('../../../packages/dispatch/dist/postgres.test.support.js', import.meta.url);

/** `always` syncs before it answers, as we do; `everysec` is what Redis does with its log by default and may lose a second. */
type RedisSync = 'always' | 'everysec';

/** Several measurements share a server at the same time, so each gets a number of its own and nothing is flushed. */
const MAX_DATABASES = 1000;

export interface Server extends AsyncDisposable {
  /** Null where it is many processes. */
  readonly pid: number | null;
  /** What it is, with version and durability. */
  readonly title: string;
  /** The URL of an empty database, which nobody else was or will be given. */
  fresh(): Promise<string>;
}

export interface RedisServer extends Server {
  readonly url: string;
  readonly pid: number;
}

/** A server, or why there is none. */
type Started<S extends Server> = { readonly server: S } | { readonly missing: string };

async function startRedis(sync: RedisSync): Promise<Started<RedisServer>> {
  const probe = spawnSync('redis-server', ['--version'], { encoding: 'utf8' });
  if (probe.error) return { missing: 'redis-server is not on PATH (Debian: apt-get install redis-server)' };
  const version = /v=(\S+)/.exec(probe.stdout)?.[1] ?? 'of unknown version';
  const folder = mkdtempSync(path.join(tmpdir(), 'millrace-bench-redis-'));
  const port = await freePort();
  const settings = {
    port,
    bind: '127.0.0.1',
    dir: folder,
    appendonly: 'yes',
    appendfsync: sync,
    save: '',
    databases: MAX_DATABASES,
  };
  const child = spawn(
    'redis-server',
    Object.entries(settings).flatMap(([name, value]) => [`--${name}`, String(value)]),
    { stdio: ['ignore', 'pipe', 'ignore'] },
  );
  // Should the bench fall over, it leaves nothing behind.
  const abandon = (): void => void child.kill('SIGKILL');
  process.once('exit', abandon);
  const said: string[] = [];
  await new Promise<void>((resolve, reject) => {
    createInterface({ input: child.stdout }).on('line', (line) => {
      if (said.length < 50) said.push(line);
      if (line.includes('Ready to accept connections')) resolve();
    });
    child.once('error', reject);
    child.once('exit', (code) => reject(new Error(`redis-server ended with ${code}: ${said.join('\n')}`)));
  });
  const url = `redis://127.0.0.1:${port}`;
  let databases = 0;
  return {
    server: {
      title: `Redis ${version}, appendfsync ${sync}`,
      url,
      pid: child.pid ?? 0,
      async fresh() {
        databases += 1;
        return `${url}/${databases}`;
      },
      async [Symbol.asyncDispose]() {
        process.off('exit', abandon);
        if (child.exitCode === null && child.signalCode === null) {
          const exited = once(child, 'exit');
          child.kill('SIGKILL');
          await exited;
        }
        rmSync(folder, { recursive: true, force: true });
      },
    },
  };
}

/** With `fsync` and `synchronous_commit` on. */
async function startPostgres(): Promise<Started<Server>> {
  const { PostgresServer, findPostgres } = (await import(SUPPORT.href)) as typeof Support;
  const found = findPostgres();
  if ('missing' in found) return found;
  const server = await PostgresServer.start({ fsync: true });
  const [row] = await server.query<{ version: string; commit: string }>(
    'postgres',
    "SELECT current_setting('server_version') AS version, current_setting('synchronous_commit') AS commit",
  );
  return {
    server: {
      pid: null,
      title: `PostgreSQL ${row?.version.split(' ')[0]}, fsync on, synchronous_commit ${row?.commit}`,
      fresh: async () => server.url(await server.createDatabase({ empty: true })),
      [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
    },
  };
}

/** Those that can be started; why not the others. */
export async function startServers(): Promise<
  AsyncDisposable & {
    readonly redis: readonly RedisServer[];
    readonly postgres: readonly Server[];
    readonly missing: readonly string[];
  }
> {
  const redis: RedisServer[] = [];
  const postgres: Server[] = [];
  const missing = new Set<string>();
  const dispose = async (): Promise<void> => {
    await Promise.all([...redis, ...postgres].map((server) => server[Symbol.asyncDispose]()));
  };
  try {
    for (const sync of ['always', 'everysec'] as const) {
      const started = await startRedis(sync);
      if ('server' in started) redis.push(started.server);
      else missing.add(`without the peers on Redis: ${started.missing}`);
    }
    const started = await startPostgres();
    if ('server' in started) postgres.push(started.server);
    else missing.add(`without the peers on PostgreSQL: ${started.missing}`);
  } catch (error) {
    await dispose();
    throw error;
  }
  return { redis, postgres, missing: [...missing], [Symbol.asyncDispose]: dispose };
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
