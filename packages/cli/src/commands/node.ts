/** `millrace node start`: a compute node, configured by its environment as the reference node is. */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { parseEnv } from 'node:util';
import type { Command } from 'commander';
import { MillraceError, type Runner } from '@millrace/runner';
import type { ComputeNode } from '@millrace/node';
import { action, examples, repeatable, type Session } from '../command.ts';
import { COMPUTE_CACHE, resolveDataDir } from '../data-dir.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import { metricsAddress, metricsBuckets, parseListen } from '../node-metrics.ts';
import { logSandbox } from '../sandbox-note.ts';
import type { Env } from '../terminal.ts';
import { table } from '../text-width.ts';
import { openTracer } from '../tracing.ts';
import { parseInteger } from '../units.ts';

interface StartOptions {
  readonly config?: string;
  readonly runner?: readonly string[];
  readonly envFile?: string;
  readonly workDir?: string;
  readonly printConfig?: boolean;
  readonly drainSecs?: string;
  readonly callbacks?: string;
  readonly repeatRegistrationSecs?: string;
  readonly metrics?: string;
}

export function registerNode(program: Command, session: Session): void {
  program
    .command('node')
    .description('a compute node')
    .command('start')
    .description('lease tasks and run them until a signal; configured by its environment')
    .option(
      '--config <file>',
      'config file with runners, labels and limits (default: millrace.config.* here, if any)',
    )
    .option('--runner <module>', 'a runner module; repeatable, before those of the config file', repeatable)
    .option(
      '--env-file <file>',
      'NAME=VALUE lines, as "millrace nodes add" writes them; the environment wins',
    )
    .option(
      '--work-dir <dir>',
      "where tasks get their folders (default: work in --data if given, else the system's)",
    )
    .option(
      '--print-config',
      'print every setting with its value and where it comes from, secrets hidden, and stop',
    )
    .option('--drain-secs <n>', 'how long running tasks may go on after the first signal (default: 30)')
    .option(
      '--callbacks <[host:]port>',
      'also listen for the callbacks of an older DDS (default: do not; host 127.0.0.1)',
    )
    .option(
      '--repeat-registration-secs <n>',
      'register again this often; 0: never (default: as the server announces, else never)',
    )
    .option(
      '--metrics <[host:]port>',
      'serve GET /metrics and /health there (default: do not; host 127.0.0.1; 0 picks a free port)',
    )
    .addHelpText(
      'after',
      examples([
        [
          'millrace node start --env-file node.env --runner ./resize.ts',
          'a node with credentials from "millrace nodes add"',
        ],
        ['millrace node start --env-file node.env --print-config', 'what it would run with, and from where'],
      ]) +
        `
Environment (required: REG_SECRET, SECP256K1_PRIVHEX):
  DDS_BASE_URL, DMS_BASE_URL            where it registers, where tasks come from
  MAX_CONCURRENCY                       tasks at once (1)
  LOG_LEVEL, LOG_FORMAT                 debug|info|warn|error|off (info); json|text (json)
  ENABLE_NOOP, NOOP_SLEEP_SECS          adds a runner for /millrace/noop/v1 that waits
  MILLRACE_METRICS                      as --metrics
  MILLRACE_METRICS_BUCKETS              bounds of the durations' buckets, seconds: 0.1,1,10
  OTEL_EXPORTER_OTLP_ENDPOINT           where traces go (none), and the other OTEL_ variables
  and the others that --print-config lists.

SIGTERM or Ctrl-C stops: no new work, running tasks get the drain time. Again: they are aborted. Again: killed.
`,
    )
    .action(action(session, start));
}

async function start(context: CommandContext, options: StartOptions): Promise<ExitCode> {
  const { io, out } = context;
  const drainSecs =
    options.drainSecs === undefined
      ? null
      : parseInteger(options.drainSecs, '--drain-secs', 0, 7 * 24 * 3600);
  const repeatSecs =
    options.repeatRegistrationSecs === undefined
      ? null
      : parseInteger(options.repeatRegistrationSecs, '--repeat-registration-secs', 0, 7 * 24 * 3600);
  const callbacks = options.callbacks === undefined ? null : parseListen(options.callbacks, '--callbacks');
  const [
    { loadConfig },
    { runnerSpecs },
    { parseNodeEnv, describeConfig, createNode, createLogger, openMetricsServer, prometheusMetrics },
  ] = await Promise.all([
    import('../config-file.ts'),
    import('../runner-specs.ts'),
    import('@millrace/node'),
  ]);
  const config = await loadConfig(options.config, io.cwd);
  const layers: readonly Layer[] = [
    {
      from: config.file ?? '',
      env: {
        ...(config.maxConcurrency !== null && { MAX_CONCURRENCY: String(config.maxConcurrency) }),
        ...(config.resources !== null && { RESOURCES: config.resources }),
      },
    },
    {
      from: options.envFile ?? '',
      env: options.envFile === undefined ? {} : await readEnvFile(options.envFile, io.cwd),
    },
    { from: 'environment', env: io.env },
  ];
  const env: Env = Object.assign({}, ...layers.map((layer) => layer.env));
  if (options.printConfig) {
    const entries = withHint(() => describeConfig(env)).map((entry) => ({
      ...entry,
      from: fromOf(entry.source, layers),
    }));
    out.result({ config: entries, file: config.file }, () =>
      table(
        [{ title: 'NAME' }, { title: 'VALUE' }, { title: 'FROM' }],
        entries.map(({ name, value, source, from }) => [
          name,
          value === null ? '-' : String(value),
          source === null || source === name ? from : `${from}, as ${source}`,
        ]),
        out.paint.dim,
      ),
    );
    return EXIT.done;
  }
  const nodeConfig = withHint(() => parseNodeEnv(env));
  const metricsAt = metricsAddress(options.metrics, env);
  const buckets = metricsBuckets(env);
  const specs = await runnerSpecs(options.runner ?? [], config, io.cwd);
  const compute = config.compute === false ? null : config.compute;
  if (specs.length === 0 && compute === null && !nodeConfig.enableNoop) {
    throw new MillraceError(
      'invalid_argument',
      'the node has no runners: name modules with --runner or in millrace.config.ts, or say compute: true there (ENABLE_NOOP=true adds one for trying out)',
    );
  }
  const log = createLogger({
    format: nodeConfig.logFormat,
    level: nodeConfig.logLevel,
    secrets: [nodeConfig.regSecret, nodeConfig.privateKeyHex],
  });
  const [{ openRunners, closeRunners, placed }, { COMPUTE_CAPABILITY, openComputeRunner }] =
    await Promise.all([import('../embed-runners.ts'), import('../compute-runner.ts')]);
  const runners: Runner[] = await openRunners(specs, log);
  if (nodeConfig.enableNoop) {
    const { noopRunner } = await import('../noop-runner.ts');
    runners.push(noopRunner(nodeConfig.noopSleepMs));
  }
  if (compute !== null && !runners.some(({ capability }) => capability === COMPUTE_CAPABILITY)) {
    try {
      runners.push(
        await openComputeRunner({
          spec: compute,
          cacheDir: path.join(resolveDataDir(context), COMPUTE_CACHE),
          dmsBaseUrl: nodeConfig.dmsBaseUrl,
          tokens: () => (node as ComputeNode).tokens,
          timeoutMs: nodeConfig.requestTimeoutMs,
          proxy: nodeConfig.proxy,
        }),
      );
    } catch (error) {
      await closeRunners(runners);
      throw error;
    }
  }
  const metrics =
    metricsAt === null
      ? null
      : await prometheusMetrics(buckets === undefined ? {} : { bucketsSeconds: buckets });
  await using tracer = await openTracer(env, 'millrace-node', log);
  const drainMs = drainSecs === null ? config.drainMs : drainSecs * 1000;
  const workDir = workDirOf(context, options);
  let node: ComputeNode | null = null;
  try {
    node = createNode({
      config: nodeConfig,
      runners: placed(runners, specs),
      labels: config.labels,
      supervision: config.supervision,
      env: config.env,
      ...(workDir !== null && { workDir }),
      ...(drainMs !== null && { drainMs }),
      ...(callbacks !== null && { callbacks }),
      ...(repeatSecs !== null && { repeatRegistrationMs: repeatSecs === 0 ? null : repeatSecs * 1000 }),
      ...(metrics !== null && { metrics }),
      ...(tracer !== null && { tracer }),
      log,
    });
  } catch (error) {
    await closeRunners(runners);
    throw error;
  }
  await using running = node;
  await using served =
    metrics === null || metricsAt === null
      ? null
      : await openMetricsServer({
          ...metricsAt,
          metrics,
          health: () => ({ state: running.state, active: running.active }),
          log,
        });
  void logSandbox(runners, log);
  const { stopLadder } = await import('../stop-ladder.ts');
  using _ = stopLadder(io, running, drainMs);
  out.result(
    {
      wallet: running.wallet,
      dms_url: nodeConfig.dmsBaseUrl,
      capabilities: runners.map((runner) => runner.capability),
      concurrency: nodeConfig.maxConcurrency,
      ...(served !== null && { metrics_url: `${served.url}/metrics` }),
      pid: io.pid,
    },
    () => [
      `node ${running.wallet} takes ${runners.map((runner) => runner.capability).join(', ')} from ${nodeConfig.dmsBaseUrl}`,
      ...(served === null ? [] : [`metrics ${served.url}/metrics`]),
    ],
  );
  await running.run();
  return EXIT.done;
}

/** Variables by where they come from; `from` is for people. */
interface Layer {
  readonly from: string;
  readonly env: Env;
}

/** Which of the layers, of which a later one wins, has the last word on a variable; null: none. */
function fromOf(variable: string | null, layers: readonly Layer[]): string {
  const layer = layers.findLast(({ env }) => variable !== null && env[variable] !== undefined);
  return layer?.from ?? 'default';
}

/** Names where credentials come from when it is they that are missing or wrong. */
function withHint<T>(parse: () => T): T {
  try {
    return parse();
  } catch (error) {
    const variables = MillraceError.is(error) ? error.details['variables'] : null;
    if (!MillraceError.is(error) || !Array.isArray(variables)) throw error;
    if (!variables.includes('REG_SECRET') && !variables.includes('SECP256K1_PRIVHEX')) throw error;
    throw new MillraceError(
      error.code,
      `${error.message}\n"millrace nodes add" makes credentials; give them with --env-file or in the environment`,
      { cause: error.cause, details: error.details },
    );
  }
}

function workDirOf({ io, options: common }: CommandContext, options: StartOptions): string | null {
  if (options.workDir !== undefined) return path.resolve(io.cwd, options.workDir);
  const data = common.data || io.env['MILLRACE_DATA'];
  return data ? path.resolve(io.cwd, data, 'work') : null;
}

async function readEnvFile(file: string, cwd: string): Promise<Env> {
  try {
    return parseEnv(await readFile(path.resolve(cwd, file), 'utf8'));
  } catch (error) {
    throw new MillraceError('invalid_argument', `--env-file: cannot read ${file}`, { cause: error });
  }
}
