/**
 * A node as a process of its own, with one runner. What it says on stderr tells, among the rest, which endings the
 * dispatcher has accepted.
 */
import { createHash, randomUUID } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { pipeline } from 'node:stream/promises';
import { createNode, parseNodeEnv } from '@millrace/node';
import { MillraceError, defineRunner, sleep, systemClock } from '@millrace/runner';
import { settings, wrongClock } from './child.ts';
import { CAPABILITY, NONCE_PREFIX, OUTPUT, outputBytes, type Work } from './work.ts';

export interface NodeSettings {
  readonly env: Readonly<Record<string, string>>;
  readonly workDir: string;
  readonly clockOffsetMs: number;
}

const { env, workDir, clockOffsetMs } = settings() as NodeSettings;

const runner = defineRunner({
  capability: CAPABILITY,
  async run(ctx) {
    const { inputs_cids: inputs, meta, id } = ctx.lease.task;
    const { sha256, workMs, bytes } = meta as unknown as Work;
    for (const cid of inputs) {
      const file = await ctx.input.materializeCidToTemp(cid);
      const hash = createHash('sha256');
      await pipeline(createReadStream(file), hash);
      const found = hash.digest('hex');
      if (sha256 !== null && found !== sha256) {
        throw new MillraceError('data_loss', `input ${cid} must have the SHA-256 ${sha256}, got ${found}`);
      }
    }
    await ctx.ctrl.progress({ inputs: inputs.length });
    await sleep(systemClock, workMs, ctx.signal);
    // Under one name in every attempt, but with bytes of this one. Which attempt was accepted, its report says by this name.
    const nonce = randomUUID();
    await ctx.output.putBytes(OUTPUT, outputBytes({ taskId: id, nonce, bytes }));
    await ctx.output.putBytes(`${NONCE_PREFIX}${nonce}`, Buffer.from(nonce));
    ctx.log.info('work is done', { nonce });
  },
});

const node = createNode({
  config: parseNodeEnv(env),
  runners: [runner],
  workDir,
  drainMs: 1_000,
  clock: wrongClock(clockOffsetMs),
});
process.once('SIGTERM', () => node.stop());
await node.run();
process.disconnect();
