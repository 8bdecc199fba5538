/** A gibibyte in and out of a task leaves the memory of node and dispatcher where it was. */
import { createHash, randomBytes } from 'node:crypto';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import type { Requestor } from '@millrace/dispatch/client';
import {
  closing,
  nodeCredentials,
  requestor,
  startDispatcher,
  startNode,
  temporaryFolder,
  type Program,
} from './system.ts';

const COPY = fileURLToPath(new URL('./runners/copy.js', import.meta.url));
const MIB = 1024 * 1024;

/** `size` bytes that do not repeat, and their digest as they pass. */
function bytesOf(size: number): { stream: AsyncIterable<Uint8Array>; digest(): string } {
  const block = randomBytes(MIB);
  const hash = createHash('sha256');
  async function* stream(): AsyncGenerator<Uint8Array> {
    for (let sent = 0; sent < size; sent += block.length) {
      block.writeDoubleBE(sent, 0);
      const chunk = Buffer.from(block.subarray(0, Math.min(block.length, size - sent)));
      hash.update(chunk);
      yield chunk;
    }
  }
  return { stream: stream(), digest: () => hash.digest('hex') };
}

/** Sends `size` bytes through a task and checks that the same ones come out. */
async function throughATask(client: Requestor, name: string, size: number): Promise<void> {
  const bytes = bytesOf(size);
  const cid = await client.upload(bytes.stream, { name });
  const id = await client.submit({
    tasks: [{ capability: '/test/copy/v1', inputs_cids: [cid], max_attempts: 1 }],
  });
  for await (const event of client.events(id)) void event;
  const { job, tasks } = await client.job(id);
  expect(job.status, tasks[0]?.reason ?? '').toBe('completed');
  const hash = createHash('sha256');
  const { body } = await client.storage.openRaw(job.domain_id, tasks[0]!.output_cids[0]!);
  for await (const chunk of body) hash.update(chunk as Buffer);
  expect(hash.digest('hex')).toBe(bytes.digest());
}

/** The most resident memory a program had while `work` ran, sampled. */
async function peakWhile(programs: readonly Program[], work: Promise<void>): Promise<number[]> {
  const peaks = programs.map(() => 0);
  const finished = work.then(
    () => true,
    () => true,
  );
  const pause = (): Promise<false> => new Promise((resolve) => setTimeout(resolve, 50, false));
  do {
    for (const [index, program] of programs.entries()) {
      peaks[index] = Math.max(peaks[index]!, await program.residentBytes());
    }
  } while (!(await Promise.race([finished, pause()])));
  await work;
  return peaks;
}

test.skipIf(process.platform !== 'linux')(
  '1 GiB through a task grows neither the node nor the dispatcher by 64 MiB',
  { timeout: 300_000 },
  async () => {
    await using folder = await temporaryFolder();
    const dispatcher = await startDispatcher(path.join(folder.path, 'data'));
    await using dispatcherProgram = dispatcher.program;
    await using node = await startNode(dispatcher, await nodeCredentials(dispatcher, 'copier'), [COPY], {
      workDir: path.join(folder.path, 'work'),
    });
    await using client = closing(requestor(dispatcher));
    // Loads and compiles everything on the way once, so that only the bytes differ afterwards.
    await throughATask(client.value, 'warm-up', 32 * MIB);
    const before = [await dispatcherProgram.residentBytes(), await node.residentBytes()];
    const peaks = await peakWhile(
      [dispatcherProgram, node],
      throughATask(client.value, 'gibibyte', 1024 * MIB),
    );
    const growthMib = peaks.map((peak, index) => (peak - before[index]!) / MIB);
    expect(growthMib[0], 'growth of the dispatcher in MiB').toBeLessThan(64);
    expect(growthMib[1], 'growth of the node in MiB').toBeLessThan(64);
  },
);
