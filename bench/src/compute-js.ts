/**
 * Computes in JavaScript, and fuel: what a call of a small and of a large bundle costs through the pool, and what counting costs
 * in loops that do nothing else. Beside them, in the same run: the same text in a new V8 context of `node:vm` for each call,
 * which is no sandbox, and the same loops uncounted.
 */
import { createContext, Script } from 'node:vm';
import { ComputeManager, memoryResolver } from '@millrace/compute';
import { ms, percentile, type Figure } from './fixtures.ts';

const CALLS = 1_000;
const WARM_UP = 200;
const LOOPS = 9;
const LARGE_BYTES = 1_000_000;
const PLENTY = Number.MAX_SAFE_INTEGER;

/** A WASI command: 20 million steps of xorshift with a store each, then a sieve up to a million. */
const HOT = Buffer.from(
  'AGFzbQEAAAABBAFgAAADAgEABQMBABAHCgEGX3N0YXJ0AAAKmgEBlwEBA39BopnalnkhAANAIAAgAEENdHMhACAAIABBEXZzIQAgACAAQQV0cyEAIABB/P8/cSABNgIAIAFBAWoiAUGA2sQJSQ0AC0EAQQBBwIQ9/AsAQQIhAQNAIAEtAABFBEAgAUEBdCECAkADQCACQcCEPU8NASACQQE6AAAgAiABaiECDAALCwsgAUEBaiIBQcCEPUkNAAsL',
  'base64',
);
/** The same idea in JavaScript: arithmetic, objects, arrays. */
const HOT_JS = `export default () => {
  let x = 1, sum = 0; const o = { a: 1, b: [1, 2, 3] };
  for (let i = 0; i < 300000; i++) { x = (x * 16807) % 2147483647; sum += x & 7; o.a = sum; o.b[i % 3] = x; }
  return sum;
};`;
const SMALL_JS = 'export default (input) => ({ sum: input.list.reduce((a, b) => a + b, 0) });';
const INPUT = '{"list":[1,2,3]}';

export async function computeJs(): Promise<Figure> {
  const resolver = memoryResolver();
  await using manager = new ComputeManager(
    resolver,
    { maxWallMs: 60_000, maxPrepareMs: 60_000 },
    { engines: ['wasm', 'quickjs'] },
  );
  await manager.ready();
  const small = resolver.add(Buffer.from(SMALL_JS), 'quickjs');
  const large = resolver.add(Buffer.from(largeBundle()), 'quickjs');
  const hot = resolver.add(HOT);
  const hotJs = resolver.add(Buffer.from(HOT_JS), 'quickjs');

  const firstSmall = await timed(() => manager.run(small, INPUT));
  const firstLarge = await timed(() => manager.run(large, INPUT));
  const calls = async (ref: typeof small): Promise<string> => {
    const samples: number[] = [];
    for (let index = -WARM_UP; index < CALLS; index += 1) {
      const took = await timed(() => manager.run(ref, INPUT));
      if (index >= 0) samples.push(took);
    }
    return both(samples);
  };
  /** The guest's own time, counted and not, in turns: what else the machine does hits both. */
  const cost = async (ref: typeof small): Promise<string> => {
    const plain: number[] = [];
    const metered: number[] = [];
    let fuel = 0;
    for (let round = 0; round < LOOPS; round += 1) {
      await manager.run(ref, '{}', { metricsSink: ({ wallMs }) => plain.push(wallMs) });
      await manager.run(ref, '{}', {
        maxFuel: PLENTY,
        metricsSink: ({ wallMs, fuelUsed }) => {
          metered.push(wallMs);
          fuel = fuelUsed ?? Number.NaN;
        },
      });
    }
    // The quickest of each: the first ones run code that is not optimised yet.
    const [free, counted] = [Math.min(...plain), Math.min(...metered)];
    const percent = ((counted / free - 1) * 100).toFixed(0);
    return `${ms(counted)} counted, ${ms(free)} not: ${percent} % (${fuel.toLocaleString('en-US')} units)`;
  };
  return {
    title: 'Computes in JavaScript, each call in a fresh runtime; and what fuel costs',
    lines: [
      `small bundle: ${await calls(small)} over ${CALLS} calls (aim: under 0.4 ms); the first, with preparing it, ${ms(firstSmall)}`,
      `1 MB bundle: ${await calls(large)} over ${CALLS} calls (aim: under 0.4 ms); the first, with preparing it, ${ms(firstLarge)}`,
      `  a new V8 context of node:vm in this thread, no sandbox: small ${both(inVm(SMALL_JS))}, 1 MB ${both(inVm(largeBundle()))}`,
      `fuel in a hot loop of WebAssembly: ${await cost(hot)} (aim: under 12 %)`,
      `fuel in a hot loop of JavaScript: ${await cost(hotJs)}`,
    ],
  };
}

function largeBundle(): string {
  let text = '';
  for (let index = 0; text.length < LARGE_BYTES; index += 1) {
    text += `const f${index} = (a, b) => { const t = { x: a, name: 'item ${index}' }; for (let k = 0; k < a; k++) t.x += k * b; return [t.x, t.name].map((v) => v + ${index}); };\n`;
  }
  return `${text}export default (input) => f1(input.list.length, 2);\n`;
}

/** Calls with the script compiled before: for V8 what the image of the memory is for us. */
function inVm(module: string): number[] {
  const script = new Script(
    `${module.replace('export default', 'const main =')}\nJSON.stringify(main(JSON.parse(input)))`,
  );
  return Array.from({ length: 100 }, () => {
    const begun = performance.now();
    script.runInContext(createContext({ input: INPUT }));
    return performance.now() - begun;
  });
}

async function timed(run: () => Promise<unknown>): Promise<number> {
  const begun = performance.now();
  await run();
  return performance.now() - begun;
}

function both(samples: readonly number[]): string {
  return `p50 ${ms(percentile(samples, 0.5))}, p99 ${ms(percentile(samples, 0.99))}`;
}
