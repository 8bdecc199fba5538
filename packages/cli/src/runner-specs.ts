/** Runner modules named on the command line, with what the config file says about them. */
import { access } from 'node:fs/promises';
import path from 'node:path';
import { MillraceError } from '@millrace/runner';
import type { LoadedConfig, ModuleSpec, RunnerSpec } from './config-file.ts';

/**
 * The modules named, then those the config lists. A module named that the config lists too takes the config's settings.
 *
 * @throws MillraceError `invalid_argument` for a file that is not there.
 */
export async function runnerSpecs(
  modules: readonly string[],
  config: LoadedConfig,
  cwd: string,
): Promise<RunnerSpec[]> {
  const named = modules.map((module) => runnerSpec(module, config, cwd));
  const files = new Set(named.map((spec) => spec.module));
  const specs = [...named, ...config.runners.filter((spec) => 'runner' in spec || !files.has(spec.module))];
  await Promise.all(specs.flatMap((spec) => ('runner' in spec ? [] : [checkModule(spec)])));
  return specs;
}

/** One module by itself. @throws as {@link runnerSpecs}. */
export async function singleRunner(module: string, config: LoadedConfig, cwd: string): Promise<ModuleSpec> {
  const spec = runnerSpec(module, config, cwd);
  await checkModule(spec);
  return spec;
}

function runnerSpec(module: string, config: LoadedConfig, cwd: string): ModuleSpec {
  const file = path.resolve(cwd, module);
  const listed = config.runners.find((spec): spec is ModuleSpec => 'module' in spec && spec.module === file);
  return listed ?? { module: file, limits: config.limits };
}

async function checkModule({ module }: ModuleSpec): Promise<void> {
  await access(module).catch((error: unknown) => {
    throw new MillraceError('invalid_argument', `runner module ${module} cannot be read`, { cause: error });
  });
}
