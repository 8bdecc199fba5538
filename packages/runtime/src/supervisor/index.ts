export { RuntimeSupervisor } from './runtime-supervisor.ts';
export type {
  ActivityState,
  DeployRequest,
  RunRequest,
  RuntimeEvent,
  SupervisorOptions,
} from './runtime-supervisor.ts';
export type { CommandOptions, CommandResult, RunningCommand } from './running-command.ts';
export type { CaptureFormat, CaptureMode, Captured, CapturedValue } from './capture.ts';
export { CAPTURE_ALL, CAPTURE_NOTHING } from './capture.ts';
export { DEFAULT_SUPERVISOR_LIMITS } from './limits.ts';
export type { SupervisorLimits } from './limits.ts';
export type { TracedFrame } from './wire-client.ts';
export { BUILT_IN_COUNTERS } from './usage.ts';
export type { Usage } from './usage.ts';
export { deployRuntime, offerOf, testRuntime } from './invocations.ts';
export type {
  DeployRuntimeOptions,
  DeployRuntimeResult,
  InvocationOptions,
  InvocationResult,
} from './invocations.ts';
export type { OfferTemplate } from './deploy-output.ts';
export {
  descriptorArgs,
  findDescriptor,
  listDescriptors,
  pluginDirs,
  writeDescriptor,
} from './descriptor.ts';
export type {
  DescriptorArgs,
  DescriptorList,
  ListDescriptorsOptions,
  RuntimeDescriptor,
  WriteDescriptorOptions,
} from './descriptor.ts';
export { parseExeScript, runScript } from './exe-script.ts';
export type { ScriptCommand, ScriptEvent, ScriptOptions, ScriptResult } from './exe-script.ts';
export { DEFAULT_GOLEM_TASK_LIMITS, golemRunner } from './golem-runner.ts';
export type { GolemRunnerOptions, GolemTaskLimits } from './golem-runner.ts';
export { runDebugger } from '../debugger/run-debugger.ts';
export type { DebuggerOptions } from '../debugger/run-debugger.ts';
