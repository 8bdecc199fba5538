/**
 * The processes of one activity: each started in a process group of its own, none left at the end.
 *
 * A group is signalled as a whole. On Linux whoever leaves its group is still found, see `ProcessTree`; elsewhere only
 * the groups are reached.
 */
import { spawn, type ChildProcess, type StdioOptions } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { statSync } from 'node:fs';
import path from 'node:path';
import { ProcessTree } from '@millrace/exec/process';
import { MillraceError, sleep, type Clock } from '@millrace/runner';

const MARK = 'MILLRACE_ACTIVITY';

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
  /**
   * SIGTERM to the group, SIGKILL after `graceMs`. Resolves when nothing is left of the process and what it started.
   *
   * @throws MillraceError `internal` for a process the kernel does not let go of.
   */
  end(graceMs: number): Promise<void>;
}

export interface SpawnRequest {
  readonly file: string;
  readonly args: readonly string[];
  readonly cwd: string | undefined;
  readonly env: Readonly<Record<string, string>>;
  readonly stdio: StdioOptions;
}

export class ActivityProcesses {
  readonly #clock: Clock;
  readonly #id = randomUUID();
  #count = 0;
  /** Those that run, and those that have ended and left something behind. */
  readonly #groups = new Set<GroupProcess>();
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
    this.#count += 1;
    const mark = `${this.#id}/${this.#count}`;
    const child = spawn(request.file, request.args, {
      cwd: request.cwd,
      env: { ...request.env, [MARK]: mark },
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
    // Before anything is waited for: until then the pid is this process's, even if it has ended already.
    const tree = new ProcessTree({ pid, marker: `${MARK}=${mark}`, clock });
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
        await tree.kill();
        await exited;
        this.#groups.delete(group);
      },
    };
    this.#groups.add(group);
    void exited.then(() => {
      gone = true;
      // Where the tree cannot be followed, what is left of the group ends before its number is used again.
      if (tree.root === null) signalGroup(pid, 'SIGKILL');
      if (tree.membersAndOrphans().length === 0) this.#groups.delete(group);
    });
    return group;
  }

  /** Processes that still run, by id. */
  get roots(): readonly number[] {
    return [...this.#groups].filter(({ hasExited }) => !hasExited).map(({ pid }) => pid);
  }

  /**
   * Ends everything: SIGTERM to what runs, SIGKILL after `graceMs` to all that is left. Resolves when nothing is.
   *
   * @throws as {@link GroupProcess.end}.
   */
  async end(graceMs: number): Promise<void> {
    await Promise.all([...this.#groups].map((group) => group.end(graceMs)));
  }

  /** No process is started from now on, and what was is killed. Resolves when nothing is left. @throws as {@link end}. */
  async close(): Promise<void> {
    this.#closed = true;
    await this.end(0);
  }
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
      if (statSync(file, { throwIfNoEntry: false })?.isDirectory()) {
        return new MillraceError('failed_precondition', `runtime ${file} is a folder, not a program`, {
          cause: error,
        });
      }
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
