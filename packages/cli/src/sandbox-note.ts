/** What a node with programs among its runners says at its start: which sandboxes this machine allows. */
import { describeError, type Logger, type Runner } from '@millrace/runner';

/** One line, when the probe is done; it does not keep the node waiting. Nothing without subprocess runners. */
export async function logSandbox(runners: readonly Runner[], log: Logger): Promise<void> {
  if (!runners.some((runner) => runner.type === 'subprocess')) return;
  try {
    const { probeSandbox } = await import('@millrace/exec');
    const { tiers, cgroup, best } = await probeSandbox();
    log.info('sandbox tiers available', {
      tiers: tiers.filter(({ available }) => available).map(({ tier }) => tier),
      best,
      cgroup: cgroup.available,
    });
  } catch (error) {
    log.warn('sandboxes could not be probed', { error: describeError(error) });
  }
}
