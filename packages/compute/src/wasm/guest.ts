/** The worker side of the `wasm` engine: one WASI command, a fresh instance for each call. */
import { MillraceError } from '@millrace/runner';
import type {
  GuestCall,
  GuestEngine,
  GuestFailure,
  GuestLimits,
  GuestOutcome,
  Library,
} from '../pool/guest-engine.ts';
import { DEFAULT_LIMITS, DEFAULT_SEED, PAGE_BYTES, PAGES_PER_MB } from '../limits.ts';
import { instrument } from '../fuel/instrument.ts';
import { FuelGauge, outOfFuel } from '../fuel/gauge.ts';
import { moduleError } from './binary.ts';
import { readModule } from './module.ts';
import type { WasmModule } from './module.ts';
import { CONFIGURATION, INITIALIZE, PLUGIN_MEMORY, foreignNamespace, readPluginFace } from './plugin.ts';
import type { PluginFace } from './plugin.ts';
import { rewriteModule } from './rewrite.ts';
import type { ModuleRole } from './rewrite.ts';
import { WASI_MODULE } from './wasi-types.ts';
import { Wasi } from './wasi.ts';

/** A module compiled for certain limits. Cloning it shares the code. */
export interface PreparedWasm {
  readonly module: WebAssembly.Module;
  readonly memory: string | null;
  readonly entries: readonly string[];
  /** The export that counts its fuel, when that is asked for. */
  readonly fuel: string | null;
  /** What it is linked to; `null`: it is a program by itself. */
  readonly plugin: PreparedPlugin | null;
}

interface PreparedPlugin {
  readonly namespace: string;
  readonly module: WebAssembly.Module;
  readonly fuel: string | null;
  /** Its memory once it was initialised, whole pages, in shared memory. */
  readonly snapshot: Uint8Array;
}

const wasi = new Wasi();
const imports = { [WASI_MODULE]: wasi.functions };

/** Plugins prepared in this worker, by digest and limits. */
const plugins = new Map<string, PreparedPlugin>();
const MAX_PLUGINS = 4;

/** Checks, rewrites and compiles a module for the limits. @throws MillraceError reason `module`. */
export function prepare(
  source: Uint8Array,
  limits: GuestLimits,
  libraries: readonly Library[] = [],
): PreparedWasm {
  const parsed = readModule(source, limits);
  const library = libraryFor(parsed, libraries);
  if (library === null) {
    const { memory, entries, ...code } = compileFor(parsed, limits, 'command');
    return { ...code, memory, entries, plugin: null };
  }
  const { memory, entries, ...code } = compileFor(parsed, limits, { linkedTo: library.face });
  return { ...code, memory, entries, plugin: preparePlugin(library, limits) };
}

interface FoundPlugin {
  readonly digest: string;
  readonly parsed: WasmModule;
  readonly face: PluginFace;
}

/** The plugin a module is linked to, by the name it imports it under. */
function libraryFor(module: WasmModule, libraries: readonly Library[]): FoundPlugin | null {
  const namespace = libraries.length === 0 ? null : foreignNamespace(module);
  if (namespace === null) return null;
  for (const { digest, bytes } of libraries) {
    const parsed = readModule(bytes, { maxFunctions: Infinity, maxImports: Infinity });
    const face = readPluginFace(parsed);
    if (face.namespace === namespace) return { digest, parsed, face };
  }
  return null;
}

function preparePlugin({ digest, parsed, face }: FoundPlugin, limits: GuestLimits): PreparedPlugin {
  const key = [digest, limits.maxMemoryMb, limits.maxTableEntries, limits.maxFuel !== null].join();
  const known = plugins.get(key);
  if (known !== undefined) return known;
  const { module, fuel, memory, entries } = compileFor(parsed, limits, 'plugin');
  const snapshot = initialised(module, memory, entries, limits, face.namespace);
  const prepared: PreparedPlugin = { namespace: face.namespace, module, fuel, snapshot };
  plugins.set(key, prepared);
  if (plugins.size > MAX_PLUGINS) {
    const [oldest] = plugins.keys();
    plugins.delete(oldest as string);
  }
  return prepared;
}

/** A plugin's memory after it was initialised, with frozen clock and default seed: what every call begins with. */
function initialised(
  module: WebAssembly.Module,
  memoryExport: string | null,
  entries: readonly string[],
  limits: GuestLimits,
  namespace: string,
): Uint8Array {
  const ignore = (): void => undefined;
  const input = new TextEncoder().encode(CONFIGURATION);
  const frozen = { clock: 'frozen', random: 'seeded', seed: DEFAULT_SEED, now: 0n } as const;
  wasi.begin({ key: namespace, input, limits: { ...limits, ...frozen }, log: ignore, note: ignore });
  try {
    const { exports } = new WebAssembly.Instance(module, imports);
    const memory = exports[memoryExport as string] as WebAssembly.Memory;
    wasi.attach(memory);
    for (const entry of [...entries, INITIALIZE]) (exports[entry] as () => unknown)();
    const snapshot = new Uint8Array(new SharedArrayBuffer(memory.buffer.byteLength));
    snapshot.set(new Uint8Array(memory.buffer));
    return snapshot;
  } catch (error) {
    throw moduleError(
      `the plugin ${namespace} it is linked to could not be initialised: ${MillraceError.from(error).message}`,
    );
  } finally {
    wasi.end();
  }
}

function compileFor(parsed: WasmModule, limits: GuestLimits, role: ModuleRole): Omit<PreparedWasm, 'plugin'> {
  const { bytes, memory, entries } = rewriteModule(parsed, limits, role);
  // Also when it is metered: with what metering adds, an index that was out of range would be in range.
  const module = compile(bytes);
  if (limits.maxFuel === null) return { module, memory, entries, fuel: null };
  const metered = instrument(readModule(bytes, { maxFunctions: Infinity, maxImports: Infinity }), {
    fuel: true,
  });
  return { module: compile(metered.bytes), memory, entries, fuel: metered.fuel };
}

function compile(bytes: Uint8Array): WebAssembly.Module {
  try {
    return new WebAssembly.Module(bytes);
  } catch (error) {
    throw moduleError(MillraceError.from(error).message.replace(/^WebAssembly\.Module\(\): /, ''));
  }
}

function run(prepared: PreparedWasm, call: GuestCall): GuestOutcome {
  wasi.begin(call);
  const gauge = new FuelGauge(call.limits);
  const pluginGauge = prepared.plugin === null ? null : new FuelGauge(call.limits);
  try {
    let thrown: unknown = null;
    try {
      const { exports } =
        prepared.plugin === null ? instanceOf(prepared) : linkedInstance(prepared, pluginGauge);
      if (prepared.memory !== null) wasi.attach(exports[prepared.memory] as WebAssembly.Memory);
      gauge.attach(exports, prepared.fuel);
      call.note(wasi.memoryBytes, 0);
      for (const entry of prepared.entries) (exports[entry] as () => unknown)();
    } catch (error) {
      thrown = error ?? new Error('nothing');
    }
    const { halt, memoryBytes, outputBytes } = wasi;
    const fuel = totalFuel(gauge, pluginGauge, call.limits);
    const failure = fuel.failure ?? failureOf(thrown, memoryBytes, call.limits);
    const output = failure === null ? wasi.takeOutput() : null;
    return {
      memoryBytes,
      outputBytes: halt?.kind === 'output-limit' ? halt.bytes : outputBytes,
      output,
      failure,
      fuelUsed: fuel.used,
    };
  } finally {
    wasi.end();
  }
}

/**
 * An instance made ahead of its call. Instantiating runs no code of the guest's (a start section has become an export),
 * so it is as fresh as one that is made at the call, and is used for one call as well.
 */
let spare: { readonly of: PreparedWasm; readonly instance: WebAssembly.Instance } | null = null;

function instanceOf(prepared: PreparedWasm): WebAssembly.Instance {
  const ready = spare?.of === prepared ? spare.instance : null;
  spare = null;
  return ready ?? new WebAssembly.Instance(prepared.module, imports);
}

function ahead(prepared: PreparedWasm): void {
  spare = null;
  // A linked one needs its plugin's memory filled, which is most of what it costs.
  if (prepared.plugin !== null) return;
  try {
    spare = { of: prepared, instance: new WebAssembly.Instance(prepared.module, imports) };
  } catch {
    // Why it cannot be instantiated is told by the call that tries.
  }
}

function linkedInstance(prepared: PreparedWasm, gauge: FuelGauge | null): WebAssembly.Instance {
  return new WebAssembly.Instance(prepared.module, linkedImports(prepared.plugin as PreparedPlugin, gauge));
}

/** A plugin as a linked module sees it: a fresh instance that was initialised already. Its memory is the one WASI reads. */
function linkedImports(
  { namespace, module, fuel, snapshot }: PreparedPlugin,
  gauge: FuelGauge | null,
): Record<string, Record<string, unknown>> {
  const { exports } = new WebAssembly.Instance(module, imports);
  const memory = exports[PLUGIN_MEMORY] as WebAssembly.Memory;
  memory.grow((snapshot.byteLength - memory.buffer.byteLength) / PAGE_BYTES);
  new Uint8Array(memory.buffer).set(snapshot);
  wasi.attach(memory);
  gauge?.attach(exports, fuel);
  return { [namespace]: exports };
}

/** A linked module and its plugin each have a tank of the whole size; together they may use no more than one holds. */
function totalFuel(
  own: FuelGauge,
  plugin: FuelGauge | null,
  { maxFuel }: GuestLimits,
): { readonly used: number | null; readonly failure: GuestFailure | null } {
  if (plugin === null || maxFuel === null) return { used: own.used, failure: own.failure() };
  const used = (own.used ?? 0) + (plugin.used ?? 0);
  const failure = own.failure() ?? plugin.failure() ?? (used > maxFuel ? outOfFuel(maxFuel) : null);
  return { used: Math.min(used, maxFuel), failure };
}

/** How the guest failed, or `null`. What ended it first is recorded in `halt`, whatever was thrown afterwards. */
function failureOf(thrown: unknown, memoryBytes: number, limits: GuestLimits): GuestFailure | null {
  const { halt } = wasi;
  if (halt?.kind === 'output-limit') {
    return {
      code: 'resource_exhausted',
      reason: 'output-limit',
      message: `guest wrote ${halt.bytes} bytes of output, over maxOutputBytes ${limits.maxOutputBytes}`,
      details: { limit: 'maxOutputBytes', value: limits.maxOutputBytes },
    };
  }
  if (halt?.kind === 'exit') {
    if (halt.code === 0) return null;
    return {
      code: 'invalid_argument',
      reason: 'exit',
      message: `module closed with exit_code(${halt.code})`,
      details: { exitCode: halt.code },
    };
  }
  return thrown === null ? null : trapOf(thrown, memoryBytes, limits);
}

/** What a guest died of, by what came out of it. @throws `thrown` itself when no guest can be the cause of it. */
export function trapOf(thrown: unknown, memoryBytes: number, limits: GuestLimits): GuestFailure {
  if (thrown instanceof WebAssembly.RuntimeError) {
    const atLimit = memoryBytes === limits.maxMemoryMb * PAGES_PER_MB * PAGE_BYTES;
    return {
      code: 'invalid_argument',
      reason: 'trap',
      message: atLimit
        ? `${thrown.message} (its memory stood at maxMemoryMb ${limits.maxMemoryMb})`
        : thrown.message,
      details: { memoryAtLimit: atLimit, ...trace(thrown) },
    };
  }
  if (thrown instanceof RangeError && thrown.message.includes('call stack')) {
    return { code: 'invalid_argument', reason: 'trap', message: 'stack overflow', details: trace(thrown) };
  }
  if (thrown instanceof RangeError && /memory|allocation/i.test(thrown.message)) {
    return { code: 'resource_exhausted', reason: 'memory-limit', message: thrown.message };
  }
  throw thrown;
}

/** The frames inside of the guest, for its author. */
function trace(error: Error): { readonly trace: readonly string[] } {
  const frames = (error.stack ?? '').split('\n').filter((line) => line.includes('wasm://'));
  return {
    trace: frames.slice(0, 10).map((line) => line.trim().replace(/wasm:\/\/wasm\/(\S*?)[0-9a-f]{8}:/, '$1')),
  };
}

/** An echo: reads its input into its memory and writes it out again. */
const ECHO =
  'AGFzbQEAAAABDAJgBH9/f38Bf2AAAAJEAhZ3YXNpX3NuYXBzaG90X3ByZXZpZXcxB2ZkX3JlYWQAABZ3YXNpX3NuYXBzaG90X3ByZXZpZXcxCGZkX3dyaXRlAAADAgEBBQMBAAEHEwIGbWVtb3J5AgAGX3N0YXJ0AAIKNQEzAEEAQYAINgIAQQRB4NQDNgIAQQBBAEEBQQgQABpBBEEIKAIANgIAQQFBAEEBQQgQARoL';

function warmUp(): void {
  const source = Buffer.from(ECHO, 'base64');
  const limits: GuestLimits = { ...DEFAULT_LIMITS, now: 0n };
  const ignore = (): void => undefined;
  const call: GuestCall = { key: 'echo', input: Buffer.from('{}'), limits, log: ignore, note: ignore };
  for (let round = 0; round < 5; round += 1) run(prepare(source, limits), call);
}

export const guest: GuestEngine = { prepare, run, ahead, warmUp };
