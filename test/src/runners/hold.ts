/**
 * Works until the file `go` is in the folder `meta.folder`, and shows on the disk how it is: each run has a file of its own there,
 * which grows while it works and says at last how it ended.
 */
import { randomUUID } from 'node:crypto';
import { appendFileSync, existsSync } from 'node:fs';
import path from 'node:path';
import { defineRunner } from '@millrace/runner';

export default defineRunner({
  capability: '/test/hold/v1',
  async run(ctx) {
    const { folder } = ctx.lease.task.meta as { folder: string };
    const run = path.join(folder, `run-${randomUUID()}`);
    while (!existsSync(path.join(folder, 'go'))) {
      if (ctx.signal.aborted) {
        appendFileSync(run, `stopped: ${(ctx.signal.reason as { readonly reason: string }).reason}`);
        throw ctx.signal.reason;
      }
      appendFileSync(run, '.');
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    ctx.log.info('at last');
    appendFileSync(run, 'done');
  },
});
