import { describe } from 'vitest';
import { PostgresServer, withoutPostgres } from './postgres-support.ts';
import { faultSuite } from './suite.ts';

describe.skipIf(withoutPostgres())('with a real server', () => {
  // A kill has to find what was synced.
  faultSuite({ name: 'PostgreSQL', startPostgres: () => PostgresServer.start({ fsync: true }) });
});
