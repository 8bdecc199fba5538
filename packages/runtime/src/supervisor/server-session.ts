/**
 * A runtime in server mode, from the start of its process to its end.
 *
 * Output belongs to the command whose pid it names, by the pid in the answer to its run. Events of a pid that no answer has
 * named yet are held while an answer is outstanding; output of any other pid belongs to Start until that is done, and then to
 * nobody. What follows a command's end is dropped.
 */
import {
  MillraceError,
  describeError,
  truncateUtf8,
  type Clock,
  type Logger,
  type Timer,
} from '@millrace/runner';
import type { SupervisorLimits } from './limits.ts';
import { outputExceeded } from './one-shot.ts';
import { within, type GroupProcess, type ActivityProcesses } from './activity-processes.ts';
import {
  openCaptures,
  type Captures,
  type CommandOptions,
  type CommandResult,
  type RunningCommand,
} from './running-command.ts';
import { WireClient, type RuntimeStatusEvent, type StatusEvent, type TracedFrame } from './wire-client.ts';

const SIGTERM = 15;
const SIGKILL = 9;
/** Frames that were written before the exit are waited for this long; a child of the runtime may hold the pipe for ever. */
const DRAIN_MS = 1_000;
/** The end of the runtime's own stderr, for the error that tells of its death. */
const STDERR_TAIL_BYTES = 4_096;
/** Events held for pids that no answer has named. */
const MAX_HELD_BYTES = 16 * 1024 * 1024;
const HELD_EVENT_BYTES = 64;
/** Pids that have ended, remembered so that late events of theirs are known as such. */
const MAX_ENDED_PIDS = 10_000;

export interface SessionOptions {
  readonly file: string;
  readonly args: readonly string[];
  readonly cwd: string;
  readonly env: Readonly<Record<string, string>>;
  readonly processes: ActivityProcesses;
  readonly clock: Clock;
  readonly limits: SupervisorLimits;
  readonly protocol: string;
  /** For the Start command. */
  readonly command: CommandOptions;
  readonly log: Logger | undefined;
  readonly onFrame: ((frame: TracedFrame) => void) | undefined;
  readonly onRuntimeStatus: (event: RuntimeStatusEvent) => void;
  /** Output of no command; pid null: the runtime's own stderr. */
  readonly onOutput: (pid: bigint | null, stream: 'stdout' | 'stderr', chunk: Uint8Array) => void;
}

interface RunRequest {
  readonly bin: string;
  readonly args: readonly string[];
}

export class ServerSession {
  readonly #options: SessionOptions;
  readonly #limits: SupervisorLimits;
  readonly #clock: Clock;
  readonly #process: GroupProcess;
  readonly #client: WireClient;
  readonly #commands = new Map<bigint, ServerCommand>();
  readonly #ended = new Set<bigint>();
  /** Runs whose answer is outstanding. */
  #unanswered = 0;
  readonly #held = new Map<bigint, StatusEvent[]>();
  #heldBytes = 0;
  #stderrTail = Buffer.alloc(0);
  /** Where output of unknown pids goes while Start is under way. */
  #starting: ServerCommand | null;
  #stopReason: MillraceError | null = null;
  /** Its output ended inside a frame. */
  #cut: MillraceError | null = null;
  /** Resolves when the process has ended and its last frames were read. */
  readonly #gone: Promise<void>;
  #stopped: Promise<void> | null = null;
  #ending: Promise<void> | null = null;

  /** Starts the runtime and waits for its hello. On any failure nothing of it is left. */
  static async start(
    options: SessionOptions,
  ): Promise<{ readonly session: ServerSession; readonly result: CommandResult }> {
    options.command.signal?.throwIfAborted();
    const child = await options.processes.spawn({ ...options, stdio: ['pipe', 'pipe', 'pipe'] });
    const session = new ServerSession(options, child);
    const { signal } = options.command;
    const onAbort = (): void => session.#client.fail(signal?.reason);
    signal?.addEventListener('abort', onAbort, { once: true });
    try {
      await session.#client.call('hello', { version: options.protocol }, options.limits.startMs);
      const result = session.#starting!.outcome(0);
      session.#starting = null;
      return { session, result };
    } catch (error) {
      await child.end(options.limits.killGraceMs);
      await session.#gone;
      throw error;
    } finally {
      signal?.removeEventListener('abort', onAbort);
    }
  }

  private constructor(options: SessionOptions, child: GroupProcess) {
    this.#options = options;
    this.#limits = options.limits;
    this.#clock = options.clock;
    this.#process = child;
    this.#starting = new ServerCommand(null, options.command, options.limits, () => {
      this.#client.fail(outputExceeded(options.limits.outputBytes));
    });
    const { stdin, stdout, stderr } = child.child;
    let outputEnded!: () => void;
    const drained = new Promise<void>((resolve) => {
      outputEnded = resolve;
    });
    this.#client = new WireClient({
      fromRuntime: stdout!,
      toRuntime: stdin!,
      clock: options.clock,
      maxFrameBytes: options.limits.maxFrameBytes,
      ...(options.onFrame ? { onFrame: options.onFrame } : {}),
      onStatus: (event) => this.#onStatus(event),
      onRuntimeStatus: options.onRuntimeStatus,
      onStray: (what) => options.log?.debug('ignored a frame of a runtime', { what }),
      onBroken: (error) => {
        outputEnded();
        this.#onBroken(error);
      },
    });
    stderr!.on('data', (chunk: Buffer) => this.#onStderr(chunk));
    stderr!.on('error', () => undefined);
    this.#gone = child.exited.then(async (exit) => {
      await within(options.clock, drained, DRAIN_MS);
      for (const stream of [stdin!, stdout!, stderr!]) stream.destroy();
      const how = exit.signal === null ? `exited with code ${exit.code}` : `was ended by ${exit.signal}`;
      const words = `the runtime ${how}${this.#lastWords()}`;
      this.#failAll(
        this.#stopReason ??
          (this.#cut === null
            ? new MillraceError('unavailable', words)
            : new MillraceError('data_loss', `${this.#cut.message}; ${words}`, { cause: this.#cut.cause })),
      );
    });
  }

  async spawn(request: RunRequest, options: CommandOptions): Promise<RunningCommand> {
    const command: ServerCommand = new ServerCommand(this, options, this.#limits, (reason) => {
      void this.#kill(command, reason);
    });
    const answered = this.#client.call(
      'run',
      { bin: request.bin, args: [...request.args] },
      this.#limits.answerMs,
    );
    const onAbort = (): void => void this.#expectAnswer(answered);
    options.signal?.addEventListener('abort', onAbort, { once: true });
    this.#unanswered += 1;
    try {
      const { pid } = await answered;
      if (this.#commands.has(pid) || this.#ended.has(pid)) {
        throw new MillraceError('data_loss', `the runtime gave the pid ${pid} to two commands`);
      }
      command.pid = pid;
      // Answered while the runtime was being stopped already.
      if (this.#stopReason !== null) command.abandon(this.#stopReason);
      this.#commands.set(pid, command);
      this.#release(pid);
    } catch (error) {
      options.signal?.throwIfAborted();
      throw error;
    } finally {
      options.signal?.removeEventListener('abort', onAbort);
      this.#unanswered -= 1;
      // Nothing is left that could name the others.
      if (this.#unanswered === 0) for (const other of this.#held.keys()) this.#release(other);
    }
    command.begin(this.#clock);
    return command;
  }

  /** For a run that is to end before it was answered: it cannot be killed without its pid. */
  async #expectAnswer(answered: Promise<unknown>): Promise<void> {
    if (await within(this.#clock, answered, this.#limits.killGraceMs)) return;
    await this.stop(
      new MillraceError(
        'unavailable',
        'the runtime was stopped, since it did not answer a run that was to end',
      ),
    );
  }

  /** Shutdown, the stop window, end of input, a moment, SIGTERM, SIGKILL. Resolves when the process is gone. */
  stop(reason: MillraceError): Promise<void> {
    this.#stopped ??= this.#stop(reason);
    return this.#stopped;
  }

  async #stop(reason: MillraceError): Promise<void> {
    this.#stopReason ??= reason;
    for (const command of this.#commands.values()) command.abandon(reason);
    if (!this.#process.hasExited) {
      await this.#client.call('shutdown', {}, this.#limits.stopMs).catch((error: unknown) => {
        this.#options.log?.warn('a runtime did not stop cleanly', { error: describeError(error) });
      });
      this.#process.child.stdin!.end();
      await within(this.#clock, this.#process.exited, this.#limits.exitMs);
    }
    await this.#endProcess();
    await this.#gone;
  }

  /** What still runs of it is ended. Never rejects: a process that survives SIGKILL is told in the log. */
  #endProcess(): Promise<void> {
    this.#ending ??= this.#process.end(this.#limits.killGraceMs).catch((error: unknown) => {
      this.#options.log?.error('a runtime could not be ended', { error: describeError(error) });
    });
    return this.#ending;
  }

  /** Ends a command: the runtime's kill, twice, and the runtime itself when that does not help. */
  async #kill(command: ServerCommand, reason: unknown): Promise<void> {
    const pid = command.pid!;
    for (const signal of [SIGTERM, SIGKILL]) {
      try {
        await this.#client.call('kill', { pid, signal }, this.#limits.killGraceMs);
      } catch {
        // It cannot kill, or knows the command no more; both show in whether it ends.
        if (command.ended) return;
        break;
      }
      if (await within(this.#clock, command.settled, this.#limits.killGraceMs)) return;
    }
    if (command.ended) return;
    this.#options.log?.warn('a runtime did not end a command and is stopped', {
      reason: describeError(reason),
    });
    await this.stop(
      new MillraceError('unavailable', 'the runtime was stopped, since it did not end a command'),
    );
  }

  async killByNumber(pid: bigint, signal: number): Promise<void> {
    await this.#client.call('kill', { pid, signal }, this.#limits.answerMs);
  }

  #onStatus(event: StatusEvent): void {
    const command = this.#commands.get(event.pid);
    if (command) this.#deliver(command, event);
    else if (this.#ended.has(event.pid))
      this.#options.log?.debug('ignored output after the end of a command', {});
    else if (this.#unanswered > 0) this.#hold(event);
    else this.#deliverUnknown(event);
  }

  #deliver(command: ServerCommand, event: StatusEvent): void {
    command.take('stdout', event.stdout);
    command.take('stderr', event.stderr);
    if (event.running) return;
    this.#commands.delete(event.pid);
    this.#ended.add(event.pid);
    if (this.#ended.size > MAX_ENDED_PIDS) {
      const [oldest] = this.#ended;
      this.#ended.delete(oldest!);
    }
    command.end(event.returnCode);
  }

  #deliverUnknown(event: StatusEvent): void {
    for (const stream of ['stdout', 'stderr'] as const) {
      if (event[stream].length === 0) continue;
      if (this.#starting) this.#starting.take(stream, event[stream]);
      else this.#options.onOutput(event.pid, stream, event[stream]);
    }
  }

  #hold(event: StatusEvent): void {
    this.#heldBytes += heldSize(event);
    if (this.#heldBytes > MAX_HELD_BYTES) {
      this.#onBroken(
        new MillraceError(
          'resource_exhausted',
          `the runtime sent more than ${MAX_HELD_BYTES} bytes of events for commands it has not named`,
        ),
      );
      return;
    }
    const held = this.#held.get(event.pid);
    if (held) held.push(event);
    else this.#held.set(event.pid, [event]);
  }

  #release(pid: bigint): void {
    const held = this.#held.get(pid) ?? [];
    this.#held.delete(pid);
    for (const event of held) {
      this.#heldBytes -= heldSize(event);
      this.#onStatus(event);
    }
  }

  #onStderr(chunk: Buffer): void {
    this.#stderrTail = Buffer.from(Buffer.concat([this.#stderrTail, chunk]).subarray(-STDERR_TAIL_BYTES));
    this.#options.onOutput(null, 'stderr', chunk);
  }

  /** Nothing more can be believed of its output, so nothing more is expected of it. */
  #onBroken(error: MillraceError): void {
    // The end of its output is how every exit looks from here; the exit itself says more.
    if (error.code === 'unavailable' || this.#process.child.stdout!.readableEnded) {
      if (error.code !== 'unavailable') this.#cut ??= error;
      void this.#endUnlessExited(error);
      return;
    }
    this.#failAll(error);
  }

  async #endUnlessExited(error: MillraceError): Promise<void> {
    if (await within(this.#clock, this.#process.exited, DRAIN_MS)) return;
    this.#failAll(this.#stopReason ?? error);
  }

  #failAll(reason: MillraceError): void {
    this.#stopReason ??= reason;
    this.#client.fail(reason);
    const commands = [...this.#commands.values()];
    this.#commands.clear();
    // Commands are reported as over when nothing of their runtime is left: until then they may still work.
    void this.#endProcess().finally(() => {
      for (const command of commands) command.fail(reason);
    });
  }

  #lastWords(): string {
    const text = truncateUtf8(this.#stderrTail.toString('utf8').trim(), 1_000);
    return text === '' ? '' : `; its last words: ${text}`;
  }
}

function heldSize(event: StatusEvent): number {
  return HELD_EVENT_BYTES + event.stdout.length + event.stderr.length;
}

/** One command of a session. */
class ServerCommand implements RunningCommand {
  pid: bigint | null = null;
  readonly result: Promise<CommandResult>;
  /** Resolves when the result has settled. */
  readonly settled: Promise<void>;
  ended = false;
  readonly #session: ServerSession | null;
  readonly #options: CommandOptions;
  readonly #limits: SupervisorLimits;
  readonly #cancel: (reason: unknown) => void;
  readonly #captures: Captures;
  #resolve!: (result: CommandResult) => void;
  #reject!: (error: unknown) => void;
  #bytes = 0;
  #timer: Timer | null = null;
  #canceled: { readonly reason: unknown } | null = null;
  readonly #onAbort = (): void => this.cancel(this.#options.signal?.reason);

  /** @param cancel ends the command in the runtime */
  constructor(
    session: ServerSession | null,
    options: CommandOptions,
    limits: SupervisorLimits,
    cancel: (reason: unknown) => void,
  ) {
    this.#session = session;
    this.#options = options;
    this.#limits = limits;
    this.#cancel = cancel;
    this.#captures = openCaptures(options.capture, limits.captureBytes);
    this.result = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
    this.settled = this.result.then(
      () => undefined,
      () => undefined,
    );
  }

  /** Its time runs. */
  begin(clock: Clock): void {
    if (this.ended) return;
    const { runMs } = this.#limits;
    this.#timer = clock.setTimer(
      () =>
        this.cancel(
          new MillraceError('deadline_exceeded', `the command did not end within runMs of ${runMs} ms`, {
            details: { limit: 'runMs', value: runMs },
          }),
        ),
      runMs,
    );
    this.#options.signal?.addEventListener('abort', this.#onAbort, { once: true });
    if (this.#options.signal?.aborted) this.#onAbort();
  }

  async kill(signal: number): Promise<void> {
    await this.#session!.killByNumber(this.pid!, signal);
  }

  /** Ends it; the first reason is what `result` rejects with, once it is gone. */
  cancel(reason: unknown): void {
    if (this.#canceled !== null || this.ended) return;
    this.#canceled = { reason };
    this.#cancel(reason);
  }

  /** It ends with its runtime, for this reason. */
  abandon(reason: unknown): void {
    this.#canceled ??= { reason };
  }

  take(stream: 'stdout' | 'stderr', chunk: Uint8Array): void {
    if (chunk.length === 0 || this.#canceled !== null) return;
    this.#bytes += chunk.length;
    if (this.#bytes > this.#limits.outputBytes) {
      this.cancel(outputExceeded(this.#limits.outputBytes));
      return;
    }
    this.#captures[stream].push(chunk);
    this.#options.onOutput?.(stream, chunk);
  }

  end(exitCode: number): void {
    if (this.#canceled === null) this.#resolve(this.outcome(exitCode));
    else this.#reject(this.#canceled.reason);
    this.#finish();
  }

  fail(error: unknown): void {
    this.#reject(this.#canceled === null ? error : this.#canceled.reason);
    this.#finish();
  }

  outcome(exitCode: number): CommandResult {
    return { exitCode, stdout: this.#captures.stdout.result(), stderr: this.#captures.stderr.result() };
  }

  #finish(): void {
    this.ended = true;
    this.#timer?.cancel();
    this.#options.signal?.removeEventListener('abort', this.#onAbort);
  }
}
