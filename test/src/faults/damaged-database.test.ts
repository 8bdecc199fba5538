/** What `millrace dispatch serve` says of a SQLite file that a crash or a bad disk has left in a bad state. */
import { appendFileSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { randomBytes } from 'node:crypto';
import path from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { seededRandom } from '@millrace/runner/testing';
import { Program, closing, requestor, startDispatcher, temporaryFolder, until } from '../system.ts';
import { RoundCount, rounds } from './rounds.ts';

const PAGE = 4096;

describe('millrace dispatch serve', () => {
  const count = new RoundCount('SQLite, command line');
  afterAll(() => count.print());

  /** A data folder with so many jobs in it; the dispatcher was ended by `signal`. */
  async function dataFolder(dir: string, jobs: number, signal: 'SIGTERM' | 'SIGKILL'): Promise<string[]> {
    const dispatcher = await startDispatcher(dir);
    await using client = closing(requestor(dispatcher));
    const ids: string[] = [];
    for (let index = 0; index < jobs; index += 1) {
      const task = { capability: '/nobody/v1', meta: { text: randomBytes(2_000).toString('hex') } };
      ids.push(await client.value.submit({ tasks: [task, task, task] }));
    }
    await dispatcher.program.kill(signal);
    return ids;
  }

  const TORN = rounds(2);
  test(
    `killed, with a torn end of its log, starts with all that was acknowledged, ${TORN} times`,
    async () => {
      await using folder = await temporaryFolder();
      const ids: string[] = [];
      for (let round = 0; round < TORN; round += 1) {
        ids.push(...(await dataFolder(folder.path, 3, 'SIGKILL')));
        // A page that was on its way when the power went, half of it.
        appendFileSync(path.join(folder.path, 'millrace.db-wal'), randomBytes(24 + PAGE / 2 + round));
        const dispatcher = await startDispatcher(folder.path);
        await using client = closing(requestor(dispatcher));
        for (const id of ids) expect((await client.value.job(id)).tasks).toHaveLength(3);
        await dispatcher.program.kill('SIGKILL');
        count.add('SIGKILL, and a torn page at the end of the log');
      }
    },
    TORN * 60_000,
  );

  const DAMAGED = rounds(3);
  test(
    `refuses a damaged file with exit code 2 and says what to do, ${DAMAGED} times`,
    async () => {
      await using folder = await temporaryFolder();
      await dataFolder(folder.path, 10, 'SIGTERM');
      const file = path.join(folder.path, 'millrace.db');
      // In order, it is a single file.
      expect(readdirSync(folder.path).filter((name) => name.startsWith('millrace.db'))).toEqual([
        'millrace.db',
      ]);
      const good = readFileSync(file);
      const pages = good.length / PAGE;
      for (let round = 0; round < DAMAGED; round += 1) {
        const random = seededRandom(round + 1);
        const bad = Buffer.from(good);
        // Several pages, since one alone may be free.
        for (let hits = 0; hits < 5; hits += 1) {
          randomBytes(PAGE).copy(bad, PAGE * (1 + Math.floor(random() * (pages - 1))));
        }
        writeFileSync(file, bad);
        await using program = new Program(['dispatch', 'serve', '--port', '0', '--data', folder.path]);
        await until(() => program.exitCode !== null);
        expect([program.exitCode, program.stdout]).toEqual([2, []]);
        expect(program.stderr).toContain(`database ${file} is damaged`);
        expect(program.stderr).toMatch(/Keep a copy of it .* restore a backup/);
        count.add('damaged pages of the main file');
      }
      writeFileSync(file, good);
      const dispatcher = await startDispatcher(folder.path);
      await dispatcher.program.kill('SIGKILL');
    },
    DAMAGED * 60_000,
  );
});
