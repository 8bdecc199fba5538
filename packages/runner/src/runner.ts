/** Code that performs one capability inside a node. */
import type { Logger, TaskContext } from './context.ts';
import { MillraceError } from './errors.ts';

/**
 * What isolates the work of a runner; the node's metrics count by it:
 *
 * - `embedded` a module in a thread of the node, or nothing
 * - `subprocess` a program in a sandbox
 * - `container` a container engine
 * - `wasm` a content-addressed compute
 * - `runtime` a Golem runtime
 */
export const RUNNER_TYPES = ['embedded', 'subprocess', 'container', 'wasm', 'runtime'] as const;

export type RunnerType = (typeof RUNNER_TYPES)[number];

export interface Runner {
  /**
   * The kind of work, such as `/examples/hello/v1`: advertised when the node registers, and matched byte for byte
   * against a task's capability.
   */
  readonly capability: string;
  /** Default `embedded`. */
  readonly type?: RunnerType;
  /**
   * Performs one attempt. Resolving means success; rejecting means failure, and the message is reported. Called
   * once per lease; one instance serves all its tasks, possibly at the same time.
   */
  run(ctx: TaskContext): Promise<void>;
  /**
   * What is worth doing when the node starts, before there is a task: removing what a crash left behind, telling what is missing. Called once by
   * the node, beside its registration; tasks do not wait for it, so `run` must not rely on it. What it rejects with is logged. Not
   * called for a module in a thread, whose top level is the place for that.
   */
  onNodeStart?(host: RunnerHost): Promise<void>;
  /** Frees what the runner holds. Called once, after the last `run` has settled. */
  close?(): Promise<void>;
}

/** What a node lends to a runner of its own. */
export interface RunnerHost {
  /** For the operator. */
  readonly log: Logger;
  /** Aborts when the node ends, which then waits for {@link Runner.onNodeStart} to settle. */
  readonly signal: AbortSignal;
}

/** The longest capability accepted, in bytes. */
export const MAX_CAPABILITY_BYTES = 256;

/**
 * Checks a definition and returns it as a Runner. The default export of a runner module is the result of this.
 *
 * @throws MillraceError `invalid_argument` when the capability breaks a rule of {@link checkCapability}, `run` is not a
 * function, or `onNodeStart` or `close` is given and is not one.
 */
export function defineRunner(definition: Runner): Runner {
  // Runner modules may be plain JavaScript, so nothing of the type is certain here.
  if (typeof definition !== 'object' || definition === null) {
    throw new MillraceError('invalid_argument', `defineRunner takes an object, got ${kind(definition)}`);
  }
  const given: Readonly<Partial<Record<keyof Runner, unknown>>> = definition;
  const { capability } = given;
  checkCapability(capability);
  if (typeof given.run !== 'function') {
    throw new MillraceError(
      'invalid_argument',
      `runner ${capability}: run must be a function, got ${kind(given.run)}`,
    );
  }
  for (const name of ['onNodeStart', 'close'] as const) {
    if (given[name] === undefined || typeof given[name] === 'function') continue;
    throw new MillraceError(
      'invalid_argument',
      `runner ${capability}: ${name} must be a function or absent, got ${kind(given[name])}`,
    );
  }
  return definition;
}

/**
 * A capability is a non-empty string without white space, control characters and lone surrogates, of at most
 * {@link MAX_CAPABILITY_BYTES} bytes of UTF-8.
 *
 * @throws MillraceError `invalid_argument`, naming the rule and the value.
 */
export function checkCapability(value: unknown): asserts value is string {
  if (typeof value !== 'string' || value === '') {
    throw new MillraceError(
      'invalid_argument',
      `capability must be a non-empty string, got ${value === '' ? '""' : kind(value)}`,
    );
  }
  if (/[\s\p{Cc}\p{Cs}]/u.test(value)) {
    throw new MillraceError(
      'invalid_argument',
      `capability ${JSON.stringify(value)} must not contain white space, control characters or lone surrogates`,
    );
  }
  const bytes = new TextEncoder().encode(value).length;
  if (bytes > MAX_CAPABILITY_BYTES) {
    throw new MillraceError(
      'invalid_argument',
      `capability must be at most ${MAX_CAPABILITY_BYTES} bytes, got ${bytes}`,
    );
  }
}

function kind(value: unknown): string {
  return value === null ? 'null' : typeof value;
}
