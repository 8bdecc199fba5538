/**
 * Wake-ups between dispatchers: what one committed, the others' listeners hear. A notification is a hint, sent after the
 * commit, a few milliseconds' worth together: a commit that notifies takes a lock of the whole server. So a hint can be lost
 * with the process or the connection that carried it, and what waits looks again from time to time by itself
 * ({@link StoreChange} `anything`).
 */
import { randomUUID } from 'node:crypto';
import { sleep, systemClock } from '@millrace/runner';
import type { Logger } from '@millrace/runner';
import pg from 'pg';
import type { StoreChange } from '../store.ts';
import { clientConfig, goodbye, sql } from './postgres-database.ts';
import type { Address, Database } from './postgres-database.ts';
import { fromDriver } from './postgres-errors.ts';

const CHANNEL = 'millrace';
/** Hints of this long go together; the first after a pause goes at once. */
const GATHER_MS = 20;
/** A payload may have 8000 bytes. */
const MAX_PAYLOAD_IDS = 150;
/** How often whatever waits looks again although nothing was heard; more often while nothing can be heard. */
const LOOK_AGAIN_MS = 15_000;
const DEAF_LOOK_MS = 1_000;
/** A connection that is gone without a word is found by asking. */
const PING_MS = 30_000;
const PING_TIMEOUT_MS = 10_000;
const MAX_RECONNECT_DELAY_MS = 5_000;

// A hint need not be durable: the commit that carries it waits for no disk.
const NOTIFY = sql(`
  SELECT set_config('synchronous_commit', 'off', true), pg_notify('${CHANNEL}', payload) FROM unnest($1::text[]) AS payload`);

interface Hint {
  /** Who sent it: a store does not listen to itself. */
  readonly from: string;
  readonly runnable?: true;
  readonly jobs?: readonly string[];
  readonly leases?: readonly string[];
  readonly logs?: readonly string[];
}

export interface BellOptions {
  readonly database: Database;
  readonly address: Address;
  readonly log: Logger | undefined;
  /** Something changed elsewhere, or may have. */
  readonly onChange: (change: StoreChange) => void;
}

export class Bell {
  readonly #options: BellOptions;
  readonly #id = randomUUID();
  readonly #stop = new AbortController();
  #client: pg.Client | null = null;
  #listening: Promise<void> = Promise.resolve();
  #gathered: StoreChange[] = [];
  #sending: Promise<void> | null = null;
  #timer: NodeJS.Timeout | null = null;

  constructor(options: BellOptions) {
    this.#options = options;
  }

  /** Resolves once changes made elsewhere are heard. */
  async open(): Promise<void> {
    const lost = await this.#listen();
    this.#listening = this.#keepListening(lost);
    this.#lookAgain();
  }

  /** Tells the other dispatchers, soon. */
  ring(changes: readonly StoreChange[]): void {
    if (changes.length === 0 || this.#stop.signal.aborted) return;
    this.#gathered.push(...changes);
    this.#sending ??= this.#send();
  }

  /** Sends what is left to send, then hears no more. */
  async close(): Promise<void> {
    await this.#sending;
    this.#stop.abort();
    if (this.#timer) clearTimeout(this.#timer);
    if (this.#client) await goodbye(this.#client.end());
    await goodbye(this.#listening);
  }

  async #send(): Promise<void> {
    // What the same commit, and others just now, bring is sent together.
    await new Promise<void>((resolve) => void setImmediate(resolve));
    while (this.#gathered.length > 0) {
      const changes = this.#gathered;
      this.#gathered = [];
      try {
        await this.#options.database.rows(NOTIFY, [payloadsOf(this.#id, changes)]);
      } catch (error) {
        this.#options.log?.warn('other dispatchers were not told of changes', { error: String(error) });
      }
      if (this.#stop.signal.aborted) break;
      await sleep(systemClock, GATHER_MS);
    }
    this.#sending = null;
  }

  /** Connects and listens; the promise it gives resolves when that is over. */
  async #listen(): Promise<{ readonly over: Promise<void> }> {
    const client = new pg.Client({ ...clientConfig(this.#options.address), query_timeout: PING_TIMEOUT_MS });
    const over = new Promise<void>((resolve) => {
      client.on('end', resolve);
      client.on('error', () => {
        // Ends the socket as well where the error left it open.
        void client.end().catch(() => {});
        resolve();
      });
    });
    client.on('notification', ({ payload }) => this.#hear(payload));
    try {
      await client.connect();
      await client.query(`LISTEN ${CHANNEL}`);
    } catch (error) {
      await client.end().catch(() => {});
      throw fromDriver(error);
    }
    this.#client = client;
    return { over };
  }

  async #keepListening(first: { readonly over: Promise<void> }): Promise<void> {
    const { signal } = this.#stop;
    const { log, onChange } = this.#options;
    let over = first.over;
    for (let tries = 0; !signal.aborted;) {
      await this.#pingUntil(over);
      this.#client = null;
      while (!signal.aborted) {
        tries += 1;
        const capMs = Math.min(MAX_RECONNECT_DELAY_MS, 100 * 2 ** Math.min(tries, 10));
        await sleep(systemClock, Math.random() * capMs, signal).catch(() => {});
        if (signal.aborted) return;
        try {
          over = (await this.#listen()).over;
          tries = 0;
          break;
        } catch (error) {
          if (tries === 1) log?.warn('cannot hear other dispatchers', { error: String(error) });
        }
      }
      if (signal.aborted) {
        await (this.#client as pg.Client | null)?.end().catch(() => {});
        return;
      }
      // Whatever was said in between was not heard.
      onChange({ kind: 'anything' });
    }
  }

  async #pingUntil(over: Promise<void>): Promise<void> {
    const client = this.#client;
    const ping = setInterval(() => {
      client?.query('SELECT 1').catch(() => void client.end().catch(() => {}));
    }, PING_MS);
    ping.unref();
    await over;
    clearInterval(ping);
  }

  #lookAgain(): void {
    if (this.#stop.signal.aborted) return;
    this.#timer = setTimeout(
      () => {
        this.#options.onChange({ kind: 'anything' });
        this.#lookAgain();
      },
      this.#client ? LOOK_AGAIN_MS : DEAF_LOOK_MS,
    );
    this.#timer.unref();
  }

  #hear(payload: string | undefined): void {
    let hint: Hint;
    try {
      hint = JSON.parse(payload ?? '') as Hint;
    } catch {
      // Anybody with the right to connect may notify.
      return;
    }
    if (hint.from === this.#id) return;
    const { onChange } = this.#options;
    for (const jobId of hint.jobs ?? []) onChange({ kind: 'job', jobId });
    if (hint.leases) onChange({ kind: 'cancel', leaseIds: hint.leases });
    if (hint.logs) onChange({ kind: 'logs', taskIds: hint.logs });
    if (hint.runnable) onChange({ kind: 'runnable' });
  }
}

function payloadsOf(from: string, changes: readonly StoreChange[]): string[] {
  const ids = { jobs: new Set<string>(), leases: new Set<string>(), logs: new Set<string>() };
  let runnable = false;
  for (const change of changes) {
    if (change.kind === 'job') ids.jobs.add(change.jobId);
    else if (change.kind === 'cancel') for (const id of change.leaseIds) ids.leases.add(id);
    else if (change.kind === 'logs') for (const id of change.taskIds) ids.logs.add(id);
    else runnable = true;
  }
  const payloads: string[] = [];
  for (const [kind, set] of Object.entries(ids)) {
    const all = [...set];
    for (let at = 0; at < all.length; at += MAX_PAYLOAD_IDS) {
      payloads.push(JSON.stringify({ from, [kind]: all.slice(at, at + MAX_PAYLOAD_IDS) }));
    }
  }
  if (runnable) payloads.push(JSON.stringify({ from, runnable } satisfies Hint));
  return payloads;
}
