/** The requestor's side over HTTP: jobs, events, nodes, and storage under the same token. */
import type { Readable } from 'node:stream';
import { randomUUID } from 'node:crypto';
import { MillraceError, sleep, systemClock, type ByteStream } from '@millrace/runner';
import { members, object, string } from '@millrace/runner/decode';
import type {
  BusyNode,
  DomainStanding,
  JobDetail,
  JobEvent,
  JobStatus,
  NodeMode,
  NodeRecord,
  ScheduleRecord,
} from '../records.ts';
import type { JobExplanation, TaskExplanation } from '../explain.ts';
import type { QueueReport } from '../queue-report.ts';
import type { Computes } from './computes.ts';
import type { CallOptions } from './dms.ts';
import type { DomainStorage, NewItem } from './domain.ts';
import { openDomainStorage } from './http-domain.ts';
import { computesOver } from './http-computes.ts';
import { HttpOrigin, dispatcherError, transportError, type HttpResponse } from './http.ts';
import type {
  JobSubmission,
  JobsPage,
  ListedSchedule,
  Requestor,
  RequestorOptions,
  ScheduleDraft,
  SubmitOptions,
  TaskLogPage,
} from './requestor.ts';
import { uploadItems, uploadStream, type UploadOptions } from './upload.ts';

/** A job of 10,000 tasks is about 10 MiB. */
const MAX_ANSWER_BYTES = 256 * 1024 * 1024;

/** What a page of a log may have, and a little. */
const MAX_LOG_PAGE_BYTES = 2 * 1024 * 1024;

/** The server sends a comment every 15 s; a stream silent for longer is dead. */
const STREAM_SILENCE_MS = 45_000;

/** How long a broken event stream is tried again before the caller hears of it. */
const RECONNECT_MS = 60_000;
const FIRST_RETRY_MS = 100;
const LONGEST_RETRY_MS = 5_000;

/** One event; the server bounds them far below. */
const MAX_FRAME_CHARS = 8 * 1024 * 1024;

/**
 * A requestor of one dispatcher. Nothing is sent before the first call; calls may be concurrent. Errors are
 * MillraceErrors with the dispatcher's own sentence, and `details.status` when it answered at all.
 *
 * @throws MillraceError `invalid_argument` for a URL that is not http(s)
 */
export function connect(options: RequestorOptions): Requestor & AsyncDisposable {
  return new HttpRequestor(options);
}

interface Call {
  readonly method: 'GET' | 'POST' | 'PUT' | 'DELETE';
  readonly path: string;
  readonly json?: unknown;
  readonly headers?: Readonly<Record<string, string>>;
  readonly timeoutMs?: number;
}

class HttpRequestor implements Requestor, AsyncDisposable {
  readonly storage: DomainStorage;
  readonly computes: Computes;
  readonly #origin: HttpOrigin;
  readonly #token: string;
  readonly #timeoutMs: number;
  readonly #ownStorage: DomainStorage & AsyncDisposable;
  #domainId: string | null = null;

  constructor(options: RequestorOptions) {
    const timeoutMs = options.timeoutMs ?? 30_000;
    this.#token = options.token;
    this.#timeoutMs = timeoutMs;
    this.#origin = new HttpOrigin({ baseUrl: options.url, timeoutMs, userAgent: 'millrace' });
    this.#ownStorage = openDomainStorage({
      baseUrl: options.url,
      token: () => options.token,
      clientId: `millrace-requestor/${randomUUID()}`,
      timeoutMs,
    });
    this.storage = this.#ownStorage;
    this.computes = computesOver(this.#origin, '/v1', {
      get: () => Promise.resolve(options.token),
      // It is the only one there is.
      invalidate: () => undefined,
    });
  }

  async submit(job: JobSubmission, options: SubmitOptions = {}): Promise<string> {
    const { idempotencyKey, traceparent } = options;
    const answer = await this.#json(
      {
        method: 'POST',
        path: '/v1/jobs',
        json: job,
        headers: {
          ...(idempotencyKey !== undefined && { 'idempotency-key': idempotencyKey }),
          ...(traceparent !== undefined && { traceparent }),
        },
      },
      options,
    );
    return string(object(answer, 'answer')['job_id'], 'job_id');
  }

  async jobs(query: Parameters<Requestor['jobs']>[0] = {}, options: CallOptions = {}): Promise<JobsPage> {
    const search = new URLSearchParams();
    if (query.domainId !== undefined) search.set('domain_id', query.domainId);
    if (query.status !== undefined) search.set('status', query.status);
    for (const capability of query.capabilities ?? []) search.append('capabilities', capability);
    if (query.limit !== undefined) search.set('limit', String(query.limit));
    if (query.cursor !== undefined) search.set('cursor', query.cursor);
    const text = search.toString();
    const path = text === '' ? '/v1/jobs' : `/v1/jobs?${text}`;
    return (await this.#json({ method: 'GET', path }, options)) as JobsPage;
  }

  async job(id: string, options: CallOptions = {}): Promise<JobDetail> {
    return (await this.#json({ method: 'GET', path: jobPath(id) }, options)) as JobDetail;
  }

  async cancel(
    id: string,
    options: CallOptions = {},
  ): Promise<{ readonly id: string; readonly status: JobStatus; readonly updated_at: string }> {
    const answer = await this.#json({ method: 'POST', path: `${jobPath(id)}/cancel` }, options);
    return answer as { id: string; status: JobStatus; updated_at: string };
  }

  async delete(id: string, options: CallOptions = {}): Promise<void> {
    await this.#json({ method: 'DELETE', path: jobPath(id) }, options);
  }

  async redrive(
    id: string,
    options: CallOptions & { readonly idempotencyKey?: string } = {},
  ): ReturnType<Requestor['redrive']> {
    const { idempotencyKey } = options;
    const answer = await this.#json(
      {
        method: 'POST',
        path: `${jobPath(id)}/redrive`,
        ...(idempotencyKey !== undefined && { headers: { 'idempotency-key': idempotencyKey } }),
      },
      options,
    );
    return answer as Awaited<ReturnType<Requestor['redrive']>>;
  }

  async deadTasks(
    query: NonNullable<Parameters<Requestor['deadTasks']>[0]> = {},
    options: CallOptions = {},
  ): ReturnType<Requestor['deadTasks']> {
    const search = new URLSearchParams();
    const { domainId: domain_id, jobId: job_id, capability, limit, cursor } = query;
    for (const [name, value] of Object.entries({ domain_id, job_id, capability, limit, cursor })) {
      if (value !== undefined) search.set(name, String(value));
    }
    const answer = await this.#json({ method: 'GET', path: `/v1/dead-tasks?${search.toString()}` }, options);
    return answer as Awaited<ReturnType<Requestor['deadTasks']>>;
  }

  async *events(
    id: string,
    options: CallOptions & { readonly after?: number; readonly follow?: boolean } = {},
  ): AsyncGenerator<JobEvent, void, undefined> {
    const { signal } = options;
    let after = options.after ?? 0;
    if (options.follow === false) {
      yield* this.#eventsSoFar(id, after, options);
      return;
    }
    let connected = false;
    let failures = 0;
    let failingSince = 0;
    for (;;) {
      try {
        const response = await this.#send(
          {
            method: 'GET',
            path: `${jobPath(id)}/events?after=${after}`,
            headers: { accept: 'text/event-stream' },
            timeoutMs: STREAM_SILENCE_MS,
          },
          options,
        );
        // There is nothing after the terminal event, which the caller has.
        if (response.status === 204) {
          await response.discard();
          return;
        }
        connected = true;
        failures = 0;
        for await (const event of readEvents(response, signal)) {
          if (event.seq <= after) continue;
          after = event.seq;
          yield event;
          if (isTerminal(event)) return;
        }
        // A server that closes ends its streams in good order.
        failingSince = systemClock.monotonic();
      } catch (error) {
        if (signal?.aborted) throw signal.reason;
        // The first connection is the caller's to judge: there may be nobody at that address.
        if (!connected || !MillraceError.is(error) || error.code !== 'unavailable') throw error;
        if (failures === 0) failingSince = systemClock.monotonic();
        if (systemClock.monotonic() - failingSince >= RECONNECT_MS) throw error;
      }
      const delay = Math.min(LONGEST_RETRY_MS, FIRST_RETRY_MS * 2 ** failures);
      failures += 1;
      await sleep(systemClock, delay * (0.5 + Math.random() / 2), signal);
    }
  }

  /** Page by page, until a page is empty. */
  async *#eventsSoFar(
    id: string,
    from: number,
    options: CallOptions,
  ): AsyncGenerator<JobEvent, void, undefined> {
    for (let after = from; ;) {
      const answer = await this.#json(
        { method: 'GET', path: `${jobPath(id)}/events?after=${after}` },
        options,
      );
      const { items } = answer as { items: JobEvent[] };
      yield* items;
      const last = items.at(-1);
      if (last === undefined) return;
      after = last.seq;
    }
  }

  async taskLog(
    taskId: string,
    query: NonNullable<Parameters<Requestor['taskLog']>[1]> = {},
    options: CallOptions = {},
  ): Promise<TaskLogPage> {
    const { attempt, offset, limit, waitSecs = 0 } = query;
    const search = new URLSearchParams();
    for (const [name, value] of Object.entries({ attempt, offset, limit })) {
      if (value !== undefined) search.set(name, String(value));
    }
    const response = await this.#send(
      {
        method: 'GET',
        path: `${taskPath(taskId)}/logs?${search.toString()}`,
        ...(waitSecs > 0 && { headers: { prefer: `wait=${waitSecs}` } }),
        timeoutMs: this.#timeoutMs + waitSecs * 1000,
      },
      options,
    );
    const bytes = await response.bytes(MAX_LOG_PAGE_BYTES);
    const number = (name: string): number => {
      const value = Number(response.header(name) ?? Number.NaN);
      if (Number.isSafeInteger(value)) return value;
      throw new MillraceError('data_loss', `the log of task ${taskId} came without the header ${name}`);
    };
    return {
      jobId: response.header('millrace-job-id') ?? '',
      attempt: number('millrace-log-attempt'),
      attempts: number('millrace-log-attempts'),
      offset: number('millrace-log-offset'),
      nextOffset: number('millrace-log-next-offset'),
      bytes,
      size: number('millrace-log-size'),
      ended: response.header('millrace-log-ended') === 'true',
      taskEnded: response.header('millrace-task-ended') === 'true',
    };
  }

  async jobLogs(jobId: string, options: CallOptions = {}): ReturnType<Requestor['jobLogs']> {
    const answer = await this.#json({ method: 'GET', path: `${jobPath(jobId)}/logs` }, options);
    return (answer as { items: Awaited<ReturnType<Requestor['jobLogs']>> }).items;
  }

  async explainTask(taskId: string, options: CallOptions = {}): Promise<TaskExplanation> {
    const answer = await this.#json({ method: 'GET', path: `${taskPath(taskId)}/explain` }, options);
    return answer as TaskExplanation;
  }

  async explainJob(jobId: string, options: CallOptions = {}): Promise<JobExplanation> {
    const answer = await this.#json({ method: 'GET', path: `${jobPath(jobId)}/explain` }, options);
    return answer as JobExplanation;
  }

  async addSchedule(schedule: ScheduleDraft, options: CallOptions = {}): Promise<ScheduleRecord> {
    const answer = await this.#json({ method: 'POST', path: '/v1/schedules', json: schedule }, options);
    return answer as ScheduleRecord;
  }

  async schedules(options: CallOptions = {}): Promise<readonly ListedSchedule[]> {
    const answer = await this.#json({ method: 'GET', path: '/v1/schedules' }, options);
    return (answer as { items: ListedSchedule[] }).items;
  }

  async schedule(
    name: string,
    options: CallOptions & { readonly domainId?: string } = {},
  ): Promise<ScheduleRecord> {
    const path = schedulePath(name, options.domainId);
    return (await this.#json({ method: 'GET', path }, options)) as ScheduleRecord;
  }

  async removeSchedule(
    name: string,
    options: CallOptions & { readonly domainId?: string } = {},
  ): Promise<void> {
    await this.#json({ method: 'DELETE', path: schedulePath(name, options.domainId) }, options);
  }

  async nodes(options: CallOptions = {}): Promise<readonly NodeRecord[]> {
    const answer = await this.#json({ method: 'GET', path: '/v1/nodes' }, options);
    return (answer as { nodes: NodeRecord[] }).nodes;
  }

  async domains(options: CallOptions = {}): Promise<readonly DomainStanding[]> {
    const answer = await this.#json({ method: 'GET', path: '/api/v1/domains' }, options);
    return (answer as { domains: DomainStanding[] }).domains;
  }

  async setWeight(domainId: string, weight: number, options: CallOptions = {}): Promise<void> {
    const path = `/api/v1/domains/${encodeURIComponent(domainId)}`;
    await this.#json({ method: 'PUT', path, json: { weight } }, options);
  }

  async queues(options: CallOptions = {}): Promise<QueueReport> {
    return (await this.#json({ method: 'GET', path: '/v1/queues' }, options)) as QueueReport;
  }

  async busyNodes(options: CallOptions = {}): Promise<readonly BusyNode[]> {
    const answer = await this.#json({ method: 'GET', path: '/v1/nodes/busy?mode=all' }, options);
    return (answer as { nodes: BusyNode[] }).nodes;
  }

  async addNode(
    node: { readonly name: string; readonly mode: NodeMode },
    options: CallOptions = {},
  ): Promise<{
    readonly id: string;
    readonly registrationSecret: string;
    readonly registrationCredentials: string;
  }> {
    const answer = await this.#json({ method: 'POST', path: '/api/v1/nodes', json: node }, options);
    const { id, registration_secret } = members<{ id: string; registration_secret: string }>(
      { id: string, registration_secret: string },
      answer,
      'answer',
    );
    return {
      id,
      registrationSecret: registration_secret,
      registrationCredentials: Buffer.from(`${id}:${registration_secret}`).toString('base64'),
    };
  }

  async health(options: CallOptions = {}): Promise<{ readonly version: string; readonly domainId: string }> {
    const answer = await this.#json({ method: 'GET', path: '/health' }, options);
    const { version, domain_id } = members<{ version: string; domain_id: string }>(
      { version: string, domain_id: string },
      answer,
      'answer',
    );
    return { version, domainId: domain_id };
  }

  /** Asked for once: a dispatcher keeps its default domain for life. */
  async #defaultDomain(options: CallOptions): Promise<string> {
    return (this.#domainId ??= (await this.health(options)).domainId);
  }

  async upload(
    bytes: ByteStream | Uint8Array | (() => ByteStream),
    { domainId, ...options }: UploadOptions & { readonly domainId?: string },
  ): Promise<string> {
    return await uploadStream(this.storage, domainId ?? (await this.#defaultDomain(options)), bytes, options);
  }

  async uploadItems(
    items: readonly NewItem[],
    { domainId, ...options }: CallOptions & { readonly domainId?: string } = {},
  ): Promise<string[]> {
    return await uploadItems(this.storage, domainId ?? (await this.#defaultDomain(options)), items, options);
  }

  async close(): Promise<void> {
    await Promise.all([this.#origin.close(), this.#ownStorage[Symbol.asyncDispose]()]);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  async #json(call: Call, options: CallOptions): Promise<unknown> {
    const response = await this.#send(call, options);
    if (response.status === 204) {
      await response.discard();
      return null;
    }
    return await response.json(MAX_ANSWER_BYTES);
  }

  /** @throws MillraceError for every status that is not a success */
  async #send(call: Call, { signal }: CallOptions): Promise<HttpResponse> {
    const response = await this.#origin.request({
      method: call.method,
      path: call.path,
      headers: { ...call.headers, authorization: `Bearer ${this.#token}` },
      ...(call.json === undefined ? {} : { json: call.json }),
      ...(call.timeoutMs === undefined ? {} : { timeoutMs: call.timeoutMs }),
      ...(signal === undefined ? {} : { signal }),
    });
    if (response.status < 200 || response.status > 299) throw await dispatcherError(call, response);
    return response;
  }
}

function jobPath(id: string): string {
  return `/v1/jobs/${encodeURIComponent(id)}`;
}

function schedulePath(name: string, domainId: string | undefined): string {
  const path = `/v1/schedules/${encodeURIComponent(name)}`;
  return domainId === undefined ? path : `${path}?domain_id=${encodeURIComponent(domainId)}`;
}

function taskPath(id: string): string {
  return `/v1/tasks/${encodeURIComponent(id)}`;
}

function isTerminal(event: JobEvent): boolean {
  return event.kind === 'job.completed' || event.kind === 'job.failed' || event.kind === 'job.canceled';
}

/** How long a server may take to end a stream after its last event, before the connection is given up. */
const LAST_BYTES_MS = 1_000;

/**
 * The events of one server-sent event stream. Breaking out ends the connection; but not after the terminal event, when the
 * server ends the stream by itself and the connection serves the next request.
 */
async function* readEvents(
  response: HttpResponse,
  signal: AbortSignal | undefined,
): AsyncGenerator<JobEvent, void, undefined> {
  const { body } = response;
  const decoder = new TextDecoder();
  let text = '';
  let complete = false;
  try {
    const chunks = body.iterator({ destroyOnReturn: false }) as AsyncIterable<Uint8Array>;
    for await (const chunk of chunks) {
      text += decoder.decode(chunk, { stream: true });
      if (text.length > MAX_FRAME_CHARS) {
        throw new MillraceError('data_loss', `an event is larger than ${MAX_FRAME_CHARS} characters`);
      }
      const frames = text.split('\n\n');
      // What follows the last empty line is the beginning of the next frame.
      text = frames.pop() ?? '';
      for (const frame of frames) {
        const event = parseFrame(frame);
        if (event === null) continue;
        complete = isTerminal(event);
        yield event;
      }
    }
  } catch (error) {
    throw MillraceError.is(error) ? error : transportError(error, 'event stream', signal);
  } finally {
    if (complete) letEnd(body);
    else body.destroy();
  }
}

/** Reads what is left, which is nothing but the end. */
function letEnd(body: Readable): void {
  const timer = systemClock.setTimer(() => body.destroy(), LAST_BYTES_MS, { unref: true });
  body.once('close', () => timer.cancel());
  body.once('error', () => timer.cancel());
  body.resume();
}

/** Null for a comment. */
function parseFrame(frame: string): JobEvent | null {
  const data = frame
    .split('\n')
    .filter((line) => line.startsWith('data:'))
    .map((line) => line.slice(line.startsWith('data: ') ? 6 : 5))
    .join('\n');
  if (data === '') return null;
  try {
    const event = object(JSON.parse(data), 'event');
    if (!Number.isSafeInteger(event['seq']) || typeof event['kind'] !== 'string')
      throw new Error('no seq or kind');
    return event as unknown as JobEvent;
  } catch (cause) {
    throw new MillraceError('data_loss', 'the event stream holds something that is no event', { cause });
  }
}
