import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { systemClock } from '@millrace/runner';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { ActivityProcesses, within, type GroupProcess } from './activity-processes.ts';

let dir: string;
beforeAll(async () => {
  dir = await mkdtemp(path.join(tmpdir(), 'millrace-activity-'));
});
afterAll(() => rm(dir, { recursive: true, force: true }));

const sh = (activity: ActivityProcesses, text: string): Promise<GroupProcess> =>
  activity.spawn({
    file: '/bin/sh',
    args: ['-c', text],
    cwd: dir,
    env: { PATH: process.env.PATH ?? '' },
    stdio: ['ignore', 'pipe', 'ignore'],
  });

/** What it prints first. */
async function firstLine({ child }: GroupProcess): Promise<string> {
  const [chunk] = (await once(child.stdout!, 'data')) as [Buffer];
  return chunk.toString().trim();
}

function lives(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

/** A zombie whose parent has not looked yet still takes signals. */
async function endsSoon(pid: number): Promise<void> {
  await expect.poll(() => lives(pid) && !isZombie(pid), { timeout: 10_000 }).toBe(false);
}

function isZombie(pid: number): boolean {
  return process.platform === 'linux' && /^State:\s+Z/m.test(statusOf(pid));
}

function statusOf(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/status`, 'latin1');
  } catch {
    return '';
  }
}

describe('the processes of an activity', () => {
  test.runIf(process.platform === 'linux')(
    'what an ended command left in a session of its own ends with the activity',
    async () => {
      const activity = new ActivityProcesses(systemClock);
      const file = path.join(dir, 'pid');
      const command = await sh(
        activity,
        `setsid sh -c 'echo $$ > ${file}.new; mv ${file}.new ${file}; exec sleep 600' & while [ ! -e ${file} ]; do sleep 0.02; done`,
      );
      expect(await command.exited).toEqual({ code: 0, signal: null });
      const left = Number(await readFile(file, 'utf8'));
      expect(lives(left)).toBe(true);
      expect(activity.roots).toEqual([]);
      await activity.end(5_000);
      await endsSoon(left);
    },
  );

  test('are asked first, and killed after the grace', async () => {
    const activity = new ActivityProcesses(systemClock);
    const polite = await sh(activity, `trap 'exit 7' TERM; echo ready; while :; do sleep 0.02; done`);
    const stubborn = await sh(activity, `trap '' TERM; echo ready; while :; do sleep 0.02; done`);
    await Promise.all([firstLine(polite), firstLine(stubborn)]);
    expect(activity.roots).toEqual([polite.pid, stubborn.pid]);
    await activity.end(300);
    expect(await polite.exited).toEqual({ code: 7, signal: null });
    expect(await stubborn.exited).toEqual({ code: null, signal: 'SIGKILL' });
    expect([polite.hasExited, activity.roots]).toEqual([true, []]);
  });

  test('are killed by close, which takes no more', async () => {
    const activity = new ActivityProcesses(systemClock);
    const command = await sh(activity, 'echo ready; exec sleep 600');
    await firstLine(command);
    await activity.close();
    expect((await command.exited).signal).not.toBeNull();
    await expect(sh(activity, 'exit 0')).rejects.toMatchObject({ code: 'canceled' });
    await activity.close();
  });

  test('ending one leaves the others alone', async () => {
    const activity = new ActivityProcesses(systemClock);
    const [one, other] = await Promise.all([
      sh(activity, 'echo a; exec sleep 600'),
      sh(activity, 'echo b; exec sleep 600'),
    ]);
    await Promise.all([firstLine(one), firstLine(other)]);
    await one.end(5_000);
    expect(await within(systemClock, other.exited, 50)).toBe(false);
    await activity.close();
  });
});
