/** `npm run bench [name…]`: measures, and prints each figure beside a peer or a limit from the same run. */
import { computeJs } from './compute-js.ts';
import { compute } from './compute.ts';
import { httpThroughput } from './http-throughput.ts';
import { idleLatency } from './idle-latency.ts';
import { runtime } from './runtime.ts';
import { storeThroughput } from './store-throughput.ts';
import { subprocessOverhead } from './subprocess.ts';
import type { Figure } from './fixtures.ts';

const FIGURES: Readonly<Record<string, () => Promise<Figure>>> = {
  'store-throughput': storeThroughput,
  'http-throughput': httpThroughput,
  'idle-latency': idleLatency,
  'subprocess-overhead': subprocessOverhead,
  runtime,
  compute,
  'compute-js': computeJs,
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
