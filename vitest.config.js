// Tests are compiled with the sources and run from dist: what is tested is what is published, and worker threads and
// child processes find their entry files where a user's do.
import { availableParallelism } from 'node:os';
import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    include: ['packages/*/dist/**/*.test.js', 'examples/*/dist/**/*.test.js', 'test/dist/**/*.test.js'],
    // Only test files go through vitest's loader; everything else is loaded by Node itself, as in production.
    server: { deps: { external: [/\/dist\/(?!.*\.test\.js$)/] } },
    pool: 'forks',
    // Many files mostly wait for processes and for the disk: two at a time even on two cores.
    maxWorkers: Math.max(2, availableParallelism() - 1),
    testTimeout: 30_000,
    hookTimeout: 60_000,
    teardownTimeout: 20_000,
  },
});
