/**
 * Computes as work of a node: a task names a digest, any node with this runner can perform it, and nothing has to be
 * installed on the node for it.
 *
 * The task's `meta`:
 * - `ref`: the compute, `compute://sha256/<digest>`; required
 * - `input`: its input, any JSON. Absent: the task's first input, which must be a JSON document; without one, `{}`
 * - `now`: the wall clock it observes, milliseconds since 1970 or RFC 3339. Absent: the node's clock when it starts. A task that
 *   is to give the same result each time says it
 * - `seed`: of its random stream, a whole number from 0. Absent: the same for all
 *
 * or all of it under `wasm`, as the model's kind of that name, with `module` in place of `ref`.
 *
 * The output becomes the artifact `output.json`, diagnostics become log lines, measurements an event of type
 * `compute_metrics`.
 */
import { MillraceError, checkCapability, systemClock } from '@millrace/runner';
import type { Clock, Json, TaskContext } from '@millrace/runner';
import { parseWasm } from '@millrace/runner/model';
import type { WasmKind } from '@millrace/runner/model';
import { RunnerError, nameOfCapability } from '@millrace/runner/plugin';
import type { KindRunner, RunnerPlugin } from '@millrace/runner/plugin';
import { computeError } from './errors.ts';
import { jsonProblem } from './json-text.ts';
import { LineSplitter } from './line-splitter.ts';
import { resolveLimits } from './limits.ts';
import type { Limits, Metrics } from './limits.ts';
import { ComputeManager } from './manager.ts';
import type { ComputeManagerOptions } from './manager.ts';
import { formatRef, requireRef } from './ref.ts';
import type { Ref } from './ref.ts';
import type { Resolver } from './resolver.ts';

export interface ComputeRunnerOptions extends ComputeManagerOptions {
  /** Where artifacts come from. */
  readonly resolver: Resolver;
  /** Bounds of every task, in place of the defaults. `maxWallMs` is 60,000 here unless it says otherwise. */
  readonly limits?: Partial<Limits>;
  /** Its name in run ids; no two runners of a node may have one name. Default `compute`, or one made of the capability. */
  readonly name?: string;
  /** Default {@link COMPUTE_CAPABILITY}. */
  readonly capability?: string;
  readonly clock?: Clock;
}

export const COMPUTE_CAPABILITY = '/compute/v1';
/** Long computations are what nodes are for; a quarter of a second is for a library that answers requests. */
const TASK_WALL_MS = 60_000;
const OUTPUT = 'output.json';
const MAX_LINE_BYTES = 8 * 1024;

/**
 * A runner of computes. It owns a {@link ComputeManager}; `close` closes it.
 *
 * @throws MillraceError `invalid_argument` for a capability, limit or option out of its bounds.
 */
export function computeRunner(options: ComputeRunnerOptions): KindRunner {
  const capability = options.capability ?? COMPUTE_CAPABILITY;
  checkCapability(capability);
  const limits = resolveLimits({ maxWallMs: TASK_WALL_MS, ...options.limits });
  const manager = new ComputeManager(options.resolver, limits, options);
  const clock = options.clock ?? systemClock;
  const name = options.name ?? (capability === COMPUTE_CAPABILITY ? 'compute' : nameOfCapability(capability));
  const plugin: RunnerPlugin = {
    name,
    supports: (spec) => spec.kind.type === 'wasm',
    buildTask({ kind }, _context, runId) {
      if (kind.type !== 'wasm') throw RunnerError.unsupportedKind(name, kind.type);
      const task = RunnerError.specified(() => taskOf(kind));
      return { name: runId.name, run: (ctx) => perform(ctx, task, manager, limits, clock) };
    },
  };
  return {
    capability,
    type: 'wasm',
    plugin,
    kindOf: (task) => kindOf(task.meta),
    run: async (ctx) => await perform(ctx, taskOf(kindOf(ctx.lease.task.meta)), manager, limits, clock),
    close: () => manager.close(),
  };
}

async function perform(
  ctx: TaskContext,
  task: ComputeTask,
  manager: ComputeManager,
  limits: Limits,
  clock: Clock,
): Promise<void> {
  const { signal } = ctx;
  signal.throwIfAborted();
  const input = await inputOf(ctx, task, limits.maxInputBytes);
  const lines = new LineSplitter(MAX_LINE_BYTES, (line) => ctx.log.info('compute log', { line }));
  let metrics: Metrics | null = null;
  let output: Uint8Array;
  try {
    output = await manager.run(task.ref, input, {
      now: task.now ?? clock.now(),
      ...(task.seed !== null && { seed: task.seed }),
      signal,
      stderr: (bytes) => lines.write(bytes),
      metricsSink: (measured) => (metrics = measured),
    });
  } finally {
    lines.end();
    if (metrics !== null) await tellMetrics(ctx, task.ref, metrics);
  }
  await ctx.output.putBytes(OUTPUT, output);
}

interface ComputeTask {
  readonly ref: Ref;
  /** `undefined` when absent; `null` is an input. */
  readonly input: Json | undefined;
  readonly now: number | null;
  readonly seed: bigint | null;
}

/** The members of a task that are no part of the kind "wasm". */
const EXTENSIONS = ['input', 'now', 'seed'];

function kindOf(meta: Json): WasmKind {
  if (typeof meta !== 'object' || meta === null || Array.isArray(meta)) {
    throw badMeta('must be an object with a ref');
  }
  if (meta['wasm'] !== undefined) return parseWasm(meta['wasm'], 'meta.wasm');
  const { ref } = meta;
  if (typeof ref !== 'string')
    throw badMeta(`ref must be a text, compute://sha256/<digest>, got ${kindName(ref)}`);
  const extensions = Object.fromEntries(Object.entries(meta).filter(([key]) => EXTENSIONS.includes(key)));
  return { type: 'wasm', module: ref, args: [], env: [], extensions };
}

function taskOf({ module, args, env, extensions }: WasmKind): ComputeTask {
  const { input, now = null, seed = null } = extensions;
  if (args.length > 0 || env.length > 0) {
    throw badMeta('must have neither args nor env: a compute gets an input, and nothing else');
  }
  if (seed !== null && (!Number.isSafeInteger(seed) || (seed as number) < 0)) {
    throw badMeta(`seed must be a whole number from 0, got ${JSON.stringify(seed)}`);
  }
  return {
    ref: requireRef(module),
    input,
    now: moment(now),
    seed: seed === null ? null : BigInt(seed as number),
  };
}

function moment(now: Json): number | null {
  if (now === null) return null;
  const ms = typeof now === 'string' && /^\d{4}-\d\d-\d\dT/.test(now) ? Date.parse(now) : now;
  if (typeof ms === 'number' && Number.isFinite(ms)) return ms;
  throw badMeta(`now must be milliseconds since 1970 or RFC 3339, got ${JSON.stringify(now)}`);
}

async function inputOf(ctx: TaskContext, task: ComputeTask, maxBytes: number): Promise<Uint8Array> {
  if (task.input !== undefined) return new TextEncoder().encode(JSON.stringify(task.input));
  const [cid] = ctx.lease.task.inputs_cids;
  if (cid === undefined) return new Uint8Array(0);
  const chunks: Uint8Array[] = [];
  let length = 0;
  for await (const chunk of await ctx.input.openRead(cid, { signal: ctx.signal })) {
    chunks.push(chunk as Uint8Array);
    length += (chunk as Uint8Array).byteLength;
    if (length > maxBytes) {
      throw computeError(
        'resource_exhausted',
        'input-limit',
        `compute: input ${cid} is over maxInputBytes ${maxBytes}`,
        {
          details: { limit: 'maxInputBytes', value: maxBytes },
        },
      );
    }
  }
  const bytes = Buffer.concat(chunks);
  const problem = bytes.length === 0 ? null : jsonProblem(bytes);
  if (problem !== null) {
    throw new MillraceError('invalid_argument', `compute: input ${cid} is not one JSON document: ${problem}`);
  }
  return bytes;
}

async function tellMetrics(ctx: TaskContext, ref: Ref, metrics: Metrics): Promise<void> {
  if (metrics.logDroppedBytes > 0) {
    ctx.log.warn('compute log was cut', { dropped_bytes: metrics.logDroppedBytes });
  }
  await ctx.ctrl.logEvent({
    type: 'compute_metrics',
    ref: formatRef(ref),
    status: metrics.status,
    reason: metrics.reason,
    wall_ms: metrics.wallMs,
    queued_ms: metrics.queuedMs,
    prepare_ms: metrics.prepareMs,
    memory_bytes: metrics.memoryBytes,
    fuel_used: metrics.fuelUsed,
    input_bytes: metrics.inputBytes,
    output_bytes: metrics.outputBytes,
    log_bytes: metrics.logBytes,
    log_dropped_bytes: metrics.logDroppedBytes,
  });
  await ctx.ctrl.usage?.({
    peak_memory_bytes: metrics.memoryBytes,
    fuel_used: metrics.fuelUsed,
    bytes_in: metrics.inputBytes,
    bytes_out: metrics.outputBytes,
  });
}

function badMeta(rule: string): Error {
  return computeError('invalid_argument', 'bad-ref', `compute: the task's meta ${rule}`);
}

function kindName(value: Json | undefined): string {
  return value === null ? 'null' : typeof value;
}
