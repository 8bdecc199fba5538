/**
 * The closed set of error codes, and the two error classes that cross package boundaries.
 *
 * Three kinds of trouble are never mixed: a bug throws whatever it throws; an operating error is a
 * {@link MillraceError}; a task that failed is data, stored and shown by the dispatcher. Why a task is being
 * stopped is a {@link TaskAbort}, found in `ctx.signal.reason`.
 */

/** Every code an operating error can have, with the sentence that tells when it is used. */
export const ERROR_CODES = {
  invalid_argument: 'The input breaks a rule; sending it again unchanged cannot help.',
  not_found: 'The named thing does not exist.',
  already_exists: 'A thing with that name exists already.',
  failed_precondition: 'The thing is in a state that does not allow this.',
  aborted: 'The lease behind this write is no longer the newest of its task.',
  canceled: 'The caller or the requestor cancelled it.',
  deadline_exceeded: 'Time ran out.',
  resource_exhausted: 'A limit was reached; the message names the limit and the value.',
  unavailable: 'The other side cannot be reached or is not ready; trying again may help.',
  unauthenticated: 'No valid proof of identity came with the request.',
  permission_denied: 'The identity is known and not allowed to do this.',
  unimplemented: 'This side does not offer the operation.',
  data_loss: 'Stored or received bytes do not match their digest or size.',
  internal: 'A rule of the program itself was broken; this is a bug.',
} as const;

export type ErrorCode = keyof typeof ERROR_CODES;

export interface MillraceErrorOptions {
  /** What led to this. Logged by the operator's side, never sent to a peer. */
  readonly cause?: unknown;
  /** Whether the same call may succeed later. Default: true for `unavailable`, else false. */
  readonly retryable?: boolean;
  /** Facts for programs, e.g. `{ limit: 'maxOutputBytes', value: 10 }`. Must be JSON. */
  readonly details?: Readonly<Record<string, unknown>>;
}

const BRAND = Symbol.for('millrace.error');

/** An operating error: the message names the thing, the rule and the value, and can be acted on. */
export class MillraceError extends Error {
  readonly code: ErrorCode;
  readonly retryable: boolean;
  readonly details: Readonly<Record<string, unknown>>;

  constructor(code: ErrorCode, message: string, options: MillraceErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.name = 'MillraceError';
    this.code = code;
    this.retryable = options.retryable ?? code === 'unavailable';
    this.details = options.details ?? {};
    Object.defineProperty(this, BRAND, { value: true });
  }

  /** True for errors of this class from any installed copy of this package. */
  static is(value: unknown): value is MillraceError {
    return typeof value === 'object' && value !== null && (value as { [BRAND]?: unknown })[BRAND] === true;
  }

  /** Anything thrown, as a MillraceError: one of ours as it is, everything else as `internal` with its cause kept. */
  static from(value: unknown, code: ErrorCode = 'internal'): MillraceError {
    if (MillraceError.is(value)) return value;
    return new MillraceError(code, messageOf(value), { cause: value });
  }
}

/**
 * Why a task is being stopped.
 *
 * - `canceled` the requestor cancelled the job; the node reports nothing more once the work is really gone
 * - `lease_lost` the lease expired or belongs to somebody else; nothing is reported, another attempt owns the task
 * - `deadline` the task's deadline or the runner's wall-time limit passed; the task fails
 * - `shutdown` the node is stopping; the lease is released and the attempt does not count
 * - `limit` a resource limit was reached; the task fails and the message names limit and value
 */
export type AbortReason = 'canceled' | 'lease_lost' | 'deadline' | 'shutdown' | 'limit';

const ABORT_BRAND = Symbol.for('millrace.task-abort');

/** The value of `ctx.signal.reason`. The first reason wins; later ones change nothing. */
export class TaskAbort extends Error {
  readonly reason: AbortReason;

  constructor(reason: AbortReason, message?: string) {
    super(message ?? `task stopped: ${reason}`);
    this.name = 'TaskAbort';
    this.reason = reason;
    Object.defineProperty(this, ABORT_BRAND, { value: true });
  }

  /** True for aborts of this class from any installed copy of this package. */
  static is(value: unknown): value is TaskAbort {
    return (
      typeof value === 'object' &&
      value !== null &&
      (value as { [ABORT_BRAND]?: unknown })[ABORT_BRAND] === true
    );
  }
}

/**
 * The message of an error followed by those of its causes (and of what an AggregateError holds), joined by `: `,
 * repeated messages dropped, cut to `maxBytes` of UTF-8 on a character boundary (default 4096, the bound newer posemesh
 * nodes keep for `reason`). Never throws, whatever was thrown.
 */
export function describeError(error: unknown, maxBytes = 4096): string {
  const parts: string[] = [];
  const queue: unknown[] = [error];
  for (let seen = 0; seen < 16 && queue.length > 0; seen += 1) {
    const current = queue.shift();
    const message = messageOf(current);
    if (!parts.some((part) => part.includes(message))) parts.push(message);
    if (!(current instanceof Error)) continue;
    if (current instanceof AggregateError) queue.push(...current.errors.slice(0, 16));
    if (current.cause !== undefined && current.cause !== null) queue.push(current.cause);
  }
  return truncateUtf8(parts.join(': '), maxBytes);
}

/** One line about anything thrown. */
function messageOf(value: unknown): string {
  try {
    if (value instanceof Error) return value.message || value.name || 'unknown error';
    if (typeof value === 'string') return value || 'unknown error';
    if (value === undefined || value === null) return 'unknown error';
    if (typeof value === 'object') return JSON.stringify(value);
    return typeof value === 'function' ? `function ${value.name}` : (value as symbol).toString();
  } catch {
    // A getter or a cycle in the thrown value; where it was thrown matters more than what.
    return `a thrown ${typeof value} that cannot be shown`;
  }
}

/**
 * `text`, or its longest prefix of whole characters that fits with `…` into `maxBytes` bytes of UTF-8. Below 3 bytes there
 * is no room for the mark: the prefix alone.
 */
export function truncateUtf8(text: string, maxBytes: number): string {
  if (text.length * 3 <= maxBytes) return text;
  const bytes = new TextEncoder().encode(text);
  if (bytes.length <= maxBytes) return text;
  const mark = maxBytes >= 3 ? '…' : '';
  let end = Math.max(0, maxBytes - (mark ? 3 : 0));
  while (end > 0 && ((bytes[end] ?? 0) & 0xc0) === 0x80) end -= 1;
  return new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes.subarray(0, end)) + mark;
}
