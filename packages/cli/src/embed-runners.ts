/** The runners of a node in this process: modules in threads of their own, and those the config file made. */
import { openThreadRunner } from '@millrace/exec';
import type { RunnerRegistration } from '@millrace/node';
import { MillraceError, type Logger, type Runner } from '@millrace/runner';
import type { RunnerSpec } from './config-file.ts';

/**
 * Opens all of them at once, in order. When one does not open the others are closed again.
 *
 * @throws MillraceError naming the module and why it does not load.
 */
export async function openRunners(specs: readonly RunnerSpec[], log: Logger): Promise<Runner[]> {
  const opening = specs.map(async (spec) => {
    if ('runner' in spec) return spec.runner;
    // Its place in the node is none of the runner's business.
    const { labels: _labels, supervision: _supervision, ...module } = spec;
    return await openThreadRunner({ ...module, log });
  });
  const results = await Promise.allSettled(opening);
  const runners = results.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : []));
  const failed = results.findIndex((result) => result.status === 'rejected');
  if (failed < 0) return runners;
  await closeRunners(runners);
  const error = (results[failed] as PromiseRejectedResult).reason as unknown;
  const message = error instanceof Error ? error.message : String(error);
  const spec = specs[failed];
  const what = `runner module ${spec !== undefined && 'module' in spec ? spec.module : ''}`;
  // Whatever the module did wrong, for the one who named it, it is a wrong configuration.
  throw new MillraceError('invalid_argument', message.startsWith(what) ? message : `${what}: ${message}`, {
    cause: error,
  });
}

/** The runners with what the config says of their place in the node. Those beyond `specs` have none. */
export function placed(runners: readonly Runner[], specs: readonly RunnerSpec[]): RunnerRegistration[] {
  return runners.map((runner, index) => {
    const { labels, supervision } = specs[index] ?? {};
    return {
      runner,
      ...(labels !== undefined && { labels }),
      ...(supervision !== undefined && { supervision }),
    };
  });
}

export async function closeRunners(runners: readonly Runner[]): Promise<void> {
  await Promise.all(runners.map(async (runner) => runner.close?.()));
}
