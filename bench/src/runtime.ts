/**
 * The boundary of a Golem runtime: a supervisor in this process, a runtime of the SDK in another. Output beside a raw pipe between
 * two processes, start-up beside an empty module, measured in the same run.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { RuntimeSupervisor, testRuntime } from '@millrace/runtime/supervisor';
import { ms, perSecond, percentile, type Figure } from './fixtures.ts';

const PROBE = new URL('./runtimes/probe.js', import.meta.url).href;
const RAW_OUTPUT = fileURLToPath(new URL('./runtimes/raw-output.js', import.meta.url));
const WARM_UP = 500;
const ROUND_TRIPS = 3_000;
const EVENTS = 200_000;
const OUTPUT_BYTES = 256 * 1024 * 1024;
const OUTPUT_ROUNDS = 3;
const STARTS = 15;

export async function runtime(): Promise<Figure> {
  const dir = await mkdtemp(path.join(tmpdir(), 'millrace-bench-'));
  try {
    const program = path.join(dir, 'probe.mjs');
    await writeFile(program, `#!${process.execPath}\nimport '${PROBE}';\n`, { mode: 0o755 });
    const empty = path.join(dir, 'empty.mjs');
    await writeFile(empty, `#!${process.execPath}\n`, { mode: 0o755 });
    let events = 0;
    await using supervisor = new RuntimeSupervisor({
      runtime: program,
      workDir: path.join(dir, 'work'),
      limits: { outputBytes: 2 * OUTPUT_BYTES },
      onEvent: () => {
        events += 1;
      },
    });
    await supervisor.deploy();
    await supervisor.start();

    const answers: number[] = [];
    const runs: number[] = [];
    for (let index = -WARM_UP; index < ROUND_TRIPS; index += 1) {
      const askedAt = performance.now();
      const command = await supervisor.spawn({ entryPoint: 'none' });
      const answeredAt = performance.now();
      await command.result;
      if (index < 0) continue;
      answers.push(answeredAt - askedAt);
      runs.push(performance.now() - askedAt);
    }

    const eventsFrom = performance.now();
    await supervisor.run({ entryPoint: 'events', args: [String(EVENTS)] });
    const eventsPerSecond = (events / (performance.now() - eventsFrom)) * 1000;

    // In turns, so that whatever else the machine does meets both.
    const throughRuntime: number[] = [];
    const throughPipe: number[] = [];
    for (let round = 0; round < OUTPUT_ROUNDS; round += 1) {
      throughRuntime.push(
        await megabytesPerSecond(async () => {
          const result = await supervisor.run({ entryPoint: 'output', args: [String(OUTPUT_BYTES)] });
          return result.stdout.totalBytes;
        }),
      );
      throughPipe.push(await megabytesPerSecond(rawPipe));
    }
    const [output, pipe] = [percentile(throughRuntime, 0.5), percentile(throughPipe, 0.5)];

    const runtimeStarts: number[] = [];
    const nodeStarts: number[] = [];
    for (let index = 0; index < STARTS; index += 1) {
      runtimeStarts.push((await testRuntime({ runtimePath: program })).durationMs);
      nodeStarts.push((await testRuntime({ runtimePath: empty })).durationMs);
    }
    const [started, bare] = [percentile(runtimeStarts, 0.5), percentile(nodeStarts, 0.5)];

    return {
      title: 'Golem runtimes: supervisor and SDK, one process each',
      lines: [
        `request round trip: p50 ${ms(percentile(answers, 0.5))}, p99 ${ms(percentile(answers, 0.99))} (aim: p50 under 0.3 ms); a whole empty command p50 ${ms(percentile(runs, 0.5))}`,
        `events: ${perSecond(eventsPerSecond)}`,
        `command output: ${Math.round(output)} MB/s, a raw pipe ${Math.round(pipe)} MB/s (ratio ${(output / pipe).toFixed(2)}, aim: 0.5)`,
        `start-up: the self-test of a ten-line runtime ${ms(started)}, an empty module ${ms(bare)} (over it: ${ms(started - bare)})`,
      ],
    };
  } finally {
    await rm(dir, { recursive: true, force: true });
  }
}

async function megabytesPerSecond(transfer: () => Promise<number>): Promise<number> {
  const from = performance.now();
  const bytes = await transfer();
  return bytes / 1000 / (performance.now() - from);
}

async function rawPipe(): Promise<number> {
  const child = spawn(process.execPath, [RAW_OUTPUT, String(OUTPUT_BYTES)], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  let bytes = 0;
  child.stdout.on('data', (chunk: Buffer) => {
    bytes += chunk.length;
  });
  await once(child, 'close');
  return bytes;
}
