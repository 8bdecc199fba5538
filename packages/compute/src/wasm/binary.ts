/** Reading and writing the WebAssembly binary format: LEB128 numbers, names, sections. */
import { computeError } from '../errors.ts';

/** The bytes are not a module this engine accepts. */
export function moduleError(rule: string, details?: Readonly<Record<string, unknown>>): Error {
  return computeError('invalid_argument', 'module', `module refused: ${rule}`, { details: details ?? {} });
}

/** A module is over one of the limits set for it. */
export function moduleLimit(limit: string, value: number, text: string): Error {
  return computeError('resource_exhausted', 'module', `module refused: ${text}, over ${limit} ${value}`, {
    details: { limit, value },
  });
}

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/** A position in a module. Reading past the end is a refusal of the module, never an undefined value. */
export class Cursor {
  readonly bytes: Uint8Array;
  readonly end: number;
  at: number;

  constructor(bytes: Uint8Array, at = 0, end = bytes.length) {
    this.bytes = bytes;
    this.at = at;
    this.end = end;
  }

  get done(): boolean {
    return this.at >= this.end;
  }

  byte(): number {
    if (this.at >= this.end) throw this.cut();
    return this.bytes[this.at++] as number;
  }

  /** Steps over `count` bytes. */
  skip(count: number): void {
    if (count > this.end - this.at) throw this.cut();
    this.at += count;
  }

  u32(): number {
    let result = 0;
    for (let shift = 0; shift < 35; shift += 7) {
      const byte = this.byte();
      if (shift === 28 && byte > 0x0f) break;
      // Not `<<`: the fifth group reaches the sign bit.
      result += (byte & 0x7f) * 2 ** shift;
      if (byte < 0x80) return result;
    }
    throw moduleError(`a number at byte ${this.at} does not fit 32 bits`);
  }

  /** Steps over a LEB128 number of at most `most` bytes. */
  leb(most: number): void {
    for (let count = 0; count < most; count += 1) if (this.byte() < 0x80) return;
    throw moduleError(`a number at byte ${this.at} is longer than ${most} bytes`);
  }

  name(): string {
    const length = this.u32();
    const start = this.at;
    this.skip(length);
    try {
      return utf8.decode(this.bytes.subarray(start, this.at));
    } catch {
      throw moduleError(`a name at byte ${start} is not UTF-8`);
    }
  }

  /** A cursor over the next `length` bytes, which this one steps over. */
  slice(length: number): Cursor {
    const start = this.at;
    this.skip(length);
    return new Cursor(this.bytes, start, this.at);
  }

  cut(): Error {
    return moduleError(`cut short: it ends inside of what starts before byte ${this.end}`);
  }
}

/** The LEB128 bytes of an unsigned number below 2^32. */
export function u32Bytes(value: number): number[] {
  const bytes: number[] = [];
  for (let rest = value; ; rest = Math.floor(rest / 128)) {
    if (rest < 128) {
      bytes.push(rest);
      return bytes;
    }
    bytes.push((rest % 128) | 0x80);
  }
}

/** A length-prefixed UTF-8 name. */
export function nameBytes(name: string): number[] {
  const bytes = new TextEncoder().encode(name);
  return [...u32Bytes(bytes.length), ...bytes];
}

/** Joins pieces into one module; plain numbers are bytes. */
export function concatBytes(pieces: readonly (Uint8Array | readonly number[])[]): Uint8Array<ArrayBuffer> {
  let length = 0;
  for (const piece of pieces) length += piece.length;
  const result = new Uint8Array(length);
  let at = 0;
  for (const piece of pieces) {
    result.set(piece, at);
    at += piece.length;
  }
  return result;
}

/** A section as it stands in a module: its id, the length of its payload, the payload. */
export function sectionBytes(
  id: number,
  payload: readonly (Uint8Array | readonly number[])[],
): (Uint8Array | readonly number[])[] {
  let length = 0;
  for (const piece of payload) length += piece.length;
  return [[id], u32Bytes(length), ...payload];
}
