/** `s3://bucket/prefix?endpoint=…&region=…&path_style=1&direct=1`: where blobs live in an S3-compatible store. */
import { MillraceError } from '@millrace/runner';

export interface S3Place {
  readonly bucket: string;
  /** Of every key; empty or ending in a slash. */
  readonly prefix: string;
  /** An origin (`https://s3.example.org:9000`); null: Amazon's for the region. */
  readonly endpoint: string | null;
  /** Null: what the AWS environment or profile says; with an endpoint and neither of them, `us-east-1`. */
  readonly region: string | null;
  /** `endpoint/bucket/key` instead of `bucket.endpoint/key`. */
  readonly pathStyle: boolean;
  /** Clients that can may read from the bucket itself, by presigned URLs. */
  readonly direct: boolean;
}

const PARAMETERS = new Set(['endpoint', 'region', 'path_style', 'direct']);

const SHAPE = 's3://BUCKET[/PREFIX][?endpoint=URL&region=NAME&path_style=1&direct=1]';

/** Keys are up to 1,024 bytes in S3; what we put behind the prefix is below 256. */
const MAX_PREFIX = 512;

/**
 * Reads such a URL.
 *
 * @throws MillraceError `invalid_argument`, which never repeats the URL: somebody may have written a secret into it.
 */
export function parseS3Url(text: string): S3Place {
  const match = /^s3:\/\/([^/?#]*)(\/[^?#]*)?(?:\?([^#]*))?$/i.exec(text);
  if (match === null) throw invalid(`must be ${SHAPE}`);
  const [, bucket = '', path = '', query = ''] = match;
  if (bucket.includes('@')) {
    throw invalid(
      'must not hold credentials; they come from the AWS environment or profile (AWS_ACCESS_KEY_ID, AWS_PROFILE, …)',
    );
  }
  if (!/^[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]$/.test(bucket)) {
    throw invalid(
      `needs a bucket name of 3 to 63 letters, digits, dots and hyphens after s3://, got ${JSON.stringify(bucket.slice(0, 80))}`,
    );
  }
  const parameters = new URLSearchParams(query);
  for (const name of new Set(parameters.keys())) {
    if (!PARAMETERS.has(name)) {
      throw invalid(
        `has the unknown parameter ${JSON.stringify(name.slice(0, 40))}; it takes ${[...PARAMETERS].join(', ')}`,
      );
    }
    if (parameters.getAll(name).length > 1) throw invalid(`has ${name} twice`);
  }
  const endpoint = endpointOf(parameters.get('endpoint'));
  const region = parameters.get('region');
  if (region !== null && !/^[a-zA-Z0-9-]{1,64}$/.test(region)) {
    throw invalid('has a region that is not 1 to 64 letters, digits and hyphens');
  }
  return {
    bucket,
    prefix: prefixOf(path),
    endpoint,
    region,
    // Servers of one's own rarely have a name for each bucket.
    pathStyle: flag(parameters, 'path_style') ?? endpoint !== null,
    direct: flag(parameters, 'direct') ?? false,
  };
}

/** For people: bucket, prefix and endpoint. */
export function describeS3(place: S3Place): string {
  const at = place.endpoint === null ? '' : ` at ${place.endpoint}`;
  return `bucket ${place.bucket}${place.prefix === '' ? '' : ` (prefix ${place.prefix.slice(0, -1)})`}${at}`;
}

function prefixOf(path: string): string {
  const prefix = path.replace(/^\/+|\/+$/g, '');
  if (prefix === '') return '';
  // Only what needs no escaping anywhere: in a URL, in the header that names the source of a copy, in a policy.
  const clean = prefix.split('/').every((step) => /^[A-Za-z0-9._-]+$/.test(step) && !/^\.+$/.test(step));
  if (!clean || prefix.length > MAX_PREFIX) {
    throw invalid(
      `has a prefix that is not up to ${MAX_PREFIX} letters, digits, dots, hyphens and underscores between single slashes`,
    );
  }
  return `${prefix}/`;
}

function endpointOf(value: string | null): string | null {
  if (value === null) return null;
  if (!URL.canParse(value) || !/^https?:$/.test(new URL(value).protocol)) {
    throw invalid('has an endpoint that is not an http or https URL');
  }
  const url = new URL(value);
  if (url.username !== '' || url.password !== '') {
    throw invalid(
      'has an endpoint with credentials; they come from the AWS environment or profile (AWS_ACCESS_KEY_ID, AWS_PROFILE, …)',
    );
  }
  if (url.pathname !== '/' || url.search !== '' || url.hash !== '') {
    throw invalid('has an endpoint with more than scheme, host and port');
  }
  return url.origin;
}

function flag(parameters: URLSearchParams, name: string): boolean | null {
  const value = parameters.get(name);
  if (value === null) return null;
  if (value !== '0' && value !== '1') throw invalid(`has ${name} that is neither 0 nor 1`);
  return value === '1';
}

function invalid(rule: string): MillraceError {
  return new MillraceError('invalid_argument', `the URL of the blobs ${rule}`);
}
