/** How an operator says what sandbox programs of a runner get. */
import { isAbsolute } from 'node:path';
import { MillraceError } from '@millrace/runner';
import {
  SANDBOX_CONTROLS,
  SANDBOX_TIERS,
  type SandboxControl,
  type SandboxTier,
} from '../sandbox/controls.ts';
import type { SandboxWish } from '../sandbox/plan.ts';
import type { SubprocessLimits } from './limits.ts';

export interface SandboxOptions {
  /** Default `auto`: the highest that is available here. One that is named and not available fails every task. */
  readonly tier?: SandboxTier | 'auto';
  /**
   * Controls that must hold, or true for all: a task fails with `failed_precondition` when one cannot be had. Limits and
   * `network: false` that are given explicitly are required as well. Default: none; what is missing is in the record of each attempt.
   */
  readonly require?: boolean | readonly SandboxControl[];
  /** Default false: without network, in the tiers that can keep it away. */
  readonly network?: boolean;
  /** Files and folders that a `bwrap` sandbox shows besides the system's programs, read-only, by their absolute paths. */
  readonly readable?: readonly string[];
  /** Device files a `bwrap` sandbox lets through, such as `/dev/dri`. */
  readonly devices?: readonly string[];
  /** Default `auto`: a control group where one can be made, in every tier but `none`. */
  readonly cgroup?: 'auto' | 'off' | 'require';
  /** Folder of a version 2 control group that is delegated to the node's user. Default: the node's own, or the one above it. */
  readonly cgroupParent?: string;
}

/** The controls that a limit needs to be more than a wish. The others hold in every tier. */
const CONTROL_OF: Partial<Record<keyof SubprocessLimits, SandboxControl>> = {
  processes: 'processes',
  openFiles: 'open_files',
};

/** @throws MillraceError `invalid_argument`, naming the member. */
export function sandboxWish(options: SandboxOptions, explicitLimits: Partial<SubprocessLimits>): SandboxWish {
  const refuse = (rule: string): never => {
    throw new MillraceError('invalid_argument', `sandbox.${rule}`);
  };
  const { tier = 'auto', require = false, network = false, cgroup = 'auto' } = options;
  if (tier !== 'auto' && !SANDBOX_TIERS.includes(tier)) {
    refuse(`tier must be auto, ${SANDBOX_TIERS.join(', ')}, got ${JSON.stringify(tier)}`);
  }
  if (!['auto', 'off', 'require'].includes(cgroup)) {
    refuse(`cgroup must be auto, off or require, got ${JSON.stringify(cgroup)}`);
  }
  const named = require === true ? SANDBOX_CONTROLS : require === false ? [] : require;
  const unknown = named.find((control) => !SANDBOX_CONTROLS.includes(control));
  if (unknown !== undefined) {
    refuse(`require must be of ${SANDBOX_CONTROLS.join(', ')}, got ${JSON.stringify(unknown)}`);
  }
  if (network && require !== true && named.includes('network')) {
    refuse('require names network, which network: true gives');
  }
  for (const key of ['readable', 'devices'] as const) {
    const relative = options[key]?.find((path) => !isAbsolute(path));
    if (relative !== undefined) refuse(`${key} must be absolute paths, got ${JSON.stringify(relative)}`);
  }
  const explicit = (Object.keys(explicitLimits) as (keyof SubprocessLimits)[]).flatMap((limit) => {
    const control = explicitLimits[limit] === undefined ? undefined : CONTROL_OF[limit];
    return control === undefined ? [] : [control];
  });
  if (options.network === false) explicit.push('network');
  return { tier, network, cgroup, require: [...new Set([...named, ...explicit])] };
}
