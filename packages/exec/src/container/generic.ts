/** The ready-made capability for any image the operator allows. */
import { MillraceError, checkCapability } from '@millrace/runner';
import type { TaskContext } from '@millrace/runner';
import { parseArguments } from '../subprocess/arguments.ts';
import { metaObject } from '../subprocess/attempt.ts';
import { nameInputs } from '../subprocess/inputs.ts';
import { parseOutputs } from '../subprocess/outputs.ts';
import type { ContainerPlan } from './attempt.ts';
import { containment } from './container.ts';
import type { ContainmentOptions } from './container.ts';
import { parseContainerKind } from './container-kind.ts';
import { ImageRunner } from './container-runner.ts';
import type { ContainerRunner, ContainerRunnerSettings } from './container-runner.ts';
import { imageMatches } from './image-reference.ts';
import { lowerContainerLimits } from './limits.ts';

/** The capability of {@link containerRunner} unless it is given another. */
export const CONTAINER_CAPABILITY = '/exec/container/v1';

export interface ContainerRunnerOptions extends ContainmentOptions, ContainerRunnerSettings {
  /**
   * The images tasks may name, compared with the whole reference as it is written: `*` stands for any characters but `/`, `**` for any at all. There must
   * be at least one. An image under a moving tag is whatever its registry says; with `requireDigest` tasks must say which one.
   */
  readonly allow: readonly string[];
  /** Refuse images that are not named by their digest or id. Default false. */
  readonly requireDigest?: boolean;
  /** Names of environment variables tasks may set. Default `*`: all, as nothing of the node is in a container. */
  readonly allowEnv?: readonly string[];
  /** The most a task may have, and what it has unless it asks for less. */
  readonly limits?: ContainmentOptions['limits'];
  /** Whether tasks that ask for a network get one; others have none in any case. Default false: they are refused. */
  readonly network?: boolean;
  /** Default {@link CONTAINER_CAPABILITY}. */
  readonly capability?: string;
}

/**
 * A runner whose tasks say themselves, in their `meta`, which image is to be run; see `docs/containers.md` for its members. `run` rejects as that of
 * `container` does, and with `permission_denied` for an image, a variable or a network that is not allowed.
 *
 * @throws MillraceError `invalid_argument`, naming the option.
 */
export function containerRunner(options: ContainerRunnerOptions): ContainerRunner {
  const { capability = CONTAINER_CAPABILITY, allow } = options;
  checkCapability(capability);
  if (
    !Array.isArray(allow) ||
    allow.length === 0 ||
    allow.some((pattern) => typeof pattern !== 'string' || pattern === '')
  ) {
    throw new MillraceError(
      'invalid_argument',
      `${capability}: allow must list the images that tasks may run, such as "debian:12" or "registry.example/team/*"; without any, leave the runner out`,
    );
  }
  const fixed = containment(options);
  return new ImageRunner(capability, options, (ctx) => plan(ctx, options, fixed));
}

function plan(
  { lease: { task } }: TaskContext,
  options: ContainerRunnerOptions,
  fixed: ReturnType<typeof containment>,
): ContainerPlan {
  const { allow, allowEnv = ['*'], requireDigest = false } = options;
  const kind = parseContainerKind(task.meta);
  if (!allow.some((pattern) => imageMatches(pattern, kind.image))) {
    throw new MillraceError(
      'permission_denied',
      `image ${kind.image.text} is not allowed on this node; allowed: ${allow.join(', ')}`,
    );
  }
  if (requireDigest && kind.image.digest === null) {
    throw new MillraceError(
      'permission_denied',
      `image ${kind.image.text} must be named by its digest (NAME@sha256:…) on this node`,
    );
  }
  const variable = Object.keys(kind.env).find((name) => !allowEnv.includes(name) && !allowEnv.includes('*'));
  if (variable !== undefined) {
    throw new MillraceError(
      'permission_denied',
      `meta.env: variable ${variable} is not allowed on this node; allowed: ${allowEnv.join(', ') || 'none'}`,
    );
  }
  if (kind.network && !fixed.network) {
    throw new MillraceError('permission_denied', 'meta.network: containers have no network on this node');
  }
  const cids = task.inputs_cids;
  return {
    ...fixed,
    image: kind.image,
    command: kind.command === null ? null : parseArguments('meta.command', kind.command, 'text'),
    args: kind.args === null ? null : parseArguments('meta.args', kind.args, 'text'),
    taskEnv: kind.env,
    workdir: kind.workdir,
    network: kind.network,
    inputs:
      kind.inputs === null
        ? cids.map((cid) => ({ cid, name: null }))
        : [...nameInputs(cids, kind.inputs)].map(([name, cid]) => ({ cid, name })),
    outputs: parseOutputs('meta.outputs', kind.outputs),
    limits: lowerContainerLimits('meta.limits', fixed.limits, kind.limits),
    failOnNonZero: kind.failOnNonZero,
    meta: metaObject(task.meta),
  };
}
