/** Follows a job and reports its end: `job watch` and `submit --watch`. */
import type { Requestor } from '@millrace/dispatch/client';
import type { ExitCode } from './exit-codes.ts';
import { followJob } from './follow-job.ts';
import type { CommandContext } from './io.ts';
import { artifactsOf, jobDocument, jobExitCode, jobLines } from './job-outcome.ts';

export async function watchToEnd(
  { io, out }: CommandContext,
  requestor: Requestor,
  jobId: string,
  signal: AbortSignal,
): Promise<ExitCode> {
  const { detail, logs } = await followJob(io, requestor, jobId, { signal });
  const artifacts = artifactsOf(detail);
  out.result(
    {
      ...jobDocument(detail),
      artifacts: artifacts.map(({ path, id, taskId }) => ({ path, id, task_id: taskId })),
    },
    () => [
      ...jobLines(detail, logs, out.paint),
      ...(artifacts.length === 0
        ? []
        : [
            `  ${artifacts.length} ${artifacts.length === 1 ? 'artifact' : 'artifacts'}: "millrace get ${jobId}" fetches them`,
          ]),
    ],
  );
  return jobExitCode(detail);
}
