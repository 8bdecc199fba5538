/**
 * What an S3 server and the way to it can answer, in our terms: what may be tried again, what the operator has to mend, and in
 * which words. Nothing here carries a request, a signature or a key: the driver's errors hold those, so of them only the name
 * and the sentence are kept.
 */
import { MillraceError, type ErrorCode } from '@millrace/runner';

/** The driver's error, as far as it concerns us. */
interface DriverError {
  readonly name?: string;
  readonly message?: string;
  /** errno of a socket, or the SDK's own. */
  readonly code?: string;
  readonly Code?: string;
  readonly Region?: string;
  readonly $metadata?: { readonly httpStatusCode?: number };
  readonly $response?: { readonly headers?: Readonly<Record<string, string>> };
  readonly cause?: unknown;
}

interface Refusal {
  readonly code: ErrorCode;
  readonly say: (where: string, what: string, error: DriverError) => string;
}

const CHECK_CREDENTIALS =
  'check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile named by AWS_PROFILE';

const wrongRegion: Refusal = {
  code: 'failed_precondition',
  say: (where, _, error) => {
    const region =
      error.Region ??
      error.$response?.headers?.['x-amz-bucket-region'] ??
      /expecting '([a-z0-9-]+)'/.exec(error.message ?? '')?.[1];
    return `${where} is in another region${
      region === undefined ? '' : ` (${region})`
    } than the one requests are signed for; give ?region=${region ?? '…'} in the URL of the blobs`;
  },
};

const wrongSecret: Refusal = {
  code: 'unauthenticated',
  say: (where, _, error) => `${where} refused the credentials (${nameOf(error)}); ${CHECK_CREDENTIALS}`,
};

const busy: Refusal = {
  code: 'unavailable',
  say: (where, what, error) => `${what}: ${where} cannot serve it now (${nameOf(error)})`,
};

/** By the code of S3's answer, which is the name of the driver's error. */
const REFUSALS: Readonly<Record<string, Refusal>> = {
  NoSuchBucket: {
    code: 'failed_precondition',
    say: (where) => `${where} does not exist; create it first, or correct its name`,
  },
  AccessDenied: {
    code: 'permission_denied',
    say: (where, what) =>
      `${what}: ${where} denies that to these credentials; docs/s3.md lists the rights they need`,
  },
  AllAccessDisabled: {
    code: 'permission_denied',
    say: (where) => `${where} is disabled by its owner or the provider`,
  },
  AuthorizationHeaderMalformed: wrongRegion,
  IllegalLocationConstraintException: wrongRegion,
  PermanentRedirect: wrongRegion,
  InvalidAccessKeyId: wrongSecret,
  SignatureDoesNotMatch: wrongSecret,
  InvalidToken: wrongSecret,
  ExpiredToken: {
    code: 'unauthenticated',
    say: (where) => `${where} refused the credentials: they expired; renew them`,
  },
  RequestTimeTooSkewed: {
    code: 'failed_precondition',
    say: (where) =>
      `${where} refuses requests because its clock and this machine's are more than 15 minutes apart; set the clock`,
  },
  QuotaExceeded: {
    code: 'resource_exhausted',
    say: (where, what) => `${what}: the quota of ${where} is used up; raise it or free space`,
  },
  EntityTooLarge: {
    code: 'resource_exhausted',
    say: (where, what) => `${what}: more than ${where} takes in one object`,
  },
  InvalidObjectState: {
    code: 'failed_precondition',
    say: (where, what) =>
      `${what}: ${where} moved the object to an archive class; exclude the prefix from that lifecycle rule`,
  },
  NotImplemented: {
    code: 'unimplemented',
    say: (where, what) => `${what}: ${where} does not implement that part of S3`,
  },
  CredentialsProviderError: {
    code: 'unauthenticated',
    say: (where) =>
      `no credentials for ${where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (the standard AWS chain is searched)`,
  },
  SlowDown: busy,
  ServiceUnavailable: busy,
  InternalError: busy,
  RequestTimeout: busy,
  OperationAborted: busy,
  BadDigest: busy,
};

const BY_STATUS: Readonly<Record<number, string>> = {
  301: 'PermanentRedirect',
  307: 'PermanentRedirect',
  403: 'AccessDenied',
  501: 'NotImplemented',
};

const RETRYABLE_QUOTA: ReadonlySet<ErrorCode> = new Set(['resource_exhausted']);

/** True when the answer is that the key (not the bucket) is not there. */
export function isAbsent(error: unknown): boolean {
  const { name } = error as DriverError;
  // A HEAD has no body, so there the status is all there is.
  return name === 'NoSuchKey' || name === 'NotFound' || name === 'NoSuchUpload';
}

/** True when a range lies outside of the object. */
export function isOutOfRange(error: unknown): boolean {
  return (error as DriverError).name === 'InvalidRange' || statusOf(error as DriverError) === 416;
}

/**
 * The error to answer with: `what` was being done (`storing blob sha256:…`), `where` names bucket and endpoint. Our own errors
 * and the reason of an abort pass as they are.
 */
export function s3Error(error: unknown, what: string, where: string, signal?: AbortSignal): unknown {
  if (MillraceError.is(error)) return error;
  if (signal?.aborted === true) return signal.reason;
  const driver = error as DriverError;
  const status = statusOf(driver);
  const cause = causeOf(driver);
  const refusal =
    REFUSALS[driver.name ?? ''] ??
    REFUSALS[driver.Code ?? ''] ??
    (status === undefined ? undefined : REFUSALS[BY_STATUS[status] ?? '']);
  if (refusal !== undefined) {
    return new MillraceError(refusal.code, refusal.say(where, what, driver), {
      cause,
      ...(RETRYABLE_QUOTA.has(refusal.code) && { retryable: true }),
    });
  }
  // Without a status nothing was answered: the way to the server is broken.
  if (status === undefined) {
    return new MillraceError('unavailable', `${what}: ${where} cannot be reached: ${reachOf(driver)}`);
  }
  if (status >= 500 || status === 429 || status === 408) {
    return new MillraceError('unavailable', busy.say(where, what, driver), { cause });
  }
  return new MillraceError(
    'internal',
    `${what}: ${where} answered ${status} ${nameOf(driver)}: ${driver.message ?? ''}`,
    { cause },
  );
}

function statusOf(error: DriverError): number | undefined {
  const status = error.$metadata?.httpStatusCode;
  // An answer that could not be read to its end has one too, but is no refusal.
  return status === undefined || status < 300 ? undefined : status;
}

function nameOf(error: DriverError): string {
  return error.name ?? error.Code ?? 'no name';
}

function causeOf(error: DriverError): Error {
  const { message = '' } = error;
  // What the SDK says when the answer had a code and no sentence.
  return new Error(
    message === '' || message === 'UnknownError' ? nameOf(error) : `${nameOf(error)}: ${message}`,
  );
}

/** Of a connection that several addresses were tried for, the first failure. */
function reachOf(error: DriverError): string {
  const inner = (error as { readonly errors?: readonly DriverError[] }).errors?.[0] ?? error;
  return inner.message === undefined || inner.message === '' ? (inner.code ?? nameOf(inner)) : inner.message;
}
