/** Ours, for requestors: what the attempts of a task said, and why a task or job stands where it does. */
import { MillraceError } from '@millrace/runner';
import type { FastifyInstance, FastifyReply } from 'fastify';
import { requireDomain } from '../auth.ts';
import { explainJob, explainTask } from '../explain.ts';
import { LAST_WORDS_BYTES, nodeWait, type NodeWait } from '../node-wait.ts';
import type { JobDetail, TaskRecord } from '../records.ts';
import { Wakeup } from '../signals.ts';
import type { LogPage, LogQuery } from '../store.ts';
import type { ClientClaims } from '../tokens.ts';
import { boundedInteger, preferredWait, requestSignal, requireUuid, type ServerContext } from './context.ts';

const DEFAULT_LOG_BYTES = 256 * 1024;
const MAX_LOG_BYTES = 1024 * 1024;
const LINE_FEED = 0x0a;
/** Running tasks of a job of whose logs the end is read to explain it. */
const WAITS_READ = 256;
/** Keys of a job's waiting tasks that are looked up to explain it. */
const KEYS_READ = 64;

const NEVER = new AbortController().signal;

interface IdRoute {
  Params: { id: string };
}
interface LogsRoute extends IdRoute {
  Querystring: { attempt?: string; offset?: string; limit?: string };
}

export function registerTaskRoutes(app: FastifyInstance, context: ServerContext): void {
  const { auth, store, clock, limits } = context;

  app.get<LogsRoute>('/v1/tasks/:id/logs', async (request, reply) => {
    const claims = await auth.client(request, 'read');
    const taskId = requireUuid(request.params.id, 'the task id');
    const { query } = request;
    const asked = {
      attempt: boundedInteger(query.attempt, 'attempt', 1, Number.MAX_SAFE_INTEGER),
      offset: logOffset(query.offset),
      limit: boundedInteger(query.limit, 'limit', 1, MAX_LOG_BYTES) ?? DEFAULT_LOG_BYTES,
    };
    const wait = preferredWait(request, limits.longPollSecs);
    if (wait !== null) void reply.header('preference-applied', `wait=${wait}`);
    const page = await readLog(reply, claims, { taskId, ...asked }, (wait ?? 0) * 1000);
    void reply
      .type('application/x-ndjson')
      .header('cache-control', 'no-store')
      .header('millrace-job-id', page.jobId)
      .header('millrace-log-attempt', String(page.attempt))
      .header('millrace-log-attempts', String(page.attempts))
      .header('millrace-log-offset', String(page.offset))
      .header('millrace-log-next-offset', String(page.offset + page.bytes.byteLength))
      .header('millrace-log-size', String(page.size))
      .header('millrace-log-ended', String(page.ended))
      .header('millrace-task-ended', String(page.final));
    return reply.send(page.bytes);
  });

  app.get<IdRoute>('/v1/tasks/:id/explain', async (request) => {
    const claims = await auth.client(request, 'read');
    const id = requireUuid(request.params.id, 'the task id');
    const standing = await store.standing(id);
    if (standing === null) throw unknownTask(id);
    requireDomain(claims, standing.domainId);
    const [job, nodes] = await Promise.all([store.getJob(standing.jobId), store.listNodes()]);
    const task = job?.tasks.find((each) => each.id === id);
    if (!job || !task) throw unknownTask(id);
    const waits = await waitsOf([task]);
    return explainTask({ nowMs: clock.now(), job, nodes, waits }, task, standing);
  });

  app.get<IdRoute>('/v1/jobs/:id/explain', async (request) => {
    const claims = await auth.client(request, 'read');
    const [job, nodes] = await Promise.all([readJob(request.params.id, claims), store.listNodes()]);
    const [waits, heldOfKeys] = await Promise.all([waitsOf(job.tasks), heldOfKeysOf(job.tasks)]);
    return explainJob({ nowMs: clock.now(), job, nodes, waits, heldOfKeys });
  });

  app.get<IdRoute>('/v1/jobs/:id/logs', async (request) => {
    const claims = await auth.client(request, 'read');
    const id = requireUuid(request.params.id, 'the job id');
    // A job's domain is read with the whole job; a token for every domain need not be checked against it.
    if (claims.domainId !== null) await readJob(id, claims);
    const logs = await store.listLogs(id);
    if (logs === null) throw unknownJob(id);
    return { items: logs.map(({ taskId, attempt, size }) => ({ task_id: taskId, attempt, size })) };
  });

  async function heldOfKeysOf(tasks: readonly TaskRecord[]): Promise<ReadonlyMap<string, number>> {
    const firsts = new Map<string, string>();
    for (const { id, status, concurrency } of tasks) {
      if (firsts.size === KEYS_READ) break;
      if (status === 'queued' && concurrency !== undefined && !firsts.has(concurrency.key)) {
        firsts.set(concurrency.key, id);
      }
    }
    const found = await Promise.all(
      Array.from(firsts, async ([key, id]) => [key, (await store.standing(id))?.heldOfKey ?? 0] as const),
    );
    return new Map(found);
  }

  async function waitsOf(tasks: readonly TaskRecord[]): Promise<ReadonlyMap<string, NodeWait>> {
    const running = tasks.filter(({ status }) => status === 'running').slice(0, WAITS_READ);
    const found = await Promise.all(
      running.map(async ({ id }): Promise<readonly [string, NodeWait][]> => {
        const query = { taskId: id, attempt: null, offset: -LAST_WORDS_BYTES, limit: LAST_WORDS_BYTES };
        const page = await store.readLogs(query);
        const wait = page === null ? null : nodeWait(page.bytes);
        return wait === null ? [] : [[id, wait]];
      }),
    );
    return new Map(found.flat());
  }

  /** A page of the log, whole lines; empty when there is nothing (more) within the time. */
  async function readLog(
    reply: FastifyReply,
    claims: ClientClaims,
    asked: LogQuery,
    waitMs: number,
  ): Promise<LogPage> {
    const standing = await store.standing(asked.taskId);
    if (standing === null) throw unknownTask(asked.taskId);
    requireDomain(claims, standing.domainId);
    const wakeup = new Wakeup();
    // Before the first look, so that nothing falls between it and the wait.
    using _grown = context.signals.onLogs(asked.taskId, () => wakeup.notify());
    using _changed = context.signals.onJob(standing.jobId, () => wakeup.notify());
    const signal = waitMs > 0 ? requestSignal(reply, context.closing) : NEVER;
    const deadline = clock.monotonic() + waitMs;
    let query = asked;
    for (;;) {
      const page = await store.readLogs(query.offset < 0 ? tail(query) : query);
      if (page === null) throw unknownTask(asked.taskId);
      const lines = wholeLines(page, query);
      const left = deadline - clock.monotonic();
      if (lines.bytes.byteLength > 0 || page.ended || left <= 0 || signal.aborted) return lines;
      // Who waits for what the newest attempt says waits for that attempt, also when another one follows it.
      query = { ...query, attempt: page.attempt, offset: lines.offset };
      await wakeup.wait(clock, left, signal);
    }
  }

  async function readJob(idText: string, claims: ClientClaims): Promise<JobDetail> {
    const id = requireUuid(idText, 'the job id');
    const job = await store.getJob(id);
    if (job === null) throw unknownJob(id);
    requireDomain(claims, job.job.domain_id);
    return job;
  }
}

/** One byte more: it tells whether the first byte wanted begins a line. */
function tail(query: LogQuery): LogQuery {
  return { ...query, offset: query.offset - 1, limit: query.limit + 1 };
}

/**
 * Cuts a page to whole lines: one from the end begins with its first whole line, and every one ends with a line feed, unless
 * the line is longer than the page.
 */
function wholeLines(page: LogPage, query: LogQuery): LogPage {
  const bytes = Buffer.from(page.bytes.buffer, page.bytes.byteOffset, page.bytes.byteLength);
  const begin = query.offset < 0 && page.offset > 0 ? bytes.indexOf(LINE_FEED) + 1 || bytes.byteLength : 0;
  const last = bytes.lastIndexOf(LINE_FEED) + 1;
  const end = last > begin ? last : bytes.byteLength;
  return { ...page, offset: page.offset + begin, bytes: bytes.subarray(begin, end) };
}

/** Below 0 it counts from the end. */
function logOffset(value: string | undefined): number {
  if (value === undefined) return 0;
  const number = /^-?\d{1,16}$/.test(value) ? Number(value) : Number.NaN;
  if (Number.isSafeInteger(number)) return number;
  throw new MillraceError(
    'invalid_argument',
    `offset must be an integer, below 0 to count from the end, got ${JSON.stringify(value)}`,
  );
}

function unknownTask(id: string): MillraceError {
  return new MillraceError('not_found', `there is no task ${id}`);
}

function unknownJob(id: string): MillraceError {
  return new MillraceError('not_found', `there is no job ${id}`);
}
