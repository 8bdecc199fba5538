import { expect, test } from 'vitest';
import { memoCode, memoKey, memoReport, memoTarget, type MemoWork } from './memo.ts';

const REF = `compute://sha256/${'c'.repeat(64)}`;

test('the key does not depend on the order of members, and on everything else', () => {
  const work: MemoWork = {
    domainId: 'd',
    capability: '/c/v1',
    mode: 'public',
    filters: { b: '2', a: '1' },
    meta: { x: [1, { z: 'é', y: null }], w: true },
    inputs: ['sha256:1', 'sha256:2'],
  };
  const key = memoKey('code', work);
  expect(key).toMatch(/^[0-9a-f]{64}$/);
  expect(
    memoKey('code', { ...work, filters: { a: '1', b: '2' }, meta: { w: true, x: [1, { y: null, z: 'é' }] } }),
  ).toBe(key);
  const others = [
    memoKey('other', work),
    memoKey('code', { ...work, domainId: 'e' }),
    memoKey('code', { ...work, capability: '/c/v2' }),
    memoKey('code', { ...work, mode: 'dedicated' }),
    memoKey('code', { ...work, filters: {} }),
    memoKey('code', { ...work, meta: { w: true, x: [{ y: null, z: 'é' }, 1] } }),
    memoKey('code', { ...work, meta: { w: 'true', x: [1, { z: 'é', y: null }] } }),
    memoKey('code', { ...work, inputs: ['sha256:2', 'sha256:1'] }),
    memoKey('code', { ...work, inputs: ['sha256:1,sha256:2'] }),
  ];
  expect(new Set([key, ...others]).size).toBe(others.length + 1);
});

test('a key is the same from version to version', () => {
  const work = {
    domainId: 'd',
    capability: '/c',
    mode: 'public',
    filters: {},
    meta: null,
    inputs: [],
  } as const;
  // sha256 of {"capability":"/c","code":"k","domainId":"d","filters":{},"inputs":[],"meta":null,"mode":"public","v":1}
  expect(memoKey('k', work)).toBe('ef1105f644f16b0ce1e06fe32d7531e09e81c01648dad6305c06b24ac815f0af');
});

test('code and determinism are what a task says of itself', () => {
  expect(memoCode({ ref: REF, now: 0 })).toBe(`sha256:${'c'.repeat(64)}`);
  expect(memoCode({ ref: REF, deterministic: true })).toBe(`sha256:${'c'.repeat(64)}`);
  expect(memoCode({ wasm: { module: REF, now: 0 } })).toBe(`sha256:${'c'.repeat(64)}`);
  expect(memoCode({ wasm: { module: REF }, deterministic: true })).toBe(`sha256:${'c'.repeat(64)}`);
  expect(memoCode({ wasm: { module: REF }, now: 0 })).toBeNull();
  expect(memoCode({ code_digest: 'abc', deterministic: true })).toBe('abc');
  expect(memoCode({ ref: REF, code_digest: 'abc', deterministic: true })).toBe(`sha256:${'c'.repeat(64)}`);
  for (const meta of [
    null,
    7,
    [REF],
    {},
    { ref: REF },
    { ref: REF, now: 0, deterministic: false },
    { ref: REF.slice(0, -1), now: 0 },
    { code_digest: 'abc', now: 0 },
    { deterministic: true },
    { code_digest: 7, deterministic: true },
    { code_digest: 'abc', deterministic: 'true' },
  ]) {
    expect([meta, memoCode(meta as never)]).toEqual([meta, null]);
  }
});

test('a copy is called after its own task', () => {
  const from = { taskId: 'old', prefix: 'a/b' };
  const to = { taskId: 'new', prefix: '/c/' };
  expect(memoTarget({ logical_path: 'a/b/x.json', name: 'a_b_x_json_old' }, from, to)).toEqual({
    logicalPath: 'c/x.json',
    name: 'a_b_x_json_new',
  });
  // Not of the prefix: as it stands, under the new one.
  expect(memoTarget({ logical_path: 'ab/x', name: 'n_old' }, from, to).logicalPath).toBe('c/ab/x');
  expect(
    memoTarget({ logical_path: 'x', name: 'n_old' }, { ...from, prefix: null }, { ...to, prefix: null }),
  ).toEqual({
    logicalPath: 'x',
    name: 'n_new',
  });
});

test('the report of a copy keeps what the first one said, and says whose it is', () => {
  const artifacts = [{ logical_path: 'x', name: 'x_new', data_type: 'json', id: '2' }];
  const link = { taskId: 'old', jobId: 'j1', key: 'k' };
  expect(
    memoReport(
      { job: { task_id: 'old', capability: '/c' }, usage: { cpu: 1 }, note: 'kept' },
      { id: 'new', jobId: 'j2' },
      link,
      artifacts,
    ),
  ).toEqual({
    job: { task_id: 'new', capability: '/c', job_id: 'j2' },
    note: 'kept',
    artifacts,
    memo: { task_id: 'old', job_id: 'j1', key: 'k' },
  });
  expect(memoReport(null, { id: 'new', jobId: 'j2' }, link, [])).toEqual({
    job: { task_id: 'new', job_id: 'j2' },
    artifacts: [],
    memo: { task_id: 'old', job_id: 'j1', key: 'k' },
  });
});
