/** `millrace job explain`: why a task or job stands where it does, in words. */
import type { Command } from 'commander';
import type { JobExplanation, TaskExplanation } from '@millrace/dispatch/client';
import { MillraceError } from '@millrace/runner';
import { action, connected, examples, type Session } from '../command.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import type { taskName as nameOfTask } from '../progress.ts';
import type { Paint } from '../terminal.ts';
import { oneLine } from '../text-width.ts';
import { formatDuration, formatTime } from '../units.ts';

/** Names of tasks listed for what they have in common. */
const LISTED = 5;

export function registerJobExplain(job: Command, session: Session): void {
  job
    .command('explain')
    .description(
      'why a task is not running, how it is doing, or how it ended; for a job, all that has not ended',
    )
    .argument('<id>', 'of a task or a job')
    .addHelpText(
      'after',
      examples([
        ['millrace job explain 6f9619ff-8b86-4d01-b42d-00cf4fc964ff', 'what each of its tasks waits for'],
        [
          'millrace job explain 0190a5f0-0c4e-7d3c-9f6a-1b2c3d4e5f60 --json',
          'one task: codes and numbers for a script',
        ],
      ]),
    )
    .action(action(session, explain));
}

async function explain(context: CommandContext, _options: object, id: string): Promise<ExitCode> {
  const { io, out } = context;
  const { taskName } = await import('../progress.ts');
  const told = await connected(context, async (requestor, signal) => {
    try {
      return await requestor.explainTask(id, { signal });
    } catch (error) {
      if (!MillraceError.is(error) || error.code !== 'not_found') throw error;
    }
    try {
      return await requestor.explainJob(id, { signal });
    } catch (error) {
      if (!MillraceError.is(error) || error.code !== 'not_found') throw error;
      throw new MillraceError('not_found', `there is no task and no job ${id}`);
    }
  });
  out.result(told, () =>
    'task_id' in told ? taskLines(told, taskName, out.paint, io.now()) : jobLines(told, taskName, out.paint),
  );
  return EXIT.done;
}

function taskLines(
  told: TaskExplanation,
  taskName: typeof nameOfTask,
  paint: Paint,
  nowMs: number,
): string[] {
  const lines = [
    `${paint.bold(taskName(told))}  ${told.status}  ${paint.dim(oneLine(told.capability))}`,
    ...told.reasons.map(({ message }) => `  ${oneLine(message)}`),
  ];
  if (told.attempts.length > 0) {
    lines.push('', paint.dim('attempts that ended'));
    for (const { attempt, outcome, name, reason, leased_at, ended_at } of told.attempts) {
      const took = formatDuration(Date.parse(ended_at) - Date.parse(leased_at));
      lines.push(
        `  ${attempt}  ${formatTime(leased_at, nowMs)}  ${outcome} after ${took} on ${oneLine(name)}${reason === null ? '' : `: ${oneLine(reason)}`}`,
      );
    }
    lines.push('', paint.dim(`"millrace job logs ${told.task_id}" shows what they said`));
  }
  return lines;
}

function jobLines(told: JobExplanation, taskName: typeof nameOfTask, paint: Paint): string[] {
  const lines = [`${paint.bold(oneLine(told.label))}  ${told.status}`, `  ${oneLine(told.message)}`];
  for (const { reason, more, count, tasks } of told.groups) {
    const names = tasks.slice(0, LISTED).map((task) => taskName(task));
    const others = count - names.length;
    lines.push(
      '',
      `${paint.bold(`${count} ${count === 1 ? 'task' : 'tasks'}`)}  ${names.join(', ')}${others > 0 ? ` and ${others} more` : ''}`,
      ...[reason, ...more].map(({ message }) => `  ${oneLine(message)}`),
    );
    const [first] = tasks;
    if (count > 1 && first !== undefined) {
      lines.push(paint.dim(`  "millrace job explain ${first.task_id}" says more about ${taskName(first)}`));
    }
  }
  return lines;
}
