export { defineConfig } from './config.ts';
export type { MillraceConfig, RunnerEntry, RunnerLimits } from './config.ts';
