/**
 * The memory of a compute that has started up, and how to get back to it. Every invocation begins from a bit-exact copy,
 * so nothing passes from one to another.
 *
 * Measured, median ms for a small bundle and for one of 1 MB, whose functions are 12 MB of memory:
 *
 * | way to a fresh runtime | small | 1 MB |
 * | --- | --- | --- |
 * | new runtime, evaluate the bundle | 6 | 420 |
 * | new instance, copy the memory | 0.7 | 9 |
 * | same instance, copy the memory | 0.03 | 2.5 |
 * | same instance, copy the blocks that were written: the whole call, JSON in and out | 0.08 | 0.09 |
 *
 * QuickJS could write its bytecode, but this build exports only its data serializer, and reading bytecode back takes time by
 * the size of the bundle, too. What was written is known because the build is instrumented to mark it (see
 * `fuel/instrument.ts`), which costs 4 to 6 % of the speed of JavaScript.
 */
import { BLOCK_BYTES, CARDS_AT, PAGE_BYTES, STACK_END, STACK_START } from './vm.ts';
import type { Vm } from './vm.ts';

export interface Image {
  /** Of the whole memory, in pages of 64 KiB. */
  readonly pages: number;
  /** Where the copy of each block is, in blocks; -1 for one that is all zeros. */
  readonly index: Int32Array;
  /** The blocks, in memory all threads share. */
  readonly blocks: Uint8Array;
}

const ZEROS = new Uint8Array(BLOCK_BYTES);

/** Takes the picture. Between calls: what is on the C stack is not part of it. */
export function takeImage(vm: Vm): Image {
  const { bytes } = vm;
  const index = new Int32Array(bytes.length / BLOCK_BYTES).fill(-1);
  // The heap begins in the middle of a block.
  const heap = STACK_END - (STACK_END % BLOCK_BYTES);
  bytes.fill(0, heap, STACK_END);
  let count = 0;
  for (let block = 0; block < index.length; block += 1) {
    const at = block * BLOCK_BYTES;
    if (at >= STACK_START && at < heap) continue;
    if (Buffer.compare(bytes.subarray(at, at + BLOCK_BYTES), ZEROS) === 0) continue;
    index[block] = count;
    count += 1;
  }
  const blocks = new Uint8Array(new SharedArrayBuffer(count * BLOCK_BYTES));
  for (let block = 0; block < index.length; block += 1) {
    const at = index[block] as number;
    if (at >= 0) blocks.set(bytes.subarray(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES), at * BLOCK_BYTES);
  }
  return { pages: bytes.length / PAGE_BYTES, index, blocks };
}

/** Fills the memory of a new instance, which has written nothing but its static data. */
export function loadImage(vm: Vm, image: Image): void {
  const { bytes } = vm;
  for (let block = 0; block < image.index.length; block += 1) {
    const untouched = image.index[block] === -1 && block * BLOCK_BYTES >= STACK_START;
    if (!untouched) restoreBlock(bytes, image, block);
  }
  bytes.fill(0, CARDS_AT, CARDS_AT + bytes.length / BLOCK_BYTES);
}

/** Puts back what was written since; false when that is not possible, because the memory is larger now. */
export function restoreImage(vm: Vm, image: Image): boolean {
  if (vm.memory.buffer.byteLength !== image.pages * PAGE_BYTES) return false;
  const { bytes } = vm;
  const cards = bytes.subarray(CARDS_AT, CARDS_AT + image.index.length);
  for (let block = cards.indexOf(1); block >= 0; block = cards.indexOf(1, block + 1)) {
    restoreBlock(bytes, image, block);
  }
  cards.fill(0);
  return true;
}

function restoreBlock(bytes: Uint8Array, { index, blocks }: Image, block: number): void {
  const at = index[block] as number;
  const to = block * BLOCK_BYTES;
  if (at < 0) bytes.fill(0, to, to + BLOCK_BYTES);
  else bytes.set(blocks.subarray(at * BLOCK_BYTES, (at + 1) * BLOCK_BYTES), to);
}
