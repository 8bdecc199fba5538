/**
 * WASI programs with what they are granted: arguments, variables, folders of this machine, and output that comes as it is
 * written. The walls are those of every compute; what is let through them is named, call by call.
 *
 * This is no engine that can be opened by name: a compute that somebody else submits must never get at grants.
 */
import { realpath, stat } from 'node:fs/promises';
import path from 'node:path';
import { MillraceError } from '@millrace/runner';
import { refOf } from '../artifact.ts';
import type { Engine } from '../engine.ts';
import { computeError } from '../errors.ts';
import { isolatedEngine } from '../isolated-engine.ts';
import { resolveLimits, nanoseconds, type Limits } from '../limits.ts';
import { GuestPool, type GuestPoolOptions } from '../pool/guest-pool.ts';
import { prepare } from '../wasm/guest.ts';
import type { FileLimits, Mount } from './files.ts';
import { FRAME_OVERHEAD, FrameReader, type CommandReport, type CommandRequest } from './messages.ts';

/** A folder of this machine in the sight of a program. */
export interface WasiMount {
  /** Absolute path in the program, such as `/in`. */
  readonly guestPath: string;
  /** The folder. It must hold no symbolic link that others can change while programs run; links in it are not followed. */
  readonly hostPath: string;
  /** Default false. */
  readonly writable?: boolean;
}

export interface WasiGrants {
  /** The first is what the program is called by. Default `['program']`. */
  readonly args?: readonly string[];
  /** Default none. */
  readonly env?: Readonly<Record<string, string>>;
  /** Default none. */
  readonly mounts?: readonly WasiMount[];
  /** Hears both output streams while the program runs. Must not throw. The bytes are its own. */
  readonly onOutput?: (stream: 'stdout' | 'stderr', bytes: Uint8Array) => void;
  /** When it aborts, the program is killed, and once it is gone `run` rejects with the signal's reason. */
  readonly signal?: AbortSignal;
}

/** Every limit is on; see {@link Limits} for those that computes have, too. */
export interface WasiCommandLimits
  extends
    FileLimits,
    Pick<
      Limits,
      | 'maxMemoryMb'
      | 'maxWallMs'
      | 'maxPrepareMs'
      | 'maxInputBytes'
      | 'maxModuleBytes'
      | 'maxFunctions'
      | 'maxImports'
      | 'maxTableEntries'
      | 'maxFuel'
    > {
  /** Of both streams together, at most 128 MiB; past it the program ends. What waits to be heard is kept in memory. Default 64 MiB. */
  readonly maxOutputBytes: number;
}

export const DEFAULT_WASI_COMMAND_LIMITS: WasiCommandLimits = {
  maxMemoryMb: 512,
  maxWallMs: 24 * 60 * 60_000,
  maxPrepareMs: 30_000,
  maxInputBytes: 1024 * 1024,
  maxModuleBytes: 64 * 1024 * 1024,
  maxFunctions: 100_000,
  maxImports: 128,
  maxTableEntries: 1_000_000,
  maxFuel: null,
  maxOutputBytes: 64 * 1024 * 1024,
  maxStorageBytes: 16 * 1024 ** 3,
  maxFiles: 100_000,
  maxOpenFiles: 256,
};

const MAX_OUTPUT_BYTES = 128 * 1024 * 1024;

/** How a program ended. */
export interface WasiEnding {
  /** Its own; 134, as after an abort, when it trapped. */
  readonly exitCode: number;
  /** What it trapped with, and where; null when it ended by itself. */
  readonly trap: { readonly message: string; readonly trace: readonly string[] } | null;
  readonly fuelUsed: number | null;
  readonly wallMs: number;
  readonly memoryBytes: number;
}

const TRAPPED = 134;

/**
 * Runs WASI commands, any number at once, each in a fresh instance in a worker thread. Worker threads start with the first
 * program; `close` ends them and what runs in them.
 */
export class WasiCommands implements AsyncDisposable {
  readonly #pool: GuestPool;
  readonly #limits: WasiCommandLimits;
  readonly #engineLimits: Limits;
  readonly #engine: Promise<Engine>;

  /** @throws MillraceError `invalid_argument` (reason `bad-limit`) for a limit or option out of its bounds. */
  constructor(limits: Partial<WasiCommandLimits> = {}, options: GuestPoolOptions = {}) {
    this.#limits = checkedLimits({ ...DEFAULT_WASI_COMMAND_LIMITS, ...limits });
    this.#engineLimits = engineLimits(this.#limits);
    this.#pool = new GuestPool(options);
    const construct = isolatedEngine({
      name: 'wasi',
      guest: new URL('./guest.js', import.meta.url),
      version: 'wasi-1',
      variant: (given) => [given.maxMemoryMb, given.maxTableEntries, given.maxFuel !== null].join(','),
    });
    this.#engine = Promise.resolve(construct({ pool: this.#pool }));
  }

  /**
   * Checks and compiles a module in this thread, without running it.
   *
   * @throws MillraceError `invalid_argument` or `resource_exhausted` (reason `module`): what about it is refused.
   */
  check(module: Uint8Array): void {
    const limits = this.#engineLimits;
    if (module.byteLength > limits.maxModuleBytes) {
      throw computeError(
        'resource_exhausted',
        'module',
        `the module has ${module.byteLength} bytes, over maxModuleBytes ${limits.maxModuleBytes}`,
        { details: { limit: 'maxModuleBytes', value: limits.maxModuleBytes } },
      );
    }
    prepare(module, { ...limits, now: nanoseconds(limits.now) });
  }

  /**
   * Runs a program to its end. That it traps or ends with an exit code is a result.
   *
   * @throws the signal's reason; a MillraceError when it cannot be run, or ended by a limit, with `details.limit` and `details.value`.
   */
  async run(module: Uint8Array, grants: WasiGrants = {}): Promise<WasiEnding> {
    const { args = ['program'], env = {}, onOutput, signal } = grants;
    signal?.throwIfAborted();
    for (const text of [...args, ...Object.entries(env).flat()]) checkText(text);
    const { maxStorageBytes, maxFiles, maxOpenFiles, maxOutputBytes } = this.#limits;
    const request: CommandRequest = {
      args,
      env,
      mounts: await Promise.all((grants.mounts ?? []).map(mountOf)),
      maxStorageBytes,
      maxFiles,
      maxOpenFiles,
      maxOutputBytes,
    };
    const frames = new FrameReader(onOutput ?? (() => undefined));
    const measured: Measured[] = [];
    const limits: Limits = {
      ...this.#engineLimits,
      stderr: (bytes) => frames.push(bytes),
      metricsSink: ({ fuelUsed, wallMs, memoryBytes }) => measured.push({ fuelUsed, wallMs, memoryBytes }),
    };
    const engine = await this.#engine;
    const instance = await engine.load({ ...refOf(module), engine: 'wasi', wasm: module });
    const bytes = await instance.invoke(Buffer.from(JSON.stringify(request)), limits, signal);
    const report = JSON.parse(Buffer.from(bytes).toString()) as CommandReport;
    if ('output' in report) {
      throw computeError(
        'resource_exhausted',
        'output-limit',
        `the program wrote ${report.output} bytes of output, over maxOutputBytes ${maxOutputBytes}`,
        { details: { limit: 'maxOutputBytes', value: maxOutputBytes } },
      );
    }
    const [measures] = measured;
    if (measures === undefined) throw new MillraceError('internal', 'a program ended without measurements');
    if ('exit' in report) return { exitCode: report.exit, trap: null, ...measures };
    const { trap: message, trace } = report;
    return { exitCode: TRAPPED, trap: { message, trace }, ...measures };
  }

  /** Ends what runs; it rejects. Resolves when nothing is left. Harmless when repeated. */
  async close(): Promise<void> {
    await (await this.#engine).close();
    await this.#pool.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

type Measured = Pick<WasiEnding, 'fuelUsed' | 'wallMs' | 'memoryBytes'>;

/** What the engine is told. @throws MillraceError `invalid_argument` (reason `bad-limit`). */
function engineLimits(limits: WasiCommandLimits): Limits {
  const {
    maxOutputBytes,
    maxStorageBytes: _storage,
    maxFiles: _files,
    maxOpenFiles: _open,
    ...shared
  } = limits;
  return resolveLimits({
    ...shared,
    // What is written to the streams goes the way of diagnostics.
    maxLogBytes: maxOutputBytes * FRAME_OVERHEAD,
    clock: 'host',
    random: 'host',
  });
}

function checkedLimits(limits: WasiCommandLimits): WasiCommandLimits {
  const bounds = {
    maxOutputBytes: [0, MAX_OUTPUT_BYTES],
    maxStorageBytes: [0, Number.MAX_SAFE_INTEGER],
    maxFiles: [0, 100_000_000],
    maxOpenFiles: [0, 65_536],
  } as const;
  for (const [name, [least, most]] of Object.entries(bounds)) {
    const value = limits[name as keyof typeof bounds];
    if (Number.isSafeInteger(value) && value >= least && value <= most) continue;
    throw computeError(
      'invalid_argument',
      'bad-limit',
      `compute: limit ${name} must be a whole number from ${least} to ${most}, got ${String(value)}`,
    );
  }
  return limits;
}

function checkText(text: string): void {
  if (!text.includes('\0')) return;
  throw computeError(
    'invalid_argument',
    'bad-ref',
    `an argument or variable of a program must not hold a NUL character, got ${JSON.stringify(text)}`,
  );
}

async function mountOf({ guestPath, hostPath, writable = false }: WasiMount): Promise<Mount> {
  if (!guestPath.startsWith('/') || guestPath.includes('\0')) {
    throw computeError(
      'invalid_argument',
      'bad-ref',
      `a granted folder's path in the program must start with /, got ${JSON.stringify(guestPath)}`,
    );
  }
  const real = await realpath(path.resolve(hostPath)).catch((error: unknown) => {
    throw new MillraceError('not_found', `the folder for ${guestPath}, ${hostPath}, cannot be reached`, {
      cause: error,
    });
  });
  if (!(await stat(real)).isDirectory()) {
    throw new MillraceError('invalid_argument', `what is granted as ${guestPath}, ${hostPath}, is no folder`);
  }
  return { guestPath, hostPath: real, writable };
}
