/** What a data item may be called: the limits of the posemesh domain service for names and data types. */
import { MillraceError } from '@millrace/runner';

export const MAX_DATA_NAME_BYTES = 128;

// eslint-disable-next-line no-control-regex -- control characters are exactly what is refused
const FORBIDDEN = /[\u0000-\u001f\u007f-\u009f;!?<>[\]{}()/\\"$#@*^&|~%=+]/u;

/**
 * A name or data type as the service takes it: 1 to 128 bytes of UTF-8, no control characters, none of
 * `; ! ? < > [ ] { } ( ) / \ " $ # @ * ^ & | ~ % = +`.
 *
 * @throws MillraceError `invalid_argument` naming `what`, the rule and the value.
 */
export function checkDataName(value: string, what: string): string {
  const bytes = Buffer.byteLength(value);
  if (bytes < 1 || bytes > MAX_DATA_NAME_BYTES) {
    throw new MillraceError(
      'invalid_argument',
      `${what} must be 1 to ${MAX_DATA_NAME_BYTES} bytes, got ${bytes}: ${JSON.stringify(value.slice(0, 80))}`,
    );
  }
  const bad = FORBIDDEN.exec(value);
  if (bad !== null) {
    throw new MillraceError(
      'invalid_argument',
      `${what} must not contain control characters or any of ; ! ? < > [ ] { } ( ) / \\ " $ # @ * ^ & | ~ % = +, ` +
        `got ${JSON.stringify(value)}`,
    );
  }
  return value;
}
