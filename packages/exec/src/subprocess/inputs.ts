/** Puts a task's inputs where its program finds them by name. */
import { constants } from 'node:fs';
import { copyFile, link, mkdir, stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { MillraceError, type MaterializedInput, type TaskContext } from '@millrace/runner';
import { checkFileName, pathProblem } from './file-names.ts';

export interface PlacedInputs {
  /** File names by input, in the order of the task. */
  readonly names: readonly string[];
  readonly bytes: number;
}

/** Which of a task's inputs has which name. @throws MillraceError `invalid_argument` when their number differs. */
export function nameInputs(cids: readonly string[], names: readonly string[]): ReadonlyMap<string, string> {
  if (cids.length !== names.length) {
    throw new MillraceError(
      'invalid_argument',
      `inputs_cids must name ${names.length} inputs (${names.join(', ') || 'none'}), it names ${cids.length}`,
    );
  }
  return new Map(names.map((name, index) => [name, cids[index]!]));
}

/** @throws MillraceError `invalid_argument` for a name that is no file name, or one used twice. */
export function checkInputNames(where: string, names: readonly string[]): void {
  names.forEach((name, index) => {
    if (typeof name !== 'string') {
      throw new MillraceError(
        'invalid_argument',
        `${where}[${index}] must be a string, got ${JSON.stringify(name)}`,
      );
    }
    checkFileName(`${where}[${index}]`, name);
    if (names.indexOf(name) !== index) {
      throw new MillraceError(
        'invalid_argument',
        `${where}[${index}] ${JSON.stringify(name)} is there twice`,
      );
    }
  });
}

/**
 * Fetches the inputs into `folder`: by the names given, or by the names they are stored under. Further parts of a download
 * go to a folder beside it, named after it with `.parts`.
 */
export async function placeInputs(
  ctx: TaskContext,
  folder: string,
  inputs: readonly { readonly cid: string; readonly name: string | null }[],
): Promise<PlacedInputs> {
  const taken = new Set(inputs.flatMap(({ name }) => (name === null ? [] : [name])));
  const names: string[] = [];
  let bytes = 0;
  for (const [index, { cid, name: given }] of inputs.entries()) {
    const input = await ctx.input.materializeCidWithMeta(cid);
    const name = given ?? freeName(storedName(input) ?? `input-${index + 1}`, taken);
    taken.add(name);
    names.push(name);
    bytes += await place(input.path, join(folder, name));
    if (input.related_files.length === 0) continue;
    const parts = join(folder, freeName(`${name}.parts`, taken));
    taken.add(basename(parts));
    await mkdir(parts);
    const partNames = new Set<string>();
    for (const [at, path] of input.related_files.entries()) {
      const partName = freeName(safeName(basename(path)) ?? `part-${at + 1}`, partNames);
      partNames.add(partName);
      bytes += await place(path, join(parts, partName));
    }
  }
  return { names, bytes };
}

/** Both are files of this task, so sharing the bytes is enough where the file system can. */
async function place(from: string, to: string): Promise<number> {
  try {
    await link(from, to);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== 'EXDEV' && code !== 'EPERM' && code !== 'EMLINK') throw error;
    await copyFile(from, to, constants.COPYFILE_FICLONE | constants.COPYFILE_EXCL);
  }
  return (await stat(to)).size;
}

function storedName(input: MaterializedInput): string | null {
  return input.name === null ? null : safeName(input.name);
}

/** A name for a shell's eyes as well: no blanks, and nothing that looks like an option or hides the file. */
function safeName(text: string): string | null {
  const name = text
    .replaceAll(/[^A-Za-z0-9._-]/g, '_')
    .replace(/^[._-]+/, '')
    .slice(0, 200);
  return pathProblem(name) === null ? name : null;
}

function freeName(name: string, taken: ReadonlySet<string>): string {
  if (!taken.has(name)) return name;
  const dot = name.lastIndexOf('.');
  const [stem, extension] = dot > 0 ? [name.slice(0, dot), name.slice(dot)] : [name, ''];
  for (let number = 2; ; number += 1) {
    const candidate = `${stem}-${number}${extension}`;
    if (!taken.has(candidate)) return candidate;
  }
}
