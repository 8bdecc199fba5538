import { describe, expect, test } from 'vitest';
import {
  MillraceError,
  defineRunner,
  parseTaskSpec,
  type Json,
  type Runner,
  type TaskContext,
  type TaskSpec,
} from '@millrace/runner';
import {
  DEFAULT_BACKOFF,
  type RunnerEnv,
  type TaskKind,
  type TaskSpec as ModelSpec,
} from '@millrace/runner/model';
import type { KindRunner } from '@millrace/runner/plugin';
import { BuildContext } from './build-context.ts';
import { CAPABILITY_LABEL, Roster } from './roster.ts';
import { memoryLog } from '../simulation/scripted-dms.ts';

const runner = (capability: string, close?: () => Promise<void>): Runner =>
  defineRunner({ capability, run: () => Promise.resolve(), ...(close === undefined ? {} : { close }) });

const pick = (roster: Roster, capability: string, capability_filters: Json = null): Runner | null =>
  roster.pick({ capability, capability_filters })?.runner ?? null;

describe('a roster', () => {
  test('matches a capability byte for byte', () => {
    const hello = runner('/examples/hello/v1');
    const roster = new Roster([hello]);
    expect(pick(roster, '/examples/hello/v1')).toBe(hello);
    expect(pick(roster, '/examples/Hello/v1')).toBeNull();
    expect(pick(roster, '/examples/hello/v1/')).toBeNull();
    expect(pick(roster, '/examples/hello')).toBeNull();
  });

  test('of several with one capability takes the first whose labels have what the task asks for', () => {
    const [plain, gpu, other] = [runner('a'), runner('a'), runner('a')];
    const roster = new Roster(
      [plain, { runner: gpu, labels: { gpu: 't4' } }, { runner: other, labels: { gpu: 'a100' } }],
      { labels: { zone: 'eu' } },
    );
    expect(pick(roster, 'a')).toBe(plain);
    expect(pick(roster, 'a', {})).toBe(plain);
    expect(pick(roster, 'a', { zone: 'eu' })).toBe(plain);
    expect(pick(roster, 'a', { gpu: 't4' })).toBe(gpu);
    expect(pick(roster, 'a', { gpu: 'a100', zone: 'eu' })).toBe(other);
  });

  test('falls back to the first with the capability: the dispatcher matched the filters by rules of its own', () => {
    const [first, second] = [runner('a'), runner('a')];
    const roster = new Roster([first, { runner: second, labels: { gpu: 't4' } }]);
    expect(pick(roster, 'a', { gpu: 'none such' })).toBe(first);
    for (const filters of ['text', 7, ['gpu'], true] as Json[])
      expect(pick(roster, 'a', filters)).toBe(first);
  });

  test('is not misled by names every object has', () => {
    const [first, second] = [runner('a'), runner('a')];
    const roster = new Roster([first, { runner: second, labels: { constructor: 'x' } }]);
    expect(pick(roster, 'a', { constructor: 'x' })).toBe(second);
  });

  test('advertises capabilities sorted by bytes, each once', () => {
    const roster = new Roster([
      runner('b'),
      runner('a'),
      runner('b'),
      runner('Z'),
      runner('\u{1F600}'),
      runner('\uFFFD'),
    ]);
    expect(roster.capabilities).toEqual(['Z', 'a', 'b', '\uFFFD', '\u{1F600}']);
  });

  test('advertises the labels of the node and its runners; where they differ the node, then the first, is right', () => {
    const roster = new Roster(
      [
        { runner: runner('a'), labels: { gpu: 't4', zone: 'us' } },
        { runner: runner('b'), labels: { gpu: 'a100', disk: 'ssd' } },
      ],
      { labels: { zone: 'eu' } },
    );
    expect(roster.labels).toEqual({ zone: 'eu', gpu: 't4', disk: 'ssd' });
  });

  test('refuses to be without runners and a capability that is none', () => {
    expect(() => new Roster([])).toThrow(MillraceError);
    expect(() => new Roster([{ capability: '', run: () => Promise.resolve() }])).toThrow(/capability/);
  });

  test('closes every runner once, however often it is registered and whatever fails', async () => {
    const closed: string[] = [];
    const twice = runner('a', () => Promise.resolve(void closed.push('a')));
    const broken = runner('b', () => {
      closed.push('b');
      throw new Error('stuck');
    });
    const log = memoryLog();
    const roster = new Roster([twice, broken, { runner: twice, labels: { x: 'y' } }, runner('c')]);
    await Promise.all([roster.close(log), roster.close(log)]);
    await roster.close(log);
    expect(closed).toEqual(['a', 'b']);
    expect(log.lines).toEqual([
      { level: 'error', message: 'runner could not be closed', fields: { capability: 'b', error: 'stuck' } },
    ]);
  });
});

describe('a prepared task', () => {
  const task = (more: Partial<TaskSpec> = {}): TaskSpec =>
    parseTaskSpec({ id: '5b1f3c52-5f0e-4b3e-9b5e-6a1d6c0a7e11', capability: 'a', ...more });
  const context = {} as TaskContext;

  /** A runner with a plugin that remembers what it was to build. */
  const generic = (
    capability: string,
    name: string,
    kind: TaskKind = { type: 'wasm', module: 'm', args: [], env: [], extensions: {} },
  ) => {
    const specs: ModelSpec[] = [];
    const envs: RunnerEnv[] = [];
    const runner: KindRunner = {
      capability,
      type: 'wasm',
      run: () => Promise.reject(new Error('not the way')),
      kindOf: () => kind,
      plugin: {
        name,
        supports: (spec) => spec.kind.type === 'wasm',
        buildTask(spec, lent, runId) {
          specs.push(spec);
          envs.push(lent.env);
          return { name: runId.name, run: () => Promise.resolve() };
        },
      },
    };
    return { ...runner, specs, envs };
  };

  const prepare = (roster: Roster, given: TaskSpec) => roster.prepare(roster.pick(given)!, given, 86_400_000);

  test('of a runner for its capability is run by that runner, under a name made of it', async () => {
    const seen: TaskContext[] = [];
    const mine = defineRunner({
      capability: '/examples/hello/v1',
      run: (ctx) => Promise.resolve(void seen.push(ctx)),
    });
    const prepared = prepare(new Roster([mine]), task({ capability: mine.capability }));
    expect(prepared.task.name).toMatch(/^examples-hello-v1-5b1f3c52-.*-\d+$/);
    await prepared.task.run(context);
    expect(seen).toEqual([context]);
  });

  test('of a runner with a plugin is built by that, as the model has it', async () => {
    const wasm = generic('a', 'compute');
    const roster = new Roster([wasm], {
      labels: { zone: 'eu' },
      context: new BuildContext([{ key: 'A', value: '1' }]),
    });
    const meta = {
      supervision: {
        slot: 'lane',
        admission: 'queue',
        restart: { type: 'onFailure' },
        maxRetries: 2,
        timeout: 50,
      },
    };
    const { task: built, supervision } = prepare(roster, task({ meta, capability_filters: { zone: 'eu' } }));
    await built.run(context);
    expect(built.name).toMatch(/^compute-lane-\d+$/);
    expect(supervision).toMatchObject({ lane: 'lane', timeoutMs: 50 });
    expect(wasm.envs).toEqual([[{ key: 'A', value: '1' }]]);
    expect(wasm.specs).toEqual([
      {
        slot: 'lane',
        kind: wasm.kindOf(task()),
        timeoutMs: 50,
        restart: { type: 'onFailure' },
        backoff: DEFAULT_BACKOFF,
        admission: 'queue',
        maxRetries: 2,
        labels: {},
        runnerSelector: {
          matchLabels: { zone: 'eu', [CAPABILITY_LABEL]: 'a' },
          matchExpressions: [],
        },
      },
    ]);
    expect(prepare(roster, task()).task.name).toMatch(/^compute-5b1f3c52-.*-\d+$/);
    expect(wasm.specs[1]).toMatchObject({ slot: task().id, timeoutMs: 86_400_000 });
  });

  test('goes to the plugin of its capability, though another of the kind was first, and by labels among those', () => {
    const [other, plain, gpu] = [generic('b', 'other'), generic('a', 'plain'), generic('a', 'gpu')];
    const roster = new Roster([other, plain, { runner: gpu, labels: { gpu: 'a100' } }]);
    expect(prepare(roster, task()).task.name).toMatch(/^plain-/);
    expect(prepare(roster, task({ capability_filters: { gpu: 'a100' } })).task.name).toMatch(/^gpu-/);
    expect(prepare(roster, task({ capability_filters: { gpu: { In: ['a100'] } } })).task.name).toMatch(
      /^gpu-/,
    );
    expect(prepare(roster, task({ capability_filters: { gpu: { NotIn: ['a100'] } } })).task.name).toMatch(
      /^plain-/,
    );
    // The dispatcher matched them by rules of its own.
    expect(prepare(roster, task({ capability_filters: { gpu: 7 } })).task.name).toMatch(/^plain-/);
    expect(prepare(roster, task({ capability_filters: { gpu: 'other' } })).task.name).toMatch(/^plain-/);
    expect(other.specs).toEqual([]);
  });

  test('that its plugin cannot build is refused, with the name of the mistake', () => {
    const embedded = generic('a', 'x', { type: 'embedded' });
    expect(() => prepare(new Roster([embedded]), task())).toThrow(
      expect.objectContaining({ variant: 'NoRunner' }) as Error,
    );
    const container = generic('a', 'x', {
      type: 'container',
      image: 'i',
      command: null,
      args: [],
      env: [],
      extensions: {},
    });
    expect(() => prepare(new Roster([container]), task())).toThrow(
      'no suitable runner for task kind: container (no runner supports the kind)',
    );
    const picky = {
      ...generic('a', 'x'),
      kindOf: (): never => {
        throw new MillraceError('invalid_argument', 'meta.ref is missing');
      },
    };
    expect(() => prepare(new Roster([picky]), task())).toThrow('invalid specification: meta.ref is missing');
  });

  test('has the bounds of its runner above those of the node', () => {
    const roster = new Roster([runner('a'), { runner: runner('b'), supervision: { maxRetries: 7 } }], {
      supervision: { maxRetries: 1, floorMs: 5 },
    });
    const retries = { supervision: { maxRetries: 2 } };
    expect(() => prepare(roster, task({ meta: retries }))).toThrow(/maxRetries must be at most 1/);
    expect(prepare(roster, task({ capability: 'b', meta: retries })).supervision).toMatchObject({
      maxRetries: 2,
      floorMs: 5,
    });
    expect(() => new Roster([{ runner: runner('b'), supervision: { timeoutMs: 0 } }])).toThrow(
      /^supervision of b.timeoutMs: timeout must be greater than zero/,
    );
  });

  test('of two plugins of one name there is only one', () => {
    expect(() => new Roster([generic('a', 'x'), generic('b', 'x')])).toThrow('duplicate runner name: x');
  });
});
