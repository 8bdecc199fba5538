/** The program as its users have it: a real process, real files, real sockets. */
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, readFile, readdir, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { Program, answer, ask, makePlace, millrace, type Place } from './program.test.support.ts';

let place: Place;
beforeEach(async () => {
  place = await makePlace();
});
afterEach(() => place[Symbol.asyncDispose]());

const write = async (name: string, text: string): Promise<void> => {
  const file = path.join(place.cwd, name);
  await mkdir(path.dirname(file), { recursive: true });
  await writeFile(file, text);
};
const read = (name: string): Promise<string> => readFile(path.join(place.cwd, name), 'utf8');
/** What the program left in the temporary folder; tsx keeps its cache of compiled modules there. */
const leftBehind = async (): Promise<string[]> =>
  (await readdir(place.tmp)).filter((name) => !name.startsWith('tsx-'));
/** The one document of a stdout. */
const json = (text: string): unknown => {
  expect(text.trimEnd().split('\n')).toHaveLength(1);
  return JSON.parse(text);
};

/** Upper-cases its inputs, one artifact each, and reports what it does. */
const SHOUT = `
interface Context {
  lease: { task: { inputs_cids: string[]; meta: { suffix?: string } | null } };
  input: { getBytesByCid(cid: string): Promise<Uint8Array> };
  output: { putBytes(path: string, bytes: Uint8Array): Promise<void> };
  ctrl: { progress(value: unknown): Promise<void> };
  log: { info(message: string, fields?: object): void };
}
export default {
  capability: '/test/shout/v1',
  async run(ctx: Context): Promise<void> {
    const { inputs_cids, meta } = ctx.lease.task;
    for (const [index, cid] of inputs_cids.entries()) {
      const text = new TextDecoder().decode(await ctx.input.getBytesByCid(cid));
      await ctx.output.putBytes(\`loud/\${index}.txt\`, new TextEncoder().encode(text.toUpperCase() + (meta?.suffix ?? '')));
      await ctx.ctrl.progress({ done: index + 1, total: inputs_cids.length, stage: 'shouting' });
    }
    ctx.log.info('shouted', { inputs: inputs_cids.length });
  },
};
`;

const FAIL = `
export default {
  capability: '/test/fail/v1',
  async run(ctx) {
    ctx.log.info('about to fail', { code: 7 });
    throw new Error('the input is not a picture');
  },
};
`;

/** Says that it has begun, then holds its thread for ever. */
const SPIN = `
import { writeFileSync } from 'node:fs';
export default {
  capability: '/test/spin/v1',
  async run(ctx) {
    writeFileSync(ctx.lease.task.meta.begun, '');
    for (;;);
  },
};
`;

const fileAppears = async (file: string): Promise<void> => {
  const deadline = AbortSignal.timeout(25_000);
  while (
    !(await stat(file).then(
      () => true,
      () => false,
    ))
  ) {
    deadline.throwIfAborted();
    await new Promise((done) => setTimeout(done, 20));
  }
};

describe('the process', () => {
  test('prints help and exits 0', async () => {
    const { code, stdout, stderr } = await millrace(['--help'], place);
    expect([code, stderr]).toEqual([0, '']);
    expect(stdout).toMatch(/^Usage: millrace <command> \[options\]/);
  });

  test('exits 2 for wrong usage, with one line on stderr and nothing on stdout', async () => {
    const { code, stdout, stderr } = await millrace(['jobs', '--bogus'], place);
    expect([code, stdout]).toEqual([2, '']);
    expect(stderr).toBe("millrace: unknown option '--bogus'; see millrace jobs --help\n");
  });

  test('exits 4 when the dispatcher does not answer', async () => {
    // Port 9 of loopback: nothing listens there on a machine that runs tests.
    const args = ['jobs', '--url', 'http://127.0.0.1:9', '--token', 'x', '--json'];
    const { code, stdout } = await millrace(args, place);
    expect(code).toBe(4);
    expect(json(stdout)).toMatchObject({
      error: {
        code: 'unavailable',
        message: expect.stringMatching(/cannot reach the dispatcher at http:\/\/127\.0\.0\.1:9/),
      },
    });
  });
});

describe('millrace run', () => {
  test('runs a TypeScript module on a file and stdin and writes its artifacts', async () => {
    await write('shout.ts', SHOUT);
    await write('hello.txt', 'hello');
    const { code, stdout, stderr } = await millrace(
      [
        'run',
        './shout.ts',
        '--input',
        'hello.txt',
        '--input',
        '-',
        '--meta',
        '{"suffix":"!"}',
        '--out',
        'got',
        '--json',
      ],
      place,
      { stdin: 'from a pipe' },
    );
    expect(stderr).toMatch(/1\/1 tasks done; completed/);
    expect(code).toBe(0);
    expect(await read('got/loud/0.txt')).toBe('HELLO!');
    expect(await read('got/loud/1.txt')).toBe('FROM A PIPE!');
    expect(json(stdout)).toMatchObject({
      status: 'completed',
      label: '/test/shout/v1',
      tasks: [{ capability: '/test/shout/v1', status: 'completed', attempts: 1 }],
      artifacts: [
        { path: 'loud/0.txt', file: path.join(place.cwd, 'got/loud/0.txt'), size: 6 },
        { path: 'loud/1.txt', file: path.join(place.cwd, 'got/loud/1.txt'), size: 12 },
      ],
    });
    // Nothing of the temporary dispatcher and node stays behind.
    expect(await leftBehind()).toEqual([]);
  });

  test('tells people where the artifacts are', async () => {
    await write('shout.ts', SHOUT);
    await write('meta.json', '{"suffix":"?"}');
    const { code, stdout } = await millrace(
      ['run', 'shout.ts', '--input', '-', '--meta', '@meta.json'],
      place,
      {
        stdin: 'x',
      },
    );
    expect(code).toBe(0);
    expect(stdout).toMatch(
      /^completed {2}[0-9a-f-]{36} {2}1 task in .*\n {2}\.\/out\/loud\/0\.txt {2}2 B\n$/,
    );
    expect(await read('out/loud/0.txt')).toBe('X?');
  });

  test('a reader that leaves early changes neither the exit code nor the tidying up', async () => {
    await write(
      'fail.ts',
      `export default { capability: '/test/fail/v1', run() { throw new Error('no'); } };`,
    );
    await write('job.yaml', 'tasks: [{ capability: /test/fail/v1, max_attempts: 1 }]\n');
    const bin = fileURLToPath(new URL('../bin/millrace.js', import.meta.url));
    const run = `{ "${process.execPath}" "${bin}" run job.yaml --runner fail.ts; echo $? > code; } | true`;
    await promisify(execFile)('sh', ['-c', run], {
      cwd: place.cwd,
      env: { PATH: process.env['PATH'] ?? '', HOME: place.home, TMPDIR: place.tmp },
    });
    expect(await read('code')).toBe('1\n');
    expect(await leftBehind()).toEqual([]);
  });

  test('artifacts may be called anything: what is printed of it is safe for a terminal', async () => {
    const name = JSON.stringify('a\u2066b\u202ec.txt');
    await write(
      'odd.ts',
      `export default { capability: '/test/odd/v1', run: (ctx: any) => ctx.output.putBytes(${name}, Buffer.from('x')) };`,
    );
    const { code, stdout } = await millrace(['run', 'odd.ts'], place);
    expect(code).toBe(0);
    expect(stdout.split('\n').slice(1)).toEqual(['  ./out/a b c.txt  1 B', '']);
  });

  test('what stands in the way of the output folder is told before the work begins', async () => {
    await write('out', 'a file');
    await write('shout.ts', SHOUT);
    for (const out of ['out', 'out/deeper']) {
      const { code, stderr } = await millrace(['run', 'shout.ts', '--input', '-', '--out', out], place, {
        stdin: 'x',
      });
      expect([code, stderr]).toEqual([
        2,
        expect.stringMatching(/^millrace: --out .* is not a folder; name another\n$/),
      ]);
    }
  });

  test.runIf(existsSync('/proc/self'))(
    'a folder that cannot be made is told before the work begins, for --out and for --data',
    async () => {
      await write('shout.ts', SHOUT);
      for (const option of ['--out', '--data']) {
        const { code, stderr } = await millrace(
          ['run', 'shout.ts', '--input', '-', option, '/proc/millrace-x'],
          place,
          { stdin: 'x' },
        );
        expect([code, stderr]).toEqual([
          2,
          expect.stringMatching(/^millrace: .*--(out|data).* \/proc\/millrace-x: cannot .*; name another\n$/),
        ]);
      }
    },
  );

  test('an artifact that is also the folder of another is left out, by run and by get, with exit code 1', async () => {
    await write(
      'clash.ts',
      `export default { capability: '/test/clash/v1', run: async (ctx: any) => {
        await ctx.output.putBytes('f', Buffer.from('1'));
        await ctx.output.putBytes('f/x', Buffer.from('2'));
      } };`,
    );
    const told = /^millrace: artifact "f" \([0-9a-f-]{36}\) is not saved: it is also the folder of "f\/x"$/m;
    const ran = await millrace(['run', 'clash.ts', '--json'], place);
    expect(ran).toMatchObject({ code: 1, stderr: expect.stringMatching(told) });
    expect(json(ran.stdout)).toMatchObject({
      status: 'completed',
      artifacts: [{ path: 'f/x', size: 1 }],
      skipped: [{ path: 'f' }],
    });
    expect(await readFile(path.join(place.cwd, 'out/f/x'), 'utf8')).toBe('2');

    await using up = new Program(['up', 'clash.ts', '--port', '0', '--json'], place);
    const { url } = await up.firstDocument<{ url: string }>();
    const submitted = await millrace(['run', 'clash.ts', '--url', url, '--json'], place);
    const { job_id: jobId } = json(submitted.stdout) as { job_id: string };
    const got = await ask(['get', jobId, '--out', 'got'], place);
    expect(got).toMatchObject({ code: 1, stderr: expect.stringMatching(told) });
    expect(got.stdout).toMatch(/\/got\/f\/x {2}1 B\n$/);
    const alone = await ask(['get', jobId, 'f', '--out', 'alone'], place);
    expect(alone).toMatchObject({ code: 0, stderr: '' });
  });

  test('a stderr that cannot be written costs the remarks, not the job', async () => {
    await write('shout.ts', SHOUT);
    await write('in.txt', 'x');
    const bin = fileURLToPath(new URL('../bin/millrace.js', import.meta.url));
    const run = `"${process.execPath}" "${bin}" run shout.ts --input in.txt 2>&-`;
    const { stdout } = await promisify(execFile)('sh', ['-c', run], {
      cwd: place.cwd,
      env: { PATH: process.env['PATH'] ?? '', HOME: place.home, TMPDIR: place.tmp },
    });
    expect(stdout).toMatch(/^completed .*\n {2}\.\/out\/loud\/0\.txt/);
  });

  test('runs a job file with the runners of the config, one stage after the other', async () => {
    await write('runners/shout.ts', SHOUT);
    await write('millrace.config.yaml', 'runners: [./runners/shout.ts]\n');
    await write('in/a.txt', 'a');
    await write(
      'in/job.yaml',
      `label: two stages
tasks:
  - { stage: one, capability: /test/shout/v1, inputs_cids: [file:a.txt, input:b], outputs_prefix: one, meta: { suffix: "1" } }
  - { stage: two, capability: /test/shout/v1, inputs_cids: [stage:one/**], outputs_prefix: two, meta: { suffix: "2" } }
edges: [{ from: one, to: two }]
`,
    );
    await write('b.txt', 'b');
    const { code, stderr } = await millrace(['run', 'in/job.yaml', '--input', 'b=b.txt'], place);
    expect(stderr).toMatch(/2\/2 tasks done; completed/);
    expect(code).toBe(0);
    expect(await Promise.all(['0', '1'].map((name) => read(`out/two/loud/${name}.txt`)))).toEqual([
      'A12',
      'B12',
    ]);
  });

  test.each([
    ['TypeScript', 'millrace.config.ts', null],
    ['TypeScript in a folder of modules', 'millrace.config.ts', '{"type":"module"}'],
    ['JavaScript', 'millrace.config.mjs', null],
  ])(
    'a capability binds a program by a config in %s, where no package is installed',
    async (_language, config, packageJson) => {
      if (packageJson !== null) await write('package.json', packageJson);
      const types = config.endsWith('.ts');
      await write(
        config,
        `import { defineConfig } from 'millrace';
         import { subprocess } from '@millrace/exec';
         import { script } from './script${types ? '' : '.mjs'}';
         export default defineConfig({
           runners: [
             subprocess({
               capability: '/test/upper/v1',
               command: 'sh',
               args: ['-c', script${types ? ' as string' : ''}, 'sh', '{input:text}', '{meta:tail}', '{output:upper.txt}'],
               inputs: ['text'],
             }),
           ],
         });`,
      );
      const script = `(tr a-z A-Z < "$1"; printf %s "$2") > "$3"`;
      await write(
        types ? 'script.ts' : 'script.mjs',
        `export const script${types ? ': string' : ''} = ${JSON.stringify(script)};`,
      );
      await write('a.txt', 'loud\n');
      const { code, stdout, stderr } = await millrace(
        ['run', '/test/upper/v1', '--input', 'a.txt', '--meta', '{"tail":"!"}', '--json'],
        place,
      );
      expect([code, stderr]).toEqual([0, expect.stringContaining('1/1 tasks done; completed')]);
      expect(json(stdout)).toMatchObject({
        tasks: [{ label: '/test/upper/v1', status: 'completed' }],
        artifacts: [{ path: 'upper.txt' }],
      });
      expect(await read('out/upper.txt')).toBe('LOUD\n!');
    },
  );

  test.runIf(existsSync('/usr/bin/convert'))(
    'the example of docs/subprocess.md runs as it stands',
    async () => {
      const docs = await readFile(new URL('../../../docs/subprocess.md', import.meta.url), 'utf8');
      const [, config = ''] = /```ts\n(\/\/ millrace\.config\.ts\n.*?)```/s.exec(docs)!;
      const [, command = ''] = /```sh\nmillrace (run \S+ --input photo\.jpg --meta \S+)/.exec(docs)!;
      await write('millrace.config.ts', config);
      const photo = path.join(place.cwd, 'photo.jpg');
      await promisify(execFile)('/usr/bin/convert', ['-size', '800x600', 'gradient:red-blue', photo]);
      const words = command.split(' ').map((word) => word.replaceAll("'", ''));
      const { code, stdout } = await millrace([...words, '--json'], place);
      expect([code, json(stdout)]).toMatchObject([0, { artifacts: [{ path: 'thumbnail.png' }] }]);
      const png = await readFile(path.join(place.cwd, 'out/thumbnail.png'));
      expect([png.readUInt32BE(16), png.readUInt32BE(20)]).toEqual([128, 96]);
    },
  );

  test('a capability that nothing here has is refused at once', async () => {
    await write('shout.ts', SHOUT);
    await write('millrace.config.json', '{"runners":["./shout.ts"]}');
    const { code, stderr } = await millrace(['run', '/test/shuot/v1'], place);
    expect([code, stderr]).toEqual([
      2,
      'millrace: no runner here does /test/shuot/v1; loaded are /test/shout/v1; add the module with --runner or in the config file\n',
    ]);
  });

  test('a job that nothing here can do is refused at once', async () => {
    await write('shout.ts', SHOUT);
    await write('job.yaml', 'tasks: [{ capability: /other/v1 }]\n');
    const { code, stderr } = await millrace(['run', 'job.yaml', '--runner', 'shout.ts'], place);
    expect(code).toBe(2);
    expect(stderr).toMatch(/no runner here does \/other\/v1; loaded are \/test\/shout\/v1/);
  });

  test('a module that does not load is exit code 2 with its own words', async () => {
    await write('broken.ts', 'throw new Error("half written");');
    const { code, stderr } = await millrace(['run', 'broken.ts'], place);
    expect(code).toBe(2);
    expect(stderr).toMatch(
      /^millrace: runner module \S*broken\.ts threw while it was loaded: Error: half written\n$/,
    );
    expect(await leftBehind()).toEqual([]);
  });

  test('a runner that fails is exit code 1 with the reason and its last log lines', async () => {
    await write('fail.mjs', FAIL);
    const { code, stdout } = await millrace(['run', 'fail.mjs'], place);
    expect(code).toBe(1);
    expect(stdout).toMatch(/^failed {2}/);
    expect(stdout).toMatch(/failed after 3 attempts: .*the input is not a picture/);
    expect(stdout).toMatch(/last log lines of .*:\n {4}info {2}about to fail {2}code=7/);
  });

  test('Ctrl-C cancels a runner that holds its thread; exit code 3, nothing left', async () => {
    await write('spin.mjs', SPIN);
    await write('millrace.config.json', '{"limits":{"graceMs":200}}');
    const begun = path.join(place.cwd, 'begun');
    await using program = new Program(
      ['run', 'spin.mjs', '--meta', JSON.stringify({ begun }), '--json'],
      place,
    );
    await fileAppears(begun);
    program.signal('SIGINT');
    const { code, stdout, stderr } = await program.ended;
    expect(stderr).toMatch(/interrupted: canceling the job/);
    expect(code).toBe(3);
    expect(json(stdout)).toMatchObject({ status: 'canceled', error: { code: 'canceled' } });
    expect(await leftBehind()).toEqual([]);
  });

  test('--timeout cancels the job and is a failure', async () => {
    await write('spin.mjs', SPIN);
    await write('millrace.config.json', '{"limits":{"graceMs":200}}');
    const meta = JSON.stringify({ begun: path.join(place.cwd, 'begun') });
    const { code, stdout } = await millrace(
      ['run', 'spin.mjs', '--meta', meta, '--timeout', '500ms', '--json'],
      place,
    );
    expect(code).toBe(1);
    expect(json(stdout)).toMatchObject({
      error: { code: 'deadline_exceeded', message: 'timeout: not done after 500 ms' },
    });
  });
});

describe('millrace up', () => {
  const up = async (...more: string[]): Promise<{ program: Program; url: string }> => {
    const program = new Program(['up', ...more, '--port', '0', '--json'], place);
    const { url } = await program.firstDocument<{ url: string }>();
    return { program, url };
  };

  test('keeps a system that other commands find, and stops at a signal', async () => {
    await write('shout.ts', SHOUT);
    await write('hello.txt', 'hello');
    await write(
      'job.yaml',
      'label: from a file\ntasks: [{ label: t, capability: /test/shout/v1, inputs_cids: [file:hello.txt] }]\n',
    );
    const { program, url } = await up('shout.ts');
    await using _ = program;
    expect(url).toMatch(/^http:\/\/127\.0\.0\.1:\d+$/);

    const data = path.join(place.home, '.local/share/millrace');
    expect((await stat(path.join(data, 'client-token'))).mode & 0o777).toBe(0o600);
    expect((await stat(data)).mode & 0o777).toBe(0o700);
    expect(json(await readFile(path.join(data, 'dispatcher.json'), 'utf8'))).toEqual({
      url,
      pid: program.child.pid,
    });

    const submit = ['submit', 'job.yaml', '--json', '--idempotency-key', 'k1'];
    const { job_id: jobId } = json(await answer(submit, place)) as { job_id: string };
    expect(json(await answer(submit, place))).toEqual({ job_id: jobId });
    const watched = json(await answer(['job', 'watch', jobId, '--json'], place));
    expect(watched).toMatchObject({
      job_id: jobId,
      status: 'completed',
      artifacts: [{ path: 'loud/0.txt' }],
    });

    const fetched = json(await answer(['get', jobId, '**/0.txt', '--out', 'fetched', '--json'], place));
    expect(fetched).toMatchObject({ artifacts: [{ path: 'loud/0.txt', size: 5 }] });
    expect(await read('fetched/loud/0.txt')).toBe('HELLO');
    const none = await ask(['get', jobId, '*.png'], place);
    expect(none.code).toBe(2);
    expect(none.stderr).toMatch(
      /none of the 1 artifacts .* matches \*\.png; there is for example loud\/0\.txt/,
    );

    const shown = await answer(['job', 'show', jobId], place);
    expect(shown).toMatch(/^from a file {2}completed$/m);
    expect(shown).toMatch(/^t +completed +1\/3 +.* local$/m);
    expect(await answer(['job', 'logs', jobId], place)).toBe('info  shouted  inputs=1\n');
    expect(await answer(['job', 'logs', jobId, '--timestamps'], place)).toMatch(
      /^\d\d:\d\d:\d\d\.\d{3} {2}info {2}shouted {2}inputs=1\n$/,
    );
    expect(json(await answer(['job', 'logs', jobId, '--json'], place))).toMatchObject({
      job_id: jobId,
      logs: [{ attempt: 1, level: 'info', text: 'shouted', fields: { inputs: 1 } }],
    });
    expect(await answer(['job', 'cancel', jobId], place)).toBe(`job ${jobId} is completed\n`);
    expect(json(await answer(['jobs', '--json'], place))).toMatchObject({ jobs: [{ job: { id: jobId } }] });
    expect(await answer(['jobs', '--status', 'failed'], place)).toBe('no job is failed\n');

    expect(json(await answer(['nodes', '--json'], place))).toMatchObject({
      nodes: [{ name: 'local', capabilities: ['/compute/v1', '/test/shout/v1'] }],
    });
    const { checks } = json(await answer(['doctor', '--json'], place)) as {
      checks: { name: string; state: string }[];
    };
    const stateOf = (name: string): string | undefined => checks.find((check) => check.name === name)?.state;
    expect(['dispatcher', 'token', 'clock'].map(stateOf)).toEqual(['ok', 'ok', 'ok']);

    const unknown = await ask(['job', 'show', '00000000-0000-4000-8000-000000000000'], place);
    expect([unknown.code, unknown.stdout]).toEqual([2, '']);
    expect(unknown.stderr).toMatch(/there is no job 00000000/);
    const refused = await ask(['jobs', '--token', 'wrong'], place);
    expect(refused.code).toBe(4);
    expect(refused.stderr).toMatch(/refused the token/);

    program.signal('SIGTERM');
    expect((await program.ended).code).toBe(0);
    expect((await ask(['jobs'], place)).code).toBe(4);
  });

  test('is one per data folder, and a reader that leaves early is no error', async () => {
    const { program, url } = await up();
    await using _ = program;
    const second = await millrace(['up', '--port', '0'], place);
    expect(second.code).toBe(2);
    expect(second.stderr).toMatch(/a dispatcher runs on .* already/);
    expect(second.stderr).toContain(url);

    const bin = fileURLToPath(new URL('../bin/millrace.js', import.meta.url));
    const jobs = `"${process.execPath}" "${bin}" jobs`;
    const { stdout, stderr } = await promisify(execFile)('sh', ['-c', `${jobs} | true; ${jobs} | head -1`], {
      cwd: place.cwd,
      env: { PATH: process.env['PATH'] ?? '', HOME: place.home },
    });
    expect([stdout, stderr]).toEqual(['no jobs yet; "millrace submit job.yaml" makes one\n', '']);
  });

  test('keeps its jobs and its node over a restart', async () => {
    await write('shout.ts', SHOUT);
    await write('job.yaml', 'tasks: [{ label: t, capability: /test/shout/v1 }]\n');
    const first = await up('shout.ts');
    {
      await using program = first.program;
      await answer(['submit', 'job.yaml', '--watch'], place);
      // Without ceremony: what was acknowledged must be there all the same.
      program.signal('SIGKILL');
      await program.ended;
    }
    const second = await up('shout.ts');
    await using _ = second.program;
    expect(json(await answer(['jobs', '--json'], place))).toMatchObject({
      jobs: [{ job: { status: 'completed' } }],
    });
    const { nodes } = json(await answer(['nodes', '--json'], place)) as { nodes: unknown[] };
    expect(nodes).toHaveLength(1);
  });

  test('a second signal aborts what the first one waits for', async () => {
    await write('spin.mjs', SPIN);
    await write('millrace.config.json', '{"limits":{"graceMs":200}}');
    const begun = path.join(place.cwd, 'begun');
    await write('job.json', JSON.stringify({ tasks: [{ capability: '/test/spin/v1', meta: { begun } }] }));
    const { program } = await up('spin.mjs');
    await using _ = program;
    const jobId = (await answer(['submit', 'job.json'], place)).trim();
    await fileAppears(begun);
    // Without --follow the log of a job that goes on has an end.
    expect(json(await answer(['job', 'logs', jobId, '--json'], place))).toEqual({ job_id: jobId, logs: [] });
    program.signal('SIGINT');
    await program.printed('stderr', /stopping: no new work; 1 running task may go on/);
    program.signal('SIGINT');
    await program.printed('stderr', /aborting 1 running task/);
    expect((await program.ended).code).toBe(0);
  });
});

describe('a dispatcher and a node as two processes', () => {
  test('work with credentials from "nodes add"', async () => {
    await write('shout.ts', SHOUT);
    await write('hello.txt', 'hello');
    await write('job.yaml', 'tasks: [{ label: t, capability: /test/shout/v1, inputs_cids: [input:it] }]\n');
    await using dispatcher = new Program(
      [
        'dispatch',
        'serve',
        '--port',
        '0',
        '--data',
        'state',
        '--store',
        'sqlite:db/jobs.db',
        '--blobs',
        'file:bytes',
      ],
      place,
    );
    const { url } = await dispatcher.firstDocument<{ url: string }>();
    const token = (await read('state/client-token')).trim();
    const env = { MILLRACE_URL: url, MILLRACE_TOKEN: token };

    const add = ['nodes', 'add', '--name', 'garage', '--out', 'garage.env', '--json'];
    const { id } = json(await answer(add, place, { env })) as { id: string };
    expect((await stat(path.join(place.cwd, 'garage.env'))).mode & 0o777).toBe(0o600);
    // The file is there already, so no second node was made for it.
    expect((await ask(add, place, { env })).code).toBe(2);
    const { nodes } = json(await answer(['nodes', '--json'], place, { env })) as { nodes: unknown[] };
    expect(nodes).toHaveLength(1);

    const config = await answer(
      ['node', 'start', '--env-file', 'garage.env', '--print-config', '--json'],
      place,
    );
    const secret = /SECP256K1_PRIVHEX=(?:0x)?([0-9a-f]{64})/.exec(await read('garage.env'))?.[1] ?? 'none';
    expect(secret).toMatch(/^[0-9a-f]{64}$/);
    expect(config).not.toContain(secret);
    expect(json(config)).toMatchObject({
      config: expect.arrayContaining([
        expect.objectContaining({ name: 'DDS_BASE_URL', value: url, from: 'garage.env' }),
      ]),
    });

    await using node = new Program(
      ['node', 'start', '--env-file', 'garage.env', '--runner', 'shout.ts', '--json'],
      place,
    );
    expect(await node.firstDocument()).toMatchObject({ capabilities: ['/test/shout/v1'] });
    const submit = ['submit', 'job.yaml', '--input', 'it=hello.txt', '--watch', '--json'];
    const { job_id: jobId } = json(await answer(submit, place, { env })) as { job_id: string };
    expect(json(await answer(['job', 'show', jobId, '--json'], place, { env }))).toMatchObject({
      receipts: [{ node_id: id, outcome: 'completed' }],
    });

    node.signal('SIGTERM');
    expect((await node.ended).code).toBe(0);
    dispatcher.signal('SIGTERM');
    const ended = await dispatcher.ended;
    expect(ended.code).toBe(0);
    expect(ended.stdout.trimEnd().split('\n')).toHaveLength(1);
    expect(`${ended.stderr}${node.stderr}`).not.toContain(secret);
    expect(`${ended.stderr}${node.stderr}`).not.toContain(token);
  });

  test('a job run with --url is done by the nodes there', async () => {
    await write('shout.ts', SHOUT);
    await using program = new Program(['up', 'shout.ts', '--port', '0', '--json'], place);
    const { url } = await program.firstDocument<{ url: string }>();
    await answer(['run', 'shout.ts', '--input', '-', '--url', url], place, { stdin: 'there' });
    expect(await read('out/loud/0.txt')).toBe('THERE');
    const { jobs } = json(await answer(['jobs', '--json'], place)) as { jobs: unknown[] };
    expect(jobs).toHaveLength(1);
  });
});

describe('millrace doctor', () => {
  test('is content with a fresh machine, and says what is not there yet', async () => {
    const { code, stdout } = await ask(['doctor'], place);
    expect(code).toBe(0);
    expect(stdout).toMatch(/^ok {4}node\.js/m);
    expect(stdout).toMatch(/^ok {4}data folder/m);
    expect(stdout).toMatch(/durable writes per second/);
    expect(stdout).toMatch(/^warn {2}dispatcher +none is running/m);
  });

  test('fails for what would not work, with exit code 2', async () => {
    await write('broken.mjs', 'export default 7;');
    await write('millrace.config.yaml', 'runners: [./broken.mjs]\n');
    const { code, stdout } = await ask(['doctor', '--url', 'http://127.0.0.1:9', '--json'], place);
    expect(code).toBe(2);
    const { ok, checks } = json(stdout) as { ok: boolean; checks: { name: string; state: string }[] };
    expect(ok).toBe(false);
    expect(checks.filter(({ state }) => state === 'fail').map(({ name }) => name)).toEqual([
      'dispatcher',
      'runner',
    ]);
  });
});
