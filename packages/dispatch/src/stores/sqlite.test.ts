import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { copyFileSync, mkdtempSync, readdirSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { DatabaseSync } from '@photostructure/sqlite';
import { SimulatedClock, seededRandom } from '@millrace/runner/testing';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { GrantedLease, Store } from '../store.ts';
import { readMigrations } from './migrations.ts';
import { MAX_NONCES } from './node-rules.ts';
import { openSqliteStore } from './sqlite.ts';
import { DOMAIN, Scene, jobOf, refOf, storeSuite, valueOf } from './suite.ts';

/**
 * Makes a database what it would be had the migrations up to this number made it. Neighbours that were ready in one queue were
 * one range, whatever their domain.
 */
function downgrade(path: string, last: number): void {
  const oldPath = `${path}.old`;
  const old = new DatabaseSync(oldPath);
  const migrations = readMigrations('sqlite').filter(({ id }) => id <= last);
  for (const { sql } of migrations) old.exec(sql);
  old.exec(`
    ATTACH '${path}' AS new;
    CREATE TABLE migrations AS SELECT * FROM new.migrations WHERE id <= ${last}`);
  const columns = (schema: string, table: string): string[] =>
    (old.prepare(`SELECT name FROM ${schema}.pragma_table_info('${table}')`).all() as { name: string }[]).map(
      ({ name }) => name,
    );
  const tables = old.prepare("SELECT name FROM main.sqlite_schema WHERE type = 'table'").all() as {
    name: string;
  }[];
  for (const { name } of tables) {
    if (name === 'migrations' || name === 'ready') continue;
    const there = new Set(columns('new', name));
    const both = columns('main', name)
      .filter((column) => there.has(column))
      .join(', ');
    old.exec(`INSERT INTO main.${name} (${both}) SELECT ${both} FROM new.${name}`);
  }
  old.exec(`
    INSERT INTO main.ready SELECT queue_id, priority, min(first_task), max(last_task), since, fresh
      FROM new.ready JOIN new.lanes ON lanes.id = lane_id GROUP BY queue_id, priority, since, fresh;
    PRAGMA main.application_id = ${(old.prepare('PRAGMA new.application_id').get() as { application_id: number }).application_id}`);
  old.close();
  renameSync(oldPath, path);
}

storeSuite('sqlite', (options) => openSqliteStore({ path: ':memory:', ...options }));

describe('sqlite', () => {
  let folder: string;
  let path: string;

  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'millrace-store-'));
    path = join(folder, 'store.db');
  });

  afterEach(() => rmSync(folder, { recursive: true, force: true }));

  const newJob = (label = 'job') => ({
    spec: jobOf([{}], { label }),
    organizationId: null,
    idempotencyKey: null,
    submitter: 'tester',
  });

  /** Counts the turns in which the store ran; each is one transaction. */
  function countingSchedule(): { schedule: (run: () => void) => void; turns: () => number } {
    let turns = 0;
    return {
      schedule: (run) => {
        setImmediate(() => {
          turns += 1;
          run();
        });
      },
      turns: () => turns,
    };
  }

  test('the trace of a job outlives the process', async () => {
    const traceparent = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01';
    {
      await using store = await openSqliteStore({ path });
      await store.submit([{ ...newJob(), traceparent }, newJob()]);
    }
    await using store = await openSqliteStore({ path });
    const scene = new Scene(store);
    const node = await scene.node();
    const leases = [await scene.take(node), await scene.take(node)];
    expect(leases.map((lease) => lease.traceparent)).toEqual([traceparent, null]);
  });

  test('how much waits is counted alike after closing and opening, and in a database of before', async () => {
    const later = { not_before: '2999-01-01T00:00:00.000Z' };
    const jobs = [
      jobOf([{ label: 'a' }, { label: 'b', ...later }, { label: 'c', capability: '/other/v1' }], {
        edges: [
          { from: 'a', to: 'b' },
          { from: 'a', to: 'c' },
        ],
      }),
      jobOf(Array.from({ length: 100 }, (_, index) => ({ label: `d${index}`, ...(index < 70 && later) }))),
      // Nothing of it waits any more, though its second stage never opened.
      jobOf([{ label: 'x' }, { label: 'y' }], { edges: [{ from: 'x', to: 'y' }] }),
    ];
    let before: unknown;
    {
      await using store = await openSqliteStore({ path });
      const outcomes = await store.submit(jobs.map((spec) => ({ ...newJob(), spec })));
      await store.cancelJob(valueOf(outcomes[2]).jobId);
      const scene = new Scene(store);
      await scene.lease(await scene.node(), 5);
      before = (await store.queues()).map((queue) => ({ ...queue, oldestReadyAgeMs: null }));
      expect(before).toMatchObject([
        { capability: '/test/work/v1', ready: 26, blocked: 1, delayed: 70, held: 5 },
        { capability: '/other/v1', ready: 0, blocked: 1, delayed: 0, held: 0 },
      ]);
    }
    const counted = async (): Promise<unknown> => {
      await using store = await openSqliteStore({ path });
      return (await store.queues()).map((queue) => ({ ...queue, oldestReadyAgeMs: null }));
    };
    expect(await counted()).toEqual(before);
    downgrade(path, 3);
    expect(await counted()).toEqual(before);
  });

  test('a database from before domains took turns goes on with all of its tasks', async () => {
    const [first, second] = ['11111111-0000-4000-8000-000000000000', '22222222-0000-4000-8000-000000000000'];
    const later = { not_before: '2999-01-01T00:00:00.000Z' };
    const edges = [{ from: 'a', to: 'b' }];
    let held: GrantedLease;
    let node: string;
    {
      await using store = await openSqliteStore({ path });
      const scene = new Scene(store);
      node = await scene.node();
      await scene.submit([{ label: 'held' }, { label: 'other', capability: '/other/v1' }]);
      held = await scene.take(node);
      // Of one moment, so that the old database had all of them in one row.
      await store.submit(
        [
          jobOf([{ label: 'p0' }, { label: 'p1' }, { label: 'p2' }], { domain_id: first }),
          jobOf([{ label: 'q0' }, { label: 'q1' }], { domain_id: second }),
          jobOf([{ label: 'a' }, { label: 'b' }, { label: 'waits', ...later }], { domain_id: second, edges }),
        ].map((spec) => ({ ...newJob(), organizationId: 'org-1', spec })),
      );
    }
    downgrade(path, 4);
    const database = new DatabaseSync(path);
    expect(database.prepare('SELECT first_task, last_task FROM ready').all()).toEqual([
      { first_task: 3, last_task: 8 },
      { first_task: 2, last_task: 2 },
    ]);
    database.close();
    {
      await using store = await openSqliteStore({ path });
      const scene = new Scene(store);
      expect(await store.domains()).toMatchObject([{ ready: 3 }, { ready: 3 }, { ready: 1, held: 1 }]);
      const leases = await scene.lease(node, 9);
      expect(leases.map(({ task }) => task.label)).toEqual(['p0', 'q0', 'p1', 'q1', 'p2', 'a']);
      for (const lease of [held, ...leases]) expect(await scene.complete(refOf(lease))).toBe('ok');
      expect((await scene.take(node)).task.label).toBe('b');
      expect(await scene.lease(node)).toEqual([]);
    }
    await using store = await openSqliteStore({ path });
    expect(await store.queues()).toMatchObject([
      { ready: 0, delayed: 1, held: 1 },
      { capability: '/other/v1', ready: 1 },
    ]);
  });

  test('what is held of each key and of each node, and weights, outlive the process', async () => {
    const [first, second] = ['11111111-0000-4000-8000-000000000000', '22222222-0000-4000-8000-000000000000'];
    const keyed = { concurrency: { key: 'k', limit: 2 }, resources: { cpu: 1.5 } };
    const tasks = Array.from({ length: 6 }, (_, index) => ({ label: `t${index}`, ...keyed }));
    let node: string;
    let held: readonly GrantedLease[];
    {
      await using store = await openSqliteStore({ path });
      const scene = new Scene(store);
      node = await scene.node({ resources: { cpu: 4 } });
      await store.setWeight(second, 3);
      await scene.submit(tasks, { domain_id: first });
      held = await scene.lease(node, 9);
      expect(held).toHaveLength(2);
      await scene.submit(tasks, { domain_id: second });
    }
    await using store = await openSqliteStore({ path });
    const scene = new Scene(store);
    expect(await store.getNode(node)).toMatchObject({ resources: { cpu: 4 }, resources_in_use: { cpu: 3 } });
    expect(await store.domains()).toEqual([
      { domain_id: first, weight: 1, ready: 4, held: 2 },
      { domain_id: second, weight: 3, ready: 6, held: 0 },
    ]);
    expect(await store.queues()).toMatchObject([{ ready: 10, limited: 4 }]);
    expect(await scene.lease(node, 9)).toEqual([]);
    await scene.complete(refOf(held[0]!));
    const [next] = await scene.lease(node, 9);
    expect(next?.domainId).toBe(first);
    const other = await scene.node();
    expect((await scene.lease(other, 9)).map(({ domainId }) => domainId)).toEqual([second, second]);
  });

  test('a transaction that is rolled back leaves lanes, keys and nodes as they were', async () => {
    // The disk is full for whatever makes the file larger.
    await using store = await openSqliteStore({ path, maxBytes: 700 * 1024 });
    const scene = new Scene(store);
    const node = await scene.node({ resources: { cpu: 8 } });
    const keyed = { concurrency: { key: 'k', limit: 2 } };
    await scene.submit([
      { label: 'a', ...keyed },
      { label: 'b', ...keyed },
      { label: 'c', ...keyed },
      { label: 'd' },
    ]);
    const [a] = await scene.lease(node, 1);
    const meta = 'x'.repeat(1_000_000);
    const large = { ...newJob(), spec: jobOf([{ label: 'large', meta, ...keyed }]) };
    // The large one last: those before it are done by then.
    const outcomes = await Promise.allSettled([
      scene.complete(refOf(a!)),
      scene.lease(node, 9),
      store.submit([large]),
    ]);
    // They shared a transaction, and the second of them had picked its tasks.
    expect(outcomes.map(({ status }) => status)).toEqual(['rejected', 'rejected', 'rejected']);
    expect(await store.queues()).toMatchObject([{ ready: 3, limited: 0, held: 1 }]);
    expect((await store.getNode(node))?.resources_in_use).toEqual({ cpu: 1 });
    expect((await scene.lease(node, 9)).map(({ task }) => task.label)).toEqual(['b', 'd']);
    expect(await store.queues()).toMatchObject([{ ready: 1, limited: 1, held: 3 }]);
    expect((await store.getNode(node))?.resources_in_use).toEqual({ cpu: 3 });
    await scene.complete(refOf(a!));
    expect((await scene.lease(node, 9)).map(({ task }) => task.label)).toEqual(['c']);
    expect(await store.queues()).toMatchObject([{ ready: 0, limited: 0, held: 3 }]);
  });

  test('results to be given again, and the jobs that ask for them, outlive the process', async () => {
    const meta = { ref: `compute://sha256/${'c'.repeat(64)}`, now: 0 };
    const stages = jobOf(
      [
        { label: 'a', meta: { ...meta, step: 1 } },
        { label: 'b', meta: { ...meta, step: 2 } },
      ],
      { cache: true, edges: [{ from: 'a', to: 'b' }] },
    );
    const newStages = { ...newJob(), spec: stages };
    const end = async (scene: Scene): Promise<string> => {
      const lease = await scene.take(await scene.node());
      await scene.complete(refOf(lease), [], { artifacts: [] });
      return lease.task.label ?? '';
    };
    {
      await using store = await openSqliteStore({ path });
      await store.submit([newStages]);
      expect(await end(new Scene(store))).toBe('a');
    }
    {
      await using store = await openSqliteStore({ path });
      expect(await end(new Scene(store))).toBe('b');
    }
    await using store = await openSqliteStore({ path });
    const { jobId } = valueOf((await store.submit([newStages]))[0]);
    const { status } = (await new Scene(store).job(jobId)).job;
    expect(status).toBe('completed');
  });

  test('a new database is readable by its owner only, whatever the umask', async () => {
    const before = process.umask(0o000);
    try {
      await using store = await openSqliteStore({ path });
      await store.submit([newJob()]);
      const modes = readdirSync(folder).map((file) => [file, statSync(join(folder, file)).mode & 0o777]);
      expect(Object.fromEntries(modes)).toEqual({ 'store.db': 0o600, 'store.db-wal': 0o600 });
    } finally {
      process.umask(before);
    }
  });

  test('concurrent calls share a commit', async () => {
    const { schedule, turns } = countingSchedule();
    await using store = await openSqliteStore({ path, schedule });
    const scene = new Scene(store);
    const node = await scene.node();
    const before = turns();
    await Promise.all(Array.from({ length: 500 }, () => scene.submit()));
    expect(turns() - before).toBe(1);
    const leases = (await Promise.all(Array.from({ length: 100 }, () => scene.lease(node)))).flat();
    expect(leases).toHaveLength(100);
    expect(turns() - before).toBe(2);
    await Promise.all(leases.map((lease) => scene.complete(refOf(lease))));
    expect(turns() - before).toBe(3);
  });

  describe('those who stand by', () => {
    const request = (nodeId: string) => ({ nodeId, max: 1, capabilities: null, start: true });

    test('are given a lease by the commit that makes the task runnable, before listeners hear of it', async () => {
      const { schedule, turns } = countingSchedule();
      await using store = await openSqliteStore({ path, schedule });
      const scene = new Scene(store);
      const [one, two] = [await scene.node(), await scene.node()];
      const heard: unknown[] = [];
      using _ = store.standBy({
        requests: () => [request(one), request(two)],
        granted: (outcomes) =>
          heard.push(outcomes.map((outcome) => outcome.ok && outcome.value.leases.length)),
      });
      using __ = store.subscribe(({ kind }) => void heard.push(kind));
      const before = turns();
      await scene.submit();
      expect(heard).toEqual([[1, 0], 'job', 'runnable']);
      expect(turns() - before).toBe(1);
      expect((await store.stats()).tasks).toMatchObject({ queued: 0, running: 1 });
    });

    test('are not asked when nothing became runnable, nor once they are gone', async () => {
      await using store = await openSqliteStore({ path });
      const scene = new Scene(store);
      const node = await scene.node();
      let asked = 0;
      const standby = store.standBy({
        requests: () => {
          asked += 1;
          return [];
        },
        granted: () => expect.unreachable('nobody asked'),
      });
      await scene.submit();
      expect(asked).toBe(1);
      const [lease] = await scene.lease(node);
      await scene.complete(refOf(lease!));
      expect(asked).toBe(1);
      standby[Symbol.dispose]();
      await scene.submit();
      expect(asked).toBe(1);
    });

    test('one that breaks costs others neither their answer nor their commit', async () => {
      await using store = await openSqliteStore({ path });
      const scene = new Scene(store);
      using _ = store.standBy({
        requests: () => {
          throw new Error('a bug');
        },
        granted: () => expect.unreachable('nobody asked'),
      });
      const jobId = await scene.submit();
      expect((await store.getJob(jobId))?.job.status).toBe('pending');
    });

    test('hear nothing of a lease whose commit failed', async () => {
      await using store = await openSqliteStore({ path, maxBytes: 400 * 1024 });
      const scene = new Scene(store);
      const node = await scene.node();
      let [granted, leases] = [0, 0];
      using _ = store.standBy({
        requests: () => [request(node)],
        granted: ([outcome]) => {
          granted += 1;
          if (outcome?.ok) leases += outcome.value.leases.length;
        },
      });
      const meta = { text: 'x'.repeat(100_000) };
      let refused = 0;
      for (let round = 0; round < 8; round += 1) {
        const [outcome] = await Promise.allSettled([
          store.submit([{ ...newJob(), spec: jobOf([{ meta }]) }]),
        ]);
        if (outcome.status === 'rejected') refused += 1;
      }
      expect(refused).toBeGreaterThan(0);
      expect(granted).toBe(8 - refused);
      expect((await store.stats()).tasks.running).toBe(leases);
    });
  });

  test('a burst is split into transactions, so the event loop is not held for all of it', async () => {
    const { schedule, turns } = countingSchedule();
    await using store = await openSqliteStore({ path, schedule });
    const big = { ...newJob(), spec: jobOf(Array.from({ length: 500 }, () => ({}))) };
    await Promise.all(Array.from({ length: 20 }, () => store.submit([big])));
    expect(turns()).toBe(4);
    expect((await store.stats()).tasks.queued).toBe(10_000);
  });

  test('a promise resolves only after its commit: a copy of the files then has the row', async () => {
    // A copy of the files is what would be found after a power cut.
    await using store = await openSqliteStore({ path });
    const scene = new Scene(store);
    const jobId = await scene.submit();
    const copy = join(folder, 'copy.db');
    copyFileSync(path, copy);
    copyFileSync(`${path}-wal`, `${copy}-wal`);
    await using found = await openSqliteStore({ path: copy });
    expect((await found.getJob(jobId))?.job.id).toBe(jobId);
  });

  test('everything is there again after closing and opening', async () => {
    const clock = new SimulatedClock();
    const open = () => openSqliteStore({ path, clock, random: seededRandom(3) });
    let lease;
    let before;
    let jobId;
    {
      await using store = await open();
      const scene = new Scene(store);
      const node = await scene.node();
      jobId = await scene.submit([{ label: 'a' }, { label: 'b' }, { label: 'c' }], {
        edges: [{ from: 'a', to: 'c' }],
      });
      lease = await scene.take(node);
      before = { job: await scene.job(jobId), stats: await store.stats(), nodes: await store.listNodes() };
    }
    await using store = await open();
    const scene = new Scene(store);
    expect({
      job: await scene.job(jobId),
      stats: await store.stats(),
      nodes: await store.listNodes(),
    }).toEqual(before);
    const node = lease.task.reserved_by!;
    expect((await scene.lease(node, 9)).map(({ task }) => task.label)).toEqual(['b']);
    expect(await scene.complete(refOf(lease))).toBe('ok');
    expect((await scene.lease(node, 9)).map(({ task }) => task.label)).toEqual(['c']);
  });

  test('attempts and their endings are told alike, accepted again and swept after closing and opening', async () => {
    const clock = new SimulatedClock();
    const random = seededRandom(4);
    const open = () => openSqliteStore({ path, clock, random });
    const read = async (store: Store, jobId: string) => ({
      job: await store.getJob(jobId),
      events: await store.events(jobId, 0, 1000),
      busy: await store.busyNodes('all'),
    });
    let failed, done, held, node, jobId, before;
    {
      await using store = await open();
      const scene = new Scene(store);
      node = await scene.node();
      jobId = await scene.submit(Array.from({ length: 100 }, (_, index) => ({ label: String(index) })));
      failed = await scene.take(node);
      await scene.fail(refOf(failed), { reason: 'try again' });
      clock.jumpWallClock(2000);
      await store.sweep();
      done = await scene.lease(node, 90);
      expect(done[0]?.task.id).toBe(failed.task.id);
      for (const lease of done.slice(0, 70)) await scene.complete(refOf(lease), [lease.task.label]);
      held = done[80]!;
      before = await read(store, jobId);
    }
    await using store = await open();
    const scene = new Scene(store);
    expect(await read(store, jobId)).toEqual(before);
    expect(await scene.task(failed.task.id)).toMatchObject({ status: 'completed', output_cids: ['0'] });
    for (const lease of done.slice(0, 70)) expect(await scene.complete(refOf(lease))).toBe('ok');
    expect(await scene.fail(refOf(failed))).toBe('ok');
    expect(await scene.complete(refOf(failed))).toBe('aborted');
    expect((await scene.heartbeat(refOf(held))).task.status).toBe('running');
    expect((await scene.job(jobId)).receipts).toHaveLength(71);
    clock.jumpWallClock(15_000);
    expect((await store.sweep()).rescued).toBe(20);
    expect(await scene.complete(refOf(held))).toBe('ok');
    expect(await scene.lease(node, 99)).toHaveLength(29);
  });

  test('tasks with little and with much to say are read back one by one', async () => {
    await using store = await openSqliteStore({ path });
    const scene = new Scene(store);
    const metaOf = (index: number) => ({ index, filler: 'ü'.repeat(index % 7 === 0 ? 20_000 : index) });
    const jobId = await scene.submit(Array.from({ length: 200 }, (_, index) => ({ meta: metaOf(index) })));
    const ids = (await scene.job(jobId)).tasks.map(({ id }) => id);
    for (const [index, id] of [...ids.entries()].toReversed()) {
      expect(await scene.task(id)).toMatchObject({ id, meta: metaOf(index) });
    }
    // The ids before the first and after the last are nobody's.
    expect(await store.getTask(jobId)).toBeNull();
    const beyond = (BigInt(`0x${ids.at(-1)!.slice(24)}`) + 1n).toString(16).padStart(12, '0');
    expect(await store.getTask(`${ids.at(-1)!.slice(0, 24)}${beyond}`)).toBeNull();
  });

  describe('what was acknowledged survives a SIGKILL', () => {
    test('of the process that acknowledged it', async () => {
      // Submits for ever and tells each job id on stdout once it is acknowledged.
      const program = `
        const { openSqliteStore } = await import(process.argv[1]);
        const store = await openSqliteStore({ path: process.argv[2] });
        const job = JSON.parse(process.argv[3]);
        for (;;) {
          const answers = await Promise.all(Array.from({ length: 20 }, () => store.submit([job])));
          process.stdout.write(answers.map(([answer]) => answer.value.jobId + '\\n').join(''));
        }`;
      const module = fileURLToPath(new URL('./sqlite.js', import.meta.url));
      const child = spawn(
        process.execPath,
        ['--input-type=module', '--eval', program, module, path, JSON.stringify(newJob())],
        { stdio: ['ignore', 'pipe', 'inherit'] },
      );
      const told: string[] = [];
      const lines = createInterface({ input: child.stdout });
      lines.on('line', (line) => {
        told.push(line);
        if (told.length === 500) child.kill('SIGKILL');
      });
      await once(child, 'close');
      expect(child.signalCode).toBe('SIGKILL');
      expect(told.length).toBeGreaterThanOrEqual(500);
      await using store = await openSqliteStore({ path });
      // The last line may have been cut off.
      for (const id of told.filter((line) => line.length === 36)) {
        expect((await store.getJob(id))?.tasks).toHaveLength(1);
      }
      const jobs = (await store.stats()).jobs.pending;
      expect(jobs).toBeGreaterThanOrEqual(told.length - 1);
    }, 30_000);
  });

  test('a second process is refused by name, and may come when the first has gone', async () => {
    const program = `
      const { openSqliteStore } = await import(process.argv[1]);
      try {
        await (await openSqliteStore({ path: process.argv[2] }))[Symbol.asyncDispose]();
        process.stdout.write('opened');
      } catch (error) {
        process.stdout.write(error.code + ': ' + error.message);
      }`;
    const module = fileURLToPath(new URL('./sqlite.js', import.meta.url));
    const tryOpen = async (): Promise<string> => {
      const child = spawn(process.execPath, ['--input-type=module', '--eval', program, module, path], {
        stdio: ['ignore', 'pipe', 'inherit'],
      });
      let text = '';
      child.stdout.on('data', (chunk: Buffer) => (text += chunk.toString()));
      await once(child, 'close');
      return text;
    };
    {
      await using store = await openSqliteStore({ path });
      const refusal = await tryOpen();
      expect(refusal).toContain('failed_precondition');
      expect(refusal).toContain(path);
      // The one who was first is not disturbed.
      await new Scene(store).submit();
    }
    expect(await tryOpen()).toBe('opened');
  }, 30_000);

  /** Changes the database file behind the store's back. */
  function tamper(sql: string): void {
    const database = new DatabaseSync(path);
    database.exec(sql);
    database.close();
  }

  const refusal = async (): Promise<{ code: string; message: string }> => {
    try {
      const store = await openSqliteStore({ path });
      await store[Symbol.asyncDispose]();
      return { code: 'ok', message: '' };
    } catch (error) {
      return error as { code: string; message: string };
    }
  };

  test('a database of a newer version is refused, and left as it is', async () => {
    await (await openSqliteStore({ path }))[Symbol.asyncDispose]();
    tamper("INSERT INTO migrations VALUES (9999, '9999-future.sql', 'x', 0)");
    expect(await refusal()).toMatchObject({
      code: 'failed_precondition',
      message: expect.stringMatching(/newer Millrace.*9999-future/),
    });
    tamper('DELETE FROM migrations WHERE id = 9999');
    expect((await refusal()).code).toBe('ok');
  });

  test('a database with another form of a migration is refused', async () => {
    await (await openSqliteStore({ path }))[Symbol.asyncDispose]();
    tamper("UPDATE migrations SET checksum = 'x' WHERE id = 1");
    expect(await refusal()).toMatchObject({
      code: 'failed_precondition',
      message: expect.stringContaining('0001-initial.sql'),
    });
  });

  test.each([
    ['another program', 'CREATE TABLE theirs (a)'],
    ['another kind', 'PRAGMA application_id = 42'],
  ])('a database of %s is refused', async (_, sql) => {
    tamper(sql);
    expect(await refusal()).toMatchObject({
      code: 'failed_precondition',
      message: expect.stringContaining('not a Millrace database'),
    });
  });

  test('a file that is no database, and a folder that does not exist, are refused', async () => {
    writeFileSync(path, 'hello, this is no database at all, just some text in a file'.repeat(50));
    expect(await refusal()).toMatchObject({
      code: 'failed_precondition',
      message: expect.stringContaining('not a Millrace database'),
    });
    path = join(folder, 'missing', 'store.db');
    expect(await refusal()).toMatchObject({ code: 'unavailable', message: expect.stringContaining(path) });
  });

  test('on a full disk nothing is acknowledged, nothing is half there, and the store goes on', async () => {
    await using store = await openSqliteStore({ path, maxBytes: 700 * 1024 });
    const scene = new Scene(store);
    const node = await scene.node();
    const kept: string[] = [];
    let full: unknown;
    const filler = 'x'.repeat(20_000);
    for (let index = 0; index < 200 && full === undefined; index += 1) {
      const [one, two] = await Promise.allSettled([
        scene.submit([{ meta: filler }]),
        scene.submit([{ meta: filler }]),
      ]);
      // They shared a transaction, so they share its fate.
      expect(one.status).toBe(two.status);
      if (one.status === 'fulfilled') kept.push(one.value);
      else full = one.reason;
      if (two.status === 'fulfilled') kept.push(two.value);
    }
    expect(full).toMatchObject({ code: 'resource_exhausted', retryable: true });
    expect(String(full)).toContain(path);
    expect(kept.length).toBeGreaterThan(5);
    const { items } = await store.listJobs({
      domainId: DOMAIN,
      status: null,
      capabilities: [],
      matchAllCapabilities: false,
      limit: 100,
      cursor: null,
    });
    expect(new Set(items.map(({ job }) => job.id))).toEqual(new Set(kept));
    expect((await store.stats()).tasks.queued).toBe(kept.length);
    // Making room helps, and what was there works.
    for (const id of kept.splice(0, 5)) expect(await store.deleteJob(id)).toBe(true);
    const lease = await scene.take(node);
    expect(lease.task.job_id).toBe(kept[0]);
    expect(await scene.complete(refOf(lease))).toBe('ok');
    await scene.submit();
  });

  test('an operation that breaks half way is undone, and those it shared a transaction with are not', async () => {
    await using store = await openSqliteStore({ path });
    const scene = new Scene(store);
    const upload = {
      id: 'same',
      domainId: DOMAIN,
      name: 'n',
      dataType: 't',
      size: null,
      existingId: null,
      dataId: 'd',
      partSize: 1,
      expiresAtMs: 1,
      lease: null,
    };
    await store.createUpload(upload);
    const [first, broken, second] = await Promise.allSettled([
      scene.submit([{}], { label: 'first' }),
      // The id is taken, which only the database notices.
      store.createUpload(upload),
      scene.submit([{}], { label: 'second' }),
    ]);
    expect([first.status, broken.status, second.status]).toEqual(['fulfilled', 'rejected', 'fulfilled']);
    expect((await store.stats()).jobs.pending).toBe(2);
    const jobId = first.status === 'fulfilled' ? first.value : '';
    expect((await store.events(jobId, 0, 10))?.map(({ seq }) => seq)).toEqual([1, 2]);
    expect(await scene.lease(await scene.node(), 9)).toHaveLength(2);
  });

  test('the same seed gives the same history, ids included', async () => {
    const run = async (file: string): Promise<unknown> => {
      const clock = new SimulatedClock();
      await using store = await openSqliteStore({
        path: join(folder, file),
        clock,
        random: seededRandom(11),
        schedule: (work) => queueMicrotask(work),
      });
      const scene = new Scene(store);
      const { id: node } = await store.createNode({
        name: 'n',
        mode: 'public',
        organizationId: 'o',
        secretHash: 's',
      });
      await store.registerNode({
        nodeId: node,
        secretHash: 's',
        wallet: '0x1',
        capabilities: ['/test/work/v1'],
        labels: {},
        version: '1.0.0',
        maxConcurrency: 9,
      });
      const jobId = await scene.submit([{ label: 'a' }, { label: 'b' }]);
      const [a] = await scene.lease(node, 2);
      await scene.fail(refOf(a!));
      clock.jumpWallClock(16_000);
      await store.sweep();
      return [await scene.job(jobId), await store.events(jobId, 0, 100)];
    };
    expect(await run('one.db')).toEqual(await run('two.db'));
  });

  test('a hundred thousand live nonces are kept, one more is refused until some expire', async () => {
    const clock = new SimulatedClock();
    const nonce = (text: string) => ({
      nonce: text,
      wallet: '0x1',
      domain: 'd',
      uri: 'u',
      chainId: 1,
      issuedAt: '',
      expiresAtMs: clock.now() + 1000,
    });
    await (await openSqliteStore({ path, clock }))[Symbol.asyncDispose]();
    tamper(`
      WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ${MAX_NONCES - 1})
      INSERT INTO nonces SELECT 'n' || i, '{}', ${clock.now() + 1000} FROM n`);
    await using store = await openSqliteStore({ path, clock });
    await store.putNonce(nonce('last'));
    await expect(store.putNonce(nonce('too many'))).rejects.toMatchObject({
      code: 'resource_exhausted',
      message: expect.stringContaining(String(MAX_NONCES)),
    });
    expect(await store.takeNonce('last')).not.toBeNull();
    await store.putNonce(nonce('room again'));
    await expect(store.putNonce(nonce('too many'))).rejects.toMatchObject({ code: 'resource_exhausted' });
    clock.jumpWallClock(1000);
    await store.putNonce(nonce('later'));
    expect(await store.takeNonce('room again')).toBeNull();
    expect(await store.takeNonce('later')).not.toBeNull();
  });

  test('a job of ten thousand tasks is submitted, run and read', async () => {
    await using store = await openSqliteStore({ path });
    const scene = new Scene(store);
    const node = await scene.node({ max: 10_000 });
    const tasks = Array.from({ length: 10_000 }, (_, index) => ({ label: `t${index}`, stage: 'all' }));
    const jobId = await scene.submit([...tasks, { label: 'end', stage: 'end', inputs_cids: ['stage:all'] }], {
      edges: [{ from: 'all', to: 'end' }],
    });
    for (let done = 0; done < 10_000; done += 1000) {
      const leases = await scene.lease(node, 1000);
      const items = leases.map((lease) => ({ ...refOf(lease), outputCids: [lease.task.label], meta: null }));
      for (const outcome of await store.complete(items)) valueOf(outcome);
    }
    const end = await scene.take(node);
    expect(end.task.inputs_cids).toHaveLength(10_000);
    expect(end.task.inputs_cids[9999]).toBe('t9999');
    await scene.complete(refOf(end));
    const { job, tasks_summary, receipts } = await scene.job(jobId);
    expect(job.status).toBe('completed');
    expect(tasks_summary.completed).toBe(10_001);
    expect(receipts).toHaveLength(10_001);
  }, 60_000);
});
