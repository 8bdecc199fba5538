import { TaskAbort } from '@millrace/runner';
import { expect, test } from 'vitest';
import { DEFAULT_CONTAINER_LIMITS } from './limits.ts';
import { verdict } from './verdict.ts';
import type { Ending } from './verdict.ts';

const killed: Ending = {
  image: 'debian:12',
  cause: null,
  exit: { code: null, signal: 'SIGKILL' },
  limits: DEFAULT_CONTAINER_LIMITS,
  oomKilled: false,
  groupOutOfMemory: false,
  kernelKills: 0,
  peakBytes: null,
  processesRefused: false,
  failOnNonZero: true,
  lastWords: null,
};

test.each<[string, Partial<Ending>, string | undefined]>([
  ['the engine says so', { oomKilled: true }, 'engine'],
  ['its control group counted it', { groupOutOfMemory: true }, 'cgroup'],
  ['the kernel counted one meanwhile', { kernelKills: 1 }, 'kernel'],
  ['nothing can be known', { kernelKills: null }, 'status'],
  ['the kernel counted none', {}, undefined],
  ['another signal ended it', { exit: { code: null, signal: 'SIGSEGV' }, kernelKills: 1 }, undefined],
  [
    'a child was killed and the program failed',
    { exit: { code: 1, signal: null }, groupOutOfMemory: true },
    'cgroup',
  ],
])('SIGKILL out of nowhere when %s', (_, seen, evidence) => {
  const error = verdict({ ...killed, ...seen });
  if (evidence === undefined)
    expect(error).toMatchObject({ code: 'internal', details: { ending: 'signal' } });
  else
    expect(error).toMatchObject({
      code: 'resource_exhausted',
      details: { ending: 'out_of_memory', evidence },
    });
});

test('the first cause counts, whatever the program did about it', () => {
  const abort = new TaskAbort('canceled');
  const fine = { ...killed, exit: { code: 0, signal: null } };
  expect(verdict({ ...fine, cause: { kind: 'abort', abort } })).toBe(abort);
  const cause = { kind: 'limit', limit: 'wallMs', value: 5, used: 5 } as const;
  expect(verdict({ ...fine, oomKilled: true, cause })).toMatchObject({
    code: 'deadline_exceeded',
    details: { limit: 'wallMs', value: 5 },
  });
  expect(verdict({ ...fine, cause: { kind: 'lost', error: new Error('gone') } })).toMatchObject({
    code: 'unavailable',
  });
  expect(verdict(fine)).toBeNull();
});

test('refused processes and last words are in the error of a program that failed', () => {
  const error = verdict({
    ...killed,
    exit: { code: 2, signal: null },
    processesRefused: true,
    lastWords: 'cannot fork',
  });
  expect(error?.message).toBe(
    'the program of debian:12 ended with exit code 2 (it was refused more than 512 processes): cannot fork',
  );
  expect(verdict({ ...killed, exit: { code: 2, signal: null }, failOnNonZero: false })).toBeNull();
});
