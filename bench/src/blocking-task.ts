/**
 * W5: a task that keeps its thread for a minute, as a native call or a long loop does, with two workers and the settings each
 * system comes with. Right is: begun once, ended once, completed. All systems run at the same time; the thread sleeps, so that
 * they do not compete for the processor.
 */
import { rm, mkdtemp } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import type { Figure } from './fixtures.ts';
import { readNotes } from './peers/notes.ts';
import { openContest, type Contestant } from './peers/two-workers.ts';

const BLOCK_MS = Number(process.env['BENCH_BLOCK_SECS'] ?? 60) * 1000;
/** Until the job has ended for the system and for whoever still runs it: four such runs one after the other. */
const WAIT_MS = 4 * BLOCK_MS;

export async function blockingTask(): Promise<Figure> {
  await using contest = await openContest();
  const lines = await Promise.all(contest.contestants.map(storyOf));
  return {
    title: `W5: a task that blocks its thread for ${BLOCK_MS / 1000} s, two workers, default settings`,
    lines: [
      ...lines,
      "not measured: bullmq's sandboxed processors, a process for each job, which its guide advises for such tasks",
      ...contest.notes,
    ],
  };
}

async function storyOf(contestant: Contestant): Promise<string> {
  const folder = await mkdtemp(path.join(tmpdir(), 'millrace-bench-'));
  const notes = path.join(folder, 'notes');
  try {
    await using workers = await contestant.open();
    const submittedAt = Date.now();
    await workers.submit({ notes, mode: 'block', blockMs: BLOCK_MS });
    let standing = await workers.standing();
    for (;;) {
      await new Promise((resolve) => void setTimeout(resolve, 250));
      standing = await workers.standing();
      const all = readNotes(notes);
      const running = all.filter(({ event }) => event === 'start').length * 2 > all.length;
      if (standing.ended && !running && all.length > 0) break;
      if (Date.now() - submittedAt > WAIT_MS) break;
    }
    const all = readNotes(notes);
    const starts = all.filter(({ event }) => event === 'start');
    const ends = all.filter(({ event }) => event === 'end');
    const at = starts.map(({ atMs }) => `${((atMs - submittedAt) / 1000).toFixed(1)} s`).join(', ');
    const right = starts.length === 1 && ends.length === 1 && /^(completed|succeeded)/.test(standing.text);
    const verdict = right ? 'right' : 'WRONG';
    return `${contestant.label.padEnd(44)} ${verdict}: begun ${starts.length}× (at ${at}), ended ${ends.length}×; after ${Math.round((Date.now() - submittedAt) / 1000)} s: ${standing.text}`;
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}
