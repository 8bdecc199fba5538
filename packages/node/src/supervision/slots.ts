/**
 * Lanes in which one task runs at a time. A lane is
 *
 * - *idle*: nobody has it, and it is forgotten
 * - *running*: it has an owner, who also has it while it waits for its next try
 * - *terminating*: the owner was asked to stop and has not ended
 *
 * and what a task finds decides together with its admission:
 *
 *     lane          dropIfRunning   replace                                       queue
 *     idle          start           start                                         start
 *     running       refuse          ask the owner to stop, be first in the queue  wait, or refuse when the queue is full
 *     terminating   refuse          take the first place, refuse who had it       wait, or refuse when the queue is full
 *
 * Nobody starts before the owner has really ended. `replace` minds no limit of the queue, and displaces only its first.
 */
import { setMaxListeners } from 'node:events';
import { TaskAbort } from '@millrace/runner';
import type { AdmissionPolicy, Slot } from '@millrace/runner/model';

/** Why a task did not get its lane. */
export type RefusalReason = 'slot_busy' | 'slot_full' | 'superseded' | 'removed' | 'shutting_down';

/** Not an error: how it came out. */
export interface Refusal {
  readonly reason: RefusalReason;
  /** Who was in the way, or took the place; null: nobody in particular. */
  readonly by: string | null;
  /** In words. */
  readonly message: string;
}

export interface Admission {
  readonly lane: Slot;
  readonly admission: AdmissionPolicy;
  readonly queueLimit: number;
  /** For messages. */
  readonly taskId: string;
  /** Aborts when the task is ended from elsewhere: it leaves the queue, or its lane is terminating from then on. */
  readonly signal: AbortSignal;
  /** Ends the task for another one's sake. Called once at most, while it has the lane. */
  readonly stop: (by: string) => void;
}

/** The right to a lane, to be given back. */
export interface LaneHold {
  /** Harmless when repeated. */
  release(): void;
}

interface Lane {
  owner: Admission;
  /** Somebody asked the owner to stop. */
  replaced: boolean;
  readonly queue: Waiting[];
}

interface Waiting {
  readonly task: Admission;
  settle(outcome: LaneHold | Refusal): void;
}

export class Slots {
  readonly #lanes = new Map<Slot, Lane>();
  readonly #closing = new AbortController();

  constructor() {
    // Every task that pauses listens to it.
    setMaxListeners(0, this.#closing.signal);
  }

  /** Aborts when nothing is admitted any more. */
  get closing(): AbortSignal {
    return this.#closing.signal;
  }

  /** Tasks that wait for a lane. */
  get waiting(): number {
    return [...this.#lanes.values()].reduce((sum, lane) => sum + lane.queue.length, 0);
  }

  /** Takes the lane at once, or decides otherwise at once, or waits. Never rejects. */
  acquire(task: Admission): LaneHold | Refusal | Promise<LaneHold | Refusal> {
    if (this.closing.aborted) return shuttingDown();
    if (task.signal.aborted) return removed();
    const lane = this.#lanes.get(task.lane);
    if (lane === undefined) return this.#own(task, []);
    const owner = lane.owner.taskId;
    if (task.admission === 'dropIfRunning') {
      return {
        reason: 'slot_busy',
        by: owner,
        message: `slot ${task.lane} is taken by task ${owner}, and this task is to be dropped then (dropIfRunning)`,
      };
    }
    if (task.admission === 'replace') return this.#replace(lane, task);
    const waiting = lane.queue.length;
    if (waiting < task.queueLimit) return this.#wait(lane, task, waiting);
    return {
      reason: 'slot_full',
      by: owner,
      message: `slot ${task.lane} is taken by task ${owner} and its queue is full: ${waiting}/${task.queueLimit}`,
    };
  }

  /** Admits nobody any more, and refuses all that wait. Owners keep their lanes. */
  close(): void {
    if (this.closing.aborted) return;
    this.#closing.abort(new TaskAbort('shutdown', 'the node is stopping'));
    for (const lane of this.#lanes.values()) {
      for (const waiting of lane.queue.splice(0)) waiting.settle(shuttingDown());
    }
  }

  #own(task: Admission, queue: Waiting[]): LaneHold {
    const lane: Lane = { owner: task, replaced: false, queue };
    this.#lanes.set(task.lane, lane);
    return {
      release: () => {
        if (this.#lanes.get(task.lane) !== lane) return;
        this.#lanes.delete(task.lane);
        const next = queue.shift();
        if (next !== undefined) next.settle(this.#own(next.task, queue));
      },
    };
  }

  #replace(lane: Lane, task: Admission): Promise<LaneHold | Refusal> {
    if (lane.replaced || lane.owner.signal.aborted) {
      lane.queue.shift()?.settle({
        reason: 'superseded',
        by: task.taskId,
        message: `task ${task.taskId} took its place in slot ${task.lane} (replace)`,
      });
    }
    const outcome = this.#wait(lane, task, 0);
    if (!lane.replaced) {
      lane.replaced = true;
      lane.owner.stop(task.taskId);
    }
    return outcome;
  }

  #wait(lane: Lane, task: Admission, place: number): Promise<LaneHold | Refusal> {
    return new Promise((resolve) => {
      // The queue outlives the owner it waits for.
      const { queue } = lane;
      const leave = (): void => {
        queue.splice(queue.indexOf(waiting), 1);
        waiting.settle(removed());
      };
      const waiting: Waiting = {
        task,
        settle(outcome) {
          task.signal.removeEventListener('abort', leave);
          resolve(outcome);
        },
      };
      task.signal.addEventListener('abort', leave, { once: true });
      queue.splice(place, 0, waiting);
    });
  }
}

export function isRefusal(outcome: LaneHold | Refusal): outcome is Refusal {
  return 'reason' in outcome;
}

function shuttingDown(): Refusal {
  return { reason: 'shutting_down', by: null, message: 'the node is stopping' };
}

function removed(): Refusal {
  return { reason: 'removed', by: null, message: 'the task was ended while it waited for its slot' };
}
