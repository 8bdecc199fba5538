export { defineConfig } from './config.ts';
export type {
  ComputeConfig,
  ComputeLimits,
  MillraceConfig,
  RunnerEntry,
  RunnerLimits,
  RuntimeEntry,
  RuntimeLimits,
} from './config.ts';
export { WASI_RUNTIME } from './runtime-file.ts';
