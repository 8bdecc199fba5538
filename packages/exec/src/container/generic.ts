/** The ready-made capability for any image the operator allows. */
import { MillraceError, checkCapability } from '@millrace/runner';
import type { TaskContext, TaskSpec as LeasedTask } from '@millrace/runner';
import { mergeEnv } from '@millrace/runner/model';
import type { ContainerKind } from '@millrace/runner/model';
import { RunnerError, nameOfCapability } from '@millrace/runner/plugin';
import type { KindRunner, RunnerPlugin } from '@millrace/runner/plugin';
import { parseArguments } from '../subprocess/arguments.ts';
import { metaObject } from '../subprocess/attempt.ts';
import { nameInputs } from '../subprocess/inputs.ts';
import { parseOutputs } from '../subprocess/outputs.ts';
import type { ContainerPlan } from './attempt.ts';
import { containment } from './container.ts';
import type { ContainmentOptions } from './container.ts';
import { checkAllowedEnv, lentEnvironment } from '../subprocess/kind-plugin.ts';
import { containerExtras, containerKindOf } from './container-kind.ts';
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
  /** Its name in run ids; no two runners of a node may have one name. Default `container`, or one made of the capability. */
  readonly name?: string;
  /** Default {@link CONTAINER_CAPABILITY}. */
  readonly capability?: string;
}

/**
 * A runner whose tasks say themselves, in their `meta`, which image is to be run; see `docs/containers.md` for its members. `run` rejects as that of
 * `container` does, and with `permission_denied` for an image, a variable or a network that is not allowed.
 *
 * @throws MillraceError `invalid_argument`, naming the option.
 */
export function containerRunner(options: ContainerRunnerOptions): ContainerRunner & KindRunner {
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
  const kindOf = (task: Pick<LeasedTask, 'meta'>): ContainerKind => containerKindOf(task.meta);
  const images = new ImageRunner(capability, options, (ctx) =>
    planner(kindOf(ctx.lease.task), options, fixed, {})(ctx),
  );
  const name =
    options.name ?? (capability === CONTAINER_CAPABILITY ? 'container' : nameOfCapability(capability));
  const plugin: RunnerPlugin = {
    name,
    supports: (spec) => spec.kind.type === 'container',
    buildTask({ kind }, context, runId) {
      if (kind.type !== 'container') throw RunnerError.unsupportedKind(name, kind.type);
      const plan = RunnerError.specified(() => planner(kind, options, fixed, lentEnvironment(context)));
      return { name: runId.name, run: (ctx) => images.perform(ctx, plan) };
    },
  };
  return Object.assign(images, { plugin, kindOf });
}

/** Checks everything that does not depend on the lease. `lent`: variables of the operator for all runners. */
function planner(
  kind: ContainerKind,
  options: ContainerRunnerOptions,
  contained: ReturnType<typeof containment>,
  lent: Readonly<Record<string, string>>,
): (ctx: TaskContext) => ContainerPlan {
  const { allow, allowEnv = ['*'], requireDigest = false } = options;
  const extras = containerExtras(kind, 'meta');
  const { image } = extras;
  if (!allow.some((pattern) => imageMatches(pattern, image))) {
    throw new MillraceError(
      'permission_denied',
      `image ${image.text} is not allowed on this node; allowed: ${allow.join(', ')}`,
    );
  }
  if (requireDigest && image.digest === null) {
    throw new MillraceError(
      'permission_denied',
      `image ${image.text} must be named by its digest (NAME@sha256:…) on this node`,
    );
  }
  checkAllowedEnv(kind.env, allowEnv);
  if (extras.network && !contained.network) {
    throw new MillraceError('permission_denied', 'meta.network: containers have no network on this node');
  }
  const fixed = {
    ...contained,
    image,
    command: kind.command === null ? null : parseArguments('meta.command', kind.command, 'text'),
    args: kind.args.length === 0 ? null : parseArguments('meta.args', kind.args, 'text'),
    operatorEnv: { ...lent, ...contained.operatorEnv },
    taskEnv: mergeEnv(kind.env, []),
    workdir: extras.workdir,
    network: extras.network,
    outputs: parseOutputs('meta.outputs', extras.outputs),
    limits: lowerContainerLimits('meta.limits', contained.limits, extras.limits),
    failOnNonZero: extras.failOnNonZero,
  };
  return ({ lease: { task } }) => ({
    ...fixed,
    inputs:
      extras.inputs === null
        ? task.inputs_cids.map((cid) => ({ cid, name: null }))
        : [...nameInputs(task.inputs_cids, extras.inputs)].map(([name, cid]) => ({ cid, name })),
    meta: metaObject(task.meta),
  });
}
