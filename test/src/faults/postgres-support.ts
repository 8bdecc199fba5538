/** The real PostgreSQL server of the dispatcher's own tests. It is no part of the package, so it is reached by its place. */
import type * as Support from '../../../packages/dispatch/src/postgres.test.support.ts';

const SUPPORT = new URL('../../../packages/dispatch/dist/postgres.test.support.js', import.meta.url);

/** A running server. */
export type PostgresServer = Support.PostgresServer;
export const { PostgresServer, withoutPostgres } = (await import(SUPPORT.href)) as typeof Support;
