/** Inputs for whole-system stories, uploaded as a requestor would. */
import type { ByteStream } from '@millrace/runner';
import type { Requestor } from '@millrace/dispatch/client';

/** Uploads `bytes` in parts and returns the data id. */
export async function uploadInput(
  client: Requestor,
  name: string,
  size: number,
  bytes: ByteStream,
): Promise<string> {
  const { domainId } = await client.health();
  const upload = await client.storage.startUpload({
    domainId,
    name,
    dataType: 'binary',
    size,
    existingId: null,
  });
  const parts: { part_number: number; etag: string }[] = [];
  for await (const part of inPieces(bytes, upload.partSize)) {
    const partNumber = parts.length + 1;
    const etag = await client.storage.putPart(domainId, upload.uploadId, partNumber, part, part.length);
    parts.push({ part_number: partNumber, etag });
  }
  return await client.storage.finishUpload(domainId, upload.uploadId, parts);
}

/** The stream cut into pieces of exactly `pieceBytes`, the last one shorter. */
async function* inPieces(bytes: ByteStream, pieceBytes: number): AsyncGenerator<Uint8Array> {
  let chunks: Uint8Array[] = [];
  let size = 0;
  for await (let chunk of bytes) {
    while (size + chunk.length >= pieceBytes) {
      const taken = pieceBytes - size;
      yield Buffer.concat([...chunks, chunk.subarray(0, taken)]);
      chunk = chunk.subarray(taken);
      chunks = [];
      size = 0;
    }
    if (chunk.length > 0) {
      chunks.push(chunk);
      size += chunk.length;
    }
  }
  if (size > 0) yield Buffer.concat(chunks);
}
