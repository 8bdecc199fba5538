/**
 * What a node's config file says. `millrace.config.ts` (or `.js`, `.mjs`, `.json`, `.yaml`, `.yml`):
 *
 *     import { defineConfig } from 'millrace';
 *     export default defineConfig({ runners: ['./resize.ts'], labels: { gpu: 'none' }, maxConcurrency: 2 });
 */
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

export interface MillraceConfig {
  /**
   * In order: where two runners can do a task, the first one gets it. A module is run in threads of its own. A Runner is
   * taken as it is and called on the node's own thread, which must stay free: it is for runners that start programs
   * elsewhere, such as `subprocess({ … })` and `container({ … })` of `@millrace/exec`.
   */
  readonly runners?: readonly (string | RunnerEntry | Runner)[];
  /** What tasks' `capability_filters` are matched against. Default none. */
  readonly labels?: Readonly<Record<string, string>>;
  readonly limits?: Partial<RunnerLimits> & {
    /** How long running tasks may go on after the first stop request. Default 30,000 ms. */
    readonly drainMs?: number;
  };
  /** Tasks at once. Default: `MAX_CONCURRENCY`, else 1 (`up` and `run`: the number of processors). */
  readonly maxConcurrency?: number;
}

/** Returns its argument; it is there for the types. */
export function defineConfig(config: MillraceConfig): MillraceConfig {
  return config;
}
