/**
 * Measures the JavaScript heap of worker threads from outside, also while they are busy.
 *
 * A worker's `resourceLimits` alone cannot hold a memory limit: when one allocation overshoots it by more
 * than 16 MiB (an array of numbers that grows, a large Map), V8 ends the whole process, and with it every
 * lease of the node. Tried on Node 20 with a limit of 512 MiB, half of the ordinary ways to leak did that. So
 * V8's own limit is set higher, by {@link HEADROOM_MIB}, and the real one is kept here: the heap is looked at
 * ten times a second, and when it is over, a garbage collection tells whether that is live. The inspector can
 * do both to a thread that never yields.
 *
 * `worker.getHeapStatistics()` of newer Nodes would do for the first step, but cannot collect.
 */
import type { Session } from 'node:inspector';
import type { Clock, Timer } from '@millrace/runner';

/**
 * The largest single allocation V8 makes is about 1 GiB; so much may come on top before the process is in
 * danger.
 */
export const HEADROOM_MIB = 1088;
const SAMPLE_MS = 100;
const MIB = 1024 * 1024;

/** One connection to the inspector of this process, shared by everything that watches. */
export class HeapWatch {
  static #shared: { readonly opened: Promise<HeapWatch | null>; users: number } | null = null;

  readonly #session: Session;
  /** Inspector session of each worker, by thread id. */
  readonly #sessions = new Map<number, string>();
  readonly #pending = new Map<number, { readonly session: string; resolve(result: unknown): void }>();
  #lastId = 0;

  /**
   * Null where this process has no inspector for workers: inside a worker thread, or a Node built without it.
   */
  static open(): Promise<HeapWatch | null> {
    HeapWatch.#shared ??= { opened: HeapWatch.#connect(), users: 0 };
    HeapWatch.#shared.users += 1;
    return HeapWatch.#shared.opened;
  }

  /** Gives back what `open` gave. The last one disconnects. */
  static async release(): Promise<void> {
    const shared = HeapWatch.#shared;
    if (shared === null || (shared.users -= 1) > 0) return;
    HeapWatch.#shared = null;
    const watch = await shared.opened;
    if (watch !== null) watch.#disconnect();
  }

  static async #connect(): Promise<HeapWatch | null> {
    try {
      const { Session } = await import('node:inspector');
      const session = new Session();
      session.connect();
      const watch = new HeapWatch(session);
      await new Promise<void>((resolve, reject) => {
        session.post('NodeWorker.enable', { waitForDebuggerOnStart: false }, (error) =>
          error ? reject(error) : resolve(),
        );
      });
      return watch;
    } catch {
      // The caller falls back on V8's own limit.
      return null;
    }
  }

  private constructor(session: Session) {
    this.#session = session;
    session.on('NodeWorker.attachedToWorker', ({ params: { workerInfo, sessionId } }) => {
      // Its `workerId` counts the workers of the session; the thread's own id is in the title only.
      const [, thread] = /^\[worker (\d+)\]/i.exec(workerInfo.title) ?? [];
      if (thread !== undefined) this.#sessions.set(Number(thread), sessionId);
    });
    session.on('NodeWorker.detachedFromWorker', ({ params: { sessionId } }) => {
      for (const [thread, session] of this.#sessions)
        if (session === sessionId) this.#sessions.delete(thread);
      for (const [id, call] of this.#pending) if (call.session === sessionId) this.#settle(id, null);
    });
    session.on('NodeWorker.receivedMessageFromWorker', ({ params }) => {
      const { id, result } = JSON.parse(params.message) as { id?: number; result?: unknown };
      if (id !== undefined) this.#settle(id, result ?? null);
    });
  }

  /** Bytes of heap in use, garbage included; null when the thread is gone. */
  async used(thread: number): Promise<number | null> {
    const usage = (await this.#call(thread, 'Runtime.getHeapUsage')) as { usedSize: number } | null;
    return usage?.usedSize ?? null;
  }

  /** Bytes of heap in use after a garbage collection; null when the thread is gone. */
  async live(thread: number): Promise<number | null> {
    // Asking a sampling profile for its result collects garbage at once; `HeapProfiler.collectGarbage` waits
    // for the thread's event loop, which a busy one never reaches. The interval keeps the profile itself
    // empty.
    const steps = [
      this.#call(thread, 'HeapProfiler.startSampling', { samplingInterval: 2 ** 30 }),
      this.#call(thread, 'HeapProfiler.getSamplingProfile'),
      this.used(thread),
      this.#call(thread, 'HeapProfiler.stopSampling'),
    ] as const;
    const [, , used] = await Promise.all(steps);
    return used;
  }

  #call(thread: number, method: string, params: object = {}): Promise<unknown> {
    const session = this.#sessions.get(thread);
    if (session === undefined) return Promise.resolve(null);
    const id = ++this.#lastId;
    const message = JSON.stringify({ id, method, params });
    return new Promise((resolve) => {
      this.#pending.set(id, { session, resolve });
      this.#session.post('NodeWorker.sendMessageToWorker', { sessionId: session, message }, (error) => {
        if (error) this.#settle(id, null);
      });
    });
  }

  #settle(id: number, result: unknown): void {
    this.#pending.get(id)?.resolve(result);
    this.#pending.delete(id);
  }

  #disconnect(): void {
    for (const id of this.#pending.keys()) this.#settle(id, null);
    this.#sessions.clear();
    this.#session.disconnect();
  }
}

/** Keeps one thread to its limit while it is busy. */
export class HeapGuard {
  readonly #watch: HeapWatch;
  readonly #thread: number;
  readonly #limitMiB: number;
  readonly #clock: Clock;
  readonly #onBreach: (liveMiB: number) => void;
  #timer: Timer | null = null;
  #active = false;
  #sampling = false;
  /** Above this much in use, a collection tells how much is live. Kept a little above what was live last. */
  #checkAboveMiB: number;
  #peakBytes = 0;

  constructor(options: {
    readonly watch: HeapWatch;
    readonly thread: number;
    readonly limitMiB: number;
    readonly clock: Clock;
    readonly onBreach: (liveMiB: number) => void;
  }) {
    this.#watch = options.watch;
    this.#thread = options.thread;
    this.#limitMiB = options.limitMiB;
    this.#clock = options.clock;
    this.#onBreach = options.onBreach;
    this.#checkAboveMiB = options.limitMiB;
  }

  /** The most heap in use that was seen since {@link start}; null: it was not looked at, ten times a second. */
  get peakBytes(): number | null {
    return this.#peakBytes === 0 ? null : this.#peakBytes;
  }

  start(): void {
    this.#active = true;
    this.#peakBytes = 0;
    if (this.#timer === null && !this.#sampling) this.#arm();
  }

  /** The timer stays: threads that do short tasks would set and clear one for each. */
  stop(): void {
    this.#active = false;
  }

  #arm(): void {
    this.#timer = this.#clock.setTimer(() => void this.#sample(), SAMPLE_MS, { unref: true });
  }

  async #sample(): Promise<void> {
    this.#timer = null;
    if (!this.#active) return;
    this.#sampling = true;
    const used = (await this.#watch.used(this.#thread)) ?? 0;
    if (this.#active) this.#peakBytes = Math.max(this.#peakBytes, used);
    if (used > this.#checkAboveMiB * MIB && this.#active) {
      const live = ((await this.#watch.live(this.#thread)) ?? 0) / MIB;
      const slack = Math.max(32, this.#limitMiB / 8);
      this.#checkAboveMiB = Math.max(this.#limitMiB, live + slack);
      if (live > this.#limitMiB && this.#active) {
        this.#active = false;
        this.#onBreach(live);
      }
    }
    this.#sampling = false;
    if (this.#active && this.#timer === null) this.#arm();
  }
}
