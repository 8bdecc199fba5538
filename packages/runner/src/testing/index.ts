export { createTestContext } from './test-context.ts';
export type {
  ArtifactRecord,
  LogLine,
  PortCall,
  TestContext,
  TestContextOptions,
  TestInput,
} from './test-context.ts';
export { SimulatedClock } from './simulated-clock.ts';
export type { RunUntilOptions, SimulatedClockOptions } from './simulated-clock.ts';
export { seededRandom } from './seeded-random.ts';
export { runnerSuite } from './runner-suite.ts';
export type { RunnerCase, RunnerSuiteOptions } from './runner-suite.ts';
