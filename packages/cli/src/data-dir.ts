/** The data folder: where a dispatcher on this machine keeps its state, and where the program finds it again. */
import { mkdir } from 'node:fs/promises';
import { homedir } from 'node:os';
import path from 'node:path';
import { MillraceError } from '@millrace/runner';
import type { CommandContext } from './io.ts';

/** `--data`, else `MILLRACE_DATA`, else `$XDG_DATA_HOME/millrace`, else `~/.local/share/millrace`. Absolute. */
export function resolveDataDir({ io, options }: CommandContext): string {
  const given = options.data || io.env['MILLRACE_DATA'];
  if (given) return path.resolve(io.cwd, given);
  const xdg = io.env['XDG_DATA_HOME'];
  // The XDG specification says to ignore relative paths.
  const base = xdg && path.isAbsolute(xdg) ? xdg : path.join(io.env['HOME'] || homedir(), '.local', 'share');
  return path.join(base, 'millrace');
}

/** Makes the folder, open to its owner only, as it holds keys. @throws MillraceError `failed_precondition`. */
export async function ensureDataDir(dir: string): Promise<void> {
  try {
    await mkdir(dir, { recursive: true, mode: 0o700 });
  } catch (error) {
    throw new MillraceError(
      'failed_precondition',
      `cannot make the data folder ${dir}; name another with --data or MILLRACE_DATA`,
      { cause: error },
    );
  }
}
