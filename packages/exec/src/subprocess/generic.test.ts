import { describe, expect, test } from 'vitest';
import type { Json, JsonObject } from '@millrace/runner';
import { MAX_SCRIPT_BYTES, taskSpec, type TaskKind } from '@millrace/runner/model';
import { RunnerError, makeRunId } from '@millrace/runner/plugin';
import { createTestContext } from '@millrace/runner/testing';
import { subprocessRunner, type SubprocessRunnerOptions } from './generic.ts';
import { fail, perform, printed, succeed } from './programs.test.support.ts';
import { programOf, subprocessExtras, subprocessKindOf } from './subprocess-kind.ts';

function runner(options: Partial<SubprocessRunnerOptions> = {}): ReturnType<typeof subprocessRunner> {
  return subprocessRunner({
    allow: ['sh', 'cat', 'env', 'bash', 'printf'],
    sandbox: { tier: 'none' },
    ...options,
  });
}

function command(name: string, args: string[] = [], more: JsonObject = {}): { readonly meta: JsonObject } {
  return { meta: { mode: { command: { command: name, args } }, ...more } };
}

describe('/exec/subprocess/v1', () => {
  test('is off unless commands are allowed', () => {
    expect(() => subprocessRunner({ allow: [] })).toThrow(
      /^\/exec\/subprocess\/v1: allow must list the commands/,
    );
    expect(() => subprocessRunner({ allow: ['bin/tool'] })).toThrow(
      /names or absolute paths, got "bin\/tool"/,
    );
    expect(runner().capability).toBe('/exec/subprocess/v1');
  });

  test('runs an allowed command over named inputs and collects its outputs', async () => {
    const { ctx } = await succeed(runner(), {
      inputs: { x: 'content' },
      task: command('sh', ['-c', 'cat "$1" > "$2"', 'sh', '{input:in.txt}', '{output:out.txt}'], {
        inputs: ['in.txt'],
        outputs: ['*.txt'],
      }),
    });
    expect(Buffer.from(ctx.outputs.get('out.txt')!).toString()).toBe('content');
  });

  test('refuses a command that is not allowed, however it is written', async () => {
    for (const name of ['ls', '/bin/sh', '../bin/sh', './sh']) {
      const { error } = await fail(runner(), { task: command(name) });
      expect(error).toMatchObject({ code: 'permission_denied' });
      expect(error.message).toContain(
        `command ${JSON.stringify(name)} is not allowed on this node; allowed: sh, cat, env`,
      );
    }
  });

  test('a script runs from a file, with its arguments', async () => {
    const body = Buffer.from('echo "$# $1"; exit 4').toString('base64');
    const { error, ctx } = await perform(runner(), {
      task: { meta: { mode: { script: { runtime: 'bash', body, args: ['a b'] } } } },
    });
    expect(error).toMatchObject({ details: { exit_code: 4 } });
    expect(printed(ctx)).toEqual(['1 a b']);
    const python = await fail(runner(), {
      task: { meta: { mode: { script: { runtime: 'python', body } } } },
    });
    expect(python.error.message).toContain('command "python3" is not allowed');
  });

  test('variables must be allowed, the last of a name wins, and the operator wins over all', async () => {
    const env = [
      { key: 'A', value: 'task-1' },
      { key: 'A', value: 'task-2' },
      { key: 'B', value: 'task' },
    ];
    const { ctx } = await succeed(runner({ allowEnv: ['A', 'B'], env: { B: 'operator' } }), {
      task: command('env', [], { env }),
    });
    expect(printed(ctx)).toEqual(expect.arrayContaining(['A=task-2', 'B=operator']));
    const { error } = await fail(runner(), {
      task: command('env', [], { env: [{ key: 'LD_PRELOAD', value: '/x' }] }),
    });
    expect(error).toMatchObject({ code: 'permission_denied' });
    expect(error.message).toContain('variable LD_PRELOAD is not allowed on this node; allowed: none');
  });

  test('limits may be lowered to what is allowed, and not raised past it', async () => {
    const options = { limits: { wallMs: 5_000, graceMs: 0 } };
    await succeed(runner(options), { task: command('sh', ['-c', 'true'], { limits: { wallMs: 5_000 } }) });
    const high = await fail(runner(options), { task: command('sh', [], { limits: { wallMs: 5_001 } }) });
    expect(high.error.message).toBe(
      'meta.limits.wallMs must be at most 5000, which is what this node allows, got 5001',
    );
    const low = await fail(runner(options), {
      task: command('sh', ['-c', 'sleep 60'], { limits: { wallMs: 100 } }),
    });
    expect(low.error).toMatchObject({ code: 'deadline_exceeded', details: { limit: 'wallMs', value: 100 } });
  });

  test('stdin, failOnNonZero and a folder of its own are as asked for', async () => {
    const { ctx, usage } = await succeed(runner(), {
      task: command('sh', ['-c', 'cat; pwd; exit 5'], {
        stdin: { text: 'typed\n' },
        failOnNonZero: false,
        cwd: 'sub/folder',
      }),
    });
    expect(printed(ctx)[0]).toBe('typed');
    expect(printed(ctx)[1]).toMatch(/\/work\/sub\/folder$/);
    expect(usage['exit_code']).toBe(5);
  });
});

describe('meta as the kind "subprocess"', () => {
  const mode: JsonObject = { command: { command: 'ls' } };
  const script = (more: JsonObject): JsonObject => ({
    mode: { script: { runtime: 'bash', body: 'ZWNobw==', ...more } },
  });

  test("may stand under a member of that name, beside what is not the runner's", () => {
    const wrapped = subprocessKindOf({
      subprocess: { mode, cwd: 'a' },
      traceparent: 'x',
      supervision: {},
    });
    expect(programOf(wrapped.mode).command).toBe('ls');
    expect(subprocessExtras(wrapped, 'meta').cwd).toBe('a');
    const plain = subprocessKindOf({ mode, supervision: {}, env: { A: '1' }, cwd: null });
    expect(plain).toEqual({
      type: 'subprocess',
      mode: { type: 'command', command: 'ls', args: [] },
      env: [{ key: 'A', value: '1' }],
      cwd: null,
      failOnNonZero: true,
      extensions: {},
    });
    expect(subprocessExtras(plain, 'meta')).toEqual({
      cwd: '',
      inputs: null,
      outputs: [],
      stdin: 'none',
      limits: {},
    });
  });

  test('a script of 2 MiB is taken, and one byte more is not', () => {
    const body = (bytes: number): string => Buffer.alloc(bytes, 'x').toString('base64');
    expect(programOf(subprocessKindOf(script({ body: body(MAX_SCRIPT_BYTES) })).mode).script).toHaveLength(
      MAX_SCRIPT_BYTES,
    );
    expect(() => subprocessKindOf(script({ body: body(MAX_SCRIPT_BYTES + 1) }))).toThrow(
      'meta.mode.script.body: script body must be at most 2097152 bytes, it has 2097153',
    );
  });

  test.each<[Json, string]>([
    [null, 'meta: must be an object, got null, or it is missing'],
    [{}, 'meta.mode: must be an object, got null, or it is missing'],
    [{ mode: {} }, 'meta.mode must have either command or script'],
    [
      { mode: { ...mode, ...(script({})['mode'] as JsonObject) } },
      'meta.mode must have either command or script',
    ],
    [
      { mode: { command: { command: ' ' } } },
      'meta.mode.command.command: subprocess command cannot be empty',
    ],
    [
      { mode: { command: { command: 'ls', args: [1] } } },
      'meta.mode.command.args[0] must be a string, got 1',
    ],
    [{ mode: { command: { command: 'ls', arguments: [] } } }, 'meta.mode.command.arguments: is unknown'],
    [script({ flag: '-c' }), 'meta.mode.script.flag: is unknown'],
    [script({ runtime: { custom: { command: 'a', flag: 'b', c: 1 } } }), 'custom.c: is unknown'],
    [{ mode, comand: 1 }, 'meta.comand: is unknown; meta may have: mode, env'],
    [{ subprocess: { mode, x: 1 } }, 'meta.subprocess.x: is unknown'],
    [{ mode, env: [{ key: 'A B', value: '1' }] }, 'meta.env[0] must be named by letters'],
    [{ mode, env: [{ key: 'A', value: 1 }] }, 'meta.env[0] must be a string'],
    [{ mode, env: [{ key: 'MILLRACE_TASK_ID', value: '1' }] }, 'meta.env[0] must not be one of MILLRACE_*'],
    [{ mode, cwd: '/etc' }, 'meta.cwd "/etc" must not be absolute'],
    [{ mode, cwd: '../x' }, 'meta.cwd "../x" must not have empty, "." or ".." segments'],
    [{ mode, failOnNonZero: 1 }, 'meta.failOnNonZero must be true or false, got 1'],
    [{ mode, inputs: ['a', 'a'] }, 'meta.inputs[1] "a" is there twice'],
    [{ mode, inputs: ['..'] }, 'meta.inputs[0] ".." must not have'],
    [{ mode, stdin: 'tty' }, 'meta.stdin: must be "none", "input" or {"text": …}, got "tty"'],
    [script({ body: '' }), 'meta.mode.script.body: script body cannot be empty'],
    [script({ body: 'not base64' }), 'meta.mode.script.body: invalid base64 body'],
    [script({ body: '/w==' }), 'meta.mode.script.body: not valid UTF-8'],
    [
      script({ runtime: 'ruby' }),
      'meta.mode.script.runtime must be bash, python, node or {"custom": {"command", "flag"}}, got "ruby"',
    ],
    [script({ runtime: { custom: { command: ' ', flag: '-e' } } }), 'custom runtime command cannot be empty'],
    [script({ runtime: { custom: { command: 'ruby', flag: '' } } }), 'custom runtime flag cannot be empty'],
  ])('%j is refused', (meta, message) => {
    expect(() => subprocessKindOf(meta)).toThrow(message);
  });
});

describe('the plugin of /exec/subprocess/v1', () => {
  const kind: TaskKind = {
    type: 'subprocess',
    mode: { type: 'command', command: 'env', args: [] },
    env: [{ key: 'A', value: 'task' }],
    cwd: null,
    failOnNonZero: true,
    extensions: {},
  };
  const spec = (kind: TaskKind) => taskSpec({ slot: 's', kind, timeoutMs: 1_000 });
  const context = (env: { readonly key: string; readonly value: string }[] = []) => ({
    env,
    metrics: { recordRunnerError: () => undefined },
  });

  test('is named after the kind, or after its capability, or as the operator says', () => {
    expect(runner().plugin.name).toBe('subprocess');
    expect(runner({ capability: '/tools/gpu/v1' }).plugin.name).toBe('tools-gpu-v1');
    expect(runner({ capability: '/tools/gpu/v1', name: 'gpu' }).plugin.name).toBe('gpu');
  });

  test("builds what may run many times, with the variables of the router below the runner's and above the task's", async () => {
    const { plugin } = runner({ allowEnv: ['A', 'B', 'C'], env: { C: 'runner' } });
    expect(plugin.supports(spec(kind))).toBe(true);
    const lent = ['A', 'B', 'C'].map((key) => ({ key, value: 'router' }));
    const built = plugin.buildTask(spec(kind), context(lent), makeRunId(plugin.name, 's'));
    expect(built.name).toMatch(/^subprocess-s-\d+$/);
    for (let i = 0; i < 2; i += 1) {
      await using ctx = createTestContext({});
      await built.run(ctx);
      expect(printed(ctx)).toEqual(expect.arrayContaining(['A=router', 'B=router', 'C=runner']));
    }
  });

  test('refuses another kind, and what is not allowed, before anything is started', () => {
    const { plugin } = runner();
    const build =
      (kind: TaskKind, env = context()) =>
      (): unknown =>
        plugin.buildTask(spec(kind), env, makeRunId('x', 's'));
    const wasm: TaskKind = { type: 'wasm', module: 'm', args: [], env: [], extensions: {} };
    expect(plugin.supports(spec(wasm))).toBe(false);
    expect(build(wasm)).toThrow("unsupported task kind for runner 'subprocess': wasm");
    expect(build({ ...kind, mode: { type: 'command', command: 'ls', args: [] } })).toThrow(
      expect.objectContaining({ variant: 'InvalidSpec', code: 'permission_denied' }) as RunnerError,
    );
    expect(build(kind)).toThrow(/^invalid specification: meta.env: variable A is not allowed/);
    expect(build({ ...kind, env: [], extensions: { output: [] } })).toThrow(/meta.output: is unknown/);
    expect(build({ ...kind, env: [] }, context([{ key: 'a b', value: '' }]))).toThrow(
      /env\[0\] must be named/,
    );
  });
});
