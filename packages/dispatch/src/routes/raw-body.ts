/** Bodies that handlers read themselves, as streams: their bounds, and what becomes of the rest of a refused one. */
import { MillraceError, type ByteStream } from '@millrace/runner';
import type { FastifyReply, FastifyRequest } from 'fastify';
import { untilAborted } from '../pull-stream.ts';
import type { ServerContext } from './context.ts';

/** An upload in one request takes at most this long; half of the collector's grace. */
const REQUEST_MAX_MS = 30 * 60 * 1000;

/** How long a client that was answered early may go on sending before its connection is cut. */
const LINGER_MS = 5_000;

export interface BodyBounds {
  /** Bytes. */
  readonly limit: number;
  /** What the limit is called in the error. */
  readonly name: string;
  /** Whether the whole body must have come within half an hour. */
  readonly deadline: boolean;
}

/**
 * Reads a request's body with `use`. The body ends with an error beyond `limit` bytes, when the client goes or the
 * server closes; with `deadline` also when it takes too long in all. A silent client is `body-watch.ts`'s.
 */
export async function withBody<T>(
  ctx: Pick<ServerContext, 'clock' | 'closing'>,
  request: FastifyRequest,
  reply: FastifyReply,
  bounds: BodyBounds,
  use: (body: ByteStream, signal: AbortSignal) => Promise<T>,
): Promise<T> {
  const { clock, closing } = ctx;
  const stop = new AbortController();
  const onLate = (): void =>
    stop.abort(
      new MillraceError(
        'deadline_exceeded',
        `the request took longer than ${REQUEST_MAX_MS} ms (REQUEST_MAX_MS)`,
      ),
    );
  const deadline = bounds.deadline ? clock.setTimer(onLate, REQUEST_MAX_MS) : null;
  const onClosing = (): void =>
    stop.abort(new MillraceError('unavailable', 'the server is closing; send this again'));
  const onGone = (): void => stop.abort(new MillraceError('canceled', 'the client closed the connection'));
  if (closing.aborted) onClosing();
  else closing.addEventListener('abort', onClosing, { once: true });
  reply.raw.once('close', onGone);
  const { signal } = stop;
  const body = (async function* (): AsyncGenerator<Uint8Array> {
    let size = 0;
    // The connection must outlive the body: the answer goes over it, also when the body was refused.
    const raw = request.raw.iterator({ destroyOnReturn: false }) as AsyncIterable<Uint8Array>;
    for await (const chunk of untilAborted(raw, signal)) {
      size += chunk.length;
      if (size > bounds.limit) throw tooLarge('the request body', bounds.limit, bounds.name);
      yield chunk;
    }
  })();
  try {
    return await use(body, signal);
  } catch (error) {
    if (signal.aborted) throw signal.reason;
    throw error;
  } finally {
    deadline?.cancel();
    closing.removeEventListener('abort', onClosing);
    reply.raw.removeListener('close', onGone);
  }
}

/**
 * A body that was announced as no longer than a few network packets, whole. Next to nothing beside what {@link withBody} costs: it comes
 * at once, or `body-watch.ts` ends the connection, and Node lets no more come than was announced.
 */
export function shortBody(request: FastifyRequest): Promise<Buffer> {
  const { raw } = request;
  return new Promise((resolve, reject) => {
    const chunks: Buffer[] = [];
    const onGone = (): void => {
      // After the end it tells only that the request was read.
      if (!raw.readableEnded) reject(new MillraceError('canceled', 'the client closed the connection'));
    };
    raw.on('data', (chunk: Buffer) => void chunks.push(chunk));
    raw.once('end', () => resolve(chunks.length === 1 ? chunks[0]! : Buffer.concat(chunks)));
    raw.once('error', onGone);
    raw.once('close', onGone);
    // It went while something else was waited for, and nothing more is said about it.
    if (raw.destroyed) onGone();
  });
}

/** The announced length of the body; null when it was not announced. */
export function contentLength(request: FastifyRequest): number | null {
  const text = request.headers['content-length'];
  return text === undefined ? null : Number(text);
}

export function tooLarge(what: string, limit: number, name: string): MillraceError {
  return new MillraceError('resource_exhausted', `${what} must be at most ${limit} bytes (${name})`, {
    details: { limit: name, value: limit },
  });
}

/**
 * Before an error is answered: takes back the headers of what was to be sent instead. When the answer comes before the
 * whole body, the rest is read and dropped, so that the client gets to see the answer instead of a reset; one that
 * goes on and on is cut off. Node does so only for bodies nobody began to read.
 */
export function answerEarly(request: FastifyRequest, reply: FastifyReply, ctx: ServerContext): void {
  for (const header of ['etag', 'accept-ranges', 'content-range', 'content-length', 'cache-control']) {
    void reply.removeHeader(header);
  }
  if (request.raw.complete) return;
  reply.raw.once('finish', () => {
    request.raw.resume();
    const cut = ctx.clock.setTimer(
      () => {
        if (!request.raw.complete) request.raw.socket.destroy();
      },
      LINGER_MS,
      { unref: true },
    );
    request.raw.once('close', () => cut.cancel());
  });
}
