import { MillraceError, describeError } from '@millrace/runner';
import { WIRE_ERROR } from '../wire/error-codes.ts';

/** What kind of failure an error answer names. */
export type RuntimeErrorKind = keyof typeof WIRE_ERROR;

export interface RuntimeErrorOptions {
  /** Default `internal`. */
  readonly kind?: RuntimeErrorKind;
  /** What the process or the command ends with, 1 to 255. Default 1. */
  readonly exitCode?: number;
  /** Facts for the supervisor, sent with an error answer. Default none. */
  readonly context?: Readonly<Record<string, string>>;
  readonly cause?: unknown;
}

/**
 * A failure a handler reports on purpose. Anything else that is thrown counts as `internal` with exit code 1.
 *
 * @throws RangeError for an exit code outside 1 to 255.
 */
export class RuntimeError extends Error {
  readonly kind: RuntimeErrorKind;
  readonly exitCode: number;
  readonly context: Readonly<Record<string, string>>;

  constructor(message: string, options: RuntimeErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    const exitCode = options.exitCode ?? 1;
    if (!Number.isInteger(exitCode) || exitCode < 1 || exitCode > 255) {
      throw new RangeError(`exitCode must be a whole number from 1 to 255, got ${exitCode}`);
    }
    this.name = 'RuntimeError';
    this.kind = options.kind ?? 'internal';
    this.exitCode = exitCode;
    this.context = options.context ?? {};
  }

  /** Anything thrown, with the message of its causes. */
  static from(error: unknown): RuntimeError {
    if (error instanceof RuntimeError) return error;
    const kind = MillraceError.is(error) ? KINDS[error.code] : undefined;
    return new RuntimeError(describeError(error), { kind: kind ?? 'internal', cause: error });
  }

  /** As the runtimes in use print it on stderr. */
  get line(): string {
    return `${this.message} (code: ${this.exitCode})`;
  }
}

const KINDS: Readonly<Partial<Record<string, RuntimeErrorKind>>> = {
  not_found: 'not_found',
  invalid_argument: 'bad_request',
  failed_precondition: 'bad_request',
  unimplemented: 'bad_request',
};
