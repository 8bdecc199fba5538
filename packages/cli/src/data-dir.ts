/** The data folder: where a dispatcher on this machine keeps its state, and where the program finds it again. */
import { homedir } from 'node:os';
import path from 'node:path';
import { makeFolders } from './folders.ts';
import type { CommandContext } from './io.ts';

/** Where nodes keep the computes they fetched, in the data folder. What was built on this machine is in `computes` there. */
export const COMPUTE_CACHE = 'compute-cache';

/** `--data`, else `MILLRACE_DATA`, else `$XDG_DATA_HOME/millrace`, else `~/.local/share/millrace`. Absolute. */
export function resolveDataDir({ io, options }: CommandContext): string {
  const given = options.data || io.env['MILLRACE_DATA'];
  if (given) return path.resolve(io.cwd, given);
  const xdg = io.env['XDG_DATA_HOME'];
  // The XDG specification says to ignore relative paths.
  const base = xdg && path.isAbsolute(xdg) ? xdg : path.join(io.env['HOME'] || homedir(), '.local', 'share');
  return path.join(base, 'millrace');
}

/** Makes the folder, open to its owner only, as it holds keys. @throws MillraceError `invalid_argument`. */
export async function ensureDataDir(dir: string): Promise<void> {
  await makeFolders(dir, 'the data folder (--data, MILLRACE_DATA)', 0o700);
}
