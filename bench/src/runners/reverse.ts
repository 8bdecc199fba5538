/** A small task with an input and an artifact of other bytes: those of its first input backwards. For the cost of one task. */
import { defineRunner } from '@millrace/runner';

export default defineRunner({
  capability: '/bench/reverse/v1',
  async run(ctx) {
    const [cid] = ctx.lease.task.inputs_cids;
    if (cid === undefined) throw new Error('the task names no input');
    await ctx.output.putBytes('answer', (await ctx.input.getBytesByCid(cid)).toReversed());
  },
});
