/**
 * What the attempts of this node say, on its way to the dispatcher: one append-only stream of NDJSON lines per attempt, shipped
 * while the work runs.
 *
 * - All attempts share one request at a time, so that any number of talkative tasks costs a few requests a second, and a slow
 *   dispatcher slows nothing else: heartbeats have requests of their own.
 * - Lines wait about {@link LOG_INTERVAL_MS} for company, less when many came, not at all at the end of the attempt.
 * - Lines leave the memory when the dispatcher has said that it keeps them. The offset makes saying it again harmless, so whatever
 *   became of an answer, nothing is kept twice and nothing is left out.
 * - Memory is bounded, per attempt and for all. At the bound lines are dropped and counted, and the stream says so at that place.
 *   So it does at the limit of what the dispatcher keeps, from where on nothing more is kept.
 */
import {
  MillraceError,
  describeError,
  sleep,
  timeoutSignal,
  truncateUtf8,
  type Clock,
  type Json,
  type JsonObject,
  type LogLevel,
  type Logger,
  type Random,
} from '@millrace/runner';
import type { Dms, LeaseHandle, LogAnswer } from '@millrace/dispatch/client';
import { backoffMs, callWithin, isBodyRefused, isLeaseGone } from './retry.ts';

/** How long a line waits for others. */
export const LOG_INTERVAL_MS = 250;
/** Bytes that are sent without waiting for more. */
const EAGER_BYTES = 64 * 1024;
/** Bytes of one attempt, and of all attempts, that may wait to be sent. */
export const MAX_PENDING_LOG_BYTES = 1024 * 1024;
export const MAX_PENDING_LOG_BYTES_IN_ALL = 16 * 1024 * 1024;
/** Bytes of lines in one request. In JSON they are at most twice as many; the dispatcher takes bodies of 2 MiB. */
const MAX_BATCH_BYTES = 512 * 1024;
/** What a smaller and smaller batch is made no smaller than, when something on the way refuses its size. */
const MIN_BATCH_BYTES = EAGER_BYTES;
/** Longest text, and longest JSON of the fields, of one line. */
const MAX_TEXT_BYTES = 64 * 1024;
/** Left free at the end for what the stream says about itself: two notes of about a quarter of it. */
const RESERVED_BYTES = 1024;
const NOTE_BYTES = 300;
const RETRY = { baseMs: 200, capMs: 5_000 };

export interface LogShipperOptions {
  readonly dms: Dms;
  /** Bytes the dispatcher keeps of one attempt. */
  readonly maxBytes: number;
  /** Attempts in one request. */
  readonly batchItems: number;
  readonly requestTimeoutMs: number;
  readonly clock: Clock;
  readonly random: Random;
  readonly log: Logger;
}

/** A request's worth of one attempt. */
interface Piece {
  readonly from: TaskLog;
  readonly lease: LeaseHandle;
  readonly offset: number;
  readonly lines: string;
  readonly bytes: number;
}

/** One for the node. Sends nothing while nobody says anything. */
export class LogShipper {
  readonly options: LogShipperOptions;
  /** Those with lines to send, in the order of their turns. */
  readonly #waiting = new Set<TaskLog>();
  #running: Promise<void> | null = null;
  readonly #closing = new AbortController();
  #wake: (() => void) | null = null;
  #batchBytes = MAX_BATCH_BYTES;
  /** Waiting to be sent, all attempts together. */
  pendingBytes = 0;

  constructor(options: LogShipperOptions) {
    this.options = options;
  }

  /** `lease` names the attempt's lease as it is known at the time. */
  open(lease: () => LeaseHandle, log: Logger): TaskLog {
    return new TaskLog(this, lease, log);
  }

  /** Sends nothing more and waits for the request under way to be given up. Idempotent. */
  async close(): Promise<void> {
    this.#closing.abort(new MillraceError('canceled', 'the node is stopping'));
    this.#wake?.();
    await this.#running;
  }

  /** Called by a log that has something to send, or whose lines have become more urgent. */
  notify(log: TaskLog): void {
    if (this.#closing.signal.aborted) return;
    this.#waiting.add(log);
    this.#wake?.();
    this.#running ??= this.#run();
  }

  /** Called by a log that is closed. */
  forget(log: TaskLog): void {
    this.#waiting.delete(log);
    this.#wake?.();
  }

  /** Until there is nothing to send. */
  async #run(): Promise<void> {
    const { clock } = this.options;
    const { signal } = this.#closing;
    try {
      while (this.#waiting.size > 0 && !signal.aborted) {
        const dueIn = Math.min(...[...this.#waiting].map((log) => log.dueAt)) - clock.monotonic();
        if (dueIn > 0) await this.#idle(dueIn);
        else await this.#send();
      }
    } finally {
      // In the same step as the last look: whoever comes now starts anew.
      this.#running = null;
    }
  }

  async #idle(ms: number): Promise<void> {
    await new Promise<void>((resolve) => {
      const timer = this.options.clock.setTimer(resolve, ms, { unref: true });
      this.#wake = () => {
        timer.cancel();
        resolve();
      };
    });
    this.#wake = null;
  }

  /** One request, tried until it is answered or nothing of it is wanted any more. */
  async #send(): Promise<void> {
    const { dms, clock, random, log, requestTimeoutMs } = this.options;
    const { signal } = this.#closing;
    for (let failures = 1; ; failures += 1) {
      const pieces = this.#collect();
      if (pieces.length === 0) return;
      try {
        const answers = await callWithin(
          clock,
          requestTimeoutMs,
          'logs',
          (callSignal) =>
            dms.appendLogs(
              pieces.map(({ lease, offset, lines }) => ({ lease, offset, lines })),
              { signal: callSignal },
            ),
          signal,
        );
        for (const [index, piece] of pieces.entries()) this.#settle(piece, answers[index]);
        return;
      } catch (error) {
        if (signal.aborted) return;
        if (isBodyRefused(error) && this.#batchBytes > MIN_BATCH_BYTES) {
          this.#batchBytes = Math.max(MIN_BATCH_BYTES, this.#batchBytes / 2);
          continue;
        }
        // Even little of it is refused, or the endpoint is gone: these lines will never be taken.
        if (isBodyRefused(error) || isLeaseGone(error) || isUnimplemented(error)) {
          log.warn('the dispatcher refused logs of tasks', { error: describeError(error) });
          for (const { from, lines, bytes } of pieces) {
            if (isBodyRefused(error)) from.refused(lines, bytes);
            else from.end();
          }
          return;
        }
        const pauseMs = backoffMs(failures, RETRY, random, error);
        log.warn('logs of tasks were not taken', {
          error: describeError(error),
          failures,
          pause_ms: Math.round(pauseMs),
        });
        await sleep(clock, pauseMs, signal).catch(() => undefined);
        if (signal.aborted) return;
      }
    }
  }

  /** In turns, so that one that talks a lot does not keep the others waiting. */
  #collect(): Piece[] {
    const { batchItems } = this.options;
    const pieces: Piece[] = [];
    let room = this.#batchBytes;
    // Whoever is not due yet rides along.
    for (const log of this.#waiting) {
      if (pieces.length >= Math.max(1, batchItems) || room <= 0) break;
      const piece = log.take(pieces.length === 0 ? room : Math.min(room, EAGER_BYTES));
      if (piece === null) {
        this.#waiting.delete(log);
        continue;
      }
      pieces.push({ from: log, ...piece });
      room -= piece.bytes;
    }
    return pieces;
  }

  #settle({ from, offset, lines, bytes }: Piece, answer: LogAnswer | undefined): void {
    this.#waiting.delete(from);
    if (answer === undefined || 'nextOffset' in answer)
      from.kept(offset, bytes, answer?.nextOffset ?? offset);
    else if (isLeaseGone(answer.error)) from.end();
    else if (isBodyRefused(answer.error) || isUnimplemented(answer.error)) from.refused(lines, bytes);
    else from.kept(offset, bytes, offset);
    if (from.hasPending) this.#waiting.add(from);
  }
}

function isUnimplemented(error: unknown): boolean {
  return MillraceError.is(error) && error.code === 'unimplemented';
}

/** Lines that were joined. */
interface Chunk {
  text: string;
  bytes: number;
}

/** The stream of one attempt. */
export class TaskLog {
  readonly #shipper: LogShipper;
  readonly #lease: () => LeaseHandle;
  readonly #log: Logger;
  /** Not said to be kept yet, in order. All but the last are full. */
  readonly #chunks: Chunk[] = [];
  #pendingBytes = 0;
  /** The last chunk may be on its way: nothing is added to it. */
  #sealed = false;
  /** Where in the stream the first chunk begins. */
  #offset = 0;
  /** Monotonic; infinite when nothing waits. */
  #dueAt = Infinity;
  /** However much it hurries: the dispatcher could not take it a moment ago. */
  #notBefore = -Infinity;
  #urgent = false;
  /** The dispatcher's limit is reached. */
  #full = false;
  /** Nothing is taken any more: closed, or the lease is gone. */
  #ended = false;
  /** Since the stream last said so. */
  #dropped = { lines: 0, bytes: 0 };
  #refusedBytes = 0;
  #waiters: (() => void)[] = [];
  /** The second of the newest line, and its text. */
  #second = -1;
  #secondText = '';

  constructor(shipper: LogShipper, lease: () => LeaseHandle, log: Logger) {
    this.#shipper = shipper;
    this.#lease = lease;
    this.#log = log;
  }

  /** A line of the task's log. What a program printed has a field `stream`, `stdout` or `stderr`. */
  line(level: LogLevel, said: unknown, fields: JsonObject): void {
    if (this.#ended) return;
    // A runner in JavaScript may say anything.
    const message = typeof said === 'string' ? said : (jsonText(said) ?? typeof said);
    if (this.#full) return this.#drop(message);
    const { stream, ...others } = fields;
    const printed = stream === 'stdout' || stream === 'stderr';
    const source = printed ? `"stream":"${stream}"` : `"level":"${level}"`;
    const text = JSON.stringify(truncateUtf8(message, MAX_TEXT_BYTES));
    this.#push(
      `{"at":"${this.#at()}",${source},"text":${text}${fieldsText(printed ? others : fields)}}\n`,
      message,
    );
  }

  /** What the runner reported with `logEvent`. */
  event(value: Json): void {
    if (this.#ended) return;
    const text = jsonText(value) ?? '{"lost":"not JSON"}';
    if (this.#full) return this.#drop(text);
    const kept = Buffer.byteLength(text) > MAX_TEXT_BYTES ? TOO_LONG : text;
    this.#push(`{"at":"${this.#at()}","event":${kept}}\n`, text);
  }

  /**
   * Sends what there is. Resolves when the dispatcher has it, after `limitMs`, or when the lease is gone; with the bytes that did
   * not arrive.
   */
  async flush(limitMs: number): Promise<number> {
    this.#sayDropped(true);
    if (this.hasPending && !this.#ended) {
      this.#urgent = true;
      this.#shipper.notify(this);
      using limit = timeoutSignal(this.#shipper.options.clock, limitMs, () => undefined);
      await new Promise<void>((resolve) => {
        this.#waiters.push(resolve);
        limit.signal.addEventListener('abort', () => resolve(), { once: true });
      });
    }
    return this.#pendingBytes + this.#refusedBytes;
  }

  /** Takes and sends nothing more. Idempotent. */
  end(): void {
    if (this.#ended) return;
    this.#ended = true;
    this.#shipper.pendingBytes -= this.#pendingBytes;
    this.#shipper.forget(this);
    this.#wakeWaiters();
  }

  get hasPending(): boolean {
    return !this.#ended && this.#chunks.length > 0;
  }

  /** For the shipper: when the lines want to go, monotonic. */
  get dueAt(): number {
    return this.#urgent || this.#pendingBytes >= EAGER_BYTES ? this.#notBefore : this.#dueAt;
  }

  /** For the shipper: the beginning of what waits, whole lines of about `maxBytes`; a longer line goes alone. */
  take(maxBytes: number): Omit<Piece, 'from'> | null {
    if (!this.hasPending) return null;
    let lines = '';
    let bytes = 0;
    for (const chunk of this.#chunks) {
      if (bytes > 0 && bytes + chunk.bytes > maxBytes) break;
      lines += chunk.text;
      bytes += chunk.bytes;
    }
    // What comes from now on goes with the next piece.
    this.#sealed = true;
    return { lease: this.#lease(), offset: this.#offset, lines, bytes };
  }

  /** For the shipper: of the piece at `offset`, what lies before `nextOffset` is kept. */
  kept(offset: number, bytes: number, nextOffset: number): void {
    if (this.#ended) return;
    if (nextOffset < offset) {
      // A dispatcher that has forgotten what it had said it keeps; the rest goes on from where it stands.
      this.#log.warn('the dispatcher has less of the log than it said', { wanted: nextOffset, sent: offset });
      this.#offset = nextOffset;
    } else if (nextOffset >= offset + bytes) {
      this.#remove(bytes);
      this.#offset = nextOffset;
    }
    // Part of a piece is never kept. It is sent again.
    const now = this.#shipper.options.clock.monotonic();
    this.#notBefore = nextOffset > offset ? now : now + LOG_INTERVAL_MS;
    this.#sent();
  }

  /** For the shipper: these lines, the first that wait, will never be taken. */
  refused(lines: string, bytes: number): void {
    if (this.#ended) return;
    this.#refusedBytes += bytes;
    this.#remove(bytes);
    this.#dropped.lines += lines.split('\n').length - 1;
    this.#dropped.bytes += bytes;
    this.#sent();
  }

  #sent(): void {
    this.#dueAt = this.#shipper.options.clock.monotonic() + LOG_INTERVAL_MS;
    this.#sayDropped(false);
    if (this.#chunks.length > 0) return;
    this.#urgent = false;
    this.#wakeWaiters();
  }

  #wakeWaiters(): void {
    for (const resolve of this.#waiters.splice(0)) resolve();
  }

  /** Bytes of whole chunks, as they were taken. */
  #remove(bytes: number): void {
    let left = bytes;
    let count = 0;
    for (; left > 0 && count < this.#chunks.length; count += 1) left -= this.#chunks[count]?.bytes ?? 0;
    this.#chunks.splice(0, count);
    this.#pendingBytes -= bytes;
    this.#shipper.pendingBytes -= bytes;
  }

  /** `counted`: what is counted as dropped when there is no room. */
  #push(line: string, counted: string): void {
    const { maxBytes } = this.#shipper.options;
    const bytes = Buffer.byteLength(line);
    if (this.#full || this.#isFull(bytes)) {
      if (!this.#full) {
        this.#full = true;
        this.#append(
          noteLine(this.#at(), {
            text: `the log is full: the limit taskLogBytes is ${maxBytes} bytes; what follows is counted and not kept`,
            limit: 'taskLogBytes',
            value: maxBytes,
          }),
        );
      }
      return this.#drop(counted);
    }
    if (!this.#hasRoom(bytes)) return this.#drop(counted);
    this.#sayDropped(false);
    this.#append(line, bytes);
  }

  #isFull(bytes: number): boolean {
    return this.#offset + this.#pendingBytes + bytes > this.#shipper.options.maxBytes - RESERVED_BYTES;
  }

  #hasRoom(bytes: number): boolean {
    return (
      this.#pendingBytes + bytes <= MAX_PENDING_LOG_BYTES &&
      this.#shipper.pendingBytes + bytes <= MAX_PENDING_LOG_BYTES_IN_ALL
    );
  }

  #drop(text: string): void {
    this.#dropped.lines += 1;
    this.#dropped.bytes += Buffer.byteLength(text);
  }

  /** Once there is room again: how much is missing at this place. Past the dispatcher's limit only at the end. */
  #sayDropped(atEnd: boolean): void {
    const { lines, bytes } = this.#dropped;
    if (lines === 0 || this.#ended) return;
    if (!atEnd && (this.#full || this.#isFull(NOTE_BYTES) || !this.#hasRoom(NOTE_BYTES))) return;
    this.#dropped = { lines: 0, bytes: 0 };
    const text = `${lines} ${lines === 1 ? 'line' : 'lines'} of ${bytes} bytes in all ${lines === 1 ? 'is' : 'are'} missing here: ${
      this.#full ? 'the log is full' : 'they could not be sent in time'
    }`;
    this.#append(noteLine(this.#at(), { text, dropped_lines: lines, dropped_bytes: bytes }));
  }

  #append(line: string, bytes = Buffer.byteLength(line)): void {
    const last = this.#chunks.at(-1);
    if (last === undefined || this.#sealed || last.bytes + bytes > EAGER_BYTES) {
      this.#chunks.push({ text: line, bytes });
      this.#sealed = false;
    } else {
      last.text += line;
      last.bytes += bytes;
    }
    const before = this.#pendingBytes;
    this.#pendingBytes += bytes;
    this.#shipper.pendingBytes += bytes;
    if (before === 0) this.#dueAt = this.#shipper.options.clock.monotonic() + LOG_INTERVAL_MS;
    // Between the first line and the one that makes it hurry nothing changes for the shipper.
    if (before === 0 || (before < EAGER_BYTES && this.#pendingBytes >= EAGER_BYTES)) {
      this.#shipper.notify(this);
    }
  }

  /** Lines come by the thousand; most of them share their second. */
  #at(): string {
    const now = this.#shipper.options.clock.now();
    const second = Math.floor(now / 1000);
    if (second !== this.#second) {
      this.#second = second;
      this.#secondText = new Date(second * 1000).toISOString().slice(0, -4);
    }
    return `${this.#secondText}${String(Math.floor(now - second * 1000)).padStart(3, '0')}Z`;
  }
}

function noteLine(at: string, note: { readonly text: string } & JsonObject): string {
  const { text, ...fields } = note;
  return `${JSON.stringify({ at, level: 'warn', text, fields: { ...fields, from: 'millrace' } })}\n`;
}

/** In place of what is longer than a line may be. */
const TOO_LONG = `{"lost":"more than ${MAX_TEXT_BYTES} bytes"}`;

/** As a member of the line; nothing for none. */
function fieldsText(fields: JsonObject): string {
  const text = jsonText(fields) ?? '{"lost":"not JSON"}';
  if (text === '{}') return '';
  return `,"fields":${Buffer.byteLength(text) > MAX_TEXT_BYTES ? TOO_LONG : text}`;
}

/** Null for what JSON cannot carry; a runner in JavaScript may hand anything. */
function jsonText(value: unknown): string | null {
  try {
    return JSON.stringify(value) ?? null;
  } catch {
    return null;
  }
}
