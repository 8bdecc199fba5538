/**
 * What every route module is given, and the few things they all do to a request. Routes are registered as
 * `register…Routes(app, context)`, each in its own fastify scope, so content type parsers added in one do not reach
 * another. They throw MillraceErrors; the server's error handler answers them (`errors-http.ts`).
 */
import { MillraceError, type Clock, type Logger, type Random, type Tracer } from '@millrace/runner';
import { uuid } from '@millrace/runner/decode';
import type { FastifyReply, FastifyRequest } from 'fastify';
import type { Auth } from '../auth.ts';
import type { BlobStore } from '../blobs.ts';
import type { DispatcherLimits } from '../dispatcher.ts';
import type { Metrics } from '../metrics.ts';
import type { Signals } from '../signals.ts';
import type { Store } from '../store.ts';
import type { Tokens } from '../tokens.ts';

export interface ServerContext {
  readonly store: Store;
  readonly blobs: BlobStore;
  readonly limits: DispatcherLimits;
  readonly clock: Clock;
  readonly random: Random;
  readonly log: Logger;
  readonly auth: Auth;
  readonly tokens: Tokens;
  readonly metrics: Metrics;
  readonly tracer: Tracer;
  /** What the store's changes wake: long polls, watches, event streams. */
  readonly signals: Signals;
  /** The domain of jobs that name none. */
  readonly defaultDomainId: string;
  /** The organization of every node and job of this dispatcher. */
  readonly organizationId: string;
  /** The origin others reach this server by, without a trailing slash: the leases' `domain_server_url`. */
  publicUrl(): string;
  /** Aborts when the server starts to close: whatever waits for a change answers now. */
  readonly closing: AbortSignal;
}

/**
 * A UUID from a path, a query or a header, hyphenated in lower case.
 *
 * @throws MillraceError `invalid_argument`
 */
export const requireUuid: (value: unknown, what: string) => string = uuid;

/** The value of a header that may come once; null when absent. */
export function headerOf(request: FastifyRequest, name: string): string | null {
  const value = request.headers[name];
  return Array.isArray(value) ? (value[0] ?? null) : (value ?? null);
}

/**
 * A whole number from a query; null when absent.
 *
 * @throws MillraceError `invalid_argument` naming the bounds
 */
export function boundedInteger(
  value: string | undefined,
  name: string,
  least: number,
  most: number,
): number | null {
  if (value === undefined) return null;
  const number = /^\d{1,16}$/.test(value) ? Number(value) : Number.NaN;
  if (!(number >= least && number <= most)) {
    throw new MillraceError(
      'invalid_argument',
      `${name} must be an integer from ${least} to ${most}, got ${JSON.stringify(value)}`,
    );
  }
  return number;
}

/** `Prefer: wait=N` in seconds, cut to what the server offers; null when not asked for. RFC 7240. */
export function preferredWait(request: FastifyRequest, longest: number): number | null {
  const match = /(?:^|[,;\s])wait="?(\d{1,9})"?(?:$|[,;\s])/i.exec(headerOf(request, 'prefer') ?? '');
  return match === null ? null : Math.min(Number(match[1]), longest);
}

/** The reason of {@link ServerContext.closing}. */
export const SERVER_CLOSING = 'server closing';

/**
 * A signal that aborts when the client of this request is gone before it was answered, or when the server closes
 * (then with the reason {@link SERVER_CLOSING}). For everything that waits on behalf of a request.
 */
export function requestSignal(reply: FastifyReply, closing: AbortSignal): AbortSignal {
  const listeners = listenersOf(closing);
  // By hand and not AbortSignal.any: on Node 20 that keeps a trace of every short-lived signal in the long-lived one.
  const controller = new AbortController();
  const onClosing = (): void => controller.abort(SERVER_CLOSING);
  const onClose = (): void => {
    listeners.delete(onClosing);
    if (!reply.raw.writableFinished) {
      controller.abort(new MillraceError('canceled', 'the client closed the connection'));
    }
  };
  if (closing.aborted) onClosing();
  // A response that was destroyed before we came to listen emits nothing any more.
  else if (reply.raw.destroyed) onClose();
  else {
    listeners.add(onClosing);
    reply.raw.once('close', onClose);
  }
  return controller.signal;
}

/** Behind one listener per signal: adding or removing one walks through all there are, and thousands of requests wait. */
const closingListeners = new WeakMap<AbortSignal, Set<() => void>>();

function listenersOf(closing: AbortSignal): Set<() => void> {
  const known = closingListeners.get(closing);
  if (known !== undefined) return known;
  const listeners = new Set<() => void>();
  closingListeners.set(closing, listeners);
  closing.addEventListener(
    'abort',
    () => {
      for (const listener of listeners) listener();
      listeners.clear();
    },
    { once: true },
  );
  return listeners;
}
