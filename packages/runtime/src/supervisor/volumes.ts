/**
 * The volumes of an activity: folders of the work directory, known by a path inside the runtime.
 *
 * What is in them was written by the requestor's commands. So nothing here follows a link, climbs with `..`, or opens
 * anything but a regular file: every component is looked at, the last one is opened without following, and on Linux the place
 * that was really opened is checked, which holds even while a command is exchanging folders.
 */
import { constants, type Dirent } from 'node:fs';
import {
  lstat,
  mkdir,
  open,
  readdir,
  readlink,
  realpath,
  rename,
  rm,
  type FileHandle,
} from 'node:fs/promises';
import { randomUUID } from 'node:crypto';
import path from 'node:path';
import { MillraceError } from '@millrace/runner';
import { isObject } from '../sdk/canonical-json.ts';
import type { Volume } from '../sdk/runtime.ts';

/** @throws MillraceError `invalid_argument` for a name that is not one folder name, or a path that is not absolute and plain. */
export function checkVolume(value: unknown): Volume {
  const { name, path: inside } = isObject(value) ? value : {};
  if (typeof name !== 'string' || !/^[^/\\\p{Cc}]+$/u.test(name) || name === '.' || name === '..') {
    throw invalid(`a volume's name must be one folder name, got ${JSON.stringify(name)}`);
  }
  if (typeof inside !== 'string' || !isPlain(inside)) {
    throw invalid(
      `the path of volume ${name} must be absolute and without "." or "..", got ${JSON.stringify(inside)}`,
    );
  }
  return { name, path: inside };
}

/** A place in a volume: the volume's folder on the machine, and the components below it. */
export interface VolumePlace {
  readonly root: string;
  readonly components: readonly string[];
}

export interface VolumeEntry {
  /** Below the volume, with `/`. */
  readonly relPath: string;
  readonly kind: 'file' | 'other';
  /** Bytes; 0 for what is no file. */
  readonly size: number;
}

export class VolumeTable {
  readonly volumes: readonly Volume[];
  readonly #workDir: string;

  /** @throws MillraceError `invalid_argument` when two volumes have one path. */
  constructor(workDir: string, volumes: readonly Volume[]) {
    const paths = volumes.map(({ path: inside }) => trimSlash(inside));
    const twice = paths.find((one, index) => paths.indexOf(one) !== index);
    if (twice !== undefined) throw invalid(`two volumes have the path ${twice}`);
    this.#workDir = workDir;
    this.volumes = volumes;
  }

  /**
   * Where a path inside the runtime is, by the volume with the longest path that holds it.
   *
   * @throws MillraceError `invalid_argument` for a path that is not absolute and plain, or outside of all volumes.
   */
  locate(inside: string): VolumePlace {
    if (!isPlain(inside)) {
      throw invalid(`container path ${JSON.stringify(inside)} must be absolute, without "//", "." or ".."`);
    }
    const [volume] = this.volumes
      .filter((one) => contains(trimSlash(one.path), inside))
      .sort((a, b) => trimSlash(b.path).length - trimSlash(a.path).length);
    if (volume === undefined) {
      const known = this.volumes.map((one) => one.path).join(', ') || 'none';
      throw invalid(`container path ${inside} is outside of all volumes (${known})`);
    }
    const rest = inside.slice(trimSlash(volume.path).length);
    return {
      root: path.join(this.#workDir, volume.name),
      components: rest.split('/').filter((component) => component !== ''),
    };
  }
}

/** Opens a regular file for reading. @throws MillraceError `not_found`, or `permission_denied` for links and special files. */
export async function openInVolume(place: VolumePlace): Promise<FileHandle> {
  const root = await volumeRoot(place);
  await checkFolders(root, place.components.slice(0, -1));
  const file = path.join(root, ...place.components);
  // Not blocking: a named pipe would wait for a writer.
  const flags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;
  const handle = await open(file, flags).catch((error: unknown) => {
    throw placeError(place, error);
  });
  try {
    if (!(await handle.stat()).isFile()) throw refused(place, 'is not a regular file');
    await checkOpened(handle, root, place);
    return handle;
  } catch (error) {
    await handle.close();
    throw error;
  }
}

/** Writes a file whole or not at all, and makes missing folders. @throws as {@link openInVolume}. */
export async function writeToVolume(
  place: VolumePlace,
  chunks: AsyncIterable<Uint8Array>,
  signal?: AbortSignal,
): Promise<void> {
  if (place.components.length === 0) throw refused(place, 'names the volume itself, not a file in it');
  const root = await volumeRoot(place);
  const folders = place.components.slice(0, -1);
  await checkFolders(root, folders, true);
  const folder = path.join(root, ...folders);
  const temporary = path.join(folder, `.${randomUUID()}.part`);
  const handle = await open(temporary, 'wx').catch((error: unknown) => {
    throw placeError(place, error);
  });
  try {
    await checkOpened(handle, root, place);
    for await (const chunk of chunks) {
      signal?.throwIfAborted();
      await handle.writeFile(chunk);
    }
    await handle.close();
    await rename(temporary, path.join(folder, place.components.at(-1)!));
  } catch (error) {
    await handle.close();
    await rm(temporary, { force: true });
    throw error instanceof Error && 'code' in error ? placeError(place, error) : error;
  }
}

/**
 * What is in a folder and below, in the order of the names, folders themselves left out. Links are told, not followed. A folder that does not
 * exist is empty.
 */
export async function* listVolume(place: VolumePlace, maxDepth: number): AsyncGenerator<VolumeEntry> {
  const root = await volumeRoot(place);
  try {
    await checkFolders(root, place.components);
  } catch (error) {
    if (MillraceError.is(error) && error.code === 'not_found') return;
    throw error;
  }
  yield* listFolder(path.join(root, ...place.components), '', maxDepth);
}

async function* listFolder(folder: string, prefix: string, depthLeft: number): AsyncGenerator<VolumeEntry> {
  const entries: Dirent[] = await readdir(folder, { withFileTypes: true });
  for (const entry of entries.sort((a, b) => (a.name < b.name ? -1 : 1))) {
    const relPath = prefix + entry.name;
    if (entry.isDirectory()) {
      if (depthLeft === 0) {
        throw new MillraceError(
          'resource_exhausted',
          `${relPath} is a folder deeper than the limit outputDepth`,
          {
            details: { limit: 'outputDepth' },
          },
        );
      }
      yield* listFolder(path.join(folder, entry.name), `${relPath}/`, depthLeft - 1);
    } else if (entry.isFile()) {
      yield { relPath, kind: 'file', size: (await lstat(path.join(folder, entry.name))).size };
    } else yield { relPath, kind: 'other', size: 0 };
  }
}

/** Bytes of all files below a folder, links not followed; 0 when it does not exist. */
export async function folderBytes(folder: string): Promise<number> {
  let bytes = 0;
  const entries = await readdir(folder, { withFileTypes: true }).catch(() => []);
  for (const entry of entries) {
    const full = path.join(folder, entry.name);
    if (entry.isDirectory()) bytes += await folderBytes(full);
    // Gone since it was listed: it holds nothing.
    else if (entry.isFile())
      bytes += await lstat(full).then(
        ({ size }) => size,
        () => 0,
      );
  }
  return bytes;
}

/** The volume's own folder, which must not be a link out of the work directory. */
async function volumeRoot(place: VolumePlace): Promise<string> {
  const parent = await realpath(path.dirname(place.root));
  const root = path.join(parent, path.basename(place.root));
  const found = await lstat(root).catch(() => null);
  if (found === null) await mkdir(root, { recursive: true });
  else if (!found.isDirectory()) throw refused(place, 'is in a volume that is no folder');
  return root;
}

async function checkFolders(root: string, folders: readonly string[], make = false): Promise<void> {
  let folder = root;
  for (const component of folders) {
    folder = path.join(folder, component);
    if (make) {
      await mkdir(folder).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== 'EEXIST') throw error;
      });
    }
    const found = await lstat(folder).catch(() => null);
    const place = { root, components: folders };
    if (found === null) throw new MillraceError('not_found', `${shownPlace(place)} does not exist`);
    if (!found.isDirectory()) throw refused(place, `has ${component} on its way, which is no folder`);
  }
}

async function checkOpened(handle: FileHandle, root: string, place: VolumePlace): Promise<void> {
  if (process.platform !== 'linux') return;
  const opened = await readlink(`/proc/self/fd/${handle.fd}`);
  if (!opened.startsWith(root + path.sep)) throw refused(place, 'leads out of its volume');
}

function placeError(place: VolumePlace, error: unknown): MillraceError {
  const { code } = error as NodeJS.ErrnoException;
  if (code === 'ENOENT')
    return new MillraceError('not_found', `${shownPlace(place)} does not exist`, { cause: error });
  if (code === 'ELOOP' || code === 'EMLINK') return refused(place, 'is a link');
  if (code === 'ENXIO') return refused(place, 'is not a regular file');
  return new MillraceError('failed_precondition', `${shownPlace(place)} cannot be used`, { cause: error });
}

function refused(place: VolumePlace, why: string): MillraceError {
  return new MillraceError('permission_denied', `${shownPlace(place)} ${why}`);
}

function shownPlace(place: VolumePlace): string {
  return `${JSON.stringify(place.components.join('/'))} in volume ${path.basename(place.root)}`;
}

function isPlain(inside: string): boolean {
  if (!inside.startsWith('/') || /[\\\p{Cc}]/u.test(inside)) return false;
  const components = trimSlash(inside).split('/').slice(1);
  return components.every((component) => component !== '' && component !== '.' && component !== '..');
}

function trimSlash(text: string): string {
  return text.endsWith('/') ? text.slice(0, -1) : text;
}

function contains(volume: string, inside: string): boolean {
  return inside === volume || inside.startsWith(`${volume}/`);
}

function invalid(message: string): MillraceError {
  return new MillraceError('invalid_argument', message);
}
