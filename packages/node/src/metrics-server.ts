/** The node's own small HTTP server: `GET /metrics` for Prometheus, `GET /health` for whoever restarts it. Nothing else. */
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { MillraceError, describeError, type Logger } from '@millrace/runner';
import type { PrometheusMetrics } from './metrics.ts';

export interface MetricsServerOptions {
  /** Default 127.0.0.1: figures are not for everybody. */
  readonly host?: string;
  /** 0 picks a free one. */
  readonly port: number;
  readonly metrics: Pick<PrometheusMetrics, 'contentType' | 'exposition'>;
  /** What `/health` says beside `status: "ok"`, asked each time. */
  readonly health: () => { readonly state: string; readonly active: number };
  readonly log: Logger;
}

export interface MetricsServer extends AsyncDisposable {
  /** The origin it listens on. */
  readonly url: string;
  /** Ends its connections. Idempotent. */
  close(): Promise<void>;
}

/** A scraper that is slower than this is none. */
const REQUEST_TIMEOUT_MS = 10_000;

/**
 * Opens the listener; resolves when it accepts connections.
 *
 * @throws MillraceError `failed_precondition` when the address cannot be had
 */
export async function openMetricsServer(options: MetricsServerOptions): Promise<MetricsServer> {
  const { host = '127.0.0.1', port, log } = options;
  const server = createServer(
    {
      requestTimeout: REQUEST_TIMEOUT_MS,
      headersTimeout: REQUEST_TIMEOUT_MS,
      connectionsCheckingInterval: 1_000,
    },
    (request, response) => {
      answer(options, request, response).catch((error: unknown) => {
        log.error('metrics could not be answered', { error: describeError(error) });
        send(response, 500, 'the metrics could not be read\n');
      });
    },
  );
  try {
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject).listen(port, host, () => {
        server.off('error', reject);
        server.on('error', (error) => log.warn('metrics server', { error: error.message }));
        resolve();
      });
    });
  } catch (cause) {
    throw new MillraceError(
      'failed_precondition',
      `cannot listen for metrics on ${host}:${port}: ${(cause as Error).message}; choose another address`,
      { cause },
    );
  }
  const url = originOf(server);
  log.info('metrics are served', { url: `${url}/metrics` });
  let closed: Promise<void> | null = null;
  const close = (): Promise<void> => {
    closed ??= new Promise((resolve) => {
      server.close(() => resolve());
      server.closeAllConnections();
    });
    return closed;
  };
  return { url, close, [Symbol.asyncDispose]: close };
}

async function answer(
  { metrics, health }: MetricsServerOptions,
  request: IncomingMessage,
  response: ServerResponse,
): Promise<void> {
  const path = (request.url ?? '').split('?', 1)[0];
  // A body is nobody's business here.
  request.resume();
  if (path !== '/metrics' && path !== '/health') {
    return send(response, 404, 'there are /metrics and /health\n');
  }
  if (request.method !== 'GET') {
    response.setHeader('allow', 'GET');
    return send(response, 405, 'only GET is possible here\n');
  }
  if (path === '/health') {
    return send(response, 200, `${JSON.stringify({ status: 'ok', ...health() })}\n`, 'application/json');
  }
  send(response, 200, await metrics.exposition(), metrics.contentType);
}

function send(
  response: ServerResponse,
  status: number,
  text: string,
  type = 'text/plain; charset=utf-8',
): void {
  if (response.headersSent) response.destroy();
  else
    response.writeHead(status, { 'content-type': type, 'content-length': Buffer.byteLength(text) }).end(text);
}

function originOf(server: Server): string {
  const { address, family, port } = server.address() as AddressInfo;
  return family === 'IPv6' ? `http://[${address}]:${port}` : `http://${address}:${port}`;
}
