/** `npm run bench [name…]`: measures, and prints each figure beside a peer or a limit from the same run. */
import { computeJs } from './compute-js.ts';
import { artifacts } from './artifacts.ts';
import { blockingTask } from './blocking-task.ts';
import { compute } from './compute.ts';
import { history } from './history.ts';
import { httpThroughput } from './http-throughput.ts';
import { idleLatency } from './idle-latency.ts';
import { manyNodes } from './many-nodes.ts';
import { peerThroughput } from './peer-throughput.ts';
import { peerLatency } from './peer-latency.ts';
import { postgresThroughput } from './postgres.ts';
import { recovery } from './recovery.ts';
import { runtime } from './runtime.ts';
import { smallTask } from './small-task.ts';
import { storeThroughput } from './store-throughput.ts';
import { subprocessMemory, subprocessOverhead } from './subprocess.ts';
import type { Figure } from './fixtures.ts';

const FIGURES: Readonly<Record<string, () => Promise<Figure>>> = {
  'store-throughput': storeThroughput,
  postgres: postgresThroughput,
  'http-throughput': httpThroughput,
  'idle-latency': idleLatency,
  'many-nodes': manyNodes,
  'subprocess-overhead': subprocessOverhead,
  'subprocess-memory': subprocessMemory,
  runtime,
  compute,
  'compute-js': computeJs,
  'peer-throughput': peerThroughput,
  'peer-latency': peerLatency,
  'small-task': smallTask,
  recovery,
  'blocking-task': blockingTask,
  artifacts,
  history,
};

const names = process.argv.slice(2);
const unknown = names.filter((name) => !Object.hasOwn(FIGURES, name));
if (unknown.length > 0) {
  process.stderr.write(`unknown: ${unknown.join(', ')}; there are: ${Object.keys(FIGURES).join(', ')}\n`);
  process.exit(2);
}
for (const name of names.length > 0 ? names : Object.keys(FIGURES)) {
  const { title, lines } = await FIGURES[name]!();
  process.stdout.write(`${title}\n${lines.map((line) => `  ${line}\n`).join('')}\n`);
}
