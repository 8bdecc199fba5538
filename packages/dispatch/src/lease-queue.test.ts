import { setMaxListeners } from 'node:events';
import { systemClock } from '@millrace/runner';
import { SimulatedClock } from '@millrace/runner/testing';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { until } from './harness.test.support.ts';
import { parseJobSpec } from './job-spec.ts';
import { LeaseQueue } from './lease-queue.ts';
import { Signals } from './signals.ts';
import type { LeaseRequest, Standby, Store } from './store.ts';
import { openSqliteStore } from './stores/sqlite.ts';

const CAPABILITY = '/work/v1';
const NEVER = new AbortController().signal;
setMaxListeners(0, NEVER);

let store: Store;
let signals: Signals;
let queue: LeaseQueue;
/** How many lease requests the queue put to the store. */
let questions: number;
/** Called with the store's answer before the queue sees it. */
let beforeAnswer: () => void;
/** Whether the store grants within the commit that makes tasks runnable; one whose commit takes its time cannot. */
let standsBy: boolean;

beforeEach(async () => {
  standsBy = true;
  store = await openSqliteStore({ path: ':memory:' });
  questions = 0;
  beforeAnswer = () => {};
  const counting = new Proxy(store, {
    get(target, name) {
      if (name === 'lease') {
        return async (requests: readonly LeaseRequest[]) => {
          questions += requests.length;
          const answers = await target.lease(requests);
          beforeAnswer();
          return answers;
        };
      }
      if (name === 'standBy') {
        return (standby: Standby) =>
          target.standBy({
            requests: () => {
              const requests = standsBy ? standby.requests() : [];
              questions += requests.length;
              return requests;
            },
            granted: (outcomes) => standby.granted(outcomes),
          });
      }
      const value: unknown = Reflect.get(target, name);
      return typeof value === 'function' ? value.bind(target) : value;
    },
  });
  signals = new Signals(store);
  queue = new LeaseQueue({ store: counting, signals, clock: systemClock });
});
afterEach(async () => {
  await queue.close();
  signals[Symbol.dispose]();
  await store[Symbol.asyncDispose]();
});

async function addNode(capabilities: string[] = [CAPABILITY], maxConcurrency = 4): Promise<string> {
  const secretHash = Math.random().toString(16);
  const node = await store.createNode({
    name: 'n',
    mode: 'public',
    organizationId: '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21',
    secretHash,
  });
  await store.registerNode({
    nodeId: node.id,
    secretHash,
    wallet: `0x${node.id.replaceAll('-', '').padEnd(40, '0')}`,
    capabilities,
    labels: {},
    version: '1.0.0',
    maxConcurrency,
  });
  return node.id;
}

function ask(nodeId: string, options: { max?: number; waitMs?: number; signal?: AbortSignal } = {}) {
  return queue.lease(
    { nodeId, max: options.max ?? 1, capabilities: null, start: false },
    options.waitMs ?? 20_000,
    options.signal ?? NEVER,
  );
}

async function submit(count: number, capability = CAPABILITY): Promise<void> {
  const spec = parseJobSpec(
    { tasks: Array.from({ length: count }, () => ({ label: 't', capability, meta: {} })) },
    { defaultDomainId: '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21', maxTasks: 1000, now: Date.now() },
  );
  const [outcome] = await store.submit([
    { spec, organizationId: '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21', idempotencyKey: null, submitter: 's' },
  ]);
  expect(outcome?.ok).toBe(true);
}

describe.each([
  { how: 'where leases are part of the commit that makes tasks runnable', stands: true },
  { how: 'where the store is asked after it', stands: false },
])('waiting, $how', ({ stands }) => {
  beforeEach(() => {
    standsBy = stands;
  });

  test('a thousand waiting nodes and one new task cost a handful of questions', async () => {
    const nodes = await Promise.all(Array.from({ length: 1000 }, () => addNode()));
    const waiting = nodes.map((node) => ask(node));
    await until(() => queue.waiting === 1000);
    questions = 0;
    await submit(1);
    await until(() => queue.waiting === 999);
    // One that gets it, at most two that find there is no more.
    expect(questions).toBeLessThanOrEqual(3);
    await queue.close();
    const answers = await Promise.all(waiting);
    expect(answers.filter(({ leases }) => leases.length > 0)).toHaveLength(1);
  });

  test('many new tasks go to as many waiting nodes, for about as many questions', async () => {
    const nodes = await Promise.all(Array.from({ length: 200 }, () => addNode()));
    const waiting = nodes.map((node) => ask(node));
    await until(() => queue.waiting === 200);
    questions = 0;
    await submit(100);
    await until(() => queue.waiting === 100);
    expect(questions).toBeLessThanOrEqual(2 * 100 + 2);
    await queue.close();
    const answers = await Promise.all(waiting);
    const tasks = answers.flatMap(({ leases }) => leases.map((lease) => lease.task.id));
    expect(new Set(tasks).size).toBe(100);
    // First come, first served.
    expect(answers.slice(0, 100).every(({ leases }) => leases.length === 1)).toBe(true);
  });

  test('waiters for other work do not stand in the way', async () => {
    const other = ask(await addNode(['/other/v1']));
    const mine = ask(await addNode());
    await until(() => queue.waiting === 2);
    await submit(1);
    expect((await mine).leases).toHaveLength(1);
    expect(queue.waiting).toBe(1);
    await submit(1, '/other/v1');
    expect((await other).leases).toHaveLength(1);
  });

  test('a task submitted between the question and the wait is not missed', async () => {
    const node = await addNode();
    const submitted: Promise<void>[] = [];
    beforeAnswer = () => {
      if (submitted.length === 0) submitted.push(submit(1));
    };
    const { leases } = await ask(node);
    expect(leases).toHaveLength(1);
    await Promise.all(submitted);
  });

  test('a node that is busy when it is its turn hears so, and the next one gets the task', async () => {
    const busy = await addNode([CAPABILITY], 1);
    const first = ask(busy);
    const second = ask(busy);
    const third = ask(await addNode([CAPABILITY], 1));
    await until(() => queue.waiting === 3);
    await submit(2);
    expect((await first).leases).toHaveLength(1);
    expect(await second).toEqual({ leases: [], busy: true });
    expect((await third).leases).toHaveLength(1);
  });

  test('several leases are given at once', async () => {
    const waiting = ask(await addNode(), { max: 3 });
    await until(() => queue.waiting === 1);
    await submit(5);
    expect((await waiting).leases).toHaveLength(3);
  });

  test('without a wait, and when the time is up, the answer is empty', async () => {
    const node = await addNode();
    expect(await ask(node, { waitMs: 0 })).toEqual({ leases: [], busy: false });
    expect(await ask(node, { waitMs: 30 })).toEqual({ leases: [], busy: false });
    expect(queue.waiting).toBe(0);
  });

  test('a waiter that left is not counted and gets nothing', async () => {
    const controller = new AbortController();
    const waiting = ask(await addNode(), { signal: controller.signal });
    await until(() => queue.waiting === 1);
    controller.abort();
    expect(await waiting).toEqual({ leases: [], busy: false });
    expect(queue.waiting).toBe(0);
  });

  test('a task won for a waiter that left meanwhile goes back, uncounted, and to the next', async () => {
    // Nobody can leave within a commit.
    standsBy = false;
    const controller = new AbortController();
    const gone = ask(await addNode(), { signal: controller.signal });
    await until(() => queue.waiting === 1);
    beforeAnswer = () => controller.abort();
    await submit(1);
    expect((await gone).leases).toHaveLength(0);
    beforeAnswer = () => {};
    const next = await ask(await addNode());
    expect(next.leases).toHaveLength(1);
    expect(next.leases[0]!.task.attempts).toBe(1);
  });

  test('a node that nobody knows is told so', async () => {
    await expect(ask('2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10')).rejects.toMatchObject({ code: 'not_found' });
  });

  test('closing ends every wait with an empty answer', async () => {
    const waiting = [ask(await addNode()), ask(await addNode(['/other/v1']))];
    await until(() => queue.waiting === 2);
    await queue.close();
    expect(await Promise.all(waiting)).toEqual([
      { leases: [], busy: false },
      { leases: [], busy: false },
    ]);
    expect(await ask(await addNode())).toEqual({ leases: [], busy: false });
  });
});

test('of a thousand that wait, eight look every five seconds although nothing was signalled', async () => {
  const clock = new SimulatedClock();
  const nodes = await Promise.all(Array.from({ length: 1000 }, () => addNode()));
  let asked = 0;
  const deaf = new Proxy(store, {
    get(target, name) {
      if (name === 'standBy') return () => ({ [Symbol.dispose]() {} });
      if (name === 'lease') {
        return (requests: readonly LeaseRequest[]) => {
          asked += requests.length;
          return target.lease(requests);
        };
      }
      const value: unknown = Reflect.get(target, name);
      return typeof value === 'function' ? value.bind(target) : value;
    },
  });
  await using lone = new LeaseQueue({ store: deaf, signals: new Signals(deafTo(store)), clock });
  const waiting = nodes.map((nodeId) =>
    lone.lease({ nodeId, max: 1, capabilities: null, start: false }, 60_000, NEVER),
  );
  await until(() => lone.waiting === 1000);
  asked = 0;
  await submit(3);
  await clock.advance(4_999);
  expect(asked).toBe(0);
  await clock.advance(1);
  await until(() => lone.waiting === 997);
  expect(asked).toBe(8);
  await lone.close();
  const answers = await Promise.all(waiting);
  expect(answers.filter(({ leases }) => leases.length > 0)).toHaveLength(3);
});

/** A store that says nothing of its changes, as one does whose connection for news has gone. */
function deafTo(real: Store): Store {
  return new Proxy(real, {
    get(target, name) {
      if (name === 'subscribe') return () => ({ [Symbol.dispose]() {} });
      const value: unknown = Reflect.get(target, name);
      return typeof value === 'function' ? value.bind(target) : value;
    },
  });
}

test('a waiter whose question is with the store is not asked again by the commit that comes first', async () => {
  standsBy = false;
  const node = await addNode();
  const waiting = ask(node);
  await until(() => queue.waiting === 1);
  // The pump's question and the submission behind it run in one transaction, which then grants to those who stand by.
  const submitted: Promise<void>[] = [];
  using _ = signals.onRunnable(() => {
    if (submitted.length > 0) return;
    standsBy = true;
    submitted.push(submit(1));
  });
  await submit(1);
  expect((await waiting).leases).toHaveLength(1);
  await Promise.all(submitted);
  expect((await store.stats()).tasks).toMatchObject({ queued: 1, leased: 1 });
});
