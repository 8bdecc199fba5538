import type { Clock, Timer } from '@millrace/runner';

/**
 * One process's view of the simulation's time: a wall clock that may be off, and timers that die with the process. Since
 * everything a process does begins with a timer or an answer, killing its timers and its network link kills it.
 */
export class MortalClock implements Clock {
  readonly #base: Clock;
  #skewMs: number;
  readonly #timers = new Set<Timer>();
  #dead = false;

  /** `skewMs` is added to the time of day. */
  constructor(base: Clock, skewMs: number) {
    this.#base = base;
    this.#skewMs = skewMs;
  }

  /** The time of day is set to another one; timers and the monotonic time go on as before. */
  jump(byMs: number): void {
    this.#skewMs += byMs;
  }

  /** Timers that neither fired nor were cancelled. */
  get pending(): number {
    return this.#timers.size;
  }

  kill(): void {
    this.#dead = true;
    for (const timer of this.#timers) timer.cancel();
    this.#timers.clear();
  }

  now(): number {
    return this.#base.now() + this.#skewMs;
  }

  monotonic(): number {
    return this.#base.monotonic();
  }

  setTimer(fn: () => void, delayMs: number): Timer {
    if (this.#dead) return { cancel: () => undefined };
    const inner = this.#base.setTimer(() => {
      this.#timers.delete(timer);
      fn();
    }, delayMs);
    const timer: Timer = {
      cancel: () => {
        inner.cancel();
        this.#timers.delete(timer);
      },
    };
    this.#timers.add(timer);
    return timer;
  }
}
