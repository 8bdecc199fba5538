/**
 * pg-boss. `work` takes one job and then waits for the rest of its polling interval, 2 s by default and 0.5 s at least. Its
 * documentation's way to more is `insert` for many jobs and `fetch` and `complete` with many at a time, in a loop of one's own.
 */
import PgBoss from 'pg-boss';
import { chunksOf, type Payload, type Peer } from './peer.ts';

const NAME = 'bench';
const BATCH = 256;
/** The shortest interval it allows. */
const IDLE_MS = 500;
const POLL_MS = 5;

export const pgBoss: Peer = {
  server: 'postgres',
  settings: {
    default: 'send one by one, work() with its polling of 2 s',
    tuned: `insert of ${BATCH}, fetch and complete of ${BATCH}, polling of ${IDLE_MS / 1000} s when idle`,
  },
  async open(url, settings) {
    const tuned = settings === 'tuned';
    const boss = new PgBoss({ connectionString: url });
    boss.on('error', (error) => process.stderr.write(`pg-boss: ${error.message}\n`));
    await boss.start();
    await boss.createQueue(NAME);
    const stopping = new AbortController();
    let loop: Promise<void> | null = null;
    let lastId: string | null = null;
    const countCompleted = async (): Promise<number> => {
      const { rows } = await boss
        .getDb()
        .executeSql(
          "SELECT count(*)::integer AS count FROM pgboss.job WHERE name = $1 AND state = 'completed'",
          [NAME],
        );
      return (rows as { count: number }[])[0]?.count ?? 0;
    };
    return {
      async add(payloads) {
        if (tuned) {
          for (const part of chunksOf(payloads, BATCH)) {
            await boss.insert(part.map((data) => ({ name: NAME, data })));
          }
          return;
        }
        for (const data of payloads) lastId = await boss.send(NAME, data);
      },
      async work(handler) {
        if (!tuned) {
          await boss.work<Payload>(NAME, async (jobs) => {
            let result = '';
            for (const job of jobs) result = await handler(job.data);
            return { result };
          });
          return;
        }
        loop = (async () => {
          while (!stopping.signal.aborted) {
            const jobs = await boss.fetch<Payload>(NAME, { batchSize: BATCH });
            if (jobs.length === 0) {
              await pause(IDLE_MS, stopping.signal);
              continue;
            }
            let result = '';
            for (const job of jobs) result = await handler(job.data);
            const [first] = jobs;
            if (jobs.length === 1 && first !== undefined) await boss.complete(NAME, first.id, { result });
            else
              await boss.complete(
                NAME,
                jobs.map(({ id }) => id),
              );
          }
        })();
      },
      async completed(wanted) {
        while ((await countCompleted()) < wanted) await pause(POLL_MS);
      },
      async run(payload) {
        const id = await boss.send(NAME, payload);
        if (id === null) throw new Error('pg-boss took no job');
        for (;;) {
          const job = await boss.getJobById(NAME, id);
          if (job?.state === 'completed') return (job.output as { result: string }).result;
          if (job?.state === 'failed')
            throw new Error(`pg-boss failed the job: ${JSON.stringify(job.output)}`);
          await pause(1);
        }
      },
      async standing() {
        const job = lastId === null ? null : await boss.getJobById(NAME, lastId);
        if (job === null) return { ended: false, text: 'not there' };
        return {
          ended: job.state === 'completed' || job.state === 'failed',
          text: `${job.state}, retries ${job.retryCount}`,
        };
      },
      async [Symbol.asyncDispose]() {
        stopping.abort();
        await loop;
        await boss.stop({ graceful: false, timeout: 1_000 });
      },
    };
  },
};

async function pause(ms: number, signal?: AbortSignal): Promise<void> {
  if (signal?.aborted) return;
  await new Promise<void>((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener('abort', () => {
      clearTimeout(timer);
      resolve();
    });
  });
}
