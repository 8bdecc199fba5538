import { describe, expect, test } from 'vitest';
import { taskSpec, type RunnerSelector, type TaskKind, type TaskSpec } from '@millrace/runner/model';
import { RunnerError, makeRunId, type PluginContext, type RunnerPlugin } from '@millrace/runner/plugin';
import { noopMetrics } from '../metrics.ts';
import { memoryLog } from '../simulation/scripted-dms.ts';
import { BuildContext } from './build-context.ts';
import { RunnerRouter } from './runner-router.ts';

const WASM: TaskKind = { type: 'wasm', module: 'm', args: [], env: [], extensions: {} };
const CONTAINER: TaskKind = {
  type: 'container',
  image: 'i',
  command: null,
  args: [],
  env: [],
  extensions: {},
};

const spec = (kind: TaskKind = WASM, more: Partial<TaskSpec> = {}): TaskSpec =>
  taskSpec({ slot: 'slot', kind, timeoutMs: 1_000, ...more });
const selecting = (selector: Partial<RunnerSelector>): TaskSpec =>
  spec(WASM, { runnerSelector: { matchLabels: {}, matchExpressions: [], ...selector } });

interface Recorder extends RunnerPlugin {
  readonly asked: string[];
  readonly contexts: PluginContext[];
}

function runner(name: string, kind = 'wasm', build?: () => never): Recorder {
  const asked: string[] = [];
  const contexts: PluginContext[] = [];
  return {
    name,
    asked,
    contexts,
    supports(task) {
      asked.push(task.kind.type);
      return task.kind.type === kind;
    },
    buildTask(_spec, context, runId) {
      build?.();
      contexts.push(context);
      return { name: runId.name, run: () => Promise.resolve() };
    },
  };
}

const caught = (work: () => unknown): unknown => {
  try {
    return work();
  } catch (error) {
    return error;
  }
};

describe('picking a runner', () => {
  test('takes the first registered that supports the kind', () => {
    const [a, b, c] = [runner('a', 'container'), runner('b'), runner('c')];
    const router = new RunnerRouter().register(a).register(b).register(c);
    expect(router.pick(spec())).toBe(b);
    expect(router.pick(spec(CONTAINER))).toBe(a);
    expect(new RunnerRouter().pick(spec())).toBeNull();
  });

  test('without a selector minds no labels; with one takes the first that has them', () => {
    const [plain, gpu, other] = [runner('plain'), runner('gpu'), runner('other')];
    const labelled = new RunnerRouter().registerWithLabels(gpu, { gpu: 'a100', zone: 'eu' }).register(plain);
    expect(labelled.pick(spec())).toBe(gpu);
    const router = new RunnerRouter()
      .register(plain)
      .registerWithLabels(gpu, { gpu: 'a100', zone: 'eu' })
      .registerWithLabels(other, { gpu: 'h100' });
    expect(router.pick(spec())).toBe(plain);
    expect(router.pick(selecting({ matchLabels: { gpu: 'h100' } }))).toBe(other);
    expect(
      router.pick(selecting({ matchExpressions: [{ key: 'gpu', operator: 'Exists', values: [] }] })),
    ).toBe(gpu);
    expect(
      router.pick(selecting({ matchExpressions: [{ key: 'gpu', operator: 'NotIn', values: ['a100'] }] })),
    ).toBe(plain);
    expect(
      router.pick(selecting({ matchExpressions: [{ key: 'gpu', operator: 'DoesNotExist', values: [] }] })),
    ).toBe(plain);
    expect(router.pick(selecting({}))).toBe(plain);
    expect(router.pick(selecting({ matchLabels: { gpu: 'none' } }))).toBeNull();
    expect(router.pick(spec(WASM, { labels: { gpu: 'none' } }))).toBe(plain);
  });

  test('says when only the order of registration decided', () => {
    const log = memoryLog();
    const router = new RunnerRouter({ log }).register(runner('a')).register(runner('b'));
    router.pick(spec());
    expect(log.lines).toEqual([
      {
        level: 'debug',
        message: 'several runners fit, the first registered has the task',
        fields: { runner: 'a', others: ['b'], kind: 'wasm' },
      },
    ]);
  });

  test('knows labels by exact key and value', () => {
    const router = new RunnerRouter().registerWithLabels(runner('a'), { gpu: 'a100' });
    expect(router.containsLabel('gpu', 'a100')).toBe(true);
    expect(router.containsLabel('gpu', 'A100')).toBe(false);
    expect(router.containsLabel('toString', 'a100')).toBe(false);
  });
});

describe('building a task', () => {
  test('hands the chosen runner the context all share, whenever it was set', () => {
    const a = runner('a');
    const context = new BuildContext([{ key: 'A', value: '1' }]);
    const router = new RunnerRouter().register(a);
    const built = router.build(spec());
    router.withContext(context);
    router.build(spec());
    expect(built.name).toMatch(/^a-slot-\d+$/);
    expect(a.contexts[0]!.env).toEqual([]);
    expect(a.contexts[1]).toBe(context);
  });

  test('asks no runner about an embedded task', () => {
    const a = runner('a', 'embedded');
    const error = caught(() => new RunnerRouter().register(a).build(spec({ type: 'embedded' })));
    expect(error).toMatchObject({ variant: 'NoRunner' });
    expect((error as Error).message).toMatch(/TaskKind::Embedded.*submit_with_task\(\)/);
    expect(a.asked).toEqual([]);
  });

  test('that nobody takes says whether kind or labels are missing', () => {
    const router = new RunnerRouter().register(runner('a')).registerWithLabels(runner('b'), { gpu: 'x' });
    expect(() => router.build(spec(CONTAINER))).toThrow(
      'no suitable runner for task kind: container (no runner supports the kind)',
    );
    const error = caught(() => router.build(selecting({ matchLabels: { gpu: 'y' } })));
    expect(error).toMatchObject({
      variant: 'NoRunner',
      code: 'failed_precondition',
      message: 'no suitable runner for task kind: wasm (none of a, b has the labels its selector asks for)',
    });
  });

  test('that the chosen runner refuses goes to no other, and its number is used up', () => {
    const refusal = RunnerError.invalidSpec('not here');
    const b = runner('b');
    const router = new RunnerRouter()
      .register(
        runner('a', 'wasm', () => {
          throw refusal;
        }),
      )
      .register(b);
    const before = makeRunId('x', 's').seq;
    expect(caught(() => router.build(spec()))).toBe(refusal);
    expect(b.contexts).toEqual([]);
    expect(makeRunId('x', 's').seq).toBe(before + 2);
  });

  test('takes the run id that a runner makes itself', () => {
    const own = { name: 'mine', runner: 'a', slot: 'slot', seq: 0 };
    const router = new RunnerRouter().register({ ...runner('a'), buildRunId: () => own });
    expect(router.build(spec()).name).toBe('mine');
  });

  test('checks the rules of the model first', () => {
    const router = new RunnerRouter().register(runner('a'));
    expect(() => router.build({ ...spec(), timeoutMs: 0 })).toThrow('timeout must be greater than zero');
  });
});

describe('registering', () => {
  test('refuses a name that is taken, whatever the labels', () => {
    const router = new RunnerRouter().register(runner('a'));
    expect(caught(() => router.registerWithLabels(runner('a', 'container'), { x: 'y' }))).toMatchObject({
      variant: 'DuplicateRunner',
      message: 'duplicate runner name: a; give one of the two another name',
    });
    expect(router.pick(spec(CONTAINER))).toBeNull();
  });

  test('refuses a name that cannot be part of a run id', () => {
    new RunnerRouter().register(runner('x'.repeat(128)));
    for (const name of ['', 'a/b', 'a b', 'x'.repeat(129)]) {
      expect(() => new RunnerRouter().register(runner(name))).toThrow(/must be 1 to 128 letters/);
    }
  });
});

describe('a build context', () => {
  test('is empty by default, and each change is another one', () => {
    const empty = new BuildContext();
    const metrics = { ...noopMetrics() };
    const changed = empty.withEnv([{ key: 'SECRET', value: 'hunter2' }]).withMetrics(metrics);
    expect([empty.env, empty.metrics]).toEqual([[], noopMetrics()]);
    expect(changed.metrics).toBe(metrics);
    expect(String(changed)).toBe('BuildContext(env_len=1)');
    expect(String(changed.withEnv([]))).toBe('BuildContext(env_len=0)');
  });
});
