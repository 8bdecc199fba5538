/**
 * BullMQ. Its guide: `addBulk` for many jobs, a concurrency of 100 to 300 for jobs that do not use the CPU, and automatic
 * removal of finished jobs, which are otherwise kept for ever.
 */
import { once } from 'node:events';
import { Queue, QueueEvents, Worker } from 'bullmq';
import { Redis } from 'ioredis';
import { CompletionCount, chunksOf, type Peer } from './peer.ts';

const NAME = 'bench';
const BATCH = 256;
const CONCURRENCY = 100;

export const bullmq: Peer = {
  server: 'redis',
  settings: {
    default: 'add one by one, concurrency 1',
    tuned: `addBulk of ${BATCH}, concurrency ${CONCURRENCY}, the last 1,000 completed kept`,
  },
  async open(url, settings) {
    const tuned = settings === 'tuned';
    const clients: Redis[] = [];
    const connection = (): Redis => {
      const client = new Redis(url, { maxRetriesPerRequest: null });
      clients.push(client);
      return client;
    };
    const queue = new Queue(NAME, { connection: connection() });
    await queue.waitUntilReady();
    const count = new CompletionCount();
    let worker: Worker | null = null;
    let events: QueueEvents | null = null;
    let lastId: string | undefined;
    return {
      async add(payloads) {
        if (tuned) {
          for (const part of chunksOf(payloads, BATCH)) {
            await queue.addBulk(part.map((data) => ({ name: NAME, data })));
          }
          return;
        }
        for (const data of payloads) lastId = (await queue.add(NAME, data)).id;
      },
      async work(handler) {
        worker = new Worker(NAME, async (job) => handler(job.data), {
          connection: connection(),
          ...(tuned && { concurrency: CONCURRENCY, removeOnComplete: { count: 1000 } }),
        });
        worker.on('completed', () => count.add(1));
        worker.on('error', (error) => process.stderr.write(`bullmq: ${error.message}\n`));
        await worker.waitUntilReady();
      },
      completed: (wanted) => count.reach(wanted),
      async run(data) {
        if (events === null) {
          events = new QueueEvents(NAME, { connection: connection() });
          await events.waitUntilReady();
        }
        const job = await queue.add(NAME, data);
        return (await job.waitUntilFinished(events)) as string;
      },
      async standing() {
        const job = lastId === undefined ? undefined : await queue.getJob(lastId);
        if (job === undefined) return { ended: false, text: 'not there' };
        const state = await job.getState();
        const reason = job.failedReason ? `: ${job.failedReason}` : '';
        return {
          ended: state === 'completed' || state === 'failed',
          text: `${state}${reason}, started ${job.attemptsStarted}, stalled ${job.stalledCounter}`,
        };
      },
      async [Symbol.asyncDispose]() {
        // A forced close does not wait for jobs that hang on purpose.
        await worker?.close(true);
        await events?.close();
        await queue.close();
        for (const client of clients) {
          if (client.status === 'end') continue;
          const ended = once(client, 'end');
          client.disconnect();
          await ended;
        }
      },
    };
  },
};
