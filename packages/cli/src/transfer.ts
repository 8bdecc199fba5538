/**
 * Inputs up, artifacts down. Streams both ways with retries: memory holds one part of an upload at most, and a download
 * that breaks goes on where it was. Bytes are checked against their digest before a file gets its name.
 */
import { createHash, randomBytes, randomUUID } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { mkdir, open, realpath, rename, rm } from 'node:fs/promises';
import path from 'node:path';
import { addAbortSignal, type Readable } from 'node:stream';
import { retrying, type DomainStorage, type Requestor } from '@millrace/dispatch/client';
import { MillraceError } from '@millrace/runner';
import { checkFolder, makeFolders } from './folders.ts';
import type { InputSource } from './job-file.ts';
import { oneLine } from './text-width.ts';

export interface UploadTo {
  readonly requestor: Pick<Requestor, 'upload' | 'storage'>;
  readonly domainId: string;
  readonly signal: AbortSignal;
  /** Called as bytes were accepted, with the total so far. */
  readonly onBytes?: (total: number) => void;
}

/**
 * Uploads one local input and resolves with its data id.
 *
 * A file is named by its content, so one that is there already is not sent again, and submitting the same job with the same
 * files again is the same submission.
 *
 * @throws MillraceError `failed_precondition` when the file changes while it is read
 */
export async function uploadInput(source: InputSource, stdin: Readable, to: UploadTo): Promise<string> {
  if (source.kind === 'stdin') return await sendStream(stdin, 'stdin', uniqueDataName('stdin'), to);
  const { requestor, domainId, signal } = to;
  const { digest, size } = await hashFile(source.path, signal);
  const base = path.basename(source.path);
  const name = dataName(base, digest.slice(0, 32));
  const find = async (): Promise<string | null> => {
    const found = await retrying(signal, () => requestor.storage.find(domainId, { name }, { signal }));
    return found.find((item) => item.size === size)?.id ?? null;
  };
  const there = await find();
  if (there !== null) return there;
  try {
    return await sendStream(() => openFile(source.path), base, name, to, { sha256: digest, size });
  } catch (error) {
    if (MillraceError.is(error) && error.code === 'failed_precondition') {
      throw new MillraceError(
        'failed_precondition',
        `the input ${base} changed while it was uploaded; try again`,
        {
          cause: error,
        },
      );
    }
    // Somebody else sent the same bytes meanwhile.
    const theirs = MillraceError.is(error) && error.details['status'] === 409 ? await find() : null;
    if (theirs === null) throw error;
    return theirs;
  }
}

function openFile(file: string): Readable {
  return createReadStream(file, { highWaterMark: 256 * 1024 });
}

async function hashFile(
  file: string,
  signal: AbortSignal,
): Promise<{ readonly digest: string; readonly size: number }> {
  const hash = createHash('sha256');
  let size = 0;
  for await (const chunk of openFile(file) as AsyncIterable<Buffer>) {
    signal.throwIfAborted();
    hash.update(chunk);
    size += chunk.length;
  }
  return { digest: hash.digest('hex'), size };
}

/** Waiting for the next chunk of a silent pipe ends with the signal too. */
async function sendStream(
  stream: Readable | (() => Readable),
  from: string,
  name: string,
  { requestor, onBytes, ...to }: UploadTo,
  stated: { readonly sha256?: string; readonly size?: number } = {},
): Promise<string> {
  const { signal } = to;
  const bytes =
    typeof stream === 'function' ? () => addAbortSignal(signal, stream()) : addAbortSignal(signal, stream);
  try {
    return await requestor.upload(bytes, {
      ...to,
      ...stated,
      name,
      dataType: dataTypeOf(from),
      ...(onBytes !== undefined && { onBytes }),
    });
  } catch (error) {
    throw signal.aborted ? signal.reason : error;
  }
}

/** An artifact of a job, as its task reported it. */
export interface Artifact {
  readonly path: string;
  readonly id: string;
  readonly taskId: string;
}

export interface DownloadFrom {
  readonly storage: DomainStorage;
  readonly domainId: string;
  readonly signal: AbortSignal;
}

export interface SavedArtifact {
  readonly path: string;
  readonly id: string;
  readonly task_id: string;
  /** Absolute path on this machine. */
  readonly file: string;
  readonly size: number;
  readonly digest: string;
}

/** An artifact that was left out because its path and another's cannot both be files here. */
export interface SkippedArtifact {
  readonly path: string;
  readonly id: string;
  readonly task_id: string;
  readonly reason: string;
}

export interface SavedArtifacts {
  /** In the order given. */
  readonly saved: readonly SavedArtifact[];
  readonly skipped: readonly SkippedArtifact[];
}

/**
 * That `outDir` is a folder that can be written, or can be made. Nothing is left there.
 *
 * @throws MillraceError `invalid_argument` naming what is in the way
 */
export async function checkOutputFolder(outDir: string): Promise<void> {
  await checkFolder(outDir, '--out');
}

/**
 * Downloads artifacts into `outDir` under their logical paths, four at a time. Without artifacts the folder is not made.
 *
 * A file whose path is also the folder of another artifact is skipped, and so is the later of two that are one file here:
 * that keeps the most of a job, and does not depend on which is downloaded first.
 *
 * @throws MillraceError `invalid_argument` for a path that leaves the folder, before anything is written, and for a folder
 * that cannot be made; `failed_precondition` where it cannot be written; `data_loss` for bytes that do not match their digest.
 */
export async function saveArtifacts(
  artifacts: readonly Artifact[],
  outDir: string,
  from: DownloadFrom,
): Promise<SavedArtifacts> {
  // Every path is judged before the first byte is written.
  const { places, skipped } = placesOf(artifacts);
  if (places.length === 0) return { saved: [], skipped };
  await makeFolders(outDir, '--out');
  const root = await realpath(outDir);
  const saved: SavedArtifact[] = [];
  const queue = places.entries();
  const stop = new AbortController();
  const signal = AbortSignal.any([from.signal, stop.signal]);
  const worker = async (): Promise<void> => {
    for (const [index, { artifact, relative }] of queue) {
      const file = path.join(root, relative);
      await mkdirInside(root, path.dirname(file), artifact.path);
      const info = await downloadTo(file, artifact.id, { ...from, signal });
      saved[index] = { path: artifact.path, id: artifact.id, task_id: artifact.taskId, file, ...info };
    }
  };
  const workers = Array.from({ length: Math.min(4, places.length) }, async () => {
    try {
      await worker();
    } catch (error) {
      // The first failure ends the others; all are waited for, so nothing writes after this function has rejected.
      stop.abort(error);
      throw error;
    }
  });
  await Promise.allSettled(workers);
  await Promise.all(workers);
  return { saved, skipped };
}

interface PlacedArtifact {
  readonly artifact: Artifact;
  readonly relative: string;
}

function placesOf(artifacts: readonly Artifact[]): {
  readonly places: readonly PlacedArtifact[];
  readonly skipped: readonly SkippedArtifact[];
} {
  const all = artifacts.map((artifact) => ({ artifact, relative: safeRelativePath(artifact.path) }));
  /** Each folder an artifact is in, with the first such artifact. */
  const folders = new Map<string, Artifact>();
  for (const { artifact, relative } of all) {
    for (let dir = path.dirname(relative); dir !== '.' && !folders.has(dir); dir = path.dirname(dir)) {
      folders.set(dir, artifact);
    }
  }
  const files = new Map<string, Artifact>();
  const places: PlacedArtifact[] = [];
  const skipped: SkippedArtifact[] = [];
  for (const place of all) {
    const { artifact, relative } = place;
    const inside = folders.get(relative);
    const same = files.get(relative);
    if (inside === undefined && same === undefined) {
      files.set(relative, artifact);
      places.push(place);
      continue;
    }
    const reason =
      inside === undefined
        ? `it is the same file as ${JSON.stringify(same?.path)}`
        : `it is also the folder of ${JSON.stringify(inside.path)}`;
    skipped.push({ path: artifact.path, id: artifact.id, task_id: artifact.taskId, reason });
  }
  return { places, skipped };
}

/** One line for each artifact that was left out. */
export function skippedLines(skipped: readonly SkippedArtifact[]): string[] {
  return skipped.map(({ path: logicalPath, id, reason }) =>
    oneLine(`millrace: artifact ${JSON.stringify(logicalPath)} (${id}) is not saved: ${reason}`),
  );
}

/**
 * A logical path as a relative path of this system.
 *
 * @throws MillraceError `invalid_argument` when it is empty, absolute, or leaves its folder.
 */
export function safeRelativePath(logicalPath: string): string {
  const refuse = (rule: string): never => {
    throw new MillraceError(
      'invalid_argument',
      `artifact path ${JSON.stringify(logicalPath)} is refused: it ${rule}`,
    );
  };
  if (
    logicalPath.startsWith('/') ||
    path.isAbsolute(logicalPath) ||
    path.win32.parse(logicalPath).root !== ''
  ) {
    refuse('is absolute');
  }
  if (logicalPath.includes('\0')) refuse('contains a NUL character');
  const steps = logicalPath
    .split(path.sep === '\\' ? /[/\\]/ : '/')
    .filter((step) => step !== '' && step !== '.');
  if (steps.length === 0) refuse('is empty');
  if (steps.includes('..')) refuse('contains ".."');
  return path.join(...steps);
}

/** Makes `dir` and checks that no link on the way leads out of `root`. */
async function mkdirInside(root: string, dir: string, logicalPath: string): Promise<void> {
  // Step by step, so that nothing is made on the far side of a link before it was looked at.
  let current = root;
  for (const step of path.relative(root, dir).split(path.sep)) {
    if (step === '') continue;
    current = path.join(current, step);
    try {
      await mkdir(current);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw writeError(logicalPath, error);
    }
    const real = await realpath(current);
    if (real !== root && !real.startsWith(root + path.sep)) {
      throw new MillraceError(
        'invalid_argument',
        `artifact path ${JSON.stringify(logicalPath)} is refused: ${current} is a link that leaves the output folder`,
      );
    }
  }
}

async function downloadTo(
  file: string,
  id: string,
  { storage, domainId, signal }: DownloadFrom,
): Promise<{ readonly size: number; readonly digest: string }> {
  const temporary = path.join(path.dirname(file), `.millrace-${randomUUID()}`);
  const handle = await open(temporary, 'wx').catch((error: unknown) => {
    throw writeError(file, error);
  });
  try {
    const hash = createHash('sha256');
    let received = 0;
    let expected: { readonly size: number | null; readonly digest: string | null } | null = null;
    await retrying(signal, async () => {
      const range = received > 0 ? { start: received } : undefined;
      const answer = await storage.openRaw(domainId, id, range, { signal });
      expected ??= { size: answer.size, digest: answer.digest };
      for await (const chunk of answer.body as AsyncIterable<Buffer>) {
        await handle.writeFile(chunk);
        hash.update(chunk);
        received += chunk.length;
      }
    });
    const digest = `sha256:${hash.digest('hex')}`;
    const told = (expected as { readonly digest: string | null } | null)?.digest ?? null;
    if (told !== null && told !== digest) {
      throw new MillraceError('data_loss', `artifact ${id}: expected ${told}, received ${digest}`);
    }
    await handle.close();
    await rename(temporary, file).catch((error: unknown) => {
      throw writeError(file, error);
    });
    return { size: received, digest };
  } catch (error) {
    await handle.close();
    await rm(temporary, { force: true });
    throw error;
  }
}

function writeError(file: string, error: unknown): MillraceError {
  return new MillraceError('failed_precondition', `cannot write ${file}; choose another folder with --out`, {
    cause: error,
  });
}

/** A name that nothing else has. */
export function uniqueDataName(fileName: string): string {
  return dataName(fileName, randomBytes(6).toString('hex'));
}

/**
 * A data name: the file's name in the characters storage allows, then `tag`, with the extension kept at the end, where
 * runners look for it. At most 128 bytes for a tag of up to 32.
 */
function dataName(fileName: string, tag: string): string {
  const extension = path.extname(fileName);
  const clean = (text: string, max: number): string => text.replace(/[^A-Za-z0-9._-]/g, '_').slice(0, max);
  const base = clean(path.basename(fileName, extension), 70) || 'input';
  return `${base}-${tag}${clean(extension, 20)}`;
}

/** The reference node's rule: some extensions are types, others get `_data`, none is `binary`. */
export function dataTypeOf(fileName: string): string {
  const extension = path.extname(fileName).slice(1).toLowerCase();
  if (extension === '') return 'binary';
  if (extension === 'drc') return 'ply_draco';
  if (['json', 'ply', 'glb', 'obj', 'csv', 'mp4'].includes(extension)) return extension;
  return `${extension.replace(/[^a-z0-9]/g, '_').slice(0, 100)}_data`;
}
