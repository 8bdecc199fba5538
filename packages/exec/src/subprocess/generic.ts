/** The ready-made capability for any program the operator allows. */
import { isAbsolute } from 'node:path';
import {
  MillraceError,
  checkCapability,
  type Clock,
  type Logger,
  type TaskContext,
  type TaskSpec as LeasedTask,
} from '@millrace/runner';
import { mergeEnv, type SubprocessKind } from '@millrace/runner/model';
import { RunnerError, nameOfCapability, type KindRunner, type RunnerPlugin } from '@millrace/runner/plugin';
import { checkMetaValues, parseArguments } from './arguments.ts';
import { metaObject, type AttemptPlan } from './attempt.ts';
import { operatorEnvironment } from './environment.ts';
import { nameInputs } from './inputs.ts';
import { checkAllowedEnv, lentEnvironment } from './kind-plugin.ts';
import { checkLimits, lowerLimits, type SubprocessLimits } from './limits.ts';
import { parseOutputs } from './outputs.ts';
import { sandboxWish, type SandboxOptions } from './sandbox-options.ts';
import { programOf, subprocessExtras, subprocessKindOf } from './subprocess-kind.ts';
import { ProgramRunner, type SubprocessRunner } from './subprocess-runner.ts';

/** The capability of {@link subprocessRunner} unless it is given another. */
export const SUBPROCESS_CAPABILITY = '/exec/subprocess/v1';

export interface SubprocessRunnerOptions {
  /**
   * The commands tasks may name, compared as they are written: names to be found on the operator's PATH, or absolute paths. A
   * script needs its interpreter: `bash`, `python3`, `node`, or the custom command. There must be at least one.
   *
   * An allowed interpreter, or a program that can start others, is leave to run anything: then the sandbox is the boundary.
   */
  readonly allow: readonly string[];
  /**
   * Names of environment variables tasks may set. Default none: some, such as `LD_PRELOAD`, make another program of an allowed one.
   * `*` allows all.
   */
  readonly allowEnv?: readonly string[];
  /** Default {@link SUBPROCESS_CAPABILITY}. */
  readonly capability?: string;
  /** Its name in run ids; no two runners of a node may have one name. Default `subprocess`, or one made of the capability. */
  readonly name?: string;
  /** Set by the operator; wins over the task's. Default none. */
  readonly env?: Readonly<Record<string, string>>;
  /** Variables of the node's own environment programs are given, by name. Each must be set. Default none. */
  readonly envFrom?: readonly string[];
  /** The most a task may have, and what it has unless it asks for less. */
  readonly limits?: Partial<SubprocessLimits>;
  readonly sandbox?: SandboxOptions;
  /** See `SubprocessOptions`. */
  readonly workDir?: string;
  readonly log?: Logger;
  readonly clock?: Clock;
}

/**
 * A runner whose tasks say themselves, in their `meta`, what is to be run; see `docs/subprocess.md` for its members. `run` rejects as that of
 * `subprocess` does, and with `permission_denied` for a command or a variable that is not allowed.
 *
 * @throws MillraceError `invalid_argument`, naming the option.
 */
export function subprocessRunner(options: SubprocessRunnerOptions): SubprocessRunner & KindRunner {
  const { capability = SUBPROCESS_CAPABILITY, allow, allowEnv = [] } = options;
  checkCapability(capability);
  if (!Array.isArray(allow) || allow.length === 0) {
    throw new MillraceError(
      'invalid_argument',
      `${capability}: allow must list the commands that tasks may run; without any, leave the runner out`,
    );
  }
  const wrong = allow.find(
    (command) =>
      typeof command !== 'string' || command === '' || (command.includes('/') && !isAbsolute(command)),
  );
  if (wrong !== undefined) {
    throw new MillraceError(
      'invalid_argument',
      `${capability}: allow must list names or absolute paths, got ${JSON.stringify(wrong)}`,
    );
  }
  const policy: Policy = {
    allow,
    allowEnv,
    operatorEnv: operatorEnvironment(options.env ?? {}, options.envFrom ?? [], process.env),
    limits: checkLimits('limits', options.limits ?? {}),
    sandbox: options.sandbox ?? {},
  };
  const kindOf = (task: Pick<LeasedTask, 'meta'>): SubprocessKind => subprocessKindOf(task.meta);
  const programs = new ProgramRunner({
    capability,
    wish: sandboxWish(options.sandbox ?? {}, options.limits ?? {}),
    cgroupParent: options.sandbox?.cgroupParent,
    workDir: options.workDir,
    clock: options.clock,
    log: options.log,
    plan: (ctx) => planner(kindOf(ctx.lease.task), policy, {})(ctx),
  });
  const name =
    options.name ?? (capability === SUBPROCESS_CAPABILITY ? 'subprocess' : nameOfCapability(capability));
  const plugin: RunnerPlugin = {
    name,
    supports: (spec) => spec.kind.type === 'subprocess',
    buildTask({ kind }, context, runId) {
      if (kind.type !== 'subprocess') throw RunnerError.unsupportedKind(name, kind.type);
      const plan = RunnerError.specified(() => planner(kind, policy, lentEnvironment(context)));
      return { name: runId.name, run: (ctx) => programs.perform(ctx, plan) };
    },
  };
  return Object.assign(programs, { plugin, kindOf });
}

interface Policy {
  readonly allow: readonly string[];
  readonly allowEnv: readonly string[];
  readonly operatorEnv: Readonly<Record<string, string>>;
  readonly limits: SubprocessLimits;
  readonly sandbox: SandboxOptions;
}

/** Checks everything that does not depend on the lease. `lent`: variables of the operator for all runners. */
function planner(
  kind: SubprocessKind,
  policy: Policy,
  lent: Readonly<Record<string, string>>,
): (ctx: TaskContext) => Omit<AttemptPlan, 'sandbox'> {
  const { command, args: texts, script } = programOf(kind.mode);
  if (!policy.allow.includes(command)) {
    throw new MillraceError(
      'permission_denied',
      `command ${JSON.stringify(command)} is not allowed on this node; allowed: ${policy.allow.join(', ')}`,
    );
  }
  const extras = subprocessExtras(kind, 'meta');
  checkAllowedEnv(kind.env, policy.allowEnv);
  const args = parseArguments('meta.args', texts, 'text');
  const fixed = {
    command,
    args,
    script,
    operatorEnv: { ...lent, ...policy.operatorEnv },
    taskEnv: mergeEnv(kind.env, []),
    cwd: extras.cwd,
    outputs: parseOutputs('meta.outputs', extras.outputs),
    limits: lowerLimits('meta.limits', policy.limits, extras.limits),
    failOnNonZero: kind.failOnNonZero,
    network: policy.sandbox.network ?? false,
    readable: policy.sandbox.readable ?? [],
    devices: policy.sandbox.devices ?? [],
  };
  return ({ lease: { task } }) => {
    const cids = task.inputs_cids;
    const inputs =
      extras.inputs === null
        ? cids.map((cid) => ({ cid, name: null }))
        : [...nameInputs(cids, extras.inputs)].map(([name, cid]) => ({ cid, name }));
    const [first] = cids;
    if (extras.stdin === 'input' && first === undefined) {
      throw new MillraceError('invalid_argument', 'inputs_cids must name an input, meta.stdin reads it');
    }
    const meta = metaObject(task.meta);
    checkMetaValues(args, meta);
    return {
      ...fixed,
      stdin:
        extras.stdin === 'none'
          ? { kind: 'none' }
          : extras.stdin === 'input'
            ? { kind: 'input', cid: first! }
            : { kind: 'text', text: extras.stdin.text },
      inputs: extras.stdin === 'input' ? inputs.slice(1) : inputs,
      meta,
    };
  };
}
