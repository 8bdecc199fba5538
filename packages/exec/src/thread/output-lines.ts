/**
 * What a module writes to stdout and stderr, as lines for the log of the task that wrote them.
 *
 * It is cut at the source, in the runner's thread: a module that floods its log costs the engine's thread
 * nothing beyond the limit.
 */
import { StringDecoder } from 'node:string_decoder';
import type { Note } from './protocol.ts';

export type OutputStream = 'stdout' | 'stderr';

/** Longer lines are broken. */
export const MAX_LINE_BYTES = 16 * 1024;

/**
 * The output of one task, up to a limit. stdout becomes `info` lines, stderr `warn`, with `stream` as a
 * field.
 */
export class OutputLines {
  readonly #limitBytes: number;
  readonly #emit: (note: Note) => void;
  readonly #partial = { stdout: '', stderr: '' };
  readonly #decoders = { stdout: new StringDecoder('utf8'), stderr: new StringDecoder('utf8') };
  #kept = 0;
  #dropped = 0;

  constructor(limitBytes: number, emit: (note: Note) => void) {
    this.#limitBytes = limitBytes;
    this.#emit = emit;
  }

  write(stream: OutputStream, bytes: Uint8Array): void {
    const room = this.#limitBytes - this.#kept;
    const taken = bytes.byteLength <= room ? bytes : bytes.subarray(0, room);
    this.#kept += taken.byteLength;
    this.#dropped += bytes.byteLength - taken.byteLength;
    if (taken.byteLength === 0) return;
    const lines = (this.#partial[stream] + this.#decoders[stream].write(Buffer.from(taken))).split('\n');
    this.#partial[stream] = lines.pop() ?? '';
    for (const line of lines) this.#line(stream, line);
    while (this.#partial[stream].length >= MAX_LINE_BYTES) {
      const end = cutAt(this.#partial[stream]);
      this.#emitLine(stream, this.#partial[stream].slice(0, end));
      this.#partial[stream] = this.#partial[stream].slice(end);
    }
  }

  /** Emits lines that have no end yet, and what was dropped. */
  end(): void {
    for (const stream of ['stdout', 'stderr'] as const) {
      const rest = this.#partial[stream] + this.#decoders[stream].end();
      this.#partial[stream] = '';
      if (rest !== '') this.#line(stream, rest);
    }
    if (this.#dropped === 0) return;
    this.#emit({
      kind: 'log',
      level: 'warn',
      message: `output was cut: the limit logBytes is ${this.#limitBytes} bytes`,
      fields: { limit: 'logBytes', value: this.#limitBytes, dropped_bytes: this.#dropped },
    });
    this.#dropped = 0;
  }

  #line(stream: OutputStream, line: string): void {
    let rest = line.endsWith('\r') ? line.slice(0, -1) : line;
    while (rest.length > MAX_LINE_BYTES) {
      const end = cutAt(rest);
      this.#emitLine(stream, rest.slice(0, end));
      rest = rest.slice(end);
    }
    if (rest !== '') this.#emitLine(stream, rest);
  }

  #emitLine(stream: OutputStream, message: string): void {
    this.#emit({ kind: 'log', level: stream === 'stdout' ? 'info' : 'warn', message, fields: { stream } });
  }
}

/** Where a longer line is broken: not within a character of two halves, which would be none any more. */
function cutAt(line: string): number {
  const last = line.charCodeAt(MAX_LINE_BYTES - 1);
  return last >= 0xd800 && last <= 0xdbff ? MAX_LINE_BYTES - 1 : MAX_LINE_BYTES;
}

/** Sends everything written to this thread's stdout and stderr to `write` instead. */
export function captureOutput(write: (stream: OutputStream, bytes: Uint8Array) => void): void {
  for (const name of ['stdout', 'stderr'] as const) {
    const take = (chunk: Uint8Array | string, encoding: BufferEncoding): void =>
      write(name, typeof chunk === 'string' ? Buffer.from(chunk, encoding) : chunk);
    // The stream's own methods stay, so that callbacks, `end` and encodings behave as they do elsewhere.
    process[name]._write = (chunk: Uint8Array | string, encoding, callback) => {
      take(chunk, encoding);
      callback();
    };
    process[name]._writev = (chunks, callback) => {
      for (const { chunk, encoding } of chunks) take(chunk as Uint8Array | string, encoding);
      callback();
    };
  }
}
