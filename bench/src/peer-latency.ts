/**
 * W2 beside the peers: from adding a job to its code being entered, on an idle system. Ours as in `idle-latency.ts`: dispatcher in
 * a process of its own, runner in a thread. The peers' producer and worker share this process, their handlers this thread. A
 * worker that polls is asked at random moments of its interval.
 */
import { ms, percentile, syncMs, times, type Figure } from './fixtures.ts';
import { idleSamples } from './idle-latency.ts';
import {
  PEER_NAMES,
  loadPeer,
  peerVersion,
  type Payload,
  type Peer,
  type PeerName,
  type PeerSettings,
} from './peers/peer.ts';
import { startServers } from './peers/servers.ts';

/** Ours and the peers alternate, so that a noisy machine is noisy for all. */
const ROUNDS = 2;
/** Of one round. */
const SAMPLES = 100;
const WARM_UP = 10;
/** For those that poll, of one round. */
const POLLED_SAMPLES = 8;
/** How long a worker that has just ended a job may sleep, by its settings. */
const POLLING_MS: Readonly<Partial<Record<PeerName, Readonly<Record<PeerSettings, number>>>>> = {
  'pg-boss': { default: 2_000, tuned: 500 },
};

interface Row {
  readonly label: string;
  readonly samples: number[];
  measure(): Promise<readonly number[]>;
}

export async function peerLatency(): Promise<Figure> {
  await using servers = await startServers();
  const ours: Row = {
    label: 'Millrace over HTTP, node and thread, defaults',
    samples: [],
    measure: async () => (await idleSamples(SAMPLES)).latencies,
  };
  const rows: Row[] = [];
  for (const name of PEER_NAMES) {
    const peer = await loadPeer(name);
    for (const server of peer.server === 'redis' ? servers.redis : servers.postgres) {
      // Only polling is a matter of settings here; advice for throughput is not advice for latency.
      for (const settings of POLLING_MS[name] === undefined
        ? (['default'] as const)
        : (['default', 'tuned'] as const)) {
        rows.push({
          label: `${name}, ${settings === 'tuned' ? 'shortest polling' : 'defaults'}, ${server.title}`,
          samples: [],
          measure: async () =>
            startLatencies(peer, await server.fresh(), settings, POLLING_MS[name]?.[settings]),
        });
      }
    }
  }
  const syncs: number[] = [];
  for (let round = 0; round < ROUNDS; round += 1) {
    syncs.push(await syncMs());
    for (const row of [ours, ...rows]) row.samples.push(...(await row.measure()));
  }
  const [p50, p99] = [percentile(ours.samples, 0.5), percentile(ours.samples, 0.99)];
  const figures = ({ label, samples }: Row): string =>
    `${label.padEnd(66)} p50 ${ms(percentile(samples, 0.5)).padStart(10)}, p99 ${ms(percentile(samples, 0.99)).padStart(10)} (${samples.length})`;
  return {
    title: 'W2 beside the peers: from adding a job to its code being entered, idle system',
    lines: [
      figures(ours),
      ...rows.map(
        (row) =>
          `${figures(row)}   takes ${times(percentile(row.samples, 0.5), p50)} and ${times(percentile(row.samples, 0.99), p99)} of ours`,
      ),
      `one KiB written and synced on this disk: p50 ${ms(percentile(syncs, 0.5))}`,
      ...servers.missing,
      ...PEER_NAMES.map(peerVersion),
    ],
  };
}

async function startLatencies(
  peer: Peer,
  url: string,
  settings: PeerSettings,
  pollingMs: number | undefined,
): Promise<number[]> {
  await using queue = await peer.open(url, settings);
  let enteredAt = 0;
  await queue.work(() => {
    enteredAt = performance.now();
    return '';
  });
  const latencies: number[] = [];
  const [warmUp, samples] = pollingMs === undefined ? [WARM_UP, SAMPLES] : [1, POLLED_SAMPLES];
  for (let index = -warmUp; index < samples; index += 1) {
    if (pollingMs !== undefined && index >= 0) await pause(Math.random() * pollingMs);
    const addedAt = performance.now();
    await queue.run({ index } satisfies Payload);
    if (index >= 0) latencies.push(enteredAt - addedAt);
  }
  return latencies;
}

async function pause(ms: number): Promise<void> {
  await new Promise((resolve) => void setTimeout(resolve, ms));
}
