/**
 * Anything thrown, as a value that can be posted to another thread, and back. Reading a thrown value is
 * itself dangerous (getters that throw, proxies, `toString` that loops through both), so every access is
 * guarded and every text has a bound.
 */
import { inspect } from 'node:util';
import { ERROR_CODES, MillraceError, TaskAbort } from '@millrace/runner';
import type { AbortReason, ErrorCode } from '@millrace/runner';

export interface WireError {
  readonly kind: 'error' | 'millrace' | 'abort';
  readonly name: string;
  readonly message: string;
  readonly stack: string | null;
  /** Of a MillraceError, or of an Error that carries one such as `ENOENT`. */
  readonly code: string | null;
  readonly retryable: boolean;
  readonly details: Readonly<Record<string, unknown>>;
  readonly reason: AbortReason | null;
  readonly cause: WireError | null;
}

const MAX_TEXT_CHARS = 16 * 1024;
const MAX_CAUSES = 8;

/** Never throws. */
export function encodeError(thrown: unknown): WireError {
  return encode(thrown, 0);
}

function encode(thrown: unknown, depth: number): WireError {
  if (!isErrorLike(thrown)) {
    return {
      kind: 'error',
      name: 'Error',
      message: typeof thrown === 'string' ? cut(thrown) : `thrown value is not an Error: ${show(thrown)}`,
      stack: null,
      code: null,
      retryable: false,
      details: {},
      reason: null,
      cause: null,
    };
  }
  const isMillrace = guarded(() => MillraceError.is(thrown), false);
  const isAbort = guarded(() => TaskAbort.is(thrown), false);
  const cause = causeOf(thrown);
  return {
    kind: isMillrace ? 'millrace' : isAbort ? 'abort' : 'error',
    name: text(thrown, 'name') ?? 'Error',
    message: text(thrown, 'message') ?? 'an Error without a readable message',
    stack: text(thrown, 'stack'),
    code: text(thrown, 'code'),
    retryable: isMillrace && read(thrown, 'retryable') === true,
    details: isMillrace ? plainObject(read(thrown, 'details')) : {},
    reason: isAbort ? (text(thrown, 'reason') as AbortReason | null) : null,
    cause: cause === undefined || cause === null || depth >= MAX_CAUSES ? null : encode(cause, depth + 1),
  };
}

/**
 * The error again: a MillraceError is one, with code, details and causes; any other keeps its name, message,
 * stack and code. An abort becomes a TaskAbort only when `trustAborts` says so: the engine decides from a
 * TaskAbort what to report, so a module's thread must not be able to make one up.
 */
export function decodeError(wire: WireError, options: { readonly trustAborts?: boolean } = {}): Error {
  const error = rebuild(wire, options);
  if (wire.stack !== null) error.stack = wire.stack;
  return error;
}

function rebuild(wire: WireError, options: { readonly trustAborts?: boolean }): Error {
  if (wire.kind === 'abort' && options.trustAborts) {
    return new TaskAbort(wire.reason ?? 'canceled', wire.message);
  }
  const cause = wire.cause === null ? undefined : decodeError(wire.cause, options);
  if (wire.kind === 'millrace') {
    const code = wire.code !== null && Object.hasOwn(ERROR_CODES, wire.code) ? wire.code : 'internal';
    const { retryable, details } = wire;
    return new MillraceError(code as ErrorCode, wire.message, { cause, retryable, details });
  }
  const error = new Error(wire.message, cause === undefined ? undefined : { cause });
  Object.defineProperty(error, 'name', { value: wire.name, configurable: true, writable: true });
  if (wire.code !== null) Object.assign(error, { code: wire.code });
  return error;
}

function isErrorLike(value: unknown): value is object {
  return guarded(
    () =>
      typeof value === 'object' &&
      value !== null &&
      (value instanceof Error || typeof (value as { message?: unknown }).message === 'string'),
    false,
  );
}

/** The cause, or the first of several errors thrown as one. */
function causeOf(thrown: object): unknown {
  const cause = read(thrown, 'cause');
  if (cause !== undefined) return cause;
  const errors = read(thrown, 'errors');
  return guarded(() => (Array.isArray(errors) ? (errors[0] as unknown) : undefined), undefined);
}

function text(value: object, key: string): string | null {
  const found = read(value, key);
  return typeof found === 'string' ? cut(found) : null;
}

function read(value: object, key: string): unknown {
  return guarded(() => (value as Record<string, unknown>)[key], undefined);
}

function plainObject(value: unknown): Readonly<Record<string, unknown>> {
  const copy = guarded(() => JSON.parse(JSON.stringify(value)) as unknown, null);
  return typeof copy === 'object' && copy !== null && !Array.isArray(copy)
    ? (copy as Record<string, unknown>)
    : {};
}

function show(value: unknown): string {
  const options = { depth: 2, breakLength: Infinity, customInspect: false, getters: false };
  return cut(guarded(() => inspect(value, options), typeof value));
}

function cut(value: string): string {
  return value.length <= MAX_TEXT_CHARS ? value : `${value.slice(0, MAX_TEXT_CHARS)}…`;
}

function guarded<T>(attempt: () => T, otherwise: T): T {
  try {
    return attempt();
  } catch {
    // The thrown value defends itself; that it was thrown is still told.
    return otherwise;
  }
}
