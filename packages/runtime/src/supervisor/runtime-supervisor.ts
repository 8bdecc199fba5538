/**
 * Drives one runtime through one activity.
 *
 * Initialized --deploy--> Deployed --start--> Ready --run*--> ... --terminate--> Initialized. A command that fails leaves the
 * state as it was. What `deploy` prints decides the mode: in server mode `start` leaves a process that is spoken to over
 * its stdin and stdout, in command mode every command is a process.
 *
 * Nothing waits for the runtime without a limit. When it dies, answers wrongly, or writes anything but frames, all that waits
 * for it fails with what happened. After `close` no process of the activity is left.
 */
import { accessSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import path from 'node:path';
import { MillraceError, systemClock, type Clock, type Json, type Logger } from '@millrace/runner';
import type { Volume } from '../sdk/runtime.ts';
import { CAPTURE_ALL, OutputCapture } from './capture.ts';
import { parseDeployOutput, type DeployOutput } from './deploy-output.ts';
import { runtimeEnvironment } from './environment.ts';
import { checkLimits, type SupervisorLimits } from './limits.ts';
import { startOneShot, type OneShot } from './one-shot.ts';
import { ActivityProcesses, type ProcessExit } from './activity-processes.ts';
import {
  openCaptures,
  type Captures,
  type CommandOptions,
  type CommandResult,
  type RunningCommand,
} from './running-command.ts';
import { ServerSession } from './server-session.ts';
import { UsageMeter, type Usage } from './usage.ts';
import { VolumeTable } from './volumes.ts';
import type { RuntimeStatusEvent, TracedFrame } from './wire-client.ts';

export type ActivityState = 'Initialized' | 'Deployed' | 'Ready' | 'Terminated';

export interface SupervisorOptions {
  /** The runtime's binary. */
  readonly runtime: string;
  /** Made if missing. Volumes are folders in it. */
  readonly workDir: string;
  /** `--task-package`: an image. */
  readonly taskPackage?: string;
  /** The caps of the agreement, handed to the runtime. */
  readonly hardware?: { readonly cpuCores?: number; readonly memGib?: number; readonly storageGib?: number };
  /** Words put before the subcommand. */
  readonly runtimeArgs?: readonly string[];
  /** Variables granted beyond the harmless ones. */
  readonly env?: Readonly<Record<string, string>>;
  readonly limits?: Partial<SupervisorLimits>;
  /** The version told in hello. Default 0.1.0. */
  readonly protocol?: string;
  /** Hears of what belongs to no command. */
  readonly log?: Logger;
  readonly clock?: Clock;
  /** States and counters of the runtime, and what it writes outside of commands. */
  readonly onEvent?: (event: RuntimeEvent) => void;
  /** Each frame in server mode. */
  readonly onFrame?: (frame: TracedFrame) => void;
}

export type RuntimeEvent =
  | { readonly kind: 'state'; readonly name: string; readonly value: Json }
  | { readonly kind: 'counter'; readonly name: string; readonly value: number }
  /** Output of no known command, or the runtime's own stderr in server mode (then `pid` is null). */
  | {
      readonly kind: 'output';
      readonly pid: bigint | null;
      readonly stream: 'stdout' | 'stderr';
      readonly chunk: Uint8Array;
    };

export interface DeployRequest {
  /** Paths inside the runtime to how they are to be provided. */
  readonly volumes?: Readonly<Record<string, Json>>;
  readonly hostname?: string;
}

export interface RunRequest {
  readonly entryPoint: string;
  readonly args?: readonly string[];
}

export class RuntimeSupervisor implements AsyncDisposable {
  readonly runtime: string;
  readonly workDir: string;
  readonly limits: SupervisorLimits;
  readonly #options: SupervisorOptions;
  readonly #clock: Clock;
  readonly #env: Readonly<Record<string, string>>;
  readonly #processes: ActivityProcesses;
  readonly #usage: UsageMeter;
  readonly #oneShots = new Set<OneShot>();
  #state: ActivityState = 'Initialized';
  #deployed: DeployOutput = { mode: 'command', volumes: [] };
  #volumes: VolumeTable;
  #session: ServerSession | null = null;
  /** The stateful step under way. */
  #busy: string | null = null;
  #closed: Promise<void> | null = null;

  /** Starts nothing yet. @throws MillraceError `invalid_argument` for a limit that is none. */
  constructor(options: SupervisorOptions) {
    this.#options = options;
    this.#clock = options.clock ?? systemClock;
    this.runtime = path.resolve(options.runtime);
    this.workDir = path.resolve(options.workDir);
    this.limits = checkLimits(options.limits);
    this.#env = runtimeEnvironment(process.env, options.env);
    this.#processes = new ActivityProcesses(this.#clock);
    this.#usage = new UsageMeter(this.#clock, this.workDir, () => this.#processes.roots);
    this.#volumes = new VolumeTable(this.workDir, []);
  }

  get state(): ActivityState {
    return this.#state;
  }

  /** `server` or `command`, as the last deploy said. */
  get mode(): DeployOutput['mode'] {
    return this.#deployed.mode;
  }

  /** As the last deploy said; kept after `terminate`. */
  get volumes(): VolumeTable {
    return this.#volumes;
  }

  /** What was used so far. */
  usage(): Promise<Usage> {
    return this.#usage.read();
  }

  /**
   * Sets up the work directory. A result with another exit code than 0 means that it failed.
   *
   * @throws MillraceError `failed_precondition` in another state or when the runtime says it failed, `data_loss` for
   * output that is not as it must be, `invalid_argument` for an image or a work directory that may not be; and as
   * {@link RunningCommand.result}.
   */
  deploy(
    request: DeployRequest = {},
    options: CommandOptions = {},
  ): Promise<CommandResult & { readonly volumes: readonly Volume[] }> {
    return this.#step('deploy', 'Initialized', async () => {
      await this.#checkPlaces();
      const words = [...this.#globalWords()];
      if (request.volumes) words.push('--volume-override', JSON.stringify(request.volumes));
      if (request.hostname !== undefined) words.push('--hostname', request.hostname);
      // What is parsed is not what is captured: a script may ask to keep less.
      const printed = new OutputCapture(CAPTURE_ALL, this.limits.maxFrameBytes);
      const result = await this.#runOneShot([...words, 'deploy', '--'], this.limits.deployMs, {
        ...options,
        capture: options.capture ?? { stdout: CAPTURE_ALL, stderr: CAPTURE_ALL },
        onOutput: (stream, chunk) => {
          if (stream === 'stdout') printed.push(chunk);
          options.onOutput?.(stream, chunk);
        },
      });
      if (result.exitCode !== 0) return { ...result, volumes: [] };
      const deployed = parseDeployOutput(Buffer.from(printed.result().bytes).toString('utf8'));
      this.#volumes = new VolumeTable(this.workDir, deployed.volumes);
      this.#deployed = deployed;
      this.#state = 'Deployed';
      return { ...result, volumes: deployed.volumes };
    });
  }

  /** Makes the runtime ready. @throws as {@link deploy}. */
  start(args: readonly string[] = [], options: CommandOptions = {}): Promise<CommandResult> {
    return this.#step('start', 'Deployed', async () => {
      const withCapture = {
        ...options,
        capture: options.capture ?? { stdout: CAPTURE_ALL, stderr: CAPTURE_ALL },
      };
      if (this.#deployed.mode === 'command') {
        const words = [...this.#globalWords(), 'start', '--', ...args];
        const result = await this.#runOneShot(words, this.limits.startMs, withCapture);
        if (result.exitCode === 0) this.#state = 'Ready';
        return result;
      }
      const session = await ServerSession.start({
        ...this.#invocation(),
        args: [...this.#globalWords(), 'start', ...args],
        processes: this.#processes,
        clock: this.#clock,
        limits: this.limits,
        protocol: this.#options.protocol ?? '0.1.0',
        command: withCapture,
        log: this.#options.log,
        onFrame: this.#options.onFrame,
        onRuntimeStatus: (event) => this.#onRuntimeStatus(event),
        onOutput: (pid, stream, chunk) => this.#options.onEvent?.({ kind: 'output', pid, stream, chunk }),
      });
      this.#session = session.session;
      this.#state = 'Ready';
      return session.result;
    });
  }

  /**
   * Starts a command; any number may run at the same time. Without `capture`, nothing of its output is kept.
   *
   * @throws MillraceError when it was not started.
   */
  async spawn(request: RunRequest, options: CommandOptions = {}): Promise<RunningCommand> {
    this.#expect('run', 'Ready');
    options.signal?.throwIfAborted();
    const { entryPoint, args = [] } = request;
    const name = entryPoint.split('/').filter(Boolean).at(-1);
    if (name === undefined || name === '..') {
      throw new MillraceError(
        'invalid_argument',
        `the entry point must name a program, got ${JSON.stringify(entryPoint)}`,
      );
    }
    const session = this.#session;
    if (session !== null) return session.spawn({ bin: entryPoint, args: [name, ...args] }, options);
    const words = [...this.#globalWords(), 'run', '--entrypoint', entryPoint, '--', ...args];
    return this.#spawnOneShot(words, this.limits.runMs, options);
  }

  /** {@link spawn}, to the end of the command. */
  async run(request: RunRequest, options: CommandOptions = {}): Promise<CommandResult> {
    return (await this.spawn(request, options)).result;
  }

  /**
   * Stops the runtime: Shutdown, the stop window, the end of its input, SIGTERM, SIGKILL. Running commands reject with
   * `canceled`. Afterwards nothing of it runs, and a new `deploy` may follow. Allowed in every state, also while a step is under way.
   */
  async terminate(): Promise<void> {
    if (this.#state === 'Terminated') return;
    await this.#stopAll(new MillraceError('canceled', 'the activity was terminated'));
    this.#state = 'Initialized';
  }

  /** {@link terminate}, for good. Harmless when repeated. */
  close(): Promise<void> {
    this.#closed ??= (async () => {
      await this.#stopAll(new MillraceError('canceled', 'the supervisor was closed'));
      await this.#processes.close();
      this.#state = 'Terminated';
      this.#usage.close();
    })();
    return this.#closed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** SIGKILL to everything at once; what waits for it then fails. {@link close} is still to be called. */
  async kill(): Promise<void> {
    await this.#processes.end(0);
  }

  async #stopAll(reason: MillraceError): Promise<void> {
    const session = this.#session;
    this.#session = null;
    for (const oneShot of this.#oneShots) oneShot.stop(reason);
    await session?.stop(reason);
    await this.#processes.end(this.limits.killGraceMs);
  }

  async #step<T>(name: 'deploy' | 'start', from: ActivityState, work: () => Promise<T>): Promise<T> {
    this.#expect(name, from);
    this.#busy = name;
    try {
      return await work();
    } finally {
      this.#busy = null;
    }
  }

  #expect(command: string, state: ActivityState): void {
    if (this.#busy !== null) throw refused(`Busy with ${this.#busy}`);
    if (this.#closed !== null) throw refused('the supervisor is closed');
    if (this.#state === state) return;
    switch (this.#state) {
      case 'Initialized':
        throw refused('Activity is initialized - deploy() command is expected now');
      case 'Deployed':
        throw refused('Activity is deployed - start() command is expected now');
      case 'Ready':
        throw refused(`Cannot send ${command}() after a successful start()`);
      case 'Terminated':
        throw refused('the supervisor is closed');
    }
  }

  /** The options that every subcommand but test and offer-template is given, in the order of the field. */
  *#globalWords(): Generator<string> {
    const { taskPackage, hardware = {}, runtimeArgs = [] } = this.#options;
    yield* ['--workdir', this.workDir];
    if (taskPackage !== undefined) yield* ['--task-package', path.resolve(taskPackage)];
    if (hardware.cpuCores !== undefined) yield* ['--cpu-cores', String(Math.trunc(hardware.cpuCores))];
    if (hardware.memGib !== undefined) yield* ['--mem-gib', String(hardware.memGib)];
    if (hardware.storageGib !== undefined) yield* ['--storage-gib', String(hardware.storageGib)];
    yield* runtimeArgs;
  }

  /** Here and not by the runtime, which would say less of what is wrong with them. */
  async #checkPlaces(): Promise<void> {
    const { taskPackage } = this.#options;
    if (taskPackage !== undefined) checkTaskPackage(path.resolve(taskPackage));
    await mkdir(this.workDir, { recursive: true }).catch((error: unknown) => {
      throw new MillraceError('invalid_argument', `work directory ${this.workDir} cannot be made`, {
        cause: error,
      });
    });
  }

  #invocation(): {
    readonly file: string;
    readonly cwd: string;
    readonly env: Readonly<Record<string, string>>;
  } {
    return { file: this.runtime, cwd: this.workDir, env: this.#env };
  }

  async #runOneShot(
    args: readonly string[],
    timeoutMs: number,
    options: CommandOptions,
  ): Promise<CommandResult> {
    options.signal?.throwIfAborted();
    return (await this.#spawnOneShot(args, timeoutMs, options)).result;
  }

  async #spawnOneShot(
    args: readonly string[],
    timeoutMs: number,
    options: CommandOptions,
  ): Promise<RunningCommand> {
    const { signal, capture, onOutput } = options;
    const captures = openCaptures(capture, this.limits.captureBytes);
    const oneShot = await startOneShot(this.#processes, this.#clock, {
      ...this.#invocation(),
      args,
      timeoutMs,
      graceMs: this.limits.killGraceMs,
      outputBytes: this.limits.outputBytes,
      onOutput: (stream, chunk) => {
        captures[stream].push(chunk);
        onOutput?.(stream, chunk);
      },
    });
    this.#oneShots.add(oneShot);
    const onAbort = (): void => oneShot.stop(signal?.reason);
    signal?.addEventListener('abort', onAbort, { once: true });
    if (signal?.aborted) onAbort();
    const result = oneShot.ended
      .then((exit) => finished(exit, captures))
      .finally(() => {
        this.#oneShots.delete(oneShot);
        signal?.removeEventListener('abort', onAbort);
      });
    // Whoever awaits it hears of it.
    result.catch(() => undefined);
    return {
      pid: null,
      result,
      kill: async (number) => oneShot.process.signal(number),
    };
  }

  #onRuntimeStatus({ kind }: RuntimeStatusEvent): void {
    if (kind.case === 'counter') {
      const { name, value } = kind.value;
      if (this.#usage.setCustom(name, value)) this.#options.onEvent?.({ kind: 'counter', name, value });
      else this.#options.log?.debug('ignored a counter of a runtime', { name });
    } else if (kind.case === 'state') {
      const { name, value } = kind.value;
      let parsed: Json = null;
      try {
        parsed = JSON.parse(Buffer.from(value).toString('utf8')) as Json;
      } catch {
        this.#options.log?.warn('the state of a runtime is not JSON', { name });
      }
      this.#options.onEvent?.({ kind: 'state', name, value: parsed });
    }
  }
}

function finished(exit: ProcessExit, captures: Captures): CommandResult {
  return {
    exitCode: exit.code ?? -1,
    stdout: captures.stdout.result(),
    stderr: captures.stderr.result(),
  };
}

/** @throws MillraceError `invalid_argument` when there is nothing. What it must hold, the runtime says. */
export function checkTaskPackage(file: string): void {
  try {
    accessSync(file);
  } catch (error) {
    throw new MillraceError('invalid_argument', `task package ${file} does not exist or cannot be reached`, {
      cause: error,
    });
  }
}

function refused(rule: string): MillraceError {
  return new MillraceError('failed_precondition', rule);
}
