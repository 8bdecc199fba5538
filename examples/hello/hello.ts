/** Counts the lines and words of its inputs. Inputs are read as streams, so their size does not matter. */
import { createInterface } from 'node:readline';
import { defineRunner } from '@millrace/runner';

export default defineRunner({
  capability: '/examples/hello/v1',
  async run(ctx) {
    const inputs = ctx.lease.task.inputs_cids;
    const counts = [];
    for (const cid of inputs) {
      let lines = 0;
      let words = 0;
      for await (const line of createInterface({ input: await ctx.input.openRead(cid) })) {
        lines += 1;
        words += line.split(/\s+/).filter((word) => word !== '').length;
      }
      counts.push({ input: cid, lines, words });
      await ctx.ctrl.progress({ done: counts.length, total: inputs.length });
    }
    ctx.log.info('counted', { inputs: inputs.length });
    await ctx.output.putBytes('counts.json', Buffer.from(JSON.stringify(counts, null, 2)));
  },
});
