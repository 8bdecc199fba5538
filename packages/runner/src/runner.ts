/** Code that performs one capability inside a node. */
import type { TaskContext } from './context.ts';
import { MillraceError } from './errors.ts';

export interface Runner {
  /**
   * The kind of work, such as `/examples/hello/v1`: advertised when the node registers, and matched byte for byte
   * against a task's capability.
   */
  readonly capability: string;
  /**
   * Performs one attempt. Resolving means success; rejecting means failure, and the message is reported. Called
   * once per lease; one instance serves all its tasks, possibly at the same time.
   */
  run(ctx: TaskContext): Promise<void>;
  /** Frees what the runner holds. Called once, after the last `run` has settled. */
  close?(): Promise<void>;
}

/** The longest capability accepted, in bytes. */
export const MAX_CAPABILITY_BYTES = 256;

/**
 * Checks a definition and returns it as a Runner. The default export of a runner module is the result of this.
 *
 * @throws MillraceError `invalid_argument` when the capability breaks a rule of {@link checkCapability}, `run` is not a
 * function, or `close` is given and is not one.
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
  if (given.close !== undefined && typeof given.close !== 'function') {
    throw new MillraceError(
      'invalid_argument',
      `runner ${capability}: close must be a function or absent, got ${kind(given.close)}`,
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
