import './identity.ts';
import './quickjs/engine.ts';
import './wasm/engine.ts';

export { formatRef, parseRef, scanRefs, storeRef } from './ref.ts';
export type { Ref } from './ref.ts';
export { DEFAULT_ENGINE, refOf, verifyArtifact } from './artifact.ts';
export type { Artifact } from './artifact.ts';
export { COMPUTE_REASONS, ErrNotFound, computeReason } from './errors.ts';
export type { ComputeReason } from './errors.ts';
export {
  DEFAULT_LIMITS,
  DEFAULT_SEED,
  resolveLimits,
  withLogWriter,
  withMetricsSink,
  withNow,
} from './limits.ts';
export type { InvokeOptions, Limits, Metrics } from './limits.ts';
export { engineNames, openEngine, registerEngine } from './engine.ts';
export type { Engine, EngineConfig, EngineConstructor, Instance, Plugin } from './engine.ts';
export {
  cachedResolver,
  compositeResolver,
  folderResolver,
  memoryResolver,
  readOrigin,
  writeArtifact,
} from './resolver.ts';
export type {
  ArtifactOrigin,
  CachedResolverOptions,
  FolderOptions,
  MemoryResolver,
  ResolveOptions,
  Resolver,
} from './resolver.ts';
export { ComputeManager } from './manager.ts';
export type { ComputeManagerOptions, Runner } from './manager.ts';
export { GuestPool } from './pool/guest-pool.ts';
export type { GuestPoolOptions } from './pool/guest-pool.ts';
export { isolatedEngine } from './isolated-engine.ts';
export type { IsolatedEngineDefinition } from './isolated-engine.ts';
export type { GuestCall, GuestEngine, GuestFailure, GuestLimits, GuestOutcome } from './pool/guest-engine.ts';
export { COMPUTE_CAPABILITY, computeRunner } from './runner.ts';
export type { ComputeRunnerOptions } from './runner.ts';
export { inspectModule } from './wasm/inspect.ts';
export type { ModuleSummary } from './wasm/inspect.ts';
export type {
  FunctionType,
  ModuleExport,
  ModuleImport,
  SizeRange,
  TableType,
  ValueType,
} from './wasm/module.ts';
export { COMPUTE_ENDINGS, buildCompute } from './build/build.ts';
export type { BuildComputeOptions, BuiltCompute, ComputeManifest } from './build/build.ts';
export { inspectCompute } from './build/inspect.ts';
export type { ComputeSummary } from './build/inspect.ts';
export { resolveOps } from './build/ops.ts';
export type { ResolvedOps } from './build/ops.ts';
export { DEFAULT_WASI_COMMAND_LIMITS, WasiCommands } from './command/wasi-commands.ts';
export type { WasiCommandLimits, WasiEnding, WasiGrants, WasiMount } from './command/wasi-commands.ts';
export { mapTrace } from './build/trace.ts';
export { jsonProblem } from './json-text.ts';
