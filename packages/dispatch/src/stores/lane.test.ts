import { MillraceError } from '@millrace/runner';
import { describe, expect, test } from 'vitest';
import type { Outcome } from '../store.ts';
import { Lane } from './lane.ts';
import type { Call } from './lane.ts';

interface Named extends Call {
  readonly name: string;
}

const call = (name: string, kind = 'work', weight = 1): Named => ({ name, kind, weight });
const done = (calls: readonly Named[]): Outcome<unknown>[] =>
  calls.map(({ name }) => ({ ok: true, value: name }));

/** A lane whose groups are written down, and wait for each other as transactions would. */
function recorded(run: (calls: readonly Named[]) => readonly Outcome<unknown>[] = done): {
  lane: Lane<Named>;
  groups: string[][];
} {
  const groups: string[][] = [];
  const lane = new Lane<Named>(async (calls) => {
    groups.push(calls.map(({ name }) => name));
    await new Promise<void>((resolve) => void setImmediate(resolve));
    return run(calls);
  });
  return { lane, groups };
}

describe('lane', () => {
  test('what is asked for in one turn is one group, what comes meanwhile the next', async () => {
    const { lane, groups } = recorded();
    const first = [lane.ask(call('a')), lane.ask(call('b'))];
    await first[0];
    const second = [lane.ask(call('c')), lane.ask(call('d'))];
    expect(await Promise.all([...first, ...second])).toEqual(['a', 'b', 'c', 'd']);
    expect(groups).toEqual([
      ['a', 'b'],
      ['c', 'd'],
    ]);
  });

  test('a group is of one kind, the oldest first, in the order of asking', async () => {
    const { lane, groups } = recorded();
    const kinds = ['x', 'y', 'x', 'y', 'z'];
    await Promise.all(kinds.map((kind, index) => lane.ask(call(String(index), kind))));
    expect(groups).toEqual([['0', '2'], ['1', '3'], ['4']]);
  });

  test('a group ends with the call that brings its weight to 2048', async () => {
    const { lane, groups } = recorded();
    await Promise.all([
      lane.ask(call('a', 'work', 2047)),
      lane.ask(call('b')),
      lane.ask(call('c')),
      lane.ask(call('huge', 'work', 9999)),
      lane.ask(call('d')),
    ]);
    expect(groups).toEqual([['a', 'b'], ['c', 'huge'], ['d']]);
  });

  test('one that makes its group fail fails alone, and the others are run again', async () => {
    const { lane, groups } = recorded((calls) => {
      if (calls.some(({ name }) => name === 'bad')) throw new MillraceError('invalid_argument', 'bad');
      return done(calls);
    });
    const answers = await Promise.allSettled(['a', 'bad', 'b'].map((name) => lane.ask(call(name))));
    expect(answers.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled']);
    expect(groups).toEqual([['a', 'bad', 'b'], ['a'], ['bad'], ['b']]);
  });

  test('when the storage fails the whole group is refused at once', async () => {
    const { lane, groups } = recorded(() => {
      throw new MillraceError('unavailable', 'gone');
    });
    const answers = await Promise.allSettled(['a', 'b'].map((name) => lane.ask(call(name))));
    expect(answers).toMatchObject([
      { status: 'rejected', reason: { code: 'unavailable' } },
      { status: 'rejected', reason: { code: 'unavailable' } },
    ]);
    expect(groups).toEqual([['a', 'b']]);
  });

  test('closing waits for what was asked and refuses what comes after', async () => {
    const { lane, groups } = recorded();
    const asked = lane.ask(call('a'));
    await lane.close();
    expect(groups).toEqual([['a']]);
    expect(await asked).toBe('a');
    await expect(lane.ask(call('b'))).rejects.toMatchObject({ code: 'failed_precondition' });
  });
});
