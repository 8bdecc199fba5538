/** What both subprocess runners are: many attempts at a time, one sandbox examined once, all of it ended on close. */
import {
  MillraceError,
  TaskAbort,
  systemClock,
  type Clock,
  type Logger,
  type Runner,
  type RunnerHost,
  type TaskContext,
} from '@millrace/runner';
import { UsageSampler } from '../process/usage-sampler.ts';
import { defaultWorkDir } from '../sandbox/launch.ts';
import { planSandbox, type SandboxWish } from '../sandbox/plan.ts';
import { sandboxFindings, type SandboxFindings } from '../sandbox/probe.ts';
import { abortOf, runAttempt, type AttemptPlan, type AttemptWorld } from './attempt.ts';
import { sweepTaskFolders } from './task-folder.ts';

/** A Runner that owns processes. */
export interface SubprocessRunner extends Runner, AsyncDisposable {
  /** Ends all programs, with their grace; tasks that still run reject with a TaskAbort `shutdown`. Resolves when all are gone. Harmless when repeated. */
  close(): Promise<void>;
}

export interface RunnerSettings {
  readonly capability: string;
  readonly wish: SandboxWish;
  readonly cgroupParent: string | undefined;
  readonly workDir: string | undefined;
  readonly clock: Clock | undefined;
  readonly log: Logger | undefined;
  /** What a task comes to; called before anything is fetched. */
  readonly plan: (ctx: TaskContext) => Omit<AttemptPlan, 'sandbox'>;
}

export class ProgramRunner implements SubprocessRunner {
  readonly type = 'subprocess';
  readonly capability: string;
  readonly #settings: RunnerSettings;
  readonly #sampler: UsageSampler;
  readonly #stopping = new AbortController();
  readonly #running = new Set<Promise<void>>();
  #log: Logger | undefined;
  #world: Promise<AttemptWorld> | null = null;
  #closed: Promise<void> | null = null;

  constructor(settings: RunnerSettings) {
    this.capability = settings.capability;
    this.#settings = settings;
    this.#log = settings.log;
    this.#sampler = new UsageSampler(settings.clock ?? systemClock);
  }

  /** Examines the sandbox, ends and removes what a killed node left, and tells what is missing. */
  async onNodeStart({ log }: RunnerHost): Promise<void> {
    if (process.platform !== 'linux') return;
    this.#log ??= log;
    await this.#prepared();
  }

  run(ctx: TaskContext): Promise<void> {
    return this.perform(ctx, this.#settings.plan);
  }

  /** As {@link run}, with a plan that was made before. */
  perform(ctx: TaskContext, plan: RunnerSettings['plan']): Promise<void> {
    const running = this.#run(ctx, plan).finally(() => this.#running.delete(running));
    this.#running.add(running);
    return running;
  }

  close(): Promise<void> {
    this.#stopping.abort(new TaskAbort('shutdown', 'the runner was closed'));
    this.#closed ??= Promise.allSettled(this.#running).then(() => undefined);
    return this.#closed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #run(given: TaskContext, planOf: RunnerSettings['plan']): Promise<void> {
    if (process.platform !== 'linux') {
      throw new MillraceError('unimplemented', `subprocess runners need Linux, this is ${process.platform}`);
    }
    const signal = AbortSignal.any([given.signal, this.#stopping.signal]);
    if (signal.aborted) throw abortOf(signal);
    const plan = planOf(given);
    const world = await this.#prepared();
    if (signal.aborted) throw abortOf(signal);
    const sandbox = planSandbox(this.#settings.wish, world.findings.report);
    const { lease, input, output, ctrl, accessToken, log } = given;
    const ctx: TaskContext = { lease, input, output, ctrl, accessToken, log, signal };
    await runAttempt(ctx, { ...plan, sandbox }, world);
  }

  /** By whoever comes first, for all. */
  #prepared(): Promise<AttemptWorld> {
    this.#world ??= this.#prepare().catch((error: unknown) => {
      this.#world = null;
      throw error;
    });
    return this.#world;
  }

  async #prepare(): Promise<AttemptWorld> {
    const { cgroupParent, clock = systemClock, workDir = defaultWorkDir(), wish } = this.#settings;
    const log = this.#log;
    const findings = await sandboxFindings({
      clock,
      ...(cgroupParent === undefined ? {} : { cgroupParent }),
    });
    await sweepTaskFolders(workDir, log);
    this.#tell(findings, wish);
    return { findings, sampler: this.#sampler, clock, log, workDir };
  }

  /** Once: what the operator might take for granted and does not have. */
  #tell({ report }: SandboxFindings, wish: SandboxWish): void {
    const { capability } = this.#settings;
    const log = this.#log;
    for (const warning of report.warnings) log?.warn(warning, { capability });
    try {
      const { applied, missing } = planSandbox(wish, report);
      const level = missing.length > 0 ? 'warn' : 'info';
      log?.[level]('sandbox of programs', {
        capability,
        tier: applied.tier,
        cgroup: applied.cgroup,
        missing: [...missing],
      });
    } catch (error) {
      log?.error('sandbox of programs', { capability, error: MillraceError.from(error).message });
    }
  }
}
