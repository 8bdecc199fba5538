import { mkdtemp, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { Readable } from 'node:stream';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { announceDispatcher, readDispatcherFile, resolveAddress, withdrawDispatcher } from './connection.ts';
import { resolveDataDir } from './data-dir.ts';
import { Output, type CommandContext, type GlobalOptions, type Io } from './io.ts';

let dir: string;
beforeEach(async () => {
  dir = await mkdtemp(path.join(tmpdir(), 'millrace-connection-'));
});
afterEach(() => rm(dir, { recursive: true, force: true }));

const LOCAL = { url: 'http://127.0.0.1:7070', pid: 4711, token: 'local-token' };

function contextOf(options: GlobalOptions, env: Record<string, string> = {}): CommandContext {
  const io: Io = {
    env,
    cwd: '/somewhere',
    pid: 1,
    stdin: Readable.from([]),
    stdout: { write: () => true },
    stderr: { write: () => true },
    now: () => 0,
    onStop: () => ({ [Symbol.dispose]: () => {} }),
  };
  return { io, out: new Output(io, false), options };
}

describe('the data folder', () => {
  test.each([
    [{ data: 'state' }, { MILLRACE_DATA: '/env' }, '/somewhere/state'],
    [{}, { MILLRACE_DATA: '/env', XDG_DATA_HOME: '/xdg' }, '/env'],
    [{}, { XDG_DATA_HOME: '/xdg', HOME: '/home/me' }, '/xdg/millrace'],
    [{}, { XDG_DATA_HOME: 'relative', HOME: '/home/me' }, '/home/me/.local/share/millrace'],
    [{}, { HOME: '/home/me' }, '/home/me/.local/share/millrace'],
  ])('with %j and %j is %s', (options, env, expected) => {
    expect(resolveDataDir(contextOf(options, env))).toBe(expected);
  });
});

describe('the dispatcher', () => {
  test('of the data folder is found with its token, kept for its owner only', async () => {
    await announceDispatcher(dir, LOCAL);
    expect(await resolveAddress(contextOf({ data: dir }))).toEqual({ url: LOCAL.url, token: LOCAL.token });
    expect((await stat(path.join(dir, 'client-token'))).mode & 0o777).toBe(0o600);
    expect((await stat(path.join(dir, 'dispatcher.json'))).mode & 0o777).toBe(0o600);
  });

  test('named by an option wins over the environment, and both over the data folder', async () => {
    await announceDispatcher(dir, LOCAL);
    const env = { MILLRACE_URL: 'http://env:1', MILLRACE_TOKEN: 'env-token' };
    expect(await resolveAddress(contextOf({ data: dir }, env))).toEqual({
      url: 'http://env:1',
      token: 'env-token',
    });
    const options = { data: dir, url: 'http://option:2/', token: 'option-token' };
    expect(await resolveAddress(contextOf(options, env))).toEqual({
      url: 'http://option:2',
      token: 'option-token',
    });
  });

  test('the token of the data folder goes to its own dispatcher under any loopback name', async () => {
    await announceDispatcher(dir, LOCAL);
    const address = await resolveAddress(contextOf({ data: dir, url: 'http://localhost:7070' }));
    expect(address.token).toBe(LOCAL.token);
  });

  test.each(['http://127.0.0.1:7071', 'http://example.org:7070', 'https://127.0.0.1:7070'])(
    'the token of the data folder does not go to %s',
    async (url) => {
      await announceDispatcher(dir, LOCAL);
      await expect(resolveAddress(contextOf({ data: dir, url }))).rejects.toMatchObject({
        code: 'unauthenticated',
      });
    },
  );

  test('that nobody started is unavailable, with what to do', async () => {
    await expect(resolveAddress(contextOf({ data: dir }))).rejects.toMatchObject({
      code: 'unavailable',
      message: expect.stringMatching(/start one with "millrace up"/),
    });
  });

  test.each(['ftp://x', 'not a url'])('cannot be at %s', async (url) => {
    await expect(resolveAddress(contextOf({ data: dir, url }))).rejects.toThrow(
      /--url must be an http or https URL/,
    );
  });

  test('with a damaged announcement is a clear error', async () => {
    await writeFile(path.join(dir, 'dispatcher.json'), '{"url":');
    await expect(resolveAddress(contextOf({ data: dir }))).rejects.toThrow(/dispatcher\.json is damaged/);
  });

  test('takes back only its own announcement', async () => {
    await announceDispatcher(dir, LOCAL);
    await withdrawDispatcher(dir, LOCAL.pid + 1);
    expect(await readDispatcherFile(dir)).not.toBeNull();
    await withdrawDispatcher(dir, LOCAL.pid);
    expect(await readDispatcherFile(dir)).toBeNull();
  });
});
