/** The kinds of event in a job's stream, the same in every store. Stored by their position here: append only. */
export const EVENT_KINDS = [
  'job.submitted',
  'job.running',
  'job.cancel_requested',
  'job.completed',
  'job.failed',
  'job.canceled',
  'task.runnable',
  'task.leased',
  'task.running',
  'task.progress',
  'task.log',
  'task.retry',
  'task.released',
  'task.expired',
  'task.completed',
  'task.failed',
  'task.canceled',
  'task.resumed',
] as const;
export type EventKind = (typeof EVENT_KINDS)[number];

export const EVENT_CODES = Object.fromEntries(EVENT_KINDS.map((kind, code) => [kind, code])) as Record<
  EventKind,
  number
>;
