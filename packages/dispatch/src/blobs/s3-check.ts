/** What is found out about a bucket before anything depends on it. */
import { MillraceError } from '@millrace/runner';
import type { S3Bucket } from './s3-bucket.ts';

const PROBE = Buffer.from('millrace writes, reads and deletes this to see whether it may\n');

/**
 * Lists, writes, reads and deletes, and leaves nothing behind. `key` is where.
 *
 * @throws MillraceError as `openS3Blobs` says
 */
export async function checkBucket(bucket: S3Bucket, key: string): Promise<void> {
  // A list first: unlike the answer to a HEAD, its refusal has a body that says why.
  try {
    await bucket.listFirst('tmp/', 'listing objects (s3:ListBucket)');
  } catch (error) {
    if (!MillraceError.is(error) || error.code !== 'unavailable') throw error;
    throw new MillraceError(
      'unavailable',
      `${error.message}; check the endpoint in the URL of the blobs, and the network`,
    );
  }
  await bucket.put(key, PROBE, 'writing an object (s3:PutObject)');
  let deleted = false;
  try {
    const found = await bucket.get(key, { start: 9 }, 'reading an object (s3:GetObject)');
    const chunks: Buffer[] = [];
    if (found !== null && found !== 'out of range') {
      for await (const chunk of found.body as AsyncIterable<Buffer>) chunks.push(chunk);
    }
    if (!Buffer.concat(chunks).equals(PROBE.subarray(9))) {
      throw new MillraceError(
        'failed_precondition',
        `${bucket.where} does not give back what was just written (or not a range of it); it cannot hold blobs`,
      );
    }
    await bucket.remove(key, 'deleting an object (s3:DeleteObject)');
    deleted = true;
  } finally {
    // The error under way is the one that matters.
    if (!deleted) await bucket.remove(key, 'deleting an object').catch(() => {});
  }
}
