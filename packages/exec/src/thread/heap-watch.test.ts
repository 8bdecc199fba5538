import { Worker } from 'node:worker_threads';
import { systemClock } from '@millrace/runner';
import { afterEach, describe, expect, test } from 'vitest';
import { HeapGuard, HeapWatch } from './heap-watch.ts';

const MIB = 1024 * 1024;
const workers: Worker[] = [];
afterEach(async () => {
  await Promise.all(workers.splice(0).map((worker) => worker.terminate()));
});

function start(source: string): Worker {
  const worker = new Worker(source, { eval: true });
  workers.push(worker);
  return worker;
}

async function started(worker: Worker): Promise<void> {
  await new Promise((resolve) => worker.once('message', resolve));
}
const READY = 'require("node:worker_threads").parentPort.postMessage("ready");';
const KEEP = 'globalThis.kept = Array.from({ length: 500_000 }, (_, i) => ({ i }));';
const MAKE_GARBAGE =
  '(() => { const kept = Array.from({ length: 500_000 }, (_, i) => ({ i })); return kept.length; })();';

describe('the heap of another thread', () => {
  test('can be measured while it never yields, with and without its garbage', async () => {
    const watch = (await HeapWatch.open())!;
    const live = start(`${KEEP} ${READY} for (;;);`);
    const garbage = start(`${MAKE_GARBAGE} ${READY} for (;;);`);
    await Promise.all([started(live), started(garbage)]);
    expect(await watch.used(garbage.threadId)).toBeGreaterThan(10 * MIB);
    expect(await watch.live(garbage.threadId)).toBeLessThan(10 * MIB);
    expect(await watch.live(live.threadId)).toBeGreaterThan(10 * MIB);
    await HeapWatch.release();
  });

  test('is null once the thread is gone, also when it goes while being asked', async () => {
    const watch = (await HeapWatch.open())!;
    const worker = start(`${READY} for (;;);`);
    await started(worker);
    const { threadId } = worker;
    const asked = Array.from({ length: 20 }, () => watch.live(threadId));
    await worker.terminate();
    await Promise.all(asked);
    expect(await watch.used(threadId)).toBeNull();
    expect(await watch.used(987_654)).toBeNull();
    await HeapWatch.release();
  });

  test('one connection serves all, and a new one is made after the last was given back', async () => {
    const first = await HeapWatch.open();
    expect(await HeapWatch.open()).toBe(first);
    await HeapWatch.release();
    const worker = start(`${READY} setInterval(() => {}, 1000);`);
    await started(worker);
    expect(await first!.used(worker.threadId)).toBeGreaterThan(0);
    await HeapWatch.release();
    const second = await HeapWatch.open();
    expect(second).not.toBe(first);
    const later = start(`${READY} setInterval(() => {}, 1000);`);
    await started(later);
    expect(await second!.used(later.threadId)).toBeGreaterThan(0);
    expect(await first!.used(later.threadId)).toBeNull();
    await HeapWatch.release();
  });

  test('a guard speaks up once, and only while it is on', async () => {
    const watch = (await HeapWatch.open())!;
    const worker = start(`${KEEP} ${READY} setInterval(() => {}, 1000);`);
    await started(worker);
    let breached: (liveMiB: number) => void = () => undefined;
    let breaches = 0;
    const breach = new Promise<number>((resolve) => (breached = resolve));
    const options = { watch, thread: worker.threadId, clock: systemClock };
    const guard = new HeapGuard({
      ...options,
      limitMiB: 8,
      onBreach: (liveMiB) => {
        breaches += 1;
        breached(liveMiB);
      },
    });
    const silent = new HeapGuard({ ...options, limitMiB: 8, onBreach: () => (breaches += 100) });
    const roomy = new HeapGuard({ ...options, limitMiB: 512, onBreach: () => (breaches += 100) });
    silent.start();
    silent.stop();
    roomy.start();
    guard.start();
    expect(await breach).toBeGreaterThan(8);
    await new Promise((resolve) => setTimeout(resolve, 250));
    expect(breaches).toBe(1);
    guard.stop();
    roomy.stop();
    await HeapWatch.release();
  });
});

test('where there is no inspector for workers, V8’s own limit ends a leak', async () => {
  // Inside a worker thread there is none.
  const index = new URL('../index.js', import.meta.url).href;
  const worker = start(`
    const { parentPort } = require('node:worker_threads');
    const { mkdtempSync, rmSync, writeFileSync } = require('node:fs');
    const { join } = require('node:path');
    (async () => {
      const { openThreadRunner } = await import('${index}');
      const { HeapWatch } = await import('${new URL('./heap-watch.js', import.meta.url).href}');
      const folder = mkdtempSync(join(require('node:os').tmpdir(), 'millrace-exec-'));
      const module = join(folder, 'leak.mjs');
      writeFileSync(module, 'export default { capability: "/leak/v1", async run() { const kept = []; for (;;) kept.push({}); } };');
      const runner = await openThreadRunner({ module, limits: { memoryMiB: 32 } });
      const ctx = { lease: {}, ctrl: {}, signal: new AbortController().signal };
      const error = await runner.run(ctx).catch((error) => error);
      await runner.close();
      rmSync(folder, { recursive: true });
      parentPort.postMessage({ watch: await HeapWatch.open(), code: error.code, message: error.message });
    })();`);
  const outcome = await new Promise((resolve, reject) =>
    worker.once('message', resolve).once('error', reject),
  );
  expect(outcome).toMatchObject({ watch: null, code: 'resource_exhausted' });
}, 30_000);
