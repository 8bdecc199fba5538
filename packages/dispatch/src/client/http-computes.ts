/** {@link Computes} over HTTP. See there for what each call promises. */
import { Readable } from 'node:stream';
import { MillraceError } from '@millrace/runner';
import { arrayOf, counter, members, object, optional, string, type Decoder } from '@millrace/runner/decode';
import type { ComputeRecord } from '../records.ts';
import type { ComputeName, ComputeStat, Computes, ComputesOptions, ComputesPage } from './computes.ts';
import type { CallOptions, TokenSource } from './dms.ts';
import { HttpOrigin, dispatcherError, type HttpRequest, type HttpResponse } from './http.ts';

const COMPUTE: { readonly [K in keyof ComputeRecord]: Decoder<ComputeRecord[K]> } = {
  ref: string,
  alg: (value, path) => {
    if (value === 'sha256') return value;
    throw new MillraceError('data_loss', `${path} must be sha256, got ${JSON.stringify(value)}`);
  },
  digest: string,
  engine: string,
  bytes: counter,
  created_at: string,
};

const compute: Decoder<ComputeRecord> = (value, path) => members<ComputeRecord>(COMPUTE, value, path);

/**
 * Opens a client, with connections of its own. Close it.
 *
 * @throws MillraceError `invalid_argument` for a base URL that is not http(s).
 */
export function openComputes(options: ComputesOptions): Computes & AsyncDisposable {
  const { tokens, ...rest } = options;
  const origin = new HttpOrigin(rest);
  return Object.assign(computesOver(origin, '', tokens), {
    [Symbol.asyncDispose]: () => origin.close(),
  });
}

/** The same over connections of somebody else's. `prefix` stands before `/computes`. */
export function computesOver(origin: HttpOrigin, prefix: string, tokens: TokenSource): Computes {
  return new HttpComputes(origin, prefix, tokens);
}

class HttpComputes implements Computes {
  readonly #origin: HttpOrigin;
  readonly #prefix: string;
  readonly #tokens: TokenSource;

  constructor(origin: HttpOrigin, prefix: string, tokens: TokenSource) {
    this.#origin = origin;
    this.#prefix = prefix;
    this.#tokens = tokens;
  }

  async stat(name: ComputeName, options: CallOptions = {}): Promise<ComputeStat | null> {
    const call = { method: 'HEAD', path: this.#path(name) } as const;
    const response = await this.#send(call, options);
    await response.discard();
    if (response.status === 404) return null;
    await requireSuccess(call, response);
    return statOf(call, response);
  }

  async open(
    name: ComputeName,
    options: CallOptions = {},
  ): Promise<(ComputeStat & { readonly body: Readable }) | null> {
    const call = { method: 'GET', path: this.#path(name) } as const;
    const response = await this.#send(call, options);
    if (response.status === 404) {
      await response.discard();
      return null;
    }
    await requireSuccess(call, response);
    try {
      return { ...statOf(call, response), body: response.body };
    } catch (error) {
      response.body.destroy();
      throw error;
    }
  }

  async put(
    name: ComputeName,
    engine: string,
    bytes: Uint8Array | AsyncIterable<Uint8Array>,
    options: CallOptions = {},
  ): Promise<ComputeRecord> {
    const whole = bytes instanceof Uint8Array;
    const answer = await this.#json(
      {
        method: 'PUT',
        path: `${this.#path(name)}?engine=${encodeURIComponent(engine)}`,
        headers: { 'content-type': 'application/octet-stream' },
        body: whole ? bytes : Readable.from(bytes, { objectMode: false }),
      },
      options,
    );
    return compute(answer, 'answer');
  }

  async list(
    query: { readonly limit?: number; readonly cursor?: string } = {},
    options: CallOptions = {},
  ): Promise<ComputesPage> {
    const search = new URLSearchParams();
    if (query.limit !== undefined) search.set('limit', String(query.limit));
    if (query.cursor !== undefined) search.set('cursor', query.cursor);
    const text = search.toString();
    const path = `${this.#prefix}/computes${text === '' ? '' : `?${text}`}`;
    const answer = object(await this.#json({ method: 'GET', path }, options), 'answer');
    return {
      items: arrayOf(compute)(answer['items'], 'items'),
      next_cursor: optional(string)(answer['next_cursor'], 'next_cursor'),
    };
  }

  async delete(name: ComputeName, options: CallOptions = {}): Promise<boolean> {
    const call = { method: 'DELETE', path: this.#path(name) } as const;
    const response = await this.#send(call, options);
    if (response.status !== 404) await requireSuccess(call, response);
    await response.discard();
    return response.status !== 404;
  }

  #path({ alg, digest }: ComputeName): string {
    return `${this.#prefix}/computes/${encodeURIComponent(alg)}/${encodeURIComponent(digest)}`;
  }

  async #json(call: HttpRequest, options: CallOptions): Promise<unknown> {
    const response = await this.#send(call, options);
    await requireSuccess(call, response);
    return await response.json();
  }

  /** A 401 is answered once by a fresh token, unless a stream was sent, which is used up. */
  async #send(call: HttpRequest, options: CallOptions): Promise<HttpResponse> {
    const { signal } = options;
    const send = async (token: string): Promise<HttpResponse> =>
      await this.#origin.request({
        ...call,
        headers: { ...call.headers, authorization: `Bearer ${token}` },
        ...(signal === undefined ? {} : { signal }),
      });
    const token = await this.#tokens.get(options);
    const response = await send(token);
    if (response.status !== 401 || call.body instanceof Readable) return response;
    this.#tokens.invalidate(token);
    const fresh = await this.#tokens.get(options);
    if (fresh === token) return response;
    await response.discard();
    return await send(fresh);
  }
}

function statOf({ method, path }: HttpRequest, response: HttpResponse): ComputeStat {
  const engine = response.header('millrace-compute-engine');
  const length = response.header('content-length');
  if (engine === null || length === null || !/^\d{1,15}$/.test(length)) {
    // Something that answers every path, but no dispatcher.
    throw new MillraceError(
      'data_loss',
      `${method} ${path}: the answer (status ${response.status}) is no compute: it has no millrace-compute-engine or no length`,
    );
  }
  return { engine, bytes: Number(length) };
}

async function requireSuccess(call: HttpRequest, response: HttpResponse): Promise<void> {
  if (response.status < 200 || response.status > 299) throw await dispatcherError(call, response);
}
