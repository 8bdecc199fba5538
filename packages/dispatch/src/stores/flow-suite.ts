/** What any store must do with jobs that end, are kept, wait for their time and are done again. A part of `suite.ts`. */
import type { Logger } from '@millrace/runner';
import { SimulatedClock } from '@millrace/runner/testing';
import { describe, expect, test } from 'vitest';
import type { DataRecord, JobSpec } from '../records.ts';
import { redriveSpec } from '../redrive.ts';
import { Scheduler } from '../scheduler.ts';
import type { GrantedLease, NewSchedule, Outcome, PruneAnswer, Store } from '../store.ts';
import { MAX_SCHEDULES } from './schedule-rows.ts';
import { DOMAIN, jobOf, refOf, valueOf, type Scene } from './suite.ts';

/** What a test is given, afresh for each. */
export interface FlowWorld {
  readonly scene: Scene;
  readonly store: Store;
  /** Lets time pass. */
  readonly wait: (ms: number) => void;
  /** The time so many milliseconds from now. */
  readonly at: (ms: number) => string;
}

const DAY = 86_400_000;
const UNKNOWN = '00000000-0000-7000-8000-000000000000';
const OTHER_DOMAIN = '7f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10';

export function flowSuite(world: () => FlowWorld): void {
  /** A file that the lease's task made. */
  async function make(lease: GrantedLease, name: string, digit = 'a'): Promise<DataRecord> {
    const [record] = await world().store.putData([
      {
        domainId: lease.domainId,
        id: null,
        name,
        dataType: 'binary',
        digest: `sha256:${digit.repeat(64)}`,
        size: 1,
        lease: refOf(lease),
        replaceByName: false,
      },
    ]);
    return record!;
  }

  /** Completes a lease with files it made, reported as our nodes do. Returns their ids. */
  async function finish(lease: GrantedLease, ...paths: string[]): Promise<string[]> {
    const made = [];
    for (const path of paths) made.push({ path, record: await make(lease, `${path}_${lease.task.id}`) });
    const ids = made.map(({ record }) => record.id);
    const artifacts = made.map(({ path, record }) => ({
      logical_path: path,
      name: record.name,
      data_type: 'binary',
      id: record.id,
    }));
    expect(await world().scene.complete(refOf(lease), ids, { artifacts })).toBe('ok');
    return ids;
  }

  async function failFor(lease: GrantedLease, reason = 'it broke'): Promise<void> {
    expect(await world().scene.fail(refOf(lease), { reason, retryable: false })).toBe('ok');
  }

  /** Leases the task with this label; what else is ready is given back. */
  async function takeNamed(node: string, label: string): Promise<GrantedLease> {
    const { scene } = world();
    const leases = await scene.lease(node, 50);
    const wanted = leases.find(({ task }) => task.label === label);
    for (const lease of leases) if (lease !== wanted) await scene.release(refOf(lease));
    if (wanted === undefined) throw new Error(`task ${label} cannot be leased`);
    return wanted;
  }

  async function submitted(id: string): Promise<JobSpec> {
    const spec = await world().store.submission(id);
    if (spec === null) throw new Error(`job ${id} does not exist`);
    return spec;
  }

  describe('jobs that ended long ago', () => {
    const prune = (olderMs: number, artifacts = false, cursor: string | null = null): Promise<PruneAnswer> =>
      world().store.pruneJobs({ endedForMs: olderMs, artifacts, cursor });

    test('they are removed with all that is about them, and others stay', async () => {
      const { scene, store, wait } = world();
      const node = await scene.node();
      const waiting = await scene.submit([{ label: 'waits', capability: '/nobody/v1' }]);
      const old = await scene.submit();
      const lease = await scene.take(node);
      valueOf((await store.appendLogs([{ ...refOf(lease), offset: 0, bytes: Buffer.from('x\n') }], 99))[0]);
      const [output] = await finish(lease, 'a.bin');
      wait(DAY);
      const young = await scene.submit();
      await finish(await scene.take(node), 'b.bin');
      // One millisecond short of it.
      expect(await prune(DAY + 1)).toEqual({ jobs: 0, items: 0, nextCursor: null });
      wait(1);
      expect(await prune(DAY + 1)).toMatchObject({ jobs: 0 });
      wait(1);
      expect(await prune(DAY + 1)).toEqual({ jobs: 1, items: 0, nextCursor: null });
      expect(await store.getJob(old)).toBeNull();
      expect(await store.getTask(lease.task.id)).toBeNull();
      expect(await store.events(old, 0, 10)).toBeNull();
      expect(await store.listLogs(old)).toBeNull();
      expect(await store.readLogs({ taskId: lease.task.id, attempt: null, offset: 0, limit: 9 })).toBeNull();
      expect((await store.getJob(young))?.job.status).toBe('completed');
      expect((await store.getJob(waiting))?.job.status).toBe('pending');
      // What it made stays, unless it is asked for.
      expect(await store.getData(DOMAIN, output!)).toMatchObject({ id: output });
      expect(await store.stats()).toMatchObject({
        tasks: { queued: 1, completed: 1 },
        jobs: { pending: 1, completed: 1 },
      });
      wait(10 * DAY);
      expect(await prune(DAY)).toMatchObject({ jobs: 1 });
      expect((await store.listJobs(ALL_JOBS)).items.map(({ job }) => job.id)).toEqual([waiting]);
    });

    test('what they made goes with them when that is asked for, and nothing else does', async () => {
      const { scene, store, wait } = world();
      const node = await scene.node();
      const input = await store.putData([
        {
          domainId: DOMAIN,
          id: null,
          name: 'input',
          dataType: 'binary',
          digest: `sha256:${'b'.repeat(64)}`,
          size: 1,
          lease: null,
          replaceByName: false,
        },
      ]);
      await scene.submit([{ max_attempts: 2, inputs_cids: [input[0]!.id] }]);
      const first = await scene.take(node);
      // Of an attempt that failed: no completion names it.
      const partial = await make(first, 'partial', 'c');
      await scene.fail(refOf(first));
      wait(60_000);
      await store.sweep();
      const [output] = await finish(await scene.take(node), 'a.bin');
      wait(2 * DAY);
      expect(await prune(DAY, true)).toEqual({ jobs: 1, items: 2, nextCursor: null });
      expect(await store.getData(DOMAIN, output!)).toBeNull();
      expect(await store.getData(DOMAIN, partial.id)).toBeNull();
      expect(await store.getData(DOMAIN, input[0]!.id)).not.toBeNull();
      expect(
        await store.unreferencedDigests(['a', 'b', 'c'].map((digit) => `sha256:${digit.repeat(64)}`)),
      ).toEqual([`sha256:${'a'.repeat(64)}`, `sha256:${'c'.repeat(64)}`]);
    });

    test('a batch is bounded, and the cursor goes on behind it', async () => {
      const { scene, store, wait } = world();
      const node = await scene.node({ max: 10_000 });
      for (let job = 0; job < 5; job += 1) {
        await scene.submit(Array.from({ length: 900 }, (_, index) => ({ label: `${index}` })));
      }
      for (;;) {
        const leases = await scene.lease(node, 1000);
        if (leases.length === 0) break;
        await store.complete(leases.map((lease) => ({ ...refOf(lease), outputCids: [], meta: null })));
      }
      wait(2 * DAY);
      // A batch ends with the job that makes it 2000 tasks or more.
      const one = await prune(DAY);
      expect(one).toEqual({ jobs: 3, items: 0, nextCursor: expect.any(String) });
      const two = await prune(DAY, false, one.nextCursor);
      expect(two).toEqual({ jobs: 2, items: 0, nextCursor: null });
      expect(await store.stats()).toMatchObject({ tasks: { completed: 0 }, jobs: { completed: 0 } });
    });

    test('a result is not given again once the job that made it is gone', async () => {
      const { scene, wait } = world();
      const meta = { ref: `compute://sha256/${'c'.repeat(64)}`, now: 0 };
      await scene.submit([{ meta }], { cache: true });
      const node = await scene.node();
      await finish(await scene.take(node), 'a.bin');
      wait(2 * DAY);
      expect(await prune(DAY)).toMatchObject({ jobs: 1 });
      const again = await scene.submit([{ meta }], { cache: true });
      expect((await scene.job(again)).job.status).toBe('pending');
      expect(await scene.take(node)).toMatchObject({ task: { job_id: again } });
    });

    test('a job that an unfinished one does again stays, directly or over others', async () => {
      const { scene, store, wait } = world();
      const node = await scene.node();
      const first = await scene.submit([{ label: 'a' }]);
      await failFor(await scene.take(node));
      const second = await redrive(first);
      await failFor(await scene.take(node));
      const third = await redrive(second);
      wait(2 * DAY);
      expect(await prune(DAY, true)).toMatchObject({ jobs: 0 });
      await finish(await scene.take(node));
      expect(await prune(DAY, true)).toMatchObject({ jobs: 2 });
      expect((await store.listJobs(ALL_JOBS)).items.map(({ job }) => job.id)).toEqual([third]);
    });

    test('its idempotency key may be used again', async () => {
      const { scene, store, wait } = world();
      const submit = () =>
        store.submit([
          { spec: jobOf([{}]), organizationId: null, idempotencyKey: 'key', submitter: 'tester' },
        ]);
      const { jobId } = valueOf((await submit())[0]);
      await finish(await scene.take(await scene.node()));
      wait(2 * DAY);
      await prune(DAY);
      const again = valueOf((await submit())[0]);
      expect(again.created).toBe(true);
      expect(again.jobId).not.toBe(jobId);
    });
  });

  /** Submits what the job left undone. */
  async function redrive(id: string): Promise<string> {
    const { scene, store, at } = world();
    const spec = redriveSpec(await scene.job(id), await submitted(id), Date.parse(at(0)));
    const [outcome]: readonly Outcome<{ readonly jobId: string }>[] = await store.submit([
      { spec, organizationId: 'org-1', idempotencyKey: null, submitter: 'tester' },
    ]);
    return valueOf(outcome).jobId;
  }

  describe('a job as it was submitted', () => {
    test('is what it was, whatever has become of it', async () => {
      const { scene, store, at } = world();
      const tasks = [
        {
          label: 'a',
          stage: 'make',
          capability_filters: { gpu: 'yes' },
          priority: 4,
          inputs_cids: ['in-1'],
          outputs_prefix: 'out',
          mode: 'public' as const,
          meta: { progress: 'mine', n: 1 },
          max_attempts: 2,
          deadline_at: at(60_000),
        },
        { label: 'b', inputs_cids: ['x', 'stage:make'] },
      ];
      const job = { label: 'j', priority: 3, meta: { who: 'me' }, edges: [{ from: 'make', to: 'b' }] };
      const id = await scene.submit(tasks, job);
      expect(await store.submission(id)).toEqual(jobOf(tasks, job));
      const node = await scene.node({ labels: { gpu: 'yes' } });
      const lease = await scene.take(node);
      await scene.heartbeat(refOf(lease), { done: 1 }, [{ kind: 'x' }]);
      expect(await store.submission(id)).toEqual(jobOf(tasks, job));
      const [made] = await finish(lease, 'out/a.bin');
      const [, second] = (await submitted(id)).tasks;
      expect(second!.inputs_cids).toEqual(['x', made]);
      expect(await store.submission(UNKNOWN)).toBeNull();
    });
  });

  describe('what a job left undone', () => {
    test('is a new job of it, with what completed in place of its stages, and both know of each other', async () => {
      const { scene, store } = world();
      const node = await scene.node();
      const id = await scene.submit(
        [
          { label: 'one', stage: 'make' },
          { label: 'two', stage: 'make', max_attempts: 2 },
          { label: 'done', meta: { keep: true } },
          { label: 'use', inputs_cids: ['own', 'stage:make/*.bin', 'stage:done'] },
          { label: 'last', inputs_cids: ['stage:use'] },
        ],
        {
          label: 'job',
          meta: { who: 'me' },
          edges: [
            { from: 'make', to: 'use' },
            { from: 'done', to: 'use' },
            { from: 'use', to: 'last' },
          ],
        },
      );
      const [one] = await finish(await takeNamed(node, 'one'), 'one.bin', 'one.txt');
      const [done] = await finish(await takeNamed(node, 'done'), 'x');
      await failFor(await takeNamed(node, 'two'), 'bad luck');
      expect((await scene.job(id)).job.status).toBe('failed');

      const again = await redrive(id);
      expect(await scene.states(again)).toEqual({ two: 'queued', use: 'queued', last: 'queued' });
      const { job } = await scene.job(again);
      expect(job).toMatchObject({ label: 'job', meta: { who: 'me' }, redrive_of: id, status: 'pending' });
      expect(job.edges).toEqual([
        { from: 'make', to: 'use' },
        { from: 'use', to: 'last' },
      ]);
      expect((await scene.job(id)).redriven_as).toEqual([again]);
      // The old job is as it was.
      expect(await scene.states(id)).toEqual({
        one: 'completed',
        two: 'failed',
        done: 'completed',
        use: 'canceled',
        last: 'canceled',
      });

      const two = await scene.take(node);
      expect(two.task).toMatchObject({ label: 'two', attempts: 1, max_attempts: 2, reason: null });
      const [second] = await finish(two, 'two.bin');
      const use = await scene.take(node);
      expect(use.task.inputs_cids).toEqual(['own', one, second, done]);
      const [used] = await finish(use, 'y');
      const last = await scene.take(node);
      expect(last.task.inputs_cids).toEqual([used]);
      await finish(last);
      expect((await scene.job(again)).job.status).toBe('completed');
      expect(await store.submission(again)).toMatchObject({ redrive_of: id });
    });

    test('outputs of a stage that was done in part are enough, whether or not the rest brings any', async () => {
      const { scene } = world();
      const node = await scene.node();
      const id = await scene.submit(
        [
          { label: 'one', stage: 'make' },
          { label: 'two', stage: 'make' },
          { label: 'use', inputs_cids: ['stage:make/one.*'] },
        ],
        { edges: [{ from: 'make', to: 'use' }] },
      );
      const [one] = await finish(await takeNamed(node, 'one'), 'one.bin');
      await failFor(await takeNamed(node, 'two'));
      await redrive(id);
      await finish(await scene.take(node), 'two.bin');
      expect((await scene.take(node)).task.inputs_cids).toEqual([one]);
    });

    test('a job that was canceled can be done again; deadlines that have passed are left out', async () => {
      const { scene, store, wait, at } = world();
      const [soon, late] = [at(1000), at(DAY)];
      const id = await scene.submit([
        { label: 'a', deadline_at: soon },
        { label: 'b', deadline_at: late },
      ]);
      await store.cancelJob(id);
      wait(1000);
      const again = await redrive(id);
      const { tasks } = await scene.job(again);
      expect(tasks.map(({ label, deadline_at }) => [label, deadline_at])).toEqual([
        ['a', null],
        ['b', late],
      ]);
    });
  });

  describe('work that waits for its time', () => {
    test('is given out at it, and not a millisecond before', async () => {
      const { scene, store, wait, at } = world();
      const node = await scene.node();
      const due = at(60_000);
      const id = await scene.submit([{ label: 'late', not_before: due }, { label: 'now' }]);
      const { job, tasks } = await scene.job(id);
      expect(job.status).toBe('pending');
      expect(tasks.map((task) => [task.label, task.status, task.not_before])).toEqual([
        ['late', 'queued', due],
        ['now', 'queued', null],
      ]);
      expect((await store.standing(tasks[0]!.id))?.ahead).toBeNull();
      await finish(await scene.take(node));
      expect(await scene.states(id)).toEqual({ late: 'queued', now: 'completed' });
      expect(await scene.story(id)).not.toContain('task.runnable:late');
      wait(59_999);
      const { nextAtMs } = await store.sweep();
      expect(await scene.lease(node, 5)).toEqual([]);
      expect(nextAtMs).toBeLessThanOrEqual(Date.parse(due));
      wait(1);
      await store.sweep();
      const late = await scene.take(node);
      expect(late.task).toMatchObject({ label: 'late', not_before: null, attempts: 1 });
      await finish(late);
      expect(await scene.story(id)).toContain('task.runnable:late');
    });

    test('of the times of the job and of the task the later one counts, and one that has passed does not', async () => {
      const { scene, store, wait, at } = world();
      const node = await scene.node();
      const id = await scene.submit(
        [{ label: 'job' }, { label: 'task', not_before: at(2000) }, { label: 'early', not_before: at(500) }],
        { not_before: at(1000) },
      );
      expect((await scene.job(id)).job.not_before).toBe(at(1000));
      expect((await scene.job(id)).tasks.map(({ not_before }) => not_before)).toEqual([
        at(1000),
        at(2000),
        at(1000),
      ]);
      await scene.submit([{ label: 'past', not_before: at(0) }], { not_before: at(-5000) });
      expect((await scene.lease(node, 5)).map(({ task }) => task.label)).toEqual(['past']);
      wait(1000);
      await store.sweep();
      expect((await scene.lease(node, 5)).map(({ task }) => task.label)).toEqual(['job', 'early']);
      wait(1000);
      await store.sweep();
      expect((await scene.take(node)).task.label).toBe('task');
    });

    test('a later stage waits for both, whichever is first', async () => {
      const { scene, store, wait, at } = world();
      const node = await scene.node();
      const stages = (not_before: string) =>
        scene.submit([{ label: 'a' }, { label: 'b', not_before, inputs_cids: ['stage:a'] }], {
          edges: [{ from: 'a', to: 'b' }],
        });
      const slow = await stages(at(1000));
      expect((await scene.job(slow)).tasks[1]).toMatchObject({ deps_remaining: 1, not_before: at(1000) });
      const lease = await scene.take(node);
      const [made] = await finish(lease, 'x');
      expect((await scene.job(slow)).tasks[1]).toMatchObject({
        status: 'queued',
        deps_remaining: 0,
        not_before: at(1000),
        inputs_cids: [made],
      });
      expect(await scene.lease(node, 5)).toEqual([]);
      wait(1000);
      await store.sweep();
      expect((await scene.take(node)).task).toMatchObject({ label: 'b', inputs_cids: [made] });

      const quick = await stages(at(1000));
      const first = await scene.take(node);
      wait(1000);
      await scene.heartbeat(refOf(first));
      await store.sweep();
      expect((await scene.job(quick)).tasks[1]).toMatchObject({ deps_remaining: 1 });
      await finish(first, 'y');
      expect((await scene.take(node)).task).toMatchObject({ label: 'b', not_before: null });
    });

    test('it can be cancelled, deleted, and fail by its deadline meanwhile', async () => {
      const { scene, store, wait, at } = world();
      const canceled = await scene.submit([{ label: 'a', not_before: at(1000) }]);
      await store.cancelJob(canceled);
      expect((await scene.job(canceled)).tasks[0]).toMatchObject({ status: 'canceled', not_before: null });
      const deleted = await scene.submit([{ label: 'b', not_before: at(1000) }]);
      expect(await store.deleteJob(deleted)).toBe(true);
      // No parser lets this pass; a store has to do something sensible all the same.
      const late = await scene.submit([{ label: 'c', not_before: at(2000), deadline_at: at(1000) }]);
      wait(2000);
      await store.sweep();
      expect((await scene.job(late)).tasks[0]).toMatchObject({ status: 'failed', reason: 'deadline' });
      expect(await scene.lease(await scene.node(), 5)).toEqual([]);
      expect(await store.queues()).toEqual([]);
    });

    test('a result that is there by then is given again', async () => {
      const { scene, store, wait, at } = world();
      const meta = { ref: `compute://sha256/${'c'.repeat(64)}`, now: 0 };
      const later = await scene.submit([{ label: 'later', meta, not_before: at(1000) }, { label: 'after' }], {
        cache: true,
        edges: [{ from: 'later', to: 'after' }],
      });
      await scene.submit([{ meta }], { cache: true });
      const node = await scene.node();
      await finish(await scene.take(node), 'a.bin');
      wait(1000);
      await store.sweep();
      expect(await scene.states(later)).toEqual({ later: 'completed', after: 'queued' });
      expect((await scene.take(node)).task.label).toBe('after');
    });

    test('what is redriven waits no more', async () => {
      const { scene, store, at } = world();
      const id = await scene.submit([{ label: 'a', not_before: at(1000) }], { not_before: at(1000) });
      await store.cancelJob(id);
      await redrive(id);
      expect((await scene.take(await scene.node())).task.label).toBe('a');
    });

    test('a job of many such tasks is kept as it was submitted', async () => {
      const { scene, store, wait, at } = world();
      const tasks = Array.from({ length: 1000 }, (_, index) => ({ label: `${index}` }));
      const id = await scene.submit(tasks, { not_before: at(1000) });
      expect(await store.queues()).toMatchObject([{ ready: 0, delayed: 1000 }]);
      wait(1000);
      await store.sweep();
      expect(await store.queues()).toMatchObject([{ ready: 1000, delayed: 0, oldestReadyAgeMs: 0 }]);
      const leases = await scene.lease(await scene.node({ max: 1000 }), 1000);
      expect(leases.map(({ task }) => task.label)).toEqual(tasks.map(({ label }) => label));
      expect((await submitted(id)).not_before).toBe(at(0));
    });
  });

  describe('how much work waits, by what it demands', () => {
    test('every change is counted', async () => {
      const { scene, store, wait, at } = world();
      const node = await scene.node({ labels: { gpu: 'yes' } });
      expect(await store.queues()).toEqual([]);
      const gpu = { capability_filters: { gpu: 'yes' } };
      const id = await scene.submit(
        [
          { label: 'a', max_attempts: 2 },
          { label: 'b', ...gpu },
          { label: 'c', ...gpu, not_before: at(5000) },
          { label: 'd', ...gpu },
        ],
        { edges: [{ from: 'a', to: 'b' }] },
      );
      const plain = async () => (await store.queues()).find(({ filters }) => !('gpu' in filters));
      const special = async () => (await store.queues()).find(({ filters }) => 'gpu' in filters);
      expect(await plain()).toEqual({
        capability: '/test/work/v1',
        filters: {},
        mode: 'public',
        organizationId: 'org-1',
        ready: 1,
        blocked: 0,
        delayed: 0,
        held: 0,
        limited: 0,
        oldestReadyAgeMs: 0,
      });
      expect(await special()).toMatchObject({
        filters: { gpu: 'yes' },
        ready: 1,
        blocked: 1,
        delayed: 1,
        held: 0,
      });
      wait(1000);
      expect(await plain()).toMatchObject({ ready: 1, oldestReadyAgeMs: 1000 });
      const [first, second] = await scene.lease(node, 2, false);
      expect(await plain()).toMatchObject({ ready: 0, held: 1, oldestReadyAgeMs: null });
      expect(await special()).toMatchObject({ ready: 0, held: 1 });
      const lease = first!.task.label === 'a' ? first! : second!;
      const other = first!.task.label === 'a' ? second! : first!;
      await scene.heartbeat(refOf(lease));
      expect(await plain()).toMatchObject({ held: 1 });
      await scene.fail(refOf(lease));
      expect(await plain()).toMatchObject({ ready: 0, held: 0, delayed: 1 });
      await scene.release(refOf(other));
      expect(await special()).toMatchObject({ ready: 1, held: 0, blocked: 1, delayed: 1 });
      wait(4000);
      await store.sweep();
      expect(await plain()).toMatchObject({ ready: 1, delayed: 0 });
      expect(await special()).toMatchObject({ ready: 2, delayed: 0, blocked: 1 });
      await finish(await takeNamed(node, 'a'));
      expect(await plain()).toBeUndefined();
      expect(await special()).toMatchObject({ ready: 3, blocked: 0 });
      await store.cancelJob(id);
      expect(await store.queues()).toEqual([]);
    });

    test('deleting a job takes its tasks out', async () => {
      const { scene, store, at } = world();
      const id = await scene.submit([{ label: 'a' }, { label: 'b' }, { label: 'c', not_before: at(1000) }], {
        edges: [{ from: 'a', to: 'b' }],
      });
      expect(await store.queues()).toMatchObject([{ ready: 1, blocked: 1, delayed: 1 }]);
      await store.deleteJob(id);
      expect(await store.queues()).toEqual([]);
    });
  });

  describe('schedules', () => {
    const CLAIM = 30_000;
    const draft = (members: Partial<NewSchedule> = {}): NewSchedule => ({
      name: 'nightly',
      cron: '0 3 * * *',
      timeZone: 'UTC',
      catchUp: 'skip',
      overlap: 'allow',
      job: jobOf([{ label: 'a' }], { label: 'night' }),
      organizationId: 'org-1',
      nextAtMs: Date.parse(world().at(1000)),
      replace: false,
      ...members,
    });

    test('are kept, listed by name and removed; a name is taken unless it is to be replaced', async () => {
      const { store, at } = world();
      const kept = await store.putSchedule(draft());
      expect(kept).toEqual({
        name: 'nightly',
        domain_id: DOMAIN,
        cron: '0 3 * * *',
        time_zone: 'UTC',
        catch_up: 'skip',
        overlap: 'allow',
        job: jobOf([{ label: 'a' }], { label: 'night' }),
        created_at: at(0),
        next_at: at(1000),
        last_tick_at: null,
        last_outcome: null,
        last_job_id: null,
      });
      await expect(store.putSchedule(draft())).rejects.toMatchObject({ code: 'already_exists' });
      const elsewhere = draft({ name: 'a', job: jobOf([{}], { domain_id: OTHER_DOMAIN }), nextAtMs: null });
      await store.putSchedule(elsewhere);
      await store.putSchedule({ ...elsewhere, name: 'b' });
      const names = async (domainId: string | null) =>
        (await store.listSchedules(domainId)).map(({ name }) => name);
      expect(await names(null)).toEqual(['a', 'b', 'nightly']);
      expect(await names(OTHER_DOMAIN)).toEqual(['a', 'b']);
      expect(await store.getSchedule(DOMAIN, 'nightly')).toEqual(kept);
      expect(await store.getSchedule(OTHER_DOMAIN, 'nightly')).toBeNull();
      const replaced = await store.putSchedule(draft({ cron: '5 3 * * *', replace: true }));
      expect(await store.getSchedule(DOMAIN, 'nightly')).toEqual(replaced);
      expect(await store.deleteSchedule(OTHER_DOMAIN, 'nightly')).toBe(false);
      expect(await store.deleteSchedule(DOMAIN, 'nightly')).toBe(true);
      expect(await store.deleteSchedule(DOMAIN, 'nightly')).toBe(false);
      expect(await names(DOMAIN)).toEqual([]);
    });

    test('a due tick is claimed by one until it is ended or the claim is over', async () => {
      const { store, wait, at } = world();
      await store.putSchedule(draft());
      const first = Date.parse(at(1000));
      expect(await store.claimSchedules(CLAIM)).toEqual({ due: [], nextAtMs: first });
      wait(1000);
      const [one, two] = await Promise.all([store.claimSchedules(CLAIM), store.claimSchedules(CLAIM)]);
      const [due] = [...one.due, ...two.due];
      expect(one.due.length + two.due.length).toBe(1);
      expect(due).toMatchObject({ tickMs: first, nowMs: first, organizationId: 'org-1' });
      wait(CLAIM - 1);
      expect(await store.claimSchedules(CLAIM)).toEqual({ due: [], nextAtMs: first + CLAIM });
      wait(1);
      const again = await store.claimSchedules(CLAIM);
      expect(again.due).toMatchObject([{ tickMs: first, revision: due!.revision }]);
      const end = {
        revision: due!.revision,
        tickMs: first,
        lastTickMs: first,
        nextAtMs: first + 100_000,
        outcome: 'submitted' as const,
        jobId: 'job-1',
      };
      expect(await store.endTick(end)).toBe(true);
      // Whoever held the claim before comes too late.
      expect(await store.endTick(end)).toBe(false);
      expect(await store.getSchedule(DOMAIN, 'nightly')).toMatchObject({
        next_at: new Date(first + 100_000).toISOString(),
        last_tick_at: new Date(first).toISOString(),
        last_outcome: 'submitted',
        last_job_id: 'job-1',
      });
      wait(100_000);
      const [next] = (await store.claimSchedules(CLAIM)).due;
      // A tick without a job keeps the one before; a schedule may have no further ticks.
      await store.endTick({ ...end, tickMs: next!.tickMs, nextAtMs: null, outcome: 'skipped', jobId: null });
      expect(await store.getSchedule(DOMAIN, 'nightly')).toMatchObject({
        next_at: null,
        last_outcome: 'skipped',
        last_job_id: 'job-1',
      });
      expect(await store.claimSchedules(CLAIM)).toEqual({ due: [], nextAtMs: null });
    });

    test('one that took the name of another is not moved on by a tick of that', async () => {
      const { store, wait } = world();
      await store.putSchedule(draft());
      wait(1000);
      const [due] = (await store.claimSchedules(CLAIM)).due;
      const replaced = await store.putSchedule(
        draft({ replace: true, nextAtMs: due!.tickMs, cron: '1 1 * * *' }),
      );
      const end = { tickMs: due!.tickMs, lastTickMs: due!.tickMs, nextAtMs: null, jobId: 'j' };
      expect(await store.endTick({ ...end, revision: due!.revision, outcome: 'submitted' })).toBe(false);
      expect(await store.getSchedule(DOMAIN, 'nightly')).toEqual(replaced);
      // It is due itself, whatever was claimed of the other.
      expect((await store.claimSchedules(CLAIM)).due).toMatchObject([{ schedule: replaced }]);
    });

    test('several dispatchers submit one job for each tick', async () => {
      const { store, scene, wait, at } = world();
      const clock = { now: () => Date.parse(at(0)) };
      await store.putSchedule(draft({ cron: '* * * * *', nextAtMs: Date.parse(at(60_000)) }));
      for (let minute = 0; minute < 5; minute += 1) {
        wait(60_000);
        await Promise.all(Array.from({ length: 3 }, () => tickOnce(store, clock.now)));
      }
      const { items } = await store.listJobs(ALL_JOBS);
      expect(items.map(({ job }) => job.meta['schedule'])).toEqual(
        [0, -60_000, -120_000, -180_000, -240_000].map((ms) => ({ name: 'nightly', tick: at(ms) })),
      );
      const [{ job } = { job: null }] = items;
      expect(await store.getSchedule(DOMAIN, 'nightly')).toMatchObject({ last_job_id: job?.id });
      expect(await scene.lease(await scene.node(), 10)).toHaveLength(5);
    });

    test('one that died after it submitted is followed by one that finds the same job', async () => {
      const { store, wait, at } = world();
      await store.putSchedule(draft({ cron: '* * * * *', nextAtMs: Date.parse(at(60_000)) }));
      wait(60_000);
      const dying = { ...only(store), endTick: () => Promise.reject(new Error('killed')) };
      await tickOnce(dying, () => Date.parse(at(0)));
      expect((await store.listJobs(ALL_JOBS)).items).toHaveLength(1);
      await tickOnce(store, () => Date.parse(at(0)));
      expect((await store.getSchedule(DOMAIN, 'nightly'))?.last_job_id).toBeNull();
      wait(CLAIM);
      await tickOnce(store, () => Date.parse(at(0)));
      const { items } = await store.listJobs(ALL_JOBS);
      expect(items).toHaveLength(1);
      expect(await store.getSchedule(DOMAIN, 'nightly')).toMatchObject({
        last_outcome: 'submitted',
        last_job_id: items[0]!.job.id,
        next_at: at(30_000),
      });
    });

    test.each([
      ['skip', 'missed', 0],
      ['one', 'submitted', 1],
    ] as const)('of ticks that nobody was there for, with %s: %s', async (catchUp, outcome, jobs) => {
      const { store, wait, at } = world();
      await store.putSchedule(draft({ cron: '0 * * * *', catchUp, nextAtMs: Date.parse(at(3_600_000)) }));
      // Five hours and a half later.
      wait(5.5 * 3_600_000);
      await tickOnce(store, () => Date.parse(at(0)));
      expect(await store.getSchedule(DOMAIN, 'nightly')).toMatchObject({
        last_outcome: outcome,
        last_tick_at: at(-1_800_000),
        next_at: at(1_800_000),
      });
      expect((await store.listJobs(ALL_JOBS)).items).toHaveLength(jobs);
    });

    test('a tick is skipped while the job before has not ended, if that is asked for', async () => {
      const { store, scene, wait, at } = world();
      await store.putSchedule(
        draft({ cron: '* * * * *', overlap: 'skip', nextAtMs: Date.parse(at(60_000)) }),
      );
      const outcomes: unknown[] = [];
      for (let minute = 0; minute < 4; minute += 1) {
        wait(60_000);
        await tickOnce(store, () => Date.parse(at(0)));
        outcomes.push((await store.getSchedule(DOMAIN, 'nightly'))?.last_outcome);
        if (minute === 1) await finish(await scene.take(await scene.node()));
      }
      expect(outcomes).toEqual(['submitted', 'skipped', 'submitted', 'skipped']);
    });

    test('a thousand are kept, one more is refused until one is gone', async () => {
      const { store } = world();
      for (let at = 0; at < MAX_SCHEDULES; at += 1) {
        await store.putSchedule(draft({ name: `s${at}`, nextAtMs: null }));
      }
      await expect(store.putSchedule(draft())).rejects.toMatchObject({ code: 'resource_exhausted' });
      await store.putSchedule(draft({ name: 's1', nextAtMs: null, replace: true }));
      await store.deleteSchedule(DOMAIN, 's2');
      await store.putSchedule(draft());
      expect(await store.listSchedules(null)).toHaveLength(MAX_SCHEDULES);
    }, 60_000);
  });

  describe('tasks that failed for good', () => {
    test('are listed, those of the newest job first, by page, capability, job and domain', async () => {
      const { scene, store } = world();
      const node = await scene.node({ capabilities: ['/test/work/v1', '/test/other/v1'] });
      const other = { capability: '/test/other/v1' };
      const jobs: string[] = [];
      for (const tasks of [
        [{ label: 'a1' }, { label: 'a2', ...other }],
        [{ label: 'fine' }],
        [{ label: 'b1' }, { label: 'b2' }],
      ]) {
        jobs.push(await scene.submit(tasks, tasks.length === 1 ? {} : { domain_id: DOMAIN }));
        const leases = await scene.lease(node, 10);
        for (const lease of leases) {
          if (lease.task.label === 'fine') await finish(lease);
          // Each of them fails by itself: those that are held are only asked to end.
          else if (lease === leases[0]) await failFor(lease, `${lease.task.label} broke`);
          else await scene.release(refOf(lease), 'canceled');
        }
      }
      const elsewhere = await scene.submit([{ label: 'c' }], { domain_id: OTHER_DOMAIN });
      await failFor(await scene.take(node));
      const list = (query: Partial<Parameters<Store['deadTasks']>[0]> = {}) =>
        store.deadTasks({
          domainId: null,
          jobId: null,
          capability: null,
          limit: 100,
          cursor: null,
          ...query,
        });
      const labels = async (query: Parameters<typeof list>[0] = {}): Promise<string[]> =>
        (await list(query)).items.map(({ label }) => label);
      expect(await labels()).toEqual(['c', 'b1', 'a1']);
      const [, , a1] = (await list()).items;
      expect(a1).toMatchObject({
        job_id: jobs[0],
        status: 'failed',
        reason: 'a1 broke',
        attempts: 1,
        capability: '/test/work/v1',
      });
      expect(await labels({ domainId: DOMAIN })).toEqual(['b1', 'a1']);
      expect(await labels({ jobId: jobs[0]! })).toEqual(['a1']);
      expect(await labels({ jobId: elsewhere, domainId: DOMAIN })).toEqual([]);
      expect(await labels({ jobId: UNKNOWN })).toEqual([]);
      expect(await labels({ capability: '/test/other/v1' })).toEqual([]);
      // Page by page it is the same.
      const paged: string[] = [];
      for (let cursor: string | null = null; ;) {
        const page: Awaited<ReturnType<typeof list>> = await list({ limit: 1, cursor });
        paged.push(...page.items.map(({ label }) => label));
        cursor = page.nextCursor;
        if (cursor === null) break;
      }
      expect(paged).toEqual(['c', 'b1', 'a1']);
      await expect(list({ cursor: 'x' })).rejects.toThrow('cursor must be one a listing returned');
    });

    test('several of one job are on as many pages as it takes', async () => {
      const { scene, store, wait } = world();
      await scene.submit(
        Array.from({ length: 5 }, (_, index) => ({ label: `${index}` })),
        {},
      );
      // All at once, by a deadline.
      await scene.submit(
        Array.from({ length: 5 }, (_, index) => ({ label: `late-${index}`, deadline_at: world().at(1000) })),
      );
      wait(1000);
      await store.sweep();
      const found: string[] = [];
      let cursor: string | null = null;
      do {
        const page: Awaited<ReturnType<Store['deadTasks']>> = await store.deadTasks({
          domainId: null,
          jobId: null,
          capability: null,
          limit: 2,
          cursor,
        });
        expect(page.items.length).toBeLessThanOrEqual(2);
        found.push(...page.items.map(({ label }) => label));
        cursor = page.nextCursor;
      } while (cursor !== null);
      expect(found).toEqual([4, 3, 2, 1, 0].map((index) => `late-${index}`));
    });
  });
}

type Ticking = Pick<Store, 'claimSchedules' | 'endTick' | 'submit' | 'getJob'>;

function only(store: Store): Ticking {
  return {
    claimSchedules: (claimMs) => store.claimSchedules(claimMs),
    endTick: (tick) => store.endTick(tick),
    submit: (jobs) => store.submit(jobs),
    getJob: (id) => store.getJob(id),
  };
}

/** What a dispatcher does about what is due now; then it is closed. */
async function tickOnce(store: Ticking, now: () => number): Promise<void> {
  const clock = new SimulatedClock({ startAt: now() });
  const scheduler = new Scheduler({ store, clock, log: SILENT });
  await scheduler.start();
  await scheduler.close();
}

const SILENT: Logger = { debug() {}, info() {}, warn() {}, error() {}, child: () => SILENT };

const ALL_JOBS = {
  domainId: null,
  status: null,
  capabilities: [],
  matchAllCapabilities: false,
  limit: 100,
  cursor: null,
} as const;
