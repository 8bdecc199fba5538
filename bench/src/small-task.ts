/**
 * W3: what one small task costs from beginning to end, one at a time: 1 KiB goes in, the task reads it, 1 KiB of other bytes comes out and is in
 * the requestor's hands.
 *
 * Ours over HTTP, the dispatcher in a process of its own: the input uploaded as a data item of its own, submit, lease, download,
 * upload of the artifact, complete, the requestor hears of it and downloads the artifact. Twice: by a whole node whose runner
 * is in a thread, and by a bare client, which is the protocol alone. The peers carry the bytes in the job and in its result;
 * graphile-worker keeps none, there the task writes a row. Their producer and worker share this process.
 */
import { randomBytes } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import { openThreadRunner } from '@millrace/exec';
import { Pool } from 'undici';
import {
  addNode,
  cpuMs,
  logIn,
  ms,
  percentile,
  startDispatcher,
  syncMs,
  times,
  type BenchDispatcher,
  type Figure,
} from './fixtures.ts';
import { startedNode } from './peer-throughput.ts';
import {
  PEER_NAMES,
  loadPeer,
  peerVersion,
  type Peer,
  type PeerName,
  type PeerSettings,
} from './peers/peer.ts';
import { startServers } from './peers/servers.ts';
import { median } from './store-throughput.ts';

const REVERSE = fileURLToPath(new URL('./runners/reverse.js', import.meta.url));
const BYTES = 1024;
const ROUNDS = 2;
/** Of one round. */
const SAMPLES = 100;
/**
 * For the peers too. What is measured is a system that has been up for a while: of ours the first two hundred take about twice the processor
 * time of those after the first thousand, until V8 has compiled what they run through.
 */
const WARM_UP = 500;
/** pg-boss polls; with its shortest interval this takes long enough. */
const FEW: Readonly<Partial<Record<PeerName, number>>> = { 'pg-boss': 5 };
const AIM_MS = 4;

interface Row {
  readonly label: string;
  readonly samples: number[];
  /** Processor time of a task in this process and the dispatcher, milliseconds, of each round. Null where a server's is not known. */
  readonly cpu: (number | null)[];
  measure(): Promise<Measured>;
}

interface Measured {
  readonly took: readonly number[];
  readonly cpuMs: number | null;
}

export async function smallTask(): Promise<Figure> {
  await using servers = await startServers();
  const protocol: Row = {
    label: 'Millrace over HTTP, the protocol alone',
    samples: [],
    cpu: [],
    measure: throughProtocol,
  };
  const whole: Row = {
    label: 'Millrace over HTTP, a whole node, a thread',
    samples: [],
    cpu: [],
    measure: throughNode,
  };
  const peers: Row[] = [];
  for (const name of PEER_NAMES) {
    const peer = await loadPeer(name);
    const settings = name === 'pg-boss' ? 'tuned' : 'default';
    for (const server of peer.server === 'redis' ? servers.redis : servers.postgres) {
      peers.push({
        label: `${name}, ${server.title}`,
        samples: [],
        cpu: [],
        measure: async () =>
          throughPeer(peer, await server.fresh(), settings, FEW[name] ?? SAMPLES, server.pid),
      });
    }
  }
  const syncs: number[] = [];
  for (let round = 0; round < ROUNDS; round += 1) {
    syncs.push(await syncMs());
    for (const row of [protocol, whole, ...peers]) {
      const measured = await row.measure();
      row.samples.push(...measured.took);
      row.cpu.push(measured.cpuMs);
    }
  }
  const cpuOf = ({ cpu }: Row): string => {
    const known = cpu.filter((value) => value !== null);
    return known.length === 0 ? '' : `, processor ${ms(median(known))}`;
  };
  const p50 = (row: Row): number => percentile(row.samples, 0.5);
  const figures = (row: Row): string =>
    `${row.label.padEnd(66)} p50 ${ms(p50(row)).padStart(10)}, p99 ${ms(percentile(row.samples, 0.99)).padStart(10)} (${row.samples.length})${cpuOf(row)}`;
  return {
    title: `W3: one small task from input to artifact, ${BYTES} bytes each, one at a time`,
    lines: [
      `${figures(protocol)}   aim: ${AIM_MS} ms; ${times(p50(protocol), AIM_MS)} of it`,
      `${figures(whole)}   ${times(p50(whole), AIM_MS)} of the aim`,
      ...peers.map(
        (row) =>
          `${figures(row)}   takes ${times(p50(row), p50(protocol))} of our protocol, ${times(p50(row), p50(whole))} of our whole node`,
      ),
      `one KiB written and synced on this disk: p50 ${ms(percentile(syncs, 0.5))}`,
      ...servers.missing,
      ...PEER_NAMES.map(peerVersion),
    ],
  };
}

async function throughPeer(
  peer: Peer,
  url: string,
  settings: PeerSettings,
  samples: number,
  serverPid: number | null,
): Promise<Measured> {
  await using queue = await peer.open(url, settings);
  await queue.work(({ text }) => String(text));
  const took: number[] = [];
  const warmUp = samples === SAMPLES ? WARM_UP : 1;
  const cpuNow = async (): Promise<number> => (serverPid === null ? 0 : await cpuMs(serverPid)) + ownCpuMs();
  let cpuBefore = 0;
  for (let index = -warmUp; index < samples; index += 1) {
    if (index === 0) cpuBefore = await cpuNow();
    const text = randomBytes(BYTES / 2).toString('hex');
    const start = performance.now();
    const result = await queue.run({ text });
    const ended = performance.now();
    if (result !== text) throw new Error(`the result is ${result.length} other characters`);
    if (index >= 0) took.push(ended - start);
  }
  return { took, cpuMs: serverPid === null ? null : ((await cpuNow()) - cpuBefore) / samples };
}

async function throughNode(): Promise<Measured> {
  await using dispatcher = await startDispatcher();
  await using runner = await openThreadRunner({ module: REVERSE });
  await using node = await startedNode(dispatcher, runner, 1);
  const took = await asRequestor(dispatcher, '/bench/reverse/v1', async () => {});
  node.stop();
  return took;
}

async function throughProtocol(): Promise<Measured> {
  await using dispatcher = await startDispatcher();
  const capability = '/bench/bare/v1';
  const token = await logIn(dispatcher.url, await addNode(dispatcher.client, 'bare'), {
    capabilities: [capability],
    maxConcurrency: 1,
  });
  const pool = new Pool(dispatcher.url, { connections: 2 });
  const { domainId } = await dispatcher.client.health();
  const { storage } = dispatcher.client;
  const authorization = `Bearer ${token}`;
  let artifacts = 0;
  const work = async (): Promise<void> => {
    const leased = await pool.request({
      method: 'GET',
      path: '/v1/tasks',
      headers: { authorization, prefer: 'wait=30', 'millrace-start': '1' },
    });
    const { task } = (await leased.body.json()) as { task: { id: string; inputs_cids: [string] } };
    const { body: input } = await storage.openRaw(domainId, task.inputs_cids[0]);
    artifacts += 1;
    const item = await storage.put(
      domainId,
      { name: `artifact-${artifacts}`, dataType: 'binary' },
      Buffer.concat(await input.toArray()).toReversed(),
    );
    const completed = await pool.request({
      method: 'POST',
      path: `/v1/tasks/${task.id}/complete`,
      headers: {
        authorization,
        'content-type': 'application/json',
        'millrace-lease-id': String(leased.headers['millrace-lease-id']),
      },
      body: JSON.stringify({ output_cids: [item?.id], meta: {} }),
    });
    if (completed.statusCode !== 200) throw new Error(`complete: ${completed.statusCode}`);
    await completed.body.dump();
  };
  const took = await asRequestor(dispatcher, capability, work);
  await pool.close();
  return took;
}

/** Uploads, submits, waits and downloads; `work` is what a node would do meanwhile. */
async function asRequestor(
  { client, pid }: BenchDispatcher,
  capability: string,
  work: () => Promise<void>,
): Promise<Measured> {
  const { domainId } = await client.health();
  const took: number[] = [];
  const cpuNow = async (): Promise<number> => (await cpuMs(pid)) + ownCpuMs();
  let cpuBefore = 0;
  for (let index = -WARM_UP; index < SAMPLES; index += 1) {
    if (index === 0) cpuBefore = await cpuNow();
    const bytes = randomBytes(BYTES);
    const worked = work();
    const start = performance.now();
    const cid = await client.upload(bytes, { name: `input-${index}` });
    const jobId = await client.submit({
      tasks: [{ capability, inputs_cids: [cid], outputs_prefix: `out-${index}` }],
    });
    let outputs: unknown;
    for await (const { kind, data } of client.events(jobId)) {
      if (kind === 'task.completed') outputs = data['outputs'];
      if (kind === 'job.failed') throw new Error(`the task failed: ${JSON.stringify(data)}`);
    }
    const [output] = outputs as [string];
    const { body } = await client.storage.openRaw(domainId, output);
    const received = Buffer.concat(await body.toArray());
    const ended = performance.now();
    await worked;
    // Equal bytes would be stored once, and the second upload be cheaper than it is.
    if (!received.equals(bytes.toReversed())) throw new Error(`got ${received.length} other bytes`);
    if (index >= 0) took.push(ended - start);
  }
  return { took, cpuMs: ((await cpuNow()) - cpuBefore) / SAMPLES };
}

function ownCpuMs(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
}
