/**
 * Graphile Worker. Its performance page: jobs fetched in batches into a local queue, completions batched, a concurrency as the
 * jobs allow, and a pool of two connections more than that at most. It keeps no results; where one is asked for, the
 * task writes it to a table, as its users do.
 */
import { EventEmitter, once } from 'node:events';
import { Logger, makeWorkerUtils, run, type LogLevel, type Runner, type WorkerEvents } from 'graphile-worker';
import pg from 'pg';
import { chunksOf, type Payload, type Peer } from './peer.ts';

const NAME = 'bench';
const BATCH = 256;
const CONCURRENCY = 24;
const POLL_MS = 5;
/** Theirs is an enum that exists for the compiler only. */
const ERROR = 'error' as LogLevel;

export const graphileWorker: Peer = {
  server: 'postgres',
  settings: {
    default: 'addJob one by one, concurrency 1',
    tuned: `addJobs of ${BATCH}, concurrency ${CONCURRENCY}, local queue of 500, completions batched`,
  },
  async open(url, settings) {
    const tuned = settings === 'tuned';
    const quiet = new Logger(() => (level, message) => {
      if (level === ERROR) process.stderr.write(`graphile-worker: ${message}\n`);
    });
    const preset = {
      worker: {
        logger: quiet,
        ...(tuned && {
          concurrentJobs: CONCURRENCY,
          localQueue: { size: 500 },
          completeJobBatchDelay: 0,
          failJobBatchDelay: 0,
        }),
      },
    };
    // Ours, so that its end can be awaited; as large as its own would be.
    const pool = new pg.Pool({ connectionString: url, max: tuned ? CONCURRENCY + 2 : 10 });
    const tell = (error: Error): void => {
      process.stderr.write(`graphile-worker: ${error.message}\n`);
    };
    pool.on('error', tell);
    pool.on('connect', (client) => {
      client.on('error', tell);
    });
    const utils = await makeWorkerUtils({ preset, pgPool: pool });
    await utils.migrate();
    await pool.query(
      'CREATE TABLE IF NOT EXISTS public.bench_results (job_id text PRIMARY KEY, result text)',
    );
    const events = new EventEmitter() as WorkerEvents;
    let runner: Runner | null = null;
    let lastId: string | undefined;
    let submitted = 0;
    let wantsResults = false;
    /** Completion deletes the row. */
    const left = async (): Promise<number> => {
      const { rows } = await pool.query<{ left: number }>(
        'SELECT count(*)::integer AS left FROM graphile_worker._private_jobs',
      );
      return rows[0]?.left ?? 0;
    };
    return {
      async add(payloads) {
        submitted += payloads.length;
        if (tuned) {
          for (const part of chunksOf(payloads, BATCH)) {
            await utils.addJobs(part.map((payload) => ({ identifier: NAME, payload })));
          }
          return;
        }
        for (const payload of payloads) lastId = (await utils.addJob(NAME, payload)).id;
      },
      async work(handler) {
        runner = await run({
          preset,
          pgPool: pool,
          events,
          noHandleSignals: true,
          taskList: {
            [NAME]: async (payload, helpers) => {
              const result = await handler(payload as Payload);
              if (wantsResults) {
                await helpers.query('INSERT INTO public.bench_results VALUES ($1, $2)', [
                  helpers.job.id,
                  result,
                ]);
              }
            },
          },
        });
      },
      async completed(wanted) {
        while (submitted - (await left()) < wanted) await pause(POLL_MS);
      },
      async run(payload) {
        wantsResults = true;
        // It says so just before it stores the completion.
        const completing = once(events, 'job:complete');
        const { id } = await utils.addJob(NAME, payload);
        await completing;
        while ((await left()) > 0) await pause(1);
        const { rows } = await pool.query<{ result: string }>(
          'SELECT result FROM public.bench_results WHERE job_id = $1',
          [id],
        );
        return rows[0]?.result ?? '';
      },
      async standing() {
        const { rows } = await pool.query<{ attempts: number; locked: boolean }>(
          'SELECT attempts, locked_at IS NOT NULL AS locked FROM graphile_worker._private_jobs WHERE id = $1',
          [lastId],
        );
        const [row] = rows;
        if (row === undefined) return { ended: true, text: 'completed' };
        return { ended: false, text: `${row.locked ? 'locked' : 'waiting'}, attempt ${row.attempts}` };
      },
      async [Symbol.asyncDispose]() {
        await runner?.stop();
        await utils.release();
        await pool.end();
      },
    };
  },
};

async function pause(ms: number): Promise<void> {
  await new Promise((resolve) => void setTimeout(resolve, ms));
}
