/**
 * What travels between the caller of a command and the thread it runs in, over the ports that every engine has: the request is
 * the call's input, the output of the command is its diagnostics, in frames that name the stream, and how it ended is its result.
 */
import type { FileLimits, Mount } from './files.ts';

export interface CommandRequest extends FileLimits {
  readonly args: readonly string[];
  readonly env: Readonly<Record<string, string>>;
  readonly mounts: readonly Mount[];
  readonly maxOutputBytes: number;
}

export type CommandReport =
  | { readonly exit: number }
  | { readonly trap: string; readonly trace: readonly string[] }
  | { readonly output: number };

/** One byte for the stream, four for the length. */
const HEADER_BYTES = 5;
/** What frames can make of the output at most: a header for each byte. */
export const FRAME_OVERHEAD = HEADER_BYTES + 1;

export function frame(stream: 1 | 2, bytes: Uint8Array): Uint8Array {
  const record = Buffer.allocUnsafe(HEADER_BYTES + bytes.length);
  record.writeUInt8(stream, 0);
  record.writeUInt32LE(bytes.length, 1);
  record.set(bytes, HEADER_BYTES);
  return record;
}

/** Takes frames apart, however they were cut on the way, and passes on what there is of each. */
export class FrameReader {
  readonly #header = Buffer.alloc(HEADER_BYTES);
  #headerLength = 0;
  #left = 0;
  readonly #take: (stream: 'stdout' | 'stderr', bytes: Uint8Array) => void;

  constructor(take: (stream: 'stdout' | 'stderr', bytes: Uint8Array) => void) {
    this.#take = take;
  }

  push(bytes: Uint8Array): void {
    let at = 0;
    while (at < bytes.length) {
      if (this.#left === 0) {
        const part = bytes.subarray(at, at + HEADER_BYTES - this.#headerLength);
        this.#header.set(part, this.#headerLength);
        this.#headerLength += part.length;
        at += part.length;
        if (this.#headerLength < HEADER_BYTES) return;
        this.#left = this.#header.readUInt32LE(1);
      }
      const part = bytes.subarray(at, at + this.#left);
      at += part.length;
      this.#left -= part.length;
      if (part.length > 0) this.#take(this.#header[0] === 1 ? 'stdout' : 'stderr', part);
      if (this.#left === 0) this.#headerLength = 0;
    }
  }
}
