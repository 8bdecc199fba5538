/**
 * What an engine brings to the worker side. The pool knows nothing of engines: a job names a module, the worker imports
 * it once and uses its export `guest`. Everything here runs in a worker thread that may be terminated at any instruction.
 */
import type { ErrorCode } from '@millrace/runner';
import type { ComputeReason } from '../errors.ts';
import type { Limits } from '../limits.ts';

/** Limits as they travel to the worker: everything but the callbacks. */
export type GuestLimits = Readonly<
  Omit<Limits, 'now' | 'stderr' | 'metricsSink'> & {
    /** Nanoseconds since 1970. */
    readonly now: bigint;
  }
>;

/** Verified bytes an engine needs besides the artifact, in shared memory. */
export interface Library {
  /** The sha256 of the bytes, in hex. */
  readonly digest: string;
  readonly bytes: Uint8Array;
}

/** The export `guest` of a module an engine names. One per worker, used for one call at a time. */
export interface GuestEngine {
  /**
   * Turns verified bytes into something that can be run: validates, rewrites, compiles. Under `maxPrepareMs`. What it
   * returns goes to other workers by structured clone, so it should be cheap to clone: a WebAssembly.Module, bytes in
   * shared memory, plain numbers and text.
   *
   * @throws MillraceError, reason `module`, when the artifact is not acceptable.
   */
  prepare(source: Uint8Array, limits: GuestLimits, libraries: readonly Library[]): unknown;
  /**
   * Called once, before the worker says it is ready. An engine that exercises itself here spares the first real call the
   * cost of cold code.
   */
  warmUp?(): void;
  /**
   * One invocation, from nothing, under `maxWallMs`. Reports what the guest did as data; throws only for a failure of the
   * engine itself, after which the worker is replaced.
   */
  run(prepared: never, call: GuestCall): GuestOutcome;
  /**
   * Called after a call was reported, when the same code ran twice in a row: whatever of a next call needs no guest code may
   * be done now, while nobody waits for it. Must not throw.
   */
  ahead?(prepared: never): void;
}

/** One invocation as the guest engine sees it. */
export interface GuestCall {
  /** Names what was prepared: digest, engine version, limits. For state an engine keeps in this worker. */
  readonly key: string;
  /** Never empty: an empty input has become `{}`. */
  readonly input: Uint8Array;
  readonly limits: GuestLimits;
  /** Takes diagnostics, as much as the guest has; the bytes are copied. */
  log(bytes: Uint8Array): void;
  /** Tells what is to be reported if the guest is killed now. Costs two stores. */
  note(memoryBytes: number, outputBytes: number): void;
}

export interface GuestFailure {
  readonly code: ErrorCode;
  readonly reason: ComputeReason;
  readonly message: string;
  readonly details?: Readonly<Record<string, unknown>>;
}

export interface GuestOutcome {
  readonly memoryBytes: number;
  /** What the guest had written. */
  readonly outputBytes: number;
  /** Fuel used; `null` when it is not counted. */
  readonly fuelUsed: number | null;
  /** The output, in memory nobody else uses. Empty counts as `{}`. */
  readonly output: Uint8Array<ArrayBuffer> | null;
  /** `null` when it went well. */
  readonly failure: GuestFailure | null;
}
