import { spawn, execFileSync } from 'node:child_process';
import { mkdir, symlink, truncate, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { MillraceError } from '@millrace/runner';
import { createTestContext, type TestContext } from '@millrace/runner/testing';
import { collectOutputs, parseOutputs } from './outputs.ts';
import { temporaryFolder } from './programs.test.support.ts';

const LIMITS = { outputBytes: 1000, outputFiles: 10 };
let folder: Awaited<ReturnType<typeof temporaryFolder>>;
let out: string;
let ctx: TestContext;

beforeEach(async () => {
  folder = await temporaryFolder();
  out = join(folder.path, 'out');
  await mkdir(out);
  ctx = createTestContext();
});

afterEach(async () => {
  await ctx.close();
  await folder[Symbol.asyncDispose]();
});

async function files(...paths: string[]): Promise<void> {
  for (const path of paths) {
    await mkdir(join(out, path, '..'), { recursive: true });
    await writeFile(join(out, path), path);
  }
}

function collect(patterns: readonly string[], limits = LIMITS): ReturnType<typeof collectOutputs> {
  return collectOutputs(ctx, out, parseOutputs('outputs', patterns), limits);
}

async function refusal(patterns: readonly string[], limits = LIMITS): Promise<MillraceError> {
  const error: unknown = await collect(patterns, limits).then(
    () => null,
    (reason: unknown) => reason,
  );
  if (MillraceError.is(error)) return error;
  throw new Error(`expected a refusal, got ${String(error)}`);
}

describe('patterns', () => {
  test.each<[string[], string[]]>([
    [['*.png'], ['a.png', 'b.png']],
    [['**/*.png'], ['a.png', 'b.png', 'maps/c.png', 'maps/deep/d.png']],
    [['maps/*'], ['maps/c.png']],
    [
      ['{a,b}.png', 'maps/**'],
      ['a.png', 'b.png', 'maps/c.png', 'maps/deep/d.png'],
    ],
    [
      ['?.png', '[ab].png'],
      ['a.png', 'b.png'],
    ],
    [['*.jpg'], []],
    [['.hidden'], ['.hidden']],
    [['*'], ['a.png', 'b.png', 'c.txt']],
    [[], []],
  ])('%j collects %j', async (patterns, expected) => {
    await files('a.png', 'b.png', 'c.txt', 'maps/c.png', 'maps/deep/d.png', '.hidden');
    const collected = await collect(patterns);
    expect([...ctx.outputs.keys()].sort()).toEqual(expected);
    expect(collected).toEqual({ files: expected.length, bytes: expected.join('').length });
  });

  test('a plain name must be there; a pattern may match nothing', async () => {
    await files('a');
    const error = await refusal(['a', 'maps/b']);
    expect(error).toMatchObject({
      code: 'not_found',
      details: { ending: 'output_missing', output: 'maps/b' },
    });
  });

  test.each([
    ['..', /must not have empty, "\." or "\.\." segments/],
    ['a/../../b', /segments/],
    ['/etc/*', /must not be absolute/],
    ['', /must not be empty/],
    ['a\nb', /control characters/],
    ['x'.repeat(256), /at most 255 bytes long, it has 256/],
    ['*'.repeat(600), /at most 512 characters long, it has 600/],
  ])('%j is refused', (pattern, message) => {
    expect(() => parseOutputs('meta.outputs', ['fine', pattern])).toThrow(message);
    expect(() => parseOutputs('meta.outputs', ['fine', pattern])).toThrow(/^meta\.outputs\[1\] /);
  });

  test('repetitions inside of repetitions, which take for ever to fail, are plain text', () => {
    const [pattern] = parseOutputs('outputs', ['+(+(+(+(a))))b']);
    const startedAt = performance.now();
    expect(pattern?.matches(`${'a'.repeat(60)}c`)).toBe(false);
    expect(performance.now() - startedAt).toBeLessThan(1000);
  });
});

describe('names', () => {
  test('255 bytes are taken, in one name or in several', async () => {
    await files('x'.repeat(255), `${'d'.repeat(200)}/${'y'.repeat(54)}`);
    await expect(collect(['**'])).resolves.toMatchObject({ files: 2 });
  });

  test.each([
    ['more than 255 bytes', `${'d'.repeat(200)}/${'y'.repeat(100)}`, /at most 255 bytes long, it has 301/],
    ['a line break', 'a\nb', /control characters/],
    ['a backslash', 'a\\b', /backslashes/],
  ])('%s is refused', async (_, name, message) => {
    await files(name);
    const error = await refusal(['**']);
    expect(error).toMatchObject({ code: 'invalid_argument', details: { ending: 'output_refused' } });
    expect(error.message).toMatch(message);
    expect(ctx.outputs.size).toBe(0);
  });

  test('a name that is no UTF-8 is refused', async () => {
    execFileSync('sh', ['-c', 'printf x > "$(printf "bad\\377")"'], { cwd: out });
    expect((await refusal(['*'])).message).toMatch(/broken UTF-8/);
  });
});

describe('what is no regular file', () => {
  test('a link is refused, wherever it leads, and only when it matches', async () => {
    await files('real');
    await symlink('real', join(out, 'link'));
    await symlink('/etc/passwd', join(out, 'other'));
    await expect(collect(['real'])).resolves.toMatchObject({ files: 1 });
    const error = await refusal(['link']);
    expect(error).toMatchObject({
      code: 'invalid_argument',
      message: 'output "link" is a link; outputs must be regular files',
    });
    expect((await refusal(['other'])).message).toContain('is a link');
  });

  test('a link to a folder is not followed', async () => {
    await symlink('/etc', join(out, 'etc'));
    await expect(collect(['etc/*', '**/*.conf'])).resolves.toEqual({ files: 0, bytes: 0 });
    expect((await refusal(['**'])).message).toContain('output "etc" is a link');
  });

  test('a pipe is refused without waiting for a writer', async () => {
    execFileSync('mkfifo', [join(out, 'pipe')]);
    expect((await refusal(['*'])).message).toBe(
      'output "pipe" must be a regular file, not a pipe, socket or device',
    );
  });

  test('a socket is refused', async () => {
    const { createServer } = await import('node:net');
    const server = createServer().listen(join(out, 'socket'));
    await new Promise((resolve) => server.once('listening', resolve));
    expect((await refusal(['*'])).message).toBe(
      'output "socket" must be a regular file, not a pipe, socket or device',
    );
    await new Promise((resolve) => server.close(resolve));
  });
});

describe('limits', () => {
  test('outputBytes: as many are taken, and one more is refused before it is uploaded', async () => {
    await writeFile(join(out, 'a'), Buffer.alloc(600));
    await writeFile(join(out, 'b'), Buffer.alloc(400));
    await expect(collect(['*'])).resolves.toEqual({ files: 2, bytes: 1000 });
    await truncate(join(out, 'b'), 401);
    const again = createTestContext();
    const error: unknown = await collectOutputs(again, out, parseOutputs('outputs', ['*']), LIMITS).catch(
      (reason: unknown) => reason,
    );
    expect(error).toMatchObject({
      code: 'resource_exhausted',
      details: { ending: 'limit', limit: 'outputBytes', value: 1000 },
    });
    expect([...again.outputs.keys()]).toEqual(['a']);
    await again.close();
  });

  test('outputFiles: as many are taken, and one more is refused', async () => {
    await files(...Array.from({ length: 10 }, (_, index) => `f${index}`));
    await expect(collect(['*'])).resolves.toMatchObject({ files: 10 });
    await files('one-more');
    expect(await refusal(['*'])).toMatchObject({
      code: 'resource_exhausted',
      details: { limit: 'outputFiles', value: 10 },
    });
  });

  test('folders are entered 32 deep, and not 33', async () => {
    const deep = (depth: number): string => `${'d/'.repeat(depth)}f`;
    await files(deep(32));
    await expect(collect(['**'])).resolves.toMatchObject({ files: 1 });
    await files(deep(33));
    expect(await refusal(['**'])).toMatchObject({
      code: 'resource_exhausted',
      details: { limit: 'outputDepth', value: 32 },
    });
  });
});

test('what is swapped for a link while it is collected never gives away what the link leads to', async () => {
  const secret = 'this is not the program’s to give';
  await writeFile(join(folder.path, 'secret'), secret);
  await mkdir(join(folder.path, 'vault'));
  await writeFile(join(folder.path, 'vault', 'f'), secret);
  // A file and a folder that turn into links to the secret, and back, as fast as they can.
  const swapper = spawn(process.execPath, [
    '-e',
    `const fs = require('fs'); process.chdir(process.argv[1]);
     fs.mkdirSync('real'); fs.writeFileSync('real/f', 'fine');
     for (;;) {
       fs.writeFileSync('t', 'fine'); fs.renameSync('t', 'file');
       fs.symlinkSync('../secret', 't'); fs.renameSync('t', 'file');
       try { fs.renameSync('real', 'folder'); } catch {}
       try { fs.renameSync('folder', 'real'); } catch {}
       fs.symlinkSync('../vault', 'folder'); fs.unlinkSync('folder');
     }`,
    out,
  ]);
  const patterns = parseOutputs('outputs', ['f*/*', 'file']);
  let uploaded = 0;
  let refused = 0;
  const deadline = performance.now() + 20_000;
  while ((uploaded < 40 || refused < 40) && performance.now() < deadline) {
    const attempt = createTestContext();
    refused += await collectOutputs(attempt, out, patterns, LIMITS).then(
      () => 0,
      () => 1,
    );
    for (const bytes of attempt.outputs.values()) {
      uploaded += 1;
      expect(Buffer.from(bytes).toString()).toBe('fine');
    }
    await attempt.close();
  }
  swapper.kill('SIGKILL');
  await new Promise((resolve) => swapper.once('exit', resolve));
  expect(uploaded).toBeGreaterThan(0);
  expect(refused).toBeGreaterThan(0);
});
