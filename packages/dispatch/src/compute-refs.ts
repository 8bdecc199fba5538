/**
 * `compute://<alg>/<digest>`: code named by its bytes, as the wire knows it. What a compute is, and how it is run, is
 * `@millrace/compute`'s; a dispatcher keeps the bytes and sees that what a job names is there.
 */
import { MillraceError, type Json, type JsonObject } from '@millrace/runner';
import type { JobSpec } from './records.ts';

const SCHEME = 'compute://';
const REF = /^compute:\/\/([a-z0-9]+)\/([A-Za-z0-9_-]+)$/;
const SHA256 = /^[0-9a-f]{64}$/;

/**
 * The blob digest, `sha256:<hex>`, of a compute.
 *
 * @throws MillraceError `invalid_argument` unless it is sha256 with 64 lower-case hex digits.
 */
export function computeDigest(alg: string, digest: string): string {
  if (alg !== 'sha256') {
    throw new MillraceError(
      'invalid_argument',
      `computes are named by sha256, got the digest algorithm ${JSON.stringify(alg.slice(0, 40))}`,
    );
  }
  if (!SHA256.test(digest)) {
    throw new MillraceError(
      'invalid_argument',
      `the digest of a compute is 64 lower-case hex digits, got ${JSON.stringify(digest.slice(0, 80))}`,
    );
  }
  return `sha256:${digest}`;
}

/** The blob digest a ref stands for; null when the text is no ref, or one whose bytes could not be verified. */
export function digestOfRef(text: string): string | null {
  const [, alg, digest = ''] = REF.exec(text) ?? [];
  return alg === 'sha256' && SHA256.test(digest) ? `sha256:${digest}` : null;
}

/**
 * The distinct refs among the texts of a job's `meta` and its tasks', at any depth, in order of first appearance. As in
 * the reference a text counts only as a whole, and one that is data and no code counts too. Where a task names its code, all
 * that begins like a ref is one, however malformed: it could only fail later.
 */
export function computeRefsOf(spec: Pick<JobSpec, 'meta' | 'tasks'>): string[] {
  const found = new Set<string>();
  collect(spec.meta, found);
  for (const task of spec.tasks) {
    const code = codeRefOf(task.meta);
    if (typeof code === 'string' && code.startsWith(SCHEME)) found.add(code);
    collect(task.meta, found);
  }
  return [...found];
}

/** Where a task's `meta` names its code: `ref`, or `module` in the form of the kind "wasm". */
function codeRefOf(meta: Json): Json | undefined {
  if (!isObject(meta)) return undefined;
  return isObject(meta['wasm']) ? meta['wasm']['module'] : meta['ref'];
}

function isObject(value: Json | undefined): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function collect(value: unknown, found: Set<string>): void {
  if (typeof value === 'string') {
    if (value.startsWith(SCHEME) && REF.test(value)) found.add(value);
  } else if (typeof value === 'object' && value !== null) {
    for (const key in value) collect((value as Record<string, unknown>)[key], found);
  }
}
