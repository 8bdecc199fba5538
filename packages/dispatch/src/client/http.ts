/**
 * One HTTP origin as every client here uses it: an undici pool, timeouts on everything that waits, bounded bodies,
 * and errors in our closed set. No automatic retry and no redirects: both are the caller's decision.
 *
 * undici's `request` and not `fetch`: measured five to seven times cheaper per request, and `fetch` holds a whole
 * streamed upload in memory (nodejs/undici#4058).
 */
import { STATUS_CODES } from 'node:http';
import type { Readable } from 'node:stream';
import { ERROR_CODES, MillraceError, type ErrorCode } from '@millrace/runner';
import { Pool, ProxyAgent, errors as undiciErrors, type Dispatcher } from 'undici';
import { proxyFor, type ProxySettings } from './proxy.ts';

export interface HttpOriginOptions {
  /** `http(s)://host[:port]` with an optional path prefix; trailing slashes are removed. */
  readonly baseUrl: string;
  /** Time to the response head and longest silence in a body, each. Default 60,000 ms. */
  readonly timeoutMs?: number;
  /** Connections. Default 32. */
  readonly connections?: number;
  readonly userAgent?: string;
  /** Default none: straight to the origin. */
  readonly proxy?: ProxySettings;
}

export interface HttpRequest {
  readonly method: 'GET' | 'POST' | 'PUT' | 'DELETE' | 'HEAD';
  /** Appended to the base URL's path; starts with a slash; query included, already encoded. */
  readonly path: string;
  readonly headers?: Readonly<Record<string, string>>;
  readonly body?: string | Uint8Array | Readable | null;
  /** Sent as JSON with its content type. */
  readonly json?: unknown;
  readonly signal?: AbortSignal;
  /** Overrides the origin's. For a long poll: the wait plus a margin. */
  readonly timeoutMs?: number;
}

export interface HttpResponse {
  readonly status: number;
  readonly headers: Readonly<Record<string, string | string[] | undefined>>;
  /** Must be consumed, or `discard()` called, or the connection is lost to the pool. */
  readonly body: Readable;
  header(name: string): string | null;
  /** The whole body. `resource_exhausted` past `maxBytes` (default 2 MiB). */
  bytes(maxBytes?: number): Promise<Uint8Array>;
  /** The whole body as text. `resource_exhausted` past `maxBytes` (default 2 MiB). */
  text(maxBytes?: number): Promise<string>;
  /** The whole body as JSON. `data_loss` (retryable) when it is not JSON. */
  json(maxBytes?: number): Promise<unknown>;
  discard(): Promise<void>;
}

export const DEFAULT_BODY_BYTES = 2 * 1024 * 1024;

export class HttpOrigin implements AsyncDisposable {
  readonly baseUrl: string;
  readonly #prefix: string;
  readonly #origin: string;
  readonly #dispatcher: Pool | ProxyAgent;
  readonly #timeoutMs: number;
  readonly #userAgent: string | null;

  constructor(options: HttpOriginOptions) {
    if (!URL.canParse(options.baseUrl) || !/^https?:\/\//i.test(options.baseUrl)) {
      throw new MillraceError(
        'invalid_argument',
        `base URL must be http:// or https://, got ${JSON.stringify(options.baseUrl)}`,
      );
    }
    const url = new URL(options.baseUrl);
    this.#prefix = url.pathname.replace(/\/+$/, '');
    this.baseUrl = `${url.origin}${this.#prefix}`;
    this.#timeoutMs = options.timeoutMs ?? 60_000;
    this.#userAgent = options.userAgent ?? null;
    this.#origin = url.origin;
    const connections = {
      connections: options.connections ?? 32,
      connect: { timeout: Math.min(this.#timeoutMs, 10_000) },
      // One request per connection at a time: a long poll must not hold back the heartbeat behind it.
      pipelining: 1,
      keepAliveTimeout: 4_000,
    };
    const proxy = proxyFor(url, options.proxy);
    this.#dispatcher =
      proxy === null
        ? new Pool(url.origin, connections)
        : // Plain requests go to the proxy as such, since not every proxy lets others tunnel to any port.
          new ProxyAgent({ ...connections, uri: proxy, proxyTunnel: url.protocol === 'https:' });
  }

  /** @throws MillraceError `unavailable` for everything of the transport; the signal's reason when it aborts. */
  async request(request: HttpRequest): Promise<HttpResponse> {
    const { signal } = request;
    signal?.throwIfAborted();
    const headers: Record<string, string> = { accept: '*/*', ...request.headers };
    if (this.#userAgent !== null) headers['user-agent'] ??= this.#userAgent;
    let body: string | Uint8Array | Readable | null = request.body ?? null;
    if (request.json !== undefined) {
      headers['content-type'] ??= 'application/json';
      body = JSON.stringify(request.json);
    }
    const timeoutMs = request.timeoutMs ?? this.#timeoutMs;
    try {
      const response = await this.#dispatcher.request({
        origin: this.#origin,
        method: request.method,
        path: this.#prefix + request.path,
        headers,
        body,
        headersTimeout: timeoutMs,
        bodyTimeout: timeoutMs,
        ...(signal === undefined ? {} : { signal }),
      });
      return new UndiciResponse(response, request, signal);
    } catch (error) {
      throw transportError(error, `${request.method} ${request.path}`, signal);
    }
  }

  /** Idle connections close now, requests under way end with an error. */
  async close(): Promise<void> {
    await this.#dispatcher.destroy();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

type UndiciData = Dispatcher.ResponseData;

class UndiciResponse implements HttpResponse {
  readonly status: number;
  readonly headers: HttpResponse['headers'];
  readonly body: Readable;
  readonly #what: string;
  readonly #signal: AbortSignal | undefined;

  constructor(response: UndiciData, request: HttpRequest, signal: AbortSignal | undefined) {
    this.status = response.statusCode;
    this.headers = response.headers;
    this.body = response.body;
    this.#what = `${request.method} ${request.path}`;
    this.#signal = signal;
  }

  header(name: string): string | null {
    const value = this.headers[name.toLowerCase()];
    return Array.isArray(value) ? value.join(', ') : (value ?? null);
  }

  async text(maxBytes = DEFAULT_BODY_BYTES): Promise<string> {
    return (await this.bytes(maxBytes)).toString('utf8');
  }

  async bytes(maxBytes = DEFAULT_BODY_BYTES): Promise<Buffer> {
    const chunks: Buffer[] = [];
    let size = 0;
    try {
      for await (const chunk of this.body as AsyncIterable<Buffer>) {
        size += chunk.length;
        if (size > maxBytes) {
          this.body.destroy();
          throw new MillraceError(
            'resource_exhausted',
            `${this.#what}: the answer is larger than ${maxBytes} bytes`,
            {
              details: { limit: 'maxBytes', value: maxBytes, status: this.status },
            },
          );
        }
        chunks.push(chunk);
      }
    } catch (error) {
      throw MillraceError.is(error) ? error : transportError(error, this.#what, this.#signal);
    }
    return Buffer.concat(chunks);
  }

  async json(maxBytes = DEFAULT_BODY_BYTES): Promise<unknown> {
    const text = await this.text(maxBytes);
    try {
      return JSON.parse(text) as unknown;
    } catch (cause) {
      throw new MillraceError(
        'data_loss',
        `${this.#what}: status ${this.status} with a body that is not JSON (${text.length} characters)`,
        {
          cause,
          retryable: true,
          details: { status: this.status },
        },
      );
    }
  }

  async discard(): Promise<void> {
    try {
      for await (const chunk of this.body) void chunk;
    } catch {
      // Nobody wants these bytes; a broken connection is replaced by the pool.
    }
  }
}

/** Which code a status means to a client. 2xx and 3xx have none. */
export function codeOfStatus(status: number): ErrorCode {
  if (status === 401) return 'unauthenticated';
  if (status === 403) return 'permission_denied';
  if (status === 404 || status === 410) return 'not_found';
  if (status === 405 || status === 501) return 'unimplemented';
  if (status === 409) return 'aborted';
  // Before the other 5xx: a full disk is no outage, though it passes like one.
  if (status === 413 || status === 429 || status === 507) return 'resource_exhausted';
  if (status === 408 || status === 425 || (status >= 500 && status <= 599)) return 'unavailable';
  if (status >= 400 && status <= 499) return 'invalid_argument';
  return 'internal';
}

/**
 * The error for an answer that is not a success. The body is read (bounded) and quoted up to 512 bytes; for our own
 * dispatcher's JSON error bodies the sentence in it is the message.
 *
 * @param scrub takes secrets out of the body before it is cut and quoted; for requests that carry some
 */
export async function statusError(
  what: string,
  response: HttpResponse,
  scrub: (body: string) => string = (body) => body,
): Promise<MillraceError> {
  const body = scrub(await response.text(64 * 1024).catch(() => ''));
  const retryAfter = retryAfterMs(response.header('retry-after'));
  const code = codeOfStatus(response.status);
  const status = `${response.status} ${STATUS_CODES[response.status] ?? ''}`.trim();
  return new MillraceError(code, `${what} status ${status}; body: ${previewBody(body)}`, {
    retryable: code === 'unavailable' || response.status === 429 || response.status === 507,
    details: {
      status: response.status,
      body: previewBody(body),
      ...(retryAfter === null ? {} : { retry_after_ms: retryAfter }),
    },
  });
}

/** The error for an answer of our own dispatcher that is no success: its own code and sentence where it gave them. */
export async function dispatcherError(
  call: Pick<HttpRequest, 'method' | 'path'>,
  response: HttpResponse,
): Promise<MillraceError> {
  const { status } = response;
  const body = await response.text(64 * 1024).catch(() => '');
  const own = ownError(body);
  const code = own?.code ?? codeOfStatus(status);
  return new MillraceError(
    code,
    own?.message ?? `${call.method} ${call.path}: status ${status}; body: ${previewBody(body)}`,
    { retryable: code === 'unavailable' || status === 429 || status === 507, details: { status } },
  );
}

function ownError(body: string): { readonly code: ErrorCode; readonly message: string } | null {
  try {
    const { error } = JSON.parse(body) as { error?: { code?: unknown; message?: unknown } };
    if (typeof error?.code !== 'string' || typeof error.message !== 'string') return null;
    return Object.hasOwn(ERROR_CODES, error.code)
      ? { code: error.code as ErrorCode, message: error.message }
      : null;
  } catch {
    return null;
  }
}

/** The service's clock when it answered, to the second; null when it does not tell. */
export function dateOf(answer: HttpResponse): number | null {
  const at = Date.parse(answer.header('date') ?? '');
  return Number.isNaN(at) ? null : at;
}

/** At most 512 bytes of a body, cut on a character boundary. */
export function previewBody(body: string): string {
  const bytes = Buffer.from(body, 'utf8');
  if (bytes.length <= 512) return body;
  let end = 512;
  while (end > 0 && ((bytes[end] ?? 0) & 0xc0) === 0x80) end -= 1;
  return `${bytes.subarray(0, end).toString('utf8')}… (truncated)`;
}

/** `Retry-After` in either of its forms; null when absent or neither. */
export function retryAfterMs(header: string | null): number | null {
  if (header === null) return null;
  if (/^\d+$/.test(header.trim())) return Number(header.trim()) * 1000;
  const at = Date.parse(header);
  return Number.isNaN(at) ? null : Math.max(0, at - Date.now());
}

/** undici and socket errors, and the caller's own abort, told apart in one place. */
export function transportError(error: unknown, what: string, signal?: AbortSignal): unknown {
  if (signal?.aborted) return signal.reason;
  const text =
    error instanceof undiciErrors.HeadersTimeoutError
      ? 'no answer in time'
      : error instanceof undiciErrors.BodyTimeoutError
        ? 'the answer stalled'
        : error instanceof undiciErrors.ConnectTimeoutError
          ? 'no connection in time'
          : errorText(error);
  return new MillraceError('unavailable', `network error: ${what}: ${text}`, { cause: error });
}

function errorText(error: unknown): string {
  if (error instanceof AggregateError && error.errors.length > 0) return errorText(error.errors[0]);
  if (error instanceof Error) return error.message || (error as NodeJS.ErrnoException).code || error.name;
  return String(error);
}
