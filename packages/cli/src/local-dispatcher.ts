/** A dispatcher in this process on a data folder of this machine, announced there for the other commands. */
import path from 'node:path';
import {
  openDispatcher,
  openFileBlobs,
  openSqliteStore,
  type Dispatcher,
  type Store,
} from '@millrace/dispatch';
import { connect } from '@millrace/dispatch/client';
import { MillraceError, type Logger } from '@millrace/runner';
import { announceDispatcher, readDispatcherFile, withdrawDispatcher } from './connection.ts';
import { ensureDataDir } from './data-dir.ts';

const TOKEN_TTL_SECS = 30 * 24 * 3600;
/** A dispatcher that runs for months must not leave an expired token in its folder. */
const TOKEN_RENEWAL_MS = 24 * 3600 * 1000;

export interface LocalDispatcherOptions {
  readonly dataDir: string;
  /** This process; others find it by the folder's `dispatcher.json`. */
  readonly pid: number;
  readonly host?: string;
  readonly port?: number;
  readonly publicUrl?: string;
  /** Default `millrace.db` in the data folder. */
  readonly storePath?: string;
  /** Default `blobs` in the data folder. */
  readonly blobsDir?: string;
  readonly log: Logger;
}

export interface OpenDispatcher extends AsyncDisposable {
  readonly dispatcher: Dispatcher;
  /** How others reach it. */
  readonly url: string;
  /** A client token for every domain. */
  readonly token: string;
  close(): Promise<void>;
}

/** @throws MillraceError `failed_precondition` when one runs on the folder already, or the port is taken. */
export async function openLocalDispatcher(options: LocalDispatcherOptions): Promise<OpenDispatcher> {
  const { dataDir, pid, log } = options;
  await ensureDataDir(dataDir);
  await refuseSecond(dataDir, pid);
  const cleanup: (() => Promise<unknown>)[] = [];
  const close = async (): Promise<void> => {
    // In the reverse order of opening; a step that fails does not keep the next from running.
    const errors: unknown[] = [];
    for (let step = cleanup.pop(); step !== undefined; step = cleanup.pop()) {
      await step().catch((error: unknown) => errors.push(error));
    }
    if (errors.length > 0) throw new AggregateError(errors, 'closing the dispatcher failed');
  };
  try {
    const store = await openStore(options.storePath ?? path.join(dataDir, 'millrace.db'));
    cleanup.push(async () => store[Symbol.asyncDispose]());
    const blobs = await placed(openFileBlobs({ dir: options.blobsDir ?? path.join(dataDir, 'blobs') }));
    cleanup.push(async () => blobs[Symbol.asyncDispose]());
    const dispatcher = await openDispatcher({
      store,
      blobs,
      log,
      ...(options.host !== undefined && { host: options.host }),
      ...(options.port !== undefined && { port: options.port }),
      ...(options.publicUrl !== undefined && { publicUrl: options.publicUrl }),
    });
    cleanup.push(() => dispatcher.close());
    const url = options.publicUrl ?? dispatcher.url;
    const announce = async (): Promise<string> => {
      const token = await dispatcher.issueClientToken({ ttlSecs: TOKEN_TTL_SECS });
      await announceDispatcher(dataDir, { url, pid, token });
      return token;
    };
    const token = await announce();
    cleanup.push(() => withdrawDispatcher(dataDir, pid));
    const renewal = setInterval(() => {
      announce().catch((error: unknown) =>
        log.error('client token not renewed', {
          error: error instanceof Error ? error.message : String(error),
        }),
      );
    }, TOKEN_RENEWAL_MS).unref();
    cleanup.push(async () => clearInterval(renewal));
    return { dispatcher, url, token, close, [Symbol.asyncDispose]: close };
  } catch (error) {
    await close();
    throw error;
  }
}

async function openStore(file: string): Promise<Store> {
  await ensureDataDir(path.dirname(file));
  return await placed(openSqliteStore({ path: file }));
}

/** On this machine a file or folder that cannot be opened is a wrong place, not a service that is away. */
async function placed<T>(opening: Promise<T>): Promise<T> {
  try {
    return await opening;
  } catch (error) {
    if (!MillraceError.is(error) || error.code !== 'unavailable') throw error;
    throw new MillraceError('failed_precondition', error.message, { cause: error.cause });
  }
}

/** Two dispatchers on one database would not hear of each other's changes. */
async function refuseSecond(dataDir: string, pid: number): Promise<void> {
  const other = await readDispatcherFile(dataDir);
  if (other === null || other.pid === pid || !isAlive(other.pid)) return;
  // The number may belong to another program by now; a dispatcher answers.
  const requestor = connect({ url: other.url, token: '', timeoutMs: 2_000 });
  try {
    await requestor.health();
  } catch {
    return;
  } finally {
    await requestor.close();
  }
  throw new MillraceError(
    'failed_precondition',
    `a dispatcher runs on ${dataDir} already: ${other.url}, process ${other.pid}; use that one, stop it, or choose another folder with --data`,
  );
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}
