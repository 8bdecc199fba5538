/** The job API for requestors (posemesh DMS, section 2.10 of the protocol), and a job's event stream, which is ours. */
import { Readable } from 'node:stream';
import { MillraceError, isTraceparent } from '@millrace/runner';
import type { FastifyInstance, FastifyRequest } from 'fastify';
import { requireDomain } from '../auth.ts';
import { parseJobSpec } from '../job-spec.ts';
import { JOB_STATUSES, type JobDetail, type JobSpec, type JobStatus } from '../records.ts';
import { redriveSpec } from '../redrive.ts';
import { eventStream, isTerminalEvent } from '../sse.ts';
import type { ClientClaims } from '../tokens.ts';
import { requireComputes } from './computes.ts';
import { boundedInteger, headerOf, requestSignal, requireUuid, type ServerContext } from './context.ts';

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
interface DeadRoute {
  Querystring: { domain_id?: string; job_id?: string; capability?: string; limit?: string; cursor?: string };
}
interface EventsRoute extends JobRoute {
  Querystring: { after?: string; limit?: string };
}

export function registerJobRoutes(app: FastifyInstance, context: ServerContext): void {
  const { auth, store, clock, limits } = context;

  app.post('/v1/jobs', { bodyLimit: limits.jobBodyBytes }, async (request) => {
    const { claims, spec } = await specOf(request);
    await requireComputes(store, spec);
    const parent = headerOf(request, 'traceparent');
    const span = context.tracer.startSpan('submit job', {
      parent: isTraceparent(parent) ? parent : null,
      kind: 'producer',
      attributes: { 'millrace.job.label': spec.label, 'millrace.job.tasks': spec.tasks.length },
    });
    try {
      const [outcome] = await store.submit([
        {
          spec,
          organizationId: context.organizationId,
          idempotencyKey: idempotencyKey(request),
          submitter: claims.subject,
          traceparent: span.traceparent,
        },
      ]);
      if (outcome === undefined) {
        throw new MillraceError('internal', 'the store answered a submission with nothing');
      }
      if (!outcome.ok) throw outcome.error;
      span.end({ attributes: { 'millrace.job.id': outcome.value.jobId } });
      await afterOthers();
      return { job_id: outcome.value.jobId };
    } catch (error) {
      span.end({ error: MillraceError.from(error).message });
      throw error;
    }
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

  app.post<JobRoute>('/v1/jobs/:id/redrive', async (request) => {
    const claims = await auth.client(request, 'write');
    const key = idempotencyKey(request);
    const detail = await readJob(request, claims);
    const { id } = detail.job;
    const submitted = await store.submission(id);
    if (submitted === null) throw unknownJob(id);
    const spec = redriveSpec(detail, submitted, clock.now());
    await requireComputes(store, spec);
    const [outcome] = await store.submit([
      {
        spec,
        organizationId: context.organizationId,
        // Once, whoever asks, unless a key says that it is meant to be another time.
        idempotencyKey: key ?? 'redrive',
        submitter: `redrive of ${id}`,
      },
    ]);
    if (outcome === undefined)
      throw new MillraceError('internal', 'the store answered a redrive with nothing');
    const answer = { redrive_of: id, tasks: spec.tasks.length };
    if (outcome.ok) return { job_id: outcome.value.jobId, ...answer, created: outcome.value.created };
    // The same job again but for a deadline that has passed since.
    const { code, details } = outcome.error;
    const earlier = code === 'already_exists' ? details?.['job_id'] : undefined;
    if (typeof earlier !== 'string') throw outcome.error;
    return { job_id: earlier, ...answer, created: false };
  });

  app.get<DeadRoute>('/v1/dead-tasks', async (request) => {
    const claims = await auth.client(request, 'read');
    const { query } = request;
    const domainId = query.domain_id === undefined ? null : requireUuid(query.domain_id, 'domain_id');
    if (domainId !== null) requireDomain(claims, domainId);
    const { items, nextCursor } = await store.deadTasks({
      domainId: domainId ?? claims.domainId,
      jobId: query.job_id === undefined ? null : requireUuid(query.job_id, 'job_id'),
      capability: query.capability ?? null,
      limit: boundedInteger(query.limit, 'limit', 1, MAX_PAGE) ?? DEFAULT_PAGE,
      cursor: query.cursor ?? null,
    });
    return { items, next_cursor: nextCursor };
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
