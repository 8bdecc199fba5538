/**
 * Folders that the user named. They are made one by one: Node's recursive `mkdir` never returns on file systems that answer
 * ENOENT for a name that cannot be made, such as /proc.
 */
import { randomUUID } from 'node:crypto';
import { lstat, mkdir, rmdir, stat } from 'node:fs/promises';
import path from 'node:path';
import { MillraceError, describeError } from '@millrace/runner';

/**
 * Makes the absolute path `dir` and what is missing above it; new folders get `mode`, which is by default what the umask
 * allows.
 *
 * @param what names it in messages, such as `--out`
 * @throws MillraceError `invalid_argument` naming what cannot be made, or what is in the way
 */
export async function makeFolders(dir: string, what: string, mode = 0o777): Promise<void> {
  const { missing } = await survey(dir, what);
  for (const place of missing) {
    try {
      await mkdir(place, { mode });
    } catch (error) {
      // Somebody else made it meanwhile.
      const there = await stat(place).catch(() => null);
      if (!there?.isDirectory()) throw unusable(dir, what, `cannot make ${place}`, error);
    }
  }
}

/**
 * That {@link makeFolders} would succeed and files could be made in `dir`. Leaves nothing behind: what is tried is a folder
 * of a name of its own, so it cannot get in anybody's way.
 *
 * @throws MillraceError `invalid_argument` naming what is in the way
 */
export async function checkFolder(dir: string, what: string): Promise<void> {
  const { found } = await survey(dir, what);
  const probe = path.join(found, `.millrace-${randomUUID()}`);
  try {
    await mkdir(probe);
    await rmdir(probe);
  } catch (error) {
    throw unusable(dir, what, `cannot write in ${found}`, error);
  }
}

/** The nearest folder that exists, and what is to be made below it, the outermost first. */
async function survey(
  dir: string,
  what: string,
): Promise<{ readonly found: string; readonly missing: readonly string[] }> {
  const missing: string[] = [];
  for (let place = dir; ; place = path.dirname(place)) {
    try {
      const info = await stat(place);
      if (info.isDirectory()) return { found: place, missing: missing.toReversed() };
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code !== 'ENOENT' && code !== 'ENOTDIR') {
        throw unusable(dir, what, `cannot look at ${place}`, error);
      }
      // A link to nothing is there, and no folder can be made in its place.
      const link = await lstat(place).catch(() => null);
      if (link === null && place !== path.dirname(place)) {
        missing.push(place);
        continue;
      }
    }
    throw unusable(dir, what, `${place} is not a folder`);
  }
}

function unusable(dir: string, what: string, problem: string, cause?: unknown): MillraceError {
  const reason = cause === undefined ? '' : ` (${describeError(cause)})`;
  return new MillraceError('invalid_argument', `${what} ${dir}: ${problem}${reason}; name another`, {
    cause,
  });
}
