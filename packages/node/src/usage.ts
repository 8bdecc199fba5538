/**
 * What an attempt used, and how it ended: the `usage` of complete, fail and release. The runner tells its part by
 * `ctx.ctrl.usage`; the node adds what it measured itself and wins where both know.
 */
import { MillraceError, TaskAbort, type AbortReason, type Json, type JsonObject } from '@millrace/runner';
import type { RunnerErrorKind } from './metrics.ts';

/** What came of the work. */
export type Verdict =
  | { readonly kind: 'completed' }
  | { readonly kind: 'failed'; readonly error: unknown }
  | { readonly kind: 'aborted'; readonly abort: TaskAbort };

/** What the node itself knows of an attempt. */
export interface Measured {
  /** From the runner being entered to its settling. */
  readonly wallMs: number;
  /** Of inputs and artifacts. Null: the storage does not count. */
  readonly transferred: { readonly bytesIn: number; readonly bytesOut: number } | null;
  readonly verdict: Verdict;
  /** Wall time an attempt may take, for one that took more. */
  readonly taskWallMs: number;
}

/** Limits that are about memory, by the names runners of all kinds give them. */
const MEMORY_LIMITS: readonly unknown[] = ['memoryBytes', 'memoryMiB', 'maxMemoryMb'];
/** Limits of a whole task's time, likewise. */
const TIME_LIMITS: readonly unknown[] = ['wallMs', 'maxWallMs', 'runMs'];
/** The words for an ending that a runner may use. */
const TOLD_ENDINGS: readonly unknown[] = [
  'exit',
  'signal',
  'out_of_memory',
  'limit',
  'spawn_failed',
  'sandbox_failed',
  'load_failed',
  'output_missing',
  'output_refused',
  'lost',
];
/** As much as a record of it is kept; JSON characters. Ours take a kilobyte. */
const MAX_TOLD_CHARS = 16 * 1024;

const COUNTS = ['peak_memory_bytes', 'cpu_ms', 'cpu_user_ms', 'cpu_system_ms', 'fuel_used'] as const;

/** The usage of one attempt while it is being found out. */
export class UsageRecord {
  #told: JsonObject = {};

  /** Keeps what a runner says it used, unless that is absurdly long. The last one counts. */
  take(told: JsonObject): void {
    if (JSON.stringify(told).length <= MAX_TOLD_CHARS) this.#told = told;
  }

  /** All that is known. What is not known is left out. */
  report({ wallMs, transferred, verdict, taskWallMs }: Measured): JsonObject {
    const told = this.#told;
    const usage: Record<string, Json> = { wall_ms: Math.round(wallMs) };
    for (const name of COUNTS) copyCount(told, name, usage);
    if (transferred === null) for (const name of ['bytes_in', 'bytes_out']) copyCount(told, name, usage);
    else Object.assign(usage, { bytes_in: transferred.bytesIn, bytes_out: transferred.bytesOut });
    if (Number.isInteger(told['exit_code'])) usage['exit_code'] = told['exit_code']!;
    if (typeof told['signal'] === 'string') usage['signal'] = told['signal'];
    Object.assign(usage, ending(verdict, taskWallMs));
    for (const name of ['sandbox', 'container'] as const) {
      if (isObject(told[name])) usage[name] = told[name];
    }
    return usage;
  }
}

function copyCount(from: JsonObject, name: string, to: Record<string, Json>): void {
  const value = from[name];
  if (typeof value === 'number' && Number.isFinite(value) && value >= 0) to[name] = value;
}

/** How it ended, with the exit status and the limit where those are the reason. */
function ending(verdict: Verdict, taskWallMs: number): JsonObject {
  if (verdict.kind === 'completed') return { ending: 'completed' };
  if (verdict.kind === 'aborted') {
    const { reason } = verdict.abort;
    return reason === 'deadline'
      ? { ending: reason, limit: 'taskWallMs', value: taskWallMs }
      : { ending: abortEnding(reason) };
  }
  const { error } = verdict;
  if (TaskAbort.is(error)) return { ending: abortEnding(error.reason) };
  if (!MillraceError.is(error)) return { ending: 'error' };
  const { details, code } = error;
  const found: Record<string, Json> = {};
  for (const name of ['exit_code', 'value'])
    if (typeof details[name] === 'number') found[name] = details[name];
  for (const name of ['signal', 'limit', 'evidence', 'control', 'errno']) {
    if (typeof details[name] === 'string') found[name] = details[name];
  }
  const limited = code === 'resource_exhausted' || code === 'deadline_exceeded';
  const guessed =
    found['limit'] === undefined || !limited
      ? 'error'
      : MEMORY_LIMITS.includes(found['limit'])
        ? 'out_of_memory'
        : 'limit';
  const told = details['ending'];
  return { ending: TOLD_ENDINGS.includes(told) ? (told as string) : guessed, ...found };
}

/** Whether a limit on time is why it ended: the try's, the attempt's, or the runner's own, which is a failure with its name. */
export function isTimeout(error: unknown): boolean {
  if (TaskAbort.is(error)) return error.reason === 'deadline';
  if (!MillraceError.is(error) || error.code !== 'deadline_exceeded') return false;
  return TIME_LIMITS.includes(error.details['limit']);
}

function abortEnding(reason: AbortReason): string {
  return reason === 'lease_lost' ? 'lost' : reason;
}

/** Trouble of the runner itself behind a failure; null: the task's own. */
export function runnerErrorKind(verdict: Verdict): RunnerErrorKind | null {
  const error = verdict.kind === 'failed' ? verdict.error : null;
  if (!MillraceError.is(error)) return null;
  switch (error.details['ending']) {
    case 'spawn_failed':
      return 'spawn_failed';
    case 'sandbox_failed':
      return error.details['control'] === 'cgroup' ? 'cgroup_prepare_failed' : 'backend_config_failed';
    case 'load_failed':
      return 'module_load_failed';
    default:
      return null;
  }
}

function isObject(value: unknown): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
