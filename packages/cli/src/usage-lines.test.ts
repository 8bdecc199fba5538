import type { ReceiptRecord } from '@millrace/dispatch';
import type { Json } from '@millrace/runner';
import { describe, expect, test } from 'vitest';
import { paint } from './terminal.ts';
import { usageLines } from './usage-lines.ts';

const plain = paint(false);

function receipt(task: string, meta: Json): ReceiptRecord {
  return {
    id: 'lease',
    job_id: 'job',
    task_id: task,
    node_id: 'node',
    outputs: [],
    meta,
    created_at: '2026-01-01T00:00:00.000Z',
    outcome: 'completed',
    reason: null,
    leased_at: '2026-01-01T00:00:00.000Z',
  };
}

const show = (...metas: Json[]): string[] =>
  usageLines(
    metas.map((_, at) => [`id${at}`, `t${at}`] as const),
    metas.map((meta, at) => receipt(`id${at}`, meta)),
    plain,
  );

describe('usage as people read it', () => {
  test('is a row per task, in units', () => {
    const lines = show(
      {
        usage: {
          wall_ms: 61_000,
          cpu_ms: 1_500,
          peak_memory_bytes: 3 * 1024 ** 2,
          bytes_in: 2048,
          bytes_out: 0,
          ending: 'completed',
          sandbox: { applied: { tier: 'bwrap', cgroup: true }, missing: [] },
        },
      },
      {
        usage: {
          wall_ms: 5,
          ending: 'out_of_memory',
          limit: 'memoryBytes',
          value: 64,
          sandbox: { applied: { tier: 'limits', cgroup: false }, missing: ['kill', 'network'] },
        },
      },
    );
    expect(lines).toEqual([
      '',
      'USED BY  ENDED                               WALL    CPU   MEMORY       IN  OUT  SANDBOX',
      't0       completed                     1 min 01 s  1.5 s  3.0 MiB  2.0 KiB  0 B  bwrap+cgroup',
      't1       out_of_memory memoryBytes 64        5 ms      -        -        -    -  limits, without kill, network',
    ]);
  });

  test.each([
    [{ ending: 'exit', exit_code: 3 }, 'exit 3'],
    [{ ending: 'exit', exit_code: 1, limit: 'processes', value: 5 }, 'exit 1'],
    [{ ending: 'signal', signal: 'SIGSEGV' }, 'signal SIGSEGV'],
    [{ ending: 'deadline', limit: 'taskWallMs', value: 500 }, 'deadline taskWallMs 500'],
    [{ ending: 'canceled', exit_code: 0 }, 'canceled'],
  ])('%j is %s', (usage, ended) => {
    expect(show({ usage })[2]).toBe(`t0       ${ended}`);
  });

  test('of a task tried again it is the newest that is told', () => {
    const receipts = [receipt('id0', { usage: { ending: 'exit', exit_code: 3 } }), receipt('id0', null)];
    expect(usageLines([['id0', 't0']], receipts, plain)[2]).toContain('exit 3');
  });

  test('is nothing where nobody tells, and strange values are left out', () => {
    expect(show(null, {}, { usage: null }, { usage: 'much' }, [])).toEqual([]);
    const [, , row] = show({
      usage: { wall_ms: -1, cpu_ms: 'x', bytes_in: null, ending: 'a\u001b[2Jb', sandbox: { applied: 5 } },
    });
    expect(row).not.toContain('\u001b');
    expect(row).toMatch(/^t0 +a/);
  });

  test('is cut after a hundred rows', () => {
    const lines = show(...Array.from({ length: 101 }, () => ({ usage: { wall_ms: 1 } })));
    expect(lines).toHaveLength(103);
    expect(lines.at(-1)).toBe('  … and 1 more; --json has them all');
  });
});
