/**
 * A thousand nodes at one dispatcher, all behind one address: they start at once, wait, hold a lease each, and keep it while the
 * dispatcher is killed and started again. The nodes are real ones in this process; what they and the dispatcher say is
 * counted, not how long it takes.
 */
import diagnostics from 'node:diagnostics_channel';
import { setMaxListeners } from 'node:events';
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { expect, test } from 'vitest';
import { generatePrivateKeyHex } from '@millrace/dispatch/client';
import { createNode, parseNodeEnv, type ComputeNode } from '@millrace/node';
import { defineRunner } from '@millrace/runner';
import { Program, closing, requestor, temporaryFolder, until, type RunningDispatcher } from './system.ts';

const NODES = 1_000;
const HOLD = '/test/hold/v1';
const QUIET = { debug() {}, info() {}, warn() {}, error() {}, child: () => QUIET };

/** Twice the default, so that a machine with much else to do tells of the rules and not of itself. */
const TTL_SECONDS = 30;

async function startDispatcher(dataDir: string, port = 0): Promise<RunningDispatcher> {
  const serve = ['dispatch', 'serve', '--port', String(port), '--data', dataDir];
  const program = new Program([...serve, '--lease-ttl', String(TTL_SECONDS)]);
  const { url } = JSON.parse(await program.firstLine()) as { url: string };
  return { program, url, token: (await readFile(path.join(dataDir, 'client-token'), 'utf8')).trim() };
}

interface Seen {
  readonly request: { readonly path: string };
  readonly response: { readonly statusCode: number };
}

/** Requests of this process that were answered with success, by what they are. */
function watchRequests() {
  const seen = { logins: 0, renewed: new Set<string>() };
  const onAnswer = (message: unknown): void => {
    const { request, response } = message as Seen;
    if (response.statusCode !== 200) return;
    if (request.path.endsWith('/siwe/verify')) seen.logins += 1;
    const [, taskId] = /\/tasks\/([^/]+)\/heartbeat$/.exec(request.path) ?? [];
    if (taskId !== undefined) seen.renewed.add(taskId);
  };
  diagnostics.subscribe('undici:request:headers', onAnswer);
  return Object.assign(seen, {
    [Symbol.dispose]: () => void diagnostics.unsubscribe('undici:request:headers', onAnswer),
  });
}

test('a thousand nodes start behind one address, and lose no lease when their dispatcher is killed', async () => {
  await using folder = await temporaryFolder();
  const dataDir = path.join(folder.path, 'data');
  const first = await startDispatcher(dataDir);
  await using _first = first.program;
  await using client = closing(requestor(first));
  using seen = watchRequests();

  const finished = new AbortController();
  setMaxListeners(0, finished.signal);
  const holding = new Set<string>();
  const aborted: unknown[] = [];
  const runner = defineRunner({
    capability: HOLD,
    async run({ lease, signal }) {
      holding.add(lease.task.id);
      await new Promise<void>((resolve) => {
        finished.signal.addEventListener('abort', () => resolve(), { once: true });
        signal.addEventListener('abort', () => resolve(), { once: true });
      });
      holding.delete(lease.task.id);
      if (signal.aborted) aborted.push(signal.reason);
      signal.throwIfAborted();
    },
  });
  const gaveUp: unknown[] = [];
  const nodes: ComputeNode[] = [];
  for (let begun = 0; begun < NODES; begun += 50) {
    const added = await Promise.all(
      Array.from({ length: 50 }, (_, index) =>
        client.value.addNode({ name: `node-${begun + index}`, mode: 'public' }),
      ),
    );
    for (const [index, { registrationCredentials }] of added.entries()) {
      nodes.push(
        createNode({
          config: parseNodeEnv({
            DDS_BASE_URL: first.url,
            DMS_BASE_URL: `${first.url}/v1`,
            REG_SECRET: registrationCredentials,
            SECP256K1_PRIVHEX: generatePrivateKeyHex(),
          }),
          runners: [runner],
          workDir: path.join(folder.path, `work-${begun + index}`),
          log: QUIET,
        }),
      );
    }
  }
  const metric = async (name: string): Promise<number> => {
    const text = await (await fetch(`${first.url}/metrics`)).text();
    return Number(new RegExp(`^${name} (\\d+)`, 'm').exec(text)?.[1]);
  };
  const ended = nodes.map((node) => node.run().catch((error: unknown) => void gaveUp.push(error)));
  try {
    // One address may begin a thousand registrations and logins at once and a hundred a second, and each node needs one of each: many
    // are told to come later, unless this machine is so slow that they do by themselves.
    await until(async () => (await metric('millrace_lease_waiters')) === NODES, 150_000);
    expect(seen.logins).toBe(NODES);
    expect(gaveUp).toEqual([]);

    const jobId = await client.value.submit({
      tasks: Array.from({ length: NODES }, () => ({ capability: HOLD, stage: 'hold', max_attempts: 1 })),
    });
    await until(() => holding.size === NODES, 60_000);
    expect(await metric('millrace_lease_waiters')).toBe(0);

    await first.program.kill('SIGKILL');
    const second = await startDispatcher(dataDir, Number(new URL(first.url).port));
    await using _second = second.program;
    seen.renewed.clear();
    // Tokens outlive the dispatcher, so that nobody has to log in again.
    await until(() => seen.renewed.size === NODES, 60_000);
    expect(seen.logins).toBe(NODES);
    expect(holding.size).toBe(NODES);

    finished.abort();
    const kinds = new Map<string, number>();
    for await (const { kind } of client.value.events(jobId)) kinds.set(kind, (kinds.get(kind) ?? 0) + 1);
    const { job, tasks } = await client.value.job(jobId);
    expect(job.status).toBe('completed');
    expect(tasks.every(({ attempts }) => attempts === 1)).toBe(true);
    expect(kinds.get('task.expired')).toBeUndefined();
    expect(aborted).toEqual([]);
    expect(gaveUp).toEqual([]);
  } finally {
    finished.abort();
    await Promise.all(nodes.map((node) => node[Symbol.asyncDispose]()));
    await Promise.all(ended);
  }
}, 400_000);
