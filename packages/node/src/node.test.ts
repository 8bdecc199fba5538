import { existsSync } from 'node:fs';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { MillraceError, defineRunner, type Runner, type TaskContext } from '@millrace/runner';
import { openDispatcher, openFileBlobs, openSqliteStore, type JobDetail } from '@millrace/dispatch';
import {
  connect,
  generatePrivateKeyHex,
  walletAddress,
  type JobEvent,
  type Requestor,
} from '@millrace/dispatch/client';
import { parseNodeEnv } from './config.ts';
import { createNode, type ComputeNode, type NodeOptions } from './node.ts';
import { memoryLog, never } from './simulation/scripted-dms.ts';

/** A dispatcher on a real socket with a folder of its own, and a requestor. */
interface System {
  readonly url: string;
  readonly requestor: Requestor;
  /** Makes credentials and a node that uses them. */
  node(
    runners: NodeOptions['runners'],
    options?: Partial<NodeOptions>,
    env?: Record<string, string>,
  ): Promise<TestNode>;
  submit(capability: string, more?: object): Promise<string>;
  /** Every event until the job has ended. */
  finished(jobId: string): Promise<JobDetail>;
  /** Resolves at the first event of this kind. */
  seen(jobId: string, kind: string): Promise<JobEvent>;
}

interface TestNode {
  readonly node: ComputeNode;
  readonly ended: Promise<void>;
  readonly log: ReturnType<typeof memoryLog>;
  readonly workDir: string;
}

let system: System;
let folder: string;
let closers: (() => Promise<unknown>)[];

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'millrace-node-'));
  closers = [];
  const store = await openSqliteStore({ path: join(folder, 'store.db'), leaseTtlMs: 3_000 });
  const blobs = await openFileBlobs({ dir: join(folder, 'blobs') });
  const dispatcher = await openDispatcher({ store, blobs, port: 0 });
  const requestor = connect({ url: dispatcher.url, token: await dispatcher.issueClientToken() });
  closers.push(
    () => requestor.close(),
    () => dispatcher.close(),
    async () => await blobs[Symbol.asyncDispose](),
    async () => await store[Symbol.asyncDispose](),
    () => rm(folder, { recursive: true, force: true }),
  );
  let names = 0;
  system = {
    url: dispatcher.url,
    requestor,
    async node(runners, options = {}, env = {}) {
      names += 1;
      const { registrationCredentials } = await requestor.addNode({ name: `node-${names}`, mode: 'public' });
      const log = memoryLog();
      const workDir = join(folder, `work-${names}`);
      const node = createNode({
        config: parseNodeEnv({
          DDS_BASE_URL: dispatcher.url,
          DMS_BASE_URL: `${dispatcher.url}/v1`,
          REG_SECRET: registrationCredentials,
          SECP256K1_PRIVHEX: generatePrivateKeyHex(),
          TOKEN_REAUTH_MAX_RETRIES: '0',
          ...env,
        }),
        runners,
        workDir,
        log,
        ...options,
      });
      const ended = node.run();
      ended.catch(() => undefined);
      closers.unshift(async () => await node[Symbol.asyncDispose]());
      return { node, ended, log, workDir };
    },
    submit: (capability, more = {}) =>
      requestor.submit({ label: 'test', tasks: [{ label: 'one', capability, ...more }] }),
    async finished(jobId) {
      for await (const event of requestor.events(jobId)) void event;
      return await requestor.job(jobId);
    },
    async seen(jobId, kind) {
      for await (const event of requestor.events(jobId)) if (event.kind === kind) return event;
      throw new Error(`job ${jobId} ended without ${kind}`);
    },
  };
});

afterEach(async () => {
  for (const close of closers) await close();
});

const CAPABILITY = '/test/work/v1';
const runner = (run: Runner['run'], close?: () => Promise<void>): Runner =>
  defineRunner({ capability: CAPABILITY, run, ...(close === undefined ? {} : { close }) });
const untilAborted = (ctx: TaskContext): Promise<void> => never(ctx.signal);

async function kinds(jobId: string): Promise<string[]> {
  const seen: string[] = [];
  for await (const event of system.requestor.events(jobId)) seen.push(event.kind);
  return seen;
}

describe('a node against a dispatcher over HTTP', () => {
  test('does a task: input in, progress and log out, artifact kept, folder gone', async () => {
    const { node, workDir } = await system.node([
      runner(async (ctx) => {
        const [cid = ''] = ctx.lease.task.inputs_cids;
        const path = await ctx.input.materializeCidToTemp(cid);
        expect(existsSync(path)).toBe(true);
        const bytes = await ctx.input.getBytesByCid(cid);
        await ctx.ctrl.progress({ pct: 50 });
        ctx.log.info('half way', { bytes: bytes.length });
        await ctx.output.putBytes(
          'out.txt',
          new TextEncoder().encode(Buffer.from(bytes).toString().toUpperCase()),
        );
      }),
    ]);
    const { domainId } = await system.requestor.health();
    const input = await system.requestor.storage.put(
      domainId,
      { name: 'input', dataType: 'text' },
      new TextEncoder().encode('hello'),
    );
    const jobId = await system.submit(CAPABILITY, { inputs_cids: [input?.id] });
    const { job, tasks } = await system.finished(jobId);
    expect(job.status).toBe('completed');
    expect(await kinds(jobId)).toEqual([
      'job.submitted',
      'task.runnable',
      'job.running',
      'task.leased',
      'task.running',
      'task.progress',
      'task.completed',
      'job.completed',
    ]);
    const [task] = tasks;
    expect(task?.output_cids).toHaveLength(1);
    const { bytes } = await system.requestor.taskLog(task?.id ?? '');
    const [line = ''] = Buffer.from(bytes).toString().split('\n');
    expect(JSON.parse(line)).toMatchObject({ level: 'info', text: 'half way', fields: { bytes: 5 } });
    expect(node.state).toBe('running');
    await expect.poll(() => node.active).toBe(0);
    const [root = ''] = await readdir(workDir);
    expect(await readdir(join(workDir, root))).toEqual(['owner.json']);
  });

  test('runs as many tasks at once as it may, and no more', async () => {
    let most = 0;
    let now = 0;
    let release: () => void = () => undefined;
    const gate = new Promise<void>((resolve) => (release = resolve));
    const { node } = await system.node(
      [
        runner(async () => {
          now += 1;
          most = Math.max(most, now);
          if (now === 3) release();
          await gate;
          await new Promise((resolve) => setImmediate(resolve));
          now -= 1;
        }),
      ],
      {},
      { MAX_CONCURRENCY: '3' },
    );
    const jobId = await system.requestor.submit({
      label: 'many',
      tasks: Array.from({ length: 12 }, (_, i) => ({ label: `t${i}`, stage: 's', capability: CAPABILITY })),
    });
    expect((await system.finished(jobId)).job.status).toBe('completed');
    expect(most).toBe(3);
    expect(node.state).toBe('running');
  });

  test('reports a failure with its causes', async () => {
    await system.node([
      runner(() =>
        Promise.reject(new MillraceError('invalid_argument', 'no picture', { cause: new Error('empty') })),
      ),
    ]);
    const { job, tasks } = await system.finished(await system.submit(CAPABILITY));
    expect(job.status).toBe('failed');
    expect(tasks[0]).toMatchObject({
      status: 'failed',
      attempts: 1,
      reason: 'runner failed: no picture: empty',
    });
  });

  test('hears of a cancel within moments and lets go when the work is gone', async () => {
    let signal: AbortSignal | null = null;
    await system.node([
      runner((ctx) => {
        signal = ctx.signal;
        return untilAborted(ctx);
      }),
    ]);
    const jobId = await system.submit(CAPABILITY);
    await system.seen(jobId, 'task.running');
    await expect.poll(() => signal).not.toBeNull();
    const startedAt = performance.now();
    await system.requestor.cancel(jobId);
    expect((await system.finished(jobId)).job.status).toBe('canceled');
    expect(performance.now() - startedAt).toBeLessThan(5_000);
    expect(signal!.reason).toMatchObject({ reason: 'canceled' });
  });

  test('outlives leases: a task of several lease times is done once', async () => {
    await system.node([
      runner(async (ctx) => {
        for (let i = 0; i < 4; i += 1) {
          await ctx.ctrl.progress({ i });
          await new Promise((resolve) => setTimeout(resolve, 1_200));
        }
      }),
    ]);
    const { tasks } = await system.finished(await system.submit(CAPABILITY));
    expect(tasks[0]).toMatchObject({ status: 'completed', attempts: 1, node_faults: 0 });
  }, 30_000);

  test('takes over what a node gives back when it stops, and the attempt does not count', async () => {
    const first = await system.node([runner(untilAborted)], { drainMs: 0 });
    const jobId = await system.submit(CAPABILITY, { max_attempts: 1 });
    await system.seen(jobId, 'task.running');
    first.node.stop();
    await first.ended;
    expect(first.node.state).toBe('stopped');
    expect(await readdir(first.workDir)).toEqual([]);
    await system.node([runner(() => Promise.resolve())]);
    const { job, tasks } = await system.finished(jobId);
    expect(job.status).toBe('completed');
    expect(tasks[0]).toMatchObject({ attempts: 1, max_attempts: 1 });
    expect(await kinds(jobId)).toContain('task.released');
  });

  test('matches labels of the node and of its runners', async () => {
    const done: string[] = [];
    const labelled = (name: string): Runner => runner(() => Promise.resolve(void done.push(name)));
    await system.node([labelled('plain'), { runner: labelled('gpu'), labels: { gpu: 't4' } }], {
      labels: { zone: 'eu' },
    });
    const jobId = await system.submit(CAPABILITY, { capability_filters: { gpu: 't4', zone: 'eu' } });
    expect((await system.finished(jobId)).job.status).toBe('completed');
    expect(done).toEqual(['gpu']);
  });
});

describe('starting and stopping', () => {
  test('a bad key and a node without runners are refused at once', () => {
    const config = parseNodeEnv({ REG_SECRET: 'x', SECP256K1_PRIVHEX: generatePrivateKeyHex() });
    expect(() =>
      createNode({ config: { ...config, privateKeyHex: 'zz' }, runners: [runner(untilAborted)] }),
    ).toThrow(MillraceError);
    expect(() => createNode({ config, runners: [] })).toThrow(/no runners/);
    const node = createNode({ config, runners: [runner(untilAborted)] });
    expect(node.wallet).toBe(walletAddress(config.privateKeyHex));
    expect(node.state).toBe('idle');
  });

  test('a service that cannot be reached is waited for, and stop ends the wait', async () => {
    let closed = 0;
    const { node, ended } = await system.node(
      [runner(untilAborted, () => Promise.resolve(void (closed += 1)))],
      {},
      { DDS_BASE_URL: 'http://127.0.0.1:9' },
    );
    await expect.poll(() => node.state).toBe('registering');
    node.stop();
    await ended;
    expect(node.state).toBe('stopped');
    expect(closed).toBe(1);
    await expect(node.run()).rejects.toMatchObject({ code: 'failed_precondition' });
  });

  test('tells each runner once that it starts, waits for none of them with tasks, and for all in the end', async () => {
    const told: string[] = [];
    const starting = (capability: string, onNodeStart: Runner['onNodeStart']): Runner =>
      defineRunner({
        capability,
        run: () => Promise.resolve(),
        onNodeStart: async (host) => {
          told.push(capability);
          await onNodeStart?.(host);
        },
        close: () => Promise.resolve(void told.push(`closed ${capability}`)),
      });
    const slow = starting('/test/slow/v1', async ({ signal }) => {
      await never(signal).catch(() => undefined);
      told.push('ended');
    });
    const { node, ended, log } = await system.node([
      { runner: slow, labels: { a: '1' } },
      { runner: slow, labels: { a: '2' } },
      starting('/test/broken/v1', ({ log: lent }) => {
        lent.info('hello');
        return Promise.reject(new Error('no engine'));
      }),
    ]);
    const done = await system.finished(await system.submit('/test/slow/v1'));
    expect(done.job.status).toBe('completed');
    node.stop();
    await ended;
    expect(told.slice(0, 2)).toEqual(['/test/slow/v1', '/test/broken/v1']);
    expect(told.slice(2).toSorted()).toEqual(['closed /test/broken/v1', 'closed /test/slow/v1', 'ended']);
    expect(log.lines).toContainEqual({ level: 'info', message: 'hello', fields: {} });
    expect(log.lines).toContainEqual({
      level: 'warn',
      message: 'a runner is not ready yet; its tasks will try again',
      fields: { capability: '/test/broken/v1', error: 'no engine' },
    });
  });

  test('a work folder that cannot be used rejects run, and the runners are closed', async () => {
    let closed = 0;
    const { node, ended } = await system.node(
      [runner(untilAborted, () => Promise.resolve(void (closed += 1)))],
      {
        workDir: join(folder, 'store.db'),
      },
    );
    await expect(ended).rejects.toMatchObject({ code: 'failed_precondition' });
    expect(node.state).toBe('stopped');
    expect(closed).toBe(1);
  });

  test('has a token at the dispatcher while it runs, and none before and after', async () => {
    const seen: string[] = [];
    const { node, ended } = await system.node([
      runner(async () => {
        seen.push(await node.tokens.get());
      }),
    ]);
    await system.finished(await system.submit(CAPABILITY));
    const [token = ''] = seen;
    const answer = await fetch(`${system.url}/v1/computes/sha256/${'0'.repeat(64)}`, {
      headers: { authorization: `Bearer ${token}` },
    });
    expect(answer.status).toBe(404);
    node.stop();
    await ended;
    await expect(node.tokens.get()).rejects.toThrow('the node is not running');
  });

  test('disposing a node that never ran closes its runners', async () => {
    let closed = 0;
    const config = parseNodeEnv({ REG_SECRET: 'x', SECP256K1_PRIVHEX: generatePrivateKeyHex() });
    {
      await using node = createNode({
        config,
        runners: [runner(untilAborted, () => Promise.resolve(void (closed += 1)))],
      });
      expect(node.state).toBe('idle');
    }
    expect(closed).toBe(1);
  });

  test('disposing skips the drain and gives tasks back', async () => {
    const { node, ended } = await system.node([runner(untilAborted)], { drainMs: 3_600_000 });
    const jobId = await system.submit(CAPABILITY);
    await system.seen(jobId, 'task.running');
    await node[Symbol.asyncDispose]();
    await ended;
    expect((await system.requestor.job(jobId)).tasks[0]?.status).toBe('queued');
  });

  test('a task that ends within the drain time is completed', async () => {
    let finish: () => void = () => undefined;
    const { node, ended } = await system.node([
      runner(() => new Promise<void>((resolve) => (finish = resolve))),
    ]);
    const jobId = await system.submit(CAPABILITY);
    await system.seen(jobId, 'task.running');
    node.stop();
    expect(node.state).toBe('draining');
    finish();
    await ended;
    expect((await system.requestor.job(jobId)).tasks[0]?.status).toBe('completed');
  });
});
