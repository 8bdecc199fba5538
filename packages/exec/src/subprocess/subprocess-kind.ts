/**
 * A task's `meta` as the task kind "subprocess": what a requestor writes to have any allowed program run.
 *
 *     {"mode": {"command": {"command": "jq", "args": [".name", "{input:doc.json}"]}},
 *      "inputs": ["doc.json"], "outputs": ["*.txt"], "env": [{"key": "TZ", "value": "UTC"}]}
 *
 * or, for a script, `{"mode": {"script": {"runtime": "python", "body": "<base64>", "args": []}}}`. All of it may stand under a
 * member `subprocess`. Unknown members are refused, so that a misspelt one is not silently ignored.
 */
import { MillraceError, type Json, type JsonObject } from '@millrace/runner';
import { checkRelativePath } from './file-names.ts';
import { checkVariable } from './environment.ts';
import { checkInputNames } from './inputs.ts';

export interface SubprocessKind {
  /** As given. */
  readonly command: string;
  readonly args: readonly string[];
  /** Text of a script that `command` is to run, from a file. */
  readonly script: string | null;
  readonly env: Readonly<Record<string, string>>;
  /** Relative to the task's own folder; empty for that itself. */
  readonly cwd: string;
  readonly failOnNonZero: boolean;
  /** Null: the names they are stored by. */
  readonly inputs: readonly string[] | null;
  readonly outputs: readonly string[];
  readonly stdin: 'none' | 'input' | { readonly text: string };
  readonly limits: JsonObject;
}

/** Decoded, in bytes. */
export const MAX_SCRIPT_BYTES = 2 * 1024 ** 2;

const INTERPRETERS: Readonly<Record<string, string>> = { bash: 'bash', python: 'python3', node: 'node' };

/** @throws MillraceError `invalid_argument`, naming the member by its path, the rule and the value. */
export function parseSubprocessKind(meta: Json): SubprocessKind {
  const outer = object('meta', meta);
  const wrapped = outer['subprocess'] !== undefined;
  const at = wrapped ? 'meta.subprocess' : 'meta';
  const kind = wrapped ? object(at, outer['subprocess']!) : outer;
  onlyMembers(at, kind, [
    'mode',
    'env',
    'cwd',
    'failOnNonZero',
    'inputs',
    'outputs',
    'stdin',
    'limits',
    ...(wrapped ? [] : TRACE),
  ]);
  if (wrapped) onlyMembers('meta', outer, ['subprocess', ...TRACE]);
  const { inputs, outputs, cwd, failOnNonZero, limits } = kind;
  const inputNames = inputs == null ? null : strings(`${at}.inputs`, inputs);
  if (inputNames !== null) checkInputNames(`${at}.inputs`, inputNames);
  return {
    ...parseMode(`${at}.mode`, kind['mode'] ?? null),
    env: parseEnv(`${at}.env`, kind['env'] ?? []),
    cwd: cwd == null ? '' : checkRelativePath(`${at}.cwd`, string(`${at}.cwd`, cwd)),
    failOnNonZero: failOnNonZero == null ? true : boolean(`${at}.failOnNonZero`, failOnNonZero),
    inputs: inputNames,
    outputs: outputs == null ? [] : strings(`${at}.outputs`, outputs),
    stdin: parseStdin(`${at}.stdin`, kind['stdin'] ?? 'none'),
    limits: limits == null ? {} : object(`${at}.limits`, limits),
  };
}

/** May stand beside the kind in any task's meta. */
export const TRACE = ['traceparent', 'tracestate'];

function parseMode(at: string, value: Json): Pick<SubprocessKind, 'command' | 'args' | 'script'> {
  const mode = object(at, value);
  onlyMembers(at, mode, ['command', 'script']);
  if ((mode['command'] === undefined) === (mode['script'] === undefined)) {
    throw invalid(at, 'must have either command or script');
  }
  if (mode['script'] !== undefined) return parseScript(`${at}.script`, mode['script']);
  const inner = object(`${at}.command`, mode['command']!);
  onlyMembers(`${at}.command`, inner, ['command', 'args']);
  const command = string(`${at}.command.command`, inner['command'] ?? null);
  if (command.trim() === '') throw invalid(`${at}.command.command`, 'subprocess command cannot be empty');
  return { command, args: strings(`${at}.command.args`, inner['args'] ?? []), script: null };
}

function parseScript(at: string, value: Json): Pick<SubprocessKind, 'command' | 'args' | 'script'> {
  const script = object(at, value);
  onlyMembers(at, script, ['runtime', 'body', 'args']);
  return {
    command: parseRuntime(`${at}.runtime`, script['runtime'] ?? null),
    args: strings(`${at}.args`, script['args'] ?? []),
    script: decodeBody(`${at}.body`, string(`${at}.body`, script['body'] ?? null)),
  };
}

/** Scripts are run from a file, so that a long one fits; the flag of a custom runtime is checked, and not used. */
function parseRuntime(at: string, value: Json): string {
  if (typeof value === 'string') {
    const interpreter = Object.hasOwn(INTERPRETERS, value) ? INTERPRETERS[value] : undefined;
    if (interpreter !== undefined) return interpreter;
    throw invalid(
      at,
      `must be ${Object.keys(INTERPRETERS).join(', ')} or {"custom": …}, got ${JSON.stringify(value)}`,
    );
  }
  const runtime = object(at, value);
  onlyMembers(at, runtime, ['custom']);
  const custom = object(`${at}.custom`, runtime['custom'] ?? null);
  onlyMembers(`${at}.custom`, custom, ['command', 'flag']);
  for (const member of ['command', 'flag'] as const) {
    if (string(`${at}.custom.${member}`, custom[member] ?? null).trim() === '') {
      throw invalid(`${at}.custom.${member}`, `custom runtime ${member} cannot be empty`);
    }
  }
  return custom['command'] as string;
}

function decodeBody(at: string, body: string): string {
  if (body === '') throw invalid(at, 'script body cannot be empty');
  if (!/^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$/.test(body))
    throw invalid(at, 'invalid base64 body');
  const bytes = Buffer.from(body, 'base64');
  if (bytes.byteLength > MAX_SCRIPT_BYTES) {
    throw invalid(at, `must be at most ${MAX_SCRIPT_BYTES} bytes when decoded, it has ${bytes.byteLength}`);
  }
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw invalid(at, 'not valid UTF-8');
  }
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

function parseStdin(at: string, value: Json): SubprocessKind['stdin'] {
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
