/**
 * Walks the instructions of a function body, just far enough to know that they all belong to WebAssembly core 2.0. What a
 * module may use must not depend on what the V8 of the day has switched on: Node 20 would also accept exceptions (with
 * which a guest can swallow its own exit), threads (`atomic.wait` parks the worker) and tail calls, later ones garbage
 * collection and 64-bit memory; the reference accepts none of them, and a digest has to mean the same everywhere.
 *
 * Types, indices and the nesting of operands are left to V8, which checks them when it compiles.
 */
import type { Cursor } from './binary.ts';
import { moduleError, moduleLimit } from './binary.ts';

/** Blocks inside one another. Compiled `switch` statements nest one per case; half a million cost V8 half a second. */
export const MAX_NESTING = 10_000;

const NONE = 0;
const INDEX = 1;
const TWO_INDICES = 2;
const I64 = 3;
const FOUR_BYTES = 4;
const EIGHT_BYTES = 5;
const BLOCK = 6;
const TABLE = 7;
const SELECT_TYPES = 8;
const REF_TYPE = 9;
const BULK = 10;
const SIMD = 11;
const END = 12;
const MEMORY_INDEX = 13;
const REFUSED = 14;

const MEMORY_GROW = 0x40;

/** What follows each opcode. */
const IMMEDIATES = new Uint8Array(256).fill(REFUSED);
const set = (from: number, to: number, kind: number): void => void IMMEDIATES.fill(kind, from, to + 1);
set(0x00, 0x01, NONE);
set(0x02, 0x04, BLOCK);
set(0x05, 0x05, NONE);
set(0x0b, 0x0b, END);
set(0x0c, 0x0d, INDEX);
set(0x0e, 0x0e, TABLE);
set(0x0f, 0x0f, NONE);
set(0x10, 0x10, INDEX);
set(0x11, 0x11, TWO_INDICES);
set(0x1a, 0x1b, NONE);
set(0x1c, 0x1c, SELECT_TYPES);
set(0x20, 0x26, INDEX);
set(0x28, 0x3e, TWO_INDICES);
set(0x3f, 0x40, MEMORY_INDEX);
set(0x41, 0x41, INDEX);
set(0x42, 0x42, I64);
set(0x43, 0x43, FOUR_BYTES);
set(0x44, 0x44, EIGHT_BYTES);
set(0x45, 0xc4, NONE);
set(0xd0, 0xd0, REF_TYPE);
set(0xd1, 0xd1, NONE);
set(0xd2, 0xd2, INDEX);
set(0xfc, 0xfc, BULK);
set(0xfd, 0xfd, SIMD);

/** Names for what is refused, so that an author knows which compiler switch to turn off. */
const REFUSALS: readonly (readonly [from: number, to: number, feature: string])[] = [
  [0x06, 0x0a, 'exception handling'],
  [0x12, 0x13, 'tail calls'],
  [0x14, 0x15, 'typed function references'],
  [0x18, 0x19, 'exception handling'],
  [0x1f, 0x1f, 'exception handling'],
  [0xd3, 0xd6, 'garbage collection'],
  [0xfb, 0xfb, 'garbage collection'],
  [0xfe, 0xfe, 'threads'],
];

/** The value types of core 2.0. */
export function isValueType(byte: number): boolean {
  return (byte >= 0x7b && byte <= 0x7f) || isRefType(byte);
}

export function isRefType(byte: number): boolean {
  return byte === 0x70 || byte === 0x6f;
}

/**
 * Checks one body, locals declared and instructions, to its last byte. Returns where instructions are that take longer the
 * more they are told to do: filling, copying and growing memories and tables.
 *
 * @throws MillraceError `invalid_argument` naming the feature or opcode, and the function by its index.
 */
export function checkBody(cursor: Cursor, functionIndex: number): number[] {
  const groups = cursor.u32();
  let locals = 0;
  for (let group = 0; group < groups; group += 1) {
    locals += cursor.u32();
    // V8's own bound; past it the count no longer matters, and the loop would.
    if (locals > 50_000)
      throw moduleLimit('50,000 locals', 50_000, `function ${functionIndex} has ${locals}`);
    const type = cursor.byte();
    if (!isValueType(type)) throw refusedType(type, `function ${functionIndex}`);
  }
  const long: number[] = [];
  let depth = 0;
  while (!cursor.done) {
    const at = cursor.at;
    const opcode = cursor.byte();
    switch (IMMEDIATES[opcode] as number) {
      case NONE:
        break;
      case INDEX:
        cursor.leb(5);
        break;
      case TWO_INDICES:
        cursor.leb(5);
        cursor.leb(5);
        break;
      case I64:
        cursor.leb(10);
        break;
      case FOUR_BYTES:
        cursor.skip(4);
        break;
      case EIGHT_BYTES:
        cursor.skip(8);
        break;
      case BLOCK: {
        depth += 1;
        if (depth > MAX_NESTING) {
          throw moduleLimit('nesting', MAX_NESTING, `function ${functionIndex} nests ${depth} blocks`);
        }
        const first = cursor.bytes[cursor.at];
        if (first === 0x40 || (first !== undefined && isValueType(first))) cursor.skip(1);
        // A type index is a non-negative signed number; any other negative one is a type of a later standard.
        else if (first !== undefined && first >= 0x40 && first < 0x80) {
          throw refusedType(first, `function ${functionIndex}`);
        } else cursor.leb(5);
        break;
      }
      case TABLE: {
        const labels = cursor.u32();
        for (let label = 0; label <= labels; label += 1) cursor.leb(5);
        break;
      }
      case SELECT_TYPES: {
        const count = cursor.u32();
        for (let index = 0; index < count; index += 1) {
          const type = cursor.byte();
          if (!isValueType(type)) throw refusedType(type, `function ${functionIndex}`);
        }
        break;
      }
      case REF_TYPE: {
        const type = cursor.byte();
        if (!isRefType(type)) throw refusedType(type, `function ${functionIndex}`);
        break;
      }
      case MEMORY_INDEX:
        if (cursor.byte() !== 0) throw refused('more than one memory', functionIndex);
        if (opcode === MEMORY_GROW) long.push(at);
        break;
      case BULK:
        if (bulk(cursor, functionIndex)) long.push(at);
        break;
      case SIMD:
        simd(cursor, functionIndex);
        break;
      case END:
        depth -= 1;
        if (depth < 0 && !cursor.done) {
          throw moduleError(`function ${functionIndex} goes on after its end`);
        }
        break;
      default: {
        const feature = REFUSALS.find(([from, to]) => opcode >= from && opcode <= to)?.[2];
        if (feature !== undefined) throw refused(feature, functionIndex);
        throw moduleError(`function ${functionIndex} has the unknown opcode 0x${opcode.toString(16)}`);
      }
    }
  }
  if (depth !== -1) throw moduleError(`function ${functionIndex} does not end`);
  return long;
}

/** Saturating conversions and bulk operations. True for one that can take long. */
function bulk(cursor: Cursor, functionIndex: number): boolean {
  const opcode = cursor.u32();
  if (opcode <= 7) return false;
  if (opcode > 17) throw moduleError(`function ${functionIndex} has the unknown opcode 0xfc ${opcode}`);
  // memory.init, memory.copy, table.init and table.copy name two things, the others one.
  const two = opcode === 8 || opcode === 10 || opcode === 12 || opcode === 14;
  cursor.leb(5);
  if (two) cursor.leb(5);
  // data.drop, elem.drop and table.size are done at once.
  return opcode !== 9 && opcode !== 13 && opcode !== 16;
}

function simd(cursor: Cursor, functionIndex: number): void {
  const opcode = cursor.u32();
  if (opcode > 0xff) throw refused('relaxed SIMD', functionIndex);
  if (opcode <= 11 || opcode === 92 || opcode === 93) {
    cursor.leb(5);
    cursor.leb(5);
  } else if (opcode === 12 || opcode === 13) cursor.skip(16);
  else if (opcode >= 21 && opcode <= 34) cursor.skip(1);
  else if (opcode >= 84 && opcode <= 91) {
    cursor.leb(5);
    cursor.leb(5);
    cursor.skip(1);
  }
}

/** A constant expression: one of core 2.0's, or anything else refused. Longer ones are a later standard's. */
export function checkConstant(cursor: Cursor, where: string): void {
  const opcode = cursor.byte();
  if (opcode === 0x41 || opcode === 0x23 || opcode === 0xd2) cursor.leb(5);
  else if (opcode === 0x42) cursor.leb(10);
  else if (opcode === 0x43) cursor.skip(4);
  else if (opcode === 0x44) cursor.skip(8);
  else if (opcode === 0xd0) {
    const type = cursor.byte();
    if (!isRefType(type)) throw refusedType(type, where);
  } else if (opcode === 0xfd) {
    if (cursor.u32() !== 12) throw moduleError(`${where} has a constant that is none`);
    cursor.skip(16);
  } else throw moduleError(`${where} has a constant that is none (opcode 0x${opcode.toString(16)})`);
  if (cursor.byte() !== 0x0b) {
    throw moduleError(`${where} uses extended constant expressions, which are not in WebAssembly core 2.0`);
  }
}

export function refusedType(type: number, where: string): Error {
  return moduleError(`${where} uses the type 0x${type.toString(16)}, which is not in WebAssembly core 2.0`);
}

function refused(feature: string, functionIndex: number): Error {
  return moduleError(
    `function ${functionIndex} uses ${feature}, which WebAssembly core 2.0 does not have; build it without`,
    { feature },
  );
}
