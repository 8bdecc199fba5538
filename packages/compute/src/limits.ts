/**
 * What bounds one invocation, what the guest may observe of the world, and what is measured.
 */
import { computeError } from './errors.ts';
import type { ComputeReason } from './errors.ts';

/** One MiB is 16 pages of WebAssembly memory. */
export const PAGES_PER_MB = 16;
export const PAGE_BYTES = 65_536;

/** Every limit is on; a breach fails the invocation with an error that names the limit and the value. */
export interface Limits {
  /** Guest memory in MiB, 1 to 4096, exact to a page. Growing past it is refused to the guest (-1). Default 32. */
  readonly maxMemoryMb: number;
  /** From the guest's first instruction (start-up code included) to its last, 1 ms to 30 days. Default 250. */
  readonly maxWallMs: number;
  /** Validating and compiling an artifact that is not compiled yet, 1 ms to 1 h. Default 5,000. */
  readonly maxPrepareMs: number;
  /** Input. Default 4 MiB. */
  readonly maxInputBytes: number;
  /** What the guest writes as its result. Default 4 MiB. */
  readonly maxOutputBytes: number;
  /** Diagnostics handed to `stderr`; what comes after is counted and dropped, the guest goes on. Default 64 KiB. */
  readonly maxLogBytes: number;
  /** Size of the artifact. Default 32 MiB. */
  readonly maxModuleBytes: number;
  /** Functions a module defines. Default 50,000. */
  readonly maxFunctions: number;
  /** Imports of a module. Default 128. */
  readonly maxImports: number;
  /** Entries of each table of a module; growing past it is refused to the guest (-1). Default 65,536. */
  readonly maxTableEntries: number;
  /**
   * Fuel: what the guest does is counted and it ends as `out-of-fuel` past this, at the same place on every machine. 0 to
   * 2^53 - 1, in units of about one simple instruction; see `fuel/instrument.ts` for the prices. Default `null`: not counted.
   */
  readonly maxFuel: number | null;
  /** The wall clock the guest sees: milliseconds or a Date, or nanoseconds as bigint. Default 0, 1970-01-01. */
  readonly now: number | bigint | Date;
  /**
   * `frozen` (default): the wall clock stands at `now`, and the monotonic clock counts 1 microsecond for each time it is
   * read, so a run can be repeated exactly. `host`: both are the machine's.
   */
  readonly clock: 'frozen' | 'host';
  /** `seeded` (default): a stream that only depends on `seed`. `host`: the machine's entropy. */
  readonly random: 'seeded' | 'host';
  /** 64 bits that start the seeded random stream. Default {@link DEFAULT_SEED}, the reference's. */
  readonly seed: bigint;
  /** Hears the guest's diagnostics (fd 2), as they are written. Default: they are dropped. */
  readonly stderr: ((bytes: Uint8Array) => void) | null;
  /** Called once per invocation that got as far as the guest, also when it failed. */
  readonly metricsSink: ((metrics: Metrics) => void) | null;
}

/** The seed of the reference's random stream. */
export const DEFAULT_SEED = 0x0123456789abcdefn;

export const DEFAULT_LIMITS: Limits = {
  maxMemoryMb: 32,
  maxWallMs: 250,
  maxPrepareMs: 5_000,
  maxInputBytes: 4 * 1024 * 1024,
  maxOutputBytes: 4 * 1024 * 1024,
  maxLogBytes: 64 * 1024,
  maxModuleBytes: 32 * 1024 * 1024,
  maxFunctions: 50_000,
  maxImports: 128,
  maxTableEntries: 65_536,
  maxFuel: null,
  now: 0,
  clock: 'frozen',
  random: 'seeded',
  seed: DEFAULT_SEED,
  stderr: null,
  metricsSink: null,
};

/** Measurements of one invocation. */
export interface Metrics {
  /** In the guest, in milliseconds with fractions. Neither waiting for a worker nor compiling is in it. */
  readonly wallMs: number;
  /**
   * The guest's memory at its end. For a guest that was killed: as it stood when it last called the host, since
   * a killed thread cannot be asked. 0 when it has none.
   */
  readonly memoryBytes: number;
  /** `wall-limit` for that limit alone; every other failure is `trapped`, told apart by `reason`. */
  readonly status: 'ok' | 'trapped' | 'wall-limit';
  /** The reason of the failure; `canceled` when the caller's signal ended it; `null` when it went well. */
  readonly reason: ComputeReason | 'canceled' | null;
  /** Waiting for a free worker. */
  readonly queuedMs: number;
  /** Validating and compiling; 0 when that was done before. */
  readonly prepareMs: number;
  readonly inputBytes: number;
  /** What the guest had written to its standard output. */
  readonly outputBytes: number;
  /** Fuel used; `null` when it is not counted, or the guest was killed. */
  readonly fuelUsed: number | null;
  /** Diagnostics written, those dropped included. */
  readonly logBytes: number;
  /** Diagnostics dropped because of `maxLogBytes`. */
  readonly logDroppedBytes: number;
}

/** What a single call may say: limits that differ from the manager's, and a signal that ends the guest. */
export interface InvokeOptions extends Partial<Limits> {
  /** When it aborts, the guest is killed, and once it is gone the call rejects with the signal's reason. */
  readonly signal?: AbortSignal;
}

/** The same options with the wall clock the guest observes. */
export function withNow(options: InvokeOptions, now: Limits['now']): InvokeOptions {
  return { ...options, now };
}

/** The same options with somebody to hear the guest's diagnostics. */
export function withLogWriter(options: InvokeOptions, stderr: NonNullable<Limits['stderr']>): InvokeOptions {
  return { ...options, stderr };
}

/** The same options with somebody to hear the measurements. */
export function withMetricsSink(
  options: InvokeOptions,
  metricsSink: NonNullable<Limits['metricsSink']>,
): InvokeOptions {
  return { ...options, metricsSink };
}

const GIB = 1024 ** 3;
const BOUNDS = {
  maxMemoryMb: [1, 4096],
  maxWallMs: [1, 30 * 24 * 60 * 60 * 1000],
  maxPrepareMs: [1, 60 * 60 * 1000],
  maxInputBytes: [0, GIB],
  maxOutputBytes: [0, GIB],
  maxLogBytes: [0, GIB],
  maxModuleBytes: [8, GIB],
  maxFunctions: [0, 1_000_000],
  maxImports: [0, 100_000],
  maxTableEntries: [0, 10_000_000],
} as const satisfies Partial<Record<keyof Limits, readonly [number, number]>>;

/** What a module may need at most, wherever it runs: past these no limits could be set for it. */
export const WIDEST_LIMITS: Partial<Limits> = {
  maxMemoryMb: BOUNDS.maxMemoryMb[1],
  maxFunctions: BOUNDS.maxFunctions[1],
  maxImports: BOUNDS.maxImports[1],
  maxTableEntries: BOUNDS.maxTableEntries[1],
};

/**
 * The limits in force: `base` (by default the defaults) with what `overrides` says; `undefined` overrides nothing, and members
 * that are no limits are left out.
 *
 * @throws MillraceError `invalid_argument` for a value out of its bounds. There is no "unlimited": 0 is not a way to ask
 * for it.
 */
export function resolveLimits(overrides: Partial<Limits>, base: Limits = DEFAULT_LIMITS): Limits {
  const limits: Record<string, unknown> = { ...base };
  // Every call comes through here: only what differs is looked at.
  for (const name of Object.keys(overrides)) {
    const value = overrides[name as keyof Limits];
    if (value === undefined || !Object.hasOwn(DEFAULT_LIMITS, name)) continue;
    checkLimit(name as keyof Limits, value);
    limits[name] = value;
  }
  return limits as unknown as Limits;
}

function checkLimit(name: keyof Limits, value: unknown): void {
  if (name in BOUNDS) {
    const [least, most] = BOUNDS[name as keyof typeof BOUNDS];
    if (Number.isSafeInteger(value) && (value as number) >= least && (value as number) <= most) return;
    throw invalid(`${name} must be a whole number from ${least} to ${most}, got ${String(value)}`);
  }
  if (name === 'maxFuel') {
    if (value === null || (Number.isSafeInteger(value) && (value as number) >= 0)) return;
    throw invalid(`maxFuel must be a whole number from 0 to 2^53 - 1, or null, got ${JSON.stringify(value)}`);
  }
  if (name === 'now') nanoseconds(value as Limits['now']);
  else if (name === 'seed') {
    if (typeof value !== 'bigint') throw invalid(`seed must be a bigint, got ${typeof value}`);
  } else if (name === 'clock' || name === 'random') {
    const modes = name === 'clock' ? ['frozen', 'host'] : ['seeded', 'host'];
    if (!modes.includes(value as string))
      throw invalid(`${name} must be ${modes.join(' or ')}, got ${String(value)}`);
  } else if (value !== null && typeof value !== 'function') {
    throw invalid(`${name} must be a function, got ${typeof value}`);
  }
}

/**
 * `now` as nanoseconds since 1970, rounded down.
 *
 * @throws MillraceError `invalid_argument` unless it is a moment from 1970 on that fits 64 bits.
 */
export function nanoseconds(now: Limits['now']): bigint {
  const MAX = 2n ** 64n - 1n;
  let value: bigint;
  if (typeof now === 'bigint') value = now;
  else {
    const ms = typeof now === 'number' ? now : now.getTime();
    if (!Number.isFinite(ms)) throw invalid(`now must be a moment in time, got ${String(now)}`);
    // Whole milliseconds apart from the rest: their product with 1e6 would leave the exact range of a double.
    const whole = Math.floor(ms);
    value = BigInt(whole) * 1_000_000n + BigInt(Math.floor((ms - whole) * 1e6));
  }
  if (value < 0n || value > MAX) throw invalid(`now must be from 1970 to 2554, got ${String(now)}`);
  return value;
}

function invalid(rule: string): Error {
  return computeError('invalid_argument', 'bad-limit', `compute: limit ${rule}`);
}
