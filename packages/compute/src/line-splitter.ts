/** Bytes that come in any pieces, as lines of text. */
export class LineSplitter {
  readonly #maxBytes: number;
  readonly #onLine: (line: string) => void;
  #parts: Uint8Array[] = [];
  #length = 0;

  /** A line longer than `maxBytes` is handed on in pieces of that size. */
  constructor(maxBytes: number, onLine: (line: string) => void) {
    this.#maxBytes = maxBytes;
    this.#onLine = onLine;
  }

  write(bytes: Uint8Array): void {
    let rest = bytes;
    while (rest.length > 0) {
      const end = rest.indexOf(0x0a);
      const upTo = end < 0 ? rest.length : end;
      const room = this.#maxBytes - this.#length;
      if (upTo > room) {
        this.#add(rest.subarray(0, room));
        rest = rest.subarray(room);
        this.#emit();
        continue;
      }
      this.#add(rest.subarray(0, upTo));
      rest = rest.subarray(upTo + (end < 0 ? 0 : 1));
      if (end >= 0) this.#emit();
    }
  }

  /** Hands on what is left without a line end. */
  end(): void {
    if (this.#length > 0) this.#emit();
  }

  #add(bytes: Uint8Array): void {
    if (bytes.length === 0) return;
    this.#parts.push(bytes);
    this.#length += bytes.length;
  }

  #emit(): void {
    const line = Buffer.concat(this.#parts).toString('utf8');
    this.#parts = [];
    this.#length = 0;
    this.#onLine(line);
  }
}
