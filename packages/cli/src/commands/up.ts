/** `millrace up`: a dispatcher and a node in one process, until a signal. */
import type { Command } from 'commander';
import { action, examples, type Session } from '../command.ts';
import { resolveDataDir } from '../data-dir.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import { BLOBS_HELP, blobsPlace } from '../places.ts';
import { logSandbox } from '../sandbox-note.ts';
import { parseInteger } from '../units.ts';

interface UpOptions {
  readonly config?: string;
  readonly port?: string;
  readonly concurrency?: string;
  readonly blobs?: string;
}

export function registerUp(program: Command, session: Session): void {
  program
    .command('up')
    .description('start a dispatcher and a node in one process, on this machine only')
    .argument('[runner...]', 'runner modules (.ts, .mts, .js, .mjs), before those of the config file')
    .option(
      '--config <file>',
      'config file (default: millrace.config.{ts,js,mjs,json,yaml,yml} here, if any)',
    )
    .option('--port <port>', 'port on 127.0.0.1; 0 picks a free one', '7070')
    .option('--concurrency <n>', 'tasks at once (default: the number of processors)')
    .option('--blobs <url>', BLOBS_HELP)
    .addHelpText(
      'after',
      examples([
        ['millrace up ./resize.ts', 'a system with one runner; submit to it from another terminal'],
        ['millrace up', 'with the runners of millrace.config.ts, or none: a dispatcher for nodes elsewhere'],
        [
          'millrace up --port 0 --data ./state --json',
          'any free port; stdout is one JSON object with the url',
        ],
        [
          'AWS_PROFILE=millrace millrace up --blobs "s3://my-bucket/blobs?region=eu-west-1"',
          'artifacts in S3; credentials come from the standard AWS chain',
        ],
      ]) + '\nCtrl-C stops: no new work, running tasks get 30 s. Again: they are aborted. Again: killed.\n',
    )
    .action(action(session, up));
}

async function up(
  context: CommandContext,
  options: UpOptions,
  modules: readonly string[],
): Promise<ExitCode> {
  const { io, out } = context;
  const port = parseInteger(options.port ?? '7070', '--port', 0, 65_535);
  const concurrency =
    options.concurrency === undefined ? null : parseInteger(options.concurrency, '--concurrency', 1, 4096);
  const dataDir = resolveDataDir(context);
  const blobs = await blobsPlace(options.blobs, io);
  const [{ loadConfig }, { runnerSpecs }, { startEmbedded }, { operatorLogger }, { stopLadder }] =
    await Promise.all([
      import('../config-file.ts'),
      import('../runner-specs.ts'),
      import('../embedded.ts'),
      import('../operator-log.ts'),
      import('../stop-ladder.ts'),
    ]);
  const config = await loadConfig(options.config, io.cwd);
  const log = operatorLogger(io);
  await using embedded = await startEmbedded({
    dataDir,
    pid: io.pid,
    port,
    env: io.env,
    runners: await runnerSpecs(modules, config, io.cwd),
    config,
    compute: config.compute === false ? null : (config.compute ?? {}),
    concurrency,
    ...(blobs !== null && { blobs }),
    log,
  });
  // Listening from before the first line: whoever reads it may send the signal at once.
  using ladder = stopLadder(io, embedded.node, config.drainMs);
  void logSandbox(embedded.runners, log);
  const capabilities = embedded.runners.map((runner) => runner.capability);
  out.result(
    { url: embedded.url, data: dataDir, pid: io.pid, capabilities, concurrency: embedded.concurrency },
    () => [
      `${out.paint.bold('Millrace is up')} at ${out.paint.cyan(embedded.url)}`,
      `  data     ${dataDir}`,
      ...(capabilities.length === 0
        ? ['  runners  none here; "millrace nodes add" makes credentials for a node']
        : capabilities.map((name, index) => `  ${index === 0 ? 'runners ' : '        '} ${name}`)),
      `  submit   millrace submit job.yaml --watch${context.options.data ? ` --data ${context.options.data}` : ''}`,
      '  stop     Ctrl-C',
    ],
  );
  await Promise.race([embedded.node === null ? ladder.stopped : embedded.ended, embedded.ended]);
  return EXIT.done;
}
