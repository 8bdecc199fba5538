/** Signals as steps down a node's ladder, with words for the person who pressed Ctrl-C. */
import type { ComputeNode } from '@millrace/node';
import type { Io } from './io.ts';
import { formatDuration } from './units.ts';

const DEFAULT_DRAIN_MS = 30_000;

export interface StopLadder extends Disposable {
  /** Resolves at the first signal. */
  readonly stopped: Promise<void>;
}

/** Each signal is one `node.stop()`. Without a node the first signal is the end. */
export function stopLadder(io: Io, node: ComputeNode | null, drainMs: number | null): StopLadder {
  let resolve = (): void => {};
  const stopped = new Promise<void>((done) => {
    resolve = done;
  });
  let signals = 0;
  const listening = io.onStop(() => {
    signals += 1;
    resolve();
    if (node === null) return;
    const tasks = `${node.active} running ${node.active === 1 ? 'task' : 'tasks'}`;
    if (signals === 1 && node.active > 0) {
      io.stderr.write(
        `stopping: no new work; ${tasks} may go on for ${formatDuration(drainMs ?? DEFAULT_DRAIN_MS)} (Ctrl-C again to abort)\n`,
      );
    } else if (signals === 1) io.stderr.write('stopping\n');
    else if (signals === 2) io.stderr.write(`aborting ${tasks} (Ctrl-C again to kill)\n`);
    else if (signals === 3) io.stderr.write(`killing ${tasks}\n`);
    node.stop();
  });
  return { stopped, [Symbol.dispose]: () => listening[Symbol.dispose]() };
}
