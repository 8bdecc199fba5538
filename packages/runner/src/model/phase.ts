/** Where a supervised task stands. */
import { unknownWord } from './errors.ts';

/**
 * - `pending` accepted, or waiting for its slot
 * - `running` an attempt is under way, or the next one is waited for
 * - `succeeded` the last attempt did, and no other follows
 * - `failed` it failed, and may not be tried again
 * - `timeout` the last attempt ran out of time, and no other follows
 * - `canceled` stopped on request
 * - `exhausted` it failed, and its policy has no further attempt
 */
export const TASK_PHASES = [
  'pending',
  'running',
  'succeeded',
  'failed',
  'timeout',
  'canceled',
  'exhausted',
] as const;

export type TaskPhase = (typeof TASK_PHASES)[number];

/** All but `pending` and `running`. */
export function isTerminal(phase: TaskPhase): boolean {
  return phase !== 'pending' && phase !== 'running';
}

/** In any case, blanks around it do not matter. @throws MillraceError `invalid_argument`, `unknown task phase: …` */
export function phaseFromText(text: string): TaskPhase {
  const word = text.trim().toLowerCase();
  const phase = TASK_PHASES.find((known) => known === word);
  if (phase !== undefined) return phase;
  throw unknownWord('task phase', text, TASK_PHASES.join(', '));
}
