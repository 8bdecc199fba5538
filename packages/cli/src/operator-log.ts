/** Logs of the dispatcher and the node in this process. */
import { Writable } from 'node:stream';
import { createLogger, logLevelOf } from '@millrace/node';
import type { Logger } from '@millrace/runner';
import { terminalFeatures } from './terminal.ts';
import type { Io } from './io.ts';

/**
 * For programs that stay: `LOG_LEVEL` and `LOG_FORMAT` as for a node, where text is the default on a terminal.
 * Written to stderr.
 */
export function operatorLogger(io: Io, secrets: readonly string[] = []): Logger {
  const format = io.env['LOG_FORMAT']?.trim().toLowerCase();
  return createLogger({
    format: format === 'text' || (!format && terminalFeatures(io.stderr, io.env).live) ? 'text' : 'json',
    level: logLevelOf(io.env['LOG_LEVEL'] ?? '') ?? 'info',
    secrets,
  });
}

/**
 * For one job on a screen that shows its progress, line by line to `print`: errors of the system only, since what happens
 * to the job, failures included, is told from its events. `MILLRACE_DEBUG` shows everything.
 */
export function quietLogger(io: Io, print: (line: string) => void): Logger {
  const debugging = Boolean(io.env['MILLRACE_DEBUG']);
  return createLogger({
    format: 'text',
    level: debugging ? 'debug' : 'error',
    destination: new Writable({
      decodeStrings: false,
      write(line: string, _encoding, done) {
        print(line.trimEnd());
        done();
      },
    }),
  });
}
