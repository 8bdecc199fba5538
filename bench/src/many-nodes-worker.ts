/**
 * A process full of nodes for `many-nodes.ts`, each a real one: registration, login, long polls, leases and heartbeats through our
 * client. Their work is to note that it was entered, or to hold its lease until told. What their requests take is read from
 * undici's diagnostics channels, so nothing of theirs is changed.
 */
import diagnostics from 'node:diagnostics_channel';
import { once } from 'node:events';
import path from 'node:path';
import { createLogger, createNode, parseNodeEnv } from '@millrace/node';
import { TaskAbort, defineRunner } from '@millrace/runner';
import { HOLD, QUICK, type FromParent, type ToParent, type WorkerStart } from './many-nodes-protocol.ts';

interface Sent {
  readonly path: string;
}

const say = (message: ToParent): void => void process.send?.(message);
const now = (): number => performance.timeOrigin + performance.now();

let heartbeats: { taskId: string; endedAtMs: number; tookMs: number }[] = [];
let failures = 0;
let logins = 0;
let connections = 0;
const begun = new WeakMap<object, number>();
diagnostics.subscribe('undici:request:create', (message) => {
  begun.set((message as { request: object }).request, now());
});
diagnostics.subscribe('undici:request:headers', (message) => {
  const { request, response } = message as { request: Sent; response: { statusCode: number } };
  if (response.statusCode >= 400) failures += 1;
  else if (request.path.endsWith('/siwe/verify')) logins += 1;
  const [, taskId] = /\/tasks\/([^/]+)\/heartbeat$/.exec(request.path) ?? [];
  if (taskId === undefined || response.statusCode !== 200) return;
  const endedAtMs = now();
  heartbeats.push({ taskId, endedAtMs, tookMs: endedAtMs - (begun.get(request) ?? endedAtMs) });
});
diagnostics.subscribe('undici:request:error', () => (failures += 1));
diagnostics.subscribe('undici:client:connected', () => (connections += 1));

let finish!: () => void;
const finished = new Promise<void>((resolve) => (finish = resolve));
let holding = 0;
const runners = [
  defineRunner({
    capability: QUICK,
    run({ lease }) {
      say({ kind: 'entered', taskId: lease.task.id, atMs: now() });
      return Promise.resolve();
    },
  }),
  defineRunner({
    capability: HOLD,
    async run({ lease, signal }) {
      holding += 1;
      try {
        const aborted = new Promise<void>((resolve) => {
          signal.addEventListener('abort', () => resolve(), { once: true });
        });
        await Promise.race([finished, aborted]);
        if (!signal.aborted) return;
        const reason = TaskAbort.is(signal.reason) ? signal.reason.reason : 'unknown';
        say({ kind: 'aborted', taskId: lease.task.id, reason });
        throw signal.reason;
      } finally {
        holding -= 1;
      }
    },
  }),
];

const [{ url, workDir, nodes: credentials }] = (await once(process, 'message')) as [WorkerStart];
const log = createLogger({ format: 'json', level: 'error' });
const nodes = credentials.map((node, index) =>
  createNode({
    config: parseNodeEnv({
      DDS_BASE_URL: url,
      DMS_BASE_URL: `${url}/v1`,
      REG_SECRET: node.registrationCredentials,
      SECP256K1_PRIVHEX: node.privateKeyHex,
    }),
    runners,
    workDir: path.join(workDir, String(index)),
    log,
  }),
);
const residentMiB = (): number => process.memoryUsage.rss() / 1024 ** 2;
process.on('message', (message: FromParent) => {
  if (message.kind === 'finish') finish();
  else if (message.kind === 'stop') process.exit(0);
  else {
    const report = { heartbeats, failures, logins, connections, residentMiB: residentMiB(), holding };
    heartbeats = [];
    failures = 0;
    logins = 0;
    connections = 0;
    say({ kind: 'report', report });
  }
});
say({ kind: 'ready', residentMiB: residentMiB() });
for (const node of nodes) {
  node.run().catch((error: unknown) => say({ kind: 'gave-up', error: String(error) }));
}
