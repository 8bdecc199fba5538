/**
 * What can go wrong with a compute. Every error is a MillraceError; its `details.reason` says which rule of computes was
 * broken, so that a program never has to read the text.
 */
import { MillraceError } from '@millrace/runner';
import type { ErrorCode } from '@millrace/runner';

/** Every value of `details.reason`, with the sentence that tells when it is used. */
export const COMPUTE_REASONS = {
  'not-found': 'No artifact exists for the ref.',
  'bad-ref': 'The ref, or what a task says about its compute, has the wrong shape.',
  'bad-digest': 'The bytes are not those the digest names.',
  'bad-limit': 'A limit is outside of its bounds.',
  'unknown-engine': 'No engine has that name.',
  module:
    'The artifact is not a module this engine accepts: malformed, too big, or using a feature or import it does not grant.',
  'input-limit': 'The input is larger than maxInputBytes.',
  trap: 'The guest trapped.',
  exit: 'The guest ended itself with an exit code other than 0.',
  'wall-limit': 'The guest ran longer than maxWallMs.',
  'prepare-limit': 'Validating and compiling took longer than maxPrepareMs.',
  'memory-limit': 'The guest or its engine asked for more memory than there is for it.',
  'output-limit': 'The guest wrote more than maxOutputBytes.',
  'out-of-fuel': 'The guest used up its fuel.',
  'bad-output': 'What the guest wrote is not one JSON document.',
  busy: 'More invocations are waiting than the pool lets wait.',
  closed: 'The manager, engine or pool was closed.',
  host: 'The engine itself failed.',
} as const;

export type ComputeReason = keyof typeof COMPUTE_REASONS;

/** An error with its reason. Further details must be JSON. */
export function computeError(
  code: ErrorCode,
  reason: ComputeReason,
  message: string,
  options: { readonly cause?: unknown; readonly details?: Readonly<Record<string, unknown>> } = {},
): MillraceError {
  return new MillraceError(code, message, {
    cause: options.cause,
    retryable: code === 'unavailable' || reason === 'busy',
    details: { reason, ...options.details },
  });
}

/** Why a compute failed, or `null` when the error is not about a compute. */
export function computeReason(error: unknown): ComputeReason | null {
  if (!MillraceError.is(error)) return null;
  const { reason } = error.details;
  return typeof reason === 'string' && Object.hasOwn(COMPUTE_REASONS, reason)
    ? (reason as ComputeReason)
    : null;
}

/** A resolver's answer when there is no artifact for a ref: `not_found`. Nothing else is an ErrNotFound. */
export class ErrNotFound extends MillraceError {
  constructor(ref?: string) {
    super('not_found', `compute: artifact not found${ref === undefined ? '' : `: ${ref}`}`, {
      details: { reason: 'not-found' satisfies ComputeReason },
    });
    this.name = 'ErrNotFound';
  }

  /** True for this error from any installed copy of this package. */
  static override is(value: unknown): value is ErrNotFound {
    return MillraceError.is(value) && value.code === 'not_found' && computeReason(value) === 'not-found';
  }
}
