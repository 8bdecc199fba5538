/** `millrace doctor`: looks at everything the program needs and says what to do about what is missing. */
import type { Command } from 'commander';
import { action, examples, type Session } from '../command.ts';
import { EXIT, type ExitCode } from '../exit-codes.ts';
import type { CommandContext } from '../io.ts';
import { padWidth } from '../text-width.ts';

interface DoctorOptions {
  readonly config?: string;
  readonly runner?: readonly string[];
}

export function registerDoctor(program: Command, session: Session): void {
  program
    .command('doctor')
    .description('check this machine, the dispatcher, the configuration and the runners')
    .option('--config <file>', 'config file (default: millrace.config.* here, if any)')
    .addHelpText(
      'after',
      examples([
        ['millrace doctor', 'each line is ok, warn or fail, with what to do; exit code 2 when one fails'],
        ['millrace doctor --url http://10.0.0.5:7070', 'against a dispatcher elsewhere'],
      ]),
    )
    .action(action(session, doctor));
}

async function doctor(context: CommandContext, options: DoctorOptions): Promise<ExitCode> {
  const { out } = context;
  const { examine } = await import('../checks.ts');
  const checks = [];
  for await (const check of examine(context, options.config)) {
    checks.push(check);
    if (out.json) continue;
    const color = { ok: out.paint.green, warn: out.paint.yellow, fail: out.paint.red }[check.state];
    context.io.stdout.write(
      `${color(padWidth(check.state, 4))}  ${padWidth(check.name, 13)}  ${check.finding}\n`,
    );
    if (check.todo !== null) context.io.stdout.write(`${' '.repeat(21)}${out.paint.dim(check.todo)}\n`);
  }
  const failed = checks.some((check) => check.state === 'fail');
  if (out.json) out.document({ ok: !failed, checks });
  return failed ? EXIT.usage : EXIT.done;
}
