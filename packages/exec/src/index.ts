export { DEFAULT_THREAD_LIMITS, openThreadRunner } from './thread-runner.ts';
export type { ThreadLimits, ThreadRunner, ThreadRunnerOptions } from './thread-runner.ts';
