/**
 * W1 beside the peers: durable no-op tasks per second, everything between adding the first and the server having stored the
 * last ending. All of a measurement's jobs are added first, then a worker starts. The peers' producer and worker share this
 * process, their server is one of its own; their handlers run in this thread.
 *
 * Ours in three forms: the store in process (what those libraries are to their database), the dispatcher over HTTP with batches
 * from a bare client, and a whole node that runs each task as an attempt of its own: lease, heartbeat, ports, report.
 */
import { rm } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { openThreadRunner } from '@millrace/exec';
import { createLogger, createNode, parseNodeEnv } from '@millrace/node';
import { defineRunner, type Runner } from '@millrace/runner';
import {
  addNode,
  ms,
  startDispatcher,
  syncMs,
  times,
  type BenchDispatcher,
  type Figure,
} from './fixtures.ts';
import { throughHttp } from './http-throughput.ts';
import {
  PEER_NAMES,
  loadPeer,
  peerVersion,
  type Peer,
  type PeerName,
  type PeerSettings,
} from './peers/peer.ts';
import { startServers, type Server } from './peers/servers.ts';
import { throughStores } from './postgres.ts';
import { inFolder, median, throughStore } from './store-throughput.ts';

const NOOP = fileURLToPath(new URL('./runners/noop.js', import.meta.url));
const CAPABILITY = '/bench/nothing/v1';
const ROUNDS = 3;
/** Between rounds, so that one is not the other's warm disk, and whoever else is on the machine gets on. */
const PAUSE_MS = 5_000;
const BATCH = 256;
const NODE_CONCURRENCY = 32;
const POLL_MS = 10;

/** Jobs of one measurement: enough for a second or so. pg-boss by default takes one in two seconds. */
const JOBS: Readonly<Record<PeerSettings, Readonly<Record<PeerName, number>>>> = {
  default: { bullmq: 100, 'bee-queue': 100, 'graphile-worker': 100, 'pg-boss': 3 },
  tuned: { bullmq: 2_048, 'bee-queue': 2_048, 'graphile-worker': 2_048, 'pg-boss': 2_048 },
};
const OURS = { sqlite: 25_600, postgres: 12_800, http: 12_800, nodeDefault: 100, nodeTuned: 512 } as const;

/** A row: what is measured each round, and the rates so far. */
interface Row {
  readonly label: string;
  readonly server: 'ours' | 'redis' | 'postgres';
  readonly rates: number[];
  measure(): Promise<number>;
}

export async function peerThroughput(): Promise<Figure> {
  await using started = await startServers();
  const { redis, postgres, missing } = started;
  const sqlite = row('Millrace, SQLite store in process', 'ours', () =>
    inFolder((folder) => throughStore(path.join(folder, 'store.db'), OURS.sqlite, BATCH, BATCH)),
  );
  const stores = postgres.map((server) =>
    row('Millrace, PostgreSQL store in process', 'ours', async () =>
      throughStores(await server.fresh(), OURS.postgres, BATCH, BATCH, 1),
    ),
  );
  const http = row('Millrace over HTTP, batches', 'ours', async () => {
    await using dispatcher = await startDispatcher();
    return (await throughHttp(dispatcher, OURS.http)).tasksPerSec;
  });
  const whole = row(`Millrace, a whole node, ${NODE_CONCURRENCY} at once`, 'ours', () =>
    throughNode(OURS.nodeTuned, NODE_CONCURRENCY, async () => ({
      ...defineRunner({ capability: CAPABILITY, async run() {} }),
      async [Symbol.asyncDispose]() {},
    })),
  );
  const wholeDefault = row('Millrace, a whole node, defaults, a thread', 'ours', () =>
    throughNode(OURS.nodeDefault, 1, () => openThreadRunner({ module: NOOP })),
  );
  const rows: Row[] = [sqlite, ...stores, http, whole, wholeDefault];
  const notes: string[] = [...missing];
  for (const name of PEER_NAMES) {
    const peer = await loadPeer(name);
    notes.push(`${peerVersion(name)}; defaults: ${peer.settings.default}; advised: ${peer.settings.tuned}`);
    for (const server of peer.server === 'redis' ? redis : postgres) {
      for (const settings of ['tuned', 'default'] as const) {
        rows.push(
          row(
            `${name}, ${settings === 'tuned' ? 'advised' : 'defaults'}, ${shortTitle(server)}`,
            peer.server,
            async () => throughPeer(peer, await server.fresh(), settings, JOBS[settings][name]),
          ),
        );
      }
    }
  }
  const syncs: number[] = [];
  for (let round = 0; round < ROUNDS; round += 1) {
    syncs.push(await syncMs());
    if (round > 0) await new Promise((resolve) => void setTimeout(resolve, PAUSE_MS));
    for (const one of rows) one.rates.push(await one.measure());
  }
  const rate = (one: Row): number => median(one.rates);
  /** Of the rounds' own ratios: both sides of a round met the same noise. */
  const over = (ours: Row, other: Row): string =>
    times(median(ours.rates.map((value, round) => value / (other.rates[round] ?? Number.NaN))), 1);
  const title = (one: Row): string =>
    `${one.label.padEnd(58)}${Math.round(rate(one)).toLocaleString('en-US').padStart(9)}/s`;
  return {
    title: `W1 beside the peers: durable no-op tasks per second, median of ${ROUNDS}, synced before answered unless everysec`,
    lines: [
      ...rows.filter(({ server }) => server === 'ours').map(title),
      ...rows
        .filter(({ server }) => server !== 'ours')
        .map((one) => {
          const store = one.server === 'postgres' ? (stores[0] ?? sqlite) : sqlite;
          return `${title(one)}   ours is: store ${over(store, one)}, HTTP ${over(http, one)}, whole node ${over(
            one.label.includes('defaults') ? wholeDefault : whole,
            one,
          )}`;
        }),
      ...[...redis, ...postgres].map(({ title: server }) => server),
      `one KiB written and synced on this disk: ${ms(median(syncs))}`,
      ...notes,
    ],
  };
}

function row(label: string, server: Row['server'], measure: () => Promise<number>): Row {
  return { label, server, rates: [], measure };
}

function shortTitle(server: Server): string {
  return server.title.startsWith('Redis')
    ? server.title.replace(/^Redis \S+, appendfsync /, 'Redis ')
    : 'PostgreSQL';
}

async function throughPeer(peer: Peer, url: string, settings: PeerSettings, jobs: number): Promise<number> {
  await using queue = await peer.open(url, settings);
  const payloads = Array.from({ length: jobs }, (_, index) => ({ index }));
  const start = performance.now();
  await queue.add(payloads);
  await queue.work(() => '');
  await queue.completed(jobs);
  return (jobs / (performance.now() - start)) * 1000;
}

async function throughNode(
  tasks: number,
  concurrency: number,
  openRunner: () => Promise<Runner & AsyncDisposable>,
): Promise<number> {
  await using dispatcher = await startDispatcher();
  await using runner = await openRunner();
  await using node = await startedNode(dispatcher, runner, concurrency);
  await finishJob(dispatcher, 20);
  const start = performance.now();
  await finishJob(dispatcher, tasks);
  const perSec = (tasks / (performance.now() - start)) * 1000;
  node.stop();
  return perSec;
}

/** The peers count in their worker; asking for the newest job now and then costs ours no more than that. */
async function finishJob({ client }: BenchDispatcher, tasks: number): Promise<void> {
  const jobId = await client.submit({
    tasks: Array.from({ length: tasks }, (_, index) => ({ capability: CAPABILITY, stage: `noop-${index}` })),
  });
  for (;;) {
    const { items } = await client.jobs({ limit: 1 });
    const [newest] = items;
    if (newest?.job.id !== jobId) throw new Error('another job is newer');
    if (newest.job.status === 'completed') return;
    if (newest.job.status !== 'pending' && newest.job.status !== 'running') {
      throw new Error(`the job of ${tasks} tasks is ${newest.job.status}`);
    }
    await new Promise((resolve) => void setTimeout(resolve, POLL_MS));
  }
}

/** A node in this process that runs until it is disposed. */
export async function startedNode(
  dispatcher: BenchDispatcher,
  runner: Runner,
  concurrency: number,
): Promise<AsyncDisposable & { stop(): void }> {
  const credentials = await addNode(dispatcher.client, 'bench');
  const workDir = path.join(dispatcher.dataDir, 'work');
  const node = createNode({
    config: parseNodeEnv({
      DDS_BASE_URL: dispatcher.url,
      DMS_BASE_URL: `${dispatcher.url}/v1`,
      REG_SECRET: credentials.registrationCredentials,
      SECP256K1_PRIVHEX: credentials.privateKeyHex,
      MAX_CONCURRENCY: String(concurrency),
    }),
    runners: [runner],
    workDir,
    log: createLogger({ format: 'json', level: 'error' }),
  });
  const stopped = node.run();
  return {
    stop: () => node.stop(),
    async [Symbol.asyncDispose]() {
      node.stop();
      await stopped;
      await node[Symbol.asyncDispose]();
      await rm(workDir, { recursive: true, force: true });
    },
  };
}
