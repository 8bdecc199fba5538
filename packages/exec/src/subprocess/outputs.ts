/**
 * Collects what a program left in its folder of outputs.
 *
 * Nothing in that folder is trusted: names, links, devices and pipes are the program's. Every folder and file is opened relative to the
 * open folder above it, by way of `/proc/self/fd`, and never through a link; what was opened is then judged by its
 * descriptor. So it does not matter what is moved, replaced or linked meanwhile: what is uploaded is a regular file that
 * was in the folder.
 */
import { constants } from 'node:fs';
import { open, readdir, type FileHandle } from 'node:fs/promises';
import { MillraceError, type TaskContext } from '@millrace/runner';
import picomatch from 'picomatch';
import { checkRelativePath, pathProblem, shown } from './file-names.ts';
import type { SubprocessLimits } from './limits.ts';

export interface CollectedOutputs {
  readonly files: number;
  readonly bytes: number;
}

export interface OutputPattern {
  readonly text: string;
  /** A plain name: the program must have made it. */
  readonly literal: boolean;
  matches(path: string): boolean;
}

const MAX_PATTERN_BYTES = 512;
const MAX_PATTERNS = 256;
const MAX_DEPTH = 32;
/** Looked at, matching or not. */
const MAX_ENTRIES = 100_000;

/**
 * Parses patterns of outputs: globs with `*`, `?`, `[…]`, `{a,b}` and `**`, relative to the folder of outputs; a plain name must
 * be there in the end. `where` names them in errors.
 *
 * @throws MillraceError `invalid_argument`, naming the pattern.
 */
export function parseOutputs(where: string, patterns: readonly string[]): OutputPattern[] {
  if (patterns.length > MAX_PATTERNS) {
    throw new MillraceError(
      'invalid_argument',
      `${where} must be at most ${MAX_PATTERNS} patterns, got ${patterns.length}`,
    );
  }
  return patterns.map((text, index) => {
    const here = `${where}[${index}]`;
    if (typeof text !== 'string') {
      throw new MillraceError('invalid_argument', `${here} must be a string, got ${JSON.stringify(text)}`);
    }
    if (text.length > MAX_PATTERN_BYTES) {
      throw new MillraceError(
        'invalid_argument',
        `${here} must be at most ${MAX_PATTERN_BYTES} characters long, it has ${text.length}`,
      );
    }
    checkRelativePath(here, text);
    const literal = !/[*?[\]{}!()+@]/.test(text);
    if (literal) return { text, literal, matches: (path) => path === text };
    // Extended groups can nest repetitions, which take exponential time to fail. A line break is a character like others, so that a
    // name with one is refused and not passed over.
    const matches = picomatch(text, { noextglob: true, nonegate: true, strictSlashes: true, flags: 's' });
    return { text, literal, matches: (path) => matches(path) };
  });
}

/**
 * Uploads every file that a pattern matches, under its path in the folder, in the order of their names.
 *
 * @throws MillraceError `invalid_argument` (a link, a special file, or a name that no artifact may have), `not_found` (a plain name
 * that is not there), `resource_exhausted` (too many files or bytes). Files uploaded before stay so.
 */
export async function collectOutputs(
  ctx: Pick<TaskContext, 'output' | 'signal'>,
  folder: string,
  patterns: readonly OutputPattern[],
  limits: Pick<SubprocessLimits, 'outputBytes' | 'outputFiles'>,
): Promise<CollectedOutputs> {
  if (patterns.length === 0) return { files: 0, bytes: 0 };
  const collection = new Collection(ctx, patterns, limits);
  await using root = await openFolder(folder, 'the folder of outputs');
  await collection.walk(root.handle, '', 0);
  return collection.finish();
}

class Collection {
  readonly #ctx: Pick<TaskContext, 'output' | 'signal'>;
  readonly #patterns: readonly OutputPattern[];
  readonly #limits: Pick<SubprocessLimits, 'outputBytes' | 'outputFiles'>;
  readonly #paths = new Set<string>();
  #entries = 0;
  #bytes = 0;

  constructor(
    ctx: Pick<TaskContext, 'output' | 'signal'>,
    patterns: readonly OutputPattern[],
    limits: Pick<SubprocessLimits, 'outputBytes' | 'outputFiles'>,
  ) {
    this.#ctx = ctx;
    this.#patterns = patterns;
    this.#limits = limits;
  }

  async walk(folder: FileHandle, prefix: string, depth: number): Promise<void> {
    const here = below(folder, '');
    const entries = await readdir(here, { withFileTypes: true });
    this.#entries += entries.length;
    if (this.#entries > MAX_ENTRIES)
      throw exhausted('outputEntries', MAX_ENTRIES, 'looked at more than that many files');
    for (const entry of entries.sort((a, b) => (a.name < b.name ? -1 : 1))) {
      this.#ctx.signal.throwIfAborted();
      const path = prefix + entry.name;
      // The kind seen here only says how to open it.
      if (entry.isDirectory()) {
        if (depth >= MAX_DEPTH) throw exhausted('outputDepth', MAX_DEPTH, `folder ${shown(path)} is deeper`);
        await using inner = await openFolder(below(folder, entry.name), `output folder ${shown(path)}`);
        await this.walk(inner.handle, `${path}/`, depth + 1);
      } else if (this.#patterns.some((pattern) => pattern.matches(path))) {
        await this.#collect(below(folder, entry.name), path);
      }
    }
  }

  finish(): CollectedOutputs {
    const missing = this.#patterns.find(({ literal, text }) => literal && !this.#paths.has(text));
    if (missing !== undefined) {
      throw new MillraceError(
        'not_found',
        `the program ended well, but there is no output ${shown(missing.text)}; it must write it to the folder $MILLRACE_OUTPUTS`,
        { details: { ending: 'output_missing', output: missing.text } },
      );
    }
    return { files: this.#paths.size, bytes: this.#bytes };
  }

  async #collect(location: string, path: string): Promise<void> {
    const problem = pathProblem(path);
    if (problem !== null) throw refused(path, problem);
    const { outputFiles, outputBytes } = this.#limits;
    if (this.#paths.size >= outputFiles) {
      throw exhausted('outputFiles', outputFiles, 'the program left more files that match');
    }
    // Without waiting for somebody to write, should it be a pipe.
    const file = await openUnlinked(
      location,
      constants.O_RDONLY | constants.O_NONBLOCK,
      `output ${shown(path)}`,
    );
    try {
      const { size } = await regular(file, path);
      if (this.#bytes + size > outputBytes) {
        throw exhausted(
          'outputBytes',
          outputBytes,
          `output ${shown(path)} has ${size} bytes, and ${this.#bytes} are collected`,
        );
      }
      // Not beyond the size that was judged, should it be growing.
      const bytes = size === 0 ? [] : file.createReadStream({ start: 0, end: size - 1, autoClose: false });
      await this.#ctx.output.putStream(path, counted(bytes, size, path));
      this.#bytes += size;
      this.#paths.add(path);
    } finally {
      await file.close();
    }
  }
}

async function regular(file: FileHandle, path: string): Promise<{ readonly size: number }> {
  const found = await file.stat();
  if (found.isFile()) return { size: found.size };
  throw refused(path, 'must be a regular file, not a pipe, socket or device');
}

/** All of the bytes that were promised, or an error. */
async function* counted(
  chunks: AsyncIterable<Uint8Array> | Iterable<Uint8Array>,
  size: number,
  path: string,
): AsyncGenerator<Uint8Array> {
  let bytes = 0;
  for await (const chunk of chunks) {
    bytes += chunk.byteLength;
    yield chunk;
  }
  if (bytes !== size) {
    throw new MillraceError(
      'data_loss',
      `output ${shown(path)} changed while it was read: ${bytes} of ${size} bytes`,
    );
  }
}

async function openFolder(
  location: string,
  what: string,
): Promise<{ readonly handle: FileHandle } & AsyncDisposable> {
  const handle = await openUnlinked(location, constants.O_RDONLY | constants.O_DIRECTORY, what);
  return { handle, [Symbol.asyncDispose]: () => handle.close() };
}

async function openUnlinked(location: string, flags: number, what: string): Promise<FileHandle> {
  try {
    return await open(location, flags | constants.O_NOFOLLOW);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    const options = { cause: error, details: { ending: 'output_refused' } };
    if (code === 'ELOOP' || code === 'ENOTDIR') {
      throw new MillraceError(
        'invalid_argument',
        `${what} is a link; outputs must be regular files`,
        options,
      );
    }
    if (code === 'ENXIO') {
      throw new MillraceError(
        'invalid_argument',
        `${what} must be a regular file, not a pipe, socket or device`,
        options,
      );
    }
    throw new MillraceError('invalid_argument', `${what} cannot be read (${code})`, options);
  }
}

/** An entry of an open folder, whatever became of the folder's own path. */
function below(folder: FileHandle, name: string): string {
  return `/proc/self/fd/${folder.fd}/${name}`;
}

function refused(path: string, rule: string): MillraceError {
  return new MillraceError('invalid_argument', `output ${shown(path)} ${rule}`, {
    details: { ending: 'output_refused' },
  });
}

function exhausted(limit: string, value: number, what: string): MillraceError {
  return new MillraceError('resource_exhausted', `limit ${limit} of ${value} reached: ${what}`, {
    details: { ending: 'limit', limit, value },
  });
}
