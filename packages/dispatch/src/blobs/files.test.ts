import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import {
  chmod,
  copyFile,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  truncate,
  utimes,
  writeFile,
} from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import type { Readable } from 'node:stream';
import { SimulatedClock } from '@millrace/runner/testing';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { StagedPart } from '../blobs.ts';
import { openFileBlobs } from './files.ts';
import { blobSuite } from './suite.ts';

blobSuite('files', async () => {
  const dir = await mkdtemp(join(tmpdir(), 'millrace-blobs-'));
  let blobs = await openFileBlobs({ dir });
  return {
    blobs,
    reopen: async () => {
      await blobs[Symbol.asyncDispose]();
      blobs = await openFileBlobs({ dir });
      return blobs;
    },
    [Symbol.asyncDispose]: async () => {
      await blobs[Symbol.asyncDispose]();
      expect(await readdir(join(dir, 'tmp'))).toEqual([]);
      await rm(dir, { recursive: true });
    },
  };
});

describe('blobs as files', () => {
  let dir: string;
  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), 'millrace-blobs-'));
  });
  afterEach(async () => {
    await rm(dir, { recursive: true, force: true });
  });

  const ANY = { maxBytes: 2 ** 40 };

  test('a blob is the file sha256/ab/<digest>', async () => {
    await using blobs = await openFileBlobs({ dir });
    const { digest } = await blobs.put(once('hello'), ANY);
    expect(digest).toBe('sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824');
    expect(await readFile(pathOf(dir, digest), 'utf8')).toBe('hello');
  });

  test('all folders and files are open to their owner only', async () => {
    const root = join(dir, 'parent', 'blobs');
    await using blobs = await openFileBlobs({ dir: root });
    await blobs.put(once('hello'), ANY);
    await blobs.putPart('upload', 1, once('part'), ANY);
    await blobs.putPart('upload', 2, once('part'), { ...ANY, at: 4 });
    const modes = new Map<string, number>();
    const entries = await readdir(join(dir, 'parent'), { recursive: true, withFileTypes: true });
    for (const entry of entries) {
      const path = join(entry.parentPath, entry.name);
      modes.set(path, (await stat(path)).mode & 0o777);
      expect([path, modes.get(path)]).toEqual([path, entry.isDirectory() ? 0o700 : 0o600]);
    }
    // blobs, its three folders, one for the blob, one for the upload, and three files.
    expect(modes.size).toBe(9);
  });

  test('a flipped bit is found before the last chunk is handed out', async () => {
    await using blobs = await openFileBlobs({ dir });
    for (const size of [5, 2_000_000]) {
      const bytes = randomBytes(size);
      const { digest } = await blobs.put(once(bytes), ANY);
      const damaged = Buffer.from(bytes);
      damaged[size - 1]! ^= 1;
      await writeFile(pathOf(dir, digest), damaged);
      let received = 0;
      const reading = async (): Promise<void> => {
        for await (const chunk of await blobs.open(digest)) received += (chunk as Buffer).length;
      };
      await expect(reading()).rejects.toMatchObject({ code: 'data_loss' });
      expect(received).toBeLessThan(size);
    }
  });

  test('a torn file is found, whole or by range, and putting the bytes again heals it', async () => {
    await using blobs = await openFileBlobs({ dir });
    const bytes = randomBytes(1_000_000);
    const { digest } = await blobs.put(once(bytes), ANY);
    const range = await blobs.open(digest, { start: 10, end: 999_999 });
    await truncate(pathOf(dir, digest), 400_000);
    await expect(drain(await blobs.open(digest))).rejects.toMatchObject({ code: 'data_loss' });
    await expect(drain(range)).rejects.toMatchObject({
      code: 'data_loss',
      message: expect.stringContaining('400000') as string,
    });
    await expect(blobs.open(digest, { start: 10, end: 999_999 })).rejects.toMatchObject({
      code: 'invalid_argument',
    });
    await blobs.put(once(bytes), ANY);
    expect(await drain(await blobs.open(digest))).toBe(1_000_000);
  });

  test('a flipped bit in a staged part is found when the parts are joined', async () => {
    await using blobs = await openFileBlobs({ dir });
    const part = await blobs.putPart('up', 1, once('abc'), ANY);
    await writeFile(join(dir, 'uploads', 'up', '1'), 'abd');
    await expect(blobs.joinParts('up', [{ partNumber: 1, ...part }])).rejects.toMatchObject({
      code: 'data_loss',
    });
    expect(await readdir(join(dir, 'tmp'))).toEqual([]);
  });

  test('a flipped bit in a part that is where it belongs is found as well', async () => {
    await using blobs = await openFileBlobs({ dir });
    const parts: StagedPart[] = [];
    for (const [index, text] of ['abc', 'def'].entries()) {
      const part = await blobs.putPart('up', index + 1, once(text), { ...ANY, at: index * 3 });
      parts.push({ partNumber: index + 1, ...part });
    }
    const whole = join(dir, 'uploads', 'up', 'whole');
    expect(await readFile(whole, 'utf8')).toBe('abcdef');
    await writeFile(whole, 'abcdeg');
    await expect(blobs.joinParts('up', parts)).rejects.toMatchObject({ code: 'data_loss' });
    expect(await readdir(join(dir, 'tmp'))).toEqual([]);
    expect(await blobs.putPart('up', 2, once('def'), { ...ANY, at: 3 })).toMatchObject({ size: 3 });
    expect(await blobs.joinParts('up', parts)).toMatchObject({ size: 6 });
  });

  test('parts that are where they belong become the blob without being written again', async () => {
    const clock = new SimulatedClock({ startAt: Date.UTC(2031, 4, 1) });
    await using blobs = await openFileBlobs({ dir, clock });
    const part = await blobs.putPart('up', 1, once('abc'), { ...ANY, at: 0 });
    const { ino } = await stat(join(dir, 'uploads', 'up', 'whole'));
    const { digest } = await blobs.joinParts('up', [{ partNumber: 1, ...part }]);
    expect((await stat(pathOf(dir, digest))).ino).toBe(ino);
    expect(await readdir(join(dir, 'tmp'))).toEqual([]);
    for await (const blob of blobs.list()) expect(blob.putAtMs).toBe(Date.UTC(2031, 4, 1));
  });

  test('blobs of an earlier version, a level deeper, are read, listed once, replaced and deleted', async () => {
    await using blobs = await openFileBlobs({ dir });
    const { digest } = await blobs.put(once('hello'), ANY);
    const old = join(pathOf(dir, digest), '..', digest.slice(9, 11), digest.slice('sha256:'.length));
    const moveBack = async (): Promise<void> => {
      await mkdir(join(old, '..'), { recursive: true });
      await rename(pathOf(dir, digest), old);
    };
    const listed = async (): Promise<string[]> => {
      const all: string[] = [];
      for await (const blob of blobs.list()) all.push(blob.digest);
      return all;
    };
    await moveBack();
    expect(await blobs.stat(digest)).toEqual({ digest, size: 5 });
    expect(await drain(await blobs.open(digest))).toBe(5);
    expect(await listed()).toEqual([digest]);
    await blobs.put(once('hello'), ANY);
    await expect(stat(old)).rejects.toThrow('ENOENT');
    expect(await listed()).toEqual([digest]);
    // As after a crash in between.
    await copyFile(pathOf(dir, digest), old);
    expect(await listed()).toEqual([digest]);
    expect(await blobs.delete(digest)).toBe(true);
    expect(await listed()).toEqual([]);
    await blobs.put(once('hello'), ANY);
    await moveBack();
    expect(await blobs.delete(digest)).toBe(true);
    expect(await blobs.stat(digest)).toBeNull();
  });

  test('what dead processes left under way is removed, what a live one has is not', async () => {
    await openFileBlobs({ dir }).then((blobs) => blobs[Symbol.asyncDispose]());
    const gone = await exited();
    const old = new Date(Date.now() - 25 * 60 * 60 * 1000);
    const beforeThisProcess = new Date(Date.now() - process.uptime() * 1000 - 60_000);
    const temp = (name: string): string => join(dir, 'tmp', name);
    for (const name of [`${gone}-dead`, 'no-number', `${process.ppid}-live`, `${process.ppid}-old`]) {
      await writeFile(temp(name), 'x');
    }
    await writeFile(temp(`${process.pid}-mine`), 'x');
    await writeFile(temp(`${process.pid}-of-an-earlier-process`), 'x');
    await utimes(temp(`${process.ppid}-old`), old, old);
    await utimes(temp(`${process.pid}-of-an-earlier-process`), beforeThisProcess, beforeThisProcess);
    await using blobs = await openFileBlobs({ dir });
    expect((await readdir(join(dir, 'tmp'))).toSorted()).toEqual(
      [`${process.ppid}-live`, `${process.pid}-mine`].toSorted(),
    );
    expect(await blobs.stat(`sha256:${'0'.repeat(64)}`)).toBeNull();
  });

  test('files that are no blobs are not listed', async () => {
    await using blobs = await openFileBlobs({ dir });
    const { digest } = await blobs.put(once('hello'), ANY);
    await writeFile(join(dir, 'sha256', 'README'), 'x');
    await writeFile(`${pathOf(dir, digest)}.bak`, 'x');
    const listed: string[] = [];
    for await (const blob of blobs.list()) listed.push(blob.digest);
    expect(listed).toEqual([digest]);
  });

  test('puts are stamped by the clock it was given', async () => {
    const clock = new SimulatedClock({ startAt: Date.UTC(2031, 4, 1) });
    await using blobs = await openFileBlobs({ dir, clock });
    await blobs.put(once('hello'), ANY);
    for await (const blob of blobs.list()) expect(blob.putAtMs).toBe(Date.UTC(2031, 4, 1));
  });

  test('every put that was answered survives SIGKILL, and nothing half written is left', async () => {
    const child = spawn(process.execPath, ['--input-type=module', '-e', PUT_FOREVER], {
      env: { ...process.env, BLOBS_URL: new URL('./files.js', import.meta.url).href, BLOBS_DIR: dir },
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    const exit = new Promise<void>((resolve) => void child.once('exit', () => resolve()));
    const answered: string[] = [];
    for await (const line of createInterface({ input: child.stdout })) {
      answered.push(line);
      if (answered.length === 200) child.kill('SIGKILL');
    }
    await exit;
    expect(answered.length).toBeGreaterThanOrEqual(200);
    await using blobs = await openFileBlobs({ dir });
    expect(await readdir(join(dir, 'tmp'))).toEqual([]);
    for (const digest of answered) await drain(await blobs.open(digest));
    for await (const blob of blobs.list()) await drain(await blobs.open(blob.digest));
  });

  test('when there is no space for a blob, that is said and nothing is left of it', async () => {
    // A limit on the size of files, in a process of its own: the one way to run out of space without being root.
    const result = await run(
      'sh',
      [
        '-c',
        'trap "" XFSZ; ulimit -f 600; exec "$0" --input-type=module -e "$1"',
        process.execPath,
        PUT_TOO_MUCH,
      ],
      {
        BLOBS_URL: new URL('./files.js', import.meta.url).href,
        BLOBS_DIR: dir,
      },
    );
    expect(JSON.parse(result)).toEqual({
      code: 'resource_exhausted',
      errno: 'EFBIG',
      temp: [],
      listed: 1,
    });
  });

  test('a folder that cannot be made or written is named when it is opened', async () => {
    await writeFile(join(dir, 'file'), 'x');
    await expect(openFileBlobs({ dir: join(dir, 'file') })).rejects.toMatchObject({
      code: 'unavailable',
      message: expect.stringMatching(/ENOTDIR|EEXIST/) as string,
    });
  });

  test('a folder that became read-only refuses puts and still serves reads', async () => {
    await using blobs = await openFileBlobs({ dir });
    const { digest } = await blobs.put(once('hello'), ANY);
    // Root may write where nobody may; a missing folder stops it too.
    if (process.getuid?.() === 0) await rm(join(dir, 'tmp'), { recursive: true });
    else await chmod(join(dir, 'tmp'), 0o500);
    await expect(blobs.put(once('more'), ANY)).rejects.toMatchObject({ code: 'unavailable' });
    expect(await drain(await blobs.open(digest))).toBe(5);
    if (process.getuid?.() !== 0) await chmod(join(dir, 'tmp'), 0o700);
  });
});

const PUT_FOREVER = `
  const { openFileBlobs } = await import(process.env.BLOBS_URL);
  const { randomBytes } = await import('node:crypto');
  const blobs = await openFileBlobs({ dir: process.env.BLOBS_DIR });
  const one = async (size) => {
    for (;;) {
      const info = await blobs.put((async function* () { yield randomBytes(size); yield randomBytes(size); })(), { maxBytes: 1e9 });
      process.stdout.write(info.digest + '\\n');
    }
  };
  const inParts = async () => {
    for (let count = 0; ; count += 1) {
      const parts = [];
      for (const [index, size] of [300_000, 300_000, 10].entries()) {
        const bytes = (async function* () { yield randomBytes(size); })();
        const part = await blobs.putPart('up-' + count, index + 1, bytes, { maxBytes: 1e9, at: index * 300_000 });
        parts.push({ partNumber: index + 1, ...part });
      }
      process.stdout.write((await blobs.joinParts('up-' + count, parts)).digest + '\\n');
      await blobs.dropParts('up-' + count);
    }
  };
  await Promise.all([one(10), one(1000), one(300_000), one(2_000_000), inParts()]);
`;

const PUT_TOO_MUCH = `
  const { openFileBlobs } = await import(process.env.BLOBS_URL);
  const { readdir } = await import('node:fs/promises');
  const blobs = await openFileBlobs({ dir: process.env.BLOBS_DIR });
  const bytes = (count) => (async function* () { for (let i = 0; i < count; i += 1) yield Buffer.alloc(65536, i); })();
  await blobs.put(bytes(1), { maxBytes: 1e9 });
  const error = await blobs.put(bytes(64), { maxBytes: 1e9 }).then(() => null, (e) => e);
  let listed = 0;
  for await (const blob of blobs.list()) listed += 1;
  console.log(JSON.stringify({ code: error?.code, errno: error?.details.errno, temp: await readdir(process.env.BLOBS_DIR + '/tmp'), listed }));
`;

async function* once(bytes: string | Uint8Array): AsyncGenerator<Uint8Array> {
  yield typeof bytes === 'string' ? Buffer.from(bytes) : bytes;
}

async function drain(stream: Readable): Promise<number> {
  let size = 0;
  for await (const chunk of stream) size += (chunk as Buffer).length;
  return size;
}

function pathOf(dir: string, digest: string): string {
  const hex = digest.slice('sha256:'.length);
  return join(dir, 'sha256', hex.slice(0, 2), hex);
}

/** The id of a process that has ended. */
function exited(): Promise<number> {
  return new Promise((resolve) => {
    const child = spawn(process.execPath, ['-e', '']);
    child.once('exit', () => resolve(child.pid!));
  });
}

async function run(command: string, args: string[], env: Record<string, string>): Promise<string> {
  const child = spawn(command, args, { env: { ...process.env, ...env }, stdio: ['ignore', 'pipe', 'pipe'] });
  let out = '';
  let err = '';
  child.stdout.on('data', (chunk: Buffer) => (out += chunk.toString()));
  child.stderr.on('data', (chunk: Buffer) => (err += chunk.toString()));
  await new Promise<void>((resolve) => void child.once('close', () => resolve()));
  if (out === '') throw new Error(`${command} printed nothing; stderr: ${err}`);
  return out;
}
