/** A runner that never yields costs no lease, and cancelling it is proven to end it. */
import { stat } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { Requestor } from '@millrace/dispatch/client';
import {
  nodeCredentials,
  requestor,
  startDispatcher,
  startNode,
  temporaryFolder,
  until,
  type Program,
  type RunningDispatcher,
} from './system.ts';

const SPIN = fileURLToPath(new URL('./runners/spin.js', import.meta.url));

describe('a runner that blocks its thread', () => {
  const stack: AsyncDisposable[] = [];
  let folder: string;
  let dispatcher: RunningDispatcher;
  let node: Program;
  let client: Requestor;

  beforeAll(async () => {
    const temporary = await temporaryFolder();
    stack.push(temporary);
    folder = temporary.path;
    dispatcher = await startDispatcher(path.join(folder, 'data'));
    stack.push(dispatcher.program);
    node = await startNode(dispatcher, await nodeCredentials(dispatcher, 'spinner'), [SPIN], {
      workDir: path.join(folder, 'work'),
    });
    stack.push(node);
    client = requestor(dispatcher);
  });

  afterAll(async () => {
    await client?.close();
    for (const resource of stack.reverse()) await resource[Symbol.asyncDispose]();
  });

  test('for a minute keeps its lease and completes at the first attempt', { timeout: 120_000 }, async () => {
    const id = await client.submit({
      tasks: [{ capability: '/test/spin/v1', meta: { ms: 60_000, pulse: path.join(folder, 'minute') } }],
    });
    const kinds: string[] = [];
    for await (const event of client.events(id)) kinds.push(event.kind);
    const detail = await client.job(id);
    expect(detail.job.status).toBe('completed');
    expect(detail.tasks[0]).toMatchObject({ attempts: 1, node_faults: 0 });
    expect(detail.receipts.map((receipt) => receipt.outcome)).toEqual(['completed']);
    expect(kinds.filter((kind) => kind === 'task.leased')).toHaveLength(1);
    expect(kinds).not.toContain('task.expired');
  });

  test('for ever is gone once its job is canceled', { timeout: 60_000 }, async () => {
    const pulse = path.join(folder, 'for-ever');
    const id = await client.submit({
      tasks: [{ capability: '/test/spin/v1', meta: { ms: null, pulse } }],
    });
    const size = async (): Promise<number> => (await stat(pulse).catch(() => ({ size: 0 }))).size;
    await until(async () => (await size()) > 5);
    await client.cancel(id);
    for await (const event of client.events(id)) void event;
    const detail = await client.job(id);
    expect(detail.job.status).toBe('canceled');
    expect(detail.receipts.map((receipt) => receipt.outcome)).toEqual(['canceled']);
    const sizeWhenCanceled = await size();
    // Many times its pulse: a survivor would show.
    await new Promise((resolve) => setTimeout(resolve, 1000));
    expect(await size()).toBe(sizeWhenCanceled);
    expect(node.exitCode).toBe(null);
  });
});
