import { MillraceError } from '@millrace/runner';
import { describe, expect, test } from 'vitest';
import { s3Error } from './s3-errors.ts';

/** An error as the driver makes it, with what it carries besides. */
function answered(name: string, status: number, more: object = {}): Error {
  return Object.assign(new Error('said the server'), {
    name,
    $metadata: { httpStatusCode: status },
    AWSAccessKeyId: 'AKIA-HUSH',
    StringToSign: 'hush',
    $response: { headers: {} },
    ...more,
  });
}

const mapped = (error: unknown): MillraceError => {
  const result = s3Error(error, 'storing it', 'bucket b');
  if (!MillraceError.is(result)) throw new Error('not one of our errors');
  return result;
};

describe('errors of S3', () => {
  // What Amazon answers to a request signed for another region, in its three ways; other servers do not care about regions.
  test.each([
    answered('PermanentRedirect', 301, { $response: { headers: { 'x-amz-bucket-region': 'eu-west-1' } } }),
    answered('AuthorizationHeaderMalformed', 400, { Region: 'eu-west-1' }),
    answered('AuthorizationHeaderMalformed', 400, {
      message: "the region 'us-east-1' is wrong; expecting 'eu-west-1'",
    }),
    answered('Unknown', 301, { $response: { headers: { 'x-amz-bucket-region': 'eu-west-1' } } }),
  ])('a bucket in another region names the region to give ($name)', (error) => {
    expect(mapped(error)).toMatchObject({
      code: 'failed_precondition',
      retryable: false,
      message: expect.stringContaining('?region=eu-west-1') as string,
    });
  });

  test.each([
    ['SlowDown', 503, 'unavailable', true],
    ['InternalError', 500, 'unavailable', true],
    ['Whatever', 502, 'unavailable', true],
    ['TooManyRequests', 429, 'unavailable', true],
    ['QuotaExceeded', 403, 'resource_exhausted', true],
    ['AccessDenied', 403, 'permission_denied', false],
    ['Unknown', 403, 'permission_denied', false],
    ['ExpiredToken', 400, 'unauthenticated', false],
    ['RequestTimeTooSkewed', 403, 'failed_precondition', false],
    ['NotImplemented', 501, 'unimplemented', false],
    ['InvalidArgument', 400, 'internal', false],
  ])('%s (%i) is %s', (name, status, code, retryable) => {
    expect(mapped(answered(name, status))).toMatchObject({ code, retryable });
  });

  test('no answer at all is unavailable, and the first of several addresses tells why', () => {
    const refused = Object.assign(new Error('connect ECONNREFUSED 10.0.0.1:80'), { code: 'ECONNREFUSED' });
    for (const error of [refused, new AggregateError([refused, new Error('other')], '')]) {
      expect(mapped(error)).toMatchObject({
        code: 'unavailable',
        retryable: true,
        message: 'storing it: bucket b cannot be reached: connect ECONNREFUSED 10.0.0.1:80',
      });
    }
  });

  test('what the driver knows of keys and signatures stays behind', () => {
    const { message, cause } = mapped(answered('SignatureDoesNotMatch', 403));
    expect(JSON.stringify([message, cause, Object.entries(cause as object), String(cause)])).not.toMatch(
      /hush/i,
    );
  });

  test('our own errors and the reason of an abort pass as they are', () => {
    const ours = new MillraceError('data_loss', 'wrong bytes');
    expect(s3Error(ours, 'x', 'y')).toBe(ours);
    const reason = new Error('enough');
    expect(s3Error(new Error('aborted'), 'x', 'y', AbortSignal.abort(reason))).toBe(reason);
  });
});
