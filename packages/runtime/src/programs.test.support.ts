/** Real programs for tests: runtimes written as text, and a peer that speaks the wire to them by hand. */
import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import type { Readable, Writable } from 'node:stream';
import { FrameDecoder } from './wire/frames.ts';
import { decodeResponse, requestFrame, type RequestInit, type Response } from './wire/messages.ts';

const SDK = new URL('./index.js', import.meta.url).href;

export interface Finished {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** A folder with programs in it; disposing removes it. */
export class Programs implements AsyncDisposable {
  readonly dir: string;
  #count = 0;

  private constructor(dir: string) {
    this.dir = dir;
  }

  static async open(): Promise<Programs> {
    return new Programs(await mkdtemp(path.join(tmpdir(), 'millrace-runtime-')));
  }

  /** An executable module. */
  async module(source: string, name = `program-${(this.#count += 1)}`): Promise<string> {
    const file = path.join(this.dir, `${name}.mjs`);
    await writeFile(file, `#!${process.execPath}\n${source}\n`, { mode: 0o755 });
    return file;
  }

  /** A runtime: `body` is the inside of `defineRuntime({ name: 'probe', version: '1.2.3', … })`; `head` stands before it. */
  runtime(body: string, head = ''): Promise<string> {
    return this.module(`
import { CommandKilled, RuntimeError, defineRuntime, runRuntime } from '${SDK}';
${head}
await runRuntime(defineRuntime({ name: 'probe', version: '1.2.3', ${body} }), { dataDir: ${JSON.stringify(path.join(this.dir, 'data'))} });
`);
  }

  /**
   * A runtime in server mode without the SDK, for what the SDK never does. `body` sees `request` and may call `send(response)` and
   * `raw(bytes)`; hello is answered unless `onHello` says otherwise.
   */
  rawRuntime(
    body: string,
    onHello = `send({ id, command: { case: 'hello', value: { version: '1.0.0' } } })`,
  ): Promise<string> {
    return this.module(`
import fs from 'node:fs';
import { spawn } from 'node:child_process';
import { FrameDecoder } from '${new URL('./wire/frames.js', import.meta.url).href}';
import { decodeRequest, responseFrame } from '${new URL('./wire/messages.js', import.meta.url).href}';
if (process.argv.includes('deploy')) {
  fs.writeSync(1, JSON.stringify({ valid: { Ok: '' }, startMode: 'blocking' }));
  process.exit(0);
}
const raw = (bytes) => fs.writeSync(1, bytes);
const send = (response) => raw(responseFrame(response));
const status = (value) => send({ event: true, command: { case: 'status', value } });
const decoder = new FrameDecoder();
process.stdin.on('data', (chunk) => decoder.push(chunk, (payload) => {
  const request = decodeRequest(payload);
  const { id } = request;
  if (request.command.case === 'hello') { ${onHello}; return; }
  ${body}
}));
`);
  }

  path(...parts: string[]): string {
    return path.join(this.dir, ...parts);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await rm(this.dir, { recursive: true, force: true, maxRetries: 5 });
  }
}

/** Runs a program to its end. */
export async function finish(file: string, ...args: string[]): Promise<Finished> {
  const child = spawn(file, args, { stdio: ['ignore', 'pipe', 'pipe'] });
  let stdout = '';
  let stderr = '';
  child.stdout.on('data', (chunk: Buffer) => (stdout += chunk.toString()));
  child.stderr.on('data', (chunk: Buffer) => (stderr += chunk.toString()));
  const [code, signal] = (await once(child, 'close')) as [number | null, NodeJS.Signals | null];
  return { code, signal, stdout, stderr };
}

interface Ends {
  readonly readable: Readable;
  readonly writable: Writable;
  /** Resolves when nothing more will be received. */
  readonly closed: Promise<unknown>;
}

/** A supervisor by hand: writes any bytes, keeps what comes back. */
export class WirePeer {
  /** In the order received. */
  readonly responses: Response[] = [];
  /** Everything received. */
  received = Buffer.alloc(0);
  stderr = '';
  /** What made the received bytes unreadable. */
  broken: unknown = null;
  readonly #ends: Ends;
  readonly #changed = new EventTarget();
  #over = false;

  constructor(ends: Ends) {
    this.#ends = ends;
    ends.writable.on('error', () => undefined);
    const decoder = new FrameDecoder();
    ends.readable.on('data', (chunk: Buffer) => {
      this.received = Buffer.concat([this.received, chunk]);
      try {
        decoder.push(chunk, (payload) => this.responses.push(decodeResponse(payload)));
      } catch (error) {
        this.broken ??= error;
      }
      this.#notify();
    });
    void ends.closed.then(() => {
      this.#over = true;
      this.#notify();
    });
  }

  send(...requests: RequestInit[]): void {
    this.write(Buffer.concat(requests.map(requestFrame)));
  }

  write(bytes: Uint8Array): void {
    this.#ends.writable.write(bytes);
  }

  end(): void {
    this.#ends.writable.end();
  }

  /** Waits until something received makes `find` answer. */
  async until<T>(find: () => T | undefined | null | false, what: string): Promise<T> {
    for (;;) {
      const found = find();
      if (found !== undefined && found !== null && found !== false) return found;
      if (this.#over) throw new Error(`it ended before: ${what}; stderr: ${this.stderr}`);
      await once(this.#changed, 'change');
    }
  }

  /** The answer to a request. */
  answer(id: bigint): Promise<Response> {
    return this.until(() => this.responses.find((one) => !one.event && one.id === id), `answer ${id}`);
  }

  /** The return code in the last event of a pid. */
  stopped(pid: bigint): Promise<number> {
    return this.until(() => {
      const end = this.statuses(pid).find((status) => !status.running);
      return end ? { code: end.returnCode } : null;
    }, `end of pid ${pid}`).then(({ code }) => code);
  }

  statuses(pid: bigint): { running: boolean; returnCode: number; stdout: string; stderr: string }[] {
    return this.responses.flatMap(({ command }) =>
      command.case === 'status' && command.value.pid === pid
        ? [
            {
              running: command.value.running,
              returnCode: command.value.returnCode,
              stdout: Buffer.from(command.value.stdout).toString(),
              stderr: Buffer.from(command.value.stderr).toString(),
            },
          ]
        : [],
    );
  }

  stdoutOf(pid: bigint): string {
    return this.statuses(pid)
      .map((status) => status.stdout)
      .join('');
  }

  stderrOf(pid: bigint): string {
    return this.statuses(pid)
      .map((status) => status.stderr)
      .join('');
  }

  hear(chunk: Buffer): void {
    this.stderr += chunk.toString();
    this.#notify();
  }

  #notify(): void {
    this.#changed.dispatchEvent(new Event('change'));
  }
}

export interface SpawnedPeer extends AsyncDisposable {
  readonly peer: WirePeer;
  readonly child: ChildProcess;
  readonly closed: Promise<Finished>;
}

/**
 * A runtime as a process, its wire in hand.
 *
 * @param viaPipe puts a real pipe, as the supervisors in use have, in place of the socket Node.js makes
 */
export function spawnPeer(
  file: string,
  args: readonly string[] = ['--workdir', 'w', 'start'],
  viaPipe = false,
): SpawnedPeer {
  const [command, ...words] = viaPipe ? ['sh', '-c', '"$0" "$@" | cat', file, ...args] : [file, ...args];
  const child = spawn(command, words, { stdio: ['pipe', 'pipe', 'pipe'], detached: true });
  const ending = once(child, 'close') as Promise<[number | null, NodeJS.Signals | null]>;
  const peer = new WirePeer({ readable: child.stdout, writable: child.stdin, closed: ending });
  child.stderr.on('data', (chunk: Buffer) => peer.hear(chunk));
  const closed = ending.then(([code, signal]) => ({
    code,
    signal,
    stdout: peer.received.toString('latin1'),
    stderr: peer.stderr,
  }));
  return {
    peer,
    child,
    closed,
    async [Symbol.asyncDispose]() {
      try {
        process.kill(-child.pid!, 'SIGKILL');
      } catch {
        // Ended by itself.
      }
      await closed;
    },
  };
}

/** A run request. */
export function run(id: bigint, bin: string, ...args: string[]): RequestInit {
  return { id, command: { case: 'run', value: { bin, args: [bin, ...args] } } };
}

export function kill(id: bigint, pid: bigint, signal = 15): RequestInit {
  return { id, command: { case: 'kill', value: { pid, signal } } };
}

export function hello(id: bigint): RequestInit {
  return { id, command: { case: 'hello', value: { version: '0.1.0' } } };
}

export function shutdown(id: bigint): RequestInit {
  return { id, command: { case: 'shutdown', value: {} } };
}

/** Whether a process runs. A zombie, which nobody has waited for, does not. */
export function alive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    const stat = process.platform === 'linux' ? readFileSync(`/proc/${pid}/stat`, 'latin1') : '';
    return stat.slice(stat.lastIndexOf(')') + 2, stat.lastIndexOf(')') + 3) !== 'Z';
  } catch {
    return false;
  }
}
