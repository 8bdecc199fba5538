/**
 * Frames: each message behind its length in bytes as a varint, seven bits a byte, least significant first.
 *
 * The decoder delivers a frame as soon as its last byte is there, however the bytes were cut, and looks at the length
 * before it keeps anything: what it holds is never more than one frame of the allowed size.
 */
import { MillraceError } from '@millrace/runner';

/** The largest payload accepted by default. Peers in use send frames of a few megabytes at most. */
export const DEFAULT_MAX_FRAME_BYTES = 16 * 1024 * 1024;

/** A varint of 64 bits has at most ten bytes. */
const MAX_PREFIX_BYTES = 10;

const HELD_AT_ONCE_BYTES = 256 * 1024;

/** The bytes that stand before a payload of this length. */
export function encodeLength(length: number): Uint8Array {
  const bytes: number[] = [];
  let rest = length;
  while (rest > 0x7f) {
    bytes.push((rest % 0x80) | 0x80);
    rest = Math.floor(rest / 0x80);
  }
  bytes.push(rest);
  return Uint8Array.from(bytes);
}

/** The payload as a frame. */
export function encodeFrame(payload: Uint8Array): Uint8Array {
  const prefix = encodeLength(payload.length);
  const frame = new Uint8Array(prefix.length + payload.length);
  frame.set(prefix);
  frame.set(payload, prefix.length);
  return frame;
}

/** Cuts a byte stream into payloads. After an error it is used up: the stream's frame borders are lost. */
export class FrameDecoder {
  readonly #maxFrameBytes: number;
  /** The length as far as it was read. */
  #length = 0;
  #prefixBytes = 0;
  /** Payload bytes still missing; null while the length is being read. */
  #missing: number | null = null;
  /**
   * The payload so far, when it came in pieces. It grows with what arrives, not with what was announced, and keeps
   * no piece, of which there may be one per byte.
   */
  #held: Uint8Array = new Uint8Array();
  #heldBytes = 0;

  /** @param maxFrameBytes the largest payload accepted, in bytes */
  constructor(maxFrameBytes: number = DEFAULT_MAX_FRAME_BYTES) {
    this.#maxFrameBytes = maxFrameBytes;
  }

  /**
   * Takes the next bytes and hands over each payload they complete, in order. A payload may share memory with `chunk`.
   *
   * @throws MillraceError `resource_exhausted` for a length above the limit, `invalid_argument` for a length that is no
   * varint. Frames before the bad one have been handed over.
   */
  push(chunk: Uint8Array, onPayload: (payload: Uint8Array) => void): void {
    let at = 0;
    while (at < chunk.length) {
      if (this.#missing === null) {
        at = this.#readLength(chunk, at);
        if (this.#missing === null) return;
      }
      const part = chunk.subarray(at, at + this.#missing);
      at += part.length;
      if (part.length < this.#missing) {
        this.#hold(part);
        this.#missing -= part.length;
        return;
      }
      const payload = this.#heldBytes === 0 ? part : this.#complete(part);
      this.#missing = null;
      onPayload(payload);
    }
    // A frame without payload is complete with its length.
    if (this.#missing === 0) {
      this.#missing = null;
      onPayload(new Uint8Array());
    }
  }

  /** Whether the bytes so far end inside a frame. */
  get midFrame(): boolean {
    return this.#missing !== null || this.#prefixBytes > 0;
  }

  /** Says that no bytes follow. @throws MillraceError `data_loss` when that cuts a frame. */
  end(): void {
    if (!this.midFrame) return;
    throw new MillraceError('data_loss', 'the stream ended in the middle of a frame');
  }

  #hold(part: Uint8Array): void {
    const bytes = this.#heldBytes + part.length;
    if (bytes > this.#held.length) {
      const whole = bytes - part.length + this.#missing!;
      // Frames of the usual size are held in one piece from the start, larger ones grow with what arrives.
      const grown = Buffer.allocUnsafeSlow(
        Math.max(bytes, Math.min(whole, Math.max(HELD_AT_ONCE_BYTES, 2 * this.#held.length))),
      );
      grown.set(this.#held.subarray(0, this.#heldBytes));
      this.#held = grown;
    }
    this.#held.set(part, this.#heldBytes);
    this.#heldBytes = bytes;
  }

  #complete(last: Uint8Array): Uint8Array {
    this.#hold(last);
    const payload = this.#held.subarray(0, this.#heldBytes);
    this.#held = new Uint8Array();
    this.#heldBytes = 0;
    return payload;
  }

  #readLength(chunk: Uint8Array, start: number): number {
    let at = start;
    while (at < chunk.length) {
      const byte = chunk[at]!;
      at += 1;
      // Beyond 2^53 the sum is rounded, which changes nothing: it is far above any limit.
      this.#length += (byte & 0x7f) * 2 ** (7 * this.#prefixBytes);
      this.#prefixBytes += 1;
      if (this.#length > this.#maxFrameBytes) {
        throw new MillraceError(
          'resource_exhausted',
          `a frame announces ${byte < 0x80 ? '' : 'at least '}${this.#length} bytes, above the limit maxFrameBytes of ${this.#maxFrameBytes}`,
          { details: { limit: 'maxFrameBytes', value: this.#maxFrameBytes } },
        );
      }
      if (byte < 0x80) {
        this.#missing = this.#length;
        this.#length = 0;
        this.#prefixBytes = 0;
        return at;
      }
      if (this.#prefixBytes === MAX_PREFIX_BYTES) {
        throw new MillraceError(
          'invalid_argument',
          `a frame's length has more than ${MAX_PREFIX_BYTES} bytes; the other side does not write frames`,
        );
      }
    }
    return at;
  }
}
