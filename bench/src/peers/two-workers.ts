/**
 * One job and two workers, each a process of its own, over each system with its default settings: for what happens when a worker
 * dies or does not answer.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { addNode, startDispatcher, startNode } from '../fixtures.ts';
import type { NotedTask } from './notes.ts';
import { PEER_NAMES, loadPeer, peerVersion, type PeerName, type PeerSettings } from './peer.ts';
import { startServers, type Server } from './servers.ts';

const WORKER = fileURLToPath(new URL('./worker.js', import.meta.url));
const NOTED = fileURLToPath(new URL('../runners/noted.js', import.meta.url));

export interface Contestant {
  readonly label: string;
  /** Two workers, and nothing to do yet. */
  open(): Promise<TwoWorkers>;
}

export interface TwoWorkers extends AsyncDisposable {
  /** Adds the one job. */
  submit(task: NotedTask): Promise<void>;
  /** What the system says of it. */
  standing(): Promise<{ readonly ended: boolean; readonly text: string }>;
}

export interface Contest extends AsyncDisposable {
  /** Ours is the first. */
  readonly contestants: readonly Contestant[];
  /** What is left out and why, and the versions. */
  readonly notes: readonly string[];
}

export async function openContest(): Promise<Contest> {
  const servers = await startServers();
  try {
    const contestants = await contestantsOn(servers);
    return {
      contestants,
      notes: [...servers.missing, ...PEER_NAMES.map(peerVersion)],
      [Symbol.asyncDispose]: () => servers[Symbol.asyncDispose](),
    };
  } catch (error) {
    await servers[Symbol.asyncDispose]();
    throw error;
  }
}

async function contestantsOn(servers: Awaited<ReturnType<typeof startServers>>): Promise<Contestant[]> {
  const contestants: Contestant[] = [{ label: 'Millrace, two nodes, leases of 15 s', open: openOurs }];
  for (const name of PEER_NAMES) {
    const { server: kind } = await loadPeer(name);
    const [server] = kind === 'redis' ? servers.redis : servers.postgres;
    if (server === undefined) continue;
    contestants.push({ label: `${name}, defaults`, open: () => openPeer(name, 'default', server) });
    // Not a matter of speed: without this call its lost jobs are looked for at the start of a worker only.
    if (name === 'bee-queue') {
      contestants.push({
        label: `${name}, checkStalledJobs every 5 s`,
        open: () => openPeer(name, 'tuned', server),
      });
    }
  }
  return contestants;
}

async function openOurs(): Promise<TwoWorkers> {
  const dispatcher = await startDispatcher();
  const { client } = dispatcher;
  const nodes = await Promise.all(
    ['one', 'two'].map(async (name) => startNode(dispatcher, await addNode(client, name), NOTED)),
  );
  let jobId = '';
  return {
    async submit(task) {
      jobId = await client.submit({
        tasks: [{ capability: '/bench/noted/v1', meta: { noted: { ...task } } }],
      });
    },
    async standing() {
      const { job, tasks } = await client.job(jobId);
      const [task] = tasks;
      return {
        ended: ['completed', 'failed', 'canceled'].includes(job.status),
        text: `${job.status}, attempts ${task?.attempts}, node faults ${task?.node_faults}`,
      };
    },
    async [Symbol.asyncDispose]() {
      await Promise.all(nodes.map((node) => node[Symbol.asyncDispose]()));
      await dispatcher[Symbol.asyncDispose]();
    },
  };
}

async function openPeer(name: PeerName, settings: PeerSettings, server: Server): Promise<TwoWorkers> {
  const url = await server.fresh();
  const peer = await loadPeer(name);
  // Only adds and asks; one job is added by the call that tells its id.
  const queue = await peer.open(url, 'default');
  const workers = await Promise.all([1, 2].map(() => startWorker(name, url, settings)));
  return {
    submit: async (task) => queue.add([{ ...task }]),
    standing: () => queue.standing(),
    async [Symbol.asyncDispose]() {
      await Promise.all(workers.map((worker) => worker[Symbol.asyncDispose]()));
      await queue[Symbol.asyncDispose]();
    },
  };
}

async function startWorker(name: PeerName, url: string, settings: PeerSettings): Promise<AsyncDisposable> {
  const child = spawn(process.execPath, [WORKER, name, url, settings], {
    stdio: ['ignore', 'pipe', 'ignore'],
  });
  const exited = once(child, 'exit');
  await Promise.race([
    once(createInterface({ input: child.stdout }), 'line'),
    exited.then(([code]) => {
      throw new Error(`the worker of ${name} ended with ${String(code)}`);
    }),
  ]);
  return {
    async [Symbol.asyncDispose]() {
      child.kill('SIGKILL');
      await exited;
    },
  };
}
