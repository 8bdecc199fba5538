import { createRequire } from 'node:module';
import { existsSync, readFileSync, readdirSync } from 'node:fs';
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { Readable } from 'node:stream';
import { setTimeout as delay } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { MillraceError, TaskAbort } from '@millrace/runner';
import type { ControlPlane, JsonObject, Logger, TaskContext } from '@millrace/runner';
import { createTestContext, runnerSuite } from '@millrace/runner/testing';
import type { TestContext, TestContextOptions } from '@millrace/runner/testing';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { openThreadRunner } from './thread-runner.ts';
import type { ThreadRunner, ThreadRunnerOptions } from './thread-runner.ts';

const CONTRACT = pathToFileURL(createRequire(import.meta.url).resolve('@millrace/runner')).href;

let folder: string;
let files = 0;
const opened: ThreadRunner[] = [];

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'millrace-exec-'));
});
afterEach(async () => {
  await Promise.all(opened.splice(0).map((runner) => runner.close()));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

/** Writes files and gives the path of the first. */
async function module(source: string, name = `m${(files += 1)}.mjs`): Promise<string> {
  const path = join(folder, name);
  await mkdir(dirname(path), { recursive: true });
  await writeFile(path, source);
  return path;
}

/** A module whose `run` has this body; `before` stands above it. Its state is `globalThis`. */
async function work(body: string, before = ''): Promise<string> {
  return await module(`
    import { MessagePort } from 'node:worker_threads';
    import { MillraceError } from '${CONTRACT}';
    import { appendFileSync, existsSync, writeFileSync } from 'node:fs';
    import { setTimeout as delay } from 'node:timers/promises';
    ${before}
    let runs = 0;
    export default { capability: '/test/v1', async run(ctx) { runs += 1; const { path, n } = ctx.lease.task.meta ?? {}; ${body} } };
  `);
}

async function open(options: string | ThreadRunnerOptions): Promise<ThreadRunner> {
  const runner = await openThreadRunner(typeof options === 'string' ? { module: options } : options);
  opened.push(runner);
  return runner;
}

/** Opens a module with this body of `run`. */
async function openWork(
  body: string,
  options: Partial<ThreadRunnerOptions> = {},
  before = '',
): Promise<ThreadRunner> {
  return await open({ module: await work(body, before), ...options });
}

function context(options: TestContextOptions & { readonly meta?: JsonObject } = {}): TestContext {
  const { meta = null, ...rest } = options;
  return createTestContext({ ...rest, task: { meta, ...rest.task } });
}

/** What a run told by its artifact `name`, as JSON. */
function told(ctx: TestContext, name = 'told'): unknown {
  const bytes = ctx.outputs.get(name);
  return bytes === undefined ? undefined : JSON.parse(new TextDecoder().decode(bytes));
}
const TELL =
  'const tell = (value) => ctx.output.putBytes("told", new TextEncoder().encode(JSON.stringify(value)));';

async function failure(promise: Promise<unknown>): Promise<Error> {
  try {
    await promise;
  } catch (error) {
    return error as Error;
  }
  throw new Error('expected a rejection');
}

async function until(condition: () => boolean, what: string): Promise<void> {
  const end = performance.now() + 20_000;
  while (!condition()) {
    if (performance.now() > end) throw new Error(`timed out waiting until ${what}`);
    await delay(5);
  }
}

interface Line {
  readonly level: string;
  readonly message: string;
  readonly fields: JsonObject;
}

function recorder(): { log: Logger; lines: Line[] } {
  const lines: Line[] = [];
  const at =
    (level: string, bound: JsonObject) =>
    (message: string, fields: JsonObject = {}): void =>
      void lines.push({ level, message, fields: { ...bound, ...fields } });
  const logger = (bound: JsonObject): Logger => ({
    debug: at('debug', bound),
    info: at('info', bound),
    warn: at('warn', bound),
    error: at('error', bound),
    child: (fields) => logger({ ...bound, ...fields }),
  });
  return { log: logger({}), lines };
}

const temp = (name: string): string => join(folder, `${name}-${(files += 1)}`);

describe('the ports', () => {
  test('inputs arrive as bytes, as files, with their names, and as streams', async () => {
    const big = Buffer.alloc(3_000_000, 'abcdefghij');
    const runner = await openWork(`${TELL}
      const bytes = await ctx.input.getBytesByCid('a');
      const file = await ctx.input.materializeCidToTemp('a');
      const meta = await ctx.input.materializeCidWithMeta('a');
      let streamed = 0;
      for await (const chunk of await ctx.input.openRead('big')) streamed += chunk.length;
      await tell({ bytes: new TextDecoder().decode(bytes), isBytes: bytes instanceof Uint8Array,
        exists: existsSync(file), name: meta.name, type: meta.data_type, streamed });`);
    await using ctx = context({ inputs: { a: { content: 'hello', name: 'a.txt' }, big } });
    await runner.run(ctx);
    expect(told(ctx)).toMatchObject({
      bytes: 'hello',
      isBytes: true,
      exists: true,
      name: 'a.txt',
      streamed: 3_000_000,
    });
  });

  test('artifacts leave as bytes, files, streams, in parts, and under names of their own', async () => {
    const runner = await openWork(`
      const bytes = new TextEncoder().encode('xyz');
      const scratch = path + '.tmp'; writeFileSync(scratch, 'from a file');
      const parts = async function* () { yield bytes; yield bytes; };
      await ctx.output.putBytes('bytes', bytes);
      await ctx.output.putFile('file', scratch);
      await ctx.output.putStream('stream', parts());
      const upload = await ctx.output.openMultipart('parts');
      const part = Buffer.alloc(3);
      for (const letter of 'abc') await upload.writeChunk(part.fill(letter));
      await upload.finish();
      const dropped = await ctx.output.openMultipart('dropped');
      await dropped.writeChunk(part); await dropped.abort();
      const domain = (rel_path, content) => ctx.output.putDomainArtifact({ rel_path, name: 'n', data_type: 't', content });
      const ids = [await domain('d1', { bytes }), await domain('d2', { file: scratch }), await domain('d3', { stream: parts() })];
      if (bytes.length !== 3) throw new Error('the module lost its memory');
      ctx.log.info('ids', { ids });`);
    await using ctx = context({ meta: { path: temp('scratch') } });
    await runner.run(ctx);
    const texts = [...ctx.outputs].map(([path, bytes]) => `${path}=${new TextDecoder().decode(bytes)}`);
    expect(texts).toEqual([
      'bytes=xyz',
      'file=from a file',
      'stream=xyzxyz',
      'parts=aaabbbccc',
      'd1=xyz',
      'd2=from a file',
      'd3=xyzxyz',
    ]);
    const ids = ctx.artifacts.filter(({ logical_path }) => logical_path.startsWith('d')).map(({ id }) => id);
    expect(ctx.logs.at(-1)?.fields).toEqual({ ids });
    expect(ctx.openUploads).toBe(0);
  });

  test('progress, events and log lines arrive in order, before the task ends', async () => {
    const runner = await openWork(`
      void ctx.ctrl.logEvent(1); ctx.log.child({ a: 1 }).warn('two', { b: 2 }); void ctx.ctrl.logEvent(3);
      await ctx.ctrl.progress({ done: 0.5 }); void ctx.ctrl.progress({ done: 1 }); void ctx.ctrl.logEvent(4);
      ctx.log.info('not JSON', { big: 1n });`);
    await using ctx = context();
    await runner.run(ctx);
    expect(ctx.events).toEqual([1, 3, 4]);
    expect(ctx.progressValues.at(-1)).toEqual({ done: 1 });
    expect(ctx.logs).toEqual([
      { level: 'warn', message: 'two', fields: { a: 1, b: 2 } },
      { level: 'info', message: 'not JSON', fields: { fields_dropped: 'not JSON' } },
    ]);
    expect(ctx.calls.map(({ method }) => method).filter((method) => method !== 'progress')).toEqual([
      'logEvent',
      'warn',
      'logEvent',
      'logEvent',
      'info',
    ]);
  });

  test('the lease is there, and the token follows rotation at once', async () => {
    const runner = await openWork(`${TELL}
      const first = ctx.accessToken.get();
      await ctx.input.getBytesByCid('a');
      await tell([ctx.lease.task.label, first, ctx.accessToken.get()]);`);
    await using ctx = context({
      inputs: { a: 'x' },
      task: { label: 'mine' },
      onCall: ({ method }) => {
        if (method === 'getBytesByCid') ctx.rotateToken('second');
      },
    });
    ctx.rotateToken('first');
    await runner.run(ctx);
    expect(told(ctx)).toEqual(['mine', 'first', 'second']);
  });

  test('the token can be asked for in quick succession, and what the node throws about it is thrown', async () => {
    const runner = await openWork(`
      for (let i = 0; i < 3000; i += 1) if (ctx.accessToken.get() !== 'steady') throw new Error('wrong token');
      await ctx.ctrl.progress('asked');
      await ctx.input.getBytesByCid('a');
      ctx.accessToken.get();`);
    await using base = context();
    let token = (): string => 'steady';
    const ctx: TaskContext = {
      ...withPorts(base, {
        getBytesByCid: async () => {
          token = () => {
            throw new MillraceError('unauthenticated', 'no token yet');
          };
          return Buffer.alloc(0);
        },
      }),
      accessToken: { get: () => token() },
    };
    expect(await failure(runner.run(ctx))).toMatchObject({ code: 'unauthenticated' });
    expect(base.progressValues).toEqual(['asked']);
  });

  test('an error of a port is the same error in the module, and in the outcome', async () => {
    const runner = await openWork(`${TELL}
      const error = await ctx.input.getBytesByCid('nope').catch((error) => error);
      await tell({ is: MillraceError.is(error), code: error.code });
      throw error;`);
    await using ctx = context();
    const error = await failure(runner.run(ctx));
    expect(told(ctx)).toEqual({ is: true, code: 'not_found' });
    expect(MillraceError.is(error)).toBe(true);
    expect(error).toMatchObject({ code: 'not_found', message: expect.stringContaining('"nope"') as string });
  });

  test('a call is given up when its own signal aborts', async () => {
    const runner = await openWork(`
      const abort = new AbortController();
      const read = ctx.input.getBytesByCid('a', { signal: abort.signal });
      abort.abort(new Error('changed my mind'));
      await read;`);
    let seen: AbortSignal | undefined;
    await using base = context();
    const ctx = withPorts(base, {
      getBytesByCid: async (_cid, options) => {
        seen = options?.signal;
        return await new Promise<Uint8Array>((_resolve, reject) =>
          seen?.addEventListener('abort', () => reject(seen?.reason as Error)),
        );
      },
    });
    expect((await failure(runner.run(ctx))).message).toBe('changed my mind');
    expect(seen?.aborted).toBe(true);
  });

  test('what the source of an upload throws is what the upload rejects with', async () => {
    const runner = await openWork(`
      class Mine extends Error {}
      const source = async function* () { yield new Uint8Array(5); throw new Mine('source broke'); };
      const error = await ctx.output.putStream('o', source()).catch((error) => error);
      throw new Error(String(error instanceof Mine) + ' ' + error.message);`);
    await using ctx = context();
    expect((await failure(runner.run(ctx))).message).toBe('true source broke');
    expect(ctx.outputs.size).toBe(0);
  });

  test('a broken input stream is an error for who reads it', async () => {
    const runner = await openWork(`for await (const chunk of await ctx.input.openRead('a'));`);
    await using base = context();
    const ctx = withPorts(base, {
      openRead: async () =>
        Readable.from(
          (async function* () {
            yield Buffer.alloc(10);
            throw new MillraceError('data_loss', 'the connection broke');
          })(),
        ),
    });
    expect(await failure(runner.run(ctx))).toMatchObject({
      code: 'data_loss',
      message: 'the connection broke',
    });
  });

  test('256 MiB stream through a task while memory grows by less than 64 MiB', async () => {
    const runner = await openWork(`await ctx.output.putStream('o', await ctx.input.openRead('a'));`);
    const through = async (total: number): Promise<number> => {
      let received = 0;
      await using base = context();
      const chunks = function* (): Generator<Uint8Array> {
        for (let sent = 0; sent < total; sent += 65_536) yield Buffer.alloc(65_536, 1);
      };
      const ctx = withPorts(
        base,
        { openRead: async () => Readable.from(chunks(), { objectMode: false }) },
        {
          putStream: async (_path, stream) => {
            for await (const chunk of stream) received += chunk.byteLength;
          },
        },
      );
      await runner.run(ctx);
      return received;
    };
    await through(32 * 1024 * 1024);
    const before = process.memoryUsage().rss;
    let peak = before;
    const sampler = setInterval(() => (peak = Math.max(peak, process.memoryUsage().rss)), 5);
    expect(await through(256 * 1024 * 1024)).toBe(256 * 1024 * 1024);
    clearInterval(sampler);
    expect((peak - before) / 1024 / 1024).toBeLessThan(64);
  }, 60_000);

  test('after run has settled, calls fail', async () => {
    const runner = await openWork(`${TELL}
      if (n === 1) { globalThis.left = ctx; return; }
      const late = globalThis.left;
      const code = async (call) => { try { await call(); return 'none'; } catch (error) { return error.code; } };
      await tell([
        await code(() => late.input.getBytesByCid('a')), await code(() => late.input.openRead('a')),
        await code(() => late.output.putBytes('late', new Uint8Array(1))), await code(() => late.output.openMultipart('late')),
        await code(() => late.output.putStream('late', (async function* () { yield new Uint8Array(1); })())),
        await code(() => late.accessToken.get()),
      ]);
      await late.ctrl.progress('late'); late.log.info('late');`);
    await using first = context({ meta: { n: 1 } });
    await using second = context({ meta: { n: 2 } });
    await runner.run(first);
    await runner.run(second);
    expect(told(second)).toEqual(Array.from({ length: 6 }, () => 'failed_precondition'));
    expect([first.outputs.size, first.progressValues, first.logs]).toEqual([0, [], []]);
    expect([second.progressValues, second.logs]).toEqual([[], []]);
  });
});

describe('what a module does to itself ends as one clear outcome', () => {
  test('throwing: the message, name, code, cause and place of the error', async () => {
    const path = await work(`
      const error = new TypeError('no good', { cause: new Error('deeper') });
      error.code = 'E_NO_GOOD';
      throw error;`);
    const error = await failure((await open(path)).run(context()));
    expect(error).toMatchObject({
      name: 'TypeError',
      message: 'no good',
      code: 'E_NO_GOOD',
      cause: { message: 'deeper' },
    });
    expect(error.stack).toContain(path);
    expect(MillraceError.is(error)).toBe(false);
  });

  test.each([
    ['undefined', 'throw undefined', 'thrown value is not an Error: undefined'],
    ['a string', 'throw "oh no"', 'oh no'],
    [
      'nothing readable',
      'throw { get message() { throw 1; }, get name() { throw 2; } }',
      'thrown value is not an Error',
    ],
    [
      'a forged abort',
      `const { TaskAbort } = await import('${CONTRACT}'); throw new TaskAbort('lease_lost')`,
      'task stopped: lease_lost',
    ],
  ])('throwing %s', async (_name, body, message) => {
    const error = await failure((await openWork(body)).run(context()));
    expect(error).toBeInstanceOf(Error);
    expect(error.message).toContain(message);
    expect(TaskAbort.is(error)).toBe(false);
  });

  test('a failed task costs no thread: the module stays loaded', async () => {
    const runner = await openWork(`${TELL} await tell(runs); if (n === 1) throw new Error('first');`);
    await failure(runner.run(context({ meta: { n: 1 } })));
    await using second = context({ meta: { n: 2 } });
    await runner.run(second);
    expect(told(second)).toBe(2);
  });

  test.each([
    ['a timer throws', 'setTimeout(() => { throw new Error("stray"); }, 1); await delay(20_000);'],
    ['a rejection is not handled', 'void Promise.reject(new Error("stray")); await delay(20_000);'],
    ['a rejection is not handled as run returns', 'void Promise.reject(new Error("stray"));'],
  ])('%s while it runs: that is the failure, and the thread is replaced', async (_name, body) => {
    const runner = await openWork(`${TELL} await tell(runs); if (n === 1) { ${body} }`);
    expect((await failure(runner.run(context({ meta: { n: 1 } })))).message).toBe('stray');
    await using next = context({ meta: { n: 2 } });
    await runner.run(next);
    expect(told(next)).toBe(1);
  });

  test('rejecting late, while the thread is idle: logged, and the thread is replaced', async () => {
    const { log, lines } = recorder();
    const runner = await openWork(
      `${TELL} await tell(runs); if (n === 1) void delay(20).then(() => { throw new Error('late'); });`,
      {
        log,
      },
    );
    await runner.run(context({ meta: { n: 1 } }));
    await until(() => lines.some(({ fields }) => fields['error'] === 'late'), 'the late error is logged');
    await using next = context({ meta: { n: 2 } });
    await runner.run(next);
    expect(told(next)).toBe(1);
  });

  test('rejecting late, while the next task runs in the thread: that task is not harmed', async () => {
    const { log, lines } = recorder();
    const runner = await openWork(
      `${TELL}
      if (n === 1) { new Promise((resolve) => { globalThis.release = resolve; }).then(() => { throw new Error('late'); }); return; }
      if (n === 2) { globalThis.release(); await delay(50); console.log('still here'); }
      await tell(runs);`,
      { log },
    );
    await runner.run(context({ meta: { n: 1 } }));
    await using second = context({ meta: { n: 2 } });
    await runner.run(second);
    expect(told(second)).toBe(2);
    expect(second.logs.map(({ message }) => message)).toEqual(['still here']);
    expect(lines.filter(({ fields }) => fields['error'] === 'late')).toHaveLength(1);
    await using third = context({ meta: { n: 3 } });
    await runner.run(third);
    expect(told(third)).toBe(1);
  });

  test.each([0, 1])('process.exit(%i) while it runs', async (code) => {
    const runner = await openWork(`if (n === 1) process.exit(${code}); ${TELL} await tell(runs);`);
    const error = await failure(runner.run(context({ meta: { n: 1 } })));
    expect(error).toMatchObject({
      code: 'internal',
      message: expect.stringContaining(`process.exit(${code})`) as string,
    });
    await using next = context({ meta: { n: 2 } });
    await runner.run(next);
    expect(told(next)).toBe(1);
  });

  test('process.exit between tasks: logged, and the next task has a thread', async () => {
    const { log, lines } = recorder();
    const runner = await openWork(
      `${TELL} await tell(runs); if (n === 1) setTimeout(() => process.exit(3), 5);`,
      { log },
    );
    await runner.run(context({ meta: { n: 1 } }));
    await until(() => lines.some(({ message }) => message.includes('ended by itself')), 'the exit is logged');
    await using next = context({ meta: { n: 2 } });
    await runner.run(next);
    expect(told(next)).toBe(1);
  });

  test('process.abort and process.chdir are refused by the thread', async () => {
    for (const call of ['process.abort()', 'process.chdir("/")']) {
      const error = await failure((await openWork(call)).run(context()));
      expect(error).toMatchObject({ code: 'ERR_WORKER_UNSUPPORTED_OPERATION' });
    }
  });

  test('outputs that were not awaited are stored before the task is done', async () => {
    const runner = await openWork(`
      void ctx.output.putBytes('a', new Uint8Array(10));
      void ctx.output.putStream('b', (async function* () { await delay(30); yield new Uint8Array(20); })());`);
    await using ctx = context();
    await runner.run(ctx);
    expect([...ctx.outputs].map(([path, bytes]) => [path, bytes.length])).toEqual([
      ['a', 10],
      ['b', 20],
    ]);
  });

  test('an output that was not awaited and fails, fails the task', async () => {
    const runner = await openWork(`void ctx.output.putBytes('../out', new Uint8Array(10));`);
    expect(await failure(runner.run(context()))).toMatchObject({ code: 'invalid_argument' });
  });

  test('an upload left open fails the task and is aborted', async () => {
    const runner = await openWork(
      `const upload = await ctx.output.openMultipart('a/b'); await upload.writeChunk(new Uint8Array(3));`,
    );
    await using ctx = context();
    expect(await failure(runner.run(ctx))).toMatchObject({
      code: 'failed_precondition',
      message: expect.stringContaining('"a/b"') as string,
    });
    expect([ctx.openUploads, ctx.outputs.size]).toEqual([0, 0]);
  });

  test('what it posts to parentPort, and closing it, changes nothing', async () => {
    const runner = await openWork(`
      const { parentPort, workerData } = await import('node:worker_threads');
      for (const t of ['settled', 'loaded', 'stray', 'closed', 'notes']) parentPort.postMessage({ t, task: 1, error: null });
      parentPort.postMessage(null); parentPort.close();
      ${TELL} await tell(Object.keys(workerData));`);
    await using ctx = context();
    await runner.run(ctx);
    expect(told(ctx)).not.toContain('ports');
    await runner.run(context());
  });

  test.each([
    ['the port', 'MessagePort.prototype.postMessage = () => { throw new Error("patched"); };', true],
    [
      'timers',
      'globalThis.setTimeout = globalThis.setImmediate = globalThis.queueMicrotask = undefined;',
      true,
    ],
    ['process', 'process.stdout.write = process.exit = () => { throw new Error("patched"); };', true],
    ['AbortController', 'globalThis.AbortController = undefined;', false],
  ])('replacing %s of its own thread harms its own work at most', async (_name, patch, works) => {
    const runner = await openWork(
      `await ctx.output.putBytes('a', Uint8Array.of(1));`,
      { limits: { wallMs: 2000 } },
      patch,
    );
    await using ctx = context();
    const outcome = await runner.run(ctx).then(
      () => 'done',
      (error: unknown) => error,
    );
    if (works) expect(outcome).toBe('done');
    else expect(outcome).toBeInstanceOf(Error);
  });

  test('stdout and stderr become log lines of the task', async () => {
    const runner = await openWork(
      `console.log('out %d', n); console.error('err'); process.stdout.write('no end');`,
    );
    await using ctx = context({ meta: { n: 5 } });
    await runner.run(ctx);
    expect(ctx.logs).toEqual([
      { level: 'info', message: 'out 5', fields: { stream: 'stdout' } },
      { level: 'warn', message: 'err', fields: { stream: 'stderr' } },
      { level: 'info', message: 'no end', fields: { stream: 'stdout' } },
    ]);
  });

  test('a flood of output is cut at logBytes, per task', async () => {
    const runner = await openWork(`for (let i = 0; i < n; i += 1) console.log('123456789');`, {
      limits: { logBytes: 1000 },
    });
    await using at = context({ meta: { n: 100 } });
    await runner.run(at);
    expect(at.logs).toHaveLength(100);
    expect(at.logs.every(({ message }) => message === '123456789')).toBe(true);
    await using past = context({ meta: { n: 50_000 } });
    await runner.run(past);
    expect(past.logs).toHaveLength(101);
    expect(past.logs.at(-1)).toMatchObject({
      level: 'warn',
      fields: { limit: 'logBytes', value: 1000, dropped_bytes: 499_000 },
    });
  });

  test('a flood of log lines, events and progress is bounded', async () => {
    const runner = await openWork(`
      for (let i = 0; i < 20_000; i += 1) { ctx.log.info('line'); void ctx.ctrl.progress(i); void ctx.ctrl.logEvent(i); }`);
    await using ctx = context();
    await runner.run(ctx);
    expect(ctx.logs.length + ctx.events.length).toBeLessThan(3000);
    expect(ctx.progressValues.at(-1)).toBe(19_999);
    expect(ctx.logs.at(-1)?.message).toContain('dropped');
  });
});

describe('limits', () => {
  test('wallMs ends a task that never settles', async () => {
    const runner = await openWork(
      `
      ctx.signal.addEventListener('abort', () => writeFileSync(path, ctx.signal.reason.reason + ' ' + ctx.signal.reason.message));
      await new Promise(() => {});`,
      { limits: { wallMs: 150, graceMs: 100 } },
    );
    const path = temp('reason');
    const error = await failure(runner.run(context({ meta: { path } })));
    expect(error).toMatchObject({ code: 'deadline_exceeded', details: { limit: 'wallMs', value: 150 } });
    expect(error.message).toContain('wallMs, 150 ms');
    expect(await readFile(path, 'utf8')).toBe(`deadline ${error.message}`);
  });

  test('a task within wallMs is not disturbed, and each has its own', async () => {
    const runner = await openWork('await delay(150);', { limits: { wallMs: 10_000 } });
    await runner.run(context());
    await runner.run(context());
  });

  test.each([
    ['an array that grows for ever', 'const kept = []; for (let i = 0; ; i += 1) kept.push(i + 0.5);'],
    // V8 takes more than it may in one step here: its own limit would end the whole process.
    ['an object that grows for ever', 'const kept = {}; for (let i = 0; ; i += 1) kept["k" + i] = i;'],
    [
      'a leak that yields',
      'const kept = []; for (;;) { for (let i = 0; i < 10_000; i += 1) kept.push({ i }); await delay(0); }',
    ],
  ])(
    'memoryMiB ends %s, and the next task has a thread',
    async (_name, body) => {
      const runner = await openWork(`if (n === 1) { ${body} }`, { limits: { memoryMiB: 64 } });
      const error = await failure(runner.run(context({ meta: { n: 1 } })));
      expect(error).toMatchObject({ code: 'resource_exhausted', details: { limit: 'memoryMiB', value: 64 } });
      expect(error.message).toContain('memoryMiB, 64 MiB');
      await runner.run(context({ meta: { n: 2 } }));
    },
    60_000,
  );

  test('garbage does not count against memoryMiB', async () => {
    const runner = await openWork(
      `const live = []; for (let i = 0; i < 400_000; i += 1) live.push({ i, more: [i] });
      const ring = new Array(20_000); const end = performance.now() + 1500;
      for (let i = 0; performance.now() < end; i += 1) ring[i % 20_000] = { i, text: 'a' + i, more: [i, i, i, i] };
      if (live.length !== 400_000) throw new Error();`,
      { limits: { memoryMiB: 96 } },
    );
    await runner.run(context());
  }, 60_000);

  test.each([
    ['never settles', 'await new Promise(() => {});'],
    ['blocks', 'for (;;);'],
  ])('loadMs ends a module that %s while it is loaded', async (_name, source) => {
    const path = await module(source);
    const error = await failure(openThreadRunner({ module: path, limits: { loadMs: 200 } }));
    expect(error).toMatchObject({ code: 'deadline_exceeded', details: { limit: 'loadMs', value: 200 } });
    expect(error.message).toContain(path);
    expect(error.message).toContain('200 ms');
  });

  test.each([
    [{ limits: { memoryMiB: 7 } }, 'limits.memoryMiB must be a whole number from 8 to 65536, got 7'],
    [{ limits: { wallMs: 0 } }, 'limits.wallMs'],
    [{ limits: { graceMs: -1 } }, 'limits.graceMs'],
    [{ limits: { logBytes: 1.5 } }, 'limits.logBytes'],
    [{ warm: 0 }, 'warm must be'],
    [{ capability: 'has space' }, 'white space'],
  ])('%j is refused', async (options, message) => {
    const error = await failure(openThreadRunner({ module: await work(''), ...options }));
    expect(error).toMatchObject({
      code: 'invalid_argument',
      message: expect.stringContaining(message) as string,
    });
  });
});

describe('cancelling', () => {
  test('a module that spins is really gone when run rejects', async () => {
    const runner = await openWork(`for (let beat = 0; ; beat += 1) writeFileSync(path, String(beat));`, {
      limits: { graceMs: 50 },
    });
    const path = temp('heartbeat');
    await using ctx = context({ meta: { path } });
    const running = failure(runner.run(ctx));
    await until(() => existsSync(path), 'it spins');
    ctx.abort('canceled', 'enough');
    const error = await running;
    const last = readFileSync(path, 'utf8');
    expect(error).toMatchObject({ reason: 'canceled', message: 'enough' });
    await delay(100);
    expect(readFileSync(path, 'utf8')).toBe(last);
    const again = temp('again');
    await using next = context({ meta: { path: again } });
    const second = failure(runner.run(next));
    await until(() => existsSync(again), 'the replacement works');
    next.abort();
    await second;
  });

  test('a module that listens ends by itself, sees the reason, and keeps its thread', async () => {
    const runner = await openWork(`${TELL}
      if (n === 2) return await tell(runs);
      writeFileSync(path, 'started');
      await new Promise((resolve) => ctx.signal.addEventListener('abort', resolve));
      writeFileSync(path, [ctx.signal.reason.reason, ctx.signal.reason.message, await ctx.ctrl.isCancelled()].join());`);
    const path = temp('seen');
    await using ctx = context({ meta: { n: 1, path } });
    const running = failure(runner.run(ctx));
    await until(() => existsSync(path), 'it runs');
    ctx.abort('lease_lost', 'somebody else has it');
    const error = await running;
    expect(TaskAbort.is(error)).toBe(true);
    expect(error).toMatchObject({ reason: 'lease_lost', message: 'somebody else has it' });
    expect(readFileSync(path, 'utf8')).toBe('lease_lost,somebody else has it,true');
    await using next = context({ meta: { n: 2 } });
    await runner.run(next);
    expect(told(next)).toBe(2);
  });

  test('the first cause is told: abort, then what the module throws because of it', async () => {
    const runner = await openWork(`
      writeFileSync(path, ''); await delay(20_000, null, { signal: ctx.signal });`);
    const path = temp('first');
    await using ctx = context({ meta: { path } });
    const running = failure(runner.run(ctx));
    await until(() => existsSync(path), 'it runs');
    ctx.abort('shutdown');
    expect(await running).toMatchObject({ reason: 'shutdown' });
  });

  test('isCancelled tells a loop that waits for nothing else', async () => {
    const runner = await openWork(`
      writeFileSync(path, '');
      while (!(await ctx.ctrl.isCancelled())) for (let i = 0; i < 1000; i += 1);
      writeFileSync(path, ctx.signal.reason.message);`);
    const path = temp('loop');
    await using ctx = context({ meta: { path } });
    const running = failure(runner.run(ctx));
    await until(() => existsSync(path), 'it runs');
    ctx.abort('canceled', 'stop it');
    await running;
    expect(readFileSync(path, 'utf8')).toBe('stop it');
  });

  test('outputs nobody awaits do not hold up an abort', async () => {
    const runner = await openWork(`
      void ctx.output.putStream('o', (async function* () { yield new Uint8Array(1); writeFileSync(path, ''); await new Promise(() => {}); })()).catch(() => {});`);
    const path = temp('stuck');
    await using ctx = context({ meta: { path } });
    const running = failure(runner.run(ctx));
    await until(() => existsSync(path), 'it uploads');
    ctx.abort();
    expect(await running).toMatchObject({ reason: 'canceled' });
  });

  test('before the start: the module is not entered', async () => {
    const runner = await openWork(`writeFileSync(path, '');`);
    const path = temp('never');
    await using ctx = context({ meta: { path } });
    ctx.abort('deadline', 'too late');
    expect(await failure(runner.run(ctx))).toMatchObject({ reason: 'deadline', message: 'too late' });
    expect(existsSync(path)).toBe(false);
  });

  test('while it waits for a thread', async () => {
    const runner = await openWork(
      `writeFileSync(path, ''); await delay(20_000, null, { signal: ctx.signal });`,
    );
    const paths = [temp('w'), temp('w')];
    await using first = context({ meta: { path: paths[0]! } });
    await using second = context({ meta: { path: paths[1]! } });
    const running = failure(runner.run(first));
    const waiting = failure(runner.run(second));
    second.abort('shutdown');
    expect(await waiting).toMatchObject({ reason: 'shutdown' });
    expect(existsSync(paths[1]!)).toBe(false);
    first.abort();
    await running;
  });
});

describe('threads', () => {
  test('eight tasks at a time run at the same time, and surplus threads are closed when idle', async () => {
    const shared = temp('barrier');
    await mkdir(shared);
    const path = await module(`
      import { readdirSync, writeFileSync } from 'node:fs';
      import { setTimeout as delay } from 'node:timers/promises';
      import { threadId } from 'node:worker_threads';
      export default {
        capability: '/barrier/v1',
        async run(ctx) {
          writeFileSync('${shared}/in-' + ctx.lease.task.meta.n, '');
          while (readdirSync('${shared}').length < 8) await delay(5);
        },
        async close() { writeFileSync('${shared}/closed-' + threadId, ''); },
      };`);
    const runner = await open({ module: path, warm: 2, idleMs: 50 });
    const closed = (): number => readdirSync(shared).filter((name) => name.startsWith('closed-')).length;
    await Promise.all(Array.from({ length: 8 }, (_, n) => runner.run(context({ meta: { n } }))));
    await until(() => closed() === 6, 'six of eight threads are closed');
    await runner.close();
    expect(closed()).toBe(8);
  }, 60_000);

  test('a late failure to start a thread is the failure of the task that needed it', async () => {
    const path = await work(`writeFileSync(path, ''); while (!existsSync(path + '.go')) await delay(5);`);
    const runner = await open(path);
    const busy = temp('busy');
    const first = runner.run(context({ meta: { path: busy } }));
    await until(() => existsSync(busy), 'the only thread is busy');
    await writeFile(path, 'export default {');
    const error = await failure(runner.run(context()));
    expect(error).toMatchObject({
      code: 'invalid_argument',
      message: expect.stringContaining('syntax error') as string,
    });
    await writeFile(path, `export default { capability: '/other/v1', run() {} };`);
    expect(await failure(runner.run(context()))).toMatchObject({
      code: 'failed_precondition',
      message: expect.stringContaining('was changed on disk') as string,
    });
    await writeFile(`${busy}.go`, '');
    await first;
  });

  test('close ends running tasks with shutdown once they are gone, and can be repeated', async () => {
    const runner = await openWork(`for (;;) writeFileSync(path, String(performance.now()));`);
    const path = temp('closing');
    const running = failure(runner.run(context({ meta: { path } })));
    await until(() => existsSync(path), 'it spins');
    await Promise.all([runner.close(), runner.close()]);
    const last = readFileSync(path, 'utf8');
    const error = await running;
    expect(TaskAbort.is(error)).toBe(true);
    expect(error).toMatchObject({ reason: 'shutdown' });
    await delay(50);
    expect(readFileSync(path, 'utf8')).toBe(last);
    expect(await failure(runner.run(context()))).toMatchObject({ reason: 'shutdown' });
    await runner.close();
  });

  test('close does not wait longer than the grace for a module that does not close', async () => {
    const { log, lines } = recorder();
    const path = await module(
      `export default { capability: '/stuck/v1', async run() {}, close: () => new Promise(() => {}) };`,
    );
    const runner = await open({ module: path, limits: { graceMs: 50 }, log });
    await runner.close();
    expect(lines.map(({ message }) => message)).toContain('a runner module did not close in time');
  });

  test('the module sees no environment, arguments or data of the node', async () => {
    process.env['MILLRACE_TEST_SECRET'] = 'do not tell';
    const before = process.execArgv.length;
    try {
      const runner = await openWork(
        `const { workerData } = await import('node:worker_threads');
        ${TELL} await tell({ env: process.env, argv: process.argv.slice(2), execArgv: process.execArgv, data: Object.keys(workerData) });`,
        { env: { GRANTED: 'yes' } },
      );
      await using ctx = context();
      await runner.run(ctx);
      const seen = told(ctx) as {
        env: Record<string, string>;
        argv: string[];
        execArgv: string[];
        data: string[];
      };
      expect(seen.env['GRANTED']).toBe('yes');
      expect(seen.env['PATH']).toBe(process.env['PATH']);
      expect(seen.env).not.toHaveProperty('MILLRACE_TEST_SECRET');
      expect([seen.argv, seen.execArgv]).toEqual([[], []]);
      expect(seen.data).toEqual(['module', 'loader', 'lendsContract', 'strayLogBytes']);
    } finally {
      delete process.env['MILLRACE_TEST_SECRET'];
    }
    expect(process.execArgv).toHaveLength(before);
  });
});

describe('loading', () => {
  test('the capability is the module’s own, or the one that replaces it', async () => {
    const path = await work('');
    expect((await open(path)).capability).toBe('/test/v1');
    expect((await open({ module: pathToFileURL(path), capability: '/mine/v2' })).capability).toBe('/mine/v2');
  });

  test('a TypeScript module may import others, packages of its own folder, use enums and paths, and has its lines in stacks', async () => {
    const base = 'typescript';
    await module('exports.fromPackage = "package";', `${base}/node_modules/plain/index.js`);
    await module('{ "name": "plain", "main": "index.js" }', `${base}/node_modules/plain/package.json`);
    await module('{ "compilerOptions": { "paths": { "#lib/*": ["./lib/*"] } } }', `${base}/tsconfig.json`);
    await module('export enum Size { Small = 3 }\n', `${base}/lib/size.ts`);
    await module(
      [
        'interface Unused {',
        '  a: string;',
        '}',
        'export function fail(reason: string, _unused?: Unused): never {',
        '  throw new Error(reason);',
        '}',
      ].join('\n'),
      `${base}/lib/fail.ts`,
    );
    const source = `
      import { Size } from '#lib/size.ts';
      import { fail } from './lib/fail.ts';
      import { fromPackage } from 'plain';
      import type { Runner } from '${CONTRACT}';
      const runner: Runner = { capability: '/ts/' + fromPackage + Size.Small, async run() { fail('as asked'); } };
      export default runner;`;
    for (const [name, manifest] of [
      ['commonjs.ts', '{}'],
      ['esm.ts', '{ "type": "module" }'],
    ] as const) {
      await module(manifest, `${base}/package.json`);
      const runner = await open(await module(source, `${base}/${name}`));
      expect(runner.capability).toBe('/ts/package3');
      const error = await failure(runner.run(context()));
      expect(error.message).toBe('as asked');
      expect(error.stack).toMatch(/fail\.ts:5:/);
      expect(error.stack).toContain(name);
    }
  }, 60_000);

  test('a CommonJS module may export its runner as default', async () => {
    const source = `exports.__esModule = true; exports.default = { capability: '/cjs/v1', async run() {} };`;
    expect((await open(await module(source, 'compiled.cjs'))).capability).toBe('/cjs/v1');
    const direct = `module.exports = { capability: '/cjs/v2', async run() {} };`;
    expect((await open(await module(direct, 'direct.cjs'))).capability).toBe('/cjs/v2');
  });

  const PROBLEMS: readonly (readonly [
    what: string,
    name: string,
    source: string,
    code: string,
    message: RegExp,
  ])[] = [
    [
      'no default export',
      'p1.mjs',
      'export const a = 1;',
      'invalid_argument',
      /no default export; end it with/,
    ],
    [
      'no default export where TypeScript makes CommonJS',
      'p1.ts',
      'export const a = 1;',
      'invalid_argument',
      /no default export; end it with/,
    ],
    [
      'a default export of another kind',
      'p2.mjs',
      'export default () => {};',
      'invalid_argument',
      /is a function, not a runner/,
    ],
    ['no run', 'p3.mjs', 'export default { capability: "/a/v1" };', 'invalid_argument', /no run function/],
    [
      'a bad capability',
      'p4.mjs',
      'export default { capability: "a b", run() {} };',
      'invalid_argument',
      /white space/,
    ],
    ['no capability', 'p5.mjs', 'export default { run() {} };', 'invalid_argument', /capability must be/],
    [
      'a syntax error',
      'p6.mjs',
      'const a = 1;\n\nexport default { oops oops };',
      'invalid_argument',
      /p6\.mjs:3: .*oops/,
    ],
    [
      'a syntax error in a .js file',
      'p7.js',
      '\nexport default { oops oops };',
      'invalid_argument',
      /p7\.js:2: .*oops/,
    ],
    [
      'a syntax error in TypeScript',
      'p8.ts',
      'const a: number = 1;\nexport default { oops oops };',
      'invalid_argument',
      /p8\.ts:2:\d+: .*oops/,
    ],
    [
      'await where TypeScript makes CommonJS',
      'p9.ts',
      'export const a = await 1;',
      'invalid_argument',
      /p9\.ts:1:.*name the file \.mts/,
    ],
    [
      'a missing name',
      'p10.mjs',
      'import { nope } from "node:fs";',
      'invalid_argument',
      /p10\.mjs:1: .*nope/,
    ],
    [
      'a missing package',
      'p11.mjs',
      'import "not-installed-anywhere";',
      'not_found',
      /not-installed-anywhere.*install the package/,
    ],
    [
      'a throw',
      'p12.mjs',
      'throw new RangeError("not today");',
      'invalid_argument',
      /threw while it was loaded: RangeError: not today/,
    ],
    [
      'a throw in a timer',
      'p13.mjs',
      'setTimeout(() => { throw new Error("tick"); }, 1); await new Promise(() => {});',
      'invalid_argument',
      /Error: tick/,
    ],
    ['process.exit', 'p14.mjs', 'process.exit(4);', 'internal', /process\.exit\(4\)/],
  ];
  test.each(PROBLEMS)('a module with %s is refused, by name', async (_what, name, source, code, message) => {
    const path = await module(source, name);
    const error = await failure(openThreadRunner({ module: path }));
    expect(error).toMatchObject({ code, message: expect.stringContaining(path) as string });
    expect(error.message).toMatch(message);
  });

  test.skipIf('typescript' in process.features)(
    'JavaScript that imports TypeScript is told what to do',
    async () => {
      await module('export const a: number = 1;', 'imported.ts');
      const path = await module('import "./imported.ts";', 'importing.mjs');
      expect(await failure(openThreadRunner({ module: path }))).toMatchObject({
        code: 'invalid_argument',
        message: expect.stringContaining('name the runner module .ts') as string,
      });
    },
  );

  test('a file that is not there, not a file or not a module is refused', async () => {
    const refusal = async (path: string | URL): Promise<unknown> =>
      await failure(openThreadRunner({ module: path }));
    expect(await refusal(join(folder, 'nowhere.ts'))).toMatchObject({ code: 'not_found' });
    expect(await refusal(folder)).toMatchObject({ code: 'invalid_argument' });
    expect(await refusal(await module('{}', 'data.json'))).toMatchObject({ code: 'invalid_argument' });
    expect(await refusal(new URL('https://example.com/a.js'))).toMatchObject({ code: 'invalid_argument' });
  });
});

describe('as any runner', () => {
  const SOURCE = `export default { capability: '/count/v1', async run(ctx) {
    let bytes = 0;
    for await (const chunk of await ctx.input.openRead(ctx.lease.task.inputs_cids[0])) {
      bytes += chunk.length;
      ctx.signal.throwIfAborted();
      await ctx.ctrl.progress({ bytes });
    }
    await ctx.output.putBytes('count.txt', new TextEncoder().encode(String(bytes)));
  } };`;
  runnerSuite(async () => await openThreadRunner({ module: await module(SOURCE, 'suite.mjs') }), {
    test,
    cases: [
      { name: 'counting bytes', context: { inputs: { a: 'x'.repeat(200_000) } }, outputs: ['count.txt'] },
    ],
  });
});

/** The context with some methods of its ports replaced, which are then the only ones to be used. */
function withPorts(
  base: TestContext,
  input: Partial<TaskContext['input']>,
  output: Partial<TaskContext['output']> = {},
): TaskContext {
  const { lease, ctrl, accessToken, signal, log } = base;
  return {
    lease,
    ctrl,
    accessToken,
    signal,
    log,
    input: Object.assign(Object.create(base.input) as TaskContext['input'], input),
    output: Object.assign(Object.create(base.output) as TaskContext['output'], output),
  };
}

describe('what a task used', () => {
  async function usageOf(runner: ThreadRunner, meta: JsonObject, during?: (ctx: TestContext) => void) {
    await using ctx = context({ meta });
    const told: JsonObject[] = [];
    const ctrl: ControlPlane = {
      isCancelled: () => ctx.ctrl.isCancelled(),
      progress: (value) => ctx.ctrl.progress(value),
      logEvent: (value) => ctx.ctrl.logEvent(value),
      usage: (value) => Promise.resolve(void told.push(value)),
    };
    const { lease, input, output, accessToken, signal, log } = ctx;
    const running = runner
      .run({ lease, input, output, ctrl, accessToken, signal, log })
      .catch(() => undefined);
    during?.(ctx);
    await running;
    expect(ctx.events).toEqual([]);
    expect(told).toHaveLength(1);
    return told[0]!;
  }

  const SPIN = `
    const { ms } = ctx.lease.task.meta;
    const until = process.hrtime.bigint() + BigInt(ms) * 1000000n;
    const kept = [];
    while (process.hrtime.bigint() < until) if (kept.length < 1e6) kept.push({});
    if (ms > 100000) throw kept;`;

  test('is the CPU time and the heap of its own thread, and of its own time', async () => {
    const runner = await openWork(SPIN);
    const [busy, idle] = [await usageOf(runner, { ms: 600 }), await usageOf(runner, { ms: 0 })];
    if (process.platform === 'linux') {
      // On a busy machine the thread gets less of the wall time; without any it would not have ended.
      expect(busy['cpu_ms']).toBeGreaterThan(20);
      expect(busy['cpu_ms']).toBeLessThan(5_000);
      expect(idle['cpu_ms']).toBeLessThan(busy['cpu_ms'] as number);
    }
    expect(busy['peak_memory_bytes']).toBeGreaterThan(8 * 1024 * 1024);
    // It was over before anybody looked.
    expect(idle['peak_memory_bytes']).toBeNull();
  });

  test('is known of a thread that had to be ended', async () => {
    const runner = await openWork(
      `ctx.log.info('spinning'); await new Promise((r) => setImmediate(r)); ${SPIN}`,
      {
        limits: { graceMs: 300 },
      },
    );
    const usage = await usageOf(runner, { ms: 60_000 }, (ctx) => {
      void until(() => ctx.logs.length > 0, 'the module spins').then(() => ctx.abort('canceled'));
    });
    if (process.platform === 'linux') expect(usage['cpu_ms']).toBeGreaterThan(5);
  });
});
