/**
 * Reads zip archives as images come in: a few files, stored or deflated, found by the directory at the archive's end. What is not
 * understood is refused by name, sizes are bounded before anything is unpacked, and checksums hold.
 */
import { crc32, inflateRawSync } from 'node:zlib';
import { MillraceError } from '@millrace/runner';

const END = 0x06054b50;
const END_BYTES = 22;
const MAX_COMMENT_BYTES = 0xffff;
const ENTRY = 0x02014b50;
const ENTRY_BYTES = 46;
const LOCAL = 0x04034b50;
const LOCAL_BYTES = 30;
const STORED = 0;
const DEFLATED = 8;
const FLAG_ENCRYPTED = 1;

/** Whether these bytes begin as an archive with something in it does. */
export function isZip(bytes: Buffer): boolean {
  return bytes.length >= 4 && bytes.readUInt32LE(0) === LOCAL;
}

interface Entry {
  readonly method: number;
  readonly encrypted: boolean;
  readonly crc: number;
  readonly packedBytes: number;
  readonly bytes: number;
  readonly offset: number;
}

export class ZipArchive {
  readonly #bytes: Buffer;
  readonly #entries = new Map<string, Entry>();

  /**
   * Reads the directory.
   *
   * @param maxEntries files and folders in it
   * @throws MillraceError `invalid_argument` for what is no archive, or one of a kind that is not read; `resource_exhausted` for
   * more entries.
   */
  constructor(bytes: Buffer, maxEntries: number) {
    this.#bytes = bytes;
    const end = findEnd(bytes);
    const count = bytes.readUInt16LE(end + 10);
    let at = bytes.readUInt32LE(end + 16);
    if (count === 0xffff || at === 0xffffffff) throw broken('is a zip64 archive, which is not read');
    if (bytes.readUInt16LE(end + 4) !== 0 || bytes.readUInt16LE(end + 8) !== count) {
      throw broken('is a part of an archive in several parts, which is not read');
    }
    if (count > maxEntries) {
      throw new MillraceError(
        'resource_exhausted',
        `the archive has ${count} entries, over the limit of ${maxEntries}`,
      );
    }
    for (let index = 0; index < count; index += 1) {
      if (at + ENTRY_BYTES > end || bytes.readUInt32LE(at) !== ENTRY)
        throw broken('has a directory that is cut short');
      const nameEnd = at + ENTRY_BYTES + bytes.readUInt16LE(at + 28);
      const next = nameEnd + bytes.readUInt16LE(at + 30) + bytes.readUInt16LE(at + 32);
      if (next > end) throw broken('has a directory that is cut short');
      const name = bytes.toString('utf8', at + ENTRY_BYTES, nameEnd);
      // Two files of one name: whoever looks at it with another program may see the other one.
      if (this.#entries.has(name)) throw broken(`holds ${JSON.stringify(name)} twice`);
      this.#entries.set(name, {
        encrypted: (bytes.readUInt16LE(at + 8) & FLAG_ENCRYPTED) !== 0,
        method: bytes.readUInt16LE(at + 10),
        crc: bytes.readUInt32LE(at + 16),
        packedBytes: bytes.readUInt32LE(at + 20),
        bytes: bytes.readUInt32LE(at + 24),
        offset: bytes.readUInt32LE(at + 42),
      });
      at = next;
    }
  }

  /** Of the files; folders are left out. */
  get names(): string[] {
    return [...this.#entries.keys()].filter((name) => !name.endsWith('/'));
  }

  /**
   * The content of a file; null when there is none of that name.
   *
   * @throws MillraceError `invalid_argument`, `data_loss` for content that does not fit its checksum, `resource_exhausted` for
   * more than `maxBytes`.
   */
  read(name: string, maxBytes: number): Buffer | null {
    const entry = this.#entries.get(name);
    if (entry === undefined) return null;
    const shown = JSON.stringify(name);
    if (entry.encrypted) throw broken(`holds ${shown} encrypted`);
    if (entry.bytes > maxBytes) {
      throw new MillraceError(
        'resource_exhausted',
        `${shown} has ${entry.bytes} bytes, over the limit of ${maxBytes}`,
      );
    }
    const { offset } = entry;
    const bytes = this.#bytes;
    if (offset + LOCAL_BYTES > bytes.length || bytes.readUInt32LE(offset) !== LOCAL) {
      throw broken(`does not hold ${shown} where its directory says`);
    }
    const start = offset + LOCAL_BYTES + bytes.readUInt16LE(offset + 26) + bytes.readUInt16LE(offset + 28);
    const packed = bytes.subarray(start, start + entry.packedBytes);
    if (packed.length < entry.packedBytes) throw broken(`is cut short in ${shown}`);
    const content = unpack(packed, entry, shown);
    if (content.length !== entry.bytes || crc32(content) !== entry.crc) {
      throw new MillraceError('data_loss', `${shown} does not fit its checksum; the archive was damaged`);
    }
    return content;
  }
}

function unpack(packed: Buffer, { method, bytes }: Entry, shown: string): Buffer {
  if (method === STORED) return packed;
  if (method !== DEFLATED)
    throw broken(`holds ${shown} packed by method ${method}; only stored and deflated are read`);
  try {
    // No more than it says it is, whatever the data would make.
    return inflateRawSync(packed, { maxOutputLength: Math.max(1, bytes) });
  } catch (error) {
    throw new MillraceError('data_loss', `${shown} cannot be unpacked; the archive was damaged`, {
      cause: error,
    });
  }
}

/** The record at the end, behind which only a comment may stand. */
function findEnd(bytes: Buffer): number {
  const first = Math.max(0, bytes.length - END_BYTES - MAX_COMMENT_BYTES);
  for (let at = bytes.length - END_BYTES; at >= first; at -= 1) {
    if (bytes.readUInt32LE(at) === END && at + END_BYTES + bytes.readUInt16LE(at + 20) === bytes.length)
      return at;
  }
  throw broken('has no directory at its end; it is no zip archive, or was cut short');
}

function broken(rule: string): MillraceError {
  return new MillraceError('invalid_argument', `the archive ${rule}`);
}
