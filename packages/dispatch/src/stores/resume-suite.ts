/** What any store must do with leases that expired and that nobody took over. A part of `suite.ts`. */
import { MillraceError } from '@millrace/runner';
import { describe, expect, test } from 'vitest';
import { FREE_NODE_FAULTS } from '../lifecycle.ts';
import type { DataWrite, GrantedLease, LeaseRef, Store } from '../store.ts';
import { DOMAIN, refOf, type Scene } from './suite.ts';

/** What a test is given, afresh for each. */
export interface ResumeWorld {
  readonly scene: Scene;
  readonly store: Store;
  /** Lets time pass. */
  readonly wait: (ms: number) => void;
  /** RFC 3339, so long from now. */
  readonly at: (ms: number) => string;
}

/** Of the suite's stores. */
const TTL = 15_000;

export function resumeSuite(world: () => ResumeWorld): void {
  describe('a lease that expired while nobody else took the task', () => {
    /** The lease expires and the sweep takes the task back. */
    async function lapse(): Promise<void> {
      world().wait(TTL);
      expect((await world().store.sweep()).rescued).toBe(1);
    }

    async function lapsed(task: { readonly max_attempts?: number } = {}): Promise<{
      readonly node: string;
      readonly jobId: string;
      readonly lease: GrantedLease;
    }> {
      const { scene } = world();
      const node = await scene.node();
      const jobId = await scene.submit([task]);
      const lease = await scene.take(node);
      await lapse();
      return { node, jobId, lease };
    }

    const write = (lease: LeaseRef, name = 'made'): DataWrite => ({
      domainId: DOMAIN,
      id: null,
      name,
      dataType: 'json',
      digest: `sha256:${'d'.repeat(64)}`,
      size: 5,
      lease,
      replaceByName: false,
    });

    const append = async (ref: LeaseRef, offset: number, text: string): Promise<string> => {
      const [outcome] = await world().store.appendLogs(
        [{ ...ref, offset, bytes: Buffer.from(text) }],
        1 << 20,
      );
      return outcome?.ok === false ? outcome.error.code : `ok ${outcome?.value.nextOffset}`;
    };

    const upload = (lease: LeaseRef) => ({
      id: `upload-${String(lease.leaseId)}`,
      domainId: DOMAIN,
      name: 'big',
      dataType: 'json',
      size: null,
      existingId: null,
      dataId: 'promised',
      partSize: 1024,
      expiresAtMs: 0,
      lease,
    });

    const codeOf = async (promise: Promise<unknown>): Promise<string> => {
      try {
        await promise;
        return 'ok';
      } catch (error) {
        return MillraceError.is(error) ? error.code : `not a MillraceError: ${String(error)}`;
      }
    };

    /** Everything that is written under a lease and may go on. */
    const writes: readonly (readonly [string, (ref: LeaseRef) => Promise<unknown>, string])[] = [
      ['a heartbeat', (ref) => world().scene.heartbeat(ref), 'running'],
      ['a completion', (ref) => world().scene.complete(ref), 'completed'],
      ['a failure', (ref) => world().scene.fail(ref, { retryable: false }), 'failed'],
      ['a log append', (ref) => append(ref, 0, 'still here\n'), 'running'],
      ['an artifact', (ref) => world().store.putData([write(ref)]), 'running'],
      ['the begin of an upload', (ref) => world().store.createUpload(upload(ref)), 'running'],
    ];

    test.each(writes)('is resumed by %s, under the same id', async (_, go, status) => {
      const { store, scene } = world();
      const { node, jobId, lease } = await lapsed();
      await go(refOf(lease));
      const { tasks, receipts } = await scene.job(jobId);
      expect(tasks).toMatchObject([{ status, attempts: 1, node_faults: 0 }]);
      // The expiry is no ending any more: an attempt has one.
      expect(receipts.map(({ id, outcome, leased_at }) => [id, outcome, leased_at])).toEqual(
        status === 'running' ? [] : [[lease.leaseId, status, expect.any(String)]],
      );
      const events = (await store.events(jobId, 0, 100)) ?? [];
      expect(events.filter(({ kind }) => kind === 'task.resumed')).toMatchObject([
        { task_id: lease.task.id, data: { node_id: node, lease_id: lease.leaseId, attempt: 1 } },
      ]);
      expect((await store.getNode(node))?.active_leases).toBe(status === 'running' ? 1 : 0);
      expect(await store.queues()).toEqual(
        status === 'running' ? [expect.objectContaining({ ready: 0, held: 1 })] : [],
      );
      expect(await scene.lease(node)).toEqual([]);
    });

    test.each(writes)('is resumed by %s of a reference node', async (_, go, status) => {
      const { scene } = world();
      const { lease } = await lapsed();
      await go({ ...refOf(lease), leaseId: null });
      expect(await scene.task(lease.task.id)).toMatchObject({ status, attempts: 1 });
    });

    test('a resumed lease is held like any other: it is fenced, extended, watched and expires again', async () => {
      const { scene, store, wait } = world();
      const { node, jobId, lease } = await lapsed();
      const ref = refOf(lease);
      // Not held: the node should ask how it stands.
      expect(await store.canceledLeases(node, [lease.leaseId])).toEqual([lease.leaseId]);
      const before = await scene.heartbeat(ref);
      expect(before).toMatchObject({ leaseId: lease.leaseId, cancel: false });
      expect(await store.canceledLeases(node, [lease.leaseId])).toEqual([]);
      expect(await store.busyNodes('all')).toMatchObject([{ node_id: node, task_id: lease.task.id }]);
      expect(await scene.task(lease.task.id)).toMatchObject({
        status: 'running',
        reserved_by: node,
        reason: null,
        lease_expires_at: before.expiresAt,
      });
      expect((await store.standing(lease.task.id))?.leasedAt).not.toBeNull();
      wait(TTL - 1);
      expect(await store.sweep()).toMatchObject({ rescued: 0 });
      await scene.heartbeat(ref);
      for (let round = 1; round <= FREE_NODE_FAULTS + 2; round += 1) {
        wait(TTL);
        expect((await store.sweep()).rescued).toBe(1);
        expect(await scene.task(lease.task.id)).toMatchObject({ status: 'queued', node_faults: 1 });
        await scene.heartbeat(ref);
      }
      expect(await scene.complete(ref, ['out'])).toBe('ok');
      expect(await scene.complete(ref, ['out'])).toBe('ok');
      expect(await scene.job(jobId)).toMatchObject({
        job: { status: 'completed' },
        tasks: [{ attempts: 1, node_faults: 0, output_cids: ['out'] }],
        receipts: [{ id: lease.leaseId, outcome: 'completed' }],
      });
    });

    test('is gone once another node took the task, also when that one gave it back', async () => {
      const { scene } = world();
      const { jobId, lease } = await lapsed();
      const ref = refOf(lease);
      const other = await scene.node();
      const next = await scene.take(other);
      const refuse = async (): Promise<void> => {
        for (const gone of [ref, { ...ref, leaseId: null }]) {
          expect(await codeOf(scene.heartbeat(gone))).toBe('aborted');
          expect(await scene.complete(gone)).toBe('aborted');
          expect(await scene.fail(gone)).toBe('aborted');
          expect(await append(gone, 0, 'late\n')).toBe('aborted');
          expect(await codeOf(world().store.putData([write(gone)]))).toBe('aborted');
          expect(await codeOf(world().store.createUpload(upload(gone)))).toBe('aborted');
        }
      };
      await refuse();
      expect(await scene.release(refOf(next))).toBe('ok');
      const before = await scene.job(jobId);
      await refuse();
      expect(await scene.job(jobId)).toEqual(before);
    });

    test('another node, another lease and a wrong domain resume nothing', async () => {
      const { scene, store } = world();
      const { jobId, lease } = await lapsed();
      const ref = refOf(lease);
      const before = await scene.job(jobId);
      const strangers = [
        { ...ref, nodeId: await scene.node() },
        { ...ref, leaseId: '00000000-0000-7000-8000-000000000000' },
      ];
      for (const stranger of strangers) {
        expect(await codeOf(scene.heartbeat(stranger))).toBe('aborted');
        expect(await scene.complete(stranger)).toBe('aborted');
      }
      const domainId = '2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10';
      expect(await codeOf(store.putData([{ ...write(ref), domainId }]))).toBe('permission_denied');
      expect(await codeOf(store.createUpload({ ...upload(ref), domainId }))).toBe('permission_denied');
      expect(await scene.job(jobId)).toEqual(before);
      expect(await scene.complete(ref)).toBe('ok');
    });

    test('a release does not resume it', async () => {
      const { scene } = world();
      const { jobId, lease } = await lapsed();
      const before = await scene.job(jobId);
      expect(await scene.release(refOf(lease))).toBe('aborted');
      expect(await scene.job(jobId)).toEqual(before);
    });

    test('is gone when the job was cancelled, the deadline passed, or no attempt was left', async () => {
      const { scene, store, wait, at } = world();
      const canceled = await lapsed();
      await store.cancelJob(canceled.jobId);
      const node = await scene.node();
      await scene.submit([{ deadline_at: at(TTL + 1) }]);
      const late = await scene.take(node);
      await lapse();
      wait(1);
      const leases = [canceled.lease, late];
      await scene.submit([{ max_attempts: 1 }]);
      for (let round = 0; round <= FREE_NODE_FAULTS; round += 1) {
        const lease = await scene.take(node);
        await lapse();
        if (round === FREE_NODE_FAULTS) leases.push(lease);
      }
      for (const lease of leases) {
        expect(await codeOf(scene.heartbeat(refOf(lease)))).toBe('aborted');
        expect(await scene.complete(refOf(lease))).toBe('aborted');
      }
      await store.sweep();
      const states = await Promise.all(leases.map(async ({ task }) => (await scene.task(task.id)).status));
      expect(states).toEqual(['canceled', 'failed', 'failed']);
    });

    test('is resumed too while the task waits for its next attempt because the expiry counted as one', async () => {
      const { scene, store } = world();
      const node = await scene.node();
      const jobId = await scene.submit([{ max_attempts: 2 }]);
      for (let round = 0; round < FREE_NODE_FAULTS; round += 1) {
        await scene.take(node);
        await lapse();
      }
      const lease = await scene.take(node);
      world().wait(TTL);
      await store.sweep();
      expect((await store.queues())[0]).toMatchObject({ ready: 0, delayed: 1 });
      await scene.heartbeat(refOf(lease));
      // However it is counted, there are as many tries as before.
      expect(await scene.task(lease.task.id)).toMatchObject({ status: 'running', not_before: null });
      expect(await store.sweep()).toMatchObject({ rescued: 0 });
      expect((await store.standing(lease.task.id))?.attempts).toBe(FREE_NODE_FAULTS + 1);
      expect(await scene.complete(refOf(lease))).toBe('ok');
      expect((await scene.job(jobId)).receipts.map(({ outcome }) => outcome)).toEqual([
        ...Array.from({ length: FREE_NODE_FAULTS }, () => 'expired'),
        'completed',
      ]);
    });

    test('a node may hold more than its max_concurrency by what it resumes, and then gets nothing', async () => {
      const { scene, store } = world();
      const node = await scene.node({ max: 1 });
      await scene.submit([{ label: 'first' }, { label: 'second' }]);
      const first = await scene.take(node);
      await lapse();
      const other = await scene.node({ max: 1 });
      // The other one takes and fails it for good; the first is free for the second task, which then lapses.
      await scene.fail(refOf(await scene.take(other)), { retryable: false });
      expect(await codeOf(scene.heartbeat(refOf(first)))).toBe('aborted');
      const jobId = await scene.submit([{ label: 'a', priority: 1 }]);
      const a = await scene.take(node);
      await lapse();
      await scene.submit([{ label: 'b', priority: 2 }]);
      const b = await scene.take(node);
      expect(b.task.label).toBe('b');
      await scene.heartbeat(refOf(a));
      expect((await store.getNode(node))?.active_leases).toBe(2);
      const [answer] = await store.lease([{ nodeId: node, max: 1, capabilities: null, start: true }]);
      expect(answer).toMatchObject({ ok: true, value: { leases: [], busy: true } });
      expect(await scene.complete(refOf(b))).toBe('ok');
      expect(await scene.complete(refOf(a))).toBe('ok');
      expect((await scene.job(jobId)).job.status).toBe('completed');
    });

    test('goes on with the log of the same attempt', async () => {
      const { scene, store } = world();
      const node = await scene.node();
      await scene.submit();
      const lease = await scene.take(node);
      const taskId = lease.task.id;
      const page = async (attempt: number | null = null) => {
        const found = await store.readLogs({ taskId, attempt, offset: 0, limit: 1000 });
        return found && [found.attempt, Buffer.from(found.bytes).toString(), found.ended];
      };
      expect(await append(refOf(lease), 0, 'before\n')).toBe('ok 7');
      await lapse();
      // More may come, so a reader who follows it goes on waiting.
      expect(await page()).toEqual([1, 'before\n', false]);
      // What is said again resumes it as well.
      expect(await append(refOf(lease), 0, 'before\n')).toBe('ok 7');
      expect(await scene.task(taskId)).toMatchObject({ status: 'running' });
      expect(await append(refOf(lease), 7, 'after\n')).toBe('ok 13');
      await lapse();
      const next = await scene.take(await scene.node());
      expect(await append(refOf(lease), 13, 'late\n')).toBe('aborted');
      expect(await append(refOf(next), 0, 'another\n')).toBe('ok 8');
      expect(await page(1)).toEqual([1, 'before\nafter\n', true]);
      expect(await page()).toEqual([2, 'another\n', false]);
    });

    test('its endings among those of its neighbours are told rightly', async () => {
      const { scene, store, wait } = world();
      const nodes = [await scene.node(), await scene.node()];
      const jobId = await scene.submit(
        Array.from({ length: 9 }, (_, index) => ({ label: String(index), max_attempts: 5 })),
      );
      const leases: GrantedLease[] = [];
      for (const node of [0, 0, 0, 1, 1, 1, 0, 0, 0]) leases.push(await scene.take(nodes[node]!));
      wait(TTL);
      expect((await store.sweep()).rescued).toBe(9);
      // The first, one in the middle and the last of those who share a node, in another order.
      for (const index of [8, 3, 0, 4]) await scene.heartbeat(refOf(leases[index]!));
      const { receipts, tasks } = await scene.job(jobId);
      expect(receipts.map(({ id, node_id, outcome }) => [id, node_id, outcome])).toEqual(
        [1, 2, 5, 6, 7].map((index) => [leases[index]!.leaseId, refOf(leases[index]!).nodeId, 'expired']),
      );
      expect(tasks.map(({ status }) => status)).toEqual(
        leases.map((_, index) => ([8, 3, 0, 4].includes(index) ? 'running' : 'queued')),
      );
      for (const [index, lease] of leases.entries()) {
        expect(await scene.complete(refOf(lease), [String(index)]), String(index)).toBe('ok');
      }
      const after = await scene.job(jobId);
      expect(after.job.status).toBe('completed');
      expect(after.receipts.map(({ outcome }) => outcome)).toEqual(leases.map(() => 'completed'));
    });

    test('of a node that takes the task and the one that comes back exactly one has it', async () => {
      const { scene, store } = world();
      let resumed = 0;
      for (let round = 0; round < 20; round += 1) {
        const { lease, jobId } = await lapsed();
        const other = await scene.node();
        const resume = () => codeOf(scene.heartbeat(refOf(lease)));
        const take = () => scene.lease(other);
        const [code, taken] =
          round % 2 === 0
            ? await Promise.all([resume(), take()])
            : ((await Promise.all([take(), resume()])).toReversed() as [string, GrantedLease[]]);
        expect([code, taken.length]).toEqual(code === 'ok' ? ['ok', 0] : ['aborted', 1]);
        if (code === 'ok') resumed += 1;
        const winner = taken[0] ?? lease;
        const loser = refOf(lease);
        if (taken.length > 0) expect(await scene.complete(loser)).toBe('aborted');
        expect(await scene.complete(refOf(winner))).toBe('ok');
        const done = (await scene.job(jobId)).receipts.filter(({ outcome }) => outcome === 'completed');
        expect(done).toMatchObject([{ id: winner.leaseId }]);
        expect((await store.stats()).tasks).toMatchObject({ queued: 0, leased: 0, running: 0 });
      }
      expect(resumed).toBeGreaterThan(0);
    });
  });
}
