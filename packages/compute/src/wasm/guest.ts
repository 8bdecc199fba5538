/** The worker side of the `wasm` engine: one WASI command, a fresh instance for each call. */
import { MillraceError } from '@millrace/runner';
import type {
  GuestCall,
  GuestEngine,
  GuestFailure,
  GuestLimits,
  GuestOutcome,
} from '../pool/guest-engine.ts';
import { DEFAULT_LIMITS, PAGE_BYTES, PAGES_PER_MB } from '../limits.ts';
import { instrument } from '../fuel/instrument.ts';
import { FuelGauge } from '../fuel/gauge.ts';
import { moduleError } from './binary.ts';
import { readModule } from './module.ts';
import { rewriteModule } from './rewrite.ts';
import { WASI_MODULE } from './wasi-types.ts';
import { Wasi } from './wasi.ts';

/** A module compiled for certain limits. Cloning it shares the code. */
export interface PreparedWasm {
  readonly module: WebAssembly.Module;
  readonly memory: string | null;
  readonly entries: readonly string[];
  /** The export that counts its fuel, when that is asked for. */
  readonly fuel: string | null;
}

const wasi = new Wasi();
const imports = { [WASI_MODULE]: wasi.functions };

function prepare(source: Uint8Array, limits: GuestLimits): PreparedWasm {
  const { bytes, memory, entries } = rewriteModule(readModule(source, limits), limits);
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
  try {
    let thrown: unknown = null;
    try {
      const { exports } = new WebAssembly.Instance(prepared.module, imports);
      if (prepared.memory !== null) wasi.attach(exports[prepared.memory] as WebAssembly.Memory);
      gauge.attach(exports, prepared.fuel);
      call.note(wasi.memoryBytes, 0);
      for (const entry of prepared.entries) (exports[entry] as () => unknown)();
    } catch (error) {
      thrown = error ?? new Error('nothing');
    }
    const { halt, memoryBytes, outputBytes } = wasi;
    const failure = gauge.failure() ?? failureOf(thrown, memoryBytes, call.limits);
    const output = failure === null ? wasi.takeOutput() : null;
    return {
      memoryBytes,
      outputBytes: halt?.kind === 'output-limit' ? halt.bytes : outputBytes,
      output,
      failure,
      fuelUsed: gauge.used,
    };
  } finally {
    wasi.end();
  }
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
  if (thrown === null) return null;
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

export const guest: GuestEngine = { prepare, run, warmUp };
