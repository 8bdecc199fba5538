/** `millrace submit`: give a job file to the dispatcher. */
import type { Command } from 'commander';
import { MillraceError } from '@millrace/runner';
import { action, examples, repeatable, type Session } from '../command.ts';
import { resolveDataDir } from '../data-dir.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import { terminalFeatures } from '../terminal.ts';

interface SubmitOptions {
  readonly watch?: boolean;
  readonly idempotencyKey?: string;
  readonly input?: readonly string[];
}

export function registerSubmit(program: Command, session: Session): void {
  program
    .command('submit')
    .description('submit a job file (the posemesh job spec as YAML or JSON); prints the job id')
    .argument('<job>', 'a .yaml, .yml or .json file; - is stdin')
    .option('--watch', 'follow the job to its end and exit with its result')
    .option('--idempotency-key <key>', 'submitting the same job with the same key again gives the same id')
    .option(
      '--input <name=file>',
      'the file for "input:name" in inputs_cids; - is stdin; repeatable',
      repeatable,
    )
    .addHelpText(
      'after',
      `
A job file:
  label: thumbnails
  tasks:
    - stage: resize
      capability: /examples/resize/v1
      inputs_cids: [file:./photo.jpg]     # uploaded first; relative to the job file
      meta: { size: 256 }
    - stage: summary
      capability: /compute/v1             # code that travels with the job
      meta: { ref: op://summary }         # summary.ts, .js or .wasm beside the job file
    - stage: sheet
      capability: /examples/sheet/v1
      inputs_cids: [stage:resize]         # whatever the stage before gave
  edges:
    - { from: resize, to: sheet }
` +
        examples([
          ['millrace submit job.yaml --watch', 'submit and follow'],
          ['millrace submit job.yaml --input photo=./cat.jpg', 'with "input:photo" in its inputs_cids'],
          ['generate-job | millrace submit - --idempotency-key nightly-2026-03-02', 'safe to repeat'],
        ]),
    )
    .action(action(session, submit));
}

async function submit(context: CommandContext, options: SubmitOptions, file: string): Promise<ExitCode> {
  const { io, out } = context;
  const key = options.idempotencyKey;
  if (key !== undefined && !/^[!-~]{1,128}$/.test(key)) {
    throw new MillraceError(
      'invalid_argument',
      `--idempotency-key must be 1 to 128 visible ASCII characters, got ${JSON.stringify(key)}`,
    );
  }
  const { readJobFile, parseNamedInputs, checkInputs } = await import('../job-file.ts');
  const named = parseNamedInputs(options.input ?? [], io.cwd);
  const job = await readJobFile(file, io.cwd, io.stdin);
  // Nothing that is wrong on this machine should need a dispatcher to be found.
  await checkInputs(job, named, file === '-');
  const [{ resolveAddress, withRequestor }, { buildComputes, submitWithInputs }] = await Promise.all([
    import('../connection.ts'),
    import('../submission.ts'),
  ]);
  const built = await buildComputes(job);
  const address = await resolveAddress(context);
  return await withRequestor(address, async (requestor) => {
    const stop = new AbortController();
    let jobId: string | null = null;
    using _ = io.onStop(() =>
      stop.abort(
        new MillraceError(
          'canceled',
          jobId === null
            ? 'interrupted before the job was submitted'
            : `stopped watching; the job goes on: "millrace job watch ${jobId}", "millrace job cancel ${jobId}"`,
        ),
      ),
    );
    jobId = await submitWithInputs(io, requestor, built, named, {
      signal: stop.signal,
      dataDir: resolveDataDir(context),
      ...(key !== undefined && { idempotencyKey: key }),
    });
    if (!options.watch) {
      out.result({ job_id: jobId }, () => [jobId ?? '']);
      if (terminalFeatures(io.stderr, io.env).live) out.note(`"millrace job watch ${jobId}" follows it`);
      return EXIT.done;
    }
    out.note(`job ${jobId}`);
    const { watchToEnd } = await import('../watch.ts');
    return await watchToEnd(context, requestor, jobId, stop.signal);
  });
}
