import { readFile } from 'node:fs/promises';
import { setTimeout as delay } from 'node:timers/promises';
import { describe, expect, test } from 'vitest';
import type { TaskContext } from '../context.ts';
import { defineRunner } from '../runner.ts';
import type { Runner } from '../runner.ts';
import { runnerSuite } from './runner-suite.ts';
import type { RunnerCase } from './runner-suite.ts';

const upperCase = async (ctx: TaskContext): Promise<void> => {
  await ctx.ctrl.progress({ status: 'started' });
  for (const [index, cid] of ctx.lease.task.inputs_cids.entries()) {
    ctx.signal.throwIfAborted();
    const text = new TextDecoder().decode(await ctx.input.getBytesByCid(cid));
    if (text === 'bad') throw new Error(`input ${index} is bad`);
    await ctx.output.putBytes(`upper/${index}.txt`, new TextEncoder().encode(text.toUpperCase()));
  }
  ctx.log.info('done');
};

const CASES: readonly RunnerCase[] = [
  { name: 'two texts', context: { inputs: { a: 'x', b: 'y' } }, outputs: ['upper/0.txt', 'upper/1.txt'] },
  { name: 'one text', context: { inputs: { a: 'z' } } },
  { name: 'a bad text', context: { inputs: { a: 'bad' } }, fails: /input 0 is bad/ },
];

/** The titles of the tests the suite lets fail, with their messages. */
async function failures(
  source: Runner | (() => Promise<Runner>),
  cases: readonly RunnerCase[] = CASES,
): Promise<Record<string, string>> {
  const tests: [string, () => Promise<void>][] = [];
  const settings = { settleMs: 300, quietMs: 5 };
  runnerSuite(source, { test: (name, fn) => void tests.push([name, fn]), cases, ...settings });
  const failed: Record<string, string> = {};
  for (const [name, fn] of tests) {
    try {
      await fn();
    } catch (error) {
      failed[name] = (error as Error).message;
    }
  }
  return failed;
}

const broken = (run: (ctx: TaskContext) => Promise<void>): Runner => ({ capability: '/test/broken/v1', run });

// The suite under the test framework itself, as an author uses it.
describe('a runner that keeps the contract', () => {
  runnerSuite(defineRunner({ capability: '/test/upper/v1', run: upperCase }), {
    test,
    cases: CASES,
    quietMs: 5,
  });
});

describe('runnerSuite', () => {
  test('passes a good runner without cases, and closes one it made, once and last', async () => {
    const order: string[] = [];
    const make = async (): Promise<Runner> => {
      order.push('made');
      return {
        capability: '/test/upper/v1',
        run: upperCase,
        close: async () => void order.push('closed'),
      };
    };
    expect(await failures(make, [])).toEqual({});
    expect(order).toEqual(['made', 'closed']);
  });

  test('finds a capability that changes or is not valid', async () => {
    let reads = 0;
    const changing: Runner = {
      get capability() {
        return `/test/${(reads += 1)}`;
      },
      run: upperCase,
    };
    expect(Object.keys(await failures(changing))).toEqual(['the capability is valid and stays the same']);
    const invalid = await failures({ capability: 'a b', run: upperCase });
    expect(Object.keys(invalid)).toEqual(['the capability is valid and stays the same']);
  });

  test('finds wrong and missing outputs, and a failure that does not come', async () => {
    const failed = await failures(broken((ctx) => ctx.output.putBytes('other', new Uint8Array())));
    expect(Object.keys(failed)).toContain('two texts: produces its outputs');
    expect(failed['a bad text: fails with its error']).toMatch(/this case must fail/);
    const checked = await failures(broken(upperCase), [
      { ...CASES[0]!, check: () => Promise.reject(new Error('looks wrong')) },
    ]);
    expect(checked).toEqual({ 'two texts: produces its outputs': 'looks wrong' });
  });

  test('finds state that one run leaves for the next', async () => {
    let runs = 0;
    const failed = await failures(
      broken(async (ctx) => {
        await upperCase(ctx);
        runs += 1;
        await ctx.output.putBytes('upper/0.txt', Uint8Array.of(runs));
      }),
    );
    expect(failed['two texts: a second run does the same']).toMatch(/other bytes than in the first run/);
    const meant = await failures(
      broken(async (ctx) => {
        await upperCase(ctx);
        await ctx.output.putBytes('upper/0.txt', Uint8Array.of((runs += 1)));
      }),
      CASES.map((one) => ({ ...one, deterministic: false })),
    );
    expect(meant).toEqual({});
  });

  test('finds runs that disturb each other', async () => {
    let current: TaskContext | null = null;
    const failed = await failures(
      broken(async (ctx) => {
        current = ctx;
        await ctx.ctrl.progress('started');
        await upperCase(current);
      }),
    );
    expect(Object.keys(failed)).toContain('two texts: runs at the same time do not disturb each other');
  });

  test('finds work that goes on after the abort', async () => {
    const failed = await failures(
      broken(async (ctx) => {
        await upperCase(ctx).catch((error: unknown) => {
          if (!ctx.signal.aborted) throw error;
        });
        if (ctx.signal.aborted) await delay(1_000, undefined, { ref: false });
      }),
    );
    expect(failed['a task stopped before it starts settles in time and leaves no artifact']).toMatch(
      /within 300 ms/,
    );
    expect(failed['a task stopped in the middle settles in time']).toMatch(/within 300 ms/);
  });

  test('finds swallowed errors of inputs and outputs', async () => {
    const failed = await failures(
      broken(async (ctx) => {
        for (const cid of ctx.lease.task.inputs_cids) {
          const bytes = await ctx.input.getBytesByCid(cid).catch(() => new Uint8Array());
          await ctx.output.putBytes('x', bytes).catch(() => undefined);
        }
      }),
      [{ name: 'a text', context: { inputs: { a: 'x' } } }],
    );
    expect(Object.keys(failed)).toEqual([
      'an input that cannot be read fails the task',
      'an artifact that cannot be written fails the task',
    ]);
  });

  test('finds an error that hides its cause', async () => {
    const failed = await failures(
      broken((ctx) => upperCase(ctx).catch(() => Promise.reject(new Error('something went wrong')))),
      [CASES[0]!],
    );
    expect(failed['an input that cannot be read fails the task']).toMatch(/does not tell the cause/);
    const wrapped = await failures(
      broken((ctx) =>
        upperCase(ctx).catch((cause: unknown) => Promise.reject(new Error('wrapped', { cause }))),
      ),
    );
    expect(wrapped).toEqual({});
  });

  test('finds calls on the ports after run has settled', async () => {
    const failed = await failures(
      broken(async (ctx) => {
        await upperCase(ctx);
        setImmediate(() => void ctx.ctrl.progress('late').catch(() => undefined));
      }),
    );
    expect(failed['two texts: produces its outputs']).toMatch(/calls on ports after run had settled/);
  });

  test('finds an upload that is left open', async () => {
    const failed = await failures(
      broken(async (ctx) => {
        await upperCase(ctx);
        await ctx.output.openMultipart('forgotten');
      }),
    );
    expect(failed['two texts: produces its outputs']).toMatch(/neither finished nor aborted/);
  });

  test('finds rejections that are no Error, a run that throws at once, and one that returns nothing', async () => {
    const text = await failures(broken(() => Promise.reject('text')));
    expect(text['one text: produces its outputs']).toMatch(/reject with an Error, got string/);
    const thrown = await failures(
      broken(() => {
        throw new Error('at once');
      }),
    );
    expect(thrown['one text: produces its outputs']).toMatch(/threw instead of returning a promise/);
    const nothing = await failures(broken(() => undefined as never));
    expect(nothing['one text: produces its outputs']).toMatch(/must return a promise, got undefined/);
  });

  test('a runner that reads from disk and streams passes', async () => {
    const runner = broken(async (ctx) => {
      for (const cid of ctx.lease.task.inputs_cids) {
        const bytes = await readFile(await ctx.input.materializeCidToTemp(cid));
        const upload = await ctx.output.openMultipart('copy');
        try {
          await upload.writeChunk(bytes);
          await upload.finish();
        } catch (error) {
          await upload.abort();
          throw error;
        }
        await ctx.output.putStream('again', await ctx.input.openRead(cid));
      }
    });
    expect(await failures(runner, CASES.slice(1, 2))).toEqual({});
  });
});
