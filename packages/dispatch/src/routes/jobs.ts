/** The job API for requestors (posemesh DMS, section 2.10 of the protocol), and a job's event stream, which is ours. */
import { Readable } from 'node:stream';
import { MillraceError } from '@millrace/runner';
import type { FastifyInstance, FastifyRequest } from 'fastify';
import { requireDomain } from '../auth.ts';
import { parseJobSpec } from '../job-spec.ts';
import { JOB_STATUSES, type JobDetail, type JobSpec, type JobStatus } from '../records.ts';
import { eventStream, isTerminalEvent } from '../sse.ts';
import type { ClientClaims } from '../tokens.ts';
import { headerOf, requestSignal, requireUuid, type ServerContext } from './context.ts';

const DEFAULT_PAGE = 50;
const MAX_PAGE = 100;
const MAX_EVENT_PAGE = 1000;

interface JobRoute {
  Params: { id: string };
}
interface ListRoute {
  Querystring: {
    domain_id?: string;
    limit?: string;
    cursor?: string;
    status?: string;
    capabilities?: string | string[];
    match_all_capabilities?: string;
  };
}
interface EventsRoute extends JobRoute {
  Querystring: { after?: string; limit?: string };
}

export function registerJobRoutes(app: FastifyInstance, context: ServerContext): void {
  const { auth, store, clock, limits } = context;

  app.post('/v1/jobs', { bodyLimit: limits.jobBodyBytes }, async (request) => {
    const { claims, spec } = await specOf(request);
    const [outcome] = await store.submit([
      {
        spec,
        organizationId: context.organizationId,
        idempotencyKey: idempotencyKey(request),
        submitter: claims.subject,
      },
    ]);
    if (outcome === undefined) {
      throw new MillraceError('internal', 'the store answered a submission with nothing');
    }
    if (!outcome.ok) throw outcome.error;
    await afterOthers();
    return { job_id: outcome.value.jobId };
  });

  // Nothing is billed here; a client that asks before it submits is told so in the form it knows.
  app.post('/v1/jobs/estimate', { bodyLimit: limits.jobBodyBytes }, async (request) => {
    const { spec } = await specOf(request);
    return {
      total: '0',
      tasks: spec.tasks.map(({ label, stage, capability, mode }) => ({
        label,
        stage,
        capability,
        mode,
        billing_units: '0',
        estimated_credit_cost: '0',
      })),
    };
  });

  app.get<ListRoute>('/v1/jobs', async (request) => {
    const claims = await auth.client(request, 'read');
    const { query } = request;
    const domainId = query.domain_id === undefined ? null : requireUuid(query.domain_id, 'domain_id');
    if (domainId !== null) requireDomain(claims, domainId);
    const { items, nextCursor } = await store.listJobs({
      domainId: domainId ?? claims.domainId,
      status: jobStatus(query.status),
      capabilities: query.capabilities === undefined ? [] : [query.capabilities].flat(),
      matchAllCapabilities: flag(query.match_all_capabilities, 'match_all_capabilities'),
      limit: boundedInteger(query.limit, 'limit', 1, MAX_PAGE) ?? DEFAULT_PAGE,
      cursor: query.cursor ?? null,
    });
    return { items, next_cursor: nextCursor };
  });

  app.get<JobRoute>('/v1/jobs/:id', async (request) => {
    const claims = await auth.client(request, 'read');
    return await readJob(request, claims);
  });

  app.post<JobRoute>('/v1/jobs/:id/cancel', async (request) => {
    const claims = await auth.client(request, 'write');
    const id = await authorize(request, claims);
    const canceled = await store.cancelJob(id);
    if (canceled === null) throw unknownJob(id);
    return { id: canceled.id, status: canceled.status, updated_at: canceled.updated_at };
  });

  app.delete<JobRoute>('/v1/jobs/:id', async (request, reply) => {
    const claims = await auth.client(request, 'write');
    const id = await authorize(request, claims);
    if (!(await store.deleteJob(id))) throw unknownJob(id);
    return reply.code(204).send();
  });

  app.get<EventsRoute>('/v1/jobs/:id/events', async (request, reply) => {
    const claims = await auth.client(request, 'read');
    const jobId = await authorize(request, claims);
    const streams = /\btext\/event-stream\b/i.test(headerOf(request, 'accept') ?? '');
    const resumeAt = streams ? headerOf(request, 'last-event-id') : null;
    const after = boundedInteger(resumeAt ?? request.query.after, 'after', 0, Number.MAX_SAFE_INTEGER) ?? 0;
    if (after > 0) {
      const at = await store.events(jobId, after - 1, 1);
      if (at === null) throw unknownJob(jobId);
      const [event] = at;
      if (event === undefined) {
        throw new MillraceError(
          'invalid_argument',
          `after=${after} is past the newest event of job ${jobId}`,
        );
      }
      // 204 tells an EventSource, which reconnects by itself, that there is no more to come.
      if (streams && isTerminalEvent(event)) return reply.code(204).send();
    }
    if (!streams) {
      const limit = boundedInteger(request.query.limit, 'limit', 1, MAX_EVENT_PAGE) ?? MAX_EVENT_PAGE;
      const items = await store.events(jobId, after, limit);
      if (items === null) throw unknownJob(jobId);
      return { items, next_after: items.at(-1)?.seq ?? after };
    }
    if ((await store.events(jobId, after, 1)) === null) throw unknownJob(jobId);
    const frames = eventStream({
      ...context,
      jobId,
      after,
      signal: requestSignal(reply, context.closing),
    });
    void reply
      .type('text/event-stream; charset=utf-8')
      .header('cache-control', 'no-store')
      // Proxies of the nginx kind would hold small chunks back.
      .header('x-accel-buffering', 'no');
    return reply.send(Readable.from(frames, { objectMode: false }));
  });

  async function specOf(
    request: FastifyRequest,
  ): Promise<{ readonly claims: ClientClaims; readonly spec: JobSpec }> {
    const claims = await auth.client(request, 'write');
    const spec = parseJobSpec(request.body, {
      defaultDomainId: claims.domainId ?? context.defaultDomainId,
      maxTasks: limits.tasksPerJob,
      now: clock.now(),
    });
    requireDomain(claims, spec.domain_id);
    return { claims, spec };
  }

  async function readJob(request: FastifyRequest<JobRoute>, claims: ClientClaims): Promise<JobDetail> {
    const id = requireUuid(request.params.id, 'the job id');
    const detail = await store.getJob(id);
    if (detail === null) throw unknownJob(id);
    requireDomain(claims, detail.job.domain_id);
    return detail;
  }

  /** The job's id. A token for every domain need not be checked against the job, which may be large to read. */
  async function authorize(request: FastifyRequest<JobRoute>, claims: ClientClaims): Promise<string> {
    return claims.domainId === null
      ? requireUuid(request.params.id, 'the job id')
      : (await readJob(request, claims)).job.id;
  }
}

/**
 * Resolves when the answers that are ready now are on their way. A commit that adds a job may have given its tasks to nodes
 * that waited; they have work to begin, the requestor only learns an id. In the other order
 * the lease leaves after the answer to the requestor.
 */
function afterOthers(): Promise<void> {
  // A tick runs when no microtask is left, and answers are made in microtasks.
  return new Promise((resolve) => queueMicrotask(() => process.nextTick(resolve)));
}

function unknownJob(id: string): MillraceError {
  return new MillraceError('not_found', `there is no job ${id}`);
}

/** 1 to 128 visible ASCII characters; null when absent. */
function idempotencyKey(request: FastifyRequest): string | null {
  const key = headerOf(request, 'idempotency-key');
  if (key !== null && !/^[!-~]{1,128}$/.test(key)) {
    throw new MillraceError(
      'invalid_argument',
      `Idempotency-Key must be 1 to 128 visible ASCII characters, got ${key.length} characters`,
    );
  }
  return key;
}

function jobStatus(value: string | undefined): JobStatus | null {
  if (value === undefined) return null;
  const known = JOB_STATUSES.find((status) => status === value);
  if (known === undefined) {
    throw new MillraceError(
      'invalid_argument',
      `status must be one of ${JOB_STATUSES.join(', ')}, got ${JSON.stringify(value)}`,
    );
  }
  return known;
}

function flag(value: string | undefined, name: string): boolean {
  if (value === undefined || value === 'false') return false;
  if (value === 'true') return true;
  throw new MillraceError('invalid_argument', `${name} must be true or false, got ${JSON.stringify(value)}`);
}

function boundedInteger(value: string | undefined, name: string, least: number, most: number): number | null {
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
