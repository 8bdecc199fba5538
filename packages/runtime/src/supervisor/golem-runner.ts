/**
 * A Golem runtime as a runner: a task's `meta.exe_script` is run in a runtime of its own, in a work directory of its own.
 *
 * After deploy the task's inputs are files in a volume; after the script, and after the runtime is gone, the files of
 * another volume become the task's artifacts. Scripts can also move files themselves, with `transfer` between
 * `container:/path`, `input:N` (or `input:CID`) and `output:path`.
 */
import { accessSync, constants, createReadStream, statSync } from 'node:fs';
import { mkdir, mkdtemp, realpath, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import {
  MillraceError,
  checkCapability,
  describeError,
  systemClock,
  type ByteStream,
  type Clock,
  type Json,
  type Logger,
  type Runner,
  type Timer,
  type TaskContext,
} from '@millrace/runner';
import { isObject } from '../sdk/canonical-json.ts';
import { descriptorArgs, findDescriptor } from './descriptor.ts';
import { parseExeScript, runScript, type ScriptCommand, type ScriptResult } from './exe-script.ts';
import { checkLimits, type SupervisorLimits } from './limits.ts';
import {
  RuntimeSupervisor,
  checkTaskPackage,
  type RuntimeEvent,
  type SupervisorOptions,
} from './runtime-supervisor.ts';
import { listVolume, openInVolume, writeToVolume, type VolumePlace, type VolumeTable } from './volumes.ts';

export interface GolemRunnerOptions {
  /** The binary, with a name for the capability (default: the file's, without extension), or a descriptor by name. */
  readonly runtime:
    | { readonly path: string; readonly name?: string }
    | { readonly descriptor: string; readonly dirs?: readonly string[] };
  /** Default `/golem/<runtime>/v1`. */
  readonly capability?: string;
  /**
   * An image handed to the runtime, unless its descriptor says that it brings its own. Default: the input that a task names in
   * `meta.task_package`, if it does.
   */
  readonly taskPackage?: string;
  /** Caps handed to the runtime; with a descriptor, only when it manages its hardware. */
  readonly hardware?: SupervisorOptions['hardware'];
  /** Words put before the subcommand, after those of the descriptor. */
  readonly runtimeArgs?: readonly string[];
  /** Variables granted beyond the harmless ones. */
  readonly env?: Readonly<Record<string, string>>;
  readonly limits?: Partial<SupervisorLimits & GolemTaskLimits>;
  /** Tasks' work directories are made in here. Default: the system's folder for temporary files. */
  readonly workDir?: string;
  readonly log?: Logger;
  readonly clock?: Clock;
}

/** A breach fails the task and names limit and value. */
export interface GolemTaskLimits {
  /** Commands of a script. Default 1000. */
  readonly commands: number;
  /**
   * From the abort signal to SIGKILL of everything, for runtimes that end too slowly. Default 4 s, less than the grace a node
   * gives by default.
   */
  readonly abortMs: number;
  /** Output kept of all commands together, bytes. Default 64 MiB. */
  readonly capturedBytes: number;
  /** Files collected as artifacts. Default 1000. */
  readonly outputFiles: number;
  /** Bytes of all of them. Default 16 GiB. */
  readonly outputTotalBytes: number;
  /** Folders in folders. Default 32. */
  readonly outputDepth: number;
}

export const DEFAULT_GOLEM_TASK_LIMITS: GolemTaskLimits = {
  commands: 1_000,
  abortMs: 4_000,
  capturedBytes: 64 * 1024 * 1024,
  outputFiles: 1_000,
  outputTotalBytes: 16 * 1024 ** 3,
  outputDepth: 32,
};

/** The artifact with one result per command. */
const RESULTS = 'exe-results.json';
const INPUT_VOLUMES = ['/in', '/input'];
const OUTPUT_VOLUMES = ['/out', '/output'];

interface ResolvedRuntime {
  readonly name: string;
  readonly path: string;
  readonly managedImage: boolean;
  readonly managedHardware: boolean;
  readonly args: readonly string[];
}

/** What a task asks for. */
interface TaskRequest {
  readonly script: readonly ScriptCommand[];
  readonly inputVolume: string | null;
  readonly outputVolume: string | null;
  readonly inputNames: readonly string[];
  /** The input that is the runtime's image. */
  readonly image: string | null;
}

/**
 * Makes the runner. A task's `meta` has `exe_script` (the commands), and may have `input_volume` and `output_volume` (paths inside the
 * runtime; default `/in` or `/input`, `/out` or `/output`, where there is one) and `input_names` (file names, in the order
 * of the inputs; default their stored names). Where the node fixes no image, `task_package` may name the input that is the
 * image, as `input:0` or `input:CID`; that one does not appear in the volume.
 *
 * Each command's events and result are events of the task, the results are also its artifact `exe-results.json`. The first
 * command that fails fails the task. Cancelling kills the command, then the runtime; `run` rejects when nothing of it is left.
 *
 * @throws MillraceError `not_found` or `failed_precondition` for a runtime that cannot be run, `invalid_argument` for an option or a
 * `taskPackage` that is not there.
 */
export function golemRunner(options: GolemRunnerOptions): Runner {
  const runtime = resolveRuntime(options);
  if (options.taskPackage !== undefined) checkTaskPackage(path.resolve(options.taskPackage));
  const { commands, abortMs, capturedBytes, outputFiles, outputTotalBytes, outputDepth, ...rest } = {
    ...DEFAULT_GOLEM_TASK_LIMITS,
    ...options.limits,
  };
  const taskLimits: GolemTaskLimits = {
    commands,
    abortMs,
    capturedBytes,
    outputFiles,
    outputTotalBytes,
    outputDepth,
  };
  checkLimits({ ...rest, ...(taskLimits as Partial<SupervisorLimits>) });
  const capability = options.capability ?? `/golem/${runtime.name}/v1`;
  checkCapability(capability);
  return {
    capability,
    type: 'runtime',
    run: (ctx) => new GolemTask(ctx, runtime, options, rest, taskLimits).run(),
  };
}

class GolemTask {
  readonly #ctx: TaskContext;
  readonly #runtime: ResolvedRuntime;
  readonly #options: GolemRunnerOptions;
  readonly #limits: Partial<SupervisorLimits>;
  readonly #taskLimits: GolemTaskLimits;
  readonly #clock: Clock;

  constructor(
    ctx: TaskContext,
    runtime: ResolvedRuntime,
    options: GolemRunnerOptions,
    limits: Partial<SupervisorLimits>,
    taskLimits: GolemTaskLimits,
  ) {
    this.#ctx = ctx;
    this.#runtime = runtime;
    this.#options = options;
    this.#limits = limits;
    this.#taskLimits = taskLimits;
    this.#clock = options.clock ?? systemClock;
  }

  async run(): Promise<void> {
    const { signal } = this.#ctx;
    signal.throwIfAborted();
    const request = parseRequest(this.#ctx.lease.task, this.#taskLimits.commands);
    const parent = path.resolve(this.#options.workDir ?? tmpdir());
    await mkdir(parent, { recursive: true });
    const workDir = await realpath(await mkdtemp(path.join(parent, 'golem-')));
    try {
      await this.#runIn(workDir, request);
    } finally {
      await rm(workDir, { recursive: true, force: true, maxRetries: 3 });
    }
  }

  async #runIn(workDir: string, request: TaskRequest): Promise<void> {
    const { signal, output } = this.#ctx;
    const made = this.#supervisor(workDir, await this.#image(request));
    // Before the supervisor, so that it still watches while that closes.
    using _killer = this.#killAfterAbort(made);
    await using supervisor = made;
    const results = await this.#runScript(supervisor, request);
    const usage = await supervisor.usage();
    this.#tell({ type: 'exe_usage', usage: { ...usage } });
    await this.#ctx.ctrl.usage?.({
      cpu_ms: Math.round((usage['golem.usage.cpu_sec'] ?? 0) * 1000),
      peak_memory_bytes: Math.round((usage['golem.usage.gib'] ?? 0) * 1024 ** 3),
    });
    // Nothing writes any more while the outputs are read.
    await supervisor.close();
    signal.throwIfAborted();
    const failed = results.find(({ result }) => result === 'Error');
    if (failed) throw commandFailed(request.script[failed.index]!, failed);
    await this.#collect(supervisor.volumes, request);
    await output.putBytes(RESULTS, Buffer.from(`${JSON.stringify(results, null, 2)}\n`));
  }

  #killAfterAbort(supervisor: RuntimeSupervisor): Disposable {
    const { signal, log } = this.#ctx;
    let timer: Timer | null = null;
    const onAbort = (): void => {
      timer = this.#clock.setTimer(() => {
        supervisor.kill().catch((error: unknown) => {
          log.error('a runtime could not be ended', { error: describeError(error) });
        });
      }, this.#taskLimits.abortMs);
    };
    signal.addEventListener('abort', onAbort, { once: true });
    return {
      [Symbol.dispose]: () => {
        signal.removeEventListener('abort', onAbort);
        timer?.cancel();
      },
    };
  }

  /** The file handed to the runtime as its image, if any. */
  async #image({ image }: TaskRequest): Promise<string | undefined> {
    const { taskPackage } = this.#options;
    if (image === null) return this.#runtime.managedImage ? undefined : taskPackage;
    if (taskPackage !== undefined || this.#runtime.managedImage) {
      throw new MillraceError(
        'invalid_argument',
        `meta.task_package must be left out: the node says what image ${this.#runtime.name} runs`,
      );
    }
    return await this.#ctx.input.materializeCidToTemp(image, { signal: this.#ctx.signal });
  }

  #supervisor(workDir: string, taskPackage: string | undefined): RuntimeSupervisor {
    const { hardware, env, log, runtimeArgs = [] } = this.#options;
    return new RuntimeSupervisor({
      runtime: this.#runtime.path,
      workDir,
      runtimeArgs: [...this.#runtime.args, ...runtimeArgs],
      limits: this.#limits,
      clock: this.#clock,
      onEvent: (event) => this.#onRuntimeEvent(event),
      ...(taskPackage === undefined ? {} : { taskPackage }),
      ...(hardware && this.#runtime.managedHardware ? { hardware } : {}),
      ...(env ? { env } : {}),
      ...(log ? { log } : {}),
    });
  }

  #runScript(supervisor: RuntimeSupervisor, request: TaskRequest): Promise<ScriptResult[]> {
    const { ctrl, signal, lease } = this.#ctx;
    const total = request.script.length;
    return runScript(request.script, {
      supervisor,
      clock: this.#clock,
      signal,
      capturedBytes: this.#taskLimits.capturedBytes,
      transfer: (from, to) => this.#transfer(supervisor.volumes, from, to),
      onDeployed: () => this.#placeInputs(supervisor.volumes, request),
      onEvent: ({ index, timestamp, kind }) =>
        this.#tell({ type: 'exe_event', batch_id: lease.task.id, index, timestamp, kind }),
      onResult: (result) => {
        // The output itself is in the artifact, and was told as it came where the script wanted it.
        const { stdout: _stdout, stderr: _stderr, ...told } = result;
        this.#tell({ type: 'exe_result', ...told });
        void ctrl.progress({ done: result.index + 1, total, unit: 'commands' }).catch(() => undefined);
      },
    });
  }

  #onRuntimeEvent(event: RuntimeEvent): void {
    switch (event.kind) {
      case 'state':
        this.#tell({ type: 'exe_state', name: event.name, value: event.value });
        break;
      case 'counter':
        this.#tell({ type: 'exe_counter', name: event.name, value: event.value });
        break;
      case 'output':
        this.#ctx.log.info('output of the runtime', {
          stream: event.stream,
          text: Buffer.from(event.chunk).toString('utf8').trimEnd(),
        });
        break;
    }
  }

  /** The port drops and counts what is too much; a task that has ended wants no more events. */
  #tell(event: { [key: string]: Json }): void {
    void this.#ctx.ctrl.logEvent(event).catch(() => undefined);
  }

  async #placeInputs(volumes: VolumeTable, request: TaskRequest): Promise<void> {
    const cids = this.#ctx.lease.task.inputs_cids;
    if (cids.every((cid) => cid === request.image)) return;
    const folder = request.inputVolume ?? defaultVolume(volumes, INPUT_VOLUMES);
    if (folder === null) {
      this.#ctx.log.info('the runtime has no input volume; its script must transfer the inputs', {});
      return;
    }
    const place = volumes.locate(folder);
    const taken = new Set<string>();
    for (const [index, cid] of cids.entries()) {
      if (cid === request.image) continue;
      const input = await this.#ctx.input.materializeCidWithMeta(cid, { signal: this.#ctx.signal });
      const wanted = request.inputNames[index] ?? input.name ?? path.basename(input.path);
      const name = freeName(wanted, index, taken);
      const file = { root: place.root, components: [...place.components, name] };
      await writeToVolume(file, createReadStream(input.path), this.#ctx.signal);
    }
  }

  async #collect(volumes: VolumeTable, request: TaskRequest): Promise<void> {
    const folder = request.outputVolume ?? defaultVolume(volumes, OUTPUT_VOLUMES);
    if (folder === null) return;
    const place = volumes.locate(folder);
    const { outputFiles, outputTotalBytes, outputDepth } = this.#taskLimits;
    let files = 0;
    let bytes = 0;
    for await (const entry of listVolume(place, outputDepth)) {
      if (entry.kind === 'other') {
        this.#ctx.log.warn('an output is no regular file and was left out', { path: entry.relPath });
        continue;
      }
      files += 1;
      bytes += entry.size;
      checkLimit('outputFiles', files, outputFiles, 'files');
      checkLimit('outputTotalBytes', bytes, outputTotalBytes, 'bytes');
      await this.#put(place, entry.relPath.split('/'), entry.relPath);
    }
  }

  async #put(place: VolumePlace, components: readonly string[], relPath: string): Promise<void> {
    const handle = await openInVolume({ root: place.root, components: [...place.components, ...components] });
    try {
      await this.#ctx.output.putStream(relPath, handle.createReadStream({ autoClose: false }));
    } finally {
      await handle.close();
    }
  }

  async #transfer(volumes: VolumeTable, from: string, to: string): Promise<void> {
    const target = parseUrl(to, 'to');
    if (target.scheme === 'container') {
      const place = volumes.locate(target.rest);
      await this.#read(volumes, from, (stream) => writeToVolume(place, stream, this.#ctx.signal));
    } else if (target.scheme === 'output') {
      await this.#read(volumes, from, (stream) => this.#ctx.output.putStream(target.rest, stream));
    } else {
      throw new MillraceError(
        'unimplemented',
        `transfer to ${target.scheme}: is not offered; use container: or output:`,
      );
    }
  }

  async #read(volumes: VolumeTable, from: string, use: (stream: ByteStream) => Promise<void>): Promise<void> {
    const source = parseUrl(from, 'from');
    const { input, lease, signal } = this.#ctx;
    switch (source.scheme) {
      case 'container': {
        const handle = await openInVolume(volumes.locate(source.rest));
        try {
          await use(handle.createReadStream({ autoClose: false }));
        } finally {
          await handle.close();
        }
        return;
      }
      case 'input': {
        const cid = /^\d+$/.test(source.rest) ? lease.task.inputs_cids[Number(source.rest)] : source.rest;
        if (cid === undefined) {
          throw new MillraceError(
            'not_found',
            `${from}: the task has ${lease.task.inputs_cids.length} inputs`,
          );
        }
        await use(await input.openRead(cid, { signal }));
        return;
      }
      case 'http':
      case 'https':
        // The port refuses what is not the task's own storage.
        await use(await input.openRead(from, { signal }));
        return;
      default:
        throw new MillraceError(
          'unimplemented',
          `transfer from ${source.scheme}: is not offered; use container:, input:, or a URL of the domain server`,
        );
    }
  }
}

function resolveRuntime(options: GolemRunnerOptions): ResolvedRuntime {
  const { runtime } = options;
  let resolved: ResolvedRuntime;
  if ('path' in runtime) {
    const file = path.resolve(runtime.path);
    const name = runtime.name ?? path.parse(file).name;
    resolved = { name, path: file, managedImage: false, managedHardware: true, args: [] };
  } else {
    const descriptor = findDescriptor(runtime.descriptor, runtime.dirs ? { dirs: runtime.dirs } : {});
    if (descriptor.runtimePath === null) {
      throw new MillraceError(
        'failed_precondition',
        `descriptor ${descriptor.name} in ${descriptor.file} has no runtime-path; only its own supervisor can run it`,
      );
    }
    const { managedImage, managedHardware, runtimeArgs, unknown } = descriptorArgs(descriptor);
    if (unknown.length > 0) {
      options.log?.warn('a descriptor has arguments that mean nothing here', {
        descriptor: descriptor.name,
        words: [...unknown],
      });
    }
    resolved = {
      name: descriptor.name,
      path: descriptor.runtimePath,
      managedImage,
      managedHardware,
      args: runtimeArgs,
    };
  }
  try {
    accessSync(resolved.path, constants.X_OK);
  } catch (error) {
    const missing = (error as NodeJS.ErrnoException).code === 'ENOENT';
    throw new MillraceError(
      missing ? 'not_found' : 'failed_precondition',
      `runtime ${resolved.path} ${missing ? 'does not exist' : 'is not executable; run chmod +x on it'}`,
      { cause: error },
    );
  }
  if (!statSync(resolved.path).isFile()) {
    throw new MillraceError('failed_precondition', `runtime ${resolved.path} is not a file, so no program`);
  }
  return resolved;
}

function parseRequest(
  { meta, inputs_cids: inputs }: { readonly meta: Json; readonly inputs_cids: readonly string[] },
  maxCommands: number,
): TaskRequest {
  const value = isObject(meta) ? meta : {};
  if (value.exe_script === undefined) {
    throw new MillraceError('invalid_argument', 'meta.exe_script is missing: the array of commands to run');
  }
  const volume = (member: string): string | null => {
    const given = value[member];
    if (given === undefined || given === null) return null;
    if (typeof given === 'string') return given;
    throw new MillraceError(
      'invalid_argument',
      `meta.${member} must be a path, got ${JSON.stringify(given)}`,
    );
  };
  const names = value.input_names ?? [];
  if (!Array.isArray(names) || !names.every((name) => typeof name === 'string' && isFileName(name))) {
    throw new MillraceError('invalid_argument', 'meta.input_names must be an array of file names');
  }
  return {
    script: parseExeScript(value.exe_script, maxCommands),
    inputVolume: volume('input_volume'),
    outputVolume: volume('output_volume'),
    inputNames: names as string[],
    image: parseImage(value.task_package, inputs),
  };
}

/** The input's CID. */
function parseImage(given: Json | undefined, inputs: readonly string[]): string | null {
  if (given === undefined || given === null) return null;
  const [, rest] = /^input:(.+)$/.exec(typeof given === 'string' ? given : '') ?? [];
  const cid = rest !== undefined && /^\d+$/.test(rest) ? inputs[Number(rest)] : rest;
  if (cid !== undefined && inputs.includes(cid)) return cid;
  throw new MillraceError(
    'invalid_argument',
    `meta.task_package must be one of the task's ${inputs.length} inputs, such as input:0, got ${JSON.stringify(given)}`,
  );
}

function isFileName(name: string): boolean {
  return /^[^/\\\p{Cc}]{1,200}$/u.test(name) && name !== '.' && name !== '..';
}

/** The name, when it can name a file and no other input has it; else one with the input's number. */
function freeName(wanted: string, index: number, taken: Set<string>): string {
  let name = isFileName(wanted) ? wanted : `input-${index}`;
  if (taken.has(name)) name = `${index}-${name}`;
  taken.add(name);
  return name;
}

function defaultVolume(volumes: VolumeTable, names: readonly string[]): string | null {
  const paths = volumes.volumes.map((volume) => volume.path);
  return names.find((name) => paths.includes(name)) ?? null;
}

function parseUrl(url: string, member: string): { readonly scheme: string; readonly rest: string } {
  const [, scheme, rest] = /^([a-z][a-z0-9+.-]*):(.+)$/i.exec(url) ?? [];
  if (scheme === undefined || rest === undefined) {
    throw new MillraceError(
      'invalid_argument',
      `transfer ${member} must be a URL such as container:/in/file, got ${JSON.stringify(url)}`,
    );
  }
  return { scheme: scheme.toLowerCase(), rest };
}

function checkLimit(limit: string, value: number, most: number, unit: string): void {
  if (value <= most) return;
  throw new MillraceError(
    'resource_exhausted',
    `the outputs have ${value} or more ${unit}, above the limit ${limit} of ${most}`,
    { details: { limit, value: most } },
  );
}

function commandFailed(command: ScriptCommand, result: ScriptResult): MillraceError {
  const what = command.kind === 'run' ? `run ${command.entryPoint}` : command.kind;
  const { stderr } = result;
  const tail = typeof stderr === 'string' ? `: ${stderr.trim().slice(-500)}` : '';
  return new MillraceError(
    'failed_precondition',
    `exe_script command ${result.index} (${what}): ${result.message}${tail}`,
  );
}
