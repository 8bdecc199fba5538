/** From how a container ended, and what was seen meanwhile, to the task's verdict. */
import { MillraceError } from '@millrace/runner';
import type { TaskAbort } from '@millrace/runner';
import type { NormalExit } from '../subprocess/ending.ts';
import type { ContainerLimits } from './limits.ts';

/** Why the runner ended the container. The first one counts. */
export type StopCause =
  | { readonly kind: 'abort'; readonly abort: TaskAbort }
  /** The engine went away, or lost the container. */
  | { readonly kind: 'lost'; readonly error: unknown }
  | {
      readonly kind: 'limit';
      readonly limit: 'wallMs' | 'diskBytes';
      readonly value: number;
      readonly used: number;
    };

/**
 * What tells that the kernel killed for the memory limit:
 *
 * - `engine` the engine's own flag
 * - `cgroup` the counter of the container's control group
 * - `kernel` SIGKILL that the runner did not send, while this machine's counter of such kills rose
 * - `status` SIGKILL that the runner did not send; no counters could be read
 */
export type MemoryEvidence = 'engine' | 'cgroup' | 'kernel' | 'status';

export interface Ending {
  readonly image: string;
  readonly cause: StopCause | null;
  /** Null when it was not seen. */
  readonly exit: NormalExit | null;
  readonly limits: ContainerLimits;
  readonly oomKilled: boolean;
  readonly groupOutOfMemory: boolean;
  /** How often this machine's kernel killed for memory meanwhile. Null when the container runs elsewhere. */
  readonly kernelKills: number | null;
  readonly peakBytes: number | null;
  readonly processesRefused: boolean;
  readonly failOnNonZero: boolean;
  /** The last line of its stderr. */
  readonly lastWords: string | null;
}

/** What `run` rejects with; null when the program did its work. */
export function verdict(ending: Ending): MillraceError | TaskAbort | null {
  const { image, cause, limits } = ending;
  const exit = ending.exit ?? { code: null, signal: null };
  const facts = { exit_code: exit.code, signal: exit.signal };
  if (cause?.kind === 'abort') return cause.abort;
  if (cause?.kind === 'lost') return engineLost(image, cause.error);
  if (cause?.kind === 'limit') return limitReached(image, cause.limit, cause.value, cause.used, facts);
  if (exit.code === 0 || !ending.failOnNonZero) return null;
  const evidence = memoryEvidence(ending);
  if (evidence !== null) return outOfMemory(ending, evidence, facts);
  if (exit.signal === 'SIGXFSZ') return limitReached(image, 'diskBytes', limits.diskBytes, null, facts);
  const said = ending.lastWords === null ? '' : `: ${ending.lastWords}`;
  const hint = ending.processesRefused ? ` (it was refused more than ${limits.pids} processes)` : '';
  const how = exit.signal === null ? `ended with exit code ${exit.code}` : `was ended by ${exit.signal}`;
  return new MillraceError('internal', `the program of ${image} ${how}${hint}${said}`, {
    details: {
      ending: exit.signal === null ? 'exit' : 'signal',
      ...facts,
      ...(ending.processesRefused ? { limit: 'pids', value: limits.pids } : {}),
    },
  });
}

/** The engine went away before it told of the end. */
export function engineLost(image: string, cause: unknown): MillraceError {
  return new MillraceError('unavailable', `the container engine was lost while ${image} ran`, {
    cause,
    details: { ending: 'lost', exit_code: null, signal: null },
  });
}

function memoryEvidence({ exit, oomKilled, groupOutOfMemory, kernelKills }: Ending): MemoryEvidence | null {
  if (oomKilled) return 'engine';
  if (groupOutOfMemory) return 'cgroup';
  // Inside of a container the first process cannot be killed by the others, so this came from the kernel or an operator.
  if (exit?.signal !== 'SIGKILL') return null;
  if (kernelKills === null) return 'status';
  return kernelKills > 0 ? 'kernel' : null;
}

const EVIDENCE: Readonly<Record<MemoryEvidence, string>> = {
  engine: 'the engine says so',
  cgroup: 'its control group counted the kill',
  kernel: 'it was ended by SIGKILL while the kernel counted a kill for memory',
  status: 'it was ended by SIGKILL, which this node did not send; no counter could be read to confirm it',
};

function outOfMemory(
  { image, limits, peakBytes }: Ending,
  evidence: MemoryEvidence,
  facts: Readonly<Record<string, unknown>>,
): MillraceError {
  const seen = peakBytes === null ? '' : `, ${Math.round(peakBytes / 1024 ** 2)} MiB were seen`;
  return new MillraceError(
    'resource_exhausted',
    `the program of ${image} reached its limit of ${limits.memoryMiB} MiB of memory (memoryMiB): ${EVIDENCE[evidence]}${seen}`,
    { details: { ending: 'out_of_memory', limit: 'memoryMiB', value: limits.memoryMiB, evidence, ...facts } },
  );
}

function limitReached(
  image: string,
  limit: 'wallMs' | 'diskBytes',
  value: number,
  used: number | null,
  facts: Readonly<Record<string, unknown>>,
): MillraceError {
  const wall = limit === 'wallMs';
  const reached = used === null || wall ? '' : `, it used ${used}`;
  return new MillraceError(
    wall ? 'deadline_exceeded' : 'resource_exhausted',
    `the program of ${image} reached its limit of ${value} ${wall ? 'ms of wall time' : 'bytes of disk space'} (${limit})${reached}`,
    { details: { ending: 'limit', limit, value, ...facts } },
  );
}
