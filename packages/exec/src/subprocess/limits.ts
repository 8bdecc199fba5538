/** The limits of one subprocess attempt. */
import { MillraceError } from '@millrace/runner';

/** Every limit is on by default; a breach fails the task with an error that names limit and value. */
export interface SubprocessLimits {
  /** From start to end of the program. Default 24 h. `deadline_exceeded`. */
  readonly wallMs: number;
  /** CPU time of all its processes. Default 24 h. `resource_exhausted`. */
  readonly cpuMs: number;
  /**
   * Resident memory of all its processes. Default 2 GiB. With a control group the kernel holds it there; else it is looked at two to ten
   * times a second, and a process cannot allocate more than twice this and a GiB in between. `resource_exhausted`.
   */
  readonly memoryBytes: number;
  /**
   * Processes and threads at one time. Default 512. More are refused to the program, which may go on without, or fail. In the tiers
   * `none` and `limits` without a control group they are watched, and more are `resource_exhausted`.
   */
  readonly processes: number;
  /** Descriptors per process. Default 1024. More are refused to the program. */
  readonly openFiles: number;
  /** Bytes in its folder, and in one file. Default 10 GiB. `resource_exhausted`. */
  readonly diskBytes: number;
  /** Bytes collected as outputs. Default 10 GiB. `resource_exhausted`. */
  readonly outputBytes: number;
  /** Files collected as outputs. Default 1000. `resource_exhausted`. */
  readonly outputFiles: number;
  /** stdout and stderr kept, in bytes; what was dropped is counted and told once. Default 1 MiB. */
  readonly logBytes: number;
  /** Bytes of progress and events read; what was dropped is counted and told once. Default 16 MiB. */
  readonly eventBytes: number;
  /** From SIGTERM to SIGKILL. Default 5 s; 0 kills at once. */
  readonly graceMs: number;
}

const HOUR_MS = 60 * 60 * 1000;
const MIB = 1024 ** 2;
const GIB = 1024 ** 3;

export const DEFAULT_SUBPROCESS_LIMITS: SubprocessLimits = {
  wallMs: 24 * HOUR_MS,
  cpuMs: 24 * HOUR_MS,
  memoryBytes: 2 * GIB,
  processes: 512,
  openFiles: 1024,
  diskBytes: 10 * GIB,
  outputBytes: 10 * GIB,
  outputFiles: 1000,
  logBytes: MIB,
  eventBytes: 16 * MIB,
  graceMs: 5_000,
};

/** The least that makes sense: below it not even a shell starts. */
const LEAST: SubprocessLimits = {
  wallMs: 1,
  cpuMs: 1,
  memoryBytes: MIB,
  processes: 1,
  openFiles: 16,
  diskBytes: 4096,
  outputBytes: 0,
  outputFiles: 0,
  logBytes: 0,
  eventBytes: 0,
  graceMs: 0,
};

/**
 * The defaults with what is given on top; `from` names it in errors.
 *
 * @throws MillraceError `invalid_argument` for an unknown limit or a value that is no whole number in range.
 */
export function checkLimits(from: string, given: Readonly<Record<string, unknown>>): SubprocessLimits {
  const limits: Record<keyof SubprocessLimits, number> = { ...DEFAULT_SUBPROCESS_LIMITS };
  for (const [name, value] of Object.entries(given)) {
    if (!Object.hasOwn(LEAST, name)) {
      throw new MillraceError(
        'invalid_argument',
        `${from}.${name} is not a limit; there are: ${Object.keys(LEAST).join(', ')}`,
      );
    }
    const key = name as keyof SubprocessLimits;
    if (value === undefined) continue;
    if (!Number.isSafeInteger(value) || (value as number) < LEAST[key]) {
      throw new MillraceError(
        'invalid_argument',
        `${from}.${name} must be a whole number of at least ${LEAST[key]}, got ${JSON.stringify(value)}`,
      );
    }
    limits[key] = value as number;
  }
  return limits;
}

/**
 * What a task asks for, which may only be less than what the operator allows.
 *
 * @throws MillraceError `invalid_argument` as {@link checkLimits}, and for more than is allowed.
 */
export function lowerLimits(
  from: string,
  allowed: SubprocessLimits,
  asked: Readonly<Record<string, unknown>>,
): SubprocessLimits {
  const wanted = checkLimits(from, asked);
  const limits = { ...allowed };
  for (const key of Object.keys(LEAST) as (keyof SubprocessLimits)[]) {
    if (asked[key] === undefined) continue;
    if (wanted[key] > allowed[key]) {
      throw new MillraceError(
        'invalid_argument',
        `${from}.${key} must be at most ${allowed[key]}, which is what this node allows, got ${wanted[key]}`,
      );
    }
    limits[key] = wanted[key];
  }
  return limits;
}
