/**
 * The private folder of one attempt, outside of the program's reach but for these:
 *
 *     <workDir>/<host>-<pid>-<start>-<random>/in    inputs, by name
 *                                            /out   what it writes there and a pattern matches is collected
 *                                            /work  where it starts
 *                                            /tmp   TMPDIR
 *
 * The name says which process made it, so that the folders of a node that was killed are removed by the next one.
 */
import { randomBytes } from 'node:crypto';
import { constants } from 'node:fs';
import { access, chmod, lstat, mkdir, readdir, rm, rmdir } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join, resolve } from 'node:path';
import { MillraceError, describeError, type Logger } from '@millrace/runner';
import { readLiving, readStat } from '../process/proc.ts';
import type { LaunchFolders } from '../sandbox/launch.ts';

/** The first failure of a removal is reported while others of its steps go on, so that a second may meet them. */
const REMOVE_TRIES = 5;

/** Work folders that were looked at by this process. */
const prepared = new Set<string>();

/** Removed by {@link removeFolder}. @throws MillraceError `failed_precondition` or `permission_denied`, naming the work folder. */
export async function createTaskFolder(workDir: string): Promise<LaunchFolders> {
  const parent = resolve(workDir);
  if (!prepared.has(parent)) await prepare(parent);
  const self = readStat('self')?.started ?? '0';
  const root = join(parent, `${host()}-${process.pid}-${self}-${randomBytes(8).toString('hex')}`);
  const folders: LaunchFolders = {
    root,
    inputs: join(root, 'in'),
    outputs: join(root, 'out'),
    work: join(root, 'work'),
    temp: join(root, 'tmp'),
  };
  await mkdir(root, { mode: 0o700 }).catch(async (error: NodeJS.ErrnoException) => {
    if (error.code !== 'ENOENT') throw error;
    // Somebody who tidies up temporary folders was here.
    await prepare(parent);
    await mkdir(root, { mode: 0o700 });
  });
  await Promise.all(
    [folders.inputs, folders.outputs, folders.work, folders.temp].map((path) => mkdir(path, { mode: 0o700 })),
  );
  return folders;
}

/** {@link removeFolder} of a task's, which is mostly empty by now: then a fifth of the work. */
export async function removeTaskFolder(folders: LaunchFolders, log: Logger | undefined): Promise<void> {
  const { root, inputs, outputs, work, temp } = folders;
  const emptied = await Promise.all(
    [inputs, outputs, work, temp].map((path) =>
      rmdir(path).then(
        () => true,
        () => false,
      ),
    ),
  );
  const gone =
    emptied.every(Boolean) &&
    (await rmdir(root).then(
      () => true,
      () => false,
    ));
  if (!gone) await removeFolder(root, log);
}

/** Never rejects: what cannot be removed is logged, and tried again by the next node. */
export async function removeFolder(path: string, log: Logger | undefined): Promise<void> {
  for (let tries = 1; ; tries += 1) {
    try {
      await rm(path, { recursive: true, force: true });
      return;
    } catch (error) {
      if (tries === REMOVE_TRIES) {
        log?.warn('the folder of a task cannot be removed', { path, error: describeError(error) });
        return;
      }
      // A program may leave folders behind that even their owner must not enter.
      await openUp(path);
    }
  }
}

/** Removes what nodes left that were killed. Only folders of this host, named as above. */
export async function sweepTaskFolders(workDir: string, log: Logger | undefined): Promise<void> {
  const parent = resolve(workDir);
  const names = await readdir(parent).catch(() => []);
  const pattern = new RegExp(`^${host()}-(\\d+)-(\\d+)-[0-9a-f]{16}$`);
  for (const name of names) {
    const [, pid, started] = pattern.exec(name) ?? [];
    if (pid === undefined || started === undefined) continue;
    if (readLiving({ pid: Number(pid), started }) === null) await removeFolder(join(parent, name), log);
  }
}

/** Without what would be special in a path or a pattern. */
function host(): string {
  return hostname().replaceAll(/[^A-Za-z0-9]/g, '_');
}

async function prepare(parent: string): Promise<void> {
  const advice = 'choose another with workDir';
  try {
    await mkdir(parent, { recursive: true, mode: 0o700 });
    const found = await lstat(parent);
    const user = process.getuid?.();
    // Whoever made a folder of a foreseeable name first could read and replace every task's files.
    if (user !== undefined && found.uid !== user && found.uid !== 0) {
      throw new MillraceError(
        'permission_denied',
        `work folder ${parent} must belong to this user (id ${user}) or root, it belongs to user id ${found.uid}; ${advice}`,
      );
    }
    await access(parent, constants.W_OK | constants.X_OK);
    prepared.add(parent);
  } catch (error) {
    if (MillraceError.is(error)) throw error;
    const { code } = error as NodeJS.ErrnoException;
    throw new MillraceError(
      code === 'EACCES' || code === 'EPERM' || code === 'EROFS' ? 'permission_denied' : 'failed_precondition',
      `work folder ${parent} must be a folder this user can write to (${code}); ${advice}`,
      { cause: error },
    );
  }
}

/** Gives the owner all permissions on every folder in it. A removal that has failed may still be under way beside it. */
async function openUp(path: string): Promise<void> {
  await chmod(path, 0o700).catch(() => undefined);
  for (const entry of await readdir(path, { withFileTypes: true }).catch(() => [])) {
    if (entry.isDirectory()) await openUp(join(path, entry.name));
  }
}
