/** `millrace node start`: a compute node, configured by its environment as the reference node is. */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { parseEnv } from 'node:util';
import type { Command } from 'commander';
import { MillraceError, type Runner } from '@millrace/runner';
import { action, examples, repeatable, type Session } from '../command.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import type { Env } from '../terminal.ts';
import { table } from '../text-width.ts';
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
    .addHelpText(
      'after',
      examples([
        [
          'millrace node start --env-file node.env --runner ./resize.ts',
          'a node with credentials from "millrace nodes add"',
        ],
        ['millrace node start --env-file node.env --print-config', 'what it would run with'],
      ]) +
        `
Environment (required: REG_SECRET, SECP256K1_PRIVHEX):
  DDS_BASE_URL, DMS_BASE_URL            where it registers, where tasks come from
  MAX_CONCURRENCY                       tasks at once (1)
  LOG_LEVEL, LOG_FORMAT                 debug|info|warn|error|off (info); json|text (json)
  ENABLE_NOOP, NOOP_SLEEP_SECS          adds a runner for /millrace/noop/v1 that waits
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
  const callbacks = options.callbacks === undefined ? null : parseCallbacks(options.callbacks);
  const [{ loadConfig }, { runnerSpecs }, { parseNodeEnv, describeConfig, createNode, createLogger }] =
    await Promise.all([import('../config-file.ts'), import('../runner-specs.ts'), import('@millrace/node')]);
  const config = await loadConfig(options.config, io.cwd);
  const env: Env = {
    ...(config.maxConcurrency !== null && { MAX_CONCURRENCY: String(config.maxConcurrency) }),
    ...(options.envFile === undefined ? {} : await readEnvFile(options.envFile, io.cwd)),
    ...io.env,
  };
  if (options.printConfig) {
    const entries = describeConfig(env);
    out.result({ config: entries, file: config.file }, () =>
      table(
        [{ title: 'NAME' }, { title: 'VALUE' }, { title: 'FROM' }],
        entries.map(({ name, value, source }) => [
          name,
          value === null ? '-' : String(value),
          source === null ? 'default' : source === name ? 'set' : source,
        ]),
        out.paint.dim,
      ),
    );
    return EXIT.done;
  }
  const nodeConfig = withHint(() => parseNodeEnv(env));
  const specs = await runnerSpecs(options.runner ?? [], config, io.cwd);
  if (specs.length === 0 && !nodeConfig.enableNoop) {
    throw new MillraceError(
      'invalid_argument',
      'the node has no runners: name modules with --runner or in millrace.config.ts (ENABLE_NOOP=true adds one for trying out)',
    );
  }
  const log = createLogger({
    format: nodeConfig.logFormat,
    level: nodeConfig.logLevel,
    secrets: [nodeConfig.regSecret, nodeConfig.privateKeyHex],
  });
  const { openRunners, closeRunners } = await import('../embed-runners.ts');
  const runners: Runner[] = await openRunners(specs, log);
  if (nodeConfig.enableNoop) {
    const { noopRunner } = await import('../noop-runner.ts');
    runners.push(noopRunner(nodeConfig.noopSleepMs));
  }
  const drainMs = drainSecs === null ? config.drainMs : drainSecs * 1000;
  const workDir = workDirOf(context, options);
  let node;
  try {
    node = createNode({
      config: nodeConfig,
      runners,
      labels: config.labels,
      ...(workDir !== null && { workDir }),
      ...(drainMs !== null && { drainMs }),
      ...(callbacks !== null && { callbacks }),
      ...(repeatSecs !== null && { repeatRegistrationMs: repeatSecs === 0 ? null : repeatSecs * 1000 }),
      log,
    });
  } catch (error) {
    await closeRunners(runners);
    throw error;
  }
  await using running = node;
  const { stopLadder } = await import('../stop-ladder.ts');
  using _ = stopLadder(io, running, drainMs);
  out.result(
    {
      wallet: running.wallet,
      dms_url: nodeConfig.dmsBaseUrl,
      capabilities: runners.map((runner) => runner.capability),
      concurrency: nodeConfig.maxConcurrency,
      pid: io.pid,
    },
    () => [
      `node ${running.wallet} takes ${runners.map((runner) => runner.capability).join(', ')} from ${nodeConfig.dmsBaseUrl}`,
    ],
  );
  await running.run();
  return EXIT.done;
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

/** `port` or `host:port`; an IPv6 host in brackets. */
function parseCallbacks(text: string): { readonly host?: string; readonly port: number } {
  const match = /^(?:(\[[^\]]+\]|[^:]+):)?(\d+)$/.exec(text);
  if (match === null) {
    throw new MillraceError(
      'invalid_argument',
      `--callbacks must be PORT or HOST:PORT, got ${JSON.stringify(text)}`,
    );
  }
  const port = parseInteger(match[2]!, '--callbacks port', 0, 65_535);
  return match[1] === undefined ? { port } : { host: match[1].replace(/^\[|\]$/g, ''), port };
}

async function readEnvFile(file: string, cwd: string): Promise<Env> {
  try {
    return parseEnv(await readFile(path.resolve(cwd, file), 'utf8'));
  } catch (error) {
    throw new MillraceError('invalid_argument', `--env-file: cannot read ${file}`, { cause: error });
  }
}
