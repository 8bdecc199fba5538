import { describe, expect, test } from 'vitest';
import type { AdmissionPolicy } from '@millrace/runner/model';
import { Slots, isRefusal, type LaneHold, type Refusal } from './slots.ts';

/** A task that asks for lane `x`. */
class Task {
  readonly controller = new AbortController();
  readonly stoppedBy: string[] = [];
  outcome: LaneHold | Refusal | null = null;

  constructor(slots: Slots, taskId: string, admission: AdmissionPolicy, queueLimit = 100, lane = 'x') {
    const outcome = slots.acquire({
      lane,
      admission,
      queueLimit,
      taskId,
      signal: this.controller.signal,
      stop: (by) => void this.stoppedBy.push(by),
    });
    if (outcome instanceof Promise) void outcome.then((settled) => (this.outcome = settled));
    else this.outcome = outcome;
  }

  get state(): string {
    if (this.outcome === null) return 'waits';
    return isRefusal(this.outcome) ? this.outcome.reason : 'owns';
  }

  async release(): Promise<void> {
    (this.outcome as LaneHold).release();
    await Promise.resolve();
  }
}

const states = (...tasks: Task[]): string[] => tasks.map((task) => task.state);
const settle = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

describe('a lane that is idle', () => {
  test.each(['dropIfRunning', 'replace', 'queue'] as const)('is given to %s at once', (admission) => {
    expect(new Task(new Slots(), 'a', admission, 0).state).toBe('owns');
  });

  test('has nothing to do with another', () => {
    const slots = new Slots();
    expect(
      states(new Task(slots, 'a', 'dropIfRunning'), new Task(slots, 'b', 'dropIfRunning', 0, 'y')),
    ).toEqual(['owns', 'owns']);
  });

  test('is so again when its owner is gone, and giving it back twice takes it from nobody', async () => {
    const slots = new Slots();
    const a = new Task(slots, 'a', 'dropIfRunning');
    await a.release();
    const b = new Task(slots, 'b', 'dropIfRunning');
    await a.release();
    expect(states(b, new Task(slots, 'c', 'dropIfRunning'))).toEqual(['owns', 'slot_busy']);
  });
});

describe('a lane with an owner', () => {
  test('refuses dropIfRunning and says who has it', () => {
    const slots = new Slots();
    const a = new Task(slots, 'a', 'queue');
    const b = new Task(slots, 'b', 'dropIfRunning');
    expect(b.outcome).toEqual({
      reason: 'slot_busy',
      by: 'a',
      message: 'slot x is taken by task a, and this task is to be dropped then (dropIfRunning)',
    });
    expect(a.stoppedBy).toEqual([]);
  });

  test('queues in order, up to the limit', async () => {
    const slots = new Slots();
    const [a, b, c, d] = ['a', 'b', 'c', 'd'].map((id) => new Task(slots, id, 'queue', 2)) as [
      Task,
      Task,
      Task,
      Task,
    ];
    expect(states(a, b, c, d)).toEqual(['owns', 'waits', 'waits', 'slot_full']);
    expect(d.outcome).toMatchObject({ message: 'slot x is taken by task a and its queue is full: 2/2' });
    expect(slots.waiting).toBe(2);
    await a.release();
    expect(states(b, c)).toEqual(['owns', 'waits']);
    expect(new Task(slots, 'e', 'queue', 2).state).toBe('waits');
    await b.release();
    expect(c.state).toBe('owns');
  });

  test('with a limit of zero queues nobody', () => {
    const slots = new Slots();
    const a = new Task(slots, 'a', 'queue');
    expect(states(a, new Task(slots, 'b', 'queue', 0))).toEqual(['owns', 'slot_full']);
  });

  test('is asked to stop for replace, which starts when it has ended, before those that wait, whatever their number', async () => {
    const slots = new Slots();
    const a = new Task(slots, 'a', 'queue');
    const b = new Task(slots, 'b', 'queue', 1);
    const c = new Task(slots, 'c', 'replace', 1);
    expect(a.stoppedBy).toEqual(['c']);
    expect(states(a, b, c)).toEqual(['owns', 'waits', 'waits']);
    await a.release();
    expect(states(b, c)).toEqual(['waits', 'owns']);
    expect(c.stoppedBy).toEqual([]);
    await c.release();
    expect(b.state).toBe('owns');
  });
});

describe('a lane whose owner is to end', () => {
  test('refuses dropIfRunning, queues, and lets replace take the first place from who had it', async () => {
    const slots = new Slots();
    const a = new Task(slots, 'a', 'queue');
    const b = new Task(slots, 'b', 'queue');
    const c = new Task(slots, 'c', 'replace');
    const d = new Task(slots, 'd', 'replace');
    const e = new Task(slots, 'e', 'dropIfRunning');
    const f = new Task(slots, 'f', 'queue');
    await settle();
    expect(states(a, b, c, d, e, f)).toEqual(['owns', 'waits', 'superseded', 'waits', 'slot_busy', 'waits']);
    expect(c.outcome).toMatchObject({ by: 'd', message: 'task d took its place in slot x (replace)' });
    expect(a.stoppedBy).toEqual(['c']);
    await a.release();
    await d.release();
    await b.release();
    expect(f.state).toBe('owns');
  });

  test('because it was ended from elsewhere is the same, and it is told who comes', async () => {
    const slots = new Slots();
    const a = new Task(slots, 'a', 'queue');
    const b = new Task(slots, 'b', 'queue');
    a.controller.abort();
    const c = new Task(slots, 'c', 'replace');
    await settle();
    expect(states(b, c)).toEqual(['superseded', 'waits']);
    await a.release();
    expect(c.state).toBe('owns');
  });
});

describe('waiting for a lane', () => {
  test('ends when the task is ended, and the next in line is not kept', async () => {
    const slots = new Slots();
    const a = new Task(slots, 'a', 'queue');
    const b = new Task(slots, 'b', 'queue');
    const c = new Task(slots, 'c', 'queue');
    b.controller.abort();
    await settle();
    expect(states(a, b, c)).toEqual(['owns', 'removed', 'waits']);
    await a.release();
    expect(c.state).toBe('owns');
    const late = new AbortController();
    late.abort();
    expect(
      slots.acquire({
        lane: 'y',
        admission: 'queue',
        queueLimit: 1,
        taskId: 'd',
        signal: late.signal,
        stop: () => undefined,
      }),
    ).toMatchObject({ reason: 'removed' });
  });

  test('ends when nothing is admitted any more; who has a lane keeps it', async () => {
    const slots = new Slots();
    const a = new Task(slots, 'a', 'queue');
    const b = new Task(slots, 'b', 'queue');
    slots.close();
    slots.close();
    await settle();
    expect(slots.closing.aborted).toBe(true);
    expect(states(a, b, new Task(slots, 'c', 'queue', 1, 'y'))).toEqual([
      'owns',
      'shutting_down',
      'shutting_down',
    ]);
    await a.release();
    expect(slots.waiting).toBe(0);
  });
});
