/**
 * A client of the Docker Engine API, as Docker and Podman serve it: the dozen calls a container's life needs.
 *
 * Each call takes a signal and ends by itself after a time, so nothing hangs on an engine that stopped answering. A call that cannot reach the engine is
 * `unavailable`. Connections are not kept: an engine that was started again must not be met through a dead one, and a new one over a
 * socket file costs less than the call.
 */
import { Pool, errors as undiciErrors } from 'undici';
import type { Dispatcher } from 'undici';
import { MillraceError, systemClock, timeoutSignal } from '@millrace/runner';
import type { Clock, ErrorCode } from '@millrace/runner';
import { DEFAULT_ENGINE_HOST, parseEngineHost } from './engine-address.ts';
import type { EngineAddress } from './engine-address.ts';
import { demultiplex } from './raw-stream.ts';
import type { OutputPiece } from './raw-stream.ts';

export interface EngineOptions {
  /** `unix:///path` or `tcp://host:port`. Default: the environment's `DOCKER_HOST`, else `unix:///var/run/docker.sock`. */
  readonly host?: string;
  /** How long one call may take, unless it says otherwise. Default 30,000 ms. */
  readonly callMs?: number;
  readonly clock?: Clock;
}

export interface CallOptions {
  /** The call rejects with its reason. */
  readonly signal?: AbortSignal | undefined;
  /** Instead of the engine's `callMs`. Null: as long as it takes. */
  readonly timeoutMs?: number | null;
}

export interface EngineVersion {
  /** `Docker` or `Podman`, as far as it tells. */
  readonly name: string;
  /** The engine's own version. */
  readonly version: string;
  /** The version of the API that is spoken with it. */
  readonly apiVersion: string;
}

export interface EngineInfo {
  /** The engine runs without root, so root in a container is its user. */
  readonly rootless: boolean;
  /** Whether it can limit these at all. */
  readonly limits: {
    readonly memory: boolean;
    readonly swap: boolean;
    readonly cpus: boolean;
    readonly pids: boolean;
  };
}

export interface ImageInfo {
  /** `sha256:…` of its configuration. */
  readonly id: string;
  /** Folders it declares as volumes. */
  readonly volumes: readonly string[];
  /** Where its programs start. */
  readonly workdir: string;
}

export interface ContainerState {
  readonly status: string;
  readonly running: boolean;
  /** Of its first process, in the engine's view; null when none runs. */
  readonly pid: number | null;
  readonly exitCode: number;
  readonly oomKilled: boolean;
}

export interface ContainerStats {
  /** Memory in use without the page cache, where the engine tells. */
  readonly memoryBytes: number;
  /** The most so far, where the kernel keeps it (cgroup v1), else `memoryBytes`. */
  readonly peakBytes: number;
  readonly cpuMs: number;
  readonly pids: number;
}

export interface ListedContainer {
  readonly id: string;
  readonly names: readonly string[];
  readonly labels: Readonly<Record<string, string>>;
}

/** What `create` takes, of the API's many members those used here. */
export interface ContainerConfig {
  readonly Image: string;
  readonly Entrypoint?: readonly string[];
  readonly Cmd?: readonly string[];
  readonly Env: readonly string[];
  readonly User: string;
  readonly WorkingDir?: string;
  readonly Labels: Readonly<Record<string, string>>;
  readonly StopSignal?: string;
  readonly NetworkDisabled: boolean;
  readonly Healthcheck?: { readonly Test: readonly string[] };
  readonly HostConfig: Readonly<Record<string, unknown>>;
}

/** The API versions this client was written for; what it uses is the same in all of them. */
const OLDEST_API = [1, 40] as const;
const NEWEST_API = [1, 51] as const;
const DEFAULT_CALL_MS = 30_000;
const CONNECT_MS = 10_000;
const MAX_ANSWER_BYTES = 8 * 1024 * 1024;
const MAX_PULL_LINE_BYTES = 256 * 1024;

type Method = 'GET' | 'POST' | 'DELETE';

interface Request {
  readonly method: Method;
  /** Below the version, with its query. */
  readonly path: string;
  readonly body?: unknown;
  /** What is done, for messages: `create container x`. */
  readonly doing: string;
  /** Status codes that are an answer and no error. */
  readonly accept?: readonly number[];
}

interface Reply {
  readonly status: number;
  readonly body: Dispatcher.ResponseData['body'];
}

/**
 * One engine. Calls may be made concurrently.
 *
 * Errors of all calls: `unavailable` (no engine there, or it stopped answering), `deadline_exceeded` (the call's time ran out),
 * `not_found`, `failed_precondition` (conflict with the state of the thing; or the engine failed at it, with its words), `invalid_argument`,
 * `permission_denied` (also: the socket file may not be opened), `resource_exhausted` (an answer beyond all measure).
 */
export class ContainerEngine implements AsyncDisposable {
  /** Where it is, for messages. */
  readonly host: string;
  readonly #address: EngineAddress;
  readonly #pool: Pool;
  readonly #clock: Clock;
  readonly #callMs: number;
  #version: EngineVersion | null = null;
  #closed: Promise<void> | null = null;

  /** Connects with the first call. @throws MillraceError `invalid_argument` for a host of another kind */
  constructor(options: EngineOptions = {}) {
    const { DOCKER_HOST, DOCKER_TLS_VERIFY } = process.env;
    const given = options.host ?? (DOCKER_HOST || DEFAULT_ENGINE_HOST);
    this.#address = parseEngineHost(given);
    if (this.#address.socketPath === null && options.host === undefined && DOCKER_TLS_VERIFY) {
      throw new MillraceError(
        'invalid_argument',
        "DOCKER_TLS_VERIFY asks for TLS, which the container runner does not speak; use the engine's socket file or a local tunnel to it",
      );
    }
    this.host = this.#address.host;
    this.#clock = options.clock ?? systemClock;
    this.#callMs = options.callMs ?? DEFAULT_CALL_MS;
    this.#pool = new Pool(this.#address.origin, {
      connections: null,
      pipelining: 0,
      headersTimeout: 0,
      bodyTimeout: 0,
      connect: {
        timeout: CONNECT_MS,
        ...(this.#address.socketPath === null ? {} : { socketPath: this.#address.socketPath }),
      },
    });
  }

  /** Who it is, and which API version is spoken; asked once. @throws also `unimplemented` for an engine too old or too new */
  async version(options: CallOptions = {}): Promise<EngineVersion> {
    this.#version ??= await this.#json(
      { method: 'GET', path: '/version', doing: 'ask for the version' },
      options,
      readVersion,
      false,
    );
    return this.#version;
  }

  async ping(options: CallOptions = {}): Promise<void> {
    await this.#text({ method: 'GET', path: '/_ping', doing: 'ping' }, options, false);
  }

  async info(options: CallOptions = {}): Promise<EngineInfo> {
    return await this.#json({ method: 'GET', path: '/info', doing: 'ask what it can do' }, options, readInfo);
  }

  /** Null when the engine has no such image. */
  async inspectImage(image: string, options: CallOptions = {}): Promise<ImageInfo | null> {
    const request: Request = {
      method: 'GET',
      path: `/images/${encodeURI(image)}/json`,
      doing: `look at image ${image}`,
    };
    return await orNull(this.#json(request, options, readImage));
  }

  /** Resolves when it is there. @throws also `not_found` and whatever the registry said, as `failed_precondition` */
  async pullImage(image: string, options: CallOptions = {}): Promise<void> {
    // Without a tag the engine would pull all there are.
    const pinned = /(:[^/]+|@sha256:[0-9a-f]+)$/.test(image);
    const path = `/images/create?fromImage=${encodeURIComponent(image)}${pinned ? '' : '&tag=latest'}`;
    const doing = `pull image ${image}`;
    await this.#call({ method: 'POST', path, doing }, options, async (reply) => {
      // Status 200 is sent before the first byte is fetched; what went wrong later is in a line of the answer.
      for await (const line of lines(reply.body)) {
        const { error } = readRecord(parseJson(line, doing));
        if (typeof error === 'string') {
          throw new MillraceError(
            'failed_precondition',
            `container engine ${this.host} could not ${doing}: ${cut(error)}`,
          );
        }
      }
    });
  }

  /** The new container's id. */
  async createContainer(name: string, config: ContainerConfig, options: CallOptions = {}): Promise<string> {
    const path = `/containers/create?name=${encodeURIComponent(name)}`;
    return await this.#json(
      { method: 'POST', path, body: config, doing: `create container ${name}` },
      options,
      (value) => {
        const id = readRecord(value)['Id'];
        return typeof id === 'string' && id !== '' ? id : strange('create a container', value);
      },
    );
  }

  /** Harmless when it runs already. */
  async startContainer(id: string, options: CallOptions = {}): Promise<void> {
    await this.#text(
      { method: 'POST', path: `/containers/${id}/start`, doing: `start container ${short(id)}` },
      options,
    );
  }

  /**
   * What the container prints from now on. Call before `startContainer` to miss nothing. The container is held up by whoever reads too slowly.
   * Ends with the container, or with the engine. `timeoutMs` counts until the stream is open.
   */
  async attach(id: string, options: CallOptions = {}): Promise<AsyncIterable<OutputPiece> & Disposable> {
    const path = `/containers/${id}/attach?stream=1&stdout=1&stderr=1`;
    const opened = await this.#open(
      { method: 'POST', path, doing: `attach to container ${short(id)}` },
      options,
    );
    const { body } = opened.reply;
    opened.settle();
    const host = this.host;
    return {
      async *[Symbol.asyncIterator]() {
        try {
          yield* demultiplex(body);
        } catch (error) {
          throw MillraceError.is(error) ? error : unreachable(host, 'read the output', error);
        }
      },
      [Symbol.dispose]: () => {
        // Destroying an unread body is reported as an error of it, which nobody waits for here.
        body.on('error', () => undefined);
        body.destroy();
      },
    };
  }

  /** Waits for the container to end; its exit status, 128 and more for a signal. Waits without limit unless `timeoutMs` is given. */
  async waitContainer(id: string, options: CallOptions = {}): Promise<number> {
    const request: Request = {
      method: 'POST',
      path: `/containers/${id}/wait?condition=not-running`,
      doing: `wait for container ${short(id)}`,
    };
    return await this.#json(request, { timeoutMs: null, ...options }, (value) => {
      const status = readRecord(value)['StatusCode'];
      return typeof status === 'number' ? status : strange('wait for a container', value);
    });
  }

  /** False when it does not run (any more). `signal` is a name such as `SIGTERM`, or a number. */
  async signalContainer(id: string, signal: string, options: CallOptions = {}): Promise<boolean> {
    const path = `/containers/${id}/kill?signal=${encodeURIComponent(signal)}`;
    try {
      await this.#text({ method: 'POST', path, doing: `send ${signal} to container ${short(id)}` }, options);
      return true;
    } catch (error) {
      // Docker says 409 when it does not run, Podman 409 or 500; only a look tells it from other failures.
      if (!MillraceError.is(error) || (error.code !== 'failed_precondition' && error.code !== 'not_found'))
        throw error;
      if ((await this.inspectContainer(id, options))?.running) throw error;
      return false;
    }
  }

  /** Null when the engine knows no such container. */
  async inspectContainer(id: string, options: CallOptions = {}): Promise<ContainerState | null> {
    const request: Request = {
      method: 'GET',
      path: `/containers/${id}/json`,
      doing: `look at container ${short(id)}`,
    };
    return await orNull(this.#json(request, options, readContainer));
  }

  /** Null for a container that does not run. */
  async stats(id: string, options: CallOptions = {}): Promise<ContainerStats | null> {
    const request: Request = {
      method: 'GET',
      path: `/containers/${id}/stats?stream=false&one-shot=true`,
      doing: `measure container ${short(id)}`,
      accept: [409],
    };
    return await orNull(this.#json(request, options, readStats));
  }

  /** Kills it if it runs, and removes it with its anonymous volumes. Harmless when it is gone or going. */
  async removeContainer(id: string, options: CallOptions = {}): Promise<void> {
    await this.#text(
      {
        method: 'DELETE',
        path: `/containers/${id}?force=true&v=true`,
        doing: `remove container ${short(id)}`,
        accept: [404, 409],
      },
      options,
    );
  }

  /** All containers with these labels, running or not. */
  async listContainers(
    labels: Readonly<Record<string, string>>,
    options: CallOptions = {},
  ): Promise<readonly ListedContainer[]> {
    const label = Object.entries(labels).map(([name, value]) => `${name}=${value}`);
    const path = `/containers/json?all=true&filters=${encodeURIComponent(JSON.stringify({ label }))}`;
    return await this.#json({ method: 'GET', path, doing: 'list containers' }, options, (value) =>
      Array.isArray(value) ? value.map(readListed) : strange('list containers', value),
    );
  }

  /** Ends all calls under way, as `unavailable`. Harmless when repeated. */
  close(): Promise<void> {
    this.#closed ??= this.#pool.destroy();
    return this.#closed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #json<T>(
    request: Request,
    options: CallOptions,
    read: (value: unknown) => T,
    versioned = true,
  ): Promise<T> {
    const { text } = await this.#text(request, options, versioned);
    return read(parseJson(text, request.doing));
  }

  async #text(
    request: Request,
    options: CallOptions,
    versioned = true,
  ): Promise<{ status: number; text: string }> {
    return await this.#call(
      request,
      options,
      async (reply) => ({ status: reply.status, text: await readText(reply.body, request.doing) }),
      versioned,
    );
  }

  async #call<T>(
    request: Request,
    options: CallOptions,
    use: (reply: Reply) => Promise<T>,
    versioned = true,
  ): Promise<T> {
    const opened = await this.#open(request, options, versioned);
    try {
      return await use(opened.reply);
    } catch (error) {
      throw opened.explain(error);
    } finally {
      opened.settle();
    }
  }

  /** Sends the request and resolves with an answer that is no error. `settle` ends the watch over time and signal. */
  async #open(
    request: Request,
    options: CallOptions,
    versioned = true,
  ): Promise<{ readonly reply: Reply; explain(error: unknown): unknown; settle(): void }> {
    const prefix = versioned ? `/v${(await this.version({ signal: options.signal })).apiVersion}` : '';
    const timeoutMs = options.timeoutMs === undefined ? this.#callMs : options.timeoutMs;
    const { doing } = request;
    // Time and signal reach the request through a controller of its own: a stream that is open outlives both.
    const controller = new AbortController();
    const late = (): MillraceError =>
      new MillraceError(
        'deadline_exceeded',
        `container engine ${this.host} did not ${doing} within ${timeoutMs} ms`,
        {
          retryable: true,
        },
      );
    const timer = timeoutMs === null ? null : timeoutSignal(this.#clock, timeoutMs, late);
    const abort = AbortSignal.any([options.signal, timer?.signal].filter((signal) => signal !== undefined));
    const onAbort = (): void => controller.abort(abort.reason);
    abort.addEventListener('abort', onAbort, { once: true });
    if (abort.aborted) onAbort();
    const settle = (): void => {
      timer?.[Symbol.dispose]();
      abort.removeEventListener('abort', onAbort);
    };
    const explain = (error: unknown): unknown => {
      if (controller.signal.aborted) return controller.signal.reason;
      return MillraceError.is(error) ? error : unreachable(this.host, doing, error);
    };
    try {
      const response = await this.#pool.request({
        method: request.method,
        path: prefix + request.path,
        signal: controller.signal,
        headers: request.body === undefined ? {} : { 'content-type': 'application/json' },
        body: request.body === undefined ? null : JSON.stringify(request.body),
      });
      const reply: Reply = { status: response.statusCode, body: response.body };
      if (reply.status >= 400 && !request.accept?.includes(reply.status)) {
        throw refusal(this.host, doing, reply.status, await readText(reply.body, doing));
      }
      return { reply, explain, settle };
    } catch (error) {
      settle();
      throw explain(error);
    }
  }
}

const STATUS_CODES: Readonly<Record<number, ErrorCode>> = {
  400: 'invalid_argument',
  401: 'permission_denied',
  403: 'permission_denied',
  404: 'not_found',
  409: 'failed_precondition',
  500: 'failed_precondition',
  501: 'unimplemented',
};

function refusal(host: string, doing: string, status: number, text: string): MillraceError {
  let message = text;
  try {
    message = readString(readRecord(JSON.parse(text))['message']) || text;
  } catch {
    // Not an engine, or one that answers in plain text: its words are all there is.
  }
  return new MillraceError(
    STATUS_CODES[status] ?? 'unavailable',
    `container engine ${host} could not ${doing}: ${cut(message.trim()) || `status ${status}`}`,
    { details: { status } },
  );
}

/** Errors of the connection, in words. */
function unreachable(host: string, doing: string, cause: unknown): MillraceError {
  const code = cause instanceof Error && 'code' in cause ? String(cause.code) : '';
  if (code === 'EACCES' || code === 'EPERM') {
    return new MillraceError(
      'permission_denied',
      `the node may not open the container engine's socket ${host}; add its user to the socket's group, or use a rootless engine`,
      { cause },
    );
  }
  const absent =
    code === 'ENOENT' || code === 'ECONNREFUSED' || cause instanceof undiciErrors.ConnectTimeoutError;
  return new MillraceError(
    'unavailable',
    absent
      ? `no container engine answers at ${host}; start Docker or Podman there, or name another one in DOCKER_HOST or engine.host`
      : `the container engine at ${host} went away while asked to ${doing}`,
    { cause },
  );
}

async function readText(body: Reply['body'], doing: string): Promise<string> {
  const chunks: Uint8Array[] = [];
  let bytes = 0;
  for await (const chunk of body as AsyncIterable<Uint8Array>) {
    bytes += chunk.byteLength;
    if (bytes > MAX_ANSWER_BYTES) {
      throw new MillraceError(
        'resource_exhausted',
        `the container engine's answer to "${doing}" is longer than ${MAX_ANSWER_BYTES} bytes`,
      );
    }
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString('utf8');
}

async function* lines(body: AsyncIterable<Uint8Array>): AsyncGenerator<string, void, void> {
  let rest = Buffer.alloc(0);
  for await (const chunk of body) {
    rest = Buffer.concat([rest, chunk]);
    for (let end = rest.indexOf(10); end >= 0; end = rest.indexOf(10)) {
      const line = rest.subarray(0, end).toString('utf8').trim();
      rest = rest.subarray(end + 1);
      if (line !== '') yield line;
    }
    if (rest.byteLength > MAX_PULL_LINE_BYTES) {
      throw new MillraceError(
        'resource_exhausted',
        `the container engine sent a line longer than ${MAX_PULL_LINE_BYTES} bytes`,
      );
    }
  }
  const line = rest.toString('utf8').trim();
  if (line !== '') yield line;
}

function parseJson(text: string, doing: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return strange(doing, text);
  }
}

function strange(doing: string, value: unknown): never {
  throw new MillraceError(
    'unavailable',
    `what answers as container engine was asked to ${doing} and sent something else: ${cut(JSON.stringify(value) ?? 'nothing', 200)}`,
    { retryable: false },
  );
}

function readRecord(value: unknown): Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null && !Array.isArray(value) ? { ...value } : {};
}

function readString(value: unknown): string {
  return typeof value === 'string' ? value : '';
}

function readStrings(value: unknown): readonly string[] {
  return Array.isArray(value) ? value.filter((item) => typeof item === 'string') : [];
}

function readNumber(value: unknown): number {
  return typeof value === 'number' && Number.isFinite(value) && value > 0 ? value : 0;
}

function readVersion(value: unknown): EngineVersion {
  const raw = readRecord(value);
  const spoken = apiNumber(raw['ApiVersion']) ?? strange('ask for the version', value);
  const minimum = apiNumber(raw['MinAPIVersion']) ?? spoken;
  if (compare(spoken, OLDEST_API) < 0 || compare(minimum, NEWEST_API) > 0) {
    throw new MillraceError(
      'unimplemented',
      `the container engine speaks API ${minimum.join('.')} to ${spoken.join('.')}; this node needs one of ${OLDEST_API.join('.')} to ${NEWEST_API.join('.')}: use Docker 19.03 or later, or Podman 3 or later`,
    );
  }
  const components = Array.isArray(raw['Components']) ? raw['Components'] : [];
  const names = components.map((component) => readString(readRecord(component)['Name']));
  return {
    name: names.some((name) => name.startsWith('Podman')) ? 'Podman' : 'Docker',
    version: readString(raw['Version']),
    apiVersion: (compare(spoken, NEWEST_API) < 0 ? spoken : NEWEST_API).join('.'),
  };
}

type ApiNumber = readonly [major: number, minor: number];

function apiNumber(value: unknown): ApiNumber | null {
  const match = typeof value === 'string' ? /^(\d+)\.(\d+)/.exec(value) : null;
  return match ? [Number(match[1]), Number(match[2])] : null;
}

function compare(a: ApiNumber, b: ApiNumber): number {
  return a[0] - b[0] || a[1] - b[1];
}

function readInfo(value: unknown): EngineInfo {
  const raw = readRecord(value);
  return {
    rootless: readStrings(raw['SecurityOptions']).some((option) =>
      option.split(',').includes('name=rootless'),
    ),
    limits: {
      memory: raw['MemoryLimit'] === true,
      swap: raw['SwapLimit'] === true,
      cpus: raw['CPUCfsQuota'] === true || raw['CpuCfsQuota'] === true,
      pids: raw['PidsLimit'] === true,
    },
  };
}

function readImage(value: unknown): ImageInfo {
  const raw = readRecord(value);
  const config = readRecord(raw['Config']);
  return {
    id: readString(raw['Id']),
    volumes: Object.keys(readRecord(config['Volumes'])),
    workdir: readString(config['WorkingDir']) || '/',
  };
}

function readContainer(value: unknown): ContainerState {
  const raw = readRecord(value);
  const state = readRecord(raw['State']);
  return {
    status: readString(state['Status']),
    running: state['Running'] === true,
    pid: readNumber(state['Pid']) || null,
    exitCode: readNumber(state['ExitCode']),
    oomKilled: state['OOMKilled'] === true,
  };
}

function readStats(value: unknown): ContainerStats | null {
  const raw = readRecord(value);
  const memory = readRecord(raw['memory_stats']);
  const usage = readNumber(memory['usage']);
  const cpu = readRecord(readRecord(raw['cpu_stats'])['cpu_usage']);
  if (usage === 0 && readNumber(cpu['total_usage']) === 0) return null;
  const details = readRecord(memory['stats']);
  // Cache the kernel would give up first does not count, as `docker stats` shows it.
  const cache = readNumber(details['inactive_file']) || readNumber(details['total_inactive_file']);
  const memoryBytes = Math.max(0, usage - cache);
  return {
    memoryBytes,
    peakBytes: Math.max(memoryBytes, readNumber(memory['max_usage'])),
    cpuMs: readNumber(cpu['total_usage']) / 1e6,
    pids: readNumber(readRecord(raw['pids_stats'])['current']),
  };
}

function readListed(value: unknown): ListedContainer {
  const raw = readRecord(value);
  const labels = Object.entries(readRecord(raw['Labels'])).map(([name, text]) => [name, readString(text)]);
  return {
    id: readString(raw['Id']),
    names: readStrings(raw['Names']).map((name) => name.replace(/^\//, '')),
    labels: Object.fromEntries(labels),
  };
}

async function orNull<T>(call: Promise<T>): Promise<T | null> {
  try {
    return await call;
  } catch (error) {
    if (MillraceError.is(error) && error.code === 'not_found') return null;
    throw error;
  }
}

/** Ids as Docker shows them; names as they are. */
export function short(id: string): string {
  return /^[0-9a-f]{64}$/.test(id) ? id.slice(0, 12) : id;
}

function cut(text: string, maxLength = 1000): string {
  return text.length > maxLength ? `${text.slice(0, maxLength - 1)}…` : text;
}
