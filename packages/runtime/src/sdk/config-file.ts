/**
 * A runtime's configuration file: `<data dir>/NAME.toml`, `.yaml`, `.yml` or `.json`, the first that exists. The format is
 * what the extension says.
 *
 * What the file lacks is taken from the defaults. Without a check of the author's own, the defaults are also the shape:
 * other members and other types are refused, by name.
 */
import { access, mkdir, open, readFile, rename, rm } from 'node:fs/promises';
import { homedir } from 'node:os';
import path from 'node:path';
import { randomUUID } from 'node:crypto';
import { MillraceError, type Json } from '@millrace/runner';
import { isObject } from './canonical-json.ts';

export interface ConfigDeclaration<Config> {
  /** The configuration when there is no file, and what a file's missing members are. */
  readonly defaults: Config;
  /**
   * Checks and converts what was read, defaults merged in. Throwing refuses it. Default: the shape of `defaults`, where an
   * empty object takes any members and null takes anything.
   */
  readonly parse?: (value: unknown) => Config;
}

const EXTENSIONS = ['.toml', '.yaml', '.yml', '.json'];

/** The platform's per-user data folder of a runtime: on Linux `$XDG_DATA_HOME/name` or `~/.local/share/name`. */
export function defaultDataDir(
  name: string,
  env: Readonly<Record<string, string | undefined>>,
  platform: NodeJS.Platform = process.platform,
): string {
  const home = env.HOME || homedir();
  if (platform === 'darwin') return path.join(home, 'Library', 'Application Support', name);
  if (platform === 'win32')
    return path.join(env.APPDATA || path.join(home, 'AppData', 'Roaming'), name, 'data');
  // Lower-cased and without spaces, which the file's name is not: deployed configurations lie there.
  const folder = name.toLowerCase().replaceAll(/\s/g, '');
  if (env.XDG_DATA_HOME && path.isAbsolute(env.XDG_DATA_HOME)) return path.join(env.XDG_DATA_HOME, folder);
  return path.join(home, '.local', 'share', folder);
}

/** The file that exists, or where a new one would be: the `.json`. */
export async function findConfig(dataDir: string, name: string): Promise<{ path: string; exists: boolean }> {
  for (const extension of EXTENSIONS) {
    const candidate = path.join(dataDir, name + extension);
    const exists = await access(candidate).then(
      () => true,
      () => false,
    );
    if (exists) return { path: candidate, exists };
  }
  return { path: path.join(dataDir, `${name}.json`), exists: false };
}

/**
 * What is in a configuration file, as plain values. JSON, YAML or TOML by the extension, upper or lower case.
 *
 * @throws MillraceError `not_found`, or `invalid_argument` for another extension or broken syntax, with its place.
 */
export async function readConfigFile(file: string): Promise<Json> {
  const format = formatOf(file);
  let text: string;
  try {
    text = await readFile(file, 'utf8');
  } catch (error) {
    const missing = (error as NodeJS.ErrnoException).code === 'ENOENT';
    throw new MillraceError(
      missing ? 'not_found' : 'invalid_argument',
      `configuration file ${file} ${missing ? 'does not exist' : 'cannot be read'}`,
      { cause: error },
    );
  }
  try {
    if (format === 'json') return JSON.parse(text) as Json;
    if (format === 'yaml') return (await import('yaml')).parse(text) as Json;
    return plain((await import('smol-toml')).parse(text));
  } catch (error) {
    throw new MillraceError(
      'invalid_argument',
      `configuration file ${file} is not valid ${format.toUpperCase()}`,
      {
        cause: error,
      },
    );
  }
}

/**
 * Writes a configuration whole or not at all, in the format the extension names, and makes missing folders.
 *
 * @throws MillraceError `invalid_argument` for another extension or a value the format cannot hold (TOML has no null).
 */
export async function writeConfigFile(value: Json, file: string): Promise<void> {
  const format = formatOf(file);
  let text: string;
  try {
    if (format === 'json') text = `${JSON.stringify(value, null, 2)}\n`;
    else if (format === 'yaml') text = (await import('yaml')).stringify(value);
    else text = await toToml(value);
  } catch (error) {
    throw new MillraceError(
      'invalid_argument',
      `the configuration cannot be written as ${format.toUpperCase()}`,
      {
        cause: error,
      },
    );
  }
  await mkdir(path.dirname(file), { recursive: true });
  const temporary = `${file}.${randomUUID()}.tmp`;
  try {
    const handle = await open(temporary, 'wx');
    try {
      await handle.writeFile(text);
      await handle.sync();
    } finally {
      await handle.close();
    }
    await rename(temporary, file);
  } catch (error) {
    await rm(temporary, { force: true });
    throw error;
  }
}

/** The configuration of a runtime, defaults merged in and checked. @throws as {@link readConfigFile}, and for a wrong shape. */
export async function loadConfig<Config>(
  declaration: ConfigDeclaration<Config>,
  file: { readonly path: string; readonly exists: boolean },
): Promise<Config> {
  const { defaults, parse } = declaration;
  if (!file.exists) return parse ? parse(structuredClone(defaults)) : structuredClone(defaults);
  const read = await readConfigFile(file.path);
  const merged = merge(defaults, read);
  try {
    if (parse) return parse(merged);
    checkShape(defaults, merged, '');
  } catch (error) {
    throw new MillraceError('invalid_argument', `configuration file ${file.path} has the wrong shape`, {
      cause: error,
    });
  }
  return merged as Config;
}

function formatOf(file: string): 'json' | 'yaml' | 'toml' {
  const extension = path.extname(file).toLowerCase();
  if (extension === '.json') return 'json';
  if (extension === '.yaml' || extension === '.yml') return 'yaml';
  if (extension === '.toml') return 'toml';
  throw new MillraceError(
    'invalid_argument',
    `configuration file ${file} must end in .json, .yaml, .yml or .toml; the extension is the format`,
  );
}

async function toToml(value: Json): Promise<string> {
  if (!isObject(value)) throw new TypeError('TOML holds an object at the top');
  const nullAt = findNull(value, '');
  if (nullAt !== null) throw new TypeError(`${nullAt} is null, which TOML lacks; leave the member out`);
  return (await import('smol-toml')).stringify(value);
}

function findNull(value: Json, at: string): string | null {
  if (value === null) return at;
  if (typeof value !== 'object') return null;
  for (const [key, member] of Object.entries(value)) {
    const found = findNull(member, at === '' ? key : `${at}.${key}`);
    if (found !== null) return found;
  }
  return null;
}

/** TOML tables come without a prototype, and dates as a class of the parser's: plain objects and text instead. */
function plain(value: unknown): Json {
  if (value instanceof Date) return value.toISOString();
  if (Array.isArray(value)) return value.map(plain);
  if (typeof value !== 'object' || value === null) return value as Json;
  return Object.fromEntries(Object.entries(value).map(([key, member]) => [key, plain(member)]));
}

function merge(defaults: unknown, given: unknown): unknown {
  if (!isObject(defaults) || !isObject(given)) return given;
  // A map, since assigning a member called __proto__ to an object would not make a member.
  const merged = new Map<string, unknown>(Object.entries(structuredClone(defaults)));
  for (const [key, value] of Object.entries(given)) {
    merged.set(key, merge(Object.hasOwn(defaults, key) ? defaults[key] : undefined, value));
  }
  return Object.fromEntries(merged);
}

function checkShape(shape: unknown, value: unknown, at: string): void {
  if (shape === null || shape === undefined) return;
  const where = at === '' ? 'the file' : at;
  if (kindOf(shape) !== kindOf(value)) {
    throw new TypeError(`${where} must be ${article(kindOf(shape))}, got ${article(kindOf(value))}`);
  }
  if (!isObject(shape) || !isObject(value) || Object.keys(shape).length === 0) return;
  for (const [key, member] of Object.entries(value)) {
    const name = at === '' ? key : `${at}.${key}`;
    if (!Object.hasOwn(shape, key)) {
      throw new TypeError(`${name} is unknown; ${where} may have ${Object.keys(shape).join(', ')}`);
    }
    checkShape(shape[key], member, name);
  }
}

function kindOf(value: unknown): string {
  if (value === null) return 'null';
  return Array.isArray(value) ? 'array' : typeof value;
}

function article(kind: string): string {
  if (kind === 'null') return kind;
  return /^[aeiou]/.test(kind) ? `an ${kind}` : `a ${kind}`;
}
