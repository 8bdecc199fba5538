import { modelTest } from './model-suite.ts';
import { openSqliteStore } from './sqlite.ts';

modelTest(
  (options) => openSqliteStore({ path: ':memory:', schedule: (run) => queueMicrotask(run), ...options }),
  100,
);
