import { describe, expect, test } from 'vitest';
import {
  DEFAULT_BACKOFF,
  FREE_DRAINS,
  FREE_NODE_FAULTS,
  TASK_STATES,
  backoffMs,
  isFinal,
  isHeld,
  isResumable,
  jobStatus,
  judge,
  resume,
  taskStatus,
  wakeAt,
} from './lifecycle.ts';

const tally = { attempts: 1, maxAttempts: 3, nodeFaults: 0, drains: 0 };
const none = { queued: 0, leased: 0, running: 0, completed: 0, failed: 0, canceled: 0 };

describe('a lease that expired while nobody took the task', () => {
  test('is resumable while its task is queued and in time, and in no other state', () => {
    const at = (deadlineAt: number | null) =>
      TASK_STATES.filter((state) => isResumable({ state, deadlineAt }, 100));
    expect(at(null)).toEqual(['delayed', 'ready']);
    expect(at(101)).toEqual(['delayed', 'ready']);
    expect(at(100)).toEqual([]);
  });

  test('resuming undoes an expiry that did not count, and keeps the number of the attempt in any case', () => {
    for (let nodeFaults = 0; nodeFaults <= FREE_NODE_FAULTS; nodeFaults += 1) {
      const before = { ...tally, nodeFaults };
      const after = judge('expired', before, true);
      const again = resume(after);
      expect(again.attempts + again.nodeFaults).toBe(before.attempts + before.nodeFaults);
      expect(again.attempts).toBeLessThanOrEqual(before.maxAttempts);
      if (nodeFaults < FREE_NODE_FAULTS) expect(again).toEqual({ attempts: 1, nodeFaults });
    }
  });
});

describe('states', () => {
  test('the wire knows six, three of ours are queued', () => {
    expect(TASK_STATES.map(taskStatus)).toEqual([
      'queued',
      'queued',
      'queued',
      'leased',
      'running',
      'completed',
      'failed',
      'canceled',
    ]);
  });

  test('a state is waiting, held or final', () => {
    expect(TASK_STATES.filter(isHeld)).toEqual(['leased', 'running']);
    expect(TASK_STATES.filter(isFinal)).toEqual(['completed', 'failed', 'canceled']);
  });
});

describe('backoff', () => {
  test('the bound doubles from the base to the cap', () => {
    const bounds = [1, 2, 3, 6, 7, 8, 100].map((step) => backoffMs(step, () => 1 - 2 ** -53));
    expect(bounds).toEqual([1000, 2000, 4000, 32_000, 60_000, 60_000, 60_000]);
  });

  test('the delay is anything from zero to the bound', () => {
    expect(backoffMs(1, () => 0)).toBe(0);
    expect(backoffMs(4, () => 0.5)).toBe(4000);
    expect(backoffMs(1, () => 0.5, { baseMs: 10, capMs: 6 })).toBe(3);
  });

  test('no step is too large to be computed', () => {
    expect(backoffMs(5000, () => 0.5)).toBe(DEFAULT_BACKOFF.capMs / 2);
  });
});

describe('judging an ending', () => {
  test.each([
    ['a failure with attempts left', 'failed', tally, true, { attempts: 1, next: 'delayed', step: 1 }],
    [
      'the second failure',
      'failed',
      { ...tally, attempts: 2 },
      true,
      { attempts: 2, next: 'delayed', step: 2 },
    ],
    ['the last failure', 'failed', { ...tally, attempts: 3 }, true, { attempts: 3, next: 'failed' }],
    ['a failure not to be retried', 'failed', tally, false, { attempts: 1, next: 'failed' }],
    [
      'a failed set-up',
      'setup_failed',
      tally,
      true,
      { attempts: 0, nodeFaults: 1, next: 'delayed', step: 1 },
    ],
    ['a failed set-up not to be retried', 'setup_failed', tally, false, { attempts: 0, next: 'delayed' }],
    ['a crash', 'expired', tally, true, { attempts: 0, nodeFaults: 1, next: 'ready' }],
    ['a drain', 'shutdown', tally, true, { attempts: 0, nodeFaults: 0, drains: 1, next: 'ready' }],
    [
      'the last free node fault',
      'expired',
      { ...tally, nodeFaults: FREE_NODE_FAULTS - 1 },
      true,
      { attempts: 0, nodeFaults: FREE_NODE_FAULTS, next: 'ready' },
    ],
    [
      'the first node fault that counts',
      'expired',
      { ...tally, nodeFaults: FREE_NODE_FAULTS },
      true,
      { attempts: 1, nodeFaults: FREE_NODE_FAULTS, next: 'delayed', step: 1 },
    ],
    [
      'a node fault that counts, with no attempt left',
      'setup_failed',
      { ...tally, attempts: 3, nodeFaults: FREE_NODE_FAULTS },
      true,
      { attempts: 3, next: 'failed' },
    ],
    [
      'the last free drain',
      'shutdown',
      { ...tally, drains: FREE_DRAINS - 1 },
      true,
      { attempts: 0, drains: FREE_DRAINS, nodeFaults: 0, next: 'ready' },
    ],
    [
      'one drain more',
      'shutdown',
      { ...tally, drains: FREE_DRAINS },
      true,
      { attempts: 0, drains: FREE_DRAINS, nodeFaults: 1, next: 'ready' },
    ],
  ] as const)('%s', (_, ending, before, retryable, expected) => {
    expect(judge(ending, before, retryable)).toMatchObject(expected);
  });

  test('whatever ends a task again and again, it fails in the end', () => {
    for (const ending of ['failed', 'setup_failed', 'expired', 'shutdown'] as const) {
      let state = { attempts: 0, nodeFaults: 0, drains: 0 };
      let rounds = 0;
      for (let next = ''; next !== 'failed'; rounds += 1) {
        const verdict = judge(ending, { ...state, attempts: state.attempts + 1, maxAttempts: 3 }, true);
        ({ next } = verdict);
        state = verdict;
        expect(rounds).toBeLessThan(FREE_DRAINS + FREE_NODE_FAULTS + 3);
      }
      expect(state.attempts).toBe(3);
    }
  });
});

describe('the status of a job', () => {
  test.each([
    ['nothing was leased yet', { queued: 2 }, false, 'pending'],
    ['something was', { queued: 2 }, true, 'running'],
    ['a task is held', { running: 1, completed: 1 }, true, 'running'],
    ['a task failed, another is still held', { leased: 1, failed: 1 }, true, 'running'],
    ['all completed', { completed: 2 }, true, 'completed'],
    ['one failed', { completed: 1, failed: 1, canceled: 1 }, true, 'failed'],
    ['one canceled', { completed: 1, canceled: 1 }, true, 'canceled'],
    ['all canceled before any was leased', { canceled: 2 }, false, 'canceled'],
  ] as const)('%s', (_, counts, started, expected) => {
    expect(jobStatus({ ...none, ...counts }, started)).toBe(expected);
  });
});

describe('when the sweeper must look', () => {
  const waits = {
    state: 'ready',
    leaseExpiresAt: null,
    notBefore: null,
    deadlineAt: null,
    cancelRequestedAt: null,
  } as const;

  test.each([
    ['a ready task: never', waits, null],
    ['a ready task: at its deadline', { ...waits, deadlineAt: 5 }, 5],
    ['a delayed task: when it is due', { ...waits, state: 'delayed', notBefore: 7 }, 7],
    [
      'a delayed task: at its deadline, if that is first',
      { ...waits, state: 'delayed', notBefore: 7, deadlineAt: 5 },
      5,
    ],
    [
      'a held task: when the lease expires',
      { ...waits, state: 'running', leaseExpiresAt: 7, deadlineAt: 9 },
      7,
    ],
    [
      'a held task: at its deadline, if that is first',
      { ...waits, state: 'leased', leaseExpiresAt: 7, deadlineAt: 5 },
      5,
    ],
    [
      'a held task that was asked to end: when the lease expires, whatever its deadline',
      { ...waits, state: 'running', leaseExpiresAt: 7, deadlineAt: 5, cancelRequestedAt: 4 },
      7,
    ],
    ['a finished task: never', { ...waits, state: 'completed', deadlineAt: 5 }, null],
  ] as const)('%s', (_, task, expected) => {
    expect(wakeAt(task)).toBe(expected);
  });
});
