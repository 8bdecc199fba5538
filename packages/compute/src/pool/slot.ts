/**
 * The memory a guest worker shares with its caller and the supervisor. It decides who ended a call: each of the three
 * moves the state by compare-and-exchange, and only the one that succeeds reports. So a call has exactly one
 * ending, its true one, whatever the clocks say afterwards.
 *
 *     BOOTING ─▶ IDLE ─▶ PREPARING ─▶ RUNNING ─▶ IDLE     (worker; IDLE to PREPARING: caller)
 *                            └──────────┴──────▶ LATE      (supervisor, then it terminates the worker)
 *                            └──────────┴──────▶ CANCELED  (caller, which then asks the supervisor to)
 */
import type { GuestLimits } from './guest-engine.ts';

export const PHASE = { booting: 0, idle: 1, preparing: 2, running: 3, late: 4, canceled: 5 } as const;

/** Limits that are numbers, in the order of their cells. */
const NUMBERS = [
  'maxMemoryMb',
  'maxWallMs',
  'maxPrepareMs',
  'maxInputBytes',
  'maxOutputBytes',
  'maxLogBytes',
  'maxModuleBytes',
  'maxFunctions',
  'maxImports',
  'maxTableEntries',
] as const satisfies readonly (keyof GuestLimits)[];

/** 32-bit cells. */
const WAKE = 0;
const STATE = 1;
const MEMORY_KIB = 2;
const OUTPUT_BYTES = 3;
/** 64-bit cells, behind those. */
const DEADLINE_NS = 2;
const POSTED_NS = 3;
const STARTED_NS = 4;
const ENDED_NS = 5;
const NOW_NS = 6;
const SEED = 7;
/** Cells that are doubles, behind those. */
const CLOCK = 8;
const RANDOM = 9;
const PREPARE_MS = 10;
const WALL_MS = 11;
const LOG_BYTES = 12;
const LOG_DROPPED_BYTES = 13;
/** NaN: `null`. */
const MAX_FUEL = 14;
const FUEL_USED = 15;
const FIRST_NUMBER = 16;
const SLOT_BYTES = (FIRST_NUMBER + NUMBERS.length) * 8;

/** The phase is in the low bits, the number of the call above it: a late actor can never hit a later call. */
const PHASE_BITS = 3;

export interface Measures {
  readonly memoryBytes: number;
  readonly outputBytes: number;
  readonly prepareMs: number;
  readonly wallMs: number;
  readonly logBytes: number;
  readonly logDroppedBytes: number;
  readonly fuelUsed: number | null;
}

export class Slot {
  readonly shared: SharedArrayBuffer;
  readonly #cells: Int32Array;
  readonly #times: BigInt64Array;
  readonly #numbers: Float64Array;

  constructor(shared = new SharedArrayBuffer(SLOT_BYTES)) {
    this.shared = shared;
    this.#cells = new Int32Array(shared, 0, 4);
    this.#times = new BigInt64Array(shared);
    this.#numbers = new Float64Array(shared);
  }

  get state(): number {
    return Atomics.load(this.#cells, STATE);
  }

  /** When the phase it is in has lasted too long. */
  get deadlineNs(): bigint {
    return Atomics.load(this.#times, DEADLINE_NS);
  }

  set deadlineNs(value: bigint) {
    Atomics.store(this.#times, DEADLINE_NS, value);
  }

  /** Moves on, if nobody else has. */
  move(from: number, to: number): boolean {
    return Atomics.compareExchange(this.#cells, STATE, from, to) === from;
  }

  /** Worker: boots are over. */
  ready(): void {
    Atomics.store(this.#cells, STATE, PHASE.idle);
  }

  /** Caller: a call begins. The worker finds it in its port after {@link wake}. */
  post(call: number, limits: GuestLimits): void {
    const now = process.hrtime.bigint();
    for (const [index, name] of NUMBERS.entries()) this.#numbers[FIRST_NUMBER + index] = limits[name];
    this.#numbers[CLOCK] = limits.clock === 'host' ? 1 : 0;
    this.#numbers[RANDOM] = limits.random === 'host' ? 1 : 0;
    this.#numbers[MAX_FUEL] = limits.maxFuel ?? Number.NaN;
    this.#times[NOW_NS] = BigInt.asIntN(64, limits.now);
    this.#times[SEED] = BigInt.asIntN(64, limits.seed);
    Atomics.store(this.#times, POSTED_NS, now);
    Atomics.store(this.#times, STARTED_NS, 0n);
    Atomics.store(this.#times, ENDED_NS, 0n);
    this.note(0, 0);
    this.deadlineNs = now + nanosecondsOf(limits.maxPrepareMs);
    Atomics.store(this.#cells, STATE, stateOf(call, PHASE.preparing));
  }

  wake(): void {
    Atomics.store(this.#cells, WAKE, 1);
    Atomics.notify(this.#cells, WAKE);
  }

  /** Worker: blocks until woken. */
  sleep(): void {
    Atomics.wait(this.#cells, WAKE, 0);
    Atomics.store(this.#cells, WAKE, 0);
  }

  /** Worker: the limits of the call. They travel in here because as part of a message they would be most of its cost. */
  get limits(): GuestLimits {
    const numbers = {} as Record<(typeof NUMBERS)[number], number>;
    for (const [index, name] of NUMBERS.entries()) numbers[name] = this.#numbers[FIRST_NUMBER + index] ?? 0;
    return {
      ...numbers,
      now: BigInt.asUintN(64, this.#times[NOW_NS] ?? 0n),
      seed: BigInt.asUintN(64, this.#times[SEED] ?? 0n),
      maxFuel: counted(this.#numbers[MAX_FUEL]),
      clock: this.#numbers[CLOCK] === 1 ? 'host' : 'frozen',
      random: this.#numbers[RANDOM] === 1 ? 'host' : 'seeded',
    };
  }

  /** Worker: preparing is over, the guest begins. False when the call has been ended from outside. */
  start(call: number, wallNs: bigint): boolean {
    const now = process.hrtime.bigint();
    Atomics.store(this.#times, STARTED_NS, now);
    // The new deadline before the new phase: whoever sees the phase sees its deadline.
    this.deadlineNs = now + wallNs;
    return this.move(stateOf(call, PHASE.preparing), stateOf(call, PHASE.running));
  }

  /** Supervisor: when it was ended. */
  ended(): void {
    Atomics.store(this.#times, ENDED_NS, process.hrtime.bigint());
  }

  /** Whether the guest of the last call began to run. */
  get started(): boolean {
    return Atomics.load(this.#times, STARTED_NS) !== 0n;
  }

  note(memoryBytes: number, outputBytes: number): void {
    this.#cells[MEMORY_KIB] = memoryBytes / 1024;
    this.#cells[OUTPUT_BYTES] = outputBytes;
  }

  /** Worker: measurements of a call that ends now. */
  measure(measures: Omit<Measures, 'memoryBytes' | 'outputBytes'>): void {
    this.#numbers[PREPARE_MS] = measures.prepareMs;
    this.#numbers[WALL_MS] = measures.wallMs;
    this.#numbers[LOG_BYTES] = measures.logBytes;
    this.#numbers[LOG_DROPPED_BYTES] = measures.logDroppedBytes;
    this.#numbers[FUEL_USED] = measures.fuelUsed ?? Number.NaN;
  }

  /** Measurements of a call that has reported. */
  get measures(): Measures {
    return {
      memoryBytes: (this.#cells[MEMORY_KIB] ?? 0) * 1024,
      outputBytes: this.#cells[OUTPUT_BYTES] ?? 0,
      prepareMs: this.#numbers[PREPARE_MS] ?? 0,
      wallMs: this.#numbers[WALL_MS] ?? 0,
      logBytes: this.#numbers[LOG_BYTES] ?? 0,
      logDroppedBytes: this.#numbers[LOG_DROPPED_BYTES] ?? 0,
      fuelUsed: counted(this.#numbers[FUEL_USED]),
    };
  }

  /** What is known of a call that did not get to report. */
  get remains(): Omit<Measures, 'logBytes' | 'logDroppedBytes' | 'fuelUsed'> {
    const [posted, started] = [Atomics.load(this.#times, POSTED_NS), Atomics.load(this.#times, STARTED_NS)];
    const ended = Atomics.load(this.#times, ENDED_NS) || process.hrtime.bigint();
    return {
      memoryBytes: (this.#cells[MEMORY_KIB] ?? 0) * 1024,
      outputBytes: this.#cells[OUTPUT_BYTES] ?? 0,
      prepareMs: started === 0n ? milliseconds(ended - posted) : milliseconds(started - posted),
      wallMs: started === 0n ? 0 : milliseconds(ended - started),
    };
  }
}

function counted(value = Number.NaN): number | null {
  return Number.isNaN(value) ? null : value;
}

export function stateOf(call: number, phase: number): number {
  return (call << PHASE_BITS) | phase | 0;
}

export function phaseOf(state: number): number {
  return state & ((1 << PHASE_BITS) - 1);
}

/** The same call in another phase. */
export function withPhase(state: number, phase: number): number {
  return (state & ~((1 << PHASE_BITS) - 1)) | phase;
}

export function milliseconds(ns: bigint): number {
  return Number(ns) / 1e6;
}

export function nanosecondsOf(ms: number): bigint {
  return BigInt(Math.round(ms * 1e6));
}

/**
 * Whether the supervisor sleeps. It looks at the slots only while something runs; whoever starts a call asks here
 * whether it has to be woken, which spares a message per call.
 */
export class Attention {
  readonly shared: SharedArrayBuffer;
  readonly #cells: Int32Array;

  constructor(shared = new SharedArrayBuffer(4)) {
    this.shared = shared;
    this.#cells = new Int32Array(shared);
  }

  /** Supervisor: goes to sleep. It must look at the slots once more after this. */
  fallAsleep(): void {
    Atomics.store(this.#cells, 0, 1);
  }

  /** True for exactly one asker per sleep. */
  claimWake(): boolean {
    return Atomics.exchange(this.#cells, 0, 0) === 1;
  }
}
