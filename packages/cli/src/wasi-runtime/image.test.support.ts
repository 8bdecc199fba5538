/** The example image, and archives made by hand. */
import { fileURLToPath } from 'node:url';
import { crc32, deflateRawSync } from 'node:zlib';

/** A folder with a manifest and one program: `upper FROM TO` writes a file of `/in` in capitals to `/out`; without words it runs for ever. */
export const UPPER_IMAGE = fileURLToPath(new URL('../../../../examples/runtimes/image', import.meta.url));

export interface Member {
  readonly name: string;
  readonly content: Uint8Array;
  /** Default: deflated. */
  readonly stored?: boolean;
  readonly flags?: number;
  readonly method?: number;
  readonly crc?: number;
  /** What the directory says it has. */
  readonly bytes?: number;
}

export function zip(members: readonly Member[], comment = ''): Buffer {
  const local: Buffer[] = [];
  const directory: Buffer[] = [];
  let offset = 0;
  for (const { name, content, stored = false, flags = 0, method = stored ? 0 : 8, ...told } of members) {
    const packed = stored ? Buffer.from(content) : deflateRawSync(content);
    const crc = told.crc ?? crc32(content);
    const bytes = told.bytes ?? content.length;
    const header = Buffer.alloc(30);
    header.writeUInt32LE(0x04034b50, 0);
    header.writeUInt16LE(Buffer.byteLength(name), 26);
    // A field of its own in one place and not in the other, as some programs write them.
    const extra = Buffer.alloc(4);
    header.writeUInt16LE(extra.length, 28);
    const piece = Buffer.concat([header, Buffer.from(name), extra, packed]);
    const entry = Buffer.alloc(46);
    entry.writeUInt32LE(0x02014b50, 0);
    entry.writeUInt16LE(flags, 8);
    entry.writeUInt16LE(method, 10);
    entry.writeUInt32LE(crc, 16);
    entry.writeUInt32LE(packed.length, 20);
    entry.writeUInt32LE(bytes, 24);
    entry.writeUInt16LE(Buffer.byteLength(name), 28);
    entry.writeUInt32LE(offset, 42);
    local.push(piece);
    directory.push(entry, Buffer.from(name));
    offset += piece.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const end = Buffer.alloc(22);
  end.writeUInt32LE(0x06054b50, 0);
  end.writeUInt16LE(members.length, 8);
  end.writeUInt16LE(members.length, 10);
  end.writeUInt32LE(size, 12);
  end.writeUInt32LE(offset, 16);
  end.writeUInt16LE(Buffer.byteLength(comment), 20);
  return Buffer.concat([...local, ...directory, end, Buffer.from(comment)]);
}
