import { faultSuite } from './suite.ts';

faultSuite({ name: 'SQLite', startPostgres: null });
