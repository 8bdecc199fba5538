/** What an operator sees of a job: its usage, its metrics, its trace. Real processes, and a collector on a real socket. */
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Program, answer, ask, makePlace, type Place } from './program.test.support.ts';

interface Span {
  readonly traceId: string;
  readonly spanId: string;
  readonly parentSpanId?: string;
  readonly name: string;
  readonly kind: number;
  readonly startTimeUnixNano: string;
  readonly endTimeUnixNano: string;
  readonly attributes: readonly { readonly key: string; readonly value: Record<string, unknown> }[];
  readonly status: { readonly code: number; readonly message?: string };
}

/** Takes OTLP in JSON, as any collector does. */
class Collector {
  readonly spans: (Span & { readonly service: string })[] = [];
  readonly headers: Record<string, unknown>[] = [];
  readonly #server: Server;

  constructor() {
    this.#server = createServer((request, response) => {
      const chunks: Buffer[] = [];
      request.on('data', (chunk: Buffer) => chunks.push(chunk));
      request.on('end', () => {
        if (request.url !== '/v1/traces') {
          response.writeHead(404).end();
          return;
        }
        this.headers.push(request.headers);
        const { resourceSpans } = JSON.parse(Buffer.concat(chunks).toString()) as {
          resourceSpans: {
            resource: { attributes: { key: string; value: { stringValue: string } }[] };
            scopeSpans: { spans: Span[] }[];
          }[];
        };
        for (const { resource, scopeSpans } of resourceSpans) {
          const service = resource.attributes.find(({ key }) => key === 'service.name')!.value.stringValue;
          this.spans.push(
            ...scopeSpans.flatMap(({ spans }) => spans.map((span) => Object.assign(span, { service }))),
          );
        }
        response.writeHead(200, { 'content-type': 'application/json' }).end('{}');
      });
    });
  }

  async listen(): Promise<string> {
    await new Promise<void>((resolve) => this.#server.listen(0, '127.0.0.1', resolve));
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  async close(): Promise<void> {
    this.#server.closeAllConnections();
    await new Promise((resolve) => this.#server.close(resolve));
  }
}

const EXEC = fileURLToPath(import.meta.resolve('@millrace/exec'));
const CONFIG = `
import { subprocess } from ${JSON.stringify(EXEC)};
const sh = (capability, script, outputs = []) =>
  subprocess({ capability, command: 'sh', args: ['-c', script], inputs: ['in'], outputs, sandbox: { tier: 'none' } });
export default {
  runners: [
    sh('/test/trace/v1', 'printf "%s" "$TRACEPARENT" > "$MILLRACE_OUTPUTS/trace.txt"', ['trace.txt']),
    sh('/test/exit/v1', 'exit 3'),
    sh('/test/killed/v1', 'kill -KILL $$'),
    sh('/test/sleep/v1', 'sleep 60'),
    subprocess({ capability: '/test/late/v1', command: 'sleep', args: ['60'], limits: { wallMs: 200 }, sandbox: { tier: 'none' } }),
    subprocess({ capability: '/test/missing/v1', command: 'no-such-program', args: [], sandbox: { tier: 'none' } }),
    './module.mjs',
  ],
};
`;
const MODULE = `export default { capability: '/test/module/v1', async run(ctx) {
  await ctx.output.putBytes('trace.txt', Buffer.from(String(ctx.lease.traceparent)));
} };`;

const task = (capability: string): string =>
  `  - { label: t, capability: ${capability}, max_attempts: 1, inputs_cids: ["file:./in.txt"] }`;
const jobFile = (...capabilities: string[]): string =>
  `label: watched\ntasks:\n${capabilities.map((capability, at) => task(capability).replace('label: t', `label: t${at}`)).join('\n')}\n`;

interface Shown {
  readonly job: { readonly id: string };
  readonly receipts: readonly {
    readonly outcome: string;
    readonly meta: { readonly usage: Record<string, unknown> };
  }[];
}

let place: Place;
beforeAll(async () => {
  place = await makePlace();
  await writeFile(path.join(place.cwd, 'millrace.config.mjs'), CONFIG);
  await writeFile(path.join(place.cwd, 'module.mjs'), MODULE);
  await writeFile(path.join(place.cwd, 'in.txt'), 'input');
});
afterAll(() => place[Symbol.asyncDispose]());

/** Runs a job to its end and shows it. */
async function run(
  url: string,
  data: string,
  env: Record<string, string>,
  ...capabilities: string[]
): Promise<Shown> {
  const name = `${capabilities.join('+').replaceAll('/', '_')}.yaml`;
  await writeFile(path.join(place.cwd, name), jobFile(...capabilities));
  const at = ['--url', url, '--data', data];
  const { stdout, stderr } = await ask(['submit', name, '--watch', '--json', ...at], place, { env });
  if (stdout === '') throw new Error(stderr);
  const { job_id: id } = JSON.parse(stdout) as { job_id: string };
  return JSON.parse(await answer(['job', 'show', id, '--json', ...at], place)) as Shown;
}

async function artifact(url: string, data: string, jobId: string): Promise<string> {
  const out = `out-${jobId}`;
  await answer(['get', jobId, '--out', out, '--url', url, '--data', data], place);
  return await readFile(path.join(place.cwd, out, 'trace.txt'), 'utf8');
}

/** Names of the series in an exposition, of histograms with their parts. */
function seriesOf(text: string): Set<string> {
  return new Set(
    text
      .split('\n')
      .filter((line) => line !== '' && !line.startsWith('#'))
      .map((line) => /^[a-zA-Z_:][a-zA-Z0-9_:]*/.exec(line)![0]),
  );
}

describe('a dispatcher and a node in processes of their own', () => {
  const collector = new Collector();
  let dispatcher: Program;
  let node: Program;
  let url: string;
  let metricsUrl: string;
  const data = 'apart';

  beforeAll(async () => {
    const OTEL_EXPORTER_OTLP_ENDPOINT = await collector.listen();
    const otel = { OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_HEADERS: 'x-tenant=mill%20race' };
    dispatcher = new Program(['dispatch', 'serve', '--port', '0', '--data', data], place, otel);
    ({ url } = await dispatcher.firstDocument<{ url: string }>());
    await answer(['nodes', 'add', '--name', 'n', '--out', 'node.env', '--url', url, '--data', data], place);
    node = new Program(['node', 'start', '--env-file', 'node.env', '--metrics', '0', '--json'], place, otel);
    const first = await node.firstDocument<{ metrics_url?: string }>();
    if (first.metrics_url === undefined) throw new Error(JSON.stringify(first));
    metricsUrl = first.metrics_url;
  }, 60_000);
  afterAll(async () => {
    await node[Symbol.asyncDispose]();
    await dispatcher[Symbol.asyncDispose]();
    await collector.close();
  });

  test('the node says once which sandboxes there are', async () => {
    const line = await node.printed('stderr', /\{[^\n]*sandbox tiers available[^\n]*\}/);
    expect(JSON.parse(line)).toMatchObject({
      tiers: expect.arrayContaining(['none']),
      best: expect.any(String),
    });
  });

  test('each attempt tells what it used and how it ended', async () => {
    const { receipts } = await run(url, data, {}, '/test/trace/v1');
    expect(receipts).toHaveLength(1);
    expect(receipts[0]).toMatchObject({
      outcome: 'completed',
      meta: {
        usage: {
          wall_ms: expect.any(Number),
          bytes_in: 5,
          bytes_out: 55,
          exit_code: 0,
          ending: 'completed',
          sandbox: {
            asked: { tier: 'none' },
            applied: { tier: 'none', controls: { wall: 'timer' } },
            missing: expect.any(Array),
          },
        },
      },
    });
    const failed = await run(url, data, {}, '/test/exit/v1');
    expect(failed.receipts[0]?.meta.usage).toMatchObject({ ending: 'exit', exit_code: 3, bytes_out: 0 });
    const shown = await answer(['job', 'show', failed.job.id, '--url', url, '--data', data], place);
    expect(shown).toMatch(/USED BY +ENDED +WALL/);
    expect(shown).toMatch(/t0 +exit 3 .* 5 B .*none/);
  });

  test('one trace goes from the submission through the task into the program', async () => {
    const { job } = await run(url, data, {}, '/test/trace/v1');
    const [, traceId, spanId] = /^00-([0-9a-f]{32})-([0-9a-f]{16})-01$/.exec(
      await artifact(url, data, job.id),
    )!;
    const inTrace = (): Collector['spans'] => collector.spans.filter((span) => span.traceId === traceId);
    const named = (name: string): Collector['spans'][number] => {
      const found = inTrace().filter((span) => span.name === name);
      expect([name, found.length]).toEqual([name, 1]);
      return found[0]!;
    };
    await expect.poll(() => inTrace().length, { timeout: 20_000 }).toBe(5);
    const [submit, attempt, work] = [named('submit job'), named('task attempt'), named('run')];
    expect(submit).toMatchObject({ service: 'millrace-dispatcher', kind: 4, status: { code: 1 } });
    expect(submit.parentSpanId).toBeUndefined();
    expect(submit.attributes).toContainEqual({ key: 'millrace.job.id', value: { stringValue: job.id } });
    expect(attempt).toMatchObject({ service: 'millrace-node', kind: 5, parentSpanId: submit.spanId });
    expect(attempt.attributes).toContainEqual({ key: 'millrace.attempt', value: { intValue: '1' } });
    // The program is a child of the run.
    expect(work).toMatchObject({ spanId, parentSpanId: attempt.spanId });
    const storage = inTrace().filter(({ name }) => name.startsWith('storage '));
    expect(storage).toHaveLength(2);
    for (const span of storage) expect(span).toMatchObject({ parentSpanId: attempt.spanId, kind: 3 });
    for (const span of inTrace()) {
      expect(BigInt(span.endTimeUnixNano)).toBeGreaterThanOrEqual(BigInt(span.startTimeUnixNano));
    }
    expect(collector.headers[0]).toMatchObject({ 'x-tenant': 'mill race' });
  });

  test('a submission within a trace makes the job a part of it, also for a module', async () => {
    const TRACEPARENT = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01';
    const { job } = await run(url, data, { TRACEPARENT }, '/test/module/v1');
    expect(await artifact(url, data, job.id)).toMatch(
      /^00-0af7651916cd43dd8448eb211c80319c-[0-9a-f]{16}-01$/,
    );
    const submit = (): Span | undefined =>
      collector.spans.find((span) => span.traceId === TRACEPARENT.slice(3, 35));
    await expect.poll(submit, { timeout: 20_000 }).toMatchObject({ parentSpanId: 'b7ad6b7169203331' });
  });

  test('whatever happens to an attempt is told in its record, and counted once', async () => {
    for (const [capability, usage] of [
      ['/test/killed/v1', { ending: 'signal', signal: 'SIGKILL' }],
      ['/test/late/v1', { ending: 'limit', limit: 'wallMs', value: 200 }],
      ['/test/missing/v1', { ending: 'spawn_failed', errno: 'ENOENT' }],
    ] as const) {
      const { receipts } = await run(url, data, {}, capability);
      expect(receipts[0]?.meta.usage).toMatchObject(usage);
    }
    const at = ['--url', url, '--data', data];
    await writeFile(path.join(place.cwd, 'sleep.yaml'), jobFile('/test/sleep/v1'));
    const { job_id: id } = JSON.parse(await answer(['submit', 'sleep.yaml', '--json', ...at], place)) as {
      job_id: string;
    };
    const shown = async (): Promise<Shown & { readonly tasks: readonly { readonly status: string }[] }> =>
      JSON.parse(await answer(['job', 'show', id, '--json', ...at], place));
    await expect.poll(async () => (await shown()).tasks[0]?.status, { timeout: 20_000 }).toBe('running');
    await answer(['job', 'cancel', id, ...at], place);
    await expect
      .poll(async () => (await shown()).receipts[0]?.meta?.usage, { timeout: 20_000 })
      .toMatchObject({ ending: 'canceled', sandbox: { applied: { tier: 'none' } } });
    const text = await (await fetch(metricsUrl)).text();
    const valueOf = (series: string): number =>
      Number(
        text
          .split('\n')
          .find((line) => line.startsWith(`${series} `))
          ?.slice(series.length) ?? 0,
      );
    const completed = (outcome: string): number =>
      valueOf(`millrace_runner_tasks_completed_total{runner="subprocess",outcome="${outcome}"}`);
    const outcomes = ['success', 'failure', 'canceled', 'timeout'].map(completed);
    expect(outcomes[2]).toBe(1);
    expect(outcomes[1]).toBeGreaterThanOrEqual(3);
    expect(outcomes[3]).toBe(1);
    expect(outcomes.reduce((sum, count) => sum + count)).toBe(
      valueOf('millrace_runner_tasks_started_total{runner="subprocess"}'),
    );
    expect(valueOf('millrace_runner_tasks_in_flight{runner="subprocess"}')).toBe(0);
    expect(valueOf('millrace_runner_errors_total{runner="subprocess",error="spawn_failed"}')).toBe(1);
  }, 60_000);

  test('every metric the dashboard asks for is there', async () => {
    const [ofDispatcher, ofNode] = await Promise.all(
      [`${url}/metrics`, metricsUrl].map(async (each) => await (await fetch(each)).text()),
    );
    const known = new Set([...seriesOf(ofDispatcher!), ...seriesOf(ofNode!)]);
    const text = await readFile(new URL('../../../docs/grafana-dashboard.json', import.meta.url), 'utf8');
    const asked = new Set(text.match(/\bmillrace_[a-z0-9_]+/g));
    expect(asked.size).toBeGreaterThan(20);
    expect([...asked].filter((name) => !known.has(name))).toEqual([]);
    // And the table of all of them leaves none out.
    const table = await readFile(new URL('../../../docs/metrics.md', import.meta.url), 'utf8');
    const types = [...`${ofDispatcher}\n${ofNode}`.matchAll(/^# TYPE (millrace_\S+) /gm)].map(
      ([, name]) => name!,
    );
    expect(types.filter((name) => !table.includes(`\`${name}\``))).toEqual([]);
  });

  test('the health of the node is told beside its metrics', async () => {
    const health = await fetch(metricsUrl.replace('/metrics', '/health'));
    expect(await health.json()).toEqual({ status: 'ok', state: 'running', active: 0 });
  });
});

describe('millrace up', () => {
  test('has both on one page, each name once, and traces nothing unless asked to', async () => {
    await using up = new Program(['up', '--port', '0', '--data', 'both', '--json'], place);
    const { url } = await up.firstDocument<{ url: string }>();
    const { job } = await run(url, 'both', {}, '/test/trace/v1');
    expect(await artifact(url, 'both', job.id)).toBe('');
    const text = await (await fetch(`${url}/metrics`)).text();
    const types = [...text.matchAll(/^# TYPE (\S+) /gm)].map(([, name]) => name!);
    expect(types.filter((name, at) => types.indexOf(name) !== at)).toEqual([]);
    expect(text).toMatch(/^millrace_attempts_ended_total\{outcome="completed"\} 1$/m);
    expect(text).toMatch(
      /^millrace_runner_tasks_completed_total\{runner="subprocess",outcome="success"\} 1$/m,
    );
    expect(text).toMatch(/^millrace_node_bytes_total\{direction="in"\} 5$/m);
  }, 60_000);
});

describe('millrace doctor', () => {
  test('tells of each tier and of control groups whether it works here and what it holds, and of containers', async () => {
    const at = ['--config', 'millrace.config.mjs'];
    const { stdout } = await ask(['doctor', '--json', ...at], place);
    interface Found {
      readonly name: string;
      readonly state: string;
      readonly finding: string;
      readonly todo: string | null;
      readonly details?: Readonly<Record<string, unknown>>;
    }
    const { checks } = JSON.parse(stdout) as { readonly checks: readonly Found[] };
    const sandboxes = checks.filter(({ name, details }) => name === 'sandbox' && details !== undefined);
    expect(sandboxes.map(({ details }) => details!['tier'] ?? 'cgroup')).toEqual([
      'none',
      'limits',
      'namespaces',
      'bwrap',
      'cgroup',
    ]);
    for (const { state, finding, todo, details } of sandboxes) {
      const available = details!['available'] === true;
      expect([state, finding.includes('does not work') || finding.startsWith('no ')]).toEqual(
        available ? ['ok', false] : ['warn', true],
      );
      expect(todo).toBe(available ? null : details!['reason']);
      expect(Object.keys(details!['controls'] as object).length > 0).toBe(available);
    }
    expect(sandboxes.filter(({ finding }) => finding.includes('what auto takes'))).toHaveLength(1);
    const [containers, ...others] = checks.filter(({ name }) => name === 'containers');
    expect(others).toEqual([]);
    expect(containers?.details).toMatchObject({ available: expect.any(Boolean), host: expect.any(String) });
    // For people the same, in lines.
    const lines = (await ask(['doctor', ...at], place)).stdout;
    expect(lines).toMatch(/^ok {4}sandbox +none works/m);
    expect(lines).toMatch(/^(ok {4}|warn {2})containers /m);
  }, 60_000);
});

describe('wrong settings are said before anything starts', () => {
  test.each([
    [['--metrics', 'nowhere'], {}, /--metrics must be PORT or HOST:PORT, got "nowhere"/],
    [['--metrics', '65536'], {}, /--metrics port must be an integer/],
    [[], { MILLRACE_METRICS: 'x:y' }, /MILLRACE_METRICS must be PORT or HOST:PORT/],
    [
      ['--metrics', '0'],
      { MILLRACE_METRICS_BUCKETS: '5,1' },
      /MILLRACE_METRICS_BUCKETS must be positive, rising/,
    ],
    [[], { OTEL_EXPORTER_OTLP_ENDPOINT: 'collector:4317' }, /OTEL_EXPORTER_OTLP_ENDPOINT must be an http/],
  ] as const)('%j %j', async (args, env, message) => {
    const { code, stderr } = await ask(['node', 'start', ...args], place, {
      env: {
        REG_SECRET: Buffer.from('a:b').toString('base64'),
        SECP256K1_PRIVHEX: '1'.repeat(64),
        ENABLE_NOOP: 'true',
        LOG_LEVEL: 'off',
        ...env,
      },
    });
    expect(stderr).toMatch(message);
    expect(code).toBe(2);
  });
});
