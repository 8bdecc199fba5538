/** What several figures need: a dispatcher in a process of its own, a registered node, percentiles. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
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
}

/** `millrace dispatch serve` as its own process over a new folder, removed afterwards. */
export async function startDispatcher(): Promise<BenchDispatcher> {
  const dataDir = await mkdtemp(path.join(tmpdir(), 'millrace-bench-'));
  const child: ChildProcess = spawn(
    process.execPath,
    [MAIN, 'dispatch', 'serve', '--port', '0', '--data', dataDir],
    { stdio: ['ignore', 'pipe', 'ignore'] },
  );
  const lines = createInterface({ input: child.stdout! });
  const [line] = (await once(lines, 'line')) as [string];
  const { url } = JSON.parse(line) as { url: string };
  const token = (await readFile(path.join(dataDir, 'client-token'), 'utf8')).trim();
  const client = connect({ url, token, timeoutMs: 120_000 });
  return {
    url,
    client,
    dataDir,
    async [Symbol.asyncDispose]() {
      await client.close();
      child.kill('SIGKILL');
      if (child.exitCode === null && child.signalCode === null) await once(child, 'exit');
      await rm(dataDir, { recursive: true, force: true });
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

export function ms(value: number): string {
  return `${value.toFixed(value < 10 ? 2 : 1)} ms`;
}

export function perSecond(value: number): string {
  return `${Math.round(value).toLocaleString('en-US')}/s`;
}
