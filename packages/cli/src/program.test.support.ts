/** The program in tests: as a child process, which is what users have, and in this process, which is a second faster. */
import { spawn, type ChildProcessByStdio } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { Readable, type Writable } from 'node:stream';
import { fileURLToPath } from 'node:url';

import type { Io } from './io.ts';
import { runProgram } from './program.ts';

const BIN = fileURLToPath(new URL('../bin/millrace.js', import.meta.url));
const WAIT_MS = 25_000;

export interface Ended {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** A process under way. Killed when disposed, and waited for. */
export class Program implements AsyncDisposable {
  readonly child: ChildProcessByStdio<Writable, Readable, Readable>;
  readonly ended: Promise<Ended>;
  stdout = '';
  stderr = '';

  constructor(args: readonly string[], place: Place, env: Readonly<Record<string, string>> = {}) {
    this.child = spawn(process.execPath, [BIN, ...args], {
      cwd: place.cwd,
      env: { PATH: process.env['PATH'] ?? '', HOME: place.home, TMPDIR: place.tmp, ...env },
      stdio: ['pipe', 'pipe', 'pipe'],
    });
    // A program that ends without reading its input is none of the tests' concern.
    this.child.stdin.on('error', () => {});
    this.child.stdout.setEncoding('utf8').on('data', (text: string) => (this.stdout += text));
    this.child.stderr.setEncoding('utf8').on('data', (text: string) => (this.stderr += text));
    this.ended = once(this.child, 'close').then(([code]) => ({
      code: code as number | null,
      stdout: this.stdout,
      stderr: this.stderr,
    }));
  }

  /** Resolves when `pattern` has been printed. */
  async printed(stream: 'stdout' | 'stderr', pattern: RegExp): Promise<string> {
    const deadline = AbortSignal.timeout(WAIT_MS);
    for (;;) {
      const match = pattern.exec(this[stream]);
      if (match !== null) return match[0];
      if (this.child.exitCode !== null || deadline.aborted) {
        throw new Error(`${String(pattern)} was not printed; stdout: ${this.stdout}; stderr: ${this.stderr}`);
      }
      await Promise.race([
        once(this.child[stream], 'data', { signal: deadline }).catch(() => {}),
        once(this.child, 'close', { signal: deadline }).catch(() => {}),
      ]);
    }
  }

  /** The first line on stdout, as JSON. */
  async firstDocument<T>(): Promise<T> {
    return JSON.parse(await this.printed('stdout', /^.*\n/)) as T;
  }

  signal(name: NodeJS.Signals): void {
    this.child.kill(name);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.child.kill('SIGKILL');
    await this.ended;
  }
}

/** Folders of one test: where it works, its home, and its temporary files. */
export interface Place extends AsyncDisposable {
  readonly cwd: string;
  readonly home: string;
  readonly tmp: string;
}

export async function makePlace(): Promise<Place> {
  const root = await mkdtemp(path.join(tmpdir(), 'millrace-cli-'));
  const { mkdir } = await import('node:fs/promises');
  const folders = {
    cwd: path.join(root, 'work'),
    home: path.join(root, 'home'),
    tmp: path.join(root, 'tmp'),
  };
  for (const folder of Object.values(folders)) await mkdir(folder);
  return {
    ...folders,
    [Symbol.asyncDispose]: () => rm(root, { recursive: true, force: true, maxRetries: 3 }),
  };
}

/** Runs the program to its end. */
export async function millrace(
  args: readonly string[],
  place: Place,
  options: { readonly stdin?: string; readonly env?: Readonly<Record<string, string>> } = {},
): Promise<Ended> {
  await using program = new Program(args, place, options.env);
  program.child.stdin.end(options.stdin ?? '');
  return await program.ended;
}

/** The same without the process: for commands that only ask a dispatcher. */
export async function ask(
  args: readonly string[],
  place: Place,
  options: { readonly stdin?: string; readonly env?: Readonly<Record<string, string>> } = {},
): Promise<Ended> {
  let stdout = '';
  let stderr = '';
  const io: Io = {
    env: { HOME: place.home, ...options.env },
    cwd: place.cwd,
    pid: process.pid,
    stdin: Readable.from(options.stdin === undefined ? [] : [Buffer.from(options.stdin)]),
    stdout: { write: (text) => void (stdout += text) },
    stderr: { write: (text) => void (stderr += text) },
    now: () => Date.now(),
    onStop: () => ({ [Symbol.dispose]: () => {} }),
  };
  const code = await runProgram(io, args);
  return { code, stdout, stderr };
}

/** {@link ask}, for what must succeed. */
export async function answer(...call: Parameters<typeof ask>): Promise<string> {
  const { code, stdout, stderr } = await ask(...call);
  if (code !== 0) throw new Error(`millrace ${call[0].join(' ')}: exit code ${code}; ${stdout}${stderr}`);
  return stdout;
}
