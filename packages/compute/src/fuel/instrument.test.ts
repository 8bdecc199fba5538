import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import '../index.ts';
import { computeReason } from '../errors.ts';
import { echo, list, program, wasiImports, wat } from '../fixtures/wat.ts';
import { resolveLimits } from '../limits.ts';
import type { InvokeOptions, Metrics } from '../limits.ts';
import { ComputeManager } from '../manager.ts';
import { memoryResolver } from '../resolver.ts';
import { readModule } from '../wasm/module.ts';
import { FLAT_PRICE, HOST_CALL_PRICE, LARGE_BODY, instrument } from './instrument.ts';

const READ = { maxFunctions: 100_000, maxImports: 100 };
const PLENTY = 10 ** 15;

/** Exports of a module that counts, and what a call of one of them uses. */
function metered(text: string): {
  readonly exports: Readonly<Record<string, (...args: number[]) => unknown>>;
  readonly used: (run: () => unknown, fuel?: number) => number;
} {
  const { bytes, fuel } = instrument(readModule(wat(text), READ), { fuel: true });
  const { exports } = new WebAssembly.Instance(new WebAssembly.Module(bytes), {});
  const global = exports[fuel ?? ''] as WebAssembly.Global;
  return {
    exports: exports as Readonly<Record<string, (...args: number[]) => unknown>>,
    used: (run, tank = PLENTY) => {
      global.value = BigInt(tank);
      run();
      return tank - Number(global.value);
    },
  };
}

/** Functions that take every way there is out of a function and out of a loop, and call one another on the way. */
const WAYS = `(module
  (type $v (func))
  (table 2 funcref) (elem (i32.const 0) $tiny $work)
  (memory 1)
  (func $tiny (param $x i32) (result i32) (i32.add (local.get $x) (i32.const 1)))
  (func $work (param $n i32) (result i32) (local $s i32)
    (loop $l (local.set $s (i32.add (local.get $s) (local.get $n))) (br_if $l (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))
    (local.get $s))
  (func (export "fall") (param $n i32) (result i32) (call $work (local.get $n)))
  (func (export "return") (param $n i32) (result i32)
    (loop $l
      (if (i32.eqz (local.get $n)) (then (return (i32.const 7))))
      (local.set $n (i32.sub (local.get $n) (i32.const 1))) (br $l))
    (unreachable))
  (func $branch (export "branch") (param $n i32) (result i32)
    (loop $l
      (br_if 1 (i32.const 8) (i32.eqz (local.get $n))) (drop)
      (local.set $n (i32.sub (local.get $n) (i32.const 1))) (br $l))
    (unreachable))
  (func (export "table") (param $n i32) (result i32) (local $k i32)
    (loop $l
      (local.set $k (i32.eqz (local.get $n)))
      (local.set $n (i32.sub (local.get $n) (i32.const 1)))
      (drop (block $b (result i32) (br_table $b 2 (i32.const 9) (local.get $k)))) (br $l))
    (unreachable))
  (func (export "calls") (param $n i32) (result i32) (local $s i32)
    (loop $l
      (local.set $s (i32.add (local.get $s) (call $work (local.get $n))))
      (local.set $s (call $tiny (local.get $s)))
      (local.set $s (i32.add (local.get $s) (call_indirect (param i32) (result i32) (local.get $n) (i32.const 1))))
      (br_if $l (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))
    (local.get $s))
  (func (export "loopFirst") (param $n i32) (result i32)
    loop $l (result i32)
      local.get $n call $work
      local.get $n i32.const 1 i32.sub local.tee $n br_if $l
    end)
  (func $recurse (export "recurse") (param $n i32) (result i32)
    (if (result i32) (local.get $n) (then (call $recurse (i32.sub (local.get $n) (i32.const 1)))) (else (i32.const 3)))))`;

const WAY_NAMES = ['fall', 'return', 'branch', 'table', 'calls', 'loopFirst', 'recurse'] as const;

describe('a metered module', () => {
  test.each(WAY_NAMES)('does what it did before: %s', (name) => {
    const plain = new WebAssembly.Instance(new WebAssembly.Module(wat(WAYS)), {}).exports;
    const { exports } = metered(WAYS);
    for (const n of [1, 2, 17, 100]) {
      expect(exports[name]!(n)).toBe((plain[name] as (n: number) => unknown)(n));
    }
  });

  test.each([...WAY_NAMES])('counts every turn whichever way it ends: %s', (name) => {
    const { exports, used } = metered(WAYS);
    const cost = (n: number): number => used(() => exports[name]!(n));
    const [few, more, most] = [cost(10), cost(20), cost(40)];
    expect(cost(20)).toBe(more);
    if (name === 'calls' || name === 'loopFirst') {
      // The inner work is quadratic.
      expect(most - more).toBeGreaterThan(2 * (more - few));
    } else expect(most - more).toBe(2 * (more - few));
    expect(more - few).toBeGreaterThanOrEqual(10);
  });

  test.each([...WAY_NAMES])('stops at the same place each time, at the limit and not before: %s', (name) => {
    const { exports, used } = metered(WAYS);
    const cost = used(() => exports[name]!(25));
    expect(used(() => exports[name]!(25), cost)).toBe(cost);
    for (const tank of [cost - 1, 0]) {
      expect(() => used(() => exports[name]!(25), tank)).toThrow(WebAssembly.RuntimeError);
    }
  });

  test('charges the way it goes through straight-line code by its instructions', () => {
    const { exports, used } = metered(`(module (func (export "f") (param i32) (result i32)
      (loop $l (br_if $l (local.tee 0 (i32.sub (local.get 0) (i32.const 1))))) (local.get 0)))`);
    // Five a turn: local.get, i32.const, i32.sub, local.tee, br_if.
    expect(used(() => exports['f']!(11)) - used(() => exports['f']!(1))).toBe(50);
  });

  test('lets callers pay for small functions, and charges calls through a table', () => {
    const leaf = (call: string): number => {
      const { exports, used } = metered(`(module (table 1 funcref) (elem (i32.const 0) $leaf)
        (func $leaf (param i32) (result i32) (i32.add (local.get 0) (i32.const 1)))
        (func (export "f") (result i32) (local i32) (loop $l (drop ${call})
          (br_if $l (i32.lt_u (local.tee 0 (i32.add (local.get 0) (i32.const 1))) (i32.const 1000)))) (local.get 0)))`);
      return used(() => exports['f']!()) / 1000;
    };
    const nothing = leaf('(i32.const 1)');
    const direct = leaf('(call $leaf (i32.const 1))') - nothing;
    expect(direct).toBeCloseTo(4, 0);
    const indirect = leaf('(call_indirect (param i32) (result i32) (i32.const 1) (i32.const 0))') - nothing;
    expect(indirect).toBeCloseTo(FLAT_PRICE + 1, 0);
  });

  test('charges bulk work by its length', () => {
    const { exports, used } = metered(`(module (memory 1 100) (table 1 10000 funcref)
      (func (export "fill") (param i32) (memory.fill (i32.const 0) (i32.const 1) (local.get 0)))
      (func (export "copy") (param i32) (memory.copy (i32.const 0) (i32.const 1) (local.get 0)))
      (func (export "grow") (param i32) (drop (memory.grow (local.get 0))))
      (func (export "table") (param i32) (drop (table.grow (ref.null func) (local.get 0)))))`);
    const difference = (name: string, less: number, more: number): number =>
      used(() => exports[name]!(more)) - used(() => exports[name]!(less));
    expect(difference('fill', 0, 8_000)).toBe(1_000);
    expect(difference('copy', 0, 8_000)).toBe(1_000);
    expect(difference('grow', 0, 3)).toBe(3 * 8_192);
    expect(difference('table', 0, 500)).toBe(500);
    // Before it is done, not after.
    expect(() => used(() => exports['grow']!(50), 8_192)).toThrow(WebAssembly.RuntimeError);
  });

  test('counts very large functions by the turn', () => {
    const filler = '(drop (i32.const 1))'.repeat(LARGE_BODY / 3 + 10);
    const { exports, used } = metered(`(module (func (export "f") (param i32)
      (loop $l (br_if $l (local.tee 0 (i32.sub (local.get 0) (i32.const 1)))) ) ${filler}))`);
    expect(used(() => exports['f']!(10))).toBe(11 * FLAT_PRICE);
  });

  test('with a chain of 20,000 functions, each calling the next, is counted as well', () => {
    const chain = Array.from(
      { length: 20_000 },
      (_, at) => `(func $f${at} ${at < 19_999 ? `(call $f${at + 1})` : ''})`,
    );
    const { exports, used } = metered(`(module ${chain.join('')} (func (export "f") (call $f19900)))`);
    expect(used(() => exports['f']!())).toBe(100);
  });

  test('keeps its own globals and an export of the counter’s name', () => {
    const { bytes, fuel } = instrument(
      readModule(
        wat(
          `(module (global $g (mut i32) (i32.const 5)) (func (export "millrace:fuel") (result i32) (global.get $g)))`,
        ),
        READ,
      ),
      { fuel: true },
    );
    expect(fuel).toBe("millrace:fuel'");
    const { exports } = new WebAssembly.Instance(new WebAssembly.Module(bytes), {});
    expect((exports['millrace:fuel'] as () => number)()).toBe(5);
  });
});

describe('cards', () => {
  test('tell every 4 KiB that was written, whatever wrote it', () => {
    const CARDS = 0x8000;
    const stores = ['i32.store', 'i32.store8', 'i32.store16'].map(
      (op) => `(func (export "${op}") (param i32) (${op} offset=4096 (local.get 0) (i32.const 255)))`,
    );
    const others = [
      '(func (export "i64.store") (param i32) (i64.store offset=4096 (local.get 0) (i64.const -1)))',
      '(func (export "f32.store") (param i32) (f32.store offset=4096 (local.get 0) (f32.const 1)))',
      '(func (export "f64.store") (param i32) (f64.store offset=4096 (local.get 0) (f64.const 1)))',
      '(func (export "v128.store") (param i32) (v128.store offset=4096 (local.get 0) (v128.const i32x4 1 1 1 1)))',
      '(func (export "v128.store8_lane") (param i32) (v128.store8_lane offset=4096 3 (local.get 0) (v128.const i32x4 1 1 1 1)))',
      '(func (export "fill") (param i32) (memory.fill (i32.add (local.get 0) (i32.const 4096)) (i32.const 1) (i32.const 8193)))',
      '(func (export "none") (param i32) (memory.fill (i32.add (local.get 0) (i32.const 4096)) (i32.const 1) (i32.const 0)))',
    ];
    const { bytes } = instrument(
      readModule(wat(`(module (memory (export "memory") 2) ${stores.join('')} ${others.join('')})`), READ),
      { fuel: false, cards: CARDS },
    );
    const { exports } = new WebAssembly.Instance(new WebAssembly.Module(bytes), {});
    const memory = new Uint8Array((exports['memory'] as WebAssembly.Memory).buffer);
    const cards = memory.subarray(CARDS, CARDS + 32);
    for (const [name, run] of Object.entries(exports)) {
      if (typeof run !== 'function') continue;
      cards.fill(0);
      (run as (at: number) => void)(3 * 4096);
      const marked = [...cards.keys()].filter((block) => cards[block] === 1);
      expect(marked, name).toEqual(name === 'fill' ? [4, 5, 6] : [4]);
      if (name !== 'none') expect(memory[4 * 4096], name).not.toBe(255 + 1);
    }
  });
});

describe('fuel of the wasm engine', () => {
  const resolver = memoryResolver();
  let manager: ComputeManager;

  beforeAll(async () => {
    manager = new ComputeManager(resolver, { maxWallMs: 60_000, maxPrepareMs: 60_000 }, { workers: 2 });
    await manager.ready();
  });

  afterAll(() => manager.close());

  async function run(
    module: Uint8Array,
    options: InvokeOptions,
  ): Promise<{ readonly output: string; readonly metrics: Metrics | null; readonly error: unknown }> {
    let metrics: Metrics | null = null;
    const ended = await manager
      .run(resolver.add(module), '{"in":1}', { ...options, metricsSink: (measured) => (metrics = measured) })
      .then(
        (output) => ({ output: Buffer.from(output).toString(), error: null }),
        (error: unknown) => ({ output: '', error }),
      );
    return { ...ended, metrics };
  }

  test('is not counted unless it is asked for', async () => {
    expect((await run(echo(), {})).metrics).toMatchObject({ status: 'ok', fuelUsed: null });
  });

  test('is the same for the same module and input in every run and every manager', async () => {
    const counts = await Promise.all(
      Array.from({ length: 6 }, async () => (await run(echo(), { maxFuel: PLENTY })).metrics?.fuelUsed),
    );
    await using other = new ComputeManager(resolver, { maxFuel: 10 ** 9 }, { workers: 1 });
    let elsewhere: number | null = null;
    await other.run(resolver.add(echo()), '{"in":1}', {
      metricsSink: ({ fuelUsed }) => (elsewhere = fuelUsed),
    });
    expect(new Set([...counts, elsewhere]).size).toBe(1);
    // Two reads and a write of the host.
    expect(elsewhere).toBeGreaterThan(3 * HOST_CALL_PRICE);
  });

  test('at the limit the guest ends well, one unit less and it is out of fuel', async () => {
    const fuel = (await run(echo(), { maxFuel: PLENTY })).metrics?.fuelUsed ?? Number.NaN;
    expect((await run(echo(), { maxFuel: fuel })).output).toBe('{"in":1}');
    const { error, metrics } = await run(echo(), { maxFuel: fuel - 1 });
    expect(computeReason(error)).toBe('out-of-fuel');
    expect((error as Error).message).toContain(`guest used up its fuel, maxFuel ${fuel - 1}`);
    expect(metrics).toMatchObject({ status: 'trapped', reason: 'out-of-fuel', fuelUsed: fuel - 1 });
  });

  test.each([
    ['an endless loop', program('(loop $l (br $l))')],
    [
      'endless calls of the host',
      program('(loop $l (call $write (i32.const 2) (i32.const 50) (i32.const 1)) (br $l))'),
    ],
    ['endless recursion of little depth', program('(loop $l (call $f) (br $l))', { fields: '(func $f)' })],
    ['memory that grows for ever', program('(loop $l (drop (memory.grow (i32.const 1))) (br $l))')],
    [
      'endless random bytes',
      program('(loop $l (drop (call $random_get (i32.const 64) (i32.const 60000))) (br $l))', {
        wasi: ['random_get'],
      }),
    ],
    [
      'a loop in the start section',
      wat('(module (func $s (loop $l (br $l))) (start $s) (func (export "_start")))'),
    ],
  ])('ends %s', async (_, module) => {
    const { error } = await run(module, { maxFuel: 1_000_000 });
    expect(computeReason(error)).toBe('out-of-fuel');
  });

  test('a trap of the guest’s own stays one, an exit as well', async () => {
    const trap = await run(program('(unreachable)'), { maxFuel: 10_000 });
    expect(computeReason(trap.error)).toBe('trap');
    expect(trap.metrics?.fuelUsed).toBeGreaterThan(0);
    const exit = await run(program('(call $proc_exit (i32.const 3))', { wasi: ['proc_exit'] }), {
      maxFuel: 10_000,
    });
    expect(computeReason(exit.error)).toBe('exit');
  });

  test('does not change what a guest computes', async () => {
    const module = program(list('(i32.const 3)', '(call $random)'), {
      wasi: ['random_get'],
      fields:
        '(func $random (result i32) (drop (call $random_get (i32.const 64) (i32.const 4))) (i32.load (i32.const 64)))',
    });
    const plain = await run(module, {});
    expect(plain.output).toMatch(/^\[3,\d+\]$/);
    expect((await run(module, { maxFuel: PLENTY })).output).toBe(plain.output);
  });

  test.each([
    ['a global', '(func (export "_start") (global.set 0 (i64.const 99999)))'],
    [
      'a local',
      '(func (export "_start") (local i32) (loop $l (local.set 1 (i64.const 99999)) (br_if $l (local.get 0))))',
    ],
    ['a global, in its exports', '(func (export "_start")) (export "g" (global 0))'],
  ])('a module that names %s it does not have, where the counter would be, is refused', async (_, fields) => {
    const module = wat(`(module ${wasiImports('fd_write')} ${fields})`);
    for (const maxFuel of [null, 1_000]) {
      expect(computeReason((await run(module, { maxFuel })).error)).toBe('module');
    }
  });

  test.each([-1, 1.5, Number.NaN, 2 ** 53, '7'])('a limit of %s is refused', (maxFuel) => {
    expect(() => resolveLimits({ maxFuel: maxFuel as number })).toThrow(
      'maxFuel must be a whole number from 0',
    );
  });
});
