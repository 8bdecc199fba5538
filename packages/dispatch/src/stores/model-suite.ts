/**
 * Random histories against a model: whatever nodes, requestors and time do, in whatever order, the store's state is what
 * the rules of `lifecycle.ts` say. The model knows no database, no batches and no caches. Run it over any store.
 */
import type { Clock, Random } from '@millrace/runner';
import fc from 'fast-check';
import { SimulatedClock, seededRandom } from '@millrace/runner/testing';
import { expect, test } from 'vitest';
import { isFinal, isResumable, jobStatus, judge, resume, taskStatus } from '../lifecycle.ts';
import type { Backoff, Ending, TaskState } from '../lifecycle.ts';
import type { ConcurrencyLimit, TaskSubmission } from '../records.ts';
import type { Resources } from '../resources.ts';
import type { GrantedLease, LeaseRef, Outcome, Store } from '../store.ts';
import { OVERTAKING_MS } from './fitting.ts';
import { Scene, refOf } from './suite.ts';
import { Turns } from './turns.ts';

const TTL = 1000;

const DOMAINS = ['a', 'b', 'c'].map((letter) => `${letter.repeat(8)}-0000-4000-8000-000000000000`);

/** Of the second node; the first does not say what it has. */
const CPUS = 3;

interface ModelTask {
  readonly job: ModelJob;
  readonly priority: number;
  readonly concurrency: ConcurrencyLimit | null;
  /** Cores it names; null: none. */
  readonly cpu: number | null;
  /** When it became ready. */
  since: number;
  state: TaskState;
  attempts: number;
  readonly maxAttempts: number;
  nodeFaults: number;
  drains: number;
  cancelRequested: boolean;
  /** Not runnable before, epoch ms. */
  readonly notBefore: number;
  leaseId: string | null;
  /** That expired; null once somebody took the task, or it ended. */
  lapsedLeaseId: string | null;
  expiresAt: number;
  /** How each lease of it ended. */
  readonly endings: Map<string, string>;
}

interface ModelJob {
  readonly domain: string;
  readonly tasks: ModelTask[];
  started: boolean;
}

interface Held {
  readonly task: ModelTask;
  readonly lease: GrantedLease;
}

type Step =
  | {
      readonly kind: 'submit';
      readonly tasks: number;
      readonly chained: boolean;
      readonly maxAttempts: number;
      /** How long every other task is to wait for its time. */
      readonly waits: number;
      readonly domain: number;
      /** Of its tasks, in turn. */
      readonly priorities: readonly number[];
      readonly limits: readonly (ConcurrencyLimit | null)[];
      readonly cpus: readonly (number | null)[];
    }
  | { readonly kind: 'lease'; readonly node: number; readonly max: number }
  | {
      readonly kind: 'complete' | 'fail' | 'setup_failed' | 'shutdown' | 'heartbeat';
      readonly pick: number;
      readonly bare: boolean;
    }
  | { readonly kind: 'cancel'; readonly pick: number }
  | { readonly kind: 'weigh'; readonly domain: number; readonly weight: number }
  | { readonly kind: 'wait'; readonly ms: number };

const pick = fc.nat({ max: 1000 });
const step: fc.Arbitrary<Step> = fc.oneof(
  {
    weight: 2,
    arbitrary: fc.record({
      kind: fc.constant('submit' as const),
      tasks: fc.integer({ min: 1, max: 4 }),
      chained: fc.boolean(),
      maxAttempts: fc.integer({ min: 1, max: 3 }),
      waits: fc.constantFrom(0, 0, 600, 2 * TTL),
      domain: fc.nat({ max: DOMAINS.length - 1 }),
      priorities: fc.array(fc.constantFrom(0, 0, 1), { minLength: 1, maxLength: 2 }),
      limits: fc.array(
        fc.oneof(
          fc.constant(null),
          fc.record({ key: fc.constantFrom('x', 'y'), limit: fc.integer({ min: 1, max: 3 }) }),
        ),
        { minLength: 1, maxLength: 3 },
      ),
      cpus: fc.array(fc.constantFrom(null, null, 0.5, 2, CPUS, CPUS + 1), { minLength: 1, maxLength: 3 }),
    }),
  },
  {
    weight: 5,
    arbitrary: fc.record({
      kind: fc.constant('lease' as const),
      node: fc.nat({ max: 1 }),
      max: fc.integer({ min: 1, max: 3 }),
    }),
  },
  {
    weight: 8,
    arbitrary: fc.record({
      kind: fc.constantFrom('complete', 'complete', 'fail', 'setup_failed', 'shutdown', 'heartbeat'),
      pick,
      bare: fc.boolean(),
    }),
  },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('cancel' as const), pick }) },
  {
    weight: 1,
    arbitrary: fc.record({
      kind: fc.constant('weigh' as const),
      domain: fc.nat({ max: DOMAINS.length - 1 }),
      weight: fc.integer({ min: 1, max: 4 }),
    }),
  },
  {
    weight: 3,
    arbitrary: fc.record({
      kind: fc.constant('wait' as const),
      ms: fc.constantFrom(1, 400, 400, TTL, OVERTAKING_MS),
    }),
  },
);

/** Ends what is queued, asks what is held to end. */
function endRest(job: ModelJob): void {
  for (const task of job.tasks) {
    if (isFinal(task.state)) continue;
    if (task.leaseId === null) task.state = 'canceled';
    else task.cancelRequested = true;
  }
}

/** In a chain the next stage opens; without edges nothing is blocked. */
function openStages(job: ModelJob, now: number): void {
  for (const [index, task] of job.tasks.entries()) {
    if (task.state === 'blocked' && job.tasks[index - 1]?.state === 'completed') {
      task.state = task.notBefore > now ? 'delayed' : 'ready';
      task.since = now;
    }
  }
}

function endLease(task: ModelTask, how: string): void {
  task.endings.set(task.leaseId ?? '', how);
  task.leaseId = null;
}

/** A node comes back to a task that nobody took meanwhile. */
function resumeLease(task: ModelTask, now: number): void {
  if (!isResumable({ state: task.state, deadlineAt: null }, now)) return;
  Object.assign(task, resume(task));
  task.endings.delete(task.lapsedLeaseId ?? '');
  task.leaseId = task.lapsedLeaseId;
  task.lapsedLeaseId = null;
  task.expiresAt = now + TTL;
  task.state = 'running';
}

function applyEnding(task: ModelTask, ending: Ending, now: number): void {
  const verdict = judge(ending, task, true);
  task.attempts = verdict.attempts;
  task.nodeFaults = verdict.nodeFaults;
  task.drains = verdict.drains;
  task.state = verdict.next;
  task.since = now;
  if (verdict.next === 'failed') endRest(task.job);
}

function modelJobStatus(job: ModelJob): string {
  const counts = { queued: 0, leased: 0, running: 0, completed: 0, failed: 0, canceled: 0 };
  for (const task of job.tasks) counts[taskStatus(task.state)] += 1;
  return jobStatus(counts, job.started);
}

const codeOf = (outcome: Outcome<unknown> | undefined): string =>
  outcome?.ok === false ? outcome.error.code : 'ok';

export interface ModelOptions {
  readonly clock: Clock;
  readonly random: Random;
  readonly leaseTtlMs: number;
  readonly backoff: Backoff;
}

/** The test. `make` opens an empty store with the given clock, random source and times; `runs` histories are tried. */
export function modelTest(make: (options: ModelOptions) => Promise<Store>, runs: number): void {
  test('any history of nodes, requestors and time leaves the store where the rules say', async () => {
    await fc.assert(historyProperty(make), { numRuns: runs });
  }, 240_000);
}

function historyProperty(make: (options: ModelOptions) => Promise<Store>) {
  return fc.asyncProperty(fc.array(step, { minLength: 5, maxLength: 60 }), async (steps) => {
    const clock = new SimulatedClock();
    await using store = await make({
      clock,
      random: seededRandom(1),
      leaseTtlMs: TTL,
      backoff: { baseMs: 0, capMs: 0 },
    });
    const scene = new Scene(store);
    const nodes = [await scene.node({ max: 4 }), await scene.node({ max: 4, resources: { cpu: CPUS } })];
    const turns = new Turns();
    const weights = new Map<string, number>();
    const jobs: { id: string; model: ModelJob }[] = [];
    const tasks = new Map<string, ModelTask>();
    const held: Held[] = [];

    const sweep = async (): Promise<void> => {
      await store.sweep();
      for (const task of tasks.values()) {
        if (task.leaseId !== null && task.expiresAt <= clock.now()) {
          task.lapsedLeaseId = task.leaseId;
          endLease(task, 'expired');
          if (task.cancelRequested) task.state = 'canceled';
          else applyEnding(task, 'expired', clock.now());
        } else if (isDue(task)) makeReady(task);
      }
      // A second look: tasks delayed by this sweep are due at once, as their delay is nothing.
      await store.sweep();
      for (const task of tasks.values()) if (isDue(task)) makeReady(task);
    };
    const makeReady = (task: ModelTask): void => {
      task.state = 'ready';
      task.since = clock.now();
    };
    const isDue = ({ state, notBefore }: ModelTask): boolean =>
      state === 'delayed' && notBefore <= clock.now();

    const isFull = ({ job, concurrency }: ModelTask): boolean => {
      if (concurrency === null) return false;
      let running = 0;
      for (const other of tasks.values()) {
        if (other.leaseId === null || other.job.domain !== job.domain) continue;
        if (other.concurrency?.key === concurrency.key) running += 1;
      }
      return running >= concurrency.limit;
    };

    /** What the node is given next, of what is ready; null: nothing. Insertion order of the map is the order of submission. */
    const nextFor = (node: number): [string, ModelTask] | null => {
      const counted = node === 1;
      const taken = [...tasks.values()]
        .filter((task) => task.leaseId !== null && holderOf(task) === nodes[1])
        .reduce((sum, { cpu }) => sum + (cpu ?? 1), 0);
      const lines = new Map<string, [string, ModelTask][]>();
      for (const entry of tasks) {
        const [, task] = entry;
        if (task.state !== 'ready' || isFull(task) || (counted && (task.cpu ?? 1) > CPUS)) continue;
        const line = lines.get(task.job.domain);
        if (line) line.push(entry);
        else lines.set(task.job.domain, [entry]);
      }
      for (;;) {
        const domain = turns.next(lines.keys());
        if (domain === null) return null;
        for (const entry of (lines.get(domain) ?? []).toSorted(([, a], [, b]) => b.priority - a.priority)) {
          const [, task] = entry;
          if (!counted || taken + (task.cpu ?? 1) <= CPUS) return entry;
          if (clock.now() - task.since >= OVERTAKING_MS) return null;
        }
        lines.delete(domain);
      }
    };
    const holderOf = (task: ModelTask): string | null | undefined =>
      held.find(({ lease }) => lease.leaseId === task.leaseId)?.lease.task.reserved_by;

    for (const action of steps) {
      switch (action.kind) {
        case 'submit': {
          const labels = Array.from({ length: action.tasks }, (_, index) => `t${index}`);
          const due = clock.now() + action.waits;
          const notBefore = (index: number): number => (action.waits > 0 && index % 2 === 1 ? due : 0);
          const domain = DOMAINS[action.domain]!;
          const demands = labels.map((_, index) => ({
            priority: action.priorities[index % action.priorities.length]!,
            concurrency: action.limits[index % action.limits.length]!,
            cpu: action.cpus[index % action.cpus.length]!,
          }));
          const id = await scene.submit(
            labels.map((label, index): Partial<TaskSubmission> => {
              const { priority, concurrency, cpu } = demands[index]!;
              return {
                label,
                max_attempts: action.maxAttempts,
                priority,
                ...(concurrency !== null && { concurrency }),
                ...(cpu !== null && { resources: { cpu } }),
                ...(notBefore(index) > 0 && { not_before: new Date(due).toISOString() }),
              };
            }),
            {
              domain_id: domain,
              edges: action.chained ? labels.slice(1).map((to, index) => ({ from: `t${index}`, to })) : [],
            },
          );
          const model: ModelJob = { domain, tasks: [], started: false };
          for (const [index, record] of (await scene.job(id)).tasks.entries()) {
            const task: ModelTask = {
              job: model,
              ...demands[index]!,
              since: clock.now(),
              state: action.chained && index > 0 ? 'blocked' : notBefore(index) > 0 ? 'delayed' : 'ready',
              attempts: 0,
              maxAttempts: action.maxAttempts,
              nodeFaults: 0,
              drains: 0,
              cancelRequested: false,
              notBefore: notBefore(index),
              leaseId: null,
              lapsedLeaseId: null,
              expiresAt: 0,
              endings: new Map(),
            };
            model.tasks.push(task);
            tasks.set(record.id, task);
          }
          jobs.push({ id, model });
          break;
        }
        case 'lease': {
          const nodeId = nodes[action.node]!;
          const mine = [...tasks.values()].filter(
            (task) =>
              task.leaseId !== null &&
              held.some(
                (item) => item.lease.leaseId === task.leaseId && item.lease.task.reserved_by === nodeId,
              ),
          ).length;
          const free = Math.max(0, Math.min(action.max, 4 - mine));
          const leases = await scene.lease(nodeId, action.max);
          expect(leases.length).toBeLessThanOrEqual(free);
          for (let given = 0; given < free; given += 1) {
            const lease = leases[given];
            const [id, task] = nextFor(action.node) ?? [];
            expect(lease?.task.id).toBe(id);
            if (lease === undefined || task === undefined) break;
            turns.charge(task.job.domain, weights.get(task.job.domain) ?? 1);
            task.state = 'running';
            task.attempts += 1;
            task.leaseId = lease.leaseId;
            task.lapsedLeaseId = null;
            task.expiresAt = clock.now() + TTL;
            task.job.started = true;
            expect(lease.task.attempts).toBe(task.attempts);
            held.push({ task, lease });
          }
          break;
        }
        case 'heartbeat':
        case 'complete':
        case 'fail':
        case 'setup_failed':
        case 'shutdown': {
          if (held.length === 0) break;
          const { task, lease } = held[action.pick % held.length]!;
          // A bare reference means the newest lease; keep to leases with ids otherwise.
          const newest = (task.leaseId ?? task.lapsedLeaseId) === lease.leaseId;
          const ref: LeaseRef = { ...refOf(lease), leaseId: action.bare && newest ? null : lease.leaseId };
          const isRelease = action.kind === 'setup_failed' || action.kind === 'shutdown';
          if (!isRelease && task.lapsedLeaseId === lease.leaseId) resumeLease(task, clock.now());
          const current = task.leaseId === lease.leaseId;
          let code: string;
          let kind: string;
          if (action.kind === 'heartbeat') {
            code = codeOf((await store.heartbeat([{ ...ref, progress: null, events: [] }]))[0]);
            expect(code).toBe(current ? 'ok' : 'aborted');
            if (current) task.expiresAt = clock.now() + TTL;
            break;
          }
          if (action.kind === 'complete') {
            kind = 'completed';
            code = await scene.complete(ref);
          } else if (action.kind === 'fail') {
            kind = 'failed';
            code = await scene.fail(ref);
          } else {
            kind = 'released';
            code = await scene.release(ref, action.kind);
          }
          if (!current) {
            const ended = task.endings.get(lease.leaseId);
            const same = ended === kind || (kind === 'released' && ended === 'canceled');
            expect(code).toBe(same ? 'ok' : 'aborted');
            break;
          }
          if (task.cancelRequested) {
            expect(code).toBe(kind === 'released' ? 'ok' : 'aborted');
            endLease(task, 'canceled');
            task.state = 'canceled';
            break;
          }
          expect(code).toBe('ok');
          endLease(task, kind);
          if (kind === 'completed') {
            task.state = 'completed';
            openStages(task.job, clock.now());
          } else applyEnding(task, action.kind === 'fail' ? 'failed' : (action.kind as Ending), clock.now());
          break;
        }
        case 'cancel': {
          if (jobs.length === 0) break;
          const { id, model } = jobs[action.pick % jobs.length]!;
          await store.cancelJob(id);
          if (!model.tasks.some(({ state }) => state === 'failed')) endRest(model);
          break;
        }
        case 'weigh': {
          const domain = DOMAINS[action.domain]!;
          await store.setWeight(domain, action.weight);
          weights.set(domain, action.weight);
          break;
        }
        case 'wait':
          clock.jumpWallClock(action.ms);
          await sweep();
          break;
      }
    }

    const totals = { queued: 0, leased: 0, running: 0, completed: 0, failed: 0, canceled: 0 };
    for (const { id, model } of jobs) {
      const detail = await scene.job(id);
      expect(
        detail.tasks.map(({ status, attempts, node_faults }) => [status, attempts, node_faults]),
      ).toEqual(
        model.tasks.map((task) => [taskStatus(task.state), task.attempts, task.nodeFaults + task.drains]),
      );
      expect(detail.job.status).toBe(modelJobStatus(model));
      const accepted = detail.receipts.filter(({ outcome }) => outcome === 'completed');
      expect(accepted.length).toBe(model.tasks.filter(({ state }) => state === 'completed').length);
      expect(detail.receipts.length).toBe(model.tasks.reduce((sum, task) => sum + task.endings.size, 0));
      const events = (await store.events(id, 0, 10_000)) ?? [];
      expect(events.map(({ seq }) => seq)).toEqual(events.map((_, index) => index + 1));
      for (const { state } of model.tasks) totals[taskStatus(state)] += 1;
    }
    expect((await store.stats()).tasks).toEqual(totals);
    const all = [...tasks.values()];
    const count = (some: readonly ModelTask[], ...states: readonly TaskState[]): number =>
      some.filter(({ state }) => states.includes(state)).length;
    const queues = [null, 0.5, 2, CPUS, CPUS + 1].flatMap((cpu) => {
      const some = all.filter((task) => task.cpu === cpu && !isFinal(task.state));
      if (some.length === 0) return [];
      const resources: { resources?: Resources } = cpu === null ? {} : { resources: { cpu } };
      return {
        ...resources,
        ready: count(some, 'ready'),
        limited: some.filter((task) => task.state === 'ready' && isFull(task)).length,
        blocked: count(some, 'blocked'),
        delayed: count(some, 'delayed'),
        held: count(some, 'leased', 'running'),
      };
    });
    const told = (await store.queues()).map(
      ({ resources, ready, limited, blocked, delayed, held: inHand }) => ({
        ...(resources !== undefined && { resources }),
        ready,
        limited,
        blocked,
        delayed,
        held: inHand,
      }),
    );
    expect(new Set(told)).toEqual(new Set(queues));
    const domains = DOMAINS.flatMap((domain_id) => {
      const some = all.filter(({ job }) => job.domain === domain_id);
      const [ready, inHand] = [count(some, 'ready'), count(some, 'leased', 'running')];
      const weight = weights.get(domain_id) ?? 1;
      return weight === 1 && ready + inHand === 0 ? [] : [{ domain_id, weight, ready, held: inHand }];
    });
    expect(await store.domains()).toEqual(domains);
  });
}
