/** Real Millrace processes for whole-system stories: started on free ports over a data folder, killed without mercy. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { connect, generatePrivateKeyHex, type Requestor } from '@millrace/dispatch/client';

const MAIN = fileURLToPath(new URL('../../packages/cli/dist/main.js', import.meta.url));

/** A program under test with everything it said. */
export class Program implements AsyncDisposable {
  readonly child: ChildProcess;
  readonly stdout: string[] = [];
  stderr = '';
  readonly #exited: Promise<unknown>;

  constructor(args: readonly string[], env: Readonly<Record<string, string>> = {}) {
    this.child = spawn(process.execPath, [MAIN, ...args], {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { PATH: process.env['PATH'] ?? '', HOME: process.env['HOME'] ?? '/', ...env },
    });
    this.#exited = once(this.child, 'exit');
    createInterface({ input: this.child.stdout! }).on('line', (line) => {
      this.stdout.push(line);
      this.child.emit('millrace-line');
    });
    this.child.stderr!.setEncoding('utf8').on('data', (text: string) => {
      this.stderr = (this.stderr + text).slice(-200_000);
    });
  }

  /** The first line on stdout; rejects with what was said on stderr when the program ends before. */
  async firstLine(): Promise<string> {
    while (this.stdout.length === 0) {
      await Promise.race([once(this.child, 'millrace-line'), this.#exited]);
      if (this.stdout.length === 0 && this.exitCode !== null) {
        throw new Error(`ended with ${this.exitCode} before its first line:\n${this.stderr}`);
      }
    }
    return this.stdout[0]!;
  }

  get exitCode(): number | string | null {
    return this.child.exitCode ?? this.child.signalCode;
  }

  /** Sends the signal and waits until the process is gone. */
  async kill(signal: NodeJS.Signals): Promise<void> {
    if (this.exitCode === null) this.child.kill(signal);
    await this.#exited;
  }

  /** Resident memory in bytes. */
  async residentBytes(): Promise<number> {
    const status = await readFile(`/proc/${this.child.pid}/status`, 'utf8');
    return Number(/VmRSS:\s+(\d+) kB/.exec(status)![1]) * 1024;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill('SIGKILL');
  }
}

/** A temporary folder that is removed with its contents. */
export async function temporaryFolder(): Promise<{ readonly path: string } & AsyncDisposable> {
  const folder = await mkdtemp(path.join(tmpdir(), 'millrace-test-'));
  return {
    path: folder,
    [Symbol.asyncDispose]: () => rm(folder, { recursive: true, force: true, maxRetries: 5 }),
  };
}

export interface RunningDispatcher {
  readonly program: Program;
  readonly url: string;
  readonly token: string;
}

/** `millrace dispatch serve` over a data folder; port 0 picks a free one. */
export async function startDispatcher(dataDir: string, port = 0): Promise<RunningDispatcher> {
  const program = new Program(['dispatch', 'serve', '--port', String(port), '--data', dataDir]);
  const { url } = JSON.parse(await program.firstLine()) as { url: string };
  const token = (await readFile(path.join(dataDir, 'client-token'), 'utf8')).trim();
  return { program, url, token };
}

export function requestor(dispatcher: RunningDispatcher): Requestor {
  return connect({ url: dispatcher.url, token: dispatcher.token });
}

/** The environment that makes a `millrace node start` this node. */
export type NodeEnvironment = Readonly<Record<string, string>>;

export async function nodeCredentials(dispatcher: RunningDispatcher, name: string): Promise<NodeEnvironment> {
  await using client = closing(requestor(dispatcher));
  const { registrationCredentials } = await client.value.addNode({ name, mode: 'public' });
  return {
    DDS_BASE_URL: dispatcher.url,
    DMS_BASE_URL: `${dispatcher.url}/v1`,
    REG_SECRET: registrationCredentials,
    SECP256K1_PRIVHEX: generatePrivateKeyHex(),
    LOG_FORMAT: 'json',
  };
}

/** `millrace node start` with these runner modules. Resolves when it has polled for work. */
export async function startNode(
  dispatcher: RunningDispatcher,
  env: NodeEnvironment,
  runners: readonly string[],
  options: { readonly workDir: string; readonly concurrency?: number },
): Promise<Program> {
  const program = new Program(
    ['node', 'start', '--work-dir', options.workDir, ...runners.flatMap((runner) => ['--runner', runner])],
    { ...env, MAX_CONCURRENCY: String(options.concurrency ?? 1) },
  );
  await using client = closing(requestor(dispatcher));
  const startedAt = Date.now();
  await until(async () => {
    if (program.exitCode !== null)
      throw new Error(`the node ended with ${program.exitCode}:\n${program.stderr}`);
    const nodes = await client.value.nodes();
    return nodes.some(
      (node) => node.last_seen_at !== null && Date.parse(node.last_seen_at) >= startedAt - 1000,
    );
  });
  return program;
}

/** Polls until `condition` holds; fails after `deadlineMs` (default 30 s). */
export async function until(condition: () => Promise<boolean> | boolean, deadlineMs = 30_000): Promise<void> {
  const deadline = performance.now() + deadlineMs;
  while (!(await condition())) {
    if (performance.now() > deadline) throw new Error(`condition not met within ${deadlineMs} ms`);
    await new Promise((resolve) => setTimeout(resolve, 25));
  }
}

/** `await using` for things with a `close()`. */
export function closing<T extends { close(): Promise<void> }>(
  value: T,
): { readonly value: T } & AsyncDisposable {
  return { value, [Symbol.asyncDispose]: () => value.close() };
}
