/** Which program a runtime's path or name stands for. */
import { access } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { MillraceError } from '@millrace/runner';

/** The name of the runtime that comes with this program. */
const WASI = 'wasi';

/** The WASI runtime: runs the programs of an image in a sandbox. A program by itself, for any supervisor. */
export const WASI_RUNTIME: string = fileURLToPath(new URL('../bin/millrace-wasi.js', import.meta.url));

export interface RuntimeFile {
  readonly file: string;
  /** It is {@link WASI_RUNTIME}. */
  readonly brought: boolean;
}

/**
 * The file of that path, relative to `dir`; for `wasi`, where there is no such file, {@link WASI_RUNTIME}.
 *
 * @throws MillraceError `invalid_argument` for neither
 */
export async function runtimeFile(given: string, dir: string): Promise<RuntimeFile> {
  const file = path.resolve(dir, given);
  const exists = await access(file).then(
    () => true,
    () => false,
  );
  if (exists) return { file, brought: false };
  if (given === WASI) return { file: WASI_RUNTIME, brought: true };
  throw new MillraceError('invalid_argument', `runtime ${file} does not exist`);
}
