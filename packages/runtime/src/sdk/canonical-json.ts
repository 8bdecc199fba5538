import { MillraceError, type Json } from '@millrace/runner';

/**
 * Compact JSON with the keys of every object sorted, as the runtimes in use print it: equal values are equal bytes.
 *
 * @throws MillraceError `invalid_argument` for a value that is not JSON, `what` naming it.
 */
export function canonicalJson(value: unknown, what: string): string {
  let text: string | undefined;
  try {
    text = JSON.stringify(value, (_key, member: unknown) => {
      if (typeof member === 'number' && !Number.isFinite(member))
        throw new TypeError(`${member} is not JSON`);
      if (typeof member !== 'object' || member === null || Array.isArray(member)) return member;
      return Object.fromEntries(Object.entries(member).sort(([a], [b]) => (a < b ? -1 : 1)));
    });
  } catch (error) {
    throw new MillraceError('invalid_argument', `${what} must be a JSON value`, { cause: error });
  }
  if (text === undefined) {
    throw new MillraceError('invalid_argument', `${what} must be a JSON value, got ${typeof value}`);
  }
  return text;
}

/** True for an object that is neither null nor an array. */
export function isObject(value: unknown): value is { [key: string]: Json } {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
