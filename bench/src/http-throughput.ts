/**
 * W1 over loopback: durable no-op tasks per second through submit, lease and complete with batches, between this process
 * as requestor and node and a dispatcher in a process of its own.
 */
import { Pool } from 'undici';
import { addNode, logIn, perSecond, startDispatcher, type BenchDispatcher, type Figure } from './fixtures.ts';

const TASKS_PER_JOB = 5_000;
const BATCH = 256;
/** Requests a node keeps under way, so that commits are shared. */
const IN_FLIGHT = 4;
const CAPABILITY = '/bench/noop/v1';

interface LeasedTask {
  readonly lease_id: string;
  readonly task: { readonly id: string };
}

export interface HttpRates {
  readonly tasksPerSec: number;
  readonly submitsPerSec: number;
  readonly leasesPerSec: number;
}

export async function httpThroughput(): Promise<Figure> {
  await using dispatcher = await startDispatcher();
  const { tasksPerSec, submitsPerSec, leasesPerSec } = await throughHttp(dispatcher, 60_000);
  return {
    title: 'W1 over HTTP: durable no-op tasks, submit + lease + complete',
    lines: [
      `${perSecond(tasksPerSec)} tasks over loopback, batches of ${BATCH}, ${IN_FLIGHT} requests in flight (aim: 20,000/s; ratio ${(tasksPerSec / 20_000).toFixed(2)})`,
      `of it: submit ${perSecond(submitsPerSec)}, lease + complete ${perSecond(leasesPerSec)}`,
    ],
  };
}

/** All of `tasks` are submitted, then all are done; a few before them warm up. */
export async function throughHttp(dispatcher: BenchDispatcher, tasks: number): Promise<HttpRates> {
  const token = await logIn(dispatcher.url, await addNode(dispatcher.client, 'bench'), {
    capabilities: [CAPABILITY],
    maxConcurrency: BATCH * IN_FLIGHT * 2,
  });
  const pool = new Pool(dispatcher.url, { connections: IN_FLIGHT });
  const post = async (path: string, body: object): Promise<unknown> => {
    const response = await pool.request({
      method: 'POST',
      path,
      headers: { authorization: `Bearer ${token}`, 'content-type': 'application/json' },
      body: JSON.stringify(body),
    });
    if (response.statusCode !== 200)
      throw new Error(`${path}: ${response.statusCode} ${await response.body.text()}`);
    return await response.body.json();
  };

  const submit = async (tasks: number): Promise<void> => {
    for (let left = tasks; left > 0; left -= TASKS_PER_JOB) {
      const count = Math.min(left, TASKS_PER_JOB);
      await dispatcher.client.submit({
        tasks: Array.from({ length: count }, () => ({ capability: CAPABILITY, stage: 'noop' })),
      });
    }
  };
  const work = async (): Promise<number> => {
    let done = 0;
    for (;;) {
      const { leases } = (await post('/v1/tasks/lease', { max: BATCH, start: true, tokens: false })) as {
        leases: LeasedTask[];
      };
      if (leases.length === 0) return done;
      const { results } = (await post('/v1/tasks/complete', {
        items: leases.map(({ lease_id, task }) => ({
          task_id: task.id,
          lease_id,
          output_cids: [],
          meta: {},
        })),
      })) as { results: { status: number }[] };
      if (results.some(({ status }) => status !== 200)) throw new Error('a completion was refused');
      done += leases.length;
    }
  };
  const run = async (tasks: number): Promise<{ submitMs: number; workMs: number }> => {
    const started = performance.now();
    await submit(tasks);
    const submitted = performance.now();
    const done = await Promise.all(Array.from({ length: IN_FLIGHT }, work));
    const total = done.reduce((sum, count) => sum + count, 0);
    if (total !== tasks) throw new Error(`${total} of ${tasks} tasks were completed`);
    return { submitMs: submitted - started, workMs: performance.now() - submitted };
  };

  await run(5_000);
  const { submitMs, workMs } = await run(tasks);
  await pool.close();
  return {
    tasksPerSec: (tasks / (submitMs + workMs)) * 1000,
    submitsPerSec: (tasks / submitMs) * 1000,
    leasesPerSec: (tasks / workMs) * 1000,
  };
}
