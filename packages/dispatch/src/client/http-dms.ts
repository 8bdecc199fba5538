/**
 * DMS over HTTP, for the reference service and for our dispatcher. What ours has beyond the reference is used after
 * `GET {base}/features` announced it; a server without that gets exactly the reference's requests.
 */
import {
  MillraceError,
  parseLease,
  parseLeaseJson,
  parseTaskSpec,
  type Json,
  type JsonObject,
} from '@millrace/runner';
import {
  type Decoder,
  absent,
  arrayOf,
  boolean,
  checkSpelling,
  counter,
  members,
  object,
  optional,
  parseJson,
  secret,
  string,
  timestamp,
  url,
  uuid,
} from '@millrace/runner/decode';
import { HttpOrigin, codeOfStatus, dateOf, statusError, type HttpResponse } from './http.ts';
import type { ProxySettings } from './proxy.ts';
import {
  NO_FEATURES,
  type CallOptions,
  type Completion,
  type Dms,
  type EndingReport,
  type ExchangeResult,
  type Features,
  type HeartbeatReply,
  type LeaseHandle,
  type LeaseQuery,
  type LeaseResult,
  type LogAnswer,
  type LogPiece,
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
  /** Default none. */
  readonly proxy?: ProxySettings;
}

/** Largest answer read. Newer reference nodes bound theirs so too. */
const MAX_ANSWER_BYTES = 2 * 1024 * 1024;

/** A batch of leases carries as many tasks' parameters. */
const MAX_BATCH_ANSWER_BYTES = 64 * 1024 * 1024;

/**
 * Statuses to `features` after which it is worth asking again. By every other one a server, or what stands before it, tells
 * in its own way that it does not know the path; that must not keep a node from working for it.
 */
const ASK_AGAIN = new Set([408, 429, 502, 503, 504]);

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
      ...(options.proxy === undefined ? {} : { proxy: options.proxy }),
    });
  }

  async features(options: CallOptions = {}): Promise<Features> {
    if (this.#features !== null) return this.#features;
    const response = await this.#send({ method: 'GET', path: '/features' }, options);
    if (ASK_AGAIN.has(response.status)) throw await statusError('GET /features', response);
    if (isSuccess(response)) {
      this.#features = decodeFeatures(await response.text(MAX_ANSWER_BYTES));
    } else {
      await response.discard();
      this.#features = NO_FEATURES;
    }
    return this.#features;
  }

  async lease(request: LeaseQuery, options: CallOptions = {}): Promise<LeaseResult> {
    const features = await this.features(options);
    const query: LeaseQuery = {
      max: Math.min(request.max, features.batchItems),
      waitSecs: Math.max(0, Math.min(Math.floor(request.waitSecs), features.longPollSecs)),
      start: request.start && features.startOnLease,
      capabilities: (features.leaseIds ? request.capabilities : undefined) ?? [],
    };
    return query.max > 1 ? await this.#leaseMany(query, options) : await this.#leaseOne(query, options);
  }

  async heartbeat(
    lease: LeaseHandle,
    body: Parameters<Dms['heartbeat']>[1],
    options: CallOptions = {},
  ): Promise<HeartbeatReply> {
    const { progress, events, logged } = body;
    const call = taskCall(lease, 'heartbeat', { progress, events, ...(logged && { logged }) });
    const what = `${call.method} ${call.path}`;
    const response = await this.#send(call, options);
    const serverTimeMs = latestTimeOf(response);
    const text = await successText(what, response, MAX_ANSWER_BYTES);
    return decoded(what, response, () => ({ ...decodeHeartbeat(text), serverTimeMs }));
  }

  async complete(
    lease: LeaseHandle,
    body: { readonly output_cids: readonly string[]; readonly meta: EndingReport },
    options: CallOptions = {},
  ): Promise<void> {
    await this.#end(taskCall(lease, 'complete', { output_cids: body.output_cids, meta: body.meta }), options);
  }

  async exchange(
    completions: readonly Completion[],
    next: Omit<LeaseQuery, 'waitSecs'> | null,
    options: CallOptions = {},
  ): Promise<ExchangeResult> {
    const features = await this.features(options);
    if (features.leaseOnComplete !== true) {
      throw new MillraceError('unimplemented', `${this.#origin.baseUrl} does not offer exchange`);
    }
    const items = completions.map(({ lease, output_cids, meta }) => ({
      task_id: lease.taskId,
      lease_id: lease.leaseId,
      output_cids,
      meta,
    }));
    const lease = next !== null && {
      max: Math.min(next.max, features.batchItems),
      start: next.start && features.startOnLease,
      ...(next.capabilities !== undefined &&
        next.capabilities.length > 0 && { capabilities: next.capabilities }),
    };
    const what = 'POST /tasks/complete';
    const response = await this.#send(
      { method: 'POST', path: '/tasks/complete', json: { items, ...(lease !== false && { lease }) } },
      options,
    );
    const serverTimeMs = latestTimeOf(response);
    const text = await successText(what, response, MAX_BATCH_ANSWER_BYTES);
    return decoded(what, response, () => decodeExchange(text, completions.length, serverTimeMs));
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
    options: CallOptions & { readonly details?: JsonObject } = {},
  ): Promise<void> {
    const { endingUsage } = await this.#requireLeaseIds('release', options);
    const { details } = options;
    const body = endingUsage && details !== undefined ? { reason, details } : { reason };
    await this.#end(taskCall(lease, 'release', body), options);
  }

  async appendLogs(pieces: readonly LogPiece[], options: CallOptions = {}): Promise<readonly LogAnswer[]> {
    const { taskLogBytes = 0 } = await this.features(options);
    if (taskLogBytes === 0) {
      throw new MillraceError('unimplemented', `${this.#origin.baseUrl} does not keep logs of tasks`);
    }
    const items = pieces.map(({ lease, offset, lines }) => ({
      task_id: lease.taskId,
      lease_id: lease.leaseId,
      offset,
      lines,
    }));
    const response = await this.#send({ method: 'POST', path: '/tasks/logs', json: { items } }, options);
    const text = await successText('POST /tasks/logs', response, MAX_ANSWER_BYTES);
    return decoded('POST /tasks/logs', response, () => decodeLogAnswers(text, pieces.length));
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

  async #leaseOne({ waitSecs, start, capabilities }: LeaseQuery, options: CallOptions): Promise<LeaseResult> {
    const response = await this.#send(
      {
        method: 'GET',
        path: `/tasks${capabilityFilter(capabilities ?? [])}`,
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
    const serverTimeMs = latestTimeOf(response);
    const text = await successText('/tasks', response, MAX_ANSWER_BYTES);
    return decoded('/tasks', response, () => ({
      kind: 'leases',
      leases: [
        {
          leaseId: optional(uuid)(response.header('millrace-lease-id'), 'millrace-lease-id'),
          envelope: parseLeaseJson(text),
          serverTimeMs,
        },
      ],
    }));
  }

  async #leaseMany(
    { max, waitSecs, start, capabilities = [] }: LeaseQuery,
    options: CallOptions,
  ): Promise<LeaseResult> {
    const response = await this.#send(
      {
        method: 'POST',
        path: '/tasks/lease',
        json: { max, start, ...(capabilities.length === 0 ? {} : { capabilities }) },
        headers: waitSecs > 0 ? { prefer: `wait=${waitSecs}` } : {},
        waitSecs,
      },
      options,
    );
    const nothing = await withoutLease(response);
    if (nothing !== null) return nothing;
    const serverTimeMs = latestTimeOf(response);
    const text = await successText('/tasks/lease', response, MAX_BATCH_ANSWER_BYTES);
    const leases = decoded('/tasks/lease', response, () =>
      decodeLeases(object(parseJson(text, 'leases'), 'leases')['leases'], serverTimeMs),
    );
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

/** A date is cut to its second; a lease shall rather be thought shorter than longer. */
function latestTimeOf(response: HttpResponse): number | null {
  const at = dateOf(response);
  return at === null ? null : at + 999;
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

/** Not a word of ours: an answer to a path the server does not know, whatever its status says. */
function decodeFeatures(text: string): Features {
  let raw: { readonly [M in keyof typeof FEATURES]: ReturnType<(typeof FEATURES)[M]> };
  try {
    raw = members(FEATURES, parseJson(text, 'features'), 'features');
  } catch {
    return NO_FEATURES;
  }
  return {
    longPollSecs: raw.long_poll_secs,
    batchItems: raw.batch_items,
    leaseIds: raw.lease_ids,
    startOnLease: raw.start_on_lease,
    leaseOnComplete: raw.lease_on_complete,
    endingUsage: raw.ending_usage,
    taskLogBytes: raw.task_logs,
    registrationIntervalSecs: raw.registration_interval_secs,
  };
}

const FEATURES = {
  long_poll_secs: absent(counter, () => 0),
  batch_items: absent(counter, () => 0),
  lease_ids: absent(boolean, () => false),
  start_on_lease: absent(boolean, () => false),
  lease_on_complete: absent(boolean, () => false),
  ending_usage: absent(boolean, () => false),
  task_logs: absent(counter, () => 0),
  registration_interval_secs: optional(counter),
};

/** Longer filters are left out: they save a wrong lease, a URL past a server's bound would cost all of them. */
const MAX_FILTER_BYTES = 4096;

function capabilityFilter(capabilities: readonly string[]): string {
  const query = capabilities.map((capability) => `capability=${encodeURIComponent(capability)}`).join('&');
  return query === '' || query.length > MAX_FILTER_BYTES ? '' : `?${query}`;
}

function decodeExchange(text: string, expected: number, serverTimeMs: number | null): ExchangeResult {
  const { results, leases = [] } = object(parseJson(text, 'exchange answer'), 'exchange answer');
  const refusals = arrayOf((value, path): MillraceError | null => {
    const { status, error } = object(value, path);
    return status === 200 ? null : itemError(status, error, path);
  })(results, 'results');
  if (refusals.length !== expected) throw new Error(`${refusals.length} answers to ${expected} completions`);
  return { refusals, leases: decodeLeases(leases, serverTimeMs) };
}

/** What one item of a batch was answered, as the error of a call for it alone. */
function itemError(status: unknown, error: unknown, path: string): MillraceError {
  const number = counter(status, path);
  const code = codeOfStatus(number);
  return new MillraceError(code, string(object(error, path)['message'], path), {
    retryable: code === 'unavailable' || number === 429,
    details: { status: number },
  });
}

function decodeLeases(leases: unknown, serverTimeMs: number | null): ReceivedLease[] {
  return arrayOf((value, path): ReceivedLease => ({
    leaseId: optional(uuid)(object(value, path)['lease_id'], `${path}.lease_id`),
    envelope: parseLease(value, path),
    serverTimeMs,
  }))(leases, 'leases');
}

function decodeLogAnswers(text: string, expected: number): LogAnswer[] {
  const { results } = object(parseJson(text, 'log answer'), 'log answer');
  const answers = arrayOf((value, path): LogAnswer => {
    const { status, body, error } = object(value, path);
    if (status === 200) return { nextOffset: counter(object(body, path)['next_offset'], path) };
    const { next_offset: wanted } = object(error, path);
    if (wanted !== undefined) return { nextOffset: counter(wanted, path) };
    return { error: itemError(status, error, path) };
  })(results, 'results');
  if (answers.length !== expected) throw new Error(`${answers.length} answers to ${expected} pieces`);
  return answers;
}

type WireReply = Omit<HeartbeatReply, 'serverTimeMs'>;

const HEARTBEAT: { readonly [K in keyof WireReply]: Decoder<WireReply[K]> } = {
  access_token: optional(secret),
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
};

function decodeHeartbeat(text: string): WireReply {
  const value = parseJson(text, 'heartbeat answer');
  checkSpelling(HEARTBEAT, text, 'heartbeat answer');
  return members<WireReply>(HEARTBEAT, value, 'heartbeat answer');
}
