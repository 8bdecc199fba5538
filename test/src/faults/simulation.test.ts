/**
 * The simulation of nodes and dispatcher (`packages/node/src/simulation`), with the store on a real PostgreSQL server that is
 * given the simulation's clock. Time stands still while the server is asked, so it is the same world as over SQLite; only the order of
 * answers that are under way together is the server's.
 *
 * `MILLRACE_SIM_SEEDS_POSTGRES` is how many seeds there are; `MILLRACE_SIM_SEED=17` runs that one and prints what happened.
 */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { openPostgresStore } from '@millrace/dispatch/postgres';
import type * as World from '../../../packages/node/src/simulation/world.ts';
import { PostgresServer, withoutPostgres } from './postgres-support.ts';

// It is no part of its package, so it is reached by its place.
const WORLD = new URL('../../../packages/node/dist/simulation/world.js', import.meta.url);

const SEEDS = Number(process.env['MILLRACE_SIM_SEEDS_POSTGRES'] ?? 20);
const ONE = process.env['MILLRACE_SIM_SEED'];
const TEST_FILE = 'test/dist/faults/simulation.test.js';

describe.skipIf(withoutPostgres())('the whole system in simulated time, over PostgreSQL', () => {
  let server: PostgresServer;
  let simulate: typeof World.simulate;
  let SimulationFailure: typeof World.SimulationFailure;

  beforeAll(async () => {
    server = await PostgresServer.start();
    ({ simulate, SimulationFailure } = (await import(WORLD.href)) as typeof World);
  }, 60_000);

  afterAll(async () => {
    await server?.[Symbol.asyncDispose]();
  });

  async function play(seed: number): Promise<World.SimulationResult> {
    const database = await server.createDatabase();
    try {
      return await simulate(seed, {
        openStore: (options) => openPostgresStore({ ...options, url: server.url(database) }),
        testFile: TEST_FILE,
      });
    } finally {
      await server.dropDatabase(database);
    }
  }

  test.skipIf(ONE !== undefined)(
    `keeps its promises under faults, over ${SEEDS} seeds`,
    async () => {
      let attempts = 0;
      let crashes = 0;
      for (let seed = 1; seed <= SEEDS; seed += 1) {
        const result = await play(seed);
        attempts += result.attempts;
        crashes += result.crashes;
      }
      expect(attempts).toBeGreaterThan(SEEDS * 10);
      expect(crashes).toBeGreaterThan(0);
      process.stdout.write(`faults, PostgreSQL: simulation: ${SEEDS} seeds, 0 losses\n`);
    },
    60_000 + SEEDS * 30_000,
  );

  test.runIf(ONE !== undefined)(
    `seed ${ONE}`,
    async () => {
      const { trace } = await play(Number(ONE)).catch((error: unknown) => {
        if (error instanceof SimulationFailure) process.stdout.write(`${error.trace.join('\n')}\n`);
        throw error;
      });
      process.stdout.write(`${trace.join('\n')}\n`);
      expect(trace.length).toBeGreaterThan(0);
    },
    300_000,
  );
});
