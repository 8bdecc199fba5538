/**
 * DDS over HTTP. Every call has a total time limit, reads a bounded answer and tells in `details.call` which it was.
 * What the service answers is decoded strictly; what was sent to it (the credentials, the signature) appears in no
 * error, not even when the service quotes it back.
 */
import { MillraceError, systemClock, timeoutSignal } from '@millrace/runner';
import {
  type Decoder,
  checkSpelling,
  integer,
  members,
  optional,
  parseJson,
  string,
  timestamp,
  timestampMs,
} from '@millrace/runner/decode';
import type { Dds, NodeToken, RegisterWalletRequest, SiweChallenge } from './dds.ts';
import type { CallOptions } from './dms.ts';
import { HttpOrigin, dateOf, statusError, type HttpResponse } from './http.ts';
import type { ProxySettings } from './proxy.ts';

export interface HttpDdsOptions {
  /** `http(s)://host[:port]`, a path prefix allowed; trailing slashes are removed. */
  readonly baseUrl: string;
  /** Limit of one call from connecting to the last byte of the answer. Default 60,000 ms. */
  readonly timeoutMs?: number;
  /** Default none, like the reference node. */
  readonly userAgent?: string;
  /** Default none. */
  readonly proxy?: ProxySettings;
}

type Call = 'nonce' | 'register' | 'verify';

const PATHS: { readonly [C in Call]: string } = {
  nonce: '/internal/v1/auth/siwe/request',
  register: '/internal/v1/nodes/register-wallet',
  verify: '/internal/v1/auth/siwe/verify',
};

/** Far more than any of these answers needs. */
const MAX_ANSWER_BYTES = 64 * 1024;

/**
 * Opens the client; nothing is sent before the first call. Calls may be concurrent. Disposing ends those under way.
 *
 * @throws MillraceError `invalid_argument` for a base URL that is not http(s)
 */
export function openHttpDds(options: HttpDdsOptions): Dds & AsyncDisposable {
  return new HttpDds(options);
}

class HttpDds implements Dds, AsyncDisposable {
  readonly #origin: HttpOrigin;
  readonly #timeoutMs: number;

  constructor(options: HttpDdsOptions) {
    this.#timeoutMs = options.timeoutMs ?? 60_000;
    this.#origin = new HttpOrigin({
      baseUrl: options.baseUrl,
      timeoutMs: this.#timeoutMs,
      connections: 4,
      ...(options.userAgent === undefined ? {} : { userAgent: options.userAgent }),
      ...(options.proxy === undefined ? {} : { proxy: options.proxy }),
    });
  }

  requestNonce(wallet: string, options?: CallOptions): Promise<SiweChallenge> {
    return this.#post('nonce', { wallet }, [], (answer) => decoded(answer, decodeChallenge), options);
  }

  registerWallet(request: RegisterWalletRequest, options?: CallOptions): Promise<void> {
    return this.#post(
      'register',
      request,
      [request.registration_credentials, request.signature],
      // Any 2xx is success. The body is read only to give the connection back; that it is cut undoes nothing.
      async (answer) => void (await answer.text(MAX_ANSWER_BYTES).catch(() => '')),
      options,
    );
  }

  verify(
    request: { readonly address: string; readonly message: string; readonly signature: string },
    options?: CallOptions,
  ): Promise<NodeToken> {
    return this.#post(
      'verify',
      request,
      [request.signature],
      async (answer) => ({
        ...(await decoded(answer, decodeToken)),
        serverTimeMs: dateOf(answer),
      }),
      options,
    );
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#origin.close();
  }

  async #post<T>(
    call: Call,
    body: object,
    secrets: readonly string[],
    read: (answer: HttpResponse) => Promise<T>,
    options: CallOptions = {},
  ): Promise<T> {
    const what = `DDS POST ${PATHS[call]}`;
    using timeout = timeoutSignal(
      systemClock,
      this.#timeoutMs,
      () => new MillraceError('unavailable', `${what} took longer than ${this.#timeoutMs} ms`),
    );
    const signal =
      options.signal === undefined ? timeout.signal : AbortSignal.any([options.signal, timeout.signal]);
    try {
      const answer = await this.#origin.request({
        method: 'POST',
        path: PATHS[call],
        json: body,
        signal,
      });
      if (answer.status < 200 || answer.status > 299) {
        throw await statusError(what, answer, (text) => scrub(text, secrets));
      }
      return await read(answer);
    } catch (error) {
      if (!MillraceError.is(error) || error === options.signal?.reason) throw error;
      throw new MillraceError(error.code, error.message, {
        cause: error.cause,
        retryable: error.retryable,
        details: { ...error.details, call },
      });
    }
  }
}

function scrub(text: string, secrets: readonly string[]): string {
  return secrets.reduce(
    (rest, secret) => (secret === '' ? rest : rest.replaceAll(secret, '<redacted>')),
    text,
  );
}

/** The answer's body through `decode`. What is wrong with it is `data_loss`, and worth trying again. */
async function decoded<T>(answer: HttpResponse, decode: (text: string) => T): Promise<T> {
  const text = await answer.text(MAX_ANSWER_BYTES);
  try {
    return decode(text);
  } catch (error) {
    throw new MillraceError('data_loss', MillraceError.from(error).message, {
      retryable: true,
      details: { status: answer.status },
    });
  }
}

/** One line of the message to be signed. A value with a line break could add lines of its own to it. */
const line: Decoder<string> = (value, path) => {
  const text = string(value, path);
  if (!/[\r\n]/.test(text)) return text;
  throw new MillraceError('invalid_argument', `${path} must be a single line`);
};

const nonce: Decoder<string> = (value, path) => {
  const text = line(value, path);
  if (text !== '') return text;
  throw new MillraceError('invalid_argument', `${path} must not be empty`);
};

const CHALLENGE = { nonce, domain: line, uri: line, version: line, chainId: integer, issuedAt: line };

function decodeChallenge(text: string): SiweChallenge {
  const value = parseJson(text, 'DDS nonce answer');
  checkSpelling(CHALLENGE, text, 'DDS nonce answer');
  return members<SiweChallenge>(CHALLENGE, value, 'DDS nonce answer');
}

/** Sent in a header later on. The value is a secret and never quoted. */
const accessToken: Decoder<string> = (value, path) => {
  if (typeof value === 'string' && /^[\x21-\x7e]+$/.test(value)) return value;
  throw new MillraceError(
    'invalid_argument',
    `${path} must be a non-empty string of printable ASCII without blanks`,
  );
};

const LOGIN = {
  access_token: accessToken,
  access_expires_at: optional(timestamp),
  expires_at: optional(timestamp),
};

function decodeToken(text: string): NodeToken {
  const value = parseJson(text, 'DDS login answer');
  // The decoder would quote what is no object, and that may be the bare token.
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new MillraceError('invalid_argument', 'DDS login answer must be a JSON object');
  }
  checkSpelling(LOGIN, text, 'DDS login answer');
  const answer = members<{
    access_token: string;
    access_expires_at: string | null;
    expires_at: string | null;
  }>(LOGIN, value, 'DDS login answer');
  const expiresAt = answer.access_expires_at ?? answer.expires_at;
  if (expiresAt === null) {
    throw new MillraceError('invalid_argument', 'DDS login answer must have access_expires_at or expires_at');
  }
  return { accessToken: answer.access_token, expiresAtMs: timestampMs(expiresAt) };
}
