/** A job that ended, as an exit code, a JSON document and lines for people; and the artifacts it left. */
import type { JobDetail, JobEvent } from '@millrace/dispatch';
import type { Json } from '@millrace/runner';
import { EXIT, type ExitCode } from './exit-codes.ts';
import { taskName } from './progress.ts';
import type { Paint } from './terminal.ts';
import { oneLine, printable } from './text-width.ts';
import type { Artifact } from './transfer.ts';
import { formatDuration } from './units.ts';

/** Lines of a failed task's log that are shown with its reason. */
const LOG_TAIL = 10;

const EXIT_OF_STATUS: Readonly<Partial<Record<JobDetail['job']['status'], ExitCode>>> = {
  completed: EXIT.done,
  failed: EXIT.failed,
  canceled: EXIT.canceled,
};

/** 0 completed, 1 failed, 3 canceled. @throws for a job that has not ended, which is a bug of the caller. */
export function jobExitCode({ job }: JobDetail): ExitCode {
  const code = EXIT_OF_STATUS[job.status];
  if (code === undefined) throw new Error(`job ${job.id} has not ended: ${job.status}`);
  return code;
}

/** The JSON document of a finished job. `error` is there when it did not complete. */
export function jobDocument(detail: JobDetail): Record<string, unknown> {
  const { job } = detail;
  return {
    job_id: job.id,
    label: job.label,
    status: job.status,
    created_at: job.created_at,
    updated_at: job.updated_at,
    tasks: detail.tasks.map((task) => ({
      id: task.id,
      stage: task.stage,
      label: task.label,
      capability: task.capability,
      status: task.status,
      attempts: task.attempts,
      reason: task.reason,
    })),
    ...(job.status === 'completed'
      ? {}
      : {
          error: { code: job.status === 'canceled' ? 'canceled' : 'job_failed', message: jobReason(detail) },
        }),
  };
}

/** Why a job did not complete, in one sentence. */
export function jobReason(detail: JobDetail): string {
  const failed = detail.tasks.filter((task) => task.status === 'failed');
  const first = failed[0];
  if (detail.job.status === 'canceled') return 'the job was canceled';
  if (first === undefined) return `the job is ${detail.job.status}`;
  const attempts = `${first.attempts} ${first.attempts === 1 ? 'attempt' : 'attempts'}`;
  const more = failed.length > 1 ? ` (and ${failed.length - 1} more failed)` : '';
  return `${taskName(first)} failed after ${attempts}: ${oneLine(first.reason ?? 'no reason given')}${more}`;
}

/** Of which tasks of a failed job the end of the log is shown. */
export function tasksWithTail(tasks: JobDetail['tasks']): JobDetail['tasks'] {
  return tasks.filter((each) => each.status === 'failed').slice(0, 3);
}

/** The job's end in words: one line, and for a failure the last lines of the failed tasks' logs (by task id). */
export function jobLines(
  detail: JobDetail,
  logs: ReadonlyMap<string, readonly string[]>,
  paint: Paint,
): string[] {
  const { job, tasks } = detail;
  const took = formatDuration(Date.parse(job.updated_at) - Date.parse(job.created_at));
  const count = `${tasks.length} ${tasks.length === 1 ? 'task' : 'tasks'}`;
  if (job.status === 'completed') return [`${paint.green('completed')}  ${job.id}  ${count} in ${took}`];
  if (job.status === 'canceled') return [`${paint.yellow('canceled')}  ${job.id}  after ${took}`];
  const lines = [`${paint.red(job.status)}  ${job.id}  after ${took}`, `  ${jobReason(detail)}`];
  for (const task of tasksWithTail(tasks)) {
    const log = logs.get(task.id) ?? [];
    if (log.length === 0) continue;
    lines.push(paint.dim(`  last log lines of ${taskName(task)}:`));
    lines.push(...log.slice(-LOG_TAIL).map((line) => `    ${line}`));
  }
  return lines;
}

/** A `task.log` event as one line: level, message, then fields; null for other events. */
export function logLine(event: JobEvent): string | null {
  return event.kind === 'task.log' ? eventText(event.data['event'] ?? null) : null;
}

/** A line of a task's log, without its time: as it was printed; or level, text and fields; or an event. */
export function saidText(said: Readonly<Record<string, Json>>): string {
  const { stream, level, text, event, fields } = said;
  if (typeof text !== 'string') return eventText(event ?? said);
  const more = fields === undefined ? [] : fieldTexts(fields);
  if (stream !== undefined) return printable([text, ...more].join('  '));
  return oneLine([...(typeof level === 'string' ? [level] : []), text, ...more].join('  '));
}

function eventText(value: Json): string {
  if (typeof value === 'string') return oneLine(value);
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return JSON.stringify(value);
  const { level, message, ...rest } = value;
  if (typeof message !== 'string') return oneLine(JSON.stringify(value));
  const fields = Object.entries(rest)
    .filter(([key]) => key !== 'kind' && key !== 'at')
    .flatMap(([key, member]) => (key === 'fields' ? fieldTexts(member) : [`${key}=${fieldText(member)}`]));
  return oneLine([...(typeof level === 'string' ? [level] : []), message, ...fields].join('  '));
}

function fieldTexts(value: Json): string[] {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
    ? Object.entries(value).map(([key, member]) => `${key}=${fieldText(member)}`)
    : [`fields=${fieldText(value)}`];
}

function fieldText(value: Json): string {
  return typeof value === 'string' && /^[^\s"=]+$/.test(value) ? value : JSON.stringify(value);
}

/**
 * What the job's accepted completions reported, in the order of its tasks. Two tasks that used one path both keep
 * their file: from the second on it is in a folder named for the task.
 */
export function artifactsOf(detail: JobDetail): Artifact[] {
  const artifacts: Artifact[] = [];
  const taken = new Set<string>();
  for (const task of detail.tasks) {
    const receipt = detail.receipts.findLast(
      (each) => each.task_id === task.id && each.outcome === 'completed',
    );
    if (receipt === undefined) continue;
    for (const { path, id } of reported(receipt.meta, receipt.outputs)) {
      const unique = taken.has(path) ? `${task.id}/${path}` : path;
      taken.add(unique);
      artifacts.push({ path: unique, id, taskId: task.id });
    }
  }
  return artifacts;
}

/** The report's `artifacts`; a peer that reports only ids gets files named by them. */
function reported(meta: Json, outputs: readonly string[]): { readonly path: string; readonly id: string }[] {
  const list =
    typeof meta === 'object' && meta !== null && !Array.isArray(meta) && Array.isArray(meta['artifacts'])
      ? meta['artifacts']
      : [];
  const found = list.flatMap((item: Json) => {
    if (typeof item !== 'object' || item === null || Array.isArray(item)) return [];
    const { logical_path: path, id } = item;
    return typeof path === 'string' && typeof id === 'string' ? [{ path, id }] : [];
  });
  const known = new Set(found.map((item) => item.id));
  return [...found, ...outputs.filter((id) => !known.has(id)).map((id) => ({ path: id, id }))];
}
