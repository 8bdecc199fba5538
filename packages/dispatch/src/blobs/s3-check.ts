/** What is found out about a bucket before anything depends on it. */
import { createHash } from 'node:crypto';
import { MillraceError } from '@millrace/runner';
import { request } from 'undici';
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

/** How long the probe of {@link checksUploads} may take. */
const UPLOAD_PROBE_MS = 10_000;

/**
 * Whether the bucket takes bytes by a signed request, and refuses others than that was signed for. Where it does not check them, whoever
 * has such a request could put what they like under a name that promises something else. Leaves nothing behind.
 */
export async function checksUploads(bucket: S3Bucket, key: string): Promise<boolean> {
  const stated = { sha256: createHash('sha256').update(PROBE).digest('hex'), size: PROBE.length };
  const other = Buffer.from(PROBE);
  other[0] = 0;
  const put = async (body: Uint8Array): Promise<number> => {
    const { url, headers } = await bucket.putRequest(key, stated, 60);
    const answer = await request(url, {
      method: 'PUT',
      headers,
      body,
      signal: AbortSignal.timeout(UPLOAD_PROBE_MS),
    });
    await answer.body.dump();
    return answer.statusCode;
  };
  try {
    const refused = await put(other);
    if (refused < 400 || refused > 499) return false;
    return (await put(PROBE)) === 200;
  } catch {
    // It answers our own requests; whoever it does not answer these for can do without.
    return false;
  } finally {
    await bucket.remove(key, 'deleting an object').catch(() => {});
  }
}
