/** `millrace runtime`, and runtimes of the config file, as real processes. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { chmod, mkdir, readFile, readdir, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { Program, ask, makePlace, millrace, type Place } from './program.test.support.ts';
import { WASI_RUNTIME } from './runtime-file.ts';
import { UPPER_IMAGE } from './wasi-runtime/image.test.support.ts';

let place: Place;
beforeEach(async () => {
  place = await makePlace();
});
afterEach(() => place[Symbol.asyncDispose]());

async function write(name: string, text: string | Uint8Array): Promise<string> {
  const file = path.join(place.cwd, name);
  await mkdir(path.dirname(file), { recursive: true });
  await writeFile(file, text);
  return file;
}
const read = (name: string): Promise<string> => readFile(path.join(place.cwd, name), 'utf8');

/** A runtime: `body` is the inside of its definition. */
async function runtime(name: string, body: string): Promise<string> {
  const file = await write(
    name,
    `#!${process.execPath}
import { readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { defineRuntime, runRuntime } from ${JSON.stringify(import.meta.resolve('@millrace/runtime'))};
await runRuntime(defineRuntime({ name: 'echo', version: '1.2.3', ${body} }));
`,
  );
  await chmod(file, 0o755);
  return file;
}

/** `echo WORDS` says them; `copy FROM TO` copies a file of /in to /out; `wait` never ends. */
const ECHO = `
  deploy: () => ({ vols: [{ name: 'i', path: '/in' }, { name: 'o', path: '/out' }] }),
  cli: { options: { greeting: { type: 'string', default: 'hello' } } },
  runCommand: (ctx, { entryPoint, args }) => ctx.command(async (command) => {
    if (entryPoint === 'fail') throw new Error('cannot do that');
    if (entryPoint === 'wait') {
      await command.stdout('waiting\\n');
      return new Promise((_, fail) => {
        const timer = setTimeout(() => {}, 600_000);
        command.signal.addEventListener('abort', () => { clearTimeout(timer); fail(command.signal.reason); });
      });
    }
    if (entryPoint === 'copy') {
      const text = await readFile(path.join(ctx.cli.workdir, 'i', args[0]), 'utf8');
      await writeFile(path.join(ctx.cli.workdir, 'o', args[1]), text + args.length);
      await command.counter('echo.bytes', text.length);
      return;
    }
    await command.stdout([ctx.cli.options.greeting, ...args].join(' ') + '\\n');
  }),
  offer: () => ({ properties: { 'golem.runtime.echo': process.env.FLAVOUR ?? 'plain' } }),
  test: () => { console.log('tested'); if (process.env.BROKEN) throw new Error('no KVM here'); }`;

describe('millrace runtime test', () => {
  test('passes on what the runtime prints and says whether it passed', async () => {
    await runtime('echo.mjs', ECHO);
    const passed = await ask(['runtime', 'test', '--runtime', './echo.mjs'], place);
    expect(passed).toMatchObject({
      code: 0,
      stdout: 'tested\n',
      stderr: expect.stringMatching(/^passed in /),
    });
    const failed = await ask(
      ['runtime', 'test', '--runtime', './echo.mjs', '--env', 'BROKEN=1', '--json'],
      place,
    );
    expect(failed.code).toBe(1);
    expect(JSON.parse(failed.stdout)).toMatchObject({
      passed: false,
      exit_code: 1,
      stdout: 'tested\n',
      stderr: expect.stringContaining('no KVM here'),
    });
  });

  test('is the usage that is wrong when there is no such runtime, or none that can be started', async () => {
    const absent = await ask(['runtime', 'test', '--runtime', './absent'], place);
    expect(absent).toMatchObject({ code: 2, stderr: expect.stringContaining('absent does not exist') });
    const unknown = await ask(['runtime', 'test', '--runtime', 'unknown'], place);
    expect(unknown).toMatchObject({
      code: 2,
      stderr: expect.stringContaining('neither a file here nor known'),
    });
    const none = await ask(['runtime', 'test'], place);
    expect(none).toMatchObject({
      code: 2,
      stderr: expect.stringContaining("required option '-r, --runtime <path>'"),
    });
    await write('plain', '');
    const plain = await ask(['runtime', 'test', '--runtime', './plain'], place);
    expect(plain.stderr).toContain('is not executable; run chmod +x plain');
    expect(plain.code).toBe(2);
    const folder = await ask(['runtime', 'test', '--runtime', '.'], place);
    expect(folder).toMatchObject({ code: 2, stderr: expect.stringContaining('is a folder, not a program') });
  });

  test('stops one that takes too long, and when it is interrupted', async () => {
    await runtime(
      'slow.mjs',
      `runCommand: () => 0, test: () => new Promise(() => setInterval(() => console.log('still'), 10))`,
    );
    const slow = await ask(['runtime', 'test', '--runtime', './slow.mjs', '--timeout', '1s'], place);
    expect(slow).toMatchObject({ code: 1, stderr: expect.stringContaining('did not end within 1000 ms') });
    await using program = new Program(['runtime', 'dbg', '--runtime', './slow.mjs', '--json'], place);
    await program.printed('stderr', /"help" lists the commands/);
    program.signal('SIGTERM');
    expect((await program.ended).code).toBe(3);
  });

  test('of the WASI runtime says whether programs can be run here', async () => {
    expect(await millrace(['runtime', 'test', '--runtime', 'wasi'], place)).toMatchObject({
      code: 0,
      stdout: '',
    });
  });
});

test('millrace runtime offer prints constraints and properties', async () => {
  await runtime('echo.mjs', ECHO);
  const args = ['runtime', 'offer', '--runtime', './echo.mjs', '--env', 'FLAVOUR=mint'];
  const offer = { constraints: '', properties: { 'golem.runtime.echo': 'mint' } };
  expect(JSON.parse((await ask(args, place)).stdout)).toEqual(offer);
  expect(JSON.parse((await ask([...args, '--json'], place)).stdout)).toMatchObject({ offer, exit_code: 0 });
  const wrong = await ask(['runtime', 'offer', '--runtime', './echo.mjs', '--', '--unknown'], place);
  expect(wrong).toMatchObject({
    code: 1,
    stdout: '',
    stderr: expect.stringContaining('a provider goes on with an empty template'),
  });
  await chmod(await write('chatty', '#!/bin/sh\necho ready\n'), 0o755);
  const chatty = await ask(['runtime', 'offer', '--runtime', './chatty'], place);
  expect(chatty).toMatchObject({
    code: 1,
    stdout: '',
    stderr: expect.stringMatching(/^millrace: the output of offer-template is invalid: .* in "ready\\n"\n$/),
  });
});

test('millrace runtime deploy says mode and volumes, or what the runtime says against it', async () => {
  await runtime('echo.mjs', ECHO);
  const deployed = await ask(
    ['runtime', 'deploy', '--runtime', './echo.mjs', '--workdir', 'w', '--json'],
    place,
  );
  expect(JSON.parse(deployed.stdout)).toMatchObject({
    mode: 'server',
    volumes: [
      { path: '/in', name: 'i' },
      { path: '/out', name: 'o' },
    ],
    exit_code: 0,
  });
  expect(await readdir(path.join(place.cwd, 'w'))).toEqual(['i', 'o']);
  const imageless = ['runtime', 'deploy', '-r', './echo.mjs', '-w', 'w', '-t', 'absent.img'];
  expect(await ask(imageless, place)).toMatchObject({
    code: 2,
    stderr: expect.stringMatching(/task package \S+absent\.img does not exist/),
  });
  expect(await ask(['runtime', 'deploy', '-r', './echo.mjs', '-w', 'echo.mjs'], place)).toMatchObject({
    code: 2,
    stderr: expect.stringMatching(/work directory \S+echo\.mjs cannot be made/),
  });
  const wasi = await ask(
    ['runtime', 'deploy', '-r', 'wasi', '-w', 'x', '-t', path.join(UPPER_IMAGE, 'manifest.json')],
    place,
  );
  expect(wasi).toMatchObject({
    code: 1,
    stderr: expect.stringContaining('neither a folder, nor a zip archive'),
  });
});

describe('millrace runtime dbg', () => {
  const SESSION = [
    '# a session',
    'deploy',
    'start',
    'run echo "a b" c',
    'run wait &',
    'kill 1',
    'wait',
    'stop',
    '',
  ].join('\n');

  test('carries a script out, and shows each frame with --trace', async () => {
    await runtime('echo.mjs', ECHO);
    await write('session.dbg', SESSION);
    const args = ['runtime', 'dbg', '--runtime', './echo.mjs', '--script', 'session.dbg'];
    const { code, stdout } = await millrace(
      [...args, '--protocol', '7.7.7', '--trace', '--', '--greeting', 'moin'],
      place,
    );
    expect(stdout).toContain('0 | moin a b c\n');
    expect(stdout).toContain('pid 1 ended with code 143\n');
    expect(stdout).toContain('--> id=2 hello{version:"7.7.7"}\n    0b 08 02');
    expect(stdout.endsWith('stopped\n')).toBe(true);
    expect(code).toBe(0);
    expect(await readdir(place.tmp)).toEqual([]);
    const { stdout: document, stderr } = await millrace([...args, '--json'], place);
    expect(JSON.parse(document)).toMatchObject({ script: 'session.dbg', exit_code: 0 });
    expect(stderr).toContain('0 | hello a b c\n');
  });

  test('ends with 1 at the first line of a script that fails, with 2 without the script', async () => {
    await runtime('echo.mjs', ECHO);
    await write('bad.dbg', 'deploy\nrun echo\nstop\n');
    const args = ['runtime', 'dbg', '--runtime', './echo.mjs', '--workdir', 'w', '--script'];
    expect(await ask([...args, 'bad.dbg'], place)).toMatchObject({
      code: 1,
      stdout: expect.stringContaining('line 2 failed'),
    });
    expect(existsSync(path.join(place.cwd, 'w', 'i'))).toBe(true);
    expect(await ask([...args, 'absent.dbg'], place)).toMatchObject({
      code: 2,
      stderr: expect.stringContaining('cannot be read'),
    });
  });

  test('reads lines from a pipe', async () => {
    await runtime('echo.mjs', ECHO);
    const { code, stdout } = await millrace(['runtime', 'dbg', '--runtime', './echo.mjs'], place, {
      stdin: 'deploy\nfly\nstart\nrun fail\nquit\n',
    });
    expect(code).toBe(0);
    for (const line of ['unknown command "fly"', '0 ! cannot do that', 'pid 0 ended with code 1'])
      expect(stdout).toContain(line);
  });

  test.skipIf(!existsSync('/usr/bin/script'))(
    'at a terminal completes, keeps a history, kills what is waited for at Ctrl-C and leaves at Ctrl-D',
    async () => {
      const file = await runtime('echo.mjs', ECHO);
      const data = path.join(place.home, 'data');
      const bin = fileURLToPath(new URL('../bin/millrace.js', import.meta.url));
      const session = async (steps: readonly (readonly [until: RegExp, keys: string])[]): Promise<string> => {
        const line = [process.execPath, bin, 'runtime', 'dbg', '--runtime', file, '--data', data]
          .map((word) => `'${word}'`)
          .join(' ');
        const child = spawn('/usr/bin/script', ['-qefc', line, '/dev/null'], {
          cwd: place.cwd,
          env: { PATH: process.env['PATH'], HOME: place.home, TMPDIR: place.tmp, TERM: 'xterm' },
        });
        let shown = '';
        child.stdout.on('data', (chunk: Buffer) => (shown += chunk.toString()));
        try {
          for (const [until, keys] of steps) {
            await expect.poll(() => shown, { timeout: 20_000 }).toMatch(until);
            shown = '';
            child.stdin.write(keys);
          }
          const [code] = (await once(child, 'close')) as [number];
          expect(code).toBe(0);
          return shown;
        } finally {
          child.kill('SIGKILL');
        }
      };
      await session([
        [/lists the commands[^]*runtime> /, 'dep\t'],
        [/deploy /, '\r'],
        [/deployed, server mode[^]*runtime> /, 'start\r'],
        [/started[^]*runtime> /, 'run wait\r'],
        [/0 \| waiting/, '\u0003'],
        [/pid 0 ended with code 143[^]*runtime> /, '\u0004'],
      ]);
      const history = path.join(data, 'runtime-dbg.history');
      expect((await readFile(history, 'utf8')).split('\n')).toEqual(['deploy ', 'start', 'run wait', '']);
      expect((await stat(history)).mode & 0o777).toBe(0o600);
      // The line before, from the history.
      await session([
        [/runtime> /, '\u001b[A\r'],
        [/deploy\(\) command is expected now[^]*runtime> /, 'quit\r'],
      ]);
    },
    60_000,
  );
});

describe('millrace runtime descriptor', () => {
  test('writes what makes a runtime known by its name', async () => {
    await runtime('echo.mjs', ECHO);
    const args = [
      'runtime',
      'descriptor',
      '--runtime',
      './echo.mjs',
      '--description',
      'Says it',
      '--counter',
      'echo.words=words:words said',
      '--property',
      'flavour="mint"',
    ];
    const { code, stdout } = await ask(args, place);
    const plugins = path.join(place.home, '.local', 'lib', 'yagna', 'plugins');
    expect([code, stdout]).toEqual([0, `${path.join(plugins, 'ya-runtime-echo.json')}\n`]);
    expect(JSON.parse(await readFile(stdout.trim(), 'utf8'))).toEqual([
      {
        name: 'echo',
        version: '1.2.3',
        'supervisor-path': 'exe-unit',
        'runtime-path': path.join(place.cwd, 'echo.mjs'),
        description: 'Says it',
        'extra-args': ['--runtime-managed-image'],
        properties: { flavour: 'mint' },
        config: { counters: { 'echo.words': { name: 'words', description: 'words said', price: true } } },
      },
    ]);
    await writeFile(path.join(plugins, 'ya-broken.json'), '{');
    const list = await ask(['runtime', 'list'], place);
    expect(list.stdout).toMatch(
      /NAME +VERSION +RUNTIME +DESCRIPTION\necho +1\.2\.3 +\S+echo\.mjs +Says it\n/,
    );
    expect(list.stderr).toContain('passed over');
    expect(JSON.parse((await ask(['runtime', 'list', '--json'], place)).stdout)).toMatchObject({
      runtimes: [{ name: 'echo' }],
      problems: [{}],
    });
    expect((await ask(['runtime', 'test', '--runtime', 'echo'], place)).code).toBe(0);
  });

  test('of the WASI runtime leaves the image to the agreement', async () => {
    const { stdout } = await ask(
      ['runtime', 'descriptor', '--runtime', 'wasi', '--dir', 'plugins', '--json'],
      place,
    );
    expect(JSON.parse(stdout)).toMatchObject({
      name: 'wasi',
      'runtime-path': WASI_RUNTIME,
      'extra-args': [],
    });
    const list = await ask(['runtime', 'list', '--dir', 'plugins', '--json'], place);
    expect(JSON.parse(list.stdout)).toMatchObject({ runtimes: [{ name: 'wasi' }] });
  });

  test.each([
    [['--counter', 'words'], '--counter must be ID=NAME'],
    [['--property', 'a'], '--property must be KEY=JSON'],
    [['--property', 'a=mint'], 'is not JSON; a text needs its quotes'],
    [['--runtime-version', '1'], 'must be semantic'],
  ])('refuses %j', async (options, message) => {
    await runtime('echo.mjs', ECHO);
    const wrong = await ask(
      ['runtime', 'descriptor', '--runtime', './echo.mjs', '--dir', 'p', ...options],
      place,
    );
    expect(wrong).toMatchObject({ code: 2, stderr: expect.stringContaining(message) });
  });
});

describe('runtimes of the config file', () => {
  const JOB = `
label: three runtimes
tasks:
  - label: server
    capability: /golem/server/v1
    inputs_cids: [file:a.txt]
    outputs_prefix: server
    meta:
      input_names: [a.txt]
      exe_script:
        - deploy: {}
        - start: {}
        - run: { entry_point: echo, args: [x, y], capture: { stdout: { stream: {} } } }
        - run: { entry_point: copy, args: [a.txt, b.txt] }
        - terminate: {}
  - label: command
    capability: /golem/packer/v1
    inputs_cids: [file:a.txt]
    outputs_prefix: command
    meta:
      input_names: [a.txt]
      exe_script:
        - deploy: {}
        - start: {}
        - run: { entry_point: copy, args: [a.txt, b.txt] }
  - label: wasi
    capability: /golem/wasi/v1
    inputs_cids: [file:upper.wasm, file:a.txt]
    outputs_prefix: wasi
    meta:
      task_package: input:0
      input_names: [upper.wasm, a.txt]
      exe_script:
        - deploy: {}
        - start: {}
        - run: { entry_point: upper, args: [a.txt, b.txt], capture: { stdout: { atEnd: {} } } }
`;

  test('do the tasks of a job in each mode, and in the WASI runtime', async () => {
    await runtime('server.mjs', ECHO);
    await runtime('bin/command.mjs', `mode: 'command', ${ECHO}`);
    await write('a.txt', 'the mill');
    await write('upper.wasm', await readFile(path.join(UPPER_IMAGE, 'upper.wasm')));
    await write('job.yaml', JOB);
    await write(
      'millrace.config.yaml',
      `runners:
  - runtime: ./server.mjs
    args: [--greeting, moin]
  - runtime: ./bin/command.mjs
    name: packer
    limits: { runMs: 30000, outputFiles: 5 }
  - runtime: wasi
    workDir: work
`,
    );
    const { code, stdout, stderr } = await millrace(['run', 'job.yaml', '--json'], place);
    expect([code, stderr.includes('error')]).toEqual([0, false]);
    const { artifacts } = JSON.parse(stdout) as { artifacts: { file: string }[] };
    expect(artifacts.map(({ file }) => path.relative(path.join(place.cwd, 'out'), file)).sort()).toEqual(
      ['command', 'server', 'wasi'].flatMap((label) => [`${label}/b.txt`, `${label}/exe-results.json`]),
    );
    expect(await read('out/server/b.txt')).toBe('the mill2');
    expect(await read('out/command/b.txt')).toBe('the mill2');
    expect(await read('out/wasi/b.txt')).toBe('THE MILL');
    const results = JSON.parse(await read('out/server/exe-results.json')) as { stdout: string | null }[];
    expect(results.map((result) => result.stdout)[2]).toBe('moin x y\n');
    expect(await readdir(path.join(place.cwd, 'work'))).toEqual([]);
  });

  test('made in a module are the same, and their events are those of the task', async () => {
    await runtime('server.mjs', ECHO);
    await write('a.txt', 'the mill');
    await write('job.yaml', JOB.slice(0, JOB.indexOf('  - label: command')));
    await write(
      'fail.yaml',
      JOB.slice(0, JOB.indexOf('  - label: command')).replace('entry_point: echo', 'entry_point: fail'),
    );
    await write(
      'millrace.config.mjs',
      `import { golemRunner } from ${JSON.stringify(import.meta.resolve('@millrace/runtime/supervisor'))};
export default { runners: [golemRunner({ runtime: { path: ${JSON.stringify(path.join(place.cwd, 'server.mjs'))} } })] };`,
    );
    await using up = new Program(['up', '--port', '0', '--json', '--data', 'data'], place);
    const { url } = await up.firstDocument<{ url: string }>();
    const env = { MILLRACE_URL: url, MILLRACE_DATA: path.join(place.cwd, 'data') };
    const submitted = await millrace(['submit', 'job.yaml', '--watch', '--json'], place, { env });
    expect(submitted.code).toBe(0);
    const logs = await millrace(
      ['job', 'logs', (JSON.parse(submitted.stdout) as { job_id: string }).job_id, '--json'],
      place,
      { env },
    );
    for (const part of ['"exe_event"', '"exe_result"', '"exe_counter"', '"exe_usage"', 'hello x y'])
      expect(logs.stdout).toContain(part);
    const failed = await millrace(['submit', 'fail.yaml', '--watch', '--json'], place, { env });
    expect(failed.code).toBe(1);
    expect(failed.stdout).toContain('exe_script command 2 (run fail)');
  });

  test.each([
    ['runtime: ./absent', 'absent does not exist'],
    ['runtime: { descriptor: absent }', 'is named absent'],
    ['runtime: wasi, limits: { runMS: 1 }', 'unknown member "runMS"'],
    ['runtime: wasi, name: a/b', 'must be letters, digits'],
    ['runtime: wasi, env: [PATH]', 'runners[0].env: expected record, got ["PATH"]'],
    ['runtime: { descriptor: [x] }', 'runners[0].runtime.descriptor: expected string, got ["x"]'],
    ['runtime: wasi, taskPackage: absent.img', 'absent.img does not exist'],
    ['runtime: .', 'is not a file'],
    ['runtime: { descriptor: absent }, name: x', 'leave name out'],
  ])('with {%s} are refused', async (entry, message) => {
    await write('job.yaml', JOB.slice(0, JOB.indexOf('  - label: command')));
    await write('a.txt', '');
    await write('millrace.config.yaml', `runners: [{ ${entry} }]\n`);
    const wrong = await ask(['run', 'job.yaml'], place);
    expect(wrong.code).toBe(2);
    expect(wrong.stderr).toContain('millrace.config.yaml');
    expect(wrong.stderr).toContain(message);
  });
});
