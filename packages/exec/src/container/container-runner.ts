/** What both container runners are: many attempts at a time on one engine, all of them ended on close. */
import { hostname } from 'node:os';
import { resolve } from 'node:path';
import { MillraceError, TaskAbort, systemClock } from '@millrace/runner';
import type { Clock, Logger, Runner, RunnerHost, TaskContext } from '@millrace/runner';
import { defaultWorkDir } from '../sandbox/launch.ts';
import { abortOf } from '../subprocess/attempt.ts';
import { sweepTaskFolders } from '../subprocess/task-folder.ts';
import { runAttempt } from './attempt.ts';
import type { ContainerPlan, ContainerWorld } from './attempt.ts';
import { thisProcess } from './owner.ts';
import { SharedEngine } from './shared-engine.ts';
import type { SharedEngineOptions } from './shared-engine.ts';

/** What every container runner may be told about its surroundings. */
export interface ContainerRunnerSettings {
  readonly engine?: ContainerEngineOptions;
  /**
   * The node's id. Containers carry it as the label `millrace.node`, and a node sweeps what processes of the same id left when they crashed. Default: the
   * host's name.
   */
  readonly node?: string;
  /**
   * Where the folders of tasks are made; the engine must see it at the same path. Default: `millrace-exec-<user id>` in the system's
   * temporary folder.
   */
  readonly workDir?: string;
  readonly log?: Logger;
  readonly clock?: Clock;
}

export interface ContainerEngineOptions {
  /** `unix:///path` or `tcp://host:port`. Default: the environment's `DOCKER_HOST`, else `unix:///var/run/docker.sock`. */
  readonly host?: string;
  /** Whether images that are not there may be fetched from their registry. Default false. */
  readonly allowPull?: boolean;
  /** How long fetching one may take. Default 600,000 ms. */
  readonly pullMs?: number;
  /** How long any other call may take. Default 30,000 ms. */
  readonly callMs?: number;
}

/** A Runner that owns containers. */
export interface ContainerRunner extends Runner, AsyncDisposable {
  /** Ends all containers, with their grace; tasks that still run reject with a TaskAbort `shutdown`. Resolves when all are removed. Harmless when repeated. */
  close(): Promise<void>;
}

export class ImageRunner implements ContainerRunner {
  readonly type = 'container';
  readonly capability: string;
  readonly #plan: (ctx: TaskContext) => ContainerPlan;
  #world: ContainerWorld;
  readonly #stopping = new AbortController();
  readonly #running = new Set<Promise<void>>();
  #swept: Promise<void> | null = null;
  #closed: Promise<void> | null = null;

  /** @param plan What a task comes to; called before anything is fetched. */
  constructor(
    capability: string,
    settings: ContainerRunnerSettings,
    plan: (ctx: TaskContext) => ContainerPlan,
  ) {
    const { clock = systemClock, log } = settings;
    const workDir = resolve(settings.workDir ?? defaultWorkDir());
    if (workDir.includes(':')) {
      throw new MillraceError(
        'invalid_argument',
        `workDir ${workDir} must not contain ":", which container engines take for a separator`,
      );
    }
    const owner = thisProcess(settings.node ?? hostname());
    const engine: SharedEngineOptions = settings.engine ?? {};
    this.capability = capability;
    this.#plan = plan;
    this.#world = { shared: new SharedEngine(engine, owner, clock, log), owner, clock, log, workDir };
  }

  /** Removes what a crashed node left. @throws MillraceError when the engine is away or cannot be used */
  async onNodeStart({ log, signal }: RunnerHost): Promise<void> {
    if (process.platform !== 'linux') return;
    this.#world = { ...this.#world, log: this.#world.log ?? log };
    this.#world.shared.log ??= log;
    await Promise.all([
      this.#sweepFolders(),
      this.#world.shared.ready(AbortSignal.any([signal, this.#stopping.signal])),
    ]);
  }

  run(ctx: TaskContext): Promise<void> {
    return this.perform(ctx, this.#plan);
  }

  /** As {@link run}, with a plan that was made before. */
  perform(ctx: TaskContext, plan: (ctx: TaskContext) => ContainerPlan): Promise<void> {
    const running = this.#run(ctx, plan).finally(() => this.#running.delete(running));
    this.#running.add(running);
    return running;
  }

  close(): Promise<void> {
    this.#stopping.abort(new TaskAbort('shutdown', 'the runner was closed'));
    this.#closed ??= Promise.allSettled(this.#running).then(() => this.#world.shared.close());
    return this.#closed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #sweepFolders(): Promise<void> {
    this.#swept ??= sweepTaskFolders(this.#world.workDir, this.#world.log);
    return this.#swept;
  }

  async #run(given: TaskContext, planOf: (ctx: TaskContext) => ContainerPlan): Promise<void> {
    if (process.platform !== 'linux') {
      throw new MillraceError('unimplemented', `container runners need Linux, this is ${process.platform}`);
    }
    const signal = AbortSignal.any([given.signal, this.#stopping.signal]);
    if (signal.aborted) throw abortOf(signal);
    const plan = planOf(given);
    await this.#sweepFolders();
    const { lease, input, output, ctrl, accessToken, log } = given;
    await runAttempt({ lease, input, output, ctrl, accessToken, log, signal }, plan, this.#world);
  }
}
