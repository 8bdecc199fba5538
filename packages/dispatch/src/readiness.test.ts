import type { Logger } from '@millrace/runner';
import { SimulatedClock } from '@millrace/runner/testing';
import { describe, expect, test } from 'vitest';
import { Harness, until } from './harness.test.support.ts';
import { PostgresServer, withoutPostgres } from './postgres.test.support.ts';
import { READINESS_KEPT_MS, READINESS_TIMEOUT_MS, ReadinessProbe } from './readiness.ts';
import { openPostgresStore } from './stores/postgres.ts';

function recording(lines: string[]): Logger {
  const log: Logger = {
    debug: () => {},
    info: (message, fields) => void lines.push(`${message} ${JSON.stringify(fields)}`),
    warn: (message, fields) => void lines.push(`${message} ${JSON.stringify(fields)}`),
    error: () => {},
    child: () => log,
  };
  return log;
}

/** A probe whose store answers what it is told to, and what it logs. */
function probing(look: () => Promise<null>): {
  readonly probe: ReadinessProbe;
  readonly clock: SimulatedClock;
  readonly lines: string[];
} {
  const clock = new SimulatedClock();
  const lines: string[] = [];
  const log = recording(lines);
  const blobs = { stat: () => Promise.resolve(null) };
  return { probe: new ReadinessProbe({ store: { getNode: look }, blobs, clock, log }), clock, lines };
}

test('a part that answers at the limit is ready, one that needs longer is not', async () => {
  for (const [delayMs, state] of [
    [READINESS_TIMEOUT_MS - 1, 'ok'],
    [READINESS_TIMEOUT_MS + 1, 'no answer'],
  ] as const) {
    const { probe, clock } = probing(
      () => new Promise((resolve) => void clock.setTimer(() => resolve(null), delayMs)),
    );
    const answer = probe.check();
    await clock.advance(READINESS_TIMEOUT_MS);
    expect(await answer).toEqual({ store: state, blobs: 'ok' });
  }
});

test('whoever asks often is given the same answer for a while', async () => {
  let asked = 0;
  const { probe, clock } = probing(() => {
    asked += 1;
    return Promise.resolve(null);
  });
  await probe.check();
  await clock.advance(READINESS_KEPT_MS - 1);
  await probe.check();
  expect(asked).toBe(1);
  await clock.advance(1);
  await probe.check();
  expect(asked).toBe(2);
});

test('what is wrong is logged when it begins and when it is over, and is not answered', async () => {
  let works = false;
  const { probe, clock, lines } = probing(() =>
    works ? Promise.resolve(null) : Promise.reject(new Error('host db.internal refused')),
  );
  for (let round = 0; round < 3; round += 1) {
    expect(await probe.check()).toEqual({ store: 'failed', blobs: 'ok' });
    await clock.advance(READINESS_KEPT_MS);
  }
  works = true;
  expect(await probe.check()).toEqual({ store: 'ok', blobs: 'ok' });
  expect(lines).toEqual([
    'part does not answer; not ready {"part":"store","state":"failed","error":"Error: host db.internal refused"}',
    'part answers again {"part":"store"}',
  ]);
});

test('a dispatcher with its database and its folder is ready', async () => {
  await using server = await Harness.open();
  const answer = await server.call('GET', '/ready', { token: null });
  expect([answer.status, answer.body]).toEqual([200, { status: 'ok', store: 'ok', blobs: 'ok' }]);
});

describe.skipIf(withoutPostgres())('with a database server', () => {
  test('a dispatcher whose database is gone is up and not ready, until it is back', async () => {
    await using postgres = await PostgresServer.start();
    const store = await openPostgresStore({ url: postgres.url(await postgres.createDatabase()) });
    await using server = await Harness.open({ store });
    const ready = async (): Promise<number> => (await server.call('GET', '/ready', { token: null })).status;
    expect(await ready()).toBe(200);
    await postgres.kill();
    await until(async () => (await ready()) === 503);
    const { body } = await server.call('GET', '/ready', { token: null });
    expect(body).toMatchObject({ status: 'unavailable', blobs: 'ok' });
    expect((await server.call('GET', '/health', { token: null })).status).toBe(200);
    await postgres.start();
    await until(async () => (await ready()) === 200, 30_000);
  }, 60_000);
});
