/**
 * A runner module in worker threads, as a {@link Runner}.
 *
 * A thread isolates faults and time: a module that throws, spins, leaks or exits ends as one failed task, and
 * the node's own thread keeps its leases. It does not isolate hostile code. A thread shares the process with
 * the node: it can read what the process can read, `process.kill` and a crash in native code end all of it,
 * and memory outside of the JavaScript heap (ArrayBuffers) has no limit of its own. Run code you do not trust
 * as a subprocess, a container or a compute.
 *
 * Each thread has its own instance of the module, performs one task at a time and keeps the module's state
 * from one task to the next. It is replaced when it had to be terminated, ended itself, or threw outside of
 * `run`; a `run` that rejects costs no thread.
 */
import { stat } from 'node:fs/promises';
import { existsSync } from 'node:fs';
import { dirname, extname, join, resolve } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { MillraceError, TaskAbort, checkCapability, systemClock } from '@millrace/runner';
import type { Clock, Logger, Runner, TaskContext, Timer } from '@millrace/runner';
import { abortOf } from './thread/context-host.ts';
import { taskEnvironment } from './thread/environment.ts';
import { lacksContract } from './thread/contract-fallback.ts';
import { HeapWatch } from './thread/heap-watch.ts';
import { loadProblem } from './thread/load-problem.ts';
import type { ThreadData } from './thread/protocol.ts';
import { RunnerThread } from './thread/runner-thread.ts';

export interface ThreadRunnerOptions {
  /**
   * Path (relative to the working directory) or file URL of a module (`.js`, `.mjs`, `.cjs`, `.ts`, `.mts`,
   * `.cts`) whose default export is a Runner. TypeScript is compiled on the fly, with the tsconfig.json
   * nearest to the module.
   */
  readonly module: string | URL;
  /** Replaces the module's own capability. */
  readonly capability?: string;
  readonly limits?: Partial<ThreadLimits>;
  /**
   * Threads kept loaded and ready, 1 to 1024. Default 1. More are started when tasks run at the same time.
   */
  readonly warm?: number;
  /** Idle threads beyond `warm` are closed after this long. Default 60,000 ms. */
  readonly idleMs?: number;
  /**
   * Environment variables granted to the module. It sees these, and of the node's own only the harmless ones:
   * PATH, HOME, locale, time zone, temporary folder, NODE_ENV. Default none.
   */
  readonly env?: Readonly<Record<string, string>>;
  /**
   * Hears of what belongs to no task: threads that ended by themselves, late errors, output outside of tasks.
   */
  readonly log?: Logger;
  readonly clock?: Clock;
}

/** Every limit is on by default; a breach fails the task with an error that names limit and value. */
export interface ThreadLimits {
  /**
   * JavaScript heap that stays in use after a garbage collection, 8 to 65,536 MiB. Default 512 MiB. Looked at
   * ten times a second, also in a thread that never yields; a breach is `resource_exhausted`. A single
   * built-in call that takes more than another GiB before it returns is the one way past it, and ends the
   * process.
   */
  readonly memoryMiB: number;
  /**
   * From start to settling. Default 24 h. The signal aborts with `deadline`; the task fails with
   * `deadline_exceeded`.
   */
  readonly wallMs: number;
  /** From starting a thread to its module being ready. Default 30 s. `deadline_exceeded`. */
  readonly loadMs: number;
  /** From the abort signal to termination. Default 5 s. */
  readonly graceMs: number;
  /** stdout and stderr kept per task, in bytes; what was dropped is counted and told once. Default 1 MiB. */
  readonly logBytes: number;
}

export const DEFAULT_THREAD_LIMITS: ThreadLimits = {
  memoryMiB: 512,
  wallMs: 24 * 60 * 60 * 1000,
  loadMs: 30_000,
  graceMs: 5_000,
  logBytes: 1024 * 1024,
};

/** A Runner that owns threads. */
export interface ThreadRunner extends Runner, AsyncDisposable {
  /**
   * Ends all threads: modules of idle ones get the grace to `close`, tasks that still run reject with a
   * TaskAbort `shutdown`. Resolves when every thread is gone. Harmless when repeated.
   */
  close(): Promise<void>;
}

const EXTENSIONS: Readonly<Record<string, 'node' | 'tsx'>> = {
  '.js': 'node',
  '.mjs': 'node',
  '.cjs': 'node',
  '.ts': 'tsx',
  '.mts': 'tsx',
  '.cts': 'tsx',
};
const DEFAULT_IDLE_MS = 60_000;

/**
 * Loads the module in a thread, checks that its default export is a Runner, and keeps that thread ready.
 *
 * `run` may be called concurrently; each call has a thread to itself. It rejects with
 * - what the module threw: its message, name, code, causes and stack (with the lines of the .ts file);
 * - the TaskAbort of `ctx.signal`, once the module has settled or its thread is gone;
 * - a MillraceError that names a limit and its value (`resource_exhausted`, `deadline_exceeded`);
 * - a MillraceError `internal` when the module ended its own thread;
 * - a MillraceError `failed_precondition` when it returned with an upload open.
 *
 * Outputs the module did not await are awaited before `run` resolves; a failure of one that nobody handles
 * is, like any unhandled error while the task runs, the task's failure. After the end it only costs the
 * thread.
 *
 * @throws MillraceError `invalid_argument` (bad option, not a module, syntax error with its line, no Runner
 * as default export, bad capability), `not_found` (no such file, missing import), `deadline_exceeded`
 * (loading), `resource_exhausted` (memory while loading). The message names the file and what to do.
 */
export async function openThreadRunner(options: ThreadRunnerOptions): Promise<ThreadRunner> {
  const path = await modulePath(options.module);
  const limits = checkLimits(options.limits ?? {});
  const warm = checkNumber('warm', options.warm ?? 1, 1, 1024);
  const idleMs = checkNumber('idleMs', options.idleMs ?? DEFAULT_IDLE_MS, 0, Number.MAX_SAFE_INTEGER);
  if (options.capability !== undefined) checkCapability(options.capability);
  const heapWatch = await HeapWatch.open();
  const pool = new ThreadPool({
    path,
    limits,
    warm,
    idleMs,
    heapWatch,
    env: taskEnvironment(process.env, options.env),
    clock: options.clock ?? systemClock,
    log: options.log?.child({ module: path }),
  });
  try {
    await pool.open(options.capability);
  } catch (error) {
    await pool.close();
    throw error;
  }
  return pool;
}

interface PoolOptions {
  readonly path: string;
  readonly limits: ThreadLimits;
  readonly warm: number;
  readonly idleMs: number;
  readonly env: Readonly<Record<string, string>>;
  readonly heapWatch: HeapWatch | null;
  readonly clock: Clock;
  readonly log: Logger | undefined;
}

interface Waiter {
  take(thread: RunnerThread): void;
  fail(error: unknown): void;
}

/**
 * The threads of one module. A task takes the idle thread used last, or waits for the first that is free, for
 * which a new one is started: whichever comes first.
 */
class ThreadPool implements ThreadRunner {
  readonly type = 'embedded';
  capability = '';
  readonly #options: PoolOptions;
  readonly #loader: ThreadData['loader'];
  readonly #lendsContract: boolean;
  /** What the module itself said; a thread that loads something else is refused. */
  #declared: string | null = null;
  readonly #threads = new Set<RunnerThread>();
  readonly #idle: { readonly thread: RunnerThread; readonly since: number }[] = [];
  readonly #waiters: Waiter[] = [];
  readonly #starts = new Set<Promise<void>>();
  /** Surplus threads being closed. */
  readonly #leaving = new Set<Promise<void>>();
  readonly #stopping = new AbortController();
  #reaper: Timer | null = null;
  #closed: Promise<void> | null = null;

  constructor(options: PoolOptions) {
    this.#options = options;
    this.#loader =
      EXTENSIONS[extname(options.path)] === 'tsx'
        ? { kind: 'tsx', tsconfig: nearestTsconfig(options.path) }
        : { kind: 'node' };
    this.#lendsContract = lacksContract(options.path);
  }

  /** Loads the first thread; the other warm ones follow by themselves. */
  async open(capability: string | undefined): Promise<void> {
    const thread = await this.#acquire(new AbortController().signal);
    this.capability = capability ?? thread.capability;
    this.#release(thread);
    this.#refill();
  }

  async run(ctx: TaskContext): Promise<void> {
    if (ctx.signal.aborted) throw abortOf(ctx.signal);
    const thread = this.#takeIdle() ?? (await this.#acquire(ctx.signal));
    try {
      await thread.run(ctx);
    } finally {
      this.#release(thread);
    }
  }

  close(): Promise<void> {
    this.#closed ??= this.#close();
    return this.#closed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #close(): Promise<void> {
    const abort = new TaskAbort('shutdown', 'the runner was closed');
    this.#stopping.abort(abort);
    this.#reaper?.cancel();
    for (const waiter of this.#waiters.splice(0)) waiter.fail(abort);
    const idle = this.#idle.splice(0).map(({ thread }) => thread);
    const busy = [...this.#threads].filter((thread) => !idle.includes(thread));
    await Promise.all([
      ...idle.map((thread) => thread.close()),
      ...busy.map((thread) => thread.kill(abort)),
      ...this.#starts,
      ...this.#leaving,
    ]);
    await HeapWatch.release();
  }

  #takeIdle(): RunnerThread | null {
    for (let entry = this.#idle.pop(); entry; entry = this.#idle.pop()) {
      // One that is being put away stays in the list until it is gone.
      if (entry.thread.usable) return entry.thread;
    }
    return null;
  }

  #acquire(signal: AbortSignal): Promise<RunnerThread> {
    return new Promise((resolve, reject) => {
      if (this.#stopping.signal.aborted) throw abortOf(this.#stopping.signal);
      const onAbort = (): void => {
        this.#waiters.splice(this.#waiters.indexOf(waiter), 1);
        reject(abortOf(signal));
      };
      const settled = (): void => signal.removeEventListener('abort', onAbort);
      const waiter: Waiter = {
        take: (thread) => {
          settled();
          resolve(thread);
        },
        fail: (error) => {
          settled();
          reject(error);
        },
      };
      signal.addEventListener('abort', onAbort, { once: true });
      this.#waiters.push(waiter);
      if (this.#starts.size < this.#waiters.length) this.#start();
    });
  }

  /** Hands a thread to who waits longest, keeps it ready, or puts it away when it cannot be used again. */
  #release(thread: RunnerThread): void {
    if (!thread.usable || this.#stopping.signal.aborted) {
      void thread.kill();
      return;
    }
    const waiter = this.#waiters.shift();
    if (waiter) waiter.take(thread);
    else {
      this.#idle.push({ thread, since: this.#options.clock.monotonic() });
      this.#reap();
    }
  }

  #start(): void {
    const start = this.#startOne().then(
      (thread) => {
        this.#starts.delete(start);
        this.#release(thread);
      },
      (error: unknown) => {
        this.#starts.delete(start);
        const waiter = this.#waiters.shift();
        if (waiter) waiter.fail(error);
        else if (!TaskAbort.is(error)) {
          this.#options.log?.error('could not start another thread for a runner module', {
            error: error instanceof Error ? error.message : String(error),
          });
        }
      },
    );
    this.#starts.add(start);
  }

  async #startOne(): Promise<RunnerThread> {
    const { path, env, limits, clock, log, heapWatch } = this.#options;
    try {
      const thread = await RunnerThread.start(
        {
          module: pathToFileURL(path).href,
          loader: this.#loader,
          lendsContract: this.#lendsContract,
          env,
          limits,
          clock,
          log,
          heapWatch,
          onGone: (gone) => this.#onGone(gone),
        },
        this.#stopping.signal,
      );
      this.#declared ??= thread.capability;
      if (thread.capability !== this.#declared) {
        await thread.kill();
        throw new MillraceError(
          'failed_precondition',
          `was changed on disk: its capability was ${this.#declared} and is now ${thread.capability}; open the runner again`,
        );
      }
      this.#threads.add(thread);
      return thread;
    } catch (error) {
      throw await loadProblem(path, error, env);
    }
  }

  #onGone(thread: RunnerThread): void {
    if (!this.#threads.delete(thread)) return;
    const at = this.#idle.findIndex((entry) => entry.thread === thread);
    if (at >= 0) this.#idle.splice(at, 1);
    this.#refill();
  }

  /**
   * Starts what is missing to have `warm` threads. A start that fails is not tried again before a task needs
   * it.
   */
  #refill(): void {
    if (this.#stopping.signal.aborted) return;
    for (let have = this.#threads.size + this.#starts.size; have < this.#options.warm; have += 1)
      this.#start();
  }

  /** Closes the threads beyond `warm` that have been idle longest, when their time has come. */
  #reap(): void {
    const { clock, warm, idleMs } = this.#options;
    if (this.#reaper !== null) return;
    while (this.#threads.size > warm) {
      const oldest = this.#idle[0];
      if (oldest === undefined) return;
      const leftMs = oldest.since + idleMs - clock.monotonic();
      if (leftMs > 0) {
        this.#reaper = clock.setTimer(
          () => {
            this.#reaper = null;
            this.#reap();
          },
          leftMs,
          { unref: true },
        );
        return;
      }
      this.#idle.shift();
      this.#threads.delete(oldest.thread);
      const leaving = oldest.thread.close().finally(() => this.#leaving.delete(leaving));
      this.#leaving.add(leaving);
    }
  }
}

async function modulePath(module: string | URL): Promise<string> {
  const text = String(module);
  const isUrl = /^[a-z][a-z0-9+.-]+:\/\//i.test(text);
  if (isUrl && !text.startsWith('file:')) {
    throw new MillraceError('invalid_argument', `runner module ${text} must be a path or a file: URL`);
  }
  const path = isUrl ? fileURLToPath(text) : resolve(text);
  const found = await stat(path).catch(() => null);
  if (found === null) {
    throw new MillraceError(
      'not_found',
      `runner module ${path} does not exist; give the path of a .ts or .js file whose default export is a runner`,
    );
  }
  if (!found.isFile() || !Object.hasOwn(EXTENSIONS, extname(path))) {
    throw new MillraceError(
      'invalid_argument',
      `runner module ${path} must be a file ending in ${Object.keys(EXTENSIONS).join(', ')}`,
    );
  }
  return path;
}

/** The tsconfig.json that an editor would use for this file. */
function nearestTsconfig(path: string): string | null {
  for (let folder = dirname(path); ; folder = dirname(folder)) {
    const candidate = join(folder, 'tsconfig.json');
    if (existsSync(candidate)) return candidate;
    if (folder === dirname(folder)) return null;
  }
}

function checkLimits(given: Partial<ThreadLimits>): ThreadLimits {
  const limits = { ...DEFAULT_THREAD_LIMITS, ...given };
  checkNumber('limits.memoryMiB', limits.memoryMiB, 8, 65_536);
  checkNumber('limits.wallMs', limits.wallMs, 1, Number.MAX_SAFE_INTEGER);
  checkNumber('limits.loadMs', limits.loadMs, 1, Number.MAX_SAFE_INTEGER);
  checkNumber('limits.graceMs', limits.graceMs, 0, Number.MAX_SAFE_INTEGER);
  checkNumber('limits.logBytes', limits.logBytes, 0, Number.MAX_SAFE_INTEGER);
  return limits;
}

function checkNumber(name: string, value: number, least: number, most: number): number {
  if (Number.isSafeInteger(value) && value >= least && value <= most) return value;
  throw new MillraceError(
    'invalid_argument',
    `openThreadRunner: ${name} must be a whole number from ${least} to ${most}, got ${String(value)}`,
  );
}
