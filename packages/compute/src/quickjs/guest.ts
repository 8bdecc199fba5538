/**
 * The worker side of the `quickjs` engine. Preparing a compute evaluates its bundle once, in an empty QuickJS, and takes a
 * picture of the memory; each invocation starts from that picture (`image.ts` has the measurements).
 *
 * So a bundle's top level runs once, and has to come out the same wherever it does: it sees the clock at 1970, the default
 * seed and no input. What it wrote to the console begins the diagnostics of every invocation, the fuel it used
 * is charged to every invocation, and when it failed every invocation fails.
 */
import { getRandomValues } from 'node:crypto';
import { computeError } from '../errors.ts';
import type {
  GuestCall,
  GuestEngine,
  GuestFailure,
  GuestLimits,
  GuestOutcome,
} from '../pool/guest-engine.ts';
import { DEFAULT_SEED, PAGES_PER_MB } from '../limits.ts';
import { FuelGauge, outOfFuel } from '../fuel/gauge.ts';
import { moduleError } from '../wasm/binary.ts';
import { jsonProblem } from '../json-text.ts';
import type { Image } from './image.ts';
import { loadImage, restoreImage, takeImage } from './image.ts';
import { DRIVER, HOST, PRELUDE } from './prelude.ts';
import { FIRST_PAGES, Vm, decode, quickjsCode } from './vm.ts';
import type { QuickjsCode } from './vm.ts';

/** Pointers into the memory of an instance, the same in every copy of its image. */
interface Handles {
  readonly runtime: number;
  readonly context: number;
  /** The prelude's functions, by {@link DRIVER}. */
  readonly driver: readonly number[];
}

/** A compute that has started up. */
export interface PreparedJs {
  readonly code: QuickjsCode;
  readonly handles: Handles;
  readonly image: Image;
  /** How starting up failed; then there is no image. */
  readonly failure: GuestFailure | null;
  /** Diagnostics and fuel of starting up. */
  readonly log: Uint8Array;
  readonly fuel: number;
}

/** What a stack trace calls the bundle. */
const FILE = 'compute.js';
const PRELUDE_FILE = 'millrace:prelude';
/** QuickJS cannot use more than half of the 32-bit address space. */
const MAX_PAGES = 32_768;
const MAX_ERROR_BYTES = 8 * 1024;
/** Kept of what start-up writes. */
const MAX_START_LOG_BYTES = 64 * 1024;
/** Instances a worker keeps, and the memory they may have in all. */
const MAX_KEPT = 8;
const MAX_KEPT_BYTES = 64 * 1024 * 1024;
const EVAL_MODULE = 1;
/** Milliseconds the frozen monotonic clock counts each time it is read. */
const TICK_MS = 0.001;
const NO_IMAGE: Image = { pages: FIRST_PAGES, index: new Int32Array(0), blocks: new Uint8Array(0) };

/** What the guest of a call has told. */
interface Session {
  readonly limits: GuestLimits;
  readonly log: (bytes: Uint8Array) => void;
  readonly note: (memoryBytes: number, outputBytes: number) => void;
  /** `performance.now()` at which the wall limit is over; `Infinity` while preparing, which is limited from outside. */
  readonly deadline: number;
  readonly now: number | null;
  startedAt: number;
  clockReads: number;
  result: Uint8Array<ArrayBuffer> | null;
  resultBytes: number;
  failure: GuestFailure | null;
  late: boolean;
  memoryRefused: boolean;
}

/** The host side of one instance; serves one session after the other. */
class Program {
  readonly vm: Vm;
  /** Of the instance; set once it has started. */
  handles: Handles = { runtime: 0, context: 0, driver: [] };
  #session: Session | null = null;

  constructor(code: QuickjsCode, pages: number, maxPages: number) {
    this.vm = new Vm(
      code,
      {
        call: (operation, text) => this.#called(operation, text),
        interrupt: () => this.#interrupt(),
        now: () => this.#session?.now ?? Date.now(),
        grown: (allowed) => this.#grown(allowed),
      },
      pages,
      maxPages,
    );
  }

  begin(session: Session): void {
    this.#session = session;
  }

  end(): void {
    this.#session = null;
  }

  #called(operation: number, text: () => Uint8Array): number {
    const session = this.#session;
    if (session === null) return 0;
    switch (operation) {
      case HOST.log:
        session.log(text());
        return 0;
      case HOST.result: {
        if (session.result !== null || session.failure !== null) return 0;
        const found = text();
        session.resultBytes = found.length;
        const { maxOutputBytes } = session.limits;
        if (found.length > maxOutputBytes) {
          session.failure = {
            code: 'resource_exhausted',
            reason: 'output-limit',
            message: `guest returned ${found.length} bytes of JSON, over maxOutputBytes ${maxOutputBytes}`,
            details: { limit: 'maxOutputBytes', value: maxOutputBytes },
          };
        } else session.result = found.slice();
        return 0;
      }
      case HOST.error:
        this.fail(decode(text().subarray(0, MAX_ERROR_BYTES)));
        return 0;
      case HOST.notJson:
        session.failure ??= {
          code: 'invalid_argument',
          reason: 'bad-output',
          message: `guest returned ${decode(text().subarray(0, 100))}, which is no JSON document`,
        };
        return 0;
      case HOST.clock: {
        session.clockReads += 1;
        const frozen = session.limits.clock === 'frozen';
        const ms = frozen ? session.clockReads * TICK_MS : performance.now() - session.startedAt;
        return this.vm.api.newFloat64(this.handles.context, ms);
      }
      default:
        return 0;
    }
  }

  /** Something was thrown and nobody in the guest caught it. */
  fail(text: string): void {
    const session = this.#session;
    if (session === null || session.failure !== null || session.result !== null || session.late) return;
    const said = text.trimEnd();
    // The first line is what it is, the others say where.
    const memory = session.memoryRefused && said.includes('out of memory');
    session.failure = memory
      ? {
          code: 'resource_exhausted',
          reason: 'memory-limit',
          message: `${said.split('\n', 1)[0]}: maxMemoryMb ${session.limits.maxMemoryMb} is used up`,
          details: { limit: 'maxMemoryMb', value: session.limits.maxMemoryMb, thrown: said },
        }
      : { code: 'invalid_argument', reason: 'trap', message: said };
    session.log(Buffer.from(`Uncaught ${said}\n`));
  }

  #interrupt(): boolean {
    const session = this.#session;
    if (session === null || performance.now() < session.deadline) return false;
    session.late = true;
    return true;
  }

  #grown(allowed: boolean): void {
    const session = this.#session;
    if (session === null) return;
    if (!allowed) session.memoryRefused = true;
    else session.note(this.vm.memory.buffer.byteLength, 0);
  }

  /** Calls a function of the prelude; what it returns is the caller's. `null` when it threw. */
  drive(operation: keyof typeof DRIVER, ...values: number[]): number | null {
    return this.settled(this.call(this.handles.driver[DRIVER[operation]] ?? 0, values));
  }

  /** Calls a function; gives what it returns, which may be an exception. 0 when there is no memory to call it. */
  call(callee: number, values: readonly number[]): number {
    const { api } = this.vm;
    const argv = api.malloc(4 * Math.max(1, values.length)) >>> 0;
    if (argv === 0) return 0;
    this.vm.write(argv, new Uint8Array(new Int32Array(values).buffer));
    const returned = api.call(this.handles.context, callee, api.getUndefined(), values.length, argv);
    api.free(argv);
    return returned;
  }

  /** The value a call or an evaluation gave back, or `null` when it is an exception, which is then reported. */
  settled(value: number): number | null {
    if (value === 0) return this.#noMemory();
    const { api } = this.vm;
    const { context, driver } = this.handles;
    const thrown = api.resolveException(context, value);
    if (thrown === 0) return value;
    // The prelude puts it into words. If even that throws, there is no memory for it.
    const told = this.call(driver[DRIVER.fail] ?? 0, [thrown]);
    if (told === 0 || api.resolveException(context, told) !== 0) return this.#noMemory();
    api.freeValue(context, told);
    return null;
  }

  #noMemory(): null {
    const session = this.#session;
    if (session !== null) session.memoryRefused = true;
    this.fail('InternalError: out of memory');
    return null;
  }

  /** Runs what promises and timers have in store, until the compute has an ending or nothing is left. */
  pump(session: Session): void {
    const { api } = this.vm;
    const { runtime, context } = this.handles;
    const ended = (): boolean => session.result !== null || session.failure !== null || session.late;
    // Where the engine wants to tell which context a job ran in.
    const cell = api.malloc(4) >>> 0;
    if (cell === 0) {
      this.#noMemory();
      return;
    }
    while (!ended()) {
      // One at a time, so that what comes after the ending does not run.
      if (api.isJobPending(runtime) !== 0) {
        const value = this.settled(api.executePendingJob(runtime, 1, cell));
        if (value !== null) api.freeValue(context, value);
        continue;
      }
      const value = this.drive('tick');
      if (value === null) return;
      const ran = api.getFloat64(context, value);
      api.freeValue(context, value);
      if (ran !== 1) return;
    }
  }
}

function sessionOf(
  limits: GuestLimits,
  now: number | null,
  deadline: number,
  log: Session['log'],
  note: Session['note'],
): Session {
  return {
    limits,
    log,
    note,
    deadline,
    now,
    startedAt: performance.now(),
    clockReads: 0,
    result: null,
    resultBytes: 0,
    failure: null,
    late: false,
    memoryRefused: false,
  };
}

function prepare(source: Uint8Array, limits: GuestLimits): PreparedJs {
  const text = Buffer.from(source);
  if (source.includes(0)) throw moduleError('it is not JavaScript: it has a zero byte');
  const maxPages = maxPagesOf(limits);
  const code = quickjsCode(limits.maxFuel !== null);
  const program = new Program(code, FIRST_PAGES, maxPages);
  const { vm } = program;
  const log = new StartLog();
  const session = sessionOf(
    limits,
    0,
    Infinity,
    (bytes) => log.write(bytes),
    () => undefined,
  );
  program.begin(session);
  startPrelude(program);
  const { context } = program.handles;
  const gauge = new FuelGauge(limits);
  gauge.attach(vm.exports, code.fuel);
  const broken = brokenBy(() => {
    const module = program.settled(evaluate(vm, context, text, FILE, EVAL_MODULE));
    if (module === null) return;
    const value = program.drive('start', module);
    if (value !== null) vm.api.freeValue(context, value);
    vm.api.freeValue(context, module);
    program.pump(session);
    program.fail('the bundle never starts: its top level awaits what nothing can bring');
  });
  const dry = gauge.failure();
  if (dry !== null) {
    const details = dry.details ?? {};
    throw computeError(dry.code, dry.reason, `${dry.message}, while it started`, { details });
  }
  if (broken !== null) program.fail(broken);
  program.end();
  if (session.failure?.reason === 'trap' && session.failure.message.startsWith('SyntaxError')) {
    throw moduleError(`it is not JavaScript this engine can run: ${session.failure.message}`);
  }
  return {
    code,
    handles: program.handles,
    image: session.failure === null ? takeImage(vm) : NO_IMAGE,
    failure: session.failure,
    log: log.take(),
    fuel: gauge.used ?? 0,
  };
}

function maxPagesOf(limits: GuestLimits): number {
  const pages = Math.min(limits.maxMemoryMb * PAGES_PER_MB, MAX_PAGES);
  if (pages < FIRST_PAGES) {
    throw moduleError(
      `QuickJS itself takes ${FIRST_PAGES / PAGES_PER_MB} MiB of memory, over maxMemoryMb ${limits.maxMemoryMb}`,
      { limit: 'maxMemoryMb', value: limits.maxMemoryMb },
    );
  }
  return pages;
}

/** Evaluates text; the value is the caller's. 0 when there is no memory for it. */
function evaluate(vm: Vm, context: number, text: Uint8Array, name: string, flags: number): number {
  const code = vm.text(text);
  const file = vm.text(Buffer.from(name));
  if (code === 0 || file === 0) return 0;
  const value = vm.api.eval(context, code, text.length, file, 0, flags);
  vm.api.free(code);
  vm.api.free(file);
  return value;
}

/** Starts QuickJS, and in it the prelude with its way to the host. */
function startPrelude(program: Program): void {
  const { vm } = program;
  const { api } = vm;
  const { runtime, context } = vm.start();
  program.handles = { runtime, context, driver: [] };
  const make = evaluate(vm, context, Buffer.from(PRELUDE), PRELUDE_FILE, 0);
  const name = vm.text(Buffer.from('host'));
  const host = api.newFunction(context, name, 2, 0, 1);
  const made = program.call(make, [host]);
  const driver = Object.values(DRIVER).map((index) => api.getPropNumber(context, made, index));
  for (const value of [make, host, made]) api.freeValue(context, value);
  api.free(name);
  program.handles = { runtime, context, driver };
}

/** Runs guest code. When it broke off in the middle, in words what happened: then the instance is good for nothing more. */
function brokenBy(body: () => void): string | null {
  try {
    body();
    return null;
  } catch (error) {
    if (error instanceof RangeError && error.message.includes('call stack')) return 'stack overflow';
    if (error instanceof WebAssembly.RuntimeError) return error.message;
    throw error;
  }
}

/** Diagnostics of the start, for every invocation to repeat. */
class StartLog {
  readonly #pieces: Uint8Array[] = [];
  #length = 0;
  #dropped = 0;

  write(bytes: Uint8Array): void {
    const piece = bytes.slice(0, MAX_START_LOG_BYTES - this.#length);
    this.#dropped += bytes.length - piece.length;
    if (piece.length > 0) this.#add(piece);
  }

  #add(piece: Uint8Array): void {
    this.#pieces.push(piece);
    this.#length += piece.length;
  }

  take(): Uint8Array {
    if (this.#dropped > 0) {
      this.#add(
        Buffer.from(`\n[warn] ${this.#dropped} more bytes were written while starting, and dropped\n`),
      );
    }
    const all = new Uint8Array(new SharedArrayBuffer(this.#length));
    let at = 0;
    for (const piece of this.#pieces) {
      all.set(piece, at);
      at += piece.length;
    }
    return all;
  }
}

/** Instances whose memory is that of their image, by the key of what they run; longest unused first. */
const kept = new Map<string, Program>();

function programFor(key: string, prepared: PreparedJs, limits: GuestLimits): Program {
  const known = kept.get(key);
  if (known !== undefined) {
    kept.delete(key);
    return known;
  }
  const program = new Program(prepared.code, prepared.image.pages, maxPagesOf(limits));
  program.handles = prepared.handles;
  loadImage(program.vm, prepared.image);
  return program;
}

function keep(key: string, program: Program): void {
  kept.set(key, program);
  let bytes = 0;
  for (const one of kept.values()) bytes += one.vm.memory.buffer.byteLength;
  for (const [oldest, one] of kept) {
    if (oldest === key || (kept.size <= MAX_KEPT && bytes <= MAX_KEPT_BYTES)) return;
    bytes -= one.vm.memory.buffer.byteLength;
    kept.delete(oldest);
  }
}

function run(prepared: PreparedJs, call: GuestCall): GuestOutcome {
  const { limits } = call;
  const deadline = performance.now() + limits.maxWallMs;
  if (prepared.log.length > 0) call.log(prepared.log);
  const gauge = new FuelGauge(limits);
  if (prepared.failure !== null) {
    const { fuel } = prepared;
    const dry = limits.maxFuel !== null && fuel > limits.maxFuel;
    const failure = dry ? outOfFuel(limits.maxFuel) : prepared.failure;
    const fuelUsed = limits.maxFuel === null ? null : Math.min(fuel, limits.maxFuel);
    return { memoryBytes: 0, outputBytes: 0, output: null, failure, fuelUsed };
  }
  const program = programFor(call.key, prepared, limits);
  const { vm } = program;
  const now = limits.clock === 'host' ? null : Number(limits.now / 1_000_000n);
  const session = sessionOf(
    limits,
    now,
    deadline,
    (bytes) => call.log(bytes),
    (memory, output) => call.note(memory, output),
  );
  call.note(vm.memory.buffer.byteLength, 0);
  program.begin(session);
  gauge.attach(vm.exports, prepared.code.fuel, prepared.fuel);
  const broken = brokenBy(() => invoke(program, session, call.input));
  const dry = gauge.failure();
  if (broken !== null && dry === null) program.fail(broken);
  program.end();
  const failure = dry ?? (session.late ? late(limits) : session.failure);
  const outcome: GuestOutcome = {
    memoryBytes: vm.memory.buffer.byteLength,
    outputBytes: session.resultBytes,
    output: failure === null ? session.result : null,
    failure,
    fuelUsed: gauge.used,
  };
  // At once, so that nothing of a call outlives it.
  if (broken === null && restoreImage(vm, prepared.image)) keep(call.key, program);
  return outcome;
}

/** Told by the interrupt handler before the supervisor has noticed: in the same words, but the worker lives. */
function late(limits: GuestLimits): GuestFailure {
  return {
    code: 'deadline_exceeded',
    reason: 'wall-limit',
    message: `wall-clock limit exceeded after ${limits.maxWallMs}ms`,
    details: { limit: 'maxWallMs', value: limits.maxWallMs },
  };
}

/** From the input's bytes to the compute's ending, which is in the session. */
function invoke(program: Program, session: Session, input: Uint8Array): void {
  const { vm } = program;
  const { api } = vm;
  const { context } = program.handles;
  if (input.includes(0)) {
    session.failure = {
      code: 'invalid_argument',
      reason: 'trap',
      message: `the input is not one JSON document: ${jsonProblem(input)}`,
    };
    return;
  }
  const text = vm.text(input);
  const value = text === 0 ? 0 : api.newString(context, text);
  if (program.settled(value) === null) return;
  api.free(text);
  const seed = seedOf(session.limits);
  const high = api.newFloat64(context, Number(seed >> 32n));
  const low = api.newFloat64(context, Number(seed & 0xffff_ffffn));
  if (program.drive('invoke', value, high, low) === null) return;
  program.pump(session);
  program.fail('the promise returned never settles: nothing is left that could settle it');
}

function seedOf(limits: GuestLimits): bigint {
  if (limits.random === 'seeded') return limits.seed;
  return getRandomValues(new BigUint64Array(1))[0] ?? DEFAULT_SEED;
}

/** The metered build is left to the first compute that needs it. */
function warmUp(): void {
  quickjsCode(false);
}

export const guest: GuestEngine = { prepare, run, warmUp };
