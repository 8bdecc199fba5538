/** What any store must do. Run it over an implementation: `storeSuite('sqlite', make)`. */
import { MillraceError } from '@millrace/runner';
import type { Clock, Json, Random } from '@millrace/runner';
import { SimulatedClock, seededRandom } from '@millrace/runner/testing';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { FREE_DRAINS, FREE_NODE_FAULTS } from '../lifecycle.ts';
import type { DataRecord, JobSpec, TaskRecord, TaskSubmission } from '../records.ts';
import type { Resources } from '../resources.ts';
import { flowSuite } from './flow-suite.ts';
import { memoSuite } from './memo-suite.ts';
import { resumeSuite } from './resume-suite.ts';
import { sharingSuite } from './sharing-suite.ts';
import type {
  DataWrite,
  GrantedLease,
  LeaseRef,
  LogQuery,
  Outcome,
  Store,
  StoreChange,
  UploadRecord,
} from '../store.ts';

export interface StoreSuiteOptions {
  readonly clock: Clock;
  readonly random: Random;
  readonly leaseTtlMs: number;
  readonly cancelGraceMs: number;
  readonly backoff: { readonly baseMs: number; readonly capMs: number };
}

export const DOMAIN = '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21';
const OTHER_DOMAIN = '2f9f6b57-2c7b-4e0e-8d1b-7f8d0a4f9c10';
const UNKNOWN = '00000000-0000-7000-8000-000000000000';
const UUID_V7 = /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/;
const SECRET = 'a'.repeat(64);
const ORG = 'org-1';
const CAPABILITY = '/test/work/v1';

const TTL = 15_000;
const GRACE = 60_000;
const BACKOFF = { baseMs: 1000, capMs: 60_000 };

/** A task as the job parser would give it. */
export function taskOf(task: Partial<TaskSubmission> = {}): TaskSubmission {
  const label = task.label ?? 'task';
  return {
    label,
    stage: label,
    capability: CAPABILITY,
    capability_filters: {},
    priority: 0,
    inputs_cids: [],
    outputs_prefix: null,
    mode: 'public',
    meta: null,
    max_attempts: 3,
    deadline_at: null,
    ...task,
  };
}

/** A job as the job parser would give it. */
export function jobOf(tasks: readonly Partial<TaskSubmission>[], job: Partial<JobSpec> = {}): JobSpec {
  return {
    label: 'job',
    domain_id: DOMAIN,
    priority: 0,
    meta: {},
    edges: [],
    deadline_at: null,
    ...job,
    tasks: tasks.map((task) => taskOf(task)),
  };
}

/** The value of an outcome; throws its error. */
export function valueOf<T>(outcome: Outcome<T> | undefined): T {
  if (!outcome) throw new Error('the store gave no answer for the item');
  if (!outcome.ok) throw outcome.error;
  return outcome.value;
}

function codeOf(outcome: Outcome<unknown> | undefined): string {
  return outcome?.ok === false ? outcome.error.code : 'ok';
}

async function putOne(store: Store, write: DataWrite): Promise<DataRecord> {
  const [record] = await store.putData([write]);
  return record!;
}

async function codeOfRejection(promise: Promise<unknown>): Promise<string> {
  try {
    await promise;
    return 'ok';
  } catch (error) {
    return MillraceError.is(error) ? error.code : `not a MillraceError: ${String(error)}`;
  }
}

let wallets = 0;

/** A store with verbs in the words of a test. */
export class Scene {
  readonly store: Store;

  constructor(store: Store) {
    this.store = store;
  }

  /** Registers a node and returns its id. */
  async node(
    options: {
      readonly capabilities?: readonly string[];
      readonly labels?: Readonly<Record<string, string>>;
      readonly mode?: 'public' | 'dedicated';
      readonly organizationId?: string;
      readonly max?: number;
      readonly resources?: Resources;
    } = {},
  ): Promise<string> {
    const { id } = await this.store.createNode({
      name: 'node',
      mode: options.mode ?? 'public',
      organizationId: options.organizationId ?? ORG,
      secretHash: SECRET,
    });
    await this.registerAgain(id, options);
    return id;
  }

  /** Registers a node as it is from now on. */
  async registerAgain(
    nodeId: string,
    options: {
      readonly capabilities?: readonly string[];
      readonly labels?: Readonly<Record<string, string>>;
      readonly max?: number;
      readonly resources?: Resources;
    },
  ): Promise<void> {
    wallets += 1;
    const fresh = `0x${wallets.toString(16).padStart(40, '0')}`;
    const node = await this.store.getNode(nodeId);
    await this.store.registerNode({
      nodeId,
      secretHash: SECRET,
      wallet: node?.wallet ?? fresh,
      capabilities: options.capabilities ?? [CAPABILITY],
      labels: options.labels ?? {},
      version: '1.0.0',
      maxConcurrency: options.max ?? 100,
      resources: options.resources ?? null,
    });
  }

  /** Submits a job and returns its id. */
  async submit(
    tasks: readonly Partial<TaskSubmission>[] = [{}],
    job: Partial<JobSpec> = {},
    organizationId: string | null = ORG,
  ): Promise<string> {
    const [outcome] = await this.store.submit([
      { spec: jobOf(tasks, job), organizationId, idempotencyKey: null, submitter: 'tester' },
    ]);
    return valueOf(outcome).jobId;
  }

  async lease(nodeId: string, max = 1, start = true): Promise<readonly GrantedLease[]> {
    const [outcome] = await this.store.lease([{ nodeId, max, capabilities: null, start }]);
    return valueOf(outcome).leases;
  }

  /** Leases one task; throws when there is none. */
  async take(nodeId: string, start = true): Promise<GrantedLease> {
    const [lease] = await this.lease(nodeId, 1, start);
    if (!lease) throw new Error('there is no task to lease');
    return lease;
  }

  async complete(ref: LeaseRef, outputCids: readonly string[] = [], meta: Json = null): Promise<string> {
    return codeOf((await this.store.complete([{ ...ref, outputCids, meta }]))[0]);
  }

  async fail(
    ref: LeaseRef,
    options: { readonly reason?: string; readonly retryable?: boolean; readonly nodeFault?: boolean } = {},
  ): Promise<string> {
    const { reason = 'it broke', retryable = true, nodeFault = false } = options;
    return codeOf((await this.store.fail([{ ...ref, reason, details: null, retryable, nodeFault }]))[0]);
  }

  async release(
    ref: LeaseRef,
    reason: 'shutdown' | 'canceled' | 'setup_failed' = 'shutdown',
  ): Promise<string> {
    return codeOf((await this.store.release([{ ...ref, reason }]))[0]);
  }

  async heartbeat(ref: LeaseRef, progress: Json = null, events: readonly Json[] = []) {
    return valueOf((await this.store.heartbeat([{ ...ref, progress, events }]))[0]);
  }

  async task(id: string): Promise<TaskRecord> {
    const task = await this.store.getTask(id);
    if (!task) throw new Error(`task ${id} does not exist`);
    return task;
  }

  async job(id: string) {
    const job = await this.store.getJob(id);
    if (!job) throw new Error(`job ${id} does not exist`);
    return job;
  }

  /** The tasks' states, by label. */
  async states(jobId: string): Promise<Record<string, string>> {
    return Object.fromEntries((await this.job(jobId)).tasks.map(({ label, status }) => [label, status]));
  }

  /** `kind` or `kind:label` of every event. */
  async story(jobId: string): Promise<string[]> {
    const labels = new Map((await this.job(jobId)).tasks.map(({ id, label }) => [id, label]));
    const events = (await this.store.events(jobId, 0, 10_000)) ?? [];
    return events.map(({ kind, task_id: id }) => (id === null ? kind : `${kind}:${labels.get(id) ?? id}`));
  }
}

/** Names the lease as our nodes do. */
export function refOf(lease: GrantedLease): LeaseRef {
  return { taskId: lease.task.id, nodeId: lease.task.reserved_by ?? '', leaseId: lease.leaseId };
}

/** Names the lease as a reference node does. */
function bareRefOf(lease: GrantedLease): LeaseRef {
  return { ...refOf(lease), leaseId: null };
}

/** Artifacts as a completion reports them. */
function artifacts(...items: readonly (readonly [path: string, id: string | null])[]): Json {
  return {
    artifacts: items.map(([path, id]) => ({ logical_path: path, name: path, data_type: 'binary', id })),
  };
}

/** The suite. `make` opens an empty store with the given clock, random source and times. */
export function storeSuite(name: string, make: (options: StoreSuiteOptions) => Promise<Store>): void {
  describe(`store: ${name}`, () => {
    let clock: SimulatedClock;
    let store: Store;
    let scene: Scene;

    beforeEach(async () => {
      clock = new SimulatedClock();
      store = await make({
        clock,
        random: seededRandom(1),
        leaseTtlMs: TTL,
        cancelGraceMs: GRACE,
        backoff: BACKOFF,
      });
      scene = new Scene(store);
    });

    afterEach(() => store[Symbol.asyncDispose]());

    const wait = (ms: number): void => clock.jumpWallClock(ms);
    const at = (ms: number): string => new Date(clock.now() + ms).toISOString();

    memoSuite(() => ({ scene, store, wait }));
    flowSuite(() => ({ scene, store, wait, at }));
    resumeSuite(() => ({ scene, store, wait, at }));
    sharingSuite(() => ({ scene, store, wait, at }));

    describe('submit', () => {
      test('a job is kept as it was submitted', async () => {
        const id = await scene.submit(
          [
            {
              label: 'a',
              stage: 'first',
              capability: '/test/other/v1',
              capability_filters: { gpu: 'yes' },
              priority: 7,
              inputs_cids: ['in-1', 'in-2'],
              outputs_prefix: 'out/',
              mode: 'dedicated',
              meta: { size: 3, deep: [1, null, 'x'] },
              max_attempts: 5,
              deadline_at: at(60_000),
            },
            { label: 'b' },
          ],
          { label: 'my job', priority: 4, meta: { who: 'me' }, edges: [{ from: 'first', to: 'b' }] },
        );
        expect(id).toMatch(UUID_V7);
        const { job, tasks, tasks_summary, receipts } = await scene.job(id);
        expect(job).toEqual({
          id,
          label: 'my job',
          domain_id: DOMAIN,
          status: 'pending',
          priority: 4,
          created_at: at(0),
          updated_at: at(0),
          organization_id: ORG,
          meta: { who: 'me' },
          credit_lock_id: null,
          credit_lock_amount: null,
          credit_locked_at: null,
          credit_released_at: null,
          cancel_requested_at: null,
          deadline_at: null,
          edges: [{ from: 'first', to: 'b' }],
        });
        expect(tasks_summary).toEqual({
          queued: 2,
          leased: 0,
          running: 0,
          completed: 0,
          failed: 0,
          canceled: 0,
        });
        expect(receipts).toEqual([]);
        expect(tasks).toHaveLength(2);
        expect(tasks[0]).toEqual({
          id: expect.stringMatching(UUID_V7),
          job_id: id,
          label: 'a',
          stage: 'first',
          capability: '/test/other/v1',
          capability_filters: { gpu: 'yes' },
          status: 'queued',
          deps_remaining: 0,
          priority: 7,
          inputs_cids: ['in-1', 'in-2'],
          outputs_prefix: 'out/',
          organization_id: ORG,
          attempts: 0,
          max_attempts: 5,
          lease_expires_at: null,
          reserved_by: null,
          meta: { size: 3, deep: [1, null, 'x'] },
          cancel_requested_at: null,
          last_heartbeat_at: null,
          created_at: at(0),
          updated_at: at(0),
          mode: 'dedicated',
          billing_units: null,
          estimated_credit_cost: null,
          debited_amount: null,
          debited_at: null,
          reason: null,
          not_before: null,
          output_cids: [],
          node_faults: 0,
          deadline_at: at(60_000),
        });
        expect(tasks[1]).toMatchObject({ label: 'b', deps_remaining: 1 });
        expect(await scene.task(tasks[1]?.id ?? '')).toEqual(tasks[1]);
      });

      test('unknown jobs and tasks are null', async () => {
        expect(await store.getJob(UNKNOWN)).toBeNull();
        expect(await store.getTask(UNKNOWN)).toBeNull();
        expect(await store.events(UNKNOWN, 0, 10)).toBeNull();
        expect(await store.cancelJob(UNKNOWN)).toBeNull();
        expect(await store.deleteJob(UNKNOWN)).toBe(false);
      });

      test('an idempotency key gives the first job again, for the same submitter and spec', async () => {
        const submit = async (key: string, submitter: string, label: string) =>
          (
            await store.submit([
              { spec: jobOf([{}], { label }), organizationId: ORG, idempotencyKey: key, submitter },
            ])
          )[0];
        const first = valueOf(await submit('k', 'me', 'a'));
        expect(first.created).toBe(true);
        expect(valueOf(await submit('k', 'me', 'a'))).toEqual({ jobId: first.jobId, created: false });
        expect(codeOf(await submit('k', 'me', 'b'))).toBe('already_exists');
        expect(valueOf(await submit('k', 'you', 'b')).created).toBe(true);
        expect(valueOf(await submit('k2', 'me', 'b')).created).toBe(true);
        expect((await store.stats()).tasks.queued).toBe(3);
      });

      test('racing submissions with one key make one job', async () => {
        const job = { spec: jobOf([{}]), organizationId: ORG, idempotencyKey: 'k', submitter: 'me' };
        const answers = (
          await Promise.all(Array.from({ length: 50 }, () => store.submit([job, job])))
        ).flat();
        expect(new Set(answers.map((answer) => valueOf(answer).jobId)).size).toBe(1);
        expect(answers.filter((answer) => valueOf(answer).created)).toHaveLength(1);
        expect((await store.stats()).tasks.queued).toBe(1);
      });

      test.each([
        ['of 128 characters is taken', 'k'.repeat(128), 'ok'],
        ['of 129 is refused', 'k'.repeat(129), 'invalid_argument'],
        ['that is empty is refused', '', 'invalid_argument'],
        ['with a space is refused', 'a b', 'invalid_argument'],
        ['with a letter beyond ASCII is refused', 'ä', 'invalid_argument'],
      ])('an idempotency key %s', async (_, idempotencyKey, code) => {
        const job = { spec: jobOf([{}]), organizationId: ORG, idempotencyKey, submitter: 'me' };
        expect(codeOf((await store.submit([job]))[0])).toBe(code);
      });

      test('one refused job changes nothing for the others of its batch', async () => {
        const good = { spec: jobOf([{}]), organizationId: ORG, idempotencyKey: null, submitter: 'me' };
        const answers = await store.submit([good, { ...good, idempotencyKey: 'not good' }, good]);
        expect(answers.map(codeOf)).toEqual(['ok', 'invalid_argument', 'ok']);
        expect((await store.stats()).jobs.pending).toBe(2);
      });

      test('the key of a deleted job is free again', async () => {
        const job = { spec: jobOf([{}]), organizationId: ORG, idempotencyKey: 'k', submitter: 'me' };
        const first = valueOf((await store.submit([job]))[0]);
        expect(await store.deleteJob(first.jobId)).toBe(true);
        const second = valueOf((await store.submit([job]))[0]);
        expect(second.created).toBe(true);
        expect(second.jobId).not.toBe(first.jobId);
      });
    });

    describe('lease', () => {
      test('one task goes to one node, with all a node needs', async () => {
        const node = await scene.node();
        const jobId = await scene.submit([{ meta: { size: 1 }, inputs_cids: ['x'], outputs_prefix: 'p' }]);
        const lease = await scene.take(node, false);
        expect(lease).toMatchObject({ domainId: DOMAIN, expiresAt: at(TTL) });
        expect(lease.leaseId).toMatch(UUID_V7);
        expect(lease.task).toMatchObject({
          job_id: jobId,
          status: 'leased',
          attempts: 1,
          reserved_by: node,
          lease_expires_at: at(TTL),
          meta: { size: 1 },
          inputs_cids: ['x'],
          outputs_prefix: 'p',
        });
        expect(await scene.lease(node)).toEqual([]);
        expect((await scene.job(jobId)).job.status).toBe('running');
        expect(await scene.task(lease.task.id)).toEqual(lease.task);
      });

      test('the trace a job was submitted with is in its leases, and is no part of its spec', async () => {
        const node = await scene.node();
        const traceparent = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01';
        const job = { spec: jobOf([{}]), organizationId: ORG, idempotencyKey: 'key', submitter: 'tester' };
        const [traced] = await scene.store.submit([{ ...job, traceparent }]);
        const [again] = await scene.store.submit([{ ...job, traceparent: null }]);
        expect(valueOf(again)).toEqual({ jobId: valueOf(traced).jobId, created: false });
        const first = await scene.take(node);
        expect(first.traceparent).toBe(traceparent);
        await scene.release(refOf(first));
        expect((await scene.take(node)).traceparent).toBe(traceparent);
        await scene.submit();
        expect((await scene.take(node)).traceparent ?? null).toBeNull();
        expect(JSON.stringify(await scene.job(valueOf(traced).jobId))).not.toContain('0af7651916cd');
      });

      test('with start the task is running at once', async () => {
        const node = await scene.node();
        const jobId = await scene.submit();
        expect((await scene.take(node, true)).task.status).toBe('running');
        expect(await scene.story(jobId)).toEqual([
          'job.submitted',
          'task.runnable:task',
          'job.running',
          'task.leased:task',
          'task.running:task',
        ]);
      });

      test('a node holds at most its max_concurrency, then it is busy', async () => {
        const node = await scene.node({ max: 2 });
        await scene.submit([{}, {}, {}]);
        const ask = async (max: number) =>
          valueOf((await store.lease([{ nodeId: node, max, capabilities: null, start: true }]))[0]);
        const first = await ask(5);
        expect(first.busy).toBe(false);
        expect(first.leases).toHaveLength(2);
        expect(await ask(1)).toEqual({ leases: [], busy: true });
        expect((await store.getNode(node))?.active_leases).toBe(2);
        expect(await scene.complete(refOf(first.leases[0]!))).toBe('ok');
        expect((await store.getNode(node))?.active_leases).toBe(1);
        expect((await ask(5)).leases).toHaveLength(1);
        // Nothing is left: not busy, just idle.
        const other = await scene.node();
        expect(
          valueOf((await store.lease([{ nodeId: other, max: 1, capabilities: null, start: true }]))[0]),
        ).toEqual({
          leases: [],
          busy: false,
        });
      });

      test('an unknown node and a request for nothing are refused, each on its own', async () => {
        const node = await scene.node();
        await scene.submit();
        const request = { nodeId: node, max: 1, capabilities: null, start: true };
        const answers = await store.lease([{ ...request, nodeId: UNKNOWN }, { ...request, max: 0 }, request]);
        expect(answers.map(codeOf)).toEqual(['not_found', 'invalid_argument', 'ok']);
        expect(valueOf(answers[2]).leases).toHaveLength(1);
      });

      test('a node that never registered gets nothing', async () => {
        await scene.submit();
        const { id } = await store.createNode({
          name: 'n',
          mode: 'public',
          organizationId: ORG,
          secretHash: SECRET,
        });
        expect(await scene.lease(id)).toEqual([]);
      });

      test('higher priority first, then older first', async () => {
        const node = await scene.node();
        await scene.submit([
          { label: 'b0', priority: 0 },
          { label: 'a5', priority: 5 },
          { label: 'd-1', priority: -1 },
        ]);
        await scene.submit([
          { label: 'a5-later', priority: 5 },
          { label: 'c0', priority: 0 },
        ]);
        const leases = await scene.lease(node, 10);
        expect(leases.map(({ task }) => task.label)).toEqual(['a5', 'a5-later', 'b0', 'c0', 'd-1']);
      });

      test('the order holds across many kinds of demand, for one at a time and for many', async () => {
        const labels = { l0: 'x', l1: 'x', l2: 'x', l3: 'x', l4: 'x' };
        const random = seededRandom(7);
        const tasks = Array.from({ length: 120 }, (_, index) => {
          const kind = Math.floor(random() * 6);
          return {
            label: String(index),
            priority: Math.floor(random() * 3),
            capability_filters: kind === 5 ? {} : { [`l${kind}`]: 'x' },
          };
        });
        const expected = tasks
          .toSorted((a, b) => b.priority - a.priority || Number(a.label) - Number(b.label))
          .map(({ label }) => label);
        await scene.submit(tasks);
        const node = await scene.node({ labels, max: 200 });
        const got: string[] = [];
        for (const max of [1, 1, 7, 50, 1, 100]) {
          got.push(...(await scene.lease(node, max)).map(({ task }) => task.label));
        }
        expect(got).toEqual(expected);
      });

      test('capabilities are matched byte for byte, filters against labels', async () => {
        await scene.submit([
          { label: 'other', capability: '/test/work/v2' },
          { label: 'gpu', capability_filters: { gpu: 'a100', zone: 'eu' } },
          { label: 'plain' },
        ]);
        const plain = await scene.node();
        const half = await scene.node({ labels: { gpu: 'a100' } });
        const wrong = await scene.node({ labels: { gpu: 'A100', zone: 'eu' } });
        const full = await scene.node({ labels: { gpu: 'a100', zone: 'eu', more: 'yes' } });
        expect((await scene.lease(plain, 9)).map(({ task }) => task.label)).toEqual(['plain']);
        expect(await scene.lease(half, 9)).toEqual([]);
        expect(await scene.lease(wrong, 9)).toEqual([]);
        expect((await scene.lease(full, 9)).map(({ task }) => task.label)).toEqual(['gpu']);
        const two = await scene.node({ capabilities: ['/test/work/v2', '/test/work/v1'] });
        expect((await scene.lease(two, 9)).map(({ task }) => task.label)).toEqual(['other']);
      });

      test('filters may be operators, of which all must hold', async () => {
        await scene.submit([
          { label: 'in', capability_filters: { gpu: { In: ['a100', 'h100'] } } },
          { label: 'not', capability_filters: { gpu: { Exists: true, NotIn: ['a100'] } } },
          { label: 'without', capability_filters: { gpu: { DoesNotExist: true } } },
        ]);
        const take = async (labels: Readonly<Record<string, string>>): Promise<string[]> =>
          (await scene.lease(await scene.node({ labels }), 9)).map(({ task }) => task.label);
        expect(await take({ gpu: 'k80', zone: 'eu' })).toEqual(['not']);
        expect(await take({ gpu: 'h100' })).toEqual(['in']);
        expect(await take({ gpu: 'a100' })).toEqual([]);
        expect(await take({ zone: 'eu' })).toEqual(['without']);
      });

      test('a filter cannot be met by what every object inherits', async () => {
        await scene.submit([{ capability_filters: { constructor: 'function Object() { [native code] }' } }]);
        expect(await scene.lease(await scene.node())).toEqual([]);
      });

      test('a request may narrow the capabilities, not widen them', async () => {
        const node = await scene.node({ capabilities: ['/a', '/b'] });
        await scene.submit([
          { label: 'a', capability: '/a' },
          { label: 'b', capability: '/b' },
          { label: 'c', capability: '/c' },
        ]);
        const [outcome] = await store.lease([
          { nodeId: node, max: 9, capabilities: ['/b', '/c'], start: true },
        ]);
        expect(valueOf(outcome).leases.map(({ task }) => task.label)).toEqual(['b']);
      });

      test('what a node registers anew counts from then on', async () => {
        const node = await scene.node({ capabilities: ['/a'] });
        await scene.submit([{ capability: '/b' }]);
        expect(await scene.lease(node)).toEqual([]);
        const { wallet } = (await store.getNode(node))!;
        await store.registerNode({
          nodeId: node,
          secretHash: SECRET,
          wallet: wallet!,
          capabilities: ['/b'],
          labels: {},
          version: '1.0.1',
          maxConcurrency: 1,
        });
        expect(await scene.lease(node)).toHaveLength(1);
      });

      test('public nodes take public work of any organization, their own first', async () => {
        await scene.submit([{ label: 'foreign', priority: 9 }], {}, 'org-2');
        await scene.submit([{ label: 'nobody' }], {}, null);
        await scene.submit([{ label: 'own' }], {}, ORG);
        await scene.submit([{ label: 'dedicated', mode: 'dedicated' }], {}, ORG);
        const leases = await scene.lease(await scene.node(), 9);
        expect(leases.map(({ task }) => task.label)).toEqual(['own', 'foreign', 'nobody']);
      });

      test('dedicated nodes take work of their organization only, dedicated first', async () => {
        await scene.submit([{ label: 'foreign' }], {}, 'org-2');
        await scene.submit([{ label: 'foreign dedicated', mode: 'dedicated' }], {}, 'org-2');
        await scene.submit([{ label: 'nobody', mode: 'dedicated' }], {}, null);
        await scene.submit([{ label: 'own public', priority: 9 }], {}, ORG);
        await scene.submit([{ label: 'own dedicated', mode: 'dedicated' }], {}, ORG);
        const leases = await scene.lease(await scene.node({ mode: 'dedicated' }), 9);
        expect(leases.map(({ task }) => task.label)).toEqual(['own dedicated', 'own public']);
      });

      test('a task past its deadline is passed over, those around it are given out', async () => {
        const node = await scene.node();
        const late = { deadline_at: at(1000) };
        const jobId = await scene.submit([
          { label: 'a' },
          { label: 'b', ...late },
          { label: 'c' },
          { label: 'd' },
          { label: 'e', ...late },
          { label: 'f' },
        ]);
        wait(1000);
        expect((await scene.lease(node, 2)).map(({ task }) => task.label)).toEqual(['a', 'c']);
        expect((await scene.lease(node, 1)).map(({ task }) => task.label)).toEqual(['d']);
        expect((await scene.lease(node, 9)).map(({ task }) => task.label)).toEqual(['f']);
        expect((await store.stats()).tasks).toMatchObject({ queued: 2, running: 4 });
        await store.sweep();
        expect(await scene.states(jobId)).toMatchObject({ b: 'failed', e: 'failed', a: 'running' });
      });

      test('jobs submitted in one call are cancelled and deleted each by itself', async () => {
        const node = await scene.node();
        const job = { organizationId: ORG, idempotencyKey: null, submitter: 'me' };
        const labels = Array.from({ length: 9 }, (_, index) => `j${index}`);
        const outcomes = await store.submit(
          labels.map((label) => ({ ...job, spec: jobOf([{ label }, { label: `${label}+` }]) })),
        );
        const ids = outcomes.map((outcome) => valueOf(outcome).jobId);
        expect((await store.cancelJob(ids[4]!))?.status).toBe('canceled');
        expect(await store.deleteJob(ids[0]!)).toBe(true);
        expect(await store.deleteJob(ids[8]!)).toBe(true);
        await store.deleteJob(ids[4]!);
        expect((await store.stats()).tasks).toMatchObject({ queued: 12, canceled: 0 });
        const left = labels.filter((_, index) => ![0, 4, 8].includes(index));
        const expected = left.flatMap((label) => [label, `${label}+`]);
        const leased = [await scene.lease(node, 3), await scene.lease(node, 99)].flat();
        expect(leased.map(({ task }) => task.label)).toEqual(expected);
      });

      test('of many nodes asking at once each task goes to exactly one', async () => {
        const nodes = await Promise.all(Array.from({ length: 20 }, () => scene.node({ max: 10 })));
        await scene.submit(Array.from({ length: 50 }, (_, index) => ({ label: String(index) })));
        const answers = await Promise.all(
          nodes.flatMap((node) => [scene.lease(node, 3), scene.lease(node, 3)]),
        );
        const labels = answers.flat().map(({ task }) => task.label);
        expect(labels).toHaveLength(50);
        expect(new Set(labels).size).toBe(50);
      });
    });

    describe('heartbeat', () => {
      test('the first one starts the task, each extends the lease', async () => {
        const node = await scene.node();
        const jobId = await scene.submit();
        const lease = await scene.take(node, false);
        wait(4000);
        const answer = await scene.heartbeat(refOf(lease));
        expect(answer).toMatchObject({
          leaseId: lease.leaseId,
          expiresAt: at(TTL),
          cancel: false,
          domainId: DOMAIN,
          task: { id: lease.task.id, status: 'running', attempts: 1 },
        });
        expect(await scene.task(lease.task.id)).toMatchObject({
          status: 'running',
          last_heartbeat_at: at(0),
          lease_expires_at: at(TTL),
        });
        wait(14_999);
        await scene.heartbeat(bareRefOf(lease));
        wait(14_999);
        expect((await store.sweep()).rescued).toBe(0);
        expect((await scene.story(jobId)).filter((line) => line.startsWith('task.running'))).toHaveLength(1);
      });

      test('progress and events reach the stream and the meta of the task', async () => {
        const node = await scene.node();
        const jobId = await scene.submit([{ meta: { mine: true } }]);
        const ref = refOf(await scene.take(node));
        await scene.heartbeat(ref, { pct: 10 }, [{ message: 'one' }, 'two']);
        await scene.heartbeat(ref, { pct: 10 });
        await scene.heartbeat(ref);
        await scene.heartbeat(ref, { pct: 60 }, [{ message: 'three' }]);
        const events = (await store.events(jobId, 0, 100)) ?? [];
        expect(
          events
            .filter(({ kind }) => kind === 'task.progress' || kind === 'task.log')
            .map(({ data }) => data),
        ).toEqual([
          { progress: { pct: 10 } },
          { event: { message: 'one' } },
          { event: 'two' },
          { progress: { pct: 60 } },
          { event: { message: 'three' } },
        ]);
        expect((await scene.task(ref.taskId)).meta).toEqual({
          mine: true,
          progress: { pct: 60 },
          events: [{ message: 'one' }, 'two', { message: 'three' }],
        });
        expect((await scene.job(jobId)).tasks[0]?.meta).toMatchObject({ progress: { pct: 60 } });
      });

      test('the meta keeps the last twenty events, and only where it is an object', async () => {
        const node = await scene.node();
        await scene.submit([{ meta: {} }, { meta: 'text' }]);
        const [first, second] = await scene.lease(node, 2);
        await scene.heartbeat(
          refOf(first!),
          null,
          Array.from({ length: 15 }, (_, index) => index),
        );
        await scene.heartbeat(
          refOf(first!),
          null,
          Array.from({ length: 15 }, (_, index) => 15 + index),
        );
        await scene.heartbeat(refOf(second!), 5, ['x']);
        const { meta } = await scene.task(first!.task.id);
        expect(meta).toEqual({
          progress: null,
          events: Array.from({ length: 20 }, (_, index) => 10 + index),
        });
        expect((await scene.task(second!.task.id)).meta).toBe('text');
      });

      test('a lease that expired but was not taken back revives', async () => {
        const node = await scene.node();
        await scene.submit();
        const ref = refOf(await scene.take(node));
        wait(TTL + 1);
        expect((await scene.heartbeat(ref)).expiresAt).toBe(at(TTL));
        expect((await store.sweep()).rescued).toBe(0);
        wait(TTL + 1);
        expect(await scene.complete(ref)).toBe('ok');
      });
    });

    describe('complete', () => {
      test('the result is kept, with a receipt', async () => {
        const node = await scene.node();
        const jobId = await scene.submit();
        const lease = await scene.take(node);
        wait(2000);
        const meta = artifacts(['a.txt', 'id-1']);
        expect(await scene.complete(refOf(lease), ['id-1'], meta)).toBe('ok');
        const { job, tasks, receipts, tasks_summary } = await scene.job(jobId);
        expect(job).toMatchObject({ status: 'completed', updated_at: at(0) });
        expect(tasks_summary).toMatchObject({ queued: 0, running: 0, completed: 1 });
        expect(tasks[0]).toMatchObject({
          status: 'completed',
          output_cids: ['id-1'],
          attempts: 1,
          reserved_by: null,
          lease_expires_at: null,
          reason: null,
        });
        expect(await scene.task(lease.task.id)).toEqual(tasks[0]);
        expect(receipts).toEqual([
          {
            id: lease.leaseId,
            job_id: jobId,
            task_id: lease.task.id,
            node_id: node,
            outputs: ['id-1'],
            meta,
            created_at: at(0),
            outcome: 'completed',
            reason: null,
            leased_at: at(-2000),
          },
        ]);
        expect((await scene.story(jobId)).slice(-2)).toEqual(['task.completed:task', 'job.completed']);
        const done = ((await store.events(jobId, 0, 100)) ?? []).find(
          ({ kind }) => kind === 'task.completed',
        );
        expect(done?.data).toEqual({ outputs: ['id-1'] });
      });

      test('many complete in one call, and an error of one changes nothing for the others', async () => {
        const node = await scene.node();
        const jobId = await scene.submit(
          Array.from({ length: 40 }, (_, index) => ({ label: String(index) })),
        );
        const leases = await scene.lease(node, 40);
        const items = leases.map((lease) => ({ ...refOf(lease), outputCids: [], meta: null }));
        const unknown = { taskId: UNKNOWN, nodeId: node, leaseId: null, outputCids: [], meta: null };
        const answers = await store.complete([...items.slice(0, 20), unknown, ...items.slice(20)]);
        expect(answers.map(codeOf)).toEqual([
          ...Array.from({ length: 20 }, () => 'ok'),
          'not_found',
          ...Array.from({ length: 20 }, () => 'ok'),
        ]);
        expect((await scene.job(jobId)).job.status).toBe('completed');
      });

      test.each([
        ['with a lease id', refOf],
        ['without one', bareRefOf],
      ])('repeating it is harmless %s, also within one call', async (_, ref) => {
        const node = await scene.node();
        const jobId = await scene.submit();
        const lease = await scene.take(node);
        const item = { ...ref(lease), outputCids: ['x'], meta: null };
        const answers = [...(await store.complete([item, item])), ...(await store.complete([item]))];
        expect(answers.map((answer) => valueOf(answer).leaseId)).toEqual([
          lease.leaseId,
          lease.leaseId,
          lease.leaseId,
        ]);
        expect((await scene.job(jobId)).receipts).toHaveLength(1);
        expect(await scene.fail(ref(lease))).toBe('aborted');
        expect(await scene.release(ref(lease))).toBe('aborted');
        expect(await scene.task(lease.task.id)).toMatchObject({ status: 'completed', output_cids: ['x'] });
      });
    });

    describe('fencing', () => {
      test('another node, another lease and an unknown task are refused by every verb, and nothing changes', async () => {
        const [node, other] = [await scene.node(), await scene.node()];
        const jobId = await scene.submit([{}, {}]);
        const lease = await scene.take(node);
        const others = await scene.take(other);
        const before = await scene.job(jobId);
        const wrong: readonly (readonly [LeaseRef, string])[] = [
          [{ ...refOf(lease), nodeId: other }, 'aborted'],
          [{ ...refOf(lease), nodeId: other, leaseId: null }, 'aborted'],
          [{ ...refOf(lease), leaseId: others.leaseId }, 'aborted'],
          [{ ...refOf(lease), leaseId: UNKNOWN }, 'aborted'],
          [{ ...refOf(lease), taskId: UNKNOWN }, 'not_found'],
          [{ ...refOf(lease), nodeId: UNKNOWN }, 'aborted'],
        ];
        for (const [ref, code] of wrong) {
          expect(codeOf((await store.heartbeat([{ ...ref, progress: 1, events: [1] }]))[0])).toBe(code);
          expect(await scene.complete(ref)).toBe(code);
          expect(await scene.fail(ref)).toBe(code);
          expect(await scene.release(ref)).toBe(code);
          expect(await codeOfRejection(putOne(store, write({ lease: ref })))).toBe(code);
        }
        expect(await scene.job(jobId)).toEqual(before);
      });

      test('a lease taken back writes nothing, and the next one is not disturbed', async () => {
        const [first, second] = [await scene.node(), await scene.node()];
        await scene.submit();
        const old = await scene.take(first);
        wait(TTL);
        expect((await store.sweep()).rescued).toBe(1);
        const next = await scene.take(second);
        for (const lost of [refOf(old), bareRefOf(old)]) expect(await scene.complete(lost)).toBe('aborted');
        expect(await scene.complete(refOf(old))).toBe('aborted');
        expect(await scene.fail(bareRefOf(old))).toBe('aborted');
        expect(await codeOfRejection(scene.heartbeat(refOf(old)))).toBe('aborted');
        expect(await store.canceledLeases(first, [old.leaseId])).toEqual([old.leaseId]);
        expect(await scene.complete(refOf(next))).toBe('ok');
      });

      test('the same node leasing again must name the new lease, or none', async () => {
        const node = await scene.node();
        await scene.submit();
        const old = await scene.take(node);
        wait(TTL);
        await store.sweep();
        const next = await scene.take(node);
        expect(await scene.complete(refOf(old))).toBe('aborted');
        expect(await scene.complete(bareRefOf(old))).toBe('ok');
        expect((await scene.task(next.task.id)).status).toBe('completed');
      });

      test('a failure is idempotent for the lease that reported it, also after later leases', async () => {
        const node = await scene.node();
        await scene.submit();
        const first = await scene.take(node);
        expect(await scene.fail(refOf(first))).toBe('ok');
        expect(await scene.fail(refOf(first))).toBe('ok');
        expect(await scene.fail(bareRefOf(first))).toBe('ok');
        expect((await scene.task(first.task.id)).attempts).toBe(1);
        wait(BACKOFF.capMs);
        await store.sweep();
        const second = await scene.take(node);
        expect(await scene.fail(refOf(first))).toBe('ok');
        expect(await scene.complete(refOf(first))).toBe('aborted');
        expect(await scene.task(first.task.id)).toMatchObject({ status: 'running', attempts: 2 });
        expect(await scene.complete(refOf(second))).toBe('ok');
      });

      test('an ending is repeated by the node that did it, and by no other', async () => {
        const [node, other] = [await scene.node(), await scene.node()];
        await scene.submit([{}, {}]);
        const [done, failed] = await scene.lease(node, 2);
        expect(await scene.complete(refOf(done!))).toBe('ok');
        expect(await scene.fail(refOf(failed!))).toBe('ok');
        for (const leaseId of [done!.leaseId, null]) {
          expect(await scene.complete({ taskId: done!.task.id, nodeId: other, leaseId })).toBe('aborted');
        }
        for (const leaseId of [failed!.leaseId, null]) {
          expect(await scene.fail({ taskId: failed!.task.id, nodeId: other, leaseId })).toBe('aborted');
        }
      });

      test('the details of a release are kept with the attempt', async () => {
        const node = await scene.node();
        const jobId = await scene.submit([{}, {}]);
        const details = { usage: { wall_ms: 5 } };
        const [first, second] = [await scene.take(node), await scene.take(node)];
        await scene.store.release([{ ...refOf(first), reason: 'shutdown', details }]);
        await scene.store.cancelJob(jobId);
        await scene.store.release([{ ...refOf(second), reason: 'canceled', details }]);
        expect((await scene.job(jobId)).receipts.map(({ outcome, meta }) => [outcome, meta])).toEqual([
          ['released', details],
          ['canceled', details],
        ]);
      });

      test('a release is idempotent', async () => {
        const node = await scene.node();
        await scene.submit();
        const lease = await scene.take(node);
        expect(await scene.release(refOf(lease))).toBe('ok');
        expect(await scene.release(refOf(lease))).toBe('ok');
        expect(await scene.task(lease.task.id)).toMatchObject({
          attempts: 0,
          node_faults: 1,
          status: 'queued',
        });
      });
    });

    describe('retries', () => {
      test('a failed attempt comes back after a jittered, capped delay, up to max_attempts', async () => {
        const node = await scene.node();
        const jobId = await scene.submit([{ max_attempts: 9 }]);
        const delays: number[] = [];
        for (let attempt = 1; attempt <= 9; attempt += 1) {
          const lease = await scene.take(node);
          expect(lease.task.attempts).toBe(attempt);
          expect(await scene.fail(refOf(lease), { reason: `no ${attempt}` })).toBe('ok');
          const task = await scene.task(lease.task.id);
          expect(task.reason).toBe(`no ${attempt}`);
          if (attempt === 9) break;
          expect(task).toMatchObject({ status: 'queued', attempts: attempt });
          const delay = Date.parse(task.not_before ?? '') - clock.now();
          expect(delay).toBeGreaterThanOrEqual(0);
          expect(delay).toBeLessThanOrEqual(Math.min(BACKOFF.capMs, BACKOFF.baseMs * 2 ** (attempt - 1)));
          delays.push(delay);
          if (delay > 0) {
            wait(delay - 1);
            expect((await store.sweep()).nextAtMs).toBe(clock.now() + 1);
            expect(await scene.lease(node)).toEqual([]);
            wait(1);
          }
          await store.sweep();
          expect((await scene.task(lease.task.id)).not_before).toBeNull();
        }
        expect(new Set(delays).size).toBeGreaterThan(5);
        const { job, tasks, receipts } = await scene.job(jobId);
        expect(job.status).toBe('failed');
        expect(tasks[0]).toMatchObject({ status: 'failed', attempts: 9, reason: 'no 9', not_before: null });
        expect(receipts.map(({ outcome }) => outcome)).toEqual(Array.from({ length: 9 }, () => 'failed'));
        const story = await scene.story(jobId);
        expect(story.filter((line) => line === 'task.retry:task')).toHaveLength(8);
        expect(story.slice(-2)).toEqual(['task.failed:task', 'job.failed']);
      });

      test('a failure that is not retryable is final', async () => {
        const node = await scene.node();
        await scene.submit();
        const lease = await scene.take(node);
        expect(await scene.fail(refOf(lease), { retryable: false })).toBe('ok');
        expect((await scene.task(lease.task.id)).status).toBe('failed');
      });

      test('a clock that is set back does not prolong leases that nobody renews', async () => {
        const HOUR = 3_600_000;
        const node = await scene.node({ max: 2 });
        await scene.submit([{}, {}]);
        await scene.take(node);
        wait(1000);
        const renewed = refOf(await scene.take(node));
        wait(-HOUR);
        // Each has what it had left when its node was last heard, counted from here.
        expect((await store.sweep()).rescued).toBe(0);
        wait(TTL - 1);
        expect((await store.sweep()).rescued).toBe(0);
        expect((await scene.heartbeat(renewed)).expiresAt).toBe(at(TTL));
        wait(1);
        expect((await store.sweep()).rescued).toBe(1);
        // A heartbeat after a step back is as good as a sweep.
        wait(-HOUR);
        expect((await scene.heartbeat(renewed)).expiresAt).toBe(at(TTL));
        wait(TTL);
        expect((await store.sweep()).rescued).toBe(1);
      });

      test('an expired lease is taken back when it expires, not before, and goes to the front', async () => {
        const node = await scene.node();
        const jobId = await scene.submit([{ label: 'first' }, { label: 'second' }]);
        const lease = await scene.take(node);
        wait(TTL - 1);
        expect(await store.sweep()).toEqual({ rescued: 0, nextAtMs: clock.now() + 1 });
        wait(1);
        expect(await store.sweep()).toEqual({ rescued: 1, nextAtMs: null });
        expect(await scene.task(lease.task.id)).toMatchObject({
          status: 'queued',
          attempts: 0,
          node_faults: 1,
          reserved_by: null,
          reason: expect.stringContaining(node),
        });
        expect((await store.getNode(node))?.active_leases).toBe(0);
        expect((await scene.take(node)).task.label).toBe('first');
        const expired = ((await store.events(jobId, 0, 100)) ?? []).find(
          ({ kind }) => kind === 'task.expired',
        );
        expect(expired).toMatchObject({ task_id: lease.task.id, data: { node_id: node } });
        expect((await scene.job(jobId)).receipts).toMatchObject([{ outcome: 'expired', id: lease.leaseId }]);
      });

      test('however many leases expire at once, one sweep takes all of them back', async () => {
        const node = await scene.node({ max: 3000 });
        await scene.submit(Array.from({ length: 2500 }, (_, index) => ({ label: String(index) })));
        await scene.lease(node, 3000);
        wait(TTL);
        expect((await store.sweep()).rescued).toBe(2500);
        expect(await scene.lease(node, 3000)).toHaveLength(2500);
      });

      test.each([
        ['crashes', 'expire'],
        ['failed set-ups by release', 'release'],
        ['failed set-ups by fail', 'fail'],
      ] as const)('the first node faults do not consume an attempt, further ones do: %s', async (_, how) => {
        const node = await scene.node();
        await scene.submit([{ max_attempts: 2 }]);
        let last: TaskRecord | null = null;
        for (let round = 1; round <= FREE_NODE_FAULTS + 2; round += 1) {
          const lease = await scene.take(node);
          expect(lease.task.attempts).toBe(Math.max(1, round - FREE_NODE_FAULTS));
          if (how === 'expire') wait(TTL);
          else if (how === 'release') expect(await scene.release(refOf(lease), 'setup_failed')).toBe('ok');
          else expect(await scene.fail(refOf(lease), { nodeFault: true, retryable: false })).toBe('ok');
          await store.sweep();
          last = await scene.task(lease.task.id);
          expect(last.node_faults).toBe(Math.min(round, FREE_NODE_FAULTS));
          wait(BACKOFF.capMs);
          await store.sweep();
        }
        expect(last).toMatchObject({ status: 'failed', attempts: 2 });
      });

      test('a failed set-up backs off, a crash does not', async () => {
        const node = await scene.node();
        await scene.submit();
        const first = await scene.take(node);
        await scene.release(refOf(first), 'setup_failed');
        expect((await scene.task(first.task.id)).not_before).not.toBeNull();
        wait(BACKOFF.capMs);
        await store.sweep();
        await scene.take(node);
        wait(TTL);
        await store.sweep();
        expect((await scene.task(first.task.id)).not_before).toBeNull();
        expect(await scene.lease(node)).toHaveLength(1);
      });

      test('a drain is no fault and gives the task back at once, until drains never end', async () => {
        const node = await scene.node();
        await scene.submit([{ max_attempts: 1 }]);
        let rounds = 0;
        for (;;) {
          const [lease] = await scene.lease(node);
          if (!lease) break;
          expect(lease.task.attempts).toBe(1);
          expect(await scene.release(refOf(lease))).toBe('ok');
          rounds += 1;
          if (rounds > FREE_DRAINS + 10) break;
        }
        // The free drains, then as faults, then the one attempt there is.
        expect(rounds).toBe(FREE_DRAINS + FREE_NODE_FAULTS + 1);
      });
    });

    describe('cancel', () => {
      test('queued tasks end at once, and so does a job that has only those', async () => {
        const jobId = await scene.submit([{ label: 'a' }, { label: 'b' }], {
          edges: [{ from: 'a', to: 'b' }],
        });
        expect(await store.cancelJob(jobId)).toMatchObject({
          id: jobId,
          status: 'canceled',
          cancel_requested_at: at(0),
        });
        const { job, tasks } = await scene.job(jobId);
        expect(job.status).toBe('canceled');
        expect(tasks.map(({ status }) => status)).toEqual(['canceled', 'canceled']);
        expect(tasks[0]?.reason).toContain('requestor');
        expect(await scene.lease(await scene.node())).toEqual([]);
        expect(await scene.story(jobId)).toEqual([
          'job.submitted',
          'task.runnable:a',
          'job.cancel_requested',
          'task.canceled:a',
          'task.canceled:b',
          'job.canceled',
        ]);
      });

      test.each([
        ['release', 'ok'],
        ['complete', 'aborted'],
        ['fail', 'aborted'],
        ['expiry', 'none'],
      ] as const)(
        'a leased task is asked to end, and the job ends when it is gone: %s',
        async (how, code) => {
          const node = await scene.node();
          const jobId = await scene.submit([{ label: 'a' }, { label: 'b' }]);
          const lease = await scene.take(node);
          const changes: StoreChange[] = [];
          using _ = store.subscribe((change) => changes.push(change));
          expect(await store.cancelJob(jobId)).toMatchObject({
            status: 'running',
            cancel_requested_at: at(0),
          });
          expect(changes).toContainEqual({ kind: 'cancel', leaseIds: [lease.leaseId] });
          expect(await scene.states(jobId)).toEqual({ a: 'running', b: 'canceled' });
          expect(await store.canceledLeases(node, [lease.leaseId])).toEqual([lease.leaseId]);
          expect((await scene.heartbeat(refOf(lease))).cancel).toBe(true);
          expect((await scene.task(lease.task.id)).cancel_requested_at).toBe(at(0));
          if (how === 'release') expect(await scene.release(refOf(lease), 'canceled')).toBe(code);
          else if (how === 'complete') expect(await scene.complete(refOf(lease), ['x'])).toBe(code);
          else if (how === 'fail') expect(await scene.fail(bareRefOf(lease))).toBe(code);
          else {
            wait(TTL);
            expect((await store.sweep()).rescued).toBe(1);
          }
          const { job, tasks, receipts } = await scene.job(jobId);
          expect(job.status).toBe('canceled');
          expect(tasks[0]).toMatchObject({ status: 'canceled', output_cids: [] });
          expect(receipts).toMatchObject([{ outcome: how === 'expiry' ? 'expired' : 'canceled' }]);
          // Final, however often it is reported.
          expect(await scene.complete(refOf(lease))).toBe('aborted');
          expect(await scene.release(refOf(lease), 'canceled')).toBe(how === 'expiry' ? 'aborted' : 'ok');
          expect((await scene.job(jobId)).receipts).toHaveLength(1);
        },
      );

      test('heartbeats keep a cancelled lease alive for the grace period only', async () => {
        const node = await scene.node();
        const jobId = await scene.submit();
        const lease = await scene.take(node);
        await store.cancelJob(jobId);
        const requestedAt = clock.now();
        for (let beat = 0; beat < 20 && clock.now() < requestedAt + GRACE; beat += 1) {
          wait(5000);
          await store.sweep();
          if ((await scene.job(jobId)).job.status === 'canceled') break;
          await scene.heartbeat(refOf(lease));
        }
        expect(clock.now()).toBe(requestedAt + GRACE);
        await store.sweep();
        expect((await scene.job(jobId)).job.status).toBe('canceled');
      });

      test('cancelling twice and cancelling what has finished changes nothing', async () => {
        const node = await scene.node();
        const running = await scene.submit();
        await scene.take(node);
        await store.cancelJob(running);
        const after = await scene.story(running);
        wait(1000);
        await store.cancelJob(running);
        expect(await scene.story(running)).toEqual(after);

        const done = await scene.submit();
        await scene.complete(refOf(await scene.take(node)));
        expect(await store.cancelJob(done)).toMatchObject({ status: 'completed', cancel_requested_at: null });
      });

      test('a race of cancel and complete has one winner and a consistent end', async () => {
        const node = await scene.node();
        for (const cancelFirst of [true, false]) {
          const jobId = await scene.submit();
          const lease = await scene.take(node);
          const calls = [
            () => store.cancelJob(jobId).then(() => 'cancel'),
            () => scene.complete(refOf(lease)),
          ];
          const order = cancelFirst ? calls : calls.toReversed();
          const answers = await Promise.all(order.map((call) => call()));
          const { job, tasks } = await scene.job(jobId);
          expect(answers).toContain(cancelFirst ? 'aborted' : 'ok');
          expect(job.status).toBe(cancelFirst ? 'canceled' : 'completed');
          expect(tasks[0]?.status).toBe(job.status);
        }
      });

      test('a release as cancelled that nobody asked for gives the task back like a drain', async () => {
        const node = await scene.node();
        await scene.submit();
        const lease = await scene.take(node);
        expect(await scene.release(refOf(lease), 'canceled')).toBe('ok');
        expect(await scene.task(lease.task.id)).toMatchObject({ status: 'queued', attempts: 0 });
      });
    });

    describe('failing fast', () => {
      test('queued tasks are canceled, leased ones asked to end, and then the job is failed', async () => {
        const node = await scene.node();
        const jobId = await scene.submit(
          [{ label: 'bad', max_attempts: 1 }, { label: 'busy' }, { label: 'queued' }, { label: 'next' }],
          { edges: [{ from: 'bad', to: 'next' }] },
        );
        const [bad, busy] = await scene.lease(node, 2);
        await scene.fail(refOf(bad!), { reason: 'out of cheese' });
        expect(await scene.states(jobId)).toEqual({
          bad: 'failed',
          busy: 'running',
          queued: 'canceled',
          next: 'canceled',
        });
        const { job, tasks } = await scene.job(jobId);
        expect(job.status).toBe('running');
        expect(tasks[2]?.reason).toContain('bad');
        expect(tasks[2]?.reason).toContain('out of cheese');
        expect((await scene.heartbeat(refOf(busy!))).cancel).toBe(true);
        // The first reason wins: a cancel now changes nothing.
        await store.cancelJob(jobId);
        expect(await scene.complete(refOf(busy!))).toBe('aborted');
        expect((await scene.job(jobId)).job.status).toBe('failed');
        expect(await scene.states(jobId)).toMatchObject({ bad: 'failed', busy: 'canceled' });
        expect((await scene.story(jobId)).at(-1)).toBe('job.failed');
      });

      test('other jobs are not touched', async () => {
        const node = await scene.node();
        await scene.submit([{ max_attempts: 1 }]);
        const other = await scene.submit([{ label: 'mine' }]);
        await scene.fail(refOf(await scene.take(node)));
        expect((await scene.take(node)).task.job_id).toBe(other);
      });
    });

    describe('deadlines', () => {
      test('a queued task fails when its deadline passes, not before', async () => {
        const jobId = await scene.submit([{ label: 'a', deadline_at: at(1000) }, { label: 'b' }]);
        wait(999);
        expect(await store.sweep()).toEqual({ rescued: 0, nextAtMs: clock.now() + 1 });
        wait(1);
        await store.sweep();
        const { job, tasks } = await scene.job(jobId);
        expect(job.status).toBe('failed');
        expect(tasks[0]).toMatchObject({ status: 'failed', reason: 'deadline', attempts: 0 });
        expect(tasks[1]?.status).toBe('canceled');
      });

      test('every task of a job past its deadline fails with that reason', async () => {
        const node = await scene.node();
        const jobId = await scene.submit(
          Array.from({ length: 30 }, (_, index) => ({ label: String(index) })),
          { deadline_at: at(5000) },
        );
        const lease = await scene.take(node);
        expect(lease.task.deadline_at).toBe(at(5000));
        wait(5000);
        expect(await scene.lease(node)).toEqual([]);
        await store.sweep();
        const states = Object.values(await scene.states(jobId));
        expect(states.filter((state) => state === 'failed')).toHaveLength(29);
        expect(states).toContain('running');
        expect((await scene.heartbeat(refOf(lease))).cancel).toBe(true);
        expect(await scene.release(refOf(lease), 'canceled')).toBe('ok');
        const { job, tasks } = await scene.job(jobId);
        expect(job.status).toBe('failed');
        expect(tasks.every(({ status, reason }) => status === 'failed' && reason === 'deadline')).toBe(true);
      });

      test('a running task learns of its deadline by its next heartbeat, and its end is a failure', async () => {
        const node = await scene.node();
        const jobId = await scene.submit([{ deadline_at: at(5000) }]);
        const lease = await scene.take(node);
        wait(4999);
        expect((await scene.heartbeat(refOf(lease))).cancel).toBe(false);
        wait(1);
        expect((await scene.heartbeat(refOf(lease))).cancel).toBe(true);
        expect(await scene.complete(refOf(lease))).toBe('aborted');
        expect((await scene.job(jobId)).tasks[0]).toMatchObject({ status: 'failed', reason: 'deadline' });
      });

      test('the earlier deadline of job and task counts', async () => {
        const jobId = await scene.submit([{ deadline_at: at(9000) }, { deadline_at: at(2000) }], {
          deadline_at: at(5000),
        });
        const { tasks } = await scene.job(jobId);
        expect(tasks.map(({ deadline_at }) => deadline_at)).toEqual([at(5000), at(2000)]);
      });

      test('a task waiting for its retry fails at its deadline', async () => {
        const node = await scene.node();
        const jobId = await scene.submit([{ deadline_at: at(3000), max_attempts: 99 }]);
        // Enough failures that the next retry would come long after.
        for (let tries = 0; tries < 90; tries += 1) {
          await store.sweep();
          const [lease] = await scene.lease(node);
          if (!lease) break;
          await scene.fail(refOf(lease));
        }
        wait(3000);
        await store.sweep();
        expect((await scene.job(jobId)).tasks[0]).toMatchObject({ status: 'failed', reason: 'deadline' });
      });
    });

    describe('stages', () => {
      test('a stage becomes runnable when every stage before it is complete', async () => {
        const node = await scene.node();
        const jobId = await scene.submit(
          [
            { label: 'a1', stage: 'a' },
            { label: 'c', stage: 'c' },
            { label: 'a2', stage: 'a' },
            { label: 'b', stage: 'b' },
            { label: 'free', stage: 'free' },
          ],
          {
            edges: [
              { from: 'a', to: 'c' },
              { from: 'b', to: 'c' },
            ],
          },
        );
        const deps = async () =>
          (await scene.job(jobId)).tasks.find(({ label }) => label === 'c')?.deps_remaining;
        expect(await deps()).toBe(2);
        const leases = await scene.lease(node, 9);
        expect(leases.map(({ task }) => task.label)).toEqual(['a1', 'a2', 'b', 'free']);
        const finish = (label: string) =>
          scene.complete(refOf(leases.find(({ task }) => task.label === label)!));
        await finish('a1');
        expect(await deps()).toBe(2);
        await finish('a2');
        expect(await deps()).toBe(1);
        expect(await scene.lease(node)).toEqual([]);
        const changes: StoreChange[] = [];
        using _ = store.subscribe((change) => changes.push(change));
        await finish('b');
        expect(changes).toContainEqual({ kind: 'runnable' });
        const next = await scene.take(node);
        expect(next.task).toMatchObject({ label: 'c', deps_remaining: 0 });
        expect((await scene.task(next.task.id)).deps_remaining).toBe(0);
        await finish('free');
        await scene.complete(refOf(next));
        expect((await scene.job(jobId)).job.status).toBe('completed');
      });

      test('a long chain runs to its end, one stage after the other', async () => {
        const node = await scene.node();
        const names = Array.from({ length: 60 }, (_, index) => `s${index}`);
        const jobId = await scene.submit(
          names.map((label) => ({ label })),
          { edges: names.slice(1).map((to, index) => ({ from: names[index]!, to })) },
        );
        for (const name of names) {
          const lease = await scene.take(node);
          expect(lease.task.label).toBe(name);
          await scene.complete(refOf(lease));
        }
        expect((await scene.job(jobId)).job.status).toBe('completed');
      });

      /** Runs stage `make` of three tasks, then returns the inputs the tasks of stage `use` get. */
      async function resolve(
        inputs: readonly (readonly string[])[],
        stage = 'make',
      ): Promise<{ jobId: string; inputs: (readonly string[])[] }> {
        const node = await scene.node();
        const jobId = await scene.submit(
          [
            { label: 'm2', stage, outputs_prefix: '/out/two/' },
            { label: 'm1', stage, outputs_prefix: 'out/one' },
            { label: 'm0', stage },
            ...inputs.map((inputs_cids, index) => ({ label: `u${index}`, stage: 'use', inputs_cids })),
          ],
          { edges: [{ from: stage, to: 'use' }] },
        );
        const leases = await scene.lease(node, 3);
        const [m2, m1, m0] = leases;
        // Completed in another order than that of the job.
        await scene.complete(
          refOf(m0!),
          ['z-json', 'no-path'],
          artifacts(['z.json', 'z-json'], ['.hidden', 'hidden'], ['failed.json', null]),
        );
        await scene.complete(
          refOf(m2!),
          ['two-b', 'two-a'],
          artifacts(['out/two/b/tile.png', 'two-b'], ['out/two/a/tile.png', 'two-a']),
        );
        await scene.complete(refOf(m1!), ['one'], artifacts(['out/one/a/tile.png', 'one']));
        const { tasks } = await scene.job(jobId);
        return { jobId, inputs: tasks.slice(3).map(({ inputs_cids }) => inputs_cids) };
      }

      test('stage:<stage> becomes the outputs in the order of the tasks, within one by path', async () => {
        const { inputs } = await resolve([['first', 'stage:make', 'last']]);
        expect(inputs).toEqual([['first', 'two-a', 'two-b', 'one', 'hidden', 'z-json', 'no-path', 'last']]);
      });

      test.each([
        ['the path relative to the outputs prefix', 'a/tile.png', ['two-a', 'one']],
        ['the whole logical path', 'out/two/*/tile.png', ['two-a', 'two-b']],
        ['a star within a folder', '*.json', ['z-json']],
        ['two stars across folders', '**/tile.png', ['two-a', 'two-b', 'one']],
        ['braces', '{a,b}/tile.png', ['two-a', 'two-b', 'one']],
        ['a question mark', '?/tile.png', ['two-a', 'two-b', 'one']],
        ['a hidden file', '.hid*', ['hidden']],
        ['everything with a path', '**', ['two-a', 'two-b', 'one', 'hidden', 'z-json']],
      ])('a glob can be %s', async (_, glob, expected) => {
        expect((await resolve([[`stage:make/${glob}`]])).inputs).toEqual([expected]);
      });

      test('stage names may contain slashes', async () => {
        expect((await resolve([['stage:make/it/*.json', 'stage:make/it']], 'make/it')).inputs[0]?.[0]).toBe(
          'z-json',
        );
      });

      test('the tasks of the next stage are leased with what was resolved', async () => {
        await resolve([['stage:make/*.json'], ['plain']]);
        const leases = await scene.lease(await scene.node(), 9);
        expect(leases.map(({ task }) => task.inputs_cids)).toEqual([['z-json'], ['plain']]);
      });

      test('a reference that matches nothing fails its task and the job, and says why', async () => {
        const { jobId } = await resolve([['stage:make/*.json'], ['stage:make/*.nothing'], ['plain']]);
        const { job, tasks } = await scene.job(jobId);
        expect(job.status).toBe('failed');
        expect(tasks[4]).toMatchObject({ status: 'failed' });
        expect(tasks[4]?.reason).toContain('stage:make/*.nothing');
        expect(tasks[3]?.status).toBe('canceled');
        expect(tasks[5]?.status).toBe('canceled');
        expect(await scene.lease(await scene.node())).toEqual([]);
      });

      test('a retry sees the same resolved inputs', async () => {
        const { jobId } = await resolve([['stage:make/*.json']]);
        const node = await scene.node();
        await scene.fail(refOf(await scene.take(node)));
        wait(BACKOFF.capMs);
        await store.sweep();
        expect((await scene.take(node)).task.inputs_cids).toEqual(['z-json']);
        expect((await scene.job(jobId)).tasks[3]?.attempts).toBe(2);
      });
    });

    describe('events', () => {
      test('sequence numbers count from 1 without gaps, and pages join', async () => {
        const node = await scene.node();
        const jobId = await scene.submit(
          Array.from({ length: 300 }, (_, index) => ({ label: String(index) })),
        );
        for (let round = 0; round < 3; round += 1) {
          for (const lease of await scene.lease(node, 100)) {
            wait(1);
            await scene.heartbeat(refOf(lease), round, ['x']);
            await scene.complete(refOf(lease));
          }
        }
        const all = (await store.events(jobId, 0, 100_000)) ?? [];
        expect(all.map(({ seq }) => seq)).toEqual(
          Array.from({ length: all.length }, (_, index) => index + 1),
        );
        expect(all).toHaveLength(1 + 300 + 1 + 300 * 5 + 1);
        expect(all.at(-1)?.kind).toBe('job.completed');
        const paged = [];
        for (let after = 0; ;) {
          const page = (await store.events(jobId, after, 77)) ?? [];
          if (page.length === 0) break;
          expect(page.length).toBeLessThanOrEqual(77);
          paged.push(...page);
          after = page.at(-1)!.seq;
        }
        expect(paged).toEqual(all);
        expect(await store.events(jobId, all.length, 10)).toEqual([]);
        const times = all.map(({ at: time }) => time);
        expect(times).toEqual(times.toSorted());
      });

      test('what happened to many tasks at once is told for each', async () => {
        const node = await scene.node();
        const jobId = await scene.submit(
          Array.from({ length: 40 }, (_, index) => ({ label: String(index) })),
        );
        const leases = await scene.lease(node, 40);
        const outputs = (index: number): string[] => (index === 20 ? ['one'] : []);
        await store.complete(
          leases.map((lease, index) => ({ ...refOf(lease), outputCids: outputs(index), meta: null })),
        );
        const events = (await store.events(jobId, 0, 1000)) ?? [];
        const of = (kind: string) => events.filter((event) => event.kind === kind);
        for (const kind of ['task.runnable', 'task.leased', 'task.running', 'task.completed']) {
          expect(of(kind).map((event) => event.task_id)).toEqual(leases.map(({ task }) => task.id));
        }
        expect(of('task.leased').map(({ data }) => data)).toEqual(
          leases.map(({ leaseId }) => ({ node_id: node, attempt: 1, lease_id: leaseId })),
        );
        expect(of('task.completed').map(({ data }) => data)).toEqual(
          leases.map((_, index) => ({ outputs: outputs(index) })),
        );
        // Wherever a page begins or ends.
        for (const after of [1, 20, 41, 42, 43, 60, 121, 160]) {
          expect(await store.events(jobId, after, 7)).toEqual(events.slice(after, after + 7));
        }
      });

      test('a lease event names node, attempt and lease', async () => {
        const node = await scene.node();
        const jobId = await scene.submit();
        const lease = await scene.take(node);
        const event = ((await store.events(jobId, 0, 100)) ?? []).find(({ kind }) => kind === 'task.leased');
        expect(event).toEqual({
          seq: 4,
          at: at(0),
          kind: 'task.leased',
          task_id: lease.task.id,
          data: { node_id: node, attempt: 1, lease_id: lease.leaseId },
        });
      });

      test('listeners hear of a change after it can be read, and no longer once disposed', async () => {
        const node = await scene.node();
        const heard: StoreChange[] = [];
        const readable: Promise<boolean>[] = [];
        const subscription = store.subscribe((change) => {
          heard.push(change);
          if (change.kind === 'job') readable.push(store.getJob(change.jobId).then((job) => job !== null));
        });
        const jobId = await scene.submit();
        expect(heard).toContainEqual({ kind: 'runnable' });
        expect(heard).toContainEqual({ kind: 'job', jobId });
        expect(await Promise.all(readable)).not.toContain(false);
        subscription[Symbol.dispose]();
        subscription[Symbol.dispose]();
        heard.length = 0;
        await scene.take(node);
        expect(heard).toEqual([]);
      });

      test('a listener that throws disturbs neither the caller nor other listeners', async () => {
        const heard: string[] = [];
        using _bad = store.subscribe(() => {
          throw new Error('bad listener');
        });
        using _good = store.subscribe(({ kind }) => heard.push(kind));
        await scene.submit();
        expect(heard).toContain('runnable');
      });

      test('what changed nothing is not told', async () => {
        const heard: string[] = [];
        const node = await scene.node();
        using _ = store.subscribe(({ kind }) => heard.push(kind));
        await scene.lease(node);
        await store.sweep();
        await scene.complete({ taskId: UNKNOWN, nodeId: node, leaseId: null });
        expect(heard).toEqual([]);
      });
    });

    describe('listing jobs', () => {
      const list = (query: Partial<Parameters<Store['listJobs']>[0]> = {}) =>
        store.listJobs({
          domainId: null,
          status: null,
          capabilities: [],
          matchAllCapabilities: false,
          limit: 100,
          cursor: null,
          ...query,
        });

      test('newest first, in pages that do not shift when jobs are added', async () => {
        const ids: string[] = [];
        for (let index = 0; index < 7; index += 1)
          ids.unshift(await scene.submit([{}], { label: String(index) }));
        const first = await list({ limit: 3 });
        await scene.submit();
        const second = await list({ limit: 3, cursor: first.nextCursor });
        const third = await list({ limit: 3, cursor: second.nextCursor });
        expect([...first.items, ...second.items, ...third.items].map(({ job }) => job.id)).toEqual(ids);
        expect(third.nextCursor).toBeNull();
        expect(first.items[0]).toEqual({
          job: (await scene.job(ids[0]!)).job,
          tasks_summary: { queued: 1, leased: 0, running: 0, completed: 0, failed: 0, canceled: 0 },
        });
      });

      test('filters by domain, status and capabilities', async () => {
        const node = await scene.node({ capabilities: ['/a'] });
        const a = await scene.submit([{ capability: '/a' }]);
        const ab = await scene.submit([{ capability: '/a' }, { capability: '/b' }]);
        const b = await scene.submit([{ capability: '/b' }], { domain_id: OTHER_DOMAIN });
        await scene.complete(refOf(await scene.take(node)));
        const ids = async (query: Parameters<typeof list>[0]) =>
          (await list(query)).items.map(({ job }) => job.id);
        expect(await ids({ domainId: OTHER_DOMAIN })).toEqual([b]);
        expect(await ids({ status: 'completed' })).toEqual([a]);
        expect(await ids({ status: 'pending', domainId: DOMAIN })).toEqual([ab]);
        expect(await ids({ capabilities: ['/a'] })).toEqual([ab, a]);
        expect(await ids({ capabilities: ['/a', '/b'] })).toEqual([b, ab, a]);
        expect(await ids({ capabilities: ['/a', '/b'], matchAllCapabilities: true })).toEqual([ab]);
        expect(await ids({ capabilities: ['/c'] })).toEqual([]);
      });

      test('a cursor that no listing returned is refused', async () => {
        expect(await codeOfRejection(list({ cursor: 'nonsense' }))).toBe('invalid_argument');
      });
    });

    describe('deleting jobs', () => {
      test('everything of the job is gone, and others are not touched', async () => {
        const node = await scene.node();
        const jobId = await scene.submit([{ label: 'a' }, { label: 'b' }], {
          edges: [{ from: 'a', to: 'b' }],
        });
        const other = await scene.submit([{ label: 'other' }]);
        const [lease] = await scene.lease(node);
        expect(await codeOfRejection(store.deleteJob(jobId))).toBe('failed_precondition');
        await scene.complete(refOf(lease!));
        expect(await store.deleteJob(jobId)).toBe(true);
        expect(await store.deleteJob(jobId)).toBe(false);
        expect(await store.getJob(jobId)).toBeNull();
        expect(await store.getTask(lease!.task.id)).toBeNull();
        expect(await store.events(jobId, 0, 10)).toBeNull();
        expect(await scene.complete(refOf(lease!))).toBe('not_found');
        expect((await scene.lease(node, 9)).map(({ task }) => task.job_id)).toEqual([other]);
        expect(await store.stats()).toMatchObject({ tasks: { queued: 0, running: 1, completed: 0 } });
      });
    });

    describe('logs', () => {
      const MAX = 1000;
      const append = async (ref: LeaseRef, offset: number, text: string, maxBytes = MAX) =>
        (await store.appendLogs([{ ...ref, offset, bytes: Buffer.from(text) }], maxBytes))[0]!;
      const read = async (taskId: string, query: Partial<LogQuery> = {}) => {
        const page = await store.readLogs({ taskId, attempt: null, offset: 0, limit: 1 << 20, ...query });
        if (page === null) return null;
        return { ...page, bytes: Buffer.from(page.bytes).toString('utf8') };
      };

      test('what is appended can be read from any offset, while the attempt runs and after', async () => {
        const node = await scene.node();
        const jobId = await scene.submit();
        const lease = await scene.take(node);
        const taskId = lease.task.id;
        expect(await read(taskId)).toEqual({
          jobId,
          attempt: 1,
          attempts: 1,
          offset: 0,
          bytes: '',
          size: 0,
          ended: false,
          final: false,
        });
        expect(valueOf(await append(refOf(lease), 0, 'one\n'))).toEqual({ nextOffset: 4 });
        expect(valueOf(await append(refOf(lease), 4, 'zwei: ü\n'))).toEqual({ nextOffset: 13 });
        expect(await read(taskId)).toMatchObject({ bytes: 'one\nzwei: ü\n', size: 13, ended: false });
        expect(await read(taskId, { offset: 2, limit: 5 })).toMatchObject({ offset: 2, bytes: 'e\nzwe' });
        expect(await read(taskId, { offset: 4, limit: 4 })).toMatchObject({ bytes: 'zwei' });
        expect(await read(taskId, { offset: 13 })).toMatchObject({ offset: 13, bytes: '' });
        expect(await read(taskId, { offset: -3 })).toMatchObject({ offset: 10, bytes: 'ü\n' });
        expect(await read(taskId, { offset: -999 })).toMatchObject({ offset: 0, bytes: 'one\nzwei: ü\n' });
        expect(await codeOfRejection(read(taskId, { offset: 14 }))).toBe('invalid_argument');
        await scene.complete(refOf(lease));
        expect(await read(taskId)).toMatchObject({ bytes: 'one\nzwei: ü\n', ended: true, final: true });
        expect(await read(UNKNOWN)).toBeNull();
      });

      test('what was said already is not kept twice, and what is missing before it is told', async () => {
        const lease = await (await scene.submit(), scene.take(await scene.node()));
        const ref = refOf(lease);
        expect(valueOf(await append(ref, 0, 'a\nb\n'))).toEqual({ nextOffset: 4 });
        expect(valueOf(await append(ref, 0, 'a\nb\n'))).toEqual({ nextOffset: 4 });
        expect(valueOf(await append(ref, 0, 'a\n'))).toEqual({ nextOffset: 4 });
        expect(valueOf(await append(ref, 2, 'b\nc\n'))).toEqual({ nextOffset: 6 });
        const gap = await append(ref, 7, 'x\n');
        expect(codeOf(gap)).toBe('failed_precondition');
        expect(!gap.ok && gap.error.details).toEqual({ next_offset: 6 });
        expect(await read(lease.task.id)).toMatchObject({ bytes: 'a\nb\nc\n' });
      });

      test('a log has at most as many bytes as it may', async () => {
        const lease = await (await scene.submit(), scene.take(await scene.node()));
        const ref = refOf(lease);
        expect(valueOf(await append(ref, 0, `${'x'.repeat(9)}\n`, 10))).toEqual({ nextOffset: 10 });
        expect(codeOf(await append(ref, 10, '\n', 10))).toBe('resource_exhausted');
        expect(valueOf(await append(ref, 0, `${'x'.repeat(9)}\n`, 10))).toEqual({ nextOffset: 10 });
        expect(await read(lease.task.id)).toMatchObject({ size: 10 });
      });

      test('many append in one call, and an error of one changes nothing for the others', async () => {
        const node = await scene.node();
        await scene.submit([{ label: 'a' }, { label: 'b' }]);
        const [a, b] = await scene.lease(node, 2);
        const outcomes = await store.appendLogs(
          [
            { ...refOf(a!), offset: 5, bytes: Buffer.from('gap\n') },
            { ...refOf(b!), offset: 0, bytes: Buffer.from('b1\n') },
            { ...refOf(b!), leaseId: UNKNOWN, offset: 3, bytes: Buffer.from('stale\n') },
            { ...refOf(b!), offset: 3, bytes: Buffer.from('b2\n') },
          ],
          MAX,
        );
        expect(outcomes.map(codeOf)).toEqual(['failed_precondition', 'ok', 'aborted', 'ok']);
        expect(await read(a!.task.id)).toMatchObject({ size: 0 });
        expect(await read(b!.task.id)).toMatchObject({ bytes: 'b1\nb2\n' });
      });

      test('each attempt has a log of its own, written only under its lease', async () => {
        const node = await scene.node();
        const jobId = await scene.submit();
        const first = await scene.take(node);
        const taskId = first.task.id;
        await append(refOf(first), 0, 'first\n');
        // The node falls silent: this attempt does not count as one, but has its log.
        wait(TTL);
        await store.sweep();
        expect(await read(taskId)).toMatchObject({
          attempt: 1,
          bytes: 'first\n',
          ended: false,
          final: false,
        });
        expect(await read(taskId, { attempt: 2 })).toMatchObject({ bytes: '', ended: false, attempts: 1 });
        expect(await codeOfRejection(read(taskId, { attempt: 3 }))).toBe('not_found');
        const second = await scene.take(node);
        expect(second.task.attempts).toBe(1);
        expect(codeOf(await append(refOf(first), 6, 'late\n'))).toBe('aborted');
        await append(refOf(second), 0, 'second\n');
        expect(await read(taskId)).toMatchObject({
          attempt: 2,
          attempts: 2,
          bytes: 'second\n',
          ended: false,
        });
        expect(await read(taskId, { attempt: 1 })).toMatchObject({ bytes: 'first\n', ended: true });
        await scene.fail(refOf(second));
        wait(BACKOFF.capMs);
        await store.sweep();
        const third = await scene.take(node);
        expect(third.task.attempts).toBe(2);
        await append(refOf(third), 0, 'third\n');
        await scene.complete(refOf(third));
        expect(await store.listLogs(jobId)).toEqual([
          { taskId, attempt: 1, size: 6 },
          { taskId, attempt: 2, size: 7 },
          { taskId, attempt: 3, size: 6 },
        ]);
        expect(await codeOfRejection(read(taskId, { attempt: 4 }))).toBe('not_found');
      });

      test('a cancelled attempt may say what it still has to say until it is gone', async () => {
        const node = await scene.node();
        const jobId = await scene.submit();
        const lease = await scene.take(node);
        await store.cancelJob(jobId);
        expect(codeOf(await append(refOf(lease), 0, 'stopping\n'))).toBe('ok');
        await scene.release(refOf(lease), 'canceled');
        expect(codeOf(await append(refOf(lease), 9, 'more\n'))).toBe('aborted');
        expect(await read(lease.task.id)).toMatchObject({ bytes: 'stopping\n', ended: true, final: true });
      });

      test('a task that ends before any attempt has an ended, empty log', async () => {
        const jobId = await scene.submit();
        const taskId = (await store.getJob(jobId))!.tasks[0]!.id;
        expect(await read(taskId)).toMatchObject({ attempt: 1, attempts: 0, ended: false, final: false });
        await store.cancelJob(jobId);
        expect(await read(taskId)).toMatchObject({ attempt: 1, attempts: 0, ended: true, final: true });
      });

      test('logs go with their job, others stay; an unknown job has none', async () => {
        const node = await scene.node();
        const gone = await scene.submit();
        const stays = await scene.submit();
        const [a, b] = await scene.lease(node, 2);
        for (const lease of [a!, b!]) {
          await append(refOf(lease), 0, `${lease.task.id}\n`);
          await scene.complete(refOf(lease));
        }
        expect(a!.task.job_id).toBe(gone);
        expect(await store.deleteJob(gone)).toBe(true);
        expect(await read(a!.task.id)).toBeNull();
        expect(await store.listLogs(gone)).toBeNull();
        expect(await store.listLogs(stays)).toEqual([{ taskId: b!.task.id, attempt: 1, size: 37 }]);
        expect(await read(b!.task.id)).toMatchObject({ bytes: `${b!.task.id}\n` });
      });

      test('listeners hear which logs have grown, and nothing when none has', async () => {
        const lease = await (await scene.submit(), scene.take(await scene.node()));
        const heard: StoreChange[] = [];
        using _ = store.subscribe((change) => heard.push(change));
        await append(refOf(lease), 0, 'a\n');
        expect(heard).toEqual([{ kind: 'logs', taskIds: [lease.task.id] }]);
        await append(refOf(lease), 0, 'a\n');
        await append(refOf(lease), 9, 'b\n');
        expect(heard).toHaveLength(1);
      });

      test('many small appends read as one stream, in pages that join', async () => {
        const lease = await (await scene.submit(), scene.take(await scene.node()));
        let whole = '';
        for (let i = 0; i < 700; i += 1) {
          const line = `${'ä'.repeat(i % 7)}${i}\n`;
          await append(refOf(lease), Buffer.byteLength(whole), line, 1 << 20);
          whole += line;
        }
        expect(await read(lease.task.id)).toMatchObject({ bytes: whole });
        const parts: Buffer[] = [];
        for (let offset = 0; ;) {
          const page = await store.readLogs({ taskId: lease.task.id, attempt: 1, offset, limit: 61 });
          if (page!.bytes.byteLength === 0) break;
          parts.push(Buffer.from(page!.bytes));
          offset += page!.bytes.byteLength;
        }
        expect(Buffer.concat(parts).toString('utf8')).toBe(whole);
      });

      test('events that are lines of the log as well are marked', async () => {
        const lease = await (await scene.submit(), scene.take(await scene.node()));
        await store.heartbeat([{ ...refOf(lease), progress: null, events: [{ n: 1 }], logged: true }]);
        await store.heartbeat([{ ...refOf(lease), progress: null, events: [{ n: 2 }] }]);
        const events = (await store.events(lease.task.job_id, 0, 100))!;
        expect(events.filter(({ kind }) => kind === 'task.log').map(({ data }) => data)).toEqual([
          { event: { n: 1 }, logged: true },
          { event: { n: 2 } },
        ]);
      });
    });

    describe('standing', () => {
      test('tells attempts, since when a lease is held, and what comes before', async () => {
        const node = await scene.node();
        const other = await scene.node({ capabilities: ['/test/other/v1'] });
        const jobId = await scene.submit(
          [
            { label: 'first' },
            { label: 'urgent', priority: 5 },
            { label: 'second' },
            { label: 'elsewhere', capability: '/test/other/v1' },
            { label: 'later', stage: 'later' },
          ],
          { edges: [{ from: 'first', to: 'later' }] },
        );
        const ids = Object.fromEntries(
          (await store.getJob(jobId))!.tasks.map((task) => [task.label, task.id]),
        );
        expect(await store.standing(ids['second']!)).toEqual({
          jobId,
          domainId: DOMAIN,
          attempts: 0,
          leasedAt: null,
          final: false,
          ahead: { higherPriority: 1, older: 1 },
        });
        expect((await store.standing(ids['urgent']!))?.ahead).toEqual({ higherPriority: 0, older: 0 });
        expect((await store.standing(ids['elsewhere']!))?.ahead).toEqual({ higherPriority: 0, older: 0 });
        expect((await store.standing(ids['later']!))?.ahead).toBeNull();
        const lease = await scene.take(node);
        expect(await store.standing(lease.task.id)).toMatchObject({
          attempts: 1,
          leasedAt: at(0),
          ahead: null,
        });
        await scene.complete(refOf(lease));
        expect(await store.standing(lease.task.id)).toMatchObject({ leasedAt: null, final: true });
        expect((await store.standing(ids['second']!))?.ahead).toEqual({ higherPriority: 0, older: 1 });
        expect(await store.standing(UNKNOWN)).toBeNull();
        await scene.lease(other);
      });

      test('what a node takes besides competes too', async () => {
        const node = await scene.node({ capabilities: [CAPABILITY, '/test/other/v1'] });
        expect(await scene.lease(node)).toEqual([]);
        await scene.submit([{ label: 'older', capability: '/test/other/v1' }]);
        const jobId = await scene.submit([{ label: 'mine' }]);
        const [mine] = (await store.getJob(jobId))!.tasks;
        // Matched when the node asks: it takes the older one first and would take a second one of it.
        const [taken] = await scene.lease(node);
        expect(taken!.task.label).toBe('older');
        await scene.submit([{ label: 'urgent', capability: '/test/other/v1', priority: 1 }]);
        expect((await store.standing(mine!.id))?.ahead).toEqual({ higherPriority: 1, older: 0 });
      });
    });

    describe('nodes', () => {
      test('credentials are made, then a wallet registers with them', async () => {
        const created = await store.createNode({
          name: 'n1',
          mode: 'dedicated',
          organizationId: ORG,
          secretHash: SECRET,
        });
        expect(created).toEqual({
          id: expect.stringMatching(UUID_V7),
          name: 'n1',
          mode: 'dedicated',
          organization_id: ORG,
          wallet: null,
          capabilities: [],
          labels: {},
          version: null,
          max_concurrency: 1,
          created_at: at(0),
          registered_at: null,
          last_seen_at: null,
          active_leases: 0,
        });
        expect(JSON.stringify(created)).not.toContain(SECRET);
        wait(1000);
        const registration = {
          nodeId: created.id,
          secretHash: SECRET,
          wallet: '0xABCDEF',
          capabilities: ['/a'],
          labels: { gpu: 'yes' },
          version: '1.2.3',
          maxConcurrency: null,
        };
        const registered = await store.registerNode(registration);
        expect(registered).toMatchObject({
          wallet: '0xabcdef',
          capabilities: ['/a'],
          labels: { gpu: 'yes' },
          version: '1.2.3',
          max_concurrency: 1,
          registered_at: at(0),
        });
        expect(await store.getNode(created.id)).toEqual(registered);
        expect(await store.findNodeByWallet('0xAbCdEf')).toEqual(registered);
        expect(await store.listNodes()).toEqual([registered]);
        expect(await store.getNode(UNKNOWN)).toBeNull();
        expect(await store.findNodeByWallet('0x1')).toBeNull();

        const moved = await store.registerNode({ ...registration, wallet: '0x99', maxConcurrency: 4 });
        expect(moved).toMatchObject({ wallet: '0x99', max_concurrency: 4 });
        expect(await store.findNodeByWallet('0xabcdef')).toBeNull();
      });

      test('a wrong id and a wrong secret get the same answer, and a taken wallet is refused', async () => {
        const first = await scene.node();
        const { wallet } = (await store.getNode(first))!;
        const { id } = await store.createNode({
          name: 'n',
          mode: 'public',
          organizationId: ORG,
          secretHash: SECRET,
        });
        const registration = {
          nodeId: id,
          secretHash: SECRET,
          wallet: '0x77',
          capabilities: [],
          labels: {},
          version: '1.0.0',
          maxConcurrency: 1,
        };
        expect(await codeOfRejection(store.registerNode({ ...registration, nodeId: UNKNOWN }))).toBe(
          'unauthenticated',
        );
        expect(
          await codeOfRejection(store.registerNode({ ...registration, secretHash: 'b'.repeat(64) })),
        ).toBe('unauthenticated');
        expect(await codeOfRejection(store.registerNode({ ...registration, wallet: wallet! }))).toBe(
          'already_exists',
        );
        expect(await codeOfRejection(store.registerNode({ ...registration, maxConcurrency: 0 }))).toBe(
          'invalid_argument',
        );
        expect((await store.getNode(id))?.registered_at).toBeNull();
      });

      test("a secret is the node's own or it is not, and an unknown node has none", async () => {
        const { id } = await store.createNode({
          name: 'n',
          mode: 'public',
          organizationId: ORG,
          secretHash: SECRET,
        });
        expect(await store.nodeHasSecret(id, SECRET)).toBe(true);
        expect(await store.nodeHasSecret(id, 'b'.repeat(64))).toBe(false);
        expect(await store.nodeHasSecret(id, SECRET.slice(1))).toBe(false);
        expect(await store.nodeHasSecret(UNKNOWN, SECRET)).toBe(false);
      });

      test('another wallet is refused while the node is online: 60 s after it asked, or while it holds a lease', async () => {
        const { id } = await store.createNode({
          name: 'n',
          mode: 'public',
          organizationId: ORG,
          secretHash: SECRET,
        });
        const registration = {
          nodeId: id,
          secretHash: SECRET,
          wallet: '0xa1',
          capabilities: [CAPABILITY],
          labels: {},
          version: '1.0.0',
          maxConcurrency: 1,
        };
        await store.registerNode(registration);
        await store.touchNode(id);
        wait(59_999);
        expect(await codeOfRejection(store.registerNode({ ...registration, wallet: '0xa2' }))).toBe(
          'already_exists',
        );
        // Its own wallet is welcome at any time, in whatever letter case.
        expect((await store.registerNode({ ...registration, wallet: '0xA1' })).wallet).toBe('0xa1');
        wait(1);
        expect((await store.registerNode({ ...registration, wallet: '0xa2' })).wallet).toBe('0xa2');
        await scene.submit([{ label: 't' }]);
        await scene.take(id);
        expect(await codeOfRejection(store.registerNode({ ...registration, wallet: '0xa3' }))).toBe(
          'already_exists',
        );
        expect((await store.getNode(id))?.wallet).toBe('0xa2');
      });

      test('being seen is noted, but not at every poll', async () => {
        const node = await scene.node();
        await store.touchNode(node);
        const seen = at(0);
        expect((await store.getNode(node))?.last_seen_at).toBe(seen);
        wait(1000);
        await store.touchNode(node);
        expect((await store.getNode(node))?.last_seen_at).toBe(seen);
        wait(30_000);
        await store.touchNode(node);
        expect((await store.getNode(node))?.last_seen_at).toBe(at(0));
        await store.touchNode(UNKNOWN);
      });

      test('busy nodes are those with leases, by the mode of the task', async () => {
        const node = await scene.node();
        const dedicated = await scene.node({ mode: 'dedicated' });
        const jobId = await scene.submit([{ label: 'p' }, { label: 'd', mode: 'dedicated' }]);
        const p = await scene.take(node, false);
        const d = await scene.take(dedicated);
        const busy = await store.busyNodes('all');
        expect(busy).toHaveLength(2);
        expect(await store.busyNodes('public')).toEqual([
          {
            node_id: node,
            task_id: p.task.id,
            task_status: 'leased',
            task_mode: 'public',
            job_id: jobId,
            job_status: 'running',
          },
        ]);
        expect(await store.busyNodes('dedicated')).toMatchObject([
          { node_id: dedicated, task_id: d.task.id },
        ]);
      });
    });

    describe('nonces and settings', () => {
      const nonce = (text: string, ttlMs = 60_000) => ({
        nonce: text,
        wallet: '0x1',
        domain: 'd',
        uri: 'http://d',
        chainId: 1,
        issuedAt: at(0),
        expiresAtMs: clock.now() + ttlMs,
      });

      test('of a thousand takers of one nonce exactly one gets it', async () => {
        const kept = nonce('n');
        await store.putNonce(kept);
        const answers = await Promise.all(Array.from({ length: 1000 }, () => store.takeNonce('n')));
        expect(answers.filter((answer) => answer !== null)).toEqual([kept]);
      });

      test('an expired, a used and an unknown nonce are null', async () => {
        await store.putNonce(nonce('used'));
        await store.takeNonce('used');
        await store.putNonce(nonce('late', 1000));
        await store.putNonce(nonce('just', 1001));
        wait(1000);
        expect(await store.takeNonce('late')).toBeNull();
        expect(await store.takeNonce('just')).not.toBeNull();
        expect(await store.takeNonce('used')).toBeNull();
        expect(await store.takeNonce('never')).toBeNull();
      });

      test('the same nonce cannot be given out twice', async () => {
        await store.putNonce(nonce('n'));
        expect(await codeOfRejection(store.putNonce(nonce('n')))).toBe('already_exists');
      });

      test('the first creator of a setting wins, for all callers', async () => {
        const answers = await Promise.all(
          Array.from({ length: 20 }, (_, value) => store.setting('key', () => ({ value }))),
        );
        expect(answers).toEqual(Array.from({ length: 20 }, () => ({ value: 0 })));
        expect(
          await store.setting('key', () => {
            throw new Error('must not be asked');
          }),
        ).toEqual({ value: 0 });
      });

      test('a creator that throws rejects its caller alone', async () => {
        const bad = store.setting('key', () => {
          throw new Error('no entropy');
        });
        const good = store.setting('key', () => ({ ok: true }));
        await expect(bad).rejects.toThrow('no entropy');
        expect(await good).toEqual({ ok: true });
      });
    });

    function write(options: Partial<DataWrite> = {}): DataWrite {
      return {
        domainId: DOMAIN,
        id: null,
        name: 'item',
        dataType: 'binary',
        digest: `sha256:${'1'.repeat(64)}`,
        size: 3,
        lease: null,
        replaceByName: false,
        ...options,
      };
    }

    describe('data', () => {
      test('an item is created, found, replaced and deleted', async () => {
        const item = await putOne(store, write());
        expect(item).toEqual({
          id: expect.stringMatching(UUID_V7),
          domain_id: DOMAIN,
          name: 'item',
          data_type: 'binary',
          size: 3,
          created_at: at(0),
          updated_at: at(0),
          digest: `sha256:${'1'.repeat(64)}`,
        });
        expect(await store.getData(DOMAIN, item.id)).toEqual(item);
        expect(await store.getData(OTHER_DOMAIN, item.id)).toBeNull();
        wait(5);
        const digest = `sha256:${'2'.repeat(64)}`;
        const replaced = await putOne(
          store,
          write({ id: item.id, name: null, dataType: null, digest, size: 4 }),
        );
        expect(replaced).toEqual({ ...item, digest, size: 4, updated_at: at(0) });
        expect(await store.getData(DOMAIN, item.id)).toEqual(replaced);
        expect(await store.deleteData(OTHER_DOMAIN, item.id)).toBe(false);
        expect(await store.deleteData(DOMAIN, item.id)).toBe(true);
        expect(await store.deleteData(DOMAIN, item.id)).toBe(false);
        expect(await store.getData(DOMAIN, item.id)).toBeNull();
      });

      test('names are unique per domain', async () => {
        const first = await putOne(store, write());
        expect(await codeOfRejection(putOne(store, write()))).toBe('already_exists');
        await putOne(store, write({ domainId: OTHER_DOMAIN }));
        const second = await putOne(store, write({ name: 'second' }));
        expect(await codeOfRejection(putOne(store, write({ id: second.id, name: 'item' })))).toBe(
          'already_exists',
        );
        const again = await putOne(store, write({ replaceByName: true, size: 9, dataType: 'text' }));
        expect(again).toMatchObject({ id: first.id, size: 9, data_type: 'text' });
      });

      test('a promised id is given, an unknown id cannot be replaced, a new item needs a name', async () => {
        expect((await putOne(store, write({ createId: UNKNOWN }))).id).toBe(UNKNOWN);
        expect(await codeOfRejection(putOne(store, write({ id: OTHER_DOMAIN })))).toBe('not_found');
        expect(await codeOfRejection(putOne(store, write({ name: null })))).toBe('invalid_argument');
        expect(await codeOfRejection(putOne(store, write({ dataType: null })))).toBe('invalid_argument');
      });

      test('several writes are made together or not at all', async () => {
        const [a, b] = await store.putData([write({ name: 'a' }), write({ name: 'b' })]);
        expect([a?.name, b?.name]).toEqual(['a', 'b']);
        const digest = `sha256:${'2'.repeat(64)}`;
        const change = write({ id: a!.id, name: 'renamed', digest });
        for (const [refused, code] of [
          [write({ id: UNKNOWN }), 'not_found'],
          [write({ name: 'b' }), 'already_exists'],
          [write({ name: null }), 'invalid_argument'],
          // Not possible beside the change, though each by itself is.
          [write({ name: 'renamed' }), 'already_exists'],
          [write({ id: a!.id, name: 'other' }), 'already_exists'],
        ] as const) {
          const writes = [write({ name: 'new' }), change, refused];
          expect(await codeOfRejection(store.putData(writes))).toBe(code);
          const found = await store.findData({
            domainId: DOMAIN,
            ids: [],
            name: null,
            dataType: null,
            limit: 9,
          });
          expect(found).toEqual([a, b]);
        }
        expect(await store.putData([write({ name: 'new' }), change])).toMatchObject([
          { name: 'new' },
          { id: a!.id, name: 'renamed', digest },
        ]);
      });

      test('of many writers of one name exactly one creates it', async () => {
        const codes = await Promise.all(
          Array.from({ length: 100 }, () => codeOfRejection(putOne(store, write()))),
        );
        expect(codes.filter((code) => code === 'ok')).toHaveLength(1);
        expect(codes.filter((code) => code === 'already_exists')).toHaveLength(99);
      });

      test('finding goes by ids in their order, by name and by type', async () => {
        const [a, b, c] = [
          await putOne(store, write({ name: 'a', dataType: 'x' })),
          await putOne(store, write({ name: 'b', dataType: 'x' })),
          await putOne(store, write({ name: 'c', dataType: 'y' })),
        ];
        const find = async (query: object) =>
          (
            await store.findData({
              domainId: DOMAIN,
              ids: [],
              name: null,
              dataType: null,
              limit: 10,
              ...query,
            })
          ).map(({ id }) => id);
        expect(await find({})).toEqual([a.id, b.id, c.id]);
        expect(await find({ limit: 2 })).toEqual([a.id, b.id]);
        expect(await find({ ids: [c.id, UNKNOWN, a.id] })).toEqual([c.id, a.id]);
        expect(await find({ ids: [c.id, a.id], dataType: 'x' })).toEqual([a.id]);
        expect(await find({ name: 'b' })).toEqual([b.id]);
        expect(await find({ name: 'b', dataType: 'y' })).toEqual([]);
        expect(await find({ dataType: 'x' })).toEqual([a.id, b.id]);
        expect(await find({ domainId: OTHER_DOMAIN })).toEqual([]);
      });

      test('a task writes under its lease, into its own domain, while the lease is current', async () => {
        const node = await scene.node();
        await scene.submit();
        const lease = await scene.take(node);
        await putOne(store, write({ lease: refOf(lease) }));
        expect(
          await codeOfRejection(
            putOne(store, write({ name: 'b', domainId: OTHER_DOMAIN, lease: refOf(lease) })),
          ),
        ).toBe('permission_denied');
        await scene.complete(refOf(lease));
        expect(await codeOfRejection(putOne(store, write({ name: 'b', lease: refOf(lease) })))).toBe(
          'aborted',
        );
        expect(await codeOfRejection(store.createUpload(upload({ lease: refOf(lease) })))).toBe('aborted');
      });

      test('a confined task replaces only what a task of its own job made', async () => {
        const node = await scene.node();
        const theirs = await putOne(store, write({ name: 'theirs' }));
        await scene.submit([{ label: 'a' }, { label: 'b' }]);
        const [a, b] = await scene.lease(node, 2);
        const mine = await putOne(store, write({ name: 'mine', lease: refOf(a!), ownOnly: true }));
        const again = write({ id: mine.id, name: null, lease: refOf(b!), ownOnly: true, size: 8 });
        expect((await putOne(store, again)).size).toBe(8);
        const foreign = write({ id: theirs.id, name: null, lease: refOf(a!) });
        expect(await codeOfRejection(putOne(store, { ...foreign, ownOnly: true }))).toBe('permission_denied');
        expect(await codeOfRejection(putOne(store, foreign))).toBe('ok');
      });

      test('digests that no item names are told', async () => {
        const [one, two] = [`sha256:${'1'.repeat(64)}`, `sha256:${'2'.repeat(64)}`];
        const a = await putOne(store, write({ name: 'a' }));
        const b = await putOne(store, write({ name: 'b' }));
        expect(await store.unreferencedDigests([one, two])).toEqual([two]);
        await store.deleteData(DOMAIN, a.id);
        expect(await store.unreferencedDigests([one, two])).toEqual([two]);
        await putOne(store, write({ id: b.id, digest: two }));
        expect(await store.unreferencedDigests([one, two])).toEqual([one]);
      });
    });

    describe('computes', () => {
      const digestOf = (digit: string): string => `sha256:${digit.repeat(64)}`;

      test('a compute is known by its digest once it was put, with its first engine', async () => {
        const digest = digestOf('a');
        expect(await store.getCompute(digest)).toBeNull();
        const put = await store.putCompute({ digest, engine: 'wasm', size: 7 });
        expect(put).toEqual({
          created: true,
          compute: {
            ref: `compute://sha256/${'a'.repeat(64)}`,
            alg: 'sha256',
            digest: 'a'.repeat(64),
            engine: 'wasm',
            bytes: 7,
            created_at: expect.stringMatching(/Z$/),
          },
        });
        wait(1000);
        expect(await store.putCompute({ digest, engine: 'wasm', size: 7 })).toEqual({
          created: false,
          compute: put.compute,
        });
        expect(await codeOfRejection(store.putCompute({ digest, engine: 'quickjs', size: 7 }))).toBe(
          'already_exists',
        );
        expect(await store.getCompute(digest)).toEqual(put.compute);
      });

      test('which of some digests are no compute is told in order', async () => {
        const [a, b, c] = ['a', 'b', 'c'].map(digestOf) as [string, string, string];
        await store.putCompute({ digest: b, engine: 'wasm', size: 1 });
        expect(await store.missingComputes([c, b, a])).toEqual([c, a]);
        expect(await store.missingComputes([])).toEqual([]);
      });

      test('computes are listed page by page, the newest first', async () => {
        for (const digit of ['1', '2', '3']) {
          await store.putCompute({ digest: digestOf(digit), engine: 'wasm', size: 1 });
        }
        const first = await store.listComputes({ limit: 2, cursor: null });
        expect(first.items.map((item) => item.digest[0])).toEqual(['3', '2']);
        const second = await store.listComputes({ limit: 2, cursor: first.nextCursor });
        expect(second.items.map((item) => item.digest[0])).toEqual(['1']);
        expect(second.nextCursor).toBeNull();
        expect((await store.listComputes({ limit: 3, cursor: null })).nextCursor).toBeNull();
        expect(await codeOfRejection(store.listComputes({ limit: 2, cursor: 'x' }))).toBe('invalid_argument');
      });

      test('the bytes of a compute are in use until it is deleted, and then unless an item has them', async () => {
        const digest = digestOf('d');
        await store.putCompute({ digest, engine: 'wasm', size: 1 });
        expect(await store.unreferencedDigests([digest])).toEqual([]);
        expect(await store.deleteCompute(digest)).toBe(true);
        expect(await store.deleteCompute(digest)).toBe(false);
        expect(await store.unreferencedDigests([digest])).toEqual([digest]);
        await putOne(store, {
          domainId: DOMAIN,
          id: null,
          name: 'same bytes',
          dataType: 'binary',
          digest,
          size: 1,
          lease: null,
          replaceByName: false,
        });
        expect(await store.unreferencedDigests([digest])).toEqual([]);
      });
    });

    function upload(options: Partial<UploadRecord> = {}): Omit<UploadRecord, 'parts'> {
      return {
        id: 'upload-1',
        domainId: DOMAIN,
        name: 'big',
        dataType: 'binary',
        size: null,
        existingId: null,
        dataId: UNKNOWN,
        partSize: 8,
        expiresAtMs: clock.now() + 1000,
        lease: null,
        ...options,
      };
    }

    describe('uploads', () => {
      test('parts come in any order and may be replaced', async () => {
        await store.createUpload(upload());
        await store.putPart('upload-1', { partNumber: 2, etag: 'b', size: 8 });
        await store.putPart('upload-1', { partNumber: 1, etag: 'a', size: 8 });
        await store.putPart('upload-1', { partNumber: 2, etag: 'b2', size: 7 });
        expect(await store.getUpload(DOMAIN, 'upload-1')).toEqual({
          ...upload(),
          parts: [
            { partNumber: 1, etag: 'a', size: 8 },
            { partNumber: 2, etag: 'b2', size: 7 },
          ],
        });
        expect(await store.getUpload(OTHER_DOMAIN, 'upload-1')).toBeNull();
        expect(await store.deleteUpload('upload-1')).toBe(true);
        expect(await store.deleteUpload('upload-1')).toBe(false);
        expect(await store.getUpload(DOMAIN, 'upload-1')).toBeNull();
        expect(await codeOfRejection(store.putPart('upload-1', { partNumber: 1, etag: 'a', size: 1 }))).toBe(
          'not_found',
        );
      });

      test('expired ones are listed, oldest first', async () => {
        await store.createUpload(upload({ id: 'later', expiresAtMs: clock.now() + 2000 }));
        await store.createUpload(upload({ id: 'first' }));
        expect(await store.expiredUploads(10)).toEqual([]);
        wait(1000);
        expect((await store.expiredUploads(10)).map(({ id }) => id)).toEqual(['first']);
        wait(1000);
        expect((await store.expiredUploads(10)).map(({ id }) => id)).toEqual(['first', 'later']);
        expect(await store.expiredUploads(1)).toHaveLength(1);
      });
    });

    test('stats count tasks and jobs, and tell how long the oldest runnable task has waited', async () => {
      const node = await scene.node();
      expect((await store.stats()).oldestRunnableAgeMs).toBeNull();
      await scene.submit([{ label: 'a', priority: -5 }, { label: 'b' }], { edges: [{ from: 'a', to: 'b' }] });
      wait(3000);
      await scene.submit([{ priority: 5 }]);
      wait(1000);
      expect(await store.stats()).toEqual({
        tasks: { queued: 3, leased: 0, running: 0, completed: 0, failed: 0, canceled: 0 },
        jobs: { pending: 2, running: 0, completed: 0, failed: 0, canceled: 0 },
        oldestRunnableAgeMs: 4000,
      });
      const [urgent, a] = await scene.lease(node, 2, false);
      await scene.complete(refOf(urgent!));
      expect(await store.stats()).toMatchObject({
        tasks: { queued: 1, leased: 1, completed: 1 },
        jobs: { pending: 0, running: 1, completed: 1 },
        oldestRunnableAgeMs: null,
      });
      wait(500);
      await scene.complete(refOf(a!));
      expect((await store.stats()).oldestRunnableAgeMs).toBe(0);
    });

    test('closing waits for what was asked, is idempotent, and refuses what comes after', async () => {
      const pending = scene.submit();
      await Promise.all([store[Symbol.asyncDispose](), store[Symbol.asyncDispose]()]);
      expect(await pending).toMatch(UUID_V7);
      expect(await codeOfRejection(scene.submit())).toBe('failed_precondition');
      expect(await codeOfRejection(store.getJob(UNKNOWN))).toBe('failed_precondition');
    });
  });
}
