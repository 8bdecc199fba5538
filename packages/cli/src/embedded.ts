/**
 * A dispatcher and a node in one process: what `up` keeps running and `run` starts for one job. The node is an ordinary
 * one that reaches the dispatcher over loopback HTTP, so nothing here works differently from two machines.
 */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { availableParallelism } from 'node:os';
import { parseEnv } from 'node:util';
import { connect } from '@millrace/dispatch/client';
import { createNode, parseNodeEnv, prometheusMetrics, type ComputeNode } from '@millrace/node';
import type { Logger, Runner } from '@millrace/runner';
import type { ComputeSpec, LoadedConfig, RunnerSpec } from './config-file.ts';
import { closeRunners, openRunners, placed } from './embed-runners.ts';
import { openLocalDispatcher, type LocalDispatcherOptions, type OpenDispatcher } from './local-dispatcher.ts';
import { createIdentity, envFileText, type NodeEnv } from './node-identity.ts';
import { writePrivateFile } from './private-file.ts';
import { COMPUTE_CAPABILITY, openComputeRunner } from './compute-runner.ts';
import { COMPUTE_CACHE } from './data-dir.ts';
import type { Env } from './terminal.ts';
import { openTracer } from './tracing.ts';

export interface EmbeddedOptions {
  readonly dataDir: string;
  readonly pid: number;
  readonly port: number;
  readonly env: Env;
  readonly runners: readonly RunnerSpec[];
  readonly config: LoadedConfig;
  /** How computes are run; null: not here. */
  readonly compute: ComputeSpec | null;
  /** Tasks at once; null: the config's, else `MAX_CONCURRENCY`, else the number of processors. */
  readonly concurrency: number | null;
  /** Default: the folder `blobs` in the data folder. */
  readonly blobs?: LocalDispatcherOptions['blobs'];
  readonly log: Logger;
}

export interface Embedded extends AsyncDisposable {
  readonly url: string;
  readonly token: string;
  readonly runners: readonly Runner[];
  readonly concurrency: number;
  /** Null when there are no runners: the dispatcher then waits for nodes from elsewhere. */
  readonly node: ComputeNode | null;
  /** Settles when the node has ended; rejects when it could not start. Never without a node. */
  readonly ended: Promise<void>;
  /** Takes the node down the rest of its ladder if it still runs, then closes everything. */
  close(): Promise<void>;
}

export async function startEmbedded(options: EmbeddedOptions): Promise<Embedded> {
  const { dataDir, env, config, log } = options;
  // On one page with the dispatcher's, which has what is about the process.
  const metrics = await prometheusMetrics({ processMetrics: false });
  const tracer = await openTracer(env, 'millrace', log);
  // Loading user code and opening the database take their time; neither needs the other.
  const [opened, dispatched] = await Promise.allSettled([
    openRunners(options.runners, log),
    openLocalDispatcher({
      dataDir,
      pid: options.pid,
      port: options.port,
      log,
      ...(options.blobs !== undefined && { blobs: options.blobs }),
      ...(options.runners.length + (options.compute === null ? 0 : 1) > 0 && {
        moreMetrics: () => metrics.exposition(),
      }),
      ...(tracer !== null && { tracer }),
    }),
  ]);
  if (opened.status === 'rejected' || dispatched.status === 'rejected') {
    if (opened.status === 'fulfilled') await closeRunners(opened.value);
    if (dispatched.status === 'fulfilled') await dispatched.value.close();
    throw opened.status === 'rejected' ? opened.reason : (dispatched as PromiseRejectedResult).reason;
  }
  const runners = opened.value;
  const dispatcher = dispatched.value;
  try {
    const nodeConfig = parseNodeEnv({
      // Tuning and logging as in the environment; who and where is decided here.
      ...(config.resources !== null && { RESOURCES: config.resources }),
      ...((config.maxConcurrency !== null || (config.resources === null && !env['RESOURCES']?.trim())) && {
        MAX_CONCURRENCY: String(config.maxConcurrency ?? availableParallelism()),
      }),
      ...env,
      ...(options.concurrency !== null && { MAX_CONCURRENCY: String(options.concurrency) }),
      ...(await embeddedIdentity(dataDir, dispatcher)),
    });
    if (options.compute !== null && !runners.some(({ capability }) => capability === COMPUTE_CAPABILITY)) {
      runners.push(
        await openComputeRunner({
          spec: options.compute,
          cacheDir: path.join(dataDir, COMPUTE_CACHE),
          dmsBaseUrl: nodeConfig.dmsBaseUrl,
          tokens: () => (node as ComputeNode).tokens,
          timeoutMs: nodeConfig.requestTimeoutMs,
          proxy: nodeConfig.proxy,
        }),
      );
    }
    const node: ComputeNode | null =
      runners.length === 0
        ? null
        : createNode({
            config: nodeConfig,
            runners: placed(runners, options.runners),
            labels: config.labels,
            supervision: config.supervision,
            env: config.env,
            workDir: path.join(dataDir, 'work'),
            ...(config.drainMs !== null && { drainMs: config.drainMs }),
            metrics,
            ...(tracer !== null && { tracer }),
            log,
          });
    const ended = node === null ? new Promise<void>(() => {}) : node.run();
    // Looked at by whoever waits; until then a node that cannot start must not end the process.
    ended.catch(() => {});
    const close = async (): Promise<void> => {
      await node?.[Symbol.asyncDispose]();
      await dispatcher.close();
      await tracer?.[Symbol.asyncDispose]();
    };
    return {
      url: dispatcher.url,
      token: dispatcher.token,
      runners,
      concurrency: nodeConfig.maxConcurrency,
      node,
      ended,
      close,
      [Symbol.asyncDispose]: close,
    };
  } catch (error) {
    await closeRunners(runners);
    await dispatcher.close();
    throw error;
  }
}

/** The node keeps its name over restarts: its credentials are in the data folder, as an env file. */
async function embeddedIdentity(dataDir: string, { url, token }: OpenDispatcher): Promise<NodeEnv> {
  const file = path.join(dataDir, 'node.env');
  const requestor = connect({ url, token });
  try {
    const kept = await readFile(file, 'utf8').then(parseEnv, () => null);
    const { NODE_ID: id, REG_SECRET: secret, SECP256K1_PRIVHEX: key } = kept ?? {};
    // A database that was replaced does not know the node any more.
    if (id && secret && key && (await requestor.nodes()).some((node) => node.id === id)) {
      return { DDS_BASE_URL: url, DMS_BASE_URL: `${url}/v1`, REG_SECRET: secret, SECP256K1_PRIVHEX: key };
    }
    const identity = await createIdentity(requestor, url, { name: 'local', mode: 'dedicated' });
    await writePrivateFile(file, `${envFileText('local', identity.env)}NODE_ID=${identity.id}\n`);
    return identity.env;
  } finally {
    await requestor.close();
  }
}
