/**
 * The engine as all tasks of a runner use it: looked at once, swept of what a crashed node left before the first task, and of what this node itself could not
 * remove while the engine was away.
 */
import { MillraceError, describeError } from '@millrace/runner';
import type { Clock, Logger } from '@millrace/runner';
import { ContainerEngine } from './engine.ts';
import type { EngineInfo, EngineOptions, EngineVersion, ImageInfo } from './engine.ts';
import type { ImageReference } from './image-reference.ts';
import type { Owner } from './owner.ts';
import { proveRemoved } from './removal.ts';
import { sweep } from './sweep.ts';

export interface SharedEngineOptions extends EngineOptions {
  /** Whether images that are not there may be fetched. Default false. */
  readonly allowPull?: boolean;
  /** How long that may take. Default 600,000 ms. */
  readonly pullMs?: number;
}

export interface EngineFacts {
  readonly version: EngineVersion;
  readonly info: EngineInfo;
}

const DEFAULT_PULL_MS = 600_000;
/** A container of an earlier task must not hold up the next one for long. */
const ORPHAN_MS = 2_000;

export class SharedEngine {
  readonly engine: ContainerEngine;
  log: Logger | undefined;
  readonly #options: SharedEngineOptions;
  readonly #owner: Owner;
  readonly #clock: Clock;
  /** Names of containers whose removal could not be proven. */
  readonly #orphans = new Set<string>();
  #facts: Promise<EngineFacts> | null = null;

  constructor(options: SharedEngineOptions, owner: Owner, clock: Clock, log: Logger | undefined) {
    this.engine = new ContainerEngine({ ...options, clock });
    this.#options = options;
    this.#owner = owner;
    this.#clock = clock;
    this.log = log;
  }

  /**
   * What the engine is and can do.
   *
   * @throws MillraceError as the engine's calls; `failed_precondition` when it cannot hold containers to their limits
   */
  async ready(signal: AbortSignal): Promise<EngineFacts> {
    signal.throwIfAborted();
    // One look serves all who wait for it, so it is not any one task's to abort. It ends by itself.
    this.#facts ??= this.#look().catch((error: unknown) => {
      this.#facts = null;
      throw error;
    });
    const facts = await unlessAborted(this.#facts, signal);
    await Promise.all([...this.#orphans].map((name) => this.#removeOrphan(name)));
    return facts;
  }

  /** To be removed before the next task; or by the next node's sweep. */
  orphan(name: string): void {
    this.#orphans.add(name);
    // An engine that comes back may be another one.
    this.#facts = null;
  }

  /**
   * The image a task names, fetched if it is missing and that is allowed.
   *
   * @throws MillraceError `not_found` with what to do
   */
  async findImage({ text }: ImageReference, signal: AbortSignal): Promise<ImageInfo> {
    const { allowPull = false, pullMs = DEFAULT_PULL_MS } = this.#options;
    const found = await this.engine.inspectImage(text, { signal });
    if (found !== null) return found;
    if (!allowPull) {
      throw new MillraceError(
        'not_found',
        `container engine ${this.engine.host} has no image ${text}, and this runner may not pull; run "docker pull ${text}" (or podman) there, or set engine.allowPull`,
        { details: { ending: 'spawn_failed', image: text } },
      );
    }
    this.log?.info('pulling a container image', { image: text });
    await this.engine.pullImage(text, { signal, timeoutMs: pullMs });
    const pulled = await this.engine.inspectImage(text, { signal });
    if (pulled !== null) return pulled;
    throw new MillraceError(
      'not_found',
      `container engine ${this.engine.host} pulled ${text} and has no image of that name`,
      { details: { ending: 'spawn_failed', image: text } },
    );
  }

  /** Removes what is left of orphans, as far as the engine answers, and lets go of it. */
  async close(): Promise<void> {
    await Promise.all([...this.#orphans].map((name) => this.#removeOrphan(name)));
    await this.engine.close();
  }

  async #look(): Promise<EngineFacts> {
    const version = await this.engine.version();
    const info = await this.engine.info();
    const { memory, pids, cpus, swap } = info.limits;
    const missing = Object.entries({ memory, pids, cpus }).flatMap(([name, has]) => (has ? [] : [name]));
    if (missing.length > 0) {
      throw new MillraceError(
        'failed_precondition',
        `container engine ${this.engine.host} cannot limit ${missing.join(', ')}; give it the control group controllers (a rootless engine needs them delegated by systemd and cgroup version 2)`,
        { details: { ending: 'sandbox_failed', missing } },
      );
    }
    if (!swap)
      this.log?.warn('the container engine cannot limit swap; containers may use it beyond memoryMiB', {});
    try {
      await sweep(this.engine, this.#owner, this.log === undefined ? {} : { log: this.log });
    } catch (error) {
      // What a crashed node left must not keep this one from working; each failure is in the log.
      if (!(error instanceof AggregateError)) throw error;
    }
    return { version, info };
  }

  async #removeOrphan(name: string): Promise<void> {
    try {
      await proveRemoved(this.engine, name, { clock: this.#clock, withinMs: ORPHAN_MS });
      this.#orphans.delete(name);
      this.log?.info('removed a container that was left when its engine went away', { container: name });
    } catch (error) {
      this.log?.warn('a container that was left when its engine went away cannot be removed yet', {
        container: name,
        error: describeError(error),
      });
    }
  }
}

async function unlessAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  let onAbort: () => void = () => undefined;
  const aborted = new Promise<never>((_, reject) => {
    onAbort = (): void => reject(signal.reason);
    signal.addEventListener('abort', onAbort, { once: true });
  });
  try {
    return await Promise.race([promise, aborted]);
  } finally {
    signal.removeEventListener('abort', onAbort);
  }
}
