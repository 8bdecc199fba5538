/**
 * Reports of ended tasks, as sessions send them. Where the dispatcher can, completions that are ready at the same time go in
 * one request, which brings the leases for the places they leave: a node of short tasks then costs a request and a commit per
 * batch, and not two per task.
 *
 * What is ready while a request is under way waits for its answer, but never long: a request that hangs must not hold
 * up the reports of others. To whoever sends a completion it is the call of `Dms`, with its errors and its signal.
 */
import { MillraceError, type Clock, type Timer } from '@millrace/runner';
import type {
  Completion,
  Dms,
  Features,
  LeaseHandle,
  LeaseQuery,
  ReceivedLease,
} from '@millrace/dispatch/client';
import { isBodyRefused, isLeaseGone } from './retry.ts';

/** The longest a completion waits for the answer to those before it. */
const GATHER_MS = 20;
const NOBODY_WAITS = new MillraceError('canceled', 'whoever sent the report has given up');
/** Artifacts listed in one request, so that a batch stays well within what a server reads. */
const MAX_ARTIFACTS = 200;

export type Reports = Pick<Dms, 'complete' | 'fail' | 'release'>;

export interface ExchangeOptions {
  readonly dms: Dms;
  readonly clock: Clock;
  readonly features: () => Features;
  /** What may be leased in `places` places; null: nothing. Asked when a request is about to be sent. */
  readonly next: (places: number) => Omit<LeaseQuery, 'waitSecs'> | null;
  /** These completions were accepted and these leases came for their places. In one step, before those who sent them hear of it. */
  readonly exchanged: (completed: readonly LeaseHandle[], leases: readonly ReceivedLease[]) => void;
}

interface Entry {
  readonly completion: Completion;
  /** Null: accepted. Without effect once its sender gave up. */
  readonly settle: (error: unknown) => void;
  /** Calls when the sender gives up; the entry is settled by then. */
  onGone: () => void;
  gone: boolean;
}

export class Exchange implements Reports {
  readonly #options: ExchangeOptions;
  #waiting: Entry[] = [];
  #underWay = 0;
  #armed = false;
  #timer: Timer | null = null;

  constructor(options: ExchangeOptions) {
    this.#options = options;
  }

  readonly complete: Dms['complete'] = (lease, { output_cids, meta }, options = {}) => {
    const { dms, features } = this.#options;
    const { leaseOnComplete = false, batchItems } = features();
    if (!leaseOnComplete || batchItems < 1 || dms.exchange === undefined || lease.leaseId === null) {
      return dms.complete(lease, { output_cids, meta }, options);
    }
    const { signal } = options;
    return new Promise<void>((resolve, reject) => {
      signal?.throwIfAborted();
      const onAbort = (): void => {
        entry.gone = true;
        reject(signal?.reason as Error);
        entry.onGone();
      };
      const entry: Entry = {
        completion: { lease, output_cids, meta },
        gone: false,
        onGone: () => (this.#waiting = this.#waiting.filter((other) => other !== entry)),
        settle: (error) => {
          signal?.removeEventListener('abort', onAbort);
          if (error === null) resolve();
          else reject(error);
        },
      };
      signal?.addEventListener('abort', onAbort, { once: true });
      this.#waiting.push(entry);
      this.#arm();
    });
  };

  readonly fail: Dms['fail'] = (...call) => this.#options.dms.fail(...call);

  readonly release: Dms['release'] = (...call) => this.#options.dms.release(...call);

  #arm(): void {
    if (this.#underWay > 0) {
      this.#timer ??= this.#options.clock.setTimer(() => this.#flush(), GATHER_MS);
    } else if (!this.#armed) {
      this.#armed = true;
      // After the others that end in this very step.
      queueMicrotask(() => {
        this.#armed = false;
        this.#flush();
      });
    }
  }

  #flush(): void {
    this.#timer?.cancel();
    this.#timer = null;
    while (this.#waiting.length > 0) void this.#send(this.#take());
  }

  #take(): Entry[] {
    const { batchItems } = this.#options.features();
    let artifacts = 0;
    const tooMany = this.#waiting.findIndex(({ completion }, index) => {
      artifacts += completion.meta.artifacts.length;
      return index > 0 && (index >= batchItems || artifacts > MAX_ARTIFACTS);
    });
    return this.#waiting.splice(0, tooMany === -1 ? this.#waiting.length : tooMany);
  }

  /** Never rejects. */
  async #send(entries: readonly Entry[]): Promise<void> {
    const { dms, next, exchanged } = this.#options;
    const controller = new AbortController();
    const onGone = (): void => {
      if (entries.every(({ gone }) => gone)) controller.abort(NOBODY_WAITS);
    };
    for (const entry of entries) entry.onGone = onGone;
    this.#underWay += 1;
    try {
      const completions = entries.map(({ completion }) => completion);
      const answer = await dms.exchange!(completions, next(entries.length), { signal: controller.signal });
      const accepted = completions.filter((_, index) => answer.refusals[index] === null);
      exchanged(
        accepted.map(({ lease }) => lease),
        answer.leases,
      );
      for (const [index, { settle }] of entries.entries()) settle(answer.refusals[index]);
    } catch (error) {
      // What the batch as a whole is refused for may be the fault of one of them.
      if (isBodyRefused(error) || isLeaseGone(error) || isUnknown(error)) {
        for (const entry of entries) void this.#sendAlone(entry);
      } else for (const { settle } of entries) settle(error);
    } finally {
      this.#underWay -= 1;
      if (this.#underWay === 0) this.#flush();
    }
  }

  async #sendAlone(entry: Entry): Promise<void> {
    if (entry.gone) return;
    const { lease, output_cids, meta } = entry.completion;
    const controller = new AbortController();
    entry.onGone = () => controller.abort(NOBODY_WAITS);
    try {
      await this.#options.dms.complete(lease, { output_cids, meta }, { signal: controller.signal });
      entry.settle(null);
    } catch (error) {
      entry.settle(error);
    }
  }
}

function isUnknown(error: unknown): boolean {
  return MillraceError.is(error) && error.code === 'unimplemented';
}
