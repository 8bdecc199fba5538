/**
 * What a task costs that runs a program, beyond running that program: a bare spawn of the same no-op in the same run is the
 * limit. Through the runner, with a context that keeps everything in memory, so that neither network nor dispatcher counts.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { probeSandbox, subprocess, type SandboxTier, type SubprocessRunner } from '@millrace/exec';
import { createTestContext } from '@millrace/runner/testing';
import { ms, percentile, type Figure } from './fixtures.ts';

const ROUNDS = 100;
const WARM_UP = 5;
const PROGRAM = '/bin/true';

const VARIANTS: readonly {
  readonly name: string;
  readonly tier: SandboxTier;
  readonly cgroup: 'auto' | 'off';
}[] = [
  { name: 'no sandbox', tier: 'none', cgroup: 'off' },
  { name: 'limits', tier: 'limits', cgroup: 'off' },
  { name: 'namespaces', tier: 'namespaces', cgroup: 'off' },
  { name: 'bwrap', tier: 'bwrap', cgroup: 'off' },
  { name: 'bwrap and a control group', tier: 'bwrap', cgroup: 'auto' },
];

/** Overhead of a subprocess task over a bare spawn, by tier. Variants take turns, so that all meet the same noise. */
export async function subprocessOverhead(): Promise<Figure> {
  const report = await probeSandbox();
  const here = VARIANTS.filter(
    ({ tier, cgroup }) =>
      report.tiers.some((entry) => entry.tier === tier && entry.available) &&
      (cgroup === 'off' || report.cgroup.available),
  );
  const runners = here.map(({ name, tier, cgroup }) => ({
    name,
    runner: subprocess({ capability: '/bench/v1', command: PROGRAM, sandbox: { tier, cgroup } }),
    samples: [] as number[],
  }));
  const bare: number[] = [];
  for (let round = -WARM_UP; round < ROUNDS; round += 1) {
    const took = await timed(bareSpawn);
    if (round >= 0) bare.push(took);
    for (const { runner, samples } of runners) {
      const tookTask = await timed(() => runTask(runner));
      if (round >= 0) samples.push(tookTask);
    }
  }
  await Promise.all(runners.map(({ runner }) => runner.close()));

  const best = Math.min(...bare);
  const middle = percentile(bare, 0.5);
  return {
    title: 'Subprocess tasks: overhead over a bare spawn',
    lines: [
      `bare spawn of ${PROGRAM}: least ${ms(best)}, median ${ms(middle)} (${ROUNDS} rounds)`,
      ...runners.map(
        ({ name, samples }) =>
          `${name}: least +${ms(Math.min(...samples) - best)}, median +${ms(percentile(samples, 0.5) - middle)}`,
      ),
    ],
  };
}

async function bareSpawn(): Promise<void> {
  const child = spawn(PROGRAM, [], { stdio: ['ignore', 'pipe', 'pipe'] });
  child.stdout.resume();
  child.stderr.resume();
  await once(child, 'close');
}

async function runTask(runner: SubprocessRunner): Promise<void> {
  await using context = createTestContext();
  await runner.run(context);
}

async function timed(work: () => Promise<void>): Promise<number> {
  const startedAt = performance.now();
  await work();
  return performance.now() - startedAt;
}
