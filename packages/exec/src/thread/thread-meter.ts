/**
 * The CPU time of one worker thread, read from outside, also while it never yields. By the kernel's account of the thread,
 * which Linux keeps to the nanosecond; Node itself tells it for the whole process only.
 */
import { closeSync, openSync, readSync, readlinkSync } from 'node:fs';

const BUFFER = Buffer.alloc(128);

/** The kernel's number of the thread this is called in; null where the kernel does not tell it. */
export function threadNumber(): number | null {
  try {
    // `<process>/task/<thread>`
    const number = Number(readlinkSync('/proc/thread-self').split('/').at(-1));
    return Number.isInteger(number) ? number : null;
  } catch {
    return null;
  }
}

/** Keeps a descriptor open, so that a look costs one call and no path. */
export class ThreadMeter implements Disposable {
  #file: number | null;

  /** @param number see {@link threadNumber} */
  constructor(number: number | null) {
    try {
      this.#file = number === null ? null : openSync(`/proc/self/task/${number}/schedstat`, 'r');
    } catch {
      this.#file = null;
    }
  }

  /** CPU time since the thread began, milliseconds. Null when it cannot be had, such as when the thread has ended. */
  cpuMs(): number | null {
    if (this.#file === null) return null;
    try {
      const length = readSync(this.#file, BUFFER, 0, BUFFER.length, 0);
      // `<on CPU, ns> <waiting, ns> <timeslices>`
      const ns = Number(BUFFER.toString('latin1', 0, length).split(' ', 1)[0]);
      return Number.isFinite(ns) && length > 0 ? ns / 1e6 : null;
    } catch {
      return null;
    }
  }

  [Symbol.dispose](): void {
    if (this.#file !== null) closeSync(this.#file);
    this.#file = null;
  }
}
