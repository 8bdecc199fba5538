/**
 * W1 in process: how many durable no-op tasks per second go through the store (submit, lease, complete, in batches),
 * beside what SQLite itself does with the same disk in the same run.
 *
 * The limit is three bare statements per task (insert, update to leased, update to completed), prepared once, on a
 * minimal table with a text key and the two partial indexes any such table needs (what can be leased, what expires), same
 * settings, same batches, one transaction per batch. It keeps no history, no receipts, no events and answers nothing. The
 * store can be faster where neighbours move together, because it writes once what happens alike to them; with jobs of one
 * task there is nothing to share.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { openSqliteStore } from '@millrace/dispatch';
import type { JobSpec, Store } from '@millrace/dispatch';
import { DatabaseSync } from '@photostructure/sqlite';
import type { Figure } from './fixtures.ts';

export interface StoreThroughputOptions {
  /** Tasks per measurement. Default 25,600. */
  readonly tasks?: number;
  /** Tasks per call. Default 256. */
  readonly batch?: number;
  /** Rounds; limit and store alternate, so that a noisy machine is noisy for both. Default 5. */
  readonly rounds?: number;
}

export interface StoreThroughput extends Figure {
  /** Tasks per second, medians of the rounds. */
  readonly limitPerSec: number;
  readonly storePerSec: number;
  readonly singlesPerSec: number;
  /** Of the limit, jobs of one batch: the median of the rounds' own shares, since limit and store of a round met the same noise. */
  readonly share: number;
}

export async function storeThroughput(options: StoreThroughputOptions = {}): Promise<StoreThroughput> {
  const { tasks = 25_600, batch = 256, rounds = 5 } = options;
  const limit: number[] = [];
  const store: number[] = [];
  const singles: number[] = [];
  for (let round = 0; round < rounds; round += 1) {
    limit.push(await inFolder((folder) => bareLimit(join(folder, 'limit.db'), tasks, batch)));
    store.push(await inFolder((folder) => throughStore(join(folder, 'store.db'), tasks, batch, batch)));
    singles.push(await inFolder((folder) => throughStore(join(folder, 'singles.db'), tasks, batch, 1)));
  }
  const [limitPerSec, storePerSec, singlesPerSec] = [median(limit), median(store), median(singles)];
  const shares = (values: readonly number[]): number =>
    median(values.map((perSec, round) => perSec / (limit[round] ?? Number.NaN)));
  const share = shares(store);
  const figure = (perSec: number): string => Math.round(perSec).toLocaleString('en-US').padStart(8);
  const percent = (part: number): string => `${(part * 100).toFixed(0)} %`;
  return {
    title: `W1 in process: durable no-op tasks per second, batches of ${batch}, ${tasks} tasks, median of ${rounds}`,
    lines: [
      `SQLite limit, 3 bare statements per task  ${figure(limitPerSec)}`,
      `store, jobs of ${batch} tasks                 ${figure(storePerSec)}  ${percent(share)} of the limit`,
      `store, jobs of 1 task                     ${figure(singlesPerSec)}  ${percent(shares(singles))} of the limit`,
    ],
    limitPerSec,
    storePerSec,
    singlesPerSec,
    share,
  };
}

/** Tasks per second. */
function bareLimit(path: string, tasks: number, batch: number): number {
  const database = new DatabaseSync(path);
  try {
    database.exec(`
      PRAGMA locking_mode = EXCLUSIVE;
      PRAGMA journal_mode = WAL;
      PRAGMA synchronous = FULL;
      PRAGMA cache_size = -65536;
      PRAGMA wal_autocheckpoint = 4000;
      CREATE TABLE tasks (
        id TEXT PRIMARY KEY, queue_id INTEGER NOT NULL, priority INTEGER NOT NULL, state TEXT NOT NULL,
        node_id TEXT, lease_id TEXT, wake_at INTEGER
      ) STRICT;
      CREATE INDEX tasks_ready ON tasks (queue_id, priority DESC, id) WHERE state = 'ready';
      CREATE INDEX tasks_wake ON tasks (wake_at) WHERE wake_at IS NOT NULL;
    `);
    const insert = database.prepare(
      "INSERT INTO tasks (id, queue_id, priority, state) VALUES (?, ?, ?, 'ready')",
    );
    const lease = database.prepare(
      "UPDATE tasks SET state = 'leased', node_id = ?, lease_id = ?, wake_at = ? WHERE id = ?",
    );
    const complete = database.prepare(
      "UPDATE tasks SET state = 'completed', node_id = NULL, lease_id = NULL, wake_at = NULL WHERE id = ?",
    );
    const ids = Array.from({ length: tasks }, (_, index) => idOf(index));
    const node = idOf(2 ** 40);
    const transaction = (work: () => void): void => {
      database.exec('BEGIN IMMEDIATE');
      work();
      database.exec('COMMIT');
    };
    const start = performance.now();
    for (let at = 0; at < tasks; at += batch) {
      const part = ids.slice(at, at + batch);
      transaction(() => {
        for (const id of part) insert.run(id, 1, 0);
      });
      transaction(() => {
        for (const id of part) lease.run(node, id, 1_800_000_000_000 + at, id);
      });
      transaction(() => {
        for (const id of part) complete.run(id);
      });
    }
    return (tasks / (performance.now() - start)) * 1000;
  } finally {
    database.close();
  }
}

/** Tasks per second through the store, each call after the one before has been answered. */
export async function throughStore(
  path: string,
  tasks: number,
  batch: number,
  tasksPerJob: number,
): Promise<number> {
  const store = await openSqliteStore({ path });
  try {
    const nodeId = await benchNode(store, batch);
    const job = {
      spec: benchSpec(tasksPerJob),
      organizationId: null,
      idempotencyKey: null,
      submitter: 'bench',
    };
    const jobs = Array.from({ length: batch / tasksPerJob }, () => job);
    const start = performance.now();
    for (let done = 0; done < tasks; done += batch) {
      for (const outcome of await store.submit(jobs)) if (!outcome.ok) throw outcome.error;
      const [lease] = await store.lease([{ nodeId, max: batch, capabilities: null, start: true }]);
      if (!lease?.ok) throw lease?.error ?? new Error('no answer to a lease request');
      if (lease.value.leases.length !== batch) throw new Error(`got ${lease.value.leases.length} leases`);
      const completions = lease.value.leases.map(({ leaseId, task }) => ({
        taskId: task.id,
        nodeId,
        leaseId,
        outputCids: [],
        meta: null,
      }));
      for (const outcome of await store.complete(completions)) if (!outcome.ok) throw outcome.error;
    }
    const perSec = (tasks / (performance.now() - start)) * 1000;
    const stats = await store.stats();
    if (stats.tasks.completed !== tasks) throw new Error(`completed ${stats.tasks.completed} of ${tasks}`);
    return perSec;
  } finally {
    await store[Symbol.asyncDispose]();
  }
}

export async function benchNode(
  store: Store,
  maxConcurrency: number,
  wallet = `0x${'b'.repeat(40)}`,
): Promise<string> {
  const secretHash = '0'.repeat(64);
  const node = await store.createNode({ name: 'bench', mode: 'public', organizationId: 'bench', secretHash });
  await store.registerNode({
    nodeId: node.id,
    secretHash,
    wallet,
    capabilities: ['/bench/noop/v1'],
    labels: {},
    version: '1.0.0',
    maxConcurrency,
  });
  return node.id;
}

export function benchSpec(tasks: number): JobSpec {
  return {
    label: 'bench',
    domain_id: idOf(1),
    priority: 0,
    meta: {},
    edges: [],
    deadline_at: null,
    tasks: Array.from({ length: tasks }, (_, index) => ({
      label: `task-${index + 1}`,
      stage: `task-${index + 1}`,
      capability: '/bench/noop/v1',
      capability_filters: {},
      priority: 0,
      inputs_cids: [],
      outputs_prefix: null,
      mode: 'public',
      meta: null,
      max_attempts: 3,
      deadline_at: null,
    })),
  };
}

function idOf(number: number): string {
  return `0192f000-0000-7000-8000-${number.toString(16).padStart(12, '0')}`;
}

/** Runs `work` with a temporary folder of its own. */
export async function inFolder<T>(work: (folder: string) => T | Promise<T>): Promise<T> {
  const folder = mkdtempSync(join(tmpdir(), 'millrace-bench-'));
  try {
    return await work(folder);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)] ?? 0;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { title, lines } = await storeThroughput();
  process.stdout.write(`${title}\n${lines.map((line) => `  ${line}\n`).join('')}`);
}
