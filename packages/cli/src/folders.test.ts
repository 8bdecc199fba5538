import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, rm, stat, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { checkFolder, makeFolders } from './folders.ts';

let root: string;
beforeEach(async () => {
  root = await mkdtemp(path.join(tmpdir(), 'millrace-folders-'));
});
afterEach(() => rm(root, { recursive: true, force: true }));

describe('a folder the user named', () => {
  test('is made with all that is missing above it, in its mode, also by two at once and again', async () => {
    const dir = path.join(root, 'a', 'b', 'c');
    await Promise.all([makeFolders(dir, '--out', 0o700), makeFolders(dir, '--out', 0o700)]);
    await makeFolders(dir, '--out');
    for (const place of ['a', 'a/b', 'a/b/c']) {
      expect((await stat(path.join(root, place))).mode & 0o777).toBe(0o700);
    }
  });

  test('is checked without leaving anything', async () => {
    await checkFolder(path.join(root, 'a', 'b'), '--out');
    await checkFolder(root, '--out');
    expect(await readdir(root)).toEqual([]);
  });

  test.each([
    ['file', /^--out .*: .*file is not a folder; name another$/],
    ['file/below', /^--out .*: .*file is not a folder; name another$/],
    ['nowhere/below', /^--out .*: .*nowhere is not a folder; name another$/],
    ['loop/below', /^--out .*: cannot look at .*loop.* \(ELOOP.*\); name another$/],
    ['x'.repeat(256), /^--out .*: cannot look at .* \(ENAMETOOLONG.*\); name another$/],
  ])('that cannot be (%s) is refused with what is in the way', async (name, message) => {
    await writeFile(path.join(root, 'file'), '');
    await mkdir(path.join(root, 'there'));
    await symlink(path.join(root, 'missing'), path.join(root, 'nowhere'));
    await symlink('loop', path.join(root, 'loop'));
    const before = await readdir(root);
    for (const use of [makeFolders, checkFolder]) {
      await expect(use(path.join(root, name), '--out')).rejects.toMatchObject({
        code: 'invalid_argument',
        message: expect.stringMatching(message),
      });
    }
    expect(await readdir(root)).toEqual(before);
  });

  // There Node's recursive mkdir never returns.
  test.runIf(existsSync('/proc/self'))('on a file system that makes no folders is refused', async () => {
    for (const use of [makeFolders, checkFolder]) {
      await expect(use('/proc/millrace-x/y', '--out')).rejects.toMatchObject({
        code: 'invalid_argument',
        message: expect.stringMatching(/^--out \/proc\/millrace-x\/y: cannot .* \/proc.*; name another$/),
      });
    }
  });
});
