/** How a command of the program is bound to the code that does it. */
import type { Requestor } from '@millrace/dispatch/client';
import { MillraceError } from '@millrace/runner';
import type { Command } from 'commander';
import type { ExitCode } from './exit-codes.ts';
import { Output, type CommandContext, type GlobalOptions, type Io } from './io.ts';

/** One call of the program: what it may touch, and the exit code its command found. */
export interface Session {
  readonly io: Io;
  exitCode: ExitCode;
  /** Made by the command that runs; an error is reported through it. */
  out: Output;
}

/**
 * An action for commander that runs `work` with the command's positional arguments and all its options, and keeps its
 * exit code. Errors pass through to the program, which prints them.
 */
export function action(
  session: Session,
  // What commander hands over is untyped; each command says what its own declaration gives.
  work: (context: CommandContext, options: never, ...args: never[]) => Promise<ExitCode>,
): (...all: unknown[]) => Promise<void> {
  return async (...all) => {
    const command = all.at(-1) as Command;
    const options: GlobalOptions = command.optsWithGlobals();
    session.out = new Output(session.io, options.json === true);
    const context: CommandContext = { io: session.io, out: session.out, options };
    session.exitCode = await work(context, options as never, ...(all.slice(0, -2) as never[]));
  };
}

/**
 * Works with the dispatcher the options name. A stop request aborts `signal` with `canceled` and these words.
 *
 * @throws MillraceError `unavailable` no dispatcher known or reached, `unauthenticated` no or the wrong token
 */
export async function connected<T>(
  context: CommandContext,
  work: (requestor: Requestor, signal: AbortSignal) => Promise<T>,
  interrupted = 'interrupted',
): Promise<T> {
  const { resolveAddress, withRequestor } = await import('./connection.ts');
  const address = await resolveAddress(context);
  return await withRequestor(address, async (requestor) => {
    const stop = new AbortController();
    using _ = context.io.onStop(() => stop.abort(new MillraceError('canceled', interrupted)));
    return await work(requestor, stop.signal);
  });
}

/** Collects an option that may be given more than once. */
export function repeatable(value: string, previous: readonly string[] | undefined): string[] {
  return [...(previous ?? []), value];
}

/** Help text for the end of a command's help: what it is like to use it. */
export function examples(lines: readonly (readonly [command: string, remark: string])[]): string {
  return `\nExamples:\n${lines.map(([command, remark]) => `  $ ${command}\n      ${remark}`).join('\n')}\n`;
}
