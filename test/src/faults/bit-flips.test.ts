/**
 * Bits that fell over in stored bytes, in small blobs and large ones, at the beginning, in the middle and at the end. Whoever
 * reads hears which item it is instead of getting wrong bytes; all other items read as before; and the same bytes sent
 * again mend it.
 */
import { createHash, randomBytes } from 'node:crypto';
import { closeSync, openSync, readSync, readdirSync, writeSync } from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { Requestor } from '@millrace/dispatch/client';
import { MillraceError } from '@millrace/runner';
import { Program, temporaryFolder, until } from '../system.ts';
import { Cluster } from './cluster.ts';
import { Ledger } from './ledger.ts';
import { RoundCount, rounds } from './rounds.ts';
import { CAPABILITY } from './work.ts';

/** Above what a store keeps with the name instead of in a blob; the last is uploaded in parts. */
const SIZES = [70_000, 300_000, 3_000_000, 20_000_000];
const PLACES = ['first', 'middle', 'last'] as const;
const TIMES = rounds(1);

describe('a bit that fell over in a blob', () => {
  const ledger = new Ledger();
  const count = new RoundCount('blobs');
  let folder: { readonly path: string } & AsyncDisposable;
  let cluster: Cluster;
  let client: Requestor;
  let domainId: string;

  beforeAll(async () => {
    folder = await temporaryFolder();
    cluster = await Cluster.open({ postgres: null, ledger, nodes: 1, places: { blobs: folder.path } });
    client = cluster.direct();
    ({ domainId } = await client.health());
  }, 60_000);

  afterAll(async () => {
    count.print();
    await cluster?.[Symbol.asyncDispose]();
    await folder?.[Symbol.asyncDispose]();
  });

  /** Wherever the blobs keep it. */
  function fileOf(bytes: Uint8Array): string {
    const hex = createHash('sha256').update(bytes).digest('hex');
    const found = readdirSync(folder.path, { recursive: true }).find((name) => String(name).endsWith(hex));
    if (found === undefined) throw new Error(`no file holds the ${bytes.length} bytes of sha256:${hex}`);
    return path.join(folder.path, String(found));
  }

  /** Twice is as before. */
  function flip(bytes: Uint8Array, place: (typeof PLACES)[number], bit: number): void {
    const at = { first: 0, middle: bytes.length >> 1, last: bytes.length - 1 }[place];
    const file = openSync(fileOf(bytes), 'r+');
    const byte = Buffer.alloc(1);
    readSync(file, byte, 0, 1, at);
    writeSync(file, Buffer.of(byte[0]! ^ (1 << bit)), 0, 1, at);
    closeSync(file);
  }

  async function read(id: string): Promise<Buffer> {
    const { body } = await client.storage.openRaw(domainId, id);
    return Buffer.concat((await body.toArray()) as Uint8Array[]);
  }

  async function download(id: string): Promise<Buffer> {
    for await (const part of client.storage.download({ domainId, ids: [id] })) {
      return Buffer.concat((await part.body.toArray()) as Uint8Array[]);
    }
    throw new Error('the answer has no part');
  }

  test(`is told to who reads it, and to nobody else, ${TIMES * SIZES.length * PLACES.length} times`, async () => {
    for (let round = 1; round <= TIMES; round += 1) {
      const items = await Promise.all(
        SIZES.map(async (size) => {
          const bytes = randomBytes(size);
          return { bytes, id: await ledger.upload(client, `${size} bytes, round ${round}`, bytes) };
        }),
      );
      for (const { bytes, id } of items) {
        const digest = `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
        for (const place of PLACES) {
          flip(bytes, place, (round + bytes.length) % 8);
          for (const reading of [read, download]) {
            const error = await reading(id).then(
              () => null,
              (reason: unknown) => reason,
            );
            expect(MillraceError.is(error), `${bytes.length} bytes, ${place}: ${String(error)}`).toBe(true);
            // What was half sent could only break off. From then on it is said, without a byte of it.
            if (reading === download) {
              expect(error).toMatchObject({ code: 'data_loss', retryable: false });
              expect(String(error)).toContain(digest);
            }
          }
          // Once for each, the operator hears which blob it is.
          await until(() => cluster.dispatcher.stderr.filter((line) => line.includes(digest)).length >= 2);
          cluster.dispatcher.stderr.length = 0;
          for (const other of items) {
            if (other.id !== id) expect((await read(other.id)).equals(other.bytes)).toBe(true);
          }
          flip(bytes, place, (round + bytes.length) % 8);
          expect((await read(id)).equals(bytes)).toBe(true);
          count.add('a bit of a blob flipped');
        }
      }
    }
    expect(await ledger.losses(client, { everything: true })).toEqual([]);
  }, 120_000);

  test('keeps the task waiting that reads it, until the same bytes are sent again', async () => {
    const bytes = randomBytes(100_000);
    const sha256 = createHash('sha256').update(bytes).digest('hex');
    const id = await ledger.upload(client, 'input', bytes);
    flip(bytes, 'middle', 3);
    const jobId = await ledger.submit(client, 'job', {
      tasks: [
        {
          label: 't',
          capability: CAPABILITY,
          inputs_cids: [id],
          max_attempts: 100,
          meta: { sha256, workMs: 0, bytes: 10 },
        },
      ],
    });
    const followed = ledger.follow(client, jobId, () => undefined);
    await until(() => cluster.dispatcher.stderr.some((line) => line.includes(sha256)));
    await ledger.upload(client, 'the same again', bytes);
    await followed;
    expect(await ledger.losses(client, { everything: true })).toEqual([]);
    count.add('a bit of an input flipped, and mended');
  }, 120_000);

  test('of an artifact makes the command line fail, and leaves no file that looks like it', async () => {
    const jobId = await ledger.submit(client, 'job-2', {
      tasks: [{ label: 't', capability: CAPABILITY, meta: { sha256: null, workMs: 0, bytes: 100_000 } }],
    });
    await ledger.follow(client, jobId, () => undefined);
    const detail = await client.job(jobId);
    const { artifacts } = detail.receipts.find(({ outcome }) => outcome === 'completed')!.meta as unknown as {
      artifacts: readonly { readonly logical_path: string; readonly id: string }[];
    };
    const output = artifacts.find(({ logical_path }) => logical_path === 'out.bin')!;
    flip(await read(output.id), 'last', 0);
    const into = path.join(folder.path, 'got');
    await using got = new Program([
      'get',
      jobId,
      '--out',
      into,
      '--url',
      cluster.url,
      '--token',
      cluster.token,
    ]);
    await until(() => got.exitCode !== null);
    expect(got.exitCode, got.stderr).not.toBe(0);
    expect(got.stderr).toContain('sha256:');
    expect(readdirSync(into, { recursive: true }).map(String)).not.toContain('out.bin');
    count.add('a bit of an artifact flipped, fetched by the command line');
  }, 120_000);
});
