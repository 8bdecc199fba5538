/**
 * Worker threads for guests, as their caller sees them: hand in a job, get its one ending.
 *
 * Three kinds of thread. The caller's queues and talks to the guests directly, so a small call costs a wake-up one way and a
 * message back. The guests run one call at a time. The supervisor owns them and kills what is late or canceled, also while
 * the caller's thread is busy; a killed guest is replaced, and nothing of it is left.
 */
import { availableParallelism } from 'node:os';
import { Worker, receiveMessageOnPort } from 'node:worker_threads';
import type { MessagePort } from 'node:worker_threads';
import { computeError } from '../errors.ts';
import type { GuestFailure, GuestLimits, Library } from './guest-engine.ts';
import type { GuestMessage, Job, SupervisorData, SupervisorMessage, SupervisorRequest } from './protocol.ts';
import { Attention, PHASE, SHARED_BYTES, Slot, phaseOf, stateOf, withPhase } from './slot.ts';
import type { Measures } from './slot.ts';

export interface GuestPoolOptions {
  /** Guests that can run at once, 1 to 256, each about 8 MB when idle. Default: the CPUs there are, plus one to hide a restart. */
  readonly workers?: number;
  /** Calls that may wait for a free worker, 0 to 1,000,000; more are refused as `busy`. Default 1,024. */
  readonly maxQueue?: number;
}

/** Something guests can be told to run. Made once for an artifact and what its prepared form depends on. */
export interface PoolCode {
  /** Names it in this process. */
  readonly number: number;
  /** URL of the engine's worker side, a module that exports `guest`. */
  readonly engine: string;
  readonly key: string;
  readonly source: Uint8Array;
  readonly libraries: readonly Library[];
  /** Set by the pool, once a guest has prepared it. */
  prepared: unknown;
}

let lastCode = 0;

/** Code that no guest has prepared yet. */
export function poolCode(
  engine: string,
  key: string,
  source: Uint8Array,
  libraries: readonly Library[] = [],
): PoolCode {
  lastCode += 1;
  return { number: lastCode, engine, key, source, libraries, prepared: undefined };
}

/** A call for the pool. */
export interface PoolCall {
  readonly code: PoolCode;
  readonly input: Uint8Array;
  readonly limits: GuestLimits;
  /** Hears diagnostics while the guest runs. Must not throw. */
  readonly onLog: ((bytes: Uint8Array) => void) | null;
  readonly signal: AbortSignal | undefined;
}

/** How a call ended, and what was measured. */
export type PoolEnding = {
  readonly queuedMs: number;
  /** Whether the guest began to run; if not, it ended while its code was prepared. */
  readonly started: boolean;
  readonly measures: Measures;
} & (
  | { readonly kind: 'done'; readonly output: Uint8Array }
  | { readonly kind: 'failed'; readonly failure: GuestFailure; readonly logExcerpt: string }
  /** It ran out of time, was canceled, or its thread ended by itself. The thread is gone. */
  | { readonly kind: 'late' }
  | { readonly kind: 'canceled' }
  | { readonly kind: 'died'; readonly error: string | null }
);

interface Pending {
  readonly call: PoolCall;
  readonly queuedAt: number;
  startedAt: number;
  readonly resolve: (ending: PoolEnding) => void;
  readonly reject: (error: unknown) => void;
  readonly onAbort: () => void;
}

interface Guest {
  readonly id: number;
  readonly port: MessagePort;
  readonly slot: Slot;
  ready: boolean;
  /** Numbers of the code it has been told of, longest ago first. */
  readonly known: Set<number>;
  call: number;
  logBytes: number;
  pending: Pending | null;
}

/** Code a guest keeps at most. */
const KNOWN_BY_GUEST = 64;
type Ended =
  | { readonly kind: 'done'; readonly output: Uint8Array }
  | { readonly kind: 'failed'; readonly failure: GuestFailure; readonly logExcerpt: string };

/** Call numbers share 32 bits with the phase. */
const MAX_CALL = 2 ** 27;

/** Owns its threads from the first call or {@link ready} on. While nothing runs, they do not keep the process alive. */
export class GuestPool implements AsyncDisposable {
  readonly #workers: number;
  readonly #maxQueue: number;
  readonly #engines = new Set<string>();
  readonly #guests = new Map<number, Guest>();
  readonly #idle: Guest[] = [];
  readonly #queue: Pending[] = [];
  readonly #waiting: { readonly resolve: () => void; readonly reject: (error: unknown) => void }[] = [];
  #supervisor: Worker | null = null;
  #attention = new Attention();
  #lastCall = 0;
  #active = 0;
  /** Set when a guest could not be started; the next call has it tried again. */
  #stuck = false;
  #closed: Promise<void> | null = null;

  /** @throws MillraceError `invalid_argument` for an option out of its bounds. */
  constructor(options: GuestPoolOptions = {}) {
    this.#workers = checked('workers', options.workers ?? Math.min(256, availableParallelism() + 1), 1, 256);
    this.#maxQueue = checked('maxQueue', options.maxQueue ?? 1_024, 0, 1_000_000);
  }

  /** Has workers import an engine's worker side before they are needed. Harmless when repeated. */
  preload(engine: string): void {
    if (this.#engines.has(engine)) return;
    this.#engines.add(engine);
    if (this.#supervisor !== null) this.#request({ kind: 'preload', engine });
  }

  /** Starts the workers, if that was not done, and resolves when all of them are ready. */
  async ready(): Promise<void> {
    this.#start();
    while (this.#readyCount() < this.#workers) {
      await new Promise<void>((resolve, reject) => {
        this.#waiting.push({ resolve, reject });
        this.#hold();
      }).finally(() => this.#letGo());
    }
  }

  /** Workers that exist and could take or are at a call. */
  get size(): number {
    return this.#guests.size;
  }

  /**
   * Runs a call to its ending. Endings are values; it rejects only when the call never began: `resource_exhausted` (reason
   * `busy`), `failed_precondition` (`closed`), `unavailable` (`host`, no worker can be started), or the signal's
   * reason when it was still waiting.
   */
  run(call: PoolCall): Promise<PoolEnding> {
    return new Promise((resolve, reject) => {
      if (this.#closed !== null) throw closed();
      call.signal?.throwIfAborted();
      this.#start();
      if (this.#idle.length === 0 && this.#queue.length >= this.#maxQueue) {
        throw computeError(
          'resource_exhausted',
          'busy',
          `compute: all ${this.#workers} workers are busy and ${this.#queue.length} calls wait, the most that may (maxQueue)`,
          { details: { limit: 'maxQueue', value: this.#maxQueue } },
        );
      }
      const now = performance.now();
      const pending: Pending = {
        call,
        queuedAt: now,
        startedAt: now,
        resolve,
        reject,
        onAbort: () => this.#abort(pending),
      };
      call.signal?.addEventListener('abort', pending.onAbort, { once: true });
      this.#hold();
      // The last that ran, whose memory is the warmest. It may still be busy ahead of this call; waking another one instead was
      // slower.
      const guest = this.#idle.pop();
      if (guest === undefined) this.#queue.push(pending);
      else this.#post(guest, pending);
    });
  }

  /** Ends all threads; calls under way or waiting reject as `closed`. Resolves when the threads are gone. */
  close(): Promise<void> {
    this.#closed ??= this.#close();
    return this.#closed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #close(): Promise<void> {
    const supervisor = this.#supervisor;
    this.#supervisor = null;
    const under = [...this.#guests.values()];
    const waiting = this.#queue.splice(0);
    for (const one of this.#waiting.splice(0)) one.reject(closed());
    // Its workers end with it.
    await supervisor?.terminate();
    for (const guest of under) {
      guest.port.close();
      if (guest.pending !== null) this.#fail(guest.pending, closed());
    }
    for (const pending of waiting) this.#fail(pending, closed());
    this.#guests.clear();
    this.#idle.length = 0;
  }

  #start(): void {
    if (this.#supervisor !== null) {
      if (this.#stuck) {
        this.#stuck = false;
        this.#request({ kind: 'fill' });
      }
      return;
    }
    if (this.#closed !== null) throw closed();
    this.#attention = new Attention();
    const data: SupervisorData = {
      attention: this.#attention.shared,
      workers: this.#workers,
      preload: [...this.#engines],
    };
    const supervisor = new Worker(new URL('./supervisor.js', import.meta.url), {
      name: 'millrace-compute-supervisor',
      workerData: data,
      env: {},
      argv: [],
      execArgv: [],
      // Never read: it prints nothing, and a stream that is read would keep the process alive.
      stdout: true,
      stderr: true,
    });
    this.#supervisor = supervisor;
    let error: string | null = null;
    supervisor.on('message', (message: SupervisorMessage) => this.#heard(message));
    supervisor.on(
      'error',
      (cause: unknown) => (error = cause instanceof Error ? cause.message : String(cause)),
    );
    supervisor.on('exit', () => this.#lostSupervisor(supervisor, error));
    if (this.#active === 0) supervisor.unref();
  }

  #request(request: SupervisorRequest): void {
    this.#supervisor?.postMessage(request);
  }

  #heard(message: SupervisorMessage): void {
    if (message.kind === 'guest') {
      const guest: Guest = {
        id: message.guest,
        port: message.port,
        slot: new Slot(message.slot),
        ready: false,
        known: new Set(),
        call: 0,
        logBytes: 0,
        pending: null,
      };
      this.#guests.set(guest.id, guest);
      guest.port.on('message', (said: GuestMessage) => this.#said(guest, said));
      // Listening holds the process; the supervisor does that, while there is something to wait for.
      guest.port.unref();
      return;
    }
    const guest = this.#guests.get(message.guest);
    if (guest === undefined) return;
    // What it said before it ended may be on its way still, and is what counts.
    for (let last = receiveMessageOnPort(guest.port); last; last = receiveMessageOnPort(guest.port)) {
      this.#said(guest, last.message as GuestMessage);
    }
    this.#remove(guest, message.error);
    if (!message.booted) this.#cannotStart(message.error);
  }

  #said(guest: Guest, message: GuestMessage): void {
    if (typeof message === 'number') {
      const { pending: done } = guest;
      if (done === null || message !== guest.call) return;
      this.#ended(guest, done, { kind: 'done', output: guest.slot.takeResult() });
      return;
    }
    if (message.kind === 'ready') {
      guest.ready = true;
      this.#next(guest);
      if (this.#readyCount() >= this.#workers) for (const one of this.#waiting.splice(0)) one.resolve();
      return;
    }
    const { pending } = guest;
    if (pending === null || message.call !== guest.call) return;
    switch (message.kind) {
      case 'log':
        guest.logBytes += message.bytes.length;
        pending.call.onLog?.(message.bytes);
        return;
      case 'prepared':
        pending.call.code.prepared = message.prepared;
        return;
      case 'done':
        this.#ended(guest, pending, { kind: 'done', output: message.output });
        return;
      case 'failed':
        this.#ended(guest, pending, {
          kind: 'failed',
          failure: message.failure,
          logExcerpt: message.logExcerpt,
        });
    }
  }

  #ended(guest: Guest, pending: Pending, how: Ended): void {
    guest.pending = null;
    const { started, measures } = guest.slot;
    const queuedMs = pending.startedAt - pending.queuedAt;
    this.#next(guest);
    this.#settle(pending, { queuedMs, started, measures, ...how });
  }

  /** The guest takes the call that waits longest, or rests. */
  #next(guest: Guest): void {
    const pending = this.#queue.shift();
    if (pending === undefined) this.#idle.push(guest);
    else this.#post(guest, pending);
  }

  #post(guest: Guest, pending: Pending): void {
    const { code, input, limits } = pending.call;
    this.#lastCall = (this.#lastCall + 1) % MAX_CALL;
    guest.call = this.#lastCall;
    guest.logBytes = 0;
    guest.pending = pending;
    pending.startedAt = performance.now();
    if (input.length <= SHARED_BYTES && guest.known.has(code.number)) {
      guest.slot.post(guest.call, limits, { code: code.number, input });
    } else this.#send(guest, pending.call);
    guest.slot.wake();
    if (this.#attention.claimWake()) this.#request({ kind: 'wake' });
  }

  /** A call the slot has no room for, or whose code the guest does not know. */
  #send(guest: Guest, { code, input, limits }: PoolCall): void {
    let define: Job['define'];
    let forget: Job['forget'];
    if (!guest.known.has(code.number)) {
      const { engine, key, source, libraries, prepared } = code;
      define = { engine, key, source, libraries, prepared };
      guest.known.add(code.number);
      if (guest.known.size > KNOWN_BY_GUEST) {
        [forget] = guest.known;
        guest.known.delete(forget as number);
      }
    }
    guest.slot.post(guest.call, limits, null);
    // The guest gets a copy of the input that is its own; a view into a larger buffer would take all of that along.
    const job: Job = { call: guest.call, code: code.number, define, forget, input: new Uint8Array(input) };
    guest.port.postMessage(job);
  }

  #abort(pending: Pending): void {
    const at = this.#queue.indexOf(pending);
    if (at >= 0) {
      this.#queue.splice(at, 1);
      this.#fail(pending, pending.call.signal?.reason);
      return;
    }
    for (const guest of this.#guests.values()) {
      if (guest.pending !== pending) continue;
      for (const phase of [PHASE.preparing, PHASE.running]) {
        const state = stateOf(guest.call, phase);
        if (!guest.slot.move(state, withPhase(state, PHASE.canceled))) continue;
        this.#request({ kind: 'kill', guest: guest.id });
        return;
      }
      // It has ended by itself, or is being killed for being late: that is what will be told.
    }
  }

  /** The thread is gone. What its call ended with is in the state it left. */
  #remove(guest: Guest, error: string | null): void {
    this.#guests.delete(guest.id);
    const at = this.#idle.indexOf(guest);
    if (at >= 0) this.#idle.splice(at, 1);
    guest.port.close();
    const { pending } = guest;
    if (pending === null) return;
    guest.pending = null;
    const phase = phaseOf(guest.slot.state);
    const { started, remains } = guest.slot;
    this.#settle(pending, {
      queuedMs: pending.startedAt - pending.queuedAt,
      started,
      // Only what has been heard is known.
      measures: { ...remains, logBytes: guest.logBytes, logDroppedBytes: 0, fuelUsed: null },
      ...(phase === PHASE.late || phase === PHASE.canceled
        ? { kind: phase === PHASE.late ? 'late' : 'canceled' }
        : { kind: 'died', error }),
    });
  }

  #cannotStart(error: string | null): void {
    this.#stuck = true;
    if (this.#readyCount() > 0) return;
    const problem = computeError(
      'unavailable',
      'host',
      `compute: no worker thread could be started: ${error ?? 'it ended at once'}`,
    );
    for (const pending of this.#queue.splice(0)) this.#fail(pending, problem);
    for (const one of this.#waiting.splice(0)) one.reject(problem);
  }

  /** Never seen, and so the end of everything that was under way; the next call starts over. */
  #lostSupervisor(supervisor: Worker, error: string | null): void {
    if (this.#supervisor !== supervisor) return;
    this.#supervisor = null;
    for (const guest of this.#guests.values()) this.#remove(guest, error ?? 'the supervisor ended');
    this.#cannotStart(error ?? 'the supervisor ended');
    this.#stuck = false;
  }

  #readyCount(): number {
    let count = 0;
    for (const guest of this.#guests.values()) if (guest.ready) count += 1;
    return count;
  }

  #settle(pending: Pending, ending: PoolEnding): void {
    pending.call.signal?.removeEventListener('abort', pending.onAbort);
    this.#letGo();
    pending.resolve(ending);
  }

  #fail(pending: Pending, error: unknown): void {
    pending.call.signal?.removeEventListener('abort', pending.onAbort);
    this.#letGo();
    pending.reject(error);
  }

  #hold(): void {
    this.#active += 1;
    if (this.#active === 1) this.#supervisor?.ref();
  }

  #letGo(): void {
    this.#active -= 1;
    if (this.#active === 0) this.#supervisor?.unref();
  }
}

function closed(): Error {
  return computeError('failed_precondition', 'closed', 'compute: closed; open another one');
}

function checked(name: string, value: number, least: number, most: number): number {
  if (Number.isSafeInteger(value) && value >= least && value <= most) return value;
  throw computeError(
    'invalid_argument',
    'bad-limit',
    `compute: ${name} must be a whole number from ${least} to ${most}, got ${String(value)}`,
  );
}
