export { DEFAULT_THREAD_LIMITS, openThreadRunner } from './thread-runner.ts';
export type { ThreadLimits, ThreadRunner, ThreadRunnerOptions } from './thread-runner.ts';
export { probeSandbox } from './sandbox/probe.ts';
export type { ProbeOptions } from './sandbox/probe.ts';
export { SANDBOX_CONTROLS, SANDBOX_TIERS } from './sandbox/controls.ts';
export type {
  AppliedControls,
  CgroupReport,
  SandboxControl,
  SandboxReport,
  SandboxTier,
  TierReport,
} from './sandbox/controls.ts';
export { subprocess } from './subprocess/subprocess.ts';
export type { SubprocessOptions } from './subprocess/subprocess.ts';
export { SUBPROCESS_CAPABILITY, subprocessRunner } from './subprocess/generic.ts';
export type { SubprocessRunnerOptions } from './subprocess/generic.ts';
export type { SubprocessRunner } from './subprocess/subprocess-runner.ts';
export { DEFAULT_SUBPROCESS_LIMITS } from './subprocess/limits.ts';
export type { SubprocessLimits } from './subprocess/limits.ts';
export type { Parameter } from './subprocess/parameters.ts';
export type { SandboxOptions } from './subprocess/sandbox-options.ts';
export type { SandboxRecord } from './sandbox/plan.ts';
export { container } from './container/container.ts';
export type { ContainerOptions, ContainmentOptions } from './container/container.ts';
export { CONTAINER_CAPABILITY, containerRunner } from './container/generic.ts';
export type { ContainerRunnerOptions } from './container/generic.ts';
export type {
  ContainerEngineOptions,
  ContainerRunner,
  ContainerRunnerSettings,
} from './container/container-runner.ts';
export { DEFAULT_CONTAINER_LIMITS } from './container/limits.ts';
export type { ContainerLimits } from './container/limits.ts';
export { sweepContainers } from './container/sweep.ts';
export type { SweepOptions } from './container/sweep.ts';
export { probeContainerEngine } from './container/probe.ts';
export type { EngineProbeOptions, EngineReport } from './container/probe.ts';
