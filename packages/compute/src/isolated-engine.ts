/**
 * An engine whose guests run in the worker threads of a pool. What is different from engine to engine is the module
 * that runs in the worker (see `pool/guest-engine.ts`); everything a guest can do to its host is handled here
 * once: limits, killing, diagnostics, measurements, errors, and keeping what was prepared.
 *
 * Prepared forms are kept in memory only, by digest, engine version and the limits they were made for. V8 as Node offers it
 * cannot write compiled WebAssembly to disk (`v8.serialize` of a Module gives bytes that cannot be read back), and
 * the rewritten bytes are made faster than they could be read and hashed. On disk there are only artifacts, hashed
 * each time they are read: see `resolver.ts`.
 */
import type { Artifact } from './artifact.ts';
import { verifyArtifact } from './artifact.ts';
import type { Engine, EngineConfig, EngineConstructor, Instance } from './engine.ts';
import { computeError } from './errors.ts';
import { nanoseconds } from './limits.ts';
import type { Limits, Metrics } from './limits.ts';
import { Lru } from './lru.ts';
import type { GuestFailure, GuestLimits, Library } from './pool/guest-engine.ts';
import { GuestPool, poolCode } from './pool/guest-pool.ts';
import type { PoolCode, PoolEnding } from './pool/guest-pool.ts';

export interface IsolatedEngineDefinition {
  readonly name: string;
  /** The worker side: URL of a compiled module that exports `guest: GuestEngine`. */
  readonly guest: URL;
  /** Changes whenever the same artifact would be prepared differently. */
  readonly version: string;
  /**
   * Other bytes `prepare` needs, from what the engine was opened with; called once. What it throws is the answer to
   * opening the engine.
   */
  libraries?(config: EngineConfig): readonly Library[];
  /** What of the limits the prepared form depends on. */
  variant(limits: Limits): string;
  /** Memory a prepared form takes. Default: as much as its source. */
  preparedBytes?(prepared: unknown): number;
}

/** Sources and prepared forms kept by one engine. */
const CACHE_BYTES = 256 * 1024 * 1024;
/** What an entry weighs however small it is. */
const ENTRY_BYTES = 64 * 1024;
const EMPTY_INPUT = new TextEncoder().encode('{}');

interface Loaded {
  readonly source: Uint8Array;
  /** By variant. */
  readonly codes: Map<string, PoolCode>;
  /** What it counts for. */
  bytes: number;
}

/** A constructor for {@link registerEngine}. */
export function isolatedEngine(definition: IsolatedEngineDefinition): EngineConstructor {
  return (config) => new IsolatedEngine(definition, config);
}

class IsolatedEngine implements Engine {
  readonly name: string;
  readonly #definition: IsolatedEngineDefinition;
  readonly #pool: GuestPool;
  readonly #ownsPool: boolean;
  readonly #loaded = new Lru<Loaded>(CACHE_BYTES);
  readonly #libraries: readonly Library[];
  #closed = false;

  constructor(definition: IsolatedEngineDefinition, config: EngineConfig) {
    this.name = definition.name;
    this.#definition = definition;
    this.#libraries = definition.libraries?.(config) ?? [];
    this.#pool = config.pool ?? new GuestPool();
    this.#ownsPool = config.pool === undefined;
    this.#pool.preload(definition.guest.href);
  }

  async load(artifact: Artifact): Promise<Instance> {
    const loaded = this.#loaded.get(artifact.digest) ?? this.#take(artifact);
    const label = `${artifact.alg}:${artifact.digest}`;
    const weigh = this.#definition.preparedBytes !== undefined;
    return {
      invoke: (input, limits, signal) => {
        const invoked = this.#invoke(label, loaded, input, limits, signal);
        return weigh ? invoked.finally(() => this.#weigh(artifact.digest, loaded)) : invoked;
      },
      close: () => Promise.resolve(),
    };
  }

  async close(): Promise<void> {
    this.#closed = true;
    if (this.#ownsPool) await this.#pool.close();
  }

  #take(artifact: Artifact): Loaded {
    const { wasm } = verifyArtifact(artifact, artifact, Number.MAX_SAFE_INTEGER);
    const loaded: Loaded = { source: wasm, codes: new Map(), bytes: 2 * wasm.byteLength + ENTRY_BYTES };
    this.#loaded.set(artifact.digest, loaded, loaded.bytes);
    return loaded;
  }

  /** Once something has been prepared, it is known how large that came out. */
  #weigh(digest: string, loaded: Loaded): void {
    const definition = this.#definition;
    if (definition.preparedBytes === undefined) return;
    let bytes = loaded.source.byteLength + ENTRY_BYTES;
    for (const { prepared } of loaded.codes.values())
      if (prepared !== undefined) bytes += definition.preparedBytes(prepared);
    if (bytes === loaded.bytes) return;
    loaded.bytes = bytes;
    this.#loaded.set(digest, loaded, bytes);
  }

  async #invoke(
    label: string,
    loaded: Loaded,
    input: Uint8Array,
    limits: Limits,
    signal: AbortSignal | undefined,
  ): Promise<Uint8Array> {
    if (this.#closed)
      throw computeError('failed_precondition', 'closed', `compute: engine ${this.name} is closed`);
    checkSizes(label, loaded.source, input, limits);
    const { stderr, metricsSink } = limits;
    const guestLimits: GuestLimits = { ...limits, now: nanoseconds(limits.now) };
    let logError: unknown = null;
    const ending = await this.#pool.run({
      code: this.#code(label, loaded, limits),
      input: input.byteLength === 0 ? EMPTY_INPUT : input,
      limits: guestLimits,
      signal,
      onLog:
        stderr === null
          ? null
          : (bytes) => {
              if (logError !== null) return;
              try {
                stderr(bytes);
              } catch (error) {
                logError = error ?? new Error('stderr threw nothing');
              }
            },
    });
    if (ending.kind === 'done' || ending.kind === 'canceled') {
      const reason = ending.kind === 'done' ? null : 'canceled';
      const metrics = metricsOf(ending, reason, input.byteLength);
      if (metrics !== null) metricsSink?.(metrics);
      if (ending.kind === 'canceled') throw signal?.reason;
      if (logError !== null) throw logError;
      return ending.output;
    }
    const failure = failureOf(ending, this.name, label, limits);
    const metrics = metricsOf(ending, failure.reason, input.byteLength);
    if (metrics !== null) metricsSink?.(metrics);
    throw computeError(failure.code, failure.reason, `compute: ${failure.message}`, {
      details: { ...failure.details, ...(metrics !== null && { metrics }) },
    });
  }

  #code(label: string, loaded: Loaded, limits: Limits): PoolCode {
    const variant = this.#definition.variant(limits);
    const known = loaded.codes.get(variant);
    if (known !== undefined) return known;
    const libraries = this.#libraries.map(({ digest }) => `|${digest}`).join('');
    const key = `${label}|${this.#definition.version}|${variant}${libraries}`;
    const code = poolCode(this.#definition.guest.href, key, loaded.source, this.#libraries);
    loaded.codes.set(variant, code);
    // Limits that change with each call must not fill the memory with variants.
    const MAX_VARIANTS = 4;
    if (loaded.codes.size > MAX_VARIANTS) {
      const [oldest] = loaded.codes.keys();
      loaded.codes.delete(oldest as string);
    }
    return code;
  }
}

function checkSizes(label: string, source: Uint8Array, input: Uint8Array, limits: Limits): void {
  if (source.byteLength > limits.maxModuleBytes) {
    throw computeError(
      'resource_exhausted',
      'module',
      `compute: artifact ${label} has ${source.byteLength} bytes, over maxModuleBytes ${limits.maxModuleBytes}`,
      { details: { limit: 'maxModuleBytes', value: limits.maxModuleBytes } },
    );
  }
  if (input.byteLength > limits.maxInputBytes) {
    throw computeError(
      'resource_exhausted',
      'input-limit',
      `compute: the input has ${input.byteLength} bytes, over maxInputBytes ${limits.maxInputBytes}`,
      { details: { limit: 'maxInputBytes', value: limits.maxInputBytes } },
    );
  }
}

/** What went wrong, in the words of the catalogue. */
function failureOf(
  ending: Exclude<PoolEnding, { readonly kind: 'done' | 'canceled' }>,
  engine: string,
  label: string,
  limits: Limits,
): GuestFailure {
  if (ending.kind === 'failed') {
    const { failure, started, logExcerpt } = ending;
    if (!started) return { ...failure, message: `${engine} cannot run ${label}: ${failure.message}` };
    const details = { ...failure.details, ...(logExcerpt !== '' && { stderr: logExcerpt }) };
    if (failure.reason !== 'trap' && failure.reason !== 'exit') return { ...failure, details };
    // What the guest said about it tells more than how it ended.
    const said = logExcerpt.trim();
    const message = said === '' ? `guest trapped: ${failure.message}` : `guest error: ${said}`;
    return { ...failure, message, details: { ...details, cause: failure.message } };
  }
  if (ending.kind === 'died') {
    // Its own heap has a limit; all else is a fault of ours.
    const memory = ending.error?.includes('memory limit') === true;
    return {
      code: memory ? 'resource_exhausted' : 'internal',
      reason: memory ? 'memory-limit' : 'host',
      message: `the worker thread running ${label} ended by itself: ${ending.error ?? 'no reason given'}`,
    };
  }
  if (ending.started) {
    return {
      code: 'deadline_exceeded',
      reason: 'wall-limit',
      message: `wall-clock limit exceeded after ${limits.maxWallMs}ms`,
      details: { limit: 'maxWallMs', value: limits.maxWallMs },
    };
  }
  return {
    code: 'deadline_exceeded',
    reason: 'prepare-limit',
    message: `${engine} took longer than maxPrepareMs ${limits.maxPrepareMs} to prepare ${label}`,
    details: { limit: 'maxPrepareMs', value: limits.maxPrepareMs },
  };
}

/** `null` when there was no invocation: the module could not be prepared. */
function metricsOf(ending: PoolEnding, reason: Metrics['reason'], inputBytes: number): Metrics | null {
  if (!ending.started) return null;
  const status = reason === null ? 'ok' : reason === 'wall-limit' ? 'wall-limit' : 'trapped';
  const { measures, queuedMs } = ending;
  // Spelled out: a spread here was 9 microseconds of every call.
  return {
    wallMs: measures.wallMs,
    memoryBytes: measures.memoryBytes,
    status,
    reason,
    queuedMs,
    prepareMs: measures.prepareMs,
    inputBytes,
    outputBytes: measures.outputBytes,
    fuelUsed: measures.fuelUsed,
    logBytes: measures.logBytes,
    logDroppedBytes: measures.logDroppedBytes,
  };
}
