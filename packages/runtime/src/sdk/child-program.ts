/** Programs of the machine that belong to a command: each in a process group of its own, none left when the runtime ends. */
import { spawn, type ChildProcess } from 'node:child_process';
import type { Readable } from 'node:stream';
import { constants } from 'node:os';
import { RuntimeError } from './runtime-error.ts';
import { CommandKilled, type SpawnOptions } from './runtime.ts';

const KILL_GRACE_MS = 2_000;
const SIGNAL_NAMES = new Map(
  Object.entries(constants.signals).map(([name, number]) => [number, name as NodeJS.Signals]),
);

const running = new Set<ChildProcess>();
let sweeping = false;

/** SIGKILL to every group that is left. */
export function killAllPrograms(): void {
  for (const child of running) signalGroup(child, 'SIGKILL');
}

export interface ProgramRequest extends SpawnOptions {
  readonly file: string;
  readonly args: readonly string[];
  readonly signal: AbortSignal;
  /** SIGKILL at once. */
  readonly force: AbortSignal;
  readonly onStdout: (chunk: Uint8Array) => Promise<void>;
  readonly onStderr: (chunk: Uint8Array) => Promise<void>;
}

/** Runs it to its end, all output passed on. Resolves with the exit code, 128 + n after signal n. */
export async function runProgram(request: ProgramRequest): Promise<number> {
  const { file, args, signal, force, cwd, env } = request;
  if (signal.aborted) throw signal.reason;
  if (!sweeping) {
    sweeping = true;
    process.once('exit', killAllPrograms);
  }
  const child = spawn(file, args, {
    cwd,
    env: env ?? process.env,
    stdio: ['ignore', 'pipe', 'pipe'],
    detached: process.platform !== 'win32',
  });
  const ended = new Promise<number>((resolve, reject) => {
    child.once('error', (error) => {
      const missing = (error as NodeJS.ErrnoException).code === 'ENOENT';
      reject(
        new RuntimeError(`${file} cannot be started`, {
          kind: missing ? 'not_found' : 'internal',
          exitCode: missing ? 127 : 126,
          cause: error,
        }),
      );
    });
    child.once('exit', (code, name) => resolve(code ?? 128 + (constants.signals[name ?? 'SIGKILL'] ?? 9)));
  });
  if (child.pid !== undefined) running.add(child);
  let grace: NodeJS.Timeout | undefined;
  const onForce = (): void => {
    signalGroup(child, 'SIGKILL');
    // What left the group may hold the pipes for as long as it likes.
    child.stdout.destroy();
    child.stderr.destroy();
  };
  const onAbort = (): void => {
    const number = signal.reason instanceof CommandKilled ? signal.reason.signal : constants.signals.SIGTERM;
    signalGroup(child, SIGNAL_NAMES.get(number) ?? 'SIGTERM');
    grace = setTimeout(onForce, KILL_GRACE_MS);
  };
  force.addEventListener('abort', onForce, { once: true });
  signal.addEventListener('abort', onAbort, { once: true });
  const output = Promise.all([
    forward(child.stdout, request.onStdout),
    forward(child.stderr, request.onStderr),
  ]);
  try {
    const code = await ended;
    // A child of the program may keep the pipes open; after a kill nothing more of it is wanted.
    if (signal.aborted) onForce();
    await output;
    signal.throwIfAborted();
    return code;
  } finally {
    clearTimeout(grace);
    force.removeEventListener('abort', onForce);
    signal.removeEventListener('abort', onAbort);
    running.delete(child);
  }
}

async function forward(stream: Readable, write: (chunk: Uint8Array) => Promise<void>): Promise<void> {
  try {
    for await (const chunk of stream) await write(chunk as Uint8Array);
  } catch (error) {
    // Destroyed after a kill, which is reported as such.
    if ((error as NodeJS.ErrnoException).code !== 'ERR_STREAM_PREMATURE_CLOSE') throw error;
  }
}

function signalGroup(child: ChildProcess, name: NodeJS.Signals): void {
  if (child.pid === undefined) return;
  try {
    process.kill(process.platform === 'win32' ? child.pid : -child.pid, name);
  } catch {
    // Gone already, the whole group.
  }
}
