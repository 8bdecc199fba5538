/**
 * A whole system on this machine out of the real command: a dispatcher and some nodes, each a process of its own. They
 * are started and stopped the way an operator would: with arguments, an environment, and signals.
 */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { readFile, writeFile } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { MillraceError, sleep, systemClock } from '@millrace/runner';

/** The executable of the package `millrace`, beside what its name resolves to. */
const MILLRACE = fileURLToPath(new URL('../bin/millrace.js', import.meta.resolve('millrace')));

/** From one signal to the next, sterner one. */
const STOP_STEP_MS = 5_000;
const START_MS = 60_000;
/** The end of a process's stderr kept for the case that it fails. */
const KEPT_STDERR = 4_000;

export interface LocalSystemOptions {
  /** Where everything is kept. Must exist. */
  readonly dir: string;
  readonly nodes: number;
  /** Runner modules, absolute paths. */
  readonly runners: readonly string[];
  readonly signal: AbortSignal;
}

export interface LocalSystem extends AsyncDisposable {
  readonly url: string;
  /** Client token. */
  readonly token: string;
  /** Node id to name. */
  readonly nodeNames: ReadonlyMap<string, string>;
  /** Rejects when one of the processes ends by itself; never resolves. */
  readonly failed: Promise<never>;
  /** Stops nodes, then the dispatcher, and waits until all are gone. */
  close(): Promise<void>;
  /** Kills all at once. For a second Ctrl-C. */
  kill(): void;
}

/** Starts it. @throws MillraceError with the end of what the process said, when one cannot start. */
export async function startLocalSystem(options: LocalSystemOptions): Promise<LocalSystem> {
  const { dir, signal } = options;
  const processes: Program[] = [];
  const start = (
    name: string,
    args: readonly string[],
    env: Readonly<Record<string, string>> = {},
  ): Program => {
    const program = new Program(name, args, env);
    processes.push(program);
    return program;
  };
  const kill = (): void => {
    for (const program of processes) program.kill();
  };
  // Whatever ends this process, the ones it started do not stay behind.
  process.once('exit', kill);
  const close = async (): Promise<void> => {
    const [dispatcher, ...nodes] = processes;
    await Promise.all(nodes.map((node) => node.stop()));
    await dispatcher?.stop();
    process.removeListener('exit', kill);
  };

  try {
    const dispatcher = start('the dispatcher', ['dispatch', 'serve', '--port', '0', '--data', dir]);
    const { url } = await dispatcher.firstLine(signal);
    if (typeof url !== 'string') throw dispatcher.failure('named no url in its first line');
    const token = (await readFile(join(dir, 'client-token'), 'utf8')).trim();

    const config = join(dir, 'millrace.config.json');
    // A person's file of tens of megabytes is ten times that once parsed, which the default heap would not hold.
    const limits = { memoryMiB: 1024 };
    await writeFile(
      config,
      JSON.stringify({ runners: options.runners.map((module) => ({ module, limits })) }),
    );
    const nodeNames = new Map<string, string>();
    const perNode = Math.max(1, Math.floor(availableParallelism() / options.nodes));
    for (let number = 1; number <= options.nodes; number += 1) {
      const name = `node-${number}`;
      const address = ['--url', url, '--data', dir];
      const adding = new Program(`nodes add ${name}`, ['nodes', 'add', '--json', '--name', name, ...address]);
      const { id, env } = await adding.firstLine(signal);
      await adding.ended;
      nodeNames.set(String(id), name);
      const credentials = {
        ...(env as Record<string, string>),
        MAX_CONCURRENCY: String(perNode),
        LOG_LEVEL: 'warn',
      };
      start(name, ['node', 'start', '--config', config, '--work-dir', join(dir, name)], credentials);
    }
    const failed = Promise.race(processes.map((program) => program.endedByItself));
    failed.catch(() => undefined);
    return { url, token, nodeNames, failed, close, kill, [Symbol.asyncDispose]: close };
  } catch (error) {
    await close();
    throw error;
  }
}

/** One run of the command. */
class Program {
  readonly ended: Promise<void>;
  readonly endedByItself: Promise<never>;
  readonly #name: string;
  readonly #child: ChildProcess;
  #stderr = '';
  #stopping = false;
  #code: number | NodeJS.Signals | null = null;

  constructor(name: string, args: readonly string[], env: Readonly<Record<string, string>> = {}) {
    this.#name = name;
    this.#child = spawn(process.execPath, [MILLRACE, ...args], {
      env: { ...process.env, ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
      // A group of its own, so that Ctrl-C reaches only this program, which then stops the others in order.
      detached: true,
    });
    this.#child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#stderr = (this.#stderr + text).slice(-KEPT_STDERR);
    });
    this.ended = once(this.#child, 'close').then(([code, signal]: (number | NodeJS.Signals | null)[]) => {
      this.#code = code ?? signal ?? null;
    });
    this.endedByItself = this.ended.then(() =>
      this.#stopping ? new Promise<never>(() => undefined) : Promise.reject(this.failure('ended')),
    );
    this.endedByItself.catch(() => undefined);
  }

  /** The JSON object it prints first. */
  async firstLine(signal: AbortSignal): Promise<Readonly<Record<string, unknown>>> {
    const lines = createInterface({ input: this.#child.stdout! });
    const timer = new AbortController();
    const waiting = AbortSignal.any([signal, timer.signal]);
    try {
      const line = await Promise.race([
        once(lines, 'line', { signal: waiting }).then(([text]) => String(text)),
        this.ended.then(() => Promise.reject(this.failure('ended before it was ready'))),
        sleep(systemClock, START_MS, waiting).then(() =>
          Promise.reject(this.failure('was not ready in time')),
        ),
      ]);
      // What follows is read and dropped, or the pipe would fill up.
      this.#child.stdout?.resume();
      return JSON.parse(line) as Readonly<Record<string, unknown>>;
    } finally {
      timer.abort();
    }
  }

  /** Asks once, insists, then kills. Resolves when it is gone. */
  async stop(): Promise<void> {
    this.#stopping = true;
    for (const step of ['SIGTERM', 'SIGTERM', 'SIGKILL'] as const) {
      if (this.#child.exitCode !== null || this.#child.signalCode !== null) break;
      this.#signal(step);
      const timer = new AbortController();
      await Promise.race([this.ended, sleep(systemClock, STOP_STEP_MS, timer.signal).catch(() => undefined)]);
      timer.abort();
    }
    await this.ended;
  }

  kill(): void {
    this.#stopping = true;
    this.#signal('SIGKILL');
  }

  failure(what: string): MillraceError {
    const said = this.#stderr.trim();
    const code = this.#code === null ? '' : ` (${this.#code})`;
    return new MillraceError(
      'unavailable',
      `${this.#name} ${what}${code}${said ? `; it said:\n${said}` : ''}`,
    );
  }

  /** To the whole group. */
  #signal(signal: NodeJS.Signals): void {
    const { pid, exitCode, signalCode } = this.#child;
    if (pid === undefined || exitCode !== null || signalCode !== null) return;
    try {
      process.kill(-pid, signal);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
    }
  }
}
