/**
 * W7: artifacts over HTTP beside `cp` and `sha256sum` of the same bytes on the same disk in the same run.
 *
 * Large: one file of 256 MiB goes up as a stream, is hashed and synced before it is acknowledged, and comes down into another
 * file, compared with its digest on the way. Small: 10,000 of 4 KiB, several at a time, each durable when acknowledged, then
 * each down and compared. The limit is the slower of copying and hashing: what these bytes cost when nobody is in
 * between. `cp` alone leaves them in the page cache, as the download does; followed by `sync` they are durable, as
 * after the upload.
 */
import { spawn } from 'node:child_process';
import { createHash, randomFillSync } from 'node:crypto';
import { once } from 'node:events';
import { createReadStream, createWriteStream } from 'node:fs';
import { mkdir, mkdtemp, open, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pipeline } from 'node:stream/promises';
import { startDispatcher, times, type BenchDispatcher, type Figure } from './fixtures.ts';
import { median } from './store-throughput.ts';

const MIB = 1024 * 1024;
const LARGE_MIB = 256;
const SMALL_COUNT = 10_000;
const SMALL_BYTES = 4096;
/** Requests under way at once, for the small ones. */
const IN_FLIGHT = 16;
const ROUNDS = 3;

/** Seconds of each round. */
interface Times {
  readonly up: number[];
  readonly down: number[];
  readonly copy: number[];
  readonly durableCopy: number[];
  readonly hash: number[];
}

export async function artifacts(): Promise<Figure> {
  const folder = await mkdtemp(path.join(tmpdir(), 'millrace-bench-'));
  try {
    await using dispatcher = await startDispatcher();
    const large = await measureLarge(dispatcher, folder);
    const small = await measureSmall(dispatcher, folder);
    const rate = (seconds: readonly number[]): string => `${Math.round(LARGE_MIB / median(seconds))} MiB/s`;
    const each = (seconds: readonly number[]): string =>
      `${Math.round(SMALL_COUNT / median(seconds)).toLocaleString('en-US')}/s`;
    return {
      title: `W7: artifacts over HTTP, SHA-256 both ways, beside cp and sha256sum`,
      lines: [
        ...linesOf(`${LARGE_MIB} MiB, median of ${ROUNDS}`, large, rate),
        ...linesOf(
          `${SMALL_COUNT.toLocaleString('en-US')} of ${SMALL_BYTES} bytes, ${IN_FLIGHT} at a time, once`,
          small,
          each,
        ),
      ],
    };
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

function linesOf(title: string, all: Times, figure: (seconds: readonly number[]) => string): string[] {
  /** Ours as a share of the slower limit, median of the rounds' own. */
  const share = (ours: readonly number[], ...limits: readonly (readonly number[])[]): string =>
    times(
      median(
        ours.map(
          (seconds, round) => Math.max(...limits.map((limit) => limit[round] ?? Number.NaN)) / seconds,
        ),
      ),
      1,
    );
  return [
    `${title}: cp ${figure(all.copy)}, cp and sync ${figure(all.durableCopy)}, sha256sum ${figure(all.hash)}`,
    `  up, durable    ${figure(all.up).padStart(12)}   ${share(all.up, all.durableCopy, all.hash)} of the slower of cp with sync and sha256sum (aim: 0.50×)`,
    `  down, verified ${figure(all.down).padStart(12)}   ${share(all.down, all.copy, all.hash)} of the slower of cp and sha256sum (aim: 0.50×)`,
  ];
}

async function measureLarge({ client }: BenchDispatcher, folder: string): Promise<Times> {
  const { domainId } = await client.health();
  const source = path.join(folder, 'large');
  const all: Times = { up: [], down: [], copy: [], durableCopy: [], hash: [] };
  for (let round = 0; round < ROUNDS; round += 1) {
    // Other bytes each time: equal ones are stored once.
    const digest = await writeRandom(source, LARGE_MIB);
    let id = '';
    all.up.push(
      await secondsOf(async () => {
        id = await client.upload(createReadStream(source, { highWaterMark: MIB }), {
          name: `large-${round}`,
        });
      }),
    );
    all.down.push(
      await secondsOf(async () => {
        const { body } = await client.storage.openRaw(domainId, id);
        const hash = createHash('sha256');
        await pipeline(
          body,
          async function* hashed(chunks: AsyncIterable<Uint8Array>) {
            for await (const chunk of chunks) {
              hash.update(chunk);
              yield chunk;
            }
          },
          createWriteStream(`${source}.down`),
        );
        if (hash.digest('hex') !== digest) throw new Error('other bytes came down');
      }),
    );
    all.copy.push(await secondsOf(() => run('cp', source, `${source}.copy`)));
    all.durableCopy.push(
      await secondsOf(async () => {
        await run('cp', source, `${source}.durable`);
        await run('sync', `${source}.durable`);
      }),
    );
    all.hash.push(await secondsOf(() => run('sha256sum', source)));
    for (const name of ['down', 'copy', 'durable']) await rm(`${source}.${name}`);
  }
  await rm(source);
  return all;
}

async function measureSmall({ client }: BenchDispatcher, folder: string): Promise<Times> {
  const { domainId } = await client.health();
  const source = path.join(folder, 'small');
  await mkdir(source);
  const items: { readonly bytes: Buffer; readonly digest: string; id: string }[] = [];
  for (let index = 0; index < SMALL_COUNT; index += 1) {
    const bytes = randomFillSync(Buffer.alloc(SMALL_BYTES));
    items.push({ bytes, digest: createHash('sha256').update(bytes).digest('hex'), id: '' });
    await writeFile(path.join(source, String(index)), bytes);
  }
  const up = await secondsOf(() =>
    severalAtOnce(items, async (item, index) => {
      item.id = await client.upload(item.bytes, { name: `small-${index}` });
    }),
  );
  const down = await secondsOf(() =>
    severalAtOnce(items, async ({ id, digest }) => {
      const { body } = await client.storage.openRaw(domainId, id);
      const hash = createHash('sha256');
      for await (const chunk of body) hash.update(chunk as Uint8Array);
      if (hash.digest('hex') !== digest) throw new Error('other bytes came down');
    }),
  );
  const copy = await secondsOf(() => run('cp', '-r', source, `${source}.copy`));
  const durableCopy = await secondsOf(async () => {
    await run('cp', '-r', source, `${source}.durable`);
    await run('sync', ...(await filesIn(`${source}.durable`)));
  });
  const files = await filesIn(source);
  const hash = await secondsOf(() => run('sha256sum', ...files));
  return { up: [up], down: [down], copy: [copy], durableCopy: [durableCopy], hash: [hash] };
}

async function filesIn(folder: string): Promise<string[]> {
  return (await readdir(folder)).map((name) => path.join(folder, name));
}

/** Returns the digest. */
async function writeRandom(file: string, mib: number): Promise<string> {
  const hash = createHash('sha256');
  await using handle = await open(file, 'w');
  const block = Buffer.alloc(MIB);
  for (let written = 0; written < mib; written += 1) {
    randomFillSync(block);
    hash.update(block);
    await handle.write(block);
  }
  // What is measured must not wait for these.
  await handle.sync();
  return hash.digest('hex');
}

async function severalAtOnce<T>(
  items: readonly T[],
  work: (item: T, index: number) => Promise<void>,
): Promise<void> {
  let next = 0;
  await Promise.all(
    Array.from({ length: IN_FLIGHT }, async () => {
      for (let index = next++; index < items.length; index = next++) {
        const item = items[index];
        if (item !== undefined) await work(item, index);
      }
    }),
  );
}

async function secondsOf(work: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await work();
  return (performance.now() - start) / 1000;
}

async function run(program: string, ...args: readonly string[]): Promise<void> {
  const child = spawn(program, args, { stdio: ['ignore', 'ignore', 'inherit'] });
  const [code] = (await once(child, 'exit')) as [number | null];
  if (code !== 0) throw new Error(`${program} ended with ${code}`);
}
