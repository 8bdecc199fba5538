/** A runtime of the config file as a runner. */
import path from 'node:path';
import { MillraceError, describeError, type Runner } from '@millrace/runner';
import { golemRunner, type GolemRunnerOptions } from '@millrace/runtime/supervisor';
import type { RuntimeEntry } from './config.ts';
import { runtimeFile } from './runtime-file.ts';

/**
 * @param dir what its paths are relative to
 * @throws MillraceError `invalid_argument` naming `shown`, the config file, and what is wrong with the runtime
 */
export async function runtimeRunner(entry: RuntimeEntry, dir: string, shown: string): Promise<Runner> {
  const { capability, taskPackage, args, env, workDir, limits } = entry;
  try {
    return golemRunner({
      runtime: await runtimeOf(entry, dir),
      ...(capability !== undefined && { capability }),
      ...(taskPackage !== undefined && { taskPackage: path.resolve(dir, taskPackage) }),
      ...(args && { runtimeArgs: args }),
      ...(env && { env }),
      ...(workDir !== undefined && { workDir: path.resolve(dir, workDir) }),
      ...(limits && { limits }),
    });
  } catch (error) {
    throw new MillraceError('invalid_argument', `config file ${shown}: ${describeError(error)}`, {
      cause: error,
    });
  }
}

async function runtimeOf(
  { runtime, name }: RuntimeEntry,
  dir: string,
): Promise<GolemRunnerOptions['runtime']> {
  if (typeof runtime === 'object') {
    if (name !== undefined) {
      throw new MillraceError(
        'invalid_argument',
        `runtime ${runtime.descriptor}: its descriptor says the name; leave name out`,
      );
    }
    const { descriptor, dirs } = runtime;
    return { descriptor, ...(dirs && { dirs: dirs.map((one) => path.resolve(dir, one)) }) };
  }
  const { file, brought } = await runtimeFile(runtime, dir);
  const called = name ?? (brought ? runtime : undefined);
  return { path: file, ...(called !== undefined && { name: called }) };
}
