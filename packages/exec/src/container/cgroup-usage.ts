/** The kernel's own account of a container, where this process can see its control group. */
import { basename, dirname } from 'node:path';
import { TaskCgroup, groupsOf } from '../sandbox/cgroup.ts';

const V1 = ['memory', 'pids', 'cpuacct'] as const;

/**
 * The control group of a container's first process. Null when it cannot be seen: an engine on another machine or in a virtual one, or a pid that
 * means another process here.
 *
 * @param containerId as engines put it into the names of groups
 */
export function cgroupOf(pid: number, containerId: string): TaskCgroup | null {
  const groups = [...groupsOf(pid)].filter(([, dir]) => basename(dir).includes(containerId));
  const v1 = new Map(
    V1.flatMap((name) => groups.filter(([key]) => key === name).map(([, dir]) => [name, dir] as const)),
  );
  const memory = v1.get('memory');
  if (memory !== undefined) {
    // One name in all hierarchies, as engines do it.
    const name = basename(memory);
    const dirs = new Map(
      [...v1].filter(([, dir]) => basename(dir) === name).map(([key, dir]) => [key, dirname(dir)]),
    );
    return new TaskCgroup({ version: 1, dirs }, name);
  }
  const v2 = groups.find(([key]) => key === '')?.[1];
  if (v2 === undefined) return null;
  return new TaskCgroup(
    { version: 2, dir: dirname(v2), controllers: new Set(['cpu', 'memory', 'pids']) },
    basename(v2),
  );
}
