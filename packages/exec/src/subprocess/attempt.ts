/** One attempt: a folder, inputs, a program in its sandbox, its ending, outputs, and nothing left behind. */
import { randomUUID } from 'node:crypto';
import { realpath, stat, mkdir, writeFile } from 'node:fs/promises';
import { readFileSync } from 'node:fs';
import { isAbsolute, join } from 'node:path';
import { Readable, type Writable } from 'node:stream';
import {
  MillraceError,
  TaskAbort,
  describeError,
  sleep,
  type Clock,
  type Json,
  type JsonObject,
  type Logger,
  type TaskContext,
  type Timer,
} from '@millrace/runner';
import { endedChildren, startChild, type Child } from '../process/child.ts';
import { SAFE_PATH, findProgram } from '../process/find-program.ts';
import { countUserThreads, reapedCpuMs } from '../process/proc.ts';
import { ProcessTree } from '../process/process-tree.ts';
import {
  NO_USAGE,
  proportionalBytes,
  type UsageSample,
  type UsageSampler,
} from '../process/usage-sampler.ts';
import { TaskCgroup, type CgroupUsage } from '../sandbox/cgroup.ts';
import {
  foldersInside,
  isVisible,
  launch,
  wrappersOf,
  type Launch,
  type LaunchFolders,
} from '../sandbox/launch.ts';
import type { SandboxRecord } from '../sandbox/plan.ts';
import { loweredLimits } from '../sandbox/prelude.ts';
import type { SandboxFindings } from '../sandbox/probe.ts';
import { fillArguments, type ArgumentTemplate } from './arguments.ts';
import { diskUsage } from './disk-usage.ts';
import { normalExit, verdict, type NormalExit, type StopCause } from './ending.ts';
import { programEnvironment, traceContext } from './environment.ts';
import { EventsChannel } from './events-channel.ts';
import { placeInputs } from './inputs.ts';
import type { SubprocessLimits } from './limits.ts';
import { OutputLines } from './output-lines.ts';
import { collectOutputs, type OutputPattern } from './outputs.ts';
import { createTaskFolder, removeTaskFolder } from './task-folder.ts';
import { tellUsage } from './tell-usage.ts';

/** What a task comes to, everything checked. */
export interface AttemptPlan {
  /** A name on PATH, or an absolute path. */
  readonly command: string;
  readonly args: readonly ArgumentTemplate[];
  /** Written to a file whose path becomes the first argument. */
  readonly script: string | null;
  readonly operatorEnv: Readonly<Record<string, string>>;
  readonly taskEnv: Readonly<Record<string, string>>;
  /** Absolute: a folder of the operator's. Relative: below the task's own. */
  readonly cwd: string;
  readonly stdin:
    | { readonly kind: 'none' }
    | { readonly kind: 'text'; readonly text: string }
    | { readonly kind: 'input'; readonly cid: string };
  /** Those put into the folder. Without a name: the stored one. */
  readonly inputs: readonly { readonly cid: string; readonly name: string | null }[];
  readonly outputs: readonly OutputPattern[];
  readonly limits: SubprocessLimits;
  readonly failOnNonZero: boolean;
  /** Values for the arguments. */
  readonly meta: JsonObject;
  readonly sandbox: SandboxRecord;
  readonly network: boolean;
  readonly readable: readonly string[];
  readonly devices: readonly string[];
}

/** What all attempts of a runner share. */
export interface AttemptWorld {
  readonly findings: SandboxFindings;
  readonly sampler: UsageSampler;
  readonly clock: Clock;
  readonly log: Logger | undefined;
  readonly workDir: string;
}

/** How long pipes are read on when every process is gone, or cannot be found. */
const DRAIN_MS = 1_000;
const DISK_EVERY_MS = 1_000;
/** Looking at the disk takes at most this share of the time. */
const DISK_SHARE = 1 / 20;
const OTHER_PROCESSES_FOR_MS = 5_000;

/**
 * Performs it. Rejects with the task's verdict once every process is gone as far as the tier promises it, and the folder is removed.
 * What it used is told in every case.
 */
export async function runAttempt(ctx: TaskContext, plan: AttemptPlan, world: AttemptWorld): Promise<void> {
  const lowered = plan.sandbox.applied.tier === 'none' ? {} : loweredLimits(plan.limits);
  const usage: UsageRecord = { ...NOTHING_USED, sandbox: plan.sandbox, lowered };
  let folders: LaunchFolders | null = null;
  try {
    ctx.signal.throwIfAborted();
    const program = await locate(plan);
    folders = await createTaskFolder(world.workDir);
    const placed = await placeInputs(ctx, folders.inputs, plan.inputs);
    usage.bytesIn = placed.bytes;
    ctx.signal.throwIfAborted();
    const attempt = new Attempt(ctx, plan, world, folders, usage);
    await attempt.run(program, placed.names);
    const collected = await collectOutputs(ctx, folders.outputs, plan.outputs, plan.limits);
    usage.bytesOut = collected.bytes;
  } finally {
    await tellUsage(ctx, usageOf(usage)).catch((error: unknown) => {
      world.log?.warn('usage of a task could not be reported', { error: describeError(error) });
    });
    if (folders !== null) await removeTaskFolder(folders, world.log);
  }
}

interface UsageRecord {
  peakMemoryBytes: number | null;
  cpuMs: number | null;
  wallMs: number | null;
  bytesIn: number;
  bytesOut: number;
  exit: NormalExit;
  readonly sandbox: SandboxRecord;
  readonly lowered: Readonly<Record<string, number>>;
}

const NOTHING_USED: Omit<UsageRecord, 'sandbox' | 'lowered'> = {
  peakMemoryBytes: null,
  cpuMs: null,
  wallMs: null,
  bytesIn: 0,
  bytesOut: 0,
  exit: { code: null, signal: null },
};

function usageOf({ exit, sandbox, lowered, ...used }: UsageRecord): JsonObject {
  const { asked, applied, missing } = sandbox;
  return {
    peak_memory_bytes: used.peakMemoryBytes,
    cpu_ms: used.cpuMs === null ? null : Math.round(used.cpuMs),
    wall_ms: used.wallMs === null ? null : Math.round(used.wallMs),
    bytes_in: used.bytesIn,
    bytes_out: used.bytesOut,
    exit_code: exit.code,
    signal: exit.signal,
    sandbox: {
      asked: { tier: asked.tier, controls: [...asked.controls], required: [...asked.required] },
      applied: {
        tier: applied.tier,
        cgroup: applied.cgroup,
        controls: { ...applied.controls },
        ...(Object.keys(lowered).length > 0 && { lowered }),
      },
      missing: [...missing],
    },
  };
}

/** @throws MillraceError as `findProgram`; `failed_precondition` when the sandbox does not show it. */
async function locate({ command, operatorEnv, sandbox, readable, cwd }: AttemptPlan): Promise<string> {
  const program = await findProgram(command, operatorEnv['PATH'] ?? SAFE_PATH);
  if (isAbsolute(cwd) && !(await stat(cwd).catch(() => null))?.isDirectory()) {
    throw new MillraceError('not_found', `cwd ${cwd} is not an existing folder`, {
      details: { ending: 'spawn_failed', errno: 'ENOENT' },
    });
  }
  if (sandbox.applied.tier !== 'bwrap') return program;
  const hidden = [program, await realpath(program)].find((path) => !isVisible(path, readable));
  if (hidden === undefined) return program;
  throw new MillraceError(
    'failed_precondition',
    `program ${hidden} is not seen inside of a bwrap sandbox; add its folder to sandbox.readable`,
    { details: { ending: 'sandbox_failed', control: 'filesystem' } },
  );
}

/** The part of an attempt in which processes exist. */
class Attempt {
  readonly #ctx: TaskContext;
  readonly #plan: AttemptPlan;
  readonly #world: AttemptWorld;
  readonly #folders: LaunchFolders;
  readonly #usage: UsageRecord;
  readonly #timers: Timer[] = [];
  #cause: StopCause | null = null;
  #stopping: Promise<void> | null = null;
  #sample: UsageSample = NO_USAGE;
  #cgroup: TaskCgroup | null = null;

  constructor(
    ctx: TaskContext,
    plan: AttemptPlan,
    world: AttemptWorld,
    folders: LaunchFolders,
    usage: UsageRecord,
  ) {
    this.#ctx = ctx;
    this.#plan = plan;
    this.#world = world;
    this.#folders = folders;
    this.#usage = usage;
  }

  /** Resolves when the program did its work. */
  async run(program: string, inputNames: readonly string[]): Promise<void> {
    const { clock } = this.#world;
    const runId = randomUUID();
    this.#cgroup = this.#makeCgroup(runId);
    try {
      const prepared = await this.#prepare(program, inputNames, runId);
      const reapedBefore = { cpuMs: reapedCpuMs(), count: endedChildren() };
      const oomBefore = kernelOomKills();
      const startedAt = clock.monotonic();
      const child = await startChild({
        ...prepared,
        argv: prepared.launch.argv,
        cwd: prepared.launch.cwd,
        stdin: this.#plan.stdin.kind !== 'none',
      });
      // A namespace or a group holds all there is; else what slipped away is recognised by its run id.
      const contained = prepared.launch.wrappers > 0 || this.#cgroup !== null;
      const tree = new ProcessTree({
        pid: child.pid,
        marker: contained ? null : `MILLRACE_RUN_ID=${runId}`,
        clock,
      });
      const lines = new OutputLines(this.#plan.limits.logBytes, this.#ctx.log);
      const events = new EventsChannel({
        limitBytes: this.#plan.limits.eventBytes,
        announced: prepared.launch.announces,
        ctrl: this.#ctx.ctrl,
        log: this.#ctx.log,
      });
      child.stdout.on('data', (bytes: Buffer) => lines.write('stdout', bytes));
      child.stderr.on('data', (bytes: Buffer) => lines.write('stderr', bytes));
      child.events.on('data', (bytes: Buffer) => events.write(bytes));

      const exit = await this.#supervise(child, tree, prepared.launch);
      const wallMs = clock.monotonic() - startedAt;
      await child.drain(clock, DRAIN_MS);
      lines.end();
      events.end();

      const group = this.#cgroup?.usage() ?? null;
      this.#account(exit, wallMs, reapedBefore, group);
      const problem = verdict({
        program: this.#plan.command,
        cause: this.#cause,
        exit,
        started: events.started,
        limits: this.#plan.limits,
        cpuMs: this.#usage.cpuMs ?? 0,
        outOfMemory: group?.outOfMemory ? 'cgroup' : kernelOomKills() > oomBefore ? 'kernel' : null,
        processesRefused: group?.processesRefused ?? false,
        failOnNonZero: this.#plan.failOnNonZero,
        lastWords: lines.lastWords(),
      });
      if (problem !== null) throw problem;
    } finally {
      await this.#cgroup?.remove(clock);
    }
  }

  #makeCgroup(runId: string): TaskCgroup | null {
    const { cgroupParent } = this.#world.findings;
    const { applied } = this.#plan.sandbox;
    if (!applied.cgroup || cgroupParent === null) return null;
    const { memoryBytes, processes } = this.#plan.limits;
    return TaskCgroup.create(cgroupParent, runId, {
      memoryBytes,
      processes: processes + wrappersOf(applied.tier),
    });
  }

  async #prepare(
    program: string,
    inputNames: readonly string[],
    runId: string,
  ): Promise<{ readonly launch: Launch; readonly env: Record<string, string> }> {
    const { findings } = this.#world;
    const { task } = this.#ctx.lease;
    const plan = this.#plan;
    const { tier } = plan.sandbox.applied;
    const inside = foldersInside(tier, this.#folders);
    const args = fillArguments(plan.args, {
      inputs: new Map(inputNames.map((name) => [name, `${inside.inputs}/${name}`])),
      outputDir: inside.outputs,
      workDir: inside.work,
      meta: plan.meta,
    });
    if (plan.script !== null) {
      const name = 'millrace-script';
      await writeFile(join(this.#folders.temp, name), plan.script, { mode: 0o600, flag: 'wx' });
      args.unshift(`${inside.temp}/${name}`);
    }
    if (!isAbsolute(plan.cwd)) await mkdir(join(this.#folders.work, plan.cwd), { recursive: true });
    return {
      launch: launch({
        tier,
        tools: findings.tools,
        command: [program, ...args],
        folders: this.#folders,
        cwd: isAbsolute(plan.cwd) ? plan.cwd : join(inside.work, plan.cwd),
        limits: plan.limits,
        otherProcesses: tier === 'limits' ? otherProcesses(this.#world.clock) : 0,
        network: plan.network,
        readable: plan.readable,
        devices: plan.devices,
        cgroup: this.#cgroup,
      }),
      env: programEnvironment({
        operator: plan.operatorEnv,
        task: plan.taskEnv,
        runId,
        taskId: task.id,
        jobId: task.job_id,
        folders: inside,
        trace: traceContext(this.#ctx.lease, metaObject(task.meta)),
      }),
    };
  }

  /** From start to proof of death. */
  async #supervise(
    child: Child,
    tree: ProcessTree,
    { wrappers, signalsAsCodes }: Launch,
  ): Promise<NormalExit> {
    const { clock, sampler } = this.#world;
    const { signal } = this.#ctx;
    const { limits } = this.#plan;
    const stop = (cause: StopCause, graceMs: number): void => {
      if (this.#cause !== null) return;
      this.#cause = cause;
      this.#stopping = this.#stop(child, tree, wrappers, graceMs);
      // Awaited below; it must not count as unhandled until then.
      this.#stopping.catch(() => undefined);
    };
    const onAbort = (): void => stop({ kind: 'abort', abort: abortOf(signal) }, limits.graceMs);
    this.#timers.push(
      clock.setTimer(
        () =>
          stop({ kind: 'limit', limit: 'wallMs', value: limits.wallMs, used: limits.wallMs }, limits.graceMs),
        limits.wallMs,
      ),
    );
    const watch = sampler.watch(tree, (sample) => {
      this.#sample = sample;
      const breach = this.#breach(sample, tree);
      if (breach !== null) stop(breach, breach.limit === 'cpuMs' ? limits.graceMs : 0);
    });
    const done = new AbortController();
    const disk = this.#watchDisk(stop, done.signal);
    const feeding = this.#feed(child.stdin, stop, done.signal);
    if (signal.aborted) onAbort();
    else signal.addEventListener('abort', onAbort, { once: true });

    const exit = await child.exited;
    signal.removeEventListener('abort', onAbort);
    watch[Symbol.dispose]();
    done.abort();
    for (const timer of this.#timers) timer.cancel();
    await this.#stopping;
    await tree.kill();
    await this.#cgroup?.kill(clock);
    await Promise.all([disk, feeding]);
    return normalExit(exit, signalsAsCodes);
  }

  /** Asks, waits for the grace, and then does not ask any more. Resolves with the program's end. */
  async #stop(child: Child, tree: ProcessTree, wrappers: number, graceMs: number): Promise<void> {
    const { clock } = this.#world;
    if (graceMs > 0) {
      tree.terminate(wrappers);
      const ended = new AbortController();
      const grace = sleep(clock, graceMs, ended.signal).catch(() => undefined);
      await Promise.race([grace, child.exited]);
      ended.abort();
    }
    await tree.kill();
    await this.#cgroup?.kill(clock);
    await child.exited;
  }

  #breach(
    { cpuMs, residentBytes, processes, threads }: UsageSample,
    tree: ProcessTree,
  ): Extract<StopCause, { kind: 'limit' }> | null {
    const { limits } = this.#plan;
    const usedCpuMs = Math.max(cpuMs, this.#cgroup?.usage().cpuMs ?? 0);
    if (usedCpuMs > limits.cpuMs)
      return { kind: 'limit', limit: 'cpuMs', value: limits.cpuMs, used: usedCpuMs };
    // Where the kernel holds it to them, there are never more.
    const own = threads - wrappersOf(this.#plan.sandbox.applied.tier);
    if (own > limits.processes)
      return { kind: 'limit', limit: 'processes', value: limits.processes, used: own };
    // The kernel's account of a group leaves out what others had in memory already, such as the program's own text.
    const counted = this.#plan.sandbox.applied.controls.memory === 'cgroup';
    if (counted || residentBytes <= limits.memoryBytes) return null;
    // Several processes may share most of their pages; counting once is dear, so only now.
    const used = processes === 1 ? residentBytes : (proportionalBytes(tree) ?? residentBytes);
    return used > limits.memoryBytes
      ? { kind: 'limit', limit: 'memoryBytes', value: limits.memoryBytes, used }
      : null;
  }

  async #watchDisk(stop: (cause: StopCause, graceMs: number) => void, done: AbortSignal): Promise<void> {
    const { clock } = this.#world;
    const { outputs, work, temp } = this.#folders;
    const { diskBytes } = this.#plan.limits;
    for (let pauseMs = DISK_EVERY_MS; ;) {
      try {
        await sleep(clock, pauseMs, done);
      } catch {
        return;
      }
      const startedAt = clock.monotonic();
      const used = await diskUsage([outputs, work, temp], diskBytes);
      if (used > diskBytes) stop({ kind: 'limit', limit: 'diskBytes', value: diskBytes, used }, 0);
      pauseMs = Math.max(DISK_EVERY_MS, (clock.monotonic() - startedAt) / DISK_SHARE);
    }
  }

  /** Writes stdin for as long as the program reads it. A program may end, or close it, at any time. */
  async #feed(
    stdin: Writable | null,
    stop: (cause: StopCause, graceMs: number) => void,
    done: AbortSignal,
  ): Promise<void> {
    const { stdin: source, limits } = this.#plan;
    if (stdin === null || source.kind === 'none') return;
    try {
      const stream =
        source.kind === 'text'
          ? Readable.from([Buffer.from(source.text)])
          : await this.#ctx.input.openRead(source.cid, { signal: done });
      const close = (): void => void stream.destroy();
      stdin.once('close', close);
      done.addEventListener('abort', close, { once: true });
      if (stdin.destroyed || done.aborted) close();
      for await (const chunk of stream as AsyncIterable<Buffer>) {
        this.#usage.bytesIn += chunk.byteLength;
        if (!stdin.write(chunk)) await writable(stdin);
      }
      stdin.end();
    } catch (error) {
      if (!done.aborted && !stdin.destroyed) stop({ kind: 'failure', error }, limits.graceMs);
    }
  }

  #account(
    exit: NormalExit,
    wallMs: number,
    before: { readonly cpuMs: number | null; readonly count: number },
    group: CgroupUsage | null,
  ): void {
    const reaped = reapedCpuMs();
    // What this process waited for is exact, but of all children together: it is this one's if no other ended meanwhile.
    const alone = endedChildren() === before.count + 1 && reaped !== null && before.cpuMs !== null;
    const waitedMs = alone ? reaped - before.cpuMs : 0;
    const peak = group?.peakMemoryBytes ?? this.#sample.peakBytes;
    Object.assign(this.#usage, {
      exit,
      wallMs,
      cpuMs: group?.cpuMs ?? Math.max(this.#sample.cpuMs, waitedMs),
      // Ended before it was looked at for the first time.
      peakMemoryBytes: peak === 0 ? null : peak,
    });
  }
}

/** When it takes more, or never will. */
function writable(stdin: Writable): Promise<void> {
  return new Promise((resolve) => {
    const settle = (): void => {
      stdin.off('drain', settle);
      stdin.off('close', settle);
      resolve();
    };
    stdin.on('drain', settle);
    stdin.on('close', settle);
    if (stdin.destroyed) settle();
  });
}

export function metaObject(meta: Json): JsonObject {
  return typeof meta === 'object' && meta !== null && !Array.isArray(meta) ? meta : {};
}

export function abortOf(signal: AbortSignal): TaskAbort {
  const reason: unknown = signal.reason;
  return TaskAbort.is(reason) ? reason : new TaskAbort('canceled', describeError(reason));
}

/** How often the kernel has killed for memory since it started. */
export function kernelOomKills(): number {
  try {
    return Number(/^oom_kill (\d+)$/m.exec(readFileSync('/proc/vmstat', 'latin1'))?.[1] ?? 0);
  } catch {
    return 0;
  }
}

let others: { readonly count: number; readonly at: number } | null = null;

/** Counting means looking at every process there is, so the count may be a few seconds old. */
function otherProcesses(clock: Clock): number {
  const now = clock.monotonic();
  if (others === null || now - others.at > OTHER_PROCESSES_FOR_MS || now < others.at) {
    others = { count: countUserThreads(), at: now };
  }
  return others.count;
}
