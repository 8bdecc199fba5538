/** A program as a child process: in a session and process group of its own, with pipes that end when it does. */
import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import type { Readable, Writable } from 'node:stream';
import { MillraceError, sleep, type Clock } from '@millrace/runner';

export interface ChildOptions {
  /** The program by its path, and its arguments. */
  readonly argv: readonly [program: string, ...args: string[]];
  /** Must exist. */
  readonly cwd: string;
  /** All of its environment. */
  readonly env: Readonly<Record<string, string>>;
  /** Whether it has a stdin; without, reading gives the end at once. */
  readonly stdin: boolean;
}

export interface Exit {
  /** Null when a signal ended it. */
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
}

/** The descriptor of {@link Child.events} in the program. */
export const EVENTS_FD = 3;

export interface Child {
  readonly pid: number;
  readonly stdin: Writable | null;
  readonly stdout: Readable;
  readonly stderr: Readable;
  /** What it writes to descriptor {@link EVENTS_FD}. */
  readonly events: Readable;
  /** When the spawned process is gone; its children may live on and hold the pipes. Never rejects. */
  readonly exited: Promise<Exit>;
  /** Waits until all pipes are read to their end, or for `limitMs`, and lets go of them. Call after {@link exited}. */
  drain(clock: Clock, limitMs: number): Promise<void>;
}

let ended = 0;

/** How many children of {@link startChild} have ended so far. */
export function endedChildren(): number {
  return ended;
}

/**
 * Starts it and resolves when it runs.
 *
 * @throws MillraceError `not_found` (no such program, or its interpreter), `permission_denied` (not executable), `invalid_argument` (arguments or environment too long), `unavailable`
 * (the system has no process or memory to spare), each naming the program.
 */
export async function startChild(options: ChildOptions): Promise<Child> {
  const [program, ...args] = options.argv;
  let child: ChildProcess;
  try {
    child = spawn(program, args, {
      cwd: options.cwd,
      env: { ...options.env },
      detached: true,
      stdio: [options.stdin ? 'pipe' : 'ignore', 'pipe', 'pipe', 'pipe'],
    });
  } catch (error) {
    // Some errors come at once, others as an event.
    throw spawnError(program, error);
  }
  const exited = new Promise<Exit>((resolve) => {
    child.once('exit', (code, signal) => {
      ended += 1;
      resolve({ code, signal });
    });
  });
  if (child.pid === undefined) {
    const [error] = (await once(child, 'error')) as [unknown];
    throw spawnError(program, error);
  }
  // A signal that cannot be sent also comes as an event; who sends one looks at the process instead.
  child.on('error', () => undefined);
  const streams = [child.stdout, child.stderr, child.stdio[EVENTS_FD]] as [Readable, Readable, Readable];
  const closed = Promise.all(
    streams.map((stream) => {
      stream.on('error', () => stream.destroy());
      return new Promise((resolve) => stream.once('close', resolve));
    }),
  );
  // A program may end, or close its stdin, without reading it.
  child.stdin?.on('error', () => undefined);
  return {
    pid: child.pid,
    stdin: child.stdin,
    stdout: streams[0],
    stderr: streams[1],
    events: streams[2],
    exited,
    async drain(clock, limitMs) {
      child.stdin?.destroy();
      const stop = new AbortController();
      await Promise.race([closed, sleep(clock, limitMs, stop.signal).catch(() => undefined)]);
      stop.abort();
      for (const stream of streams) stream.destroy();
      await closed;
    },
  };
}

function spawnError(program: string, error: unknown): MillraceError {
  const { code = 'unknown error' } = error as NodeJS.ErrnoException;
  const options = { cause: error, details: { ending: 'spawn_failed', errno: code } };
  switch (code) {
    case 'ENOENT':
      return new MillraceError(
        'not_found',
        `program ${program} does not exist, or its interpreter does not`,
        options,
      );
    case 'EACCES':
    case 'EPERM':
      return new MillraceError(
        'permission_denied',
        `program ${program} may not be executed (${code})`,
        options,
      );
    case 'ENOEXEC':
      return new MillraceError(
        'invalid_argument',
        `program ${program} is neither a binary of this machine nor a script that begins with #!`,
        options,
      );
    case 'E2BIG':
      return new MillraceError(
        'invalid_argument',
        `program ${program}: arguments and environment are longer than the system takes (E2BIG); pass large values as inputs`,
        options,
      );
    case 'EAGAIN':
    case 'ENOMEM':
    case 'EMFILE':
    case 'ENFILE':
      return new MillraceError(
        'unavailable',
        `program ${program} cannot be started now (${code}): the system has no process, memory or descriptor to spare`,
        options,
      );
    default:
      return new MillraceError('internal', `program ${program} cannot be started (${code})`, options);
  }
}
