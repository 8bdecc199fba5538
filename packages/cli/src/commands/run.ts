/**
 * `millrace run`: one job, start to finish. By itself it starts a dispatcher and a node in this process, in a temporary
 * data folder; with `--url` the job goes to a dispatcher that is there.
 */
import type { Command } from 'commander';
import type { JobSubmission } from '@millrace/dispatch/client';
import { MillraceError, describeError } from '@millrace/runner';
import { action, examples, repeatable, type Session } from '../command.ts';
import type { Address } from '../connection.ts';
import type { RunnerSpec } from '../config-file.ts';
import type { Embedded } from '../embedded.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import type { InputSource, JobFile } from '../job-file.ts';
import type { ProgressDisplay } from '../progress-display.ts';
import { formatBytes, formatDuration, parseDuration, parseInteger } from '../units.ts';

interface RunOptions {
  readonly input?: readonly string[];
  readonly meta?: string;
  readonly label?: string;
  readonly out: string;
  readonly timeout?: string;
  readonly runner?: readonly string[];
  readonly config?: string;
  readonly concurrency?: string;
}

export function registerRun(program: Command, session: Session): void {
  program
    .command('run')
    .description('run one job from start to finish and fetch its artifacts')
    .argument('<module|job>', 'a runner module (.ts, .mts, .js, .mjs), or a job file (.yaml, .yml, .json)')
    .option(
      '--input <file>',
      'an input, in order; - is stdin. Beside a job file: name=FILE for "input:name"',
      repeatable,
    )
    .option('--meta <json>', "the task's parameters as JSON, or @FILE")
    .option('--label <text>', 'what the job is called')
    .option('--out <dir>', 'where artifacts go, under their logical paths', './out')
    .option('--timeout <duration>', 'cancel the job after this long: 90, 90s, 15m, 2h')
    .option('--runner <module>', 'beside a job file: a runner module; repeatable', repeatable)
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
          'millrace run ./resize.ts --input photo.jpg --url http://10.0.0.5:7070',
          'on the nodes of a dispatcher elsewhere',
        ],
      ]) +
        "\nEverything is done in a temporary folder; --data keeps the dispatcher's state in another.\nCtrl-C cancels the job and waits until its work has ended; again: does not wait.\n",
    )
    .action(action(session, run));
}

async function run(context: CommandContext, options: RunOptions, target: string): Promise<ExitCode> {
  const { io, options: common } = context;
  const timeoutMs = options.timeout === undefined ? null : parseDuration(options.timeout, '--timeout');
  const concurrency =
    options.concurrency === undefined ? null : parseInteger(options.concurrency, '--concurrency', 1, 4096);
  // Only a dispatcher that was asked for: the one that may be running on the default data folder is not.
  const remote = Boolean(common.url || io.env['MILLRACE_URL']);
  const plan = await planJob(context, options, target, remote);
  if (remote) {
    const { resolveAddress } = await import('../connection.ts');
    const address = await resolveAddress(context);
    const file = await plan.file(async () => {
      const { openRunners, closeRunners } = await import('../embed-runners.ts');
      const { quietLogger } = await import('../operator-log.ts');
      // The module is loaded here only to learn what it is called.
      const runners = await openRunners(
        plan.runners,
        quietLogger(io, (line) => context.out.note(line)),
      );
      const capabilities = runners.map((runner) => runner.capability);
      await closeRunners(runners);
      return capabilities;
    });
    return await execute(context, options, { address, file, named: plan.named, timeoutMs, embedded: null });
  }
  return await runEmbedded(context, options, plan, { timeoutMs, concurrency });
}

/** What is to be run, before anything is started. */
interface Plan {
  readonly runners: readonly RunnerSpec[];
  readonly named: ReadonlyMap<string, InputSource>;
  /** The job; `capabilities` asks for those of {@link runners}, in order. */
  file(capabilities: () => Promise<readonly string[]>): Promise<JobFile>;
}

async function planJob(
  { io }: CommandContext,
  options: RunOptions,
  target: string,
  remote: boolean,
): Promise<Plan> {
  const [{ loadConfig }, { runnerSpecs, singleRunner }, jobFiles] = await Promise.all([
    import('../config-file.ts'),
    import('../runner-specs.ts'),
    import('../job-file.ts'),
  ]);
  const config = await loadConfig(options.config, io.cwd);
  const inputs = options.input ?? [];
  if (/\.(?:ya?ml|json)$/i.test(target)) {
    if (options.meta !== undefined || options.label !== undefined) {
      throw new MillraceError(
        'invalid_argument',
        `--meta and --label belong to a runner module; ${target} is a job file and says both itself`,
      );
    }
    const read = await jobFiles.readJobFile(target, io.cwd, io.stdin);
    const runners = remote ? [] : await runnerSpecs(options.runner ?? [], config, io.cwd);
    if (!remote && runners.length === 0) {
      throw new MillraceError(
        'invalid_argument',
        `nothing here can run ${target}: name runner modules with --runner or in millrace.config.ts, or a dispatcher with --url`,
      );
    }
    return {
      runners,
      named: jobFiles.parseNamedInputs(inputs, io.cwd),
      async file(capabilities) {
        if (!remote) requireRunners(read.job, await capabilities());
        return read;
      },
    };
  }
  if (!/\.[mc]?[jt]s$/i.test(target)) {
    throw new MillraceError(
      'invalid_argument',
      `${JSON.stringify(target)} is neither a runner module (.ts, .mts, .js, .mjs) nor a job file (.yaml, .yml, .json)`,
    );
  }
  if (options.runner !== undefined) {
    throw new MillraceError('invalid_argument', `--runner belongs to a job file; ${target} is the runner`);
  }
  const spec = await singleRunner(target, config, io.cwd);
  const meta = await readMeta(options.meta, io.cwd);
  const named = new Map(inputs.map((input, index) => [String(index), jobFiles.parseInput(input, io.cwd)]));
  return {
    runners: [spec],
    named,
    async file(capabilities) {
      const capability = (await capabilities())[0] ?? '';
      const label = options.label ?? capability;
      const task = { label, capability, inputs_cids: [...named.keys()].map((key) => `input:${key}`), meta };
      return { job: { label, tasks: [task] }, baseDir: io.cwd };
    },
  };
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
  const [{ readFile }, path] = await Promise.all([import('node:fs/promises'), import('node:path')]);
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

async function runEmbedded(
  context: CommandContext,
  options: RunOptions,
  plan: Plan,
  { timeoutMs, concurrency }: { readonly timeoutMs: number | null; readonly concurrency: number | null },
): Promise<ExitCode> {
  const { io } = context;
  const [{ loadConfig }, { startEmbedded }, { quietLogger }, { temporaryFolder }, { resolveDataDir }] =
    await Promise.all([
      import('../config-file.ts'),
      import('../embedded.ts'),
      import('../operator-log.ts'),
      import('../temporary-folder.ts'),
      import('../data-dir.ts'),
    ]);
  const config = await loadConfig(options.config, io.cwd);
  // Not `MILLRACE_DATA`: it names where a dispatcher stays, and the one of this job goes.
  await using folder = context.options.data ? null : await temporaryFolder();
  const screen = { print: (line: string): void => context.out.note(line) };
  await using embedded = await startEmbedded({
    dataDir: folder?.path ?? resolveDataDir(context),
    pid: io.pid,
    port: 0,
    env: io.env,
    runners: plan.runners,
    config,
    concurrency,
    log: quietLogger(io, (line) => screen.print(line)),
  });
  const file = await plan.file(() => Promise.resolve(embedded.runners.map((runner) => runner.capability)));
  return await execute(context, options, {
    address: embedded,
    file,
    named: plan.named,
    timeoutMs,
    embedded,
    onDisplay: (display) => {
      screen.print = (line) => display.print(line);
    },
  });
}

interface Execution {
  readonly address: Address;
  readonly file: JobFile;
  readonly named: ReadonlyMap<string, InputSource>;
  readonly timeoutMs: number | null;
  readonly embedded: Embedded | null;
  readonly onDisplay?: (display: ProgressDisplay) => void;
}

/** Submits, follows, fetches. */
async function execute(
  context: CommandContext,
  options: RunOptions,
  execution: Execution,
): Promise<ExitCode> {
  const { io, out } = context;
  const { address, embedded } = execution;
  const [{ withRequestor }, { submitWithInputs }, { followJob }, outcome, { saveArtifacts }, path] =
    await Promise.all([
      import('../connection.ts'),
      import('../submission.ts'),
      import('../follow-job.ts'),
      import('../job-outcome.ts'),
      import('../transfer.ts'),
      import('node:path'),
    ]);
  return await withRequestor(address, async (requestor) => {
    /** Ends everything at once: the second signal, or a node that cannot work. */
    const giveUp = new AbortController();
    let jobId: string | null = null;
    const state = { timedOut: false, canceling: false };
    const cancel = (why: string): void => {
      state.canceling = true;
      if (jobId === null) {
        giveUp.abort(new MillraceError('canceled', `canceled before the job was submitted (${why})`));
        return;
      }
      out.note(`${why}: canceling the job`);
      requestor.cancel(jobId, { signal: giveUp.signal }).catch((error: unknown) => giveUp.abort(error));
    };
    using _ = io.onStop(() => {
      if (!state.canceling) cancel('interrupted');
      else giveUp.abort(new MillraceError('canceled', 'interrupted again: not waiting for the job to end'));
    });
    embedded?.ended.then(
      () => giveUp.abort(new MillraceError('internal', 'the node in this process ended before the job did')),
      (error: unknown) => giveUp.abort(error),
    );
    jobId = await submitWithInputs(io, requestor, execution.file, execution.named, { signal: giveUp.signal });
    const timer =
      execution.timeoutMs === null
        ? null
        : setTimeout(() => {
            state.timedOut = true;
            if (!state.canceling) cancel(`not done after ${formatDuration(execution.timeoutMs ?? 0)}`);
          }, execution.timeoutMs);
    try {
      const { detail, events } = await followJob(io, requestor, jobId, {
        signal: giveUp.signal,
        ...(execution.onDisplay && { onDisplay: execution.onDisplay }),
      });
      const outDir = path.resolve(io.cwd, options.out);
      const artifacts = await saveArtifacts(outcome.artifactsOf(detail), outDir, {
        storage: requestor.storage,
        domainId: detail.job.domain_id,
        signal: giveUp.signal,
      });
      const timeout = state.timedOut && detail.job.status === 'canceled';
      const message = `timeout: not done after ${formatDuration(execution.timeoutMs ?? 0)}`;
      out.result(
        {
          ...outcome.jobDocument(detail),
          ...(timeout && { error: { code: 'deadline_exceeded', message } }),
          out: outDir,
          artifacts,
        },
        () => [
          ...outcome.jobLines(detail, events, out.paint),
          ...(timeout ? [`  ${message}`] : []),
          ...artifacts.map(
            ({ file, size }) => `  ${shortPath(path.relative(io.cwd, file), file)}  ${formatBytes(size)}`,
          ),
        ],
      );
      return timeout ? EXIT.failed : outcome.jobExitCode(detail);
    } finally {
      if (timer !== null) clearTimeout(timer);
    }
  });
}

/** A path as one would type it from here. */
function shortPath(relative: string, absolute: string): string {
  return relative.startsWith('..') ? absolute : `./${relative}`;
}
