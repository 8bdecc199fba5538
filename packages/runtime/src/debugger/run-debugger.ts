/**
 * A prompt over one runtime: deploy, start, run, kill, stop, with output and events as they come.
 *
 * Lines are carried out one after the other; `run … &` does not wait. From a script, the first line that fails ends it.
 */
import { createReadStream, createWriteStream } from 'node:fs';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { clearScreenDown, createInterface, cursorTo, type Interface } from 'node:readline';
import type { Readable, Writable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { StringDecoder } from 'node:string_decoder';
import { MillraceError, describeError, type Clock } from '@millrace/runner';
import type { SupervisorLimits } from '../supervisor/limits.ts';
import { RuntimeSupervisor, type RuntimeEvent } from '../supervisor/runtime-supervisor.ts';
import type { RunningCommand } from '../supervisor/running-command.ts';
import type { TracedFrame } from '../supervisor/wire-client.ts';
import { hexLines } from '../wire/describe.ts';
import { openInVolume, writeToVolume } from '../supervisor/volumes.ts';
import { splitWords } from './words.ts';

export interface DebuggerOptions {
  readonly runtimePath: string;
  /** Made if missing. */
  readonly workdir: string;
  /** The version told in hello. Default 0.1.0. */
  readonly protocol?: string;
  /** Words put before the subcommand. */
  readonly args?: readonly string[];
  readonly taskPackage?: string;
  /** A file of lines to carry out instead of a prompt. `#` starts a comment. */
  readonly script?: string;
  /** Prints each frame, decoded and in hex. Default false. */
  readonly trace?: boolean;
  readonly input: Readable;
  readonly output: Writable;
  /** Lines typed at a terminal are kept here. Default: not kept. */
  readonly historyFile?: string;
  /** Variables granted to the runtime. */
  readonly env?: Readonly<Record<string, string>>;
  readonly limits?: Partial<SupervisorLimits>;
  readonly clock?: Clock;
  /** Ends the session. */
  readonly signal?: AbortSignal;
}

const PROMPT = 'runtime> ';
const HISTORY_LINES = 500;
/** Bytes of output that may wait to be read. A runtime writes faster than a terminal shows, or a pager that nobody scrolls. */
const MAX_PENDING_BYTES = 8 * 1024 * 1024;
const SIGTERM = 15;
const SIGKILL = 9;

const HELP: readonly (readonly [name: string, words: string, text: string])[] = [
  ['deploy', '', 'set up the work directory'],
  ['start', '[WORDS]', 'start the runtime'],
  ['run', 'ENTRY [WORDS] [&]', 'run a command and wait for it; with & do not wait'],
  ['sh', 'LINE [&]', 'run /bin/sh -c LINE'],
  ['kill', 'PID [SIGNAL]', 'send a signal by number, 15 by default'],
  ['wait', '[PID]', 'wait for commands that run'],
  ['ps', '', 'list the commands that run'],
  ['put', 'FILE PATH', 'copy a file of yours into a volume'],
  ['get', 'PATH FILE', 'copy a file out of a volume'],
  ['usage', '', 'show the usage counters'],
  ['stop', '', 'shut the runtime down'],
  ['help', '', 'print this'],
  ['quit', '', 'shut down and leave'],
];

/**
 * Resolves with an exit code: 0, or 1 when a script failed. Nothing of the runtime is left then.
 *
 * @throws MillraceError `invalid_argument` when the script cannot be read.
 */
export async function runDebugger(options: DebuggerOptions): Promise<number> {
  await using session = new DebugSession(options);
  if (options.script === undefined) {
    await session.prompt();
    return 0;
  }
  const text = await readFile(options.script, 'utf8').catch((error: unknown) => {
    throw new MillraceError('invalid_argument', `script ${options.script} cannot be read`, { cause: error });
  });
  return await session.script(text);
}

class DebugSession implements AsyncDisposable {
  readonly #options: DebuggerOptions;
  readonly #supervisor: RuntimeSupervisor;
  readonly #running = new Map<string, RunningCommand>();
  /** The command a line waits for. */
  #foreground: RunningCommand | null = null;
  /** Signals sent to it from the keyboard. */
  #interrupts = 0;
  #localIds = 0;
  #quit = false;
  /** While a line is being typed at a terminal; what is printed then must not end up in the middle of it. */
  #typing: Interface | null = null;
  /** By stream: a character may come in two chunks. */
  readonly #decoders = new Map<string, StringDecoder>();
  /** Bytes of output not shown since the last line that was. */
  #leftOut = 0;

  constructor(options: DebuggerOptions) {
    this.#options = options;
    const { protocol, taskPackage, limits, env, clock } = options;
    this.#supervisor = new RuntimeSupervisor({
      runtime: options.runtimePath,
      workDir: options.workdir,
      runtimeArgs: options.args ?? [],
      onEvent: (event) => this.#onEvent(event),
      ...(options.trace ? { onFrame: (frame: TracedFrame) => this.#onFrame(frame) } : {}),
      ...(protocol === undefined ? {} : { protocol }),
      ...(taskPackage === undefined ? {} : { taskPackage }),
      ...(limits ? { limits } : {}),
      ...(env ? { env } : {}),
      ...(clock ? { clock } : {}),
    });
    options.signal?.addEventListener('abort', this.#onAbort, { once: true });
  }

  /** Whatever a line waits for ends with the runtime. A failure to end it is reported by the disposal. */
  readonly #onAbort = (): void => {
    this.#supervisor.close().catch(() => undefined);
  };

  async [Symbol.asyncDispose](): Promise<void> {
    this.#options.signal?.removeEventListener('abort', this.#onAbort);
    await this.#supervisor.close();
    await Promise.allSettled([...this.#running.values()].map(({ result }) => result));
  }

  /** Carries the lines out until one fails. Resolves with the exit code. */
  async script(text: string): Promise<number> {
    for (const [index, raw] of text.split('\n').entries()) {
      const line = raw.trim();
      if (line === '' || line.startsWith('#')) continue;
      if (this.#quit || this.#options.signal?.aborted) break;
      this.#print(`${PROMPT}${line}`);
      if (!(await this.#carryOut(line))) {
        this.#print(`line ${index + 1} failed`);
        return 1;
      }
    }
    return this.#options.signal?.aborted ? 1 : 0;
  }

  /** Reads lines until the input ends or one says to quit. */
  async prompt(): Promise<void> {
    const history = await this.#loadHistory();
    const { input, output, signal } = this.#options;
    const terminal = (output as Partial<NodeJS.WriteStream>).isTTY === true;
    const reader = createInterface({
      input,
      output,
      terminal,
      prompt: PROMPT,
      history,
      historySize: HISTORY_LINES,
      removeHistoryDuplicates: true,
      completer: (line: string) => this.#complete(line),
    });
    reader.on('history', (lines: string[]) => void this.#saveHistory(lines));
    reader.on('SIGINT', () => this.#interrupt(reader));
    // Not the interface's own iterator, which loses lines that come before it is asked.
    const lines: string[] = [];
    let closed = false;
    let wake = (): void => undefined;
    reader.on('line', (line) => {
      lines.push(line);
      wake();
    });
    reader.on('close', () => {
      closed = true;
      wake();
    });
    const onAbort = (): void => reader.close();
    signal?.addEventListener('abort', onAbort, { once: true });
    if (signal?.aborted) onAbort();
    this.#print(
      `${path.basename(this.#options.runtimePath)} in ${this.#supervisor.workDir}; "help" lists the commands`,
    );
    const ask = (): void => {
      // Who reads what was typed elsewhere sees the lines as they are carried out, as from a script.
      if (closed || this.#quit || !terminal) return;
      reader.prompt();
      this.#typing = reader;
    };
    ask();
    while (!this.#quit) {
      const line = lines.shift();
      if (line !== undefined) {
        this.#typing = null;
        if (!terminal && line.trim() !== '') this.#print(`${PROMPT}${line.trim()}`);
        if (line.trim() !== '') await this.#carryOut(line.trim());
        ask();
      } else if (closed) break;
      else {
        await new Promise<void>((resolve) => {
          wake = resolve;
        });
      }
    }
    signal?.removeEventListener('abort', onAbort);
    this.#typing = null;
    reader.close();
  }

  /** Resolves with whether it worked. Never rejects. */
  async #carryOut(line: string): Promise<boolean> {
    try {
      const [name = '', ...words] = splitWords(line);
      switch (name) {
        case 'deploy':
          return await this.#deploy();
        case 'start':
          return await this.#start(words);
        case 'run':
          return await this.#run(words);
        case 'sh': {
          const text = line.slice('sh'.length).trim();
          const background = /\s&$/.test(text);
          const script = background ? text.slice(0, -1).trim() : text;
          return await this.#run(['/bin/sh', '-c', script, ...(background ? ['&'] : [])]);
        }
        case 'kill':
          return await this.#kill(words);
        case 'wait':
          return await this.#wait(words[0]);
        case 'ps':
          this.#print([...this.#running.keys()].map((id) => `pid ${id}`).join('\n') || 'nothing runs');
          return true;
        case 'put':
          return await this.#put(words);
        case 'get':
          return await this.#get(words);
        case 'usage':
          for (const [counter, value] of Object.entries(await this.#supervisor.usage())) {
            this.#print(`${counter} ${value}`);
          }
          return true;
        case 'stop':
          await this.#supervisor.terminate();
          this.#print('stopped');
          return true;
        case 'help':
          for (const [command, args, text] of HELP) this.#print(`${`${command} ${args}`.padEnd(26)}${text}`);
          return true;
        case 'quit':
        case 'exit':
          this.#quit = true;
          return true;
        default:
          throw new SyntaxError(`unknown command ${JSON.stringify(name)}; "help" lists the commands`);
      }
    } catch (error) {
      this.#print(`error: ${describeError(error)}`);
      return false;
    }
  }

  async #deploy(): Promise<boolean> {
    const { exitCode, volumes } = await this.#supervisor.deploy({}, this.#showing('deploy'));
    this.#print(
      exitCode === 0 ? `deployed, ${this.#supervisor.mode} mode` : `deploy ended with code ${exitCode}`,
    );
    for (const volume of volumes) this.#print(`volume ${volume.path} is ${volume.name}`);
    return exitCode === 0;
  }

  async #start(words: readonly string[]): Promise<boolean> {
    const { exitCode } = await this.#supervisor.start(words, this.#showing('start'));
    this.#print(exitCode === 0 ? 'started' : `start ended with code ${exitCode}`);
    return exitCode === 0;
  }

  async #run(words: readonly string[]): Promise<boolean> {
    const background = words.at(-1) === '&';
    const [entryPoint, ...args] = background ? words.slice(0, -1) : words;
    if (entryPoint === undefined) throw new SyntaxError('run needs the name of what to run');
    // Output may come before the pid is known.
    const early: (() => void)[] = [];
    let id: string | null = null;
    const show = (stream: 'stdout' | 'stderr', chunk: Uint8Array): void => {
      if (id !== null) this.#showOutput(id, stream, chunk);
      else {
        const kept = Uint8Array.from(chunk);
        early.push(() => show(stream, kept));
      }
    };
    const command = await this.#supervisor.spawn({ entryPoint, args }, { onOutput: show });
    id = command.pid === null ? `c${(this.#localIds += 1)}` : String(command.pid);
    for (const output of early) output();
    this.#running.set(id, command);
    const ended = command.result.then(
      ({ exitCode }) => {
        this.#print(`pid ${id} ended with code ${exitCode}`);
        return exitCode === 0;
      },
      (error: unknown) => {
        this.#print(`pid ${id} failed: ${describeError(error)}`);
        return false;
      },
    );
    void ended.then(() => {
      this.#running.delete(id);
      for (const mark of ['|', '!']) this.#decoders.delete(`${id}${mark}`);
    });
    if (background) {
      this.#print(`pid ${id}`);
      return true;
    }
    this.#foreground = command;
    this.#interrupts = 0;
    const worked = await ended;
    this.#foreground = null;
    return worked;
  }

  async #kill([id, signal = String(SIGTERM)]: readonly string[]): Promise<boolean> {
    const command = this.#find(id);
    if (!/^\d+$/.test(signal)) throw new SyntaxError(`the signal must be a number, got ${signal}`);
    await command.kill(Number(signal));
    return true;
  }

  async #wait(id: string | undefined): Promise<boolean> {
    const commands = id === undefined ? [...this.#running.values()] : [this.#find(id)];
    await Promise.allSettled(commands.map(({ result }) => result));
    return true;
  }

  async #put([file, inside]: readonly string[]): Promise<boolean> {
    if (file === undefined || inside === undefined)
      throw new SyntaxError('put needs a file and a path in a volume');
    await writeToVolume(this.#supervisor.volumes.locate(inside), createReadStream(file));
    return true;
  }

  async #get([inside, file]: readonly string[]): Promise<boolean> {
    if (file === undefined || inside === undefined)
      throw new SyntaxError('get needs a path in a volume and a file');
    const handle = await openInVolume(this.#supervisor.volumes.locate(inside));
    try {
      await pipeline(handle.createReadStream({ autoClose: false }), createWriteStream(file));
    } finally {
      await handle.close();
    }
    return true;
  }

  #find(id: string | undefined): RunningCommand {
    const command = this.#running.get(id ?? '');
    if (command) return command;
    throw new SyntaxError(`no command with pid ${id ?? '(none given)'} runs; "ps" lists them`);
  }

  /** Ctrl-C: a signal to the command that is waited for, a harder one the second time; else the end of the session. */
  #interrupt(reader: Interface): void {
    if (this.#foreground === null) {
      reader.close();
      return;
    }
    this.#interrupts += 1;
    const signal = this.#interrupts === 1 ? SIGTERM : SIGKILL;
    this.#print(`\nkill ${signal}`);
    void this.#foreground
      .kill(signal)
      .catch((error: unknown) => this.#print(`error: ${describeError(error)}`));
  }

  #complete(line: string): [string[], string] {
    const [name = '', ...rest] = line.split(/\s+/);
    if (rest.length === 0)
      return [HELP.map(([command]) => `${command} `).filter((one) => one.startsWith(name)), name];
    const word = rest.at(-1)!;
    const ids = name === 'kill' || name === 'wait' ? [...this.#running.keys()] : [];
    return [ids.filter((id) => id.startsWith(word)), word];
  }

  #showing(name: string): { onOutput: (stream: 'stdout' | 'stderr', chunk: Uint8Array) => void } {
    return { onOutput: (stream, chunk) => this.#showOutput(name, stream, chunk) };
  }

  #showOutput(id: string, stream: 'stdout' | 'stderr', chunk: Uint8Array): void {
    const mark = stream === 'stdout' ? '|' : '!';
    const key = `${id}${mark}`;
    if (this.#leaveOut(chunk.length)) {
      this.#decoders.delete(key);
      return;
    }
    const decoder = this.#decoders.get(key) ?? new StringDecoder('utf8');
    this.#decoders.set(key, decoder);
    const text = decoder.write(Buffer.from(chunk)).replace(/\n$/, '');
    if (text === '' && chunk.length > 0 && chunk.at(-1) !== 0x0a) return;
    const lines = text.split('\n').map((line) => `${id} ${mark} ${line}`);
    this.#print(lines.join('\n'));
  }

  /** Whether output is left out, since too much of it waits. Then it is until half of that was read. */
  #leaveOut(bytes: number): boolean {
    const most = this.#leftOut === 0 ? MAX_PENDING_BYTES : MAX_PENDING_BYTES / 2;
    if (this.#options.output.writableLength <= most) return false;
    this.#leftOut += bytes;
    return true;
  }

  #onEvent(event: RuntimeEvent): void {
    switch (event.kind) {
      case 'state':
        this.#print(`state ${event.name} ${JSON.stringify(event.value)}`);
        break;
      case 'counter':
        this.#print(`counter ${event.name} ${event.value}`);
        break;
      case 'output':
        this.#showOutput(event.pid === null ? 'runtime' : String(event.pid), event.stream, event.chunk);
        break;
    }
  }

  #onFrame({ direction, text, bytes }: TracedFrame): void {
    if (this.#leaveOut(bytes.length)) return;
    this.#print(`${direction === 'sent' ? '-->' : '<--'} ${text}\n${hexLines(bytes, '    ')}`);
  }

  #print(text: string): void {
    const { output } = this.#options;
    if (this.#leftOut > 0) {
      const left = this.#leftOut;
      this.#leftOut = 0;
      this.#print(`… ${left} bytes are left out here: they came faster than they were read`);
    }
    if (this.#typing === null) {
      output.write(`${text}\n`);
      return;
    }
    cursorTo(output, 0);
    clearScreenDown(output);
    output.write(`${text}\n`);
    this.#typing.prompt(true);
  }

  /** The newest first, as the interface has them. */
  async #loadHistory(): Promise<string[]> {
    const { historyFile } = this.#options;
    if (historyFile === undefined) return [];
    const text = await readFile(historyFile, 'utf8').catch(() => '');
    return text.split('\n').filter(Boolean).reverse();
  }

  async #saveHistory(lines: readonly string[]): Promise<void> {
    const { historyFile } = this.#options;
    if (historyFile === undefined) return;
    try {
      await mkdir(path.dirname(historyFile), { recursive: true });
      await writeFile(historyFile, `${lines.toReversed().join('\n')}\n`, { mode: 0o600 });
    } catch {
      // A history that cannot be kept is no reason to disturb the session.
    }
  }
}
