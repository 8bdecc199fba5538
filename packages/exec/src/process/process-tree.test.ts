import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { describe, expect, test } from 'vitest';
import { systemClock } from '@millrace/runner';
import { processesWith, sleepToken, until } from '../subprocess/programs.test.support.ts';
import { childrenOf, readLiving, readMemory, readStat, wasStartedWith } from './proc.ts';
import { ProcessTree } from './process-tree.ts';

/** `sh -c TEXT`, in a group of its own, marked. */
function start(text: string, marker: string): { readonly child: ChildProcess; readonly tree: ProcessTree } {
  const child = spawn('sh', ['-c', text], {
    detached: true,
    stdio: 'ignore',
    env: { PATH: process.env['PATH'], RUN: marker },
  });
  return { child, tree: new ProcessTree({ pid: child.pid!, marker: `RUN=${marker}`, clock: systemClock }) };
}

describe('what is read of a process', () => {
  test('its name may hold anything', async () => {
    const token = sleepToken();
    // The kernel takes the name of a process from what it was started as.
    const child = spawn('bash', ['-c', `exec -a ') Z 1 (' sleep ${token}`], { stdio: 'ignore' });
    await until('it to run', () => processesWith(token).length === 1);
    const stat = readStat(child.pid!);
    expect(stat).toMatchObject({ pid: child.pid, parent: process.pid });
    expect(['S', 'R', 'D']).toContain(stat?.state);
    expect(readMemory(child.pid!)?.residentBytes).toBeGreaterThan(0);
    expect(childrenOf(process.pid)).toContain(child.pid);
    child.kill('SIGKILL');
    await once(child, 'exit');
    expect(readStat(child.pid!)).toBeNull();
    expect(readMemory(child.pid!)).toBeNull();
    expect(readLiving(stat!)).toBeNull();
    expect(wasStartedWith(child.pid!, 'A=1')).toBe(false);
  });

  test('a pid that is used again is another process', () => {
    const self = readStat('self')!;
    expect(readLiving(self)).toMatchObject({ pid: process.pid });
    expect(readLiving({ pid: self.pid, started: String(BigInt(self.started) + 1n) })).toBeNull();
  });
});

describe('a tree of processes', () => {
  test('holds the orphan of a program with many threads that is killed before the orphan was ever seen', async () => {
    // Its threads end one after the other, so this is a matter of chance.
    for (let round = 0; round < 8; round += 1) {
      const token = sleepToken();
      const script = `require('node:child_process').spawn('sleep', ['${token}'], { detached: true }); setInterval(() => {}, 1000)`;
      const child = spawn(process.execPath, ['-e', script], {
        detached: true,
        stdio: 'ignore',
        env: { RUN: token },
      });
      const tree = new ProcessTree({ pid: child.pid!, marker: `RUN=${token}`, clock: systemClock });
      await until('the orphan to be', () => processesWith(token).some((pid) => pid !== child.pid));
      const exited = once(child, 'exit');
      child.kill('SIGKILL');
      await tree.kill();
      await exited;
      expect(processesWith(token)).toEqual([]);
    }
  });

  test('holds children in sessions of their own, and orphans that were seen or carry the mark', async () => {
    const token = sleepToken();
    const { child, tree } = start(
      `setsid sleep ${token} & (setsid sh -c "sleep ${token} & sleep ${token}; :" &); sleep ${token}; :`,
      token,
    );
    await until('all of them to run', () => processesWith(token).length === 4);
    const pids = tree.membersAndOrphans().map(({ pid }) => pid);
    expect(pids).toEqual(expect.arrayContaining([child.pid, ...processesWith(token)]));
    const exited = once(child, 'exit');
    await tree.kill();
    await exited;
    expect(processesWith(token)).toEqual([]);
    expect(tree.membersAndOrphans()).toEqual([]);
    await tree.kill();
  });

  test('an orphan without the mark that was seen before its parent ended is still known', async () => {
    const token = sleepToken();
    const above = sleepToken();
    const { child, tree } = start(
      `env -i /bin/sh -c "setsid sleep ${token} & exec sleep ${above}" & wait`,
      token,
    );
    const { pid } = child;
    await until('it to be seen', () =>
      tree.members().some((member) => processesWith(token).includes(member.pid)),
    );
    const exited = once(child, 'exit');
    for (const parent of [pid!, ...processesWith(above)]) process.kill(parent, 'SIGKILL');
    await exited;
    expect(processesWith(token)).toHaveLength(1);
    await tree.kill();
    expect(processesWith(token)).toEqual([]);
  });

  test('another program’s processes are left alone', async () => {
    const mine = sleepToken();
    const other = sleepToken();
    const bystander = start(`sleep ${other}; :`, other);
    const { child, tree } = start(`sleep ${mine}; :`, mine);
    await until('both to run', () => processesWith(mine).length + processesWith(other).length === 2);
    const exited = once(child, 'exit');
    await tree.kill();
    await exited;
    expect(processesWith(other)).toHaveLength(1);
    await bystander.tree.kill();
  });
});
