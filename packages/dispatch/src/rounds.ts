/** Something a dispatcher does again and again although nobody asks, until it is closed. */
import type { Clock, Logger, Timer } from '@millrace/runner';

export interface RoundsOptions {
  readonly clock: Clock;
  readonly log: Logger;
  /** Until the first round; 0: {@link Rounds.start} makes it, and waits for it. Milliseconds. */
  readonly firstMs: number;
  /** From the end of a round to the beginning of the next, unless the round says another. Milliseconds. */
  readonly pauseMs: number;
  /** What is said when a round fails: `<trouble>; it is tried again`. */
  readonly trouble: string;
  /** One round. `signal` aborts at closing, which waits for the round. Answers the pause after it. */
  readonly round: (signal: AbortSignal) => Promise<number | void>;
}

/** One round at a time; a failed one is logged and followed by the next. Keeps no process alive. */
export class Rounds implements AsyncDisposable {
  readonly #options: RoundsOptions;
  readonly #stop = new AbortController();
  #timer: Timer | null = null;
  #running: Promise<void> = Promise.resolve();

  constructor(options: RoundsOptions) {
    this.#options = options;
  }

  async start(): Promise<void> {
    const { firstMs } = this.#options;
    if (firstMs > 0) this.#arm(firstMs);
    else await (this.#running = this.#run());
  }

  /** Waits for the round under way. */
  async close(): Promise<void> {
    this.#stop.abort(new Error('closing'));
    this.#timer?.cancel();
    await this.#running;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  #arm(delayMs: number): void {
    this.#timer = this.#options.clock.setTimer(
      () => {
        this.#running = this.#run();
      },
      delayMs,
      { unref: true },
    );
  }

  async #run(): Promise<void> {
    const { log, pauseMs, trouble, round } = this.#options;
    const { signal } = this.#stop;
    let delayMs = pauseMs;
    try {
      delayMs = (await round(signal)) ?? pauseMs;
    } catch (error) {
      if (!signal.aborted) log.error(`${trouble}; it is tried again`, { error: String(error) });
    }
    if (!signal.aborted) this.#arm(delayMs);
  }
}
