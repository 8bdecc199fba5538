/**
 * The tree of commands, and the one place where an error becomes words and an exit code. Commands load what they need
 * when they run, so that `millrace --help` and a typing error answer at once.
 */
import { MillraceError, describeError } from '@millrace/runner';
import { Command, CommanderError } from 'commander';
import type { Session } from './command.ts';
import { registerCompute } from './commands/compute.ts';
import { registerDead } from './commands/dead.ts';
import { registerDispatch } from './commands/dispatch.ts';
import { registerDoctor } from './commands/doctor.ts';
import { registerDomains } from './commands/domains.ts';
import { registerGet } from './commands/get.ts';
import { registerJobs } from './commands/jobs.ts';
import { registerNode } from './commands/node.ts';
import { registerNodes } from './commands/nodes.ts';
import { registerQueues } from './commands/queues.ts';
import { registerRun } from './commands/run.ts';
import { registerRuntime } from './commands/runtime.ts';
import { registerSchedules } from './commands/schedules.ts';
import { registerSubmit } from './commands/submit.ts';
import { registerUp } from './commands/up.ts';
import { EXIT, exitCodeOf, type ExitCode } from './exit-codes.ts';
import { Output, type Io } from './io.ts';
import { paint, terminalFeatures } from './terminal.ts';
import { oneLine } from './text-width.ts';
import { programVersion } from './version.ts';

/** Parses `argv` (without the interpreter and the script), runs the command, and resolves with its exit code. */
export async function runProgram(io: Io, argv: readonly string[]): Promise<ExitCode> {
  const session: Session = {
    io,
    exitCode: EXIT.done,
    // Until a command has parsed its options, this is all there is to go by.
    out: new Output(io, argv.includes('--json')),
  };
  const program = buildProgram(session);
  try {
    await program.parseAsync([...argv], { from: 'user' });
    return session.exitCode;
  } catch (error) {
    return report(session, error, commandPath(program, argv));
  }
}

function buildProgram(session: Session): Command {
  const program = new Command('millrace');
  program
    .description('Submit work, run a dispatcher, run a compute node.')
    .usage('<command> [options]')
    .version(programVersion(), '-V, --version', 'print the version')
    .option('--json', 'print exactly one JSON document on stdout, nothing else there')
    .option('--url <url>', 'the dispatcher (default: MILLRACE_URL, else the one running on this data folder)')
    .option('--token <token>', 'client token (default: MILLRACE_TOKEN, else the one in the data folder)')
    .option('--data <dir>', 'data folder (default: MILLRACE_DATA, else ~/.local/share/millrace)')
    .helpCommand('help [command]', 'show help for a command')
    .helpOption('-h, --help', 'show help')
    .configureHelp({
      showGlobalOptions: true,
      helpWidth: terminalFeatures(session.io.stdout, session.io.env).width(),
    })
    .configureOutput({
      writeOut: (text) => void session.io.stdout.write(text),
      // Errors are printed by `report`, once, in the program's own form; what is left here is help after a mistake.
      writeErr: (text) => void session.io.stderr.write(text),
      outputError: () => {},
    })
    .exitOverride()
    .addHelpText('after', HELP_END);
  registerUp(program, session);
  registerRun(program, session);
  registerSubmit(program, session);
  registerJobs(program, session);
  registerDead(program, session);
  registerSchedules(program, session);
  registerGet(program, session);
  registerQueues(program, session);
  registerDomains(program, session);
  registerNodes(program, session);
  registerNode(program, session);
  registerDispatch(program, session);
  registerCompute(program, session);
  registerRuntime(program, session);
  registerDoctor(program, session);
  return program;
}

const HELP_END = `
Start here:
  $ millrace run ./my-runner.ts --input photo.jpg     one job, start to finish, on this machine
  $ millrace up ./my-runner.ts                        a dispatcher and a node that stay
  $ millrace submit job.yaml --watch                  give it work

Exit codes: 0 done, 1 the job failed, 2 wrong usage or configuration, 3 canceled, 4 unreachable or unauthorised.
`;

/** The words of the command that was meant, as far as they name one: `millrace job watch`. */
function commandPath(program: Command, argv: readonly string[]): string {
  let command = program;
  const words = [program.name()];
  for (const word of argv) {
    const next = command.commands.find((each) => each.name() === word);
    if (next === undefined) continue;
    command = next;
    words.push(word);
  }
  return words.join(' ');
}

function report(session: Session, error: unknown, command: string): ExitCode {
  if (error instanceof CommanderError) {
    if (error.exitCode === 0) return EXIT.done;
    // A command group without its command: commander has shown the help.
    const message =
      error.code === 'commander.help'
        ? 'no command given'
        : error.message
            .replace(/^error: /, '')
            .replace(/\n\(Did/, ' (did')
            .replace(/\.$/, '');
    printError(session, 'invalid_argument', `${message}; see ${command} --help`, error);
    return EXIT.usage;
  }
  const known = MillraceError.from(error);
  printError(session, known.code, describeError(known), error);
  return exitCodeOf(known.code);
}

function printError(session: Session, code: string, message: string, error: unknown): void {
  const { stderr, env } = session.io;
  // A command that has already printed its document (`up --json`) has only stderr left.
  if (session.out.json && !session.out.documentWritten) session.out.document({ error: { code, message } });
  else {
    const style = paint(terminalFeatures(stderr, env).color);
    stderr.write(`${style.red('millrace:')} ${message.split('\n').map(oneLine).join('\n  ')}\n`);
  }
  if (env['MILLRACE_DEBUG'] && error instanceof Error && error.stack !== undefined) {
    for (let each: unknown = error; each instanceof Error; each = each.cause)
      stderr.write(`${each.stack ?? each.message}\n`);
  }
}
