/** The cursors of listings: the number of the last item shown. */
import { MillraceError } from '@millrace/runner';

/** A cursor of two numbers, `12-0`. @throws MillraceError `invalid_argument` when no listing can have returned it */
export function parsePairCursor(cursor: string | null): readonly [number, number] | null {
  if (cursor === null) return null;
  const [, first, second] = /^([1-9]\d{0,14})-(\d{1,9})$/.exec(cursor) ?? [];
  if (first === undefined || second === undefined) throw badCursor(cursor);
  return [Number(first), Number(second)];
}

/** @throws MillraceError `invalid_argument` when no listing can have returned it */
export function parseCursor(cursor: string | null): number | null {
  if (cursor === null) return null;
  if (!/^[1-9]\d{0,14}$/.test(cursor)) throw badCursor(cursor);
  return Number(cursor);
}

function badCursor(cursor: string): MillraceError {
  return new MillraceError(
    'invalid_argument',
    `cursor must be one a listing returned, got ${JSON.stringify(cursor.slice(0, 100))}`,
  );
}
