/**
 * Where tasks keep their files while they run.
 *
 *     <workDir>/node-<uuid>/owner.json      who made this folder
 *     <workDir>/node-<uuid>/<n>-<task id>/  one private folder per attempt, removed when it ends
 *
 * Several nodes may share a work folder. At start a node removes the folders of nodes that no longer exist and leaves
 * those of living ones alone. On the same host a node lives while the process that made its folder does (the same
 * process: its start time is compared too, since ids are reused); a folder made on another host, such as a container
 * before this one on the same volume, is alive while it is touched, which its node does every few minutes.
 *
 * Only folders named as above are ever removed; anything else in the work folder is not ours.
 */
import { randomUUID } from 'node:crypto';
import { constants, readFileSync } from 'node:fs';
import { access, lstat, mkdir, readFile, readdir, rename, rm, utimes, writeFile } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join, resolve } from 'node:path';
import { MillraceError, type Clock, type Logger, type Timer } from '@millrace/runner';

const TOUCH_EVERY_MS = 5 * 60_000;
const FOREIGN_ALIVE_MS = 60 * 60_000;
/** A folder being made gets its final name only once its owner is written in it. */
const NODE_FOLDER = /^(?:node|new)-[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}$/;

interface Owner {
  readonly host: string;
  readonly pid: number;
  /** When the process started, in the kernel's ticks; null where the system does not tell. */
  readonly started: string | null;
}

/** One attempt's folder. */
export interface TaskFolder {
  /** Absolute. Made by {@link create}; not there before. */
  readonly path: string;
  /** Makes the folder, mode 0700, and gives its path. Concurrent and repeated calls make it once. */
  create(): Promise<string>;
  /** Removes it with everything in it, if it was made. Never rejects: what cannot be removed is logged and swept later. */
  remove(): Promise<void>;
}

export interface Workspace extends AsyncDisposable {
  /** This node's folder. */
  readonly root: string;
  /** Costs nothing until the folder is created. */
  taskFolder(taskId: string): TaskFolder;
  /** Removes this node's folder. Idempotent. */
  close(): Promise<void>;
}

export interface WorkspaceOptions {
  /** Made, with mode 0700, if it does not exist. */
  readonly workDir: string;
  readonly clock: Clock;
  readonly log: Logger;
}

/**
 * Removes what crashed nodes left in `workDir` and makes this node's folder in it.
 *
 * @throws MillraceError `permission_denied` when the folder belongs to another user or cannot be written,
 * `failed_precondition` when something that is no folder has its name.
 */
export async function openWorkspace(options: WorkspaceOptions): Promise<Workspace> {
  const { clock, log } = options;
  const workDir = resolve(options.workDir);
  await prepare(workDir);
  await sweep(workDir, clock, log);

  const id = randomUUID();
  const root = join(workDir, `node-${id}`);
  const unfinished = join(workDir, `new-${id}`);
  const owner: Owner = { host: hostname(), pid: process.pid, started: processStart(process.pid) };
  await mkdir(unfinished, { mode: 0o700 });
  await writeFile(join(unfinished, 'owner.json'), JSON.stringify(owner), { mode: 0o600 });
  await rename(unfinished, root);

  let touch: Timer;
  const touchLater = (): void => {
    touch = clock.setTimer(
      () => {
        const now = new Date();
        utimes(root, now, now).catch((error: unknown) =>
          log.warn('work folder cannot be touched', { root, error: String(error) }),
        );
        touchLater();
      },
      TOUCH_EVERY_MS,
      { unref: true },
    );
  };
  touchLater();

  let made = 0;
  let closing: Promise<void> | null = null;
  const close = (): Promise<void> => {
    touch.cancel();
    closing ??= removeTree(root, log);
    return closing;
  };
  return {
    root,
    taskFolder(taskId) {
      const path = join(root, `${(made += 1)}-${taskId}`);
      let creating: Promise<string> | null = null;
      return {
        path,
        create: () => (creating ??= mkdir(path, { mode: 0o700 }).then(() => path)),
        async remove() {
          if (creating === null) return;
          await creating.catch(() => undefined);
          await removeTree(path, log);
        },
      };
    },
    close,
    [Symbol.asyncDispose]: close,
  };
}

async function prepare(workDir: string): Promise<void> {
  try {
    await mkdir(workDir, { recursive: true, mode: 0o700 });
    const stat = await lstat(workDir);
    if (!stat.isDirectory() && !stat.isSymbolicLink()) throw Object.assign(new Error(), { code: 'ENOTDIR' });
    const user = process.getuid?.();
    // The default is a foreseeable name under a folder everybody writes to: whoever made it first could read
    // and replace every task's files.
    if (user !== undefined && stat.uid !== user && stat.uid !== 0) {
      throw new MillraceError(
        'permission_denied',
        `work folder ${workDir} must belong to this user (id ${user}) or root, it belongs to user id ${stat.uid}; ` +
          'choose another work folder',
      );
    }
    await access(workDir, constants.W_OK | constants.X_OK);
  } catch (error) {
    if (MillraceError.is(error)) throw error;
    const { code } = error as NodeJS.ErrnoException;
    throw new MillraceError(
      code === 'EACCES' || code === 'EPERM' || code === 'EROFS' ? 'permission_denied' : 'failed_precondition',
      `work folder ${workDir} must be a folder this user can write to (${code}); choose another work folder`,
      { cause: error },
    );
  }
}

async function sweep(workDir: string, clock: Clock, log: Logger): Promise<void> {
  const entries = await readdir(workDir, { withFileTypes: true });
  await Promise.all(
    entries.map(async (entry) => {
      if (!entry.isDirectory() || !NODE_FOLDER.test(entry.name)) return;
      const path = join(workDir, entry.name);
      if (await isAlive(path, clock)) return;
      log.info('removing what a crashed node left', { path });
      await removeTree(path, log);
    }),
  );
}

async function isAlive(path: string, clock: Clock): Promise<boolean> {
  const owner = await readOwner(path);
  if (owner !== null && owner.host === hostname()) {
    try {
      process.kill(owner.pid, 0);
    } catch (error) {
      // EPERM: it exists and is somebody else's.
      if ((error as NodeJS.ErrnoException).code === 'ESRCH') return false;
    }
    return owner.started === processStart(owner.pid);
  }
  const stat = await lstat(path).catch(() => null);
  return stat !== null && clock.now() - stat.mtimeMs < FOREIGN_ALIVE_MS;
}

/** Null: not readable, which is also how a folder looks that another node is making or removing right now. */
async function readOwner(path: string): Promise<Owner | null> {
  try {
    const value = JSON.parse(await readFile(join(path, 'owner.json'), 'utf8')) as Partial<Owner>;
    return typeof value.host === 'string' && Number.isSafeInteger(value.pid) ? (value as Owner) : null;
  } catch {
    return null;
  }
}

/** Field 22 of Linux's `/proc/<pid>/stat`; the command in field 2 may hold spaces, so fields count from its `)`. */
function processStart(pid: number): string | null {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'latin1');
    return stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19] ?? null;
  } catch {
    return null;
  }
}

async function removeTree(path: string, log: Logger): Promise<void> {
  try {
    await rm(path, { recursive: true, force: true, maxRetries: 3 });
  } catch (error) {
    log.warn('folder cannot be removed, the next start will try again', { path, error: String(error) });
  }
}
