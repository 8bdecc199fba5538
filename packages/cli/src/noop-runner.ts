/** What `ENABLE_NOOP` adds: a runner to try a node with. It only waits, so it may do that on the engine's thread. */
import { defineRunner, sleep, systemClock, type Runner } from '@millrace/runner';

export function noopRunner(sleepMs: number): Runner {
  return defineRunner({
    capability: '/millrace/noop/v1',
    async run(ctx) {
      await sleep(systemClock, sleepMs, ctx.signal);
    },
  });
}
