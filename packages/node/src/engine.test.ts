import { describe, expect, test } from 'vitest';
import {
  defineRunner,
  sleep,
  type ArtifactSink,
  type InputSource,
  type JsonObject,
  type Runner,
  type TaskContext,
} from '@millrace/runner';
import { SimulatedClock, seededRandom } from '@millrace/runner/testing';
import type { Features, ReceivedLease } from '@millrace/dispatch/client';
import { Engine } from './engine.ts';
import { noopMetrics } from './metrics.ts';
import { Roster } from './routing/roster.ts';
import {
  ScriptedDms,
  envelope,
  memoryLog,
  never,
  reply,
  wireError,
  type Script,
} from './simulation/scripted-dms.ts';

const OURS: Partial<Features> = { longPollSecs: 30, batchItems: 16, leaseIds: true, startOnLease: true };

interface Bench {
  readonly clock: SimulatedClock;
  readonly dms: ScriptedDms;
  readonly engine: Engine;
  readonly log: ReturnType<typeof memoryLog>;
  /** Ids of tasks whose runner is at work. */
  readonly working: Set<string>;
  readonly closed: () => number;
  ended: boolean;
}

interface BenchOptions {
  readonly script?: Script;
  readonly features?: Partial<Features>;
  readonly maxConcurrency?: number;
  readonly run?: Runner['run'];
  readonly close?: () => Promise<void>;
  readonly pollMs?: readonly [number, number];
  /** For scripts that look at the time. */
  readonly clock?: SimulatedClock;
}

async function bench(options: BenchOptions = {}): Promise<Bench> {
  const clock = options.clock ?? new SimulatedClock();
  const dms = new ScriptedDms(clock, {
    heartbeat: () => reply({ lease_expires_at: new Date(clock.now() + 20_000).toISOString() }),
    ...options.script,
    features: options.features ?? {},
  });
  const log = memoryLog();
  const working = new Set<string>();
  let closed = 0;
  const runner = defineRunner({
    capability: '/examples/hello/v1',
    async run(ctx) {
      working.add(ctx.lease.task.id);
      try {
        await (options.run ?? untilAborted)(ctx);
      } finally {
        working.delete(ctx.lease.task.id);
      }
    },
    async close() {
      closed += 1;
      await options.close?.();
    },
  });
  const engine = new Engine({
    dms,
    router: new Roster([runner]),
    openStorage: () => ({
      input: {} as InputSource,
      output: {} as ArtifactSink,
      artifacts: () => [],
      close: () => Promise.resolve(),
    }),
    workspace: {
      taskFolder: (id) => ({
        path: id,
        create: () => Promise.resolve(id),
        remove: () => Promise.resolve(),
      }),
    },
    metrics: noopMetrics(),
    heartbeat: { minRatio: 0.25, maxRatio: 0.35, coalesceMs: 250, requestTimeoutMs: 60_000 },
    taskWallMs: 86_400_000,
    maxConcurrency: options.maxConcurrency ?? 1,
    pollBackoffMinMs: options.pollMs?.[0] ?? 1_000,
    pollBackoffMaxMs: options.pollMs?.[1] ?? 4_000,
    stopping: { drainMs: 30_000, abortMs: 10_000, killMs: 10_000 },
    clock,
    random: seededRandom(11),
    log,
  });
  const self: Bench = { clock, dms, engine, log, working, closed: () => closed, ended: false };
  void engine.run().then(() => (self.ended = true));
  await clock.advance(0);
  return self;
}

const untilAborted = (ctx: TaskContext): Promise<void> => never(ctx.signal);

/** A lease that our dispatcher has started, or a reference one has not. */
function lease(n: number, ours = true, members: JsonObject = {}): ReceivedLease {
  const id = `00000000-0000-4000-8000-${String(n).padStart(12, '0')}`;
  return {
    leaseId: ours ? `lease-${n}` : null,
    envelope: envelope({ status: ours ? 'running' : 'leased', ...members }, { id }),
  };
}

/** Answers requests for work from a list that tests fill; waits like our dispatcher when it is empty. */
function queue(): { readonly give: (...leases: ReceivedLease[]) => void; readonly lease: Script['lease'] } {
  const waiting: ReceivedLease[] = [];
  let wake: (() => void) | null = null;
  return {
    give(...leases) {
      waiting.push(...leases);
      wake?.();
    },
    async lease(max, _waitSecs, signal) {
      while (waiting.length === 0) {
        await Promise.race([never(signal), new Promise<void>((resolve) => (wake = resolve))]);
      }
      return { kind: 'leases', leases: waiting.splice(0, max) };
    },
  };
}

async function stopped(b: Bench): Promise<void> {
  b.engine.stop();
  b.engine.stop();
  await b.clock.advance(1_000);
  expect(b.ended).toBe(true);
  expect(b.engine.state).toBe('stopped');
  expect(b.clock.pending).toBe(0);
  expect(b.dms.underWay).toBe(0);
}

describe('leasing', () => {
  test('asks for as many as there are free slots, in one waiting request, and never without a free slot', async () => {
    const work = queue();
    const b = await bench({ features: OURS, maxConcurrency: 3, script: { lease: work.lease } });
    expect(b.dms.of('lease')).toEqual([
      { name: 'lease', max: 3, waitSecs: 30, start: true, capabilities: ['/examples/hello/v1'] },
    ]);
    work.give(lease(1), lease(2));
    await b.clock.advance(0);
    expect(b.working.size).toBe(2);
    expect(b.dms.of('lease').map(({ max }) => max)).toEqual([3, 1]);
    work.give(lease(3));
    await b.clock.advance(10_000);
    expect(b.working.size).toBe(3);
    expect(b.dms.of('lease')).toHaveLength(2);
    expect(b.engine.active).toBe(3);
    await stopped(b);
  });

  test('a slot that becomes free is offered at once', async () => {
    const work = queue();
    const b = await bench({
      features: OURS,
      script: { lease: work.lease },
      run: (ctx) => sleep(b.clock, 500, ctx.signal),
    });
    work.give(lease(1), lease(2), lease(3));
    await b.clock.advance(1_499);
    expect(b.dms.of('complete')).toHaveLength(2);
    await b.clock.advance(1);
    expect(b.dms.of('complete')).toHaveLength(3);
    await stopped(b);
  });

  test('completions bring the next tasks, and nothing else is asked for while they do', async () => {
    const work = queue();
    let next = 2;
    const b = await bench({
      features: { ...OURS, leaseOnComplete: true },
      script: {
        lease: work.lease,
        exchange: (completions) => {
          const leases = next <= 4 ? [lease(next)] : [];
          next += 1;
          return { refusals: completions.map(() => null), leases };
        },
      },
      run: (ctx) => sleep(b.clock, 500, ctx.signal),
    });
    work.give(lease(1));
    await b.clock.advance(1_999);
    expect(b.dms.of('exchange').map(({ completions }) => completions[0]?.lease.leaseId)).toEqual([
      'lease-1',
      'lease-2',
      'lease-3',
    ]);
    expect(b.dms.of('exchange')[0]?.next).toEqual({
      max: 1,
      start: true,
      capabilities: ['/examples/hello/v1'],
    });
    expect(b.dms.of('lease')).toHaveLength(1);
    expect(b.engine.active).toBe(1);
    // None came with the last: its slot is offered again.
    await b.clock.advance(1);
    expect(b.dms.of('lease').map(({ max }) => max)).toEqual([1, 1]);
    expect(b.dms.of('complete')).toEqual([]);
    await stopped(b);
  });

  test('a completion that was refused gives its slot back once', async () => {
    const work = queue();
    const b = await bench({
      features: { ...OURS, leaseOnComplete: true },
      maxConcurrency: 2,
      script: {
        lease: work.lease,
        exchange: (completions) => ({ refusals: completions.map(() => wireError(409)), leases: [] }),
      },
      run: (ctx) => sleep(b.clock, 500, ctx.signal),
    });
    work.give(lease(1));
    await b.clock.advance(500);
    expect(b.dms.of('exchange')).toHaveLength(1);
    expect(b.engine.active).toBe(0);
    work.give(lease(2), lease(3), lease(4));
    await b.clock.advance(100);
    expect(b.engine.active).toBe(2);
    expect(b.dms.of('lease').map(({ max }) => max)).toEqual([2, 1, 1]);
    await stopped(b);
  });

  test('a node that drains asks for nothing in the places of what it completes', async () => {
    const work = queue();
    const b = await bench({
      features: { ...OURS, leaseOnComplete: true },
      script: { lease: work.lease },
      run: (ctx) => sleep(b.clock, 500, ctx.signal),
    });
    work.give(lease(1));
    await b.clock.advance(100);
    b.engine.stop();
    await b.clock.advance(1_000);
    expect(b.dms.of('exchange').map(({ next }) => next)).toEqual([null]);
    expect(b.ended).toBe(true);
  });

  test('asks a server without batches for one at a time', async () => {
    const work = queue();
    const b = await bench({ maxConcurrency: 3, script: { lease: work.lease } });
    expect(b.dms.of('lease')).toEqual([
      { name: 'lease', max: 1, waitSecs: 0, start: false, capabilities: ['/examples/hello/v1'] },
    ]);
    work.give(lease(1, false), lease(2, false));
    await b.clock.advance(0);
    expect(b.dms.of('lease').map(({ max }) => max)).toEqual([1, 1, 1]);
    expect(b.working.size).toBe(2);
    await stopped(b);
  });

  test('pauses between the bounds, uniformly, when a server that does not wait has nothing', async () => {
    const clock = new SimulatedClock();
    const at: number[] = [];
    const b = await bench({
      clock,
      pollMs: [4_000, 1_000],
      script: {
        lease: () => {
          at.push(clock.monotonic());
          return { kind: 'none' };
        },
      },
    });
    await b.clock.advance(500_000);
    const gaps = at.slice(1).map((t, i) => t - at[i]!);
    expect(Math.min(...gaps)).toBeGreaterThanOrEqual(1_000);
    expect(Math.max(...gaps)).toBeLessThanOrEqual(4_000);
    expect(Math.max(...gaps) - Math.min(...gaps)).toBeGreaterThan(2_000);
    await stopped(b);
  });

  test('does not spin when a server that should wait answers at once', async () => {
    const b = await bench({ features: OURS, script: { lease: () => ({ kind: 'none' }) } });
    await b.clock.advance(60_000);
    expect(b.dms.of('lease').length).toBeLessThanOrEqual(61);
    await stopped(b);
  });

  test('takes busy for no work, and asks again when a task of its own ends', async () => {
    const clock = new SimulatedClock();
    let granted = false;
    const b = await bench({
      clock,
      features: OURS,
      maxConcurrency: 2,
      pollMs: [60_000, 60_000],
      script: {
        lease: () => {
          if (granted) return { kind: 'busy' };
          granted = true;
          return { kind: 'leases', leases: [lease(1)] };
        },
      },
      run: (ctx) => sleep(clock, 7_000, ctx.signal),
    });
    await b.clock.advance(6_999);
    expect(b.dms.of('lease')).toHaveLength(2);
    await b.clock.advance(1);
    expect(b.dms.of('lease')).toHaveLength(3);
    await b.clock.advance(59_999);
    expect(b.dms.of('lease')).toHaveLength(3);
    await b.clock.advance(1);
    expect(b.dms.of('lease')).toHaveLength(4);
    await stopped(b);
  });

  test('errors make the pauses grow up to the upper bound', async () => {
    const clock = new SimulatedClock();
    const at: number[] = [];
    const b = await bench({
      clock,
      pollMs: [1_000, 30_000],
      script: {
        lease: () => {
          at.push(clock.monotonic());
          return Promise.reject(wireError(503));
        },
      },
    });
    await b.clock.advance(300_000);
    const gaps = at.slice(1).map((t, i) => t - at[i]!);
    for (const [i, gap] of gaps.entries()) {
      const ceiling = Math.min(30_000, 1_000 * 2 ** i);
      expect(gap).toBeGreaterThanOrEqual(ceiling / 2);
      expect(gap).toBeLessThanOrEqual(ceiling);
    }
    expect(gaps.length).toBeGreaterThan(6);
    await stopped(b);
  });

  test('waits as long as an error asks for', async () => {
    let count = 0;
    const b = await bench({
      script: {
        lease: () => {
          count += 1;
          return count === 1 ? Promise.reject(wireError(429, { retry_after_ms: 90_000 })) : { kind: 'none' };
        },
      },
    });
    await b.clock.advance(89_999);
    expect(count).toBe(1);
    await b.clock.advance(1);
    expect(count).toBe(2);
    await stopped(b);
  });

  test('does not spin on leases that lead nowhere: cancelled ones, and those it cannot set up', async () => {
    for (const members of [{ cancel: true }, { domain_id: null }] as JsonObject[]) {
      let n = 0;
      const b = await bench({
        features: OURS,
        script: { lease: () => ({ kind: 'leases', leases: [lease((n += 1), true, members)] }) },
      });
      await b.clock.advance(60_000);
      expect(n).toBeGreaterThan(10);
      expect(n).toBeLessThanOrEqual(61);
      await stopped(b);
    }
  });

  test('a session that breaks, and a runner that throws, end no other session', async () => {
    const work = queue();
    const b = await bench({
      features: OURS,
      maxConcurrency: 3,
      script: { lease: work.lease },
      run: (ctx) => {
        if (ctx.lease.task.id.endsWith('1')) throw new Error('at once');
        return untilAborted(ctx);
      },
    });
    const broken = { leaseId: 'lease-9', envelope: { ...lease(9).envelope, task: null } };
    work.give(lease(1), lease(2));
    await b.clock.advance(0);
    expect(b.working.size).toBe(1);
    expect(b.dms.of('fail')).toHaveLength(1);
    work.give(broken as unknown as ReceivedLease);
    await b.clock.advance(10_000);
    work.give(lease(3));
    await b.clock.advance(10_000);
    expect(b.working.size).toBe(2);
    await stopped(b);
  });
});

test('a task that is leased anew, to the node that works on it, is begun anew, and what went on before is over', async () => {
  const work = queue();
  const begun: string[] = [];
  const reasons: string[] = [];
  const b = await bench({
    features: OURS,
    maxConcurrency: 3,
    script: { lease: work.lease },
    run: async (ctx) => {
      begun.push(ctx.lease.task.id);
      await untilAborted(ctx).catch(() => undefined);
      reasons.push((ctx.signal.reason as { readonly reason: string }).reason);
      throw ctx.signal.reason;
    },
  });
  work.give(lease(1), lease(2));
  await b.clock.advance(1_000);
  work.give({ ...lease(1), leaseId: 'lease-1-again' });
  await b.clock.advance(1_000);
  expect(begun.map((id) => id.slice(-1))).toEqual(['1', '2', '1']);
  expect(reasons).toEqual(['lease_lost']);
  expect(b.engine.active).toBe(2);
  expect(b.dms.of('fail')).toEqual([]);
  await stopped(b);
});

describe('watching', () => {
  const watched = (b: Bench): (readonly string[])[] => b.dms.of('watch').map(({ leaseIds }) => leaseIds);

  test('names running leases, and asks anew when another one is to be named', async () => {
    const work = queue();
    const b = await bench({ features: OURS, maxConcurrency: 3, script: { lease: work.lease } });
    work.give(lease(1));
    await b.clock.advance(199);
    expect(watched(b)).toEqual([]);
    await b.clock.advance(1);
    expect(watched(b)).toEqual([['lease-1']]);
    await b.clock.advance(5_000);
    work.give(lease(2));
    await b.clock.advance(100);
    work.give(lease(3));
    await b.clock.advance(99);
    expect(watched(b)).toHaveLength(1);
    await b.clock.advance(201);
    expect(watched(b)).toEqual([['lease-1'], ['lease-1', 'lease-2'], ['lease-1', 'lease-2', 'lease-3']]);
    await stopped(b);
  });

  test('a lease that a watch named and a heartbeat kept is watched on', async () => {
    const work = queue();
    let named = false;
    const b = await bench({
      features: OURS,
      script: {
        lease: work.lease,
        watch: async (ids, signal) => {
          if (named) return await never(signal);
          named = true;
          return [...ids];
        },
      },
    });
    work.give(lease(1));
    await b.clock.advance(1_000);
    expect(b.dms.of('heartbeat')).toHaveLength(1);
    expect(watched(b)).toEqual([['lease-1'], ['lease-1']]);
    expect(b.working.size).toBe(1);
    await stopped(b);
  });

  test('does not watch tasks that are over soon', async () => {
    const work = queue();
    const b = await bench({
      features: OURS,
      maxConcurrency: 4,
      script: { lease: work.lease },
      run: (ctx) => sleep(b.clock, 150, ctx.signal),
    });
    for (let n = 1; n <= 40; n += 1) {
      work.give(lease(n));
      await b.clock.advance(50);
    }
    expect(b.dms.of('complete').length).toBeGreaterThan(30);
    expect(watched(b)).toEqual([]);
    await stopped(b);
  });

  test('a lease it hears of is asked about, and the answer ends the work', async () => {
    const work = queue();
    let cancel: (ids: string[]) => void = () => undefined;
    let canceled = false;
    const b: Bench = await bench({
      features: OURS,
      maxConcurrency: 2,
      script: {
        lease: work.lease,
        watch: (_ids, signal) =>
          Promise.race([never(signal), new Promise<string[]>((resolve) => (cancel = resolve))]),
        heartbeat: (_body, _signal, { taskId }) => reply({ cancel: canceled && taskId.endsWith('1') }),
      },
    });
    work.give(lease(1), lease(2));
    await b.clock.advance(3_000);
    canceled = true;
    cancel(['lease-1']);
    await b.clock.advance(0);
    expect(b.dms.of('release')).toEqual([
      expect.objectContaining({ lease: expect.objectContaining({ leaseId: 'lease-1' }), reason: 'canceled' }),
    ]);
    expect(b.working.size).toBe(1);
    await b.clock.advance(1_000);
    expect(watched(b).at(-1)).toEqual(['lease-2']);
    await stopped(b);
  });

  test('pauses when it fails, and stops for good where it is not offered', async () => {
    const work = queue();
    const b = await bench({
      features: OURS,
      script: { lease: work.lease, watch: () => Promise.reject(wireError(503)) },
    });
    work.give(lease(1));
    await b.clock.advance(60_000);
    expect(watched(b).length).toBeGreaterThan(5);
    expect(watched(b).length).toBeLessThan(40);
    await stopped(b);

    const c = await bench({
      features: { ...OURS, leaseIds: false, startOnLease: false },
      script: { lease: queue().lease },
    });
    await c.clock.advance(60_000);
    expect(watched(c)).toEqual([]);
    await stopped(c);
  });
});

describe('stopping', () => {
  test('without tasks ends at once, whatever it waits for', async () => {
    for (const script of [
      { lease: queue().lease },
      { lease: () => ({ kind: 'none' as const }) },
      { lease: () => Promise.reject(wireError(503)) },
    ]) {
      const b = await bench({ script });
      await b.clock.advance(10);
      b.engine.stop();
      await b.clock.advance(0);
      expect(b.ended).toBe(true);
      expect(b.clock.pending).toBe(0);
      expect(b.closed()).toBe(1);
    }
  });

  test('lets tasks finish within the drain time, and leases nothing meanwhile', async () => {
    const work = queue();
    const b: Bench = await bench({
      features: OURS,
      maxConcurrency: 2,
      script: { lease: work.lease },
      run: (ctx) => sleep(b.clock, 29_999, ctx.signal),
    });
    work.give(lease(1));
    await b.clock.advance(0);
    b.engine.stop();
    expect(b.engine.state).toBe('draining');
    work.give(lease(2));
    await b.clock.advance(29_998);
    expect(b.working.size).toBe(1);
    await b.clock.advance(1);
    expect(b.dms.of('complete')).toHaveLength(1);
    expect(b.ended).toBe(true);
    expect(b.dms.of('release')).toEqual([]);
  });

  test('aborts after the drain time and gives the leases back', async () => {
    const work = queue();
    const b = await bench({ features: OURS, maxConcurrency: 2, script: { lease: work.lease } });
    work.give(lease(1), lease(2));
    await b.clock.advance(0);
    b.engine.stop();
    await b.clock.advance(29_999);
    expect(b.working.size).toBe(2);
    await b.clock.advance(1);
    expect(b.dms.of('release').map(({ reason }) => reason)).toEqual(['shutdown', 'shutdown']);
    expect(b.ended).toBe(true);
    expect(b.clock.pending).toBe(0);
  });

  test('closes the runners of tasks that do not end, and still gives their leases back', async () => {
    const work = queue();
    const kill = new AbortController();
    const b = await bench({
      features: OURS,
      script: { lease: work.lease },
      run: () => never(kill.signal),
      close: () => Promise.resolve(kill.abort(new Error('killed'))),
    });
    work.give(lease(1));
    await b.clock.advance(0);
    b.engine.stop();
    await b.clock.advance(39_999);
    expect(b.engine.state).toBe('aborting');
    expect(b.closed()).toBe(0);
    await b.clock.advance(1);
    expect(b.closed()).toBe(1);
    expect(b.dms.of('release').map(({ reason }) => reason)).toEqual(['shutdown']);
    expect(b.ended).toBe(true);
    expect(b.closed()).toBe(1);
  });

  test('gives up on what nothing ends, and reports nothing for it', async () => {
    const work = queue();
    const b = await bench({
      features: OURS,
      script: { lease: work.lease },
      run: () => new Promise(() => undefined),
      close: () => new Promise(() => undefined),
    });
    work.give(lease(1));
    await b.clock.advance(0);
    b.engine.stop();
    await b.clock.advance(49_999);
    expect(b.ended).toBe(false);
    await b.clock.advance(1);
    expect(b.ended).toBe(true);
    expect(b.dms.calls.filter(({ name }) => ['complete', 'fail', 'release'].includes(name))).toEqual([]);
    expect(b.clock.pending).toBe(0);
  });

  test('each further request skips ahead', async () => {
    const work = queue();
    const b = await bench({
      features: OURS,
      script: { lease: work.lease },
      run: () => new Promise(() => undefined),
    });
    work.give(lease(1));
    await b.clock.advance(0);
    b.engine.stop();
    expect(b.engine.state).toBe('draining');
    b.engine.stop();
    expect(b.engine.state).toBe('aborting');
    await b.clock.advance(0);
    expect(b.closed()).toBe(0);
    b.engine.stop();
    expect(b.closed()).toBe(1);
    b.engine.stop();
    await b.clock.advance(0);
    expect(b.ended).toBe(true);
    b.engine.stop();
    expect(b.engine.state).toBe('stopped');
    expect(b.clock.pending).toBe(0);
  });

  test('a lease that arrives although the request was given up is handed back unopened', async () => {
    let answer: (value: ReturnType<typeof lease>) => void = () => undefined;
    const b = await bench({
      features: OURS,
      // Does not listen to its signal, as an answer already in the socket does not.
      script: {
        lease: async () => ({
          kind: 'leases',
          leases: [await new Promise<ReceivedLease>((resolve) => (answer = resolve))],
        }),
      },
    });
    b.engine.stop();
    answer(lease(1));
    await b.clock.advance(0);
    expect(b.dms.of('release').map(({ reason }) => reason)).toEqual(['shutdown']);
    expect(b.working.size).toBe(0);
    expect(b.ended).toBe(true);
  });

  test('before it runs makes it end at once', async () => {
    const clock = new SimulatedClock();
    const dms = new ScriptedDms(clock);
    const engine = new Engine({
      dms,
      router: new Roster([defineRunner({ capability: 'a', run: () => Promise.resolve() })]),
      openStorage: () => {
        throw new Error('not reached');
      },
      workspace: {
        taskFolder: () => {
          throw new Error('not reached');
        },
      },
      metrics: noopMetrics(),
      heartbeat: { minRatio: 0.25, maxRatio: 0.35, coalesceMs: 250, requestTimeoutMs: 60_000 },
      taskWallMs: 1_000,
      maxConcurrency: 1,
      pollBackoffMinMs: 1,
      pollBackoffMaxMs: 1,
      stopping: { drainMs: 1, abortMs: 1, killMs: 1 },
      clock,
      random: seededRandom(1),
      log: memoryLog(),
    });
    engine.stop();
    await engine.run();
    expect(engine.state).toBe('stopped');
    expect(dms.calls).toEqual([]);
    expect(clock.pending).toBe(0);
  });
});
