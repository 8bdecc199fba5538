/** `millrace jobs` and `millrace job show|watch|logs|cancel`: what was submitted and how it is doing. */
import type { Command } from 'commander';
import type { JobDetail } from '@millrace/dispatch';
import type { Requestor } from '@millrace/dispatch/client';
import { MillraceError } from '@millrace/runner';
import { action, examples, type Session } from '../command.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import type { Paint } from '../terminal.ts';
import { oneLine, table, type Column } from '../text-width.ts';
import { formatDuration, formatTime, parseInteger } from '../units.ts';

const STATUSES = ['pending', 'running', 'completed', 'failed', 'canceled'] as const;
type JobStatus = (typeof STATUSES)[number];

interface ListOptions {
  readonly status?: string;
  readonly limit: string;
}
interface LogsOptions {
  readonly follow?: boolean;
  readonly task?: string;
}

export function registerJobs(program: Command, session: Session): void {
  program
    .command('jobs')
    .description('list jobs, newest first')
    .option('--status <status>', `only those that are ${STATUSES.join(', ')}`)
    .option('--limit <n>', 'how many, 1 to 1000', '20')
    .addHelpText(
      'after',
      examples([
        ['millrace jobs --status failed', 'what went wrong lately'],
        ['millrace jobs --limit 1 --json', 'the newest job, for a script'],
      ]),
    )
    .action(action(session, list));
  const job = program.command('job').description('one job: show, watch, logs, cancel');
  job
    .command('show')
    .description('the job, its tasks and what became of each attempt')
    .argument('<job-id>')
    .addHelpText(
      'after',
      examples([['millrace job show 6f9619ff-8b86-4d01-b42d-00cf4fc964ff', 'where it stands and why']]),
    )
    .action(action(session, show));
  job
    .command('watch')
    .description('follow the job to its end and exit with its result')
    .argument('<job-id>')
    .addHelpText(
      'after',
      examples([
        ['millrace job watch 6f9619ff-8b86-4d01-b42d-00cf4fc964ff', 'Ctrl-C stops watching; the job goes on'],
      ]),
    )
    .action(action(session, watch));
  job
    .command('logs')
    .description('what the tasks logged')
    .argument('<job-id>')
    .option('-f, --follow', 'go on until the job has ended')
    .option('--task <id>', 'only this task')
    .addHelpText(
      'after',
      examples([['millrace job logs -f 6f9619ff-8b86-4d01-b42d-00cf4fc964ff', 'as it happens']]),
    )
    .action(action(session, logs));
  job
    .command('cancel')
    .description('cancel the job: queued tasks end now, running ones are told to stop')
    .argument('<job-id>')
    .addHelpText(
      'after',
      examples([
        [
          'millrace job cancel 6f9619ff-8b86-4d01-b42d-00cf4fc964ff',
          'returns at once; "job watch" sees the end',
        ],
      ]),
    )
    .action(action(session, cancel));
}

async function connected<T>(
  context: CommandContext,
  work: (requestor: Requestor, signal: AbortSignal) => Promise<T>,
  interrupted = 'interrupted',
): Promise<T> {
  const { resolveAddress, withRequestor } = await import('../connection.ts');
  const address = await resolveAddress(context);
  return await withRequestor(address, async (requestor) => {
    const stop = new AbortController();
    using _ = context.io.onStop(() => stop.abort(new MillraceError('canceled', interrupted)));
    return await work(requestor, stop.signal);
  });
}

async function list(context: CommandContext, options: ListOptions): Promise<ExitCode> {
  const { io, out } = context;
  const limit = parseInteger(options.limit, '--limit', 1, 1000);
  const status = options.status === undefined ? null : jobStatus(options.status);
  const jobs = await connected(context, async (requestor, signal) => {
    const found: Awaited<ReturnType<Requestor['jobs']>>['items'][number][] = [];
    let cursor: string | null = null;
    do {
      const page: Awaited<ReturnType<Requestor['jobs']>> = await requestor.jobs(
        {
          // The dispatcher gives at most 100 at once.
          limit: Math.min(100, limit - found.length),
          ...(status !== null && { status }),
          ...(cursor !== null && { cursor }),
        },
        { signal },
      );
      found.push(...page.items);
      cursor = page.next_cursor;
    } while (cursor !== null && found.length < limit);
    return found;
  });
  out.result({ jobs }, () => {
    if (jobs.length === 0) {
      return [status === null ? 'no jobs yet; "millrace submit job.yaml" makes one' : `no job is ${status}`];
    }
    return table(
      [
        { title: 'ID' },
        { title: 'STATUS' },
        { title: 'TASKS', align: 'right' },
        { title: 'SUBMITTED' },
        { title: 'LABEL' },
      ],
      jobs.map(({ job, tasks_summary: summary }) => [
        job.id,
        statusText(job.status, out.paint),
        `${summary.completed}/${Object.values(summary).reduce((sum, count) => sum + count, 0)}`,
        formatTime(job.created_at, io.now()),
        oneLine(job.label),
      ]),
      out.paint.dim,
    );
  });
  return EXIT.done;
}

function jobStatus(text: string): JobStatus {
  const status = STATUSES.find((each) => each === text);
  if (status === undefined) {
    throw new MillraceError(
      'invalid_argument',
      `--status must be one of ${STATUSES.join(', ')}, got ${JSON.stringify(text)}`,
    );
  }
  return status;
}

function statusText(status: string, paint: Paint): string {
  switch (status) {
    case 'completed':
      return paint.green(status);
    case 'failed':
      return paint.red(status);
    case 'canceled':
      return paint.yellow(status);
    case 'running':
    case 'leased':
      return paint.cyan(status);
    default:
      return status;
  }
}

async function show(context: CommandContext, _options: object, jobId: string): Promise<ExitCode> {
  const { io, out } = context;
  const [{ taskName }, { artifactsOf }] = await Promise.all([
    import('../progress.ts'),
    import('../job-outcome.ts'),
  ]);
  const [detail, nodes] = await connected(context, async (requestor, signal) => {
    const found = await requestor.job(jobId, { signal });
    // Names for the node ids; without them the ids will do.
    const known = await requestor.nodes({ signal }).catch(() => []);
    return [found, new Map(known.map((node) => [node.id, oneLine(node.name)]))] as const;
  });
  out.result(detail, () => showLines(detail, nodes, io.now(), out.paint, taskName, artifactsOf(detail)));
  return EXIT.done;
}

function showLines(
  detail: JobDetail,
  nodes: ReadonlyMap<string, string>,
  nowMs: number,
  paint: Paint,
  taskName: (task: JobDetail['tasks'][number]) => string,
  artifacts: readonly { readonly path: string }[],
): string[] {
  const { job, tasks, receipts } = detail;
  const rows = tasks.map((task) => {
    const receipt = receipts.findLast((each) => each.task_id === task.id);
    const nodeId = task.reserved_by ?? receipt?.node_id ?? null;
    return [
      taskName(task),
      statusText(task.status, paint),
      `${task.attempts}/${task.max_attempts}`,
      receipt === undefined
        ? '-'
        : formatDuration(Date.parse(receipt.created_at) - Date.parse(receipt.leased_at)),
      nodeId === null ? '-' : (nodes.get(nodeId) ?? nodeId),
      task.status === 'queued' && task.deps_remaining > 0
        ? `waits for ${task.deps_remaining} earlier ${task.deps_remaining === 1 ? 'stage' : 'stages'}`
        : oneLine(task.reason ?? ''),
    ];
  });
  const columns: Column[] = [
    { title: 'TASK' },
    { title: 'STATUS' },
    { title: 'ATTEMPTS', align: 'right' },
    { title: 'TOOK', align: 'right' },
    { title: 'NODE' },
    // A column only for what has a reason.
    ...(rows.some((row) => row[5] !== '') ? [{ title: 'WHY' }] : []),
  ];
  const lines = [
    `${paint.bold(oneLine(job.label))}  ${statusText(job.status, paint)}${job.cancel_requested_at !== null && (job.status === 'running' || job.status === 'pending') ? ' (canceling)' : ''}`,
    `  id         ${job.id}`,
    `  submitted  ${formatTime(job.created_at, nowMs)}`,
    `  changed    ${formatTime(job.updated_at, nowMs)}`,
    ...(job.deadline_at === null ? [] : [`  deadline   ${formatTime(job.deadline_at, nowMs)}`]),
    '',
    ...table(columns, rows, paint.dim),
  ];
  const failures = receipts.filter((receipt) => receipt.outcome !== 'completed');
  if (failures.length > 0) {
    const names = new Map(tasks.map((task) => [task.id, taskName(task)]));
    lines.push('', paint.dim('attempts that did not complete'));
    lines.push(
      ...failures
        .slice(-20)
        .map((receipt) =>
          `  ${formatTime(receipt.created_at, nowMs)}  ${names.get(receipt.task_id) ?? receipt.task_id}  ${receipt.outcome}  ${oneLine(receipt.reason ?? '')}`.trimEnd(),
        ),
    );
  }
  if (artifacts.length > 0) {
    lines.push('', paint.dim('artifacts'), ...artifacts.slice(0, 20).map(({ path }) => `  ${oneLine(path)}`));
    if (artifacts.length > 20) lines.push(`  … and ${artifacts.length - 20} more`);
  }
  return lines;
}

async function watch(context: CommandContext, _options: object, jobId: string): Promise<ExitCode> {
  const { watchToEnd } = await import('../watch.ts');
  return await connected(
    context,
    (requestor, signal) => watchToEnd(context, requestor, jobId, signal),
    `stopped watching; the job goes on: "millrace job watch ${jobId}", "millrace job cancel ${jobId}"`,
  );
}

async function logs(context: CommandContext, options: LogsOptions, jobId: string): Promise<ExitCode> {
  const { io, out } = context;
  const [{ logLine }, { taskName }] = await Promise.all([
    import('../job-outcome.ts'),
    import('../progress.ts'),
  ]);
  const entries = await connected(context, async (requestor, signal) => {
    const { tasks } = await requestor.job(jobId, { signal });
    const names = new Map(tasks.map((task) => [task.id, taskName(task)]));
    if (options.task !== undefined && !names.has(options.task)) {
      throw new MillraceError(
        'not_found',
        `job ${jobId} has no task ${options.task}; "millrace job show --json" lists them`,
      );
    }
    const kept: unknown[] = [];
    for await (const event of requestor.events(jobId, { signal, follow: options.follow === true })) {
      const line = logLine(event);
      if (line === null || event.task_id === null) continue;
      if (options.task !== undefined && event.task_id !== options.task) continue;
      // The document needs all of them at the end; lines go out as they come.
      if (out.json) kept.push({ at: event.at, task_id: event.task_id, event: event.data['event'] ?? null });
      else
        io.stdout.write(
          `${out.paint.dim(clockText(event.at))}  ${names.get(event.task_id) ?? event.task_id}  ${line}\n`,
        );
    }
    return kept;
  });
  if (out.json) out.document({ job_id: jobId, logs: entries });
  return EXIT.done;
}

/** `14:03:07.250`, local. */
function clockText(iso: string): string {
  const at = new Date(iso);
  const two = (value: number): string => String(value).padStart(2, '0');
  return `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}.${String(at.getMilliseconds()).padStart(3, '0')}`;
}

async function cancel(context: CommandContext, _options: object, jobId: string): Promise<ExitCode> {
  const { out } = context;
  const answer = await connected(context, (requestor, signal) => requestor.cancel(jobId, { signal }));
  out.result(answer, () =>
    answer.status === 'completed' || answer.status === 'failed' || answer.status === 'canceled'
      ? [`job ${answer.id} is ${answer.status}`]
      : [`job ${answer.id} is being canceled; "millrace job watch ${answer.id}" sees its end`],
  );
  return EXIT.done;
}
