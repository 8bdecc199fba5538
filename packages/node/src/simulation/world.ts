/**
 * The whole system in one thread from one seed: real engines, sessions and heartbeats over a real store, with a network
 * that fails, nodes that crash, stop and come back, runners of every temper, and requestors that submit and cancel.
 *
 * For a while everything goes wrong at random; then the faults end, and within bounded time everything must be settled.
 * What must hold is checked while it runs (`#violate`) and at the end (`#judge`):
 *
 * - every task ends, none is lost, none is accepted twice, and the accepted outputs are the accepted attempt's;
 * - nothing ends while its work is still running under the lease that ended;
 * - a runner is entered only when every earlier attempt of the task has been told to stop, or is out of contact with its
 *   dispatcher for as long as its lease lasted;
 * - attempts and concurrency are bounded;
 * - the event stream of every job has no gap and tells of the same endings as the tables;
 * - when it is over no work runs and no process has a timer left.
 *
 * Over the store in memory one seed is always the same run. Over a store with a server of its own (see {@link SimulationOptions})
 * the order in which its answers arrive is not the seed's; what must hold is the same.
 */
import { createHash } from 'node:crypto';
import {
  MillraceError,
  defineRunner,
  sleep,
  type ArtifactSink,
  type Clock,
  type InputSource,
  type Random,
  type Runner,
  type TaskContext,
} from '@millrace/runner';
import { SimulatedClock, seededRandom } from '@millrace/runner/testing';
import { openSqliteStore, type JobSpec, type Store, type TaskSubmission } from '@millrace/dispatch';
import { NO_FEATURES, type Dms } from '@millrace/dispatch/client';
import { Engine } from '../engine.ts';
import { noopMetrics } from '../metrics.ts';
import { Roster } from '../routing/roster.ts';
import { SimulatedDispatcher } from './dispatcher.ts';
import { MortalClock } from './mortal-clock.ts';
import { Link, type Faults } from './network.ts';
import { memoryLog } from './scripted-dms.ts';

/** Virtual time during which things go wrong. */
const TROUBLE_MS = 40_000;
/** Virtual time after which all must be over. Lease, retry and runner times add up to far less. */
const SETTLE_MS = 30 * 60_000;
const LEASE_TTL_MS = 6_000;
/** Runs one seed. */
const TEST_FILE = 'packages/node/dist/simulation/simulation.test.js';
/** Node faults the store forgives per task. */
const FREE_NODE_FAULTS = 3;

const TEMPERS = ['quick', 'slow', 'chatty', 'flaky', 'broken', 'deaf'] as const;
type Temper = (typeof TEMPERS)[number];

export interface SimulationResult {
  /** Of everything that happened, in order. */
  readonly traceHash: string;
  readonly trace: readonly string[];
  readonly jobs: number;
  readonly tasks: number;
  /** How often a runner was entered. */
  readonly attempts: number;
  readonly crashes: number;
  /** Counts of what the run has seen, by name; for tests that the simulation is not a quiet one. */
  readonly seen: ReadonlyMap<string, number>;
}

/** A runner at work. */
interface Run {
  readonly taskId: string;
  readonly leaseId: string | null;
  readonly nodeId: string;
  readonly process: Process;
  readonly signal: AbortSignal;
}

/** One life of a node. */
interface Process {
  readonly engine: Engine;
  readonly clock: MortalClock;
  readonly link: Link;
  readonly runs: Set<Run>;
  /** What its leases' ends are, as far as it was told: epoch ms by lease, or by task where leases have no id. */
  readonly expiries: ReadonlyMap<string, number>;
  alive: boolean;
}

interface Node {
  readonly name: string;
  readonly id: string;
  readonly concurrency: number;
  /** How far its clock is off, in every life of it. */
  skewMs: number;
  process: Process;
}

/** What a store is opened with, so that it lives in the simulation's time. */
export interface SimulatedStoreOptions {
  readonly clock: Clock;
  readonly random: Random;
  readonly leaseTtlMs: number;
  readonly cancelGraceMs: number;
  readonly backoff: { readonly baseMs: number; readonly capMs: number };
}

export interface SimulationOptions {
  /** Opens the store, empty. The simulation closes it. Default: SQLite in memory. */
  readonly openStore?: (options: SimulatedStoreOptions) => Promise<Store>;
  /** The file that runs one seed with this store, for the command that is told. Default: the one for SQLite. */
  readonly testFile?: string;
}

/** What was violated, and the command that repeats it. */
export class SimulationFailure extends Error {
  /** Of everything that happened, in order. */
  readonly trace: readonly string[];

  constructor(message: string, trace: readonly string[]) {
    super(message);
    this.trace = trace;
  }
}

/**
 * Runs one seed to its end.
 *
 * @throws SimulationFailure naming the seed
 */
export async function simulate(seed: number, options: SimulationOptions = {}): Promise<SimulationResult> {
  return await new World(seed, options).run();
}

class World {
  readonly #seed: number;
  readonly #options: SimulationOptions;
  readonly #clock: SimulatedClock;
  /** Calls of the store under way; time stands still meanwhile. */
  #asked = 0;
  #allAnswered: () => void = () => undefined;
  readonly #random: Random;
  readonly #nodes: Node[] = [];
  readonly #jobIds: string[] = [];
  readonly #settled = new Set<string>();
  readonly #runs = new Set<Run>();
  readonly #entered = new Map<string, number>();
  readonly #outputs = new Map<string, string>();
  readonly #accepted = new Map<string, string>();
  readonly #drained = new Map<string, number>();
  readonly #trace: string[] = [];
  readonly #seen = new Map<string, number>();
  readonly #violations: string[] = [];
  /** A wire without lease ids, as the reference service has it. */
  readonly #reference: boolean;
  /** Clocks are off, by too little to be told from a slow network, or by an hour, which is. */
  readonly #skew: 'none' | 'slight' | 'hour';
  /** How long work goes on after its lease. */
  readonly #contactGraceMs: number;
  #faults: Faults;
  #dispatcher!: SimulatedDispatcher;
  #crashes = 0;
  #troubled = true;

  constructor(seed: number, options: SimulationOptions) {
    this.#seed = seed;
    this.#options = options;
    this.#clock = new SimulatedClock({ drain: () => this.#drain() });
    this.#random = seededRandom(seed);
    this.#reference = this.#chance(0.2);
    this.#skew = this.#pick(['none', 'none', 'none', 'none', 'slight', 'hour']);
    this.#contactGraceMs = this.#pick([0, 5_000, 30_000]);
    const maxDelayMs = this.#pick([2, 20, 300, 2_000]);
    // Without lease ids a message that is repeated or overtaken ends the wrong attempt. That is a limit of that
    // wire, and not what is looked for here.
    this.#faults = this.#reference
      ? { loss: this.#pick([0, 0.05]), repeat: 0, minDelayMs: 5, maxDelayMs: 5 }
      : {
          loss: this.#pick([0, 0.02, 0.2]),
          repeat: this.#pick([0, 0.05, 0.2]),
          minDelayMs: 1,
          maxDelayMs,
        };
  }

  async run(): Promise<SimulationResult> {
    const settings: SimulatedStoreOptions = {
      clock: this.#clock,
      random: this.#random,
      leaseTtlMs: LEASE_TTL_MS,
      cancelGraceMs: 60_000,
      backoff: { baseMs: 200, capMs: 5_000 },
    };
    const { openStore } = this.#options;
    const store =
      openStore === undefined
        ? await openSqliteStore({ ...settings, path: ':memory:', schedule: queueMicrotask })
        : this.#watched(await openStore(settings));
    this.#dispatcher = new SimulatedDispatcher(store, this.#clock, {
      completed: (taskId, leaseId) => this.#onCompleted(taskId, leaseId),
      ended: (taskId, leaseId, how) => this.#onEnded(taskId, leaseId, how),
      released: (taskId, reason) => {
        if (reason === 'shutdown') this.#drained.set(taskId, (this.#drained.get(taskId) ?? 0) + 1);
      },
    });
    await this.#begin(store);
    await this.#clock.advance(TROUBLE_MS);
    this.#heal();
    this.#watchJobs(store);
    try {
      await this.#clock.runUntil(() => this.#settled.size === this.#jobIds.length && this.#runs.size === 0, {
        timeoutMs: SETTLE_MS,
      });
    } catch {
      this.#violate(
        `${this.#jobIds.length - this.#settled.size} jobs and ${this.#runs.size} runners are not over ` +
          `${SETTLE_MS} ms after the faults ended`,
      );
    }
    await this.#stopAll();
    await this.#judge(store);
    await this.#dispatcher.close();
    this.#report();
    return {
      traceHash: createHash('sha256').update(this.#trace.join('\n')).digest('hex'),
      trace: this.#trace,
      jobs: this.#jobIds.length,
      tasks: this.#outputs.size,
      attempts: [...this.#entered.values()].reduce((sum, count) => sum + count, 0),
      crashes: this.#crashes,
      seen: this.#seen,
    };
  }

  // ---- What happens -------------------------------------------------------------------------------------------

  async #begin(store: Store): Promise<void> {
    const count = 1 + Math.floor(this.#random() * 3);
    for (let i = 0; i < count; i += 1) {
      const concurrency = this.#reference ? 1 : 1 + Math.floor(this.#random() * 4);
      const name = `node-${i}`;
      const { id } = await store.createNode({
        name,
        mode: 'public',
        organizationId: ORGANIZATION,
        secretHash: name,
      });
      await store.registerNode({
        nodeId: id,
        secretHash: name,
        wallet: `0x${String(i).padStart(40, '0')}`,
        capabilities: TEMPERS.map(capabilityOf),
        labels: {},
        version: '0.0.0',
        maxConcurrency: concurrency,
      });
      const skewMs = this.#wrong();
      const node = { name, id, concurrency, skewMs };
      this.#nodes.push({ ...node, process: this.#start(node) });
    }
    const jobs = 3 + Math.floor(this.#random() * 4);
    for (let i = 0; i < jobs; i += 1) {
      this.#at(this.#random() * TROUBLE_MS * 0.6, () => this.#submit(store, i));
    }
    for (const node of this.#nodes) this.#plague(node);
  }

  /** Node by node, something every now and then. */
  #plague(node: Node): void {
    this.#at(1_000 + this.#random() * 15_000, () => {
      if (!this.#troubled) return;
      const kind = this.#random();
      if (this.#skew !== 'none' && this.#chance(0.3)) this.#setClock(node);
      if (kind < 0.3) this.#crash(node);
      else if (kind < 0.5) this.#restart(node);
      else if (kind < 0.85) this.#partition([node]);
      else if (kind < 0.92) this.#partition(this.#nodes);
      this.#plague(node);
    });
  }

  /** How far a clock may be off in this run. */
  #wrong(): number {
    if (this.#skew === 'none') return 0;
    if (this.#skew === 'slight') return Math.round((this.#random() - 0.5) * 4_000);
    return this.#pick([-3_600_000, 0, 3_600_000]);
  }

  #setClock(node: Node): void {
    const skewMs = this.#wrong();
    this.#note(`${node.name} has its clock set to ${skewMs} ms`, 'clock');
    node.process.clock.jump(skewMs - node.skewMs);
    node.skewMs = skewMs;
  }

  #crash(node: Node): void {
    const { process } = node;
    if (!process.alive) return;
    this.#note(`${node.name} crashes`, 'crash');
    this.#crashes += 1;
    process.alive = false;
    process.clock.kill();
    process.link.kill();
    for (const run of process.runs) this.#runs.delete(run);
    process.runs.clear();
    this.#at(200 + this.#random() * 12_000, () => this.#revive(node));
  }

  /** A stop request, perhaps an impatient one, and a new process afterwards. */
  #restart(node: Node): void {
    const { process } = node;
    if (!process.alive || process.engine.state !== 'running') return;
    this.#note(`${node.name} is asked to stop`, 'stop');
    process.engine.stop();
    for (let again = this.#random(); again < 0.5; again += 0.25) {
      this.#at(this.#random() * 3_000, () => process.engine.stop());
    }
  }

  /** Of all nodes, it is an outage of the dispatcher. */
  #partition(nodes: readonly Node[]): void {
    const lengthMs = 500 + this.#random() * 15_000;
    for (const { name, process } of nodes) {
      this.#note(`${name} is cut off`, 'partition');
      process.link.connected = false;
      this.#at(lengthMs, () => {
        process.link.connected = true;
      });
    }
  }

  #revive(node: Node): void {
    if (node.process.alive) return;
    this.#note(`${node.name} starts`);
    node.process = this.#start(node);
  }

  #start(node: Omit<Node, 'process'>): Process {
    const clock = new MortalClock(this.#clock, node.skewMs);
    const link = new Link(this.#clock, this.#random, () => this.#faults);
    const leases = new WeakMap<ArtifactSink, string | null>();
    const closing = new AbortController();
    const runs = new Set<Run>();
    const expiries = new Map<string, number>();
    let life: Process | null = null;
    const runners = TEMPERS.map((temper) =>
      defineRunner({
        capability: capabilityOf(temper),
        run: async (ctx) => {
          if (life === null) throw new Error('a runner was entered before the engine ran');
          const run: Run = {
            taskId: ctx.lease.task.id,
            leaseId: leases.get(ctx.output) ?? null,
            nodeId: node.id,
            process: life,
            signal: ctx.signal,
          };
          this.#onEntered(node, run);
          try {
            await this.#work(temper, ctx, clock, closing.signal);
          } finally {
            if (life.alive) {
              runs.delete(run);
              this.#runs.delete(run);
              this.#note(`${node.name} leaves ${this.#short(run.taskId)}`);
            }
          }
        },
        close: () => Promise.resolve(closing.abort(new Error('the runner is closed'))),
      } satisfies Runner),
    );
    const engine = new Engine({
      dms: this.#overheard(this.#dispatcher.dms(node.id, link, this.#reference ? NO_FEATURES : {}), expiries),
      router: new Roster(runners),
      openStorage: ({ lease, leaseId }) => {
        const output = {} as ArtifactSink;
        leases.set(output, leaseId);
        // Names the attempt, so that what was accepted can be told from what was not.
        const id = `${lease.task.id}#${this.#entered.get(lease.task.id) ?? 0}`;
        return {
          input: {} as InputSource,
          output,
          artifacts: () => [{ logical_path: 'out', name: 'out', data_type: 'binary', id }],
          close: () => Promise.resolve(),
        };
      },
      workspace: {
        taskFolder: (id) => ({
          path: `/${id}`,
          create: () => Promise.resolve(`/${id}`),
          remove: () => Promise.resolve(),
        }),
      },
      metrics: noopMetrics(),
      heartbeat: {
        minRatio: 0.25,
        maxRatio: 0.35,
        coalesceMs: 250,
        requestTimeoutMs: 10_000,
        contactGraceMs: this.#contactGraceMs,
      },
      taskWallMs: 10 * 60_000,
      maxConcurrency: node.concurrency,
      pollBackoffMinMs: 200,
      pollBackoffMaxMs: 2_000,
      stopping: { drainMs: 4_000, abortMs: 3_000, killMs: 3_000 },
      clock,
      random: this.#random,
      log: memoryLog(),
    });
    const process: Process = { engine, clock, link, runs, expiries, alive: true };
    life = process;
    void engine.run().then(() => {
      process.alive = false;
      this.#note(`${node.name} has stopped`);
      if (clock.pending > 0) this.#violate(`${node.name} has ${clock.pending} timers after it stopped`);
      if (runs.size > 0) this.#violate(`${node.name} has ${runs.size} runners after it stopped`);
      const found = this.#nodes.find(({ name }) => name === node.name);
      if (this.#troubled && found !== undefined) {
        this.#at(this.#random() * 3_000, () => this.#revive(found));
      }
    });
    return process;
  }

  async #work(temper: Temper, ctx: TaskContext, clock: MortalClock, closed: AbortSignal): Promise<void> {
    const random = this.#random;
    switch (temper) {
      case 'quick':
        return await sleep(clock, random() * 30, ctx.signal);
      case 'slow':
        for (let left = 1 + Math.floor(random() * 20); left > 0; left -= 1) {
          await ctx.ctrl.progress({ left });
          await sleep(clock, 1_000, AbortSignal.any([ctx.signal, closed]));
        }
        return;
      case 'chatty':
        for (let i = 0; i < 60; i += 1) {
          await ctx.ctrl.progress({ i });
          ctx.log.info(`line ${i}`);
          if (i % 5 === 0) await ctx.ctrl.logEvent({ i });
          await sleep(clock, random() * 60, ctx.signal);
        }
        return;
      case 'flaky':
        await sleep(clock, random() * 2_000, ctx.signal);
        if (random() < 0.4) throw new Error('flaky');
        return;
      case 'broken':
        await sleep(clock, random() * 100, ctx.signal);
        throw new MillraceError('invalid_argument', 'broken');
      case 'deaf':
        return await sleep(clock, 3_000 + random() * 40_000, closed);
    }
  }

  async #submit(store: Store, index: number): Promise<void> {
    const spec = this.#jobSpec(index);
    const [outcome] = await store.submit([
      { spec, organizationId: null, idempotencyKey: null, submitter: 'sim' },
    ]);
    if (outcome?.ok !== true) throw new Error(`job ${index} was refused: ${outcome?.error.message}`);
    const { jobId } = outcome.value;
    this.#jobIds.push(jobId);
    this.#note(`job ${index} submitted, ${spec.tasks.length} tasks`);
    if (this.#chance(0.35)) {
      this.#at(this.#random() * 20_000, async () => {
        this.#note(`job ${index} is cancelled`, 'cancel');
        await store.cancelJob(jobId);
      });
    }
  }

  #jobSpec(index: number): JobSpec {
    const stages = ['a', 'b', 'c'].slice(0, 1 + Math.floor(this.#random() * 3));
    const tasks = stages.flatMap((stage, depth) =>
      Array.from({ length: 1 + Math.floor(this.#random() * 4) }, (_, i): TaskSubmission => {
        const temper = this.#pick(TEMPERS);
        return {
          label: `${stage}${i}`,
          stage,
          // A job with one broken task is over soon; few of them, or little else happens.
          capability: capabilityOf(temper === 'broken' && this.#chance(0.7) ? 'quick' : temper),
          capability_filters: {},
          priority: Math.floor(this.#random() * 3),
          inputs_cids: depth > 0 ? [`stage:${stages[depth - 1]}`] : [],
          outputs_prefix: null,
          mode: 'public',
          meta: {},
          max_attempts: 1 + Math.floor(this.#random() * 5),
          deadline_at: null,
        };
      }),
    );
    const deadline = this.#chance(0.15)
      ? new Date(this.#clock.now() + 5_000 + this.#random() * 60_000)
      : null;
    return {
      label: `job ${index}`,
      domain_id: DOMAIN,
      priority: Math.floor(this.#random() * 3),
      meta: {},
      tasks,
      edges: stages.slice(1).map((to, i) => ({ from: stages[i] ?? '', to })),
      deadline_at: deadline?.toISOString() ?? null,
    };
  }

  #heal(): void {
    this.#note('the faults end');
    this.#troubled = false;
    this.#faults = { loss: 0, repeat: 0, minDelayMs: 1, maxDelayMs: 5 };
    for (const node of this.#nodes) {
      node.process.link.connected = true;
      if (!node.process.alive) this.#revive(node);
      else if (node.process.engine.state !== 'running') {
        // It is stopping; somebody has to be there.
        void this.#whenStopped(node.process).then(() => this.#revive(node));
      }
    }
  }

  async #whenStopped(process: Process): Promise<void> {
    while (process.alive) await sleep(this.#clock, 100);
  }

  /** Keeps `#settled`, looking only at jobs that changed. */
  #watchJobs(store: Store): void {
    const changed = new Set(this.#jobIds);
    const subscription = store.subscribe((change) => {
      if (change.kind === 'job') changed.add(change.jobId);
    });
    const look = async (): Promise<void> => {
      const ids = [...changed];
      changed.clear();
      for (const id of ids) {
        const detail = await store.getJob(id);
        if (detail !== null && TERMINAL.includes(detail.job.status)) this.#settled.add(id);
      }
      if (this.#settled.size < this.#jobIds.length) this.#at(500, look);
      else subscription[Symbol.dispose]();
    };
    this.#at(0, look);
  }

  async #stopAll(): Promise<void> {
    for (const { process } of this.#nodes) if (process.alive) process.engine.stop();
    try {
      await this.#clock.runUntil(() => this.#nodes.every(({ process }) => !process.alive), {
        timeoutMs: 60_000,
      });
    } catch {
      this.#violate('a node does not stop within 60 s although it has nothing to do');
    }
  }

  // ---- What must hold -----------------------------------------------------------------------------------------

  /** The connection, with what the node hears of the ends of its leases written down. */
  #overheard(dms: Dms, expiries: Map<string, number>): Dms {
    const note = (key: string, expiresAt: string | null): void => {
      if (expiresAt !== null) expiries.set(key, Date.parse(expiresAt));
    };
    return {
      ...dms,
      lease: async (...args) => {
        const result = await dms.lease(...args);
        if (result.kind === 'leases') {
          for (const { leaseId, envelope } of result.leases) {
            note(leaseId ?? envelope.task.id, envelope.lease_expires_at);
          }
        }
        return result;
      },
      heartbeat: async (lease, ...rest) => {
        const reply = await dms.heartbeat(lease, ...rest);
        note(lease.leaseId ?? lease.taskId, reply.lease_expires_at);
        return reply;
      },
    };
  }

  #onEntered(node: Omit<Node, 'process'>, run: Run): void {
    const attempt = (this.#entered.get(run.taskId) ?? 0) + 1;
    this.#entered.set(run.taskId, attempt);
    this.#note(`${node.name} enters ${this.#short(run.taskId)}, attempt ${attempt}`, 'enter');
    for (const other of this.#runs) {
      if (other.taskId !== run.taskId) continue;
      this.#count('overlap');
      if (other.signal.aborted) continue;
      const expiresAt = other.process.expiries.get(other.leaseId ?? other.taskId) ?? Infinity;
      if (this.#clock.now() >= expiresAt && this.#contactGraceMs > 0) this.#count('overlap out of contact');
      // A clock that is off by little makes a node believe in its lease for that much longer.
      else if (this.#skew !== 'slight') {
        this.#violate(
          `${this.#short(run.taskId)} is begun again while an attempt of it was not told to stop`,
        );
      }
    }
    this.#runs.add(run);
    run.process.runs.add(run);
    if (run.process.runs.size > node.concurrency) {
      this.#violate(`${node.name} runs ${run.process.runs.size} tasks, ${node.concurrency} are allowed`);
    }
    run.signal.addEventListener('abort', () => {
      const reason = (run.signal.reason as { readonly reason: string }).reason;
      this.#note(`${node.name} aborts ${this.#short(run.taskId)}: ${reason}`, `abort ${reason}`);
    });
  }

  #onCompleted(taskId: string, leaseId: string): void {
    const before = this.#accepted.get(taskId);
    if (before !== undefined && before !== leaseId) {
      this.#violate(`${this.#short(taskId)} was completed twice, under leases ${before} and ${leaseId}`);
    }
    this.#accepted.set(taskId, leaseId);
  }

  #onEnded(taskId: string, leaseId: string, how: string): void {
    this.#note(`${how} of ${this.#short(taskId)} accepted`, how);
    for (const run of this.#runs) {
      if (run.taskId === taskId && run.leaseId === leaseId) {
        this.#violate(`${how} of ${this.#short(taskId)} was accepted while its work was still running`);
      }
    }
  }

  async #judge(store: Store): Promise<void> {
    for (const jobId of this.#jobIds) {
      const detail = await store.getJob(jobId);
      if (detail === null) {
        this.#violate(`job ${jobId} is lost`);
        continue;
      }
      const { job, tasks, receipts } = detail;
      const events = (await store.events(jobId, 0, 1_000_000)) ?? [];
      events.forEach(({ seq, kind }, i) => {
        if (kind === 'task.resumed') this.#count('resumed');
        if (seq !== i + 1) this.#violate(`job ${jobId}: event ${seq} is at place ${i + 1}`);
      });
      if (events.at(-1)?.kind !== `job.${job.status}`) {
        this.#violate(`job ${jobId} is ${job.status}, its last event is ${events.at(-1)?.kind}`);
      }
      const queued = tasks.filter(({ status }) => !TERMINAL.includes(status));
      if (queued.length > 0) this.#violate(`job ${jobId} has ${queued.length} tasks that are not over`);
      const expected = tasks.every(({ status }) => status === 'completed')
        ? 'completed'
        : tasks.some(({ status }) => status === 'failed')
          ? 'failed'
          : 'canceled';
      if (job.status !== expected) this.#violate(`job ${jobId} is ${job.status}, its tasks say ${expected}`);
      this.#count(`job ${job.status}`);
      await this.#judgeLogs(store, jobId);
      for (const task of tasks) {
        const name = this.#short(task.id);
        this.#outputs.set(task.id, task.output_cids.join());
        this.#count(`task ${task.status}`);
        const endings = events.filter(
          ({ task_id, kind }) => task_id === task.id && TERMINAL.includes(kind.replace('task.', '')),
        );
        if (endings.length !== 1 || endings[0]?.kind !== `task.${task.status}`) {
          this.#violate(
            `${name} is ${task.status}, its events say ${endings.map(({ kind }) => kind).join()}`,
          );
        }
        const done = receipts.filter(
          ({ task_id, outcome }) => task_id === task.id && outcome === 'completed',
        );
        if (done.length !== (task.status === 'completed' ? 1 : 0)) {
          this.#violate(`${name} is ${task.status} with ${done.length} accepted completions`);
        }
        if (done[0] !== undefined && done[0].outputs.join() !== task.output_cids.join()) {
          this.#violate(
            `${name} has outputs ${task.output_cids.join()}, accepted were ${done[0].outputs.join()}`,
          );
        }
        const accepted = this.#accepted.get(task.id);
        if (accepted !== undefined && accepted !== done[0]?.id) {
          this.#violate(`${name}: the completion told as accepted is not the one that was kept`);
        }
        if (task.attempts > task.max_attempts) {
          this.#violate(`${name} counts ${task.attempts} attempts of ${task.max_attempts}`);
        }
        const entered = this.#entered.get(task.id) ?? 0;
        const bound = task.max_attempts + FREE_NODE_FAULTS + (this.#drained.get(task.id) ?? 0);
        if (entered > bound)
          this.#violate(`${name} was begun ${entered} times, at most ${bound} are allowed`);
      }
    }
  }

  /** A log holds what its attempt said from the beginning on: nothing twice, nothing left out, whatever the network did. */
  async #judgeLogs(store: Store, jobId: string): Promise<void> {
    for (const { taskId, attempt } of (await store.listLogs(jobId)) ?? []) {
      const page = await store.readLogs({ taskId, attempt, offset: 0, limit: 1 << 20 });
      const lines = Buffer.from(page?.bytes ?? [])
        .toString('utf8')
        .split('\n');
      if (lines.pop() !== '') this.#violate(`${this.#short(taskId)}: its log ends within a line`);
      const said = Array.from({ length: 60 }, (_, i) => [
        `line ${i}`,
        ...(i % 5 === 0 ? [JSON.stringify({ i })] : []),
      ]).flat();
      const told = lines.map((line) => {
        const { text, event } = JSON.parse(line) as { text?: string; event?: unknown };
        return text ?? JSON.stringify(event);
      });
      this.#count('log');
      if (told.length === said.length) this.#count('log to the end');
      const wrong = told.findIndex((text, index) => text !== said[index]);
      if (wrong !== -1) {
        this.#violate(
          `${this.#short(taskId)}, attempt ${attempt}: line ${wrong} of its log is ${told[wrong]}, not ${said[wrong]}`,
        );
      }
    }
  }

  #report(): void {
    if (this.#violations.length === 0) return;
    throw new SimulationFailure(
      [
        `simulation of seed ${this.#seed} broke ${this.#violations.length} rules; the first ones:`,
        ...this.#violations.slice(0, 5),
        'repeat it, with what happened, by',
        `  npm run build && MILLRACE_SIM_SEED=${this.#seed} npx vitest run ${this.#options.testFile ?? TEST_FILE}`,
      ].join('\n'),
      this.#trace,
    );
  }

  // ---- Time and the store -------------------------------------------------------------------------------------

  /** Resolves when what was set off has run, and nothing is asked of the store any more. */
  async #drain(): Promise<void> {
    await nextTurn();
    while (this.#asked > 0) {
      await new Promise<void>((resolve) => {
        this.#allAnswered = resolve;
      });
      await nextTurn();
    }
  }

  /** The store, its calls counted while they are under way. */
  #watched(store: Store): Store {
    return new Proxy(store, {
      get: (target, name) => {
        const member: unknown = Reflect.get(target, name);
        if (typeof member !== 'function') return member;
        return (...args: unknown[]): unknown => {
          const answer: unknown = Reflect.apply(member, target, args);
          if (!(answer instanceof Promise)) return answer;
          this.#asked += 1;
          // Whoever asked hears of it first, and may ask again.
          const answered = (): void =>
            void setImmediate(() => {
              this.#asked -= 1;
              if (this.#asked === 0) this.#allAnswered();
            });
          answer.then(answered, answered);
          return answer;
        };
      },
    });
  }

  // ---- Small change -------------------------------------------------------------------------------------------

  #at(delayMs: number, what: () => void | Promise<void>): void {
    this.#clock.setTimer(() => void what(), delayMs);
  }

  #chance(probability: number): boolean {
    return this.#random() < probability;
  }

  #pick<T>(choices: readonly T[]): T {
    return choices[Math.floor(this.#random() * choices.length)] as T;
  }

  #count(what: string): void {
    this.#seen.set(what, (this.#seen.get(what) ?? 0) + 1);
  }

  #note(what: string, counted?: string): void {
    this.#trace.push(`${this.#clock.monotonic().toFixed(3)} ${what}`);
    if (counted !== undefined) this.#count(counted);
  }

  #violate(what: string): void {
    this.#note(`VIOLATION ${what}`);
    this.#violations.push(`at ${this.#clock.monotonic().toFixed(3)} ms: ${what}`);
  }

  #short(taskId: string): string {
    return `task ${taskId}`;
  }
}

const DOMAIN = '9c0c8f4e-2f7b-4a57-8f0a-0c7f7c1f5b21';
const ORGANIZATION = '3f6c1d0e-7a55-4c5e-9f0b-2d8a64b1c7e9';
const TERMINAL: readonly string[] = ['completed', 'failed', 'canceled'];

function capabilityOf(temper: Temper): string {
  return `/sim/${temper}/v1`;
}

/** Nothing here waits for I/O, and promise jobs are done before the next turn of the event loop. */
function nextTurn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}
