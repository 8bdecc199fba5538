import { execFile } from 'node:child_process';
import { chmod, mkdir, readdir, writeFile } from 'node:fs/promises';
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { describe, expect, test, vi } from 'vitest';
import { MillraceError, TaskAbort, type JsonObject } from '@millrace/runner';
import { createTestContext, runnerSuite } from '@millrace/runner/testing';
import { SANDBOX_TIERS } from '../sandbox/controls.ts';
import {
  NODE_READABLE,
  fail,
  needsControl,
  needsTier,
  nodeProgram,
  perform,
  printed,
  processesWith,
  report,
  shell,
  sleepToken,
  succeed,
  temporaryFolder,
  until,
  untilPrinted,
} from './programs.test.support.ts';
import { subprocess, type SubprocessOptions } from './subprocess.ts';

const MIB = 1024 ** 2;
const plain = { sandbox: { tier: 'none' } } as const;

describe('binding a program to a capability', () => {
  test('inputs arrive by name, arguments by placeholder, and outputs are uploaded', async () => {
    const runner = subprocess({
      capability: '/test/join/v1',
      command: 'sh',
      args: [
        '-c',
        'cat "$1" "$2" > "$3"; echo "$4"',
        'sh',
        '{input:a}',
        '{input:b}',
        '{output:sum.txt}',
        'w={meta:width=7}',
      ],
      inputs: ['a', 'b'],
    });
    const { ctx, usage } = await succeed(runner, {
      inputs: { one: '1\n', two: '22\n' },
      task: { meta: { width: 9 } },
    });
    expect(Buffer.from(ctx.outputs.get('sum.txt')!).toString()).toBe('1\n22\n');
    expect(printed(ctx)).toEqual(['w=9']);
    expect(usage).toMatchObject({ bytes_in: 5, bytes_out: 5, exit_code: 0, signal: null });
  });

  test('inputs without names have the names they are stored by, and {inputs} is all of them', async () => {
    const runner = subprocess({
      capability: '/test/v1',
      command: 'sh',
      args: ['-c', 'for f; do echo "${f##*/}"; done', 'sh', '{inputs}'],
    });
    const { ctx } = await succeed(runner, {
      inputs: {
        x: { content: '1', name: 'my photo.jpg' },
        y: { content: '2', name: 'my photo.jpg' },
        z: { content: '3', name: '../..' },
        dash: [
          { content: '4', name: '-rf' },
          { content: '5', name: 'part' },
        ],
      },
    });
    expect(printed(ctx)).toEqual(['my_photo.jpg', 'my_photo-2.jpg', 'input-3', 'rf']);
  });

  test('a task with another number of inputs, or meta that does not fit, fails before anything is fetched', async () => {
    const runner = (): ReturnType<typeof subprocess> =>
      subprocess({
        capability: '/test/v1',
        command: 'true',
        args: ['{input:a}', '{meta:size}'],
        inputs: ['a'],
        params: { size: { type: 'integer', minimum: 1, maximum: 9 } },
      });
    const many = await fail(runner(), { inputs: { x: '1', y: '2' }, task: { meta: { size: 1 } } });
    expect(many.error.message).toContain('inputs_cids must name 1 inputs (a), it names 2');
    const big = await fail(runner(), { inputs: { x: '1' }, task: { meta: { size: 10 } } });
    expect(big.error).toMatchObject({
      code: 'invalid_argument',
      message: 'meta.size must be at most 9, got 10',
    });
    expect(big.ctx.calls.filter(({ port }) => port === 'input')).toEqual([]);
  });

  test.each<[string, Partial<SubprocessOptions>, RegExp]>([
    ['an empty command', { command: ' ' }, /command cannot be empty/],
    [
      'a placeholder with a typing error',
      { args: ['{ouput:x}'] },
      /args\[0\]: \{ouput:x\} is no placeholder/,
    ],
    [
      'an input that is not declared',
      { args: ['{input:b}'], inputs: ['a'] },
      /\{input:b\}, which is not one of inputs \(a\)/,
    ],
    [
      'a meta value that is not declared',
      { args: ['{meta:b}'], params: {} },
      /\{meta:b\}, which params do not declare/,
    ],
    [
      'an input both streamed and stored',
      { args: ['{input:a}'], inputs: ['a'], stdin: 'input' },
      /given as stdin/,
    ],
    [
      'an output that climbs',
      { outputs: ['../x'] },
      /outputs\[0\] "\.\.\/x" must not have empty, "\." or "\.\." segments/,
    ],
    ['an absolute output', { outputs: ['/etc/passwd'] }, /must not be absolute/],
    [
      'an output of 300 characters',
      { args: [`{output:${'x'.repeat(300)}}`] },
      /at most 255 bytes long, it has 300/,
    ],
    [
      'an input name with a slash',
      { inputs: ['a/b'] },
      /inputs\[0\] "a\/b" must be a file name without "\/"/,
    ],
    ['a reserved variable', { env: { MILLRACE_X: '1' } }, /env\.MILLRACE_X must not be one of MILLRACE_\*/],
    [
      'a variable the node does not have',
      { envFrom: ['NO_SUCH_VARIABLE'] },
      /envFrom names NO_SUCH_VARIABLE/,
    ],
    [
      'an unknown limit',
      { limits: { memory: 1 } as never },
      /limits\.memory is not a limit; there are: wallMs/,
    ],
    [
      'a limit below the least',
      { limits: { openFiles: 15 } },
      /limits\.openFiles must be a whole number of at least 16, got 15/,
    ],
    ['an unknown tier', { sandbox: { tier: 'jail' as never } }, /sandbox\.tier must be auto, none/],
    [
      'an unknown control',
      { sandbox: { require: ['gpu' as never] } },
      /sandbox\.require must be of wall, memory/,
    ],
    ['a relative working folder', { cwd: 'x' }, /cwd must be an absolute path/],
  ])('%s is refused when the runner is made', (_, options, message) => {
    const make = (): unknown => subprocess({ capability: '/test/v1', command: 'true', ...options });
    expect(make).toThrow(message);
    expect(make).toThrow(/^subprocess \/test\/v1: /);
  });

  test('the environment is clean: nothing of the node but what is let through by name, and ours', async () => {
    vi.stubEnv('MILLRACE_TEST_SECRET', 'do not tell');
    vi.stubEnv('GRANTED', 'told');
    const traceparent = `00-${'a'.repeat(32)}-${'b'.repeat(16)}-01`;
    const { ctx } = await succeed(shell('env', { ...plain, env: { LANG: 'C' }, envFrom: ['GRANTED'] }), {
      task: { meta: { traceparent } },
    });
    vi.unstubAllEnvs();
    const ofTheShell = new Set(['PWD', 'OLDPWD', 'SHLVL', '_']);
    const names = printed(ctx).map((line) => line.split('=')[0] ?? '');
    expect(names.filter((name) => !ofTheShell.has(name)).toSorted((a, b) => (a < b ? -1 : 1))).toEqual([
      'GRANTED',
      'HOME',
      'LANG',
      'MILLRACE_EVENTS_FD',
      'MILLRACE_INPUTS',
      'MILLRACE_JOB_ID',
      'MILLRACE_OUTPUTS',
      'MILLRACE_RUN_ID',
      'MILLRACE_TASK_ID',
      'PATH',
      'TMPDIR',
      'TRACEPARENT',
    ]);
    expect(printed(ctx)).toEqual(
      expect.arrayContaining([
        'GRANTED=told',
        'LANG=C',
        `TRACEPARENT=${traceparent}`,
        'MILLRACE_EVENTS_FD=3',
      ]),
    );
  });

  test('the trace of the lease reaches the program, before the one of the meta', async () => {
    const [ofLease, ofMeta] = ['a', 'c'].map((digit) => `00-${digit.repeat(32)}-${'b'.repeat(16)}-01`);
    const { ctx } = await succeed(shell('echo "$TRACEPARENT"', plain), {
      lease: { traceparent: ofLease! },
      task: { meta: { traceparent: ofMeta!, tracestate: 'a=b' } },
    });
    expect(printed(ctx)).toEqual([ofLease]);
  });

  test('progress, events and log lines arrive; what is not understood is counted and never fatal', async () => {
    const text = `
      echo '{"progress": {"done": 1}}' >&3
      echo 'no json' >&3
      printf '\\377\\376\\n' >&3
      echo '[1]' >&3
      echo '{"event": {"kind": "usage", "cpu_ms": 0}}' >&3
      head -c 200000 /dev/zero | tr '\\0' x >&3; echo >&3
      echo '{"event": {"kind": "frame"}, "log": "half", "level": "error"}' >&3
      printf '{"progress": {"done": 2}}' >&3`;
    const { ctx, usage } = await succeed(shell(text));
    expect(ctx.progressValues).toEqual([{ done: 1 }, { done: 2 }]);
    expect(ctx.events.filter((event) => (event as JsonObject)['kind'] === 'frame')).toHaveLength(1);
    expect(ctx.events.filter((event) => (event as JsonObject)['kind'] === 'usage')).toEqual([usage]);
    expect(ctx.logs).toContainEqual({ level: 'error', message: 'half', fields: { stream: 'events' } });
    expect(ctx.logs.find(({ fields }) => 'lines' in fields)?.fields).toEqual({ lines: 5, first: 'no json' });
  });

  test('events are read up to the limit, and not a byte more', async () => {
    const line = '{"progress":1}\n';
    const text = `i=0; while [ $i -lt 10 ]; do echo '${line.trim()}' >&3; i=$((i+1)); done`;
    const at = await succeed(shell(text, { ...plain, limits: { eventBytes: 10 * line.length } }));
    expect(at.ctx.progressValues).toHaveLength(10);
    expect(at.ctx.logs).toEqual([]);
    const past = await succeed(shell(text, { ...plain, limits: { eventBytes: 3 * line.length } }));
    expect(past.ctx.progressValues.length).toBeLessThan(10);
    expect(past.ctx.logs.map(({ fields }) => fields['limit'])).toContain('eventBytes');
  });

  test('what it prints becomes log lines up to the limit; the rest is counted and told once', async () => {
    const at = await succeed(shell('printf "12345\\n1234"', { ...plain, limits: { logBytes: 10 } }));
    expect(at.ctx.logs.map(({ message }) => message)).toEqual(['12345', '1234']);
    const past = await succeed(shell('printf "12345\\n12345"', { ...plain, limits: { logBytes: 10 } }));
    expect(printed(past.ctx)).toEqual(['12345', '1234']);
    expect(past.ctx.logs.at(-1)).toEqual({
      level: 'warn',
      message: 'output was cut: the limit logBytes is 10 bytes',
      fields: { limit: 'logBytes', value: 10, dropped_bytes: 1 },
    });
  });

  test(
    'a program that prints a gigabyte is read to the end and costs the log its limit',
    { timeout: 60_000 },
    async () => {
      const { ctx } = await succeed(
        subprocess({ capability: '/test/v1', command: 'head', args: ['-c', '1000000000', '/dev/zero'] }),
      );
      const kept = printed(ctx).reduce((sum, line) => sum + line.length, 0);
      expect(kept).toBe(MIB);
      expect(ctx.logs.at(-1)?.fields).toMatchObject({
        limit: 'logBytes',
        dropped_bytes: 1_000_000_000 - MIB,
      });
    },
  );
});

describe('stdin', () => {
  test('is empty unless asked for', async () => {
    expect(printed((await succeed(shell('wc -c', plain))).ctx)).toEqual(['0']);
  });

  test('is a text, or an input that is streamed and not stored', async () => {
    expect(printed((await succeed(shell('cat', { ...plain, stdin: { text: 'some text' } }))).ctx)).toEqual([
      'some text',
    ]);
    const bytes = Buffer.alloc(20 * MIB, 'x');
    const { ctx, usage } = await succeed(
      shell('wc -c; ls "$MILLRACE_INPUTS"', { ...plain, inputs: ['big', 'other'], stdin: { input: 'big' } }),
      { inputs: { big: bytes, other: 'o' } },
    );
    expect(printed(ctx)).toEqual([String(bytes.length), 'other']);
    expect(usage['bytes_in']).toBe(bytes.length + 1);
  });

  test.each([
    ['ends before reading it', 'exit 0'],
    ['reads only its beginning', 'head -c 10 >/dev/null'],
    ['closes it and works on', 'exec <&-; sleep 0.1'],
    ['never reads it', 'sleep 0.1'],
  ])('a program that %s is no failure', async (_, text) => {
    await succeed(shell(text, { stdin: 'input' }), { inputs: { big: Buffer.alloc(8 * MIB) } });
  });

  test('a stdin that cannot be fetched ends the program and fails the task', async () => {
    const runner = shell('cat; sleep 60', { ...plain, stdin: 'input', limits: { graceMs: 100 } });
    const { error } = await perform(runner, {
      inputs: { big: 'x' },
      onCall: ({ method }) => {
        if (method === 'openRead') throw new MillraceError('unavailable', 'the domain server is away');
      },
    });
    expect(error).toMatchObject({ code: 'unavailable', message: 'the domain server is away' });
  });
});

describe('a program that cannot be started', () => {
  test('is missing', async () => {
    const { error } = await fail(subprocess({ capability: '/test/v1', command: 'no-such-program' }));
    expect(error).toMatchObject({ code: 'not_found', details: { ending: 'spawn_failed', errno: 'ENOENT' } });
    expect(error.message).toContain('program no-such-program is not on PATH (/usr/local/bin:/usr/bin:/bin)');
  });

  test('is not executable, is a folder, or has no interpreter', async () => {
    await using folder = await temporaryFolder();
    const file = join(folder.path, 'tool');
    await writeFile(file, 'echo hi', { mode: 0o644 });
    const notExecutable = await fail(subprocess({ capability: '/test/v1', command: file, ...plain }));
    expect(notExecutable.error).toMatchObject({ code: 'permission_denied', details: { errno: 'EACCES' } });
    const isFolder = await fail(subprocess({ capability: '/test/v1', command: folder.path, ...plain }));
    expect(isFolder.error.message).toBe(`program ${folder.path} is not a file`);
    await writeFile(file, '#!/no/such/interpreter\n');
    await chmod(file, 0o755);
    const noInterpreter = await fail(subprocess({ capability: '/test/v1', command: file, ...plain }));
    expect(noInterpreter.error).toMatchObject({ code: 'not_found' });
  });

  test('has a working folder that is not there', async () => {
    const { error } = await fail(shell('true', { ...plain, cwd: '/no/such/folder' }));
    expect(error).toMatchObject({
      code: 'not_found',
      message: 'cwd /no/such/folder is not an existing folder',
    });
  });

  test('has a work folder that cannot be made', async () => {
    await using folder = await temporaryFolder();
    const file = join(folder.path, 'file');
    await writeFile(file, '');
    const { error } = await fail(shell('true', { ...plain, workDir: join(file, 'below') }));
    expect(error).toMatchObject({ code: 'failed_precondition' });
    expect(error.message).toContain('choose another with workDir');
  });

  test('has an argument that is too long for the system', async () => {
    const { error } = await fail(
      subprocess({ capability: '/test/v1', command: 'true', args: ['x'.repeat(200_000)], ...plain }),
    );
    expect(error).toMatchObject({ code: 'invalid_argument', details: { errno: 'E2BIG' } });
  });

  test('is not seen inside of the sandbox', async (context) => {
    needsTier(context, 'bwrap');
    await using folder = await temporaryFolder();
    const file = join(folder.path, 'tool');
    await writeFile(file, '#!/bin/sh\necho seen\n', { mode: 0o755 });
    const hidden = await fail(
      subprocess({ capability: '/test/v1', command: file, sandbox: { tier: 'bwrap' } }),
    );
    expect(hidden.error).toMatchObject({ code: 'failed_precondition' });
    expect(hidden.error.message).toContain('add its folder to sandbox.readable');
    await chmod(folder.path, 0o755);
    const shown = await succeed(
      subprocess({
        capability: '/test/v1',
        command: file,
        sandbox: { tier: 'bwrap', readable: [folder.path] },
      }),
    );
    expect(printed(shown.ctx)).toEqual(['seen']);
  });
});

describe.each(SANDBOX_TIERS)('in tier %s', (tier) => {
  const sandbox = { tier };
  const inTier = (name: string, run: () => Promise<void>): void => {
    test(name, async (context) => {
      needsTier(context, tier);
      await run();
    });
  };

  inTier('an exit code is the ending, with the last words of stderr', async () => {
    const { error, usage } = await fail(shell('echo first >&2; echo why >&2; exit 3', { sandbox }));
    expect(error).toMatchObject({ code: 'internal', message: 'sh ended with exit code 3: why' });
    expect(error.details).toEqual({ ending: 'exit', exit_code: 3, signal: null });
    expect(usage).toMatchObject({ exit_code: 3, signal: null, sandbox: { applied: { tier } } });
    expect(usage['wall_ms']).toBeGreaterThan(0);
  });

  inTier('a signal is the ending', async () => {
    const { error, usage } = await fail(shell('kill -SEGV $$; sleep 60', { sandbox }));
    expect(error.details).toEqual({ ending: 'signal', exit_code: null, signal: 'SIGSEGV' });
    expect(usage).toMatchObject({ exit_code: null, signal: 'SIGSEGV' });
  });

  inTier('any ending is a success when the operator says so', async () => {
    const { usage } = await succeed(shell('exit 3', { sandbox, failOnNonZero: false }));
    expect(usage['exit_code']).toBe(3);
  });

  inTier('SIGTERM lets a program finish, and cancelling is reported after it has', async () => {
    const runner = shell('trap "echo finished; exit 0" TERM; echo ready; while :; do sleep 0.05; done', {
      sandbox,
    });
    const { error, ctx } = await perform(runner, {}, async (running) => {
      await untilPrinted(running, 'ready');
      running.abort('canceled');
    });
    expect(error).toMatchObject({ reason: 'canceled' });
    expect(printed(ctx)).toEqual(['ready', 'finished']);
  });

  inTier(
    'a program that ignores SIGTERM is gone after the grace, with the children it put into sessions of their own',
    async () => {
      const token = sleepToken();
      const text = `trap "" TERM
      setsid sleep ${token} </dev/null >/dev/null 2>&1 3>&- &
      (setsid sh -c "sleep ${token} & sleep ${token}" &)
      echo ready; while :; do sleep 0.05; done`;
      const { error } = await perform(
        shell(text, { sandbox, limits: { graceMs: 200 } }),
        {},
        async (running) => {
          await untilPrinted(running, 'ready');
          await until('its children', () => processesWith(token).length >= 3);
          running.abort('canceled');
        },
      );
      expect(TaskAbort.is(error)).toBe(true);
      expect(processesWith(token)).toEqual([]);
    },
  );

  inTier(
    'what a program leaves running when it ends is ended too, also when it holds the pipes',
    async () => {
      const token = sleepToken();
      const text = `setsid sleep ${token} & sleep ${token} & (setsid sh -c "sleep ${token} & exit" &); sleep 0.1; echo done`;
      const startedAt = performance.now();
      const { ctx } = await succeed(shell(text, { sandbox }));
      expect(performance.now() - startedAt).toBeLessThan(20_000);
      expect(printed(ctx)).toEqual(['done']);
      expect(processesWith(token)).toEqual([]);
    },
  );

  inTier('a program that closes all its descriptors is waited for', async () => {
    const { error } = await fail(shell('exec 0<&- 1>&- 2>&- 3>&-; sleep 0.2; exit 7', { sandbox }));
    expect(error.details).toMatchObject({ exit_code: 7 });
  });

  inTier('wall time is limited', async () => {
    await succeed(shell('sleep 0.01', { sandbox, limits: { wallMs: 20_000 } }));
    const { error } = await fail(shell('sleep 60', { sandbox, limits: { wallMs: 200, graceMs: 100 } }));
    expect(error).toMatchObject({
      code: 'deadline_exceeded',
      details: { ending: 'limit', limit: 'wallMs', value: 200 },
    });
    expect(error.message).toBe('sh reached its limit of 200 ms of wall time (wallMs)');
  });

  inTier('CPU time is limited, of all processes together', async () => {
    const busy = 'while :; do :; done';
    const { error, usage } = await fail(
      shell(`(${busy}) & ${busy}`, { sandbox, limits: { cpuMs: 300, graceMs: 100 } }),
    );
    expect(error).toMatchObject({
      code: 'resource_exhausted',
      details: { ending: 'limit', limit: 'cpuMs', value: 300 },
    });
    expect(usage['cpu_ms']).toBeGreaterThanOrEqual(300);
  });

  inTier('memory is limited, and running out of it is said', async () => {
    const text = (mib: number): string =>
      `const kept = []; for (let i = 0; i < ${mib}; i += 8) kept.push(Buffer.alloc(8 * 1024 * 1024, 1)); setTimeout(() => kept.length, 300);`;
    const limits = { memoryBytes: 300 * MIB };
    const fine = await succeed(nodeProgram(text(64), { sandbox: { tier, readable: NODE_READABLE }, limits }));
    expect(fine.usage['peak_memory_bytes']).toBeGreaterThan(64 * MIB);
    const { error } = await fail(
      nodeProgram(text(4096), { sandbox: { tier, readable: NODE_READABLE }, limits }),
    );
    expect(error).toMatchObject({
      code: 'resource_exhausted',
      details: { ending: 'out_of_memory', limit: 'memoryBytes', value: 300 * MIB },
    });
  });

  inTier('disk space is limited, of all files together', async () => {
    const fill = (count: number): string =>
      `i=0; while [ $i -lt ${count} ]; do head -c 1048576 /dev/zero > "$MILLRACE_OUTPUTS/$i"; i=$((i+1)); done; sleep ${count > 10 ? 60 : 0}`;
    await succeed(shell(fill(4), { sandbox, limits: { diskBytes: 8 * MIB } }));
    const { error } = await fail(shell(fill(16), { sandbox, limits: { diskBytes: 8 * MIB } }));
    expect(error).toMatchObject({
      code: 'resource_exhausted',
      details: { ending: 'limit', limit: 'diskBytes', value: 8 * MIB },
    });
  });

  inTier('the folder of the task is gone afterwards, whatever the program did to it', async () => {
    await using folder = await temporaryFolder();
    const text = 'mkdir -p a/b "$MILLRACE_OUTPUTS/c"; echo x > a/b/x; chmod 0 a/b a "$MILLRACE_OUTPUTS/c"';
    await succeed(shell(text, { sandbox, workDir: folder.path }));
    expect(await readdir(folder.path)).toEqual([]);
  });
});

describe.each(SANDBOX_TIERS.filter((tier) => tier !== 'none'))('what tier %s controls', (tier) => {
  test('more open files are refused', async (context) => {
    needsControl(context, tier, 'open_files');
    const text = `const fs = require('fs'); let n = 0; try { for (;;) { fs.openSync('/dev/null'); n += 1; } } catch (e) { console.log(e.code, n); }`;
    const { ctx } = await succeed(
      nodeProgram(text, { sandbox: { tier, readable: NODE_READABLE }, limits: { openFiles: 64 } }),
    );
    const [code, opened] = printed(ctx)[0]!.split(' ');
    expect(code).toBe('EMFILE');
    expect(Number(opened)).toBeGreaterThan(10);
    expect(Number(opened)).toBeLessThan(64);
  });

  test('a file of exactly the limit is written, and not a block more', async (context) => {
    needsTier(context, tier);
    const head = (bytes: number): SubprocessOptions => ({
      capability: '/test/v1',
      command: 'dd',
      args: ['if=/dev/zero', 'of={output:x}', 'bs=512', `count=${bytes / 512}`],
      limits: { diskBytes: 64 * 1024 },
      sandbox: { tier },
    });
    const fine = await succeed(subprocess(head(64 * 1024)));
    expect(fine.usage['bytes_out']).toBe(64 * 1024);
    const { error } = await fail(subprocess(head(64 * 1024 + 512)));
    expect(error.details).toMatchObject({ ending: 'limit', limit: 'diskBytes', value: 64 * 1024 });
  });

  test('as many processes as the limit run, and not one more', async (context) => {
    needsControl(context, tier, 'processes');
    const forks = (count: number, seconds: number): string =>
      `i=0; while [ $i -lt ${count} ]; do sleep ${seconds} & i=$((i+1)); done; wait; sleep 0.1`;
    const options = { sandbox: { tier }, limits: { processes: 8 } };
    await succeed(shell(forks(7, 0.5), options));
    // Long enough to be seen where it is only watched.
    const { error } = await fail(shell(forks(8, 20), options));
    if (error.code !== 'resource_exhausted') expect(error.details['ending']).toBe('exit');
    else expect(error.details).toMatchObject({ limit: 'processes', value: 8 });
  });

  test('a fork bomb is bounded, and ends', async (context) => {
    // Without a bound it would take the machine down.
    needsControl(context, tier, 'processes');
    const token = sleepToken();
    const { error } = await fail(
      shell(`i=0; while [ $i -lt 100 ]; do sleep ${token} & i=$((i+1)); done; sleep 20; exit 9`, {
        sandbox: { tier, require: ['processes'] },
        limits: { processes: 20 },
      }),
    );
    if (error.code !== 'resource_exhausted') expect(error.details['ending']).toBe('exit');
    else expect(error.details).toMatchObject({ ending: 'limit', limit: 'processes', value: 20 });
    expect(error.details['exit_code']).not.toBe(9);
    expect(processesWith(token)).toEqual([]);
    const name = sleepToken();
    const bomb = await fail(
      shell(`b() { b | b & }; : ${name}; b; sleep 60`, {
        sandbox: { tier },
        limits: { processes: 30, wallMs: 1000, graceMs: 0 },
      }),
    );
    expect(['wallMs', 'processes']).toContain(bomb.error.details['limit']);
    expect(processesWith(name)).toEqual([]);
  });

  test('there is no network, unless it is given', async (context) => {
    needsControl(context, tier, 'network');
    const interfaces = 'tail -n +3 /proc/net/dev | while read name rest; do echo "$name"; done';
    const without = await succeed(shell(interfaces, { sandbox: { tier, network: false } }));
    expect(printed(without.ctx)).toEqual(['lo:']);
    const given = await succeed(shell('readlink /proc/self/ns/net', { sandbox: { tier, network: true } }));
    const own = await succeed(shell('readlink /proc/self/ns/net', plain));
    expect(printed(given.ctx)).toEqual(printed(own.ctx));
  });
});

describe('what a sandbox shows, and what it refuses', () => {
  test('bwrap: nothing is seen but programs and the task, and only the task can be written', async (context) => {
    needsTier(context, 'bwrap');
    const text = `
      ls -A / | tr '\\n' ' '; echo
      for f in /etc/shadow /etc/hostname /root /home /var /proc/1/root/etc/hostname; do [ -e $f ] && echo "sees $f"; done
      for f in /x /usr/x /etc/x /dev/x "$MILLRACE_INPUTS/x"; do (: > $f) 2>/dev/null && echo "writes $f"; done
      for f in "$HOME/x" "$TMPDIR/x" "$MILLRACE_OUTPUTS/x" /dev/shm/x; do : > $f || echo "cannot write $f"; done
      grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status | tr -d '\\t'
      ps 2>/dev/null >/dev/null; echo pids $(ls /proc | grep -c '^[0-9]')`;
    const { ctx } = await succeed(shell(text, { sandbox: { tier: 'bwrap' } }));
    const lines = printed(ctx);
    expect(lines[0]?.trim().split(' ')).toEqual(
      expect.arrayContaining(['bin', 'dev', 'etc', 'proc', 'task', 'tmp', 'usr']),
    );
    expect(lines.filter((line) => /^(sees|writes|cannot)/.test(line))).toEqual([]);
    expect(lines).toEqual(
      expect.arrayContaining(['CapEff:0000000000000000', 'CapBnd:0000000000000000', 'NoNewPrivs:1']),
    );
    expect(Number(lines.at(-1)?.split(' ')[1])).toBeLessThan(8);
  });

  test('a named tier that cannot be had fails the task, naming it', async (context) => {
    const missing = report.tiers.find(({ available }) => !available)?.tier;
    if (missing === undefined) {
      context.skip('every tier is available here');
      return;
    }
    const { error } = await fail(shell('true', { sandbox: { tier: missing } }));
    expect(error).toMatchObject({
      code: 'failed_precondition',
      details: { ending: 'sandbox_failed', control: missing },
    });
  });

  test('a required control that the tier lacks fails the task before anything is fetched, naming it', async () => {
    const { error, ctx } = await fail(
      shell('true', { inputs: ['a'], sandbox: { tier: 'none', require: ['network'] } }),
      {
        inputs: { a: '1' },
      },
    );
    expect(error.code).toBe('failed_precondition');
    expect(error.message).toMatch(
      /^sandbox control network is required, and tier none does not have it on this machine/,
    );
    expect(ctx.calls.filter(({ port }) => port === 'input')).toEqual([]);
  });

  test("a limit above the node's own is lowered to that, and the record says so", async (context) => {
    needsControl(context, 'limits', 'open_files');
    const script = `
      import { subprocess } from ${JSON.stringify(import.meta.resolve('./subprocess.js'))};
      import { createTestContext } from '@millrace/runner/testing';
      const runner = subprocess({ capability: '/test/v1', command: 'sh', args: ['-c', 'ulimit -Hn'],
        limits: { openFiles: 5000 }, sandbox: { tier: 'limits' } });
      const ctx = createTestContext();
      await runner.run(ctx);
      const { sandbox } = ctx.events.find(({ kind }) => kind === 'usage');
      console.log(JSON.stringify([ctx.logs.map(({ message }) => message), sandbox.applied.lowered]));
      await ctx.close();`;
    const { stdout } = await promisify(execFile)(
      'sh',
      ['-c', 'ulimit -n 300; exec "$@"', 'sh', process.execPath, '--input-type=module', '-e', script],
      { cwd: dirname(fileURLToPath(import.meta.url)) },
    );
    expect(JSON.parse(stdout)).toEqual([['300'], { openFiles: 300 }]);
    const { usage } = await succeed(
      shell('true', { sandbox: { tier: 'limits' }, limits: { openFiles: 64 } }),
    );
    expect(usage).not.toHaveProperty('sandbox.applied.lowered');
  });

  test.each<[string, Partial<SubprocessOptions>, string]>([
    ['a limit on processes', { limits: { processes: 5 } }, 'processes'],
    ['a limit on open files', { limits: { openFiles: 50 } }, 'open_files'],
    ['no network', { sandbox: { network: false } }, 'network'],
  ])('%s that is asked for explicitly is required', async (_, options, control) => {
    const { error } = await fail(
      shell('true', { ...options, sandbox: { ...options.sandbox, tier: 'none' } }),
    );
    expect(error.details).toMatchObject({ ending: 'sandbox_failed', control });
  });
});

describe('the runner', () => {
  runnerSuite(
    () => Promise.resolve(shell('cat "$MILLRACE_INPUTS"/* > "$MILLRACE_OUTPUTS/all"', { outputs: ['all'] })),
    {
      test,
      cases: [{ name: 'two inputs', context: { inputs: { a: '1', b: '2' } }, outputs: ['all'] }],
    },
  );

  test('closing it ends programs that run, and their tasks reject with shutdown', async () => {
    const token = sleepToken();
    const runner = shell(`echo ready; sleep ${token}`, { limits: { graceMs: 100 } });
    const ctx = createTestContext();
    const running = runner.run(ctx);
    running.catch(() => undefined);
    await untilPrinted(ctx, 'ready');
    await runner.close();
    expect(processesWith(token)).toEqual([]);
    await expect(running).rejects.toMatchObject({ reason: 'shutdown' });
    await expect(runner.run(createTestContext())).rejects.toMatchObject({ reason: 'shutdown' });
    await ctx.close();
  });

  test('many tasks run at the same time, each in a folder of its own', async () => {
    await using folder = await temporaryFolder();
    const runner = shell('cat "$MILLRACE_INPUTS/a" > "$MILLRACE_OUTPUTS/b"; pwd', {
      inputs: ['a'],
      outputs: ['b'],
      workDir: folder.path,
      ...plain,
    });
    const contexts = Array.from({ length: 8 }, (_, index) =>
      createTestContext({ inputs: { x: `content ${index}` } }),
    );
    await Promise.all(contexts.map((ctx) => runner.run(ctx)));
    expect(contexts.map((ctx) => Buffer.from(ctx.outputs.get('b')!).toString())).toEqual(
      contexts.map((_, index) => `content ${index}`),
    );
    expect(new Set(contexts.flatMap((ctx) => printed(ctx))).size).toBe(8);
    await runner.close();
    await Promise.all(contexts.map((ctx) => ctx.close()));
    expect(existsSync(folder.path)).toBe(true);
    expect(await readdir(folder.path)).toEqual([]);
  });

  test('folders that a killed node left are removed, those of living ones and anything else stay', async () => {
    await using folder = await temporaryFolder();
    await succeed(shell('true', { ...plain, workDir: folder.path }));
    const { hostname } = await import('node:os');
    const host = hostname().replaceAll(/[^A-Za-z0-9]/g, '_');
    const dead = `${host}-999999999-1-0123456789abcdef`;
    const foreign = `other${host}-999999999-1-0123456789abcdef`;
    for (const name of [dead, foreign, 'something']) await mkdir(join(folder.path, name));
    await succeed(shell('true', { ...plain, workDir: folder.path }));
    expect((await readdir(folder.path)).sort()).toEqual([foreign, 'something'].sort());
  });
});
