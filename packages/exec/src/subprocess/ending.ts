/** From how a program ended, and what was seen meanwhile, to the task's verdict. */
import { constants } from 'node:os';
import { MillraceError, TaskAbort } from '@millrace/runner';
import type { Exit } from '../process/child.ts';
import type { SubprocessLimits } from './limits.ts';

/** Why the runner ended the program. The first one counts. */
export type StopCause =
  | { readonly kind: 'abort'; readonly abort: TaskAbort }
  /** Something else the task depends on has failed, such as reading its stdin from the domain server. */
  | { readonly kind: 'failure'; readonly error: unknown }
  | {
      readonly kind: 'limit';
      readonly limit: 'wallMs' | 'cpuMs' | 'memoryBytes' | 'diskBytes' | 'processes';
      readonly value: number;
      readonly used: number;
    };

export interface Ending {
  /** For messages. */
  readonly program: string;
  readonly cause: StopCause | null;
  readonly exit: NormalExit;
  /** False: what ended was the sandbox, before the program began. */
  readonly started: boolean;
  readonly limits: SubprocessLimits;
  readonly cpuMs: number;
  /** The kernel says that it killed a process of the program for memory: by its control group, or on the whole machine. */
  readonly outOfMemory: 'cgroup' | 'kernel' | null;
  readonly processesRefused: boolean;
  readonly failOnNonZero: boolean;
  /** The last line of its stderr. */
  readonly lastWords: string | null;
}

export interface NormalExit {
  readonly code: number | null;
  readonly signal: string | null;
}

// Some have two names; the first one, such as SIGABRT, is the common one.
const SIGNALS = new Map(
  Object.entries(constants.signals)
    .reverse()
    .map(([name, number]): [number, string] => [number, name]),
);

/** Inside of a namespace an ending by a signal arrives as an exit code of 128 and its number, as in a shell. */
export function normalExit(exit: Exit, signalsAsCodes: boolean): NormalExit {
  const named = signalsAsCodes && exit.code !== null ? SIGNALS.get(exit.code - 128) : undefined;
  return named === undefined ? exit : { code: null, signal: named };
}

/** What `run` rejects with; null when the program did its work. */
export function verdict(ending: Ending): MillraceError | TaskAbort | null {
  const { program, cause, exit, limits } = ending;
  if (cause?.kind === 'abort') return cause.abort;
  if (cause?.kind === 'failure') {
    return TaskAbort.is(cause.error) ? cause.error : MillraceError.from(cause.error);
  }
  if (cause?.kind === 'limit') return limitReached(ending, cause.limit, cause.value, cause.used);
  if (!ending.started) {
    return new MillraceError(
      'failed_precondition',
      `the sandbox of ${program} could not be set up: ${ending.lastWords ?? describeExit(exit)}`,
      { details: { ending: 'sandbox_failed', exit_code: exit.code, signal: exit.signal } },
    );
  }
  const fine = exit.code === 0 || !ending.failOnNonZero;
  if (fine) return null;
  if (ending.outOfMemory === 'cgroup') {
    return limitReached(ending, 'memoryBytes', limits.memoryBytes, null, 'cgroup');
  }
  if (exit.signal === 'SIGXCPU' || (exit.signal === 'SIGKILL' && ending.cpuMs >= limits.cpuMs)) {
    return limitReached(ending, 'cpuMs', limits.cpuMs, null);
  }
  if (exit.signal === 'SIGXFSZ') return limitReached(ending, 'diskBytes', limits.diskBytes, null);
  if (exit.signal === 'SIGKILL' && ending.outOfMemory === 'kernel') {
    return new MillraceError(
      'resource_exhausted',
      `${program} was killed by the kernel because the machine is out of memory; run fewer tasks at once, or lower memoryBytes`,
      { details: { ending: 'out_of_memory', evidence: 'kernel', exit_code: null, signal: exit.signal } },
    );
  }
  const said = ending.lastWords === null ? '' : `: ${ending.lastWords}`;
  const hint = ending.processesRefused ? ` (it was refused more than ${limits.processes} processes)` : '';
  return new MillraceError('internal', `${program} ${describeExit(exit)}${hint}${said}`, {
    details: {
      ending: exit.signal === null ? 'exit' : 'signal',
      exit_code: exit.code,
      signal: exit.signal,
      ...(ending.processesRefused ? { limit: 'processes', value: limits.processes } : {}),
    },
  });
}

const LIMITED = {
  wallMs: 'wall time',
  cpuMs: 'CPU time',
  memoryBytes: 'memory',
  diskBytes: 'disk space',
} as const;

function limitReached(
  { program, exit }: Ending,
  limit: keyof typeof LIMITED | 'processes',
  value: number,
  used: number | null,
  evidence: 'watched' | 'cgroup' = 'watched',
): MillraceError {
  const amount =
    limit === 'processes'
      ? `${value} processes and threads`
      : `${value} ${limit.endsWith('Ms') ? 'ms' : 'bytes'} of ${LIMITED[limit]}`;
  const reached = used === null || limit === 'wallMs' ? '' : `, it used ${Math.round(used)}`;
  return new MillraceError(
    limit === 'wallMs' ? 'deadline_exceeded' : 'resource_exhausted',
    `${program} reached its limit of ${amount} (${limit})${reached}`,
    {
      details: {
        ending: limit === 'memoryBytes' ? 'out_of_memory' : 'limit',
        limit,
        value,
        ...(limit === 'memoryBytes' ? { evidence } : {}),
        exit_code: exit.code,
        signal: exit.signal,
      },
    },
  );
}

function describeExit({ code, signal }: NormalExit): string {
  return signal === null ? `ended with exit code ${code}` : `was ended by ${signal}`;
}
