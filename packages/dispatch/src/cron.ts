/** Cron expressions with a time zone. The library stays behind this file. */
import { MillraceError } from '@millrace/runner';
import { Cron } from 'croner';

export interface CronTimes {
  /** The first tick after this time; null: there is none. Epoch ms. */
  after(ms: number): number | null;
  /** The last tick at or before this time; null: there is none. Epoch ms. */
  upTo(ms: number): number | null;
}

const FIVE_FIELDS = /^\S+(?: +\S+){4}$/;
const MAX_BYTES = 256;

/**
 * Reads a cron expression of five fields: minute, hour, day of month, month, day of week. Names (`MON`, `JAN`), ranges, steps, lists,
 * `L` (the last day) and `5#2` (the second Friday) are known; when both days are given, either is enough, as in cron.
 *
 * Where clocks are changed, a fixed time such as `30 2 * * *` that is left out comes right after the gap, and one that comes twice is one tick.
 *
 * @throws MillraceError `invalid_argument` for anything else, a time zone that is not in the IANA database, or an expression without ticks
 */
export function parseCron(expression: string, timeZone: string): CronTimes {
  const text = expression.trim();
  const refuse = (rule: string): never => {
    throw new MillraceError('invalid_argument', `cron ${rule}, got ${JSON.stringify(text.slice(0, 100))}`);
  };
  if (text.length > MAX_BYTES || !FIVE_FIELDS.test(text)) {
    refuse(
      'must have five fields: minute, hour, day of month, month, day of week (such as "30 2 * * MON-FRI")',
    );
  }
  checkTimeZone(timeZone);
  let cron: Cron;
  try {
    cron = new Cron(text, { timezone: timeZone, paused: true, mode: '5-part' });
  } catch (error) {
    return refuse(`has a field that cannot be read (${reasonOf(error)})`);
  }
  if (cron.nextRun(new Date(0)) === null) refuse('never comes true');
  return {
    after: (ms) => cron.nextRun(new Date(ms))?.getTime() ?? null,
    // The library looks for runs before a time.
    upTo: (ms) => cron.previousRuns(1, new Date(ms + 1))[0]?.getTime() ?? null,
  };
}

/** @throws MillraceError `invalid_argument` */
function checkTimeZone(timeZone: string): void {
  try {
    // It also takes offsets such as +01:00, which are no zones: they know no summer time.
    if (/^[A-Za-z]/.test(timeZone) && new Intl.DateTimeFormat('en', { timeZone })) return;
  } catch {
    // What is said below.
  }
  throw new MillraceError(
    'invalid_argument',
    `time_zone must be a name of the IANA database such as UTC or Europe/Berlin, got ${JSON.stringify(timeZone.slice(0, 100))}`,
  );
}

function reasonOf(error: unknown): string {
  return (error instanceof Error ? error.message : String(error)).replace(/^CronPattern: /, '').slice(0, 200);
}
