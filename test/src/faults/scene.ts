/**
 * One round: work, a fault in the middle of it, the end of the work, and the judge ({@link Ledger.losses}).
 *
 * The work is four jobs of four tasks in two stages. Half of the jobs are submitted before the fault and are being worked on
 * when it strikes, the others are submitted while it lasts. The round is over when all of them have ended.
 */
import { createHash, randomBytes } from 'node:crypto';
import type { JobSubmission, Requestor } from '@millrace/dispatch/client';
import { until } from '../system.ts';
import type { Cluster } from './cluster.ts';
import type { Ledger } from './ledger.ts';
import { CAPABILITY, OUTPUT, type Work } from './work.ts';

/** Of a round. */
export const JOBS = 4;
/** Of a job. */
export const TASKS = 4;
/** A round that takes longer is stuck. */
export const ROUND_MS = 120_000;

/**
 * Plays a round under a name that no other has. Resolves with what was lost. `early`: the fault lies in wait before anything of
 * the round is asked for.
 */
export async function playRound(
  cluster: Cluster,
  ledger: Ledger,
  name: string,
  strike: (scene: Scene) => Promise<void>,
  { early = false } = {},
): Promise<string[]> {
  const scene = new Scene(cluster.requestor(), ledger, name);
  const struck = early ? strike(scene) : null;
  // It is awaited below.
  struck?.catch(() => undefined);
  await scene.begin(JOBS / 2);
  await Promise.all([struck ?? strike(scene), scene.submitMore(JOBS / 2)]);
  await scene.end();
  return await ledger.losses(cluster.direct());
}

/** The work of one round. */
export class Scene {
  readonly client: Requestor;
  readonly #ledger: Ledger;
  readonly #id: string;
  readonly #following: Promise<void>[] = [];
  #submitted = 0;
  #job: JobSubmission | null = null;
  /** Events of this round so far, of tasks that were given to a node. */
  #leased = 0;
  /** Why attempts of this round had to be made again. */
  readonly retries: string[] = [];

  constructor(client: Requestor, ledger: Ledger, id: string) {
    this.client = client;
    this.#ledger = ledger;
    this.#id = id;
  }

  /** Uploads the input and submits so many jobs. */
  async begin(jobs: number): Promise<void> {
    const bytes = randomBytes(20_000);
    const input = await this.#ledger.upload(this.client, `input ${this.#id}`, bytes);
    const sha256 = createHash('sha256').update(bytes).digest('hex');
    const task = (label: string, stage: string, inputs: readonly string[], work: Work) => ({
      label,
      stage,
      capability: CAPABILITY,
      inputs_cids: inputs,
      max_attempts: 100,
      meta: work,
    });
    this.#job = {
      tasks: [
        task('a0', 'a', [input], { sha256, workMs: 200, bytes: 100 }),
        task('a1', 'a', [input], { sha256, workMs: 400, bytes: 30_000 }),
        task('a2', 'a', [input], { sha256, workMs: 50, bytes: 300_000 }),
        task('b0', 'b', [`stage:a/${OUTPUT}`], { sha256: null, workMs: 50, bytes: 1_000 }),
      ],
      edges: [{ from: 'a', to: 'b' }],
    };
    await this.submitMore(jobs);
  }

  async submitMore(count: number): Promise<void> {
    await Promise.all(
      Array.from({ length: count }, async () => {
        const key = `${this.#id}.job-${(this.#submitted += 1)}`;
        const id = await this.#ledger.submit(this.client, key, this.#job!);
        const following = this.#ledger.follow(this.client, id, ({ kind, data }) => {
          if (kind === 'task.leased') this.#leased += 1;
          if (kind === 'task.retry') this.retries.push(JSON.stringify(data['reason']));
        });
        // It is awaited at the end of the round.
        following.catch(() => undefined);
        this.#following.push(following);
      }),
    );
  }

  /** Until a node is given one more of this round's tasks. */
  async leased(): Promise<void> {
    const before = this.#leased;
    let over = false;
    void Promise.allSettled(this.#following).then(() => (over = true));
    await until(() => this.#leased > before || over, ROUND_MS / 2);
  }

  /** Until all jobs have ended. */
  async end(): Promise<void> {
    await Promise.all(this.#following);
  }
}
