import { SimulatedClock } from '@millrace/runner/testing';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { parseJobSpec } from './job-spec.ts';
import { Signals } from './signals.ts';
import { SSE_HEARTBEAT_MS, eventStream } from './sse.ts';
import type { Store } from './store.ts';
import { openSqliteStore } from './stores/sqlite.ts';

const DOMAIN = '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21';

let clock: SimulatedClock;
let store: Store;
let signals: Signals;
let jobId: string;

beforeEach(async () => {
  clock = new SimulatedClock();
  store = await openSqliteStore({ path: ':memory:', clock });
  signals = new Signals(store);
  jobId = await submit();
});
afterEach(async () => {
  signals[Symbol.dispose]();
  await store[Symbol.asyncDispose]();
});

async function submit(tasks = 1): Promise<string> {
  const spec = parseJobSpec(
    { tasks: Array.from({ length: tasks }, () => ({ capability: '/c/v1', meta: {} })) },
    { defaultDomainId: DOMAIN, maxTasks: 5000, now: clock.now() },
  );
  const [outcome] = await store.submit([
    { spec, organizationId: null, idempotencyKey: null, submitter: 's' },
  ]);
  if (!outcome?.ok) throw new Error('not submitted');
  return outcome.value.jobId;
}

function open(signal = new AbortController().signal, id = jobId, after = 0) {
  return eventStream({ store, signals, clock, jobId: id, after, signal });
}

function seqs(text: string): number[] {
  return [...text.matchAll(/^id: (\d+)$/gm)].map(([, seq]) => Number(seq));
}

describe('eventStream', () => {
  test('says that it is connected, then what happened, then what happens', async () => {
    const stream = open();
    expect((await stream.next()).value).toBe(': connected\n\n');
    const past = (await stream.next()).value as string;
    const known = await store.events(jobId, 0, 100);
    expect(past).toBe(known!.map((event) => `id: ${event.seq}\ndata: ${JSON.stringify(event)}\n\n`).join(''));
    const live = stream.next();
    await store.cancelJob(jobId);
    expect(((await live).value as string).includes('job.canceled')).toBe(true);
    expect(await stream.next()).toEqual({ done: true, value: undefined });
  });

  test('a silent job has a comment every fifteen seconds', async () => {
    const stream = open();
    await stream.next();
    await stream.next();
    for (let round = 0; round < 2; round += 1) {
      let said: unknown = null;
      const next = stream.next().then(({ value }) => (said = value));
      await clock.advance(SSE_HEARTBEAT_MS - 1);
      expect(said).toBeNull();
      await clock.advance(1);
      await next;
      expect(said).toBe(': alive\n\n');
    }
    await stream.return();
  });

  test('a job with more events than one page comes whole and in order', async () => {
    const large = await submit(1300);
    await store.cancelJob(large);
    let text = '';
    for await (const chunk of open(undefined, large)) text += chunk;
    const all = seqs(text);
    expect(all.length).toBeGreaterThan(1300);
    expect(all).toEqual(all.map((_, index) => index + 1));
  });

  test('an abort ends it in the middle of a wait', async () => {
    const controller = new AbortController();
    const stream = open(controller.signal);
    await stream.next();
    await stream.next();
    const next = stream.next();
    controller.abort();
    expect((await next).value).toBe(': closing\n\n');
    expect((await stream.next()).done).toBe(true);
    expect(clock.pending).toBe(0);
  });

  test('a deleted job ends it', async () => {
    const stream = open();
    await stream.next();
    await stream.next();
    const next = stream.next();
    await store.deleteJob(jobId);
    await clock.advance(SSE_HEARTBEAT_MS);
    let last = await next;
    while (!last.done) last = await stream.next();
    expect(last.done).toBe(true);
  });
});
