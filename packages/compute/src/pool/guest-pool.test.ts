import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { describe, expect, test } from 'vitest';
import { computeReason } from '../errors.ts';
import { echo, wat } from '../fixtures/wat.ts';
import { DEFAULT_LIMITS } from '../limits.ts';
import type { GuestLimits } from './guest-engine.ts';
import { GuestPool, poolCode } from './guest-pool.ts';
import type { PoolCall, PoolEnding } from './guest-pool.ts';

const GUEST = new URL('../wasm/guest.js', import.meta.url).href;
const limits: GuestLimits = { ...DEFAULT_LIMITS, maxWallMs: 20_000, now: 0n };
const loop = wat('(module (func (export "_start") (loop br 0)))');

function call(source: Uint8Array, over: Partial<PoolCall> = {}, own: Partial<GuestLimits> = {}): PoolCall {
  return {
    code: poolCode(GUEST, 'test', source),
    input: Buffer.from('[1]'),
    limits: { ...limits, ...own },
    onLog: null,
    signal: undefined,
    ...over,
  };
}

const kinds = (endings: readonly PoolEnding[]): string[] => endings.map((ending) => ending.kind);

describe('a pool', () => {
  test('lets as many calls wait as it is told, refuses the next, and then serves those that waited', async () => {
    await using pool = new GuestPool({ workers: 1, maxQueue: 2 });
    await pool.ready();
    const running = pool.run(call(loop, {}, { maxWallMs: 200 }));
    const waiting = [pool.run(call(echo())), pool.run(call(echo()))];
    await expect(pool.run(call(echo()))).rejects.toMatchObject({
      code: 'resource_exhausted',
      retryable: true,
      message: expect.stringContaining('2 calls wait, the most that may (maxQueue)') as string,
      details: { reason: 'busy' },
    });
    expect(kinds([await running, ...(await Promise.all(waiting))])).toEqual(['late', 'done', 'done']);
  });

  test('replaces every worker it kills', async () => {
    await using pool = new GuestPool({ workers: 2 });
    for (let round = 0; round < 3; round += 1) {
      const late = [1, 2].map(() => pool.run(call(loop, {}, { maxWallMs: 20 })));
      expect(kinds(await Promise.all(late))).toEqual(['late', 'late']);
    }
    await pool.ready();
    expect(pool.size).toBe(2);
    expect((await pool.run(call(echo()))).kind).toBe('done');
  });

  test('ends a call that takes too long to prepare, and tells that it never began', async () => {
    await using pool = new GuestPool({ workers: 1 });
    const slow = `data:text/javascript,export const guest = { prepare() { for (;;); }, run() {} }`;
    const ending = await pool.run(
      call(echo(), { code: poolCode(slow, 'slow', echo()) }, { maxPrepareMs: 300 }),
    );
    expect(ending).toMatchObject({ kind: 'late', started: false });
    expect((await pool.run(call(echo()))).kind).toBe('done');
  });

  test('survives an engine that throws, exits or uses up its heap', async () => {
    await using pool = new GuestPool({ workers: 1 });
    const bodies = [
      'throw new Error("a bug")',
      'process.exit(3)',
      'const all = []; for (;;) all.push(new Array(1e5).fill(1.5))',
    ];
    const endings: PoolEnding[] = [];
    for (const body of bodies) {
      const engine = `data:text/javascript,export const guest = { prepare: () => 1, run() { ${body} } }`;
      endings.push(await pool.run(call(echo(), { code: poolCode(engine, 'bad', echo()) })));
    }
    expect(endings).toMatchObject([
      { kind: 'died', started: true, error: 'a bug' },
      { kind: 'died', started: true },
      { kind: 'died', started: true, error: expect.stringContaining('memory limit') as string },
    ]);
    expect((await pool.run(call(echo()))).kind).toBe('done');
  });

  test('gives up when its workers cannot start, and tries again with the next call', async () => {
    await using pool = new GuestPool({ workers: 1 });
    pool.preload('data:text/javascript,throw new Error("no such engine here")');
    await expect(pool.ready()).rejects.toMatchObject({
      code: 'unavailable',
      message: expect.stringContaining('no such engine here') as string,
    });
    await expect(pool.run(call(echo()))).rejects.toMatchObject({ details: { reason: 'host' } });
  });

  test('settles a call whose signal aborts at any time exactly once', async () => {
    await using pool = new GuestPool({ workers: 2 });
    await pool.ready();
    const reasons = await Promise.all(
      Array.from({ length: 40 }, async (_value, index) => {
        const controller = new AbortController();
        const ending = pool.run(
          call(index % 2 === 0 ? loop : echo(), { signal: controller.signal }, { maxWallMs: 40 }),
        );
        setTimeout(() => controller.abort(new Error('stop')), index * 2);
        return ending.then(
          (one) => one.kind,
          (error: unknown) => (error as Error).message,
        );
      }),
    );
    expect(reasons.every((reason) => ['done', 'late', 'canceled', 'stop'].includes(reason))).toBe(true);
    expect((await pool.run(call(echo()))).kind).toBe('done');
  });

  test('that is closed is closed', async () => {
    const pool = new GuestPool({ workers: 1 });
    await pool.close();
    await pool.close();
    expect(await pool.run(call(echo())).catch(computeReason)).toBe('closed');
    expect(await pool.ready().catch(computeReason)).toBe('closed');
  });
});

test('idle workers do not keep a process alive, and a call under way does', async () => {
  const index = new URL('../index.js', import.meta.url).href;
  const code = `
    import { ComputeManager, memoryResolver } from ${JSON.stringify(index)};
    const resolver = memoryResolver();
    const ref = resolver.add(Buffer.from(${JSON.stringify(Buffer.from(echo()).toString('base64'))}, 'base64'));
    const manager = new ComputeManager(resolver, { maxWallMs: 20000 }, { workers: 2 });
    process.stdout.write(await manager.run(ref, '[7]'));`;
  const child = spawn(process.execPath, ['--input-type=module', '-e', code], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  let output = '';
  child.stdout.on('data', (chunk: Buffer) => (output += chunk.toString()));
  const [exit] = (await once(child, 'exit')) as [number];
  expect([exit, output]).toEqual([0, '[7]']);
});
