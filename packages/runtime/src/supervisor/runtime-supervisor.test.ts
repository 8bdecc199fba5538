import { mkdtemp, readFile } from 'node:fs/promises';
import path from 'node:path';
import { MillraceError } from '@millrace/runner';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Programs, alive } from '../programs.test.support.ts';
import { CAPTURE_ALL } from './capture.ts';
import type { SupervisorLimits } from './limits.ts';
import { RuntimeSupervisor, type RuntimeEvent, type SupervisorOptions } from './runtime-supervisor.ts';

const ALL = { stdout: CAPTURE_ALL, stderr: CAPTURE_ALL };
const QUICK: Partial<SupervisorLimits> = { stopMs: 1_000, exitMs: 500, killGraceMs: 500 };

let programs: Programs;
let server: string;
let command: string;

beforeAll(async () => {
  programs = await Programs.open();
  const body = `
    deploy: (ctx) => ({ vols: [{ name: 'vol-in', path: '/in' }], cli: ctx.cli }),
    start: (ctx) => 'started ' + ctx.cli.command.args.join(','),
    runCommand: (ctx, run) => ctx.command(async (command) => {
      await command.counter('golem.usage.custom', 1.5);
      await command.state('phase', { a: 1 });
      if (run.entryPoint === 'sleep') await new Promise((done, fail) => {
        const timer = setTimeout(done, 60000);
        command.signal.addEventListener('abort', () => { clearTimeout(timer); fail(command.signal.reason); });
      });
      else await command.spawn(run.entryPoint, run.args);
    })`;
  server = await programs.runtime(body);
  command = await programs.runtime(`mode: 'command', ${body}`);
});
afterAll(() => programs[Symbol.asyncDispose]());

async function open(runtime: string, options: Partial<SupervisorOptions> = {}): Promise<RuntimeSupervisor> {
  const workDir = await mkdtemp(path.join(programs.dir, 'work-'));
  return new RuntimeSupervisor({ runtime, workDir, ...options, limits: { ...QUICK, ...options.limits } });
}

async function ready(runtime: string, options: Partial<SupervisorOptions> = {}): Promise<RuntimeSupervisor> {
  const supervisor = await open(runtime, options);
  try {
    expect((await supervisor.deploy()).exitCode).toBe(0);
    expect((await supervisor.start()).exitCode).toBe(0);
    return supervisor;
  } catch (error) {
    await supervisor.close();
    throw error;
  }
}

async function failure(promise: Promise<unknown>): Promise<MillraceError> {
  const error: unknown = await promise.then(
    () => new Error('it did not fail'),
    (thrown: unknown) => thrown,
  );
  if (!MillraceError.is(error)) throw error;
  return error;
}

describe.each(['server', 'command'] as const)('a runtime in %s mode', (mode) => {
  const runtime = (): string => (mode === 'server' ? server : command);

  test('is deployed, started, given commands, stopped, and deployed again', async () => {
    const events: RuntimeEvent[] = [];
    await using supervisor = await open(runtime(), {
      onEvent: (event) => events.push(event),
      taskPackage: runtime(),
      hardware: { cpuCores: 2.5, memGib: 0.5 },
      runtimeArgs: [],
    });
    const deployed = await supervisor.deploy({ volumes: { '/a': { host: {} } }, hostname: 'h' });
    expect(supervisor.mode).toBe(mode);
    expect(deployed.volumes).toEqual([{ name: 'vol-in', path: '/in' }]);
    expect(JSON.parse(String(deployed.stdout.value))).toMatchObject({
      cli: {
        workdir: supervisor.workDir,
        taskPackage: runtime(),
        cpuCores: 2,
        memGib: 0.5,
        volumeOverride: { '/a': { host: {} } },
        hostname: 'h',
      },
    });
    const started = await supervisor.start(['--x', 'y']);
    expect(started).toMatchObject({ exitCode: 0, stdout: { value: 'started --x,y' } });

    const script = 'echo out; echo err >&2; pwd; exit 3';
    const result = await supervisor.run({ entryPoint: '/bin/sh', args: ['-c', script] }, { capture: ALL });
    expect(result).toMatchObject({
      exitCode: 3,
      stdout: { value: `out\n${supervisor.workDir}\n` },
      stderr: { value: 'err\n' },
    });
    const quiet = await supervisor.run({ entryPoint: '/bin/echo', args: ['x'] });
    expect(quiet).toMatchObject({ exitCode: 0, stdout: { value: null, totalBytes: 2 } });
    if (mode === 'server') {
      expect(events).toContainEqual({ kind: 'counter', name: 'golem.usage.custom', value: 1.5 });
      expect(events).toContainEqual({ kind: 'state', name: 'phase', value: { a: 1 } });
      expect(await supervisor.usage()).toMatchObject({ 'golem.usage.custom': 1.5 });
    }
    expect((await supervisor.usage())['golem.usage.duration_sec']).toBeGreaterThan(0);
    await supervisor.terminate();
    expect(supervisor.state).toBe('Initialized');
    expect((await supervisor.deploy()).exitCode).toBe(0);
  });

  test('has a command ended by its signal, and it is gone when that is told', async () => {
    await using supervisor = await ready(runtime());
    const stop = new AbortController();
    let output = '';
    const running = await supervisor.spawn(
      { entryPoint: '/bin/sh', args: ['-c', 'trap "" TERM; echo $$; sleep 600 & wait; wait'] },
      {
        signal: stop.signal,
        onOutput: (_stream, chunk) => {
          output += Buffer.from(chunk).toString();
          stop.abort(new Error('not needed any more'));
        },
      },
    );
    await expect(running.result).rejects.toThrow('not needed any more');
    expect(alive(Number(output))).toBe(false);
    expect((await supervisor.run({ entryPoint: '/bin/true' })).exitCode).toBe(0);
  });

  test('has a command ended at each limit, named with its value', async () => {
    await using supervisor = await ready(runtime(), { limits: { outputBytes: 100_000, runMs: 3_000 } });
    const fits = await supervisor.run({ entryPoint: '/bin/sh', args: ['-c', 'head -c 100000 /dev/zero'] });
    expect(fits.stdout.totalBytes).toBe(100_000);
    const flood = await failure(
      supervisor.run({ entryPoint: '/bin/sh', args: ['-c', 'head -c 100001 /dev/zero; sleep 600'] }),
    );
    expect(flood).toMatchObject({
      code: 'resource_exhausted',
      details: { limit: 'outputBytes', value: 100_000 },
    });
    const slow = await failure(supervisor.run({ entryPoint: '/bin/sleep', args: ['600'] }));
    expect(slow).toMatchObject({ code: 'deadline_exceeded', message: expect.stringContaining('3000 ms') });
  });

  test('leaves no process behind, not even one that left its group', async () => {
    const supervisor = await ready(runtime());
    const pidFile = path.join(supervisor.workDir, 'pid');
    const script = `setsid sh -c 'echo $$ > ${pidFile}; exec sleep 600' > /dev/null 2>&1 & while [ ! -s ${pidFile} ]; do sleep 0.05; done`;
    expect((await supervisor.run({ entryPoint: '/bin/sh', args: ['-c', script] })).exitCode).toBe(0);
    const pid = Number(await readFile(pidFile, 'utf8'));
    expect(alive(pid)).toBe(true);
    await supervisor.close();
    expect(alive(pid)).toBe(false);
    await supervisor.close();
    expect((await failure(supervisor.deploy())).message).toContain('closed');
  });
});

describe('the states', () => {
  test('refuse commands out of place and stay where they are', async () => {
    await using supervisor = await open(server);
    expect((await failure(supervisor.start())).message).toBe(
      'Activity is initialized - deploy() command is expected now',
    );
    expect((await failure(supervisor.spawn({ entryPoint: 'x' }))).code).toBe('failed_precondition');
    const deploying = supervisor.deploy();
    expect((await failure(supervisor.deploy())).message).toBe('Busy with deploy');
    await deploying;
    expect((await failure(supervisor.deploy())).message).toBe(
      'Activity is deployed - start() command is expected now',
    );
    await supervisor.start();
    expect((await failure(supervisor.start())).message).toBe(
      'Cannot send start() after a successful start()',
    );
    for (const entryPoint of ['', '/', '..', '/bin/..']) {
      expect((await failure(supervisor.spawn({ entryPoint }))).message).toContain('must name a program');
    }
    expect(supervisor.state).toBe('Ready');
  });

  test('do not advance when a command failed', async () => {
    const failing = await programs.runtime(`deploy: () => { throw new Error('no'); }, runCommand: () => 0`);
    await using supervisor = await open(failing);
    expect(await supervisor.deploy()).toMatchObject({
      exitCode: 1,
      stderr: { value: 'Error: no (code: 1)\n' },
    });
    expect(supervisor.state).toBe('Initialized');
    const refusing = await programs.module(
      `process.stdout.write('{"valid":{"Err":"no image"},"startMode":"blocking"}')`,
    );
    await using other = await open(refusing);
    expect((await failure(other.deploy())).message).toBe('the runtime refused to deploy: no image');
    expect(other.state).toBe('Initialized');
  });
});

describe('a runtime that cannot be started', () => {
  test('is told as what is wrong with it', async () => {
    await using missing = await open(programs.path('nothing'));
    expect(await failure(missing.deploy())).toMatchObject({
      code: 'not_found',
      message: expect.stringContaining('nothing cannot be started'),
    });
    const { writeFile } = await import('node:fs/promises');
    await writeFile(programs.path('plain'), 'x', { mode: 0o644 });
    await using plain = await open(programs.path('plain'));
    expect(await failure(plain.deploy())).toMatchObject({
      code: 'failed_precondition',
      message: expect.stringContaining('chmod +x plain'),
    });
    await using folder = await open(programs.dir);
    expect(await failure(folder.deploy())).toMatchObject({
      code: 'failed_precondition',
      message: expect.stringContaining('is a folder, not a program'),
    });
  });

  test('is not started without its image, or in a work directory that is a file', async () => {
    const runtime = await programs.runtime(`runCommand: () => 0`);
    await using imageless = await open(runtime, { taskPackage: programs.path('absent.img') });
    expect(await failure(imageless.deploy())).toMatchObject({
      code: 'invalid_argument',
      message: expect.stringContaining(`task package ${programs.path('absent.img')} does not exist`),
    });
    await using homeless = new RuntimeSupervisor({ runtime, workDir: runtime });
    expect(await failure(homeless.deploy())).toMatchObject({
      code: 'invalid_argument',
      message: `work directory ${runtime} cannot be made`,
    });
  });

  test('fails its start with its last words', async () => {
    const failing = await programs.runtime(
      `start: () => { throw new Error('no KVM'); }, runCommand: () => 0`,
    );
    await using supervisor = await open(failing);
    await supervisor.deploy();
    const error = await failure(supervisor.start());
    expect(error.code).toBe('unavailable');
    expect(error.message).toContain(
      'the runtime exited with code 1; its last words: Error: Failed to start the runtime: no KVM',
    );
    expect(supervisor.state).toBe('Deployed');
  });
});

describe('a runtime that breaks the rules', () => {
  const answerRun = `if (request.command.case === 'run') send({ id, command: { case: 'run', value: { pid: 7n } } });`;

  test.each([
    [
      'exits with 0 between request and answer',
      `process.exit(0)`,
      'unavailable',
      'the runtime exited with code 0',
    ],
    ['is killed', `process.kill(process.pid, 'SIGKILL')`, 'unavailable', 'the runtime was ended by SIGKILL'],
    ['prints text on its wire', `raw('Segmentation fault\\n')`, 'data_loss', 'does not speak the protocol'],
    ['sends garbage', `raw(Buffer.from('05ffffffffff', 'hex'))`, 'data_loss', 'are not a response'],
    ['announces a frame of 4 GiB', `raw(Buffer.from('8080808010', 'hex'))`, 'data_loss', 'maxFrameBytes'],
    [
      'cuts a frame and exits',
      `raw(Buffer.from('0b10', 'hex')); process.exit(0)`,
      'data_loss',
      'middle of a frame',
    ],
    ['closes its output', `fs.closeSync(1)`, 'unavailable', 'closed its stdout'],
    [
      'answers with another kind',
      `send({ id, command: { case: 'kill', value: {} } })`,
      'data_loss',
      'answered run with kill',
    ],
    ['answers with nothing', `send({ id })`, 'data_loss', 'answered run with nothing'],
    [
      'answers another id',
      `send({ id: id + 1n, command: { case: 'run', value: {} } })`,
      'deadline_exceeded',
      'did not answer run',
    ],
    ['never answers', ``, 'deadline_exceeded', 'did not answer run within 1500 ms'],
    [
      'answers with an error',
      `send({ id, command: { case: 'error', value: { code: 13, message: 'out of pids' } } })`,
      'failed_precondition',
      'refused run: out of pids (code 13)',
    ],
  ])('and %s fails the run', async (_name, body, code, message) => {
    await using supervisor = await ready(await programs.rawRuntime(body), { limits: { answerMs: 1_500 } });
    const error = await failure(supervisor.run({ entryPoint: 'x' }));
    expect(error.code).toBe(code);
    expect(error.message).toContain(message);
  });

  test.each([
    ['never answers hello', ``, 'deadline_exceeded', 'did not answer hello within 1000 ms'],
    ['exits with 0 instead of hello', `process.exit(0)`, 'unavailable', 'exited with code 0'],
    ['prints text first', `console.log('listening')`, 'data_loss', 'does not speak the protocol'],
    [
      'prints text and exits',
      `console.error('no config'); console.log('sorry'); process.exitCode = 3; process.stdin.destroy()`,
      'data_loss',
      'middle of a frame; the runtime exited with code 3; its last words: no config',
    ],
    [
      'floods Start with output',
      `for (;;) status({ running: true, stdout: Buffer.alloc(65536) })`,
      'resource_exhausted',
      'outputBytes',
    ],
  ])('and %s fails the start', async (_name, onHello, code, message) => {
    await using supervisor = await open(await programs.rawRuntime('', onHello), {
      limits: { startMs: 1_000, outputBytes: 1_000_000 },
    });
    await supervisor.deploy();
    const error = await failure(supervisor.start());
    expect(error.code).toBe(code);
    expect(error.message).toContain(message);
    expect(supervisor.state).toBe('Deployed');
  });

  test('and dies during a command fails it with the exit, not with the exit code as its result', async () => {
    const runtime = await programs.rawRuntime(
      `${answerRun} console.error('out of memory'); setTimeout(() => process.exit(0), 50)`,
    );
    await using supervisor = await ready(runtime);
    const error = await failure(supervisor.run({ entryPoint: 'x' }));
    expect(error.message).toBe('the runtime exited with code 0; its last words: out of memory');
    expect((await failure(supervisor.run({ entryPoint: 'x' }))).message).toContain('exited with code 0');
  });

  test('and sends events for unknown pids before and after the answer has them told as output of nobody', async () => {
    const unknown = `status({ pid: 99n, running: true, stdout: Buffer.from('who?') });`;
    const runtime = await programs.rawRuntime(`
      status({ pid: 7n, running: true });
      status({ pid: 7n, running: true, stdout: Buffer.from('early ') });
      ${unknown} ${answerRun} ${unknown}
      send({ event: true, id, command: { case: 'kill', value: {} } });
      send({ id: 1000n, command: { case: 'kill', value: {} } });
      status({ pid: 7n, running: true, stdout: Buffer.from('late') });
      status({ pid: 7n, returnCode: 3 });
      status({ pid: 7n, running: true, stdout: Buffer.from('too late') });
      ${unknown}`);
    const strays: string[] = [];
    await using supervisor = await ready(runtime, {
      onEvent: (event) => {
        if (event.kind === 'output' && event.pid !== null)
          strays.push(`${event.pid} ${Buffer.from(event.chunk).toString()}`);
      },
    });
    const result = await supervisor.run({ entryPoint: 'x' }, { capture: ALL });
    expect(result).toMatchObject({ exitCode: 3, stdout: { value: 'early late' } });
    const again = await failure(supervisor.run({ entryPoint: 'x' }));
    expect(again.message).toBe('the runtime gave the pid 7 to two commands');
    expect(strays.slice(0, 3)).toEqual(['99 who?', '99 who?', '99 who?']);
  });

  test('and floods with events of pids it never names is stopped', async () => {
    const runtime = await programs.rawRuntime(
      `for (let pid = 1n; ; pid += 1n) status({ pid, running: true, stdout: Buffer.alloc(60000) })`,
    );
    await using supervisor = await ready(runtime);
    const error = await failure(supervisor.run({ entryPoint: 'x' }));
    expect(error).toMatchObject({
      code: 'resource_exhausted',
      message: expect.stringContaining('commands it has not named'),
    });
  });

  test('and cannot kill is itself stopped when a command is to end', async () => {
    const runtime = await programs.rawRuntime(`
      ${answerRun}
      if (request.command.case === 'kill') send({ id, command: { case: 'error', value: { code: 1, message: 'Not supported' } } });
      if (request.command.case === 'shutdown') send({ id, command: { case: 'shutdown', value: {} } });`);
    await using supervisor = await ready(runtime);
    const stop = new AbortController();
    const running = await supervisor.spawn({ entryPoint: 'x' }, { signal: stop.signal });
    stop.abort(new Error('canceled by hand'));
    await expect(running.result).rejects.toThrow('canceled by hand');
    expect((await failure(supervisor.run({ entryPoint: 'x' }))).message).toContain('did not end a command');
  });

  test('and does not answer a run that is to end is stopped', async () => {
    await using supervisor = await ready(await programs.rawRuntime(''));
    const stop = new AbortController();
    const running = supervisor.spawn({ entryPoint: 'x' }, { signal: stop.signal });
    stop.abort(new Error('canceled by hand'));
    await expect(running).rejects.toThrow('canceled by hand');
  });

  test('and ignores Shutdown, the end of its input and SIGTERM is killed with its children', async () => {
    const runtime = await programs.rawRuntime(
      `if (request.command.case === 'run') {
         process.on('SIGTERM', () => {}); setInterval(() => {}, 1000);
         const child = spawn('sleep', ['600'], { stdio: 'ignore' });
         send({ id, command: { case: 'run', value: { pid: 1n } } });
         status({ pid: 1n, running: true, stdout: Buffer.from(process.pid + ' ' + child.pid) });
       }`,
    );
    const supervisor = await ready(runtime);
    let pids: number[] = [];
    const seen = new Promise<void>((resolve) => {
      void supervisor
        .spawn(
          { entryPoint: 'x' },
          {
            onOutput: (_stream, chunk) => {
              pids = Buffer.from(chunk).toString().split(' ').map(Number);
              resolve();
            },
          },
        )
        .then(async (running) => expect((await failure(running.result)).code).toBe('canceled'));
    });
    await seen;
    await supervisor.close();
    expect(pids).toHaveLength(2);
    for (const pid of pids) expect(alive(pid)).toBe(false);
  });

  test('and keeps the pipes of a finished process open does not hold it up', async () => {
    const runtime = await programs.module(`
      import { spawn } from 'node:child_process';
      if (process.argv.includes('deploy')) {
        spawn('sleep', ['600'], { stdio: 'inherit', detached: true }).unref();
        process.stdout.write('{"valid":{"Ok":""}}');
      }`);
    await using supervisor = await open(runtime);
    expect((await supervisor.deploy()).exitCode).toBe(0);
    expect(supervisor.mode).toBe('command');
  });
});

test('a thousand runs at the same time each have their own output and code', async () => {
  const runtime = await programs.runtime(`
    runCommand: (ctx, run) => ctx.command(async (command) => {
      await command.stdout(run.args[0]);
      command.exitCode = Number(run.args[0]) % 7;
    })`);
  await using supervisor = await ready(runtime);
  const results = await Promise.all(
    Array.from({ length: 1000 }, (_, index) =>
      supervisor.run({ entryPoint: 'x', args: [String(index)] }, { capture: ALL }),
    ),
  );
  for (const [index, result] of results.entries()) {
    expect(result).toMatchObject({ exitCode: index % 7, stdout: { value: String(index) } });
  }
});

test('a runtime sees none of our environment but what is harmless or granted', async () => {
  process.env.MILLRACE_TEST_SECRET = 'hunter2';
  try {
    await using supervisor = await ready(command, { env: { GRANTED: 'yes' } });
    const { stdout } = await supervisor.run({ entryPoint: '/usr/bin/env' }, { capture: ALL });
    expect(stdout.value).toContain('PATH=');
    expect(stdout.value).toContain('GRANTED=yes');
    expect(stdout.value).not.toContain('hunter2');
  } finally {
    delete process.env.MILLRACE_TEST_SECRET;
  }
});
