/**
 * One worker thread with a runner module loaded, from the engine's side.
 *
 *     loading ──loaded──▶ idle ◀──settled── running
 *        │                  │                  │
 *        └──────────────────┴──────────────────┴──▶ gone   (the thread's exit event; nothing comes after it)
 *
 * - `loading`: fails with an error that names the module; the thread is gone by the time it is told.
 * - `running`: ends with `settled`, after which the thread is used again, or with the thread. The first cause
 *   of an ending (abort, limit, stray error, exit, what `run` rejected with) is the one told. A task that was
 *   aborted and does not settle within the grace, that broke a limit or threw outside of `run` ends by
 *   termination, and `run` here rejects only when the exit event has come.
 * - `tainted` is a flag on idle and running: something an earlier task left behind went wrong. Such a thread
 *   finishes what it does and is put away.
 */
import { MessageChannel, Worker } from 'node:worker_threads';
import { MillraceError, TaskAbort } from '@millrace/runner';
import type { Clock, JsonObject, Logger, TaskContext, Timer } from '@millrace/runner';
import type { ThreadLimits } from '../thread-runner.ts';
import { ContextHost, abortOf } from './context-host.ts';
import { HEADROOM_MIB, HeapGuard } from './heap-watch.ts';
import type { HeapWatch } from './heap-watch.ts';
import { FLAG } from './protocol.ts';
import type { ThreadData, ToEngine, ToThread, TokenAnswer, TokenRequest } from './protocol.ts';
import { ThreadMeter } from './thread-meter.ts';
import { decodeError, encodeError } from './wire-error.ts';

/** Output kept outside of tasks: while loading, and of what tasks left behind. */
const STRAY_LOG_BYTES = 64 * 1024;

export interface RunnerThreadOptions {
  readonly module: string;
  readonly loader: ThreadData['loader'];
  readonly lendsContract: boolean;
  readonly env: Readonly<Record<string, string>>;
  readonly limits: ThreadLimits;
  readonly clock: Clock;
  readonly log: Logger | undefined;
  readonly heapWatch: HeapWatch | null;
  /** Called once, when the thread has ended for whatever reason. */
  readonly onGone: (thread: RunnerThread) => void;
}

/** The task that runs now. */
interface Current {
  readonly task: number;
  readonly ctx: TaskContext;
  readonly host: ContextHost;
  /** What ends it whatever the module says. The first one stays. */
  cause: Error | null;
  grace: Timer | null;
  /** CPU time of the thread when it began. */
  readonly cpuBefore: number | null;
  /** The thread is done with it, or is itself gone. */
  finish(failure: Error | null): void;
}

export class RunnerThread {
  /** As the module's default export says. Set once loaded. */
  capability = '';
  readonly #options: RunnerThreadOptions;
  readonly #worker: Worker;
  readonly #port: MessageChannel['port1'];
  readonly #tokens: MessageChannel['port1'];
  readonly #flags = new Int32Array(new SharedArrayBuffer(2 * Int32Array.BYTES_PER_ELEMENT));
  readonly #heap: HeapGuard | null;
  #meter = new ThreadMeter(null);
  /** Of the thread, when it was last looked at: it cannot be once it is gone. */
  #cpuMs: number | null = null;
  readonly #gone: Promise<void>;
  #ended = false;
  #killed = false;
  #tainted = false;
  #lastTask = 0;
  #current: Current | null = null;
  #load: { loaded(): void; failed(error: Error): void } | null = null;
  #closing: (() => void) | null = null;
  /** Why the thread will be gone, where it said so before it went. */
  #fatal: Error | null = null;

  /**
   * Starts a thread and loads the module in it.
   *
   * @throws what is wrong with the module, without its name, or the signal's TaskAbort; the thread is gone by
   * then
   */
  static async start(options: RunnerThreadOptions, signal: AbortSignal): Promise<RunnerThread> {
    const thread = new RunnerThread(options);
    const { clock, limits } = options;
    const limit = clock.setTimer(() => {
      const message = `did not finish loading within loadMs, ${limits.loadMs} ms`;
      thread.#end(
        new MillraceError('deadline_exceeded', message, {
          details: { limit: 'loadMs', value: limits.loadMs },
        }),
      );
    }, limits.loadMs);
    let grace: Timer | null = null;
    // Loading is let finish where it does so soon: terminating a thread while it starts is where V8 has
    // crashed.
    const onAbort = (): void => {
      grace = clock.setTimer(() => thread.#end(abortOf(signal)), limits.graceMs);
    };
    signal.addEventListener('abort', onAbort, { once: true });
    thread.#heap?.start();
    try {
      await new Promise<void>((loaded, failed) => {
        thread.#load = { loaded, failed };
      });
      if (signal.aborted) throw abortOf(signal);
    } catch (error) {
      await thread.kill();
      throw error;
    } finally {
      thread.#heap?.stop();
      thread.#load = null;
      limit.cancel();
      (grace as Timer | null)?.cancel();
      signal.removeEventListener('abort', onAbort);
    }
    return thread;
  }

  private constructor(options: RunnerThreadOptions) {
    this.#options = options;
    const main = new MessageChannel();
    const token = new MessageChannel();
    this.#port = main.port1;
    this.#tokens = token.port1;
    const data: ThreadData = {
      module: options.module,
      loader: options.loader,
      lendsContract: options.lendsContract,
      strayLogBytes: STRAY_LOG_BYTES,
      ports: { main: main.port2, token: token.port2, flags: this.#flags },
    };
    const { memoryMiB } = options.limits;
    // The name of the compiled file on purpose: a string is not rewritten when this is compiled, and a worker
    // starts from what was.
    this.#worker = new Worker(new URL('./worker.js', import.meta.url), {
      name: 'millrace-runner',
      workerData: data,
      transferList: [main.port2, token.port2],
      env: options.env,
      argv: [],
      execArgv: [],
      stdin: false,
      stdout: true,
      stderr: true,
      resourceLimits: {
        maxOldGenerationSizeMb: memoryMiB + (options.heapWatch === null ? 0 : HEADROOM_MIB),
      },
    });
    // Output is taken inside the thread. What gets past that is not the node's to print.
    this.#worker.stdout.resume();
    this.#worker.stderr.resume();
    this.#heap =
      options.heapWatch &&
      new HeapGuard({
        watch: options.heapWatch,
        thread: this.#worker.threadId,
        limitMiB: memoryMiB,
        clock: options.clock,
        onBreach: (liveMiB) => this.#end(outOfMemory(memoryMiB, `${Math.ceil(liveMiB)} MiB are in use`)),
      });
    this.#gone = new Promise((resolve) => {
      this.#worker.once('exit', (code) => {
        this.#onExit(code);
        resolve();
      });
    });
    this.#worker.on('error', (error) => {
      const { code } = error as NodeJS.ErrnoException;
      this.#fatal ??=
        code === 'ERR_WORKER_OUT_OF_MEMORY'
          ? outOfMemory(memoryMiB, 'it asked for more')
          : decodeError(encodeError(error));
    });
    this.#port.on('message', (message: ToEngine) => this.#receive(message));
    this.#tokens.on('message', (request: TokenRequest) => this.#answerToken(request));
  }

  /** Ready for the next task. */
  get usable(): boolean {
    return !this.#ended && !this.#killed && !this.#tainted && this.#current === null;
  }

  /**
   * Performs one attempt. Not concurrent. Resolves and rejects as the contract of Runner says, and rejects
   * with the cause when the task was ended from outside: the TaskAbort of the context's signal, or a
   * MillraceError that names the limit.
   */
  run(ctx: TaskContext): Promise<void> {
    // It may have aborted while the thread was being found.
    if (ctx.signal.aborted) return Promise.reject(abortOf(ctx.signal));
    const { limits, clock, log } = this.#options;
    const task = ++this.#lastTask;
    const host = new ContextHost(ctx, task, (message, transfer) => this.#post(message, transfer), log);
    return new Promise<void>((resolve, reject) => {
      const onAbort = (): void => this.#abort(current, abortOf(ctx.signal), abortOf(ctx.signal));
      const wall = clock.setTimer(() => {
        const message = `the task ran longer than the limit wallMs, ${limits.wallMs} ms`;
        const details = { limit: 'wallMs', value: limits.wallMs };
        const cause = new MillraceError('deadline_exceeded', message, { details });
        this.#abort(current, cause, new TaskAbort('deadline', message));
      }, limits.wallMs);
      const current: Current = {
        task,
        ctx,
        host,
        cause: null,
        grace: null,
        cpuBefore: this.#readCpu(),
        finish: (failure) => {
          this.#current = null;
          const usage = this.#usage(current);
          wall.cancel();
          current.grace?.cancel();
          ctx.signal.removeEventListener('abort', onAbort);
          this.#heap?.stop();
          void host
            .close()
            // A context that has ended has nobody to tell.
            .then(() => ctx.ctrl.usage?.(usage).catch(() => undefined))
            .then(() => {
              const error = current.cause ?? failure;
              if (error === null) resolve();
              else reject(error);
            }, reject);
        },
      };
      this.#current = current;
      ctx.signal.addEventListener('abort', onAbort, { once: true });
      this.#heap?.start();
      this.#post({ t: 'run', task, lease: ctx.lease, logBytes: limits.logBytes });
    });
  }

  /** Ends the thread at once. A task that runs rejects with `cause`. Resolves when the thread is gone. */
  async kill(cause?: Error): Promise<void> {
    if (cause && this.#current) this.#current.cause ??= cause;
    if (!this.#killed && !this.#ended) {
      this.#killed = true;
      this.#readCpu();
      // Terminating interrupts JavaScript and WebAssembly anywhere; native code has to return first, and may
      // not.
      const { clock, limits, log } = this.#options;
      const late = clock.setTimer(
        () => log?.error('a runner thread does not end: native code in it does not return', this.#fields()),
        limits.graceMs,
        { unref: true },
      );
      await this.#worker.terminate();
      late.cancel();
    }
    await this.#gone;
  }

  /** Lets an idle thread's module close what it holds, within the grace, then ends the thread. */
  async close(): Promise<void> {
    if (!this.#ended && !this.#killed && this.#current === null) {
      this.#tainted = true;
      await new Promise<void>((resolve) => {
        const timer = this.#options.clock.setTimer(() => {
          this.#options.log?.warn('a runner module did not close in time', this.#fields());
          resolve();
        }, this.#options.limits.graceMs);
        this.#closing = () => {
          timer.cancel();
          resolve();
        };
        this.#post({ t: 'close' });
      });
    }
    await this.kill();
  }

  /** The newest known. */
  #readCpu(): number | null {
    this.#cpuMs = this.#meter.cpuMs() ?? this.#cpuMs;
    return this.#cpuMs;
  }

  /** What the task used, for the node. It is the thread's that has it for itself. */
  #usage({ cpuBefore }: Current): JsonObject {
    const cpuMs = this.#readCpu();
    return {
      cpu_ms: cpuMs === null || cpuBefore === null ? null : Math.round((cpuMs - cpuBefore) * 1000) / 1000,
      peak_memory_bytes: this.#heap?.peakBytes ?? null,
    };
  }

  /** Tells the module to stop, and stops it after the grace. */
  #abort(current: Current, cause: Error, told: TaskAbort): void {
    if (this.#current !== current || current.cause !== null) return;
    current.cause = cause;
    this.#post({ t: 'abort', task: current.task, reason: told.reason, message: told.message });
    // After the message, so that who sees the flag can wait for the message.
    Atomics.store(this.#flags, FLAG.abortedTask, current.task);
    current.grace = this.#options.clock.setTimer(() => void this.kill(), this.#options.limits.graceMs);
  }

  /** Ends the thread for a reason of its own; a task that runs, or the loading, fails with it. */
  #end(cause: Error): void {
    this.#fatal ??= cause;
    void this.kill(cause);
  }

  #receive(message: ToEngine): void {
    const current = this.#current;
    switch (message.t) {
      case 'loaded':
        this.capability = message.capability;
        this.#meter = new ThreadMeter(message.thread);
        this.#load?.loaded();
        return;
      case 'load-failed':
        this.#load?.failed(this.#fatal ?? decodeError(message.error));
        return;
      case 'stray':
        this.#onStray(message);
        return;
      case 'settled':
        if (current?.task !== message.task || this.#killed) return;
        current.finish(message.error === null ? null : decodeError(message.error));
        return;
      case 'closed':
        if (message.error) {
          const fields = { ...this.#fields(), error: message.error.message };
          this.#options.log?.warn('a runner module failed to close', fields);
        }
        this.#closing?.();
        return;
      case 'notes':
        if (message.task === null) {
          for (const note of message.notes) {
            if (note.kind !== 'log') continue;
            this.#options.log?.info('output of a runner module outside of a task', {
              ...this.#fields(),
              ...note.fields,
              line: note.message,
            });
          }
          return;
        }
        if (current?.task === message.task) current.host.handle(message);
        return;
      case 'call':
        if (current?.task === message.task) current.host.handle(message);
        return;
      case 'cancel':
      case 'chunk':
      case 'end':
      case 'fail':
      case 'credit':
      case 'stop':
        current?.host.handle(message);
        return;
    }
  }

  #onStray({ task, error }: Extract<ToEngine, { t: 'stray' }>): void {
    const thrown = decodeError(error);
    if (this.#load) {
      this.#end(thrown);
      return;
    }
    const current = this.#current;
    if (current && (task === null || task === current.task)) {
      this.#end(thrown);
      return;
    }
    this.#tainted = true;
    this.#options.log?.warn('a runner module threw after its task had ended; its thread is replaced', {
      ...this.#fields(),
      error: error.message,
      ...(error.stack === null ? {} : { stack: error.stack }),
    });
    if (current === null && !this.#closing) void this.kill();
  }

  #onExit(code: number): void {
    this.#ended = true;
    this.#meter[Symbol.dispose]();
    this.#port.close();
    this.#tokens.close();
    const reason =
      this.#fatal ??
      new MillraceError(
        'internal',
        `the module ended its own thread with process.exit(${code}); it should return from run instead`,
      );
    this.#load?.failed(reason);
    this.#closing?.();
    this.#current?.finish(reason);
    if (!this.#killed && this.#current === null && !this.#load) {
      this.#options.log?.warn('a runner thread ended by itself', {
        ...this.#fields(),
        error: reason.message,
      });
    }
    this.#options.onGone(this);
  }

  #answerToken({ task }: TokenRequest): void {
    let answer: TokenAnswer;
    try {
      const current = this.#current;
      if (current?.task !== task) {
        throw new MillraceError('failed_precondition', 'the task has ended; its ports are closed');
      }
      answer = { token: current.ctx.accessToken.get() };
    } catch (error) {
      answer = { error: encodeError(error) };
    }
    this.#tokens.postMessage(answer, []);
    Atomics.add(this.#flags, FLAG.tokenAnswers, 1);
    Atomics.notify(this.#flags, FLAG.tokenAnswers);
  }

  #post(message: ToThread, transfer: readonly ArrayBuffer[] = []): void {
    if (!this.#ended) this.#port.postMessage(message, transfer);
  }

  #fields(): { thread: number } {
    return { thread: this.#worker.threadId };
  }
}

function outOfMemory(memoryMiB: number, what: string): MillraceError {
  return new MillraceError(
    'resource_exhausted',
    `the JavaScript heap of the runner's thread is limited to memoryMiB, ${memoryMiB} MiB, and ${what}`,
    { details: { limit: 'memoryMiB', value: memoryMiB } },
  );
}
