/** Bytes of code being written, in a buffer that grows. */
export class Writer {
  #bytes: Uint8Array;
  #length = 0;

  constructor(capacity: number) {
    this.#bytes = new Uint8Array(capacity);
  }

  /** The buffer; what was written is its first {@link length} bytes. */
  get bytes(): Uint8Array {
    return this.#bytes;
  }

  get length(): number {
    return this.#length;
  }

  clear(): void {
    this.#length = 0;
  }

  byte(value: number): void {
    this.#room(1);
    this.#bytes[this.#length++] = value;
  }

  range(source: Uint8Array, start: number, end: number): void {
    this.#room(end - start);
    // Most pieces are a few bytes, for which making a view would take longer than copying.
    if (end - start > 64) {
      this.#bytes.set(source.subarray(start, end), this.#length);
      this.#length += end - start;
      return;
    }
    for (let at = start; at < end; at += 1) this.#bytes[this.#length++] = source[at] as number;
  }

  /** An unsigned LEB128 number below 2^32. */
  u32(value: number): void {
    this.#room(5);
    let rest = value;
    while (rest >= 0x80) {
      this.#bytes[this.#length++] = (rest & 0x7f) | 0x80;
      rest = Math.floor(rest / 128);
    }
    this.#bytes[this.#length++] = rest;
  }

  /** An opcode and its index. */
  op(opcode: number, index: number): void {
    this.byte(opcode);
    this.u32(index);
  }

  /** A constant instruction, for a number of 32 bits with its sign. */
  constant(opcode: number, value: number): void {
    this.byte(opcode);
    this.#room(5);
    let rest = value;
    for (;;) {
      const low = rest & 0x7f;
      rest >>= 7;
      if ((rest === 0 && (low & 0x40) === 0) || (rest === -1 && (low & 0x40) !== 0)) {
        this.#bytes[this.#length++] = low;
        return;
      }
      this.#bytes[this.#length++] = low | 0x80;
    }
  }

  #room(more: number): void {
    if (this.#length + more <= this.#bytes.length) return;
    const larger = new Uint8Array(Math.max(this.#bytes.length * 2, this.#length + more));
    larger.set(this.#bytes.subarray(0, this.#length));
    this.#bytes = larger;
  }
}
