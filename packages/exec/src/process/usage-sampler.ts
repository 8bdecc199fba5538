/**
 * What running programs use, looked at from outside: memory, CPU time, number of processes. One round serves all programs of a
 * sampler; rounds are spaced so that they take at most a twentieth of a core however many programs run, as long as that leaves two
 * in a second.
 */
import type { Clock, Timer } from '@millrace/runner';
import { readMemory, readProportionalBytes } from './proc.ts';
import type { ProcessTree } from './process-tree.ts';

export interface UsageSample {
  /** Resident, of all processes together. Shared pages count once per process, see {@link proportionalBytes}. */
  readonly residentBytes: number;
  /** The most seen at one time, or of a single process at any time. */
  readonly peakBytes: number;
  /** Of all processes, those that have ended included as far as a living one waited for them. Never falls. */
  readonly cpuMs: number;
  readonly processes: number;
  /** Of all processes. */
  readonly threads: number;
}

const EVERY_MS = 100;
/** A program is looked at first when it has had time to start, and short ones should be seen once. */
const FIRST_AFTER_MS = 15;
const MAX_SHARE = 1 / 20;
/** What a program takes between two looks is not seen. */
const AT_LEAST_EVERY_MS = 500;

interface Watch {
  readonly tree: ProcessTree;
  readonly onSample: (sample: UsageSample) => void;
  last: UsageSample;
}

export const NO_USAGE: UsageSample = { residentBytes: 0, peakBytes: 0, cpuMs: 0, processes: 0, threads: 0 };

export class UsageSampler {
  readonly #clock: Clock;
  readonly #watches = new Set<Watch>();
  #timer: Timer | null = null;

  constructor(clock: Clock) {
    this.#clock = clock;
  }

  /** Calls `onSample` from now on until disposed. `sample()` looks at once. */
  watch(tree: ProcessTree, onSample: (sample: UsageSample) => void): { sample(): UsageSample } & Disposable {
    const watch: Watch = { tree, onSample, last: NO_USAGE };
    this.#watches.add(watch);
    const first = this.#clock.setTimer(() => this.#look(watch), FIRST_AFTER_MS, { unref: true });
    this.#timer ??= this.#arm(EVERY_MS);
    return {
      sample: () => this.#look(watch),
      [Symbol.dispose]: () => {
        first.cancel();
        this.#watches.delete(watch);
        if (this.#watches.size > 0) return;
        this.#timer?.cancel();
        this.#timer = null;
      },
    };
  }

  #arm(delayMs: number): Timer {
    return this.#clock.setTimer(
      () => {
        const startedAt = this.#clock.monotonic();
        for (const watch of this.#watches) this.#look(watch);
        const tookMs = this.#clock.monotonic() - startedAt;
        this.#timer =
          this.#watches.size === 0
            ? null
            : this.#arm(Math.min(Math.max(EVERY_MS, tookMs / MAX_SHARE), AT_LEAST_EVERY_MS));
      },
      delayMs,
      { unref: true },
    );
  }

  #look(watch: Watch): UsageSample {
    if (!this.#watches.has(watch)) return watch.last;
    const members = watch.tree.members();
    let residentBytes = 0;
    let peakBytes = watch.last.peakBytes;
    let cpuMs = 0;
    let threads = 0;
    for (const member of members) {
      cpuMs += member.cpuMs;
      threads += member.threads;
      const memory = readMemory(member.pid);
      residentBytes += memory?.residentBytes ?? 0;
      peakBytes = Math.max(peakBytes, memory?.peakBytes ?? 0);
    }
    watch.last = {
      residentBytes,
      peakBytes: Math.max(peakBytes, residentBytes),
      cpuMs: Math.max(cpuMs, watch.last.cpuMs),
      processes: members.length,
      threads,
    };
    watch.onSample(watch.last);
    return watch.last;
  }
}

/** As `residentBytes`, with each shared page counted once. Null when it cannot be read. */
export function proportionalBytes(tree: ProcessTree): number | null {
  let sum = 0;
  for (const { pid } of tree.members()) {
    const bytes = readProportionalBytes(pid);
    if (bytes === null) return null;
    sum += bytes;
  }
  return sum;
}
