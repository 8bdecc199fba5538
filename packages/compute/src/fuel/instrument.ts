/**
 * Adds code to a module that counts what it does. Everything else of the module stays as it is: no index shifts, since what
 * is added (one global, locals) comes last.
 *
 * Fuel. A global holds what is left; code that runs takes its price off. Prices depend on the bytes of the module
 * alone, so the same module with the same input uses the same fuel on every machine. Where the global falls below 0 at a
 * function's entry or a loop's head the guest traps, which it cannot catch; between two such places there is only
 * straight-line code. The host reads the global afterwards: below 0 means the fuel ran out, whatever ended the guest.
 *
 * What is charged, in units of about one simple instruction:
 * - on entering a function all of its instructions that are in no loop, on each turn of a loop all that are in it and in no
 *   loop within it, whichever way the code then goes. Charging each basic block would be exact, and was measured to make QuickJS
 *   1.3 to 1.7 times slower instead of 1.0 to 1.1
 * - functions without loops and calls, if they are small, are paid for by who calls them
 * - in functions over {@link LARGE_BODY} bytes, which are interpreters for the most part and never run all of a turn,
 *   {@link FLAT_PRICE} for each call and each turn
 * - a call through a table: {@link FLAT_PRICE}
 * - filling, copying and growing memory or tables: by length
 * - a call of the host: {@link HOST_CALL_PRICE}; random bytes by length
 *
 * Cards. One byte per 4 KiB of memory in a table the host chose a place for, set to 1 where the module writes: what
 * has to be put back to have the memory as it was. Only for modules that are trusted to leave the table alone.
 */
import { Writer } from './writer.ts';
import { Cursor, concatBytes, nameBytes, sectionBytes, u32Bytes } from '../wasm/binary.ts';
import { SECTION } from '../wasm/module.ts';
import type { WasmModule } from '../wasm/module.ts';
import { BULK, OP, skipInstruction, skipLocals } from './walk.ts';

export const LARGE_BODY = 16 * 1024;
export const FLAT_PRICE = 16;
export const HOST_CALL_PRICE = 64;
/** Bounds of functions their callers pay for. */
const FREE_PRICE = 64;
const FREE_BYTES = 512;
/** `memory.grow` has to be paid like writing to the page would be, 8 bytes for one unit. */
const PAGE_PRICE_SHIFT = 13;
const BYTE_PRICE_SHIFT = 3;
export const CARD_SHIFT = 12;
/** `i64.const 2^63 - 1`. */
const LARGEST_I64 = [OP.i64Const, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00];

export interface Instrumentation {
  readonly fuel: boolean;
  /** Where in the module's memory its card table is. */
  readonly cards?: number;
}

export interface InstrumentedModule {
  readonly bytes: Uint8Array<ArrayBuffer>;
  /** The export that holds the fuel, a mutable i64; `null` when it is not counted. */
  readonly fuel: string | null;
}

/** The module with counters. It must be valid, or else what it refers to and does not have might be what is added. */
export function instrument(module: WasmModule, what: Instrumentation): InstrumentedModule {
  const globals = countGlobals(module);
  const taken = new Set(module.exports.map((one) => one.name));
  let fuel: string | null = null;
  if (what.fuel) {
    fuel = 'millrace:fuel';
    while (taken.has(fuel)) fuel += "'";
  }
  const pricing = new Pricing(module);
  const code = new Writer(module.bytes.length * 2);
  const body = new Writer(LARGE_BODY);
  code.u32(module.bodies.length);
  for (let index = 0; index < module.bodies.length; index += 1) {
    body.clear();
    new Body(module, index, globals, what, pricing, body).write();
    code.u32(body.length);
    code.range(body.bytes, 0, body.length);
  }

  const pieces: (Uint8Array | readonly number[])[] = [module.bytes.subarray(0, 8)];
  const whole = new Map(module.sections.map((section) => [section.id, section]));
  for (const id of [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 10, 11]) {
    const section = whole.get(id);
    const payload = section === undefined ? new Uint8Array([0]) : module.bytes.subarray(...section.payload);
    if (id === SECTION.global && fuel !== null) {
      // i64, mutable, the largest there is: a start section runs before the host has set it.
      pieces.push(...sectionBytes(id, appended(payload, [0x7e, 1, ...LARGEST_I64, OP.end])));
    } else if (id === SECTION.export && fuel !== null) {
      pieces.push(...sectionBytes(id, appended(payload, [...nameBytes(fuel), 3, ...u32Bytes(globals)])));
    } else if (id === SECTION.code) {
      if (section !== undefined) pieces.push(...sectionBytes(id, [code.bytes.subarray(0, code.length)]));
    } else if (section !== undefined) pieces.push(module.bytes.subarray(...section.whole));
  }
  for (const section of module.sections) {
    if (section.id === SECTION.custom) pieces.push(module.bytes.subarray(...section.whole));
  }
  return { bytes: concatBytes(pieces), fuel };
}

/** A vector with one more entry. */
function appended(payload: Uint8Array, entry: readonly number[]): (Uint8Array | readonly number[])[] {
  const cursor = new Cursor(payload);
  const count = cursor.u32();
  return [u32Bytes(count + 1), payload.subarray(cursor.at), entry];
}

function countGlobals(module: WasmModule): number {
  const imported = module.imports.filter((one) => one.kind === 'global').length;
  const section = module.sections.find((one) => one.id === SECTION.global);
  return imported + (section === undefined ? 0 : new Cursor(module.bytes, ...section.payload).u32());
}

const BY_ENTRY = new Set<number>([BULK.tableInit, BULK.tableCopy, BULK.tableGrow, BULK.tableFill]);

/** What instructions cost. */
class Pricing {
  readonly #module: WasmModule;
  readonly #hostNames: readonly string[];
  /** `undefined`: not looked at; `null`: counts by itself. */
  readonly #free: (number | null | undefined)[] = [];
  #depth = 0;

  constructor(module: WasmModule) {
    this.#module = module;
    this.#hostNames = module.imports.filter((one) => one.kind === 'function').map((one) => one.name);
    // The host does not pay.
    for (const one of module.exports) if (one.kind === 'function') this.#free[one.index] = null;
  }

  /** Whether it calls the host for random bytes, with their number on top of the stack. */
  isRandom(opcode: number, bytes: Uint8Array, at: number): boolean {
    return opcode === OP.call && this.#hostNames[indexAt(bytes, at)] === 'random_get';
  }

  /** Whether calling it leaves the count alone. */
  isFree(index: number): boolean {
    return index >= this.#hostNames.length && this.free(index) !== null;
  }

  ofCall(opcode: number, bytes: Uint8Array, at: number): number {
    if (opcode === OP.callIndirect) return FLAT_PRICE;
    const callee = indexAt(bytes, at);
    return callee < this.#hostNames.length ? HOST_CALL_PRICE : 1 + (this.free(callee) ?? 0);
  }

  /**
   * What a function costs whose callers pay for it: without loops, small, and calling nothing but its like. `null`: it
   * counts by itself.
   */
  free(index: number): number | null {
    const known = this.#free[index];
    if (known !== undefined) return known;
    // While it is looked at, a call to it is recursion. A chain of calls longer than the price allows would not be free.
    this.#free[index] = null;
    if (this.#depth > FREE_PRICE) return null;
    this.#depth += 1;
    const found = this.#measure(index);
    this.#depth -= 1;
    this.#free[index] = found;
    return found;
  }

  #measure(index: number): number | null {
    const body = this.#module.bodies[index - this.#hostNames.length];
    if (body === undefined || body[1] - body[0] > FREE_BYTES) return null;
    const cursor = new Cursor(this.#module.bytes, ...body);
    skipLocals(cursor);
    let total = 0;
    while (!cursor.done) {
      const at = cursor.at;
      const opcode = skipInstruction(cursor);
      if (opcode === OP.loop || opcode === OP.callIndirect || opcode === OP.memoryGrow) return null;
      if ((opcode & 0xff) === OP.bulk && opcode >> 8 >= BULK.memoryInit) return null;
      if (opcode === OP.call) {
        const callee = indexAt(this.#module.bytes, at);
        if (callee < this.#hostNames.length || this.free(callee) === null) return null;
      }
      if (opcode === OP.call) total += this.ofCall(opcode, this.#module.bytes, at);
      else if (opcode !== OP.block && opcode !== OP.else && opcode !== OP.end) total += 1;
      if (total > FREE_PRICE) return null;
    }
    return total;
  }
}

function indexAt(bytes: Uint8Array, at: number): number {
  return new Cursor(bytes, at + 1).u32();
}

/** Locals that may be added to a function, by the bit that says so; their types. */
const T = 0;
const N = 1;
const P = 2;
const A = 3;
/** Those for a value being stored come by its type: {@link storedSlot}. */
const VALUE_I32 = 4;
const SLOT_TYPES = [0x7e, 0x7f, 0x7f, 0x7f, 0x7f, 0x7e, 0x7d, 0x7c, 0x7b];

/** What the first walk over a body finds out. */
interface Survey {
  /** A bit for each local that has to be added. */
  readonly slots: number;
  readonly loops: number;
  /** Of the function's own straight-line code, then of one turn of each loop, in the order in which they begin. */
  readonly prices: readonly number[];
  /** Whether it counts at all: else its callers pay. */
  readonly counts: boolean;
}

/** One function: walked once to find out what everything costs, and once more to write it. */
class Body {
  readonly #bytes: Uint8Array;
  readonly #start: number;
  readonly #end: number;
  readonly #globals: number;
  readonly #what: Instrumentation;
  readonly #pricing: Pricing;
  readonly #out: Writer;
  readonly #code: number;
  readonly #survey: Survey;
  readonly #local: number[] = [];
  /** How far the original has been copied. */
  #copied: number;
  /**
   * Whether the count is kept in a local while this function runs, so that a loop does not go to memory for each turn: in
   * one of four instructions that made it 3.5 times slower.
   */
  readonly #inLocal: boolean;

  constructor(
    module: WasmModule,
    index: number,
    globals: number,
    what: Instrumentation,
    pricing: Pricing,
    out: Writer,
  ) {
    const imported = module.functions.length - module.bodies.length;
    const [start, end] = module.bodies[index] as readonly [number, number];
    this.#bytes = module.bytes;
    this.#start = start;
    this.#end = end;
    this.#globals = globals;
    this.#what = what;
    this.#pricing = pricing;
    this.#out = out;
    const cursor = new Cursor(module.bytes, start, end);
    let local = (module.functions[imported + index]?.params.length ?? 0) + skipLocals(cursor);
    this.#code = cursor.at;
    this.#copied = cursor.at;
    this.#survey = this.#surveyed(cursor, what.fuel && pricing.free(imported + index) === null);
    this.#inLocal = this.#survey.counts && this.#survey.loops > 0 && end - start <= LARGE_BODY;
    for (let slot = 0; slot < SLOT_TYPES.length; slot += 1) {
      if ((this.#survey.slots & (1 << slot)) === 0) continue;
      this.#local[slot] = local;
      local += 1;
    }
  }

  #surveyed(cursor: Cursor, counts: boolean): Survey {
    const { fuel, cards } = this.#what;
    const prices = [0];
    // Numbers of the stretches the instruction is in, and whether each block around it is a loop.
    const open = [0];
    const blocks: boolean[] = [];
    let innermost = 0;
    let slots = counts ? 1 << T : 0;
    while (!cursor.done) {
      const at = cursor.at;
      const opcode = skipInstruction(cursor);
      let price = 1;
      switch (opcode) {
        case OP.block:
        case OP.if:
          blocks.push(false);
          break;
        case OP.loop:
          blocks.push(true);
          innermost = prices.length;
          open.push(innermost);
          prices.push(0);
          continue;
        case OP.end:
          if (blocks.pop() === true) {
            open.pop();
            innermost = open[open.length - 1] as number;
          }
          continue;
        case OP.else:
          continue;
        case OP.call:
        case OP.callIndirect:
          price = this.#pricing.ofCall(opcode, this.#bytes, at);
          if (fuel && this.#pricing.isRandom(opcode, this.#bytes, at)) slots |= BIT_PRICE;
          break;
        case OP.memoryGrow:
          if (fuel) slots |= BIT_PRICE;
          break;
        default:
          if ((opcode & 0xff) === OP.bulk) {
            if (fuel && opcode >> 8 >= BULK.memoryInit) slots |= BIT_PRICE;
            if (cards !== undefined && writesMemory(opcode >> 8)) slots |= BIT_RANGE;
          } else if (cards !== undefined) {
            const slot = storedSlot(opcode);
            if (slot !== null) slots |= (1 << A) | (1 << slot);
          }
      }
      prices[innermost] = (prices[innermost] as number) + price;
    }
    return { slots, loops: prices.length - 1, prices, counts };
  }

  /** Writes the body, its length not in front. */
  write(): void {
    const out = this.#out;
    const { fuel, cards } = this.#what;
    const { slots, prices, counts } = this.#survey;
    const declared = new Cursor(this.#bytes, this.#start, this.#code);
    out.u32(declared.u32() + this.#local.filter((index) => index !== undefined).length);
    out.range(this.#bytes, declared.at, this.#code);
    for (const [slot, type] of SLOT_TYPES.entries()) if ((slots & (1 << slot)) !== 0) out.op(1, type);
    if (counts) this.#charge(prices[0] as number, true);

    const cursor = new Cursor(this.#bytes, this.#code, this.#end);
    let depth = 0;
    let loop = 0;
    while (!cursor.done) {
      const at = cursor.at;
      const opcode = skipInstruction(cursor);
      switch (opcode) {
        case OP.block:
        case OP.if:
          depth += 1;
          break;
        case OP.loop:
          depth += 1;
          loop += 1;
          this.#copyTo(cursor.at);
          if (counts) this.#charge(prices[loop] as number, false);
          break;
        case OP.end:
          if (depth === 0) this.#saveBefore(at);
          depth -= 1;
          break;
        case OP.return:
          this.#saveBefore(at);
          break;
        case OP.br:
        case OP.brIf:
        case OP.brTable:
          if (this.#inLocal && leaves(this.#bytes, at, opcode, depth)) this.#saveBefore(at);
          break;
        case OP.call:
        case OP.callIndirect:
          if (fuel && this.#pricing.isRandom(opcode, this.#bytes, at)) this.#price(at, BYTE_PRICE_SHIFT);
          if (opcode === OP.callIndirect || !this.#pricing.isFree(indexAt(this.#bytes, at))) {
            this.#saveBefore(at);
            this.#loadAfter(cursor.at);
          }
          break;
        case OP.memoryGrow:
          if (fuel) this.#price(at, -PAGE_PRICE_SHIFT);
          break;
        default:
          if ((opcode & 0xff) === OP.bulk) this.#bulk(opcode >> 8, at);
          else if (cards !== undefined) this.#store(opcode, at);
      }
    }
    this.#copyTo(this.#end);
  }

  #copyTo(at: number): void {
    this.#out.range(this.#bytes, this.#copied, at);
    this.#copied = at;
  }

  #bulk(second: number, at: number): void {
    if (second < BULK.memoryInit) return;
    if (this.#what.cards !== undefined && writesMemory(second)) this.#markRange(at);
    if (!this.#what.fuel) return;
    if (writesMemory(second)) this.#price(at, BYTE_PRICE_SHIFT);
    else if (BY_ENTRY.has(second)) this.#price(at, 0);
  }

  /** Takes the price of straight-line code off. At the function's beginning that is where the local gets its value. */
  #charge(price: number, first: boolean): void {
    const out = this.#out;
    const large = this.#end - this.#start > LARGE_BODY;
    this.#fuel(first);
    out.constant(OP.i64Const, large ? FLAT_PRICE : Math.max(1, price));
    out.byte(OP.i64Sub);
    this.#takeAndCheck();
  }

  /** Takes a price off by the length on top of the stack. */
  #price(at: number, shift: number): void {
    const out = this.#out;
    this.#copyTo(at);
    this.#set(N);
    this.#fuel(false);
    this.#get(N);
    out.byte(OP.i64ExtendI32U);
    out.constant(OP.i64Const, Math.abs(shift));
    out.byte(shift < 0 ? OP.i64Shl : OP.i64ShrU);
    out.byte(OP.i64Sub);
    this.#takeAndCheck();
    this.#get(N);
  }

  #store(opcode: number, at: number): void {
    const slot = storedSlot(opcode);
    if (slot === null) return;
    const out = this.#out;
    const cursor = new Cursor(this.#bytes, at + 1);
    if ((opcode & 0xff) === OP.simd) cursor.u32();
    cursor.u32();
    const offset = cursor.u32();
    this.#copyTo(at);
    this.#set(slot);
    this.#tee(A);
    this.#get(A);
    if (offset > 0) {
      out.constant(OP.i32Const, offset | 0);
      out.byte(OP.i32Add);
    }
    this.#toCard();
    this.#mark();
    this.#get(slot);
  }

  #markRange(at: number): void {
    const out = this.#out;
    this.#copyTo(at);
    this.#set(N);
    this.#set(VALUE_I32);
    this.#tee(A);
    this.#get(A);
    this.#toCard();
    this.#set(P);
    out.op(OP.loop, 0x40);
    this.#get(P);
    this.#mark();
    this.#get(P);
    out.constant(OP.i32Const, 1);
    out.byte(OP.i32Add);
    this.#tee(P);
    // The card of the last byte: (a + n - 1) >>> 12.
    this.#get(A);
    this.#get(N);
    out.byte(OP.i32Add);
    out.constant(OP.i32Const, -1);
    out.byte(OP.i32Add);
    this.#toCard();
    out.byte(OP.i32LeU);
    out.op(OP.brIf, 0);
    out.byte(OP.end);
    this.#get(VALUE_I32);
    this.#get(N);
  }

  #fuel(first: boolean): void {
    if (this.#inLocal && !first) this.#get(T);
    else this.#out.op(OP.globalGet, this.#globals);
  }

  /** Keeps what is left, which is on the stack, and ends the guest when it is below 0. */
  #takeAndCheck(): void {
    const out = this.#out;
    this.#tee(T);
    if (!this.#inLocal) {
      out.op(OP.globalSet, this.#globals);
      this.#get(T);
    }
    out.constant(OP.i64Const, 0);
    out.byte(OP.i64LtS);
    out.op(OP.if, 0x40);
    if (this.#inLocal) this.#save();
    out.byte(OP.unreachable);
    out.byte(OP.end);
  }

  /** The local count into the global, for whoever runs next. */
  #saveBefore(at: number): void {
    if (!this.#inLocal) return;
    this.#copyTo(at);
    this.#save();
  }

  #loadAfter(at: number): void {
    if (!this.#inLocal) return;
    this.#copyTo(at);
    this.#out.op(OP.globalGet, this.#globals);
    this.#set(T);
  }

  #save(): void {
    this.#get(T);
    this.#out.op(OP.globalSet, this.#globals);
  }

  /** An address on the stack becomes the number of its card. */
  #toCard(): void {
    this.#out.constant(OP.i32Const, CARD_SHIFT);
    this.#out.byte(OP.i32ShrU);
  }

  /** Sets the card whose number is on the stack. */
  #mark(): void {
    this.#out.constant(OP.i32Const, 1);
    this.#out.op(OP.i32Store8, 0);
    this.#out.u32(this.#what.cards ?? 0);
  }

  #get(slot: number): void {
    this.#out.op(OP.localGet, this.#local[slot] as number);
  }

  #set(slot: number): void {
    this.#out.op(OP.localSet, this.#local[slot] as number);
  }

  #tee(slot: number): void {
    this.#out.op(OP.localTee, this.#local[slot] as number);
  }
}

const BIT_PRICE = (1 << T) | (1 << N);
const BIT_RANGE = (1 << N) | (1 << P) | (1 << A) | (1 << VALUE_I32);

function writesMemory(second: number): boolean {
  return second === BULK.memoryInit || second === BULK.memoryCopy || second === BULK.memoryFill;
}

/** Whether a branch may go to the label of the function itself, which is to return. */
function leaves(bytes: Uint8Array, at: number, opcode: number, depth: number): boolean {
  const cursor = new Cursor(bytes, at + 1);
  const count = opcode === OP.brTable ? cursor.u32() : 0;
  for (let label = 0; label <= count; label += 1) if (cursor.u32() === depth) return true;
  return false;
}

/** The local for a value this instruction stores to memory, or `null` when it stores nothing. */
function storedSlot(opcode: number): number | null {
  if (opcode >= 0x36 && opcode <= 0x3e) {
    if (opcode === 0x36 || opcode === 0x3a || opcode === 0x3b) return VALUE_I32;
    if (opcode === 0x38) return VALUE_I32 + 2;
    return opcode === 0x39 ? VALUE_I32 + 3 : VALUE_I32 + 1;
  }
  const second = opcode >> 8;
  const vector = (opcode & 0xff) === OP.simd && (second === 11 || (second >= 88 && second <= 91));
  return vector ? VALUE_I32 + 4 : null;
}
