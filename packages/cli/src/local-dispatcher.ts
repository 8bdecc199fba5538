/** A dispatcher in this process on a data folder of this machine, announced there for the other commands. */
import path from 'node:path';
import {
  openDispatcher,
  openFileBlobs,
  openSqliteStore,
  type BlobStore,
  type Dispatcher,
  type DispatcherLimits,
  type Retention,
  type Store,
} from '@millrace/dispatch';
import { connect } from '@millrace/dispatch/client';
import { MillraceError, type Logger, type Tracer } from '@millrace/runner';
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
  /** A file on this machine, or the URL of a PostgreSQL database. Default: `millrace.db` in the data folder. */
  readonly store?: { readonly sqlite: string } | { readonly postgres: string };
  /** A folder of this machine, or `s3://…`. Default: the folder `blobs` in the data folder. */
  readonly blobs?: { readonly dir: string } | { readonly s3: string };
  /** Default: the dispatcher's. */
  readonly limits?: Partial<DispatcherLimits>;
  /** How long a lease lives without a heartbeat. Default: the store's. */
  readonly leaseTtlMs?: number;
  /** Default: every job is kept. */
  readonly retention?: Retention;
  readonly log: Logger;
  /** Default: nothing is traced. */
  readonly tracer?: Tracer;
  /** Figures of a node in this process, for `/metrics`. */
  readonly moreMetrics?: () => Promise<string>;
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
    const store = await openStore(options.store ?? { sqlite: path.join(dataDir, 'millrace.db') }, {
      log,
      ...(options.leaseTtlMs !== undefined && { leaseTtlMs: options.leaseTtlMs }),
    });
    cleanup.push(async () => store[Symbol.asyncDispose]());
    const blobs = await openBlobs(options.blobs ?? { dir: path.join(dataDir, 'blobs') }, log);
    cleanup.push(async () => blobs[Symbol.asyncDispose]());
    const dispatcher = await openDispatcher({
      store,
      blobs,
      log,
      ...(options.host !== undefined && { host: options.host }),
      ...(options.port !== undefined && { port: options.port }),
      ...(options.publicUrl !== undefined && { publicUrl: options.publicUrl }),
      ...(options.limits !== undefined && { limits: options.limits }),
      ...(options.retention !== undefined && { retention: options.retention }),
      ...(options.tracer !== undefined && { tracer: options.tracer }),
      ...(options.moreMetrics !== undefined && { moreMetrics: options.moreMetrics }),
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

async function openStore(
  place: NonNullable<LocalDispatcherOptions['store']>,
  { log, ...lease }: Pick<LocalDispatcherOptions, 'log' | 'leaseTtlMs'>,
): Promise<Store> {
  if ('postgres' in place) {
    // Its driver is loaded by nobody else.
    const { openPostgresStore } = await import('@millrace/dispatch/postgres');
    return await openPostgresStore({ url: place.postgres, log, ...lease });
  }
  await ensureDataDir(path.dirname(place.sqlite));
  return await placed(openSqliteStore({ path: place.sqlite, ...lease }));
}

async function openBlobs(
  place: NonNullable<LocalDispatcherOptions['blobs']>,
  log: Logger,
): Promise<BlobStore> {
  if ('dir' in place) return await placed(openFileBlobs({ dir: place.dir }));
  // The SDK warns on Node 20 that its versions of 2027 will not support it; ours is pinned to one that does.
  process.env['AWS_SDK_JS_NODE_VERSION_SUPPORT_WARNING_DISABLED'] ??= 'true';
  // Its driver is loaded by nobody else.
  const { openS3Blobs } = await import('@millrace/dispatch/s3');
  return await openS3Blobs({ url: place.s3, log });
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
