import { createTestContext, runnerSuite, SimulatedClock } from '@millrace/runner/testing';
import type { TestContextOptions } from '@millrace/runner/testing';
import { TaskAbort } from '@millrace/runner';
import { taskSpec } from '@millrace/runner/model';
import type { TaskKind } from '@millrace/runner/model';
import { makeRunId } from '@millrace/runner/plugin';
import type { BuiltTask } from '@millrace/runner/plugin';
import { describe, expect, test } from 'vitest';
import { computeReason } from './errors.ts';
import { echo, list, program, wat } from './fixtures/wat.ts';
import { formatRef } from './ref.ts';
import { memoryResolver } from './resolver.ts';
import { COMPUTE_CAPABILITY, computeRunner } from './runner.ts';
import './wasm/engine.ts';

const resolver = memoryResolver();
const add = (wasm: Uint8Array): string => formatRef(resolver.add(wasm));
const echoRef = add(echo());
const loopRef = add(wat('(module (func (export "_start") (loop br 0)))'));
const clockRef = add(
  program(
    `(drop (call $clock_time_get (i32.const 0) (i64.const 0) (i32.const 1024)))
     ${list('(i32.wrap_i64 (i64.div_u (i64.load (i32.const 1024)) (i64.const 1000000000)))')}`,
    { wasi: ['clock_time_get'] },
  ),
);

interface Done {
  readonly output: string | null;
  readonly error: unknown;
  readonly events: readonly unknown[];
  readonly lines: readonly unknown[];
}

async function perform(meta: unknown, more: TestContextOptions = {}, options: object = {}): Promise<Done> {
  const runner = computeRunner({
    resolver,
    workers: 1,
    clock: new SimulatedClock({ startAt: 5_000_000 }),
    ...options,
  });
  await using ctx = createTestContext({ ...more, task: { meta: meta as never, ...more.task } });
  let error: unknown = null;
  await runner.run(ctx).catch((thrown: unknown) => (error = thrown));
  await runner.close?.();
  const output = ctx.outputs.get('output.json');
  return {
    output: output === undefined ? null : Buffer.from(output).toString(),
    error,
    events: [...ctx.events],
    lines: ctx.logs.map((line) => [line.level, line.message, line.fields]),
  };
}

describe('a compute task', () => {
  test('has the capability /compute/v1, or another', () => {
    expect(computeRunner({ resolver }).capability).toBe(COMPUTE_CAPABILITY);
    expect(computeRunner({ resolver, capability: '/mine/v1' }).capability).toBe('/mine/v1');
    expect(() => computeRunner({ resolver, capability: '' })).toThrow(/capability/);
    expect(() => computeRunner({ resolver, limits: { maxWallMs: 0 } })).toThrow(/maxWallMs/);
  });

  test('takes its input from meta, and tells what was measured', async () => {
    const done = await perform({ ref: echoRef, input: { a: [1, null] } });
    expect(done.error).toBeNull();
    expect(done.output).toBe('{"a":[1,null]}');
    expect(done.events).toEqual([
      expect.objectContaining({
        type: 'compute_metrics',
        ref: echoRef,
        status: 'ok',
        reason: null,
        output_bytes: 14,
      }),
    ]);
  });

  test('may be written as the kind "wasm" of the model, and is built by a plugin for that kind only', async () => {
    const done = await perform({ wasm: { module: echoRef, input: [7] } });
    expect(done.output).toBe('[7]');
    const runner = computeRunner({ resolver, workers: 1 });
    const build = (kind: TaskKind): (() => BuiltTask) => {
      const spec = taskSpec({ slot: 's', timeoutMs: 1_000, kind });
      const context = { env: [], metrics: { recordRunnerError: () => undefined } };
      return () => runner.plugin.buildTask(spec, context, makeRunId(runner.plugin.name, 's'));
    };
    const wasm = { type: 'wasm', module: echoRef, args: [], env: [], extensions: { input: 'x' } } as const;
    const built = build(wasm)();
    expect(built.name).toMatch(/^compute-s-\d+$/);
    await using ctx = createTestContext({});
    await built.run(ctx);
    expect(Buffer.from(ctx.outputs.get('output.json')!).toString()).toBe('"x"');
    expect(build({ type: 'embedded' })).toThrow("unsupported task kind for runner 'compute': embedded");
    expect(build({ ...wasm, args: ['a'] })).toThrow(/^invalid specification: .*neither args nor env/);
    expect(build({ ...wasm, module: 'a.wasm' })).toThrow(/^invalid specification: .*malformed compute ref/);
    await runner.close?.();
  });

  test.each([
    ['null in meta is an input', { ref: echoRef, input: null }, {}, 'null'],
    ['the first input of the task', { ref: echoRef }, { inputs: { a: '[1]', b: '[2]' } }, '[1]'],
    ['meta before the first input', { ref: echoRef, input: 3 }, { inputs: { a: '[1]' } }, '3'],
    ['nothing is {}', { ref: echoRef }, {}, '{}'],
    ['an empty input is {}', { ref: echoRef }, { inputs: { a: '' } }, '{}'],
  ])('%s', async (_name, meta, more, output) => {
    expect((await perform(meta, more)).output).toBe(output);
  });

  test.each([
    [null, /meta must be an object with a ref/],
    [{}, /ref must be a text, .* got undefined/],
    [{ ref: 7 }, /ref must be a text, .* got number/],
    [{ ref: 'compute://sha256/xyz' }, /malformed compute ref/],
    [{ ref: echoRef, now: 'noon' }, /now must be milliseconds since 1970 or RFC 3339, got "noon"/],
    [{ ref: echoRef, seed: 1.5 }, /seed must be a whole number from 0, got 1.5/],
    [{ ref: `compute://sha256/${'0'.repeat(64)}` }, /artifact not found/],
  ])('with the meta %j fails, and says why', async (meta, message) => {
    const { error, output } = await perform(meta);
    expect((error as Error).message).toMatch(message);
    expect(output).toBeNull();
  });

  test('observes the time of its meta, or of the node', async () => {
    expect((await perform({ ref: clockRef, now: '2026-05-25T12:00:00Z' })).output).toBe('[1779710400]');
    expect((await perform({ ref: clockRef, now: 3_000 })).output).toBe('[3]');
    expect((await perform({ ref: clockRef })).output).toBe('[5000]');
  });

  test('logs its diagnostics by lines, and tells how much was cut', async () => {
    const ref = add(
      program('(call $write (i32.const 2) (i32.const 1024) (i32.const 11))', {
        fields: '(data (i32.const 1024) "one\\ntwo\\nthr")',
      }),
    );
    const whole = await perform({ ref });
    expect(whole.lines).toEqual(['one', 'two', 'thr'].map((line) => ['info', 'compute log', { line }]));
    const cut = await perform({ ref }, {}, { limits: { maxLogBytes: 5 } });
    expect(cut.lines).toEqual([
      ['info', 'compute log', { line: 'one' }],
      ['info', 'compute log', { line: 't' }],
      ['warn', 'compute log was cut', { dropped_bytes: 6 }],
    ]);
  });

  test('fails with the guest, and is measured all the same', async () => {
    const done = await perform({ ref: loopRef }, {}, { limits: { maxWallMs: 50 } });
    expect(computeReason(done.error)).toBe('wall-limit');
    expect(done.events).toEqual([expect.objectContaining({ status: 'wall-limit' })]);
    expect(done.output).toBeNull();
  });

  test('with an input that is not JSON, or too large, fails before it begins', async () => {
    const wrong = await perform({ ref: echoRef }, { inputs: { photo: 'GIF89a' } });
    expect((wrong.error as Error).message).toMatch(
      /input photo is not one JSON document: 'G' is not expected/,
    );
    const limits = { limits: { maxInputBytes: 8 } };
    expect((await perform({ ref: echoRef }, { inputs: { a: '12345678' } }, limits)).output).toBe('12345678');
    const large = await perform({ ref: echoRef }, { inputs: { a: '123456789' } }, limits);
    expect((large.error as Error).message).toMatch(/input a is over maxInputBytes 8/);
    expect([wrong.events, large.events]).toEqual([[], []]);
  });

  test('that is cancelled ends with the reason, after the guest is gone', async () => {
    const runner = computeRunner({ resolver, workers: 1 });
    await using ctx = createTestContext({ task: { meta: { ref: loopRef } } });
    const running = runner.run(ctx);
    setTimeout(() => ctx.abort('canceled'), 100);
    const error: unknown = await running.catch((thrown: unknown) => thrown);
    expect(TaskAbort.is(error) && error.reason).toBe('canceled');
    await runner.close?.();
  });
});

describe('the runner suite', () => {
  runnerSuite(async () => computeRunner({ resolver, workers: 2, limits: { maxWallMs: 20_000 } }), {
    test,
    settleMs: 20_000,
    cases: [
      {
        name: 'an input',
        context: { inputs: { a: '{"x":1}' }, task: { meta: { ref: echoRef } } },
        outputs: ['output.json'],
      },
      {
        name: 'meta',
        context: { task: { meta: { ref: echoRef, input: [1, 2] } } },
        outputs: ['output.json'],
      },
      { name: 'a bad ref', context: { task: { meta: { ref: 'compute://sha256/0' } } }, fails: /malformed/ },
    ],
  });
});
