/** The ready-made capability for any program the operator allows. */
import { isAbsolute } from 'node:path';
import { MillraceError, checkCapability, type Clock, type Logger, type TaskContext } from '@millrace/runner';
import { checkMetaValues, parseArguments } from './arguments.ts';
import { metaObject, type AttemptPlan } from './attempt.ts';
import { operatorEnvironment } from './environment.ts';
import { nameInputs } from './inputs.ts';
import { checkLimits, lowerLimits, type SubprocessLimits } from './limits.ts';
import { parseOutputs } from './outputs.ts';
import { sandboxWish, type SandboxOptions } from './sandbox-options.ts';
import { parseSubprocessKind } from './subprocess-kind.ts';
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
export function subprocessRunner(options: SubprocessRunnerOptions): SubprocessRunner {
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
  const operatorEnv = operatorEnvironment(options.env ?? {}, options.envFrom ?? [], process.env);
  const limits = checkLimits('limits', options.limits ?? {});
  return new ProgramRunner({
    capability,
    wish: sandboxWish(options.sandbox ?? {}, options.limits ?? {}),
    cgroupParent: options.sandbox?.cgroupParent,
    workDir: options.workDir,
    clock: options.clock,
    log: options.log,
    plan: (ctx) => plan(ctx, { allow, allowEnv, operatorEnv, limits, sandbox: options.sandbox ?? {} }),
  });
}

interface Policy {
  readonly allow: readonly string[];
  readonly allowEnv: readonly string[];
  readonly operatorEnv: Readonly<Record<string, string>>;
  readonly limits: SubprocessLimits;
  readonly sandbox: SandboxOptions;
}

function plan({ lease: { task } }: TaskContext, policy: Policy): Omit<AttemptPlan, 'sandbox'> {
  const kind = parseSubprocessKind(task.meta);
  if (!policy.allow.includes(kind.command)) {
    throw new MillraceError(
      'permission_denied',
      `command ${JSON.stringify(kind.command)} is not allowed on this node; allowed: ${policy.allow.join(', ')}`,
    );
  }
  const variable = Object.keys(kind.env).find(
    (name) => !policy.allowEnv.includes(name) && !policy.allowEnv.includes('*'),
  );
  if (variable !== undefined) {
    throw new MillraceError(
      'permission_denied',
      `meta.env: variable ${variable} is not allowed on this node; allowed: ${policy.allowEnv.join(', ') || 'none'}`,
    );
  }
  const cids = task.inputs_cids;
  const inputs =
    kind.inputs === null
      ? cids.map((cid) => ({ cid, name: null }))
      : [...nameInputs(cids, kind.inputs)].map(([name, cid]) => ({ cid, name }));
  const [first] = cids;
  if (kind.stdin === 'input' && first === undefined) {
    throw new MillraceError('invalid_argument', 'inputs_cids must name an input, meta.stdin reads it');
  }
  const args = parseArguments('meta.args', kind.args, 'text');
  const meta = metaObject(task.meta);
  checkMetaValues(args, meta);
  return {
    command: kind.command,
    args,
    script: kind.script,
    operatorEnv: policy.operatorEnv,
    taskEnv: kind.env,
    cwd: kind.cwd,
    stdin:
      kind.stdin === 'none'
        ? { kind: 'none' }
        : kind.stdin === 'input'
          ? { kind: 'input', cid: first! }
          : { kind: 'text', text: kind.stdin.text },
    inputs: kind.stdin === 'input' ? inputs.slice(1) : inputs,
    outputs: parseOutputs('meta.outputs', kind.outputs),
    limits: lowerLimits('meta.limits', policy.limits, kind.limits),
    failOnNonZero: kind.failOnNonZero,
    meta,
    network: policy.sandbox.network ?? false,
    readable: policy.sandbox.readable ?? [],
    devices: policy.sandbox.devices ?? [],
  };
}
