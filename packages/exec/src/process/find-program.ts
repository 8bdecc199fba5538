/** Finds a program as a shell would, but says why it cannot be run. */
import { constants } from 'node:fs';
import { access, stat } from 'node:fs/promises';
import { isAbsolute, join } from 'node:path';
import { MillraceError } from '@millrace/runner';

/** Where programs are looked for unless the operator says otherwise. */
export const SAFE_PATH = '/usr/local/bin:/usr/bin:/bin';

/**
 * The absolute path of an executable file: `command` itself when it is absolute, else the first of that name in the folders
 * of `path` (separated by `:`; relative ones are passed over).
 *
 * @throws MillraceError `not_found`, `permission_denied` (there, but not executable) or `invalid_argument` (a relative path).
 */
export async function findProgram(command: string, path: string): Promise<string> {
  if (isAbsolute(command)) {
    await checkExecutable(command);
    return command;
  }
  if (command.includes('/')) {
    throw new MillraceError(
      'invalid_argument',
      `command ${JSON.stringify(command)} must be a name to be found on PATH, or an absolute path`,
    );
  }
  let refused: MillraceError | null = null;
  for (const folder of path.split(':').filter(isAbsolute)) {
    const file = join(folder, command);
    try {
      await checkExecutable(file);
      return file;
    } catch (error) {
      if (MillraceError.is(error) && error.code === 'permission_denied') refused ??= error;
      else if (!MillraceError.is(error)) throw error;
    }
  }
  if (refused !== null) throw refused;
  throw new MillraceError(
    'not_found',
    `program ${command} is not on PATH (${path}); install it, or give its absolute path`,
    { details: { ending: 'spawn_failed', errno: 'ENOENT' } },
  );
}

async function checkExecutable(file: string): Promise<void> {
  const found = await stat(file).catch((error: unknown) => error as NodeJS.ErrnoException);
  if (found instanceof Error) {
    const missing = found.code === 'ENOENT' || found.code === 'ENOTDIR';
    throw new MillraceError(
      missing ? 'not_found' : 'permission_denied',
      `program ${file} ${missing ? 'does not exist' : `cannot be looked at (${found.code})`}`,
      { cause: found, details: { ending: 'spawn_failed', errno: found.code } },
    );
  }
  if (!found.isFile()) {
    throw new MillraceError('permission_denied', `program ${file} is not a file`, {
      details: { ending: 'spawn_failed', errno: 'EACCES' },
    });
  }
  await access(file, constants.X_OK).catch((error: unknown) => {
    throw new MillraceError('permission_denied', `program ${file} is not executable; set its x permission`, {
      cause: error,
      details: { ending: 'spawn_failed', errno: 'EACCES' },
    });
  });
}
