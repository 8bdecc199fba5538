/**
 * From a file somebody wrote to an artifact: bytes, the engine that runs them, and the ref they are known by.
 *
 * | file | engine | the bytes that are hashed and stored |
 * | --- | --- | --- |
 * | `.ts` `.mts` `.js` `.mjs` | `quickjs` | UTF-8 text of one ECMAScript module without imports, whose default export is the compute |
 * | `.wasm` | `wasm` | the file as it is, if there are limits under which the engine accepts it |
 *
 * The manifest beside the bytes is the reference's, `{"engine","alg","digest"}`; the engine is not part of what is hashed.
 */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { MillraceError } from '@millrace/runner';
import { refOf } from '../artifact.ts';
import { computeError } from '../errors.ts';
import { WIDEST_LIMITS } from '../limits.ts';
import type { Limits } from '../limits.ts';
import { formatRef } from '../ref.ts';
import { inspectModule } from '../wasm/inspect.ts';
import { bundle } from './bundle.ts';
import type { BundledFile } from './bundle.ts';
import { invalidity } from './inspect.ts';

export interface BuildComputeOptions {
  /** The file: `.ts`, `.mts`, `.js`, `.mjs` or `.wasm`. */
  readonly entry: string;
  /** What a `.wasm` file is held against. Default: as much as any limits could grant, since each node has limits of its own. */
  readonly limits?: Partial<Limits>;
}

/** A compute, built. */
export interface BuiltCompute {
  /** `compute://sha256/<digest of bytes>`. */
  readonly ref: string;
  /** `quickjs` or `wasm`. */
  readonly engine: string;
  /** The artifact. */
  readonly bytes: Uint8Array;
  /** To be stored beside the bytes. */
  readonly manifest: ComputeManifest;
  /**
   * The sources the artifact was made of, as JSON: `{"v":1,"entry","files":[{"path","content"}]}`, sorted by path, byte for
   * byte the same wherever it is made. `null` for a `.wasm` file.
   */
  readonly sourceBundle: Uint8Array | null;
  /** Source map of the artifact, for {@link mapTrace}; it is no part of it. `null` for a `.wasm` file. */
  readonly sourceMap: string | null;
}

export interface ComputeManifest {
  readonly engine: string;
  readonly alg: string;
  readonly digest: string;
}

/** Endings of files a compute can be built from, in the order in which they are looked for beside a job file. */
export const COMPUTE_ENDINGS = ['.wasm', '.ts', '.mts', '.js', '.mjs'] as const;

/**
 * Builds a compute. The same sources give the same ref on any machine, wherever they lie and wherever their packages are
 * installed. Types are taken out, not checked.
 *
 * @throws MillraceError `not_found` when there is no such file; `invalid_argument` (reason `module`) with every
 * problem as `file:line:column: what`, or with the reason why the module is refused.
 */
export async function buildCompute(options: BuildComputeOptions): Promise<BuiltCompute> {
  const entry = path.resolve(options.entry);
  const ending = path.extname(entry);
  if (!(COMPUTE_ENDINGS as readonly string[]).includes(ending)) {
    throw computeError(
      'invalid_argument',
      'module',
      `compute: cannot build ${options.entry}: its ending must be one of ${COMPUTE_ENDINGS.join(' ')}`,
    );
  }
  const source = await readEntry(entry, options.entry);
  if (ending === '.wasm') return built('wasm', checkedWasm(source, options), null, null);
  const { code, map, files } = await bundle(entry);
  return built('quickjs', Buffer.from(code, 'utf8'), encodeSources(path.basename(entry), files), map);
}

/** A ready artifact from bytes and the name of their engine, for modules that were built elsewhere. */
function built(
  engine: string,
  bytes: Uint8Array,
  sourceBundle: Uint8Array | null,
  sourceMap: string | null,
): BuiltCompute {
  const ref = refOf(bytes);
  return { ref: formatRef(ref), engine, bytes, manifest: { engine, ...ref }, sourceBundle, sourceMap };
}

async function readEntry(file: string, given: string): Promise<Uint8Array> {
  try {
    return await readFile(file);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    const missing = code === 'ENOENT' || code === 'ENOTDIR';
    throw new MillraceError(
      missing ? 'not_found' : 'unavailable',
      `compute: cannot read ${given} (${code ?? 'error'})`,
      {
        cause: error,
      },
    );
  }
}

function checkedWasm(bytes: Uint8Array, { entry, limits }: BuildComputeOptions): Uint8Array {
  const refusal = refusalOf(bytes, limits ?? WIDEST_LIMITS);
  if (refusal === null) return bytes;
  throw computeError('invalid_argument', 'module', `compute: cannot use ${entry}: ${refusal}`);
}

function refusalOf(bytes: Uint8Array, limits: Partial<Limits>): string | null {
  try {
    const { refusal } = inspectModule(bytes, limits);
    // What a module linked to a plugin imports is held against the plugin where there is one.
    return refusal ?? invalidity(bytes);
  } catch (error) {
    return (error as Error).message;
  }
}

/** As the reference encodes it: no spaces, and these characters always as escapes. */
function encodeSources(entry: string, files: readonly BundledFile[]): Uint8Array {
  const text = JSON.stringify({ v: 1, entry, files }).replace(
    /[<>&\u2028\u2029]/g,
    (found) => `\\u${found.charCodeAt(0).toString(16).padStart(4, '0')}`,
  );
  return Buffer.from(text, 'utf8');
}
