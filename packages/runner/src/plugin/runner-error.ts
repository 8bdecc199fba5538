/** What can go wrong between a task and the runner that is to build it. */
import { MillraceError, type ErrorCode } from '../errors.ts';
import type { TaskKindName } from '../model/task-kind.ts';

/**
 * - `NoRunner` no registered runner takes the task
 * - `DuplicateRunner` a runner of that name is registered
 * - `UnsupportedKind` the runner was asked to build a kind it does not know
 * - `InvalidSpec` the task is not one that this runner performs
 * - `MissingField` something the runner needs is not in the task
 * - `Io` files or processes of the runner itself
 * - `Internal` a rule of the program was broken
 */
export type RunnerErrorVariant =
  'NoRunner' | 'DuplicateRunner' | 'UnsupportedKind' | 'InvalidSpec' | 'MissingField' | 'Io' | 'Internal';

/** An operating error of the runner layer. Made by its static functions. */
export class RunnerError extends MillraceError {
  readonly variant: RunnerErrorVariant;

  constructor(
    variant: RunnerErrorVariant,
    code: ErrorCode,
    message: string,
    options: ConstructorParameters<typeof MillraceError>[2] = {},
  ) {
    super(code, message, options);
    this.name = 'RunnerError';
    this.variant = variant;
  }

  /** `failed_precondition`: another node may have one. `text` is the kind, and what of it nobody has. */
  static noRunner(text: string): RunnerError {
    return new RunnerError('NoRunner', 'failed_precondition', `no suitable runner for task kind: ${text}`);
  }

  /** `already_exists`. */
  static duplicateRunner(name: string): RunnerError {
    return new RunnerError(
      'DuplicateRunner',
      'already_exists',
      `duplicate runner name: ${name}; give one of the two another name`,
    );
  }

  /** `unimplemented`. */
  static unsupportedKind(runner: string, kind: TaskKindName): RunnerError {
    return new RunnerError(
      'UnsupportedKind',
      'unimplemented',
      `unsupported task kind for runner '${runner}': ${kind}`,
    );
  }

  /** `invalid_argument`, or code and details of the error that says what is wrong, which may be that it is not allowed here. */
  static invalidSpec(problem: string | MillraceError): RunnerError {
    if (typeof problem === 'string') {
      return new RunnerError('InvalidSpec', 'invalid_argument', `invalid specification: ${problem}`);
    }
    const { code, details, retryable } = problem;
    return new RunnerError('InvalidSpec', code, `invalid specification: ${problem.message}`, {
      cause: problem,
      details,
      retryable,
    });
  }

  /** What `check` says; what it throws becomes an {@link invalidSpec}, unless it is a bug. */
  static specified<T>(check: () => T): T {
    try {
      return check();
    } catch (error) {
      throw MillraceError.is(error) ? RunnerError.invalidSpec(error) : error;
    }
  }

  /** `invalid_argument`. */
  static missingField(name: string): RunnerError {
    return new RunnerError('MissingField', 'invalid_argument', `missing field: ${name}`);
  }

  /** `unavailable`: it may pass. */
  static io(cause: unknown): RunnerError {
    return new RunnerError('Io', 'unavailable', `io error: ${MillraceError.from(cause).message}`, { cause });
  }

  /** `internal`. */
  static internal(text: string, cause?: unknown): RunnerError {
    return new RunnerError('Internal', 'internal', `internal error: ${text}`, { cause });
  }
}
