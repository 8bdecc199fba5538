/** {@link DomainStorage} over HTTP. See there for what each call promises. */
import { createHash, randomBytes } from 'node:crypto';
import { Readable } from 'node:stream';
import { MillraceError, systemClock, type ByteStream, type Clock, type ErrorCode } from '@millrace/runner';
import * as decode from '@millrace/runner/decode';
import { downloadBoundary, readDownload, uploadEnvelope, type MultipartPart } from '../multipart.ts';
import { checkBytes, pullFrom, readableFrom, verified, type Pull } from '../pull-stream.ts';
import type { CallOptions } from './dms.ts';
import type {
  DataItem,
  DomainStorage,
  DomainStorageOptions,
  DownloadPart,
  DownloadQuery,
  NewItem,
  StartUpload,
  StorageInfo,
  UploadSession,
  UploadTarget,
} from './domain.ts';
import {
  HttpOrigin,
  codeOfStatus,
  previewBody,
  transportError,
  type HttpRequest,
  type HttpResponse,
  retryAfterMs,
} from './http.ts';
import type { ProxySettings } from './proxy.ts';

/** How long an answer of `info` is believed. */
const INFO_TTL_MS = 60_000;

/** Joining parts takes the server a while: this is granted per part on top of the usual timeout. */
const JOIN_MS_PER_PART = 1_000;

/** After a read past the server failed, bytes come through it for so long. */
const DIRECT_PAUSE_MS = 60_000;

/** Who is slower than this, which is 0.5 MiB/s, sends through the server after all. */
const DIRECT_BYTES_PER_MS = 512;

/** Below this the two requests more that a read past the server costs are not worth it. */
const DIRECT_BYTES = 1024 * 1024;

/** Bodies up to this size are read whole before they are handed out: a stream that is pulled costs more than such bytes. */
const SHORT_BYTES = 64 * 1024;

/** Metadata of this many bytes at most. A list of a whole domain may be long. */
const LIST_BYTES = 64 * 1024 * 1024;

const ITEM: { readonly [K in keyof DataItem]: decode.Decoder<DataItem[K]> } = {
  id: decode.string,
  domain_id: decode.string,
  name: decode.string,
  data_type: decode.string,
  size: decode.counter,
  created_at: decode.string,
  updated_at: decode.string,
};

/**
 * Clients of domain servers that share connections, and what is known about each server, by address. Close it to close
 * the connections; the clients it gave have nothing of their own to close.
 */
export interface DomainPool extends AsyncDisposable {
  /**
   * @throws MillraceError `invalid_argument` for a base URL that is not http(s), or a client id a header cannot carry.
   */
  storage(options: DomainStorageOptions): DomainStorage;
}

/** Opens a pool. `proxy`: default none. */
export function openDomainPool(pool: { readonly proxy?: ProxySettings } = {}): DomainPool {
  const servers = new Map<string, DomainServer>();
  return {
    storage(options) {
      const timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS;
      const key = `${timeoutMs} ${options.baseUrl.replace(/\/+$/, '')}`;
      let server = servers.get(key);
      if (server === undefined) {
        servers.set(key, (server = new DomainServer(options.baseUrl, timeoutMs, pool.proxy)));
      }
      return new HttpDomainStorage(server, options);
    },
    [Symbol.asyncDispose]: async () => {
      await Promise.all([...servers.values()].map((server) => server.close()));
    },
  };
}

/**
 * Opens a client of one domain server, with connections of its own. Close it.
 *
 * @throws MillraceError as {@link DomainPool.storage}
 */
export function openDomainStorage(options: DomainStorageOptions): DomainStorage & AsyncDisposable {
  const pool = openDomainPool();
  return Object.assign(pool.storage(options), {
    [Symbol.asyncDispose]: () => pool[Symbol.asyncDispose](),
  });
}

const DEFAULT_TIMEOUT_MS = 60_000;

class DomainServer {
  readonly http: HttpOrigin;
  readonly timeoutMs: number;
  info: { readonly value: StorageInfo | null; readonly untilMs: number } | null = null;
  /** The one origin (scheme, host, port) it may send us to for bytes, as its last answer said. Null: it sends them itself. */
  directOrigin: string | null = null;
  /** No reads past the server before this. */
  directFromMs = -Infinity;
  /** It also takes parts of uploads there. */
  directParts = false;
  /** No parts past the server before this. */
  directPartsFromMs = -Infinity;
  readonly #proxy: { readonly proxy?: ProxySettings };
  /** Where the server sends us for bytes, by origin. */
  readonly #elsewhere = new Map<string, HttpOrigin>();

  constructor(baseUrl: string, timeoutMs: number, proxy: ProxySettings | undefined) {
    this.#proxy = proxy === undefined ? {} : { proxy };
    this.http = new HttpOrigin({ baseUrl, timeoutMs, ...this.#proxy });
    this.timeoutMs = timeoutMs;
  }

  elsewhere(origin: string): HttpOrigin {
    let http = this.#elsewhere.get(origin);
    if (http === undefined) {
      http = new HttpOrigin({ baseUrl: origin, timeoutMs: this.timeoutMs, ...this.#proxy });
      this.#elsewhere.set(origin, http);
    }
    return http;
  }

  async close(): Promise<void> {
    await Promise.all([this.http, ...this.#elsewhere.values()].map((http) => http.close()));
  }
}

class HttpDomainStorage implements DomainStorage {
  readonly #server: DomainServer;
  readonly #token: () => string;
  readonly #clientId: string;
  readonly #clock: Clock;

  constructor(server: DomainServer, options: DomainStorageOptions) {
    if (!/^[\x20-\x7e]+$/.test(options.clientId)) {
      throw new MillraceError(
        'invalid_argument',
        `client id must be visible ASCII characters, got ${JSON.stringify(options.clientId)}`,
      );
    }
    this.#server = server;
    this.#token = options.token;
    this.#clientId = options.clientId;
    this.#clock = options.clock ?? systemClock;
  }

  get knownInfo(): StorageInfo | null {
    return this.#keptInfo?.value ?? null;
  }

  get #keptInfo(): { readonly value: StorageInfo | null } | null {
    const { info } = this.#server;
    return info !== null && this.#clock.monotonic() < info.untilMs ? info : null;
  }

  async info(options: CallOptions = {}): Promise<StorageInfo | null> {
    const kept = this.#keptInfo;
    if (kept !== null) return kept.value;
    const server = this.#server;
    // The one call without a token: the reference sends none, so a server may not expect one.
    const response = await this.#server.http.request({
      method: 'GET',
      path: '/api/v1/info',
      headers: { 'posemesh-client-id': this.#clientId },
      ...options,
    });
    const value = response.status === 404 ? null : parseInfo(await jsonOf(response, 'info'));
    if (value === null) await response.discard();
    server.info = { value, untilMs: this.#clock.monotonic() + INFO_TTL_MS };
    return value;
  }

  async *download(query: DownloadQuery, options: CallOptions = {}): AsyncGenerator<DownloadPart> {
    const params = new URLSearchParams();
    if (query.name !== undefined) params.set('name', query.name);
    if (query.dataType !== undefined) params.set('data_type', query.dataType);
    // The commas between ids stay commas: reference servers take the list as it stands.
    const ids = query.ids.map((id) => encodeURIComponent(id)).join(',');
    const text = [ids === '' ? '' : `ids=${ids}`, params.toString()].filter((part) => part !== '').join('&');
    const path = `${dataPath(query.domainId)}${text === '' ? '' : `?${text}`}`;
    const items = await this.#itemsToRead(query, path, options);
    if (items !== null) {
      for (const item of items) yield* this.#downloadItem(item, options);
      return;
    }
    const response = await this.#send('download', {
      method: 'GET',
      path,
      headers: { accept: 'multipart/form-data' },
      ...options,
    });
    let boundary: string;
    try {
      boundary = downloadBoundary(response.header('content-type'));
    } catch (error) {
      giveUp(response);
      throw error;
    }
    let parts = 0;
    const source = bodyOf(response, 'download', options.signal);
    for await (const part of readDownload(source, boundary)) {
      parts += 1;
      const meta = partMeta(part);
      const checked =
        meta.digest === null
          ? part.pull
          : verified(part.pull, { digest: meta.digest, size: meta.size }, `data item ${meta.id}`);
      if (meta.size <= SHORT_BYTES) {
        yield { ...meta, body: readableOf(await wholeOf(checked)) };
        continue;
      }
      let broken: { readonly error: unknown } | null = null;
      const pull: Pull = async () => {
        try {
          return await checked();
        } catch (error) {
          broken = { error };
          throw error;
        }
      };
      const body = readableFrom({ pull, close: () => {} });
      try {
        yield { ...meta, body };
        // Not what became of `body`, which the caller may destroy as it likes.
        if (broken !== null) throw (broken as { readonly error: unknown }).error;
      } finally {
        // What the caller left unread is skipped by the parser, which must not race this stream for it.
        await destroyed(body);
      }
    }
    if (parts === 0) throw statusErrorOf(404, 'download', 'the answer has no parts');
  }

  async openRaw(
    domainId: string,
    id: string,
    range?: { readonly start: number; readonly end?: number },
    options: CallOptions = {},
  ): Promise<{ readonly body: Readable; readonly size: number | null; readonly digest: string | null }> {
    const request: HttpRequest = {
      method: 'GET',
      path: `${dataPath(domainId)}/${encodeURIComponent(id)}?raw=true`,
      headers: range === undefined ? {} : { range: `bytes=${range.start}-${range.end ?? ''}` },
      ...options,
    };
    const direct = await this.#readDirectly(request);
    const response = direct?.response ?? (await this.#send('raw download', request));
    if (range !== undefined && response.status !== 206) {
      giveUp(response);
      throw new MillraceError(
        'unimplemented',
        `raw download: a range was asked for, status ${response.status}`,
      );
    }
    const length = response.header('content-length');
    const size = length === null ? null : Number(length);
    const etag = direct === null ? response.header('etag') : direct.etag;
    const digest = /^"(sha256:[0-9a-f]{64})"$/.exec(etag ?? '')?.[1] ?? null;
    if (digest !== null && range === undefined && size !== null && size <= SHORT_BYTES) {
      const bytes = await response.bytes(size);
      checkBytes({ digest: digestOf(bytes), size: bytes.length }, { digest, size }, `data item ${id}`);
      return { body: readableOf(bytes), size, digest };
    }
    const source = pullFrom(bodyOf(response, 'raw download', options.signal));
    const expect =
      digest === null || range !== undefined ? null : size === null ? { digest } : { digest, size };
    const pull = expect === null ? source.pull : verified(source.pull, expect, `data item ${id}`);
    return {
      body: readableFrom({ pull, close: () => source.close(), abandon: () => giveUp(response) }),
      size,
      digest,
    };
  }

  async find(
    domainId: string,
    filter: { readonly name?: string; readonly dataType?: string },
    options: CallOptions = {},
  ): Promise<DataItem[]> {
    const params = new URLSearchParams();
    if (filter.name !== undefined) params.set('name', filter.name);
    if (filter.dataType !== undefined) params.set('data_type', filter.dataType);
    const text = params.toString();
    const response = await this.#request({
      method: 'GET',
      path: `${dataPath(domainId)}${text === '' ? '' : `?${text}`}`,
      headers: { accept: 'application/json' },
      ...options,
    });
    if (response.status === 404) {
      await response.discard();
      return [];
    }
    return parseList(await jsonOf(response, 'lookup'), 'lookup');
  }

  async get(domainId: string, id: string, options: CallOptions = {}): Promise<DataItem | null> {
    const response = await this.#request({
      method: 'GET',
      path: `${dataPath(domainId)}/${encodeURIComponent(id)}`,
      headers: { accept: 'application/json' },
      ...options,
    });
    if (response.status === 404) {
      await response.discard();
      return null;
    }
    return parseItem(await jsonOf(response, 'get'), 'get');
  }

  async put(
    domainId: string,
    target: UploadTarget,
    bytes: Uint8Array,
    options: CallOptions = {},
  ): Promise<DataItem | null> {
    for (const [what, value] of Object.entries(target)) checkParameter(what, value);
    const boundary = boundaryAbsentFrom(bytes);
    const { head, tail } = uploadEnvelope(target, boundary);
    const response = await this.#send('upload', {
      method: 'existingId' in target ? 'PUT' : 'POST',
      path: dataPath(domainId),
      headers: {
        'content-type': `multipart/form-data; boundary=${boundary}`,
        'content-length': String(head.length + bytes.length + tail.length),
      },
      body:
        bytes.length <= SLICE
          ? Buffer.concat([head, bytes, tail])
          : Readable.from(slices(head, bytes, tail), { objectMode: false }),
      ...options,
    });
    const [first] = parseList(await jsonOf(response, 'upload'), 'upload');
    return first ?? null;
  }

  async putNew(domainId: string, items: readonly NewItem[], options: CallOptions = {}): Promise<DataItem[]> {
    const boundary = boundaryAbsentFrom(...items.map(({ bytes }) => bytes));
    const pieces: Uint8Array[] = [];
    for (const { name, dataType, bytes } of items) {
      for (const [what, value] of Object.entries({ name, dataType })) checkParameter(what, value);
      if (pieces.length > 0) pieces.push(LINE_END);
      pieces.push(uploadEnvelope({ name, dataType }, boundary).head, bytes);
    }
    pieces.push(uploadEnvelope({ name: '', dataType: '' }, boundary).tail);
    const response = await this.#send('upload', {
      method: 'POST',
      path: dataPath(domainId),
      headers: { 'content-type': `multipart/form-data; boundary=${boundary}` },
      body: Buffer.concat(pieces),
      ...options,
    });
    return parseList(await jsonOf(response, 'upload'), 'upload');
  }

  async startUpload(request: StartUpload, options: CallOptions = {}): Promise<UploadSession> {
    const response = await this.#request({
      method: 'POST',
      path: `${dataPath(request.domainId)}/multipart?uploads`,
      json: {
        name: request.name,
        data_type: request.dataType,
        size: request.size,
        content_type: 'application/octet-stream',
        existing_id: request.existingId,
        ...(request.sha256 !== undefined && { sha256: request.sha256 }),
      },
      ...options,
    });
    // 404 is also how a server tells that `existing_id` is unknown; ours says it in words that are not the route's.
    if ([404, 405, 501].includes(response.status)) {
      const error = await failure(response, 'start of a chunked upload');
      throw new MillraceError('unimplemented', error.message, { details: error.details });
    }
    const answer = await jsonOf(response, 'start of a chunked upload');
    return decoded('start of a chunked upload', () => {
      const raw = decode.object(answer, 'answer');
      const partSize = decode.counter(raw['part_size'], 'part_size');
      if (partSize === 0) throw new MillraceError('invalid_argument', 'part_size must be > 0, got 0');
      return {
        uploadId: decode.string(raw['upload_id'], 'upload_id'),
        partSize,
        dataId: decode.optional(decode.string)(raw['data_id'], 'data_id'),
        parallelParts: response.header('millrace-parallel-parts') === '1',
      };
    });
  }

  async putPart(
    domainId: string,
    uploadId: string,
    partNumber: number,
    body: Uint8Array | ByteStream | (() => Uint8Array | ByteStream),
    size: number,
    { sha256, ...options }: CallOptions & { readonly sha256?: string } = {},
  ): Promise<string> {
    if (typeof body === 'function' || body instanceof Uint8Array) {
      const read = typeof body === 'function' ? body : () => body;
      const part = { partNumber, size, ...(sha256 !== undefined && { sha256 }) };
      const direct = await this.#putDirectly(domainId, uploadId, part, read, options);
      return direct ?? (await this.#putThrough(domainId, uploadId, partNumber, read(), size, options));
    }
    return await this.#putThrough(domainId, uploadId, partNumber, body, size, options);
  }

  /**
   * Asks the server where to put these bytes, and puts them there: at the origin it announced and nowhere else, and without our token.
   * Null when that is not offered or did not work; they then go through the server.
   */
  async #putDirectly(
    domainId: string,
    uploadId: string,
    part: { readonly partNumber: number; readonly size: number; readonly sha256?: string },
    read: () => Uint8Array | ByteStream,
    options: CallOptions,
  ): Promise<string | null> {
    const { partNumber, size } = part;
    const server = this.#server;
    const origin = server.directOrigin;
    if (origin === null || !server.directParts || size < DIRECT_BYTES) return null;
    if (this.#clock.monotonic() < server.directPartsFromMs) return null;
    const what = `part ${partNumber}`;
    const sha256 = part.sha256 ?? (await sha256Of(read(), size, what));
    const response = await this.#send(what, {
      method: 'POST',
      path: `${dataPath(domainId)}/multipart/direct?uploadId=${encodeURIComponent(uploadId)}`,
      json: { parts: [{ part_number: partNumber, sha256, size }] },
      ...options,
    });
    const { url, headers } = directPut(await jsonOf(response, what), what);
    if (url.origin !== origin) {
      throw new MillraceError(
        'permission_denied',
        `${what}: the server sends to ${url.origin} with the bytes, announced was ${origin}`,
      );
    }
    const sending = new Sending(read(), size, what);
    try {
      const put = await server.elsewhere(origin).request({
        method: 'PUT',
        path: url.pathname + url.search,
        headers: { ...headers, 'content-length': String(size) },
        body: sending.body,
        // The answer comes when all of it is there.
        timeoutMs: server.timeoutMs + size / DIRECT_BYTES_PER_MS,
        ...options,
      });
      await put.discard();
      if (isSuccess(put.status)) return `sha256:${sha256}`;
    } catch {
      // Of this error nothing may be told: it names the URL, which lets whoever has it write.
      options.signal?.throwIfAborted();
    }
    sending.throwIfBroken();
    server.directPartsFromMs = this.#clock.monotonic() + DIRECT_PAUSE_MS;
    return null;
  }

  async #putThrough(
    domainId: string,
    uploadId: string,
    partNumber: number,
    body: Uint8Array | ByteStream,
    size: number,
    options: CallOptions,
  ): Promise<string> {
    const what = `part ${partNumber}`;
    const sending = new Sending(body, size, what);
    try {
      const response = await this.#send(what, {
        method: 'PUT',
        path: `${uploadPath(domainId, uploadId)}&partNumber=${partNumber}`,
        headers: { 'content-type': 'application/octet-stream', 'content-length': String(size) },
        body: sending.body,
        ...options,
      });
      const raw = await jsonOf(response, what);
      return decoded(what, () => decode.string(decode.object(raw, 'answer')['etag'], 'etag'));
    } catch (error) {
      sending.throwIfBroken();
      throw error;
    }
  }

  async finishUpload(
    domainId: string,
    uploadId: string,
    parts: readonly { readonly part_number: number; readonly etag: string }[],
    options: CallOptions = {},
  ): Promise<string> {
    const what = 'completion of a chunked upload';
    const response = await this.#send(what, {
      method: 'POST',
      path: uploadPath(domainId, uploadId),
      json: { parts },
      timeoutMs: this.#server.timeoutMs + parts.length * JOIN_MS_PER_PART,
      ...options,
    });
    const raw = await jsonOf(response, what);
    return decoded(what, () => decode.string(decode.object(raw, 'answer')['id'], 'id'));
  }

  async abortUpload(domainId: string, uploadId: string, options: CallOptions = {}): Promise<void> {
    try {
      const response = await this.#request({
        method: 'DELETE',
        path: uploadPath(domainId, uploadId),
        ...options,
      });
      await response.discard();
    } catch {
      // Best effort by contract: the server drops the upload when it expires.
    }
  }

  async delete(domainId: string, id: string, options: CallOptions = {}): Promise<boolean> {
    const response = await this.#request({
      method: 'DELETE',
      path: `${dataPath(domainId)}/${encodeURIComponent(id)}`,
      ...options,
    });
    if (response.status !== 404 && !isSuccess(response.status)) throw await failure(response, 'delete');
    await response.discard();
    return response.status !== 404;
  }

  /** Where the server may send us now. */
  #directOrigin(): string | null {
    return this.#clock.monotonic() < this.#server.directFromMs ? null : this.#server.directOrigin;
  }

  /** What a download gives, if it is better read item by item past the server; null: it is not. */
  async #itemsToRead(
    query: DownloadQuery,
    path: string,
    options: CallOptions,
  ): Promise<readonly DataItem[] | null> {
    if (query.ids.length === 0 || this.#directOrigin() === null) return null;
    const response = await this.#request({
      method: 'GET',
      path,
      headers: { accept: 'application/json' },
      ...options,
    });
    const items = parseList(await jsonOf(response, 'download'), 'download');
    const found = new Set(items.map((item) => item.id));
    // The server knows what is said of an item that is missing.
    if (!query.ids.every((id) => found.has(id))) return null;
    return items.some((item) => item.size >= DIRECT_BYTES) ? items : null;
  }

  async *#downloadItem(item: DataItem, options: CallOptions): AsyncGenerator<DownloadPart> {
    const { body, digest } = await this.openRaw(item.domain_id, item.id, undefined, options);
    const { id, name, data_type, domain_id, size } = item;
    try {
      yield { id, name, data_type, domain_id, size, digest, body };
    } finally {
      await destroyed(body);
    }
  }

  /**
   * Asks the server where to read, and begins to read there: at the origin it announced and nowhere else, and without our token.
   * Null when that is not offered or did not work; the server then sends the bytes itself.
   */
  async #readDirectly(
    request: HttpRequest,
  ): Promise<{ readonly response: HttpResponse; readonly etag: string | null } | null> {
    const { signal } = request;
    const origin = this.#directOrigin();
    if (origin === null) return null;
    const asked = await this.#request({
      ...request,
      headers: { ...request.headers, 'millrace-direct': '1' },
    });
    const etag = asked.header('etag');
    if (asked.status !== 307) {
      if (!isSuccess(asked.status)) throw await failure(asked, 'raw download');
      return { response: asked, etag };
    }
    const location = asked.header('location') ?? '';
    await asked.discard();
    const url = URL.canParse(location) ? new URL(location) : null;
    if (url?.origin !== origin) {
      throw new MillraceError(
        'permission_denied',
        `raw download: the server sends to ${url?.origin ?? 'no URL'} for the bytes, announced was ${origin}`,
      );
    }
    try {
      const response = await this.#server.elsewhere(origin).request({
        ...request,
        path: url.pathname + url.search,
      });
      if (isSuccess(response.status)) return { response, etag };
      await response.discard();
    } catch {
      // Of this error nothing may be told: it names the URL, which lets whoever has it read.
      signal?.throwIfAborted();
    }
    this.#server.directFromMs = this.#clock.monotonic() + DIRECT_PAUSE_MS;
    return null;
  }

  /** A request with our two headers, whatever its answer. */
  async #request(request: HttpRequest): Promise<HttpResponse> {
    const response = await this.#server.http.request({
      ...request,
      headers: {
        ...request.headers,
        authorization: `Bearer ${this.#token()}`,
        'posemesh-client-id': this.#clientId,
      },
    });
    this.#server.directOrigin = response.header('millrace-direct-origin');
    this.#server.directParts = response.header('millrace-direct-parts') === '1';
    return response;
  }

  /** The same, for calls to which everything but a success is an error. */
  async #send(what: string, request: HttpRequest): Promise<HttpResponse> {
    const response = await this.#request(request);
    if (!isSuccess(response.status)) throw await failure(response, what);
    return response;
  }
}

function dataPath(domainId: string): string {
  return `/api/v1/domains/${encodeURIComponent(domainId)}/data`;
}

function uploadPath(domainId: string, uploadId: string): string {
  return `${dataPath(domainId)}/multipart?uploadId=${encodeURIComponent(uploadId)}`;
}

function isSuccess(status: number): boolean {
  return status >= 200 && status <= 299;
}

/** The error of an answer, in the reference's words followed by what the server said. */
async function failure(response: HttpResponse, what: string): Promise<MillraceError> {
  const body = await response.text(64 * 1024).catch(() => '');
  // Damaged bytes stay damaged, unlike what else a 500 may be.
  const code =
    response.header('millrace-error') === 'data_loss' ? 'data_loss' : codeOfStatus(response.status);
  return statusErrorOf(response.status, what, body, retryAfterMs(response.header('retry-after')), code);
}

function statusErrorOf(
  status: number,
  what: string,
  body: string,
  pauseMs: number | null = null,
  code: ErrorCode = codeOfStatus(status),
): MillraceError {
  const said = previewBody(body).trim();
  return new MillraceError(code, `${statusText(status)}${said === '' ? '' : `: ${said}`}`, {
    retryable: code === 'unavailable' || status === 429 || status === 507,
    details: { status, call: what, ...(pauseMs === null ? {} : { retry_after_ms: pauseMs }) },
  });
}

/** Posemesh protocol, section 4.10. */
function statusText(status: number): string {
  if (status === 400) return 'bad request (400)';
  if (status === 401) return 'unauthorized (401)';
  if (status === 404) return 'not found (404)';
  if (status === 409) return 'conflict (409)';
  if (status >= 500 && status <= 599) return `server error (${status})`;
  return `other storage error: unexpected status: ${status}`;
}

async function jsonOf(response: HttpResponse, what: string): Promise<unknown> {
  if (!isSuccess(response.status)) throw await failure(response, what);
  const text = await response.text(LIST_BYTES);
  return decoded(what, () => {
    const value = decode.parseJson(text, 'answer');
    // Written again it would be shorter if a member came twice. Looking for such is slow in a long list.
    if (JSON.stringify(value) === text) return value;
    // An item is at most the third level: the answer, its list, the item. Posemesh protocol, section 0.4.
    for (const { key, repeated } of decode.membersInText(text, 3)) {
      if (repeated && KNOWN_MEMBERS.has(key)) {
        throw new MillraceError('invalid_argument', `${key} must be given once, got it twice`);
      }
    }
    return value;
  });
}

const KNOWN_MEMBERS = new Set([...Object.keys(ITEM), 'data', 'upload', 'upload_id', 'part_size', 'etag']);

/** Answers that are not of the agreed form are the server's fault, not the caller's. */
function decoded<T>(what: string, read: () => T): T {
  try {
    return read();
  } catch (cause) {
    throw new MillraceError('data_loss', `${what}: ${MillraceError.from(cause).message}`, {
      cause,
      retryable: true,
    });
  }
}

function parseItem(value: unknown, what: string): DataItem {
  return decoded(what, () => decode.members(ITEM, value, 'item'));
}

function parseList(value: unknown, what: string): DataItem[] {
  return decoded(what, () =>
    decode
      .arrayOf((item, path) => decode.members(ITEM, item, path))(
        decode.object(value, 'answer')['data'],
        'data',
      )
      .slice(),
  );
}

function directPut(
  value: unknown,
  what: string,
): { readonly url: URL; readonly headers: Readonly<Record<string, string>> } {
  return decoded(what, () => {
    const [part] = decode.arrayOf(decode.object)(decode.object(value, 'answer')['parts'], 'parts');
    const text = decode.string(part?.['url'], 'parts[0].url');
    if (!URL.canParse(text)) throw new MillraceError('invalid_argument', 'parts[0].url must be a URL');
    const headers = Object.entries(decode.object(part?.['headers'], 'parts[0].headers'));
    return {
      url: new URL(text),
      headers: Object.fromEntries(
        headers.map(([name, header]) => [name, decode.string(header, `parts[0].headers.${name}`)]),
      ),
    };
  });
}

function parseInfo(value: unknown): StorageInfo {
  return decoded('info', () => {
    const root = decode.object(value, 'answer');
    const upload = decode.object(root['upload'], 'upload');
    const multipart = decode.object(upload['multipart'], 'upload.multipart');
    return {
      requestMaxBytes: decode.integer(upload['request_max_bytes'], 'upload.request_max_bytes'),
      domainDataMaxBytes: decode.optional(decode.integer)(
        upload['domain_data_max_bytes'],
        'upload.domain_data_max_bytes',
      ),
      multipartEnabled: decode.boolean(multipart['enabled'], 'upload.multipart.enabled'),
      uniqueNames: upload['unique_names'] === true,
      direct: decode.optional((value, path) => {
        const direct = decode.object(value, path);
        return {
          fromBytes: decode.counter(direct['from_bytes'], `${path}.from_bytes`),
          wholeBytes: decode.counter(direct['whole_bytes'], `${path}.whole_bytes`),
        };
      })(multipart['direct'], 'upload.multipart.direct'),
    };
  });
}

/**
 * The chunks of an answer, transport errors in our codes. No generator: leaving one that was never asked for a chunk
 * would run none of its code, and the connection would stay taken.
 */
function bodyOf(response: HttpResponse, what: string, signal: AbortSignal | undefined): ByteStream {
  return {
    [Symbol.asyncIterator]: () => {
      const chunks = (response.body as AsyncIterable<Buffer>)[Symbol.asyncIterator]();
      return {
        next: async () => {
          try {
            return await chunks.next();
          } catch (error) {
            throw transportError(error, what, signal);
          }
        },
        return: async () => {
          giveUp(response);
          return { done: true, value: undefined };
        },
      };
    },
  };
}

/** Leaves the rest of an answer unread. undici reports that as an error of the body, which nobody is there to hear. */
function giveUp(response: HttpResponse): void {
  response.body.once('error', () => {});
  response.body.destroy();
}

function partMeta(part: MultipartPart): Omit<DownloadPart, 'body'> {
  return {
    id: part.params.get('id') ?? '',
    name: part.params.get('name') ?? '',
    data_type: part.params.get('data-type') ?? '',
    domain_id: part.params.get('domain-id') ?? '',
    size: Number(part.params.get('size') ?? 0),
    digest: /^sha256:[0-9a-f]{64}$/.exec(part.params.get('digest') ?? '')?.[0] ?? null,
  };
}

/** Destroys a stream and waits until nothing of it is under way. */
async function destroyed(stream: Readable): Promise<void> {
  if (stream.closed) return;
  const closed = new Promise<void>((resolve) => void stream.once('close', resolve));
  stream.once('error', () => {}); // Reported by whoever reads it; here only that it is over matters.
  stream.destroy();
  await closed;
}

/** Values go into a header without escaping, so what could end it is refused. */
function checkParameter(what: string, value: string): void {
  // eslint-disable-next-line no-control-regex -- control characters are exactly what is refused
  if (value === '' || /[";\u0000-\u001f\u007f]/.test(value)) {
    throw new MillraceError(
      'invalid_argument',
      `${what} of an upload must not be empty nor contain ", ; or control characters, got ${JSON.stringify(value)}`,
    );
  }
}

/** Bytes of the body of a single upload of `size` bytes: what a server's `request_max_bytes` bounds. */
export function singleUploadBytes(target: UploadTarget, size: number): number {
  const { head, tail } = uploadEnvelope(target, '0'.repeat(2 * BOUNDARY_RANDOM_BYTES));
  return head.length + size + tail.length;
}

const BOUNDARY_RANDOM_BYTES = 15;

/** The reference's boundary is fixed and may occur in the payload; 120 random bits do not, and that is checked. */
function boundaryAbsentFrom(...payloads: readonly Uint8Array[]): string {
  for (;;) {
    const boundary = randomBytes(BOUNDARY_RANDOM_BYTES).toString('hex');
    const isIn = (bytes: Uint8Array): boolean =>
      Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).includes(boundary);
    if (!payloads.some(isIn)) return boundary;
  }
}

const LINE_END = Buffer.from('\r\n');

/** The chunks to their end, as one. */
async function wholeOf(pull: Pull): Promise<Uint8Array> {
  const chunks: Uint8Array[] = [];
  for (let chunk = await pull(); chunk !== null; chunk = await pull()) chunks.push(chunk);
  return chunks.length === 1 ? chunks[0]! : Buffer.concat(chunks);
}

/** A stream of bytes that are here. */
function readableOf(bytes: Uint8Array): Readable {
  const stream = new Readable({ read() {} });
  if (bytes.length > 0) stream.push(bytes);
  stream.push(null);
  return stream;
}

function digestOf(bytes: Uint8Array): string {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
}

const SLICE = 64 * 1024;

/**
 * Bytes on their way out, as many as were announced. What their own stream throws the transport reports as an error of the
 * network; here it is kept.
 */
class Sending {
  readonly body: Uint8Array | Readable;
  #broken: { readonly error: unknown } | null = null;

  constructor(bytes: Uint8Array | ByteStream, size: number, what: string) {
    this.body =
      bytes instanceof Uint8Array
        ? bytes
        : Readable.from(this.#checked(exactly(bytes, size, what)), { objectMode: false });
  }

  /** @throws whatever the caller's own stream threw */
  throwIfBroken(): void {
    if (this.#broken !== null) throw this.#broken.error;
  }

  async *#checked(source: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array> {
    try {
      yield* source;
    } catch (error) {
      this.#broken = { error };
      throw error;
    }
  }
}

/** In slices, so the socket's backpressure is felt and nothing large is copied whole. */
function* slices(...buffers: readonly Uint8Array[]): Generator<Uint8Array> {
  for (const bytes of buffers) {
    for (let at = 0; at < bytes.length; at += SLICE) yield bytes.subarray(at, at + SLICE);
  }
}

async function sha256Of(bytes: Uint8Array | ByteStream, size: number, what: string): Promise<string> {
  const hash = createHash('sha256');
  if (bytes instanceof Uint8Array) hash.update(bytes);
  else for await (const chunk of exactly(bytes, size, what)) hash.update(chunk);
  return hash.digest('hex');
}

async function* exactly(source: ByteStream, size: number, what: string): AsyncGenerator<Uint8Array> {
  let sent = 0;
  const wrong = (): MillraceError =>
    new MillraceError('invalid_argument', `${what}: ${size} bytes were announced, the stream gave ${sent}`);
  for await (const chunk of source) {
    sent += chunk.length;
    if (sent > size) throw wrong();
    yield chunk;
  }
  if (sent < size) throw wrong();
}
