/** The limits of one container. */
import { MillraceError } from '@millrace/runner';

/** Every limit is on by default; a breach ends the container, and the error names limit and value. */
export interface ContainerLimits {
  /**
   * Memory of all its processes together, in MiB; what it writes to its tmpfs folders counts, and there is no swap. Default 2048.
   * `resource_exhausted`.
   */
  readonly memoryMiB: number;
  /** Processors it may keep busy; parts of one are fine. More than the machine has is refused by the engine. Default 1. */
  readonly cpus: number;
  /** Processes and threads at one time. Default 512. More are refused to the program, which may go on without. */
  readonly pids: number;
  /** From the start of the container to its end. Default 24 h. `deadline_exceeded`. */
  readonly wallMs: number;
  /** Bytes in the folder of outputs while it runs, and in one file anywhere. Default 10 GiB. `resource_exhausted`. */
  readonly diskBytes: number;
  /** Bytes collected as outputs. Default 10 GiB. `resource_exhausted`. */
  readonly outputBytes: number;
  /** Files collected as outputs. Default 1000. `resource_exhausted`. */
  readonly outputFiles: number;
  /** stdout and stderr kept, in bytes; what was dropped is counted and told once. Default 1 MiB. */
  readonly logBytes: number;
  /** Bytes of progress and events read; what was dropped is counted and told once. Default 16 MiB. */
  readonly eventBytes: number;
  /** Descriptors per process. Default 1024. More are refused to the program. */
  readonly nofile: number;
  /**
   * Processes of the container's user on the whole machine, in all containers. Default 0: as the engine has it. Only for an engine
   * that may not raise its own limits, as one inside of a container.
   */
  readonly nproc: number;
  /** From the stop signal to SIGKILL. Default 5 s; 0 kills at once. */
  readonly graceMs: number;
}

const MIB = 1024 ** 2;
const GIB = 1024 ** 3;

export const DEFAULT_CONTAINER_LIMITS: ContainerLimits = {
  memoryMiB: 2048,
  cpus: 1,
  pids: 512,
  wallMs: 24 * 60 * 60 * 1000,
  diskBytes: 10 * GIB,
  outputBytes: 10 * GIB,
  outputFiles: 1000,
  logBytes: MIB,
  eventBytes: 16 * MIB,
  nofile: 1024,
  nproc: 0,
  graceMs: 5_000,
};

/** The least that makes sense. Engines refuse less memory than 6 MiB, and a hundredth of a processor is their unit. */
const LEAST: ContainerLimits = {
  memoryMiB: 6,
  cpus: 0.01,
  pids: 1,
  wallMs: 1,
  diskBytes: 4096,
  outputBytes: 0,
  outputFiles: 0,
  logBytes: 0,
  eventBytes: 0,
  nofile: 16,
  nproc: 0,
  graceMs: 0,
};

/**
 * The defaults with what is given on top; `from` names it in errors.
 *
 * @throws MillraceError `invalid_argument` for an unknown limit or a value out of range
 */
export function checkContainerLimits(from: string, given: unknown): ContainerLimits {
  return withLimits(from, DEFAULT_CONTAINER_LIMITS, given, null);
}

/**
 * What a task asks for, which may only be less than what the operator allows.
 *
 * @throws MillraceError `invalid_argument` as {@link checkContainerLimits}, and for more than is allowed
 */
export function lowerContainerLimits(
  from: string,
  allowed: ContainerLimits,
  asked: unknown,
): ContainerLimits {
  return withLimits(from, allowed, asked, allowed);
}

function withLimits(
  from: string,
  base: ContainerLimits,
  given: unknown,
  most: ContainerLimits | null,
): ContainerLimits {
  if (given === undefined || given === null) return base;
  const refuse = (rule: string): never => {
    throw new MillraceError('invalid_argument', `${from}${rule}`);
  };
  if (typeof given !== 'object' || Array.isArray(given)) return refuse(' must be an object of limits');
  const limits: Record<keyof ContainerLimits, number> = { ...base };
  for (const [name, value] of Object.entries(given as Readonly<Record<string, unknown>>)) {
    if (!Object.hasOwn(LEAST, name))
      refuse(`.${name} is not a limit; there are: ${Object.keys(LEAST).join(', ')}`);
    if (value === undefined) continue;
    const key = name as keyof ContainerLimits;
    const fits = key === 'cpus' ? Number.isFinite(value) : Number.isSafeInteger(value);
    if (typeof value !== 'number' || !fits || value < LEAST[key]) {
      return refuse(
        `.${name} must be a ${key === 'cpus' ? '' : 'whole '}number of at least ${LEAST[key]}, got ${JSON.stringify(value)}`,
      );
    }
    if (most !== null && value > most[key]) {
      return refuse(`.${name} must be at most ${most[key]}, which is what this node allows, got ${value}`);
    }
    limits[key] = value;
  }
  return limits;
}
