/** Where a node serves its metrics, by option or environment. */
import { MillraceError } from '@millrace/runner';
import type { Env } from './terminal.ts';
import { parseInteger } from './units.ts';

export interface Listen {
  /** Absent: the loopback interface. */
  readonly host?: string;
  readonly port: number;
}

/**
 * `port` or `host:port`; an IPv6 host in brackets.
 *
 * @param name of the option, for errors
 * @throws MillraceError `invalid_argument`
 */
export function parseListen(text: string, name: string): Listen {
  const match = /^(?:(\[[^\]]+\]|[^:]+):)?(\d+)$/.exec(text.trim());
  if (match === null) {
    throw new MillraceError(
      'invalid_argument',
      `${name} must be PORT or HOST:PORT, got ${JSON.stringify(text)}`,
    );
  }
  const port = parseInteger(match[2]!, `${name} port`, 0, 65_535);
  return match[1] === undefined ? { port } : { host: match[1].replace(/^\[|\]$/g, ''), port };
}

/** What `--metrics` says, else `MILLRACE_METRICS`. Null: metrics are off. @throws as {@link parseListen} */
export function metricsAddress(option: string | undefined, env: Env): Listen | null {
  if (option !== undefined) return parseListen(option, '--metrics');
  const value = env['MILLRACE_METRICS']?.trim();
  return value ? parseListen(value, 'MILLRACE_METRICS') : null;
}

/**
 * `MILLRACE_METRICS_BUCKETS`: bounds of the durations' buckets in seconds, rising, with commas. Undefined: the defaults.
 *
 * @throws MillraceError `invalid_argument`
 */
export function metricsBuckets(env: Env): number[] | undefined {
  const text = env['MILLRACE_METRICS_BUCKETS']?.trim();
  if (!text) return undefined;
  const bounds = text.split(',').map(Number);
  if (bounds.every((bound, at) => Number.isFinite(bound) && bound > (bounds[at - 1] ?? 0))) return bounds;
  throw new MillraceError(
    'invalid_argument',
    `MILLRACE_METRICS_BUCKETS must be positive, rising seconds such as 0.1,1,10, got ${JSON.stringify(text)}`,
  );
}
