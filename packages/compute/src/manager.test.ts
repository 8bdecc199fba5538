import { describe, expect, test } from 'vitest';
import type { Artifact } from './artifact.ts';
import { refOf } from './artifact.ts';
import { registerEngine } from './engine.ts';
import { computeReason } from './errors.ts';
import { echo, list, program, wasiImports, wat } from './fixtures/wat.ts';
import './identity.ts';
import type { Metrics } from './limits.ts';
import { ComputeManager } from './manager.ts';
import { SHARED_BYTES } from './pool/slot.ts';
import { formatRef } from './ref.ts';
import { memoryResolver } from './resolver.ts';
import type { Resolver } from './resolver.ts';
import './wasm/engine.ts';

const PATIENT = { maxWallMs: 20_000 };
const loop = (): Uint8Array => wat('(module (func (export "_start") (loop br 0)))');
const text = (bytes: Uint8Array): string => Buffer.from(bytes).toString();

function open(workers = 2): { manager: ComputeManager; add: (wasm: Uint8Array, engine?: string) => string } {
  const resolver = memoryResolver();
  return {
    manager: new ComputeManager(resolver, PATIENT, { workers }),
    add: (wasm, engine) => formatRef(resolver.add(wasm, engine)),
  };
}

describe('a run', () => {
  test('takes bytes or text, a ref as text or taken apart, and gives the output', async () => {
    const resolver = memoryResolver();
    const ref = resolver.add(echo());
    await using manager = new ComputeManager(resolver, PATIENT, { workers: 1 });
    expect(text(await manager.run(ref, '{"a":"é"}'))).toBe('{"a":"é"}');
    const shared = Buffer.from('xx[1]xx');
    expect(text(await manager.run(formatRef(ref), shared.subarray(2, 5)))).toBe('[1]');
    expect(text(shared)).toBe('xx[1]xx');
  });

  test('is measured once, and says what it did', async () => {
    const { manager, add } = open();
    await using _ = manager;
    const ref = add(
      program(`(call $write (i32.const 2) (i32.const 50) (i32.const 5)) ${list('(i32.const 42)')}`, {
        memory: '(memory 3)',
      }),
    );
    const measured: Metrics[] = [];
    const heard: string[] = [];
    const run = (maxLogBytes: number): Promise<Uint8Array> =>
      manager.run(ref, '[]', {
        maxLogBytes,
        stderr: (bytes) => heard.push(text(bytes)),
        metricsSink: (metrics) => measured.push(metrics),
      });
    expect(text(await run(100))).toBe('[42]');
    expect(text(await run(2))).toBe('[42]');
    expect(heard).toEqual(['[,]{}', '[,']);
    expect(measured).toHaveLength(2);
    expect(measured[0]).toMatchObject({
      status: 'ok',
      reason: null,
      memoryBytes: 3 * 65_536,
      inputBytes: 2,
      outputBytes: 4,
      logBytes: 5,
      logDroppedBytes: 0,
    });
    expect(measured[0]!.wallMs).toBeGreaterThan(0);
    expect(measured[0]!.prepareMs).toBeGreaterThan(0);
    expect(measured[1]).toMatchObject({ logBytes: 5, logDroppedBytes: 3 });
  });

  test('observes the time it is told, exactly, and 1970 when it is told none', async () => {
    const { manager, add } = open();
    await using _ = manager;
    const ref = add(
      program(
        `(drop (call $clock_time_get (i32.const 0) (i64.const 0) (i32.const 1024)))
         ${list('(i32.load (i32.const 1024))', '(i32.load (i32.const 1028))')}`,
        { wasi: ['clock_time_get'] },
      ),
    );
    const seen = async (now?: number | bigint | Date): Promise<bigint> => {
      const [low, high] = JSON.parse(text(await manager.run(ref, '', now === undefined ? {} : { now }))) as [
        number,
        number,
      ];
      return BigInt(low) + (BigInt(high) << 32n);
    };
    expect(await seen()).toBe(0n);
    expect(await seen(new Date('2026-05-25T12:00:00.123Z'))).toBe(1779710400123000000n);
    expect(await seen(1779710400123000001n)).toBe(1779710400123000001n);
  });

  test('has the same random bytes each time, others for another seed, and real ones when asked', async () => {
    const { manager, add } = open();
    await using _ = manager;
    const ref = add(
      program(
        `(drop (call $random_get (i32.const 1024) (i32.const 4))) (drop (call $random_get (i32.const 1028) (i32.const 4)))
         ${list('(i32.load (i32.const 1024))', '(i32.load (i32.const 1028))')}`,
        { wasi: ['random_get'] },
      ),
    );
    const words = Buffer.from('9d93beec08720551', 'hex');
    const reference = JSON.stringify([words.readUInt32LE(0), words.readUInt32LE(4)]);
    expect(text(await manager.run(ref, ''))).toBe(reference);
    expect(text(await manager.run(ref, ''))).toBe(reference);
    const seeded = text(await manager.run(ref, '', { seed: 1n }));
    expect(seeded).not.toBe(reference);
    expect(text(await manager.run(ref, '', { seed: 1n }))).toBe(seeded);
    const host = [1, 2].map(async () => text(await manager.run(ref, '', { random: 'host' })));
    expect(new Set([reference, seeded, ...(await Promise.all(host))]).size).toBe(4);
  });

  test('has a monotonic clock that only moves by being read and by sleeping', async () => {
    const { manager, add } = open();
    await using _ = manager;
    const ref = add(
      program(
        `(drop (call $clock_time_get (i32.const 1) (i64.const 0) (i32.const 1024)))
         (i32.store (i32.const 2064) (i32.const 1)) (i64.store (i32.const 2072) (i64.const 5000000))
         (drop (call $poll_oneoff (i32.const 2048) (i32.const 3072) (i32.const 1) (i32.const 8)))
         (drop (call $clock_time_get (i32.const 1) (i64.const 0) (i32.const 1032)))
         ${list('(i32.load (i32.const 1024))', '(i32.load (i32.const 1032))')}`,
        { wasi: ['clock_time_get', 'poll_oneoff'] },
      ),
    );
    expect(text(await manager.run(ref, ''))).toBe('[1000,5002000]');
    const [first, second] = JSON.parse(text(await manager.run(ref, '', { clock: 'host' }))) as [
      number,
      number,
    ];
    expect(first).not.toBe(1000);
    expect(second).not.toBe(first);
  });

  test('starts from nothing each time', async () => {
    const { manager, add } = open(1);
    await using _ = manager;
    const ref = add(
      program(
        `(global.set $g (i32.add (global.get $g) (i32.const 1)))
         (i32.store (i32.const 1024) (i32.add (i32.load (i32.const 1024)) (i32.const 1)))
         ${list('(global.get $g)', '(i32.load (i32.const 1024))')}`,
        { fields: '(global $g (mut i32) (i32.const 0))' },
      ),
    );
    for (let round = 0; round < 3; round += 1) expect(text(await manager.run(ref, ''))).toBe('[1,1]');
  });

  test('starts from nothing also where its instance was made ahead of it', async () => {
    const { manager, add } = open(1);
    await using _ = manager;
    // Counts in a global, in a table's size and in its memory.
    const ref = add(
      program(
        `(global.set $count (i32.add (global.get $count) (i32.const 1)))
         (drop (table.grow $table (ref.null func) (i32.const 1)))
         (i32.store (i32.const 2048) (i32.add (i32.load (i32.const 2048)) (i32.const 1)))
         ${list('(global.get $count)', '(table.size $table)', '(i32.load (i32.const 2048))')}`,
        { fields: '(global $count (mut i32) (i32.const 0)) (table $table 0 funcref)' },
      ),
    );
    const other = add(program(list('(i32.const 7)')));
    for (let round = 0; round < 6; round += 1) expect(text(await manager.run(ref, '{}'))).toBe('[1,1,1]');
    // What was made ahead is for the same code, with the same limits, and for nothing else.
    expect(text(await manager.run(other, '{}'))).toBe('[7]');
    expect(text(await manager.run(ref, '{}', { maxMemoryMb: 16 }))).toBe('[1,1,1]');
    expect(text(await manager.run(ref, '{}'))).toBe('[1,1,1]');
    const { signal } = new AbortController();
    for (let round = 0; round < 3; round += 1)
      expect(text(await manager.run(ref, '{}', { signal }))).toBe('[1,1,1]');
  });

  test('that cannot be instantiated says so each time, and hinders nobody', async () => {
    const { manager, add } = open(1);
    await using _ = manager;
    const ref = add(wat('(module (memory 1) (data (i32.const 70000) "x") (func (export "_start")))'));
    const good = add(program(list('(i32.const 7)')));
    for (let round = 0; round < 4; round += 1) {
      await expect(manager.run(ref, '{}')).rejects.toMatchObject({ details: { reason: 'trap' } });
    }
    expect(text(await manager.run(good, '{}'))).toBe('[7]');
  });

  test('gives inputs and outputs of every size back whole, large and small ones in turn', async () => {
    const { manager, add } = open(1);
    await using _ = manager;
    const ref = add(echo());
    const sizes = [2, SHARED_BYTES, SHARED_BYTES + 1, 3, 200_000, SHARED_BYTES - 1, 4, 2];
    for (const [index, size] of sizes.entries()) {
      const input = JSON.stringify(String(index).repeat(size - 2));
      expect(text(await manager.run(ref, input))).toBe(input);
    }
    // A small input with a large output, and the other way round.
    const many = add(
      program(`(call $write (i32.const 1) (i32.const 50) (i32.const 1))
        (local.set $a (i32.const 20000))
        (loop $more (call $num (local.get $a)) (call $write (i32.const 1) (i32.const 51) (i32.const 1))
          (br_if $more (local.tee $a (i32.sub (local.get $a) (i32.const 1)))))
        (call $num (i32.const 0)) (call $write (i32.const 1) (i32.const 52) (i32.const 1))`),
    );
    expect(JSON.parse(text(await manager.run(many, '{}')))).toHaveLength(20_001);
    const few = add(program(list('(i32.const 1)')));
    expect(text(await manager.run(few, JSON.stringify('x'.repeat(100_000))))).toBe('[1]');
  });

  test('with another memory limit is another module', async () => {
    const { manager, add } = open(1);
    await using _ = manager;
    const ref = add(
      program(
        `(loop $more (br_if $more (i32.ne (memory.grow (i32.const 1)) (i32.const -1)))) ${list('(memory.size)')}`,
      ),
    );
    for (const maxMemoryMb of [1, 2, 3, 4, 5, 1]) {
      expect(text(await manager.run(ref, '', { maxMemoryMb }))).toBe(`[${maxMemoryMb * 16}]`);
    }
  });

  test('of a thousand at once, each gets its own answer', async () => {
    const { manager, add } = open(2);
    await using _ = manager;
    const ref = add(echo());
    const answers = await Promise.all(
      Array.from({ length: 1_000 }, async (_value, index) => text(await manager.run(ref, String(index)))),
    );
    expect(answers).toEqual(Array.from({ length: 1_000 }, (_value, index) => String(index)));
  });

  test('more than a worker keeps in mind, again and again', async () => {
    const { manager, add } = open(1);
    await using _ = manager;
    const refs = Array.from({ length: 70 }, (_value, index) => add(program(list(`(i32.const ${index})`))));
    for (let round = 0; round < 2; round += 1) {
      for (const [index, ref] of refs.entries()) expect(text(await manager.run(ref, ''))).toBe(`[${index}]`);
    }
  });

  test('is killed at its limit although the thread that asked for it is busy', async () => {
    const { manager, add } = open();
    await using _ = manager;
    await manager.ready();
    const measured: Metrics[] = [];
    const run = manager.run(add(loop()), '', { maxWallMs: 100, metricsSink: (one) => measured.push(one) });
    const failed = expect(run).rejects.toMatchObject({ code: 'deadline_exceeded' });
    // Lets the call get to its worker, and then nothing happen here for a second.
    await new Promise((resolve) => setTimeout(resolve, 20));
    const until = performance.now() + 1_000;
    while (performance.now() < until);
    await failed;
    expect(measured[0]!.status).toBe('wall-limit');
    expect(measured[0]!.wallMs).toBeGreaterThanOrEqual(100);
    expect(measured[0]!.wallMs).toBeLessThan(800);
  });

  test('rejects with the reason of its signal, once the guest is gone', async () => {
    const { manager, add } = open(1);
    await using _ = manager;
    await manager.ready();
    const controller = new AbortController();
    const measured: Metrics[] = [];
    const said = program('(call $write (i32.const 2) (i32.const 50) (i32.const 1)) (loop $l (br $l))');
    const run = manager.run(add(said), '', {
      signal: controller.signal,
      stderr: () => controller.abort(new Error('enough')),
      metricsSink: (metrics) => measured.push(metrics),
    });
    await expect(run).rejects.toThrow('enough');
    expect(measured).toMatchObject([{ status: 'trapped', reason: 'canceled', logBytes: 1 }]);
    expect(text(await manager.run(add(echo()), '[1]'))).toBe('[1]');
  });

  test('that waits rejects when its signal aborts, and one that was aborted before never begins', async () => {
    const { manager, add } = open(1);
    await using _ = manager;
    const controller = new AbortController();
    const first = manager.run(add(loop()), '', { maxWallMs: 300 }).catch(computeReason);
    const second = manager.run(add(echo()), '', { signal: controller.signal });
    controller.abort(new Error('not any more'));
    await expect(second).rejects.toThrow('not any more');
    await expect(manager.run(add(echo()), '', { signal: controller.signal })).rejects.toThrow('not any more');
    expect(await first).toBe('wall-limit');
  });

  test('fails with what its log writer or metrics sink threw', async () => {
    const { manager, add } = open(1);
    await using _ = manager;
    const ref = add(program('(call $write (i32.const 2) (i32.const 50) (i32.const 1))'));
    const fail = (): never => {
      throw new Error('the sink is blocked');
    };
    await expect(manager.run(ref, '', { stderr: fail })).rejects.toThrow('the sink is blocked');
    await expect(manager.run(ref, '', { metricsSink: fail })).rejects.toThrow('the sink is blocked');
    expect(text(await manager.run(ref, ''))).toBe('{}');
  });
});

describe('a manager', () => {
  test('without a resolver says so', async () => {
    await using manager = new ComputeManager(null);
    await expect(manager.run({ alg: 'sha256', digest: '0'.repeat(64) }, '')).rejects.toMatchObject({
      code: 'failed_precondition',
      message: 'compute: no resolver configured',
    });
  });

  test('passes on what its resolver throws, and refuses refs nothing can have', async () => {
    const problem = new Error('the store is on fire');
    await using manager = new ComputeManager({ resolve: () => Promise.reject(problem) });
    await expect(manager.run({ alg: 'sha256', digest: '0'.repeat(64) }, '')).rejects.toBe(problem);
    await expect(manager.run('compute://md5/0', '')).rejects.toMatchObject({
      details: { reason: 'bad-ref' },
    });
  });

  test('asks its resolver once for what it keeps, and each time when it may keep nothing', async () => {
    const wasm = echo();
    const ref = refOf(wasm);
    let asked = 0;
    const resolver: Resolver = {
      resolve: (): Promise<Artifact> => {
        asked += 1;
        return Promise.resolve({ ...ref, engine: 'wasm', wasm });
      },
    };
    await using keeping = new ComputeManager(resolver, PATIENT, { workers: 1 });
    for (let round = 0; round < 3; round += 1) await keeping.run(ref, '');
    expect(asked).toBe(1);
    await using forgetting = new ComputeManager(resolver, PATIENT, { workers: 1, maxCacheBytes: 0 });
    for (let round = 0; round < 3; round += 1) await forgetting.run(ref, '');
    expect(asked).toBe(4);
  });

  test('opens an engine once per name, and again after a failure', async () => {
    let opened = 0;
    registerEngine('moody', () => {
      opened += 1;
      if (opened === 1) throw new Error('not today');
      return {
        name: 'moody',
        load: () =>
          Promise.resolve({
            invoke: () => Promise.resolve(Buffer.from('1')),
            close: () => Promise.reject(new Error('nobody hears of this')),
          }),
        close: () => Promise.resolve(),
      };
    });
    const { manager, add } = open();
    await using _ = manager;
    const ref = add(echo(3), 'moody');
    await expect(manager.run(ref, '')).rejects.toThrow('not today');
    for (let round = 0; round < 3; round += 1) expect(text(await manager.run(ref, ''))).toBe('1');
    expect(opened).toBe(2);
  });

  test('refuses limits out of their bounds when it is made and when it runs', async () => {
    expect(() => new ComputeManager(null, { maxWallMs: 0 })).toThrow(/maxWallMs/);
    expect(() => new ComputeManager(null, {}, { workers: 0 })).toThrow(/workers must be a whole number/);
    const { manager, add } = open();
    await using _ = manager;
    await expect(manager.run(add(echo()), '', { maxMemoryMb: -1 })).rejects.toThrow(/maxMemoryMb/);
  });

  test('that closes ends what is under way and waits, and what comes later is refused', async () => {
    const { manager, add } = open(1);
    await manager.ready();
    const running = manager.run(add(loop()), '').catch(computeReason);
    const waiting = manager.run(add(echo()), '').catch(computeReason);
    await Promise.resolve();
    const closing = manager.close();
    expect(manager.close()).toBe(closing);
    await closing;
    expect(await running).toBe('closed');
    expect(await waiting).toBe('closed');
    await expect(manager.run(add(echo()), '')).rejects.toMatchObject({ details: { reason: 'closed' } });
  });

  test('runs the example of the reference under its name wazero, and hands out no secret in an error', async () => {
    const { manager, add } = open(1);
    await using _ = manager;
    const ref = add(
      wat(`(module ${wasiImports('proc_exit')} (func (export "_start") (call $proc_exit (i32.const 3))))`),
      'wazero',
    );
    await expect(manager.run(ref, '{"password":"hunter2"}')).rejects.toMatchObject({
      code: 'invalid_argument',
      message: 'compute: guest trapped: module closed with exit_code(3)',
      details: expect.objectContaining({
        reason: 'exit',
        exitCode: 3,
        metrics: expect.objectContaining({ status: 'trapped' }) as object,
      }) as object,
    });
  });
});
