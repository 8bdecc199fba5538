/**
 * Streams made from a function that gives the next chunk: the one place where a source that is pulled becomes a Node
 * stream, with its resources freed whichever way the stream ends.
 */
import { createHash } from 'node:crypto';
import { Readable } from 'node:stream';
import { MillraceError, type ByteStream } from '@millrace/runner';

/** Gives the next chunk, or null at the end. Never called again before it settled, nor after it rejected. */
export type Pull = () => Promise<Uint8Array | null>;

export interface PullSource {
  readonly pull: Pull;
  /** Called once, when the stream ended, failed or was destroyed, and after a pull under way has settled. */
  close(): Promise<void> | void;
  /** Called when the stream is destroyed, so that a pull under way gives up instead of being waited for. */
  abandon?(): void;
}

/** A Readable over `pull`. An error of `close` is the stream's when there was none before. */
export function readableFrom(source: PullSource): Readable {
  let underWay: Promise<void> = Promise.resolve();
  return new Readable({
    highWaterMark: 64 * 1024,
    read() {
      underWay = source.pull().then(
        (chunk) => void this.push(chunk),
        (error: unknown) => void this.destroy(error instanceof Error ? error : new Error(String(error))),
      );
    },
    destroy(error, callback) {
      void (async () => {
        let result = error;
        try {
          source.abandon?.();
          await underWay;
          await source.close();
        } catch (closeError) {
          result ??= closeError as Error;
        }
        callback(result);
      })();
    },
  });
}

/**
 * The same chunks, checked: the last one is held back until digest and size of everything are known to match, so
 * a reader that sees the end has seen the right bytes. A mismatch is `data_loss`.
 */
export function verified(
  pull: Pull,
  expect: { readonly digest: string; readonly size?: number },
  what: string,
): Pull {
  const hash = createHash('sha256');
  let size = 0;
  let held: Uint8Array | null = null;
  let ended = false;
  return async () => {
    while (!ended) {
      const chunk = await pull();
      if (chunk !== null) {
        if (chunk.length === 0) continue;
        hash.update(chunk);
        size += chunk.length;
        const previous = held;
        held = chunk;
        if (previous !== null) return previous;
        continue;
      }
      ended = true;
      checkBytes({ digest: `sha256:${hash.digest('hex')}`, size }, expect, what);
      if (held !== null) return held;
    }
    return null;
  };
}

/** @throws MillraceError `data_loss` when the digest or size is not the expected one. */
export function checkBytes(
  actual: { readonly digest: string; readonly size: number },
  expect: { readonly digest?: string | undefined; readonly size?: number | undefined },
  what: string,
): void {
  if (expect.size !== undefined && actual.size !== expect.size) {
    throw new MillraceError('data_loss', `${what}: ${expect.size} bytes expected, got ${actual.size}`, {
      details: { expected: expect.size, actual: actual.size },
    });
  }
  if (expect.digest !== undefined && actual.digest !== expect.digest) {
    throw new MillraceError('data_loss', `${what}: digest ${expect.digest} expected, got ${actual.digest}`, {
      details: { expected: expect.digest, actual: actual.digest },
    });
  }
}

/** {@link Pull} over an iterable, with the way to give it up. */
export function pullFrom(source: ByteStream): { readonly pull: Pull; close(): Promise<void> } {
  const iterator = source[Symbol.asyncIterator]();
  return {
    pull: async () => {
      const result = await iterator.next();
      return result.done === true ? null : result.value;
    },
    close: async () => {
      await iterator.return?.();
    },
  };
}

/**
 * The chunks of `source` until `signal` aborts, then its reason. A source that is stuck is left behind, not waited
 * for: its own end is the caller's to bring about.
 */
export async function* untilAborted(
  source: ByteStream,
  signal: AbortSignal | undefined,
): AsyncGenerator<Uint8Array> {
  if (signal === undefined) {
    yield* source;
    return;
  }
  const iterator = source[Symbol.asyncIterator]();
  let interrupt: (reason: unknown) => void = () => {};
  const onAbort = (): void => interrupt(signal.reason);
  signal.addEventListener('abort', onAbort, { once: true });
  let finished = false;
  try {
    for (;;) {
      signal.throwIfAborted();
      // Not a race against one promise for the abort: that would remember every chunk until the end.
      const result = await new Promise<IteratorResult<Uint8Array>>((resolve, reject) => {
        interrupt = reject;
        iterator.next().then(resolve, reject);
      });
      if (result.done === true) {
        finished = true;
        return;
      }
      yield result.value;
    }
  } finally {
    signal.removeEventListener('abort', onAbort);
    if (!finished) {
      const returned = iterator.return?.();
      if (signal.aborted) returned?.catch(() => {});
      else await returned;
    }
  }
}
