/** `@millrace/runner/plugin`: runners that are chosen by the kind of a task. */
export { isKindRunner, nameOfCapability } from './runner-plugin.ts';
export type { BuiltTask, KindRunner, PluginContext, RunnerPlugin } from './runner-plugin.ts';
export { makeRunId } from './run-id.ts';
export type { RunId } from './run-id.ts';
export { RunnerError } from './runner-error.ts';
export type { RunnerErrorVariant } from './runner-error.ts';
