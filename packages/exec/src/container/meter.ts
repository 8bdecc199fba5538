/** What a container uses while it runs. Exact where its control group can be seen, else what the engine says once a second. */
import { sleep } from '@millrace/runner';
import type { Clock } from '@millrace/runner';
import type { TaskCgroup } from '../sandbox/cgroup.ts';
import { cgroupOf } from './cgroup-usage.ts';
import type { ContainerEngine } from './engine.ts';

const GROUP_EVERY_MS = 100;
const ENGINE_EVERY_MS = 1000;

export interface MeterReading {
  /** Null: it ended before it was looked at. */
  readonly peakBytes: number | null;
  readonly cpuMs: number | null;
  /** The kernel's counter for the container's control group says that it killed a process for memory. */
  readonly outOfMemory: boolean;
  /** A new process was refused because of the limit. */
  readonly processesRefused: boolean;
  /** The container runs on this machine's kernel. */
  readonly local: boolean;
}

export class ContainerMeter {
  readonly #engine: ContainerEngine;
  readonly #id: string;
  readonly #clock: Clock;
  #group: TaskCgroup | null = null;
  #peakBytes = 0;
  #cpuMs = 0;
  #outOfMemory = false;
  #processesRefused = false;

  constructor(engine: ContainerEngine, id: string, clock: Clock) {
    this.#engine = engine;
    this.#id = id;
    this.#clock = clock;
  }

  /** Looks until the signal aborts. Never rejects: an engine that does not answer is found out by others. */
  async watch(done: AbortSignal): Promise<void> {
    try {
      const pid = (await this.#engine.inspectContainer(this.#id, { signal: done }))?.pid ?? null;
      this.#group = pid === null ? null : cgroupOf(pid, this.#id);
      for (;;) {
        if (this.#readGroup()) {
          await sleep(this.#clock, GROUP_EVERY_MS, done);
        } else {
          await this.#readEngine(done);
          await sleep(this.#clock, ENGINE_EVERY_MS, done);
        }
      }
    } catch {
      // Aborted, or no engine any more.
    }
  }

  /** Looks once more, if there is something to be seen, and sums up. */
  read(): MeterReading {
    this.#readGroup();
    return {
      peakBytes: this.#peakBytes === 0 ? null : this.#peakBytes,
      cpuMs: this.#cpuMs === 0 ? null : this.#cpuMs,
      outOfMemory: this.#outOfMemory,
      processesRefused: this.#processesRefused,
      local: this.#group !== null,
    };
  }

  /** Whether the group told enough. Version 2 before Linux 5.19 keeps no peak. */
  #readGroup(): boolean {
    if (this.#group === null) return false;
    const usage = this.#group.usage();
    this.#peakBytes = Math.max(this.#peakBytes, usage.peakMemoryBytes ?? 0);
    this.#cpuMs = Math.max(this.#cpuMs, usage.cpuMs ?? 0);
    this.#outOfMemory ||= usage.outOfMemory;
    this.#processesRefused ||= usage.processesRefused;
    return usage.peakMemoryBytes !== null;
  }

  async #readEngine(done: AbortSignal): Promise<void> {
    const stats = await this.#engine.stats(this.#id, { signal: done });
    this.#peakBytes = Math.max(this.#peakBytes, stats?.peakBytes ?? 0);
    this.#cpuMs = Math.max(this.#cpuMs, stats?.cpuMs ?? 0);
  }
}
