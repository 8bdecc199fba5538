/** Binds one program to one capability. */
import { isAbsolute } from 'node:path';
import { MillraceError, checkCapability, type Clock, type Logger, type TaskContext } from '@millrace/runner';
import { checkMetaValues, namesIn, parseArguments } from './arguments.ts';
import { metaObject, type AttemptPlan } from './attempt.ts';
import { operatorEnvironment } from './environment.ts';
import { checkInputNames, nameInputs } from './inputs.ts';
import { checkLimits, type SubprocessLimits } from './limits.ts';
import { parseOutputs } from './outputs.ts';
import { checkParameters, checkRules, type Parameter } from './parameters.ts';
import { sandboxWish, type SandboxOptions } from './sandbox-options.ts';
import { ProgramRunner, type SubprocessRunner } from './subprocess-runner.ts';

export interface SubprocessOptions {
  /** The kind of work this program does. */
  readonly capability: string;
  /** A name to be found on PATH, or an absolute path. No shell is involved. */
  readonly command: string;
  /**
   * Its arguments. Placeholders: `{input:NAME}`, `{inputs}`, `{output:NAME}`, `{outdir}`, `{workdir}`, `{meta:KEY}`, `{meta:KEY=DEFAULT}`;
   * doubled braces stand for themselves. Default none.
   */
  readonly args?: readonly string[];
  /**
   * File names for the task's inputs, in the order of its `inputs_cids`; a task with another number of inputs fails. Default: any
   * number, under the names they are stored by.
   */
  readonly inputs?: readonly string[];
  /**
   * What is uploaded when the program ended well, as globs relative to its folder of outputs. A plain name must be there; a
   * pattern may match nothing. Default: the `{output:NAME}` of the arguments.
   */
  readonly outputs?: readonly string[];
  /** What each value of `meta` that the arguments use must be. Default: any text, number or boolean that is no option. */
  readonly params?: Readonly<Record<string, Parameter>>;
  /**
   * What it reads: nothing, the first input, an input by its name, or a text. An input that is read here is streamed, and not put
   * into the folder. Default `none`.
   */
  readonly stdin?: 'none' | 'input' | { readonly input: string } | { readonly text: string };
  /** Its environment, on top of PATH, LANG, HOME, TMPDIR and MILLRACE_*. Default none. */
  readonly env?: Readonly<Record<string, string>>;
  /** Variables of the node's own environment it is given, by name. Each must be set. Default none. */
  readonly envFrom?: readonly string[];
  /** An existing folder to start in, by its absolute path. Default: a private, empty one. */
  readonly cwd?: string;
  /** False: any exit code, and any signal, is a success. Default true. */
  readonly failOnNonZero?: boolean;
  readonly limits?: Partial<SubprocessLimits>;
  readonly sandbox?: SandboxOptions;
  /** Where the folders of tasks are made. Default: `millrace-exec-<user id>` in the system's temporary folder. */
  readonly workDir?: string;
  readonly log?: Logger;
  readonly clock?: Clock;
}

/**
 * A runner that performs its capability with a program.
 *
 * @example
 * subprocess({
 *   capability: '/images/thumbnail/v1',
 *   command: 'convert',
 *   args: ['{input:photo}', '-thumbnail', '{meta:size=256}', '{output:thumbnail.png}'],
 *   inputs: ['photo'],
 * });
 *
 * `run` rejects with
 * - the TaskAbort of `ctx.signal`, once the program is gone;
 * - `internal` when it ended with another exit code than 0 or by a signal, with the last line of its stderr;
 * - `resource_exhausted` or `deadline_exceeded` for a limit, which the details name with its value;
 * - `not_found` or `permission_denied` for a program that cannot be started, `failed_precondition` for a sandbox that cannot be had;
 * - `invalid_argument` for inputs or meta that do not fit, and for outputs that are links or have names no artifact may have.
 *
 * Details have `ending`: `exit`, `signal`, `out_of_memory`, `limit`, `spawn_failed`, `sandbox_failed`, `output_missing`, `output_refused`.
 *
 * @throws MillraceError `invalid_argument`, naming the option.
 */
export function subprocess(options: SubprocessOptions): SubprocessRunner {
  checkCapability(options.capability);
  try {
    return new ProgramRunner({
      capability: options.capability,
      wish: sandboxWish(options.sandbox ?? {}, options.limits ?? {}),
      cgroupParent: options.sandbox?.cgroupParent,
      workDir: options.workDir,
      clock: options.clock,
      log: options.log,
      plan: planner(options),
    });
  } catch (error) {
    if (!MillraceError.is(error)) throw error;
    throw new MillraceError(error.code, `subprocess ${options.capability}: ${error.message}`, {
      cause: error.cause,
    });
  }
}

/** Checks everything that does not depend on a task. */
function planner(options: SubprocessOptions): (ctx: TaskContext) => Omit<AttemptPlan, 'sandbox'> {
  const { inputs, params, cwd = '', stdin = 'none' } = options;
  if (typeof options.command !== 'string' || options.command.trim() === '') {
    throw new MillraceError('invalid_argument', 'command cannot be empty');
  }
  if (cwd !== '' && !isAbsolute(cwd)) {
    throw new MillraceError('invalid_argument', `cwd must be an absolute path, got ${JSON.stringify(cwd)}`);
  }
  if (inputs !== undefined) checkInputNames('inputs', inputs);
  if (params !== undefined) checkRules(params);
  const args = parseArguments('args', options.args ?? [], 'refuse');
  const streamed = stdinInput(stdin, inputs);
  for (const name of namesIn(args, 'input')) {
    if (inputs !== undefined && !inputs.includes(name)) {
      throw new MillraceError(
        'invalid_argument',
        `args use {input:${name}}, which is not one of inputs (${inputs.join(', ')})`,
      );
    }
    if (name === streamed) {
      throw new MillraceError(
        'invalid_argument',
        `args use {input:${name}}, which is given as stdin and has no file`,
      );
    }
  }
  const undeclared = namesIn(args, 'meta').find((key) => params !== undefined && !Object.hasOwn(params, key));
  if (undeclared !== undefined) {
    throw new MillraceError('invalid_argument', `args use {meta:${undeclared}}, which params do not declare`);
  }
  const outputs = parseOutputs('outputs', options.outputs ?? [...new Set(namesIn(args, 'output'))]);
  const operatorEnv = operatorEnvironment(options.env ?? {}, options.envFrom ?? [], process.env);
  const limits = checkLimits('limits', options.limits ?? {});
  const fixed = {
    command: options.command,
    args,
    script: null,
    operatorEnv,
    taskEnv: {},
    cwd,
    outputs,
    limits,
    failOnNonZero: options.failOnNonZero ?? true,
    network: options.sandbox?.network ?? false,
    readable: options.sandbox?.readable ?? [],
    devices: options.sandbox?.devices ?? [],
  };
  return ({ lease: { task } }) => {
    const given = metaObject(task.meta);
    const meta = params === undefined ? given : checkParameters(params, given);
    checkMetaValues(args, meta);
    const cids = task.inputs_cids;
    const named = inputs === undefined ? null : nameInputs(cids, inputs);
    const read = readFrom(stdin, cids, named);
    const all =
      named === null
        ? cids.map((cid) => ({ cid, name: null }))
        : [...named].map(([name, cid]) => ({ cid, name }));
    return {
      ...fixed,
      meta,
      stdin: read,
      // What is streamed is not stored; without names that is the first.
      inputs:
        read.kind === 'input'
          ? all.filter(({ name }, index) => (named === null ? index > 0 : name !== streamed))
          : all,
    };
  };
}

/** The name of the input that is read from stdin, as far as it has one. */
function stdinInput(
  stdin: NonNullable<SubprocessOptions['stdin']>,
  inputs: readonly string[] | undefined,
): string | null {
  if (stdin === 'input') {
    if (inputs?.length === 0)
      throw new MillraceError('invalid_argument', 'stdin is an input, and inputs names none');
    return inputs?.[0] ?? null;
  }
  if (stdin === 'none') return null;
  if ('text' in stdin) return null;
  if (inputs?.includes(stdin.input) !== true) {
    throw new MillraceError(
      'invalid_argument',
      `stdin names input ${JSON.stringify(stdin.input)}, which is not one of inputs`,
    );
  }
  return stdin.input;
}

function readFrom(
  stdin: NonNullable<SubprocessOptions['stdin']>,
  cids: readonly string[],
  named: ReadonlyMap<string, string> | null,
): AttemptPlan['stdin'] {
  if (stdin === 'none') return { kind: 'none' };
  if (stdin !== 'input' && 'text' in stdin) return { kind: 'text', text: stdin.text };
  const cid = stdin === 'input' ? cids[0] : named?.get(stdin.input);
  if (cid === undefined)
    throw new MillraceError('invalid_argument', 'inputs_cids must name an input, it is read from stdin');
  return { kind: 'input', cid };
}
