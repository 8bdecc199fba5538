/** What a command may touch of the process. `main.ts` makes the real one; nothing else reads `process`. */
import type { Readable } from 'node:stream';
import {
  paint,
  terminalFeatures,
  type Env,
  type Paint,
  type TerminalFeatures,
  type TextOut,
} from './terminal.ts';

export interface Io {
  readonly env: Env;
  readonly cwd: string;
  readonly pid: number;
  readonly stdin: Readable & { readonly isTTY?: boolean };
  readonly stdout: TextOut;
  readonly stderr: TextOut;
  /** Epoch milliseconds. */
  now(): number;
  /**
   * Calls `listener` for each SIGINT, SIGTERM and SIGHUP until disposed; the newest listener gets it. While nobody
   * listens, a signal ends the process with exit code 3.
   */
  onStop(listener: () => void): Disposable;
}

/** The options every command takes. */
export interface GlobalOptions {
  readonly json?: boolean;
  readonly url?: string;
  readonly token?: string;
  readonly data?: string;
}

/**
 * Where a command's words go. Results go to stdout, everything else to stderr; with `--json` stdout carries exactly
 * one JSON document and the lines for people are left out.
 */
export class Output {
  readonly json: boolean;
  /** What stdout can show. */
  readonly features: TerminalFeatures;
  readonly paint: Paint;
  readonly #io: Io;
  #documentWritten = false;

  constructor(io: Io, json: boolean) {
    this.json = json;
    this.#io = io;
    this.features = terminalFeatures(io.stdout, io.env);
    this.paint = paint(this.features.color);
  }

  /** True once the one JSON document is out. */
  get documentWritten(): boolean {
    return this.#documentWritten;
  }

  /** The result: as the JSON document with `--json`, else as lines for people. */
  result(document: unknown, lines: () => readonly string[]): void {
    if (this.json) this.document(document);
    else for (const line of lines()) this.#io.stdout.write(`${line}\n`);
  }

  /** One JSON document on one line of stdout, whether or not `--json` was asked for. */
  document(value: unknown): void {
    if (this.#documentWritten) throw new Error('a second JSON document on stdout');
    this.#documentWritten = true;
    this.#io.stdout.write(`${JSON.stringify(value)}\n`);
  }

  /**
   * The JSON document of something long, written as it comes: `head`, and in it as last member `name` a list.
   *
   * Nothing is written before the first item, so an error before that can still be the document.
   */
  list(head: Readonly<Record<string, unknown>>, name: string): JsonList {
    let state: 'empty' | 'open' | 'ended' = 'empty';
    const begin = (): void => {
      if (this.#documentWritten) throw new Error('a second JSON document on stdout');
      this.#documentWritten = true;
      const members = JSON.stringify(head).slice(1, -1);
      this.#io.stdout.write(`{${members === '' ? '' : `${members},`}${JSON.stringify(name)}:[`);
    };
    return {
      push: (item) => {
        if (state === 'empty') begin();
        this.#io.stdout.write((state === 'empty' ? '' : ',') + JSON.stringify(item));
        state = 'open';
      },
      end: (tail = {}) => {
        if (state === 'ended') return;
        if (state === 'empty') begin();
        state = 'ended';
        const members = JSON.stringify(tail).slice(1, -1);
        this.#io.stdout.write(`]${members === '' ? '' : `,${members}`}}\n`);
      },
      get begun() {
        return state !== 'empty';
      },
    };
  }

  /** A remark for the person watching, on stderr. */
  note(text: string): void {
    this.#io.stderr.write(`${text}\n`);
  }
}

/** A list on its way to stdout. See {@link Output.list}. */
export interface JsonList {
  /** Something was written. */
  readonly begun: boolean;
  push(item: unknown): void;
  /** Ends the document, with further members. Idempotent. */
  end(tail?: Readonly<Record<string, unknown>>): void;
}

export interface CommandContext {
  readonly io: Io;
  readonly out: Output;
  readonly options: GlobalOptions;
}
