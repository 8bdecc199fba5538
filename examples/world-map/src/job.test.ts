import { describe, expect, test } from 'vitest';
import { buildJob } from './job.ts';
import { placesOf, planMap, planMeta, readPlan, tileName, tilePlace } from './plan.ts';

describe('buildJob', () => {
  const plan = planMap(8192, { columns: 8, rows: 4 }, false);

  test('makes three stages, with one task per tile between the first and the last', () => {
    const job = buildJob(plan, { atlas: 'atlas-id', overlay: null });
    const stages = job.tasks.map(({ stage }) => stage);
    expect(stages).toEqual(['prepare', ...Array.from({ length: 32 }, () => 'tile'), 'stitch']);
    expect(job.edges).toEqual([
      { from: 'prepare', to: 'tile' },
      { from: 'tile', to: 'stitch' },
    ]);
    expect(job.tasks[0]?.inputs_cids).toEqual(['atlas-id']);
    expect(job.tasks.at(-1)?.inputs_cids).toEqual(['stage:tile/*.png']);
  });

  test('gives each tile its own scene and place', () => {
    const { tasks } = buildJob(plan, { atlas: 'a', overlay: 'b' });
    expect(tasks[0]?.inputs_cids).toEqual(['a', 'b']);
    expect(tasks[1]).toMatchObject({
      label: 'tile-00-00',
      inputs_cids: ['stage:prepare/tiles/tile-00-00.json'],
      meta: { column: 0, row: 0 },
    });
    expect(tasks[32]).toMatchObject({
      label: 'tile-07-03',
      inputs_cids: ['stage:prepare/tiles/tile-07-03.json'],
      meta: { column: 7, row: 3 },
    });
    expect(new Set(tasks.map(({ label }) => label)).size).toBe(34);
  });
});

describe('the plan', () => {
  test('goes through task.meta unchanged', () => {
    const plan = planMap(1000, { columns: 3, rows: 2 }, true);
    expect(plan).toEqual({ size: { width: 1000, height: 500 }, grid: { columns: 3, rows: 2 }, fit: true });
    expect(readPlan(JSON.parse(JSON.stringify(planMeta(plan))) as never)).toEqual(plan);
  });

  test('is bounded', () => {
    for (const width of [64, 65_536]) planMap(width, { columns: 1, rows: 1 }, false);
    for (const width of [63, 65_537, 100.5, NaN]) {
      expect(() => planMap(width, { columns: 1, rows: 1 }, false)).toThrow(
        /task.meta.width must be an integer/,
      );
    }
    planMap(4096, { columns: 64, rows: 16 }, false);
    expect(() => planMap(4096, { columns: 65, rows: 16 }, false)).toThrow(/65x16 tiles must be at most 1024/);
    expect(() => planMap(64, { columns: 1, rows: 33 }, false)).toThrow(/each at least a pixel/);
    expect(() => planMap(4096, { columns: 0, rows: 1 }, false)).toThrow(/columns must be an integer from 1/);
    for (const meta of [null, 'x', []]) expect(() => readPlan(meta)).toThrow(/task.meta must be an object/);
  });

  test('names tiles so that their place can be read back, also from a name on the wire', () => {
    for (const { column, row } of placesOf({ columns: 120, rows: 3 })) {
      expect(tilePlace(tileName(column, row))).toEqual({ column, row });
      expect(tilePlace(`out_${tileName(column, row)}_png_2f9f3c62-51c1`)).toEqual({ column, row });
    }
    expect(tilePlace('map.png')).toBeNull();
  });
});
