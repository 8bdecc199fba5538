/**
 * Blocks its thread without ever yielding, for `meta.ms` milliseconds (null: for ever), and shows on the disk that it
 * still runs: the file `meta.pulse` grows by a byte every 20 ms.
 */
import { appendFileSync } from 'node:fs';
import { defineRunner } from '@millrace/runner';

export default defineRunner({
  capability: '/test/spin/v1',
  async run(ctx) {
    const { ms, pulse } = ctx.lease.task.meta as { ms: number | null; pulse: string };
    await ctx.ctrl.progress({ spinning: true });
    const end = ms === null ? Infinity : performance.now() + ms;
    let nextPulse = 0;
    while (performance.now() < end) {
      if (performance.now() < nextPulse) continue;
      appendFileSync(pulse, '.');
      nextPulse = performance.now() + 20;
    }
  },
});
