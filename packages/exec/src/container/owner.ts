/**
 * Whose a container is, written on it as labels, so that what a crashed node left behind can be told from what a living one runs.
 *
 * A process is named by host, boot, pid namespace, pid and start time: pids are used again, and the same pid means another process in
 * another container. When any doubt is left, the container is not a leftover.
 */
import { readFileSync, readlinkSync } from 'node:fs';
import { hostname } from 'node:os';
import { readLiving, readStat } from '../process/proc.ts';

export const LABELS = {
  node: 'millrace.node',
  lease: 'millrace.lease',
  task: 'millrace.task',
  capability: 'millrace.capability',
  host: 'millrace.host',
  boot: 'millrace.boot',
  pidNamespace: 'millrace.pidns',
  pid: 'millrace.pid',
  started: 'millrace.started',
} as const;

/** The process that owns a container. Unknown parts are empty. */
export interface Owner {
  /** The node's id; its containers are its own to sweep. */
  readonly node: string;
  readonly host: string;
  readonly boot: string;
  readonly pidNamespace: string;
  readonly pid: string;
  /** In ticks since boot. */
  readonly started: string;
}

export function thisProcess(node: string): Owner {
  return {
    node,
    host: hostname(),
    boot: read(() => readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim()),
    pidNamespace: read(() => readlinkSync('/proc/self/ns/pid')),
    pid: String(process.pid),
    started: readStat('self')?.started ?? '',
  };
}

export function ownerLabels(owner: Owner): Record<string, string> {
  return {
    [LABELS.node]: owner.node,
    [LABELS.host]: owner.host,
    [LABELS.boot]: owner.boot,
    [LABELS.pidNamespace]: owner.pidNamespace,
    [LABELS.pid]: owner.pid,
    [LABELS.started]: owner.started,
  };
}

export function ownerOf(labels: Readonly<Record<string, string>>): Owner {
  const label = (name: string): string => labels[name] ?? '';
  return {
    node: label(LABELS.node),
    host: label(LABELS.host),
    boot: label(LABELS.boot),
    pidNamespace: label(LABELS.pidNamespace),
    pid: label(LABELS.pid),
    started: label(LABELS.started),
  };
}

/**
 * Whether `owner` is a process of the same node as `self` that is certainly gone.
 *
 * @param exclusive No two processes run under this node id at a time, anywhere: then any other owner is gone.
 */
export function isGone(owner: Owner, self: Owner, exclusive: boolean): boolean {
  if (owner.node !== self.node) return false;
  const same = (key: keyof Owner): boolean => owner[key] === self[key];
  if (same('host') && same('boot') && same('pidNamespace') && same('pid') && same('started')) return false;
  if (exclusive) return true;
  if (!same('host') || !/^\d+$/.test(owner.pid)) return false;
  if (!same('boot')) return owner.boot !== '';
  return same('pidNamespace') && !isLiving(owner);
}

function isLiving({ pid, started }: Owner): boolean {
  // Without /proc only a pid is known, and whoever has it now counts as the owner.
  if (started !== '') return readLiving({ pid: Number(pid), started }) !== null;
  try {
    process.kill(Number(pid), 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== 'ESRCH';
  }
}

function read(value: () => string): string {
  try {
    return value();
  } catch {
    // Not Linux.
    return '';
  }
}
