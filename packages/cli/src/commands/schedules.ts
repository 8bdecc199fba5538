/** `millrace schedules`: jobs that are submitted at set times; `add` and `remove` them. */
import type { Command } from 'commander';
import { MillraceError } from '@millrace/runner';
import { action, connected, examples, repeatable, type Session } from '../command.ts';
import { resolveDataDir } from '../data-dir.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import { oneLine, table } from '../text-width.ts';
import { formatTime } from '../units.ts';

interface AddOptions {
  readonly timeZone: string;
  readonly catchUp: string;
  readonly overlap: string;
  readonly replace?: boolean;
  readonly input?: readonly string[];
}

interface RemoveOptions {
  readonly domain?: string;
}

export function registerSchedules(program: Command, session: Session): void {
  const schedules = program
    .command('schedules')
    .description('jobs that are submitted at set times')
    .addHelpText(
      'after',
      examples([['millrace schedules', 'when each is due next, and how it went last time']]),
    )
    .action(action(session, list));
  schedules
    .command('list', { hidden: true })
    .description('the same as "millrace schedules"')
    .action(action(session, list));
  schedules
    .command('add')
    .description('submit a job file at the times of a cron expression, from now on')
    .argument('<name>', 'letters, digits, dots, underscores and hyphens; unique in the domain of the job')
    .argument('<cron>', 'five fields: minute, hour, day of month, month, day of week')
    .argument('<job>', 'a .yaml, .yml or .json file; - is stdin')
    .option('--time-zone <name>', 'the zone of the times, such as Europe/Berlin', 'UTC')
    .option(
      '--catch-up <policy>',
      'of ticks that no dispatcher was there for: skip them, or submit for the last one',
      'skip',
    )
    .option(
      '--overlap <policy>',
      'while the job before has not ended: allow another, or skip the tick',
      'allow',
    )
    .option('--replace', 'a schedule of the same name goes')
    .option('--input <name=file>', 'the file for "input:name" in inputs_cids; repeatable', repeatable)
    .addHelpText(
      'after',
      examples([
        [
          'millrace schedules add nightly "30 2 * * *" report.yaml --time-zone Europe/Berlin',
          'every night; inputs are uploaded now, once',
        ],
        [
          'millrace schedules add poll "*/5 * * * *" poll.yaml --overlap skip --replace',
          'never two at once; takes the place of an earlier "poll"',
        ],
      ]),
    )
    .action(action(session, add));
  schedules
    .command('remove')
    .description('submit no more jobs of it; those it has submitted go on')
    .argument('<name>')
    .option('--domain <id>', 'of the schedule (default: the domain of jobs that name none)')
    .addHelpText('after', examples([['millrace schedules remove nightly', 'from now on']]))
    .action(action(session, remove));
}

async function list(context: CommandContext): Promise<ExitCode> {
  const { io, out } = context;
  const schedules = await connected(context, (requestor, signal) => requestor.schedules({ signal }));
  out.result({ schedules }, () => {
    if (schedules.length === 0) {
      return ['no schedules yet; "millrace schedules add NAME CRON job.yaml" makes one'];
    }
    return table(
      [
        { title: 'NAME' },
        { title: 'CRON' },
        { title: 'ZONE' },
        { title: 'NEXT' },
        { title: 'LAST' },
        { title: 'JOB' },
      ],
      schedules.map((each) => [
        each.name,
        each.cron,
        each.time_zone,
        each.next_at === null ? 'never' : formatTime(each.next_at, io.now()),
        each.last_tick_at === null ? '-' : `${formatTime(each.last_tick_at, io.now())} ${each.last_outcome}`,
        each.last_job_id ?? oneLine(each.label),
      ]),
      out.paint.dim,
    );
  });
  return EXIT.done;
}

async function add(
  context: CommandContext,
  options: AddOptions,
  name: string,
  cron: string,
  file: string,
): Promise<ExitCode> {
  const { io, out } = context;
  const catch_up = oneOf(options.catchUp, '--catch-up', ['skip', 'one'] as const);
  const overlap = oneOf(options.overlap, '--overlap', ['allow', 'skip'] as const);
  const [{ readJobFile, parseNamedInputs, checkInputs }, { buildComputes, prepareJob }] = await Promise.all([
    import('../job-file.ts'),
    import('../submission.ts'),
  ]);
  const named = parseNamedInputs(options.input ?? [], io.cwd);
  const job = await readJobFile(file, io.cwd, io.stdin);
  // Nothing that is wrong on this machine should need a dispatcher to be found.
  await checkInputs(job, named, file === '-');
  const built = await buildComputes(job);
  const schedule = await connected(context, async (requestor, signal) =>
    requestor.addSchedule(
      {
        name,
        cron,
        time_zone: options.timeZone,
        catch_up,
        overlap,
        ...(options.replace === true && { replace: true }),
        job: await prepareJob(io, requestor, built, named, { signal, dataDir: resolveDataDir(context) }),
      },
      { signal },
    ),
  );
  out.result(schedule, () => [
    schedule.next_at === null
      ? `schedule ${schedule.name} is kept; it has no ticks left`
      : `schedule ${schedule.name} is kept; first at ${schedule.next_at}`,
  ]);
  return EXIT.done;
}

async function remove(context: CommandContext, options: RemoveOptions, name: string): Promise<ExitCode> {
  const { out } = context;
  await connected(context, (requestor, signal) =>
    requestor.removeSchedule(name, {
      signal,
      ...(options.domain !== undefined && { domainId: options.domain }),
    }),
  );
  out.result({ removed: name }, () => [`schedule ${name} is removed`]);
  return EXIT.done;
}

function oneOf<T extends string>(text: string, option: string, values: readonly T[]): T {
  const value = values.find((each) => each === text);
  if (value !== undefined) return value;
  throw new MillraceError(
    'invalid_argument',
    `${option} must be ${values.join(' or ')}, got ${JSON.stringify(text)}`,
  );
}
