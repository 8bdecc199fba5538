/**
 * Writes a PNG (ISO/IEC 15948) row by row, so a picture never has to be in memory whole, and may be larger than a
 * canvas can be. 8-bit RGB.
 */
import { once } from 'node:events';
import { crc32, createDeflate } from 'node:zlib';

const SIGNATURE = Buffer.from('89504e470d0a1a0a', 'hex');

/** Bytes per pixel of what {@link encodePng} takes. */
export const RGB_BYTES = 3;

/**
 * The bytes of a PNG. `strips` yields whole rows of RGB pixels, any number at a time, `height` in all.
 *
 * @throws RangeError when they are more or fewer
 */
export async function* encodePng(
  width: number,
  height: number,
  strips: AsyncIterable<Uint8Array>,
): AsyncGenerator<Uint8Array> {
  yield SIGNATURE;
  const header = Buffer.alloc(13);
  header.writeUInt32BE(width, 0);
  header.writeUInt32BE(height, 4);
  header.set([8, 2, 0, 0, 0], 8);
  yield chunk('IHDR', header);

  // Level 6 with no filter took 1.8 s of processor time and 9.7 MB for the map of the world at 8192 x 4096. Filter Up took
  // 4.4 s and 12.2 MB, filter Sub 2.3 s and 9.5 MB; level 9 with no filter 2.3 s and 9.6 MB.
  const deflate = createDeflate({ level: 6, chunkSize: 256 * 1024 });
  const feeding = feed();
  // Its error is met through the stream below, which it destroys; this keeps it from being unhandled until then.
  feeding.catch(() => undefined);
  try {
    for await (const bytes of deflate) yield chunk('IDAT', bytes as Buffer);
    await feeding;
  } finally {
    deflate.destroy();
  }
  yield chunk('IEND', Buffer.alloc(0));

  async function feed(): Promise<void> {
    const rowBytes = width * RGB_BYTES;
    let rows = 0;
    try {
      for await (const strip of strips) {
        if (strip.length % rowBytes !== 0 || rows + strip.length / rowBytes > height) {
          throw new RangeError(`PNG of ${width} x ${height}: got ${strip.length} bytes after ${rows} rows`);
        }
        const count = strip.length / rowBytes;
        // Each row is preceded by its filter, 0 for none.
        const filtered = Buffer.alloc(count * (rowBytes + 1));
        for (let row = 0; row < count; row += 1) {
          filtered.set(strip.subarray(row * rowBytes, (row + 1) * rowBytes), row * (rowBytes + 1) + 1);
        }
        rows += count;
        if (!deflate.write(filtered)) await once(deflate, 'drain');
      }
      if (rows !== height) throw new RangeError(`PNG of ${width} x ${height}: got only ${rows} rows`);
      deflate.end();
    } catch (error) {
      deflate.destroy(error as Error);
      throw error;
    }
  }
}

function chunk(type: string, data: Uint8Array): Uint8Array {
  const bytes = Buffer.allocUnsafe(12 + data.length);
  bytes.writeUInt32BE(data.length, 0);
  bytes.write(type, 4, 'latin1');
  bytes.set(data, 8);
  bytes.writeUInt32BE(crc32(bytes.subarray(4, 8 + data.length)), 8 + data.length);
  return bytes;
}
