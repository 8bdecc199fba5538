/**
 * W7: artifacts over HTTP beside `cp` and `sha256sum` of the same bytes on the same disk in the same run.
 *
 * Large: one file of 256 MiB goes up as a stream, is hashed and synced before it is acknowledged, and comes down into another
 * file, compared with its digest on the way. Small: 10,000 of 4 KiB, many in one request as `uploadItems` sends them, durable when
 * acknowledged, then down in requests of as many and each compared; and, because not everybody has them all at once, up and down by
 * a request for each. The limit is the slower of copying and hashing: what these bytes cost when nobody is in
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
/** Requests under way at once, where each small one has its own. */
const IN_FLIGHT = 16;
/** Small ones of one download, and such downloads at once. */
const BATCH = 256;
const BATCHES_IN_FLIGHT = 2;
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
    const { together, single } = await measureSmall(dispatcher, folder);
    const rate = (seconds: readonly number[]): string => `${Math.round(LARGE_MIB / median(seconds))} MiB/s`;
    const each = (seconds: readonly number[]): string =>
      `${Math.round(SMALL_COUNT / median(seconds)).toLocaleString('en-US')}/s`;
    return {
      title: `W7: artifacts over HTTP, SHA-256 both ways, beside cp and sha256sum`,
      lines: [
        ...linesOf(`${LARGE_MIB} MiB, median of ${ROUNDS}`, large, rate),
        ...linesOf(
          `${SMALL_COUNT.toLocaleString('en-US')} of ${SMALL_BYTES} bytes, ${BATCH} in a request, once`,
          together,
          each,
        ),
        ...linesOf(`the same, a request for each, ${IN_FLIGHT} at a time`, single, each),
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

async function measureSmall(
  { client }: BenchDispatcher,
  folder: string,
): Promise<{ readonly together: Times; readonly single: Times }> {
  const { domainId } = await client.health();
  const source = path.join(folder, 'small');
  await mkdir(source);
  /** Other bytes each time: equal ones are stored once. */
  const makeItems = (): SmallItem[] =>
    Array.from({ length: SMALL_COUNT }, () => {
      const bytes = randomFillSync(Buffer.alloc(SMALL_BYTES));
      return { bytes, digest: createHash('sha256').update(bytes).digest('hex'), id: '' };
    });
  const check = async (body: AsyncIterable<Uint8Array>, item: SmallItem | undefined): Promise<void> => {
    const hash = createHash('sha256');
    for await (const chunk of body) hash.update(chunk);
    if (hash.digest('hex') !== item?.digest) throw new Error('other bytes came down');
  };

  const together = makeItems();
  const togetherUp = await secondsOf(async () => {
    const ids = await client.uploadItems(
      together.map(({ bytes }, index) => ({ name: `together-${index}`, dataType: 'binary', bytes })),
    );
    ids.forEach((id, index) => (together[index]!.id = id));
  });
  const batches = Array.from({ length: Math.ceil(SMALL_COUNT / BATCH) }, (_, index) =>
    together.slice(index * BATCH, (index + 1) * BATCH),
  );
  const togetherDown = await secondsOf(() =>
    severalAtOnce(batches, BATCHES_IN_FLIGHT, async (batch) => {
      let next = 0;
      const ids = batch.map(({ id }) => id);
      for await (const { body } of client.storage.download({ domainId, ids }))
        await check(body, batch[next++]);
      if (next !== batch.length) throw new Error(`${next} of ${batch.length} came down`);
    }),
  );

  const single = makeItems();
  const singleUp = await secondsOf(() =>
    severalAtOnce(single, IN_FLIGHT, async (item, index) => {
      item.id = await client.upload(item.bytes, { name: `single-${index}` });
    }),
  );
  const singleDown = await secondsOf(() =>
    severalAtOnce(single, IN_FLIGHT, async (item) => {
      await check((await client.storage.openRaw(domainId, item.id)).body, item);
    }),
  );

  for (const [index, { bytes }] of single.entries()) await writeFile(path.join(source, String(index)), bytes);
  const copy = await secondsOf(() => run('cp', '-r', source, `${source}.copy`));
  const durableCopy = await secondsOf(async () => {
    await run('cp', '-r', source, `${source}.durable`);
    await run('sync', ...(await filesIn(`${source}.durable`)));
  });
  const files = await filesIn(source);
  const hash = await secondsOf(() => run('sha256sum', ...files));
  const limits = { copy: [copy], durableCopy: [durableCopy], hash: [hash] };
  return {
    together: { up: [togetherUp], down: [togetherDown], ...limits },
    single: { up: [singleUp], down: [singleDown], ...limits },
  };
}

interface SmallItem {
  readonly bytes: Buffer;
  readonly digest: string;
  id: string;
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
  limit: number,
  work: (item: T, index: number) => Promise<void>,
): Promise<void> {
  let next = 0;
  await Promise.all(
    Array.from({ length: limit }, async () => {
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
