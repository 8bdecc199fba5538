import { mkdir, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import type { Json } from '@millrace/runner';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import {
  ComputeManager,
  buildCompute,
  inspectCompute,
  mapTrace,
  memoryResolver,
  parseRef,
  refOf,
  resolveOps,
} from '../index.ts';
import { computeReason } from '../errors.ts';
import { echo, program } from '../fixtures/wat.ts';
import type { BuiltCompute } from './build.ts';

let root: string;

beforeAll(async () => {
  root = await mkdtemp(path.join(tmpdir(), 'millrace-build-'));
});

afterAll(() => rm(root, { recursive: true, force: true }));

let folders = 0;

/** A new folder with these files. */
async function folder(files: Readonly<Record<string, string | Uint8Array>>): Promise<string> {
  folders += 1;
  const dir = path.join(root, `${folders}`, 'x'.repeat(folders));
  for (const [name, content] of Object.entries(files)) {
    await mkdir(path.dirname(path.join(dir, name)), { recursive: true });
    await writeFile(path.join(dir, name), content);
  }
  return dir;
}

const build = async (files: Readonly<Record<string, string>>, entry = 'job.ts'): Promise<BuiltCompute> =>
  buildCompute({ entry: path.join(await folder(files), entry) });

/** The problems of a build that must fail. */
async function problems(files: Readonly<Record<string, string>>, entry = 'job.ts'): Promise<string> {
  const error = await build(files, entry).then(
    () => null,
    (thrown: unknown) => thrown,
  );
  expect(computeReason(error)).toBe('module');
  return (error as Error).message;
}

const PROJECT = {
  'job.ts': `import { twice } from './lib/util.js';
import pad from 'pad';
import data from './data.json';
interface In { readonly n: number }
export default async function job(input: In): Promise<unknown> {
  if (input.n < 0) refuse(input.n);
  return { n: twice(input.n), padded: pad('x'), data };
}
function refuse(n: number): never {
  throw new RangeError(\`negative: \${n}\`);
}
`,
  'lib/util.ts': 'export const twice = (n: number): number => n * 2;\nexport const unused = "never used";\n',
  'data.json': '{"k":"ü"}',
  'node_modules/pad/package.json': '{"name":"pad","version":"1.2.3","main":"index.js"}',
  'node_modules/pad/index.js': 'module.exports = (text) => "  " + text;\n',
};

describe('a compute built from TypeScript', () => {
  test('runs, and its ref is the hash of its bytes', async () => {
    const built = await build(PROJECT);
    expect(built.engine).toBe('quickjs');
    const ref = parseRef(built.ref);
    expect(ref).toEqual(refOf(built.bytes));
    expect(built.manifest).toEqual({ engine: 'quickjs', ...ref });
    const resolver = memoryResolver();
    resolver.add(built.bytes, built.engine);
    await using manager = new ComputeManager(
      resolver,
      { maxWallMs: 10_000, maxPrepareMs: 60_000 },
      { workers: 1 },
    );
    const output = await manager.run(built.ref, '{"n":21}');
    expect(JSON.parse(Buffer.from(output).toString())).toEqual({ n: 42, padded: '  x', data: { k: 'ü' } });

    const error = await manager.run(built.ref, '{"n":-1}').catch((thrown: unknown) => thrown);
    const trace = mapTrace(
      String((error as { details: Record<string, unknown> }).details['cause']),
      built.sourceMap ?? '',
    );
    expect(trace).toMatch(
      /RangeError: negative: -1\n +at refuse \(job\.ts:10:\d+\)\n +at job \(job\.ts:6:\d+\)/,
    );
  });

  test('has the same digest wherever it lies, however its lines end, and wherever its packages are', async () => {
    const first = await build(PROJECT);
    const windows = Object.fromEntries(
      Object.entries(PROJECT).map(([name, text]) => [name, text.replaceAll('\n', '\r\n')]),
    );
    const { 'node_modules/pad/package.json': manifest, 'node_modules/pad/index.js': code, ...own } = PROJECT;
    const hoisted = await folder({
      ...Object.fromEntries(Object.entries(own).map(([name, text]) => [`deep/down/${name}`, text])),
      'node_modules/pad/package.json': manifest,
      'node_modules/pad/index.js': code,
      'tsconfig.json': '{"compilerOptions":{"target":"es5","useDefineForClassFields":false,"jsx":"react"}}',
    });
    const linked = await folder({ note: '' });
    await symlink(path.join(hoisted, 'deep'), path.join(linked, 'link'));
    const others = [
      await build(PROJECT),
      await build(windows),
      await buildCompute({ entry: path.join(hoisted, 'deep/down/job.ts') }),
      await buildCompute({ entry: path.join(linked, 'link/down/job.ts') }),
      await buildCompute({ entry: path.relative(process.cwd(), path.join(hoisted, 'deep/down/job.ts')) }),
    ];
    for (const other of others) {
      expect(other.ref).toBe(first.ref);
      expect(Buffer.from(other.sourceBundle ?? []).toString()).toBe(
        Buffer.from(first.sourceBundle ?? []).toString(),
      );
      expect(other.sourceMap).toBe(first.sourceMap);
    }
    expect(Buffer.from(first.bytes).toString()).not.toContain(root);
  });

  test('has another digest when anything that counts is different, a comment is nothing', async () => {
    const first = await build(PROJECT);
    const util = PROJECT['lib/util.ts'];
    const changed = await build({ ...PROJECT, 'lib/util.ts': util.replace('* 2', '* 3') });
    expect(changed.ref).not.toBe(first.ref);
    const commented = await build({ ...PROJECT, 'lib/util.ts': `// why\n${util}` });
    expect(commented.ref).toBe(first.ref);
  });

  test('keeps its sources beside it, in the reference’s encoding', async () => {
    const { sourceBundle } = await build(PROJECT);
    const text = Buffer.from(sourceBundle ?? []).toString();
    expect(text).not.toMatch(/[<>&]/);
    const { v, entry, files } = JSON.parse(text) as {
      v: number;
      entry: string;
      files: { path: string; content: string }[];
    };
    expect({ v, entry }).toEqual({ v: 1, entry: 'job.ts' });
    expect(files.map((file) => file.path)).toEqual([
      'data.json',
      'job.ts',
      'lib/util.ts',
      'node_modules/pad@1.2.3/index.js',
    ]);
    expect(files[1]?.content).toBe(PROJECT['job.ts']);
  });

  test('leaves out what nobody uses', async () => {
    const { bytes } = await build(PROJECT);
    expect(Buffer.from(bytes).toString()).not.toContain('never used');
  });

  test('may import a package that is named like a built-in of Node.js', async () => {
    const { bytes } = await build({
      'job.ts': "import { on } from 'events';\nexport default () => on();\n",
      'node_modules/events/package.json': '{"name":"events","version":"3.0.0","main":"events.js"}',
      'node_modules/events/events.js': 'exports.on = () => "package";',
    });
    expect(Buffer.from(bytes).toString()).toContain('package');
  });

  test.each([
    [
      'a syntax error',
      { 'job.ts': 'export default () => {\n  let x = ;\n};' },
      'job.ts:2:11: Unexpected ";"',
    ],
    [
      'an import that is not there',
      { 'job.ts': "import { a } from './nope.js';\nexport default () => a;" },
      'job.ts:1:19: Could not resolve "./nope.js"',
    ],
    [
      'a package that is not installed, in a file it imports',
      {
        'job.ts': "import { a } from './lib/a.js';\nexport default () => a;",
        'lib/a.ts': "\nimport b from 'not-installed';\nexport const a = b;",
      },
      'lib/a.ts:2:15: Could not resolve "not-installed"',
    ],
    [
      'a built-in of Node.js',
      { 'job.ts': "import fs from 'node:fs';\nexport default () => fs.readFileSync('/etc/passwd', 'utf8');" },
      'job.ts:1:16: it imports the Node.js built-in "node:fs"; a compute runs without Node.js: no files, no network, no processes',
    ],
    [
      'a built-in by its short name',
      { 'job.ts': "import { join } from 'path';\nexport default () => join('a');" },
      'job.ts:1:22: it imports the Node.js built-in "path"',
    ],
    ['no default export', { 'job.ts': 'export const a = 1;' }, 'job.ts:1:1: it has no default export'],
    [
      'a file of a kind it cannot use',
      { 'job.ts': "import a from './a.png';\nexport default () => a;", 'a.png': '' },
      'job.ts:1:15: a.png has the ending ".png"',
    ],
  ] as const)('is refused for %s, with file, line and rule', async (_, files, says) => {
    expect(await problems(files)).toContain(says);
  });

  test('is told all of its problems at once', async () => {
    const text = await problems({
      'job.ts': "import a from './a.js';\nimport b from 'node:net';\nexport default () => [a, b];",
    });
    expect(text.split('\n').slice(1)).toHaveLength(2);
  });
});

describe('a compute that is WebAssembly already', () => {
  test('is taken as it is', async () => {
    const dir = await folder({ 'echo.wasm': echo() });
    const built = await buildCompute({ entry: path.join(dir, 'echo.wasm') });
    expect(Buffer.from(built.bytes).equals(Buffer.from(echo()))).toBe(true);
    expect(built).toMatchObject({ engine: 'wasm', sourceBundle: null, sourceMap: null });
    expect(parseRef(built.ref)).toEqual(refOf(echo()));
  });

  test.each([
    ['no module', new Uint8Array([1, 2, 3]), /not a WebAssembly module/],
    ['a library', Buffer.from('AGFzbQEAAAA=', 'base64'), /exports no function _start/],
    ['not valid', program('(drop (i64.add (i32.const 1) (i64.const 1)))'), /not valid WebAssembly/],
  ])('is refused when it is %s', async (_, bytes, says) => {
    const dir = await folder({ 'bad.wasm': bytes });
    const entry = path.join(dir, 'bad.wasm');
    const refused = buildCompute({ entry });
    await expect(refused).rejects.toThrow(says);
    await expect(refused).rejects.toThrow(`cannot use ${entry}: `);
  });

  test('is held to the limits it is told, else to what some node might grant', async () => {
    const entry = path.join(
      await folder({ 'big.wasm': program('', { memory: '(memory (export "memory") 1000)' }) }),
      'big.wasm',
    );
    expect((await buildCompute({ entry })).engine).toBe('wasm');
    await expect(buildCompute({ entry, limits: { maxMemoryMb: 62 } })).rejects.toThrow(/maxMemoryMb 62/);
    expect((await buildCompute({ entry, limits: { maxMemoryMb: 63 } })).engine).toBe('wasm');
  });
});

test('a file of another kind is refused with the endings there are, a missing one is not found', async () => {
  const dir = await folder({ 'job.py': '' });
  await expect(buildCompute({ entry: path.join(dir, 'job.py') })).rejects.toThrow('must be one of .wasm .ts');
  await expect(buildCompute({ entry: path.join(dir, 'none.ts') })).rejects.toMatchObject({
    code: 'not_found',
  });
});

describe('inspecting an artifact', () => {
  test('shows the imports, exports and memory of WebAssembly', async () => {
    const summary = await inspectCompute(echo());
    expect(summary).toMatchObject({
      engine: 'wasm',
      bytes: echo().length,
      memory: { min: 1 },
      refusal: null,
    });
    expect(summary.imports).toHaveLength(2);
    const wrong = await inspectCompute(program('(drop (i64.add (i32.const 1) (i64.const 1)))'));
    expect(wrong.refusal).toMatch(/not valid WebAssembly/);
  });

  test('shows what JavaScript exports, and why it would be refused', async () => {
    const built = await build({ 'job.ts': 'export const extra = 1; export default () => 1;' });
    expect(await inspectCompute(built.bytes)).toEqual({
      ref: built.ref,
      engine: 'quickjs',
      bytes: built.bytes.length,
      imports: [],
      exports: ['default', 'extra'],
      memory: null,
      refusal: null,
    });
    expect(await inspectCompute(Buffer.from('import a from "x"; export default a;'))).toMatchObject({
      imports: ['x'],
      refusal: 'it imports x; build it into one file',
    });
  });

  test('refuses what is neither', async () => {
    await expect(inspectCompute(Buffer.from([0xff, 0xfe]))).rejects.toThrow('not UTF-8');
    await expect(inspectCompute(Buffer.from('let x = ;'))).rejects.toThrow(
      'neither WebAssembly nor a JavaScript',
    );
  });
});

describe('op:// in a job file', () => {
  test('becomes the ref of what lies beside it, each artifact built once', async () => {
    const dir = await folder({
      'sum.ts': 'export default (x: number[]) => x.length;',
      'same.js': 'export default (x) => x.length;',
      'echo.wasm': echo(),
      'echo.ts': 'export default () => "not this one";',
    });
    const job: Json = {
      label: 'job',
      tasks: [
        { meta: { ref: 'op://sum' } },
        { meta: { ref: 'op://echo', list: ['op://sum', 'x op://sum', 7, null] } },
      ],
    };
    const before = structuredClone(job);
    const { value, computes } = await resolveOps(dir, job);
    const [sum, echoed] = computes;
    expect(computes.map((one) => one.engine)).toEqual(['quickjs', 'wasm']);
    expect(value).toEqual({
      label: 'job',
      tasks: [
        { meta: { ref: sum?.ref } },
        { meta: { ref: echoed?.ref, list: [sum?.ref, 'x op://sum', 7, null] } },
      ],
    });
    expect(job).toEqual(before);
    expect((await resolveOps(dir, { ref: 'op://sum' })).computes).toHaveLength(1);
  });

  test.each(['op://', 'op://a/b', 'op://a.ts', 'op://../a'])(
    'is refused as %s, which names nothing',
    async (text) => {
      await expect(resolveOps(root, { ref: text })).rejects.toThrow(
        `${JSON.stringify(text)} names no compute`,
      );
    },
  );

  test('says where it looked when there is no such file', async () => {
    const dir = await folder({ 'a.ts': '' });
    await expect(resolveOps(dir, 'op://b')).rejects.toThrow(
      `put b.wasm, b.ts, b.mts, b.js, b.mjs into ${dir}`,
    );
  });

  test('leaves a value without any alone', async () => {
    const value = { a: [1, 'compute://sha256/x', { b: null }] };
    expect(await resolveOps(root, value)).toEqual({ value, computes: [] });
  });
});

test('the example for authors in docs/compute.md builds and runs as it stands', async () => {
  const page = await readFile(new URL('../../../../docs/compute.md', import.meta.url), 'utf8');
  const [, example = ''] = /```ts\n([\s\S]*?)```/.exec(page) ?? [];
  const statistics = `export function median(values: readonly number[]): number {
    return [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? NaN;
  }`;
  const built = await build({ 'summary.ts': example, 'statistics.ts': statistics }, 'summary.ts');
  const resolver = memoryResolver();
  resolver.add(built.bytes, built.engine);
  await using manager = new ComputeManager(
    resolver,
    { maxWallMs: 10_000, maxPrepareMs: 60_000 },
    { workers: 1 },
  );
  const output = await manager.run(built.ref, '{"samples":[5,1,3]}');
  expect(Buffer.from(output).toString()).toBe('{"n":3,"median":3}');
  await expect(manager.run(built.ref, '{"samples":[]}')).rejects.toThrow('RangeError: no samples');
});
