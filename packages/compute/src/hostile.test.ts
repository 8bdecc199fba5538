/**
 * Modules that mean no good, or know no better. Each runs in one manager beside calls of a well-behaved module: whatever
 * happens to it, those get their answers, and so does the next call.
 */
import { mkdtemp, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { computeReason } from './errors.ts';
import type { ComputeReason } from './errors.ts';
import { echo, list, program, wasiImports, wat } from './fixtures/wat.ts';
import type { InvokeOptions, Metrics } from './limits.ts';
import { ComputeManager } from './manager.ts';
import { refOf } from './artifact.ts';
import './identity.ts';
import './quickjs/engine.ts';
import './wasm/engine.ts';
import { formatRef, storeRef } from './ref.ts';
import {
  cachedResolver,
  compositeResolver,
  folderResolver,
  memoryResolver,
  writeArtifact,
  type Resolver,
} from './resolver.ts';

const memory = memoryResolver();
let folder: string;
let manager: ComputeManager;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'millrace-hostile-'));
  // A generous limit for what ends by itself: the machine may be busy. What does not has a short one of its own.
  manager = new ComputeManager(
    compositeResolver(memory, folderResolver({ dir: folder })),
    { maxWallMs: 20_000 },
    { workers: 3 },
  );
  await manager.ready();
});

afterAll(async () => {
  await manager.close();
  await rm(folder, { recursive: true, force: true });
});

/** What is expected: an output, or a failure. */
type Ending =
  | { readonly output: string }
  | {
      readonly reason: ComputeReason;
      readonly says: RegExp;
      /** Default: `trapped`, or none for what never ran. */
      readonly status?: Metrics['status'] | 'none';
    };

interface Case {
  readonly name: string;
  readonly module: () => Uint8Array;
  readonly engine?: string;
  readonly input?: string;
  readonly options?: InvokeOptions;
  readonly ends: Ending;
}

const NEVER_RUN: readonly ComputeReason[] = ['module', 'unknown-engine', 'input-limit'];
const LATE = {
  reason: 'wall-limit',
  says: /wall-clock limit exceeded after 150ms/,
  status: 'wall-limit',
} as const;
const SHORT = { maxWallMs: 150 };
const refused = (says: RegExp): Ending => ({ reason: 'module', says });
const trapped = (says: RegExp): Ending => ({ reason: 'trap', says });
const start = (body: string, fields = ''): Uint8Array =>
  wat(`(module ${fields} (func (export "_start") ${body}))`);

/** Patches the bytes of a module where `find` stands. */
function patched(bytes: Uint8Array, find: readonly number[], put: readonly number[]): Uint8Array {
  const at = Buffer.from(bytes).indexOf(Buffer.from(find));
  expect(at).toBeGreaterThan(0);
  return new Uint8Array([...bytes.subarray(0, at), ...put, ...bytes.subarray(at + find.length)]);
}

/** A module whose functions, all without parameters and results, have these bodies; the first is `_start`. */
function raw(count: number, body: Uint8Array): Uint8Array {
  const leb = (value: number): number[] => {
    const bytes: number[] = [];
    for (let rest = value; ; rest >>>= 7) {
      if (rest < 128) return [...bytes, rest];
      bytes.push((rest & 127) | 128);
    }
  };
  const section = (id: number, ...payload: readonly Uint8Array[]): Uint8Array => {
    const bytes = Buffer.concat(payload);
    return Buffer.concat([Buffer.from([id, ...leb(bytes.length)]), bytes]);
  };
  const sized = Buffer.concat([Buffer.from(leb(body.length)), body]);
  return Buffer.concat([
    Buffer.from([0, 0x61, 0x73, 0x6d, 1, 0, 0, 0]),
    section(1, Buffer.from([1, 0x60, 0, 0])),
    section(3, Buffer.from(leb(count)), Buffer.alloc(count)),
    section(7, Buffer.from([1, 6, ...Buffer.from('_start'), 0, 0])),
    section(10, Buffer.from(leb(count)), Buffer.alloc(count * sized.length, sized)),
  ]);
}

const functions = (count: number): Uint8Array => raw(count, Buffer.from([0, 0x0b]));

function nested(depth: number): Uint8Array {
  const body = Buffer.concat([
    Buffer.from([0]),
    Buffer.alloc(depth * 2, Buffer.from([0x02, 0x40])),
    Buffer.alloc(depth + 1, 0x0b),
  ]);
  return raw(1, body);
}

/** Grows to the refusal and prints how large it has become. */
const growToRefusal = (memoryField: string): Uint8Array =>
  program(
    `(loop $more (br_if $more (i32.ne (memory.grow (i32.const 1)) (i32.const -1)))) ${list('(memory.size)')}`,
    { memory: memoryField },
  );
const VECTOR = (at: number, pointer: number, length: number): string =>
  `(i32.store (i32.const ${at}) (i32.const ${pointer})) (i32.store (i32.const ${at + 4}) (i32.const ${length}))`;
const fdWrite = (fd: number, iovs: number, count: number, to: number): string =>
  `(call $fd_write (i32.const ${fd}) (i32.const ${iovs}) (i32.const ${count}) (i32.const ${to}))`;
const simple = (name: string, params: number): string =>
  `(call $${name} ${'(i32.const 1024) '.repeat(params)})`;

const cases: readonly Case[] = [
  // Time.
  { name: 'an endless loop', module: () => start('(loop br 0)'), options: SHORT, ends: LATE },
  {
    name: 'an endless loop in the start section',
    module: () => wat('(module (func $s (loop br 0)) (func (export "_start")) (start $s))'),
    options: SHORT,
    ends: LATE,
  },
  {
    name: 'an endless loop in _initialize',
    module: () => wat('(module (func (export "_initialize") (loop br 0)) (func (export "_start")))'),
    options: SHORT,
    ends: LATE,
  },
  {
    name: 'an endless loop that calls the host',
    module: () => program('(loop $l (drop (call $sched_yield)) (br $l))', { wasi: ['sched_yield'] }),
    options: SHORT,
    ends: LATE,
  },
  {
    name: 'sleeping for ever in poll_oneoff',
    module: () =>
      program(
        `(i64.store (i32.const 1048) (i64.const 0x7fffffffffffffff))
         (loop $l (drop (call $poll_oneoff (i32.const 1024) (i32.const 2048) (i32.const 1) (i32.const 8))) (br $l))`,
        { wasi: ['poll_oneoff'] },
      ),
    options: SHORT,
    ends: LATE,
  },
  {
    name: 'random bytes without end',
    module: () =>
      program('(loop $l (drop (call $random_get (i32.const 1024) (i32.const 64000))) (br $l))', {
        wasi: ['random_get'],
      }),
    options: SHORT,
    ends: LATE,
  },
  {
    name: 'filling its memory again and again',
    module: () =>
      program('(loop $l (memory.fill (i32.const 0) (i32.const 7) (i32.const 33554432)) (br $l))', {
        memory: '(memory (export "memory") 512)',
      }),
    options: SHORT,
    ends: LATE,
  },
  // Memory and tables.
  {
    name: 'a memory that grows for ever',
    module: () =>
      program('(loop $l (drop (memory.grow (i32.const 1))) (br $l))', {
        memory: '(memory (export "memory") 1)',
      }),
    options: SHORT,
    ends: LATE,
  },
  {
    name: 'a memory without a maximum, grown to its refusal',
    module: () => growToRefusal('(memory (export "memory") 1)'),
    ends: { output: '[512]' },
  },
  {
    name: 'a memory with a maximum over the cap, grown to its refusal',
    module: () => growToRefusal('(memory (export "memory") 1 65536)'),
    ends: { output: '[512]' },
  },
  {
    name: 'a memory with a maximum below the cap, grown to its refusal',
    module: () => growToRefusal('(memory (export "memory") 1 100)'),
    ends: { output: '[100]' },
  },
  {
    name: 'a memory under another cap',
    module: () => growToRefusal('(memory (export "memory") 1)'),
    options: { maxMemoryMb: 1 },
    ends: { output: '[16]' },
  },
  {
    name: 'a declared minimum exactly at the cap',
    module: () => program(list('(memory.size)'), { memory: '(memory (export "memory") 512)' }),
    ends: { output: '[512]' },
  },
  {
    name: 'a declared minimum one page past the cap',
    module: () => program('', { memory: '(memory (export "memory") 513)' }),
    ends: { reason: 'module', says: /minimum of 513 pages .* over maxMemoryMb 32/ },
  },
  {
    name: 'a declared memory of 1 GB',
    module: () => program('', { memory: '(memory (export "memory") 16384)' }),
    ends: refused(/minimum of 16384 pages \(1024 MiB\), over maxMemoryMb 32/),
  },
  {
    name: 'an imported memory exactly at the cap',
    module: () => growToRefusal('(import "env" "memory" (memory 512 65536))'),
    ends: { output: '[512]' },
  },
  {
    name: 'an imported memory one page past the cap',
    module: () => program('', { memory: '(import "env" "memory" (memory 513))' }),
    ends: refused(/minimum of 513 pages/),
  },
  {
    name: 'an imported memory that may grow past the cap',
    module: () => growToRefusal('(import "env" "memory" (memory 1))'),
    ends: { output: '[512]' },
  },
  {
    name: 'a table that grows for ever',
    module: () =>
      start(
        '(loop $l (drop (table.grow $t (ref.null func) (i32.const 1000))) (br $l))',
        '(table $t 1 funcref)',
      ),
    options: SHORT,
    ends: LATE,
  },
  {
    name: 'a table grown to its refusal',
    module: () =>
      program(
        `(loop $more (br_if $more (i32.ne (table.grow $t (ref.null func) (i32.const 1)) (i32.const -1))))
         ${list('(table.size $t)')}`,
        { fields: '(table $t 1 funcref)' },
      ),
    options: { maxTableEntries: 500 },
    ends: { output: '[500]' },
  },
  {
    name: 'a table that starts at the limit',
    module: () => program(list('(table.size $t)'), { fields: '(table $t 500 funcref)' }),
    options: { maxTableEntries: 500 },
    ends: { output: '[500]' },
  },
  {
    name: 'a table that starts one past the limit',
    module: () => start('', '(table 501 funcref)'),
    options: { maxTableEntries: 500 },
    ends: refused(/minimum of 501 entries, over maxTableEntries 500/),
  },
  {
    name: 'a table of two billion entries',
    module: () => start('', '(table 2000000000 funcref)'),
    ends: refused(/over maxTableEntries 65536/),
  },
  // Traps.
  {
    name: 'deep recursion',
    module: () => wat('(module (func $f (export "_start") (call $f)))'),
    ends: trapped(/guest trapped: stack overflow/),
  },
  {
    name: 'deep recursion that calls the host',
    module: () =>
      program('(call $deep)', {
        fields: '(func $deep (call $write (i32.const 2) (i32.const 0) (i32.const 0)) (call $deep))',
      }),
    ends: trapped(/stack overflow/),
  },
  { name: 'unreachable', module: () => start('unreachable'), ends: trapped(/guest trapped: unreachable/) },
  {
    name: 'a trap in the start section',
    module: () => wat('(module (func $s unreachable) (func (export "_start")) (start $s))'),
    ends: trapped(/unreachable/),
  },
  {
    name: 'a division by zero',
    module: () => start('(drop (i32.div_u (i32.const 1) (i32.const 0)))'),
    ends: trapped(/divide by zero/),
  },
  {
    name: 'an integer overflow',
    module: () => start('(drop (i32.trunc_f32_s (f32.const 1e30)))'),
    ends: trapped(/unrepresentable|overflow/),
  },
  {
    name: 'a load out of bounds',
    module: () => start('(drop (i32.load (i32.const 65533)))', '(memory 1)'),
    ends: trapped(/memory access out of bounds/),
  },
  {
    name: 'an indirect call of another type',
    module: () =>
      start(
        '(drop (call_indirect (result i32) (i32.const 0)))',
        '(table 1 funcref) (func $f) (elem (i32.const 0) $f)',
      ),
    ends: trapped(/signature mismatch/),
  },
  {
    name: 'an indirect call of nothing',
    module: () => start('(call_indirect (i32.const 0))', '(table 1 funcref)'),
    ends: trapped(/null function|signature mismatch/),
  },
  {
    name: 'an indirect call out of the table',
    module: () => start('(call_indirect (i32.const 9))', '(table 1 funcref)'),
    ends: trapped(/table index is out of bounds/),
  },
  {
    name: 'a data segment out of bounds',
    module: () => start('', '(memory 1) (data (i32.const 65536) "x")'),
    ends: trapped(/data segment/),
  },
  {
    name: 'an element segment out of bounds',
    module: () => start('', '(table 1 funcref) (func $f) (elem (i32.const 1) $f)'),
    ends: trapped(/table initializer|table index|out of bounds/),
  },
  {
    name: 'a passive segment used after it was dropped',
    module: () =>
      start(
        '(data.drop $d) (memory.init $d (i32.const 0) (i32.const 0) (i32.const 1))',
        '(memory 1) (data $d "x")',
      ),
    ends: trapped(/out of bounds/),
  },
  {
    name: 'a passive segment used as it should be',
    module: () =>
      program(
        '(memory.init $d (i32.const 1024) (i32.const 0) (i32.const 7)) (call $write (i32.const 1) (i32.const 1024) (i32.const 7))',
        { fields: '(data $d "{\\"x\\":1}")' },
      ),
    ends: { output: '{"x":1}' },
  },
  {
    name: 'a trap with a full memory',
    module: () => start('unreachable', '(memory 16)'),
    options: { maxMemoryMb: 1 },
    ends: trapped(/its memory stood at maxMemoryMb 1/),
  },
  {
    name: 'words on stderr before a trap',
    module: () =>
      program('(call $write (i32.const 2) (i32.const 1024) (i32.const 5)) unreachable', {
        fields: '(data (i32.const 1024) "boom\\n")',
      }),
    ends: trapped(/^compute: guest error: boom$/),
  },
  {
    name: 'many words on stderr before a trap',
    module: () =>
      program(
        `(memory.fill (i32.const 1024) (i32.const 97) (i32.const 5000))
         (call $write (i32.const 2) (i32.const 1024) (i32.const 5000))
         (i32.store8 (i32.const 1024) (i32.const 122))
         (call $write (i32.const 2) (i32.const 1024) (i32.const 1)) unreachable`,
      ),
    ends: trapped(/^compute: guest error: a{256} \[…4489 bytes…\] a{255}z$/),
  },
  // Imports and entry points.
  {
    name: 'an unknown import',
    module: () => start('', '(import "env" "steal" (func))'),
    ends: refused(/imports the function "env" "steal"/),
  },
  {
    name: 'an unknown function of WASI',
    module: () => start('', '(import "wasi_snapshot_preview1" "fd_teleport" (func))'),
    ends: refused(/"fd_teleport", which WASI preview 1 does not have/),
  },
  {
    name: 'a name every JavaScript object has',
    module: () => start('', '(import "wasi_snapshot_preview1" "constructor" (func))'),
    ends: refused(/"constructor", which WASI preview 1 does not have/),
  },
  {
    name: 'the older WASI',
    module: () =>
      start('', '(import "wasi_unstable" "fd_write" (func (param i32 i32 i32 i32) (result i32)))'),
    ends: refused(/"wasi_unstable" "fd_write"/),
  },
  {
    name: 'an import with a wrong type',
    module: () =>
      start('', '(import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32) (result i32)))'),
    ends: refused(/as \(i32 i32\) -> \(i32\); its type is \(i32 i32 i32 i32\) -> \(i32\)/),
  },
  {
    name: 'an imported global',
    module: () => start('', '(import "env" "g" (global i32))'),
    ends: refused(/imports the global "env" "g"/),
  },
  {
    name: 'an imported table',
    module: () => start('', '(import "env" "t" (table 1 funcref))'),
    ends: refused(/imports the table "env" "t"/),
  },
  {
    name: 'no _start',
    module: () => wat('(module (func (export "main")))'),
    ends: refused(/exports no function _start/),
  },
  {
    name: 'a _start that is no function',
    module: () => wat('(module (memory (export "_start") 1))'),
    ends: refused(/export _start is a memory/),
  },
  {
    name: 'a _start with a parameter',
    module: () => wat('(module (func (export "_start") (param i32)))'),
    ends: refused(/_start takes 1 parameters/),
  },
  {
    name: 'a _start with a result',
    module: () => wat('(module (func (export "_start") (result i32) (i32.const 7)))'),
    ends: { output: '{}' },
  },
  { name: 'no memory', module: () => start(''), ends: { output: '{}' } },
  {
    name: 'no memory, and a call that needs one',
    module: () =>
      wat(`(module ${wasiImports('fd_write', 'proc_exit')} (func (export "_start")
        (call $proc_exit (call $fd_write (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 0)))))`),
    ends: { reason: 'exit', says: /exit_code\(21\)/ },
  },
  {
    name: 'a memory it does not export',
    module: () => program(list('(i32.const 1)'), { memory: '(memory 1)' }),
    ends: { output: '[1]' },
  },
  {
    name: 'a memory exported under our private name',
    module: () =>
      program(list('(i32.const 1)'), {
        memory: '(memory 1)',
        fields: '(global (export "millrace:memory") i32 (i32.const 5))',
      }),
    ends: { output: '[1]' },
  },
  {
    name: 'a write from the start section',
    module: () =>
      wat(`(module ${wasiImports('fd_write')} (memory 1)
        (data (i32.const 0) "\\10\\00\\00\\00\\02\\00\\00\\00") (data (i32.const 16) "{}")
        (func $s (drop ${fdWrite(1, 0, 1, 32)})) (start $s))`),
    ends: { output: '{}' },
  },
  // Features.
  {
    name: 'a 64-bit memory',
    module: () => start('', '(memory i64 1)'),
    ends: refused(/a 64-bit memory/),
  },
  {
    name: 'a shared memory',
    module: () => start('', '(memory 1 2 shared)'),
    ends: refused(/shared memory \(threads\)/),
  },
  {
    name: 'two memories',
    module: () => patched(start('', '(memory 1)'), [5, 3, 1, 0, 1], [5, 5, 2, 0, 1, 0, 1]),
    ends: refused(/more than one memory/),
  },
  {
    name: 'an imported memory besides its own',
    module: () =>
      patched(
        start('', '(import "env" "memory" (memory 1)) (table 1 funcref)'),
        [4, 4, 1, 0x70, 0, 1],
        [4, 4, 1, 0x70, 0, 1, 5, 3, 1, 0, 1],
      ),
    ends: refused(/more than one memory/),
  },
  {
    name: 'atomic instructions',
    module: () =>
      patched(start('(drop (i32.load (i32.const 0)))', '(memory 1)'), [0x28, 2, 0, 0x1a], [0xfe, 3, 0, 0x1a]),
    ends: refused(/uses threads/),
  },
  {
    name: 'exceptions by a tag',
    module: () => start('(throw $e)', '(tag $e)'),
    ends: refused(/exception handling \(a tag section\)/),
  },
  {
    name: 'exceptions without a tag, to swallow an exit',
    module: () =>
      wat(`(module ${wasiImports('proc_exit')} (memory (export "memory") 1)
        (func (export "_start") (try (do (call $proc_exit (i32.const 7))) (catch_all))))`),
    ends: refused(/uses exception handling/),
  },
  {
    name: 'a tail call',
    module: () => wat('(module (func $f) (func (export "_start") (return_call $f)))'),
    ends: refused(/uses tail calls/),
  },
  {
    name: 'an extended constant expression',
    module: () => start('', '(global i32 (i32.add (i32.const 1) (i32.const 2)))'),
    ends: refused(/extended constant expressions/),
  },
  {
    name: 'relaxed SIMD',
    module: () =>
      start('(drop (i8x16.relaxed_swizzle (v128.const i32x4 0 0 0 0) (v128.const i32x4 0 0 0 0)))'),
    ends: refused(/relaxed SIMD/),
  },
  {
    name: 'a type of the garbage collection proposal',
    module: () => patched(start(''), [1, 4, 1, 0x60, 0, 0], [1, 3, 1, 0x5f, 0]),
    ends: refused(/type 0 uses the type 0x5f/),
  },
  {
    name: 'SIMD, which is core 2.0',
    module: () =>
      program(
        list('(i32x4.extract_lane 2 (i32x4.add (v128.const i32x4 1 2 3 4) (v128.const i32x4 10 20 30 40)))'),
      ),
    ends: { output: '[33]' },
  },
  {
    name: 'several results and sign extension, which are core 2.0',
    module: () =>
      program(
        `${list('(i32.sub (i32.const 0) (i32.extend8_s (i32.const 0xff)))')} (call $two) (drop) (drop)`,
        {
          fields: '(func $two (result i32 i32) (i32.const 1) (i32.const 2))',
        },
      ),
    ends: { output: '[1]' },
  },
  // Shapes.
  {
    name: 'no module at all',
    module: () => Buffer.from('{"hello":1}'),
    ends: refused(/not a WebAssembly module/),
  },
  { name: 'nothing', module: () => new Uint8Array(0), ends: refused(/not a WebAssembly module/) },
  {
    name: 'a component',
    module: () => new Uint8Array([0, 0x61, 0x73, 0x6d, 0x0d, 0, 1, 0]),
    ends: refused(/components are not supported/),
  },
  { name: 'a truncated module', module: () => echo().subarray(0, 150), ends: refused(/cut short/) },
  {
    name: 'a section longer than the module',
    module: () => new Uint8Array([0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, 10, 0xff, 0xff, 0xff, 0xff, 0x0f]),
    ends: refused(/cut short/),
  },
  {
    name: 'sections out of order',
    module: () => new Uint8Array([0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, 5, 3, 1, 0, 1, 1, 1, 0]),
    ends: refused(/out of order/),
  },
  {
    name: 'code that is well formed and wrong',
    module: () => patched(start('(drop (i32.const 1))'), [0x41, 1, 0x1a], [0x41, 1, 0x01]),
    ends: refused(/Compiling function #0/),
  },
  {
    name: 'an unknown opcode',
    module: () => patched(start('(drop (i32.const 1))'), [0x41, 1, 0x1a], [0x41, 1, 0x27]),
    ends: refused(/unknown opcode 0x27/),
  },
  {
    name: 'blocks nested as deep as they may be',
    module: () => nested(10_000),
    ends: { output: '{}' },
  },
  {
    name: 'blocks nested one deeper',
    module: () => nested(10_001),
    ends: refused(/nests 10001 blocks/),
  },
  {
    name: 'blocks nested half a million deep',
    module: () => nested(500_000),
    ends: refused(/nests 10001 blocks/),
  },
  {
    name: '100,000 functions',
    module: () => functions(100_000),
    ends: refused(/100000 functions, over maxFunctions 50000/),
  },
  { name: 'as many functions as there may be', module: () => functions(50_000), ends: { output: '{}' } },
  { name: 'one function more', module: () => functions(50_001), ends: refused(/50001 functions/) },
  {
    name: 'as many imports as there may be',
    module: () =>
      start('', '(import "wasi_snapshot_preview1" "sched_yield" (func (result i32)))'.repeat(128)),
    ends: { output: '{}' },
  },
  {
    name: 'one import more',
    module: () =>
      start('', '(import "wasi_snapshot_preview1" "sched_yield" (func (result i32)))'.repeat(129)),
    ends: refused(/129 imports, over maxImports 128/),
  },
  {
    name: 'a module over the size limit',
    module: () => echo(),
    options: { maxModuleBytes: 64 },
    ends: { reason: 'module', says: /over maxModuleBytes 64/ },
  },
  // Input and output.
  {
    name: 'output that is not JSON',
    module: () =>
      program('(call $write (i32.const 1) (i32.const 1024) (i32.const 3))', {
        fields: '(data (i32.const 1024) "<a>")',
      }),
    ends: { reason: 'bad-output', says: /not one JSON document: '<' is not expected at byte 0/ },
  },
  {
    name: 'output of two documents',
    module: () => program(`${list('(i32.const 1)')} ${list('(i32.const 2)')}`),
    ends: { reason: 'bad-output', says: /'\[' is not expected at byte 3/ },
  },
  {
    name: 'output that is not UTF-8',
    module: () =>
      program('(call $write (i32.const 1) (i32.const 1024) (i32.const 3))', {
        fields: '(data (i32.const 1024) "\\22\\ff\\22")',
      }),
    ends: { reason: 'bad-output', says: /not UTF-8/ },
  },
  {
    name: '1 GB of output',
    module: () => program('(loop $l (call $write (i32.const 1) (i32.const 0) (i32.const 65536)) (br $l))'),
    ends: { reason: 'output-limit', says: /over maxOutputBytes 4194304/ },
  },
  {
    name: '1 GB of output at once, by naming the same bytes a hundred times',
    module: () =>
      program(
        `(loop $fill
           (i32.store (i32.add (i32.const 1024) (local.get $a)) (i32.const 0))
           (i32.store (i32.add (i32.const 1028) (local.get $a)) (i32.const 10485760))
           (local.set $a (i32.add (local.get $a) (i32.const 8)))
           (br_if $fill (i32.lt_u (local.get $a) (i32.const 800))))
         (drop ${fdWrite(1, 1024, 100, 8)})`,
        { memory: '(memory (export "memory") 200)' },
      ),
    ends: { reason: 'output-limit', says: /over maxOutputBytes 4194304/ },
  },
  {
    name: 'output exactly at the limit',
    module: () => echo(),
    input: JSON.stringify('x'.repeat(98)),
    options: { maxOutputBytes: 100 },
    ends: { output: JSON.stringify('x'.repeat(98)) },
  },
  {
    name: 'output one byte past the limit',
    module: () => echo(),
    input: JSON.stringify('x'.repeat(99)),
    options: { maxOutputBytes: 100 },
    ends: { reason: 'output-limit', says: /101 bytes of output, over maxOutputBytes 100/ },
  },
  {
    name: 'a flood of diagnostics',
    module: () => program('(loop $l (call $write (i32.const 2) (i32.const 0) (i32.const 60000)) (br $l))'),
    options: SHORT,
    ends: LATE,
  },
  {
    name: 'a flood of single bytes of diagnostics, and then an answer',
    module: () =>
      program(
        `(loop $l (call $write (i32.const 2) (i32.const 50) (i32.const 1))
           (local.set $a (i32.add (local.get $a) (i32.const 1)))
           (br_if $l (i32.lt_u (local.get $a) (i32.const 100000))))
         ${list('(local.get $a)')}`,
      ),
    ends: { output: '[100000]' },
  },
  {
    name: 'an input exactly at the limit',
    module: () => echo(),
    input: JSON.stringify('x'.repeat(98)),
    options: { maxInputBytes: 100 },
    ends: { output: JSON.stringify('x'.repeat(98)) },
  },
  {
    name: 'an input one byte past the limit',
    module: () => echo(),
    input: JSON.stringify('x'.repeat(99)),
    options: { maxInputBytes: 100 },
    ends: { reason: 'input-limit', says: /the input has 101 bytes, over maxInputBytes 100/ },
  },
  {
    name: 'reading byte by byte, and past the end',
    module: () => echo(1),
    input: '{"a":[1,2,3]}',
    ends: { output: '{"a":[1,2,3]}' },
  },
  { name: 'an empty input', module: () => echo(), input: '', ends: { output: '{}' } },
  {
    name: 'reading 4 GB into a pointer at the end of the memory',
    module: () =>
      program(
        `${VECTOR(1024, 65_535, -1)}
         ${list('(call $fd_read (i32.const 0) (i32.const 1024) (i32.const 1) (i32.const 8))')}`,
      ),
    ends: { output: '[21]' },
  },
  // Pointers.
  {
    name: 'writes with pointers out of bounds',
    module: () =>
      program(
        `${VECTOR(1024, -1, 16)} ${VECTOR(1032, 65_536, 1)} ${VECTOR(1040, 0, -1)} ${VECTOR(1048, 65_536, 0)}
         (local.set $a ${fdWrite(1, 1024, 1, 8)}) ${list(
           '(local.get $a)',
           fdWrite(1, 1032, 1, 8),
           fdWrite(1, 1040, 1, 8),
           fdWrite(1, -8, 1, 8),
           fdWrite(1, 65_532, 1, 8),
           fdWrite(1, 1024, 0, 65_533),
           fdWrite(1, 1024, 0, -4),
           fdWrite(1, 1048, 1, 8),
         )}`,
      ),
    // The last is legal: nothing at the very end.
    ends: { output: '[21,21,21,21,21,21,21,0]' },
  },
  {
    name: 'vectors of four billion and of half a billion buffers',
    module: () =>
      program(list(fdWrite(1, 1024, -1, 8), fdWrite(1, 1024, 536_870_912, 8), fdWrite(1, 1024, 8_064, 8))),
    ends: { output: '[21,21,0]' },
  },
  {
    name: 'a vector that overwrites itself while it is read into',
    module: () =>
      program(
        `${VECTOR(1024, 1032, 8)} ${VECTOR(1032, 2048, 8)}
         ${list('(call $fd_read (i32.const 0) (i32.const 1024) (i32.const 2) (i32.const 8))')}`,
      ),
    input: `"${'\u007f'.repeat(30)}"`,
    ends: { output: '[21]' },
  },
  {
    name: 'bad pointers to everything else',
    module: () =>
      program(
        list(
          '(call $random_get (i32.const 65535) (i32.const 2))',
          '(call $random_get (i32.const 0) (i32.const -1))',
          '(call $clock_time_get (i32.const 0) (i64.const 0) (i32.const 65529))',
          '(call $clock_res_get (i32.const 0) (i32.const -1))',
          '(call $args_sizes_get (i32.const 65536) (i32.const 0))',
          '(call $args_get (i32.const 0) (i32.const 65530))',
          '(call $environ_sizes_get (i32.const 0) (i32.const -4))',
          '(call $fd_fdstat_get (i32.const 0) (i32.const 65513))',
          '(call $fd_filestat_get (i32.const 0) (i32.const 65473))',
          '(call $poll_oneoff (i32.const 65500) (i32.const 0) (i32.const 1) (i32.const 8))',
          '(call $poll_oneoff (i32.const 0) (i32.const 0) (i32.const -1) (i32.const 8))',
          '(call $poll_oneoff (i32.const 1024) (i32.const 65510) (i32.const 1) (i32.const 8))',
        ),
        {
          wasi: [
            'random_get',
            'clock_time_get',
            'clock_res_get',
            'args_sizes_get',
            'args_get',
            'environ_sizes_get',
            'fd_fdstat_get',
            'fd_filestat_get',
            'poll_oneoff',
          ],
        },
      ),
    ends: { output: `[${Array.from({ length: 12 }, () => 21).join(',')}]` },
  },
  // The end of a guest.
  {
    name: 'an exit with 0 after the answer',
    module: () =>
      program(`${list('(i32.const 1)')} (call $proc_exit (i32.const 0)) unreachable`, {
        wasi: ['proc_exit'],
      }),
    ends: { output: '[1]' },
  },
  {
    name: 'an exit with 3 after the answer',
    module: () =>
      program(`${list('(i32.const 1)')} (call $proc_exit (i32.const 3))`, { wasi: ['proc_exit'] }),
    ends: { reason: 'exit', says: /guest trapped: module closed with exit_code\(3\)/ },
  },
  {
    name: 'an exit with the largest code',
    module: () => program('(call $proc_exit (i32.const -1))', { wasi: ['proc_exit'] }),
    ends: { reason: 'exit', says: /exit_code\(4294967295\)/ },
  },
  {
    name: 'an exit in the start section',
    module: () =>
      wat(`(module ${wasiImports('proc_exit')} (func $s (call $proc_exit (i32.const 5)))
        (func (export "_start") unreachable) (start $s))`),
    ends: { reason: 'exit', says: /exit_code\(5\)/ },
  },
  {
    name: 'an engine there is not',
    module: () => echo(7),
    engine: 'jvm',
    ends: {
      reason: 'unknown-engine',
      says: /unknown engine "jvm" \(available: \[.*identity.* wasm wazero\]\)/,
    },
  },
  // What it may see.
  {
    name: 'clocks, and clocks there are not',
    module: () =>
      program(
        list(
          ...[0, 1, 2, 3, 9].map(
            (id) => `(call $clock_time_get (i32.const ${id}) (i64.const 0) (i32.const 1024))`,
          ),
          '(call $clock_res_get (i32.const 0) (i32.const 1024))',
          '(i32.load (i32.const 1024))',
        ),
        { wasi: ['clock_time_get', 'clock_res_get'] },
      ),
    ends: { output: '[0,0,28,28,28,0,1]' },
  },
  {
    name: 'a look around: arguments, environment, files, sockets, other descriptors',
    module: () =>
      program(
        list(
          '(call $args_sizes_get (i32.const 1024) (i32.const 1028))',
          '(i32.load (i32.const 1024))',
          '(i32.load (i32.const 1028))',
          '(call $environ_sizes_get (i32.const 1024) (i32.const 1028))',
          '(i32.load (i32.const 1024))',
          '(i32.load (i32.const 1028))',
          simple('fd_prestat_get', 2).replace('1024', '3'),
          '(call $path_open (i32.const 3) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i64.const -1) (i64.const -1) (i32.const 0) (i32.const 1024))',
          simple('sock_accept', 3).replace('1024', '3'),
          simple('sock_send', 5).replace('1024', '3'),
          fdWrite(7, 1024, 1, 8),
          fdWrite(0, 1024, 1, 8),
          '(call $fd_read (i32.const 1) (i32.const 1024) (i32.const 1) (i32.const 8))',
          '(call $proc_raise (i32.const 9))',
        ),
        {
          wasi: [
            'args_sizes_get',
            'environ_sizes_get',
            'fd_prestat_get',
            'path_open',
            'sock_accept',
            'sock_send',
            'proc_raise',
          ],
        },
      ),
    ends: { output: '[0,1,8,0,0,0,8,8,8,8,8,8,8,52]' },
  },
  {
    name: 'a descriptor it closed',
    module: () =>
      program(
        list('(call $fd_close (i32.const 2))', '(call $fd_close (i32.const 2))', fdWrite(2, 1024, 0, 8)),
        {
          wasi: ['fd_close'],
        },
      ),
    ends: { output: '[0,8,8]' },
  },
  {
    name: 'a sleep of ten seconds',
    module: () =>
      program(
        `(i64.store (i32.const 1048) (i64.const 10000000000))
         ${list('(call $poll_oneoff (i32.const 1024) (i32.const 2048) (i32.const 1) (i32.const 8))', '(i32.load16_u (i32.const 2056))')}`,
        { wasi: ['poll_oneoff'] },
      ),
    ends: { output: '[0,0]' },
  },
];

describe('hostile modules', () => {
  const bystander = memory.add(echo(4_096));

  test(`there are enough of them`, () => {
    expect(cases.length).toBeGreaterThanOrEqual(100);
    expect(new Set(cases.map((one) => one.name)).size).toBe(cases.length);
  });

  test.each(cases)('$name', async ({ module, engine, input = '{"in":1}', options = {}, ends }) => {
    const ref = memory.add(module(), engine);
    const measured: Metrics[] = [];
    const hostile = manager.run(ref, input, { ...options, metricsSink: (metrics) => measured.push(metrics) });
    const outcome = hostile.then(
      (output) => ({ output: Buffer.from(output).toString(), error: null }),
      (error: unknown) => ({ output: null, error }),
    );
    // At least once at the same time, and once after it.
    let beside = 0;
    do {
      const asked = JSON.stringify({ beside });
      expect(Buffer.from(await manager.run(bystander, asked)).toString()).toBe(asked);
      beside += 1;
    } while (!(await Promise.race([outcome, Promise.resolve(false)])));
    const { output, error } = await outcome;
    if ('output' in ends) {
      expect(error).toBeNull();
      expect(output).toBe(ends.output);
      expect(measured.map((one) => one.status)).toEqual(['ok']);
      return;
    }
    expect(output).toBeNull();
    expect(computeReason(error)).toBe(ends.reason);
    expect((error as Error).message).toMatch(ends.says);
    const status = ends.status ?? (NEVER_RUN.includes(ends.reason) ? 'none' : 'trapped');
    expect(measured.map((one) => one.status)).toEqual(status === 'none' ? [] : [status]);
  });
});

describe('hostile stores', () => {
  test('bytes under a digest that is not theirs are refused before anything looks at them', async () => {
    const ref = { alg: 'sha256', digest: 'a'.repeat(64) };
    const liar = { resolve: () => Promise.resolve({ ...ref, engine: 'wasm', wasm: echo(11) }) };
    await using other = new ComputeManager(liar, {}, { workers: 1 });
    await expect(other.run(ref, '{}')).rejects.toMatchObject({
      code: 'data_loss',
      message: expect.stringContaining('have the sha256') as string,
    });
  });

  test('a poisoned file is refused, and what was loaded before goes on running', async () => {
    const wasm = echo(12);
    const ref = await writeArtifact(folder, wasm, 'wasm');
    await using fresh = new ComputeManager(folderResolver({ dir: folder }), {}, { workers: 1 });
    expect(Buffer.from(await fresh.run(ref, '[1]')).toString()).toBe('[1]');
    await writeFile(join(folder, storeRef(ref)), echo(13));
    expect(Buffer.from(await fresh.run(ref, '[2]')).toString()).toBe('[2]');
    await expect(manager.run(ref, '[3]')).rejects.toMatchObject({ code: 'data_loss' });
  });

  test('an artifact stored under a wrong engine runs as soon as that is set right, whatever was kept of it', async () => {
    const wasm = echo(15);
    const ref = refOf(wasm);
    let engine = 'warp';
    let asked = 0;
    const source: Resolver = {
      resolve: () => {
        asked += 1;
        return Promise.resolve({ ...ref, engine, wasm });
      },
    };
    const dir = join(folder, 'cache');
    const resolver = compositeResolver(
      folderResolver({ dir: join(folder, 'none') }),
      cachedResolver(source, { dir }),
    );
    await using node = new ComputeManager(resolver, {}, { workers: 1 });
    await expect(node.run(ref, '{}')).rejects.toThrow(/unknown engine "warp"/);
    engine = 'quickjs';
    await expect(node.run(ref, '{}')).rejects.toMatchObject({
      details: expect.objectContaining({ reason: 'module' }) as object,
    });
    engine = 'wasm';
    for (let round = 0; round < 2; round += 1) {
      expect(Buffer.from(await node.run(ref, '[4]')).toString()).toBe('[4]');
    }
    await using restarted = new ComputeManager(resolver, {}, { workers: 1 });
    expect(Buffer.from(await restarted.run(ref, '[5]')).toString()).toBe('[5]');
    expect(asked).toBe(3);
  });

  test('a truncated file is refused', async () => {
    const ref = await writeArtifact(folder, echo(14), 'wasm');
    await truncate(join(folder, storeRef(ref)), 100);
    await expect(manager.run(formatRef(ref), '{}')).rejects.toMatchObject({
      code: 'data_loss',
      details: expect.objectContaining({ reason: 'bad-digest' }) as object,
    });
  });
});
