/**
 * W4: the worker that runs a job is killed with SIGKILL while another one is idle. How long until the job runs again, with the
 * settings each system comes with. All systems wait at the same time: they only wait.
 */
import { rm, mkdtemp } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { times, type Figure } from './fixtures.ts';
import { readNotes } from './peers/notes.ts';
import { openContest, type Contestant } from './peers/two-workers.ts';
import { median } from './store-throughput.ts';

const ROUNDS = 2;
const TTL_MS = 15_000;
/** From the beginning of the job to the kill: somewhere between two heartbeats. */
const RUNS_FOR_MS = 2_500;
/** Longer than this is not waited for: graphile-worker's own limit is 4 hours, that of pg-boss 15 minutes. */
const WAIT_MS = Number(process.env['BENCH_RECOVERY_WAIT_SECS'] ?? 120) * 1000;

export async function recovery(): Promise<Figure> {
  await using contest = await openContest();
  const { contestants } = contest;
  const results = await Promise.all(contestants.map(roundsOf));
  const [ours = []] = results;
  const oursMs = median(ours.filter((value) => value !== null));
  return {
    title: 'W4: from SIGKILL of the worker to the job running again on the other, default settings',
    lines: [
      ...contestants.map(({ label }, index) => {
        const values = results[index] ?? [];
        const recovered = values.filter((value) => value !== null);
        const title = label.padEnd(44);
        if (recovered.length < values.length || recovered.length === 0) {
          return `${title} not within ${WAIT_MS / 1000} s${index === 0 ? '' : `, over ${times(WAIT_MS, oursMs)} of ours`}`;
        }
        const figures = recovered.map((value) => `${(value / 1000).toFixed(1)} s`).join(', ');
        if (index > 0) return `${title} ${figures}   takes ${times(median(recovered), oursMs)} of ours`;
        return `${title} ${figures}   aim: at most the TTL + 1 s = ${(TTL_MS + 1000) / 1000} s; ${times(Math.max(...recovered), TTL_MS + 1000)} of it`;
      }),
      ...contest.notes,
    ],
  };
}

/** Milliseconds of each round; null and no further round where it took too long. */
async function roundsOf(contestant: Contestant): Promise<(number | null)[]> {
  const results: (number | null)[] = [];
  for (let round = 0; round < ROUNDS && !results.includes(null); round += 1) {
    results.push(await recoveryOf(contestant));
  }
  return results;
}

async function recoveryOf(contestant: Contestant): Promise<number | null> {
  const folder = await mkdtemp(path.join(tmpdir(), 'millrace-bench-'));
  const notes = path.join(folder, 'notes');
  try {
    await using workers = await contestant.open();
    await workers.submit({ notes, mode: 'hang', blockMs: 0 });
    const starts = async (count: number, limitMs: number): Promise<boolean> => {
      const until = performance.now() + limitMs;
      while (readNotes(notes).filter(({ event }) => event === 'start').length < count) {
        if (performance.now() > until) return false;
        await pause(20);
      }
      return true;
    };
    if (!(await starts(1, 60_000))) throw new Error('the job did not begin within 60 s');
    await pause(RUNS_FOR_MS);
    const [first] = readNotes(notes);
    if (first === undefined) throw new Error('the notes are gone');
    const killedAtMs = Date.now();
    process.kill(first.pid, 'SIGKILL');
    if (!(await starts(2, WAIT_MS))) return null;
    const second = readNotes(notes).filter(({ event }) => event === 'start')[1];
    return (second?.atMs ?? Number.NaN) - killedAtMs;
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

async function pause(ms: number): Promise<void> {
  await new Promise((resolve) => void setTimeout(resolve, ms));
}
