/** `sha256:<64 hex>`: the name of bytes by content. */
import { MillraceError } from '@millrace/runner';

const DIGEST = /^sha256:([0-9a-f]{64})$/;

/** The hex part. @throws MillraceError `invalid_argument` for anything that is not `sha256:` and 64 lower-case hex digits. */
export function digestHex(digest: string): string {
  const match = DIGEST.exec(digest);
  if (match === null) {
    throw new MillraceError(
      'invalid_argument',
      `digest must be sha256: and 64 lower-case hex digits, got ${JSON.stringify(digest.slice(0, 80))}`,
    );
  }
  return match[1]!;
}
