import { request } from 'node:http';
import { afterEach, describe, expect, test } from 'vitest';
import { openMetricsServer, type MetricsServer } from './metrics-server.ts';
import {
  DURATION_BUCKETS_SECONDS,
  TASK_PHASES,
  noopMetrics,
  prometheusMetrics,
  supervisionMetrics,
} from './metrics.ts';
import { memoryLog } from './simulation/scripted-dms.ts';
import { ENGINE_VERSION } from './version.ts';

describe('prometheusMetrics', () => {
  test('counts starts and endings, measures durations in seconds, and shows what is running', async () => {
    const metrics = await prometheusMetrics();
    metrics.recordTaskStarted('subprocess');
    metrics.recordTaskStarted('subprocess');
    metrics.recordTaskStarted('wasm');
    metrics.recordTaskCompleted('subprocess', 'success', 1_500);
    metrics.recordTaskCompleted('wasm', 'timeout', 20);
    metrics.recordRunnerError('subprocess', 'spawn_failed');
    metrics.recordSlots?.(8);
    metrics.recordTaskBytes?.(10, 20);
    const lines = (await metrics.exposition()).split('\n');
    for (const line of [
      `millrace_build_info{version="${ENGINE_VERSION}",component="node"} 1`,
      'millrace_runner_tasks_started_total{runner="subprocess"} 2',
      'millrace_runner_tasks_started_total{runner="wasm"} 1',
      'millrace_runner_tasks_completed_total{runner="subprocess",outcome="success"} 1',
      'millrace_runner_tasks_completed_total{runner="wasm",outcome="timeout"} 1',
      'millrace_runner_tasks_in_flight{runner="subprocess"} 1',
      'millrace_runner_tasks_in_flight{runner="wasm"} 0',
      'millrace_runner_errors_total{runner="subprocess",error="spawn_failed"} 1',
      'millrace_runner_task_duration_seconds_sum{runner="subprocess",outcome="success"} 1.5',
      'millrace_runner_task_duration_seconds_bucket{le="1",runner="subprocess",outcome="success"} 0',
      'millrace_runner_task_duration_seconds_bucket{le="2.5",runner="subprocess",outcome="success"} 1',
      'millrace_node_slots 8',
      'millrace_node_bytes_total{direction="in"} 10',
      'millrace_node_bytes_total{direction="out"} 20',
    ]) {
      expect(lines).toContain(line);
    }
    expect(lines.some((line) => line.startsWith('process_resident_memory_bytes '))).toBe(true);
    expect(metrics.contentType).toMatch(/^text\/plain/);
  });

  test('has the buckets it is given, by default those of the reference', async () => {
    const boundsOf = async (bucketsSeconds?: readonly number[]): Promise<string[]> => {
      const metrics = await prometheusMetrics(bucketsSeconds === undefined ? {} : { bucketsSeconds });
      metrics.recordTaskCompleted('embedded', 'success', 1);
      const text = await metrics.exposition();
      return [...text.matchAll(/^millrace_runner_task_duration_seconds_bucket\{le="([^"]+)"/gm)].map(
        ([, bound]) => bound!,
      );
    };
    expect(await boundsOf()).toEqual([
      ...'0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 30 60 300 1800 3600'.split(' '),
      '+Inf',
    ]);
    expect(DURATION_BUCKETS_SECONDS).toHaveLength(15);
    expect(await boundsOf([1, 60])).toEqual(['1', '60', '+Inf']);
    await expect(prometheusMetrics({ bucketsSeconds: [1, 1] })).rejects.toThrow(/must be positive and rise/);
    await expect(prometheusMetrics({ bucketsSeconds: [0] })).rejects.toThrow(/must be positive and rise/);
  });

  test('of two nodes do not mix', async () => {
    const [one, two] = [await prometheusMetrics(), await prometheusMetrics()];
    one.recordTaskStarted('wasm');
    expect(await two.exposition()).not.toContain('millrace_runner_tasks_started_total{');
  });

  test('beside a dispatcher leave out what is about the process', async () => {
    const text = await (await prometheusMetrics({ processMetrics: false })).exposition();
    expect(text).not.toMatch(/^(# \w+ )?(process_|nodejs_|millrace_build_info)/m);
    expect(text).toMatch(/^millrace_node_slots /m);
  });

  test('count what supervision does', async () => {
    const metrics = await prometheusMetrics({ processMetrics: false });
    const { supervision } = metrics;
    expect(supervisionMetrics(metrics)).toBe(supervision);
    supervision.attemptStarting(1);
    supervision.attemptEnded();
    // One too many: never below 0.
    supervision.attemptEnded();
    supervision.attemptStarting(2);
    supervision.attemptStarting(1);
    supervision.backoffScheduled('failure', 2_000);
    supervision.attemptTimedOut();
    supervision.terminal('exhausted', 3);
    supervision.terminal('completed', 1);
    supervision.subscriberOverflow();
    supervision.subscriberPanicked();
    supervision.submitted();
    supervision.rejected('slot_busy');
    supervision.observePhases(() => ({ running: 2 }));
    const lines = (await metrics.exposition()).split('\n');
    for (const line of [
      'millrace_sv_tasks_in_flight 2',
      'millrace_sv_task_restarts_total 1',
      'millrace_sv_task_backoff_count_total{source="failure"} 1',
      'millrace_sv_task_backoff_duration_seconds_sum 2',
      'millrace_sv_task_timeouts_total 1',
      'millrace_sv_task_terminal_total{reason="exhausted"} 1',
      'millrace_sv_task_terminal_total{reason="completed"} 1',
      'millrace_sv_attempts_to_finalize_sum{outcome="exhausted"} 3',
      'millrace_sv_subscriber_overflow_total 1',
      'millrace_sv_subscriber_panicked_total 1',
      'millrace_ctrl_submissions_total 1',
      'millrace_ctrl_rejections_total{reason="slot_busy"} 1',
      ...TASK_PHASES.map(
        (phase) => `millrace_sv_tasks_by_phase{phase="${phase}"} ${phase === 'running' ? 2 : 0}`,
      ),
    ]) {
      expect(lines).toContain(line);
    }
  });
});

test('noopMetrics can be called any number of times', () => {
  const metrics = noopMetrics();
  for (let i = 0; i < 3; i += 1) {
    metrics.recordTaskStarted('embedded');
    metrics.recordTaskCompleted('embedded', 'failure', 1);
    metrics.recordRunnerError('embedded', 'spawn_failed');
    supervisionMetrics(metrics).attemptStarting(1);
  }
  expect(noopMetrics()).toBe(metrics);
});

describe('the metrics server', () => {
  let server: MetricsServer | null = null;
  afterEach(() => server?.close());

  async function open(): Promise<string> {
    const metrics = await prometheusMetrics();
    metrics.recordTaskStarted('embedded');
    server = await openMetricsServer({
      port: 0,
      metrics,
      health: () => ({ state: 'running', active: 1 }),
      log: memoryLog(),
    });
    return server.url;
  }

  test('serves the figures and the health on the loopback interface', async () => {
    const url = await open();
    expect(url).toMatch(/^http:\/\/127\.0\.0\.1:\d+$/);
    const metrics = await fetch(`${url}/metrics`);
    expect(metrics.headers.get('content-type')).toMatch(/^text\/plain; version=0\.0\.4/);
    expect(await metrics.text()).toContain('millrace_runner_tasks_started_total{runner="embedded"} 1');
    const health = await fetch(`${url}/health?x=1`);
    expect(await health.json()).toEqual({ status: 'ok', state: 'running', active: 1 });
  });

  test('serves nothing else', async () => {
    const url = await open();
    for (const [method, path, status] of [
      ['GET', '/', 404],
      ['GET', '/metrics/', 404],
      ['POST', '/metrics', 405],
      ['HEAD', '/health', 405],
      ['DELETE', '/x', 404],
    ] as const) {
      const answer = await fetch(url + path, {
        method,
        ...(method === 'POST' && { body: 'x'.repeat(100_000) }),
      });
      await answer.arrayBuffer();
      expect([method, path, answer.status]).toEqual([method, path, status]);
      if (status === 405) expect(answer.headers.get('allow')).toBe('GET');
    }
  });

  test('that cannot have its address says which', async () => {
    const url = await open();
    const port = Number(new URL(url).port);
    await expect(
      openMetricsServer({
        port,
        metrics: await prometheusMetrics(),
        health: () => ({ state: 'running', active: 0 }),
        log: memoryLog(),
      }),
    ).rejects.toThrow(`cannot listen for metrics on 127.0.0.1:${port}`);
  });

  test('closes although a client holds its connection open', async () => {
    const url = await open();
    const held = request(`${url}/metrics`, { agent: false, headers: { connection: 'keep-alive' } });
    const gone = new Promise((resolve) => held.on('socket', (socket) => socket.on('close', resolve)));
    await new Promise<void>((resolve) => {
      held.on('response', (response) => response.on('end', () => resolve()).resume()).end();
    });
    await server!.close();
    await server!.close();
    await gone;
  });
});
