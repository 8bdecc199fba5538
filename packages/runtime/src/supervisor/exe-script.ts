/**
 * Scripts: an array of commands, each an object with one key, as requestors write them.
 *
 * A script runs in order; the first command that fails ends it. What goes wrong with a command is a result, not an exception:
 * `runScript` rejects only when its signal aborts.
 */
import { MillraceError, describeError, type Clock, type Json, type JsonObject } from '@millrace/runner';
import { isObject } from '../sdk/canonical-json.ts';
import {
  CAPTURE_ALL,
  CAPTURE_NOTHING,
  ChunkText,
  type CaptureFormat,
  type CaptureMode,
  type CapturedValue,
} from './capture.ts';
import type { CommandOptions, CommandResult } from './running-command.ts';
import type { RuntimeSupervisor } from './runtime-supervisor.ts';

export type ScriptCommand =
  | {
      readonly kind: 'deploy';
      readonly volumes: Readonly<Record<string, Json>> | null;
      readonly hostname: string | null;
      /** How many networks it asks for. */
      readonly networks: number;
    }
  | { readonly kind: 'start'; readonly args: readonly string[] }
  | {
      readonly kind: 'run';
      readonly entryPoint: string;
      readonly args: readonly string[];
      readonly capture: { readonly stdout: CaptureMode; readonly stderr: CaptureMode };
    }
  | { readonly kind: 'transfer'; readonly from: string; readonly to: string }
  | { readonly kind: 'terminate' };

/** How a command ended. Member names are those of the field. */
export interface ScriptResult {
  readonly index: number;
  readonly result: 'Ok' | 'Error';
  readonly stdout: CapturedValue;
  readonly stderr: CapturedValue;
  readonly message: string | null;
  readonly isBatchFinished: boolean;
  /** RFC 3339. */
  readonly eventDate: string;
  /** Our own: a limit of the supervisor, not the script's, cut the output. */
  readonly truncated: boolean;
}

/** What happens while a script runs, in the field's words. */
export interface ScriptEvent {
  readonly index: number;
  readonly timestamp: string;
  readonly kind: JsonObject;
}

export interface ScriptOptions {
  readonly supervisor: RuntimeSupervisor;
  readonly clock: Clock;
  readonly signal: AbortSignal;
  /** Output kept of all commands together, bytes; the command that passes it fails. Default 64 MiB. */
  readonly capturedBytes?: number;
  /** Moves bytes between places named by URLs. */
  readonly transfer: (from: string, to: string, signal: AbortSignal) => Promise<void>;
  /** After each deploy that succeeded. */
  readonly onDeployed?: () => Promise<void>;
  readonly onEvent?: (event: ScriptEvent) => void;
  readonly onResult?: (result: ScriptResult) => void;
}

/** Output is told in pieces of at most this many bytes, so that an event stays small however its text is escaped. */
const EVENT_OUTPUT_BYTES = 8 * 1024;
const DEFAULT_CAPTURED_BYTES = 64 * 1024 * 1024;

/**
 * Reads a script: the array itself, or JSON text of it.
 *
 * @throws MillraceError `invalid_argument` naming the command by its index, the rule and the value.
 */
export function parseExeScript(value: unknown, maxCommands = 1_000): ScriptCommand[] {
  let script = value;
  if (typeof script === 'string') {
    try {
      script = JSON.parse(script);
    } catch (error) {
      throw invalid(`exe_script is not JSON: ${(error as Error).message}`);
    }
  }
  if (!Array.isArray(script)) throw invalid('exe_script must be an array of commands');
  if (script.length > maxCommands) {
    throw new MillraceError(
      'resource_exhausted',
      `exe_script has ${script.length} commands, above the limit commands of ${maxCommands}`,
    );
  }
  return script.map((entry: unknown, index) => {
    try {
      return parseCommand(entry);
    } catch (error) {
      throw invalid(`exe_script command ${index}: ${(error as Error).message}`);
    }
  });
}

function parseCommand(entry: unknown): ScriptCommand {
  if (!isObject(entry) || Object.keys(entry).length !== 1) {
    throw new TypeError('must be an object with one key, the command');
  }
  const [kind, body] = Object.entries(entry)[0]!;
  if (!isObject(body)) throw new TypeError(`${kind} must be an object`);
  switch (kind) {
    case 'deploy':
      return {
        kind,
        volumes: parseVolumes(body.volumes),
        hostname:
          body.hostname === undefined || body.hostname === null ? null : text(body.hostname, 'hostname'),
        networks: Array.isArray(body.net) ? body.net.length : 0,
      };
    case 'start':
      return { kind, args: texts(body.args, 'args') };
    case 'run':
      return {
        kind,
        entryPoint: text(body.entry_point, 'entry_point'),
        args: texts(body.args, 'args'),
        capture: parseCapture(body.capture),
      };
    case 'transfer': {
      for (const member of ['format', 'depth', 'fileset']) {
        if (body[member] !== undefined && body[member] !== null) {
          throw new TypeError(`transfer with ${member} is not offered; transfer files one by one`);
        }
      }
      return { kind, from: text(body.from, 'from'), to: text(body.to, 'to') };
    }
    case 'terminate':
      return { kind };
    case 'sign':
      throw new TypeError('sign needs an SGX supervisor, which this is not');
    default:
      throw new TypeError(
        `unknown command ${JSON.stringify(kind)}; there are deploy, start, run, transfer, terminate`,
      );
  }
}

function parseVolumes(value: Json | undefined): Readonly<Record<string, Json>> | null {
  if (value === undefined || value === null) return null;
  if (Array.isArray(value)) {
    return Object.fromEntries(texts(value, 'volumes').map((path) => [path, { host: {} }]));
  }
  if (!isObject(value)) throw new TypeError('volumes must be a list of paths, or an object of path to kind');
  return value;
}

function parseCapture(value: Json | undefined): { stdout: CaptureMode; stderr: CaptureMode } {
  const capture = value ?? {};
  if (!isObject(capture)) throw new TypeError('capture must be an object');
  return { stdout: parseMode(capture.stdout, 'stdout'), stderr: parseMode(capture.stderr, 'stderr') };
}

function parseMode(value: Json | undefined, stream: string): CaptureMode {
  if (value === undefined || value === null) return CAPTURE_NOTHING;
  const [name] = isObject(value) ? Object.keys(value) : [];
  const body = isObject(value) && name !== undefined ? value[name] : null;
  if (!isObject(body) || (name !== 'stream' && name !== 'atEnd')) {
    throw new TypeError(`capture.${stream} must be {"stream": {…}} or {"atEnd": {…}}`);
  }
  const format = parseFormat(body.format, stream);
  const size = (member: string): number | null => {
    const bytes = body[member];
    if (bytes === undefined || bytes === null) return null;
    if (typeof bytes !== 'number' || !Number.isSafeInteger(bytes) || bytes < 0) {
      throw new TypeError(`capture.${stream}: ${member} must be a whole number of bytes`);
    }
    return bytes;
  };
  if (name === 'stream') return { keep: 'head', bytes: size('limit'), stream: true, format };
  // If several are given, the first counts.
  for (const member of Object.keys(body)) {
    const bytes = ['head', 'tail', 'headTail'].includes(member) ? size(member) : null;
    if (bytes === null) continue;
    if (member === 'head') return { keep: 'head', bytes, stream: false, format };
    return { keep: member as 'tail' | 'headTail', bytes, format };
  }
  return { keep: 'head', bytes: null, stream: false, format };
}

function parseFormat(value: Json | undefined, stream: string): CaptureFormat {
  if (value === undefined || value === null || value === 'str' || value === 'string') return 'str';
  if (value === 'bin' || value === 'binary') return 'bin';
  throw new TypeError(`capture.${stream}: format must be str or bin, got ${JSON.stringify(value)}`);
}

function text(value: Json | undefined, member: string): string {
  if (typeof value === 'string') return value;
  throw new TypeError(`${member} must be a text, got ${JSON.stringify(value) ?? 'nothing'}`);
}

function texts(value: Json | undefined, member: string): string[] {
  if (value === undefined) return [];
  if (!Array.isArray(value)) throw new TypeError(`${member} must be an array of texts`);
  return value.map((one) => text(one, member));
}

function invalid(message: string): MillraceError {
  return new MillraceError('invalid_argument', message);
}

/** Runs the commands to the end or the first failure; one result for each that ran. Rejects with the signal's reason. */
export async function runScript(
  script: readonly ScriptCommand[],
  options: ScriptOptions,
): Promise<ScriptResult[]> {
  const { clock, signal, onEvent, onResult, capturedBytes = DEFAULT_CAPTURED_BYTES } = options;
  let captured = 0;
  const now = (): string => new Date(clock.now()).toISOString();
  const results: ScriptResult[] = [];
  for (const [index, command] of script.entries()) {
    signal.throwIfAborted();
    const tell = (kind: JsonObject): void => onEvent?.({ index, timestamp: now(), kind });
    tell({ started: { command: startedCommand(command) } });
    let result: CommandResult | null = null;
    let message: string | null = null;
    let returnCode = 0;
    try {
      result = await runOne(command, options, tell);
      captured += (result?.stdout.bytes.length ?? 0) + (result?.stderr.bytes.length ?? 0);
      if (captured > capturedBytes) {
        result = null;
        throw new MillraceError(
          'resource_exhausted',
          `the kept output of the script has ${captured} bytes, above the limit capturedBytes of ${capturedBytes}`,
          { details: { limit: 'capturedBytes', value: capturedBytes } },
        );
      }
      if (result !== null && result.exitCode !== 0) {
        returnCode = result.exitCode;
        message = `ExeScript command exited with code ${result.exitCode}`;
      }
    } catch (error) {
      signal.throwIfAborted();
      returnCode = -1;
      message = describeError(error);
    }
    tell({ finished: { return_code: returnCode, message } });
    const failed = message !== null;
    const ended: ScriptResult = {
      index,
      result: failed ? 'Error' : 'Ok',
      stdout: result?.stdout.value ?? null,
      stderr: result?.stderr.value ?? null,
      message,
      isBatchFinished: failed || index === script.length - 1,
      eventDate: now(),
      truncated: result !== null && (result.stdout.truncated || result.stderr.truncated),
    };
    results.push(ended);
    onResult?.(ended);
    if (failed) break;
  }
  return results;
}

async function runOne(
  command: ScriptCommand,
  options: ScriptOptions,
  tell: (kind: JsonObject) => void,
): Promise<CommandResult | null> {
  const { supervisor, signal } = options;
  switch (command.kind) {
    case 'deploy': {
      if (command.networks > 0) {
        throw new MillraceError(
          'unimplemented',
          'deploy asks for networks, which this supervisor does not offer',
        );
      }
      const capture = { stdout: CAPTURE_ALL, stderr: CAPTURE_ALL };
      const result = await supervisor.deploy(
        {
          ...(command.volumes ? { volumes: command.volumes } : {}),
          ...(command.hostname === null ? {} : { hostname: command.hostname }),
        },
        streaming({ signal, capture }, tell),
      );
      if (result.exitCode === 0) await options.onDeployed?.();
      return result;
    }
    case 'start': {
      const capture = { stdout: CAPTURE_ALL, stderr: CAPTURE_ALL };
      return supervisor.start(command.args, streaming({ signal, capture }, tell));
    }
    case 'run': {
      const { entryPoint, args, capture } = command;
      return supervisor.run({ entryPoint, args }, streaming({ signal, capture }, tell));
    }
    case 'transfer':
      await options.transfer(command.from, command.to, signal);
      break;
    case 'terminate':
      await supervisor.terminate();
  }
  return null;
}

/** Tells the output of the streams whose capture asks for it, up to its limit. */
function streaming(
  options: CommandOptions & Required<Pick<CommandOptions, 'capture'>>,
  tell: (kind: JsonObject) => void,
): CommandOptions {
  const tellers = {
    stdout: outputTeller('stdout', options.capture.stdout, tell),
    stderr: outputTeller('stderr', options.capture.stderr, tell),
  };
  return { ...options, onOutput: (stream, chunk) => tellers[stream](chunk) };
}

function outputTeller(
  stream: 'stdout' | 'stderr',
  mode: CaptureMode,
  tell: (kind: JsonObject) => void,
): (chunk: Uint8Array) => void {
  if (mode.keep !== 'head' || !mode.stream) return () => undefined;
  const decoder = new ChunkText();
  let left = mode.bytes ?? Infinity;
  return (chunk) => {
    const kept = chunk.subarray(0, left);
    left -= kept.length;
    for (let at = 0; at < kept.length; at += EVENT_OUTPUT_BYTES) {
      const piece = kept.subarray(at, at + EVENT_OUTPUT_BYTES);
      const value = mode.format === 'bin' ? [...piece] : decoder.push(piece);
      if (value.length > 0) tell({ [stream]: value });
    }
  };
}

function startedCommand(command: ScriptCommand): JsonObject {
  switch (command.kind) {
    case 'start':
      return { start: { args: [...command.args] } };
    case 'run':
      return { run: { entry_point: command.entryPoint, args: [...command.args] } };
    case 'transfer':
      return { transfer: { from: command.from, to: command.to } };
    case 'deploy':
    case 'terminate':
      break;
  }
  return { [command.kind]: {} };
}
