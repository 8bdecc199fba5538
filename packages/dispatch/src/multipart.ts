/**
 * The domain server's multipart dialect, both directions, parser and writer. It is not RFC 7578:
 *
 * - A download's parts say their `size`, which delimits the payload; the boundary may occur in it. The boundary is
 *   whatever follows `boundary=` in the content type, unquoted.
 * - An upload with the boundary `boundary` (all that the reference node sends) is one part, which ends at the last closing
 *   delimiter of the body, because that boundary was not chosen to be absent from the payload. With any other boundary the
 *   sender chose one that is, so ordinary rules hold and there may be several parts.
 * - Parameters are split on `;` and `=` and stripped of double quotes; there is no escaping.
 *
 * Source: posemesh protocol reference, sections 4.3 and 4.5. Nothing here holds a payload in memory.
 */
import { MillraceError, type ByteStream, type ErrorCode } from '@millrace/runner';
import type { DataRecord } from './records.ts';
import { pullFrom, type Pull } from './pull-stream.ts';

/** The boundary of the reference node's uploads. */
export const FIXED_BOUNDARY = 'boundary';

/** Headers of one part, all together. */
export const MAX_PART_HEADER_BYTES = 16 * 1024;

export interface MultipartPart {
  /** Of `Content-Disposition`, names as they were written. */
  readonly params: ReadonlyMap<string, string>;
  /**
   * The next bytes of the payload, null at its end. What is not pulled is skipped when the next part is asked for.
   * Rejects when the payload does not end as it should.
   */
  readonly pull: Pull;
}

// Reading a download

/**
 * The boundary of a download's content type.
 *
 * @throws MillraceError `data_loss` (retryable) unless it begins exactly `multipart/form-data; boundary=`.
 */
export function downloadBoundary(contentType: string | null): string {
  const PREFIX = 'multipart/form-data; boundary=';
  if (contentType === null || !contentType.startsWith(PREFIX) || contentType.length === PREFIX.length) {
    throw new MillraceError('data_loss', 'other storage error: Invalid content-type header', {
      retryable: true,
      details: { content_type: contentType },
    });
  }
  return contentType.slice(PREFIX.length);
}

/**
 * The parts of a download, each payload exactly as long as its `size` says (0 when it does not), checked up to the
 * final boundary. Ends the source when it is left early.
 *
 * @throws MillraceError `data_loss` (retryable) for a body that is cut, malformed, or has a part of another size than
 * it says.
 */
export async function* readDownload(body: ByteStream, boundary: string): AsyncGenerator<MultipartPart> {
  const reader = new ByteReader(body, 'data_loss');
  const delimiter = Buffer.from(`--${boundary}`);
  try {
    await reader.skipTo(delimiter, 'the body ends before the first boundary');
    while (!(await atFinalBoundary(reader, delimiter))) {
      const params = await readHeaders(reader);
      const sizeText = params.get('size');
      const size = sizeText === undefined ? 0 : Number(sizeText);
      if (!Number.isSafeInteger(size) || size < 0 || sizeText === '') {
        throw reader.error(`size of a part must be an integer >= 0, got ${JSON.stringify(sizeText)}`);
      }
      let left = size;
      const pull: Pull = async () => {
        if (left === 0) return null;
        const chunk = await reader.some(
          left,
          () => `the body ends ${left} bytes before the end of a part of ${size}`,
        );
        left -= chunk.length;
        return chunk;
      };
      yield { params, pull };
      while ((await pull()) !== null);
      if (sizeText === undefined) {
        await reader.skipTo(delimiter, 'the body ends before the final boundary');
      } else {
        await expectDelimiter(reader, delimiter, size);
      }
    }
  } finally {
    await reader.close();
  }
}

/** After the delimiter: `--` ends the list (what follows is ignored), a line end begins a part. */
async function atFinalBoundary(reader: ByteReader, delimiter: Buffer): Promise<boolean> {
  reader.drop(delimiter.length);
  if (!(await reader.fill(2))) throw reader.error('the body ends right after a boundary');
  if (reader.startsWith('--')) return true;
  const rest = await reader.line(MAX_PART_HEADER_BYTES, 'the body ends right after a boundary');
  if (rest.trim() !== '') throw reader.error('a boundary must be followed by -- or a line end');
  return false;
}

async function expectDelimiter(reader: ByteReader, delimiter: Buffer, size: number): Promise<void> {
  await reader.fill(2 + delimiter.length);
  if (reader.startsWith('\r\n')) reader.drop(2);
  else if (reader.startsWith('\n')) reader.drop(1);
  else if (!reader.isEmpty)
    throw reader.error(`no line end after a part of ${size} bytes: it is longer than it says`);
  if (!(await reader.fill(delimiter.length))) throw reader.error('the body ends before the final boundary');
  if (!reader.startsWith(delimiter)) {
    throw reader.error(`no boundary after a part of ${size} bytes: it is longer than it says`);
  }
}

// Reading an upload

/**
 * The boundary of an upload's content type; quotes are removed.
 *
 * @throws MillraceError `invalid_argument`
 */
export function uploadBoundary(contentType: string | null): string {
  const match =
    contentType === null
      ? null
      : /^multipart\/form-data\s*;(?:.*;)?\s*boundary=(?:"([^"]+)"|([^\s;"]+))/i.exec(contentType);
  const boundary = match?.[1] ?? match?.[2];
  if (boundary === undefined || boundary.length > 200) {
    throw new MillraceError(
      'invalid_argument',
      `Content-Type must be multipart/form-data with a boundary of at most 200 characters, got ${JSON.stringify(contentType?.slice(0, 120) ?? null)}`,
    );
  }
  return boundary;
}

/**
 * The parts of an upload. See the head of this file for what ends a part.
 *
 * @throws MillraceError `invalid_argument` for a body that is not such an upload.
 */
export async function* readUpload(body: ByteStream, boundary: string): AsyncGenerator<MultipartPart> {
  const reader = new ByteReader(body, 'invalid_argument');
  try {
    await reader.fill(2);
    if (reader.startsWith('\r\n')) reader.drop(2);
    const opening = Buffer.from(`--${boundary}`);
    await reader.fill(opening.length);
    if (!reader.startsWith(opening)) {
      throw reader.error(`the body must begin with the boundary --${boundary}`);
    }
    reader.drop(opening.length);
    if (boundary === FIXED_BOUNDARY) yield* readOnlyPart(reader, boundary);
    else yield* readDelimitedParts(reader, boundary);
  } finally {
    await reader.close();
  }
}

async function* readOnlyPart(reader: ByteReader, boundary: string): AsyncGenerator<MultipartPart> {
  await expectLineEnd(reader);
  const params = await readHeaders(reader);
  const closing = Buffer.from(`\r\n--${boundary}--`);
  // Whether bytes belong to the payload is known only at the end of the body, so as many as the longest ending are kept back.
  const keep = closing.length + 2;
  let ended = false;
  const pull: Pull = async () => {
    if (ended) return null;
    const chunk = await reader.someBut(keep);
    if (chunk !== null) return chunk;
    ended = true;
    const rest = reader.take(reader.length);
    const end = rest.lastIndexOf(closing);
    const after = end < 0 ? '' : rest.subarray(end + closing.length).toString('latin1');
    if (end < 0 || (after !== '' && after !== '\r\n' && after !== '\n')) {
      throw reader.error(`the body must end with the closing boundary --${boundary}--`);
    }
    return end === 0 ? null : rest.subarray(0, end);
  };
  yield { params, pull };
  while ((await pull()) !== null);
}

async function* readDelimitedParts(reader: ByteReader, boundary: string): AsyncGenerator<MultipartPart> {
  const delimiter = Buffer.from(`\r\n--${boundary}`);
  let last = false;
  for (;;) {
    await expectLineEnd(reader);
    const params = await readHeaders(reader);
    let ended = false;
    const pull: Pull = async () => {
      while (!ended) {
        const enough = await reader.fill(delimiter.length);
        const at = reader.indexOf(delimiter);
        if (at > 0) return reader.take(at);
        if (at < 0) {
          if (!enough) throw reader.error(`the body must end with the closing boundary --${boundary}--`);
          return reader.take(reader.length - delimiter.length + 1);
        }
        // Two bytes more tell a delimiter from payload that begins like one.
        await reader.fill(delimiter.length + 2);
        const next = reader.peek(delimiter.length, 2);
        if (next !== '--' && next !== '\r\n') return reader.take(delimiter.length);
        reader.drop(delimiter.length);
        last = next === '--';
        ended = true;
      }
      return null;
    };
    yield { params, pull };
    while ((await pull()) !== null);
    if (last) break;
  }
  reader.drop(2);
  if ((await reader.fill(3)) || reader.take(reader.length).toString('latin1').trim() !== '') {
    throw reader.error(`bytes follow the closing boundary --${boundary}--: it occurs in the payload`);
  }
}

async function expectLineEnd(reader: ByteReader): Promise<void> {
  const rest = await reader.line(MAX_PART_HEADER_BYTES, 'the body ends right after a boundary');
  if (rest.trim() !== '') throw reader.error('a boundary must be followed by a line end');
}

/** Up to and including the empty line. */
async function readHeaders(reader: ByteReader): Promise<Map<string, string>> {
  let left = MAX_PART_HEADER_BYTES;
  let params: Map<string, string> | null = null;
  for (;;) {
    const line = await reader.line(left, 'the body ends within the headers of a part');
    left -= line.length;
    if (line === '') break;
    const colon = line.indexOf(':');
    if (colon < 0) throw reader.error('a header of a part has no colon');
    if (line.slice(0, colon).trim().toLowerCase() === 'content-disposition') {
      params = dispositionParams(line.slice(colon + 1));
    }
  }
  if (params === null) throw reader.error('a part has no Content-Disposition header');
  return params;
}

function dispositionParams(value: string): Map<string, string> {
  const params = new Map<string, string>();
  for (const piece of value.split(';')) {
    const equals = piece.indexOf('=');
    if (equals < 0) continue;
    params.set(
      piece.slice(0, equals).trim(),
      piece
        .slice(equals + 1)
        .trim()
        .replaceAll('"', ''),
    );
  }
  return params;
}

// Writing

/** What precedes an item's bytes in a download. `\r\n` follows them. */
export function downloadPartHead(item: DataRecord, boundary: string): Buffer {
  return Buffer.from(
    `--${boundary}\r\n` +
      `Content-Disposition: form-data; name="${item.name}"; data-type="${item.data_type}"; id="${item.id}"; ` +
      `domain-id="${item.domain_id}"; size="${item.size}"; created-at="${microseconds(item.created_at)}"; ` +
      // The digest is ours; peers ignore parameters they do not know.
      `updated-at="${microseconds(item.updated_at)}"; digest="${item.digest}"\r\n` +
      'Content-Type: application/octet-stream\r\n\r\n',
  );
}

/** What ends a download. */
export function downloadTail(boundary: string): Buffer {
  return Buffer.from(`--${boundary}--\r\n`);
}

/** The service writes six digits of fraction; ours has three. */
function microseconds(time: string): string {
  return time.replace(/(\.\d{3})Z$/, '$1000Z');
}

/** What goes before and after the bytes of a single upload, to the byte as the reference node has it. */
export function uploadEnvelope(
  target: { readonly name: string; readonly dataType: string } | { readonly existingId: string },
  boundary: string,
): { readonly head: Buffer; readonly tail: Buffer } {
  const params =
    'existingId' in target
      ? `id="${target.existingId}"`
      : `name="${target.name}"; data-type="${target.dataType}"`;
  return {
    head: Buffer.from(
      `--${boundary}\r\nContent-Type: application/octet-stream\r\nContent-Disposition: form-data; ${params}\r\n\r\n`,
    ),
    tail: Buffer.from(`\r\n--${boundary}--\r\n`),
  };
}

// Bytes

const EMPTY = Buffer.alloc(0);

/** A stream looked at a few bytes at a time. Holds one chunk and what was asked to be seen beyond it. */
class ByteReader {
  readonly #source: { readonly pull: Pull; close(): Promise<void> };
  readonly #code: ErrorCode;
  #buffer: Buffer = EMPTY;
  #ended = false;

  constructor(source: ByteStream, code: ErrorCode) {
    this.#source = pullFrom(source);
    this.#code = code;
  }

  /** Bytes held. */
  get length(): number {
    return this.#buffer.length;
  }

  /** True when nothing is held; at the end of the stream, after a `fill` that fell short, that nothing is left. */
  get isEmpty(): boolean {
    return this.#buffer.length === 0;
  }

  error(rule: string): MillraceError {
    return new MillraceError(this.#code, `multipart body: ${rule}`, {
      retryable: this.#code === 'data_loss',
    });
  }

  /** Holds at least `count` bytes; false when the stream ends before. */
  async fill(count: number): Promise<boolean> {
    while (this.#buffer.length < count && !this.#ended) await this.#more();
    return this.#buffer.length >= count;
  }

  startsWith(bytes: string | Buffer): boolean {
    return (
      this.#buffer.length >= bytes.length &&
      this.#buffer.subarray(0, bytes.length).equals(typeof bytes === 'string' ? Buffer.from(bytes) : bytes)
    );
  }

  indexOf(bytes: Buffer): number {
    return this.#buffer.indexOf(bytes);
  }

  peek(offset: number, count: number): string {
    return this.#buffer.toString('latin1', offset, offset + count);
  }

  drop(count: number): void {
    this.#buffer = this.#buffer.subarray(count);
  }

  take(count: number): Buffer {
    const taken = this.#buffer.subarray(0, count);
    this.drop(count);
    return taken;
  }

  /** At least one byte, at most `max`. */
  async some(max: number, whenEnded: () => string): Promise<Buffer> {
    if (!(await this.fill(1))) throw this.error(whenEnded());
    return this.take(Math.min(max, this.#buffer.length));
  }

  /** At least one byte while more than `keep` are to come; null once only the last `keep` are left. */
  async someBut(keep: number): Promise<Buffer | null> {
    if (!(await this.fill(keep + 1))) return null;
    return this.take(this.#buffer.length - keep);
  }

  /** A line without its end (LF or CRLF), as UTF-8. */
  async line(maxBytes: number, whenEnded: string): Promise<string> {
    let searched = 0;
    for (;;) {
      const at = this.#buffer.indexOf(10, searched);
      if (at > maxBytes || (at < 0 && this.#buffer.length > maxBytes)) {
        throw this.error(`the headers of a part must be at most ${MAX_PART_HEADER_BYTES} bytes`);
      }
      if (at >= 0) {
        const line = this.take(at + 1).toString('utf8', 0, at);
        return line.endsWith('\r') ? line.slice(0, -1) : line;
      }
      searched = this.#buffer.length;
      if (!(await this.fill(searched + 1))) throw this.error(whenEnded);
    }
  }

  /** Drops everything before the next `bytes`. */
  async skipTo(bytes: Buffer, whenEnded: string): Promise<void> {
    for (;;) {
      const at = this.#buffer.indexOf(bytes);
      if (at >= 0) {
        this.drop(at);
        return;
      }
      this.drop(Math.max(0, this.#buffer.length - bytes.length + 1));
      if (!(await this.fill(this.#buffer.length + 1))) throw this.error(whenEnded);
    }
  }

  async close(): Promise<void> {
    if (!this.#ended) await this.#source.close();
  }

  async #more(): Promise<void> {
    const chunk = await this.#source.pull();
    if (chunk === null) {
      this.#ended = true;
      return;
    }
    const bytes = Buffer.from(chunk.buffer, chunk.byteOffset, chunk.byteLength);
    this.#buffer = this.#buffer.length === 0 ? bytes : Buffer.concat([this.#buffer, bytes]);
  }
}
