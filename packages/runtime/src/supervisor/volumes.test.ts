import { execFileSync } from 'node:child_process';
import { mkdir, mkdtemp, readFile, readdir, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { MillraceError } from '@millrace/runner';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { VolumeTable, folderBytes, listVolume, openInVolume, writeToVolume } from './volumes.ts';

let dir: string;
let table: VolumeTable;

beforeEach(async () => {
  dir = await mkdtemp(path.join(tmpdir(), 'millrace-volumes-'));
  table = new VolumeTable(path.join(dir, 'work'), [
    { name: 'v-in', path: '/in' },
    { name: 'v-deep', path: '/in/deep/' },
    { name: 'v-out', path: '/out' },
  ]);
  for (const name of ['v-in', 'v-deep', 'v-out'])
    await mkdir(path.join(dir, 'work', name), { recursive: true });
  await writeFile(path.join(dir, 'secret'), 'secret');
});
afterEach(() => rm(dir, { recursive: true, force: true }));

async function* bytes(...texts: string[]): AsyncGenerator<Uint8Array> {
  for (const text of texts) yield Buffer.from(text);
}

async function read(inside: string): Promise<string> {
  const handle = await openInVolume(table.locate(inside));
  try {
    return await handle.readFile('utf8');
  } finally {
    await handle.close();
  }
}

const code = (promise: Promise<unknown>): Promise<unknown> =>
  promise.then(
    () => 'it worked',
    (error: unknown) => (MillraceError.is(error) ? error.code : error),
  );

describe('a path in a container', () => {
  test.each([
    ['/in/x', 'v-in', ['x']],
    ['/in', 'v-in', []],
    ['/in/deeper/x', 'v-in', ['deeper', 'x']],
    ['/in/deep/x/y', 'v-deep', ['x', 'y']],
    ['/out/a b', 'v-out', ['a b']],
  ])('%s is in the volume with the longest path', (inside, name, components) => {
    expect(table.locate(inside)).toEqual({ root: path.join(dir, 'work', name), components });
  });

  test.each([
    '/etc/passwd',
    '/inner/x',
    '/in//x',
    '/in/../out/x',
    '/in/./x',
    'in/x',
    '',
    '/in/a\u0000',
    '/in/a\\b',
  ])('%j is refused', (inside) => {
    expect(() => table.locate(inside)).toThrow(/container path/);
  });

  test('cannot be that of two volumes', () => {
    expect(
      () =>
        new VolumeTable(dir, [
          { name: 'a', path: '/x' },
          { name: 'b', path: '/x/' },
        ]),
    ).toThrow('two volumes');
  });
});

describe('a file in a volume', () => {
  test('is written whole, in folders that are made, and read back', async () => {
    await writeToVolume(table.locate('/in/a/b/c.txt'), bytes('one ', 'two'));
    expect(await read('/in/a/b/c.txt')).toBe('one two');
    await writeToVolume(table.locate('/in/a/b/c.txt'), bytes('three'));
    expect(await read('/in/a/b/c.txt')).toBe('three');
    expect(await readdir(path.join(dir, 'work', 'v-in', 'a', 'b'))).toEqual(['c.txt']);
  });

  test('leaves nothing behind when its source fails', async () => {
    const failing = (async function* () {
      yield Buffer.from('half');
      throw new Error('the source broke');
    })();
    await expect(writeToVolume(table.locate('/in/x'), failing)).rejects.toThrow('the source broke');
    expect(await readdir(path.join(dir, 'work', 'v-in'))).toEqual([]);
  });

  test('that is missing, a folder or the volume itself is told as such', async () => {
    expect(await code(read('/in/none'))).toBe('not_found');
    expect(await code(read('/in/none/x'))).toBe('not_found');
    expect(await code(read('/in'))).toBe('permission_denied');
    expect(await code(writeToVolume(table.locate('/in'), bytes()))).toBe('permission_denied');
  });

  test('is never reached through a link, be it the file, a folder or the volume', async () => {
    const inside = path.join(dir, 'work', 'v-in');
    await symlink(path.join(dir, 'secret'), path.join(inside, 'file'));
    await symlink(dir, path.join(inside, 'folder'));
    expect(await code(read('/in/file'))).toBe('permission_denied');
    expect(await code(read('/in/folder/secret'))).toBe('permission_denied');
    expect(await code(writeToVolume(table.locate('/in/folder/new'), bytes('x')))).toBe('permission_denied');
    // A link in the place of the target is replaced, not written through.
    await writeToVolume(table.locate('/in/file'), bytes('mine'));
    expect(await readFile(path.join(dir, 'secret'), 'utf8')).toBe('secret');
    expect(await read('/in/file')).toBe('mine');
    await rm(path.join(dir, 'work', 'v-out'), { recursive: true });
    await symlink(dir, path.join(dir, 'work', 'v-out'));
    expect(await code(read('/out/secret'))).toBe('permission_denied');
    expect((await readdir(dir)).toSorted()).toEqual(['secret', 'work']);
  });

  test('that is a named pipe is refused without waiting for a writer', async () => {
    execFileSync('mkfifo', [path.join(dir, 'work', 'v-in', 'pipe')]);
    expect(await code(read('/in/pipe'))).toBe('permission_denied');
  });
});

describe('the list of a volume', () => {
  const list = async (inside: string, depth = 8): Promise<string[]> => {
    const found: string[] = [];
    for await (const { relPath, kind, size } of listVolume(table.locate(inside), depth)) {
      found.push(`${relPath} ${kind} ${size}`);
    }
    return found;
  };

  test('is sorted, tells links without following them, and is empty for a folder that is missing', async () => {
    await writeToVolume(table.locate('/out/b/two'), bytes('22'));
    await writeToVolume(table.locate('/out/a'), bytes('1'));
    await symlink(dir, path.join(dir, 'work', 'v-out', 'c'));
    expect(await list('/out')).toEqual(['a file 1', 'b/two file 2', 'c other 0']);
    expect(await list('/out/b')).toEqual(['two file 2']);
    expect(await list('/out/none')).toEqual([]);
    expect(await code(list('/out/c'))).toBe('permission_denied');
    expect(await folderBytes(path.join(dir, 'work', 'v-out'))).toBe(3);
  });

  test('goes as deep as its limit and no deeper', async () => {
    await writeToVolume(table.locate('/out/1/2/x'), bytes('x'));
    expect(await list('/out', 2)).toEqual(['1/2/x file 1']);
    expect(await code(list('/out', 1))).toBe('resource_exhausted');
  });
});
