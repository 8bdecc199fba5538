/** A node that loses contact with its dispatcher keeps what nobody else took, and is told of what somebody did. */
import { mkdir, readFile, readdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, test } from 'vitest';
import type { JobDetail, Requestor } from '@millrace/dispatch/client';
import { TcpProxy } from './faults/proxies.ts';
import {
  Program,
  closing,
  nodeCredentials,
  requestor,
  startNode,
  temporaryFolder,
  until,
  type RunningDispatcher,
} from './system.ts';

const HOLD = fileURLToPath(new URL('./runners/hold.js', import.meta.url));
const TTL_SECONDS = 2;

interface Scene extends AsyncDisposable {
  readonly dispatcher: RunningDispatcher;
  readonly client: Requestor;
  /** Starts a node whose way to the dispatcher can be cut. */
  node(name: string, env?: Readonly<Record<string, string>>): Promise<TcpProxy>;
  /** Submits a task that holds, and waits until it is begun. */
  hold(): Promise<string>;
  /** What the runs of it have written, in the order of their files' names. */
  runs(): Promise<string[]>;
  /** Lets the runs come to their end. */
  release(): Promise<void>;
  kinds(jobId: string): Promise<string[]>;
  ended(jobId: string): Promise<JobDetail>;
}

async function openScene(): Promise<Scene> {
  const folder = await temporaryFolder();
  const data = path.join(folder.path, 'data');
  const args = ['dispatch', 'serve', '--port', '0', '--data', data, '--lease-ttl', String(TTL_SECONDS)];
  const program = new Program(args);
  const { url } = JSON.parse(await program.firstLine()) as { url: string };
  const token = (await readFile(path.join(data, 'client-token'), 'utf8')).trim();
  const dispatcher: RunningDispatcher = { program, url, token };
  const client = requestor(dispatcher);
  const stack: AsyncDisposable[] = [folder, closing(client), program];
  const work = path.join(folder.path, 'held');
  await mkdir(work);
  const scene: Scene = {
    dispatcher,
    client,
    async node(name, env = {}) {
      const way = await TcpProxy.open(Number(new URL(url).port));
      stack.push(way);
      const credentials = await nodeCredentials(dispatcher, name);
      stack.push(
        await startNode(
          dispatcher,
          { ...credentials, DMS_BASE_URL: `http://127.0.0.1:${way.port}/v1`, ...env },
          [HOLD],
          {
            workDir: path.join(folder.path, name),
          },
        ),
      );
      return way;
    },
    async hold() {
      const jobId = await client.submit({
        label: 'held',
        tasks: [{ label: 'hold', capability: '/test/hold/v1', meta: { folder: work } }],
      });
      await until(async () => (await scene.runs()).length === 1);
      return jobId;
    },
    async runs() {
      const names = (await readdir(work)).filter((name) => name.startsWith('run-')).toSorted();
      return await Promise.all(names.map((name) => readFile(path.join(work, name), 'utf8')));
    },
    release: () => writeFile(path.join(work, 'go'), ''),
    async kinds(jobId) {
      const kinds: string[] = [];
      for await (const { kind } of client.events(jobId, { follow: false })) kinds.push(kind);
      return kinds;
    },
    async ended(jobId) {
      await until(async () => (await client.job(jobId)).job.status !== 'running', 30_000);
      return await client.job(jobId);
    },
    async [Symbol.asyncDispose]() {
      for (const one of stack.toReversed()) await one[Symbol.asyncDispose]();
    },
  };
  return scene;
}

describe('a node that loses contact', { timeout: 90_000 }, () => {
  test('goes on for two lifetimes of its lease, and its completion counts', async () => {
    await using scene = await openScene();
    const way = await scene.node('alone');
    const jobId = await scene.hold();
    way.cut();
    await until(async () => (await scene.kinds(jobId)).includes('task.expired'));
    const [before = ''] = await scene.runs();
    await new Promise((resolve) => setTimeout(resolve, 2 * TTL_SECONDS * 1000));
    const [after = ''] = await scene.runs();
    expect(after).toMatch(/^\.+$/);
    expect(after.length).toBeGreaterThan(before.length);
    expect((await scene.client.job(jobId)).tasks).toMatchObject([{ status: 'queued', reserved_by: null }]);
    way.heal();
    await until(async () => (await scene.kinds(jobId)).includes('task.resumed'));
    await scene.release();
    const { job, tasks, receipts } = await scene.ended(jobId);
    expect(job.status).toBe('completed');
    expect(tasks).toMatchObject([{ attempts: 1, node_faults: 0 }]);
    expect(receipts.map(({ outcome }) => outcome)).toEqual(['completed']);
    expect(await scene.runs()).toEqual([expect.stringMatching(/^\.+done$/)]);
  });

  test('reports what it finished meanwhile', async () => {
    await using scene = await openScene();
    const way = await scene.node('alone');
    const jobId = await scene.hold();
    way.cut();
    await until(async () => (await scene.kinds(jobId)).includes('task.expired'));
    await scene.release();
    await until(async () => (await scene.runs())[0]?.endsWith('done') === true);
    expect((await scene.client.job(jobId)).tasks).toMatchObject([{ status: 'queued' }]);
    way.heal();
    const { job, tasks, receipts } = await scene.ended(jobId);
    expect(job.status).toBe('completed');
    expect(tasks).toMatchObject([{ attempts: 1, node_faults: 0 }]);
    expect(receipts.map(({ outcome }) => outcome)).toEqual(['completed']);
    expect(await scene.runs()).toHaveLength(1);
    const log = await scene.client.taskLog(tasks[0]!.id, { attempt: 1 });
    expect(Buffer.from(log.bytes).toString()).toContain('at last');
  });

  test('keeps its task over a dispatcher that stood still for two lifetimes of the lease', async () => {
    await using scene = await openScene();
    await scene.node('alone');
    const jobId = await scene.hold();
    const { child } = scene.dispatcher.program;
    child.kill('SIGSTOP');
    await new Promise((resolve) => setTimeout(resolve, 2 * TTL_SECONDS * 1000));
    child.kill('SIGCONT');
    await scene.release();
    const { tasks, receipts } = await scene.ended(jobId);
    expect(tasks).toMatchObject([{ status: 'completed', attempts: 1, node_faults: 0 }]);
    expect(receipts.map(({ outcome }) => outcome)).toEqual(['completed']);
    expect(await scene.runs()).toHaveLength(1);
  });

  test('is told when another node has its task, and stops; one completion counts', async () => {
    await using scene = await openScene();
    const way = await scene.node('first');
    const jobId = await scene.hold();
    await scene.node('second');
    way.cut();
    await until(async () => (await scene.runs()).length === 2);
    // Both are at work: that is the price.
    expect(await scene.runs()).toEqual([expect.stringMatching(/^\.+$/), expect.stringMatching(/^\.+$/)]);
    way.heal();
    await until(async () => (await scene.runs()).some((run) => run.endsWith('stopped: lease_lost')));
    await scene.release();
    const { tasks, receipts } = await scene.ended(jobId);
    expect(tasks).toMatchObject([{ status: 'completed', attempts: 1, node_faults: 1 }]);
    expect(receipts.map(({ outcome }) => outcome)).toEqual(['expired', 'completed']);
    expect((await scene.runs()).filter((run) => run.endsWith('done'))).toHaveLength(1);
  });

  test('stops when its lease is over where that is wanted', async () => {
    await using scene = await openScene();
    const way = await scene.node('careful', { CONTACT_GRACE_SECONDS: '0' });
    const jobId = await scene.hold();
    way.cut();
    await until(async () => (await scene.runs())[0]?.endsWith('stopped: lease_lost') === true);
    way.heal();
    await scene.release();
    const { tasks, receipts } = await scene.ended(jobId);
    expect(tasks).toMatchObject([{ status: 'completed', attempts: 1, node_faults: 1 }]);
    expect(receipts.map(({ outcome }) => outcome)).toEqual(['expired', 'completed']);
  });
});
