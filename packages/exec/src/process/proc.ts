/**
 * What Linux tells of processes under /proc. A process may end between any two reads, so every reader answers null, or leaves
 * it out, for one that is gone. Reads are synchronous: these files are made by the kernel on the spot, and a thread pool would cost
 * more than the read.
 */
import { existsSync, readFileSync, readdirSync, statSync } from 'node:fs';

/** Pids are used again; together with the start time they name one process. */
export interface ProcessId {
  readonly pid: number;
  /** In the kernel's ticks since boot. */
  readonly started: string;
}

export interface ProcessStat extends ProcessId {
  /** One letter; see {@link isDead}. */
  readonly state: string;
  readonly parent: number;
  readonly group: number;
  readonly session: number;
  readonly threads: number;
  /** Of itself and of the children it has waited for. */
  readonly cpuMs: number;
}

/** The kernel shows times in 1/100 s on every architecture Node runs on, whatever it ticks at. */
const MS_PER_TICK = 10;

/** Null also where there is no /proc. */
export function readStat(pid: number | 'self'): ProcessStat | null {
  const text = readProc(pid, 'stat');
  if (text === null) return null;
  // The command in field 2 may hold spaces and brackets, so fields count from its last `)`.
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
  const at = (index: number): number => Number(fields[index] ?? 0);
  return {
    pid: pid === 'self' ? process.pid : pid,
    started: fields[19] ?? '',
    state: fields[0] ?? 'X',
    parent: at(1),
    group: at(2),
    session: at(3),
    threads: at(17),
    cpuMs: (at(11) + at(12) + at(13) + at(14)) * MS_PER_TICK,
  };
}

/** CPU time of the children this process has waited for, and of theirs. Null where there is no /proc. */
export function reapedCpuMs(): number | null {
  const text = readProc('self', 'stat');
  if (text === null) return null;
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
  return (Number(fields[13]) + Number(fields[14])) * MS_PER_TICK;
}

/** The process, when it lives and is still the same. */
export function readLiving(id: ProcessId): ProcessStat | null {
  const stat = readStat(id.pid);
  return stat !== null && stat.started === id.started && !isDead(stat) ? stat : null;
}

/**
 * The main thread of a program with several may end, and be shown as a zombie, before the others: until they have, its children
 * are theirs, and adopted by nobody.
 */
export function isDead({ state, threads }: ProcessStat): boolean {
  return state === 'X' || (state === 'Z' && threads <= 1);
}

export interface ProcessMemory {
  readonly residentBytes: number;
  /** The most that was resident at any time. */
  readonly peakBytes: number;
}

export function readMemory(pid: number): ProcessMemory | null {
  const text = readProc(pid, 'status');
  if (text === null) return null;
  const kib = (name: string): number =>
    Number(new RegExp(`^${name}:\\s+(\\d+) kB`, 'm').exec(text)?.[1] ?? 0);
  const residentBytes = kib('VmRSS') * 1024;
  return { residentBytes, peakBytes: Math.max(residentBytes, kib('VmHWM') * 1024) };
}

/** Resident memory with pages shared between processes divided among them. Dear: the kernel walks all its pages. */
export function readProportionalBytes(pid: number): number | null {
  const kib = /^Pss:\s+(\d+) kB/m.exec(readProc(pid, 'smaps_rollup') ?? '')?.[1];
  return kib === undefined ? null : Number(kib) * 1024;
}

/** Whether the process was started with this `NAME=value`. False when its environment may not be read. */
export function wasStartedWith(pid: number, variable: string): boolean {
  const environ = readProc(pid, 'environ');
  return environ !== null && environ.split('\0').includes(variable);
}

/** Not every kernel is built with it. */
const LISTS_CHILDREN = existsSync(`/proc/${process.pid}/task/${process.pid}/children`);

/** Direct children, of all threads. */
export function childrenOf(pid: number): number[] {
  if (!LISTS_CHILDREN) return allProcesses().flatMap((stat) => (stat.parent === pid ? [stat.pid] : []));
  let threads: string[];
  try {
    threads = readdirSync(`/proc/${pid}/task`);
  } catch {
    return [];
  }
  // A thread may end between the two reads; the others still have theirs.
  return threads.flatMap((thread) =>
    (readProc(pid, `task/${thread}/children`) ?? '')
      .split(' ')
      .filter((text) => text !== '')
      .map(Number),
  );
}

/**
 * The orphans a process has adopted are among these: the kernel gives them to the first thread of the adopter that is not
 * ending, which is its main thread for as long as that lives.
 */
export function adoptedBy(pid: number): number[] {
  if (!LISTS_CHILDREN) return childrenOf(pid);
  const listed = readProc(pid, `task/${pid}/children`);
  if (listed === null || (readStat(pid)?.state ?? 'X') === 'Z') return childrenOf(pid);
  return listed.split(' ').flatMap((text) => (text === '' ? [] : [Number(text)]));
}

let known: { readonly parent: number; readonly chain: readonly number[] } | null = null;

/**
 * This process, its parent, and so on up to the first. An orphan is adopted by one of the last ones. Looked up again when the
 * parent is another: when one further up ends, those below it go to one that is in the chain already.
 */
export function ancestry(): readonly number[] {
  const { ppid } = process;
  if (known?.parent === ppid) return known.chain;
  const chain = [process.pid];
  for (let parent = ppid; parent > 0 && !chain.includes(parent); parent = readStat(parent)?.parent ?? 0) {
    chain.push(parent);
  }
  known = { parent: ppid, chain };
  return chain;
}

/** Every process there is. */
export function allProcesses(): ProcessStat[] {
  let names: string[];
  try {
    names = readdirSync('/proc');
  } catch {
    return [];
  }
  return names.flatMap((name) => {
    const stat = /^\d+$/.test(name) ? readStat(Number(name)) : null;
    return stat === null ? [] : [stat];
  });
}

/** Threads of all processes of this user, which is what the kernel counts against RLIMIT_NPROC. */
export function countUserThreads(): number {
  const user = process.getuid?.();
  return allProcesses().reduce((sum, { pid, threads }) => {
    const owner = statSync(`/proc/${pid}`, { throwIfNoEntry: false })?.uid;
    return owner === user ? sum + threads : sum;
  }, 0);
}

function readProc(pid: number | 'self', file: string): string | null {
  try {
    return readFileSync(`/proc/${pid}/${file}`, 'latin1');
  } catch {
    return null;
  }
}
