/**
 * W2: from `submit` being called to the runner's code being entered, on an idle system: dispatcher in a process of its
 * own, node and requestor in this one, all over loopback. Beside it, measured in the same run: the dispatcher's part, up to
 * the lease reaching a bare client that waits for it, and the least such a path can cost, one HTTP round trip plus one
 * durable commit.
 */
import { BroadcastChannel } from 'node:worker_threads';
import { once } from 'node:events';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { DatabaseSync } from '@photostructure/sqlite';
import { Pool } from 'undici';
import { openThreadRunner } from '@millrace/exec';
import { createLogger, createNode, parseNodeEnv } from '@millrace/node';
import {
  addNode,
  logIn,
  ms,
  percentile,
  startDispatcher,
  type BenchDispatcher,
  type Figure,
} from './fixtures.ts';

const RUNNER = fileURLToPath(new URL('./runners/note-start.js', import.meta.url));
const SAMPLES = 500;
const WARM_UP = 50;

/** Milliseconds, a sample for each job. */
export interface IdleSamples {
  /** From `submit` being called to the runner's code. */
  readonly latencies: readonly number[];
  /** One HTTP round trip and one durable commit, taken right after. */
  readonly floors: readonly number[];
  /** From `submit` being called to the lease reaching a bare client. */
  readonly leases: readonly number[];
}

export async function idleLatency(): Promise<Figure> {
  const { latencies, floors, leases } = await idleSamples(SAMPLES);
  const [p50, p99] = [percentile(latencies, 0.5), percentile(latencies, 0.99)];
  const [floor50, floor99] = [percentile(floors, 0.5), percentile(floors, 0.99)];
  return {
    title: 'W2: submit to runner start, idle system',
    lines: [
      `p50 ${ms(p50)}, p99 ${ms(p99)} over ${SAMPLES} jobs (aim: p50 under 2 ms, p99 under 10 ms)`,
      `of it until the lease has reached a waiting client: p50 ${ms(percentile(leases, 0.5))}, p99 ${ms(percentile(leases, 0.99))}`,
      `one HTTP round trip + one durable commit in the same run: p50 ${ms(floor50)}, p99 ${ms(floor99)} (ratio ${(p50 / floor50).toFixed(1)} and ${(p99 / floor99).toFixed(1)})`,
    ],
  };
}

/** After a warm-up, so many jobs one after the other, and as many leases to a bare client. */
export async function idleSamples(samples: number): Promise<IdleSamples> {
  await using dispatcher = await startDispatcher();
  const credentials = await addNode(dispatcher.client, 'bench');
  const runner = await openThreadRunner({ module: RUNNER });
  await using node = createNode({
    config: parseNodeEnv({
      DDS_BASE_URL: dispatcher.url,
      DMS_BASE_URL: `${dispatcher.url}/v1`,
      REG_SECRET: credentials.registrationCredentials,
      SECP256K1_PRIVHEX: credentials.privateKeyHex,
    }),
    runners: [runner],
    workDir: path.join(dispatcher.dataDir, 'work'),
    log: createLogger({ format: 'json', level: 'error' }),
  });
  const stopped = node.run();
  const starts = new Map<string, number>();
  const channel = new BroadcastChannel('millrace-note-start');
  const heard = new EventTarget();
  channel.onmessage = (message) => {
    const { taskId, atMs } = (message as { data: { taskId: string; atMs: number } }).data;
    starts.set(taskId, atMs);
    heard.dispatchEvent(new Event('start'));
  };

  const latencies: number[] = [];
  const roundTrips: number[] = [];
  const commits: number[] = [];
  using database = openCommitProbe(dispatcher);
  for (let index = -WARM_UP; index < samples; index += 1) {
    const submittedAt = performance.timeOrigin + performance.now();
    const jobId = await dispatcher.client.submit({ tasks: [{ capability: '/bench/note-start/v1' }] });
    while (starts.size === 0) await once(heard, 'start');
    const [startedAt] = starts.values();
    starts.clear();
    // Idle again: the node has reported and waits for work.
    for await (const event of dispatcher.client.events(jobId)) void event;
    const pingedAt = performance.now();
    await dispatcher.client.health();
    const roundTrip = performance.now() - pingedAt;
    const commit = database.commit();
    if (index < 0) continue;
    latencies.push(startedAt! - submittedAt);
    roundTrips.push(roundTrip);
    commits.push(commit);
  }
  channel.close();
  node.stop();
  await stopped;
  const leases = await leaseLatencies(dispatcher, samples);
  return { latencies, floors: roundTrips.map((roundTrip, index) => roundTrip + commits[index]!), leases };
}

/** From `submit` being called to the lease's headers at a client that waits with a long poll and does nothing else. */
async function leaseLatencies({ url, client }: BenchDispatcher, samples: number): Promise<number[]> {
  const capability = '/bench/bare/v1';
  const token = await logIn(url, await addNode(client, 'bare'), {
    capabilities: [capability],
    maxConcurrency: 1,
  });
  const pool = new Pool(url, { connections: 2 });
  const authorization = `Bearer ${token}`;
  const latencies: number[] = [];
  for (let index = -WARM_UP; index < samples; index += 1) {
    const leased = pool.request({
      method: 'GET',
      path: '/v1/tasks',
      headers: { authorization, prefer: 'wait=30', 'millrace-start': '1' },
    });
    const answeredAt = leased.then(() => performance.now());
    // Two round trips are time enough for the other connection to wait.
    await client.health();
    await client.health();
    const submittedAt = performance.now();
    await client.submit({ tasks: [{ capability }] });
    if (index >= 0) latencies.push((await answeredAt) - submittedAt);
    const { body, headers } = await leased;
    const { task } = (await body.json()) as { task: { id: string } };
    const { body: done } = await pool.request({
      method: 'POST',
      path: `/v1/tasks/${task.id}/complete`,
      headers: {
        authorization,
        'content-type': 'application/json',
        'millrace-lease-id': String(headers['millrace-lease-id']),
      },
      body: '{"output_cids":[],"meta":{}}',
    });
    await done.dump();
  }
  await pool.close();
  return latencies;
}

/** One row written and synced, on the disk the dispatcher uses. */
function openCommitProbe(dispatcher: BenchDispatcher): { commit(): number } & Disposable {
  const database = new DatabaseSync(path.join(dispatcher.dataDir, 'probe.sqlite'));
  database.exec('PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE probe (value TEXT)');
  const insert = database.prepare('INSERT INTO probe VALUES (?)');
  return {
    commit() {
      const started = performance.now();
      insert.run('x'.repeat(200));
      return performance.now() - started;
    },
    [Symbol.dispose]: () => database.close(),
  };
}
