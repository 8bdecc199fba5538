import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import '../index.ts';
import { computeReason } from '../errors.ts';
import { program } from '../fixtures/wat.ts';
import type { InvokeOptions, Metrics } from '../limits.ts';
import { ComputeManager } from '../manager.ts';
import { memoryResolver } from '../resolver.ts';

const resolver = memoryResolver();
let manager: ComputeManager;

beforeAll(async () => {
  manager = new ComputeManager(
    resolver,
    { maxWallMs: 10_000, maxPrepareMs: 60_000 },
    { workers: 2, engines: ['quickjs'] },
  );
  await manager.ready();
});

afterAll(() => manager.close());

interface Ran {
  readonly output: unknown;
  readonly log: string;
  readonly metrics: Metrics | null;
  readonly error: { readonly message: string; readonly details: Readonly<Record<string, unknown>> } | null;
  readonly reason: ReturnType<typeof computeReason>;
}

/** Runs a module's text; failures are part of the answer. */
async function js(code: string, input: unknown = {}, options: InvokeOptions = {}): Promise<Ran> {
  const ref = resolver.add(Buffer.from(code), 'quickjs');
  const log: Uint8Array[] = [];
  let metrics: Metrics | null = null;
  const text = input instanceof Uint8Array ? input : JSON.stringify(input);
  const ended = await manager
    .run(ref, text, {
      stderr: (bytes) => void log.push(bytes.slice()),
      metricsSink: (measured) => (metrics = measured),
      ...options,
    })
    .then(
      (output) => ({
        output: JSON.parse(Buffer.from(output).toString()) as unknown,
        error: null,
        reason: null,
      }),
      (error: unknown) => ({
        output: undefined,
        error: error as NonNullable<Ran['error']>,
        reason: computeReason(error),
      }),
    );
  return { ...ended, log: Buffer.concat(log).toString(), metrics };
}

/** A compute that answers with an expression. */
const answering = (expression: string): string => `export default (input) => (${expression});`;

describe('a JavaScript compute', () => {
  test('takes JSON and gives JSON back', async () => {
    const { output, metrics } = await js(
      answering('({ got: input.list.map((x) => x * 2), text: input.text })'),
      {
        list: [1, 2, 3],
        text: 'für \u{1F600} \u0000 "x"',
      },
    );
    expect(output).toEqual({ got: [2, 4, 6], text: 'für \u{1F600} \u0000 "x"' });
    expect(metrics).toMatchObject({
      status: 'ok',
      reason: null,
      fuelUsed: null,
      memoryBytes: 6 * 1024 * 1024,
    });
  });

  test.each([
    ['a promise', 'Promise.resolve(7)', 7],
    ['an async function', '(async () => { await null; return { a: 1 }; })()', { a: 1 }],
    ['a thenable', '({ then(give) { give("x"); } })', 'x'],
    ['a promise that a timer keeps', 'new Promise((give) => setTimeout(give, 3_600_000, "late"))', 'late'],
    ['nothing', 'undefined', null],
    ['NaN', 'NaN', null],
    ['a Date', 'new Date(0)', '1970-01-01T00:00:00.000Z'],
    ['an object with toJSON', '({ toJSON: () => [1] })', [1]],
    ['a lone surrogate', '"\\ud800"', '\ud800'],
  ])('may return %s', async (_, expression, expected) => {
    expect((await js(answering(expression))).output).toEqual(expected);
  });

  test('may be an async function with top-level await before it', async () => {
    const { output } = await js(
      'const n = await Promise.resolve(4); export default async ({ x }) => n * x;',
      { x: 5 },
    );
    expect(output).toBe(20);
  });

  test.each([
    ['a function', 'bad-output', '() => 1', /returned a function, which is no JSON/],
    ['a symbol', 'bad-output', 'Symbol("x")', /returned a symbol/],
    ['a toJSON that gives nothing', 'bad-output', '({ toJSON() {} })', /returned a object/],
    ['a BigInt', 'trap', '1n', /BigInt/],
    ['a cycle', 'trap', '(() => { const a = {}; a.a = a; return a; })()', /circular/],
    ['a toJSON that throws', 'trap', '({ toJSON() { throw new Error("no"); } })', /Error: no/],
    ['a getter that throws', 'trap', '({ get x() { throw new Error("get"); } })', /Error: get/],
    ['a promise that is rejected', 'trap', 'Promise.reject(new RangeError("far"))', /RangeError: far/],
    ['a promise that never settles', 'trap', 'new Promise(() => {})', /never settles/],
    [
      'a promise a timer breaks',
      'trap',
      'new Promise(() => setTimeout(() => { throw new Error("tick"); }))',
      /Error: tick/,
    ],
    [
      'a promise a microtask breaks',
      'trap',
      'new Promise(() => queueMicrotask(() => { throw new Error("mu"); }))',
      /Error: mu/,
    ],
    ['a thenable that throws', 'trap', '({ get then() { throw new Error("then"); } })', /Error: then/],
  ])('may not return %s', async (_, reason, expression, says) => {
    const ran = await js(answering(expression));
    expect(ran.reason).toBe(reason);
    expect(ran.error?.message).toMatch(says);
    expect(ran.metrics).toMatchObject({ status: 'trapped', reason });
  });

  test('that throws is a trap with name, message and place', async () => {
    const ran = await js(
      'function deep() {\n  throw new TypeError("kaboom");\n}\nexport default () => deep();',
    );
    expect(ran.reason).toBe('trap');
    expect(ran.error?.details['cause']).toBe(
      'TypeError: kaboom\n    at deep (compute.js:2:22)\n    at default (compute.js:4:26)',
    );
    expect(ran.log).toContain('Uncaught TypeError: kaboom');
  });

  test.each([
    ['null', 'null', 'null'],
    ['a text', '"just so"', 'just so'],
    [
      'an object whose message cannot be read',
      '{ get message() { throw 1; } }',
      'an error that cannot be read',
    ],
    ['an error with a cause', 'new Error("outer", { cause: new Error("inner") })', 'caused by Error: inner'],
  ])('may throw %s', async (_, thrown, says) => {
    const ran = await js(`export default () => { throw ${thrown}; };`);
    expect(ran.reason).toBe('trap');
    expect(String(ran.error?.details['cause'])).toContain(says);
  });

  test.each([
    ['is no function', 'export default 7;', /default export must be a function, it is a number/],
    ['is missing', 'export const a = 1;', /default export must be a function, it is missing/],
    ['is never reached', 'await new Promise(() => {}); export default () => 1;', /never starts/],
    ['is behind a throw', 'throw new Error("top"); export default () => 1;', /Error: top/],
  ])('fails each time when its default export %s', async (_, code, says) => {
    for (let round = 0; round < 2; round += 1) {
      const ran = await js(code);
      expect(ran.reason).toBe('trap');
      expect(ran.error?.message).toMatch(says);
      expect(ran.metrics?.status).toBe('trapped');
    }
  });

  test.each([
    ['no JavaScript', 'let x = ;', /SyntaxError.*\n.*compute\.js:1:/],
    ['not self-contained', 'import fs from "fs"; export default () => 1;', /fs/],
    ['WebAssembly', Buffer.from(program('')).toString('latin1'), /zero byte/],
  ])('is refused when it is %s', async (_, code, says) => {
    const ran = await js(code);
    expect(ran.error?.message).toMatch(says);
    expect(['module', 'trap']).toContain(ran.reason);
  });

  test.each([['{'], ['{"a":1}\0'], ['nope']])('fails on the input %j, which is no JSON', async (input) => {
    const ran = await js(answering('1'), Buffer.from(input));
    expect(ran.reason).toBe('trap');
  });

  test('writes to the console with levels, values as one would read them', async () => {
    const { log } = await js(`export default () => {
      console.log('a', 1, { b: [2] }, null, undefined, 3n, Symbol('s'));
      console.debug('d'); console.info('i'); console.warn('w'); console.trace('t');
      console.error(new Error('e'));
      const loop = {}; loop.loop = loop; console.log(loop, function named() {}, 'nul\\0');
    };`);
    expect(log.split('\n').slice(0, 6)).toEqual([
      '[info] a 1 {"b":[2]} null undefined 3n Symbol(s)',
      '[debug] d',
      '[info] i',
      '[warn] w',
      '[debug] t',
      '[error] Error: e',
    ]);
    expect(log).toContain('[info] [object, TypeError: circular reference');
    expect(log).toContain('[function named] nul\\0\n');
  });

  test('begins its diagnostics with what its top level wrote, each time', async () => {
    const code = 'console.log("start"); export default () => { console.log("call"); };';
    expect((await js(code)).log).toBe('[info] start\n[info] call\n');
    expect((await js(code)).log).toBe('[info] start\n[info] call\n');
  });
});

describe('what a compute can observe', () => {
  test('is a clock that stands at now, in UTC', async () => {
    const code = answering(
      '[Date.now(), new Date().toISOString(), new Date(2020, 0, 1).getTime(), new Date().getTimezoneOffset()]',
    );
    const now = Date.UTC(2026, 4, 25, 12, 0, 0, 123);
    expect((await js(code, {}, { now })).output).toEqual([
      now,
      '2026-05-25T12:00:00.123Z',
      Date.UTC(2020, 0, 1),
      0,
    ]);
    expect((await js(code)).output).toEqual([0, '1970-01-01T00:00:00.000Z', Date.UTC(2020, 0, 1), 0]);
  });

  test('is the machine clock when it is asked for', async () => {
    const before = Date.now();
    const { output } = await js(answering('Date.now()'), {}, { clock: 'host' });
    expect(output).toBeGreaterThanOrEqual(before);
  });

  test('is random numbers that only depend on the seed', async () => {
    const code = answering('[Math.random(), Math.random(), Math.random()]');
    const run = async (options: InvokeOptions): Promise<number[]> =>
      (await js(code, {}, options)).output as number[];
    const first = await run({});
    expect(await run({})).toEqual(first);
    expect(new Set(first).size).toBe(3);
    expect(first.every((value) => value >= 0 && value < 1)).toBe(true);
    expect(await run({ seed: 1n })).not.toEqual(first);
    expect(await run({ seed: 1n })).toEqual(await run({ seed: 1n }));
    expect(await run({ random: 'host' })).not.toEqual(await run({ random: 'host' }));
  });

  test('is time that passes by reading it and by timers, not by waiting', async () => {
    const code = `export default async () => {
      const order = [];
      const from = performance.now();
      setTimeout(() => order.push('b'), 20);
      setTimeout((x) => order.push(x), 10, 'a');
      const id = setTimeout(() => order.push('never'), 15);
      clearTimeout(id);
      let ticks = 0;
      await new Promise((give) => { const i = setInterval(() => { order.push('i'); if (++ticks === 3) { clearInterval(i); give(); } }, 30); });
      queueMicrotask(() => order.push('micro'));
      await null; await null;
      return { order, passed: Math.round(performance.now() - from) };
    };`;
    const { output } = await js(code);
    expect(output).toEqual({ order: ['a', 'b', 'i', 'i', 'i', 'micro'], passed: 90 });
  });

  test('is text encoding as everywhere', async () => {
    const text = 'aé€\u{1F600}\ud800z';
    const { output } = await js(
      answering(`[
        [...new TextEncoder().encode(input)],
        new TextDecoder().decode(new TextEncoder().encode(input)),
        new TextDecoder().decode(new Uint8Array([0xef, 0xbb, 0xbf, 0x61, 0xff, 0xe2, 0x82, 0x62, 0xed, 0xa0, 0x80])),
      ]`),
      text,
    );
    expect(output).toEqual([
      [...new TextEncoder().encode(text)],
      new TextDecoder().decode(new TextEncoder().encode(text)),
      new TextDecoder().decode(
        new Uint8Array([0xef, 0xbb, 0xbf, 0x61, 0xff, 0xe2, 0x82, 0x62, 0xed, 0xa0, 0x80]),
      ),
    ]);
  });

  test('is nothing of Node.js and nothing of the web', async () => {
    const names = [
      'process',
      'require',
      'fetch',
      'Buffer',
      'global',
      'window',
      'WebAssembly',
      'std',
      'os',
      'crypto',
      'host',
    ];
    const { output } = await js(
      answering(`input.filter((name) => typeof globalThis[name] !== 'undefined')`),
      names,
    );
    expect(output).toEqual([]);
  });

  test('is no module but itself', async () => {
    const ran = await js(
      answering(`Promise.all(['std', 'os', 'fs', './other.js'].map((name) =>
      import(name).then(() => 'found', () => 'none')))`),
    );
    expect(ran.output).toEqual(['none', 'none', 'none', 'none']);
  });

  test('does not include the host behind constructor chains', async () => {
    const { output } = await js(`export default () => {
      const roots = [console.log, setTimeout, performance.now, Math.random, queueMicrotask, TextEncoder];
      return roots.map((f) => {
        const made = f.constructor('return typeof process + typeof require + typeof globalThis.constructor')();
        return [made, f.constructor.constructor === Function, Object.getPrototypeOf(f) === Function.prototype];
      });
    };`);
    expect(output).toEqual(Array.from({ length: 6 }, () => ['undefinedundefinedfunction', true, true]));
  });
});

describe('nothing passes from one invocation to the next', () => {
  test('neither variables, nor globals, nor changed built-ins', async () => {
    const code = `let count = 0; const seen = [];
      export default (input) => {
        count += 1; seen.push(input); globalThis.left = (globalThis.left ?? 0) + 1;
        const before = [].map === undefined ? 'broken' : 'whole';
        Array.prototype.map = undefined; JSON.stringify = () => 'never'; Object.prototype.polluted = 1; Math.random = () => 4;
        return { count, seen, left, before, keys: Object.keys(globalThis).length };
      };`;
    for (const input of ['a', 'b', 'c', 'd']) {
      expect((await js(code, input)).output).toMatchObject({
        count: 1,
        seen: [input],
        left: 1,
        before: 'whole',
      });
    }
  });

  test('also not after the memory has grown, and after a failure', async () => {
    const code = `let n = 0; const keep = [];
      export default (input) => {
        n += 1;
        if (input === 'grow') for (let i = 0; i < 200000; i += 1) keep.push({ i });
        if (input === 'throw') throw new Error('thrown');
        if (input === 'recurse') { const f = () => f() + 1; f(); }
        return n;
      };`;
    for (const input of ['x', 'grow', 'x', 'throw', 'recurse', 'x', 'x']) {
      const { output, reason } = await js(code, input);
      expect(reason === null ? output : 1).toBe(1);
    }
  });

  test('with a bundle of a megabyte as with a small one', async () => {
    let code = '';
    for (let index = 0; code.length < 1_000_000; index += 1) {
      code += `const f${index} = (a) => { const t = { x: a, name: 'item ${index}' }; return [t.x, t.name].map((v) => v + ${index}); };\n`;
    }
    code += 'let n = 0; export default (input) => [++n, ...f1(input)];';
    for (let round = 0; round < 3; round += 1) {
      expect((await js(code, 5, { maxPrepareMs: 30_000 })).output).toEqual([1, 6, 'item 11']);
    }
  });

  test('computes alternate on the same workers, more of them than a worker keeps', async () => {
    const codes = Array.from({ length: 12 }, (_, index) => `let n = ${index}; export default () => n++;`);
    for (let round = 0; round < 2; round += 1) {
      const outputs = await Promise.all(codes.map(async (code) => (await js(code)).output));
      expect(outputs).toEqual(codes.map((_, index) => index));
    }
  });
});

describe('a hostile compute', () => {
  const SHORT = { maxWallMs: 300 };
  const well = answering('({ ok: input })');

  test.each([
    ['an endless loop', 'for (;;);', SHORT, 'wall-limit'],
    [
      'an endless loop in a try',
      'for (;;) try { for (;;); } catch {} finally { continue; }',
      SHORT,
      'wall-limit',
    ],
    [
      'an endless chain of promises',
      'const f = () => Promise.resolve().then(f); return f();',
      SHORT,
      'wall-limit',
    ],
    ['endless await', 'return (async () => { for (;;) await null; })();', SHORT, 'wall-limit'],
    ['an endless interval', 'setInterval(() => {}, 1); return new Promise(() => {});', SHORT, 'wall-limit'],
    ['a bomb of a regular expression', 'return /^(a+)+$/.test("a".repeat(40) + "!");', SHORT, 'wall-limit'],
    ['a BigInt nobody can print', 'return (10n ** 300000n).toString().length;', SHORT, 'wall-limit'],
    [
      'a proxy that never ends',
      'const p = new Proxy({}, { get: (t, k, r) => r[k] }); return p.x;',
      SHORT,
      'trap',
    ],
    ['a toJSON that never ends', 'return { toJSON() { for (;;); } };', SHORT, 'wall-limit'],
    ['deep recursion', 'const f = () => f() + 1; return f();', {}, 'trap'],
    ['deep recursion through natives', 'const f = () => [1].map(f); return f();', {}, 'trap'],
    ['deep nesting', 'let a = []; for (let i = 0; i < 1500; i++) a = [a]; return a;', {}, 'bad-output'],
    [
      'memory without end',
      'const a = []; for (;;) a.push(new Array(1000).fill(a.length));',
      {},
      'memory-limit',
    ],
    ['a text that doubles', 'let s = "x".repeat(1e6); for (;;) s += s + Math.random();', {}, 'trap'],
    ['a buffer as big as it gets', 'return new Uint8Array(2 ** 31 - 1).length;', {}, 'memory-limit'],
    ['too much output', 'return "x".repeat(5 * 1024 * 1024);', {}, 'output-limit'],
    ['too many timers', 'for (;;) setTimeout(() => {}, 1);', {}, 'trap'],
  ])('with %s fails alone', async (_, body, options, reason) => {
    const [ran, beside] = await Promise.all([
      js(`export default () => { ${body} };`, {}, options),
      js(well, 'beside'),
    ]);
    expect(ran.reason).toBe(reason);
    expect(beside.output).toEqual({ ok: 'beside' });
    expect((await js(well, 'after')).output).toEqual({ ok: 'after' });
  });

  test('that floods the console is cut off and goes on', async () => {
    const ran = await js(
      'export default () => { for (let i = 0; i < 50000; i++) console.log("flood", i); return 1; };',
      {},
      {
        maxLogBytes: 10_000,
      },
    );
    expect(ran.output).toBe(1);
    expect(ran.log.length).toBe(10_000);
    expect(ran.metrics?.logDroppedBytes).toBeGreaterThan(500_000);
  });

  test('whose top level never ends is stopped by the limit for preparing', async () => {
    const ran = await js('for (;;); export default () => 1;', {}, { maxPrepareMs: 1_000 });
    expect(ran.reason).toBe('prepare-limit');
    expect((await js(well, 1)).output).toEqual({ ok: 1 });
  });

  test('is not let off by catching the interruption', async () => {
    const ran = await js(
      'export default async () => { try { await (async () => { for (;;); })(); } catch { return "got away"; } };',
      {},
      SHORT,
    );
    expect(ran.reason).toBe('wall-limit');
    expect(ran.metrics?.status).toBe('wall-limit');
  });

  test('cannot forge its result or its failure', async () => {
    const { output } = await js(`export default () => {
      JSON.parse = JSON.stringify = () => '"forged"';
      Promise.prototype.then = function () { return 'forged'; };
      Function.prototype.call = () => 'forged';
      String.prototype.replaceAll = () => 'forged';
      Reflect.apply = () => 'forged';
      Object.defineProperty(Object.prototype, 'default', { get() { return () => 'forged'; } });
      return { true: 1 };
    };`);
    expect(output).toEqual({ true: 1 });
  });

  test('whose top level floods the console has that cut off, and said so', async () => {
    const ran = await js(
      'for (let i = 0; i < 3000; i++) console.log("x".repeat(100)); export default () => 1;',
      {},
      { maxLogBytes: 1_000_000 },
    );
    expect(ran.output).toBe(1);
    expect(ran.log.length).toBeLessThan(66_000);
    expect(ran.log).toMatch(/\[warn\] 2\d{5} more bytes were written while starting, and dropped\n$/);
  });

  test('ends when its caller gives up', async () => {
    const controller = new AbortController();
    const ref = resolver.add(
      Buffer.from('export default () => { console.log("in"); for (;;); };'),
      'quickjs',
    );
    const run = manager.run(ref, '{}', {
      signal: controller.signal,
      maxWallMs: 60_000,
      stderr: () => controller.abort(new Error('enough')),
    });
    await expect(run).rejects.toThrow('enough');
  });
});

describe('limits', () => {
  test('output at the limit is returned, one byte more is not', async () => {
    const code = answering('"x".repeat(input)');
    const options = { maxOutputBytes: 1_000 };
    expect((await js(code, 998, options)).output).toBe('x'.repeat(998));
    const over = await js(code, 999, options);
    expect(over.error?.message).toContain('guest returned 1001 bytes of JSON, over maxOutputBytes 1000');
  });

  test('memory is held to the page', async () => {
    const code = answering('new Uint8Array(input).length');
    const most = (await js(code, 20 * 1024 * 1024, { maxMemoryMb: 32 })).output;
    expect(most).toBe(20 * 1024 * 1024);
    const over = await js(code, 27 * 1024 * 1024, { maxMemoryMb: 32 });
    expect(over.reason).toBe('memory-limit');
    expect(over.error?.message).toContain('maxMemoryMb 32 is used up');
    expect(over.metrics?.memoryBytes).toBeLessThanOrEqual(32 * 1024 * 1024);
  });

  test('less memory than QuickJS takes is refused with the number it takes', async () => {
    expect((await js(answering('1'), {}, { maxMemoryMb: 6 })).output).toBe(1);
    const ran = await js(answering('1'), {}, { maxMemoryMb: 5 });
    expect(ran.reason).toBe('module');
    expect(ran.error?.message).toContain('QuickJS itself takes 6 MiB of memory, over maxMemoryMb 5');
  });

  test('recursion goes a few thousand deep', async () => {
    const code = 'const f = (n) => (n === 0 ? 0 : 1 + f(n - 1)); export default f;';
    expect((await js(code, 2_000)).output).toBe(2_000);
  });
});

describe('fuel of a JavaScript compute', () => {
  const code = `let table = []; for (let i = 0; i < 1000; i++) table.push(i * i);
    export default (n) => { let s = 0; for (let i = 0; i < n; i++) s += table[i % 1000]; return s; };`;

  test('is the same each time, on every worker, and grows with the work', async () => {
    const used = async (n: number): Promise<number> =>
      (await js(code, n, { maxFuel: 10 ** 12 })).metrics?.fuelUsed ?? Number.NaN;
    const [first, ...others] = await Promise.all([used(1_000), used(1_000), used(1_000), used(1_000)]);
    expect(new Set([first, ...others])).toEqual(new Set([first]));
    expect(await used(2_000)).toBeGreaterThan(first ?? Infinity);
  });

  test('at the limit it returns, one unit less and it has run out', async () => {
    const { metrics, output } = await js(code, 100, { maxFuel: 10 ** 12 });
    const fuel = metrics?.fuelUsed ?? 0;
    expect((await js(code, 100, { maxFuel: fuel })).output).toBe(output);
    const dry = await js(code, 100, { maxFuel: fuel - 1 });
    expect(dry.reason).toBe('out-of-fuel');
    expect(dry.error?.message).toContain(`guest used up its fuel, maxFuel ${fuel - 1}`);
    expect(dry.metrics).toMatchObject({ status: 'trapped', reason: 'out-of-fuel', fuelUsed: fuel - 1 });
  });

  test.each([
    ['a loop', 'for (;;);'],
    ['a native loop', 'return (10n ** 400000n).toString().length;'],
    ['a regular expression', 'return /^(a+)+$/.test("a".repeat(40) + "!");'],
    ['a loop that catches', 'for (;;) try { for (;;); } catch {}'],
  ])('ends %s', async (_, body) => {
    const ran = await js(`export default () => { ${body} };`, {}, { maxFuel: 50_000_000, maxWallMs: 60_000 });
    expect(ran.reason).toBe('out-of-fuel');
  });

  test('is charged for starting up also where that fails', async () => {
    const failing = 'for (let i = 0; i < 1000; i++); throw new Error("top");';
    const { metrics, reason } = await js(failing, {}, { maxFuel: 10 ** 9 });
    expect(reason).toBe('trap');
    const fuel = metrics?.fuelUsed ?? 0;
    expect(fuel).toBeGreaterThan(1_000);
    expect((await js(failing, {}, { maxFuel: fuel })).reason).toBe('trap');
    expect((await js(failing, {}, { maxFuel: fuel - 1 })).reason).toBe('out-of-fuel');
  });

  test('ends a top level', async () => {
    const ran = await js(
      'for (;;); export default () => 1;',
      {},
      { maxFuel: 10_000_000, maxPrepareMs: 60_000 },
    );
    expect(ran.reason).toBe('out-of-fuel');
    expect(ran.error?.message).toContain('while it started');
  });
});
