import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { loadConfig } from './config-file.ts';
import { runnerSpecs } from './runner-specs.ts';

let dir: string;
beforeEach(async () => {
  dir = await mkdtemp(path.join(tmpdir(), 'millrace-config-'));
});
afterEach(() => rm(dir, { recursive: true, force: true }));

const write = (name: string, text: string): Promise<void> => writeFile(path.join(dir, name), text);

describe('the config file', () => {
  test('need not be there', async () => {
    expect(await loadConfig(undefined, dir)).toMatchObject({ file: null, runners: [], labels: {} });
  });

  test.each([
    [
      'millrace.config.yaml',
      'runners: [./a.js]\nlabels: { gpu: none }\nlimits: { drainMs: 5, wallMs: 9 }\nmaxConcurrency: 2\n',
    ],
    [
      'millrace.config.yml',
      'runners:\n  - module: ./a.js\nlabels: { gpu: none }\nlimits: { drainMs: 5, wallMs: 9 }\nmaxConcurrency: 2\n',
    ],
    [
      'millrace.config.json',
      '{"runners":["./a.js"],"labels":{"gpu":"none"},"limits":{"drainMs":5,"wallMs":9},"maxConcurrency":2}',
    ],
    [
      'millrace.config.mjs',
      'export default { runners: ["./a.js"], labels: { gpu: "none" }, limits: { drainMs: 5, wallMs: 9 }, maxConcurrency: 2 };',
    ],
    [
      'millrace.config.ts',
      'interface C { maxConcurrency: number }\nconst c: C = { maxConcurrency: 2 };\nexport default { runners: ["./a.js"], labels: { gpu: "none" }, limits: { drainMs: 5, wallMs: 9 }, ...c };',
    ],
  ])('is found as %s', async (name, text) => {
    await write(name, text);
    expect(await loadConfig(undefined, dir)).toEqual({
      file: path.join(dir, name),
      runners: [{ module: path.join(dir, 'a.js'), limits: { wallMs: 9 } }],
      labels: { gpu: 'none' },
      limits: { wallMs: 9 },
      drainMs: 5,
      maxConcurrency: 2,
      resources: null,
      compute: null,
      supervision: {},
      env: {},
    });
  });

  test('may bound supervision for all runners, and say of each its labels and bounds of its own', async () => {
    const exec = import.meta.resolve('@millrace/exec');
    await write(
      'c.mjs',
      `import { subprocess } from '${exec}';
       export default {
         runners: [
           { module: './a.js', labels: { gpu: 'a100' }, supervision: { maxRetries: 2 } },
           { runner: subprocess({ capability: '/tools/sort/v1', command: 'sort' }), labels: { disk: 'ssd' } },
         ],
         supervision: { restart: 'onFailure', timeoutMs: 5, defaults: { restart: { type: 'onFailure' }, backoff: { firstMs: 7 } } },
         env: { TZ: 'UTC' },
       };`,
    );
    expect(await loadConfig('c.mjs', dir)).toMatchObject({
      runners: [
        { module: path.join(dir, 'a.js'), labels: { gpu: 'a100' }, supervision: { maxRetries: 2 } },
        { runner: { capability: '/tools/sort/v1' }, labels: { disk: 'ssd' } },
      ],
      supervision: { restart: 'onFailure', timeoutMs: 5, defaults: { backoff: { firstMs: 7 } } },
      env: { TZ: 'UTC' },
    });
    await write('d.yaml', 'supervision: { restart: sometimes }\n');
    await expect(loadConfig('d.yaml', dir)).rejects.toThrow(/supervision\.restart/);
  });

  test('says whether computes are run, and how; files in it are relative to it', async () => {
    const computeOf = async (text: string): Promise<unknown> => {
      await write('millrace.config.json', text);
      return (await loadConfig(undefined, dir)).compute;
    };
    expect(await computeOf('{}')).toBeNull();
    expect(await computeOf('{"compute":false}')).toBe(false);
    expect(await computeOf('{"compute":true}')).toEqual({});
    const digest = 'a'.repeat(64);
    expect(
      await computeOf(
        `{"compute":{"limits":{"maxWallMs":9},"workers":256,"plugins":[{"file":"p.wasm","digest":"${digest}"}]}}`,
      ),
    ).toEqual({
      limits: { maxWallMs: 9 },
      workers: 256,
      plugins: [{ file: path.join(dir, 'p.wasm'), digest }],
    });
    for (const [text, said] of [
      ['{"compute":{"workers":257}}', 'compute.workers'],
      ['{"compute":{"limits":{"maxMemoryMb":0}}}', 'compute.limits.maxMemoryMb'],
      ['{"compute":{"plugins":[{"file":"p.wasm"}]}}', 'digest'],
      ['{"compute":{"plugins":[{"file":"p.wasm","digest":"abc"}]}}', '64 lower-case hex digits'],
      ['{"compute":"yes"}', 'compute'],
    ] as const) {
      await expect(computeOf(text)).rejects.toThrow(said);
    }
  });

  test('may hold runners it made itself, which are taken as they are', async () => {
    const exec = import.meta.resolve('@millrace/exec');
    await write(
      'c.mjs',
      `import { subprocess } from '${exec}';
       export default { runners: ['./a.js', subprocess({ capability: '/tools/sort/v1', command: 'sort' })] };`,
    );
    const { runners } = await loadConfig('c.mjs', dir);
    expect(runners).toEqual([
      { module: path.join(dir, 'a.js'), limits: {} },
      { runner: expect.objectContaining({ capability: '/tools/sort/v1' }) as unknown },
    ]);
    await write('d.mjs', 'export default { runners: [{ capability: "", run() {} }] };');
    await expect(loadConfig('d.mjs', dir)).rejects.toThrow('capability must be a non-empty string');
  });

  test('gives each runner its own limits over the common ones', async () => {
    await write(
      'c.yaml',
      'runners: [{ module: x.js, limits: { wallMs: 1 }, env: { A: b }, warm: 3 }]\nlimits: { wallMs: 9, memoryMiB: 64 }\n',
    );
    const { runners } = await loadConfig('c.yaml', dir);
    expect(runners).toEqual([
      { module: path.join(dir, 'x.js'), limits: { wallMs: 1, memoryMiB: 64 }, env: { A: 'b' }, warm: 3 },
    ]);
  });

  test('what the node has to give is as the variable RESOURCES would have it', async () => {
    await write('millrace.config.yaml', 'resources: { memory: 1.5 GiB, cpu: 4, gpu: 1 }\n');
    const { resources } = await loadConfig(undefined, dir);
    expect(resources).toBe('cpu=4,gpu=1,memory=1610612736');
  });

  test.each([
    [
      'c.yaml',
      'resources: { cpu: 0 }\n',
      /^c\.yaml:1:19: resources\.cpu: must be a multiple of 0\.001, .*got 0$/,
    ],
    ['c.yaml', 'maxConcurrency: 0\n', /^c\.yaml:1:17: maxConcurrency: .*>=1, got 0/],
    ['c.yaml', 'limits:\n  wallMs: fast\n', /^c\.yaml:2:11: limits\.wallMs: .*, got "fast"/],
    [
      'c.yaml',
      'runner: [a.js]\n',
      /^c\.yaml:1:9: unknown member "runner"; known are runners, compute, labels, limits, maxConcurrency, resources, supervision, env$/,
    ],
    ['c.yaml', 'limits: { wall: 1 }\n', /: limits: unknown member "wall"; known are memoryMiB, .*drainMs$/],
    ['c.yaml', 'labels: { gpu: 1 }\n', /labels\.gpu: expected string, got 1/],
    ['c.json', '{"runners": [', /^c\.json:1:\d+: /],
    ['c.mjs', 'export const nothing = 1;', /c\.mjs has no default export/],
    ['c.mjs', 'throw new Error("boom");', /c\.mjs does not load: boom/],
    ['c.ts', 'export default { maxConcurrency: "two" as const };', /^c\.ts: maxConcurrency: .*got "two"/],
    ['c.toml', '', /the name must end in/],
  ])('%s with %j is refused with file, path, rule and value', async (name, text, message) => {
    await write(name, text);
    await expect(loadConfig(name, dir)).rejects.toThrow(message);
  });

  test('that was named must be there', async () => {
    await expect(loadConfig('none.yaml', dir)).rejects.toThrow(/cannot read the config file none\.yaml/);
  });

  test('must be the only one', async () => {
    await write('millrace.config.yaml', '');
    await write('millrace.config.json', '{}');
    await expect(loadConfig(undefined, dir)).rejects.toThrow(
      /holds millrace\.config\.json and millrace\.config\.yaml; keep one/,
    );
  });
});

describe('runner modules on the command line', () => {
  test('come before those of the config and take its settings', async () => {
    await Promise.all(['a.js', 'b.js', 'c.js'].map((name) => write(name, '')));
    await write('c.yaml', 'runners: [{ module: a.js, warm: 2 }, b.js]\nlimits: { graceMs: 7 }\n');
    const config = await loadConfig('c.yaml', dir);
    expect(await runnerSpecs(['./c.js', './a.js'], config, dir)).toEqual([
      { module: path.join(dir, 'c.js'), limits: { graceMs: 7 } },
      { module: path.join(dir, 'a.js'), limits: { graceMs: 7 }, warm: 2 },
      { module: path.join(dir, 'b.js'), limits: { graceMs: 7 } },
    ]);
  });

  test('must be there', async () => {
    const config = await loadConfig(undefined, dir);
    await expect(runnerSpecs(['none.ts'], config, dir)).rejects.toThrow(
      /runner module .*none\.ts cannot be read/,
    );
  });
});
