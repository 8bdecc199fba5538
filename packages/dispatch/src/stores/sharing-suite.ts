/**
 * What any store must do for those who share it: domains take turns by weight, keys bound how many tasks run at once, and nodes
 * that say what they have are filled by amounts. A part of `suite.ts`.
 */
import { MillraceError } from '@millrace/runner';
import { describe, expect, test, vi } from 'vitest';
import { MAX_WEIGHT } from '../records.ts';
import type { TaskSubmission } from '../records.ts';
import type { GrantedLease, Store, StoreChange } from '../store.ts';
import { OVERTAKING_MS } from './fitting.ts';
import { jobOf, refOf, valueOf } from './suite.ts';
import type { Scene } from './suite.ts';

/** What a test is given, afresh for each. */
export interface SharingWorld {
  readonly scene: Scene;
  readonly store: Store;
  /** Lets time pass. */
  readonly wait: (ms: number) => void;
  /** RFC 3339, so long from now. */
  readonly at: (ms: number) => string;
}

// In the order of their turns when all are as far.
const A = 'aaaaaaaa-0000-4000-8000-000000000000';
const B = 'bbbbbbbb-0000-4000-8000-000000000000';
const C = 'cccccccc-0000-4000-8000-000000000000';
const NAMES: Readonly<Record<string, string>> = { [A]: 'A', [B]: 'B', [C]: 'C' };

/** Of the suite's stores. */
const TTL = 15_000;

export function sharingSuite(world: () => SharingWorld): void {
  function some(count: number, task: Partial<TaskSubmission> = {}): Partial<TaskSubmission>[] {
    return Array.from({ length: count }, (_, index) => ({ ...task, label: `${task.label ?? 't'}${index}` }));
  }

  const domainsOf = (leases: readonly GrantedLease[]): string =>
    leases.map(({ domainId }) => NAMES[domainId] ?? domainId).join('');
  const labelsOf = (leases: readonly GrantedLease[]): string[] =>
    leases.map(({ task }) => task.label ?? '').toSorted();

  /** Leases one at a time, `count` times; those of no avail are left out. */
  async function oneByOne(node: string, count: number): Promise<GrantedLease[]> {
    const leases: GrantedLease[] = [];
    for (let asked = 0; asked < count; asked += 1) leases.push(...(await world().scene.lease(node)));
    return leases;
  }

  async function labelsGiven(node: string, max = 100): Promise<string[]> {
    return labelsOf(await world().scene.lease(node, max));
  }

  async function codeOf(promise: Promise<unknown>): Promise<string> {
    return await promise.then(
      () => 'ok',
      (error: unknown) => MillraceError.from(error).code,
    );
  }

  /** Whether `work` made the store say that there is something to lease. */
  async function wakes(work: () => Promise<unknown>): Promise<void> {
    const heard: StoreChange['kind'][] = [];
    using _ = world().store.subscribe(({ kind }) => void heard.push(kind));
    await work();
    await vi.waitFor(() => expect(heard).toContain('runnable'), { timeout: 10_000 });
  }

  describe('domains take turns', () => {
    test('domains of one weight get a task each in turn, whoever came first', async () => {
      const { scene } = world();
      const node = await scene.node();
      await scene.submit(some(6), { domain_id: C });
      await scene.submit(some(6), { domain_id: A });
      expect(domainsOf(await scene.lease(node, 8))).toBe('ACACACAC');
      await scene.submit(some(6), { domain_id: B });
      // The others have just been served: it may be first, and has no more than that for coming late.
      expect(domainsOf(await scene.lease(node, 9))).toMatch(/^B?(?:ABC|ACB|BAC|BCA|CAB|CBA){2}/);
    });

    test('weights 1 and 3 are one task to three, in one batch and one at a time', async () => {
      const { scene, store } = world();
      const node = await scene.node();
      await store.setWeight(B, 3);
      await scene.submit(some(20), { domain_id: A });
      await scene.submit(some(40), { domain_id: B });
      expect(domainsOf(await scene.lease(node, 16))).toBe('ABBBABBBABBBABBB');
      expect(domainsOf(await oneByOne(node, 16))).toBe('ABBBABBBABBBABBB');
    });

    test('over a long backlog shares are the weights exactly', async () => {
      const { scene, store } = world();
      const node = await scene.node({ max: 1000 });
      await store.setWeight(A, 7);
      await store.setWeight(C, 2);
      for (const domain_id of [A, B, C]) await scene.submit(some(220), { domain_id });
      const given = domainsOf(await scene.lease(node, 300));
      expect(['A', 'B', 'C'].map((name) => given.split(name).length - 1)).toEqual([210, 30, 60]);
    });

    test('priority and age order a domain, and move it no further ahead of others', async () => {
      const { scene } = world();
      const node = await scene.node();
      await scene.submit(
        [{ label: 'low' }, { label: 'high', priority: 100 }, { label: 'higher', priority: 101 }],
        {
          domain_id: B,
        },
      );
      await scene.submit([{ label: 'old' }, { label: 'new' }], { domain_id: A });
      const leases = await scene.lease(node, 5);
      expect(leases.map(({ task }) => task.label)).toEqual(['old', 'higher', 'new', 'high', 'low']);
    });

    test('a domain that was idle has saved up no turns', async () => {
      const { scene } = world();
      const node = await scene.node();
      await scene.submit(some(40), { domain_id: B });
      expect(await scene.lease(node, 20)).toHaveLength(20);
      await scene.submit(some(20), { domain_id: A });
      expect(domainsOf(await scene.lease(node, 10))).toMatch(/^A?(?:AB|BA){4,5}[AB]?$/);
    });

    test('a domain with work for other nodes only is no obstacle, and gets no more for it later', async () => {
      const { scene } = world();
      const node = await scene.node();
      await scene.submit(some(30, { capability: '/rare/v1' }), { domain_id: A });
      await scene.submit(some(30), { domain_id: B });
      expect(domainsOf(await scene.lease(node, 10))).toBe('B'.repeat(10));
      const both = await scene.node({ capabilities: ['/rare/v1', '/test/work/v1'] });
      expect(domainsOf(await scene.lease(both, 10))).toMatch(/^A?(?:AB|BA){4,5}[AB]?$/);
    });

    test('work that a node is meant for comes first, whoever is next', async () => {
      const { scene } = world();
      const node = await scene.node({ organizationId: 'org-1' });
      await scene.submit(some(3), { domain_id: A }, 'org-2');
      await scene.submit(some(3), { domain_id: B }, 'org-1');
      expect(domainsOf(await scene.lease(node, 6))).toBe('BBBAAA');
    });

    test('several nodes in one call are served from the same rounds', async () => {
      const { scene, store } = world();
      const nodes = [await scene.node(), await scene.node()];
      for (const domain_id of [A, B]) await scene.submit(some(10), { domain_id });
      const outcomes = await store.lease(
        nodes.map((nodeId) => ({ nodeId, max: 3, capabilities: null, start: true })),
      );
      expect(domainsOf(outcomes.flatMap((outcome) => valueOf(outcome).leases))).toBe('ABABAB');
    });

    const many = (count: number): string[] =>
      Array.from(
        { length: count },
        (_, index) => `${String(index).padStart(8, '0')}-0000-4000-8000-000000000000`,
      );

    test('of many domains each has its turn before any has a second one', async () => {
      const { scene, store } = world();
      const node = await scene.node({ max: 1000 });
      const domains = many(120);
      await store.submit(
        domains.map((domain_id) => ({
          spec: jobOf(some(3), { domain_id }),
          organizationId: null,
          idempotencyKey: null,
          submitter: 'tester',
        })),
      );
      const given = [
        ...(await scene.lease(node, 50)),
        ...(await oneByOne(node, 10)),
        ...(await scene.lease(node, 60)),
      ];
      expect(given.map(({ domainId }) => domainId).toSorted()).toEqual(domains);
      const rest = await scene.lease(node, 500);
      expect(
        rest
          .slice(0, 120)
          .map(({ domainId }) => domainId)
          .toSorted(),
      ).toEqual(domains);
      expect(rest).toHaveLength(240);
    });

    test('domains with nothing that fits are passed over, however many', async () => {
      const { scene, store } = world();
      const node = await scene.node({ resources: { cpu: 4 } });
      await scene.submit(some(3));
      await scene.lease(node, 3);
      await store.submit(
        [...many(100), A].map((domain_id) => ({
          spec: jobOf(
            [
              { label: domain_id, resources: { cpu: domain_id === A ? 0.5 : 2 } },
              { label: 'too large', resources: { cpu: 4 } },
            ],
            { domain_id },
          ),
          organizationId: null,
          idempotencyKey: null,
          submitter: 'tester',
        })),
      );
      expect(await labelsGiven(node, 1)).toEqual([A]);
      expect(await labelsGiven(node, 9)).toEqual([]);
    });

    test('a weight is a whole number from 1 to 1000, and 1 is that of any domain', async () => {
      const { store } = world();
      for (const weight of [0, -1, 1.5, MAX_WEIGHT + 1, Number.NaN]) {
        expect(await codeOf(store.setWeight(A, weight))).toBe('invalid_argument');
      }
      expect(await store.domains()).toEqual([]);
      await store.setWeight(B, MAX_WEIGHT);
      await store.setWeight(A, 2);
      expect(await store.domains()).toEqual([
        { domain_id: A, weight: 2, ready: 0, held: 0 },
        { domain_id: B, weight: 1000, ready: 0, held: 0 },
      ]);
      await store.setWeight(A, 1);
      expect((await store.domains()).map(({ domain_id }) => domain_id)).toEqual([B]);
    });

    test('domains are told with what waits there and what is held', async () => {
      const { scene, store } = world();
      const node = await scene.node();
      await scene.submit(some(3), { domain_id: B });
      await scene.submit(some(2, { concurrency: { key: 'k', limit: 1 } }), { domain_id: A });
      await scene.lease(node, 3);
      expect(await store.domains()).toEqual([
        { domain_id: A, weight: 1, ready: 1, held: 1 },
        { domain_id: B, weight: 1, ready: 1, held: 2 },
      ]);
    });

    test('where a task stands is told among the tasks of its domain', async () => {
      const { scene, store } = world();
      await scene.node();
      await scene.submit(some(5, { priority: 9 }), { domain_id: A });
      await scene.submit([{ label: 'high', priority: 3 }, { label: 'old' }], { domain_id: B });
      const id = await scene.submit([{}], { domain_id: B });
      const [task] = (await scene.job(id)).tasks;
      expect((await store.standing(task?.id ?? ''))?.ahead).toEqual({ higherPriority: 1, older: 1 });
    });
  });

  describe('concurrency limits by key', () => {
    const keyed = (key: string, limit: number): Partial<TaskSubmission> => ({ concurrency: { key, limit } });

    test('as many tasks of a key are held as the limit says, and not one more', async () => {
      const { scene } = world();
      const [node, other] = [await scene.node(), await scene.node()];
      await scene.submit(some(5, keyed('k', 2)));
      const [first] = await scene.lease(node, 1);
      expect(await labelsGiven(other)).toEqual(['t1']);
      expect(await labelsGiven(node)).toEqual([]);
      await scene.complete(refOf(first!));
      expect(await labelsGiven(other)).toEqual(['t2']);
      expect(await labelsGiven(node)).toEqual([]);
    });

    test('a key at its limit hides nothing behind it', async () => {
      const { scene, store } = world();
      const node = await scene.node({ max: 1000 });
      await scene.submit(some(2000, { ...keyed('full', 1), priority: 5 }));
      await scene.submit([{ label: 'other', ...keyed('free', 1) }, { label: 'plain' }]);
      expect(await labelsGiven(node)).toEqual(['other', 'plain', 't0']);
      expect(await store.queues()).toMatchObject([{ ready: 1999, limited: 1999, held: 3 }]);
    });

    test('tasks of many keys come in their order, each key within its limit', async () => {
      const { scene, store } = world();
      const node = await scene.node({ max: 1000 });
      const labels = Array.from({ length: 90 }, (_, index) => index);
      await scene.submit(
        labels.map((index) => ({
          label: String(index).padStart(2, '0'),
          priority: index % 3,
          ...keyed(`k${index % 30}`, 2),
        })),
      );
      const leases = await scene.lease(node, 100);
      const expected = [2, 1, 0].flatMap((rest) =>
        labels
          .filter((index) => index % 3 === rest && index < 60)
          .map((index) => String(index).padStart(2, '0')),
      );
      expect(leases.map(({ task }) => task.label)).toEqual(expected);
      expect((await store.queues())[0]).toMatchObject({ ready: 30, limited: 30 });
    });

    test('a key is one for all jobs of its domain, and another in another domain', async () => {
      const { scene } = world();
      const node = await scene.node();
      await scene.submit([{ label: 'a', ...keyed('k', 1) }], { domain_id: A });
      await scene.submit([{ label: 'b', capability: '/other/v1', ...keyed('k', 1) }], { domain_id: A });
      await scene.submit([{ label: 'c', ...keyed('k', 1) }], { domain_id: B });
      const both = await scene.node({ capabilities: ['/test/work/v1', '/other/v1'] });
      expect(await labelsGiven(both)).toEqual(['a', 'c']);
      expect(await labelsGiven(node)).toEqual([]);
    });

    test('each task is held to its own limit, also where others of the key have another', async () => {
      const { scene } = world();
      const node = await scene.node();
      await scene.submit([
        ...some(3, { label: 'one', ...keyed('k', 1) }),
        ...some(3, { label: 'three', ...keyed('k', 3) }),
        ...some(1, { label: 'two', ...keyed('k', 2) }),
      ]);
      expect(await labelsGiven(node)).toEqual(['one0', 'three0', 'three1']);
      const leases = await scene.lease(node);
      expect(leases).toEqual([]);
    });

    test('a limit counts in its own order: 2 after 1, 3 after that', async () => {
      const { scene } = world();
      const node = await scene.node();
      await scene.submit([
        { label: 'a', ...keyed('k', 1) },
        { label: 'b', ...keyed('k', 2) },
        { label: 'c', ...keyed('k', 3) },
        { label: 'd', ...keyed('k', 3) },
      ]);
      const [a, b, c] = await oneByOne(node, 4);
      expect(labelsOf([a!, b!, c!])).toEqual(['a', 'b', 'c']);
      await scene.complete(refOf(a!));
      await scene.complete(refOf(b!));
      expect(await labelsGiven(node)).toEqual(['d']);
    });

    test('nodes that ask in one call share the limit', async () => {
      const { scene, store } = world();
      const nodes = [await scene.node(), await scene.node(), await scene.node()];
      await scene.submit(some(9, keyed('k', 4)));
      const outcomes = await store.lease(
        nodes.map((nodeId) => ({ nodeId, max: 3, capabilities: null, start: true })),
      );
      expect(outcomes.map((outcome) => valueOf(outcome).leases.length)).toEqual([3, 1, 0]);
    });

    const endings: Record<string, (lease: GrantedLease, jobId: string) => Promise<unknown>> = {
      complete: (lease) => world().scene.complete(refOf(lease)),
      fail: (lease) => world().scene.fail(refOf(lease)),
      'fail for good': (lease) => world().scene.fail(refOf(lease), { retryable: false }),
      'setup failed': (lease) => world().scene.release(refOf(lease), 'setup_failed'),
      expiry: async () => {
        world().wait(TTL);
        return await world().store.sweep();
      },
      cancel: async (lease, jobId) => {
        await world().store.cancelJob(jobId);
        return await world().scene.release(refOf(lease), 'canceled');
      },
      'cancel, refused completion': async (lease, jobId) => {
        await world().store.cancelJob(jobId);
        return await world().scene.complete(refOf(lease));
      },
    };
    for (const [name, end] of Object.entries(endings)) {
      test(`an ending gives the key to those who wait for it: ${name}`, async () => {
        const { scene } = world();
        const node = await scene.node();
        const jobId = await scene.submit([{ label: 'first', max_attempts: 1, ...keyed('k', 1) }]);
        await scene.submit([{ label: 'next', priority: 1, ...keyed('k', 1) }]);
        await scene.submit([{ label: 'last', ...keyed('k', 1) }]);
        await scene.complete(refOf(await scene.take(node)));
        const held = await scene.take(node);
        expect([held.task.label, await labelsGiven(node)]).toEqual(['first', []]);
        await wakes(() => end(held, jobId));
        const given = await labelsGiven(node);
        expect(given).toHaveLength(1);
        expect(await labelsGiven(node)).toEqual([]);
      });
    }

    test('a task that is given back waits for its key like any other', async () => {
      const { scene, wait, store } = world();
      const node = await scene.node();
      await scene.submit(some(2, { ...keyed('k', 1), max_attempts: 3 }));
      const first = await scene.take(node);
      await scene.fail(refOf(first));
      const second = await scene.take(node);
      expect(second.task.label).toBe('t1');
      wait(5000);
      await store.sweep();
      // Its retry is due, and the key is taken.
      await scene.heartbeat(refOf(second));
      expect(await labelsGiven(node)).toEqual([]);
      expect((await store.queues())[0]).toMatchObject({ ready: 1, limited: 1 });
      await scene.complete(refOf(second));
      expect(await labelsGiven(node)).toEqual(['t0']);
    });

    test('tasks of later stages and of later times are held to it as well', async () => {
      const { scene, store, at, wait } = world();
      const node = await scene.node();
      await scene.submit(
        [
          { label: 'a' },
          ...some(2, { label: 'b', stage: 'b', ...keyed('k', 1) }),
          { label: 'c', not_before: at(1000), ...keyed('k', 1) },
        ],
        { edges: [{ from: 'a', to: 'b' }] },
      );
      await scene.complete(refOf(await scene.take(node)));
      const [b0] = await scene.lease(node, 9);
      wait(1000);
      await store.sweep();
      expect(await labelsGiven(node)).toEqual([]);
      expect((await store.queues())[0]).toMatchObject({ ready: 2, limited: 2, held: 1 });
      await scene.complete(refOf(b0!));
      expect(await labelsGiven(node)).toEqual(['b1']);
    });

    test('tasks that wait for a key can be cancelled, deleted and end at their deadline', async () => {
      const { scene, store, at, wait } = world();
      const node = await scene.node();
      await scene.submit([{ label: 'holds', ...keyed('k', 1) }]);
      const holds = await scene.take(node);
      const canceled = await scene.submit(some(4, { label: 'x', ...keyed('k', 1) }));
      const deleted = await scene.submit(some(4, { label: 'y', ...keyed('k', 2), priority: -1 }));
      const late = await scene.submit([{ label: 'late', deadline_at: at(2000), ...keyed('k', 1) }]);
      await scene.submit([{ label: 'next', priority: -2, ...keyed('k', 1) }]);
      await store.cancelJob(canceled);
      await store.deleteJob(deleted);
      wait(2000);
      await store.sweep();
      expect(await scene.states(late)).toEqual({ late: 'failed' });
      await scene.complete(refOf(holds));
      expect(await labelsGiven(node)).toEqual(['next']);
      expect((await store.queues())[0]).toMatchObject({ ready: 0, limited: 0, held: 1 });
    });

    test('a task past its deadline does not keep the others of its key from it', async () => {
      const { scene, at, wait } = world();
      const node = await scene.node();
      await scene.submit([
        { label: 'late', deadline_at: at(1000), ...keyed('k', 1) },
        { label: 'also late', deadline_at: at(1000), ...keyed('j', 1) },
        { label: 'good', ...keyed('k', 1) },
      ]);
      wait(1000);
      expect(await labelsGiven(node)).toEqual(['good']);
    });

    test('a lease that is resumed counts, though it may be one more than the limit', async () => {
      const { scene, store, wait } = world();
      const [node, other] = [await scene.node(), await scene.node()];
      await scene.submit(some(3, keyed('k', 1)));
      const lost = await scene.take(node);
      wait(TTL);
      await store.sweep();
      // The same task goes first; the other node holds the next when the first comes back.
      const again = await scene.take(other);
      expect(again.task.label).toBe('t0');
      await scene.complete(refOf(again));
      const next = await scene.take(node);
      wait(TTL);
      await store.sweep();
      await scene.heartbeat(refOf(next));
      expect(await labelsGiven(other)).toEqual([]);
      expect(await scene.heartbeat(refOf(next))).toMatchObject({ cancel: false });
      expect(await scene.complete(refOf(lost))).toBe('aborted');
    });

    test('how many of its key are held is told of a task', async () => {
      const { scene, store } = world();
      const node = await scene.node();
      const id = await scene.submit([...some(3, keyed('k', 2)), { label: 'plain' }]);
      await scene.lease(node, 2);
      const tasks = (await scene.job(id)).tasks;
      const standings = await Promise.all(tasks.map((task) => store.standing(task.id)));
      expect(standings.map((standing) => standing?.heldOfKey)).toEqual([2, 2, 2, undefined]);
    });

    test('keys come and go without leaving anything that would hold up others', async () => {
      const { scene, store } = world();
      const node = await scene.node({ max: 4000 });
      await scene.submit(Array.from({ length: 3000 }, (_, index) => keyed(`k${index}`, 1)));
      const leases = await scene.lease(node, 3000);
      expect(leases).toHaveLength(3000);
      await store.complete(leases.map((lease) => ({ ...refOf(lease), outputCids: [], meta: null })));
      await scene.submit([keyed('k7', 1), keyed('k7', 1), keyed('k2999', 1)]);
      expect(await scene.lease(node, 9)).toHaveLength(2);
    });
  });

  describe('resources', () => {
    test('a node is filled up to what it has, in thousandths exactly', async () => {
      const { scene } = world();
      const node = await scene.node({ resources: { cpu: 1 } });
      await scene.submit(some(11, { resources: { cpu: 0.1 } }));
      const leases = await scene.lease(node, 20);
      expect(leases).toHaveLength(10);
      expect(await scene.lease(node)).toEqual([]);
      await scene.complete(refOf(leases[0]!));
      expect(await scene.lease(node, 20)).toHaveLength(1);
    });

    test('amounts of bytes that thousandths of a number cannot count are compared exactly', async () => {
      const { scene } = world();
      const half = 2 ** 52;
      const node = await scene.node({ resources: { memory: 2 * half } });
      await scene.submit([
        { label: 'a', resources: { memory: half } },
        { label: 'b', resources: { memory: half } },
        { label: 'c', resources: { memory: 1 } },
      ]);
      expect(await labelsGiven(node)).toEqual(['a', 'b']);
    });

    test('every name counts, and a name that the node does not have is none of it', async () => {
      const { scene } = world();
      const node = await scene.node({ resources: { cpu: 8, memory: 1000, gpu: 1 } });
      await scene.submit([
        { label: 'gpu', resources: { gpu: 1, memory: 600 } },
        { label: 'second gpu', resources: { gpu: 1 } },
        { label: 'too much memory', resources: { memory: 500 } },
        { label: 'rest of memory', resources: { memory: 400 } },
        { label: 'license', resources: { 'acme/license': 1 } },
      ]);
      expect(await labelsGiven(node)).toEqual(['gpu', 'rest of memory']);
      const other = await scene.node({ resources: { 'acme/license': 1 } });
      expect(await labelsGiven(other)).toEqual(['license']);
    });

    test('a node that does not say what it has is not limited in cpu and memory, and gets nothing else', async () => {
      const { scene } = world();
      const node = await scene.node();
      await scene.submit([
        ...some(3, { resources: { cpu: 64, memory: 2 ** 50 } }),
        { label: 'gpu', resources: { cpu: 1, gpu: 1 } },
      ]);
      expect(await labelsGiven(node)).toEqual(['t0', 't1', 't2']);
    });

    test('a task that names no cpu takes one where cpus are counted', async () => {
      const { scene } = world();
      const node = await scene.node({ resources: { cpu: 2.5, gpu: 9 } });
      await scene.submit([{ label: 'plain' }, { label: 'gpu', resources: { gpu: 1 } }, { label: 'third' }]);
      await scene.submit([{ label: 'half', resources: { cpu: 0.5 } }]);
      expect(await labelsGiven(node)).toEqual(['gpu', 'half', 'plain']);
      const uncounted = await scene.node({ resources: { gpu: 1 } });
      await scene.submit(some(4));
      expect(await labelsGiven(uncounted)).toHaveLength(5);
    });

    test('max_concurrency bounds the number all the same', async () => {
      const { scene } = world();
      const node = await scene.node({ resources: { cpu: 100 }, max: 2 });
      await scene.submit(some(3, { resources: { cpu: 1 } }));
      expect(await scene.lease(node, 9)).toHaveLength(2);
    });

    test('nodes that ask in one call have what they have, each for itself', async () => {
      const { scene, store } = world();
      const nodes = [
        await scene.node({ resources: { cpu: 2 } }),
        await scene.node({ resources: { cpu: 3 } }),
        await scene.node(),
      ];
      await scene.submit(some(9));
      const outcomes = await store.lease(
        nodes.map((nodeId) => ({ nodeId, max: 9, capabilities: null, start: true })),
      );
      expect(outcomes.map((outcome) => valueOf(outcome).leases.length)).toEqual([2, 3, 4]);
    });

    test('a node that had no room is told when there is some', async () => {
      const { scene } = world();
      const node = await scene.node({ resources: { cpu: 1 } });
      await scene.submit(some(2));
      const first = await scene.take(node);
      expect(await scene.lease(node)).toEqual([]);
      await wakes(() => scene.complete(refOf(first)));
      const second = await scene.take(node);
      await scene.submit([{ label: 'third' }]);
      expect(await scene.lease(node)).toEqual([]);
      await wakes(() => scene.fail(refOf(second), { retryable: false }));
      expect(await labelsGiven(node)).toEqual(['third']);
    });

    test('what a node has is told with what its tasks take of it', async () => {
      const { scene, store } = world();
      const node = await scene.node({ resources: { cpu: 4, memory: 1024 } });
      expect(await store.getNode(node)).toMatchObject({
        resources: { cpu: 4, memory: 1024 },
        resources_in_use: {},
      });
      await scene.submit([{}, { label: 'b', resources: { cpu: 1.5, memory: 24 } }]);
      const leases = await scene.lease(node, 2);
      const inUse = async (): Promise<unknown> => (await store.getNode(node))?.resources_in_use;
      expect(await inUse()).toEqual({ cpu: 2.5, memory: 24 });
      for (const lease of leases) await scene.complete(refOf(lease));
      expect(await inUse()).toEqual({});
      expect(await store.getNode(await scene.node())).not.toHaveProperty('resources');
    });

    test('a node that registers again with less keeps what it has and gets no more until there is room', async () => {
      const { scene, store } = world();
      const node = await scene.node({ resources: { cpu: 4 } });
      await scene.submit(some(6));
      const leases = await scene.lease(node, 4);
      await scene.registerAgain(node, { resources: { cpu: 2 } });
      expect((await store.getNode(node))?.resources_in_use).toEqual({ cpu: 4 });
      for (const lease of leases.slice(0, 2)) await scene.complete(refOf(lease));
      expect(await scene.lease(node)).toEqual([]);
      await scene.complete(refOf(leases[2]!));
      expect(await scene.lease(node, 9)).toHaveLength(1);
      await scene.registerAgain(node, {});
      expect(await store.getNode(node)).not.toHaveProperty('resources');
      expect(await scene.lease(node, 9)).toHaveLength(1);
    });

    test('a large task is overtaken for 30 s, and from then on nothing of its rank goes before it', async () => {
      const { scene, wait } = world();
      const node = await scene.node({ resources: { cpu: 4 } });
      await scene.submit([{ label: 'running' }]);
      const running = await scene.take(node);
      await scene.submit([{ label: 'large', resources: { cpu: 4 } }]);
      await scene.submit([{ label: 'a', priority: -5 }, { label: 'b' }]);
      wait(OVERTAKING_MS - 1);
      await scene.heartbeat(refOf(running));
      const [b] = await scene.lease(node, 1);
      expect(b?.task.label).toBe('b');
      wait(1);
      expect(await labelsGiven(node)).toEqual([]);
      await scene.submit([{ label: 'urgent', priority: 1 }]);
      const [urgent] = await scene.lease(node, 9);
      expect(urgent?.task.label).toBe('urgent');
      for (const lease of [running, b!]) await scene.complete(refOf(lease));
      expect(await labelsGiven(node)).toEqual([]);
      await scene.complete(refOf(urgent!));
      expect(await labelsGiven(node)).toEqual(['large']);
    });

    test('a large task of one domain is not kept waiting by small ones of another', async () => {
      const { scene, wait } = world();
      const node = await scene.node({ resources: { cpu: 2 } });
      await scene.submit(some(20, { label: 'small' }), { domain_id: B });
      await scene.submit([{ label: 'large', resources: { cpu: 2 } }], { domain_id: A });
      const held = [await scene.take(node)];
      expect(held[0]?.task.label).toBe('large');
      await scene.submit([{ label: 'larger', resources: { cpu: 2 } }], { domain_id: A });
      await scene.complete(refOf(held[0]!));
      const [first] = await scene.lease(node, 1);
      expect(first?.task.label).toBe('small0');
      wait(OVERTAKING_MS);
      // It is the other domain's turn, and it waits long enough.
      expect(await scene.lease(node, 9)).toEqual([]);
      await world().store.sweep();
      const after = await scene.lease(node, 9);
      expect(after.map(({ task }) => task.label)).toEqual(['larger']);
    });

    test('a task that no node is large enough for holds nothing back', async () => {
      const { scene, wait } = world();
      const node = await scene.node({ resources: { cpu: 4 } });
      await scene.submit([{ label: 'huge', resources: { cpu: 5 } }]);
      wait(OVERTAKING_MS * 10);
      await scene.submit([{ label: 'small' }]);
      expect(await labelsGiven(node)).toEqual(['small']);
    });

    test('a large task whose key is full holds nothing back', async () => {
      const { scene, wait } = world();
      const node = await scene.node({ resources: { cpu: 4 } });
      await scene.submit([{ label: 'holds', concurrency: { key: 'k', limit: 1 } }]);
      const holds = await scene.take(node);
      await scene.submit([{ label: 'large', resources: { cpu: 4 }, concurrency: { key: 'k', limit: 1 } }]);
      wait(OVERTAKING_MS);
      await scene.heartbeat(refOf(holds));
      await scene.submit([{ label: 'small' }]);
      expect(await labelsGiven(node)).toEqual(['small']);
    });

    test('what tasks take and are limited by is kept as submitted', async () => {
      const { scene, store } = world();
      const node = await scene.node({ resources: { cpu: 4, gpu: 2 } });
      const limits = { resources: { cpu: 0.25, gpu: 1 }, concurrency: { key: 'küche', limit: 1_000_000 } };
      const id = await scene.submit([{ label: 'a', ...limits }, { label: 'b' }]);
      const { tasks } = await scene.job(id);
      expect(tasks[0]).toMatchObject(limits);
      expect(tasks[1]).not.toHaveProperty('resources');
      expect(tasks[1]).not.toHaveProperty('concurrency');
      const spec = jobOf([{ label: 'a', ...limits }, { label: 'b' }]);
      expect((await store.submission(id))?.tasks).toEqual(spec.tasks);
      expect((await scene.take(node)).task).toMatchObject(limits);
      expect(await store.queues()).toMatchObject([{ resources: limits.resources }, { ready: 1 }]);
    });
  });
}
