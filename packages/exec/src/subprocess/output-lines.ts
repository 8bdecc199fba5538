/**
 * What a program prints, as lines for the task's log, up to a limit. What comes beyond is read and counted, so that the program does
 * not wait for a reader that has had enough. The last words of stderr are kept whatever the limit, for the error.
 */
import { StringDecoder } from 'node:string_decoder';
import type { Logger } from '@millrace/runner';

export type OutputStream = 'stdout' | 'stderr';

/** Longer lines are broken. In characters. */
const MAX_LINE = 16 * 1024;
const LAST_WORDS_BYTES = 2048;

export class OutputLines {
  readonly #limitBytes: number;
  readonly #log: Logger;
  readonly #partial = { stdout: '', stderr: '' };
  readonly #decoders = { stdout: new StringDecoder('utf8'), stderr: new StringDecoder('utf8') };
  #lastWords: Buffer = Buffer.alloc(0);
  #kept = 0;
  #dropped = 0;

  constructor(limitBytes: number, log: Logger) {
    this.#limitBytes = limitBytes;
    this.#log = log;
  }

  write(stream: OutputStream, bytes: Buffer): void {
    if (stream === 'stderr') {
      this.#lastWords = Buffer.concat([this.#lastWords, bytes.subarray(-LAST_WORDS_BYTES)]).subarray(
        -LAST_WORDS_BYTES,
      );
    }
    const taken = bytes.subarray(0, this.#limitBytes - this.#kept);
    this.#kept += taken.byteLength;
    this.#dropped += bytes.byteLength - taken.byteLength;
    if (taken.byteLength === 0) return;
    const lines = (this.#partial[stream] + this.#decoders[stream].write(taken)).split('\n');
    this.#partial[stream] = lines.pop() ?? '';
    for (const line of lines) this.#line(stream, line);
    while (this.#partial[stream].length >= MAX_LINE) {
      const end = cutAt(this.#partial[stream], 0);
      this.#emit(stream, this.#partial[stream].slice(0, end));
      this.#partial[stream] = this.#partial[stream].slice(end);
    }
  }

  /** Logs lines that have no end yet, and what was dropped. Returns how many bytes were. */
  end(): number {
    for (const stream of ['stdout', 'stderr'] as const) {
      this.#line(stream, this.#partial[stream] + this.#decoders[stream].end());
      this.#partial[stream] = '';
    }
    if (this.#dropped > 0) {
      this.#log.warn(`output was cut: the limit logBytes is ${this.#limitBytes} bytes`, {
        limit: 'logBytes',
        value: this.#limitBytes,
        dropped_bytes: this.#dropped,
      });
    }
    return this.#dropped;
  }

  /** The last line of stderr that says something; null when there is none. */
  lastWords(): string | null {
    const lines = this.#lastWords.toString('utf8').split(/[\r\n]+/);
    return (
      lines.map((line) => line.replaceAll(/\p{Cc}/gu, ' ').trim()).findLast((line) => line !== '') ?? null
    );
  }

  #line(stream: OutputStream, line: string): void {
    for (let at = 0, end; at < line.length; at = end) {
      end = cutAt(line, at);
      this.#emit(stream, line.slice(at, end));
    }
  }

  #emit(stream: OutputStream, line: string): void {
    // Progress bars go back to the beginning of a line; only what they last showed is worth keeping.
    const message = line.replace(/\r+$/, '').split('\r').at(-1) ?? '';
    if (message === '') return;
    if (stream === 'stdout') this.#log.info(message, { stream });
    else this.#log.warn(message, { stream });
  }
}

/** Where a line that is longer is broken: not within a character of two halves, which would be none any more. */
function cutAt(line: string, from: number): number {
  const end = from + MAX_LINE;
  const last = line.charCodeAt(end - 1);
  return last >= 0xd800 && last <= 0xdbff ? end - 1 : end;
}
