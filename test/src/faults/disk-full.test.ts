/**
 * A disk without a byte left, in each place where something is written. Whoever asked is told what is full; nothing is half
 * made; what was acknowledged stays; and once there is space again, everything goes on by itself.
 */
import { randomBytes } from 'node:crypto';
import { chownSync, readdirSync, statSync } from 'node:fs';
import path from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { MillraceError } from '@millrace/runner';
import { until } from '../system.ts';
import { Cluster } from './cluster.ts';
import { SmallDisk, withoutSmallDisk } from './disk.ts';
import { Ledger } from './ledger.ts';
import { PostgresServer, withoutPostgres } from './postgres-support.ts';
import { RoundCount, rounds } from './rounds.ts';
import { ROUND_MS, playRound, type Scene } from './scene.ts';
import { CAPABILITY } from './work.ts';

const TIMES = rounds(2);

describe.skipIf(withoutSmallDisk())('a full disk', () => {
  const count = new RoundCount('disk full');
  afterAll(() => count.print());

  /** Rounds on one cluster, each with the disk full for a while. */
  async function play(
    where: string,
    cluster: Cluster,
    ledger: Ledger,
    disk: SmallDisk,
    whileFull: (scene: Scene, round: number) => Promise<void>,
  ): Promise<void> {
    for (let round = 1; round <= TIMES; round += 1) {
      const losses = await playRound(cluster, ledger, `${where}-${round}`, async (scene) => {
        await scene.leased();
        disk.fill();
        expect(disk.freeBytes).toBe(0);
        try {
          await whileFull(scene, round);
        } finally {
          disk.free();
        }
      });
      count.add(where, losses.length);
      expect(losses).toEqual([]);
    }
    expect(await ledger.losses(cluster.direct(), { everything: true })).toEqual([]);
  }

  /** Submits small and large jobs until one is refused, and resolves with why. */
  async function refusal(ledger: Ledger, scene: Scene, name: string): Promise<MillraceError> {
    for (let index = 1; index <= 2_000; index += 1) {
      const job = {
        tasks: [
          {
            label: 'filler',
            capability: CAPABILITY,
            max_attempts: 100,
            meta: { sha256: null, workMs: 0, bytes: 1, padding: randomBytes(30_000).toString('base64') },
          },
        ],
      };
      try {
        await ledger.trySubmit(scene.client, `${name}.filler-${index}`, job);
      } catch (error) {
        if (!MillraceError.is(error)) throw error;
        // Half of a job would be a job of this key.
        return error;
      }
    }
    throw new Error('the disk took everything');
  }

  test(
    `of a SQLite file: submissions are refused, ${TIMES} times`,
    async () => {
      const ledger = new Ledger();
      using disk = new SmallDisk(12);
      await using cluster = await Cluster.open({
        postgres: null,
        ledger,
        nodes: 2,
        places: { database: disk.path },
      });
      await play('SQLite', cluster, ledger, disk, async (scene, round) => {
        const error = await refusal(ledger, scene, `sqlite-${round}`);
        expect([error.code, error.retryable]).toEqual(['resource_exhausted', true]);
        expect(error.message).toMatch(/the disk or the size limit of database .*millrace\.db is full/);
        // It goes on answering.
        expect((await scene.client.nodes()).length).toBe(2);
      });
    },
    TIMES * ROUND_MS,
  );

  test.skipIf(withoutPostgres())(
    `of a PostgreSQL database: submissions are refused, ${TIMES} times`,
    async () => {
      const ledger = new Ledger();
      using disk = new SmallDisk(48);
      await using postgres = await PostgresServer.start({ fsync: true });
      const { uid, gid } = statSync(postgres.socketFolder);
      chownSync(disk.path, uid, gid);
      await postgres.query('postgres', `CREATE TABLESPACE small LOCATION '${disk.path}'`);
      await postgres.query('postgres', 'CREATE DATABASE small TABLESPACE small');
      await using cluster = await Cluster.open({ postgres, ledger, nodes: 2, database: 'small' });
      await play('PostgreSQL', cluster, ledger, disk, async (scene, round) => {
        const error = await refusal(ledger, scene, `postgres-${round}`);
        expect(error.code).toBe('resource_exhausted');
        expect(error.message).toMatch(/full|space/);
        expect((await scene.client.nodes()).length).toBe(2);
      });
    },
    TIMES * ROUND_MS,
  );

  test(
    `of the blobs: uploads are refused, ${TIMES} times`,
    async () => {
      const ledger = new Ledger();
      using disk = new SmallDisk(16);
      const blobs = path.join(disk.path, 'blobs');
      await using cluster = await Cluster.open({ postgres: null, ledger, nodes: 2, places: { blobs } });
      await play('blobs', cluster, ledger, disk, async (scene, round) => {
        const { domainId } = await scene.client.health();
        // Above what a store keeps itself.
        for (const size of [70_000, 3_000_000]) {
          const name = `refused-${round}-${size}`;
          // Without the patience of `upload`.
          const refused = await scene.client.storage
            .put(domainId, { name, dataType: 'binary' }, randomBytes(size))
            .catch((error: unknown) => error);
          expect(MillraceError.is(refused) && refused.code, `${size} bytes: ${String(refused)}`).toBe(
            'resource_exhausted',
          );
          expect(String(refused)).toMatch(/no space left/);
          // Nothing of it has a name, and nothing lies about.
          expect(await scene.client.storage.find(domainId, { name })).toEqual([]);
        }
        // Of what nodes upload meanwhile there may be something at any time.
        await until(() => readdirSync(path.join(blobs, 'tmp')).length === 0);
      });
    },
    TIMES * ROUND_MS,
  );

  test(
    `of a node's workspace: attempts fail with the reason and are made again, ${TIMES} times`,
    async () => {
      const ledger = new Ledger();
      using disk = new SmallDisk(4);
      await using cluster = await Cluster.open({
        postgres: null,
        ledger,
        nodes: 1,
        places: { work: disk.path },
      });
      await play('workspace', cluster, ledger, disk, async (scene) => {
        await until(() => scene.retries.length > 0);
        for (const reason of scene.retries) expect(reason).toMatch(/ENOSPC|no space/i);
      });
    },
    TIMES * ROUND_MS,
  );
});
