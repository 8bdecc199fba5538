/**
 * The wire's output end: frames whole and in order, those of one turn of the event loop in one write.
 */
import type { Writable } from 'node:stream';

export class WireOutput {
  readonly #stream: Writable;
  readonly #lost: (error: Error) => void;
  #corked = false;
  #drained: { readonly promise: Promise<void>; readonly resolve: () => void } | null = null;
  #open = true;

  /** @param lost hears once that the other side reads no more; frames are dropped from then on */
  constructor(stream: Writable, lost: (error: Error) => void) {
    this.#stream = stream;
    this.#lost = lost;
    stream.on('drain', () => this.#release());
    stream.on('error', (error: Error) => this.#lose(error));
    stream.on('close', () => this.#lose(new Error('the output was closed')));
  }

  /** Resolves when there is room for more. Never rejects. */
  send(frame: Uint8Array): Promise<void> {
    // Not at once: whoever writes in a loop would never let anything else happen again.
    if (!this.#open) return new Promise((resolve) => setImmediate(resolve));
    if (!this.#corked) {
      this.#corked = true;
      this.#stream.cork();
      process.nextTick(() => {
        this.#corked = false;
        this.#stream.uncork();
      });
    }
    if (this.#stream.write(frame)) return DONE;
    if (this.#drained === null) {
      let resolve!: () => void;
      const promise = new Promise<void>((settle) => {
        resolve = settle;
      });
      this.#drained = { promise, resolve };
    }
    return this.#drained.promise;
  }

  /** Resolves when everything sent so far was handed to the system, or the other side is gone. */
  flush(): Promise<void> {
    if (!this.#open) return DONE;
    return new Promise((resolve) => {
      this.#stream.once('close', resolve);
      // An empty write is called back after all before it.
      this.#stream.write(new Uint8Array(), () => resolve());
    });
  }

  #release(): void {
    this.#drained?.resolve();
    this.#drained = null;
  }

  #lose(error: Error): void {
    if (!this.#open) return;
    this.#open = false;
    this.#release();
    this.#lost(error);
  }
}

const DONE = Promise.resolve();
