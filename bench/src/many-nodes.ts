/**
 * A thousand nodes at one dispatcher: what waiting for work and holding a lease costs, how soon one task among a thousand waiting nodes is
 * picked up, and what happens when the dispatcher is killed while every node holds a lease. The nodes are real ones, in two
 * processes (`many-nodes-worker.ts`); all come from one address. Beside it the least such requests can cost: a bare server
 * that commits one small row, synced, for each, as often.
 */
import { fork, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { Pool } from 'undici';
import {
  addNode,
  cpuMs,
  ms,
  percentile,
  residentMiB,
  startDispatcher,
  type BenchDispatcher,
  type BenchNode,
  type Figure,
} from './fixtures.ts';
import {
  HOLD,
  QUICK,
  type FromParent,
  type ToParent,
  type WorkerReport,
  type WorkerStart,
} from './many-nodes-protocol.ts';
import { startServers } from './peers/servers.ts';

const NODES = 1_000;
const PROCESSES = 2;
const PICKUPS = 200;
/** How long the dispatcher is watched while all nodes do the same. */
const WATCH_MS = 20_000;
/** The lease time of a dispatcher by default. */
const TTL_MS = 15_000;
/** How long the dispatcher is away each time it is killed. */
const DOWN_MS = [0, 8_000];
const ASK_EVERY_MS = 200;

const WORKER = fileURLToPath(new URL('./many-nodes-worker.js', import.meta.url));
const BARE = fileURLToPath(new URL('./many-nodes-bare.js', import.meta.url));

const pause = async (forMs: number): Promise<void> =>
  new Promise((resolve) => void setTimeout(resolve, forMs));
const now = (): number => performance.timeOrigin + performance.now();

export async function manyNodes(): Promise<Figure> {
  const lines = [...(await section('SQLite', undefined))];
  await using servers = await startServers();
  for (const server of servers.postgres) lines.push(...(await section(server.title, await server.fresh())));
  return {
    title: `${NODES} nodes at one dispatcher, leases of ${TTL_MS / 1000} s`,
    lines: [...lines, ...servers.missing],
  };
}

async function section(title: string, store: string | undefined): Promise<string[]> {
  const lines: string[] = [];
  const line = (label: string, text: string): void =>
    void lines.push(`${title}: ${label.padEnd(44)} ${text}`);
  await using dispatcher = await startDispatcher(store === undefined ? {} : { store });
  const startedMiB = await residentMiB(dispatcher.pid);
  const beganAt = now();
  await using fleet = await Fleet.start(dispatcher);
  await fleet.online(dispatcher);
  line('registered, logged in and waiting', `all after ${seconds(now() - beganAt)}`);
  await fleet.reports();

  const waiting = await share(dispatcher, WATCH_MS);
  const reports = await fleet.reports();
  line(
    'waiting, dispatcher',
    `${percent(waiting)} of a core, ${kiB((await residentMiB(dispatcher.pid)) - startedMiB)} a node`,
  );
  line('waiting, node', `${kiB(sum(reports, ({ residentMiB: now }) => now) - fleet.emptyMiB)} each`);
  const pickups = await fleet.pickups(dispatcher);
  line(`one task among ${NODES} waiting`, `picked up ${spread(pickups)}`);

  const jobId = await dispatcher.client.submit({
    tasks: Array.from({ length: NODES }, () => ({ capability: HOLD, stage: 'hold', max_attempts: 1 })),
  });
  const submittedAt = now();
  await fleet.until(({ holding }) => holding === NODES);
  line(`${NODES} tasks for ${NODES} nodes`, `all held after ${seconds(now() - submittedAt)}`);
  await fleet.reports();
  const holding = await share(dispatcher, WATCH_MS);
  const beats = (await fleet.reports()).flatMap(({ heartbeats }) => heartbeats);
  const perSec = beats.length / (WATCH_MS / 1000);
  line(
    'holding, dispatcher',
    `${percent(holding)} of a core at ${perSec.toFixed(0)} heartbeats/s, ${spread(beats.map(({ tookMs }) => tookMs))}`,
  );
  const bare = await bareServer(dispatcher.dataDir, perSec);
  line(
    'as many bare requests, each a synced commit',
    `${percent(bare.share)} of a core, ${spread(bare.took)}`,
  );
  line('one bare request after the other', spread(bare.alone));

  for (const downMs of DOWN_MS) lines.push(`${title}: ${await herd(dispatcher, fleet, downMs)}`);

  fleet.tell({ kind: 'finish' });
  let last = '';
  for await (const { kind } of dispatcher.client.events(jobId)) last = kind;
  const { tasks } = await dispatcher.client.job(jobId);
  const more = tasks.filter(({ attempts }) => attempts > 1).length;
  line('leases lost', `${fleet.lost.length} aborted, ${more} done again; the job ended with ${last}`);
  line('nodes that gave up', String(fleet.gaveUp.length));
  return lines;
}

/** Kills the dispatcher, and tells when every lease has been renewed by the one that comes after it. */
async function herd(dispatcher: BenchDispatcher, fleet: Fleet, downMs: number): Promise<string> {
  await fleet.reports();
  await dispatcher.restart(downMs);
  const upAt = now();
  const cpuBefore = await cpuMs(dispatcher.pid);
  const renewedAt = new Map<string, number>();
  let failures = 0;
  let logins = 0;
  while (renewedAt.size < NODES && now() - upAt < 4 * TTL_MS) {
    for (const report of await fleet.reports()) {
      failures += report.failures;
      logins += report.logins;
      for (const { taskId, endedAtMs } of report.heartbeats) {
        if (endedAtMs >= upAt && !renewedAt.has(taskId)) renewedAt.set(taskId, endedAtMs);
      }
    }
    await pause(ASK_EVERY_MS);
  }
  const after = [...renewedAt.values()].map((at) => at - upAt);
  return (
    `killed and ${downMs === 0 ? 'started at once' : `away for ${seconds(downMs)}`}`.padEnd(44) +
    ` ${renewedAt.size} of ${NODES} leases renewed, ${spread(after)}, last after ${seconds(Math.max(...after))}; ` +
    `${failures} requests failed, ${logins} logins, dispatcher ${seconds((await cpuMs(dispatcher.pid)) - cpuBefore)} of processor time`
  );
}

interface Bare {
  readonly share: number;
  readonly took: readonly number[];
  readonly alone: readonly number[];
}

async function bareServer(folder: string, perSec: number): Promise<Bare> {
  const child = fork(BARE, [path.join(folder, `bare-${Date.now()}.sqlite`)]);
  const [port] = (await once(child, 'message')) as [number];
  const pool = new Pool(`http://127.0.0.1:${port}`, { connections: 256 });
  const request = async (): Promise<number> => {
    const start = performance.now();
    const { body } = await pool.request({ method: 'POST', path: '/', body: '{"progress":null,"events":[]}' });
    await body.dump();
    return performance.now() - start;
  };
  const alone: number[] = [];
  for (let index = 0; index < PICKUPS; index += 1) alone.push(await request());
  const cpuBefore = await cpuMs(child.pid ?? 0);
  const start = performance.now();
  const took: Promise<number>[] = [];
  while (performance.now() - start < WATCH_MS) {
    const due = Math.floor(((performance.now() - start) / 1000) * perSec);
    while (took.length < due) took.push(request());
    await pause(5);
  }
  const all = await Promise.all(took);
  const used = (await cpuMs(child.pid ?? 0)) - cpuBefore;
  await pool.close();
  child.kill('SIGKILL');
  await once(child, 'exit');
  return { share: used / (performance.now() - start), took: all, alone };
}

/** The processes with the nodes. */
class Fleet implements AsyncDisposable {
  readonly #children: readonly ChildProcess[];
  readonly #entered = new Map<string, (atMs: number) => void>();
  readonly #early = new Map<string, number>();
  readonly #reporting = new Map<ChildProcess, (report: WorkerReport) => void>();
  /** Reasons of leases that ended while they were to be held. */
  readonly lost: string[] = [];
  readonly gaveUp: string[] = [];
  /** Resident before the first node ran, of all processes. */
  emptyMiB = 0;

  private constructor(children: readonly ChildProcess[]) {
    this.#children = children;
    for (const child of children) child.on('message', (message: ToParent) => this.#hear(child, message));
  }

  static async start(dispatcher: BenchDispatcher): Promise<Fleet> {
    const nodes: BenchNode[] = [];
    while (nodes.length < NODES) {
      const wanted = Math.min(32, NODES - nodes.length);
      const first = nodes.length;
      nodes.push(
        ...(await Promise.all(
          Array.from({ length: wanted }, (_, index) => addNode(dispatcher.client, `many-${first + index}`)),
        )),
      );
    }
    const children = Array.from({ length: PROCESSES }, () =>
      fork(WORKER, { stdio: ['ignore', 'ignore', 'ignore', 'ipc'] }),
    );
    const fleet = new Fleet(children);
    const ready = children.map(async (child) => {
      for (;;) {
        const [message] = (await once(child, 'message')) as [ToParent];
        if (message.kind === 'ready') return message.residentMiB;
      }
    });
    const share = NODES / PROCESSES;
    for (const [index, child] of children.entries()) {
      const start: WorkerStart = {
        url: dispatcher.url,
        workDir: path.join(dispatcher.dataDir, `work-${index}`),
        nodes: nodes.slice(index * share, (index + 1) * share),
      };
      child.send(start);
    }
    fleet.emptyMiB = (await Promise.all(ready)).reduce((total, each) => total + each, 0);
    return fleet;
  }

  tell(message: FromParent): void {
    for (const child of this.#children) child.send(message);
  }

  async reports(): Promise<WorkerReport[]> {
    const reports = this.#children.map(
      (child) => new Promise<WorkerReport>((resolve) => this.#reporting.set(child, resolve)),
    );
    this.tell({ kind: 'report' });
    return await Promise.all(reports);
  }

  /** Until all nodes wait for work. */
  async online({ url }: BenchDispatcher): Promise<void> {
    for (;;) {
      const text = await (await fetch(`${url}/metrics`)).text();
      const [, waiting] = /^millrace_lease_waiters (\d+)/m.exec(text) ?? [];
      if (Number(waiting) >= NODES) return;
      if (this.gaveUp.length > 0) throw new Error(`a node gave up: ${this.gaveUp[0]}`);
      await pause(ASK_EVERY_MS);
    }
  }

  /** Until the sum over all processes is so. */
  async until(isSo: (sum: { readonly holding: number }) => boolean): Promise<void> {
    while (!isSo({ holding: sum(await this.reports(), ({ holding }) => holding) })) await pause(ASK_EVERY_MS);
  }

  /** From a task being submitted to its runner being entered, one after the other. */
  async pickups({ client }: BenchDispatcher): Promise<number[]> {
    const took: number[] = [];
    for (let index = 0; index < PICKUPS; index += 1) {
      const submittedAt = now();
      const jobId = await client.submit({ tasks: [{ capability: QUICK }] });
      const { tasks } = await client.job(jobId);
      took.push((await this.#enteredAt(tasks[0]!.id)) - submittedAt);
    }
    return took;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const child of this.#children) {
      const exited = once(child, 'exit');
      child.kill('SIGKILL');
      await exited;
    }
  }

  #enteredAt(taskId: string): Promise<number> {
    const early = this.#early.get(taskId);
    if (early !== undefined) return Promise.resolve(early);
    return new Promise((resolve) => this.#entered.set(taskId, resolve));
  }

  #hear(child: ChildProcess, message: ToParent): void {
    if (message.kind === 'entered') {
      this.#early.set(message.taskId, message.atMs);
      this.#entered.get(message.taskId)?.(message.atMs);
    } else if (message.kind === 'aborted') this.lost.push(message.reason);
    else if (message.kind === 'gave-up') this.gaveUp.push(message.error);
    else if (message.kind === 'report') this.#reporting.get(child)?.(message.report);
  }
}

/** How much of a core the dispatcher takes over the time. */
async function share({ pid }: BenchDispatcher, overMs: number): Promise<number> {
  const before = await cpuMs(pid);
  const start = performance.now();
  await pause(overMs);
  return ((await cpuMs(pid)) - before) / (performance.now() - start);
}

function sum<T>(values: readonly T[], of: (value: T) => number): number {
  return values.reduce((total, value) => total + of(value), 0);
}

function spread(samples: readonly number[]): string {
  return `p50 ${ms(percentile(samples, 0.5))}, p99 ${ms(percentile(samples, 0.99))} (${samples.length})`;
}

function seconds(forMs: number): string {
  return `${(forMs / 1000).toFixed(1)} s`;
}

function percent(value: number): string {
  return `${(value * 100).toFixed(1)} %`;
}

function kiB(mebibytes: number): string {
  return `${((mebibytes * 1024) / NODES).toFixed(0)} KiB`;
}
