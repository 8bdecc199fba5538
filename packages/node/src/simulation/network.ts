/** A network that delays, loses, repeats and partitions messages, as one seed says. */
import { MillraceError, sleep, type Clock, type Random } from '@millrace/runner';

export interface Faults {
  /** Chance that a message (a request, or an answer) is lost. */
  readonly loss: number;
  /** Chance that a request arrives a second time. */
  readonly repeat: number;
  readonly minDelayMs: number;
  readonly maxDelayMs: number;
}

/** Messages on their way between one process and the dispatcher. */
export class Link {
  /** False: a partition; nothing comes through either way. */
  connected = true;
  #alive = true;
  readonly #clock: Clock;
  readonly #random: Random;
  readonly #faults: () => Faults;
  readonly #died = new AbortController();

  /** `faults` is asked for every message, so that a run can heal. */
  constructor(clock: Clock, random: Random, faults: () => Faults) {
    this.#clock = clock;
    this.#random = random;
    this.#faults = faults;
  }

  /** The process is gone: what is on its way to it never arrives, and the other side sees its connections close. */
  kill(): void {
    this.#alive = false;
    this.#died.abort(new Error('the process died'));
  }

  /**
   * One request and its answer. `serve` runs at the dispatcher and is told when the caller's connection closes.
   * Never settles once the calling process is dead.
   */
  call<T>(serve: (gone: AbortSignal) => Promise<T>, signal?: AbortSignal): Promise<T> {
    return new Promise((resolve, reject) => {
      const gone = new AbortController();
      const hangUp = (): void => {
        forget();
        if (this.#alive) reject(signal?.reason);
        // What the other side learns of it is a message too.
        this.#clock.setTimer(() => gone.abort(new Error('the caller is gone')), this.#delay());
      };
      if (!this.#alive) return;
      if (signal?.aborted) {
        reject(signal.reason);
        return;
      }
      signal?.addEventListener('abort', hangUp, { once: true });
      this.#died.signal.addEventListener('abort', hangUp, { once: true });
      const forget = (): void => {
        signal?.removeEventListener('abort', hangUp);
        this.#died.signal.removeEventListener('abort', hangUp);
      };
      const settle = (how: () => void): void => {
        forget();
        if (this.#alive) how();
      };
      void (async () => {
        try {
          const value = await this.#carry(serve, gone.signal);
          settle(() => resolve(value));
        } catch (error) {
          settle(() => reject(error));
        }
      })();
    });
  }

  async #carry<T>(serve: (gone: AbortSignal) => Promise<T>, gone: AbortSignal): Promise<T> {
    await this.#deliver();
    if (this.#random() < this.#faults().repeat) {
      this.#clock.setTimer(() => void serve(gone).catch(() => undefined), this.#delay());
    }
    const answer = await serve(gone).then(
      (value) => () => value,
      (error: unknown) => () => {
        throw error;
      },
    );
    await this.#deliver();
    return answer();
  }

  /** A message is delivered late, or lost: then its sender hears of it half of the time, and else nothing ever. */
  async #deliver(): Promise<void> {
    await sleep(this.#clock, this.#delay());
    if (this.connected && this.#random() >= this.#faults().loss) return;
    if (this.#random() < 0.5) throw new MillraceError('unavailable', 'network error: connection reset');
    await new Promise<never>(() => undefined);
  }

  #delay(): number {
    const { minDelayMs, maxDelayMs } = this.#faults();
    return minDelayMs + (maxDelayMs - minDelayMs) * this.#random();
  }
}
