/** Binds one container image to one capability. */
import { posix } from 'node:path';
import { MillraceError, checkCapability } from '@millrace/runner';
import type { TaskContext } from '@millrace/runner';
import { namesIn, parseArguments } from '../subprocess/arguments.ts';
import { metaObject } from '../subprocess/attempt.ts';
import { operatorEnvironment } from '../subprocess/environment.ts';
import { checkInputNames, nameInputs } from '../subprocess/inputs.ts';
import { parseOutputs } from '../subprocess/outputs.ts';
import { checkParameters, checkRules } from '../subprocess/parameters.ts';
import type { Parameter } from '../subprocess/parameters.ts';
import type { ContainerPlan } from './attempt.ts';
import { DEFAULT_TMPFS_BYTES, INSIDE } from './config.ts';
import { ImageRunner } from './container-runner.ts';
import type { ContainerRunner, ContainerRunnerSettings } from './container-runner.ts';
import { parseImage } from './image-reference.ts';
import { checkContainerLimits } from './limits.ts';
import type { ContainerLimits } from './limits.ts';

/** How a container is closed off, and how it is ended. */
export interface ContainmentOptions {
  /** Its environment, on top of the image's and MILLRACE_*. Default none. */
  readonly env?: Readonly<Record<string, string>>;
  /** Variables of the node's own environment it is given, by name. Each must be set. Default none. */
  readonly envFrom?: readonly string[];
  readonly limits?: Partial<ContainerLimits>;
  /** Whether it has a network: the engine's default one. Default false: none but its own loopback. */
  readonly network?: boolean;
  /**
   * Whether it can write to nothing but its outputs and its tmpfs folders. Default true. What it writes to a root that is not read-only goes
   * to the engine's disk, without a limit.
   */
  readonly readOnlyRoot?: boolean;
  /**
   * `UID:GID`, or a name the image knows. Default: the node's own user; `65534:65534` (nobody) when that is root; root, which is the engine's
   * user, on an engine that runs without root.
   */
  readonly user?: string;
  /** Folders in memory it can write to, with their size in MiB. Default `{ '/tmp': 64 }`. Volumes the image declares become such folders. */
  readonly tmpfs?: Readonly<Record<string, number>>;
  /** What it is told to end with. Default `SIGTERM`. The first process of a container ignores what it does not handle. */
  readonly stopSignal?: string;
}

export interface ContainerOptions extends ContainmentOptions, ContainerRunnerSettings {
  /** The kind of work this image does. */
  readonly capability: string;
  /** `NAME[:TAG][@sha256:DIGEST]`, or `sha256:ID`. */
  readonly image: string;
  /** Refuse an image that is not named by its digest or id. Default false. */
  readonly requireDigest?: boolean;
  /** Instead of the image's entry point; the image's command is then not used. Default: the image's. Placeholders as in `args`. */
  readonly command?: readonly string[];
  /**
   * Instead of the image's command. Placeholders: `{input:NAME}`, `{inputs}`, `{output:NAME}`, `{outdir}`, `{workdir}`, `{meta:KEY}`,
   * `{meta:KEY=DEFAULT}`; doubled braces stand for themselves. Default: the image's.
   */
  readonly args?: readonly string[];
  /** Where it starts. Default: the image's. */
  readonly workdir?: string;
  /**
   * File names for the task's inputs, in the order of its `inputs_cids`; a task with another number of inputs fails. Default: any
   * number, under the names they are stored by. They are in `$MILLRACE_INPUTS`, read-only.
   */
  readonly inputs?: readonly string[];
  /**
   * What is uploaded when the program ended well, as globs relative to `$MILLRACE_OUTPUTS`. A plain name must be there; a pattern may match
   * nothing. Default: the `{output:NAME}` of the arguments.
   */
  readonly outputs?: readonly string[];
  /** What each value of `meta` that the arguments use must be. Default: any text, number or boolean that is no option. */
  readonly params?: Readonly<Record<string, Parameter>>;
  /** False: any exit code, and any signal, is a success. Default true. */
  readonly failOnNonZero?: boolean;
}

/**
 * A runner that performs its capability with a container image, on Docker, Podman or another engine with Docker's API on this machine. Nothing is
 * contacted before the first task.
 *
 * @example
 * container({
 *   capability: '/images/thumbnail/v1',
 *   image: 'registry.example/imagemagick@sha256:…',
 *   command: ['convert'],
 *   args: ['{input:photo}', '-thumbnail', '{meta:size=256}', '{output:thumbnail.png}'],
 *   inputs: ['photo'],
 * });
 *
 * `run` settles when the container is proven to be removed. It rejects with
 * - the TaskAbort of `ctx.signal`;
 * - `internal` when the program ended with another exit code than 0 or by a signal, with the last line of its stderr;
 * - `resource_exhausted` or `deadline_exceeded` for a limit, which the details name with its value;
 * - `not_found` for a missing image or program, with what to do; `failed_precondition` for what the engine refuses to start;
 * - `unavailable` when there is no engine, or it went away; the message says so when a container may be left;
 * - `invalid_argument` for inputs or meta that do not fit, and for outputs that are links or have names no artifact may have.
 *
 * Details have `ending`: `exit`, `signal`, `out_of_memory` (with its `evidence`), `limit`, `spawn_failed`, `sandbox_failed`, `lost`, `output_missing`,
 * `output_refused`.
 *
 * @throws MillraceError `invalid_argument`, naming the option.
 */
export function container(options: ContainerOptions): ContainerRunner {
  checkCapability(options.capability);
  try {
    return new ImageRunner(options.capability, options, planner(options));
  } catch (error) {
    if (!MillraceError.is(error)) throw error;
    throw new MillraceError(error.code, `container ${options.capability}: ${error.message}`, {
      cause: error.cause,
    });
  }
}

/** Checks everything that does not depend on a task. */
function planner(options: ContainerOptions): (ctx: TaskContext) => ContainerPlan {
  const { inputs, params } = options;
  const image = parseImage(options.image, 'image');
  if (options.requireDigest === true && image.digest === null) {
    throw new MillraceError(
      'invalid_argument',
      `image ${image.text} must be named by its digest (NAME@sha256:…), requireDigest is set; "docker image inspect" shows it as RepoDigests`,
    );
  }
  if (inputs !== undefined) checkInputNames('inputs', inputs);
  if (params !== undefined) checkRules(params);
  if (options.command?.length === 0) {
    throw new MillraceError('invalid_argument', "command cannot be empty; leave it out for the image's own");
  }
  const command = options.command === undefined ? null : parseArguments('command', options.command, 'refuse');
  const args = options.args === undefined ? null : parseArguments('args', options.args, 'refuse');
  const templates = [...(command ?? []), ...(args ?? [])];
  const unnamed = namesIn(templates, 'input').find((name) => inputs !== undefined && !inputs.includes(name));
  if (unnamed !== undefined) {
    throw new MillraceError(
      'invalid_argument',
      `args use {input:${unnamed}}, which is not one of inputs (${inputs!.join(', ')})`,
    );
  }
  const undeclared = namesIn(templates, 'meta').find(
    (key) => params !== undefined && !Object.hasOwn(params, key),
  );
  if (undeclared !== undefined) {
    throw new MillraceError('invalid_argument', `args use {meta:${undeclared}}, which params do not declare`);
  }
  if (options.workdir !== undefined) checkInside('workdir', options.workdir);
  const fixed = {
    ...containment(options),
    image,
    command,
    args,
    taskEnv: {},
    workdir: options.workdir ?? null,
    outputs: parseOutputs('outputs', options.outputs ?? [...new Set(namesIn(templates, 'output'))]),
    failOnNonZero: options.failOnNonZero ?? true,
  };
  return ({ lease: { task } }) => {
    const meta = metaObject(task.meta);
    const cids = task.inputs_cids;
    return {
      ...fixed,
      meta: params === undefined ? meta : checkParameters(params, meta),
      inputs:
        inputs === undefined
          ? cids.map((cid) => ({ cid, name: null }))
          : [...nameInputs(cids, inputs)].map(([name, cid]) => ({ cid, name })),
    };
  };
}

/** The options that are the operator's in both runners, checked. @throws MillraceError `invalid_argument` */
export function containment(
  options: ContainmentOptions,
): Pick<
  ContainerPlan,
  'operatorEnv' | 'limits' | 'network' | 'readOnlyRoot' | 'user' | 'tmpfs' | 'stopSignal'
> {
  const { stopSignal = 'SIGTERM', user, tmpfs = {} } = options;
  if (!/^(SIG[A-Z0-9+-]{1,12}|[1-9]\d?)$/.test(stopSignal)) {
    throw new MillraceError(
      'invalid_argument',
      `stopSignal must be a name such as SIGTERM, got ${JSON.stringify(stopSignal)}`,
    );
  }
  if (user !== undefined && !/^[A-Za-z0-9_][A-Za-z0-9_.-]*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?$/.test(user)) {
    throw new MillraceError(
      'invalid_argument',
      `user must be UID, UID:GID or a name, got ${JSON.stringify(user)}`,
    );
  }
  const folders = Object.entries(tmpfs).map(([path, mib]): [string, number] => {
    checkInside(`tmpfs: ${path}`, path);
    if (!Number.isSafeInteger(mib) || mib < 1) {
      throw new MillraceError(
        'invalid_argument',
        `tmpfs: ${path} must have a size of a whole number of MiB, got ${JSON.stringify(mib)}`,
      );
    }
    return [path, mib * 1024 ** 2];
  });
  return {
    operatorEnv: operatorEnvironment(options.env ?? {}, options.envFrom ?? [], process.env),
    limits: checkContainerLimits('limits', options.limits),
    network: options.network ?? false,
    readOnlyRoot: options.readOnlyRoot ?? true,
    user: user ?? null,
    tmpfs: new Map([
      ...(Object.hasOwn(tmpfs, '/tmp') ? [] : [['/tmp', DEFAULT_TMPFS_BYTES] as const]),
      ...folders,
    ]),
    stopSignal,
  };
}

function checkInside(what: string, path: string): void {
  const refuse = (rule: string): never => {
    throw new MillraceError('invalid_argument', `${what} ${rule}, got ${JSON.stringify(path)}`);
  };
  if (
    typeof path !== 'string' ||
    !path.startsWith('/') ||
    path === '/' ||
    posix.normalize(path) !== path ||
    path.endsWith('/')
  ) {
    refuse('must be an absolute path in the container, without "." or ".." and not "/"');
  }
  if (/[\p{Cc}:,]/u.test(path)) refuse('must not contain control characters, ":" or ","');
  const ours = posix.dirname(INSIDE.outputs);
  const hidden = what !== 'workdir' && (path === ours || path.startsWith(`${ours}/`));
  if (hidden) refuse(`must not be in ${ours}, where the inputs and outputs are`);
}
