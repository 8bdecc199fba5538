/** `millrace jobs` and `millrace job show|watch|cancel`: what was submitted and how it is doing. */
import type { Command } from 'commander';
import type { JobDetail } from '@millrace/dispatch';
import type { Requestor } from '@millrace/dispatch/client';
import { MillraceError, type Json } from '@millrace/runner';
import { action, connected, examples, type Session } from '../command.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import type { Paint } from '../terminal.ts';
import { oneLine, table, type Column } from '../text-width.ts';
import { formatDuration, formatTime, parseInteger } from '../units.ts';
import { registerJobRedrive } from './dead.ts';
import { registerJobExplain } from './job-explain.ts';
import { registerJobLogs } from './job-logs.ts';

const STATUSES = ['pending', 'running', 'completed', 'failed', 'canceled'] as const;
type JobStatus = (typeof STATUSES)[number];

interface ListOptions {
  readonly status?: string;
  readonly limit: string;
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
  const job = program.command('job').description('one job: show, watch, logs, explain, cancel, redrive');
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
  registerJobLogs(job, session);
  registerJobExplain(job, session);
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
  registerJobRedrive(job, session);
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
  const [{ taskName }, { artifactsOf }, { usageLines }] = await Promise.all([
    import('../progress.ts'),
    import('../job-outcome.ts'),
    import('../usage-lines.ts'),
  ]);
  const [detail, nodes] = await connected(context, async (requestor, signal) => {
    const found = await requestor.job(jobId, { signal });
    // Names for the node ids; without them the ids will do.
    const known = await requestor.nodes({ signal }).catch(() => []);
    return [found, new Map(known.map((node) => [node.id, oneLine(node.name)]))] as const;
  });
  out.result(detail, () => {
    const names = detail.tasks.map((task) => [task.id, taskName(task)] as const);
    const used = usageLines(names, detail.receipts, out.paint);
    return showLines(detail, nodes, io.now(), out.paint, taskName, artifactsOf(detail), used);
  });
  return EXIT.done;
}

function showLines(
  detail: JobDetail,
  nodes: ReadonlyMap<string, string>,
  nowMs: number,
  paint: Paint,
  taskName: (task: JobDetail['tasks'][number]) => string,
  artifacts: readonly { readonly path: string }[],
  used: readonly string[],
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
        : task.status === 'queued' && task.not_before !== null && receipt === undefined
          ? `not before ${formatTime(task.not_before, nowMs)}`
          : oneLine(task.reason ?? sameAs(receipt?.meta)),
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
    ...(job.redrive_of === undefined ? [] : [`  redrives   ${job.redrive_of}`]),
    ...(detail.redriven_as === undefined ? [] : [`  redriven   as ${detail.redriven_as.join(', ')}`]),
    ...(job.deadline_at === null ? [] : [`  deadline   ${formatTime(job.deadline_at, nowMs)}`]),
    '',
    ...table(columns, rows, paint.dim),
    ...used,
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

/** Of a task that was completed from an earlier result: whose. */
function sameAs(meta: Json | undefined): string {
  if (typeof meta !== 'object' || meta === null || Array.isArray(meta)) return '';
  const { memo } = meta;
  if (typeof memo !== 'object' || memo === null || Array.isArray(memo)) return '';
  const { task_id: taskId, job_id: jobId } = memo;
  if (typeof taskId !== 'string') return '';
  return `as task ${taskId}${typeof jobId === 'string' ? ` of job ${jobId}` : ''}`;
}

async function watch(context: CommandContext, _options: object, jobId: string): Promise<ExitCode> {
  const { watchToEnd } = await import('../watch.ts');
  return await connected(
    context,
    (requestor, signal) => watchToEnd(context, requestor, jobId, signal),
    `stopped watching; the job goes on: "millrace job watch ${jobId}", "millrace job cancel ${jobId}"`,
  );
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
