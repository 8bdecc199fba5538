/**
 * The stream in which an engine sends what a container without a terminal prints: frames of an 8-byte header (1 byte: which stream;
 * 3 bytes zero; 4 bytes: length, big-endian) and a payload.
 */
import { MillraceError } from '@millrace/runner';

export interface OutputPiece {
  readonly stream: 'stdout' | 'stderr';
  readonly bytes: Uint8Array;
}

const HEADER_BYTES = 8;
/** The engine's own error, ending the stream. */
const SYSTEM_ERROR = 3;
const MAX_ERROR_BYTES = 4096;

/**
 * Payloads are handed on as they arrive, so nothing is held back but a header that is not whole yet, whatever length a frame claims.
 * Ends when the stream does, also in the middle of a frame: an engine that dies looks the same as one that is done, and whether
 * the container has ended is not for this stream to say.
 *
 * @throws MillraceError `data_loss` for a header that is none, `unavailable` with the engine's text for its error frame
 */
export async function* demultiplex(
  chunks: AsyncIterable<Uint8Array>,
): AsyncGenerator<OutputPiece, void, void> {
  const header = Buffer.alloc(HEADER_BYTES);
  let filled = 0;
  let left = 0;
  let errorText = '';
  for await (const chunk of chunks) {
    for (let at = 0; at < chunk.byteLength;) {
      if (left === 0) {
        const taken = chunk.subarray(at, at + HEADER_BYTES - filled);
        header.set(taken, filled);
        filled += taken.byteLength;
        at += taken.byteLength;
        if (filled < HEADER_BYTES) break;
        filled = 0;
        left = header.readUInt32BE(4);
        if (header[0]! > SYSTEM_ERROR || header.readUIntBE(1, 3) !== 0) {
          throw new MillraceError(
            'data_loss',
            `the engine's output stream has a frame that starts with ${header.toString('hex')}, which is no header`,
          );
        }
        continue;
      }
      const bytes = chunk.subarray(at, at + left);
      at += bytes.byteLength;
      left -= bytes.byteLength;
      if (header[0] === SYSTEM_ERROR) {
        errorText += Buffer.from(bytes).toString('utf8');
        if (left === 0 || errorText.length > MAX_ERROR_BYTES) {
          throw new MillraceError(
            'unavailable',
            `the engine ended the output stream: ${errorText.slice(0, MAX_ERROR_BYTES)}`,
          );
        }
      } else {
        yield { stream: header[0] === 2 ? 'stderr' : 'stdout', bytes };
      }
    }
  }
}
