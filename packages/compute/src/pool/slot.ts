/**
 * The memory a guest worker shares with its caller and the supervisor. It decides who ended a call: each of the three
 * moves the state by compare-and-exchange, and only the one that succeeds reports. So a call has exactly one
 * ending, its true one, whatever the clocks say afterwards.
 *
 *     BOOTING ─▶ IDLE ─▶ PREPARING ─▶ RUNNING ─▶ IDLE     (worker; IDLE to PREPARING: caller)
 *                            └──────────┴──────▶ LATE      (supervisor, then it terminates the worker)
 *                            └──────────┴──────▶ CANCELED  (caller, which then asks the supervisor to)
 *
 * What a call needs and gives travels in here, too, as long as it is small: a message with a job or an output in it costs twice
 * what waking the other thread does. Both sides own what they read: the worker copies the input, the caller the output,
 * and neither is written again before the other side has had its turn.
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

/** 32-bit cells. WAKE is 1 from waking the worker until it is awake. */
const WAKE = 0;
const STATE = 1;
const MEMORY_KIB = 2;
const OUTPUT_BYTES = 3;
const CELLS = 4;
/** 64-bit cells, behind those. */
const DEADLINE_NS = CELLS / 2;
const POSTED_NS = DEADLINE_NS + 1;
const STARTED_NS = DEADLINE_NS + 2;
const ENDED_NS = DEADLINE_NS + 3;
const NOW_NS = DEADLINE_NS + 4;
const SEED = DEADLINE_NS + 5;
/** Cells that are doubles, behind those. */
const CLOCK = SEED + 1;
const RANDOM = CLOCK + 1;
const PREPARE_MS = CLOCK + 2;
const WALL_MS = CLOCK + 3;
const LOG_BYTES = CLOCK + 4;
const LOG_DROPPED_BYTES = CLOCK + 5;
/** NaN: `null`. */
const MAX_FUEL = CLOCK + 6;
const FUEL_USED = CLOCK + 7;
const FIRST_NUMBER = CLOCK + 8;
/** The code to run, and the bytes of input and output in here; {@link ELSEWHERE}: they come as a message. */
const CODE = FIRST_NUMBER + NUMBERS.length;
const INPUT_LENGTH = CODE + 1;
const RESULT_LENGTH = CODE + 2;
const ELSEWHERE = -1;
/** Longer inputs and outputs are messages: copying them costs more than sending them. */
export const SHARED_BYTES = 16 * 1024;
const INPUT_AT = (RESULT_LENGTH + 1) * 8;
const RESULT_AT = INPUT_AT + SHARED_BYTES;
const SLOT_BYTES = RESULT_AT + SHARED_BYTES;

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
  readonly #input: Uint8Array;
  readonly #result: Uint8Array;

  constructor(shared = new SharedArrayBuffer(SLOT_BYTES)) {
    this.shared = shared;
    this.#cells = new Int32Array(shared, 0, CELLS);
    // No longer than the numbers: what follows them is bytes.
    this.#times = new BigInt64Array(shared, 0, INPUT_AT / 8);
    this.#numbers = new Float64Array(shared, 0, INPUT_AT / 8);
    this.#input = new Uint8Array(shared, INPUT_AT, SHARED_BYTES);
    this.#result = new Uint8Array(shared, RESULT_AT, SHARED_BYTES);
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

  /**
   * Caller: a call begins. With `job` the worker finds all of it in here after {@link wake}, else the rest in its port.
   */
  post(
    call: number,
    limits: GuestLimits,
    job: { readonly code: number; readonly input: Uint8Array } | null,
  ): void {
    const now = process.hrtime.bigint();
    this.#numbers[CODE] = job?.code ?? 0;
    this.#numbers[INPUT_LENGTH] = job?.input.length ?? ELSEWHERE;
    if (job !== null) this.#input.set(job.input);
    for (let index = 0; index < NUMBERS.length; index += 1) {
      this.#numbers[FIRST_NUMBER + index] = limits[NUMBERS[index] as (typeof NUMBERS)[number]];
    }
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

  /** Worker: the job that is in here; `null` when it comes as a message. The input is a copy. */
  takeJob(): { readonly call: number; readonly code: number; readonly input: Uint8Array } | null {
    const length = this.#numbers[INPUT_LENGTH] ?? ELSEWHERE;
    if (length === ELSEWHERE) return null;
    const input = new Uint8Array(length);
    input.set(this.#input.subarray(0, length));
    return { call: callOf(this.state), code: this.#numbers[CODE] ?? 0, input };
  }

  /** Worker: the output of a call that ends now, if it is small; false: it has to be sent. */
  giveResult(output: Uint8Array): boolean {
    if (output.length > SHARED_BYTES) return false;
    this.#result.set(output);
    this.#numbers[RESULT_LENGTH] = output.length;
    return true;
  }

  /** Caller: the output the worker gave, as a copy. */
  takeResult(): Uint8Array {
    const length = this.#numbers[RESULT_LENGTH] ?? 0;
    const output = new Uint8Array(length);
    output.set(this.#result.subarray(0, length));
    return output;
  }

  /**
   * Worker: the limits of the call. They travel in here because as part of a message they would be most of its cost. Spelled
   * out, since an object made by computed names is ten times as dear.
   */
  get limits(): GuestLimits {
    const numbers = this.#numbers;
    return {
      maxMemoryMb: numbers[FIRST_NUMBER] as number,
      maxWallMs: numbers[FIRST_NUMBER + 1] as number,
      maxPrepareMs: numbers[FIRST_NUMBER + 2] as number,
      maxInputBytes: numbers[FIRST_NUMBER + 3] as number,
      maxOutputBytes: numbers[FIRST_NUMBER + 4] as number,
      maxLogBytes: numbers[FIRST_NUMBER + 5] as number,
      maxModuleBytes: numbers[FIRST_NUMBER + 6] as number,
      maxFunctions: numbers[FIRST_NUMBER + 7] as number,
      maxImports: numbers[FIRST_NUMBER + 8] as number,
      maxTableEntries: numbers[FIRST_NUMBER + 9] as number,
      now: BigInt.asUintN(64, this.#times[NOW_NS] ?? 0n),
      seed: BigInt.asUintN(64, this.#times[SEED] ?? 0n),
      maxFuel: counted(numbers[MAX_FUEL]),
      clock: numbers[CLOCK] === 1 ? 'host' : 'frozen',
      random: numbers[RANDOM] === 1 ? 'host' : 'seeded',
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

/** The call a state is of. */
function callOf(state: number): number {
  return state >>> PHASE_BITS;
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
