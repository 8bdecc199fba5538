/**
 * A compute node as a thing with a lifetime: identity, storage and engine wired from one configuration. The face the
 * command line and embedders use; what the node does all day is in `engine.ts`.
 */
import { randomUUID } from 'node:crypto';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  MillraceError,
  systemClock,
  type Clock,
  type Logger,
  type Random,
  type Runner,
  type Tracer,
} from '@millrace/runner';
import {
  openDomainPool,
  openHttpDds,
  openHttpDms,
  walletAddress,
  type TokenSource,
} from '@millrace/dispatch/client';
import { openCallbacks, type CallbackAddress } from './callbacks.ts';
import type { NodeConfig } from './config.ts';
import { Engine } from './engine.ts';
import { DEFAULT_COALESCE_MS } from './heartbeat.ts';
import { createLogger } from './log.ts';
import { openLogin, type Login } from './login.ts';
import { noopMetrics, type MetricsBackend } from './metrics.ts';
import { openRegistration } from './registration.ts';
import { BuildContext } from './routing/build-context.ts';
import { Roster, type RunnerRegistration } from './routing/roster.ts';
import { DEFAULT_RETRY } from './storage/attempts.ts';
import { openStoragePorts } from './storage/ports.ts';
import type { SupervisionOptions } from './supervision/policy.ts';
import { openWorkspace } from './workspace.ts';

export interface NodeOptions {
  readonly config: NodeConfig;
  readonly runners: readonly (Runner | RunnerRegistration)[];
  /** Sent with the registration; tasks' `capability_filters` are matched against them. Default none. */
  readonly labels?: Readonly<Record<string, string>>;
  /** Bounds and defaults of tasks' supervision. Default: one try, and what a task asks for. */
  readonly supervision?: SupervisionOptions;
  /** Variables of every program and container that a task names; they win over the task's own. Default none. */
  readonly env?: Readonly<Record<string, string>>;
  /**
   * Where tasks get their private folders. Left-overs of a crashed node in it are removed at start. Default: a folder
   * of this wallet's under the system's temporary folder.
   */
  readonly workDir?: string;
  /** How long running tasks may go on after the first stop request. Default 30,000 ms. */
  readonly drainMs?: number;
  /** How long aborted tasks may take to end before their runners are closed. Default 10,000 ms. */
  readonly abortMs?: number;
  /** How long tasks may take to end once their runners are closed; then the node gives up on them. Default 10,000 ms. */
  readonly killMs?: number;
  /** Wall time of one attempt; then it is aborted with reason `deadline` and fails. Default 24 h. */
  readonly taskWallMs?: number;
  /** Shortest time between heartbeats that only carry progress or events. Default 250 ms. */
  readonly progressIntervalMs?: number;
  /**
   * How often the node registers again although it is registered. Default: as often as the dispatcher announces, which for
   * the reference's services and for our own is never; newer services want 120,000 ms. Null: never.
   */
  readonly repeatRegistrationMs?: number | null;
  /** Takes the callbacks of older services at this address; see `callbacks.ts` for what that opens. Default: none. */
  readonly callbacks?: CallbackAddress;
  /** Default: measures nothing. */
  readonly metrics?: MetricsBackend;
  /** Where spans go. Default: nowhere; the trace a lease names reaches the runners all the same. */
  readonly tracer?: Tracer;
  /** Default: as the configuration says, to standard error. */
  readonly log?: Logger;
  readonly clock?: Clock;
  readonly random?: Random;
}

export type NodeState = 'idle' | 'registering' | 'running' | 'draining' | 'aborting' | 'stopped';

export interface ComputeNode extends AsyncDisposable {
  readonly state: NodeState;
  /** Lower case `0x…`. */
  readonly wallet: string;
  /** Tasks under way. */
  readonly active: number;
  /**
   * The node's own token at the dispatcher, for runners that fetch what tasks name from it. There is one while the node runs;
   * before and after, `get` rejects with `failed_precondition`.
   */
  readonly tokens: TokenSource;
  /**
   * Sweeps left-overs, tells its runners, registers, logs in, then leases and runs tasks until stopped. Resolves once everything has
   * ended and the runners are closed. Called once.
   *
   * @throws MillraceError when it cannot start: the first login is refused, the work folder or the address for callbacks
   * cannot be used.
   */
  run(): Promise<void>;
  /**
   * One step down the ladder each call: stop leasing and let tasks finish for `drainMs`; abort them with reason
   * `shutdown`; kill them by closing the runners; give up on what is left. Time takes the later steps by itself.
   * Leases of tasks that did not finish are released, so the attempt does not count.
   */
  stop(): void;
}

const DAY_MS = 24 * 60 * 60 * 1000;

/**
 * Makes a node. Nothing is sent and nothing is written before {@link ComputeNode.run}. Disposing stops it, skipping the
 * drain, and waits until it has ended. The node owns its runners: they are closed when it ends.
 *
 * @throws MillraceError `invalid_argument` for a bad private key, no runner, or a runner without a proper capability
 */
export function createNode(options: NodeOptions): ComputeNode {
  return new Node(options);
}

class Node implements ComputeNode {
  readonly wallet: string;
  readonly tokens: TokenSource;
  readonly #options: NodeOptions;
  readonly #router: Roster;
  readonly #log: Logger;
  readonly #stopping = new AbortController();
  #engine: Engine | null = null;
  #login: TokenSource | null = null;
  #running: Promise<void> | null = null;
  #state: 'idle' | 'registering' | 'started' | 'stopped' = 'idle';

  constructor(options: NodeOptions) {
    const { config } = options;
    this.#options = options;
    this.wallet = walletAddress(config.privateKeyHex);
    this.tokens = {
      get: async (call) => {
        if (this.#login !== null) return await this.#login.get(call);
        throw new MillraceError('failed_precondition', 'the node is not running, so it has no token');
      },
      invalidate: (token) => this.#login?.invalidate(token),
    };
    this.#log =
      options.log ??
      createLogger({
        format: config.logFormat,
        level: config.logLevel,
        secrets: [config.regSecret, config.privateKeyHex],
      });
    this.#router = new Roster(options.runners, {
      ...(options.labels !== undefined && { labels: options.labels }),
      ...(options.supervision !== undefined && { supervision: options.supervision }),
      context: new BuildContext(
        Object.entries(options.env ?? {}).map(([key, value]) => ({ key, value })),
        options.metrics ?? noopMetrics(),
      ),
      log: this.#log,
    });
  }

  get state(): NodeState {
    if (this.#state !== 'started') return this.#state;
    const state = this.#engine?.state ?? 'idle';
    return state === 'idle' ? 'running' : state;
  }

  get active(): number {
    return this.#engine?.active ?? 0;
  }

  async run(): Promise<void> {
    if (this.#running !== null) {
      throw new MillraceError('failed_precondition', 'the node was run before; create a new one');
    }
    this.#running = this.#live();
    await this.#running;
  }

  stop(): void {
    this.#stopping.abort(new MillraceError('canceled', 'the node is stopping'));
    this.#engine?.stop();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#running === null) {
      this.#running = this.#router.close(this.#log);
      this.#state = 'stopped';
    } else if (this.#state !== 'stopped') {
      this.stop();
      if (this.#engine?.state === 'draining') this.stop();
    }
    // Why it could not start is for whoever called `run`.
    await this.#running.catch(() => undefined);
  }

  async #live(): Promise<void> {
    this.#state = 'registering';
    const ended = new AbortController();
    const told = this.#router.nodeStarts({
      log: this.#log,
      signal: AbortSignal.any([this.#stopping.signal, ended.signal]),
    });
    try {
      await this.#serve();
    } finally {
      ended.abort(new MillraceError('canceled', 'the node has ended'));
      await told;
      // Closed by the engine, unless it never came to that.
      if (this.#engine === null) await this.#router.close(this.#log);
      this.#login = null;
      this.#state = 'stopped';
    }
  }

  async #serve(): Promise<void> {
    const { config } = this.#options;
    const clock = this.#options.clock ?? systemClock;
    const random = this.#options.random ?? Math.random;
    const log = this.#log;
    const signal = this.#stopping.signal;
    const identity = { privateKeyHex: config.privateKeyHex, wallet: this.wallet, clock, random, log };
    const timeoutMs = config.requestTimeoutMs;
    const { proxy } = config;

    await using workspace = await openWorkspace({
      workDir: this.#options.workDir ?? join(tmpdir(), `millrace-${this.wallet}`),
      clock,
      log,
    });
    await using dds = openHttpDds({ baseUrl: config.ddsBaseUrl, timeoutMs, proxy });
    await using registration = openRegistration({
      ...identity,
      dds,
      credentials: config.regSecret,
      capabilities: this.#router.capabilities,
      labels: this.#router.labels,
      version: config.nodeVersion,
      maxConcurrency: config.maxConcurrency,
      resources: config.resources,
      intervalMs: config.registerIntervalMs,
      maxRetry: config.registerMaxRetry,
      repeatEveryMs: () => {
        if (this.#options.repeatRegistrationMs !== undefined) return this.#options.repeatRegistrationMs;
        const seconds = this.#engine?.features.registrationIntervalSecs ?? null;
        return seconds === null ? null : seconds * 1000;
      },
    });
    const { callbacks } = this.#options;
    await using _listener =
      callbacks === undefined
        ? null
        : await openCallbacks({ ...callbacks, onRegistered: () => registration.told(), clock, log });
    await using login = openLogin({
      ...identity,
      dds,
      config,
      onRegistrationLost: () => registration.lost(),
    });
    try {
      await registration.waitRegistered(signal);
      await firstToken(login, signal);
    } catch (error) {
      if (signal.aborted) return;
      throw error;
    }

    await using dms = openHttpDms({ baseUrl: config.dmsBaseUrl, tokens: login, timeoutMs, proxy });
    await using domains = openDomainPool({ proxy });
    // One for the life of the node: the services charge once per client.
    const clientId = config.clientId ?? `posemesh-compute-node/${randomUUID()}`;
    this.#login = login;
    const engine = new Engine({
      dms,
      router: this.#router,
      openStorage: (request) =>
        openStoragePorts({
          ...request,
          clientId,
          // The storage is mostly as far away as the dispatcher: work that outlasts the one outlasts the other.
          retry: { retryForMs: Math.max(DEFAULT_RETRY.retryForMs, config.contactGraceMs) },
          clock,
          random,
          storage: (settings) => domains.storage(settings),
        }),
      workspace,
      metrics: this.#options.metrics ?? noopMetrics(),
      ...(this.#options.tracer !== undefined && { tracer: this.#options.tracer }),
      heartbeat: {
        minRatio: config.heartbeatMinRatio,
        maxRatio: config.heartbeatMaxRatio,
        coalesceMs: this.#options.progressIntervalMs ?? DEFAULT_COALESCE_MS,
        requestTimeoutMs: timeoutMs,
        contactGraceMs: config.contactGraceMs,
      },
      taskWallMs: this.#options.taskWallMs ?? DAY_MS,
      maxConcurrency: config.maxConcurrency,
      pollBackoffMinMs: config.pollBackoffMinMs,
      pollBackoffMaxMs: config.pollBackoffMaxMs,
      stopping: {
        drainMs: this.#options.drainMs ?? 30_000,
        abortMs: this.#options.abortMs ?? 10_000,
        killMs: this.#options.killMs ?? 10_000,
      },
      clock,
      random,
      log,
    });
    this.#engine = engine;
    this.#state = 'started';
    await engine.run();
  }
}

/** Asked to come later is no refusal: many nodes may start at once behind one address. The login paces itself. */
async function firstToken(login: Login, signal: AbortSignal): Promise<void> {
  for (;;) {
    try {
      await login.get({ signal });
      return;
    } catch (error) {
      signal.throwIfAborted();
      if (!MillraceError.is(error) || error.code !== 'resource_exhausted' || !error.retryable) throw error;
    }
  }
}
