import { chmod, mkdir, readdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import type { Json } from '@millrace/runner';
import {
  createTestContext,
  runnerSuite,
  type TestContext,
  type TestContextOptions,
} from '@millrace/runner/testing';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Programs, alive } from '../programs.test.support.ts';
import { golemRunner, type GolemRunnerOptions } from './golem-runner.ts';
import type { ScriptResult } from './exe-script.ts';

let programs: Programs;
let shell: string;

/** Commands are shell scripts in the work directory. */
const SHELL = `
  deploy: () => ({ vols: [{ name: 'v-in', path: '/in' }, { name: 'v-out', path: '/out' }] }),
  runCommand: (ctx, run) => ctx.command(async (command) => {
    await command.counter('probe.runs', 1);
    await command.spawn('/bin/sh', ['-c', run.args.join(' ')], { cwd: ctx.cli.workdir });
  })`;

beforeAll(async () => {
  programs = await Programs.open();
  shell = await programs.runtime(SHELL);
});
afterAll(() => programs[Symbol.asyncDispose]());

const sh = (script: string, capture: object = {}): Json =>
  ({ run: { entry_point: 'sh', args: [script], capture } }) as Json;
const script = (...commands: Json[]): Json[] => [{ deploy: {} }, { start: {} }, ...commands];
const STREAM = { stdout: { stream: {} } };

async function perform(
  meta: { [key: string]: Json },
  context: TestContextOptions = {},
  options: Partial<GolemRunnerOptions> = {},
  during?: (ctx: TestContext) => void,
): Promise<{ ctx: TestContext; error: Error | null }> {
  const workDir = programs.path('work');
  const runner = golemRunner({ runtime: { path: shell, name: 'shell' }, workDir, ...options });
  const ctx = createTestContext({ ...context, task: { ...context.task, meta } });
  during?.(ctx);
  const error = await runner.run(ctx).then(
    () => null,
    (thrown: unknown) => thrown as Error,
  );
  await ctx.close();
  // Whatever happened, the task's folder is gone.
  expect(await readdir(workDir).catch(() => [])).toEqual([]);
  return { ctx, error };
}

const text = (ctx: TestContext, name: string): string => Buffer.from(ctx.outputs.get(name)!).toString();
const results = (ctx: TestContext): ScriptResult[] =>
  JSON.parse(text(ctx, 'exe-results.json')) as ScriptResult[];

describe('as any runner', () => {
  runnerSuite(
    // Made when the first test runs, after the programs are there.
    () => Promise.resolve(golemRunner({ runtime: { path: shell, name: 'shell' } })),
    {
      test,
      cases: [
        {
          name: 'a script',
          context: {
            inputs: { a: 'hello' },
            task: { meta: { exe_script: script(sh('tr a-z A-Z < v-in/a > v-out/b')) } as never },
          },
          outputs: ['b', 'exe-results.json'],
          check: (ctx) => expect(text(ctx, 'b')).toBe('HELLO'),
          // Results carry times.
          deterministic: false,
        },
      ],
    },
  );
});

describe('a task', () => {
  let current: TestContext | null = null;

  test('has its inputs as files of a volume, and the files of the other as artifacts', async () => {
    const { ctx, error } = await perform(
      {
        exe_script: script(
          sh('ls v-in > v-out/names; mkdir v-out/d; cat v-in/one v-in/second v-in/1-one > v-out/d/all'),
        ),
        input_names: ['one', 'one', 'second'],
      },
      { inputs: { x: 'X', y: 'Y', z: 'Z' } },
    );
    expect(error).toBeNull();
    expect([...ctx.outputs.keys()].toSorted()).toEqual(['d/all', 'exe-results.json', 'names']);
    expect(text(ctx, 'names')).toBe('1-one\none\nsecond\n');
    expect(text(ctx, 'd/all')).toBe('XZY');
  });

  test('may bring the image of the runtime as one of its inputs, which is then no file of the volume', async () => {
    const runtime = await programs.runtime(`
      deploy: async (ctx) => {
        console.error(await (await import('node:fs/promises')).readFile(ctx.cli.taskPackage, 'utf8'));
        return { vols: [{ name: 'v-in', path: '/in' }, { name: 'v-out', path: '/out' }] };
      },
      runCommand: (ctx, run) => ctx.command((command) => command.spawn('/bin/ls', [ctx.cli.workdir + '/v-in']))`);
    const own = { runtime: { path: runtime, name: 'shell' } };
    const inputs = { x: 'X', y: 'Y' };
    const capture = { stdout: { atEnd: {} } };
    for (const [task_package, image, listed] of [
      ['input:0', 'X', 'y\n'],
      ['input:y', 'Y', 'x\n'],
    ] as const) {
      const meta = { task_package, exe_script: script(sh('', capture)) };
      const { ctx, error } = await perform(meta, { inputs }, own);
      expect(error).toBeNull();
      expect([results(ctx)[0]!.stderr, results(ctx)[2]!.stdout]).toEqual([`${image}\n`, listed]);
    }
    for (const task_package of ['input:2', 'input:z', 'x', 7]) {
      const { error } = await perform({ task_package, exe_script: script() }, { inputs }, own);
      expect(error?.message).toContain("must be one of the task's 2 inputs");
    }
    const fixed = { ...own, taskPackage: runtime };
    const { error } = await perform({ task_package: 'input:0', exe_script: script() }, { inputs }, fixed);
    expect(error?.message).toContain('meta.task_package must be left out');
  });

  test('tells events, progress, results and usage of each command', async () => {
    const { ctx } = await perform({ exe_script: script(sh('printf out; printf err >&2', STREAM)) });
    expect(ctx.progressValues).toEqual([1, 2, 3].map((done) => ({ done, total: 3, unit: 'commands' })));
    const kinds = ctx.events.filter((event) => (event as { type: string }).type === 'exe_event') as {
      index: number;
      kind: Json;
    }[];
    expect(kinds.filter(({ index }) => index === 2).map(({ kind }) => kind)).toEqual([
      { started: { command: { run: { entry_point: 'sh', args: ['printf out; printf err >&2'] } } } },
      { stdout: 'out' },
      { finished: { return_code: 0, message: null } },
    ]);
    expect(ctx.events).toContainEqual({ type: 'exe_counter', name: 'probe.runs', value: 1 });
    expect(ctx.events).toContainEqual({
      type: 'exe_usage',
      usage: expect.objectContaining({ 'probe.runs': 1 }),
    });
    expect(ctx.events).toContainEqual(
      expect.objectContaining({ type: 'exe_result', index: 2, result: 'Ok' }),
    );
    expect(results(ctx)[2]).toMatchObject({
      index: 2,
      result: 'Ok',
      stdout: 'out',
      stderr: null,
      message: null,
      isBatchFinished: true,
    });
  });

  test('moves files with transfer, between volumes and its own storage only', async () => {
    const { ctx, error } = await perform(
      {
        exe_script: script(
          { transfer: { from: 'input:0', to: 'container:/in/deep/file' } },
          { transfer: { from: 'container:/in/deep/file', to: 'container:/out/copy' } },
          { transfer: { from: 'container:/in/deep/file', to: 'output:sent/file' } },
          { transfer: { from: 'input:data', to: 'output:direct' } },
        ),
      },
      { inputs: { data: 'DATA' } },
    );
    expect(error).toBeNull();
    for (const name of ['copy', 'sent/file', 'direct']) expect(text(ctx, name)).toBe('DATA');
  });

  test.each([
    [{ from: 'container:/in/../../secret', to: 'output:x' }, 'without "//", "." or ".."'],
    [{ from: 'container:/etc/passwd', to: 'output:x' }, 'outside of all volumes (/in, /out)'],
    [{ from: 'container:/in/none', to: 'output:x' }, '"none" in volume v-in does not exist'],
    [{ from: 'input:7', to: 'output:x' }, 'the task has 0 inputs'],
    [{ from: 'gftp://x/y', to: 'output:x' }, 'transfer from gftp: is not offered'],
    [{ from: 'container:/in/x', to: 'http://x/y' }, 'transfer to http: is not offered'],
    [{ from: 'x', to: 'output:x' }, 'must be a URL'],
  ])('fails with transfer %j', async (transfer, message) => {
    const { error } = await perform({ exe_script: script({ transfer }) });
    expect(error?.message).toContain('exe_script command 2 (transfer)');
    expect(error?.message).toContain(message);
  });

  test('fails with its first command that fails, and the rest is not run', async () => {
    const { ctx, error } = await perform({
      exe_script: script(
        sh('echo no such thing >&2; exit 3', { stderr: { atEnd: {} } }),
        sh('touch v-out/never'),
      ),
    });
    expect(error?.message).toBe(
      'exe_script command 2 (run sh): ExeScript command exited with code 3: no such thing',
    );
    expect(ctx.events).toContainEqual(
      expect.objectContaining({ type: 'exe_result', index: 2, result: 'Error', isBatchFinished: true }),
    );
    expect([...ctx.outputs.keys()]).toEqual([]);
  });

  test.each([
    [{}, 'meta.exe_script is missing'],
    [{ exe_script: [{ fly: {} }] }, 'unknown command "fly"'],
    [{ exe_script: [{ start: {} }] }, 'Activity is initialized - deploy() command is expected now'],
    [{ exe_script: [{ deploy: { net: [{}] } }] }, 'asks for networks'],
    [{ exe_script: [], input_names: ['../x'] }, 'meta.input_names must be'],
    [{ exe_script: [], input_volume: 3 }, 'meta.input_volume must be a path, got 3'],
    [{ exe_script: script(), output_volume: '/nowhere' }, 'outside of all volumes'],
  ] as [{ [key: string]: Json }, string][])('with meta %j is refused', async (meta, message) => {
    expect((await perform(meta)).error?.message).toContain(message);
  });

  test('leaves links and pipes out of its artifacts', async () => {
    const { ctx, error } = await perform({
      exe_script: script(
        sh('ln -s /etc/passwd v-out/link; ln -s /etc v-out/folder; mkfifo v-out/pipe; echo x > v-out/real'),
      ),
    });
    expect(error).toBeNull();
    expect([...ctx.outputs.keys()].toSorted()).toEqual(['exe-results.json', 'real']);
    expect(
      ctx.logs.filter(({ message }) => message.includes('no regular file')).map(({ fields }) => fields.path),
    ).toEqual(['folder', 'link', 'pipe']);
  });

  test.each([
    ['outputFiles', 2, 'touch v-out/1 v-out/2', 'touch v-out/1 v-out/2 v-out/3'],
    ['outputTotalBytes', 10, 'printf 0123456789 > v-out/x', 'printf 0123456789a > v-out/x'],
    ['outputDepth', 1, 'mkdir -p v-out/a; touch v-out/a/x', 'mkdir -p v-out/a/b; touch v-out/a/b/x'],
  ])('may reach the limit %s of %d, and fails past it', async (limit, value, at, past) => {
    const limits = { [limit]: value };
    expect((await perform({ exe_script: script(sh(at)) }, {}, { limits })).error).toBeNull();
    const { error } = await perform({ exe_script: script(sh(past)) }, {}, { limits });
    expect(error).toMatchObject({ code: 'resource_exhausted', message: expect.stringContaining(limit) });
  });

  test('may keep as much output as its limit, and fails past it', async () => {
    const meta = { exe_script: script(sh('printf 0123456789', { stdout: { atEnd: {} } })) };
    const { ctx } = await perform(meta);
    // Deploy and start keep theirs, too.
    const kept = results(ctx).reduce((sum, { stdout }) => sum + (stdout?.length ?? 0), 0);
    expect((await perform(meta, {}, { limits: { capturedBytes: kept } })).error).toBeNull();
    const { error } = await perform(meta, {}, { limits: { capturedBytes: kept - 1 } });
    expect(error?.message).toContain(`${kept} bytes, above the limit capturedBytes of ${kept - 1}`);
  });

  test('that is canceled ends with that, and nothing of it runs on', async () => {
    let pid = 0;
    const { error, ctx } = await perform(
      { exe_script: script(sh('trap "" TERM; echo $$; setsid sleep 600 & wait; wait', STREAM)) },
      {
        onCall: () => {
          // The call is recorded after this.
          setImmediate(() => {
            const kinds = current!.events.map((event) => (event as { kind?: { stdout?: string } }).kind);
            const output = kinds.map((kind) => kind?.stdout).find((stdout) => /^\d+\n$/.test(stdout ?? ''));
            if (output === undefined || pid !== 0) return;
            pid = Number(output);
            current!.abort('canceled');
          });
        },
      },
      { limits: { killGraceMs: 300, exitMs: 300, stopMs: 300 } },
      (made) => {
        current = made;
      },
    );
    expect(error).toBe(ctx.signal.reason);
    expect(error).toMatchObject({ reason: 'canceled' });
    expect(pid).toBeGreaterThan(0);
    expect(alive(pid)).toBe(false);
  });
});

describe('a runtime that ends too slowly', () => {
  test('is killed with all it has when the time after a cancel is over', async () => {
    const deaf = await programs.rawRuntime(`
      if (request.command.case === 'run') {
        process.on('SIGTERM', () => {});
        setInterval(() => {}, 1000);
        const child = spawn('sleep', ['600'], { stdio: 'ignore', detached: true });
        send({ id, command: { case: 'run', value: { pid: 1n } } });
        send({ event: true, command: { case: 'rtStatus', value: { kind: { case: 'counter', value: { name: 'child', value: child.pid } } } } });
      }`);
    let made: TestContext | null = null;
    let pid = 0;
    const startedAt = performance.now();
    const { error } = await perform(
      { exe_script: script({ run: { entry_point: 'x' } }) },
      {
        onCall: () => {
          setImmediate(() => {
            const counter = made!.events.find((event) => (event as { name?: string }).name === 'child');
            if (counter === undefined || pid !== 0) return;
            pid = (counter as { value: number }).value;
            made!.abort('canceled');
          });
        },
      },
      { runtime: { path: deaf, name: 'deaf' }, limits: { abortMs: 500 } },
      (ctx) => {
        made = ctx;
      },
    );
    expect(error).toMatchObject({ reason: 'canceled' });
    // The steps of the supervisor alone would take more than ten seconds.
    expect(performance.now() - startedAt).toBeLessThan(9_000);
    expect(alive(pid)).toBe(false);
  });
});

describe('the runner', () => {
  test('takes a runtime from a plugin descriptor, with its arguments', async () => {
    const runtime = await programs.runtime(`
      cli: { positionals: [{ name: 'profile' }] },
      deploy: (ctx) => { console.error(JSON.stringify([ctx.cli.positionals, ctx.cli.taskPackage, ctx.cli.cpuCores])); },
      runCommand: () => 0`);
    const dir = programs.path('plugins');
    await mkdir(dir, { recursive: true });
    const entry = (name: string, extraArgs: string[]): object => ({
      name,
      version: '1.0.0',
      'supervisor-path': 'x',
      'runtime-path': runtime,
      'extra-args': extraArgs,
    });
    await writeFile(
      path.join(dir, 'ya-test.json'),
      JSON.stringify([
        entry('plain', []),
        entry('managed', ['--runtime-managed-image', '--cap-handoff', '--runtime-arg', 'small']),
      ]),
    );
    for (const [descriptor, expected] of [
      ['plain', `[{"profile":null},${JSON.stringify(runtime)},null]`],
      ['managed', '[{"profile":"small"},null,4]'],
    ] as const) {
      const options = {
        runtime: { descriptor, dirs: [dir] },
        taskPackage: runtime,
        hardware: { cpuCores: 4 },
      };
      expect(golemRunner(options).capability).toBe(`/golem/${descriptor}/v1`);
      const { ctx } = await perform({ exe_script: [{ deploy: {} }] }, {}, options);
      expect(results(ctx)[0]!.stderr).toBe(`${expected}\n`);
    }
    expect(() => golemRunner({ runtime: { descriptor: 'other', dirs: [dir] } })).toThrow(
      'known: plain, managed',
    );
  });

  test('is named by its file, and refuses one that cannot be run', async () => {
    expect(golemRunner({ runtime: { path: shell } }).capability).toBe(`/golem/${path.parse(shell).name}/v1`);
    expect(() => golemRunner({ runtime: { path: programs.path('none') } })).toThrow('does not exist');
    const plain = await programs.module('');
    await chmod(plain, 0o644);
    expect(() => golemRunner({ runtime: { path: plain } })).toThrow('is not executable');
    expect(() => golemRunner({ runtime: { path: programs.dir } })).toThrow('is not a file');
    expect(() => golemRunner({ runtime: { path: shell }, taskPackage: programs.path('image') })).toThrow(
      `task package ${programs.path('image')} does not exist`,
    );
    expect(() => golemRunner({ runtime: { path: shell }, limits: { runMs: -1 } })).toThrow('limits.runMs');
    expect(() => golemRunner({ runtime: { path: shell }, capability: 'a b' })).toThrow('white space');
  });
});
