import { MillraceError } from '@millrace/runner';
import { describe, expect, test } from 'vitest';
import { GroupCommit, MAX_GROUP_WEIGHT } from './group-commit.ts';
import type { Transaction } from './group-commit.ts';

/** A transaction over an array: what is committed stays, and every call is noted. */
class Ledger implements Transaction {
  readonly committedValues: string[] = [];
  readonly calls: string[] = [];
  commitError: unknown = null;
  onExtend: () => void = () => {};
  #pending: string[] = [];
  writes = 0;

  begin(): void {
    this.calls.push('begin');
    this.#pending = [];
  }
  extend(): void {
    this.onExtend();
  }
  commit(): void {
    this.calls.push('commit');
    if (this.commitError !== null) throw this.commitError;
    this.committedValues.push(...this.#pending);
  }
  rollback(): void {
    this.calls.push('rollback');
    this.#pending = [];
  }
  storageError(error: unknown): MillraceError | null {
    return error instanceof Error && error.message === 'disk full'
      ? new MillraceError('resource_exhausted', 'disk full')
      : null;
  }
  committed(): void {
    this.calls.push('committed');
  }
  write(value: string): string {
    this.writes += 1;
    this.#pending.push(value);
    return value;
  }
}

/** Turns that run when the test says so. */
function manual(): { schedule: (run: () => void) => void; turn: () => void } {
  const waiting: (() => void)[] = [];
  return { schedule: (run) => waiting.push(run), turn: () => waiting.shift()?.() };
}

describe('group commit', () => {
  test('operations of one turn share a transaction, and settle after it', async () => {
    const ledger = new Ledger();
    const { schedule, turn } = manual();
    const group = new GroupCommit(ledger, schedule);
    const answers = ['a', 'b', 'c'].map((value) => group.run(1, () => ledger.write(value)));
    expect(ledger.calls).toEqual([]);
    turn();
    expect(ledger.calls).toEqual(['begin', 'commit', 'committed']);
    expect(await Promise.all(answers)).toEqual(['a', 'b', 'c']);
    expect(ledger.committedValues).toEqual(['a', 'b', 'c']);
  });

  test('a turn that wrote nothing is not announced', async () => {
    const ledger = new Ledger();
    const group = new GroupCommit(ledger);
    expect(await group.run(1, () => 5)).toBe(5);
    expect(ledger.calls).toEqual(['begin', 'commit']);
  });

  test('one that throws before writing is refused alone', async () => {
    const ledger = new Ledger();
    const group = new GroupCommit(ledger);
    const answers = await Promise.allSettled([
      group.run(1, () => ledger.write('a')),
      group.run(1, () => {
        throw new MillraceError('not_found', 'no');
      }),
      group.run(1, () => ledger.write('b')),
    ]);
    expect(answers.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled']);
    expect(ledger.calls).toEqual(['begin', 'commit', 'committed']);
  });

  test('one that throws after writing is undone, and the others run again without it', async () => {
    const ledger = new Ledger();
    const group = new GroupCommit(ledger);
    const answers = await Promise.allSettled([
      group.run(1, () => ledger.write('a')),
      group.run(1, () => {
        ledger.write('half');
        throw new Error('a bug');
      }),
      group.run(1, () => ledger.write('b')),
    ]);
    expect(answers.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled']);
    expect(answers[1]).toMatchObject({ reason: { code: 'internal', message: 'a bug' } });
    expect(ledger.committedValues).toEqual(['a', 'b']);
  });

  test('what the transaction is extended by comes after the operations and is in their commit', async () => {
    const ledger = new Ledger();
    const group = new GroupCommit(ledger);
    ledger.onExtend = () => void ledger.write('more');
    expect(await Promise.all(['a', 'b'].map((value) => group.run(1, () => ledger.write(value))))).toEqual([
      'a',
      'b',
    ]);
    expect(ledger.committedValues).toEqual(['a', 'b', 'more']);
    expect(ledger.calls).toEqual(['begin', 'commit', 'committed']);
  });

  test('an extension that throws is undone, and the operations run without it', async () => {
    const ledger = new Ledger();
    const group = new GroupCommit(ledger);
    ledger.onExtend = () => {
      ledger.write('half');
      throw new Error('a bug');
    };
    expect(await group.run(1, () => ledger.write('a'))).toBe('a');
    expect(ledger.committedValues).toEqual(['a']);
    expect(ledger.calls).toEqual(['begin', 'rollback', 'begin', 'commit', 'committed']);
  });

  test('a commit that fails refuses the whole turn, and the next turn goes on', async () => {
    const ledger = new Ledger();
    const group = new GroupCommit(ledger);
    ledger.commitError = new Error('disk full');
    const answers = await Promise.allSettled([
      group.run(1, () => ledger.write('a')),
      group.run(1, () => ledger.write('b')),
    ]);
    expect(answers).toMatchObject([
      { status: 'rejected', reason: { code: 'resource_exhausted' } },
      { status: 'rejected', reason: { code: 'resource_exhausted' } },
    ]);
    expect(ledger.calls).toEqual(['begin', 'commit', 'rollback']);
    ledger.commitError = null;
    expect(await group.run(1, () => ledger.write('c'))).toBe('c');
    expect(ledger.committedValues).toEqual(['c']);
  });

  test('a transaction takes work up to its weight, the rest waits for the next turn', async () => {
    const ledger = new Ledger();
    const { schedule, turn } = manual();
    const group = new GroupCommit(ledger, schedule);
    const run = (weight: number, value: string) => void group.run(weight, () => ledger.write(value));
    run(MAX_GROUP_WEIGHT - 1, 'a');
    run(1, 'b');
    run(1, 'c');
    run(MAX_GROUP_WEIGHT * 9, 'd');
    run(1, 'e');
    turn();
    expect(ledger.committedValues).toEqual(['a', 'b']);
    turn();
    expect(ledger.committedValues).toEqual(['a', 'b', 'c', 'd']);
    turn();
    expect(ledger.committedValues).toEqual(['a', 'b', 'c', 'd', 'e']);
  });

  test('closing waits for what was taken and takes no more', async () => {
    const ledger = new Ledger();
    const group = new GroupCommit(ledger);
    const taken = group.run(1, () => ledger.write('a'));
    const closed = group.close();
    await expect(group.run(1, () => ledger.write('b'))).rejects.toMatchObject({
      code: 'failed_precondition',
    });
    await closed;
    expect(ledger.committedValues).toEqual(['a']);
    expect(await taken).toBe('a');
    await group.close();
  });
});
