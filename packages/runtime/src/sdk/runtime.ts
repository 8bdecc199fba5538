/** What a runtime author writes, and what the handlers are given. */
import type { Json, JsonObject } from '@millrace/runner';
import { MillraceError } from '@millrace/runner';
import { checkDeclaration, type CliDeclaration, type CliOptions, type ParsedCli } from './command-line.ts';
import type { ConfigDeclaration } from './config-file.ts';

/**
 * - `server`: `start` stays up, and commands reach it over its stdin and stdout
 * - `command`: every command is a process of its own
 */
export type RuntimeMode = 'server' | 'command';

/** The id of a command: unique while the runtime is up, not a process id of the machine. Numbers must be safe integers >= 0. */
export type Pid = bigint | number;

/** A folder of the work directory that the requestor can reach. */
export interface Volume {
  /** The folder's name in the work directory; one path component. */
  readonly name: string;
  /** Absolute path by which the runtime and transfers know it, such as `/in`. */
  readonly path: string;
}

/** What `deploy` says. Members left out are filled in: success, no volumes, the runtime's mode. */
export interface DeployAnswer {
  readonly valid?: { readonly Ok: string } | { readonly Err: string };
  /** Their folders are made in the work directory. */
  readonly vols?: readonly Volume[];
  readonly startMode?: 'blocking' | 'empty';
  readonly [key: string]: unknown;
}

/** What the runtime adds to the provider's offer. Use flat, dotted property names. */
export interface Offer {
  /** Default: none. */
  readonly constraints?: string;
  /** Default: none. */
  readonly properties?: JsonObject;
}

/** A command to run. */
export interface RunCommand {
  /** The entry point as the requestor gave it: a program, or any name the runtime gives a meaning. */
  readonly entryPoint: string;
  /** The words after the command's name. */
  readonly args: readonly string[];
  /** The conventional name of the program, args[0] of the wire; null on the command line, where it is not sent. */
  readonly argv0: string | null;
  /** `server`: asked for over the wire. `command`: this process was started for it. */
  readonly mode: RuntimeMode;
  /** Empty from supervisors in use. On the command line, the work directory as given. */
  readonly workDir: string;
}

export interface KillCommand {
  readonly pid: bigint;
  /** A signal number of the machine; 0 when the supervisor named none. */
  readonly signal: number;
}

/** A network to join. Answer with the endpoint at which the runtime exchanges raw Ethernet frames. */
export interface JoinNetwork {
  readonly interface: 'vpn' | 'inet';
  readonly networks: readonly {
    readonly addr: string;
    readonly gateway: string;
    readonly mask: string;
    readonly ifAddr: string;
  }[];
  /** Host name to address. */
  readonly hosts: Readonly<Record<string, string>>;
}

/** Exactly one member: a socket path, or `IP:PORT`. */
export type NetworkEndpoint =
  | { readonly unixStream: string }
  | { readonly unixDatagram: string }
  | { readonly udpDatagram: string }
  | { readonly tcpListener: string }
  | { readonly tcpStream: string };

/** Why a command's signal aborted. */
export class CommandKilled extends Error {
  /** The signal number, 15 when none was named. */
  readonly signal: number;

  constructor(signal: number, message = `killed by signal ${signal}`) {
    super(message);
    this.name = 'CommandKilled';
    this.signal = signal;
  }
}

export interface SpawnOptions {
  readonly cwd?: string;
  /** Replaces the environment. Default: the runtime's own. */
  readonly env?: Readonly<Record<string, string | undefined>>;
}

/**
 * A running command. Its output goes to the supervisor as it is written, in order; the promises resolve once
 * the bytes are on their way, and waiting for them is what keeps a fast command from filling the memory.
 */
export interface CommandContext {
  readonly pid: bigint;
  /** Aborts with a {@link CommandKilled} when the command is killed or the runtime stops. Settle soon after. */
  readonly signal: AbortSignal;
  /** What the command ends with when its handler resolves, -2^31 to 2^31-1. Default 0; a handler that throws ends it with 1. */
  exitCode: number;
  stdout(data: string | Uint8Array): Promise<void>;
  stderr(data: string | Uint8Array): Promise<void>;
  /** Tells a state of the runtime. */
  state(name: string, value: Json): Promise<void>;
  /** Sets a usage counter to a value (not a difference), for billing. @throws RangeError for NaN, infinities, negatives. */
  counter(name: string, value: number): Promise<void>;
  readonly control: RuntimeControl;
  /**
   * Runs a program of the machine as a part of this command: its output is the command's, `exitCode` becomes its exit code (128 +
   * n after signal n). It has a process group of its own, which a kill of the command reaches: the signal,
   * and SIGKILL two seconds later. stdin is empty.
   *
   * Resolves when it has ended, with nothing, so that a handler may be just this. Rejects when the program cannot be started, and with the {@link CommandKilled} when
   * the command was killed.
   */
  spawn(file: string, args?: readonly string[], options?: SpawnOptions): Promise<void>;
}

/** What is returned, unless null or undefined, becomes the last line of stdout, as compact JSON. */
export type CommandHandler = (command: CommandContext) => unknown;

export interface RuntimeControl {
  /** Ends the runtime as a supervisor would: `stop` is called, then the process ends. Only the first call does something. */
  shutdown(): void;
}

/** Raw events, for runtimes that keep their own processes. {@link RuntimeContext.command} does all of this by itself. */
export interface Emitter {
  /** A pid no command has had. */
  nextPid(): bigint;
  started(pid: Pid): Promise<void>;
  stdout(pid: Pid, data: string | Uint8Array): Promise<void>;
  stderr(pid: Pid, data: string | Uint8Array): Promise<void>;
  /** The last event of a pid, exactly once. */
  stopped(pid: Pid, exitCode: number): Promise<void>;
  state(name: string, value: Json): Promise<void>;
  /** @throws RangeError for NaN, infinities, negatives. */
  counter(name: string, value: number): Promise<void>;
}

/** Where the runtime runs. */
export interface RuntimeEnvironment {
  /** The runtime's name, which names the configuration. */
  readonly name: string;
  readonly dataDir: string;
  readonly vars: Readonly<Record<string, string | undefined>>;
}

export interface RuntimeContext<Options extends CliOptions = CliOptions, Config = unknown> {
  readonly cli: ParsedCli<Options>;
  readonly config: Config;
  /** The file the configuration was read from, or where it would be. */
  readonly configPath: string;
  readonly env: RuntimeEnvironment;
  /** Null except in `start` of a runtime in server mode, and in what follows it. */
  readonly emitter: Emitter | null;
  /** Aborts when the runtime stops. */
  readonly signal: AbortSignal;
  readonly control: RuntimeControl;
  /** JSON, YAML or TOML by extension. Not checked. @throws MillraceError `not_found`, `invalid_argument`. */
  readConfig(path: string): Promise<Json>;
  /** Whole or not at all; makes missing folders. `path` defaults to {@link configPath}. @throws MillraceError `invalid_argument`. */
  writeConfig(value: Json, path?: string): Promise<void>;
  /**
   * Runs the handler as a command and answers with its pid at once: started, output, stopped are told in that order, exactly
   * once, whatever the handler does. A handler that throws ends the command with code 1 (a {@link RuntimeError}
   * with its own) and its message on stderr. On the command line the process waits for it and takes its exit code.
   */
  command(handler: CommandHandler): Promise<bigint>;
}

/** Handlers may be async. What they throw is reported; see each. */
export interface RuntimeDefinition<Options extends CliOptions = CliOptions, Config = unknown> {
  /** Default name of the configuration's folder and file. */
  readonly name: string;
  /** Semantic version; told to the supervisor. */
  readonly version: string;
  /** For the help text. */
  readonly description?: string;
  /** Default `server`. */
  readonly mode?: RuntimeMode;
  /** The author's own command line, beside the standard one. */
  readonly cli?: CliDeclaration<Options>;
  /** Default: no configuration; `ctx.config` is null. */
  readonly config?: ConfigDeclaration<Config>;
  /** From the first cause to stop until the process ends, whatever `stop` does, ms. Default 4500; supervisors wait for 5000. */
  readonly stopTimeoutMs?: number;
  /** Sets up the work directory, in a process of its own. Throwing: exit 1. Default: nothing to set up. */
  deploy?(ctx: RuntimeContext<Options, Config>): Promise<DeployAnswer | void> | DeployAnswer | void;
  /** Makes the runtime ready. What it returns is output of the Start command. Throwing: exit 1. Default: ready. */
  start?(ctx: RuntimeContext<Options, Config>): unknown;
  /** Starts a command and returns its pid without waiting for its end. Throwing: the command was not started. */
  runCommand(ctx: RuntimeContext<Options, Config>, run: RunCommand): Promise<Pid> | Pid;
  /** Default: aborts the signal of the `ctx.command` with this pid; signal 9 also ends it for the supervisor at once. */
  killCommand?(ctx: RuntimeContext<Options, Config>, kill: KillCommand): Promise<void> | void;
  /** Called once, whatever the cause. Commands are being ended at the same time. Default: nothing to do. */
  stop?(ctx: RuntimeContext<Options, Config>): Promise<void> | void;
  /** Default: refused as not supported. */
  joinNetwork?(
    ctx: RuntimeContext<Options, Config>,
    network: JoinNetwork,
  ): Promise<NetworkEndpoint> | NetworkEndpoint;
  /** Throwing: the provider does not start. Must work at any time, several at once. Default: passes. */
  test?(ctx: RuntimeContext<Options, Config>): Promise<void> | void;
  /** Must work at any time. Default: nothing to add. */
  offer?(ctx: RuntimeContext<Options, Config>): Promise<Offer | void> | Offer | void;
}

/** A checked definition; `runRuntime` makes a program of it. */
export type Runtime = RuntimeDefinition;

const HANDLERS = ['deploy', 'start', 'killCommand', 'stop', 'joinNetwork', 'test', 'offer'] as const;
const DEFAULT_STOP_TIMEOUT_MS = 4_500;

/**
 * Checks a definition.
 *
 * @example
 * const echo = defineRuntime({
 *   name: 'echo',
 *   version: '1.0.0',
 *   runCommand: (ctx, run) => ctx.command((command) => command.stdout(`${run.args.join(' ')}\n`)),
 * });
 *
 * @throws MillraceError `invalid_argument` naming the member and the rule.
 */
export function defineRuntime<const Options extends CliOptions = CliOptions, Config = null>(
  definition: RuntimeDefinition<Options, Config>,
): Runtime {
  const given: Readonly<Partial<Record<keyof RuntimeDefinition, unknown>>> = definition;
  const reject = (rule: string): never => {
    throw new MillraceError('invalid_argument', `runtime ${JSON.stringify(given.name)}: ${rule}`);
  };
  if (typeof given.name !== 'string' || !/^[^/\\\p{Cc}]+$/u.test(given.name) || /^\.+$/.test(given.name)) {
    reject('name must be a text that can name a file');
  }
  if (typeof given.version !== 'string' || !/^\d+\.\d+\.\d+(?:[-+].+)?$/.test(given.version)) {
    reject(`version must be a semantic version such as 1.0.0, got ${JSON.stringify(given.version)}`);
  }
  if (given.mode !== undefined && given.mode !== 'server' && given.mode !== 'command') {
    reject(`mode must be server or command, got ${JSON.stringify(given.mode)}`);
  }
  if (typeof given.runCommand !== 'function') reject('runCommand must be a function');
  for (const name of HANDLERS) {
    if (given[name] !== undefined && typeof given[name] !== 'function')
      reject(`${name} must be a function or absent`);
  }
  const { stopTimeoutMs } = definition;
  if (stopTimeoutMs !== undefined && !(stopTimeoutMs >= 0 && stopTimeoutMs < 2 ** 31)) {
    reject(`stopTimeoutMs must be a number of milliseconds from 0, got ${stopTimeoutMs}`);
  }
  try {
    checkDeclaration(definition.cli ?? {});
  } catch (error) {
    throw new MillraceError('invalid_argument', `runtime ${JSON.stringify(given.name)}: cli`, {
      cause: error,
    });
  }
  return definition;
}

export function modeOf(runtime: Runtime): RuntimeMode {
  return runtime.mode ?? 'server';
}

export function stopTimeoutOf(runtime: Runtime): number {
  return runtime.stopTimeoutMs ?? DEFAULT_STOP_TIMEOUT_MS;
}
