/** Whether a dispatcher can do its work now: whether its store and the place of its bytes answer. */
import { createHash } from 'node:crypto';
import { sleep, type Clock, type Logger } from '@millrace/runner';
import type { BlobStore } from './blobs.ts';
import type { Store } from './store.ts';

/** Longest wait for an answer. Kubernetes and its like give up after a few seconds. */
export const READINESS_TIMEOUT_MS = 2_000;
/** How long an answer is given again, so that whoever asks often costs a database nothing. */
export const READINESS_KEPT_MS = 1_000;

export type PartState = 'ok' | 'failed' | 'no answer';

export interface Readiness {
  readonly store: PartState;
  readonly blobs: PartState;
}

export interface ReadinessOptions {
  readonly store: Pick<Store, 'getNode'>;
  readonly blobs: Pick<BlobStore, 'stat'>;
  readonly clock: Clock;
  /** Is told what is wrong when that changes; an answer over the network is not. */
  readonly log: Logger;
}

const NOWHERE = `sha256:${createHash('sha256').update('millrace readiness').digest('hex')}`;

export class ReadinessProbe {
  readonly #options: ReadinessOptions;
  #answer: Promise<Readiness> | null = null;
  #askedAtMs = -Infinity;
  readonly #states: Record<keyof Readiness, PartState> = { store: 'ok', blobs: 'ok' };

  constructor(options: ReadinessOptions) {
    this.#options = options;
  }

  /** Asks both, at most once within {@link READINESS_KEPT_MS}. Never rejects. */
  check(): Promise<Readiness> {
    const now = this.#options.clock.monotonic();
    if (this.#answer === null || now - this.#askedAtMs >= READINESS_KEPT_MS) {
      this.#askedAtMs = now;
      this.#answer = this.#ask();
    }
    return this.#answer;
  }

  async #ask(): Promise<Readiness> {
    const { store, blobs } = this.#options;
    const [ofStore, ofBlobs] = await Promise.all([
      this.#part('store', () => store.getNode('')),
      this.#part('blobs', () => blobs.stat(NOWHERE)),
    ]);
    return { store: ofStore, blobs: ofBlobs };
  }

  async #part(name: keyof Readiness, look: () => Promise<unknown>): Promise<PartState> {
    const { clock, log } = this.#options;
    const answered = new AbortController();
    let cause: string | null = null;
    const state = await Promise.race([
      look().then(
        (): PartState => 'ok',
        (error: unknown): PartState => {
          cause = String(error);
          return 'failed';
        },
      ),
      sleep(clock, READINESS_TIMEOUT_MS, answered.signal).then(
        (): PartState => 'no answer',
        (): PartState => 'ok',
      ),
    ]);
    answered.abort();
    if (state !== this.#states[name]) {
      this.#states[name] = state;
      if (state === 'ok') log.info('part answers again', { part: name });
      else log.warn('part does not answer; not ready', { part: name, state, error: cause });
    }
    return state;
  }
}
