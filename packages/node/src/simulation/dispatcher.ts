/**
 * A dispatcher without HTTP: the port the engine works against, over a real store. What the server's routes do with a
 * store is done here in the same way, long polls included; what is under test is everything on both sides of it.
 */
import { parseLease } from '@millrace/runner/decode';
import { sleep, type Clock, type Timer } from '@millrace/runner';
import type { Outcome, Store } from '@millrace/dispatch';
import type { Dms, Features, LeaseResult } from '@millrace/dispatch/client';
import type { Link } from './network.ts';
import { reply } from './scripted-dms.ts';

const TASK_LOG_BYTES = 256 * 1024;

const FEATURES: Features = {
  longPollSecs: 60,
  batchItems: 16,
  leaseIds: true,
  startOnLease: true,
  taskLogBytes: TASK_LOG_BYTES,
  registrationIntervalSecs: null,
};

const SWEEP_INTERVAL_MS = 1_000;

/** Told of every ending the store accepted, also when the same one is accepted again. */
export interface Observer {
  completed(taskId: string, leaseId: string): void;
  ended(taskId: string, leaseId: string, how: 'complete' | 'fail' | 'release'): void;
  released(taskId: string, reason: 'shutdown' | 'canceled' | 'setup_failed'): void;
}

export class SimulatedDispatcher {
  readonly store: Store;
  readonly #clock: Clock;
  readonly #observer: Observer;
  readonly #waiting = new Set<() => void>();
  readonly #subscription: Disposable;
  #sweepTimer: Timer | null = null;
  #closed = false;

  constructor(store: Store, clock: Clock, observer: Observer) {
    this.store = store;
    this.#clock = clock;
    this.#observer = observer;
    this.#subscription = store.subscribe((change) => {
      if (change.kind !== 'job') for (const wake of this.#waiting) wake();
    });
    void this.#sweep();
  }

  async close(): Promise<void> {
    this.#closed = true;
    this.#sweepTimer?.cancel();
    this.#subscription[Symbol.dispose]();
    await this.store[Symbol.asyncDispose]();
  }

  /** The task API as the node of this id sees it over this link. `features`: what this server has of ours. */
  dms(nodeId: string, link: Link, features: Partial<Features> = {}): Dms {
    const { store } = this;
    const offered = { ...FEATURES, ...features };
    const ref = (lease: { readonly taskId: string; readonly leaseId: string | null }) => ({
      ...lease,
      nodeId,
    });
    const ended = (
      taskId: string,
      [outcome]: readonly Outcome<{ readonly leaseId: string }>[],
      how: 'complete' | 'fail' | 'release',
    ): void => {
      const { leaseId } = valueOf(outcome);
      if (how === 'complete') this.#observer.completed(taskId, leaseId);
      this.#observer.ended(taskId, leaseId, how);
    };
    return {
      features: ({ signal } = {}) => link.call(() => Promise.resolve(offered), signal),
      lease: (request, { signal } = {}) =>
        link.call((gone) => this.#lease(nodeId, request, offered.leaseIds, gone), signal),
      heartbeat: (lease, body, { signal } = {}) =>
        link.call(async () => {
          const [outcome] = await store.heartbeat([{ ...ref(lease), ...body }]);
          const { cancel, expiresAt, task, domainId } = valueOf(outcome);
          return reply({
            access_token: `token-${this.#clock.now()}`,
            lease_expires_at: expiresAt,
            cancel,
            status: task.status,
            domain_id: domainId,
            serverTimeMs: this.#date(),
          });
        }, signal),
      complete: (lease, body, { signal } = {}) =>
        link.call(async () => {
          const outcome = await store.complete([{ ...ref(lease), outputCids: body.output_cids, meta: null }]);
          ended(lease.taskId, outcome, 'complete');
        }, signal),
      fail: (lease, { reason, details }, { signal } = {}) =>
        link.call(async () => {
          const retryable = (details as { readonly retryable?: boolean } | null)?.retryable !== false;
          const nodeFault = reason === 'node_setup_failed';
          const outcome = await store.fail([{ ...ref(lease), reason, details: null, retryable, nodeFault }]);
          ended(lease.taskId, outcome, 'fail');
        }, signal),
      release: (lease, reason, { signal } = {}) =>
        link.call(async () => {
          ended(lease.taskId, await store.release([{ ...ref(lease), reason }]), 'release');
          this.#observer.released(lease.taskId, reason);
        }, signal),
      appendLogs: (pieces, { signal } = {}) =>
        link.call(async () => {
          const outcomes = await store.appendLogs(
            pieces.map(({ lease, offset, lines }) => ({ ...ref(lease), offset, bytes: Buffer.from(lines) })),
            TASK_LOG_BYTES,
          );
          return outcomes.map((outcome) => {
            if (outcome.ok) return outcome.value;
            const wanted = outcome.error.details['next_offset'];
            return typeof wanted === 'number' ? { nextOffset: wanted } : { error: outcome.error };
          });
        }, signal),
      watch: (leaseIds, waitSecs, { signal } = {}) =>
        link.call(async (gone) => {
          const until = this.#clock.monotonic() + waitSecs * 1000;
          for (;;) {
            const found = await store.canceledLeases(nodeId, leaseIds);
            if (found.length > 0 || gone.aborted || this.#clock.monotonic() >= until) return found;
            await this.#change(until, gone);
          }
        }, signal),
    };
  }

  async #lease(
    nodeId: string,
    request: Parameters<Dms['lease']>[0],
    leaseIds: boolean,
    gone: AbortSignal,
  ): Promise<LeaseResult> {
    const until = this.#clock.monotonic() + request.waitSecs * 1000;
    for (;;) {
      const { max, start } = request;
      const [outcome] = await this.store.lease([{ nodeId, max, capabilities: null, start }]);
      const answer = valueOf(outcome);
      if (answer.busy) return { kind: 'busy' };
      if (answer.leases.length > 0) {
        return {
          kind: 'leases',
          leases: answer.leases.map(({ leaseId, expiresAt, domainId, task }) => ({
            leaseId: leaseIds ? leaseId : null,
            serverTimeMs: this.#date(),
            envelope: parseLease({
              access_token: 'token',
              lease_expires_at: expiresAt,
              status: task.status,
              domain_id: domainId,
              domain_server_url: 'http://127.0.0.1:7070',
              task,
            }),
          })),
        };
      }
      if (gone.aborted || this.#clock.monotonic() >= until) return { kind: 'none' };
      await this.#change(until, gone);
    }
  }

  /** The header `Date` as the client understands it. */
  #date(): number {
    return Math.ceil(this.#clock.now() / 1000) * 1000;
  }

  /** Until the store changed, the time is up, or nobody waits any more. */
  async #change(until: number, gone: AbortSignal): Promise<void> {
    const woken = new AbortController();
    const wake = (): void => woken.abort(null);
    this.#waiting.add(wake);
    gone.addEventListener('abort', wake, { once: true });
    await sleep(this.#clock, Math.max(0, until - this.#clock.monotonic()), woken.signal).catch(
      () => undefined,
    );
    this.#waiting.delete(wake);
    gone.removeEventListener('abort', wake);
  }

  async #sweep(): Promise<void> {
    const { nextAtMs } = await this.store.sweep();
    if (this.#closed) return;
    const nextMs = nextAtMs === null ? SWEEP_INTERVAL_MS : nextAtMs - this.#clock.now();
    this.#sweepTimer = this.#clock.setTimer(
      () => void this.#sweep(),
      Math.max(1, Math.min(SWEEP_INTERVAL_MS, nextMs)),
    );
  }
}

function valueOf<T>(outcome: Outcome<T> | undefined): T {
  if (outcome === undefined) throw new Error('the store left an item of a batch unanswered');
  if (!outcome.ok) throw outcome.error;
  return outcome.value;
}
