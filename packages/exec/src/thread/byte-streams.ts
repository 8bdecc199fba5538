/**
 * Byte streams over a MessagePort, with backpressure, the same code on both sides.
 *
 * The receiver grants credit in bytes and the sender stops when it is used up, so at most {@link
 * WINDOW_BYTES} and one chunk of a stream are under way, whatever its size. The receiver ends a stream early
 * with `stop`, the sender with `fail`. After `end`, `fail` or `stop` the number means nothing any more and
 * messages about it are ignored.
 *
 * Every chunk is copied once, into memory of its own, and that copy is transferred. Transferring the chunk
 * itself would be cheaper and wrong: it takes the memory away from whoever handed it over, and Node's small
 * buffers share one block.
 */
import { Readable } from 'node:stream';
import { MillraceError } from '@millrace/runner';
import type { ByteStream } from '@millrace/runner';
import type { WireError } from './wire-error.ts';
import { decodeError, encodeError } from './wire-error.ts';

export type StreamMessage =
  | { readonly t: 'chunk'; readonly stream: number; readonly bytes: Uint8Array }
  | { readonly t: 'end'; readonly stream: number }
  | { readonly t: 'fail'; readonly stream: number; readonly error: WireError }
  | { readonly t: 'credit'; readonly stream: number; readonly bytes: number }
  | { readonly t: 'stop'; readonly stream: number };

/** Bytes of one stream that may be under way unread. */
export const WINDOW_BYTES = 1024 * 1024;
/** Larger chunks travel in pieces of this size, so that one of them cannot overrun the window by much. */
export const MAX_PIECE_BYTES = 256 * 1024;

export type Post<T> = (message: T, transfer?: readonly ArrayBuffer[]) => void;

interface Outlet {
  credit: number;
  stopped: boolean;
  /** Ends the wait for credit. */
  wake: () => void;
  /** Ends the wait for the source, as far as it can be ended. */
  interrupt: () => void;
}

interface Inlet {
  chunk(bytes: Uint8Array): void;
  end(): void;
  fail(error: Error): void;
}

/** The streams of one task. */
export class ByteStreams {
  readonly #post: Post<StreamMessage>;
  readonly #outlets = new Map<number, Outlet>();
  readonly #inlets = new Map<number, Inlet>();

  constructor(post: Post<StreamMessage>) {
    this.#post = post;
  }

  /**
   * Sends everything the source yields. Resolves once it has ended or was stopped, and the source is closed;
   * rejects with what the source threw, after telling the other side.
   */
  async send(stream: number, source: ByteStream): Promise<void> {
    const outlet: Outlet = {
      credit: WINDOW_BYTES,
      stopped: false,
      wake: () => undefined,
      interrupt: () => (source as Partial<Readable>).destroy?.(),
    };
    this.#outlets.set(stream, outlet);
    try {
      for await (const chunk of source) {
        if (outlet.stopped) return;
        checkChunk(chunk);
        for (let at = 0; at < chunk.byteLength; at += MAX_PIECE_BYTES) {
          while (outlet.credit <= 0 && !outlet.stopped) {
            await new Promise<void>((resolve) => (outlet.wake = resolve));
          }
          if (outlet.stopped) return;
          const bytes = new Uint8Array(chunk.subarray(at, at + MAX_PIECE_BYTES));
          outlet.credit -= bytes.byteLength;
          this.#post({ t: 'chunk', stream, bytes }, [bytes.buffer]);
        }
      }
      if (!outlet.stopped) this.#post({ t: 'end', stream });
    } catch (error) {
      // A source that was destroyed because nobody wants it any more complains about that.
      if (outlet.stopped) return;
      this.#post({ t: 'fail', stream, error: encodeError(error) });
      throw error;
    } finally {
      this.#outlets.delete(stream);
    }
  }

  /** Ends a stream that is being sent; the other side is not told. */
  stopSending(stream: number): void {
    const outlet = this.#outlets.get(stream);
    if (!outlet) return;
    outlet.stopped = true;
    outlet.wake();
    outlet.interrupt();
  }

  /** What the other side sends under this number. Destroying it stops the sender. */
  receive(stream: number): Readable {
    const queue: Uint8Array[] = [];
    let consumed = 0;
    let wanted = false;
    let ended = false;
    const deliver = (): void => {
      const bytes = queue.shift();
      if (bytes) {
        wanted = false;
        consumed += bytes.byteLength;
        if (consumed >= WINDOW_BYTES / 4) {
          // The sender has ended already when its end is here: nobody needs the credit.
          if (!ended) this.#post({ t: 'credit', stream, bytes: consumed });
          consumed = 0;
        }
        readable.push(bytes);
      } else if (ended) {
        readable.push(null);
      } else {
        wanted = true;
      }
    };
    const readable = new Readable({
      read: deliver,
      destroy: (error, callback) => {
        queue.length = 0;
        if (this.#inlets.delete(stream)) this.#post({ t: 'stop', stream });
        callback(error);
      },
    });
    // Whoever reads it meets the error then; a stream nobody reads yet must not end the process.
    readable.on('error', () => undefined);
    this.#inlets.set(stream, {
      chunk: (bytes) => {
        queue.push(bytes);
        if (wanted) deliver();
      },
      end: () => {
        this.#inlets.delete(stream);
        ended = true;
        if (wanted) deliver();
      },
      fail: (error) => {
        this.#inlets.delete(stream);
        readable.destroy(error);
      },
    });
    return readable;
  }

  /** Ends a stream that is being received with an error; the sender is told to stop. */
  stopReceiving(stream: number, error: Error): void {
    const inlet = this.#inlets.get(stream);
    if (!inlet) return;
    this.#post({ t: 'stop', stream });
    inlet.fail(error);
  }

  handle(message: StreamMessage): void {
    switch (message.t) {
      case 'chunk':
        this.#inlets.get(message.stream)?.chunk(message.bytes);
        return;
      case 'end':
        this.#inlets.get(message.stream)?.end();
        return;
      case 'fail':
        this.#inlets.get(message.stream)?.fail(decodeError(message.error));
        return;
      case 'credit': {
        const outlet = this.#outlets.get(message.stream);
        if (!outlet) return;
        outlet.credit += message.bytes;
        outlet.wake();
        return;
      }
      case 'stop':
        this.stopSending(message.stream);
    }
  }

  /** Ends everything: what is received fails with `reason`, what is sent stops. */
  close(reason: Error): void {
    for (const stream of this.#outlets.keys()) this.stopSending(stream);
    for (const inlet of this.#inlets.values()) inlet.fail(reason);
  }
}

/** @throws MillraceError `invalid_argument` */
export function checkChunk(chunk: unknown): asserts chunk is Uint8Array {
  if (chunk instanceof Uint8Array) return;
  throw new MillraceError(
    'invalid_argument',
    `a byte stream must yield Uint8Array chunks, got ${chunk === null ? 'null' : typeof chunk}`,
  );
}
