/** What `peers/notes.ts` says, as a runner; the task's meta is the payload. */
import { defineRunner } from '@millrace/runner';
import { performNoted, type NotedTask } from '../peers/notes.ts';

export default defineRunner({
  capability: '/bench/noted/v1',
  async run(ctx) {
    const { noted } = ctx.lease.task.meta as unknown as { noted: NotedTask };
    await performNoted(noted);
  },
});
