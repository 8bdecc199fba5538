import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import {
  openDispatcher,
  openFileBlobs,
  openSqliteStore,
  type GrantedLease,
  type Store,
} from '@millrace/dispatch';
import { connect, type Requestor } from '@millrace/dispatch/client';
import { LineSplitter, merge, readLogs, type LogLine } from './task-logs.ts';

const AT = '2025-01-01T00:00:00.';

function line(at: string, text: string): LogLine {
  return { at, taskId: 't', attempt: 1, source: 'log', said: { text } };
}

describe('lines of pages', () => {
  test('are whole wherever the pages were cut, within a character too', () => {
    const text = `{"at":"x","stream":"stdout","text":"grün 😀"}\n{"at":"y","level":"info","text":"b"}\nnot json\n`;
    const bytes = Buffer.from(text);
    for (const size of [1, 2, 3, 7, 1000]) {
      const lines = new LineSplitter('t', 2);
      const found: LogLine[] = [];
      for (let at = 0; at < bytes.length; at += size) {
        found.push(...lines.split({ bytes: bytes.subarray(at, at + size) }));
      }
      expect(found).toEqual([
        { at: 'x', taskId: 't', attempt: 2, source: 'stdout', said: { stream: 'stdout', text: 'grün 😀' } },
        { at: 'y', taskId: 't', attempt: 2, source: 'log', said: { level: 'info', text: 'b' } },
        { at: '', taskId: 't', attempt: 2, source: 'log', said: { text: 'not json' } },
      ]);
    }
  });
});

describe('merging', () => {
  const from = async function* (lines: readonly LogLine[]): AsyncGenerator<LogLine, void, undefined> {
    yield* lines;
  };

  test('goes by time, and among equals by source; each source keeps its order', async () => {
    const texts: unknown[] = [];
    const sources = [
      [line('3', 'c'), line('5', 'e')],
      [],
      [line('1', 'a'), line('3', 'd'), line('2', 'after d, whatever it says')],
      [line('2', 'b')],
    ];
    for await (const { said } of merge(sources.map(from))) texts.push(said['text']);
    expect(texts).toEqual(['a', 'b', 'c', 'd', 'after d, whatever it says', 'e']);
  });

  test('of many sources loses nothing, and closes them when it is left early', async () => {
    let closed = 0;
    const counted = async function* (index: number): AsyncGenerator<LogLine, void, undefined> {
      try {
        for (let i = 0; i < 20; i += 1)
          yield line(String(((i * 37 + index * 11) % 400) + i * 400).padStart(6, '0'), 'x');
      } finally {
        closed += 1;
      }
    };
    const sources = () => Array.from({ length: 100 }, (_, index) => counted(index));
    const ats: string[] = [];
    for await (const { at } of merge(sources())) ats.push(at);
    expect(ats).toHaveLength(2_000);
    expect(ats).toEqual(ats.toSorted());
    expect(closed).toBe(100);
    for await (const _ of merge(sources())) break;
    expect(closed).toBe(200);
  });
});

describe('reading from a dispatcher', () => {
  let store: Store;
  let requestor: Requestor;
  let nodeId: string;
  let close: () => Promise<void>;

  beforeEach(async () => {
    const dir = await mkdtemp(path.join(tmpdir(), 'millrace-logs-'));
    store = await openSqliteStore({ path: path.join(dir, 'store.db') });
    const blobs = await openFileBlobs({ dir: path.join(dir, 'blobs') });
    const dispatcher = await openDispatcher({ store, blobs, port: 0 });
    requestor = connect({ url: dispatcher.url, token: await dispatcher.issueClientToken() });
    const secretHash = 'a'.repeat(64);
    const node = await store.createNode({ name: 'n', mode: 'public', organizationId: 'o', secretHash });
    nodeId = node.id;
    await store.registerNode({
      nodeId,
      secretHash,
      wallet: `0x${'1'.repeat(40)}`,
      capabilities: ['/t/v1'],
      labels: {},
      version: '1',
      maxConcurrency: 1000,
    });
    close = async () => {
      await requestor.close();
      await dispatcher.close();
      await blobs[Symbol.asyncDispose]();
      await store[Symbol.asyncDispose]();
      await rm(dir, { recursive: true, force: true });
    };
  });
  afterEach(() => close());

  const submit = (count: number): Promise<string> =>
    requestor.submit({
      tasks: Array.from({ length: count }, (_, index) => ({
        label: `t${index}`,
        capability: '/t/v1',
        max_attempts: 5,
      })),
    });
  const lease = async (max: number): Promise<readonly GrantedLease[]> => {
    const [outcome] = await store.lease([{ nodeId, max, capabilities: null, start: true }]);
    if (outcome?.ok !== true) throw new Error('no lease');
    return outcome.value.leases;
  };
  const refOf = (granted: GrantedLease) => ({ taskId: granted.task.id, nodeId, leaseId: granted.leaseId });
  const say = async (granted: GrantedLease, offset: number, at: string, text: string): Promise<number> => {
    const bytes = Buffer.from(`${JSON.stringify({ at: AT + at, stream: 'stdout', text })}\n`);
    const [outcome] = await store.appendLogs([{ ...refOf(granted), offset, bytes }], 1 << 24);
    if (outcome?.ok !== true) throw new Error('not appended');
    return outcome.value.nextOffset;
  };
  const complete = (granted: GrantedLease) =>
    store.complete([{ ...refOf(granted), outputCids: [], meta: null }]);
  const scopeOf = async (jobId: string) => ({
    jobId,
    taskIds: new Set((await requestor.job(jobId)).tasks.map(({ id }) => id)),
    attempt: null,
    offset: 0,
  });
  const texts = async (lines: AsyncIterable<LogLine>): Promise<string[]> => {
    const found: string[] = [];
    for await (const { said, attempt } of lines) {
      const { text, event } = said;
      found.push(`${attempt} ${typeof text === 'string' ? text : JSON.stringify(event)}`);
    }
    return found;
  };
  const never = new AbortController().signal;

  test('logs of tasks and attempts are one story by time, with the events of nodes that keep no log', async () => {
    const jobId = await submit(2);
    const [a, b] = await lease(2);
    let end = await say(a!, 0, '001Z', 'a1');
    await say(b!, 0, '002Z', 'b1');
    end = await say(a!, end, '003Z', 'a2');
    await store.heartbeat([{ ...refOf(b!), progress: null, events: ['in the log'], logged: true }]);
    await store.release([{ ...refOf(a!), reason: 'shutdown' }]);
    await complete(b!);
    const [again] = await lease(1);
    await say(again!, 0, '004Z', 'a3');
    await store.heartbeat([{ ...refOf(again!), progress: null, events: ['only an event'] }]);
    await complete(again!);
    const scope = await scopeOf(jobId);
    expect(await texts(readLogs(requestor, scope, { follow: false, signal: never }))).toEqual([
      '1 a1',
      '1 b1',
      '1 a2',
      '2 a3',
      '2 "only an event"',
    ]);
    const first = readLogs(requestor, { ...scope, attempt: 1 }, { follow: false, signal: never });
    expect(await texts(first)).toEqual(['1 a1', '1 b1', '1 a2']);
    expect(await texts(readLogs(requestor, scope, { follow: true, signal: never }))).toHaveLength(5);
  });

  test('following many tasks misses nothing and repeats nothing, over attempts and more tasks than may wait at once', async () => {
    const TASKS = 60;
    const jobId = await submit(TASKS);
    const scope = await scopeOf(jobId);
    const leases = await lease(TASKS);
    const expected: string[] = [];
    const offsets = new Map<GrantedLease, number>();
    const round = async (granted: readonly GrantedLease[], name: string, attempt: number): Promise<void> => {
      for (const [index, each] of granted.entries()) {
        const text = `${name} ${index}`;
        offsets.set(each, await say(each, offsets.get(each) ?? 0, '500Z', text));
        expected.push(`${attempt} ${text}`);
      }
    };
    await round(leases, 'before', 1);
    const followed = texts(readLogs(requestor, scope, { follow: true, signal: never }));
    await round(leases, 'while', 1);
    await store.release(leases.map((each) => ({ ...refOf(each), reason: 'shutdown' as const })));
    const again = await lease(TASKS);
    await round(again, 'again', 2);
    for (const each of again) await complete(each);
    expect((await followed).toSorted()).toEqual(expected.toSorted());
  }, 30_000);

  test('following ends with the signal, and leaves no request behind', async () => {
    const jobId = await submit(1);
    const [a] = await lease(1);
    await say(a!, 0, '001Z', 'x');
    const stop = new AbortController();
    const lines = readLogs(requestor, await scopeOf(jobId), { follow: true, signal: stop.signal });
    expect((await lines.next()).value).toMatchObject({ said: { text: 'x' } });
    const next = lines.next();
    setTimeout(() => stop.abort(new Error('enough')), 50);
    await expect(next).rejects.toThrow('enough');
  });

  test('leaving in the middle ends what was under way', async () => {
    const jobId = await submit(1);
    const [a] = await lease(1);
    await say(a!, 0, '001Z', 'x');
    for await (const { said } of readLogs(requestor, await scopeOf(jobId), { follow: true, signal: never })) {
      expect(said['text']).toBe('x');
      break;
    }
  });
});
