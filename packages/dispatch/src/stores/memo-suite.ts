/** What any store must do with jobs that may be completed from earlier results. A part of `suite.ts`. */
import type { Json, JsonObject } from '@millrace/runner';
import { describe, expect, test } from 'vitest';
import type { DataRecord, JobSpec, TaskSubmission } from '../records.ts';
import type { GrantedLease, Store } from '../store.ts';
import { DOMAIN, jobOf, refOf, type Scene } from './suite.ts';

/** What a test is given, afresh for each. */
export interface MemoWorld {
  readonly scene: Scene;
  readonly store: Store;
  /** Lets time pass. */
  readonly wait: (ms: number) => void;
}

const REF = `compute://sha256/${'c'.repeat(64)}`;
const CODE: JsonObject = { ref: REF, now: 0, input: { n: 1 } };
const OTHER_DOMAIN = '7f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10';

export function memoSuite(world: () => MemoWorld): void {
  describe('results that are given again', () => {
    const cached = (tasks: readonly Partial<TaskSubmission>[], job: Partial<JobSpec> = {}): Promise<string> =>
      world().scene.submit(tasks, { cache: true, ...job });

    async function item(name: string, digit: string, domainId = DOMAIN): Promise<DataRecord> {
      const [record] = await world().store.putData([
        {
          domainId,
          id: null,
          name,
          dataType: 'json',
          digest: `sha256:${digit.repeat(64)}`,
          size: 5,
          lease: null,
          replaceByName: false,
        },
      ]);
      return record!;
    }

    /** What our nodes do at the end of a task that made these files: path below the prefix to a digit of the digest. */
    async function finish(lease: GrantedLease, files: Readonly<Record<string, string>>): Promise<string[]> {
      const { scene, store } = world();
      const { id, outputs_prefix } = lease.task;
      const artifacts: { logical_path: string; name: string; data_type: string; id: string }[] = [];
      for (const [path, digit] of Object.entries(files)) {
        const logical = [outputs_prefix, path].filter(Boolean).join('/');
        const name = `${logical.replaceAll(/[^a-z]/g, '_')}_${id}`;
        const [record] = await store.putData([
          {
            domainId: lease.domainId,
            id: null,
            name,
            dataType: 'json',
            digest: `sha256:${digit.repeat(64)}`,
            size: 5,
            lease: refOf(lease),
            replaceByName: false,
          },
        ]);
        artifacts.push({ logical_path: logical, name, data_type: 'json', id: record!.id });
      }
      const outputs = artifacts.map((artifact) => artifact.id);
      const meta: Json = { job: { task_id: id, job_id: lease.task.job_id, capability: 'x' }, artifacts };
      expect(await scene.complete(refOf(lease), outputs, meta)).toBe('ok');
      return outputs;
    }

    /** Does a job of one task, whose result is then there to be given again. Returns the task's id. */
    async function doOnce(task: Partial<TaskSubmission> = { meta: CODE }): Promise<string> {
      const { scene } = world();
      await cached([task]);
      const lease = await scene.take(await scene.node());
      await finish(lease, { 'output.json': 'a' });
      return lease.task.id;
    }

    test('an equal task is completed when it is submitted, before anybody is given it', async () => {
      const { scene, store, wait } = world();
      const first = await doOnce();
      const { job_id: firstJob } = await scene.task(first);
      wait(1000);
      const id = await cached([{ label: 'again', meta: CODE }]);
      const { job, tasks, receipts, tasks_summary } = await scene.job(id);
      expect([job.status, job.cache, tasks_summary.completed]).toEqual(['completed', true, 1]);
      expect(await scene.lease(await scene.node())).toEqual([]);
      const [task] = tasks;
      const [receipt] = receipts;
      expect(task).toMatchObject({ status: 'completed', attempts: 0, output_cids: receipt!.outputs });
      // Who did it is who did it then; where it comes from is said.
      const [before] = (await scene.job(firstJob)).receipts;
      expect(receipt).toMatchObject({
        task_id: task!.id,
        job_id: id,
        node_id: before!.node_id,
        outcome: 'completed',
        meta: {
          job: { task_id: task!.id, job_id: id, capability: 'x' },
          memo: { task_id: first, job_id: firstJob, key: expect.stringMatching(/^[0-9a-f]{64}$/) },
        },
      });
      // Its outputs are its own, over the same bytes.
      const [copied] = receipt!.outputs;
      const [original] = before!.outputs;
      expect(copied).not.toBe(original);
      const copy = await store.getData(DOMAIN, copied!);
      expect(copy).toMatchObject({ digest: `sha256:${'a'.repeat(64)}`, size: 5, data_type: 'json' });
      expect(copy?.name).toBe(`output_json_${task!.id}`);
      expect((receipt!.meta as JsonObject)['artifacts']).toEqual([
        { logical_path: 'output.json', name: copy?.name, data_type: 'json', id: copied },
      ]);
      expect(await store.deleteData(DOMAIN, original!)).toBe(true);
      expect(await store.unreferencedDigests([copy!.digest])).toEqual([]);
      expect(await scene.story(id)).toEqual([
        'job.submitted',
        'task.runnable:again',
        'task.completed:again',
        'job.completed',
      ]);
      const [, , completed] = (await store.events(id, 0, 10)) ?? [];
      expect(completed?.data).toEqual({
        outputs: [copied],
        memo: { task_id: first, job_id: firstJob },
      });
    });

    test('code, inputs, parameters, the kind of work and who may do it all have to be the same', async () => {
      const { scene } = world();
      const one = await item('one', '1');
      const same = await item('same bytes', '1');
      const other = await item('other', '2');
      const base: Partial<TaskSubmission> = { meta: CODE, inputs_cids: [one.id, other.id] };
      await doOnce(base);
      const statusOf = async (task: Partial<TaskSubmission>): Promise<string> => {
        const id = await cached([{ ...base, ...task }]);
        const { job } = await scene.job(id);
        return job.status;
      };
      // Equal bytes are equal inputs, and neither labels nor attempts decide a result; nor does the order of members.
      expect(
        await statusOf({ inputs_cids: [same.id, other.id], label: 'x', max_attempts: 1, priority: 9 }),
      ).toBe('completed');
      expect(await statusOf({ meta: { input: { n: 1 }, now: 0, ref: REF } })).toBe('completed');
      for (const task of [
        { inputs_cids: [other.id, one.id] },
        { inputs_cids: [one.id] },
        { inputs_cids: [one.id, other.id, one.id] },
        { meta: { ...CODE, input: { n: 2 } } },
        { meta: { ...CODE, now: 1 } },
        { meta: { ...CODE, extra: null } },
        { meta: { ...CODE, ref: `compute://sha256/${'d'.repeat(64)}` } },
        { capability: '/test/other/v1' },
        { mode: 'dedicated' as const },
        { capability_filters: { gpu: 'yes' } },
      ]) {
        expect([task, await statusOf(task)]).toEqual([task, 'pending']);
      }
    });

    test('a task takes part when it names its code and declares itself deterministic, in a job that asks for it', async () => {
      const { scene } = world();
      const declared = { code_digest: 'v1', deterministic: true };
      const given = async (meta: Json, job: Partial<JobSpec> = {}): Promise<boolean> => {
        const node = await scene.node();
        for (const _ of [1, 2]) {
          const id = await scene.submit([{ meta }], { cache: true, ...job });
          const [lease] = await scene.lease(node);
          if (lease === undefined) return (await scene.job(id)).job.status === 'completed';
          await finish(lease, { 'output.json': 'a' });
        }
        return false;
      };
      const taking: readonly Json[] = [
        CODE,
        { ...CODE, now: '2026-01-01T00:00:00Z' },
        { ref: REF, deterministic: true },
        declared,
      ];
      for (const meta of taking) expect([meta, await given(meta)]).toEqual([meta, true]);
      const refused: readonly Json[] = [
        { ref: REF },
        { ref: REF, now: null },
        { ...CODE, deterministic: false, n: 1 },
        { code_digest: 'v1', now: 0 },
        { deterministic: true },
        { ...declared, code_digest: '' },
        { ref: 'compute://blake3/zz', now: 0 },
        [CODE],
        null,
      ];
      for (const meta of refused) expect([meta, await given(meta)]).toEqual([meta, false]);
      expect(await given({ ...CODE, n: 2 }, { cache: false })).toBe(false);
    });

    test('a job without cache is given nothing, and gives nothing', async () => {
      const { scene } = world();
      const node = await scene.node();
      await scene.submit([{ meta: CODE }]);
      await finish(await scene.take(node), { 'output.json': 'a' });
      const asking = await cached([{ meta: CODE }]);
      expect((await scene.job(asking)).job.status).toBe('pending');
      await finish(await scene.take(node), { 'output.json': 'a' });
      const plain = await scene.submit([{ meta: CODE }]);
      const { job } = await scene.job(plain);
      expect([job.status, job.cache]).toEqual(['pending', undefined]);
    });

    test('what one domain made is not given to another', async () => {
      const { scene } = world();
      await doOnce();
      const id = await cached([{ meta: CODE }], { domain_id: OTHER_DOMAIN });
      expect((await scene.job(id)).job.status).toBe('pending');
    });

    test('only what completed is given again', async () => {
      const { scene } = world();
      const node = await scene.node();
      await cached([{ meta: CODE, max_attempts: 1 }]);
      await scene.fail(refOf(await scene.take(node)));
      const id = await cached([{ meta: CODE }]);
      expect((await scene.job(id)).job.status).toBe('pending');
    });

    test('stages that were done before are done in one go, and the first that was not waits for a node', async () => {
      const { scene } = world();
      const stages = (last: Json): Partial<TaskSubmission>[] => [
        { label: 'a', meta: { ...CODE, step: 'a' } },
        { label: 'b', meta: { ...CODE, step: 'b' }, inputs_cids: ['stage:a'] },
        { label: 'c', meta: last, inputs_cids: ['stage:b'] },
      ];
      const edges = [
        { from: 'a', to: 'b' },
        { from: 'b', to: 'c' },
      ];
      const node = await scene.node();
      await cached(stages({ ...CODE, step: 'c' }), { edges });
      for (const digit of ['a', 'b', 'c']) await finish(await scene.take(node), { 'output.json': digit });
      const all = await cached(stages({ ...CODE, step: 'c' }), { edges });
      expect((await scene.job(all)).job.status).toBe('completed');
      const part = await cached(stages({ ...CODE, step: 'new' }), { edges });
      expect(await scene.states(part)).toEqual({ a: 'completed', b: 'completed', c: 'queued' });
      const lease = await scene.take(node);
      const { tasks } = await scene.job(part);
      // It works on what its own job has, not on the first one's.
      expect(lease.task.inputs_cids).toEqual(tasks[1]!.output_cids);
    });

    test('what a completion makes ready may have been done before, too', async () => {
      const { scene } = world();
      const node = await scene.node();
      const second = { label: 'b', meta: CODE, inputs_cids: ['stage:a'] };
      const edges = [{ from: 'a', to: 'b' }];
      await cached([{ label: 'a' }, second], { edges });
      await finish(await scene.take(node), { 'x.json': 'e' });
      await finish(await scene.take(node), { 'output.json': 'f' });
      const id = await cached([{ label: 'a' }, second], { edges });
      const lease = await scene.take(node);
      expect(lease.task.label).toBe('a');
      await finish(lease, { 'x.json': 'e' });
      expect((await scene.job(id)).job.status).toBe('completed');
      expect(await scene.lease(node)).toEqual([]);
    });

    test('a chain of a thousand stages is no deeper than one', async () => {
      const { scene } = world();
      const node = await scene.node();
      const LENGTH = 1000;
      const tasks = Array.from({ length: LENGTH }, (_, index) => ({
        label: `s${index}`,
        meta: { ...CODE, index },
      }));
      const edges = tasks.slice(1).map(({ label }, index) => ({ from: `s${index}`, to: label }));
      await cached(tasks);
      for (let left = LENGTH; left > 0;) {
        const leases = await scene.lease(node, 100);
        left -= leases.length;
        for (const lease of leases) await scene.complete(refOf(lease), [], { artifacts: [] });
      }
      const id = await cached(tasks, { edges });
      const { job, tasks_summary } = await scene.job(id);
      expect([job.status, tasks_summary.completed]).toEqual(['completed', LENGTH]);
    });

    test('paths stand under the new task’s prefix, names end with its id', async () => {
      const { scene } = world();
      const node = await scene.node();
      await cached([{ meta: CODE, outputs_prefix: '/first/try/' }]);
      const lease = await scene.take(node);
      await finish(
        { ...lease, task: { ...lease.task, outputs_prefix: 'first/try' } },
        { 'a/b.json': 'a', 'c.json': 'b' },
      );
      for (const [prefix, paths] of [
        ['second', ['second/a/b.json', 'second/c.json']],
        [null, ['a/b.json', 'c.json']],
      ] as const) {
        const id = await cached([{ meta: CODE, outputs_prefix: prefix }]);
        const { receipts, tasks } = await scene.job(id);
        const { artifacts } = receipts[0]!.meta as { artifacts: { logical_path: string; name: string }[] };
        expect(artifacts.map((artifact) => artifact.logical_path)).toEqual(paths);
        for (const { name } of artifacts) expect(name.endsWith(`_${tasks[0]!.id}`)).toBe(true);
      }
    });

    test('a result whose bytes were replaced or deleted is made anew, and then given again', async () => {
      const { scene, store } = world();
      for (const spoil of ['replace', 'delete'] as const) {
        const meta = { ...CODE, spoil };
        const first = await doOnce({ meta });
        const [id] = (await scene.task(first)).output_cids;
        if (spoil === 'delete') await store.deleteData(DOMAIN, id!);
        else {
          await store.putData([
            {
              domainId: DOMAIN,
              id: id!,
              name: null,
              dataType: null,
              digest: `sha256:${'9'.repeat(64)}`,
              size: 5,
              lease: null,
              replaceByName: false,
            },
          ]);
        }
        const again = await cached([{ meta }]);
        expect([spoil, (await scene.job(again)).job.status]).toEqual([spoil, 'pending']);
        await finish(await scene.take(await scene.node()), { 'output.json': 'b' });
        const third = await cached([{ meta }]);
        const { job, tasks } = await scene.job(third);
        expect(job.status).toBe('completed');
        expect((await store.getData(DOMAIN, tasks[0]!.output_cids[0]!))?.digest).toBe(
          `sha256:${'b'.repeat(64)}`,
        );
      }
    });

    test('inputs that were changed while the task was worked on leave nothing to be given', async () => {
      const { scene, store, wait } = world();
      const input = await item('input', '1');
      await cached([{ meta: CODE, inputs_cids: [input.id] }]);
      const lease = await scene.take(await scene.node());
      wait(1);
      const change = (digit: string): Promise<unknown> =>
        store.putData([
          {
            domainId: DOMAIN,
            id: input.id,
            name: null,
            dataType: null,
            digest: `sha256:${digit.repeat(64)}`,
            size: 5,
            lease: null,
            replaceByName: false,
          },
        ]);
      await change('2');
      await finish(lease, { 'output.json': 'a' });
      for (const digit of ['1', '2']) {
        await change(digit);
        const id = await cached([{ meta: CODE, inputs_cids: [input.id] }]);
        expect([digit, (await scene.job(id)).job.status]).toEqual([digit, 'pending']);
      }
    });

    test('inputs that are none of the domain’s data, and outputs of another’s name, leave nothing to be given', async () => {
      const { scene, store } = world();
      const node = await scene.node();
      const foreign = await item('foreign', '1', OTHER_DOMAIN);
      const twice = async (task: Partial<TaskSubmission>, end: (lease: GrantedLease) => Promise<unknown>) => {
        await cached([task]);
        await end(await scene.take(node));
        const id = await cached([task]);
        const { status } = (await scene.job(id)).job;
        for (const lease of await scene.lease(node)) await scene.complete(refOf(lease));
        return status;
      };
      for (const input of [foreign.id, 'https://example.org/data', '00000000-0000-7000-8000-000000000000']) {
        const status = await twice({ meta: { ...CODE, input }, inputs_cids: [input] }, (lease) =>
          finish(lease, { 'output.json': 'a' }),
        );
        expect([input, status]).toEqual([input, 'pending']);
      }
      const named = await item('a name somebody relies on', '3');
      const report = (id: string, name: string): Json => ({
        artifacts: [{ logical_path: 'x', name, data_type: 'json', id }],
      });
      for (const [n, meta] of [
        report(named.id, named.name),
        report(named.id, 'not what it is called'),
        { artifacts: [] },
        { artifacts: 'none' },
        null,
      ].entries()) {
        const status = await twice({ meta: { ...CODE, n } }, (lease) =>
          scene.complete(refOf(lease), [named.id], meta),
        );
        expect([n, status]).toEqual([n, 'pending']);
      }
      expect((await store.getData(DOMAIN, named.id))?.digest).toBe(named.digest);
    });

    test('a task that makes nothing is not done twice either', async () => {
      const { scene } = world();
      await cached([{ meta: CODE }]);
      await scene.complete(refOf(await scene.take(await scene.node())), [], { artifacts: [] });
      const id = await cached([{ meta: CODE }]);
      expect((await scene.job(id)).job.status).toBe('completed');
    });

    test('a result goes with the job that made it', async () => {
      const { scene, store } = world();
      const first = await doOnce();
      const { job_id: job } = await scene.task(first);
      expect(await store.deleteJob(job)).toBe(true);
      const id = await cached([{ meta: CODE }]);
      expect((await scene.job(id)).job.status).toBe('pending');
      expect(await store.deleteJob(id)).toBe(true);
    });

    test('the counts are those of a task that was done', async () => {
      const { scene, store } = world();
      await doOnce();
      await cached([{ meta: CODE }, { meta: CODE, label: 'second' }, { label: 'real' }]);
      expect((await store.stats()).tasks).toMatchObject({ queued: 1, leased: 0, running: 0, completed: 3 });
      expect(await scene.lease(await scene.node(), 5)).toHaveLength(1);
    });

    test('the same submission with the same idempotency key is the same job', async () => {
      const { store, scene } = world();
      await doOnce();
      const submission = {
        spec: jobOf([{ meta: CODE }], { cache: true }),
        organizationId: null,
        idempotencyKey: 'k',
        submitter: 's',
      };
      const [one] = await store.submit([submission]);
      const [two] = await store.submit([submission]);
      if (!one?.ok || !two?.ok) throw new Error('refused');
      expect(two.value).toEqual({ jobId: one.value.jobId, created: false });
      expect((await scene.job(one.value.jobId)).job.status).toBe('completed');
    });
  });
}
