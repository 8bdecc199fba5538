/**
 * A job's event stream as server-sent events. The store is the only source: the stream reads it until it is caught
 * up, waits for a signal, and reads again from where it stood; it listens before its first read. So past and live are
 * one sequence, without a gap and without a repeat.
 */
import type { Clock } from '@millrace/runner';
import type { JobEvent } from './records.ts';
import { Wakeup, type Signals } from './signals.ts';
import type { Store } from './store.ts';

/** Events read from the store at once. */
const PAGE = 500;

/** A comment after this much silence keeps proxies from closing the connection. */
export const SSE_HEARTBEAT_MS = 15_000;

export interface EventStreamOptions {
  readonly store: Store;
  readonly signals: Signals;
  readonly clock: Clock;
  readonly jobId: string;
  /** Events with a greater `seq` are sent. */
  readonly after: number;
  /** Ends the stream: the client went away, or the server closes. */
  readonly signal: AbortSignal;
}

/** Whether nothing comes after this event. */
export function isTerminalEvent(event: JobEvent): boolean {
  return event.kind === 'job.completed' || event.kind === 'job.failed' || event.kind === 'job.canceled';
}

/** The stream's text, in chunks. Ends after the job's terminal event, when the job is deleted, or on abort. */
export async function* eventStream(options: EventStreamOptions): AsyncGenerator<string, void, undefined> {
  const { store, signals, clock, jobId, signal } = options;
  const wakeup = new Wakeup();
  using _ = signals.onJob(jobId, () => wakeup.notify());
  let after = options.after;
  // Sent at once, so that a client knows it is connected before anything happens.
  yield ': connected\n\n';
  for (;;) {
    if (signal.aborted) {
      yield ': closing\n\n';
      return;
    }
    const events = await store.events(jobId, after, PAGE);
    if (events === null) return;
    let chunk = '';
    for (const event of events) {
      chunk += `id: ${event.seq}\ndata: ${JSON.stringify(event)}\n\n`;
      after = event.seq;
      if (isTerminalEvent(event)) {
        yield chunk;
        return;
      }
    }
    if (chunk !== '') yield chunk;
    if (events.length === PAGE) continue;
    const waitedFrom = clock.monotonic();
    await wakeup.wait(clock, SSE_HEARTBEAT_MS, signal);
    if (clock.monotonic() - waitedFrom >= SSE_HEARTBEAT_MS) yield ': alive\n\n';
  }
}
