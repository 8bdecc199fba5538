/**
 * What artifacts and downloaded files are called (posemesh protocol, sections 4.3 and 4.8), where the reference's names
 * would be longer than the domain service takes, shortened to it by a hash that depends on nothing but the name.
 */
import { createHash } from 'node:crypto';
import { MAX_DATA_NAME_BYTES } from '@millrace/dispatch/client';
import { MillraceError } from '@millrace/runner';

/** Longest file name of common file systems. */
const MAX_FILE_NAME_BYTES = 255;

const HASH_DIGITS = 16;

/** Longest path of an artifact below the outputs prefix. */
const MAX_REL_PATH_BYTES = 1024;

/** Every code point other than ASCII letters, digits, `-` and `_` becomes `_`. */
function sanitise(text: string, whenEmpty: string): string {
  return text.replaceAll(/[^A-Za-z0-9_-]/gu, '_') || whenEmpty;
}

function hashOf(text: string): string {
  return createHash('sha256').update(text).digest('hex').slice(0, HASH_DIGITS);
}

/**
 * `prefix/rel`: slashes are removed from the front of `rel` and from both ends of the prefix; an empty half is left out.
 *
 * @throws MillraceError `invalid_argument` when both are empty, and for a `rel` of more than 1024 bytes, with a control
 * character, or with a `.` or `..` segment: nobody could save such an artifact under its path.
 */
export function logicalPath(outputsPrefix: string | null, relPath: string): string {
  const rel = relPath.replace(/^\/+/, '');
  const prefix = (outputsPrefix ?? '').replaceAll(/^\/+|\/+$/g, '');
  const refuse = (rule: string): never => {
    throw new MillraceError('invalid_argument', `artifact path ${JSON.stringify(relPath)} ${rule}`);
  };
  if (rel === '' && prefix === '') refuse('must not be empty for a task without outputs_prefix');
  const bytes = Buffer.byteLength(rel);
  if (bytes > MAX_REL_PATH_BYTES) refuse(`must be at most ${MAX_REL_PATH_BYTES} bytes, is ${bytes}`);
  if (/\p{Cc}/u.test(rel)) refuse('must not contain control characters');
  if (rel.split('/').some((segment) => segment === '.' || segment === '..')) {
    refuse('must not have "." or ".." segments');
  }
  return [prefix, rel].filter((part) => part !== '').join('/');
}

/**
 * `<path with everything special as _>_<task id>`; at most 128 bytes, which longer ones are shortened to by a hash of the
 * path. `distinct`: with the hash in any case, because another path of the task has the same name without.
 */
export function artifactName(path: string, taskId: string, distinct = false): string {
  const stem = sanitise(path.replaceAll('/', '_'), 'artifact');
  const plain = `${stem}_${taskId}`;
  // Sanitised, so characters are bytes.
  if (!distinct && plain.length <= MAX_DATA_NAME_BYTES) return plain;
  const ending = `_${hashOf(path)}_${taskId}`;
  return `${stem.slice(0, Math.max(0, MAX_DATA_NAME_BYTES - ending.length))}${ending}`;
}

const KNOWN_TYPES = new Map([
  ['json', 'json'],
  ['ply', 'ply'],
  ['drc', 'ply_draco'],
  ['glb', 'glb'],
  ['obj', 'obj'],
  ['csv', 'csv'],
  ['mp4', 'mp4'],
]);

/** By the last extension: a known type, else `<extension>_data`; `binary` where there is none. At most 128 bytes. */
export function dataTypeOf(relPath: string): string {
  const file = relPath.replace(/\/+$/, '').split('/').at(-1) ?? '';
  const dot = file.lastIndexOf('.');
  // A dot in front begins a hidden file's name, not an extension; `..` has neither.
  if (dot <= 0 || file === '..') return 'binary';
  const extension = file.slice(dot + 1).toLowerCase();
  const known = KNOWN_TYPES.get(extension);
  if (known !== undefined) return known;
  const stem = sanitise(extension, 'artifact');
  if (stem.length + '_data'.length <= MAX_DATA_NAME_BYTES) return `${stem}_data`;
  const ending = `_${hashOf(extension)}_data`;
  return `${stem.slice(0, MAX_DATA_NAME_BYTES - ending.length)}${ending}`;
}

/**
 * The folder and the file of a downloaded part: `datasets/<scan>/<name>.<data type>`, which production runners rely on.
 * `<scan>` is the first date and time in the name, else the name.
 */
export function materializedPath(
  name: string,
  dataType: string,
): readonly [...folders: string[], file: string] {
  const scan = /\d{4}-\d{2}-\d{2}[_-]\d{2}-\d{2}-\d{2}/.exec(name)?.[0] ?? name;
  const type = `.${sanitise(dataType, 'part')}`;
  const stem = sanitise(name, 'part');
  const file =
    stem.length + type.length <= MAX_FILE_NAME_BYTES
      ? `${stem}${type}`
      : `${stem.slice(0, 64)}_${hashOf(`${name}.${dataType}`)}${type.slice(0, 128)}`;
  return ['datasets', fit(sanitise(scan, 'part'), scan), file];
}

function fit(text: string, of: string): string {
  if (text.length <= MAX_FILE_NAME_BYTES) return text;
  return `${text.slice(0, MAX_FILE_NAME_BYTES - HASH_DIGITS - 1)}_${hashOf(of)}`;
}
