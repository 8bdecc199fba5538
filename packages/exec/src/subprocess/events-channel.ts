/**
 * What a program says about its work on the descriptor `$MILLRACE_EVENTS_FD`: one JSON object per line.
 *
 *     {"progress": 0.5}                               any JSON; replaces the progress shown
 *     {"event": {"kind": "frame", "number": 7}}       any JSON; added to the task's events
 *     {"log": "halfway", "level": "warn"}             a line of the task's log; levels debug, info, warn, error
 *
 * A line may hold several of them. Anything else is counted and told in the end; it never fails the task.
 */
import { StringDecoder } from 'node:string_decoder';
import { truncateUtf8, type ControlPlane, type Json, type JsonObject, type Logger } from '@millrace/runner';
import { ANNOUNCEMENT } from '../sandbox/prelude.ts';

const LEVELS = ['debug', 'info', 'warn', 'error'] as const;
/** In characters; a node takes no larger event. */
const MAX_LINE = 64 * 1024;
const SAMPLE_BYTES = 200;

export interface EventsChannelOptions {
  readonly limitBytes: number;
  /** The first line is the sandbox's own. */
  readonly announced: boolean;
  /** What the program calls it, for the log. Default `MILLRACE_EVENTS_FD`. */
  readonly name?: string;
  readonly ctrl: ControlPlane;
  readonly log: Logger;
}

export class EventsChannel {
  readonly #options: EventsChannelOptions;
  readonly #decoder = new StringDecoder('utf8');
  #awaitsAnnouncement: boolean;
  #partial = '';
  /** The line is longer than allowed; the rest of it is passed over. */
  #skipping = false;
  #kept = 0;
  #dropped = 0;
  #garbage = 0;
  #sample: string | null = null;

  constructor(options: EventsChannelOptions) {
    this.#options = options;
    this.#awaitsAnnouncement = options.announced;
  }

  /** Whether the program was started: always, without a sandbox that says so. */
  get started(): boolean {
    return !this.#awaitsAnnouncement;
  }

  write(bytes: Buffer): void {
    const taken = bytes.subarray(0, this.#options.limitBytes + ANNOUNCEMENT.length + 1 - this.#kept);
    this.#kept += taken.byteLength;
    this.#dropped += bytes.byteLength - taken.byteLength;
    const lines = (this.#partial + this.#decoder.write(taken)).split('\n');
    this.#partial = lines.pop() ?? '';
    for (const line of lines) this.#line(line);
    if (this.#partial.length > MAX_LINE) {
      if (!this.#skipping) this.#note(this.#partial);
      this.#partial = '';
      this.#skipping = true;
    }
  }

  /** Takes in a line without an end, and tells what was dropped or not understood. */
  end(): void {
    const { limitBytes, log, name = 'MILLRACE_EVENTS_FD' } = this.#options;
    this.#line(this.#partial + this.#decoder.end());
    this.#partial = '';
    if (this.#garbage > 0) {
      log.warn(
        `lines on ${name} were not understood; each must be {"progress":…}, {"event":…} or {"log":…}`,
        {
          lines: this.#garbage,
          first: this.#sample,
        },
      );
    }
    if (this.#dropped > 0) {
      log.warn(`events were cut: the limit eventBytes is ${limitBytes} bytes`, {
        limit: 'eventBytes',
        value: limitBytes,
        dropped_bytes: this.#dropped,
      });
    }
  }

  #line(line: string): void {
    if (this.#skipping) {
      this.#skipping = false;
      return;
    }
    if (this.#awaitsAnnouncement && line === ANNOUNCEMENT) {
      this.#awaitsAnnouncement = false;
      return;
    }
    if (line.trim() === '') return;
    if (line.length > MAX_LINE || !this.#understand(line)) this.#note(line);
  }

  #understand(line: string): boolean {
    let said: Json;
    try {
      said = JSON.parse(line) as Json;
    } catch {
      return false;
    }
    if (typeof said !== 'object' || said === null || Array.isArray(said)) return false;
    const { progress, event, log, level = 'info' } = said as Record<string, Json | undefined>;
    if (progress === undefined && event === undefined && log === undefined) return false;
    if (event !== undefined && isReserved(event)) return false;
    const known = LEVELS.find((candidate) => candidate === level);
    if (log !== undefined && (typeof log !== 'string' || known === undefined)) return false;
    const { ctrl } = this.#options;
    // They resolve at once; a context that has ended has nobody to tell.
    if (progress !== undefined) ctrl.progress(progress).catch(() => undefined);
    if (event !== undefined) ctrl.logEvent(event).catch(() => undefined);
    if (typeof log === 'string') this.#options.log[known!](log, { stream: 'events' });
    return true;
  }

  #note(line: string): void {
    this.#garbage += 1;
    this.#sample ??= truncateUtf8(line, SAMPLE_BYTES);
  }
}

/** The record of what the attempt used is the runner's to write. */
function isReserved(event: Json): boolean {
  return typeof event === 'object' && event !== null && (event as JsonObject)['kind'] === 'usage';
}
