import type { JobDetail, JobEvent } from '@millrace/dispatch';
import type { JsonObject } from '@millrace/runner';
import { describe, expect, test } from 'vitest';
import { JobView, readProgress, renderLine, renderLive } from './progress.ts';
import { paint } from './terminal.ts';
import { textWidth } from './text-width.ts';

const START = Date.parse('2026-03-02T12:00:00.000Z');
const plain = paint(false);

/** A job of tasks `[stage, label]`, with one edge from each stage to the next. */
function detailOf(tasks: readonly (readonly [stage: string, label: string])[]): JobDetail {
  const stages = [...new Set(tasks.map(([stage]) => stage))];
  const created_at = new Date(START).toISOString();
  return {
    job: {
      id: 'job-1',
      label: 'world map',
      domain_id: 'd',
      status: 'pending',
      priority: 0,
      created_at,
      updated_at: created_at,
      organization_id: null,
      meta: {},
      credit_lock_id: null,
      credit_lock_amount: null,
      credit_locked_at: null,
      credit_released_at: null,
      cancel_requested_at: null,
      deadline_at: null,
      edges: stages.slice(1).map((to, index) => ({ from: stages[index] ?? '', to })),
    },
    tasks_summary: { queued: tasks.length, leased: 0, running: 0, completed: 0, failed: 0, canceled: 0 },
    tasks: tasks.map(([stage, label], index) => ({
      id: `t${index}`,
      job_id: 'job-1',
      label,
      stage,
      capability: `/demo/${stage}/v1`,
      capability_filters: {},
      status: 'queued',
      deps_remaining: 0,
      priority: 0,
      inputs_cids: [],
      outputs_prefix: null,
      organization_id: null,
      attempts: 0,
      max_attempts: 3,
      lease_expires_at: null,
      reserved_by: null,
      meta: {},
      cancel_requested_at: null,
      last_heartbeat_at: null,
      created_at,
      updated_at: created_at,
      mode: 'public',
      billing_units: null,
      estimated_credit_cost: null,
      debited_amount: null,
      debited_at: null,
      reason: null,
      not_before: null,
      output_cids: [],
      node_faults: 0,
      deadline_at: null,
    })),
    receipts: [],
  };
}

function feed(
  view: JobView,
  events: readonly (readonly [ms: number, kind: string, task: string | null, data?: JsonObject])[],
) {
  return events.map(([ms, kind, task_id, data = {}], index) => {
    const event: JobEvent = { seq: index + 1, at: new Date(START + ms).toISOString(), kind, task_id, data };
    return view.apply(event);
  });
}

const live = (view: JobView, ms: number, width = 80, height = 20): string[] =>
  renderLive(view, { nowMs: START + ms, width, height, paint: plain });

describe('readProgress', () => {
  test.each([
    [0.4, 0.4],
    [1, 1],
    [40, 0.4],
    [140, 1],
    [{ pct: 40, stage: 'upload' }, 0.4],
    [{ percent: 0.5 }, 0.005],
    [{ fraction: 0.25 }, 0.25],
    [{ progress: 75 }, 0.75],
    [{ done: 3, total: 12 }, 0.25],
    [{ done: 3, total: 0 }, null],
    [{ anything: 'else' }, null],
    [null, null],
    [[1, 2], null],
    [{ pct: Number.NaN }, null],
  ])('reads %j as the fraction %j', (value, fraction) => {
    expect(readProgress(value).fraction).toBe(fraction);
  });

  test('puts stage and message into one line without escape sequences', () => {
    expect(readProgress({ stage: 'upload', message: 'part\u001b[2J 3\nof 4' }).message).toBe(
      'upload: part 3 of 4',
    );
  });
});

describe('a job on a terminal', () => {
  test('shows each task with its state, and the stages that wait', () => {
    const view = new JobView(
      detailOf([
        ['tile', 'a'],
        ['tile', 'b'],
        ['stitch', 'stitch'],
      ]),
    );
    feed(view, [
      [0, 'job.submitted', null],
      [0, 'task.runnable', 't0'],
      [0, 'task.runnable', 't1'],
      [100, 'job.running', null],
      [100, 'task.leased', 't0', { attempt: 1 }],
      [100, 'task.running', 't0'],
      [1100, 'task.progress', 't0', { progress: { done: 100, total: 400, unit: 'tiles' } }],
      [2100, 'task.progress', 't0', { progress: { done: 200, total: 400, unit: 'tiles' } }],
    ]);
    expect(live(view, 3100)).toEqual([
      expect.stringMatching(/^. world map {2}0\/3 tasks {2}00:03$/),
      '  › tile/a  ████████░░░░░░░░   50%  100 tiles/s  00:03',
      '  · tile/b  waits for a node',
      '  · stitch  waits for earlier stages',
    ]);
  });

  test('shows bytes with their rate', () => {
    const view = new JobView(detailOf([['copy', 'copy']]));
    feed(view, [
      [0, 'task.leased', 't0', { attempt: 1 }],
      [1000, 'task.progress', 't0', { progress: { done: 0, unit: 'bytes' } }],
      [2000, 'task.progress', 't0', { progress: { done: 2 * 1024 * 1024, unit: 'bytes' } }],
    ]);
    expect(live(view, 2000)[1]).toBe('  › copy  2.0 MiB/s  2.0 MiB  00:02');
  });

  test('shows how a finished task ended and how long it took', () => {
    const view = new JobView(
      detailOf([
        ['a', 'a'],
        ['b', 'b'],
      ]),
    );
    feed(view, [
      [0, 'task.leased', 't0', { attempt: 1 }],
      [1500, 'task.completed', 't0'],
      [1500, 'task.leased', 't1', { attempt: 1 }],
      [2000, 'task.failed', 't1', { reason: 'no such file' }],
      [2000, 'job.failed', null],
    ]);
    expect(live(view, 60_000)).toEqual([
      '✗ world map  1/2 tasks  1 failed  failed  00:02',
      '  ✓ a  1.5 s',
      '  ✗ b  500 ms  no such file',
    ]);
  });

  test('starts a task anew after a retry and keeps why', () => {
    const view = new JobView(detailOf([['a', 'a']]));
    const told = feed(view, [
      [0, 'task.leased', 't0', { attempt: 1 }],
      [10, 'task.progress', 't0', { progress: 0.9 }],
      [20, 'task.retry', 't0', { reason: 'flaky', attempt: 1 }],
    ]);
    expect(told[2]).toBe('a: attempt 1 failed, will be tried again: flaky');
    expect(live(view, 30)[1]).toBe('  · a  will be tried again: flaky');
    feed(view, [[40, 'task.leased', 't0', { attempt: 2 }]]);
    expect(live(view, 1040)[1]).toBe('  › a  00:01  attempt 2');
  });

  test('takes a task up again when the node that was taken for lost comes back', () => {
    const view = new JobView(detailOf([['a', 'a']]));
    const told = feed(view, [
      [0, 'task.leased', 't0', { attempt: 1 }],
      [20, 'task.expired', 't0', { node_id: 'n' }],
      [1000, 'task.resumed', 't0', { node_id: 'n', attempt: 1 }],
    ]);
    expect(told.slice(1)).toEqual([
      'a: its node stopped answering, will be tried again',
      'a: its node is back and goes on',
    ]);
    expect(live(view, 3000)[1]).toBe('  › a  00:02');
    feed(view, [[4000, 'task.completed', 't0']]);
    expect(live(view, 4000)[1]).toBe('  ✓ a  3.0 s');
  });

  test('keeps to the height and says what it leaves out', () => {
    const view = new JobView(
      detailOf(Array.from({ length: 50 }, (_, index) => ['tile', String(index)] as const)),
    );
    feed(view, [
      [0, 'task.leased', 't7', { attempt: 1 }],
      [0, 'task.running', 't7'],
      [0, 'task.leased', 't9', { attempt: 1 }],
      [0, 'task.completed', 't9'],
    ]);
    const lines = live(view, 1000, 80, 6);
    expect(lines).toHaveLength(3);
    expect(lines[1]).toContain('tile/7');
    expect(lines[2]).toBe('  … and 48 queued, 1 completed');
  });

  test.each([20, 30, 40, 79, 200])('never draws a line wider than %d columns', (width) => {
    const view = new JobView(
      detailOf([
        ['ステージ', 'a very long label that does not fit anywhere at all, 日本語 included'],
        ['b', 'b'],
      ]),
    );
    feed(view, [
      [0, 'task.leased', 't0', { attempt: 1 }],
      [1, 'task.progress', 't0', { progress: { pct: 50, message: 'm'.repeat(300) } }],
      [2, 'task.leased', 't1', { attempt: 3 }],
      [3, 'task.failed', 't1', { reason: 'r'.repeat(300) }],
    ]);
    for (const line of live(view, 10_000, width)) expect(textWidth(line)).toBeLessThanOrEqual(width);
  });

  test('colours change no column', () => {
    const view = new JobView(
      detailOf([
        ['a', 'a'],
        ['b', 'b'],
      ]),
    );
    feed(view, [
      [0, 'task.leased', 't0', { attempt: 1 }],
      [1, 'task.progress', 't0', { progress: 0.5 }],
    ]);
    const options = { nowMs: START + 1000, width: 60, height: 10 };
    const colored = renderLive(view, { ...options, paint: paint(true) });
    expect(colored.map(textWidth)).toEqual(renderLive(view, { ...options, paint: plain }).map(textWidth));
    expect(colored.join('')).toContain('\u001b[');
  });

  test('text from a job cannot steer the terminal', () => {
    const view = new JobView(detailOf([['a\u001b[2J', 'b\nc']]));
    feed(view, [
      [0, 'task.leased', 't0', { attempt: 1 }],
      [1, 'task.failed', 't0', { reason: '\u001b[31mboo\u0007' }],
    ]);
    // oxlint-disable-next-line no-control-regex -- escape sequences are what must not be there
    for (const line of live(view, 1000)) expect(line).not.toMatch(/[\u0000-\u001f]/);
  });
});

describe('work that nobody takes', () => {
  const waiting = (): JobView => {
    const view = new JobView(detailOf([['a', 'a']]));
    feed(view, [[0, 'task.runnable', 't0']]);
    return view;
  };

  test('is pointed out after five seconds', () => {
    expect(waiting().hint(START + 4_999)).toBeNull();
    expect(waiting().hint(START + 5_000)).toMatch(/no node has taken a yet \(\/demo\/a\/v1\)/);
  });

  test('is no longer pointed out once somebody works', () => {
    const view = waiting();
    feed(view, [[1000, 'task.leased', 't0', { attempt: 1 }]]);
    expect(view.hint(START + 60_000)).toBeNull();
  });

  test('is not work that waits for its retry', () => {
    const view = waiting();
    feed(view, [
      [1000, 'task.leased', 't0', { attempt: 1 }],
      [2000, 'task.retry', 't0', { reason: 'flaky', attempt: 1 }],
    ]);
    expect(view.hint(START + 60_000)).toBeNull();
  });
});

describe('a job in plain lines', () => {
  test('is one line with counts and what runs', () => {
    const view = new JobView(
      detailOf([
        ['tile', 'a'],
        ['tile', 'b'],
        ['tile', 'c'],
        ['tile', 'd'],
        ['tile', 'e'],
      ]),
    );
    feed(view, [
      [0, 'task.leased', 't0', { attempt: 1 }],
      [0, 'task.completed', 't0'],
      ...['t1', 't2', 't3', 't4'].map((id) => [0, 'task.leased', id, { attempt: 1 }] as const),
      [1, 'task.progress', 't1', { progress: { pct: 42, message: 'drawing' } }],
    ]);
    expect(renderLine(view, START + 4000)).toBe(
      '[00:04] world map: 1/5 tasks done; running tile/b 42% drawing, tile/c, tile/d, 1 more',
    );
  });

  test('says how the job ended', () => {
    const view = new JobView(detailOf([['a', 'a']]));
    feed(view, [
      [0, 'task.leased', 't0', { attempt: 1 }],
      [10, 'task.completed', 't0'],
      [10, 'job.completed', null],
    ]);
    expect(view.finished).toBe(true);
    expect(renderLine(view, START + 99_000)).toBe('[00:00] world map: 1/1 tasks done; completed');
  });
});
