/** One attempt: a folder, inputs, a container, its ending, its proven removal, outputs, and nothing left behind. */
import { randomBytes } from 'node:crypto';
import { chmod, readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { MillraceError, TaskAbort, describeError, sleep, timeoutSignal } from '@millrace/runner';
import type { Clock, JsonObject, Logger, TaskContext } from '@millrace/runner';
import type { LaunchFolders } from '../sandbox/launch.ts';
import { fillArguments } from '../subprocess/arguments.ts';
import type { ArgumentTemplate } from '../subprocess/arguments.ts';
import { abortOf, kernelOomKills } from '../subprocess/attempt.ts';
import { diskUsage } from '../subprocess/disk-usage.ts';
import { normalExit } from '../subprocess/ending.ts';
import type { NormalExit } from '../subprocess/ending.ts';
import { traceContext } from '../subprocess/environment.ts';
import { EventsChannel } from '../subprocess/events-channel.ts';
import { placeInputs } from '../subprocess/inputs.ts';
import { OutputLines } from '../subprocess/output-lines.ts';
import { collectOutputs } from '../subprocess/outputs.ts';
import type { OutputPattern } from '../subprocess/outputs.ts';
import { createTaskFolder, removeFolder } from '../subprocess/task-folder.ts';
import { tellUsage } from '../subprocess/tell-usage.ts';
import { INSIDE, containerConfig } from './config.ts';
import { short } from './engine.ts';
import type { ContainerConfig, ContainerEngine, EngineInfo, EngineVersion, ImageInfo } from './engine.ts';
import { EventsPipe } from './events-pipe.ts';
import type { ImageReference } from './image-reference.ts';
import type { ContainerLimits } from './limits.ts';
import { ContainerMeter } from './meter.ts';
import type { MeterReading } from './meter.ts';
import { LABELS, ownerLabels } from './owner.ts';
import type { Owner } from './owner.ts';
import { REMOVE_MS, proveRemoved } from './removal.ts';
import type { SharedEngine } from './shared-engine.ts';
import { engineLost, verdict } from './verdict.ts';
import type { StopCause } from './verdict.ts';

/** What a task comes to, everything checked. */
export interface ContainerPlan {
  readonly image: ImageReference;
  /** Instead of the image's entry point; null for that. */
  readonly command: readonly ArgumentTemplate[] | null;
  /** Instead of the image's command; null for that, or for none where `command` is given. */
  readonly args: readonly ArgumentTemplate[] | null;
  readonly operatorEnv: Readonly<Record<string, string>>;
  readonly taskEnv: Readonly<Record<string, string>>;
  /** Null: chosen so that the outputs are the node's to read, and never root of the machine. */
  readonly user: string | null;
  readonly workdir: string | null;
  readonly stopSignal: string;
  readonly network: boolean;
  readonly readOnlyRoot: boolean;
  readonly tmpfs: ReadonlyMap<string, number>;
  readonly inputs: readonly { readonly cid: string; readonly name: string | null }[];
  readonly outputs: readonly OutputPattern[];
  readonly limits: ContainerLimits;
  readonly failOnNonZero: boolean;
  /** Values for the arguments. */
  readonly meta: JsonObject;
}

/** What all attempts of a runner share. */
export interface ContainerWorld {
  readonly shared: SharedEngine;
  readonly owner: Owner;
  readonly clock: Clock;
  readonly log: Logger | undefined;
  readonly workDir: string;
}

/** How long what was printed is read on when the container is gone. */
const DRAIN_MS = 5_000;
const DISK_EVERY_MS = 1_000;
/** Looking at the disk takes at most this share of the time. */
const DISK_SHARE = 1 / 20;
/** An engine that stops answering without closing its connections is found out this often. */
const PING_EVERY_MS = 5_000;
/** An engine under load may be late, or refuse a connection, once or twice. */
const PINGS_LOST = 3;
/** From SIGKILL until the engine is no longer believed to tell of the end. */
const KILL_MS = 10_000;
const END_POLLS_MS = [0, 10, 20, 40, 80, 160, 320];
/** How long an engine that went away is given to come back, so that the container can be proven to be gone. */
const LOST_MS = 10_000;

/**
 * Performs it. Rejects with the task's verdict once the container is proven to be removed, and the folder is; when the engine is lost and
 * nothing can be proven, the error says so. What it used is told in every case.
 */
export async function runAttempt(
  ctx: TaskContext,
  plan: ContainerPlan,
  world: ContainerWorld,
): Promise<void> {
  const usage: UsageRecord = {
    reading: null,
    wallMs: null,
    bytesIn: 0,
    bytesOut: 0,
    exit: null,
    image: null,
    engine: null,
  };
  let folders: LaunchFolders | null = null;
  try {
    ctx.signal.throwIfAborted();
    const { version, info } = await world.shared.ready(ctx.signal);
    usage.engine = version;
    const image = await world.shared.findImage(plan.image, ctx.signal);
    usage.image = image;
    folders = await createTaskFolder(world.workDir);
    const placed = await placeInputs(ctx, folders.inputs, plan.inputs);
    usage.bytesIn = placed.bytes;
    await openToContainer(folders);
    ctx.signal.throwIfAborted();
    const attempt = new Attempt(ctx, plan, world, folders, usage);
    await attempt.run(image, info, placed.names);
    const collected = await collectOutputs(ctx, folders.outputs, plan.outputs, plan.limits);
    usage.bytesOut = collected.bytes;
  } finally {
    await tellUsage(ctx, usageOf(usage, plan)).catch((error: unknown) => {
      world.log?.warn('usage of a task could not be reported', { error: describeError(error) });
    });
    if (folders !== null) await removeFolder(folders.root, world.log);
  }
}

interface UsageRecord {
  reading: MeterReading | null;
  wallMs: number | null;
  bytesIn: number;
  bytesOut: number;
  exit: NormalExit | null;
  image: ImageInfo | null;
  engine: EngineVersion | null;
}

/** As that of a subprocess, and what was run on what. */
function usageOf({ reading, exit, image, engine, ...used }: UsageRecord, plan: ContainerPlan): JsonObject {
  const controls: Record<string, string> = {
    wall: 'watched',
    memory: 'engine',
    processes: 'engine',
    open_files: 'engine',
    disk: 'watched',
    kill: 'engine',
    privileges: 'engine',
    filesystem: 'engine',
    ...(plan.network ? {} : { network: 'engine' }),
  };
  return {
    peak_memory_bytes: reading?.peakBytes ?? null,
    cpu_ms: reading?.cpuMs == null ? null : Math.round(reading.cpuMs),
    wall_ms: used.wallMs === null ? null : Math.round(used.wallMs),
    bytes_in: used.bytesIn,
    bytes_out: used.bytesOut,
    exit_code: exit?.code ?? null,
    signal: exit?.signal ?? null,
    sandbox: {
      asked: { tier: 'container', controls: Object.keys(controls), required: Object.keys(controls) },
      applied: { tier: 'container', cgroup: true, controls },
      missing: [],
    },
    container: {
      image: plan.image.text,
      image_id: image?.id ?? null,
      engine: engine === null ? null : `${engine.name} ${engine.version}`,
    },
  };
}

/** The folder above is closed to everybody else on this machine, so inside the container's user may be anybody. */
async function openToContainer(folders: LaunchFolders): Promise<void> {
  await chmod(folders.outputs, 0o777);
  const open = async (folder: string): Promise<void> => {
    await chmod(folder, 0o755);
    for (const entry of await readdir(folder, { withFileTypes: true })) {
      const path = join(folder, entry.name);
      await (entry.isDirectory() ? open(path) : chmod(path, 0o644));
    }
  };
  await open(folders.inputs);
}

/** Whoever runs in the container when nobody else was named. */
function defaultUser({ rootless }: EngineInfo): string {
  // Root of a rootless engine's containers is the engine's own user.
  if (rootless) return '0:0';
  const uid = process.getuid?.() ?? 0;
  return uid === 0 ? '65534:65534' : `${uid}:${process.getgid?.() ?? uid}`;
}

/** The exit status; or why it was not to be learnt. */
interface End {
  readonly code: number | null;
  readonly error: unknown;
}

/** The part of an attempt in which a container exists. */
class Attempt {
  readonly #ctx: TaskContext;
  readonly #plan: ContainerPlan;
  readonly #world: ContainerWorld;
  readonly #engine: ContainerEngine;
  readonly #folders: LaunchFolders;
  readonly #usage: UsageRecord;
  readonly #name = `millrace-${randomBytes(10).toString('hex')}`;
  #cause: StopCause | null = null;

  constructor(
    ctx: TaskContext,
    plan: ContainerPlan,
    world: ContainerWorld,
    folders: LaunchFolders,
    usage: UsageRecord,
  ) {
    this.#ctx = ctx;
    this.#plan = plan;
    this.#world = world;
    this.#engine = world.shared.engine;
    this.#folders = folders;
    this.#usage = usage;
  }

  /** Resolves when the program did its work and the container is gone. */
  async run(image: ImageInfo, info: EngineInfo, inputNames: readonly string[]): Promise<void> {
    const { limits } = this.#plan;
    const log = this.#ctx.log;
    const events = new EventsChannel({
      limitBytes: limits.eventBytes,
      announced: false,
      name: 'MILLRACE_EVENTS',
      ctrl: this.#ctx.ctrl,
      log,
    });
    const lines = new OutputLines(limits.logBytes, log);
    const pipePath = join(this.#folders.root, 'events');
    const config = this.#config(image, info, inputNames, pipePath);
    const pipe = await EventsPipe.open(pipePath, (bytes) => events.write(bytes));
    const problem = await this.#contain(config, lines).catch((error: unknown) => error);
    const unproven = await this.#remove(MillraceError.is(problem) && problem.code === 'unavailable');
    using drained = timeoutSignal(this.#world.clock, DRAIN_MS, () => 'late');
    await pipe.end(drained.signal);
    lines.end();
    events.end();
    if (unproven !== null) throw this.#notProven(problem, unproven);
    if (problem !== null) throw problem;
  }

  #config(
    image: ImageInfo,
    info: EngineInfo,
    inputNames: readonly string[],
    events: string,
  ): ContainerConfig {
    const plan = this.#plan;
    const { task } = this.#ctx.lease;
    const values = {
      inputs: new Map(inputNames.map((name) => [name, `${INSIDE.inputs}/${name}`])),
      outputDir: INSIDE.outputs,
      workDir: plan.workdir ?? image.workdir,
      meta: plan.meta,
    };
    return containerConfig({
      imageId: image.id,
      volumes: image.volumes,
      command: plan.command === null ? null : fillArguments(plan.command, values),
      args: plan.args === null ? null : fillArguments(plan.args, values),
      env: {
        ...traceContext(this.#ctx.lease, plan.meta),
        ...plan.taskEnv,
        ...plan.operatorEnv,
        MILLRACE_RUN_ID: this.#name,
        MILLRACE_TASK_ID: task.id,
        ...(task.job_id === null ? {} : { MILLRACE_JOB_ID: task.job_id }),
        MILLRACE_INPUTS: INSIDE.inputs,
        MILLRACE_OUTPUTS: INSIDE.outputs,
        MILLRACE_EVENTS: INSIDE.events,
      },
      labels: {
        ...ownerLabels(this.#world.owner),
        [LABELS.task]: task.id,
        // The wire's leases have no id of their own; node, task and attempt name one.
        [LABELS.lease]: `${task.id}/${task.attempts ?? 0}`,
        [LABELS.capability]: task.capability,
      },
      user: plan.user ?? defaultUser(info),
      workdir: plan.workdir,
      stopSignal: plan.stopSignal,
      network: plan.network,
      readOnlyRoot: plan.readOnlyRoot,
      tmpfs: plan.tmpfs,
      limits: plan.limits,
      folders: { inputs: this.#folders.inputs, outputs: this.#folders.outputs, events },
    });
  }

  /**
   * From creation to the end of the program; what the task is to reject with, or null.
   *
   * Creating and starting do not listen to the task's signal: an engine that is interrupted in the middle may go on by itself.
   */
  async #contain(config: ContainerConfig, lines: OutputLines): Promise<unknown> {
    const { clock } = this.#world;
    const engine = this.#engine;
    const kernelBefore = kernelOomKills();
    const id = await engine.createContainer(this.#name, config);
    // Podman prepares the program when it is attached to, so that may fail as starting it does.
    using output = await this.#starting(engine.attach(id));
    const printed = pump(output, lines);
    this.#ctx.signal.throwIfAborted();
    const startedAt = clock.monotonic();
    await this.#starting(engine.startContainer(id));

    const meter = new ContainerMeter(engine, id, clock);
    const code = await this.#supervise(id, meter, printed);
    const exit = code === null ? null : normalExit({ code, signal: null }, true);
    const reading = meter.read();
    Object.assign(this.#usage, { reading, wallMs: clock.monotonic() - startedAt, exit });
    const missed = await within(clock, DRAIN_MS, printed);
    if (missed && this.#cause === null)
      this.#ctx.log.warn('the end of the output may be missing: the engine did not close it', {});
    const { failOnNonZero, image, limits } = this.#plan;
    return verdict({
      image: image.text,
      cause: this.#cause,
      exit,
      limits,
      oomKilled: exit?.code !== 0 && (await this.#oomKilled(id)),
      groupOutOfMemory: reading.outOfMemory,
      kernelKills: reading.local ? kernelOomKills() - kernelBefore : null,
      peakBytes: reading.peakBytes,
      processesRefused: reading.processesRefused,
      failOnNonZero,
      lastWords: lines.lastWords(),
    });
  }

  /**
   * @throws MillraceError with `ending` `spawn_failed`, where the engine's words say why the program cannot be started, or `lost` when the engine
   * went away
   */
  async #starting<T>(call: Promise<T>): Promise<T> {
    try {
      return await call;
    } catch (error) {
      if (!MillraceError.is(error)) throw error;
      if (error.code === 'unavailable' || error.code === 'deadline_exceeded')
        throw engineLost(this.#plan.image.text, error);
      const absent = /exec: ".*(executable file not found|no such file or directory)/is.test(error.message);
      throw new MillraceError(
        absent ? 'not_found' : 'failed_precondition',
        `${this.#plan.image.text} cannot be started${absent ? ', the image does not have the program' : ''}: ${error.message}`,
        { cause: error, details: { ending: 'spawn_failed', image: this.#plan.image.text } },
      );
    }
  }

  /** From start to end, asked for or not. The exit status, or null when it was not to be learnt. */
  async #supervise(id: string, meter: ContainerMeter, printed: Promise<void>): Promise<number | null> {
    const { clock } = this.#world;
    const { signal } = this.#ctx;
    const { limits } = this.#plan;
    const done = new AbortController();
    const waited = this.#engine.waitContainer(id, { signal: done.signal }).then(
      (code): End => ({ code, error: null }),
      (error: unknown): End => ({ code: null, error }),
    );
    const exited = Promise.race([waited, this.#seeEnd(id, printed, waited, done.signal)]);
    let giveUp: (error: unknown) => void = () => undefined;
    const givenUp = new Promise<End>((resolve) => {
      giveUp = (error): void => resolve({ code: null, error });
    });
    const stops: Promise<void>[] = [];
    const stop = (cause: StopCause, graceMs: number): void => {
      if (this.#cause !== null) return;
      this.#cause = cause;
      stops.push(this.#stop(id, graceMs, exited, done.signal).catch(giveUp));
    };
    const onAbort = (): void => stop({ kind: 'abort', abort: abortOf(signal) }, limits.graceMs);
    const wall = clock.setTimer(
      () =>
        stop({ kind: 'limit', limit: 'wallMs', value: limits.wallMs, used: limits.wallMs }, limits.graceMs),
      limits.wallMs,
    );
    const watches = [
      meter.watch(done.signal),
      this.#watchDisk(
        (used) => stop({ kind: 'limit', limit: 'diskBytes', value: limits.diskBytes, used }, 0),
        done.signal,
      ),
      this.#watchEngine(giveUp, done.signal),
    ];
    if (signal.aborted) onAbort();
    else signal.addEventListener('abort', onAbort, { once: true });

    const ended = await Promise.race([exited, givenUp]);
    // Before anything is waited for: the control group is gone within milliseconds.
    meter.read();
    done.abort(new MillraceError('canceled', 'the container has ended'));
    signal.removeEventListener('abort', onAbort);
    wall.cancel();
    await Promise.all([...watches, ...stops]);
    if (ended.error !== null) this.#cause ??= { kind: 'lost', error: ended.error };
    return ended.code;
  }

  /** Podman's wait tells of the end half a second late; a look at the container, once its output has ended, tells at once. */
  async #seeEnd(id: string, printed: Promise<void>, waited: Promise<End>, done: AbortSignal): Promise<End> {
    await printed;
    for (const ms of END_POLLS_MS) {
      if (!(await pause(this.#world.clock, ms, done))) break;
      const state = await this.#engine.inspectContainer(id, { signal: done }).catch(() => null);
      if (state?.status === 'exited') return { code: state.exitCode, error: null };
    }
    // It has closed its output and runs on, or the engine is gone.
    return await waited;
  }

  /**
   * Asks, waits for the grace, and then does not ask any more. Resolves when the container has ended; rejects when the engine does not
   * tell of that.
   */
  async #stop(id: string, graceMs: number, exited: Promise<unknown>, done: AbortSignal): Promise<void> {
    const { clock } = this.#world;
    if (graceMs > 0) {
      await this.#engine.signalContainer(id, this.#plan.stopSignal);
      if (!(await within(clock, graceMs, exited))) return;
    }
    await this.#engine.signalContainer(id, 'SIGKILL');
    if (!(await within(clock, KILL_MS, exited)) || done.aborted) return;
    throw new MillraceError(
      'unavailable',
      `the engine does not tell of the end of container ${short(id)} ${KILL_MS} ms after SIGKILL`,
    );
  }

  async #watchDisk(onBreach: (used: number) => void, done: AbortSignal): Promise<void> {
    const { clock } = this.#world;
    const { diskBytes } = this.#plan.limits;
    for (let pauseMs = DISK_EVERY_MS; await pause(clock, pauseMs, done);) {
      const startedAt = clock.monotonic();
      const used = await diskUsage([this.#folders.outputs], diskBytes);
      if (used > diskBytes) onBreach(used);
      pauseMs = Math.max(DISK_EVERY_MS, (clock.monotonic() - startedAt) / DISK_SHARE);
    }
  }

  async #watchEngine(onLost: (error: unknown) => void, done: AbortSignal): Promise<void> {
    for (let failures = 0; await pause(this.#world.clock, PING_EVERY_MS, done);) {
      try {
        await this.#engine.ping({ signal: done });
        failures = 0;
      } catch (error) {
        if (done.aborted) return;
        failures += 1;
        if (failures === PINGS_LOST) {
          onLost(error);
          return;
        }
      }
    }
  }

  async #oomKilled(id: string): Promise<boolean> {
    if (this.#cause !== null) return false;
    try {
      return (await this.#engine.inspectContainer(id))?.oomKilled ?? false;
    } catch {
      // Then it is judged without; the removal will show whether the engine is there.
      return false;
    }
  }

  /** Null when the container is proven to be gone. Does not listen to anybody. */
  async #remove(lost: boolean): Promise<unknown> {
    try {
      // By its name, which is known also when the answer to its creation was not.
      await proveRemoved(this.#engine, this.#name, {
        clock: this.#world.clock,
        withinMs: lost ? LOST_MS : REMOVE_MS,
      });
      return null;
    } catch (error) {
      this.#world.shared.orphan(this.#name);
      return error;
    }
  }

  #notProven(problem: unknown, unproven: unknown): MillraceError {
    this.#world.log?.error('a container could not be proven to be removed', {
      container: this.#name,
      error: describeError(unproven),
    });
    const why = TaskAbort.is(problem)
      ? `the task was stopped (${problem.reason})`
      : describeError(problem ?? 'the task had ended', 500);
    return new MillraceError(
      'unavailable',
      `container ${this.#name} may still be there: ${why}, and ${describeError(unproven, 500)}; it will be removed when the engine answers again`,
      { cause: unproven, details: { ending: 'lost', container: this.#name } },
    );
  }
}

/** Reads all that is printed. Never rejects: a stream that breaks off says nothing about the container. */
async function pump(
  output: AsyncIterable<{ readonly stream: 'stdout' | 'stderr'; readonly bytes: Uint8Array }>,
  lines: OutputLines,
): Promise<void> {
  try {
    for await (const { stream, bytes } of output) {
      lines.write(stream, Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength));
    }
  } catch {
    // The wait for the container will tell what became of it.
  }
}

/** Whether the time ran out first. */
async function within(clock: Clock, ms: number, promise: Promise<unknown>): Promise<boolean> {
  const settled = new AbortController();
  const late = sleep(clock, ms, settled.signal).then(
    () => true,
    () => false,
  );
  const result = await Promise.race([promise.then(() => false), late]);
  settled.abort();
  return result;
}

/** False when the signal aborts first. */
async function pause(clock: Clock, ms: number, signal: AbortSignal): Promise<boolean> {
  return await sleep(clock, ms, signal).then(
    () => true,
    () => false,
  );
}
