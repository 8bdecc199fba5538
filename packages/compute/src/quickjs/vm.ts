/**
 * QuickJS as this package uses it: the WebAssembly of quickjs-emscripten, without that library's JavaScript. Its glue offers
 * the guest the machine's time zone and clock, and costs a millisecond for each instance; what is needed of it is
 * the table of names below. They belong to one build, and so does how much fuel a program uses: the file is held
 * against its digest.
 */
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { CARD_SHIFT, instrument } from '../fuel/instrument.ts';
import { poolShelf } from '../pool/shelf.ts';
import { readModule } from '../wasm/module.ts';

/** The build, part of what a compute's behaviour depends on. */
const WASM_SHA256 = '105c3bed22d457e43e3d1c3c1c6959fda62a8fe06f0fc8a985303c3a2be72232';

/** The build's exports, by the names they have in its C source. */
interface Exports {
  readonly constructors: () => void;
  readonly malloc: (size: number) => number;
  readonly free: (pointer: number) => void;
  readonly setMaxStackSize: (runtime: number, bytes: number) => void;
  readonly newRuntime: () => number;
  readonly newContext: (runtime: number, intrinsics: number) => number;
  readonly enableInterrupts: (runtime: number) => void;
  readonly newFunction: (
    context: number,
    name: number,
    length: number,
    isConstructor: number,
    id: number,
  ) => number;
  readonly newFloat64: (context: number, value: number) => number;
  readonly getFloat64: (context: number, value: number) => number;
  readonly newString: (context: number, text: number) => number;
  readonly getString: (context: number, value: number) => number;
  readonly freeCString: (context: number, text: number) => void;
  readonly freeValue: (context: number, value: number) => void;
  readonly getUndefined: () => number;
  readonly getPropNumber: (context: number, object: number, index: number) => number;
  readonly argument: (argv: number, index: number) => number;
  readonly call: (context: number, callee: number, self: number, argc: number, argv: number) => number;
  readonly eval: (
    context: number,
    code: number,
    length: number,
    file: number,
    detectModule: number,
    flags: number,
  ) => number;
  readonly resolveException: (context: number, value: number) => number;
  readonly isJobPending: (runtime: number) => number;
  readonly executePendingJob: (runtime: number, most: number, lastContext: number) => number;
}

const EXPORTS: Readonly<Record<keyof Exports, string>> = {
  constructors: 'u',
  malloc: 'v',
  free: 'M',
  setMaxStackSize: 'D',
  newRuntime: 'K',
  newContext: 'N',
  enableInterrupts: 'Fa',
  newFunction: 'Da',
  newFloat64: 'Y',
  getFloat64: 'Z',
  newString: '_',
  getString: '$',
  freeCString: 'S',
  freeValue: 'P',
  getUndefined: 'E',
  getPropNumber: 'ia',
  argument: 'Ea',
  call: 'ma',
  eval: 'pa',
  resolveException: 'na',
  isJobPending: 'fa',
  executePendingJob: 'ga',
};

export const PAGE_BYTES = 65_536;
/** What restoring goes by. */
export const BLOCK_BYTES = 1 << CARD_SHIFT;
/** The C stack of this build: it grows down from the end, and the heap begins there. */
export const STACK_START = 90_208;
export const STACK_END = 5_333_088;
/** In the part of the C stack that {@link STACK_LIMIT} leaves unused: one byte per block of 4 GiB. */
export const CARDS_AT = 1 << 20;
/**
 * How deep JavaScript may recurse, in bytes of C stack. QuickJS then throws its own error; V8's stack, 4 MiB in a
 * guest worker, is used about twice as fast and must not run out first.
 */
const STACK_LIMIT = 512 * 1024;
/** Before the guest is there: static data, the stack, and a little heap. */
export const FIRST_PAGES = 96;
/** Memory grows by at least this. */
const GROWTH_PAGES = 16;

/** QuickJS ready to be instantiated. Cloning it shares the code. */
export interface QuickjsCode {
  readonly module: WebAssembly.Module;
  /** The export that counts, in a metered build. */
  readonly fuel: string | null;
}

/** What the metered build exports its fuel as: it has no export of that name itself. */
const FUEL_EXPORT = 'millrace:fuel';
const shelf = poolShelf();
const codes = new Map<boolean, QuickjsCode>();

/**
 * QuickJS that marks what it writes, and counts fuel if it should. Instrumenting it takes a tenth of a second and more in a
 * thread that has just begun, so it is done by one thread for all of a pool.
 */
export function quickjsCode(metered: boolean): QuickjsCode {
  const known = codes.get(metered);
  if (known !== undefined) return known;
  const bytes = shelf.get(metered ? 1 : 0, () => instrumented(metered));
  // V8 does not compile from shared memory.
  const code: QuickjsCode = {
    module: new WebAssembly.Module(new Uint8Array(bytes)),
    fuel: metered ? FUEL_EXPORT : null,
  };
  codes.set(metered, code);
  return code;
}

function instrumented(metered: boolean): Uint8Array {
  const source = readModule(readWasm(), { maxFunctions: Infinity, maxImports: Infinity });
  return withSmallMemory(instrument(source, { fuel: metered, cards: CARDS_AT }).bytes);
}

function readWasm(): Uint8Array {
  // A dependency of quickjs-emscripten, found from there: it need not be visible from here.
  const { resolve } = createRequire(createRequire(import.meta.url).resolve('quickjs-emscripten'));
  const file = resolve('@jitl/quickjs-wasmfile-release-sync/wasm');
  const bytes = readFileSync(file);
  const digest = createHash('sha256').update(bytes).digest('hex');
  if (digest !== WASM_SHA256) {
    throw new Error(
      `${file} has the sha256 ${digest}, not ${WASM_SHA256}: install quickjs-emscripten 0.32.0, the version this package names`,
    );
  }
  return bytes;
}

/** The import section asks for 16 MiB to begin with, as two bytes of LEB128; a third of it is enough. */
function withSmallMemory(bytes: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> {
  const asked = [0x02, 0x01, 0x80, 0x02, 0x80, 0x80, 0x02];
  const at = Buffer.from(bytes.buffer).indexOf(Buffer.from(asked));
  if (at < 0) throw new Error('the QuickJS build does not import the memory it is known to import');
  bytes.set([FIRST_PAGES | 0x80, 0], at + 2);
  return bytes;
}

/** What the embedder of a {@link Vm} answers. */
export interface VmHost {
  /** A call of the function given to the prelude. Returns a value's pointer, or 0 for `undefined`. */
  call(operation: number, text: () => Uint8Array): number;
  /** True ends the program: asked every 10,000 turns of loops. */
  interrupt(): boolean;
  /** Milliseconds since 1970. */
  now(): number;
  /** Memory has grown, or was not allowed to. */
  grown(allowed: boolean): void;
}

/** One instance of QuickJS with memory of its own. Values are pointers; 0 is none. */
export class Vm {
  readonly memory: WebAssembly.Memory;
  readonly api: Exports;
  /** By the names they have in the build, for the fuel. */
  readonly exports: Readonly<Record<string, unknown>>;
  #bytes: Uint8Array;

  constructor(code: QuickjsCode, host: VmHost, pages: number, maxPages: number) {
    this.memory = new WebAssembly.Memory({ initial: pages, maximum: maxPages });
    this.#bytes = new Uint8Array(this.memory.buffer);
    const { exports } = new WebAssembly.Instance(code.module, { a: this.#imports(host, maxPages) });
    this.api = Object.fromEntries(
      Object.entries(EXPORTS).map(([name, short]) => [name, exports[short]]),
    ) as unknown as Exports;
    this.exports = exports;
  }

  /** The memory as it is now. */
  get bytes(): Uint8Array {
    if (this.#bytes.buffer !== this.memory.buffer) this.#bytes = new Uint8Array(this.memory.buffer);
    return this.#bytes;
  }

  /** Writes to the memory, and marks it as written. */
  write(pointer: number, bytes: Uint8Array): void {
    this.bytes.set(bytes, pointer);
    const last = (pointer + Math.max(1, bytes.length) - 1) >>> CARD_SHIFT;
    this.bytes.fill(1, CARDS_AT + (pointer >>> CARD_SHIFT), CARDS_AT + last + 1);
  }

  /** A C string with these bytes, for the caller to free. 0 when there is no memory for it. */
  text(bytes: Uint8Array): number {
    const pointer = this.api.malloc(bytes.length + 1) >>> 0;
    if (pointer === 0) return 0;
    this.write(pointer, bytes);
    this.write(pointer + bytes.length, new Uint8Array(1));
    return pointer;
  }

  /** The bytes of a C string, in the guest's memory. */
  textAt(pointer: number): Uint8Array {
    const start = pointer >>> 0;
    const { bytes } = this;
    const end = bytes.indexOf(0, start);
    return bytes.subarray(start, end < 0 ? bytes.length : end);
  }

  /** A runtime and a context, and in it the JavaScript engine's whole standard library. */
  start(): { readonly runtime: number; readonly context: number } {
    const { api } = this;
    api.constructors();
    const runtime = api.newRuntime();
    api.setMaxStackSize(runtime, STACK_LIMIT);
    api.enableInterrupts(runtime);
    return { runtime, context: api.newContext(runtime, 0) };
  }

  #imports(host: VmHost, maxPages: number): Record<string, unknown> {
    const SUCCESS = 0;
    const EBADF = 8;
    const words = (pointer: number, ...values: number[]): void => {
      this.write(pointer >>> 0, new Uint8Array(new Int32Array(values).buffer));
    };
    const refuse = (what: string) => (): never => {
      throw new WebAssembly.RuntimeError(what);
    };
    return {
      a: this.memory,
      // __assert_fail
      b: (condition: number) => refuse(`engine assertion failed: ${decode(this.textAt(condition))}`)(),
      // fd_write, fd_close, fd_seek: there are no files, and nothing prints.
      c: () => EBADF,
      d: () => EBADF,
      o: () => EBADF,
      // environ_get, environ_sizes_get
      e: () => SUCCESS,
      f: (count: number, size: number) => {
        words(count, 0);
        words(size, 0);
        return SUCCESS;
      },
      // Module loader: none was set.
      g: refuse('no module loader'),
      h: refuse('no module loader'),
      i: () => (host.interrupt() ? 1 : 0),
      // setitimer, emscripten_runtime_keepalive_clear
      j: () => SUCCESS,
      l: () => undefined,
      // emscripten_resize_heap
      k: (wanted: number) => {
        const have = this.memory.buffer.byteLength / PAGE_BYTES;
        const need = Math.ceil((wanted >>> 0) / PAGE_BYTES);
        const allowed =
          need <= maxPages && this.#grow(Math.min(Math.max(need, have + GROWTH_PAGES), maxPages) - have);
        host.grown(allowed);
        return allowed ? 1 : 0;
      },
      // localtime: UTC wherever the machine is; QuickJS looks at the offset alone.
      m: (_seconds: bigint, to: number) => words(to, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
      // tzset
      n: (offset: number, daylight: number, standardName: number, daylightName: number) => {
        for (const pointer of [offset, daylight, standardName, daylightName]) words(pointer, 0);
      },
      p: () => host.now(),
      q: refuse('the engine aborted'),
      r: refuse('the engine exited'),
      s: (context: number, _self: number, argc: number, argv: number) => {
        const operation = argc > 0 ? this.api.getFloat64(context, this.api.argument(argv, 0)) : -1;
        let held = 0;
        const text = (): Uint8Array => {
          held = argc > 1 ? this.api.getString(context, this.api.argument(argv, 1)) : 0;
          return held === 0 ? new Uint8Array(0) : this.textAt(held);
        };
        const result = host.call(operation, text);
        if (held !== 0) this.api.freeCString(context, held);
        return result;
      },
      // Host references are not used.
      t: () => undefined,
    };
  }

  #grow(pages: number): boolean {
    if (pages <= 0) return true;
    try {
      this.memory.grow(pages);
      return true;
    } catch {
      // The maximum, or the machine has no more: to the guest it is the same.
      return false;
    }
  }
}

export function decode(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('utf8');
}
