/**
 * The reference compute node as a script, for tests: plain HTTP calls in the order and shape of the posemesh protocol
 * (sections 0.1, 3, 4, 5 and 6), and its newer relatives' (section 9.3), with their pedantry about answers. Written from
 * that text and not from our client; it knows none of our additions.
 */
import { request as httpRequest } from 'node:http';
import { parseLeaseJson, type Json, type JsonObject, type LeaseEnvelope } from '@millrace/runner';
import { signMessage, walletAddress } from './siwe.ts';

export interface HttpAnswer {
  readonly status: number;
  readonly headers: Readonly<Record<string, string | undefined>>;
  readonly body: Buffer;
}

export interface HttpCall {
  readonly headers?: Readonly<Record<string, string>>;
  readonly body?: Buffer | string;
}

/** HTTP/1.1 with a known length, `Accept: *` + `/*` unless told, no user agent, redirects not followed. */
export function http(
  method: string,
  url: string,
  { headers = {}, body }: HttpCall = {},
): Promise<HttpAnswer> {
  return new Promise((resolve, reject) => {
    const bytes = body === undefined ? null : Buffer.from(body as string);
    const call = httpRequest(url, {
      method,
      headers: {
        accept: '*/*',
        ...headers,
        ...(bytes === null ? {} : { 'content-length': String(bytes.length) }),
      },
    });
    call.on('error', reject).on('response', (response) => {
      const chunks: Buffer[] = [];
      response
        .on('data', (chunk: Buffer) => chunks.push(chunk))
        .on('error', reject)
        .on('end', () =>
          resolve({
            status: response.statusCode ?? 0,
            headers: response.headers as Record<string, string>,
            body: Buffer.concat(chunks),
          }),
        );
    });
    call.end(bytes ?? undefined);
  });
}

export function jsonOf(answer: HttpAnswer): JsonObject {
  return JSON.parse(answer.body.toString()) as JsonObject;
}

/** The empty string for what is no text. */
function textOf(value: Json | undefined): string {
  return typeof value === 'string' ? value : '';
}

export interface NodeIdentity {
  /** `DDS_BASE_URL`. */
  readonly dds: string;
  /** `DMS_BASE_URL`. */
  readonly dms: string;
  readonly credentials: string;
  readonly privateKey: string;
  readonly capabilities: readonly string[];
}

export interface Part {
  readonly id: string;
  readonly name: string;
  readonly dataType: string;
  readonly domainId: string;
  readonly bytes: Buffer;
}

export interface Artifact {
  readonly logical_path: string;
  readonly name: string;
  readonly data_type: string;
  readonly id: string;
}

const RFC3339 = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$/;
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

/** Throws what the node would take for a broken service. */
function demand(condition: boolean, rule: string): asserts condition {
  if (!condition) throw new Error(`the service broke a rule: ${rule}`);
}

function demandMembers(value: JsonObject, names: readonly string[], what: string): void {
  const found = Object.keys(value).toSorted().join();
  demand(found === [...names].toSorted().join(), `${what} has the members ${found}`);
}

export class ReferenceNode {
  readonly wallet: string;
  /** Empty until the first login. */
  nodeToken = '';
  readonly #identity: NodeIdentity;
  /** Rotated by leases and heartbeats. */
  #domainToken = '';
  readonly artifacts: Artifact[] = [];

  constructor(identity: NodeIdentity) {
    this.#identity = identity;
    this.wallet = walletAddress(identity.privateKey);
  }

  // Section 3.

  /** The text to sign, over a new nonce. */
  async #signed(): Promise<{ readonly message: string; readonly signature: string }> {
    const answer = await http('POST', `${this.#identity.dds}/internal/v1/auth/siwe/request`, {
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ wallet: this.wallet }),
    });
    demand(answer.status === 200, `nonce status ${answer.status}`);
    const { nonce, domain, uri, version, chainId, issuedAt } = jsonOf(answer);
    demand(typeof nonce === 'string' && nonce.length >= 8, 'the nonce has at least 8 characters');
    demand(version === '1' && chainId === 8453, 'version "1" and chain 8453');
    demand(RFC3339.test(textOf(issuedAt)), 'issuedAt is RFC 3339');
    demand(Math.abs(Date.parse(textOf(issuedAt)) - Date.now()) <= 60_000, 'issuedAt is now');
    demand(uri === this.#identity.dds && domain === new URL(this.#identity.dds).host, 'domain and uri');
    const message =
      `${textOf(domain)} wants you to sign in with your Ethereum account:\n${this.wallet}\n\n` +
      `URI: ${textOf(uri)}\nVersion: ${version}\nChain ID: ${chainId}\nNonce: ${nonce}\nIssued At: ${textOf(issuedAt)}`;
    return { message, signature: signMessage(message, this.#identity.privateKey) };
  }

  async register(more: JsonObject = {}): Promise<HttpAnswer> {
    const { credentials, capabilities, dds } = this.#identity;
    const { message, signature } = await this.#signed();
    return http('POST', `${dds}/internal/v1/nodes/register-wallet`, {
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({
        message,
        signature,
        registration_credentials: credentials,
        capabilities: [...capabilities].toSorted(),
        version: '0.3.2',
        ...more,
      }),
    });
  }

  /** `bare`: only message and signature, v as 0 or 1, as another client of the service sends it. */
  async login(bare = false): Promise<void> {
    const signed = await this.#signed();
    const v = Number.parseInt(signed.signature.slice(-2), 16);
    const answer = await http('POST', `${this.#identity.dds}/internal/v1/auth/siwe/verify`, {
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(
        bare
          ? { message: signed.message, signature: `${signed.signature.slice(0, -2)}0${v - 27}` }
          : { address: this.wallet, ...signed },
      ),
    });
    demand(answer.status === 200, `verify status ${answer.status} ${answer.body.toString()}`);
    const body = jsonOf(answer);
    demandMembers(body, ['node_id', 'wallet', 'access_token', 'access_expires_at'], 'the verify answer');
    demand(body['wallet'] === this.wallet, 'the wallet in lower case');
    demand(UUID.test(textOf(body['node_id'])), 'node_id is a UUID');
    const expiry = textOf(body['access_expires_at']);
    demand(RFC3339.test(expiry) && Date.parse(expiry) > Date.now(), 'an expiry in the future');
    demand(typeof body['access_token'] === 'string' && body['access_token'] !== '', 'a token');
    this.nodeToken = body['access_token'];
  }

  // Section 2.

  /** The lease, or the status that brought none. */
  async poll(query = ''): Promise<LeaseEnvelope | 204 | 409> {
    const answer = await this.dms('GET', `/tasks${query}`);
    if (answer.status === 204 || answer.status === 409) return answer.status;
    demand(answer.status === 200, `/tasks status ${answer.status}`);
    demand(answer.headers['content-type']?.startsWith('application/json') === true, 'a lease is JSON');
    demand(answer.body.length <= 2 * 1024 * 1024, 'a lease is at most 2 MiB');
    const lease = parseLeaseJson(answer.body.toString());
    this.#domainToken = lease.access_token ?? '';
    return lease;
  }

  async heartbeat(
    taskId: string,
    progress: Json = {},
    events: readonly Json[] = [],
  ): Promise<{ readonly status: number; readonly body: JsonObject }> {
    const answer = await this.dms('POST', `/tasks/${taskId}/heartbeat`, { progress, events: [...events] });
    if (answer.status !== 200) return { status: answer.status, body: {} };
    const body = jsonOf(answer);
    // Everything a lease may carry has the same types here.
    parseLeaseJson(
      JSON.stringify({ ...body, cancel: body['cancel'] ?? false, task: { id: taskId, capability: 'c' } }),
    );
    this.#domainToken = (body['access_token'] as string | undefined) ?? this.#domainToken;
    return { status: 200, body };
  }

  complete(lease: LeaseEnvelope, artifacts: readonly object[] = this.artifacts): Promise<HttpAnswer> {
    const ids = artifacts.map((artifact) => (artifact as Artifact).id);
    return this.dms('POST', `/tasks/${lease.task.id}/complete`, {
      output_cids: ids,
      meta: { job: jobOf(lease), artifacts: artifacts as Json[] },
    });
  }

  fail(lease: LeaseEnvelope, reason: string): Promise<HttpAnswer> {
    return this.dms('POST', `/tasks/${lease.task.id}/fail`, {
      reason,
      details: { job: jobOf(lease), artifacts: [...this.artifacts] as unknown as Json[] },
    });
  }

  setupFailed(taskId: string, stage: string, error: string): Promise<HttpAnswer> {
    return this.dms('POST', `/tasks/${taskId}/fail`, {
      reason: 'node_setup_failed',
      details: { stage, error },
    });
  }

  dms(method: string, path: string, body?: JsonObject): Promise<HttpAnswer> {
    return http(method, `${this.#identity.dms}${path}`, {
      headers: {
        authorization: `Bearer ${this.nodeToken}`,
        ...(body === undefined ? {} : { 'content-type': 'application/json' }),
      },
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
    });
  }

  // Section 4.

  /** Parts of a multipart answer, delimited by their sizes; null for 404. */
  async download(lease: LeaseEnvelope, query: string): Promise<Part[] | null> {
    const answer = await this.storage(lease, 'GET', `/data${query}`, {
      headers: { accept: 'multipart/form-data' },
    });
    if (answer.status === 404) return null;
    demand(answer.status === 200, `download status ${answer.status}`);
    const prefix = 'multipart/form-data; boundary=';
    const type = answer.headers['content-type'] ?? '';
    demand(type.startsWith(prefix), `content type ${type}`);
    return parseParts(answer.body, type.slice(prefix.length));
  }

  /** The id of the item of exactly this name and type, or null. */
  async lookup(lease: LeaseEnvelope, name: string, dataType: string): Promise<string | null> {
    const query = new URLSearchParams({ name, data_type: dataType }).toString();
    const answer = await this.storage(lease, 'GET', `/data?${query}`, {
      headers: { accept: 'application/json' },
    });
    if (answer.status === 404) return null;
    demand(answer.status === 200, `lookup status ${answer.status}`);
    return (
      (metadataOf(answer).find((item) => item['name'] === name && item['data_type'] === dataType)?.['id'] as
        string | null) ?? null
    );
  }

  async info(
    lease: LeaseEnvelope,
  ): Promise<{ readonly requestMaxBytes: number; readonly dataMaxBytes: number }> {
    const answer = await http('GET', `${baseOf(lease)}/api/v1/info`);
    demand(answer.status === 200, `info status ${answer.status}`);
    const upload = jsonOf(answer)['upload'] as JsonObject;
    const multipart = upload['multipart'] as JsonObject;
    demand(Number.isInteger(upload['request_max_bytes']), 'request_max_bytes is an integer');
    demand(Number.isInteger(upload['domain_data_max_bytes']), 'domain_data_max_bytes is an integer');
    demand(multipart['enabled'] === true, 'chunked uploads are enabled');
    return {
      requestMaxBytes: upload['request_max_bytes'] as number,
      dataMaxBytes: upload['domain_data_max_bytes'] as number,
    };
  }

  /** A single upload with the fixed boundary: POST, or PUT to an id. */
  async upload(
    lease: LeaseEnvelope,
    target: { readonly name: string; readonly dataType: string } | { readonly id: string },
    bytes: Buffer | string,
  ): Promise<HttpAnswer> {
    const parameters =
      'id' in target ? `id="${target.id}"` : `name="${target.name}"; data-type="${target.dataType}"`;
    const body = Buffer.concat([
      Buffer.from(
        '--boundary\r\nContent-Type: application/octet-stream\r\n' +
          `Content-Disposition: form-data; ${parameters}\r\n\r\n`,
      ),
      Buffer.from(bytes as string),
      Buffer.from('\r\n--boundary--\r\n'),
    ]);
    // No client id on this one.
    return http('id' in target ? 'PUT' : 'POST', `${dataUrl(lease)}/data`, {
      headers: {
        authorization: `Bearer ${this.#domainToken}`,
        'content-type': 'multipart/form-data; boundary=boundary',
      },
      body,
    });
  }

  /** A chunked upload, part after part. `newer`: with the pedantry of newer nodes. Returns the id. */
  async uploadChunked(
    lease: LeaseEnvelope,
    name: string,
    dataType: string,
    bytes: Buffer,
    options: { readonly existingId?: string; readonly newer?: boolean } = {},
  ): Promise<string> {
    const { existingId = null, newer = false } = options;
    const json = { 'content-type': 'application/json' };
    const init = await this.storage(lease, 'POST', `/data/multipart?uploads${newer ? '=' : ''}`, {
      headers: json,
      body: JSON.stringify({
        name,
        data_type: dataType,
        size: bytes.length,
        content_type: 'application/octet-stream',
        existing_id: existingId,
      }),
    });
    demand(init.status === 200, `init status ${init.status} ${init.body.toString()}`);
    const { upload_id: uploadId, part_size: partSize, data_id: dataId, expires_at: expiresAt } = jsonOf(init);
    demand(typeof uploadId === 'string', 'upload_id');
    demand(Number.isInteger(partSize) && (partSize as number) > 0, 'part_size > 0');
    if (newer) {
      demand(UUID.test(uploadId) && UUID.test(textOf(dataId)), 'upload_id and data_id are UUIDs');
      demand(Date.parse(textOf(expiresAt)) > Date.now(), 'expires_at is in the future');
    }
    const parts: JsonObject[] = [];
    for (let at = 0; at < bytes.length; at += partSize as number) {
      const number = parts.length + 1;
      const part = await this.storage(
        lease,
        'PUT',
        `/data/multipart?uploadId=${uploadId}&partNumber=${number}`,
        {
          headers: { 'content-type': 'application/octet-stream' },
          body: bytes.subarray(at, at + (partSize as number)),
        },
      );
      demand(part.status === 200, `part status ${part.status}`);
      const { etag } = jsonOf(part);
      demand(typeof etag === 'string', 'etag');
      parts.push({ part_number: number, etag });
    }
    const done = await this.storage(lease, 'POST', `/data/multipart?uploadId=${uploadId}`, {
      headers: json,
      body: JSON.stringify({ parts }),
    });
    demand(done.status === 200, `completion status ${done.status}`);
    const { id } = jsonOf(done);
    demand(typeof id === 'string', 'id');
    if (newer) demand(id === dataId, 'the id announced');
    return id;
  }

  storage(lease: LeaseEnvelope, method: string, path: string, call: HttpCall = {}): Promise<HttpAnswer> {
    return http(method, `${dataUrl(lease)}${path}`, {
      ...call,
      headers: {
        authorization: `Bearer ${this.#domainToken}`,
        'posemesh-client-id': 'posemesh-compute-node/8f0a',
        ...call.headers,
      },
    });
  }

  // Section 9.3.

  /** What a newer node wants of a lease before it touches it. */
  checkNewerLease(lease: LeaseEnvelope, capability: string): void {
    const now = Date.now();
    const { task, domain_id, domain_server_url, access_token } = lease;
    demand(task.capability === capability, 'the capability asked for');
    demand(domain_id !== null && domain_server_url !== null && access_token !== null, 'domain and token');
    const url = new URL(domain_server_url);
    demand(
      url.protocol === 'https:' || ['127.0.0.1', 'localhost', '[::1]'].includes(url.hostname),
      'https, or http on loopback',
    );
    for (const time of [lease.access_token_expires_at, lease.lease_expires_at, task.lease_expires_at]) {
      demand(time !== null && Date.parse(time) > now, 'every time is in the future');
    }
    const pieces = access_token.split('.');
    demand(pieces.length === 3, 'the token is a JWT');
    const claims = JSON.parse(Buffer.from(pieces[1]!, 'base64url').toString()) as JsonObject;
    demand(claims['iss'] === 'dds', 'iss dds');
    demand(claims['domain_id'] === domain_id, 'the domain of the lease');
    demand(
      Array.isArray(claims['aud']) && claims['aud'].includes(domain_server_url),
      'aud is an array with the server',
    );
    demand(typeof claims['exp'] === 'number' && claims['exp'] * 1000 > now, 'exp in the future');
  }
}

function jobOf({ task, domain_id }: LeaseEnvelope): JsonObject {
  return { task_id: task.id, job_id: task.job_id, domain_id, capability: task.capability };
}

function baseOf(lease: LeaseEnvelope): string {
  return lease.domain_server_url!.replace(/\/+$/, '');
}

function dataUrl(lease: LeaseEnvelope): string {
  return `${baseOf(lease)}/api/v1/domains/${lease.domain_id}`;
}

/** The list of a lookup or of a single upload; every member of every entry is required. */
export function metadataOf(answer: HttpAnswer): JsonObject[] {
  const { data } = jsonOf(answer);
  demand(Array.isArray(data), 'data is a list');
  for (const item of data as JsonObject[]) {
    for (const name of ['id', 'domain_id', 'name', 'data_type', 'created_at', 'updated_at']) {
      demand(typeof item[name] === 'string', `${name} is a string`);
    }
    demand(Number.isInteger(item['size']) && (item['size'] as number) >= 0, 'size is an integer');
  }
  return data as JsonObject[];
}

/** Section 4.3: exactly `size` bytes are a part's, and the boundary is searched after them. */
function parseParts(body: Buffer, boundary: string): Part[] {
  const parts: Part[] = [];
  const open = `--${boundary}\r\n`;
  let at = body.indexOf(open);
  while (at !== -1) {
    const headEnd = body.indexOf('\r\n\r\n', at);
    const head = body.subarray(at + open.length, headEnd).toString();
    const line = head.split('\r\n').find((each) => /^content-disposition:/i.test(each)) ?? '';
    const params = new Map(
      line
        .split(';')
        .slice(1)
        .map((each) => {
          const [name = '', value = ''] = each.trim().split('=');
          return [name, value.replaceAll('"', '')] as const;
        }),
    );
    const start = headEnd + 4;
    const end = start + Number(params.get('size') ?? 0);
    demand(end <= body.length, 'the payload is whole');
    parts.push({
      id: params.get('id') ?? '',
      name: params.get('name') ?? '',
      dataType: params.get('data-type') ?? '',
      domainId: params.get('domain-id') ?? '',
      bytes: body.subarray(start, end),
    });
    at = body.indexOf(open, end);
  }
  demand(
    body.subarray(-`--${boundary}--\r\n`.length).toString() === `--${boundary}--\r\n`,
    'the final boundary',
  );
  return parts;
}
