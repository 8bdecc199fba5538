/**
 * A control group per task, below the node's own one, where the node may make one: the kernel's own account of what all
 * processes of a task use together, limits on it, and a kill that nothing escapes.
 *
 * Version 2 with a delegated subtree, and version 1 with its hierarchy per controller. Which controllers are there differs from
 * machine to machine; without any a version 2 group still counts CPU time and kills.
 */
import { existsSync, mkdirSync, readFileSync, readdirSync, rmdirSync, writeFileSync } from 'node:fs';
import { dirname, join, posix } from 'node:path';
import { MillraceError, sleep, type Clock } from '@millrace/runner';
import { readLiving, readStat } from '../process/proc.ts';
import type { AppliedControls, CgroupReport, ResourceLimits } from './controls.ts';

type Controller = 'memory' | 'pids' | 'cpuacct';

/** Where groups of tasks are made. */
export type CgroupParent =
  | { readonly version: 2; readonly dir: string; readonly controllers: ReadonlySet<string> }
  | { readonly version: 1; readonly dirs: ReadonlyMap<Controller, string> };

export interface CgroupUsage {
  readonly cpuMs: number | null;
  readonly peakMemoryBytes: number | null;
  /** The kernel killed a process of the group because of its memory limit. */
  readonly outOfMemory: boolean;
  /** A new process was refused because of the limit. */
  readonly processesRefused: boolean;
}

const PREFIX = 'millrace-';
const V1_CONTROLLERS: readonly Controller[] = ['memory', 'pids', 'cpuacct'];
const EMPTY_LIMIT_MS = 10_000;
const EMPTY_POLL_MS = 2;

/**
 * Looks for a place to make groups, by making one: `given`, or the node's own group, or the one above it. Ends and removes what
 * nodes that no longer exist left there.
 */
export function findCgroupParent(given?: string): CgroupParent | { readonly reason: string } {
  try {
    const parent = given === undefined ? ownParent() : v2Parent(given);
    if (parent === null) {
      return {
        reason:
          'no control group of this user is writable; start the node in a delegated subtree (systemd: Delegate=yes), or name one',
      };
    }
    for (const dir of dirsOf(parent)) sweep(dir);
    return parent;
  } catch (error) {
    return { reason: `control groups cannot be used: ${(error as Error).message}` };
  }
}

export function cgroupReport(found: CgroupParent | { readonly reason: string }): CgroupReport {
  if ('reason' in found) return { available: false, reason: found.reason, version: null, controls: {} };
  return { available: true, reason: null, version: found.version, controls: cgroupControls(found) };
}

/** What a group there holds a program to. */
export function cgroupControls(parent: CgroupParent): AppliedControls {
  const has = (controller: Controller): boolean =>
    parent.version === 2 ? parent.controllers.has(controller) : parent.dirs.has(controller);
  return {
    ...(has('memory') ? { memory: 'cgroup' } : {}),
    ...(has('pids') ? { processes: 'cgroup' } : {}),
    // Watched, but nothing that has ended is missing from what it shows.
    ...(parent.version === 2 || has('cpuacct') ? { cpu: 'cgroup' } : {}),
  };
}

/** The group of one task. Made empty; the program joins by itself, see {@link joinScript}. */
export class TaskCgroup {
  readonly #parent: CgroupParent;
  readonly #name: string;

  /** @throws MillraceError `failed_precondition` when the kernel refuses it or one of its limits. */
  static create(
    parent: CgroupParent,
    id: string,
    limits: Pick<ResourceLimits, 'memoryBytes' | 'processes'>,
  ): TaskCgroup {
    const group = new TaskCgroup(parent, `${PREFIX}${process.pid}-${readStat('self')?.started ?? '0'}-${id}`);
    try {
      for (const dir of group.dirs()) mkdirSync(dir);
      group.#limit(limits);
    } catch (error) {
      group.#removeNow();
      throw new MillraceError(
        'failed_precondition',
        `the control group of the task cannot be made: ${(error as Error).message}`,
        { cause: error, details: { ending: 'sandbox_failed', control: 'cgroup' } },
      );
    }
    return group;
  }

  constructor(parent: CgroupParent, name: string) {
    this.#parent = parent;
    this.#name = name;
  }

  /** One per hierarchy. */
  dirs(): string[] {
    return dirsOf(this.#parent).map((dir) => join(dir, this.#name));
  }

  usage(): CgroupUsage {
    if (this.#parent.version === 2) {
      const micros = keyed(this.#read('memory', 'cpu.stat'), 'usage_usec');
      return {
        cpuMs: micros === null ? null : micros / 1000,
        peakMemoryBytes: toNumber(this.#read('memory', 'memory.peak')),
        outOfMemory: (keyed(this.#read('memory', 'memory.events'), 'oom_kill') ?? 0) > 0,
        processesRefused: (keyed(this.#read('pids', 'pids.events'), 'max') ?? 0) > 0,
      };
    }
    const nanos = toNumber(this.#read('cpuacct', 'cpuacct.usage'));
    return {
      cpuMs: nanos === null ? null : nanos / 1e6,
      peakMemoryBytes: toNumber(this.#read('memory', 'memory.max_usage_in_bytes')),
      outOfMemory: (keyed(this.#read('memory', 'memory.oom_control'), 'oom_kill') ?? 0) > 0,
      processesRefused: (keyed(this.#read('pids', 'pids.events'), 'max') ?? 0) > 0,
    };
  }

  /** Kills all in it and resolves when it is empty. @throws MillraceError `internal` when that takes more than 10 s. */
  async kill(clock: Clock): Promise<void> {
    const deadline = clock.monotonic() + EMPTY_LIMIT_MS;
    for (let pids = this.#pids(); pids.length > 0; pids = this.#pids()) {
      killGroup(this.dirs(), pids);
      if (clock.monotonic() > deadline) {
        throw new MillraceError(
          'internal',
          `processes do not die within ${EMPTY_LIMIT_MS} ms of SIGKILL: ${pids.join(', ')}; the kernel holds them`,
        );
      }
      await sleep(clock, EMPTY_POLL_MS);
    }
  }

  /** After {@link kill}. The kernel may hold on to an emptied group for a moment; the next start removes what stays. */
  async remove(clock: Clock): Promise<void> {
    for (let tries = 0; tries < 50; tries += 1) {
      if (this.#removeNow()) return;
      await sleep(clock, EMPTY_POLL_MS);
    }
  }

  #removeNow(): boolean {
    return this.dirs().every(removeDir);
  }

  #pids(): number[] {
    return this.dirs().flatMap(pidsIn);
  }

  #limit({ memoryBytes, processes }: Pick<ResourceLimits, 'memoryBytes' | 'processes'>): void {
    if (this.#parent.version === 2) {
      const [dir] = this.dirs() as [string];
      if (this.#parent.controllers.has('memory')) {
        writeFileSync(join(dir, 'memory.max'), String(memoryBytes));
        // A machine without swap accounting has no such file, and none to limit.
        tryWrite(join(dir, 'memory.swap.max'), '0');
        tryWrite(join(dir, 'memory.oom.group'), '1');
      }
      if (this.#parent.controllers.has('pids')) writeFileSync(join(dir, 'pids.max'), String(processes));
      return;
    }
    const memory = this.#dir('memory');
    if (memory !== null) {
      writeFileSync(join(memory, 'memory.limit_in_bytes'), String(memoryBytes));
      tryWrite(join(memory, 'memory.memsw.limit_in_bytes'), String(memoryBytes));
    }
    const pids = this.#dir('pids');
    if (pids !== null) writeFileSync(join(pids, 'pids.max'), String(processes));
  }

  #dir(controller: Controller): string | null {
    if (this.#parent.version === 2) return this.dirs()[0] ?? null;
    const dir = this.#parent.dirs.get(controller);
    return dir === undefined ? null : join(dir, this.#name);
  }

  #read(controller: Controller, file: string): string | null {
    const dir = this.#dir(controller);
    return dir === null ? null : readText(join(dir, file));
  }
}

/**
 * The arguments that put a command into the group before it begins: `[...joinScript(group), ...command]`. Joining from outside
 * would let the program start a child that is not in it.
 */
export function joinScript(group: TaskCgroup): [string, ...string[]] {
  const text =
    'while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs" || exit 125; shift; done; shift; exec "$@"';
  return ['/bin/sh', '-c', text, 'sh', ...group.dirs(), '--'];
}

function dirsOf(parent: CgroupParent): string[] {
  // Several controllers of version 1 may share one hierarchy.
  return parent.version === 2 ? [parent.dir] : [...new Set(parent.dirs.values())];
}

function ownParent(): CgroupParent | null {
  const own = groupsOf('self');
  const v2 = own.get('');
  if (v2 !== undefined) {
    // systemd's DelegateSubgroup= puts the service below the group it may write to, where controllers can be switched on.
    for (const dir of [dirname(v2), v2]) {
      const parent = existsSync(join(dir, 'cgroup.procs')) ? tryV2Parent(dir) : null;
      if (parent !== null && parent.controllers.size > 0) return parent;
    }
  }
  const dirs = new Map<Controller, string>();
  for (const controller of V1_CONTROLLERS) {
    const dir = own.get(controller);
    if (dir !== undefined && canMake(dir)) dirs.set(controller, dir);
  }
  if (dirs.has('memory') && dirs.has('pids')) return { version: 1, dirs };
  return v2 === undefined ? null : tryV2Parent(v2);
}

function tryV2Parent(dir: string): Extract<CgroupParent, { version: 2 }> | null {
  try {
    return v2Parent(dir);
  } catch {
    return null;
  }
}

function v2Parent(dir: string): Extract<CgroupParent, { version: 2 }> {
  // Refused while the group itself has processes; then its groups only count and kill.
  for (const controller of ['memory', 'pids', 'cpu']) {
    tryWrite(join(dir, 'cgroup.subtree_control'), `+${controller}`);
  }
  const probe = join(dir, `${PREFIX}${process.pid}-${readStat('self')?.started ?? '0'}-probe`);
  mkdirSync(probe);
  try {
    if (!existsSync(join(probe, 'cgroup.kill'))) throw new Error(`${dir} has no cgroup.kill (Linux 5.14)`);
    // Whoever may make a group may still not be allowed to move processes into it.
    writeFileSync(join(probe, 'cgroup.procs'), '');
    const controllers = (readText(join(probe, 'cgroup.controllers')) ?? '').trim().split(/\s+/);
    return { version: 2, dir, controllers: new Set(controllers.filter((name) => name !== '')) };
  } finally {
    removeDir(probe);
  }
}

function canMake(dir: string): boolean {
  const probe = join(dir, `${PREFIX}${process.pid}-${readStat('self')?.started ?? '0'}-probe`);
  try {
    mkdirSync(probe);
    return removeDir(probe);
  } catch {
    return false;
  }
}

/**
 * The folders of the groups a process is in: by controller, and under the empty name that of version 2. Without those that are not
 * to be seen from here.
 */
export function groupsOf(pid: number | 'self'): Map<string, string> {
  const groups = new Map<string, string>();
  const mounts = (readText('/proc/self/mountinfo') ?? '').split('\n').flatMap((line) => {
    const [before = '', after = ''] = line.split(' - ');
    const [, , , root, point] = before.split(' ');
    const [type, , options = ''] = after.split(' ');
    return root !== undefined && point !== undefined && (type === 'cgroup' || type === 'cgroup2')
      ? [{ root, point, names: type === 'cgroup2' ? [''] : options.split(',') }]
      : [];
  });
  for (const line of (readText(`/proc/${pid}/cgroup`) ?? '').split('\n')) {
    const [, names, path] = /^\d+:([^:]*):(.*)$/.exec(line) ?? [];
    if (names === undefined || path === undefined) continue;
    for (const name of names.split(',')) {
      const mount = mounts.find((candidate) => candidate.names.includes(name));
      const within = mount === undefined ? '..' : posix.relative(mount.root, path);
      // Outside of what is mounted here: somebody else's.
      if (mount !== undefined && !within.startsWith('..')) groups.set(name, join(mount.point, within));
    }
  }
  return groups;
}

/** Groups are named after the process that made them: those of one that is gone are ended and removed. */
function sweep(dir: string): void {
  for (const name of readdirSync(dir)) {
    const [, pid, started] = /^millrace-(\d+)-(\d+)-/.exec(name) ?? [];
    if (pid === undefined || started === undefined) continue;
    if (readLiving({ pid: Number(pid), started }) !== null) continue;
    const left = join(dir, name);
    killGroup([left], pidsIn(left));
    removeDir(left);
  }
}

function killGroup(dirs: readonly string[], pids: readonly number[]): void {
  for (const dir of dirs) {
    if (tryWrite(join(dir, 'cgroup.kill'), '1')) return;
    // Version 1 has no kill: nothing new may start while all that is there is killed.
    tryWrite(join(dir, 'pids.max'), '0');
  }
  for (const pid of pids) {
    try {
      process.kill(pid, 'SIGKILL');
    } catch {
      // It has ended meanwhile.
    }
  }
}

function pidsIn(dir: string): number[] {
  const text = readText(join(dir, 'cgroup.procs')) ?? '';
  return text.split('\n').flatMap((line) => (line === '' ? [] : [Number(line)]));
}

function removeDir(dir: string): boolean {
  try {
    rmdirSync(dir);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'ENOENT';
  }
}

function tryWrite(file: string, text: string): boolean {
  try {
    // Never made: a missing control file means that the kernel does not have it.
    writeFileSync(file, text, { flag: 'r+' });
    return true;
  } catch {
    return false;
  }
}

function readText(file: string): string | null {
  try {
    return readFileSync(file, 'latin1');
  } catch {
    return null;
  }
}

function toNumber(text: string | null): number | null {
  const value = text === null ? Number.NaN : Number(text.trim());
  return Number.isFinite(value) ? value : null;
}

/** The number beside a key of a file of `key value` lines. */
function keyed(text: string | null, key: string): number | null {
  const value = new RegExp(`^${key} (\\d+)$`, 'm').exec(text ?? '')?.[1];
  return value === undefined ? null : Number(value);
}
