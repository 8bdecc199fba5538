/** What an activity has used, in the counters of the field. */
import { readFile, readdir } from 'node:fs/promises';
import type { Clock, Timer } from '@millrace/runner';
import { folderBytes } from './volumes.ts';

const SAMPLE_MS = 1_000;
/** Clock ticks per second in /proc; fixed for programs on every Linux architecture in use. */
const TICKS_PER_SECOND = 100;
const GIB = 1024 ** 3;
/** Custom counters a runtime may have; more are ignored. */
const MAX_COUNTERS = 256;

export const BUILT_IN_COUNTERS = [
  'golem.usage.duration_sec',
  'golem.usage.cpu_sec',
  'golem.usage.gib',
  'golem.usage.storage_gib',
] as const;

/** Counter to value: the four built in, and what the runtime has told. */
export type Usage = Readonly<Record<string, number>>;

/** Samples the processes once a second while it is open. CPU and memory are known on Linux only, else 0. */
export class UsageMeter {
  readonly #clock: Clock;
  readonly #workDir: string;
  readonly #roots: () => readonly number[];
  readonly #startedAt: number;
  readonly #custom = new Map<string, number>();
  /** CPU seconds by process, as last seen, and of those that have ended since. */
  #cpu = new Map<string, number>();
  #endedCpu = 0;
  #peakBytes = 0;
  #timer: Timer | null = null;
  #closed = false;

  /** @param roots the processes whose descendants count */
  constructor(clock: Clock, workDir: string, roots: () => readonly number[]) {
    this.#clock = clock;
    this.#workDir = workDir;
    this.#roots = roots;
    this.#startedAt = clock.monotonic();
    if (process.platform === 'linux') this.#schedule();
  }

  /** The value of a counter of the runtime's own. False when it was not taken: built in, no number, or too many. */
  setCustom(name: string, value: number): boolean {
    const builtIn = (BUILT_IN_COUNTERS as readonly string[]).includes(name);
    const full = this.#custom.size >= MAX_COUNTERS && !this.#custom.has(name);
    if (builtIn || full || name === '' || !Number.isFinite(value) || value < 0) return false;
    this.#custom.set(name, value);
    return true;
  }

  async read(): Promise<Usage> {
    await this.#sample();
    let cpu = this.#endedCpu;
    for (const seconds of this.#cpu.values()) cpu += seconds;
    return {
      'golem.usage.duration_sec': (this.#clock.monotonic() - this.#startedAt) / 1000,
      'golem.usage.cpu_sec': cpu,
      'golem.usage.gib': this.#peakBytes / GIB,
      'golem.usage.storage_gib': (await folderBytes(this.#workDir)) / GIB,
      ...Object.fromEntries(this.#custom),
    };
  }

  close(): void {
    this.#closed = true;
    this.#timer?.cancel();
  }

  #schedule(): void {
    if (this.#closed) return;
    this.#timer = this.#clock.setTimer(() => void this.#sample().finally(() => this.#schedule()), SAMPLE_MS, {
      unref: true,
    });
  }

  async #sample(): Promise<void> {
    if (process.platform !== 'linux') return;
    let bytes = 0;
    const cpu = new Map<string, number>();
    const pending = [...this.#roots()];
    const seen = new Set<number>();
    for (let pid = pending.pop(); pid !== undefined; pid = pending.pop()) {
      if (seen.has(pid)) continue;
      seen.add(pid);
      const found = await readProcess(pid);
      if (found === null) continue;
      cpu.set(found.key, found.cpuSeconds);
      bytes += found.residentBytes;
      pending.push(...found.children);
    }
    for (const [key, seconds] of this.#cpu) if (!cpu.has(key)) this.#endedCpu += seconds;
    this.#cpu = cpu;
    this.#peakBytes = Math.max(this.#peakBytes, bytes);
  }
}

interface ProcessSample {
  /** Process and its start, since numbers are used again. */
  readonly key: string;
  readonly cpuSeconds: number;
  readonly residentBytes: number;
  readonly children: readonly number[];
}

async function readProcess(pid: number): Promise<ProcessSample | null> {
  try {
    const stat = await readFile(`/proc/${pid}/stat`, 'latin1');
    // Numbered as in proc(5), counted from the state, which is field 3.
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    const status = await readFile(`/proc/${pid}/status`, 'latin1');
    const children: number[] = [];
    for (const thread of await readdir(`/proc/${pid}/task`)) {
      const list = await readFile(`/proc/${pid}/task/${thread}/children`, 'latin1').catch(() => '');
      children.push(...list.split(' ').filter(Boolean).map(Number));
    }
    return {
      key: `${pid}:${fields[19]}`,
      cpuSeconds: (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND,
      residentBytes: Number(/^VmRSS:\s+(\d+) kB$/m.exec(status)?.[1] ?? 0) * 1024,
      children,
    };
  } catch {
    // Ended while it was looked at.
    return null;
  }
}
