/**
 * One command from start to end: whatever its handler does, its output is told in order and its end exactly once, last.
 */
import type { Json } from '@millrace/runner';
import { canonicalJson } from './canonical-json.ts';
import { runProgram } from './child-program.ts';
import { RuntimeError } from './runtime-error.ts';
import {
  CommandKilled,
  type CommandContext,
  type CommandHandler,
  type RuntimeControl,
  type SpawnOptions,
} from './runtime.ts';

const SIGKILL = 9;

/** Where a command's events go. Output never rejects; it resolves when there is room for more. */
export interface CommandSink {
  stdout(pid: bigint, bytes: Uint8Array): Promise<void>;
  stderr(pid: bigint, bytes: Uint8Array): Promise<void>;
  state(name: string, value: Json): Promise<void>;
  counter(name: string, value: number): Promise<void>;
  stopped(pid: bigint, exitCode: number): Promise<void>;
}

export class Command implements CommandContext {
  readonly pid: bigint;
  readonly control: RuntimeControl;
  readonly #sink: CommandSink;
  readonly #abort = new AbortController();
  readonly #force = new AbortController();
  readonly #programs = new Set<Promise<unknown>>();
  #exitCode = 0;
  #ended = false;
  /** The newest output that is not on its way yet; what comes later waits for it, so that nothing is mixed. */
  #writing: Promise<void> | null = null;

  constructor(pid: bigint, sink: CommandSink, control: RuntimeControl) {
    this.pid = pid;
    this.#sink = sink;
    this.control = control;
  }

  get signal(): AbortSignal {
    return this.#abort.signal;
  }

  get exitCode(): number {
    return this.#exitCode;
  }

  set exitCode(code: number) {
    if (!Number.isInteger(code) || code < -(2 ** 31) || code >= 2 ** 31) {
      throw new RangeError(`exitCode must be a whole number of 32 bits, got ${code}`);
    }
    this.#exitCode = code;
  }

  stdout(data: string | Uint8Array): Promise<void> {
    return this.#write(() => this.#sink.stdout(this.pid, bytesOf(data)));
  }

  stderr(data: string | Uint8Array): Promise<void> {
    return this.#write(() => this.#sink.stderr(this.pid, bytesOf(data)));
  }

  state(name: string, value: Json): Promise<void> {
    return this.#sink.state(name, value);
  }

  counter(name: string, value: number): Promise<void> {
    return this.#sink.counter(name, value);
  }

  async spawn(file: string, args: readonly string[] = [], options: SpawnOptions = {}): Promise<void> {
    const program = runProgram({
      ...options,
      file,
      args,
      signal: this.signal,
      force: this.#force.signal,
      onStdout: (chunk) => this.stdout(chunk),
      onStderr: (chunk) => this.stderr(chunk),
    });
    this.#programs.add(program);
    try {
      this.exitCode = await program;
    } finally {
      this.#programs.delete(program);
    }
  }

  /** Runs the handler to its end; never rejects. */
  async run(handler: CommandHandler): Promise<void> {
    try {
      const result = await handler(this);
      if (result !== undefined && result !== null) {
        await this.stdout(canonicalJson(result, 'what a command returns'));
      }
    } catch (error) {
      const { reason } = this.signal as { reason: unknown };
      if (reason instanceof CommandKilled && (error === reason || isAbortOf(error, reason))) {
        this.#exitCode = 128 + reason.signal;
      } else {
        const failure = RuntimeError.from(error);
        this.#exitCode = failure.exitCode;
        await this.stderr(`${failure.message}\n`);
      }
    }
    while (this.#writing !== null) await this.#writing;
    await this.#end();
  }

  /** Aborts the signal; 9 also ends the command for the supervisor at once, whatever the handler still does. */
  async kill(signal: number): Promise<void> {
    const number = signal > 0 ? signal : 15;
    this.#abort.abort(new CommandKilled(number));
    if (number !== SIGKILL) return;
    this.#force.abort();
    await Promise.allSettled(this.#programs);
    await this.forceEnd();
  }

  /** Tells the end as after SIGKILL; what the handler still writes is dropped. */
  async forceEnd(): Promise<void> {
    if (!this.#ended) this.#exitCode = 128 + SIGKILL;
    await this.#end();
  }

  #write(send: () => Promise<void>): Promise<void> {
    // Not resolved at once: a handler that writes in a loop would never let anything else happen again.
    if (this.#ended) return new Promise((resolve) => setImmediate(resolve));
    const sent = this.#writing === null ? send() : this.#writing.then(send);
    this.#writing = sent;
    void sent.then(() => {
      if (this.#writing === sent) this.#writing = null;
    });
    return sent;
  }

  async #end(): Promise<void> {
    if (this.#ended) return;
    this.#ended = true;
    await this.#sink.stopped(this.pid, this.#exitCode);
  }
}

/** What Node's own functions reject with when their signal aborts. */
function isAbortOf(error: unknown, reason: CommandKilled): boolean {
  return error instanceof Error && error.name === 'AbortError' && error.cause === reason;
}

function bytesOf(data: string | Uint8Array): Uint8Array {
  return typeof data === 'string' ? Buffer.from(data) : data;
}

/** @throws RangeError when it is no value a counter may have. */
export function checkCounter(name: string, value: number): void {
  if (name === '' || !Number.isFinite(value) || value < 0) {
    throw new RangeError(`counter ${JSON.stringify(name)} must have a name and a number >= 0, got ${value}`);
  }
}
