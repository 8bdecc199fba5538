/** Follows a job to its end, showing its progress on stderr. */
import type { JobDetail, JobEvent } from '@millrace/dispatch';
import type { Requestor } from '@millrace/dispatch/client';
import type { Io } from './io.ts';
import { logLine, saidText, tasksWithTail } from './job-outcome.ts';
import { JobView } from './progress.ts';
import { ProgressDisplay } from './progress-display.ts';
import { LineSplitter } from './task-logs.ts';

export interface FollowedJob {
  readonly detail: JobDetail;
  /** The last lines of the logs of tasks that failed, by task id, for the report of the failure. */
  readonly logs: ReadonlyMap<string, readonly string[]>;
}

const KEPT_LOG_EVENTS = 1_000;

/** Bytes from the end of a log: a few lines at least, unless they are very long. */
const TAIL_BYTES = 64 * 1024;

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
  const detail = await requestor.job(jobId, { signal });
  return { detail, logs: await lastLines(requestor, detail, events, signal) };
}

async function lastLines(
  requestor: Requestor,
  detail: JobDetail,
  events: readonly JobEvent[],
  signal: AbortSignal,
): Promise<Map<string, readonly string[]>> {
  const lines = new Map<string, readonly string[]>();
  if (detail.job.status !== 'failed') return lines;
  for (const { id } of tasksWithTail(detail.tasks)) {
    // A remark beside the result: without it the result stands.
    const page = await requestor.taskLog(id, { offset: -TAIL_BYTES }, { signal }).catch((error: unknown) => {
      if (signal.aborted) throw error;
      return null;
    });
    // A node that keeps no log, and an older dispatcher, have its lines among the events.
    lines.set(
      id,
      page !== null && page.bytes.byteLength > 0
        ? Array.from(new LineSplitter(id, page.attempt).split(page), ({ said }) => saidText(said))
        : events.filter((event) => event.task_id === id).flatMap((event) => logLine(event) ?? []),
    );
  }
  return lines;
}
