/**
 * Long polls for work: who waits, in which order, and who is woken.
 *
 * A request first asks the store; only when there is nothing does it wait here. Waiters whose requests can be
 * answered by the same tasks form a line, first come first served. When something became runnable, the first of each
 * line asks (all lines in one batch, so one commit); a line whose asker got something has its next ones ask, twice
 * as many each time, and a line whose asker got nothing is left alone until the next change. So a thousand waiting
 * nodes and one new task cost one or two questions, not a thousand.
 *
 * Where the store can, that first round is part of the very commit that makes the tasks runnable (`Store.standBy`). On an
 * idle system the way from submit to runner then has one sync of the disk instead of two, and that is most of its time.
 *
 * Which tasks a node may take is in its record, which a new registration changes; a line's key is therefore made
 * when the wait begins and is only a hint. Should two nodes of a line differ by now, the periodic look (`RECHECK_MS`)
 * of some of each line still finds the task, or else their next requests do.
 */
import { MillraceError, type Clock, type Timer } from '@millrace/runner';
import type { LeaseAnswer, LeaseRequest, Outcome, Store } from './store.ts';
import type { Signals } from './signals.ts';

/** How often lines ask although nothing was signalled. */
const RECHECK_MS = 5_000;

/** So many of each line do: all of a thousand would be a thousand questions each time, for nothing as a rule. */
const RECHECK_ASKERS = 8;

/** Most questions in one batch, so that one wake never makes one long transaction. */
const MAX_BATCH = 128;

/** Most leases asked for within somebody else's commit, which waits for them. */
const MAX_STANDBY_LEASES = 256;

export interface LeaseQueueOptions {
  readonly store: Store;
  readonly signals: Signals;
  readonly clock: Clock;
}

interface Waiter {
  readonly request: LeaseRequest;
  readonly settle: (result: Outcome<LeaseAnswer>) => void;
  /** False once the client went away or its time is up. A lease it is given after that is handed back. */
  waiting: boolean;
  /** A question of it is with the store. */
  asking: boolean;
}

interface Question {
  readonly line: Line;
  readonly waiter: Waiter;
}

interface Line {
  readonly waiters: Set<Waiter>;
  /** Questions to ask in the next round; 0: none until the next change. */
  ask: number;
}

const NOTHING: LeaseAnswer = { leases: [], busy: false };

export class LeaseQueue implements AsyncDisposable {
  readonly #store: Store;
  readonly #clock: Clock;
  readonly #lines = new Map<string, Line>();
  readonly #subscriptions: readonly Disposable[];
  /** Leases being given back for waiters that left. */
  readonly #returns = new Set<Promise<void>>();
  /** Counts signals, so that one between a question and the wait that follows it is not lost. */
  #generation = 0;
  #pump: Promise<void> | null = null;
  #recheck: Timer | null = null;
  #closed = false;

  constructor(options: LeaseQueueOptions) {
    this.#store = options.store;
    this.#clock = options.clock;
    let standing: readonly Question[] = [];
    this.#subscriptions = [
      options.signals.onRunnable(() => this.#wake()),
      options.store.standBy({
        requests: () => {
          standing = this.#firstOfEachLine();
          return standing.map(({ waiter }) => waiter.request);
        },
        granted: (outcomes) => this.#hear(standing, outcomes),
      }),
    ];
  }

  /** Requests waiting now. */
  get waiting(): number {
    let count = 0;
    for (const line of this.#lines.values()) count += line.waiters.size;
    return count;
  }

  /**
   * Leases for one request, waiting up to `waitMs` for the first. Nothing within that time, or an abort of `signal`,
   * is an answer without leases. Leases granted to a request whose signal aborted meanwhile are released.
   *
   * @throws MillraceError as the store answered
   */
  async lease(request: LeaseRequest, waitMs: number, signal: AbortSignal): Promise<LeaseAnswer> {
    const generation = this.#generation;
    const [outcome] = await this.#store.lease([request]);
    const answer = valueOf(outcome);
    if (answer.leases.length > 0 || answer.busy || waitMs <= 0 || signal.aborted || this.#closed)
      return answer;
    // Asked for only now: a request that is answered at once does not need it.
    const key = await this.#lineKey(request);
    if (signal.aborted || this.#closed) return NOTHING;
    return await this.#wait(key, request, waitMs, signal, generation);
  }

  /** Gives leases back that nobody will work on. They do not count as attempts. */
  async release(request: LeaseRequest, answer: LeaseAnswer): Promise<void> {
    await this.#store.release(
      answer.leases.map((lease) => ({
        taskId: lease.task.id,
        nodeId: request.nodeId,
        leaseId: lease.leaseId,
        reason: 'shutdown' as const,
      })),
    );
  }

  /** Ends every wait with an empty answer. Waits for the question under way. */
  async close(): Promise<void> {
    this.#closed = true;
    for (const subscription of this.#subscriptions) subscription[Symbol.dispose]();
    this.#recheck?.cancel();
    for (const line of this.#lines.values()) {
      for (const waiter of line.waiters) waiter.settle({ ok: true, value: NOTHING });
    }
    await this.#pump;
    await Promise.all(this.#returns);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  #wait(
    key: string,
    request: LeaseRequest,
    waitMs: number,
    signal: AbortSignal,
    generation: number,
  ): Promise<LeaseAnswer> {
    const line = this.#lines.get(key) ?? { waiters: new Set(), ask: 0 };
    this.#lines.set(key, line);
    return new Promise((resolve, reject) => {
      const leave = (result: Outcome<LeaseAnswer>): void => {
        if (!waiter.waiting) return;
        waiter.waiting = false;
        timer.cancel();
        signal.removeEventListener('abort', onAbort);
        line.waiters.delete(waiter);
        if (line.waiters.size === 0 && this.#lines.get(key) === line) this.#lines.delete(key);
        if (result.ok) resolve(result.value);
        else reject(result.error);
      };
      const onAbort = (): void => leave({ ok: true, value: NOTHING });
      const waiter: Waiter = { request, waiting: true, asking: false, settle: leave };
      const timer = this.#clock.setTimer(onAbort, waitMs, { unref: true });
      signal.addEventListener('abort', onAbort, { once: true });
      line.waiters.add(waiter);
      if (generation !== this.#generation) {
        line.ask = Math.max(line.ask, 1);
        this.#start();
      }
      this.#armRecheck();
    });
  }

  async #lineKey(request: LeaseRequest): Promise<string> {
    const node = await this.#store.getNode(request.nodeId);
    if (node === null) throw new MillraceError('not_found', `node ${request.nodeId} is unknown`);
    return JSON.stringify([
      node.organization_id,
      node.mode,
      node.capabilities,
      Object.entries(node.labels).toSorted(([a], [b]) => (a < b ? -1 : 1)),
      request.capabilities,
      // What one such node has no room for may be just right for the next, and only it is helped when a task of its own ends.
      node.resources === undefined ? null : node.id,
    ]);
  }

  #wake(): void {
    this.#generation += 1;
    for (const line of this.#lines.values()) line.ask = Math.max(line.ask, 1);
    this.#start();
  }

  #armRecheck(): void {
    this.#recheck ??= this.#clock.setTimer(
      () => {
        this.#recheck = null;
        if (this.#closed || this.#lines.size === 0) return;
        for (const line of this.#lines.values()) line.ask = Math.max(line.ask, RECHECK_ASKERS);
        this.#start();
        this.#armRecheck();
      },
      RECHECK_MS,
      { unref: true },
    );
  }

  #start(): void {
    if (this.#closed) return;
    this.#pump ??= this.#ask().finally(() => {
      this.#pump = null;
      // A wake that came after the last round saw a pump still there.
      if ([...this.#lines.values()].some((line) => line.ask > 0)) this.#start();
    });
  }

  async #ask(): Promise<void> {
    for (;;) {
      const batch: Question[] = [];
      for (const line of this.#lines.values()) {
        let count = 0;
        for (const waiter of line.waiters) {
          if (count >= line.ask || batch.length >= MAX_BATCH) break;
          batch.push({ line, waiter });
          count += 1;
        }
        // Whatever is signalled from here on sets it anew.
        if (count > 0) line.ask = 0;
      }
      if (batch.length === 0 || this.#closed) return;
      for (const { waiter } of batch) waiter.asking = true;
      let outcomes: readonly Outcome<LeaseAnswer>[];
      try {
        outcomes = await this.#store.lease(batch.map(({ waiter }) => waiter.request));
      } catch (error) {
        const failed: Outcome<LeaseAnswer> = { ok: false, error: MillraceError.from(error) };
        for (const { waiter } of batch) waiter.settle(failed);
        continue;
      }
      this.#hear(batch, outcomes);
    }
  }

  /** Who asks within a commit. Those whose question is with the store already would be given twice as much. */
  #firstOfEachLine(): Question[] {
    const batch: Question[] = [];
    let leases = 0;
    for (const line of this.#lines.values()) {
      for (const waiter of line.waiters) {
        if (waiter.asking) continue;
        leases += waiter.request.max;
        if (batch.length >= MAX_BATCH || (batch.length > 0 && leases > MAX_STANDBY_LEASES)) return batch;
        batch.push({ line, waiter });
        break;
      }
    }
    return batch;
  }

  /** Hands the answers to those who asked and says how many of their lines ask next. */
  #hear(batch: readonly Question[], outcomes: readonly Outcome<LeaseAnswer>[]): void {
    const asked = new Map<Line, number>();
    for (const { line } of batch) asked.set(line, (asked.get(line) ?? 0) + 1);
    for (const [index, { line, waiter }] of batch.entries()) {
      const outcome = outcomes[index]!;
      waiter.asking = false;
      if (outcome.ok && outcome.value.leases.length === 0 && !outcome.value.busy) {
        // What those before it in this line got was the last.
        asked.delete(line);
        continue;
      }
      // A busy or failed asker says nothing about the tasks: the next in line shall ask too.
      if (waiter.waiting) waiter.settle(outcome);
      else if (outcome.ok) this.#giveBack(waiter.request, outcome.value);
    }
    for (const [line, count] of asked) line.ask = Math.max(line.ask, 2 * count);
    // Within the pump this finds it running; after somebody else's commit it begins the next round.
    if (asked.size > 0) this.#start();
  }

  #giveBack(request: LeaseRequest, answer: LeaseAnswer): void {
    // Should this fail, the lease expires by itself.
    const returned = this.release(request, answer)
      .catch(() => {})
      .finally(() => this.#returns.delete(returned));
    this.#returns.add(returned);
  }
}

function valueOf(outcome: Outcome<LeaseAnswer> | undefined): LeaseAnswer {
  if (outcome === undefined)
    throw new MillraceError('internal', 'the store answered a lease request with nothing');
  if (!outcome.ok) throw outcome.error;
  return outcome.value;
}
