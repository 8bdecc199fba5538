export { ERROR_CODES, MillraceError, TaskAbort, describeError, truncateUtf8 } from './errors.ts';
export type { AbortReason, ErrorCode, MillraceErrorOptions } from './errors.ts';
export { sleep, systemClock, timeoutSignal } from './clock.ts';
export type { Clock, Random, Timer } from './clock.ts';
export type { Json, JsonObject } from './json.ts';
export type { LeaseEnvelope, TaskSpec } from './lease.ts';
export { parseLease, parseLeaseJson, parseTaskSpec } from './decode.ts';
export type {
  AccessTokenProvider,
  ArtifactSink,
  ByteStream,
  ControlPlane,
  DomainArtifactRequest,
  InputReadOptions,
  InputSource,
  LogLevel,
  Logger,
  MaterializedInput,
  MultipartUpload,
  TaskContext,
} from './context.ts';
export { materializedInput } from './materialized-input.ts';
export { MAX_CAPABILITY_BYTES, RUNNER_TYPES, checkCapability, defineRunner } from './runner.ts';
export type { Runner, RunnerHost, RunnerType } from './runner.ts';
export { NO_TRACES, isTraceparent, parseTraceparent } from './trace.ts';
export type { Span, SpanKind, SpanOptions, TraceAttributes, TraceContext, Tracer } from './trace.ts';
