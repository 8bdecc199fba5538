import { createServer } from 'node:net';
import { once } from 'node:events';
import { MillraceError, describeError } from '@millrace/runner';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { PostgresServer, withoutPostgres } from '../postgres.test.support.ts';
import { openPostgresStore } from './postgres.ts';
import type { PostgresStoreOptions } from './postgres.ts';
import { Scene } from './suite.ts';

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
