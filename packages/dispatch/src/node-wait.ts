/**
 * What a task that a node has waits for there. A node tells of its supervision by events in the log of the attempt; a task that waits says
 * nothing, so if it waits, that is the last thing its log says.
 */
import { z } from 'zod';

export type NodeWait =
  | { readonly kind: 'slot'; readonly slot: string; readonly since: number }
  | {
      readonly kind: 'try';
      /** Tries there were. */
      readonly tries: number;
      /** When the next one begins, in milliseconds since the epoch, by the node's clock. */
      readonly until: number;
      /** What became of the last one; null: it did its work. */
      readonly failure: string | null;
    };

/** As much of the end of a log as the longest of these events takes. */
export const LAST_WORDS_BYTES = 4096;

const lineSchema = z.object({
  event: z.object({ kind: z.literal('supervision'), at: z.number() }).and(
    z.discriminatedUnion('event', [
      z.object({ event: z.literal('submitted'), slot: z.string() }),
      z.object({
        event: z.literal('backoff_scheduled'),
        try: z.number(),
        delay_ms: z.number(),
        source: z.enum(['success', 'failure']),
        reason: z.string().optional(),
      }),
    ]),
  ),
});

/** @param log The last bytes of an attempt's log. */
export function nodeWait(log: Uint8Array): NodeWait | null {
  const last = Buffer.from(log).toString('utf8').trimEnd().split('\n').at(-1) ?? '';
  let line: unknown;
  try {
    line = JSON.parse(last);
  } catch {
    // Not the end of a line, or more than is looked at: nothing of the node's.
    return null;
  }
  const { success, data } = lineSchema.safeParse(line);
  if (!success) return null;
  const { event } = data;
  if (event.event === 'submitted') return { kind: 'slot', slot: event.slot, since: event.at };
  return {
    kind: 'try',
    tries: event.try,
    until: event.at + event.delay_ms,
    failure: event.source === 'success' ? null : (event.reason ?? 'no reason given'),
  };
}
