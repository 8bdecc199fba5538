/**
 * What the tasks of a job said, as one sequence: the logs of their attempts, and the log events of nodes that keep none.
 *
 * Up to now the sources are merged by time. From there on, with `follow`, lines come as they come; every source goes on from
 * where it was read to, so nothing is left out and nothing comes twice.
 */
import { setMaxListeners } from 'node:events';
import type { JobEvent } from '@millrace/dispatch';
import type { Requestor, TaskLogPage } from '@millrace/dispatch/client';
import { MillraceError, type Json } from '@millrace/runner';

/** Where a line comes from: what a program printed, `ctx.log`, `logEvent`. */
export const LOG_SOURCES = ['stdout', 'stderr', 'log', 'event'] as const;
export type LogSource = (typeof LOG_SOURCES)[number];

export interface LogLine {
  /** RFC 3339. */
  readonly at: string;
  readonly taskId: string;
  /** Counted from 1 over all leases of the task. */
  readonly attempt: number;
  readonly source: LogSource;
  /** What it says, without `at`. */
  readonly said: Readonly<Record<string, Json>>;
}

export interface LogScope {
  readonly jobId: string;
  /** Tasks whose lines are wanted. */
  readonly taskIds: ReadonlySet<string>;
  /** Only this attempt of each; null: all. */
  readonly attempt: number | null;
  /** Where to begin, for one task and one attempt. */
  readonly offset: number;
}

/** Bytes of pages held while sources are merged. */
const MERGE_BYTES = 4 * 1024 * 1024;
const PAGE_BYTES = { least: 4 * 1024, most: 256 * 1024 };

/** Requests that wait at the dispatcher at once; with more tasks than that each waits for shorter. */
const MAX_WAITING = 24;
const WAIT_SECS = 25;
const SHARED_WAIT_SECS = 1;

/** Where the sources were read to. */
interface Positions {
  afterSeq: number;
  readonly tasks: Map<string, { leases: number; ended: boolean; attempt: number; offset: number }>;
}

/** Everything said so far, by time; with `follow`, then everything until the job ends. */
export async function* readLogs(
  requestor: Requestor,
  scope: LogScope,
  options: { readonly follow: boolean; readonly signal: AbortSignal },
): AsyncGenerator<LogLine, void, undefined> {
  const { signal } = options;
  // A listener per request under way is no leak.
  setMaxListeners(0, signal);
  const positions: Positions = {
    afterSeq: 0,
    tasks: new Map([...scope.taskIds].map((id) => [id, { leases: 0, ended: false, attempt: 0, offset: 0 }])),
  };
  const told = await eventsSoFar(requestor, scope, positions, signal);
  // After the events: whoever has ended by then has said everything.
  const known = await requestor.jobLogs(scope.jobId, { signal }).catch((error: unknown) => {
    if (MillraceError.is(error) && error.code === 'not_found') return null;
    throw error;
  });
  // An older dispatcher keeps no logs; there all lines are events.
  const logs = (known ?? []).filter(
    ({ task_id, attempt }) =>
      scope.taskIds.has(task_id) && (scope.attempt === null || attempt === scope.attempt),
  );
  const pageBytes = Math.max(
    PAGE_BYTES.least,
    Math.min(PAGE_BYTES.most, Math.floor(MERGE_BYTES / Math.max(1, logs.length))),
  );
  yield* merge([
    fromArray(told),
    ...logs.map((log) => soFar(requestor, scope, log, pageBytes, positions, signal)),
  ]);
  if (options.follow) yield* follow(requestor, scope, positions, known !== null, signal);
}

/** The unlogged log events, and in `positions` how often each task was leased and whether it has ended. */
async function eventsSoFar(
  requestor: Requestor,
  scope: LogScope,
  positions: Positions,
  signal: AbortSignal,
): Promise<LogLine[]> {
  const lines: LogLine[] = [];
  for await (const event of requestor.events(scope.jobId, { signal, follow: false })) {
    const line = take(event, scope, positions);
    if (line !== null) lines.push(line);
  }
  return lines;
}

/** Keeps `positions` and gives the line that an event is, if it is one that no log has. */
function take(event: JobEvent, scope: LogScope, positions: Positions): LogLine | null {
  positions.afterSeq = event.seq;
  const task = event.task_id === null ? undefined : positions.tasks.get(event.task_id);
  if (task === undefined || event.task_id === null) return null;
  if (event.kind === 'task.leased') task.leases += 1;
  if (event.kind === 'task.completed' || event.kind === 'task.failed' || event.kind === 'task.canceled') {
    task.ended = true;
  }
  if (event.kind !== 'task.log' || event.data['logged'] === true) return null;
  if (scope.attempt !== null && task.leases !== scope.attempt) return null;
  return {
    at: event.at,
    taskId: event.task_id,
    attempt: task.leases,
    source: 'event',
    said: { event: event.data['event'] ?? null },
  };
}

/** One log up to what it has now. */
async function* soFar(
  requestor: Requestor,
  scope: LogScope,
  log: { readonly task_id: string; readonly attempt: number; readonly size: number },
  limit: number,
  positions: Positions,
  signal: AbortSignal,
): AsyncGenerator<LogLine, void, undefined> {
  const { task_id: taskId, attempt, size } = log;
  const lines = new LineSplitter(taskId, attempt);
  let offset = scope.offset;
  for (;;) {
    const page = await requestor.taskLog(taskId, { attempt, offset, limit }, { signal });
    offset = page.nextOffset;
    yield* lines.split(page);
    if (offset >= size || page.bytes.byteLength === 0) break;
  }
  const position = positions.tasks.get(taskId);
  if (position !== undefined && attempt > position.attempt) Object.assign(position, { attempt, offset });
}

/** Lines from here on: those of the logs, and the events that no log has, until the job's end. */
async function* follow(
  requestor: Requestor,
  scope: LogScope,
  positions: Positions,
  keepsLogs: boolean,
  signal: AbortSignal,
): AsyncGenerator<LogLine, void, undefined> {
  const stop = new AbortController();
  setMaxListeners(0, stop.signal);
  const onAbort = (): void => stop.abort(signal.reason);
  if (signal.aborted) onAbort();
  signal.addEventListener('abort', onAbort, { once: true });
  const queue = new LineQueue();
  const turns = new Turns(MAX_WAITING);
  const tails = new Map<string, { again: boolean }>();
  const works = new Set<Promise<void>>();

  const begin = (work: () => Promise<void>): void => {
    const done = work()
      .catch((error: unknown) => queue.fail(error))
      .finally(() => {
        works.delete(done);
        if (works.size === 0) queue.close();
      });
    works.add(done);
  };

  const tail = (taskId: string): void => {
    if (!keepsLogs) return;
    const known = tails.get(taskId);
    if (known !== undefined) {
      known.again = true;
      return;
    }
    const state = { again: false };
    tails.set(taskId, state);
    begin(async () => {
      do {
        state.again = false;
        await readOn(taskId);
      } while (state.again);
      tails.delete(taskId);
    });
  };

  /** From where the task was read to up to the end of its newest attempt. */
  const readOn = async (taskId: string): Promise<void> => {
    const position = positions.tasks.get(taskId);
    if (position === undefined) return;
    position.attempt = scope.attempt ?? Math.max(1, position.attempt);
    let lines = new LineSplitter(taskId, position.attempt);
    // Asked for an attempt still to come: a later lease begins here again.
    while (position.attempt <= position.leases) {
      const { attempt, offset } = position;
      const page = await turns.take((shared) =>
        requestor.taskLog(
          taskId,
          { attempt, offset, waitSecs: shared ? SHARED_WAIT_SECS : WAIT_SECS },
          { signal: stop.signal },
        ),
      );
      await queue.push(Array.from(lines.split(page)), stop.signal);
      position.offset = page.nextOffset;
      if (!page.ended || page.nextOffset < page.size) continue;
      if (scope.attempt !== null || page.attempts <= attempt) return;
      position.attempt += 1;
      position.offset = 0;
      position.leases = Math.max(position.leases, page.attempts);
      lines = new LineSplitter(taskId, position.attempt);
    }
  };

  begin(async () => {
    for (const [taskId, { leases, ended }] of positions.tasks) if (leases > 0 && !ended) tail(taskId);
    const { afterSeq: after } = positions;
    for await (const event of requestor.events(scope.jobId, { signal: stop.signal, after })) {
      const line = take(event, scope, positions);
      if (line !== null) await queue.push([line], stop.signal);
      if (event.kind === 'task.leased' && event.task_id !== null && positions.tasks.has(event.task_id)) {
        tail(event.task_id);
      }
    }
  });
  try {
    yield* queue.lines();
  } finally {
    signal.removeEventListener('abort', onAbort);
    stop.abort(new Error('nobody reads the log any more'));
    await Promise.all(works);
  }
}

/** From pages of one log, which may be cut anywhere, to its lines. */
export class LineSplitter {
  readonly #taskId: string;
  readonly #attempt: number;
  #rest: Uint8Array = new Uint8Array();

  constructor(taskId: string, attempt: number) {
    this.#taskId = taskId;
    this.#attempt = attempt;
  }

  *split(page: Pick<TaskLogPage, 'bytes'>): Generator<LogLine, void, undefined> {
    const bytes = Buffer.concat([this.#rest, page.bytes]);
    const end = bytes.lastIndexOf(0x0a) + 1;
    this.#rest = bytes.subarray(end);
    if (end === 0) return;
    for (const text of bytes.toString('utf8', 0, end - 1).split('\n')) yield this.#line(text);
  }

  #line(text: string): LogLine {
    const { at, ...said } = parseLine(text);
    const { stream } = said;
    return {
      at: typeof at === 'string' ? at : '',
      taskId: this.#taskId,
      attempt: this.#attempt,
      source:
        stream === 'stdout' || stream === 'stderr' ? stream : Object.hasOwn(said, 'event') ? 'event' : 'log',
      said,
    };
  }
}

/** Another node may write what it likes, and an offset may point into a line. */
function parseLine(text: string): Record<string, Json> {
  try {
    const value = JSON.parse(text) as Json;
    if (typeof value === 'object' && value !== null && !Array.isArray(value)) return { ...value };
  } catch {
    // Shown as it is.
  }
  return { text };
}

async function* fromArray<T>(items: readonly T[]): AsyncGenerator<T, void, undefined> {
  yield* items;
}

/** Sequences each in order of time as one; what is equally old in the order of the sources. */
export async function* merge(
  sources: readonly AsyncGenerator<LogLine, void, undefined>[],
): AsyncGenerator<LogLine, void, undefined> {
  interface Head {
    readonly index: number;
    readonly source: AsyncGenerator<LogLine, void, undefined>;
    line: LogLine;
  }
  const before = (a: Head, b: Head): boolean =>
    a.line.at < b.line.at || (a.line.at === b.line.at && a.index < b.index);
  // A binary heap: the oldest head is the first.
  const heads: Head[] = [];
  const sink = (from: number): void => {
    const head = heads[from]!;
    let at = from;
    for (;;) {
      let child = 2 * at + 1;
      if (child >= heads.length) break;
      if (child + 1 < heads.length && before(heads[child + 1]!, heads[child]!)) child += 1;
      if (!before(heads[child]!, head)) break;
      heads[at] = heads[child]!;
      at = child;
    }
    heads[at] = head;
  };
  try {
    // The first page of each, several at a time.
    for (let at = 0; at < sources.length; at += MAX_WAITING) {
      const group = sources.slice(at, at + MAX_WAITING);
      const firsts = await Promise.all(group.map((source) => source.next()));
      for (const [offset, { done, value }] of firsts.entries()) {
        if (done !== true) heads.push({ index: at + offset, source: group[offset]!, line: value });
      }
    }
    for (let at = Math.floor(heads.length / 2) - 1; at >= 0; at -= 1) sink(at);
    while (heads.length > 0) {
      const head = heads[0]!;
      yield head.line;
      const { done, value } = await head.source.next();
      if (done !== true) head.line = value;
      else {
        const last = heads.pop()!;
        if (heads.length === 0) return;
        if (last !== head) heads[0] = last;
      }
      sink(0);
    }
  } finally {
    for (const source of sources) await source.return();
  }
}

/** Lets so many at a time; `shared` tells that others wait for their turn. */
class Turns {
  #free: number;
  readonly #waiting: (() => void)[] = [];

  constructor(count: number) {
    this.#free = count;
  }

  async take<T>(work: (shared: boolean) => Promise<T>): Promise<T> {
    if (this.#free > 0) this.#free -= 1;
    else await new Promise<void>((resolve) => this.#waiting.push(resolve));
    try {
      return await work(this.#waiting.length > 0);
    } finally {
      const next = this.#waiting.shift();
      if (next === undefined) this.#free += 1;
      else next();
    }
  }
}

/** Lines from many writers to one reader. Writers wait while the reader has not taken what there is. */
class LineQueue {
  #lines: LogLine[] = [];
  #closed = false;
  #error: unknown = null;
  #wakeReader: (() => void) | null = null;
  #wakeWriters: (() => void)[] = [];

  async push(lines: readonly LogLine[], signal: AbortSignal): Promise<void> {
    if (lines.length === 0) return;
    while (this.#lines.length > 0 && !signal.aborted && !this.#closed) {
      await new Promise<void>((resolve) => {
        const done = (): void => {
          signal.removeEventListener('abort', done);
          resolve();
        };
        this.#wakeWriters.push(done);
        signal.addEventListener('abort', done, { once: true });
      });
    }
    if (signal.aborted || this.#closed) return;
    this.#lines.push(...lines);
    this.#wakeReader?.();
  }

  fail(error: unknown): void {
    if (this.#closed) return;
    this.#error = error;
    this.close();
  }

  close(): void {
    this.#closed = true;
    this.#wakeReader?.();
  }

  async *lines(): AsyncGenerator<LogLine, void, undefined> {
    for (;;) {
      const taken = this.#lines;
      this.#lines = [];
      for (const wake of this.#wakeWriters.splice(0)) wake();
      yield* taken;
      if (this.#lines.length > 0) continue;
      if (this.#error !== null) throw this.#error;
      if (this.#closed) return;
      await new Promise<void>((resolve) => {
        this.#wakeReader = resolve;
      });
      this.#wakeReader = null;
    }
  }
}
