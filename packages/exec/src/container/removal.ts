/** The end of a container: not asked for, but seen. */
import { MillraceError, describeError, sleep, systemClock } from '@millrace/runner';
import type { Clock } from '@millrace/runner';
import { short } from './engine.ts';
import type { ContainerEngine } from './engine.ts';

const FIRST_POLL_MS = 20;
const MAX_POLL_MS = 1000;
/** An engine under load takes seconds to unmount; beyond this something holds the container. */
export const REMOVE_MS = 30_000;

export interface RemovalOptions {
  readonly signal?: AbortSignal | undefined;
  readonly clock?: Clock;
  /** How long to try. Default 30 s. */
  readonly withinMs?: number;
}

/**
 * Kills and removes a container, and resolves when the engine says that it knows no such container. An engine that fails at it, or is away, is
 * asked again.
 *
 * @throws MillraceError `unavailable` when that takes longer than `withinMs`, with the engine's last words as cause; the signal's reason
 */
export async function proveRemoved(
  engine: ContainerEngine,
  id: string,
  options: RemovalOptions = {},
): Promise<void> {
  const { signal, clock = systemClock, withinMs = REMOVE_MS } = options;
  const deadline = clock.monotonic() + withinMs;
  const leftMs = (): number => Math.max(1, Math.ceil(deadline - clock.monotonic()));
  let problem: unknown = null;
  for (let pollMs = FIRST_POLL_MS; ; pollMs = Math.min(2 * pollMs, MAX_POLL_MS)) {
    try {
      const state = await engine.inspectContainer(id, { signal, timeoutMs: leftMs() });
      if (state === null) return;
      // Podman's forced removal would first give it its ten seconds to stop.
      if (state.running) await engine.signalContainer(id, 'SIGKILL', { signal, timeoutMs: leftMs() });
      await engine.removeContainer(id, { signal, timeoutMs: leftMs() });
      problem = new MillraceError('failed_precondition', `the engine shows it as ${state.status}`);
      if ((await engine.inspectContainer(id, { signal, timeoutMs: leftMs() })) === null) return;
    } catch (error) {
      if (signal?.aborted) throw signal.reason;
      // The last call is cut short by the end of the time, which says less than what the ones before it found.
      if (problem === null || !(MillraceError.is(error) && error.code === 'deadline_exceeded'))
        problem = error;
    }
    if (leftMs() <= pollMs) {
      throw new MillraceError(
        'unavailable',
        `container ${short(id)} on ${engine.host} is not proven to be removed after ${withinMs} ms: ${describeError(problem, 500)}`,
        { cause: problem, details: { container: id } },
      );
    }
    await sleep(clock, pollMs, signal);
  }
}
