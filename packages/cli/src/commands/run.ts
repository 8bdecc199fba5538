/**
 * `millrace run`: one job, start to finish. By itself it starts a dispatcher and a node in this process, in a temporary
 * data folder; with `--url` the job goes to a dispatcher that is there.
 */
import path from 'node:path';
import type { Command } from 'commander';
import { MillraceError, systemClock, timeoutSignal, type Logger } from '@millrace/runner';
import { action, examples, repeatable, type Session } from '../command.ts';
import type { RunnerSpec } from '../config-file.ts';
import type { Address } from '../connection.ts';
import { resolveDataDir } from '../data-dir.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { Interruption } from '../interruption.ts';
import type { CommandContext } from '../io.ts';
import type { ProgressDisplay } from '../progress-display.ts';
import type { PlanOptions, RunPlan } from '../run-plan.ts';
import type { BuiltJobFile } from '../submission.ts';
import { oneLine } from '../text-width.ts';
import { formatBytes, formatDuration, parseDuration, parseInteger } from '../units.ts';

interface RunOptions extends PlanOptions {
  readonly out: string;
  readonly timeout?: string;
  readonly concurrency?: string;
}

export function registerRun(program: Command, session: Session): void {
  program
    .command('run')
    .description('run one job from start to finish and fetch its artifacts')
    .argument(
      '<module|job|capability>',
      'a runner module (.ts, .mts, .js, .mjs), a job file (.yaml, .yml, .json), or a capability of the config file, /name/v1',
    )
    .option(
      '--input <file>',
      'an input, in order; - is stdin. Beside a job file: name=FILE for "input:name"',
      repeatable,
    )
    .option('--meta <json>', "the task's parameters as JSON, or @FILE")
    .option('--label <text>', 'what the job is called')
    .option('--out <dir>', 'where artifacts go, under their logical paths', './out')
    .option('--timeout <duration>', 'cancel the job after this long: 90, 90s, 15m, 2h')
    .option('--runner <module>', 'beside a job file or capability: a runner module; repeatable', repeatable)
    .option('--config <file>', 'config file (default: millrace.config.* here, if any)')
    .option('--concurrency <n>', 'tasks at once (default: the number of processors)')
    .addHelpText(
      'after',
      examples([
        [
          `millrace run ./resize.ts --input photo.jpg --meta '{"size":256}'`,
          'everything in this process; artifacts in ./out',
        ],
        ['cat data.csv | millrace run ./report.ts --input - --out ./report', 'an input from a pipe'],
        ['millrace run job.yaml --runner ./a.ts --runner ./b.ts', 'a job of several tasks'],
        [
          `millrace run /images/thumbnail/v1 --input photo.jpg --meta '{"size":128}'`,
          'one task for a runner of the config file',
        ],
        ['millrace run job.yaml', 'a job whose tasks are computes ("op://name" is name.ts beside it)'],
        [
          'millrace run ./resize.ts --input photo.jpg --url http://10.0.0.5:7070',
          'on the nodes of a dispatcher elsewhere',
        ],
      ]) +
        "\nEverything is done in a temporary folder; --data keeps the dispatcher's state in another.\nCtrl-C cancels the job and waits until its work has ended; again: does not wait.\n",
    )
    .action(action(session, run));
}

async function run(context: CommandContext, options: RunOptions, target: string): Promise<ExitCode> {
  const { io, out, options: common } = context;
  const timeoutMs = options.timeout === undefined ? null : parseDuration(options.timeout, '--timeout');
  const concurrency =
    options.concurrency === undefined ? null : parseInteger(options.concurrency, '--concurrency', 1, 4096);
  // Only a dispatcher that was asked for: the one that may be running on the default data folder is not.
  const remote = Boolean(common.url || io.env['MILLRACE_URL']);
  const [{ planRun }, { Interruption }, { quietLogger }, { checkOutputFolder }] = await Promise.all([
    import('../run-plan.ts'),
    import('../interruption.ts'),
    import('../operator-log.ts'),
    import('../transfer.ts'),
  ]);
  const outDir = path.resolve(io.cwd, options.out);
  // Before the work, not after it.
  await checkOutputFolder(outDir);
  const plan = await planRun(io, options, target, remote);
  const screen = { print: (line: string): void => out.note(line) };
  // Through the display once there is one, which redraws over what is written beside it.
  using interruption = new Interruption(io, (line) => screen.print(line));
  const log = quietLogger(io, (line) => screen.print(line));
  const execution: Execution = {
    context,
    outDir,
    plan,
    timeoutMs,
    interruption,
    onDisplay: (display) => {
      screen.print = (line) => display.print(line);
    },
  };
  // Told when everything is closed: a reader that leaves then (`millrace run … | head -1`) ends the program at once.
  const { code, report } = remote
    ? await runElsewhere(execution, log)
    : await runHere(execution, concurrency, log);
  report();
  return code;
}

/** On the nodes of a dispatcher that is there. */
async function runElsewhere(execution: Execution, log: Logger): Promise<Finished> {
  const { plan, context } = execution;
  const { resolveAddress } = await import('../connection.ts');
  const address = await resolveAddress(context);
  return await execute(execution, address, await plan.file(() => capabilitiesOf(plan.runners, log)));
}

/** With a dispatcher and a node in this process, gone when this resolves. */
async function runHere(execution: Execution, concurrency: number | null, log: Logger): Promise<Finished> {
  const { context, plan, interruption } = execution;
  const [{ startEmbedded }, { temporaryFolder }] = await Promise.all([
    import('../embedded.ts'),
    import('../temporary-folder.ts'),
  ]);
  // Not `MILLRACE_DATA`: it names where a dispatcher stays, and the one of this job goes.
  await using folder = context.options.data ? null : await temporaryFolder();
  await using embedded = await startEmbedded({
    dataDir: folder?.path ?? resolveDataDir(context),
    pid: context.io.pid,
    port: 0,
    env: context.io.env,
    runners: plan.runners,
    config: plan.config,
    compute: plan.compute,
    concurrency,
    log,
  });
  interruption.signal.throwIfAborted();
  embedded.ended.then(
    () =>
      interruption.giveUp(new MillraceError('internal', 'the node in this process ended before the job did')),
    (error: unknown) => interruption.giveUp(error),
  );
  const capabilities = embedded.runners.map((runner) => runner.capability);
  return await execute(execution, embedded, await plan.file(() => Promise.resolve(capabilities)));
}

/** Loads modules only to learn what they are called. */
async function capabilitiesOf(runners: readonly RunnerSpec[], log: Logger): Promise<string[]> {
  const { openRunners, closeRunners } = await import('../embed-runners.ts');
  const opened = await openRunners(runners, log);
  await closeRunners(opened);
  return opened.map((runner) => runner.capability);
}

interface Execution {
  readonly context: CommandContext;
  readonly outDir: string;
  readonly plan: RunPlan;
  readonly timeoutMs: number | null;
  readonly interruption: Interruption;
  readonly onDisplay: (display: ProgressDisplay) => void;
}

/** The job's end, and how to tell it. */
interface Finished {
  readonly code: ExitCode;
  readonly report: () => void;
}

/** Submits, follows, fetches. */
async function execute(execution: Execution, address: Address, file: BuiltJobFile): Promise<Finished> {
  const { interruption, timeoutMs } = execution;
  const { io, out } = execution.context;
  const { signal } = interruption;
  const [{ withRequestor }, { submitWithInputs }, { followJob }, outcome, { saveArtifacts, skippedLines }] =
    await Promise.all([
      import('../connection.ts'),
      import('../submission.ts'),
      import('../follow-job.ts'),
      import('../job-outcome.ts'),
      import('../transfer.ts'),
    ]);
  return await withRequestor(address, async (requestor) => {
    const jobId = await submitWithInputs(io, requestor, file, execution.plan.named, {
      signal,
      dataDir: resolveDataDir(execution.context),
    });
    interruption.jobSubmitted(() => requestor.cancel(jobId, { signal }));
    const overdue = `not done after ${formatDuration(timeoutMs ?? 0)}`;
    using deadline = timeoutSignal(systemClock, timeoutMs ?? FOR_EVER_MS, () => overdue);
    deadline.signal.addEventListener('abort', () => interruption.cancel(overdue));
    const { detail, logs } = await followJob(io, requestor, jobId, {
      signal,
      onDisplay: execution.onDisplay,
    });
    const { saved: artifacts, skipped } = await saveArtifacts(outcome.artifactsOf(detail), execution.outDir, {
      storage: requestor.storage,
      domainId: detail.job.domain_id,
      signal,
    });
    const timedOut = deadline.signal.aborted && detail.job.status === 'canceled';
    const report = (): void => {
      out.result(
        {
          ...outcome.jobDocument(detail),
          ...(timedOut && { error: { code: 'deadline_exceeded', message: `timeout: ${overdue}` } }),
          out: execution.outDir,
          artifacts,
          ...(skipped.length > 0 && { skipped }),
        },
        () => [
          ...outcome.jobLines(detail, logs, out.paint),
          ...(timedOut ? [`  timeout: ${overdue}`] : []),
          ...artifacts.map(
            (saved) => `  ${oneLine(shortPath(io.cwd, saved.file))}  ${formatBytes(saved.size)}`,
          ),
        ],
      );
      for (const line of skippedLines(skipped)) out.note(line);
    };
    const code = outcome.jobExitCode(detail);
    const incomplete = code === EXIT.done && skipped.length > 0;
    return { code: timedOut || incomplete ? EXIT.failed : code, report };
  });
}

const FOR_EVER_MS = Number.MAX_SAFE_INTEGER;

/** A path as one would type it from `cwd`. */
function shortPath(cwd: string, file: string): string {
  const relative = path.relative(cwd, file);
  return relative.startsWith('..') ? file : `./${relative}`;
}
