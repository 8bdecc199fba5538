/** The program's exit codes, fixed for scripts, and which error gives which. */
import type { ErrorCode } from '@millrace/runner';

export const EXIT = {
  done: 0,
  /** The job failed, or something the user cannot mend by calling differently. */
  failed: 1,
  /** Wrong usage or configuration. */
  usage: 2,
  canceled: 3,
  /** Unreachable or unauthorised. */
  unreachable: 4,
} as const;

export type ExitCode = (typeof EXIT)[keyof typeof EXIT];

const EXIT_OF_ERROR: Readonly<Record<ErrorCode, ExitCode>> = {
  invalid_argument: EXIT.usage,
  not_found: EXIT.usage,
  already_exists: EXIT.usage,
  failed_precondition: EXIT.usage,
  unimplemented: EXIT.usage,
  canceled: EXIT.canceled,
  unavailable: EXIT.unreachable,
  unauthenticated: EXIT.unreachable,
  permission_denied: EXIT.unreachable,
  aborted: EXIT.failed,
  deadline_exceeded: EXIT.failed,
  resource_exhausted: EXIT.failed,
  data_loss: EXIT.failed,
  internal: EXIT.failed,
};

export function exitCodeOf(code: ErrorCode): ExitCode {
  return EXIT_OF_ERROR[code];
}
