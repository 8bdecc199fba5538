import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { inspectModule } from './inspect.ts';
import { refOf } from '../artifact.ts';
import { computeReason } from '../errors.ts';
import { wasiImports, wat } from '../fixtures/wat.ts';
import type { Limits, Metrics } from '../limits.ts';
import { ComputeManager } from '../manager.ts';
import './engine.ts';
import { memoryResolver } from '../resolver.ts';
import type { MemoryResolver } from '../resolver.ts';

const NAMESPACE = 'javy-test-plugin-v1';

/** A module with a custom section behind it. */
function withSection(module: Uint8Array, name: string, content: string): Uint8Array {
  const payload = [name.length, ...Buffer.from(name), ...Buffer.from(content)];
  return Buffer.concat([module, Buffer.from([0, payload.length, ...payload])]);
}

/**
 * Plays Javy's plugin: allocates, keeps what it was told when it was initialised at 1024 (length at 16), counts its calls
 * at 20, and when invoked runs `body` with the compute's code at `$p`, `$n`.
 */
function plugin(
  body: string,
  parts: { readonly pages?: string; readonly initialize?: string } = {},
): Uint8Array {
  return withSection(
    wat(`(module
      ${wasiImports('fd_read', 'fd_write', 'proc_exit')}
      (memory (export "memory") ${parts.pages ?? '2'})
      (global $deep (mut i32) (i32.const 0))
      (data (i32.const 64) "{\\"told\\":,\\"code\\":\\"\\",\\"calls\\":,\\"input\\":}")
      (func $write (param $fd i32) (param $p i32) (param $n i32)
        (i32.store (i32.const 0) (local.get $p)) (i32.store (i32.const 4) (local.get $n))
        (drop (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8))))
      (func $read (param $to i32) (result i32)
        (i32.store (i32.const 0) (local.get $to)) (i32.store (i32.const 4) (i32.const 512))
        (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
        (i32.load (i32.const 8)))
      (func (export "initialize-runtime")
        (i32.store (i32.const 16) (call $read (i32.const 1024)))
        (i32.store (i32.const 24) (i32.const 4096))
        ${parts.initialize ?? ''})
      (func $alloc (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
        (i32.load (i32.const 24))
        (i32.store (i32.const 24) (i32.add (i32.load (i32.const 24)) (local.get 3))))
      (func $loop (loop $again (br $again)))
      (func $digit (param $v i32)
        (i32.store8 (i32.const 40) (i32.add (i32.const 48) (local.get $v)))
        (call $write (i32.const 1) (i32.const 40) (i32.const 1)))
      (func $report (param $p i32) (param $n i32)
        (call $write (i32.const 1) (i32.const 64) (i32.const 8))
        (call $write (i32.const 1) (i32.const 1024) (i32.load (i32.const 16)))
        (call $write (i32.const 1) (i32.const 72) (i32.const 9))
        (call $write (i32.const 1) (local.get $p) (local.get $n))
        (call $write (i32.const 1) (i32.const 81) (i32.const 10))
        (call $digit (i32.load (i32.const 20)))
        (call $write (i32.const 1) (i32.const 91) (i32.const 9))
        (call $write (i32.const 1) (i32.const 2048) (call $read (i32.const 2048)))
        (call $write (i32.const 1) (i32.const 100) (i32.const 1)))
      (func (export "invoke") (param $p i32) (param $n i32) (param i32 i32 i32)
        (i32.store (i32.const 20) (i32.add (i32.load (i32.const 20)) (i32.const 1)))
        ${body}))`),
    'import_namespace',
    NAMESPACE,
  );
}

/** What `javy build -C dynamic` emits: code in a passive segment, handed to the plugin. */
function linked(code: string, parts: { readonly imports?: string; readonly body?: string } = {}): Uint8Array {
  return wat(`(module
    ${
      parts.imports ??
      `(import "${NAMESPACE}" "cabi_realloc" (func $cabi_realloc (param i32 i32 i32 i32) (result i32)))
       (import "${NAMESPACE}" "invoke" (func $invoke (param i32 i32 i32 i32 i32)))
       (import "${NAMESPACE}" "memory" (memory 0))`
    }
    (data $code "${code}")
    (func (export "_start") (local $at i32)
      ${
        parts.body ??
        `(local.set $at (call $cabi_realloc (i32.const 0) (i32.const 0) (i32.const 1) (i32.const ${code.length})))
         (memory.init $code (local.get $at) (i32.const 0) (i32.const ${code.length}))
         (call $invoke (local.get $at) (i32.const ${code.length}) (i32.const 0) (i32.const 0) (i32.const 0))`
      }))`);
}

const REPORT = '(call $report (local.get $p) (local.get $n))';

let computes: MemoryResolver;
let managers: ComputeManager[];
beforeEach(() => {
  computes = memoryResolver();
  managers = [];
});
afterEach(async () => {
  await Promise.all(managers.map((manager) => manager.close()));
});

function managerWith(...plugins: readonly Uint8Array[]): ComputeManager {
  const manager = new ComputeManager(
    computes,
    { maxWallMs: 2_000 },
    { workers: 2, plugins: plugins.map((bytes) => ({ bytes, digest: refOf(bytes).digest })) },
  );
  managers.push(manager);
  return manager;
}

interface Ran {
  readonly output: unknown;
  readonly error: Error | null;
  readonly reason: string | null;
  readonly metrics: Metrics | null;
}

async function run(
  manager: ComputeManager,
  module: Uint8Array,
  limits: Partial<Limits> = {},
  input = '{}',
): Promise<Ran> {
  let metrics: Metrics | null = null;
  try {
    const output = await manager.run(computes.add(module, 'wasm'), input, {
      ...limits,
      metricsSink: (measured) => (metrics = measured),
    });
    return { output: JSON.parse(Buffer.from(output).toString()), error: null, reason: null, metrics };
  } catch (error) {
    return { output: null, error: error as Error, reason: computeReason(error), metrics };
  }
}

describe('a module linked to a plugin', () => {
  test('hands its code to the plugin, which was told its configuration before and reads the input now', async () => {
    const manager = managerWith(plugin(REPORT));
    const { output, error, metrics } = await run(manager, linked('let x = 1'), {}, '{"n":7}');
    expect(error).toBeNull();
    expect(output).toEqual({ told: { 'event-loop': true }, code: 'let x = 1', calls: 1, input: { n: 7 } });
    expect(metrics).toMatchObject({ status: 'ok', memoryBytes: 2 * 65_536 });
  });

  test('begins each call where the initialised plugin stood, whatever was called before', async () => {
    const manager = managerWith(plugin(REPORT));
    const calls = await Promise.all(
      ['a', 'b', 'a', 'c', 'b', 'a'].map(async (code) => (await run(manager, linked(code))).output),
    );
    expect(calls).toEqual(
      ['a', 'b', 'a', 'c', 'b', 'a'].map((code) => expect.objectContaining({ code, calls: 1 })),
    );
  });

  test('finds its plugin among several by the name it imports it under', async () => {
    const other = withSection(
      wat(`(module (memory (export "memory") 1) (func (export "initialize-runtime"))
        (func (export "invoke") (param i32 i32 i32 i32 i32) unreachable))`),
      'import_namespace',
      'javy-test-plugin-v2',
    );
    const manager = managerWith(other, plugin(REPORT));
    expect((await run(manager, linked('x'))).output).toMatchObject({ code: 'x' });
  });

  test('is refused without the plugin, by the name it lacks', async () => {
    const { error, reason, metrics } = await run(managerWith(), linked('x'));
    expect([reason, metrics]).toEqual(['module', null]);
    expect(error?.message).toContain(`"${NAMESPACE}" "cabi_realloc"`);
    expect(error?.message).toContain('to be linked to that plugin it has to be given the file');
  });

  test('may import what the plugin has, with its types, and nothing else', async () => {
    const manager = managerWith(plugin(REPORT));
    const ok = `(import "${NAMESPACE}" "invoke" (func $invoke (param i32 i32 i32 i32 i32)))`;
    for (const [imports, said] of [
      [`${ok} (import "${NAMESPACE}" "compile-src" (func))`, 'which the plugin does not have'],
      [
        `(import "${NAMESPACE}" "invoke" (func $invoke (param i32)))`,
        'as (i32) -> (); in the plugin its type is (i32 i32 i32 i32 i32) -> ()',
      ],
      [
        `${ok} (import "wasi_snapshot_preview1" "proc_exit" (func (param i32)))`,
        'it may import from there alone',
      ],
      [`${ok} (import "env" "memory" (memory 1))`, 'it may import from there alone'],
      [`${ok} (import "${NAMESPACE}" "memory" (memory 3))`, "the plugin's starts with 2"],
      [`${ok} (import "${NAMESPACE}" "memory" (memory 0 9))`, 'has no maximum a module may rely on'],
      [`${ok} (import "${NAMESPACE}" "other" (memory 0))`, 'which the plugin does not have'],
      [`${ok} (import "${NAMESPACE}" "table" (table 1 funcref))`, 'which the plugin does not have'],
      [`${ok} (memory 1)`, 'it has a memory of its own'],
    ] as const) {
      const { error, reason } = await run(manager, linked('', { imports, body: '' }));
      expect([said, reason]).toEqual([said, 'module']);
      expect(error?.message).toContain(said);
    }
  });

  test('has the memory limit of its plugin: to the page, and growing past it is refused to the guest', async () => {
    const grow = `(call $write (i32.const 1) (i32.const 64) (i32.const 8))
      (if (i32.lt_s (memory.grow (i32.const 1)) (i32.const 0))
        (then (call $digit (i32.const 0))) (else (call $digit (i32.const 1))))
      (call $write (i32.const 1) (i32.const 100) (i32.const 1))`;
    const manager = managerWith(plugin(grow, { pages: '16' }));
    expect((await run(manager, linked('x'), { maxMemoryMb: 1 })).output).toEqual({ told: 0 });
    expect((await run(manager, linked('x'), { maxMemoryMb: 2 })).output).toEqual({ told: 1 });
    const large = managerWith(plugin(REPORT, { pages: '17' }));
    const { error, reason } = await run(large, linked('x'), { maxMemoryMb: 1 });
    expect(reason).toBe('module');
    expect(error?.message).toContain('minimum of 17 pages');
  });

  test('a plugin that grew while it was initialised is grown before each call', async () => {
    const manager = managerWith(
      plugin(REPORT, {
        initialize: '(drop (memory.grow (i32.const 3))) (i32.store (i32.const 300000) (i32.const 1))',
      }),
    );
    const { metrics } = await run(manager, linked('x'));
    expect(metrics?.memoryBytes).toBe(5 * 65_536);
  });

  test('ends like any other: by the wall limit, an exit, a trap with its diagnostics, too much output', async () => {
    const say = '(call $write (i32.const 2) (local.get $p) (local.get $n))';
    for (const [body, reason, said] of [
      ['(call $loop)', 'wall-limit', 'wall-clock limit exceeded after 100ms'],
      [`${say} (call $proc_exit (i32.const 3))`, 'exit', 'guest error: Error: kaboom'],
      [`${say} unreachable`, 'trap', 'guest error: Error: kaboom'],
      [
        '(loop $more (call $write (i32.const 1) (i32.const 0) (i32.const 60000)) (br $more))',
        'output-limit',
        'maxOutputBytes',
      ],
    ] as const) {
      const manager = managerWith(plugin(body));
      const ran = await run(manager, linked('Error: kaboom'), { maxWallMs: 100 });
      expect(ran.reason).toBe(reason);
      expect(ran.error?.message).toContain(said);
      expect((await run(manager, linked('x', { body: '' }))).output).toEqual({});
    }
  });

  test('the fuel of both is counted, the same each time, and runs out one unit below', async () => {
    const manager = managerWith(plugin(REPORT));
    const first = await run(manager, linked('abc'), { maxFuel: 1_000_000 });
    const used = first.metrics?.fuelUsed ?? 0;
    expect(first.output).toMatchObject({ code: 'abc' });
    expect(used).toBeGreaterThan(100);
    expect((await run(manager, linked('abc'), { maxFuel: used })).metrics?.fuelUsed).toBe(used);
    const short = await run(manager, linked('abc'), { maxFuel: used - 1 });
    expect([short.reason, short.metrics?.fuelUsed]).toEqual(['out-of-fuel', used - 1]);
    const endless = await run(managerWith(plugin('(call $loop)')), linked('x'), { maxFuel: 100_000 });
    expect(endless.reason).toBe('out-of-fuel');
  });

  test('is looked into without the plugin', () => {
    const summary = inspectModule(linked('x'));
    expect(summary).toMatchObject({ linkedTo: NAMESPACE, memory: null, refusal: null });
    const bad = inspectModule(
      linked('', { imports: `(import "${NAMESPACE}" "invoke" (func)) (memory 1)`, body: '' }),
    );
    expect(bad.refusal).toContain('it has a memory of its own');
  });
});

describe('a plugin', () => {
  test('that is not the file its digest names is refused when the engine opens', async () => {
    const bytes = plugin(REPORT);
    const pinned = refOf(bytes).digest;
    const changed = Uint8Array.from(bytes);
    changed[changed.length - 1] = 0x32;
    const manager = new ComputeManager(
      computes,
      {},
      { workers: 1, plugins: [{ bytes: changed, digest: pinned }] },
    );
    managers.push(manager);
    const { reason, error } = await run(manager, linked('x'));
    expect(reason).toBe('bad-digest');
    expect(error?.message).toContain(pinned);
    // With the prefix as well as without.
    const right = new ComputeManager(
      computes,
      {},
      { workers: 1, plugins: [{ bytes, digest: `sha256:${pinned}` }] },
    );
    managers.push(right);
    expect((await run(right, linked('x'))).output).toMatchObject({ code: 'x' });
  });

  test('must be one: a name, a memory, something to initialise it, and no imports but WASI', async () => {
    const bare = (fields: string): Uint8Array => wat(`(module ${fields})`);
    const named = (module: Uint8Array): Uint8Array => withSection(module, 'import_namespace', NAMESPACE);
    const init = '(func (export "initialize-runtime"))';
    const memory = '(memory (export "memory") 1)';
    for (const [bytes, said] of [
      [bare(`${init} ${memory}`), 'no custom section import_namespace'],
      [withSection(bare(`${init} ${memory}`), 'import_namespace', 'a b'), 'visible ASCII characters'],
      [named(bare(memory)), 'exports no function initialize-runtime'],
      [
        named(bare(`(func (export "initialize-runtime") (param i32)) ${memory}`)),
        'exports no function initialize-runtime',
      ],
      [named(bare(init)), 'does not export a memory'],
      [named(bare(`${init} (memory 1)`)), 'does not export a memory'],
    ] as const) {
      const { error, reason } = await run(managerWith(bytes), linked('x'));
      expect([said, reason]).toEqual([said, 'module']);
      expect(error?.message).toContain(said);
    }
    const reaching = named(
      bare(`(import "env" "reach" (func)) ${init} ${memory}
      (func (export "invoke") (param i32 i32 i32 i32 i32))
      (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (i32.const 0))`),
    );
    const { error } = await run(managerWith(reaching), linked('x'));
    expect(error?.message).toContain('it imports the function "env" "reach"');
  });

  test('that cannot be initialised fails the computes linked to it, and no others', async () => {
    const manager = managerWith(plugin(REPORT, { initialize: 'unreachable' }));
    const { error, reason } = await run(manager, linked('x'));
    expect(reason).toBe('module');
    expect(error?.message).toContain(
      `the plugin ${NAMESPACE} it is linked to could not be initialised: unreachable`,
    );
    expect((await run(manager, wat('(module (func (export "_start")))'))).output).toEqual({});
  });

  test('that never ends being initialised is killed by maxPrepareMs', async () => {
    const manager = managerWith(plugin(REPORT, { initialize: '(call $loop)' }));
    expect((await run(manager, linked('x'), { maxPrepareMs: 200 })).reason).toBe('prepare-limit');
  });
});
