/** `millrace dead`: tasks that failed for good. `millrace job redrive`: what a job left undone, again. */
import type { Command } from 'commander';
import type { Requestor } from '@millrace/dispatch/client';
import { MillraceError } from '@millrace/runner';
import { action, connected, examples, type Session } from '../command.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import { oneLine, table } from '../text-width.ts';
import { formatTime, parseInteger } from '../units.ts';

interface DeadOptions {
  readonly capability?: string;
  readonly job?: string;
  readonly limit: string;
}

interface RedriveOptions {
  readonly watch?: boolean;
  readonly idempotencyKey?: string;
}

export function registerDead(program: Command, session: Session): void {
  program
    .command('dead')
    .description('list tasks that failed for good, those of the newest job first')
    .option('--capability <name>', 'only those of this capability')
    .option('--job <id>', 'only those of this job')
    .option('--limit <n>', 'how many, 1 to 1000', '20')
    .addHelpText(
      'after',
      examples([
        ['millrace dead --capability /examples/resize/v1', 'what became of them, and in which jobs'],
        [
          'millrace dead --json | jq -r ".tasks[].job_id" | uniq | xargs -n1 millrace job redrive',
          'all of their jobs again',
        ],
      ]),
    )
    .action(action(session, list));
}

export function registerJobRedrive(job: Command, session: Session): void {
  job
    .command('redrive')
    .description('a new job of what a failed or canceled job left undone; what completed stays done')
    .argument('<job-id>')
    .option('--watch', 'follow the new job to its end and exit with its result')
    .option('--idempotency-key <key>', 'another time than before; without it a job is redriven once')
    .addHelpText(
      'after',
      examples([
        [
          'millrace job redrive 6f9619ff-8b86-4d01-b42d-00cf4fc964ff --watch',
          'its failed tasks with fresh attempts, and those that waited for them',
        ],
      ]),
    )
    .action(action(session, redrive));
}

async function list(context: CommandContext, options: DeadOptions): Promise<ExitCode> {
  const { io, out } = context;
  const limit = parseInteger(options.limit, '--limit', 1, 1000);
  const [{ taskName }, tasks] = await Promise.all([
    import('../progress.ts'),
    connected(context, async (requestor, signal) => {
      type Page = Awaited<ReturnType<Requestor['deadTasks']>>;
      const found: Page['items'][number][] = [];
      let cursor: string | null = null;
      do {
        const page: Page = await requestor.deadTasks(
          {
            // The dispatcher gives at most 100 at once.
            limit: Math.min(100, limit - found.length),
            ...(options.capability !== undefined && { capability: options.capability }),
            ...(options.job !== undefined && { jobId: options.job }),
            ...(cursor !== null && { cursor }),
          },
          { signal },
        );
        found.push(...page.items);
        cursor = page.next_cursor;
      } while (cursor !== null && found.length < limit);
      return found;
    }),
  ]);
  out.result({ tasks }, () => {
    if (tasks.length === 0) return ['no task has failed for good'];
    return table(
      [
        { title: 'JOB' },
        { title: 'TASK' },
        { title: 'CAPABILITY' },
        { title: 'FAILED' },
        { title: 'ATTEMPTS', align: 'right' },
        { title: 'WHY' },
      ],
      tasks.map((task) => [
        task.job_id,
        taskName(task),
        oneLine(task.capability),
        formatTime(task.updated_at, io.now()),
        `${task.attempts}/${task.max_attempts}`,
        oneLine(task.reason ?? ''),
      ]),
      out.paint.dim,
    );
  });
  return EXIT.done;
}

async function redrive(context: CommandContext, options: RedriveOptions, jobId: string): Promise<ExitCode> {
  const { out } = context;
  const { watch, idempotencyKey } = options;
  if (idempotencyKey !== undefined && !/^[!-~]{1,128}$/.test(idempotencyKey)) {
    throw new MillraceError(
      'invalid_argument',
      `--idempotency-key must be 1 to 128 visible ASCII characters, got ${JSON.stringify(idempotencyKey)}`,
    );
  }
  return await connected(
    context,
    async (requestor, signal) => {
      const answer = await requestor.redrive(jobId, {
        signal,
        ...(idempotencyKey !== undefined && { idempotencyKey }),
      });
      const count = `${answer.tasks} ${answer.tasks === 1 ? 'task' : 'tasks'}`;
      out.note(answer.created ? `${count} to do again` : `redriven before, as the job that follows`);
      if (!watch) {
        out.result(answer, () => [answer.job_id]);
        return EXIT.done;
      }
      out.note(`job ${answer.job_id}`);
      const { watchToEnd } = await import('../watch.ts');
      return await watchToEnd(context, requestor, answer.job_id, signal);
    },
    'stopped watching; the new job goes on',
  );
}
