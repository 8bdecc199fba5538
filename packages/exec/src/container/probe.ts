/** Whether a container engine answers, and what it can do. */
import { describeError } from '@millrace/runner';
import { ContainerEngine, type EngineInfo } from './engine.ts';

export interface EngineReport {
  /** It answers and can hold containers to every limit they get. */
  readonly available: boolean;
  /** Why not, with what to do. Null when it is. */
  readonly reason: string | null;
  /** Where it was looked for; null when that is nowhere it could be. */
  readonly host: string | null;
  /** Such as `Docker 24.0.7`; null when it does not answer. */
  readonly engine: string | null;
  readonly rootless: boolean | null;
  /** What it can limit; null when it does not tell. */
  readonly limits: EngineInfo['limits'] | null;
}

export interface EngineProbeOptions {
  /** As `DOCKER_HOST`. Default: that, else Docker's own. */
  readonly host?: string;
  /** Longest time for an answer. Default 3,000 ms. */
  readonly callMs?: number;
}

/** Asks the engine who it is. For `millrace doctor`. Never rejects. */
export async function probeContainerEngine(options: EngineProbeOptions = {}): Promise<EngineReport> {
  const none = { available: false, engine: null, rootless: null, limits: null } as const;
  let engine: ContainerEngine;
  try {
    engine = new ContainerEngine({ callMs: 3_000, ...options });
  } catch (error) {
    return { ...none, reason: describeError(error), host: null };
  }
  await using _ = engine;
  try {
    const { name, version } = await engine.version();
    const { rootless, limits } = await engine.info();
    const missing = (['memory', 'pids', 'cpus'] as const).filter((limit) => !limits[limit]);
    return {
      available: missing.length === 0,
      reason:
        missing.length === 0
          ? null
          : `it cannot limit ${missing.join(', ')}; give it the control group controllers (a rootless engine needs them delegated by systemd)`,
      host: engine.host,
      engine: `${name} ${version}`,
      rootless,
      limits,
    };
  } catch (error) {
    return { ...none, reason: describeError(error), host: engine.host };
  }
}
