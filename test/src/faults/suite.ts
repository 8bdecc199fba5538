/**
 * Faults of processes, connections, messages and clocks, over whichever store: rounds of work, one fault in each, and after
 * each round the judge ({@link Ledger.losses}) over what was acknowledged in it; at the end, over everything.
 */
import { setTimeout as pause } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { seededRandom } from '@millrace/runner/testing';
import { until } from '../system.ts';
import { Cluster, LEASE_TTL_MS, type ClusterNode } from './cluster.ts';
import { Ledger } from './ledger.ts';
import type { PostgresServer } from './postgres-support.ts';
import type { Requested } from './proxies.ts';
import { RoundCount, rounds } from './rounds.ts';
import { JOBS, ROUND_MS, TASKS, playRound, type Scene } from './scene.ts';

const HOUR_MS = 3_600_000;

export interface FaultStore {
  readonly name: string;
  /** Null: SQLite. Closed by the suite. */
  readonly startPostgres: (() => Promise<PostgresServer>) | null;
}

/** Adds the tests. */
export function faultSuite({ name, startPostgres }: FaultStore): void {
  describe(`over ${name}, nothing acknowledged is lost and nothing is done twice`, () => {
    const ledger = new Ledger();
    const count = new RoundCount(name);
    let postgres: PostgresServer | null = null;
    let cluster: Cluster;
    let serial = 0;

    beforeAll(async () => {
      postgres = startPostgres === null ? null : await startPostgres();
      cluster = await Cluster.open({ postgres, ledger, nodes: 2 });
    }, 120_000);

    afterAll(async () => {
      count.print();
      await cluster?.[Symbol.asyncDispose]();
      await postgres?.[Symbol.asyncDispose]();
    });

    /** Work, the fault in the middle of it, the end of the work, and the judge. */
    async function round(
      fault: string,
      strike: (scene: Scene) => Promise<void>,
      options: { readonly early?: boolean },
    ): Promise<void> {
      serial += 1;
      const losses = await playRound(cluster, ledger, `round-${serial}`, strike, options);
      count.add(fault, losses.length);
      expect(losses).toEqual([]);
    }

    function faults(
      title: string,
      fault: string,
      usual: number,
      strike: (scene: Scene, index: number) => Promise<void>,
      options: { readonly early?: boolean } = {},
    ): void {
      const times = rounds(usual);
      test(
        `${title}, ${times} times`,
        async () => {
          for (let index = 0; index < times; index += 1) {
            await round(fault, (scene) => strike(scene, index), options);
          }
        },
        times * ROUND_MS,
      );
    }

    const member = (index: number): ClusterNode => cluster.members[index % cluster.members.length]!;

    faults('a node is killed at work', 'SIGKILL of a node', 5, async (scene, index) => {
      const victim = member(index);
      await scene.leased();
      await victim.child.kill();
      await cluster.startNode(victim);
    });

    // From each of these, the caller cannot tell whether it was done.
    const MOMENTS: readonly {
      readonly what: string;
      readonly of: 'clients' | 'nodes';
      readonly matches: (request: Requested) => boolean;
    }[] = [
      { what: 'a submission', of: 'clients', matches: (r) => r.method === 'POST' && r.path === '/v1/jobs' },
      { what: 'a lease', of: 'nodes', matches: ({ path }) => /^\/v1\/tasks(?:\/lease)?(?:\?|$)/.test(path) },
      { what: 'a heartbeat', of: 'nodes', matches: ({ path }) => path.endsWith('/heartbeat') },
      { what: 'an upload', of: 'nodes', matches: (r) => r.method !== 'GET' && r.path.includes('/data') },
      { what: 'a completion', of: 'nodes', matches: ({ path }) => path.endsWith('/complete') },
    ];

    for (const { what, of, matches } of MOMENTS) {
      faults(
        `the dispatcher is killed when it has committed ${what} and before that is answered`,
        'SIGKILL of the dispatcher between commit and answer',
        2,
        async () => {
          await cluster[of].betweenCommitAndAnswer(matches, () => cluster.killDispatcher());
          await cluster.startDispatcher();
        },
        { early: true },
      );
    }

    faults(
      'nodes and dispatcher lose each other and meet again',
      'connection between nodes and dispatcher cut',
      3,
      async (scene, index) => {
        await scene.leased();
        expect(cluster.nodes.cut()).toBeGreaterThan(0);
        // Shorter than a lease, and longer.
        await pause(index % 2 === 0 ? LEASE_TTL_MS / 2 : 2 * LEASE_TTL_MS);
        cluster.nodes.heal();
      },
    );

    faults('a node stands still for two leases', 'SIGSTOP of a node', 3, async (scene, index) => {
      await scene.leased();
      const { child } = member(index);
      child.signal('SIGSTOP');
      await pause(2 * LEASE_TTL_MS);
      child.signal('SIGCONT');
    });

    faults('the dispatcher stands still for two leases', 'SIGSTOP of the dispatcher', 3, async (scene) => {
      await scene.leased();
      cluster.dispatcher.signal('SIGSTOP');
      await pause(2 * LEASE_TTL_MS);
      cluster.dispatcher.signal('SIGCONT');
    });

    faults(
      'of all messages a fifth is lost, a fifth comes twice, a fifth comes late',
      'messages lost, doubled and delayed',
      3,
      async (_scene, index) => {
        const weather = {
          random: seededRandom(index + 1),
          loss: 0.2,
          repeat: 0.2,
          delay: 0.2,
          delayMs: LEASE_TTL_MS / 2,
        };
        const counts = { ...cluster.nodes.counts };
        cluster.nodes.weather = weather;
        cluster.clients.weather = weather;
        await until(() => cluster.nodes.counts.lost - counts.lost >= 20, ROUND_MS / 2);
        cluster.nodes.weather = null;
        cluster.clients.weather = null;
        expect(cluster.nodes.counts.doubled).toBeGreaterThan(counts.doubled);
        expect(cluster.nodes.counts.delayed).toBeGreaterThan(counts.delayed);
      },
    );

    faults(
      'the clocks of the nodes are set an hour ahead, an hour back and right again at work',
      "nodes' clocks an hour off",
      3,
      async (scene, index) => {
        const offsets = [HOUR_MS, -HOUR_MS, 0];
        for (let step = 0; step < offsets.length; step += 1) {
          await scene.leased();
          cluster.members.forEach(({ child }, at) =>
            child.setClock(offsets[(index + step + at) % offsets.length]!),
          );
          await pause(LEASE_TTL_MS / 2);
        }
        for (const { child } of cluster.members) child.setClock(0);
      },
    );

    faults(
      'the dispatcher starts with its clock an hour off, and it is set right at work',
      "the dispatcher's clock an hour off",
      2,
      async (scene, index) => {
        await scene.leased();
        await cluster.killDispatcher();
        await cluster.startDispatcher(index % 2 === 0 ? HOUR_MS : -HOUR_MS);
        await scene.leased();
        cluster.setDispatcherClock(0);
        await pause(LEASE_TTL_MS);
      },
    );

    if (startPostgres !== null) {
      faults(
        'the dispatcher loses its database and gets it back',
        'connection between dispatcher and PostgreSQL cut',
        4,
        async (scene, index) => {
          await scene.leased();
          expect(cluster.database!.cut()).toBeGreaterThan(0);
          await pause(index % 2 === 0 ? 50 : 2 * LEASE_TTL_MS);
          cluster.database!.heal();
        },
      );

      faults('PostgreSQL is killed and started again', 'SIGKILL of PostgreSQL', 3, async (scene) => {
        await scene.leased();
        await postgres!.kill();
        await postgres!.start();
      });
    }

    test('and after all of it, everything is as it was acknowledged', async () => {
      expect(await ledger.losses(cluster.direct(), { everything: true })).toEqual([]);
      expect(ledger.jobs).toBe(JOBS * serial);
      expect(ledger.tasks).toBe(TASKS * JOBS * serial);
      process.stdout.write(
        `faults, ${name}: in all ${ledger.jobs} jobs of ${ledger.tasks} tasks, ${ledger.uploads} uploads, ${ledger.events} events\n`,
      );
    }, 120_000);
  });
}
