/**
 * One bucket over the AWS SDK: the dozen requests we make of it, with its errors in our codes. Nothing of the SDK shows in what
 * others see, and nobody else imports it, so whoever keeps blobs as files never loads it.
 *
 * Checksums beyond what S3 demands are off. The SDK would otherwise send them as trailers, which servers older than 2025 either
 * refuse or store as part of the object; bytes are verified by our own digests.
 */
import type { Readable } from 'node:stream';
import {
  AbortMultipartUploadCommand,
  CompleteMultipartUploadCommand,
  CopyObjectCommand,
  CreateMultipartUploadCommand,
  DeleteObjectCommand,
  GetObjectCommand,
  HeadObjectCommand,
  ListMultipartUploadsCommand,
  ListObjectsV2Command,
  PutObjectCommand,
  S3Client,
  UploadPartCommand,
  UploadPartCopyCommand,
  type S3ClientConfig,
} from '@aws-sdk/client-s3';
import { getSignedUrl } from '@aws-sdk/s3-request-presigner';
import { MillraceError, type Clock } from '@millrace/runner';
import { request } from 'undici';
import { isAbsent, isOutOfRange, s3Error } from './s3-errors.ts';
import { describeS3, type S3Place } from './s3-url.ts';

export interface S3Credentials {
  readonly accessKeyId: string;
  readonly secretAccessKey: string;
  readonly sessionToken?: string;
}

export interface ObjectInfo {
  readonly size: number;
  /** By the bucket's clock, to the second, epoch milliseconds. */
  readonly modifiedMs: number;
}

export interface ListedObject extends ObjectInfo {
  /** Without the bucket's prefix. */
  readonly key: string;
}

export interface OpenObject {
  readonly body: Readable;
  /** Of the whole object. */
  readonly size: number;
  readonly start: number;
  readonly end: number;
}

/** A multipart upload of S3's own: its object appears when it is completed, or never. */
export interface ObjectUpload {
  /** Returns the part's etag. Parts of before with that number are replaced. */
  put(partNumber: number, bytes: Uint8Array): Promise<string>;
  /** Takes the part from an object of the bucket, `range` inclusive. */
  copy(
    partNumber: number,
    from: string,
    range?: { readonly start: number; readonly end: number },
  ): Promise<string>;
  /** `etags` of the parts 1, 2, 3 … */
  complete(etags: readonly string[]): Promise<void>;
  /** Best effort: what remains is removed a day later. */
  abort(): Promise<void>;
}

/** S3's own limits, which compatible servers share. */
export const MAX_PARTS = 10_000;
export const MIN_PART_BYTES = 5 * 1024 * 1024;
export const MAX_COPY_BYTES = 5 * 1024 ** 3;

/** A request is tried this often, with growing pauses, when the server is busy or the connection breaks. */
const ATTEMPTS = 4;
const CONNECT_MS = 5_000;
/** The longest silence on a connection. */
const IDLE_MS = 60_000;
/** Each open read keeps one. */
const CONNECTIONS = 512;

/**
 * How far our idea of the bucket's clock may be off. Its time comes with every answer, cut to the second; reckoning it anew each
 * time would make the same stamp differ from one call to the next.
 */
const SKEW_TOLERANCE_MS = 5_000;

/** The part of the SDK's signer that is wanted of it. */
interface Presigner {
  presign(
    request: {
      readonly method: string;
      readonly protocol: string;
      readonly hostname: string;
      readonly port?: number;
      readonly path: string;
      readonly query: Readonly<Record<string, string>>;
      readonly headers: Readonly<Record<string, string>>;
    },
    options: {
      readonly signingDate: Date;
      readonly expiresIn: number;
      readonly unhoistableHeaders: Set<string>;
    },
  ): Promise<{ readonly query: Record<string, string> }>;
}

export class S3Bucket {
  readonly where: string;
  readonly #place: S3Place;
  readonly #clock: Clock;
  readonly #client: S3Client;
  /** When the server answered, by its own clock: of every output of the SDK. */
  readonly #answeredMs = new WeakMap<object, number>();
  /** What to add to a time of the bucket to have it by our clock. */
  #skewMs = 0;

  private constructor(place: S3Place, clock: Clock, client: S3Client) {
    this.#place = place;
    this.where = describeS3(place);
    this.#clock = clock;
    this.#client = client;
    client.middlewareStack.add(
      (next) => async (args) => {
        const sentMs = clock.now();
        const result = await next(args);
        const date = (result.response as { readonly headers?: Readonly<Record<string, string>> }).headers?.[
          'date'
        ];
        const answeredMs = Date.parse(date ?? '');
        if (Number.isFinite(answeredMs)) {
          if (result.output !== undefined) this.#answeredMs.set(result.output, answeredMs);
          this.#noteTime(answeredMs, sentMs, clock.now());
        }
        return result;
      },
      { step: 'deserialize', priority: 'high', name: 'serverTime' },
    );
  }

  /** Makes no request. @throws MillraceError `invalid_argument` when nothing says which region. */
  static async connect(
    place: S3Place,
    credentials: S3Credentials | undefined,
    clock: Clock,
  ): Promise<S3Bucket> {
    const config: S3ClientConfig = {
      requestChecksumCalculation: 'WHEN_REQUIRED',
      responseChecksumValidation: 'WHEN_REQUIRED',
      forcePathStyle: place.pathStyle,
      maxAttempts: ATTEMPTS,
      requestHandler: {
        connectionTimeout: CONNECT_MS,
        socketTimeout: IDLE_MS,
        // Readers that are slow hold theirs; the SDK warns about those as if they were forgotten.
        socketAcquisitionWarningTimeout: 2 ** 31 - 1,
        httpAgent: { keepAlive: true, maxSockets: CONNECTIONS },
        httpsAgent: { keepAlive: true, maxSockets: CONNECTIONS },
      },
      ...(place.endpoint !== null && { endpoint: place.endpoint }),
      ...(place.region !== null && { region: place.region }),
      ...(credentials !== undefined && { credentials }),
    };
    let client = new S3Client(config);
    try {
      await client.config.region();
    } catch {
      client.destroy();
      if (place.endpoint === null) {
        throw new MillraceError(
          'invalid_argument',
          `${describeS3(place)}: the region is not known; give ?region=… in the URL of the blobs, or set AWS_REGION`,
        );
      }
      // Servers of one's own mostly do not care, and this is what those that do have by default.
      client = new S3Client({ ...config, region: 'us-east-1' });
    }
    return new S3Bucket(place, clock, client);
  }

  /** A time of the bucket by our clock, exact to a few seconds. */
  ours(bucketMs: number): number {
    return bucketMs + this.#skewMs;
  }

  /** Returns when the server answered, by its clock. */
  async put(key: string, bytes: Uint8Array, what: string, signal?: AbortSignal): Promise<number> {
    return this.#try(what, signal, async () => {
      const output = await this.#client.send(
        new PutObjectCommand({ ...this.#object(key), Body: bytes, ContentLength: bytes.length }),
        { ...(signal && { abortSignal: signal }) },
      );
      return this.#answered(output);
    });
  }

  /** Null when absent. */
  async head(key: string, what: string): Promise<ObjectInfo | null> {
    return this.#try(what, undefined, async () => {
      try {
        const output = await this.#client.send(new HeadObjectCommand(this.#object(key)));
        return { size: output.ContentLength ?? 0, modifiedMs: toSecond(output.LastModified) };
      } catch (error) {
        if (isAbsent(error)) return null;
        throw error;
      }
    });
  }

  /** Null when absent, `out of range` when `start` is behind the end. What is behind the end of `range` is left out. */
  async get(
    key: string,
    range: { readonly start: number; readonly end?: number | undefined } | null,
    what: string,
    signal?: AbortSignal,
  ): Promise<OpenObject | null | 'out of range'> {
    return this.#try(what, signal, async () => {
      try {
        const output = await this.#client.send(
          new GetObjectCommand({
            ...this.#object(key),
            ...(range !== null && { Range: `bytes=${range.start}-${range.end ?? ''}` }),
          }),
          { ...(signal && { abortSignal: signal }) },
        );
        const body = output.Body as Readable;
        const length = output.ContentLength ?? 0;
        const [, start, end, size] = /^bytes (\d+)-(\d+)\/(\d+)$/.exec(output.ContentRange ?? '') ?? [];
        if (size === undefined && range !== null) {
          body.destroy();
          throw new MillraceError('unimplemented', `${what}: ${this.where} does not answer ranges`);
        }
        return {
          body,
          size: Number(size ?? length),
          start: Number(start ?? 0),
          end: Number(end ?? length - 1),
        };
      } catch (error) {
        if (isAbsent(error)) return null;
        if (isOutOfRange(error)) return 'out of range';
        throw error;
      }
    });
  }

  /** Up to {@link MAX_COPY_BYTES}; the bytes do not pass this machine. */
  async copy(from: string, to: string, what: string): Promise<void> {
    await this.#try(what, undefined, () =>
      this.#client.send(new CopyObjectCommand({ ...this.#object(to), CopySource: this.#source(from) })),
    );
  }

  /** Harmless when absent. */
  async remove(key: string, what: string): Promise<void> {
    await this.#try(what, undefined, () => this.#client.send(new DeleteObjectCommand(this.#object(key))));
  }

  /**
   * Deletes the object, but never later than `validSecs` after `fromMs`, both by the server's clock: the request is signed for
   * that time only, so one that was held up on the way is refused. It is sent once; when nothing is heard it may have happened.
   */
  async removeWithin(key: string, fromMs: number, validSecs: number, what: string): Promise<void> {
    await this.#try(what, undefined, async () => {
      const url = await getSignedUrl(this.#client, new DeleteObjectCommand(this.#object(key)), {
        signingDate: new Date(fromMs),
        expiresIn: validSecs,
      });
      const timeout = AbortSignal.timeout(validSecs * 1000);
      const { statusCode, body } = await request(url, { method: 'DELETE', signal: timeout }).catch(
        (error: unknown) => {
          // Of the error only what does not hold the signed URL.
          throw Object.assign(new Error('no answer'), { code: (error as NodeJS.ErrnoException).code });
        },
      );
      const text = await body.text();
      if (statusCode > 299) {
        const name = /<Code>(\w+)<\/Code>/.exec(text)?.[1] ?? 'error';
        throw Object.assign(new Error('the delete was refused'), {
          name,
          $metadata: { httpStatusCode: statusCode },
        });
      }
    });
  }

  /** Every object whose key begins with `prefix`, sorted by key; a page at a time. */
  async *list(prefix: string, what: string, signal?: AbortSignal): AsyncGenerator<ListedObject, undefined> {
    for (let token: string | undefined; ;) {
      const page = await this.#page(prefix, what, token, signal);
      yield* page.objects;
      if (page.next === undefined) return;
      token = page.next;
    }
  }

  /** The first thousand of {@link list}, and when the server answered, by its clock. */
  async listFirst(
    prefix: string,
    what: string,
  ): Promise<{ readonly objects: readonly ListedObject[]; readonly answeredMs: number }> {
    return this.#page(prefix, what, undefined, undefined);
  }

  async upload(key: string, what: string, signal?: AbortSignal): Promise<ObjectUpload> {
    const options = { ...(signal && { abortSignal: signal }) };
    const { UploadId } = await this.#try(what, signal, () =>
      this.#client.send(new CreateMultipartUploadCommand(this.#object(key)), options),
    );
    const object = { ...this.#object(key), UploadId };
    const etagOf = (etag: string | undefined): string => {
      if (etag !== undefined) return etag;
      throw new MillraceError('internal', `${what}: ${this.where} answered a part without its etag`);
    };
    return {
      put: async (PartNumber, Body) =>
        this.#try(what, signal, async () => {
          const command = new UploadPartCommand({ ...object, PartNumber, Body, ContentLength: Body.length });
          return etagOf((await this.#client.send(command, options)).ETag);
        }),
      copy: async (PartNumber, from, range) =>
        this.#try(what, signal, async () => {
          const command = new UploadPartCopyCommand({
            ...object,
            PartNumber,
            CopySource: this.#source(from),
            ...(range && { CopySourceRange: `bytes=${range.start}-${range.end}` }),
          });
          return etagOf((await this.#client.send(command, options)).CopyPartResult?.ETag);
        }),
      complete: async (etags) => {
        const Parts = etags.map((ETag, index) => ({ ETag, PartNumber: index + 1 }));
        await this.#try(what, signal, () =>
          this.#client.send(
            new CompleteMultipartUploadCommand({ ...object, MultipartUpload: { Parts } }),
            options,
          ),
        );
      },
      abort: async () => this.#abortUpload(key, UploadId).catch(() => {}),
    };
  }

  /** Gives up S3's own uploads that were begun before `beforeMs` (by our clock) and never completed. How many. */
  async abortUploads(beforeMs: number, signal?: AbortSignal): Promise<number> {
    const what = 'removing left-over multipart uploads';
    const { prefix, bucket } = this.#place;
    let aborted = 0;
    let marker: { readonly KeyMarker?: string; readonly UploadIdMarker?: string } = {};
    for (;;) {
      const page = await this.#try(what, signal, () =>
        this.#client.send(new ListMultipartUploadsCommand({ Bucket: bucket, Prefix: prefix, ...marker }), {
          ...(signal && { abortSignal: signal }),
        }),
      );
      for (const { Key, UploadId, Initiated } of page.Uploads ?? []) {
        if (Key === undefined || UploadId === undefined) continue;
        if (this.ours(toSecond(Initiated)) >= beforeMs) continue;
        signal?.throwIfAborted();
        await this.#try(what, signal, () => this.#abortUpload(Key.slice(prefix.length), UploadId));
        aborted += 1;
      }
      if (page.IsTruncated !== true || page.NextKeyMarker === undefined) return aborted;
      marker = {
        KeyMarker: page.NextKeyMarker,
        ...(page.NextUploadIdMarker !== undefined && { UploadIdMarker: page.NextUploadIdMarker }),
      };
    }
  }

  /** A URL by which anybody reads the object for that long. */
  async readUrl(key: string, validSecs: number): Promise<string> {
    return this.#try('signing a URL', undefined, () =>
      getSignedUrl(this.#client, new GetObjectCommand(this.#object(key)), {
        signingDate: new Date(this.#clock.now() - this.#skewMs),
        expiresIn: validSecs,
      }),
    );
  }

  /**
   * A request by which anybody puts the object for that long, with bytes of this digest. What its signature covers makes the server
   * check them: their length and SHA-256, the latter in two ways, since servers that know only one of them ignore the other.
   */
  async putRequest(
    key: string,
    { sha256, size }: { readonly sha256: string; readonly size: number },
    validSecs: number,
  ): Promise<{ readonly url: string; readonly headers: Readonly<Record<string, string>> }> {
    const { origin, protocol, hostname, port, host, pathname } = new URL(await this.readUrl(key, validSecs));
    const headers = {
      'x-amz-content-sha256': sha256,
      'x-amz-checksum-sha256': Buffer.from(sha256, 'hex').toString('base64'),
    };
    return this.#try('signing a URL', undefined, async () => {
      // What the SDK makes itself leaves the digest of the body out.
      const signer = (await this.#client.config.signer()) as unknown as Presigner;
      const { query } = await signer.presign(
        {
          method: 'PUT',
          protocol,
          hostname,
          ...(port !== '' && { port: Number(port) }),
          path: pathname,
          query: {},
          headers: { host, 'content-length': String(size), ...headers },
        },
        {
          signingDate: new Date(this.#clock.now() - this.#skewMs),
          expiresIn: validSecs,
          unhoistableHeaders: new Set(Object.keys(headers)),
        },
      );
      return { url: `${origin}${pathname}?${new URLSearchParams(query).toString()}`, headers };
    });
  }

  close(): void {
    this.#client.destroy();
  }

  async #page(
    prefix: string,
    what: string,
    token: string | undefined,
    signal: AbortSignal | undefined,
  ): Promise<{
    readonly objects: readonly ListedObject[];
    readonly next: string | undefined;
    readonly answeredMs: number;
  }> {
    const skip = this.#place.prefix.length;
    return this.#try(what, signal, async () => {
      const output = await this.#client.send(
        new ListObjectsV2Command({
          Bucket: this.#place.bucket,
          Prefix: this.#place.prefix + prefix,
          ...(token !== undefined && { ContinuationToken: token }),
        }),
        { ...(signal && { abortSignal: signal }) },
      );
      const objects = (output.Contents ?? []).map(({ Key = '', Size = 0, LastModified }) => ({
        key: Key.slice(skip),
        size: Size,
        modifiedMs: toSecond(LastModified),
      }));
      const next = output.IsTruncated === true ? output.NextContinuationToken : undefined;
      return { objects, next, answeredMs: this.#answered(output) };
    });
  }

  async #abortUpload(key: string, UploadId: string | undefined): Promise<void> {
    try {
      await this.#client.send(new AbortMultipartUploadCommand({ ...this.#object(key), UploadId }));
    } catch (error) {
      if (!isAbsent(error)) throw error;
    }
  }

  #object(key: string): { readonly Bucket: string; readonly Key: string } {
    return { Bucket: this.#place.bucket, Key: this.#place.prefix + key };
  }

  /** Keys hold nothing that would have to be escaped here; see the rules for the prefix. */
  #source(key: string): string {
    return `${this.#place.bucket}/${this.#place.prefix}${key}`;
  }

  #answered(output: object): number {
    return this.#answeredMs.get(output) ?? this.#clock.now() - this.#skewMs;
  }

  #noteTime(answeredMs: number, sentMs: number, receivedMs: number): void {
    const roundTripMs = receivedMs - sentMs;
    // Half a second: the stamp is cut, not rounded.
    const skewMs = (sentMs + receivedMs) / 2 - (answeredMs + 500);
    if (Math.abs(skewMs - this.#skewMs) > SKEW_TOLERANCE_MS + roundTripMs / 2) {
      this.#skewMs = Math.round(skewMs);
    }
  }

  async #try<T>(what: string, signal: AbortSignal | undefined, attempt: () => Promise<T>): Promise<T> {
    try {
      return await attempt();
    } catch (error) {
      throw s3Error(error, what, this.where, signal);
    }
  }
}

/** HEAD answers whole seconds while a list may have milliseconds; the same stamp must be the same from both. */
function toSecond(date: Date | undefined): number {
  return Math.floor((date?.getTime() ?? 0) / 1000) * 1000;
}
