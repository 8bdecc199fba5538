/** The WASI runtime as the program it is, driven as a node and as a provider drive it. */
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { createTestContext, type TestContext } from '@millrace/runner/testing';
import {
  RuntimeSupervisor,
  deployRuntime,
  golemRunner,
  offerOf,
  testRuntime,
  type GolemRunnerOptions,
} from '@millrace/runtime/supervisor';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { WASI_RUNTIME } from '../runtime-file.ts';
import { UPPER_IMAGE, zip } from './image.test.support.ts';

let dir: string;
let module: string;
let archive: string;
/** The configuration of the runtime. */
let configured: Readonly<Record<string, string>>;
beforeAll(async () => {
  dir = await mkdtemp(path.join(tmpdir(), 'millrace-wasi-'));
  module = path.join(UPPER_IMAGE, 'upper.wasm');
  archive = path.join(dir, 'image.zip');
  const member = async (name: string): Promise<{ name: string; content: Buffer }> => ({
    name,
    content: await readFile(path.join(UPPER_IMAGE, name)),
  });
  await writeFile(archive, zip([await member('manifest.json'), await member('upper.wasm')]));
  configured = { XDG_DATA_HOME: dir };
});
afterAll(() => rm(dir, { recursive: true, force: true }));

const script = (...runs: readonly (readonly string[])[]): object[] => [
  { deploy: {} },
  { start: {} },
  ...runs.map(([entry_point, ...args]) => ({
    run: { entry_point, args, capture: { stdout: { stream: {} }, stderr: { stream: {} } } },
  })),
];

async function perform(
  meta: { readonly exe_script: readonly object[]; readonly task_package?: string },
  inputs: Readonly<Record<string, { readonly name: string; readonly content: Uint8Array | string }>>,
  options: Partial<GolemRunnerOptions> = {},
): Promise<{ readonly ctx: TestContext; readonly error: Error | null }> {
  const runner = golemRunner({ runtime: { path: WASI_RUNTIME, name: 'wasi' }, env: configured, ...options });
  expect(runner.capability).toBe('/golem/wasi/v1');
  const ctx = createTestContext({ inputs, task: { capability: runner.capability, meta: meta as never } });
  const error = await runner.run(ctx).then(
    () => null,
    (thrown: unknown) => thrown as Error,
  );
  await ctx.close();
  return { ctx, error };
}

const output = (ctx: TestContext, name: string): string => Buffer.from(ctx.outputs.get(name)!).toString();

describe('a task', () => {
  test.each(['folder', 'archive'])('runs a program of the %s that its node gives it', async (form) => {
    const { ctx, error } = await perform(
      { exe_script: script(['upper', 'a.txt', 'b.txt'], ['upper', 'a.txt', 'c.txt']) },
      { a: { name: 'a.txt', content: 'the mill' } },
      { taskPackage: form === 'folder' ? UPPER_IMAGE : archive },
    );
    expect(error).toBeNull();
    expect([output(ctx, 'b.txt'), output(ctx, 'c.txt')]).toEqual(['THE MILL', 'THE MILL']);
    const results = JSON.parse(output(ctx, 'exe-results.json')) as {
      result: string;
      stdout: string | null;
    }[];
    expect(results.map(({ result }) => result)).toEqual(['Ok', 'Ok', 'Ok', 'Ok']);
    expect(results[2]?.stdout).toBe('read\n');
    const counters = ctx.events.filter((event) => (event as { type?: string }).type === 'exe_counter');
    expect(counters).toHaveLength(2);
    expect(counters[0]).toMatchObject({ name: 'millrace.wasi.guest_sec' });
  });

  test('brings its program as an input, which does not appear among its files', async () => {
    const content = await readFile(module);
    const { ctx, error } = await perform(
      { exe_script: script(['anything', 'a.txt', 'b.txt']), task_package: 'input:0' },
      { code: { name: 'upper.wasm', content }, text: { name: 'a.txt', content: 'race'.repeat(100_000) } },
    );
    expect(error).toBeNull();
    expect(output(ctx, 'b.txt')).toBe('RACE'.repeat(100_000));
    const missing = await perform(
      { exe_script: script(['anything', 'upper.wasm', 'b.wasm']), task_package: 'input:0' },
      { code: { name: 'upper.wasm', content } },
    );
    expect(missing.error?.message).toContain('exited with code 2: cannot open');
  });

  test('fails with what is wrong with its image, when it is deployed', async () => {
    const attempt = async (content: Uint8Array | string): Promise<string> => {
      const { error } = await perform(
        { exe_script: script(['x']), task_package: 'input:0' },
        { image: { name: 'image', content } },
      );
      return error!.message;
    };
    expect(await attempt('no image')).toContain(
      'neither a folder, nor a zip archive, nor a WebAssembly module',
    );
    expect(await attempt(Buffer.from('\0asm\x01\0\0\0', 'latin1'))).toContain('no function _start');
    const noImage = await perform({ exe_script: script(['x']) }, {});
    expect(noImage.error?.message).toContain('there is no image; give one with --task-package');
  });

  test('is refused an entry point that the image does not have', async () => {
    const { error } = await perform({ exe_script: script(['lower']) }, {}, { taskPackage: archive });
    expect(error?.message).toContain('lower is no entry point; there are upper');
  });
});

describe('the runtime', () => {
  test('passes its self-test and tells what it runs', async () => {
    expect(await testRuntime({ runtimePath: WASI_RUNTIME, env: configured })).toMatchObject({
      exitCode: 0,
      stderr: '',
    });
    const { offer } = await offerOf({ runtimePath: WASI_RUNTIME, env: configured });
    expect(offer.properties).toEqual({ 'golem.runtime.wasi.versions': ['preview1'] });
  });

  test('gives volumes that a requestor asks for beside those of the image, and no other kinds than folders', async () => {
    const deploy = (volumes: Record<string, object>) =>
      deployRuntime({
        runtimePath: WASI_RUNTIME,
        workDir: path.join(dir, 'deployed'),
        taskPackage: archive,
        env: configured,
        request: { volumes: volumes as never },
      });
    const { mode, volumes } = await deploy({ '/cache': { host: {} }, '/in': { host: {} } });
    expect(mode).toBe('server');
    expect(volumes.map((volume) => volume.path)).toEqual(['/in', '/out', '/cache']);
    const refused = await deploy({ '/cache': { ram: { size: '1GiB' } } });
    expect(refused).toMatchObject({
      exitCode: 1,
      stderr: expect.stringContaining('only folders are offered'),
    });
  });

  test('kills a program that never ends, and goes on with the next', async () => {
    await using supervisor = new RuntimeSupervisor({
      runtime: WASI_RUNTIME,
      workDir: path.join(dir, 'kill'),
      taskPackage: archive,
      env: configured,
    });
    await supervisor.deploy();
    await supervisor.start();
    let spinning!: () => void;
    const heard = new Promise<void>((resolve) => (spinning = resolve));
    const command = await supervisor.spawn({ entryPoint: 'upper' }, { onOutput: spinning });
    await heard;
    await command.kill(15);
    expect((await command.result).exitCode).toBe(128 + 15);
    expect((await supervisor.run({ entryPoint: 'upper', args: ['absent', 'b'] })).exitCode).toBe(2);
  });

  test('ends with its limits, which its configuration sets and the agreement narrows', async () => {
    const own = path.join(dir, 'own', 'wasi');
    const { mkdir } = await import('node:fs/promises');
    await mkdir(own, { recursive: true });
    await writeFile(path.join(own, 'wasi.yaml'), 'maxWallMs: 200\nmaxStorageBytes: 4\n');
    const { error } = await perform(
      { exe_script: script(['upper']) },
      {},
      { taskPackage: archive, env: { XDG_DATA_HOME: path.dirname(own) } },
    );
    expect(error?.message).toContain('wall-clock limit exceeded after 200ms');
    const full = await perform(
      { exe_script: script(['upper', 'a.txt', 'b.txt']) },
      { a: { name: 'a.txt', content: '12345' } },
      { taskPackage: archive, env: { XDG_DATA_HOME: path.dirname(own) } },
    );
    // The program does not look whether its writing worked.
    expect(output(full.ctx, 'b.txt')).toBe('');
    const refused = await perform(
      { exe_script: script(['upper', 'a.txt', 'b.txt']) },
      { a: { name: 'a.txt', content: '12345' } },
      { taskPackage: archive, hardware: { memGib: 1 / 1024, storageGib: 4 / 1024 ** 3 } },
    );
    // Two pages fit one MiB.
    expect(refused.error).toBeNull();
    expect(output(refused.ctx, 'b.txt')).toBe('');
    await writeFile(path.join(own, 'wasi.yaml'), 'maxWallMS: 200\n');
    const broken = await testRuntime({
      runtimePath: WASI_RUNTIME,
      env: { XDG_DATA_HOME: path.dirname(own) },
    });
    expect(broken.exitCode).toBe(1);
    expect(broken.stderr).toContain('maxWallMS is unknown');
  });
});
