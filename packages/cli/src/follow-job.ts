/** Follows a job to its end, showing its progress on stderr. */
import type { JobDetail, JobEvent } from '@millrace/dispatch';
import type { Requestor } from '@millrace/dispatch/client';
import type { Io } from './io.ts';
import { JobView } from './progress.ts';
import { ProgressDisplay } from './progress-display.ts';

export interface FollowedJob {
  readonly detail: JobDetail;
  /** The log events, for the report of a failure; the newest of a long log. */
  readonly events: readonly JobEvent[];
}

const KEPT_LOG_EVENTS = 1_000;

/** Resolves when the job has ended. Rejects with the signal's reason when that aborts: the job itself goes on. */
export async function followJob(
  io: Io,
  requestor: Requestor,
  jobId: string,
  options: { readonly signal: AbortSignal; readonly onDisplay?: (display: ProgressDisplay) => void },
): Promise<FollowedJob> {
  const { signal } = options;
  const view = new JobView(await requestor.job(jobId, { signal }));
  const events: JobEvent[] = [];
  {
    using display = new ProgressDisplay(view, io.stderr, io.env, () => io.now());
    options.onDisplay?.(display);
    for await (const event of requestor.events(jobId, { signal })) {
      display.apply(event);
      if (event.kind === 'task.log' && events.push(event) > KEPT_LOG_EVENTS) events.shift();
    }
  }
  return { detail: await requestor.job(jobId, { signal }), events };
}
