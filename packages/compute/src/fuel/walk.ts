/**
 * The instructions of a function body one after the other. For modules that `readModule` has accepted: what may stand in a
 * body was decided there, here it is only told where each instruction ends.
 */
import type { Cursor } from '../wasm/binary.ts';

/** Opcodes that are looked at by name. */
export const OP = {
  unreachable: 0x00,
  block: 0x02,
  loop: 0x03,
  if: 0x04,
  else: 0x05,
  end: 0x0b,
  br: 0x0c,
  brIf: 0x0d,
  brTable: 0x0e,
  return: 0x0f,
  call: 0x10,
  callIndirect: 0x11,
  localGet: 0x20,
  localSet: 0x21,
  localTee: 0x22,
  globalGet: 0x23,
  globalSet: 0x24,
  memoryGrow: 0x40,
  i32Const: 0x41,
  i64Const: 0x42,
  i32LeU: 0x4d,
  i64LtS: 0x53,
  i32Add: 0x6a,
  i32ShrU: 0x76,
  i64Sub: 0x7d,
  i64Shl: 0x86,
  i64ShrU: 0x88,
  i64ExtendI32U: 0xad,
  i32Store8: 0x3a,
  bulk: 0xfc,
  simd: 0xfd,
} as const;

/** `memory.init`, `.copy`, `.fill`, `table.init`, `.copy`, `.grow`, `.fill`, behind {@link OP.bulk}. */
export const BULK = {
  memoryInit: 8,
  memoryCopy: 10,
  memoryFill: 11,
  tableInit: 12,
  tableCopy: 14,
  tableGrow: 15,
  tableFill: 17,
} as const;

/** Steps over the locals a body declares; returns how many they are. */
export function skipLocals(cursor: Cursor): number {
  const groups = cursor.u32();
  let locals = 0;
  for (let group = 0; group < groups; group += 1) {
    locals += cursor.u32();
    cursor.skip(1);
  }
  return locals;
}

/** Steps over one instruction; returns its opcode, and for {@link OP.bulk} and {@link OP.simd} the second one in the upper bits. */
export function skipInstruction(cursor: Cursor): number {
  const opcode = cursor.byte();
  if (opcode >= 0x45 && opcode <= 0xc4) return opcode;
  if (opcode >= 0x28 && opcode <= 0x3e) {
    cursor.leb(5);
    cursor.leb(5);
    return opcode;
  }
  switch (opcode) {
    case OP.block:
    case OP.loop:
    case OP.if:
      // A block type: one byte, or the index of a type.
      cursor.leb(5);
      return opcode;
    case OP.brTable: {
      const labels = cursor.u32();
      for (let label = 0; label <= labels; label += 1) cursor.leb(5);
      return opcode;
    }
    case OP.callIndirect:
      cursor.leb(5);
      cursor.leb(5);
      return opcode;
    case 0x1c:
      cursor.skip(cursor.u32());
      return opcode;
    case 0x42:
      cursor.leb(10);
      return opcode;
    case 0x43:
      cursor.skip(4);
      return opcode;
    case 0x44:
      cursor.skip(8);
      return opcode;
    case OP.bulk: {
      const second = cursor.u32();
      if (second > 7) cursor.leb(5);
      if (
        second === BULK.memoryInit ||
        second === BULK.memoryCopy ||
        second === BULK.tableInit ||
        second === BULK.tableCopy
      ) {
        cursor.leb(5);
      }
      return opcode | (second << 8);
    }
    case OP.simd: {
      const second = cursor.u32();
      const memory = second <= 11 || (second >= 84 && second <= 93);
      if (memory) {
        cursor.leb(5);
        cursor.leb(5);
      }
      if (second === 12 || second === 13) cursor.skip(16);
      else if ((second >= 21 && second <= 34) || (second >= 84 && second <= 91)) cursor.skip(1);
      return opcode | (second << 8);
    }
    default:
      if (takesIndex(opcode)) cursor.leb(5);
      return opcode;
  }
}

/** Branches, calls, variables, `memory.size` and `.grow`, `i32.const`, `ref.null`, `ref.func`. */
function takesIndex(opcode: number): boolean {
  return (
    opcode === OP.br ||
    opcode === OP.brIf ||
    opcode === OP.call ||
    (opcode >= 0x20 && opcode <= 0x26) ||
    (opcode >= 0x3f && opcode <= 0x41) ||
    opcode === 0xd0 ||
    opcode === 0xd2
  );
}
