/** The runner on a real engine: what a container is given, what is kept from it, and how it ends. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { MillraceError, TaskAbort } from '@millrace/runner';
import type { JsonObject } from '@millrace/runner';
import { createTestContext } from '@millrace/runner/testing';
import type { TestContext, TestContextOptions } from '@millrace/runner/testing';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { container } from './container.ts';
import type { ContainerOptions } from './container.ts';
import type { ContainerRunner } from './container-runner.ts';
import { containerRunner } from './generic.ts';
import { openPodman } from './podman.test.support.ts';
import type { TestEngine } from './podman.test.support.ts';
import { sweepContainers } from './sweep.ts';

const FOREVER = 'echo up; while true; do sleep 0.1; done';

const opened = await openPodman();

// Each container costs the engine several processes; a busy machine takes its time for them.
describe.skipIf(opened === null)('a container', { timeout: 120_000 }, () => {
  const podman = opened as TestEngine;
  let workDir = '';
  const runners: ContainerRunner[] = [];

  beforeAll(async () => {
    workDir = await mkdtemp(join(tmpdir(), 'millrace-container-test-'));
  });
  afterEach(async () => {
    await Promise.all(runners.splice(0).map((runner) => runner.close()));
    // Whatever a test did: nothing of it is left.
    expect(await podman.containers()).toEqual([]);
    expect(await readdir(workDir)).toEqual([]);
  });
  afterAll(async () => {
    await podman[Symbol.asyncDispose]();
    await rm(workDir, { recursive: true, force: true });
  });

  const surroundings = (): Pick<ContainerOptions, 'engine' | 'node' | 'workDir'> => ({
    engine: { host: podman.host },
    node: 'test-node',
    workDir,
  });
  const LIMITS = { memoryMiB: 64, nproc: 1024, graceMs: 2000 };
  const make = (options: Partial<ContainerOptions>): ContainerRunner => {
    const runner = container({
      capability: '/test/v1',
      image: podman.image,
      ...surroundings(),
      ...options,
      limits: { ...LIMITS, ...options.limits },
    });
    runners.push(runner);
    return runner;
  };
  /** Runs whatever the task's meta says: getting to know the engine is the dear part of a runner. */
  let any: ContainerRunner;
  beforeAll(() => {
    any = containerRunner({ ...surroundings(), allow: ['**'], limits: LIMITS });
  });
  afterAll(() => any.close());

  /** A task for that runner. */
  const shell = (script: string, options: JsonObject = {}): TestContextOptions => ({
    task: { meta: { image: podman.image, command: ['sh', '-c'], args: [script], ...options } },
  });
  const attempt = async (
    runner: ContainerRunner,
    task: TestContextOptions = {},
  ): Promise<{ readonly ctx: TestContext; readonly error: MillraceError; readonly usage: JsonObject }> => {
    const ctx = createTestContext(task);
    const error = await settle(runner, ctx);
    return { ctx, error: error as MillraceError, usage: usageOf(ctx) };
  };

  test('reads inputs by name, prints to the task log and leaves outputs', async () => {
    const runner = make({
      command: [
        'sh',
        '-c',
        'echo counting; echo soon >&2; wc -c < "$1" > "$2"; cat "$3" > /task/out/copy.txt; exit 0',
        'sh',
      ],
      args: ['{input:doc.txt}', '{output:count.txt}', '{inputs}'],
      inputs: ['doc.txt'],
      outputs: ['count.txt', '*.txt'],
    });
    const { ctx, error, usage } = await attempt(runner, { inputs: { a: 'hello' } });
    expect(error).toBeNull();
    expect(new Map([...ctx.outputs].map(([path, bytes]) => [path, Buffer.from(bytes).toString()]))).toEqual(
      new Map([
        ['copy.txt', 'hello'],
        ['count.txt', '5\n'],
      ]),
    );
    expect(ctx.logs).toEqual([
      { level: 'info', message: 'counting', fields: { stream: 'stdout' } },
      { level: 'warn', message: 'soon', fields: { stream: 'stderr' } },
    ]);
    expect(usage).toMatchObject({
      bytes_in: 5,
      bytes_out: 7,
      exit_code: 0,
      signal: null,
      sandbox: {
        applied: { tier: 'container', controls: { network: 'engine', privileges: 'engine' } },
        missing: [],
      },
      container: { image: podman.image, engine: expect.stringMatching(/^Podman \d/) as string },
    });
    expect(usage['wall_ms']).toBeGreaterThan(0);
  });

  test('has no privileges, no network, a read-only root and only what it is given', async () => {
    const { ctx, error } = await attempt(
      make({
        command: ['sh', '-c'],
        args: [
          `grep -E "^(CapEff|CapBnd|NoNewPrivs|Seccomp):" /proc/self/status | tr -d "\t"
         echo "user $(id -u)"; echo "devices $(ls /sys/class/net)"; echo "files $(ulimit -n)"; echo "task $(ls /task | tr "\n" " ")"
         touch /x 2>&1; touch /task/in/x 2>&1
         wget -O - http://1.1.1.1/ 2>&1 | tail -n 1; test -e /var/run/docker.sock && echo sees the engine
         dd if=/dev/zero of=/tmp/big bs=1M count=3 2>/dev/null || echo "tmp is full"; echo "$GREETING"`,
        ],
        env: { GREETING: 'hello' },
        limits: { nofile: 77 },
        tmpfs: { '/tmp': 2 },
      }),
    );
    expect(error).toBeNull();
    const user = process.getuid?.() === 0 ? 65534 : process.getuid?.();
    expect(ctx.logs.map(({ message }) => message.trim())).toEqual([
      'CapEff:0000000000000000',
      'CapBnd:0000000000000000',
      'NoNewPrivs:1',
      'Seccomp:2',
      `user ${user}`,
      'devices lo',
      'files 77',
      'task events in out',
      'touch: /x: Read-only file system',
      'touch: /task/in/x: Read-only file system',
      "wget: can't connect to remote host (1.1.1.1): Network is unreachable",
      'tmp is full',
      'hello',
    ]);
  });

  test('tells progress, events and log lines on a pipe, and garbage there fails nothing', async () => {
    const { ctx, error } = await attempt(
      any,
      shell(
        `echo '{"progress":0.5}' > $MILLRACE_EVENTS; echo '{"event":{"kind":"frame"},"log":"half"}' >> $MILLRACE_EVENTS;
         head -c 300000 /dev/urandom > $MILLRACE_EVENTS; echo > $MILLRACE_EVENTS; echo 'not json' > $MILLRACE_EVENTS;
         echo '{"event":{"kind":"usage"}}' > $MILLRACE_EVENTS; rm $MILLRACE_EVENTS; echo '{"progress":1}' > $MILLRACE_EVENTS`,
      ),
    );
    expect(error).toBeNull();
    expect(ctx.progressValues).toEqual([0.5, 1]);
    expect(ctx.events.filter((event) => (event as JsonObject)['kind'] === 'frame')).toHaveLength(1);
    expect(ctx.events.filter((event) => (event as JsonObject)['kind'] === 'usage')).toHaveLength(1);
    const warned = ctx.logs.find(({ message }) =>
      message.startsWith('lines on MILLRACE_EVENTS were not understood'),
    );
    expect(warned?.fields['lines']).toBeGreaterThan(2);
  });

  test('that prints 100 MB is read to its end, and the log says how much was dropped', async () => {
    const megabytes = 100;
    const { ctx, error } = await attempt(
      any,
      shell(`yes 0123456789abcdef0123456789abcdef | head -c ${megabytes * 1024 ** 2}`, {
        limits: { logBytes: 1000 },
      }),
    );
    expect(error).toBeNull();
    expect(ctx.logs.at(-1)).toMatchObject({
      level: 'warn',
      fields: { limit: 'logBytes', value: 1000, dropped_bytes: megabytes * 1024 ** 2 - 1000 },
    });
  });

  test('that ends badly fails with its exit code and last words, or its signal', async () => {
    const code = await attempt(any, shell('echo cannot open the thing >&2; exit 7'));
    expect(code.error).toMatchObject({
      code: 'internal',
      message: `the program of ${podman.image} ended with exit code 7: cannot open the thing`,
      details: { ending: 'exit', exit_code: 7, signal: null },
    });
    const signal = await attempt(any, shell("sh -c 'kill -ABRT $$'; exit $?"));
    expect(signal.error).toMatchObject({
      code: 'internal',
      details: { ending: 'signal', signal: 'SIGABRT' },
    });
    const fine = await attempt(any, shell('exit 7', { failOnNonZero: false }));
    expect(fine.error).toBeNull();
    expect(fine.usage).toMatchObject({ exit_code: 7 });
  });

  test('whose image or program is missing fails as not found, and says what to do', async () => {
    const image = await attempt(make({ image: 'localhost/no-such-image:1' }));
    expect(image.error).toMatchObject({ code: 'not_found', details: { ending: 'spawn_failed' } });
    expect(image.error.message).toContain(
      'has no image localhost/no-such-image:1, and this runner may not pull; run "docker pull',
    );
    const digest = await attempt(
      make({ image: `${podman.image.replace(':latest', '')}@sha256:${'0'.repeat(64)}` }),
    );
    expect(digest.error).toMatchObject({ code: 'not_found' });
    const program = await attempt(make({ command: ['no-such-program'] }));
    expect(program.error).toMatchObject({ code: 'not_found', details: { ending: 'spawn_failed' } });
    expect(program.error.message).toContain('the image does not have the program');
  });

  test('whose image may be pulled and cannot be fails with the words of the registry', async () => {
    const { error } = await attempt(
      make({ image: 'localhost:1/nothing:1', engine: { host: podman.host, allowPull: true } }),
    );
    expect(error).toMatchObject({ code: 'failed_precondition' });
    expect(error.message).toMatch(/could not pull image localhost:1\/nothing:1: .*(refused|reset|http)/is);
  });

  test('is run by digest where that is required', async () => {
    expect(() => make({ requireDigest: true })).toThrow(
      /image localhost\/millrace-test:latest must be named by its digest/,
    );
    const { error, usage } = await attempt(
      make({ command: ['true'], image: podman.pinnedImage, requireDigest: true }),
    );
    expect(error).toBeNull();
    expect(usage).toMatchObject({ container: { image: podman.pinnedImage } });
  });

  test('that fills its memory is ended, and the verdict names the limit and the evidence', async () => {
    const { error, usage } = await attempt(
      make({ command: ['tail', '/dev/zero'], limits: { memoryMiB: 32 } }),
    );
    expect(error).toMatchObject({
      code: 'resource_exhausted',
      details: { ending: 'out_of_memory', limit: 'memoryMiB', value: 32, signal: 'SIGKILL' },
    });
    expect(['engine', 'cgroup', 'kernel']).toContain(error.details['evidence']);
    expect(usage).toMatchObject({ signal: 'SIGKILL' });
  });

  test('that forks without end is held to its number of processes', async () => {
    const { ctx, error } = await attempt(
      any,
      shell('n=0; while [ $n -lt 64 ]; do sleep 30 & n=$((n+1)); done; echo all of them started', {
        limits: { pids: 16 },
      }),
    );
    expect(error).toMatchObject({ code: 'internal', details: { ending: 'exit' } });
    expect(ctx.logs.map(({ message }) => message)).not.toContain('all of them started');
    expect(ctx.logs.some(({ message }) => /can.t fork/.test(message))).toBe(true);
  });

  test('that fills the folder of outputs is ended at diskBytes', async () => {
    const many = await attempt(
      any,
      shell(
        'n=0; while true; do n=$((n+1)); dd if=/dev/zero of=/task/out/$n bs=1M count=1 2>/dev/null; done',
        {
          limits: { diskBytes: 8 * 1024 ** 2 },
        },
      ),
    );
    expect(many.error).toMatchObject({
      code: 'resource_exhausted',
      details: { ending: 'limit', limit: 'diskBytes' },
    });
    const one = await attempt(
      any,
      shell('exec dd if=/dev/zero of=/task/out/big bs=1M count=64', { limits: { diskBytes: 8 * 1024 ** 2 } }),
    );
    expect(one.error.details).toMatchObject({ exit_code: expect.not.stringMatching('0') as unknown });
  });

  test('that runs too long is ended at wallMs', async () => {
    const { error } = await attempt(any, shell('sleep 60', { limits: { wallMs: 500, graceMs: 0 } }));
    expect(error).toMatchObject({
      code: 'deadline_exceeded',
      details: { ending: 'limit', limit: 'wallMs', value: 500 },
    });
  });

  test.each([
    ['a link to a file', 'ln -s /etc/passwd /task/out/a.txt', /output "a.txt" is a link/],
    ['a link out of the folder', 'ln -s ../../../../etc /task/out/dir; echo > /task/out/z.txt', null],
    [
      'a path that is too long',
      'd=/task/out/$(printf %0200d 1); mkdir $d; touch $d/$(printf %060d 1).txt',
      /must be at most 255 bytes long/,
    ],
    ['too many bytes', 'head -c 1001 /dev/zero > /task/out/a.txt', /limit outputBytes of 1000 reached/],
  ])('whose outputs have %s does not get it uploaded', async (_, script, problem) => {
    const { ctx, error } = await attempt(
      any,
      shell(script, { outputs: ['**/*.txt'], limits: { outputBytes: 1000 } }),
    );
    if (problem === null) {
      expect(error).toBeNull();
      expect([...ctx.outputs.keys()]).toEqual(['z.txt']);
    } else {
      expect(error.message).toMatch(problem);
      for (const bytes of ctx.outputs.values()) expect(bytes.byteLength).toBe(0);
    }
  });

  test('that is cancelled gets its signal and the grace, then is killed, and is gone when run settles', async () => {
    const cancel = async (
      script: string,
    ): Promise<{ readonly error: unknown; readonly ctx: TestContext }> => {
      const ctx = createTestContext(shell(script));
      const running = settle(any, ctx);
      await expect.poll(() => ctx.logs.length, { timeout: 20_000 }).toBe(1);
      ctx.abort('canceled');
      const error = await running;
      expect(await podman.containers()).toEqual([]);
      return { error, ctx };
    };
    const polite = await cancel('trap "echo bye; exit 0" TERM; echo ready; while true; do sleep 0.1; done');
    expect(polite.error).toBeInstanceOf(TaskAbort);
    expect(polite.ctx.logs.map(({ message }) => message)).toEqual(['ready', 'bye']);
    const stubborn = await cancel('trap "" TERM; echo ready; while true; do sleep 0.1; done');
    expect(stubborn.error).toMatchObject({ reason: 'canceled' });
    expect(usageOf(stubborn.ctx)).toMatchObject({ signal: 'SIGKILL' });
  });

  test('that is cancelled before it starts is never made', async () => {
    const ctx = createTestContext({
      ...shell('echo started'),
      inputs: { a: 'x' },
      onCall: ({ port }) => (port === 'input' ? ctx.abort('canceled') : undefined),
    });
    expect(await settle(any, ctx)).toMatchObject({ reason: 'canceled' });
    expect(ctx.logs).toEqual([]);
  });

  test('runs beside another of the same runner, and closing the runner ends both', async () => {
    const runner = make({
      command: ['sh', '-c', 'echo $MILLRACE_TASK_ID; trap "exit 0" TERM; while true; do sleep 0.1; done'],
    });
    const contexts = ['1', '2'].map((last) =>
      createTestContext({ task: { id: `00000000-0000-4000-8000-00000000000${last}` } }),
    );
    const tasks = contexts.map((ctx) => settle(runner, ctx));
    await expect
      .poll(() => contexts.map((ctx) => ctx.logs[0]?.message.at(-1)), { timeout: 20_000 })
      .toEqual(['1', '2']);
    expect(await podman.containers()).toHaveLength(2);
    await runner.close();
    for (const task of tasks) expect(await task).toMatchObject({ reason: 'shutdown' });
    await expect(runner.run(createTestContext())).rejects.toMatchObject({ reason: 'shutdown' });
  });

  test('of an image and command of the task runs only what is allowed', async () => {
    const runner = containerRunner({
      ...surroundings(),
      allow: ['localhost/millrace-*:latest'],
      env: { PINNED: 'operator' },
      allowEnv: ['GREETING', 'PINNED'],
      limits: LIMITS,
    });
    runners.push(runner);
    expect(runner.capability).toBe('/exec/container/v1');
    const meta = {
      container: {
        image: podman.image,
        command: ['sh', '-c'],
        args: ['echo "$GREETING $PINNED"; cat /task/in/* > out.txt'],
        workdir: '/task/out',
        env: [
          { key: 'GREETING', value: 'first' },
          { key: 'GREETING', value: 'last' },
          { key: 'PINNED', value: 'task' },
        ],
        inputs: ['name.txt'],
        outputs: ['out.txt'],
        limits: { memoryMiB: 32 },
      },
    };
    const { ctx, error } = await attempt(runner, { inputs: { a: 'text' }, task: { meta } });
    expect(error).toBeNull();
    expect(ctx.logs[0]?.message).toBe('last operator');
    expect(Buffer.from(ctx.outputs.get('out.txt')!).toString()).toBe('text');

    const refused = async (change: JsonObject): Promise<MillraceError> =>
      (await attempt(runner, { task: { meta: { ...meta.container, inputs: [], ...change } } })).error;
    expect(await refused({ image: 'localhost/other:latest' })).toMatchObject({ code: 'permission_denied' });
    expect(await refused({ image: 'localhost/millrace-a/b:latest' })).toMatchObject({
      code: 'permission_denied',
    });
    expect(await refused({ env: { LD_PRELOAD: 'x' } })).toMatchObject({ code: 'permission_denied' });
    expect(await refused({ network: true })).toMatchObject({ code: 'permission_denied' });
    expect(await refused({ limits: { memoryMiB: 65 } })).toMatchObject({
      code: 'invalid_argument',
      message: expect.stringContaining('meta.limits.memoryMiB must be at most 64') as string,
    });
  });

  test('of a node that was killed is swept by its label, and a living node keeps its own', async () => {
    const node = spawn(
      process.execPath,
      [fileURLToPath(new URL('crash-process.test.support.js', import.meta.url))],
      {
        env: { ...process.env, HOST: podman.host, IMAGE: podman.image, WORK_DIR: workDir },
        stdio: ['ignore', 'pipe', 'inherit'],
      },
    );
    const gone = once(node, 'exit');
    await Promise.race([once(node.stdout, 'data'), gone]);
    node.kill('SIGKILL');
    await gone;
    expect(await podman.containers()).toHaveLength(1);

    const living = createTestContext();
    // Another node's runner sweeps nothing of this one's.
    const running = settle(make({ command: ['sh', '-c', FOREVER], node: 'other-node' }), living);
    await expect.poll(() => living.logs.length, { timeout: 20_000 }).toBe(1);
    expect(await podman.containers()).toHaveLength(2);

    const engine = { host: podman.host };
    expect(await sweepContainers({ engine, node: 'third-node' })).toEqual([]);
    expect(await sweepContainers({ engine, node: 'other-node', exclusive: true })).toEqual([]);
    expect(await sweepContainers({ engine, node: 'test-node' })).toHaveLength(1);
    expect(await podman.containers()).toHaveLength(1);
    living.abort('canceled');
    expect(await running).toMatchObject({ reason: 'canceled' });
    // The folder of the killed one goes with the first task of the next runner that works there.
    expect((await attempt(make({ command: ['true'] }))).error).toBeNull();
  });

  test('of a node that was killed is removed when the next one starts, before any task, and the operator is told', async () => {
    const node = spawn(
      process.execPath,
      [fileURLToPath(new URL('crash-process.test.support.js', import.meta.url))],
      {
        env: { ...process.env, HOST: podman.host, IMAGE: podman.image, WORK_DIR: workDir },
        stdio: ['ignore', 'pipe', 'inherit'],
      },
    );
    const gone = once(node, 'exit');
    await Promise.race([once(node.stdout, 'data'), gone]);
    node.kill('SIGKILL');
    await gone;
    expect(await podman.containers()).toHaveLength(1);

    const { signal } = new AbortController();
    const ctx = createTestContext();
    await make({ command: ['true'] }).onNodeStart?.({ signal, log: ctx.log });
    expect(await podman.containers()).toEqual([]);
    expect(await readdir(workDir)).toEqual([]);
    expect(ctx.logs.map(({ level, message }) => [level, message])).toEqual([
      ['warn', 'removed a container that a crashed node had left behind'],
    ]);

    const away = make({ engine: { host: `unix://${workDir}/none.sock` } });
    await expect(away.onNodeStart?.({ signal, log: ctx.log })).rejects.toMatchObject({ code: 'unavailable' });
  });

  test('without an engine fails as unavailable at once, and names the engine', async () => {
    const runner = make({ engine: { host: `unix://${workDir}/none.sock` } });
    const { error } = await attempt(runner);
    expect(error).toMatchObject({ code: 'unavailable', retryable: true });
    expect(error.message).toMatch(
      /^no container engine answers at unix:.*none.sock; start Docker or Podman there/,
    );
  });

  test('whose engine dies fails as unavailable, and is removed as soon as the engine is back', async () => {
    const ctx = createTestContext(shell(FOREVER));
    const running = settle(any, ctx);
    await expect.poll(() => ctx.logs.length, { timeout: 20_000 }).toBe(1);
    await podman.kill();
    await podman.start();
    expect(await running).toMatchObject({ code: 'unavailable', details: { ending: 'lost' } });
    expect(await podman.containers()).toEqual([]);
    expect((await attempt(any, shell('true'))).error).toBeNull();
  });

  test('whose engine dies and stays away is said to be left, and is removed before the next task', async () => {
    const ctx = createTestContext(shell(FOREVER));
    const running = settle(any, ctx);
    await expect.poll(() => ctx.logs.length, { timeout: 20_000 }).toBe(1);
    await podman.kill();
    const error = await running;
    expect(error).toMatchObject({ code: 'unavailable', details: { ending: 'lost' } });
    expect((error as MillraceError).message).toMatch(
      /^container millrace-[0-9a-f]{20} may still be there: the container engine was lost/,
    );
    expect(await podman.podman('ps', '--quiet')).toMatch(/^[0-9a-f]{12}$/);
    await podman.start();
    expect((await attempt(any, shell('true'))).error).toBeNull();
    expect(await podman.containers()).toEqual([]);
  });
});

/** What `run` rejects with; null when it resolves. */
async function settle(runner: ContainerRunner, ctx: TestContext): Promise<unknown> {
  return await runner.run(ctx).then(
    () => null,
    (reason: unknown) => reason,
  );
}

function usageOf(ctx: TestContext): JsonObject {
  return ctx.events.find((event) => (event as JsonObject)['kind'] === 'usage') as JsonObject;
}
