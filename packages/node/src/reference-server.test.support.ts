/**
 * DDS, DMS and a domain server as the posemesh protocol describes them (sections 2 to 4), each on a socket of its own, for
 * tests: the stand-in for the real services. Written from that text and not from our dispatcher; it has none of our
 * additions, records what it was sent, and notes every request that breaks a rule of the protocol in
 * {@link ReferenceServer.violations}.
 *
 * It is strict where the services are (names unique per domain, nonces used once, one lease per node) and deterministic
 * where they are not (ids are counted, the sign-in challenge is the published one), so that what a node sends can be
 * compared as it stands.
 */
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { Json, JsonObject } from '@millrace/runner';
import { recoverAddress } from '@millrace/dispatch/client';

/** The first published vector: its key, wallet, challenge and signature. */
export const VECTOR = {
  privateKey: '01'.repeat(32),
  wallet: '0x1a642f0e3c3af545e7acbd38b07251b3990914f1',
  domain: '127.0.0.1:8080',
  uri: 'http://127.0.0.1:8080',
  nonce: 'Zk3vQ9dL2mXa',
  issuedAt: '2026-05-04T03:02:01Z',
  signature:
    '0x8373807da61923110b8663184f3d131c446f7a0b2d158c64825b9ce98d627cfa1ef43d6f466710e47dad1d614a607b15427415552f467c53bca1644a4952a6051c',
} as const;

export const REG_SECRET = Buffer.from('3f6c1d0e-7a55-4c5e-9f0b-2d8a64b1c7e9:s3cr3t-value').toString('base64');
export const CAPABILITY = '/examples/hello/v1';
export const DOMAIN = '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21';
export const JOB = 'c3a1d0c8-8f0e-4d0c-a1c9-3f5f0e2b9d44';

export type Service = 'dds' | 'dms' | 'domain';

export interface Received {
  readonly service: Service;
  readonly method: string;
  readonly path: string;
  /** As sent, without the question mark. */
  readonly query: string;
  readonly headers: Readonly<Record<string, string>>;
  readonly body: Buffer;
  /** Monotonic, milliseconds. */
  readonly at: number;
}

/**
 * What a request is answered instead of what it should be.
 *
 * - `silence` the connection stays open and nothing comes
 * - `reset` the connection is closed without an answer
 * - `cut` the head and half of the body come, then the connection is closed
 */
export type Fault =
  | { readonly status: number; readonly body?: string; readonly headers?: Readonly<Record<string, string>> }
  | { readonly cut: string }
  | 'silence'
  | 'reset';

export interface ReferenceOptions {
  /** Lifetime of a lease. Default 30,000 ms. */
  readonly leaseMs?: number;
  /** Lifetime of a node token. Default an hour. */
  readonly nodeTokenMs?: number;
  /** False: `/multipart` is not there (404). */
  readonly chunked?: boolean;
  /** False: `/api/v1/info` is not there (404). */
  readonly info?: boolean;
  readonly requestMaxBytes?: number;
  readonly partBytes?: number;
  /** `verify` names the expiry `expires_at`. */
  readonly olderExpiryName?: boolean;
}

interface Lease {
  readonly body: JsonObject;
  /** What is added to every heartbeat answer. */
  readonly reply: JsonObject;
  readonly taskId: string;
  state: 'waiting' | 'leased' | 'running' | 'over';
}

interface Item {
  readonly id: string;
  readonly name: string;
  readonly dataType: string;
  bytes: Buffer;
}

interface Upload {
  readonly name: string;
  readonly dataType: string;
  readonly existingId: string | null;
  readonly parts: Map<number, Buffer>;
}

interface Waiter {
  readonly matches: (request: Received) => boolean;
  readonly resolve: (request: Received) => void;
}

export class ReferenceServer implements AsyncDisposable {
  readonly #options: Required<ReferenceOptions>;
  readonly #servers = new Map<Service, Server>();
  readonly #ports = new Map<Service, number>();
  readonly #waiters = new Set<Waiter>();
  /** Everything that came, in the order of its last byte. */
  readonly received: Received[] = [];
  /** Rules of the protocol that were broken. */
  readonly violations: string[] = [];
  readonly registrations: JsonObject[] = [];
  readonly items = new Map<string, Item>();
  /** Asked before each request is served; what it returns is the answer. */
  fault: (request: Received) => Fault | null | undefined = () => null;
  /** The bearer the domain server takes; told with leases and heartbeats. */
  domainToken = 'domain-token-1';
  /** The node tokens DMS takes. */
  readonly nodeTokens = new Set<string>();
  /** False: `verify` answers 403 until the node registers. */
  registered = false;
  readonly #nonces = new Set<string>();
  readonly #leases: Lease[] = [];
  readonly #uploads = new Map<string, Upload>();
  #counters = { nonce: 0, token: 0, item: 0, upload: 0 };

  private constructor(options: ReferenceOptions) {
    this.#options = {
      leaseMs: 30_000,
      nodeTokenMs: 3_600_000,
      chunked: true,
      info: true,
      requestMaxBytes: 104_857_600,
      partBytes: 8_388_608,
      olderExpiryName: false,
      ...options,
    };
  }

  static async open(options: ReferenceOptions = {}): Promise<ReferenceServer> {
    const self = new ReferenceServer(options);
    for (const service of ['dds', 'dms', 'domain'] as const) await self.start(service);
    return self;
  }

  /** Opens a service, at its former port if it had one. */
  async start(service: Service): Promise<void> {
    const server = createServer((request, response) => void this.#handle(service, request, response));
    this.#servers.set(service, server);
    const port = this.#ports.get(service) ?? 0;
    await new Promise<void>((resolve) => server.listen(port, '127.0.0.1', resolve));
    this.#ports.set(service, (server.address() as AddressInfo).port);
  }

  /** Takes a service down; its port refuses connections. */
  async stop(service: Service): Promise<void> {
    const server = this.#servers.get(service);
    this.#servers.delete(service);
    server?.closeAllConnections();
    await new Promise<void>((resolve) => (server === undefined ? resolve() : server.close(() => resolve())));
  }

  /** Also of a service that is down. */
  url(service: Service): string {
    return `http://127.0.0.1:${this.#ports.get(service)}`;
  }

  /** The environment of a node: only documented variables, and short pauses. */
  env(more: Readonly<Record<string, string>> = {}): Record<string, string> {
    return {
      DDS_BASE_URL: this.url('dds'),
      DMS_BASE_URL: `${this.url('dms')}/v1`,
      REG_SECRET,
      SECP256K1_PRIVHEX: VECTOR.privateKey,
      NODE_VERSION: '0.3.2',
      CLIENT_ID: 'test-client',
      POLL_BACKOFF_MS_MIN: '10',
      POLL_BACKOFF_MS_MAX: '30',
      TOKEN_REAUTH_JITTER_MS: '10',
      ...more,
    };
  }

  /**
   * Gives the node a task when it asks next. `lease` replaces members of the envelope, `reply` of every heartbeat's
   * answer. Returns the task's id.
   */
  offer(task: JsonObject = {}, lease: JsonObject = {}, reply: JsonObject = {}): string {
    const taskId = `5b1f3c52-5f0e-4b3e-9b5e-${String(this.#leases.length + 1).padStart(12, '0')}`;
    this.#leases.push({
      taskId,
      state: 'waiting',
      reply,
      body: {
        access_token_expires_at: '2099-01-01T00:00:00Z',
        cancel: false,
        status: 'leased',
        domain_id: DOMAIN,
        domain_server_url: this.url('domain'),
        ...lease,
        task: {
          id: taskId,
          job_id: JOB,
          capability: CAPABILITY,
          capability_filters: {},
          inputs_cids: [],
          outputs_prefix: 'hello-demo/',
          meta: { message: 'hi' },
          priority: 0,
          attempts: 1,
          max_attempts: 3,
          deps_remaining: 0,
          status: 'leased',
          mode: 'public',
          billing_units: '1',
          ...task,
        },
      },
    });
    return taskId;
  }

  /** Stores an item as a requestor would. Returns its id. */
  store(name: string, dataType: string, bytes: Uint8Array | string): string {
    this.#counters.item += 1;
    const id = `0d6c1c6e-3f0c-4c63-8c37-${String(this.#counters.item).padStart(12, '0')}`;
    this.items.set(id, { id, name, dataType, bytes: Buffer.from(bytes as Uint8Array) });
    return id;
  }

  /** The requests of a service, of a method and a path that ends so. */
  of(service: Service, method = '', ending = ''): Received[] {
    return this.received.filter(
      (each) => each.service === service && each.method.startsWith(method) && each.path.endsWith(ending),
    );
  }

  /** The first request that matches, past or to come. */
  seen(matches: (request: Received) => boolean): Promise<Received> {
    const past = this.received.find(matches);
    if (past !== undefined) return Promise.resolve(past);
    return new Promise((resolve) => this.#waiters.add({ matches, resolve }));
  }

  /** The next request that matches. */
  next(matches: (request: Received) => boolean): Promise<Received> {
    return new Promise((resolve) => this.#waiters.add({ matches, resolve }));
  }

  /** The report that ends a task: how, and its body. */
  async ending(taskId: string): Promise<{ readonly kind: 'complete' | 'fail'; readonly body: Json }> {
    const { path, body } = await this.seen(
      (each) => each.service === 'dms' && /\/(complete|fail)$/.test(each.path) && each.path.includes(taskId),
    );
    return {
      kind: path.endsWith('complete') ? 'complete' : 'fail',
      body: JSON.parse(body.toString()) as Json,
    };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all([...this.#servers.keys()].map((service) => this.stop(service)));
  }

  async #handle(service: Service, request: IncomingMessage, response: ServerResponse): Promise<void> {
    const chunks: Buffer[] = [];
    try {
      for await (const chunk of request) chunks.push(chunk as Buffer);
    } catch {
      return; // The node broke off; there is nobody to answer.
    }
    const [path = '', query = ''] = (request.url ?? '').split('?');
    const received: Received = {
      service,
      method: request.method ?? '',
      path,
      query,
      headers: request.headers as Record<string, string>,
      body: Buffer.concat(chunks),
      at: performance.now(),
    };
    this.received.push(received);
    this.#checkTransport(received);
    const fault = this.fault(received) ?? null;
    for (const waiter of this.#waiters) {
      if (!waiter.matches(received)) continue;
      this.#waiters.delete(waiter);
      waiter.resolve(received);
    }
    if (fault !== null) return applyFault(fault, response);
    const answer = this.#answer(received);
    response.writeHead(answer.status, {
      ...(answer.json === undefined
        ? { 'content-type': 'text/plain' }
        : { 'content-type': 'application/json' }),
      ...answer.headers,
    });
    response.end(answer.body ?? (answer.json === undefined ? '' : JSON.stringify(answer.json)));
  }

  #violation(request: Received, rule: string): void {
    this.violations.push(`${request.method} ${request.path}: ${rule}`);
  }

  /** Section 0.3. */
  #checkTransport(request: Received): void {
    const { headers, body, method } = request;
    if (headers['transfer-encoding'] !== undefined) this.#violation(request, 'the body has no known length');
    if (method === 'GET' && body.length > 0) this.#violation(request, 'a GET has a body');
    if (headers['cookie'] !== undefined) this.#violation(request, 'a cookie was sent');
    for (const name of Object.keys(headers)) {
      if (name.startsWith('millrace') || name === 'prefer') this.#violation(request, `header ${name}`);
    }
  }

  #answer(request: Received): Answer {
    if (request.service === 'dds') return this.#dds(request);
    if (request.service === 'dms') return this.#dms(request);
    return this.#domain(request);
  }

  // Section 3.

  #dds(request: Received): Answer {
    const { method, path } = request;
    if (method !== 'POST') return NOT_FOUND;
    const body = this.#json(request);
    if (body === null) return text(400, 'bad json');
    if (request.headers['authorization'] !== undefined) this.#violation(request, 'an authorization header');
    if (path === '/internal/v1/auth/siwe/request') {
      this.#exactly(request, body, ['wallet']);
      if (body['wallet'] !== VECTOR.wallet) return text(422, 'wallet');
      const nonce = this.#nextNonce();
      this.#nonces.add(nonce);
      const { domain, uri, issuedAt } = VECTOR;
      return json({ nonce, domain, uri, version: '1', chainId: 8453, issuedAt });
    }
    if (path === '/internal/v1/nodes/register-wallet') {
      this.#exactly(request, body, [
        'message',
        'signature',
        'registration_credentials',
        'capabilities',
        'version',
      ]);
      const refused = this.#checkSigned(body);
      if (refused !== null) return refused;
      if (body['registration_credentials'] !== REG_SECRET) return text(401, 'invalid credentials');
      const capabilities = body['capabilities'] as string[];
      if (JSON.stringify(capabilities) !== JSON.stringify([...capabilities].toSorted())) {
        this.#violation(request, 'capabilities are not sorted');
      }
      this.registrations.push(body);
      this.registered = true;
      return { status: 200 };
    }
    if (path === '/internal/v1/auth/siwe/verify') {
      this.#exactly(request, body, ['address', 'message', 'signature']);
      if (body['address'] !== VECTOR.wallet) return text(403, 'wallet does not match node');
      if (!this.registered) return text(403, 'node not found');
      const refused = this.#checkSigned(body);
      if (refused !== null) return refused;
      this.#counters.token += 1;
      const token = `node-token-${this.#counters.token}`;
      this.nodeTokens.add(token);
      const expiry = new Date(Date.now() + this.#options.nodeTokenMs).toISOString();
      return json({
        node_id: '3f6c1d0e-7a55-4c5e-9f0b-2d8a64b1c7e9',
        wallet: VECTOR.wallet,
        access_token: token,
        [this.#options.olderExpiryName ? 'expires_at' : 'access_expires_at']: expiry,
      });
    }
    return NOT_FOUND;
  }

  #nextNonce(): string {
    this.#counters.nonce += 1;
    return this.#counters.nonce === 1 ? VECTOR.nonce : `${VECTOR.nonce}-${this.#counters.nonce}`;
  }

  /** Sections 3.3 and 3.4: the exact layout, a nonce used once, the wallet's signature. */
  #checkSigned(body: JsonObject): Answer | null {
    const message = textOf(body['message']);
    const nonce = /\nNonce: (.*)\n/.exec(message)?.[1] ?? '';
    const expected =
      `${VECTOR.domain} wants you to sign in with your Ethereum account:\n${VECTOR.wallet}\n\n` +
      `URI: ${VECTOR.uri}\nVersion: 1\nChain ID: 8453\nNonce: ${nonce}\nIssued At: ${VECTOR.issuedAt}`;
    if (message !== expected) return text(400, 'message');
    if (!this.#nonces.delete(nonce)) return text(401, 'invalid nonce');
    const signature = textOf(body['signature']);
    if (!/^0x[0-9a-f]{128}(1b|1c)$/.test(signature)) return text(400, 'signature');
    return recoverAddress(message, signature) === VECTOR.wallet ? null : text(401, 'invalid signature');
  }

  // Section 2.

  #dms(request: Received): Answer {
    const { method, path } = request;
    // Asked once by our node, of any server; whatever is not known is 404.
    if (path === '/v1/features') return NOT_FOUND;
    const token = /^Bearer (\S+)$/.exec(request.headers['authorization'] ?? '')?.[1];
    if (token === undefined || !this.nodeTokens.has(token)) return text(401, 'unauthorized');
    if (method === 'GET' && path === '/v1/tasks') {
      if (request.query !== '') this.#violation(request, `query ${request.query}`);
      if (request.headers['content-type'] !== undefined) this.#violation(request, 'a content type');
      if (this.#leases.some(({ state }) => state === 'leased' || state === 'running'))
        return text(409, 'busy');
      const lease = this.#leases.find(({ state }) => state === 'waiting');
      if (lease === undefined) return { status: 204 };
      lease.state = lease.body['cancel'] === true ? 'over' : 'leased';
      return json({ access_token: this.domainToken, lease_expires_at: this.#expiry(), ...lease.body });
    }
    const match = /^\/v1\/tasks\/([0-9a-f-]{36})\/(heartbeat|complete|fail)$/.exec(path);
    if (method !== 'POST' || match === null) return NOT_FOUND;
    const body = this.#json(request);
    if (body === null) return text(400, 'bad json');
    const lease = this.#leases.find(({ taskId }) => taskId === match[1]);
    if (lease === undefined) return text(404, 'task not found');
    if (match[2] === 'heartbeat') return this.#heartbeat(request, lease, body);
    if (lease.state === 'over') return text(409, 'not the owner');
    lease.state = 'over';
    if (match[2] === 'complete') this.#checkComplete(request, body);
    else this.#checkFail(request, body);
    return { status: 204 };
  }

  #heartbeat(request: Received, lease: Lease, body: JsonObject): Answer {
    this.#exactly(request, body, ['progress', 'events']);
    if (!Array.isArray(body['events'])) this.#violation(request, 'events are no array');
    if (lease.state === 'over') return text(409, 'not the owner');
    lease.state = 'running';
    const answer = {
      access_token: this.domainToken,
      access_token_expires_at: '2099-01-01T00:00:00Z',
      lease_expires_at: this.#expiry(),
      cancel: false,
      status: 'running',
      domain_id: DOMAIN,
      domain_server_url: this.url('domain'),
      task_id: lease.taskId,
      job_id: JOB,
      attempts: 1,
      max_attempts: 3,
      deps_remaining: 0,
      ...lease.reply,
    };
    // A node that was told to stop sends neither complete nor fail.
    if (answer.cancel) lease.state = 'over';
    return json(answer);
  }

  #expiry(): string {
    return new Date(Date.now() + this.#options.leaseMs).toISOString();
  }

  #checkComplete(request: Received, body: JsonObject): void {
    this.#exactly(request, body, ['output_cids', 'meta']);
    const artifacts = this.#checkReport(request, body['meta']);
    const ids = artifacts.flatMap(({ id }) => (id === null ? [] : [id]));
    if (JSON.stringify(ids) !== JSON.stringify(body['output_cids'])) {
      this.#violation(request, 'output_cids are not the ids of the artifacts');
    }
  }

  #checkFail(request: Received, body: JsonObject): void {
    this.#exactly(request, body, ['reason', 'details']);
    if (body['reason'] !== 'node_setup_failed') return void this.#checkReport(request, body['details']);
    this.#exactly(request, body['details'], ['stage', 'error']);
    const { stage } = body['details'] as { stage: string };
    if (!['start_session', 'initial_heartbeat', 'build_ports'].includes(stage)) {
      this.#violation(request, `stage ${stage}`);
    }
  }

  #checkReport(request: Received, value: Json | undefined): readonly { readonly id: Json }[] {
    this.#exactly(request, value, ['job', 'artifacts']);
    const { job, artifacts } = value as { job: Json; artifacts: JsonObject[] };
    this.#exactly(request, job, ['task_id', 'job_id', 'domain_id', 'capability']);
    for (const artifact of artifacts) {
      this.#exactly(request, artifact, ['logical_path', 'name', 'data_type', 'id']);
    }
    return artifacts as unknown as { id: Json }[];
  }

  // Section 4.

  #domain(request: Received): Answer {
    const { method, path } = request;
    if (method === 'GET' && path === '/api/v1/info') {
      if (!this.#options.info) return text(404, 'route not found');
      const { requestMaxBytes, partBytes } = this.#options;
      return json({
        upload: {
          request_max_bytes: requestMaxBytes,
          domain_data_max_bytes: 10_485_760,
          multipart: { enabled: this.#options.chunked, part_size_bytes: partBytes },
        },
      });
    }
    const match = /^\/api\/v1\/domains\/([^/]+)\/data(\/multipart)?$/.exec(path);
    if (match === null) return text(404, 'route not found');
    if (request.headers['authorization'] !== `Bearer ${this.domainToken}`) return text(401, 'unauthorized');
    if (match[1] !== DOMAIN) return text(403, 'wrong domain');
    if (match[2] !== undefined)
      return this.#options.chunked ? this.#multipart(request) : text(404, 'route not found');
    if (method === 'GET') return this.#read(request);
    if (method === 'POST' || method === 'PUT') return this.#single(request);
    return text(405, 'method not allowed');
  }

  /** Sections 4.3 and 4.4. */
  #read(request: Received): Answer {
    const query = new URLSearchParams(request.query);
    const ids = query.get('ids')?.split(',') ?? null;
    const name = query.get('name');
    const type = query.get('data_type');
    const known = [...this.items.values()].filter(
      (item) => (name === null || item.name === name) && (type === null || item.dataType === type),
    );
    const found = ids === null ? known : ids.flatMap((id) => known.filter((item) => item.id === id));
    if (request.headers['accept'] === 'application/json') return json({ data: found.map(metadata) });
    if (request.headers['accept'] !== 'multipart/form-data') this.#violation(request, 'another Accept');
    if (found.length === 0) return text(404, 'not found');
    const boundary = 'a1'.repeat(30);
    const parts = found.map((item) =>
      Buffer.concat([
        Buffer.from(
          `--${boundary}\r\nContent-Disposition: form-data; name="${item.name}"; data-type="${item.dataType}"; ` +
            `id="${item.id}"; domain-id="${DOMAIN}"; size="${item.bytes.length}"; ` +
            `created-at="2026-05-01T10:00:00.123456Z"; updated-at="2026-05-01T10:00:00.123456Z"\r\n` +
            `Content-Type: application/octet-stream\r\n\r\n`,
        ),
        item.bytes,
        Buffer.from('\r\n'),
      ]),
    );
    return {
      status: 200,
      headers: { 'content-type': `multipart/form-data; boundary=${boundary}` },
      body: Buffer.concat([...parts, Buffer.from(`--${boundary}--\r\n`)]),
    };
  }

  /** Section 4.5. */
  #single(request: Received): Answer {
    const boundary = /^multipart\/form-data; boundary=([0-9A-Za-z]+)$/.exec(
      request.headers['content-type'] ?? '',
    )?.[1];
    if (boundary === undefined) return text(400, 'boundary');
    const { body } = request;
    const head = body.indexOf('\r\n\r\n');
    const tail = body.lastIndexOf(`\r\n--${boundary}--\r\n`);
    const lines = body.subarray(0, head).toString().split('\r\n');
    const disposition = /^Content-Disposition: form-data; (.*)$/.exec(lines[2] ?? '')?.[1];
    if (
      head === -1 ||
      tail < head ||
      tail + boundary.length + 8 !== body.length ||
      lines.length !== 3 ||
      lines[0] !== `--${boundary}` ||
      lines[1] !== 'Content-Type: application/octet-stream' ||
      disposition === undefined
    ) {
      this.#violation(request, 'the body has not the layout of the protocol');
      return text(400, 'body');
    }
    const bytes = body.subarray(head + 4, tail);
    if (request.method === 'PUT') {
      const id = /^id="([^"]+)"$/.exec(disposition)?.[1];
      const item = id === undefined ? undefined : this.items.get(id);
      if (item === undefined) return text(404, 'not found');
      item.bytes = bytes;
      return json({ data: [metadata(item)] });
    }
    const [, name, dataType] = /^name="([^"]+)"; data-type="([^"]+)"$/.exec(disposition) ?? [];
    if (name === undefined || dataType === undefined) return text(400, 'disposition');
    const bad = this.#badName(name) ?? this.#badName(dataType);
    if (bad !== null) return bad;
    if ([...this.items.values()].some((item) => item.name === name)) return text(409, 'name exists');
    return json({ data: [metadata(this.items.get(this.store(name, dataType, bytes))!)] });
  }

  /** Section 4.6. */
  #multipart(request: Received): Answer {
    const { method, query } = request;
    if (method === 'POST' && query === 'uploads') {
      const body = this.#json(request);
      if (body === null) return text(400, 'bad json');
      this.#exactly(request, body, ['name', 'data_type', 'size', 'content_type', 'existing_id']);
      if (body['size'] === 0) return text(400, 'size');
      const { name, data_type: dataType, existing_id: existingId } = body as Record<string, string>;
      const bad = this.#badName(name!) ?? this.#badName(dataType!);
      if (bad !== null) return bad;
      this.#counters.upload += 1;
      const id = `7e11c0de-0000-4000-8000-${String(this.#counters.upload).padStart(12, '0')}`;
      this.#uploads.set(id, {
        name: name!,
        dataType: dataType!,
        existingId: existingId ?? null,
        parts: new Map(),
      });
      return json({ upload_id: id, part_size: this.#options.partBytes });
    }
    const params = new URLSearchParams(query);
    const id = params.get('uploadId') ?? '';
    const upload = this.#uploads.get(id);
    if (upload === undefined) return text(404, 'no such upload');
    if (method === 'DELETE') {
      this.#uploads.delete(id);
      return { status: 204 };
    }
    if (method === 'PUT') {
      if (request.headers['content-type'] !== 'application/octet-stream')
        this.#violation(request, 'content type');
      if (request.body.length > this.#options.partBytes) return text(413, 'part too large');
      const number = Number(params.get('partNumber'));
      if (number > upload.parts.size + 1) this.#violation(request, 'a part before the one in front of it');
      upload.parts.set(number, request.body);
      return json({ etag: `etag-${number}` });
    }
    const { parts } = (this.#json(request) ?? {}) as { parts?: { part_number: number; etag: string }[] };
    const numbers = [...upload.parts.keys()].toSorted((a, b) => a - b);
    const expected = numbers.map((part_number) => ({ part_number, etag: `etag-${part_number}` }));
    if (JSON.stringify(parts) !== JSON.stringify(expected)) return text(400, 'parts');
    this.#uploads.delete(id);
    const bytes = Buffer.concat(numbers.map((number) => upload.parts.get(number)!));
    const existing = [...this.items.values()].find((item) =>
      upload.existingId === null ? item.name === upload.name : item.id === upload.existingId,
    );
    if (existing !== undefined) existing.bytes = bytes;
    const itemId = existing?.id ?? this.store(upload.name, upload.dataType, bytes);
    return json(metadata(this.items.get(itemId)!));
  }

  /** Section 4.8, the last line. */
  #badName(name: string): Answer | null {
    const bytes = Buffer.byteLength(name);
    return bytes < 1 || bytes > 128 || /[;!?<>[\]{}()/\\"$#@*^&|~%=+\u0000-\u001f]/.test(name)
      ? text(400, 'invalid name')
      : null;
  }

  #json(request: Received): JsonObject | null {
    if (request.headers['content-type'] !== 'application/json')
      this.#violation(request, 'no JSON content type');
    try {
      return JSON.parse(request.body.toString()) as JsonObject;
    } catch {
      return null;
    }
  }

  #exactly(request: Received, value: Json | undefined, names: readonly string[]): void {
    const found = Object.keys((value ?? {}) as JsonObject).toSorted();
    if (JSON.stringify(found) !== JSON.stringify([...names].toSorted())) {
      this.#violation(request, `members ${found.join(', ')} instead of ${names.join(', ')}`);
    }
  }
}

interface Answer {
  readonly status: number;
  readonly json?: Json;
  readonly body?: Buffer | string;
  readonly headers?: Readonly<Record<string, string>>;
}

/** The empty string for what is no text. */
function textOf(value: Json | undefined): string {
  return typeof value === 'string' ? value : '';
}

const NOT_FOUND: Answer = { status: 404, body: 'route not found' };

function text(status: number, body: string): Answer {
  return { status, body };
}

function json(value: Json): Answer {
  return { status: 200, json: value };
}

function metadata(item: Item): JsonObject {
  return {
    id: item.id,
    domain_id: DOMAIN,
    name: item.name,
    data_type: item.dataType,
    size: item.bytes.length,
    created_at: '2026-05-01T10:00:00.123456Z',
    updated_at: '2026-05-01T10:00:00.123456Z',
  };
}

function applyFault(fault: Fault, response: ServerResponse): void {
  if (fault === 'silence') return;
  if (fault === 'reset') {
    response.socket?.destroy();
    return;
  }
  if ('cut' in fault) {
    const { cut } = fault;
    response.writeHead(200, { 'content-type': 'application/json', 'content-length': String(cut.length + 1) });
    response.write(cut.slice(0, Math.ceil(cut.length / 2)), () => response.socket?.destroy());
    return;
  }
  response
    .writeHead(fault.status, { 'content-type': 'application/json', ...fault.headers })
    .end(fault.body ?? '');
}
