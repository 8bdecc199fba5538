import { execFileSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { systemClock } from '@millrace/runner';
import {
  fail,
  needsCgroup,
  needsTier,
  nodeProgram,
  report,
  shell,
  succeed,
} from '../subprocess/programs.test.support.ts';
import { TaskCgroup, findCgroupParent, type CgroupParent } from './cgroup.ts';
import { probeSandbox } from './probe.ts';

const MIB = 1024 ** 2;

describe('the report of this machine', () => {
  test('has every tier, each available with controls or not with a reason', () => {
    expect(report.tiers.map(({ tier }) => tier)).toEqual(['none', 'limits', 'namespaces', 'bwrap']);
    for (const { available, reason, controls } of report.tiers) {
      expect(reason === null).toBe(available);
      expect(Object.keys(controls).length > 0).toBe(available);
    }
    expect(report.tiers.find(({ tier }) => tier === report.best)?.available).toBe(true);
  });

  test('bwrap is there, with all that it is for', (context) => {
    needsTier(context, 'bwrap');
    const bwrap = report.tiers.find(({ tier }) => tier === 'bwrap');
    expect(bwrap?.controls).toMatchObject({
      open_files: 'rlimit',
      kill: 'pid namespace',
      network: 'network namespace',
      filesystem: 'mount namespace',
      privileges: 'no new privileges',
    });
    expect(report.best).toBe('bwrap');
  });

  test('a control group that is not there is no control', async () => {
    const { cgroup } = await probeSandbox({ cgroupParent: '/no/such/group' });
    expect(cgroup).toMatchObject({ available: false, version: null, controls: {} });
    expect(cgroup.reason).toContain('/no/such/group');
  });
});

describe('a control group', () => {
  function parent(): CgroupParent {
    const found = findCgroupParent();
    if ('reason' in found) throw new Error(found.reason);
    return found;
  }

  test('ends a program whose memory goes past the limit, and says so', async (context) => {
    needsCgroup(context, 'memory');
    const text = 'const kept = []; for (;;) kept.push(Buffer.alloc(4 * 1024 * 1024, 1));';
    const { error, usage } = await fail(
      nodeProgram(text, {
        sandbox: { tier: 'limits', cgroup: 'require' },
        limits: { memoryBytes: 200 * MIB },
      }),
    );
    expect(error).toMatchObject({
      code: 'resource_exhausted',
      details: { ending: 'out_of_memory', limit: 'memoryBytes', evidence: 'cgroup' },
    });
    expect(usage['peak_memory_bytes']).toBeGreaterThan(100 * MIB);
    expect(usage['peak_memory_bytes']).toBeLessThanOrEqual(200 * MIB);
  });

  test('refuses more processes than the limit, which the error says', async (context) => {
    needsCgroup(context, 'processes');
    const forks = (count: number): string =>
      `i=0; while [ $i -lt ${count} ]; do sleep 0.2 & i=$((i+1)); done; wait`;
    const options = { sandbox: { tier: 'limits', cgroup: 'require' }, limits: { processes: 8 } } as const;
    await succeed(shell(forks(7), options));
    const { error } = await fail(shell(forks(8), options));
    expect(error.details).toMatchObject({ ending: 'exit', limit: 'processes', value: 8 });
    expect(error.message).toContain('(it was refused more than 8 processes)');
  });

  test('is gone when the task has ended', async (context) => {
    needsCgroup(context, 'processes');
    await succeed(shell('sleep 5 & true', { sandbox: { tier: 'limits', cgroup: 'require' } }));
    const found = parent();
    const dirs = found.version === 2 ? [found.dir] : [...found.dirs.values()];
    expect(
      dirs.flatMap((dir) => readdirSync(dir)).filter((name) => name.startsWith(`millrace-${process.pid}-`)),
    ).toEqual([]);
  });

  test('of version 2 kills everything at once, sessions of their own included', async (context) => {
    const mount = '/sys/fs/cgroup/unified';
    if (!existsSync(join(mount, 'cgroup.procs')) || process.getuid?.() !== 0) {
      context.skip('no version 2 hierarchy beside version 1 that this user may write to');
      return;
    }
    const found = findCgroupParent(mount);
    if ('reason' in found || found.version !== 2) {
      context.skip(`no version 2 group can be made: ${'reason' in found ? found.reason : 'version 1'}`);
      return;
    }
    const group = TaskCgroup.create(found, 'test', { memoryBytes: 256 * MIB, processes: 64 });
    const [dir] = group.dirs() as [string];
    execFileSync('sh', [
      '-c',
      `echo 0 > ${dir}/cgroup.procs; setsid sleep 30 </dev/null >/dev/null 2>&1 & sleep 30 </dev/null >/dev/null 2>&1 & :`,
    ]);
    await group.kill(systemClock);
    expect(group.usage().cpuMs).not.toBeNull();
    await group.remove(systemClock);
    expect(existsSync(dir)).toBe(false);
  });
});
