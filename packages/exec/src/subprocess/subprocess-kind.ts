/**
 * A task's `meta` as the task kind "subprocess": what a requestor writes to have any allowed program run.
 *
 *     {"mode": {"command": {"command": "jq", "args": [".name", "{input:doc.json}"]}},
 *      "inputs": ["doc.json"], "outputs": ["*.txt"], "env": [{"key": "TZ", "value": "UTC"}]}
 *
 * or, for a script, `{"mode": {"script": {"runtime": "python", "body": "<base64>", "args": []}}}`. All of it may stand under a
 * member `subprocess`. Unknown members are refused, so that a misspelt one is not silently ignored.
 *
 * `mode`, `env`, `cwd` and `failOnNonZero` are the model's; `inputs`, `outputs`, `stdin` and `limits` are ours, and extensions to it.
 */
import { MillraceError, type Json, type JsonObject } from '@millrace/runner';
import {
  parseSubprocess,
  resolveRuntime,
  scriptBody,
  type SubprocessKind,
  type SubprocessMode,
} from '@millrace/runner/model';
import { checkRelativePath } from './file-names.ts';
import { checkVariable } from './environment.ts';
import { checkInputNames } from './inputs.ts';

/** The model's part. */
export interface Program {
  readonly command: string;
  readonly args: readonly string[];
  /** Text of a script that `command` is to run, from a file. */
  readonly script: string | null;
}

/** What the model has no rules for. */
export interface SubprocessExtras {
  /** Relative to the task's own folder; empty for that itself. */
  readonly cwd: string;
  /** Null: the names they are stored by. */
  readonly inputs: readonly string[] | null;
  readonly outputs: readonly string[];
  readonly stdin: 'none' | 'input' | { readonly text: string };
  readonly limits: JsonObject;
}

const EXTENSIONS = ['inputs', 'outputs', 'stdin', 'limits'];
const MEMBERS = ['mode', 'env', 'cwd', 'failOnNonZero', ...EXTENSIONS];

/** May stand beside the kind in any task's meta: they are not the runner's. */
export const BESIDE = ['traceparent', 'tracestate', 'supervision'];

/** @throws MillraceError `invalid_argument`, naming the member by its path, the rule and the value. */
export function subprocessKindOf(meta: Json): SubprocessKind {
  const outer = object('meta', meta);
  const wrapped = outer['subprocess'] !== undefined;
  const at = wrapped ? 'meta.subprocess' : 'meta';
  const raw = wrapped ? object(at, outer['subprocess']!) : outer;
  onlyMembers(at, raw, wrapped ? MEMBERS : [...MEMBERS, ...BESIDE]);
  if (wrapped) onlyMembers('meta', outer, ['subprocess', ...BESIDE]);
  checkModeMembers(`${at}.mode`, raw['mode'] ?? null);
  const kind = parseSubprocess(
    present({ ...without(raw, BESIDE), env: envList(`${at}.env`, raw['env']) }),
    at,
  );
  subprocessExtras(kind, at);
  return kind;
}

/** @throws MillraceError `invalid_argument`, naming the member below `at`. */
export function subprocessExtras(kind: SubprocessKind, at: string): SubprocessExtras {
  const { inputs, outputs, stdin, limits } = kind.extensions;
  onlyMembers(at, kind.extensions, EXTENSIONS);
  checkEnvNames(`${at}.env`, kind.env);
  const inputNames = inputs == null ? null : strings(`${at}.inputs`, inputs);
  if (inputNames !== null) checkInputNames(`${at}.inputs`, inputNames);
  return {
    cwd: kind.cwd === null ? '' : checkRelativePath(`${at}.cwd`, kind.cwd),
    inputs: inputNames,
    outputs: outputs == null ? [] : strings(`${at}.outputs`, outputs),
    stdin: parseStdin(`${at}.stdin`, stdin ?? 'none'),
    limits: limits == null ? {} : object(`${at}.limits`, limits),
  };
}

/** Scripts are run from a file, so that a long one fits; a runtime's flag is not used. */
export function programOf(mode: SubprocessMode): Program {
  return mode.type === 'command'
    ? { command: mode.command, args: mode.args, script: null }
    : { command: resolveRuntime(mode.runtime).command, args: mode.args, script: scriptBody(mode) };
}

/** The model ignores what it does not know; here it is a mistake. */
function checkModeMembers(at: string, value: Json): void {
  const mode = object(at, value);
  onlyMembers(at, mode, ['command', 'script']);
  const { command, script } = mode;
  if (command !== undefined)
    onlyMembers(`${at}.command`, object(`${at}.command`, command), ['command', 'args']);
  if (script === undefined) return;
  const members = object(`${at}.script`, script);
  onlyMembers(`${at}.script`, members, ['runtime', 'body', 'args']);
  const { runtime } = members;
  if (typeof runtime !== 'object' || runtime === null || Array.isArray(runtime)) return;
  onlyMembers(`${at}.script.runtime`, runtime, ['custom']);
  const custom = object(`${at}.script.runtime.custom`, runtime['custom'] ?? null);
  onlyMembers(`${at}.script.runtime.custom`, custom, ['command', 'flag']);
}

/** The model's form of an environment; it may be written as an object, too. */
export function envList(at: string, value: Json | undefined): JsonObject[] {
  return Object.entries(parseEnv(at, value ?? [])).map(([key, text]) => ({ key, value: text }));
}

export function checkEnvNames(
  at: string,
  env: readonly { readonly key: string; readonly value: string }[],
): void {
  env.forEach(({ key, value }, index) => checkVariable(`${at}[${index}]`, key, value));
}

/** Null is as good as absent. */
export function present(value: JsonObject): JsonObject {
  return Object.fromEntries(Object.entries(value).filter(([, entry]) => entry !== null));
}

export function without(value: JsonObject, names: readonly string[]): JsonObject {
  return Object.fromEntries(Object.entries(value).filter(([key]) => !names.includes(key)));
}

/** A list, in which the last entry of a key wins, or an object. */
export function parseEnv(at: string, value: Json): Record<string, string> {
  const env: Record<string, string> = Object.create(null) as Record<string, string>;
  const entries: [string, string, Json][] = Array.isArray(value)
    ? value.map((entry, index) => {
        const pair = object(`${at}[${index}]`, entry);
        onlyMembers(`${at}[${index}]`, pair, ['key', 'value']);
        return [`${at}[${index}]`, string(`${at}[${index}].key`, pair['key'] ?? null), pair['value'] ?? null];
      })
    : Object.entries(object(at, value)).map(([key, entry]) => [`${at}.${key}`, key, entry]);
  for (const [where, key, entry] of entries) {
    checkVariable(where, key, entry);
    env[key] = entry;
  }
  return env;
}

function parseStdin(at: string, value: Json): SubprocessExtras['stdin'] {
  if (value === 'none' || value === 'input') return value;
  if (typeof value === 'string')
    throw invalid(at, `must be "none", "input" or {"text": …}, got ${JSON.stringify(value)}`);
  const stdin = object(at, value);
  onlyMembers(at, stdin, ['text']);
  return { text: string(`${at}.text`, stdin['text'] ?? null) };
}

export function object(at: string, value: Json): JsonObject {
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value;
  throw invalid(at, `must be an object, got ${nameOf(value)}`);
}

export function string(at: string, value: Json): string {
  if (typeof value === 'string') return value;
  throw invalid(at, `must be a string, got ${nameOf(value)}`);
}

export function boolean(at: string, value: Json): boolean {
  if (typeof value === 'boolean') return value;
  throw invalid(at, `must be true or false, got ${nameOf(value)}`);
}

export function strings(at: string, value: Json): string[] {
  if (!Array.isArray(value)) throw invalid(at, `must be an array of strings, got ${nameOf(value)}`);
  return value.map((entry, index) => string(`${at}[${index}]`, entry));
}

export function onlyMembers(at: string, value: JsonObject, known: readonly string[]): void {
  const unknown = Object.keys(value).find((key) => !known.includes(key));
  if (unknown !== undefined)
    throw invalid(`${at}.${unknown}`, `is unknown; ${at} may have: ${known.join(', ')}`);
}

function nameOf(value: Json): string {
  if (value === null) return 'null, or it is missing';
  return Array.isArray(value)
    ? 'an array'
    : typeof value === 'object'
      ? 'an object'
      : JSON.stringify(value).slice(0, 100);
}

export function invalid(at: string, rule: string): MillraceError {
  return new MillraceError('invalid_argument', `${at}: ${rule}`);
}
