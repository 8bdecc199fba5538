/**
 * `compute://<alg>/<digest>`: the name of a compute by the hash of its bytes.
 *
 * Two grammars, both those of the reference. {@link parseRef} is loose: it tells what shape a text has, and any
 * dispatcher of refs can use it without knowing the digest algorithms. {@link scanRefs} is strict: it finds refs inside
 * other text. Whether a ref can name an artifact at all is decided where bytes are about to be fetched, by `checkRef`.
 */
import { computeError } from './errors.ts';

export interface Ref {
  /** The digest algorithm, `sha256` for everything this package can verify. */
  readonly alg: string;
  /** The digest, for sha256 64 lower-case hex digits. */
  readonly digest: string;
}

const SCHEME = 'compute://';
const SCANNED = /"compute:\/\/([a-z0-9]+)\/([A-Za-z0-9_-]+)"/g;
const SHA256_DIGEST = /^[0-9a-f]{64}$/;

/**
 * The parts of a ref: what stands before and after the first `/` behind the scheme, verbatim. `null` for any other shape:
 * another scheme (it is case-sensitive), no `/`, no algorithm, no digest. Nothing else is checked, so
 * {@link formatRef} gives back exactly what was accepted.
 */
export function parseRef(text: string): Ref | null {
  if (!text.startsWith(SCHEME)) return null;
  const slash = text.indexOf('/', SCHEME.length);
  if (slash <= SCHEME.length || slash === text.length - 1) return null;
  return { alg: text.slice(SCHEME.length, slash), digest: text.slice(slash + 1) };
}

/** The canonical text, `compute://<alg>/<digest>`. */
export function formatRef(ref: Ref): string {
  return `${SCHEME}${ref.alg}/${ref.digest}`;
}

/**
 * The distinct refs in a text, in order of first appearance; empty when there are none. A ref counts only as a whole
 * double-quoted string with an algorithm of `a-z 0-9` and a digest of letters, digits, `_` and `-`. The text is not
 * parsed: a quoted ref in a comment is found.
 */
export function scanRefs(text: string): Ref[] {
  const found = new Map<string, Ref>();
  for (const [, alg = '', digest = ''] of text.matchAll(SCANNED)) {
    const ref = { alg, digest };
    const key = formatRef(ref);
    if (!found.has(key)) found.set(key, ref);
  }
  return [...found.values()];
}

/**
 * The key of a ref's artifact in any store: `computes/<alg>/<digest>`. Uploading, verifying and resolving all take it from
 * here, so they cannot disagree.
 */
export function storeRef(ref: Ref): string {
  return `computes/${ref.alg}/${ref.digest}`;
}

/**
 * Refuses a ref whose bytes could never be verified. Everything that turns a ref into a path or a request calls this
 * first, so nothing else than 64 hex digits ever gets into one.
 *
 * @throws MillraceError `invalid_argument` (reason `bad-ref`) unless it is sha256 with 64 lower-case hex digits.
 */
export function checkRef(ref: Ref): void {
  if (ref.alg !== 'sha256') {
    throw computeError(
      'invalid_argument',
      'bad-ref',
      `compute: ref ${JSON.stringify(formatRef(ref))} uses the digest algorithm ${JSON.stringify(ref.alg)}; only sha256 can be verified`,
    );
  }
  if (!SHA256_DIGEST.test(ref.digest)) {
    throw computeError(
      'invalid_argument',
      'bad-ref',
      `compute: malformed compute ref ${JSON.stringify(formatRef(ref))}; want compute://sha256/ and 64 lower-case hex digits`,
    );
  }
}

/**
 * Parses and checks in one step, for text that must be a usable ref.
 *
 * @throws MillraceError `invalid_argument` (reason `bad-ref`).
 */
export function requireRef(text: string): Ref {
  const ref = parseRef(text);
  if (ref === null) {
    throw computeError(
      'invalid_argument',
      'bad-ref',
      `compute: malformed compute ref ${JSON.stringify(text)}; want compute://<alg>/<digest>`,
    );
  }
  checkRef(ref);
  return ref;
}
