/**
 * The runner of computes of a node that this program starts. What tasks name is fetched from the dispatcher once, by its
 * digest and with the node's own token, verified, and kept in a folder that other nodes of the machine may share.
 */
import { readFile } from 'node:fs/promises';
import type { Plugin } from '@millrace/compute';
import type { ProxySettings, TokenSource } from '@millrace/dispatch/client';
import { MillraceError, type Runner } from '@millrace/runner';
import type { ComputeSpec } from './config-file.ts';

/** What `@millrace/compute` calls its capability; loading it for a name would be dear. A runner of the config's own comes first. */
export const COMPUTE_CAPABILITY = '/compute/v1';

export interface ComputeRunnerPlace {
  readonly spec: ComputeSpec;
  /** Where fetched computes are kept. */
  readonly cacheDir: string;
  /** The task API's address; its computes are beside the tasks. */
  readonly dmsBaseUrl: string;
  /** Asked when there is a task, which is when the node runs. */
  readonly tokens: () => TokenSource;
  readonly timeoutMs: number;
  readonly proxy?: ProxySettings | undefined;
}

/** @throws MillraceError `invalid_argument` for a limit out of its bounds, and for a plugin that is not the file that was meant. */
export async function openComputeRunner(place: ComputeRunnerPlace): Promise<Runner> {
  const { spec, cacheDir, dmsBaseUrl, tokens, timeoutMs, proxy } = place;
  const [{ openComputes }, { cachedResolver, computeRunner }, { dispatcherResolver }] = await Promise.all([
    import('@millrace/dispatch/client'),
    import('@millrace/compute'),
    import('./compute-store.ts'),
  ]);
  const { limits, workers, cacheBytes } = spec;
  const plugins = await readPlugins(spec.plugins ?? []);
  const maxModuleBytes = limits?.maxModuleBytes;
  const computes = openComputes({
    baseUrl: dmsBaseUrl,
    tokens: {
      get: (options) => tokens().get(options),
      invalidate: (token) => tokens().invalidate(token),
    },
    timeoutMs,
    ...(proxy !== undefined && { proxy }),
  });
  const runner = computeRunner({
    resolver: cachedResolver(dispatcherResolver(computes, maxModuleBytes), {
      dir: cacheDir,
      ...(maxModuleBytes !== undefined && { maxModuleBytes }),
      ...(cacheBytes !== undefined && { maxCacheBytes: cacheBytes }),
    }),
    ...(limits !== undefined && { limits }),
    ...(workers !== undefined && { workers }),
    plugins,
  });
  return {
    ...runner,
    close: async () => {
      await runner.close?.();
      await computes[Symbol.asyncDispose]();
    },
  };
}

/**
 * The files, each held to its digest here, where it is its operator who hears of a mistake.
 *
 * @throws MillraceError `invalid_argument`
 */
async function readPlugins(plugins: NonNullable<ComputeSpec['plugins']>): Promise<Plugin[]> {
  const { refOf } = await import('@millrace/compute');
  return await Promise.all(
    plugins.map(async ({ file, digest }) => {
      const bytes = await readFile(file).catch((error: unknown) => {
        throw new MillraceError('invalid_argument', `compute.plugins: cannot read ${file}`, { cause: error });
      });
      const actual = refOf(bytes).digest;
      if (actual !== digest.replace(/^sha256:/, '')) {
        throw new MillraceError(
          'invalid_argument',
          `compute.plugins: ${file} has the sha256 ${actual}, not ${digest}; it is another file than the one that was meant`,
        );
      }
      return { bytes, digest };
    }),
  );
}
