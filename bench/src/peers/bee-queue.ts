/**
 * Bee-Queue. Its README: `saveAll` for many jobs, no events and no job objects where nobody listens, finished jobs removed,
 * a concurrency as the jobs allow, and `checkStalledJobs` called by some process, without which a lost job is only looked for
 * when a worker starts.
 */
import { once } from 'node:events';
import BeeQueueClass from 'bee-queue';
import { CompletionCount, chunksOf, type Payload, type Peer } from './peer.ts';

const NAME = 'bench';
const BATCH = 256;
const CONCURRENCY = 100;
/** Its own default for what counts as silence, and the README's for how often to look. */
const STALL_INTERVAL_MS = 5_000;

export const beeQueue: Peer = {
  server: 'redis',
  settings: {
    default: 'save one by one, concurrency 1',
    tuned: `saveAll of ${BATCH}, concurrency ${CONCURRENCY}, no events, completed removed, checkStalledJobs every ${STALL_INTERVAL_MS / 1000} s`,
  },
  async open(url, settings) {
    const tuned = settings === 'tuned';
    const { hostname, port, pathname } = new URL(url);
    const queue = new BeeQueueClass<Payload>(NAME, {
      redis: { host: hostname, port: Number(port), db: Number(pathname.slice(1)) },
      ...(tuned && { getEvents: false, sendEvents: false, storeJobs: false, removeOnSuccess: true }),
    });
    queue.on('error', (error) => process.stderr.write(`bee-queue: ${error.message}\n`));
    await queue.ready();
    const count = new CompletionCount();
    let lastId: string | undefined;
    return {
      async add(payloads) {
        if (tuned) {
          for (const part of chunksOf(payloads, BATCH)) {
            const errors = await queue.saveAll(part.map((payload) => queue.createJob(payload)));
            for (const [, error] of errors) throw error;
          }
          return;
        }
        for (const payload of payloads) lastId = (await queue.createJob(payload).save()).id;
      },
      async work(handler) {
        queue.on('succeeded', () => count.add(1));
        const perform = async (job: BeeQueueClass.Job<Payload>): Promise<string> => handler(job.data);
        if (tuned) {
          queue.process(CONCURRENCY, perform);
          await queue.checkStalledJobs(STALL_INTERVAL_MS);
        } else {
          queue.process(perform);
        }
      },
      completed: (wanted) => count.reach(wanted),
      async run(payload) {
        const job = queue.createJob(payload);
        const succeeded = once(job, 'succeeded') as Promise<[string]>;
        await job.save();
        return (await succeeded)[0];
      },
      async standing() {
        if (lastId === undefined) return { ended: false, text: 'not there' };
        // The types know of no absent job, and of no status.
        const job = (await queue.getJob(lastId)) as unknown as { status: string } | null;
        if (job === null) return { ended: true, text: 'succeeded and removed' };
        return { ended: job.status === 'succeeded' || job.status === 'failed', text: job.status };
      },
      async [Symbol.asyncDispose]() {
        await queue.close(1_000).catch((error: Error) => {
          // Jobs that hang on purpose.
          if (!/time/i.test(error.message)) throw error;
        });
      },
    };
  },
};
