export { createNode } from './node.ts';
export type { ComputeNode, NodeOptions, NodeState } from './node.ts';
export type { CallbackAddress } from './callbacks.ts';
export { BuildContext } from './routing/build-context.ts';
export { RunnerRouter } from './routing/runner-router.ts';
export { CAPABILITY_LABEL } from './routing/roster.ts';
export type { RunnerRegistration } from './routing/roster.ts';
export { RunnerError, makeRunId } from '@millrace/runner/plugin';
export type { BuiltTask, RunId, RunnerPlugin } from '@millrace/runner/plugin';
export type { SupervisionOptions, SupervisionRequest } from './supervision/policy.ts';
export type { SupervisionEvent, SupervisionEventName } from './supervision/events.ts';
export { describeConfig, logLevelOf, parseNodeEnv } from './config.ts';
export type { ConfigEntry, Env, NodeConfig } from './config.ts';
export { createLogger } from './log.ts';
export type { LoggerOptions } from './log.ts';
export {
  DURATION_BUCKETS_SECONDS,
  REJECTION_REASONS,
  RUNNER_ERROR_KINDS,
  TASK_PHASES,
  noopMetrics,
  prometheusMetrics,
  supervisionMetrics,
} from './metrics.ts';
export type {
  MetricsBackend,
  PrometheusMetrics,
  PrometheusOptions,
  RejectionReason,
  RunnerErrorKind,
  SupervisionMetrics,
  TaskOutcome,
  TaskPhase,
} from './metrics.ts';
export { openMetricsServer } from './metrics-server.ts';
export type { MetricsServer, MetricsServerOptions } from './metrics-server.ts';
