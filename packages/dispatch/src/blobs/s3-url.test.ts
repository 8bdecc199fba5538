import { describe, expect, test } from 'vitest';
import { describeS3, parseS3Url } from './s3-url.ts';

describe('the URL of blobs in S3', () => {
  test('a bucket alone is at Amazon, with the bucket in the host name', () => {
    expect(parseS3Url('s3://my-bucket')).toEqual({
      bucket: 'my-bucket',
      prefix: '',
      endpoint: null,
      region: null,
      pathStyle: false,
      direct: false,
    });
    expect(parseS3Url('s3://my-bucket/')).toEqual(parseS3Url('s3://my-bucket'));
  });

  test('an endpoint means paths, unless told otherwise', () => {
    const url = 's3://b.1/a/b-c/?endpoint=http%3A%2F%2F10.0.0.1%3A9000&region=eu-west-1';
    expect(parseS3Url(url)).toEqual({
      bucket: 'b.1',
      prefix: 'a/b-c/',
      endpoint: 'http://10.0.0.1:9000',
      region: 'eu-west-1',
      pathStyle: true,
      direct: false,
    });
    expect(parseS3Url(`${url}&path_style=0&direct=1`)).toMatchObject({ pathStyle: false, direct: true });
    expect(describeS3(parseS3Url(url))).toBe('bucket b.1 (prefix a/b-c) at http://10.0.0.1:9000');
  });

  test.each([
    ['s3:bucket', 'must be s3://BUCKET'],
    ['s3://bucket#part', 'must be s3://BUCKET'],
    ['s3://', 'bucket name'],
    ['s3://ab', 'bucket name'],
    [`s3://${'a'.repeat(64)}`, 'bucket name'],
    ['s3://bucket:9000', 'bucket name'],
    ['s3://bucket/a//b', 'prefix'],
    ['s3://bucket/a/../b', 'prefix'],
    ['s3://bucket/a%2Fb', 'prefix'],
    [`s3://bucket/${'a'.repeat(513)}`, 'prefix'],
    ['s3://bucket?endpoint=ftp://host', 'endpoint that is not an http or https URL'],
    ['s3://bucket?endpoint=host:9000', 'endpoint that is not an http or https URL'],
    ['s3://bucket?endpoint=http://host/path', 'more than scheme, host and port'],
    ['s3://bucket?region=', 'region'],
    ['s3://bucket?region=a&region=b', 'region twice'],
    ['s3://bucket?path_style=yes', 'path_style that is neither 0 nor 1'],
    ['s3://bucket?acl=public', 'unknown parameter "acl"'],
  ])('%s is refused', (url, rule) => {
    expect(() => parseS3Url(url)).toThrow(
      expect.objectContaining({ code: 'invalid_argument', message: expect.stringContaining(rule) as string }),
    );
  });

  test('a prefix of 512 characters is allowed', () => {
    expect(parseS3Url(`s3://bucket/${'a'.repeat(512)}`).prefix).toHaveLength(513);
  });

  test.each([
    's3://AKIA123:hushhush@bucket',
    's3://bucket?endpoint=http://AKIA123:hushhush@host',
    's3://bucket?secret_access_key=hushhush',
    's3://bucket?endpoint=hushhush',
    's3://bucket/hushhush%20',
  ])('what may be a secret is refused and not repeated: %s', (url) => {
    expect(() => parseS3Url(url)).toThrow(
      expect.objectContaining({ message: expect.not.stringContaining('hushhush') as string }),
    );
  });
});
