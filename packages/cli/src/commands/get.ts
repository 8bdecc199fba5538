/** `millrace get`: fetch a job's artifacts. */
import path from 'node:path';
import type { Command } from 'commander';
import { MillraceError } from '@millrace/runner';
import { action, examples, type Session } from '../command.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import { oneLine } from '../text-width.ts';
import { formatBytes } from '../units.ts';

interface GetOptions {
  readonly out: string;
}

export function registerGet(program: Command, session: Session): void {
  program
    .command('get')
    .description("fetch a job's artifacts, checked against their digests")
    .argument('<job-id>', 'the job')
    .argument('[glob...]', 'only those whose path matches one of these (* within a folder, ** across)')
    .option('--out <dir>', 'where they go, under their logical paths', './out')
    .addHelpText(
      'after',
      examples([
        ['millrace get 6f9619ff-8b86-4d01-b42d-00cf4fc964ff', 'everything into ./out'],
        [
          "millrace get 6f9619ff-8b86-4d01-b42d-00cf4fc964ff '**/*.png' --out ./pictures",
          'only the pictures',
        ],
      ]),
    )
    .action(action(session, get));
}

async function get(
  context: CommandContext,
  options: GetOptions,
  jobId: string,
  globs: readonly string[],
): Promise<ExitCode> {
  const { io, out } = context;
  const [
    { resolveAddress, withRequestor },
    { artifactsOf },
    { saveArtifacts, skippedLines },
    { default: picomatch },
  ] = await Promise.all([
    import('../connection.ts'),
    import('../job-outcome.ts'),
    import('../transfer.ts'),
    import('picomatch'),
  ]);
  const address = await resolveAddress(context);
  return await withRequestor(address, async (requestor) => {
    const stop = new AbortController();
    using _ = io.onStop(() => stop.abort(new MillraceError('canceled', 'interrupted')));
    const detail = await requestor.job(jobId, { signal: stop.signal });
    const all = artifactsOf(detail);
    const matches = globs.length === 0 ? () => true : picomatch([...globs], { dot: true });
    const chosen = all.filter((artifact) => matches(artifact.path));
    if (chosen.length === 0) {
      throw new MillraceError(
        'not_found',
        all.length === 0
          ? `job ${jobId} (${detail.job.status}) has no artifacts`
          : `none of the ${all.length} artifacts of job ${jobId} matches ${globs.join(' ')}; there is for example ${all[0]?.path ?? ''}`,
      );
    }
    const outDir = path.resolve(io.cwd, options.out);
    const { saved: artifacts, skipped } = await saveArtifacts(chosen, outDir, {
      storage: requestor.storage,
      domainId: detail.job.domain_id,
      signal: stop.signal,
    });
    out.result({ job_id: jobId, out: outDir, artifacts, ...(skipped.length > 0 && { skipped }) }, () =>
      artifacts.map(({ file, size }) => `${oneLine(file)}  ${formatBytes(size)}`),
    );
    for (const line of skippedLines(skipped)) out.note(line);
    return skipped.length > 0 ? EXIT.failed : EXIT.done;
  });
}
