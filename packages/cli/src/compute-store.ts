/**
 * Where computes are, as the program sees it: files somebody wrote, the folder of what was built here (`computes/` in the
 * data folder), and the dispatcher. What comes from any of them is verified by its digest before it is used.
 */
import { createReadStream } from 'node:fs';
import path from 'node:path';
import {
  COMPUTE_ENDINGS,
  DEFAULT_LIMITS,
  ErrNotFound,
  buildCompute,
  folderResolver,
  formatRef,
  jsonProblem,
  mapTrace,
  parseRef,
  readOrigin,
  scanRefs,
  writeArtifact,
  type Artifact,
  type BuiltCompute,
  type Ref,
  type Resolver,
} from '@millrace/compute';
import type { Computes, JobSubmission } from '@millrace/dispatch/client';
import { MillraceError, sleep, systemClock } from '@millrace/runner';
import { ensureDataDir } from './data-dir.ts';

/** Longer than a dispatcher takes to be started anew. */
const FETCH_TRIES = 6;
const FIRST_PAUSE_MS = 200;

/**
 * Computes of a dispatcher. One that is away for moments is asked again.
 *
 * @param maxModuleBytes larger ones are refused before they are read
 */
export function dispatcherResolver(
  computes: Computes,
  maxModuleBytes: number = DEFAULT_LIMITS.maxModuleBytes,
): Resolver {
  return {
    async resolve(ref, { signal } = {}) {
      for (let tries = 1; ; tries += 1) {
        try {
          return await fetchArtifact(computes, ref, maxModuleBytes, signal);
        } catch (error) {
          const passing = MillraceError.is(error) && error.code === 'unavailable' && error.retryable;
          if (!passing || tries === FETCH_TRIES) throw error;
          await sleep(systemClock, FIRST_PAUSE_MS * 2 ** (tries - 1), signal);
        }
      }
    },
  };
}

async function fetchArtifact(
  computes: Computes,
  ref: Ref,
  maxModuleBytes: number,
  signal: AbortSignal | undefined,
): Promise<Artifact> {
  const found = await computes.open(ref, signal === undefined ? {} : { signal });
  if (found === null) throw new ErrNotFound(formatRef(ref));
  const { body, bytes, engine } = found;
  try {
    if (bytes > maxModuleBytes) {
      throw new MillraceError(
        'resource_exhausted',
        `compute: artifact ${formatRef(ref)} has ${bytes} bytes, over maxModuleBytes ${maxModuleBytes}`,
        { details: { limit: 'maxModuleBytes', value: maxModuleBytes } },
      );
    }
    const wasm = Buffer.alloc(bytes);
    let length = 0;
    for await (const chunk of body as AsyncIterable<Buffer>) {
      // No more than was announced; what is too long has another digest in any case.
      length += chunk.copy(wasm, length);
    }
    return { ...ref, engine, wasm: wasm.subarray(0, length) };
  } catch (error) {
    if (signal?.aborted) throw signal.reason;
    if (MillraceError.is(error)) throw error;
    throw new MillraceError('unavailable', `network error: fetching ${formatRef(ref)} broke off`, {
      cause: error,
    });
  } finally {
    body.destroy();
  }
}

/** Keeps what was built, with its sources beside it, where the other commands find it. */
export async function keepCompute(dataDir: string, built: BuiltCompute): Promise<void> {
  await ensureDataDir(dataDir);
  await writeArtifact(dataDir, built.bytes, built.engine, built);
}

/** A compute at hand. */
export interface FoundCompute {
  readonly ref: string;
  readonly engine: string;
  readonly bytes: Uint8Array;
  /** With positions of the bundle told in terms of the sources, as far as they are known. */
  explain(text: string): string;
}

/**
 * What a command was pointed at: a file is built and kept; a ref is looked for in the data folder, then with `elsewhere`.
 *
 * @throws MillraceError `not_found`, `invalid_argument` for what is neither or cannot be built, `data_loss` for an artifact
 * that is not what its name says.
 */
export async function findCompute(
  target: string,
  options: {
    readonly cwd: string;
    readonly dataDir: string;
    /** A dispatcher, and what to call it. */
    readonly elsewhere?: { readonly url: string; readonly resolver: Resolver };
  },
): Promise<FoundCompute> {
  const { dataDir, elsewhere } = options;
  if (!target.includes('://')) {
    const built = await buildCompute({ entry: path.resolve(options.cwd, target) });
    await keepCompute(dataDir, built);
    return { ...built, explain: explainWith(built.sourceMap) };
  }
  const ref = parseRef(target);
  if (ref === null) {
    throw new MillraceError(
      'invalid_argument',
      `${JSON.stringify(target)} is neither a ref (compute://sha256/<digest>) nor a file (${COMPUTE_ENDINGS.join(', ')})`,
    );
  }
  const artifact = await localArtifact(dataDir, ref);
  if (artifact !== null) {
    const { sourceMap } = await readOrigin(dataDir, ref);
    return { ref: target, engine: artifact.engine, bytes: artifact.wasm, explain: explainWith(sourceMap) };
  }
  const folder = path.join(dataDir, 'computes');
  if (elsewhere === undefined) {
    throw new MillraceError(
      'not_found',
      `${target} is not in ${folder}; build it here with "millrace compute build"`,
    );
  }
  try {
    const { engine, wasm } = await elsewhere.resolver.resolve(ref);
    return { ref: target, engine, bytes: wasm, explain: explainWith(null) };
  } catch (error) {
    if (!ErrNotFound.is(error)) throw error;
    throw new MillraceError(
      'not_found',
      `${target} is neither in ${folder} nor at ${elsewhere.url}; build it here with "millrace compute build", or store it there with "millrace compute push"`,
    );
  }
}

function explainWith(sourceMap: string | null): (text: string) => string {
  return sourceMap === null ? (text) => text : (text) => mapTrace(text, sourceMap);
}

/** Null when the data folder does not have it. */
async function localArtifact(dataDir: string, ref: Ref): Promise<Artifact | null> {
  try {
    return await folderResolver({ dir: dataDir }).resolve(ref);
  } catch (error) {
    if (ErrNotFound.is(error)) return null;
    throw error;
  }
}

/** The engine under its two names. */
const WASM_NAMES: ReadonlySet<string> = new Set(['wasm', 'wazero']);

/**
 * Stores a compute at the dispatcher, unless it is there. True: it was sent.
 *
 * @throws MillraceError `already_exists` when it is there for another engine.
 */
export async function pushCompute(
  computes: Computes,
  { ref, engine, bytes }: Pick<FoundCompute, 'ref' | 'engine' | 'bytes'>,
  signal?: AbortSignal,
): Promise<boolean> {
  const name = parseRef(ref) as Ref;
  const call = signal === undefined ? {} : { signal };
  const there = await computes.stat(name, call);
  if (there === null) {
    await computes.put(name, engine, bytes, call);
    return true;
  }
  if (there.engine === engine || (WASM_NAMES.has(there.engine) && WASM_NAMES.has(engine))) return false;
  throw new MillraceError(
    'already_exists',
    `${ref} is stored there for the engine ${there.engine}, not for ${engine}; an operator can delete it (DELETE /v1/computes/sha256/…)`,
  );
}

/**
 * Before a job is submitted: what was built for it is stored at the dispatcher, and so is what it names by ref and only this
 * machine has. Whatever is missing after that, the dispatcher refuses the job for.
 */
export async function pushComputesOf(
  job: JobSubmission,
  built: readonly BuiltCompute[],
  options: { readonly computes: Computes; readonly dataDir: string; readonly signal: AbortSignal },
): Promise<void> {
  const { computes, dataDir, signal } = options;
  for (const one of built) await pushCompute(computes, one, signal);
  const known = new Set(built.map((one) => one.ref));
  for (const ref of scanRefs(JSON.stringify(job))) {
    const text = formatRef(ref);
    // What no store can hold is the dispatcher's to refuse, with all else that is missing.
    if (known.has(text) || ref.alg !== 'sha256' || !/^[0-9a-f]{64}$/.test(ref.digest)) continue;
    if ((await computes.stat(ref, { signal })) !== null) continue;
    const artifact = await localArtifact(dataDir, ref);
    if (artifact === null) continue;
    await pushCompute(computes, { ref: text, engine: artifact.engine, bytes: artifact.wasm }, signal);
  }
}

/**
 * The input of a compute on the command line: `-` is stdin, `@file` and a path are files, all else is JSON itself. No
 * more than `maxBytes` is ever read.
 *
 * @throws MillraceError `invalid_argument` when it is no JSON document, nothing that can be read, or longer. Nothing at all is
 * a document here as it is on a node: the compute gets `{}`.
 */
export async function readComputeInput(
  text: string,
  io: { readonly cwd: string; readonly stdin: AsyncIterable<Uint8Array | string> },
  maxBytes: number,
): Promise<Uint8Array> {
  const { name, bytes } = await readInput(text, io, maxBytes);
  const problem = bytes.length === 0 ? null : jsonProblem(bytes);
  if (problem !== null) {
    throw new MillraceError('invalid_argument', `--input: ${name} is not one JSON document: ${problem}`);
  }
  return bytes;
}

async function readInput(
  text: string,
  { cwd, stdin }: Parameters<typeof readComputeInput>[1],
  maxBytes: number,
): Promise<{ readonly name: string; readonly bytes: Buffer }> {
  if (text === '-') return { name: 'stdin', bytes: await readAll(stdin, 'stdin', maxBytes) };
  if (!text.startsWith('@') && isJson(text)) {
    const bytes = Buffer.from(text);
    if (bytes.length > maxBytes) throw inputTooLong('the JSON given', maxBytes);
    return { name: 'the JSON given', bytes };
  }
  const file = path.resolve(cwd, text.replace(/^@/, ''));
  try {
    return { name: file, bytes: await readAll(createReadStream(file), file, maxBytes) };
  } catch (error) {
    if (MillraceError.is(error)) throw error;
    throw new MillraceError(
      'invalid_argument',
      `--input must be JSON, a file or -; ${JSON.stringify(text)} is not JSON and cannot be read as a file`,
      { cause: error },
    );
  }
}

async function readAll(
  stream: AsyncIterable<Uint8Array | string>,
  name: string,
  maxBytes: number,
): Promise<Buffer> {
  const chunks: Buffer[] = [];
  let length = 0;
  for await (const chunk of stream) {
    const bytes = Buffer.from(chunk as Uint8Array);
    length += bytes.length;
    if (length > maxBytes) throw inputTooLong(name, maxBytes);
    chunks.push(bytes);
  }
  return Buffer.concat(chunks);
}

function inputTooLong(name: string, maxBytes: number): MillraceError {
  return new MillraceError(
    'invalid_argument',
    `--input: ${name} has more than ${maxBytes} bytes; --max-input allows more`,
  );
}

function isJson(text: string): boolean {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}
