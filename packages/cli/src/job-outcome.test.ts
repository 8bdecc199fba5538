import type { JobDetail } from '@millrace/dispatch';
import type { Json } from '@millrace/runner';
import { describe, expect, test } from 'vitest';
import {
  artifactsOf,
  jobDocument,
  jobExitCode,
  jobLines,
  jobReason,
  logLine,
  saidText,
} from './job-outcome.ts';
import { paint } from './terminal.ts';

type Status = JobDetail['job']['status'];
type Task = JobDetail['tasks'][number];

function detailOf(
  status: Status,
  tasks: readonly Partial<Task>[] = [],
  receipts: readonly Partial<JobDetail['receipts'][number]>[] = [],
): JobDetail {
  const job = {
    id: 'job-1',
    label: 'demo',
    status,
    created_at: '2026-03-02T12:00:00.000Z',
    updated_at: '2026-03-02T12:00:04.200Z',
  };
  const full = tasks.map((task, index) => ({
    id: `t${index}`,
    stage: `s${index}`,
    label: '',
    attempts: 1,
    reason: null,
    ...task,
  }));
  // Only what is read here; the rest of the records is the dispatcher's business.
  return { job, tasks: full, receipts } as unknown as JobDetail;
}

const completed = (task_id: string, artifacts: Json, outputs: string[] = []) =>
  ({ task_id, outcome: 'completed', outputs, meta: { artifacts } }) as const;

test('the exit code is that of the job', () => {
  expect(
    (['completed', 'failed', 'canceled'] as const).map((status) => jobExitCode(detailOf(status))),
  ).toEqual([0, 1, 3]);
  expect(() => jobExitCode(detailOf('running'))).toThrow(/has not ended/);
});

describe('a job that failed', () => {
  const detail = detailOf('failed', [
    { status: 'completed' },
    { status: 'failed', attempts: 3, reason: 'no\nsuch file' },
    { status: 'failed', attempts: 1, reason: 'later' },
  ]);

  test('says which task failed first, how often it was tried, and why', () => {
    expect(jobReason(detail)).toBe('s1 failed after 3 attempts: no such file (and 1 more failed)');
    expect(jobDocument(detail)).toMatchObject({ status: 'failed', error: { code: 'job_failed' } });
  });

  test('shows the last ten log lines of what failed, and no others', () => {
    const logs = new Map([
      ['t0', ['of another']],
      ['t1', Array.from({ length: 11 }, (_, index) => `info  line ${index}`)],
    ]);
    expect(jobLines(detail, logs, paint(false))).toEqual([
      'failed  job-1  after 4.2 s',
      '  s1 failed after 3 attempts: no such file (and 1 more failed)',
      '  last log lines of s1:',
      ...[1, 2, 3, 4, 5, 6, 7, 8, 9, 10].map((index) => `    info  line ${index}`),
    ]);
  });
});

test('a job that completed has no error', () => {
  expect(jobDocument(detailOf('completed'))).not.toHaveProperty('error');
  expect(jobLines(detailOf('completed', [{}]), new Map(), paint(false))).toEqual([
    'completed  job-1  1 task in 4.2 s',
  ]);
});

describe('a log event as a line', () => {
  const line = (event: Json): string | null =>
    logLine({ seq: 1, at: '', kind: 'task.log', task_id: 't', data: { event } });

  test.each<[Json, string]>([
    [
      { level: 'warn', message: 'low memory', left: 12, file: 'a b' },
      'warn  low memory  left=12  file="a b"',
    ],
    ['plain', 'plain'],
    [{ any: ['thing'] }, '{"any":["thing"]}'],
    [[1, 2], '[1,2]'],
    [null, 'null'],
    [{ level: 'info', message: 'two\nlines\u001b[2J' }, 'info  two lines'],
  ])('%j reads %j', (event, text) => {
    expect(line(event)).toBe(text);
  });

  test('other events are no lines', () => {
    expect(logLine({ seq: 1, at: '', kind: 'task.running', task_id: 't', data: {} })).toBeNull();
  });
});

describe('a line of a log', () => {
  test.each<[Record<string, Json>, string]>([
    [{ stream: 'stdout', text: '\t  as it was  printed\u001b[2J' }, '\t  as it was  printed'],
    [{ stream: 'stderr', text: 'level: is not shown', level: 'x' }, 'level: is not shown'],
    [
      { level: 'warn', text: 'low memory', fields: { left: 12, file: 'a b' } },
      'warn  low memory  left=12  file="a b"',
    ],
    [{ event: { kind: 'frame', n: 1 } }, '{"kind":"frame","n":1}'],
    [{ event: { level: 'info', message: 'hello' } }, 'info  hello'],
    [{ text: 'not of ours \u001b[2J' }, 'not of ours'],
    [{ any: 'thing' }, '{"any":"thing"}'],
  ])('%j reads %j', (said, text) => {
    expect(saidText(said)).toBe(text);
  });
});

describe('the artifacts of a job', () => {
  test('are what the accepted completions reported, in the order of the tasks', () => {
    const detail = detailOf(
      'completed',
      [{}, {}],
      [
        {
          task_id: 't1',
          outcome: 'failed',
          outputs: [],
          meta: { artifacts: [{ logical_path: 'lost', id: 'x' }] },
        },
        completed('t1', [{ logical_path: 'b.txt', id: 'id-b' }]),
        completed('t0', [{ logical_path: 'a.txt', id: 'id-a' }]),
      ],
    );
    expect(artifactsOf(detail)).toEqual([
      { path: 'a.txt', id: 'id-a', taskId: 't0' },
      { path: 'b.txt', id: 'id-b', taskId: 't1' },
    ]);
  });

  test('of two tasks under one path are both kept', () => {
    const same = [{ logical_path: 'out.json', id: 'one' }];
    const detail = detailOf(
      'completed',
      [{}, {}],
      [completed('t0', same), completed('t1', [{ logical_path: 'out.json', id: 'two' }])],
    );
    expect(artifactsOf(detail).map(({ path }) => path)).toEqual(['out.json', 't1/out.json']);
  });

  test('that a peer reports by id only are named by it', () => {
    const detail = detailOf('completed', [{}], [completed('t0', 'nothing useful', ['id-1'])]);
    expect(artifactsOf(detail)).toEqual([{ path: 'id-1', id: 'id-1', taskId: 't0' }]);
  });
});
