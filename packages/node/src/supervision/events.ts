/** What supervision tells of a task. For people and programs that watch; nothing is decided by them. */
import type { JsonObject } from '@millrace/runner';

/**
 * - `submitted`, `rejected`, `admitted` to its lane
 * - `starting`, then one of `succeeded`, `failed`, `timed_out`, `canceled`: a try
 * - `backoff_scheduled` the next try is waited for
 * - `finished` no further try comes, with the phase in which the task ends
 */
export type SupervisionEventName =
  | 'submitted'
  | 'admitted'
  | 'rejected'
  | 'starting'
  | 'succeeded'
  | 'failed'
  | 'timed_out'
  | 'canceled'
  | 'backoff_scheduled'
  | 'finished';

export interface SupervisionEvent extends JsonObject {
  readonly kind: 'supervision';
  readonly event: SupervisionEventName;
  /** Rises within the process. */
  readonly seq: number;
  /** Milliseconds since the epoch. */
  readonly at: number;
  readonly run_id: string;
}

let lastSeq = 0;

export function supervisionEvent(
  event: SupervisionEventName,
  runId: string,
  at: number,
  fields: JsonObject,
): SupervisionEvent {
  lastSeq += 1;
  return { kind: 'supervision', event, seq: lastSeq, at, run_id: runId, ...fields };
}
