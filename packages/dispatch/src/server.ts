/**
 * Wires a store, a blob store, keys and routes into one HTTP server for DDS, DMS, jobs and domain storage.
 *
 * The order of a request: URL cleaned, body read within its limits and time, JSON parsed and its depth checked, schema
 * checked, identity checked, then the store. Nothing has changed when any of these refuses.
 */
import { isUtf8 } from 'node:buffer';
import { randomUUID } from 'node:crypto';
import { setMaxListeners } from 'node:events';
import { readFileSync } from 'node:fs';
import type { AddressInfo, Server, Socket } from 'node:net';
import {
  MillraceError,
  NO_TRACES,
  systemClock,
  type Clock,
  type JsonObject,
  type Logger,
} from '@millrace/runner';
import { fastify, type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify';
import { BearerAuth } from './auth.ts';
import { BodyWatch } from './body-watch.ts';
import type { Dispatcher, DispatcherLimits, DispatcherOptions } from './dispatcher.ts';
import { errorBody, jsonErrorHandler } from './errors-http.ts';
import { openMetrics, type Metrics } from './metrics.ts';
import { SERVER_CLOSING, type ServerContext } from './routes/context.ts';
import { registerComputeRoutes } from './routes/computes.ts';
import { registerDdsRoutes } from './routes/dds.ts';
import { registerDmsRoutes } from './routes/dms.ts';
import { registerDomainRoutes } from './routes/domain.ts';
import { registerDomainsRoutes } from './routes/domains.ts';
import { registerJobRoutes } from './routes/jobs.ts';
import { registerNodeRoutes } from './routes/nodes.ts';
import { registerScheduleRoutes } from './routes/schedules.ts';
import { registerServiceRoutes } from './routes/service.ts';
import { registerTaskRoutes } from './routes/tasks.ts';
import { Scheduler } from './scheduler.ts';
import { Signals } from './signals.ts';
import { Pruner } from './pruner.ts';
import { Collector, Sweeper } from './sweeper.ts';
import { openTokens } from './tokens.ts';

export const DEFAULT_LIMITS: DispatcherLimits = {
  jsonBodyBytes: 2 * 1024 * 1024,
  jobBodyBytes: 16 * 1024 * 1024,
  jsonDepth: 32,
  dataBytes: 64 * 1024 ** 3,
  uploadRequestBytes: 100 * 1024 * 1024,
  partBytes: 8 * 1024 * 1024,
  computeBytes: 32 * 1024 * 1024,
  tasksPerJob: 10_000,
  batchItems: 256,
  longPollSecs: 60,
  progressBytes: 64 * 1024,
  taskLogBytes: 16 * 1024 * 1024,
  eventsPerHeartbeat: 1024,
  slowClientMs: 30_000,
  loginBurst: 1_000,
};

const CLIENT_TOKEN_SECS = 30 * 24 * 3600;

/** A node token lists up to 256 capabilities of up to 256 bytes, in Base64. */
const MAX_HEADER_BYTES = 128 * 1024;

/**
 * Connections that wait to be accepted. Node's own 511 is less than a thousand nodes that come back at once, and those beyond it
 * wait a second for their next try; the kernel cuts it to what it allows (`net.core.somaxconn`).
 */
const BACKLOG = 4_096;

/** Files that connections leave to the database, to blobs under way and to libraries. */
const RESERVED_FILES = 256;

/** How long closing waits for requests under way before it ends their connections. */
const CLOSE_GRACE_MS = 10_000;

/**
 * Starts a dispatcher. Resolves when it accepts connections. What expired while it was down is taken back five seconds later, so
 * that nodes whose heartbeats found nobody are heard first.
 *
 * @throws MillraceError `invalid_argument` for options that cannot be, `failed_precondition` when the address is taken
 */
export async function openDispatcher(options: DispatcherOptions): Promise<Dispatcher> {
  const { store, blobs, host = '127.0.0.1', port = 7070 } = options;
  const clock = options.clock ?? systemClock;
  const log = options.log ?? silentLogger;
  const limits = { ...DEFAULT_LIMITS, ...options.limits };
  const publicUrl = options.publicUrl === undefined ? null : checkedPublicUrl(options.publicUrl);

  const tokens = await openTokens(store, clock);
  const defaultDomainId = await keptId(options, 'default_domain');
  const organizationId = await keptId(options, 'organization');

  const closing = new AbortController();
  // Every request that waits listens to it.
  setMaxListeners(0, closing.signal);
  const signals = new Signals(store);
  const metrics = openMetrics(store, clock, options.moreMetrics);
  const bodies = new BodyWatch(clock, limits.slowClientMs);
  const sweeper = new Sweeper({
    store,
    clock,
    log,
    onSwept: ({ rescued }) => metrics.ended('expired', rescued),
    hasLeases: async () => {
      const { tasks } = await store.stats();
      return tasks.leased + tasks.running > 0;
    },
  });
  const collector = new Collector({ store, blobs, clock, log });
  const scheduler = new Scheduler({ store, clock, log, onTick: (outcome) => metrics.ticked(outcome) });
  const pruner =
    options.retention === undefined
      ? null
      : new Pruner({
          store,
          clock,
          log,
          retention: options.retention,
          onPruned: ({ jobs, items }) => metrics.pruned(jobs, items),
        });
  let url = '';

  const context: ServerContext = {
    store,
    blobs,
    limits,
    clock,
    random: options.random ?? Math.random,
    log,
    auth: new BearerAuth(tokens, store, clock),
    tokens,
    metrics,
    tracer: options.tracer ?? NO_TRACES,
    signals,
    defaultDomainId,
    organizationId,
    publicUrl: () => publicUrl ?? url,
    closing: closing.signal,
  };

  const app = createApp(context, bodies);
  const maxConnections = boundConnections(app.server, clock, log);
  const disposeParts = async (): Promise<void> => {
    await Promise.all([sweeper.close(), collector.close(), scheduler.close(), pruner?.close()]);
    signals[Symbol.dispose]();
    bodies[Symbol.dispose]();
    metrics[Symbol.dispose]();
  };
  try {
    await sweeper.start();
    await app.listen({ host, port, backlog: BACKLOG });
  } catch (error) {
    closing.abort(SERVER_CLOSING);
    await app.close();
    await disposeParts();
    throw listenError(error, host, port);
  }
  await collector.start();
  await pruner?.start();
  url = originOf(app.server.address() as AddressInfo);
  await scheduler.start();
  log.info('dispatcher listens', {
    url,
    public_url: context.publicUrl(),
    ...(maxConnections !== null && { max_connections: maxConnections }),
  });
  if (publicUrl === null && isWildcard(host)) {
    log.warn('leases name an address that only this machine can reach; give a public URL', { url });
  }

  let closed: Promise<void> | null = null;
  const close = (): Promise<void> => {
    closed ??= (async () => {
      log.info('dispatcher closes');
      closing.abort(SERVER_CLOSING);
      const force = clock.setTimer(() => app.server.closeAllConnections(), CLOSE_GRACE_MS);
      try {
        await app.close();
      } finally {
        force.cancel();
        await disposeParts();
      }
    })();
    return closed;
  };

  return {
    url,
    defaultDomainId,
    issueClientToken: ({
      domainId,
      ttlSecs = CLIENT_TOKEN_SECS,
      readOnly = false,
      subject = 'client',
    } = {}) =>
      Promise.resolve(
        tokens.issueClient({ domainId: domainId ?? null, subject, canWrite: !readOnly }, ttlSecs).token,
      ),
    close,
    [Symbol.asyncDispose]: close,
  };
}

/**
 * Refuses connections while there are still files left for everything else: without any, the database and the blobs would fail,
 * and connections be dropped without a word. Says so, at most once a minute. Null: the system does not tell its limit.
 */
function boundConnections(server: Server, clock: Clock, log: Logger): number | null {
  const maxFiles = maxOpenFiles();
  if (maxFiles === null) return null;
  const maxConnections = Math.max(Math.ceil(maxFiles / 2), maxFiles - RESERVED_FILES);
  server.maxConnections = maxConnections;
  let quietUntil = -Infinity;
  let refused = 0;
  server.on('drop', () => {
    refused += 1;
    if (clock.monotonic() < quietUntil) return;
    quietUntil = clock.monotonic() + 60_000;
    log.error(
      'connections are refused: as many are open as the limit on open files allows; a node needs two; raise it ' +
        '(ulimit -n, LimitNOFILE= of a systemd unit, ulimits of a container)',
      { max_connections: maxConnections, max_open_files: maxFiles, refused },
    );
    refused = 0;
  });
  return maxConnections;
}

/** What this process may have open; Node has raised it to the hard limit. */
function maxOpenFiles(): number | null {
  try {
    const limits = readFileSync('/proc/self/limits', 'latin1');
    const [, soft] = /^Max open files\s+(\d+)/m.exec(limits) ?? [];
    return soft === undefined ? null : Number(soft);
  } catch {
    return null;
  }
}

function createApp(context: ServerContext, bodies: BodyWatch): FastifyInstance {
  const { limits, log, metrics } = context;
  const app = fastify({
    logger: false,
    bodyLimit: limits.jsonBodyBytes,
    // HEAD would otherwise run the handler of GET, and GET /v1/tasks takes a lease.
    exposeHeadRoutes: false,
    routerOptions: { ignoreDuplicateSlashes: true, ignoreTrailingSlash: true },
    // The whole request's time is not bound here: an upload may take hours. See body-watch.ts.
    requestTimeout: 0,
    http: {
      headersTimeout: limits.slowClientMs,
      connectionsCheckingInterval: Math.max(50, Math.min(5_000, limits.slowClientMs / 4)),
      maxHeaderSize: MAX_HEADER_BYTES,
    },
    ajv: { customOptions: { coerceTypes: false, removeAdditional: false, useDefaults: false } },
    clientErrorHandler: answerClientError,
    // A path that cannot be decoded reaches no route and so no error handler.
    frameworkErrors: (error, request, reply) => jsonErrorHandler(log)(error, request, reply),
  });
  app.removeAllContentTypeParsers();
  app.addContentTypeParser('application/json', { parseAs: 'buffer' }, (_request, bytes, done) => {
    try {
      done(null, parseBody(bytes as Buffer, limits.jsonDepth));
    } catch (error) {
      done(error as Error);
    }
  });
  app.addHook('onRequest', (request, reply, done) => {
    bodies.watch(request.raw, reply.raw);
    metrics.requestStarted();
    // Not onResponse, which does not come for a client that went away.
    reply.raw.once('close', () => metrics.requestEnded());
    done();
  });
  app.addHook('onResponse', (request, reply, done) => {
    metrics.request(
      request.method,
      request.routeOptions.url ?? 'unknown',
      reply.statusCode,
      reply.elapsedTime / 1000,
    );
    countData(metrics, request, reply);
    done();
  });
  app.setErrorHandler(jsonErrorHandler(log));
  const routes = new RouteTable();
  app.addHook('onRoute', ({ url, method }) => routes.add(url, [method].flat()));
  app.setNotFoundHandler((request, reply) => {
    const path = pathOf(request);
    const allowed = routes.methodsFor(path);
    const [status, code, message] =
      allowed.length > 0
        ? ([
            405,
            'unimplemented',
            `${request.method} is not possible here; ${allowed.join(', ')} is`,
          ] as const)
        : ([404, 'not_found', `there is no route ${request.method} ${path.slice(0, 200)}`] as const);
    if (status === 405) void reply.header('allow', allowed.join(', '));
    void reply.code(status);
    // A domain server says so in plain text, and of a path it does not know in these words.
    if (path.startsWith('/api/v1/')) {
      void reply.type('text/plain; charset=utf-8').send(status === 404 ? 'route not found' : message);
    } else void reply.send({ error: { code, message } });
  });
  // Each in a scope of its own, so that content type parsers of one do not reach another.
  for (const register of [
    registerServiceRoutes,
    registerDdsRoutes,
    registerNodeRoutes,
    registerDomainsRoutes,
    registerDmsRoutes,
    registerJobRoutes,
    registerTaskRoutes,
    registerScheduleRoutes,
    registerComputeRoutes,
    registerDomainRoutes,
  ]) {
    app.register((scope, _options, done) => {
      register(scope, context);
      done();
    });
  }
  return app;
}

/** By the lengths announced, which our clients always do. */
function countData(metrics: Metrics, request: FastifyRequest, reply: FastifyReply): void {
  if (reply.statusCode >= 300 || !request.routeOptions.url?.startsWith('/api/v1/domains/')) return;
  // What is about items, and not their bytes, is JSON in both directions.
  const isData = (type: unknown): boolean =>
    !(typeof type === 'string' && type.startsWith('application/json'));
  if (request.method !== 'GET') {
    const { 'content-type': type, 'content-length': length = 0 } = request.headers;
    if (isData(type)) metrics.dataBytes('in', Number(length));
  } else if (isData(reply.getHeader('content-type'))) {
    metrics.dataBytes('out', Number(reply.getHeader('content-length') ?? 0));
  }
}

/** JSON within a depth, and without the one key that reaches an object's prototype. An empty text is no body. */
function parseBody(bytes: Buffer, maxDepth: number): unknown {
  if (bytes.length === 0) return undefined;
  // Decoding would replace what is not UTF-8, and something else than was sent would be stored.
  if (!isUtf8(bytes)) {
    throw new MillraceError('invalid_argument', `the body is not valid UTF-8 (${bytes.length} bytes)`);
  }
  const text = bytes.toString('utf8');
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new MillraceError('invalid_argument', `the body is not valid JSON (${text.length} characters)`, {
      cause,
    });
  }
  checkTree(value, maxDepth, maxDepth);
  return value;
}

// The parser itself is not recursive, so any depth within the body limit is safe to parse; this walk stops at the limit.
function checkTree(value: unknown, left: number, maxDepth: number): void {
  if (typeof value !== 'object' || value === null) return;
  if (left === 0) {
    throw new MillraceError(
      'resource_exhausted',
      `the body is nested deeper than the limit jsonDepth, which is ${maxDepth}`,
      { details: { limit: 'jsonDepth', value: maxDepth } },
    );
  }
  if (Array.isArray(value)) {
    for (const item of value) checkTree(item, left - 1, maxDepth);
    return;
  }
  // All members are the object's own: JSON.parse made it. Unlike Object.keys this makes no list.
  for (const key in value) {
    if (key === '__proto__') {
      throw new MillraceError('invalid_argument', 'the body has a member "__proto__", which is not allowed');
    }
    checkTree((value as Record<string, unknown>)[key], left - 1, maxDepth);
  }
}

/** Which methods a path has, for the 405 that the router does not give. */
class RouteTable {
  readonly #routes = new Map<string, { readonly pattern: RegExp; readonly methods: Set<string> }>();

  add(url: string, methods: readonly string[]): void {
    const route = this.#routes.get(url) ?? { pattern: pathPattern(url), methods: new Set<string>() };
    for (const method of methods) route.methods.add(method);
    this.#routes.set(url, route);
  }

  methodsFor(path: string): string[] {
    const methods = new Set<string>();
    for (const route of this.#routes.values()) {
      if (route.pattern.test(path)) for (const method of route.methods) methods.add(method);
    }
    return [...methods].toSorted();
  }
}

function pathPattern(url: string): RegExp {
  const source = url
    .split('/')
    .map((part) => {
      if (part.startsWith(':')) return '[^/]+';
      return part === '*' ? '.*' : part.replaceAll(/[.*+?^${}()|[\]\\]/g, String.raw`\$&`);
    })
    .join('/');
  return new RegExp(`^${source}/?$`);
}

function pathOf(request: FastifyRequest): string {
  return (request.url.split('?', 1)[0] ?? '').replaceAll(/\/{2,}/g, '/');
}

/** Bytes that are no HTTP request, or headers that did not come in time. */
function answerClientError(error: Error & { code?: string }, socket: Socket): void {
  if (error.code === 'ECONNRESET' || socket.destroyed) {
    socket.destroy();
    return;
  }
  const [status, failure]: [string, MillraceError] =
    error.code === 'ERR_HTTP_REQUEST_TIMEOUT'
      ? ['408 Request Timeout', new MillraceError('deadline_exceeded', 'the headers did not come in time')]
      : error.code === 'HPE_HEADER_OVERFLOW'
        ? [
            '431 Request Header Fields Too Large',
            new MillraceError('resource_exhausted', `the headers are larger than ${MAX_HEADER_BYTES} bytes`),
          ]
        : ['400 Bad Request', new MillraceError('invalid_argument', 'this is not an HTTP request')];
  const body = JSON.stringify({ error: errorBody(failure) });
  if (socket.writable) {
    socket.write(
      `HTTP/1.1 ${status}\r\nConnection: close\r\nContent-Type: application/json; charset=utf-8\r\n` +
        `Content-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`,
    );
  }
  socket.destroySoon();
}

/** An id made once and kept in the store. */
async function keptId({ store }: DispatcherOptions, name: string): Promise<string> {
  const value: JsonObject = await store.setting(name, () => ({ id: randomUUID() }));
  return value['id'] as string;
}

function checkedPublicUrl(value: string): string {
  if (!URL.canParse(value) || !/^https?:$/.test(new URL(value).protocol)) {
    throw new MillraceError(
      'invalid_argument',
      `publicUrl must be http:// or https://, got ${JSON.stringify(value)}`,
    );
  }
  return value.replace(/\/+$/, '');
}

function isWildcard(address: string): boolean {
  return address === '0.0.0.0' || address === '::';
}

function originOf({ address, family, port }: AddressInfo): string {
  // "Every address" is no address; from this machine the loopback is.
  if (isWildcard(address)) return `http://127.0.0.1:${port}`;
  return family === 'IPv6' ? `http://[${address}]:${port}` : `http://${address}:${port}`;
}

function listenError(error: unknown, host: string, port: number): unknown {
  const { code } = error as NodeJS.ErrnoException;
  const why =
    code === 'EADDRINUSE'
      ? 'it is in use; stop the other program or choose another port (0 picks a free one)'
      : code === 'EADDRNOTAVAIL' || code === 'ENOTFOUND'
        ? 'this machine has no such address'
        : code === 'EACCES'
          ? 'this user may not; choose a port above 1023'
          : null;
  if (why === null) return error;
  return new MillraceError('failed_precondition', `cannot listen on ${host}:${port}: ${why}`, {
    cause: error,
  });
}

const silentLogger: Logger = {
  debug() {},
  info() {},
  warn() {},
  error() {},
  child: () => silentLogger,
};
