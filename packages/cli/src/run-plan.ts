/** What `millrace run` is to do, from its arguments and files, before anything is started. */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import type { JobSubmission } from '@millrace/dispatch/client';
import { MillraceError, checkCapability, describeError } from '@millrace/runner';
import { COMPUTE_CAPABILITY } from './compute-runner.ts';
import { loadConfig, type ComputeSpec, type LoadedConfig, type RunnerSpec } from './config-file.ts';
import type { Io } from './io.ts';
import { checkInputs, parseInput, parseNamedInputs, readJobFile, type InputSource } from './job-file.ts';
import { runnerSpecs, singleRunner } from './runner-specs.ts';
import { buildComputes, type BuiltJobFile } from './submission.ts';

/** The options of `millrace run` that say what to run. */
export interface PlanOptions {
  readonly input?: readonly string[];
  readonly meta?: string;
  readonly label?: string;
  readonly runner?: readonly string[];
  readonly config?: string;
}

/** What is to be run, before anything is started. */
export interface RunPlan {
  readonly config: LoadedConfig;
  readonly runners: readonly RunnerSpec[];
  /** How computes are run; null: nothing in the job needs that, or they shall not be run here. */
  readonly compute: ComputeSpec | null;
  readonly named: ReadonlyMap<string, InputSource>;
  /** The job; `capabilities` asks for those of {@link runners}, in order. */
  file(capabilities: () => Promise<readonly string[]>): Promise<BuiltJobFile>;
}

/**
 * Reads everything `millrace run` was pointed at.
 *
 * @throws MillraceError `invalid_argument` for whatever cannot be run, naming it
 */
export async function planRun(
  io: Io,
  options: PlanOptions,
  target: string,
  remote: boolean,
): Promise<RunPlan> {
  const config = await loadConfig(options.config, io.cwd);
  const inputs = options.input ?? [];
  if (/\.(?:ya?ml|json)$/i.test(target)) {
    if (options.meta !== undefined || options.label !== undefined) {
      throw new MillraceError(
        'invalid_argument',
        `--meta and --label belong to a runner module or a capability; ${target} is a job file and says both itself`,
      );
    }
    const read = await readJobFile(target, io.cwd, io.stdin);
    const runners = remote ? [] : await runnerSpecs(options.runner ?? [], config, io.cwd);
    const computes = read.job.tasks.some((task) => task.capability === COMPUTE_CAPABILITY);
    const compute = !remote && computes && config.compute !== false ? (config.compute ?? {}) : null;
    if (!remote && runners.length === 0 && compute === null) throw nothingRuns(target);
    const named = parseNamedInputs(inputs, io.cwd);
    await checkInputs(read, named, false);
    const built = await buildComputes(read);
    return {
      config,
      runners,
      compute,
      named,
      async file(capabilities) {
        if (!remote) requireRunners(built.job, await capabilities());
        return built;
      },
    };
  }
  const isModule = /\.[mc]?[jt]s$/i.test(target);
  if (!isModule && !target.startsWith('/')) {
    throw new MillraceError(
      'invalid_argument',
      `${JSON.stringify(target)} is neither a runner module (.ts, .mts, .js, .mjs), nor a job file (.yaml, .yml, .json), nor a capability such as /images/thumbnail/v1`,
    );
  }
  if (isModule && options.runner !== undefined) {
    throw new MillraceError('invalid_argument', `--runner belongs to a job file; ${target} is the runner`);
  }
  const spec = isModule ? await singleRunner(target, config, io.cwd) : null;
  if (spec === null) checkCapability(target);
  const meta = await readMeta(options.meta, io.cwd);
  const named = new Map(inputs.map((input, index) => [String(index), parseInput(input, io.cwd)]));
  const inputs_cids = [...named.keys()].map((key) => `input:${key}`);
  const jobOf = (capability: string): BuiltJobFile => {
    const label = options.label ?? capability;
    return {
      job: { label, tasks: [{ label, capability, inputs_cids, meta }] },
      baseDir: io.cwd,
      computes: [],
    };
  };
  await checkInputs(jobOf(''), named, false);
  if (spec !== null) {
    return {
      config,
      runners: [spec],
      compute: null,
      named,
      file: async (capabilities) => jobOf((await capabilities())[0] ?? ''),
    };
  }
  const built = jobOf(target);
  const runners = remote ? [] : await runnerSpecs(options.runner ?? [], config, io.cwd);
  if (!remote && runners.length === 0) throw nothingRuns(target);
  return {
    config,
    runners,
    compute: null,
    named,
    async file(capabilities) {
      if (!remote) requireRunners(built.job, await capabilities());
      return built;
    },
  };
}

function nothingRuns(target: string): MillraceError {
  return new MillraceError(
    'invalid_argument',
    `nothing here can run ${target}: name runner modules with --runner or in millrace.config.ts, or a dispatcher with --url`,
  );
}

/** A job that nothing here can run would wait for ever. */
function requireRunners(job: JobSubmission, capabilities: readonly string[]): void {
  const missing = job.tasks.find((task) => !capabilities.includes(task.capability));
  if (missing === undefined) return;
  throw new MillraceError(
    'invalid_argument',
    `no runner here does ${missing.capability}; loaded are ${capabilities.join(', ')}; add the module with --runner or in the config file`,
  );
}

async function readMeta(text: string | undefined, cwd: string): Promise<unknown> {
  if (text === undefined) return null;
  let json = text;
  if (text.startsWith('@')) {
    const file = path.resolve(cwd, text.slice(1));
    json = await readFile(file, 'utf8').catch((error: unknown) => {
      throw new MillraceError('invalid_argument', `--meta: cannot read ${file}`, { cause: error });
    });
  }
  try {
    return JSON.parse(json);
  } catch (error) {
    throw new MillraceError('invalid_argument', `--meta is not JSON: ${describeError(error)}`, {
      cause: error,
    });
  }
}
