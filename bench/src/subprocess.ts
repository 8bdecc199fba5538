/**
 * What tasks cost that run programs. Time: beyond running that program, a bare spawn of the same no-op in the same run is the
 * limit; through the runner, with a context that keeps everything in memory, so that neither network nor dispatcher counts. Memory: of a
 * whole node, in a process of its own, with many of them running.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { probeSandbox, subprocess, type SandboxTier, type SubprocessRunner } from '@millrace/exec';
import type { TaskRecord } from '@millrace/dispatch/client';
import { createTestContext } from '@millrace/runner/testing';
import { addNode, ms, percentile, residentMiB, startDispatcher, startNode, type Figure } from './fixtures.ts';

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

const RUNNING = 200;
const SETTLE_MS = 3_000;
const ARRIVE_MS = 180_000;
/** Says that it runs, and does nothing for as long as it is let. */
const IDLE = `echo '{"progress": 1}' >&3; exec sleep 3600`;

/** Resident memory of a node with {@link RUNNING} programs running, in the plainest and in the best tier. */
export async function subprocessMemory(): Promise<Figure> {
  const { best } = await probeSandbox();
  const tiers: readonly SandboxTier[] = best === 'none' ? ['none'] : ['none', best];
  const lines: string[] = [];
  for (const tier of tiers) {
    const { idleMiB, runningMiB, afterMiB } = await residentWith(tier);
    lines.push(
      `tier ${tier}: ${runningMiB.toFixed(1)} MiB with ${RUNNING} running, ${idleMiB.toFixed(1)} MiB before, ${afterMiB.toFixed(1)} MiB when they are gone; ` +
        `${(((runningMiB - idleMiB) * 1024) / RUNNING).toFixed(0)} KiB each`,
    );
  }
  return { title: `Resident memory of a node with ${RUNNING} subprocess tasks`, lines };
}

async function residentWith(
  tier: SandboxTier,
): Promise<{ readonly idleMiB: number; readonly runningMiB: number; readonly afterMiB: number }> {
  const folder = await mkdtemp(path.join(tmpdir(), 'millrace-bench-config-'));
  try {
    const config = path.join(folder, 'millrace.config.mjs');
    await writeFile(
      config,
      `import { subprocess } from '@millrace/exec';
       export default { runners: [subprocess({
         capability: '/bench/idle/v1', command: 'sh', args: ['-c', ${JSON.stringify(IDLE)}],
         sandbox: { tier: '${tier}' }, limits: { graceMs: 0 },
       })] };`,
    );
    await using dispatcher = await startDispatcher();
    const { client } = dispatcher;
    const credentials = await addNode(client, 'bench');
    await using node = await startNode(dispatcher, credentials, { config, maxConcurrency: RUNNING });
    const settled = async (): Promise<number> => {
      await new Promise((resolve) => void setTimeout(resolve, SETTLE_MS));
      return await residentMiB(node.pid);
    };
    const idleMiB = await settled();
    const jobId = await client.submit({
      label: 'idle',
      tasks: Array.from({ length: RUNNING }, (_, index) => ({
        label: `${index}`,
        capability: '/bench/idle/v1',
      })),
    });
    const count = async (hasArrived: (task: TaskRecord) => boolean): Promise<number> =>
      (await client.job(jobId)).tasks.filter(hasArrived).length;
    await every(() => count(({ meta }) => typeof meta === 'object' && meta !== null && 'progress' in meta));
    const runningMiB = await settled();
    await client.cancel(jobId);
    await every(() => count(({ status }) => status === 'canceled'));
    return { idleMiB, runningMiB, afterMiB: await settled() };
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

/** Resolves when all of them have come so far. @throws when they take minutes, or never will */
async function every(count: () => Promise<number>): Promise<void> {
  const deadline = AbortSignal.timeout(ARRIVE_MS);
  while ((await count()) < RUNNING) {
    deadline.throwIfAborted();
    await new Promise((resolve) => void setTimeout(resolve, 100));
  }
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
