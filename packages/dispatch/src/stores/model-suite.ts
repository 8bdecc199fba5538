/**
 * Random histories against a model: whatever nodes, requestors and time do, in whatever order, the store's state is what
 * the rules of `lifecycle.ts` say. The model knows no database, no batches and no caches. Run it over any store.
 */
import type { Clock, Random } from '@millrace/runner';
import fc from 'fast-check';
import { SimulatedClock, seededRandom } from '@millrace/runner/testing';
import { expect, test } from 'vitest';
import { isFinal, jobStatus, judge, taskStatus } from '../lifecycle.ts';
import type { Backoff, Ending, TaskState } from '../lifecycle.ts';
import type { GrantedLease, LeaseRef, Outcome, Store } from '../store.ts';
import { Scene, refOf } from './suite.ts';

const TTL = 1000;

interface ModelTask {
  readonly job: ModelJob;
  state: TaskState;
  attempts: number;
  readonly maxAttempts: number;
  nodeFaults: number;
  drains: number;
  cancelRequested: boolean;
  /** Not runnable before, epoch ms. */
  readonly notBefore: number;
  leaseId: string | null;
  expiresAt: number;
  /** How each lease of it ended. */
  readonly endings: Map<string, string>;
}

interface ModelJob {
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
    }
  | { readonly kind: 'lease'; readonly node: number; readonly max: number }
  | {
      readonly kind: 'complete' | 'fail' | 'setup_failed' | 'shutdown' | 'heartbeat';
      readonly pick: number;
      readonly bare: boolean;
    }
  | { readonly kind: 'cancel'; readonly pick: number }
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
    weight: 3,
    arbitrary: fc.record({ kind: fc.constant('wait' as const), ms: fc.constantFrom(1, 400, TTL) }),
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
    }
  }
}

function endLease(task: ModelTask, how: string): void {
  task.endings.set(task.leaseId ?? '', how);
  task.leaseId = null;
}

function applyEnding(task: ModelTask, ending: Ending): void {
  const verdict = judge(ending, task, true);
  task.attempts = verdict.attempts;
  task.nodeFaults = verdict.nodeFaults;
  task.drains = verdict.drains;
  task.state = verdict.next;
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
    const nodes = [await scene.node({ max: 4 }), await scene.node({ max: 4 })];
    const jobs: { id: string; model: ModelJob }[] = [];
    const tasks = new Map<string, ModelTask>();
    const held: Held[] = [];

    const sweep = async (): Promise<void> => {
      await store.sweep();
      for (const task of tasks.values()) {
        if (task.leaseId !== null && task.expiresAt <= clock.now()) {
          endLease(task, 'expired');
          if (task.cancelRequested) task.state = 'canceled';
          else applyEnding(task, 'expired');
        } else if (isDue(task)) task.state = 'ready';
      }
      // A second look: tasks delayed by this sweep are due at once, as their delay is nothing.
      await store.sweep();
      for (const task of tasks.values()) if (isDue(task)) task.state = 'ready';
    };
    const isDue = ({ state, notBefore }: ModelTask): boolean =>
      state === 'delayed' && notBefore <= clock.now();

    for (const action of steps) {
      switch (action.kind) {
        case 'submit': {
          const labels = Array.from({ length: action.tasks }, (_, index) => `t${index}`);
          const due = clock.now() + action.waits;
          const notBefore = (index: number): number => (action.waits > 0 && index % 2 === 1 ? due : 0);
          const id = await scene.submit(
            labels.map((label, index) => ({
              label,
              max_attempts: action.maxAttempts,
              ...(notBefore(index) > 0 && { not_before: new Date(due).toISOString() }),
            })),
            {
              edges: action.chained ? labels.slice(1).map((to, index) => ({ from: `t${index}`, to })) : [],
            },
          );
          const model: ModelJob = { tasks: [], started: false };
          for (const [index, record] of (await scene.job(id)).tasks.entries()) {
            const task: ModelTask = {
              job: model,
              state: action.chained && index > 0 ? 'blocked' : notBefore(index) > 0 ? 'delayed' : 'ready',
              attempts: 0,
              maxAttempts: action.maxAttempts,
              nodeFaults: 0,
              drains: 0,
              cancelRequested: false,
              notBefore: notBefore(index),
              leaseId: null,
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
          // Insertion order of the map is the order of submission: oldest first.
          const expected = [...tasks].filter(([, task]) => task.state === 'ready').slice(0, free);
          const leases = await scene.lease(nodeId, action.max);
          expect(leases.map(({ task }) => task.id)).toEqual(expected.map(([id]) => id));
          for (const lease of leases) {
            const task = tasks.get(lease.task.id)!;
            task.state = 'running';
            task.attempts += 1;
            task.leaseId = lease.leaseId;
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
          // A bare reference of a node that took the task again means the new lease; keep to leases with ids then.
          const bare = action.bare && task.leaseId === lease.leaseId;
          const ref: LeaseRef = { ...refOf(lease), leaseId: bare ? null : lease.leaseId };
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
          } else applyEnding(task, action.kind === 'fail' ? 'failed' : (action.kind as Ending));
          break;
        }
        case 'cancel': {
          if (jobs.length === 0) break;
          const { id, model } = jobs[action.pick % jobs.length]!;
          await store.cancelJob(id);
          if (!model.tasks.some(({ state }) => state === 'failed')) endRest(model);
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
    const states = [...tasks.values()].map(({ state }) => state);
    const count = (...some: readonly TaskState[]): number =>
      states.filter((state) => some.includes(state)).length;
    const waiting = {
      ready: count('ready'),
      blocked: count('blocked'),
      delayed: count('delayed'),
      held: count('leased', 'running'),
    };
    const isIdle = Object.values(waiting).every((tasks) => tasks === 0);
    // All make the same demands.
    expect(await store.queues()).toEqual(isIdle ? [] : [expect.objectContaining(waiting)]);
  });
}
