import { describe, expect, test } from 'vitest';
import type { Note } from './protocol.ts';
import { MAX_PENDING_NOTES, MAX_PENDING_OUTPUT, NoteQueue } from './task-context.ts';

const event = (value: number): Note => ({ kind: 'event', value });
const progress = (value: number): Note => ({ kind: 'progress', value });

function queue(): { notes: NoteQueue; batches: (readonly Note[])[] } {
  const batches: (readonly Note[])[] = [];
  return { notes: new NoteQueue((batch) => batches.push(batch)), batches };
}

describe('notes of a task', () => {
  test('go out one batch at a time, in order', async () => {
    const { notes, batches } = queue();
    await notes.add(event(1));
    const second = notes.add(event(2));
    void notes.add(progress(3));
    void notes.add(event(4));
    expect(batches).toEqual([[event(1)]]);
    notes.taken();
    await second;
    expect(batches).toEqual([[event(1)], [event(2), progress(3), event(4)]]);
    notes.taken();
    void notes.add(event(5));
    expect(batches.at(-1)).toEqual([event(5)]);
  });

  test('a newer progress value replaces one that is still waiting', () => {
    const { notes, batches } = queue();
    for (const value of [1, 2, 3]) void notes.add(progress(value));
    for (const value of [1, 2]) void notes.add(event(value));
    void notes.add(progress(4));
    void notes.add(event(3));
    notes.taken();
    expect(batches).toEqual([[progress(1)], [event(1), event(2), progress(4), event(3)]]);
  });

  test('the last one that fits is kept, the next is dropped and counted', () => {
    const { notes, batches } = queue();
    void notes.add(event(0));
    for (let i = 1; i <= MAX_PENDING_NOTES; i += 1) void notes.add(event(i));
    notes.taken();
    expect(batches[1]).toHaveLength(MAX_PENDING_NOTES);
    for (let i = 0; i < MAX_PENDING_NOTES + 3; i += 1) void notes.add(event(i));
    notes.taken();
    expect(batches[2]).toHaveLength(MAX_PENDING_NOTES + 1);
    expect(batches[2]?.at(-1)).toMatchObject({ level: 'warn', fields: { dropped: 3 } });
  });

  test('output has its own bound and is not counted here', () => {
    const { notes, batches } = queue();
    void notes.add(event(0));
    for (let i = 0; i < 2 * MAX_PENDING_NOTES; i += 1) void notes.add(event(i), { bounded: false });
    notes.flush();
    expect(batches[1]).toHaveLength(2 * MAX_PENDING_NOTES);
  });

  test('output that piles up is kept to its bound, then dropped and counted', () => {
    const { notes, batches } = queue();
    const line = (chars: number): Note => ({
      kind: 'log',
      level: 'info',
      message: 'x'.repeat(chars),
      fields: {},
    });
    const output = (chars: number): void => void notes.add(line(chars), { bounded: false });
    void notes.add(event(0));
    output(MAX_PENDING_OUTPUT - 1);
    output(1);
    output(1);
    output(1);
    notes.taken();
    expect(batches[1]).toHaveLength(3);
    expect(batches[1]?.at(-1)).toMatchObject({ level: 'warn', fields: { dropped: 2 } });
    output(1);
    notes.taken();
    expect(batches[2]).toHaveLength(1);
  });
});
