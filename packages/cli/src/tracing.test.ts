import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { Logger } from '@millrace/runner';
import { afterEach, describe, expect, test } from 'vitest';
import { OtlpTracer } from './otlp.ts';
import { openTracer, tracingSettings } from './tracing.ts';

const ENDPOINT = 'http://127.0.0.1:4318';
const silent: Logger = { debug() {}, info() {}, warn() {}, error() {}, child: () => silent };

describe('the settings', () => {
  test('are those of OpenTelemetry', () => {
    expect(tracingSettings({ OTEL_EXPORTER_OTLP_ENDPOINT: ` ${ENDPOINT}/base/ ` }, 'svc')).toEqual({
      url: `${ENDPOINT}/base/v1/traces`,
      headers: {},
      timeoutMs: 10_000,
      resource: { 'service.name': 'svc' },
      ratio: 1,
    });
    expect(
      tracingSettings(
        {
          OTEL_EXPORTER_OTLP_ENDPOINT: 'http://other',
          OTEL_EXPORTER_OTLP_TRACES_ENDPOINT: `${ENDPOINT}/here`,
          OTEL_EXPORTER_OTLP_HEADERS: 'authorization=Bearer%20a%3Db, x=1',
          OTEL_EXPORTER_OTLP_TRACES_TIMEOUT: '500',
          OTEL_EXPORTER_OTLP_PROTOCOL: 'http/protobuf',
          OTEL_RESOURCE_ATTRIBUTES: 'service.name=lost,deployment.environment=test',
          OTEL_SERVICE_NAME: 'mine',
          OTEL_TRACES_SAMPLER: 'parentbased_traceidratio',
          OTEL_TRACES_SAMPLER_ARG: '0.25',
        },
        'svc',
      ),
    ).toEqual({
      url: `${ENDPOINT}/here`,
      headers: { authorization: 'Bearer a=b', x: '1' },
      timeoutMs: 500,
      resource: { 'service.name': 'mine', 'deployment.environment': 'test' },
      ratio: 0.25,
    });
  });

  test.each([
    {},
    { OTEL_EXPORTER_OTLP_ENDPOINT: ' ' },
    { OTEL_EXPORTER_OTLP_ENDPOINT: ENDPOINT, OTEL_SDK_DISABLED: 'TRUE' },
    { OTEL_EXPORTER_OTLP_ENDPOINT: ENDPOINT, OTEL_TRACES_EXPORTER: 'none' },
  ])('%j: tracing is off', async (env) => {
    expect(await openTracer(env, 'svc', silent)).toBeNull();
  });

  test.each([
    [
      { OTEL_EXPORTER_OTLP_ENDPOINT: 'localhost:4318' },
      /OTEL_EXPORTER_OTLP_ENDPOINT must be an http or https URL/,
    ],
    [{ OTEL_EXPORTER_OTLP_PROTOCOL: 'grpc' }, /OTEL_EXPORTER_OTLP_PROTOCOL must be http\/json/],
    [{ OTEL_EXPORTER_OTLP_TIMEOUT: 'soon' }, /OTEL_EXPORTER_OTLP_TIMEOUT must be a number/],
    [{ OTEL_TRACES_SAMPLER: 'jaeger' }, /OTEL_TRACES_SAMPLER must be/],
    [
      { OTEL_TRACES_SAMPLER: 'traceidratio', OTEL_TRACES_SAMPLER_ARG: '2' },
      /OTEL_TRACES_SAMPLER_ARG from 0 to 1/,
    ],
  ])('%j is refused', (env, message) => {
    expect(() => tracingSettings({ OTEL_EXPORTER_OTLP_ENDPOINT: ENDPOINT, ...env }, 'svc')).toThrow(message);
  });

  test('headers that cannot be read are refused without showing them', () => {
    for (const value of ['s3cret', '=s3cret', 'a=%s3cret']) {
      const env = { OTEL_EXPORTER_OTLP_ENDPOINT: ENDPOINT, OTEL_EXPORTER_OTLP_HEADERS: value };
      const wrong = (): unknown => tracingSettings(env, 'svc');
      expect(wrong).toThrow(/OTEL_EXPORTER_OTLP_HEADERS must be a list/);
      expect(wrong).not.toThrow(/s3cret/);
    }
  });
});

describe('the export', () => {
  let server: Server | null = null;
  afterEach(async () => {
    server?.closeAllConnections();
    await new Promise<void>((resolve) => (server === null ? resolve() : server.close(() => resolve())));
    server = null;
  });

  interface Bench {
    readonly tracer: OtlpTracer;
    /** Names of the spans of each request that was answered with success. */
    readonly batches: string[][];
    readonly warnings: string[];
    status: number;
    requests: number;
  }

  async function bench(ratio = 1): Promise<Bench> {
    const self = { batches: [] as string[][], warnings: [] as string[], status: 200, requests: 0 };
    server = createServer((request, response) => {
      const chunks: Buffer[] = [];
      request.on('data', (chunk: Buffer) => chunks.push(chunk));
      request.on('end', () => {
        self.requests += 1;
        if (self.status === 200) {
          const body = JSON.parse(Buffer.concat(chunks).toString()) as {
            resourceSpans: [{ scopeSpans: [{ spans: { name: string }[] }] }];
          };
          self.batches.push(body.resourceSpans[0].scopeSpans[0].spans.map(({ name }) => name));
        }
        response.writeHead(self.status).end();
      });
    });
    await new Promise<void>((resolve) => server!.listen(0, '127.0.0.1', resolve));
    const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/v1/traces`;
    const log: Logger = { ...silent, warn: (message) => void self.warnings.push(message) };
    const settings = { url, headers: {}, timeoutMs: 5_000, resource: { 'service.name': 'svc' }, ratio };
    return Object.assign(self, { tracer: new OtlpTracer({ ...settings, log }) });
  }

  test('sends what there is when it is closed, and nothing afterwards', async () => {
    const b = await bench();
    const span = b.tracer.startSpan('one', { parent: null });
    span.end();
    span.end({ error: 'the second end is none' });
    const open = b.tracer.startSpan('two', { parent: span.traceparent });
    expect(open.traceparent!.slice(3, 35)).toBe(span.traceparent!.slice(3, 35));
    await b.tracer[Symbol.asyncDispose]();
    open.end();
    await b.tracer[Symbol.asyncDispose]();
    expect(b.batches).toEqual([['one']]);
    expect(b.warnings).toEqual([]);
  });

  test('sends by itself soon, in batches of 512', async () => {
    const b = await bench();
    for (let index = 0; index < 513; index += 1) b.tracer.startSpan(`s${index}`, { parent: null }).end();
    await expect.poll(() => b.batches.map((batch) => batch.length), { timeout: 15_000 }).toEqual([512, 1]);
    await b.tracer[Symbol.asyncDispose]();
  });

  test('keeps what a collector does not take now, at most 2048, and says so once', async () => {
    const b = await bench();
    b.status = 503;
    for (let index = 0; index < 2049; index += 1) b.tracer.startSpan(`s${index}`, { parent: null }).end();
    await expect.poll(() => b.requests, { timeout: 15_000 }).toBeGreaterThan(1);
    b.status = 200;
    await expect.poll(() => b.batches.flat().length, { timeout: 15_000 }).toBe(2048);
    await b.tracer[Symbol.asyncDispose]();
    expect(b.warnings).toEqual(['spans are not taken by the collector', 'spans were not sent']);
  });

  test('drops what a collector will never take', async () => {
    const b = await bench();
    b.status = 415;
    b.tracer.startSpan('bad', { parent: null }).end();
    await expect.poll(() => b.requests, { timeout: 15_000 }).toBe(1);
    b.status = 200;
    b.tracer.startSpan('good', { parent: null }).end();
    await b.tracer[Symbol.asyncDispose]();
    expect(b.batches).toEqual([['good']]);
  });

  test('a collector that is not there holds nothing up', async () => {
    const b = await bench();
    await new Promise((resolve) => server!.close(resolve));
    server = null;
    b.tracer.startSpan('lost', { parent: null }).end();
    await b.tracer[Symbol.asyncDispose]();
    expect(b.warnings).toEqual(['spans are not taken by the collector', 'spans were not sent']);
  });

  test('a trace whose beginner does not want it recorded is handed on and not sent', async () => {
    const b = await bench();
    const trace = '0af7651916cd43dd8448eb211c80319c';
    const span = b.tracer.startSpan('quiet', { parent: `00-${trace}-b7ad6b7169203331-00` });
    expect(span.traceparent).toMatch(new RegExp(`^00-${trace}-[0-9a-f]{16}-00$`));
    span.end();
    b.tracer.startSpan('loud', { parent: `00-${trace}-b7ad6b7169203331-01` }).end();
    await b.tracer[Symbol.asyncDispose]();
    expect(b.batches).toEqual([['loud']]);
  });

  test('of the traces begun here the part asked for is recorded', async () => {
    for (const [ratio, least, most] of [
      [0, 0, 0],
      [0.5, 300, 700],
      [1, 1000, 1000],
    ] as const) {
      const b = await bench(ratio);
      let sampled = 0;
      for (let index = 0; index < 1000; index += 1) {
        if (b.tracer.startSpan('x', { parent: null }).traceparent!.endsWith('-01')) sampled += 1;
      }
      expect(sampled).toBeGreaterThanOrEqual(least);
      expect(sampled).toBeLessThanOrEqual(most);
      server!.close();
    }
  });
});
