/** `millrace job logs`: what the tasks of a job said, from the first byte on. */
import type { Command } from 'commander';
import type { JobDetail } from '@millrace/dispatch';
import type { Requestor } from '@millrace/dispatch/client';
import { MillraceError, describeError } from '@millrace/runner';
import { action, connected, examples, type Session } from '../command.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import { LOG_SOURCES, readLogs, type LogScope, type LogSource } from '../task-logs.ts';
import { parseInteger } from '../units.ts';

interface LogsOptions {
  readonly follow?: boolean;
  readonly task?: string;
  readonly attempt?: string;
  readonly offset?: string;
  readonly stream?: string;
  readonly timestamps?: boolean;
}

export function registerJobLogs(job: Command, session: Session): void {
  job
    .command('logs')
    .description('what the tasks said, from the first line on, attempts before the last included')
    .argument('<id>', 'of a job or a task')
    .option('-f, --follow', 'go on until the job has ended')
    .option('--task <id>', 'only this task of the job')
    .option('--attempt <n>', 'only the n-th attempt, counted over all nodes that took the task')
    .option('--stream <name>', `only what came by ${LOG_SOURCES.join(', ')}`)
    .option(
      '--offset <bytes>',
      'begin there in the newest (or the given) attempt of one task; below 0: from its end',
    )
    .option('-t, --timestamps', 'show the time before each line')
    .addHelpText(
      'after',
      examples([
        ['millrace job logs -f 6f9619ff-8b86-4d01-b42d-00cf4fc964ff', 'as it happens, to the end of the job'],
        [
          'millrace job logs 6f9619ff-8b86-4d01-b42d-00cf4fc964ff --attempt 1 --stream stderr -t',
          'what the first attempts complained about, and when',
        ],
        [
          'millrace job logs 0190a5f0-0c4e-7d3c-9f6a-1b2c3d4e5f60 --offset -4096',
          'the end of what one task said last',
        ],
      ]),
    )
    .action(action(session, logs));
}

async function logs(context: CommandContext, options: LogsOptions, id: string): Promise<ExitCode> {
  const { io, out } = context;
  const [{ saidText }, { taskName }] = await Promise.all([
    import('../job-outcome.ts'),
    import('../progress.ts'),
  ]);
  const source = options.stream === undefined ? null : logSource(options.stream);
  const attempt =
    options.attempt === undefined
      ? null
      : parseInteger(options.attempt, '--attempt', 1, Number.MAX_SAFE_INTEGER);
  const offset =
    options.offset === undefined
      ? null
      : parseInteger(options.offset, '--offset', -Number.MAX_SAFE_INTEGER, Number.MAX_SAFE_INTEGER);
  await connected(context, async (requestor, signal) => {
    const { detail, tasks } = await find(requestor, id, options.task, signal);
    const jobId = detail.job.id;
    let scope: LogScope = {
      jobId,
      taskIds: new Set(tasks.map((task) => task.id)),
      attempt,
      offset: 0,
    };
    if (offset !== null) {
      const [task] = tasks;
      if (task === undefined || tasks.length > 1) {
        throw new MillraceError(
          'invalid_argument',
          `--offset counts in the log of one task, and job ${jobId} has ${tasks.length}; name one with --task`,
        );
      }
      // Which attempt that is, and where in it an offset from the end lies.
      const page = await requestor.taskLog(
        task.id,
        { offset, ...(attempt !== null && { attempt }) },
        { signal },
      );
      scope = { ...scope, attempt: page.attempt, offset: page.offset };
    }
    const names = new Map(tasks.map((task) => [task.id, taskName(task)]));
    const list = out.json ? out.list({ job_id: jobId }, 'logs') : null;
    try {
      for await (const line of readLogs(requestor, scope, { follow: options.follow === true, signal })) {
        if (source !== null && line.source !== source) continue;
        if (list !== null) {
          list.push({ at: line.at, task_id: line.taskId, attempt: line.attempt, ...line.said });
          continue;
        }
        const label =
          (names.size > 1 ? (names.get(line.taskId) ?? line.taskId) : '') +
          (line.attempt > 1 ? `#${line.attempt}` : '');
        const parts = [...(options.timestamps ? [clockText(line.at)] : []), ...(label === '' ? [] : [label])];
        const lead = parts.length === 0 ? '' : `${out.paint.dim(parts.join('  '))}  `;
        io.stdout.write(`${lead}${saidText(line.said)}\n`);
      }
    } catch (error) {
      // What was written stays one document.
      if (list?.begun)
        list.end({ error: { code: MillraceError.from(error).code, message: describeError(error) } });
      throw error;
    }
    list?.end();
  });
  return EXIT.done;
}

/** The job, and those of its tasks that were asked for. `id` may be a task's. */
async function find(
  requestor: Requestor,
  id: string,
  only: string | undefined,
  signal: AbortSignal,
): Promise<{ readonly detail: JobDetail; readonly tasks: JobDetail['tasks'] }> {
  let wanted = only;
  let detail: JobDetail;
  try {
    detail = await requestor.job(id, { signal });
  } catch (error) {
    if (!MillraceError.is(error) || error.code !== 'not_found') throw error;
    const jobId = await jobOf(requestor, id, signal);
    if (only !== undefined && only !== id) {
      throw new MillraceError('invalid_argument', `${id} is a task already; leave out --task ${only}`);
    }
    wanted = id;
    detail = await requestor.job(jobId, { signal });
  }
  if (wanted === undefined) return { detail, tasks: detail.tasks };
  const tasks = detail.tasks.filter((task) => task.id === wanted);
  if (tasks.length > 0) return { detail, tasks };
  throw new MillraceError(
    'not_found',
    `job ${detail.job.id} has no task ${wanted}; "millrace job show --json" lists them`,
  );
}

/** The job of a task. */
async function jobOf(requestor: Requestor, taskId: string, signal: AbortSignal): Promise<string> {
  try {
    return (await requestor.taskLog(taskId, { limit: 1 }, { signal })).jobId;
  } catch (error) {
    if (!MillraceError.is(error) || error.code !== 'not_found') throw error;
    throw new MillraceError('not_found', `there is no job and no task ${taskId}`);
  }
}

function logSource(text: string): LogSource {
  const source = LOG_SOURCES.find((each) => each === text);
  if (source !== undefined) return source;
  throw new MillraceError(
    'invalid_argument',
    `--stream must be one of ${LOG_SOURCES.join(', ')}, got ${JSON.stringify(text)}`,
  );
}

/** `14:03:07.250`, local; as wide when the time is not known. */
function clockText(iso: string): string {
  const at = new Date(iso);
  if (Number.isNaN(at.getTime())) return '--:--:--.---';
  const two = (value: number): string => String(value).padStart(2, '0');
  return `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}.${String(at.getMilliseconds()).padStart(3, '0')}`;
}
