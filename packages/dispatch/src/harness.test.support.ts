/** A dispatcher on a real socket, a temporary folder and SQLite, and the few calls every test of the wire makes. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Clock, Json, Tracer } from '@millrace/runner';
import { openFileBlobs } from './blobs/files.ts';
import type { BlobStore } from './blobs.ts';
import type { SiweChallenge } from './client/dds.ts';
import { HttpOrigin } from './client/http.ts';
import type { Dispatcher, DispatcherLimits, Retention } from './dispatcher.ts';
import { openDispatcher } from './server.ts';
import { generatePrivateKeyHex, signMessage, siweMessage, walletAddress } from './siwe.ts';
import type { Store } from './store.ts';
import { openSqliteStore } from './stores/sqlite.ts';

export interface Answer {
  readonly status: number;
  header(name: string): string | null;
  readonly text: string;
  /** The body as JSON; null when it is empty. */
  readonly body: any; // eslint-disable-line typescript/no-explicit-any -- tests look into it with toEqual
}

export interface CallOptions {
  readonly token?: string | null;
  readonly json?: unknown;
  readonly raw?: string;
  readonly headers?: Readonly<Record<string, string>>;
  readonly signal?: AbortSignal;
}

export interface TestNode {
  readonly id: string;
  readonly credentials: string;
  readonly privateKey: string;
  readonly wallet: string;
  readonly token: string;
}

export interface HarnessOptions {
  /** Closed with the rest. Default: a new SQLite file. */
  readonly store?: Store;
  readonly limits?: Partial<DispatcherLimits>;
  readonly leaseTtlMs?: number;
  readonly clock?: Clock;
  readonly retention?: Retention;
  readonly tracer?: Tracer;
  readonly moreMetrics?: () => Promise<string>;
}

export class Harness implements AsyncDisposable {
  readonly dispatcher: Dispatcher;
  readonly store: Store;
  readonly blobs: BlobStore;
  /** Where {@link blobs} keeps its files. */
  readonly blobsDir: string;
  readonly clientToken: string;
  readonly #origin: HttpOrigin;
  readonly #dispose: () => Promise<void>;

  private constructor(
    dispatcher: Dispatcher,
    store: Store,
    blobs: BlobStore,
    blobsDir: string,
    clientToken: string,
    dispose: () => Promise<void>,
  ) {
    this.dispatcher = dispatcher;
    this.store = store;
    this.blobs = blobs;
    this.blobsDir = blobsDir;
    this.clientToken = clientToken;
    this.#origin = new HttpOrigin({ baseUrl: dispatcher.url, timeoutMs: 60_000, connections: 256 });
    this.#dispose = dispose;
  }

  static async open(options: HarnessOptions = {}): Promise<Harness> {
    const folder = await mkdtemp(join(tmpdir(), 'millrace-dispatch-'));
    const clock = options.clock === undefined ? {} : { clock: options.clock };
    const store =
      options.store ??
      (await openSqliteStore({
        path: join(folder, 'store.db'),
        ...clock,
        ...(options.leaseTtlMs === undefined ? {} : { leaseTtlMs: options.leaseTtlMs }),
      }));
    const blobsDir = join(folder, 'blobs');
    const blobs = await openFileBlobs({ dir: blobsDir });
    const dispatcher = await openDispatcher({
      store,
      blobs,
      port: 0,
      limits: options.limits ?? {},
      ...(options.retention !== undefined && { retention: options.retention }),
      ...(options.tracer !== undefined && { tracer: options.tracer }),
      ...(options.moreMetrics !== undefined && { moreMetrics: options.moreMetrics }),
      ...clock,
    });
    return new Harness(dispatcher, store, blobs, blobsDir, await dispatcher.issueClientToken(), async () => {
      await dispatcher.close();
      await blobs[Symbol.asyncDispose]();
      await store[Symbol.asyncDispose]();
      await rm(folder, { recursive: true, force: true });
    });
  }

  /** One request. Without `token` the client token is sent; null sends none. */
  async call(
    method: 'GET' | 'POST' | 'PUT' | 'DELETE' | 'HEAD',
    path: string,
    options: CallOptions = {},
  ): Promise<Answer> {
    const token = options.token === undefined ? this.clientToken : options.token;
    const response = await this.#origin.request({
      method,
      path,
      headers: {
        ...(token === null ? {} : { authorization: `Bearer ${token}` }),
        ...(options.raw === undefined ? {} : { 'content-type': 'application/json' }),
        ...options.headers,
      },
      ...(options.json === undefined ? {} : { json: options.json }),
      ...(options.raw === undefined ? {} : { body: options.raw }),
      ...(options.signal === undefined ? {} : { signal: options.signal }),
    });
    const text = await response.text(64 * 1024 * 1024);
    const isJson = (response.header('content-type') ?? '').startsWith('application/json');
    return {
      status: response.status,
      header: (name) => response.header(name),
      text,
      body: isJson && text !== '' ? JSON.parse(text) : null,
    };
  }

  async nonce(wallet: string): Promise<SiweChallenge> {
    return (await this.call('POST', '/internal/v1/auth/siwe/request', { token: null, json: { wallet } }))
      .body;
  }

  /** A signed message over a fresh nonce. */
  async signed(privateKey: string): Promise<{ message: string; signature: string }> {
    const wallet = walletAddress(privateKey);
    const message = siweMessage(await this.nonce(wallet), wallet);
    return { message, signature: signMessage(message, privateKey) };
  }

  async addNode(mode: 'public' | 'dedicated' = 'public'): Promise<{ id: string; credentials: string }> {
    const { body } = await this.call('POST', '/api/v1/nodes', { json: { name: 'a node', mode } });
    return { id: body.id, credentials: body.registration_credentials };
  }

  /** A node that is registered and logged in. */
  async joinNode(
    options: {
      capabilities?: string[];
      maxConcurrency?: number;
      labels?: Record<string, string>;
      resources?: unknown;
    } = {},
  ): Promise<TestNode> {
    const { id, credentials } = await this.addNode();
    const privateKey = generatePrivateKeyHex();
    const registered = await this.call('POST', '/internal/v1/nodes/register-wallet', {
      token: null,
      json: {
        ...(await this.signed(privateKey)),
        registration_credentials: credentials,
        capabilities: options.capabilities ?? ['/examples/hello/v1'],
        version: '1.2.3',
        ...(options.maxConcurrency === undefined ? {} : { max_concurrency: options.maxConcurrency }),
        ...(options.labels === undefined ? {} : { labels: options.labels }),
        ...(options.resources === undefined ? {} : { resources: options.resources }),
      },
    });
    if (registered.status !== 200)
      throw new Error(`registration answered ${registered.status} ${registered.text}`);
    return {
      id,
      credentials,
      privateKey,
      wallet: walletAddress(privateKey),
      token: await this.login(privateKey),
    };
  }

  async login(privateKey: string): Promise<string> {
    const answer = await this.call('POST', '/internal/v1/auth/siwe/verify', {
      token: null,
      json: await this.signed(privateKey),
    });
    if (answer.status !== 200) throw new Error(`login answered ${answer.status} ${answer.text}`);
    return answer.body.access_token;
  }

  /** Submits a job of one task and gives its id. */
  async submit(task: Record<string, Json> = {}, job: Record<string, Json> = {}): Promise<string> {
    const answer = await this.call('POST', '/v1/jobs', {
      json: { ...job, tasks: [{ label: 'hello', capability: '/examples/hello/v1', meta: {}, ...task }] },
    });
    if (answer.status !== 200) throw new Error(`submission answered ${answer.status} ${answer.text}`);
    return answer.body.job_id;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#origin.close();
    await this.#dispose();
  }
}

/** Waits until `condition` holds, looking every 10 ms. */
export async function until(condition: () => boolean | Promise<boolean>, timeoutMs = 10_000): Promise<void> {
  const deadline = performance.now() + timeoutMs;
  while (!(await condition())) {
    if (performance.now() > deadline) throw new Error(`the condition did not come true in ${timeoutMs} ms`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

export const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;
export const TIME = /^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{3}Z$/;
