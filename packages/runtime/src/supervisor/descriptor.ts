/** Plugin descriptors: how a provider is told of a runtime. An array of them in a file `ya-*.json` of a plugins folder. */
import { randomUUID } from 'node:crypto';
import { readFileSync, readdirSync } from 'node:fs';
import { mkdir, rename, rm, writeFile } from 'node:fs/promises';
import { homedir } from 'node:os';
import path from 'node:path';
import { MillraceError, describeError, type Clock, type JsonObject } from '@millrace/runner';
import { isObject } from '../sdk/canonical-json.ts';
import { versionOf } from './invocations.ts';

export interface RuntimeDescriptor {
  readonly name: string;
  readonly version: string;
  /** Absolute. */
  readonly supervisorPath: string;
  /** Absolute; null for a supervisor that is its own runtime. */
  readonly runtimePath: string | null;
  readonly description: string | null;
  readonly extraArgs: readonly string[];
  /** Placed under `golem.runtime` in the offer. */
  readonly properties: JsonObject;
  /** Priced counters: id to name, description and whether it has a price. */
  readonly counters: JsonObject | null;
  /** Where it was found. */
  readonly file: string;
}

/** What the extra arguments of a descriptor mean to a supervisor. */
export interface DescriptorArgs {
  readonly managedImage: boolean;
  readonly managedHardware: boolean;
  readonly runtimeArgs: readonly string[];
  /** Words that mean nothing to us. */
  readonly unknown: readonly string[];
}

export interface DescriptorList {
  /** Of each name the first that was found. */
  readonly descriptors: readonly RuntimeDescriptor[];
  /** Files that were passed over, with the reason. */
  readonly problems: readonly { readonly file: string; readonly message: string }[];
}

export interface ListDescriptorsOptions {
  /** Folders to look in, first wins. Default: {@link pluginDirs}. */
  readonly dirs?: readonly string[];
  readonly env?: Readonly<Record<string, string | undefined>>;
}

export interface WriteDescriptorOptions {
  readonly runtimePath: string;
  /** The plugins folder; made if missing. Default: the user's. */
  readonly dir?: string;
  /** Default: what the runtime says for `--version`. */
  readonly name?: string;
  readonly version?: string;
  /** Absolute, or relative to `dir`. Default `exe-unit`. */
  readonly supervisorPath?: string;
  readonly description?: string;
  /** Default `--runtime-managed-image`: the runtime brings its own payload. */
  readonly extraArgs?: readonly string[];
  readonly properties?: JsonObject;
  readonly counters?: JsonObject;
  readonly clock?: Clock;
}

const FILE_NAME = /^ya-.*\.json$/;
const SEMVER = /^\d+\.\d+\.\d+(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?$/;
const MAX_FILE_BYTES = 1024 * 1024;

/** The user's folder, then the system's; or the one of `EXE_UNIT_PATH`. */
export function pluginDirs(env: Readonly<Record<string, string | undefined>> = process.env): string[] {
  if (env.EXE_UNIT_PATH) return [path.dirname(path.resolve(env.EXE_UNIT_PATH))];
  return [path.join(env.HOME || homedir(), '.local', 'lib', 'yagna', 'plugins'), '/usr/lib/yagna/plugins'];
}

/** All descriptors in the folders. Never throws: what cannot be read is a problem in the list. */
export function listDescriptors(options: ListDescriptorsOptions = {}): DescriptorList {
  const descriptors = new Map<string, RuntimeDescriptor>();
  const problems: { file: string; message: string }[] = [];
  const pattern = filePattern(options);
  for (const dir of options.dirs ?? pluginDirs(options.env)) {
    for (const file of filesIn(dir, pattern)) {
      try {
        for (const descriptor of readDescriptors(file)) {
          if (!descriptors.has(descriptor.name)) descriptors.set(descriptor.name, descriptor);
        }
      } catch (error) {
        problems.push({ file, message: describeError(error) });
      }
    }
  }
  return { descriptors: [...descriptors.values()], problems };
}

/** @throws MillraceError `not_found`, naming what there is. */
export function findDescriptor(name: string, options: ListDescriptorsOptions = {}): RuntimeDescriptor {
  const { descriptors, problems } = listDescriptors(options);
  const found = descriptors.find((one) => one.name === name);
  if (found) return found;
  const known = descriptors.map((one) => one.name).join(', ') || 'none';
  const broken = problems.map(({ file, message }) => `; ${file}: ${message}`).join('');
  const dirs = (options.dirs ?? pluginDirs(options.env)).join(', ');
  throw new MillraceError(
    'not_found',
    `no descriptor of ${dirs} is named ${name} (known: ${known}${broken})`,
  );
}

/** Reads the extra arguments. Options of a supervisor that we lack are listed as unknown. */
export function descriptorArgs(descriptor: RuntimeDescriptor): DescriptorArgs {
  const runtimeArgs: string[] = [];
  const unknown: string[] = [];
  let managedImage = false;
  let managedHardware = false;
  const words = descriptor.extraArgs;
  for (let at = 0; at < words.length; at += 1) {
    const word = words[at]!;
    const next = words[at + 1];
    if (word === '--runtime-managed-image') managedImage = true;
    else if (word === '--runtime-managed-hardware' || word === '--cap-handoff') managedHardware = true;
    else if ((word === '--runtime-arg' || word === '-r') && next !== undefined) {
      runtimeArgs.push(next);
      at += 1;
    } else if (word.startsWith('--runtime-arg=')) runtimeArgs.push(word.slice('--runtime-arg='.length));
    else unknown.push(word);
  }
  return { managedImage, managedHardware, runtimeArgs, unknown };
}

/**
 * Writes `ya-runtime-NAME.json`, in place of an earlier one, whole or not at all. Resolves with what was written.
 *
 * @throws MillraceError `invalid_argument` for a name or version that may not be, or that the runtime does not tell.
 */
export async function writeDescriptor(options: WriteDescriptorOptions): Promise<RuntimeDescriptor> {
  const runtimePath = path.resolve(options.runtimePath);
  const told =
    options.name === undefined || options.version === undefined
      ? await versionOf({ runtimePath, ...(options.clock ? { clock: options.clock } : {}) })
      : null;
  const name = options.name ?? told?.name ?? '';
  const version = options.version ?? told?.version ?? '';
  if (!/^[\w.-]+$/.test(name)) {
    throw new MillraceError(
      'invalid_argument',
      `a runtime's name must be letters, digits, ".", "_" and "-", got ${JSON.stringify(name)}; give a name`,
    );
  }
  if (!SEMVER.test(version)) {
    throw new MillraceError(
      'invalid_argument',
      `a runtime's version must be semantic, such as 1.0.0, got ${JSON.stringify(version)}; give a version`,
    );
  }
  const dir = path.resolve(options.dir ?? pluginDirs()[0]!);
  const file = path.join(dir, `ya-runtime-${name}.json`);
  const entry = {
    name,
    version,
    'supervisor-path': options.supervisorPath ?? 'exe-unit',
    'runtime-path': runtimePath,
    ...(options.description === undefined ? {} : { description: options.description }),
    'extra-args': options.extraArgs ?? ['--runtime-managed-image'],
    ...(options.properties === undefined ? {} : { properties: options.properties }),
    ...(options.counters === undefined ? {} : { config: { counters: options.counters } }),
  };
  await mkdir(dir, { recursive: true });
  const temporary = `${file}.${randomUUID()}.tmp`;
  try {
    await writeFile(temporary, `${JSON.stringify([entry], null, 2)}\n`, { flag: 'wx' });
    await rename(temporary, file);
  } catch (error) {
    await rm(temporary, { force: true });
    throw error;
  }
  return readDescriptors(file)[0]!;
}

/** The last component of `EXE_UNIT_PATH` may hold one `*`. */
function filePattern(options: ListDescriptorsOptions): RegExp {
  const { EXE_UNIT_PATH: given } = options.env ?? process.env;
  if (options.dirs || !given) return FILE_NAME;
  const [head = '', ...rest] = path.basename(given).split('*');
  const escaped = [head, rest.join('*')].map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, '\\$&'));
  return new RegExp(`^${rest.length === 0 ? escaped[0] : escaped.join('.*')}$`);
}

function filesIn(dir: string, pattern: RegExp): string[] {
  try {
    return readdirSync(dir)
      .filter((name) => pattern.test(name))
      .sort()
      .map((name) => path.join(dir, name));
  } catch {
    // Folders that do not exist hold nothing.
    return [];
  }
}

function readDescriptors(file: string): RuntimeDescriptor[] {
  const text = readFileSync(file, 'utf8');
  if (text.length > MAX_FILE_BYTES) throw new TypeError(`is larger than ${MAX_FILE_BYTES} bytes`);
  const value: unknown = JSON.parse(text);
  if (!Array.isArray(value)) throw new TypeError('must be an array of descriptors');
  return value.map((entry: unknown) => readDescriptor(entry, file));
}

function readDescriptor(entry: unknown, file: string): RuntimeDescriptor {
  if (!isObject(entry)) throw new TypeError('a descriptor must be an object');
  const required = (key: string): string => {
    const value = entry[key];
    if (typeof value === 'string' && value !== '') return value;
    throw new TypeError(`${key} must be a text, got ${JSON.stringify(value) ?? 'nothing'}`);
  };
  const resolve = (given: string): string => path.resolve(path.dirname(file), given);
  const name = required('name');
  const version = required('version');
  if (!SEMVER.test(version))
    throw new TypeError(`version of ${name} must be semantic, got ${JSON.stringify(version)}`);
  const extraArgs = entry['extra-args'] ?? [];
  if (!Array.isArray(extraArgs) || !extraArgs.every((word) => typeof word === 'string')) {
    throw new TypeError(`extra-args of ${name} must be an array of texts`);
  }
  const { description, properties, config } = entry;
  const counters = isObject(config) && isObject(config.counters) ? config.counters : null;
  return {
    name,
    version,
    supervisorPath: resolve(required('supervisor-path')),
    runtimePath: entry['runtime-path'] === undefined ? null : resolve(required('runtime-path')),
    description: typeof description === 'string' ? description : null,
    extraArgs,
    properties: isObject(properties) ? properties : {},
    counters,
    file,
  };
}
