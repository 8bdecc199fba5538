/** Streams its input back out as `copy.bin`. */
import { defineRunner } from '@millrace/runner';

export default defineRunner({
  capability: '/test/copy/v1',
  async run(ctx) {
    await ctx.output.putStream('copy.bin', await ctx.input.openRead(ctx.lease.task.inputs_cids[0]!));
  },
});
