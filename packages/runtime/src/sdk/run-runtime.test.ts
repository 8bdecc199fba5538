import { access, mkdir, readFile, rm, writeFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Programs, finish } from '../programs.test.support.ts';

let programs: Programs;
let bare: string;
let full: string;

beforeAll(async () => {
  programs = await Programs.open();
  bare = await programs.runtime('runCommand: (ctx) => ctx.command(() => {})');
  full = await programs.runtime(`
    mode: 'command',
    description: 'A probe.',
    cli: {
      options: {
        loud: { type: 'boolean', short: 'l' },
        level: { type: 'number', default: 1 },
        tag: { type: 'string', multiple: true },
      },
      positionals: [{ name: 'profile' }],
    },
    config: { defaults: { port: 80, deep: { on: true, list: [] } } },
    deploy: (ctx) => ({ vols: [{ name: 'vol-1', path: '/in' }], cli: ctx.cli, config: ctx.config }),
    start: (ctx) => ({ z: 1, a: ctx.cli.command.args }),
    test: () => { throw new RuntimeError('no KVM', { exitCode: 7 }); },
    offer: () => ({ properties: { 'golem.runtime.capabilities': ['inet'] } }),
    runCommand: (ctx, run) => ctx.command(async (command) => {
      await command.stdout(JSON.stringify(run) + '\\n');
      await command.stderr('to stderr\\n');
      if (run.entryPoint === 'fail') throw new RuntimeError('broken', { exitCode: 42 });
      if (run.entryPoint === 'code') command.exitCode = 256;
      if (run.entryPoint === 'sh') await command.spawn('sh', ['-c', run.args[0]]);
      if (run.entryPoint === 'json') return { b: 1, a: [null] };
    })`);
});

afterAll(() => programs[Symbol.asyncDispose]());

describe('deploy', () => {
  test('prints the default answer of the mode: compact, sorted, without a line end', async () => {
    const result = await finish(bare, '--workdir', programs.path('w'), 'deploy', '--');
    expect(result).toMatchObject({
      code: 0,
      stdout: '{"startMode":"blocking","valid":{"Ok":""},"vols":[]}',
      stderr: '',
    });
  });

  test('fills in what the handler left out and makes the folders of its volumes', async () => {
    const workdir = programs.path('deployed');
    const result = await finish(full, '--workdir', workdir, 'deploy');
    expect(result.code).toBe(0);
    const answer = JSON.parse(result.stdout) as Record<string, unknown>;
    expect(Object.keys(answer)).toEqual(['cli', 'config', 'startMode', 'valid', 'vols']);
    expect(answer).toMatchObject({
      startMode: 'empty',
      valid: { Ok: '' },
      vols: [{ name: 'vol-1', path: '/in' }],
    });
    await access(`${workdir}/vol-1`);
  });

  test('that says it failed exits with 1', async () => {
    const runtime = await programs.runtime(
      `deploy: () => ({ valid: { Err: 'no image' } }), runCommand: () => 0`,
    );
    const result = await finish(runtime, '-w', programs.path('w'), 'deploy');
    expect(result).toMatchObject({
      code: 1,
      stdout: '{"startMode":"blocking","valid":{"Err":"no image"},"vols":[]}',
    });
  });

  test('that throws prints nothing on stdout and exits with 1', async () => {
    const runtime = await programs.runtime(
      `deploy: () => { throw new Error('disk full'); }, runCommand: () => 0`,
    );
    const result = await finish(runtime, '-w', programs.path('w'), 'deploy');
    expect(result).toMatchObject({ code: 1, stdout: '', stderr: 'Error: disk full (code: 1)\n' });
  });

  test.each(['..', 'a/b', ''])('refuses a volume called %j', async (name) => {
    const runtime = await programs.runtime(
      `deploy: () => ({ vols: [{ name: ${JSON.stringify(name)}, path: '/in' }] }), runCommand: () => 0`,
    );
    const result = await finish(runtime, '-w', programs.path('w'), 'deploy');
    expect(result).toMatchObject({ code: 1, stdout: '' });
    expect(result.stderr).toContain('must be one folder name');
  });
});

describe('the command line', () => {
  test("knows every option a supervisor sends, typed, and the author's", async () => {
    const result = await finish(
      full,
      '--workdir=' + programs.path('w'),
      '-tpkg.gvmi',
      '--cpu-cores',
      '2',
      '--mem-gib',
      '0.5',
      '--storage-gib',
      '28',
      '-l',
      '--tag',
      'a',
      '--tag=b',
      'small',
      '--volume-override',
      '{"/a":{"host":{}}}',
      '--hostname',
      'h',
      '--vpn-endpoint',
      'udp://127.0.0.1:1',
      '--inet-endpoint',
      'udp://127.0.0.1:2',
      'deploy',
      '--',
    );
    expect(result.stderr).toBe('');
    expect((JSON.parse(result.stdout) as { cli: unknown }).cli).toEqual({
      workdir: programs.path('w'),
      taskPackage: 'pkg.gvmi',
      cpuCores: 2,
      memGib: 0.5,
      storageGib: 28,
      volumeOverride: { '/a': { host: {} } },
      hostname: 'h',
      vpnEndpoint: 'udp://127.0.0.1:1',
      inetEndpoint: 'udp://127.0.0.1:2',
      options: { loud: true, level: 1, tag: ['a', 'b'] },
      positionals: { profile: 'small' },
      command: { name: 'deploy', entryPoint: null, args: [] },
    });
  });

  test('wrong usage is told on stderr, with exit code 1', async () => {
    const result = await finish(full, '--nope', 'test');
    expect(result).toMatchObject({
      code: 1,
      stdout: '',
      stderr: expect.stringContaining('unknown option --nope'),
    });
  });

  test('help and version go to stdout with exit code 0, before anything else is looked at', async () => {
    const help = await finish(full, '--help');
    expect(help).toMatchObject({ code: 0, stderr: '' });
    for (const text of [
      'probe 1.2.3',
      'A probe.',
      '[profile]',
      '-l, --loud',
      '-w, --workdir <DIR>',
      '--vpn-endpoint',
    ]) {
      expect(help.stdout).toContain(text);
    }
    expect(await finish(full, '--version')).toMatchObject({ code: 0, stdout: 'probe 1.2.3\n' });
  });
});

describe('run on the command line', () => {
  const expected = { entryPoint: '/bin/x', args: ['a', '-b', '--', 'c'], argv0: null, mode: 'command' };

  test.each([
    [['run', '--entrypoint', '/bin/x', '--', 'a', '-b', '--', 'c']],
    [['run', '--entrypoint=/bin/x', '--', 'a', '-b', '--', 'c']],
    [['run', '-e', '/bin/x', '--', 'a', '-b', '--', 'c']],
    [['run', '--', '/bin/x', 'a', '-b', '--', 'c']],
  ])('%j gives the handler the same command', async (args) => {
    const result = await finish(full, '--workdir', 'w', ...args);
    expect(result).toMatchObject({ code: 0, stderr: 'to stderr\n' });
    expect(JSON.parse(result.stdout)).toEqual({ ...expected, workDir: 'w' });
  });

  test('waits for the command and takes its exit code', async () => {
    const failed = await finish(full, '-w', 'w', 'run', 'fail');
    expect(failed).toMatchObject({ code: 42, stderr: 'to stderr\nbroken\n' });
    // The system keeps eight bits; 256 must not read as success.
    expect((await finish(full, '-w', 'w', 'run', 'code')).code).toBe(1);
    const shell = await finish(full, '-w', 'w', 'run', '--', 'sh', 'echo out; exit 5');
    expect(shell.code).toBe(5);
    expect(shell.stdout).toMatch(/\nout\n$/);
  });

  test('prints what the handler returns as compact JSON with sorted keys', async () => {
    const result = await finish(full, '-w', 'w', 'run', 'json');
    expect(result.stdout.split('\n')[1]).toBe('{"a":[null],"b":1}');
  });
});

describe('the other subcommands', () => {
  test('start in command mode prints what the handler returns', async () => {
    const result = await finish(full, '-w', 'w', 'start', '--', '--x', 'y');
    expect(result).toMatchObject({ code: 0, stdout: '{"a":["--x","y"],"z":1}' });
  });

  test('test fails with the code of the handler, and passes without a handler', async () => {
    expect(await finish(full, 'test')).toMatchObject({
      code: 7,
      stdout: '',
      stderr: 'Error: no KVM (code: 7)\n',
    });
    expect(await finish(bare, 'test')).toMatchObject({ code: 0, stdout: '', stderr: '' });
  });

  test('offer-template always prints both members', async () => {
    expect((await finish(full, 'offer-template')).stdout).toBe(
      '{"constraints":"","properties":{"golem.runtime.capabilities":["inet"]}}',
    );
    expect((await finish(bare, 'offer-template')).stdout).toBe('{"constraints":"","properties":{}}');
  });
});

describe('the configuration', () => {
  const write = async (name: string, text: string): Promise<void> => {
    await mkdir(programs.path('data'), { recursive: true });
    await writeFile(programs.path('data', name), text);
  };
  const deployed = async (): Promise<unknown> => {
    const result = await finish(full, '-w', programs.path('w'), 'deploy');
    expect(result.stderr).toBe('');
    return (JSON.parse(result.stdout) as { config: unknown }).config;
  };

  test('is the first of toml, yaml, yml and json, with the defaults merged in', async () => {
    expect(await deployed()).toEqual({ port: 80, deep: { on: true, list: [] } });
    await write('probe.json', '{"port":1}');
    expect(await deployed()).toEqual({ port: 1, deep: { on: true, list: [] } });
    await write('probe.yml', 'port: 2\n');
    expect(await deployed()).toMatchObject({ port: 2 });
    await write('probe.yaml', 'port: 3\ndeep:\n  list: [no]\n');
    expect(await deployed()).toEqual({ port: 3, deep: { on: true, list: ['no'] } });
    await write('probe.toml', 'port = 4\n[deep]\non = false\n');
    expect(await deployed()).toEqual({ port: 4, deep: { on: false, list: [] } });
    await rm(programs.path('data'), { recursive: true });
  });

  test('that is broken fails every subcommand with 1 and says why', async () => {
    await write('probe.json', '{"port": "80"}');
    try {
      for (const args of [['-w', 'w', 'deploy'], ['offer-template']]) {
        const result = await finish(full, ...args);
        expect(result).toMatchObject({ code: 1, stdout: '' });
        expect(result.stderr).toContain(
          `Unable to read the configuration file: ${programs.path('data', 'probe.json')}`,
        );
        expect(result.stderr).toContain('port must be a number, got a string');
      }
    } finally {
      await rm(programs.path('data'), { recursive: true });
    }
  });

  test('is written whole, in the format of its name, and read back', async () => {
    const runtime = await programs.runtime(`
      deploy: async (ctx) => {
        const read = [];
        for (const extension of ['json', 'yaml', 'toml', 'JSON']) {
          const file = ${JSON.stringify(programs.path('written'))} + '/deep/c.' + extension;
          await ctx.writeConfig({ a: 1, b: { c: ['x'] } }, file);
          read.push(await ctx.readConfig(file));
        }
        const failures = [];
        for (const attempt of [() => ctx.writeConfig({ a: null }, '/tmp/x.toml'), () => ctx.writeConfig({}, 'x.ini'), () => ctx.readConfig('nowhere.json')])
          failures.push(await attempt().catch((error) => error.message));
        await ctx.writeConfig({ saved: true });
        return { read, failures, configPath: ctx.configPath };
      }, runCommand: () => 0`);
    const result = await finish(runtime, '-w', programs.path('w'), 'deploy');
    const answer = JSON.parse(result.stdout) as Record<string, unknown>;
    expect(answer.read).toEqual(Array.from({ length: 4 }, () => ({ a: 1, b: { c: ['x'] } })));
    expect(answer.failures).toEqual([
      expect.stringContaining('cannot be written as TOML'),
      expect.stringContaining('must end in .json, .yaml, .yml or .toml'),
      expect.stringContaining('nowhere.json does not exist'),
    ]);
    expect(await readFile(programs.path('written', 'deep', 'c.toml'), 'utf8')).toContain('[b]');
    expect(answer.configPath).toBe(programs.path('data', 'probe.json'));
    expect(JSON.parse(await readFile(programs.path('data', 'probe.json'), 'utf8'))).toEqual({ saved: true });
  });
});
