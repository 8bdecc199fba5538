import { seededRandom } from '@millrace/runner/testing';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { PostgresServer, miscounts, withoutPostgres } from '../postgres.test.support.ts';
import type { GrantedLease, Store, StoreChange } from '../store.ts';
import { modelTest } from './model-suite.ts';
import { openPostgresStore } from './postgres.ts';
import { Scene, jobOf, refOf, storeSuite, valueOf } from './suite.ts';

describe.skipIf(withoutPostgres())('over a real server', () => {
  let server: PostgresServer;
  let database: string;

  beforeAll(async () => {
    server = await PostgresServer.start();
    database = await server.createDatabase();
  });

  afterAll(async () => {
    await server[Symbol.asyncDispose]();
  });

  storeSuite('postgres', async (options) => {
    await server.emptyDatabase(database);
    return await openPostgresStore({ url: server.url(database), ...options });
  });

  // Fewer histories: each step is several commits. They are others each time.
  modelTest(async (options) => {
    await server.emptyDatabase(database);
    return await openPostgresStore({ url: server.url(database), ...options });
  }, 15);

  describe('two stores on one database', () => {
    let one: Store;
    let two: Store;
    let scenes: readonly [Scene, Scene];

    beforeEach(async () => {
      await server.emptyDatabase(database);
      const url = server.url(database);
      [one, two] = await Promise.all([
        openPostgresStore({ url, random: seededRandom(1) }),
        openPostgresStore({ url, random: seededRandom(2) }),
      ]);
      scenes = [new Scene(one), new Scene(two)];
    });

    afterEach(async () => {
      await Promise.all([one[Symbol.asyncDispose](), two[Symbol.asyncDispose]()]);
    });

    /** Resolves with the first change that `wanted` accepts. */
    function heard(store: Store, wanted: (change: StoreChange) => boolean): Promise<StoreChange> {
      return new Promise((resolve) => {
        const subscription = store.subscribe((change) => {
          if (!wanted(change)) return;
          subscription[Symbol.dispose]();
          resolve(change);
        });
      });
    }

    test('racing for the tasks of a few jobs, they give each exactly once', async () => {
      const [here] = scenes;
      const nodes = await Promise.all(Array.from({ length: 8 }, () => here.node({ max: 1000 })));
      for (let job = 0; job < 5; job += 1) {
        await here.submit(
          Array.from({ length: 80 }, (_, index) => ({ label: `${job}-${index}`, priority: index % 3 })),
        );
      }
      const drain = async (scene: Scene, node: string): Promise<string[]> => {
        const given: string[] = [];
        for (;;) {
          const leases = await scene.lease(node, 7);
          if (leases.length === 0) return given;
          given.push(...leases.map(({ task }) => task.id));
        }
      };
      const given = (await Promise.all(nodes.map((node, index) => drain(scenes[index % 2]!, node)))).flat();
      expect(given).toHaveLength(400);
      expect(new Set(given).size).toBe(400);
      expect((await two.stats()).tasks).toMatchObject({ queued: 0, running: 400 });
    });

    test('of one that gives expired tasks away and one that hears of their nodes again, each task is with one', async () => {
      await using quick = await openPostgresStore({ url: server.url(database), leaseTtlMs: 1 });
      await using slow = await openPostgresStore({ url: server.url(database), leaseTtlMs: 600_000 });
      const [here, there] = [new Scene(quick), new Scene(slow)];
      const [node, other] = [await here.node(), await there.node()];
      const totals = { resumed: 0, taken: 0 };
      // Who is first is left to chance; at least six times, and until either was.
      for (
        let round = 0;
        round < 6 || (round < 60 && Math.min(totals.resumed, totals.taken) === 0);
        round += 1
      ) {
        const jobId = await here.submit(Array.from({ length: 24 }, (_, index) => ({ label: `${index}` })));
        const leases = await here.lease(node, 24);
        expect(leases).toHaveLength(24);
        let rescued = 0;
        while (rescued < 24) ({ rescued } = { rescued: rescued + (await quick.sweep()).rescued });
        const writeUnder = async (lease: GrantedLease, index: number): Promise<boolean> => {
          const ref = refOf(lease);
          if (index % 3 === 0) return (await slow.heartbeat([{ ...ref, progress: null, events: [] }]))[0]!.ok;
          if (index % 3 === 1) {
            return (await slow.appendLogs([{ ...ref, offset: 0, bytes: Buffer.from('x\n') }], 100))[0]!.ok;
          }
          return (await there.complete(ref)) === 'ok';
        };
        const take = async (): Promise<readonly GrantedLease[]> =>
          (await Promise.all(Array.from({ length: 8 }, () => there.lease(other, 3)))).flat();
        const taking = round % 2 === 0 ? take() : null;
        const [kept, taken] = await Promise.all([Promise.all(leases.map(writeUnder)), taking ?? take()]);
        const mine = new Set(leases.filter((_, index) => kept[index]).map(({ task }) => task.id));
        expect(taken.filter(({ task }) => mine.has(task.id))).toEqual([]);
        totals.resumed += mine.size;
        totals.taken += taken.length;
        for (const lease of [...leases, ...taken]) await there.complete(refOf(lease));
        const rest = await there.lease(other, 24);
        for (const lease of rest) expect(await there.complete(refOf(lease))).toBe('ok');
        const { job, receipts } = await there.job(jobId);
        expect(job.status).toBe('completed');
        const done = receipts.filter(({ outcome }) => outcome === 'completed');
        expect(new Set(done.map(({ task_id }) => task_id)).size).toBe(24);
        expect(done).toHaveLength(24);
      }
      expect(totals.resumed).toBeGreaterThan(0);
      expect(totals.taken).toBeGreaterThan(0);
      expect(await miscounts(server, database)).toEqual([]);
    });

    test('a node that asks both at once holds no more than it may', async () => {
      const [here, there] = scenes;
      const node = await here.node({ max: 5 });
      await here.submit(Array.from({ length: 50 }, (_, index) => ({ label: String(index) })));
      const answers = await Promise.all(
        Array.from({ length: 10 }, (_, index) => (index % 2 === 0 ? here : there).lease(node, 3)),
      );
      expect(answers.flat()).toHaveLength(5);
      expect((await two.getNode(node))?.active_leases).toBe(5);
    });

    /** Two nodes of each store take and complete until nothing is left; `onGiven` sees what is held after each lease. */
    async function drain(
      nodes: readonly string[],
      onHeld: (held: readonly GrantedLease[]) => void,
    ): Promise<readonly GrantedLease[]> {
      const held = new Set<GrantedLease>();
      const given: GrantedLease[] = [];
      const work = async (scene: Scene, node: string): Promise<void> => {
        for (let idle = 0; idle < 3;) {
          const leases = await scene.lease(node, 5);
          idle = leases.length === 0 ? idle + 1 : 0;
          for (const lease of leases) held.add(lease);
          given.push(...leases);
          onHeld([...held]);
          for (const lease of leases) {
            // No longer counted before it is ended, so that what is counted is held for sure.
            held.delete(lease);
            await scene.complete(refOf(lease));
          }
        }
      };
      await Promise.all(nodes.map((node, index) => work(scenes[index % 2]!, node)));
      return given;
    }

    test('leasing from both at once, a key never has more tasks held than its limit, and none is left behind', async () => {
      const [here] = scenes;
      const nodes = await Promise.all(Array.from({ length: 4 }, () => here.node({ max: 5 })));
      for (let key = 0; key < 6; key += 1) {
        await here.submit(
          Array.from({ length: 20 }, (_, index) => ({
            label: `${key}-${index}`,
            priority: index % 2,
            // Each limit is a gate of its own, so that more are shown to those who look than may go.
            concurrency: { key: `k${key}`, limit: 1 + (index % 3) },
          })),
        );
      }
      let fullest = 0;
      const given = await drain(nodes, (held) => {
        const counts = new Map<string, number>();
        for (const { task } of held) {
          const { key } = task.concurrency!;
          counts.set(key, (counts.get(key) ?? 0) + 1);
          expect(counts.get(key)).toBeLessThanOrEqual(3);
          fullest = Math.max(fullest, counts.get(key)!);
        }
      });
      expect(fullest).toBeGreaterThan(1);
      // Others may have ended while the last ones of a key were with somebody: what is left is given now.
      const rest = await drain(nodes.slice(0, 1), () => {});
      expect(new Set([...given, ...rest].map(({ task }) => task.id)).size).toBe(120);
      expect((await two.stats()).tasks).toMatchObject({ queued: 0, running: 0, completed: 120 });
      expect(await server.query(database, 'SELECT * FROM millrace.limit_keys')).toEqual([]);
      expect(await server.query(database, 'SELECT * FROM millrace.limit_gates')).toEqual([]);
      expect(await miscounts(server, database)).toEqual([]);
    }, 60_000);

    test('a node that asks both at once is never given more than it has', async () => {
      const [here, there] = scenes;
      const node = await here.node({ max: 1000, resources: { cpu: 4, gpu: 1 } });
      await here.submit([
        ...Array.from({ length: 30 }, (_, index) => ({ label: `s${index}`, resources: { cpu: 0.5 } })),
        ...Array.from({ length: 10 }, (_, index) => ({ label: `g${index}`, resources: { cpu: 1, gpu: 1 } })),
      ]);
      let given = 0;
      for (let round = 0; given < 40; round += 1) {
        expect(round).toBeLessThan(100);
        const leases = (
          await Promise.all(
            Array.from({ length: 6 }, (_, index) => (index % 2 === 0 ? here : there).lease(node, 4)),
          )
        ).flat();
        const sum = (name: string): number =>
          leases.reduce((total, { task }) => total + (task.resources?.[name] ?? 0), 0);
        expect(sum('cpu')).toBeLessThanOrEqual(4);
        expect(sum('gpu')).toBeLessThanOrEqual(1);
        expect((await two.getNode(node))?.resources_in_use?.['cpu'] ?? 0).toBe(sum('cpu'));
        given += leases.length;
        await Promise.all(
          leases.map((lease, index) => (index % 2 === 0 ? there : here).complete(refOf(lease))),
        );
      }
      expect((await one.stats()).tasks).toMatchObject({ queued: 0, completed: 40 });
    }, 60_000);

    test('a key that one frees wakes those who wait at the other', async () => {
      const [here, there] = scenes;
      const node = await here.node();
      const task = { concurrency: { key: 'k', limit: 1 } };
      await here.submit([
        { label: 'a', ...task },
        { label: 'b', ...task },
      ]);
      const lease = await here.take(node);
      expect(await there.lease(node)).toEqual([]);
      const woken = heard(two, ({ kind }) => kind === 'runnable');
      await here.complete(refOf(lease));
      await woken;
      expect(await there.lease(node)).toHaveLength(1);
    });

    test('what one commits, the other is told, and nobody hears of a change twice', async () => {
      const [here, there] = scenes;
      const own: StoreChange[] = [];
      using _ = one.subscribe((change) => own.push(change));
      const runnable = heard(two, ({ kind }) => kind === 'runnable');
      const known = heard(two, ({ kind }) => kind === 'job');
      const jobId = await here.submit();
      await runnable;
      expect(await known).toEqual({ kind: 'job', jobId });
      const node = await here.node();
      const lease = await there.take(node);
      const logs = heard(two, ({ kind }) => kind === 'logs');
      valueOf((await one.appendLogs([{ ...refOf(lease), offset: 0, bytes: Buffer.from('x\n') }], 100))[0]);
      expect(await logs).toEqual({ kind: 'logs', taskIds: [lease.task.id] });
      const cancel = heard(two, ({ kind }) => kind === 'cancel');
      await one.cancelJob(jobId);
      expect(await cancel).toEqual({ kind: 'cancel', leaseIds: [lease.leaseId] });
      expect(own.filter(({ kind }) => kind === 'runnable')).toHaveLength(1);
      expect(own.filter(({ kind }) => kind === 'cancel')).toHaveLength(1);
    });

    test('a listener that was cut off hears again, and is told to look at everything', async () => {
      const [here] = scenes;
      const looking = [one, two].map((store) => heard(store, ({ kind }) => kind === 'anything'));
      const cut = await server.query(
        'postgres',
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND query LIKE 'LISTEN%'",
        [database],
      );
      expect(cut).toHaveLength(2);
      // Told once they listen again, so what comes now is heard.
      await Promise.all(looking);
      const job = heard(two, ({ kind }) => kind === 'job');
      const jobId = await here.submit();
      expect(await job).toEqual({ kind: 'job', jobId });
    });

    test('a nonce is taken once, a setting made once, a key used once, by whichever comes first', async () => {
      const nonce = {
        nonce: 'n',
        wallet: '0x1',
        domain: 'd',
        uri: 'http://d',
        chainId: 1,
        issuedAt: new Date().toISOString(),
        expiresAtMs: Date.now() + 60_000,
      };
      await one.putNonce(nonce);
      const stores = Array.from({ length: 40 }, (_, index) => (index % 2 === 0 ? one : two));
      const taken = await Promise.all(stores.map((store) => store.takeNonce('n')));
      expect(taken.filter((answer) => answer !== null)).toEqual([nonce]);
      const settings = await Promise.all(stores.map((store, value) => store.setting('s', () => ({ value }))));
      expect(new Set(settings.map(({ value }) => value)).size).toBe(1);
      const job = { spec: jobOf([{}]), organizationId: null, idempotencyKey: 'k', submitter: 'me' };
      const jobs = (await Promise.all(stores.map((store) => store.submit([job]))))
        .flat()
        .map((answer) => valueOf(answer));
      expect(new Set(jobs.map(({ jobId }) => jobId)).size).toBe(1);
      expect(jobs.filter(({ created }) => created)).toHaveLength(1);
    });

    test('jobs are cancelled, failed and deleted under those who lease from them, without a deadlock', async () => {
      const [here, there] = scenes;
      const nodes = await Promise.all([here.node({ max: 10_000 }), there.node({ max: 10_000 })]);
      const deadlocks = async (): Promise<number> => {
        const [row] = await server.query<{ deadlocks: string }>(
          'postgres',
          'SELECT deadlocks FROM pg_stat_database WHERE datname = $1',
          [database],
        );
        return Number(row?.deadlocks);
      };
      const before = await deadlocks();
      const jobIds: string[] = [];
      for (let index = 0; index < 12; index += 1) {
        jobIds.push(
          await here.submit(
            Array.from({ length: 60 }, (_, task) => ({ label: String(task), max_attempts: 1 })),
          ),
        );
      }
      const enough = new AbortController();
      const work = async (scene: Scene, node: string, fails: boolean): Promise<void> => {
        for (let round = 0; !enough.signal.aborted; round += 1) {
          for (const lease of await scene.lease(node, 3)) {
            if (fails && round % 7 === 0) await scene.fail(refOf(lease));
            else if (round % 3 === 0) await scene.heartbeat(refOf(lease), round, ['x']);
            else await scene.complete(refOf(lease));
          }
        }
      };
      const working = [work(here, nodes[0], true), work(there, nodes[1], false), work(there, nodes[1], true)];
      const ending = jobIds.map(async (jobId, index) => {
        const store = index % 2 === 0 ? one : two;
        await store.cancelJob(jobId);
        await store.deleteJob(jobId).catch(() => {});
      });
      await Promise.all(ending);
      enough.abort();
      await Promise.all(working);
      expect(await deadlocks()).toBe(before);
      for (const jobId of jobIds) {
        const detail = await one.getJob(jobId);
        expect(detail?.tasks_summary.queued ?? 0).toBe(0);
      }
      expect(await miscounts(server, database)).toEqual([]);
    }, 60_000);
  });
});
