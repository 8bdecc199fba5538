/** One invocation of a runtime's binary that ends by itself: deploy, test, offer-template, and every command of command mode. */
import type { Readable } from 'node:stream';
import { MillraceError, type Clock } from '@millrace/runner';
import type { GroupProcess, ProcessExit, ActivityProcesses } from './activity-processes.ts';
import { within } from './activity-processes.ts';

/** After the end of the process, what it wrote is waited for this long: a child of its own may hold the pipes for ever. */
const DRAIN_MS = 1_000;

export interface OneShotRequest {
  readonly file: string;
  readonly args: readonly string[];
  readonly cwd: string | undefined;
  readonly env: Readonly<Record<string, string>>;
  readonly timeoutMs: number;
  /** Between SIGTERM and SIGKILL. */
  readonly graceMs: number;
  /** Bytes of both streams together; more ends the process. */
  readonly outputBytes: number;
  readonly onOutput: (stream: 'stdout' | 'stderr', chunk: Uint8Array) => void;
}

export interface OneShot {
  readonly process: GroupProcess;
  /**
   * Resolves when the process has ended and its output was taken. Rejects with what {@link stop} was given, once it has ended.
   * A breached limit stops it with `deadline_exceeded` or `resource_exhausted`.
   */
  readonly ended: Promise<ProcessExit>;
  /** Ends the process group; the first reason is the one `ended` rejects with. */
  stop(reason: unknown): void;
}

/** @throws MillraceError when it cannot be started. */
export async function startOneShot(
  processes: ActivityProcesses,
  clock: Clock,
  request: OneShotRequest,
): Promise<OneShot> {
  const group = await processes.spawn({ ...request, stdio: ['ignore', 'pipe', 'pipe'] });
  const stdout = group.child.stdout!;
  const stderr = group.child.stderr!;
  // The first reason stays.
  const stopping = new AbortController();
  let ending: Promise<void> = Promise.resolve();
  const stop = (reason: unknown): void => {
    if (stopping.signal.aborted) return;
    stopping.abort(reason);
    ending = group.end(request.graceMs);
    // Its failure is the command's, see below.
    ending.catch(() => undefined);
  };
  let bytes = 0;
  const take = (stream: 'stdout' | 'stderr', chunk: Uint8Array): void => {
    if (stopping.signal.aborted) return;
    bytes += chunk.length;
    if (bytes > request.outputBytes) stop(outputExceeded(request.outputBytes));
    else request.onOutput(stream, chunk);
  };
  const drained = Promise.all([
    readAll(stdout, (chunk) => take('stdout', chunk)),
    readAll(stderr, (chunk) => take('stderr', chunk)),
  ]);
  const timer = clock.setTimer(
    () =>
      stop(new MillraceError('deadline_exceeded', `the command did not end within ${request.timeoutMs} ms`)),
    request.timeoutMs,
  );
  const ended = (async () => {
    const exit = await group.exited;
    timer.cancel();
    await within(clock, drained, DRAIN_MS);
    stdout.destroy();
    stderr.destroy();
    // A command is over when what it started is over, too.
    await ending;
    stopping.signal.throwIfAborted();
    return exit;
  })();
  return { process: group, ended, stop };
}

export function outputExceeded(limit: number): MillraceError {
  return new MillraceError(
    'resource_exhausted',
    `the command wrote more than the limit outputBytes of ${limit} bytes`,
    {
      details: { limit: 'outputBytes', value: limit },
    },
  );
}

function readAll(stream: Readable, take: (chunk: Uint8Array) => void): Promise<void> {
  return new Promise((resolve) => {
    stream.on('data', take);
    stream.once('close', resolve);
    stream.once('error', () => resolve());
  });
}
