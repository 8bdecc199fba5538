/** The face most embedders need: a ref and an input in, the output out. */
import { verifyArtifact } from './artifact.ts';
import type { Artifact } from './artifact.ts';
import type { Engine, Plugin } from './engine.ts';
import { openEngine } from './engine.ts';
import { computeError, computeReason } from './errors.ts';
import { resolveLimits } from './limits.ts';
import type { InvokeOptions, Limits } from './limits.ts';
import { Lru } from './lru.ts';
import { GuestPool } from './pool/guest-pool.ts';
import type { GuestPoolOptions } from './pool/guest-pool.ts';
import { checkRef, formatRef, requireRef } from './ref.ts';
import type { Ref } from './ref.ts';
import type { Resolver } from './resolver.ts';

/** Runs a compute by its ref. What depends on computes asks for this, and tests hand it something smaller than a manager. */
export interface Runner {
  run(ref: Ref | string, input: Uint8Array | string, options?: InvokeOptions): Promise<Uint8Array>;
}

export interface ComputeManagerOptions extends GuestPoolOptions {
  /** Engines to have ready after {@link ComputeManager.ready}. Default `wasm`. Others are opened when they are needed. */
  readonly engines?: readonly string[];
  /** What computes of the `wasm` engine may be linked against, each held to its digest. Default none. */
  readonly plugins?: readonly Plugin[];
  /** Artifacts kept in memory, in bytes, so that a warm call asks nobody. Default 256 MiB. */
  readonly maxCacheBytes?: number;
}

const CACHE_BYTES = 256 * 1024 * 1024;

/**
 * Resolves a ref, verifies what was found, and runs it: an engine is opened once per name, every run has a fresh instance.
 * Any number of runs may be under way at once; they share nothing but compiled code.
 *
 * It owns worker threads, started by the first run that needs one or by {@link ready}. While nothing runs they do not
 * keep the process alive; `close` ends them.
 */
export class ComputeManager implements Runner, AsyncDisposable {
  readonly #resolver: Resolver | null;
  readonly #limits: Limits;
  readonly #warm: readonly string[];
  readonly #plugins: readonly Plugin[];
  readonly #pool: GuestPool;
  readonly #engines = new Map<string, Promise<Engine>>();
  /** Those of them that have been opened. */
  readonly #opened = new Map<string, Engine>();
  readonly #artifacts: Lru<Artifact>;
  #closed: Promise<void> | null = null;

  /**
   * @param limits override the defaults for all runs.
   * @throws MillraceError `invalid_argument` for a limit or option out of its bounds.
   */
  constructor(resolver: Resolver | null, limits: Partial<Limits> = {}, options: ComputeManagerOptions = {}) {
    this.#resolver = resolver;
    this.#limits = resolveLimits(limits);
    this.#warm = options.engines ?? ['wasm'];
    this.#plugins = options.plugins ?? [];
    this.#pool = new GuestPool(options);
    this.#artifacts = new Lru(options.maxCacheBytes ?? CACHE_BYTES);
  }

  /** Starts everything ahead, so that the first run does not wait for it. */
  async ready(): Promise<void> {
    await Promise.all(this.#warm.map((name) => this.#engine(name)));
    await this.#pool.ready();
  }

  /**
   * Runs a compute. `options` override the manager's limits for this run.
   *
   * @param ref as text or taken apart.
   * @param input JSON, as bytes or text; empty counts as `{}`.
   * @returns the output: one JSON document; `{}` when the guest wrote nothing.
   * @throws the signal's reason when it aborts, after the guest is gone; {@link ErrNotFound}; a MillraceError whose
   * `details.reason` is one of `COMPUTE_REASONS`, with `details.metrics` once the guest had begun.
   */
  async run(ref: Ref | string, input: Uint8Array | string, options: InvokeOptions = {}): Promise<Uint8Array> {
    if (this.#closed !== null) throw closed();
    const { signal } = options;
    signal?.throwIfAborted();
    const limits = resolveLimits(options, this.#limits);
    if (this.#resolver === null) {
      throw computeError('failed_precondition', 'host', 'compute: no resolver configured');
    }
    const wanted = refOf(ref);
    const key = formatRef(wanted);
    // What is at hand is not waited for: each turn of the queue is some of what a warm call costs.
    const artifact =
      this.#artifacts.get(key) ?? (await this.#fetch(this.#resolver, wanted, key, limits, signal));
    try {
      const engine = this.#opened.get(artifact.engine) ?? (await this.#engine(artifact.engine));
      const instance = await engine.load(artifact);
      try {
        const bytes = typeof input === 'string' ? Buffer.from(input) : input;
        return await instance.invoke(bytes, limits, signal);
      } finally {
        // The run has its ending; failing to let go of an instance does not change it.
        await instance.close().catch(() => undefined);
      }
    } catch (error) {
      const reason = computeReason(error);
      if (reason === 'unknown-engine' || reason === 'module') await this.#forget(wanted, key);
      throw error;
    }
  }

  /** Ends all runs and threads; what is under way rejects. Resolves when nothing is left. Harmless when repeated. */
  close(): Promise<void> {
    this.#closed ??= this.#close();
    return this.#closed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #close(): Promise<void> {
    await this.#pool.close();
    const opened = await Promise.allSettled(this.#engines.values());
    await Promise.all(
      opened.map((one) => (one.status === 'fulfilled' ? one.value.close() : Promise.resolve())),
    );
  }

  /** Verified, whoever found it; kept by the digest it was verified with. */
  async #fetch(
    resolver: Resolver,
    ref: Ref,
    key: string,
    limits: Limits,
    signal: AbortSignal | undefined,
  ): Promise<Artifact> {
    const found = await resolver.resolve(ref, signal === undefined ? {} : { signal });
    const artifact = verifyArtifact(ref, found, limits.maxModuleBytes);
    this.#artifacts.set(key, artifact, artifact.wasm.byteLength + 1_024);
    return artifact;
  }

  /** What no engine would take may be known under the wrong engine: the next run asks again. */
  async #forget(ref: Ref, key: string): Promise<void> {
    this.#artifacts.delete(key);
    // The run has its ending, and a cache that cannot be written to does not change it.
    await this.#resolver?.forget?.(ref).catch(() => undefined);
  }

  #engine(name: string): Promise<Engine> {
    const known = this.#engines.get(name);
    if (known !== undefined) return known;
    const opening = openEngine(name, {
      pool: this.#pool,
      maxMemoryMb: this.#limits.maxMemoryMb,
      plugins: this.#plugins,
    });
    this.#engines.set(name, opening);
    opening.then(
      (engine) => this.#opened.set(name, engine),
      // A failure is not remembered: the engine may be registered later.
      () => this.#engines.delete(name),
    );
    return opening;
  }
}

function refOf(ref: Ref | string): Ref {
  if (typeof ref === 'string') return requireRef(ref);
  checkRef(ref);
  return ref;
}

function closed(): Error {
  return computeError('failed_precondition', 'closed', 'compute: the manager is closed');
}
