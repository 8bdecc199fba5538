/** What a crashed node left behind: containers nobody waits for any more, and the folders of their tasks. */
import { hostname } from 'node:os';
import { describeError } from '@millrace/runner';
import type { Logger } from '@millrace/runner';
import { ContainerEngine, short } from './engine.ts';
import type { EngineOptions } from './engine.ts';
import { proveRemoved } from './removal.ts';
import { LABELS, isGone, ownerOf, thisProcess } from './owner.ts';
import type { Owner } from './owner.ts';

export interface SweepOptions {
  /** The node's id, as its containers carry it. Default: the host's name, as that of {@link container}. */
  readonly node?: string;
  readonly engine?: EngineOptions;
  /**
   * No two processes run under this node id at a time. Then every container of the node that this process did not start is swept, also where pids
   * tell nothing: after a node that ran in a container itself, or on another host. Default false.
   */
  readonly exclusive?: boolean;
  readonly signal?: AbortSignal;
  readonly log?: Logger;
}

/**
 * Kills and removes the containers, and the task folders, of processes of this node that are gone. A living process's are left alone, and so
 * is everything of which that is not certain. Call before the node takes its first task; the container runners also do it before
 * their first one.
 *
 * @returns the ids of the containers that are proven to be removed
 * @throws MillraceError `unavailable` and others of {@link ContainerEngine}; AggregateError when some could not be removed
 */
export async function sweepContainers(options: SweepOptions = {}): Promise<readonly string[]> {
  await using engine = new ContainerEngine(options.engine);
  return await sweep(engine, thisProcess(options.node ?? hostname()), options);
}

/** As {@link sweepContainers}, with an engine that stays open. */
export async function sweep(
  engine: ContainerEngine,
  self: Owner,
  options: Pick<SweepOptions, 'exclusive' | 'signal' | 'log'>,
): Promise<readonly string[]> {
  const { signal, log, exclusive = false } = options;
  const removed: string[] = [];
  const failures: unknown[] = [];
  for (const { id, labels } of await engine.listContainers({ [LABELS.node]: self.node }, { signal })) {
    if (!isGone(ownerOf(labels), self, exclusive)) continue;
    const fields = { container: short(id), task: labels[LABELS.task] ?? '', pid: labels[LABELS.pid] ?? '' };
    try {
      await proveRemoved(engine, id, { signal });
      removed.push(id);
      log?.warn('removed a container that a crashed node had left behind', fields);
    } catch (error) {
      if (signal?.aborted) throw signal.reason;
      log?.error('could not remove a container that a crashed node had left behind', {
        ...fields,
        error: describeError(error),
      });
      failures.push(error);
    }
  }
  if (failures.length > 0) {
    throw new AggregateError(
      failures,
      `${failures.length} containers that crashed nodes left behind could not be removed`,
    );
  }
  return removed;
}
