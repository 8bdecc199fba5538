/** What several figures need: a dispatcher in a process of its own, a registered node, percentiles. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, open, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import {
  connect,
  generatePrivateKeyHex,
  openHttpDds,
  signMessage,
  siweMessage,
  walletAddress,
  type Requestor,
} from '@millrace/dispatch/client';

const MAIN = fileURLToPath(new URL('../../packages/cli/dist/main.js', import.meta.url));

/** A section of the report: a title, and lines that each say one measured fact. */
export interface Figure {
  readonly title: string;
  readonly lines: readonly string[];
}

export interface BenchDispatcher extends AsyncDisposable {
  readonly url: string;
  readonly client: Requestor;
  readonly dataDir: string;
  readonly pid: number;
  /** Kills it, waits `downMs`, and starts it again on the same folder and port. Resolves when it accepts connections. */
  restart(downMs: number): Promise<void>;
}

/**
 * `millrace dispatch serve` as its own process over a new folder, removed afterwards. `store`: as its option; default SQLite in
 * that folder.
 */
export async function startDispatcher(options: { readonly store?: string } = {}): Promise<BenchDispatcher> {
  const dataDir = await mkdtemp(path.join(tmpdir(), 'millrace-bench-'));
  let { child, url } = await serve(dataDir, '0', options.store);
  const kill = async (): Promise<void> => {
    child.kill('SIGKILL');
    if (child.exitCode === null && child.signalCode === null) await once(child, 'exit');
  };
  const token = (await readFile(path.join(dataDir, 'client-token'), 'utf8')).trim();
  const client = connect({ url, token, timeoutMs: 120_000 });
  return {
    url,
    client,
    dataDir,
    get pid() {
      return child.pid ?? 0;
    },
    async restart(downMs) {
      await kill();
      await new Promise((resolve) => void setTimeout(resolve, downMs));
      ({ child } = await serve(dataDir, new URL(url).port, options.store));
    },
    async [Symbol.asyncDispose]() {
      await client.close();
      await kill();
      await rm(dataDir, { recursive: true, force: true });
    },
  };
}

async function serve(
  dataDir: string,
  port: string,
  store: string | undefined,
): Promise<{ readonly child: ChildProcess; readonly url: string }> {
  const child = spawn(
    process.execPath,
    [
      MAIN,
      'dispatch',
      'serve',
      '--port',
      port,
      '--data',
      dataDir,
      ...(store === undefined ? [] : ['--store', store]),
    ],
    { stdio: ['ignore', 'pipe', 'ignore'] },
  );
  const lines = createInterface({ input: child.stdout });
  const [line] = (await once(lines, 'line')) as [string];
  const { url } = JSON.parse(line) as { url: string };
  return { child, url };
}

/** `millrace node start` as its own process, with one runner module, or a config file, and its defaults. Killed when disposed. */
export interface BenchNodeProcess extends AsyncDisposable {
  readonly pid: number;
}

/** Resolves when the node has registered and logged in. */
export async function startNode(
  dispatcher: BenchDispatcher,
  node: BenchNode,
  runner: string | { readonly config: string; readonly maxConcurrency: number },
): Promise<BenchNodeProcess> {
  const workDir = await mkdtemp(path.join(tmpdir(), 'millrace-bench-node-'));
  const given = typeof runner === 'string' ? ['--runner', runner] : ['--config', runner.config];
  const child = spawn(process.execPath, [MAIN, 'node', 'start', ...given, '--work-dir', workDir], {
    stdio: ['ignore', 'ignore', 'ignore'],
    env: {
      PATH: process.env['PATH'],
      DDS_BASE_URL: dispatcher.url,
      DMS_BASE_URL: `${dispatcher.url}/v1`,
      REG_SECRET: node.registrationCredentials,
      SECP256K1_PRIVHEX: node.privateKeyHex,
      ...(typeof runner !== 'string' && { MAX_CONCURRENCY: String(runner.maxConcurrency) }),
    },
  });
  const exited = once(child, 'exit');
  const wallet = walletAddress(node.privateKeyHex);
  for (;;) {
    const nodes = await dispatcher.client.nodes();
    if (nodes.some((one) => one.wallet === wallet && one.last_seen_at !== null)) break;
    if (child.exitCode !== null) throw new Error(`the node ended with ${child.exitCode}`);
    await new Promise((resolve) => void setTimeout(resolve, 50));
  }
  return {
    pid: child.pid ?? 0,
    async [Symbol.asyncDispose]() {
      child.kill('SIGKILL');
      await exited;
      await rm(workDir, { recursive: true, force: true });
    },
  };
}

export interface BenchNode {
  readonly registrationCredentials: string;
  readonly privateKeyHex: string;
}

/** Credentials for a node of this dispatcher. */
export async function addNode(client: Requestor, name: string): Promise<BenchNode> {
  const { registrationCredentials } = await client.addNode({ name, mode: 'public' });
  return { registrationCredentials, privateKeyHex: generatePrivateKeyHex() };
}

/** Registers a node and logs it in: its token for the task API. */
export async function logIn(
  url: string,
  node: BenchNode,
  request: { readonly capabilities: readonly string[]; readonly maxConcurrency: number },
): Promise<string> {
  await using dds = openHttpDds({ baseUrl: url, timeoutMs: 30_000 });
  const wallet = walletAddress(node.privateKeyHex);
  const sign = async (): Promise<{ message: string; signature: string }> => {
    const message = siweMessage(await dds.requestNonce(wallet), wallet);
    return { message, signature: signMessage(message, node.privateKeyHex) };
  };
  await dds.registerWallet({
    ...(await sign()),
    registration_credentials: node.registrationCredentials,
    capabilities: request.capabilities,
    version: '1.0.0',
    max_concurrency: request.maxConcurrency,
  });
  const { accessToken } = await dds.verify({ address: wallet, ...(await sign()) });
  return accessToken;
}

/** The value below which the share `p` (0 to 1) of the samples lies. */
export function percentile(samples: readonly number[], p: number): number {
  const sorted = [...samples].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * p))] ?? Number.NaN;
}

/** How many times the second goes into the first, for people. */
export function times(value: number, other: number): string {
  const ratio = value / other;
  return `${ratio.toFixed(ratio < 10 ? 2 : 0)}×`;
}

/** What is resident of a process now, in MiB, as Linux tells it. */
export async function residentMiB(pid: number): Promise<number> {
  const status = await readFile(`/proc/${pid}/status`, 'utf8');
  return Number(/VmRSS:\s+(\d+) kB/.exec(status)?.[1] ?? Number.NaN) / 1024;
}

/** Processor time of a process so far, user and system, in milliseconds. The kernel counts it in ticks of 10 ms. */
export async function cpuMs(pid: number): Promise<number> {
  const line = await readFile(`/proc/${pid}/stat`, 'utf8');
  // The name before the last parenthesis may hold anything; after it, user and system time are the 12th and 13th.
  const fields = line.slice(line.lastIndexOf(')') + 2).split(' ');
  return (Number(fields[11]) + Number(fields[12])) * 10;
}

/** The middle of so many writes of one KiB, each synced, to a new file in the temporary folder: what a commit costs at least. */
export async function syncMs(count = 50): Promise<number> {
  const folder = await mkdtemp(path.join(tmpdir(), 'millrace-bench-'));
  try {
    await using handle = await open(path.join(folder, 'sync'), 'w');
    const took: number[] = [];
    for (let index = 0; index < count; index += 1) {
      const start = performance.now();
      await handle.write(Buffer.alloc(1024, index));
      await handle.sync();
      took.push(performance.now() - start);
    }
    return percentile(took, 0.5);
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

export function ms(value: number): string {
  return `${value.toFixed(value < 10 ? 2 : 1)} ms`;
}

export function perSecond(value: number): string {
  return `${Math.round(value).toLocaleString('en-US')}/s`;
}
