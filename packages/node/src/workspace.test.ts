import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, rm, stat, symlink, utimes, writeFile } from 'node:fs/promises';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { systemClock } from '@millrace/runner';
import { memoryLog } from './simulation/scripted-dms.ts';
import { openWorkspace, type Workspace } from './workspace.ts';

let base: string;
beforeEach(async () => {
  base = await mkdtemp(join(tmpdir(), 'millrace-workspace-'));
});
afterEach(async () => {
  await rm(base, { recursive: true, force: true });
});

const open = (workDir = base): Promise<Workspace> =>
  openWorkspace({ workDir, clock: systemClock, log: memoryLog() });

const nodeFolder = (): string => join(base, `node-${crypto.randomUUID()}`);

async function leftOver(owner: unknown, ageMs = 0): Promise<string> {
  const path = nodeFolder();
  await mkdir(join(path, '1-task'), { recursive: true });
  await writeFile(join(path, '1-task', 'half.bin'), 'half');
  if (owner !== undefined) await writeFile(join(path, 'owner.json'), JSON.stringify(owner));
  const at = new Date(Date.now() - ageMs);
  await utimes(path, at, at);
  return path;
}

describe('a task folder', () => {
  test('is made when it is asked for, private, and removed with everything in it', async () => {
    await using workspace = await open();
    const folder = workspace.taskFolder('task');
    expect(existsSync(folder.path)).toBe(false);
    expect(await Promise.all([folder.create(), folder.create()])).toEqual([folder.path, folder.path]);
    expect((await stat(folder.path)).mode & 0o777).toBe(0o700);
    expect((await stat(workspace.root)).mode & 0o777).toBe(0o700);
    await mkdir(join(folder.path, 'a', 'b'), { recursive: true });
    await writeFile(join(folder.path, 'a', 'b', 'c'), 'c');
    await folder.remove();
    expect(existsSync(folder.path)).toBe(false);
    await folder.remove();
  });

  test('is another one for every attempt of a task', async () => {
    await using workspace = await open();
    const [first, second] = [workspace.taskFolder('task'), workspace.taskFolder('task')];
    expect(first.path).not.toBe(second.path);
    await Promise.all([first.create(), second.create()]);
    await first.remove();
    expect(existsSync(second.path)).toBe(true);
  });

  test('removed while it is being made is gone', async () => {
    await using workspace = await open();
    const folder = workspace.taskFolder('task');
    const creating = folder.create();
    await folder.remove();
    await creating;
    expect(existsSync(folder.path)).toBe(false);
  });

  test('that is a way out of the work folder does not lead to what is outside', async () => {
    const outside = join(base, 'outside');
    await mkdir(outside);
    await writeFile(join(outside, 'keep'), 'keep');
    await using workspace = await open(join(base, 'work'));
    const folder = workspace.taskFolder('task');
    await symlink(outside, join(await folder.create(), 'link'));
    await folder.remove();
    expect(existsSync(join(outside, 'keep'))).toBe(true);
  });
});

describe('sweeping', () => {
  test('removes what a process that no longer lives left behind', async () => {
    const child = spawn(process.execPath, ['-e', ''], { stdio: 'ignore' });
    await once(child, 'exit');
    const path = await leftOver({ host: hostname(), pid: child.pid, started: null });
    await using workspace = await open();
    expect(existsSync(path)).toBe(false);
    expect(existsSync(workspace.root)).toBe(true);
  });

  test.runIf(process.platform === 'linux')('tells a process from a later one with the same id', async () => {
    const path = await leftOver({ host: hostname(), pid: process.pid, started: '1' });
    await using _ = await open();
    expect(existsSync(path)).toBe(false);
  });

  test('leaves the folders of living nodes alone, in this process and in others', async () => {
    await using first = await open();
    const folder = first.taskFolder('task');
    await folder.create();
    await using second = await open();
    expect(existsSync(folder.path)).toBe(true);
    expect((await readdir(base)).toSorted()).toEqual(
      [first.root, second.root].map((path) => path.slice(base.length + 1)).toSorted(),
    );
  });

  test('of another host believes the folder is in use for an hour after it was touched', async () => {
    const fresh = await leftOver({ host: 'elsewhere', pid: 1, started: null }, 59 * 60_000);
    const old = await leftOver({ host: 'elsewhere', pid: 1, started: null }, 61 * 60_000);
    const nameless = await leftOver(undefined, 59 * 60_000);
    const garbled = await leftOver('?', 61 * 60_000);
    await using _ = await open();
    expect([fresh, old, nameless, garbled].map((path) => existsSync(path))).toEqual([
      true,
      false,
      true,
      false,
    ]);
  });

  test('never removes what has no name of ours', async () => {
    const names = ['node-1', 'node_modules', 'node-00000000', 'data', `node-${'0'.repeat(36)}`];
    for (const name of names) await mkdir(join(base, name));
    await writeFile(nodeFolder(), 'a file');
    await using _ = await open();
    for (const name of names) expect(existsSync(join(base, name))).toBe(true);
    expect(await readdir(base)).toHaveLength(names.length + 2);
  });
});

describe('the work folder', () => {
  test('is made with its parents, and only the own part of it is removed at the end', async () => {
    const workDir = join(base, 'a', 'b');
    const workspace = await open(workDir);
    await workspace.taskFolder('task').create();
    await Promise.all([workspace.close(), workspace.close()]);
    await workspace.close();
    expect(await readdir(workDir)).toEqual([]);
  });

  test('that is a file is refused with a word about what to do', async () => {
    await writeFile(join(base, 'file'), '');
    await expect(open(join(base, 'file'))).rejects.toMatchObject({
      code: 'failed_precondition',
      message: expect.stringContaining('choose another work folder'),
    });
  });

  test.runIf(process.getuid?.() !== 0)('that cannot be written is refused', async () => {
    const workDir = join(base, 'locked');
    await mkdir(workDir, { mode: 0o500 });
    await expect(open(workDir)).rejects.toMatchObject({ code: 'permission_denied' });
  });

  test.runIf(process.getuid?.() === 0)(
    'of another user is not used by root, who could be tricked',
    async () => {
      const { chown } = await import('node:fs/promises');
      const workDir = join(base, 'theirs');
      await mkdir(workDir);
      await chown(workDir, 12_345, 12_345);
      await expect(open(workDir)).rejects.toMatchObject({
        code: 'permission_denied',
        message: expect.stringContaining('12345'),
      });
    },
  );
});
