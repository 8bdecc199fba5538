/** What the dispatcher hears of supervised tasks: whole sessions on one node, in simulated time. */
import { describe, expect, test } from 'vitest';
import {
  TaskAbort,
  defineRunner,
  sleep,
  type ArtifactSink,
  type InputSource,
  type JsonObject,
  type TaskContext,
} from '@millrace/runner';
import { SimulatedClock, seededRandom } from '@millrace/runner/testing';
import type { SupervisionRequest } from './policy.ts';
import type { TaskOutcome } from '../metrics.ts';
import { Roster } from '../routing/roster.ts';
import { Session, type SessionEnding } from '../session.ts';
import { ScriptedDms, envelope, memoryLog, reply } from '../simulation/scripted-dms.ts';

const A = '5b1f3c52-5f0e-4b3e-9b5e-6a1d6c0a7e11';
const B = '6b1f3c52-5f0e-4b3e-9b5e-6a1d6c0a7e11';

function node(run: (ctx: TaskContext, number: number) => Promise<void>) {
  const clock = new SimulatedClock();
  const expiry = (): string => new Date(clock.now() + 20_000).toISOString();
  const dms = new ScriptedDms(clock, { heartbeat: () => reply({ lease_expires_at: expiry() }) });
  const outcomes: (TaskOutcome | 'started')[] = [];
  let entered = 0;
  const router = new Roster(
    [
      defineRunner({
        capability: '/examples/hello/v1',
        run: (ctx) => run(ctx, (entered += 1)),
      }),
    ],
    { supervision: { floorMs: 0 } },
  );
  const endings = new Map<string, SessionEnding>();
  const lease = (id: string, supervision: SupervisionRequest): Session => {
    const session = new Session(
      {
        leaseId: `lease-${id}`,
        envelope: envelope(
          { lease_expires_at: expiry(), status: 'running' },
          { id, meta: { supervision: supervision as JsonObject } },
        ),
      },
      {
        dms,
        features: {
          longPollSecs: 0,
          batchItems: 0,
          leaseIds: true,
          startOnLease: true,
          registrationIntervalSecs: null,
        },
        router,
        openStorage: () => ({
          input: {} as InputSource,
          output: {} as ArtifactSink,
          artifacts: () => [],
          close: () => Promise.resolve(),
        }),
        workspace: {
          taskFolder: () => ({
            path: '/nowhere',
            create: () => Promise.resolve('/nowhere'),
            remove: () => Promise.resolve(),
          }),
        },
        metrics: {
          recordTaskStarted: () => void outcomes.push('started'),
          recordTaskCompleted: (_type, outcome) => void outcomes.push(outcome),
          recordRunnerError: () => undefined,
        },
        heartbeat: { minRatio: 0.25, maxRatio: 0.35, coalesceMs: 250, requestTimeoutMs: 60_000 },
        taskWallMs: 86_400_000,
        clock,
        random: seededRandom(7),
        log: memoryLog(),
        abandoned: new AbortController().signal,
      },
    );
    void session.run().then((ending) => void endings.set(id, ending));
    return session;
  };
  const reports = (): (readonly [string, string, unknown])[] =>
    dms.calls.flatMap((call): (readonly [string, string, unknown])[] => {
      if (call.name === 'complete') return [['complete', call.lease.taskId, null]];
      if (call.name === 'release') return [['release', call.lease.taskId, call.reason]];
      return call.name === 'fail' ? [['fail', call.lease.taskId, call.body]] : [];
    });
  const told = (): JsonObject[] => dms.of('heartbeat').flatMap(({ body }) => body.events as JsonObject[]);
  return { clock, router, lease, reports, told, outcomes, endings };
}

const untilAborted = (ctx: TaskContext): Promise<never> =>
  new Promise((_, reject) =>
    ctx.signal.addEventListener('abort', () => reject(ctx.signal.reason as Error), { once: true }),
  );

const EXACT = { jitter: 'none', firstMs: 1_000 } as const;

describe('a supervised lease', () => {
  test('is tried again within the attempt and completed once; each try is counted, and told as events', async () => {
    const n = node((_ctx, number) => (number < 3 ? Promise.reject(new Error('not yet')) : Promise.resolve()));
    n.lease(A, { restart: { type: 'onFailure' }, backoff: EXACT });
    await n.clock.advance(2_999);
    expect(n.reports()).toEqual([]);
    await n.clock.advance(1);
    expect(n.reports()).toEqual([['complete', A, null]]);
    expect(n.outcomes).toEqual(['started', 'failure', 'started', 'failure', 'started', 'success']);
    expect(n.told().map(({ event }) => event)).toEqual([
      'starting',
      'failed',
      'backoff_scheduled',
      'starting',
      'failed',
      'backoff_scheduled',
      'starting',
      'succeeded',
      'finished',
    ]);
    expect(n.told()[0]).toMatchObject({ kind: 'supervision', try: 1 });
  });

  test('whose tries are used up fails, and another node may try', async () => {
    const n = node(() => Promise.reject(new Error('broken')));
    n.lease(A, { restart: { type: 'onFailure' }, backoff: EXACT, maxRetries: 1 });
    await n.clock.advance(1_000);
    expect(n.reports()).toEqual([['fail', A, expect.objectContaining({ reason: 'runner failed: broken' })]]);
    expect(n.reports()[0]![2]).not.toMatchObject({ details: { retryable: false } });
  });

  test('lets no try use the context of the one before', async () => {
    const contexts: TaskContext[] = [];
    const n = node((ctx, number) => {
      contexts.push(ctx);
      return number === 1 ? Promise.reject(new Error('x')) : sleep(n.clock, 1_000);
    });
    n.lease(A, { restart: { type: 'onFailure' }, backoff: EXACT });
    await n.clock.advance(1_500);
    await expect(contexts[0]!.ctrl.progress(1)).rejects.toThrow('the task has ended');
    await contexts[1]!.ctrl.progress(2);
    await n.clock.advance(500);
    expect(n.reports()).toHaveLength(1);
  });

  test('that is cancelled in a backoff is given back at once', async () => {
    const n = node(() => Promise.reject(new Error('x')));
    const session = n.lease(A, { restart: { type: 'onFailure' }, backoff: EXACT });
    await n.clock.advance(500);
    session.abort(new TaskAbort('canceled'));
    await n.clock.advance(0);
    expect(n.reports()).toEqual([['release', A, 'canceled']]);
    expect(n.endings.get(A)).toEqual({ kind: 'canceled', delivery: 'accepted' });
  });

  test('that always runs goes on until it is cancelled; a request for more than one can be is refused for good', async () => {
    const n = node(() => Promise.resolve());
    const session = n.lease(A, { restart: { type: 'always', intervalMs: 60_000 } });
    await n.clock.advance(150_000);
    expect(n.outcomes).toHaveLength(6);
    session.abort(new TaskAbort('canceled'));
    await n.clock.advance(0);
    expect(n.reports()).toEqual([['release', A, 'canceled']]);
    n.lease(B, { restart: { type: 'sometimes' as 'never' } });
    await n.clock.advance(0);
    expect(n.reports()[1]).toMatchObject([
      'fail',
      B,
      {
        reason: expect.stringContaining(
          'meta.supervision.restart.type must be never, onFailure or always',
        ) as string,
        details: { retryable: false },
      },
    ]);
    expect(n.outcomes).toHaveLength(6);
  });

  test('that runs out of time for good is a timeout, and fails', async () => {
    const n = node(untilAborted);
    n.lease(A, { timeout: 5_000 });
    await n.clock.advance(5_000);
    expect(n.reports()).toEqual([
      [
        'fail',
        A,
        expect.objectContaining({
          reason: 'runner failed: try 1 reached its timeout of 5000 ms (supervision.timeout)',
        }),
      ],
    ]);
    expect(n.outcomes).toEqual(['started', 'timeout']);
  });
});

describe('two leases of one slot', () => {
  test('run one after the other when they queue; the second is kept alive meanwhile', async () => {
    const n = node(() => sleep(n.clock, 60_000));
    n.lease(A, { slot: 'x', admission: 'queue' });
    n.lease(B, { slot: 'x', admission: 'queue' });
    await n.clock.advance(60_000);
    expect(n.reports()).toEqual([['complete', A, null]]);
    expect(n.outcomes).toEqual(['started', 'success', 'started']);
    await n.clock.advance(60_000);
    expect(n.reports()).toEqual([
      ['complete', A, null],
      ['complete', B, null],
    ]);
  });

  test('when the second is to be dropped, it fails at once and may be tried again elsewhere or later', async () => {
    const n = node(() => sleep(n.clock, 60_000));
    n.lease(A, { slot: 'x' });
    n.lease(B, { slot: 'x' });
    await n.clock.advance(0);
    const [report] = n.reports();
    expect(report).toMatchObject([
      'fail',
      B,
      { reason: expect.stringContaining('(dropIfRunning)') as string },
    ]);
    expect(report![2]).not.toMatchObject({ details: { retryable: false } });
    expect(n.outcomes).toEqual(['started']);
    await n.clock.advance(60_000);
  });

  test('when the second replaces the first, that one fails for good, after its work is gone', async () => {
    const n = node(async (ctx, number) => {
      if (number === 2) return;
      await untilAborted(ctx).catch(() => undefined);
      await sleep(n.clock, 3_000);
    });
    n.lease(A, { slot: 'x' });
    await n.clock.advance(1_000);
    n.lease(B, { slot: 'x', admission: 'replace' });
    await n.clock.advance(2_999);
    expect(n.reports()).toEqual([]);
    await n.clock.advance(1);
    expect(n.reports()).toContainEqual([
      'fail',
      A,
      expect.objectContaining({
        reason: `runner failed: task ${B} replaces this one in slot x`,
        details: expect.objectContaining({ retryable: false }) as object,
      }),
    ]);
    expect(n.reports()).toContainEqual(['complete', B, null]);
    expect(n.outcomes).toEqual(['started', 'canceled', 'started', 'success']);
  });

  test('when the node stops, the one that waits is released to others', async () => {
    const n = node(() => sleep(n.clock, 60_000));
    n.lease(A, { slot: 'x', admission: 'queue' });
    n.lease(B, { slot: 'x', admission: 'queue' });
    await n.clock.advance(1_000);
    n.router.slots.close();
    await n.clock.advance(0);
    expect(n.reports()).toEqual([['release', B, 'shutdown']]);
    await n.clock.advance(59_000);
    expect(n.reports()[1]).toEqual(['complete', A, null]);
  });
});
