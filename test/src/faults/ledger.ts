/**
 * What was acknowledged, and the one judge of all rounds of faults.
 *
 * A loss is any of these:
 * - a submission that was acknowledged is no job, or one key made more than one job;
 * - a job does not end, ends in another state than its tasks, or has other than one last event;
 * - a task has other than one ending in its job's events, or other than one accepted completion;
 * - a completion that a node was told is accepted is not the one that stands;
 * - an event that was read is not there any more, or reads differently, or the stream has a gap;
 * - the bytes of an output are not those of the attempt whose completion was accepted;
 * - an upload that was acknowledged does not read as it was sent.
 */
import { createHash } from 'node:crypto';
import type { DomainStorage, JobDetail, JobEvent, JobSubmission, Requestor } from '@millrace/dispatch/client';
import { MillraceError } from '@millrace/runner';
import { until } from '../system.ts';
import { NONCE_PREFIX, OUTPUT, outputBytes, type Work } from './work.ts';

const ENDINGS: readonly string[] = ['completed', 'failed', 'canceled'];

export class Ledger {
  /** By id, the SHA-256. */
  readonly #uploads = new Map<string, string>();
  /** By id. */
  readonly #jobs = new Map<string, { readonly key: string; readonly spec: JobSubmission }>();
  /** By job: what was read of its events. */
  readonly #seen = new Map<string, JobEvent[]>();
  /** Lease id to task id, of completions that nodes know to be accepted. */
  readonly #told = new Map<string, string>();

  /** Ids that were looked at. */
  readonly #judged = new Set<string>();

  get jobs(): number {
    return this.#jobs.size;
  }

  get uploads(): number {
    return this.#uploads.size;
  }

  get tasks(): number {
    return [...this.#jobs.values()].reduce((sum, { spec }) => sum + spec.tasks.length, 0);
  }

  /** Events read so far of all jobs. */
  get events(): number {
    return [...this.#seen.values()].reduce((sum, events) => sum + events.length, 0);
  }

  /** Sends the bytes until that is acknowledged. Returns their id. */
  async upload(client: Requestor, name: string, bytes: Uint8Array): Promise<string> {
    const id = await untilAcknowledged(async () => {
      try {
        return await client.upload(bytes, { name });
      } catch (error) {
        // An earlier try did it and its answer was lost; nobody else uses this name.
        if (!MillraceError.is(error) || error.code !== 'already_exists') throw error;
        const { domainId } = await client.health();
        const [item] = await client.storage.find(domainId, { name });
        if (item === undefined) throw error;
        return item.id;
      }
    });
    this.#uploads.set(id, createHash('sha256').update(bytes).digest('hex'));
    return id;
  }

  /** An attempt to submit that may be refused; when it is acknowledged, it counts. */
  async trySubmit(client: Requestor, key: string, job: JobSubmission): Promise<void> {
    const spec = { ...job, label: key };
    const id = await client.submit(spec, { idempotencyKey: key });
    this.#jobs.set(id, { key, spec });
  }

  /** Submits until that is acknowledged, under one key. */
  async submit(client: Requestor, key: string, job: JobSubmission): Promise<string> {
    const spec = { ...job, label: key };
    const id = await untilAcknowledged(() => client.submit(spec, { idempotencyKey: key }));
    this.#jobs.set(id, { key, spec });
    return id;
  }

  /** Reads the events of a job until it has ended, and keeps them. */
  async follow(client: Requestor, jobId: string, onEvent: (event: JobEvent) => void): Promise<void> {
    const seen: JobEvent[] = [];
    this.#seen.set(jobId, seen);
    await untilAcknowledged(async () => {
      for await (const event of client.events(jobId, { after: seen.length })) {
        seen.push(event);
        onEvent(event);
      }
    });
  }

  /** What a node said of the endings it reported: lines of its log. */
  hearNode(line: string): void {
    if (!line.includes('"task ended"')) return;
    const { ending, delivery, task_id, lease_id } = JSON.parse(line) as Record<string, unknown>;
    if (ending !== 'completed' || delivery !== 'accepted') return;
    this.#told.set(String(lease_id), String(task_id));
  }

  /**
   * What was lost, a line each, of what was acknowledged since this was last asked, or of `everything` so far. `client` asks over
   * a way without faults.
   */
  async losses(client: Requestor, { everything = false } = {}): Promise<string[]> {
    const losses: string[] = [];
    const isNew = (key: string): boolean => everything || !this.#judged.has(key);
    const lost = (what: string): void => void losses.push(what);
    const { domainId } = await client.health();
    for (const [id, sha256] of this.#uploads) {
      if (!isNew(id)) continue;
      this.#judged.add(id);
      const read = await readBytes(client.storage, domainId, id);
      if (typeof read === 'string') lost(`upload ${id}: ${read}`);
      else if (sha256Of(read) !== sha256) lost(`upload ${id} reads as other bytes`);
    }
    const completedBy = new Map<string, string>();
    for (const [id, { key, spec }] of this.#jobs) {
      if (!isNew(id)) continue;
      this.#judged.add(id);
      const detail = await client.job(id).catch((error: unknown) => String(error));
      if (typeof detail === 'string') {
        lost(`job ${key}: ${detail}`);
        continue;
      }
      const events: JobEvent[] = [];
      for await (const event of client.events(id, { follow: false })) events.push(event);
      for (const loss of [...this.#events(id, detail, events), ...tasksOf(detail, events, spec)])
        lost(`job ${key}: ${loss}`);
      for (const receipt of detail.receipts) {
        if (receipt.outcome === 'completed') completedBy.set(receipt.id, receipt.task_id);
      }
      for (const loss of await outputsOf(detail, client.storage)) lost(`job ${key}: ${loss}`);
    }
    for (const [leaseId, taskId] of this.#told) {
      if (!isNew(leaseId)) continue;
      this.#judged.add(leaseId);
      if (completedBy.get(leaseId) !== taskId) {
        lost(`task ${taskId}: its completion under lease ${leaseId} was accepted and does not stand`);
      }
    }
    for (const [key, ids] of await this.#jobsByKey(client)) {
      if (ids.length !== 1) lost(`submission ${key} made ${ids.length} jobs: ${ids.join()}`);
    }
    return losses;
  }

  #events(jobId: string, { job }: JobDetail, events: readonly JobEvent[]): string[] {
    const losses: string[] = [];
    events.forEach(({ seq }, index) => {
      if (seq !== index + 1) losses.push(`event ${seq} is at place ${index + 1}`);
    });
    const seen = this.#seen.get(jobId) ?? [];
    seen.forEach((event, index) => {
      if (JSON.stringify(events[index]) !== JSON.stringify(event)) {
        losses.push(
          `event ${event.seq} was read as ${JSON.stringify(event)}, now ${JSON.stringify(events[index])}`,
        );
      }
    });
    const ends = events.filter(({ kind }) => ENDINGS.includes(kind.replace('job.', '')));
    if (ends.length !== 1 || ends[0]?.kind !== `job.${job.status}` || events.at(-1) !== ends[0]) {
      losses.push(`it is ${job.status}, its events say ${ends.map(({ kind }) => kind).join() || 'nothing'}`);
    }
    return losses;
  }

  async #jobsByKey(client: Requestor): Promise<Map<string, string[]>> {
    const found = new Map<string, string[]>([...this.#jobs.values()].map(({ key }) => [key, []]));
    for (let cursor: string | null = null; ;) {
      const page = await client.jobs({ limit: 100, ...(cursor !== null && { cursor }) });
      for (const { job } of page.items) found.set(job.label, [...(found.get(job.label) ?? []), job.id]);
      cursor = page.next_cursor;
      if (cursor === null) return found;
    }
  }
}

/** Every task was doable, so each has to be done, once. */
function tasksOf(detail: JobDetail, events: readonly JobEvent[], spec: JobSubmission): string[] {
  const losses: string[] = [];
  if (detail.tasks.length !== spec.tasks.length) {
    losses.push(`it has ${detail.tasks.length} tasks, ${spec.tasks.length} were submitted`);
  }
  if (detail.job.status !== 'completed') losses.push(`it is ${detail.job.status}`);
  for (const task of detail.tasks) {
    const ends = events.filter(
      ({ task_id, kind }) => task_id === task.id && ENDINGS.includes(kind.replace('task.', '')),
    );
    if (ends.length !== 1 || ends[0]?.kind !== `task.${task.status}`) {
      losses.push(
        `task ${task.label} is ${task.status}, its events say ${ends.map(({ kind }) => kind).join() || 'nothing'}`,
      );
    }
    const done = detail.receipts.filter(
      ({ task_id, outcome }) => task_id === task.id && outcome === 'completed',
    );
    if (done.length !== 1) {
      losses.push(`task ${task.label} is ${task.status} (${task.reason}), ${done.length} completions stand`);
    } else if (done[0]!.outputs.join() !== task.output_cids.join()) {
      losses.push(`task ${task.label} has outputs ${task.output_cids.join()}, accepted were others`);
    }
  }
  return losses;
}

/** The bytes of each output beside what the accepted completion says of its attempt. */
async function outputsOf(detail: JobDetail, storage: DomainStorage): Promise<string[]> {
  const losses: string[] = [];
  for (const receipt of detail.receipts.filter(({ outcome }) => outcome === 'completed')) {
    const task = detail.tasks.find(({ id }) => id === receipt.task_id);
    const { artifacts } = receipt.meta as unknown as {
      artifacts: readonly { readonly logical_path: string; readonly id: string }[];
    };
    const output = artifacts.find(({ logical_path }) => logical_path === OUTPUT);
    const nonce = artifacts
      .find(({ logical_path }) => logical_path.startsWith(NONCE_PREFIX))
      ?.logical_path.slice(NONCE_PREFIX.length);
    if (task === undefined || output === undefined || nonce === undefined) {
      losses.push(`the completion of task ${receipt.task_id} does not name its artifacts`);
      continue;
    }
    const { bytes } = task.meta as unknown as Work;
    const read = await readBytes(storage, detail.job.domain_id, output.id);
    if (typeof read === 'string') losses.push(`output of task ${task.label}: ${read}`);
    else if (!read.equals(outputBytes({ taskId: task.id, nonce, bytes }))) {
      losses.push(
        `output of task ${task.label} is not of the accepted attempt ${nonce}: ${read.subarray(0, 80).toString('latin1')}`,
      );
    }
  }
  return losses;
}

/** The bytes, or why there are none. */
async function readBytes(storage: DomainStorage, domainId: string, id: string): Promise<Buffer | string> {
  try {
    const { body } = await storage.openRaw(domainId, id);
    return Buffer.concat((await body.toArray()) as Uint8Array[]);
  } catch (error) {
    return String(error);
  }
}

function sha256Of(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex');
}

/** Calls until it is answered with success; only what may pass is tried again, a full disk included. */
async function untilAcknowledged<T>(call: () => Promise<T>): Promise<T> {
  let answer: { readonly value: T } | null = null;
  await until(async () => {
    try {
      answer = { value: await call() };
      return true;
    } catch (error) {
      const passes = MillraceError.is(error) && (error.retryable || error.code === 'resource_exhausted');
      if (!passes) throw error;
      return false;
    }
  }, 120_000);
  return answer!.value;
}
