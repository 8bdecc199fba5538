/**
 * What the programs of this folder share: real processes over the packages as an embedder uses them, because the command
 * line has neither leases that are over in a second nor a clock that can be set.
 */
import { systemClock, type Clock, type JsonObject, type Logger, type LogLevel } from '@millrace/runner';

/** Said over the channel to a program: its time of day is set to another one. */
export interface SetClock {
  readonly clockOffsetMs: number;
}

/** The settings a program was started with. It ends with the process that started it. */
export function settings(): unknown {
  process.once('disconnect', () => process.exit(1));
  return JSON.parse(process.argv[2] ?? '{}');
}

/** Lines of JSON on stderr, without loading what a node's logger needs: these programs are started often. */
export function jsonLog(bound: JsonObject = {}): Logger {
  const line =
    (level: LogLevel) =>
    (msg: string, fields: JsonObject = {}): void =>
      void process.stderr.write(`${JSON.stringify({ level, ...bound, ...fields, msg })}\n`);
  return {
    debug: () => undefined,
    info: line('info'),
    warn: line('warn'),
    error: line('error'),
    child: (fields) => jsonLog({ ...bound, ...fields }),
  };
}

/** The machine's clock, off by so much, and by what is said later. */
export function wrongClock(offsetMs: number): Clock {
  let offset = offsetMs;
  process.on('message', (message: SetClock) => {
    offset = message.clockOffsetMs;
  });
  return { ...systemClock, now: () => systemClock.now() + offset };
}
