import { describe, expect, test } from 'vitest';
import {
  MillraceError,
  TaskAbort,
  defineRunner,
  sleep,
  type InputSource,
  type ArtifactSink,
  type JsonObject,
  type Runner,
  type RunnerType,
  type TaskContext,
  type Tracer,
} from '@millrace/runner';
import { SimulatedClock, seededRandom } from '@millrace/runner/testing';
import type { ArtifactReport, HeartbeatReply, ReceivedLease } from '@millrace/dispatch/client';
import type { TaskOutcome } from './metrics.ts';
import { Roster } from './routing/roster.ts';
import { Session, type SessionEnding, type StorageRequest } from './session.ts';
import { LogShipper } from './task-log.ts';
import {
  ScriptedDms,
  envelope,
  memoryLog,
  never,
  reply,
  wireError,
  type LogLine,
  type Script,
} from './simulation/scripted-dms.ts';

const HELLO = '/examples/hello/v1';
const JOB = {
  task_id: '5b1f3c52-5f0e-4b3e-9b5e-6a1d6c0a7e11',
  job_id: 'c3a1d0c8-8f0e-4d0c-a1c9-3f5f0e2b9d44',
  domain_id: '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21',
  capability: HELLO,
};
const ARTIFACT: ArtifactReport = { logical_path: 'a/b', name: 'a_b', data_type: 'json', id: 'data-1' };
const TTL_MS = 20_000;

interface Bench {
  readonly clock: SimulatedClock;
  readonly dms: ScriptedDms;
  readonly session: Session;
  readonly log: { readonly lines: LogLine[] };
  readonly storage: { opened: StorageRequest | null; closed: number; folderRemoved: number };
  readonly outcomes: (TaskOutcome | 'started')[];
  /** Runner type and kind. */
  readonly errors: string[];
  readonly bytes: (readonly [number, number])[];
  /** What the node does when it gives up on a session. */
  abandon(): void;
  ending: SessionEnding | null;
  /** Starts the session and lets everything happen that needs no time. */
  begin(): Promise<void>;
}

interface BenchOptions {
  readonly script?: Script;
  readonly run?: Runner['run'];
  readonly type?: RunnerType;
  /** The dispatcher takes usage in endings, and the storage counts. */
  readonly usage?: boolean;
  /** The dispatcher keeps logs. */
  readonly logs?: boolean;
  readonly tracer?: Tracer;
  readonly runners?: readonly Runner[];
  readonly lease?: JsonObject;
  readonly task?: JsonObject;
  /** Our own dispatcher: lease ids, release, and no first heartbeat. */
  readonly ours?: boolean;
  readonly artifacts?: readonly ArtifactReport[];
  readonly taskWallMs?: number;
  readonly contactGraceMs?: number;
  readonly openStorage?: () => never;
}

function bench(options: BenchOptions = {}): Bench {
  const { ours = false, artifacts = [ARTIFACT] } = options;
  const clock = new SimulatedClock();
  const expiry = (): string => new Date(clock.now() + TTL_MS).toISOString();
  const features = {
    ...(ours && { leaseIds: true, startOnLease: true }),
    endingUsage: options.usage ?? false,
  };
  const dms = new ScriptedDms(clock, {
    heartbeat: () => reply({ lease_expires_at: expiry() }),
    ...options.script,
    features,
  });
  const log = memoryLog();
  const storage: Bench['storage'] = { opened: null, closed: 0, folderRemoved: 0 };
  const outcomes: Bench['outcomes'] = [];
  const errors: string[] = [];
  const bytes: Bench['bytes'] = [];
  const abandoned = new AbortController();
  const runner = defineRunner({
    capability: HELLO,
    run: options.run ?? (() => Promise.resolve()),
    ...(options.type !== undefined && { type: options.type }),
  });
  const received: ReceivedLease = {
    leaseId: ours ? 'lease-1' : null,
    envelope: envelope(
      { lease_expires_at: expiry(), ...(ours ? { status: 'running' } : {}), ...options.lease },
      options.task,
    ),
  };
  const session = new Session(received, {
    dms,
    features: {
      longPollSecs: 0,
      batchItems: 0,
      leaseIds: ours,
      startOnLease: ours,
      endingUsage: options.usage ?? false,
      registrationIntervalSecs: null,
    },
    router: new Roster(options.runners ?? [runner]),
    openStorage(request) {
      options.openStorage?.();
      storage.opened = request;
      return {
        input: {} as InputSource,
        output: {} as ArtifactSink,
        artifacts: () => artifacts,
        ...(options.usage && { transferred: () => ({ bytesIn: 7, bytesOut: 11 }) }),
        close: () => Promise.resolve(void (storage.closed += 1)),
      };
    },
    workspace: {
      taskFolder: (id) => ({
        path: `/nowhere/${id}`,
        create: () => Promise.resolve(`/nowhere/${id}`),
        remove: () => Promise.resolve(void (storage.folderRemoved += 1)),
      }),
    },
    metrics: {
      recordTaskStarted: () => void outcomes.push('started'),
      recordTaskCompleted: (_runner, outcome) => void outcomes.push(outcome),
      recordRunnerError: (runner, kind) => void errors.push(`${runner} ${kind}`),
      recordTaskBytes: (bytesIn, bytesOut) => void bytes.push([bytesIn, bytesOut]),
    },
    ...(options.logs && {
      logs: new LogShipper({
        dms,
        maxBytes: 1 << 20,
        batchItems: 16,
        requestTimeoutMs: 60_000,
        clock,
        random: seededRandom(2),
        log,
      }),
    }),
    ...(options.tracer !== undefined && { tracer: options.tracer }),
    heartbeat: {
      minRatio: 0.25,
      maxRatio: 0.35,
      coalesceMs: 250,
      requestTimeoutMs: 60_000,
      contactGraceMs: options.contactGraceMs ?? 0,
    },
    taskWallMs: options.taskWallMs ?? 86_400_000,
    clock,
    random: seededRandom(7),
    log,
    abandoned: abandoned.signal,
  });
  const self: Bench = {
    clock,
    dms,
    session,
    log,
    storage,
    outcomes,
    errors,
    bytes,
    abandon() {
      session.abort(new TaskAbort('shutdown'));
      abandoned.abort();
    },
    ending: null,
    async begin() {
      void session.run().then((ending) => (self.ending = ending));
      await clock.advance(0);
    },
  };
  return self;
}

/** Names of the calls, heartbeats left out. */
const reports = (dms: ScriptedDms): string[] =>
  dms.calls.filter(({ name }) => name !== 'heartbeat').map(({ name }) => name);

/** A runner body that ends when its signal does, the way a good one does. */
const untilAborted = (ctx: TaskContext): Promise<void> =>
  new Promise((_, reject) => {
    ctx.signal.addEventListener('abort', () => reject(ctx.signal.reason as Error), { once: true });
  });

const forever = (): Promise<void> => new Promise(() => undefined);

function expectTidy({ clock, session, storage }: Bench): void {
  expect(session.state).toBe('ended');
  expect(storage.folderRemoved).toBe(1);
  expect(storage.closed).toBe(storage.opened === null ? 0 : 1);
  expect(clock.pending).toBe(0);
}

describe('a session that goes well', () => {
  test('sends one heartbeat, runs the runner, and completes with what was uploaded', async () => {
    const b = bench({ artifacts: [ARTIFACT, { ...ARTIFACT, logical_path: 'c', id: null }] });
    await b.begin();
    expect(b.dms.calls).toEqual([
      expect.objectContaining({ name: 'heartbeat', body: { progress: {}, events: [] } }),
      {
        name: 'complete',
        lease: { taskId: JOB.task_id, leaseId: null },
        body: {
          output_cids: ['data-1'],
          meta: { job: JOB, artifacts: [ARTIFACT, { ...ARTIFACT, logical_path: 'c', id: null }] },
        },
      },
    ]);
    expect(b.ending).toEqual({ kind: 'completed', delivery: 'accepted' });
    expect(b.outcomes).toEqual(['started', 'success']);
    expectTidy(b);
  });

  test('is followed in the log by who it is: each line names task, job, capability, lease and attempt', async () => {
    const b = bench({
      ours: true,
      task: { attempts: 2 },
      run: (ctx) => sleep(b.clock, 1_500, ctx.signal),
    });
    await b.begin();
    await b.clock.advance(1_500);
    const span = { ...JOB, lease_id: 'lease-1', attempt: 2 };
    const { domain_id: _domain, ...identity } = span;
    expect(b.log.lines).toEqual([
      {
        level: 'debug',
        message: 'task started',
        fields: {
          ...identity,
          run_id: expect.stringMatching(/^examples-hello-v1-5b1f3c52-.*-\d+$/) as string,
        },
      },
      {
        level: 'info',
        message: 'task ended',
        fields: { ...identity, ending: 'completed', delivery: 'accepted', duration_ms: 1_500 },
      },
    ]);
  });

  test('enters the runner before run returns, without a heartbeat, when the lease started the task', () => {
    let entered = false;
    const b = bench({
      ours: true,
      run: () => {
        entered = true;
        return forever();
      },
    });
    void b.session.run();
    expect(entered).toBe(true);
    expect(b.dms.calls).toEqual([]);
  });

  test('sends the first heartbeat to our dispatcher too when the task is not running yet', async () => {
    const b = bench({ ours: true, lease: { status: 'leased' } });
    await b.begin();
    expect(b.dms.calls.map(({ name }) => name)).toEqual(['heartbeat', 'complete']);
  });

  test('delivers the last progress and events before the ending, with no pause', async () => {
    const b = bench({
      run: async (ctx) => {
        await ctx.ctrl.progress({ pct: 100 });
        await ctx.ctrl.logEvent({ bye: true });
      },
    });
    await b.begin();
    expect(b.dms.calls.map(({ name }) => name)).toEqual(['heartbeat', 'heartbeat', 'complete']);
    expect(b.dms.of('heartbeat')[1]?.body).toEqual({ progress: { pct: 100 }, events: [{ bye: true }] });
    expect(b.clock.monotonic()).toBe(0);
  });

  test('merges the first answer into the lease, and follows token and domain from later ones', async () => {
    const answers: Partial<HeartbeatReply>[] = [
      { access_token: 'token-2', attempts: 2, status: 'running' },
      { access_token: 'token-3', domain_server_url: 'http://127.0.0.1:9999', attempts: 9 },
    ];
    let seen: TaskContext | null = null;
    const b = bench({
      script: { heartbeat: () => reply(answers.shift() ?? {}) },
      run: async (ctx) => {
        seen = ctx;
        await untilAborted(ctx);
      },
    });
    await b.begin();
    expect(seen!.lease).toMatchObject({ access_token: 'token-2', status: 'running', task: { attempts: 2 } });
    expect(seen!.accessToken.get()).toBe('token-2');
    await b.clock.advance(7_000);
    expect(seen!.accessToken.get()).toBe('token-3');
    expect(b.storage.opened!.token()).toBe('token-3');
    expect(b.storage.opened!.domain()).toEqual({ id: JOB.domain_id, serverUrl: 'http://127.0.0.1:9999' });
    expect(seen!.lease).toMatchObject({ access_token: 'token-2', task: { attempts: 2 } });
    b.abandon();
    await b.clock.advance(0);
  });

  test('a fresh token can be had before the timer', async () => {
    let count = 0;
    const b = bench({
      script: { heartbeat: () => reply({ access_token: `token-${(count += 1)}` }) },
      run: async () => {
        expect(b.storage.opened!.token()).toBe('token-1');
        await b.storage.opened!.refreshToken();
        expect(b.storage.opened!.token()).toBe('token-2');
      },
    });
    await b.begin();
    expect(b.ending?.kind).toBe('completed');
    expect(b.clock.monotonic()).toBe(0);
  });

  describe('where the dispatcher keeps logs', () => {
    const linesOf = (b: Bench): unknown[] =>
      b.dms
        .of('appendLogs')
        .flatMap(({ pieces }) => pieces)
        .flatMap(({ lines }) => lines.trimEnd().split('\n'))
        .map((line) => {
          const { at, ...rest } = JSON.parse(line) as { readonly at: string };
          expect(at).toMatch(/^\d{4}-.*Z$/);
          return rest;
        });

    test('lines go there, before the ending and with no pause; events go there and with the heartbeat', async () => {
      const b = bench({
        ours: true,
        logs: true,
        run: async (ctx) => {
          ctx.log.child({ part: 3 }).warn('odd pixel', { x: 1 });
          await ctx.ctrl.logEvent({ kind: 'frame' });
          ctx.log.info('printed', { stream: 'stdout' });
        },
      });
      await b.begin();
      expect(b.dms.calls.map(({ name }) => name).toSorted()).toEqual(['appendLogs', 'complete', 'heartbeat']);
      expect(b.dms.calls.at(-1)?.name).toBe('complete');
      expect(b.clock.monotonic()).toBe(0);
      expect(linesOf(b)).toEqual([
        { level: 'warn', text: 'odd pixel', fields: { part: 3, x: 1 } },
        { event: { kind: 'frame' } },
        { stream: 'stdout', text: 'printed' },
      ]);
      expect(b.dms.of('heartbeat')[0]?.body).toEqual({
        progress: null,
        events: [{ kind: 'frame' }],
        logged: true,
      });
    });

    test('a task that says nothing costs nothing', async () => {
      const b = bench({ ours: true, logs: true });
      await b.begin();
      expect(b.dms.calls.map(({ name }) => name)).toEqual(['complete']);
    });

    test('lines are shipped while the work runs, and a dispatcher that does not take them delays no heartbeat', async () => {
      const b = bench({
        ours: true,
        logs: true,
        script: { appendLogs: (_pieces, signal) => never(signal) },
        run: async (ctx) => {
          for (let i = 0; i < 5_000; i += 1) ctx.log.info(`${i} ${'x'.repeat(1000)}`);
          await untilAborted(ctx);
        },
      });
      await b.begin();
      await b.clock.advance(40_000);
      expect(b.dms.of('appendLogs')).toHaveLength(1);
      const beats = b.dms.of('heartbeat').length;
      expect(beats).toBeGreaterThanOrEqual(5);
      b.session.abort(new TaskAbort('canceled', 'enough'));
      // The last words have their limit, then the ending is reported all the same.
      await b.clock.advance(8_000);
      expect(b.ending).toEqual({ kind: 'canceled', delivery: 'accepted' });
      expect(b.log.lines.map(({ message }) => message)).toContain('the end of the log was not delivered');
    });

    test('a lost lease says nothing more', async () => {
      const b = bench({
        ours: true,
        logs: true,
        run: async (ctx) => {
          await untilAborted(ctx).catch(() => undefined);
          ctx.log.info('good bye');
        },
      });
      await b.begin();
      b.session.abort(new TaskAbort('lease_lost', 'gone'));
      await b.clock.advance(10_000);
      expect(b.ending?.kind).toBe('lease_lost');
      expect(b.dms.of('appendLogs')).toEqual([]);
      expect(b.clock.pending).toBe(0);
    });
  });

  test('lines of the task log are events of the task and debug lines of the node', async () => {
    const b = bench({
      run: async (ctx) => {
        ctx.log.child({ part: 3 }).warn('odd pixel', { x: 1, level: 'mine', message: 'mine' });
        await Promise.resolve();
      },
    });
    await b.begin();
    expect(b.dms.of('heartbeat')[1]?.body.events).toEqual([
      { level: 'warn', message: 'odd pixel', part: 3, x: 1 },
    ]);
    expect(b.log.lines).toContainEqual({
      level: 'debug',
      message: 'odd pixel',
      fields: expect.objectContaining({ part: 3, x: 1, task_id: JOB.task_id, task_log_level: 'warn' }),
    });
  });

  test('what the runner keeps of its context refuses to work afterwards, and no rejection goes unhandled', async () => {
    let kept: TaskContext | null = null;
    const b = bench({
      run: async (ctx) => {
        kept = ctx;
        await Promise.resolve();
      },
    });
    await b.begin();
    expect(Object.isFrozen(kept)).toBe(true);
    void kept!.ctrl.progress(1);
    await expect(kept!.ctrl.logEvent(1)).rejects.toMatchObject({ code: 'failed_precondition' });
    kept!.log.info('too late');
    expect(b.dms.of('heartbeat')).toHaveLength(1);
  });
});

describe('a runner that fails', () => {
  test('is reported with the chain of causes and what it had uploaded', async () => {
    const b = bench({
      run: () => Promise.reject(new Error('convert failed', { cause: new Error('exit status 1') })),
    });
    await b.begin();
    expect(b.dms.of('fail').map(({ body }) => body)).toEqual([
      {
        reason: 'runner failed: convert failed: exit status 1',
        details: { job: JOB, artifacts: [ARTIFACT] },
      },
    ]);
    expect(b.ending).toEqual({ kind: 'failed', delivery: 'accepted' });
    expect(b.outcomes).toEqual(['started', 'failure']);
    expectTidy(b);
  });

  test('by throwing before its first await is no different', async () => {
    const b = bench({
      run: () => {
        throw new Error('at once');
      },
    });
    await b.begin();
    expect(b.dms.of('fail')[0]?.body.reason).toBe('runner failed: at once');
    expectTidy(b);
  });

  test('has a reason of at most 4096 bytes', async () => {
    for (const [length, whole] of [
      [4096 - 'runner failed: '.length, true],
      [4096 - 'runner failed: '.length + 1, false],
    ] as const) {
      const b = bench({ run: () => Promise.reject(new Error('x'.repeat(length))) });
      await b.begin();
      const reason = b.dms.of('fail')[0]?.body.reason ?? '';
      expect(Buffer.byteLength(reason)).toBeLessThanOrEqual(4096);
      expect(reason.endsWith('x')).toBe(whole);
    }
  });

  test.each([
    ['invalid_argument', new MillraceError('invalid_argument', 'bad'), true],
    ['unimplemented', new MillraceError('unimplemented', 'bad'), true],
    ['a plain error that says so', Object.assign(new Error('bad'), { retryable: false }), true],
    ['unavailable', new MillraceError('unavailable', 'bad'), false],
    ['resource_exhausted', new MillraceError('resource_exhausted', 'bad'), false],
    ['a plain error', new Error('bad'), false],
    ['no error at all', undefined, false],
  ])('with %s: no further attempt is %j', async (_what, error, final) => {
    const b = bench({ run: () => Promise.reject(error) });
    await b.begin();
    const details = b.dms.of('fail')[0]?.body.details as JsonObject;
    expect(details['retryable']).toBe(final ? false : undefined);
    expect(Object.keys(details)).toEqual(final ? ['job', 'artifacts', 'retryable'] : ['job', 'artifacts']);
  });

  test('at its wall time limit fails with the limit named, one before does not', async () => {
    const b = bench({ taskWallMs: 5_000, run: untilAborted });
    await b.begin();
    await b.clock.advance(4_999);
    expect(b.ending).toBeNull();
    await b.clock.advance(1);
    expect(b.dms.of('fail')[0]?.body.reason).toBe(
      'runner failed: wall time limit of 5000 ms (taskWallMs) reached',
    );
    expect(b.outcomes).toEqual(['started', 'timeout']);
    expectTidy(b);
  });
});

describe('setup that fails', () => {
  const failed = (b: Bench): unknown => b.dms.of('fail').map(({ body }) => body);

  test('for a capability that is none of ours', async () => {
    const b = bench({ task: { capability: '/other/v1' } });
    await b.begin();
    expect(failed(b)).toEqual([
      {
        reason: 'node_setup_failed',
        details: {
          stage: 'start_session',
          error: `failed to initialise session: task capability /other/v1 not in configured set [${HELLO}]`,
        },
      },
    ]);
    expect(b.ending).toEqual({ kind: 'setup_failed', delivery: 'accepted' });
    expect(b.outcomes).toEqual([]);
    expectTidy(b);
  });

  test.each([400, 403, 404, 409, 410])('for a first heartbeat answered %i', async (status) => {
    const b = bench({ script: { heartbeat: () => Promise.reject(wireError(status)) } });
    await b.begin();
    await b.clock.advance(TTL_MS);
    expect(failed(b)).toEqual([
      { reason: 'node_setup_failed', details: { stage: 'initial_heartbeat', error: `status ${status}` } },
    ]);
    expectTidy(b);
  });

  test('for a first heartbeat that has trouble until the deadline, and only then', async () => {
    const b = bench({ script: { heartbeat: () => Promise.reject(wireError(500)) } });
    await b.begin();
    await b.clock.advance(TTL_MS - 1);
    expect(reports(b.dms)).toEqual([]);
    await b.clock.advance(1);
    expect(reports(b.dms)).toEqual(['fail']);
    expectTidy(b);
  });

  test.each(['domain_server_url', 'domain_id'])('for a lease without %s', async (member) => {
    const b = bench({ lease: { [member]: null } });
    await b.begin();
    expect(failed(b)).toEqual([
      { reason: 'node_setup_failed', details: { stage: 'build_ports', error: `lease missing ${member}` } },
    ]);
    expectTidy(b);
  });

  test('for storage that cannot be opened', async () => {
    const b = bench({
      openStorage: () => {
        throw new Error('disk full');
      },
    });
    await b.begin();
    expect(failed(b)).toEqual([
      { reason: 'node_setup_failed', details: { stage: 'build_ports', error: 'disk full' } },
    ]);
    expectTidy(b);
  });

  test('a capability changed by the first heartbeat to one that is none of ours fails the task itself', async () => {
    const task = envelope({}, { capability: '/other/v1' }).task;
    const b = bench({ script: { heartbeat: () => reply({ task }) } });
    await b.begin();
    expect(failed(b)).toEqual([
      {
        reason: 'no runner registered for capability: /other/v1',
        details: { job: { ...JOB, capability: '/other/v1' }, artifacts: [] },
      },
    ]);
    expectTidy(b);
  });

  test('a first heartbeat that comes through on a later try costs nothing', async () => {
    let count = 0;
    const b = bench({
      script: { heartbeat: () => ((count += 1) < 4 ? Promise.reject(wireError(503)) : reply()) },
    });
    await b.begin();
    await b.clock.advance(5_000);
    expect(b.ending).toEqual({ kind: 'completed', delivery: 'accepted' });
  });
});

describe('cancel', () => {
  test('a lease that is cancelled already is given back unopened, or left alone where there is no release', async () => {
    for (const ours of [true, false]) {
      const b = bench({ ours, lease: { cancel: true } });
      await b.begin();
      expect(b.dms.calls.map(({ name }) => name)).toEqual(ours ? ['release'] : []);
      expect(b.ending?.kind).toBe('skipped');
      expect(b.outcomes).toEqual([]);
      expectTidy(b);
    }
  });

  test('in the first answer keeps the runner from being entered', async () => {
    const b = bench({ script: { heartbeat: () => reply({ cancel: true }) } });
    await b.begin();
    expect(b.outcomes).toEqual([]);
    expect(b.dms.calls.map(({ name }) => name)).toEqual(['heartbeat']);
    expect(b.ending?.kind).toBe('skipped');
    expectTidy(b);
  });

  const cancelAfter = (ms: number, clock: () => SimulatedClock): Script => ({
    heartbeat: () =>
      reply({
        cancel: clock().monotonic() >= ms,
        lease_expires_at: new Date(clock().now() + TTL_MS).toISOString(),
      }),
  });

  test('is released when the work is gone, not before, and the lease lives until then', async () => {
    const b: Bench = bench({
      ours: true,
      script: cancelAfter(1, () => b.clock),
      run: (ctx) =>
        new Promise((_, reject) => {
          ctx.signal.addEventListener('abort', () =>
            b.clock.setTimer(() => reject(new Error('gone')), 50_000),
          );
        }),
    });
    await b.begin();
    await b.clock.advance(7_000);
    expect(b.session.state).toBe('stopping');
    const before = b.dms.of('heartbeat').length;
    await b.clock.advance(42_000);
    expect(b.dms.of('heartbeat').length).toBeGreaterThan(before + 4);
    expect(reports(b.dms)).toEqual([]);
    await b.clock.advance(8_000);
    expect(b.dms.of('release').map(({ reason }) => reason)).toEqual(['canceled']);
    expect(b.ending).toEqual({ kind: 'canceled', delivery: 'accepted' });
    expect(b.outcomes).toEqual(['started', 'canceled']);
    expectTidy(b);
  });

  test('is not reported to a server without release', async () => {
    const b: Bench = bench({ script: cancelAfter(1, () => b.clock), run: untilAborted });
    await b.begin();
    await b.clock.advance(7_000);
    expect(reports(b.dms)).toEqual([]);
    expect(b.ending).toEqual({ kind: 'canceled', delivery: null });
    expectTidy(b);
  });

  test('wins over a runner that succeeds after it', async () => {
    const b: Bench = bench({
      ours: true,
      script: cancelAfter(1, () => b.clock),
      run: (ctx) => new Promise((resolve) => ctx.signal.addEventListener('abort', () => resolve())),
    });
    await b.begin();
    await b.clock.advance(7_000);
    expect(reports(b.dms)).toEqual(['release']);
    expectTidy(b);
  });

  test('that comes after the runner succeeded leaves it a completion', async () => {
    const b = bench({
      ours: true,
      script: { heartbeat: () => reply({ cancel: true }) },
      run: async (ctx) => {
        await ctx.ctrl.progress(100);
      },
    });
    await b.begin();
    expect(b.dms.calls.map(({ name }) => name)).toEqual(['heartbeat', 'complete']);
    expect(b.outcomes).toEqual(['started', 'success']);
  });

  test('is learned at once when the session is told to check', async () => {
    const b: Bench = bench({ ours: true, script: cancelAfter(100, () => b.clock), run: untilAborted });
    await b.begin();
    await b.clock.advance(100);
    void b.session.check();
    await b.clock.advance(0);
    expect(reports(b.dms)).toEqual(['release']);
  });
});

describe('a lease that is lost', () => {
  test.each([404, 409])('by an answer %i ends the work, and nothing is reported', async (status) => {
    let count = 0;
    const b = bench({
      ours: true,
      lease: { status: 'leased' },
      script: { heartbeat: () => ((count += 1) === 1 ? reply() : Promise.reject(wireError(status))) },
      run: untilAborted,
    });
    await b.begin();
    await b.clock.advance(7_000);
    expect(reports(b.dms)).toEqual([]);
    expect(b.ending).toEqual({ kind: 'lease_lost', delivery: null });
    expect(b.outcomes).toEqual(['started', 'canceled']);
    expectTidy(b);
  });

  test('at its deadline ends the work, and nothing is reported', async () => {
    const b = bench({
      ours: true,
      script: { heartbeat: () => Promise.reject(wireError(503)) },
      run: untilAborted,
    });
    await b.begin();
    await b.clock.advance(TTL_MS - 1);
    expect(b.session.state).toBe('running');
    await b.clock.advance(1);
    expect(b.ending).toEqual({ kind: 'lease_lost', delivery: null });
    expect(reports(b.dms)).toEqual([]);
    expectTidy(b);
  });

  test('is not lost at its deadline while the dispatcher cannot be reached, if work may go on for longer', async () => {
    const b: Bench = bench({
      ours: true,
      contactGraceMs: 60_000,
      script: {
        heartbeat: () =>
          b.clock.monotonic() < TTL_MS + 50_000
            ? Promise.reject(wireError(503))
            : reply({ lease_expires_at: new Date(b.clock.now() + TTL_MS).toISOString() }),
      },
      run: async (ctx) => {
        await sleep(b.clock, TTL_MS + 55_000, ctx.signal);
      },
    });
    await b.begin();
    await b.clock.advance(TTL_MS + 55_001);
    expect(b.ending).toEqual({ kind: 'completed', delivery: 'accepted' });
    expectTidy(b);
  });

  test('while the last words are sent drops the result', async () => {
    const b = bench({
      ours: true,
      script: { heartbeat: () => Promise.reject(wireError(409)) },
      run: async (ctx) => {
        await ctx.ctrl.progress(1);
      },
    });
    await b.begin();
    expect(reports(b.dms)).toEqual([]);
    expect(b.ending).toEqual({ kind: 'lease_lost', delivery: null });
    expectTidy(b);
  });
});

describe('a report', () => {
  test('is sent again until it arrives, and heartbeats keep the lease meanwhile', async () => {
    const b: Bench = bench({
      script: {
        complete: () => (b.clock.monotonic() < 60_000 ? Promise.reject(wireError(500)) : undefined),
      },
    });
    await b.begin();
    await b.clock.advance(66_000);
    expect(b.ending).toEqual({ kind: 'completed', delivery: 'accepted' });
    expect(b.dms.of('complete').length).toBeGreaterThan(5);
    expect(b.dms.of('heartbeat').length).toBeGreaterThan(8);
    expectTidy(b);
  });

  test('is given up at the deadline of a lease that cannot be kept', async () => {
    const b: Bench = bench({
      ours: true,
      script: {
        complete: () => Promise.reject(wireError(500)),
        heartbeat: () => Promise.reject(wireError(500)),
      },
    });
    await b.begin();
    await b.clock.advance(TTL_MS - 5_001);
    expect(b.ending).toBeNull();
    await b.clock.advance(5_001);
    expect(b.ending).toEqual({ kind: 'completed', delivery: 'unsent' });
    expectTidy(b);
  });

  test('is tried past the deadline while the dispatcher cannot be reached, after what the task still said', async () => {
    const back = TTL_MS + 100_000;
    const b: Bench = bench({
      ours: true,
      contactGraceMs: 120_000,
      script: {
        complete: () => (b.clock.monotonic() < back ? Promise.reject(wireError(503)) : undefined),
        heartbeat: () =>
          b.clock.monotonic() < back
            ? Promise.reject(wireError(503))
            : reply({ lease_expires_at: new Date(b.clock.now() + TTL_MS).toISOString() }),
      },
      run: async (ctx) => {
        await sleep(b.clock, TTL_MS + 60_000, ctx.signal);
        await ctx.ctrl.progress('all done');
      },
    });
    await b.begin();
    await b.clock.advance(back);
    expect(b.ending).toBeNull();
    await b.clock.advance(10_000);
    expect(b.ending).toEqual({ kind: 'completed', delivery: 'accepted' });
    expectTidy(b);
  });

  test('is given up when the dispatcher has been out of reach for longer than work goes on', async () => {
    const b: Bench = bench({
      ours: true,
      contactGraceMs: 60_000,
      script: {
        complete: () => Promise.reject(wireError(503)),
        heartbeat: () => Promise.reject(wireError(503)),
      },
    });
    await b.begin();
    await b.clock.advance(TTL_MS + 60_000 - 5_001);
    expect(b.ending).toBeNull();
    await b.clock.advance(5_001);
    expect(b.ending).toEqual({ kind: 'completed', delivery: 'unsent' });
    expectTidy(b);
  });

  test('of what is given back is not tried past the deadline: there is nothing left to give', async () => {
    const b: Bench = bench({
      ours: true,
      contactGraceMs: 600_000,
      script: {
        release: () => Promise.reject(wireError(503)),
        heartbeat: () => Promise.reject(wireError(503)),
      },
      run: untilAborted,
    });
    await b.begin();
    b.session.abort(new TaskAbort('shutdown', 'stopping'));
    await b.clock.advance(TTL_MS);
    expect(b.ending).toEqual({ kind: 'released', delivery: 'unsent' });
  });

  test.each([404, 409, 410])('answered %i is the last thing sent', async (status) => {
    const b = bench({ script: { complete: () => Promise.reject(wireError(status)) } });
    await b.begin();
    await b.clock.advance(60_000);
    expect(b.dms.calls.map(({ name }) => name)).toEqual(['heartbeat', 'complete']);
    expect(b.ending).toEqual({ kind: 'completed', delivery: 'refused' });
    expectTidy(b);
  });

  test('whose body is refused becomes a failure that says so', async () => {
    const b = bench({ script: { complete: () => Promise.reject(wireError(413)) } });
    await b.begin();
    expect(b.dms.of('fail')[0]?.body).toEqual({
      reason: 'completion refused by the dispatcher: status 413',
      details: { job: JOB, artifacts: [] },
    });
    expectTidy(b);
  });

  test('waits as long as the server asks', async () => {
    let count = 0;
    const b = bench({
      script: {
        complete: () =>
          (count += 1) === 1 ? Promise.reject(wireError(429, { retry_after_ms: 7_000 })) : undefined,
      },
    });
    await b.begin();
    await b.clock.advance(6_999);
    expect(count).toBe(1);
    await b.clock.advance(1);
    expect(count).toBe(2);
    expect(b.ending?.delivery).toBe('accepted');
  });

  test('is not held up by events that cannot be delivered', async () => {
    const b = bench({
      ours: true,
      script: { heartbeat: () => Promise.reject(wireError(500)) },
      run: async (ctx) => {
        await ctx.ctrl.logEvent('never arrives');
      },
    });
    await b.begin();
    await b.clock.advance(5_000);
    expect(b.ending).toEqual({ kind: 'completed', delivery: 'accepted' });
    expect(b.log.lines).toContainEqual(expect.objectContaining({ message: 'events were not delivered' }));
    expectTidy(b);
  });
});

describe('stopping', () => {
  const shutdown = (): TaskAbort => new TaskAbort('shutdown');

  test('a task gives it back, so that the attempt does not count', async () => {
    const b = bench({ ours: true, run: untilAborted });
    await b.begin();
    b.session.abort(shutdown());
    await b.clock.advance(0);
    expect(b.dms.of('release').map(({ reason }) => reason)).toEqual(['shutdown']);
    expect(b.ending).toEqual({ kind: 'released', delivery: 'accepted' });
    expectTidy(b);
  });

  test('a task without release fails nothing and says why', async () => {
    const b = bench({ run: untilAborted });
    await b.begin();
    b.session.abort(shutdown());
    await b.clock.advance(0);
    expect(reports(b.dms)).toEqual([]);
    expect(b.ending).toEqual({ kind: 'released', delivery: null });
    expect(b.log.lines.at(-1)?.fields['note']).toMatch(/no release/);
    expectTidy(b);
  });

  test('before the runner was entered gives the lease back', async () => {
    const b = bench({
      ours: true,
      lease: { status: 'leased' },
      script: {
        heartbeat: (_body, signal) =>
          new Promise((_, reject) => signal.addEventListener('abort', () => reject(signal.reason as Error))),
      },
    });
    await b.begin();
    expect(b.session.state).toBe('starting');
    b.session.abort(shutdown());
    await b.clock.advance(0);
    expect(b.dms.of('release').map(({ reason }) => reason)).toEqual(['shutdown']);
    expect(b.outcomes).toEqual([]);
    expectTidy(b);
  });

  test('a runner that does not settle keeps its slot and is complained about every minute', async () => {
    const b = bench({ ours: true, run: forever });
    await b.begin();
    b.session.abort(shutdown());
    await b.clock.advance(180_000);
    expect(b.ending).toBeNull();
    expect(b.session.state).toBe('stopping');
    expect(reports(b.dms)).toEqual([]);
    const complaints = b.log.lines.filter(({ level }) => level === 'error');
    expect(complaints.map(({ fields }) => fields['stopping_ms'])).toEqual([60_000, 120_000, 180_000]);
    b.abandon();
    await b.clock.advance(0);
    expect(b.ending).toEqual({ kind: 'abandoned', delivery: null });
    expect(reports(b.dms)).toEqual([]);
    expect(b.outcomes).toEqual(['started', 'canceled']);
    expectTidy(b);
  });

  test('the first reason wins', async () => {
    const b = bench({ ours: true, run: untilAborted });
    await b.begin();
    b.session.abort(new TaskAbort('canceled'));
    b.session.abort(shutdown());
    await b.clock.advance(0);
    expect(b.dms.of('release').map(({ reason }) => reason)).toEqual(['canceled']);
  });

  test('does not touch a report under way', async () => {
    let count = 0;
    const b = bench({
      ours: true,
      script: { complete: () => ((count += 1) < 3 ? Promise.reject(wireError(500)) : undefined) },
    });
    await b.begin();
    b.session.abort(shutdown());
    await b.clock.advance(5_000);
    expect(b.ending).toEqual({ kind: 'completed', delivery: 'accepted' });
    expect(reports(b.dms)).toEqual(['complete', 'complete', 'complete']);
  });
});

test('a session that breaks lets its lease lapse and tidies up', async () => {
  const b = bench({
    ours: true,
    artifacts: null as unknown as ArtifactReport[],
  });
  await b.begin();
  expect(b.ending).toEqual({ kind: 'abandoned', delivery: null });
  expect(reports(b.dms)).toEqual([]);
  expect(
    b.log.lines.some(({ level, message }) => level === 'error' && message.startsWith('session broke')),
  ).toBe(true);
  expectTidy(b);
});

const SUBPROCESS_USAGE = {
  peak_memory_bytes: 4096,
  cpu_ms: 12,
  wall_ms: 1,
  bytes_in: 1,
  bytes_out: 1,
  exit_code: 0,
  signal: null,
  sandbox: { asked: { tier: 'auto' }, applied: { tier: 'limits' }, missing: ['network'] },
};
const REPORTED = { peak_memory_bytes: 4096, cpu_ms: 12, sandbox: SUBPROCESS_USAGE.sandbox };

describe('what an attempt used', () => {
  const tellAndWait =
    (clock: () => SimulatedClock, ms: number): Runner['run'] =>
    async (ctx) => {
      await ctx.ctrl.usage!(SUBPROCESS_USAGE);
      await sleep(clock(), ms, ctx.signal);
    };

  test('is in the completion, told by the runner and measured by the node, and costs no heartbeat', async () => {
    const b: Bench = bench({
      ours: true,
      usage: true,
      type: 'subprocess',
      run: tellAndWait(() => b.clock, 20),
    });
    await b.begin();
    await b.clock.advance(20);
    expect(b.dms.calls.map(({ name }) => name)).toEqual(['complete']);
    expect(b.dms.of('complete')[0]?.body.meta).toEqual({
      job: JOB,
      artifacts: [ARTIFACT],
      usage: {
        ...REPORTED,
        wall_ms: 20,
        bytes_in: 7,
        bytes_out: 11,
        exit_code: 0,
        ending: 'completed',
      },
    });
    expect(b.bytes).toEqual([[7, 11]]);
  });

  test('is an event to a server that does not take it in endings, and only from programs', async () => {
    for (const [type, events] of [
      ['subprocess', [{ kind: 'usage', ...SUBPROCESS_USAGE }]],
      ['container', [{ kind: 'usage', ...SUBPROCESS_USAGE }]],
      ['embedded', undefined],
      ['wasm', undefined],
    ] as const) {
      const b: Bench = bench({ type, run: (ctx) => ctx.ctrl.usage!(SUBPROCESS_USAGE) });
      await b.begin();
      expect(b.dms.of('heartbeat')[1]?.body.events).toEqual(events);
      expect(b.dms.of('complete')[0]?.body.meta).toEqual({ job: JOB, artifacts: [ARTIFACT] });
    }
  });

  test('is in the failure, with how it ended', async () => {
    const limited = new MillraceError('resource_exhausted', 'too much', {
      details: {
        ending: 'out_of_memory',
        limit: 'memoryBytes',
        value: 64,
        evidence: 'cgroup',
        signal: 'SIGKILL',
      },
    });
    const b = bench({
      ours: true,
      usage: true,
      type: 'subprocess',
      run: async (ctx) => {
        await ctx.ctrl.usage!(SUBPROCESS_USAGE);
        throw limited;
      },
    });
    await b.begin();
    expect(b.dms.of('fail')[0]?.body.details).toMatchObject({
      job: JOB,
      usage: {
        ...REPORTED,
        ending: 'out_of_memory',
        limit: 'memoryBytes',
        value: 64,
        evidence: 'cgroup',
        signal: 'SIGKILL',
      },
    });
  });

  test('the time limit of the node is a deadline with its value', async () => {
    const b = bench({ ours: true, usage: true, taskWallMs: 500, run: untilAborted });
    await b.begin();
    await b.clock.advance(500);
    expect(b.dms.of('fail')[0]?.body.details).toMatchObject({
      usage: { ending: 'deadline', limit: 'taskWallMs', value: 500, wall_ms: 500 },
    });
    expect(b.outcomes).toEqual(['started', 'timeout']);
  });

  test('a cancelled attempt says it with its release', async () => {
    const b: Bench = bench({
      ours: true,
      usage: true,
      type: 'subprocess',
      run: async (ctx) => {
        await untilAborted(ctx).catch(() => undefined);
        await ctx.ctrl.usage!(SUBPROCESS_USAGE);
      },
    });
    await b.begin();
    b.session.abort(new TaskAbort('canceled'));
    await b.clock.advance(0);
    expect(b.dms.of('release')[0]).toMatchObject({
      reason: 'canceled',
      details: { usage: { ...REPORTED, ending: 'canceled' } },
    });
  });

  test('the last word of a runner counts, and junk in it is left out', async () => {
    const b = bench({
      ours: true,
      usage: true,
      run: async (ctx) => {
        await ctx.ctrl.usage!({ cpu_ms: 99, sandbox: { applied: {} } });
        await ctx.ctrl.usage!({
          cpu_ms: -1,
          peak_memory_bytes: 'much',
          exit_code: 1.5,
          ending: 'x',
        });
        await ctx.ctrl.usage!({ blob: 'x'.repeat(20_000), cpu_ms: 5 });
      },
    });
    await b.begin();
    expect(b.dms.of('complete')[0]?.body.meta['usage']).toEqual({
      wall_ms: 0,
      bytes_in: 7,
      bytes_out: 11,
      ending: 'completed',
    });
  });
});

describe('runner errors are counted beside the failure', () => {
  test.each([
    [{ ending: 'spawn_failed', errno: 'ENOENT' }, 'spawn_failed'],
    [{ ending: 'sandbox_failed', control: 'cgroup' }, 'cgroup_prepare_failed'],
    [{ ending: 'sandbox_failed', control: 'network' }, 'backend_config_failed'],
    [{ ending: 'load_failed' }, 'module_load_failed'],
  ])('%j is %s', async (details, kind) => {
    const b = bench({
      type: 'subprocess',
      run: () => Promise.reject(new MillraceError('failed_precondition', 'no', { details })),
    });
    await b.begin();
    expect(b.outcomes).toEqual(['started', 'failure']);
    expect(b.errors).toEqual([`subprocess ${kind}`]);
  });

  test('a failure of the task itself is none', async () => {
    const b = bench({
      run: () => Promise.reject(new MillraceError('internal', 'no', { details: { ending: 'exit' } })),
    });
    await b.begin();
    expect(b.errors).toEqual([]);
  });
});

describe('every start has exactly one completion', () => {
  test.each([
    ['success', { run: () => Promise.resolve() }, null],
    ['failure', { run: () => Promise.reject(new Error('x')) }, null],
    ['canceled', { run: untilAborted }, 'canceled'],
    ['canceled', { run: untilAborted }, 'shutdown'],
    ['canceled', { run: untilAborted }, 'lease_lost'],
    ['timeout', { run: untilAborted }, 'deadline'],
    ['failure', { run: untilAborted }, 'limit'],
    // Gave up on: it never settles.
    ['canceled', { run: forever }, 'abandon'],
  ] as const)('%s', async (outcome, options, reason) => {
    const b = bench({ ...options, ours: true });
    await b.begin();
    if (reason === 'abandon') b.abandon();
    else if (reason !== null) b.session.abort(new TaskAbort(reason));
    await b.clock.advance(0);
    expect(b.ending).not.toBeNull();
    expect(b.outcomes).toEqual(['started', outcome]);
  });
});

describe('a trace', () => {
  const PARENT = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01';

  test('is handed to the runner as it came where the node records none', async () => {
    let seen: string | undefined;
    const b = bench({
      lease: { traceparent: PARENT },
      run: async (ctx) => {
        seen = ctx.lease.traceparent;
        await Promise.resolve();
      },
    });
    await b.begin();
    expect(seen).toBe(PARENT);
    expect(b.ending?.kind).toBe('completed');
  });

  test('gets a span for the attempt and one for the run, whose context the runner is handed', async () => {
    const spans: { name: string; parent: string | null; own: string; ended: unknown }[] = [];
    const tracer: Tracer = {
      startSpan(name, { parent }) {
        const span = {
          name,
          parent,
          own: `00-${'a'.repeat(32)}-${String(spans.length + 1).padStart(16, '0')}-01`,
          ended: null as unknown,
        };
        spans.push(span);
        return { traceparent: span.own, end: (ending = {}) => void (span.ended ??= ending) };
      },
    };
    let seen: string | undefined;
    const b = bench({
      lease: { traceparent: PARENT },
      tracer,
      run: (ctx) => {
        seen = ctx.lease.traceparent;
        b.storage.opened!.trace!('storage putBytes', {}).end();
        return Promise.reject(new Error('no luck'));
      },
    });
    await b.begin();
    const [attempt, run, storage] = spans;
    expect(spans.map(({ name, parent }) => [name, parent])).toEqual([
      ['task attempt', PARENT],
      ['run', attempt!.own],
      ['storage putBytes', attempt!.own],
    ]);
    expect(seen).toBe(run!.own);
    expect(run!.ended).toEqual({ error: 'no luck' });
    expect(attempt!.ended).toEqual({ attributes: { 'millrace.ending': 'failed' }, error: 'failed' });
    expect(storage!.ended).toEqual({});
  });
});
