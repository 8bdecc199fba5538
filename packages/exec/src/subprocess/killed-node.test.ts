import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readdir } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { describe, expect, test } from 'vitest';
import { findCgroupParent } from '../sandbox/cgroup.ts';
import type { SandboxTier } from '../sandbox/controls.ts';
import {
  needsCgroup,
  needsControl,
  processesWith,
  shell,
  sleepToken,
  succeed,
  temporaryFolder,
  until,
} from './programs.test.support.ts';

const NODE = fileURLToPath(new URL('./killed-node.test.support.js', import.meta.url));

/** Starts a node that runs a program of four processes, and kills it when they all run. */
async function killNode(
  tier: SandboxTier,
  cgroup: 'auto' | 'off',
  token: string,
  workDir: string,
): Promise<void> {
  const node = spawn(process.execPath, [NODE, tier, cgroup, token, workDir], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  await until('the program and its children', () => processesWith(token).length >= 4);
  node.kill('SIGKILL');
  await once(node, 'exit');
}

describe('when the node itself is killed', () => {
  for (const tier of ['namespaces', 'bwrap'] as const) {
    test(`nothing of a program in tier ${tier} lives on`, async (context) => {
      needsControl(context, tier, 'kill');
      await using folder = await temporaryFolder();
      const token = sleepToken();
      await killNode(tier, 'off', token, folder.path);
      await until('all of them to end', () => processesWith(token).length === 0);
    });
  }

  test('in tier limits the next node ends what lives on, by its control group', async (context) => {
    needsCgroup(context, 'processes');
    await using folder = await temporaryFolder();
    const token = sleepToken();
    await killNode('limits', 'auto', token, folder.path);
    expect(findCgroupParent()).not.toHaveProperty('reason');
    await until('all of them to end', () => processesWith(token).length === 0);
  });

  test('the next node removes the folder of the task', async () => {
    await using folder = await temporaryFolder();
    const token = sleepToken();
    await killNode('none', 'off', token, folder.path);
    for (const pid of processesWith(token)) process.kill(pid, 'SIGKILL');
    expect(await readdir(folder.path)).toHaveLength(1);
    await succeed(shell('true', { sandbox: { tier: 'none' }, workDir: folder.path }));
    expect(await readdir(folder.path)).toEqual([]);
  });
});
