/**
 * Parts of chunked uploads that go past the dispatcher. A client says what is in a part and gets a signed request for it, with which
 * it puts those bytes, and no others, where the upload's parts are; the upload is begun, finished and aborted as ever. Invariants:
 *
 * - What is put becomes part of a blob only by the upload's completion, under the checks that every upload meets.
 * - A part that came this way counts when it is there under the name of its content, whose bytes the place has checked
 *   (`DirectParts`). So nobody has to tell that it arrived, and whoever crashes after having sent it has lost nothing.
 * - It goes with its upload, or a day later: what is left over is found by where it lies, as of any upload.
 */
import { MillraceError } from '@millrace/runner';
import { z } from 'zod';
import type { DirectParts } from '../blobs.ts';
import type { UploadRecord } from '../store.ts';

/** From this size on an item is worth the requests more that it takes past the dispatcher. */
export const DIRECT_FROM_BYTES = 8 * 1024 * 1024;

/** An item that is stated as a whole goes in one part up to this size: longer, and what breaks is too much to send again. */
export const DIRECT_WHOLE_BYTES = 1024 * 1024 * 1024;

/** Whoever has a signed request begins to send within this. */
const VALID_SECS = 300;

export const sha256Hex = z.string().regex(/^[0-9a-f]{64}$/, 'must be 64 lower-case hex digits');

export const directPartsBody = z.object({
  parts: z
    .array(
      z.object({
        part_number: z.number().int().positive(),
        sha256: sha256Hex,
        size: z.number().int().nonnegative(),
      }),
    )
    .min(1)
    .max(100),
});

/** Bytes that the part of this number has at most; exactly, where the upload's size is known. */
export function partBytes(upload: UploadRecord, partNumber: number, dataBytes: number): number {
  const left = (upload.size ?? dataBytes) - (partNumber - 1) * upload.partSize;
  return Math.min(upload.partSize, left);
}

/** The signed requests for these parts. @throws MillraceError `invalid_argument`, `resource_exhausted` for what is no part of the upload */
export async function directPuts(
  place: DirectParts,
  upload: UploadRecord,
  parts: z.infer<typeof directPartsBody>['parts'],
  dataBytes: number,
): Promise<
  readonly {
    readonly part_number: number;
    readonly method: 'PUT';
    readonly url: string;
    readonly headers: Readonly<Record<string, string>>;
    readonly valid_secs: number;
  }[]
> {
  for (const { part_number, size } of parts) {
    const most = partBytes(upload, part_number, dataBytes);
    if (most <= 0 && (part_number > 1 || size > 0)) {
      throw new MillraceError(
        'invalid_argument',
        `parts: the upload has no part ${part_number}: ${upload.size ?? dataBytes} bytes in parts of ${upload.partSize}`,
      );
    }
    if (size > most || (upload.size !== null && size !== most)) {
      throw new MillraceError(
        'invalid_argument',
        `parts: part ${part_number} must have ${upload.size === null ? 'at most ' : ''}${most} bytes, got ${size}`,
      );
    }
  }
  return Promise.all(
    parts.map(async ({ part_number, sha256, size }) => {
      const part = { partNumber: part_number, digest: `sha256:${sha256}`, size };
      const { url, headers } = await place.put(upload.id, part, VALID_SECS);
      return { part_number, method: 'PUT' as const, url, headers, valid_secs: VALID_SECS };
    }),
  );
}

/** Parts looked for at once. */
const LOOKS_AT_ONCE = 16;

/** The upload with those of the chosen parts that came past the dispatcher. */
export async function withDirectParts(
  place: DirectParts,
  upload: UploadRecord,
  chosen: readonly { readonly part_number: number; readonly etag: string }[],
): Promise<UploadRecord> {
  const known = new Map(upload.parts.map((part) => [part.partNumber, part]));
  const open = chosen.filter(
    ({ part_number, etag }) => known.get(part_number)?.etag !== etag && /^sha256:[0-9a-f]{64}$/.test(etag),
  );
  if (open.length === 0) return upload;
  const queue = open.values();
  const look = async (): Promise<void> => {
    for (const { part_number, etag } of queue) {
      const size = await place.size(upload.id, part_number, etag);
      if (size !== null) known.set(part_number, { partNumber: part_number, etag, size });
    }
  };
  await Promise.all(Array.from({ length: Math.min(LOOKS_AT_ONCE, open.length) }, look));
  return { ...upload, parts: [...known.values()] };
}
