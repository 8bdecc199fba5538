/**
 * The seam: an engine runs artifacts of one kind, and is found by name. Engines add themselves when their module is
 * imported; nothing here knows any of them.
 */
import type { Artifact } from './artifact.ts';
import { computeError } from './errors.ts';
import type { Limits } from './limits.ts';
import type { GuestPool } from './pool/guest-pool.ts';

/** Runs artifacts of one kind. May be used by any number of callers at once. */
export interface Engine {
  /** The name it was opened by. */
  readonly name: string;
  /**
   * Prepares an artifact for one invocation. Hashes the bytes unless that was done before, and may keep compiled forms by
   * digest.
   *
   * @throws MillraceError `data_loss` when the bytes do not have the artifact's digest.
   */
  load(artifact: Artifact): Promise<Instance>;
  /** Frees what it holds; invocations still running fail. Resolves when nothing is left of them. Harmless when repeated. */
  close(): Promise<void>;
}

/** A loaded compute. */
export interface Instance {
  /**
   * JSON bytes in, JSON bytes out; an empty input counts as `{}`. State never passes from one invocation to another.
   * When `signal` aborts, the call rejects with its reason after the guest is gone.
   */
  invoke(input: Uint8Array, limits: Limits, signal?: AbortSignal): Promise<Uint8Array>;
  close(): Promise<void>;
}

/** A plugin file, as its operator vouches for it. */
export interface Plugin {
  readonly bytes: Uint8Array;
  /** The sha256 it must have, as 64 hex digits. */
  readonly digest: string;
}

export interface EngineConfig {
  /** Guest memory in MiB for engines that fix it when they are opened. Engines of this package take it per invocation. */
  readonly maxMemoryMb?: number;
  /**
   * Modules that computes of the `wasm` engine may be linked against, such as Javy's. Each is held to its digest when the
   * engine is opened. Default none.
   */
  readonly plugins?: readonly Plugin[];
  /** Worker threads to run guests in, owned by whoever made them. Default: the engine opens its own, and closes them. */
  readonly pool?: GuestPool;
}

export type EngineConstructor = (config: EngineConfig) => Engine | Promise<Engine>;

const engines = new Map<string, EngineConstructor>();

/** Makes an engine available by name. Registering a name again replaces what was there. */
export function registerEngine(name: string, construct: EngineConstructor): void {
  engines.set(name, construct);
}

/** The names there are, sorted. */
export function engineNames(): string[] {
  return [...engines.keys()].sort();
}

/**
 * Opens the named engine. Whoever opens it closes it.
 *
 * @throws MillraceError `not_found` (reason `unknown-engine`), listing what there is.
 */
export async function openEngine(name: string, config: EngineConfig = {}): Promise<Engine> {
  const construct = engines.get(name);
  if (construct === undefined) {
    throw computeError(
      'not_found',
      'unknown-engine',
      `compute: unknown engine ${JSON.stringify(name)} (available: [${engineNames().join(' ')}])`,
    );
  }
  return construct(config);
}
