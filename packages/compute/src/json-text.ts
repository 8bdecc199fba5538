/**
 * Whether bytes are one JSON document, told without building it: a guest can write four megabytes of `[` that would cost
 * hundreds as objects. RFC 8259, UTF-8 checked, no byte order mark.
 */
import { isUtf8 } from 'node:buffer';

/** Arrays and objects inside one another, at most. */
export const MAX_JSON_DEPTH = 1_000;

/** What is wrong with the bytes as a JSON document, or `null`. */
export function jsonProblem(bytes: Uint8Array): string | null {
  if (!isUtf8(bytes)) return 'not UTF-8';
  return new Checker(bytes).document();
}

const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const LITERALS = new Map([
  [0x74, 'true'],
  [0x66, 'false'],
  [0x6e, 'null'],
]);

class Checker {
  readonly #bytes: Uint8Array;
  #at = 0;

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes;
  }

  document(): string | null {
    // True: the innermost open bracket is an object's.
    const open: boolean[] = [];
    for (;;) {
      // Here a value is expected.
      this.#space();
      const byte = this.#bytes[this.#at];
      if (byte === 0x7b || byte === 0x5b) {
        if (open.length === MAX_JSON_DEPTH) return `nested deeper than ${MAX_JSON_DEPTH}`;
        this.#at += 1;
        open.push(byte === 0x7b);
        this.#space();
        if (this.#bytes[this.#at] !== (byte === 0x7b ? 0x7d : 0x5d)) {
          if (byte === 0x7b && !this.#key()) return this.#unexpected();
          continue;
        }
        // An empty one; closed below.
      } else if (!this.#scalar()) return this.#unexpected();
      // Here a value has ended, or an empty bracket is about to.
      for (;;) {
        this.#space();
        const inObject = open.at(-1);
        if (inObject === undefined) return this.#at === this.#bytes.length ? null : this.#unexpected();
        const next = this.#bytes[this.#at];
        if (next === (inObject ? 0x7d : 0x5d)) {
          this.#at += 1;
          open.pop();
          continue;
        }
        if (next !== 0x2c) return this.#unexpected();
        this.#at += 1;
        if (inObject) {
          this.#space();
          if (!this.#key()) return this.#unexpected();
        }
        break;
      }
    }
  }

  #unexpected(): string {
    const byte = this.#bytes[this.#at];
    if (byte === undefined) return this.#at === 0 ? 'empty' : `cut short after ${this.#at} bytes`;
    const shown = byte >= 0x20 && byte < 0x7f ? `'${String.fromCharCode(byte)}'` : `0x${byte.toString(16)}`;
    return `${shown} is not expected at byte ${this.#at}`;
  }

  #space(): void {
    for (;;) {
      const byte = this.#bytes[this.#at];
      if (byte !== 0x20 && byte !== 0x0a && byte !== 0x0d && byte !== 0x09) return;
      this.#at += 1;
    }
  }

  #key(): boolean {
    if (!this.#string()) return false;
    this.#space();
    if (this.#bytes[this.#at] !== 0x3a) return false;
    this.#at += 1;
    return true;
  }

  #scalar(): boolean {
    const byte = this.#bytes[this.#at];
    if (byte === QUOTE) return this.#string();
    const literal = byte === undefined ? undefined : LITERALS.get(byte);
    if (literal === undefined) return this.#number();
    for (let index = 0; index < literal.length; index += 1) {
      if (this.#bytes[this.#at] !== literal.charCodeAt(index)) return false;
      this.#at += 1;
    }
    return true;
  }

  #string(): boolean {
    if (this.#bytes[this.#at] !== QUOTE) return false;
    this.#at += 1;
    for (;;) {
      const byte = this.#bytes[this.#at];
      if (byte === undefined || byte < 0x20) return false;
      this.#at += 1;
      if (byte === QUOTE) return true;
      if (byte !== BACKSLASH) continue;
      const escape = this.#bytes[this.#at];
      if (escape === undefined || !'"\\/bfnrtu'.includes(String.fromCharCode(escape))) return false;
      this.#at += 1;
      if (escape !== 0x75) continue;
      for (let digit = 0; digit < 4; digit += 1) {
        if (!/[0-9a-fA-F]/.test(String.fromCharCode(this.#bytes[this.#at] ?? 0))) return false;
        this.#at += 1;
      }
    }
  }

  #number(): boolean {
    if (this.#bytes[this.#at] === 0x2d) this.#at += 1;
    if (this.#bytes[this.#at] === 0x30) this.#at += 1;
    else if (!this.#digits()) return false;
    if (this.#bytes[this.#at] === 0x2e) {
      this.#at += 1;
      if (!this.#digits()) return false;
    }
    const exponent = this.#bytes[this.#at];
    if (exponent !== 0x65 && exponent !== 0x45) return true;
    this.#at += 1;
    const sign = this.#bytes[this.#at];
    if (sign === 0x2b || sign === 0x2d) this.#at += 1;
    return this.#digits();
  }

  #digits(): boolean {
    const start = this.#at;
    for (;;) {
      const byte = this.#bytes[this.#at];
      if (byte === undefined || byte < 0x30 || byte > 0x39) return this.#at > start;
      this.#at += 1;
    }
  }
}
