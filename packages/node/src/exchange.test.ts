import { describe, expect, test } from 'vitest';
import { SimulatedClock } from '@millrace/runner/testing';
import {
  NO_FEATURES,
  type EndingReport,
  type Features,
  type LeaseHandle,
  type ReceivedLease,
} from '@millrace/dispatch/client';
import { Exchange } from './exchange.ts';
import { ScriptedDms, envelope, never, wireError, type Script } from './simulation/scripted-dms.ts';

const OURS: Features = {
  ...NO_FEATURES,
  batchItems: 4,
  leaseIds: true,
  startOnLease: true,
  leaseOnComplete: true,
};

function scene(script: Script = {}, features: Features = OURS, draining = false) {
  const clock = new SimulatedClock();
  const dms = new ScriptedDms(clock, { features, ...script });
  const exchanged: { completed: readonly (string | null)[]; leases: number }[] = [];
  const exchange = new Exchange({
    dms,
    clock,
    features: () => features,
    next: (places) => (draining ? null : { max: places, start: true }),
    exchanged: (completed, leases) => {
      exchanged.push({ completed: completed.map(({ leaseId }) => leaseId), leases: leases.length });
    },
  });
  /** Sends a completion and notes how that ended. */
  const complete = (n: number, options: { signal?: AbortSignal; artifacts?: number } = {}) => {
    const ending = { state: 'waiting' as 'waiting' | 'accepted' | 'failed', error: null as unknown };
    exchange
      .complete(lease(n), { output_cids: [], meta: report(options.artifacts ?? 0) }, { ...options })
      .then(
        () => (ending.state = 'accepted'),
        (error: unknown) => {
          ending.state = 'failed';
          ending.error = error;
        },
      );
    return ending;
  };
  const sent = (): (string | null)[][] =>
    dms.of('exchange').map(({ completions }) => completions.map(({ lease: { leaseId } }) => leaseId));
  return { clock, dms, exchange, exchanged, complete, sent };
}

function lease(n: number): LeaseHandle {
  return { taskId: `task-${n}`, leaseId: `lease-${n}` };
}

function report(artifacts: number): EndingReport {
  return {
    job: { task_id: 'task', job_id: null, domain_id: null, capability: '/c/v1' },
    artifacts: Array.from({ length: artifacts }, (_, index) => ({
      logical_path: `${index}`,
      name: `${index}`,
      data_type: 'x',
      id: null,
    })),
  };
}

const received: ReceivedLease = { leaseId: 'next', envelope: envelope() };

describe('completions', () => {
  test('that are ready in one step go in one request, which asks for as many leases', async () => {
    const s = scene({
      exchange: (completions) => ({ refusals: completions.map(() => null), leases: [received] }),
    });
    const endings = [1, 2, 3].map((n) => s.complete(n));
    await s.clock.advance(0);
    expect(s.dms.calls).toMatchObject([{ name: 'exchange', next: { max: 3, start: true } }]);
    expect(s.sent()).toEqual([['lease-1', 'lease-2', 'lease-3']]);
    expect(s.exchanged).toEqual([{ completed: ['lease-1', 'lease-2', 'lease-3'], leases: 1 }]);
    expect(endings.map(({ state }) => state)).toEqual(['accepted', 'accepted', 'accepted']);
  });

  test('wait for the request under way, and go with the answer to it', async () => {
    const s = scene({ latencyMs: 10 });
    s.complete(1);
    await s.clock.advance(1);
    const later = [s.complete(2), s.complete(3)];
    await s.clock.advance(8);
    expect(s.sent()).toEqual([['lease-1']]);
    await s.clock.advance(1);
    expect(s.sent()).toEqual([['lease-1'], ['lease-2', 'lease-3']]);
    await s.clock.advance(10);
    expect(later.map(({ state }) => state)).toEqual(['accepted', 'accepted']);
  });

  test('wait for a request that hangs for 20 ms and no longer', async () => {
    const s = scene({
      exchange: (completions, _next, signal) =>
        completions[0]?.lease.leaseId === 'lease-1' ? never(signal) : { refusals: [null], leases: [] },
    });
    const hung = s.complete(1);
    await s.clock.advance(0);
    const other = s.complete(2);
    await s.clock.advance(19);
    expect(other.state).toBe('waiting');
    await s.clock.advance(1);
    expect(other.state).toBe('accepted');
    expect(hung.state).toBe('waiting');
  });

  test('are as many to a request as the dispatcher takes, or 200 artifacts, and one with more goes alone', async () => {
    const many = scene();
    for (let n = 1; n <= 5; n += 1) many.complete(n);
    await many.clock.advance(0);
    expect(many.sent().map(({ length }) => length)).toEqual([4, 1]);

    const large = scene();
    for (const artifacts of [100, 100, 1, 500, 1]) large.complete(artifacts, { artifacts });
    await large.clock.advance(0);
    expect(large.sent().map(({ length }) => length)).toEqual([2, 1, 1, 1]);
  });

  test('ask for nothing while the node drains', async () => {
    const s = scene({}, OURS, true);
    s.complete(1);
    await s.clock.advance(0);
    expect(s.dms.calls).toMatchObject([{ name: 'exchange', next: null }]);
  });

  test.each([
    ['a dispatcher without the feature', { ...OURS, leaseOnComplete: false }],
    ['one that takes no batches', { ...OURS, batchItems: 0 }],
  ])('go one by one to %s', async (_name, features) => {
    const s = scene({}, features);
    const ending = s.complete(1);
    await s.clock.advance(0);
    expect(s.dms.calls).toMatchObject([{ name: 'complete', lease: lease(1) }]);
    expect(ending.state).toBe('accepted');
  });
});

describe('answers', () => {
  test('to each are its own: what was refused holds no place for a lease', async () => {
    const gone = wireError(409);
    const s = scene({ exchange: () => ({ refusals: [gone, null], leases: [received] }) });
    const endings = [s.complete(1), s.complete(2)];
    await s.clock.advance(0);
    expect(endings).toEqual([
      { state: 'failed', error: gone },
      { state: 'accepted', error: null },
    ]);
    expect(s.exchanged).toEqual([{ completed: ['lease-2'], leases: 1 }]);
  });

  test.each([500, 429, 401])(
    'a batch answered by %i fails for all, who may send it again',
    async (status) => {
      const s = scene({ exchange: () => Promise.reject(wireError(status)) });
      const endings = [s.complete(1), s.complete(2)];
      await s.clock.advance(0);
      expect(endings).toMatchObject([
        { state: 'failed', error: { details: { status } } },
        { state: 'failed', error: { details: { status } } },
      ]);
      expect(s.dms.of('complete')).toEqual([]);
    },
  );

  test.each([400, 404, 413])(
    'a batch refused by %i is sent one by one: only the culprit is refused',
    async (status) => {
      const s = scene({
        exchange: () => Promise.reject(wireError(status)),
        complete: (_body, { leaseId }) => {
          if (leaseId === 'lease-2') throw wireError(400);
        },
      });
      const endings = [1, 2, 3].map((n) => s.complete(n));
      await s.clock.advance(0);
      expect(endings.map(({ state }) => state)).toEqual(['accepted', 'failed', 'accepted']);
      expect(endings[1]?.error).toMatchObject({ details: { status: 400 } });
    },
  );
});

describe('who gives up', () => {
  test('before it was sent is not sent', async () => {
    const s = scene({ latencyMs: 10 });
    s.complete(1);
    await s.clock.advance(1);
    const controller = new AbortController();
    const ending = s.complete(2, { signal: controller.signal });
    controller.abort(new Error('enough'));
    await s.clock.advance(100);
    expect(ending).toMatchObject({ state: 'failed', error: { message: 'enough' } });
    expect(s.sent()).toEqual([['lease-1']]);
  });

  test('of several in a request ends it only with the last of them', async () => {
    const s = scene({ exchange: (_completions, _next, signal) => never(signal) });
    const [one, two] = [new AbortController(), new AbortController()];
    const endings = [s.complete(1, { signal: one.signal }), s.complete(2, { signal: two.signal })];
    await s.clock.advance(0);
    one.abort(new Error('enough'));
    await s.clock.advance(0);
    expect(endings.map(({ state }) => state)).toEqual(['failed', 'waiting']);
    expect(s.dms.underWay).toBe(1);
    two.abort(new Error('enough'));
    await s.clock.advance(0);
    expect(endings.map(({ state }) => state)).toEqual(['failed', 'failed']);
    expect(s.dms.underWay).toBe(0);
  });

  test('while it is sent alone ends that call', async () => {
    const s = scene({
      exchange: () => Promise.reject(wireError(413)),
      complete: () => new Promise(() => undefined),
    });
    const controller = new AbortController();
    const ending = s.complete(1, { signal: controller.signal });
    await s.clock.advance(0);
    controller.abort(new Error('enough'));
    await s.clock.advance(0);
    expect(ending.state).toBe('failed');
  });
});
