import { describe, expect, test } from 'vitest';
import { MillraceError, TaskAbort, sleep, type JsonObject } from '@millrace/runner';
import { SimulatedClock } from '@millrace/runner/testing';
import type { SupervisionMetrics, TaskOutcome } from '../metrics.ts';
import { memoryLog, type LogLine } from '../simulation/scripted-dms.ts';
import type { Verdict } from '../usage.ts';
import type { SupervisionEvent } from './events.ts';
import { SupervisionBounds, type SupervisionOptions, type SupervisionRequest } from './policy.ts';
import { Slots } from './slots.ts';
import { isFatal, supervise } from './supervise.ts';

type Run = (signal: AbortSignal, number: number, clock: SimulatedClock) => Promise<void>;

interface Bench {
  readonly clock: SimulatedClock;
  readonly events: SupervisionEvent[];
  readonly counted: string[];
  readonly outcomes: TaskOutcome[];
  /** When each try began. */
  readonly starts: number[];
  readonly log: { readonly lines: LogLine[] };
  readonly slots: Slots;
  /** Of all times it was decided. */
  readonly decided: Verdict[];
  readonly controller: AbortController;
  verdict: Verdict | null;
}

interface BenchOptions {
  readonly request?: SupervisionRequest;
  readonly bounds?: SupervisionOptions;
  readonly run?: Run;
  readonly random?: () => number;
  readonly clock?: SimulatedClock;
  readonly slots?: Slots;
  readonly taskId?: string;
  readonly emit?: () => never;
  readonly controller?: AbortController;
}

/** Pauses are what they are without chance, and the floor is out of the way. */
const EXACT = { jitter: 'none', firstMs: 100, maxMs: 10_000, factor: 2 } as const;

function bench(options: BenchOptions = {}): Bench {
  const clock = options.clock ?? new SimulatedClock();
  const slots = options.slots ?? new Slots();
  const controller = options.controller ?? new AbortController();
  const log = memoryLog();
  const self: Bench = {
    clock,
    events: [],
    counted: [],
    outcomes: [],
    starts: [],
    log,
    slots,
    decided: [],
    controller,
    verdict: null,
  };
  const count =
    (name: string) =>
    (...values: unknown[]): void =>
      void self.counted.push([name, ...values].join(' '));
  const metrics: SupervisionMetrics = {
    attemptStarting: count('starting'),
    attemptEnded: count('ended'),
    backoffScheduled: count('backoff'),
    attemptTimedOut: count('timeout'),
    terminal: count('terminal'),
    subscriberOverflow: count('overflow'),
    subscriberPanicked: count('panicked'),
    submitted: count('submitted'),
    rejected: count('rejected'),
    observePhases: count('phases'),
  };
  const { run = () => Promise.resolve(), taskId = 'task-1' } = options;
  void supervise({
    supervision: new SupervisionBounds({ floorMs: 0, ...options.bounds }).of({
      supervision: (options.request ?? {}) as JsonObject,
    }),
    runId: 'run-1',
    taskId,
    signal: controller.signal,
    slots,
    begin(signal, number) {
      self.starts.push(clock.monotonic());
      return {
        settled: (async () => run(signal, number, clock))(),
        end: (outcome) => void self.outcomes.push(outcome),
      };
    },
    metrics,
    clock,
    random: options.random ?? (() => 0),
    log,
    emit: options.emit ?? ((event) => void self.events.push(event)),
    decided: (verdict) => void self.decided.push(verdict),
  }).then((verdict) => (self.verdict = verdict));
  return self;
}

const names = ({ events }: Bench): string[] => events.map(({ event }) => event);
const fails = (message = 'broken'): Promise<never> => Promise.reject(new Error(message));
const until = (signal: AbortSignal): Promise<never> =>
  new Promise((_, reject) =>
    signal.addEventListener('abort', () => reject(signal.reason as Error), { once: true }),
  );
const onFailure = { restart: { type: 'onFailure' }, backoff: EXACT } as const;
const always = (intervalMs?: number): SupervisionRequest => ({
  restart: { type: 'always', ...(intervalMs !== undefined && { intervalMs }) },
  backoff: EXACT,
});

describe('a task that asks for nothing', () => {
  test('begins before supervise returns, is one try, and tells nothing', async () => {
    const b = bench();
    expect(b.starts).toEqual([0]);
    await b.clock.advance(0);
    expect(b.verdict).toEqual({ kind: 'completed' });
    expect(b.outcomes).toEqual(['success']);
    expect([b.events, b.log.lines, b.clock.pending]).toEqual([[], [], 0]);
    expect(b.counted).toEqual(['starting 1', 'ended', 'terminal completed 1']);
  });

  test('fails with the very error of its runner', async () => {
    const error = new Error('x');
    const b = bench({ run: () => Promise.reject(error) });
    await b.clock.advance(0);
    expect(b.verdict).toEqual({ kind: 'failed', error });
    expect((b.verdict as { error: unknown }).error).toBe(error);
  });

  test('is decided in the moment its runner settles, and once', async () => {
    const b = bench({ run: (_signal, _number, clock) => sleep(clock, 5) });
    await b.clock.advance(5);
    b.controller.abort(new TaskAbort('canceled'));
    await b.clock.advance(0);
    expect(b.decided).toEqual([{ kind: 'completed' }]);
    expect(b.verdict).toEqual({ kind: 'completed' });
  });
});

describe('restarts', () => {
  const outcomes: Record<string, Run> = {
    success: () => Promise.resolve(),
    failure: () => fails(),
    timeout: until,
    fatal: () => Promise.reject(new MillraceError('invalid_argument', 'never')),
  };

  test.each([
    ['never', 'success', 1, 'completed'],
    ['never', 'failure', 1, 'failed'],
    ['never', 'timeout', 1, 'failed'],
    ['never', 'fatal', 1, 'failed'],
    ['onFailure', 'success', 1, 'completed'],
    ['onFailure', 'failure', 3, 'failed'],
    ['onFailure', 'timeout', 3, 'failed'],
    ['onFailure', 'fatal', 1, 'failed'],
    ['always', 'failure', 3, 'failed'],
    ['always', 'timeout', 3, 'failed'],
    ['always', 'fatal', 1, 'failed'],
  ] as const)('%s after %s with two retries: %i tries, %s', async (type, outcome, tries, verdict) => {
    const request = { restart: { type }, backoff: EXACT, maxRetries: 2, timeout: 50 };
    const b = bench({ request, run: outcomes[outcome]! });
    await b.clock.runUntil(() => b.verdict !== null);
    expect(b.starts).toHaveLength(tries);
    expect(b.verdict!.kind).toBe(verdict);
  });

  test('come after pauses that grow, and a success begins anew', async () => {
    const plan = ['fail', 'fail', 'ok', 'fail', 'fail', 'ok'];
    const b = bench({
      request: { ...always(1_000), maxRetries: 2 },
      run: (_signal, number) => (plan[number - 1] === 'ok' ? Promise.resolve() : fails()),
    });
    await b.clock.runUntil(() => b.verdict !== null);
    // Failed tries 7, 8 and 9 end it.
    expect(b.starts).toEqual([0, 100, 300, 1_300, 1_400, 1_600, 2_600, 2_700, 2_900]);
    expect(b.verdict).toMatchObject({ kind: 'failed' });
    expect(b.counted.filter((line) => line.startsWith('backoff'))).toEqual([
      'backoff failure 100',
      'backoff failure 200',
      'backoff success 1000',
      'backoff failure 100',
      'backoff failure 200',
      'backoff success 1000',
      'backoff failure 100',
      'backoff failure 200',
    ]);
    expect(b.counted.at(-1)).toBe('terminal exhausted 9');
  });

  test('of one and no more retries than allowed: at the limit it goes on, past it it ends', async () => {
    const run: Run = (_signal, number) => (number <= 2 ? fails() : Promise.resolve());
    const enough = bench({ request: { ...onFailure, maxRetries: 2 }, run });
    const short = bench({ request: { ...onFailure, maxRetries: 1 }, run });
    await enough.clock.runUntil(() => enough.verdict !== null);
    await short.clock.runUntil(() => short.verdict !== null);
    expect([enough.verdict!.kind, short.verdict!.kind]).toEqual(['completed', 'failed']);
  });

  test('have no limit unless there is one', async () => {
    const b = bench({ request: { ...onFailure, maxRetries: 0 }, run: () => fails() });
    await b.clock.runUntil(() => b.starts.length === 500, { timeoutMs: 1e9 });
    expect(b.verdict).toBeNull();
  });

  test('move their pauses by the chance they are given', async () => {
    const b = bench({
      request: { restart: { type: 'onFailure' }, backoff: { ...EXACT, jitter: 'equal' }, maxRetries: 1 },
      run: () => fails(),
      random: () => 0.5,
    });
    await b.clock.runUntil(() => b.verdict !== null);
    expect(b.starts).toEqual([0, 75]);
  });

  test('count the interval from the end of a try', async () => {
    const b = bench({ request: always(1_000), run: (_signal, _number, clock) => sleep(clock, 300) });
    await b.clock.advance(3_000);
    expect(b.starts).toEqual([0, 1_300, 2_600]);
    b.controller.abort(new TaskAbort('canceled'));
    await b.clock.advance(0);
    expect(b.verdict).toMatchObject({ kind: 'aborted', abort: { reason: 'canceled' } });
  });

  test('without an interval are as far apart as the floor, and make no pause after a try that took longer', async () => {
    const quick = bench({ request: always(), bounds: { floorMs: 100 } });
    await quick.clock.advance(1_000);
    expect(quick.starts).toEqual([0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1_000]);
    expect(names(quick)).not.toContain('backoff_scheduled');
    quick.controller.abort();
    const slow = bench({
      request: always(0),
      bounds: { floorMs: 100 },
      run: (_signal, _number, clock) => sleep(clock, 100),
    });
    await slow.clock.advance(300);
    expect(slow.starts).toEqual([0, 100, 200, 300]);
    slow.controller.abort();
  });

  test('with an interval or a backoff below the floor wait for the floor', async () => {
    const b = bench({ request: always(10), bounds: { floorMs: 100 } });
    await b.clock.advance(200);
    expect(b.starts).toEqual([0, 100, 200]);
    b.controller.abort();
    const failing = bench({
      request: { restart: { type: 'onFailure' }, backoff: { ...EXACT, firstMs: 1 } },
      bounds: { floorMs: 100 },
      run: () => fails(),
    });
    await failing.clock.advance(200);
    expect(failing.starts).toEqual([0, 100, 200]);
    failing.controller.abort();
  });

  test('that are used up say how many there were, and keep code and details of the last', async () => {
    const error = new MillraceError('internal', 'convert ended with exit code 4', {
      details: { exit_code: 4 },
    });
    const b = bench({ request: { ...onFailure, maxRetries: 1 }, run: () => Promise.reject(error) });
    await b.clock.runUntil(() => b.verdict !== null);
    expect((b.verdict as { error: MillraceError }).error).toMatchObject({
      code: 'internal',
      message: 'after 2 tries (maxRetries 1): convert ended with exit code 4',
      details: { exit_code: 4 },
    });
    const odd = new Error('mine');
    const foreign = bench({ request: { ...onFailure, maxRetries: 1 }, run: () => Promise.reject(odd) });
    await foreign.clock.runUntil(() => foreign.verdict !== null);
    expect((foreign.verdict as { error: unknown }).error).toBe(odd);
  });
});

describe('the time limit of a try', () => {
  test('ends it with a deadline, waits until it has settled, and only then tries again', async () => {
    const signals: AbortSignal[] = [];
    const b = bench({
      request: { ...onFailure, timeout: 50, maxRetries: 1 },
      async run(signal, _number, clock) {
        signals.push(signal);
        await until(signal).catch(() => undefined);
        // Cleaning up takes its time; that it ends well then changes nothing.
        await sleep(clock, 200);
      },
    });
    await b.clock.runUntil(() => b.verdict !== null);
    expect(b.starts).toEqual([0, 350]);
    expect(signals.map((signal) => (signal.reason as TaskAbort).reason)).toEqual(['deadline', 'deadline']);
    expect(b.outcomes).toEqual(['timeout', 'timeout']);
    expect((b.verdict as { error: TaskAbort }).error).toMatchObject({
      reason: 'deadline',
      message: 'after 2 tries (maxRetries 1): try 2 reached its timeout of 50 ms (supervision.timeout)',
    });
    expect(names(b)).toEqual([
      'starting',
      'timed_out',
      'backoff_scheduled',
      'starting',
      'timed_out',
      'finished',
    ]);
    expect(b.events.at(-1)).toMatchObject({ phase: 'timeout', tries: 2 });
    expect(b.counted.filter((line) => line === 'timeout')).toHaveLength(2);
    expect(b.clock.pending).toBe(0);
  });

  test('is not reached by a try that ends just before it', async () => {
    const b = bench({ request: { timeout: 50 }, run: (_signal, _number, clock) => sleep(clock, 49) });
    await b.clock.advance(100);
    expect([b.verdict, b.clock.pending]).toEqual([{ kind: 'completed' }, 0]);
  });

  test('yields to what ended the task before', async () => {
    const b = bench({ request: { timeout: 50 }, run: until });
    b.controller.abort(new TaskAbort('canceled', 'by its requestor'));
    await b.clock.advance(100);
    expect(b.verdict).toMatchObject({ kind: 'aborted', abort: { reason: 'canceled' } });
    expect(b.outcomes).toEqual(['canceled']);
    expect(b.events.at(-1)).toMatchObject({ event: 'finished', phase: 'canceled' });
  });
});

describe('ending a task', () => {
  test.each([
    ['a backoff', onFailure, () => fails()],
    ['an interval', always(10_000), () => Promise.resolve()],
  ] as const)('during %s is at once, without another try', async (_what, request, run) => {
    const b = bench({ request, run });
    await b.clock.advance(50);
    b.controller.abort(new TaskAbort('canceled'));
    await b.clock.advance(0);
    expect(b.verdict).toMatchObject({ kind: 'aborted', abort: { reason: 'canceled' } });
    expect([b.starts, b.clock.pending]).toEqual([[0], 0]);
  });

  test('before its first try makes none', async () => {
    const controller = new AbortController();
    controller.abort(new TaskAbort('lease_lost'));
    const b = bench({ controller });
    await b.clock.advance(0);
    expect([b.starts, b.verdict]).toMatchObject([[], { kind: 'aborted', abort: { reason: 'lease_lost' } }]);
  });

  test('because the node stops cuts pauses short and begins nothing, but lets a try finish', async () => {
    const waiting = bench({ request: onFailure, run: () => fails() });
    await waiting.clock.advance(50);
    waiting.slots.close();
    await waiting.clock.advance(0);
    expect(waiting.verdict).toMatchObject({ kind: 'aborted', abort: { reason: 'shutdown' } });
    const running = bench({ request: always(), run: (_signal, _number, clock) => sleep(clock, 100) });
    await running.clock.advance(50);
    running.slots.close();
    await running.clock.advance(49);
    expect(running.verdict).toBeNull();
    await running.clock.advance(1);
    expect(running.verdict).toMatchObject({ kind: 'aborted', abort: { reason: 'shutdown' } });
    const last = bench({ request: onFailure, run: (_signal, _number, clock) => sleep(clock, 100) });
    await last.clock.advance(50);
    last.slots.close();
    await last.clock.advance(50);
    expect(last.verdict).toEqual({ kind: 'completed' });
  });
});

describe('a lane', () => {
  const scene = () => {
    const clock = new SimulatedClock();
    const slots = new Slots();
    const task = (
      taskId: string,
      admission: 'queue' | 'replace' | 'dropIfRunning',
      more: BenchOptions = {},
    ): Bench =>
      bench({
        clock,
        slots,
        taskId,
        run: (signal) => Promise.race([sleep(clock, 100), until(signal)]),
        ...more,
        request: { slot: 'x', admission, ...more.request },
      });
    return { clock, slots, task };
  };

  test('runs what is queued one after the other', async () => {
    const { clock, task } = scene();
    const all = [task('a', 'queue'), task('b', 'queue'), task('c', 'queue')];
    await clock.advance(300);
    expect(all.map(({ starts }) => starts)).toEqual([[0], [100], [200]]);
    expect(all.map(({ verdict }) => verdict?.kind)).toEqual(['completed', 'completed', 'completed']);
    expect(names(all[1]!)).toEqual(['submitted', 'admitted', 'starting', 'succeeded', 'finished']);
  });

  test('that is taken refuses a task that is to be dropped; it may be tried again', async () => {
    const { clock, task } = scene();
    task('a', 'queue');
    const b = task('b', 'dropIfRunning');
    await clock.advance(0);
    expect(b.starts).toEqual([]);
    expect((b.verdict as { error: MillraceError }).error).toMatchObject({
      code: 'unavailable',
      message: 'slot x is taken by task a, and this task is to be dropped then (dropIfRunning)',
      details: { reason: 'slot_busy' },
    });
    expect(b.counted).toEqual(['submitted', 'rejected slot_busy']);
    expect(names(b)).toEqual(['submitted', 'rejected', 'finished']);
    await clock.advance(100);
  });

  test('whose queue is full refuses, naming the limit', async () => {
    const { clock, task } = scene();
    task('a', 'queue');
    const b = task('b', 'queue', { bounds: { queueLimit: 0 } });
    await clock.advance(0);
    expect((b.verdict as { error: MillraceError }).error).toMatchObject({
      code: 'resource_exhausted',
      details: { reason: 'slot_full', limit: 'queueLimit' },
    });
    await clock.advance(100);
  });

  test('is handed over by replace when the old task has really ended, and that one is not tried again anywhere', async () => {
    const { clock, task } = scene();
    const a = task('a', 'queue', {
      request: onFailure,
      async run(signal) {
        await until(signal).catch(() => undefined);
        await sleep(clock, 70);
      },
    });
    await clock.advance(10);
    const b = task('b', 'replace');
    await clock.advance(69);
    expect([b.starts, a.verdict]).toEqual([[], null]);
    await clock.advance(1);
    expect(b.starts).toEqual([80]);
    expect((a.verdict as { error: MillraceError }).error).toMatchObject({
      code: 'canceled',
      message: 'task b replaces this one in slot x',
      details: { final: true, reason: 'replaced' },
    });
    expect(a.outcomes).toEqual(['canceled']);
    expect(a.events.at(-1)).toMatchObject({ event: 'finished', phase: 'canceled' });
    await clock.advance(100);
    expect(b.verdict).toEqual({ kind: 'completed' });
  });

  test('is kept during pauses, and replace cuts them short', async () => {
    const { clock, task } = scene();
    const a = task('a', 'queue', { request: always(10_000), run: () => Promise.resolve() });
    await clock.advance(500);
    const dropped = task('b', 'dropIfRunning');
    const c = task('c', 'replace');
    await clock.advance(0);
    expect(dropped.verdict).toMatchObject({ error: { details: { reason: 'slot_busy' } } });
    expect(a.verdict).toMatchObject({ kind: 'failed', error: { details: { reason: 'replaced' } } });
    expect(c.starts).toEqual([500]);
    await clock.advance(100);
  });

  test('that a second replace wants refuses the first, which was never run', async () => {
    const { clock, task } = scene();
    const a = task('a', 'queue', { run: (signal) => until(signal).catch(() => sleep(clock, 50)) });
    await clock.advance(0);
    const b = task('b', 'replace');
    const c = task('c', 'replace');
    await clock.advance(50);
    expect(b.starts).toEqual([]);
    expect(b.verdict).toMatchObject({
      kind: 'failed',
      error: { code: 'canceled', details: { final: true } },
    });
    expect([a.verdict?.kind, c.starts]).toEqual(['failed', [50]]);
    await clock.advance(100);
  });

  test('is left by a task that is ended while it waits, and by all when the node stops', async () => {
    const { clock, slots, task } = scene();
    const a = task('a', 'queue');
    const [b, c] = [task('b', 'queue'), task('c', 'queue')];
    b.controller.abort(new TaskAbort('canceled'));
    await clock.advance(0);
    expect(b.verdict).toMatchObject({ kind: 'aborted', abort: { reason: 'canceled' } });
    slots.close();
    await clock.advance(0);
    expect(c.verdict).toMatchObject({ kind: 'aborted', abort: { reason: 'shutdown' } });
    expect(c.counted).toEqual(['submitted', 'rejected shutting_down']);
    await clock.advance(100);
    expect(a.verdict).toEqual({ kind: 'completed' });
  });

  test('is free after its owner was ended from elsewhere', async () => {
    const { clock, task } = scene();
    const a = task('a', 'queue');
    const b = task('b', 'queue');
    a.controller.abort(new TaskAbort('canceled'));
    await clock.advance(0);
    expect(a.verdict).toMatchObject({ kind: 'aborted' });
    expect(b.starts).toEqual([0]);
    await clock.advance(100);
  });
});

describe('events', () => {
  test('carry who, when, a number that rises, and what happened', async () => {
    const error = new MillraceError('internal', 'no luck', { details: { exit_code: 3 } });
    const b = bench({
      request: { ...onFailure, maxRetries: 1 },
      run: async (_signal, number, clock) => {
        await sleep(clock, 20);
        if (number === 1) throw error;
      },
    });
    await b.clock.runUntil(() => b.verdict !== null);
    const start = b.clock.now() - 140;
    const common = { kind: 'supervision', run_id: 'run-1' };
    expect(b.events).toEqual([
      { ...common, event: 'starting', at: start, seq: expect.any(Number) as number, try: 1 },
      {
        ...common,
        event: 'failed',
        at: start + 20,
        seq: expect.any(Number) as number,
        try: 1,
        duration_ms: 20,
        reason: 'no luck',
        exit_code: 3,
      },
      {
        ...common,
        event: 'backoff_scheduled',
        at: start + 20,
        seq: expect.any(Number) as number,
        try: 1,
        delay_ms: 100,
        source: 'failure',
        reason: 'no luck',
      },
      { ...common, event: 'starting', at: start + 120, seq: expect.any(Number) as number, try: 2 },
      {
        ...common,
        event: 'succeeded',
        at: start + 140,
        seq: expect.any(Number) as number,
        try: 2,
        duration_ms: 20,
      },
      {
        ...common,
        event: 'finished',
        at: start + 140,
        seq: expect.any(Number) as number,
        phase: 'succeeded',
        tries: 2,
      },
    ]);
    const numbers = b.events.map(({ seq }) => seq);
    expect(numbers).toEqual(numbers.toSorted((x, y) => x - y));
    expect(new Set(numbers).size).toBe(numbers.length);
    expect(b.log.lines.map(({ message, fields }) => [message, fields?.['event']])).toEqual(
      names(b).map((name) => ['supervision', name]),
    );
  });

  test('change nothing when a listener fails, which is told once and counted each time', async () => {
    const b = bench({
      request: { timeout: 50 },
      emit: () => {
        throw new Error('listener');
      },
    });
    await b.clock.advance(0);
    expect(b.verdict).toEqual({ kind: 'completed' });
    expect(b.counted.filter((line) => line === 'panicked')).toHaveLength(3);
    expect(b.log.lines.filter(({ level }) => level === 'warn')).toHaveLength(1);
  });
});

test.each([
  [new MillraceError('invalid_argument', ''), true],
  [new MillraceError('unimplemented', ''), true],
  [new MillraceError('permission_denied', ''), true],
  [new MillraceError('failed_precondition', ''), true],
  [new MillraceError('not_found', '', { details: { ending: 'spawn_failed' } }), true],
  [new MillraceError('not_found', '', { details: { ending: 'output_missing' } }), false],
  [new MillraceError('unavailable', '', { details: { ending: 'spawn_failed', errno: 'EAGAIN' } }), false],
  [new MillraceError('failed_precondition', '', { retryable: true }), false],
  [new MillraceError('internal', '', { details: { final: true } }), true],
  [new MillraceError('resource_exhausted', ''), false],
  [Object.assign(new Error(''), { retryable: false }), true],
  [new Error(''), false],
  [new TaskAbort('shutdown'), true],
  [new TaskAbort('limit'), false],
  ['text', false],
])('%o is fatal: %s', (error, fatal) => {
  expect(isFatal(error)).toBe(fatal);
});
