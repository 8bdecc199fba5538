/**
 * What a node's config file says. `millrace.config.ts` (or `.js`, `.mjs`, `.json`, `.yaml`, `.yml`):
 *
 *     import { defineConfig } from 'millrace';
 *     export default defineConfig({ runners: ['./resize.ts'], labels: { gpu: 'none' }, maxConcurrency: 2 });
 */
import type { SupervisionOptions } from '@millrace/node';
import type { Runner } from '@millrace/runner';

/** A runner module and how it is run. */
export interface RunnerEntry {
  /** Path of a `.ts`, `.mts`, `.js` or `.mjs` file (or `.cts`, `.cjs`) whose default export is a Runner; relative to the config file. */
  readonly module: string;
  /** Replaces the module's own capability. */
  readonly capability?: string;
  /** For this runner; each missing member is the config's own, then the default. */
  readonly limits?: Partial<RunnerLimits>;
  /** Granted to the runner's code, which sees only the harmless part of the node's environment. Default none. */
  readonly env?: Readonly<Record<string, string>>;
  /** Threads kept loaded and ready, 1 to 1024. Default 1. */
  readonly warm?: number;
  /** Labels of this runner, besides the node's. Default none. */
  readonly labels?: Readonly<Record<string, string>>;
  /** Bounds of its tasks' supervision; each missing member is the config's own. */
  readonly supervision?: SupervisionOptions;
}

/** A runner the config file made, and what it asks of the node. */
export interface MadeRunner {
  readonly runner: Runner;
  /** Labels of this runner, besides the node's. Default none. */
  readonly labels?: Readonly<Record<string, string>>;
  /** Bounds of its tasks' supervision; each missing member is the config's own. */
  readonly supervision?: SupervisionOptions;
}

/** Bounds of one task; a breach fails it, naming limit and value. */
export interface RunnerLimits {
  /** JavaScript heap of the thread, 8 to 65,536 MiB. Default 512. */
  readonly memoryMiB: number;
  /** From start to settling. Default 24 h. */
  readonly wallMs: number;
  /** From loading the module to it being ready. Default 30 s. */
  readonly loadMs: number;
  /** From the abort signal to termination. Default 5 s. */
  readonly graceMs: number;
  /** stdout and stderr kept per task. Default 1 MiB. */
  readonly logBytes: number;
}

/** A Golem runtime, driven by this node. Its capability is `/golem/<name>/v1`; tasks say what to do in `meta.exe_script`. */
export interface RuntimeEntry {
  /**
   * A program by its path, relative to the config file; `wasi`, the one that comes with this program; or what a plugin
   * descriptor calls it.
   */
  readonly runtime: string | { readonly descriptor: string; readonly dirs?: readonly string[] };
  /** In the capability. Default: the program's file name without its extension, or the descriptor's. */
  readonly name?: string;
  /** Replaces the whole capability. */
  readonly capability?: string;
  /** An image handed to it, relative to the config file. Default: the input that the task names in `meta.task_package`. */
  readonly taskPackage?: string;
  /** Words put before its subcommand. */
  readonly args?: readonly string[];
  /** Granted to the runtime, which sees only the harmless part of the node's environment. Default none. */
  readonly env?: Readonly<Record<string, string>>;
  /** Where work directories are made, relative to the config file. Default: the system's folder for temporary files. */
  readonly workDir?: string;
  readonly limits?: Partial<RuntimeLimits>;
}

/** Bounds of a runtime and its tasks; each has a default and a text in docs/runtimes.md. */
export interface RuntimeLimits {
  readonly deployMs: number;
  readonly startMs: number;
  readonly answerMs: number;
  readonly runMs: number;
  readonly stopMs: number;
  readonly exitMs: number;
  readonly killGraceMs: number;
  readonly outputBytes: number;
  readonly captureBytes: number;
  readonly maxFrameBytes: number;
  readonly commands: number;
  readonly abortMs: number;
  readonly capturedBytes: number;
  readonly outputFiles: number;
  readonly outputTotalBytes: number;
  readonly outputDepth: number;
}

/** Bounds of one compute; each has a default and a text in docs/compute.md. */
export interface ComputeLimits {
  readonly maxMemoryMb: number;
  /** Default here 60,000. */
  readonly maxWallMs: number;
  readonly maxPrepareMs: number;
  readonly maxInputBytes: number;
  readonly maxOutputBytes: number;
  readonly maxLogBytes: number;
  readonly maxModuleBytes: number;
  readonly maxFunctions: number;
  readonly maxImports: number;
  readonly maxTableEntries: number;
  /** Default: not counted. */
  readonly maxFuel: number;
}

/** How computes are run: content-addressed code of tasks of the capability `/compute/v1`. */
export interface ComputeConfig {
  readonly limits?: Partial<ComputeLimits>;
  /** Threads, and so computes at once, 1 to 256. Default: the number of processors and one. */
  readonly workers?: number;
  /**
   * WebAssembly modules that computes may be linked against, such as Javy's plugin. Paths are relative to the config file;
   * `digest` is the sha256 the file must have, 64 hex digits. Default none.
   */
  readonly plugins?: readonly { readonly file: string; readonly digest: string }[];
  /** Fetched computes kept on disk, in bytes; the longest unused go first. Default 1 GiB. */
  readonly cacheBytes?: number;
}

export interface MillraceConfig {
  /**
   * In order: where two runners can do a task, the first one gets it. A module is run in threads of its own. A Runner is
   * taken as it is and called on the node's own thread, which must stay free: it is for runners that start programs
   * elsewhere, such as `subprocess({ … })` and `container({ … })` of `@millrace/exec`.
   */
  readonly runners?: readonly (string | RunnerEntry | RuntimeEntry | Runner | MadeRunner)[];
  /**
   * Whether the node runs computes, and how. They are sandboxed and need nothing installed, so `up` runs them unless this is
   * false, and `run` those of its job; `node start` only when this says so.
   */
  readonly compute?: boolean | ComputeConfig;
  /** What tasks' `capability_filters` are matched against. Default none. */
  readonly labels?: Readonly<Record<string, string>>;
  readonly limits?: Partial<RunnerLimits> & {
    /** How long running tasks may go on after the first stop request. Default 30,000 ms. */
    readonly drainMs?: number;
  };
  /**
   * Restarts, time limits and slots of tasks: what they have that say nothing, and the most they may ask for in
   * `meta.supervision`. See docs/routing.md. Default: one try, and whatever a task asks for.
   */
  readonly supervision?: SupervisionOptions;
  /** Variables of every program and container that a task names; they win over the task's own. Default none. */
  readonly env?: Readonly<Record<string, string>>;
  /** Tasks at once. Default: `MAX_CONCURRENCY`, else 1 (`up` and `run`: the number of processors). With `resources`: 1,000. */
  readonly maxConcurrency?: number;
  /**
   * What the node has to give to its tasks, which then take amounts of it instead of counting alike: `cpu` in cores, `memory` in
   * bytes or as a size such as `'32GiB'`, whole `gpu`, or names of your own. Default: `RESOURCES`, else it does not say.
   */
  readonly resources?: Readonly<Record<string, number | string>>;
}

/** Returns its argument; it is there for the types. */
export function defineConfig(config: MillraceConfig): MillraceConfig {
  return config;
}
