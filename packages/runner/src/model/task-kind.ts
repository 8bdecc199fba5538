/**
 * What a task is: a program, a WebAssembly module, a container, or code that its owner brings along.
 *
 * In memory a kind names itself in `type`; in JSON it is the one member of an object (`{"subprocess": {…}}`), or the word
 * `"embedded"`. Members of a kind that this model has no rules for are kept as `extensions`, for the runner to judge.
 */
import {
  absent,
  arrayOf,
  boolean,
  object,
  optional,
  string,
  type Decoder,
  type RawObject,
} from '../decode.ts';
import { MillraceError } from '../errors.ts';
import type { JsonObject } from '../json.ts';
import { envToJson, parseEnv, type TaskEnv } from './environment.ts';
import { invalidModel } from './errors.ts';

/** Symbolic names, for logs, metrics and errors. */
export const TASK_KINDS = ['subprocess', 'wasm', 'container', 'embedded'] as const;

export type TaskKindName = (typeof TASK_KINDS)[number];

/** A switch that is on unless it is turned off. */
export type Flag = boolean;

export interface SubprocessKind {
  readonly type: 'subprocess';
  readonly mode: SubprocessMode;
  readonly env: TaskEnv;
  /** Null: up to the runner. */
  readonly cwd: string | null;
  /** Whether another exit code than 0, or a signal, is a failure. */
  readonly failOnNonZero: Flag;
  readonly extensions: JsonObject;
}

export type SubprocessMode =
  | { readonly type: 'command'; readonly command: string; readonly args: readonly string[] }
  | {
      readonly type: 'script';
      readonly runtime: ScriptRuntime;
      /** Standard Base64 with padding. */
      readonly body: string;
      readonly args: readonly string[];
    };

export type ScriptRuntime = 'bash' | 'python' | 'node' | CustomRuntime;

export interface CustomRuntime {
  readonly custom: { readonly command: string; readonly flag: string };
}

export interface WasmKind {
  readonly type: 'wasm';
  /** A path or a reference. */
  readonly module: string;
  readonly args: readonly string[];
  readonly env: TaskEnv;
  readonly extensions: JsonObject;
}

export interface ContainerKind {
  readonly type: 'container';
  readonly image: string;
  /** Null: the image's entry point. */
  readonly command: readonly string[] | null;
  readonly args: readonly string[];
  readonly env: TaskEnv;
  readonly extensions: JsonObject;
}

/** Cannot be routed: whoever owns the code supplies the executable task. */
export interface EmbeddedKind {
  readonly type: 'embedded';
}

export type TaskKind = SubprocessKind | WasmKind | ContainerKind | EmbeddedKind;

/** Of a script, decoded, in bytes. */
export const MAX_SCRIPT_BYTES = 2 * 1024 ** 2;

/** The words for runtimes, and what is started for them. */
const RUNTIMES: Readonly<Record<string, CustomRuntime['custom']>> = {
  bash: { command: 'bash', flag: '-c' },
  python: { command: 'python3', flag: '-c' },
  node: { command: 'node', flag: '-e' },
};

/** The command of a runtime, and the flag with which it takes a program as text. */
export function resolveRuntime(runtime: ScriptRuntime): CustomRuntime['custom'] {
  return typeof runtime === 'string' ? RUNTIMES[runtime]! : runtime.custom;
}

/**
 * The text of a script.
 *
 * @throws MillraceError `invalid_argument` for a command, for text that is no Base64 of UTF-8, that is empty or longer than
 * {@link MAX_SCRIPT_BYTES}
 */
export function scriptBody(mode: SubprocessMode, path = 'mode'): string {
  if (mode.type === 'command') throw invalidModel(path, 'a command has no script body');
  const at = `${path}.script.body`;
  if (mode.body === '') throw invalidModel(at, 'script body cannot be empty');
  if (!/^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$/.test(mode.body)) {
    throw invalidModel(at, 'invalid base64 body');
  }
  const bytes = Buffer.from(mode.body, 'base64');
  if (bytes.byteLength > MAX_SCRIPT_BYTES) {
    throw invalidModel(
      at,
      `script body must be at most ${MAX_SCRIPT_BYTES} bytes, it has ${bytes.byteLength}`,
    );
  }
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw invalidModel(at, 'not valid UTF-8');
  }
}

/** The rules of a kind. @throws MillraceError `invalid_argument`, naming the member and the rule */
export function checkTaskKind(kind: TaskKind, path = 'kind'): void {
  switch (kind.type) {
    case 'subprocess':
      checkMode(kind.mode, `${path}.subprocess.mode`);
      return;
    case 'wasm':
      if (kind.module === '') throw invalidModel(`${path}.wasm.module`, 'wasm module path cannot be empty');
      return;
    case 'container':
      if (kind.image.trim() === '') {
        throw invalidModel(`${path}.container.image`, 'container image cannot be empty');
      }
      return;
    case 'embedded':
      return;
  }
}

function checkMode(mode: SubprocessMode, path: string): void {
  if (mode.type === 'command') {
    if (mode.command.trim() === '') {
      throw invalidModel(`${path}.command.command`, 'subprocess command cannot be empty');
    }
    return;
  }
  if (typeof mode.runtime !== 'string') {
    for (const member of ['command', 'flag'] as const) {
      if (mode.runtime.custom[member].trim() === '') {
        throw invalidModel(
          `${path}.script.runtime.custom.${member}`,
          `custom runtime ${member} cannot be empty`,
        );
      }
    }
  }
  scriptBody(mode, path);
}

/**
 * Reads `{"subprocess": {…}}` and its like.
 *
 * @throws MillraceError `invalid_argument` for another shape, and as {@link checkTaskKind}
 */
export const parseTaskKind: Decoder<TaskKind> = (value, path) => {
  if (value === 'embedded') return { type: 'embedded' };
  const raw = object(value, path);
  const [tag, ...others] = Object.keys(raw);
  const decode = others.length === 0 && Object.hasOwn(KINDS, tag ?? '') ? KINDS[tag as 'wasm'] : undefined;
  if (tag === undefined || decode === undefined) {
    throw new MillraceError(
      'invalid_argument',
      `${path} must be "embedded" or an object with one of subprocess, wasm, container, got ${Object.keys(raw).slice(0, 5).join(', ') || 'an empty object'}`,
    );
  }
  return decode(raw[tag], `${path}.${tag}`);
};

/** Reads what stands under `subprocess`. @throws as {@link parseTaskKind} */
export const parseSubprocess: Decoder<SubprocessKind> = (value, path) => {
  const raw = object(value, path);
  const mode = parseMode(raw['mode'], `${path}.mode`);
  checkMode(mode, `${path}.mode`);
  return {
    type: 'subprocess',
    mode,
    env: absent(parseEnv, () => [])(raw['env'], `${path}.env`),
    cwd: optional(string)(raw['cwd'], `${path}.cwd`),
    failOnNonZero: absent(boolean, () => true)(raw['failOnNonZero'], `${path}.failOnNonZero`),
    extensions: extensions(raw, ['mode', 'env', 'cwd', 'failOnNonZero']),
  };
};

/** Reads what stands under `wasm`. @throws as {@link parseTaskKind} */
export const parseWasm: Decoder<WasmKind> = (value, path) => {
  const raw = object(value, path);
  const module = string(raw['module'], `${path}.module`);
  if (module === '') throw invalidModel(`${path}.module`, 'wasm module path cannot be empty');
  return {
    type: 'wasm',
    module,
    args: absent(arrayOf(string), () => [])(raw['args'], `${path}.args`),
    env: absent(parseEnv, () => [])(raw['env'], `${path}.env`),
    extensions: extensions(raw, ['module', 'args', 'env']),
  };
};

/** Reads what stands under `container`; an empty `command` is an absent one. @throws as {@link parseTaskKind} */
export const parseContainer: Decoder<ContainerKind> = (value, path) => {
  const raw = object(value, path);
  const image = string(raw['image'], `${path}.image`);
  if (image.trim() === '') throw invalidModel(`${path}.image`, 'container image cannot be empty');
  const command = optional(arrayOf(string))(raw['command'], `${path}.command`);
  return {
    type: 'container',
    image,
    command: command?.length === 0 ? null : command,
    args: absent(arrayOf(string), () => [])(raw['args'], `${path}.args`),
    env: absent(parseEnv, () => [])(raw['env'], `${path}.env`),
    extensions: extensions(raw, ['image', 'command', 'args', 'env']),
  };
};

const KINDS: Readonly<Record<'subprocess' | 'wasm' | 'container', Decoder<TaskKind>>> = {
  subprocess: parseSubprocess,
  wasm: parseWasm,
  container: parseContainer,
};

const parseMode: Decoder<SubprocessMode> = (value, path) => {
  const raw = object(value, path);
  if (Object.hasOwn(raw, 'command') === Object.hasOwn(raw, 'script')) {
    throw new MillraceError('invalid_argument', `${path} must have either command or script`);
  }
  const args = absent(arrayOf(string), () => []);
  if (Object.hasOwn(raw, 'command')) {
    const command = object(raw['command'], `${path}.command`);
    return {
      type: 'command',
      command: string(command['command'], `${path}.command.command`),
      args: args(command['args'], `${path}.command.args`),
    };
  }
  const script = object(raw['script'], `${path}.script`);
  return {
    type: 'script',
    runtime: parseRuntime(script['runtime'], `${path}.script.runtime`),
    body: string(script['body'], `${path}.script.body`),
    args: args(script['args'], `${path}.script.args`),
  };
};

const parseRuntime: Decoder<ScriptRuntime> = (value, path) => {
  if (typeof value !== 'string') {
    const custom = object(object(value, path)['custom'], `${path}.custom`);
    return {
      custom: {
        command: string(custom['command'], `${path}.custom.command`),
        flag: string(custom['flag'], `${path}.custom.flag`),
      },
    };
  }
  if (Object.hasOwn(RUNTIMES, value)) return value as 'bash' | 'python' | 'node';
  throw new MillraceError(
    'invalid_argument',
    `${path} must be ${Object.keys(RUNTIMES).join(', ')} or {"custom": {"command", "flag"}}, got ${JSON.stringify(value.slice(0, 80))}`,
  );
};

function extensions(raw: RawObject, known: readonly string[]): JsonObject {
  return Object.fromEntries(Object.entries(raw).filter(([key]) => !known.includes(key))) as JsonObject;
}

/** The exact document; what is empty or absent is left out where the model says so. */
export function taskKindToJson(kind: TaskKind): JsonObject | 'embedded' {
  if (kind.type === 'embedded') return 'embedded';
  const env = kind.env.length > 0 && { env: envToJson(kind.env) };
  if (kind.type === 'subprocess') {
    return {
      subprocess: {
        mode: modeToJson(kind.mode),
        ...env,
        ...(kind.cwd !== null && { cwd: kind.cwd }),
        failOnNonZero: kind.failOnNonZero,
        ...kind.extensions,
      },
    };
  }
  const args = kind.args.length > 0 && { args: [...kind.args] };
  if (kind.type === 'wasm') return { wasm: { module: kind.module, ...args, ...env, ...kind.extensions } };
  const command = kind.command !== null && { command: [...kind.command] };
  return { container: { image: kind.image, ...command, ...args, ...env, ...kind.extensions } };
}

function modeToJson(mode: SubprocessMode): JsonObject {
  const args = mode.args.length > 0 && { args: [...mode.args] };
  if (mode.type === 'command') return { command: { command: mode.command, ...args } };
  const runtime = typeof mode.runtime === 'string' ? mode.runtime : { custom: { ...mode.runtime.custom } };
  return { script: { runtime, body: mode.body, ...args } };
}
