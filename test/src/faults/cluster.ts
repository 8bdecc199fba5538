/** Real processes around one store: a dispatcher, nodes, and proxies between all of them that can be told to fail. */
import { fork, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { mkdir } from 'node:fs/promises';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { connect, generatePrivateKeyHex, type Requestor } from '@millrace/dispatch/client';
import { temporaryFolder, until } from '../system.ts';
import type { SetClock } from './child.ts';
import type { DispatcherSettings } from './dispatcher-program.ts';
import type { Ledger } from './ledger.ts';
import type { NodeSettings } from './node-program.ts';
import type { PostgresServer } from './postgres-support.ts';
import { HttpProxy, TcpProxy } from './proxies.ts';

/** Short, so that a round is. */
export const LEASE_TTL_MS = 1_200;

/** A program of this folder at work. */
class Child implements AsyncDisposable {
  readonly process: ChildProcess;
  readonly stdout: string[] = [];
  /** The last lines of its log. */
  readonly stderr: string[] = [];
  readonly #exited: Promise<unknown>;

  constructor(program: string, settings: unknown, onLine: (line: string) => void = () => undefined) {
    this.process = fork(fileURLToPath(new URL(program, import.meta.url)), [JSON.stringify(settings)], {
      stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
      // Vitest's own flags are not for it.
      execArgv: [],
    });
    this.#exited = once(this.process, 'exit');
    createInterface({ input: this.process.stdout! }).on('line', (line) => this.stdout.push(line));
    createInterface({ input: this.process.stderr! }).on('line', (line) => {
      this.stderr.push(line);
      if (this.stderr.length > 200) this.stderr.shift();
      onLine(line);
    });
  }

  get ended(): boolean {
    return this.process.exitCode !== null || this.process.signalCode !== null;
  }

  async firstLine(): Promise<string> {
    await until(() => {
      if (this.stdout.length === 0 && this.ended) {
        throw new Error(`ended before its first line:\n${this.stderr.join('\n')}`);
      }
      return this.stdout.length > 0;
    });
    return this.stdout[0]!;
  }

  /** Until a line of its log has this message. */
  async says(message: string): Promise<void> {
    await until(() => {
      if (this.ended) throw new Error(`ended before it said "${message}":\n${this.stderr.join('\n')}`);
      return this.stderr.some((line) => line.includes(`"${message}"`));
    });
  }

  signal(name: NodeJS.Signals): void {
    this.process.kill(name);
  }

  setClock(clockOffsetMs: number): void {
    this.process.send({ clockOffsetMs } satisfies SetClock);
  }

  /** SIGKILL, also for one that is stopped; resolves when it is gone. */
  async kill(): Promise<void> {
    if (!this.ended) this.process.kill('SIGKILL');
    await this.#exited;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill();
  }
}

export interface ClusterNode {
  readonly name: string;
  child: Child;
}

export interface ClusterOptions {
  /** Null: SQLite in a folder of the cluster's. */
  readonly postgres: PostgresServer | null;
  readonly ledger: Ledger;
  readonly nodes: number;
  /** Folders that are elsewhere than in the cluster's own. */
  readonly places?: Partial<Places>;
  /** A database of the server's to take. Default: a new one. */
  readonly database?: string;
}

interface Places {
  /** Of the SQLite file. */
  readonly database: string;
  readonly blobs: string;
  /** Of all nodes: each has a folder in it. */
  readonly work: string;
}

export class Cluster implements AsyncDisposable {
  /** Between requestors and dispatcher. */
  readonly clients: HttpProxy;
  /** Between nodes and dispatcher, for all of its services. */
  readonly nodes: HttpProxy;
  /** Between dispatcher and PostgreSQL; null over SQLite. */
  readonly database: TcpProxy | null;
  readonly members: ClusterNode[] = [];
  readonly #folder: { readonly path: string } & AsyncDisposable;
  readonly #places: Places;
  readonly #store: DispatcherSettings['store'];
  readonly #ledger: Ledger;
  #dispatcher: { readonly child: Child; readonly url: string; readonly token: string } | null = null;
  readonly #clients: (Requestor & AsyncDisposable)[] = [];

  private constructor(
    parts: Pick<Cluster, 'clients' | 'nodes' | 'database'>,
    folder: { readonly path: string } & AsyncDisposable,
    places: Places,
    store: DispatcherSettings['store'],
    ledger: Ledger,
  ) {
    this.clients = parts.clients;
    this.nodes = parts.nodes;
    this.database = parts.database;
    this.#folder = folder;
    this.#places = places;
    this.#store = store;
    this.#ledger = ledger;
  }

  static async open(options: ClusterOptions): Promise<Cluster> {
    const { postgres, ledger, nodes } = options;
    const folder = await temporaryFolder();
    const places: Places = {
      database: folder.path,
      blobs: path.join(folder.path, 'blobs'),
      work: folder.path,
      ...options.places,
    };
    const database = postgres === null ? null : await TcpProxy.open(postgres.port);
    let store: DispatcherSettings['store'] = { sqlite: path.join(places.database, 'millrace.db') };
    if (postgres !== null && database !== null) {
      const url = new URL(postgres.url(options.database ?? (await postgres.createDatabase())));
      url.port = String(database.port);
      store = { postgres: url.href };
    }
    const parts = { clients: await HttpProxy.open(), nodes: await HttpProxy.open(), database };
    const cluster = new Cluster(parts, folder, places, store, ledger);
    try {
      await cluster.startDispatcher();
      await Promise.all(Array.from({ length: nodes }, (_, index) => cluster.#addNode(`node-${index}`)));
    } catch (error) {
      await cluster[Symbol.asyncDispose]();
      throw error;
    }
    return cluster;
  }

  get dispatcher(): Child {
    return this.#running.child;
  }

  get #running(): { readonly child: Child; readonly url: string; readonly token: string } {
    if (this.#dispatcher === null) throw new Error('no dispatcher was started');
    return this.#dispatcher;
  }

  /** Where it really listens. */
  get url(): string {
    return this.#running.url;
  }

  /** Of every requestor. */
  get token(): string {
    return this.#running.token;
  }

  /** A requestor through the proxy. */
  requestor(): Requestor {
    return this.#client(this.clients.url);
  }

  /** A requestor of the dispatcher there is now, past every proxy. */
  direct(): Requestor {
    return this.#client(this.#running.url);
  }

  /** On the same store and blobs as the one before, which has to be gone over SQLite. {@link setDispatcherClock} for the offset. */
  async startDispatcher(clockOffsetMs = 0): Promise<void> {
    const child = new Child('./dispatcher-program.js', {
      store: this.#store,
      blobs: this.#places.blobs,
      publicUrl: this.nodes.url,
      leaseTtlMs: LEASE_TTL_MS,
      clockOffsetMs,
    } satisfies DispatcherSettings);
    const { url, token } = JSON.parse(await child.firstLine()) as { url: string; token: string };
    this.#dispatcher = { child, url, token };
    this.clients.target = url;
    this.nodes.target = url;
    this.nodes.dateOffsetMs = clockOffsetMs;
  }

  /** Its time of day, as it reads it and as it tells it. */
  setDispatcherClock(clockOffsetMs: number): void {
    this.dispatcher.setClock(clockOffsetMs);
    this.nodes.dateOffsetMs = clockOffsetMs;
  }

  async killDispatcher(): Promise<void> {
    await this.#running.child.kill();
    this.clients.target = null;
    this.nodes.target = null;
  }

  /** The same node anew, in a new process. */
  async startNode(node: ClusterNode, clockOffsetMs = 0): Promise<void> {
    node.child = this.#launch(node.name, this.#environments.get(node.name)!, clockOffsetMs);
    await node.child.says('dispatcher reached');
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const client of this.#clients) await client[Symbol.asyncDispose]();
    await Promise.all(this.members.map(({ child }) => child.kill()));
    await this.#dispatcher?.child.kill();
    await this.clients[Symbol.asyncDispose]();
    await this.nodes[Symbol.asyncDispose]();
    await this.database?.[Symbol.asyncDispose]();
    await this.#folder[Symbol.asyncDispose]();
  }

  readonly #environments = new Map<string, Readonly<Record<string, string>>>();

  async #addNode(name: string): Promise<void> {
    const { registrationCredentials } = await this.direct().addNode({ name, mode: 'public' });
    this.#environments.set(name, {
      DDS_BASE_URL: this.nodes.url,
      DMS_BASE_URL: `${this.nodes.url}/v1`,
      REG_SECRET: registrationCredentials,
      SECP256K1_PRIVHEX: generatePrivateKeyHex(),
      LOG_FORMAT: 'json',
      MAX_CONCURRENCY: '2',
      POLL_BACKOFF_MS_MIN: '50',
      POLL_BACKOFF_MS_MAX: '500',
      REGISTER_INTERVAL_SECS: '1',
      REQUEST_TIMEOUT_SECS: '5',
      TOKEN_REAUTH_MAX_RETRIES: '20',
    });
    await mkdir(path.join(this.#places.work, name));
    const node = { name, child: this.#launch(name, this.#environments.get(name)!, 0) };
    this.members.push(node);
    await node.child.says('dispatcher reached');
  }

  #launch(name: string, env: Readonly<Record<string, string>>, clockOffsetMs: number): Child {
    return new Child(
      './node-program.js',
      { env, workDir: path.join(this.#places.work, name), clockOffsetMs } satisfies NodeSettings,
      (line) => this.#ledger.hearNode(line),
    );
  }

  #client(url: string): Requestor {
    const client = connect({ url, token: this.#running.token, timeoutMs: 10_000 });
    this.#clients.push(client);
    return client;
  }
}
