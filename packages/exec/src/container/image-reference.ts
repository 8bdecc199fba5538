/** Names of images: `[registry[:port]/]path[:tag][@sha256:digest]`, or an image id. */
import { MillraceError } from '@millrace/runner';

const COMPONENT = '[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*';
const HOST = '(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::\\d{1,5})?|\\[[0-9a-f:]+\\](?::\\d{1,5})?)';
const NAME = `(?:${HOST}/)?${COMPONENT}(?:/${COMPONENT})*`;
const REFERENCE = new RegExp(
  `^(?<name>${NAME})(?::(?<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@(?<digest>sha256:[0-9a-f]{64}))?$`,
);
const IMAGE_ID = /^sha256:[0-9a-f]{64}$/;
const MAX_BYTES = 512;

export interface ImageReference {
  /** As it was given. */
  readonly text: string;
  /** Without tag and digest; null for an image id. */
  readonly name: string | null;
  readonly tag: string | null;
  /** `sha256:…` of the manifest, or the id itself: either names content that cannot change. */
  readonly digest: string | null;
}

/**
 * @param field names the option or the member of the task in errors
 * @throws MillraceError `invalid_argument`
 */
export function parseImage(value: unknown, field: string): ImageReference {
  if (typeof value !== 'string' || value.trim() === '') {
    throw new MillraceError(
      'invalid_argument',
      `${field}: container image cannot be empty; give a name such as debian:12 or NAME@sha256:DIGEST`,
    );
  }
  const shown = JSON.stringify(value.length > 120 ? `${value.slice(0, 117)}...` : value);
  if (IMAGE_ID.test(value)) return { text: value, name: null, tag: null, digest: value };
  const groups = Buffer.byteLength(value) <= MAX_BYTES ? REFERENCE.exec(value)?.groups : undefined;
  if (groups === undefined) {
    throw new MillraceError(
      'invalid_argument',
      `${field} must be an image reference such as debian:12, registry.example/team/tool:1.2 or NAME@sha256:DIGEST, got ${shown}`,
    );
  }
  return { text: value, name: groups['name']!, tag: groups['tag'] ?? null, digest: groups['digest'] ?? null };
}

/**
 * Whether an operator's pattern allows the image. A pattern is matched against the whole reference as it is written, letter by letter,
 * with `*` for any run of characters but `/`, and `**` for any run at all. Nothing is completed: `debian:*` does not allow `debian`.
 */
export function imageMatches(pattern: string, image: ImageReference): boolean {
  const source = pattern
    .split(/(\*\*|\*)/)
    .map((part) =>
      part === '**' ? '.*' : part === '*' ? '[^/]*' : part.replace(/[.*+?^${}()|[\]\\]/g, '\\$&'),
    )
    .join('');
  return new RegExp(`^${source}$`).test(image.text);
}
