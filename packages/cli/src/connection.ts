/**
 * Where the dispatcher is and what opens it. A dispatcher started here leaves `dispatcher.json` (url, pid) and
 * `client-token` in its data folder; commands on the same folder need no options.
 */
import { readFile, rm } from 'node:fs/promises';
import path from 'node:path';
import type { Requestor } from '@millrace/dispatch/client';
import { MillraceError, describeError } from '@millrace/runner';
import { resolveDataDir } from './data-dir.ts';
import type { CommandContext } from './io.ts';
import { writePrivateFile } from './private-file.ts';

const DISPATCHER_FILE = 'dispatcher.json';
const TOKEN_FILE = 'client-token';

/** The dispatcher that says it runs on a data folder. */
export interface LocalDispatcher {
  readonly url: string;
  readonly pid: number;
}

/** Null when none was started there, or it was closed in order. */
export async function readDispatcherFile(dataDir: string): Promise<LocalDispatcher | null> {
  const text = await readIfPresent(path.join(dataDir, DISPATCHER_FILE));
  if (text === null) return null;
  const dispatcher = parseAnnouncement(text);
  if (dispatcher !== null) return dispatcher;
  throw new MillraceError(
    'failed_precondition',
    `${path.join(dataDir, DISPATCHER_FILE)} is damaged; remove it and start the dispatcher again`,
  );
}

/** By hand and not by schema: every command reads this file, and loading the schema library takes longer than the rest. */
function parseAnnouncement(text: string): LocalDispatcher | null {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    return null;
  }
  if (typeof value !== 'object' || value === null) return null;
  const { url, pid } = value as { readonly url?: unknown; readonly pid?: unknown };
  if (typeof url !== 'string' || !isHttpUrl(url)) return null;
  return Number.isSafeInteger(pid) && (pid as number) > 0 ? { url, pid: pid as number } : null;
}

function isHttpUrl(text: string): boolean {
  return URL.canParse(text) && /^https?:$/.test(new URL(text).protocol);
}

/** Lets other commands on this data folder find the dispatcher. */
export async function announceDispatcher(
  dataDir: string,
  dispatcher: LocalDispatcher & { readonly token: string },
): Promise<void> {
  const { token, ...place } = dispatcher;
  await writePrivateFile(path.join(dataDir, TOKEN_FILE), `${token}\n`);
  await writePrivateFile(path.join(dataDir, DISPATCHER_FILE), `${JSON.stringify(place)}\n`);
}

/** Takes the announcement back, unless another process has made its own meanwhile. */
export async function withdrawDispatcher(dataDir: string, pid: number): Promise<void> {
  const current = await readDispatcherFile(dataDir).catch(() => null);
  if (current?.pid === pid) await rm(path.join(dataDir, DISPATCHER_FILE), { force: true });
}

export interface Address {
  readonly url: string;
  readonly token: string;
}

/** The url of `--url`, `MILLRACE_URL` or the data folder; null when there is none. No trailing slash. */
export async function findUrl(context: CommandContext): Promise<string | null> {
  const { io, options } = context;
  const named = options.url || io.env['MILLRACE_URL'];
  if (!named) return (await readDispatcherFile(resolveDataDir(context)))?.url ?? null;
  if (!isHttpUrl(named)) {
    throw new MillraceError(
      'invalid_argument',
      `${options.url ? '--url' : 'MILLRACE_URL'} must be an http or https URL, got ${JSON.stringify(named)}`,
    );
  }
  return named.replace(/\/+$/, '');
}

/**
 * The token for `url`: `--token`, `MILLRACE_TOKEN`, or the data folder's. The latter goes only to the dispatcher that
 * wrote it: a secret of this machine must not travel to whatever `--url` names.
 */
export async function findToken(context: CommandContext, url: string): Promise<string | null> {
  const { io, options } = context;
  const named = options.token || io.env['MILLRACE_TOKEN'];
  if (named) return named.trim();
  const dataDir = resolveDataDir(context);
  const local = await readDispatcherFile(dataDir);
  if (local === null || !sameOrigin(local.url, url)) return null;
  return (await readIfPresent(path.join(dataDir, TOKEN_FILE)))?.trim() || null;
}

/** @throws MillraceError `unavailable` no dispatcher known, `unauthenticated` no token for it. */
export async function resolveAddress(context: CommandContext): Promise<Address> {
  const url = await findUrl(context);
  if (url === null) {
    throw new MillraceError(
      'unavailable',
      `no dispatcher is running on ${resolveDataDir(context)}; start one with "millrace up", or name one with --url`,
    );
  }
  const token = await findToken(context, url);
  if (token === null) {
    throw new MillraceError(
      'unauthenticated',
      `no token for ${url}; pass --token or MILLRACE_TOKEN (the dispatcher's operator finds one in ${TOKEN_FILE} in its data folder)`,
    );
  }
  return { url, token };
}

/** Connects, does the work, closes; connection troubles become sentences that say what to do next. */
export async function withRequestor<T>(
  address: Address,
  work: (requestor: Requestor) => Promise<T>,
): Promise<T> {
  // The HTTP client is most of the program's start-up time; what is wrong before it is needed is told without it.
  const { connect } = await import('@millrace/dispatch/client');
  const requestor = connect(address);
  try {
    return await work(requestor);
  } catch (error) {
    throw explain(error, address.url);
  } finally {
    await requestor.close();
  }
}

function explain(error: unknown, url: string): unknown {
  if (!MillraceError.is(error)) return error;
  // Only what the connection itself raised: an `unavailable` with a status is the dispatcher's own answer.
  if (error.code === 'unavailable' && error.details['status'] === undefined) {
    const why = error.cause instanceof Error ? describeError(error.cause) : error.message;
    return new MillraceError(
      'unavailable',
      `cannot reach the dispatcher at ${url} (${why}); is it running? "millrace up" starts one, --url names another`,
      { cause: error.cause },
    );
  }
  if (error.code === 'unauthenticated') {
    return new MillraceError(
      'unauthenticated',
      `${url} refused the token: ${error.message}; pass the right one with --token or MILLRACE_TOKEN`,
      { cause: error },
    );
  }
  return error;
}

const LOOPBACK = new Set(['localhost', '127.0.0.1', '[::1]']);

function sameOrigin(one: string, other: string): boolean {
  const a = new URL(one);
  const b = new URL(other);
  const sameHost = a.hostname === b.hostname || (LOOPBACK.has(a.hostname) && LOOPBACK.has(b.hostname));
  return sameHost && a.protocol === b.protocol && a.port === b.port;
}

async function readIfPresent(file: string): Promise<string | null> {
  try {
    return await readFile(file, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
    throw new MillraceError('failed_precondition', `cannot read ${file}`, { cause: error });
  }
}
