/**
 * Runners that are chosen by what a task is: a plugin turns a task into something that can be run, and runs nothing itself.
 */
import type { TaskContext } from '../context.ts';
import type { TaskSpec as LeasedTask } from '../lease.ts';
import type { RunnerEnv } from '../model/environment.ts';
import type { Slot } from '../model/identity.ts';
import type { TaskKind } from '../model/task-kind.ts';
import type { TaskSpec } from '../model/task-spec.ts';
import type { Runner, RunnerType } from '../runner.ts';
import type { RunId } from './run-id.ts';

/** An executable task. It may run many times, once per attempt, and holds nothing between them. */
export interface BuiltTask {
  /** Its run id's name, normally. */
  readonly name: string;
  /** One attempt; as {@link Runner.run}. */
  run(ctx: TaskContext): Promise<void>;
}

/** What a router lends to every plugin. */
export interface PluginContext {
  /** The operator's variables, for every task; they win over the task's own. See `mergeEnv`. */
  readonly env: RunnerEnv;
  readonly metrics: {
    /** Trouble of the runner itself, beside the failure of the task that met it. */
    recordRunnerError(
      runnerType: RunnerType,
      errorKind: 'cgroup_prepare_failed' | 'backend_config_failed' | 'spawn_failed' | 'module_load_failed',
    ): void;
  };
}

export interface RunnerPlugin {
  /** 1 to 128 of `A-Z a-z 0-9 . _ -`; unique in a router. For logs, errors and run ids. */
  readonly name: string;
  /** "Could I build this?" Depends on nothing but the spec; mostly on its kind. */
  supports(spec: TaskSpec): boolean;
  /**
   * Checks the task, and fixes all that does not depend on the attempt. Starts nothing and acquires nothing: what is built may never
   * run, or run many times.
   *
   * @throws RunnerError when it cannot be done here
   */
  buildTask(spec: TaskSpec, ctx: PluginContext, runId: RunId): BuiltTask;
  /** Default: `makeRunId(name, slot)`. */
  buildRunId?(slot: Slot): RunId;
}

/** A Runner whose tasks say themselves what is to be run: a node hands them to its plugin, by their kind. */
export interface KindRunner extends Runner {
  readonly plugin: RunnerPlugin;
  /**
   * What a leased task's `meta` describes.
   *
   * @throws MillraceError `invalid_argument`, naming the member
   */
  kindOf(task: LeasedTask): TaskKind;
}

export function isKindRunner(runner: Runner): runner is KindRunner {
  return 'plugin' in runner && 'kindOf' in runner;
}

/** A name for a runner that is known by its capability: `/exec/subprocess/v1` becomes `exec-subprocess-v1`. */
export function nameOfCapability(capability: string): string {
  const name = capability.replaceAll(/[^A-Za-z0-9._-]+/g, '-').replaceAll(/^-+|-+$/g, '');
  return name.slice(0, 64) || 'runner';
}
