/** What is kept of a command's output, as the `capture` of a script asks for it, and never more than the limits. */
import { StringDecoder } from 'node:string_decoder';

export type CaptureFormat = 'str' | 'bin';

/** Which part of a stream is kept. `limit`, `bytes`: in bytes. */
export type CaptureMode =
  | { readonly keep: 'nothing' }
  /** The beginning, and `stream` says that it is also told as it comes. */
  | {
      readonly keep: 'head';
      readonly bytes: number | null;
      readonly stream: boolean;
      readonly format: CaptureFormat;
    }
  | { readonly keep: 'tail'; readonly bytes: number; readonly format: CaptureFormat }
  /** Half of the bytes from each end; the head gets the odd one. */
  | { readonly keep: 'headTail'; readonly bytes: number; readonly format: CaptureFormat };

export const CAPTURE_ALL: CaptureMode = { keep: 'head', bytes: null, stream: true, format: 'str' };
export const CAPTURE_NOTHING: CaptureMode = { keep: 'nothing' };

/** Text, the values of the bytes, or null when nothing was kept. */
export type CapturedValue = string | number[] | null;

export interface Captured {
  readonly value: CapturedValue;
  /** The kept bytes themselves. */
  readonly bytes: Uint8Array;
  /** What the stream had, in bytes, kept or not. */
  readonly totalBytes: number;
  /** True when a limit of ours, not the script's, cut it. */
  readonly truncated: boolean;
}

export class OutputCapture {
  readonly mode: CaptureMode;
  readonly #headLimit: number;
  readonly #tailLimit: number;
  readonly #limited: boolean;
  /** Grows by doubling: chunks may be single bytes. */
  #head = Buffer.alloc(0);
  #headBytes = 0;
  #tail: Uint8Array[] = [];
  #tailBytes = 0;
  #totalBytes = 0;

  /** @param limitBytes the most that is kept, whatever the mode says */
  constructor(mode: CaptureMode, limitBytes: number) {
    this.mode = mode;
    const asked = mode.keep === 'nothing' ? 0 : (mode.bytes ?? Infinity);
    const bytes = Math.min(asked, limitBytes);
    this.#limited = asked > limitBytes;
    this.#tailLimit = mode.keep === 'tail' ? bytes : mode.keep === 'headTail' ? Math.floor(bytes / 2) : 0;
    this.#headLimit = bytes - this.#tailLimit;
  }

  push(chunk: Uint8Array): void {
    this.#totalBytes += chunk.length;
    const head = chunk.subarray(0, this.#headLimit - this.#headBytes);
    if (head.length > 0) this.#pushHead(head);
    const rest = chunk.subarray(head.length);
    if (rest.length > 0 && this.#tailLimit > 0) this.#pushTail(rest);
  }

  result(): Captured {
    const bytes = Buffer.concat([this.#head.subarray(0, this.#headBytes), ...this.#tail]);
    const kept = this.#tailLimit > 0 ? this.#withoutExcess(bytes) : bytes;
    return {
      value: this.mode.keep === 'nothing' || kept.length === 0 ? null : format(kept, this.mode.format),
      bytes: kept,
      totalBytes: this.#totalBytes,
      truncated: this.#limited && this.#totalBytes > kept.length,
    };
  }

  #pushHead(chunk: Uint8Array): void {
    const bytes = this.#headBytes + chunk.length;
    if (bytes > this.#head.length) {
      const grown = Buffer.alloc(Math.max(bytes, 2 * this.#head.length, 256));
      this.#head.copy(grown);
      this.#head = grown;
    }
    this.#head.set(chunk, this.#headBytes);
    this.#headBytes = bytes;
  }

  #pushTail(chunk: Uint8Array): void {
    // Copied: a chunk is a view of a frame or a read buffer that would be kept alive whole.
    this.#tail.push(Uint8Array.from(chunk.subarray(Math.max(0, chunk.length - this.#tailLimit))));
    this.#tailBytes += Math.min(chunk.length, this.#tailLimit);
    while (this.#tailBytes - this.#tail[0]!.length >= this.#tailLimit) {
      this.#tailBytes -= this.#tail.shift()!.length;
    }
    // Many small chunks would each cost more than they hold.
    if (this.#tail.length > 256) this.#tail = [this.#withoutExcess(Buffer.concat(this.#tail), 0)];
    if (this.#tail.length === 1) this.#tailBytes = this.#tail[0]!.length;
  }

  /** Cuts what the tail has beyond its limit. */
  #withoutExcess(bytes: Buffer, headBytes: number = this.#headBytes): Buffer {
    const excess = bytes.length - headBytes - this.#tailLimit;
    if (excess <= 0) return bytes;
    return Buffer.concat([bytes.subarray(0, headBytes), bytes.subarray(headBytes + excess)]);
  }
}

/** UTF-8 where it is, else one character per byte. */
function format(bytes: Uint8Array, as: CaptureFormat): CapturedValue {
  if (as === 'bin') return [...bytes];
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return Buffer.from(bytes).toString('latin1');
  }
}

/** Chunks of one stream as text, no character cut in two. */
export class ChunkText {
  readonly #decoder = new StringDecoder('utf8');

  push(chunk: Uint8Array): string {
    return this.#decoder.write(Buffer.from(chunk.buffer, chunk.byteOffset, chunk.length));
  }
}
