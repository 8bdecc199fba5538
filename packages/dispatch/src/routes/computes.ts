/**
 * Computes: content-addressed code, kept for the nodes that are to run it. One name space for all domains, since equal
 * bytes are equal code. Who may submit work may store code and read all there is; nodes read it; taking it away is for
 * tokens of every domain.
 *
 * Invariants:
 * - What is stored under a digest has that digest: it is hashed while it flows in, and nothing of a mismatch is kept.
 * - The engine is write-once: nobody changes how code that others named is run.
 * - Bytes are durable before they are known, and kept from the collector by their record.
 */
import { MillraceError } from '@millrace/runner';
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import { computeDigest, computeRefsOf, digestOfRef } from '../compute-refs.ts';
import { jsonErrorHandler } from '../errors-http.ts';
import type { ComputeRecord, JobSpec } from '../records.ts';
import type { Store } from '../store.ts';
import { boundedInteger, headerOf, type ServerContext } from './context.ts';
import { byteRange, matchesEtag } from './ranges.ts';
import { answerEarly, contentLength, tooLarge, withBody } from './raw-body.ts';

interface ItemRoute {
  Params: { alg: string; digest: string };
  Querystring: { engine?: string };
}
interface ListRoute {
  Querystring: { limit?: string; cursor?: string };
}

const DEFAULT_PAGE = 50;
const MAX_PAGE = 1000;

/** As in the reference: what runs WASI commands there. */
const DEFAULT_ENGINE = 'wazero';
const ENGINE = /^[a-z0-9][a-z0-9._-]{0,63}$/;

/** Which engine an answer's bytes are for. */
const ENGINE_HEADER = 'millrace-compute-engine';

/** Mounts `/v1/computes…` in a scope of its own. */
export function registerComputeRoutes(app: FastifyInstance, context: ServerContext): void {
  const { auth, store, blobs, limits, log } = context;
  const item = '/v1/computes/:alg/:digest';
  // `register` only fails when the plugin does, and then fails `ready()`; nothing is to be awaited here.
  void app.register((scope, _options, done) => {
    scope.removeAllContentTypeParsers();
    // Bodies are read by the handler, as streams with a bound of their own.
    scope.addContentTypeParser('*', (_request, payload, parsed) => parsed(null, payload));
    const onError = jsonErrorHandler(log);
    scope.setErrorHandler((error, request, reply) => {
      answerEarly(request, reply, context);
      void reply.removeHeader(ENGINE_HEADER);
      onError(error, request, reply);
    });

    scope.get<ListRoute>('/v1/computes', async (request) => {
      await auth.client(request, 'read');
      const { limit, cursor } = request.query;
      const { items, nextCursor } = await store.listComputes({
        limit: boundedInteger(limit, 'limit', 1, MAX_PAGE) ?? DEFAULT_PAGE,
        cursor: cursor ?? null,
      });
      return { items, next_cursor: nextCursor };
    });

    scope.put<ItemRoute>(item, async (request, reply) => {
      await auth.client(request, 'write');
      const digest = digestOf(request);
      const engine = request.query.engine ?? DEFAULT_ENGINE;
      if (!ENGINE.test(engine)) {
        throw new MillraceError(
          'invalid_argument',
          `engine must be 1 to 64 of a-z 0-9 . _ - and begin with a letter or digit, got ${JSON.stringify(engine.slice(0, 80))}`,
        );
      }
      const maxBytes = limits.computeBytes;
      const announced = contentLength(request);
      if (announced !== null && announced > maxBytes) throw tooLarge('a compute', maxBytes, 'computeBytes');
      const bounds = { limit: maxBytes, name: 'computeBytes', deadline: true };
      const blob = await withBody(context, request, reply, bounds, async (body, signal) => {
        try {
          return await blobs.put(body, { maxBytes, expect: { digest }, signal });
        } catch (error) {
          throw mismatch(error, request.params.digest);
        }
      });
      const { compute, created } = await store.putCompute({ digest, engine, size: blob.size });
      if (created) log.info('compute stored', { ref: compute.ref, engine, bytes: compute.bytes });
      return reply.send(compute);
    });

    scope.head<ItemRoute>(item, async (request, reply) => {
      const compute = await find(request);
      describe(reply, compute);
      return reply.header('content-length', compute.bytes).send();
    });

    scope.get<ItemRoute>(item, async (request, reply) => {
      const compute = await find(request);
      const etag = describe(reply, compute);
      if (matchesEtag(headerOf(request, 'if-none-match'), etag)) return reply.code(304).send();
      const ifRange = headerOf(request, 'if-range');
      const range =
        ifRange === null || ifRange === etag ? byteRange(headerOf(request, 'range'), compute.bytes) : null;
      if (range === 'unsatisfiable') {
        const error = new MillraceError(
          'invalid_argument',
          `range ${headerOf(request, 'range')} is not within the ${compute.bytes} bytes of ${compute.ref}`,
        );
        return reply
          .code(416)
          .header('content-range', `bytes */${compute.bytes}`)
          .type('application/json; charset=utf-8')
          .send({ error: { code: error.code, message: error.message } });
      }
      const stored = await blobs.stat(`sha256:${compute.digest}`);
      if (stored?.size !== compute.bytes) {
        throw new MillraceError(
          'data_loss',
          `the stored bytes of ${compute.ref} (${compute.bytes} bytes) are missing or damaged; store it again`,
        );
      }
      const body = await blobs.open(stored.digest, range ?? {});
      if (range === null) return reply.header('content-length', compute.bytes).send(body);
      return reply
        .code(206)
        .header('content-range', `bytes ${range.start}-${range.end}/${compute.bytes}`)
        .header('content-length', range.end - range.start + 1)
        .send(body);
    });

    scope.delete<ItemRoute>(item, async (request, reply) => {
      const claims = await auth.client(request, 'write');
      if (claims.domainId !== null) {
        // Jobs of any domain may name it.
        throw new MillraceError(
          'permission_denied',
          `deleting computes needs a token for every domain; this one is for domain ${claims.domainId}`,
        );
      }
      const digest = digestOf(request);
      if (!(await store.deleteCompute(digest))) throw unknownCompute(request.params.digest);
      log.info('compute deleted', { ref: `compute://sha256/${request.params.digest}` });
      return reply.code(204).send();
    });
    done();
  });

  async function find(request: FastifyRequest<ItemRoute>): Promise<ComputeRecord> {
    await auth.clientOrNode(request, 'read');
    const compute = await store.getCompute(digestOf(request));
    if (compute === null) throw unknownCompute(request.params.digest);
    return compute;
  }
}

function digestOf({ params }: FastifyRequest<ItemRoute>): string {
  return computeDigest(params.alg, params.digest);
}

/** Headers of the bytes and their tag. */
function describe(reply: FastifyReply, compute: ComputeRecord): string {
  const etag = `"sha256:${compute.digest}"`;
  void reply
    .header('etag', etag)
    .header('accept-ranges', 'bytes')
    // Other bytes can never have this name.
    .header('cache-control', 'private, max-age=31536000, immutable')
    .header(ENGINE_HEADER, compute.engine)
    // Whatever it is, it is not for a browser to run: the dashboard has this origin.
    .header('x-content-type-options', 'nosniff')
    .type('application/octet-stream');
  return etag;
}

/** Other bytes than were announced are the client's mistake, not lost data. */
function mismatch(error: unknown, want: string): unknown {
  if (!MillraceError.is(error) || error.code !== 'data_loss') return error;
  const got = (error.details['actual'] as string).replace(/^sha256:/, '');
  return new MillraceError(
    'invalid_argument',
    `the bytes sent for compute://sha256/${want} have the sha256 ${got}; nothing was kept`,
    { cause: error, details: { want, got } },
  );
}

function unknownCompute(digest: string): MillraceError {
  return new MillraceError('not_found', `there is no compute compute://sha256/${digest}`);
}

/** What a job names must be there before anybody waits for it. @throws MillraceError `invalid_argument` */
export async function requireComputes(store: Store, spec: JobSpec): Promise<void> {
  const refs = computeRefsOf(spec);
  if (refs.length === 0) return;
  const digests = new Map(refs.map((ref) => [ref, digestOfRef(ref)]));
  const known = [...digests.values()].filter((digest) => digest !== null);
  const absent = new Set(await store.missingComputes(known));
  const malformed = refs.filter((ref) => digests.get(ref) === null);
  const missing = refs.filter((ref) => absent.has(digests.get(ref) ?? ''));
  const problems: string[] = [];
  if (missing.length > 0) {
    const [what, them] = missing.length === 1 ? ['a compute that is', 'it'] : ['computes that are', 'them'];
    problems.push(
      `names ${what} not stored here: ${listed(missing)}; store ${them} first ("millrace compute push")`,
    );
  }
  if (malformed.length > 0) {
    const what = malformed.length === 1 ? 'which is no ref of a compute' : 'which are no refs of computes';
    problems.push(`names ${listed(malformed)}, ${what}: want compute://sha256/ and 64 lower-case hex digits`);
  }
  if (problems.length === 0) return;
  throw new MillraceError('invalid_argument', `the job ${problems.join('; it ')}`);
}

function listed(refs: readonly string[]): string {
  const MAX_NAMED = 20;
  const named = refs.slice(0, MAX_NAMED).map((ref) => ref.slice(0, 200));
  return `${named.join(', ')}${refs.length > MAX_NAMED ? ` and ${refs.length - MAX_NAMED} more` : ''}`;
}
