/** Whether and where traces go: the standard variables of OpenTelemetry. Reading them costs nothing; sending is in `otlp.ts`. */
import { MillraceError, type Logger, type TraceAttributes, type Tracer } from '@millrace/runner';
import type { Env } from './terminal.ts';

/** Settings of the export, from the environment. */
export interface TracingSettings {
  /** Where to POST. */
  readonly url: string;
  /** May hold secrets. */
  readonly headers: Readonly<Record<string, string>>;
  readonly timeoutMs: number;
  /** Of the process: `service.name` and what `OTEL_RESOURCE_ATTRIBUTES` has. */
  readonly resource: TraceAttributes;
  /** Part of the traces begun here that are recorded, 0 to 1. Those begun elsewhere are as their beginner wants. */
  readonly ratio: number;
}

/** A tracer that sends what it has when disposed. */
export interface OpenTracer extends Tracer, AsyncDisposable {}

const DEFAULT_TIMEOUT_MS = 10_000;

/**
 * Null when tracing is off: neither `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` nor `OTEL_EXPORTER_OTLP_ENDPOINT` is set, or
 * `OTEL_SDK_DISABLED=true`, or `OTEL_TRACES_EXPORTER=none`.
 *
 * @param service `service.name` unless `OTEL_SERVICE_NAME` says another
 * @throws MillraceError `invalid_argument` naming the variable, and its value unless it is one that may be secret
 */
export function tracingSettings(env: Env, service: string): TracingSettings | null {
  const read = (name: string): string | null => env[name]?.trim() || null;
  const either = (part: string): { readonly name: string; readonly value: string } | null => {
    for (const name of [`OTEL_EXPORTER_OTLP_TRACES_${part}`, `OTEL_EXPORTER_OTLP_${part}`]) {
      const value = read(name);
      if (value !== null) return { name, value };
    }
    return null;
  };
  const endpoint = either('ENDPOINT');
  if (endpoint === null || read('OTEL_SDK_DISABLED')?.toLowerCase() === 'true') return null;
  if (read('OTEL_TRACES_EXPORTER') === 'none') return null;
  const wrong = (name: string, rule: string, value: string): MillraceError =>
    new MillraceError('invalid_argument', `${name} must be ${rule}, got ${JSON.stringify(value)}`);
  if (!URL.canParse(endpoint.value) || !/^https?:$/.test(new URL(endpoint.value).protocol)) {
    throw wrong(endpoint.name, 'an http or https URL such as http://127.0.0.1:4318', endpoint.value);
  }
  const protocol = either('PROTOCOL');
  if (protocol !== null && !/^http\/(json|protobuf)$/.test(protocol.value)) {
    throw wrong(protocol.name, 'http/json (http/protobuf counts as that)', protocol.value);
  }
  const timeout = either('TIMEOUT');
  const timeoutMs = timeout === null ? DEFAULT_TIMEOUT_MS : Number(timeout.value);
  if (timeout !== null && !(timeoutMs > 0)) {
    throw wrong(timeout.name, 'a number of milliseconds', timeout.value);
  }
  const headers = either('HEADERS');
  // The general variable is a base for all signals, the other one the place itself.
  const base = endpoint.value.replace(/\/+$/, '');
  return {
    url: endpoint.name.includes('_TRACES_') ? endpoint.value : `${base}/v1/traces`,
    headers: headers === null ? {} : pairs(headers.name, headers.value),
    timeoutMs,
    resource: {
      'service.name': service,
      ...pairs('OTEL_RESOURCE_ATTRIBUTES', read('OTEL_RESOURCE_ATTRIBUTES') ?? ''),
      ...(read('OTEL_SERVICE_NAME') !== null && { 'service.name': read('OTEL_SERVICE_NAME')! }),
    },
    ratio: ratioOf(read('OTEL_TRACES_SAMPLER'), read('OTEL_TRACES_SAMPLER_ARG')),
  };
}

/**
 * The tracer of this process, or null when tracing is off; then nothing is loaded.
 *
 * @throws as {@link tracingSettings}
 */
export async function openTracer(env: Env, service: string, log: Logger): Promise<OpenTracer | null> {
  const settings = tracingSettings(env, service);
  if (settings === null) return null;
  const { OtlpTracer } = await import('./otlp.ts');
  return new OtlpTracer({ ...settings, log });
}

function ratioOf(sampler: string | null, argument: string | null): number {
  const name = sampler?.replace(/^parentbased_/, '') ?? 'always_on';
  if (name === 'always_on') return 1;
  if (name === 'always_off') return 0;
  const ratio = Number(argument ?? '1');
  if (name !== 'traceidratio' || !(ratio >= 0 && ratio <= 1)) {
    throw new MillraceError(
      'invalid_argument',
      'OTEL_TRACES_SAMPLER must be always_on, always_off or traceidratio, also with parentbased_ before it, and ' +
        `OTEL_TRACES_SAMPLER_ARG from 0 to 1, got ${JSON.stringify(sampler)} and ${JSON.stringify(argument)}`,
    );
  }
  return ratio;
}

/** `a=1,b=two%20words`. */
function pairs(variable: string, text: string): Record<string, string> {
  const found: Record<string, string> = {};
  for (const part of text.split(',').filter((each) => each.trim() !== '')) {
    const at = part.indexOf('=');
    try {
      if (at <= 0) throw new Error('no name');
      found[part.slice(0, at).trim()] = decodeURIComponent(part.slice(at + 1).trim());
    } catch (cause) {
      // Its value may be a credential.
      throw new MillraceError(
        'invalid_argument',
        `${variable} must be a list such as name=value,other=value with values percent-encoded`,
        { cause },
      );
    }
  }
  return found;
}
