/** Files that hold secrets or must never be seen half written. */
import { randomUUID } from 'node:crypto';
import { open, rename, rm, type FileHandle } from 'node:fs/promises';
import { MillraceError } from '@millrace/runner';

/** Replaces `file` in one step; only its owner may read it (0600), whatever the umask and an earlier file's mode. */
export async function writePrivateFile(file: string, text: string): Promise<void> {
  const temporary = `${file}.${randomUUID()}`;
  try {
    {
      await using reserved = await reservePrivateFile(temporary);
      await reserved.write(text);
    }
    await rename(temporary, file);
  } catch (error) {
    await rm(temporary, { force: true });
    throw error;
  }
}

/**
 * Takes the name `file` for a secret that does not exist yet; it must be free. Unless `write` is called before it is
 * disposed, the file is gone again.
 *
 * @throws MillraceError `already_exists`, or `failed_precondition` when it cannot be made.
 */
export async function reservePrivateFile(
  file: string,
): Promise<{ write(text: string): Promise<void> } & AsyncDisposable> {
  let handle: FileHandle;
  try {
    handle = await open(file, 'wx', 0o600);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') {
      throw new MillraceError('already_exists', `${file} is there already; remove it or name another file`, {
        cause: error,
      });
    }
    throw new MillraceError('failed_precondition', `cannot write ${file}`, { cause: error });
  }
  let written = false;
  return {
    async write(text) {
      await handle.writeFile(text);
      await handle.sync();
      written = true;
    },
    async [Symbol.asyncDispose]() {
      await handle.close();
      if (!written) await rm(file, { force: true });
    },
  };
}
