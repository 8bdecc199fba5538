/** A resolved compute, and the one place where bytes are held against the digest that names them. */
import { createHash } from 'node:crypto';
import { computeError } from './errors.ts';
import { checkRef, formatRef } from './ref.ts';
import type { Ref } from './ref.ts';

export interface Artifact {
  readonly alg: string;
  readonly digest: string;
  /** The registered engine that runs it. Not part of what is hashed. */
  readonly engine: string;
  /** The module's bytes, whatever the engine takes them for. */
  readonly wasm: Uint8Array;
}

/** The engine of an artifact whose manifest names none: the reference's name for WASI commands. */
export const DEFAULT_ENGINE = 'wazero';

const verified = new WeakSet<Artifact>();

/** The ref of these bytes. */
export function refOf(bytes: Uint8Array): Ref {
  return { alg: 'sha256', digest: createHash('sha256').update(bytes).digest('hex') };
}

/**
 * The artifact over a private copy of its bytes, hashed. Nobody else holds the copy, so what was verified is what
 * is compiled, whatever becomes of the bytes handed in. An artifact that came from here is returned as it is. The
 * copy is in shared memory, which is how it gets to worker threads without being copied again.
 *
 * @throws MillraceError `data_loss` (reason `bad-digest`) when the bytes are not those of `ref`; `invalid_argument`
 * (`bad-ref`) when no bytes could be; `resource_exhausted` (`module`) when they are more than `maxBytes`.
 */
export function verifyArtifact(ref: Ref, artifact: Artifact, maxBytes: number): Artifact {
  checkRef(ref);
  const { wasm, engine } = artifact;
  if (wasm.byteLength > maxBytes) throw moduleTooBig(ref, wasm.byteLength, maxBytes);
  if (verified.has(artifact) && artifact.digest === ref.digest) return artifact;
  const copy = new Uint8Array(new SharedArrayBuffer(wasm.byteLength));
  copy.set(wasm);
  const actual = refOf(copy);
  if (actual.digest !== ref.digest) {
    throw computeError(
      'data_loss',
      'bad-digest',
      `compute: the ${copy.byteLength} bytes found for ${formatRef(ref)} have the sha256 ${actual.digest}; they were changed or cut, store the artifact again`,
      { details: { want: ref.digest, got: actual.digest } },
    );
  }
  const result: Artifact = Object.freeze({ alg: ref.alg, digest: ref.digest, engine, wasm: copy });
  verified.add(result);
  return result;
}

/** The refusal of a module by its size, also where the size is known before the bytes are read. */
export function moduleTooBig(ref: Ref, bytes: number, maxBytes: number): Error {
  return computeError(
    'resource_exhausted',
    'module',
    `compute: artifact ${formatRef(ref)} has ${bytes} bytes, over maxModuleBytes ${maxBytes}`,
    { details: { limit: 'maxModuleBytes', value: maxBytes, bytes } },
  );
}
