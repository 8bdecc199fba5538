/**
 * From what was thrown to what is answered: one table from our codes to HTTP statuses, one JSON body
 * `{"error":{"code","message"}}`. Causes and bugs go to the log, never to the peer.
 */
import { MillraceError, type ErrorCode, type Logger } from '@millrace/runner';
import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify';

const STATUS: Readonly<Record<ErrorCode, number>> = {
  invalid_argument: 400,
  unauthenticated: 401,
  permission_denied: 403,
  not_found: 404,
  deadline_exceeded: 408,
  already_exists: 409,
  failed_precondition: 409,
  aborted: 409,
  canceled: 409,
  resource_exhausted: 413,
  unimplemented: 501,
  unavailable: 503,
  data_loss: 500,
  internal: 500,
};

/** Names the code of an error that its status does not tell. Ours. */
const ERROR_HEADER = 'millrace-error';

/** 413 for a limit on one request, 429 for one that frees up by itself (`retryable`). Else by the table. */
export function statusOf(error: MillraceError): number {
  if (error.code === 'resource_exhausted' && error.retryable) return 429;
  return STATUS[error.code];
}

/** The body of an error answer, and of the `error` member of a batch's items. */
export function errorBody(error: MillraceError): { readonly code: ErrorCode; readonly message: string } {
  return { code: error.code, message: error.message };
}

/**
 * What is told to the peer: MillraceErrors as they are, fastify's refusals by their status, everything else as
 * `internal` without its text, which may hold anything.
 */
export function publicError(
  thrown: unknown,
  requestId: string,
  bodyLimit?: number,
): { readonly status: number; readonly error: MillraceError } {
  if (MillraceError.is(thrown) && thrown.code !== 'internal') {
    return { status: statusOf(thrown), error: thrown };
  }
  const { statusCode, message, code } = (thrown ?? {}) as Partial<FastifyError>;
  if (!MillraceError.is(thrown) && statusCode !== undefined && statusCode >= 400 && statusCode < 500) {
    const ours: ErrorCode = statusCode === 413 ? 'resource_exhausted' : 'invalid_argument';
    const text = refusalText(code, bodyLimit) ?? message ?? 'the request is not acceptable';
    return { status: statusCode, error: new MillraceError(ours, text) };
  }
  return {
    status: 500,
    error: new MillraceError(
      'internal',
      `the dispatcher failed; its log has the cause under request ${requestId}`,
    ),
  };
}

/** Fastify's refusals that leave out what to do, in our words. */
function refusalText(code: string | undefined, bodyLimit: number | undefined): string | null {
  if (code === 'FST_ERR_CTP_INVALID_MEDIA_TYPE') {
    return 'the body must be JSON with "Content-Type: application/json"';
  }
  if (code === 'FST_ERR_CTP_BODY_TOO_LARGE' && bodyLimit !== undefined) {
    return `the body must be at most ${bodyLimit} bytes`;
  }
  return null;
}

/** Logs what an operator should see of an error answer. Client errors are the client's; they show in the metrics. */
export function logError(log: Logger, request: FastifyRequest, status: number, thrown: unknown): void {
  if (status < 500 || status === 501) return;
  log.error('request failed', {
    request_id: request.id,
    method: request.method,
    route: request.routeOptions.url ?? null,
    status,
    error: thrown instanceof Error ? (thrown.stack ?? thrown.message) : String(thrown),
    cause: thrown instanceof Error && thrown.cause instanceof Error ? thrown.cause.message : null,
  });
}

/** The error handler of all routes but DDS. */
export function jsonErrorHandler(log: Logger) {
  return (thrown: unknown, request: FastifyRequest, reply: FastifyReply): void => {
    const { status, error } = publicError(thrown, request.id, request.routeOptions.bodyLimit);
    logError(log, request, status, thrown);
    answerHeaders(reply, status, error);
    // Said, since a stream that broke before its first byte leaves its own type behind.
    void reply
      .code(status)
      .type('application/json; charset=utf-8')
      .send({ error: errorBody(error) });
  };
}

/** The error handler of DDS, whose peers expect plain text. */
export function textErrorHandler(log: Logger) {
  return (thrown: unknown, request: FastifyRequest, reply: FastifyReply): void => {
    const { status, error } = publicError(thrown, request.id, request.routeOptions.bodyLimit);
    logError(log, request, status, thrown);
    answerHeaders(reply, status, error);
    void reply.code(status).type('text/plain; charset=utf-8').send(error.message);
  };
}

function answerHeaders(reply: FastifyReply, status: number, error: MillraceError): void {
  const retryAfterMs = error.details['retry_after_ms'];
  if (status === 429 || status === 503) {
    const seconds = typeof retryAfterMs === 'number' ? Math.max(1, Math.ceil(retryAfterMs / 1000)) : 1;
    void reply.header('retry-after', String(seconds));
  }
  if (status === 401) void reply.header('www-authenticate', 'Bearer');
  // Where the body is a sentence, a 500 would say no more than that it may be tried again.
  if (error.code === 'data_loss') void reply.header(ERROR_HEADER, error.code);
}
