/** Tells the moment it was entered, on a channel every thread of the process can hear. For the latency figures. */
import { BroadcastChannel } from 'node:worker_threads';
import { defineRunner } from '@millrace/runner';

const channel = new BroadcastChannel('millrace-note-start');
channel.unref();

export default defineRunner({
  capability: '/bench/note-start/v1',
  async run(ctx) {
    channel.postMessage({ taskId: ctx.lease.task.id, atMs: performance.timeOrigin + performance.now() });
  },
});
