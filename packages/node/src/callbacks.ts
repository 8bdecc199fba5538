/**
 * The endpoints by which older services reach a node, instead of being asked by it: a registration that is made on their
 * side and brought here, and a health check. Nothing of ours needs them; a node that is to sit behind such a service
 * opens them on purpose.
 *
 * Nobody proves who they are here. What a stranger can do is to say that the node is registered, after which the node
 * logs in, is told that it is not, and registers itself; the address should be one that only the service can reach.
 * The secret that comes with a registration is of no use to this node, which logs in with its key: it is checked and
 * forgotten.
 */
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { MillraceError, type Clock, type Logger } from '@millrace/runner';
import { object, optional, parseJson, string } from '@millrace/runner/decode';

export interface CallbackAddress {
  /** Default 127.0.0.1. */
  readonly host?: string;
  /** 0 picks a free one. */
  readonly port: number;
}

export interface CallbackOptions extends CallbackAddress {
  /** The service has registered this node. False: the node has no use for that any more. */
  readonly onRegistered: () => boolean;
  readonly clock: Pick<Clock, 'now'>;
  readonly log: Logger;
}

export interface Callbacks extends AsyncDisposable {
  /** The origin it listens on. */
  readonly url: string;
  /** When a DDS last asked for the node's health, epoch milliseconds; null: never. */
  readonly lastHealthcheckMs: number | null;
  /** Ends its connections. Idempotent. */
  close(): Promise<void>;
}

/** Far more than a registration needs. */
const MAX_BODY_BYTES = 64 * 1024;
const MAX_SECRET_BYTES = 4096;
/** A caller that is slower than this is no service. */
const REQUEST_TIMEOUT_MS = 10_000;

/**
 * Opens the listener; resolves when it accepts connections.
 *
 * @throws MillraceError `failed_precondition` when the address cannot be had
 */
export async function openCallbacks(options: CallbackOptions): Promise<Callbacks> {
  const { host = '127.0.0.1', port, log } = options;
  const listener = new CallbackListener(options);
  try {
    await listener.listen(host, port);
  } catch (cause) {
    throw new MillraceError(
      'failed_precondition',
      `cannot listen for callbacks on ${host}:${port}: ${(cause as Error).message}; choose another address`,
      { cause },
    );
  }
  log.info('callbacks are taken', { url: listener.url });
  return listener;
}

class CallbackListener implements Callbacks {
  readonly #options: CallbackOptions;
  readonly #server: Server;
  #lastHealthcheckMs: number | null = null;
  #closed: Promise<void> | null = null;

  constructor(options: CallbackOptions) {
    this.#options = options;
    this.#server = createServer(
      {
        requestTimeout: REQUEST_TIMEOUT_MS,
        headersTimeout: REQUEST_TIMEOUT_MS,
        connectionsCheckingInterval: 1_000,
      },
      (request, response) => void this.#handle(request, response),
    );
  }

  get url(): string {
    const { address, family, port } = this.#server.address() as AddressInfo;
    return family === 'IPv6' ? `http://[${address}]:${port}` : `http://${address}:${port}`;
  }

  get lastHealthcheckMs(): number | null {
    return this.#lastHealthcheckMs;
  }

  listen(host: string, port: number): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#server.once('error', reject).listen(port, host, () => {
        this.#server.off('error', reject);
        // What goes wrong with a connection is over with it.
        this.#server.on('error', (error) => this.#options.log.warn('callbacks', { error: error.message }));
        resolve();
      });
    });
  }

  close(): Promise<void> {
    this.#closed ??= new Promise((resolve) => {
      this.#server.close(() => resolve());
      this.#server.closeAllConnections();
    });
    return this.#closed;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  async #handle(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const path = (request.url ?? '').split('?', 1)[0];
    if (path === '/health') {
      if (request.method !== 'GET') return notAllowed(response, 'GET');
      if (request.headers['user-agent']?.startsWith('DDS v')) {
        this.#lastHealthcheckMs = this.#options.clock.now();
      }
      response.writeHead(200).end();
      return;
    }
    if (path !== '/internal/v1/registrations') return answer(response, 404, 'route not found');
    if (request.method !== 'POST') return notAllowed(response, 'POST');
    const body = await bodyOf(request);
    if (body === null) return answer(response, 413, `the body must be at most ${MAX_BODY_BYTES} bytes`);
    // The caller is gone, and nobody is there to be answered.
    if (body === undefined) return;
    const refused = refusalOf(body);
    if (refused !== null) return answer(response, ...refused);
    if (!this.#options.onRegistered()) return answer(response, 409, 'the node is stopping');
    this.#options.log.info('registered by a callback of the service');
    answer(response, 200, '{"ok":true}', 'application/json');
  }
}

/** Why a registration is not taken, in the reference's order and words; null: it is. */
function refusalOf(body: string): readonly [status: number, text: string] | null {
  let registration: { readonly id: string; readonly secret: string };
  try {
    const raw = object(parseJson(body, 'body'), 'body');
    optional(string)(raw['organization_id'], 'organization_id');
    // The secret is in no error text: the decoder would quote what it is instead of a string.
    if (typeof raw['secret'] !== 'string')
      throw new MillraceError('invalid_argument', 'secret must be a string');
    registration = { id: string(raw['id'], 'id'), secret: raw['secret'] };
  } catch (error) {
    return [422, MillraceError.from(error).message];
  }
  if (registration.id.trim() === '') return [422, 'missing id'];
  if (registration.secret.trim() === '') return [422, 'missing secret'];
  return Buffer.byteLength(registration.secret) > MAX_SECRET_BYTES ? [403, 'secret too large'] : null;
}

/** Null: it is too long; its rest is read away so that the caller sees why. Undefined: it broke off. */
async function bodyOf(request: IncomingMessage): Promise<string | null | undefined> {
  const chunks: Buffer[] = [];
  let size = 0;
  try {
    // The connection must outlive a body that is too long: the answer goes over it.
    for await (const chunk of request.iterator({ destroyOnReturn: false }) as AsyncIterable<Buffer>) {
      size += chunk.length;
      if (size > MAX_BODY_BYTES) {
        request.resume();
        return null;
      }
      chunks.push(chunk);
    }
  } catch {
    return undefined;
  }
  return Buffer.concat(chunks).toString('utf8');
}

function notAllowed(response: ServerResponse, method: string): void {
  response.setHeader('allow', method);
  answer(response, 405, `${method} is possible here`);
}

function answer(
  response: ServerResponse,
  status: number,
  text: string,
  type = 'text/plain; charset=utf-8',
): void {
  response.writeHead(status, { 'content-type': type }).end(text);
}
