/**
 * An image: WASI programs and the folders they want. It is a zip archive or a folder with a `manifest.json` in the form of
 * Golem's WASI runtime, either of the two without one, or a single module.
 */
import { readFile, readdir, realpath, stat } from 'node:fs/promises';
import path from 'node:path';
import { MillraceError, describeError } from '@millrace/runner';
import { z } from 'zod';
import { ZipArchive, isZip } from './zip.ts';

export interface MountPoint {
  /** Absolute path in the programs. */
  readonly path: string;
  readonly writable: boolean;
}

export interface WasiImage {
  /** What it says it is called. */
  readonly name: string;
  readonly mounts: readonly MountPoint[];
  /** Names of programs; null for a single module, which runs whatever it is called by. */
  readonly entryPoints: readonly string[] | null;
  /**
   * The module behind an entry point and what it is told it is called, or null when there is none of that name.
   *
   * @throws MillraceError for one that cannot be read.
   */
  module(entryPoint: string): Promise<{ readonly bytes: Uint8Array; readonly calledAs: string } | null>;
}

export interface ImageLimits {
  /** The image's file. */
  readonly maxImageBytes: number;
  /** Each module. */
  readonly maxModuleBytes: number;
}

const MANIFEST = 'manifest.json';
const MAX_MANIFEST_BYTES = 1024 * 1024;
const MAX_ENTRIES = 10_000;
const MAX_MOUNTS = 64;
const WASM_MAGIC = Buffer.from('\0asm', 'latin1');

/** Where inputs appear and outputs are collected, for an image that does not say. */
const DEFAULT_MOUNTS: readonly MountPoint[] = [
  { path: '/in', writable: false },
  { path: '/out', writable: true },
];

const mountSchema = z.union([
  z.object({ ro: z.string() }).transform(({ ro }) => ({ path: ro, writable: false })),
  z.object({ rw: z.string() }).transform(({ rw }) => ({ path: rw, writable: true })),
  // Nothing is kept from reading what it has written.
  z.object({ wo: z.string() }).transform(({ wo }) => ({ path: wo, writable: true })),
]);

const manifestSchema = z.object({
  id: z.string(),
  name: z.string(),
  'entry-points': z.array(z.object({ id: z.string().min(1), 'wasm-path': z.string().min(1) })).default([]),
  'mount-points': z.array(mountSchema).max(MAX_MOUNTS).optional(),
});

/** Files by path, `/` between its parts. */
interface Files {
  readonly names: readonly string[];
  read(name: string, maxBytes: number): Promise<Buffer | null>;
}

/** @throws MillraceError naming the image and what is wrong with it. */
export async function openImage(file: string, limits: ImageLimits): Promise<WasiImage> {
  try {
    return await read(file, limits);
  } catch (error) {
    const known = MillraceError.from(error);
    throw new MillraceError(known.code, `image ${file}: ${describeError(known)}`, { cause: error });
  }
}

async function read(file: string, limits: ImageLimits): Promise<WasiImage> {
  const found = await stat(file).catch((error: unknown) => {
    throw new MillraceError('not_found', 'it cannot be read', { cause: error });
  });
  const name = path.basename(file);
  if (found.isDirectory()) return await imageOf(name, await folderFiles(file), limits);
  if (found.size > limits.maxImageBytes) {
    throw new MillraceError(
      'resource_exhausted',
      `it has ${found.size} bytes, over the limit maxImageBytes of ${limits.maxImageBytes}`,
    );
  }
  const bytes = await readFile(file);
  if (isZip(bytes)) {
    const archive = new ZipArchive(bytes, MAX_ENTRIES);
    const files: Files = {
      names: archive.names,
      read: (one, maxBytes) => Promise.resolve(archive.read(one, maxBytes)),
    };
    return await imageOf(name, files, limits);
  }
  if (!bytes.subarray(0, WASM_MAGIC.length).equals(WASM_MAGIC)) {
    throw new MillraceError(
      'invalid_argument',
      'it is neither a folder, nor a zip archive, nor a WebAssembly module',
    );
  }
  return {
    name,
    mounts: DEFAULT_MOUNTS,
    entryPoints: null,
    module: (entryPoint) => Promise.resolve({ bytes, calledAs: entryPoint }),
  };
}

async function imageOf(fileName: string, files: Files, limits: ImageLimits): Promise<WasiImage> {
  const text = await files.read(MANIFEST, MAX_MANIFEST_BYTES);
  const manifest = text === null ? null : parseManifest(text.toString('utf8'));
  const programs = new Map<string, string>();
  for (const { id, 'wasm-path': at } of manifest?.['entry-points'] ?? []) {
    if (programs.has(id)) throw invalid(`${MANIFEST}: two entry points have the id ${JSON.stringify(id)}`);
    const member = path.posix.normalize(at);
    if (!files.names.includes(member)) {
      throw invalid(
        `${MANIFEST}: the wasm-path ${JSON.stringify(at)} of entry point ${JSON.stringify(id)} is not in the image`,
      );
    }
    programs.set(id, member);
  }
  if (manifest === null) {
    for (const name of files.names) {
      if (name.endsWith('.wasm') && !name.includes('/')) programs.set(name.slice(0, -'.wasm'.length), name);
    }
  }
  if (programs.size === 0) {
    throw invalid(
      manifest === null
        ? `it holds neither a ${MANIFEST} nor a file NAME.wasm`
        : `${MANIFEST}: there must be at least one of entry-points`,
    );
  }
  return {
    name: manifest?.name ?? fileName,
    mounts: checkMounts(manifest?.['mount-points'] ?? DEFAULT_MOUNTS),
    entryPoints: [...programs.keys()],
    module: async (entryPoint) => {
      const member = programs.get(entryPoint);
      const bytes = member === undefined ? null : await files.read(member, limits.maxModuleBytes);
      return member === undefined || bytes === null
        ? null
        : { bytes, calledAs: manifest === null ? entryPoint : member };
    },
  };
}

function parseManifest(text: string): z.infer<typeof manifestSchema> {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new MillraceError('invalid_argument', `${MANIFEST} is not JSON`, { cause: error });
  }
  const parsed = manifestSchema.safeParse(value);
  if (parsed.success) return parsed.data;
  throw invalid(
    parsed.error.issues
      .map(({ path: where, message }) => `${MANIFEST}: ${where.join('.') || 'it'}: ${message}`)
      .join('; '),
  );
}

/** As absolute, normal paths, none of them in another. */
function checkMounts(mounts: readonly MountPoint[]): MountPoint[] {
  const checked = mounts.map(({ path: given, writable }) => ({ path: mountPath(given), writable }));
  for (const { path: one } of checked) {
    const clashes = checked.filter(({ path: other }) => other === one || other.startsWith(`${one}/`));
    if (clashes.length > 1) throw invalid(`${MANIFEST}: mount point ${one} is given twice, or holds another`);
  }
  return checked;
}

/** @throws MillraceError `invalid_argument` */
export function mountPath(given: string): string {
  const normal = path.posix.normalize(`/${given}`).replace(/\/$/, '');
  if (normal === '' || given.includes('\0') || given.split('/').includes('..')) {
    throw invalid(`a mount point must be a folder below /, got ${JSON.stringify(given)}`);
  }
  return normal;
}

async function folderFiles(folder: string): Promise<Files> {
  const root = await realpath(folder);
  const entries = await readdir(root, { withFileTypes: true, recursive: true });
  if (entries.length > MAX_ENTRIES) {
    throw new MillraceError(
      'resource_exhausted',
      `it has ${entries.length} entries, over the limit of ${MAX_ENTRIES}`,
    );
  }
  // Links are no files: what is in an image is in its folder.
  const files = entries.filter((entry) => entry.isFile());
  const names = files.map((entry) =>
    path.relative(root, path.join(entry.parentPath, entry.name)).split(path.sep).join('/'),
  );
  return {
    names,
    read: async (name, maxBytes) => {
      if (!names.includes(name)) return null;
      const file = path.join(root, name);
      const { size } = await stat(file);
      if (size > maxBytes) {
        throw new MillraceError(
          'resource_exhausted',
          `${JSON.stringify(name)} has ${size} bytes, over the limit of ${maxBytes}`,
        );
      }
      return await readFile(file);
    },
  };
}

function invalid(rule: string): MillraceError {
  return new MillraceError('invalid_argument', rule);
}
