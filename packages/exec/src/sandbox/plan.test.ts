import { describe, expect, test } from 'vitest';
import type { SandboxControl, SandboxReport } from './controls.ts';
import { planSandbox, type SandboxWish } from './plan.ts';

const WATCHED = { wall: 'timer', memory: 'watched', cpu: 'watched', disk: 'watched' };
const REPORT: SandboxReport = {
  tiers: [
    { tier: 'none', available: true, reason: null, controls: WATCHED },
    { tier: 'limits', available: true, reason: null, controls: { ...WATCHED, open_files: 'rlimit' } },
    {
      tier: 'namespaces',
      available: true,
      reason: null,
      controls: { ...WATCHED, open_files: 'rlimit', privileges: 'x', kill: 'x', network: 'x' },
    },
    {
      tier: 'bwrap',
      available: false,
      reason: 'program bwrap is not on PATH; install bubblewrap',
      controls: {},
    },
  ],
  cgroup: { available: true, reason: null, version: 2, controls: { memory: 'cgroup', processes: 'cgroup' } },
  best: 'namespaces',
  warnings: [],
};

function wish(given: Partial<SandboxWish>): SandboxWish {
  return { tier: 'auto', require: [], network: false, cgroup: 'auto', ...given };
}

describe('choosing a sandbox', () => {
  test('auto is the highest tier there is, and the record says what holds and what is missing', () => {
    const plan = planSandbox(wish({}), REPORT);
    expect(plan.applied).toEqual({
      tier: 'namespaces',
      cgroup: true,
      controls: { ...REPORT.tiers[2]!.controls, memory: 'cgroup', processes: 'cgroup' },
    });
    expect(plan.asked.tier).toBe('auto');
    expect(plan.missing).toEqual(['filesystem']);
  });

  test('a tier that is named and not there is refused with its reason', () => {
    expect(() => planSandbox(wish({ tier: 'bwrap' }), REPORT)).toThrow(
      'sandbox tier bwrap is not available on this machine: program bwrap is not on PATH; install bubblewrap',
    );
  });

  test.each<[Partial<SandboxWish>, SandboxControl, RegExp]>([
    [
      { tier: 'limits', require: ['network'] },
      'network',
      /tier limits does not have it on this machine; tier namespaces has it here/,
    ],
    [{ require: ['filesystem'] }, 'filesystem', /nothing on this machine has it; see "millrace doctor"/],
    [{ cgroup: 'off', require: ['processes'] }, 'processes', /a control group has it here/],
  ])('%j is refused for %s', (given, control, message) => {
    expect(() => planSandbox(wish(given), REPORT)).toThrow(message);
    expect(() => planSandbox(wish(given), REPORT)).toThrow(`sandbox control ${control} is required`);
  });

  test('what is required and there is fine', () => {
    const plan = planSandbox(wish({ require: ['kill', 'network', 'processes'] }), REPORT);
    expect(plan.asked.required).toEqual(['kill', 'network', 'processes']);
  });

  test('with network, its absence is neither asked for nor applied nor missing', () => {
    const plan = planSandbox(wish({ network: true, require: ['network'] }), REPORT);
    expect(plan.asked.controls).not.toContain('network');
    expect(plan.applied.controls.network).toBeUndefined();
    expect(plan.missing).not.toContain('network');
  });

  test('tier none has a control group only if it is required', () => {
    expect(planSandbox(wish({ tier: 'none' }), REPORT).applied.cgroup).toBe(false);
    expect(planSandbox(wish({ tier: 'none', cgroup: 'require' }), REPORT).applied.cgroup).toBe(true);
    const without = {
      ...REPORT,
      cgroup: { available: false, reason: 'read-only', version: null, controls: {} },
    };
    expect(() => planSandbox(wish({ cgroup: 'require' }), without)).toThrow(
      'sandbox control cgroup is required and not available on this machine: read-only',
    );
  });
});
