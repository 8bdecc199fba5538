/**
 * W1 in process over PostgreSQL: how many durable no-op tasks per second go through the store (submit, lease, complete, in
 * batches), beside what the same server does in the same run with bare statements.
 *
 * The limit is three statements per batch (insert, update to leased with SKIP LOCKED, update to completed) on a minimal table
 * with the two partial indexes any such table needs, one transaction per batch, one connection. It keeps no history, no
 * receipts, no events and answers nothing. Beside it: bare one-row commits, which is what a sync costs here.
 */
import { fileURLToPath } from 'node:url';
import { openPostgresStore } from '@millrace/dispatch/postgres';
import pg from 'pg';
import type { Figure } from './fixtures.ts';
import type * as Support from '../../packages/dispatch/src/postgres.test.support.ts';
import { benchNode, benchSpec, median } from './store-throughput.ts';

/** Starts the server as the tests do. Not part of the package, so reached by its place. */
const SUPPORT = new URL('../../packages/dispatch/dist/postgres.test.support.js', import.meta.url);

export interface PostgresThroughputOptions {
  /** Tasks per measurement. Default 12,800. */
  readonly tasks?: number;
  /** Tasks per call. Default 256. */
  readonly batch?: number;
  /** Rounds; limit and store alternate, so that a noisy machine is noisy for both. Default 3. */
  readonly rounds?: number;
}

export interface PostgresThroughput extends Figure {
  /** Tasks per second, medians of the rounds. */
  readonly limitPerSec: number;
  readonly storePerSec: number;
  readonly singlesPerSec: number;
  readonly twoStoresPerSec: number;
  /** One-row commits per second, one after the other. */
  readonly commitsPerSec: number;
}

export async function postgresThroughput(
  options: PostgresThroughputOptions = {},
): Promise<PostgresThroughput> {
  const { tasks = 12_800, batch = 256, rounds = 3 } = options;
  const { PostgresServer } = (await import(SUPPORT.href)) as typeof Support;
  await using server = await PostgresServer.start({ fsync: true });
  const fresh = async (): Promise<string> => server.url(await server.createDatabase());
  const commits: number[] = [];
  const limit: number[] = [];
  const store: number[] = [];
  const singles: number[] = [];
  const two: number[] = [];
  for (let round = 0; round < rounds; round += 1) {
    commits.push(await bareCommits(await fresh(), 500));
    limit.push(await bareLimit(await fresh(), tasks, batch));
    store.push(await throughStores(await fresh(), tasks, batch, batch, 1));
    singles.push(await throughStores(await fresh(), tasks, batch, 1, 1));
    two.push(await throughStores(await fresh(), tasks, batch, batch, 2));
  }
  const [commitsPerSec, limitPerSec, storePerSec, singlesPerSec, twoStoresPerSec] = [
    median(commits),
    median(limit),
    median(store),
    median(singles),
    median(two),
  ];
  const figure = (perSec: number): string => Math.round(perSec).toLocaleString('en-US').padStart(8);
  const percent = (perSec: number): string => `${((perSec / limitPerSec) * 100).toFixed(0)} % of the limit`;
  return {
    title: `W1 in process, ${await versionOf(await fresh())}, fsync on: durable no-op tasks per second, batches of ${batch}, ${tasks} tasks, median of ${rounds}`,
    lines: [
      `one-row commits, one after the other           ${figure(commitsPerSec)}`,
      `PostgreSQL limit, 3 bare statements per batch  ${figure(limitPerSec)}`,
      `store, jobs of ${batch} tasks                      ${figure(storePerSec)}  ${percent(storePerSec)}`,
      `store, jobs of 1 task                          ${figure(singlesPerSec)}  ${percent(singlesPerSec)}`,
      `two stores on one database, jobs of ${batch}       ${figure(twoStoresPerSec)}  ${percent(twoStoresPerSec)}`,
    ],
    limitPerSec,
    storePerSec,
    singlesPerSec,
    twoStoresPerSec,
    commitsPerSec,
  };
}

async function connected<T>(url: string, work: (client: pg.Client) => Promise<T>): Promise<T> {
  const client = new pg.Client({ connectionString: url });
  await client.connect();
  try {
    return await work(client);
  } finally {
    await client.end();
  }
}

async function versionOf(url: string): Promise<string> {
  return await connected(url, async (client) => {
    const { rows } = await client.query<{ version: string }>(
      "SELECT current_setting('server_version') AS version",
    );
    return `PostgreSQL ${rows[0]?.version.split(' ')[0]}`;
  });
}

async function bareCommits(url: string, count: number): Promise<number> {
  return await connected(url, async (client) => {
    await client.query('CREATE TABLE public.rows (id integer)');
    const start = performance.now();
    for (let id = 0; id < count; id += 1) {
      await client.query({ name: 'insert', text: 'INSERT INTO public.rows VALUES ($1)', values: [id] });
    }
    return (count / (performance.now() - start)) * 1000;
  });
}

/** Tasks per second. */
async function bareLimit(url: string, tasks: number, batch: number): Promise<number> {
  return await connected(url, async (client) => {
    await client.query(`
      CREATE SCHEMA bare; SET search_path = bare;
      CREATE TABLE tasks (
        id text PRIMARY KEY, queue_id integer NOT NULL, priority integer NOT NULL, state text NOT NULL,
        node_id text, lease_id text, wake_at bigint
      ) WITH (fillfactor = 70);
      CREATE INDEX tasks_ready ON tasks (queue_id, priority DESC, id) WHERE state = 'ready';
      CREATE INDEX tasks_wake ON tasks (wake_at) WHERE wake_at IS NOT NULL`);
    const ids = Array.from(
      { length: tasks },
      (_, index) => `0192f000-0000-7000-8000-${index.toString(16).padStart(12, '0')}`,
    );
    const start = performance.now();
    for (let at = 0; at < tasks; at += batch) {
      const part = ids.slice(at, at + batch);
      await client.query({
        name: 'insert',
        text: "INSERT INTO tasks (id, queue_id, priority, state) SELECT id, 1, 0, 'ready' FROM unnest($1::text[]) AS u (id)",
        values: [part],
      });
      const { rows } = await client.query<{ id: string }>({
        name: 'lease',
        text: `UPDATE tasks SET state = 'leased', node_id = 'n', lease_id = id, wake_at = $2 WHERE id IN (
          SELECT id FROM tasks WHERE queue_id = 1 AND state = 'ready' ORDER BY priority DESC, id LIMIT $1
          FOR UPDATE SKIP LOCKED) RETURNING id`,
        values: [batch, 1_800_000_000_000 + at],
      });
      await client.query({
        name: 'complete',
        text: "UPDATE tasks SET state = 'completed', node_id = NULL, lease_id = NULL, wake_at = NULL WHERE id = ANY($1::text[])",
        values: [rows.map(({ id }) => id)],
      });
    }
    return (tasks / (performance.now() - start)) * 1000;
  });
}

/** Tasks per second through so many stores at once; in each, one call after the other has been answered. */
export async function throughStores(
  url: string,
  tasks: number,
  batch: number,
  tasksPerJob: number,
  count: number,
): Promise<number> {
  const stores = await Promise.all(Array.from({ length: count }, () => openPostgresStore({ url })));
  try {
    const spec = benchSpec(tasksPerJob);
    const job = { spec, organizationId: null, idempotencyKey: null, submitter: 'bench' };
    const jobs = Array.from({ length: batch / tasksPerJob }, () => job);
    const nodes = await Promise.all(
      stores.map((store, index) => benchNode(store, batch, `0x${index}${'b'.repeat(39)}`)),
    );
    const start = performance.now();
    let submitted = 0;
    await Promise.all(
      stores.map(async (store, index) => {
        const nodeId = nodes[index] ?? '';
        for (;;) {
          const more = submitted < tasks;
          if (more) {
            submitted += batch;
            for (const outcome of await store.submit(jobs)) if (!outcome.ok) throw outcome.error;
          }
          const [lease] = await store.lease([{ nodeId, max: batch, capabilities: null, start: true }]);
          if (!lease?.ok) throw lease?.error ?? new Error('no answer to a lease request');
          // The other store may have taken what this one submitted, and left what it could not take.
          if (!more && lease.value.leases.length === 0) return;
          const completions = lease.value.leases.map(({ leaseId, task }) => ({
            taskId: task.id,
            nodeId,
            leaseId,
            outputCids: [],
            meta: null,
          }));
          for (const outcome of await store.complete(completions)) if (!outcome.ok) throw outcome.error;
        }
      }),
    );
    const perSec = (tasks / (performance.now() - start)) * 1000;
    const stats = await stores[0]?.stats();
    if (stats?.tasks.completed !== tasks) throw new Error(`completed ${stats?.tasks.completed} of ${tasks}`);
    return perSec;
  } finally {
    await Promise.all(stores.map((store) => store[Symbol.asyncDispose]()));
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { title, lines } = await postgresThroughput();
  process.stdout.write(`${title}\n${lines.map((line) => `  ${line}\n`).join('')}`);
}
