/**
 * The few lines of shell that run inside of a sandbox just before the program: they set the kernel's limits, soft and hard alike, so
 * that the program cannot raise them again, and say that everything is in place. Every POSIX system has a shell, so this
 * needs nothing installed, and it costs what `prlimit` would.
 *
 * The program and its arguments are passed as positional parameters and are never read as shell text.
 */
import { readFileSync } from 'node:fs';
import { EVENTS_FD } from '../process/child.ts';
import type { ResourceLimits } from './controls.ts';

/** Written to the events descriptor before the program starts. Without it, what ended was the sandbox and not the program. */
export const ANNOUNCEMENT = 'millrace-sandbox-ready';

/** `ulimit -f` counts in these. */
const BLOCK_BYTES = 512;

/**
 * A hard limit on allocated memory per process, as a backstop between two looks at what is resident. It must leave
 * runtimes room that allocate generously and use little.
 */
function dataBytes(memoryBytes: number): number {
  return 2 * memoryBytes + 1024 ** 3;
}

/**
 * Where all tasks of a user are counted together, one must not be refused what others use. So the kernel is only a backstop there,
 * that keeps a fork bomb small enough for the watch to end it.
 */
const SHARED_PROCESSES = 8;

export interface PreludeOptions {
  readonly limits: ResourceLimits;
  /**
   * How many processes the node's user has besides, which the kernel counts as well. Null: in a user namespace of its own it counts
   * those of the task alone.
   */
  readonly otherProcesses: number | null;
  /** The shell stays as the first process of a pid namespace, and passes on how the program ended. */
  readonly init: boolean;
}

/** The text for `sh -c TEXT sh PROGRAM ARGS…`. */
export function prelude({ limits, otherProcesses, init }: PreludeOptions): string {
  const cpuSeconds = Math.max(1, Math.ceil(limits.cpuMs / 1000));
  const processes =
    otherProcesses === null
      ? // The first process of the namespace counts too, and so does unshare, which moves into it.
        limits.processes + (init ? 2 : 1)
      : otherProcesses + SHARED_PROCESSES * limits.processes;
  const commands = [
    'set -e',
    'ulimit -c 0',
    `ulimit -n ${clamp(limits.openFiles, 'Max open files')}`,
    `ulimit -f ${clamp(Math.ceil(limits.diskBytes / BLOCK_BYTES), 'Max file size', BLOCK_BYTES)}`,
    `ulimit -d ${clamp(Math.ceil(dataBytes(limits.memoryBytes) / 1024), 'Max data size', 1024)}`,
    // At the soft limit comes SIGXCPU, which says why; at the hard one SIGKILL.
    `ulimit -S -t ${clamp(cpuSeconds, 'Max cpu time')}`,
    `ulimit -H -t ${clamp(cpuSeconds + 1, 'Max cpu time')}`,
    // The option has no name that all shells share, and an unknown one is an error.
    `{ ulimit -u ${processes} || ulimit -p ${processes}; } 2>/dev/null`,
    `echo ${ANNOUNCEMENT} >&${EVENTS_FD}`,
    init ? 'set +e; "$@"; exit $?' : 'exec "$@"',
  ];
  return commands.join('\n');
}

/** Of limits that are above this process's own, what holds instead. By the names of the options. */
export function loweredLimits({
  openFiles,
  diskBytes,
}: Pick<ResourceLimits, 'openFiles' | 'diskBytes'>): Readonly<Record<string, number>> {
  const files = clamp(openFiles, 'Max open files');
  const bytes = clamp(diskBytes, 'Max file size');
  return {
    ...(files < openFiles && { openFiles: files }),
    ...(bytes < diskBytes && { diskBytes: bytes }),
  };
}

/** At most the hard limit of this process, which only root could raise. */
function clamp(value: number, row: string, unit = 1): number {
  const hard = hardLimit(row);
  return hard === null ? value : Math.min(value, Math.floor(hard / unit));
}

let hardLimits: ReadonlyMap<string, number> | null = null;

function hardLimit(row: string): number | null {
  hardLimits ??= readHardLimits();
  return hardLimits.get(row) ?? null;
}

/** The limited ones of this process. They cannot rise while it runs. */
function readHardLimits(): ReadonlyMap<string, number> {
  let text = '';
  try {
    text = readFileSync('/proc/self/limits', 'latin1');
  } catch {
    // Without /proc the shell itself refuses what is too high.
  }
  const rows = [...text.matchAll(/^(Max [a-z ]+?)\s{2,}\S+\s+(\d+)/gm)];
  return new Map(rows.map(([, row, hard]) => [row!, Number(hard)]));
}
