/** Beginnings and endings of a task, as lines of a file that every process of a measurement appends to. */
import { appendFileSync, existsSync, readFileSync } from 'node:fs';

export interface Note {
  readonly event: 'start' | 'end';
  readonly pid: number;
  /** Epoch milliseconds. */
  readonly atMs: number;
}

/** How a task behaves: `hang` waits for ever when begun for the first time, `block` keeps its thread busy for so long. */
export interface NotedTask {
  readonly notes: string;
  readonly mode: 'hang' | 'block';
  readonly blockMs: number;
}

/** Notes the beginning, does what the mode says, notes the ending. */
export async function performNoted(task: NotedTask): Promise<void> {
  const first = readNotes(task.notes).length === 0;
  note(task.notes, 'start');
  if (task.mode === 'block') {
    // The thread runs nothing else, as with a native call or a long loop, but leaves the machine to others.
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, task.blockMs);
  } else if (first) {
    await new Promise<never>(() => {});
  }
  note(task.notes, 'end');
}

function note(file: string, event: Note['event']): void {
  const line: Note = { event, pid: process.pid, atMs: Date.now() };
  appendFileSync(file, `${JSON.stringify(line)}\n`);
}

export function readNotes(file: string): Note[] {
  if (!existsSync(file)) return [];
  return readFileSync(file, 'utf8')
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => JSON.parse(line) as Note);
}
