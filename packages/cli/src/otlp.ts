/**
 * Spans to a collector, by OTLP over HTTP in its JSON form. In the background and bounded: what the collector does not take is
 * kept for a while, then dropped and counted; no task ever waits for it.
 */
import { randomBytes } from 'node:crypto';
import {
  describeError,
  parseTraceparent,
  systemClock,
  type Clock,
  type Logger,
  type Span,
  type SpanKind,
  type SpanOptions,
  type Timer,
  type TraceAttributes,
} from '@millrace/runner';
import type { OpenTracer, TracingSettings } from './tracing.ts';
import { programVersion } from './version.ts';

export interface OtlpOptions extends TracingSettings {
  readonly log: Logger;
  readonly clock?: Clock;
}

/** Spans kept while the collector is away; about 2 MB. */
const MAX_PENDING = 2048;
const BATCH = 512;
const EVERY_MS = 1_000;
/** Text of an attribute, characters. */
const MAX_TEXT = 1_000;

const KINDS: Readonly<Record<SpanKind, number>> = {
  internal: 1,
  server: 2,
  client: 3,
  producer: 4,
  consumer: 5,
};
const OK = 1;
const ERROR = 2;

export class OtlpTracer implements OpenTracer {
  readonly #options: OtlpOptions;
  readonly #clock: Clock;
  readonly #pending: object[] = [];
  #dropped = 0;
  #timer: Timer | null = null;
  #sending: Promise<boolean> | null = null;
  #failing = false;
  #closed: Promise<void> | null = null;

  constructor(options: OtlpOptions) {
    this.#options = options;
    this.#clock = options.clock ?? systemClock;
  }

  startSpan(name: string, { parent, kind = 'internal', attributes = {} }: SpanOptions): Span {
    const above = parseTraceparent(parent);
    const traceId = above?.traceId ?? randomId(16);
    const spanId = randomId(8);
    const sampled = above?.sampled ?? isWithin(traceId, this.#options.ratio);
    const startedAt = this.#clock.now();
    const startedMonotonic = this.#clock.monotonic();
    let ended = !sampled;
    return {
      traceparent: `00-${traceId}-${spanId}-${sampled ? '01' : '00'}`,
      end: ({ error, attributes: late = {} } = {}) => {
        if (ended) return;
        ended = true;
        const tookMs = Math.max(0, this.#clock.monotonic() - startedMonotonic);
        this.#add({
          traceId,
          spanId,
          ...(above !== null && { parentSpanId: above.spanId }),
          name,
          kind: KINDS[kind],
          startTimeUnixNano: nanoseconds(startedAt, 0),
          endTimeUnixNano: nanoseconds(startedAt, tookMs),
          attributes: keyValues({ ...attributes, ...late }),
          status: error === undefined ? { code: OK } : { code: ERROR, message: error.slice(0, MAX_TEXT) },
        });
      },
    };
  }

  /** Sends what there is, once, and stops. Never rejects. */
  [Symbol.asyncDispose](): Promise<void> {
    this.#closed ??= (async () => {
      this.#timer?.cancel();
      await this.#sending;
      while (this.#pending.length > 0 && (await this.#send()));
      const lost = this.#pending.length + this.#dropped;
      if (lost > 0) this.#options.log.warn('spans were not sent', { spans: lost });
    })();
    return this.#closed;
  }

  #add(span: object): void {
    if (this.#closed !== null || this.#pending.length >= MAX_PENDING) {
      this.#dropped += 1;
      return;
    }
    this.#pending.push(span);
    this.#timer ??= this.#clock.setTimer(() => void this.#flush(), EVERY_MS, { unref: true });
  }

  async #flush(): Promise<void> {
    while (this.#pending.length > 0) {
      this.#sending = this.#send();
      const sent = await this.#sending;
      this.#sending = null;
      if (!sent || this.#closed !== null) break;
    }
    this.#timer =
      this.#pending.length === 0 || this.#closed !== null
        ? null
        : this.#clock.setTimer(() => void this.#flush(), EVERY_MS, { unref: true });
  }

  /** One batch. False: it is to be tried again later. */
  async #send(): Promise<boolean> {
    const { url, headers, timeoutMs, resource, log } = this.#options;
    const spans = this.#pending.slice(0, BATCH);
    const body = JSON.stringify({
      resourceSpans: [
        {
          resource: { attributes: keyValues(resource) },
          scopeSpans: [{ scope: { name: 'millrace', version: programVersion() }, spans }],
        },
      ],
    });
    try {
      const answer = await fetch(url, {
        method: 'POST',
        headers: { ...headers, 'content-type': 'application/json' },
        body,
        redirect: 'error',
        signal: AbortSignal.timeout(timeoutMs),
      });
      await answer.body?.cancel();
      // These pass by themselves, says the protocol; all others will never take these spans.
      if ([429, 502, 503, 504].includes(answer.status)) throw new Error(`status ${answer.status}`);
      this.#pending.splice(0, spans.length);
      if (answer.ok) {
        this.#failing = false;
        return true;
      }
      this.#dropped += spans.length;
      throw new Error(
        `status ${answer.status}` + (answer.status === 415 ? ', it does not take OTLP in JSON' : ''),
      );
    } catch (error) {
      // Once until it works again: a collector that is away for an hour is one line.
      if (!this.#failing)
        log.warn('spans are not taken by the collector', { url, error: describeError(error) });
      this.#failing = true;
      return false;
    }
  }
}

/** Not all zero, which would mean none. */
function randomId(bytes: number): string {
  const id = randomBytes(bytes).toString('hex');
  return /[1-9a-f]/.test(id) ? id : randomId(bytes);
}

/** The same answer for a trace everywhere: it is in its random last digits. */
function isWithin(traceId: string, ratio: number): boolean {
  return ratio >= 1 || Number.parseInt(traceId.slice(-13), 16) / 16 ** 13 < ratio;
}

function nanoseconds(epochMs: number, laterMs: number): string {
  return String(BigInt(Math.trunc(epochMs)) * 1_000_000n + BigInt(Math.round(laterMs * 1e6)));
}

function keyValues(attributes: TraceAttributes): object[] {
  return Object.entries(attributes).map(([key, value]) => ({
    key,
    value:
      typeof value === 'string'
        ? { stringValue: value.slice(0, MAX_TEXT) }
        : typeof value === 'boolean'
          ? { boolValue: value }
          : Number.isInteger(value)
            ? { intValue: String(value) }
            : { doubleValue: value },
  }));
}
