/**
 * The processes of one activity: each started in a process group of its own, none left at the end.
 *
 * A group is signalled as a whole. A process that leaves its group is still found on Linux: it has inherited a mark in its
 * environment, or descends from one that has. Elsewhere only the groups are reached.
 */
import { spawn, type ChildProcess, type StdioOptions } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { readFileSync, readdirSync } from 'node:fs';
import path from 'node:path';
import { MillraceError, sleep, type Clock } from '@millrace/runner';

const MARK = 'MILLRACE_ACTIVITY';
const SWEEP_PAUSE_MS = 20;
/** Enough for a chain of forks to be overtaken; a process that cannot be killed (in the kernel) is then given up. */
const MAX_SWEEPS = 250;

export interface ProcessExit {
  /** Null when a signal ended it. */
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
}

export interface GroupProcess {
  readonly child: ChildProcess;
  readonly pid: number;
  /** Resolves when the process itself has ended; its output may still be on the way. */
  readonly exited: Promise<ProcessExit>;
  readonly hasExited: boolean;
  /** To the whole group. Harmless when it is gone. */
  signal(name: NodeJS.Signals | number): void;
  /** SIGTERM to the group, SIGKILL after `graceMs`. Resolves when nothing is left of the process and what it started. */
  end(graceMs: number): Promise<void>;
}

export interface SpawnRequest {
  readonly file: string;
  readonly args: readonly string[];
  readonly cwd: string | undefined;
  readonly env: Readonly<Record<string, string>>;
  readonly stdio: StdioOptions;
}

export class ProcessTree {
  readonly #clock: Clock;
  readonly #mark = `${MARK}=${randomUUID()}`;
  #count = 0;
  readonly #processes = new Set<GroupProcess>();
  #started = false;
  #closed = false;

  constructor(clock: Clock) {
    this.#clock = clock;
  }

  /**
   * @throws MillraceError `not_found` or `failed_precondition` when the program cannot be started, saying why; `canceled` after
   * {@link close}.
   */
  async spawn(request: SpawnRequest): Promise<GroupProcess> {
    if (this.#closed) throw new MillraceError('canceled', 'the activity is over');
    this.#started = true;
    this.#count += 1;
    const mark = `${this.#mark}/${this.#count}`;
    const child = spawn(request.file, request.args, {
      cwd: request.cwd,
      env: { ...request.env, [MARK]: mark.slice(MARK.length + 1) },
      stdio: request.stdio,
      detached: true,
    });
    const exited = new Promise<ProcessExit>((resolve) => {
      child.once('exit', (code, signal) => resolve({ code, signal }));
    });
    const { pid } = child;
    if (pid === undefined) {
      const error = await new Promise<NodeJS.ErrnoException>((resolve) => child.once('error', resolve));
      throw cannotStart(request, error);
    }
    child.on('error', () => undefined);
    const clock = this.#clock;
    let gone = false;
    const group: GroupProcess = {
      child,
      pid,
      exited,
      get hasExited() {
        return gone;
      },
      signal: (name) => signalGroup(pid, name),
      end: async (graceMs) => {
        if (!gone) signalGroup(pid, 'SIGTERM');
        if (!gone && !(await within(clock, exited, graceMs))) signalGroup(pid, 'SIGKILL');
        await exited;
        await sweep(clock, `${mark}\0`);
      },
    };
    this.#processes.add(group);
    void exited.then(() => {
      gone = true;
      // What is left of the group is found by its mark later; elsewhere it ends here, before the number is used again.
      if (process.platform !== 'linux') signalGroup(pid, 'SIGKILL');
      this.#processes.delete(group);
    });
    return group;
  }

  /** Processes that still run, by id. */
  get roots(): readonly number[] {
    return [...this.#processes].map(({ pid }) => pid);
  }

  /** Ends everything: SIGTERM to what runs, SIGKILL after `graceMs` to all that is left. Resolves when nothing is. */
  async end(graceMs: number): Promise<void> {
    if (!this.#started) return;
    await Promise.all([...this.#processes].map((group) => group.end(graceMs)));
    await sweep(this.#clock, `${this.#mark}/`);
  }

  /** No process is started from now on, and what was is killed. Resolves when nothing is left. */
  async close(): Promise<void> {
    this.#closed = true;
    await this.end(0);
  }
}

/** SIGKILL to all that carries the mark, until nothing does. */
async function sweep(clock: Clock, mark: string): Promise<void> {
  if (process.platform !== 'linux') return;
  for (let round = 0; round < MAX_SWEEPS; round += 1) {
    const left = markedProcesses(mark);
    if (left.length === 0) return;
    for (const pid of left) {
      try {
        process.kill(pid, 'SIGKILL');
      } catch {
        // Ended since it was listed.
      }
    }
    await sleep(clock, SWEEP_PAUSE_MS);
  }
  throw new MillraceError(
    'internal',
    `processes of a runtime survived SIGKILL: ${markedProcesses(mark).join(', ')}`,
  );
}

/** Whether the promise settles within `ms`. */
export async function within(clock: Clock, settled: Promise<unknown>, ms: number): Promise<boolean> {
  const timer = new AbortController();
  const late = sleep(clock, ms, timer.signal).then(
    () => false,
    () => true,
  );
  const inTime = settled.then(
    () => true,
    () => true,
  );
  const result = await Promise.race([inTime, late]);
  timer.abort();
  return result;
}

function signalGroup(pid: number, name: NodeJS.Signals | number): void {
  try {
    process.kill(-pid, name);
  } catch {
    // The group is gone.
  }
}

/** Live processes whose environment carries the mark, and their descendants. */
function markedProcesses(mark: string): number[] {
  const children = new Map<number, number[]>();
  const marked: number[] = [];
  for (const entry of readdirSync('/proc')) {
    if (!/^\d+$/.test(entry)) continue;
    const pid = Number(entry);
    const stat = readProcess(pid, 'stat');
    // After the name, which may hold anything, in parentheses: state and parent.
    const [state, parent] = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    if (stat === '' || state === 'Z' || state === 'X' || pid === process.pid) continue;
    children.set(Number(parent), [...(children.get(Number(parent)) ?? []), pid]);
    if (readProcess(pid, 'environ').includes(mark)) marked.push(pid);
  }
  const found = new Set<number>();
  const visit = (pid: number): void => {
    if (found.has(pid)) return;
    found.add(pid);
    for (const child of children.get(pid) ?? []) visit(child);
  };
  for (const pid of marked) visit(pid);
  return [...found];
}

function readProcess(pid: number, file: string): string {
  try {
    return readFileSync(`/proc/${pid}/${file}`, 'latin1');
  } catch {
    // Ended, or somebody else's.
    return '';
  }
}

function cannotStart(request: SpawnRequest, error: NodeJS.ErrnoException): MillraceError {
  const { file } = request;
  const name = path.basename(file);
  switch (error.code ?? '') {
    case 'ENOENT':
      return new MillraceError(
        'not_found',
        `runtime ${file} cannot be started: the file, its interpreter or the folder ${request.cwd ?? '.'} does not exist`,
        { cause: error },
      );
    case 'EACCES':
      return new MillraceError(
        'failed_precondition',
        `runtime ${file} is not executable; run chmod +x ${name}`,
        {
          cause: error,
        },
      );
    default:
      return new MillraceError('failed_precondition', `runtime ${file} cannot be started`, { cause: error });
  }
}
