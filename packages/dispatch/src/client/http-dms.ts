/**
 * DMS over HTTP, for the reference service and for our dispatcher. What ours has beyond the reference is used after
 * `GET {base}/features` announced it; a server without that gets exactly the reference's requests.
 */
import { MillraceError, parseLease, parseLeaseJson, parseTaskSpec, type Json } from '@millrace/runner';
import {
  absent,
  arrayOf,
  boolean,
  counter,
  members,
  object,
  optional,
  parseJson,
  string,
  timestamp,
  url,
  uuid,
} from '@millrace/runner/decode';
import { HttpOrigin, statusError, type HttpResponse } from './http.ts';
import {
  NO_FEATURES,
  type CallOptions,
  type Dms,
  type EndingReport,
  type Features,
  type HeartbeatReply,
  type LeaseHandle,
  type LeaseResult,
  type ReceivedLease,
  type TokenSource,
} from './dms.ts';

export interface HttpDmsOptions {
  /** `DMS_BASE_URL`: `http(s)://host[:port][/path]`; trailing slashes are removed. */
  readonly baseUrl: string;
  readonly tokens: TokenSource;
  /** Time to the response head and longest silence in a body, each; a long poll's wait is added. Default 60,000 ms. */
  readonly timeoutMs?: number;
  /** Default none, like the reference node. */
  readonly userAgent?: string;
}

/** Largest answer read. Newer reference nodes bound theirs so too. */
const MAX_ANSWER_BYTES = 2 * 1024 * 1024;

/** A batch of leases carries as many tasks' parameters. */
const MAX_BATCH_ANSWER_BYTES = 64 * 1024 * 1024;

/** Statuses by which a server tells that it does not know `features`, and not that something is wrong. */
const NOT_THERE = new Set([400, 404, 405, 410, 501]);

/**
 * Opens the client; nothing is sent before the first call. Calls may be concurrent. Disposing ends those under way.
 *
 * @throws MillraceError `invalid_argument` for a base URL that is not http(s)
 */
export function openHttpDms(options: HttpDmsOptions): HttpDms {
  return new HttpDms(options);
}

interface Call {
  readonly method: 'GET' | 'POST';
  readonly path: string;
  readonly json?: unknown;
  readonly headers?: Readonly<Record<string, string>>;
  readonly waitSecs?: number;
}

export class HttpDms implements Dms, AsyncDisposable {
  readonly #origin: HttpOrigin;
  readonly #tokens: TokenSource;
  readonly #timeoutMs: number;
  #features: Features | null = null;

  constructor(options: HttpDmsOptions) {
    this.#timeoutMs = options.timeoutMs ?? 60_000;
    this.#tokens = options.tokens;
    this.#origin = new HttpOrigin({
      baseUrl: options.baseUrl,
      timeoutMs: this.#timeoutMs,
      ...(options.userAgent === undefined ? {} : { userAgent: options.userAgent }),
    });
  }

  async features(options: CallOptions = {}): Promise<Features> {
    if (this.#features !== null) return this.#features;
    const response = await this.#send({ method: 'GET', path: '/features' }, options);
    if (NOT_THERE.has(response.status)) {
      await response.discard();
      this.#features = NO_FEATURES;
    } else {
      const text = await successText('GET /features', response, MAX_ANSWER_BYTES);
      this.#features = decoded('GET /features', response, () => decodeFeatures(text));
    }
    return this.#features;
  }

  async lease(
    request: { readonly max: number; readonly waitSecs: number; readonly start: boolean },
    options: CallOptions = {},
  ): Promise<LeaseResult> {
    const features = await this.features(options);
    const waitSecs = Math.max(0, Math.min(Math.floor(request.waitSecs), features.longPollSecs));
    const start = request.start && features.startOnLease;
    return request.max > 1 && features.batchItems > 0
      ? await this.#leaseMany(Math.min(request.max, features.batchItems), waitSecs, start, options)
      : await this.#leaseOne(waitSecs, start, options);
  }

  async heartbeat(
    lease: LeaseHandle,
    body: { readonly progress: Json; readonly events: readonly Json[] },
    options: CallOptions = {},
  ): Promise<HeartbeatReply> {
    const call = taskCall(lease, 'heartbeat', { progress: body.progress, events: body.events });
    const what = `${call.method} ${call.path}`;
    const response = await this.#send(call, options);
    const text = await successText(what, response, MAX_ANSWER_BYTES);
    return decoded(what, response, () => decodeHeartbeat(text));
  }

  async complete(
    lease: LeaseHandle,
    body: { readonly output_cids: readonly string[]; readonly meta: EndingReport },
    options: CallOptions = {},
  ): Promise<void> {
    await this.#end(taskCall(lease, 'complete', { output_cids: body.output_cids, meta: body.meta }), options);
  }

  async fail(
    lease: LeaseHandle,
    body: { readonly reason: string; readonly details: Json | EndingReport },
    options: CallOptions = {},
  ): Promise<void> {
    await this.#end(taskCall(lease, 'fail', { reason: body.reason, details: body.details }), options);
  }

  async release(
    lease: LeaseHandle,
    reason: 'shutdown' | 'canceled' | 'setup_failed',
    options: CallOptions = {},
  ): Promise<void> {
    await this.#requireLeaseIds('release', options);
    await this.#end(taskCall(lease, 'release', { reason }), options);
  }

  async watch(
    leaseIds: readonly string[],
    waitSecs: number,
    options: CallOptions = {},
  ): Promise<readonly string[]> {
    const features = await this.#requireLeaseIds('watch', options);
    const wait = Math.max(0, Math.min(Math.floor(waitSecs), features.longPollSecs));
    const response = await this.#send(
      {
        method: 'POST',
        path: '/tasks/watch',
        // Leases past the server's bound learn of a cancellation by their next heartbeat.
        json: { lease_ids: leaseIds.slice(0, features.batchItems) },
        headers: { prefer: `wait=${wait}` },
        waitSecs: wait,
      },
      options,
    );
    const text = await successText('POST /tasks/watch', response, MAX_ANSWER_BYTES);
    return decoded('POST /tasks/watch', response, () =>
      arrayOf(uuid)(object(parseJson(text, 'watch answer'), 'watch answer')['lease_ids'], 'lease_ids'),
    );
  }

  async close(): Promise<void> {
    await this.#origin.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  async #leaseOne(waitSecs: number, start: boolean, options: CallOptions): Promise<LeaseResult> {
    const response = await this.#send(
      {
        method: 'GET',
        path: '/tasks',
        headers: {
          ...(waitSecs > 0 ? { prefer: `wait=${waitSecs}` } : {}),
          ...(start ? { 'millrace-start': '1' } : {}),
        },
        waitSecs,
      },
      options,
    );
    const nothing = await withoutLease(response);
    if (nothing !== null) return nothing;
    const text = await successText('/tasks', response, MAX_ANSWER_BYTES);
    return decoded('/tasks', response, () => ({
      kind: 'leases',
      leases: [
        {
          leaseId: optional(uuid)(response.header('millrace-lease-id'), 'millrace-lease-id'),
          envelope: parseLeaseJson(text),
        },
      ],
    }));
  }

  async #leaseMany(
    max: number,
    waitSecs: number,
    start: boolean,
    options: CallOptions,
  ): Promise<LeaseResult> {
    const response = await this.#send(
      {
        method: 'POST',
        path: '/tasks/lease',
        json: { max, start },
        headers: waitSecs > 0 ? { prefer: `wait=${waitSecs}` } : {},
        waitSecs,
      },
      options,
    );
    const nothing = await withoutLease(response);
    if (nothing !== null) return nothing;
    const text = await successText('/tasks/lease', response, MAX_BATCH_ANSWER_BYTES);
    const leases = decoded('/tasks/lease', response, () => decodeLeases(text));
    return leases.length === 0 ? { kind: 'none' } : { kind: 'leases', leases };
  }

  async #end(call: Call, options: CallOptions): Promise<void> {
    const response = await this.#send(call, options);
    if (!isSuccess(response)) throw await statusError(`${call.method} ${call.path}`, response);
    await response.discard();
  }

  async #requireLeaseIds(what: string, options: CallOptions): Promise<Features> {
    const features = await this.features(options);
    if (!features.leaseIds) {
      throw new MillraceError('unimplemented', `${this.#origin.baseUrl} does not offer ${what}`);
    }
    return features;
  }

  /** One request; a 401 is answered once by a fresh token, and the second answer counts whatever it is. */
  async #send(call: Call, options: CallOptions): Promise<HttpResponse> {
    const token = await this.#token(options);
    const response = await this.#request(call, token, options);
    if (response.status !== 401) return response;
    await response.discard();
    this.#tokens.invalidate(token);
    return await this.#request(call, await this.#token(options), options);
  }

  async #token(options: CallOptions): Promise<string> {
    try {
      return await this.#tokens.get(options);
    } catch (error) {
      if (options.signal?.aborted || !MillraceError.is(error)) throw error;
      throw new MillraceError(error.code, `token provider: ${error.message}`, {
        cause: error,
        retryable: error.retryable,
        details: error.details,
      });
    }
  }

  async #request(call: Call, token: string, { signal }: CallOptions): Promise<HttpResponse> {
    return await this.#origin.request({
      method: call.method,
      path: call.path,
      headers: {
        ...call.headers,
        // As the reference: a token no header can carry is sent as one no server will take.
        authorization: `Bearer ${/^[\t\x20-\x7e]+$/.test(token) ? token : 'INVALID'}`,
      },
      timeoutMs: this.#timeoutMs + (call.waitSecs ?? 0) * 1000,
      ...(call.json === undefined ? {} : { json: call.json }),
      ...(signal === undefined ? {} : { signal }),
    });
  }
}

function taskCall(lease: LeaseHandle, verb: string, json: unknown): Call {
  return {
    method: 'POST',
    path: `/tasks/${lease.taskId}/${verb}`,
    json,
    headers: lease.leaseId === null ? {} : { 'millrace-lease-id': lease.leaseId },
  };
}

function isSuccess(response: HttpResponse): boolean {
  return response.status >= 200 && response.status <= 299;
}

/** The answers that carry no lease and are no error. */
async function withoutLease(response: HttpResponse): Promise<LeaseResult | null> {
  if (response.status !== 204 && response.status !== 409) return null;
  await response.discard();
  return { kind: response.status === 204 ? 'none' : 'busy' };
}

async function successText(what: string, response: HttpResponse, maxBytes: number): Promise<string> {
  if (!isSuccess(response)) throw await statusError(what, response);
  return await response.text(maxBytes);
}

/** What is wrong with an answer is `data_loss`, and worth trying again. */
function decoded<T>(what: string, response: HttpResponse, decode: () => T): T {
  try {
    return decode();
  } catch (error) {
    throw new MillraceError(
      'data_loss',
      `${what}: undecodable answer: ${MillraceError.from(error).message}`,
      { cause: error, retryable: true, details: { status: response.status } },
    );
  }
}

function decodeFeatures(text: string): Features {
  const raw = members<{
    long_poll_secs: number;
    batch_items: number;
    lease_ids: boolean;
    start_on_lease: boolean;
    registration_interval_secs: number | null;
  }>(
    {
      long_poll_secs: absent(counter, () => 0),
      batch_items: absent(counter, () => 0),
      lease_ids: absent(boolean, () => false),
      start_on_lease: absent(boolean, () => false),
      registration_interval_secs: optional(counter),
    },
    parseJson(text, 'features'),
    'features',
  );
  return {
    longPollSecs: raw.long_poll_secs,
    batchItems: raw.batch_items,
    leaseIds: raw.lease_ids,
    startOnLease: raw.start_on_lease,
    registrationIntervalSecs: raw.registration_interval_secs,
  };
}

function decodeLeases(text: string): ReceivedLease[] {
  const { leases } = object(parseJson(text, 'leases'), 'leases');
  return arrayOf((value, path): ReceivedLease => ({
    leaseId: optional(uuid)(object(value, path)['lease_id'], `${path}.lease_id`),
    envelope: parseLease(value, path),
  }))(leases, 'leases');
}

function decodeHeartbeat(text: string): HeartbeatReply {
  return members<HeartbeatReply>(
    {
      access_token: optional(string),
      access_token_expires_at: optional(timestamp),
      lease_expires_at: optional(timestamp),
      cancel: optional(boolean),
      status: optional(string),
      domain_id: optional(uuid),
      domain_server_url: optional(url),
      task: optional(parseTaskSpec),
      task_id: optional(uuid),
      job_id: optional(uuid),
      attempts: optional(counter),
      max_attempts: optional(counter),
      deps_remaining: optional(counter),
    },
    parseJson(text, 'heartbeat answer'),
    'heartbeat answer',
  );
}
