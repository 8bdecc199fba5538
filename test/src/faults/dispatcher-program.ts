/** A dispatcher as a process of its own. The first line on stdout is JSON with its `url` and a client token. */
import { openDispatcher, openFileBlobs, openSqliteStore, type Store } from '@millrace/dispatch';
import { jsonLog, settings, wrongClock } from './child.ts';

export interface DispatcherSettings {
  readonly store: { readonly sqlite: string } | { readonly postgres: string };
  readonly blobs: string;
  /** Where nodes reach it. */
  readonly publicUrl: string;
  readonly leaseTtlMs: number;
  readonly clockOffsetMs: number;
}

const { store: place, blobs: dir, publicUrl, leaseTtlMs, clockOffsetMs } = settings() as DispatcherSettings;
const clock = wrongClock(clockOffsetMs);
const backoff = { baseMs: 100, capMs: 500 };
const log = jsonLog();
async function openStore(): Promise<Store> {
  if ('sqlite' in place) {
    return await openSqliteStore({ path: place.sqlite, leaseTtlMs, backoff, clock, log });
  }
  const { openPostgresStore } = await import('@millrace/dispatch/postgres');
  // It has a clock of its own, and that is the one that counts.
  return await openPostgresStore({ url: place.postgres, leaseTtlMs, backoff, log });
}

const store = await openStore();
const blobs = await openFileBlobs({ dir });
const dispatcher = await openDispatcher({ store, blobs, port: 0, publicUrl, clock, log });
const token = await dispatcher.issueClientToken();
process.stdout.write(`${JSON.stringify({ url: dispatcher.url, token })}\n`);
