/**
 * What ends a `millrace run` early, in steps. Before the job exists, a signal ends the command. Then the first one cancels
 * the job, whose end is waited for, and the next one stops waiting.
 */
import { MillraceError } from '@millrace/runner';
import type { Io } from './io.ts';

export class Interruption implements Disposable {
  readonly #giveUp = new AbortController();
  readonly #listening: Disposable;
  #cancelJob: (() => Promise<unknown>) | null = null;
  #canceling = false;
  readonly #note: (text: string) => void;

  /** `note` takes the remarks for the person who interrupts. */
  constructor(io: Pick<Io, 'onStop'>, note: (text: string) => void) {
    this.#note = note;
    this.#listening = io.onStop(() => {
      if (!this.#canceling) this.cancel('interrupted');
      else this.giveUp(new MillraceError('canceled', 'interrupted again: not waiting for the job to end'));
    });
  }

  /** Aborts when nothing is to be waited for any more. */
  get signal(): AbortSignal {
    return this.#giveUp.signal;
  }

  /** The job exists: from now on cancelling means this. */
  jobSubmitted(cancelJob: () => Promise<unknown>): void {
    this.#cancelJob = cancelJob;
  }

  /** The first call counts. */
  cancel(why: string): void {
    if (this.#canceling) return;
    this.#canceling = true;
    if (this.#cancelJob === null) {
      this.giveUp(new MillraceError('canceled', `${why} before the job was submitted`));
      return;
    }
    this.#note(`${why}: canceling the job`);
    this.#cancelJob().catch((error: unknown) => this.giveUp(error));
  }

  /** The first reason counts. */
  giveUp(reason: unknown): void {
    this.#giveUp.abort(reason);
  }

  [Symbol.dispose](): void {
    this.#listening[Symbol.dispose]();
  }
}
