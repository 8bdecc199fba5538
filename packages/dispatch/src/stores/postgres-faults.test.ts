/**
 * Faults for real: the server killed, connections cut, while several dispatchers work. Nothing that was acknowledged is
 * lost, nothing is done twice, although no submission has an idempotency key.
 *
 * `MILLRACE_FAULT_ROUNDS` multiplies the rounds; their count is printed.
 */
import { MillraceError } from '@millrace/runner';
import { seededRandom } from '@millrace/runner/testing';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { PostgresServer, miscounts, withoutPostgres } from '../postgres.test.support.ts';
import type { Store } from '../store.ts';
import { openPostgresStore } from './postgres.ts';
import { Scene, jobOf, refOf, valueOf } from './suite.ts';

const FACTOR = Number(process.env['MILLRACE_FAULT_ROUNDS'] ?? 1);
const KILLS = Math.max(1, Math.round(3 * FACTOR));
const CUTTING_MS = 4_000 * FACTOR;

const pause = (ms: number): Promise<void> => new Promise((resolve) => void setTimeout(resolve, ms));

describe.skipIf(withoutPostgres())('faults', () => {
  let server: PostgresServer;
  let database: string;
  const stores: Store[] = [];
  const counts: string[] = [];
  const counted = (fault: string, tried: number): void => {
    counts.push(`faults, PostgreSQL store: ${fault}: ${tried} rounds, 0 losses`);
  };

  beforeAll(async () => {
    server = await PostgresServer.start({ fsync: true });
  });

  afterAll(async () => {
    for (const line of counts) process.stdout.write(`${line}\n`);
    await server[Symbol.asyncDispose]();
  });

  beforeEach(async () => {
    database = await server.createDatabase();
  });

  afterEach(async () => {
    await Promise.all(stores.splice(0).map((store) => store[Symbol.asyncDispose]()));
    await server.dropDatabase(database);
  });

  async function open(seed: number, patienceMs: number): Promise<Store> {
    const store = await openPostgresStore({
      url: server.url(database),
      random: seededRandom(seed),
      patienceMs,
    });
    stores.push(store);
    return store;
  }

  /** What was acknowledged. */
  interface Ledger {
    readonly jobs: Set<string>;
    readonly tasks: Set<string>;
    /** Task ids, once for each acknowledged completion. */
    readonly completed: string[];
    readonly items: Set<string>;
  }

  /** Submits jobs of three tasks and works them off through one store until told to stop, then to the end. */
  async function load(store: Store, name: string, ledger: Ledger, stop: AbortSignal): Promise<void> {
    const scene = new Scene(store);
    const node = await scene.node({ max: 50 });
    for (let round = 0; ; round += 1) {
      if (!stop.aborted) {
        const jobs = Array.from({ length: 2 }, () => ({
          spec: jobOf([{}, {}, {}], { label: name }),
          organizationId: 'org-1',
          idempotencyKey: null,
          submitter: name,
        }));
        for (const outcome of await store.submit(jobs)) ledger.jobs.add(valueOf(outcome).jobId);
        const [item] = await store.putData([
          {
            domainId: 'domain',
            id: null,
            name: `${name} ${round}`,
            dataType: 'binary',
            digest: `sha256:${'1'.repeat(64)}`,
            size: 1,
            lease: null,
            replaceByName: false,
          },
        ]);
        ledger.items.add(item!.id);
      }
      const leases = await scene.lease(node, 6);
      if (leases.length === 0 && stop.aborted) return;
      for (const { task } of leases) {
        // Given once, whichever store gave it.
        expect(ledger.tasks.has(task.id)).toBe(false);
        ledger.tasks.add(task.id);
      }
      await Promise.all(leases.map((lease) => scene.heartbeat(refOf(lease), round, [{ round }])));
      const outcomes = await store.complete(
        leases.map((lease) => ({ ...refOf(lease), outputCids: [lease.leaseId], meta: null })),
      );
      for (const [index, outcome] of outcomes.entries()) {
        valueOf(outcome);
        ledger.completed.push(leases[index]!.task.id);
      }
    }
  }

  async function expectNothingLostOrDoubled(store: Store, ledger: Ledger): Promise<void> {
    const jobs = await server.query<{ id: string }>(database, 'SELECT id FROM millrace.jobs');
    expect(new Set(jobs.map(({ id }) => id))).toEqual(ledger.jobs);
    const items = await server.query<{ id: string }>(database, 'SELECT id FROM millrace.data');
    expect(new Set(items.map(({ id }) => id))).toEqual(ledger.items);
    expect(ledger.completed).toHaveLength(ledger.jobs.size * 3);
    expect(new Set(ledger.completed).size).toBe(ledger.completed.length);
    const [heartbeats] = await server.query<{ logs: number }>(
      database,
      'SELECT count(*)::int AS logs FROM millrace.attempts WHERE attempt > 1',
    );
    // No lease was given and then forgotten.
    expect(heartbeats).toEqual({ logs: 0 });
    for (const jobId of ledger.jobs) {
      const events = (await store.events(jobId, 0, 1000)) ?? [];
      const kinds = events.map(({ kind }) => kind);
      for (const kind of ['task.leased', 'task.log', 'task.progress', 'task.completed']) {
        expect([kind, kinds.filter((other) => other === kind).length]).toEqual([kind, 3]);
      }
    }
    expect(await miscounts(server, database)).toEqual([]);
  }

  const emptyLedger = (): Ledger => ({ jobs: new Set(), tasks: new Set(), completed: [], items: new Set() });

  test(
    'all connections cut, again and again, under the load of two dispatchers',
    async () => {
      const [one, two] = [await open(1, 30_000), await open(2, 30_000)];
      const ledger = emptyLedger();
      const stop = new AbortController();
      const working = [load(one, 'one', ledger, stop.signal), load(two, 'two', ledger, stop.signal)];
      let cut = 0;
      let rounds = 0;
      for (const until = Date.now() + CUTTING_MS; Date.now() < until; rounds += 1) {
        cut += await server.cutConnections(database);
        await pause(40);
      }
      stop.abort();
      await Promise.all(working);
      expect(cut).toBeGreaterThan(rounds);
      expect(ledger.jobs.size).toBeGreaterThan(0);
      await expectNothingLostOrDoubled(one, ledger);
      counted('all connections of two dispatchers cut', rounds);
    },
    120_000 * FACTOR,
  );

  test(
    `the server killed and started again, ${KILLS} times, under the load of two dispatchers`,
    async () => {
      const [one, two] = [await open(1, 60_000), await open(2, 60_000)];
      const ledger = emptyLedger();
      const stop = new AbortController();
      const working = [load(one, 'one', ledger, stop.signal), load(two, 'two', ledger, stop.signal)];
      for (let round = 0; round < KILLS; round += 1) {
        const before = ledger.completed.length;
        while (ledger.completed.length < before + 20) await pause(10);
        await server.kill();
        await server.start();
      }
      stop.abort();
      await Promise.all(working);
      await expectNothingLostOrDoubled(one, ledger);
      counted('SIGKILL of PostgreSQL under two dispatchers', KILLS);
    },
    120_000 * FACTOR,
  );

  test('a server that stays away is unavailable after the patience given, and welcome when it is back', async () => {
    const store = await open(1, 300);
    const scene = new Scene(store);
    const jobId = await scene.submit();
    // Nothing is under way: idle connections lose their server, and the process goes on.
    await server.stop();
    for (const call of [() => store.getJob(jobId), () => scene.submit(), () => store.takeNonce('x')]) {
      const error = await call().then(
        () => null,
        (reason: unknown) => reason,
      );
      expect(MillraceError.is(error) && [error.code, error.retryable]).toEqual(['unavailable', true]);
      expect(String(error)).not.toContain(server.password);
    }
    await server.start();
    expect((await store.getJob(jobId))?.job.id).toBe(jobId);
    await scene.submit();
    expect((await store.stats()).jobs.pending).toBe(2);
  }, 60_000);

  test('a full disk refuses what would write, keeps what was written, and passes', async () => {
    const store = await open(1, 1000);
    const scene = new Scene(store);
    const jobId = await scene.submit();
    // As the server says it when a file cannot grow.
    await server.query(
      database,
      `CREATE FUNCTION millrace.full() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$;
       CREATE TRIGGER full_disk BEFORE INSERT ON millrace.jobs FOR EACH ROW EXECUTE FUNCTION millrace.full()`,
    );
    const refused = await Promise.all(
      [scene.submit(), scene.submit()].map((call) => call.catch((error: unknown) => error)),
    );
    for (const error of refused) expect(MillraceError.is(error) && error.code).toBe('resource_exhausted');
    expect((await store.getJob(jobId))?.job.status).toBe('pending');
    await server.query(database, 'DROP TRIGGER full_disk ON millrace.jobs');
    await scene.submit();
    expect(await miscounts(server, database)).toEqual([]);
  });

  test('one call that cannot be stored is refused alone, those that shared its transaction are not', async () => {
    const store = await open(1, 1000);
    const [good, bad, alsoGood] = await Promise.allSettled([
      store.submit([{ spec: jobOf([{}]), organizationId: 'org', idempotencyKey: null, submitter: 'me' }]),
      store.submit([{ spec: jobOf([{}]), organizationId: 'o\0rg', idempotencyKey: null, submitter: 'me' }]),
      store.submit([{ spec: jobOf([{}]), organizationId: 'org', idempotencyKey: null, submitter: 'me' }]),
    ]);
    expect([good.status, bad.status, alsoGood.status]).toEqual(['fulfilled', 'rejected', 'fulfilled']);
    expect(bad.status === 'rejected' && MillraceError.is(bad.reason) && bad.reason.code).toBe(
      'invalid_argument',
    );
    expect((await store.stats()).jobs.pending).toBe(2);
  });
});
