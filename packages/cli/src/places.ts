/** Where a dispatcher keeps things, as options and variables name it. */
import { MillraceError } from '@millrace/runner';
import type { CommandContext } from './io.ts';
import type { LocalDispatcherOptions } from './local-dispatcher.ts';

/** Of the option `--blobs`. */
export const BLOBS_HELP =
  'file:DIR or s3://BUCKET/PREFIX?endpoint=URL&region=NAME (default: MILLRACE_BLOBS, else file:blobs in the data folder)';

/** What `--store` or `MILLRACE_STORE` names; null when neither does. */
export async function storePlace(
  given: string | undefined,
  io: CommandContext['io'],
): Promise<NonNullable<LocalDispatcherOptions['store']> | null> {
  const value = given ?? (io.env['MILLRACE_STORE'] || undefined);
  // The database's own errors never repeat the URL, which may hold a password; neither does anything here.
  if (value !== undefined && /^postgres(?:ql)?:/i.test(value)) return { postgres: value };
  const sqlite = await localPlace(
    value,
    given === undefined ? 'MILLRACE_STORE' : '--store',
    'sqlite',
    io.cwd,
  );
  return sqlite === null ? null : { sqlite };
}

/** What `--blobs` or `MILLRACE_BLOBS` names; null when neither does. */
export async function blobsPlace(
  given: string | undefined,
  io: CommandContext['io'],
): Promise<NonNullable<LocalDispatcherOptions['blobs']> | null> {
  const value = given ?? (io.env['MILLRACE_BLOBS'] || undefined);
  // Read where it is opened; nothing repeats it, for somebody may have written a secret into it.
  if (value !== undefined && /^s3:/i.test(value)) return { s3: value };
  const dir = await localPlace(value, given === undefined ? 'MILLRACE_BLOBS' : '--blobs', 'file', io.cwd);
  return dir === null ? null : { dir };
}

/** The path behind `sqlite:PATH` or `file:DIR`, from `cwd`; null when the option is absent. */
async function localPlace(
  value: string | undefined,
  option: '--store' | 'MILLRACE_STORE' | '--blobs' | 'MILLRACE_BLOBS',
  scheme: 'sqlite' | 'file',
  cwd: string,
): Promise<string | null> {
  if (value === undefined) return null;
  const shape = scheme === 'sqlite' ? 'sqlite:PATH or postgres://…' : 'file:DIR or s3://BUCKET…';
  const place = value.startsWith(`${scheme}:`) ? value.slice(scheme.length + 1) : '';
  if (place === '') {
    // A URL of another kind may hold a password all the same.
    const shown = JSON.stringify(value.replace(/\/\/[^/]*@/, '//…@'));
    throw new MillraceError('invalid_argument', `${option} must be ${shape}, got ${shown}`);
  }
  const path = await import('node:path');
  // `file:///srv/blobs` and `sqlite:///srv/db` are spelled like URLs; the slashes before the path are not part of it.
  return path.resolve(cwd, place.replace(/^\/\/(?=\/)/, ''));
}
