/** Two dispatchers on one PostgreSQL database, as their users see them. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Harness, until } from './harness.test.support.ts';
import { PostgresServer, withoutPostgres } from './postgres.test.support.ts';
import { openPostgresStore } from './stores/postgres.ts';

describe.skipIf(withoutPostgres())('two dispatchers on one database', () => {
  let server: PostgresServer;
  let one: Harness;
  let two: Harness;

  beforeAll(async () => {
    server = await PostgresServer.start();
    const url = server.url(await server.createDatabase());
    [one, two] = await Promise.all([
      Harness.open({ store: await openPostgresStore({ url }) }),
      Harness.open({ store: await openPostgresStore({ url }) }),
    ]);
  });

  afterAll(async () => {
    await one[Symbol.asyncDispose]();
    await two[Symbol.asyncDispose]();
    await server[Symbol.asyncDispose]();
  });

  test('tokens, nodes, waiting requests, results and events cross from one to the other', async () => {
    // A node that registered and logged in at one is known to the other, by the same token.
    const { token } = await one.joinNode({ maxConcurrency: 2 });
    const waiting = two.call('GET', '/v1/tasks', { token, headers: { prefer: 'wait=20' } });
    await until(async () =>
      /^millrace_lease_waiters 1$/m.test((await two.call('GET', '/metrics', { token: null })).text),
    );
    const started = performance.now();
    const jobId = await one.submit();
    const lease = await waiting;
    expect([lease.status, lease.body.task.job_id]).toEqual([200, jobId]);
    // The dispatcher where the node waits heard of it; its periodic look comes every 5 s.
    expect(performance.now() - started).toBeLessThan(4000);

    const watched = two.call('GET', `/v1/jobs/${jobId}/events`, { headers: { accept: 'text/event-stream' } });
    const done = await one.call('POST', `/v1/tasks/${lease.body.task.id}/complete`, {
      token,
      json: { output_cids: [], meta: {} },
    });
    expect(done.status).toBe(200);
    // The stream ends with the job, whoever was told of its end.
    const { text } = await watched;
    const kinds = text
      .split('\n')
      .flatMap((line) => (line.startsWith('data: ') ? [JSON.parse(line.slice(6)).kind] : []));
    expect(kinds.slice(-2)).toEqual(['task.completed', 'job.completed']);
  });

  test('who watches a lease at one hears at once that it was cancelled at the other', async () => {
    const { token } = await one.joinNode();
    const jobId = await two.submit();
    const lease = await one.call('GET', '/v1/tasks', { token });
    const leaseId = lease.header('millrace-lease-id');
    const watching = one.call('POST', '/v1/tasks/watch', {
      token,
      json: { lease_ids: [leaseId] },
      headers: { prefer: 'wait=20' },
    });
    await two.call('POST', `/v1/jobs/${jobId}/cancel`, { json: {} });
    const started = performance.now();
    const { body } = await watching;
    expect(body.lease_ids).toEqual([leaseId]);
    expect(performance.now() - started).toBeLessThan(4000);
  });
});
