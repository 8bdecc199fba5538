import { createServer } from 'node:net';
import { once } from 'node:events';
import { MillraceError, describeError } from '@millrace/runner';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { PostgresServer, miscounts, withoutPostgres } from '../postgres.test.support.ts';
import { readMigrations } from './migrations.ts';
import { openPostgresStore } from './postgres.ts';
import type { PostgresStoreOptions } from './postgres.ts';
import { Scene, refOf } from './suite.ts';

/** The error an open ends with, and everything that could be said about it. */
async function refusal(
  options: PostgresStoreOptions,
): Promise<{ code: string; message: string; all: string }> {
  try {
    const store = await openPostgresStore(options);
    await store[Symbol.asyncDispose]();
  } catch (error) {
    if (!MillraceError.is(error)) throw error;
    return { code: error.code, message: error.message, all: `${error.stack} ${describeError(error)}` };
  }
  throw new Error('the store opened');
}

describe('what is asked for', () => {
  test.each([
    ['nonsense', /is no URL/],
    ['postgres://user:secret@:99999999/x', /is no URL/],
    ['mysql://user:secret@host/x', /must be postgres:\/\/…, got a URL with "mysql:"/],
    ['postgres://user:secret@host/x?options=-c%20jit%3Don', /has the parameter options/],
    ['postgres://user:secret@host', /names no database/],
    ['postgres://user:secret@host/', /names no database/],
  ])('%s is refused without being repeated', async (url, message) => {
    const { code, message: said, all } = await refusal({ url });
    expect([code, said]).toEqual(['invalid_argument', expect.stringMatching(message)]);
    expect(all).not.toContain('secret');
  });

  test('a store needs at least 6 connections', async () => {
    const { code, message } = await refusal({ url: 'postgres://host/x', connections: 5 });
    expect([code, message]).toEqual([
      'invalid_argument',
      'connections must be an integer of at least 6, got 5',
    ]);
  });

  test('a port nobody listens on is unavailable, and named', async () => {
    const probe = createServer().listen(0, '127.0.0.1');
    await once(probe, 'listening');
    const { port } = probe.address() as { port: number };
    probe.close();
    await once(probe, 'close');
    const { code, message, all } = await refusal({ url: `postgres://me:secret@127.0.0.1:${port}/jobs` });
    expect(code).toBe('unavailable');
    expect(message).toContain(`"jobs" at 127.0.0.1:${port} (user me) cannot be reached`);
    expect(all).not.toContain('secret');
  });
});

describe.skipIf(withoutPostgres())('a real server', () => {
  let server: PostgresServer;

  beforeAll(async () => {
    server = await PostgresServer.start();
  });

  afterAll(async () => {
    await server[Symbol.asyncDispose]();
  });

  const urlOf = (database: string, user: string, password: string): string =>
    `postgres://${user}:${password}@127.0.0.1:${server.port}/${database}`;

  test('five stores that start at once on an empty database make the tables once, and all work', async () => {
    const database = await server.createDatabase({ empty: true });
    const stores = await Promise.all(
      Array.from({ length: 5 }, () => openPostgresStore({ url: server.url(database), connections: 6 })),
    );
    const ids = await Promise.all(stores.map((store) => new Scene(store).submit()));
    expect(new Set(ids).size).toBe(5);
    for (const store of stores) expect((await store.stats()).jobs.pending).toBe(5);
    await Promise.all(stores.map((store) => store[Symbol.asyncDispose]()));
    const rows = await server.query<{ id: number }>(
      database,
      'SELECT id FROM millrace.migrations ORDER BY id',
    );
    expect(rows.map(({ id }) => id)).toEqual([...new Set(rows.map(({ id }) => id))]);
  });

  test('a socket of this machine will do, named by its folder', async () => {
    const database = await server.createDatabase();
    const host = encodeURIComponent(server.socketFolder);
    const url = `postgres://millrace:${encodeURIComponent(server.password)}@/${database}?host=${host}&port=${server.port}`;
    await using store = await openPostgresStore({ url });
    await new Scene(store).submit();
    const wrong = await refusal({ url: url.replace(database, 'none') });
    expect(wrong.message).toContain(`"none" at ${server.socketFolder} (user millrace)`);
  });

  test('what was written is there when the store opens again', async () => {
    const database = await server.createDatabase();
    const first = await openPostgresStore({ url: server.url(database) });
    const jobId = await new Scene(first).submit();
    await first[Symbol.asyncDispose]();
    await using again = await openPostgresStore({ url: server.url(database) });
    expect((await again.getJob(jobId))?.job.id).toBe(jobId);
  });

  test('a database that a newer or another Millrace wrote is refused', async () => {
    const database = await server.createDatabase();
    await server.query(database, "INSERT INTO millrace.migrations VALUES (9999, '9999-future.sql', '')");
    expect(await refusal({ url: server.url(database) })).toMatchObject({
      code: 'failed_precondition',
      message: expect.stringMatching(/written by a newer Millrace \(it has migration 9999-future\.sql\)/),
    });
    await server.query(
      database,
      "DELETE FROM millrace.migrations WHERE id = 9999; UPDATE millrace.migrations SET checksum = 'x'",
    );
    expect(await refusal({ url: server.url(database) })).toMatchObject({
      code: 'failed_precondition',
      message: expect.stringMatching(/different migration 0001-initial\.sql/),
    });
  });

  describe('a database that was last used when each task was a row', () => {
    const ID = (part: string): string => `0192f000-0000-7000-8000-${part.padStart(12, '0')}`;
    const DOMAIN = ID('d0');
    const AT = 1_800_000_000_000;

    /** The tables as they were then, with two jobs of `count` tasks and one in two stages. */
    async function earlier(count: number): Promise<string> {
      const database = await server.createDatabase({ empty: true });
      const client = (text: string, values: unknown[] = []) => server.query(database, text, values);
      await client(
        'CREATE SCHEMA millrace; CREATE TABLE millrace.migrations (id integer PRIMARY KEY, name text NOT NULL, checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())',
      );
      for (const { id, name, checksum, sql } of readMigrations('postgres').slice(0, 2)) {
        await client(`SET search_path = millrace; ${sql}`);
        await client('INSERT INTO millrace.migrations VALUES ($1, $2, $3)', [id, name, checksum]);
      }
      await client(`
        SET search_path = millrace;
        INSERT INTO queues (key, capability, filters, mode, organization_id) VALUES ('k', '/test/work/v1', '{}', 'public', 'org-1');
        INSERT INTO jobs (seq, id, domain_id, organization_id, priority, created_at, task_count, cache, status, updated_at, last_event,
          queued, leased, running, completed, failed, canceled)
        VALUES (1, '${ID('1')}', '${DOMAIN}', 'org-1', 0, ${AT}, ${count}, false, 'running', ${AT}, 2, ${count - 4}, 0, 1, 1, 1, 1),
          (2, '${ID('2')}', '${DOMAIN}', 'org-1', 0, ${AT}, 2, false, 'running', ${AT}, 0, 1, 0, 1, 0, 0, 0);
        SELECT setval('job_numbers', 2);
        INSERT INTO job_specs VALUES (1, '{/test/work/v1}', '{"label":"one","meta":{"edges":[],"traceparent":"no"},"edges":[],"traceparent":"00-yes"}'),
          (2, '{/test/work/v1}', '{"label":"two","meta":{},"edges":[{"from":"a","to":"b"}]}');
        INSERT INTO tasks SELECT 1, i, 'task-' || i, 0, 1, i % 2, 3, NULL, 't' || i,
          json_build_array('t' || i, 't' || i, '[]'::json, NULL, CASE i WHEN 5 THEN json_build_object('t', repeat('x', 2000)) ELSE '{"n":"\\u0000"}' END)
          FROM generate_series(0, ${count - 1}) AS i;
        INSERT INTO open_tasks (job_seq, no, queue_id, rank, state, attempts, node_faults, drains, updated_at)
          SELECT 1, i, 1, - (i % 2), 'ready', 0, 0, 0, ${AT} FROM generate_series(4, ${count - 1}) AS i;
        INSERT INTO open_tasks (job_seq, no, queue_id, rank, state, wake_at, attempts, node_faults, drains, lease_id, node_id,
          leased_at, lease_expires_at, updated_at)
          VALUES (1, 0, 1, 0, 'running', ${AT * 2}, 2, 0, 0, 'lease-0', 'node', ${AT}, ${AT * 2}, ${AT}),
            (2, 0, 1, 0, 'running', ${AT * 2}, 1, 0, 0, 'lease-a', 'node', ${AT}, ${AT * 2}, ${AT});
        INSERT INTO attempts VALUES
          (1, 0, 1, 'lease-was', 'node', 'failed', '[]', '{"why":"x"}', 'broke', ${AT}, ${AT}),
          (1, 1, 1, 'lease-1', 'node', 'completed', '["out"]', '{"z":"\\u0000"}', NULL, ${AT - 5}, ${AT}),
          (1, 2, 1, 'lease-2', 'node', 'failed', '[]', 'null', 'gone', ${AT}, ${AT});
        INSERT INTO ended_tasks (job_seq, no, state, attempts, node_faults, drains, updated_at, reason) VALUES
          (1, 1, 'completed', 1, 0, 0, ${AT}, NULL), (1, 2, 'failed', 1, 0, 0, ${AT}, 'he said "no"'),
          (1, 3, 'canceled', 0, 0, 0, ${AT}, NULL);
        INSERT INTO events VALUES (1, 2, 2, ${AT}, '[[0,0,-1,{"tasks":${count}}],[5,7,1,{"node_id":"node","attempt":1,"lease_id":"lease-1"}]]');
        INSERT INTO stages VALUES (2, 1, 'a', 0, 0, 1, 0), (2, 2, 'b', 1, 1, 1, 1);
        INSERT INTO stage_edges VALUES (2, 1, 2);
        INSERT INTO tasks VALUES (2, 0, 'task-a', 1, 1, 0, 3, NULL, 'a', '["a","a",[],null,{}]'),
          (2, 1, 'task-b', 2, 1, 0, 3, NULL, 'b', '["b","b",["stage:a"],null,{}]');
        INSERT INTO open_tasks (job_seq, no, queue_id, rank, state, attempts, node_faults, drains, updated_at)
          VALUES (2, 1, 1, 0, 'blocked', 0, 0, 0, ${AT});
        INSERT INTO writers (id, serial, at, queued, running, completed, failed, canceled, jobs_running)
          VALUES ('w', 1, ${AT}, ${count - 3}, 2, 1, 1, 1, 2)`);
      return database;
    }

    test('has all it had, and goes on', async () => {
      const database = await earlier(150);
      await using store = await openPostgresStore({ url: server.url(database) });
      expect(await miscounts(server, database)).toEqual([]);
      const detail = await store.getJob(ID('1'));
      expect(detail?.tasks.map(({ id }) => id)).toEqual(Array.from({ length: 150 }, (_, no) => `task-${no}`));
      expect(detail?.tasks.slice(0, 6).map(({ status, reason }) => [status, reason])).toEqual([
        ['running', null],
        ['completed', null],
        ['failed', 'he said "no"'],
        ['canceled', null],
        ['queued', null],
        ['queued', null],
      ]);
      expect(detail?.tasks[5]).toMatchObject({ label: 't5', priority: 1, meta: { t: 'x'.repeat(2000) } });
      expect(detail?.tasks[1]).toMatchObject({ output_cids: ['out'], meta: { n: '\0' } });
      expect(detail?.receipts.map(({ id, outcome, meta }) => [id, outcome, meta])).toEqual([
        ['lease-was', 'failed', { why: 'x' }],
        ['lease-1', 'completed', { z: '\0' }],
        ['lease-2', 'failed', null],
      ]);
      expect((await store.events(ID('1'), 0, 10))?.map(({ task_id, data }) => [task_id, data])).toEqual([
        [null, { tasks: 150 }],
        ['task-1', { node_id: 'node', attempt: 1, lease_id: 'lease-1' }],
      ]);
      const dead = { domainId: null, jobId: null, capability: '/test/work/v1', limit: 9, cursor: null };
      expect((await store.deadTasks(dead)).items.map(({ id }) => id)).toEqual(['task-2']);

      // Leases of then are current, and their endings repeated are harmless.
      const ref = (taskId: string, leaseId: string) => ({ taskId, leaseId, nodeId: 'node' });
      const done = { outputCids: ['made'], meta: null };
      for (const lease of [ref('task-0', 'lease-0'), ref('task-a', 'lease-a'), ref('task-1', 'lease-1')]) {
        expect((await store.complete([{ ...lease, ...done }]))[0]).toMatchObject({ ok: true });
      }
      const scene = new Scene(store);
      const node = await scene.node({ max: 1000 });
      const leases = await scene.lease(node, 1000);
      expect(leases).toHaveLength(147);
      expect(leases.slice(0, 2).map(({ task }) => task.id)).toEqual(['task-5', 'task-7']);
      expect(leases.find(({ task }) => task.id === 'task-5')?.traceparent).toBe('00-yes');
      expect(leases.find(({ task }) => task.id === 'task-b')?.task.inputs_cids).toEqual(['made']);
      await store.complete(leases.map((lease) => ({ ...refOf(lease), ...done })));
      expect((await store.getJob(ID('2')))?.job.status).toBe('completed');
      expect((await store.getTask('task-149'))?.status).toBe('completed');
      expect(await miscounts(server, database)).toEqual([]);
      expect([await store.deleteJob(ID('1')), await store.deleteJob(ID('2'))]).toEqual([true, true]);
      expect(await store.getTask('task-149')).toBeNull();
      for (const table of [
        'task_ids',
        'task_blocks',
        'task_specs',
        'ended_runs',
        'attempts',
        'open_tasks',
        'fresh',
      ]) {
        expect([table, await server.query(database, `SELECT 1 FROM millrace.${table}`)]).toEqual([table, []]);
      }
    });
  });

  test('a wrong password, user or database is told apart, and no password is told', async () => {
    const wrong = await refusal({ url: urlOf('postgres', 'millrace', 'wrong-secret') });
    expect(wrong).toMatchObject({
      code: 'unauthenticated',
      message: expect.stringMatching(/refused the user or the password/),
    });
    expect(wrong.all).not.toContain('wrong-secret');
    expect(await refusal({ url: urlOf('postgres', 'nobody', 'wrong-secret') })).toMatchObject({
      code: 'unauthenticated',
    });
    const missing = await refusal({ url: server.url('no_such_database') });
    expect(missing).toMatchObject({
      code: 'failed_precondition',
      message: expect.stringMatching(
        /database "no_such_database" at 127\.0\.0\.1:\d+ \(user millrace\) does not exist/,
      ),
    });
    expect(missing.all).not.toContain(server.password);
  });

  test('a user who may not make tables is refused and leaves nothing; one who may only use them is enough', async () => {
    const database = await server.createDatabase({ empty: true });
    await server.query('postgres', "CREATE ROLE plain LOGIN PASSWORD 'plain'");
    const url = urlOf(database, 'plain', 'plain');
    expect(await refusal({ url })).toMatchObject({
      code: 'permission_denied',
      message: expect.stringMatching(/lacks a right \(permission denied for database/),
    });
    expect(await server.query(database, "SELECT 1 FROM pg_namespace WHERE nspname = 'millrace'")).toEqual([]);

    const owner = await openPostgresStore({ url: server.url(database) });
    await owner[Symbol.asyncDispose]();
    expect(await refusal({ url })).toMatchObject({ code: 'permission_denied' });
    await server.query(
      database,
      'GRANT USAGE ON SCHEMA millrace TO plain; GRANT SELECT ON ALL TABLES IN SCHEMA millrace TO plain',
    );
    expect(await refusal({ url })).toMatchObject({
      code: 'permission_denied',
      message: expect.stringMatching(/lacks rights in the schema millrace \(INSERT on /),
    });
    await server.query(
      database,
      `GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA millrace TO plain;
       GRANT USAGE ON ALL SEQUENCES IN SCHEMA millrace TO plain`,
    );
    await using store = await openPostgresStore({ url });
    const scene = new Scene(store);
    const jobId = await scene.submit();
    await scene.complete({
      taskId: (await scene.take(await scene.node())).task.id,
      nodeId: (await store.listNodes())[0]!.id,
      leaseId: null,
    });
    expect((await store.getJob(jobId))?.job.status).toBe('completed');
  });

  test('a database that is not UTF-8 is refused', async () => {
    await server.query(
      'postgres',
      "CREATE DATABASE ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0",
    );
    expect(await refusal({ url: server.url('ascii') })).toMatchObject({
      code: 'failed_precondition',
      message: expect.stringMatching(/has the encoding SQL_ASCII; Millrace needs UTF8/),
    });
  });

  test('a user with synchronous_commit off still gets durable commits', async () => {
    const database = await server.createDatabase();
    await server.query('postgres', `ALTER DATABASE ${database} SET synchronous_commit = off`);
    await using store = await openPostgresStore({ url: server.url(database) });
    await store.stats();
    const rows = await server.query<{ query: string }>(database, 'SHOW synchronous_commit');
    expect(rows).toEqual([{ synchronous_commit: 'off' }]);
    await server.query(database, 'CREATE TABLE public.seen (value text)');
    // Whatever the store writes, a trigger sees the setting it writes under.
    await server.query(
      database,
      `CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN INSERT INTO public.seen VALUES (current_setting('synchronous_commit')); RETURN NEW; END $$;
       CREATE TRIGGER note BEFORE INSERT ON millrace.jobs FOR EACH ROW EXECUTE FUNCTION public.note()`,
    );
    await new Scene(store).submit();
    expect(await server.query(database, 'SELECT value FROM public.seen')).toEqual([{ value: 'on' }]);
  });
});
