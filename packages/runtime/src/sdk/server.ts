/**
 * A runtime in server mode: requests in, answers and events out.
 *
 * starting → serving → stopping → stopped. Requests are read from the first moment. While starting, only Shutdown is acted on; the
 * rest waits, and the first thing after `start` is its output, then the answer to hello. From then on requests are
 * handled at the same time. The first of Shutdown, end of input, a signal, `control.shutdown()`, a lost
 * output and bytes that are no frames makes it stop, once: no new commands, `stop` called, commands ended, all within
 * the stop window. After Shutdown it stays to answer until the input ends; after the others it is done.
 *
 * No process event is written before the answer that introduces its pid.
 */
import type { Readable, Writable } from 'node:stream';
import type { Clock, Json } from '@millrace/runner';
import { counterFrame, statusFrame, type StatusFields } from '../wire/event-frames.ts';
import { FrameDecoder } from '../wire/frames.ts';
import { WIRE_ERROR } from '../wire/error-codes.ts';
import {
  decodeRequest,
  responseFrame,
  type Request,
  type RequestCommand,
  type ResponseInit,
} from '../wire/messages.ts';
import { canonicalJson } from './canonical-json.ts';
import { killAllPrograms } from './child-program.ts';
import { Command, checkCounter, type CommandSink } from './command.ts';
import { RuntimeError } from './runtime-error.ts';
import type {
  CommandHandler,
  Emitter,
  JoinNetwork,
  NetworkEndpoint,
  Pid,
  RunCommand,
  Runtime,
  RuntimeContext,
} from './runtime.ts';
import { stopTimeoutOf } from './runtime.ts';
import { WireOutput } from './wire-output.ts';

/** Output is cut into events of this size: the decoders of supervisors in use slow down with the square of it. */
const MAX_OUTPUT_BYTES = 64 * 1024;
/** Requests that may wait for `start`. */
const MAX_WAITING_REQUESTS = 10_000;
const MAX_PID = 2n ** 64n - 1n;

export interface ServerStreams {
  readonly input: Readable;
  readonly output: Writable;
}

/** What the server puts in the context. */
export interface ServerFace {
  readonly emitter: Emitter;
  readonly signal: AbortSignal;
  shutdown(): void;
  command(handler: CommandHandler): Promise<bigint>;
}

type StopCause =
  | { readonly kind: 'request'; readonly id: bigint }
  | { readonly kind: 'end' | 'control' }
  | { readonly kind: 'signal'; readonly exitCode: number }
  | { readonly kind: 'failure'; readonly message: string };

export class RuntimeServer implements ServerFace, CommandSink {
  readonly emitter: Emitter;
  readonly #runtime: Runtime;
  readonly #input: Readable;
  readonly #output: WireOutput;
  readonly #clock: Clock;
  readonly #complain: (line: string) => void;
  readonly #stopping = new AbortController();
  readonly #done: Promise<number>;
  #finish!: (exitCode: number) => void;
  #context!: RuntimeContext;
  /** Requests that wait for `start`; null once it is done. */
  #waiting: Request[] | null = [];
  #nextPid = 0n;
  /** Commands by pid until their end is told. */
  readonly #commands = new Map<bigint, Command>();
  /** Handlers that have not settled. */
  readonly #handlers = new Set<Promise<void>>();
  /** Run requests whose answer is not written. */
  #runsUnanswered = 0;
  /** Pids that may be spoken of; those that stopped are removed. */
  readonly #introduced = new Set<bigint>();
  /** Events of pids not introduced yet, in order, and whether the last of them is the end. */
  readonly #held = new Map<bigint, { readonly frames: Uint8Array[]; stopped: boolean }>();
  #stopped: Promise<string | null> | null = null;
  #inputEnded = false;

  /** @param complain gets lines for stderr */
  constructor(
    runtime: Runtime,
    streams: ServerStreams,
    options: { readonly clock: Clock; readonly complain: (line: string) => void },
  ) {
    this.#runtime = runtime;
    this.#input = streams.input;
    this.#clock = options.clock;
    this.#complain = options.complain;
    this.#done = new Promise((resolve) => {
      this.#finish = resolve;
    });
    this.#output = new WireOutput(streams.output, (error) => {
      void this.#stopFor({ kind: 'failure', message: `the supervisor stopped reading: ${error.message}` });
    });
    this.emitter = {
      nextPid: () => this.#takePid(),
      started: (pid) => this.#started(pidOf(pid)),
      stdout: (pid, data) => this.stdout(pidOf(pid), Buffer.from(data)),
      stderr: (pid, data) => this.stderr(pidOf(pid), Buffer.from(data)),
      stopped: (pid, exitCode) => this.stopped(pidOf(pid), exitCode),
      state: (name, value) => this.state(name, value),
      counter: (name, value) => this.counter(name, value),
    };
  }

  get signal(): AbortSignal {
    return this.#stopping.signal;
  }

  shutdown(): void {
    void this.#stopFor({ kind: 'control' });
  }

  /** As if the machine had sent the process this signal. */
  onSignal(exitCode: number): void {
    void this.#stopFor({ kind: 'signal', exitCode });
  }

  /** An error no handler caught. */
  onUncaught(error: unknown): void {
    void this.#stopFor({ kind: 'failure', message: RuntimeError.from(error).line });
  }

  /** Serves until the end and resolves with the exit code; every frame has been handed to the system then. */
  async serve(context: RuntimeContext): Promise<number> {
    this.#context = context;
    this.#read();
    void this.#start();
    const exitCode = await this.#done;
    this.#input.destroy();
    killAllPrograms();
    await this.#output.flush();
    return exitCode;
  }

  // Commands and their events.

  async command(handler: CommandHandler): Promise<bigint> {
    if (this.signal.aborted) throw new RuntimeError('the runtime is stopping', { kind: 'bad_request' });
    const pid = this.#takePid();
    const command = new Command(pid, this, this.#context.control);
    this.#commands.set(pid, command);
    if (this.#runsUnanswered === 0) this.#introduced.add(pid);
    void this.#started(pid);
    // After the caller has returned the pid, so that a handler that works for long before its first await delays no answer.
    const handled = new Promise<void>((resolve) => setImmediate(resolve)).then(() => command.run(handler));
    this.#handlers.add(handled);
    void handled.then(() => this.#handlers.delete(handled));
    return pid;
  }

  stdout(pid: bigint, bytes: Uint8Array): Promise<void> {
    return this.#emitOutput(pid, 'stdout', bytes);
  }

  stderr(pid: bigint, bytes: Uint8Array): Promise<void> {
    return this.#emitOutput(pid, 'stderr', bytes);
  }

  async state(name: string, value: Json): Promise<void> {
    const text = Buffer.from(canonicalJson(value, `state ${name}`));
    await this.#send({
      event: true,
      command: { case: 'rtStatus', value: { kind: { case: 'state', value: { name, value: text } } } },
    });
  }

  async counter(name: string, value: number): Promise<void> {
    checkCounter(name, value);
    await this.#output.send(counterFrame(name, value));
  }

  async stopped(pid: bigint, exitCode: number): Promise<void> {
    this.#commands.delete(pid);
    const sent = this.#emit(pid, { pid, returnCode: exitCode });
    const held = this.#held.get(pid);
    if (held) held.stopped = true;
    else this.#introduced.delete(pid);
    await sent;
  }

  #started(pid: bigint): Promise<void> {
    return this.#emit(pid, { pid, running: true });
  }

  async #emitOutput(pid: bigint, stream: 'stdout' | 'stderr', bytes: Uint8Array): Promise<void> {
    const command = this.#commands.get(pid);
    for (let at = 0; at < bytes.length; at += MAX_OUTPUT_BYTES) {
      // Ended by force while it waited: nothing may follow the end.
      if (this.#commands.get(pid) !== command) return;
      await this.#emit(pid, { pid, running: true, [stream]: bytes.subarray(at, at + MAX_OUTPUT_BYTES) });
    }
  }

  #emit(pid: bigint, status: StatusFields): Promise<void> {
    const frame = statusFrame(status);
    if (this.#runsUnanswered === 0 || this.#introduced.has(pid)) return this.#output.send(frame);
    const held = this.#held.get(pid);
    if (held) held.frames.push(frame);
    else this.#held.set(pid, { frames: [frame], stopped: false });
    return Promise.resolve();
  }

  /** Writes a run answer, then what waited for it. */
  #answerRun(id: bigint, response: ResponseInit['command'], pid: bigint | null): void {
    void this.#send({ id, command: response });
    this.#runsUnanswered -= 1;
    if (pid !== null) {
      if (this.#held.get(pid)?.stopped !== true) this.#introduced.add(pid);
      this.#release(pid);
    }
    // Nothing is left that could introduce the others.
    if (this.#runsUnanswered === 0) for (const other of this.#held.keys()) this.#release(other);
  }

  #release(pid: bigint): void {
    for (const frame of this.#held.get(pid)?.frames ?? []) void this.#output.send(frame);
    this.#held.delete(pid);
  }

  #takePid(): bigint {
    const pid = this.#nextPid;
    this.#nextPid += 1n;
    return pid;
  }

  #send(response: ResponseInit): Promise<void> {
    return this.#output.send(responseFrame(response));
  }

  // Requests.

  #read(): void {
    const decoder = new FrameDecoder();
    const broken = (error: unknown): void => {
      this.#input.removeAllListeners('data');
      void this.#stopFor({
        kind: 'failure',
        message: `the input is not the protocol: ${(error as Error).message}`,
      });
    };
    this.#input.on('data', (chunk: Uint8Array) => {
      try {
        decoder.push(chunk, (payload) => this.#onRequest(decodeRequest(payload)));
      } catch (error) {
        broken(error);
      }
    });
    this.#input.once('error', broken);
    this.#input.once('end', () => {
      this.#inputEnded = true;
      try {
        decoder.end();
        void this.#stopFor({ kind: 'end' });
      } catch (error) {
        broken(error);
      }
    });
  }

  async #start(): Promise<void> {
    let result: unknown;
    try {
      result = await this.#runtime.start?.(this.#context);
    } catch (error) {
      if (!this.signal.aborted) {
        this.#complain(`Error: Failed to start the runtime: ${RuntimeError.from(error).line}`);
        this.#finish(RuntimeError.from(error).exitCode);
        return;
      }
    }
    if (result !== undefined && result !== null) {
      const pid = this.#takePid();
      const text = typeof result === 'string' ? result : canonicalJson(result, 'what start returns');
      await this.stdout(pid, Buffer.from(text));
    }
    const waiting = this.#waiting ?? [];
    this.#waiting = null;
    for (const request of waiting) this.#onRequest(request);
  }

  #onRequest(request: Request): void {
    const { id, command } = request;
    if (command.case === 'shutdown') {
      void this.#stopFor({ kind: 'request', id });
      return;
    }
    if (this.#waiting !== null) {
      if (this.#waiting.length >= MAX_WAITING_REQUESTS) {
        throw new RuntimeError(`more than ${MAX_WAITING_REQUESTS} requests while the runtime starts`);
      }
      this.#waiting.push(request);
      return;
    }
    if (command.case === 'run') void this.#onRun(id, command.value);
    else void this.#onOther(id, command);
  }

  async #onRun(id: bigint, run: Extract<RequestCommand, { case: 'run' }>['value']): Promise<void> {
    this.#runsUnanswered += 1;
    const request: RunCommand = {
      entryPoint: run.bin,
      args: run.args.slice(1),
      argv0: run.args[0] ?? null,
      mode: 'server',
      workDir: run.workDir,
    };
    try {
      if (this.signal.aborted) throw new RuntimeError('the runtime is stopping', { kind: 'bad_request' });
      const pid = pidOf(await this.#runtime.runCommand(this.#context, request));
      this.#answerRun(id, { case: 'run', value: { pid } }, pid);
    } catch (error) {
      this.#answerRun(id, errorAnswer(error), null);
    }
  }

  async #onOther(id: bigint, command: Exclude<RequestCommand, { case: 'run' | 'shutdown' }>): Promise<void> {
    let answer: ResponseInit['command'];
    try {
      switch (command.case) {
        case 'hello':
          answer = { case: 'hello', value: { version: this.#runtime.version } };
          break;
        case 'kill':
          await this.#kill(command.value.pid, command.value.signal);
          answer = { case: 'kill', value: {} };
          break;
        case 'network':
          answer = { case: 'network', value: { endpoint: await this.#joinNetwork(command.value) } };
          break;
        case undefined:
          throw new RuntimeError('unknown command');
      }
    } catch (error) {
      answer = errorAnswer(error);
    }
    await this.#send({ id, command: answer });
  }

  async #kill(pid: bigint, signal: number): Promise<void> {
    if (this.#runtime.killCommand) {
      await this.#runtime.killCommand(this.#context, { pid, signal });
      return;
    }
    const command = this.#commands.get(pid);
    if (!command) throw new RuntimeError(`no command has the pid ${pid}`, { kind: 'not_found' });
    await command.kill(signal);
  }

  async #joinNetwork(request: Extract<RequestCommand, { case: 'network' }>['value']): Promise<EndpointInit> {
    if (!this.#runtime.joinNetwork) throw new RuntimeError('Not supported', { kind: 'bad_request' });
    const network: JoinNetwork = {
      interface: request.interface === 1 ? 'inet' : 'vpn',
      networks: request.networks.map(({ addr, gateway, mask, ifAddr }) => ({ addr, gateway, mask, ifAddr })),
      hosts: { ...request.hosts },
    };
    return endpointInit(await this.#runtime.joinNetwork(this.#context, network));
  }

  // The end.

  async #stopFor(cause: StopCause): Promise<void> {
    if (cause.kind === 'failure' && this.#stopped === null) this.#complain(`Error: ${cause.message}`);
    this.#stopped ??= this.#stop();
    const problem = await this.#stopped;
    if (cause.kind === 'request') {
      const answer: ResponseInit['command'] =
        problem === null ? { case: 'shutdown', value: {} } : errorAnswer(new RuntimeError(problem));
      await this.#send({ id: cause.id, command: answer });
      // A stop that hangs will not get better by waiting for the input's end.
      if (problem !== null && !this.#inputEnded) this.#finish(1);
      return;
    }
    if (problem !== null) this.#complain(`Error: ${problem}`);
    if (cause.kind === 'signal') this.#finish(cause.exitCode);
    else this.#finish(cause.kind === 'failure' || problem !== null ? 1 : 0);
  }

  /** Resolves with what went wrong, or null. */
  async #stop(): Promise<string | null> {
    const windowMs = stopTimeoutOf(this.#runtime);
    this.#stopping.abort(new RuntimeError('the runtime is stopping'));
    const commands = [...this.#commands.values()];
    for (const command of commands) void command.kill(0);
    let problem: string | null = null;
    const stop = (async () => {
      try {
        await this.#runtime.stop?.(this.#context);
      } catch (error) {
        problem = `stop failed: ${RuntimeError.from(error).line}`;
      }
    })();
    const inTime = Promise.all([stop, ...this.#handlers]).then(() => true);
    const finished = await new Promise<boolean>((resolve) => {
      const timer = this.#clock.setTimer(() => resolve(false), windowMs);
      void inTime.then(() => {
        timer.cancel();
        resolve(true);
      });
    });
    if (!finished) {
      killAllPrograms();
      problem ??= `stop did not finish within ${windowMs} ms`;
    }
    for (const command of this.#commands.values()) await command.forceEnd();
    return problem;
  }
}

type EndpointInit = Extract<ResponseInit['command'], { case: 'network' }>['value']['endpoint'];

function pidOf(pid: Pid): bigint {
  const valid = typeof pid === 'bigint' ? pid >= 0n && pid <= MAX_PID : Number.isSafeInteger(pid) && pid >= 0;
  if (!valid) throw new RuntimeError(`a pid must be a whole number from 0 to 2^64-1, got ${String(pid)}`);
  return BigInt(pid);
}

function errorAnswer(error: unknown): ResponseInit['command'] {
  const { kind, message, context } = RuntimeError.from(error);
  return { case: 'error', value: { code: WIRE_ERROR[kind], message, context: { ...context } } };
}

function endpointInit(endpoint: NetworkEndpoint): EndpointInit {
  const [name = '', value = ''] = Object.entries(endpoint)[0] ?? [];
  switch (name) {
    case 'unixStream':
    case 'unixDatagram':
    case 'udpDatagram':
    case 'tcpListener':
    case 'tcpStream':
      return { case: name, value };
    default:
      throw new RuntimeError(`joinNetwork must return an endpoint, got ${JSON.stringify(endpoint)}`);
  }
}
