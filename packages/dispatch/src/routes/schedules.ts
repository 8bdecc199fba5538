/** Ours: jobs that are submitted at set times. */
import { MillraceError } from '@millrace/runner';
import type { FastifyInstance } from 'fastify';
import { requireDomain } from '../auth.ts';
import { parseCron } from '../cron.ts';
import { parseJobSpec } from '../job-spec.ts';
import type { JobSpec, ScheduleRecord } from '../records.ts';
import { requireComputes } from './computes.ts';
import { requireUuid, type ServerContext } from './context.ts';

interface ScheduleBody {
  readonly name: string;
  readonly cron: string;
  readonly time_zone?: string | null;
  readonly catch_up?: ScheduleRecord['catch_up'] | null;
  readonly overlap?: ScheduleRecord['overlap'] | null;
  readonly replace?: boolean | null;
  readonly job: unknown;
}

const NAME = '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$';

const SCHEDULE_SCHEMA = {
  type: 'object',
  required: ['name', 'cron', 'job'],
  properties: {
    name: { type: 'string', pattern: NAME },
    cron: { type: 'string' },
    time_zone: { type: ['string', 'null'] },
    catch_up: { enum: ['skip', 'one', null] },
    overlap: { enum: ['allow', 'skip', null] },
    replace: { type: ['boolean', 'null'] },
  },
};

interface NameRoute {
  Params: { name: string };
  Querystring: { domain_id?: string };
}

export function registerScheduleRoutes(app: FastifyInstance, context: ServerContext): void {
  const { auth, store, clock, limits } = context;

  app.post<{ Body: ScheduleBody }>(
    '/v1/schedules',
    { schema: { body: SCHEDULE_SCHEMA }, bodyLimit: limits.jobBodyBytes },
    async (request, reply) => {
      const claims = await auth.client(request, 'write');
      const { name, cron, time_zone, catch_up, overlap, replace, job } = request.body;
      const timeZone = time_zone ?? 'UTC';
      const times = parseCron(cron, timeZone);
      const now = clock.now();
      const spec = parseJobSpec(job, {
        defaultDomainId: claims.domainId ?? context.defaultDomainId,
        maxTasks: limits.tasksPerJob,
        now,
      });
      requireDomain(claims, spec.domain_id);
      refuseTimes(spec);
      await requireComputes(store, spec);
      const schedule = await store.putSchedule({
        name,
        cron: cron.trim().replaceAll(/ +/g, ' '),
        timeZone,
        catchUp: catch_up ?? 'skip',
        overlap: overlap ?? 'allow',
        job: spec,
        organizationId: context.organizationId,
        nextAtMs: times.after(now),
        replace: replace ?? false,
      });
      context.log.info('schedule kept', {
        schedule: name,
        domain_id: spec.domain_id,
        next_at: schedule.next_at,
      });
      return reply.code(201).send(schedule);
    },
  );

  app.get<{ Querystring: { domain_id?: string } }>('/v1/schedules', async (request) => {
    const claims = await auth.client(request, 'read');
    const { domain_id } = request.query;
    const domainId = domain_id === undefined ? claims.domainId : requireUuid(domain_id, 'domain_id');
    if (domainId !== null) requireDomain(claims, domainId);
    const items = await store.listSchedules(domainId);
    // Jobs may be large; one schedule is asked for with its job.
    return {
      items: items.map(({ job, ...rest }) => ({ ...rest, label: job.label, tasks: job.tasks.length })),
    };
  });

  app.get<NameRoute>('/v1/schedules/:name', async (request) => {
    const claims = await auth.client(request, 'read');
    const domainId = domainOf(request.query.domain_id, claims.domainId);
    requireDomain(claims, domainId);
    const schedule = await store.getSchedule(domainId, request.params.name);
    if (schedule === null) throw unknown(request.params.name, domainId);
    return schedule;
  });

  app.delete<NameRoute>('/v1/schedules/:name', async (request, reply) => {
    const claims = await auth.client(request, 'write');
    const domainId = domainOf(request.query.domain_id, claims.domainId);
    requireDomain(claims, domainId);
    if (!(await store.deleteSchedule(domainId, request.params.name))) {
      throw unknown(request.params.name, domainId);
    }
    context.log.info('schedule removed', { schedule: request.params.name, domain_id: domainId });
    return reply.code(204).send();
  });

  function domainOf(given: string | undefined, own: string | null): string {
    return given === undefined ? (own ?? context.defaultDomainId) : requireUuid(given, 'domain_id');
  }
}

/** A job that is submitted again and again cannot name one moment. */
function refuseTimes(spec: JobSpec): void {
  const timed = [spec, ...spec.tasks].some(
    ({ deadline_at, not_before }) => deadline_at !== null || not_before !== undefined,
  );
  if (!timed) return;
  throw new MillraceError(
    'invalid_argument',
    'the job of a schedule must have no deadline_at and no not_before: they name one moment, and it is submitted at many',
  );
}

function unknown(name: string, domainId: string): MillraceError {
  return new MillraceError(
    'not_found',
    `domain ${domainId} has no schedule named ${JSON.stringify(name.slice(0, 128))}`,
  );
}
