/** Chooses the tier of a task, and says what of the controls that were asked for will hold. */
import { MillraceError } from '@millrace/runner';
import {
  SANDBOX_CONTROLS,
  type AppliedControls,
  type SandboxControl,
  type SandboxReport,
  type SandboxTier,
} from './controls.ts';

export interface SandboxWish {
  readonly tier: SandboxTier | 'auto';
  /** Controls without which the task must not run. */
  readonly require: readonly SandboxControl[];
  readonly network: boolean;
  readonly cgroup: 'auto' | 'off' | 'require';
}

/** For the record of the attempt: what was asked for and what holds. */
export interface SandboxRecord {
  readonly asked: {
    readonly tier: SandboxTier | 'auto';
    readonly controls: readonly SandboxControl[];
    readonly required: readonly SandboxControl[];
  };
  readonly applied: {
    readonly tier: SandboxTier;
    readonly cgroup: boolean;
    readonly controls: AppliedControls;
  };
  /** Asked for, and not to be had in this tier on this machine. */
  readonly missing: readonly SandboxControl[];
}

/**
 * @throws MillraceError `failed_precondition` naming the tier or the control that cannot be had, why, and what to do.
 */
export function planSandbox(wish: SandboxWish, report: SandboxReport): SandboxRecord {
  const tier = wish.tier === 'auto' ? report.best : wish.tier;
  const entry = report.tiers.find((candidate) => candidate.tier === tier);
  if (entry?.available !== true) {
    throw new MillraceError(
      'failed_precondition',
      `sandbox tier ${tier} is not available on this machine: ${entry?.reason ?? 'it was not tried'}`,
      { details: { ending: 'sandbox_failed', control: tier } },
    );
  }
  if (wish.cgroup === 'require' && !report.cgroup.available) {
    throw new MillraceError(
      'failed_precondition',
      `sandbox control cgroup is required and not available on this machine: ${report.cgroup.reason}`,
      { details: { ending: 'sandbox_failed', control: 'cgroup' } },
    );
  }
  const cgroup =
    report.cgroup.available && wish.cgroup !== 'off' && (tier !== 'none' || wish.cgroup === 'require');
  const controls: Partial<Record<SandboxControl, string>> = {
    ...entry.controls,
    ...(cgroup ? report.cgroup.controls : {}),
  };
  if (wish.network) delete controls.network;
  const asked = SANDBOX_CONTROLS.filter((control) => control !== 'network' || !wish.network);
  const missing = asked.filter((control) => controls[control] === undefined);
  const refused = missing.find((control) => wish.require.includes(control));
  if (refused !== undefined) {
    const advice = adviceFor(refused, report);
    throw new MillraceError(
      'failed_precondition',
      `sandbox control ${refused} is required, and tier ${tier} does not have it on this machine; ${advice}`,
      { details: { ending: 'sandbox_failed', control: refused, tier } },
    );
  }
  return {
    asked: {
      tier: wish.tier,
      controls: asked,
      required: wish.require.filter((control) => asked.includes(control)),
    },
    applied: { tier, cgroup, controls },
    missing,
  };
}

function adviceFor(control: SandboxControl, { tiers, cgroup }: SandboxReport): string {
  const able = tiers.filter(({ controls }) => controls[control] !== undefined).map(({ tier }) => tier);
  if (able.length > 0) return `tier ${able.join(' or ')} has it here`;
  if (cgroup.controls[control] !== undefined) return 'a control group has it here';
  const hint =
    control === 'processes'
      ? 'it takes a control group, or a node that does not run as root'
      : 'nothing on this machine has it';
  return `${hint}; see "millrace doctor"`;
}
