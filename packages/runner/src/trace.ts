/**
 * Traces, as far as everybody needs them: the W3C form of a trace's context, and the port that spans go through. Nothing
 * here sends anything; without a tracer a context is handed on as it came.
 */

/** What a `traceparent` says. */
export interface TraceContext {
  /** 32 hex digits, not all zero. */
  readonly traceId: string;
  /** 16 hex digits, not all zero: the span to be a child of. */
  readonly spanId: string;
  /** False: whoever began the trace does not want it recorded. */
  readonly sampled: boolean;
}

const TRACEPARENT =
  /^(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?$/;

/** Null for what is no `traceparent`, which by the standard counts as none. Later versions' additions are dropped. */
export function parseTraceparent(value: unknown): TraceContext | null {
  if (typeof value !== 'string' || value.length > 256) return null;
  const match = TRACEPARENT.exec(value);
  // Version 00 has no additions.
  if (match === null || (value.startsWith('00') && value.length !== 55)) return null;
  return {
    traceId: match[1]!,
    spanId: match[2]!,
    sampled: (Number.parseInt(match[3]!, 16) & 1) === 1,
  };
}

export function isTraceparent(value: unknown): value is string {
  return parseTraceparent(value) !== null;
}

/** By OpenTelemetry's names and meaning. */
export type SpanKind = 'internal' | 'server' | 'client' | 'producer' | 'consumer';

export type TraceAttributes = Readonly<Record<string, string | number | boolean>>;

export interface SpanOptions {
  /** `traceparent` of the span around it; null begins a trace. */
  readonly parent: string | null;
  /** Default `internal`. */
  readonly kind?: SpanKind;
  readonly attributes?: TraceAttributes;
}

/** One piece of work with a beginning and an end. */
export interface Span {
  /** For its children; null when there is no trace. */
  readonly traceparent: string | null;
  /** `error`: why it failed; absent when it did not. The first call counts. */
  end(ending?: { readonly error?: string; readonly attributes?: TraceAttributes }): void;
}

/** Where spans go. Called from the engine's thread: must not throw, must return at once. */
export interface Tracer {
  startSpan(name: string, options: SpanOptions): Span;
}

/** Records nothing; a context it is given is handed on. */
export const NO_TRACES: Tracer = {
  startSpan: (_name, { parent }) => ({ traceparent: parent, end: () => undefined }),
};
