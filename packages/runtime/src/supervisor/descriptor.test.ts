import { mkdir, readFile, readdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Programs } from '../programs.test.support.ts';
import {
  descriptorArgs,
  findDescriptor,
  listDescriptors,
  pluginDirs,
  writeDescriptor,
} from './descriptor.ts';

let programs: Programs;
beforeAll(async () => {
  programs = await Programs.open();
});
afterAll(() => programs[Symbol.asyncDispose]());

async function folder(name: string, files: Readonly<Record<string, unknown>>): Promise<string> {
  const dir = programs.path(name);
  await mkdir(dir, { recursive: true });
  for (const [file, content] of Object.entries(files)) {
    await writeFile(path.join(dir, file), typeof content === 'string' ? content : JSON.stringify(content));
  }
  return dir;
}

const entry = (name: string, more: object = {}): object => ({
  name,
  version: '1.0.0',
  'supervisor-path': 'exe-unit',
  ...more,
});

describe('descriptors', () => {
  test('are found in the folders, the first of a name winning, and broken files are told', async () => {
    const first = await folder('first', {
      'ya-a.json': [
        entry('a', {
          'runtime-path': 'bin/a',
          'extra-args': ['--cap-handoff', '--runtime-arg', 'x', '-r', '--y', '--runtime-arg=z', '--odd'],
        }),
      ],
      'ya-broken.json': '[{',
      'ya-object.json': {},
      'ya-version.json': [entry('v', { version: 'one' })],
      'other.json': [entry('other')],
    });
    const second = await folder('second', {
      'ya-two.json': [entry('a', { version: '2.0.0' }), entry('b', { description: 'B' })],
    });
    const { descriptors, problems } = listDescriptors({ dirs: [first, second, programs.path('missing')] });
    expect(descriptors.map(({ name, version }) => `${name} ${version}`)).toEqual(['a 1.0.0', 'b 1.0.0']);
    expect(descriptors[0]).toMatchObject({
      runtimePath: path.join(first, 'bin/a'),
      supervisorPath: path.join(first, 'exe-unit'),
    });
    expect(descriptorArgs(descriptors[0]!)).toEqual({
      managedImage: false,
      managedHardware: true,
      runtimeArgs: ['x', '--y', 'z'],
      unknown: ['--odd'],
    });
    expect(problems.map(({ file }) => path.basename(file))).toEqual([
      'ya-broken.json',
      'ya-object.json',
      'ya-version.json',
    ]);
    expect(() => findDescriptor('c', { dirs: [first, second] })).toThrow(
      /no descriptor .* is named c \(known: a, b; /,
    );
  });

  test('are looked for in the standard folders, or where EXE_UNIT_PATH points', async () => {
    expect(pluginDirs({ HOME: '/home/u' })).toEqual([
      '/home/u/.local/lib/yagna/plugins',
      '/usr/lib/yagna/plugins',
    ]);
    const dir = await folder('env', { 'x-1.json': [entry('one')], 'y-2.json': [entry('two')] });
    const { descriptors } = listDescriptors({ env: { EXE_UNIT_PATH: path.join(dir, 'x-*.json') } });
    expect(descriptors.map(({ name }) => name)).toEqual(['one']);
  });

  test('are written with what the runtime says of itself, in place of an earlier one', async () => {
    const runtimePath = await programs.runtime('runCommand: () => 0');
    const dir = programs.path('written', 'plugins');
    for (const description of ['old', 'new']) {
      await writeDescriptor({
        runtimePath,
        dir,
        description,
        counters: { 'probe.files': { name: 'files', description: 'files read', price: true } },
      });
    }
    expect(await readdir(dir)).toEqual(['ya-runtime-probe.json']);
    expect(JSON.parse(await readFile(path.join(dir, 'ya-runtime-probe.json'), 'utf8'))).toEqual([
      {
        name: 'probe',
        version: '1.2.3',
        'supervisor-path': 'exe-unit',
        'runtime-path': runtimePath,
        description: 'new',
        'extra-args': ['--runtime-managed-image'],
        config: { counters: { 'probe.files': { name: 'files', description: 'files read', price: true } } },
      },
    ]);
    expect(findDescriptor('probe', { dirs: [dir] })).toMatchObject({ runtimePath, version: '1.2.3' });
  });

  test('need a name and a version', async () => {
    const silent = await programs.module('');
    await expect(writeDescriptor({ runtimePath: silent, dir: programs.dir })).rejects.toThrow('give a name');
    await expect(
      writeDescriptor({ runtimePath: silent, dir: programs.dir, name: 'x', version: '1' }),
    ).rejects.toThrow('give a version');
    await expect(
      writeDescriptor({ runtimePath: silent, dir: programs.dir, name: '../x', version: '1.0.0' }),
    ).rejects.toThrow('got "../x"');
  });
});
