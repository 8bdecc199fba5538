/**
 * What a power cut and a bad disk leave of a SQLite file: a log (`-wal`) whose last pages are torn, a main file torn in the
 * middle of a checkpoint, and pages that are simply wrong. What was acknowledged is there, what was not is there whole or not
 * at all, and a file that is damaged beyond that is refused.
 *
 * `MILLRACE_FAULT_ROUNDS` multiplies the rounds.
 */
import { copyFileSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { MillraceError } from '@millrace/runner';
import type { Random } from '@millrace/runner';
import { seededRandom } from '@millrace/runner/testing';
import { DatabaseSync } from '@photostructure/sqlite';
import { afterAll, afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { Store } from '../store.ts';
import { openSqliteStore } from './sqlite.ts';
import { Scene, jobOf, refOf, valueOf } from './suite.ts';

const FACTOR = Number(process.env['MILLRACE_FAULT_ROUNDS'] ?? 1);
const rounds = (usual: number): number => Math.max(1, Math.round(usual * FACTOR));
const PAGE = 4096;
/** Of a log: before each page of it. */
const FRAME_HEADER = 24;
const LOG_HEADER = 32;

const folders: string[] = [];
const counts: string[] = [];

/** Restored for every round: stores, and the folder their files are in. */
let folder: string;
const stores: Store[] = [];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'millrace-torn-'));
  folders.push(folder);
});

afterEach(async () => {
  await Promise.all(stores.splice(0).map((store) => store[Symbol.asyncDispose]()));
  for (const path of folders.splice(0)) rmSync(path, { recursive: true, force: true });
});

afterAll(() => {
  for (const line of counts) process.stdout.write(`${line}\n`);
});

function counted(fault: string, tried: number): void {
  counts.push(`faults, SQLite: ${fault}: ${tried} rounds, 0 losses`);
}

async function open(path: string): Promise<Store> {
  const store = await openSqliteStore({ path });
  stores.push(store);
  return store;
}

async function close(store: Store): Promise<void> {
  stores.splice(stores.indexOf(store), 1);
  await store[Symbol.asyncDispose]();
}

/** What was acknowledged, in order. */
interface Acknowledged {
  readonly jobs: string[];
  readonly completed: { readonly taskId: string; readonly output: string }[];
}

const TASKS = 3;

/** Submits `count` jobs and does about half of their tasks. */
async function work(store: Store, node: string, count: number, done: Acknowledged): Promise<void> {
  const scene = new Scene(store);
  for (let i = 0; i < count; i += 1) {
    const spec = jobOf(
      Array.from({ length: TASKS }, (_, index) => ({ label: `t${index}`, meta: { text: 'x'.repeat(500) } })),
    );
    const [outcome] = await store.submit([
      { spec, organizationId: null, idempotencyKey: null, submitter: 'me' },
    ]);
    done.jobs.push(valueOf(outcome).jobId);
    for (const lease of await scene.lease(node, 2)) {
      if (i % 3 === 0) await scene.heartbeat(refOf(lease), { i }, [{ i }]);
      const output = `output of ${lease.leaseId}`;
      const [ended] = await store.complete([{ ...refOf(lease), outputCids: [output], meta: null }]);
      valueOf(ended);
      done.completed.push({ taskId: lease.task.id, output });
    }
  }
}

/** Everything of `kept` is there; of what came later, jobs and endings are there whole or not at all. */
async function expectKept(store: Store, kept: Acknowledged, later: Acknowledged): Promise<void> {
  for (const jobId of kept.jobs) expect(await store.getJob(jobId), `job ${jobId}`).not.toBeNull();
  for (const { taskId, output } of kept.completed) {
    const task = await store.getTask(taskId);
    expect([task?.status, task?.output_cids]).toEqual(['completed', [output]]);
  }
  let lost = false;
  for (const jobId of [...kept.jobs, ...later.jobs]) {
    const detail = await store.getJob(jobId);
    // Transactions are lost from the end only.
    if (lost) expect(detail).toBeNull();
    lost = detail === null;
    if (detail === null) continue;
    expect(detail.tasks).toHaveLength(TASKS);
    const events = (await store.events(jobId, 0, 10_000)) ?? [];
    expect(events.map(({ seq }) => seq)).toEqual(events.map((_, index) => index + 1));
    for (const task of detail.tasks) {
      const ends = events.filter(({ task_id, kind }) => task_id === task.id && kind === 'task.completed');
      expect(ends).toHaveLength(task.status === 'completed' ? 1 : 0);
    }
  }
}

/** It goes on: everything that is left can be done. */
async function expectGoesOn(store: Store): Promise<void> {
  const scene = new Scene(store);
  const node = await scene.node();
  await work(store, node, 1, { jobs: [], completed: [] });
  // What was leased when the power went is held until its lease ends; the rest is there to be taken.
  for (let leases = await scene.lease(node, 50); leases.length > 0; leases = await scene.lease(node, 50)) {
    for (const outcome of await store.complete(
      leases.map((lease) => ({ ...refOf(lease), outputCids: [], meta: null })),
    ))
      valueOf(outcome);
  }
  const { tasks } = await store.stats();
  expect(tasks.queued).toBe(0);
}

/** A database with acknowledged work, as the disk has it at that moment, and the log it had a while later. */
async function powerCut(random: Random): Promise<{
  readonly main: Buffer;
  readonly log: Buffer;
  readonly laterLog: Buffer;
  readonly kept: Acknowledged;
  readonly later: Acknowledged;
}> {
  const path = join(folder, 'living.db');
  const store = await open(path);
  const node = await new Scene(store).node();
  const kept: Acknowledged = { jobs: [], completed: [] };
  const later: Acknowledged = { jobs: [], completed: [] };
  await work(store, node, 2 + Math.floor(random() * 6), kept);
  // Every call was answered, so all of this is synced.
  const [main, log] = [readFileSync(path), readFileSync(`${path}-wal`)];
  await work(store, node, 2 + Math.floor(random() * 4), later);
  const laterLog = readFileSync(`${path}-wal`);
  expect(readFileSync(path).equals(main)).toBe(true);
  expect(laterLog.length).toBeGreaterThan(log.length);
  await close(store);
  for (const suffix of ['', '-wal', '-shm']) rmSync(path + suffix, { force: true });
  return { main, log, laterLog, kept, later };
}

/** A database file of these bytes. */
function restored(main: Uint8Array, log: Uint8Array | null, name = 'restored.db'): string {
  const path = join(folder, name);
  for (const suffix of ['-wal', '-shm', '-journal']) rmSync(path + suffix, { force: true });
  writeFileSync(path, main);
  if (log !== null) writeFileSync(`${path}-wal`, log);
  return path;
}

describe('a log whose last pages are torn', () => {
  const FRAME = FRAME_HEADER + PAGE;

  /** What a power cut makes of bytes that were written and not synced. */
  const TEARS: Readonly<Record<string, (tail: Buffer, random: Random) => Buffer>> = {
    'cut off anywhere': (tail, random) => tail.subarray(0, Math.floor(random() * tail.length)),
    'cut off within the last page': (tail, random) =>
      tail.subarray(0, tail.length - 1 - Math.floor(random() * (FRAME - 1))),
    'full of zeros from somewhere on': (tail, random) =>
      Buffer.from(tail).fill(0, Math.floor(random() * tail.length)),
    'full of old bytes from somewhere on': (tail, random) => {
      const torn = Buffer.from(tail);
      for (let at = Math.floor(random() * tail.length); at < torn.length; at += 1)
        torn[at] = Math.floor(random() * 256);
      return torn;
    },
    'with a bit that fell over': (tail, random) => {
      const torn = Buffer.from(tail);
      const at = Math.floor(random() * torn.length);
      torn[at] = torn[at]! ^ (1 << Math.floor(random() * 8));
      return torn;
    },
    'with sectors that never arrived': (tail, random) => {
      const torn = Buffer.from(tail);
      for (let at = 0; at < torn.length; at += 512)
        if (random() < 0.3) torn.fill(0, at, Math.min(at + 512, torn.length));
      return torn;
    },
  };

  for (const [how, tear] of Object.entries(TEARS)) {
    const times = rounds(5);
    test(`${how}: what was synced is there, ${times} times`, async () => {
      for (let round = 1; round <= times; round += 1) {
        const random = seededRandom(round);
        const { main, log, laterLog, kept, later } = await powerCut(random);
        expect((log.length - LOG_HEADER) % FRAME).toBe(0);
        expect(laterLog.subarray(0, log.length).equals(log)).toBe(true);
        const torn = Buffer.concat([log, tear(laterLog.subarray(log.length), random)]);
        const store = await open(restored(main, torn));
        await expectKept(store, kept, later);
        await expectGoesOn(store);
        await close(store);
      }
      counted(`torn end of the log, ${how}`, times);
    });
  }
});

describe('a main file torn in the middle of a checkpoint', () => {
  const times = rounds(20);

  test(`is mended from the log, which is whole, ${times} times`, async () => {
    for (let round = 1; round <= times; round += 1) {
      const random = seededRandom(100 + round);
      const { main, laterLog, kept, later } = await powerCut(random);
      const after = readFileSync(checkpointed(main, laterLog));
      // Page by page written or not, in any order; one of them half; and the file not yet as long as it will be.
      const torn = Buffer.alloc(after.length);
      main.copy(torn);
      for (let at = 0; at < after.length; at += PAGE) {
        if (random() < 0.5) after.copy(torn, at, at, at + PAGE);
      }
      const half = Math.floor((random() * after.length) / PAGE) * PAGE;
      after.copy(torn, half, half, half + 512 * (1 + Math.floor(random() * 7)));
      const length = Math.max(main.length, Math.floor(random() * after.length));
      const store = await open(restored(torn.subarray(0, length), laterLog));
      const everything = {
        jobs: [...kept.jobs, ...later.jobs],
        completed: [...kept.completed, ...later.completed],
      };
      await expectKept(store, everything, { jobs: [], completed: [] });
      await expectGoesOn(store);
      await close(store);
    }
    counted('main file torn in a checkpoint', times);
  });
});

describe('a main file that is damaged', () => {
  const times = rounds(20);

  test(`is refused at the start, or the damage is where nothing is kept, ${times} times`, async () => {
    const { main, laterLog, kept, later } = await powerCut(seededRandom(7));
    const good = readFileSync(checkpointed(main, laterLog));
    const everything = {
      jobs: [...kept.jobs, ...later.jobs],
      completed: [...kept.completed, ...later.completed],
    };
    let refused = 0;
    for (let round = 1; round <= times; round += 1) {
      const random = seededRandom(200 + round);
      const bad = Buffer.from(good);
      const page = Math.floor((random() * good.length) / PAGE) * PAGE;
      for (let at = page; at < page + PAGE; at += 1) bad[at] = Math.floor(random() * 256);
      const path = restored(bad, null, `damaged-${round}.db`);
      let store: Store;
      try {
        store = await open(path);
      } catch (error) {
        refused += 1;
        expect(MillraceError.is(error) && error.code, String(error)).toBe('failed_precondition');
        // Its first page says what kind of file it is.
        expect(String(error)).toMatch(page === 0 ? /is not a Millrace database/ : /is damaged.*restore/);
        expect(String(error)).toContain(path);
        continue;
      }
      await expectKept(store, everything, { jobs: [], completed: [] });
      await close(store);
    }
    expect(refused).toBeGreaterThan(times / 2);
    counted('damaged page of the main file', times);
  });

  test('is refused when its end is missing', async () => {
    const { main, laterLog } = await powerCut(seededRandom(8));
    const good = readFileSync(checkpointed(main, laterLog));
    for (const lost of [1, PAGE, 3 * PAGE, good.length - PAGE - 100]) {
      const path = restored(good.subarray(0, good.length - lost), null, `short-${lost}.db`);
      await expect(open(path), `${lost} bytes less`).rejects.toThrow(/is damaged.*restore/);
    }
  });
});

/** The file after all of its log was written into it. */
function checkpointed(main: Uint8Array, log: Uint8Array): string {
  mkdirSync(join(folder, 'checkpointed'), { recursive: true });
  const path = restored(main, log, join('checkpointed', 'x.db'));
  const database = new DatabaseSync(path);
  database.exec('PRAGMA wal_checkpoint(TRUNCATE)');
  database.close();
  const copy = join(folder, 'after.db');
  copyFileSync(path, copy);
  return copy;
}
