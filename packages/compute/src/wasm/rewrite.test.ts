import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { MillraceError } from '@millrace/runner';
import { echo, program, wat } from '../fixtures/wat.ts';
import { DEFAULT_LIMITS } from '../limits.ts';
import { inspectModule } from './inspect.ts';
import { readModule } from './module.ts';
import { rewriteModule } from './rewrite.ts';

const rewrite = (wasm: Uint8Array, limits = DEFAULT_LIMITS) =>
  rewriteModule(readModule(wasm, limits), limits);

/** The module with a custom section at its end. */
function withCustom(wasm: Uint8Array, name: string, payload: readonly number[] = [1]): Uint8Array {
  const body = [name.length, ...Buffer.from(name), ...payload];
  return new Uint8Array([...wasm, 0, body.length, ...body]);
}

describe('a rewritten module', () => {
  test('is the same each time, and does not change when it is rewritten again but for its private exports', () => {
    const once = rewrite(echo());
    expect(rewrite(echo()).bytes).toEqual(once.bytes);
    const twice = rewrite(once.bytes);
    expect(twice.memory).toBe("millrace:memory'");
    expect(readModule(twice.bytes, DEFAULT_LIMITS).memory).toEqual({ min: 1, max: 512 });
  });

  test('has its memory and tables bounded in its bytes, and no start section', () => {
    const { bytes, entries } = rewrite(
      wat(
        `(module (table 3 funcref) (table 4 9 externref) (memory 2) (func $s) (start $s) (func (export "_start")))`,
      ),
    );
    const module = readModule(bytes, DEFAULT_LIMITS);
    expect(module.memory).toEqual({ min: 2, max: 512 });
    expect(module.tables).toEqual([
      { element: 'funcref', min: 3, max: 65_536 },
      { element: 'externref', min: 4, max: 9 },
    ]);
    expect(module.start).toBeNull();
    expect(entries).toEqual(['millrace:start', '_start']);
    expect(WebAssembly.validate(bytes)).toBe(true);
  });

  test('owns the memory it would have imported, and its functions keep their indices', () => {
    const { bytes } = rewrite(
      wat(`(module (import "wasi_snapshot_preview1" "sched_yield" (func (result i32)))
        (import "env" "memory" (memory 1 2)) (import "wasi_snapshot_preview1" "fd_close" (func $c (param i32) (result i32)))
        (func (export "_start") (drop (call $c (i32.const 0)))))`),
    );
    const module = readModule(bytes, DEFAULT_LIMITS);
    expect(module.imports.map((one) => one.name)).toEqual(['sched_yield', 'fd_close']);
    expect(module.memory).toEqual({ min: 1, max: 2 });
    expect(WebAssembly.validate(bytes)).toBe(true);
  });

  test('keeps function names, and no other custom section', () => {
    let wasm = echo();
    for (const name of ['sourceMappingURL', 'name', 'metadata.code.branch_hint'])
      wasm = withCustom(wasm, name, [0]);
    const { customSections } = inspectModule(rewrite(wasm).bytes);
    expect(customSections.map((one) => one.name)).toEqual(['name']);
  });

  test('calls a function before each instruction that takes as long as it is told, and is still valid', () => {
    const wasm = program(
      `(memory.fill (i32.const 0) (i32.const 0) (i32.const 1)) (memory.copy (i32.const 0) (i32.const 0) (i32.const 1))
       (memory.init $d (i32.const 0) (i32.const 0) (i32.const 1)) (drop (memory.grow (i32.const 0))) (data.drop $d)
       (table.fill $t (i32.const 0) (ref.null func) (i32.const 1)) (table.copy $t $t (i32.const 0) (i32.const 0) (i32.const 1))
       (drop (table.grow $t (ref.null func) (i32.const 0))) (drop (table.size $t))`,
      { fields: '(table $t 1 funcref) (data $d "x")' },
    );
    const before = readModule(wasm, DEFAULT_LIMITS);
    const after = readModule(rewrite(wasm).bytes, DEFAULT_LIMITS);
    expect(after.functions.length).toBe(before.functions.length + 1);
    const last = before.bodies.length - 1;
    expect(before.long[last]).toHaveLength(7);
    const size = (module: typeof before): number => module.bodies[last]![1] - module.bodies[last]![0];
    expect(size(after) - size(before)).toBe(14);
    expect(WebAssembly.validate(after.bytes)).toBe(true);
  });
});

test('no bytes make the reader do anything but accept or refuse a module', () => {
  const seed = program('(memory.fill (i32.const 0) (i32.const 0) (i32.const 1))', {
    fields: '(table $t 1 funcref) (elem (i32.const 0) $num) (global i64 (i64.const -5)) (data "x")',
  });
  fc.assert(
    fc.property(
      fc.array(fc.tuple(fc.nat(seed.length - 1), fc.nat(255)), { minLength: 1, maxLength: 4 }),
      fc.nat(seed.length),
      (changes, cut) => {
        const wasm = seed.slice(0, changes.length % 2 === 0 ? cut : seed.length);
        for (const [at, value] of changes) if (at < wasm.length) wasm[at] = value;
        try {
          const { bytes } = rewrite(wasm);
          // What V8 takes of the original it takes rewritten.
          if (WebAssembly.validate(wasm)) expect(WebAssembly.validate(bytes)).toBe(true);
        } catch (error) {
          expect(MillraceError.is(error) && error.details['reason']).toBe('module');
        }
      },
    ),
    { numRuns: 3_000 },
  );
});

test('inspecting tells what a module has, and why it would be refused', () => {
  expect(inspectModule(echo())).toMatchObject({
    functions: 3,
    memory: { min: 1, max: null },
    hasStartSection: false,
    refusal: null,
  });
  const summary = inspectModule(
    wat('(module (import "env" "f" (func (param i64))) (func (export "main") (result f32) unreachable))'),
  );
  expect(summary.imports).toEqual([
    { module: 'env', name: 'f', kind: 'function', type: { params: ['i64'], results: [] } },
  ]);
  expect(summary.exports).toEqual([
    { name: 'main', kind: 'function', index: 1, type: { params: [], results: ['f32'] } },
  ]);
  expect(summary.refusal).toMatch(/imports the function "env" "f"/);
});
