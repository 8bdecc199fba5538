/** `@millrace/runner/model`: tasks, kinds, selectors and policies as plain data. No I/O. */
export {
  MAX_AGENT_ID_LENGTH,
  MAX_SLOT_LENGTH,
  MAX_TASK_ID_LENGTH,
  checkAgentId,
  checkSlot,
  checkTaskId,
} from './identity.ts';
export type { AgentId, Slot, TaskId } from './identity.ts';
export { envToJson, lookupEnv, mergeEnv, parseEnv } from './environment.ts';
export type { KeyValue, RunnerEnv, TaskEnv } from './environment.ts';
export {
  SELECTOR_OPERATORS,
  checkSelector,
  labelsToJson,
  parseLabels,
  parseSelector,
  selectorFromFilters,
  selectorMatches,
  selectorToJson,
} from './selector.ts';
export type { Labels, RunnerSelector, SelectorOperator, SelectorRequirement } from './selector.ts';
export {
  ADMISSION_POLICIES,
  DEFAULT_BACKOFF,
  JITTER_POLICIES,
  admissionFromText,
  admissionToText,
  backoffToJson,
  checkBackoff,
  jitterFromText,
  parseAdmission,
  parseBackoff,
  parseJitter,
  parseRestart,
  restartFromText,
  restartToJson,
  restartToText,
  sameBackoff,
} from './policies.ts';
export type { AdmissionPolicy, BackoffPolicy, JitterPolicy, RestartPolicy } from './policies.ts';
export { TASK_PHASES, isTerminal, phaseFromText } from './phase.ts';
export type { TaskPhase } from './phase.ts';
export {
  MAX_SCRIPT_BYTES,
  TASK_KINDS,
  checkTaskKind,
  parseContainer,
  parseSubprocess,
  parseTaskKind,
  parseWasm,
  resolveRuntime,
  scriptBody,
  taskKindToJson,
} from './task-kind.ts';
export type {
  ContainerKind,
  CustomRuntime,
  EmbeddedKind,
  Flag,
  ScriptRuntime,
  SubprocessKind,
  SubprocessMode,
  TaskKind,
  TaskKindName,
  WasmKind,
} from './task-kind.ts';
export { checkTaskSpec, parseTaskSpec, taskSpec, taskSpecToJson, validateForSubmit } from './task-spec.ts';
export type { TaskSpec } from './task-spec.ts';
