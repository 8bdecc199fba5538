import { describe, expect, test } from 'vitest';
import { noopMetrics, prometheusMetrics } from './metrics.ts';

describe('prometheusMetrics', () => {
  test('counts starts and endings, measures durations in seconds, and shows what is active', async () => {
    const metrics = await prometheusMetrics();
    metrics.recordTaskStarted('/a/v1');
    metrics.recordTaskStarted('/a/v1');
    metrics.recordTaskStarted('/b/v1');
    metrics.recordTaskCompleted('/a/v1', 'success', 1_500);
    metrics.recordTaskCompleted('/b/v1', 'timeout', 20);
    const lines = (await metrics.exposition()).split('\n');
    for (const line of [
      'millrace_tasks_started_total{capability="/a/v1"} 2',
      'millrace_tasks_started_total{capability="/b/v1"} 1',
      'millrace_tasks_completed_total{capability="/a/v1",outcome="success"} 1',
      'millrace_tasks_completed_total{capability="/b/v1",outcome="timeout"} 1',
      'millrace_tasks_active{capability="/a/v1"} 1',
      'millrace_tasks_active{capability="/b/v1"} 0',
      'millrace_task_duration_seconds_sum{capability="/a/v1",outcome="success"} 1.5',
      'millrace_task_duration_seconds_bucket{le="1",capability="/a/v1",outcome="success"} 0',
      'millrace_task_duration_seconds_bucket{le="2.5",capability="/a/v1",outcome="success"} 1',
    ]) {
      expect(lines).toContain(line);
    }
    expect(lines.some((line) => line.startsWith('process_resident_memory_bytes '))).toBe(true);
    expect(metrics.contentType).toMatch(/^text\/plain/);
  });

  test('of two nodes do not mix', async () => {
    const [one, two] = [await prometheusMetrics(), await prometheusMetrics()];
    one.recordTaskStarted('/a/v1');
    expect(await two.exposition()).not.toContain('millrace_tasks_started_total{');
  });
});

test('noopMetrics can be called any number of times', () => {
  const metrics = noopMetrics();
  for (let i = 0; i < 3; i += 1) {
    metrics.recordTaskStarted('a');
    metrics.recordTaskCompleted('a', 'failure', 1);
  }
  expect(noopMetrics()).toBe(metrics);
});
