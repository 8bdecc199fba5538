#!/usr/bin/env node
/** The process around the program: arguments, environment, streams, signals, exit code. Nothing else reads them. */
import type { Io } from './io.ts';
import { EXIT, type ExitCode } from './exit-codes.ts';
import { runProgram } from './program.ts';
import type { TextOut } from './terminal.ts';

/**
 * Progress and remarks. Where they cannot be written (a log on a full disk, a reader that left, a closed descriptor), the
 * work goes on without them. To files Node writes at once, and throws.
 */
const remarks: TextOut = {
  write(text) {
    try {
      return process.stderr.write(text);
    } catch {
      return false;
    }
  },
  get isTTY() {
    return process.stderr.isTTY;
  },
  get columns() {
    return process.stderr.columns;
  },
  get rows() {
    return process.stderr.rows;
  },
};
process.stderr.on('error', () => {});

const stopListeners: (() => void)[] = [];

const io: Io = {
  env: process.env,
  cwd: process.cwd(),
  pid: process.pid,
  stdin: process.stdin,
  stdout: process.stdout,
  stderr: remarks,
  now: () => Date.now(),
  onStop(listener) {
    stopListeners.push(listener);
    return {
      [Symbol.dispose]() {
        const index = stopListeners.lastIndexOf(listener);
        if (index >= 0) stopListeners.splice(index, 1);
      },
    };
  },
};

for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
  process.on(signal, () => {
    const listener = stopListeners.at(-1);
    if (listener === undefined) process.exit(EXIT.canceled);
    listener();
  });
}

/** Null while the command runs. */
let code: ExitCode | null = null;

process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  // The reader has seen enough (`millrace jobs | head -1`): nobody is left to tell.
  if (error.code === 'EPIPE') process.exit(code ?? EXIT.done);
  throw error;
});

process.on('uncaughtException', (error) => {
  // A bug of the program; what it was in the middle of cannot be trusted any more.
  const text = process.env['MILLRACE_DEBUG']
    ? error.stack
    : `${error.message} (MILLRACE_DEBUG=1 shows where)`;
  remarks.write(`millrace: internal error: ${text ?? error.message}\n`);
  process.exit(EXIT.failed);
});

code = await runProgram(io, process.argv.slice(2));
// Commands close what they open. Leaving by `exit` keeps one idle keep-alive socket from holding the shell's prompt,
// and it must wait for the pipe to take what was printed.
await Promise.all([process.stdout, process.stderr].map(flushed));
process.exit(code);

function flushed(stream: NodeJS.WriteStream): Promise<void> {
  return new Promise((done) => {
    try {
      stream.write('', () => done());
    } catch {
      done();
    }
  });
}
