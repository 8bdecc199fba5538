import { chmod, mkdtemp, readFile, readdir, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { reservePrivateFile, writePrivateFile } from './private-file.ts';

let dir: string;
beforeEach(async () => {
  dir = await mkdtemp(path.join(tmpdir(), 'millrace-private-'));
});
afterEach(() => rm(dir, { recursive: true, force: true }));

const mode = async (file: string): Promise<number> => (await stat(file)).mode & 0o777;

test('a private file is readable by its owner only, whatever was there before', async () => {
  const file = path.join(dir, 'secret');
  await writeFile(file, 'old');
  await chmod(file, 0o644);
  await writePrivateFile(file, 'new');
  expect(await readFile(file, 'utf8')).toBe('new');
  expect(await mode(file)).toBe(0o600);
  expect(await readdir(dir)).toEqual(['secret']);
});

describe('a reserved file', () => {
  test('is there with its text after it was written', async () => {
    const file = path.join(dir, 'node.env');
    {
      await using reserved = await reservePrivateFile(file);
      await reserved.write('KEY=1\n');
    }
    expect(await readFile(file, 'utf8')).toBe('KEY=1\n');
    expect(await mode(file)).toBe(0o600);
  });

  test('is gone when nothing was written', async () => {
    const file = path.join(dir, 'node.env');
    {
      await using _ = await reservePrivateFile(file);
    }
    expect(await readdir(dir)).toEqual([]);
  });

  test('never takes the place of another', async () => {
    const file = path.join(dir, 'node.env');
    await writeFile(file, 'theirs');
    await expect(reservePrivateFile(file)).rejects.toThrow(/is there already/);
    expect(await readFile(file, 'utf8')).toBe('theirs');
  });
});
