/**
 * The environment of a program. Nothing of the node's own reaches it but what the operator lets through by name: that holds the
 * node's key and its dispatcher's address.
 */
import { MillraceError, isTraceparent, type JsonObject, type LeaseEnvelope } from '@millrace/runner';
import { EVENTS_FD } from '../process/child.ts';
import { SAFE_PATH } from '../process/find-program.ts';

/** Ours; neither the operator nor a task may set them. */
const RESERVED = /^MILLRACE_/;

export interface EnvironmentOptions {
  /** Set by the operator. Wins over everything but what is reserved. */
  readonly operator: Readonly<Record<string, string>>;
  /** Set by the task, as far as it may. */
  readonly task: Readonly<Record<string, string>>;
  readonly runId: string;
  readonly taskId: string;
  readonly jobId: string | null;
  /** As the program sees them. */
  readonly folders: {
    readonly inputs: string;
    readonly outputs: string;
    readonly work: string;
    readonly temp: string;
  };
  /** The trace it belongs to, see {@link traceContext}. */
  readonly trace: Readonly<Record<string, string>>;
}

export function programEnvironment(options: EnvironmentOptions): Record<string, string> {
  const { folders, trace } = options;
  return {
    PATH: SAFE_PATH,
    LANG: 'C.UTF-8',
    HOME: folders.work,
    TMPDIR: folders.temp,
    ...trace,
    ...options.task,
    ...options.operator,
    MILLRACE_RUN_ID: options.runId,
    MILLRACE_TASK_ID: options.taskId,
    ...(options.jobId === null ? {} : { MILLRACE_JOB_ID: options.jobId }),
    MILLRACE_INPUTS: folders.inputs,
    MILLRACE_OUTPUTS: folders.outputs,
    MILLRACE_EVENTS_FD: String(EVENTS_FD),
  };
}

/** The operator's variables: those of `env`, and those of the node's own environment that `from` names. */
export function operatorEnvironment(
  env: Readonly<Record<string, string>>,
  from: readonly string[],
  nodeEnv: Readonly<Record<string, string | undefined>>,
): Record<string, string> {
  const passed = from.map((name): [string, string] => {
    const value = nodeEnv[name];
    if (value !== undefined) return [name, value];
    throw new MillraceError(
      'invalid_argument',
      `envFrom names ${name}, which the node's environment does not have; set it there, or take it out`,
    );
  });
  const all = { ...Object.fromEntries(passed), ...env };
  for (const [name, value] of Object.entries(all)) checkVariable(`env.${name}`, name, value);
  return all;
}

/** @throws MillraceError `invalid_argument`; the value is not shown. */
export function checkVariable(where: string, name: string, value: unknown): asserts value is string {
  const refuse = (rule: string): never => {
    throw new MillraceError('invalid_argument', `${where} ${rule}`);
  };
  if (!/^[A-Za-z_][A-Za-z0-9_]*$/.test(name)) {
    refuse(
      `must be named by letters, digits and "_", not beginning with a digit, got ${JSON.stringify(name)}`,
    );
  }
  if (RESERVED.test(name)) refuse('must not be one of MILLRACE_*, which the node sets itself');
  if (typeof value !== 'string') refuse('must be a string');
  else if (value.includes('\0')) refuse('must not contain a NUL character');
}

/**
 * W3C Trace Context, under the names OpenTelemetry reads from the environment: the trace of the lease, else the one that the
 * task's meta names.
 */
export function traceContext(
  lease: Pick<LeaseEnvelope, 'traceparent'>,
  { traceparent, tracestate }: JsonObject,
): Record<string, string> {
  if (lease.traceparent !== undefined) return { TRACEPARENT: lease.traceparent };
  if (!isTraceparent(traceparent)) return {};
  const state = typeof tracestate === 'string' && /^[\x20-\x7e]{1,512}$/.test(tracestate);
  return { TRACEPARENT: traceparent, ...(state ? { TRACESTATE: tracestate } : {}) };
}
