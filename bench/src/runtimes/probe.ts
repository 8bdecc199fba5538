/** A runtime with commands that do nothing but what is measured: `none`, `events N`, `output BYTES`. */
import { defineRuntime, runRuntime } from '@millrace/runtime';

const CHUNK = Buffer.alloc(64 * 1024, 'x');

await runRuntime(
  defineRuntime({
    name: 'probe',
    version: '1.0.0',
    runCommand: (ctx, { entryPoint, args }) =>
      ctx.command(async (command) => {
        const count = Number(args[0]);
        if (entryPoint === 'events') {
          for (let index = 1; index <= count; index += 1) await command.counter('probe.events', index);
        } else if (entryPoint === 'output') {
          for (let left = count; left > 0; left -= CHUNK.length) await command.stdout(CHUNK);
        }
      }),
  }),
);
