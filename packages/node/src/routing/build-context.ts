/** What a router lends to every runner it builds with. */
import type { RunnerEnv } from '@millrace/runner/model';
import type { PluginContext } from '@millrace/runner/plugin';
import { noopMetrics, type MetricsBackend } from '../metrics.ts';

/** Immutable. Empty by default, measuring nothing. */
export class BuildContext implements PluginContext {
  readonly env: RunnerEnv;
  readonly metrics: MetricsBackend;

  constructor(env: RunnerEnv = [], metrics: MetricsBackend = noopMetrics()) {
    this.env = env;
    this.metrics = metrics;
  }

  /** The same with these variables, in place of all it had. They win over those of tasks. */
  withEnv(env: RunnerEnv): BuildContext {
    return new BuildContext(env, this.metrics);
  }

  /** The same, measuring there. */
  withMetrics(metrics: MetricsBackend): BuildContext {
    return new BuildContext(this.env, metrics);
  }

  /** Values of variables are secrets; their number is not. */
  toString(): string {
    return `BuildContext(env_len=${this.env.length})`;
  }
}
