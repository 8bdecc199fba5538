/** Makes a program of a runtime: command line, configuration, handlers, exit code. */
import { once } from 'node:events';
import { mkdir } from 'node:fs/promises';
import { constants } from 'node:os';
import path from 'node:path';
import { describeError, systemClock, type Clock } from '@millrace/runner';
import { canonicalJson, isObject } from './canonical-json.ts';
import { helpText, parseCommandLine, UsageError, type ParsedCli } from './command-line.ts';
import { defaultDataDir, findConfig, loadConfig, readConfigFile, writeConfigFile } from './config-file.ts';
import { Command, checkCounter, type CommandSink } from './command.ts';
import { RuntimeError } from './runtime-error.ts';
import {
  modeOf,
  type CommandHandler,
  type DeployAnswer,
  type Runtime,
  type RuntimeContext,
  type Volume,
} from './runtime.ts';
import type { ServerFace } from './server.ts';

export interface RunRuntimeOptions {
  /** The words after the program. Default: the process's. */
  readonly argv?: readonly string[];
  /** Default: the process's environment. */
  readonly env?: Readonly<Record<string, string | undefined>>;
  /**
   * The runtime's name for its configuration, where one program serves several. It may depend on the command line, e.g. on a
   * positional. Default: the definition's.
   */
  readonly name?: string | ((cli: ParsedCli) => string);
  /** Folder of the configuration. Default: the platform's per-user data folder for the name. */
  readonly dataDir?: string;
  readonly clock?: Clock;
}

const STOP_SIGNALS = ['SIGTERM', 'SIGINT', 'SIGHUP'] as const;

/**
 * Runs the runtime as this process, and ends the process: 0 done, 1 (or a {@link RuntimeError}'s code) failed, wrong
 * usage or a broken configuration; a command that was run here, its own exit code; 128 + n after stopping for signal n.
 *
 * Call it as early as possible: in server mode stdout carries the protocol, and is taken from all other code here.
 */
export async function runRuntime(runtime: Runtime, options: RunRuntimeOptions = {}): Promise<never> {
  let exitCode: number;
  try {
    exitCode = await main(runtime, options);
  } catch (error) {
    exitCode = reportFailure(error);
  }
  // Whatever handlers left running must not keep a process alive that has said its last word.
  await Promise.all([flushed(process.stdout), flushed(process.stderr)]);
  process.exit(exitCode);
}

async function main(runtime: Runtime, options: RunRuntimeOptions): Promise<number> {
  const { argv = process.argv.slice(2), env = process.env } = options;
  const request = parseCommandLine(runtime.cli ?? {}, argv);
  if (request.kind === 'help') {
    process.stdout.write(helpText(runtime, runtime.cli ?? {}));
    return 0;
  }
  if (request.kind === 'version') {
    process.stdout.write(`${runtime.name} ${runtime.version}\n`);
    return 0;
  }
  const { cli } = request;
  const serves = cli.command.name === 'start' && modeOf(runtime) === 'server';
  const wire = serves ? (await import('./own-stdout.ts')).takeStdout() : null;

  const name = (typeof options.name === 'function' ? options.name(cli) : options.name) ?? runtime.name;
  const dataDir = options.dataDir ?? defaultDataDir(name, env);
  const configFile = await findConfig(dataDir, name);
  const config = await readConfiguration(runtime, configFile);
  const clock = options.clock ?? systemClock;

  const context = (face: ServerFace | CommandLineFace): RuntimeContext => ({
    cli,
    config,
    configPath: configFile.path,
    env: { name, dataDir, vars: env },
    emitter: face.emitter,
    signal: face.signal,
    control: { shutdown: () => face.shutdown() },
    readConfig: readConfigFile,
    writeConfig: (value, file = configFile.path) => writeConfigFile(value, file),
    command: (handler) => face.command(handler),
  });

  if (wire !== null) {
    const { RuntimeServer } = await import('./server.ts');
    const complain = (line: string): void => void process.stderr.write(`${line}\n`);
    const server = new RuntimeServer(runtime, { input: process.stdin, output: wire }, { clock, complain });
    for (const signal of STOP_SIGNALS) {
      process.on(signal, () => server.onSignal(128 + constants.signals[signal]));
    }
    process.on('uncaughtException', (error) => server.onUncaught(error));
    return server.serve(context(server));
  }
  const face = new CommandLineFace();
  return runSubcommand(runtime, context(face), face);
}

async function runSubcommand(runtime: Runtime, ctx: RuntimeContext, face: CommandLineFace): Promise<number> {
  const { command, workdir } = ctx.cli;
  switch (command.name) {
    case 'deploy': {
      const answer = await runtime.deploy?.(ctx);
      const complete = deployAnswer(runtime, answer);
      if ('Ok' in complete.valid) await makeVolumes(workdir!, complete.vols);
      process.stdout.write(canonicalJson(complete, 'what deploy returns'));
      return 'Ok' in complete.valid ? 0 : 1;
    }
    case 'start': {
      const result = await runtime.start?.(ctx);
      if (result !== undefined && result !== null) {
        process.stdout.write(
          typeof result === 'string' ? result : canonicalJson(result, 'what start returns'),
        );
      }
      return face.ended();
    }
    case 'run': {
      const { args } = command;
      const entryPoint = command.entryPoint!;
      await runtime.runCommand(ctx, { entryPoint, args, argv0: null, mode: 'command', workDir: workdir! });
      return face.ended();
    }
    case 'test':
      await runtime.test?.(ctx);
      return 0;
    case 'offer-template':
      break;
  }
  const offer = (await runtime.offer?.(ctx)) ?? {};
  process.stdout.write(canonicalJson({ constraints: '', properties: {}, ...offer }, 'what offer returns'));
  return 0;
}

/** What the context offers outside of server mode. */
class CommandLineFace implements CommandSink {
  readonly emitter = null;
  readonly #stopping = new AbortController();
  readonly #commands: Command[] = [];
  readonly #handlers: Promise<void>[] = [];
  #exitCode = 0;

  constructor() {
    for (const signal of STOP_SIGNALS) {
      process.on(signal, () => {
        // Without a command there is nothing that could be asked to end.
        if (this.#commands.length === 0) process.exit(128 + constants.signals[signal]);
        this.#kill(constants.signals[signal]);
      });
    }
  }

  get signal(): AbortSignal {
    return this.#stopping.signal;
  }

  shutdown(): void {
    this.#kill(constants.signals.SIGTERM);
  }

  command(handler: CommandHandler): Promise<bigint> {
    const pid = BigInt(this.#commands.length);
    const command = new Command(pid, this, { shutdown: () => this.shutdown() });
    this.#commands.push(command);
    this.#handlers.push(command.run(handler));
    return Promise.resolve(pid);
  }

  /** Waits for the commands. The exit code is that of the first that failed. */
  async ended(): Promise<number> {
    // Commands may start commands.
    for (let at = 0; at < this.#handlers.length; at += 1) await this.#handlers[at];
    return this.#exitCode;
  }

  stdout(_pid: bigint, bytes: Uint8Array): Promise<void> {
    return print(process.stdout, bytes);
  }

  stderr(_pid: bigint, bytes: Uint8Array): Promise<void> {
    return print(process.stderr, bytes);
  }

  async state(): Promise<void> {
    // Nobody on a command line listens for states.
  }

  async counter(name: string, value: number): Promise<void> {
    checkCounter(name, value);
  }

  async stopped(_pid: bigint, exitCode: number): Promise<void> {
    // The system keeps eight bits of it; a failure must not become a success there.
    if (this.#exitCode === 0) this.#exitCode = exitCode === 0 ? 0 : exitCode & 0xff || 1;
  }

  #kill(signal: number): void {
    this.#stopping.abort(new RuntimeError('the runtime is stopping'));
    for (const command of this.#commands) void command.kill(signal);
  }
}

async function readConfiguration(
  runtime: Runtime,
  file: { readonly path: string; readonly exists: boolean },
): Promise<unknown> {
  if (!runtime.config) return null;
  try {
    return await loadConfig(runtime.config, file);
  } catch (error) {
    throw new ConfigurationError(file.path, error);
  }
}

class ConfigurationError extends Error {
  constructor(file: string, cause: unknown) {
    super(`Unable to read the configuration file: ${file}\n\nCaused by:\n    ${describeError(cause)}`);
  }
}

interface CompleteDeployAnswer extends DeployAnswer {
  readonly valid: { readonly Ok: string } | { readonly Err: string };
  readonly vols: readonly Volume[];
  readonly startMode: 'blocking' | 'empty';
}

function deployAnswer(runtime: Runtime, answer: unknown): CompleteDeployAnswer {
  if (answer !== undefined && answer !== null && !isObject(answer)) {
    throw new RuntimeError(`deploy must return an object, got ${typeof answer}`);
  }
  const startMode = modeOf(runtime) === 'server' ? 'blocking' : 'empty';
  const complete = { startMode, valid: { Ok: '' }, vols: [], ...answer } as CompleteDeployAnswer;
  for (const { name, path: inside } of complete.vols) {
    if (typeof name !== 'string' || !/^[^/\\\0]+$/.test(name) || name === '.' || name === '..') {
      throw new RuntimeError(`a volume's name must be one folder name, got ${JSON.stringify(name)}`);
    }
    if (typeof inside !== 'string' || !inside.startsWith('/')) {
      throw new RuntimeError(`the path of volume ${name} must start with /, got ${JSON.stringify(inside)}`);
    }
  }
  return complete;
}

/** Supervisors rely on the runtime to make them. */
async function makeVolumes(workdir: string, volumes: readonly Volume[]): Promise<void> {
  for (const { name } of volumes) await mkdir(path.join(workdir, name), { recursive: true });
}

function reportFailure(error: unknown): number {
  if (error instanceof UsageError || error instanceof ConfigurationError) {
    process.stderr.write(`Error: ${error.message}\n`);
    return 1;
  }
  const failure = RuntimeError.from(error);
  process.stderr.write(`Error: ${failure.line}\n`);
  return failure.exitCode;
}

async function print(stream: NodeJS.WriteStream, bytes: Uint8Array): Promise<void> {
  if (!stream.write(bytes)) await once(stream, 'drain');
}

/** A pipe may still hold what was written. A reader that is gone wants nothing more. */
function flushed(stream: NodeJS.WriteStream): Promise<void> {
  return new Promise((resolve) => {
    stream.once('error', () => resolve());
    stream.write('', () => resolve());
  });
}
