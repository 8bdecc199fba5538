import type { JobDetail, JobEvent } from '@millrace/dispatch';
import { describe, expect, test } from 'vitest';
import { JobBoard } from './job-board.ts';

const detail = {
  tasks: [
    { id: 'p', label: 'prepare', stage: 'prepare' },
    ...['00', '01', '02', '03'].map((name) => ({ id: name, label: `tile-${name}-00`, stage: 'tile' })),
    { id: 's', label: 'stitch', stage: 'stitch' },
  ],
} as unknown as JobDetail;

function board(
  ...events: readonly (readonly [ms: number, kind: string, task: string | null, data?: object])[]
): {
  board: JobBoard;
  lines: (string | null)[];
} {
  const made = new JobBoard(detail, new Map([['id-1', 'node-1']]));
  const lines = events.map(([ms, kind, task_id, data = {}], index) =>
    made.apply({ seq: index + 1, at: new Date(ms).toISOString(), kind, task_id, data } as JobEvent),
  );
  return { board: made, lines };
}

describe('JobBoard', () => {
  test('shows stages and tiles as they stand', () => {
    const { board: made } = board(
      [0, 'job.submitted', null],
      [0, 'task.leased', 'p', { node_id: 'id-1' }],
      [900, 'task.completed', 'p'],
      [1000, 'task.leased', '00', { node_id: 'id-1' }],
      [1000, 'task.leased', '01', { node_id: 'id-2' }],
      [1100, 'task.progress', '01', { progress: { done: 1, total: 2, message: 'land' } }],
      [1200, 'task.completed', '00'],
    );
    expect(made.board(2)).toEqual([
      'prepare  ████████████████',
      'tile     ██▒▒  1/4',
      '         ····',
      'stitch   ················',
    ]);
  });

  test('tells endings in one line, with the reason', () => {
    const { board: made, lines } = board(
      [0, 'task.leased', '00', { node_id: 'id-1' }],
      [500, 'task.retry', '00', { reason: 'canvas broke' }],
      [600, 'task.leased', '00', { node_id: 'id-2' }],
      [650, 'task.expired', '00', { node_id: 'id-2' }],
      [700, 'task.leased', '00', { node_id: 'id-1' }],
      [2700, 'task.failed', '00', { reason: 'no' }],
      [2700, 'task.canceled', '01', {}],
      [2700, 'job.failed', null],
    );
    expect(lines).toEqual([
      null,
      'tile-00-00 failed, tried again after 0.50 s on node-1: canvas broke',
      null,
      'tile-00-00 node lost after 0.05 s on id-2',
      null,
      'tile-00-00 failed after 2.00 s on node-1: no',
      'tile-01-00 canceled',
      null,
    ]);
    expect(made.board(4)[1]).toBe('tile     !!xx····  0/4');
  });

  test('draws one bar per attempt, to scale, within the width', () => {
    const { board: made } = board(
      [0, 'job.submitted', null],
      [0, 'task.leased', 'p', { node_id: 'id-1' }],
      [5000, 'task.completed', 'p'],
      [5000, 'task.leased', '00', { node_id: 'id-1' }],
      [7500, 'task.expired', '00'],
      [7500, 'task.leased', '00', { node_id: 'id-1' }],
      [10_000, 'task.completed', '00'],
    );
    const lines = made.timeline(80);
    expect(lines.map((line) => line.slice(0, line.indexOf('█')).trimEnd())).toEqual([
      'prepare     node-1  +0.00 s  5.00 s',
      'tile-00-00  node-1  +5.00 s  2.50 s',
      'tile-00-00  node-1  +7.50 s  2.50 s',
    ]);
    const bars = lines.map((line) => [line.indexOf('█'), line.split('█').length - 1] as const);
    expect(Math.abs(bars[0]![1] - 2 * bars[1]![1])).toBeLessThanOrEqual(1);
    expect(Math.abs(bars[1]![0] + bars[1]![1] - bars[2]![0])).toBeLessThanOrEqual(1);
    expect(lines[1]).toMatch(/ node lost$/);
    for (const line of lines) expect(line.replace(/ node lost$/, '').length).toBeLessThanOrEqual(80);
    expect(board().board.timeline(80)).toEqual([]);
  });

  test('an attempt whose node was taken for lost and came back is one attempt', () => {
    const { board: made, lines } = board(
      [0, 'task.leased', '00', { node_id: 'id-1' }],
      [500, 'task.expired', '00'],
      [900, 'task.resumed', '00', { node_id: 'id-1' }],
      [2000, 'task.completed', '00'],
    );
    expect(lines.slice(1)).toEqual([
      'tile-00-00 node lost after 0.50 s on node-1',
      'tile-00-00 goes on on node-1',
      'tile-00-00 completed after 2.00 s on node-1',
    ]);
    expect(made.timeline(80)).toEqual([
      expect.stringMatching(/^tile-00-00 {2}node-1 {2}\+0\.00 s {2}2\.00 s/),
    ]);
  });

  test('a bar is never empty and never outside, however short the attempt or narrow the terminal', () => {
    const { board: made } = board(
      [0, 'job.submitted', null],
      [100_000, 'task.leased', 'p', { node_id: 'id-1' }],
      [100_000, 'task.completed', 'p'],
    );
    for (const width of [1, 80]) expect(made.timeline(width)).toHaveLength(1);
    expect(made.timeline(1)[0]).toMatch(/ {9}█$/);
  });

  test('progress that is not understood changes nothing', () => {
    const { board: made } = board(
      [0, 'task.leased', 'p', { node_id: 'id-1' }],
      [1, 'task.progress', 'p', { progress: null }],
      [2, 'task.progress', 'p', { progress: { done: 1, total: 0 } }],
      [3, 'task.progress', 'unknown', { progress: 1 }],
    );
    expect(made.board(4)[0]).toBe('prepare  ░░░░░░░░░░░░░░░░');
  });
});
