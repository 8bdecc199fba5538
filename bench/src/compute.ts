/**
 * Sandboxed computes: what a call costs through the pool, when nothing is warm but the pool and when everything is, and how long a
 * guest lives past its limit. Beside it, in the same run, the same module with nothing around it in the same
 * thread, Extism in this thread and in a worker, and a `node` process for each call.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { ComputeManager, GuestPool, memoryResolver, type Metrics } from '@millrace/compute';
import { extism } from './extism.ts';
import { ms, perSecond, percentile, type Figure } from './fixtures.ts';

const COLD = 60;
const WARM = 3_000;
const KILLS = 20;
const LIMIT_MS = 50;
const THROUGHPUT_MS = 2_000;
const MODULES = 400;
const IDLE_WORKERS = 8;
const PROCESSES = 10;

/** A WASI command that writes what it reads, hand-written, 177 bytes; and one that never ends. */
const ECHO = Buffer.from(
  'AGFzbQEAAAABDAJgBH9/f38Bf2AAAAJEAhZ3YXNpX3NuYXBzaG90X3ByZXZpZXcxB2ZkX3JlYWQAABZ3YXNpX3NuYXBzaG90X3ByZXZpZXcxCGZkX3dyaXRlAAADAgEBBQMBAAEHEwIGbWVtb3J5AgAGX3N0YXJ0AAIKNQEzAEEAQYAINgIAQQRB4NQDNgIAQQBBAEEBQQgQABpBBEEIKAIANgIAQQFBAEEBQQgQARoL',
  'base64',
);
const LOOP = Buffer.from('AGFzbQEAAAABBAFgAAADAgEABwoBBl9zdGFydAAACgkBBwADQAwACws=', 'base64');
const INPUT = '{"in":1}';

export async function compute(): Promise<Figure> {
  const resolver = memoryResolver();
  const echo = resolver.add(ECHO);
  const loop = resolver.add(LOOP);
  await using manager = new ComputeManager(resolver);
  const readyMs = await timed(() => manager.ready());

  const cold: number[] = [];
  for (let index = 0; index < COLD; index += 1) {
    const ref = resolver.add(variant(index));
    cold.push(await timed(() => manager.run(ref, INPUT)));
  }
  const warm: number[] = [];
  const inside: number[] = [];
  for (let index = -500; index < WARM; index += 1) {
    let wallMs = 0;
    const took = await timed(() => manager.run(echo, INPUT, { metricsSink: (one) => (wallMs = one.wallMs) }));
    if (index < 0) continue;
    warm.push(took);
    inside.push(wallMs);
  }
  const rate = await throughput(() => manager.run(echo, INPUT));

  const overdue: number[] = [];
  const late: number[] = [];
  for (let index = 0; index < KILLS; index += 1) {
    // Not what it waited for a worker: those before it are being replaced.
    let before = 0;
    const metricsSink = ({ queuedMs, prepareMs, wallMs }: Metrics): void => {
      before = queuedMs + prepareMs;
      late.push(wallMs - LIMIT_MS);
    };
    const took = await timed(() =>
      manager.run(loop, INPUT, { maxWallMs: LIMIT_MS, metricsSink }).catch(() => undefined),
    );
    overdue.push(took - before - LIMIT_MS);
  }
  const bareKills: number[] = [];
  for (let index = 0; index < KILLS; index += 1) bareKills.push(await bareKill());
  let busyWallMs = 0;
  const busy = manager
    .run(loop, INPUT, { maxWallMs: LIMIT_MS, metricsSink: (one) => (busyWallMs = one.wallMs) })
    .catch(() => undefined);
  await new Promise((resolve) => setTimeout(resolve, 10));
  block(1_000);
  await busy;

  const beforeModules = process.memoryUsage.rss();
  for (let index = 0; index < MODULES; index += 1) {
    await manager.run(resolver.add(variant(COLD + index)), INPUT);
  }
  const moduleBytes = (process.memoryUsage.rss() - beforeModules) / MODULES;
  const workerBytes = await idleWorkers();
  const bare = bareCalls();
  const inThread = await extism(INPUT, 'thread', { reused: WARM, fresh: COLD });
  const inWorker = await extism(INPUT, 'worker', { reused: WARM, fresh: PROCESSES });
  const processes: number[] = [];
  for (let index = 0; index < PROCESSES; index += 1) processes.push(await timed(nodeProcess));

  const trips = await roundTrips();
  const ratio = (samples: readonly number[], to: readonly number[]): string =>
    `${(percentile(samples, 0.5) / percentile(to, 0.5)).toPrecision(2)} times`;
  const both = (samples: readonly number[]): string =>
    `p50 ${ms(percentile(samples, 0.5))}, p99 ${ms(percentile(samples, 0.99))}`;
  return {
    title:
      'Computes: a module of 177 bytes that echoes its input, each call in an instance and a thread of its own',
    lines: [
      `digest to first result with warm workers: ${both(cold)} over ${COLD} modules (aim: under 5 ms); all workers ready after ${ms(readyMs)}`,
      `  bare compile, instantiate and run in this thread: ${both(bare.cold)}; a node process: ${both(processes)}`,
      `  extism, a plugin for each call, in this thread: ${both(inThread.fresh)}; in a worker: ${both(inWorker.fresh)}, of which ours is ${ratio(cold, inWorker.fresh)}`,
      `warm call: ${both(warm)} over ${WARM} (aim: p50 under 0.15 ms), of it in the guest p50 ${ms(percentile(inside, 0.5))}`,
      `  bare instantiate and run in this thread: ${both(bare.warm)}, of which ours in the guest is ${ratio(inside, bare.warm)} (aim: under 2.5); message to a thread and back: ${both(trips)}, of which ours is ${ratio(warm, trips)}`,
      `  extism, one instance used again, in this thread: ${both(inThread.reused)}; in a worker: ${both(inWorker.reused)}, of which ours, with a fresh instance, is ${ratio(warm, inWorker.reused)}`,
      `calls, 8 at a time: ${perSecond(rate)}; bare in this thread: ${perSecond(bare.rate)}`,
      `from limit to terminate(): p50 ${ms(percentile(late, 0.5))}, largest ${ms(Math.max(...late))}; to the call's end: p50 ${ms(percentile(overdue, 0.5))}, largest ${ms(Math.max(...overdue))} over ${KILLS} (aim: within 25 ms); a bare worker in such a loop is gone ${ms(percentile(bareKills, 0.5))} after terminate(), at most ${ms(Math.max(...bareKills))}; with the caller's thread blocked the guest was ended ${ms(busyWallMs - LIMIT_MS)} past it`,
      `memory: ${Math.round(moduleBytes / 1024)} KiB for each loaded module, ${(workerBytes / 1024 / 1024).toFixed(1)} MiB for each idle worker`,
    ],
  };
}

/** The echo under another digest: with a custom section that says a number. */
function variant(number: number): Uint8Array {
  const payload = Buffer.from(`\u0001n${String(number).padStart(8, '0')}`);
  return Buffer.concat([ECHO, Buffer.from([0, payload.length]), payload]);
}

async function timed(run: () => Promise<unknown>): Promise<number> {
  const begun = performance.now();
  await run();
  return performance.now() - begun;
}

async function throughput(call: () => Promise<unknown>): Promise<number> {
  const begun = performance.now();
  let calls = 0;
  const caller = async (): Promise<void> => {
    while (performance.now() - begun < THROUGHPUT_MS) {
      await call();
      calls += 1;
    }
  };
  await Promise.all(Array.from({ length: 8 }, caller));
  return (calls * 1000) / (performance.now() - begun);
}

function block(forMs: number): void {
  const until = performance.now() + forMs;
  while (performance.now() < until);
}

async function idleWorkers(): Promise<number> {
  await using one = new GuestPool({ workers: 1 });
  await one.ready();
  const before = process.memoryUsage.rss();
  await using more = new GuestPool({ workers: IDLE_WORKERS });
  await more.ready();
  return (process.memoryUsage.rss() - before) / (IDLE_WORKERS + 1);
}

/** What the least sandbox there could be costs: the module and two functions, in this thread. */
function bareCalls(): { readonly cold: number[]; readonly warm: number[]; readonly rate: number } {
  const wasm = (globalThis as unknown as { readonly WebAssembly: WebAssemblyApi }).WebAssembly;
  const input = Buffer.from(INPUT);
  const run = (module: object): string => {
    let read = 0;
    let output = '';
    const memory = (): Buffer =>
      Buffer.from((instance.exports['memory'] as { readonly buffer: ArrayBuffer }).buffer);
    const instance = new wasm.Instance(module, {
      wasi_snapshot_preview1: {
        fd_read(_fd: number, iov: number, _count: number, to: number): number {
          const bytes = memory();
          const length = input.copy(bytes, bytes.readUInt32LE(iov), read);
          read += length;
          bytes.writeUInt32LE(length, to);
          return 0;
        },
        fd_write(_fd: number, iov: number, _count: number, to: number): number {
          const bytes = memory();
          const at = bytes.readUInt32LE(iov);
          const length = bytes.readUInt32LE(iov + 4);
          output += bytes.toString('utf8', at, at + length);
          bytes.writeUInt32LE(length, to);
          return 0;
        },
      },
    });
    (instance.exports['_start'] as () => void)();
    if (output !== INPUT) throw new Error(`the bare module said ${output}`);
    return output;
  };
  const measure = (count: number, call: (index: number) => void): number[] =>
    Array.from({ length: count }, (_value, index) => {
      const begun = performance.now();
      call(index);
      return performance.now() - begun;
    });
  const cold = measure(COLD, (index) => run(new wasm.Module(variant(1_000_000 + index))));
  const module = new wasm.Module(ECHO);
  const warm = measure(WARM, () => run(module));
  return { cold, warm, rate: (1000 * WARM) / warm.reduce((sum, one) => sum + one, 0) };
}

interface WebAssemblyApi {
  readonly Module: new (bytes: Uint8Array) => object;
  readonly Instance: new (
    module: object,
    imports: object,
  ) => { readonly exports: Readonly<Record<string, unknown>> };
}

async function roundTrips(): Promise<number[]> {
  const worker = new Worker(
    `const { parentPort } = require('node:worker_threads'); parentPort.on('message', (message) => parentPort.postMessage(message));`,
    { eval: true },
  );
  const samples: number[] = [];
  for (let index = -500; index < WARM; index += 1) {
    const took = await timed(async () => {
      worker.postMessage(INPUT);
      await once(worker, 'message');
    });
    if (index >= 0) samples.push(took);
  }
  await worker.terminate();
  return samples;
}

/** What ending a thread costs at the least. */
async function bareKill(): Promise<number> {
  const worker = new Worker("require('node:worker_threads').parentPort.postMessage(0); for (;;);", {
    eval: true,
  });
  await once(worker, 'message');
  await new Promise((resolve) => setTimeout(resolve, LIMIT_MS));
  return await timed(() => worker.terminate());
}

async function nodeProcess(): Promise<void> {
  const child = spawn(process.execPath, ['-e', 'process.stdin.pipe(process.stdout)'], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  child.stdin.end(INPUT);
  child.stdout.resume();
  await once(child, 'exit');
}
