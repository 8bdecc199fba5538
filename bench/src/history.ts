/**
 * W8: what a long history costs. Tasks go through a dispatcher in a process of its own over HTTP, in batches, and stay. At equal
 * steps: what is resident of that process, and the p99 of one task alone (submit, lease, complete) and of listing the newest 50
 * jobs. Flat is right: a line is laid through the steps, and its rise over the whole history is told beside the value at
 * its beginning.
 *
 * Beside it the peers on Redis, which keep their history in memory: what the server's memory grows by for as many jobs,
 * from fewer of them.
 */
import { stat } from 'node:fs/promises';
import path from 'node:path';
import { Redis } from 'ioredis';
import { Pool } from 'undici';
import {
  addNode,
  logIn,
  ms,
  percentile,
  cpuMs,
  residentMiB,
  startDispatcher,
  type Figure,
} from './fixtures.ts';
import { loadPeer } from './peers/peer.ts';
import { startServers, type RedisServer } from './peers/servers.ts';

const HISTORY = Number(process.env['BENCH_HISTORY'] ?? 100_000);
const STEPS = 10;
const TASKS_PER_JOB = 100;
const BATCH = 256;
/** At each step. */
const PROBES = 200;
const CAPABILITY = '/bench/noop/v1';
const PROBE_CAPABILITY = '/bench/probe/v1';
const PEER_JOBS = 4_096;

interface Step {
  readonly tasks: number;
  readonly residentMiB: number;
  readonly taskP50: number;
  readonly taskP99: number;
  readonly listP50: number;
  readonly listP99: number;
  /** Of the dispatcher, for one task alone and one listing. Says more than the clock where others share the machine. */
  readonly probeCpuMs: number;
}

export async function history(): Promise<Figure> {
  await using dispatcher = await startDispatcher();
  const { client, url, pid, dataDir } = dispatcher;
  const worker = await openWorker(
    url,
    await logIn(url, await addNode(client, 'bench'), {
      capabilities: [CAPABILITY],
      maxConcurrency: BATCH * 2,
    }),
  );
  const prober = await openWorker(
    url,
    await logIn(url, await addNode(client, 'probe'), {
      capabilities: [PROBE_CAPABILITY],
      maxConcurrency: 1,
    }),
  );
  const submit = async (capability: string, tasks: number): Promise<unknown> =>
    client.submit({ tasks: Array.from({ length: tasks }, () => ({ capability, stage: 'noop' })) });
  const probe = async (): Promise<Omit<Step, 'tasks' | 'residentMiB'>> => {
    const tasks: number[] = [];
    const lists: number[] = [];
    const cpuBefore = await cpuMs(pid);
    for (let index = 0; index < PROBES; index += 1) {
      const start = performance.now();
      await submit(PROBE_CAPABILITY, 1);
      if ((await prober.round(1)) !== 1) throw new Error('the probe was not leased');
      const done = performance.now();
      await client.jobs({ limit: 50 });
      tasks.push(done - start);
      lists.push(performance.now() - done);
    }
    return {
      taskP50: percentile(tasks, 0.5),
      taskP99: percentile(tasks, 0.99),
      listP50: percentile(lists, 0.5),
      listP99: percentile(lists, 0.99),
      probeCpuMs: ((await cpuMs(pid)) - cpuBefore) / PROBES,
    };
  };
  // Compiled, connected and its caches filled: none of that is history.
  await probe();
  const steps: Step[] = [];
  for (let step = 1; step <= STEPS; step += 1) {
    const share = HISTORY / STEPS;
    for (let left = share; left > 0; left -= TASKS_PER_JOB * 10) {
      await Promise.all(
        Array.from({ length: Math.min(10, Math.ceil(left / TASKS_PER_JOB)) }, () =>
          submit(CAPABILITY, TASKS_PER_JOB),
        ),
      );
      while ((await worker.round(BATCH)) > 0);
    }
    steps.push({ tasks: share * step, residentMiB: await residentMiB(pid), ...(await probe()) });
  }
  await worker.close();
  await prober.close();
  const database = (await stat(path.join(dataDir, 'millrace.db'))).size / 1024 / 1024;
  const line = (name: string, value: (step: Step) => number, figure: (value: number) => string): string => {
    const { start, rise } = fit(steps.map((step) => [step.tasks, value(step)]));
    return `${name.padEnd(32)} ${steps.map((step) => figure(value(step))).join(', ')}: rises by ${figure(rise)} over all from ${figure(start)}, ${((rise / start) * 100).toFixed(0)} %`;
  };
  return {
    title: `W8: ${HISTORY.toLocaleString('en-US')} tasks of history, ${STEPS} steps`,
    lines: [
      line(
        'resident memory',
        (step) => step.residentMiB,
        (value) => `${value.toFixed(0)} MiB`,
      ),
      line('one task alone, p50', (step) => step.taskP50, ms),
      line('one task alone, p99', (step) => step.taskP99, ms),
      line('listing 50 jobs, p50', (step) => step.listP50, ms),
      line('listing 50 jobs, p99', (step) => step.listP99, ms),
      line('processor time of both', (step) => step.probeCpuMs, ms),
      `database ${database.toFixed(0)} MiB, ${((database * 1024 * 1024) / HISTORY).toFixed(0)} bytes a task`,
      ...(await peerLines()),
    ],
  };
}

/** Least squares: the value at the beginning, and what it rises by up to the last x. */
function fit(points: readonly (readonly [number, number])[]): {
  readonly start: number;
  readonly rise: number;
} {
  const mean = (values: readonly number[]): number =>
    values.reduce((sum, value) => sum + value, 0) / values.length;
  const [meanX, meanY] = [mean(points.map(([x]) => x)), mean(points.map(([, y]) => y))];
  const slope =
    points.reduce((sum, [x, y]) => sum + (x - meanX) * (y - meanY), 0) /
    points.reduce((sum, [x]) => sum + (x - meanX) ** 2, 0);
  const last = points.at(-1)?.[0] ?? 0;
  return { start: meanY - slope * meanX, rise: slope * last };
}

/** A bare client that leases and completes, batch by batch. */
async function openWorker(
  url: string,
  token: string,
): Promise<{ round(max: number): Promise<number>; close(): Promise<void> }> {
  const pool = new Pool(url, { connections: 1 });
  const post = async (path: string, body: object): Promise<unknown> => {
    const response = await pool.request({
      method: 'POST',
      path,
      headers: { authorization: `Bearer ${token}`, 'content-type': 'application/json' },
      body: JSON.stringify(body),
    });
    if (response.statusCode !== 200) throw new Error(`${path}: ${response.statusCode}`);
    return await response.body.json();
  };
  return {
    async round(max) {
      const { leases } = (await post('/v1/tasks/lease', { max, start: true, tokens: false })) as {
        leases: { lease_id: string; task: { id: string } }[];
      };
      if (leases.length === 0) return 0;
      await post('/v1/tasks/complete', {
        items: leases.map(({ lease_id, task }) => ({
          task_id: task.id,
          lease_id,
          output_cids: [],
          meta: {},
        })),
      });
      return leases.length;
    },
    close: () => pool.close(),
  };
}

async function peerLines(): Promise<string[]> {
  await using servers = await startServers();
  // Memory does not depend on when it is synced.
  const server = servers.redis.at(-1);
  if (server === undefined) return [...servers.missing];
  const lines: string[] = [];
  for (const name of ['bullmq', 'bee-queue'] as const) {
    const peer = await loadPeer(name);
    await using queue = await peer.open(await server.fresh(), 'default');
    await queue.work(() => '');
    const before = await usedBytes(server);
    const payloads = Array.from({ length: PEER_JOBS }, (_, index) => ({ index }));
    await queue.add(payloads);
    await queue.completed(PEER_JOBS);
    const each = ((await usedBytes(server)) - before) / PEER_JOBS;
    lines.push(
      `${name}, which keeps completed jobs by default: Redis grows by ${each.toFixed(0)} bytes a job, ${((each * HISTORY) / 1024 / 1024).toFixed(0)} MiB for as many (reckoned from ${PEER_JOBS.toLocaleString('en-US')})`,
    );
  }
  return lines;
}

async function usedBytes({ url }: RedisServer): Promise<number> {
  const client = new Redis(url);
  const info = await client.info('memory');
  client.disconnect();
  return Number(/used_memory:(\d+)/.exec(info)?.[1] ?? Number.NaN);
}
