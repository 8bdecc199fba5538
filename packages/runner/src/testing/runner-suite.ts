/**
 * The suite every runner should pass, over a `test` function that is handed in, so it runs under vitest, `node:test` or
 * anything with `test(name, fn)`. Each test is a promise a node relies on.
 */
import assert from 'node:assert/strict';
import { setTimeout as delay } from 'node:timers/promises';
import { types } from 'node:util';
import type { TaskContext } from '../context.ts';
import { MillraceError, describeError } from '../errors.ts';
import type { AbortReason } from '../errors.ts';
import { checkCapability } from '../runner.ts';
import type { Runner } from '../runner.ts';
import { createTestContext } from './test-context.ts';
import type { PortCall, TestContext, TestContextOptions } from './test-context.ts';

/** A piece of work the runner is known to do. */
export interface RunnerCase {
  readonly name: string;
  /** Inputs, task meta and so on, for {@link createTestContext}. Read anew for every run, so it must not be used up. */
  readonly context: TestContextOptions;
  /** The logical paths of exactly the artifacts it makes. Default: not checked. */
  readonly outputs?: readonly string[];
  /** Looks at the result, and throws when it is wrong. Default: nothing. */
  readonly check?: (ctx: TestContext) => void | Promise<void>;
  /** The work must fail with a message that matches. Such a case is run once and used for nothing else. */
  readonly fails?: RegExp;
  /** Whether a second run must make the same bytes. Default true; false for work with chance or time in it. */
  readonly deterministic?: boolean;
}

export interface RunnerSuiteOptions {
  /** Registers one test; `test` of vitest or of `node:test` fits. */
  readonly test: (name: string, fn: () => Promise<void>) => unknown;
  /**
   * Without any, only what holds for every runner is tested, with a task that has neither inputs nor meta; a runner is
   * then free to reject.
   */
  readonly cases?: readonly RunnerCase[];
  /** The longest time from an abort to settling, milliseconds. Default 5000, the grace a node gives by default. */
  readonly settleMs?: number;
  /** How long after settling calls on the ports are watched for, milliseconds. Default 50. */
  readonly quietMs?: number;
}

/** How one run ended, with the context it ran in, closed. */
interface Run {
  readonly ctx: TestContext;
  readonly error: unknown;
}

/**
 * Registers the tests. The runner, or the one a function makes (once, for all tests), serves every test and is closed by
 * the last one.
 *
 * @example
 * import { test } from 'vitest';
 * import runner from './thumbnail.ts';
 * runnerSuite(runner, {
 *   test,
 *   cases: [{ name: 'a photo', context: { inputs: { photo } }, outputs: ['thumbnail.png'] }],
 * });
 */
export function runnerSuite(source: Runner | (() => Promise<Runner>), options: RunnerSuiteOptions): void {
  const { test, cases = [], settleMs = 5_000, quietMs = 50 } = options;
  let made: Promise<Runner> | null = null;
  const getRunner = (): Promise<Runner> =>
    (made ??= typeof source === 'function' ? source() : Promise.resolve(source));

  const run = async (context: TestContextOptions, during?: (ctx: TestContext) => void): Promise<Run> => {
    const runner = await getRunner();
    // Runs at the same time must not share a folder; `ctx.outputs` reads the same either way.
    const ctx = createTestContext({ ...context, outputsDir: undefined });
    during?.(ctx);
    const settled = settle(runner, ctx);
    const error = await (ctx.signal.aborted
      ? within(settled, settleMs)
      : untilAborted(settled, ctx, settleMs));
    await ctx.close();
    await delay(quietMs);
    assert.deepEqual(ctx.lateCalls.map(describeCall), [], 'calls on ports after run had settled');
    return { ctx, error };
  };

  const good = cases.filter((one) => !one.fails);
  const idle: RunnerCase = { name: 'a task without inputs', context: {} };
  const sample = good[0] ?? idle;

  test('the capability is valid and stays the same', async () => {
    const runner = await getRunner();
    const before = runner.capability;
    checkCapability(before);
    await run(sample.context);
    assert.equal((await getRunner()).capability, before);
  });

  for (const one of cases) {
    test(`${one.name}: ${one.fails ? 'fails with its error' : 'produces its outputs'}`, async () => {
      const result = await run(one.context);
      if (one.fails) {
        assert.ok(result.error !== null, 'run resolved, but this case must fail');
        assert.match(describeError(result.error), one.fails);
      } else {
        succeeded(result);
        if (one.outputs)
          assert.deepEqual([...result.ctx.outputs.keys()].toSorted(), [...one.outputs].toSorted());
      }
      await one.check?.(result.ctx);
    });
  }

  for (const one of good) {
    test(`${one.name}: a second run does the same`, async () => {
      sameResult(succeeded(await run(one.context)), succeeded(await run(one.context)), one);
    });

    test(`${one.name}: runs at the same time do not disturb each other`, async () => {
      const alone = succeeded(await run(one.context));
      const others = good.filter((other) => other !== one).slice(0, 2);
      const together = await Promise.all([one, one, ...others].map((each) => run(each.context)));
      for (const result of together) succeeded(result);
      for (const result of together.slice(0, 2)) sameResult(alone, result.ctx, one);
    });
  }

  test('a task stopped before it starts settles in time and leaves no artifact', async () => {
    const { ctx } = await run(sample.context, (started) => started.abort('canceled'));
    assert.deepEqual([...ctx.outputs.keys()], []);
  });

  test('a task stopped in the middle settles in time', async () => {
    const whole = await run(sample.context);
    const calls = whole.ctx.calls.filter((call) => call.port !== 'log').length;
    const reasons: readonly AbortReason[] = ['canceled', 'lease_lost', 'shutdown', 'deadline'];
    // At the first, a middle and the last call on a port; and by time, for work between calls.
    const points = [...new Set([1, Math.ceil(calls / 2), calls])].filter((point) => point >= 1);
    for (const [index, point] of points.entries()) {
      let seen = 0;
      let current: TestContext | null = null;
      const context: TestContextOptions = {
        ...sample.context,
        onCall: async (call) => {
          await sample.context.onCall?.(call);
          seen += 1;
          if (seen === point) current?.abort(reasons[index % reasons.length]);
        },
      };
      await run(context, (started) => (current = started));
    }
    for (const afterMs of [0, 20]) {
      await run(
        sample.context,
        (started) => void setTimeout(() => started.abort('canceled'), afterMs).unref(),
      );
    }
  });

  test('an input that cannot be read fails the task', async () => {
    await mustPropagate('input', [
      'getBytesByCid',
      'materializeCidToTemp',
      'materializeCidWithMeta',
      'openRead',
    ]);
  });

  test('an artifact that cannot be written fails the task', async () => {
    await mustPropagate('output', null);
  });

  test('closing resolves', async () => {
    const runner = await getRunner();
    await within(Promise.resolve(runner.close?.()), settleMs);
  });

  /** Every call of a kind fails; a run that made one must reject, with an error that tells of it. */
  async function mustPropagate(port: PortCall['port'], methods: readonly string[] | null): Promise<void> {
    for (const one of good.length > 0 ? good : [idle]) {
      const fault = `the test lets every ${port} call fail`;
      let failed = 0;
      const { error } = await run({
        ...one.context,
        onCall: async (call) => {
          await one.context.onCall?.(call);
          if (call.port !== port || (methods !== null && !methods.includes(call.method))) return;
          // An upload that failed may be given up, and that is no failure of its own.
          if (call.method === 'abort') return;
          failed += 1;
          throw new MillraceError('unavailable', fault);
        },
      });
      if (failed === 0) continue;
      assert.ok(error !== null, `${one.name}: run resolved although ${failed} ${port} call(s) failed`);
      assert.match(
        describeError(error, 65_536),
        new RegExp(fault),
        `${one.name}: the error does not tell the cause`,
      );
    }
  }
}

/** Resolves with what `run` rejected with, or null. A rejection with anything but an Error is a failure here. */
async function settle(runner: Runner, ctx: TaskContext): Promise<unknown> {
  let promise: unknown;
  try {
    promise = runner.run(ctx);
  } catch (error) {
    assert.fail(`run threw instead of returning a promise that rejects: ${describeError(error)}`);
  }
  assert.ok(types.isPromise(promise), `run must return a promise, got ${typeof promise}`);
  try {
    await promise;
    return null;
  } catch (error) {
    assert.ok(types.isNativeError(error), `run must reject with an Error, got ${typeof error}`);
    return error;
  }
}

/** Waits for as long as the task is let run, then for `settleMs` more. */
function untilAborted<T>(settled: Promise<T>, ctx: TaskContext, settleMs: number): Promise<T> {
  const stopped = new Promise<void>((resolve) => {
    ctx.signal.addEventListener('abort', () => resolve(), { once: true });
  });
  return Promise.race([settled, stopped.then(() => within(settled, settleMs))]);
}

async function within<T>(settled: Promise<T>, settleMs: number): Promise<T> {
  const timer = new AbortController();
  const late = delay(settleMs, undefined, { signal: timer.signal }).then(() =>
    assert.fail(`did not settle within ${settleMs} ms after it was told to stop`),
  );
  // Rejects when the timer is cleared, which nobody is to hear about.
  late.catch(() => undefined);
  try {
    return await Promise.race([settled, late]);
  } finally {
    timer.abort();
  }
}

function succeeded({ ctx, error }: Run): TestContext {
  assert.ok(error === null, `run rejected: ${describeError(error)}`);
  assert.equal(ctx.openUploads, 0, 'multipart uploads neither finished nor aborted');
  return ctx;
}

function sameResult(a: TestContext, b: TestContext, { deterministic = true }: RunnerCase): void {
  assert.deepEqual([...b.outputs.keys()].toSorted(), [...a.outputs.keys()].toSorted());
  if (!deterministic) return;
  for (const [path, bytes] of a.outputs) {
    assert.ok(
      Buffer.from(bytes).equals(b.outputs.get(path) ?? new Uint8Array()),
      `${path} has other bytes than in the first run; set deterministic: false if that is meant`,
    );
  }
}

function describeCall({ port, method, target }: PortCall): string {
  return `${port}.${method}(${target ?? ''})`;
}
